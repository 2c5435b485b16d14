#!/usr/bin/env python3
"""neuroengine: use an LLM that somebody shares, or share your own.

One file, standard library only: copy it beside your program. To use a shared LLM:

    from neuroengine import Neuroengine

    api = Neuroengine(service_name="Neuroengine-Large")
    print(api.request("What is the size of Mars?"))

    for text in api.stream("Hello, write a poem", max_new_len=1000):
        print(text, end="", flush=True)

To share one, answer each request with a text, or with an iterator of texts:

    from neuroengine import NeuroengineServer

    def answer(request):
        yield "You said: "
        yield request["message"]

    server = NeuroengineServer()
    if server.login("MYGPT", "SERVICE-KEY") == 0:
        server.listen(answer)

or share a local LLM server (Ollama, llama.cpp, vLLM, LM Studio, KoboldCpp) as it is:

    python3 neuroengine.py share MYGPT

The environment variable NEUROENGINE_SERVER, a host name or a URL, names the relay.
Sections: Limits, Errors, Wire, Transport, Terminal, Client, Asynchronous transport, Provider,
Bridge (what goes up, what comes down, the LLM server), Command line.
"""

import collections
import contextlib
import errno
import http.client
import io
import itertools
import json
import math
import os
import random
import re
import secrets
import select
import shutil
import socket
import ssl
import sys
import threading
import time
import urllib.parse
import urllib.request
from typing import Any
from typing import AsyncIterator
from typing import Callable
from typing import Dict
from typing import Iterable
from typing import Iterator
from typing import List
from typing import Optional
from typing import Union

NEEDED: str = "Python 3.8 or newer"    # Python 2 stops at this line, and shows it
if sys.version_info < (3, 8):
    sys.exit("neuroengine needs %s; this is Python %d.%d." % ((NEEDED,) + sys.version_info[:2]))

__version__ = "1.0.0"
__all__ = ["Neuroengine", "NeuroengineError", "NeuroengineServer", "Reply", "main"]

##############################################################################
# Limits
##############################################################################

DEFAULT_SERVER = "api.neuroengine.ai"
DEFAULT_RELAY = "https://%s:443" % DEFAULT_SERVER
REQUEST_SECONDS = 120        # silence of the relay within one request
ANSWER_SECONDS = 3700        # a whole reply; the relay gives up a little sooner
STREAM_SECONDS = 30          # silence within a stream; heartbeats come every 9 s
POLL_SECONDS = 40            # a held poll; the relay answers within 25 s
YIELD_SECONDS = 0.005        # from new jobs to the next poll, unless items were sent before
GATHER_SECONDS = 0.005       # between two requests with items, other than first ones and ends
HURRY_SECONDS = 0.01         # a request under way holds these up no longer
MAX_PUSHES = 4               # such requests under way at once
REST_FACTOR = 4              # after reading streams, rest this many times as long
LONGEST_REST_SECONDS = 0.04  # but no longer than this
HEARTBEAT_SECONDS = 5        # a provider with jobs sends something this often
CANCEL_SECONDS = 5           # for a cancel or a logout
LEAVE_SECONDS = 1            # in which a cancelled call tells the relay
LIST_SECONDS = 1.1           # a relay's list of services may be a second old
FIRST_PAUSE_SECONDS = 0.25   # before the second try; doubles each time, with jitter
LONGEST_PAUSE_SECONDS = 8.0
LONGEST_RETRY_AFTER_SECONDS = 60   # a longer wait is left to the caller
MAX_UNSENT_BYTES = 8 << 20   # of one answer, kept while the relay is out of reach
MAX_BATCH_BYTES = 1 << 18    # of items in one request to the relay, which bounds their number
MAX_ITEM_BYTES = 20 << 20    # one item; the relay takes no more
MAX_LINE_BYTES = 64 << 20    # one line of a stream, or an answer that is kept as a whole
MAX_HEAD_BYTES = 1 << 16     # of a response
READ_BYTES = 1 << 14         # of a connection, read at once
CONNECT_SECONDS = 10         # to connect to one address, TLS included
NEAR_SECONDS = 0.01          # to connect to a known address of this machine
SLICE_SECONDS = 0.5          # of waiting, after which Ctrl-C is noticed on Windows
KEPT_SECONDS = 50            # an idle connection is used again within this time
MAX_KEPT = 16                # idle connections to one server
PIECE_BYTES = 1 << 18        # of a request, sent at once
REMEMBERED_STREAMS = 1000    # cursors of the streams that request() reads
MAX_LOST = 1                 # times that a prompt is sent again after it lost its providers
MAX_OFFLINE = 1              # ... to a service whose provider has just left
TOLD_PAUSE_SECONDS = 3       # a pause that the command line mentions where there is no terminal
AHEAD = 8                    # replies that map() keeps for later, times at_once
DEFAULT_MAX_TOKENS = 4096    # for an upstream whose own default is unlimited
UPSTREAM_SECONDS = 600       # silence of the local LLM server; prefill can be slow
LINGER_SECONDS = 5           # a stream that said its end may stay open so long
RETRY_UPSTREAM_SECONDS = 2   # between two looks for an LLM server that is gone
LOADING_SECONDS = 300        # it may say "loading model" for so long
LOOK_SECONDS = 60            # between two looks at the clock of `share --hours`
DAY_MINUTES = 24 * 60
DRAIN_LOOK_SECONDS = 1       # between two looks at a service that is drained

SAMPLING = {"temperature": 1.0, "top_p": 0.9, "top_k": 40, "min_p": 0.0,
            "repetition_penalty": 1.2, "max_new_len": 128, "seed": 0, "raw": "False"}

##############################################################################
# Errors
##############################################################################

# Errors that pass soon, so the client sends the same prompt again by itself. A relay that
# says `retry` in its error overrules this list. (A service that is offline or paused may
# stay so for hours: the caller decides.)
RETRIED = frozenset(("internal_error", "request_timeout", "queue_full", "rate_limited",
                     "relay_busy", "shutting_down", "still_waiting", "provider_lost"))
# Those that end a provider. Everything else may pass, even a wrong certificate (a captive
# portal, a late renewal).
FINAL = frozenset(("invalid_key", "invalid_name", "service_unknown"))
# Those that may pass though nothing has succeeded yet, so that they need not be a mistake.
PASSING = RETRIED | {"no_connection", "certificate"}
NO_CONNECTION = -1           # errorcode of what the relay did not say
# Errors of the way to the relay; after others of errorcode -1 it is worth a look whether
# this is a relay.
WAY_ERRORS = frozenset(("no_connection", "certificate", "no_tls", "bad_address",
                        "bad_certificate_file"))


KEY = re.compile(r"\bne_[A-Za-z0-9_-]{20,}")     # it must never be shown by mistake


class NeuroengineError(Exception):
    """The relay refused, or could not be reached.

    errorcode: the number of the error in the relay's table; negative if the relay did not
    answer. name: its name there. message: what happened, and what to do next.
    retry_after: seconds that the relay asks to wait, or None. retry: whether the same
    prompt may be sent again, or None if the relay did not say. said: the relay's own words.
    """

    def __init__(self, errorcode: int, message: str, name: str = "",
                 retry_after: Optional[float] = None, retry: Optional[bool] = None, *,
                 row: str = "") -> None:
        message = KEY.sub("ne_...", message)   # given in the place of a name, say
        super().__init__(message)
        self.errorcode, self.message, self.name = errorcode, message, name
        self.retry_after, self.retry, self.said = retry_after, retry, message
        self.row = row or name                 # of ADVICE
        self.names: Dict[str, Any] = {}        # what advise() was given

    def __reduce__(self) -> Any:
        return type(self), (self.errorcode, self.message), self.__dict__

    def __str__(self) -> str:
        return self.message


class Unavailable(Exception):
    """The local LLM server cannot be reached; its words say why."""


# What to tell the user, in the words of the interface in use. HTTP has the relay's own
# words. An empty first column keeps the relay's first sentence, which has the details.
ADVICE = {  # error name: (what happened, next step in Python, next step on the command line)
    "no_connection": (
        "", "Try again in a few seconds.",
        "Try again in a few seconds, or name another relay with --relay."),
    "no_relay_named": (
        "", "Set it to the address of your relay.",
        "Set it to the address of your relay, or give that by --relay."),
    "certificate": (
        "", "If it is your own relay's, pass the path of its certificate as verify_ssl.",
        "If it is your own relay's, add --ca FILE with its certificate."),
    "other_name": (
        "", "Call the relay by one of them: its operator sees them with `neuroengine_server.py "
        "doctor`.", "Call it by one of them: `neuroengine_server.py doctor` lists them where "
        "the relay runs."),
    "key_missing": (
        "{service} is private.", "Pass an access key of its operator as key.",
        "Give an access key of its operator by --key or $NEUROENGINE_ACCESS_KEY."),
    "key_wrong": (
        "The access key is not valid for {service}.",
        "Ask its operator for a new one, and pass it as key.",
        "Check --key and $NEUROENGINE_ACCESS_KEY, or ask the operator for a new one."),
    "service_key_missing": (
        "This needs the service key of {service}.",
        "Pass login() the key that `{program} register` printed.",
        "This machine has no key for it at this relay: give one by --key-file or "
        "$NEUROENGINE_KEY."),
    "service_key_wrong": (
        "This is not the service key of {service}.",
        "Pass login() the key that `{program} register` printed.",
        "It comes from {source}."),
    "key_of_another": (
        "This access key is for another service than {service}.",
        "Pass the key of this service as key.", "Give the key of this service by --key."),
    "service_unknown": (
        "There is no service {service} at {relay}.", "getModels() lists the services.",
        "`models` lists the services."),
    "nothing_registered": (
        "There is no service {service} at {relay}.",
        "`{program} register {service} --relay {relay}` registers it.",
        "`register {service}` makes one, `models` lists those that are there."),
    "service_offline": (
        "", "Try again later, or pass wait=True to wait for a provider.",
        "Try again later, or add --wait to wait for a provider."),
    "stream_unknown": (
        "The relay does not know this stream any more: it ended some time ago, or the relay was "
        "restarted.", "Send the prompt again; to request(), with a new streamkey.",
        "Ask again."),
    "key_reused": (
        "This stream key already names another prompt.",
        "Use a new random streamkey for each prompt.", "Try again."),
    "invitation_needed": (
        "A new service needs an invitation at this relay; this one is missing, wrong, or "
        "used up.", "Ask the people who run the relay.",
        "Ask the people who run the relay, and give it by --invitation CODE."),
    "name_taken": (
        "", "Choose another.", "Choose another. If it is yours, give its service key by "
        "--key-file or $NEUROENGINE_KEY."),
}
PYTHON, COMMAND_LINE = 1, 2     # columns of ADVICE


def advise(error, interface, **names):
    """Put an error into the words of an interface; returns the error.

    names: what ADVICE fills in (service, relay, source), and for an invalid key its kind
    ("key" or "service_key") and the `key` that was sent.
    """
    row = error.row
    if row == "invalid_key" and names.get("kind"):
        row = names["kind"] + ("_wrong" if names.get("key") else "_missing")
    elif row == "service_unknown" and names.get("kind") == "service_key":
        row = "nothing_registered"
    elif row == "forbidden" and names.get("key") and "access key" in error.said:
        row = "key_of_another"
    fact, *steps = ADVICE.get(row, ("", "", ""))
    step, program = steps[interface - 1], how_to_run("neuroengine.py")
    try:
        fact, step = (words.format(program=program, **names) for words in (fact, step))
    except KeyError:
        fact = step = ""
    if step and not fact:
        # The relay's next step is in the words of HTTP, so it makes room for ours.
        fact = first_sentence(error.said)
    where = ""
    if names.get("relay") == DEFAULT_RELAY and not os.environ.get("NEUROENGINE_SERVER") \
            and row != "no_relay_named":
        where = "(NEUROENGINE_SERVER is not set, so this was the default relay, %s.)" \
            % DEFAULT_SERVER
    error.message = KEY.sub("ne_...", " ".join(filter(None, (fact or error.said, step, where))))
    error.names = names
    return error


def how_to_run(file):
    """How to run one of our two programs here: pip installs them as commands."""
    if re.search(r"[\\/](site|dist)-packages[\\/]", globals().get("__file__") or ""):
        return file[:-3].replace("_", "-")
    return "%s %s" % ("py" if os.name == "nt" else "python3", file)


def first_sentence(text):
    """The first sentence of a text."""
    return re.split(r"(?<=[.!]) (?=[A-Z])", text, maxsplit=1)[0]


##############################################################################
# Wire: messages built and parsed, no sockets
##############################################################################


def relay_url(address, port=443):
    """The relay's base URL, from a host name or a URL as people write them.

    The default address is replaced by the environment variable NEUROENGINE_SERVER.
    """
    if address == DEFAULT_SERVER:
        address = os.environ.get("NEUROENGINE_SERVER", "").strip() or address
    # A pasted address may end with a CR or a slash.
    address = re.sub(r"(?<=[^/:])/+\Z", "", str(address).strip())
    if "://" in address:
        return address[:-3] if address.endswith("/v1") else address
    host, slash, path = address.partition("/")
    if slash and host.rstrip(":") in ("http", "https"):     # a slip, not a host
        return address
    if host.count(":") > 1 and host[0] != "[":
        host = "[%s]" % host                       # a bare IPv6 address
    if ":" not in host.rpartition("]")[2]:
        host += ":%s" % port
    return "https://" + host + slash + path


def in_path(name):
    """A name as a part of a path; what the relay would not take becomes a question mark."""
    return urllib.parse.quote(str(name), safe="", errors="replace")


def parse_answer(status, headers, body, kind=dict):
    """The JSON that the relay answered: a dict, or what `kind` says. Raises
    NeuroengineError for an error, and for what is not the answer of a relay."""
    try:
        answer = json.loads(body.decode("utf-8"))
    except (ValueError, RecursionError):
        answer = None
    if isinstance(answer, dict) and (errorcode_of(answer) or status >= 400):
        raise error_of(answer, headers)
    if not isinstance(answer, kind) or status >= 400:
        where = headers.get("Location")
        raise NeuroengineError(NO_CONNECTION, (
            "The relay redirects to %s: use that address." % where if where else
            "This address answered HTTP %d, but not as a neuroengine relay does."
            % status), "bad_answer", pause_of(headers), retry=status >= 500 or (
                # A proxy may end an answer in good order that was cut.
                answer is None and "json" in (headers.get("Content-Type") or "")))
    return answer


def errorcode_of(answer):
    """The errorcode in an answer: 0 if there is none, NO_CONNECTION if it is not a number."""
    try:
        return int(answer.get("errorcode") or 0)
    except (TypeError, ValueError, OverflowError):
        return NO_CONNECTION


def pause_of(headers):
    """The seconds that a Retry-After header asks for, or None. A proxy may write anything."""
    try:
        pause = float((headers or {}).get("Retry-After"))
    except (TypeError, ValueError):
        return None
    return pause if 0 <= pause < math.inf else None


def error_of(answer, headers=None):
    """The NeuroengineError for an error in JSON."""
    if isinstance(answer.get("error"), dict):      # the shape of the OpenAI API
        answer = {"reply": answer["error"].get("message"),
                  "error": answer["error"].get("code")}
    retry = answer.get("retry")
    return NeuroengineError(errorcode_of(answer) or NO_CONNECTION,
                            str(answer.get("reply") or "The relay gave no reason."),
                            str(answer.get("error") or ""), pause_of(headers),
                            retry if isinstance(retry, bool) else None)


def is_true(value):
    """Whether a field like raw is set: clients send True, "True", 1 or "1"."""
    return str(value).lower() in ("true", "1")


def prompt_of(messages):
    """Messages as one prompt, for a provider that takes a text.

    A single user message is the prompt itself. Else each message is a line "Role: text"
    after a blank one, and an open "Assistant:" asks for the next. An assistant's message at
    the end is one to go on with.
    """
    texts = [(message.get("role", "user"), content_text(message.get("content")))
             for message in messages]
    if len(texts) == 1 and texts[0][0] == "user":
        return texts[0][1]
    return "\n\n".join("%s: %s" % (role.capitalize(), text)
                       for role, text in texts) + (
                           "\n\nAssistant:" if texts[-1:] and texts[-1][0] != "assistant" else "")


def content_text(content):
    """The text of a message's content: a str, a list of parts, or None."""
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content
                       if isinstance(part, dict))
    return content or ""


def callback_request(request):
    """A request as the callback gets it: the native fields are all there.

    What came through the OpenAI API is put in the same words.
    """
    request = dict(request)
    if "message" not in request:
        if request.get("messages"):
            request["message"] = prompt_of(request["messages"])
        elif isinstance(request.get("prompt"), str):
            request["message"], request["raw"] = request["prompt"], "True"
        else:
            request["message"] = ""
    for ours, theirs in (("max_new_len", ("max_completion_tokens", "max_tokens")),
                         ("repetition_penalty", ("repeat_penalty",))):
        for name in theirs:
            if request.get(name) is not None:
                request.setdefault(ours, request[name])
    for name, default in SAMPLING.items():
        if request.get(name) is None:
            request[name] = default
    request["raw"] = "True" if is_true(request["raw"]) else "False"
    return request


def items_of(answer):
    """Yield the items of what a callback returned. Raises NeuroengineError."""
    if isinstance(answer, str):
        answer = reply_in(answer)
    if isinstance(answer, dict):
        if answer.get("errorcode"):
            raise NeuroengineError(1, str(answer.get("reply") or "no reason given"))
        if not isinstance(answer.get("reply"), str):
            raise bad_callback("its answer has no reply that is a text")
        answer = answer["reply"]
    if isinstance(answer, str):
        answer = (answer,)
    elif answer is None or isinstance(answer, (bytes, int, float)):
        raise bad_callback("its callback returned %s, not a text" % type(answer).__name__)
    for item in answer:
        check_item(item)
        if item:
            yield item


def check_item(item):
    """Raise NeuroengineError if a callback cannot yield this, or it is another's error."""
    if isinstance(item, Reply) and item.errorcode:         # it asked another service
        raise NeuroengineError(1, str(item))
    if not isinstance(item, (str, dict)):
        raise bad_callback("its callback yielded %s, not a text" % type(item).__name__)


def bad_callback(words):
    """The NeuroengineError for a mistake of a callback, which goes to the provider's log, too."""
    return NeuroengineError(1, words, row="bad_callback")


def reply_in(text):
    """What a str from a callback means: a JSON object with a reply, or itself."""
    if text.lstrip()[:1] == "{":
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return text
        if isinstance(value, dict) and "reply" in value:
            return value
    return text


##############################################################################
# Transport: the only code that knows http.client and ssl
##############################################################################

BROKEN = (OSError, http.client.HTTPException)    # how a connection fails


class Incoming(io.RawIOBase):
    """What comes from a socket until a deadline, for http.client. It waits in short slices:
    on Windows Ctrl-C is noticed only between two of them. timeout: of silence."""

    def __init__(self, sock, timeout, deadline=math.inf):
        super().__init__()
        self._sock, self._timeout, self._deadline = sock, timeout, deadline

    def makefile(self, mode):
        return io.BufferedReader(self, 65536)

    def readable(self):
        return True

    def readinto(self, buffer):
        silent = time.monotonic() + self._timeout
        self._sock.settimeout(min(SLICE_SECONDS, self._timeout))
        while time.monotonic() < min(silent, self._deadline):
            with contextlib.suppress(socket.timeout):
                return self._sock.recv_into(buffer)
        raise socket.timeout("timed out")


class Connection:
    """A connection to one server, kept for the next request."""

    def __init__(self, opener):
        self._opener = opener      # of http.client: it knows tunnels and TLS
        self._sock = None
        self.aborted = False
        self.used_at = 0.0

    def exchange(self, data, method, timeout, deadline):
        """Send a request and return the http.client response, which must end by the deadline.
        Raises OSError or HTTPException."""
        if self._sock is None:
            self._opener.timeout = min(timeout, CONNECT_SECONDS)
            self._opener.connect()
            self._sock = self._opener.sock
            keep_alive(self._sock)
        if self.aborted:
            raise ConnectionAbortedError("cancelled")
        self._sock.settimeout(timeout)
        refused = False
        try:
            for start in range(0, len(data), PIECE_BYTES):     # the timeout is for each
                self._sock.sendall(data[start:start + PIECE_BYTES])
        except ConnectionError:
            refused = True         # its answer, if there is one, says why
        response = http.client.HTTPResponse(Incoming(self._sock, timeout, deadline),
                                            method=method)
        try:
            response.begin()
        except BaseException:
            response.close()
            raise
        response.will_close = response.will_close or refused
        return response

    def abort(self):
        """Cut it, from any thread: whatever waits for it ends with an error."""
        self.aborted = True
        if self._sock is not None:
            try:
                socket.socket.shutdown(self._sock, socket.SHUT_RDWR)
            except OSError:
                pass

    def close(self):
        self._opener.close()


def keep_alive(sock):
    """Have the system probe an idle connection: it notices a server that vanished, and
    keeps routers from forgetting the connection during a long wait."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPALIVE", 30), ("TCP_KEEPINTVL", 10),
                        ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):              # macOS says KEEPALIVE for KEEPIDLE
            try:
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
            except OSError:
                pass


class Response:
    """One response of a kept connection, which goes back to `keep` when it was read."""

    def __init__(self, connection, raw, keep, call):
        self.status, self.headers = raw.status, raw.headers
        self._connection, self._raw, self._keep = connection, raw, keep
        self._call = call

    def read(self):
        """The whole body. Raises OSError or HTTPException if it is cut."""
        raw = self._raw
        try:
            data = raw.read()
        except ValueError as error:            # of http.client: a chunk of a negative size
            raise http.client.HTTPException(str(error)) from None
        finally:
            self.close()
        # http.client takes a head that was cut for a whole one, without a length.
        if not data and raw.status < 300 and raw.length is None and not raw.chunked:
            raise http.client.HTTPException("the answer was cut in its head")
        return data

    def lines(self):
        """Yield the body's lines as they come, without their ends, and whether they had one:
        a proxy may end in good order what was cut."""
        rest, size = [], 0         # pieces: to join them with each read takes 20 MB minutes
        while True:
            data = self._raw.read1(65536)
            if not data:
                break
            *lines, last = data.split(b"\n")
            if lines:
                lines[0] = b"".join(rest) + lines[0]
                rest, size = [], 0
            rest.append(last)
            size += len(last)
            if size > MAX_LINE_BYTES:
                raise http.client.HTTPException("a line is too long")
            for line in lines:
                yield line, True
        if size:
            yield b"".join(rest), False
        self.close()

    def close(self):
        """Keep the connection if it can be used again, otherwise close it."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        self._call.ended()                     # the connection is for others now
        whole = self._raw.isclosed() and not self._raw.will_close
        self._raw.close()
        if whole and not connection.aborted:
            self._keep(connection)
        else:
            connection.close()


class Transport:
    """Sends JSON to one server, over connections that it keeps, and returns the answers.

    base: the server's URL. verify_ssl: True, False, or the path of a CA file.
    """

    def __init__(self, base, verify_ssl=True):
        self.base, self._verify_ssl = base, verify_ssl
        self._where = self._context = None
        # Idle connections. Without a lock: its operations are atomic, and a destructor that
        # closes a stream comes amid anything, also in a thread that holds a lock.
        self._free = []
        self._process = os.getpid()        # whose connections they are

    def open(self, method, path, body=None, key="", timeout=REQUEST_SECONDS,
             call=None, within=math.inf, **headers):
        """Send one request; its Response. Raises OSError, HTTPException, or
        NeuroengineError for what cannot be sent.

        timeout: seconds of silence. within: seconds in which the whole response must come.
        call: the Call that may cut the connection until the response was read.
        """
        data, call, deadline = b"", call or Call(), time.monotonic() + within
        if body is not None:
            data = encode(body)
            headers["Content-Type"] = "application/json"
        if key:
            headers["Authorization"] = "Bearer " + clean_key(key)
        if data or method not in ("GET", "HEAD"):
            headers["Content-Length"] = len(data)
        data = self._head(method, path, headers) + data    # sent in one write if small
        while True:
            connection = self._kept()
            used = connection is not None
            if not used:
                connection = self._new()
            call.started(connection)
            try:
                raw = connection.exchange(data, method, timeout, deadline)
            except BaseException as error:
                connection.close()
                # The server may have closed a kept connection in this moment. Everything
                # that we send may be sent twice, so try a fresh connection.
                if used and not connection.aborted and isinstance(
                        error, (ConnectionError, http.client.BadStatusLine)):
                    continue
                raise
            return Response(connection, raw, self._keep, call)

    def call(self, method, path, body=None, kind=dict, **more):
        """Send one request and return the JSON answer, of type `kind`.

        Raises NeuroengineError, for connection trouble too.
        """
        try:
            response = self.open(method, path, body, **more)
            data = response.read()
        except BROKEN as error:
            raise no_connection(self.base, error) from error
        return parse_answer(response.status, response.headers, data, kind)

    def _head(self, method, path, headers):
        """The head of a request, as bytes."""
        secure, host, prefix, proxy, proxy_headers = self.where()
        if proxy and not secure:
            prefix = "http://%s%s" % (host, prefix)
            headers.update(proxy_headers)
        headers.setdefault("User-Agent", "neuroengine/" + __version__)
        for name, value in headers.items():
            if not re.match(r"[\t -~]*\Z", str(value)):
                raise NeuroengineError(10, "The header %s cannot hold %r." % (name, value),
                                       "invalid_request")
        return ("%s %s%s HTTP/1.1\r\nHost: %s\r\n%s\r\n" % (
            method, prefix, path, host, "".join(
                "%s: %s\r\n" % (name.replace("_", "-"), value)
                for name, value in headers.items()))).encode("ascii")

    def where(self):
        """(secure, host, prefix of paths, proxy or None, the proxy's headers)."""
        if self._where is None:
            self._where = self._look()
        return self._where

    def context(self):
        """The SSLContext of its connections."""
        if self._context is None:
            self._context = tls_context(self._verify_ssl)
        return self._context

    def _look(self):
        try:
            url = urllib.parse.urlsplit(self.base)
            secure = {"http": False, "https": True}[url.scheme]
            host = url.netloc.rpartition("@")[2].encode("idna").decode("ascii")
            if not re.match(r"(?!\d+\Z)[\w.:%-]+\Z", url.hostname or "") \
                    or not re.match(r"[!-~]+\Z", url.path or "/") or url.query or url.fragment:
                raise ValueError
            port = re.search(r":([^\]]*)\Z", host)
            if port and not 0 < int(port.group(1)) < 65536:
                raise ValueError
        except (KeyError, ValueError):
            raise NeuroengineError(NO_CONNECTION, "%s is not an address of a relay: write "
                                   "http://HOST:PORT or https://HOST, with a PORT from 1 to "
                                   "65535." % self.base, "bad_address") from None
        try:
            proxy, headers = proxy_of(url)
        except ValueError as error:
            raise NeuroengineError(NO_CONNECTION, "The proxy that the environment names for %s "
                                   "cannot be used (%s)." % (self.base, error),
                                   "bad_address") from None
        return secure, host, url.path.rstrip("/"), proxy, headers

    def _new(self):
        """A new Connection, not yet connected."""
        secure, host, _, proxy, proxy_headers = self.where()
        if not secure:
            return Connection(http.client.HTTPConnection(proxy or host))
        opener = http.client.HTTPSConnection(proxy or host, context=self.context())
        if proxy:
            opener.set_tunnel(host, headers=proxy_headers)
        return Connection(opener)

    def _kept(self):
        """A kept connection that is likely to be open still, or None."""
        if self._process != os.getpid():       # after a fork they are the parent's: two
            # processes that read from one get each other's answers
            self._free, self._process = [], os.getpid()    # in this order, for other threads
        with contextlib.suppress(IndexError):  # there is none
            while True:
                connection = self._free.pop()
                if time.monotonic() - connection.used_at < KEPT_SECONDS:
                    return connection
                connection.close()
        return None

    def _keep(self, connection):
        connection.used_at = time.monotonic()
        if len(self._free) < MAX_KEPT:
            self._free.append(connection)
        else:
            connection.close()


