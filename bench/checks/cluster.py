#!/usr/bin/env python3
"""Several relays on one engine under faults: the longest time without an answer, and
whether every answer is whole.

    python bench/checks/cluster.py                 # each fault once, and a table
    python bench/checks/cluster.py --minutes 10    # faults at random, after that
    python bench/checks/cluster.py --scaling       # CPU per prompt with 1, 2 and 4 relays

Three relays on an engine, HAProxy in front that takes turns among those that are healthy,
two providers, and clients that repeat a failed prompt with the same Idempotency-Key. Each
relay reaches the engine through a proxy, so that it can be cut off. Every answer must be
the right one, of one generation, whole; a stream may end with an error, never with a gap.

Needs redis-server (or valkey-server: --server) and haproxy. POSIX, loopback only. Exit
status 1 if anything was wrong.
"""

import argparse
import collections
import contextlib
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.join(HERE, "..")]

from faults import judge, tokens
from harness import (BROKEN, ROOT, Proxy, Skip, Workspace, answer_of, ask, connect,
                     end_on_signals, free_port, need, percentile, prompt_of, wait_for)

from neuroengine import Neuroengine, NeuroengineError, NeuroengineServer

SERVICE = "Shared"
SECRET = "bench" * 8
RECOVERY_SECONDS = 12        # watched after each fault
CLIENTS = 8


def provide(url, name, key):
    """Be a provider that tells which prompts it runs; the whole of its process."""
    def answer(request):
        print("run %s" % request["message"], flush=True)
        for token in tokens(request["message"], "%08x" % random.getrandbits(32)):
            time.sleep(0.002)
            yield token

    server = NeuroengineServer(url)
    while server.login(name, key) == -1:
        time.sleep(0.1)
    print("logged in", flush=True)
    server.listen(answer, 16)


##############################################################################
# The programs
##############################################################################


class Line(Proxy):
    """A relay's line to the engine, which can be cut."""

    up = True

    def passing(self, data, pair, to_client):
        if not self.up:
            raise OSError("cut")
        return data

    def cut(self):
        self.up = False
        with self.lock:
            pairs = list(self.pairs)
        for pair in pairs:
            for sock in pair:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def mend(self):
        self.up = True


class Engine:
    """A Redis or Valkey server; a second one follows it if asked."""

    def __init__(self, space, server, leader=None):
        self.space, self.server, self.leader = space, server, leader
        self.port, self.directory = free_port(), space.path("engine-%d")
        os.mkdir(self.directory)
        self.start()

    def start(self):
        more = ["--replicaof", "127.0.0.1", self.leader.port] if self.leader else []
        self.child = self.space.spawn(
            "engine", self.server, "--port", self.port, "--bind", "127.0.0.1", "--dir",
            self.directory, "--appendonly", "yes", "--appendfsync", "always", "--save", "",
            *more)
        wait_for(self.answers, 10, "the start of the engine", self.child.said)

    def answers(self):
        return self.command("PING") == b"+PONG\r\n"

    def command(self, line):
        """Send one command; the bytes that answer it."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), 1) as sock:
                sock.sendall(line.encode() + b"\r\n")
                return sock.recv(65536)
        except OSError:
            return b""


class Node:
    """A relay of the cluster."""

    def __init__(self, space, urls, *options):
        self.space, self.urls, self.options, self.port = space, urls, options, free_port()
        self.url = "http://127.0.0.1:%d" % self.port
        self.start()

    def start(self):
        self.child = self.space.python(
            "relay", os.path.join(ROOT, "neuroengine_server.py"), "--host", "127.0.0.1",
            "--port", self.port, "--engine", self.urls, "--advertise", self.url,
            "--drain-seconds", 5, "--trusted-proxy", "127.0.0.1",
            "--max-prompts-per-minute", 10**7, "--max-anonymous-per-day", 10**9,
            "--max-registrations-per-hour", 10**6, *self.options,
            env={"NEUROENGINE_CLUSTER_SECRET": SECRET})

    def ready(self):
        try:
            return ask(self.url, "GET", "/healthz", timeout=2)[0] == 200
        except BROKEN:
            return False

    def metrics(self):
        text = ask(self.url, "GET", "/metrics", source="127.0.0.2")[1].decode()
        return {name[len("neuroengine_"):]: float(value) for name, value in
                (line.split() for line in text.splitlines() if line[0] != "#")}


HAPROXY = """
defaults
    mode http
    timeout connect 1s
    timeout check %s
    timeout client 60s
    timeout server 3700s
    option forwardfor
    option abortonclose
    option http-no-delay
    option redispatch 1
    retries 3
    default-server check inter 500ms fall 1 rise 1 on-marked-down shutdown-sessions
