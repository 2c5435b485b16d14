#!/usr/bin/env python3
"""A fault run: many clients, several providers and a relay, all of them under faults.

    python bench/checks/faults.py [--minutes 10] [--seed N]

Providers are killed, stopped and continued, and interrupted; connections are cut in the
middle of a message; the relay is restarted by SIGTERM and by kill -9. A checker compares
each answer with what it must be: exactly one end, which is either the whole text, or a
beginning of it and then an error that a fault at that time explains. At the end the
relay's threads, descriptors and memory must be back where they were.

A provider's answer is computed from the prompt and from a random number that it begins
with, so that even two generations of one answer mixed into each other are found.

POSIX, standard library only, loopback only. Exit status 1 if anything was wrong.
"""

import argparse
import collections
import http.client
import json
import os
import random
import re
import signal
import socket
import struct
import sys
import threading
import time
import traceback

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from harness import BROKEN, Proxy, Relay, Workspace, end_on_signals, wait_for

from neuroengine import Neuroengine, NeuroengineError, NeuroengineServer

PROMPT_SECONDS = 150     # no prompt may take longer: three leases, and the work itself
CALM_SECONDS = 60        # for the relay to come to rest
SPARE = 1, 1, 16         # threads, descriptors and MB that it may then have more
WORKERS = 4

##############################################################################
# The answers, and the judgement of one
##############################################################################

WORDS = ("time", "caf\u00e9", "\u2603", "\U0001f600", "{", "\"", "\\", "\n", "data:",
         "x" * 5000)


def tokens(prompt, nonce):
    """The tokens of the one right answer to a prompt that begins with this number."""
    rand = random.Random("%s/%s" % (prompt, nonce))
    yield nonce + ": "
    for n in range(rand.randrange(1, 70)):
        if rand.random() < 0.05:
            yield rand.choice(WORDS) + " "
        yield "%d.%d " % (n, rand.randrange(10 ** rand.randrange(1, 6)))


def judge(prompt, text):
    """What a text is of the right answer: "whole", "part", or "wrong"."""
    if not text:
        return "part"
    right = list(tokens(prompt, text[:8]))
    whole = "".join(right)
    return ("wrong" if not re.match(r"[0-9a-f]{8}: ", text) or not whole.startswith(text)
            else "whole" if len(text) == len(whole) else "part")


def provide(url, name, key, continues, pause):
    """Be a provider; the whole of its process."""
    active = []

    def answer(request):
        so_far, prompt = request.get("reply_so_far", ""), request["message"]
        if not continues:
            so_far = ""                    # such a callback knows nothing of it
        left = len(so_far)
        active.append(prompt)
        if so_far:
            print("goes on", flush=True)
        try:
            for token in tokens(prompt, so_far[:8] or "%08x" % random.getrandbits(32)):
                if left > 0:               # made by another already
                    left -= len(token)
                    continue
                time.sleep(random.uniform(0, 2 * pause))
                yield token
            assert left == 0, "the text so far is not of whole tokens"
        finally:
            active.remove(prompt)

    server = NeuroengineServer(url)
    while server.login(name, key) == -1:   # the relay is being restarted
        time.sleep(0.3)
    print("logged in", flush=True)
    server.listen(answer, WORKERS, continues=continues)
    print("active %d" % len(active), flush=True)


##############################################################################
# Connections that break
##############################################################################


class Cutter(Proxy):
    """A proxy that breaks connections, often within a write."""

    def __init__(self, port, rand):
        super().__init__(port)
        self.rand, self.chance, self.cuts = rand, 0.0, 0

    def passing(self, data, pair, to_client):
        if self.rand.random() >= self.chance:
            return data
        pair[not to_client].sendall(data[:self.rand.randrange(len(data) + 1)])
        self._cut(pair)
        raise OSError("cut")

    def _cut(self, pair):
        """End a connection, half of the time with a reset, which loses what is sent."""
        self.cuts += 1
        for sock in pair:
            try:
                if self.rand.random() < 0.5:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                                    struct.pack("ii", 1, 0))
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def cut(self, share=1.0):
        """Cut that share of all connections."""
        with self.lock:
            pairs = list(self.pairs)
        for pair in pairs:
            if self.rand.random() < share:
                self._cut(pair)

    def close(self):
        super().close()
        self.cut()


