#!/usr/bin/env python3
"""Sieges of a relay: what the open internet does to one, each with a promised number.

    python bench/siege.py [--only idle,slow ...] [--json FILE] [--keep-logs] [--list]

Each part starts a relay of its own, with a provider that streams. While the attack goes
on, a modest client in a process of its own measures what everybody else has of the
relay: control requests (GET /healthz, each on a new connection) and prompts, whose
answers it checks. A part prints one line of figures: each that was promised stands with
its bound, and a "!" before those that missed it.

Some parts need more than Python: openssl (TLS), slowhttptest (slow), nginx and haproxy
(smuggling), libfaketime (clock), root (threads, disk-full). A part that cannot be done
here says why, and is no failure.

Linux, standard library only, loopback only. Exit status 1 if anything failed.
"""

import argparse
import contextlib
import glob
import http.client
import json
import os
import re
import resource
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, ROOT)

BROKEN = (OSError, http.client.HTTPException, ValueError)
SERVICE = "Siege"
UNVERIFIED = ssl.create_default_context()
UNVERIFIED.check_hostname, UNVERIFIED.verify_mode = False, ssl.CERT_NONE


class Skip(Exception):
    """This part cannot be done here, and why."""


##############################################################################
# Answers that can be checked
##############################################################################


def prompt_of(number, count=8, size=12, pause=0.0):
    """A prompt that asks for so many tokens of that size, so many seconds apart."""
    return "%s %d %d %g" % (number, count, size, pause)


def answer_of(prompt):
    """The tokens of the one right answer."""
    number, count, size, _ = prompt.split()
    for n in range(int(count)):
        yield ("%s:%d " % (number, n)).ljust(int(size), ".")


def provide(url, name, key, workers):
    """Be a provider; the whole of its process."""
    from neuroengine import NeuroengineServer

    def answer(request):
        prompt = request.get("message") or request["messages"][-1]["content"]
        began, pause = time.monotonic(), float(prompt.split()[3])
        for token in answer_of(prompt):
            time.sleep(pause)
            yield token
        print("made %s in %.3f s" % (prompt.split()[0], time.monotonic() - began), flush=True)

    server = NeuroengineServer(url, verify_ssl=False)
    while server.login(name, key) == -1:
        time.sleep(0.2)
    print("logged in", flush=True)
    server.listen(answer, int(workers))


##############################################################################
# What is started, and ended again
##############################################################################


