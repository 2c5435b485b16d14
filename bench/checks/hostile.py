"""Parts of siege.py: requests and loads that one caller may send, and what they may cost.

The bounds are promises: resident memory stays under a figure computed from the limits
(bound()), no request delays others by more than 100 ms at the 99th percentile, and one
address, whatever it does, takes no room from others. All is asked over HTTP and set by the
command line, as anyone could do it.

Different addresses are X-Forwarded-For headers, which these relays trust.
"""

import concurrent.futures
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from harness import (BROKEN, MB, ROOT, SERVICE, Relay, answer_of, close_all, connect,
                     prompt_of, wait_for)
from watch import Modest, Watcher, first_of, hold, kept_alive, part, sent

HELD = 64 << 20          # --max-held-bytes of the parts about memory
TOO_MUCH = 3000 * MB     # a relay beyond this is killed, or it would take the machine down
TRUST = ("--trusted-proxy", "127.0.0.1")
# The modest client speaks as such a proxy, so its prompts are counted; they are many.
MANY_PROMPTS = ("--max-prompts-per-minute", 10**6, "--max-anonymous-per-day", 10**6)
CHAT = "/v1/chat/completions"


##############################################################################
# Means
##############################################################################


def address(n):
    """The headers of a request from the n-th address."""
    return {"X-Forwarded-For": "203.0.%d.%d" % (n // 200, 1 + n % 200)}


def request(method, path, body=None, key=None, **headers):
    """The bytes of a request; body: bytes, or a value for JSON; headers with _ for -."""
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(
        body).encode()
    lines = ["%s %s HTTP/1.1" % (method, path), "Host: localhost"]
    lines += ["%s: %s" % (name.replace("_", "-"), text) for name, text in headers.items()]
    if key:
        lines.append("Authorization: Bearer " + key)
    if body is not None:
        lines += ["Content-Type: application/json", "Content-Length: %d" % len(data)]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


def at_once(work, values, threads=8):
    """work(value) for all values, in some threads; the results."""
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, values))


def bound(held, connections, tls=False):
    """The resident memory, in MB, that a relay may have."""
    return 60 + 1.3 * held / MB + connections * (80 if tls else 32) * 1024 / MB


class Memory(Watcher):
    """Samples a relay's resident memory; `most` is the highest, in MB. Kills the relay if
    it exceeds TOO_MUCH."""

    def __init__(self, relay):
        super().__init__(every=0.03)
        self.relay, self.most = relay, 0.0

    def look(self):
        memory = self.relay.child.memory()
        self.most = max(self.most, memory / MB)
        if memory > TOO_MUCH:
            self.relay.child.end(signal.SIGKILL)
            self.stopping.set()

    def judge(self, figures, held, connections, title=""):
        figures.add(title + "memory, most", self.most, "MB", most=round(
            bound(held, connections, self.relay.tls)))


class Session:
    """A provider's session, one request at a time on one connection: if that closes, the
    relay takes the provider for gone."""

    def __init__(self, relay, key, name=SERVICE, workers=1):
        self.relay, self.path = relay, "/provider/%s/" % name
        self.headers = {"Authorization": "Bearer " + key}
        self.connection = connect(relay.url, 60)
        self.id = self.post("login", {"workers": workers})["session"]

    def post(self, what, body, connection=None):
        connection = connection or self.connection
        connection.request("POST", self.path + what, json.dumps(body), self.headers)
        response = connection.getresponse()
        answer = json.loads(response.read())
        if response.status != 200:
            raise OSError("%s: %d %r" % (what, response.status, answer))
        return answer

    def poll(self, running=()):
        """The jobs that a poll brings."""
        return self.post("poll", {"session": self.id, "running": list(running)})["jobs"]

    def abandon_poll(self):
        """Poll, and confirm nothing: the jobs that came. The connection is closed, as if
        the provider's machine had vanished."""
        with contextlib.closing(connect(self.relay.url, 60)) as connection:
            return self.post("poll", {"session": self.id, "running": []}, connection)["jobs"]

    def reply(self, job, items, at=0, done=True):
        return self.post("reply", {"session": self.id, "replies": [
            {"job": job["job"], "attempt": job["attempt"], "at": at, "items": items,
             "done": done}]})


##############################################################################
# Memory
##############################################################################


