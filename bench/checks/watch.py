"""What the parts of siege.py measure with: a modest client, lives of connections, figures."""

import contextlib
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from harness import (BROKEN, SERVICE, UNVERIFIED, Workspace, answer_of, connect, percentile,
                     prompt_of)


class Modest:
    """A client that does nothing unusual, in another process; has figures at the end."""

    def __init__(self, relay, every=0.03):
        self.relay, self.every = relay, every

    def __enter__(self):
        self.child = self.relay.space.python(
            "modest", os.path.abspath(__file__), "--modest", self.relay.url, self.every,
            stdin=subprocess.PIPE)
        self.child.expect("ready", 10)
        return self

    def __exit__(self, kind, *_):
        self.child.process.stdin.close()
        try:
            self.child.process.wait(60)
        except subprocess.TimeoutExpired:
            self.child.end()
        if kind is None:
            self.__dict__.update(json.loads(self.child.said().splitlines()[-1]))

    def judge(self, figures, most=200, title=""):
        """Add what it noticed; most: the bound of its requests' p99, in milliseconds."""
        figures.add(title + "control p50", self.p50, "ms")
        figures.add("p99", self.p99, "ms", most=most)
        figures.add("failed", "%d of %d" % (self.failed, self.requests),
                    good=not self.failed)
        figures.add("prompts unanswered or wrong", "%d of %d" % (
            self.unanswered, self.prompts), good=self.prompts and not self.unanswered)
        if self.words:
            figures.note(self.words)


def modest(url, every):
    """Be the modest client until standard input ends; prints its figures as JSON."""
    times, shakes, answers, words, stop = [], [], [], [], threading.Event()

    def once(method, path, body=None):
        began = time.monotonic()
        connection = connect(url, 30)
        try:
            connection.connect()
            shakes.append(time.monotonic() - began)
            connection.request(method, path, body)
            response = connection.getresponse()
            return response.status, response.read(), time.monotonic() - began
        except BROKEN as error:
            words.append("%s: %r" % (path, error))
            return 0, b"", time.monotonic() - began
        finally:
            connection.close()

    def control():
        while not stop.wait(every):
            status, _, took = once("GET", "/healthz")
            times.append((status, took))

    def prompts():
        number = 0
        while not stop.wait(5 * every):
            number += 1
            prompt = prompt_of("m%d" % number)
            status, body, took = once("POST", "/" + SERVICE, json.dumps({"message": prompt}))
            right = status == 200 and json.loads(body)["reply"] == "".join(answer_of(prompt))
            answers.append((right, took))
            if status and not right:
                words.append("prompt: %d %r" % (status, body[:200]))

    threads = [threading.Thread(target=target, daemon=True) for target in (control, prompts)]
    for thread in threads:
        thread.start()
    print("ready", flush=True)
    sys.stdin.read()
    stop.set()
    for thread in threads:
        thread.join(35)
    took = [seconds for status, seconds in times if status == 200]
    print(json.dumps({
        "requests": len(times), "failed": len(times) - len(took),
        "p50": 1000 * percentile(took, 0.5), "p99": 1000 * percentile(took, 0.99),
        "longest": 1000 * max(took, default=0),
        "shake_p50": 1000 * percentile(shakes, 0.5),
        "shake_p99": 1000 * percentile(shakes, 0.99),
        "prompts": len(answers), "unanswered": sum(not right for right, _ in answers),
        "prompt_p99": 1000 * percentile([t for right, t in answers if right], 0.99),
        "words": "; ".join(sorted(set(words))[:3])}), flush=True)


class Watcher:
    """Calls look() again and again in a thread, during a `with` block."""

    def __init__(self, every):
        self.every, self.stopping = every, threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def look(self):
        raise NotImplementedError

    def _watch(self):
        while not self.stopping.wait(self.every):
            self.look()

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stopping.set()
        self.thread.join()


