#!/usr/bin/env python3
"""A million malformed inputs against the code that reads them in the relay.

    python bench/checks/fuzz.py [--inputs 1000000] [--seed N] [--wire 0.15]

Most go to functions of the relay in this process: parse_head, read_head and read_body over
a socket that hands out its bytes in random pieces, parse_json, check_fields, encoded_item
and find_route. They may raise what they promise and nothing else; what they accept must
be what was sent, however it was cut into pieces.

The others (--wire, their share) go over real sockets to a relay in another process,
plain and TLS: mutations of valid requests of all faces, with valid keys too, random
bytes, several requests in one go, in pieces, and replies of a provider to jobs that it
really has. All that comes back must be well-formed responses, none of them a 5xx but the
502, 503 and 504 of the error table, each within a bound; nothing may be in the relay's
log, and at the end its threads, descriptors and memory must be back where they were.

Loopback only, standard library only. Exit status 1 if anything was wrong.
"""

import argparse
import collections
import contextlib
import json
import os
import random
import re
import socket
import sys
import threading
import time
import traceback

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from harness import Relay, Workspace, end_on_signals, wait_for
from watch import client_hello

import neuroengine_server as ne

REST = 2 * ne.KEPT_SECONDS     # for idle threads to end
ANSWER_SECONDS = 20      # each limit below is 5 s at most, and a few may follow each other
LIMITS = ("--head-seconds=2 --body-seconds=2 --idle-seconds=2 --write-seconds=3 "
          "--poll-seconds=1 --busy-poll-seconds=1 --lease-seconds=4 --offline-seconds=1 "
          "--grace-seconds=1 --keep-seconds=3 --wait-seconds=1 --heartbeat-seconds=1 "
          "--job-seconds=5 --max-request-bytes=65536").split()
MOST_FAILURES = 20


class Wrong(Exception):
    """Something was wrong; the message says what."""


##############################################################################
# Inputs
##############################################################################

PARTS = (b"\r\n", b"\r", b"\n", b"\r\n\r\n", b":", b" ", b"\t", b"\x00", b"\xff", b"\x0b",
         b"\xa0", b"%", b"%00", b"%2f", b"%0d%0a", b"..", b"//", b"://", b"?", b"#", b"*",
         b"{", b"}", b"[", b"]", b'"', b"\\", b"\\u0000", b"\\ud800", b",", b"-", b"+", b"_",
         b"0", b"-1", b"9" * 20, b"1e999", b"0x10", b"\xb2", b"null", b"true", b"NaN",
         b"Host: y\r\n", b"Content-Length: 5\r\n", b"Content-Length: +5\r\n",
         b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: x\r\n", b"HTTP/1.1",
         b"HTTP/1.0", b"Expect: 100-continue\r\n", b"Connection: close\r\n",
         b"Authorization: Bearer x\r\n", b"Content-Encoding: gzip\r\n", b"GET / HTTP/1.1\r\n",
         b"X-Forwarded-For: 1.2.3.4\r\n", b"Idempotency-Key: a\r\n", b"0\r\n\r\n",
         b"5\r\nabcde\r\n", b"ffffffff\r\n", b" folded\r\n", b"Sec-Fetch-Site: x\r\n")
VALUES = (None, True, False, 0, -1, 1, 1.5, 10**18, -10**30, 1e308, "", "x", "\ud800",
          "\x00", "a" * 3000, "é☃😀", [], {}, [[]], [{}], {"a": {"b": [1]}}, [None] * 50,
          "auto", ["x", 1], [["a", 1]], [["a", 10**30]], [[1e300, 1e300]], "v1", "Fuzz",
          {"role": "user", "content": "x"}, [{"role": "user", "content": "x"}], 2**63, 1e15)


