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
import re
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time

import charts
from charts import shown
from charts import spread
from targets import HERE
from targets import ROOT
from targets import SERVICE
from targets import Broken
from targets import Child
from targets import Direct
from targets import FastChat
from targets import Hello
from targets import LiteLLM
from targets import Native
from targets import Nginx
from targets import OpenAI
from targets import build_load
from targets import call
from targets import install
from targets import trusting

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
        self.round, self.loads = 0, []
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
            late = threading.Timer(most + seconds + 30, load.kill)
            late.start()
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
                late.cancel()
                load.kill()
        target.rest()
        if answer["errors"]:
            print("  ! %s: %d errors: %s" % (target.name, answer["errors"],
                                             answer["error"][-300:]))
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
        """The target, without what an earlier row left in it: the relay, so quickly
        started, is started anew."""
        if isinstance(target, Native):
            again = target.another()
            try:
                again.start()
                yield again
            finally:
                again.end()
        else:
            yield target

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


##############################################################################
# Parts: what can be chosen with --only
##############################################################################


def part_start(bench):
    """From the start of the program to its first answer, and what it holds then."""
    def work(target):
        if target.first_answer:
            bench.note("start to first answer", target.name, target.first_answer)
            bench.note("CPU a start", target.name, target.first_cpu)
            target.first_answer = None
            bench.note("memory, idle", target.name, target.memory())

    bench.each(work)
    with bench.relay(as_script=True) as relay:
        relay.start_relay()
        bench.note("start to first answer, as a script", relay.name, relay.first_answer)
        bench.note("memory, idle, as a script", relay.name, relay.memory())


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
        for header in target.headers.items():
            file.write("wrk.headers['%s'] = '%s'\n" % header)
    url = "http%s://127.0.0.1:%d%s" % ("s" * getattr(target, "tls", False), target.port,
                                       target.path)
    said = subprocess.run(
        ["wrk", "-t1", "-c%d" % clients, "-d%ds" % max(1, round(bench.options.seconds)),
         "-s", script, url], stdout=subprocess.PIPE, universal_newlines=True,
        timeout=60).stdout
    target.rest()
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
    wall, cpu = {}, {}
    env = dict(os.environ, PYTHONPYCACHEPREFIX=bench.directory, PYTHONPATH=ROOT)
    env.pop("PYTHONDONTWRITEBYTECODE", None)     # it would be compiled each time
    for code in ["pass", "import neuroengine"] * (4 if bench.options.quick else 15):
        begun, used = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code], env=env, check=True)
        wall[code] = min(wall.get(code, 9), time.monotonic() - begun)
        now = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu[code] = min(cpu.get(code, 9), now.ru_utime + now.ru_stime
                        - used.ru_utime - used.ru_stime)
    for row, best in ("import neuroengine", wall), ("import neuroengine, CPU", cpu):
        bench.note(row, "native", best["import neuroengine"] - best["pass"])


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
        relay.own = [child]                  # whose cost is counted here
        for clients in 1, 64:
            got = bench.ask(relay, relay.request(), clients)
            tail = "listen, " + counted(clients, "client")
            bench.note("requests/s, " + tail, "native", got["answers"] / got["seconds"])
            bench.note("p50, " + tail, "native", got["latency"]["p50"])
            bench.note("CPU a request, " + tail, "native",
                       got["cpu_used"] / got["answers"])


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
        relay.own = [child]
        # 64 streams of 320 tokens a second are 20,480; then as fast as they come.
        for title, rate in ("share, 20,480 offered", 320), ("share, all it can", 2000):
            got = bench.ask(relay, relay.request(1000, rate, True), 64, 0.5, 5)
            bench.note("tokens/s, 64 streams, " + title, "native",
                       got["tokens"] / got["seconds"])
            bench.note("worst gap p99, 64 streams, " + title, "native", got["gap"]["p99"])
            bench.note("CPU a token, 64 streams, " + title, "native",
                       got["cpu_used"] / got["tokens"])


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


def part_soak(bench):
    """Memory before and after a million jobs; takes minutes, so only if it is named."""
    with bench.relay() as relay:
        relay.start()
        jobs, next_note = 0, 20000
        deadline = time.monotonic() + 1800
        while jobs < 10**6 and time.monotonic() < deadline:
            jobs += bench.ask(relay, relay.request(), 64, seconds=5)["asked"]
            if jobs >= next_note:
                bench.note("memory, after {:,} jobs or more".format(next_note), "native",
                           relay.memory())
                next_note = jobs // 100000 * 100000 + 100000


# Those of each round, those of once a run, and those that must be named.
ROUND = {"start": part_start, "requests": part_requests, "first": part_first,
         "tokens": part_tokens, "pace": part_pace}
ONCE = {"waiting": part_waiting, "tls": part_tls, "check": part_check,
        "import": part_import, "pythons": part_pythons, "listen": part_listen,
        "share": part_share, "curves": part_curves}
