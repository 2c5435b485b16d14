"""What compare.py compares, and how it is started, watched and ended."""

import contextlib
import http.client
import json
import os
import shutil
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, ".."))

import harness
from harness import ROOT, SERVICE, Broken, ask, free_port

CACHE = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"),
                     "neuroengine-bench")
PEERS = {"fastchat": ["fschat==0.2.36", "pydantic<2"],    # newer pydantic: no streams
         "litellm": ["litellm[proxy]==1.106.*"]}
MASTER_KEY = "sk-bench"
START_SECONDS = 60        # for any of the programs to be ready
REST_SECONDS = 5          # for one to finish the work of clients that have gone

##############################################################################
# What is compared
##############################################################################


class Target:
    """Something that clients can ask. `own` are the programs whose cost and memory count
    as its own; `far` those at the LLM's end, whose cost is counted separately."""

    path, model, headers = "/v1/chat/completions", "m", {}
    streams = True            # whether it can stream
    lingers = False           # whether it keeps working after its clients have gone
    port = None               # where it listens; None while it does not
    first_answer = None       # seconds from its start to that
    first_cpu = None          # and of processor time

    def __init__(self, bench):
        self.bench, self.children, self.own, self.far = bench, [], [], []

    @property
    def url(self):
        return "http://127.0.0.1:%d" % self.port

    def spawn(self, title, *args, far=False, **how):
        """Start a child."""
        child = self.bench.spawn(title, *args, **how)
        self.children.append(child)
        (self.far if far else self.own).append(child)
        return child

    def start(self):
        """Start it, and return when it can be asked."""

    def end(self):
        for child in reversed(self.children):
            child.end(seconds=2)
        self.children, self.own, self.far, self.port = [], [], [], None

    def rest(self):
        """Called when clients have gone. A target that keeps working on what they left is
        restarted."""
        deadline = time.monotonic() + REST_SECONDS
        while self.lingers:
            used, = self.cpu()[:1]
            time.sleep(0.3)
            if self.cpu()[0] - used < 0.03:
                break
            if time.monotonic() > deadline:
                self.end()
                self.start()
                self.first_answer = None      # was noted before
                break

    def wait(self, child, url=None, path="/v1/models"):
        """Wait until a GET is answered with 200, and note how long that took."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
                if ask(url or self.url, "GET", path, headers=self.headers)[0] == 200:
                    self.first_answer = time.monotonic() - self.children[0].begun
                    self.first_cpu = self.cpu()[0]
                    return
            if child.process.poll() is not None:
                raise Broken("%s has ended:\n%s" % (self.name, child.said()[-2000:]))
            time.sleep(0.002)
        raise Broken("%s does not answer:\n%s" % (self.name, child.said()[-2000:]))

    def request(self, tokens=1, rate=0, stream=False, size=0, **headers):
        """The bytes of one request, whose numbers the clients fill in; size: bytes of
        further prompt; headers: further ones, with _ for -."""
        body = json.dumps(self.body(wish(tokens, rate) + size * "x", stream))
        head = {"Host": "127.0.0.1", "Content-Type": "application/json",
                "Content-Length": len(body)}
        head.update(self.headers, **headers)
        lines = ["POST %s HTTP/1.1" % self.path]
        lines += ["%s: %s" % (name.replace("_", "-"), value) for name, value in head.items()]
        return ("\r\n".join(lines) + "\r\n\r\n" + body).encode("ascii")

    def body(self, prompt, stream):
        return {"model": self.model, "stream": stream,
                "messages": [{"role": "user", "content": prompt}]}

    def cpu(self):
        """Seconds of processor time so far: its own, and at the LLM's end."""
        return [sum(child.cpu() for child in part) for part in (self.own, self.far)]

    def memory(self):
        return sum(child.memory() for child in self.own)


def wish(tokens, rate):
    """A prompt that tells the fake LLM what to answer."""
    return "tokens=%d rate=%d ######## " % (tokens, rate)


class Direct(Target):
    """The fake LLM, asked directly."""

    name = "LLM itself"

    @property
    def port(self):
        return self.bench.llm

    def end(self):
        pass


