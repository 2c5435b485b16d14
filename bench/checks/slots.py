#!/usr/bin/env python3
"""Show on a real llama.cpp server that a cancelled prompt frees its slot, and that an
answer is continued by another provider.

    python bench/checks/slots.py http://127.0.0.1:8080

The server is shared through a relay by `neuroengine.py share`; its /slots is watched. Each
way to cancel is tried in the middle of an answer, and while a long prompt is read
(prefill), which llama.cpp can leave only after a batch (n_batch): its own time, and shown
only. Exit status 1 if an answer's slot stays busy for longer than SLOT_SECONDS.
"""

import argparse
import contextlib
import http.client
import json
import os
import sys
import threading
import time
import urllib.parse
import urllib.request

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from harness import Workspace, share, wait_for

import neuroengine
import neuroengine_server

SLOT_SECONDS = 2.0         # from the cancellation to an idle slot


def busy(upstream):
    """How many of the server's slots work."""
    with urllib.request.urlopen(upstream + "/slots", timeout=20) as response:
        return sum(slot["is_processing"] for slot in json.loads(response.read().decode()))


class World:
    """The relay, the shared server, and the ways to ask."""

    def __init__(self, relay_url, upstream, context):
        self.relay, self.upstream = relay_url, upstream
        self.host = urllib.parse.urlsplit(relay_url).netloc
        # Of numbers, which no cache has seen before: as long as the context allows.
        self.long_prompt = lambda: " ".join(
            str(time.monotonic_ns())[-6:] for _ in range(context // 9))
        self.context = context

    def until_busy(self, slots):
        """Wait until exactly that many slots work."""
        wait_for(lambda: busy(self.upstream) == slots, 60, "%d busy slots" % slots)

    def native(self, prompt, key):
        """Start a native streamed prompt; its socket is kept by the response."""
        return self._post("/Bench", {"message": prompt, "stream": True, "key": key,
                                     "max_new_len": self.context, "ignore_eos": True})

    def openai(self, prompt, stream):
        return self._post("/v1/chat/completions", {
            "model": "Bench", "messages": [{"role": "user", "content": prompt}],
            "stream": stream, "max_tokens": self.context, "ignore_eos": True})

    def messages(self, prompt, stream):
        """The same through what is passed through: the relay and the bridge do not look."""
        return self._post("/v1/messages", {
            "model": "Bench", "messages": [{"role": "user", "content": prompt}],
            "stream": stream, "max_tokens": self.context})

    def _post(self, path, body):
        connection = http.client.HTTPConnection(self.host, timeout=60)
        connection.request("POST", path, json.dumps(body))
        return connection

    def cancel_one(self, how, phase, number):
        """Start a prompt, cancel it; seconds until no slot works any more."""
        key = "%s-%s-%d" % (how, phase, number)
        prompt = self.long_prompt() if phase == "in prefill" else "Tell me a long story."
        if how == "stop command":
            connection = self.native(prompt, key)
        else:
            ask = self.messages if "messages" in how else self.openai
            connection = ask(prompt, "streamed" in how)
        self.until_busy(1)
        if phase == "mid-answer":
            if "whole" in how:
                time.sleep(1.5)                # it shows nothing of itself
            else:
                connection.sock.recv(1)
                time.sleep(0.5)
        began = time.monotonic()
        if how == "stop command":
            neuroengine.Neuroengine("Bench", self.relay).cancel(key)
        else:
            connection.sock.close()
        self.until_busy(0)
        took = time.monotonic() - began
        connection.close()
        return took

    def all_slots(self, slots):
        """Take every slot with an endless answer; a further prompt waits until one of
        them is cancelled: seconds from then to its first token."""
        connections = [self.openai("Count to a million.", True) for _ in range(slots)]
        self.until_busy(slots)
        time.sleep(1)
        waiting, first = self.native("Hello", "last"), []
        thread = threading.Thread(target=lambda: first.append(self._first_items(waiting)))
        thread.start()
        time.sleep(1.5)
        assert not first, "there was room after all"
        began = time.monotonic()
        connections[0].sock.close()
        thread.join(30)
        took = first[0] - began
        neuroengine.Neuroengine("Bench", self.relay).cancel("last")
        for connection in connections:
            connection.sock.close()
        self.until_busy(0)
        return took

    @staticmethod
    def _first_items(connection):
        response = connection.getresponse()
        while b'"items"' not in response.readline():
            pass
        return time.monotonic()


def continuation(upstream):
    """An answer that is cut after some tokens and continued, and the same one uncut."""
    llm = neuroengine.Upstream(upstream)
    llm.find()
    model, rows = llm.model(), []
    for request in ({"message": "List the planets of the solar system."},
                    {"message": "The planets are Mercury,", "raw": "True"}):
        request = dict(request, temperature=0, top_k=1, seed=1)
        whole = text_of(llm, model, dict(request, max_new_len=24))
        begun = text_of(llm, model, dict(request, max_new_len=9))
        rest = text_of(llm, model, dict(request, max_new_len=15, reply_so_far=begun))
        rows.append((whole, begun, rest))
    return model.continues, rows


def text_of(llm, model, request):
    """The text of the answer that the bridge makes of a request."""
    question = neuroengine.Rendering(model, llm.kind).question(request)
    parser = question.parser(model)
    items = parser.feed(llm.transport.open("POST", question.path, question.body).read())
    return "".join(item for item in items + parser.finish() if isinstance(item, str))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("upstream", metavar="URL", help="a llama.cpp server")
    parser.add_argument("--tries", type=int, default=3, help="of each (default: 3)")
    options = parser.parse_args(argv)
    upstream = options.upstream.rstrip("/")
    with urllib.request.urlopen(upstream + "/slots", timeout=20) as response:
        slots = json.loads(response.read().decode())
    relay, failed = neuroengine_server.Relay("127.0.0.1", 0), False
    relay.start()
    with contextlib.ExitStack() as stack:
        stack.callback(relay.stop)
        space = stack.enter_context(Workspace("slots"))
        share(space, relay.url, "Bench", upstream, "--workers", "4")
        world = World(relay.url, upstream, slots[0]["n_ctx"])
        for how in ("stop command", "/v1 streamed hang-up", "/v1 whole hang-up",
                    "messages, streamed hang-up", "messages, whole hang-up"):
            for phase in ("in prefill", "mid-answer"):
                took = [world.cancel_one(how, phase, n) for n in range(options.tries)]
                failed |= phase == "mid-answer" and max(took) > SLOT_SECONDS
                print("%-26s %-11s slot idle after %s s" % (
                    how, phase, ", ".join("%.2f" % t for t in took)), flush=True)
        took = world.all_slots(len(slots))
        print("all %d slots taken: after a hang-up the next prompt's first token came "
              "within %.2f s" % (len(slots), took), flush=True)
    continues, rows = continuation(upstream)
    print("declares that it continues answers: %s" % continues)
    for whole, begun, rest in rows:
        # Further on, rounding in batches of another size may lead elsewhere.
        goes_on = begun and (begun + rest)[:len(begun) + 8] == whole[:len(begun) + 8]
        failed |= continues and not goes_on
        print("%s: %r + %r; in one go %r" % (
            "goes on" if goes_on else "does NOT go on", begun, rest, whole))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
