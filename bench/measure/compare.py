#!/usr/bin/env python3
"""Measure what people run, next to the other things that stand between clients and an LLM.

    python bench/measure/compare.py [--only requests,tokens] [--json FILE] [--charts DIR]
    python bench/measure/compare.py --quick [--against CHECKOUT] [--ours native,/v1,share]

Our columns are `share` (neuroengine.py share before a fake LLM), `listen` (a callback of
NeuroengineServer.listen, in threads), `coroutines` (the same as an async generator), and,
as what the relay alone can do, `native` and `/v1` with a lean provider (provider.py). The
peers are those that are installed: a bare ThreadingHTTPServer that says hello, nginx as a
proxy, an OpenSSH reverse tunnel, FastChat and LiteLLM (--install puts these two into
virtual environments). The LLM takes no time, and the clients are written in C (load.c).
Each row is measured for all columns in turn, in rounds, because the speed of a shared
machine changes: only ratios within a round count.

--quick measures only what a change to the code may make worse, in about 20 s a round;
--against interleaves another checkout, and prints the ratios.

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
import threading
import time

import charts
from charts import shown, spread
from targets import (HERE, ROOT, SERVICE, Broken, Coroutines, Direct, FastChat, Hello,
                     Listen, LiteLLM, Native, Nginx, OpenAI, Share, Ssh, build_load, install)

from harness import UNVERIFIED, Workspace, close_all, end_on_signals, unlimited_files

##############################################################################
# The bench: all that is running, and what was measured
##############################################################################


class Bench(Workspace):
    """Runs parts and keeps their figures."""

    def __init__(self, options):
        super().__init__("bench")
        self.options = options
        self.values = {}          # row -> column -> [value of each round]
        self.curves = {}          # title -> [[how many, value]]
        self.round, self.loads = 0, []
        self.load, self.llm = build_load(), None
        self.root, self.targets = ROOT, []

    def start(self):
        self.llm = int(self.spawn("llm", self.load, "llm").expect(r"^(\d+)$").group(1))

    def note(self, row, column, value):
        values = self.values.setdefault(row, {}).setdefault(column, [])
        values += [None] * (self.round - len(values)) + [value]
        print("  %-40s %-12s %s" % (row, column, shown(row, value)), flush=True)

    def ask(self, target, request, clients, warm=0.3, most=5.0, rate=0, seconds=None, pause=0):
        """Let clients ask; what they saw, and the target's cost in that time. pause: of each
        between its requests, in seconds on average. Raises Broken if no token came."""
        seconds = seconds or self.options.seconds
        file = self.path("request")
        with open(file, "wb") as out:
            out.write(request)
        with open(file, "rb") as body, subprocess.Popen(
                [self.load, "ask", str(target.port), str(clients), str(warm), str(most),
                 str(seconds), str(rate), str(pause)], stdin=body, stdout=subprocess.PIPE) as load:
            late = threading.Timer(most + seconds + 30, load.kill)
            late.start()
            try:
                said = load.stdout.readline()
                if said == b"begun\n":
                    cpu, at = target.cpu(), time.monotonic()
                    said = load.stdout.readline()
                if said == b"over\n":
                    cpu = [now - then for now, then in zip(target.cpu(), cpu)]
                    at, memory = time.monotonic() - at, target.memory()
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
        answer.update(cpu_used=cpu, memory=memory, cores=sum(cpu) / at)
        return answer

    def note_cpu(self, what, target, got, count):
        """Note the processor time divided by `count`: its own, and at the LLM's end."""
        own, far = got["cpu_used"]
        if target.own:
            self.note("CPU " + what, target.name, own / count)
        if target.far:
            self.note("CPU %s, of the provider" % what, target.name, far / count)

    def curve(self, title, points):
        """Keep the best of all runs of each point."""
        old = dict(self.curves.get(title, ()))
        self.curves[title] = [[n, min(value, old.get(n, value))] for n, value in points]
        print("  %-40s %s" % (title, ", ".join("{:,}: {}".format(n, shown("", value))
                                               for n, value in points)), flush=True)

    @contextlib.contextmanager
    def fresh(self, target):
        """The target without what an earlier row left in it: the relay, which starts
        quickly, is started anew."""
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
        """A relay for one row, not yet started."""
        relay = Native(self, self.root)
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
    """From the start of the program to its first answer, and its memory then."""
    def work(target):
        if target.first_answer:        # once a start
            bench.note("start to first answer", target.name, target.first_answer)
            bench.note("CPU a start", target.name, target.first_cpu)
            target.first_answer = None
            bench.note("memory, idle", target.name, target.memory())

    bench.each(work)