class Hello(Target):
    """A bare ThreadingHTTPServer, the most that it can do: on one core and with batch
    scheduling, as the relay."""

    name, streams = "bare hello", False
    program = """
import http.server, os, random
os.sched_setaffinity(0, {random.choice(sorted(os.sched_getaffinity(0)))})
os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
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
        child = self.spawn("hello", sys.executable, "-c", self.program)
        self.port = int(child.expect(r"^(\d+)$").group(1))


class Nginx(Target):
    """nginx, as a proxy of the fake LLM."""

    name = "nginx"
    config = """
daemon off; pid {dir}/nginx.pid; error_log stderr crit; worker_processes auto;
events {{ worker_connections 8192; }}
http {{
  access_log off; keepalive_requests 1000000000; client_body_buffer_size 128k;
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
        child = self.spawn("nginx", nginx_program(), "-c", file, "-p",
                           self.bench.directory, "-e", "stderr")
        self.wait(child)


def nginx_program():
    return shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def peer(name, program):
    """The path of a program in a peer's virtual environment."""
    return os.path.join(CACHE, name, "bin", program)


class Ssh(Target):
    """An OpenSSH reverse tunnel from the LLM's machine, which people use instead: sshd
    with its own configuration and keys, and `ssh -R`."""

    name = "ssh -R"

    @staticmethod
    def there():
        return bool(sshd_program() and shutil.which("ssh") and shutil.which("ssh-keygen"))

    def start(self):
        folder, port, self.port = self.bench.path("ssh-%d"), free_port(), free_port()
        os.mkdir(folder, 0o700)
        for name in "host", "user":
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f",
                            os.path.join(folder, name)], check=True)
        with open(os.path.join(folder, "sshd_config"), "w") as file:
            file.write("ListenAddress 127.0.0.1:%d\nHostKey %s/host\nPidFile none\n"
                       "AuthorizedKeysFile %s/user.pub\nStrictModes no\nUsePAM no\n"
                       "PermitRootLogin yes\n" % (port, folder, folder))
        if not os.geteuid():
            os.makedirs("/run/sshd", exist_ok=True)      # sshd insists on it
        sshd = self.spawn("sshd", sshd_program(), "-D", "-e", "-f",
                          os.path.join(folder, "sshd_config"))
        sshd.expect("Server listening")
        self.spawn("ssh", "ssh", "-F", "none", "-N", "-i", os.path.join(folder, "user"),
                   "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null",
                   "-o", "ExitOnForwardFailure=yes", "-p", port, "-R",
                   "127.0.0.1:%d:127.0.0.1:%d" % (self.port, self.bench.llm), "127.0.0.1",
                   far=True)
        self.wait(sshd)


def sshd_program():
    """The path of sshd, which has to be started by its full path."""
    return shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/sbin")


