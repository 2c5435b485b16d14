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
import http.client
import json
import os
import platform
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time

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
        self.title = title
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                args, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log,
                start_new_session=True, cwd=cwd or bench.directory,
                env=dict(os.environ, **env or {}))
        bench.children.append(self)

    def line(self, seconds=START_SECONDS):
        """The next line that it prints."""
        import select
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
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def call(port, method, path, body=None, **headers):
    """One request; the status and the body, which may be JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, None if body is None else json.dumps(body),
                           dict({"Content-Type": "application/json"}, **headers))
        response = connection.getresponse()
        return response.status, json.loads(response.read() or b"null")
    finally:
        connection.close()


def wait_for(child, port, path, **headers):
    """Wait until a GET of that path is answered with 200."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            if call(port, "GET", path, **headers)[0] == 200:
                return
        if child.process.poll() is not None:
            raise Broken("%s has ended:\n%s" % (child.title, child.words()))
        time.sleep(0.002)
    raise Broken("%s does not answer:\n%s" % (child.title, child.words()))


##############################################################################
# What is compared
##############################################################################


class Target:
    """Something that clients can ask. `own` are the programs whose cost is counted."""

    path, model, headers = "/v1/chat/completions", "m", {}
    streams = True            # whether it can stream

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
        self.children, self.own = [], []

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

    def start(self):
        self.port = self.bench.llm


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
        wait_for(child, self.port, "/v1/models")


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
        wait_for(child, controller, "/test_connection")
        call(controller, "POST", "/register_worker", {
            "worker_name": "http://127.0.0.1:%d" % self.bench.llm,
            "check_heart_beat": False, "multimodal": False, "worker_status": {
                "model_names": ["m"], "speed": 1, "queue_length": 0}})
        wait_for(api, self.port, "/v1/models")


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
        wait_for(child, self.port, "/v1/models", **self.headers)


class Native(Target):
    """The relay with its provider, asked natively."""

    name, path = "native", "/" + SERVICE
    tls, python = False, sys.executable
    limits = {"max-queue": 100000, "max-queue-per-caller": 100000,
              "max-connections": 20000, "max-services": 100000}

    def __init__(self, bench, file=None, title=None):
        super().__init__(bench)
        self.file = file or os.path.join(ROOT, "neuroengine_server.py")
        self.name = title or self.name

    def start(self, provider=True):
        self.start_relay()
        self.key = self.register(SERVICE)
        if provider:
            self.provide()

    def start_relay(self, **limits):
        data = os.path.join(self.bench.directory, "relay-%d.sqlite3"
                            % len(self.bench.children))
        args = [self.python, self.file, "--host", "127.0.0.1", "--port", "0",
                "--data", data, "--tls", "off"]
        for name, value in dict(self.limits, **limits).items():
            args += ["--" + name, str(value)]
        self.relay = self.spawn("relay", args)
        self.port = int(re.search(r":(\d+)\s*$", self.relay.line()).group(1))

    def register(self, name):
        status, answer = call(self.port, "POST", "/api/services", {"name": name})
        if status != 201:
            raise Broken("the relay did not register %s: %s" % (name, answer))
        return answer["key"]

    def provide(self):
        self.provider = self.spawn("provider", [
            sys.executable, os.path.join(HERE, "provider.py"), str(self.port), SERVICE,
            self.key], own=False)
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
        self.values = {}          # row -> column -> value of each round
        self.load = build_load()
        self.llm = None
        self.targets = []

    def start(self):
        self.llm = int(Child(self, "llm", [self.load, "llm"]).line())

    def end(self):
        for child in reversed(self.children):
            child.end()

    def note(self, row, column, value):
        self.values.setdefault(row, {}).setdefault(column, []).append(value)
        print("  %-34s %-12s %s" % (row, column, shown(row, value)), flush=True)

    def ask(self, target, request, clients, warm=0.3, most=5.0, rate=0, seconds=None):
        """Let clients ask; what they saw, with the target's cost in that time."""
        seconds = seconds or self.options.seconds
        file = os.path.join(self.directory, "request")
        with open(file, "wb") as out:
            out.write(request)
        with open(file, "rb") as body, subprocess.Popen(
                [self.load, "ask", str(target.port), str(clients), str(warm), str(most),
                 str(seconds), str(rate)], stdin=body, stdout=subprocess.PIPE) as load:
            try:
                if load.stdout.readline():                # begun
                    cpu, at = target.cpu(), time.monotonic()
                    if load.stdout.readline() == b"over\n":
                        cpu, at = target.cpu() - cpu, time.monotonic() - at
                        memory = target.memory()
                        answer = json.loads(load.stdout.read())
                        answer.update(cpu_used=cpu, memory=memory, cores=cpu / at)
                        if answer["errors"]:
                            print("  ! %s: %d errors: %s" % (
                                target.name, answer["errors"], answer["error"]))
                        return answer
                raise Broken("%s cannot be asked: %s" % (
                    target.name, load.stdout.read().decode("utf-8", "replace")))
            finally:
                load.kill()

    @contextlib.contextmanager
    def fresh(self, target):
        """The target, without what an earlier row left in it: the relay is so quickly
        started that it is started anew; its peers have a second to get over it."""
        if isinstance(target, Native):
            again = type(target)(self, target.file, target.name)
            try:
                again.start()
                yield again
            finally:
                again.end()
        else:
            yield target
            time.sleep(1)

    def each(self, streams=False):
        """The targets, in an order that changes from round to round."""
        return [t for t in self.targets if t.streams or not streams]


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