class Child:
    """A program of ours, with its output in a file."""

    def __init__(self, log, *args, env=None, preexec=None, stdin=subprocess.DEVNULL):
        self.log = log
        with open(log, "ab") as file:
            self.process = subprocess.Popen(
                [str(arg) for arg in args], stdout=file, stderr=file, stdin=stdin,
                env=dict(os.environ, PYTHONDONTWRITEBYTECODE="1", **(env or {})),
                preexec_fn=preexec)
        self.pid = self.process.pid

    def said(self):
        with open(self.log, encoding="utf-8", errors="replace") as log:
            return log.read()

    def end(self, number=signal.SIGTERM, seconds=15):
        if self.process.poll() is None:
            self.process.send_signal(number)
            try:
                self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        return self.process.returncode

    def memory(self):
        """Resident memory in MB."""
        with open("/proc/%d/status" % self.pid) as status:
            return next(int(line.split()[1]) for line in status
                        if line.startswith("VmRSS")) / 1024

    def threads(self):
        return len(os.listdir("/proc/%d/task" % self.pid))

    def descriptors(self):
        return len(os.listdir("/proc/%d/fd" % self.pid))

    def cpu(self):
        """Seconds of processor time so far."""
        with open("/proc/%d/stat" % self.pid) as stat:
            fields = stat.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Relay:
    """A relay as a process of its own; by default with a service and its provider."""

    def __init__(self, siege, *options, tls=False, data="data", port=0, wrap=(), env=None,
                 preexec=None, provider=True, workers=16, source=None):
        self.siege, self.tls, self.children = siege, tls, []
        self.options, self.wrap, self.env, self.preexec = options, wrap, env, preexec
        self.data = os.path.join(siege.directory, "%s-%d" % (data, siege.number()))
        if data.startswith("/"):
            self.data = data
        self.port, self.key, self.workers = port, None, workers
        self.log = os.path.join(siege.directory, "relay-%d.log" % siege.number())
        self.start()
        if provider:
            _, answer = self.ask("POST", "/api/services", {"name": SERVICE})
            self.key = answer["key"]
            self.start_provider(self.key)

    def start(self):
        mark = len(self.said())
        options = ["--host", "127.0.0.1", "--port", self.port, "--data", self.data]
        if self.tls:
            options += ["--cert", self.siege.cert, "--key", self.siege.cert_key]
        self.child = Child(self.log, *self.wrap, sys.executable, "-u",
                           os.path.join(ROOT, "neuroengine_server.py"), *options,
                           *self.options, env=self.env, preexec=self.preexec)
        self.siege.children.append(self.child)
        wait_for(lambda: "listens at" in self.said()[mark:], 20, "the relay's start",
                 self.said)
        self.port = int(re.search(r"listens at \S+:(\d+)", self.said()[mark:]).group(1))

    @property
    def url(self):
        return "%s://127.0.0.1:%d" % ("https" if self.tls else "http", self.port)

    def said(self):
        if not os.path.exists(self.log):
            return ""
        with open(self.log, encoding="utf-8", errors="replace") as log:
            return log.read()

    def start_provider(self, key, name=SERVICE, workers=None):
        log = os.path.join(self.siege.directory, "provider-%d.log" % self.siege.number())
        child = Child(log, sys.executable, "-u", os.path.abspath(__file__), "--provide",
                      self.url, name, key, workers or self.workers)
        self.siege.children.append(child)
        wait_for(lambda: "logged in" in child.said(), 20, "the provider's login", child.said)
        self.provider = child
        return child

    def ask(self, method, path, body=None, key=None, timeout=20, source="127.0.0.1",
            headers=None):
        """One request on a connection of its own; its status and JSON."""
        connection = connect(self.url, timeout, source)
        with contextlib.closing(connection):
            headers = dict(headers or {})
            if key:
                headers["Authorization"] = "Bearer " + key
            connection.request(method, path, None if body is None else json.dumps(body),
                               headers)
            response = connection.getresponse()
            data = response.read()
            return response.status, json.loads(data) if data[:1] in (b"{", b"[") else data

    def prompt(self, prompt, name=SERVICE, **more):
        """Whether a prompt is answered, and rightly."""
        status, answer = self.ask("POST", "/" + name, {"message": prompt}, **more)
        return status == 200 and answer["reply"] == "".join(answer_of(prompt))

    def healthy(self):
        try:
            return self.ask("GET", "/healthz", timeout=2)[0] == 200
        except BROKEN:
            return False

    def dial(self, source="127.0.0.1", timeout=30, tls=None, buffer=None):
        """A raw connection, over TLS if the relay has it."""
        sock = socket.socket()
        if buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        sock.settimeout(timeout)
        sock.bind((source, 0))
        sock.connect(("127.0.0.1", self.port))
        if self.tls if tls is None else tls:
            sock = UNVERIFIED.wrap_socket(sock)
        return sock

    def tracebacks(self):
        said = self.said()
        return said.count("Traceback") + said.count("internal_error")

    def stop(self):
        if getattr(self, "provider", None):
            self.provider.end(signal.SIGINT)
        return self.child.end()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()


def connect(url, timeout, source="127.0.0.1"):
    scheme, _, address = url.partition("://")
    host, _, port = address.partition(":")
    if scheme == "https":
        return http.client.HTTPSConnection(host, int(port), timeout=timeout,
                                           source_address=(source, 0), context=UNVERIFIED)
    return http.client.HTTPConnection(host, int(port), timeout=timeout,
                                      source_address=(source, 0))


def wait_for(fact, seconds, what, detail=lambda: ""):
    """Wait until fact() is true; the seconds that it took. Raises AssertionError."""
    began = time.monotonic()
    while not fact():
        if time.monotonic() - began > seconds:
            raise AssertionError("%s did not happen within %g s: %s" % (
                what, seconds, detail()[-2000:]))
        time.sleep(0.02)
    return time.monotonic() - began


def percentile(values, share):
    values = sorted(values)
    return values[min(len(values) - 1, int(share * len(values)))] if values else float("nan")


