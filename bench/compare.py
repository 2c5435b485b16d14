#!/usr/bin/env python3
"""Measure the relay, beside what else stands between clients and an LLM.

    python bench/compare.py [--quick] [--only requests,tokens] [--json FILE] [--charts DIR]

Starts the relay with a lean provider (provider.py), an LLM that takes no time (load.c, as
are the clients), and those of the peers that are there: a bare ThreadingHTTPServer that
says hello, nginx as a proxy, FastChat and LiteLLM (--install puts these two into virtual
environments). Each row of the table is measured for all of them one after the other, in
rounds, because the speed of a shared machine moves: only ratios within a round count, and
of CPU time what is said per request and per token.

Needs Linux and a C compiler; wrk for the row about TLS. Loopback only; ends what it
started. Results are medians of all rounds, with minimum and maximum.
"""

import argparse
import contextlib
import functools
import http.client
import json
import os
import platform
import random
import re
import resource
import select
import shutil
import signal
import socket
import sqlite3
import ssl
import statistics
import subprocess
import sys
import tempfile
import time

import charts

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
CACHE = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"),
                     "neuroengine-bench")
PEERS = {"fastchat": ["fschat==0.2.36", "pydantic<2"],    # newer pydantic: no streams
         "litellm": ["litellm[proxy]==1.106.*"]}
SERVICE, MASTER_KEY = "Bench", "sk-bench"
START_SECONDS = 60        # for any of the programs to be ready
TICK = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")

##############################################################################
# Programs: started, watched and ended
##############################################################################


class Child:
    """A program of ours, in a process group of its own, with its output in a file."""

    def __init__(self, bench, title, args, env=None, cwd=None):
        self.log = os.path.join(bench.directory, "%s-%d.log" % (title, len(bench.children)))
        self.title, self.begun = title, time.monotonic()
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                args, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log,
                start_new_session=True, cwd=cwd or bench.directory,
                env=dict(os.environ, **env or {}))
        bench.children.append(self)

    def line(self, seconds=START_SECONDS):
        """The next line that it prints."""
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            raise Broken("%s says nothing" % self.title)
        line = self.process.stdout.readline().decode()
        if not line:
            raise Broken("%s has ended:\n%s" % (self.title, self.words()))
        return line.strip()

    def words(self):
        """The end of what it wrote to standard error."""
        with open(self.log, "rb") as log:
            return log.read()[-2000:].decode("utf-8", "replace")

    def pids(self):
        """Its process and all that come of it."""
        found, todo = [], [self.process.pid]
        while todo:
            pid = todo.pop()
            found.append(pid)
            with contextlib.suppress(OSError):
                for task in os.listdir("/proc/%d/task" % pid):
                    with open("/proc/%d/task/%s/children" % (pid, task)) as file:
                        todo += map(int, file.read().split())
        return found

    def cpu(self):
        """Seconds of processor time so far."""
        total = 0
        for pid in self.pids():
            with contextlib.suppress(OSError), open("/proc/%d/stat" % pid) as file:
                fields = file.read().rsplit(")", 1)[1].split()
                total += int(fields[11]) + int(fields[12])
        return total / TICK

    def memory(self):
        """Bytes resident, of all its processes."""
        total = 0
        for pid in self.pids():
            with contextlib.suppress(OSError), open("/proc/%d/statm" % pid) as file:
                total += int(file.read().split()[1]) * PAGE
        return total

    def end(self):
        """End it, and whatever it started."""
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.3)
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()


class Broken(Exception):
    """A program did not do what it should; the words say which and what."""


def free_port():
    """A port below those that the system gives to connections, so it stays free."""
    while True:
        port = random.randrange(12000, 32000)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