class RelayTransport(Transport):
    """A Transport that says what else is there where no relay is."""

    def call(self, method, path, body=None, **more):
        try:
            return super().call(method, path, body, **more)
        except NeuroengineError as error:
            raise self.explain(error) from error

    def explain(self, error):
        """The error, or a better one if the address is that of another kind of server."""
        prefix = self.where()[2] if error.name not in WAY_ERRORS else ""
        if prefix and error.name in ("not_found", "method_not_allowed") \
                and error.said.startswith("There is no /"):
            return NeuroengineError(NO_CONNECTION, (
                "The address %s has a path, %s, where the relay has nothing. Write %s: the "
                "name of the service is not part of it." % (
                    self.base, prefix, self.base[:-len(prefix)])), "bad_address")
        if error.name == "forbidden" and "not https" in error.said:
            return NeuroengineError(NO_CONNECTION, "%s speaks TLS: write %s." % (
                self.base, self.base.replace("http:", "https:", 1)), "needs_tls")
        if error.errorcode == NO_CONNECTION and error.name not in WAY_ERRORS \
                and not error.retry:           # a proxy's 502 tells nothing
            try:
                models = super().call("GET", "/v1/models", timeout=5).get("data")
                if isinstance(models, list) and models and "neuroengine" not in [
                        model.get("owned_by") for model in models if isinstance(model, dict)]:
                    return NeuroengineError(NO_CONNECTION, (
                        "%s is an LLM server, not a relay. Share it with `%s share NAME "
                        "--relay URL --upstream %s`." % (
                            self.base, how_to_run("neuroengine.py"), self.base)), "llm_server")
            except NeuroengineError:
                pass
        return error


def proxy_of(url):
    """(host and port of the proxy for a split URL, the headers it wants); or (None, {}).
    Loopback is never reached through a proxy. Raises ValueError."""
    if is_loopback(url.hostname) or any(map(urllib.request.proxy_bypass,
                                            (url.netloc, url.hostname))):
        return None, {}
    proxy, headers = urllib.request.getproxies().get(url.scheme), {}
    if not proxy:
        return None, {}
    proxy = urllib.parse.urlsplit(proxy if "://" in proxy else "http://" + proxy)
    if proxy.username:
        import base64
        login = "%s:%s" % (urllib.parse.unquote(proxy.username),
                           urllib.parse.unquote(proxy.password or ""))
        headers["Proxy-Authorization"] = "Basic " + base64.b64encode(
            login.encode("utf-8")).decode("ascii")
    host = proxy.netloc.rpartition("@")[2]
    host.encode("idna")
    if proxy.scheme.startswith("socks"):
        raise ValueError("only HTTP proxies can")
    return host if proxy.port else host + ":80", headers


def encode(body):
    """A body as JSON in UTF-8. Raises NeuroengineError if JSON cannot say it."""
    try:
        text = json.dumps(body, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        try:
            return text.encode("utf-8")
        except UnicodeEncodeError:             # half of a surrogate pair
            return json.dumps(body, separators=(",", ":")).encode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        raise NeuroengineError(10, "The prompt or a parameter is not what JSON can hold: %s."
                               % error, "invalid_request") from None


def clean_key(key):
    """A key without surrounding white space. Raises NeuroengineError if it cannot be one."""
    key = str(key).strip()
    if not re.match(r"[!-~]+\Z", key):
        raise NeuroengineError(30, "Invalid key: a key is one line of letters, digits and "
                               "signs, without spaces.", "invalid_key", row="bad_key")
    return key


def tls_context(verify_ssl):
    """The SSLContext for True, False, or the path of a CA file. Raises NeuroengineError."""
    path = None if isinstance(verify_ssl, (bool, int, type(None))) else verify_ssl
    try:
        context = ssl.create_default_context(cafile=path)
    except (OSError, TypeError, ValueError) as error:      # SSLError is an OSError
        raise NeuroengineError(NO_CONNECTION, "The certificate file %s cannot be used: %s."
                               % (path, "it holds no certificate in PEM" if isinstance(
                                   error, ssl.SSLError) else getattr(
                                       error, "strerror", None) or error),
                               "bad_certificate_file") from None
    if path is None and verify_ssl is not None and not verify_ssl:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


OTHER_NAME = (62, 64)    # X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH


def no_connection(base, error):
    """The NeuroengineError for a connection that could not be made, or broke."""
    if getattr(error, "verify_code", 0) in OTHER_NAME:
        return NeuroengineError(NO_CONNECTION, "The certificate of %s is for other names than "
                                "this." % base, "certificate", row="other_name")
    if isinstance(error, ssl.SSLCertVerificationError):
        return NeuroengineError(NO_CONNECTION, "The certificate of %s cannot be verified "
                                "(%s)." % (base, error.verify_message), "certificate")
    if isinstance(error, (ssl.SSLError, socket.timeout)) and re.search(
            "WRONG_VERSION|RECORD_LAYER|HTTP_REQUEST|handshake operation timed out", str(error)):
        return NeuroengineError(NO_CONNECTION, "%s does not speak TLS: if it is plain HTTP, "
                                "write %s." % (base, base.replace("https:", "http:", 1)),
                                "no_tls")
    why = why_words(error)
    if base == DEFAULT_RELAY and not os.environ.get("NEUROENGINE_SERVER"):
        return NeuroengineError(NO_CONNECTION, "The environment variable NEUROENGINE_SERVER, "
                                "which names the relay, is not set, and the default relay %s "
                                "cannot be reached (%s)." % (base, why), "no_connection",
                                row="no_relay_named")
    url = urllib.parse.urlsplit(base)
    proxy = proxy_of(url)[0]
    if proxy:
        return NeuroengineError(NO_CONNECTION, "Connection error with %s through the proxy %s "
                                "(%s)." % (base, proxy, why), "no_connection")
    if isinstance(error, socket.gaierror):
        return NeuroengineError(NO_CONNECTION, "The host %s was not found (%s). Is the relay's "
                                "address right?" % (url.hostname, why), "no_connection",
                                row="no_host")
    if isinstance(error, ConnectionRefusedError):
        here = is_loopback(url.hostname)
        return NeuroengineError(NO_CONNECTION, "No relay runs at %s (%s). %s" % (
            base, why, "Start one there with `%s --port %d`." % (
                how_to_run("neuroengine_server.py"),
                url.port or (443 if url.scheme == "https" else 80)) if here else
            "Are the address and the port right?"), "no_connection", row="no_relay")
    return NeuroengineError(NO_CONNECTION, "Connection error with %s (%s)." % (base, why),
                            "no_connection")


def why_words(error):
    """What an OSError or HTTPException says, as a part of a sentence."""
    words = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return words[:1].lower() + words[1:] if re.match("[A-Z][a-z]", words) else words


def is_loopback(host):
    """Whether a host is this machine."""
    return bool(re.match(r"(localhost|127\..*|::1)\Z", host or ""))


def pause_before(try_number, retry_after=None):
    """Seconds to wait before the next try: exponential back-off with jitter, on top of what
    the relay asks for (up to a bound), so that not all come back at once."""
    pause = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** min(try_number, 10))
    return min(retry_after or 0, LONGEST_RETRY_AFTER_SECONDS) + pause * (0.5 + random.random() / 2)


##############################################################################
# Terminal: text from others shown safely, on whatever there is to show it
##############################################################################

# Control characters: a terminal may take them for commands. In one-line texts also those
# that turn the direction of what follows.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
CONTROL_BUT_LINES = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text, lines=False):
    """Text from others without control characters; with lines, line ends and tabs stay."""
    text = str(text)
    if lines:
        return CONTROL_BUT_LINES.sub("\ufffd", text.replace("\r", ""))
    return CONTROL.sub("\ufffd", text)


def prepare_streams():
    """Make the standard streams usable whatever they are: absent (pythonw, a closed
    descriptor), of an encoding that lacks characters, or fed with undecodable bytes."""
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def is_terminal(stream):
    """Whether a person sees what is written to a stream."""
    try:
        return stream is not None and stream.isatty()
    except (AttributeError, ValueError):       # ValueError: it is closed
        return False


def columns():
    """The width of the terminal; some do not know theirs and say 0."""
    return shutil.get_terminal_size().columns or 80


class Line:
    """The last line of a terminal, for what happens now; nothing elsewhere. Written
    without escape codes, which old consoles show as they are."""

    def __init__(self, stream=None):
        self._stream = stream or sys.stderr
        self._live = is_terminal(self._stream)
        self._width = 0                        # of what is shown

    def show(self, text):
        """Show a text in place of the one before; "" clears it."""
        if self._live and (text or self._width):
            text = printable(text)[:columns() - 3]
            with contextlib.suppress(OSError, ValueError):     # the terminal may be closed
                # What is shown may have the echo of Ctrl-C, ^C, behind it.
                self._stream.write("\r%s\r%s" % (" " * (self._width + 2), text))
                self._stream.flush()
            self._width = len(text)


##############################################################################
# Client
##############################################################################

Prompt = Union[str, List[Dict[str, Any]]]
LENGTH_ALIASES = frozenset(("max_tokens", "max_completion_tokens"))


class Reply(str):
    """What request() returns: the text of an answer, or of an error, and what is known of it.

    errorcode: 0 for an answer, otherwise the number of the error. error: its name, or "".
    finish_reason: "stop", "length" (the answer was cut at max_new_len), or another word of
    the provider; "" if it said none. usage: its token counts. stats: the relay's receipt.
    """

    errorcode: int
    error: str
    finish_reason: str
    usage: Dict[str, Any]
    stats: Dict[str, Any]

    def __new__(cls, text: str = "", errorcode: int = 0, error: str = "",
                stats: Optional[Dict[str, Any]] = None) -> "Reply":
        self = super().__new__(cls, text)
        self.errorcode, self.error = errorcode, error
        self.stats = stats if isinstance(stats, dict) else {}
        usage = self.stats.get("usage")
        self.usage = usage if isinstance(usage, dict) else {}
        self.finish_reason = str(self.stats.get("finish_reason") or "")
        return self


class Call:
    """One prompt on its way, for stopping it from another thread."""

    def __init__(self):
        self.cancelled = False
        self.undo = None                       # see replied
        self._connection = None
        self._lock = threading.RLock()         # guards all; a destructor may cancel

    def started(self, connection):
        """Note the connection that the prompt uses now."""
        with self._lock:
            self._connection = connection
            if self.cancelled:
                connection.abort()

    def ended(self):
        """The prompt uses its connection no more."""
        with self._lock:
            self._connection = None

    def replied(self, undo):
        """The prompt has its reply. undo: called if the prompt was or will be cancelled."""
        with self._lock:
            self.undo = undo
            if self.cancelled:
                undo()

    def cancel(self):
        with self._lock:
            self.cancelled = True
            if self._connection is not None:
                self._connection.abort()
            if self.undo is not None:
                self.undo()

    def pause(self, seconds):
        """Sleep before the next try, but not after cancel()."""
        deadline = time.monotonic() + seconds
        while not self.cancelled and time.monotonic() < deadline:
            time.sleep(max(0, min(SLICE_SECONDS, deadline - time.monotonic())))


class Tries:
    """Counts the failures of one prompt, and decides whether to send it again."""

    def __init__(self, tries):
        self.left = max(1, tries) - 1
        self.failures = self.lost = self.offline = 0
        self._deadline = time.monotonic() + ANSWER_SECONDS

    def progress(self):
        """Something of the answer came, so the failures so far do not count."""
        self.left, self.failures = self.left + self.failures, 0

    def again(self, error, call):
        """Seconds until the prompt may be sent again; raises the error if it may not."""
        self.lost += error.name == "provider_lost"
        self.offline += error.name == "service_offline"
        retry = error.retry
        if retry is None:
            retry = error.name == "no_connection" or error.name in RETRIED
        # The relay is there, and so is the prompt: to ask on is no further try.
        waiting = error.name == "still_waiting"
        if not retry or not (self.left or waiting) or call.cancelled or self.lost > MAX_LOST \
                or self.offline > MAX_OFFLINE \
                or (error.retry_after or 0) > LONGEST_RETRY_AFTER_SECONDS \
                or time.monotonic() > self._deadline:
            raise error
        if waiting:
            return 0.01
        self.left -= 1
        self.failures += 1
        return pause_before(self.failures - 1, error.retry_after)


class Cursors:
    """How far request() has read the stream of each key.

    A stream is forgotten when REMEMBERED_STREAMS others have ended after it, or when it has
    not been read for ANSWER_SECONDS.
    """

    def __init__(self):
        self._lock = threading.Lock()          # guards both, which have the oldest first
        self._active = collections.OrderedDict()     # key -> (prompt, items, time)
        self._ended = collections.OrderedDict()      # key -> prompt

    def get(self, key, prompt):
        """The number of items received; None if the stream of this prompt has ended."""
        with self._lock:
            if self._ended.get(key) == prompt:
                return None
            known, at, _ = self._active.get(key, (None, 0, 0))
            return at if known == prompt else 0

    def put(self, key, prompt, at):
        """Note the number of items received, or None for the end."""
        now = time.monotonic()
        with self._lock:
            for streams in self._active, self._ended:
                streams.pop(key, None)
            if at is None:
                self._ended[key] = prompt
            else:
                self._active[key] = prompt, at, now
            if len(self._ended) > REMEMBERED_STREAMS:
                self._ended.popitem(last=False)
            while self._active and next(iter(self._active.values()))[2] < now - ANSWER_SECONDS:
                self._active.popitem(last=False)


class Neuroengine:
    """Uses one service of a relay.

    service_name: its name. server_address: the relay's host name (TLS, at server_port), or
    a URL. key: an access key, if the service is private. verify_ssl: True, False, or the
    path of a CA file. One object may be used by several threads.
    """

    def __init__(self, service_name: str, server_address: str = DEFAULT_SERVER,
                 server_port: int = 443, key: str = "",
                 verify_ssl: Union[bool, str] = True) -> None:
        self.service_name = service_name
        self.server_address = server_address
        self.server_port = server_port
        self.key = key
        self.verify_ssl = verify_ssl
        self._transport = RelayTransport(relay_url(server_address, server_port), verify_ssl)
        self._cursors = Cursors()

    def request(self, prompt: Prompt, temperature: float = 1.0, top_p: float = 0.9,
                top_k: int = 40, repetition_penalty: float = 1.2, max_new_len: int = 128,
                seed: int = 0, raw: bool = False, tries: int = 5, gettokens: int = 20,
                streamkey: str = "", *, min_p: float = 0.0, **more: Any) -> Reply:
        """Send a prompt and return the reply, or an error message; a Reply tells which.

        prompt: a str, or a list of {"role", "content"} messages. max_new_len: the most
        tokens. seed: 0 lets the model choose. raw: True for no chat template. tries: how
        often to send it, with growing pauses; a retry never makes the model work twice.
        With a streamkey (a new random text for each prompt) it returns the next gettokens
        tokens, and "" when the stream has ended. Other fields go to the provider as they
        are. Blocks until there is a reply. Does not raise.
        """
        call = more.pop("_call", None) or Call()       # arequest and map bring theirs
        fields = dict(more, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p,
                      repetition_penalty=repetition_penalty, max_new_len=max_new_len,
                      seed=seed, raw=str(raw))
        try:
            if fields.pop("stream", False):
                raise NeuroengineError(10, "request() does not stream: use stream().",
                                       "invalid_request")
            if max_new_len == 128 and not LENGTH_ALIASES.isdisjoint(more):
                del fields["max_new_len"]              # the caller prefers OpenAI's name
            command = self._command_of(prompt, fields)
            if streamkey:
                return self._next_tokens(command, prompt, str(streamkey), gettokens,
                                         tries_of(tries), call)
            repeat = secrets.token_hex(16)
            try:
                answer = self._ask(command, tries_of(tries), call, idempotency_key=repeat)
            except BaseException as error:     # cancelled, or Ctrl-C
                if call.cancelled or not isinstance(error, NeuroengineError):
                    self._stop(repeat)
                raise
            return Reply(answer["reply"], stats=answer.get("stats"))
        except NeuroengineError as error:
            return Reply(error.message, error.errorcode, error.name)

    def stream(self, prompt: Prompt, **params: Any) -> Iterator[str]:
        """Send a prompt and yield the text of the reply as it comes.

        params: as for request; the provider chooses what is not given. If the connection
        breaks, it is made again and the stream resumes, without a gap or a repeat. Closing
        the iterator cancels the prompt. Raises NeuroengineError.
        """
        with contextlib.closing(self._events(prompt, params)) as events:
            for kind, value in events:
                if kind == "text":
                    yield value

    async def arequest(self, prompt: Prompt, *args: Any, **params: Any) -> Reply:
        """request() for asyncio. Each call has its own thread, so all run at once. If the
        task is cancelled, so is the prompt; but the stream of a streamkey goes on."""
        call = Call()
        return await in_thread(lambda: self.request(prompt, *args, _call=call, **params),
                               call.cancel)

    async def astream(self, prompt: Prompt, **params: Any) -> AsyncIterator[str]:
        """stream() for asyncio. If the task is cancelled, so is the prompt."""
        import asyncio                         # 30 ms, and few use it
        loop, call = asyncio.get_running_loop(), Call()
        texts: "asyncio.Queue[Optional[str]]" = asyncio.Queue()

        def pump():
            for text in self.stream(prompt, _call=call, **params):
                loop.call_soon_threadsafe(texts.put_nowait, text)
        pumping = asyncio.ensure_future(in_thread(pump, call.cancel))
        pumping.add_done_callback(lambda _: texts.put_nowait(None))
        try:
            while True:
                text = await texts.get()
                if text is None:
                    break
                yield text
            await pumping                      # raises what ended the stream
        finally:
            pumping.cancel()
            await asyncio.wait([pumping])
            if not pumping.cancelled():
                pumping.exception()            # raised above, or the caller has left

    def map(self, prompts: Iterable[Prompt], *, at_once: int = 8,
            **params: Any) -> Iterator[Reply]:
        """Yield the Reply of each prompt, in order, with up to at_once prompts under way.

        params: as for request. A failed prompt yields a Reply with its errorcode. On a
        terminal, standard error shows the progress. Closing the iterator cancels what is
        under way.
        """
        if isinstance(prompts, str):           # its characters would be the prompts
            raise TypeError("map() takes several prompts: pass a list, or use request()")
        return Batch(self, prompts, max(1, at_once), params).replies()

    def cancel(self, streamkey: str) -> None:
        """Stop the stream of that key; its provider stops working on it.

        Raises NeuroengineError.
        """
        self._send({"command": "cancel", "key": streamkey}, timeout=CANCEL_SECONDS)

    def getModels(self) -> List[Dict[str, Any]]:
        """Return a list of dicts, one for each service of the relay.

        Each has at least name, operator, comment, connected, queuelen and numreq. Raises
        NeuroengineError.
        """
        return self._send({"command": "getmodels"}, kind=list, timeout=REQUEST_SECONDS)

    def send(self, command: Dict[str, Any]) -> Any:
        """Send a dict to the service once, and return what the relay answers. Raises
        NeuroengineError."""
        return self._send(command, kind=(dict, list), timeout=REQUEST_SECONDS
                          if "command" in command else ANSWER_SECONDS)

    def _path(self):
        return "/" + in_path(self.service_name)

    def _command_of(self, prompt, fields):
        """The body for a prompt. Raises NeuroengineError if it is no prompt, or for nobody."""
        if not self.service_name:
            raise NeuroengineError(10, "For which service? Pass its name as service_name; "
                                   "getModels() lists the services.", "invalid_request")
        return command_of(prompt, fields)

    def _send(self, command, timeout=ANSWER_SECONDS, kind=dict, **more):
        try:
            return self._transport.call("POST", self._path(), command, kind=kind,
                                        key=self.key, timeout=timeout, **more)
        except NeuroengineError as error:
            raise self._advise(error)

    def _advise(self, error):
        return advise(error, PYTHON, service=self.service_name, key=self.key,
                      relay=self._transport.base, kind="key")

    def _ask(self, command, tries, call, **headers):
        """Send until there is an answer with a reply; the answer."""
        while True:
            try:
                answer = self._send(command, call=call, **headers)
                if not isinstance(answer.get("reply"), str):
                    raise bad_answer()
                return answer
            except NeuroengineError as error:
                # The stream of a key has ended with its provider, however often we ask.
                if error.name == "provider_lost" and command.get("key"):
                    raise
                call.pause(tries.again(error, call))

    def _next_tokens(self, command, prompt, streamkey, gettokens, tries, call):
        at = self._cursors.get(streamkey, prompt)
        if at is None:
            return Reply()
        command.update(key=streamkey, gettokens=gettokens, at=at)
        try:
            answer = self._ask(command, tries, call)
        except NeuroengineError:
            # Reported once; then the stream has ended, or a loop until "" would not end.
            # But a caller who waits no longer, as asyncio.wait_for(), may ask again.
            if not call.cancelled:
                self._cursors.put(streamkey, prompt, None)
            raise
        done = answer.get("done") or answer["reply"] == ""
        self._cursors.put(streamkey, prompt, None if done else answer.get("at", 0))
        # A task that was cancelled in this moment does not get these tokens.
        call.replied(lambda: self._cursors.put(streamkey, prompt, at))
        return Reply(answer["reply"], stats=answer.get("stats"))

    def _events(self, prompt, params):
        """Send a prompt and yield what happens, as (kind, value):

        "text" and the next piece; "item" and a dict of what text cannot say; "queue" and
        {"position", "waiting", "eta_s", "connected"}, or None once a provider has the
        prompt; "retry" and (error, seconds until the prompt is sent again); at the end
        "stats" and the receipt. Resumes by itself. Raises NeuroengineError.
        """
        params = dict(params)
        call = params.pop("_call", None) or Call()
        tries = tries_of(params.pop("tries", 5))
        command = self._command_of(prompt, dict(params, stream=True,
                                                key=secrets.token_hex(16)))
        at, finished = 0, False
        try:
            while not finished:
                command["at"] = at
                try:
                    for record in self._records(command, call):
                        items, at = fresh_items(record, at)
                        if items:
                            tries.progress()
                        finished = bool(record.get("done"))
                        yield from events_of(record, items)
                    if not finished:           # its last record is missing
                        raise NeuroengineError(NO_CONNECTION, "The stream was cut.",
                                               "no_connection")
                except NeuroengineError as error:
                    if finished:               # the answer is whole
                        break
                    lost = error.name == "provider_lost"     # so this stream has ended
                    try:
                        if lost and at:
                            raise
                        pause = tries.again(error, call)
                    except NeuroengineError:
                        finished = not call.cancelled        # there is nothing to stop
                        raise
                    yield "retry", (error, pause)
                    call.pause(pause)
                    if lost:                   # before its first token: begin another
                        command["key"] = secrets.token_hex(16)
        finally:
            if not finished:
                self._stop(command["key"])

    def _records(self, command, call):
        """Yield the records of a streamed answer. Raises NeuroengineError."""
        try:
            response = self._transport.open(
                "POST", self._path(), command, key=self.key, timeout=STREAM_SECONDS,
                call=call)
            try:
                kind = response.headers.get("Content-Type") or ""
                if not kind.startswith("application/x-ndjson"):
                    parse_answer(response.status, response.headers, response.read(),
                                 kind=())      # none is right: this must raise
                for line, ended in response.lines():
                    try:
                        record = json.loads(line.decode("utf-8"))
                    except ValueError:
                        if ended:
                            raise
                        raise http.client.HTTPException("the answer was cut") from None
                    if errorcode_of(record):
                        raise error_of(record)
                    yield record
            finally:
                response.close()
        except NeuroengineError as error:
            raise self._advise(self._transport.explain(error))
        except (ValueError, AttributeError, RecursionError):
            raise bad_answer() from None
        except BROKEN as error:
            raise self._advise(no_connection(self._transport.base, error)) from error

    def _stop(self, streamkey):
        try:
            self.cancel(streamkey)
        except NeuroengineError:
            pass                               # the relay will notice by itself


def command_of(prompt, fields):
    """The body for a prompt. Raises NeuroengineError if it is no prompt."""
    if isinstance(prompt, list):
        return dict(fields, messages=prompt)
    if isinstance(prompt, str):
        return dict(fields, message=prompt)
    raise NeuroengineError(10, "The prompt is %s: pass a str%s, or a list of messages." % (
        "None" if prompt is None else type(prompt).__name__,
        " (bytes.decode() makes one)" if isinstance(prompt, bytes) else ""),
        "invalid_request")


def tries_of(tries):
    """Tries for the parameter `tries`. Raises NeuroengineError."""
    try:
        return Tries(int(tries))
    except (TypeError, ValueError, OverflowError):
        raise NeuroengineError(10, "tries must be a whole number.", "invalid_request") from None


def unknown_answer(error):
    return NeuroengineError(NO_CONNECTION, "The relay answered in a way that this version does "
                            "not know (%r)." % error, "bad_answer")


def bad_answer():
    return NeuroengineError(NO_CONNECTION, "The relay's answer cannot be understood: is it "
                            "up to date?", "bad_answer")


def events_of(record, items):
    """Yield the events of a record whose fresh items these are; see _events."""
    for is_text, group in itertools.groupby(items, lambda item: isinstance(item, str)):
        if is_text:
            yield "text", "".join(group)       # one event for texts that came together
        else:
            yield from (("item", item) for item in group if isinstance(item, dict))
    if "queue" in record:
        yield "queue", record["queue"]
    if record.get("done"):
        stats = record.get("stats")
        yield "stats", stats if isinstance(stats, dict) else {}


def fresh_items(record, at):
    """(the items of a record from position `at` on, the position after them). Raises
    NeuroengineError if some are missing."""
    items, begin = record.get("items", []), record.get("at", at)
    if not isinstance(items, list) or type(begin) is not int or begin > at:
        raise bad_answer()
    return items[at - begin:], max(at, begin + len(items))


async def in_thread(function, cancel):
    """Run function() in a new thread and await what it returns or raises. If the task is
    cancelled, call cancel(), which must end the function soon."""
    import asyncio
    loop = asyncio.get_running_loop()
    done = loop.create_future()

    def settle(result, error):
        if not done.done():
            if error is None:
                done.set_result(result)
            else:
                done.set_exception(error)

    def run():
        result = error = None
        try:
            result = function()
        except BaseException as why:           # gevent's Timeout, say
            error = why
        try:
            loop.call_soon_threadsafe(settle, result, error)
        except RuntimeError:
            pass                               # the loop is closed
    threading.Thread(target=run, daemon=True).start()
    try:
        return await asyncio.shield(done)
    except asyncio.CancelledError:
        cancel()
        # Nobody needs what it may still raise: asyncio must not complain then.
        done.add_done_callback(lambda done: done.cancelled() or done.exception())
        # Long enough for the relay to get the word, if it is there.
        await asyncio.wait([done], timeout=LEAVE_SECONDS)
        raise