class Modest:
    """A client that does nothing unusual, in a process of its own; figures at the end."""

    def __init__(self, relay, every=0.03):
        self.relay, self.every = relay, every

    def __enter__(self):
        log = os.path.join(self.relay.siege.directory,
                           "modest-%d.log" % self.relay.siege.number())
        self.child = Child(log, sys.executable, "-u", os.path.abspath(__file__), "--modest",
                           self.relay.url, self.every, stdin=subprocess.PIPE)
        self.relay.siege.children.append(self.child)
        wait_for(lambda: "ready" in self.child.said(), 10, "the modest client's start",
                 self.child.said)
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
        """Add what it had of the relay; most: of its requests' p99, in milliseconds."""
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


class Lives:
    """How long a relay holds each connection, from the kernel's tables; its provider's
    do not count."""

    def __init__(self, relay):
        self.relay, self.first, self.longest = relay, {}, 0.0
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

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

    def _watch(self):
        while not self.stopping.wait(0.25):
            now, held = time.monotonic(), self.now()
            for peer in held:
                self.first.setdefault(peer, now)
            for peer in set(self.first) - held:
                self.longest = max(self.longest, now - self.first.pop(peer))

    def oldest(self):
        """The longest life so far, of the ended and the living, in seconds."""
        return max([self.longest] + [time.monotonic() - first
                                     for first in list(self.first.values())])

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stopping.set()
        self.thread.join()


class Figures:
    """What came of one part: named values, some with a bound."""

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


class Siege:
    """One run: its directory, its certificate, and all that it started."""

    def __init__(self, options):
        self.options, self.children, self._count = options, [], 0
        self.directory = tempfile.mkdtemp(prefix="siege-")
        os.chmod(self.directory, 0o755)
        self._lock = threading.Lock()
        self.cert, self.cert_key = self.certificate("relay")

    def number(self):
        with self._lock:
            self._count += 1
            return self._count

    def path(self, name):
        return os.path.join(self.directory, name)

    def child(self, title, *args):
        """A Python program of ours, which ends with us."""
        child = Child(self.path(title + ".log"), sys.executable, "-u", *args)
        self.children.append(child)
        return child

    def certificate(self, name):
        """A new self-signed certificate and its key, as files."""
        cert, key = self.path(name + "-cert.pem"), self.path(name + "-key.pem")
        need("openssl")
        subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt",
                        "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj",
                        "/CN=" + name, "-addext", "subjectAltName=IP:127.0.0.1",
                        "-keyout", key, "-out", cert], check=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return cert, key

    def close(self):
        for child in self.children:
            child.end(signal.SIGKILL)


def need(program):
    if not shutil.which(program):
        raise Skip("there is no %s here" % program)


def hold(number, make):
    """So many connections by make(n), opened by a few threads; those that succeeded."""
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


def close_all(socks):
    for sock in socks:
        os.close(sock) if isinstance(sock, int) else sock.close()


##############################################################################
# The parts
##############################################################################

PARTS = {}


def part(name):
    """Make a function(siege, figures) a part; its docstring's first line describes it."""
    def add(function):
        PARTS[name] = function
        return function
    return add


@part("tls-silent")
def tls_silent(siege, figures):
    """500 peers that never begin a handshake and 50 that drip one hold up nobody."""
    with Relay(siege, tls=True) as relay, Lives(relay) as lives:
        with Modest(relay) as before:
            time.sleep(3)
        known = len(lives.now())
        silent = hold(500, lambda n: relay.dial(tls=False))
        drips = hold(50, lambda n: relay.dial(tls=False))
        hello = client_hello()
        with Modest(relay) as during:
            began = time.monotonic()
            for at in range(60):           # 18 s: longer than a handshake may take
                for sock in drips:
                    with contextlib.suppress(OSError):
                        sock.send(hello[at:at + 1])
                time.sleep(0.3)
                if at == 5:
                    figures.add("silent and dripping held", len(lives.now()) - known,
                                least=500)
            while len(lives.now()) > known + 5 and time.monotonic() - began < 30:
                time.sleep(0.2)
        figures.add("handshake p50", during.shake_p50, "ms")
        figures.add("p99", during.shake_p99, "ms", most=200)
        figures.add("without them", before.shake_p99, "ms")
        during.judge(figures)
        figures.add("longest life", lives.oldest(), "s", most=15)
        close_all(silent + drips)