def trusting():
    """A TLS context that trusts anyone: the certificate is ours, of a minute ago."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def call(port, method, path, body=None, tls=False, **headers):
    """One request; the status and the body, which is JSON."""
    connection = (
        http.client.HTTPSConnection("127.0.0.1", port, timeout=30, context=trusting())
        if tls else http.client.HTTPConnection("127.0.0.1", port, timeout=30))
    try:
        connection.request(method, path, None if body is None else json.dumps(body),
                           dict({"Content-Type": "application/json"}, **headers))
        response = connection.getresponse()
        return response.status, json.loads(response.read() or b"null")
    finally:
        connection.close()


##############################################################################
# What is compared
##############################################################################


class Target:
    """Something that clients can ask. `own` are the programs whose cost is counted."""

    path, model, headers = "/v1/chat/completions", "m", {}
    streams = True            # whether it can stream
    port = None               # where it listens; None while it does not
    first_answer = None       # seconds from its start to that

    def __init__(self, bench):
        self.bench, self.children, self.own = bench, [], []

    def spawn(self, title, args, own=True, **more):
        child = Child(self.bench, title, args, **more)
        self.children.append(child)
        if own:
            self.own.append(child)
        return child

    def start(self):
        """Start it, and return when it can be asked."""

    def end(self):
        for child in self.children:
            child.end()
        self.children, self.own, self.port = [], [], None

    def wait(self, child, port=None, path="/v1/models"):
        """Wait until a GET is answered with 200, and note how long that took."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
                if call(port or self.port, "GET", path, **self.headers)[0] == 200:
                    self.first_answer = time.monotonic() - self.children[0].begun
                    return
            if child.process.poll() is not None:
                raise Broken("%s has ended:\n%s" % (child.title, child.words()))
            time.sleep(0.002)
        raise Broken("%s does not answer:\n%s" % (child.title, child.words()))

    def body(self, tokens, rate, stream):
        return {"model": self.model, "stream": stream, "messages": [
            {"role": "user", "content": wish(tokens, rate)}]}

    def request(self, tokens=1, rate=0, stream=False):
        """The bytes of one request; the clients number them."""
        body = json.dumps(self.body(tokens, rate, stream))
        head = {"Host": "127.0.0.1", "Content-Type": "application/json",
                "Content-Length": len(body)}
        head.update(self.headers)
        lines = ["POST %s HTTP/1.1" % self.path] + ["%s: %s" % h for h in head.items()]
        return ("\r\n".join(lines) + "\r\n\r\n" + body).encode("ascii")

    def cpu(self):
        return sum(child.cpu() for child in self.own)

    def memory(self):
        return sum(child.memory() for child in self.own)


def wish(tokens, rate):
    """A prompt that tells the fake LLM what to answer."""
    return "tokens=%d rate=%d ########" % (tokens, rate)


class Direct(Target):
    """The fake LLM, asked directly."""

    name = "LLM itself"

    @property
    def port(self):
        return self.bench.llm

    def end(self):
        pass


class Hello(Target):
    """A bare ThreadingHTTPServer: as much as that can do."""

    name, streams = "bare hello", False
    program = """
import http.server
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.wfile.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: 6\\r\\n\\r\\nhello~")
class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 1024
    def handle_error(self, *_):
        pass
server = Server(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""

    def start(self):
        self.port = int(self.spawn("hello", [sys.executable, "-c", self.program]).line())


class Nginx(Target):
    """nginx, as a proxy of the fake LLM."""

    name = "nginx"
    config = """
daemon off; pid {dir}/nginx.pid; error_log stderr crit; worker_processes auto;
events {{ worker_connections 8192; }}
http {{
  access_log off; keepalive_requests 1000000000;
  client_body_temp_path {dir}/a; proxy_temp_path {dir}/b; fastcgi_temp_path {dir}/c;
  uwsgi_temp_path {dir}/d; scgi_temp_path {dir}/e;
  upstream llm {{ server 127.0.0.1:{llm}; keepalive 256; keepalive_requests 1000000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{ proxy_pass http://llm; proxy_http_version 1.1; proxy_buffering off;
                  proxy_set_header Connection ""; }}
  }}
}}
"""

    @staticmethod
    def there():
        return nginx_program() is not None

    def start(self):
        self.port = free_port()
        file = os.path.join(self.bench.directory, "nginx.conf")
        with open(file, "w") as config:
            config.write(self.config.format(dir=self.bench.directory, llm=self.bench.llm,
                                            port=self.port))
        child = self.spawn("nginx", [nginx_program(), "-c", file, "-p",
                                     self.bench.directory, "-e", "stderr"])
        self.wait(child)


def nginx_program():
    return shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def peer(name, program):
    """The path of a program in a peer's virtual environment."""
    return os.path.join(CACHE, name, "bin", program)


class FastChat(Target):
    """FastChat's controller and API server; its worker is the fake LLM."""

    name = "FastChat"

    @staticmethod
    def there():
        return os.path.exists(peer("fastchat", "python"))

    def start(self):
        controller, self.port = free_port(), free_port()
        serve = [peer("fastchat", "python"), "-m"]
        child = self.spawn("controller", serve + ["fastchat.serve.controller",
                           "--host", "127.0.0.1", "--port", str(controller)])
        api = self.spawn("fastchat", serve + ["fastchat.serve.openai_api_server",
                         "--host", "127.0.0.1", "--port", str(self.port),
                         "--controller-address", "http://127.0.0.1:%d" % controller])
        self.wait(child, controller, "/test_connection")
        call(controller, "POST", "/register_worker", {
            "worker_name": "http://127.0.0.1:%d" % self.bench.llm,
            "check_heart_beat": False, "multimodal": False, "worker_status": {
                "model_names": ["m"], "speed": 1, "queue_length": 0}})
        self.wait(api)