class Batch:
    """The prompts of one map(): threads take them one by one, and replies wait for their
    turn."""

    def __init__(self, client, prompts, at_once, params):
        self._client, self._params, self._at_once = client, params, at_once
        self._total = len(prompts) if hasattr(prompts, "__len__") else None
        self._prompts = iter(prompts)
        self._taking = threading.Lock()        # guards _prompts, which is the caller's code
        # Guards all below. Reentrant: where replies() is part of a cycle, its end comes as a
        # destructor, perhaps in a thread of ours that holds the lock.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)    # threads notify, replies() waits
        self._room = threading.Condition(self._lock)       # the other way round
        self._calls, self._replies = {}, {}    # by the prompt's number
        self._taken = self._yielded = self._failed = 0
        self._ended = False                    # no prompt is left to take
        self._error = None                     # that _prompts or request() raised
        self._begun, self._line = time.monotonic(), Line()

    def replies(self):
        """Yield the replies in order; closing it cancels what is under way."""
        threads = [threading.Thread(target=self._work, daemon=True)
                   for _ in range(self._at_once)]
        try:
            for thread in threads:
                thread.start()
            while True:
                self._show()
                with self._lock:
                    self._changed.wait_for(self._news_locked, SLICE_SECONDS)
                    if not self._news_locked():
                        continue
                    if self._yielded not in self._replies:
                        break
                    reply = self._replies.pop(self._yielded)
                    self._yielded += 1
                    self._room.notify()
                self._show(clear=True)
                yield reply
            if self._error is not None:
                raise self._error
        finally:
            with self._lock:
                self._ended = True
                self._room.notify_all()
                calls = list(self._calls.values())
            for call in calls:
                call.cancel()
            self._show(clear=True)
            # The program may end now, and the threads with it: let them tell the relay.
            deadline = time.monotonic() + LEAVE_SECONDS
            for thread in threads:
                if calls and thread.is_alive() and thread is not threading.current_thread():
                    thread.join(max(0, deadline - time.monotonic()))

    def _news_locked(self):
        """Whether the next reply is there, or none will follow."""
        return self._yielded in self._replies or self._ended and self._yielded == self._taken

    def _work(self):
        """Ask for one prompt after another; for a thread."""
        while True:
            with self._taking:
                number, prompt = self._take()
            if number is None:
                return
            try:
                reply = self._client.request(prompt, _call=self._calls[number], **self._params)
            except BaseException as error:     # of a wrong parameter, say: replies() raises it
                with self._lock:
                    self._error, self._ended = error, True
                    self._taken = min(self._taken, number)
                    self._changed.notify()
                return
            with self._lock:
                del self._calls[number]
                self._replies[number] = reply
                self._failed += reply.errorcode != 0
                self._changed.notify()

    def _take(self):
        """The next prompt's number and the prompt; (None, None) if there is none."""
        with self._lock:
            # An endless iterator must not fill the memory while nobody takes replies.
            self._room.wait_for(lambda: self._ended or self._taken - self._yielded
                                < AHEAD * self._at_once)
        if not self._ended:
            try:
                prompt = next(self._prompts)
                with self._lock:
                    if not self._ended:
                        self._taken += 1
                        self._calls[self._taken - 1] = Call()
                        return self._taken - 1, prompt
            except StopIteration:
                pass
            except BaseException as error:     # sys.exit(), say: replies() raises it
                self._error = error
        with self._lock:
            self._ended = True
            self._changed.notify()
        return None, None

    def _show(self, clear=False):
        """Show the progress on a terminal, or clear it before others write there."""
        done = self._yielded + len(self._replies)
        self._line.show("" if clear else "%d%s answered, %s%.1f a second" % (
            done, " of %d" % self._total if self._total is not None else "",
            "%d failed, " % self._failed if self._failed else "",
            done / max(0.1, time.monotonic() - self._begun)))


##############################################################################
# Asynchronous transport: what providers use, all on one event loop
##############################################################################
# One thread serves every connection of a provider, to the relay and to its LLM server. With
# a thread for each answer, half of the time went into switching between them: 70 us a token,
# and 500 streams came to a halt. (asyncio takes 30 ms to import, and clients need none of it.)


class ResponseReader:
    """One HTTP/1.1 response, from bytes as they come. Does no I/O.

    status: 0 until the head was read. headers: names in lower case. whole: all of the body
    was read. kept: the connection can carry another request after it.
    """

    STATUS = re.compile(r"HTTP/1\.([01]) (\d\d\d)\b")
    FIELD = re.compile(r"\n([^:\s]+)[ \t]*:([^\r\n]*)")
    HEAD_END = re.compile(rb"\r?\n\r?\n")
    # A chunk's first line, which may say more than its size; before it the end of the last one.
    SIZE = re.compile(rb"(?:\r?\n)?([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\n]*)?\r?\n")

    def __init__(self):
        self.status, self.headers = 0, {}
        self.begun = self.whole = self.kept = False
        self._rest = b""
        self._parse = self._head
        self._left = 0             # bytes to come of the body, or of this chunk

    def feed(self, data):
        """The part of the body that is in these bytes. Raises HTTPException."""
        self.begun = True
        if self._rest:
            data, self._rest = self._rest + data, b""
        return self._parse(data)

    def end(self):
        """The connection has ended. Raises HTTPException if the response is cut."""
        if self._parse == self._until_end:
            self.whole = True
        elif not self.whole:
            raise http.client.RemoteDisconnected("the connection was closed" if not self.begun
                                                 else "the answer was cut")

    def _head(self, data):
        body, status = data, 0
        while status < 200:                    # 100 Continue, and then the response itself
            data, end = body, self.HEAD_END.search(body)
            if end is None:
                if len(data) > MAX_HEAD_BYTES or data[:5] != b"HTTP/"[:len(data)]:
                    raise http.client.BadStatusLine(repr(data[:40]))
                self._rest = data
                return b""
            head, body = data[:end.start()].decode("latin-1"), data[end.end():]
            match = self.STATUS.match(head)
            if not match:
                raise http.client.BadStatusLine(head[:80])
            status = int(match.group(2))
        headers = {name.lower(): value.strip() for name, value in self.FIELD.findall(head)}
        self.status, self.headers = status, headers
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise http.client.HTTPException("the answer is compressed, unasked")
        keeps = headers.get("connection", "keep-alive" if match.group(1) == "1" else "close")
        self.kept = "close" not in keeps.lower()
        if "chunked" in headers.get("transfer-encoding", "").lower():
            self._parse = self._chunks
        elif status in (204, 304):
            self._parse = self._counted
        elif headers.get("content-length", "").isdecimal() and len(headers["content-length"]) < 19:
            self._parse, self._left = self._counted, int(headers["content-length"])
        else:
            self._parse, self.kept = self._until_end, False
        return self._parse(body)

    def _until_end(self, data):
        return data

    def _counted(self, data):
        body = data[:self._left]
        self._left -= len(body)
        if not self._left:
            self.whole = True
            self.kept = self.kept and len(data) == len(body)
        return body

    def _chunks(self, data):
        if not self._left and data.endswith(b"\r\n"):     # most reads are one whole chunk
            size, _, chunk = data.partition(b"\r\n")
            if len(chunk) > 2 and size.lower() == b"%x" % (len(chunk) - 2):
                return chunk[:-2]
        body, at, left = [], 0, self._left
        while at < len(data):
            if not left:
                size = self.SIZE.match(data, at)
                if size is None:
                    self._rest = data[at:]
                    if b"\n" in self._rest[2:] or len(self._rest) > MAX_HEAD_BYTES:
                        raise http.client.HTTPException("a chunk without a size")
                    break
                at, left = size.end(), int(size.group(1), 16)
                if not left:                   # the last one; what may follow is of no use
                    self.whole = True
                    self.kept = self.kept and data[at:] == b"\r\n"
                    break
            end = at + left
            body.append(data[at:end])
            if end > len(data):
                left = end - len(data)
                break
            at, left = end + 2 * data.startswith(b"\r\n", end), 0
        self._left = left
        return body[0] if len(body) == 1 else b"".join(body)


class Exchange:
    """One request on its way, and its response. Ends by itself after `timeout` seconds of
    silence.

    sink: gets the body of a success as it comes, by feed(data), which may raise. Its `line`
    is set to the connection; its `finished` says that nothing more is needed. Without a sink
    the body is gathered.
    """

    def __init__(self, loop, timeout, sink=None):
        self.reader, self.sink = ResponseReader(), sink
        self.body = bytearray()      # bytes would be copied for each piece
        self.done = loop.create_future()
        # It may fail when nobody waits for it any more: asyncio must not complain then.
        self.done.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._loop, self._timeout, self._heard = loop, timeout, loop.time()
        self._timer = loop.call_later(timeout, self._look)

    def received(self, data):
        self._heard = time.monotonic()
        reader, sink = self.reader, self.sink
        try:
            body = reader.feed(data)
            if sink is None or reader.status >= 300:
                self.body += body
                if len(self.body) > MAX_LINE_BYTES:
                    raise http.client.HTTPException("an answer without end")
            elif body:
                sink.feed(body)
        except Exception as error:             # carry() raises it
            return self.end(error)
        if reader.whole:
            self.end()
        elif sink is not None and sink.finished and self._timeout > LINGER_SECONDS:
            self._timeout = LINGER_SECONDS     # some servers never end their streams
            self._timer.cancel()
            self._timer = self._loop.call_later(LINGER_SECONDS, self._look)

    def lost(self, error):
        """The connection has ended, with an error or without."""
        try:
            if error is not None and not self._enough():
                raise error
            if not self._enough():
                self.reader.end()
        except Exception as why:
            return self.end(why)
        self.end()

    def end(self, error=None):
        self._timer.cancel()
        if not self.done.done():
            if error is None:
                self.done.set_result(None)
            else:
                self.done.set_exception(error)

    def _enough(self):
        return self.sink is not None and self.sink.finished

    def _look(self):
        left = self._heard + self._timeout - self._loop.time()
        if left > 0.001:
            self._timer = self._loop.call_later(left, self._look)
        else:
            self.end(None if self._enough() else
                     socket.timeout("no answer within %d s" % self._timeout))


class Intake:
    """Reads many sockets for one event loop, which watches only one for them: an epoll
    object that watches them all. (Reading a token takes 12 us this way, 17 by asyncio alone.)
    Linux has that; elsewhere, and for TLS, asyncio reads.

    lazy: it rests after each look, in proportion to how long that took, unless it had to
    wait longer than that for something to read. So the more streams there are, the more
    tokens of each gather until the next look, to which several are hardly more work than one:
    19 instead of 36 us a token with 256 streams of 50/s.
    """

    AVAILABLE = hasattr(select, "epoll")

    def __init__(self, loop, lazy=False):
        self._loop, self._lazy = loop, lazy
        self._epoll, self._read_of = select.epoll(), {}    # number of a socket -> its read
        self._wake()

    def watch(self, number, read):
        """Call read() whenever there is something in the socket of this number."""
        if number not in self._read_of:
            self._read_of[number] = read
            self._epoll.register(number, select.EPOLLIN)

    def forget(self, number):
        """Watch it no more, before it is closed."""
        if self._read_of.pop(number, None):
            self._epoll.unregister(number)

    def _wake(self):
        self._idle_since = self._loop.time()
        self._loop.add_reader(self._epoll.fileno(), self._look)

    def _look(self):
        began = self._loop.time()
        for number, _ in self._epoll.poll(0):
            read = self._read_of.get(number)
            if read is not None:               # one before it may have ended it
                read()
        waited, self._idle_since = began - self._idle_since, self._loop.time()
        rest = min(REST_FACTOR * (self._idle_since - began), LONGEST_REST_SECONDS)
        if self._lazy and waited < rest:
            self._loop.remove_reader(self._epoll.fileno())
            self._loop.call_later(rest, self._wake)


class AsyncConnection:
    """A connection, kept for the next request: an asyncio.Protocol."""

    def __init__(self, on_close):
        self._on_close, self._exchange = on_close, None
        self._sock = self._error = None                    # if Intakes read
        self._intakes = self._intake = None                # both, and the one that does
        self.transport = None

    def read_by(self, intakes, sock):
        """Let Intakes read, from now on: an eager one, or a lazy one."""
        self.transport.pause_reading()
        self._sock, self._intakes, self._intake = sock, intakes, intakes[0]
        self.resume()

    def read_lazily(self, lazily):
        """Whether what comes can wait until the lazy one looks at many sockets at once."""
        if self._intakes is not None and self._intake is not self._intakes[lazily]:
            self.pause()
            self._intake = self._intakes[lazily]
            self.resume()

    def pause(self):
        """Read no more, until resume()."""
        if self._intake is None:
            self.transport.pause_reading()
        else:
            self._intake.forget(self._sock.fileno())

    def resume(self):
        if self.transport.is_closing():
            return                             # before Python 3.11, TLS raises AttributeError
        if self._intake is None:
            self.transport.resume_reading()
        else:
            self._intake.watch(self._sock.fileno(), self._read)

    def _read(self):
        try:
            data = self._sock.recv(READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._error, data = error, b""
        if data:
            self.data_received(data)
        else:
            self.pause()
            self.transport.abort()

    async def carry(self, exchange, data):
        """Send a request and wait until its response was read."""
        self._exchange = exchange
        if exchange.sink is not None:
            exchange.sink.line = self
        if self.transport is None or self.transport.is_closing():
            raise ConnectionResetError("the connection was closed")
        self.transport.write(data)
        kept = False                           # only if nothing is raised
        try:
            await exchange.done
            kept = exchange.reader.whole and exchange.reader.kept
        finally:
            exchange.end()
            self._exchange = None
            if kept:
                self.resume()                  # the sink may have had it pause
                self.read_lazily(False)
            else:
                self.transport.abort()

    def connection_made(self, transport):
        self.transport = transport
        with contextlib.suppress(AttributeError):      # uvloop's has none
            transport.max_size = READ_BYTES    # asyncio's own 256 KB are 1,700 tokens, for
                                               # which all others would wait

    def data_received(self, data):
        if self._exchange is None:
            self.transport.abort()             # an answer that nobody asked for
        else:
            self._exchange.received(data)

    def eof_received(self):
        return False                           # close our side, too

    def connection_lost(self, error):
        if self._intake is not None:
            self._intake.forget(self._sock.fileno())
        if self._exchange is not None:
            self._exchange.lost(error or self._error)
        self._on_close(self)

    def pause_writing(self):
        pass                                   # one request at a time is bound enough

    resume_writing = pause_writing


class AsyncTransport:
    """As Transport, for asyncio. For one event loop. on_idle_end: called when the server
    closes a connection that was idle, as it does when it ends. wants_spare: whether to have
    a further connection ready while one is used."""

    def __init__(self, transport, keep=16, on_idle_end=lambda: None,
                 wants_spare=lambda: False):
        import asyncio
        self._loop, self._transport, self._most_kept = (
            asyncio.get_running_loop(), transport, keep)
        self.base, self._where = transport.base, transport.where()
        secure, host, prefix, proxy, fields = self._where
        through = proxy and not secure         # else the proxy has seen its fields
        self._prefix = ("http://" + host if through else "") + prefix
        self._fields = "".join("%s: %s\r\n" % pair for pair in [
            ("Host", host), ("Content-Type", "application/json"),
            ("User-Agent", "neuroengine/" + __version__), *(fields.items() if through else ())])
        self._free, self._on_idle_end = [], on_idle_end
        self._wants_spare, self._opening = wants_spare, None
        self._near = None                      # the server's address, if it is on this machine
        self._intakes = None
        if Intake.AVAILABLE and not self._where[0]:
            self._intakes = Intake(self._loop), Intake(self._loop, lazy=True)

    async def call(self, path, body, key):
        """POST JSON text and return the relay's answer. Raises NeuroengineError."""
        try:
            status, headers, data = await self.exchange("POST", path, body, key,
                                                        timeout=POLL_SECONDS)
        except NeuroengineError:
            raise
        except Exception as error:             # also a RuntimeError: no thread can start
            raise no_connection(self._transport.base, error) from error
        return parse_answer(status, {"Retry-After": headers.get("retry-after"),
                                     "Location": headers.get("location")}, data)

    async def exchange(self, method, path, body=b"", key="", timeout=POLL_SECONDS, sink=None,
                       headers=()):
        """(status, headers, body) of one request. With a sink, the body of a success goes
        there. Raises OSError or HTTPException. Cancelling it closes the connection."""
        import asyncio
        head = "%s %s%s HTTP/1.1\r\n%s" % (method, self._prefix, path, self._fields)
        if key:
            head += "Authorization: Bearer %s\r\n" % clean_key(key)
        for pair in headers:
            head += "%s: %s\r\n" % pair
        data = ("%sContent-Length: %d\r\n\r\n" % (head, len(body))).encode("latin-1") + body
        if self._opening is not None and not self._free:
            await asyncio.wait([self._opening])
        fresh = not self._free
        while True:
            line = await self._connect() if fresh else self._free.pop()
            if not self._free and self._opening is None and self._wants_spare():
                self._opening = asyncio.ensure_future(self._connect())
                self._opening.add_done_callback(self._opened)
            exchange = Exchange(self._loop, timeout, sink)
            try:
                await line.carry(exchange, data)
                break
            except BROKEN as error:
                # The server may have closed a kept connection in this moment. Everything
                # that we send may be sent twice, so try a fresh one.
                if fresh or exchange.reader.begun or not isinstance(error, ConnectionError):
                    raise
                fresh = True
        if not line.transport.is_closing() and len(self._free) < self._most_kept:
            self._free.append(line)
        else:
            line.transport.abort()
        return exchange.reader.status, exchange.reader.headers, bytes(exchange.body)

    async def _connect(self):
        """A new AsyncConnection."""
        secure, host, _, proxy, proxy_headers = self._where
        url = urllib.parse.urlsplit("//" + host)
        sock = self._connect_again()
        if sock is None:                       # a thread looks up the name and connects
            port = url.port or (443 if secure else 80)
            opener = (http.client.HTTPConnection(proxy, timeout=CONNECT_SECONDS) if proxy else
                      http.client.HTTPConnection(url.hostname, port, timeout=CONNECT_SECONDS))
            if proxy and secure:
                opener.set_tunnel(url.hostname, port, headers=proxy_headers)
            await in_thread(opener.connect, opener.close)
            sock, address = opener.sock, opener.sock.getpeername()[:2]
            self._near = address if not proxy and is_loopback(address[0]) else None
        keep_alive(sock)
        tls = {"ssl": self._transport.context(), "server_hostname": url.hostname,
               "ssl_handshake_timeout": CONNECT_SECONDS} if secure else {}
        _, line = await self._loop.create_connection(lambda: AsyncConnection(self._forget),
                                                     sock=sock, **tls)
        if self._intakes is not None:
            line.read_by(self._intakes, sock)
        return line

    def _connect_again(self):
        """A socket to a server that is known to be on this machine, or None. No thread is
        needed: unless such a server is flooded, it takes no time. llama.cpp needs a new one
        for each answer; with a thread, the first token took 2 to 5 ms longer."""
        try:
            return socket.create_connection(self._near, NEAR_SECONDS) if self._near else None
        except OSError:
            return None

    def _opened(self, opening):
        self._opening = None
        if not opening.cancelled() and opening.exception() is None:
            self._free.append(opening.result())

    def _forget(self, line):
        if line in self._free:
            self._free.remove(line)
            self._on_idle_end()

    def close(self):
        if self._opening is not None:
            self._opening.cancel()
        lines, self._free = self._free, []
        for line in lines:
            line.transport.abort()


##############################################################################
# Provider
##############################################################################


CANCELLED = {"error": "cancelled", "message": "cancelled"}
# How the relay refuses a request because of what is in it: sent again, it would be the same.
REFUSED = frozenset(("invalid_request", "invalid_json", "request_too_large", "bad_http"))
BUSY, GATHERING, IDLE = range(3)   # whether the sender looks into the outbox by itself


class Work:
    """One job in a provider's hands, and the part of its answer that the relay has not
    taken yet."""

    def __init__(self, job, attempt, at, request):
        self.job, self.attempt, self.request = job, attempt, request
        self.head = '{"job":%s,"attempt":%d,"at":' % (to_json(job), attempt)
        self.at, self.items = at, []           # at: offset of items[0]; items: JSON texts
        self.size = self.sent = 0              # characters of all items, of those taken
        self.due = False                       # the sender will look at it by itself
        self.under_way = False                 # a request with its items is: settle is to come
        self.ended = False
        self.error = None
        self.cancelled = False                 # the client has gone or stopped it
        self.stop = None                       # called when it is cancelled
        self.on_room = None                    # called when items were sent


def item_text(item):
    """An item as JSON. Raises NeuroengineError if the relay can never take it."""
    if type(item) is str:
        text = to_json(item)
    else:
        try:
            text = compact(item)
        except (TypeError, ValueError, RecursionError) as error:
            raise bad_callback("its callback yielded what JSON cannot hold (%s)"
                               % error) from None
    if len(text) > MAX_ITEM_BYTES:
        raise NeuroengineError(1, "one item of its answer is over %d MB"
                               % (MAX_ITEM_BYTES >> 20))
    return text


# Made once: json.dumps makes one for each call (1 of 4.5 us).
to_json = json.encoder.encode_basestring       # of a str: 0.05 us
compact = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


class Outbox:
    """The answers being made: items gather here until the relay has taken them.

    While a request to the relay is under way, further items gather, and go together in the
    next. Several may be under way, but never with items of the same work, for these must
    arrive in order. put and end may be called from any thread. wake: called, from any thread,
    when the sender has to look. Does no I/O.
    """

    def __init__(self, wake=lambda: None):
        self._wake = wake
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)     # settle and cancel; put waits
        self._works = {}                       # (job, attempt) -> Work
        self._fresh = collections.deque()      # those with something to send; maybe twice
        self._ready = {}                       # the same, in order, as take knows them
        self._urgent = False                   # among them a first item, or an end
        self._sender = IDLE
        self.served = self.tokens = 0

    def add(self, work):
        """Note a job that was handed to us; False if we have it already."""
        with self._lock:
            return self._works.setdefault((work.job, work.attempt), work) is work

    def put(self, work, item):
        """Add an item; False if the job is cancelled. Raises NeuroengineError if it is none.

        Only for the one thread that answers this job.
        """
        return self.put_all(work, (item,))

    def put_all(self, work, items):
        """As put, for several items."""
        if work.cancelled or not items:
            return not work.cancelled
        texts = list(map(item_text, items))
        # Without the lock, for which 64 workers queued up (52 us of CPU a token with it,
        # 40 without; 500 workers came to a halt). No item is left lying: settle says that
        # the work is not due before it looks for more.
        work.items.extend(texts)
        first = not work.size
        work.size += sum(map(len, texts))
        if not work.due:
            self._make_ready(work, urgent=first)
        return True

    def is_full(self, work):
        """Whether the relay has to take items of this work before more are made."""
        return work.size - work.sent > MAX_UNSENT_BYTES and not work.cancelled

    def wait_for_room(self, work):
        """Block as long as it is full."""
        if self.is_full(work):
            with self._lock:
                while self.is_full(work):
                    self._room.wait()

    def end(self, work, error=None):
        """Note that an answer has ended, with an error or without; unless spoil did."""
        with self._lock:
            self.served += 1
            known = not work.ended and (work.job, work.attempt) in self._works
            if known:
                work.ended, work.error = True, error
        if known:
            self._make_ready(work, urgent=True)

    def _make_ready(self, work, urgent):
        """Have the sender look at a work. Without the lock: this and rest both store before
        they load, so one of them sees the other."""
        work.due = True
        self._fresh.append(work)
        if urgent:
            self._urgent = True
        if self._sender == IDLE or urgent and self._sender == GATHERING:
            self._sender = BUSY
            self._wake()

    def running(self):
        """(job, attempt) of all that we have in hand."""
        with self._lock:
            return list(self._works)

    def rest(self, gather=False):
        """Whether the sender may rest: from now on it is woken for the next item, or, if it
        gathers items for a moment, for a first item or an end only."""
        self._sender = GATHERING if gather else IDLE
        may = not (self._urgent if gather else self._fresh or self._ready)
        if not may:
            self._sender = BUSY
        return may

    def hold(self):
        """The sender looks by itself: do not wake it."""
        self._sender = BUSY

    def take(self, only=None):
        """(entries as JSON texts, what settle wants to know) of all there is to send, or of
        one work."""
        with self._lock:
            self._sender, self._urgent = BUSY, False
            while self._fresh:
                work = self._fresh.popleft()
                if not work.under_way:         # else settle makes it ready again
                    self._ready[work] = True
            entries, taken, size = [], [], 0
            for work in list(self._ready):
                if only is not None and work is not only:
                    continue
                if size > MAX_BATCH_BYTES:
                    self._urgent = True
                    break
                count = self._fitting(work, MAX_BATCH_BYTES - size)
                items = ",".join(work.items[:count])
                last = work.ended and count == len(work.items)
                entries.append("%s%d,\"items\":[%s]%s}" % (
                    work.head, work.at, items, "" if not last else ',"done":true'
                    if not work.error else ',"error":' + json.dumps(work.error)))
                taken.append((work, count, len(items) - max(0, count - 1), last))
                size += len(items)
                del self._ready[work]          # and it is due still, until settle
                work.under_way = True
            return entries, taken

    def _fitting(self, work, room):
        """How many of a work's items go into one request: all, but for a long outage."""
        if work.size - work.sent <= room:
            return len(work.items)
        count = 0
        for item in work.items:
            room -= len(item)
            count += 1
            if room < 0:
                break
        return count

    def settle(self, taken, sent):
        """What take returned has arrived (sent), or has to go again."""
        resumed = []
        with self._lock:
            for work, count, size, last in taken:
                if sent:
                    work.at += count
                    work.sent += size
                    del work.items[:count]
                    self.tokens += count
                    if work.on_room is not None:
                        resumed.append(work.on_room)
                if sent and last:
                    self._works.pop((work.job, work.attempt), None)
                work.due = work.under_way = False
                if (work.items or work.ended and not (sent and last)) \
                        and (work.job, work.attempt) in self._works:
                    self._make_ready(work, urgent=work.ended)
            self._room.notify_all()
        for resume in resumed:
            resume()

    def spoil(self, work, words):
        """Say, instead of what is left of an answer, that the relay refuses it, and stop
        what still makes it."""
        with self._lock:
            stop = None if work.ended else work.stop
            work.items.clear()
            work.sent, work.cancelled, work.ended = work.size, True, True
            work.error = {"error": "provider_error", "message": words}
            self._make_ready(work, urgent=True)
            self._room.notify_all()
        if stop is not None:
            stop()

    def cancel(self, pairs):
        """Mark jobs as not wanted and stop those that still run."""
        stopped = []
        with self._lock:
            for pair in pairs:
                work = self._works.get(tuple(pair))
                if work is not None and not work.cancelled:
                    work.cancelled = True
                    work.items.clear()
                    work.sent = work.size
                    if work.ended:             # its last word must still be said: it
                        work.error = CANCELLED   # tells that a worker is free
                    elif work.stop is not None:
                        stopped.append(work.stop)
            self._room.notify_all()
        for stop in stopped:
            stop()

    def forget(self):
        """Cancel everything and have nothing in hand any more: the relay was told."""
        self.cancel(self.running())
        with self._lock:
            self._works.clear()
            self._ready.clear()
            self._fresh.clear()