def mutate(rand, data, others=(b"",)):
    """Some bytes, changed in some places."""
    for _ in range(rand.choice((1, 1, 1, 2, 3, 8))):
        at = rand.randrange(len(data) + 1)
        kind = rand.randrange(8)
        if kind < 3:
            data = data[:at] + rand.choice(PARTS) + data[at:]
        elif kind == 3:
            data = data[:at] + bytes([rand.randrange(256)]) + data[at + 1:]
        elif kind == 4:
            data = data[:at] + data[at + rand.choice((1, 1, 2, 10)):]
        elif kind == 5:
            end = at + rand.choice((1, 8, 60))
            data = data[:end] + data[at:end] * rand.choice((1, 1, 5)) + data[end:]
        elif kind == 6:
            data = data[:at] + rand.choice(others)[rand.randrange(20):]
        else:
            data = data[:at] if rand.random() < 0.3 else data[:at] + rand.choice(
                PARTS) + data[at + 1:]
    return data


def mutate_value(rand, value):
    """A JSON value, changed in some place."""
    if isinstance(value, dict) and value and rand.random() < 0.8:
        value, key = dict(value), rand.choice(sorted(value))
        if rand.random() < 0.1:
            del value[key]
        elif rand.random() < 0.1:
            value[rand.choice(FIELDS)] = rand.choice(VALUES)
        else:
            value[key] = mutate_value(rand, value[key])
        return value
    if isinstance(value, list) and value and rand.random() < 0.8:
        value, at = list(value), rand.randrange(len(value))
        value[at] = mutate_value(rand, value[at])
        return value
    return rand.choice(VALUES)


FIELDS = ("message", "messages", "stream", "key", "at", "gettokens", "wait", "command", "n",
          "seed", "raw", "api", "model", "prompt", "stream_options", "session", "running",
          "replies", "name", "label", "expires", "private", "paused", "comment", "tools")


def request(method, path, body=None, key=None, chunked=None, **headers):
    """A request as bytes. chunked: a random.Random, for a body in chunks."""
    lines = ["%s %s HTTP/1.1" % (method, path), "Host: localhost"]
    if key:
        lines.append("Authorization: Bearer " + key)
    lines += ["%s: %s" % (name.replace("_", "-"), value) for name, value in headers.items()]
    data = b""
    if body is not None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines.append("Content-Type: application/json")
        if chunked:
            lines.append("Transfer-Encoding: chunked")
            data = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece)
                            for piece in pieces(chunked, data) if piece) + b"0\r\n\r\n"
        else:
            lines.append("Content-Length: %d" % len(data))
    return "\r\n".join(lines).encode("latin-1", "replace") + b"\r\n\r\n" + data


def pieces(rand, data, most=6):
    """The same bytes in a few pieces."""
    cuts = sorted(rand.randrange(len(data) + 1) for _ in range(rand.randrange(most)))
    return [data[a:b] for a, b in zip([0] + cuts, cuts + [len(data)])]