def client_hello():
    """The first bytes of a TLS client."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = UNVERIFIED.wrap_bio(incoming, outgoing)
    with contextlib.suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


@part("slow")
def slow(siege, figures):
    """slowhttptest in all modes and drippers of our own, plain and TLS at once."""
    need("slowhttptest")
    seconds = 100                          # the longest limit: a write, then an idle minute
    with Relay(siege) as plain, Relay(siege, tls=True) as tls, \
            Lives(plain) as plain_lives, Lives(tls) as tls_lives, \
            Modest(plain) as plain_modest, Modest(tls) as tls_modest:
        attacks = [slow_attack(siege, relay, mode, path, seconds) for relay in (plain, tls)
                   for mode, path in (("-H", "/healthz"), ("-B", "/" + SERVICE),
                                      ("-X", "/"), ("-R", "/"))]
        drips = [(sock, piece) for relay in (plain, tls) for head, piece in DRIPS
                 for sock in hold(25, lambda n, relay=relay, head=head: sent(relay, head))]
        began, held = time.monotonic(), 0
        while time.monotonic() - began < seconds and any(
                attack.process.poll() is None for attack in attacks):
            time.sleep(0.9)
            held = max(held, len(plain_lives.now()) + len(tls_lives.now()))
            for sock, piece in drips:
                with contextlib.suppress(OSError):
                    sock.send(piece)
        oldest = plain_lives.oldest(), tls_lives.oldest()
        for attack in attacks:
            attack.end()
        close_all(sock for sock, _ in drips)
    figures.add("held at once", held, least=300)
    figures.add("longest life, plain", oldest[0], "s", most=95)
    figures.add("TLS", oldest[1], "s", most=95)
    plain_modest.judge(figures, title="plain: ")
    tls_modest.judge(figures, title="TLS: ")
    figures.add("times that slowhttptest found it down", sum(
        bool(re.search(r"service available:\s*NO", re.sub(r"\x1b\[[0-9;]*m", "",
                                                          attack.said())))
        for attack in attacks), exactly=0)


DRIPS = ((b"GET /healthz HTTP/1.1\r\nHost: x\r\n", b"X: y\r\n"),
         (b"POST /Siege HTTP/1.1\r\nHost: x\r\nContent-Length: 4096\r\n\r\n", b"x"),
         (b"POST /Siege HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n",
          b"1\r\nx\r\n"))


def slow_attack(siege, relay, mode, path, seconds):
    attack = Child(siege.path("slow%s-%d.log" % (mode, relay.port)), "slowhttptest", mode,
                   "-u", relay.url + path, "-c", 150, "-r", 50, "-i", 2, "-x", 10, "-l",
                   seconds, "-p", 5, "-w", 1, "-y", 16, "-n", 5, "-z", 2, "-k", 3)
    siege.children.append(attack)
    return attack


def sent(relay, data, **how):
    """A connection on which that was sent."""
    sock = relay.dial(**how)
    sock.sendall(data)
    return sock


@part("idle")
def idle(siege, figures):
    """10,000 idle connections, plain, then TLS: memory of each, and others' p99."""
    number = siege.options.connections
    for title, tls in (("plain", False), ("TLS", True)):
        with Relay(siege, "--max-connections", number + 500, "--idle-seconds", 900,
                   tls=tls) as relay:
            before = relay.child.memory()
            began = time.monotonic()

            def open_one(n):
                # Many addresses: one has 28,000 ports, and they are kept for a minute.
                sock = relay.dial("127.0.%d.%d" % (1 + n // 2000, 1 + n % 200))
                fd = os.dup(sock.fileno())     # a tenth of the memory of a TLS object
                sock.close()
                return fd

            fds = hold(number, open_one)
            took = time.monotonic() - began
            try:
                with Modest(relay) as modest_client:
                    time.sleep(10)
                memory = relay.child.memory()
                figures.add(title + ": held", relay.child.threads(), least=number)
                figures.add("opened in", took, "s")
                figures.add("of memory", memory, "MB", most=1024)
                figures.add("each", 1024 * (memory - before) / max(1, len(fds)), "KB")
                modest_client.judge(figures, most=100)
            finally:
                close_all(fds)
            figures.add("all let go in", wait_for(
                lambda: relay.child.threads() < 50, 30, "the end of the threads"), "s")


@part("descriptors")
def descriptors(siege, figures):
    """400 connections to a relay with 256 descriptors: it turns them away, and recovers."""
    def few():
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))

    for title, tls in (("plain", False), ("TLS", True)):
        with Relay(siege, tls=tls, preexec=few) as relay:
            def open_one(n):
                sock = socket.create_connection(("127.0.0.1", relay.port), 5)
                sock.settimeout(5)
                return sock

            socks = hold(400, open_one)
            time.sleep(10)                 # it turns away twenty a second
            cpu, began = relay.child.cpu(), time.monotonic()
            time.sleep(4)
            cpu = 100 * (relay.child.cpu() - cpu) / (time.monotonic() - began)
            began = time.monotonic()
            with contextlib.closing(open_one(0)) as late:
                late.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
                answer = first_of(late)
            figures.add(title + ": CPU", cpu, "%", most=10)
            figures.add("one more is told", answer, good=answer in ("503", "closed"))
            figures.add("within", time.monotonic() - began, "s", most=3)
            close_all(socks)
            figures.add("healthy again in", wait_for(relay.healthy, 10, "health"), "s",
                        most=2)
            figures.check("answers", relay.prompt(prompt_of("after")))
            figures.add("tracebacks", relay.tracebacks(), exactly=0)