class Workers:
    """Answer jobs by a user's callback, in threads; coroutines on an event loop.

    Whatever a callback raises (sys.exit(), gevent's Timeout) ends its answer, and neither a
    thread nor the event loop. Ctrl-C reaches the main thread, which runs no callbacks.
    """

    renders = False            # the callback gets the native fields

    def __init__(self, callback):
        self.callback = callback
        self._todo = collections.deque()
        self._lock = threading.Lock()
        self._arrived = threading.Condition(self._lock)   # work in _todo
        self._threads = []                     # workers, and the one of coroutines
        self._workers = self._resting = 0      # how many there are, and have nothing to do
        self._called = False                   # one of them is on its way to _todo
        self._loop = None                      # of coroutines
        self._closed = False

    def close(self):
        """End the threads, each when what it runs has ended; wait a moment for them: the
        program may end now, and iterators may have something to clean up."""
        with self._lock:
            self._closed = True
            self._arrived.notify_all()
            threads = list(self._threads)
        if self._loop is not None:
            import asyncio
            asyncio.run_coroutine_threadsafe(self._end_loop(), self._loop)
        deadline = time.monotonic() + LEAVE_SECONDS
        for thread in threads:
            thread.join(max(0, deadline - time.monotonic()))

    async def _end_loop(self):
        import asyncio
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if others:
            await asyncio.wait(others)
        self._loop.stop()

    def _run_loop(self):
        self._loop.run_forever()
        self._loop.close()

    async def ready(self):
        """Wait until jobs can be answered."""

    def attach(self, listening):
        """Answer the jobs of this _Listening."""
        self._listening, self._outbox = listening, listening.outbox
        self._most = listening.server._features["workers"]

    def start(self, work):
        """Have a job answered."""
        with self._lock:
            self._todo.append(work)
            self._call_worker_locked()

    def _call_worker_locked(self):
        """Have a worker look at _todo; it calls the next if there is more. (To call one
        for each job took 2.7 times the CPU when answers are so short that a worker which
        is awake gets them all: 69 against 25 us a job.)"""
        if self._called:
            return
        if self._resting:
            self._called = True
            self._arrived.notify()
        elif self._workers < self._most:
            self._called = True
            self._workers += 1
            self._start_locked(self._work)

    def _start_locked(self, target):
        self._threads.append(threading.Thread(target=target, daemon=True))
        self._threads[-1].start()

    def _work(self):
        self._called = False
        while True:
            with self._lock:
                self._resting += 1
                while not self._todo:
                    if self._closed:
                        return
                    self._arrived.wait()
                    self._called = False
                self._resting -= 1
                work = self._todo.popleft()
                if self._todo:
                    self._call_worker_locked()
            self._answer(work)

    def _answer(self, work):
        """Run the callback for one job and put its items into the outbox."""
        answer, error = None, None
        try:
            if not work.cancelled:
                answer = self.callback(callback_request(request_left(work)))
                if hasattr(answer, "__await__") or hasattr(answer, "__aiter__"):
                    task, answer = answer, None            # not ours to close any more
                    return self._continue(work, task)
                for item in items_of(answer):
                    self._check(work, item)
                    self._outbox.wait_for_room(work)
                    if not self._outbox.put(work, item):
                        break
        except BaseException as why:
            error = self._error_of(work, why)
        finally:
            try:
                close = getattr(answer, "close", None)
                if close is not None:
                    close()
            except BaseException:
                self._listening.status.failure("Closing it failed:")
        self._end(work, error)

    def _end(self, work, error):
        self._outbox.end(work, error or (CANCELLED if work.cancelled else None))

    def _error_of(self, work, why):
        """The entry's error for what a callback raised."""
        if work.cancelled:
            return CANCELLED
        if isinstance(why, NeuroengineError):
            if why.row == "bad_callback":
                self._listening.status.event("A prompt was not answered: %s." % why)
            return error_entry(why)
        self._listening.status.failure("The callback failed:")
        return {"error": "provider_error",
                "message": "its program raised %s" % type(why).__name__}

    def _check(self, work, item):
        """Raise NeuroengineError if the client will take nothing but a tool call, and this
        is text."""
        request = work.request
        if request.get("tools") and type(item) is str and request.get("tool_choice") not in (
                None, "auto", "none"):
            raise NeuroengineError(1, "a tool call is demanded, and it answers with text",
                                   "unsupported")

    def _continue(self, work, answer):
        """Have a coroutine or an async generator go on, on the loop that serves them all."""
        import asyncio
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._start_locked(self._run_loop)
        task = asyncio.run_coroutine_threadsafe(self._await(work, answer), self._loop)
        work.stop = task.cancel
        if work.cancelled:
            task.cancel()

    async def _await(self, work, answer):
        error, stream = None, None
        try:
            if hasattr(answer, "__await__"):
                answer = await answer
            if hasattr(answer, "__aiter__"):
                stream = answer
                async for item in stream:
                    check_item(item)
                    if not await self._put(work, item):
                        break
            else:
                for item in items_of(answer):
                    if not await self._put(work, item):
                        break
        except BaseException as why:
            error = self._error_of(work, why)
        finally:
            try:
                if hasattr(stream, "aclose"):
                    await stream.aclose()
            except BaseException:
                self._listening.status.failure("Closing it failed:")
            self._end(work, error)

    async def _put(self, work, item):
        import asyncio
        self._check(work, item)
        while self._outbox.is_full(work):
            await asyncio.sleep(0.05)
        return self._outbox.put(work, item) if item else not work.cancelled


def request_left(work):
    """A job's request. If another provider began the answer, its tokens count, too."""
    request = work.request
    if not request.get("reply_so_far"):
        return request
    return dict(request, **{name: max(1, request[name] - work.at)
                            for name in LENGTH_FIELDS if isinstance(request.get(name), int)
                            and request[name] > 0})        # -1 is without end, and stays it


def error_entry(error):
    """An error as an entry of a reply has it."""
    return dict(getattr(error, "details", ()), error=error.name or "provider_error",
                message=error.message)


class NeuroengineServer:
    """Shares an LLM: answers the prompts that a relay has for a service.

    server_address, server_port and verify_ssl are as in Neuroengine.
    """

    def __init__(self, server_address: str = DEFAULT_SERVER, server_port: int = 443,
                 verify_ssl: Union[bool, str] = True) -> None:
        self.server_address, self.server_port = server_address, server_port
        self.verify_ssl = verify_ssl
        self.error = ""           # in words, why the last login failed
        self._transport = RelayTransport(relay_url(server_address, server_port), verify_ssl)
        self.service_name = self.service_key = None
        self._session = None
        self._features = {"workers": 1, "continues": False}
        self._stale = True        # not logged in with those
        self._listening = None    # the _Listening that runs
        self._stopping = False
        self._paused = False      # upstream gone, or closed: log in when that is over
        self._hours = ()          # when to share, as parse_hours has it

    def login(self, service_name: str, service_key: str) -> int:
        """Log in to the relay as a provider of that service, with its service key.

        Returns 0, or a negative number: -1 if the relay cannot be reached, else the
        negative of the relay's errorcode (-30: wrong key). self.error has the words; it is
        "" after success.
        """
        self.service_name, self.service_key, self.error = service_name, service_key, ""
        self._stopping = False
        try:
            if not service_name:
                raise NeuroengineError(10, "To which service? Pass its name to login().",
                                       "invalid_request")
            self._log_in()
        except NeuroengineError as error:
            self.error = self._advise(error).message
            return -abs(error.errorcode)
        return 0

    def listen(self, answer_callback: Callable[[Dict[str, Any]], Any], workers: int = 1, *,
               continues: bool = False) -> None:
        """Answer requests until Ctrl-C, SIGTERM or stop(); unfinished jobs then go back to
        the relay.

        answer_callback gets each request as a dict (message, the sampling fields, and
        whatever else the client sent) and returns the reply: a str, a JSON text or a
        dict with "reply", or an iterator of str, which is streamed as it yields and
        closed when the client has gone. It may be a coroutine function or an async
        generator: one event loop in one thread runs them all, and cancels those whose
        client has gone. workers: how many callbacks run at once, in threads if they
        are no coroutines. continues: the callback can go on with an answer that another
        provider began; it finds the text so far in request["reply_so_far"], and returns
        what follows. Reconnects by itself. Raises NeuroengineError if the service key is
        wrong, or the service is unknown.
        """
        if self.service_name is None:
            raise NeuroengineError(NO_CONNECTION, "Call login() before listen().")
        if self._listening is not None:
            raise RuntimeError("listen() runs already: pass workers=N for more prompts at once")
        if not callable(answer_callback):
            raise TypeError("listen() takes a function that answers a request, not %s: pass "
                            "answer, not answer()" % type(answer_callback).__name__)
        if not isinstance(workers, int) or workers < 1:
            raise ValueError("workers must be a whole number, at least 1")
        self._declare(workers=workers, continues=continues)
        try:
            # Without a live line: what the callback prints would stand behind it.
            run_listenings([_Listening(self, Workers(answer_callback),
                                       Status(self._hours, line=False))])
        except NeuroengineError as error:
            raise error.with_traceback(None) from None     # theirs would hide the words

    def stop(self) -> None:
        """Make listen, which runs in another thread, return as if by Ctrl-C. If that thread
        has not come as far as listen, it will return at once, unless login follows first."""
        self._stopping = True
        listening = self._listening
        if listening is not None:
            return listening.stop()
        session, self._session, self._stale = self._session, None, True
        if session:
            self._log_out(session)

    def _advise(self, error):
        return advise(error, PYTHON, service=self.service_name, key=self.service_key,
                      relay=self._transport.base, kind="service_key",
                      source="where `share` found it")

    def _declare(self, **features):
        """Tell the relay what this provider can do, at the next login."""
        features = dict(self._features, **features)
        if features != self._features:
            self._features, self._stale = features, True

    def _path(self, action):
        return "/provider/%s/%s" % (in_path(self.service_name), action)

    def _call(self, action, timeout=REQUEST_SECONDS, **body):
        return self._transport.call("POST", self._path(action), body, key=self.service_key,
                                    timeout=timeout)

    def _log_in(self):
        old, self._session = self._session, None
        self._session = self._call("login", **self._features).get("session")
        if not isinstance(self._session, str):
            raise NeuroengineError(NO_CONNECTION, "The relay answered a login without a "
                                   "session.", "bad_answer")
        self._stale = False
        if old:
            self._log_out(old)

    def _log_out(self, session):
        try:
            self._call("logout", timeout=CANCEL_SECONDS, session=session)
        except NeuroengineError:
            pass                               # it has ended, or will by itself

class Alarm:
    """Lets one task wait until another rings, or for some seconds. For one event loop."""

    def __init__(self, loop):
        self._loop, self._rung = loop, None

    def ring(self):
        if self._rung is not None and not self._rung.done():
            self._rung.set_result(None)

    async def wait(self, seconds):
        self._rung = self._loop.create_future()
        timer = self._loop.call_later(seconds, self.ring)
        await self._rung
        timer.cancel()


class _Listening:
    """One call of listen, as tasks of an event loop: one that polls and starts the jobs
    (with Workers or a Bridge), one that sends their items."""

    def __init__(self, server, answerer, status=None):
        self.server, self.answerer = server, answerer
        self.status = status or Status(server._hours)
        self.outbox = Outbox(self._wake)
        self._closing = False                  # the hours are over: no more jobs
        self._fresh = False                    # jobs came since the last poll
        self._logins = 0                       # since a poll succeeded
        self._loop = self._thread = self._relay = None
        self._stopped = None                   # future that run waits for
        self._woken = self._replied = None     # Alarms: for the sender, for the poll
        self._pushes, self._failed = {}, []    # the sender's requests, with what they took:
        self._failures, self._sent_at = 0, 0.0     # those under way; those that failed
        answerer.attach(self)
        self.status.watch(self.outbox)

    async def run(self):
        """Serve until stop or cancellation, then hand all jobs back. Raises
        NeuroengineError if the relay refuses this provider for good."""
        import asyncio
        self._loop, self._thread = asyncio.get_running_loop(), threading.get_ident()
        self._stopped = self._loop.create_future()
        self._woken, self._replied = Alarm(self._loop), Alarm(self._loop)
        self.server._listening = self          # stop stores first, too: neither is missed
        if self.server._stopping:
            self.stop()
        serving = asyncio.ensure_future(self._serve())
        try:
            await asyncio.wait([serving, self._stopped], return_when=asyncio.FIRST_COMPLETED)
        finally:
            await self._end()
            serving.cancel()
            await asyncio.wait([serving])
            self.server._stopping = False      # done; listen may be called again
        if not serving.cancelled():
            serving.result()

    async def _serve(self):
        import asyncio
        server = self.server
        # While it has jobs: over the internet, a new connection takes two or three times the
        # way there and back, and the first token would wait for it.
        self._relay = AsyncTransport(server._transport, wants_spare=self.outbox.running)
        if server._stale and not server._paused:
            await self._keep_trying(self._log_in, first=True)
        self.status.show()
        tasks = [asyncio.ensure_future(task) for task in (
            self._poll_always(), self._send_always(), self._keep_hours())]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in [*tasks, *self._pushes]:
                task.cancel()

    async def _end(self):
        """Log out, which hands unfinished jobs to others, and stop working on them."""
        server = self.server
        server._stopping, server._listening = True, None
        session, server._session, server._stale = server._session, None, True
        if session:
            await self._log_out(session)       # the poll under way ends by itself
        self.outbox.forget()
        self.answerer.close()
        if self._relay is not None:
            self._relay.close()

    def stop(self):
        """Have run end soon; from any thread."""
        def stop():
            if not self._stopped.done():
                self._stopped.set_result(None)
        if self._loop is not None:
            try:
                self._loop.call_soon_threadsafe(stop)
            except RuntimeError:
                pass                           # the loop has ended

    async def _log_in(self):
        """Log in, in a thread: it is done rarely, and may take long."""
        await in_thread(self.server._log_in, lambda: None)

    async def _log_out(self, session):
        await in_thread(lambda: self.server._log_out(session), lambda: None)

    async def _keep_trying(self, action, first=False):
        """Do action until it succeeds, however long the relay is away, and return what it
        returns. Raises NeuroengineError for what will not get better, and at the first
        attempt for everything that is likely to be a mistake in the call."""
        import asyncio
        failures = 0
        while True:
            try:
                answer = await action()
            except Exception as error:
                if not isinstance(error, NeuroengineError):
                    error = unknown_answer(error)
                if self.server._paused or self.server._stopping \
                        or self._closing and not self.outbox.running():
                    return None
                if error.name == "session_unknown":
                    action = self._log_in
                    # Relays that know nothing of each other may take turns at an address.
                    if self._logins:
                        await asyncio.sleep(pause_before(self._logins - 1))
                    self._logins += 1
                    continue
                if error.name in FINAL or first and not failures \
                        and error.name not in PASSING:
                    raise self.server._advise(error)
                if not failures:
                    self.status.event(error.message + " Trying again until it succeeds.")
                await asyncio.sleep(pause_before(failures, error.retry_after))
                failures += 1
            else:
                if failures:
                    self.status.event("Connected again.")
                    self._woken.ring()         # the sender may be waiting, too
                return answer

    async def _poll_always(self):
        server = self.server
        while not server._stopping:
            if self._closing and not self.outbox.running():
                self.status.event_of_hours()
                self.pause()
            if server._paused:
                await self._wait_until_ready()
            await self._keep_trying(self._poll)
            if self._fresh:                    # their first items go first; and the response
                self._fresh = False            # to those brings jobs, too
                await self._replied.wait(YIELD_SECONDS)

    async def _wait_until_ready(self):
        import asyncio
        server = self.server
        while True:
            await self.answerer.ready()
            if opening(server._hours, local_minute())[0]:
                break
            self.status.event_of_hours()
            while not opening(server._hours, local_minute())[0]:
                await asyncio.sleep(seconds_until_look())
            self.status.event_of_hours()
        server._paused = self._closing = False
        await self._keep_trying(self._log_in)

    async def _poll(self):
        """Ask for work once, and take it."""
        running = self.outbox.running()
        if self._closing:
            # Each of these occupies a worker, so the relay hands out no more jobs.
            running += [("closing", n) for n in range(self.server._features["workers"])]
        self._take(await self._call("poll", '"running":' + json.dumps(running)))
        self._logins = 0

    async def _call(self, action, fields):
        server = self.server
        if server._session is None:
            raise NeuroengineError(NO_CONNECTION, "Not logged in.", "no_connection")
        text = '{"session":%s,%s}' % (to_json(server._session), fields)
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError:             # surrogate pairs, or halves, which are no text
            data = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode(
                "utf-8")
        return await self._relay.call(server._path(action), data, server.service_key)

    async def _keep_hours(self):
        """Begin to close when the hours are over."""
        import asyncio
        while self.server._hours:
            if not opening(self.server._hours, local_minute())[0] \
                    and not self.server._paused:
                self._closing = True
                await self._end_poll()
            await asyncio.sleep(seconds_until_look())

    async def _end_poll(self):
        """End the poll under way, by another."""
        try:
            await self._poll()
        except NeuroengineError:
            pass                               # the next one will say why

    def _take(self, answer, sent=()):
        """Deal with the jobs, cancellations and refusals (of what was sent) of a response.
        Raises NeuroengineError."""
        try:
            if answer.get("refused"):
                refused = {refusal.get("job") for refusal in answer["refused"]}
                self.outbox.cancel([(work.job, work.attempt) for work, *_ in sent
                                    if work.job in refused])
            if answer.get("cancel"):
                self.outbox.cancel(answer["cancel"])
            # Jobs that came while it logged out went back to the relay, as all others did.
            for job in answer.get("jobs", ()) if not self.server._paused else ():
                work = Work(job["job"], int(job["attempt"]), int(job["at"]), job["request"])
                if self.outbox.add(work):
                    self._fresh = True
                    self.answerer.start(work)
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise unknown_answer(error) from None
        self.status.show()

    def pause(self):
        """The upstream is gone, or the hours are over: hand everything back, and log in
        when it is time again."""
        import asyncio
        server = self.server
        if server._paused or server._stopping:
            return
        server._paused = True
        self.outbox.forget()
        session, server._session = server._session, None
        if session:                            # it ends the poll under way, too
            self._leaving = asyncio.ensure_future(self._log_out(session))

    def _wake(self):
        """Have the sender look into the outbox; from any thread."""
        if threading.get_ident() == self._thread:
            self._woken.ring()
        else:
            try:
                self._loop.call_soon_threadsafe(self._woken.ring)
            except RuntimeError:
                pass                           # the loop has ended

    async def _send_always(self):
        """Send items as long as there are any, and something every few seconds.

        While a request is under way, further items gather. Over the internet it takes as long
        as the way to the relay and back: first items and ends do not wait for that.
        """
        import asyncio
        while True:
            while len(self._pushes) >= MAX_PUSHES:
                await self._woken.wait(HEARTBEAT_SECONDS)
            if not self._failed and self.outbox.rest(gather=bool(self._pushes)):
                await self._woken.wait(HEARTBEAT_SECONDS)
            if self._failed:
                await self._begin_again()
                continue
            entries, taken = self.outbox.take()
            if not taken and (self._loop.time() - self._sent_at < HEARTBEAT_SECONDS * 0.9
                              or self.server._session is None
                              or not self.outbox.running()):
                continue
            push = asyncio.ensure_future(self._send(entries, taken))
            self._pushes[push] = taken
            push.add_done_callback(self._sent)
            await self._woken.wait(HURRY_SECONDS)        # most end sooner
            if not self._failed and self.outbox.rest(gather=True):
                await self._woken.wait(GATHER_SECONDS)

    def _sent(self, push):
        """A request has ended."""
        taken, error = self._pushes.pop(push), None
        if not push.cancelled():
            error = push.exception()
        if error is None:
            self._failures, self._sent_at = 0, self._loop.time()
        else:
            self._failed.append((error, taken))
        self._woken.ring()

    async def _begin_again(self):
        """Have what failed sent again, after a pause if the relay is away."""
        self.outbox.hold()
        failed, self._failed, away = self._failed, [], None
        for error, taken in failed:
            if not isinstance(error, NeuroengineError):
                raise error
            self.outbox.settle(taken, sent=False)
            if error.name in REFUSED and taken:
                await self._send_singly([work for work, *_ in taken])
            else:
                away = error
        if away is not None:
            await self._woken.wait(pause_before(self._failures, away.retry_after))
            self._failures = min(self._failures + 1, 4)

    async def _send(self, entries, taken):
        answer = await self._call("reply", '"replies":[%s]' % ",".join(entries))
        self.outbox.settle(taken, sent=True)
        self._replied.ring()
        self._take(answer, taken)
        if self._closing and not self.outbox.running():
            await self._end_poll()

    async def _send_singly(self, works):
        """The relay refuses a request that holds entries of these: find out whose fault it
        is, and fail that job alone."""
        for work in works:
            entries, taken = self.outbox.take(only=work)
            try:
                await self._send(entries, taken)
            except NeuroengineError as error:
                self.outbox.settle(taken, sent=False)
                if error.name not in REFUSED:
                    return                     # the relay is away: begin again later
                words = "the relay refused its answer: %s" % error.message
                self.status.event("A job failed: %s" % words)
                self.outbox.spoil(work, words)


def run_listenings(listenings):
    """Run them on one event loop until all have ended, or Ctrl-C or SIGTERM ends them; at a
    second signal, return without waiting for them.

    The loop runs in another thread, so Ctrl-C is noticed on Windows as well, and listen works
    where another loop is running already (Jupyter). Raises the first error.
    """
    errors, ended, stops = [], [], []
    # A bare lock: a signal's exception amid the code of an Event would break that. And no
    # join: before Python 3.13, one that Ctrl-C interrupts takes the thread for ended.
    awake = threading.Lock()
    awake.acquire()

    def run():
        import asyncio
        try:
            asyncio.run(run_all(listenings, errors))
        finally:
            ended.append(True)
            awake.release()

    def stop():
        stops.append(True)
        if len(stops) == 1:
            listenings[0].status.event("Stopping: unfinished prompts go back to the relay.")
            for listening in listenings:
                listening.server._stopping = True      # seen by one that is only beginning
                listening.stop()
    # In this order: stop takes the lock that closing the status takes.
    with contextlib.closing(listenings[0].status), signals_call(stop):
        left = 2 * CANCEL_SECONDS / SLICE_SECONDS      # slices to wait after a signal
        try:
            threading.Thread(target=run, daemon=True).start()
            while not ended and left > 0 and len(stops) < 2:
                awake.acquire(timeout=SLICE_SECONDS)
                left -= bool(stops)
        except (KeyboardInterrupt, SystemExit) as why:     # by a handler of the program's own
            stop()
            if not ended:
                awake.acquire(timeout=2 * CANCEL_SECONDS)
            if isinstance(why, SystemExit):
                raise
    for error in errors:
        raise error


async def run_all(listenings, errors):
    """Run them until all have ended; when one ends, so do the others. Adds to errors."""
    import asyncio
    tasks = [asyncio.ensure_future(listening.run()) for listening in listenings]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    for listening in listenings:
        listening.stop()
    errors.extend(filter(None, await asyncio.gather(*tasks, return_exceptions=True)))


@contextlib.contextmanager
def signals_call(stop):
    """Let Ctrl-C, SIGTERM of a service manager, and on Windows SIGBREAK of a closed console
    call stop(), unless the program has its own way with them. (Python's way, an exception,
    may come amid any code, and twice.)"""
    import signal
    before = {}
    try:
        for number in (getattr(signal, name, signal.SIGTERM)
                       for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")):
            handler = signal.getsignal(number)
            if handler in (signal.default_int_handler, end_by_signal) or (
                    handler == signal.SIG_DFL and number in (
                        signal.SIGTERM, getattr(signal, "SIGBREAK", None))):
                before[number] = signal.signal(number, lambda *_: stop())
    except ValueError:
        pass                                   # this is not the main thread
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def parse_hours(text):
    """[(from, to)] in minutes of the day, of a text like "22-8" or "9-12:30,14-17"."""
    spans = []
    for span in text.split(","):
        numbers = re.match(r"(\d\d?)(?::([0-5]\d))?-(\d\d?)(?::([0-5]\d))?\Z",
                           span.strip())
        hour, minute, end_hour, end_minute = (
            int(number or 0) for number in numbers.groups()) if numbers else (25,) * 4
        spans.append((60 * hour + minute, 60 * end_hour + end_minute))
        if max(spans[-1]) > DAY_MINUTES:
            raise NeuroengineError(NO_CONNECTION, "%s are no hours: write them like 22-8, "
                                   "22:30-8 or 9-12,14-17." % (text or "These"))
    return spans


def opening(spans, minute):
    """(whether it is open at that minute of the day, the minute when that changes).

    It is always open without spans; what never changes has None for the minute.
    """
    def is_open(minute):
        return not spans or any(
            (minute - begin) % DAY_MINUTES < ((end - begin) % DAY_MINUTES or DAY_MINUTES)
            for begin, end in spans)
    now = is_open(minute)
    return now, next((later % DAY_MINUTES for later in range(minute, minute + DAY_MINUTES)
                      if is_open(later) != now), None)


def local_minute():
    """The minute of the day, on this machine's clock."""
    now = time.localtime()
    return 60 * now.tm_hour + now.tm_min


def hours_words(spans):
    """Whether it is open, and until when; "" if there are no hours."""
    is_open, change = opening(spans, local_minute())
    return "" if not spans else "open" if change is None else "%s until %02d:%02d" % (
        "open" if is_open else "closed", change // 60, change % 60)


def seconds_until_look():
    """Seconds until the next full minute. (Clocks are set, and go to summer time: so look
    at them again and again, rather than reckon how long it is to the next opening.)"""
    return LOOK_SECONDS - time.time() % LOOK_SECONDS


class Status:
    """What a provider is doing: one live line on a terminal, log lines elsewhere.

    line: whether there is to be one.
    """

    def __init__(self, hours=(), stream=None, line=True):
        self.hours, self.stream = hours, stream or sys.stderr
        self.live, self._line = is_terminal(self.stream), Line(self.stream)
        self._lock = threading.Lock()
        self._shown, self._shows = 0.0, line and self.live
        self._before = (time.monotonic(), 0)
        self._outboxes, self._hours_said = [], ""

    def watch(self, outbox):
        """Show what this outbox does, too."""
        self._outboxes.append(outbox)

    def event(self, text):
        """Say something that happened."""
        with self._lock:
            self._line.show("")
            with contextlib.suppress(OSError, ValueError, AttributeError):
                # It may be gone, or None; what the program does goes on.
                self.stream.write("%s%s\n" % ("" if self.live else time.strftime("%H:%M:%S "),
                                              printable(text, lines=True)))
                self.stream.flush()

    def event_of_hours(self):
        """Say until when it is open or closed, once for all its services."""
        words = hours_words(self.hours)
        if words != self._hours_said:
            self._hours_said = words
            self.event(words.capitalize() + ".")

    def close(self):
        """Clear the live line."""
        with self._lock:
            self._shows = False
            self._line.show("")

    def failure(self, text):
        """Say that something raised, with its traceback."""
        import traceback                   # rarely needed, and 5 of 60 ms to import
        self.event(text + "\n" + traceback.format_exc())

    def show(self):
        """Show the present state, on a terminal, at most some times a second."""
        now = time.monotonic()
        if not self._shows or now - self._shown < 0.2:
            return
        running = sum(len(outbox.running()) for outbox in self._outboxes)
        served = sum(outbox.served for outbox in self._outboxes)
        tokens = sum(outbox.tokens for outbox in self._outboxes)
        with self._lock:
            since, had = self._before
            rate = (tokens - had) / max(now - since, 0.2)
            if now - since > 2:
                self._before = now, tokens
            self._shown = now
            self._line.show(("%s  %d running  %d served  %.0f tokens/s  %s" % (
                "working" if running else "waiting", running, served, rate,
                hours_words(self.hours))).rstrip())


##############################################################################
# Bridge, what goes up: one job of the relay -> one request of the upstream
##############################################################################
# The rule is to pass through: what the client sent reaches the LLM server, and what that
# says, refusals too, reaches the client. Everything else here is an exception, and says why.

PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions",
         "embeddings": "/v1/embeddings", "responses": "/v1/responses",
         "messages": "/v1/messages", "count_tokens": "/v1/messages/count_tokens",
         "rerank": "/v1/rerank", "tokenize": "/tokenize", "detokenize": "/detokenize"}
GENERATING = ("chat", "completions", "responses", "messages")
# Whatever bounds the length of an answer, in any API or server.
LENGTH_FIELDS = ("max_new_len", "max_tokens", "max_completion_tokens", "max_output_tokens",
                 "n_predict", "num_predict", "max_new_tokens", "max_length", "max_gen_len",
                 "max_generate_tokens", "max_tokens_to_sample")
# Fields that reach into the server, beyond the model that is shared: slots and files of
# llama.cpp, adapters, code and templates of vLLM and MLX, tools that fetch.
UNSHARED = ("id_slot", "slot_id", "lora", "lora_request", "adapters", "adapter_path",
            "draft_model", "chat_template", "path", "filename", "logits_processors",
            "kv_transfer_params", "mcp_servers", "n_cmpl")     # llama.cpp has that win over n
# A conversation that the server keeps: another provider, or caller, would not have it.
STATE_FIELDS = ("previous_response_id", "conversation", "background")
OTHER_NAMES = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}
URL_FIELDS = ("image_url", "video_url", "audio_url", "file_url")
URL_PLACES = ("messages", "input", "documents", "query", "system", "prompt")
# To servers in Go, such as Ollama, "MODEL" is another spelling of "model": the last one wins.
CHECKED = frozenset(LENGTH_FIELDS + UNSHARED + STATE_FIELDS + URL_PLACES + (
    "model", "stream", "n", "store", "tools", "options"))