##############################################################################
# The clients: each returns (text, how it ended)
##############################################################################

# How an answer ended: "end", cleanly; "left", the client went away on purpose; "cut", a
# bare connection without a last record; else the name of an error.


class Wrong(Exception):
    """An answer that broke the protocol's own rules."""


class Clients:
    """Ways to ask. service, url: of whom and where; leave: when to go away, or None,
    a number of pieces; prompt: the text."""

    def __init__(self, rand):
        self.rand = rand

    def whole(self, url, service, prompt, leave):
        """Neuroengine.request"""
        reply = Neuroengine(service, url).request(prompt, raw=True)
        return ("", reply.error) if reply.errorcode else (reply, "end")

    def polled(self, url, service, prompt, leave):
        """Neuroengine.request with a stream key, until "" """
        api, key, texts = Neuroengine(service, url), "%032x" % random.getrandbits(128), []
        while leave is None or len(texts) < leave:
            reply = api.request(prompt, streamkey=key, gettokens=self.rand.randrange(1, 30))
            if reply.errorcode:
                return "".join(texts), reply.error
            if not reply:
                break
            texts.append(reply)
        text = "".join(texts)
        if leave is None or len(texts) < leave:
            return text, "end"
        if leave % 2:                      # say so, or vanish
            try:
                api.cancel(key)
            except NeuroengineError:
                pass
        return text, "left"

    def stream(self, url, service, prompt, leave):
        """Neuroengine.stream"""
        texts, stream = [], Neuroengine(service, url).stream(prompt)
        try:
            if leave == 0:
                return "", "left"
            for text in stream:
                texts.append(text)
                if len(texts) == leave:
                    return "".join(texts), "left"
        except NeuroengineError as error:
            return "".join(texts), error.name
        finally:
            stream.close()
        return "".join(texts), "end"

    def keyed(self, url, service, prompt, leave):
        """http.client with an Idempotency-Key; asked once more, it answers the same"""
        key, answers = "%032x" % random.getrandbits(128), []
        for failures in range(8):
            try:
                status, body = self._post(url, "/" + service, {"message": prompt}, leave,
                                          {"Idempotency-Key": key})
            except socket.timeout:
                return "", "left"
            except BROKEN:
                error = "cut"
            else:
                error = body.get("error")
                if status == 200:
                    self._stats(body, prompt)
                    answers.append(body["reply"])
                    if len(answers) > 1 or self.rand.random() < 0.8:
                        break
                    continue
            if answers:
                break                      # the second time was one too many
            if error not in ("cut", "shutting_down", "provider_lost"):
                return "", error or "status %d" % status
            time.sleep(0.2 * 2 ** min(failures, 3))
        if not answers:
            return "", error
        if len(set(answers)) > 1 and not self.restarted():
            raise Wrong("one key, two answers: %r" % (answers,))
        return answers[0], "end"

    def ndjson(self, url, service, prompt, leave):
        """http.client, stream: true, resumed by position; read again from the start"""
        command = {"message": prompt, "key": "%032x" % random.getrandbits(128),
                   "stream": True, "at": 0}
        items, again = [], self.rand.random() < 0.2
        for failures in range(8):
            try:
                end = self._records(url, service, command, items, leave)
                break
            except BROKEN:
                command["at"], end = len(items), "cut"
                time.sleep(0.2 * 2 ** min(failures, 3))
        if end == "end" and again:
            repeated = []
            try:
                end_again = self._records(url, service, dict(command, at=0), repeated,
                                          None)
            except BROKEN:
                end_again = "cut"
            if repeated[:len(items)] != items[:len(repeated)] or (
                    end_again == "end" and repeated != items):
                if not self.restarted():
                    raise Wrong("read again, it differs: %r" % repeated)
        return "".join(items), end

    def v1_stream(self, url, service, prompt, leave):
        """/v1/chat/completions, streamed"""
        texts, ends, finish = [], [], None
        try:
            with self._connected(url) as connection:
                connection.request("POST", "/v1/chat/completions", json.dumps({
                    "model": service, "stream": True,
                    "messages": [{"role": "user", "content": prompt}]}))
                response = connection.getresponse()
                if response.status != 200:
                    error = json.loads(response.read().decode())["error"]["code"]
                    return "", OPENAI.get(error, error)
                for line in lines_of(response):
                    if not line.startswith(b"data: "):
                        continue
                    if ends:
                        raise Wrong("something follows the end: %r" % line)
                    if line == b"data: [DONE]":
                        if finish != "stop":
                            raise Wrong("it ended without a finish_reason")
                        ends.append("end")
                        continue
                    event = json.loads(line[6:].decode())
                    if "error" in event:
                        ends.append(event["error"]["code"])
                        continue
                    choice = event["choices"][0]
                    finish = choice["finish_reason"]
                    texts.append(choice["delta"].get("content") or "")
                    if leave is not None and len(texts) > leave:
                        return "".join(texts), "left"
        except BROKEN:
            pass
        return "".join(texts), OPENAI.get(ends[0], ends[0]) if ends else "cut"

    def v1_whole(self, url, service, prompt, leave):
        """/v1/chat/completions, whole"""
        try:
            status, body = self._post(url, "/%s/v1/chat/completions" % service, {
                "messages": [{"role": "user", "content": prompt}]}, leave)
        except socket.timeout:
            return "", "left"
        except BROKEN:
            return "", "cut"
        if "error" in body:
            return "", OPENAI.get(body["error"]["code"], body["error"]["code"])
        return body["choices"][0]["message"]["content"], "end"

    def restarted(self):
        """Whether the relay was restarted lately; the run replaces this."""
        return False

    def _connected(self, url, timeout=60):
        host, _, port = url[len("http://"):].partition(":")
        return Closing(host, int(port), timeout=timeout)

    def _post(self, url, path, body, leave=None, headers=None):
        """One request; its status and JSON. To leave is to use a short timeout."""
        timeout = 60 if leave is None else 0.05 * leave + 0.01
        with self._connected(url, timeout) as connection:
            connection.request("POST", path, json.dumps(body), headers or {})
            response = connection.getresponse()
            data = response.read()
            if not data:                   # http.client takes half a head for a whole one
                raise http.client.HTTPException("cut in its head")
            return response.status, json.loads(data.decode())

    def _records(self, url, service, command, items, leave):
        """Read one NDJSON stream into items; how it ended."""
        ends = []
        with self._connected(url) as connection:
            connection.request("POST", "/" + service, json.dumps(command))
            response = connection.getresponse()
            if response.getheader("Content-Type") != "application/x-ndjson":
                try:
                    return json.loads(response.read().decode())["error"]
                except ValueError:         # http.client takes half a head for a whole one
                    raise http.client.HTTPException("cut in its head")
            try:
                for line in lines_of(response):
                    record = json.loads(line.decode())
                    if ends:
                        raise Wrong("something follows the last record: %r" % line)
                    if "items" in record:
                        if record["at"] != len(items):
                            raise Wrong("items at %d are wanted and there is %r" % (
                                len(items), record))
                        items += record["items"]
                        if leave is not None and len(items) > leave:
                            return "left"
                    elif record.get("done"):
                        self._stats(record, command["message"], items)
                        ends.append("end")
                    elif record.get("errorcode"):
                        ends.append(record["error"])
            except BROKEN:
                if not ends:               # a cut after the last record harms nobody
                    raise
        if not ends:
            raise http.client.HTTPException("no last record")
        return ends[0]

    def _stats(self, answer, prompt, items=None):
        text = answer["reply"] if items is None else "".join(items)
        if answer["stats"]["tokens"] != len(list(tokens(prompt, text[:8]))):
            raise Wrong("its receipt counts wrongly: %r" % answer)