frontend all
    bind 127.0.0.1:%d
    http-request set-var(txn.service) path,field(2,/),lower
    http-request set-var(txn.service) path,field(3,/),lower if { path_beg /provider/ }
    http-request set-var(txn.service) path,field(4,/),lower if { path_beg /api/services/ }
    default_backend relays
backend relays
    balance %s
    option httpchk GET /healthz?drain=404
    http-check disable-on-404
%s
"""


class Balancer:
    """HAProxy in front of the relays."""

    def __init__(self, space, nodes, balance="roundrobin", checks="500ms"):
        """checks: how soon a relay must answer to be healthy; None: it always is."""
        self.port = free_port()
        self.url = "http://127.0.0.1:%d" % self.port
        path = space.path("haproxy-%d.cfg")
        with open(path, "w", encoding="ascii") as file:
            file.write(HAPROXY % (checks or "1s", self.port, balance, "\n".join(
                "    server r%d 127.0.0.1:%d%s" % (n, node.port, "" if checks else " no-check")
                for n, node in enumerate(nodes))))
        self.child = space.spawn("haproxy", "haproxy", "-db", "-f", path)
        wait_for(lambda: self._up(), 20, "the start of HAProxy", self.child.said)

    def _up(self):
        try:
            return ask(self.url, "GET", "/healthz", timeout=2)[0] == 200
        except BROKEN:
            return False


##############################################################################
# The clients
##############################################################################


class Clients:
    """Clients that ask until they are stopped, and note when they were answered."""

    def __init__(self, url, count=CLIENTS):
        self.url, self.stopping = url, False
        self.answered, self.wrong, self.errors = [], [], collections.Counter()
        self.unanswered = []
        self.numbers = itertools.count()
        self.threads = [threading.Thread(target=self._ask, args=(n,), daemon=True)
                        for n in range(count)]
        for thread in self.threads:
            thread.start()

    def _ask(self, number):
        while not self.stopping:
            prompt = "p%d" % next(self.numbers)
            if number % 4 == 3:
                self._stream(prompt)
            else:
                self._whole(prompt)

    def _whole(self, prompt):
        key, began = "%032x" % random.getrandbits(128), time.monotonic()
        while True:
            try:
                status, body = ask(self.url, "POST", "/" + SERVICE, {"message": prompt},
                                   timeout=30, headers={"Idempotency-Key": key})
            except BROKEN:
                status, body = 0, {"error": "broken"}
            if status == 200:
                return self._note(prompt, body["reply"])
            error = body.get("error") if isinstance(body, dict) else "status %d" % status
            self.errors[error] += 1
            if time.monotonic() - began > 100:
                return self.unanswered.append((prompt, error))
            time.sleep(0.1)

    def _stream(self, prompt):
        """The stream of the Python client, which resumes by itself."""
        texts = []
        try:
            for text in Neuroengine(SERVICE, self.url).stream(prompt):
                texts.append(text)
        except NeuroengineError as error:
            self.errors["stream " + error.name] += 1
            if judge(prompt, "".join(texts)) == "wrong":
                self.wrong.append((prompt, "".join(texts)))
            return time.sleep(0.1)
        self._note(prompt, "".join(texts))

    def _note(self, prompt, text):
        if judge(prompt, text) == "whole":
            self.answered.append(time.monotonic())
        else:
            self.wrong.append((prompt, text))

    def longest_silence(self, since, until):
        """The longest time between two answers."""
        times = [since] + [t for t in list(self.answered) if since < t < until] + [until]
        return max(after - before for before, after in zip(times, times[1:]))

    def stop(self):
        self.stopping = True
        for thread in self.threads:
            thread.join(110)


##############################################################################
# The faults
##############################################################################


class Cluster:
    """Relays, engine, balancer, providers and clients."""

    def __init__(self, space, server, checks="500ms"):
        self.space, self.server = space, server
        self.engine = Engine(space, server)
        self.lines = [Line(self.engine.port) for _ in range(3)]
        self.nodes = [Node(space, "redis://127.0.0.1:%d" % line.port) for line in self.lines]
        for node in self.nodes:
            wait_for(node.ready, 60, "the start of a relay", node.child.said)
        self.balancer = Balancer(space, self.nodes, checks=checks)
        self.names = []
        self.key = self.register(SERVICE)
        self.providers = [self.start_provider() for _ in range(2)]
        for provider in self.providers:
            provider.expect("logged in", 20)
        self.clients = Clients(self.balancer.url)
        wait_for(lambda: len(self.clients.answered) > 20, 20, "the first answers")

    def register(self, name):
        wanted = name
        for number in range(100):
            with contextlib.suppress(*BROKEN):
                status, answer = ask(self.balancer.url, "POST", "/api/services",
                                     {"name": name})
                if status == 201:
                    self.names.append(name)
                    return answer["key"]
                if status == 409:              # by us, and the answer was lost with its relay
                    name = "%s-%d" % (wanted, number)
            time.sleep(0.1)
        raise AssertionError("%s could not be registered: %s" % (name, answer))

    def start_provider(self):
        return self.space.python("provider", os.path.abspath(__file__), "--provide",
                                 self.balancer.url, SERVICE, self.key)

    def home(self):
        """The node that is home to the service."""
        for _ in range(100):
            for node in self.nodes:
                with contextlib.suppress(*BROKEN):
                    if node.child.process.poll() is None and node.metrics()["homes"] and (
                            node.metrics()["sessions"]):
                        return node
            time.sleep(0.1)
        raise AssertionError("no relay is home")

    def runs(self):
        """How often each prompt was run."""
        return collections.Counter(
            line for provider in self.providers for line in provider.said().splitlines()
            if line.startswith("run "))

    def restart(self, node):
        node.start()
        wait_for(node.ready, 60, "the restart of a relay", node.child.said)

    # Each fault returns what ends it.

    def home_killed(self):
        home = self.home()
        home.child.end(signal.SIGKILL)
        return lambda: self.restart(home)

    def home_stopped_10_s(self):
        home = self.home()
        home.child.send(signal.SIGSTOP)
        time.sleep(10)
        home.child.send(signal.SIGCONT)

    def home_sigterm(self):
        home = self.home()
        home.child.send(signal.SIGTERM)
        home.child.process.wait(20)
        return lambda: self.restart(home)

    def engine_killed_and_restarted(self):
        self.engine.child.end(signal.SIGKILL)
        self.engine.start()

    def engine_down_10_s(self):
        self.engine.child.end(signal.SIGKILL)
        time.sleep(10)
        self.engine.start()

    def engine_frozen_10_s(self):
        self.engine.child.send(signal.SIGSTOP)
        time.sleep(10)
        self.engine.child.send(signal.SIGCONT)

    def engine_emptied(self):
        self.engine.command("FLUSHALL")

    def engine_replaced_by_replica(self):
        replica = Engine(self.space, self.server, self.engine)
        wait_for(lambda: b"master_link_status:up" in replica.command("INFO replication"), 20,
                 "the replica's first copy")
        time.sleep(2)
        self.engine.child.end(signal.SIGKILL)
        replica.command("REPLICAOF NO ONE")
        for line in self.lines:
            line.target = replica.port
        self.engine = replica
        replica.leader = None

    def home_cut_from_engine_10_s(self):
        line = self.lines[self.nodes.index(self.home())]
        line.cut()
        time.sleep(10)
        line.mend()

    def home_cut_off_and_stopped_3_s(self):
        """The others take its services over, and it cannot hear of that from the engine."""
        home = self.home()
        line = self.lines[self.nodes.index(home)]
        line.cut()
        time.sleep(6)                      # its membership has ended
        home.child.send(signal.SIGSTOP)
        time.sleep(3)
        home.child.send(signal.SIGCONT)
        time.sleep(10)
        line.mend()

    def other_relay_killed(self):
        home = self.home()
        other = next(node for node in self.nodes if node is not home)
        other.child.end(signal.SIGKILL)
        return lambda: self.restart(other)

    FAULTS = ("home_killed", "home_stopped_10_s", "home_sigterm", "other_relay_killed",
              "engine_killed_and_restarted", "engine_down_10_s", "engine_frozen_10_s",
              "engine_emptied", "engine_down_60_s", "engine_replaced_by_replica",
              "home_cut_from_engine_10_s", "home_cut_off_and_stopped_3_s")
    RANDOM = [name for name in FAULTS
              if name not in ("engine_down_60_s", "engine_replaced_by_replica")]

    def engine_down_60_s(self):
        self.engine.child.end(signal.SIGKILL)
        time.sleep(60)
        self.engine.start()

    def troubles(self):
        """Stop the clients, and return what was wrong."""
        self.clients.stop()
        time.sleep(4)
        clients, lost = self.clients, self.lost()
        broken = [node.url for node in self.nodes if "internal_error" in node.child.said()]
        print("answered %d, wrong %d, unanswered %d, lost registrations %d, relays with "
              "internal errors %d; errors seen: %s" % (
                  len(clients.answered), len(clients.wrong), len(clients.unanswered),
                  len(lost), len(broken), dict(clients.errors)))
        return clients.wrong + clients.unanswered + lost + broken

    def all_know(self):
        """Whether each relay answers, and knows all services."""
        try:
            return not self.lost()
        except BROKEN:
            return False

    def lost(self):
        """The services that some relay does not know, though they were registered."""
        missing = []
        for node in self.nodes:
            models = ask(node.url, "GET", "/api/models")[1]
            there = {model["name"] for model in models}
            missing += [(node.url, name) for name in self.names if name not in there]
        return missing


def run_fault(cluster, name, recovery=RECOVERY_SECONDS):
    """One fault; the longest time without an answer in seconds, and how many prompts were
    run twice, which a relay's death explains: its memory is lost."""
    since, runs = time.monotonic(), cluster.runs()
    end = getattr(cluster, name)()
    time.sleep(recovery)
    silence = cluster.clients.longest_silence(since, time.monotonic())
    twice = sum(count > 1 and runs[prompt] < 2 for prompt, count in cluster.runs().items())
    if end:
        end()
        time.sleep(3)
    return silence, twice