# What each calls the penalty of repeated tokens; others get both names.
PENALTY_NAMES = {"llama.cpp": ("repeat_penalty",), "vLLM": ("repetition_penalty",),
                 "LM Studio": ("repeat_penalty",), "KoboldCpp": ("rep_pen",),
                 "Ollama": ()}
NATIVE_FIELDS = ("message", "messages", "raw", "max_new_len", "repetition_penalty",
                 "temperature", "top_p", "top_k", "min_p", "seed", "api", "reply_so_far",
                 "stream")


def as_dict(value):
    """The value if it is a dict, otherwise an empty one: clients and servers send anything."""
    return value if isinstance(value, dict) else {}


def given(fields, names):
    """Those of the names that have a value in these fields."""
    return [name for name in filter(fields.__contains__, names) if fields[name] is not None]


class Question:
    """What the upstream is asked: a path and a body. own: the fields that the bridge added
    by itself, which may be left out again if the upstream refuses them."""

    def __init__(self, api, body, own=(), headers=(), opaque=False, stream=True):
        self.api, self.path, self.body = api, PATHS[api], body
        self.own, self.headers = set(own), headers
        self.opaque, self.stream = opaque, stream
        self._tried = set()

    def data(self):
        """The body in bytes."""
        return encode(self.body)

    def parser(self, model):
        """What makes items of the answer."""
        return (WholeAnswer(model, self) if not self.stream else
                Events(model, self) if self.opaque else Completion(model))

    def choices(self):
        """How many choices the answer has."""
        n, prompt = self.body.get("n"), self.body.get("prompt")
        prompts = len(prompt) if isinstance(prompt, list) and not all(
            isinstance(token, int) for token in prompt) else 1
        return prompts * (n if type(n) is int and n > 0 else 1)

    def relent(self, words, param, too_long):
        """Change what the upstream refuses in these words, if that keeps the meaning of what
        the client asked; whether it did. A client's field is never left out."""
        def is_meant(field):
            return field == param or re.search(r"(?<!\w)%s(?!\w)" % re.escape(field), words)

        def change(field):
            if field in self._tried:
                return False
            self._tried.add(field)
            return True
        for field in sorted(self.own & set(self.body)):
            # A limit of our own that does not fit into the context (vLLM): what is left of
            # the context is less, so it holds without. Else it is the operator's.
            needless = is_meant(field) if field not in LENGTH_FIELDS else (
                too_long and "completion" in words
                or is_meant(field) and OTHER_NAMES.get(field) in self.body)
            if needless and change(field):
                del self.body[field]
                return True
        for old, new in OTHER_NAMES.items():
            if old in self.body and new not in self.body and is_meant(old) and change(old):
                self.body[new] = self.body.pop(old)
                if old in self.own:
                    self.own.add(new)
                return True
        wanted = self.body.get("response_format")
        if isinstance(wanted, dict) and wanted.get("type") == "json_object" \
                and "json_schema" in words and change("response_format"):
            self.body["response_format"] = ANY_OBJECT          # LM Studio
            return True
        return False


ANY_OBJECT = {"type": "json_schema", "json_schema": {"name": "any",
                                                     "schema": {"type": "object"}}}


class Rendering:
    """Renders jobs as questions for one model. most_tokens: of any answer, whatever is
    asked. fetches: whether the server may fetch what a client names by URL."""

    def __init__(self, model, kind="", most_tokens=None, fetches=False):
        self.model, self.kind = model, kind
        self.most_tokens, self.fetches = most_tokens, fetches

    def question(self, request):
        """The Question for a job's request. Raises NeuroengineError if it asks for what is
        not shared."""
        if request.get("opaque"):
            return self._opaque(request)
        api = request.get("api")
        if api == "embeddings":
            body = {name: value for name, value in request.items() if name != "api"}
            self._check(body)
            return Question(api, dict(body, model=self.model.id), stream=False)
        body, own = (self._from_openai if api else self._from_native)(request)
        self._check(body)
        own.add("stream_options")
        body.update(model=self.model.id, stream=True)
        body["stream_options"] = dict(as_dict(body.get("stream_options")), include_usage=True)
        own |= self._watch(body)
        for message in body.get("messages", ()):
            if message.get("role") == "developer":
                message["role"] = "system"     # many templates leave out what they do not
                                               # know, and say nothing
        if request.get("reply_so_far"):
            self._go_on(body, request["reply_so_far"])
        wanted = body.get("response_format")
        if self.kind == "LM Studio" and isinstance(wanted, dict) \
                and wanted.get("type") == "json_object":
            body["response_format"] = ANY_OBJECT
        api = "completions" if "prompt" in body else "chat"
        return Question(api, body, own | self._bound(api, body))

    def _opaque(self, request):
        api, body, own = request.get("api"), dict(as_dict(request.get("body"))), set()
        if api not in PATHS:
            raise unshared("its provider does not know the API %s" % api, "model")
        self._check(body)
        if "model" in body or api not in ("tokenize", "detokenize"):
            body["model"] = self.model.id
        if api == "responses" and body.get("store") is None:
            body["store"] = False              # some keep everything, unless told
            own.add("store")
        if request.get("stream") and api in ("chat", "completions"):
            if not as_dict(body.get("stream_options")).get("include_usage"):
                own.add("stream_options")
            body["stream_options"] = dict(as_dict(body.get("stream_options")),
                                          include_usage=True)
        if api in GENERATING:
            own |= self._bound(api, body)
            if request.get("stream"):
                own |= self._watch(body)
        headers = [(name, value) for name, value in as_dict(request.get("headers")).items()
                   if name in ("anthropic-version", "anthropic-beta")
                   and re.match(r"[ -~]*\Z", str(value))]
        return Question(api, body, own, headers, True, bool(request.get("stream")))

    def _from_openai(self, request):
        body = {name: value for name, value in request.items()
                if name not in ("api", "reply_so_far") and value is not None}
        limit = body.pop("max_completion_tokens", None)
        if limit is not None:                  # Ollama and older ones know only this, and
            body["max_tokens"] = limit         # do not say so
        if "messages" in body:
            body["messages"] = [dict(message) for message in body["messages"]]
        return body, set()

    def _from_native(self, request):
        body = {name: value for name, value in request.items()
                if name not in NATIVE_FIELDS and value is not None}
        own = set()
        if is_true(request.get("raw")):
            body["prompt"] = request.get("message") or prompt_of(request["messages"])
        else:
            body["messages"] = [dict(m) for m in request.get("messages") or (
                {"role": "user", "content": request.get("message") or ""},)]
        for name, idle in (("temperature", None), ("top_p", None), ("top_k", 0),
                           ("min_p", 0), ("seed", 0)):
            value = request.get(name)
            if value is not None and value != idle:    # 0 means: as you like
                body[name] = value
                if value == SAMPLING[name]:    # filled in by our library, chosen by nobody
                    own.add(name)
        if request.get("max_new_len"):
            body["max_tokens"] = request["max_new_len"]
        penalty = request.get("repetition_penalty")
        if penalty is not None and penalty != 1:
            names = PENALTY_NAMES.get(self.kind, ("repeat_penalty", "repetition_penalty"))
            for name in names:
                body[name] = penalty
            if penalty == SAMPLING["repetition_penalty"]:
                own.update(names)
            elif len(names) > 1:               # the server has to know only one of them
                own.add(names[1])
        return body, own

    def _go_on(self, body, so_far):
        """Have an answer that another provider began go on."""
        if "prompt" in body:
            body["prompt"] += so_far
            return
        messages, begun = body["messages"], ""
        if messages[-1].get("role") == "assistant":        # two would be refused
            messages, begun = messages[:-1], content_text(messages[-1].get("content"))
        body["messages"] = messages + [{"role": "assistant", "content": begun + so_far}]
        if self.kind == "vLLM":
            body.update(continue_final_message=True, add_generation_prompt=False)

    def _watch(self, body):
        """Have llama.cpp report its progress; returns the fields added. It notices that we
        hung up only when it writes: without reports a prompt of 3000 tokens was read to its
        end, for 32 s; with them, 0.5 s."""
        if self.kind != "llama.cpp" or "return_progress" in body:
            return set()
        body["return_progress"] = True
        return {"return_progress"}

    def _bound(self, api, body):
        """Apply the operator's limit, under whatever name; returns the fields added."""
        most, least = self.most_tokens, int(self.kind == "Ollama")     # to it, 0 is no limit
        for fields in [body] + [value for value in body.values() if isinstance(value, dict)]:
            for name in given(fields, LENGTH_FIELDS) if most else ():
                try:
                    number = int(fields[name])
                except (TypeError, ValueError, OverflowError):
                    raise NeuroengineError(1, "%s must be a number" % name,
                                           "invalid_request") from None
                if not least <= number <= most:            # -1 is without end
                    fields[name] = most
        asked = given(body, LENGTH_FIELDS)
        if most:                               # the server may know none of these names
            most = min([most] + [int(body[name]) for name in asked if int(body[name]) > 0])
        elif not asked and self.kind == "llama.cpp" and self.model.endless:
            most = self.model.context_length or DEFAULT_MAX_TOKENS
        usual = "max_output_tokens" if api == "responses" else "max_tokens"
        if not most or usual in asked:
            return set()
        body[usual] = most
        return {usual}

    def _check(self, body):
        """Raise NeuroengineError for what the operator did not mean to share."""
        for name in body:
            plain = name.casefold()
            if plain != name and plain in CHECKED:
                raise unshared("%s must be written %s" % (name, plain), name)
        for name in given(body, UNSHARED):
            raise unshared("%s reaches into the provider's server, and is not shared" % name,
                           name)
        for name in filter(body.get, STATE_FIELDS):
            raise unshared("%s needs a server that keeps conversations; send the whole "
                           "conversation instead" % name, name)
        if body.get("store") is True and "input" in body:
            raise unshared("store cannot be true: nothing is kept here; send store: false",
                           "store")
        if not self.fetches:
            tools = body.get("tools")
            for tool in tools if isinstance(tools, list) else ():
                if as_dict(tool).get("server_url"):
                    raise unshared("server_url of a tool would have the provider's server "
                                   "fetch it", "tools")
            for name in given(body, URL_PLACES):
                check_urls(body[name])


def check_urls(root):
    """Raise NeuroengineError if an image, video, audio or file is given as a URL to fetch."""
    todo = [root]
    while todo:
        value = todo.pop()
        if isinstance(value, list):
            todo += [v for v in value if isinstance(v, (list, dict))]
        elif isinstance(value, dict):
            for name, inner in value.items():
                urls = [inner] if not isinstance(inner, dict) else [
                    url for key, url in inner.items() if key.casefold() == "url"]
                if name.casefold() in URL_FIELDS or name.casefold() == "source" \
                        and isinstance(inner, dict):
                    if not all(url is None or str(url).lower().startswith("data:")
                               for url in urls):
                        raise unshared("%s must hold the data itself (data:...): this "
                                       "provider fetches no URLs" % name, name)
                if isinstance(inner, (list, dict)) and name not in ("arguments", "tools"):
                    todo.append(inner)


def unshared(words, field):
    """The NeuroengineError for a field that is not shared."""
    error = NeuroengineError(1, words, "unsupported")
    error.details = {"status": 400, "type": "invalid_request_error", "param": field,
                     "code": "unsupported_parameter"}
    return error


##############################################################################
# Bridge, what comes down: the upstream's bytes -> items; no sockets
##############################################################################
# Servers differ more than the specification of their API suggests. Whatever they send, the
# client gets the right text, or an error: never less text, and no end that was none.

USAGE_FIELDS = ("prompt_tokens", "completion_tokens", "total_tokens",
                "completion_tokens_details", "prompt_tokens_details")
KEPT_STATUSES = (400, 404, 413, 422, 429, 503)     # all others are the provider's trouble
PRIVATE_PARTS = ("system_fingerprint", "timings", "__verbose", "generation_settings")
SAID_ELSEWHERE = frozenset(("role", "content", "reasoning", "reasoning_content",
                            "tool_calls"))
SHORTEST_SECRET = 5        # a shorter model id cannot be told from a word


def refuse_constant(name):
    raise ValueError("%s is not JSON" % name)


DECODER = json.JSONDecoder(parse_constant=refuse_constant)


def from_json(text, scan=DECODER.scan_once):
    """The value of a JSON text. Raises ValueError, or RecursionError. (Without the usual
    look for white space around it: 2 of 4 us, for each token.)"""
    try:
        value, end = scan(text, 0)
        if end == len(text):
            return value
    except StopIteration:
        pass
    return DECODER.decode(text)


def hidden(words, model, service):
    """Words of the upstream without its model's id, which may be a file path."""
    for secret in (model, re.split(r"[\\/]", model)[-1]):
        if len(secret) >= SHORTEST_SECRET:
            words = re.sub(r"(?<![\w.-])%s(?![\w-])" % re.escape(secret), lambda _: service,
                           words)
    return words


def renamed(value, service):
    """A JSON value of the upstream, with the service's name in the model's places, and
    without what tells of the server."""
    for place in places(value):
        if isinstance(place.get("model"), str):
            place["model"] = service
        for name in PRIVATE_PARTS:
            if name in place:
                del place[name]
    return value


def places(value):
    """The objects of an answer or event, in any API, that tell of the model and the usage."""
    if not isinstance(value, dict):
        return []
    return [value] + [value[name] for name in ("response", "message")
                      if isinstance(value.get(name), dict)]


def says_error(value):
    """Whether a JSON value is an error of the upstream, in whatever shape."""
    if not isinstance(value, dict):
        return False
    if value.get("error") and value.get("object") != "response":
        return True
    return value.get("object") == "error" or value.get("type") == "error" \
        or "choices" not in value and "detail" in value


def parts_of_error(value):
    """(message, type, code, param) of an upstream's error: many shapes are in use."""
    found = {"type": None, "code": None, "param": None}
    for _ in range(4):
        if isinstance(value, list) and value:              # FastAPI: where, and what
            value = "; ".join("%s: %s" % (".".join(map(str, part.get("loc") or ())),
                                          part.get("msg")) if isinstance(part, dict)
                              else str(part) for part in value)
        if not isinstance(value, dict):
            break
        for name in found:
            if found[name] is None and isinstance(value.get(name), (str, int)):
                found[name] = value[name]
        value = value.get("error") or value.get("message") or value.get("detail") or ""
    message = value if isinstance(value, str) else json.dumps(value)
    return message, found["type"], found["code"], found["param"]


class Model:
    """A model that an upstream has, under the name of the service that shares it."""

    def __init__(self, id, service="", context_length=None, vision=None, tools=None,
                 embeddings=False, continues=False, apis=(), endless=True):
        self.id, self.service, self.context_length = id, service or "the model", context_length
        self.vision, self.tools = vision, tools            # None: it is not known
        self.embeddings, self.continues, self.apis = embeddings, continues, list(apis)
        self.endless = endless     # it has no limit of its own

    def features(self):
        """The fields of the login that describe it."""
        features = {"continues": self.continues, "embeddings": self.embeddings,
                    "context_length": self.context_length, "vision": self.vision,
                    "tools": self.tools, "apis": self.apis}
        return {name: value for name, value in features.items() if value is not None}

    def failure(self, status, said, retry_after=None):
        """The NeuroengineError for an HTTP status and a JSON value of the upstream."""
        message, kind, code, param = parts_of_error(said)
        words = hidden(message.strip()[:500] or "nothing more", self.id, self.service)
        low, name = words.lower(), "provider_error"
        if status in (400, 413, 422) and "context" in low and (
                "length" in low or "size" in low or "exceed" in low or "window" in low):
            name, code = "context_length_exceeded", "context_length_exceeded"
            if self.context_length and "maximum context length" not in low:
                # in the words that some clients look for
                words = "%s. This model's maximum context length is %d tokens" % (
                    words.rstrip("."), self.context_length)
        elif status in (400, 422):
            name = "invalid_request"
        if status in (401, 403):
            words, status = "the provider is not allowed to use its LLM server", 502
        elif status not in KEPT_STATUSES or status == 404 and "model" in low:
            words, status = "the LLM server said: %s (HTTP %s)" % (words, status), 502
        error = NeuroengineError(1, words, name, retry_after)
        error.details = {"status": status}
        if status != 502:
            error.details.update((field, hidden(value, self.id, self.service)
                                  if isinstance(value, str) else value) for field, value in (
                ("type", kind), ("code", None if code is None else str(code)),
                ("param", param), ("retry_after", retry_after)) if value is not None)
        return error

    def failure_within(self, said):
        """The same for an error that comes with status 200, as a JSON value or a text."""
        code = parts_of_error(said)[2]
        return self.failure(code if isinstance(code, int) else 500, said)


def not_json():
    return NeuroengineError(1, "the LLM server answered something that is not JSON",
                            "provider_error")


class Lines:
    """The lines of a stream of server-sent events, from bytes as they come."""

    def __init__(self):
        self._rest, self._first = b"", True
        self._pieces, self._size = [], 0       # what came after the rest, without an end

    def feed(self, data):
        """The lines that are whole now, each with \\n at its end."""
        if not (b"\n" in data or b"\r" in data or self._first or self._rest[-1:] == b"\r"):
            self._pieces.append(data)          # to join it with each read took 14 s for 20 MB
            self._size += len(data)
            if len(self._rest) + self._size > MAX_LINE_BYTES:
                raise NeuroengineError(1, "the LLM server sent a line without end",
                                       "provider_error")
            return b""
        if self._pieces:
            self._rest += b"".join(self._pieces)
            self._pieces, self._size = [], 0
        if self._rest:
            data = self._rest + data
        if self._first:
            if len(data) < 3 and b"\xef\xbb\xbf".startswith(data):
                self._rest = data
                return b""
            self._first = False
            if data[:3] == b"\xef\xbb\xbf":    # a byte order mark
                data = data[3:]
        if b"\r" in data:                      # but one at the end may be half of an end
            half = data[-1:] == b"\r"
            data = (data[:-1] if half else data).replace(b"\r\n", b"\n").replace(
                b"\r", b"\n") + (b"\r" if half else b"")
        end = data.rfind(b"\n") + 1
        self._rest = data[end:]
        if len(self._rest) > MAX_LINE_BYTES:
            raise NeuroengineError(1, "the LLM server sent a line without end",
                                   "provider_error")
        return data[:end]

    def end(self):
        """What is left: a last line that nothing ended."""
        rest = (self._rest + b"".join(self._pieces)).rstrip(b"\r")
        self._rest, self._pieces = b"", []
        return rest + b"\n" if rest else b""


HALVES = re.compile("[\\ud800-\\udc7f\\udd00-\\udfff]")   # of pairs, and no bytes


def bytes_of(piece):
    """The bytes of what was decoded with "surrogateescape". Halves of surrogate pairs, which
    JSON may hold, become U+FFFD."""
    return HALVES.sub("\ufffd", piece).encode("utf-8", "surrogateescape")


def json_of(value):
    """Compact JSON. Half a surrogate pair stays an escape: the next event may have the
    other, and the client joins them. Raises NeuroengineError."""
    try:
        text = compact(value)
    except ValueError:                         # such as 1e400, which Python reads as inf
        raise NeuroengineError(1, "the LLM server sent a number that is too large",
                               "provider_error") from None
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":"))
    return text


class Text:
    """A stream's text, of which pieces may be cut within a character."""

    def __init__(self):
        import codecs
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def whole(self, piece, final=False):
        """A piece that was decoded with "surrogateescape": its whole characters. Bytes that
        are no text become U+FFFD."""
        return self._decoder.decode(bytes_of(piece), final)


class Alike:
    """Short cut for the events of a stream that differ in their text alone, as nearly all do:
    with each token, a server says everything else again. (5 instead of 8 us a token of our
    own code; 2 instead of 5 if many come at once.)

    It knows nothing of what events mean. It has the general code take an event with another
    text; if that text is what comes out, so it will for every text between the same bytes.
    When a number in them changes, as a time does, the event that brings it teaches the rest.
    """

    def __init__(self, take):
        self._take = take          # the general code: an event's line -> its items
        self._last = None          # what was around the text of the last event, but numbers
        self._proven = None        # the same, of events where every text is what comes out
        self.head = self._between = self._tail = None      # the bytes around texts

    def take(self, lines):
        """(texts of the events that these lines begin with, the lines after them); no texts
        if one of them is not alike. head must be known."""
        events, tail, rest = lines.rpartition(self._tail)
        if not (tail and events.startswith(self.head)):
            return [], lines
        texts = events[len(self.head):].replace(self._between, b'","')
        # \u may be half a character, and a quote after a backslash may not end its text.
        if b"\\u" in texts or b'\\","' in texts:
            return [], lines
        try:
            found = from_json('["%s"]' % texts.decode())
        except (ValueError, RecursionError):
            return [], lines
        alike = all(found) and len(found) == events.count(tail) + 1
        return (found, rest) if alike else ([], lines)

    def learn(self, line, text):
        """An event of this text alone was taken; if the one before was like it, the next
        ones will be, too."""
        before, found, after = line.partition(to_json(text).encode("utf-8", "surrogatepass"))
        around = (before + b"\n" + after).translate(None, b"0123456789")
        last, self._last = self._last, around
        if found and around == last != self._proven:
            self._last, other = None, text + "?"
            with contextlib.suppress(NeuroengineError):
                if self._take(before + to_json(other).encode() + after) == [other]:
                    self._proven = around
        if around == self._proven:
            self.head, self._tail = before + b'"', b'"' + after + b"\n\n"
            self._between = self._tail + self.head


class StreamParser:
    """Makes items of a stream: bytes in, items out. Pure. Subclasses add _take(line, items)
    and _end(items).

    finished: the upstream said why it ended. All methods raise NeuroengineError.
    """

    finished = False

    def __init__(self, model):
        self._model, self._lines = model, Lines()
        self._held = 0             # bytes of lines since the last item: they may be kept

    def feed(self, data):
        """The items that are in these bytes."""
        return self._items_of(self._lines.feed(data))

    def finish(self):
        """The last items, after the last byte."""
        items = self._items_of(self._lines.end())
        self._end(items)
        return items

    def _items_of(self, lines):
        items = []
        for line in lines.split(b"\n")[:-1]:
            self._take(line, items)
        self._held = 0 if items else self._held + len(lines)
        if self._held > MAX_LINE_BYTES:
            raise NeuroengineError(1, "the LLM server sends much, and nothing of an answer",
                                   "provider_error")
        return items


def is_half(character):
    """Whether it is the first half of a surrogate pair."""
    return "\ud800" <= character <= "\udbff"


def joined(text):
    """(the text with halves of surrogate pairs joined, without the first half of one that it
    ends with; that half). Servers in JavaScript cut emoji so."""
    half = text[-1:] if is_half(text[-1:]) else ""
    return text[:len(text) - len(half)].encode("utf-16", "surrogatepass").decode(
        "utf-16", "replace"), half


class Completion(StreamParser):
    """The answer to a chat or a completion."""

    def __init__(self, model):
        super().__init__(model)
        self._data = b""           # of an event, as long as it is not JSON
        self._kind = b""           # the event's name
        self._whole = None         # lines of JSON, which came instead of events
        self._said = bytearray()   # the text so far, which as a list took eight times as much
        self._calls = {}           # id of a tool call that came without an index -> its index
        self._cut = None           # a Text, once bytes came that are no UTF-8
        self._half = self._half_thought = ""   # first halves of characters in UTF-16
        self._finish = self._usage = None
        self._done = False
        self._alike = Alike(self._items_alone)     # None if what came before counts

    def feed(self, data):
        items, lines, tried = [], self._lines.feed(data), None
        while lines:
            alike = self._alike
            if alike and alike.head is not tried and not (self._data or self._kind):
                tried = alike.head
                texts, lines = alike.take(lines)
                if texts:
                    self._said += "".join(texts).encode()
                    items += texts
                    continue
            event, end, lines = lines.partition(b"\n\n")
            items += self._items_of(event + end)
        return items

    def _items_alone(self, line):
        """The items of an event's line, if the stream was that alone."""
        return Completion(self._model)._items_of(line + b"\n")

    def _end(self, items):
        if self._whole is not None:
            self._take_whole(items)
        if self._data:
            raise not_json()
        if self._cut:
            items.extend(filter(None, [self._cut.whole("", final=True)]))
        if self._half_thought:
            items.append({"reasoning": "\ufffd"})
        if self._half:
            items.append("\ufffd")
        if not self._finish and self._done and (self._said or items):
            self._finish = "stop"              # some leave it out, but say [DONE]
        if not self._finish:
            raise NeuroengineError(1, "the LLM server's answer ended in the middle",
                                   "provider_error")
        last = {"finish_reason": self._finish}
        if isinstance(self._usage, dict):
            last["usage"] = {name: self._usage[name] for name in USAGE_FIELDS
                             if self._usage.get(name) is not None}
        items.append(last)

    def _take(self, line, items):
        if self._whole is not None:
            self._whole.append(line)
        elif line[:5] == b"data:":
            data = line[5:].strip()
            if data[:5] == b"data:":           # wrapped twice, by a proxy
                data = data[5:].strip()
            if data == b"[DONE]":
                self._done = self.finished = True
                return
            if not data:
                return
            if self._data:                     # JSON may come in several lines
                data = self._data + b"\n" + data
            try:
                event = self._parse(data)
            except (ValueError, RecursionError):
                self._data = data
                if len(data) > MAX_LINE_BYTES:
                    raise not_json() from None
                return
            self._data, count = b"", len(items)
            self._take_event(event, items)
            if self._alike and len(items) == count + 1 and type(items[-1]) is str:
                self._alike.learn(line, items[-1])
        elif not line:
            if self._data:
                raise not_json()
            self._kind = b""
        elif line[:6] == b"event:":
            self._kind = line[6:].strip()
        elif line[:6] == b"error:":            # older llama.cpp
            raise self._failure(line[6:])
        elif line[:1] in b"{[" and not (self._said or self._finish):
            self._whole = [line]               # no stream, but one JSON text
        elif line[:1] == b"<":
            raise not_json()                   # HTML
        # All others are comments, or ids, or what future versions add.

    def _parse(self, data):
        try:
            return from_json(data.decode("utf-8"))
        except UnicodeDecodeError:
            self._cut, self._alike = self._cut or Text(), None
            return from_json(data.decode("utf-8", "surrogateescape"))

    def _failure(self, data):
        try:
            value = self._parse(data) if isinstance(data, bytes) else data
        except (ValueError, RecursionError):
            value = data.decode("utf-8", "replace")
        return self._model.failure_within(value)

    def _take_whole(self, items):
        try:
            values = [self._parse(b"\n".join(self._whole))]
        except (ValueError, RecursionError):
            try:                               # not one JSON text, but one in each line
                values = [self._parse(line) for line in self._whole if line.strip()]
            except (ValueError, RecursionError):
                raise not_json() from None
        for value in values:
            self._take_event(value, items)

    def _take_event(self, event, items):
        if event is None:                      # llama.cpp, before a list of prompts
            return
        if not isinstance(event, dict):
            raise not_json()
        if "error" in event or "choices" not in event or self._kind == b"error":
            if says_error(event) or self._kind == b"error":
                raise self._failure(event)
        usage = event.get("usage")
        if usage:
            self._usage = usage
        choices = event.get("choices")
        if not choices:
            return
        choice = choices[0] if isinstance(choices, list) else None
        if not isinstance(choice, dict):
            raise not_json()
        if choice.get("index"):                # another one than we asked for
            return
        self._take_choice(choice, items)
        finish = choice.get("finish_reason")
        if isinstance(finish, dict):
            finish = finish.get("type")
        if finish and isinstance(finish, str):
            self._finish, self.finished = finish, True

    def _take_choice(self, choice, items):
        """Text, reasoning, tool calls, and whatever else is in a choice of an event."""
        delta, message = choice.get("delta"), choice.get("message")
        if not delta:
            delta = {"content": choice.get("text")}
            if isinstance(message, dict):      # where a delta belongs
                delta = dict(message, content=self._fresh(message.get("content"), choice))
        if not isinstance(delta, dict):
            raise not_json()
        reasoning = delta.get("reasoning_content") or delta.get("reasoning")
        text = delta.get("content")
        if text is None and "text" in choice:
            text = choice["text"]
        if isinstance(text, list):             # parts, of which some are thoughts
            reasoning = reasoning or "".join(content_text(part.get("thinking"))
                                             for part in text if isinstance(part, dict))
            text = content_text(text)
        if reasoning and isinstance(reasoning, str):
            self._take_reasoning(self._clean(reasoning), items)
        if text:
            self._take_text(text, items)
        calls = delta.get("tool_calls")
        if calls:
            if not isinstance(calls, list):
                raise not_json()
            calls = [dict(call, index=self._index_of(call, number))
                     for number, call in enumerate(filter(None, calls))
                     if isinstance(call, dict)]
            if calls:
                items.append({"tool_calls": calls})
        if len(delta) > 1 or "content" not in delta:
            more = {name: value for name, value in delta.items()
                    if value and name not in SAID_ELSEWHERE}
            if more:
                items.append({"delta": more})

    def _index_of(self, call, number):
        """The index of a tool call. Some leave it out, even if each call is an event of its
        own; clients would make one call of them all. A piece without an id, too, belongs to
        the last call."""
        if type(call.get("index")) is int:
            return call["index"]
        if not isinstance(call.get("id"), str):
            return len(self._calls) - 1 if self._calls else number
        return self._calls.setdefault(call["id"], len(self._calls))

    def _take_text(self, text, items):
        if not isinstance(text, str):
            raise not_json()
        if self._cut:
            text = self._cut.whole(text)
        if self._half or is_half(text[-1:]):
            self._alike = None
            text, self._half = joined(self._half + text)
        if text:
            self._said += text.encode("utf-8", "surrogatepass")
            items.append(text)

    def _take_reasoning(self, text, items):
        if self._half_thought or is_half(text[-1:]):
            text, self._half_thought = joined(self._half_thought + text)
        if text:
            items.append({"reasoning": text})

    def _clean(self, text):
        return text if not self._cut else bytes_of(text).decode("utf-8", "replace")

    def _fresh(self, content, choice):
        """What is new in a message. Some repeat the whole text at the end, or with an empty
        delta all that was said so far."""
        so_far, self._alike = self._said.decode("utf-8", "surrogatepass"), None
        if isinstance(content, str) and so_far:
            if content == so_far and choice.get("finish_reason"):
                return None
            if "delta" in choice and content.startswith(so_far):
                return content[len(so_far):]
        return content