def valid_requests(world):
    """(method, path, body, key) of all faces; world: names and keys that are good."""
    own, chat = world["own"], [{"role": "user", "content": "hello"}]
    manage = "/api/services/" + own
    provider = "/provider/%s/" % own
    stream = "k%d" % world["count"]
    return [
        ("GET", "/", None, None), ("GET", "/Fuzz", None, None),
        ("GET", "/healthz", None, None), ("GET", "/metrics", None, None),
        ("HEAD", "/healthz", None, None), ("OPTIONS", "/v1/models", None, None),
        ("GET", "/api/models", None, None), ("GET", "/v1/models?all=1", None, None),
        ("GET", "/Fuzz/v1/models/x", None, None), ("GET", "/v1/models/a/b", None, None),
        ("POST", "/", {"command": "getmodels"}, None),
        ("POST", "/Fuzz", {"message": "hello", "temperature": 1.0, "seed": 1,
                           "max_new_len": 5, "raw": True}, None),
        ("POST", "/Fuzz/", {"messages": chat, "stream": True, "key": stream, "at": 0}, None),
        ("POST", "/Fuzz", {"message": "hello", "key": stream + "p", "gettokens": 2}, None),
        ("POST", "/Fuzz", {"command": "cancel", "key": stream}, None),
        ("POST", "/" + own, {"message": "hello", "key": stream + "w", "wait": True}, None),
        ("POST", "/" + own, {"message": "private?", "stream": True}, world["guest"]),
        ("POST", "/v1/chat/completions", {
            "model": "Fuzz", "messages": chat, "stream": True, "temperature": 0.5,
            "stream_options": {"include_usage": True}, "max_tokens": 5}, world["guest"]),
        ("POST", "/v1/chat/completions", {"model": "Fuzz", "messages": chat}, None),
        ("POST", "/Fuzz/v1/completions", {"prompt": "hello", "stream": False}, None),
        ("POST", "/v1/completions", {"model": "Fuzz", "prompt": ["x"], "stream": True}, None),
        ("POST", "/v1/embeddings", {"model": "Fuzz", "input": "hello"}, None),
        ("POST", "/v1/responses", {"model": "Fuzz", "input": "hello"}, None),
        ("POST", "/api/services", {"name": "F%d" % (world["count"] % 50),
                                   "operator": "me", "comment": "a comment"}, None),
        ("GET", manage, None, world["key"]), ("GET", manage + "/keys", None, world["key"]),
        ("PATCH", manage, {"comment": "new", "private": False, "paused": False},
         world["key"]),
        ("POST", manage + "/keys", {"label": "g", "requests_per_day": 10, "expires": None,
                                    "concurrency": 3, "max_new_len": 100}, world["key"]),
        ("DELETE", manage + "/keys/0123456789abcdef", None, world["key"]),
        ("DELETE", "/api/services/Nobody", None, world["key"]),
        ("POST", provider + "login", {"workers": 2, "continues": True, "embeddings": False,
                                      "context_length": 1000}, world["key"]),
        ("POST", provider + "poll", {"session": world["session"], "running": [["a", 1]]},
         world["key"]),
        ("POST", provider + "reply", {"session": world["session"], "replies": [
            {"job": "0" * 32, "attempt": 1, "at": 0, "items": ["a", {"reasoning": "b"}],
             "done": True}]}, world["key"]),
        ("POST", provider + "logout", {"session": "0" * 32}, world["key"]),
    ]


def bad_request(rand, world):
    """One input for the wire."""
    method, path, body, key = rand.choice(valid_requests(world))
    kind = rand.random()
    chunked = rand if rand.random() < 0.3 else None
    if kind < 0.04:
        return request(method, path, body, key, chunked)
    if kind < 0.08:
        return bytes(rand.randrange(256) for _ in range(rand.randrange(1, 400)))
    if body is not None and kind < 0.45:       # the framing is good, the JSON is odd
        body = mutate_value(rand, body)
        if rand.random() < 0.2:
            body = mutate(rand, json.dumps(body).encode())
        if rand.random() < 0.02:
            body = b'{"message":' + b"[" * rand.randrange(1, 9000)
        return request(method, path, body, key, chunked)
    data = request(method, path, body, key, chunked)
    if kind < 0.7:                             # the head alone is changed
        head, _, rest = data.partition(b"\r\n\r\n")
        return mutate(rand, head, SAMPLES) + b"\r\n\r\n" + rest
    return mutate(rand, data, SAMPLES)


SAMPLES = [request(*entry) for entry in valid_requests(
    {"own": "Own", "key": "k", "guest": "g", "session": "s", "count": 0})]


##############################################################################
# In this process
##############################################################################


class Pieces:
    """A socket that hands out these pieces, and then is closed by its peer."""

    def __init__(self, parts):
        self.parts, self.sent = [part for part in parts if part][::-1], b""

    def setblocking(self, blocking):
        pass

    def setsockopt(self, *_):
        pass

    def recv(self, most, flags=0):
        if not self.parts:
            return b""
        part = self.parts.pop()
        if len(part) > most:
            self.parts.append(part[most:])
        return part[:most]

    def send(self, data, flags=0):
        self.sent += bytes(data)
        return len(data)

    sendall = send


SMALL = ne.Limits(max_request_bytes=65536)
WORLD = {"own": "Own", "key": "ne_key", "guest": "ne_guest", "session": "0" * 32, "count": 7}
VALID = [entry for entry in valid_requests(WORLD)]
EXPECTED = (ne.RelayError, ne.PeerGone)