NAMED = {"soak": part_soak}


##############################################################################
# What is printed
##############################################################################


def table(bench):
    """All rows, in Markdown: those that compare, and those of the relay alone."""
    columns = [target.name for target in bench.targets]
    lines = ["| median (least-most) | " + " | ".join(columns) + " |",
             "|---|" + "---|" * len(columns)]
    alone = ["", "| the relay, median (least-most) | |", "|---|---|"]
    for row, values in bench.values.items():
        show = functools.partial(shown, row)
        cells = [spread(values[c], show) if c in values else "" for c in columns]
        if list(values) == [bench.targets[0].name]:
            alone.append("| %s | %s |" % (row, cells[0]))
        else:
            lines.append("| %s | %s |" % (row, " | ".join(cells)))
    return "\n".join(lines + alone)


def ratios(bench):
    """How many times the relay's figure is another's, each within one round."""
    others = [t.name for t in bench.targets if not isinstance(t, Native)]
    ours = [t.name for t in bench.targets if isinstance(t, Native)]
    pairs = [(a, b) for b in others for a in ours]
    pairs += [(a, ours[n % 2]) for n, a in enumerate(ours) if n > 1]   # several relays
    lines = ["| times the other's, within a round | " + " | ".join(
        "%s / %s" % pair for pair in pairs) + " |", "|---|" + "---|" * len(pairs)]
    for row, values in bench.values.items():
        cells = []
        for a, b in pairs:
            quotients = [x / y for x, y in zip(values.get(a, ()), values.get(b, ()))
                         if x is not None and y]
            cells.append(spread(quotients, "{:.3g}".format) if quotients else "")
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


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog="Parts: " + "; ".join(
            "%s: %s" % (name, " ".join(part.__doc__.split())) for name, part in
            dict(ROUND, **ONCE, **NAMED).items()))
    add = parser.add_argument
    add("--install", action="store_true", help="first install the peers that can be")
    add("--only", metavar="PARTS", help="parts to run, with commas; otherwise all")
    add("--peers", metavar="NAMES", help="what to compare with, of hello, nginx, fastchat, "
        "litellm and llm, the fake LLM itself; otherwise the first four, and the first "
        "two with --quick")
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
    except Exception as error:               # whatever it is, the other figures count
        print("  ! %s: %s: %s" % (what, type(error).__name__, error), flush=True)
        otherwise()


def measure(bench, parts):
    """All rounds of all runs."""
    for run in range(bench.options.runs):
        for target in bench.targets:
            attempt(target.name, target.start, otherwise=target.end)
        for number in range(bench.options.rounds):
            bench.loads.append(os.getloadavg()[0])
            print("run %d, round %d, %s, load %.1f" % (
                run + 1, number + 1, time.strftime("%H:%M:%S"), bench.loads[-1]),
                flush=True)
            for name, part in ROUND.items():
                if name in parts:
                    attempt(name, part, bench)
            bench.round += 1
        bench.round -= 1                    # what is done once belongs to the last round
        for name, part in dict(ONCE, **NAMED).items():
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
    if options.peers is None:                # the others start slowly
        options.peers = "hello,nginx" + ",fastchat,litellm" * (not options.quick)
    parts = options.only.split(",") if options.only else list(ROUND) + list(ONCE)
    known = dict(ROUND, **ONCE, **NAMED)
    if set(parts) - set(known):
        sys.exit("there are these parts: " + ", ".join(known))
    if options.install:
        install()
    # Thousands of connections; and a signal ends what we started, too.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="neuroengine-bench-") as directory:
        bench = Bench(options, directory)
        for number, file in enumerate(options.relay or [None], 1):
            tail = " (%d)" % number if number > 1 else ""
            file = file and os.path.abspath(file)
            bench.targets += [Native(bench, file, "native" + tail),
                              OpenAI(bench, file, "/v1" + tail)]
        peers = {"hello": Hello, "nginx": Nginx, "fastchat": FastChat,
                 "litellm": LiteLLM, "llm": Direct}
        for name in filter(None, options.peers.split(",")):
            if getattr(peers[name], "there", lambda: True)():
                bench.targets.append(peers[name](bench))
            else:
                print("%s is not installed" % name)
        stopped = False
        try:
            bench.start()
            measure(bench, parts)
        except KeyboardInterrupt:
            stopped = True
            print("stopped")
        finally:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            bench.end()
    facts = dict(about(options), loads=bench.loads)
    print("\n".join("%s: %s" % fact for fact in facts.items()))
    for text in table(bench), ratios(bench), curve_table(bench):
        print("\n" + text)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(dict(facts, values=bench.values, curves=bench.curves), file, indent=1)
    if options.charts:
        charts.draw(options.charts, facts, bench.values, bench.curves)
    return 130 if stopped else 0


if __name__ == "__main__":
    sys.exit(main())