def part_script(bench):
    """The start of the relay as a script, which Python compiles each time."""
    with bench.relay(as_script=True) as relay:
        relay.start_relay()
        bench.note("start to first answer, as a script", relay.name, relay.first_answer)
        bench.note("memory, idle, as a script", relay.name, relay.memory())


def part_requests(bench):
    """Requests a second with 1, 16 and 64 clients, and their times."""
    def work(target):
        got = bench.ask(target, target.request(), clients)
        many = counted(clients, "client")
        bench.note("requests/s, " + many, target.name, got["answers"] / got["seconds"])
        if clients == 1:
            bench.note("p50, 1 client", target.name, got["latency"]["p50"])
        if clients == 64:
            bench.note("p99, 64 clients", target.name, got["latency"]["p99"])
        bench.note_cpu("a request, " + many, target, got, got["answers"])

    for clients in (16, 64) if bench.options.quick else (1, 16, 64):
        bench.each(work)


SHAPES = {  # what else requests look like: (how each differs from the plain one, clients)
    "heads that differ": ({"X_Request_Id": "########"}, 64),
    "a new connection each": ({"Connection": "close"}, 16),
    "prompts of 32 KB": ({"size": 32 << 10}, 16),
    "answers of 1,000 tokens": ({"tokens": 1000}, 16),
}


def part_shapes(bench):
    """Requests a second of other shapes: heads that differ, a new connection for each,
    prompts of 32 KB, answers of 1,000 tokens."""
    def work(target):
        if target.streams or "tokens" not in how:         # hello says one word
            got = bench.ask(target, target.request(**how), clients)
            bench.note("requests/s, " + title, target.name, got["answers"] / got["seconds"])
            bench.note_cpu("a request, " + title, target, got, got["answers"])

    for shape, (how, clients) in SHAPES.items():
        title = "%s, %s" % (shape, counted(clients, "client"))
        bench.each(work)


def part_first(bench):
    """What is added to the time to the first token, compared with the LLM asked directly: one
    client; 16 that all ask at once, again and again, for 8 tokens, 1,000 a second; and 16
    that ask at any time, for 8 tokens, 50 a second."""
    def first(target):
        return bench.ask(target, target.request(8, rate, True), clients,
                         pause=pause)["first"]["p50"]

    def work(target):
        bench.note("first token, added, " + title, target.name, first(target) - base)

    direct = Direct(bench)
    for title, clients, rate, pause in (
            ("1 client", 1, 1000, 0), ("16 clients at once", 16, 1000, 0),
            ("16 clients at any time", 16, 50, 0.1)):
        base = first(direct)
        bench.each(work, streams=True)


def part_far(bench):
    """The same with a relay 20 ms away from `share`, 40 there and back, by what other streams
    there are: 50 tokens, 50 a second."""
    def work(target):
        if not isinstance(target, Share):
            return
        far = target.another()
        far.is_far = True
        try:
            far.start()
            for clients in 1, 16:
                request = far.request(50, 50, True)
                got = bench.ask(far, request, clients, 1, pause=0.1, seconds=5)
                bench.note("first token, added, relay 20 ms away, " + counted(
                    clients, "client"), target.name, got["first"]["p50"])
        finally:
            far.end()

    bench.each(work)


def part_tokens(bench):
    """Tokens a second over 256 streams, 2,000 a second offered to each."""
    def work(target):
        with bench.fresh(target) as fresh:
            got = bench.ask(fresh, fresh.request(1000, 2000, True), 256, 0.5,
                            bench.options.patience)
        bench.note("tokens/s, 256 streams", target.name, got["tokens"] / got["seconds"])
        bench.note_cpu("a token, 256 streams", target, got, got["tokens"])

    bench.each(work, streams=True)


def part_pace(bench):
    """Streams of 50 tokens a second: which keep their pace, and their worst gaps."""
    def work(target):
        if streams > 256 and isinstance(target, (FastChat, LiteLLM)):
            return                          # they do not keep up with 256
        with bench.fresh(target) as fresh:
            if bench.options.quick and streams == 256:       # else in part_start
                bench.note("memory, idle", target.name, fresh.memory())
            got = bench.ask(fresh, fresh.request(100000, 50, True), streams, 1,
                            bench.options.patience, rate=50,
                            seconds=max(1, bench.options.seconds))
        tail = ", %d streams of 50 tokens/s" % streams
        bench.note("share that keep their pace" + tail, target.name, got["kept"])
        bench.note("worst gap p99" + tail, target.name, got["gap"]["p99"])
        bench.note("cores" + tail, target.name, got["cores"])
        bench.note_cpu("a token" + tail, target, got, got["tokens"])
        if streams == 256:
            bench.note("memory, 256 streams", target.name, got["memory"])
            bench.note("all started after" + tail, target.name,
                       got["all_started"] if got["all_started"] > 0 else None)

    for streams in (256, 1000) if bench.options.quick else (256, 500, 1000):
        bench.each(work, streams=True)