def outcome(parts):
    """What the reader makes of a connection's bytes: a list that can be compared."""
    connection, made = ne.Connection(Pieces(parts), SMALL), []
    try:
        for _ in range(8):
            head = ne.read_head(connection, SMALL)
            check_head(head)
            made.append((head.method, head.target, head.path, sorted(head.fields.items())))
            ne.find_route(head.path)
            made.append(ne.read_body(connection, head, SMALL))
            connection.idle_until = None
            if not head.keep_alive:
                break
    except ne.RelayError as error:
        check_error(error)
        made.append(error.name)
    except ne.PeerGone:
        made.append("gone")
    return made


def check_error(error):
    if ne.ERRORS[error.name].status >= 500 or not 0 < len(error.words) < 2000:
        raise Wrong("refused with %s: %r" % (error.name, error.words[:100]))
    ne.dumps(error.native()), ne.dumps(ne.openai_error(error))


def check_head(head):
    """What every accepted head is."""
    for name, value in head.fields.items():
        if re.search(r"[\x00-\x08\x0a-\x1f\x7f]", value) or not re.match(
                r"[!#$%&'*+.^_`|~0-9a-z-]+\Z", name):
            raise Wrong("accepted header %r: %r" % (name, value))
    if head.length is not None and head.length < 0 or not all(head.path):
        raise Wrong("accepted length %r, path %r" % (head.length, head.path))
    if "transfer-encoding" in head.fields and (
            "content-length" in head.fields or head.length is not None):
        raise Wrong("accepted an ambiguous length")


def depth(value):
    if isinstance(value, (dict, list)):
        return 1 + max(map(depth, value.values() if isinstance(value, dict) else value),
                       default=0)
    return 0


def try_reader(rand):
    """A whole connection's bytes, once in one piece and once in many."""
    data = b"".join(bad_request(rand, WORLD) for _ in range(rand.choice((1, 1, 1, 2, 3))))
    made = outcome([data])
    parts = pieces(rand, data, 8) if rand.random() < 0.9 else [
        bytes([byte]) for byte in data[:3000]] + [data[3000:]]
    again = outcome(parts)
    if made != again:
        raise Wrong("in one piece %r, in many %r: %r" % (made, again, parts))


def try_valid(rand):
    """Valid requests on one connection, in pieces, are read as they were meant."""
    meant = [rand.choice(VALID) for _ in range(rand.randrange(1, 5))]
    data = b"".join(request(*entry, chunked=rand if rand.random() < 0.5 else None)
                    for entry in meant)
    made = outcome(pieces(rand, data))
    if len(made) < 2 * len(meant):
        raise Wrong("valid, and read as %r: %r" % (made, data))
    for (method, path, body, _), head, got in zip(meant, made[::2], made[1::2]):
        if head[:2] != (method, path) or got != (
                b"" if body is None else json.dumps(body).encode()):
            raise Wrong("meant %r, read %r %r" % ((method, path, body), head, got))


def try_head(rand):
    """parse_head by itself."""
    data = rand.choice(SAMPLES).partition(b"\r\n\r\n")[0] + b"\r\n"
    data = mutate(rand, data, SAMPLES) if rand.random() < 0.9 else b"".join(
        rand.choice(PARTS) for _ in range(rand.randrange(12)))
    try:
        head = ne.parse_head(data)
    except ne.RelayError as error:
        return check_error(error)
    check_head(head)
    ne.find_route(head.path)


def try_json(rand):
    """parse_json and too_deep, held against the standard library's reading."""
    body = json.dumps(mutate_value(rand, rand.choice(VALID)[2] or {"a": 1})).encode()
    if rand.random() < 0.6:
        body = mutate(rand, body, SAMPLES)
    if rand.random() < 0.1:
        levels = rand.randrange(90, 110)
        body = b'{"a":' + b"[" * levels + body + b"]" * levels + b"}"
    try:
        value = json.loads(body.decode())
    except (ValueError, RecursionError):
        value = None
    try:
        got = ne.parse_json(body)
    except ne.RelayError as error:
        check_error(error)
        if isinstance(value, dict) and depth(value) <= ne.MAX_DEPTH and not re.search(
                rb"NaN|Infinity|[eE]\+?\d\d\d|\d{300}", body):
            raise Wrong("refused good JSON: %s: %r" % (error.words, body))
        return
    if got != value or depth(got) > ne.MAX_DEPTH:
        raise Wrong("read as %r: %r" % (got, body))
    ne.dumps(got)
    for fields in ne.SAMPLING_FIELDS, ne.KEY_FIELDS:
        try:
            ne.check_fields(dict(got), fields)
        except ne.RelayError as error:
            check_error(error)
    for item in got.values():
        with contextlib.suppress(ValueError, TypeError):
            ne.encoded_item(item)