class WholeAnswer:
    """An answer of any API, passed through as one JSON text."""

    finished = False

    def __init__(self, model, question):
        self._model, self._question = model, question
        self._pieces, self._size = [], 0

    def feed(self, data):
        self._pieces.append(data)
        self._size += len(data)
        if self._size > MAX_LINE_BYTES:
            raise NeuroengineError(1, "the LLM server's answer is over %d MB"
                                   % (MAX_LINE_BYTES >> 20), "provider_error")
        return []

    def finish(self):
        data = b"".join(self._pieces)
        try:
            value = from_json(data.decode("utf-8-sig"))
        except (ValueError, RecursionError):
            raise not_json() from None
        if says_error(value):
            raise self._model.failure_within(value)
        usage = counted(value)
        value = renamed(value, self._model.service)
        if not self._question.opaque:          # embeddings, as ever
            return [{"result": value}]
        items = [{"result": json_of(value)}]
        return items + ([{"usage": usage}] if usage else [])


def counted(value):
    """The tokens that an answer or event of any API names, in OpenAI's words."""
    counts = {}
    for place in places(value):
        usage = place.get("usage")
        if usage and isinstance(usage, dict):
            for ours, theirs in (("prompt_tokens", "input_tokens"),
                                 ("completion_tokens", "output_tokens")):
                count = usage.get(ours, usage.get(theirs))
                if type(count) is int:
                    counts[ours] = count
    return counts