OPENAI = {"provider_disconnected": "provider_lost", "provider_offline": "service_offline"}


class Closing(http.client.HTTPConnection):
    """One that closes at the end of a with."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def lines_of(response):
    """The lines of a response as they come. Raises OSError, HTTPException if it is cut."""
    rest = b""
    while True:
        data = response.read1(65536)
        if not data:
            return
        lines = (rest + data).split(b"\n")
        rest = lines.pop()
        yield from filter(None, lines)


KINDS = ("whole", "polled", "stream", "keyed", "ndjson", "v1_stream", "v1_whole")
EXPLAINED = {  # the errors that may be, and the faults that explain them
    "provider_lost": ("kill", "stop", "interrupt"),
    "service_offline": ("kill", "stop", "interrupt", "relay"),
    "shutting_down": ("relay",), "stream_unknown": ("relay",),
    "no_connection": ("relay", "cut"), "cut": ("relay", "cut"),
    "cancelled": ("cut",),   # it tried again only after the grace time, which is short
}

##############################################################################
# The run
##############################################################################


class Run:
    """One fault run, from the start of the relay to the table."""

    def __init__(self, seconds, seed, clients=28, lease=15.0, grace=3.0, keep=5.0,
                 longest_stop=25.0, fault_every=2.0, restarts=12, pause=0.03, look=0.5):
        self.seconds, self.seed, self.lease, self.keep = seconds, seed, lease, keep
        self.clients, self.longest_stop, self.pause = clients, longest_stop, pause
        self.fault_every, self.restarts, self.look = fault_every, restarts, look
        self.rand = random.Random(seed)
        self.space = Workspace("faults")
        self.options = ("--lease-seconds=%d --grace-seconds=%d --keep-seconds=%d "
                        "--offline-seconds=%d --idle-seconds=4 --drain-seconds=3" % (
                            lease, grace, keep, min(15, 2 * lease))).split()
        self.relay = None
        self.client_proxy = self.provider_proxy = None
        self.providers, self.keys = [], {}     # (child, service, continues, proxied)
        self.all_providers, self.logs = [], []   # those that have ended, too; their logs
        self.faults = []                       # (what, service or "", from, until)
        self.counts = collections.Counter()
        self.results, self.wrong = collections.Counter(), []
        self.lock = threading.Lock()
        self.longest, self.before, self.after = 0.0, None, None
        self.stopped = {}                      # provider -> when it is continued
        self.keep_logs, self.chance = False, 0.002   # chance: of a cut, for each write
        self.under_way = {}                    # prompt -> since when
        self.stopping = threading.Event()
        self.log = open(self.space.path("prompts.log"), "w")

    # -- setting up --

    def start_provider(self, service, continues, proxied):
        url = self.provider_proxy.url if proxied else self.relay.url
        child = self.space.python("provider", __file__, "--provider", url, service,
                                  self.keys[service], int(continues), self.pause)
        self.providers.append((child, service, continues, proxied))
        self.all_providers.append(child)

    def fail(self, words):
        with self.lock:
            self.wrong.append("%6.1f s  %s" % (time.monotonic() - self.began, words))

    # -- clients --

    def client(self, number):
        rand = random.Random("%s/client/%d" % (self.seed, number))
        clients, count = Clients(rand), 0
        while not self.stopping.is_set():
            count += 1
            kind, service = rand.choice(KINDS), rand.choice(sorted(self.keys))
            proxied = rand.random() < 0.4
            leave = rand.randrange(12) if rand.random() < 0.12 else None
            prompt = "%d.%d" % (number, count)
            began = time.monotonic()
            clients.restarted = lambda began=began: self.happened(("relay",), "", began)
            with self.lock:
                self.under_way[prompt] = began
            url = self.client_proxy.url if proxied else self.relay.url
            try:
                text, end = getattr(clients, kind)(url, service, prompt, leave)
                verdict = self.verdict(prompt, text, end, service, began, proxied, leave)
            except Wrong as error:
                text, end, verdict = "", "wrong", str(error)
            except Exception:
                text, end, verdict = "", "wrong", traceback.format_exc()
            took = time.monotonic() - began
            if took > PROMPT_SECONDS:
                verdict = verdict or "it took too long"
            with self.lock:
                print("%.1f" % (began - self.began), "%.1f" % took, kind, prompt, service,
                      "proxied" if proxied else "direct", end, len(text), file=self.log)
                del self.under_way[prompt]
                self.results[kind, "wrong" if verdict else end] += 1
                self.longest = max(self.longest, took)
            if verdict:
                self.fail("%s %s of %s, %s, asked at %.1f s: %s (%s) %r" % (
                    kind, prompt, service, "proxied" if proxied else "direct",
                    began - self.began, verdict, end, text))
            time.sleep(rand.uniform(0, 0.3))

    def verdict(self, prompt, text, end, service, began, proxied, leave):
        """What is wrong with an answer, or None."""
        what = judge(prompt, text)
        if what == "wrong":
            return "the text is not a part of the right one"
        if end == "end":
            return None if what == "whole" else "a clean end, and its tail is missing"
        if end == "left":
            return None if leave is not None else "nobody meant to leave"
        causes = EXPLAINED.get(end)
        if causes is None:
            return "an error that must not be"
        if "cut" in causes and proxied:
            return None
        if not self.happened(causes, service, began):
            return "no fault explains this error"
        return None

    def happened(self, causes, service, since):
        """Whether such a fault touched this service since then, or shortly before."""
        since -= self.lease + 3
        with self.lock:
            return any(what in causes and of in ("", service) and until >= since
                       for what, of, _, until in self.faults)

    # -- faults --

    def note(self, what, service="", seconds=0.0):
        now = time.monotonic()
        with self.lock:
            print("%.1f" % (now - self.began), "%.1f" % seconds, "FAULT", what, service,
                  file=self.log)
            self.counts[what] += 1
            self.faults.append((what, service, now, now + seconds))

    def one_fault(self, restart):
        """Cause one fault, but leave some provider untouched."""
        if restart:
            return self.restart_relay()
        kind = self.rand.choice(("kill", "kill", "stop", "interrupt", "cut", "cut"))
        if kind == "cut":
            self.note("cut all")
            return self.rand.choice((self.client_proxy, self.provider_proxy)).cut(
                self.rand.choice((0.3, 1.0)))
        entry = self.rand.choice([e for e in self.providers if e[0] not in self.stopped])
        child, service, continues, proxied = entry
        if "logged in" not in child.said():
            return None                    # it has only just been started
        if kind == "stop":
            if len(self.stopped) < 2:
                seconds = self.rand.uniform(0.2, self.longest_stop)
                self.note("stop", service, seconds)
                self.stopped[child] = time.monotonic() + seconds
                child.send(signal.SIGSTOP)
            return None
        self.note(kind, service)
        self.providers.remove(entry)
        if kind == "kill":
            child.end(signal.SIGKILL)
        else:
            self.dismiss(child)
        self.start_provider(service, continues, proxied)
        return None

    def dismiss(self, child):
        """Ctrl-C: it must end by itself, soon and cleanly."""
        code = child.end(signal.SIGINT, 15)
        if code != 0 or "Traceback" in child.said():
            self.fail("Ctrl-C of a provider, its exit status %s:\n%s" % (
                code, child.said()[-3000:]))

    def restart_relay(self):
        polite = self.rand.random() < 0.5
        began = time.monotonic()
        self.note("relay", seconds=60)         # until we know better
        self.counts["relay SIGTERM" if polite else "relay kill -9"] += 1
        code = self.relay.child.end(signal.SIGTERM if polite else signal.SIGKILL)
        self.look_at_relay_log(code if polite else 0)
        time.sleep(self.rand.uniform(0, 1))
        self.relay.start()
        with self.lock:
            self.faults = [f if f[0] != "relay" or f[2] < began else
                           ("relay", "", f[2], time.monotonic() + 1) for f in self.faults]

    def look_at_relay_log(self, code):
        said = self.relay.said()
        if code != 0 or "internal_error" in said or "Traceback" in said:
            self.fail("the relay, its exit status %s:\n%s" % (code, said[-3000:]))

    def continue_stopped(self, everyone=False):
        for child, until in list(self.stopped.items()):
            if everyone or until < time.monotonic():
                del self.stopped[child]
                child.send(signal.SIGCONT)

    def mistreat(self, seconds):
        """Faults at random times. The relay is restarted in the first half only, so
        that the last one lives long enough to show what it would leak."""
        began = time.monotonic()
        restarts = sorted(self.rand.uniform(0, seconds / 2) for _ in range(self.restarts))
        following, look = began + self.fault_every, began
        for proxy in (self.client_proxy, self.provider_proxy):
            proxy.chance = self.chance
        while time.monotonic() < began + seconds:
            time.sleep(0.1)
            self.continue_stopped()
            if time.monotonic() > look:
                look += 20
                print("%.1f" % (time.monotonic() - self.began), "RELAY has",
                      "%d threads, %d descriptors, %.1f MB" % self.relay.child.resources(),
                      file=self.log)
            if restarts and time.monotonic() > began + restarts[0]:
                restarts.pop(0)
                self.one_fault(restart=True)
            elif time.monotonic() > following:
                following += self.rand.expovariate(1 / self.fault_every)
                self.one_fault(restart=False)
            if self.relay.child.process.poll() is not None:
                self.look_at_relay_log("%s, by itself" % self.relay.child.process.poll())
                self.relay.start()
        for proxy in (self.client_proxy, self.provider_proxy):
            proxy.chance = 0.0
        self.continue_stopped(everyone=True)

    # -- the end --

    def calm(self):
        """Wait until the relay holds nothing; what it still holds, in words, or ""."""
        wanted = {"queued": 0, "running": 0, "held_jobs": 0, "held_bytes": 0,
                  "sessions": len(self.providers)}
        deadline, left = time.monotonic() + CALM_SECONDS, "?"
        while left and time.monotonic() < deadline:
            time.sleep(self.look)
            metrics = self.relay.metrics()
            left = ", ".join("%s is %s instead of %d" % (name, metrics.get(name), value)
                             for name, value in wanted.items()
                             if metrics.get(name) != value)
        return left

    def rest(self):
        """What the relay needs at rest: the least of some looks. After the run it has
        some time to come down to what it was before."""
        looks, deadline = [], time.monotonic() + 20
        while len(looks) < 5 or self.before and time.monotonic() < deadline:
            time.sleep(self.look)
            looks.append(self.relay.child.resources())
            least = tuple(min(column) for column in zip(*looks))
            if self.before and not self.grown(least):
                break
        return least

    def grown(self, after):
        """What is more than it was before, in words; "" if nothing is."""
        return ", ".join("%.0f %s instead of %.0f" % (now, what, before)
                         for what, before, now, spare in zip(
                             ("threads", "descriptors", "MB"), self.before, after, SPARE)
                         if now > before + spare)

    def run(self):
        """Do all of it; whether all was well."""
        self.began = time.monotonic()
        try:
            self.relay = Relay(self.space, *self.options, provider=False)
            self.client_proxy = Cutter(self.relay.port, random.Random(self.seed))
            self.provider_proxy = Cutter(self.relay.port, random.Random(self.seed))
            # Services of providers that cannot go on, that can, and of both.
            for service, crew in (("Plain", (0, 0)), ("Going", (1, 1)), ("Mixed", (0, 1))):
                self.keys[service] = self.relay.register(service)
                for number, continues in enumerate(crew):
                    self.start_provider(service, bool(continues), proxied=number == 0)
            wait_for(lambda: self.relay.metrics().get("sessions") == len(self.providers),
                     20, "the providers' login")
            self.before = self.rest()
            threads = [threading.Thread(target=self.client, args=(n,), daemon=True)
                       for n in range(self.clients)]
            for thread in threads:
                thread.start()
            self.mistreat(self.seconds)
            self.stopping.set()
            deadline = time.monotonic() + PROMPT_SECONDS
            for thread in threads:
                thread.join(max(0, deadline - time.monotonic()))
            for prompt, since in list(self.under_way.items()):
                self.fail("prompt %s, asked %.1f s ago, has no end" % (
                    prompt, time.monotonic() - since))
            left = self.calm()
            if left:
                self.fail("the relay is not at rest: " + left)
            self.after = self.rest()
            if self.grown(self.after):
                self.fail("the relay at rest has " + self.grown(self.after))
            for child, _, _, _ in self.providers:
                self.dismiss(child)
                if "active 0" not in child.said():
                    self.fail("a provider goes on for nobody: " + child.said()[-3000:])
            self.look_at_relay_log(self.relay.child.end())
            for child in self.all_providers:
                if "Traceback" in child.said():
                    self.fail("a provider's program failed:\n" + child.said()[-3000:])
        finally:
            self.stopping.set()
            self.space.end_children()
            for proxy in filter(None, (self.client_proxy, self.provider_proxy)):
                proxy.close()
            self.log.close()
            self.logs = [child.said() for child in self.all_providers]
            self.space.close(keep=self.wrong or self.keep_logs)
        return not self.wrong

    def table(self):
        """The run's figures as text."""
        ends = sorted({end for _, end in self.results}, key=lambda e: (
            ("end", "left", "cut").index(e) if e in ("end", "left", "cut") else 9, e))
        rows = [["prompts"] + ["whole" if end == "end" else end for end in ends] + ["all"]]
        for kind in KINDS + ("",):
            cells = [sum(n for (k, e), n in self.results.items()
                         if e == end and (k == kind or not kind)) for end in ends]
            rows.append([kind or "all"] + cells + [sum(cells)])
        width = [max(len(str(row[i])) for row in rows) + 2 for i in range(len(rows[0]))]
        lines = ["".join(str(cell).rjust(w) if i else str(cell).ljust(w)
                         for i, (cell, w) in enumerate(zip(row, width))) for row in rows]
        lines.append("")
        lines.append("faults: providers killed %d, stopped %d, interrupted %d; relay "
                     "ended by SIGTERM %d, by kill -9 %d; connections cut %d" % (
                         self.counts["kill"], self.counts["stop"],
                         self.counts["interrupt"], self.counts["relay SIGTERM"],
                         self.counts["relay kill -9"],
                         self.client_proxy.cuts + self.provider_proxy.cuts))
        lines.append("answers that another provider went on with: %d" % sum(
            child_log.count("goes on") for child_log in self.logs))
        lines.append("longest prompt %.1f s; the run %.0f s; seed %s" % (
            self.longest, time.monotonic() - self.began, self.seed))
        for words, figures in ("before", self.before), ("after ", self.after):
            if figures:
                lines.append("relay at rest %s: %d threads, %d descriptors, %.1f MB" % (
                    (words,) + figures))
        lines.append("wrong: %d" % len(self.wrong))
        return "\n".join(lines)