BOUNDS = {"home_killed": 6, "home_stopped_10_s": 9, "home_sigterm": 2,   # others: 6
          "home_cut_off_and_stopped_3_s": 9}
UNSEEN = ("home_sigterm", "engine_killed_and_restarted", "engine_down_10_s",
          "engine_down_60_s", "engine_frozen_10_s")     # no prompt fails or runs twice


def short_run(server):
    """A short run, for the test suite; a list of what was wrong."""
    with Workspace("cluster") as space:
        cluster = Cluster(space, server, "9s")       # the machine may be busy
        twice = run_fault(cluster, "home_sigterm", 2)[1]
        run_fault(cluster, "home_killed", 4)
        return cluster.troubles() + ["a prompt was run twice"] * twice


def say_table(cluster, names):
    """Print a line for each fault; return what took too long."""
    clients, troubles = cluster.clients, []
    print("%-30s %10s %8s %6s  %s" % ("fault", "silent s", "rerun", "wrong", "errors seen"))
    for name in names:
        errors, wrong = collections.Counter(clients.errors), len(clients.wrong)
        silence, twice = run_fault(cluster, name)
        seen = collections.Counter(clients.errors) - errors
        print("%-30s %10.2f %8d %6d  %s" % (
            name, silence, twice, len(clients.wrong) - wrong,
            ", ".join("%s %d" % pair for pair in sorted(seen.items()))), flush=True)
        if silence > BOUNDS.get(name, 6):
            troubles.append("%s: %.1f s without an answer" % (name, silence))
        if name in UNSEEN and (seen or twice):
            troubles.append("%s: errors %s, prompts run twice: %d" % (name, dict(seen), twice))
    return troubles


