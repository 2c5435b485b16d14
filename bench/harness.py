"""What the programs of bench/ share: child processes, requests, waiting, and fakes.

A Workspace is a temporary folder and the programs that were started in it. Each program is
a Child: its output goes to a log file, and it is ended by its process id. A Relay is a
relay as a child process, by default with a service and a provider whose answers can be
checked: prompt_of() makes a prompt, answer_of() gives its one right answer.

Linux, standard library only, loopback only.
"""

import contextlib
import http.client
import http.server
import json
import os
import random
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

BENCH = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(BENCH)
SERVICE = "Bench"                  # the service of a Relay
BROKEN = (OSError, http.client.HTTPException, ValueError)
MB = 1e6
TICK, PAGE = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")

UNVERIFIED = ssl.create_default_context()      # our certificates sign themselves
UNVERIFIED.check_hostname, UNVERIFIED.verify_mode = False, ssl.CERT_NONE

sys.path.insert(0, ROOT)           # for `import neuroengine`


class Broken(Exception):
    """A program did not do what it should; the message says which and what."""


class Skip(Exception):
    """This cannot be done here; the message says why."""


##############################################################################
# Waiting and figures
##############################################################################


def wait_for(fact, seconds, what, detail=lambda: ""):
    """Wait until fact() is true; return the seconds that it took. Raises AssertionError
    with `what` and detail() after the given time."""
    began = time.monotonic()
    while not fact():
        if time.monotonic() - began > seconds:
            raise AssertionError("%s did not happen within %g s: %s" % (
                what, seconds, detail()[-2000:]))
        time.sleep(0.01)
    return time.monotonic() - began


def percentile(values, share):
    """The value below which that share of the values lies; nan if there are none."""
    values = sorted(values)
    return values[min(len(values) - 1, int(share * len(values)))] if values else float("nan")


def need(program):
    """Raise Skip unless that program is installed."""
    if not shutil.which(program):
        raise Skip("%s is not installed" % program)


def unlimited_files():
    """Allow this process and its children as many descriptors as the system permits."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def end_on_signals():
    """Let signals raise KeyboardInterrupt, so that children are ended; SIGINT too, which a
    shell's background jobs and their children would ignore."""
    for number in signal.SIGTERM, signal.SIGHUP, signal.SIGINT:
        signal.signal(number, signal.default_int_handler)


##############################################################################
# Child processes
##############################################################################