class LiteLLM(Target):
    """LiteLLM's proxy."""

    name = "LiteLLM"
    headers = {"Authorization": "Bearer " + MASTER_KEY}

    @staticmethod
    def there():
        return os.path.exists(peer("litellm", "litellm"))

    def start(self):
        self.port = free_port()
        file = os.path.join(self.bench.directory, "litellm.json")    # JSON is YAML
        with open(file, "w") as config:
            json.dump({"model_list": [{"model_name": "m", "litellm_params": {
                "model": "openai/m", "api_key": "none",
                "api_base": "http://127.0.0.1:%d/v1" % self.bench.llm}}],
                "general_settings": {"master_key": MASTER_KEY}}, config)
        child = self.spawn("litellm", [peer("litellm", "litellm"), "--config", file,
                           "--host", "127.0.0.1", "--port", str(self.port),
                           "--telemetry", "False"],
                           env={"LITELLM_LOCAL_MODEL_COST_MAP": "True",
                                "NO_PROXY": "127.0.0.1"})
        self.wait(child)


class Native(Target):
    """The relay with its provider, asked natively."""

    name, path = "native", "/" + SERVICE
    tls, python = False, sys.executable
    limits = {"max-queue": 100000, "max-queue-per-caller": 100000,
              "max-connections": 20000, "max-services": 100000, "idle-seconds": 3600}

    def __init__(self, bench, file=None, title=None):
        super().__init__(bench)
        self.file = file or os.path.join(ROOT, "neuroengine_server.py")
        self.name = title or self.name
        self.data = None

    def another(self):
        return type(self)(self.bench, self.file, self.name)

    def start(self):
        self.start_relay()
        self.key = self.register(SERVICE)
        self.provide()

    def start_relay(self):
        self.data = self.data or os.path.join(
            self.bench.directory, "relay-%d.sqlite3" % len(self.bench.children))
        args = [self.python, self.file, "--host", "127.0.0.1", "--port", "0",
                "--data", self.data]
        args += ["--cert", self.bench.certificate()] if self.tls else ["--tls", "off"]
        for name, value in self.limits.items():
            args += ["--" + name, str(value)]
        child = self.spawn("relay", args)
        self.port = int(re.search(r":(\d+)\s*$", child.line()).group(1))
        if not self.tls:
            self.wait(child)

    def call(self, *args, **headers):
        return call(self.port, *args, tls=self.tls, **headers)

    def register(self, name):
        status, answer = self.call("POST", "/api/services", {"name": name})
        if status != 201:
            raise Broken("the relay did not register %s: %s" % (name, answer))
        return answer["key"]

    def provide(self):
        self.provider = self.spawn("provider", [
            sys.executable, os.path.join(HERE, "provider.py"), str(self.port), SERVICE,
            self.key] + ["tls"] * self.tls, own=False)
        self.provider.line()

    def body(self, tokens, rate, stream):
        body = {"message": wish(tokens, rate)}
        return dict(body, stream=True) if stream else body


class OpenAI(Native):
    """The same, through /v1/chat/completions."""

    name, path, model = "/v1", "/v1/chat/completions", SERVICE
    body = Target.body


##############################################################################
# The bench: all that is running, and what was measured
##############################################################################