def part_requests(bench):
    """Requests a second with 1, 16 and 64 clients, and their times."""
    for clients in 1, 16, 64:
        for target in bench.each():
            got = bench.ask(target, target.request(), clients)
            if not got["answers"]:
                continue
            bench.note("requests/s, %d clients" % clients, target.name,
                       got["answers"] / got["seconds"])
            if clients == 1:
                bench.note("p50, 1 client", target.name, got["latency"]["p50"])
            if clients == 64:
                bench.note("p99, 64 clients", target.name, got["latency"]["p99"])
            if target.own:
                bench.note("CPU a request, %d clients" % clients, target.name,
                           got["cpu_used"] / got["answers"])


def part_tokens(bench):
    """Tokens a second over 256 streams, 2,000 a second offered to each."""
    for target in bench.each(streams=True):
        with bench.fresh(target) as fresh:
            got = bench.ask(fresh, fresh.request(1000, 2000, True), 256, 0.5, 20)
            bench.note("tokens/s, 256 streams", target.name,
                       got["tokens"] / got["seconds"])
            if fresh.own and got["tokens"]:
                bench.note("CPU a token, 256 streams", target.name,
                           got["cpu_used"] / got["tokens"])


PARTS = {"requests": part_requests, "tokens": part_tokens}


##############################################################################
# What is printed
##############################################################################


def shown(row, value):
    """A figure with its unit, as the name of its row tells."""
    if value is None:
        return "-"
    if "/s" in row:
        return "{:,.0f}".format(value)
    if row.startswith("CPU a"):
        return "%.2f us" % (value * 1e6)
    if row.startswith(("p50", "p99", "first")):
        return "%.3g ms" % (value * 1e3)
    return "%.3g" % value


def print_table(bench):
    columns = [target.name for target in bench.targets]
    print("\n| median (least - most) | " + " | ".join(columns) + " |")
    print("|---|" + "---|" * len(columns))
    for row, values in bench.values.items():
        cells = []
        for column in columns:
            got = values.get(column)
            cells.append("" if not got else shown(row, got[0]) if len(got) == 1 else
                         "%s (%s - %s)" % (shown(row, statistics.median(got)),
                                           shown(row, min(got)), shown(row, max(got))))
        print("| %s | %s |" % (row, " | ".join(cells)))


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--only", default=",".join(PARTS), metavar="PARTS", help="parts to run")
    add("--peers", default="hello,nginx,fastchat,litellm", help="what to compare with")
    add("--rounds", type=int, default=6, help="how often each row is measured")
    add("--seconds", type=float, default=2.0, help="how long each cell is measured")
    add("--quick", action="store_true", help="one round of half a second a cell")
    add("--relay", metavar="FILE", action="append",
        help="the relay; repeat it to compare several in the same rounds")
    add("--json", metavar="FILE", help="write all figures there")
    return parser


def main(argv=None):
    options = build_parser().parse_args(argv)
    if options.quick:
        options.rounds, options.seconds = 1, 0.5
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="neuroengine-bench-") as directory:
        bench = Bench(options, directory)
        try:
            bench.start()
            files = options.relay or [None]
            for number, file in enumerate(files):
                tail = " (%d)" % (number + 1) if len(files) > 1 else ""
                file = file and os.path.abspath(file)
                bench.targets += [Native(bench, file, "native" + tail),
                                  OpenAI(bench, file, "/v1" + tail)]
            known = {"hello": Hello, "nginx": Nginx, "fastchat": FastChat,
                     "litellm": LiteLLM, "direct": Direct}
            for name in options.peers.split(","):
                if name and getattr(known[name], "there", lambda: True)():
                    bench.targets.append(known[name](bench))
            for number in range(options.rounds):
                print("round %d, load %.2f" % (number + 1, os.getloadavg()[0]))
                for target in bench.targets:
                    target.start()
                for name in options.only.split(","):
                    PARTS[name](bench)
                for target in bench.targets:
                    target.end()
        except KeyboardInterrupt:
            print("stopped")
        finally:
            bench.end()
        print_table(bench)
        if options.json:
            with open(options.json, "w") as file:
                json.dump({"python": platform.python_version(), "values": bench.values},
                          file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