class Child:
    """A program in a new process group, with its output in a log file."""

    def __init__(self, log, *args, env=None, cwd=None, stdin=subprocess.DEVNULL,
                 preexec=None):
        self.log, self.begun = log, time.monotonic()
        with open(log, "ab") as file:
            self.process = subprocess.Popen(
                [str(arg) for arg in args], stdout=file, stderr=file, stdin=stdin, cwd=cwd,
                env=dict(os.environ, PYTHONDONTWRITEBYTECODE="1", **(env or {})),
                preexec_fn=preexec, start_new_session=True)
        self.pid = self.process.pid

    def said(self):
        """All that it has written."""
        with open(self.log, encoding="utf-8", errors="replace") as log:
            return log.read()

    def expect(self, pattern, seconds=60, mark=0):
        """Wait until it writes text that matches, beyond `mark` characters; the match.
        Raises Broken if it ends before that, or after the given time."""
        deadline = time.monotonic() + seconds
        while True:
            ended = self.process.poll() is not None
            match = re.search(pattern, self.said()[mark:], re.M)
            if match:
                return match
            if ended or time.monotonic() > deadline:
                raise Broken("%s %s without writing %r:\n%s" % (
                    os.path.basename(self.log), "ended" if ended else "ran for %g s"
                    % seconds, pattern, self.said()[-2000:]))
            time.sleep(0.002)

    def send(self, number):
        if self.process.poll() is None:
            os.kill(self.pid, number)

    def end(self, number=signal.SIGTERM, seconds=15):
        """Send a signal and wait; the exit status. After the given time it is aborted,
        which lets faulthandler write its threads' stacks to the log, and then killed."""
        if self.process.poll() is None:
            for each in number, signal.SIGCONT:
                self.send(each)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(seconds)
            if self.process.poll() is None:
                self.send(signal.SIGABRT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(1)
            with contextlib.suppress(OSError):       # it, and what it has started
                os.killpg(self.pid, signal.SIGKILL)
        return self.process.wait()

    def pids(self):
        """Its process and the processes that its main threads have started."""
        found = [self.pid]
        for pid in found:
            with contextlib.suppress(OSError):
                found += map(int, read("/proc/%d/task/%d/children" % (pid, pid)).split())
        return found

    def cpu(self):
        """Seconds of processor time so far."""
        total = 0
        for pid in self.pids():
            with contextlib.suppress(OSError):
                fields = read("/proc/%d/stat" % pid).rpartition(")")[2].split()
                total += int(fields[11]) + int(fields[12])
        return total / TICK

    def memory(self):
        """Bytes resident."""
        total = 0
        for pid in self.pids():
            with contextlib.suppress(OSError):
                total += int(read("/proc/%d/statm" % pid).split()[1]) * PAGE
        return total

    def threads(self):
        return len(os.listdir("/proc/%d/task" % self.pid))

    def descriptors(self):
        return len(os.listdir("/proc/%d/fd" % self.pid))

    def resources(self):
        """Its threads, its descriptors, and its resident memory in MB."""
        return self.threads(), self.descriptors(), self.memory() / MB

    def at_rest(self, seconds=3):
        """The least of its resources over some time."""
        looks = []
        for _ in range(int(seconds / 0.5)):
            time.sleep(0.5)
            looks.append(self.resources())
        return tuple(min(column) for column in zip(*looks))


def read(path):
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()


def swap(source, target, share=1.0):
    """Put a copy of a file, or of its beginning, in the place of another at once."""
    with open(source, "rb") as file:
        data = file.read()
    with open(target + ".new", "wb") as file:
        file.write(data[:int(share * len(data))])
    os.replace(target + ".new", target)


class Workspace:
    """A temporary folder and the programs that were started in it."""

    def __init__(self, prefix):
        self.directory, self.children = tempfile.mkdtemp(prefix=prefix + "-"), []
        os.chmod(self.directory, 0o755)
        self._count, self._lock = 0, threading.Lock()

    def path(self, name):
        """A path in the folder; `name` may hold %d for a number that is new each time."""
        if "%d" in name:
            with self._lock:
                self._count += 1
                name %= self._count
        return os.path.join(self.directory, name)

    def spawn(self, title, *args, **how):
        """Start a Child."""
        child = Child(self.path(title + "-%d.log"), *args, **how)
        self.children.append(child)
        return child

    def python(self, title, *args, **how):
        """Start a Python program as a Child that can tell where it hangs."""
        return self.spawn(title, sys.executable, "-u", "-X", "faulthandler", *args, **how)

    def certificate(self, name="relay"):
        """A self-signed certificate and its key, as paths."""
        cert, key = self.path(name + "-cert.pem"), self.path(name + "-key.pem")
        if not os.path.exists(cert):
            need("openssl")
            subprocess.run([
                "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt",
                "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj",
                "/CN=" + name, "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key,
                "-out", cert], check=True, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL)
        return cert, key

    def end_children(self):
        while self.children:
            self.children.pop().end(signal.SIGKILL)

    def close(self, keep=False):
        """End all programs, and remove the folder; keep: tell where it is instead."""
        self.end_children()
        if keep:
            print("the logs are in", self.directory)
        else:
            shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


##############################################################################
# Connections
##############################################################################


def free_port():
    """A port below those that the system gives to clients, so that it stays free."""
    while True:
        port = random.randrange(12000, 32000)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


def connect(url, timeout=20, source="127.0.0.1"):
    """An http.client connection to a URL's host, not yet opened."""
    scheme, _, address = url.partition("://")
    host, _, port = address.partition(":")
    kind, more = http.client.HTTPConnection, {}
    if scheme == "https":
        kind, more = http.client.HTTPSConnection, {"context": UNVERIFIED}
    return kind(host, int(port), timeout=timeout, source_address=(source, 0), **more)


def ask(url, method, path, body=None, key=None, timeout=20, source="127.0.0.1",
        headers=None):
    """One request on a new connection; the status, and the JSON or the bytes."""
    headers = dict({"Content-Type": "application/json"}, **(headers or {}))
    if key:
        headers["Authorization"] = "Bearer " + key
    with contextlib.closing(connect(url, timeout, source)) as connection:
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        response = connection.getresponse()
        data = response.read()
        if data and response.getheader("Content-Type", "").startswith("application/json"):
            data = json.loads(data)
        return response.status, data


def close_all(socks):
    """Close sockets and descriptors."""
    for sock in socks:
        os.close(sock) if isinstance(sock, int) else sock.close()


class Proxy:
    """A TCP proxy on a free port. Subclasses override passing()."""

    def __init__(self, port):
        self.target, self.pairs, self.connections = port, set(), 0
        self.lock = threading.Lock()
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.port = self.listener.getsockname()[1]
        self.url = "http://127.0.0.1:%d" % self.port
        threading.Thread(target=self._accept, daemon=True).start()

    def passing(self, data, pair, to_client):
        """The bytes to pass on; raise OSError to end the connection."""
        return data

    def _accept(self):
        while True:
            try:
                here = self.listener.accept()[0]
            except OSError:
                return
            try:
                pair = here, socket.create_connection(("127.0.0.1", self.target))
            except OSError:                # the relay is being restarted
                here.close()
                continue
            self.connections += 1
            with self.lock:
                self.pairs.add(pair)
            ended = []                     # the second pump to end closes both sockets
            for source, sink in (pair, pair[::-1]):
                sink.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=self._pump, args=(source, sink, pair, ended),
                                 daemon=True).start()

    def _pump(self, source, sink, pair, ended):
        with contextlib.suppress(OSError):
            for data in iter(lambda: source.recv(65536), b""):
                sink.sendall(self.passing(data, pair, sink is pair[0]))
        with self.lock:
            self.pairs.discard(pair)
            ended.append(source)
            last = len(ended) == 2
        for sock in pair:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            if last:
                sock.close()

    def close(self):
        self.listener.close()