def first_of(sock):
    """The status that comes on a connection, "closed", or "silence"."""
    try:
        data = sock.recv(4096)
    except socket.timeout:
        return "silence"
    except OSError:
        data = b""
    return data[9:12].decode() if data.startswith(b"HTTP/1.1 ") else "closed"


@part("threads")
def threads(siege, figures):
    """200 connections to a relay that may have 60 threads: 503, and it recovers."""
    if os.geteuid():
        raise Skip("needs root, to run the relay as a user of no other process")
    need("setpriv")
    home = siege.path("poor")
    os.mkdir(home)
    os.chown(home, 61234, 61234)
    # The limit counts the processes of a user, and does not bind root.
    wrap = ("prlimit", "--nproc=60", "setpriv", "--reuid=61234", "--regid=61234",
            "--clear-groups")
    for title, tls in (("plain", False), ("TLS", True)):
        if tls:
            os.chmod(siege.cert_key, 0o644)
        with Relay(siege, data=os.path.join(home, title), wrap=wrap, tls=tls) as relay:
            socks = hold(200, lambda n: relay.dial(tls=False))
            time.sleep(1)
            figures.add(title + ": threads", relay.child.threads(), most=60)
            told = [first_of_now(sock) for sock in socks]
            figures.add("connections kept", told.count("silence"), least=30)
            for answer in ("503", "closed"):
                figures.add(answer, told.count(answer))
            close_all(socks)
            figures.add("healthy again in", wait_for(relay.healthy, 10, "health"), "s",
                        most=2)
            figures.check("answers", relay.prompt(prompt_of("after")))
            figures.add("tracebacks", relay.tracebacks(), exactly=0)


def first_of_now(sock):
    sock.settimeout(0.01)
    return first_of(sock)


@part("error-replies")
def error_replies(siege, figures):
    """8 MB posted to what answers 413, 401 and 404 at once: the status arrives."""
    body = b"x" * (8 << 20)
    for title, tls in (("plain", False), ("TLS", True)):
        with Relay(siege, "--max-request-bytes", 1 << 20, tls=tls) as relay:
            for path, status in (("/" + SERVICE, 413), ("/a/b/c/d", 404),
                                 ("/provider/%s/reply" % SERVICE, 401)):
                got, words = 0, set()
                for _ in range(20):
                    try:               # a client that sends all before it reads
                        with contextlib.closing(relay.dial()) as sock:
                            sock.sendall(b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: "
                                         b"%d\r\n\r\n" % (path.encode(), len(body)) + body)
                            answer = first_of(sock)
                    except OSError as error:
                        answer = repr(error)
                    got += answer == str(status)
                    words.add(answer)
                figures.add("%s %d" % (title, status), "%d of 20" % got, good=got == 20)
                if got < 20:
                    figures.note(str(words))