def try_route(rand):
    """find_route and the decoding of paths."""
    words = ("v1", "api", "provider", "services", "keys", "models", "chat", "completions",
             "login", "poll", "healthz", "*", "", "..", "%2f", "%00", "%zz", "a", "Fuzz",
             "\u00e9", "x" * 70)
    target = "/" + "/".join(rand.choice(words) for _ in range(rand.randrange(8)))
    try:
        head = ne.parse_head(b"GET %s HTTP/1.1\r\nHost: x\r\n" % target.encode("utf-8"))
    except ne.RelayError as error:
        return check_error(error)
    route, arguments = ne.find_route(head.path)
    if not isinstance(arguments, tuple) or route is not None and not all(
            isinstance(argument, str) and argument in "/".join(head.path)
            for argument in arguments):
        raise Wrong("%r is routed with %r" % (target, arguments))


TRIES = (try_reader, try_reader, try_head, try_head, try_json, try_json, try_valid, try_route)


def in_process(number, seed, report):
    rand = random.Random("%s/process" % seed)
    counts = collections.Counter()
    for n in range(number):
        report.progress(n, number)
        attempt = rand.choice(TRIES)
        counts[attempt.__name__] += 1
        try:
            attempt(rand)
        except Wrong as error:
            report.fail("%s: %s" % (attempt.__name__, error))
        except Exception:
            report.fail("%s: %s" % (attempt.__name__, traceback.format_exc()))
    return counts


##############################################################################
# Over sockets
##############################################################################


def read_responses(data, cut):
    """The statuses of well-formed responses in a row. Raises Wrong.

    cut: the last may end early, as a stream does whose client hung up."""
    statuses = []
    while data:
        head, found, rest = data.partition(b"\r\n\r\n")
        lines = head.split(b"\r\n")
        match = re.match(rb"HTTP/1\.1 (\d{3}) [A-Za-z' -]+\Z", lines[0])
        if not found or not match or not all(
                re.match(rb"[A-Za-z0-9-]+: [\x20-\x7e]*\Z", line) for line in lines[1:]):
            raise Wrong("ill-formed response %r" % data[:300])
        status = int(match[1])
        fields = {name.lower(): value for name, _, value in
                  (line.partition(b": ") for line in lines[1:])}
        statuses.append(status)
        if status == 100:
            data = rest
            continue
        body, data, whole = read_response_body(status, fields, rest)
        if not whole:
            if cut and fields.get(b"transfer-encoding"):
                return statuses
            if rest == b"" or not fields.get(b"transfer-encoding"):
                return statuses            # HEAD, or the sample ended within the body
            raise Wrong("a response ends early: %r" % rest[-200:])
        if fields.get(b"content-type") == b"application/json" and body:
            value = json.loads(body)
            if status >= 500 and status not in (502, 503, 504):
                raise Wrong("status %d: %r" % (status, body[:300]))
            if status >= 400:
                check_error_body(status, value)
        elif status >= 500:
            raise Wrong("status %d without JSON" % status)
        if fields.get(b"connection") == b"close" and data:
            raise Wrong("something follows the end: %r" % data[:200])
    return statuses


STATUS_OF = {kind.errorcode: kind.status for kind in ne.ERRORS.values()}
STATUSES_OF = collections.defaultdict(set)
for _kind in ne.ERRORS.values():
    STATUSES_OF[_kind.code].add(_kind.status)