class Bench:
    """Runs parts and keeps their figures."""

    def __init__(self, options, directory):
        self.options, self.directory = options, directory
        self.children = []
        self.values = {}          # row -> column -> [value of each round]
        self.curves = {}          # title -> [[how many, value]]
        self.round = 0
        self.load = build_load()
        self.llm = None
        self.targets = []

    def start(self):
        self.llm = int(Child(self, "llm", [self.load, "llm"]).line())

    def end(self):
        for child in reversed(self.children):
            child.end()

    def certificate(self):
        """A certificate of our own, with its key in the same file."""
        file = os.path.join(self.directory, "certificate.pem")
        if not os.path.exists(file):
            subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt",
                            "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
                            "-subj", "/CN=localhost", "-keyout", file, "-out",
                            file + ".cert"], check=True, stderr=subprocess.DEVNULL)
            with open(file + ".cert") as cert, open(file, "a") as both:
                both.write(cert.read())
        return file

    def note(self, row, column, value):
        values = self.values.setdefault(row, {}).setdefault(column, [])
        values += [None] * (self.round - len(values)) + [value]
        print("  %-40s %-12s %s" % (row, column, shown(row, value)), flush=True)

    def ask(self, target, request, clients, warm=0.3, most=5.0, rate=0, seconds=None):
        """Let clients ask; what they saw, with the target's cost in that time. Raises
        Broken if no token came."""
        seconds = seconds or self.options.seconds
        file = os.path.join(self.directory, "request")
        with open(file, "wb") as out:
            out.write(request)
        with open(file, "rb") as body, subprocess.Popen(
                [self.load, "ask", str(target.port), str(clients), str(warm), str(most),
                 str(seconds), str(rate)], stdin=body, stdout=subprocess.PIPE) as load:
            try:
                said = load.stdout.readline()
                if said == b"begun\n":
                    cpu, at = target.cpu(), time.monotonic()
                    said = load.stdout.readline()
                if said == b"over\n":
                    cpu, at = target.cpu() - cpu, time.monotonic() - at
                    memory = target.memory()
                    said = load.stdout.read()
                answer = json.loads(said or b'{"errors": 1, "error": "it ended"}')
            finally:
                load.kill()
        if answer["errors"]:
            print("  ! %s: %d errors: %s" % (target.name, answer["errors"],
                                             answer["error"][:200]))
        if not answer.get("tokens"):
            raise Broken("no token came")
        answer.update(cpu_used=cpu, memory=memory, cores=cpu / at)
        return answer

    def curve(self, title, points):
        """Keep, of each point, the best of all runs."""
        old = dict(self.curves.get(title, ()))
        self.curves[title] = [[n, min(value, old.get(n, value))] for n, value in points]
        print("  %-40s %s" % (title, ", ".join("{:,}: {}".format(n, shown("", value))
                                               for n, value in points)), flush=True)

    @contextlib.contextmanager
    def fresh(self, target):
        """The target, without what an earlier row left in it: the relay is so quickly
        started that it is started anew; its peers have a second to get over it."""
        if isinstance(target, Native):
            again = target.another()
            try:
                again.start()
                yield again
            finally:
                again.end()
        else:
            yield target
            time.sleep(1)

    @contextlib.contextmanager
    def relay(self, **attributes):
        """The first relay, started for one row."""
        relay = self.targets[0].another()
        for name, value in attributes.items():
            setattr(relay, name, value)
        try:
            yield relay
        finally:
            relay.end()

    def each(self, work, streams=False):
        """Do it with every target, beginning with another one each round."""
        first = self.round % len(self.targets)
        for target in self.targets[first:] + self.targets[:first]:
            if target.port and (target.streams or not streams):
                attempt(target.name, work, target)


def build_load():
    """Compile load.c, unless that is done."""
    os.makedirs(CACHE, exist_ok=True)
    program, source = os.path.join(CACHE, "load"), os.path.join(HERE, "load.c")
    if not os.path.exists(program) or os.path.getmtime(program) < os.path.getmtime(source):
        subprocess.run([os.environ.get("CC", "cc"), "-O2", "-o", program, source],
                       check=True)
    return program


##############################################################################
# Parts: what can be chosen with --only
##############################################################################


def part_start(bench):
    """From the start of the program to its first answer, and what it holds then."""
    def work(target):
        if target.first_answer:
            bench.note("start to first answer", target.name, target.first_answer)
            target.first_answer = None
            bench.note("memory, idle", target.name, target.memory())

    bench.each(work)


def part_requests(bench):
    """Requests a second with 1, 16 and 64 clients, and their times."""
    def work(target):
        cpu = getattr(target, "provider", target).cpu()
        got = bench.ask(target, target.request(), clients)
        many = counted(clients, "client")
        bench.note("requests/s, " + many, target.name, got["answers"] / got["seconds"])
        if clients == 1:
            bench.note("p50, 1 client", target.name, got["latency"]["p50"])
        if clients == 64:
            bench.note("p99, 64 clients", target.name, got["latency"]["p99"])
        if target.own:
            bench.note("CPU a request, " + many, target.name,
                       got["cpu_used"] / got["answers"])
        if clients == 1 and hasattr(target, "provider"):
            bench.note("CPU a request, 1 client, of the provider", target.name,
                       (target.provider.cpu() - cpu) / got["asked"])

    for clients in 1, 16, 64:
        bench.each(work)


def part_first(bench):
    """What is added to the time to the first token: streams of 8 tokens, 1,000 a second,
    one after the other, against the LLM asked directly."""
    def work(target):
        got = bench.ask(target, target.request(8, 1000, True), clients)
        bench.note("first token, added, " + counted(clients, "client"), target.name,
                   got["first"]["p50"] - base)

    direct = Direct(bench)
    for clients in 1, 16:
        base = bench.ask(direct, direct.request(8, 1000, True), clients)["first"]["p50"]
        bench.each(work, streams=True)


def part_tokens(bench):
    """Tokens a second over 256 streams, 2,000 a second offered to each."""
    def work(target):
        with bench.fresh(target) as fresh:
            got = bench.ask(fresh, fresh.request(1000, 2000, True), 256, 0.5,
                            bench.options.patience)
        bench.note("tokens/s, 256 streams", target.name, got["tokens"] / got["seconds"])
        if target.own:
            bench.note("CPU a token, 256 streams", target.name,
                       got["cpu_used"] / got["tokens"])

    bench.each(work, streams=True)