@part("slow-reader")
def slow_reader(siege, figures):
    """Ten clients that read a byte a second of 5 MB each: the provider does not feel it."""
    with Relay(siege, workers=32) as relay:
        big = prompt_of("fast", 500, 10000)
        relay.prompt(big)
        before = relay.child.memory()
        socks = []
        with Lives(relay) as lives, Modest(relay) as modest_client:
            for n in range(10):
                path, body = slow_request(n)
                socks.append(sent(relay, b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: "
                                  b"%d\r\n\r\n" % (path, len(body)) + body, buffer=2048))
            began, most = time.monotonic(), 0
            while time.monotonic() - began < 45:
                time.sleep(1)
                most = max(most, relay.child.memory())
                for sock in socks:
                    sock.settimeout(0.01)
                    with contextlib.suppress(OSError):
                        sock.recv(1)
            oldest = lives.oldest()
        made = [float(seconds) for seconds in re.findall(
            r"made \S+ in (\S+) s", relay.provider.said())]
        figures.add("provider's times to make 5 MB: alone", made[0], "s")
        figures.add("for slow readers, longest", max(made[1:]), "s", most=10)
        figures.add("made", sum(line.startswith("made s") for line in
                                relay.provider.said().splitlines()), exactly=10)
        figures.add("memory before", before, "MB")
        figures.add("at most", most, "MB", most=before + 10 * 5 * 2 + 20)
        figures.add("longest life", oldest, "s", most=45)
        modest_client.judge(figures)
        close_all(socks)


def slow_request(n):
    prompt = prompt_of("s%d" % n, 500, 10000)
    if n % 2:
        return b"/v1/chat/completions", json.dumps({
            "model": SERVICE, "stream": True,
            "messages": [{"role": "user", "content": prompt}]}).encode()
    return b"/Siege", json.dumps({"message": prompt, "stream": True}).encode()


@part("slow-writer")
def slow_writer(siege, figures):
    """A provider of a token in 20 s keeps its job; a body of a byte a second is cut."""
    with Relay(siege) as relay:
        answers = []
        prompt = prompt_of("slow", 3, 12, 20.0)
        asker = threading.Thread(target=lambda: answers.append(relay.prompt(
            prompt, timeout=100)))
        asker.start()
        head = b"POST /Siege HTTP/1.1\r\nHost: x\r\n"
        drips = [(sent(relay, head + b"Content-Length: 65536\r\n\r\n"), b"x"),
                 (sent(relay, head + b"Transfer-Encoding: chunked\r\n\r\n"), b"1\r\nx\r\n")]
        began, cut = time.monotonic(), {}
        while len(cut) < len(drips) and time.monotonic() - began < 60:
            time.sleep(1)
            for n, (sock, piece) in enumerate(drips):
                sock.settimeout(0.01)
                if n not in cut:
                    with contextlib.suppress(OSError):
                        sock.send(piece)
                    answer = first_of(sock)
                    if answer != "silence":
                        cut[n] = answer, time.monotonic() - began
        for n, (title, most) in enumerate((("body of known length", 27), ("chunked", 23))):
            answer, seconds = cut.get(n, ("never", 999.0))
            figures.add(title + " answered", answer, exactly="408")
            figures.add("after", seconds, "s", most=most)
        asker.join()
        figures.check("the slow answer is whole", answers == [True])
        figures.add("times it was made", relay.provider.said().count("made slow"),
                    exactly=1)
        close_all(sock for sock, _ in drips)


@part("disk-full")
def disk_full(siege, figures):
    """A disk of 600 KB fills up: prompts go on, revoking too, registering says 503."""
    if os.geteuid():
        raise Skip("needs root, to mount a small disk")
    disk = siege.path("disk")
    os.mkdir(disk)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "siege", disk]).returncode:
        raise Skip("no disk may be mounted here")
    try:
        with Relay(siege, data=os.path.join(disk, "data")) as relay:
            disk_full_with(relay, figures, os.path.join(disk, "filler"))
    finally:
        subprocess.run(["umount", disk], check=True)