class Lives(Watcher):
    """How long a relay holds each connection, from the kernel's tables, not counting its
    provider's."""

    def __init__(self, relay):
        super().__init__(every=0.25)
        self.relay, self.first, self.longest = relay, {}, 0.0

    def now(self):
        """The peers of the connections that the relay holds a descriptor of."""
        here, inodes, mine = "0100007F:%04X" % self.relay.port, {}, set()
        with open("/proc/net/tcp") as table:
            for line in table:
                fields = line.split()
                # Without an inode no process has it (any more); state 0A listens.
                if fields[9] != "0" and fields[3] != "0A":
                    if fields[1] == here:
                        mine.add(fields[2])
                    elif fields[2] == here:
                        inodes[fields[1]] = fields[9]
        providers = set()
        fds = "/proc/%d/fd/" % self.relay.provider.pid
        for fd in os.listdir(fds):
            with contextlib.suppress(OSError):
                providers.add(os.readlink(fds + fd))
        return {peer for peer in mine
                if "socket:[%s]" % inodes.get(peer) not in providers}

    def look(self):
        now, held = time.monotonic(), self.now()
        for peer in held:
            self.first.setdefault(peer, now)
        for peer in set(self.first) - held:
            self.longest = max(self.longest, now - self.first.pop(peer))

    def oldest(self):
        """The longest life so far, of the ended and the living, in seconds."""
        return max([self.longest] + [time.monotonic() - first
                                     for first in list(self.first.values())])


class Figures:
    """The results of one part: named values, some with a bound."""

    def __init__(self):
        self.rows, self.notes, self.ok = [], [], True

    def add(self, name, value, unit="", most=None, least=None, exactly=None, good=True):
        good = bool(good) and not (most is not None and not value <= most
                                   or least is not None and not value >= least
                                   or exactly is not None and value != exactly)
        self.ok = self.ok and good
        bound = ("at most %g" % most if most is not None else
                 "at least %g" % least if least is not None else
                 "wanted %s" % exactly if exactly is not None and value != exactly else "")
        self.rows.append({"name": name, "value": value, "unit": unit, "bound": bound,
                          "ok": good})

    def check(self, name, good):
        """A fact that holds or does not."""
        self.add(name, "yes" if good else "NO", exactly="yes")

    def note(self, words):
        self.notes.append(words)

    def __str__(self):
        parts = []
        for row in self.rows:
            value = row["value"]
            value = "%.4g" % value if isinstance(value, float) else str(value)
            parts.append("%s%s %s%s%s" % (
                "" if row["ok"] else "! ", row["name"], value,
                " " + row["unit"] if row["unit"] else "",
                " (%s)" % row["bound"] if row["bound"] else ""))
        return ", ".join(parts) + "".join("; " + note for note in self.notes)


class Siege(Workspace):
    """The workspace of one run, and its options."""

    def __init__(self, options):
        super().__init__("siege")
        self.options = options


def hold(number, make):
    """Open `number` connections by make(n) in a few threads; those that succeeded."""
    made, numbers, lock = [], iter(range(number)), threading.Lock()

    def some():
        while True:
            with lock:
                n = next(numbers, None)
            if n is None:
                return
            with contextlib.suppress(OSError):
                made.append(make(n))

    threads = [threading.Thread(target=some) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return made


def sent(relay, data, **how):
    """A new connection on which `data` was sent."""
    sock = relay.dial(**how)
    sock.sendall(data)
    return sock


def first_of(sock):
    """The status that arrives on a connection, "closed", or "silence"."""
    try:
        data = sock.recv(4096)
    except socket.timeout:
        return "silence"
    except OSError:
        data = b""
    return data[9:12].decode() if data.startswith(b"HTTP/1.1 ") else "closed"


def client_hello():
    """The first bytes of a TLS client."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = UNVERIFIED.wrap_bio(incoming, outgoing)
    with contextlib.suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


def kept_alive(relay, n):
    """An idle connection that was used once, as a descriptor."""
    # Many addresses: one has 28,000 ports, which are kept for a minute after their use.
    sock = relay.dial("127.0.%d.%d" % (1 + n // 2000, 1 + n % 200))
    sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
    sock.recv(4096)
    fd = os.dup(sock.fileno())             # a tenth of the memory of a TLS object
    sock.close()
    return fd


PARTS = {}


def part(name):
    """Make a function(siege, figures) a part; its docstring's first line describes it."""
    def add(function):
        PARTS[name] = function
        return function
    return add


if __name__ == "__main__" and sys.argv[1:2] == ["--modest"]:
    modest(sys.argv[2], float(sys.argv[3]))