def short_run(seconds=2.0, seed=1):
    """A run for the test suite; (what was wrong, the table)."""
    run = Run(seconds, seed, clients=14, lease=6.0, grace=2.0, keep=3.0, longest_stop=1.0,
              fault_every=0.4, restarts=1, pause=0.015, look=0.1)
    run.run()
    return run.wrong, run.table()


def main():
    if sys.argv[1:2] == ["--provider"]:
        url, name, key, continues, pause = sys.argv[2:]
        return provide(url, name, key, continues == "1", float(pause))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10, help="default: %(default)s")
    parser.add_argument("--seed", type=int, help="otherwise a random one, which is shown")
    parser.add_argument("--short", action="store_true", help="the suite's five seconds")
    parser.add_argument("--keep-logs", action="store_true", help="also if all was well")
    options = parser.parse_args()
    seed = random.randrange(10 ** 6) if options.seed is None else options.seed
    if options.short:
        wrong, table = short_run(seed=seed)
    else:
        run = Run(60 * options.minutes, seed,
                  restarts=max(1, round(1.2 * options.minutes)))
        run.keep_logs = options.keep_logs
        end_on_signals()
        print("seed %d, logs in %s" % (seed, run.space.directory), flush=True)
        run.run()
        wrong, table = run.wrong, run.table()
    for words in wrong:
        print("WRONG", words)
    print(table)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