def part_pace(bench):
    """Streams of 50 tokens a second: which keep their pace, and their worst gaps."""
    def work(target):
        if streams > 256 and isinstance(target, (FastChat, LiteLLM)):
            return                          # they do not keep up with 256
        with bench.fresh(target) as fresh:
            got = bench.ask(fresh, fresh.request(100000, 50, True), streams, 1,
                            bench.options.patience, rate=50,
                            seconds=max(1, bench.options.seconds))
        tail = ", %d streams of 50 tokens/s" % streams
        bench.note("share that keep their pace" + tail, target.name, got["kept"])
        bench.note("worst gap p99" + tail, target.name, got["gap"]["p99"])
        bench.note("cores" + tail, target.name, got["cores"])
        if streams == 256:
            bench.note("memory, 256 streams", target.name, got["memory"])
            bench.note("all started after" + tail, target.name,
                       got["all_started"] if got["all_started"] > 0 else None)

    for streams in 256, 1000:
        bench.each(work, streams=True)


def counted(number, what):
    return "%d %s%s" % (number, what, "s" * (number != 1))


def part_waiting(bench):
    """Memory of a further connection whose prompt waits, plain and TLS."""
    count = 100 if bench.options.quick else 1000
    for tls in False, True:
        with bench.relay(tls=tls) as relay:
            relay.start_relay()
            relay.register("Nobody")
            before, sockets = relay.memory(), []
            body = json.dumps({"message": "Hello", "wait": True, "id": "########"})
            request = "POST /Nobody HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s"
            context = trusting()
            try:
                for number in range(count):
                    sock = socket.create_connection(("127.0.0.1", relay.port))
                    sockets.append(context.wrap_socket(sock) if tls else sock)
                    sockets[-1].sendall((request % (len(body), body.replace(
                        "########", "%08d" % number))).encode())
                deadline = time.monotonic() + 20
                while relay.call("GET", "/api/models")[1][0]["queuelen"] < count \
                        and time.monotonic() < deadline:
                    time.sleep(0.1)
                bench.note("memory, a further waiting connection%s" % (
                    " with TLS" if tls else ""), "native",
                    (relay.memory() - before) / count)
            finally:
                for sock in sockets:
                    sock.close()


def part_tls(bench):
    """Kept-alive requests a second of 16 clients, plain and TLS, by wrk."""
    if not shutil.which("wrk"):
        return print("  wrk is not installed: nothing is said of TLS")
    rates = {}
    for tls in False, True:
        with bench.relay(tls=tls) as relay:
            relay.start()
            rates[tls] = wrk(bench, relay, 16)
            bench.note("requests/s, 16 clients of wrk%s" % (", TLS" if tls else ""),
                       "native", rates[tls])
    bench.note("TLS, share of plain requests/s", "native", rates[True] / rates[False])


def wrk(bench, target, clients):
    """Requests a second, as wrk counts them."""
    script = os.path.join(bench.directory, "post.lua")
    body = json.dumps(target.body(1, 0, False))
    with open(script, "w") as file:
        file.write("wrk.method = 'POST'\nwrk.body = [[%s]]\n"
                   "wrk.headers['Content-Type'] = 'application/json'\n" % body)
    url = "http%s://127.0.0.1:%d%s" % ("s" * getattr(target, "tls", False), target.port,
                                       target.path)
    said = subprocess.run(
        ["wrk", "-t1", "-c%d" % clients, "-d%ds" % max(1, round(bench.options.seconds)),
         "-s", script, url], stdout=subprocess.PIPE, universal_newlines=True).stdout
    if "Non-2xx" in said:
        print("  ! %s: not all answers were 200" % target.name)
    return float(re.search(r"Requests/sec: *([\d.]+)", said).group(1))


def part_check(bench):
    """Our clients against wrk, of the fastest target: they must not be what limits."""
    def work(target):
        got = bench.ask(target, target.request(), 16)
        bench.note("requests/s, 16 clients, ours", target.name,
                   got["answers"] / got["seconds"])
        bench.note("requests/s, 16 clients, wrk", target.name, wrk(bench, target, 16))

    if shutil.which("wrk"):
        bench.each(work)


def part_import(bench):
    """`import neuroengine`, beside the bare interpreter."""
    best = {}
    env = dict(os.environ, PYTHONPYCACHEPREFIX=bench.directory, PYTHONPATH=ROOT)
    for code in ["pass", "import neuroengine"] * (4 if bench.options.quick else 10):
        begun = time.monotonic()
        subprocess.run([sys.executable, "-c", code], env=env, check=True)
        best[code] = min(best.get(code, 9), time.monotonic() - begun)
    bench.note("import neuroengine", "native", best["import neuroengine"] - best["pass"])


def part_pythons(bench):
    """The relay on every Python that pyenv has, with 16 clients."""
    found = pythons()
    if not found:
        print("  pyenv has no Pythons")
    for version, program in found:
        with bench.relay(python=program) as relay:
            relay.start()
            got = bench.ask(relay, relay.request(), 16)
            bench.note("requests/s, 16 clients, Python %s" % version, "native",
                       got["answers"] / got["seconds"])
            bench.note("CPU a request, Python %s" % version, "native",
                       got["cpu_used"] / got["answers"])