def disk_full_with(relay, figures, filler):
    name = "/api/services/" + SERVICE
    keys = [relay.ask("POST", name + "/keys", {"label": "guest"}, relay.key)[1]
            for _ in range(2)]
    relay.ask("PATCH", name, {"private": True}, relay.key)
    figures.check("a guest is let in", relay.prompt(prompt_of("a"), key=keys[0]["key"]))
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(b"x" * 512)
    answered = [relay.prompt(prompt_of("b%d" % n), key=keys[1]["key"]) for n in range(20)]
    figures.add("prompts answered with the disk full", sum(answered), exactly=20)
    time.sleep(1)                          # the counters are saved, or not
    statuses = {relay.ask("POST", "/api/services", {"name": "N%d" % n, "comment": "x" * 400}
                          )[0] for n in range(20)}
    figures.add("registering then", statuses, good=statuses == {503})
    status, _ = relay.ask("DELETE", "%s/keys/%s" % (name, keys[0]["id"]), key=relay.key)
    figures.add("revoking then", status, exactly=200)
    status, _ = relay.ask("POST", "/" + SERVICE, {"message": prompt_of("c")},
                          keys[0]["key"])
    figures.add("the revoked key then", status, exactly=401)
    figures.add("warnings in the log", relay.said().count("cannot_save"), least=1)
    os.unlink(filler)
    figures.add("registering again, after", wait_for(
        lambda: relay.ask("POST", "/api/services", {"name": "After"})[0] == 201, 10,
        "registering"), "s", most=2)
    relay.prompt(prompt_of("d"), key=keys[1]["key"])
    time.sleep(2)
    relay.child.end(signal.SIGKILL)
    relay.start()
    kept = relay.ask("GET", name + "/keys", key=relay.key)[1]["keys"]
    figures.check("after kill -9 the revoked key is gone, the other there",
                  [key["id"] for key in kept] == [keys[1]["id"]])
    figures.check("and the new service", relay.ask("GET", "/api/models")[1][0]["name"]
                  == "After")
    figures.add("tracebacks", relay.tracebacks(), exactly=0)


@part("kill")
def kill(siege, figures):
    """kill -9 thirty times: services and keys intact, provider and clients come back."""
    from neuroengine import Neuroengine
    with Relay(siege, "--offline-seconds", 15) as relay:
        name = "/api/services/" + SERVICE
        guest = relay.ask("POST", name + "/keys", {"label": "guest"}, relay.key)[1]
        others = [relay.ask("POST", "/api/services", {"name": "Other%d" % n})[1]
                  for n in range(5)]
        right, words, stop = [], [], threading.Event()

        def client(number):
            api, count = Neuroengine(SERVICE, relay.url, key=guest["key"]), 0
            while not stop.is_set():
                count += 1
                prompt = prompt_of("c%d.%d" % (number, count), 20, 12, 0.01)
                reply = api.request(prompt, raw=True)
                right.append(reply == "".join(answer_of(prompt)))
                if not right[-1]:
                    words.append(reply[:80])

        clients = [threading.Thread(target=client, args=(n,)) for n in range(3)]
        for thread in clients:
            thread.start()
        up, back, kept = [], [], 0
        try:
            for n in range(siege.options.kills):
                time.sleep(0.3 + n % 10 / 10)
                relay.child.end(signal.SIGKILL)
                began = time.monotonic()
                relay.start()
                wait_for(relay.healthy, 10, "health")
                up.append(time.monotonic() - began)
                wait_for(lambda: relay.ask("GET", name, key=relay.key)[1]["connected"], 30,
                         "the provider's return")
                back.append(time.monotonic() - began)
                kept += all(
                    relay.ask("GET", "/api/services/" + other["name"], key=other["key"])[0]
                    == 200 for other in others) and relay.ask(
                        "GET", name + "/keys", key=relay.key)[1]["keys"][0]["id"] \
                    == guest["id"]
        finally:
            stop.set()
            for thread in clients:
                thread.join()
        rounds = len(back)
        figures.add("kills", rounds, exactly=siege.options.kills)
        figures.add("services and keys intact", "%d of %d" % (kept, rounds),
                    good=kept == rounds)
        figures.add("up again p50", percentile(up, 0.5), "s")
        figures.add("longest", max(up), "s", most=5)
        figures.add("provider back p50", percentile(back, 0.5), "s")
        figures.add("longest", max(back), "s", most=10)
        figures.add("prompts answered meanwhile", "%d of %d" % (sum(right), len(right)),
                    good=all(right))
        figures.add("numreq in the store", relay.ask("GET", name, key=relay.key)[1]["numreq"],
                    least=0.5 * len(right))
        if words:
            figures.note("instead: " + "; ".join(sorted(set(words))[:3]))
        figures.add("tracebacks", relay.tracebacks(), exactly=0)