class FastChat(Target):
    """FastChat's controller and API server; its worker is the fake LLM."""

    name, lingers = "FastChat", True

    @staticmethod
    def there():
        return os.path.exists(peer("fastchat", "python"))

    def start(self):
        controller, self.port = free_port(), free_port()
        url, python = "http://127.0.0.1:%d" % controller, peer("fastchat", "python")
        child = self.spawn("controller", python, "-m", "fastchat.serve.controller",
                           "--host", "127.0.0.1", "--port", controller)
        api = self.spawn("fastchat", python, "-m", "fastchat.serve.openai_api_server",
                         "--host", "127.0.0.1", "--port", self.port,
                         "--controller-address", url)
        self.wait(child, url, "/test_connection")
        ask(url, "POST", "/register_worker", {
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
        child = self.spawn("litellm", peer("litellm", "litellm"), "--config", file,
                           "--host", "127.0.0.1", "--port", self.port,
                           "--telemetry", "False",
                           env={"LITELLM_LOCAL_MODEL_COST_MAP": "True",
                                "NO_PROXY": "127.0.0.1"})
        self.wait(child)


class Native(Target):
    """The relay with the lean provider, asked natively."""

    name, path = "native", "/" + SERVICE
    tls, python = False, sys.executable
    as_script = False         # otherwise as deploy/ does it: Python keeps it compiled
    limits = {"max-queue": 100000, "max-queue-per-caller": 100000,
              "max-connections": 20000, "max-polls": 9000, "max-waiting": 9000,
              "max-services": 100000, "idle-seconds": 3600}

    def __init__(self, bench, root=ROOT, title=None):
        super().__init__(bench)
        self.root, self.name = os.path.abspath(root), title or self.name
        self.relay = None

    def another(self):
        return type(self)(self.bench, self.root, self.name)

    def start(self):
        self.start_relay()
        self.key = self.relay.register(SERVICE)
        self.provide()

    def start_relay(self, data="data"):
        """data: a data file to start with, if it is a path."""
        command = [self.python, "neuroengine_server.py"]
        if not self.as_script:
            subprocess.run([self.python, "-m", "py_compile", command[1]], cwd=self.root,
                           check=True)
            command = [self.python, "-m", "neuroengine_server"]
        limits = ["--%s=%s" % limit for limit in self.limits.items()]
        self.relay = harness.Relay(self.bench, *limits, tls=self.tls, command=command,
                                   data=data, provider=False, cwd=self.root)
        self.port = self.relay.port
        self.children.append(self.relay.child)
        self.own.append(self.relay.child)
        if not self.tls:
            self.wait(self.relay.child)

    def provide(self):
        self.provider = self.spawn("provider", sys.executable, os.path.join(
            HERE, "provider.py"), self.port, SERVICE, self.key, *["tls"] * self.tls,
            far=True)
        self.provider.expect("ready")

    def body(self, prompt, stream):
        return {"message": prompt, "stream": True} if stream else {"message": prompt}


class OpenAI(Native):
    """The same, through /v1/chat/completions."""

    name, path, model = "/v1", "/v1/chat/completions", SERVICE
    body = Target.body


class Listen(OpenAI):
    """The relay with `NeuroengineServer.listen`, asked through /v1."""

    name = "listen"
    program = """
import asyncio, sys, time
sys.path.insert(0, sys.argv[1])
from neuroengine import NeuroengineServer
def wanted(request):
    prompt = request.get("message") or request["messages"][-1]["content"]
    return (int(word.split("=")[1]) for word in prompt.split()[:2])
%s
server = NeuroengineServer(sys.argv[2])
assert server.login(sys.argv[3], sys.argv[4]) >= 0, server.error
print("ready", flush=True)
server.listen(answer, workers=1024)
"""
    answer = """
def answer(request):
    tokens, rate = wanted(request)
    return paced(tokens, rate) if rate else "word~ " if tokens == 1 else (
        "word~ " for _ in range(tokens))
def paced(tokens, rate):
    began = time.monotonic()
    for n in range(tokens):
        time.sleep(max(0, began + n / rate - time.monotonic()))
        yield "word~ "
"""

    def provide(self):
        self.provider = self.spawn("listen", sys.executable, "-c", self.program % self.answer,
                                   self.root, self.relay.url, SERVICE, self.key, far=True)
        self.provider.expect("ready")


class Coroutines(Listen):
    """The same with a callback that is an async generator."""

    name = "coroutines"
    answer = """
async def answer(request):
    tokens, rate = wanted(request)
    began = time.monotonic()
    for n in range(tokens):
        if rate:
            await asyncio.sleep(max(0, began + n / rate - time.monotonic()))
        yield "word~ "
"""


class Far(harness.Proxy):
    """A relay at a distance: what passes takes `seconds` each way."""

    seconds = 0.02

    def passing(self, data, pair, to_client):
        time.sleep(self.seconds)
        return data


class Share(OpenAI):
    """The relay with `neuroengine.py share` before the fake LLM, asked through /v1."""

    name, is_far = "share", False

    def start(self):
        self.start_relay()
        relay = Far(self.port) if self.is_far else self.relay
        self.provider = harness.share(
            self.bench, relay.url, SERVICE, "http://127.0.0.1:%d" % self.bench.llm,
            "--workers", "1024", "--max-tokens", "1000000", root=self.root)
        self.children.append(self.provider)
        self.far.append(self.provider)


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