def run_random(cluster, minutes, seed):
    """Faults at random, never two at once, with registrations between them."""
    rand, until = random.Random(seed), time.monotonic() + 60 * minutes
    count = collections.Counter()
    while time.monotonic() < until:
        name = rand.choice(cluster.RANDOM)
        count[name] += 1
        end = getattr(cluster, name)()
        time.sleep(rand.uniform(1, 6))
        if end:
            end()
        cluster.register("N%d" % len(cluster.names))
        # One that only its relay knows is lost with both: that would be two faults at once.
        wait_for(cluster.all_know, 30, "That every relay knows it")
        provider = rand.randrange(len(cluster.providers))
        if rand.random() < 0.3:
            cluster.providers[provider].end(signal.SIGKILL)
            cluster.providers[provider] = cluster.start_provider()
    print("%d faults: %s" % (sum(count.values()), ", ".join(
        "%s %d" % pair for pair in sorted(count.items()))))


##############################################################################
# Scaling
##############################################################################


def measure_scaling(space, server, seconds=10):
    """CPU per prompt of all relays together, for 1, 2 and 4 of them."""
    print("relays  balance     prompts/s  relays' CPU us/prompt  p50 ms  forwarded")
    for balance in ("hash path_sub", "roundrobin"):
        for count in (1, 2, 4):
            measure_one(space, server, count, balance, seconds)