@part("fairness")
def fairness(siege, figures):
    """One greedy client and nine modest ones: each modest one gets its turn."""
    with Relay(siege, "--max-queue-per-caller", 30, workers=2) as relay:
        counts, refused, stop = {}, [], threading.Event()
        lock = threading.Lock()

        def ask(source, number):
            count = 0
            while not stop.is_set():
                count += 1
                prompt = prompt_of("%s.%d.%d" % (source, number, count), 2, 10, 0.01)
                began = time.monotonic()
                with contextlib.suppress(OSError):
                    status, answer = relay.ask("POST", "/" + SERVICE, {"message": prompt},
                                               source=source)
                    with lock:
                        if status == 200:
                            counts[source] = counts.get(source, 0) + 1
                        else:
                            refused.append((status, time.monotonic() - began))
                    if status != 200:
                        time.sleep(0.2)

        askers = [threading.Thread(target=ask, args=("127.0.0.1", n)) for n in range(60)]
        askers += [threading.Thread(target=ask, args=("127.0.0.%d" % n, n))
                   for n in range(2, 11)]
        for asker in askers:
            asker.start()
        time.sleep(12)
        stop.set()
        for asker in askers:
            asker.join()
        everything = sum(counts.values())
        modest_ones = [counts.get("127.0.0.%d" % n, 0) for n in range(2, 11)]
        figures.add("prompts", everything, least=100)
        figures.add("least share of a modest one", 100 * min(modest_ones) / everything, "%",
                    least=5)
        figures.add("greatest", 100 * max(modest_ones) / everything, "%")
        figures.add("the greedy one's", 100 * counts.get("127.0.0.1", 0) / everything, "%")
        figures.add("refused", len(refused), least=1)
        figures.add("with", {status for status, _ in refused},
                    good={status for status, _ in refused} <= {429, 503})
        figures.add("p99 of a refusal", 1000 * percentile([t for _, t in refused], 0.99),
                    "ms", most=300)


##############################################################################
# The command line
##############################################################################


def run(name, siege):
    """Do one part; its record for --json."""
    figures, began = Figures(), time.monotonic()
    verdict = "ok"
    try:
        PARTS[name](siege, figures)
    except Skip as reason:
        verdict = "skipped"
        figures.note(str(reason))
    except Exception as error:             # a part that broke is a failure like others
        import traceback
        figures.ok = False
        figures.note("%s" % error or repr(error))
        traceback.print_exc()
    finally:
        siege.close()
    if not figures.ok:
        verdict = "FAILED"
    seconds = time.monotonic() - began
    print("%-14s %s (%.0f s): %s" % (name, verdict, seconds, figures), flush=True)
    return {"part": name, "verdict": verdict, "seconds": round(seconds, 1),
            "figures": figures.rows, "notes": figures.notes}


def main():
    if sys.argv[1:2] == ["--provide"]:
        return provide(*sys.argv[2:])
    if sys.argv[1:2] == ["--modest"]:
        return modest(sys.argv[2], float(sys.argv[3]))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="some parts, with commas: " + ", ".join(PARTS))
    parser.add_argument("--list", action="store_true", help="what each part does")
    parser.add_argument("--json", metavar="FILE", help="the figures, too")
    parser.add_argument("--keep-logs", action="store_true")
    parser.add_argument("--connections", type=int, default=10000,
                        help="of the part idle (default: %(default)s)")
    parser.add_argument("--kills", type=int, default=30, help="of the part kill")
    options = parser.parse_args()
    if options.list:
        for name, function in PARTS.items():
            print("%-14s %s" % (name, function.__doc__.splitlines()[0]))
        return 0
    names = options.only.split(",") if options.only else list(PARTS)
    unknown = set(names) - set(PARTS)
    if unknown:
        parser.error("there is no part " + ", ".join(sorted(unknown)))
    signal.signal(signal.SIGTERM, signal.default_int_handler)   # end what we started
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    siege = Siege(options)
    try:
        records = [run(name, siege) for name in names]
    finally:
        siege.close()
        if options.keep_logs:
            print("logs in", siege.directory)
        else:
            shutil.rmtree(siege.directory, ignore_errors=True)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(records, file, indent=1)
    return 1 if any(record["verdict"] == "FAILED" for record in records) else 0


if __name__ == "__main__":
    sys.exit(main())
