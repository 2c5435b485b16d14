#!/usr/bin/env python3
"""Attack a relay as the open internet does, and compare with the promised bounds.

    python bench/checks/siege.py [--only idle,slow ...] [--json FILE] [--keep-logs] [--list]

Each part starts its own relay with a provider that streams. During the attack a modest
client in another process measures what everybody else notices: control requests (GET
/healthz, each on a new connection) and prompts, whose answers it checks. A part prints one
line of figures, with the bound of each that was promised and a "!" before those that
missed it.

Some parts need more than Python: openssl (TLS), slowhttptest (slow), nginx and haproxy
(smuggling), cc (clock), root (threads, disk-full). A part that cannot run here says why,
and does not count as a failure. More parts are in hostile.py.

Linux, standard library only, loopback only. Exit status 1 if anything failed.
"""

import argparse
import contextlib
import glob
import json
import os
import re
import resource
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from harness import (MB, ROOT, SERVICE, Proxy, Relay, Skip, answer_of,
                     close_all, connect, end_on_signals, free_port, need, percentile,
                     prompt_of, swap, unlimited_files, wait_for)
import hostile  # noqa: F401  (its parts are among PARTS)
from watch import (PARTS, Figures, Lives, Modest, Siege, client_hello, first_of, hold,
                   kept_alive, part, sent)

##############################################################################
# The parts
##############################################################################

@part("tls-silent")
def tls_silent(siege, figures):
    """500 peers that never begin a TLS handshake and 50 that drip one delay nobody."""
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


@part("slow")
def slow(siege, figures):
    """slowhttptest in all modes and clients that drip bytes, plain and TLS at once."""
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