@part("wide-prompts")
def wide_prompts(siege, figures):
    """Prompts of 12.6 MB whose JSON escapes would be up to six times as long: answered."""
    with Relay(siege) as relay, Memory(relay) as memory, Modest(relay) as others:
        for title, text in (("DEL", "\x7f" * 12_600_000), ("e acute", "\u00e9" * 6_300_000),
                            ("snowmen", "\u2603" * 4_200_000)):
            body = json.dumps({"message": prompt_of("wide") + " " + text}, ensure_ascii=False)
            began = time.monotonic()
            with contextlib.closing(sent(relay, request("POST", "/" + SERVICE, body.encode()),
                                         timeout=60)) as sock:
                figures.add(title, first_of(sock), exactly="200")
            figures.add("after", time.monotonic() - began, "s", most=5)
    others.judge(figures, most=100)
    figures.add("prompts p99", others.prompt_p99, "ms", most=1000)
    memory.judge(figures, 268435456, 20)


@part("many-readers")
def many_readers(siege, figures):
    """130 connections ask for one finished answer of 8 MB again, and read slowly."""
    with Relay(siege, "--max-held-bytes", HELD) as relay, Memory(relay) as memory:
        body = {"message": prompt_of("big", 780, 10000)}
        status, _ = relay.ask("POST", "/" + SERVICE, body, timeout=60,
                              headers={"Idempotency-Key": "many-readers"})
        figures.add("the answer", status, exactly=200)
        data = request("POST", "/" + SERVICE, body, Idempotency_Key="many-readers")
        with Modest(relay) as others:
            socks = hold(130, lambda n: sent(relay, data, buffer=4096))
            time.sleep(5)
            close_all(socks)
        others.judge(figures)
        memory.judge(figures, HELD, 150)