def pythons():
    """(minor version, program) of the newest of each from 3.8 on."""
    root = os.path.join(os.environ.get("PYENV_ROOT") or os.path.expanduser("~/.pyenv"),
                        "versions")
    found = {}
    for name in os.listdir(root) if os.path.isdir(root) else ():
        version = re.match(r"3\.(\d+)\.(\d+)$", name)
        if version and int(version.group(1)) >= 8:
            minor, micro = map(int, version.groups())
            found[minor] = max(found.get(minor, (0, "")),
                               (micro, os.path.join(root, name, "bin", "python")))
    return [("3.%d" % minor, found[minor][1]) for minor in sorted(found)]


LISTEN = """
import sys
sys.path.insert(0, %r)
from neuroengine import NeuroengineServer
server = NeuroengineServer("http://127.0.0.1:%d")
assert server.login(%r, %r) >= 0, server.error
print("ready", flush=True)
server.listen(lambda request: "word~ ", workers=64)
"""


def part_listen(bench):
    """neuroengine.py's own provider: NeuroengineServer.listen with 64 workers."""
    with bench.relay() as relay:
        relay.start_relay()
        key = relay.register(SERVICE)
        child = relay.spawn("listen", [sys.executable, "-c", LISTEN % (
            ROOT, relay.port, SERVICE, key)], own=False)
        child.line()
        for clients in 1, 64:
            cpu = child.cpu()
            got = bench.ask(relay, relay.request(), clients)
            tail = "listen, " + counted(clients, "client")
            bench.note("requests/s, " + tail, "native", got["answers"] / got["seconds"])
            bench.note("p50, " + tail, "native", got["latency"]["p50"])
            bench.note("CPU a request, " + tail, "native",
                       (child.cpu() - cpu) / got["asked"])


def part_share(bench):
    """`neuroengine.py share`, in front of the LLM that takes no time."""
    with bench.relay() as lean:
        lean.start()
        first = bench.ask(lean, lean.request(8, 1000, True), 1)["first"]["p50"]
    with bench.relay() as relay:
        relay.start_relay()
        child = relay.spawn("share", [
            sys.executable, os.path.join(ROOT, "neuroengine.py"), "share", SERVICE,
            "--upstream", "http://127.0.0.1:%d" % bench.llm, "--workers", "64",
            "--max-tokens", "1000000", "--relay", "http://127.0.0.1:%d" % relay.port],
            own=False, env={"NEUROENGINE_HOME": os.path.join(
                bench.directory, "home-%d" % len(bench.children))})
        deadline = time.monotonic() + 20
        while not call(relay.port, "GET", "/v1/models")[1]["data"]:
            if time.monotonic() > deadline:
                raise Broken("share does not log in:\n" + child.words())
            time.sleep(0.02)
        direct = Direct(bench)
        base = bench.ask(direct, direct.request(8, 1000, True), 1)["first"]["p50"]
        got = bench.ask(relay, relay.request(8, 1000, True), 1)
        bench.note("first token, added by share and relay", "native",
                   got["first"]["p50"] - base)
        bench.note("first token, added by share", "native", got["first"]["p50"] - first)
        # 64 streams of 320 tokens a second are 20,480; then as fast as they come.
        for title, rate in ("share, 20,480 offered", 320), ("share, all it can", 2000):
            got = bench.ask(relay, relay.request(1000, rate, True), 64, 0.5, 5)
            bench.note("tokens/s, 64 streams, " + title, "native",
                       got["tokens"] / got["seconds"])
            bench.note("worst gap p99, 64 streams, " + title, "native", got["gap"]["p99"])


def part_curves(bench):
    """What a job costs against the number of everything else."""
    args = [sys.executable, os.path.join(HERE, "curves.py"), bench.targets[0].file]
    said = subprocess.run(args + ["--quick"] * bench.options.quick, stdout=subprocess.PIPE,
                          check=True, timeout=300).stdout
    for title, points in json.loads(said).items():
        bench.curve(title, [[n, value * 1e-6] for n, value in points])
    sizes = (1, 100) if bench.options.quick else (1, 100, 1000, 10000)
    bench.curve("request over sockets, by services",
                [[n, socket_cost(bench, services=n)] for n in sizes])
    sizes = (1, 100) if bench.options.quick else (1, 100, 1000, 5000)
    bench.curve("request over sockets, by parked polls",
                [[n, socket_cost(bench, polls=n)] for n in sizes])