def check_error_body(status, value):
    """An error's body is of the table, in the native or in OpenAI's words."""
    native = value.get("errorcode")
    if native is not None:
        if STATUS_OF.get(native) != status:
            raise Wrong("status %d with errorcode %r" % (status, native))
    elif status not in STATUSES_OF.get(value.get("error", {}).get("code"), ()):
        raise Wrong("status %d with %r" % (status, value))


def read_response_body(status, fields, rest):
    """(body, what follows it, whether it is whole)"""
    if status == 204:
        return b"", rest, True
    if b"content-length" in fields:
        length = int(fields[b"content-length"])
        if rest.startswith(b"HTTP/1.1 ") and length:   # to a HEAD
            return b"", rest, True
        return rest[:length], rest[length:], len(rest) >= length
    if fields.get(b"transfer-encoding") != b"chunked":
        return rest, b"", True             # to HTTP/1.0: until the end
    parts = []
    while True:
        line, found, after = rest.partition(b"\r\n")
        if not found:
            return b"".join(parts), b"", False
        size = int(line, 16)
        if len(after) < size + 2:
            return b"".join(parts), b"", False
        parts.append(after[:size])
        if after[size:size + 2] != b"\r\n":
            raise Wrong("ill-formed chunk")
        rest = after[size + 2:]
        if not size:
            return b"".join(parts), rest, True


