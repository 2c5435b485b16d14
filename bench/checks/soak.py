#!/usr/bin/env python3
"""A soak: everything that people do with a relay, for an hour; its memory must stay flat.

    python bench/checks/soak.py [--minutes 60] [--load 1.0] [--seed N] [--json FILE]

Two relays, one plain and one with TLS, get a mixed load: prompts in every form, streams
that are resumed, clients that hang up, page loads, the directory, services registered and
deleted, guests' keys made, used and revoked, wrong keys, malformed requests, connections
left idle, providers that come and go (by Ctrl-C and by kill -9), renewed certificates, and
a SIGHUP now and then. Every answer is checked: it must be what the provider sent, or an
error that a provider's end at that time explains.

Each relay's memory, threads and descriptors are sampled every 30 s. They are flat if the
median of the last third of the samples (after a warm-up) is that of the first third, give
or take a little; at rest, after the load, they must be near where they were before it.

--load scales the rate; 1 takes less than half a core in all, providers and clients too.
Loopback only, standard library only. Exit status 1 if anything was wrong or not flat.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import json
import os
import random
import signal
import ssl
import statistics
import sys
import threading
import time
import traceback

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from harness import (BROKEN, SERVICE, Relay, Workspace, answer_of, connect,
                     end_on_signals, percentile, prompt_of, swap, wait_for)

RATE = 14                # actions a second in all, at --load 1
WORKERS = 24             # threads that do them; most wait for an answer
GONE_SECONDS = 40        # for this long the end of a provider may explain an error
# What the last third may have more than the first: a share, and an amount.
FLAT = {"memory": (0.05, 2.0), "threads": (0.15, 4), "descriptors": (0.15, 4)}


class Wrong(Exception):
    """An answer that must not be, in words."""


class Explained(Exception):
    """An error that is explained by the end of a provider; its name."""


##############################################################################
# What people do: each method of Actions takes a relay
##############################################################################


class Actions:
    """The ways in which one worker uses a relay. They raise Wrong or Explained."""

    def __init__(self, soak, number):
        self.soak, self.number = soak, number
        self.rand = random.Random("%s/%d" % (soak.seed, number))
        self.count = 0
        self.kept = {}                     # relay -> a connection to be used again
        self.source = "127.0.0.%d" % (2 + number)

    # -- asking --

    def ask(self, relay, method, path, body=None, key=None, **headers):
        """(status, headers, body); half of the time on a connection that was used before."""
        kept = self.kept.pop(relay, None) if self.rand.random() < 0.5 else None
        if key:
            headers["Authorization"] = "Bearer " + key
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        data = None if body is None else json.dumps(body)
        for connection in filter(None, (kept, connect(relay.url, 60, self.source))):
            try:
                connection.request(method, path, data, headers)
                response = connection.getresponse()
                answer = response.status, response.headers, response.read()
            except BROKEN:
                connection.close()
                if connection is kept:     # the relay closes idle ones: that is no error
                    continue
                raise
            if relay in self.kept:
                self.kept.pop(relay).close()
            self.kept[relay] = connection
            return answer
        raise Wrong("not reached")

    def expect(self, wanted, answer):
        """The JSON of an answer of that status."""
        status, _, data = answer
        if status not in (wanted if isinstance(wanted, tuple) else (wanted,)):
            raise Wrong("status %d instead of %s: %r" % (status, wanted, data[:300]))
        return json.loads(data) if data else None

    def prompt(self):
        self.count += 1
        return prompt_of("%d.%d" % (self.number, self.count), self.rand.randrange(1, 40),
                         self.rand.choice((4, 8, 8, 12, 200)),
                         self.rand.choice((0, 0.01, 0.03, 0.05)))

    def judge(self, prompt, text):
        right = "".join(answer_of(prompt))
        if text != right:
            raise Wrong("%r instead of %r" % (text[-100:], right[-100:]))

    def failed(self, name, words=""):
        """An error in place of an answer."""
        if name in ("provider_lost", "provider_disconnected"):
            raise Explained("provider_lost")
        raise Wrong("error %s: %s" % (name, words))

    # -- prompts --

    def whole(self, relay):
        prompt = self.prompt()
        status, _, data = self.ask(relay, "POST", "/" + SERVICE, {"message": prompt})
        answer = json.loads(data)
        if status != 200:
            self.failed(answer.get("error"), data)
        self.judge(prompt, answer["reply"])

    def repeated(self, relay):
        """With an Idempotency-Key, twice: one answer."""
        prompt, key = self.prompt(), "%032x" % self.rand.getrandbits(128)
        answers = []
        for _ in range(2):
            status, _, data = self.ask(relay, "POST", "/" + SERVICE, {"message": prompt},
                                       Idempotency_Key=key)
            if status != 200:
                self.failed(json.loads(data).get("error"), data)
            answers.append(json.loads(data))
            self.judge(prompt, answers[-1]["reply"])
        if answers[0]["stats"]["id"] != answers[1]["stats"]["id"]:
            raise Wrong("one key, two jobs: %r" % (answers,))

    def polled(self, relay):
        """Some tokens at a time, with or without `at`."""
        prompt, key, texts = self.prompt(), "%032x" % self.rand.getrandbits(128), []
        for _ in range(200):
            status, _, data = self.ask(relay, "POST", "/" + SERVICE, {
                "message": prompt, "key": key, "gettokens": self.rand.randrange(1, 15)})
            answer = json.loads(data)
            if status == 202:              # still waiting
                continue
            if status != 200:
                self.failed(answer.get("error"), data)
            if not answer["reply"]:
                break
            texts.append(answer["reply"])
        self.judge(prompt, "".join(texts))

    def ndjson(self, relay, leave=None):
        """A stream, often cut and resumed by position."""
        prompt, items = self.prompt(), []
        command = {"message": prompt, "key": "%032x" % self.rand.getrandbits(128),
                   "stream": True, "at": 0}
        for part in range(6):
            command["at"] = len(items)
            cut = None
            if part < 5 and self.rand.random() < 0.3:
                cut = self.rand.randrange(1, 30)
            if self.records(relay, command, items, cut if leave is None else leave):
                return self.judge(prompt, "".join(items))
            if leave is not None:
                return None
        raise Wrong("no end after six parts")

    def records(self, relay, command, items, most):
        """Read a part of a stream into items; whether its last record came."""
        connection = connect(relay.url, 60, self.source)
        with contextlib.closing(connection):
            connection.request("POST", "/" + SERVICE, json.dumps(command))
            response = connection.getresponse()
            if response.status != 200:
                self.failed(json.loads(response.read()).get("error"))
            for line in response:
                record = json.loads(line)
                if "items" in record:
                    if record["at"] != len(items):
                        raise Wrong("items at %d instead of %d" % (record["at"], len(items)))
                    items += record["items"]
                    if most is not None and len(items) >= most:
                        return False
                elif record.get("errorcode"):
                    self.failed(record["error"])
                elif record.get("done"):
                    return True
        raise Wrong("a stream without its last record, after %d items" % len(items))

    def v1_stream(self, relay, leave=None):
        prompt, texts = self.prompt(), []
        connection = connect(relay.url, 60, self.source)
        with contextlib.closing(connection):
            connection.request("POST", "/v1/chat/completions", json.dumps({
                "model": SERVICE, "stream": True,
                "messages": [{"role": "user", "content": prompt}]}))
            response = connection.getresponse()
            if response.status != 200:
                self.failed(json.loads(response.read())["error"]["code"])
            for line in response:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        self.failed(event["error"]["code"])
                    texts.append(event["choices"][0]["delta"].get("content") or "")
                    if leave is not None and len(texts) > leave:
                        return None
                elif line == b"data: [DONE]\n":
                    return self.judge(prompt, "".join(texts))
        raise Wrong("no [DONE], after %d pieces" % len(texts))

    def v1_whole(self, relay):
        prompt = self.prompt()
        status, _, data = self.ask(relay, "POST", "/%s/v1/chat/completions" % SERVICE, {
            "messages": [{"role": "user", "content": prompt}]})
        answer = json.loads(data)
        if status != 200:
            self.failed(answer["error"]["code"], data)
        self.judge(prompt, answer["choices"][0]["message"]["content"])

    def hangup(self, relay):
        """Leave in the middle of an answer, or before it."""
        kind = self.rand.randrange(3)
        if kind < 2:
            return (self.ndjson, self.v1_stream)[kind](relay, leave=self.rand.randrange(5))
        with contextlib.closing(relay.dial(self.source)) as sock:
            body = json.dumps({"message": self.prompt()}).encode()
            sock.sendall(b"POST /%s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n"
                         b"\r\n" % (SERVICE.encode(), len(body)) + body)
            time.sleep(self.rand.random() / 2)

    # -- the rest --

    def page(self, relay):
        status, headers, data = self.ask(relay, "GET", self.rand.choice(("/", "/" + SERVICE)))
        if status != 200 or b"</html>" not in data or data != self.soak.page or (
                not headers["Content-Security-Policy"]):
            raise Wrong("the page: %d, %d bytes" % (status, len(data)))

    def directory(self, relay):
        if self.rand.random() < 0.5:
            names = [model["name"] for model in
                     self.expect(200, self.ask(relay, "GET", "/api/models"))]
        else:
            names = [model["id"] for model in
                     self.expect(200, self.ask(relay, "GET", "/v1/models"))["data"]]
        if SERVICE not in names:
            raise Wrong("the directory is %r" % names)

    def registered(self, relay):
        """A service of a moment."""
        self.count += 1
        name = "Soak%d.%d" % (self.number, self.count)
        key = self.expect(201, self.ask(relay, "POST", "/api/services", {"name": name}))["key"]
        path = "/api/services/" + name
        self.expect(409, self.ask(relay, "POST", "/api/services", {"name": name}))
        self.expect(200, self.ask(relay, "PATCH", path, {"comment": "Hello \u2603"}, key))
        new = self.expect(200, self.ask(relay, "PATCH", path, {"new_key": True}, key))["key"]
        self.expect((401, 429), self.ask(relay, "GET", path, key=key))
        model = self.expect(200, self.ask(relay, "GET", path, key=new))
        if model["comment"] != "Hello \u2603":
            raise Wrong("its comment is %r" % model["comment"])
        self.expect(200, self.ask(relay, "DELETE", path, key=new))
        self.expect(404, self.ask(relay, "POST", "/" + name, {"message": "x"}))

    def guest(self, relay):
        """A guest's key: made, used for a prompt, revoked, refused."""
        base = "/api/services/Private/keys"
        key = self.expect(201, self.ask(relay, "POST", base, {"label": "guest"},
                                        relay.private_key))
        prompt = self.prompt()
        try:
            answer = self.ask(relay, "POST", "/Private", {"message": prompt}, key["key"])
            if answer[0] != 200:
                self.failed(json.loads(answer[2]).get("error"), answer[2])
            self.judge(prompt, self.expect(200, answer)["reply"])
        finally:
            self.expect(200, self.ask(relay, "DELETE", base + "/" + key["id"], None,
                                      relay.private_key))
        self.expect((401, 429), self.ask(relay, "POST", "/Private", {"message": "x"},
                                         key["key"]))

    def wrong_key(self, relay):
        self.expect((401, 429), self.ask(relay, self.rand.choice(("GET", "DELETE")),
                                         "/api/services/" + SERVICE, key="ne_wrong"))
        self.expect(200, self.ask(relay, "GET", "/api/services/" + SERVICE, key=relay.key))

    def malformed(self, relay):
        data, wanted = self.rand.choice(MALFORMED)
        with contextlib.closing(relay.dial(self.source)) as sock:
            sock.sendall(data)
            answer = sock.recv(65536)
        if answer[9:12] not in wanted.encode().split():
            raise Wrong("%r is answered %r" % (data[:100], answer[:100]))

    def idle(self, relay):
        """A connection that stays open until either side closes it."""
        sock = relay.dial(self.source)
        if self.rand.random() < 0.7:
            sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            if b" 200 " not in sock.recv(4096):
                raise Wrong("not healthy")
        with self.soak.lock:
            self.soak.idle.append((time.monotonic() + self.rand.uniform(
                0, 1.5 * self.soak.idle_seconds), sock))

    def library(self, relay):
        """neuroengine.py's own client, whole and streamed."""
        from neuroengine import Neuroengine
        from neuroengine import NeuroengineError
        api, prompt = Neuroengine(SERVICE, relay.url, verify_ssl=False), self.prompt()
        if self.rand.random() < 0.5:
            text = api.request(prompt, raw=True)
            if "went away" in text:
                raise Explained("provider_lost")
            return self.judge(prompt, text)
        try:
            return self.judge(prompt, "".join(api.stream(prompt)))
        except NeuroengineError as error:
            return self.failed(error.name, error.message)