def socket_cost(bench, services=1, polls=0):
    """The relay's CPU seconds a request, among so many services and parked polls."""
    with bench.relay() as relay, contextlib.ExitStack() as stack:
        relay.limits = dict(relay.limits, **{"max-sessions": 10**6, "poll-seconds": 600})
        relay.start_relay()
        relay.key, parked = relay.register(SERVICE), relay.register("Parked")
        if services > 1:
            relay.end()                      # and put the rest into its file
            with contextlib.closing(sqlite3.connect(relay.data)) as base, base:
                row = base.execute("SELECT * FROM services WHERE name='Parked'").fetchone()
                at = row.index("Parked")
                base.executemany(
                    "INSERT INTO services VALUES (%s)" % ",".join("?" * len(row)),
                    (row[:at] + ("S%d" % n,) + row[at + 1:] for n in range(services - 1)))
            relay.start_relay()
        for _ in range(polls):
            connection = stack.enter_context(contextlib.closing(
                http.client.HTTPConnection("127.0.0.1", relay.port, timeout=30)))
            headers = {"Authorization": "Bearer " + parked}
            connection.request("POST", "/provider/Parked/login", "{}", headers)
            session = json.loads(connection.getresponse().read())["session"]
            connection.request("POST", "/provider/Parked/poll",
                               json.dumps({"session": session}), headers)
        relay.provide()
        got = bench.ask(relay, relay.request(), 16)
        return got["cpu_used"] / got["answers"]


# Those of each round, then those of once a run.
ROUND = {"start": part_start, "requests": part_requests, "first": part_first,
         "tokens": part_tokens, "pace": part_pace}
ONCE = {"waiting": part_waiting, "tls": part_tls, "check": part_check,
        "import": part_import, "pythons": part_pythons, "listen": part_listen,
        "share": part_share, "curves": part_curves}


##############################################################################
# What is printed
##############################################################################


def shown(row, value):
    """A figure with its unit, as the name of its row tells."""
    if value is None:
        return "-"
    if row.startswith(("requests/s", "tokens/s")):
        return "{:,.0f}".format(value)
    if row.startswith(("share", "TLS, share")):
        return "%.0f %%" % (100 * value)
    if row.startswith("memory, a"):
        return "%.0f KB" % (value / 1e3)
    if row.startswith("memory"):
        return "%.1f MB" % (value / 1e6)
    if row.startswith("cores"):
        return "%.2f" % value
    for unit, factor, below in ("\u00b5s", 1e6, 1e-3), ("ms", 1e3, 1), ("s", 1, 1e9):
        if abs(value) < below:
            return "%.3g %s" % (value * factor, unit)


def spread(values, show):
    """The median of some values, with the least and the greatest."""
    values = [value for value in values if value is not None]
    if not values:
        return "-"
    if len(values) == 1:
        return show(values[0])
    return "%s (%s-%s)" % tuple(map(show, (statistics.median(values), min(values),
                                           max(values))))


def table(bench):
    """All rows, in Markdown."""
    columns = [target.name for target in bench.targets]
    lines = ["| median (least-most) | " + " | ".join(columns) + " |",
             "|---|" + "---|" * len(columns)]
    for row, values in bench.values.items():
        show = functools.partial(shown, row)
        lines.append("| %s | %s |" % (row, " | ".join(
            spread(values[c], show) if c in values else "" for c in columns)))
    return "\n".join(lines)


def ratios(bench):
    """How many times the relay's figure is another's, each within one round."""
    others = [t.name for t in bench.targets if not isinstance(t, Native)]
    ours = [t.name for t in bench.targets if isinstance(t, Native)]
    if len(ours) > 2:                        # several relays: against the first
        others += ours[:2]
    lines = ["| times the other's, within a round | " + " | ".join(
        "%s / %s" % (a, b) for b in others for a in ours if a != b) + " |"]
    lines.append("|---|" + "---|" * (lines[0].count("|") - 2))
    for row, values in bench.values.items():
        cells = []
        for b in others:
            for a in ours:
                if a != b:
                    pairs = [x / y for x, y in zip(values.get(a, ()), values.get(b, ()))
                             if x is not None and y]
                    cells.append(spread(pairs, "{:.3g}".format) if pairs else "")
        if any(cells):
            lines.append("| %s | %s |" % (row, " | ".join(cells)))
    return "\n".join(lines)


def curve_table(bench):
    """The curves, in Markdown."""
    counts = sorted({n for points in bench.curves.values() for n, _ in points})
    lines = ["| cost, by how many | " + " | ".join("{:,}".format(n) for n in counts) + " |",
             "|---|" + "---|" * len(counts)]
    for title, points in bench.curves.items():
        points = dict(points)
        lines.append("| %s | %s |" % (title, " | ".join(
            shown("", points[n]) if n in points else "" for n in counts)))
    return "\n".join(lines)