##############################################################################
# Fakes
##############################################################################


def prompt_of(number, count=8, size=12, pause=0.0):
    """A prompt for `count` tokens of `size` characters, `pause` seconds apart. More words
    may follow it."""
    return "%s %d %d %g" % (number, count, size, pause)


def answer_of(prompt):
    """The tokens of the one right answer."""
    number, count, size = prompt.split()[:3]
    for n in range(int(count)):
        yield ("%s:%d " % (number, n)).ljust(int(size), ".")


def provide(url, name, key, workers):
    """Be a provider that answers as answer_of() says; never returns."""
    from neuroengine import NeuroengineServer

    def answer(request):
        prompt = request.get("message") or request["messages"][-1]["content"]
        prompt = " ".join(prompt.split()[:4])
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


@contextlib.contextmanager
def serving(handler, **fields):
    """An http.server with that handler class on a free port; its URL. The fields become
    attributes of the class."""
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), type(handler.__name__, (handler,), fields))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield "http://127.0.0.1:%d" % server.server_port
    finally:
        server.shutdown()
        server.server_close()


##############################################################################
# The relay, and the programs next to it
##############################################################################


class Relay:
    """A relay as a child process; by default with a service and its provider.

    command: what starts it, instead of this checkout's file; wrap: words before that;
    data: a name in the workspace, or a path; cert: a certificate and its key for TLS; how:
    see Child."""

    def __init__(self, space, *options, tls=False, data="data", port=0, command=None,
                 wrap=(), cert=None, provider=True, workers=16, **how):
        self.space, self.tls, self.options, self.how = space, tls, options, how
        self.command = [*wrap, *(command or [sys.executable, "-u", os.path.join(
            ROOT, "neuroengine_server.py")])]
        self.data = space.path(data + ("" if data.startswith("/") else "-%d"))
        self.port, self.key, self.workers = port, None, workers
        self.log, self.provider = space.path("relay-%d.log"), None
        if tls:
            self.cert, self.cert_key = cert or space.certificate()
        self.start()
        if provider:
            self.key = self.register(SERVICE)
            self.start_provider(self.key)

    def start(self):
        """Start it, at first or again; a second time on the same port and data."""
        options = ["--host", "127.0.0.1", "--port", self.port, "--data", self.data]
        options += ["--cert", self.cert, "--key", self.cert_key] if self.tls \
            else ["--tls", "off"]
        mark = len(self.said())
        self.child = Child(self.log, *self.command, *options, *self.options, **self.how)
        self.space.children.append(self.child)
        self.port = int(self.child.expect(r"listens at \S+:(\d+)", 20, mark).group(1))

    @property
    def url(self):
        return "%s://127.0.0.1:%d" % ("https" if self.tls else "http", self.port)

    def said(self):
        """Its log, of all its starts."""
        return read(self.log) if os.path.exists(self.log) else ""

    def tracebacks(self):
        said = self.said()
        return said.count("Traceback") + said.count("internal_error")

    def ask(self, method, path, body=None, key=None, **how):
        """See ask()."""
        return ask(self.url, method, path, body, key, **how)

    def register(self, name):
        """Register a service; its key."""
        status, answer = self.ask("POST", "/api/services", {"name": name})
        if status != 201:
            raise Broken("the relay did not register %s: %s" % (name, answer))
        return answer["key"]

    def start_provider(self, key, name=SERVICE, workers=None, wait=True):
        """Start a provider as a child; wait: until it is logged in."""
        child = self.space.python("provider", os.path.abspath(__file__), "--provide",
                                  self.url, name, key, workers or self.workers)
        if wait:
            child.expect("logged in", 20)
            self.provider = child
        return child

    def prompt(self, prompt, name=SERVICE, **more):
        """Whether a prompt is answered, and rightly."""
        status, answer = self.ask("POST", "/" + name, {"message": prompt}, **more)
        return status == 200 and answer["reply"] == "".join(answer_of(prompt))

    def healthy(self, seconds=2):
        """Whether /healthz answers 200 in that time."""
        try:
            return self.ask("GET", "/healthz", timeout=seconds)[0] == 200
        except BROKEN:
            return False

    def metrics(self):
        """/metrics as {name without its prefix: value}; {} if it cannot be asked."""
        try:
            # Not from 127.0.0.1, which some relays are told is a proxy.
            text = self.ask("GET", "/metrics", timeout=20, source="127.0.0.2")[1].decode()
        except BROKEN:
            return {}
        return {name[len("neuroengine_"):]: float(value) for name, value in
                (line.split() for line in text.splitlines() if line[0] != "#")}

    def dial(self, source="127.0.0.1", timeout=30, tls=None, buffer=None):
        """A connected socket, over TLS if the relay uses it."""
        sock = socket.socket()
        if buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        sock.settimeout(timeout)
        sock.bind((source, 0))
        sock.connect(("127.0.0.1", self.port))
        if self.tls if tls is None else tls:
            sock = UNVERIFIED.wrap_socket(sock)
        return sock

    def stop(self):
        if self.provider:
            self.provider.end(signal.SIGINT)
        return self.child.end()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()


def share(space, relay_url, name, upstream, *options, root=ROOT):
    """Start `neuroengine.py share` as a child, and wait until it shares."""
    child = space.python("share", os.path.join(root, "neuroengine.py"), "share", name,
                         "--upstream", upstream, "--relay", relay_url, *options,
                         env={"NEUROENGINE_HOME": space.path("home-%d")})
    child.expect("Sharing")
    return child


if __name__ == "__main__" and sys.argv[1:2] == ["--provide"]:
    provide(*sys.argv[2:])