class Attacker:
    """One thread that sends inputs, and its service."""

    def __init__(self, relay, secure, number, seed, report):
        self.relay, self.secure, self.report = relay, secure, report
        self.rand, self.number = random.Random("%s/wire/%d" % (seed, number)), number
        self.world = {"own": "Own%d" % number, "count": 0}
        self.names = 0
        self.inputs, self.statuses = 0, collections.Counter()

    def prepare(self):
        """A service, a guest's key and a session, made anew if they are gone."""
        world, ask = self.world, self.relay.ask
        if "key" in world and ask("GET", "/api/services/" + world["own"],
                                  key=world["key"])[0] == 200:
            ask("PATCH", "/api/services/" + world["own"],
                {"private": False, "paused": False}, world["key"])
        else:
            self.names += 1
            world["own"] = "Own%d.%d" % (self.number, self.names)
            world["key"] = self.relay.register(world["own"])
        base = "/api/services/" + world["own"]
        for key in ask("GET", base + "/keys", key=world["key"])[1]["keys"]:
            ask("DELETE", base + "/keys/" + key["id"], key=world["key"])
        world["guest"] = ask("POST", base + "/keys", {}, world["key"])[1]["key"]
        if "session" in world:
            ask("POST", "/provider/%s/logout" % world["own"], {"session": world["session"]},
                world["key"])
        world["session"] = ask("POST", "/provider/%s/login" % world["own"], {"workers": 3},
                               world["key"])[1]["session"]

    def run(self, number):
        while self.inputs < number and not self.report.full():
            try:
                if self.inputs % 100 < 6 or "session" not in self.world:
                    self.prepare()
                kind = self.rand.random()
                if kind < 0.03:
                    self.answer_a_job()
                elif kind < 0.06:
                    self.over_tls()
                else:
                    self.send()
            except Wrong as error:
                self.report.fail("wire: %s" % error)
            except Exception:
                self.report.fail("wire: " + traceback.format_exc())

    def send(self):
        """Some inputs on one connection; then its end, or a wait for an answer."""
        count = self.rand.choice((1, 1, 1, 2, 5))
        self.world["count"] += 1
        self.inputs += count
        data = b"".join(bad_request(self.rand, self.world) for _ in range(count))
        half_close = self.rand.random() < 0.97
        with contextlib.closing(self.relay.dial(timeout=ANSWER_SECONDS)) as sock:
            self.exchange(sock, data, half_close)

    def exchange(self, sock, data, half_close):
        began, parts = time.monotonic(), []
        try:
            for piece in (pieces(self.rand, data) if self.rand.random() < 0.2 else [data]):
                sock.sendall(piece)
            if half_close:
                sock.shutdown(socket.SHUT_WR)
            while time.monotonic() - began < ANSWER_SECONDS:
                piece = sock.recv(65536)
                parts.append(piece)
                if not piece or not half_close and b"\r\n\r\n" in b"".join(parts):
                    break
        except socket.timeout:
            raise Wrong("nothing came within %d s of %r" % (ANSWER_SECONDS, data[:2000]))
        except OSError:                    # it had closed, and we went on sending
            pass
        if time.monotonic() - began > ANSWER_SECONDS:
            raise Wrong("no end within %d s: %r" % (ANSWER_SECONDS, data[:2000]))
        try:
            self.statuses.update(read_responses(b"".join(parts), True))
        except (Wrong, ValueError) as error:
            raise Wrong("%s, to %r" % (error, data[:2000]))

    def over_tls(self):
        """The same within TLS; or what is no TLS, or hardly."""
        self.inputs += 1
        self.world["count"] += 1
        kind = self.rand.random()
        with contextlib.closing(self.secure.dial(timeout=ANSWER_SECONDS, tls=kind < 0.5)) as s:
            if kind < 0.5:
                data = bad_request(self.rand, dict(self.world, own="Fuzz"))
                return self.exchange(s, data, False)
            data = mutate(self.rand, client_hello()) if kind < 0.8 else \
                bad_request(self.rand, self.world)
            with contextlib.suppress(OSError):     # it closes when it likes
                s.sendall(data)
                s.shutdown(socket.SHUT_WR)
                while s.recv(65536):
                    pass

    def answer_a_job(self):
        """Take a job as a provider does, and answer it badly, then well."""
        world, rand = self.world, self.rand
        provider = "/provider/%s/" % world["own"]
        world["count"] += 1
        prompt = request("POST", "/" + world["own"], {
            "message": "hello", "stream": rand.random() < 0.5,
            "key": "job%d" % world["count"]}, world["guest"])
        with contextlib.closing(self.relay.dial(timeout=ANSWER_SECONDS)) as asking, \
                contextlib.closing(self.relay.dial(timeout=ANSWER_SECONDS)) as sock:
            asking.sendall(prompt)
            sock.sendall(request("POST", provider + "poll", {
                "session": world["session"], "running": []}, world["key"]))
            jobs = json.loads(sock.recv(65536).partition(b"\r\n\r\n")[2] or "{}").get("jobs")
            for job in jobs or ():
                for _ in range(3):
                    good = {"job": job["job"], "attempt": job["attempt"], "at": 0,
                            "items": ["a", {"finish_reason": "stop"}, {"usage": {
                                "completion_tokens": 1}}, {"tool_calls": [
                                    {"id": "a", "function": {"name": "f"}}]}],
                            "done": False}
                    bad = mutate_value(rand, {"session": world["session"],
                                              "replies": [mutate_value(rand, good)]})
                    self.inputs += 1
                    with contextlib.closing(self.relay.dial(timeout=ANSWER_SECONDS)) as s:
                        self.exchange(s, request("POST", provider + "reply", bad,
                                                 world["key"]), True)
                self.relay.ask("POST", provider + "reply", {
                    "session": world["session"], "replies": [
                        {"job": job["job"], "attempt": job["attempt"], "at": 0, "items": [],
                         "done": True}]}, world["key"])
            with contextlib.suppress(OSError):
                asking.shutdown(socket.SHUT_WR)
                parts = list(iter(lambda: asking.recv(65536), b""))
                self.statuses.update(read_responses(b"".join(parts), True))