def about(options):
    """Where and how the figures were measured."""
    with open("/proc/cpuinfo") as file:
        model = re.search(r"model name\s*: (.*)", file.read())
    return {"date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
            "command": "python bench/compare.py " + " ".join(options.argv),
            "python": platform.python_version(), "cores": os.cpu_count(),
            "processor": model.group(1) if model else platform.machine(),
            "rounds": options.runs * options.rounds, "seconds": options.seconds}


def install():
    """Put FastChat and LiteLLM into virtual environments of the cache directory."""
    for name, packages in PEERS.items():
        directory = os.path.join(CACHE, name)
        if not os.path.exists(peer(name, "python")):
            print("installing %s into %s" % (name, directory), flush=True)
            subprocess.run([sys.executable, "-m", "venv", directory], check=True)
            subprocess.run([peer(name, "python"), "-m", "pip", "install", "-q",
                            "--disable-pip-version-check"] + packages, check=True)
    if not nginx_program():
        print("nginx is not there: apt install nginx-light")


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog="Parts: " + "; ".join(
            "%s: %s" % (name, " ".join(part.__doc__.split())) for name, part in
            list(ROUND.items()) + list(ONCE.items())))
    add = parser.add_argument
    add("--install", action="store_true", help="first install the peers that can be")
    add("--only", metavar="PARTS", help="parts to run, with commas; otherwise all")
    add("--peers", default="hello,nginx,fastchat,litellm", metavar="NAMES",
        help="what to compare with (%(default)s); llm is the fake LLM itself")
    add("--runs", type=int, default=2, help="how often all is done (%(default)s)")
    add("--rounds", type=int, default=3, help="rounds of a run (%(default)s)")
    add("--seconds", type=float, default=1.5, help="of each cell (%(default)s)")
    add("--patience", type=float, default=15, metavar="SECONDS",
        help="for all streams of a cell to start (%(default)s)")
    add("--quick", action="store_true", help="one round, half a second a cell")
    add("--relay", metavar="FILE", action="append",
        help="the relay; repeat it to compare several in the same rounds")
    add("--json", metavar="FILE", help="write all figures there")
    add("--charts", metavar="DIR", help="draw charts there, as SVG")
    return parser


def attempt(what, work, *args, otherwise=lambda: None):
    """Do a piece of work; if it cannot be done, say so and go on."""
    try:
        work(*args)
    except (Broken, OSError, subprocess.SubprocessError, http.client.HTTPException) as error:
        print("  ! %s: %s" % (what, error), flush=True)
        otherwise()


def measure(bench, parts):
    """All rounds of all runs."""
    for run in range(bench.options.runs):
        for target in bench.targets:
            attempt(target.name, target.start, otherwise=target.end)
        for number in range(bench.options.rounds):
            print("run %d, round %d, %s, load %.1f" % (
                run + 1, number + 1, time.strftime("%H:%M:%S"), os.getloadavg()[0]),
                flush=True)
            for name, part in ROUND.items():
                if name in parts:
                    attempt(name, part, bench)
            bench.round += 1
        bench.round -= 1                    # what is done once belongs to the last round
        for name, part in ONCE.items():
            if name in parts:
                attempt(name, part, bench)
        bench.round += 1
        for target in bench.targets:
            target.end()


def main(argv=None):
    options = build_parser().parse_args(argv)
    options.argv = sys.argv[1:] if argv is None else argv
    if options.quick:
        options.runs, options.rounds, options.seconds, options.patience = 1, 1, 0.5, 4
    parts = options.only.split(",") if options.only else list(ROUND) + list(ONCE)
    if set(parts) - set(ROUND) - set(ONCE):
        sys.exit("there are these parts: " + ", ".join(list(ROUND) + list(ONCE)))
    if options.install:
        install()
    # Thousands of connections; and a signal ends what we started, too.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="neuroengine-bench-") as directory:
        bench = Bench(options, directory)
        for number, file in enumerate(options.relay or [None], 1):
            tail = " (%d)" % number if number > 1 else ""
            file = file and os.path.abspath(file)
            bench.targets += [Native(bench, file, "native" + tail),
                              OpenAI(bench, file, "/v1" + tail)]
        known = {"hello": Hello, "nginx": Nginx, "fastchat": FastChat,
                 "litellm": LiteLLM, "llm": Direct}
        for name in filter(None, options.peers.split(",")):
            if getattr(known[name], "there", lambda: True)():
                bench.targets.append(known[name](bench))
            else:
                print("%s is not installed" % name)
        try:
            bench.start()
            measure(bench, parts)
        except KeyboardInterrupt:
            print("stopped")
        finally:
            bench.end()
    facts = about(options)
    print("\n".join("%s: %s" % fact for fact in facts.items()))
    for text in table(bench), ratios(bench), curve_table(bench):
        print("\n" + text)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(dict(facts, values=bench.values, curves=bench.curves), file, indent=1)
    if options.charts:
        charts.draw(options.charts, facts, bench.values, bench.curves)
    return 0


if __name__ == "__main__":
    sys.exit(main())