HASH = """hash var(txn.service)
    hash-type consistent"""


def measure_one(space, server, count, balance, seconds):
    engine = Engine(space, server)
    nodes = [Node(space, "redis://127.0.0.1:%d" % engine.port) for _ in range(count)]
    for node in nodes:
        wait_for(node.ready, 60, "the start of a relay", node.child.said)
    balancer = Balancer(space, nodes, HASH if balance.startswith("hash") else balance, None)
    names = ["S%d" % n for n in range(16)]
    providers = []
    for name in names:
        key = ask(balancer.url, "POST", "/api/services", {"name": name})[1]["key"]
        providers.append(space.python("provider", os.path.join(
            ROOT, "bench", "harness.py"), "--provide", balancer.url, name, key, "8"))
    for provider in providers:
        provider.expect("logged in", 30)
    time.sleep(2)
    stop, latencies, failures = threading.Event(), [], []

    def client(name):
        with contextlib.closing(connect(balancer.url)) as connection:
            while not stop.is_set():
                prompt, began = prompt_of(random.getrandbits(30), 1), time.monotonic()
                connection.request("POST", "/" + name, json.dumps({"message": prompt}))
                response = connection.getresponse()
                status, data = response.status, response.read()
                if status != 200 or json.loads(data)["reply"] != "".join(answer_of(prompt)):
                    return failures.append((status, data[:200]))
                latencies.append(time.monotonic() - began)

    threads = [threading.Thread(target=client, args=(names[n % 16],), daemon=True)
               for n in range(16)]
    for thread in threads:
        thread.start()
    time.sleep(3)
    latencies.clear()
    cpu = sum(node.child.cpu() for node in nodes)
    forwarded = sum(node.metrics()["forwarded_total"] for node in nodes)
    time.sleep(seconds)
    done = len(latencies) or 1
    cpu = sum(node.child.cpu() for node in nodes) - cpu
    forwarded = sum(node.metrics()["forwarded_total"] for node in nodes) - forwarded
    stop.set()
    if failures:
        raise AssertionError(failures[:3])
    print("%-7d %-10s %10.0f %22.0f %7.1f %10.0f" % (
        count, balance.split()[0], done / seconds, 1e6 * cpu / done,
        1000 * percentile(latencies, 0.5), forwarded), flush=True)
    for thread in threads:
        thread.join(10)
    space.end_children()


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--server", default="redis-server")
    parser.add_argument("--only", action="append", help="only this fault")
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--provide", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.provide:
        return provide(*options.provide)
    end_on_signals()
    try:
        need(options.server)
        need("haproxy")
    except Skip as skip:
        print(skip)
        return 1
    print(subprocess.run([options.server, "--version"], stdout=subprocess.PIPE,
                         check=True).stdout.decode().strip())
    space, failed = Workspace("cluster"), True
    try:
        if options.scaling:
            measure_scaling(space, options.server)
            failed = False
            return 0
        cluster = Cluster(space, options.server)
        troubles = []
        if options.only or not options.minutes:
            troubles += say_table(cluster, options.only or cluster.FAULTS)
        if options.minutes:
            run_random(cluster, options.minutes, options.seed)
        troubles += cluster.troubles()
        for trouble in troubles[:10]:
            print("TROUBLE", trouble)
        failed = bool(troubles)
        return int(failed)
    finally:
        space.close(keep=failed)


if __name__ == "__main__":
    sys.exit(main())