DRIPS = ((b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n", b"X: y\r\n"),
         (b"POST /Bench HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4096\r\n\r\n", b"x"),
         (b"POST /Bench HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n",
          b"1\r\nx\r\n"))


def slow_attack(siege, relay, mode, path, seconds):
    return siege.spawn("slow" + mode, "slowhttptest", mode, "-u", relay.url + path,
                       "-c", 150, "-r", 50, "-i", 2, "-x", 10, "-l", seconds, "-p", 5,
                       "-w", 1, "-y", 16, "-n", 5, "-z", 2, "-k", 3)


@part("idle")
def idle(siege, figures):
    """10,000 kept-alive connections, plain, then TLS: memory of each, and others' p99."""
    number = siege.options.connections
    for title, tls, most in (("plain", False, 150), ("TLS", True, 600)):
        with Relay(siege, "--max-connections", number + 500, "--idle-seconds", 900,
                   tls=tls) as relay:
            before, began = relay.child.memory(), time.monotonic()
            fds = hold(number, lambda n, relay=relay: kept_alive(relay, n))
            took = time.monotonic() - began
            try:
                with Modest(relay) as others:
                    time.sleep(10)
                memory = relay.child.memory()
                figures.add(title + ": held", relay.child.descriptors(), least=number)
                figures.add("opened in", took, "s")
                figures.add("memory", memory / MB, "MB", most=most)
                figures.add("each", (memory - before) / 1000 / max(1, len(fds)), "KB")
                others.judge(figures, most=100)
            finally:
                close_all(fds)


@part("descriptors")
def descriptors(siege, figures):
    """400 connections to a relay with 256 descriptors: it refuses some, and recovers."""
    def few():
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))

    for title, tls in (("plain", False), ("TLS", True)):
        with Relay(siege, tls=tls, preexec=few) as relay:
            def open_one(n, relay=relay, tls=tls):
                sock = socket.create_connection(("127.0.0.1", relay.port), 5)
                if not tls:                # half a head: those that are idle it may close
                    sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n")
                return sock

            socks = hold(400, open_one)
            time.sleep(2)
            figures.add(title + ": descriptors", relay.child.descriptors(), least=250)
            cpu, began = relay.child.cpu(), time.monotonic()
            time.sleep(4)
            cpu = 100 * (relay.child.cpu() - cpu) / (time.monotonic() - began)
            began = time.monotonic()
            with contextlib.closing(open_one(0)) as late:
                with contextlib.suppress(OSError):
                    late.sendall(b"\r\n" if not tls else b"\x16")
                answer = first_of(late)
            figures.add("CPU", cpu, "%", most=10)
            figures.add("one more is answered", answer, good=answer in ("200", "503", "closed"))
            figures.add("within", time.monotonic() - began, "s", most=3)
            close_all(socks)
            figures.add("healthy again in", wait_for(relay.healthy, 10, "health"), "s",
                        most=2)
            figures.check("answers", relay.prompt(prompt_of("after")))
            figures.add("tracebacks", relay.tracebacks(), exactly=0)


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
            os.chmod(siege.certificate()[1], 0o644)
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
    """8 MB posted to paths that answer 413, 401 and 404 at once: the status arrives."""
    body = b"x" * (8 << 20)
    for title, tls in (("plain", False), ("TLS", True)):
        with Relay(siege, "--max-request-bytes", 1 << 20, tls=tls) as relay:
            for path, status in (("/" + SERVICE, 413), ("/a/b/c/d", 404),
                                 ("/provider/%s/reply" % SERVICE, 401)):
                got, words = 0, set()
                for _ in range(20):
                    try:               # a client that sends all before it reads
                        with contextlib.closing(relay.dial()) as sock:
                            sock.sendall(b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: "
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
    """Ten clients that read 5 MB at a byte a second: the provider is not slowed down."""
    with Relay(siege, workers=32) as relay:
        big = prompt_of("fast", 500, 10000)
        relay.prompt(big)
        before = relay.child.memory() / MB
        socks = []
        with Lives(relay) as lives, Modest(relay) as modest_client:
            for n in range(10):
                path, body = slow_request(n)
                socks.append(sent(relay, b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: "
                                  b"%d\r\n\r\n" % (path, len(body)) + body, buffer=2048))
            began, most = time.monotonic(), 0
            while time.monotonic() - began < 70 and (lives.now() or most < 50):
                time.sleep(1)
                most = max(most, relay.child.memory() / MB)
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
    return b"/Bench", json.dumps({"message": prompt, "stream": True}).encode()


@part("slow-writer")
def slow_writer(siege, figures):
    """A provider that makes a token in 20 s keeps its job; a body at a byte a second is cut."""
    with Relay(siege) as relay:
        answers = []
        prompt = prompt_of("slow", 3, 12, 20.0)
        asker = threading.Thread(target=lambda: answers.append(relay.prompt(
            prompt, timeout=100)))
        asker.start()
        head = b"POST /Bench HTTP/1.1\r\nHost: localhost\r\n"
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
    """A full disk: prompts go on, a revoked key is refused, what cannot be saved says 503."""
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
    figures.add("revoking then", status, exactly=503)     # in force, and not yet saved
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


@part("cert-swap")
def cert_swap(siege, figures):
    """A certificate renewed under load is loaded; a broken one is not."""
    cert, key = siege.certificate("swap")
    new_cert, new_key = siege.certificate("renewed")
    other_cert, other_key = siege.certificate("other")
    with open(cert) as file:
        old = file.read()
    with Relay(siege, tls=True, cert=(cert, key)) as relay, \
            Modest(relay, every=0.01) as modest_client:
        def served():
            return ssl.get_server_certificate(("127.0.0.1", relay.port))

        def is_served(path):
            with open(path) as file:
                return served().strip() == file.read().strip()

        time.sleep(1)
        figures.check("the first one is served", served().strip() == old.strip())
        old_connection = relay.dial()
        swap(new_cert, cert)
        time.sleep(0.5)                    # renewal writes one file, then the other
        swap(new_key, key)
        figures.add("the new one after", wait_for(lambda: is_served(new_cert), 10,
                                                  "the new certificate", relay.said),
                    "s", most=4)
        warned = relay.said().count("certificate_not_renewed")
        figures.add("warnings until then", warned, most=1)
        old_connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        figures.check("an old connection lives", first_of(old_connection) == "200")
        old_connection.close()
        for title, spoil in (("wrong key", lambda: swap(other_key, key)),
                             ("half a file", lambda: swap(other_cert, cert, 0.5)),
                             ("no file", lambda: os.unlink(cert))):
            before = relay.said().count("certificate_not_renewed")
            spoil()
            time.sleep(5)
            warnings = relay.said().count("certificate_not_renewed") - before
            figures.check(title + ": the one before is served", is_served(new_cert))
            figures.add("warnings", warnings, exactly=1)
        swap(other_cert, cert)
        swap(other_key, key)
        relay.child.process.send_signal(signal.SIGHUP)
        figures.add("repaired, and SIGHUP: loaded after", wait_for(
            lambda: is_served(other_cert), 10, "the third certificate", relay.said), "s",
            most=1)
        figures.add("tracebacks", relay.tracebacks(), exactly=0)
    modest_client.judge(figures)


@part("brute-force")
def brute_force(siege, figures):
    """A thousand wrong keys from one address: soon 429, and others notice nothing."""
    guesser = "127.0.0.77"
    with Relay(siege) as relay, Modest(relay) as modest_client:
        name = "/api/services/" + SERVICE
        statuses, times = [], []
        for n in range(1000):
            began = time.monotonic()
            status, _ = relay.ask("GET", name, key="ne_guess%d" % n, source=guesser)
            times.append(time.monotonic() - began)
            statuses.append(status)
        first = statuses.index(429) if 429 in statuses else 1000
        figures.add("401 before the first 429", first, least=1, most=100)
        figures.add("of 1000, 401", statuses.count(401), most=100)
        figures.add("429", statuses.count(429), least=900)
        figures.add("in", sum(times), "s")
        paths = (("PATCH", name, {}), ("POST", name + "/keys", {}),
                 ("POST", "/provider/%s/login" % SERVICE, {}))
        # One guess more is allowed every two seconds, which may be one of these.
        figures.add("other paths refuse it, too", sum(
            relay.ask(method, path, body, "ne_guess", source=guesser)[0] == 429
            for method, path, body in paths), least=2)
        status, answer = relay.ask("GET", name, key=relay.key, source=guesser)
        figures.add("the right key from there", status, exactly=200)
        figures.check("a prompt from there", relay.prompt(prompt_of("x"), source=guesser))
        status, _ = relay.ask("GET", name, key="ne_guess", source="127.0.0.78")
        figures.add("another address's wrong key", status, exactly=401)
        figures.check("tells when to try again", answer_headers(
            relay, name, "ne_guess", guesser).get("Retry-After", "").isdigit())
    modest_client.judge(figures)
    with Relay(siege, "--max-wrong-keys-per-minute", 10**6) as relay:
        wrong, unknown = [], []
        for n in range(600):               # in turns: whatever else goes on strikes both
            for path, times in ((name, wrong), ("/api/services/Nobody", unknown)):
                began = time.monotonic()
                relay.ask("GET", path, key="ne_guess%d" % n)
                times.append(1000 * (time.monotonic() - began))
        difference = abs(percentile(wrong, 0.5) - percentile(unknown, 0.5))
        figures.add("wrong key p50", percentile(wrong, 0.5), "ms")
        figures.add("unknown service p50", percentile(unknown, 0.5), "ms")
        figures.add("difference", difference, "ms",
                    most=max(0.1, percentile(wrong, 0.75) - percentile(wrong, 0.25)))


def answer_headers(relay, path, key, source):
    connection = connect(relay.url, 10, source)
    with contextlib.closing(connection):
        connection.request("GET", path, headers={"Authorization": "Bearer " + key})
        return connection.getresponse().headers


# libfaketime also meddles with waits on the monotonic clock: Python's sleep then fails.
WALL_CLOCK = """
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>
#include <sys/syscall.h>
int clock_gettime(clockid_t id, struct timespec *now) {
    int result = syscall(SYS_clock_gettime, id, now);
    if (id == CLOCK_REALTIME && result == 0) {
        long offset = 0;
        FILE *file = fopen(getenv("WALL_CLOCK_OFFSET"), "r");
        if (file) {
            if (fscanf(file, "%ld", &offset) == 1) now->tv_sec += offset;
            fclose(file);
        }
    }
    return result;
}
"""


@part("proxy-headers")
def proxy_headers(siege, figures):
    """X-Forwarded-For counts only from a trusted proxy, and only its last entry."""
    path = "/api/services/" + SERVICE
    with Relay(siege) as relay:
        def guess(forwarded, source="127.0.0.1", relay=relay):
            return relay.ask("GET", path, key="ne_guess", source=source, headers={
                "X-Forwarded-For": forwarded})[0]

        statuses = [guess("203.0.113.%d" % n, "127.0.0.50") for n in range(100)]
        figures.add("a stranger with 100 names: 401", statuses.count(401), most=40)
        figures.add("429", statuses.count(429), least=60)
        figures.add("metrics through a proxy", relay.ask("GET", "/metrics", headers={
            "X-Forwarded-For": "127.0.0.1"})[0], exactly=403)
    with Relay(siege, "--trusted-proxy", "127.0.0.1") as relay:
        statuses = [guess("192.0.2.%d, 203.0.113.5" % n, relay=relay) for n in range(100)]
        figures.add("one client behind the proxy with 100 names: 401",
                    statuses.count(401), most=40)
        figures.add("another client there", guess("203.0.113.5, 203.0.113.6", relay=relay),
                    exactly=401)
        statuses = [guess("203.0.113.%d" % n, "127.0.0.50", relay) for n in range(10, 110)]
        figures.add("one that is not the proxy: 401", statuses.count(401), most=40)
        odd = {guess(text, relay=relay) for text in (
            "", ",", "x", "203.0.113.7:80", "[::1]", "::ffff:1.2.3.4", "1.2.3", "fe80::1%eth0")}
        figures.add("odd headers", odd, good=odd <= {401, 429})
        figures.add("tracebacks", relay.tracebacks(), exactly=0)


@part("clock")
def clock(siege, figures):
    """The wall clock jumps a day ahead and back: no lease, limit or wait changes."""
    need("cc")
    stamp, shim = siege.path("clock"), siege.path("clock.so")
    with open(shim + ".c", "w") as file:
        file.write(WALL_CLOCK)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", shim, shim + ".c"], check=True)

    def jump(days):
        with open(stamp + ".new", "w") as file:
            file.write("%d\n" % (86400 * days))
        os.replace(stamp + ".new", stamp)

    jump(0)
    env = {"LD_PRELOAD": shim, "WALL_CLOCK_OFFSET": stamp}
    with Relay(siege, "--grace-seconds", 3, "--offline-seconds", 6, env=env) as relay:
        name = "/api/services/" + SERVICE
        for n in range(20):                # 20 of 30 wrong keys a minute
            relay.ask("GET", name, key="wrong", source="127.0.0.9")
        guest = relay.ask("POST", name + "/keys", {"expires": time.time() + 3600},
                          relay.key)[1]["key"]
        answers = {}

        def ask(title, prompt):
            began = time.monotonic()
            answers[title] = relay.prompt(prompt, timeout=60), time.monotonic() - began

        asker = threading.Thread(target=ask, args=("running", prompt_of("r", 60, 12, 0.2)))
        asker.start()
        idle_socket = sent(relay, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        first_of(idle_socket)
        # A poll that is held: 25 s, whatever the wall clock says.
        other = relay.ask("POST", "/api/services", {"name": "Held"})[1]["key"]
        session = relay.ask("POST", "/provider/Held/login", {}, other)[1]["session"]
        held = []

        def poll():
            began = time.monotonic()
            relay.ask("POST", "/provider/Held/poll", {"session": session}, other, timeout=60)
            held.append(time.monotonic() - began)

        poller = threading.Thread(target=poll)
        poller.start()
        dates = []
        for days in (1, -1, 0):
            time.sleep(2)
            jump(days)
            time.sleep(0.5)
            dates.append(answer_headers(relay, "/healthz", "", "127.0.0.1")["Date"][5:7])
        time.sleep(2)
        figures.add("days of its Date header", "/".join(dates), good=len(set(dates)) == 3)
        logins = relay.said().count(" login ")
        asker.join()
        poller.join()
        figures.check("an answer of 12 s is whole", answers["running"][0])
        figures.add("and made", relay.provider.said().count("made r "), "times", exactly=1)
        figures.add("providers' logins", logins, exactly=3)
        figures.add("a poll was held", held[0], "s", least=24, most=28)
        idle_socket.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        figures.add("an idle connection answers", first_of(idle_socket), exactly="200")
        jump(1)
        time.sleep(0.3)
        expired = relay.ask("GET", name + "/keys", key=relay.key)[0]
        figures.add("control", expired, exactly=200)
        status, answer = relay.ask("POST", "/" + SERVICE, {"message": prompt_of("g")}, guest)
        figures.note("a guest's key that ends in an hour, a day ahead: %d %s (expiry and "
                     "quotas a day are of the wall clock, as they say)" % (
                         status, answer.get("error", "answered")))
        figures.add("tracebacks", relay.tracebacks(), exactly=0)
        idle_socket.close()


@part("canary")
def canary(siege, figures):
    """Keys, prompts and replies are in no log, no data file and no command line."""
    secret = "canary-prompt-5f2e91"
    with Relay(siege) as relay:
        name = "/api/services/" + SERVICE
        guest = relay.ask("POST", name + "/keys", {"label": "guest"}, relay.key)[1]["key"]
        relay.ask("PATCH", name, {"private": True}, relay.key)
        prompt = prompt_of(secret, 8, 60)
        body = {"message": prompt, "key": secret + "-stream", "stream": True}
        for key in (guest, relay.key, "ne_canary-wrong-key", None):
            relay.ask("POST", "/" + SERVICE, {"message": prompt}, key)
            relay.ask("POST", "/" + SERVICE, body, key)
            relay.ask("POST", "/v1/chat/completions", {"model": SERVICE, "messages": [
                {"role": "user", "content": prompt}]}, key)
            relay.ask("POST", "/" + SERVICE, {"message": prompt, "seed": secret}, key)
            relay.ask("POST", "/" + SERVICE, {"message": prompt + " not for a provider"}, key)
        relay.ask("POST", "/%s?key=%s" % (SERVICE, secret), {"message": prompt}, guest)
        relay.ask("GET", "/" + secret, None, guest)
        with relay.dial() as sock:
            sock.sendall(b"POST /Bench HTTP/1.1\r\nbad " + secret.encode() + b"\r\n\r\n")
            first_of(sock)
        new_key = relay.ask("PATCH", name, {"new_key": True}, relay.key)[1]["key"]
        relay.provider.end(signal.SIGINT)
        relay.ask("POST", "/" + SERVICE, {"message": prompt}, guest)
        relay.start_provider(new_key)
        relay.ask("POST", "/" + SERVICE, {"message": prompt}, guest)
        time.sleep(1.5)                    # the counters are on the disk
        secrets = {"service key": relay.key, "new service key": new_key,
                   "guest's key": guest, "wrong key": "ne_canary-wrong-key",
                   "prompt, reply or stream key": secret}
        places = {"log": relay.said().encode(),
                  "data": b"".join(read_bytes(path) for path in glob.glob(relay.data + "*")),
                  "metrics": relay.ask("GET", "/metrics")[1],
                  "directory": json.dumps(relay.ask("GET", "/api/models")[1]).encode(),
                  "command line": read_bytes("/proc/%d/cmdline" % relay.child.pid),
                  "environment": read_bytes("/proc/%d/environ" % relay.child.pid)}
        for place, data in places.items():
            found = [what for what, text in secrets.items() if text.encode() in data]
            figures.add(place, "%d bytes%s" % (len(data), "".join(
                ", with the " + what for what in found)), good=data and not found)
        figures.add("tracebacks", relay.tracebacks(), exactly=0)


def read_bytes(path):
    with open(path, "rb") as file:
        return file.read()


@part("smuggling")
def smuggling(siege, figures):
    """Ambiguous requests through nginx and HAProxy: both ends see the same requests."""
    for title, start in (("nginx", start_nginx), ("haproxy", start_haproxy)):
        need(title)
        with Relay(siege, "--tls", "off", "--trusted-proxy", "127.0.0.1") as relay:
            counter = Counter(relay.port)
            front_port = free_port()
            front, log = start(siege, front_port, counter.port)
            try:
                smuggle(figures, title, front_port, counter, log)
            finally:
                front.end(signal.SIGTERM)
                counter.close()
            figures.add("tracebacks", relay.tracebacks(), exactly=0)


def smuggle(figures, title, port, counter, log):
    wait_for(lambda: not socket.socket().connect_ex(("127.0.0.1", port)), 10, title)
    unequal, wrong, markers = [], 0, 0
    for n, case in enumerate(WIRE_CASES):
        before, passed = counter.requests, len(log())
        with contextlib.closing(socket.create_connection(("127.0.0.1", port), 5)) as sock:
            sock.settimeout(0.4)
            with contextlib.suppress(OSError):
                sock.sendall(case)
                while sock.recv(65536):
                    pass
        # A poisoned connection to the relay would answer one of these with another's.
        for m in range(4):
            marker = "marker-%d-%d" % (n, m)
            connection = connect("http://127.0.0.1:%d" % port, 5)
            with contextlib.closing(connection):
                connection.request("GET", "/v1/models/" + marker, headers={
                    "Host": "localhost"})
                response = connection.getresponse()
                markers += 1
                wrong += response.status != 404 or marker.encode() not in response.read()
        with contextlib.suppress(AssertionError):
            wait_for(lambda before=before, passed=passed: counter.requests - before
                     == sum(log()[passed:]), 3, "equality")
        front, back = sum(log()[passed:]), counter.requests - before
        if front != back:
            unequal.append((case, front, back))
    figures.add(title + ": cases", len(WIRE_CASES))
    figures.add("requests passed on by the front", sum(log()))
    figures.add("answered by the relay", counter.requests, most=sum(log()))
    figures.add("cases that were more to the relay", sum(
        front < back for _, front, back in unequal), exactly=0)
    # The front saw within the body that it is malformed, and cut it short.
    figures.add("that the front gave up before the answer", sum(
        front > back for _, front, back in unequal), most=3)
    figures.add("connections to the relay", counter.connections)
    figures.add("answers that were another's", "%d of %d" % (wrong, markers), good=not wrong)
    for case, front, back in unequal[:3]:
        figures.note("%r: front %d, relay %d" % (case, front, back))


_POST = b"POST /Bench HTTP/1.1\r\nHost: localhost\r\n"
_SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n"
WIRE_CASES = [head + b"\r\n" + body for head, body in (
    [(_POST + field, body + _SMUGGLED) for body in (b"", b"0\r\n\r\n", b"3\r\nabc\r\n0\r\n\r\n")
     for field in (
         b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
         b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n",
         b"Content-Length: 0\r\nContent-Length: 44\r\n",
         b"Content-Length: 4\r\nContent-Length: 0\r\n", b"Content-Length: 0, 44\r\n",
         b"Content-Length: +5\r\n", b"Content-Length: -1\r\n", b"Content-Length: 1_0\r\n",
         b"Content-Length: 0x5\r\n", b"Content-Length: \xb2\r\n", b"Content-Length:\r\n",
         b"Content-Length : 5\r\n", b"Content-Length\t: 5\r\n", b" Content-Length: 5\r\n",
         b"X: y\r\n Content-Length: 5\r\n", b"X: y\rContent-Length: 5\r\n",
         b"X: y\nContent-Length: 5\r\n", b"X: y\x00\r\nContent-Length: 5\r\n",
         b"Content_Length: 5\r\nContent-Length: 0\r\n", b"no colon\r\nContent-Length: 5\r\n",
         b": 5\r\nContent-Length: 0\r\n", b"Content-Length: 9999999999999999999\r\n",
         b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding : chunked\r\n",
         b"Transfer-Encoding: xchunked\r\n", b"Transfer-Encoding: gzip, chunked\r\n",
         b"Transfer-Encoding: chunked, identity\r\n", b"Transfer-Encoding: \x0bchunked\r\n",
         b"Transfer-Encoding:\tchunked\r\n", b"Transfer-Encoding: \"chunked\"\r\n",
         b"Transfer-Encoding: chunked\r\nTransfer-Encoding: x\r\n",
         b"X: y\r\n\tTransfer-Encoding: chunked\r\n", b"Transfer_Encoding: chunked\r\n",
         b"Expect: 100-continue\r\nContent-Length: 5\r\n",
         b"Connection: Content-Length\r\nContent-Length: 0\r\n",
         b"Connection: Transfer-Encoding\r\nTransfer-Encoding: chunked\r\n",
         b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nContent-Length: 0\r\n")]
    + [(b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n" % len(_SMUGGLED),
        _SMUGGLED),
       (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n",
        b"0\r\n\r\n" + _SMUGGLED),
       (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n", _SMUGGLED),
       (b"GET  /healthz HTTP/1.1\r\nHost: localhost\r\n", _SMUGGLED),
       (b"GET /healthz HTTP/1.0\r\nConnection: keep-alive\r\n", _SMUGGLED),
       (b"POST /Bench HTTP/1.0\r\nTransfer-Encoding: chunked\r\n", b"0\r\n\r\n" + _SMUGGLED),
       (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nHost: other\r\n", _SMUGGLED),
       (b"GET /healthz HTTP/1.1\nHost: localhost\n", _SMUGGLED),
       (b"GET http://localhost/healthz HTTP/1.1\r\nHost: localhost\r\n", _SMUGGLED),
       (b"HEAD /healthz HTTP/1.1\r\nHost: localhost\r\n", _SMUGGLED),
       (b"HEAD /v1/models/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 44\r\n", _SMUGGLED),
       (b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n", _SMUGGLED),
       (b"GET /x\x0by HTTP/1.1\r\nHost: localhost\r\n", _SMUGGLED),
       (b"GET /healthz?a=\r\nHost: localhost\r\n", _SMUGGLED),
       (b"GET /healthz%20HTTP/1.1%0d%0aX:y HTTP/1.1\r\nHost: localhost\r\n", _SMUGGLED),
       (_POST + b"Transfer-Encoding: chunked\r\n", b"2\nab\n0\n\n" + _SMUGGLED),
       (_POST + b"Transfer-Encoding: chunked\r\n", b"2;x=\ny\r\nab\r\n0\r\n\r\n" + _SMUGGLED),
       (_POST + b"Transfer-Encoding: chunked\r\n", b"002\r\nab\r\n0\r\nX: y\r\n\r\n" + _SMUGGLED),
       (_POST + b"Transfer-Encoding: chunked\r\n", b"0x2\r\nab\r\n0\r\n\r\n" + _SMUGGLED),
       (_POST + b"Transfer-Encoding: chunked\r\n", b"fffffffffffffff2\r\nab\r\n" + _SMUGGLED),
       (_POST + b"Transfer-Encoding: chunked\r\n", b"2 \r\nabX\r\n0\r\n\r\n" + _SMUGGLED)])]


class Counter(Proxy):
    """A proxy in front of the relay that counts the responses it sends."""

    MARK = b"\r\nX-Request-Id: "             # each response has one

    def __init__(self, port):
        super().__init__(port)
        self.requests, self.tails = 0, {}

    def passing(self, data, pair, to_client):
        if to_client:
            text = self.tails.get(pair, b"") + data
            with self.lock:
                self.requests += text.count(self.MARK)
            self.tails[pair] = text[-len(self.MARK) + 1:]
        return data


def start_nginx(siege, port, backend):
    """deploy/nginx.conf on a local port without TLS; (its process, what it passed on)."""
    home = siege.path("nginx-%d" % port)
    os.mkdir(home)
    with open(os.path.join(ROOT, "deploy", "nginx.conf")) as file:
        site = file.read()
    site = re.sub(r"(?m)^\s*(listen \[::\]|ssl_certificate).*\n", "", site)
    site = re.sub(r"listen 443[^;]*;", "listen 127.0.0.1:%d;" % port, site)
    site = site.replace("server 127.0.0.1:8000;", "server 127.0.0.1:%d;" % backend)
    with open(os.path.join(home, "nginx.conf"), "w") as file:
        file.write("daemon off; pid %s/pid; error_log %s/error.log;\nworker_processes 1;\n"
                   "events {}\nhttp {\n%s" % (home, home, "".join(
                       "%s_temp_path %s/%s;\n" % (what, home, what) for what in (
                           "client_body", "proxy", "fastcgi", "uwsgi", "scgi"))))
        file.write("log_format passed '$upstream_status';\naccess_log %s/access.log passed;\n"
                   "%s}\n" % (home, site))
    os.chmod(home, 0o777)
    process = siege.spawn("nginx", "nginx", "-p", home, "-c",
                          os.path.join(home, "nginx.conf"))

    def log():
        return [int(line.strip() not in ("", "-")) for line in
                open_lines(os.path.join(home, "access.log"))]
    return process, log


def start_haproxy(siege, port, backend):
    """deploy/haproxy.cfg on a local port without TLS; (its process, what it passed on)."""
    with open(os.path.join(ROOT, "deploy", "haproxy.cfg")) as file:
        text = file.read()
    text = re.sub(r"bind :443.*", "bind 127.0.0.1:%d" % port, text)
    text = text.replace("127.0.0.1:8000", "127.0.0.1:%d" % backend)
    text = text.replace("global\n", "global\n    log stdout format raw local0\n", 1)
    text = text.replace("defaults\n", "defaults\n    log global\n    log-format PASSED=%s\n", 1)
    path = siege.path("haproxy-%d.cfg" % port)
    with open(path, "w") as file:
        file.write(text)
    process = siege.spawn("haproxy", "haproxy", "-db", "-f", path)

    def log():
        return [int("<NOSRV>" not in line) for line in process.said().splitlines()
                if "PASSED=" in line]
    return process, log


def open_lines(path):
    with contextlib.suppress(FileNotFoundError), open(path) as file:
        return file.read().splitlines()
    return []


@part("kill")
def kill(siege, figures):
    """kill -9 thirty times: services and keys are intact, provider and clients return."""
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
                    words.append(reply)

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
        # A prompt whose five tries all met a relay that was just being killed says so.
        figures.add("prompts answered during it", "%d of %d" % (sum(right), len(right)),
                    good=sum(right) >= 0.9 * len(right))
        figures.add("wrong", sum("Connection error" not in text for text in words), exactly=0)
        figures.add("numreq in the store", relay.ask("GET", name, key=relay.key)[1]["numreq"],
                    least=0.5 * len(right))
        if words:
            figures.note("instead: " + "; ".join(sorted({text[:200] for text in words})[:3]))
        figures.add("tracebacks", relay.tracebacks(), exactly=0)


@part("fairness")
def fairness(siege, figures):
    """One greedy client and nine modest ones: each modest one gets its share."""
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
                    "ms", most=1000)


##############################################################################
# The command line
##############################################################################


def run(name, siege):
    """Run one part; its record for --json."""
    figures, began = Figures(), time.monotonic()
    verdict = "ok"
    try:
        PARTS[name](siege, figures)
    except Skip as reason:
        verdict = "skipped"
        figures.note(str(reason))
    except Exception as error:             # a part that breaks counts as failed
        import traceback
        figures.ok = False
        figures.note("%s" % error or repr(error))
        traceback.print_exc()
    finally:
        siege.end_children()
    if not figures.ok:
        verdict = "FAILED"
    seconds = time.monotonic() - began
    print("%-14s %s (%.0f s): %s" % (name, verdict, seconds, figures), flush=True)
    return {"part": name, "verdict": verdict, "seconds": round(seconds, 1),
            "figures": figures.rows, "notes": figures.notes}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="some parts, with commas: " + ", ".join(PARTS))
    parser.add_argument("--list", action="store_true", help="what each part does")
    parser.add_argument("--json", metavar="FILE", help="the figures, too")
    parser.add_argument("--keep-logs", action="store_true")
    parser.add_argument("--connections", type=int, default=10000,
                        help="of the parts idle and end-together (default: %(default)s)")
    parser.add_argument("--tries", type=int, default=2,
                        help="of the part end-together (default: %(default)s)")
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
    end_on_signals()
    unlimited_files()
    siege = Siege(options)
    try:
        records = [run(name, siege) for name in names]
    finally:
        siege.close(keep=options.keep_logs)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(records, file, indent=1, default=sorted)
    return 1 if any(record["verdict"] == "FAILED" for record in records) else 0


if __name__ == "__main__":
    sys.exit(main())
