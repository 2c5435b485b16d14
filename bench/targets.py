"""What bench/compare.py compares, and how it is started, watched and ended."""

import contextlib
import http.client
import json
import os
import random
import re
import select
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
CACHE = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"),
                     "neuroengine-bench")
PEERS = {"fastchat": ["fschat==0.2.36", "pydantic<2"],    # newer pydantic: no streams
         "litellm": ["litellm[proxy]==1.106.*"]}
SERVICE, MASTER_KEY = "Bench", "sk-bench"
START_SECONDS = 60        # for any of the programs to be ready
REST_SECONDS = 5          # for one to get over clients that have gone
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
        poller = select.poll()               # select() knows no more than 1,024 files
        poller.register(self.process.stdout, select.POLLIN)
        if not poller.poll(1000 * seconds):
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
    lingers = False           # whether it goes on working when its clients have gone
    port = None               # where it listens; None while it does not
    first_answer = None       # seconds from its start to that
    first_cpu = None          # and of processor time

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

    def rest(self):
        """Called when clients have gone. Some go on for long with what those left: they
        are started anew."""
        deadline = time.monotonic() + REST_SECONDS
        while self.lingers:
            used = self.cpu()
            time.sleep(0.3)
            if self.cpu() - used < 0.03:
                break
            if time.monotonic() > deadline:
                self.end()
                self.start()
                self.first_answer = None      # it tells nothing new
                break

    def wait(self, child, port=None, path="/v1/models"):
        """Wait until a GET is answered with 200, and note how long that took."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
                if call(port or self.port, "GET", path, **self.headers)[0] == 200:
                    self.first_answer = time.monotonic() - self.children[0].begun
                    self.first_cpu = self.cpu()
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

    name, lingers = "FastChat", True

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

    name, lingers = "LiteLLM", True
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
    as_script = False         # else as deploy/ does it: Python keeps it compiled
    limits = {"max-queue": 100000, "max-queue-per-caller": 100000,
              "max-connections": 20000, "max-polls": 9000, "max-waiting": 9000,
              "max-services": 100000, "idle-seconds": 3600}

    def __init__(self, bench, file=None, title=None):
        super().__init__(bench)
        self.file = file or os.path.join(ROOT, "neuroengine_server.py")
        self.name = title or self.name
        self.data = None

    def another(self):
        return type(self)(self.bench, self.file, self.name)

    def start(self):
        self.data = None                   # a file of its own for each run
        self.start_relay()
        self.key = self.register(SERVICE)
        self.provide()

    def start_relay(self):
        self.data = self.data or os.path.join(
            self.bench.directory, "relay-%d.sqlite3" % len(self.bench.children))
        folder, file = os.path.split(os.path.abspath(self.file))
        if self.as_script:
            args = [self.python, file]
        else:
            subprocess.run([self.python, "-m", "py_compile", file], cwd=folder, check=True)
            args = [self.python, "-m", os.path.splitext(file)[0]]
        args += ["--host", "127.0.0.1", "--port", "0", "--data", self.data]
        args += ["--cert", self.bench.certificate()] if self.tls else ["--tls", "off"]
        for name, value in self.limits.items():
            args += ["--" + name, str(value)]
        child = self.spawn("relay", args, cwd=folder)
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
# What must be there first
##############################################################################


def build_load():
    """Compile load.c, unless that is done."""
    os.makedirs(CACHE, exist_ok=True)
    program, source = os.path.join(CACHE, "load"), os.path.join(HERE, "load.c")
    if not os.path.exists(program) or os.path.getmtime(program) < os.path.getmtime(source):
        subprocess.run([os.environ.get("CC", "cc"), "-O2", "-o", program, source],
                       check=True)
    return program


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