def counted(number, what):
    return "%d %s%s" % (number, what, "s" * (number != 1))


def part_waiting(bench):
    """Memory of a further connection whose prompt waits, plain and TLS."""
    count = 1000
    for tls in False, True:
        with bench.relay(tls=tls) as relay:
            relay.start_relay()
            relay.relay.register("Nobody")
            before, sockets = relay.memory(), []
            body = json.dumps({"message": "Hello", "wait": True, "id": "########"})
            request = "POST /Nobody HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s"
            try:
                for number in range(count):
                    sock = socket.create_connection(("127.0.0.1", relay.port))
                    sockets.append(UNVERIFIED.wrap_socket(sock) if tls else sock)
                    sockets[-1].sendall((request % (len(body), body.replace(
                        "########", "%08d" % number))).encode())
                deadline = time.monotonic() + 20
                while relay.relay.ask("GET", "/api/models")[1][0]["queuelen"] < count \
                        and time.monotonic() < deadline:
                    time.sleep(0.1)
                bench.note("memory, a further waiting connection%s" % (
                    " with TLS" if tls else ""), "native",
                    (relay.memory() - before) / count)
            finally:
                close_all(sockets)


def part_tls(bench):
    """Kept-alive requests a second of 16 clients, plain and TLS, by wrk."""
    if not shutil.which("wrk"):
        return print("  wrk is not installed: TLS is not measured")
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
    script = bench.path("post.lua")
    body = json.dumps(target.body("tokens=1 rate=0", False))
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
    """Our clients compared with wrk: they must not be the bottleneck."""
    def work(target):
        got = bench.ask(target, target.request(), 16)
        bench.note("requests/s, 16 clients, ours", target.name,
                   got["answers"] / got["seconds"])
        bench.note("requests/s, 16 clients, wrk", target.name, wrk(bench, target, 16))

    if shutil.which("wrk"):
        bench.each(work)


def part_import(bench):
    """`import neuroengine`, compared with the bare interpreter."""
    wall, cpu = {}, {}
    env = dict(os.environ, PYTHONPYCACHEPREFIX=bench.directory, PYTHONPATH=ROOT)
    env.pop("PYTHONDONTWRITEBYTECODE", None)     # it would be compiled each time
    for code in ["pass", "import neuroengine"] * 15:
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
                       got["cpu_used"][0] / got["answers"])


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


def part_curves(bench):
    """What a job costs against the number of everything else."""
    args = [sys.executable, os.path.join(HERE, "curves.py")]
    said = subprocess.run(args, stdout=subprocess.PIPE, check=True, timeout=300).stdout
    for title, points in json.loads(said).items():
        bench.curve(title, [[n, value * 1e-6] for n, value in points])
    bench.curve("request over sockets, by services",
                [[n, socket_cost(bench, services=n)] for n in (1, 100, 1000, 10000)])
    bench.curve("request over sockets, by parked polls",
                [[n, socket_cost(bench, polls=n)] for n in (1, 100, 1000, 5000)])


def socket_cost(bench, services=1, polls=0):
    """The relay's CPU seconds a request, among other services and parked polls."""
    with bench.relay() as relay, contextlib.ExitStack() as stack:
        relay.limits = dict(relay.limits, **{"max-sessions": 10**6, "poll-seconds": 600})
        relay.start_relay()
        relay.key, parked = relay.relay.register(SERVICE), relay.relay.register("Parked")
        if services > 1:
            data = relay.relay.data
            relay.end()                      # and write the others into its file
            with contextlib.closing(sqlite3.connect(data)) as base, base:
                row = base.execute("SELECT * FROM services WHERE name='Parked'").fetchone()
                at = row.index("Parked")
                base.executemany(
                    "INSERT INTO services VALUES (%s)" % ",".join("?" * len(row)),
                    (row[:at] + ("S%d" % n,) + row[at + 1:] for n in range(services - 1)))
            relay.start_relay(data)
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
        return got["cpu_used"][0] / got["answers"]


def part_soak(bench):
    """Memory before and after a million jobs; takes minutes, so it must be named."""
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


# Those of each round, those of once a run, those that must be named, those of --quick.
ROUND = {"start": part_start, "requests": part_requests, "shapes": part_shapes,
         "first": part_first, "far": part_far, "tokens": part_tokens, "pace": part_pace}
ONCE = {"script": part_script, "waiting": part_waiting, "tls": part_tls,
        "check": part_check, "import": part_import, "pythons": part_pythons,
        "curves": part_curves}