def over_sockets(number, seed, report, threads):
    space = Workspace("fuzz")
    try:
        relay = Relay(space, *LIMITS, provider=False)
        secure = Relay(space, *LIMITS, provider=False, tls=True)
        for each in (relay, secure):
            space.python("provider", __file__, "--provide", each.url, "Fuzz",
                         each.register("Fuzz")).expect("logged in", 10)
        attackers = [Attacker(relay, secure, n, seed, report) for n in range(threads)]
        wave(attackers, 300 * threads, report)     # warm: all caches and pools are full
        calm(relay), calm(secure)
        before = relay.child.at_rest(REST), secure.child.at_rest(REST)
        wave(attackers, number, report)
        calm(relay), calm(secure)
        after = relay.child.at_rest(REST), secure.child.at_rest(REST)
        for title, each, one, two in zip(("plain", "TLS"), (relay, secure), before, after):
            print("relay (%s) at rest: before %d threads, %d descriptors, %.1f MB; after "
                  "%d, %d, %.1f MB" % ((title,) + one + two))
            # The provider's polls keep some idle threads awake, now more, now fewer.
            if two[0] > 1.5 * one[0] + 2 or two[1] > one[1] + 1 or two[2] > 1.25 * one[2] + 10:
                report.fail("the relay has not come back to where it was")
            if each.tracebacks() or each.child.process.poll() is not None:
                report.fail("the relay's log: " + "\n".join(
                    each.said()[match.start():][:2000] for match in
                    list(re.finditer(r".*internal_error.*", each.said()))[:5]))
        statuses = sum((attacker.statuses for attacker in attackers), collections.Counter())
        print("answers:", ", ".join("%d: %d" % pair for pair in sorted(statuses.items())))
        return sum(attacker.inputs for attacker in attackers)
    finally:
        space.close(keep=report.failures)


def wave(attackers, number, report):
    """Let all attackers send at once, until `number` more inputs were sent."""
    start = [attacker.inputs for attacker in attackers]
    threads = [threading.Thread(target=attacker.run, args=(
        attacker.inputs + number // len(attackers),)) for attacker in attackers]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(0.2)
        report.progress(sum(a.inputs for a in attackers) - sum(start), number)
    for attacker in attackers:
        with contextlib.suppress(Exception):
            attacker.relay.ask("POST", "/provider/%s/logout" % attacker.world["own"],
                               {"session": attacker.world.pop("session")},
                               attacker.world["key"])


def calm(relay):
    """Wait until the relay holds no job."""
    wait_for(lambda: relay.metrics().get("held_jobs") == 0, 60, "the end of all jobs",
             lambda: str(relay.metrics()))


def provide(url, name, key):
    """A provider that answers anything at once."""
    from neuroengine import NeuroengineServer
    server = NeuroengineServer(url, verify_ssl=False)
    if server.login(name, key):
        return 1
    print("logged in", flush=True)
    server.listen(lambda request: iter(("all ", "is ", "well")), 32)


##############################################################################
# The command line
##############################################################################


class Report:
    """What was wrong, and how far it has come."""

    def __init__(self):
        self.failures, self.began, self.told = [], time.monotonic(), 0.0
        self.phase = ""

    def fail(self, words):
        self.failures.append(words)
        print("WRONG %s" % words[:3000], flush=True)

    def full(self):
        return len(self.failures) >= MOST_FAILURES

    def progress(self, done, number):
        if self.full():
            raise SystemExit("too much is wrong: %d" % len(self.failures))
        now = time.monotonic()
        if now - self.told > 10:
            self.told = now
            print("%5.0f s  %s: %d of %d, wrong %d" % (
                now - self.began, self.phase, done, number, len(self.failures)), flush=True)


def main():
    if sys.argv[1:2] == ["--provide"]:
        return provide(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=10**6, help="default: %(default)s")
    parser.add_argument("--wire", type=float, default=0.15, metavar="SHARE",
                        help="of them over real sockets (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=24, help="that send these")
    parser.add_argument("--seed", type=int, help="otherwise a random one, which is shown")
    options = parser.parse_args()
    seed = random.randrange(10**6) if options.seed is None else options.seed
    print("seed", seed, flush=True)
    end_on_signals()
    report = Report()
    wire = int(options.wire * options.inputs)
    report.phase = "in process"
    counts = in_process(options.inputs - wire, seed, report)
    print("in process: %d inputs (%s)" % (sum(counts.values()), ", ".join(
        "%s %d" % pair for pair in sorted(counts.items()))), flush=True)
    report.phase = "over sockets"
    sent = over_sockets(wire, seed, report, options.threads) if wire else 0
    print("inputs %d, of them over sockets %d; wrong %d; %.0f s; seed %d" % (
        sum(counts.values()) + sent, sent, len(report.failures),
        time.monotonic() - report.began, seed))
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