@part("nested-items")
def nested_items(siege, figures):
    """A provider's items that are objects of many small parts: counted at their size."""
    with Relay(siege, *TRUST, "--max-held-bytes", HELD, "--poll-seconds", 2,
               "--busy-poll-seconds", 2, provider=False) as relay, Memory(relay) as memory:
        session = Session(relay, relay.register(SERVICE), workers=64)
        call = {"index": 0, "id": "a", "type": "function",
                "function": {"name": "f", "arguments": "{}"}}
        for title, item in (("tool calls", {"tool_calls": [call] * 200}),
                            ("objects", {"reasoning": "x", "more": [{"a": 1}] * 3000}),
                            ("numbers", {"usage": {"n%d" % n: n for n in range(2000)}}),
                            ("reasoning", {"reasoning": "x"})):
            items = [item] * (800_000 // len(json.dumps(item)))
            taken = 0
            for n in range(40):        # what 100,000 objects and quotes allow, each time
                data = request("POST", "/" + SERVICE, {
                    "message": "%s %d" % (title, n), "key": "%032d" % n + title},
                    X_Forwarded_For="203.0.113.%d" % n)
                with contextlib.suppress(*BROKEN), contextlib.closing(sent(relay, data)):
                    for job in session.poll():
                        taken += not session.reply(job, items)["refused"]
            figures.add("%s: answers" % title, taken)
            figures.add("memory", memory.most, "MB")
        memory.judge(figures, HELD, 60)
        figures.check("the relay lives and answers", relay.healthy(5))


@part("merged-answers")
def merged_answers(siege, figures):
    """Whole chat answers of 8 MB, merged from deltas of many small parts."""
    for title, item in (("tool calls", {"tool_calls": [{}] * 90_000}),
                        ("objects", {"delta": {"x": [{"a": 1}] * 90_000}}),
                        ("lists", {"delta": {"x": [[]] * 90_000}}),
                        ("numbers", {"delta": {"x": [1] * 140_000}}),
                        ("names", {"delta": {"n%d" % n: n for n in range(70_000)}})):
        with Relay(siege, "--max-held-bytes", HELD, provider=False) as relay:
            session, got = Session(relay, relay.register(SERVICE)), []
            asker = threading.Thread(target=lambda relay=relay, got=got: got.append(relay.ask(
                "POST", CHAT, {"model": SERVICE, "messages": [
                    {"role": "user", "content": "x"}]}, timeout=60)))
            asker.start()
            job, = wait_for_jobs(session)
            pushes = 7_900_000 // len(json.dumps(item, separators=(",", ":")))
            with Memory(relay) as memory:
                for n in range(pushes):
                    session.reply(job, [item], n, done=n == pushes - 1)
                asker.join(60)
            figures.add(title, got[0][0] if got else "no answer",
                        good=got and got[0][0] in (200, 502))
            memory.judge(figures, HELD, 20)


@part("bodies-under-way")
def bodies_under_way(siege, figures):
    """1,900 connections that each send 255 KB of a body and stop; 20 MB with an emoji."""
    with Relay(siege, "--max-held-bytes", HELD) as relay:
        with Memory(relay) as memory, Modest(relay) as others:
            head = (b"POST /" + SERVICE.encode() + b" HTTP/1.1\r\nHost: localhost\r\n"
                    b"Content-Length: 262144\r\n\r\n")
            socks = hold(1900, lambda n: sent(relay, head + b"x" * 261120))
            time.sleep(3)
            close_all(socks)
        figures.add("connections", len(socks), least=1800)
        others.judge(figures)
        memory.judge(figures, HELD, len(socks) + 20)
    body = json.dumps({"message": prompt_of("e") + " \U0001f600" + "x" * 20_000_000},
                      ensure_ascii=False).encode()
    with Relay(siege, "--max-held-bytes", HELD) as relay, Memory(relay) as memory:
        def post(n):
            with contextlib.closing(sent(relay, request("POST", "/" + SERVICE, body),
                                         timeout=60)) as sock:
                return first_of(sock)

        with contextlib.suppress(OSError):
            figures.add("20 MB with an emoji, 6 at once", sorted(at_once(post, range(6))))
        memory.judge(figures, HELD, 20)


@part("waiting-prompts")
def waiting_prompts(siege, figures):
    """1,200 prompts that wait, with long heads and further requests behind them."""
    long = {"X_%d" % n: "y" * 240 for n in range(60)}
    for title, headers, behind in (("short", {}, b""), ("long heads", long, b""),
                                   ("pipelined", {}, b"z" * 60_000),
                                   ("both", long, b"z" * 48_000)):
        with Relay(siege, *TRUST, *MANY_PROMPTS, "--max-held-bytes", 16 << 20,
                   "--max-queue", 5000, provider=False) as relay:
            relay.register(SERVICE)
            with Memory(relay) as memory:
                socks = hold(1200, lambda n, relay=relay, headers=headers, behind=behind: sent(
                    relay, request("POST", "/" + SERVICE, {
                        "message": "%d" % n, "wait": True, "stream": True},
                        **dict(headers, X_Forwarded_For="203.0.113.%d" % (n % 100))) + behind))
                time.sleep(3)
                figures.add(title + ": waiting", relay.metrics().get("queued", 0), least=200)
                close_all(socks)
            memory.judge(figures, 16 << 20, len(socks) + 10)


@part("slow-line")
def slow_line(siege, figures):
    """A prompt of 12 MB to a provider whose line takes 20 s for it: its session lives."""
    with Relay(siege, provider=False) as relay:
        session, got = Session(relay, relay.register(SERVICE)), []
        asker = threading.Thread(target=lambda: got.append(relay.ask(
            "POST", "/" + SERVICE, {"message": "x" * 12_000_000}, timeout=90)))
        asker.start()
        wait_for(lambda: relay.metrics().get("queued"), 10, "queued")
        with contextlib.closing(relay.dial(timeout=60, buffer=65536)) as sock:
            sock.sendall(request("POST", session.path + "poll", {
                "session": session.id, "running": []}, session.headers["Authorization"][7:]))
            began, head = time.monotonic(), sock.recv(4096)
            length = int(re.search(rb"(?i)content-length: *(\d+)", head).group(1))
            body = bytearray(head.partition(b"\r\n\r\n")[2])
            while len(body) < length:
                body += sock.recv(30_000)
                time.sleep(max(0, began + len(body) / 600_000 - time.monotonic()))
            figures.add("the prompt came after", time.monotonic() - began, "s")
            job, = json.loads(body)["jobs"]
            figures.check("the reply is taken", not session.reply(job, ["hi"])["refused"])
        asker.join(60)
        figures.add("the client got", got[0][0] if got else "nothing", exactly=200)


@part("many-keys")
def many_keys(siege, figures):
    """Access keys: small, and bounded in all."""
    text = subprocess.run([sys.executable, os.path.join(ROOT, "neuroengine_server.py"),
                           "--help-all"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                          universal_newlines=True).stdout
    limit = re.search(r"--max-(?!wrong)\S*keys\S*", text)   # if the relay has such a limit
    options = (limit.group(), 20000) if limit else ()
    with Relay(siege, *options, provider=False) as relay:
        keys = [("S%d" % n, relay.register("S%d" % n)) for n in range(30)]
        before, refused = relay.child.memory(), []

        def fill(service):
            name, key = service
            connection, made = connect(relay.url, 30), 0
            with contextlib.closing(connection):
                for _ in range(1000):
                    connection.request("POST", "/api/services/%s/keys" % name, "{}",
                                       {"Authorization": "Bearer " + key})
                    response = connection.getresponse()
                    response.read()
                    made += response.status == 201
                    if response.status != 201:
                        refused.append(response.status)
            return made

        with Memory(relay) as memory:
            made = sum(at_once(fill, keys, 4))
        each = (relay.child.memory() - before) / made
        figures.add("keys", made)
        figures.add("each", each, "bytes")
        figures.add("refused", len(refused))
        figures.add("all that may be made", each * (made if refused else 10**7) / MB, "MB",
                    most=60)
        memory.judge(figures, 268435456, 10)


@part("small-jobs")
def small_jobs(siege, figures):
    """16,000 small polled prompts whose clients leave: what a job costs is counted."""
    with Relay(siege, *TRUST, "--max-held-bytes", HELD, "--max-queue", 50000,
               "--max-queue-per-caller", 50000, "--max-prompts-per-minute", 10**6,
               "--max-anonymous-per-day", 10**6) as relay:
        def ask(n):
            statuses = set()
            with contextlib.closing(connect(relay.url, 30)) as connection:
                for m in range(500):
                    body = {"message": prompt_of("s%d.%d" % (n, m), 1, 6), "at": 0,
                            "key": "%032d" % (500 * n + m), "gettokens": 1}
                    with contextlib.suppress(*BROKEN):
                        connection.request("POST", "/" + SERVICE, json.dumps(body),
                                           address(n % 8))
                        response = connection.getresponse()
                        response.read()
                        statuses.add(response.status)
            return statuses

        with Memory(relay) as memory:
            statuses = set().union(*at_once(ask, range(32), 4))
        figures.add("statuses", sorted(statuses), good=statuses <= {200, 202, 429, 503})
        memory.judge(figures, HELD, 20)
        status, answer = relay.ask("POST", "/" + SERVICE, {"message": prompt_of("after")},
                                   headers=address(9))
        figures.add("one more", status, exactly=200)
        if status != 200:
            figures.note(str(answer))


##############################################################################
# Time
##############################################################################


class World:
    """What hostile requests may use: a service of the attacker with a session."""

    def __init__(self, relay):
        self.relay = relay
        self.key = relay.register("Attacker")
        self.session = Session(relay, self.key, "Attacker").id

    def provider(self, what, body):
        return request("POST", "/provider/Attacker/" + what, body, self.key, **FROM)


FROM = {"X_Forwarded_For": "198.51.100.9"}       # the attacker's address


def prompt_with(field, text):
    """A prompt with one more field, of that JSON text."""
    return request("POST", "/" + SERVICE, ('{"message": "%s", "%s": %s}' % (
        prompt_of("h", 1), field, text)).encode(), **FROM)


HOSTILE = {  # title: the request's bytes, from a World
    "reply of 190,000 entries": lambda world: world.provider("reply", {
        "session": world.session, "replies": [
            {"job": "x", "attempt": 1, "at": 0, "items": []}] * 190_000}),
    "reply of 500,000 items": lambda world: world.provider("reply", {
        "session": world.session, "replies": [
            {"job": "x", "attempt": 1, "at": 0, "items": [""] * 500_000}]}),
    "poll of 300,000 jobs": lambda world: world.provider("poll", {
        "session": world.session, "running": [["x", 1]] * 300_000}),
    "a million floats": lambda world: prompt_with(
        "more", "[" + "0.123456," * 1_000_000 + "1]"),
    "a million commas": lambda world: prompt_with("more", "[" + "1," * 1_000_000 + "1]"),
    "300,000 empty lists": lambda world: prompt_with("more", "[" + "[]," * 300_000 + "1]"),
    "50,000 lists 90 deep": lambda world: prompt_with(
        "more", "[" + ("[" * 90 + "]" * 90 + ",") * 50_000 + "1]"),
    "200,000 names": lambda world: prompt_with("more", "{" + "".join(
        '"n%d":1,' % n for n in range(200_000)) + '"n":1}'),
    "numbers of 4,000 digits": lambda world: prompt_with(
        "more", "[" + ("9" * 4000 + ",") * 2000 + "1]"),
    "3 million escapes": lambda world: prompt_with("more", '"' + "\\u00e9" * 3_000_000 + '"'),
    "20 MB of text": lambda world: prompt_with("more", '"' + "x" * 20_000_000 + '"'),
    "20 MB of broken JSON": lambda world: prompt_with("more", '"' + "x" * 20_000_000),
    "100,000 messages": lambda world: request("POST", CHAT, {
        "model": SERVICE, "messages": [{"role": "user", "content": "x"}] * 100_000}, **FROM),
    "100,000 content parts": lambda world: request("POST", CHAT, {
        "model": SERVICE, "messages": [{"role": "user", "content": [
            {"type": "text", "text": "x"}] * 100_000}]}, **FROM),
    "300,000 stop words": lambda world: request("POST", CHAT, {
        "model": SERVICE, "stop": ["x"] * 300_000,
        "messages": [{"role": "user", "content": prompt_of("h", 1)}]}, **FROM),
    "body in 400,000 chunks": lambda world: request(
        "POST", "/" + SERVICE, Transfer_Encoding="chunked", **FROM)
        + b"1\r\nx\r\n" * 400_000 + b"0\r\n\r\n",
    "body in 250,000 chunks of 64 bytes": lambda world: request(
        "POST", "/" + SERVICE, Transfer_Encoding="chunked", **FROM)
        + (b"40\r\n" + b"x" * 64 + b"\r\n") * 250_000 + b"0\r\n\r\n",
    "2,000 headers": lambda world: request("GET", "/healthz", **FROM)[:-2]
        + b"a:b\r\n" * 2000 + b"\r\n",
    "wrong keys": lambda world: request("GET", "/api/services/" + SERVICE,
                                        key="ne_" + "x" * 8000, **FROM),
    "the page": lambda world: request("GET", "/", Accept_Encoding="gzip", **FROM),
    "registering": lambda world: request("POST", "/api/services", {"name": SERVICE}, **FROM),
}


def attack(relay, figures, title, data, seconds=5):
    """Send one request again and again on three connections; what others notice."""
    statuses, stop = set(), threading.Event()

    def repeat():
        while not stop.is_set():
            try:
                with contextlib.closing(relay.dial(timeout=30)) as sock:
                    while not stop.is_set():
                        with contextlib.suppress(OSError):    # refused before its end
                            sock.sendall(data)
                        if not whole_response(sock, statuses):
                            break
            except OSError:
                time.sleep(0.01)

    threads = [threading.Thread(target=repeat, daemon=True) for _ in range(3)]
    with Modest(relay, every=0.02) as others:
        for thread in threads:
            thread.start()
        time.sleep(seconds)
        stop.set()
        for thread in threads:
            thread.join(40)
    figures.add(title, max(others.p99, others.prompt_p99), "ms", most=100)
    figures.add("longest", others.longest, "ms")
    if others.failed or others.unanswered:
        figures.add("failed", others.failed + others.unanswered, exactly=0)
    if "500" in statuses or not statuses:
        figures.add("statuses", sorted(statuses), good=False)


def whole_response(sock, statuses):
    """Read one response, and note its status; whether the connection can be used again."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = sock.recv(1 << 18)
        if not piece:
            return False
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    statuses.add(head[9:12].decode("latin-1"))
    length = re.search(rb"(?i)content-length: *(\d+)", head)
    if not length or re.search(rb"(?i)connection: *close", head):
        return False
    while len(body) < int(length.group(1)):
        piece = sock.recv(1 << 18)
        if not piece:
            return False
        body += piece
    return True


@part("hostile-requests")
def hostile_requests(siege, figures):
    """A list of the worst requests, each on three connections: others' p99 under 100 ms."""
    with Relay(siege, *TRUST, *MANY_PROMPTS) as relay:
        world = World(relay)
        with Modest(relay, every=0.02) as quiet:
            time.sleep(3)
        figures.add("without any", max(quiet.p99, quiet.prompt_p99), "ms")
        for title, make in HOSTILE.items():
            attack(relay, figures, title, make(world))
        figures.add("tracebacks", relay.tracebacks(), exactly=0)


@part("hostile-directory")
def hostile_directory(siege, figures):
    """The directory of 10,000 services, asked for on three connections."""
    with Relay(siege, *TRUST, *MANY_PROMPTS, "--max-registrations-per-hour", 20000,
               "--max-changes-per-minute", 100000) as relay:
        at_once(lambda n: relay.register("Service%d" % n), range(9_990), 4)
        for method, path in (("GET", "/api/models"), ("HEAD", "/api/models"),
                             ("GET", "/v1/models"), ("HEAD", "/v1/models"),
                             ("GET", "/v1/models/" + SERVICE)):
            if method == "HEAD":           # has no body, whatever its Content-Length
                data = request(method, path, Connection="close", **FROM)
            else:
                data = request(method, path, **FROM)
            attack(relay, figures, "%s %s" % (method, path), data)
        figures.add("tracebacks", relay.tracebacks(), exactly=0)


##############################################################################
# Connections
##############################################################################


@part("end-together")
def end_together(siege, figures):
    """10,000 connections that end in one moment: gone in 5 s, and SIGTERM is obeyed."""
    number = siege.options.connections
    for title, tls in (("plain", False), ("TLS", True)):
        for then in ["gone"] * siege.options.tries + ["SIGTERM"]:
            with Relay(siege, "--max-connections", number + 500, "--idle-seconds", 900,
                       tls=tls) as relay:
                fds = hold(number, lambda n, relay=relay: kept_alive(relay, n))
                if then == "SIGTERM":
                    close_all(fds)
                    time.sleep(0.2)
                    began = time.monotonic()
                    relay.child.end(seconds=60)
                    figures.add("SIGTERM obeyed in", time.monotonic() - began, "s", most=10)
                    continue
                figures.add(title + ": idle", len(fds), least=number)
                end_and_watch(relay, fds, figures)


def end_and_watch(relay, fds, figures):
    """Close all at once; how long the relay keeps them, and how soon it answers /healthz."""
    began, longest, gone = time.monotonic(), 0.0, None
    close_all(fds)
    while time.monotonic() - began < 60 and (gone is None or time.monotonic() < gone + 1):
        asked = time.monotonic()
        healthy = relay.healthy(20)
        longest = max(longest, time.monotonic() - asked if healthy else 20)
        if gone is None and relay.child.descriptors() < 50:
            gone = time.monotonic()
        time.sleep(0.01)
    figures.add("gone in", gone - began if gone else 60.0, "s", most=5)
    figures.add("/healthz, longest", longest, "s", most=0.3)


@part("drip-heads")
def drip_heads(siege, figures):
    """Heads whose first bytes come 9.5 s apart: one deadline from the first of them."""
    first = request("GET", "/healthz")
    drips = {"\\r \\n GET": (b"\r", b"\n", b"G", b"ET"),
             "\\n \\n \\n \\n": (b"\n", b"\n", b"\n", b"\n"),
             "GET": (b"G", b"E", b"T", b" "), "silence, GET": (b"", b"GET", b" /", b" H")}
    with Relay(siege) as relay:
        socks, ended, began = {}, {}, time.monotonic()
        for title, pieces in drips.items():
            for kept in False, True:
                sock = relay.dial()
                if kept:
                    sock.sendall(first)
                    sock.recv(4096)
                socks["%s, %s" % ("kept alive" if kept else "fresh", title)] = sock, pieces
        for n in range(1900):
            if len(ended) == len(socks):
                break
            for title, (sock, pieces) in socks.items():
                if title not in ended and n % 95 == 0 and n // 95 < len(pieces):
                    with contextlib.suppress(OSError):
                        sock.sendall(pieces[n // 95])
                sock.settimeout(0.001)
                if title not in ended and first_of(sock) != "silence":
                    ended[title] = time.monotonic() - began
            time.sleep(max(0, began + 0.1 * (n + 1) - time.monotonic()))
        for title, (sock, _) in socks.items():
            # A kept-alive connection may be idle for 9.5 s before its first byte.
            figures.add(title, ended.get(title, 190.0), "s",
                        most=21 if title == "kept alive, silence, GET" else 12)
            sock.close()


##############################################################################
# Room
##############################################################################


def leave(relay, body, headers, path="/" + SERVICE):
    """Send a prompt and go away; whether it was sent. With a key it stays for a while."""
    with contextlib.suppress(OSError), contextlib.closing(relay.dial()) as sock:
        sock.sendall(request("POST", path, body, **{
            name.replace("-", "_"): text for name, text in headers.items()}))
        sock.settimeout(0.05)
        first_of(sock)
        return True
    return False


@part("kept-streams")
def kept_streams(siege, figures):
    """One address fills what finished streams may take: others' streams are not forgotten."""
    with Relay(siege, *TRUST, "--max-held-bytes", HELD) as relay:
        prompt = prompt_of("mine", 60, 20)
        right, read = list(answer_of(prompt)), []

        def go_on(at, gettokens=20):
            return relay.ask("POST", "/" + SERVICE, {
                "message": prompt, "key": "victim-%032d" % 0, "at": at,
                "gettokens": gettokens}, headers=address(0))

        for at in 0, 20:
            read.append(go_on(at)[1]["reply"])
        flood, began = 0, time.monotonic()
        while flood < 40 and time.monotonic() - began < 30:
            status, _ = relay.ask("POST", "/" + SERVICE, {
                "message": prompt_of("flood%d" % flood, 700, 10000), "gettokens": 1,
                "at": 0, "key": "flood-%032d" % flood}, headers=address(1), timeout=60)
            flood += status == 200
            time.sleep(0.3 * (status != 200))
        figures.add("answers of 7 MB elsewhere", flood)
        status, answer = go_on(40)
        figures.add("the stream of another, 40 tokens read", status, exactly=200)
        figures.check("goes on rightly", status == 200 and read + [answer["reply"]] == [
            "".join(right[at:at + 20]) for at in (0, 20, 40)])
        held = relay.metrics().get("held_bytes", 0)
        figures.add("held", held / MB, "MB", most=HELD / MB)


def full_queue(figures, siege, title, addresses, outside):
    """Fill a service's queue from some addresses, then try to get in. outside: whether a
    stranger must be admitted, too."""
    with Relay(siege, *TRUST, "--max-queue", 200, "--max-queue-per-caller", 20,
               "--wait-seconds", 2, workers=1) as relay:
        guest = relay.ask("POST", "/api/services/%s/keys" % SERVICE, {}, relay.key)[1]["key"]
        relay.prompt(prompt_of("warm"))
        jobs = [(n, m) for m in range(20) for n in range(len(addresses))]
        at_once(lambda job: leave(relay, {
            "message": prompt_of("f%d.%d" % job, 40, 12, 0.5),
            "key": "queue-%032d" % (1000 * job[0] + job[1])}, addresses[job[0]]), jobs, 16)
        figures.add(title + ": queued", relay.metrics().get("queued", 0), least=100)
        for who, key, headers in (("operator", relay.key, address(300)),
                                  ("key holder", guest, address(301)),
                                  ("stranger", None, address(302))):
            status, _ = relay.ask("POST", "/" + SERVICE, {
                "message": prompt_of(who.replace(" ", "-"), 1), "gettokens": 1,
                "key": "%032d" % 7 + who}, key, headers=headers)
            figures.add(who, status, good=status in (200, 202)
                        or who == "stranger" and not outside)


@part("full-queue")
def full_queue_parts(siege, figures):
    """Ten addresses, or one IPv6 /48, fill a service's queue: others are still admitted."""
    full_queue(figures, siege, "ten addresses", [address(n) for n in range(10)], False)
    full_queue(figures, siege, "an IPv6 /48", [
        {"X-Forwarded-For": "2001:db8:7:%x::1" % n} for n in range(200)], True)


@part("full-polls")
def full_polls(siege, figures):
    """Ten addresses hold all polls: the first poll of another service is still admitted."""
    with Relay(siege, *TRUST, "--max-polls", 100, provider=False) as relay:
        own = relay.register(SERVICE)
        socks = []
        for n in range(10):
            name, headers = "Full%d" % n, address(n)
            key = relay.ask("POST", "/api/services", {"name": name}, headers=headers)[1]["key"]
            path = "/provider/%s/" % name
            for _ in range(11):
                session = relay.ask("POST", path + "login", {}, key,
                                    headers=headers)[1]["session"]
                socks.append(sent(relay, request(
                    "POST", path + "poll", {"session": session}, key,
                    X_Forwarded_For=headers["X-Forwarded-For"])))
        time.sleep(1)
        began = time.monotonic()
        relay.start_provider(own)
        with contextlib.suppress(AssertionError, *BROKEN):
            wait_for(lambda: relay.prompt(prompt_of("p"), timeout=5), 10, "an answer")
        figures.add("a provider that comes then: first answer after",
                    time.monotonic() - began, "s", most=5)
        close_all(socks)


@part("full-bodies")
def full_bodies(siege, figures):
    """Two addresses hold all room for long bodies: another's prompt of 1 MB is accepted."""
    with Relay(siege, *TRUST, "--max-held-bytes", HELD) as relay:
        def begin(n):
            head = ("POST /%s HTTP/1.1\r\nHost: localhost\r\nContent-Length: 20000000\r\n"
                    "X-Forwarded-For: 198.51.100.%d\r\n\r\n" % (SERVICE, n % 2))
            return sent(relay, head.encode() + b"x" * 19_000_000, timeout=5)

        socks = hold(20, begin)
        figures.add("bodies under way", len(socks))
        status, _ = relay.ask("POST", "/" + SERVICE, {
            "message": prompt_of("long", 2) + " " + "x" * 1_000_000}, headers=address(5))
        figures.add("a prompt of 1 MB from elsewhere", status, exactly=200)
        figures.check("a short one", relay.prompt(prompt_of("s"), headers=address(6)))
        close_all(socks)


##############################################################################
# Order, answers, methods
##############################################################################


@part("order")
def order(siege, figures):
    """After a lost hand-over one caller's prompts are handed out in their order."""
    limits = ("--handover-seconds", 1, "--lease-seconds", 3, "--close-seconds", 0.5)
    for title, lose in (("closed connection", lambda session: None),
                        ("logout", lambda session: session.post(
                            "logout", {"session": session.id})),
                        ("silence of one that stays", lambda session: time.sleep(1.5))):
        with Relay(siege, *limits, provider=False) as relay:
            key = relay.register(SERVICE)
            first = Session(relay, key, workers=3)
            askers = []
            for n in range(6):
                askers.append(sent(relay, request("POST", "/" + SERVICE, {
                    "message": "%d" % n, "stream": True, "wait": True})))
                wait_for(lambda n=n: relay.metrics().get("queued") == n + 1, 5, "queued")
            lost = [job["request"]["message"] for job in first.abandon_poll()]
            second = Session(relay, key, workers=6)
            lose(first)
            got, running = [], []
            deadline = time.monotonic() + 20
            while len(got) < 6 and time.monotonic() < deadline:
                for job in second.poll(running):
                    got.append(job["request"]["message"])
                    running.append([job["job"], job["attempt"]])
            # Those that were waiting behind the lost ones may have been handed out before.
            again = [message for message in got if message in lost]
            figures.add("%s: %s lost, then" % (title, ",".join(lost)), ",".join(got),
                        good=len(got) == 6 and again == sorted(again))
            close_all(askers)


POISON = {"nesting": lambda: json.loads("[" * 150 + "]" * 150),
          "bytes": lambda: b"x", "a set": lambda: {1}, "NaN": lambda: float("nan"),
          "NaN within": lambda: {"usage": {"n": float("nan")}},
          "21 MB": lambda: "x" * 21_000_000, "a million parts": lambda: [0] * 1_000_000,
          "lone surrogate": lambda: "\ud800", "a recursion": lambda: recursive()}


def recursive():
    value = {}
    value["itself"] = value
    return value


def provide_poison(url, name, key):
    """Be a provider whose answers to these prompts no relay can take."""
    from neuroengine import NeuroengineServer
    server = NeuroengineServer(url)
    assert server.login(name, key) >= 0, server.error
    print("logged in", flush=True)

    def answer(request):
        make = POISON.get(request["message"])
        return iter([make()]) if make else "good"

    server.listen(answer, 8)


@part("poison-answers")
def poison_answers(siege, figures):
    """Items that no relay can take fail that one job at once; others are answered."""
    with Relay(siege, provider=False) as relay:
        child = siege.python("poison", __file__, "--poison", relay.url, SERVICE,
                             relay.register(SERVICE))
        child.expect("logged in", 20)
        for message in POISON:
            began = time.monotonic()
            try:
                status, answer = relay.ask("POST", "/" + SERVICE, {"message": message},
                                           timeout=10)
                said = "%d %s" % (status, answer.get("error", "answered"))
            except OSError as error:
                said = repr(error)
            # What can be put into words may be; the rest must be an error, soon.
            figures.add(message, said, good=said[:3] in ("200", "400", "413", "502"))
            figures.add("after", time.monotonic() - began, "s", most=3)
            try:
                good = relay.ask("POST", "/" + SERVICE, {"message": "hello"},
                                 timeout=5)[1]["reply"] == "good"
            except (OSError, KeyError):
                good = False
            figures.check("a good one after it", good)


@part("odd-methods")
def odd_methods(siege, figures):
    """CONNECT and GET * are refused in words; a result item does not replace a chat."""
    with Relay(siege, provider=False) as relay:
        for line in ("CONNECT host:443", "GET *", "CONNECT /", "TRACE /", "OPTIONS *"):
            with contextlib.closing(sent(relay, (
                    line + " HTTP/1.1\r\nHost: localhost\r\n\r\n").encode())) as sock:
                answer = sock.recv(65536)
            figures.add(line, answer[9:12].decode(), good=answer[9:10] == b"4" or (
                line == "OPTIONS *" and answer[9:10] == b"2"))
            figures.check("no page", b"<html" not in answer.lower())
        session, got = Session(relay, relay.register(SERVICE)), []
        asker = threading.Thread(target=lambda: got.append(relay.ask("POST", CHAT, {
            "model": SERVICE, "messages": [{"role": "user", "content": "x"}]})))
        asker.start()
        job, = wait_for_jobs(session)
        session.reply(job, [{"result": {"forged": True}}])
        asker.join(20)
        figures.check("a result in answer to a chat is not the response", bool(got)
                      and "forged" not in got[0][1])


def wait_for_jobs(session):
    """The jobs of the first poll that brings some."""
    for _ in range(10):
        jobs = session.poll()
        if jobs:
            return jobs
    raise AssertionError("no job came")


if __name__ == "__main__" and sys.argv[1:2] == ["--poison"]:
    provide_poison(*sys.argv[2:])