NAMED = {"soak": part_soak}
QUICK = ("requests", "pace")
OURS = {"share": Share, "listen": Listen, "coroutines": Coroutines, "native": Native, "/v1": OpenAI}
PEERS = {"hello": Hello, "nginx": Nginx, "ssh": Ssh, "fastchat": FastChat,
         "litellm": LiteLLM, "llm": Direct}


##############################################################################
# Output
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
        if list(values) == ["native"] and len(columns) > 1:
            alone.append("| %s | %s |" % (row, spread(values["native"], show)))
        else:
            lines.append("| %s | %s |" % (row, " | ".join(cells)))
    return "\n".join(lines + alone * (len(alone) > 3))


def ratios(bench):
    """How many times another's figure ours is, each within one round."""
    names = [target.name for target in bench.targets]
    ours = [name for name in names if name in OURS]
    others = [name for name in names if name.partition(",")[0] not in OURS]
    pairs = [(a, b) for a in ours for b in names if b.startswith(a + ",")]    # --against
    pairs = pairs or [(a, b) for b in others for a in ours]
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
    return "\n".join(lines) if pairs else ""


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
            "command": "python bench/measure/compare.py " + " ".join(options.argv),
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
    add("--ours", metavar="NAMES", help="our columns, of %s; otherwise all, and the last two "
        "with --quick" % ", ".join(OURS))
    add("--peers", metavar="NAMES", help="what to compare with, of %s; otherwise all but "
        "llm, the fake LLM itself, and none with --quick" % ", ".join(PEERS))
    add("--against", metavar="CHECKOUT", action="append", default=[],
        help="the folder of another checkout, measured in the same rounds; repeatable")
    add("--quick", action="store_true", help="only %s; one run" % " and ".join(QUICK))
    add("--runs", type=int, help="how often all is done (default: 2; with --quick 1)")
    add("--rounds", type=int, help="rounds of a run (default: 3; with --quick 5)")
    add("--seconds", type=float, default=1.5, help="of each cell (default: %(default)s)")
    add("--patience", type=float, default=15, metavar="SECONDS",
        help="for all streams of a cell to start (default: %(default)s)")
    add("--json", metavar="FILE", help="write all figures there")
    add("--charts", metavar="DIR", help="draw charts there, as SVG")
    return parser


def attempt(what, work, *args, otherwise=lambda: None):
    """Do a piece of work; if it fails, print why and go on."""
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


def defaults(options):
    """Fill in what was not said, which differs with --quick."""
    def default(name, normal, quick):
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else normal)

    default("only", ",".join(list(ROUND) + list(ONCE)), ",".join(QUICK))
    default("ours", ",".join(OURS), "native,/v1")
    default("peers", "hello,nginx,ssh,fastchat,litellm", "")
    default("runs", 2, 1)
    default("rounds", 3, 5)


def chosen(text, known):
    """The names in a text with commas; ends the program if one is not known."""
    names = [name for name in text.split(",") if name]
    if set(names) - set(known):
        sys.exit("%s: there are %s" % (text, ", ".join(known)))
    return names


def main(argv=None):
    options = build_parser().parse_args(argv)
    options.argv = sys.argv[1:] if argv is None else argv
    defaults(options)
    parts = chosen(options.only, dict(ROUND, **ONCE, **NAMED))
    ours, peers = chosen(options.ours, OURS), chosen(options.peers, PEERS)
    if options.install:
        install()
    unlimited_files()
    end_on_signals()
    roots = [(ROOT, "")] + [(path, ", " + os.path.basename(os.path.abspath(path)))
                            for path in options.against]
    stopped = False
    with Bench(options) as bench:
        for name in ours:                  # side by side, so that they meet the same load
            bench.targets += [OURS[name](bench, root, name + tail) for root, tail in roots]
        for name in peers:
            if getattr(PEERS[name], "there", lambda: True)():
                bench.targets.append(PEERS[name](bench))
            else:
                print("%s is not installed" % name)
        try:
            bench.start()
            measure(bench, parts)
        except KeyboardInterrupt:
            stopped = True
            print("stopped")
        finally:
            for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
                signal.signal(number, signal.SIG_IGN)
    facts = dict(about(options), loads=bench.loads)
    print("\n".join("%s: %s" % fact for fact in facts.items()))
    for text in table(bench), ratios(bench), curve_table(bench) if bench.curves else "":
        print("\n" + text)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(dict(facts, values=bench.values, curves=bench.curves), file, indent=1)
    if options.charts:
        charts.draw(options.charts, facts, bench.values, bench.curves)
    return 130 if stopped else 0


if __name__ == "__main__":
    sys.exit(main())