MALFORMED = (
    (b"GET /\r\n\r\n", "400"), (b"nonsense\r\n\r\n", "400"),
    (b"GET / HTTP/1.1\r\n\r\n", "400"), (b"POST / HTTP/1.1\r\nHost: localhost\r\n\r\n", "411"),
    (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\n{", "400"),
    (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked"
     b"\r\n\r\n", "400"),
    (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n", "413"),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 20000 + b"\r\n\r\n", "431"),
    (b"GET /a/b/c HTTP/1.1\r\nHost: localhost\r\n\r\n", "404"),
    (b"PUT / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n", "405"),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\rb\r\n\r\n", "400"),
)
WEIGHTS = {"whole": 10, "repeated": 4, "polled": 8, "ndjson": 12, "v1_stream": 12,
           "v1_whole": 8, "hangup": 6, "library": 5, "page": 6, "directory": 6,
           "registered": 2, "guest": 3, "wrong_key": 2, "malformed": 6, "idle": 4}
CONTROL = ("page", "directory")            # whose times are told


##############################################################################
# The run
##############################################################################


class Soak:
    """One soak, from the start of the relays to the verdict."""

    def __init__(self, options, seed):
        self.seconds, self.load, self.seed = 60 * options.minutes, options.load, seed
        self.every = min(30, self.seconds / 24)
        self.idle_seconds = min(60, max(5, self.seconds / 12))
        self.rand = random.Random(seed)
        self.space = Workspace("soak")
        self.relays, self.samples, self.idle = {}, [], []
        self.crews, self.gone = {}, {}     # relay -> providers; when one went away
        self.results, self.wrong = collections.Counter(), []
        self.renewals, self.times = 0, []              # (when, seconds) of control requests
        self.lock, self.stopping = threading.Lock(), threading.Event()
        self.page = b""                    # as the relay serves it

    def start(self):
        # Ended streams are kept for five minutes, and connections for one: a short run
        # could not see the end of it.
        keep = ("--keep-seconds=%d" % min(300, max(5, self.seconds / 12)),
                "--idle-seconds=%d" % self.idle_seconds)
        for title, tls in (("plain", False), ("TLS", True)):
            relay = Relay(self.space, *keep, tls=tls, workers=24)
            self.relays[title], self.crews[relay], self.gone[relay] = relay, [], -1e9
            relay.private_key = relay.register("Private")
            relay.ask("PATCH", "/api/services/Private", {"private": True}, relay.private_key)
            self.crews[relay] = [relay.provider,
                                 relay.start_provider(relay.private_key, "Private")]
        self.page = relay.ask("GET", "/")[1]
        self.rest_before = self.rest()

    def start_passing(self, relay):
        """One more provider, which will be ended soon."""
        self.crews[relay].append(relay.start_provider(relay.key, wait=False))

    # -- the load --

    def work(self, number):
        actions = Actions(self, number)
        kinds, weights = list(WEIGHTS), list(WEIGHTS.values())
        pause = WORKERS / (RATE * self.load)
        while not self.stopping.wait(actions.rand.expovariate(1 / pause)):
            kind, = actions.rand.choices(kinds, weights)
            title = "plain" if actions.rand.random() < 0.65 else "TLS"
            relay, began = self.relays[title], time.monotonic()
            try:
                getattr(actions, kind)(relay)
                verdict = "ok"
            except Explained as error:
                verdict = str(error)
                if self.gone[relay] < began - GONE_SECONDS:
                    self.fail("%s (%s): %s, and no provider went away" % (kind, title, error))
            except Wrong as error:
                verdict = "wrong"
                self.fail("%s (%s): %s" % (kind, title, error))
            except Exception:
                verdict = "wrong"
                self.fail("%s (%s): %s" % (kind, title, traceback.format_exc()))
            with self.lock:
                self.results[kind, verdict] += 1
                if kind in CONTROL:
                    self.times.append((began, time.monotonic() - began))
        for connection in actions.kept.values():
            connection.close()

    def fail(self, words):
        with self.lock:
            self.wrong.append(words)
        print("WRONG %6.0f s  %s" % (time.monotonic() - self.began, words[:2000]), flush=True)

    def change_providers(self):
        """The third provider of a relay comes, or goes."""
        relay = self.relays[self.rand.choice(("plain", "plain", "TLS"))]
        if len(self.crews[relay]) == 2:
            return self.start_passing(relay)
        child = self.crews[relay].pop()
        how = self.rand.choice((signal.SIGINT, signal.SIGKILL))
        if how is signal.SIGINT:               # Python's imports would show a traceback
            child.expect("logged in")
        self.gone[relay] = time.monotonic()
        code = child.end(how, 20)
        self.space.children.remove(child)
        self.results["provider ended by " + how.name, ""] += 1
        if how is signal.SIGINT and code != 0:
            self.fail("a provider's Ctrl-C: exit status %s: %s" % (code, child.said()[-500:]))
        return None

    def close_idle(self, everything=False):
        now = time.monotonic()
        with self.lock:
            due = [sock for end, sock in self.idle if everything or end < now]
            self.idle = [(end, sock) for end, sock in self.idle
                         if not everything and end >= now]
        for sock in due:
            sock.close()

    def renew(self):
        """A new certificate for the relay with TLS, which must load it."""
        relay = self.relays["TLS"]
        self.renewals += 1
        cert, key = self.space.certificate("renewed-%d" % self.renewals)
        swap(cert, relay.cert)
        swap(key, relay.cert_key)
        relay.child.send(signal.SIGHUP)
        with open(cert) as file:
            wanted = file.read().strip()
        wait_for(lambda: ssl.get_server_certificate(
            ("127.0.0.1", relay.port)).strip() == wanted, 10, "the new certificate")
        self.results["certificate renewed", ""] += 1

    def run(self):
        """Run it; whether all was well."""
        self.began = time.monotonic()
        self.start()
        self.began = time.monotonic()
        self.cpu_before = self.cpu()
        threads = [threading.Thread(target=self.work, args=(n,), daemon=True)
                   for n in range(WORKERS)]
        for thread in threads:
            thread.start()
        due = {self.sample: self.every, self.change_providers: 9, self.hup: 47,
               self.renew: 170}
        following = {task: self.began + 0.7 * seconds for task, seconds in due.items()}
        while time.monotonic() < self.began + self.seconds:
            time.sleep(0.1)
            self.close_idle()
            for task, seconds in due.items():
                if time.monotonic() >= following[task]:
                    following[task] += seconds
                    task()
            for title, relay in self.relays.items():
                if relay.child.process.poll() is not None:
                    self.fail("the relay (%s) ended: %s" % (title, relay.said()[-3000:]))
                    return False
        self.spent = self.cpu() - self.cpu_before
        self.took = time.monotonic() - self.began
        self.stopping.set()
        deadline = time.monotonic() + 90
        for thread in threads:
            thread.join(max(0, deadline - time.monotonic()))
        if any(thread.is_alive() for thread in threads):
            self.fail("some client has no answer after 90 s")
        return self.judge()

    def hup(self):
        for relay in self.relays.values():
            relay.child.send(signal.SIGHUP)
        self.results["SIGHUP", ""] += 1

    # -- figures --

    def cpu(self):
        """Seconds of processor time of all: relays, providers and ourselves."""
        self.relay_cpu = sum(relay.child.cpu() for relay in self.relays.values())
        return (sum(child.cpu() for child in self.space.children)
                + sum(os.times()[:4]))

    def sample(self):
        row = {"at": time.monotonic() - self.began}
        for title, relay in self.relays.items():
            row[title] = dict(zip(("threads", "descriptors", "memory"),
                                  relay.child.resources()))
        self.samples.append(row)
        done = sum(self.results.values())
        print("%6.0f s  %s  actions %d, wrong %d" % (row["at"], "; ".join(
            "%s %.1f MB, %d threads, %d descriptors" % (
                title, row[title]["memory"], row[title]["threads"],
                row[title]["descriptors"]) for title in self.relays), done, len(self.wrong)),
              flush=True)

    def rest(self, seconds=3):
        """What each relay has at rest."""
        with concurrent.futures.ThreadPoolExecutor() as pool:
            return dict(zip(self.relays, pool.map(
                lambda relay: relay.child.at_rest(seconds), self.relays.values())))

    def flatness(self):
        """[(relay, what, median of the first third, of the last, whether it is flat)]"""
        # The warm-up: until the allocator's pools have reached their full size.
        samples = [sample for sample in self.samples
                   if sample["at"] >= min(600, self.seconds / 2)]
        third = max(1, len(samples) // 3)
        rows = []
        for title in self.relays:
            for what, (share, more) in FLAT.items():
                first, last = (statistics.median(sample[title][what] for sample in part)
                               for part in (samples[:third], samples[-third:]))
                rows.append((title, what, first, last, last <= first * (1 + share) + more))
        return rows

    def judge(self):
        """Wait until everything has come to rest, judge, and print the figures."""
        self.close_idle(everything=True)
        for relay in self.relays.values():
            for child in self.crews[relay][2:]:
                self.crews[relay].remove(child)
                child.end(signal.SIGINT)
            try:
                wait_for(lambda relay=relay: self.held(relay) == 0, 400,
                         "the end of all jobs", lambda relay=relay: str(self.held(relay)))
            except AssertionError as error:
                self.fail(str(error))
        rest_after = self.rest(self.idle_seconds + 5)
        for title, relay in self.relays.items():
            if relay.tracebacks():
                at = max(0, relay.said().find("Traceback") - 300)
                self.fail("in the log (%s): %s" % (title, relay.said()[at:at + 3000]))
        print("\n%-28s %8s %8s %8s" % ("", "ok", "lost", "wrong"))
        for kind in WEIGHTS:
            print("%-28s %8d %8d %8d" % ((kind,) + tuple(
                self.results[kind, verdict] for verdict in ("ok", "provider_lost", "wrong"))))
        for (what, verdict), count in sorted(self.results.items()):
            if not verdict:
                print("%-28s %8d" % (what, count))
        half = self.began + self.took / 2
        for title, times in (("first", [t for at, t in self.times if at < half]),
                             ("second", [t for at, t in self.times if at >= half])):
            print("page and directory, %s half: p50 %.1f ms, p99 %.1f ms" % (
                title, 1000 * percentile(times, 0.5), 1000 * percentile(times, 0.99)))
        rows = self.flatness()
        for title, what, first, last, flat in rows:
            print("%-6s %-12s median of the first third %7.1f, of the last %7.1f: %s" % (
                title, what, first, last, "flat" if flat else "NOT FLAT"))
        at_rest = True
        for title, before in self.rest_before.items():
            after = rest_after[title]
            # The first requests fill caches and the allocator's pools, once.
            good = after[0] <= before[0] + 1 and after[1] <= before[1] + 1 \
                and after[2] <= before[2] + 24
            at_rest = at_rest and good
            print("%-6s at rest: %d threads, %d descriptors, %.1f MB; before the load "
                  "%d, %d, %.1f%s" % ((title,) + after + before + (
                      "" if good else ": NOT BACK",)))
        print("processor: %.2f of a core in all, the relays %.2f" % (
            self.spent / self.took, self.relay_cpu / self.took))
        done = sum(self.results[kind, "ok"] for kind in WEIGHTS)
        print("%d actions right in %.0f min, wrong %d; seed %s" % (
            done, self.took / 60, len(self.wrong), self.seed))
        self.record = {
            "minutes": self.took / 60, "right": done, "wrong": self.wrong,
            "flat": rows, "rest": [self.rest_before, rest_after],
            "cores": self.spent / self.took, "samples": self.samples,
            "results": {" ".join(key): count for key, count in self.results.items()}}
        return not self.wrong and at_rest and all(flat for *_, flat in rows)

    def held(self, relay):
        """How many jobs the relay holds."""
        return relay.metrics().get("held_jobs")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60, help="default: %(default)s")
    parser.add_argument("--load", type=float, default=1.0, help="default: %(default)s")
    parser.add_argument("--seed", type=int, help="otherwise a random one, which is shown")
    parser.add_argument("--json", metavar="FILE", help="the figures and all samples, too")
    parser.add_argument("--keep-logs", action="store_true")
    options = parser.parse_args()
    seed = random.randrange(10**6) if options.seed is None else options.seed
    end_on_signals()
    soak = Soak(options, seed)
    print("seed %d, logs in %s" % (seed, soak.space.directory), flush=True)
    good = False
    try:
        good = soak.run()
        if options.json:
            with open(options.json, "w") as file:
                json.dump(soak.record, file, indent=1)
    finally:
        soak.stopping.set()
        for relay in soak.relays.values():
            relay.child.end()
        soak.space.close(keep=options.keep_logs or not good)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