class Events(StreamParser):
    """A stream of any API, passed through event by event."""

    LAST = {"responses": ("response.completed", "response.failed", "response.incomplete"),
            "messages": ("message_stop",)}
    OPENING = ("message_start", "response.created", "response.in_progress")

    def __init__(self, model, question):
        super().__init__(model)
        self._api = question.api
        self._hides_usage = "stream_options" in question.own
        self._hides_progress = "return_progress" in question.own
        self._opening = {}         # events before the answer: as long as they are not sent,
                                   # another provider can answer instead
        self._kind, self._data = "", []    # of the event whose lines come
        self._usage = {}
        self._ended, self._choices = set(), question.choices()
        self._done = self._json = False

    def _end(self, items):
        self._take(b"", items)
        self._open(items)
        if not self.finished:
            raise NeuroengineError(1, "the LLM server's answer ended in the middle"
                                   if not self._json else "the LLM server answered at once "
                                   "where a stream was asked for", "provider_error")
        if not self._done and self._api in ("chat", "completions"):
            items.append({"event": "data: [DONE]"})
        if self._usage:
            items.append({"usage": self._usage})

    def _take(self, line, items):
        if line[:5] == b"data:":
            self._data.append(line[5:].strip())
        elif line[:6] == b"event:":
            self._kind = line[6:].strip().decode("utf-8", "replace")
        elif line[:6] == b"error:":
            self._kind = "error"
            self._data.append(line[6:])
        elif line[:1] in (b"{", b"[", b"<") and not self.finished:
            self._json = True
            if line[:1] == b"{":
                self._parse(line)              # it may be an error
        elif not line and self._data:
            data, kind = b"\n".join(filter(None, self._data)), self._kind
            self._data, self._kind = [], ""
            if data:
                self._take_event(kind, data, items)

    def _parse(self, data):
        try:
            event = from_json(data.decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            raise not_json() from None
        if says_error(event):
            raise self._model.failure_within(event)
        return event

    def _take_event(self, kind, data, items):
        if data == b"[DONE]":
            self._done = True                  # other APIs have ends of their own
            self.finished = self.finished or self._api not in self.LAST
            self._open(items)
            items.append({"event": "data: [DONE]"})
            return
        event = self._parse(data)
        if kind == "error":
            raise self._model.failure(500, event)
        if event is None:
            return
        if not isinstance(event, dict):
            raise not_json()
        progress = event.pop("prompt_progress", None) if self._hides_progress else None
        if progress is None and event.get("type") not in self.OPENING:
            self._open(items)
            if self._look(kind, event):
                items.append(self._item(kind, event))
        elif "choices" not in event and self._look(kind, event):
            # Reports repeat what opens the stream; those with choices come before it.
            key = event.get("type") if progress is not None else None
            self._opening.setdefault(str(key or len(self._opening)), self._item(kind, event))

    def _item(self, kind, event):
        text = "data: " + json_of(renamed(event, self._model.service))
        return {"event": "event: %s\n%s" % (kind, text) if kind else text}

    def _open(self, items):
        """The answer begins: the events before it can go."""
        if self._opening:
            items.extend(self._opening.values())
            self._opening = {}

    def _look(self, kind, event):
        """Note usage and ends; whether the client is to get this event."""
        self._usage.update(counted(event))
        if self._api in self.LAST:
            self.finished = self.finished or (
                event.get("type") or kind) in self.LAST[self._api]
            return True
        choices = event.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            if as_dict(choice).get("finish_reason"):
                self._ended.add(str(choice.get("index")))
                self.finished = self.finished or len(self._ended) >= self._choices
        if self._hides_usage and event.get("usage"):
            del event["usage"]                 # the client did not ask for it
            return bool(event.get("choices"))
        return True


##############################################################################
# Bridge: a local LLM server as a provider
##############################################################################

USUAL = (("Ollama", 11434), ("llama.cpp", 8080), ("LM Studio", 1234),
         ("vLLM", 8000), ("KoboldCpp", 5001), ("llama.cpp", 8081))
KINDS = {"llamacpp": "llama.cpp", "vllm": "vLLM", "library": "Ollama",
         "organization_owner": "LM Studio", "koboldcpp": "KoboldCpp"}
LOOK_UPSTREAM_SECONDS = 5      # for each question about what a server is
NO_CHAT = re.compile(r"embed|rerank|whisper|\b(bge|e5|gte|tts|clip)\b|minilm", re.I)
PROBED = ("responses", "messages", "count_tokens", "rerank", "tokenize", "detokenize")


def upstream_url(text):
    """The base URL of an LLM server, as a user writes it. Raises NeuroengineError."""
    text = text.strip()
    if text.isdigit():
        text = "127.0.0.1:" + text             # a port alone
    url = text if "://" in text else "http://" + text
    url = re.sub(r"(/v1(/.*)?|/)\Z", "", url)
    try:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError
    except ValueError:
        raise NeuroengineError(NO_CONNECTION, "%r is no address of an LLM server: write it "
                               "like http://127.0.0.1:8080." % text, "bad_address") from None
    return url


def positive(*values):
    """The first of these that is a number above 0, be it in a text; or None."""
    for value in values:
        try:
            if not isinstance(value, bool) and int(value) > 0:
                return int(value)
        except (TypeError, ValueError, OverflowError):
            pass
    return None


class Upstream:
    """A local LLM server that speaks OpenAI's API: where it is, and what it has. Its methods
    block.

    url: its address, with or without /v1; None to look on the usual ports.
    """

    def __init__(self, url=None, key=""):
        self._urls = [upstream_url(url)] if url else [
            "http://127.0.0.1:%d" % port for _, port in USUAL]
        self.key, self.transport = key, None
        self.kind, self.slots = "", None
        self.entries = {}          # model id -> what the server says of it
        self._props = {}           # what llama.cpp says of itself
        self._studio = {}          # model id -> what LM Studio says of it

    def find(self):
        """Look once whether it is there, and what it has. Raises Unavailable."""
        reasons = {}
        for url in self._urls:
            transport = Transport(url)
            try:
                self.entries = self._entries(transport)
            except Unavailable as error:
                reasons[url] = error
                continue
            if self.transport is None or self.transport.base != url:
                self.transport = transport
            self._learn()
            return
        if self.transport or len(self._urls) == 1:     # where it was, or is said to be
            raise reasons[self.transport.base if self.transport else self._urls[0]]
        raise Unavailable("No LLM server runs on its usual port here (%s). Start one, or "
                          "name it with --upstream URL." % ", ".join(
                              "%s %d" % pair for pair in USUAL))

    def check(self, ids=()):
        """Raise Unavailable if it is not there any more, or has models, but not all of these."""
        entries = self._entries(self.transport)
        for id in ids if entries else ():      # LM Studio lists none as long as none is loaded
            if id not in entries:
                raise Unavailable("The LLM server at %s does not have %s any more." % (
                    self.transport.base, id))

    def wait(self, say=None, pause=2.0):
        """Wait until the server is there."""
        told = False
        while True:
            try:
                return self.find()
            except Unavailable as why:
                if say and not told:
                    say("%s Waiting for it." % why)
                told = True
                time.sleep(pause)

    def chat_models(self):
        """The ids of all models that can chat."""
        return [id for id in self.entries if self._can_chat(id)]

    def model(self, wanted=None, service=""):
        """The Model of that id, or the first that can chat. Raises Unavailable."""
        ids = list(self.entries)
        if wanted and ids and wanted not in ids:
            raise Unavailable("The LLM server has no model %s; it has %s." % (
                wanted, ", ".join(ids)))
        id = wanted or next(iter(self.chat_models() or ids), "default")
        entry, seen = self.entries.get(id, {}), self._look_closer(id)
        meta, settings = as_dict(entry.get("meta")), as_dict(
            self._props.get("default_generation_settings"))
        limit = as_dict(settings.get("params")).get("n_predict", settings.get("n_predict"))
        return Model(
            id, service, context_length=positive(
                settings.get("n_ctx"), entry.get("max_model_len"), meta.get("n_ctx"),
                seen.get("context_length"), entry.get("context_length"),
                entry.get("context_window")),
            vision=seen.get("vision"), tools=seen.get("tools"),
            embeddings=self._embeds(id, seen), continues=self._continues(),
            apis=["chat", "completions"] + self._apis, endless=not positive(limit))

    def _ask(self, transport, method, path, body=None, timeout=LOOK_UPSTREAM_SECONDS):
        """(status, JSON value or None, headers) of one question; (0, None, {}) if there is
        no answer."""
        try:
            response = transport.open(method, path, body, key=self.key, timeout=timeout,
                                      within=timeout)
            data = response.read()
        except BROKEN:
            return 0, None, {}
        try:
            return response.status, from_json(data.decode("utf-8-sig")), response.headers
        except (ValueError, RecursionError):
            return response.status, None, response.headers

    def _get(self, path):
        status, value, _ = self._ask(self.transport, "GET", path)
        return as_dict(value) if status == 200 else {}

    def _entries(self, transport):
        """{model id: what is said of it}. Raises Unavailable if that is no LLM server."""
        try:
            response = transport.open(
                "GET", "/v1/models", key=self.key, timeout=LOOK_UPSTREAM_SECONDS,
                within=LOOK_UPSTREAM_SECONDS)      # what is there may stream without end
            data = response.read()
        except BROKEN as error:
            raise Unavailable(self._no_answer(transport.base, error)) from None
        if response.headers.get("Server") == "neuroengine":
            raise Unavailable("At %s is a relay, not an LLM server." % transport.base)
        if response.status in (401, 403):
            raise Unavailable("The LLM server at %s wants a key: set "
                              "NEUROENGINE_UPSTREAM_KEY." % transport.base)
        if response.status >= 500:
            raise Unavailable("The LLM server at %s is not ready (HTTP %d)." % (
                transport.base, response.status))
        try:
            models = as_dict(from_json(data.decode("utf-8-sig"))).get("data")
        except (ValueError, RecursionError):
            models = None
        if response.status != 200 or not isinstance(models, list):
            raise Unavailable("At %s is no LLM server that speaks OpenAI's API: it answers "
                              "HTTP %d to /v1/models, and no list of models." % (
                                  transport.base, response.status))
        return {entry["id"]: entry for entry in models
                if isinstance(entry, dict) and isinstance(entry.get("id"), str)}

    def _no_answer(self, base, error):
        """What to say of a server that cannot be asked."""
        known = no_connection(base, error)
        if known.name == "no_connection":
            return "The LLM server at %s does not answer (%s)." % (base, why_words(error))
        advice = " If it is your own, name a file with it in $SSL_CERT_FILE." \
            if known.row == "certificate" else ""
        return known.message + advice

    def _learn(self):
        self.kind = next((KINDS[entry.get("owned_by")] for entry in self.entries.values()
                          if entry.get("owned_by") in KINDS), "")
        self._props = self._get("/props")      # only llama.cpp has it
        if "default_generation_settings" in self._props:
            self.kind = self.kind or "llama.cpp"
        self.slots = positive(self._props.get("total_slots"))
        self._studio = {model.get("id"): model for model in map(
            as_dict, self._get("/api/v0/models").get("data") or ())} \
            if self.kind in ("", "LM Studio") else {}
        self._apis = [api for api in PROBED if self._has(api)]

    def _has(self, api):
        """Whether it knows a path: asked for nothing, it must not say that there is none."""
        status, value, _ = self._ask(self.transport, "POST", PATHS[api], {})
        return status not in (0, 401, 403, 404, 405, 501) and not re.search(
            "nexpected endpoint", str(as_dict(value).get("error")))    # LM Studio's 200

    def _look_closer(self, id):
        """What else can be learnt of a model: vision, tools, context_length, chats."""
        seen, studio = {}, as_dict(self._studio.get(id))
        modalities = as_dict(self._props.get("modalities"))
        if "vision" in modalities:
            seen["vision"] = bool(modalities["vision"])
        caps = as_dict(self._props.get("chat_template_caps"))
        if "supports_tools" in caps:
            seen["tools"] = bool(caps["supports_tools"])
        if studio.get("type"):
            seen.update(vision=studio.get("type") == "vlm",
                        tools="tool_use" in (studio.get("capabilities") or ()),
                        chats=studio.get("type") != "embeddings",
                        context_length=studio.get("loaded_context_length"))
        if self.kind == "Ollama":
            _, shown, _ = self._ask(self.transport, "POST", "/api/show", {"model": id})
            caps = as_dict(shown).get("capabilities")
            if isinstance(caps, list):
                seen.update(vision="vision" in caps, tools="tools" in caps,
                            chats="completion" in caps, embeds="embedding" in caps)
        return seen

    def _can_chat(self, id):
        return self._look_closer(id).get("chats", not NO_CHAT.search(id))

    def _embeds(self, id, seen):
        if "embeds" in seen or len(self.entries) > 1 and self.kind != "Ollama":
            return seen.get("embeds", False)
        status, value, _ = self._ask(self.transport, "POST", PATHS["embeddings"],
                                     {"model": id, "input": "a"}, timeout=10)
        return status == 200 and isinstance(as_dict(value).get("data"), list)

    def _continues(self):
        """Whether it continues a trailing message of the assistant: vLLM does so on request,
        llama.cpp depending on its version and the model's template."""
        begun = "Once upon a "                 # with a space that a template might trim
        if self.kind != "llama.cpp":
            return self.kind == "vLLM"
        _, value, _ = self._ask(self.transport, "POST", "/apply-template", {"messages": [
            {"role": "user", "content": "a"}, {"role": "assistant", "content": begun}]})
        return str(as_dict(value).get("prompt")).endswith(begun)


class Sink:
    """Puts the items of an upstream's answer into the outbox, and has the upstream wait as
    long as the relay does not take them."""

    line = None                    # set by the connection that carries it

    def __init__(self, outbox, work, parser):
        self._outbox, self._work, self._parser = outbox, work, parser
        self.finished = False

    def feed(self, data):
        items, work = self._parser.feed(data), self._work
        self.finished = self._parser.finished
        if items:
            if not work.size:                  # only the first are urgent
                self.line.read_lazily(True)
            self._outbox.put_all(work, items)
            if work.size - work.sent > MAX_UNSENT_BYTES and self._outbox.is_full(work):
                self.line.pause()
                work.on_room = self._resume

    def end(self):
        """The upstream has ended, so the answer should have, too. Raises NeuroengineError."""
        self._outbox.put_all(self._work, self._parser.finish())

    def _resume(self):
        if not self._outbox.is_full(self._work):
            self._work.on_room = None
            self.line.resume()


class Share:
    """What all services of one upstream have in common: its connections, its workers, and
    the look whether it is still there. For one event loop."""

    def __init__(self, upstream, workers=None):
        self.upstream, self.workers = upstream, workers or upstream.slots or 1
        self.bridges = []
        self.said = None           # the last words about the upstream
        self._transport = self._gate = self._checking = None

    async def exchange(self, question, sink):
        """Ask the upstream; (status, headers, body). Raises OSError or HTTPException."""
        if self._transport is None or self._transport.base != self.upstream.transport.base:
            self._transport = AsyncTransport(self.upstream.transport, self.workers + 16,
                                             self._look)
        return await self._transport.exchange(
            "POST", question.path, question.data(), self.upstream.key, UPSTREAM_SECONDS, sink,
            question.headers)

    def gate(self):
        """A semaphore: as many prompts at once as the upstream takes."""
        if self._gate is None:
            import asyncio
            self._gate = asyncio.Semaphore(self.workers)
        return self._gate

    async def check(self):
        """Raise Unavailable if the upstream is gone, or a model that we share. Many may ask at
        once."""
        import asyncio
        if self._checking is None:
            ids = [bridge.model.id for bridge in self.bridges
                   if not bridge.listening.server._paused]     # those wait for theirs
            self._checking = asyncio.ensure_future(in_thread(
                lambda: self.upstream.check(ids), lambda: None))
            self._checking.add_done_callback(self._checked)
        await asyncio.shield(self._checking)

    def _look(self):
        """Start to check whether the upstream is gone."""
        import asyncio
        if self._checking is None and not any(b.listening.server._paused for b in self.bridges):
            asyncio.ensure_future(self.check()).add_done_callback(
                lambda check: check.cancelled() or check.exception())

    def _checked(self, checking):
        self._checking = None
        if not checking.cancelled() and isinstance(checking.exception(), Unavailable):
            self.say(checking.exception())
            for bridge in self.bridges:
                bridge.listening.pause()

    def say(self, why):
        """Say once why the upstream cannot be used."""
        if str(why) != self.said:
            self.said = str(why)
            self.bridges[0].listening.status.event(
                "%s Its prompts went back to the relay; waiting for it." % why)

    def say_back(self):
        """Say that the upstream can be used again, if the contrary was said."""
        if self.said is not None:
            self.said = None
            self.bridges[0].listening.status.event("The LLM server is back.")


class Bridge:
    """Answers the jobs of one service by a model of an upstream. As Workers."""

    def __init__(self, share, service="", wanted=None, most_tokens=None, fetches=False):
        self.share, self._service, self._wanted = share, service, wanted
        self._limits = most_tokens, fetches
        self.listening = self._rendering = None
        self._tasks = set()
        share.bridges.append(self)
        self.learn()

    def learn(self):
        """Learn what the model can do. Blocks; raises Unavailable."""
        self.model = self.share.upstream.model(self._wanted, self._service)
        self._rendering = Rendering(self.model, self.share.upstream.kind, *self._limits)

    def attach(self, listening):
        """Answer the jobs of this _Listening."""
        self.listening, self._outbox = listening, listening.outbox
        self._declare()

    def _declare(self):
        self.listening.server._declare(workers=self.share.workers, **self.model.features())

    def close(self):
        """Its tasks and connections end with the event loop."""

    async def ready(self):
        """Wait until the upstream is there."""
        import asyncio
        while True:
            try:
                await in_thread(self._find, lambda: None)
                self.share.say_back()
                return self._declare()
            except Unavailable as why:
                self.share.say(why)
                await asyncio.sleep(RETRY_UPSTREAM_SECONDS)

    def _find(self):
        self.share.upstream.find()
        self.learn()

    def start(self, work):
        """Have a job answered."""
        import asyncio
        task = asyncio.ensure_future(self._answer(work))
        self._tasks.add(task)                  # the loop itself does not keep it
        task.add_done_callback(self._tasks.discard)
        work.stop = task.cancel

    async def _answer(self, work):
        import asyncio
        error = None
        try:
            question = self._rendering.question(request_left(work))
            if question.api in ("count_tokens", "tokenize", "detokenize"):
                await self._ask(work, question)
            else:
                async with self.share.gate():
                    await self._ask(work, question)
        except asyncio.CancelledError:         # which closes the connection: that is what
            error = CANCELLED                  # frees the upstream's slot
        except Unavailable:
            return                             # all jobs were handed back
        except NeuroengineError as why:
            error = error_entry(why)
        except Exception as why:
            self.listening.status.failure("A prompt could not be passed on:")
            error = {"error": "provider_error", "message": "its bridge failed (%s)"
                                                           % type(why).__name__}
        self._outbox.end(work, error)

    async def _ask(self, work, question):
        """Put the answer into the outbox. Raises NeuroengineError or Unavailable."""
        import asyncio
        deadline = time.monotonic() + LOADING_SECONDS
        while True:
            sink = Sink(self._outbox, work, question.parser(self.model))
            try:
                status, headers, body = await self.share.exchange(question, sink)
            except BROKEN as error:
                await self.share.check()
                raise NeuroengineError(1, "the LLM server broke off (%s)" % why_words(error),
                                       "provider_error") from None
            if status < 300:
                return sink.end()
            try:
                said = from_json(body.decode("utf-8-sig"))
            except (ValueError, RecursionError):
                said = "something that is not JSON"
            message, _, _, param = parts_of_error(said)
            if status == 503 and "oading" in message and time.monotonic() < deadline:
                await asyncio.sleep(1)         # it says that it is loading the model
                continue
            # 404: it may have another model now. Others: a proxy may say so of a server that
            # is gone.
            if status in (404, 502, 503, 504):
                await self.share.check()
            error = self.model.failure(status, said, pause_of({
                "Retry-After": headers.get("retry-after")}))
            if status not in (400, 422) or not question.relent(
                    message, param, error.name == "context_length_exceeded"):
                raise error


##############################################################################
# Command line
##############################################################################


# -- keys and their files --


def key_file(url, name):
    """Where the service key for a name at a relay is kept. Raises NeuroengineError."""
    home = os.environ.get("NEUROENGINE_HOME")
    if not home:
        config = os.environ.get("XDG_CONFIG_HOME") or ""
        if not os.path.isabs(config):          # the standard says to ignore it
            config = os.path.expanduser("~/.config")
        if config[:1] == "~":
            raise NeuroengineError(NO_CONNECTION, "There is no home folder to keep keys in: "
                                   "set NEUROENGINE_HOME to a folder.", "no_home")
        home = os.path.join(config, "neuroengine")
    paths = [os.path.join(home, in_path(place), in_path(name.lower()) + ".key")
             for place in places_of(urllib.parse.urlsplit(url))]
    return next(filter(os.path.exists, paths), paths[0])


def places_of(url):
    """The name for a relay's keys, however its split URL is spelled; and those that earlier
    versions gave it."""
    host = url.hostname or ""
    if ":" in host:
        host = "[%s]" % host
    usual = {"http": 80, "https": 443}.get(url.scheme)
    try:
        port = url.port or usual
    except ValueError:                         # the relay is not asked at such an address
        port = usual
    place = "%s:%s%s" % (host, port, url.path.rstrip("/"))
    return [place, url.netloc] + [host] * (port == 443 and not url.path)


def replace_file(path, text, mode=0o666):
    """Write a text to a file, or leave the file as it is. Raises OSError or ValueError."""
    new = "%s.%s" % (path, secrets.token_hex(4))
    try:
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w",
                       encoding="utf-8", errors="replace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())            # the relay will not tell a key again
        os.replace(new, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(new)
        raise


def save_key(path, key):
    """Write a key to a file that only its owner can read, whatever was there before."""
    os.makedirs(os.path.dirname(path) or ".", mode=0o700, exist_ok=True)
    replace_file(path, key + "\n", 0o600)


def keep_key(path, key):
    """save_key for a key that the relay has just told, and will not tell again. If that
    fails, print the key. Raises NeuroengineError."""
    try:
        save_key(path, key)
    except OSError as error:
        print(key, flush=True)
        raise NeuroengineError(NO_CONNECTION, "This is the new service key, and it could not be "
                               "kept in %s (%s). The relay cannot tell it again: write it to "
                               "that file, or to another for --key-file." % (path, error.strerror),
                               "key_not_kept") from None


def check_can_save(path, named=False):
    """Raise NeuroengineError if no key could be kept in path: before the relay is asked for
    a key, which it tells once. named: the user named it, by --key-file."""
    try:
        save_key(path + ".test", "")
        os.remove(path + ".test")
    except OSError as error:
        raise NeuroengineError(NO_CONNECTION, "The key could not be kept in %s (%s). %s a folder "
                               "that can be written." % (
                                   path, error.strerror, "Name a file by --key-file in" if named
                                   else "Set NEUROENGINE_HOME to"), "no_home") from None


def read_key(path, needed=True):
    """The key in a file. Raises NeuroengineError; "" if it is not needed and not there."""
    try:
        with open(path, "rb") as file:
            data = file.read(10000)
    except OSError as error:
        if not needed and isinstance(error, (FileNotFoundError, NotADirectoryError)):
            return ""
        raise NeuroengineError(NO_CONNECTION, "The key file %s cannot be read: %s." % (
            path, error.strerror), "bad_key_file") from None
    # PowerShell's > writes UTF-16 with a byte order mark.
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    return checked_key(data.decode(encoding, "replace"), "The key file " + path)


def checked_key(key, source):
    """A key of the user's, without white space around it. Raises NeuroengineError, in words
    that name its source."""
    if not key.strip():
        raise NeuroengineError(NO_CONNECTION, "%s is empty." % source, "bad_key_file")
    try:
        return clean_key(key)
    except NeuroengineError:
        raise NeuroengineError(NO_CONNECTION, "%s is not a valid key: a key is one line of "
                               "letters, digits and signs, without spaces." % source,
                               "bad_key_file") from None


def find_key(transport, options, name):
    """(the service key that is at hand for a name, the words for where it comes from);
    "" and "" if there is none. Raises NeuroengineError."""
    environment = os.environ.get("NEUROENGINE_KEY")
    if getattr(options, "key_file", None):
        return read_key(options.key_file), "the key file " + options.key_file
    if options.key:
        return checked_key(options.key, "--key"), "--key"
    if environment:
        return checked_key(environment, "$NEUROENGINE_KEY"), "$NEUROENGINE_KEY"
    path = key_file(transport.base, name)
    key = read_key(path, needed=False)
    return (key, "the key file " + path) if key else ("", "")


def own_key(transport, options, name, say):
    """The service key of a name, which is registered if it has none. say: is called with a
    text for what the user did not ask for. Raises NeuroengineError."""
    key, source = find_key(transport, options, name)
    if key:
        try:
            transport.call("GET", service_path(name), key=key)
            return key
        except NeuroengineError as error:
            kept = ""
            if source == "$NEUROENGINE_KEY" and error.name in ("invalid_key",
                                                               "service_unknown"):
                source += ", which may belong to another service"
                kept = read_key(key_file(transport.base, name), needed=False)
            if kept and kept != key:
                say("$NEUROENGINE_KEY is not the key of %s: using the key file." % name)
                return kept
            if error.name != "service_unknown":
                raise of_service(error, transport, name, key, source)
            say("There is no service %s yet at %s, and %s belongs to another." % (
                name, transport.base, source.partition(",")[0]))
    key, path = register(transport, options, name, key)
    say("Registered %s; its service key is kept in %s." % (name, path))
    return key


def of_service(error, transport, name, key="", source=""):
    """An error of a command that needs a service key, with words for it."""
    return advise(error, COMMAND_LINE, service=name, relay=transport.base, key=key,
                  source=source, kind="service_key")


def service_path(name):
    """Where a service is shown and changed."""
    return "/api/services/%s" % in_path(name)


def register(transport, options, name, old=""):
    """Register a service; its key, and the file that keeps it from now on. old: the key that
    its name may be reserved for, if there is no file with it."""
    path = key_file(transport.base, name)
    check_can_save(path)
    body = {"name": name, "operator": options.operator or "", "comment": options.comment or ""}
    if options.suggest:
        body["suggestions"] = options.suggest
    invitation = options.invitation or os.environ.get("NEUROENGINE_INVITATION")
    if invitation:
        body["invitation"] = invitation
    # A name that was in use before is only given to the holder of its old key.
    old = read_key(path, needed=False) or old
    try:
        answer = transport.call("POST", "/api/services", body, key=old,
                                idempotency_key=secrets.token_hex(16))
    except NeuroengineError as error:
        raise of_service(error, transport, name, old, "the key file " + path)
    key = checked_key(str(answer.get("key") or ""), "The relay's answer")
    keep_key(path, key)
    return key, path


# -- using a service --


def client_of(options, service):
    """A client as the options say."""
    key, source = options.key, "--key"
    if not key:
        key, source = os.environ.get("NEUROENGINE_ACCESS_KEY"), "$NEUROENGINE_ACCESS_KEY"
    return Neuroengine(service, options.relay or DEFAULT_SERVER,
                       key=checked_key(key, source) if key else "",
                       verify_ssl=options.ca or not options.insecure)


def choose_service(options):
    """The service to ask: the one named, otherwise the first that is connected."""
    name = options.service or os.environ.get("NEUROENGINE_SERVICE")
    if name:
        return name
    client = client_of(options, "")
    connected = {str(model.get("name")): model for model in models_of(client)
                 if model.get("connected")}
    if not connected:
        raise NeuroengineError(NO_CONNECTION, "No service is connected at %s: `models` lists "
                               "those that were, and --service NAME takes one of them."
                               % client._transport.base, "no_service")
    closed = {name: "paused" if model.get("paused") else "private"
              for name, model in connected.items()
              if model.get("paused") or model.get("private") and not client.key}
    names = [name for name in connected if name not in closed] or [
        name for name in closed if not client.key and operators_key(client, name)]
    if not names:
        words = ["%s is %s" % pair for pair in itertools.islice(closed.items(), 5)]
        words += ["and so on"] * (len(closed) > len(words))
        step = "Give an access key by --key or $NEUROENGINE_ACCESS_KEY." \
            if "private" in closed.values() else "Try again later."
        raise NeuroengineError(NO_CONNECTION, "Of the services that are connected at %s, none "
                               "takes a prompt of yours: %s. %s" % (
                                   client._transport.base, ", ".join(words), step), "no_service")
    return "Neuroengine-Large" if "Neuroengine-Large" in names else names[0]


def operators_key(client, name):
    """The service key that `register` kept here for a service of this client's relay, or ""."""
    with contextlib.suppress(NeuroengineError):
        return read_key(key_file(client._transport.base, name), needed=False)
    return ""


def models_of(client):
    """The relay's services, as dicts."""
    return [model for model in client.getModels() if isinstance(model, dict)]


def sampling_of(options):
    """The fields of a prompt that the options set."""
    fields = {"max_new_len": options.max_new_len, "temperature": options.temperature,
              "top_p": options.top_p, "seed": options.seed, "wait": options.wait or None}
    return {name: value for name, value in fields.items() if value is not None}


class Answer:
    """One answer on its way to the terminal, and what is known of it."""

    def __init__(self, quiet=False):
        self.text, self.finish_reason, self.stats = "", "", {}
        self._quiet, self._line, self._told = quiet, Line(), False

    def show(self, client, messages, fields):
        """Ask, and print the answer as it comes. Raises NeuroengineError."""
        try:
            return self._show(client, messages, fields)
        except NeuroengineError as error:
            # The user may operate the service: what is closed to others is not to them.
            if client.key or error.name not in ("invalid_key", "service_paused"):
                raise
            client.key, refusal = operators_key(client, client.service_name), error
            if not client.key:
                raise
        print("%s is %s: asking as its operator, whose key is here." % (
            printable(client.service_name),
            "private" if refusal.name == "invalid_key" else "paused"), file=sys.stderr)
        try:
            self._show(client, messages, fields)
        except NeuroengineError as error:
            if error.name != "invalid_key":
                raise
            client.key = ""                    # it was the key of an earlier service
            raise refusal

    def _show(self, client, messages, fields):
        self._line.show("waiting ...")
        try:
            with contextlib.closing(client._events(messages, fields)) as events:
                for kind, value in events:
                    self._take(kind, value)
        finally:
            self._line.show("")
            if self.text and not self._quiet:
                print(end="" if self.text.endswith("\n") else "\n", flush=True)

    def _take(self, kind, value):
        if kind == "text":
            self._line.show("")
            self.text += value
            if not self._quiet:
                sys.stdout.write(printable(value, lines=True))
                sys.stdout.flush()
        elif kind == "queue" and not self.text:
            self._line.show(queue_words(value))
        elif kind == "retry" and not self.text:
            self._say_retry(*value)
        elif kind == "stats":
            self.stats = value
            self.finish_reason = str(value.get("finish_reason") or self.finish_reason)
        elif kind == "item":
            self.finish_reason = str(value.get("finish_reason") or self.finish_reason)
            if value.get("reasoning") and not self.text:
                self._line.show("thinking ...")

    def _say_retry(self, error, seconds):
        """Say why nothing comes: on a terminal in the last line, elsewhere once."""
        words = "%s; trying again in %d s" % (first_sentence(error.said).rstrip("."),
                                              math.ceil(seconds))
        self._line.show(words + " ...")
        if seconds >= TOLD_PAUSE_SECONDS and not is_terminal(sys.stderr) and not self._told:
            print(printable(words) + ".", file=sys.stderr, flush=True)
            self._told = True


def queue_words(queue):
    """What a record says about the queue, in words."""
    if not isinstance(queue, dict):
        return "waiting ..."
    if queue.get("connected") is False:
        return "waiting for a provider ..."
    words = "position %s of %s in the queue" % (queue.get("position"), queue.get("waiting"))
    eta = seconds_of(queue.get("eta_s"))
    return words + (", about %s" % span_words(eta) if eta is not None else "")


def seconds_of(value):
    """A length or a point of time that the relay says, or None if no clock could show it."""
    return value if isinstance(value, (int, float)) and 0 <= value < 3e10 else None


def span_words(seconds):
    """A length of time in words."""
    for size, name in ((86400, "day"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            count = round(seconds / size)
            return "%d %s%s" % (count, name, "s" if name == "day" and count > 1 else "")
    return "%d s" % seconds


def prompt_of_words(words):
    """The prompt that the command line's words make: a text, and standard input for -."""
    texts = [word for word in words if word != "-"]
    if len(texts) > 1 or len(words) > 2:
        raise Usage('quote the prompt: %s ask "%s"' % (program_name(), " ".join(texts)))
    if not words:
        raise Usage('what is the prompt? Give it in quotes, or - for standard input.')
    parts = [read_input() if word == "-" else word for word in words]
    prompt = "\n\n".join(part for part in parts if part.strip())
    if not prompt:
        raise Usage("the prompt is empty")
    # An argument that this system's encoding cannot decode.
    return prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def read_input():
    """All of standard input, as text."""
    if is_terminal(sys.stdin):
        print("Type the prompt, then %s." % (
            "Ctrl-Z and Enter" if os.name == "nt" else "Ctrl-D"), file=sys.stderr)
    return sys.stdin.read().lstrip("\ufeff")


def run_ask(options):
    """ask: one prompt, one answer."""
    messages = [{"role": "user", "content": prompt_of_words(options.prompt)}]
    if options.system:
        messages.insert(0, {"role": "system", "content": options.system})
    client, answer = client_of(options, choose_service(options)), Answer(options.json)
    try:
        answer.show(client, messages if options.system else messages[0]["content"],
                    sampling_of(options))
    except NeuroengineError as error:
        if not options.json:
            raise
        print_json({"reply": answer.text, "errorcode": error.errorcode, "error": error.name,
                    "message": in_options(error)})
        return 1
    if options.json:
        print_json({"reply": answer.text, "errorcode": 0, "service": client.service_name,
                    "finish_reason": answer.finish_reason, "stats": answer.stats})
    elif answer.finish_reason == "length":
        print("The answer was cut at the limit of %d tokens: --max-new-len N sets another."
              % options.max_new_len, file=sys.stderr)
    elif not answer.text:
        print("The answer has no text%s." % (
            " (%s)" % printable(answer.finish_reason) if answer.finish_reason else ""),
            file=sys.stderr)
    return 0


def print_json(value):
    """Print JSON in ASCII, which every terminal and pipe can take."""
    print(json.dumps(value, indent=1))


def run_models(options):
    """models: the directory of the relay."""
    client = client_of(options, "")
    if options.json:
        return print_json(models_of(client))
    show_models(client)


def show_models(client):
    """Print the relay's services, those that are connected first."""
    models = sorted(models_of(client), key=lambda model: (
        not model.get("connected"), str(model.get("name")).lower()))
    if not models:
        return print("No service is registered at %s." % client._transport.base)
    rows = [("NAME", "STATE", "SPEED", "CAN", "WAITING", "ABOUT")] + [
        (str(model.get("name")), state_words(model), speed_words(model), ability_words(model),
         str(model.get("queuelen") or ""),
         " ".join(filter(None, (str(model.get("comment") or ""),
                                model.get("operator") and "(%s)" % model["operator"]))))
        for model in models]
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def state_words(model):
    """Whether a service answers, and whom."""
    seen = seconds_of(model.get("last_seen"))
    state = ("paused" if model.get("paused") else
             "connected" if model.get("connected") else
             "offline, last seen %s ago" % span_words(max(0, time.time() - seen))
             if seen else "never connected")
    return state + (", private" if model.get("private") else "")


def speed_words(model):
    """How fast a service answers, as the relay measured it."""
    rate = model.get("tokens_per_second") or model.get("tokens_per_s")
    return "%.3g tokens/s" % rate if isinstance(rate, (int, float)) else ""


def ability_words(model):
    """What a service can do besides text."""
    length = model.get("context_length")
    words = ["%dk" % (length // 1000) if length >= 10000 else "%d tokens" % length] \
        if isinstance(length, int) else []
    words += [name for name, field in (("images", "vision"), ("tools", "tools"))
              if model.get(field)]
    apis = model.get("apis")
    if model.get("embeddings") or isinstance(apis, list) and "embeddings" in apis:
        words.append("embeddings")
    return ", ".join(words)


# -- chat --


class Chat:
    """A conversation on the terminal."""

    COMMANDS = {                               # name: (arguments, what it does)
        "help": ("", "show this"),
        "system": ("[TEXT]", "show or set the system prompt; - for none"),
        "retry": ("", "ask for another answer"),
        "edit": ("", "change your last message and send it again"),
        "continue": ("", "let an answer go on that was cut or stopped"),
        "model": ("[NAME]", "list the services, or talk to another"),
        "set": ("[NAME VALUE]", "show or set a parameter, as temperature 0.2; - for default"),
        "save": ("FILE", "write the conversation as Markdown, which /load and the page read"),
        "load": ("FILE", "go on with a conversation that /save or the page wrote"),
        "clear": ("", "begin a new conversation; the system prompt stays"),
        "quit": ("", "leave; so does Ctrl-D"),
    }
    PARAMETERS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty",
                  "max_new_len", "seed")

    def __init__(self, options):
        self._options = options
        self._client = client_of(options, choose_service(options))
        self._fields = sampling_of(options)
        self._system = options.system or ""
        self._messages = []                    # {"role", "content"}, without the system's
        self._saved = None                     # the file that /save may write again
        self._readline = load_readline(["/" + name for name in self.COMMANDS])
        # GNU readline takes a paste for one line; libedit, macOS's, does not.
        self._pastes = self._readline and "libedit" not in (self._readline.__doc__ or "")
        self._interactive = is_terminal(sys.stdin)
        self._styled = understands_escapes(sys.stdout)

    def run(self):
        """Talk until the user leaves."""
        if self._interactive:
            self._check_service()
            self._note("Talking to %s at %s. /help lists the commands, Ctrl-C stops an "
                       "answer, Ctrl-D leaves." % (self._client.service_name,
                                                   self._client._transport.base))
        while True:
            try:
                text = self._read()
                if text is None or text in ("/quit", "/exit", "/q"):
                    return
                self._do(text)
            except EOFError:                   # amid a paste
                return
            except KeyboardInterrupt:
                print()
                self._note("Ctrl-D leaves.")

    def _model(self):
        """What the relay's list says of the service, None if it is not there."""
        name = self._client.service_name.lower()
        return next((model for model in models_of(self._client)
                     if str(model.get("name")).lower() == name), None)

    def _check_service(self):
        """Raise NeuroengineError if there is no such service; say if it does not answer."""
        name = self._client.service_name
        model = self._model()
        if model is None:
            time.sleep(LIST_SECONDS)           # it may have been registered a moment ago
            model = self._model()
        if model is None:
            raise self._client._advise(NeuroengineError(
                NO_CONNECTION, "There is no service %s here." % name, "service_unknown"))
        if not model.get("connected") or model.get("paused"):
            self._note("%s is %s." % (name, state_words(dict(model, private=False))))

    def _note(self, text):
        """Print a line that is not part of the conversation."""
        import textwrap
        text = "\n".join(textwrap.fill(line, max(20, columns() - 1), break_long_words=False)
                         for line in printable(text, lines=True).split("\n"))
        print("\x1b[2m%s\x1b[0m" % text if self._styled else text, flush=True)

    def _read(self, begun=""):
        """The next message, or None at the end of input. A pasted block is one message:
        where readline does not see to that, lines that come at once belong together."""
        if begun and self._readline:
            self._readline.set_startup_hook(lambda: self._readline.insert_text(begun))
        try:
            text = input("> " if self._interactive else "")
        except EOFError:
            if self._interactive:
                print()
            return None
        finally:
            if begun and self._readline:
                self._readline.set_startup_hook(None)
        while self._interactive and not self._pastes and input_waits():
            lines = [text]
            while input_waits():
                lines.append(input())
            # The last line of a paste has no end, and waits for Enter.
            text = "\n".join(lines + [input("(pasted %d lines; Enter sends) " % len(lines))])
        return text.strip()

    def _do(self, text):
        """Deal with one input: a command, or a message."""
        command, _, rest = text.partition(" ")
        if not text:
            return
        if not re.match(r"/[a-z]+\Z", command) or "\n" in text:
            return self._ask(text)
        name = command[1:]
        if name == "new":
            name = "clear"
        if name not in self.COMMANDS:
            return self._note("There is no %s; /help lists the commands." % command)
        try:
            getattr(self, "_do_" + name)(rest.strip())
        except (OSError, ValueError) as error:
            self._note("%s: %s." % (rest.strip(), getattr(error, "strerror", None) or error))

    def _ask(self, text):
        if self._messages and self._messages[-1]["role"] == "user":
            self._messages.pop()               # it was not answered, and this is instead
        self._messages.append({"role": "user", "content": text})
        self._answer()

    def _answer(self, begun=""):
        """Get the answer to the conversation, or the rest of one that has begun."""
        answer, ending, stopped = Answer(), "", False
        messages = [{"role": "system", "content": self._system}] if self._system else []
        messages += self._messages
        if begun:
            messages.append({"role": "assistant", "content": begun})
        started = time.monotonic()
        try:
            answer.show(self._client, messages, self._fields)
        except KeyboardInterrupt:
            stopped = True
            ending = "stopped: %s/retry asks again" % (
                "/continue lets it go on, " if begun + answer.text else "")
        except NeuroengineError as error:
            stopped = True
            ending = in_options(error) + "\n/retry asks again."
        if not stopped and answer.finish_reason == "length":
            ending = "cut at the length limit: /continue"
        elif not stopped and not answer.text:
            ending = "no text%s" % (answer.finish_reason and ": " + answer.finish_reason)
        if begun + answer.text:
            self._messages.append({"role": "assistant", "content": begun + answer.text})
        self._note("; ".join(filter(None, (
            speed_of(answer, time.monotonic() - started), ending))))

    def _do_help(self, rest):
        for name, (arguments, what) in self.COMMANDS.items():
            print("  %-18s %s" % ("/%s %s" % (name, arguments), what))
        self._note("Ctrl-C stops an answer and keeps what came of it. A pasted block is one "
                   "message. Nothing is kept when you leave, unless you /save it.")

    def _do_system(self, rest):
        if rest:
            self._system = "" if rest == "-" else rest
        self._note("System prompt: %s" % (self._system or "none"))

    def _do_retry(self, rest):
        if self._messages and self._messages[-1]["role"] == "assistant":
            self._messages.pop()
        if not self._messages:
            return self._note("There is nothing to ask again.")
        self._answer()

    def _do_edit(self, rest):
        at = next((at for at in range(len(self._messages) - 1, -1, -1)
                   if self._messages[at]["role"] == "user"), None)
        if at is None:
            return self._note("There is no message of yours to change.")
        old = self._messages[at]["content"]
        if not self._readline:
            self._note("Type the new text for: %s" % old)
        text = self._read(old)
        if text:
            del self._messages[at:]
            self._ask(text)

    def _do_continue(self, rest):
        if not self._messages or self._messages[-1]["role"] != "assistant":
            return self._note("There is no answer to go on with.")
        self._answer(begun=self._messages.pop()["content"])

    def _do_model(self, rest):
        try:
            if not rest:
                return show_models(self._client)
            names = {str(m.get("name")).lower(): str(m.get("name"))
                     for m in models_of(self._client)}
        except NeuroengineError as error:
            return self._note(in_options(error))
        if rest.lower() not in names:
            return self._note("There is no service %s; /model lists them." % rest)
        self._client = client_of(self._options, names[rest.lower()])
        self._note("Talking to %s." % names[rest.lower()])

    def _do_set(self, rest):
        name, _, value = rest.partition(" ")
        if name and name not in self.PARAMETERS:
            return self._note("There is no parameter %s; there are %s." % (
                name, ", ".join(self.PARAMETERS)))
        try:
            if value.strip() in ("-", "default"):
                self._fields.pop(name, None)
            elif value:
                number = json.loads(value)
                if not isinstance(number, (int, float)) or not abs(number) < math.inf:
                    raise ValueError
                self._fields[name] = number
        except ValueError:
            return self._note("%s takes a number." % name)
        self._note(", ".join("%s %s" % (name, self._fields.get(name, "default"))
                             for name in ([name] if name else self.PARAMETERS)))

    def _do_save(self, rest):
        path = os.path.expanduser(rest)
        if not path:
            return self._note("Name a file: /save FILE")
        if os.path.exists(path) and path != self._saved:
            return self._note("%s exists already: choose another name." % path)
        replace_file(path, to_markdown(self._client.service_name, self._system,
                                       self._messages))
        self._saved = path
        self._note("Saved in %s." % path)

    def _do_load(self, rest):
        with open(os.path.expanduser(rest), encoding="utf-8", errors="replace") as file:
            conversation = from_markdown(file.read())
        if conversation is None:
            return self._note("%s holds no conversation: /save writes one." % rest)
        service, self._system, self._messages = conversation
        self._note("Loaded %d messages%s." % (len(self._messages), (
            " with %s; /model %s would talk to it" % (service, service))
            if service not in ("", self._client.service_name) else ""))

    def _do_clear(self, rest):
        self._messages, self._saved = [], None
        self._note("A new conversation.")


def load_readline(words):
    """The readline module, which completes these words; None where there is none."""
    try:
        import readline
    except ImportError:
        return None

    def complete(text, state):
        found = [word for word in words if word.startswith(readline.get_line_buffer())]
        return found[state] if state < len(found) else None
    readline.set_completer(complete)
    readline.set_completer_delims("\n")
    readline.parse_and_bind("tab: complete")
    readline.parse_and_bind("set enable-bracketed-paste on")
    return readline


def input_waits():
    """Whether more input follows so fast that it was pasted."""
    try:
        import msvcrt
    except ImportError:
        return bool(select.select([sys.stdin], [], [], 0.02)[0])
    return bool(msvcrt.kbhit())


def understands_escapes(stream):
    """Whether a terminal takes escape codes for what they mean."""
    if not is_terminal(stream) or os.environ.get("TERM") == "dumb" \
            or os.environ.get("NO_COLOR"):
        return False
    if os.name != "nt":
        return "TERM" in os.environ
    try:
        import ctypes
        kernel, mode = ctypes.windll.kernel32, ctypes.c_ulong()
        handle = kernel.GetStdHandle(-11)
        # 4: ENABLE_VIRTUAL_TERMINAL_PROCESSING, which consoles before Windows 10 refuse.
        return bool(kernel.GetConsoleMode(handle, ctypes.byref(mode))
                    and kernel.SetConsoleMode(handle, mode.value | 4))
    except (ImportError, AttributeError, OSError):
        return False


def speed_of(answer, seconds):
    """The tokens of an answer and its speed, in words."""
    tokens, rate = answer.stats.get("tokens"), answer.stats.get("tokens_per_s")
    if not isinstance(tokens, int) or not tokens:
        return ""
    if not isinstance(rate, (int, float)):
        rate = tokens / max(seconds, 0.001)
    return "%d token%s, %.3g tokens/s" % (tokens, "s" * (tokens != 1), rate)


ROLES = {"user": "You", "assistant": "Answer"}


def to_markdown(service, system, messages):
    """A conversation in the Markdown that the page exports."""
    title = (messages[0]["content"].strip().split("\n")[0][:60] if messages else "") or "Chat"
    about = json.dumps({"service": service, "system": system}).replace(">", "\\u003e")
    return "# %s\n\n<!-- conversation:%s -->\n\n" % (title, about) + "\n".join(
        "## %s <!-- message:%s -->\n\n%s\n" % (ROLES[message["role"]], message["role"], re.sub(
            "<!-- (message|conversation):", r"<!--  \1:", message["content"]))
        for message in messages)


def from_markdown(text):
    """(service, system prompt, messages) of a text that to_markdown or the page made, or
    None."""
    head = re.search(r"^# .*\n\n<!-- conversation:(.*) -->$", text, re.M)
    try:
        about = json.loads(head.group(1)) if head else None
    except ValueError:
        about = None
    if not isinstance(about, dict):
        return None
    following = re.search(r"^# .*\n\n<!-- conversation:", text[head.end():], re.M)
    body = text[head.end():][:following.start() if following else None]
    parts = re.split(r"^## (?:You|Answer) <!-- message:(user|assistant) -->\n\n", body,
                     flags=re.M)[1:]
    return str(about.get("service") or ""), str(about.get("system") or ""), [
        {"role": role, "content": re.sub("<!--  (message|conversation):", r"<!-- \1:",
                                         content.rstrip("\n"))}
        for role, content in zip(parts[::2], parts[1::2])]


def run_chat(options):
    """chat: a conversation on the terminal."""
    Chat(options).run()


# -- operating a service --


class Operating:
    """A service that the user operates: its relay, and the key that shows it."""

    def __init__(self, options):
        self.name, self.transport = options.name, relay_of(options)
        self.key, self.source = find_key(self.transport, options, options.name)

    def call(self, method, more="", body=None):
        """Send a request about the service. Raises NeuroengineError."""
        try:
            return self.transport.call(method, service_path(self.name) + more, body,
                                       key=self.key)
        except NeuroengineError as error:
            source = self.source
            if source == "$NEUROENGINE_KEY":
                source += ", which may belong to another service"
                kept = read_key(key_file(self.transport.base, self.name), needed=False)
                if error.name == "invalid_key" and kept not in ("", self.key):
                    print("$NEUROENGINE_KEY is not the key of %s: using the key file."
                          % self.name, file=sys.stderr)
                    self.key, self.source = kept, "the key file"
                    return self.call(method, more, body)
            raise of_service(error, self.transport, self.name, self.key, source)

    def key_path(self, word):
        """Where an access key is changed, by its id or its label. Raises NeuroengineError."""
        keys = self.call("GET", "/keys").get("keys") or ()
        found = [key for key in keys if key.get("id") == word] or [
            key for key in keys if str(key.get("label")).lower() == word.lower()]
        if len(found) != 1:
            words = "%d access keys %s: name one by its ID, which `keys %s` lists." \
                if found else "no access key %s: `keys %s` lists them."
            raise NeuroengineError(NO_CONNECTION, "%s has " % self.name + words % (
                ((len(found),) if found else ()) + (word, self.name)), "no_such_key")
        return "/keys/" + in_path(found[0].get("id"))

    def change(self, words, **fields):
        """Change the service, and say so."""
        model = as_dict(self.call("PATCH", body=fields))
        if "anonymous_per_day" in fields and model.get("private"):
            words += ", when it is open"
        print("%s %s." % (self.name, words), flush=True)


def relay_of(options):
    """The transport to the relay that the options name."""
    return RelayTransport(relay_url(options.relay or DEFAULT_SERVER),
                          options.ca or not options.insecure)


def run_register(options):
    """register: take a name and keep its key. For a name that is registered already and
    whose key is here, the same output again, so that a script may run twice."""
    transport = relay_of(options)
    key, source = find_key(transport, options, options.name)
    if key:
        try:
            transport.call("GET", service_path(options.name), key=key)
            print("%s is registered already. Its service key is in %s:\n%s" % (
                options.name, source, key))
            return
        except NeuroengineError as error:
            if error.name not in ("invalid_key", "service_unknown"):
                raise of_service(error, transport, options.name, key, source)
            if options.key or options.key_file:
                print("There is no service %s yet, and a new one gets a key of its own."
                      % options.name, file=sys.stderr)
    key, path = register(transport, options, options.name, key)
    print("Registered %s. Its service key is kept in %s:\n%s" % (options.name, path, key))


def run_keys(options):
    """keys: who may use a service of one's own, and when; access keys for its guests."""
    limits = limits_of(options)
    if limits and options.add is None and options.change is None:
        raise Usage("whose limits? Add --add LABEL for a new key, or --change KEY")
    if options.change is not None and not limits:
        raise Usage("--change needs limits, such as --requests-per-day 100, or "
                    "--requests-per-day none")
    service = Operating(options)
    if options.private is not None:
        service.change("is %s now" % ("private" if options.private else "open"),
                       private=options.private)
    if options.anonymous is not None:
        usual = options.anonymous == "default"
        service.change("gives callers without a key %s prompts a day now" % (
            "the relay's number of" if usual else options.anonymous),
            anonymous_per_day=None if usual else options.anonymous)
    if options.paused is not None:
        service.change("is paused now" if options.paused else "takes prompts again",
                       paused=options.paused)
    if options.add is not None:
        add_key(service, options.add, limits)
    if options.change is not None:
        key = service.call("PATCH", service.key_path(options.change), limits)
        print("Changed: " + key_words(key))
    if options.revoke:
        service.call("DELETE", service.key_path(options.revoke))
        print("Revoked %s." % printable(options.revoke))
    if options.drain:
        service.change("is paused now, until --resume", paused=True)
        wait_until_drained(service)
        print("Nothing waits or runs any more: its providers can be stopped now.")
    if not options.revoke and not options.drain and all(value is None for value in (
            options.add, options.change, options.private, options.anonymous, options.paused)):
        show_keys(service)


def add_key(service, label, limits):
    """Make an access key, and print it with what its guest needs."""
    answer = service.call("POST", "/keys", dict(limits, label=label))
    key = checked_key(str(answer.get("key") or ""), "The relay's answer")
    base = service.transport.base
    print("The access key of %s, which is not shown again:\n%s\nAn invitation to the page:\n"
          "%s/%s#k=%s" % (printable(label or answer.get("id")), key, base, service.name, key))
    host = urllib.parse.urlsplit(base).hostname
    if is_loopback(host):
        print("Others cannot open that link: %s is this machine. Replace %s by the address at "
              "which they reach the relay." % (host, base), file=sys.stderr)
    same = [key for key in service.call("GET", "/keys").get("keys") or ()
            if label and str(key.get("label")).lower() == label.lower()]
    if len(same) > 1:
        print("%d keys are called %s: --change and --revoke take their IDs, which `keys %s` "
              "lists." % (len(same), printable(label), service.name), file=sys.stderr)


def limits_of(options):
    """The limits that the options of `keys` set; None for one that is taken away."""
    limits = {name: getattr(options, name) for name in KEY_LIMITS}
    if options.days == 0:
        raise Usage("--days must be above 0")
    if options.days is not None:
        limits["expires"] = options.days if options.days == "none" \
            else time.time() + 86400 * options.days
    return {name: None if limit == "none" else limit
            for name, limit in limits.items() if limit is not None}


def show_keys(service):
    """Print the state of a service and its access keys."""
    model = service.call("GET")
    anonymous = model.get("anonymous_per_day")
    print(printable("%s is %s, %s%s." % (
        service.name, "private" if model.get("private") else "open to everybody",
        state_words(dict(model, private=False)), "" if anonymous is None else
        "; %scallers without a key have %s prompts a day" % (
            "when it is open, " if model.get("private") else "", anonymous))))
    keys = service.call("GET", "/keys").get("keys")
    if not keys:
        print("It has no access keys; `keys %s --add LABEL` makes one." % service.name)
    for key in keys or ():
        print(key_words(key))


def key_words(key):
    """A line about an access key: its use, and its limits."""
    limits = ["%s %s" % (name.replace("_", " "), key[name])
              for name in KEY_LIMITS if key.get(name) is not None]
    expires = seconds_of(key.get("expires"))
    if expires is not None:
        limits.append("until " + time.strftime("%Y-%m-%d %H:%M %z", time.localtime(expires)))
    return printable("%s  %-20s  today %s requests, %s tokens  %s" % (
        key.get("id"), key.get("label"), key.get("requests_today"),
        key.get("tokens_today"), ", ".join(limits) or "no limits"))


def wait_until_drained(service):
    """Wait until no job of a service waits or runs; print how many do."""
    said = None
    try:
        while True:
            model = service.call("GET")
            left = model.get("queuelen"), model.get("running")
            if not any(left):
                return
            if left != said:
                print(printable("%s waiting, %s running" % left), flush=True)
                said = left
            time.sleep(DRAIN_LOOK_SECONDS)
    except KeyboardInterrupt:
        print("%s stays paused, and running answers go on: `keys %s --resume` ends that."
              % (service.name, service.name))
        raise


def run_describe(options):
    """describe: show or change what the directory says about a service."""
    fields = {name: value for name, value in (
        ("operator", options.operator), ("comment", options.comment),
        ("suggestions", options.suggest)) if value is not None}
    if "suggestions" in fields:
        fields["suggestions"] = [text for text in fields["suggestions"] if text]
    service = Operating(options)
    if fields:
        service.call("PATCH", body=fields)
    model = service.call("GET")
    print(printable("%s\noperator: %s\ncomment: %s\nsuggestions: %s" % (
        model.get("name"), model.get("operator") or "", model.get("comment") or "",
        "; ".join(map(str, model.get("suggestions") or ()))), lines=True))


def run_rename(options):
    """rename: another name for a service; its key file follows."""
    service = Operating(options)
    old, new = (key_file(service.transport.base, name)
                for name in (options.name, options.new_name))
    check_can_save(new)
    service.call("PATCH", body={"name": options.new_name})
    if read_key(old, needed=False) == service.key and old != new:
        try:
            save_key(new, service.key)
        except OSError as error:
            raise NeuroengineError(NO_CONNECTION, "%s is called %s now, but its key could not be "
                                   "kept in %s (%s): give it by --key-file %s." % (
                                       options.name, options.new_name, new, error.strerror, old),
                                   "key_not_kept") from None
        os.remove(old)
    print("%s is called %s now. Its key, access keys and counters stay. Start its providers "
          "again, and tell its users: programs that use the old name get an error."
          % (options.name, options.new_name))


def run_new_key(options):
    """new-key: replace the service key, and keep the new one."""
    service = Operating(options)
    path = options.key_file or key_file(service.transport.base, options.name)
    check_can_save(path, named=bool(options.key_file))
    key = checked_key(str(service.call("PATCH", body={"new_key": True}).get("key") or ""),
                      "The relay's answer")
    keep_key(path, key)
    print("%s has a new service key; providers with the old one are logged out.%s\nIt is kept "
          "in %s:\n%s" % (
              options.name, " Set $NEUROENGINE_KEY to it, or unset it."
              if service.source == "$NEUROENGINE_KEY" else "", path, key))


def run_unregister(options):
    """unregister: delete a service."""
    service = Operating(options)
    service.call("GET")                        # is it there, and is the key right?
    if not options.yes:
        if not is_terminal(sys.stdin):
            raise Usage("add --yes to delete %s without being asked" % options.name)
        try:
            typed = input("Delete %s, with its access keys and counters? Type its name: "
                          % options.name)
        except EOFError:                       # Ctrl-D
            typed = ""
            print()
        if typed.strip().lower() != options.name.lower():
            print("Nothing was deleted.")
            return 1
    service.call("DELETE")
    print("Deleted %s. The relay may reserve its name for its key, which stays here."
          % options.name)


def patiently(status, action):
    """Do action, and again for as long as the relay cannot be reached, or its certificate
    is wrong (a captive portal, a late renewal)."""
    failures = 0
    while True:
        try:
            return action()
        except NeuroengineError as error:
            if error.name not in PASSING:
                raise
            if not failures:
                status.event(in_options(error) + " Trying again until it succeeds.")
            time.sleep(pause_before(failures, error.retry_after))
            failures += 1


def try_it_lines(base, name, options, ask=False, key=""):
    """Commands that try a service, for the shells of this system: curl; or `ask`, if that is
    wanted. key: the key for `ask`, if it does not find it by itself."""
    import shlex
    import subprocess
    url, body = "%s/%s" % (base, name), '{"message": "Hello!", "max_new_len": 200}'
    trust = ["--ca", options.ca] if options.ca else ["--insecure"] * options.insecure
    if ask or trust and os.name == "nt":
        return ["%s %s" % (how_to_run("neuroengine.py"), (
            subprocess.list2cmdline if os.name == "nt" else shlex.join)(
                ["ask", "--relay", base, "--service", name, *trust] + ["--key", key] * bool(key)
                + ["Hello!"]))]
    if os.name != "nt":
        trust = ["--cacert", options.ca] if options.ca else trust
        return [shlex.join(["curl", *trust, url, "-d", body])]
    return ["curl.exe %s -d %s    (cmd.exe)" % (url, subprocess.list2cmdline([body])),
            "irm %s -Method Post -Body '%s'    (PowerShell)" % (url, body)]


def run_share(options):
    """share: be a provider, with a local LLM server behind it."""
    hours = parse_hours(options.hours) if options.hours else ()
    if not options.names and not options.all:
        raise Usage("the name of the service is missing: share NAME, share NAME=MODEL ..., or "
                    "share --all PREFIX")
    status = Status(hours)
    upstream = Upstream(options.upstream, os.environ.get("NEUROENGINE_UPSTREAM_KEY", ""))

    def say(words):                            # the server is not there
        status.event(words)
        for word in options.names:             # a bad name is an error at once, not later
            server_of_share(options, word.partition("=")[0], status)
    upstream.wait(say)
    share = Share(upstream, options.workers)
    try:
        listenings = [share_one(options, share, name, model, hours, status)
                      for name, model in shared_names(options, upstream)]
    except Unavailable as error:
        raise NeuroengineError(NO_CONNECTION, str(error), "no_model") from None
    status.event_of_hours()
    with contextlib.suppress(SystemExit):      # SIGTERM: it has done what it should
        run_listenings(listenings)


def shared_names(options, upstream):
    """[(service, model id or None)] that `share` is asked for."""
    pairs = [tuple(word.partition("=")[::2]) for word in options.names]
    if options.all:
        for model in upstream.chat_models():
            slug = re.sub(r"[^A-Za-z0-9._-]+", "-", re.split(r"[\\/]", model)[-1]).strip("-.")
            pairs.append(("%s-%s" % (options.all, slug), model))
    if len({name.lower() for name, _ in pairs}) < len(pairs):
        raise NeuroengineError(NO_CONNECTION, "Two services cannot have the same name.",
                               "no_name")
    return [(name, model or options.model) for name, model in pairs]


def server_of_share(options, name, status):
    """The NeuroengineServer of a service, which is registered if it has no key here."""
    server = NeuroengineServer(options.relay or DEFAULT_SERVER,
                               verify_ssl=options.ca or not options.insecure)
    server.service_name = name
    server.service_key = patiently(status, lambda: own_key(server._transport, options, name,
                                                           status.event))
    return server


def share_one(options, share, name, model, hours, status):
    """The _Listening that shares a model as a service of that name, logged in."""
    bridge = Bridge(share, name, model, options.max_tokens, options.fetch_images)
    server = server_of_share(options, name, status)
    base, key, server._hours = server._transport.base, server.service_key, hours
    server._paused = not opening(hours, local_minute())[0]
    listening = _Listening(server, bridge, status)
    if not server._paused:                     # by the hours
        patiently(status, server._log_in)
    model = patiently(status, lambda: server._transport.call(
        "GET", service_path(name), key=key))
    print("Sharing %s (%s, %d at once) at %s/%s%s" % (
        name, share.upstream.kind or "an OpenAI-compatible server", share.workers, base, name,
        " from %02d:%02d on" % divmod(opening(hours, local_minute())[1], 60)
        if server._paused else ""))
    if model.get("private"):
        print("It is private: guests need an access key, which `keys %s --add LABEL` makes." % name)
    if model.get("paused"):
        print("It is paused, and only answers its operator: `keys %s --resume` ends that." % name)
    for line in () if server._paused else try_it_lines(
            base, name, options, bool(model.get("private") or model.get("paused")),
            "" if read_key(key_file(base, name), needed=False) == key else "SERVICE-KEY"):
        print("Try it: " + line)
    sys.stdout.flush()
    return listening


# -- options --


class Usage(Exception):
    """The command line is not right; its words say why."""


def program_name():
    """How the user calls this program."""
    name = os.path.basename(sys.argv[0] or "")
    return "neuroengine" if re.match(r"neuroengine(\.exe)?\Z", name) else "neuroengine.py"


def whole(least):
    """A type of option: a whole number, at least this."""
    def parse(text):
        import argparse
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError("must be a whole number, at least %d" % least)
        return number
    return parse


def decimal(text):
    """A type of option: a number that is not negative."""
    import argparse
    try:
        number = float(text)
    except ValueError:
        number = -1
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError("must be a number, at least 0")
    return number


def or_word(word, kind):
    """A type of option: what `kind` takes, or this word."""
    return lambda text: text if text == word else kind(text)


def shared_options():
    """The options that several commands have, as parents for argparse: of all commands, of a
    guest, for asking, a name, of an operator, of a description, for a registration."""
    import argparse
    common, guest, asking, named, owning, naming, inviting = (
        argparse.ArgumentParser(add_help=False) for _ in range(7))
    common.add_argument("--relay", metavar="URL", help="the relay; otherwise "
                        "$NEUROENGINE_SERVER, otherwise " + DEFAULT_SERVER)
    common.add_argument("--ca", metavar="FILE", help="trust this certificate")
    common.add_argument("--insecure", action="store_true",
                        help="do not check the relay's certificate")
    guest.add_argument("--key", help="access key of a private service; otherwise "
                       "$NEUROENGINE_ACCESS_KEY, which others on this machine do not see")
    asking.add_argument("--service", metavar="NAME", help="the service; otherwise "
                        "$NEUROENGINE_SERVICE, otherwise the first that is connected")
    asking.add_argument("--system", metavar="TEXT", help="the system prompt: how to answer")
    asking.add_argument("--max-new-len", type=whole(1), default=1000, metavar="N",
                        help="the most tokens of an answer (default: %(default)s)")
    asking.add_argument("--temperature", type=decimal, metavar="T", help="randomness; 0 for "
                        "none")
    asking.add_argument("--top-p", type=decimal, metavar="P", help="nucleus sampling")
    asking.add_argument("--seed", type=whole(0), metavar="N", help="for the same answer "
                        "again, where the LLM can do that")
    asking.add_argument("--wait", action="store_true", help="if no provider is connected, "
                        "wait for one")
    naming.add_argument("--operator", help="who shares it, for the directory")
    naming.add_argument("--comment", help="a line about it")
    naming.add_argument("--suggest", action="append", metavar="TEXT", help="a prompt that the "
                        "page suggests; up to four times")
    inviting.add_argument("--invitation", metavar="CODE", help="for a relay that registers by "
                          "invitation only; otherwise $NEUROENGINE_INVITATION")
    named.add_argument("name", help="the name of the service")
    owning.add_argument("--key-file", metavar="FILE", help="the file with the service key; "
                        "otherwise $NEUROENGINE_KEY, otherwise the file that `register` wrote")
    owning.add_argument("--key", help="the service key itself; others on this machine see it "
                        "here, so prefer --key-file")
    return common, guest, asking, named, owning, naming, inviting


def add_share_options(share):
    share.add_argument("names", nargs="*", metavar="NAME[=MODEL]", help="the name of the "
                       "service; several, each with a model, share these from one server")
    share.add_argument("--all", metavar="PREFIX", help="share all models that can chat, each "
                       "as PREFIX-MODEL")
    share.add_argument("--upstream", metavar="URL", help="the LLM server; otherwise it "
                       "is looked for on the usual ports of Ollama, llama.cpp, vLLM, "
                       "LM Studio and KoboldCpp")
    share.add_argument("--model", metavar="ID", help="which of its models; otherwise the "
                       "first in its list that can chat")
    share.add_argument("--workers", type=whole(1), metavar="N", help="prompts at once, of all "
                       "models; otherwise as many as the server has slots, or 1")
    share.add_argument("--max-tokens", type=whole(1), metavar="N", help="longest answer, "
                       "whatever is asked; otherwise as asked, or as the server does")
    share.add_argument("--fetch-images", action="store_true", help="let prompts name images "
                       "by URL: the server fetches them, also from your own network")
    share.add_argument("--hours", metavar="FROM-TO", help="share only at these hours, by "
                       "this machine's clock: 22-8, 22:30-8, or 9-12,14-17")


def add_keys_options(keys):
    keys.add_argument("--add", metavar="LABEL", help="make a key, for whom LABEL says")
    keys.add_argument("--change", metavar="KEY", help="change the limits of a key, named by "
                      "its ID or its label")
    keys.add_argument("--revoke", metavar="KEY", help="make a key invalid, at once")
    kind = keys.add_mutually_exclusive_group()
    kind.add_argument("--private", action="store_true", default=None,
                      help="only guests may ask")
    kind.add_argument("--open", dest="private", action="store_false", default=None,
                      help="everybody may ask")
    keys.add_argument("--anonymous", metavar="N", type=or_word("default", whole(0)),
                      help="prompts a day of each caller without a key; `default`: as the "
                           "relay has it")
    pausing = keys.add_mutually_exclusive_group()
    pausing.add_argument("--pause", dest="paused", action="store_true", default=None,
                         help="take no more prompts")
    pausing.add_argument("--resume", dest="paused", action="store_false", default=None,
                         help="take prompts again")
    pausing.add_argument("--drain", action="store_true", help="pause, and wait until "
                         "nothing waits or runs, so that providers can be stopped")
    for limit, text in KEY_LIMITS.items():
        least = 0 if limit.endswith("_per_day") else 1
        keys.add_argument("--" + limit.replace("_", "-"), type=or_word("none", whole(least)),
                          metavar="N", help="with --add or --change: %s; `none`: no limit"
                          % text)
    keys.add_argument("--days", type=or_word("none", decimal), metavar="N",
                      help="with --add or --change: it expires in N days; `none`: never")


def build_parser():
    """The command line's options and subcommands."""
    import argparse                            # the library is imported without it

    class Parser(argparse.ArgumentParser):
        def error(self, message):
            words = re.sub(r"\Aargument (\S+): (expected one argument)?",
                           lambda m: m[1] + (" needs a value" if m[2] else " "), message)
            words = words.replace("not allowed with argument", "does not go with")
            words = words.replace("the following arguments are required: name",
                                  "the name of the service is missing")
            raise Usage(re.sub(".*required: newname", "the new name is missing", words))

    common, guest, asking, named, owning, naming, inviting = shared_options()
    parser = Parser(
        prog=program_name(), description="Use an LLM that somebody shares, or share your own. "
        "`%s \"prompt\"` is short for `ask`." % program_name())
    parser.add_argument("--version", action="version",
                        version="neuroengine " + __version__)
    adder = parser.add_subparsers(dest="command", metavar="COMMAND")
    parser.commands = adder.choices
    add = adder.add_parser
    ask = add("ask", parents=[common, guest, asking], help="send a prompt, print the answer")
    ask.add_argument("prompt", nargs="*", help="the prompt, in quotes; - stands for standard "
                     "input, alone or beside a prompt")
    ask.add_argument("--json", action="store_true", help="print the answer as JSON, with its "
                     "statistics")
    add("chat", parents=[common, guest, asking], help="talk, on the terminal")
    models = add("models", parents=[common, guest], help="list the services of the relay")
    models.add_argument("--json", action="store_true", help="print them as JSON")
    add("register", parents=[common, named, owning, naming, inviting],
        help="register a service, get its key")
    share = add("share", parents=[common, owning, naming, inviting],
                help="share a local LLM server")
    add_share_options(share)
    keys = add("keys", parents=[common, named, owning], help="your service: access keys for its "
               "guests, and whether it answers")
    add_keys_options(keys)
    add("describe", parents=[common, named, owning, naming],
        help="your service: what the directory says about it")
    rename = add("rename", parents=[common, named, owning], help="your service: another name")
    rename.add_argument("new_name", metavar="newname", help="its new name")
    add("new-key", parents=[common, named, owning], help="your service: replace its key")
    unregister = add("unregister", parents=[common, named, owning], help="your service: delete it")
    unregister.add_argument("--yes", action="store_true", help="do not ask")
    return parser


COMMANDS = {"ask": run_ask, "chat": run_chat, "models": run_models,
            "register": run_register, "share": run_share, "keys": run_keys,
            "describe": run_describe, "rename": run_rename, "new-key": run_new_key,
            "unregister": run_unregister}
# Commands that people try, and those of the relay's own program.
TRIED = {"list": "`models` lists the services", "ls": "`models` lists the services",
         "status": "`models` shows the services, `keys NAME` your own",
         "login": "`register NAME` makes a service, `share NAME` logs in",
         "delete": "`unregister NAME` deletes a service",
         "serve": "`share NAME` shares an LLM; `{relay}` is the relay",
         "start": "`share NAME` shares an LLM; `{relay}` is the relay",
         "version": "--version shows it"}
# What other programs call our options.
ELSEWHERE = {"--server": "--relay", "--url": "--relay", "--base-url": "--relay",
             "--host": "--relay http://HOST:PORT", "--port": "--relay http://HOST:PORT",
             "--model": "--service", "--name": "--service", "--api-key": "--key",
             "--max-tokens": "--max-new-len", "--llm": "--upstream", "--label": "--add"}
SERVERS = ("doctor", "reset-key", "invite", "backup", "restore")
KEY_LIMITS = {"requests_per_day": "requests from midnight to midnight, UTC",
              "tokens_per_day": "tokens of answers in that time",
              "concurrency": "prompts at once", "max_new_len": "longest answer, in tokens"}
FLAGS = ("--insecure", "--json", "--wait")     # common options without a value
# Fields that the relay's words may name, and that are options here.
OPTION_FIELDS = ("max_new_len", "temperature", "top_p", "seed", "operator", "comment",
                 "suggest", "anonymous") + tuple(KEY_LIMITS)


def with_command(argv):
    """The arguments with their command first. A prompt alone means ask, as it always did;
    options may stand before a command. Raises Usage for a command that is misspelt."""
    if not argv or argv[0] in ("-h", "--help", "--version"):
        return argv
    at = 0
    while at < len(argv) and argv[at][:1] == "-" and argv[at] not in ("-", "--"):
        at += 1 if "=" in argv[at] or argv[at] in FLAGS else 2
    word = argv[at] if at < len(argv) else ""
    if word in COMMANDS:
        return [word] + argv[:at] + argv[at + 1:]
    if word == "help":
        return argv[at + 1:][:1] + ["--help"]
    if word in SERVERS and len(argv) <= at + 2:
        raise Usage("%s belongs to the relay: %s %s" % (
            word, how_to_run("neuroengine_server.py"), word))
    to_send = ' (To send it as a prompt: ask "%s")' % word
    if word in TRIED:
        raise Usage("there is no command %s: %s.%s" % (word, TRIED[word].format(
            relay=how_to_run("neuroengine_server.py")), to_send))
    close = [name for name in COMMANDS if is_slip(word, name)]
    if close:
        raise Usage("there is no command %s; did you mean %s?%s" % (word, close[0], to_send))
    return ["ask"] + argv


def is_slip(word, name):
    """Whether a word is a name with one letter wrong, missing, added or out of order."""
    if abs(len(word) - len(name)) > 1 or word == name \
            or len(name) < 4 and sorted(word) != sorted(name):     # "as" is no slip of "ask"
        return False
    at = next((at for at, pair in enumerate(zip(word, name)) if len(set(pair)) > 1),
              min(len(word), len(name)))
    rest, other = word[at:], name[at:]
    return rest[1:] == other[1:] or rest == other[1:] or rest[1:] == other \
        or rest[:2] == other[:2][::-1] and rest[2:] == other[2:]


def parse_options(argv):
    """The options that the arguments give. Raises Usage."""
    parser = build_parser()
    argv = with_command(argv)
    options, rest = parser.parse_known_args(argv)
    for word in rest:
        if word[:1] == "-" and word != "-":
            import difflib
            option = word.partition("=")[0]
            known = {name: name for name in parser.commands[
                options.command]._option_string_actions}
            known.update((name, ours) for name, ours in ELSEWHERE.items()
                         if name not in known and ours.split(" ")[0] in known)
            close = [known[name] for name in difflib.get_close_matches(option, known, 1, 0.7)]
            raise Usage("unknown option %s%s" % (
                option, "; did you mean %s?" % close[0] if close else
                "; put -- before a prompt that begins with -" if " " in word else
                "; `%s --help` lists the options" % options.command))
    if options.command == "ask":
        options.prompt += rest                 # of words around options, argparse takes some
    elif rest:
        raise Usage("%s does not take %s" % (options.command, " ".join(rest)))
    if not options.command:
        parser.print_help()
    refuse_keys(options)
    return options


def refuse_keys(options):
    """Raise Usage if a key stands where something belongs that others see."""
    names = [getattr(options, name, None) for name in ("name", "new_name", "service")]
    for name in names + getattr(options, "names", []):
        if name and KEY.search(name):
            raise Usage("a key stands where the name of the service belongs")
    if any(map(KEY.fullmatch, getattr(options, "prompt", ()))):
        raise Usage("the prompt is a key: nothing was sent")


def in_options(error):
    """The words for an error on the command line."""
    words = advise(error, COMMAND_LINE, **error.names).message
    if error.name == "invalid_request":
        field, _, rest = words.partition(" ")
        option = {"suggestions": "suggest", "anonymous_per_day": "anonymous"}.get(field, field)
        if option in OPTION_FIELDS:
            words = "--%s %s" % (option.replace("_", "-"), rest)
    return printable(words, lines=True)


def run(argv):
    """Run the command line; the exit status."""
    try:
        options = parse_options(argv)
        if not options.command:
            return 2
        if options.ca:
            tls_context(options.ca)            # report a wrong file before doing anything
        return COMMANDS[options.command](options) or 0
    except Usage as why:
        print("%s: %s" % (program_name(), KEY.sub("ne_...", printable(why))), file=sys.stderr)
        return 2
    except NeuroengineError as error:
        print(in_options(error), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def end_by_signal(number, frame):
    """A signal's handler: end the program by an exception."""
    raise SystemExit(128 + number)


@contextlib.contextmanager
def signals_that_end():
    """Let SIGTERM, and SIGHUP (on Windows SIGBREAK) of a closed terminal, end the program by
    an exception, which stops the answer under way. A signal that is ignored or handled stays
    so."""
    import signal
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGBREAK")
               if hasattr(signal, name)]
    numbers = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL
               and threading.current_thread() is threading.main_thread()]
    for number in numbers:
        signal.signal(number, end_by_signal)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command line; the exit status."""
    prepare_streams()
    try:
        with signals_that_end():
            status = run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return status
    except OSError as error:
        # EPIPE: `| head` has seen enough, which Windows calls EINVAL. EIO: a closed terminal.
        if error.errno not in (errno.EPIPE, errno.EINVAL, errno.EIO):
            print("%s: %s." % (error.filename or "The output cannot be written",
                               error.strerror or error), file=sys.stderr)
        for stream in (sys.stdout, sys.stderr):      # for the flush at exit
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
