#!/usr/bin/env python3
"""neuroengine relay: where people meet an LLM that somebody shares from home.

A provider beside the LLM dials out to this relay and holds a long poll here.
A client sends a prompt for a service, the name under which the LLM is shared.
The relay queues it, hands it to a provider, and streams the answer back while
it is being made. It hosts no LLM, and neither stores nor logs a prompt or reply.

    python3 neuroengine_server.py --demo        # a working chat on this machine
    python3 neuroengine_server.py --port 8000   # a relay behind a TLS proxy
    python3 neuroengine_server.py --port 443 --cert fullchain.pem --key privkey.pem
    python3 neuroengine_server.py doctor        # what is wrong? --help: more commands

    GET  /, /{service}                     the page (chat.html beside this file)
    POST /{service}                        native API: a prompt, or a command
    GET  /api/models                       the directory of services
    POST /api/services                     register a service, get its key
    GET, PATCH, DELETE /api/services/{name}            manage it with that key
    GET, POST /api/services/{name}/keys; DELETE .../keys/{id}      guests' access keys
    POST /provider/{service}/login, poll, reply, logout      for the provider
    GET  /v1/models; POST /v1/chat/completions, /v1/completions, /v1/embeddings
                                           for OpenAI clients; also without /v1,
                                           and below /{service}/v1
    GET  /healthz, /metrics                for whoever looks after the relay

README.md holds the tables of fields, errors and limits. What this does not
protect against: the relay and the provider read what passes through them.

Read from top to bottom: Limits, Errors, Records, Broker (who gets which job;
knows nothing of HTTP), Store, HTTP, Serving, Demo, Command line.
"""

import argparse
import base64
import bisect
import contextlib
import errno
import functools
import hashlib
import heapq
import hmac
import http
import ipaddress
import itertools
import json
import math
import os
import re
import secrets
import select
import shutil
import signal
import socket
import socketserver
import sqlite3
import ssl
import struct
import subprocess
import sys
import threading
import time
import urllib.parse
from collections import Counter
from collections import OrderedDict
from collections import defaultdict
from collections import deque
from email.utils import formatdate
from http.server import ThreadingHTTPServer

__version__ = "1.0.0"
__all__ = ["Broker", "Limits", "Relay", "RelayError", "Store", "main"]

##############################################################################
# Limits: every bound and every length of time, each a command-line option
##############################################################################

MIB = 1 << 20

LIMITS = (  # (name, default, what it bounds)
    ("max_connections", 2500, "connections in all (about 30 KB each, with TLS 75 KB)"),
    ("max_connections_per_address", 200, "connections of one address, save loopback"),
    ("max_polls", 1000, "of them, held by providers' polls"),
    ("max_waiting", 1400, "of them, held by prompts on their way; the rest is for control"),
    ("max_head_bytes", 16384, "request line and headers of one request"),
    ("max_request_bytes", 20 * MIB, "body of one request (the figure Ollama uses)"),
    ("max_reply_bytes", 8 * MIB, "reply of one job"),
    ("max_held_bytes", 256 * MIB, "all prompts and replies held in memory"),
    ("max_queue", 1000, "jobs waiting for one service"),
    ("max_queue_per_caller", 100, "jobs of one caller waiting for one service"),
    ("max_services", 10000, "registered services"),
    ("max_registrations_per_hour", 20, "services registered by one address, save loopback"),
    ("max_wrong_keys_per_minute", 30, "wrong keys from one address; a right one still works"),
    ("max_changes_per_minute", 120,
     "logins, and changes of services and keys, from one address, save loopback"),
    ("max_prompts_per_minute", 300, "prompts of one caller, save loopback"),
    ("max_anonymous_per_day", 500,
     "prompts of an address without an access key, for one service, save loopback"),
    ("max_sessions", 100, "logged-in providers of one service"),
    ("max_workers", 1024, "jobs that one session may run at once"),
    ("handshake_seconds", 10, "a TLS handshake, in all"),
    ("head_seconds", 10, "a request's headers, in all; a new connection's first byte"),
    ("body_seconds", 20, "a request's body, plus a second for each 16 KiB"),
    ("idle_seconds", 60, "a kept-alive connection waits for the next request"),
    ("write_seconds", 30, "one write to a peer that reads slowly"),
    ("poll_seconds", 25, "an idle provider's poll is held"),
    ("busy_poll_seconds", 5, "the poll of a provider with running jobs is held"),
    ("lease_seconds", 15, "silence after which a provider's jobs are taken back"),
    ("handover_seconds", 5, "time to confirm a job that was handed out"),
    ("close_seconds", 0.5, "time for a provider whose poll broke to poll again"),
    ("offline_seconds", 15, "queued jobs wait when the last provider has left"),
    ("grace_seconds", 30, "a job waits for a client that went away"),
    ("keep_seconds", 300, "a finished stream stays readable"),
    ("wait_seconds", 18, "a polled read without a token (old clients give up at 20)"),
    ("heartbeat_seconds", 9, "silence within a streamed answer"),
    ("job_seconds", 3600, "one job, from prompt to the end of its reply"),
    ("drain_seconds", 30, "running jobs may finish after SIGTERM"),
)


class Limits:
    """The values of LIMITS as attributes; Limits(grace_seconds=5) changes one."""

    def __init__(self, **changes):
        values = {name: default for name, default, _ in LIMITS}
        unknown = set(changes) - set(values)
        if unknown:
            raise TypeError("unknown limits: " + ", ".join(sorted(unknown)))
        self.__dict__.update(values, **changes)


MAX_SESSIONS_PER_JOB = 3     # a job goes to no more sessions than this
MAX_LAST_WORDS = 2048        # ended jobs that a session's poll may still name
MAX_DEATHS_PER_JOB = 2       # a prompt that two providers died on is the cause
MAX_FIELDS = 64              # headers of one request; browsers send about 20
BODY_BYTES_PER_SECOND = 16384
SOON_SECONDS = 0.25          # an answer within it is sent by the thread that brings it
LINGER_SECONDS = 2           # for a peer to take our last words
QUEUE_NEWS_SECONDS = 2       # how often a waiting stream hears of its place
JUST_GONE_SECONDS = 60       # a provider that left so lately may be back at once
LATE_HEAD_SECONDS = 60       # /v1: a status line must come; then spaces keep it open
SAVE_SECONDS = 0.5           # counters reach the disk this often
EARLIEST_TIME = 1767225600   # 2026: a clock that is behind it is wrong
RENEWAL_SECONDS = 14 * 86400     # of a certificate: certbot renews a month ahead
OTHER_DESCRIPTORS = 64       # open files that are no connections
MIN_FREE_MIB = 50            # of the disk with the data
RELOAD_SECONDS = 2           # between looks at the data file: Python's standard library
                             # has no way to wait for another process's write
STACK_BYTES = 256 * 1024     # of a connection's thread
TOTAL_TEXT = {"operator": 100, "comment": 500}   # characters of a service's texts
MAX_DEPTH = 100              # of nested JSON
MAX_BRACKETS = 200000        # objects and lists in one body: each takes 60 to 300 bytes
MAX_SEPARATORS = 1000000     # quotes or commas in one body: parsing holds up all others
MAX_DIGITS = 4000            # of a whole number, in Pythons of before 2022: they take a
                             # time quadratic in it; later ones have such a limit themselves
MAX_SMALL_BODY_BYTES = 1 << 18   # of what is neither a prompt nor a reply
MAX_ID_CHARACTERS = 64       # of a job's id, as a provider may name it
MAX_HANDOVER_BYTES = 1 << 22     # of prompts in one response, if there is more than one
MAX_ITEMS_A_RECORD = 4096    # of a streamed answer
MAX_MADE_AT_ONCE = 32        # answers, or pieces of them, made before they are sent: 256
                             # at once lengthen the worst gap of a stream by 4 ms
MAX_PATHS_KNOWN = 250        # that need not be taken apart again, of 8 KiB at the most
SHARE = 10                   # one address has no more of the polls and the waiting than
                             # the tenth part
JOB_BYTES = 4096             # what a job takes beside its texts
ITEM_BYTES = 64              # what an item takes beside its text
MAX_KEYS = 1000              # access keys of one service
KEY_LIMITS = {               # what an access key may be limited to; None: not at all
    "requests_per_day": (int, 0, 10**9), "tokens_per_day": (int, 0, 10**12),
    "concurrency": (int, 1, 10**4), "max_new_len": (int, 1, 10**7),
    "expires": (float, 0, 10**11)}
LENGTH_FIELDS = {"max_new_len", "max_tokens", "max_completion_tokens", "n_predict",
                 "max_length", "num_predict"}    # all that some upstream understands
DAY_SECONDS = 86400          # quotas begin anew at midnight UTC

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")
RESERVED_NAMES = frozenset("""
    v1 api provider healthz metrics models chat completions embeddings responses
    messages images audio files admin login logout register services keys static
    assets favicon.ico robots.txt index.html chat.html sitemap.xml manifest.json
    .well-known""".split())

SAMPLING = {  # field: (type, lowest, highest); what the native API checks
    "temperature": (float, 0, 100),
    "top_p": (float, 0, 1),
    "top_k": (int, -1, 10**6),
    "min_p": (float, 0, 1),
    "repetition_penalty": (float, 0, 100),
    "max_new_len": (int, 1, 10**7),
    "seed": (int, -2**63, 2**64 - 1),
    "gettokens": (int, 1, 10**5),
    "at": (int, 0, 10**9),
}
OPENAI_SAMPLING = {
    "temperature": SAMPLING["temperature"],
    "top_p": SAMPLING["top_p"],
    "max_tokens": SAMPLING["max_new_len"],
    "max_completion_tokens": SAMPLING["max_new_len"],
    "seed": SAMPLING["seed"],
}

##############################################################################
# Errors: one table for every face of the relay
##############################################################################

ERRORS = {  # name: (errorcode, HTTP status, OpenAI type, OpenAI code, retry helps)
    "internal_error": (1, 500, "server_error", "internal_error", True),
    "invalid_request": (10, 400, "invalid_request_error", "invalid_value", False),
    "invalid_json": (11, 400, "invalid_request_error", "invalid_json", False),
    "invalid_name": (12, 400, "invalid_request_error", "invalid_name", False),
    "context_length_exceeded": (
        13, 400, "invalid_request_error", "context_length_exceeded", False),
    "bad_http": (14, 400, "invalid_request_error", "bad_http", False),
    "not_found": (15, 404, "invalid_request_error", "unknown_url", False),
    "method_not_allowed": (
        16, 405, "invalid_request_error", "method_not_allowed", False),
    "length_required": (17, 411, "invalid_request_error", "length_required", False),
    "request_too_large": (
        18, 413, "invalid_request_error", "request_too_large", False),
    "unsupported_encoding": (
        19, 415, "invalid_request_error", "unsupported_encoding", False),
    "head_too_large": (20, 431, "invalid_request_error", "head_too_large", False),
    "request_timeout": (21, 408, "invalid_request_error", "request_timeout", True),
    "invalid_key": (30, 401, "invalid_request_error", "invalid_api_key", False),
    "forbidden": (31, 403, "permission_error", "service_forbidden", False),
    "quota_exceeded": (34, 429, "insufficient_quota", "insufficient_quota", False),
    "name_taken": (32, 409, "invalid_request_error", "name_taken", False),
    "key_reused": (33, 422, "invalid_request_error", "key_reused", False),
    "invitation_needed": (35, 403, "permission_error", "invitation_needed", False),
    "service_unknown": (40, 404, "invalid_request_error", "model_not_found", False),
    "service_offline": (41, 503, "server_error", "provider_offline", True),
    "queue_full": (42, 503, "server_error", "queue_full", True),
    "rate_limited": (43, 429, "rate_limit_error", "rate_limit_exceeded", True),
    "relay_busy": (44, 503, "server_error", "relay_busy", True),
    "shutting_down": (45, 503, "server_error", "shutting_down", True),
    "still_waiting": (46, 202, "server_error", "still_waiting", True),
    "service_paused": (48, 503, "server_error", "provider_paused", True),
    "stream_unknown": (47, 404, "invalid_request_error", "stream_unknown", False),
    "provider_error": (50, 502, "server_error", "provider_error", False),
    "provider_lost": (51, 502, "server_error", "provider_disconnected", True),
    "provider_timeout": (52, 504, "server_error", "provider_timeout", False),
    "reply_too_large": (53, 502, "server_error", "reply_too_large", False),
    "cancelled": (54, 409, "invalid_request_error", "cancelled", False),
    "unsupported": (55, 400, "invalid_request_error", "unsupported_parameter", False),
    "session_unknown": (60, 404, "invalid_request_error", "session_unknown", False),
}
# What a provider may say of a job it could not answer; all else is provider_error.
PROVIDER_ERRORS = frozenset(
    ("provider_error", "invalid_request", "context_length_exceeded",
     "provider_timeout", "unsupported"))


class RelayError(Exception):
    """What went wrong, in words for whoever asked.

    name: a row of ERRORS. param: the field at fault. retry_after: seconds. retry:
    whether a client may sit that out by itself, if not as the row says. limit: how many
    requests are allowed, where that is what was passed.
    """

    def __init__(self, name, words, *, param=None, retry_after=None, allow=None,
                 retry=None, limit=None):
        super().__init__(words)
        self.name, self.words, self.param = name, words, param
        self.retry_after, self.allow, self.limit = retry_after, allow, limit
        self.retry = ERRORS[name][4] if retry is None else retry

    def native(self):
        """The error as the native, the operator's and the provider's API say it."""
        return {"reply": self.words, "errorcode": ERRORS[self.name][0],
                "error": self.name}

    def openai(self):
        """The error as OpenAI clients expect it."""
        _, _, kind, code, _ = ERRORS[self.name]
        words = self.words
        if code == "context_length_exceeded":      # LangChain looks for it in the words
            words += " (%s)" % code
        return {"error": {"message": words, "type": kind, "param": self.param, "code": code}}


class PeerGone(Exception):
    """The other end of a connection went away: normal, nobody to tell."""


##############################################################################
# Records
##############################################################################


class Service:
    """A name under which an LLM is shared, and who waits and works for it."""

    SETTINGS = ("operator", "comment", "private", "paused", "anonymous_per_day")
    COLUMNS = ("name", "key_digest", "operator", "comment", "created", "numreq",
               "last_seen", "private", "paused", "anonymous_per_day")

    def __init__(self, name, key_digest, operator="", comment="", created=0,
                 numreq=0, last_seen=None, private=False, paused=False,
                 anonymous_per_day=None):
        self.name, self.key_digest = name, key_digest
        self.operator, self.comment, self.created = operator, comment, created
        self.numreq, self.last_seen = numreq, last_seen   # last_seen: wall clock
        self.private, self.paused = bool(private), bool(paused)
        self.anonymous_per_day = anonymous_per_day    # None: as the relay's limit says
        self.stored = False           # whether it is in the data file
        self.keys = {}                # digest -> AccessKey, those of its guests
        self.sessions = {}            # id -> Session, those that are connected
        self.idle = OrderedDict()     # sessions with a parked poll and a free worker
        self.queue = Queue()          # of jobs that wait
        self.job_seconds = None       # measured, as a moving average
        self.tokens_per_second = None
        self.context_length = None    # as a provider told
        self.expected_until = 0.0     # its provider may be back before: let prompts wait


class Queue:
    """The jobs that wait for one service, in the order in which they will be taken."""

    def __init__(self):
        self._returned = deque()      # those a provider did not finish go first
        self._own = deque()           # then the operator's own
        self._turns = OrderedDict()   # then caller -> deque of jobs, taking turns
        self.size = 0                 # of all together

    def __iter__(self):
        for queue in (self._returned, self._own, *self._turns.values()):
            yield from queue

    def count(self, caller, own):
        """How many jobs of one caller, or of the operator, wait."""
        return len(self._own if own else self._turns.get(caller, ()))

    def add(self, job):
        """Put a job where it belongs."""
        self.size += 1
        if job.returned:
            self._returned.appendleft(job)
        elif job.own:
            self._own.append(job)
        else:
            self._turns.setdefault(job.caller, deque()).append(job)

    def remove(self, job):
        """Take out this very job."""
        self.size -= 1
        if job.returned:
            self._returned.remove(job)
        elif job.own:
            self._own.remove(job)
        else:
            queue = self._turns[job.caller]
            queue.remove(job)
            if not queue:
                del self._turns[job.caller]

    def take(self, session):
        """Take out the job that this session should have next; None if there is none."""
        for job in self._returned:
            if session.may_take(job):
                break
        else:
            if self._own:
                job = self._own[0]
            elif self._turns:
                caller = next(iter(self._turns))
                job = self._turns[caller][0]
                self._turns.move_to_end(caller)       # the next caller's turn
            else:
                return None
        self.remove(job)
        return job

    def position(self, job):
        """How many jobs will be taken up to and including this one."""
        if job.returned:
            return self._returned.index(job) + 1
        ahead = len(self._returned)
        if job.own:
            return ahead + self._own.index(job) + 1
        ahead += len(self._own)
        turn = self._turns[job.caller].index(job)
        before = True                                 # callers whose turn is sooner
        for caller, queue in self._turns.items():
            if caller == job.caller:
                before = False
            else:
                ahead += min(len(queue), turn + before)
        return ahead + turn + 1


class AccessKey:
    """A guest's right to use a service: what it is limited to, and what it has used."""

    COLUMNS = ("id", "digest", "label", "created") + tuple(KEY_LIMITS) + (
        "day", "requests", "tokens", "last_used")

    def __init__(self, *values):
        for column, value in zip(self.COLUMNS, values):
            setattr(self, column, value)
        self.running = 0
        self.written = None           # what the data file knows of its use

    def cap(self, request, usual):
        """Limit the length that a request may ask for; `usual`: the field for it."""
        if self.max_new_len is None:
            return
        request.setdefault(usual, self.max_new_len)
        for field in LENGTH_FIELDS & set(request):
            asked = request[field]
            request[field] = (min(asked, self.max_new_len)
                              if type(asked) in (int, float) and asked > 0
                              else self.max_new_len)

    def shown(self, now):
        """What its operator is told of it; the key itself is known to the guest alone."""
        today = self.day == now // DAY_SECONDS
        return dict({name: getattr(self, name) for name in (
            "id", "label", "created", "last_used") + tuple(KEY_LIMITS)},
            requests_today=self.requests if today else 0,
            tokens_today=self.tokens if today else 0, running=self.running)


class Session:
    """One logged-in provider."""

    def __init__(self, service, workers, continues, embeddings, lock):
        self.id = secrets.token_hex(16)
        self.service, self.workers = service, workers
        self.continues, self.embeddings = continues, embeddings   # what it can do
        self.jobs = {}                # id -> Job, those it has a lease of
        self.cancelling = {}          # (id, attempt) that still occupy a worker there,
                                      # and when it was last told so
        self.last_words = OrderedDict()    # (id, attempt) that it has ended of late
        self.outbox = []              # jobs to hand over with the next response
        self.cancels = {}             # (id, attempt) to tell it of in the next response
        self.unconfirmed = OrderedDict()   # id -> Job: handed over, not heard of
        self.arrived = threading.Condition(lock)   # outbox, cancels, or a reason to go
        self.poll = None              # token of the newest poll
        self.parked = False
        self.deadline = 0.0           # when silence becomes loss
        self.watching_handover = False
        self.closed = False

    def free(self):
        """How many more jobs it can run now."""
        return self.workers - len(self.jobs) - len(self.cancelling)

    def may_take(self, job):
        """Whether a job that another session gave back can go to this one."""
        return (self.continues or not job.seen) and (
            job.avoid is not self or len(self.service.sessions) == 1)


class Poll:
    """Names one poll of a session."""

    lost = False                      # its connection has broken


def unique_ids():
    """Yield names that nothing else has had or will have, in this process or another.
    Not secret: a system call for each would cost more than all else about them."""
    prefix = secrets.token_hex(8)
    return map((prefix + "%08x").__mod__, itertools.count())


JOB_IDS = unique_ids()


class Job:
    """One prompt on its way, and what has come of it."""

    # What a job begins with; what most never change takes no time to set.
    state = "queued"
    name = fingerprint = twin = None
    grace, own, wait = 0.0, False, False
    returned = False              # a provider had it: it goes before all others
    seen = 0                      # items of which some client has been told
    place = 0                     # items given to a client that does not count
    attempt = deaths = 0
    avoid = session = None
    access = None                 # the AccessKey that it counts for
    left_at = None                # when the last reader left
    error, error_told = None, False
    timer = False                 # whether _check_job_locked is going to be called
    leased_at = first_at = ended_at = None

    def __init__(self, service, caller, payload, now, holder=None):
        self.id = next(JOB_IDS)
        self.service, self.caller, self.payload = service, caller, payload
        self.holder = holder or caller             # whose memory it takes
        self.items, self.size = [], 0
        self.readers = []
        self.created = self.heard_at = now         # heard_at: its provider named it, or it
                                                   # was handed over


class Reader:
    """One client's hold on a job: it waits there, and has read up to `at`."""

    __slots__ = ("job", "at", "start", "news", "wanted", "attached", "gone", "deliver",
                 "behind")

    def __init__(self, job, at, news):
        self.job, self.at, self.start = job, at, at
        self.news = news              # what its thread waits for: items, the end, or to go
        self.wanted = math.inf        # how many items there must be to wake it
        self.attached, self.gone = True, False
        self.deliver = None           # called by whoever brought items, for him to write;
                                      # None: its own thread does, which waits for news
        self.behind = False           # he could not: there is work for its own thread


class Rates:
    """So many of something in a time, for each who asks: the generic cell rate algorithm
    (GCRA), one instant for each. What is not used up may be caught up at once."""

    MOST = 10000     # remembered at once; strangers could fill the memory otherwise

    def __init__(self, clock=time.monotonic):
        self._clock = clock
        self._due = OrderedDict()          # who -> when all that it took is paid off
        self._lock = threading.Lock()

    def take(self, who, most, seconds, what, name="rate_limited"):
        """Count one. Raises RelayError, of that name, if it is one too many."""
        with self._lock:
            now, pause = self._clock(), seconds / most
            due = max(now, self._due.pop(who, now))
            late = due + pause - now - seconds
            late = late if late > 0.001 else 0        # what is due now may come out as 1e-12
            self._due[who] = due if late else due + pause
            if len(self._due) > self.MOST:
                self._due.popitem(last=False)
        if late:
            raise RelayError(name, "Too many %s: %d in %s are allowed, and you may send "
                             "the next in %s." % (what, most, in_words(seconds),
                                                  in_words(late)),
                             retry_after=late, limit=most)


class Shares:
    """What is taken at this moment of something that there is only so much of, in all and
    by each address, of which none has more than its share. This machine may have all."""

    def __init__(self, what, most, each):
        self.what, self.most, self.each = what, most, each
        self.taken, self._by = 0, {}
        self._lock = threading.Lock()

    def take(self, address, count=1, always=False):
        """Take so many; address None: nobody's. Raises RelayError if there are not so
        many left, unless it is to be had always."""
        with self._lock:
            mine = self._by.get(address, 0) + count
            share = mine <= self.each or address is None or is_loopback(address)
            if always or share and self.taken + count <= self.most:
                self.taken += count
                self._by[address] = mine
                return
        raise RelayError("relay_busy" if share else "rate_limited",
                         "This relay has no more %s to give %s: try again in a few seconds."
                         % (self.what, "just now" if share else "your address"),
                         retry_after=5)

    def give(self, address, count=1):
        """Give them back."""
        with self._lock:
            self.taken -= count
            self._by[address] -= count
            if not self._by[address]:
                del self._by[address]


def in_words(seconds):
    """A length of time as people say it, rounded up."""
    for size, unit in ((DAY_SECONDS, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return "%d %s" % (math.ceil(seconds / size), unit)
    return "%d s" % math.ceil(seconds)


class Histogram:
    """How many of some lengths of time were how long."""

    BOUNDS = (0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)   # seconds

    def __init__(self):
        self.counts, self.sum = [0] * (len(self.BOUNDS) + 1), 0.0

    def observe(self, seconds):
        self.counts[bisect.bisect_left(self.BOUNDS, seconds)] += 1
        self.sum += seconds

    def lines(self, name):
        """It in the text format of Prometheus: each bucket counts those before it, too."""
        totals = list(itertools.accumulate(self.counts))
        return ["# TYPE %s histogram" % name] + [
            '%s_bucket{le="%s"} %d' % (name, bound, total)
            for bound, total in zip(self.BOUNDS + ("+Inf",), totals)] + [
            "%s_sum %.3f" % (name, self.sum), "%s_count %d" % (name, totals[-1])]


MOVES = {  # the only ways a job changes its state
    "queued": ("leased", "failed", "cancelled"),
    "leased": ("queued", "done", "failed", "cancelled"),
    "done": (), "failed": (), "cancelled": (),
}

##############################################################################
# Broker: matches jobs with polls and carries items back. Knows nothing of HTTP.
##############################################################################


class Broker:
    """All services, sessions and jobs, in memory.

    Clients: submit or open, then read until the job has ended, then leave.
    Providers: login, then poll and reply, then logout. Whoever sees a connection
    break says hangup (a client's) or lost (a provider's). One thread runs upkeep.
    """

    def __init__(self, limits=None, *, clock=time.monotonic, wall=time.time):
        self.limits = limits or Limits()
        self._clock, self._wall = clock, wall
        # Guards everything below, every Job and every Session. Each condition is
        # built on it: waiting on one lets go of it, waking takes it back.
        self._lock = threading.Lock()
        self._services = {}           # lower-case name -> Service
        self._sessions = {}           # id -> Session, lost ones until their deadline
        self._jobs = {}               # id -> Job, all that are not forgotten
        self._named = {}              # (service, name) -> Job, to be found again
        self._twins = {}              # twin -> Job of it, the one last submitted or left
        self._kept = OrderedDict()    # id -> Job, ended ones that stay readable
        self._held = 0                # bytes of all jobs
        self._held_by = defaultdict(int)      # holder -> bytes of its jobs
        self._to_deliver = []         # the deliver of each reader for whom items came
        self._timers = []             # heap of (deadline, number, method, argument)
        self._numbers = itertools.count()
        self._timer_set = threading.Condition(self._lock)   # upkeep must look again
        self._rates, self._daily = Rates(clock), Rates(clock)     # of prompts
        self._changed = {}            # name -> Service whose counters are not saved
        self.counters_changed = threading.Event()
        self.draining = self.closed = False
        self.counts = {"jobs": 0, "done": 0, "failed": 0, "cancelled": 0,
                       "requeued": 0, "tokens": 0}
        self.histograms = {name: Histogram() for name in (
            "queue_seconds", "first_token_seconds", "answer_seconds")}

    # -- services --

    def add(self, service, returning=False):
        """Make a registered service known. Raises RelayError if the name is taken.

        returning: it was in the data file, so its provider is on its way.
        """
        with self._lock:
            if returning:
                service.expected_until = self._clock() + self.limits.offline_seconds
            if service.name.lower() in self._services:
                raise RelayError("name_taken",
                                 "The name %r is taken: choose another." % service.name)
            if len(self._services) >= self.limits.max_services and not returning:
                raise RelayError("relay_busy", "This relay holds no more services.")
            self._services[service.name.lower()] = service

    def remove(self, service):
        """Forget a service: its jobs fail, its sessions end."""
        with self._lock:
            if self._services.get(service.name.lower()) is service:
                del self._services[service.name.lower()]
            self._end_sessions_locked(service)
            self._fail_waiting_locked(service, RelayError(
                "service_unknown", "The service %s was deleted." % service.name))
            self._changed.pop(service.name, None)

    def services(self):
        """All services, as they are at this moment."""
        with self._lock:
            return list(self._services.values())

    def close_sessions(self, service):
        """End every session of a service, as when its key was changed."""
        with self._lock:
            self._end_sessions_locked(service)

    def find(self, name):
        """Return the Service of that name, in any case. Raises RelayError."""
        service = self._services.get(name.lower())
        if service is None:
            if not NAME.match(name) or name.lower() in RESERVED_NAMES:
                raise RelayError("invalid_name", invalid_name_words(name), param="model")
            raise RelayError("service_unknown", "There is no service %s here. GET "
                             "/api/models lists those there are." % name, param="model")
        return service

    def knows_key(self, hashed):
        """Whether some service has an access key of that hash."""
        with self._lock:
            return any(hashed in service.keys for service in self._services.values())

    def models(self):
        """What `getmodels` answers: one dict for each service, by name."""
        with self._lock:
            return [self._model_locked(self._services[name])
                    for name in sorted(self._services)]

    def model(self, service):
        """The entry of one service in models()."""
        with self._lock:
            return self._model_locked(service)

    def totals(self):
        """Counters, gauges and histograms for /metrics."""
        with self._lock:
            services = self._services.values()
            return dict(self.counts), dict(
                held_bytes=self._held, held_jobs=len(self._jobs), timers=len(self._timers),
                services=len(self._services),
                sessions=sum(len(s.sessions) for s in services),
                queued=sum(s.queue.size for s in services),
                running=sum(len(s.jobs) for s in self._sessions.values())
            ), self.histograms

    def take_changed(self):
        """Return the services whose counters changed since the last call."""
        with self._lock:
            changed, self._changed = self._changed, {}
            self.counters_changed.clear()
            return list(changed.values())

    # -- clients, in the order a job lives --

    def condition(self):
        """What a client's thread is woken by. To make one is a twentieth of what a prompt
        costs, so a connection keeps its own."""
        return threading.Condition(self._lock)

    def submit(self, service, payload, *, caller="", name=None, fingerprint=None,
               twin=None, at=None, own=False, wait=False, grace=None, access=None,
               rated=False, holder=None, news=None):
        """Accept a prompt, or find the job it already is, and return a Reader of it.

        payload: the request as JSON text, for the provider. name: what the job can be
        found by again (a stream key, or an Idempotency-Key with its caller), provided
        the fingerprint is the same. twin: what an identical prompt of this caller
        would have; a job that its client left is found by it. at: where to read from.
        own: the operator's, goes first. wait: queue even if no provider is connected.
        grace: seconds to live without a reader, instead of the limit. access: the
        AccessKey it counts for. rated: bounded in number, as a stranger's. holder: whose
        memory it takes, the caller's if not said. news: the condition of who will read.
        Does not block.
        """
        with self._lock:
            job = self._named.get((service, name)) if name else self._twins.get(twin)
            if job is not None and (name or job.left_at is not None):
                if name and fingerprint is not None and job.fingerprint != fingerprint:
                    raise RelayError("key_reused", "This key already names another "
                                     "prompt: use a new random one for each prompt.")
                return self._attach_locked(job, at, news)
            if at:
                raise self._stream_unknown()
            job = Job(service, caller, payload, self._clock(), holder)
            job.own, job.wait, job.access = own, wait, access
            self._admit_locked(job, rated)
            job.name, job.fingerprint, job.twin = name, fingerprint, twin
            job.grace = self.limits.grace_seconds if grace is None else grace
            if access is not None:
                access.requests += 1
                access.running += 1
                access.last_used = self._wall()
            self._jobs[job.id] = job
            if name:
                self._named[service, name] = job
            elif twin is not None:
                self._twins[twin] = job
            self.counts["jobs"] += 1
            service.numreq += 1
            self._count_locked(service)
            reader = self._attach_locked(job, at, news)
            self._enqueue_locked(job)
            return reader

    def has_twin(self, twin):
        """Whether there is a job that an identical prompt might be given: to be asked before
        submit, for then it matters who has hung up."""
        return twin in self._twins

    def open(self, service, name, at=None, news=None):
        """Return a Reader of a job that was submitted before. Raises RelayError."""
        with self._lock:
            job = self._named.get((service, name))
            if job is None:
                raise self._stream_unknown()
            return self._attach_locked(job, at, news)

    def read(self, reader, want=1, timeout=0.0, most=None):
        """Wait for items and return (items, ended).

        Waits up to timeout seconds until `want` items are there that this reader has
        not had, or the job has ended, or the reader is gone. Returns at most `most`
        of them; ended tells that none will follow those returned. With want None it
        waits for the end, and returns no items before.
        """
        job = reader.job
        with self._lock:
            target = math.inf if want is None else reader.at + want
            if timeout > 0:
                deadline = time.monotonic() + timeout
                while not (len(job.items) >= target
                           and (job.seen or job.state != "queued")
                           or job.ended_at is not None or reader.gone):
                    left = deadline - time.monotonic()
                    if left <= 0:
                        break
                    # Whoever brings items wakes us only when there are so many.
                    reader.wanted = target
                    reader.news.wait(left)
                reader.wanted = math.inf
            if job.ended_at is None and (want is None or job.state == "queued"
                                         and not job.seen):
                return [], False      # what nobody saw may yet be made anew
            items = job.items[reader.at:None if most is None else reader.at + most]
            if items:
                reader.at += len(items)
                job.seen = max(job.seen, reader.at)
            return items, job.ended_at is not None and reader.at >= len(job.items)

    def wait(self, reader, timeout):
        """Wait, at most so long, for what is the reader's own thread's to do: items come
        that nobody delivers, the job has ended, or the client has gone."""
        job = reader.job
        with self._lock:
            deadline = time.monotonic() + timeout
            while not (reader.behind or reader.gone or job.ended_at is not None or (
                    reader.deliver is None and len(job.items) > reader.at
                    and (job.seen or job.state != "queued"))):
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                if reader.deliver is None:
                    reader.wanted = reader.at + 1
                reader.news.wait(left)

    def deliver_by(self, reader, deliver, whole=False):
        """From now on call deliver() when items for this reader have come, or, if it wants
        the whole, when a provider said that this is the end, in the thread that brought it.
        It returns a function that sends them, or None. What it must not do itself, it
        leaves by leave_to_own."""
        with self._lock:
            reader.deliver = deliver
            reader.wanted = math.inf if whole else 0
            reader.behind = (len(reader.job.items) > reader.at    # they came before
                             or reader.job.ended_at is not None)

    def leave_to_own(self, reader):
        """Let the reader's own thread look after what could not be delivered."""
        with self._lock:
            reader.behind = True
            reader.news.notify()

    def place(self, job):
        """Where a queued job stands: position, waiting, eta_s; None if not queued."""
        with self._lock:
            if job.state != "queued":
                return None
            service = job.service
            position = service.queue.position(job)
            return {"position": position, "waiting": service.queue.size,
                    "eta_s": self._eta_locked(service, position)}

    def advance(self, reader):
        """What was read is about to be written: a client that does not count gets what
        follows next. Before the write, for it may ask again at once; leave takes it
        back if the write failed."""
        with self._lock:
            reader.job.place = max(reader.job.place, reader.at)

    def leave(self, reader, delivered=False):
        """The reader goes. delivered: the client has what was read, as far as we know."""
        with self._lock:
            self._leave_locked(reader, delivered)

    def hangup(self, reader):
        """The reader's client has hung up: wake whoever waits for it."""
        with self._lock:
            reader.gone = True
            self._leave_locked(reader, False)
            reader.news.notify()

    def cancel(self, job, error=None):
        """Stop a job, whatever it is doing; nothing happens if it has ended."""
        with self._lock:
            self._cancel_locked(job, error)

    # -- providers --

    def login(self, service, workers=1, continues=False, embeddings=False,
              context_length=None):
        """Open a session for a provider that runs up to `workers` jobs; its id."""
        with self._lock:
            if self.draining:
                raise self._shutting_down()
            if len(service.sessions) >= self.limits.max_sessions:
                raise RelayError("relay_busy", "Too many providers of %s are logged in."
                                 % service.name, retry_after=60)
            session = Session(service, workers, continues, embeddings, self._lock)
            service.context_length = context_length or service.context_length
            self._sessions[session.id] = session
            self._connect_locked(session)
            self._heard_locked(session)
            self._later_locked(self.limits.lease_seconds, self._silent_locked, session)
            return session.id

    def poll(self, service, session_id, token, running, timeout=None):
        """Wait for work; return (jobs, cancelled).

        jobs: tuples (Job, attempt, position of its next item, text so far or None).
        cancelled: tuples (job id, attempt). running: the same, of what the provider has
        in hand. A job it was given and does not name is handed out again; one it names and
        no longer has a right to is cancelled.
        token: a new Poll; if its connection breaks, call lost with it.
        Blocks up to timeout seconds (limits.poll_seconds), less if jobs are running, so
        that a silent provider is noticed within its lease.
        """
        with self._lock:
            session = self._session_locked(service, session_id)
            session.poll = token
            session.arrived.notify_all()        # an older poll of this session ends
            if session.id not in service.sessions:
                self._connect_locked(session)
            self._confirm_locked(session, set(running))
            self._fill_locked(session)
            hold = (self.limits.busy_poll_seconds if session.jobs
                    else self.limits.poll_seconds)
            if session.unconfirmed:             # one may have to be handed out again
                hold = min(hold, self.limits.handover_seconds / 2)
            hold = hold if timeout is None else min(hold, timeout)
            self._heard_locked(session, 0 if session.jobs else hold)
            try:
                self._park_locked(session, token, hold)
            finally:
                if session.poll is token:
                    session.parked = False
                    service.idle.pop(session, None)
            if session.poll is not token or token.lost:
                return [], []                   # a newer one speaks, or nobody hears this
            if session.closed:
                raise self._session_unknown()
            session.deadline = min(session.deadline,
                                   self._clock() + self.limits.lease_seconds)
            return self._hand_over_locked(session)

    def reply(self, service, session_id, entries):
        """Take items for many jobs; return (refused, jobs, cancelled), as poll does.

        Each entry is a dict: job, attempt, at (position of its first item), items,
        and done or error at the end. A repeat is dropped; refused lists gaps, with the
        position wanted, and jobs that are not, or no longer, this session's.
        """
        with self._lock:
            session = self._session_locked(service, session_id)
            self._heard_locked(session)
            refused = []
            for entry in entries:
                refusal = self._push_locked(session, entry)
                if refusal:
                    refused.append(refusal)
            self._fill_locked(session)
            answer = (refused,) + self._hand_over_locked(session)
            delivers, self._to_deliver = self._to_deliver, []
        # Some are made before the first is sent, so that a peer of many is woken once, and not
        # for each: a twelfth of the processor time of a prompt.
        for start in range(0, len(delivers), MAX_MADE_AT_ONCE):
            for send in [deliver() for deliver in delivers[start:start + MAX_MADE_AT_ONCE]]:
                if send is not None:
                    send()
        return answer

    def now(self):
        """The instant, on the clock of every time in a Job."""
        return self._clock()

    def logout(self, service, session_id):
        """End a session; its unfinished jobs go back to the front of the queue."""
        with self._lock:
            self._end_session_locked(self._session_locked(service, session_id))

    def lost(self, session_id, token):
        """The connection of the session's poll of that token has closed."""
        with self._lock:
            token.lost = True                         # also if it has yet to begin
            session = self._sessions.get(session_id)
            if session is not None and session.poll is token and not session.closed:
                session.arrived.notify_all()
                session.service.idle.pop(session, None)
                session.parked = False
                session.deadline = min(session.deadline,
                                       self._clock() + self.limits.lease_seconds)
                for job in session.unconfirmed.values():
                    job.heard_at = -math.inf          # to be handed out again at once
                self._later_locked(self.limits.close_seconds, self._broken_locked,
                                   (session, token))

    # -- time --

    def upkeep(self):
        """Do what is due at the next deadline, waiting for it; False once closed."""
        with self._lock:
            while not self.closed:
                delay = self._timers[0][0] - self._clock() if self._timers else None
                if delay is not None and delay <= 0:
                    self._expire_locked()
                    return True
                self._timer_set.wait(delay)
            return False

    def expire(self):
        """Do whatever is due now. Does not block."""
        with self._lock:
            self._expire_locked()

    def drain(self):
        """Take no new jobs and fail those that wait; running ones go on."""
        with self._lock:
            self.draining = True
            for service in self._services.values():
                self._fail_waiting_locked(service, self._shutting_down())
            for session in self._sessions.values():
                session.arrived.notify_all()

    def idle(self):
        """Whether no job is in a provider's hands."""
        with self._lock:
            return not any(session.jobs for session in self._sessions.values())

    def close(self):
        """Wake every waiter; what is unfinished ends with an error."""
        with self._lock:
            self.draining = self.closed = True
            for job in list(self._jobs.values()):
                if job.ended_at is None:
                    self._end_locked(job, "failed", self._shutting_down())
            for session in self._sessions.values():
                session.arrived.notify_all()
            self._timer_set.notify_all()

    # -- below here the lock is held --

    def _stream_unknown(self):
        return RelayError("stream_unknown", "No stream of that key is here: it ended "
                          "more than %d s ago, or the relay was restarted. Send the "
                          "prompt again with a new key." % self.limits.keep_seconds)

    def _session_unknown(self):
        return RelayError("session_unknown", "This session has ended: log in again.")

    def _shutting_down(self):
        return RelayError("shutting_down", "The relay is restarting: try again in a "
                          "few seconds.", retry_after=3)

    def _session_locked(self, service, session_id):
        session = self._sessions.get(session_id)
        if session is None or session.service is not service:
            raise self._session_unknown()
        return session

    def _model_locked(self, service):
        eta = self._eta_locked(service, service.queue.size + 1)
        model = {"name": service.name, "numreq": service.numreq,
                 "private": service.private, "paused": service.paused,
                 "connected": bool(service.sessions), "comment": service.comment,
                 "operator": service.operator, "queuelen": service.queue.size,
                 "workers": sum(s.workers for s in service.sessions.values()),
                 "running": sum(len(s.jobs) for s in service.sessions.values()),
                 "created": int(service.created)}
        if service.last_seen is not None and not service.sessions:
            model["last_seen"] = int(service.last_seen)
        if service.sessions and eta is not None:
            model["eta_s"] = 0 if service.idle else eta
        if service.context_length:
            model["context_length"] = service.context_length
        if service.anonymous_per_day is not None:
            model["anonymous_per_day"] = service.anonymous_per_day
        if service.tokens_per_second:
            model["tokens_per_s"] = round(service.tokens_per_second, 1)
        return model

    def _count_locked(self, service):
        if not self._changed:
            self.counters_changed.set()
        self._changed[service.name] = service

    def _admit_locked(self, job, rated):
        """Make room for a prompt. Raises RelayError if it cannot be accepted."""
        service, caller, own, access = job.service, job.caller, job.own, job.access
        if self.draining:
            raise self._shutting_down()
        if service.paused and not own:
            raise RelayError("service_paused", "%s is paused by its operator: try again "
                             "later." % service.name, retry_after=60, retry=False)
        if access is not None:
            self._check_quota_locked(access)
        if not (service.sessions or job.wait or self._clock() < service.expected_until):
            raise self._offline(service)
        mine = service.queue.count(caller, own)
        if service.queue.size >= self.limits.max_queue:
            raise RelayError("queue_full", "%d prompts wait for %s already: try again "
                             "later." % (service.queue.size, service.name),
                             retry_after=self._retry_after_locked(service))
        if mine >= self.limits.max_queue_per_caller:
            raise RelayError("rate_limited", "You have %d prompts waiting for %s: let "
                             "some be answered first." % (mine, service.name),
                             retry_after=self._retry_after_locked(service),
                             limit=self.limits.max_queue_per_caller)
        size = JOB_BYTES + len(job.payload)
        if self._held_by.get(job.holder, 0) + size > self.limits.max_held_bytes // 4:
            raise RelayError("rate_limited", "Your prompts and their answers take a quarter "
                             "of the relay's memory: let some be answered first.",
                             retry_after=10)
        if not self._make_room_locked(size, job.holder):
            raise self._memory_full()
        if rated and not own:
            self._rates.take(caller, self.limits.max_prompts_per_minute, 60, "prompts")
        if access is None and not own and (rated or service.anonymous_per_day):
            self._daily.take(
                (service.name, caller),
                service.anonymous_per_day or self.limits.max_anonymous_per_day,
                DAY_SECONDS, "prompts without an access key", "quota_exceeded")
        self._hold_locked(job, size)

    def _memory_full(self):
        return RelayError("relay_busy", "The relay's memory is full: try again later.",
                          retry_after=10)

    def _make_room_locked(self, size, holder):
        """Whether so many bytes more can be held, if need be at the cost of the streams
        that ended longest ago, then of the largest prompts of whoever holds most, if that
        is twice what this holder would have."""
        most = self.limits.max_held_bytes - size
        while self._held > most and self._kept:
            self._forget_locked(next(iter(self._kept.values())))
        while self._held > most:
            largest = max(self._held_by, key=self._held_by.get)
            job = max((job for job in self._jobs.values() if job.holder == largest),
                      key=lambda job: job.size)
            if job.size <= JOB_BYTES or self._held_by[largest] < 2 * (
                    self._held_by.get(holder, 0) + size):
                return False
            self._cancel_locked(job, self._memory_full())
            if job.id in self._jobs:
                self._drop_locked(job)
        return True

    def _drop_locked(self, job):
        """Hold no more of a job than its error, which somebody has still to read."""
        # Also if it had ended well. First the error: _make_whole takes the items without
        # the lock, and looks for it then.
        job.error = job.error or self._memory_full()
        self._hold_locked(job, JOB_BYTES - job.size)
        job.payload, job.items = b"", []

    def _check_quota_locked(self, access):
        now = self._wall()
        if access.expires is not None and now >= access.expires:
            raise RelayError("invalid_key", "This access key expired on %s." %
                             time.strftime("%Y-%m-%d", time.gmtime(access.expires)))
        if access.day != now // DAY_SECONDS:
            access.day, access.requests, access.tokens = now // DAY_SECONDS, 0, 0
        left = DAY_SECONDS - now % DAY_SECONDS
        for used, limit, what in (
                (access.requests, access.requests_per_day, "requests"),
                (access.tokens, access.tokens_per_day, "tokens")):
            if limit is not None and used >= limit:
                raise RelayError("quota_exceeded", "The %d %s a day of this access key "
                                 "are used up; they are renewed at midnight UTC, in %d "
                                 "minutes." % (limit, what, left // 60 + 1),
                                 retry_after=left)
        if access.concurrency is not None and access.running >= access.concurrency:
            raise RelayError("rate_limited", "This access key allows %d prompts at once: "
                             "wait for an answer." % access.concurrency, retry_after=2,
                             limit=access.concurrency)

    def _hold_locked(self, job, size):
        """Count bytes that a job takes from now on, or, below zero, no more."""
        job.size += size
        self._held += size
        self._held_by[job.holder] += size

    def _retry_after_locked(self, service):
        eta = self._eta_locked(service, service.queue.size)
        return 10 if eta is None else min(max(math.ceil(eta), 1), 120)

    def _offline(self, service):
        # One that has just gone may be starting again. Waiting for any other is for a
        # person to decide: OpenAI's clients would sit Retry-After out twice, in silence.
        just_gone = service.last_seen is not None and \
            self._wall() - service.last_seen < JUST_GONE_SECONDS
        since = "" if service.last_seen is None else " since %s UTC" % time.strftime(
            "%Y-%m-%d %H:%M", time.gmtime(service.last_seen))
        return RelayError("service_offline", "No provider of %s is connected%s. Try "
                          "again later, or send \"wait\": true to queue." % (
                              service.name, since),
                          retry_after=5 if just_gone else 30, retry=just_gone)

    def _attach_locked(self, job, at, news):
        job.left_at = None
        reader = Reader(job, job.place if at is None else min(at, len(job.items)),
                        news or self.condition())
        job.readers.append(reader)
        return reader

    def _leave_locked(self, reader, delivered):
        if not reader.attached:
            return
        reader.attached = False
        job = reader.job
        job.readers.remove(reader)
        if not delivered and job.place == reader.at:
            job.place = reader.start
        if job.readers:
            return
        if job.ended_at is not None and job.name is None and delivered:
            self._forget_locked(job)
        elif job.ended_at is None and job.grace <= 0:
            self._cancel_locked(job, None)
        elif job.id in self._jobs:
            job.left_at = self._clock()
            if job.twin is not None:
                self._twins[job.twin] = job
            self._check_later_locked(job)

    def _move_locked(self, job, state):
        if state not in MOVES[job.state]:
            raise AssertionError("job %s cannot go from %s to %s" % (
                job.id, job.state, state))
        job.state = state

    # A job is in its service's queue exactly while it is "queued".

    def _enqueue_locked(self, job):
        service = job.service
        service.queue.add(job)
        if service.idle:
            self._dispatch_locked(service)
        elif not service.sessions:
            self._later_locked(self.limits.offline_seconds, self._deserted_locked, service)

    def _eta_locked(self, service, position):
        workers = sum(s.workers for s in service.sessions.values())
        if service.job_seconds is None or not workers:
            return None
        return round(service.job_seconds * position / workers, 1)

    def _fail_waiting_locked(self, service, error):
        for job in list(service.queue):
            self._end_locked(job, "failed", error)

    # Leases.

    def _dispatch_locked(self, service):
        """Give waiting jobs to sessions with a parked poll, which take turns."""
        while service.queue.size:
            for session in service.idle:
                job = service.queue.take(session)
                if job is not None:
                    break
            else:
                return
            self._lease_locked(job, session)
            service.idle.pop(session)
            self._idle_locked(session)
            session.arrived.notify()

    def _park_locked(self, session, token, timeout):
        """Wait until this poll has something to tell, or a newer one has come."""
        deadline = time.monotonic() + timeout
        while not (session.outbox or session.cancels or session.closed
                   or self.closed or session.poll is not token or token.lost):
            if self.draining and not session.jobs:
                raise self._shutting_down()
            left = deadline - time.monotonic()
            if left <= 0:
                return
            session.parked = True
            self._idle_locked(session)
            session.arrived.wait(left)

    def _fill_locked(self, session):
        """Lease it jobs for its free workers, to go with the response being made."""
        connected = session.id in session.service.sessions
        room = MAX_HANDOVER_BYTES
        while connected and session.free() > 0 and not self.draining and room > 0:
            job = session.service.queue.take(session)
            if job is None:
                break
            self._lease_locked(job, session)
            room -= len(job.payload)
        self._idle_locked(session)

    def _idle_locked(self, session):
        if session.parked and session.free() > 0 and not session.closed:
            session.service.idle.setdefault(session)
        else:
            session.service.idle.pop(session, None)

    def _lease_locked(self, job, session):
        self._move_locked(job, "leased")
        if job.items and not job.seen:                # this one starts afresh
            self._hold_locked(job, JOB_BYTES + len(job.payload) - job.size)
            job.first_at = None
            job.items.clear()
        job.attempt += 1
        job.session = session
        if job.leased_at is None:
            job.leased_at = self._clock()
        session.jobs[job.id] = job
        session.outbox.append(job)

    def _hand_over_locked(self, session):
        jobs, session.outbox = session.outbox, []
        cancels, session.cancels = list(session.cancels), {}
        for job in jobs:
            self._await_word_locked(session, job)
        return [(job, job.attempt, len(job.items), self._text_locked(job))
                for job in jobs], cancels

    def _await_word_locked(self, session, job):
        """The provider must be heard of this job soon, or another gets it."""
        job.heard_at = self._clock()
        session.unconfirmed[job.id] = job
        if not session.watching_handover:
            session.watching_handover = True
            self._later_locked(self.limits.handover_seconds, self._unconfirmed_locked,
                               session)

    def _text_locked(self, job):
        """The text so far of a job that goes on with another provider, else None."""
        if not job.items:
            return None
        return "".join(item for item in job.items if type(item) is str)

    def _confirm_locked(self, session, running):
        """Compare what the provider has in hand with what we think it has."""
        now = self._clock()
        for job_id, attempt in running:
            job = session.jobs.get(job_id)
            if job is not None and job.attempt == attempt:
                job.heard_at = now
                session.unconfirmed.pop(job_id, None)
                if job in session.outbox:
                    session.outbox.remove(job)
            elif (job_id, attempt) in session.last_words:
                pass                       # the reply that ended it overtook this poll
            elif not self._reclaim_locked(session, job_id, attempt):
                # Say it again only if the response that said it may have been lost.
                told = session.cancelling.setdefault((job_id, attempt), -math.inf)
                if now - told >= self.limits.handover_seconds / 2:
                    self._tell_cancelled_locked(session, (job_id, attempt))
        for pair in set(session.cancelling) - running - set(session.cancels):
            del session.cancelling[pair]
        for job in list(session.jobs.values()):
            # What was handed over just now, or is being answered just now, may have
            # crossed this poll on its way.
            if (job.id, job.attempt) in running or job in session.outbox \
                    or now - job.heard_at < self.limits.handover_seconds / 5:
                continue
            if not job.items or session.continues:
                session.unconfirmed.pop(job.id, None)
                session.outbox.append(job)            # it never got there
            elif job.id not in session.unconfirmed:
                # It was begun there, and would be begun again behind what we have.
                self._await_word_locked(session, job)

    def _tell_cancelled_locked(self, session, pair):
        session.cancelling[pair] = self._clock()
        session.cancels[pair] = True
        session.arrived.notify()

    def _reclaim_locked(self, session, job_id, attempt, at=0):
        """Give a job back that was taken when its provider seemed to be gone, if it can
        go on from item `at`; the job, or None."""
        job = self._jobs.get(job_id)
        if (job is None or job.state != "queued" or job.attempt != attempt
                or job.service is not session.service or at > len(job.items)):
            return None
        job.service.queue.remove(job)
        self._move_locked(job, "leased")
        job.deaths, job.heard_at = max(0, job.deaths - 1), self._clock()
        job.session, session.jobs[job_id] = session, job
        return job

    def _push_locked(self, session, entry):
        """Add one entry's items to its job; a refusal as a dict, or None."""
        job_id, attempt, at = entry["job"], entry["attempt"], entry["at"]
        # Or the first word of a provider that seemed to be gone, before its next poll.
        job = session.jobs.get(job_id) or self._reclaim_locked(session, job_id, attempt, at)
        ending = entry.get("done") or entry.get("error")
        if ending:
            session.last_words[job_id, attempt] = True
            if len(session.last_words) > MAX_LAST_WORDS:
                session.last_words.popitem(last=False)
        if job is None or job.attempt != attempt:
            if ending:
                session.cancelling.pop((job_id, attempt), None)
            return {"job": job_id, "error": "fenced"}
        job.heard_at = self._clock()
        session.unconfirmed.pop(job_id, None)
        have, items = len(job.items), entry.get("items", ())
        if at > have:
            return {"job": job_id, "error": "gap", "at": have}
        if at < have:
            items = items[have - at:]      # we have the others already
        if items:
            size = size_of(items)
            error = None
            if job.size + size > self.limits.max_reply_bytes + len(job.payload):
                error = RelayError("reply_too_large", "The reply is larger than %d bytes."
                                   % self.limits.max_reply_bytes)
            elif not self._make_room_locked(size, job.holder):
                error = self._memory_full()
            if error is not None:
                self._cancel_locked(job, error)
                return {"job": job_id, "error": "fenced"}
            self._hold_locked(job, size)
            self.counts["tokens"] += len(items)
            if not have:
                job.first_at = job.heard_at
            job.items.extend(items)
        for reader in job.readers:
            if ending or len(job.items) >= reader.wanted:
                if reader.deliver is not None:
                    self._to_deliver.append(reader.deliver)
                elif not ending:           # else _end_locked does it
                    reader.wanted = math.inf
                    reader.news.notify()
        if entry.get("error"):
            self._end_locked(job, "failed", entry["error"])
        elif ending:
            self._end_locked(job, "done")
        return None

    def _end_locked(self, job, state, error=None):
        if job.state == "queued":
            job.service.queue.remove(job)
        self._move_locked(job, state)
        job.ended_at, job.error = self._clock(), error
        self.counts[state] += 1
        session = job.session
        if session is not None:
            session.jobs.pop(job.id, None)
            session.unconfirmed.pop(job.id, None)
        if job.access is not None:
            job.access.running -= 1
            job.access.tokens += len(job.items)
            self._count_locked(job.service)
        if state == "done":
            self._measure_locked(job)
        for reader in job.readers:
            if reader.deliver is None or not reader.wanted:    # else it waits elsewhere
                reader.news.notify()
        if state != "done" and type(job.name) is tuple:
            # What failed, or was cancelled since its client stayed away for too long, is
            # not the answer to an Idempotency-Key: asking again may try again. A stream
            # key names this one stream, whatever became of it.
            self._named.pop((job.service, job.name), None)
            job.name = None
        if job.name is not None:
            self._kept[job.id] = job
            self._check_later_locked(job)
        elif not job.readers and (state != "done" or job.twin is None):
            self._forget_locked(job)

    def _measure_locked(self, job):
        queued, first, answered = self.histograms.values()
        queued.observe(job.leased_at - job.created)
        first.observe((job.first_at or job.ended_at) - job.created)
        answered.observe(job.ended_at - job.created)
        service, took = job.service, job.ended_at - job.leased_at
        old = service.job_seconds
        service.job_seconds = took if old is None else 0.8 * old + 0.2 * took
        if len(job.items) > 8 and job.ended_at - job.first_at > 0.05:
            rate = (len(job.items) - 1) / (job.ended_at - job.first_at)
            old = service.tokens_per_second
            service.tokens_per_second = rate if old is None else 0.8 * old + 0.2 * rate

    def _cancel_locked(self, job, error):
        if job.ended_at is not None:
            return
        session = job.session if job.state == "leased" else None
        if session is not None:
            if job in session.outbox:
                session.outbox.remove(job)            # it never got there
            else:
                self._tell_cancelled_locked(session, (job.id, job.attempt))
        error = error or RelayError("cancelled", "This request was cancelled.")
        self._end_locked(job, "failed" if error.name != "cancelled" else "cancelled",
                         error)
        if session is not None:
            self._idle_locked(session)
            self._dispatch_locked(session.service)

    def _forget_locked(self, job):
        if self._jobs.pop(job.id, None) is None:
            return
        self._hold_locked(job, -job.size)
        if not self._held_by[job.holder]:
            del self._held_by[job.holder]
        self._kept.pop(job.id, None)
        if job.name is not None:
            self._named.pop((job.service, job.name), None)
        if self._twins.get(job.twin) is job:
            del self._twins[job.twin]

    # Sessions that come and go.

    def _connect_locked(self, session):
        session.service.sessions[session.id] = session
        session.service.last_seen = self._wall()
        self._count_locked(session.service)

    def _disconnect_locked(self, session):
        """Not connected any more: no new jobs, and the directory says so."""
        service = session.service
        service.idle.pop(session, None)
        if service.sessions.pop(session.id, None) is None:
            return
        service.last_seen = self._wall()
        self._count_locked(service)
        if service.queue.size and not any(s.continues for s in service.sessions.values()):
            self._later_locked(self.limits.offline_seconds, self._deserted_locked, service)
        self._dispatch_locked(service)     # what this one should have had, others may

    def _heard_locked(self, session, hold=0.0):
        session.deadline = self._clock() + hold + self.limits.lease_seconds

    def _release_locked(self, job, died):
        """Take a job from its session: back to the queue, or to its end."""
        session, service = job.session, job.service
        session.jobs.pop(job.id, None)
        session.unconfirmed.pop(job.id, None)
        if job in session.outbox:                     # it was never handed out
            session.outbox.remove(job)
            job.attempt, died = job.attempt - 1, False
        job.session = None
        job.deaths += died
        if job.deaths >= MAX_DEATHS_PER_JOB or job.attempt >= MAX_SESSIONS_PER_JOB:
            error = RelayError("provider_lost", "%d providers of %s went away while "
                               "they worked on this prompt." % (job.attempt, service.name))
        elif job.seen and not (
                # What is not text, a tool call half made, cannot be handed on.
                all(type(item) is str for item in job.items)
                and any(s.continues for s in service.sessions.values()
                        if s is not session)):
            error = self._lost_amid(service)
        elif self.draining:
            error = self._shutting_down()
        else:
            self._move_locked(job, "queued")
            self.counts["requeued"] += 1
            job.avoid = session
            job.returned = True
            self._enqueue_locked(job)
            return
        self._end_locked(job, "failed", error)

    def _end_sessions_locked(self, service):
        for session in [s for s in self._sessions.values() if s.service is service]:
            self._end_session_locked(session)

    def _end_session_locked(self, session, died=False):
        self._sessions.pop(session.id, None)
        session.closed = True
        self._disconnect_locked(session)
        for job in reversed(list(session.jobs.values())):   # the oldest ends up first
            self._release_locked(job, died)
        session.arrived.notify_all()

    # Timers: each of these looks at the facts again, for they may have changed.

    def _later_locked(self, delay, method, argument):
        deadline = self._clock() + delay
        if not self._timers or deadline < self._timers[0][0]:
            self._timer_set.notify()
        heapq.heappush(self._timers, (deadline, next(self._numbers), method, argument))

    def _expire_locked(self):
        while self._timers and self._timers[0][0] <= self._clock():
            _, _, method, argument = heapq.heappop(self._timers)
            method(argument)

    def _check_later_locked(self, job):
        if not job.timer:
            job.timer = True
            self._check_job_locked(job)

    def _check_job_locked(self, job):
        """Cancel a job that nobody came back for; forget one kept long enough."""
        job.timer = False
        if job.id not in self._jobs:
            return
        now = self._clock()
        if job.ended_at is not None:
            since = max(job.ended_at, job.left_at or 0)
            due = since + (self.limits.keep_seconds if job.name else job.grace)
        elif job.left_at is not None:
            due = job.left_at + job.grace
        else:
            return
        if due > now or job.readers:
            job.timer = True
            self._later_locked(max(due - now, 1), self._check_job_locked, job)
        elif job.ended_at is not None:
            self._forget_locked(job)
        else:
            self._cancel_locked(job, None)

    def _silent_locked(self, session):
        """Once per session and lease: is its provider still heard of?"""
        if session.closed:
            return
        left = session.deadline - self._clock()
        if left > 0:
            self._later_locked(left, self._silent_locked, session)
        else:
            self._end_session_locked(session, died=True)

    def _broken_locked(self, argument):
        """Some time after a poll's connection broke: did the provider poll again?"""
        session, token = argument
        if session.closed or session.poll is not token:
            return
        self._disconnect_locked(session)
        # What a client has seen the start of waits out the lease: a provider that
        # only lost its connection comes back, and goes on where it was.
        for job in reversed(list(session.jobs.values())):
            if not job.seen:
                self._release_locked(job, died=True)

    def _unconfirmed_locked(self, session):
        """Were the jobs handed over some time ago heard of since?"""
        session.watching_handover = False
        now = self._clock()
        while session.unconfirmed and not session.closed:
            job = next(iter(session.unconfirmed.values()))
            left = job.heard_at + self.limits.handover_seconds - now
            if left > 0:
                session.watching_handover = True
                self._later_locked(left, self._unconfirmed_locked, session)
                return
            self._release_locked(job, died=False)

    def _deserted_locked(self, service):
        """Some time after the last provider left, or the last that can go on with an
        answer that another began: did one come back?"""
        if any(s.continues for s in service.sessions.values()):
            return
        for job in list(service.queue):
            if job.seen:
                self._end_locked(job, "failed", self._lost_amid(service))
            elif not service.sessions and not job.wait:
                self._end_locked(job, "failed", self._offline(service))

    def _lost_amid(self, service):
        return RelayError("provider_lost", "The provider of %s went away in the middle of "
                          "this answer. Ask again." % service.name)


def size_of(items):
    """Roughly the bytes that these items hold."""
    text = "".join(map(str, items))
    return ITEM_BYTES * len(items) + len(text) * (1 if text.isascii() else 4)


def invalid_name_words(name):
    """Say why a service cannot have this name."""
    if name.lower() in RESERVED_NAMES:
        return "%s is one of the relay's own words, so no service has it." % name
    return ("A service name is 1 to 64 of letters, digits, '.', '_' and '-', and begins "
            "with a letter or digit.")


##############################################################################
# Store: what survives a restart. Services, hashes of keys, counters; no prompts.
##############################################################################

MIGRATIONS = (   # user_version counts those that the file has been through
    ("""CREATE TABLE services (
            name TEXT PRIMARY KEY COLLATE NOCASE, key_digest TEXT NOT NULL,
            operator TEXT NOT NULL, comment TEXT NOT NULL, created REAL NOT NULL,
            numreq INTEGER NOT NULL, last_seen REAL,
            private INTEGER NOT NULL, paused INTEGER NOT NULL)""",
     """CREATE TABLE keys (
            service TEXT NOT NULL COLLATE NOCASE REFERENCES services ON DELETE CASCADE,
            id TEXT PRIMARY KEY, digest TEXT NOT NULL, label TEXT NOT NULL,
            created REAL NOT NULL, requests_per_day INTEGER, tokens_per_day INTEGER,
            concurrency INTEGER, max_new_len INTEGER, expires REAL,
            day INTEGER, requests INTEGER, tokens INTEGER, last_used REAL)"""),
    ("ALTER TABLE services ADD COLUMN anonymous_per_day INTEGER",
     """CREATE TABLE invitations (
            digest TEXT PRIMARY KEY, uses INTEGER NOT NULL, created REAL NOT NULL)"""),
)


class StoreError(Exception):
    """The data file cannot be used; the words say why and what to do."""


class Store:
    """The services in an SQLite file (write-ahead log), or in memory: ":memory:"."""

    def __init__(self, path, existing=False):
        """existing: neither make the file nor migrate it, as a relay may be using it."""
        self._lock = threading.Lock()      # one connection, one statement at a time
        try:
            if path != ":memory:":         # private from its first moment on
                os.close(os.open(path, os.O_RDWR | (0 if existing else os.O_CREAT), 0o600))
            self._db = sqlite3.connect(path, timeout=5, isolation_level=None,
                                       check_same_thread=False)
            self.version = self._value("PRAGMA user_version")
            if self.version > len(MIGRATIONS):
                raise StoreError("The data file %s is of a newer neuroengine: use that "
                                 "version, or name another file with --data." % path)
            damage = self._value("PRAGMA quick_check")
            if damage != "ok":
                raise sqlite3.DatabaseError(damage.replace("\n", " "))
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")   # keys outlive a power cut
            self._db.execute("PRAGMA foreign_keys=ON")
            if not existing:
                self._migrate()
        except sqlite3.OperationalError as error:     # as the two below, but it may pass
            raise StoreError("The data file %s cannot be used: %s." % (path, error))
        except sqlite3.DatabaseError as error:
            raise StoreError("The data file %s is damaged, or no data file: %s. Put a "
                             "backup in its place." % (path, error))
        except OSError as error:
            raise StoreError("The data file %s cannot be used: %s. Another can be named "
                             "with --data." % (path, error.strerror))

    def _value(self, statement):
        return self._db.execute(statement).fetchone()[0]

    def _migrate(self):
        for version in range(self.version, len(MIGRATIONS)):
            with self._transaction():
                if self._value("PRAGMA user_version") == version:   # else another did it
                    for statement in MIGRATIONS[version]:
                        self._db.execute(statement)
                    self._db.execute("PRAGMA user_version=%d" % (version + 1))
        self.version = len(MIGRATIONS)

    @contextlib.contextmanager
    def _transaction(self):
        with self._lock:
            if self._db.in_transaction:    # even the roll-back failed
                self._db.execute("ROLLBACK")
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def load(self):
        """Return every Service of the file, with its access keys."""
        with self._lock:
            services = {row[0]: Service(*row) for row in self._db.execute(
                "SELECT %s FROM services" % ", ".join(Service.COLUMNS)).fetchall()}
            for row in self._db.execute("SELECT service, %s FROM keys" % ", ".join(
                    AccessKey.COLUMNS)):
                key = AccessKey(*row[1:])
                services[row[0]].keys[key.digest] = key
        for service in services.values():
            service.stored = True
        return list(services.values())

    def changes(self):
        """A number that changes when another process has written to the file."""
        with self._lock:
            return self._value("PRAGMA data_version")

    def add(self, service, invitation=None):
        """Write a new service; it is on the disk when this returns.

        invitation: the hash of one to be used up for it. Raises RelayError if it is
        unknown or used up."""
        with self._transaction():
            if invitation is not None and not self._db.execute(
                    "UPDATE invitations SET uses=uses-1 WHERE digest=? AND uses>0",
                    (invitation,)).rowcount:
                raise RelayError("invitation_needed", "A new service needs an invitation "
                                 "here, and this is none, or it is used up: ask whoever "
                                 "runs the relay for one, and give it as \"invitation\".",
                                 param="invitation")
            self._db.execute(
                "INSERT INTO services (%s) VALUES (?%s)" % (
                    ", ".join(Service.COLUMNS), ", ?" * (len(Service.COLUMNS) - 1)),
                [getattr(service, name) for name in Service.COLUMNS])
        service.stored = True

    def invite(self, invitation, uses):
        """Write an invitation, by its hash, to register so many services."""
        with self._transaction():
            self._db.execute("INSERT INTO invitations VALUES (?, ?, ?)",
                             (invitation, uses, time.time()))

    def change(self, service, **columns):
        """Write new values of a service's columns."""
        with self._transaction():
            self._db.execute(
                "UPDATE services SET %s WHERE name=? AND created=?" % ", ".join(
                    name + "=?" for name in columns),
                [*columns.values(), service.name, service.created])

    def save(self, services):
        """Write what these services and their keys have counted, in one transaction. And
        no more than that: the rest may have been changed there, by another process."""
        with self._transaction():
            self._db.executemany(
                "UPDATE services SET numreq=?, last_seen=? WHERE name=? AND created=?",
                [(s.numreq, s.last_seen, s.name, s.created) for s in services])
            used = [(k, (k.day, k.requests, k.tokens, k.last_used))
                    for s in services for k in list(s.keys.values())]
            used = [(key, use) for key, use in used if key.written != use]
            self._db.executemany(
                "UPDATE keys SET day=?, requests=?, tokens=?, last_used=? WHERE id=?",
                [use + (key.id,) for key, use in used])
        for key, use in used:
            key.written = use

    def add_key(self, service, key):
        """Write a new access key."""
        with self._transaction():
            self._db.execute(
                "INSERT INTO keys VALUES (?%s)" % (", ?" * len(AccessKey.COLUMNS)),
                [service.name] + [getattr(key, name) for name in AccessKey.COLUMNS])

    def remove_key(self, key):
        """Delete an access key."""
        with self._transaction():
            self._db.execute("DELETE FROM keys WHERE id=?", (key.id,))

    def remove(self, service):
        """Delete a service."""
        with self._transaction():
            self._db.execute("DELETE FROM services WHERE name=? AND created=?",
                             (service.name, service.created))

    def backup(self, path):
        """Copy everything to a new file, while others write. Raises OSError, sqlite3.Error."""
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        try:
            with contextlib.closing(sqlite3.connect(path)) as copy, self._lock:
                self._db.backup(copy)
                copy.execute("PRAGMA journal_mode=DELETE")   # one file, with all in it
        except BaseException:
            os.remove(path)
            raise

    def close(self):
        """Close the file."""
        with self._lock:
            self._db.close()


def new_key():
    """A service key: 256 random bits, with a prefix that scanners recognise."""
    return "ne_" + secrets.token_urlsafe(32)


def digest(key):
    """What is stored of a key. Plain SHA-256 is right for random keys of 256 bits."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


##############################################################################
# HTTP: the reader of requests (RFC 9112, strictly)
##############################################################################

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_REQUEST_LINE = re.compile(r"(" + _TOKEN + r") ([\x21-\x7e]{1,8192}) HTTP/1\.([01])\r\n")
# Control characters, a bare CR or LF, white space before the colon and folded lines
# all fail to match: each of them has been used to smuggle requests past proxies.
_FIELD = re.compile(r"(" + _TOKEN + r"):([\t\x20-\x7e\x80-\xff]*)\r\n")
_FIELDS = re.compile(r"(?:" + _FIELD.pattern + r")*\Z")
_ONCE = frozenset(("host", "content-length", "transfer-encoding", "authorization",
                   "content-type", "content-encoding", "expect", "idempotency-key"))
_HOST = re.compile(r"[A-Za-z0-9.:_\[\]-]*\Z")
_LENGTH = re.compile(rb"\r\ncontent-length: ([0-9]{1,15})\r\n", re.I)
MSG_DONTWAIT = getattr(socket, "MSG_DONTWAIT", 0)    # Windows has none
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[\t\x20-\x7e\x80-\xff]{0,256})?\Z")


class Head:
    """The request line and headers of one request."""

    __slots__ = ("method", "target", "path", "version", "fields", "length", "keep_alive",
                 "hashed")                 # of the key that it came with, or ""


def parse_head(data):
    """Parse a request's head, from its first byte to the CRLF before the blank line.

    data: bytes. Returns a Head, whose length is the body's: a number of bytes, or None
    for a chunked one. Raises RelayError for whatever RFC 9112 does not allow, and for
    what it allows but two readers could understand differently.
    """
    text = data.decode("latin-1")
    match = _REQUEST_LINE.match(text)
    if not match:
        raise RelayError("bad_http", "That is not an HTTP/1.1 request line.")
    head = Head()
    head.method, head.target, version = match.groups()
    if not _FIELDS.match(text, match.end()):
        raise RelayError("bad_http", "A header of this request is malformed.")
    found = _FIELD.findall(text, match.end())
    if len(found) > MAX_FIELDS:
        raise RelayError("bad_http", "This request has too many headers.")
    head.version, head.fields = int(version), {}
    fields = head.fields
    for name, value in found:
        name, value = name.lower(), value.strip(" \t")
        if name not in fields:
            fields[name] = value
        elif name in _ONCE:
            raise RelayError("bad_http", "The header %s stands here twice." % name)
        else:
            fields[name] += ", " + value
    if head.version and "host" not in fields or not _HOST.match(fields.get("host", "")):
        raise RelayError("bad_http", "A request names the relay in one Host header.")
    head.path = _path_of(head.target)
    key = _key_of(fields)
    head.hashed = digest(key) if key else ""
    head.length = _length_of(head)
    options = fields.get("connection", "").lower()
    head.keep_alive = bool(head.version) and not (
        options and "close" in [option.strip() for option in options.split(",")])
    return head


@functools.lru_cache(maxsize=MAX_PATHS_KNOWN)
def _path_of(target):
    """The decoded path, as a tuple of its segments; empty ones do not count."""
    if target[0] != "/":
        if target == "*":
            return ()
        _, found, rest = target.partition("://")     # the absolute form
        if not found:
            raise RelayError("bad_http", "The request's target is not a path.")
        target = "/" + rest.partition("/")[2]
    path = target.partition("?")[0]
    if "%" in path:
        path = urllib.parse.unquote(path)
    return tuple(filter(None, path.split("/")))


def _key_of(fields):
    scheme, _, key = fields.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return key.strip()
    return fields.get("api-key") or fields.get("x-api-key")


def _length_of(head):
    length, coding = (head.fields.get("content-length"),
                      head.fields.get("transfer-encoding"))
    if coding is not None:
        if length is not None or not head.version or coding.lower() != "chunked":
            raise RelayError("bad_http", "This request's length is ambiguous: send "
                             "either Content-Length or Transfer-Encoding: chunked.")
        return None
    if length is None:
        if head.method in ("POST", "PUT", "PATCH"):
            raise RelayError("length_required", "Send the body's Content-Length.")
        return 0
    if not (1 <= len(length) <= 15 and length.isascii() and length.isdigit()):
        raise RelayError("bad_http", "The Content-Length is not a number.")
    return int(length)


class Tls:
    """The server's side of TLS as a codec: bytes in, bytes out, no socket. So one thread
    can send while another waits for what the peer sends: a fifth more requests a second
    than with an SSLSocket, which is for one thread at a time."""

    RECORD_BYTES = 16384                   # the most that one holds (RFC 8446, 5.1)

    def __init__(self, context):
        self._lock = threading.Lock()
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)

    def shake_hands(self, data):
        """Take the peer's bytes; return (whether hands are shaken, bytes for the peer)."""
        self._incoming.write(data)
        try:
            self._tls.do_handshake()
            return True, self._outgoing.read()
        except ssl.SSLWantReadError:
            return False, self._outgoing.read()

    def decrypt(self, data):
        """Take the peer's bytes; return what they say, b"" if no record is complete."""
        parts = []
        with self._lock:
            self._incoming.write(data)
            try:
                while not parts or self._incoming.pending:
                    parts.append(self._tls.read(self.RECORD_BYTES))
                    if not parts[-1]:      # close_notify
                        break
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError:
                raise PeerGone()
            # Who only makes us answer on TLS's own level, to renegotiate, means no good.
            if parts == [b""] or self._outgoing.pending > self.RECORD_BYTES:
                raise PeerGone()
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def encrypt(self, data):
        """Return the bytes that say this to the peer, after those encrypted before."""
        parts = []
        with self._lock:
            try:
                for start in range(0, len(data), self.RECORD_BYTES):
                    self._tls.write(data[start:start + self.RECORD_BYTES])
                    parts.append(self._outgoing.read())
            except ssl.SSLError:           # the peer has sent nonsense meanwhile
                raise PeerGone()
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def farewell(self):
        """Return the bytes for the peer that there are still: an alert, or close_notify."""
        with self._lock:
            with contextlib.suppress(ssl.SSLError):
                self._tls.unwrap()
            return self._outgoing.read()


class Wire:
    """Bytes in and out of one connection, each wait under a deadline.

    One thread reads and one writes at a time; they need not be the same.
    """

    def __init__(self, sock, limits, count=None, tls=None):
        """count: called with the number of each body's bytes as they come. tls: an
        ssl.SSLContext, if the peer is to speak TLS."""
        self.sock, self._limits, self._count = sock, limits, count
        self.tls = Tls(tls) if tls else None
        self._counting = False
        self._buffer = b""
        self.unsent = b""                  # of send_now
        self._limited = {}                 # option -> seconds
        # The kernel's own time limits save a poll() for each call, and with it a time at
        # which the interpreter lock may go to another thread.
        self.by_kernel = os.name == "posix"
        if self.by_kernel:
            sock.settimeout(None)
        self.last_head = b""               # as it came, also if it was malformed
        self._around = None                # the same, without the number of its length
        self._head = None                  # the same, parsed
        self.gone = False                  # the peer has hung up, as the Watcher saw
        self.on_gone = None                # see when_gone; the last write takes it back

    def fileno(self):
        return self.sock.fileno()

    def shake_hands(self, seconds):
        """Agree with the peer on TLS, if that is spoken here. Raises PeerGone.

        A peer that does not begin with a TLS record is taken to speak plain HTTP: tls is
        None then, and it can be told where to go.
        """
        if self.tls is None:
            return
        deadline = time.monotonic() + seconds
        try:
            data = self._receive_some(seconds)
            if data[:1] != b"\x16":        # handshake (RFC 8446, 5.1)
                self._buffer, self.tls = data, None
                return
            while True:
                done, answer = self.tls.shake_hands(data)
                self._send(answer)
                if done:
                    break
                data = self._receive_some(deadline - time.monotonic())
            self._buffer = self.tls.decrypt(b"")     # what came with the last of it
        except OSError:                    # too late, or no TLS that we speak
            self.say_goodbye()
            raise PeerGone()

    def _receive_some(self, seconds):
        """Return what comes within so many seconds, as it came. Raises PeerGone."""
        if seconds <= 0:
            raise socket.timeout()
        self._limit(socket.SO_RCVTIMEO, seconds)
        try:
            # With TLS less, because OpenSSL keeps the memory that it once used.
            data = self.sock.recv(65536 if self.tls is None else 16384)
        except (socket.timeout, BlockingIOError):
            raise socket.timeout()
        except OSError:                    # reset, unreachable
            data = b""
        if not data:
            raise PeerGone()
        return data

    def _receive(self, seconds):
        """Add what comes within so many seconds to the buffer. Raises PeerGone."""
        data = self._receive_some(seconds)
        if self.tls is not None:
            deadline = time.monotonic() + seconds
            data = self.tls.decrypt(data)
            while not data:                # a part of a record, or TLS's own matters
                data = self.tls.decrypt(self._receive_some(deadline - time.monotonic()))
        if self._counting:
            self._count(len(data))
        self._buffer = self._buffer + data if self._buffer else data

    def _limit(self, option, seconds):
        """Let each call of that direction take no longer."""
        if not self.by_kernel:
            option = None
        if self._limited.get(option) == seconds:
            return
        self._limited[option] = seconds
        try:
            if self.by_kernel:
                return self.sock.setsockopt(socket.SOL_SOCKET, option, struct.pack(
                    "ll", int(seconds), max(1, int(seconds % 1 * 1e6))))
        except OSError:                    # a system whose time is longer than its long
            self.by_kernel = False
        self.sock.settimeout(seconds)

    def has_more(self):
        """Whether the peer sent more than was read."""
        return bool(self._buffer)

    def ahead(self, seconds):
        """Whether something more comes within so many seconds."""
        try:
            self._receive(seconds)
            return True
        except socket.timeout:
            return False

    def wait(self, seconds):
        """Wait for a request's first bytes. Raises PeerGone if none come."""
        try:
            while self._buffer in (b"", b"\r"):
                # First for as long as Connection.soon: a new limit is a system call.
                if not self.ahead(SOON_SECONDS):
                    self._receive(seconds)
            if self._buffer[:2] == b"\r\n":          # RFC 9112, 2.2: one is forgiven
                self._buffer = self._buffer[2:]
                while not self._buffer:
                    self._receive(seconds)
        except socket.timeout:
            raise PeerGone()

    def read_head(self):
        """Return the Head of the request that has begun.

        Raises PeerGone if the connection closes, RelayError if the head is malformed.
        """
        limits, deadline = self._limits, None
        while True:
            end = self._buffer.find(b"\r\n\r\n")
            if 0 <= end <= limits.max_head_bytes:
                break
            if len(self._buffer) > limits.max_head_bytes:
                raise RelayError("head_too_large", "The headers are larger than %d bytes."
                                 % limits.max_head_bytes)
            if deadline is None:
                deadline = time.monotonic() + limits.head_seconds
            try:
                self._receive(deadline - time.monotonic())
            except socket.timeout:
                raise RelayError("request_timeout", "The headers did not come within "
                                 "%g s." % limits.head_seconds)
        data, self._buffer = self._buffer[:end + 2], self._buffer[end + 4:]
        if self._head is None or data != self.last_head:
            self.last_head = data
            self._learn_head(data)
        return self._head

    def _learn_head(self, data):
        """Parse a head. One client's are mostly alike but for the body's length, and then
        that is all there is to learn: parsing a short one is 6 % of a prompt's cost."""
        length = _LENGTH.search(data)
        around = length and (data[:length.start(1)], data[length.end(1):])
        if self._head is None or around is None or around != self._around:
            self._head, self._around = None, around
            self._head = parse_head(data)
        else:
            self._head.length = int(length[1])
            self._head.fields["content-length"] = length[1].decode("ascii")

    def read_body(self, head, most=None):
        """Return a request's body as bytes. Raises RelayError, PeerGone."""
        length, most = head.length, min(most or math.inf, self._limits.max_request_bytes)
        if length is not None and length > most:
            raise self._too_large(most)
        if head.fields.get("expect"):
            if head.fields["expect"].lower() != "100-continue":
                raise RelayError("bad_http", "This relay knows no such Expect.")
            if head.version:
                self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if length is not None and length <= len(self._buffer):
            return self._take(length)
        deadline = time.monotonic() + self._limits.body_seconds
        self._counting = self._count is not None
        try:
            if length is not None:
                return self._take(length, deadline)
            return self._read_chunked(most, deadline)
        except socket.timeout:
            raise RelayError("request_timeout", "The body came too slowly.")
        finally:
            self._counting = False

    def _take(self, length, deadline=0.0):
        if len(self._buffer) < length:
            parts, have = [self._buffer], len(self._buffer)
            while have < length:
                self._buffer = b""
                self._receive(deadline + have / BODY_BYTES_PER_SECOND - time.monotonic())
                parts.append(self._buffer)
                have += len(self._buffer)
            self._buffer = b"".join(parts)
        data, self._buffer = self._buffer[:length], self._buffer[length:]
        return data

    def _take_line(self, deadline):
        while True:
            end = self._buffer.find(b"\r\n")
            if end >= 0:
                break
            if len(self._buffer) > 512:
                raise RelayError("bad_http", "A chunk's first line is too long.")
            self._receive(deadline - time.monotonic())
        line, self._buffer = self._buffer[:end], self._buffer[end + 2:]
        return line

    def _too_large(self, most):
        return RelayError("request_too_large", "The request is larger than %d bytes." % most)

    def _read_chunked(self, most, deadline):
        parts, total = [], 0
        while True:
            match = _CHUNK_LINE.match(self._take_line(deadline))
            if not match:
                raise RelayError("bad_http", "The chunked body is malformed.")
            size = int(match[1], 16)
            total += size
            if total > most or len(parts) > 4096 + total // 64:      # many tiny ones
                raise self._too_large(most)
            if size == 0:
                if self._take_line(deadline):
                    raise RelayError("bad_http", "Trailers are not accepted.")
                return b"".join(parts)
            parts.append(self._take(size, deadline))
            deadline += size / BODY_BYTES_PER_SECOND
            if self._take(2, deadline) != b"\r\n":
                raise RelayError("bad_http", "The chunked body is malformed.")

    def write(self, data):
        """Send all of data, at most write_seconds for each 64 KiB. Raises PeerGone."""
        try:
            if len(data) <= 65536:
                return self._send(self.tls.encrypt(data) if self.tls else data)
            view = memoryview(data)
            for start in range(0, len(data), 65536):
                part = view[start:start + 65536]
                self._send(self.tls.encrypt(part) if self.tls else part)
        except (OSError, ValueError):
            raise PeerGone()

    def _send(self, data):
        """Send this as it is, at most for write_seconds."""
        deadline = time.monotonic() + self._limits.write_seconds
        self._limit(socket.SO_SNDTIMEO, self._limits.write_seconds)
        sent = self.sock.send(data)
        if sent < len(data):                         # a slow reader
            self.sock.settimeout(max(0.001, deadline - time.monotonic()))
            self.sock.sendall(memoryview(data)[sent:])
            self.sock.settimeout(None if self.by_kernel else self._limits.write_seconds)

    def send_now(self, data):
        """Send what the kernel takes at this moment; flush sends the rest."""
        if self.tls is not None:
            data = self.tls.encrypt(data)
        try:
            sent = self.sock.send(data, MSG_DONTWAIT)
        except OSError:                    # full, or broken, which the next write will see
            sent = 0
        self.unsent = data[sent:]

    def flush(self):
        """Send what send_now could not; nothing else may be sent before. Raises PeerGone."""
        unsent, self.unsent = self.unsent, b""
        try:
            if unsent:
                self._send(unsent)
        except (OSError, ValueError):
            raise PeerGone()

    def say_goodbye(self):
        """Say that this is the end: without it, TLS takes it for a cut."""
        with contextlib.suppress(OSError):
            if self.tls is not None:
                self._limit(socket.SO_SNDTIMEO, LINGER_SECONDS)
                self.sock.send(self.tls.farewell())
            self.sock.shutdown(socket.SHUT_WR)

    def linger(self):
        """Let the peer read our last words before the connection is reset.

        Closing with its bytes unread would make the kernel send RST, which destroys
        the response at the peer. nginx does the same (lingering_close).
        """
        try:
            deadline = time.monotonic() + LINGER_SECONDS
            for _ in range(512):                     # 32 MiB at the most
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self.sock.settimeout(left)
                if not self.sock.recv(65536):
                    break
        except OSError:
            pass

    def when_gone(self, on_gone):
        """Call on_gone(), in some thread, as soon as the peer has hung up, unless on_gone
        is None again by then."""
        self.on_gone = on_gone             # each sets its own before it looks at the other's
        if self.gone:
            on_gone()

    def hang_up(self):
        """The peer has hung up: tell whoever asked to know."""
        self.gone = True
        on_gone = self.on_gone
        if on_gone is not None:
            on_gone()

    def has_hung_up(self):
        """Whether the peer has closed, as far as can be seen before what it sent is read:
        for systems that do not tell."""
        try:
            if not MSG_DONTWAIT and not select.select([self.sock], [], [], 0)[0]:
                return False
            start = self.sock.recv(5, socket.MSG_PEEK | MSG_DONTWAIT)
        except (BlockingIOError, InterruptedError):
            return False
        except (OSError, ValueError):
            return True
        if not start or self.tls is None:
            return not start
        # A TLS record: an alert (21), or encrypted (23) and of the one size that an alert
        # has in TLS 1.3 (RFC 8446, 5.2: 2 bytes, 1 of type, 16 of tag): close_notify.
        return start[0] == 21 or start[0] == 23 and start[3:5] == b"\x00\x13"


class Watcher:
    """One thread that sees connections hang up while their own threads wait elsewhere."""

    def __init__(self):
        self._wires = {}                   # file descriptor -> Wire
        self._lock = threading.Lock()      # while it is held, a descriptor means one Wire
        # Linux tells of a hang-up behind bytes that nobody has read yet, and of nothing
        # else. Other systems are asked for each connection with an answer on its way.
        self._epoll = select.epoll() if hasattr(select, "EPOLLRDHUP") else None

    @contextlib.contextmanager
    def watching(self, wire):
        """Call wire.hang_up(), in some thread, when the peer hangs up meanwhile."""
        descriptor = wire.fileno()
        with self._lock:
            if self._epoll is not None:
                self._epoll.register(descriptor, select.EPOLLRDHUP | select.EPOLLET)
            self._wires[descriptor] = wire
        try:
            yield
        finally:
            with self._lock:
                del self._wires[descriptor]
                if self._epoll is not None:
                    self._epoll.unregister(descriptor)

    def look(self):
        """Deal with the hang-ups that the kernel knows of at this moment.

        Also called before a prompt is matched with one that a client has left: the
        client may have hung up a moment before it asked again.
        """
        with self._lock:
            for descriptor, _ in self._ask() if self._epoll is None else self._epoll.poll(0):
                self._wires[descriptor].hang_up()

    def _ask(self):
        return [(descriptor, None) for descriptor, wire in self._wires.items()
                if wire.on_gone is not None and not wire.gone and wire.has_hung_up()]

    def run(self):
        """Watch for ever; for a thread of its own."""
        while True:
            if self._epoll is None:        # macOS, Windows
                time.sleep(0.25)
            else:
                select.select([self._epoll], [], [])
            self.look()


##############################################################################
# HTTP: requests and responses
##############################################################################

REQUEST_IDS = unique_ids()
FORWARDED = {"x-forwarded-for", "forwarded", "x-real-ip"}
SECURITY_HEADERS = (
    b"Server: neuroengine\r\nX-Content-Type-Options: nosniff\r\n"
    b"Referrer-Policy: no-referrer\r\n")
JSON = "application/json"
_HEADER_VALUE = re.compile(r"[\x20-\x7e]*\Z")
_OPENAI_TARGET = re.compile(
    rb"[A-Z]+ \S*/(?:v1/|chat/completions|completions|embeddings|models\b)")
STATUS_LINES = {status.value: ("HTTP/1.1 %d %s\r\n" % (status, status.phrase)).encode()
                for status in http.HTTPStatus}
FLAGS = {"stream", "wait"}                 # fields that are true or false
NATIVE_ONLY = ("key", "at", "gettokens", "stream", "wait", "command")
PROVIDERS_OWN = ("api", "reply_so_far", "n", "best_of")   # not for clients to say
NOT_PASSED_ON = frozenset(NATIVE_ONLY + PROVIDERS_OWN)


_to_json = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode


def dumps(value):
    """JSON as bytes. Pure ASCII: others' text cannot break a line or an encoding."""
    return _to_json(value).encode("ascii")


_ALIKE = bytes.maketrans(b"{}", b"[]")
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def too_deep(body, most=MAX_DEPTH):
    """Whether JSON is nested deeper than that, without parsing it.

    The parser recurses in C: 3,000 levels overflow a thread's stack on Python 3.13.
    """
    if body.count(b"[") + body.count(b"{") <= most:
        return False
    if b"\\" in body:
        body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    between_texts = b"".join(body.split(b'"')[::2])
    brackets = between_texts.translate(_ALIKE, _NOT_BRACKETS)
    for _ in range(most):
        if not brackets:
            return False
        brackets = brackets.replace(b"[]", b"")      # the innermost level
    return bool(brackets)


def _no_constant(name):
    raise ValueError(name + " is not JSON")


def _finite(text):
    if math.isinf(float(text)):            # it could not be written as JSON again
        raise ValueError(text[:20] + " is too large")
    return float(text)


def _whole(text):
    return int(text) if len(text) <= MAX_DIGITS else _no_constant("So long a number")


_from_json = json.JSONDecoder(
    parse_constant=_no_constant, parse_float=_finite,
    parse_int=int if hasattr(sys, "set_int_max_str_digits") else _whole).raw_decode


def parse_json(body):
    """Return the JSON object that body is. Raises RelayError."""
    if len(body) > MAX_BRACKETS and (
            body.count(b"{") + body.count(b"[") > MAX_BRACKETS
            or body.count(b'"') + body.count(b",") > MAX_SEPARATORS):
        raise RelayError("invalid_json", "The body has more than %d objects and lists, or "
                         "%d quotes and commas." % (MAX_BRACKETS, MAX_SEPARATORS))
    if too_deep(body):
        raise RelayError("invalid_json", "The body is nested deeper than %d levels."
                         % MAX_DEPTH)
    try:
        text = body.decode("utf-8").strip(" \t\r\n")
        value, end = _from_json(text)
        if end < len(text):
            raise ValueError("more follows at character %d" % end)
    except (ValueError, RecursionError) as error:
        raise RelayError("invalid_json", "The body is not JSON: %s." % printable(error))
    if type(value) is not dict:
        raise RelayError("invalid_json", "The body is not a JSON object: {...}.")
    return value


def printable(value, most=200):
    """Someone else's text made fit for one line of ours."""
    text = str(value)
    text = text if len(text) <= most else text[:most] + "..."
    return text.encode("ascii", "backslashreplace").decode("ascii").translate(
        {code: "?" for code in range(32)})


def check_fields(request, fields):
    """Check the numbers of a request and drop those that are null. Raises RelayError."""
    for field in fields.keys() & request.keys():
        (kind, lowest, highest), value = fields[field], request[field]
        if value is None:
            del request[field]
            continue
        if type(value) not in (int, float):
            raise RelayError("invalid_request", "%s must be a number." % field,
                             param=field)
        if not lowest <= value <= highest:
            raise RelayError("invalid_request", "%s must be from %s to %s." % (
                field, lowest, highest), param=field)
        if kind is int and value != int(value):
            raise RelayError("invalid_request", "%s must be a whole number." % field,
                             param=field)
        if kind is int:
            request[field] = int(value)


def check_messages(messages):
    """Check that messages is a list of {"role", "content"}. Raises RelayError."""
    if not isinstance(messages, list) or not messages:
        raise RelayError("invalid_request", "messages must be a list of "
                         '{"role", "content"}, and not empty.', param="messages")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RelayError("invalid_request", "Each message must be an object with a "
                             "role and a content.", param="messages")
        if not isinstance(message.get("content"), (str, list, type(None))):
            raise RelayError("invalid_request", "A message's content must be a text or a "
                             "list of parts.", param="messages")


def text_of(items):
    """The text of a stream's items, or of some of them."""
    return "".join(item for item in items if type(item) is str)


@functools.lru_cache(maxsize=100)
def usual_head(status, kind, openai, keep_alive, cached):
    """What most responses begin with."""
    lines = [STATUS_LINES[status], SECURITY_HEADERS]
    if status != 204:
        lines.append(b"Content-Type: %s\r\n" % kind.encode("ascii"))
    if not cached:
        lines.append(b"Cache-Control: no-store\r\n")
    if openai:
        lines.append(CORS_HEADERS)
    if not keep_alive:
        lines.append(b"Connection: close\r\n")
    return b"".join(lines)


class Connection(socketserver.BaseRequestHandler):
    """One connection: reads requests and answers them, one after the other.

    Here is what all handlers share. The handlers themselves, in the faces below, are
    alike: read, check the key, call the Broker, write.
    """

    # -- the life of a connection --

    def setup(self):
        self.broker, self.limits = self.server.broker, self.server.limits
        self.wire = Wire(self.request, self.limits, self._count_body,
                         self.server.tls and self.server.tls.context)
        self.body_bytes = 0                # of the body being read, as counted
        self.patience = self.limits.head_seconds    # with a peer that sends nothing
        self.news = self.broker.condition()
        self.turn = threading.Lock()       # of who delivers: see there
        self.delivering = False            # a response is made, to be sent by _send_made
        self.peer = self.address = canonical_address(self.client_address[0])
        self.proxied = self.server.is_proxy(self.client_address[0])
        self.near = not self.proxied and is_loopback(self.address)
        self.polled = None                 # (session id, token) of its last poll
        self.waits = False                 # it has one of the places for prompts
        self.known = self.asked = None     # a Head, and what it asks for

    def handle(self):
        try:
            with self.server.watcher.watching(self.wire):
                self.wire.shake_hands(self.limits.handshake_seconds)
                while self._exchange():
                    pass
                self.wire.say_goodbye()
                if self.head is None or not self.body_read:
                    self.wire.linger()
        except (PeerGone, OSError):
            pass                           # normal: they leave when they like

    def finish(self):
        if self.polled:
            self.broker.lost(*self.polled)

    def _exchange(self):
        """Read one request and answer it; whether the connection may be used again."""
        self.started, self.body_read, self.head = False, True, None
        self.id = next(REQUEST_IDS)
        self.openai = False
        try:
            self._telling(self._one_request)
        finally:
            self.server.active.discard(self)
        return self.keep_alive and self.body_read

    def _one_request(self):
        self._wait()
        self.head = head = self.wire.read_head()
        self.body_read = head.length == 0
        self.keep_alive = head.keep_alive and not self.server.stopping
        self.began = self.broker.now()
        self.server.active.add(self)
        if not self.proxied:
            return self._dispatch(head)
        # A proxy's connection counts for nobody, so what it asks for does.
        self.address = self.server.forwarded_for(head, self.peer)
        with self.taking(self.server.proxied):
            self._dispatch(head)

    def _telling(self, function, *arguments):
        """Call it, and tell the peer what went wrong there. Raises PeerGone."""
        try:
            function(*arguments)
        except RelayError as error:
            if self.head is None:          # malformed: all we have to go by is its path
                self.openai = bool(_OPENAI_TARGET.match(self.wire.last_head))
            self._fail(error)
        except (PeerGone, socket.timeout, ConnectionError):
            raise PeerGone()
        except sqlite3.Error as error:
            log("cannot_save", error=str(error))
            self._fail(RelayError("relay_busy", "The relay cannot write its data just now: "
                                  "try again later.", retry_after=30))
        except Exception as error:         # ours: tell the log all, the peer nothing
            log("internal_error", request=self.id, error=printable(repr(error)),
                traceback=True)
            self._fail(RelayError("internal_error", "The relay made a mistake; it is "
                                  "logged as %s." % self.id))

    def _wait(self):
        """Wait for the next request; meanwhile the connection may be closed to make room."""
        idle = self.server.idle
        idle[self.request] = True
        try:
            self.wire.wait(self.patience)
        finally:
            idle.pop(self.request, None)
        self.patience = self.limits.idle_seconds

    def _fail(self, error):
        self._waits_no_more()
        self.server.count("errors", error.name)
        if self.head is None or not self.body_read:
            self.keep_alive = False        # where the next request starts is unknown
        if self.started:
            raise PeerGone()               # too late for a status: cut it short
        self.reply(ERRORS[error.name][1],
                   error.openai() if self.openai else error.native(), error=error)

    def _dispatch(self, head):
        # One client's are mostly alike, see _learn_head: 2 % of a prompt's processor time.
        if head is not self.known:
            self.known = None
            # Whether this machine asks: nobody who comes through a proxy is, whatever it says.
            self.local = self.near and FORWARDED.isdisjoint(head.fields)
            self.asked = self._what_is_asked(head)
            self.known = head
        face, handler, arguments = self.asked
        self.openai = face == "openai"
        self.server.count("requests", face)
        if not self.local and (handler == "login" or face == "operator"
                               and head.method not in ("GET", "HEAD")):
            self.server.changes.take(self.address, self.limits.max_changes_per_minute, 60,
                                     "logins and changes")
        getattr(self, handler)(*arguments)

    def _what_is_asked(self, head):
        """Return (face, name of the handler, its arguments). Raises RelayError."""
        self.server.check_host(head.fields.get("host", ""), head.fields.get("origin"))
        route, arguments = find_route(head.path)
        if self.server.tls and self.wire.tls is None and route is not CHALLENGE:
            return "admin", "to_https", ()
        if route is None:
            self.openai = "v1" in head.path[:2]
            raise RelayError("not_found", "There is no %s here." %
                             printable("/" + "/".join(head.path)))
        self.openai = route.face == "openai"
        method = "GET" if head.method == "HEAD" else head.method
        if method == "OPTIONS" and self.openai:
            return route.face, "preflight", ()
        handler = route.handlers.get(method)
        if handler is None:
            allowed = ", ".join(route.handlers)
            if method == "OPTIONS":
                return "admin", "say_allowed", (allowed,)
            raise RelayError("method_not_allowed", "%s is not done here; %s is." % (
                printable(method, 20), allowed), allow=allowed)
        if route.face == "operator" and head.fields.get(
                "sec-fetch-site", "none") not in ("same-origin", "none"):
            raise RelayError("forbidden", "Another site's page may not do this.")
        return route.face, handler, arguments

    def say_allowed(self, methods):
        """OPTIONS, but for the OpenAI face"""
        self.reply(204, b"", allow=methods)

    def to_https(self):
        """For who speaks plain HTTP there is nothing else; a key sent so was seen."""
        host, target = self.head.fields.get("host", ""), self.head.target
        name = re.sub(r":\d*\Z", "", host)
        if self.head.method not in ("GET", "HEAD") or not name or target[0] != "/":
            raise RelayError("forbidden", "This is not https: use it, at port %d."
                             % self.server.server_port)
        self.reply(301, b"", "text/plain", location="https://%s:%d%s" % (
            name, self.server.server_port, target))

    # -- what handlers share --

    def read_object(self, most=None, known=False):
        """The request's body as a dict; it may have `most` bytes. known: an identical body
        is to be known by self.same."""
        coding = self.head.fields.get("content-encoding", "identity")
        if coding.lower() != "identity":
            raise RelayError("unsupported_encoding", "Send the body without a "
                             "Content-Encoding.")
        try:
            body = self.wire.read_body(self.head, most)
            self.body_read = True
            self.same = hashlib.sha256(body).digest() if known else None
            return parse_json(body)
        finally:
            if self.body_bytes:
                self.server.bytes.give(self.address, self.body_bytes)
                self.body_bytes = 0

    def _count_body(self, size):
        """Called with the bytes of a body as they come. Small ones are always taken."""
        self.server.bytes.take(self.address, size,
                               self.body_bytes + size <= MAX_SMALL_BODY_BYTES)
        self.body_bytes += size

    def is_operator(self, service):
        """Whether this request came with the service's key."""
        return hmac.compare_digest(self.head.hashed, service.key_digest)

    def authorized(self, name):
        """The service of that name, if this request came with its key."""
        service = self.broker.find(name)
        if not self.is_operator(service):
            raise self._wrong_key("This needs the service key of %s, as \"Authorization: "
                                  "Bearer KEY\"." % service.name)
        return service

    def _wrong_key(self, words):
        """The error for a key that is not right, or the one for too many of them."""
        if self.head.hashed:
            self.server.wrong_keys.take(
                self.address, self.limits.max_wrong_keys_per_minute, 60, "wrong keys")
        return RelayError("invalid_key", words)

    def still_authorized(self, service):
        """Check again after the body, which may take its time: the service may have been
        deleted meanwhile, and its name be somebody else's."""
        if self.broker.find(service.name) is not service or not self.is_operator(service):
            raise RelayError("invalid_key", "This service was deleted meanwhile, or has a new "
                             "key.")

    def reply(self, status, body, kind=JSON, error=None, more=b"", **headers):
        """Send one whole response; body is bytes, or a value to be sent as JSON. more:
        further lines of the head, ready made."""
        if not isinstance(body, bytes):
            body = dumps(body)
        self.wire.on_gone = None           # who has all may hang up, and ask again at once
        if error is not None:
            if error.retry_after is not None:
                headers["retry_after"] = str(math.ceil(error.retry_after))
            if error.allow is not None:
                headers["allow"] = error.allow
            if status == 401:
                headers["www_authenticate"] = "Bearer"
            # OpenAI's clients try 408, 409, 429 and all from 500 again, by themselves.
            if self.openai and not error.retry:
                headers["x_should_retry"] = "false"
            if self.openai and error.limit is not None:
                headers["x_ratelimit_limit_requests"] = str(error.limit)
                headers["x_ratelimit_remaining_requests"] = "0"
                headers["x_ratelimit_reset_requests"] = "%ds" % math.ceil(
                    error.retry_after)
        head = self.head_bytes(status, kind, headers, more)
        length = b"" if status == 204 else b"Content-Length: %d\r\n" % len(body)
        if self.head is not None and self.head.method == "HEAD":
            body = b""
        self.send(head + length + b"\r\n", body)

    def send(self, head, body=b""):
        """Write these bytes; what is large counts as memory until it is gone."""
        if self.delivering:
            self.started, self.made = True, head + body
            return
        if len(body) <= MAX_SMALL_BODY_BYTES:
            self.started = True
            return self.wire.write(head + body if body else head)
        with self.taking(self.server.bytes, len(body)):
            self.started = True
            self.wire.write(head)
            self.wire.write(body)

    @contextlib.contextmanager
    def taking(self, shares, count=1):
        """Have so many of those for a while."""
        shares.take(self.address, count)
        try:
            yield
        finally:
            shares.give(self.address, count)

    def head_bytes(self, status, kind, headers, more=b""):
        """A response's head, without its end; refuses what would not be one line."""
        head = usual_head(status, kind, self.openai, self.keep_alive,
                          "cache_control" in headers)
        for name, value in headers.items():
            if not _HEADER_VALUE.match(value):
                raise ValueError("ill-formed header %s: %r" % (name, value))
            head += ("%s: %s\r\n" % (name.replace("_", "-"), value)).encode("ascii")
        return b"%s%s%sX-Request-Id: %s\r\n" % (
            head, more, self.server.date(), self.id.encode("ascii"))

    def begin(self, kind, more=b"", **headers):
        """Send nothing yet, but make ready for a body whose length is not known."""
        self.started = True
        if self.head.version == 0:
            self.keep_alive = False        # its end is the connection's
        else:
            headers["transfer_encoding"] = "chunked"
        self._pending = self.head_bytes(200, kind, headers, more) + b"\r\n"

    def framed(self, data, last=False):
        """A piece of that body, as it is sent: behind the head, if that is still to go."""
        if data and self.head.version:     # an empty chunk would be the last
            data = b"%x\r\n%s\r\n" % (len(data), data)
        if last:
            self.wire.on_gone = None       # as in reply
            if self.head.version:
                data += b"0\r\n\r\n"
        pending, self._pending = self._pending, b""
        return pending + data if pending else data

    def send_piece(self, data, last=False):
        """Send a piece of that body, with what is pending, as one write."""
        self.send(b"", self.framed(data, last))

    def read_items(self, reader, want, timeout, most=None):
        """broker.read, but notice it when the client hangs up. Raises PeerGone."""
        items, ended = self.broker.read(reader, want, timeout, most)
        if reader.gone:
            raise PeerGone()
        return items, ended

    def take_place(self):
        """Have one of the places for prompts, until this one is answered."""
        self.server.waiting.take(self.address)
        self.waits = True

    def answer(self, reader, respond, *args):
        """Call respond(*args, reader), and leave the job; a clean end means that the client
        has its items."""
        delivered = False
        self.wire.when_gone(functools.partial(self.broker.hangup, reader))
        try:
            respond(*args, reader)
            delivered = True
        except RelayError:                 # the response is an error, and arrives
            delivered = True
            raise
        finally:
            if reader.attached:            # else _send_made has left it
                self.broker.leave(reader, delivered)
            self._waits_no_more()

    def _waits_no_more(self):
        if self.waits:
            self.waits = False
            self.server.waiting.give(self.address)

    def stream_out(self, reader, begin, piece):
        """Send a streamed answer as it is made, but for its end.

        begin() makes ready for the first piece. piece(kind, value) returns the bytes for
        ("items", list), ("queue", dict) when the place changes, ("queue", None) when a
        provider has taken the job, and ("beat", None) in long silences.
        """
        job, place, self.quiet, ended = reader.job, None, time.monotonic(), False
        if self.wire.by_kernel:
            self.broker.deliver_by(reader, functools.partial(
                self._deliver, self._make_piece, reader, begin, piece))
        try:
            while not ended:
                self._wait_for_news(reader)
                with self.turn:            # one at a time: this thread, or who delivers
                    reader.behind = False
                    self.wire.flush()
                    items, ended = self.broker.read(reader, most=MAX_ITEMS_A_RECORD)
                    event = ("items", items) if items else None
                    if event is None and not ended:
                        news = self.broker.place(job)
                        silence = time.monotonic() - self.quiet
                        if news != place:
                            place, event = news, ("queue", news)
                        elif silence >= self.limits.heartbeat_seconds - 0.05:
                            event = "beat", None
                    if event is not None:
                        if not self.started:
                            begin()
                        self.quiet = time.monotonic()
                        self.send_piece(piece(*event))
                if not items and not ended:
                    self._check_age(job)
        finally:
            with self.turn:                # nobody is just writing, or will
                reader.deliver = None

    def _wait_for_news(self, reader):
        """Wait until there may be something to send. Raises PeerGone."""
        limit = self.limits.heartbeat_seconds
        wait = min(QUEUE_NEWS_SECONDS if reader.job.state == "queued" else limit,
                   max(0.01, self.quiet + limit - time.monotonic()))
        self.broker.wait(reader, wait)
        if reader.gone:
            raise PeerGone()

    def _deliver(self, make, reader, *how):
        """Make what has come for a reader, in the thread that brought it, so that none has
        to be woken for it: half the processor time of a token. Never blocks.

        make(reader, *how) returns the bytes, or b"" if there is nothing to send, or it is
        so large that it counts as memory, for which the reader's own thread has to ask.
        Returns the function that sends them, or None; until that was called, nobody else
        makes or sends.
        """
        if not self.turn.acquire(False):   # its own thread is at it
            self.broker.leave_to_own(reader)
            return None
        try:
            data = b""
            if reader.deliver is not None and not self.wire.unsent:
                data = make(reader, *how)
        except Exception as error:
            data = b""
            self._not_delivered(reader, error)
        if data:
            return functools.partial(self._send_made, reader, data)
        self.turn.release()
        return None

    def _send_made(self, reader, data):
        """Send what the kernel takes of it now; the rest is the reader's own thread's."""
        try:
            self.wire.send_now(data)
            if reader.deliver is None and not self.wire.unsent:    # it was a whole answer
                self.broker.leave(reader, True)
                self._waits_no_more()
        except Exception as error:
            self._not_delivered(reader, error)
        finally:
            self.turn.release()
        if self.wire.unsent:
            self.broker.leave_to_own(reader)

    def _not_delivered(self, reader, error):
        """Treat it as a hang-up: whoever brought the items cannot help it."""
        if not isinstance(error, PeerGone):
            log("internal_error", error=printable(repr(error)), traceback=True)
        self.broker.hangup(reader)

    def _make_piece(self, reader, begin, piece):
        """The next piece of a streamed answer."""
        if size_of(reader.job.items[reader.at:]) > MAX_SMALL_BODY_BYTES:
            self.broker.leave_to_own(reader)
            return b""
        items, _ = self.broker.read(reader, most=MAX_ITEMS_A_RECORD)
        if not items:
            return b""
        if not self.started:
            begin()
        self.quiet = time.monotonic()
        return self.framed(piece("items", items))

    def wait_whole(self, reader, timeout):
        """Wait for the end of a job; its items, or None if it has not ended by then."""
        items, ended = self.read_items(reader, None, timeout)
        if not ended:
            return None
        if reader.job.error is not None:
            raise reader.job.error
        return items

    def soon(self, reader, respond):
        """Whether an answer came within SOON_SECONDS, and was sent.

        Who brings it calls respond(items), while this thread waits for the next request
        already, and so is not woken twice: with 64 clients a third more requests a second,
        with one 11 % less time. Raises PeerGone.
        """
        if not self.wire.by_kernel or not self.keep_alive:
            return False                   # this thread has to close it at once
        self.broker.deliver_by(reader, functools.partial(
            self._deliver, self._make_whole, reader, respond), whole=True)
        try:
            if not reader.behind and not self.wire.has_more():
                self.wire.ahead(SOON_SECONDS)
        finally:
            with self.turn:                # nobody is just writing, or will
                reader.deliver = None
        self.wire.flush()
        return self.started

    def _make_whole(self, reader, respond):
        """The whole response, when a job has ended."""
        job = reader.job
        if job.size - len(job.payload) > MAX_SMALL_BODY_BYTES:
            return b""
        reader.deliver = None              # there is one response
        items = job.items                  # and then its error: see Broker._drop_locked
        self.delivering = True
        try:
            if job.error is not None:
                self._fail(job.error)
            else:
                self._telling(respond, items)
            return self.made
        finally:
            self.delivering = False

    def _check_age(self, job):
        if self.broker.now() - job.created > self.limits.job_seconds:
            self.broker.cancel(job, self._took_too_long())

    def _took_too_long(self):
        return RelayError("provider_timeout", "This answer took longer than %d s."
                          % self.limits.job_seconds)

    def access(self, service):
        """Whether this client is the operator, and the AccessKey it came with, if any.

        Raises RelayError if the service is private and neither is so. An open service
        takes no notice of keys it does not know: OpenAI clients always send one.
        """
        if self.is_operator(service):
            return True, None
        hashed = self.head.hashed
        access = service.keys.get(hashed)      # by its hash: a guess learns nothing
        if access is None and service.private and self.broker.knows_key(hashed):
            raise RelayError("forbidden", "This access key is for another service than %s."
                             % service.name)
        if access is None and service.private:
            raise self._wrong_key("%s is private: ask its operator for an access key, and "
                                  "send it as \"Authorization: Bearer KEY\"."
                                  % service.name)
        return False, access

    def caller(self, access=None):
        """Who this client is, for turns and limits: its access key, else its address."""
        return "key " + access.id if access is not None else self.address


class PageFace:
    """The page, and what looks after the relay."""

    def page(self, name=None):
        """GET / and GET /{service}"""
        if name is not None and (not NAME.match(name) or name.lower() in RESERVED_NAMES):
            raise RelayError("not_found", "There is no /%s here." % printable(name))
        if self.server.page is None:
            raise RelayError("not_found", "This relay has no chat.html beside it, so it "
                             "has no page. Its API is there: GET /api/models.")
        self.reply(200, self.server.page, "text/html; charset=utf-8",
                   cache_control="no-cache", content_security_policy=self.server.csp)

    def challenge(self, token):
        """GET /.well-known/acme-challenge/{token}: what certbot put into --acme-webroot"""
        if self.server.webroot and re.match(r"[A-Za-z0-9_-]{1,256}\Z", token):
            with contextlib.suppress(OSError), open(os.path.join(
                    self.server.webroot, ".well-known", "acme-challenge", token), "rb") as file:
                return self.reply(200, file.read(65536), "text/plain")
        raise RelayError("not_found", "There is no such challenge here.")

    def health(self):
        """GET /healthz"""
        if self.broker.draining:
            raise RelayError("shutting_down", "The relay is shutting down.")
        self.reply(200, {"status": "ok", "version": __version__})

    def metrics(self):
        """GET /metrics, in the text format of Prometheus"""
        if not self.local:
            raise RelayError("forbidden", "Metrics are for this machine only.")
        counters, gauges, histograms = self.broker.totals()
        with self.server.counting:
            counted = sorted(self.server.counts.items())
        for name in ("connections", "polls", "waiting", "bytes"):
            gauges[name] = getattr(self.server, name).taken
        lines = []
        for kind, values in (("gauge", gauges), ("counter", counters)):
            for name, value in sorted(values.items()):
                name += "_total" if kind == "counter" else ""
                lines += ["# TYPE neuroengine_%s %s" % (name, kind),
                          "neuroengine_%s %d" % (name, value)]
        for what in sorted({what for (what, _), _ in counted}):
            lines.append("# TYPE neuroengine_%s_total counter" % what)
            lines += ['neuroengine_%s_total{kind="%s"} %d' % (what, label, count)
                      for (name, label), count in counted if name == what]
        for name, histogram in sorted(histograms.items()):
            lines += histogram.lines("neuroengine_" + name)
        self.reply(200, ("\n".join(lines) + "\n").encode("ascii"),
                   "text/plain; version=0.0.4")


def receipt(job):
    """What an answer took, as JSON. Written by hand: the numbers alone would take the
    encoder as long as all else in a short answer."""
    end = job.ended_at if job.ended_at is not None else job.created
    leased = job.leased_at if job.leased_at is not None else end
    first = job.first_at if job.first_at is not None else end
    others = [item for item in job.items if type(item) is not str]
    tokens, rate, usage = len(job.items) - len(others), b"", b""
    for item in others[-3:]:
        if isinstance(item.get("usage"), dict):
            usage = b',"usage":' + dumps(item["usage"])
            count = item["usage"].get("completion_tokens")
            if type(count) is int and 0 <= count < 10**9:
                tokens = count
    if end - first > 0.001 and len(job.items) - len(others) > 1:
        rate = b',"tokens_per_s":%.1f' % ((tokens - 1) / (end - first))
    return (b'{"id":"%s","queue_ms":%.1f,"first_token_ms":%.1f,"total_ms":%.1f,"tokens":%d'
            b'%s%s}' % (job.id.encode("ascii"), 1000 * (leased - job.created),
                        1000 * (first - job.created), 1000 * (end - job.created), tokens,
                        usage, rate))


class NativeFace:
    """The native API: one JSON object in, one out, or a stream of them."""

    def models(self):
        """GET /api/models"""
        self.reply(200, self.broker.models())

    def native(self, name=None):
        """POST /{service}: a prompt, or a command"""
        request = self.read_object(known=True)
        command = request.get("command")
        if command == "getmodels":
            return self.reply(200, self.broker.models())
        if name is None:
            raise RelayError("invalid_request", "Send prompts to /{service}.")
        service = self.broker.find(name)
        key, at, wanted = self._check_native(request)
        own, access = self.access(service)
        if command == "cancel":
            reader = self.broker.open(service, key, 0)
            self.broker.cancel(reader.job)
            self.broker.leave(reader, True)
            return self.reply(200, {"reply": "", "errorcode": 0})
        if command is not None:
            raise RelayError("invalid_request", "There is no command %s; there are "
                             "getmodels and cancel." % printable(command, 40),
                             param="command")
        stream = request.get("stream")     # what is submitted is cleared
        self.take_place()
        reader = self._submit_native(service, request, key, at, own, access)
        if stream:
            self.answer(reader, self._stream_native)
        elif key:
            self.answer(reader, self._poll_native, wanted, at is not None)
        else:
            self.answer(reader, self._whole_native)

    def _check_native(self, request):
        """Check a native request; return its stream key, place, and tokens wanted."""
        check_fields(request, SAMPLING)
        key = request.get("key") or ""
        if not isinstance(key, str) or len(key) > 512:
            raise RelayError("invalid_request", "key must be a text of at most 512 "
                             "characters.", param="key")
        if "message" in request and not isinstance(request["message"], str):
            if isinstance(request["message"], list):
                request["messages"] = request.pop("message")
            else:
                raise RelayError("invalid_request", "message must be a text.",
                                 param="message")
        if "messages" in request:
            check_messages(request["messages"])
        if "raw" in request:
            if str(request["raw"]).lower() not in ("true", "false", "", "0", "1", "none"):
                raise RelayError("invalid_request", "raw must be true or false.",
                                 param="raw")
        for field in FLAGS & request.keys():
            if type(request[field]) is not bool:
                raise RelayError("invalid_request", "%s must be true or false." % field,
                                 param=field)
        return key, request.get("at"), request.get("gettokens", 20)

    def _submit_native(self, service, request, key, at, own, access):
        caller = self.caller(access)
        prompt = request.get("message", request.get("messages"))
        if prompt is None:
            if key and "command" not in request:
                return self.broker.open(service, key, at, self.news)
            raise RelayError("invalid_request", "message is missing: the prompt, a text.",
                             param="message")
        repeat = self.head.fields.get("idempotency-key")
        name, fingerprint, twin = key, None, None
        if not key and repeat:
            name, fingerprint = ("repeat", caller, repeat[:512]), self.same
            at = 0
        elif key:
            fingerprint = hashlib.sha256(dumps(prompt)).digest()
        else:
            twin = (service, caller, self.same)
            if self.broker.has_twin(twin):
                self.server.watcher.look()
        if access is not None:
            access.cap(request, "max_new_len")
        wait = request.get("wait", False)
        payload = dumps({field: value for field, value in request.items()
                         if field not in NOT_PASSED_ON})
        request.clear()                    # it may be large, and the wait long
        return self.broker.submit(
            service, payload, caller=caller, name=name or None, twin=twin, at=at,
            fingerprint=fingerprint, own=own, access=access, rated=not self.local,
            holder=self.address, wait=wait, news=self.news)

    def _whole_native(self, reader):
        def respond(items):
            self.reply(200, b'{"reply":%s,"errorcode":0,"stats":%s}' % (
                dumps(text_of(items)), receipt(reader.job)))

        if not self.soon(reader, respond):
            items = self.wait_whole(reader, self.limits.job_seconds)
            if items is None:
                self.broker.cancel(reader.job, self._took_too_long())
                raise reader.job.error
            respond(items)

    def _poll_native(self, wanted, counts, reader):
        """The next `wanted` tokens: those that are there a second after the first."""
        job, texts, ended = reader.job, [], False
        deadline = time.monotonic() + self.limits.wait_seconds
        while len(texts) < wanted and not ended:
            left = deadline - time.monotonic()
            if left <= 0:
                break
            # Until there is a first token, one is enough to wake up for.
            want = wanted - len(texts) if texts else 1
            items, ended = self.read_items(reader, want, left, wanted - len(texts))
            if not texts and any(type(i) is str and i for i in items):
                deadline = min(deadline, time.monotonic() + 1)
            texts += [item for item in items if type(item) is str and item]
        reply = {"reply": "".join(texts), "errorcode": 0, "at": reader.at}
        if texts or not ended:
            if not texts:
                self._check_age(job)
                raise RelayError("still_waiting", "No token yet: ask again with the same "
                                 "key.", retry_after=0)
            self.broker.advance(reader)
            return self.reply(200, reply)
        if job.error is not None and (counts or not job.error_told):
            job.error_told = True          # a client that does not count would loop
            raise job.error
        self.reply(200, b'%s,"done":true,"stats":%s}' % (dumps(reply)[:-1], receipt(job)))

    def _stream_native(self, reader):
        """NDJSON. A stream without its last record, done or an error, is not complete."""
        job = reader.job
        begin = functools.partial(self.begin, "application/x-ndjson", x_accel_buffering="no")

        def piece(kind, value):
            if kind == "items":
                return dumps({"at": reader.at - len(value), "items": value}) + b"\n"
            return dumps({"queue": value} if kind == "queue" else {}) + b"\n"

        self.stream_out(reader, begin, piece)
        if not self.started:
            if job.error is not None:
                raise job.error
            begin()
        last = (dumps(job.error.native()) if job.error is not None
                else b'{"done":true,"stats":%s}' % receipt(job))
        self.send_piece(last + b"\n", last=True)


##############################################################################
# HTTP: the OpenAI face
##############################################################################

CORS_HEADERS = (
    b"Access-Control-Allow-Origin: *\r\n"
    b"Access-Control-Expose-Headers: x-request-id, retry-after, x-should-retry, "
    b"x-ratelimit-limit-requests, x-ratelimit-remaining-requests, "
    b"x-ratelimit-reset-requests, "
    b"x-neuroengine-queue-ms, x-neuroengine-overhead-ms\r\n")
DROPPED_FIELDS = {"model", "stream", "stream_options", "wait", "reply_so_far"}
OPENAI_LENGTHS = {"max_tokens", "max_completion_tokens"}
_HEADER_LIST = re.compile(r"[A-Za-z0-9,_ -]{0,2000}\Z")


class OpenAIFace:
    """What any OpenAI client understands. An item that is a dict stands for what text
    cannot say: {"reasoning": text}, {"tool_calls": [delta]}, {"finish_reason": text},
    {"usage": {...}}, and {"result": {...}}, a whole answer passed through."""

    def preflight(self):
        """OPTIONS: a browser asks what another site's page may send."""
        asked = self.head.fields.get("access-control-request-headers", "")
        self.reply(204, b"", access_control_allow_methods="GET, POST, OPTIONS",
                   access_control_allow_headers=(
                       asked if _HEADER_LIST.match(asked) and asked else "*"),
                   access_control_max_age="86400")

    def openai_models(self, name=None):
        """GET /v1/models: the services that answer now, or with ?all=1 all of them"""
        models = self.broker.models()
        if name is not None:
            models = [self.broker.model(self._model(name))]
        elif "all=1" not in self.head.target.partition("?")[2].split("&"):
            models = [model for model in models if model["connected"]]
        self.reply(200, {"object": "list", "data": [_openai_model(m) for m in models]})

    def openai_model(self, name, _=None):
        """GET /v1/models/{id}; at a service's own base, whatever the id"""
        self.reply(200, _openai_model(self.broker.model(self._model(name))))

    def _model(self, name):
        """The service that a client calls its model. Raises RelayError: what no service
        can be called, as "llama3:8b", is not there either."""
        try:
            return self.broker.find(name)
        except RelayError:
            raise RelayError("service_unknown", "There is no model %s here. GET /v1/models "
                             "lists those there are." % printable(name), param="model")

    def chat(self, name=None):
        """POST /v1/chat/completions"""
        self._answer("chat", name)

    def completions(self, name=None):
        """POST /v1/completions"""
        self._answer("completions", name)

    def embeddings(self, name=None):
        """POST /v1/embeddings: passed through to a provider that has it"""
        self._answer("embeddings", name)

    def not_here(self, name=None):
        """What OpenAI has and this relay has not"""
        raise RelayError("not_found", "This relay has /v1/chat/completions, "
                         "/v1/completions, /v1/embeddings and /v1/models.")

    def _answer(self, api, name):
        repeat = self.head.fields.get("idempotency-key")
        request = self.read_object(known=bool(repeat))
        model = request.get("model") if name is None else name
        if not isinstance(model, str):
            raise RelayError("invalid_request", "model is missing: the name of a "
                             "service.", param="model")
        service = self._model(model)
        own, access = self.access(service)
        self._check_openai(api, service, request)
        if access is not None and api != "embeddings":
            access.cap(request, "max_tokens")
        dropped = {field: request.pop(field) for field in DROPPED_FIELDS & request.keys()}
        request["api"] = api
        payload = dumps(request)
        request.clear()                    # it may be large, and the wait long
        caller = self.caller(access)
        self.take_place()
        reader = self.broker.submit(
            service, payload, caller=caller, own=own, access=access, rated=not self.local,
            holder=self.address, wait=dropped.get("wait"), news=self.news, at=0,
            grace=None if repeat else 0.0, fingerprint=self.same,
            name=("repeat", caller, repeat[:512]) if repeat else None)
        if dropped.get("stream") and api != "embeddings":
            self.answer(reader, self._stream_openai, api, service.name,
                        dropped.get("stream_options") or {})
        else:
            self.answer(reader, self._whole_openai, api, service.name)

    def _check_openai(self, api, service, request):
        for field in OPENAI_LENGTHS & request.keys():
            if request[field] == -1:           # "no limit", to llama.cpp and LM Studio
                del request[field]
        check_fields(request, OPENAI_SAMPLING)
        for field in FLAGS & request.keys():
            if type(request[field] or False) is not bool:
                raise RelayError("invalid_request", "%s must be true or false." % field,
                                 param=field)
        if type(request.get("stream_options") or {}) is not dict:
            raise RelayError("invalid_request", "stream_options must be an object.",
                             param="stream_options")
        if request.get("n") not in (None, 1):
            raise RelayError("invalid_request", "Only one answer at a time: n must be 1.",
                             param="n")
        if api == "chat":
            check_messages(request.get("messages"))
        elif api == "completions":
            prompt = request.get("prompt")
            if isinstance(prompt, list) and len(prompt) == 1:
                prompt = request["prompt"] = prompt[0]
            if not isinstance(prompt, str):
                raise RelayError("invalid_request", "prompt must be a text.",
                                 param="prompt")
        elif service.sessions and not any(
                session.embeddings for session in list(service.sessions.values())):
            raise RelayError("not_found", "The provider of %s makes no embeddings."
                             % service.name)

    def _times(self, job):
        """The headers that tell how long the prompt queued, and what the relay added."""
        now = self.broker.now()
        queued = (job.leased_at or now) - job.created
        added = job.created - self.began + (now - (job.ended_at or now))
        return b"X-Neuroengine-Queue-Ms: %d\r\nX-Neuroengine-Overhead-Ms: %.1f\r\n" % (
            1000 * queued, max(0, 1000 * added))   # below 0: a repeat of an older prompt

    def _whole_openai(self, api, model, reader):
        answer = _Answer(api, model, reader.job)

        def respond(items):
            self.reply(200, answer.whole(items), more=self._times(reader.job))

        # Many vectors are large, and may come at once: see _make_whole.
        if api != "embeddings" and self.soon(reader, respond):
            return
        items = self.wait_whole(reader, LATE_HEAD_SECONDS)
        if items is not None:
            return respond(items)
        # It is late: commit to a 200 and keep the connection alive with spaces, which
        # may stand before JSON. An error can then only be told in the body.
        self.begin(JSON)
        try:
            while items is None:
                self.send_piece(b" ")
                items = self.wait_whole(reader, self.limits.heartbeat_seconds)
                self._check_age(reader.job)
            body = answer.whole(items)
        except RelayError as error:
            body = dumps(error.openai())
        self.send_piece(body, last=True)

    def _stream_openai(self, api, model, options, reader):
        answer, job = _Answer(api, model, reader.job, stream=True), reader.job
        news = options.get("include_queue") or \
            self.head.fields.get("x-neuroengine-queue") == "1"

        def piece(kind, value):
            if kind == "items":
                return answer.pieces(value)
            if value is None:
                return b": waiting\n\n"
            if news:
                return answer.chunk({}, more=b',"queue":' + dumps(value))
            return b": queue %d/%d\n\n" % (value["position"], value["waiting"])

        begin = functools.partial(self._begin_sse, job)
        self.stream_out(reader, begin, piece)
        if not self.started:
            if job.error is not None:
                raise job.error
            begin()
        if job.error is not None:
            last = b"data: " + dumps(job.error.openai()) + b"\n\n"
        else:
            last = answer.end(options.get("include_usage")) + b"data: [DONE]\n\n"
        self.send_piece(last, last=True)

    def _begin_sse(self, job):
        self.begin("text/event-stream", cache_control="no-cache",
                   x_accel_buffering="no", more=self._times(job))


def _openai_model(model):
    entry = {"id": model["name"], "object": "model", "created": model["created"],
             "owned_by": "neuroengine"}
    if model.get("context_length"):
        entry["context_length"] = entry["max_model_len"] = model["context_length"]
    if not model["connected"]:
        entry["status"] = "offline"
    return entry


class _Answer:
    """Puts the items of one job into OpenAI's words. As JSON, whose usual parts are written by
    hand: the encoder would take as long as all else about a short answer."""

    finish_reason = usage = around = None
    begun, tokens = False, 0

    def __init__(self, api, model, job, stream=False):
        self.job, self.model, self.chat = job, model, api == "chat"
        if not self.chat:
            kind, prefix = b"text_completion", b"cmpl"
        else:
            kind, prefix = b"chat.completion" + b".chunk" * stream, b"chatcmpl"
        self.base = b'{"id":"%s-%s","object":"%s","created":%d,"model":"%s","choices":[' % (
            prefix, job.id[:24].encode("ascii"), kind, time.time(), model.encode("ascii"))

    def _note(self, item):
        self.finish_reason = item.get("finish_reason") or self.finish_reason
        self.usage = item.get("usage") or self.usage

    def _usage(self):
        """The upstream's own count; else items, and four bytes of prompt to a token."""
        if isinstance(self.usage, dict):
            return dumps(self.usage)
        prompt = len(self.job.payload) // 4
        return b'{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d}' % (
            prompt, self.tokens, prompt + self.tokens)

    def whole(self, items):
        """The answer as one object."""
        texts, reasoning, calls = [], [], []
        for item in items:
            if type(item) is str:
                texts.append(item)
                continue
            if item.get("result"):
                return dumps(dict(item["result"], model=self.model))
            self._note(item)
            reasoning.append(item.get("reasoning") or "")
            for delta in item.get("tool_calls") or ():
                _merge_call(calls, delta)
        self.tokens = len(texts)
        said = dumps("".join(texts))
        if self.chat:
            more = b""
            if any(reasoning):
                more += b',"reasoning_content":' + dumps("".join(reasoning))
            if calls:
                more += b',"tool_calls":' + dumps(calls)
                said = b"null" if said == b'""' else said
            said = b'"message":{"role":"assistant","content":%s%s}' % (said, more)
        else:
            said = b'"text":' + said
        reason = dumps(self.finish_reason) if self.finish_reason else (
            b'"tool_calls"' if calls else b'"stop"')
        return b'%s{"index":0,%s,"logprobs":null,"finish_reason":%s}],"usage":%s}' % (
            self.base, said, reason, self._usage())

    def chunk(self, delta, finish_reason=None, more=b""):
        """One event of a streamed answer, as bytes."""
        if self.chat:
            choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        else:
            choice = {"index": 0, "text": delta.get("content", ""), "logprobs": None,
                      "finish_reason": finish_reason}
        return b"data: %s%s]%s}\n\n" % (self.base, dumps(choice), more)

    def pieces(self, items):
        """The events for some items; texts that came together go as one."""
        parts, texts = [], []
        if not self.begun and self.chat:
            self.begun = True
            parts.append(self.chunk({"role": "assistant", "content": ""}))

        def flush():
            if texts:
                # Around each text stands the same: a fifth of a streamed token's cost.
                if self.around is None:
                    self.around = self.chunk({"content": ""}).split(b'""')
                parts.append(dumps("".join(texts)).join(self.around))
                self.tokens += len(texts)
                texts.clear()

        for item in items:
            if type(item) is str:
                texts.append(item)
                continue
            flush()
            self._note(item)
            if item.get("reasoning"):
                parts.append(self.chunk({"reasoning_content": item["reasoning"]}))
            if item.get("tool_calls"):
                parts.append(self.chunk({"tool_calls": item["tool_calls"]}))
        flush()
        return b"".join(parts) or b": \n\n"

    def end(self, include_usage):
        """The last events but [DONE]."""
        parts = [] if self.begun or not self.chat else [self.pieces(())]
        parts.append(self.chunk({}, self.finish_reason or "stop"))
        if include_usage:
            parts.append(b'data: %s],"usage":%s}\n\n' % (self.base, self._usage()))
        return b"".join(parts)


def _merge_call(calls, delta):
    """Add one delta of a tool call to the whole calls gathered so far."""
    index = delta.get("index")
    if not isinstance(index, int) or not 0 <= index <= len(calls):
        index = len(calls)
    if index == len(calls):
        calls.append({"id": "", "type": "function",
                      "function": {"name": "", "arguments": ""}})
    call, function = calls[index], delta.get("function") or {}
    call["id"] = delta.get("id") or call["id"]
    call["type"] = delta.get("type") or call["type"]
    for field in ("name", "arguments"):
        call["function"][field] += function.get(field) or ""


##############################################################################
# HTTP: operators and providers
##############################################################################


class OperatorFace:
    """Register a service, and manage it with its key."""

    def register(self):
        """POST /api/services: {name, operator, comment, invitation} -> {name, key}"""
        request = self.read_object(MAX_SMALL_BODY_BYTES, known=True)
        repeat = self.head.fields.get("idempotency-key")
        memory = self.server.registered
        if repeat and (self.caller(), repeat) in memory:
            body, answer = memory[self.caller(), repeat]
            if body != self.same:
                raise RelayError("key_reused", "This Idempotency-Key was used with "
                                 "another body.")
            return self.reply(201, answer)
        if self.server.registration == "closed":
            raise RelayError("forbidden", "Registration is closed here: ask whoever runs "
                             "this relay.")
        invitation = None
        if self.server.registration == "invited":
            invitation = digest(str(request.get("invitation"))[:200])
        name = request.get("name")
        if not isinstance(name, str) or not NAME.match(name) \
                or name.lower() in RESERVED_NAMES:
            raise RelayError("invalid_name", invalid_name_words(str(name)), param="name")
        texts = self._texts(request)
        if not self.local:
            self.server.registrations.take(
                self.address, self.limits.max_registrations_per_hour, 3600, "registrations")
        key = new_key()
        service = Service(name, digest(key), created=time.time(), **texts)
        with self.server.changing:
            self.broker.add(service)
            try:
                self.server.store.add(service, invitation)
            except BaseException:
                self.broker.remove(service)
                raise
        log("registered", service=name, address=self.address)
        answer = {"name": name, "key": key, "errorcode": 0}
        if repeat:
            memory[self.caller(), repeat] = self.same, answer
            if len(memory) > 100:
                memory.popitem(last=False)
        self.reply(201, answer)

    def _texts(self, request):
        texts = {}
        for field, most in TOTAL_TEXT.items():
            text = request.get(field)
            if text is None:
                continue
            if not isinstance(text, str) or len(text) > most or not all(
                    c.isprintable() for c in text):
                raise RelayError("invalid_request", "%s must be one line of text, at most "
                                 "%d characters." % (field, most), param=field)
            texts[field] = text
        return texts

    def service(self, name):
        """GET /api/services/{name}"""
        self.reply(200, self.broker.model(self.authorized(name)))

    def change_service(self, name):
        """PATCH /api/services/{name}: operator, comment, private, paused,
        anonymous_per_day, new_key"""
        service = self.authorized(name)
        request = self.read_object(MAX_SMALL_BODY_BYTES)
        answer, changes = {}, self._texts(request)
        for field in ("private", "paused", "new_key"):
            if not isinstance(request.get(field, False), bool):
                raise RelayError("invalid_request", "%s must be true or false." % field,
                                 param=field)
            if field in request and field != "new_key":
                changes[field] = request[field]
        if "anonymous_per_day" in request:
            check_fields(request, {"anonymous_per_day": (int, 1, 10**9)})
            changes["anonymous_per_day"] = request.get("anonymous_per_day")
        if request.get("new_key"):
            answer["key"] = new_key()
            changes["key_digest"] = digest(answer["key"])
        with self.server.changing:
            self.still_authorized(service)
            if changes:
                self.server.store.change(service, **changes)
            for field, value in changes.items():
                setattr(service, field, value)
        if answer:
            self.broker.close_sessions(service)
            log("new_key", service=service.name, address=self.address)
        self.reply(200, dict(self.broker.model(service), errorcode=0, **answer))

    def keys(self, name):
        """GET /api/services/{name}/keys: the access keys, with their use so far"""
        service = self.authorized(name)
        self.reply(200, {"errorcode": 0, "keys": [
            key.shown(time.time()) for key in list(service.keys.values())]})

    def add_key(self, name):
        """POST /api/services/{name}/keys: {label, limits} -> {id, key}"""
        service = self.authorized(name)
        request = self.read_object(MAX_SMALL_BODY_BYTES)
        check_fields(request, KEY_LIMITS)
        label = request.get("label", "")
        if not isinstance(label, str) or len(label) > 100 or not label.isprintable():
            raise RelayError("invalid_request", "label must be a short text.",
                             param="label")
        key = new_key()
        access = AccessKey(secrets.token_hex(8), digest(key), label, time.time(),
                           *[request.get(limit) for limit in KEY_LIMITS],
                           *(0, 0, 0, None))
        with self.server.changing:
            self.still_authorized(service)
            if len(service.keys) >= MAX_KEYS:
                raise RelayError("invalid_request", "%s has %d access keys: revoke some."
                                 % (service.name, MAX_KEYS))
            self.server.store.add_key(service, access)
            service.keys[access.digest] = access
        log("key_added", service=service.name, key_id=access.id)
        self.reply(201, dict(access.shown(time.time()), key=key, errorcode=0))

    def revoke_key(self, name, key_id):
        """DELETE /api/services/{name}/keys/{id}: in force at once, whatever the disk"""
        service = self.authorized(name)
        with self.server.changing:
            access = next((a for a in service.keys.values() if a.id == key_id), None)
            if access is None:
                raise RelayError("not_found", "%s has no such access key." % service.name)
            del service.keys[access.digest]
            log("key_revoked", service=service.name, key_id=key_id)
            self.server.revoked.append(access)         # off the disk, as soon as it can be
            self.server.save()
        self.reply(200, {"errorcode": 0})

    def delete_service(self, name):
        """DELETE /api/services/{name}"""
        service = self.authorized(name)
        with self.server.changing:
            self.still_authorized(service)
            self.server.store.remove(service)
            self.broker.remove(service)
        log("deleted", service=service.name, address=self.address)
        self.reply(200, {"name": service.name, "errorcode": 0})


ITEM_FIELDS = {"reasoning": str, "tool_calls": list, "finish_reason": str, "usage": dict,
               "result": dict}


def is_item(item):
    """Whether this can be a piece of an answer: a text, or a dict of known form."""
    if type(item) is str:
        return True
    if type(item) is not dict or any(
            type(item[field]) is not kind for field, kind in ITEM_FIELDS.items()
            if item.get(field) is not None):
        return False
    for call in item.get("tool_calls") or ():
        function = call.get("function") or {} if type(call) is dict else None
        if type(function) is not dict or any(
                type(text or "") is not str for text in (
                    call.get("id"), call.get("type"), function.get("name"),
                    function.get("arguments"))):
            return False
    return True


def is_plain(items):
    """Whether this is a list of texts in ASCII, as most are: so it needs no closer look."""
    try:
        return type(items) is list and "".join(items).isascii()
    except TypeError:
        return False


def is_place(job, attempt, at=0):
    """Whether this can be a job's id, and the numbers of its attempt and of an item."""
    return (type(job) is str and len(job) <= MAX_ID_CHARACTERS
            and type(attempt) is type(at) is int and 0 <= attempt | at < 2**31)


class ProviderFace:
    """The long-poll protocol. Each request carries the service key as bearer token."""

    def login(self, name):
        """POST login: {workers, continues, embeddings, context_length} -> {session}"""
        service = self.authorized(name)
        request = self.read_object(MAX_SMALL_BODY_BYTES)
        self.still_authorized(service)
        check_fields(request, {"workers": (int, 1, self.limits.max_workers),
                               "context_length": (int, 1, 10**9)})
        session = self.broker.login(
            service, request.get("workers", 1), bool(request.get("continues")),
            embeddings=bool(request.get("embeddings")),
            context_length=request.get("context_length"))
        log("login", service=service.name, address=self.address, session=session[:8])
        self.reply(200, {"session": session, "name": service.name, "errorcode": 0,
                         "lease_s": self.limits.lease_seconds,
                         "poll_s": self.limits.poll_seconds})

    def poll(self, name):
        """POST poll: {session, running: [[job, attempt]]} -> {jobs, cancel}"""
        service = self.authorized(name)
        request = self.read_object(MAX_SMALL_BODY_BYTES)
        self.still_authorized(service)
        session, running = self._session_of(request), request.get("running", [])
        try:
            running = [(job, attempt) for job, attempt in running]
            if not all(is_place(job, attempt) for job, attempt in running):
                raise ValueError
        except (TypeError, ValueError):
            raise RelayError("invalid_request", "running must be a list of [job, "
                             "attempt].", param="running") from None
        if len(running) > 4 * self.limits.max_workers:
            raise RelayError("invalid_request", "running has more than %d jobs."
                             % (4 * self.limits.max_workers), param="running")
        token = Poll()
        self.polled = session, token       # if this connection closes, so has the poll
        self.wire.when_gone(functools.partial(self.broker.lost, session, token))
        with self.taking(self.server.polls):
            jobs, cancels = self.broker.poll(service, session, token, running)
        self._send_work(jobs, cancels)

    def provider_reply(self, name):
        """POST reply: {session, replies: [entry]} -> {refused, jobs, cancel}"""
        service = self.authorized(name)
        request = self.read_object()
        self.still_authorized(service)
        session, entries = self._session_of(request), request.get("replies", [])
        if not isinstance(entries, list):
            raise RelayError("invalid_request", "replies must be a list.",
                             param="replies")
        for entry in entries:
            self._check_entry(entry)
        refused, jobs, cancels = self.broker.reply(service, session, entries)
        self._send_work(jobs, cancels, refused)

    def logout(self, name):
        """POST logout: {session}; its unfinished jobs go to others"""
        service = self.authorized(name)
        session = self._session_of(self.read_object(MAX_SMALL_BODY_BYTES))
        self.still_authorized(service)
        self.broker.logout(service, session)
        log("logout", service=service.name, address=self.address, session=session[:8])
        self.reply(200, {"errorcode": 0})

    def _session_of(self, request):
        session = request.get("session")
        if not isinstance(session, str):
            raise RelayError("invalid_request", "session must be the text that login "
                             "answered.", param="session")
        return session

    def _check_entry(self, entry):
        """Check one entry of a reply. What the provider's own program got wrong becomes
        an error of that one job, so that its client learns of it."""
        if type(entry) is not dict or not is_place(
                entry.get("job"), entry.setdefault("attempt", 0), entry.setdefault("at", 0)):
            raise RelayError("invalid_request", "Each entry of replies must have job, "
                             "attempt, at and items.", param="replies")
        items = entry.setdefault("items", [])
        if not is_plain(items):
            if not isinstance(items, list) or not all(map(is_item, items)):
                entry["items"] = []
                entry["error"] = {"message": "its reply is not text"}
            else:                          # half a surrogate pair is no text either
                entry["items"] = [
                    item if type(item) is dict or item.isascii()
                    else item.encode("utf-8", "replace").decode("utf-8")
                    for item in items]
        error = entry.get("error")
        if error:
            error = error if isinstance(error, dict) else {"message": error}
            name = error.get("error")
            entry["error"] = RelayError(
                name if isinstance(name, str) and name in PROVIDER_ERRORS
                else "provider_error",
                "The provider could not answer: %s." % printable(
                    error.get("message", "no reason given"), 500).rstrip("."))

    def _send_work(self, jobs, cancels, refused=None):
        """The response to poll and reply. The prompts are JSON already."""
        parts = []
        for job, attempt, at, text in jobs:
            request = job.payload
            if text is not None:
                request = request[:-1] + b',"reply_so_far":%s}' % dumps(text)
            parts.append(b'{"job":"%s","attempt":%d,"at":%d,"request":%s}' % (
                job.id.encode("ascii"), attempt, at, request))
        body = b'{"errorcode":0,"jobs":[%s],"cancel":%s' % (
            b",".join(parts), dumps(cancels) if cancels else b"[]")
        if refused is not None:
            body += b',"refused":%s' % (dumps(refused) if refused else b"[]")
        self.reply(200, body + b"}")


class Handler(PageFace, NativeFace, OpenAIFace, OperatorFace, ProviderFace, Connection):
    """A connection with all its faces."""


class Route:
    """What is done at one path: which handler for which method, and in which face."""

    def __init__(self, face, **handlers):
        self.face, self.handlers = face, handlers


CHALLENGE = Route("admin", GET="challenge")


def _routes():
    routes = {
        (): Route("native", GET="page", POST="native"),
        ("*",): Route("native", GET="page", POST="native"),
        (".well-known", "acme-challenge", "*"): CHALLENGE,
        ("healthz",): Route("admin", GET="health"),
        ("metrics",): Route("admin", GET="metrics"),
        ("api", "models"): Route("native", GET="models"),
        ("api", "services"): Route("operator", GET="models", POST="register"),
        ("api", "services", "*"): Route("operator", GET="service", PATCH="change_service",
                                        DELETE="delete_service"),
        ("api", "services", "*", "keys"): Route("operator", GET="keys", POST="add_key"),
        ("api", "services", "*", "keys", "*"): Route("operator", DELETE="revoke_key"),
    }
    for name, handler in (("login", "login"), ("poll", "poll"),
                          ("reply", "provider_reply"), ("logout", "logout")):
        routes["provider", "*", name] = Route("provider", POST=handler)
    for base in ((), ("v1",), ("*", "v1")):
        for path, route in (
                (("models",), Route("openai", GET="openai_models")),
                (("chat", "completions"), Route("openai", POST="chat")),
                (("completions",), Route("openai", POST="completions")),
                (("embeddings",), Route("openai", POST="embeddings")),
                (("responses",), Route("openai", POST="not_here")),
                (("messages",), Route("openai", POST="not_here"))):
            routes[base + path] = route
        routes[base + ("models", "*")] = Route("openai", GET="openai_model")
    return routes


ROUTES = _routes()    # "*" stands for one segment, a service's name


@functools.lru_cache(maxsize=MAX_PATHS_KNOWN)
def find_route(path):
    """Return (Route, arguments) for the segments of a path; (None, ()) if none fits."""
    if path[:2] == ("v1", "models") and len(path) > 3:
        path = path[:2] + ("/".join(path[2:]),)      # as in "meta-llama/Llama-3"
    if "*" in path:
        return None, ()
    route = ROUTES.get(path)
    if route is not None:
        return route, ()
    if len(path) <= 5:
        for index, segment in enumerate(path):
            pattern = path[:index] + ("*",) + path[index + 1:]
            route = ROUTES.get(pattern)
            if route is not None:
                return route, (segment,)
            if index < len(path) - 1 and ROUTES.get(pattern[:-1] + ("*",)):
                return ROUTES[pattern[:-1] + ("*",)], (segment, path[-1])
    return None, ()


##############################################################################
# Serving: connections, threads, TLS, signals
##############################################################################


LOG = {"format": "text"}    # or "json"


def log(event, **fields):
    """One line on standard error: when, what, and the fields as JSON. Never a prompt,
    a reply or a key."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    trace = ""
    if fields.pop("traceback", False):
        import traceback                   # rarely needed: kept out of the start-up
        trace = traceback.format_exc()
    if LOG["format"] == "json":
        fields.update({"traceback": trace} if trace else ())
        line = json.dumps(dict(time=now, event=event, **fields)) + "\n"
    else:
        line = "%s %s %s\n" % (now, event, " ".join(
            "%s=%s" % (name, json.dumps(value)) for name, value in fields.items())) + trace
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(line)
        sys.stderr.flush()


def ip_of(address):
    """A peer's IP address; what has none is this machine."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        ip = ipaddress.ip_address("127.0.0.1")
    return getattr(ip, "ipv4_mapped", None) or ip


def canonical_address(address):
    """A peer's address as limits count it: IPv4 as itself, IPv6 by its /64 network."""
    ip = ip_of(address)
    if ip.version == 6 and not ip.is_loopback:
        return str(ipaddress.ip_network((int(ip) >> 64 << 64, 64)))
    return str(ip)


@functools.lru_cache(maxsize=10000)
def is_loopback(address):
    """Whether a canonical address is this machine's own."""
    return ipaddress.ip_address(address.partition("/")[0]).is_loopback


@functools.lru_cache(maxsize=100)
def host_name(host):
    """The name in a Host header, without its port; "" if it is an address."""
    try:
        name = urllib.parse.urlsplit("//" + host).hostname or host
        try:
            ipaddress.ip_address(name)
            return ""
        except ValueError:
            return name
    except ValueError:
        return host


class Relay(ThreadingHTTPServer):
    """Accepts connections and gives each a thread; holds what they share."""

    daemon_threads = True
    request_queue_size = 1024              # the default, 5, drops bursts of connections
    allow_reuse_port = False

    def __init__(self, host="", port=0, *, store=None, limits=None, tls=None, page=None,
                 broker=None, registration="open", proxies=(), hops=1, names=(),
                 webroot=None, listener=None, plain=None):
        """tls: a Certificate, or None for plain HTTP. page: the bytes of chat.html.

        registration: one of REGISTRATION. proxies: ipaddress networks of proxies whose
        X-Forwarded-For is believed, that is the address `hops` from its end. names: by
        which clients may call the relay, if not by all. webroot: a folder with ACME's
        challenges. listener: a socket that listens already, in place of host and port.
        plain: a second one, on which a relay with TLS answers those challenges, and sends
        browsers to https.
        """
        self.proxies, self.hops = proxies, hops
        self.webroot, self.plain = webroot, plain
        self.limits = limits or Limits()
        self.store = store or Store(":memory:")
        self.broker = broker or Broker(self.limits)
        self.watcher = Watcher()
        self.tls = tls
        self.show(page)
        self.stopping = False
        self.active = set()                # connections with a request under way
        self.registration = registration
        # Held while services or keys change, or are compared with the file: whoever has
        # it sees no half of a change. Taken before the broker's and the store's locks.
        self.changing = threading.RLock()
        self.revoked = []                  # access keys that are still on the disk
        self._unsaved = {}                 # name -> Service whose counters are not
        self._trouble = None               # why they could not be written, as logged
        self._changes = self.store.changes()   # before it is loaded
        self.registrations, self.wrong_keys, self.changes = Rates(), Rates(), Rates()
        self.registered = OrderedDict()    # (caller, Idempotency-Key) -> body, answer
        self.counts = Counter()            # (what, label) -> how many
        limits, each = self.limits, self.limits.max_connections_per_address
        self.connections = Shares("connections", limits.max_connections, each)
        self.proxied = Shares("connections", math.inf, each)     # behind a proxy's
        self.polls = Shares("polls", limits.max_polls, -(-limits.max_polls // SHARE))
        self.waiting = Shares("places for prompts", limits.max_waiting,
                              -(-limits.max_waiting // SHARE))
        self.bytes = Shares("memory for so much at once", limits.max_held_bytes // 4,
                            limits.max_held_bytes // 8)   # of bodies and responses
        self.counting = threading.Lock()   # guards counts
        self.idle = OrderedDict()          # sockets on which no request has begun
        self._date = (0, b"")
        self._spare = os.open(os.devnull, os.O_RDONLY)   # see get_request
        for service in self.store.load():
            self.broker.add(service, returning=True)
        if not host and socket.has_dualstack_ipv6():
            self.address_family = socket.AF_INET6
        elif ":" in host:
            self.address_family = socket.AF_INET6
        super().__init__((host, port), Handler, bind_and_activate=listener is None)
        if listener is not None:
            self.socket.close()
            self.socket = listener
            self.server_address = listener.getsockname()
            self.server_port = self.server_address[1]
        # A page anywhere can make its own name mean 127.0.0.1 (DNS rebinding) and then
        # call a relay that only this machine can reach: what it is called gives it away.
        self.names = {name.lower() for name in names}
        if self.names or is_loopback(canonical_address(self.server_address[0])):
            self.names.add("localhost")

    def show(self, page):
        """Serve these bytes of chat.html from now on; None for no page."""
        self.page, self.csp = page, page and content_security_policy(page)

    def server_bind(self):
        """Bind, without the look-up of our own name that the base class makes."""
        if self.address_family == socket.AF_INET6:
            with contextlib.suppress(AttributeError, OSError):
                self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    @property
    def url(self):
        """Where this relay can be reached from this machine."""
        host = self.server_address[0]
        if host in ("", "0.0.0.0", "::"):
            host = "localhost"
        elif ":" in host:
            host = "[%s]" % host
        return "%s://%s:%d" % ("https" if self.tls else "http", host, self.server_port)

    def get_request(self):
        """Accept a connection. No TLS handshake here: a silent peer would hold up others."""
        return self._accept(self.socket)

    def _accept(self, listener):
        """Accept a connection; when out of descriptors, turn one away instead.

        Otherwise the listening socket stays readable and the loop spins: measured
        elsewhere at 350,000 failing accepts a second.
        """
        try:
            sock, address = listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self.count("refused_connections", "descriptors")
                self._close_idle()
                spare, self._spare = self._spare, None
                with contextlib.suppress(OSError, TypeError):
                    os.close(spare)
                    listener.accept()[0].close()
                with contextlib.suppress(OSError):
                    self._spare = os.open(os.devnull, os.O_RDONLY)
                time.sleep(0.05)
            raise
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5),
                            ("TCP_KEEPCNT", 3)):
            if hasattr(socket, name):      # a peer behind a NAT that forgot it
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        return sock, address

    def _accept_plain(self):
        """Accept what comes on the second socket, which is for who asks for plain HTTP."""
        while not self.stopping:
            try:
                self.process_request(*self._accept(self.plain))
            except OSError:
                time.sleep(0.05)           # it may go on failing

    def process_request(self, request, client_address):
        """Start a thread for a connection, if the limits allow one more."""
        address = canonical_address(client_address[0])
        if self.is_proxy(client_address[0]):
            address = None                 # its clients are counted, not itself
        try:
            self.connections.take(address)
        except RelayError as error:
            if error.name == "relay_busy":
                self._close_idle()
            return self._refuse(request, error)
        try:
            threading.Thread(target=self._serve, args=(request, client_address, address),
                             daemon=True).start()
        except RuntimeError:               # no more threads are to be had
            self.connections.give(address)
            self._close_idle()
            self._refuse(request, RelayError("relay_busy", "This relay has no more threads "
                                             "to give just now.", retry_after=5))

    def _serve(self, request, client_address, address):
        try:
            self.finish_request(request, client_address)
        except Exception as error:
            log("internal_error", error=printable(repr(error)), traceback=True)
        finally:
            try:
                self.shutdown_request(request)
            finally:
                self.connections.give(address)

    def _close_idle(self):
        """Make room for the next connection: close that on which nobody has begun a
        request for the longest time."""
        with contextlib.suppress(KeyError, OSError):
            self.idle.popitem(last=False)[0].shutdown(socket.SHUT_RDWR)

    def is_proxy(self, address):
        """Whether a peer's address is that of a trusted proxy."""
        return any(ip_of(address) in network for network in self.proxies)

    def forwarded_for(self, head, peer):
        """The address that a trusted proxy speaks for: what stands left in
        X-Forwarded-For is anybody's word, what stands right is the proxy's."""
        addresses = head.fields.get("x-forwarded-for", "").split(",")
        if len(addresses) >= self.hops:
            with contextlib.suppress(ValueError):
                return canonical_address(str(ipaddress.ip_address(
                    addresses[-self.hops].strip())))
        return peer

    def check_host(self, host, origin):
        """Raise RelayError if a Host header does not call the relay by one of its names,
        or if a relay for this machine alone is called by a page from elsewhere."""
        name = host_name(host)
        if self.names and name and name not in self.names:
            raise RelayError("forbidden", "This relay is not called %s. If it is, by a "
                             "proxy: start it with --allow-host %s." % (name, name))
        if origin and self.names == {"localhost"} and host_name(
                origin.partition("://")[2] or origin) not in ("", "localhost"):
            raise RelayError("forbidden", "This relay is for this machine alone, not for "
                             "pages of %s." % printable(origin, 60))

    def _refuse(self, request, error):
        """Say 503 without reading anything: over TLS there is no way to say it."""
        self.count("refused_connections", error.name)
        body = dumps(error.native())
        with contextlib.suppress(OSError, ValueError):
            if not self.tls:
                request.settimeout(0)
                request.send(STATUS_LINES[503] + b"Content-Type: application/json\r\n"
                             b"Retry-After: 5\r\nConnection: close\r\nContent-Length: %d"
                             b"\r\n\r\n" % len(body) + body)
        self.shutdown_request(request)

    def handle_error(self, request, client_address):
        """A connection that broke while it was being accepted: nothing to say."""

    def count(self, what, label):
        """Count one, for /metrics."""
        with self.counting:
            self.counts[what, label] += 1

    def date(self):
        """The Date header, made once a second."""
        now = int(time.time())
        if self._date[0] != now:
            self._date = now, b"Date: %s\r\n" % formatdate(now, usegmt=True).encode()
        return self._date[1]

    def start(self):
        """Serve in threads of its own; returns at once. stop() ends it."""
        targets = [self._keep_up, self._save_counters, self._take_care, self.watcher.run,
                   functools.partial(self.serve_forever, poll_interval=0.2)]
        if self.plain is not None:
            targets.append(self._accept_plain)
        for target in targets:
            threading.Thread(target=self._go_on, args=(target,), daemon=True).start()

    def _go_on(self, target):
        """Run what runs for as long as the relay does, whatever goes wrong in it."""
        while True:
            try:
                return target()
            except Exception as error:
                log("internal_error", error=printable(repr(error)), traceback=True)
                time.sleep(1)

    def _keep_up(self):
        while self.broker.upkeep():
            pass

    def _save_counters(self):
        while not self.broker.closed:
            self.broker.counters_changed.wait()
            time.sleep(SAVE_SECONDS)       # so that a burst is one transaction
            self.save()

    def save(self):
        """Write what counted since the last time. A full disk stops no prompt."""
        with self.changing:
            self._unsaved.update({s.name: s for s in self.broker.take_changed()})
            try:
                while self.revoked:
                    self.store.remove_key(self.revoked[0])
                    self.revoked.pop(0)
                if self._unsaved:
                    self.store.save(list(self._unsaved.values()))
                    self._unsaved.clear()
                self._trouble = None
            except sqlite3.Error as error:
                if str(error) != self._trouble:        # once, not at each attempt
                    self._trouble = str(error)
                    log("cannot_save", error=str(error))

    def _take_care(self):
        while not self.broker.closed:
            time.sleep(RELOAD_SECONDS)
            self.reload()
            if self.revoked or self._unsaved:          # the disk may have room again
                self.save()

    def reload(self):
        """Take up what has changed on the disk: the certificate, and what another process
        wrote into the data file. Never raises."""
        try:
            with self.changing:
                if self.tls:
                    self.tls.renew()
                changes = None if self.broker.closed else self.store.changes()
                if changes not in (None, self._changes):
                    self._take_up({s.name.lower(): s for s in self.store.load()})
                    self._changes = changes
        except Exception as error:
            log("cannot_reload", error=repr(error))

    def _take_up(self, there):
        """Make the services here those there, in the file, but for what is counted."""
        for service in self.broker.services():
            new = there.get(service.name.lower())
            if new is not None and new.created == service.created:
                self._take_up_changes(service, there.pop(service.name.lower()))
            elif service.stored:
                self.broker.remove(service)
                log("deleted", service=service.name)
        for service in there.values():
            self.broker.add(service, returning=True)
            log("registered", service=service.name)

    def _take_up_changes(self, service, new):
        for field in Service.SETTINGS:
            setattr(service, field, getattr(new, field))
        if service.key_digest != new.key_digest:
            service.key_digest = new.key_digest
            self.broker.close_sessions(service)
            log("new_key", service=service.name)
        for hashed in set(service.keys) - set(new.keys):
            del service.keys[hashed]
        revoked = {key.id for key in self.revoked}     # there only as the disk is full
        for hashed, key in new.keys.items():
            if key.id not in revoked:
                service.keys.setdefault(hashed, key)

    def stop(self, drain_seconds=0.0):
        """Stop: no new jobs; running ones may finish; then close everything."""
        self.stopping = True
        self.broker.drain()
        deadline = time.monotonic() + drain_seconds
        while not self.broker.idle() and time.monotonic() < deadline:
            time.sleep(0.05)               # once in a relay's life
        self.broker.close()
        deadline = time.monotonic() + 2    # for the last responses to be written
        while self.active and time.monotonic() < deadline:
            time.sleep(0.02)
        self.shutdown()
        self.server_close()
        if self.plain is not None:
            self.plain.close()
        self.save()
        with self.changing:
            self.store.close()
        with contextlib.suppress(OSError, TypeError):
            os.close(self._spare)


def content_security_policy(page):
    """The policy under which only the page's own script and style run: their hashes."""
    def hashes(tag):
        found = re.findall(rb"<%s[^>]*>(.*?)</%s>" % (tag, tag), page, re.S)
        return " ".join("'sha256-%s'" % base64.b64encode(hashlib.sha256(text).digest()).decode()
                        for text in found) or "'none'"
    return ("default-src 'none'; script-src %s; style-src %s; connect-src 'self'; "
            "img-src data:; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'" % (hashes(b"script"), hashes(b"style")))


def tls_context(cert, key):
    """The TLS side of a server with that certificate chain and private key."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= getattr(ssl, "OP_NO_RENEGOTIATION", 0)
    context.set_alpn_protocols(["http/1.1"])
    # A key with a pass phrase is refused: asking on the terminal would hold up all.
    context.load_cert_chain(cert, key, password=lambda: "")
    return context


class Certificate:
    """The certificate and key of a relay, in files that may be renewed while it runs."""

    def __init__(self, cert, key):
        """Raises OSError, of which ssl.SSLError is one, if they cannot be used."""
        self.files, self._seen = (cert, key), None
        self._seen = self._stamp()
        # Never changed, only replaced as a whole: other threads are using it, and a pair
        # that does not match would break every later handshake (security advice of ssl).
        self.context = tls_context(cert, key)

    def _stamp(self):
        """What is different once the files were written again."""
        try:
            return [(stat.st_mtime_ns, stat.st_size, stat.st_ino)
                    for stat in map(os.stat, self.files)]
        except OSError as error:
            return str(error)

    def renew(self):
        """Take the files up if they have changed. What cannot be used leaves the present
        certificate in service, and is logged, once."""
        stamp = self._stamp()
        if stamp != self._seen:
            self._seen = stamp
            try:
                until = certificate_of(*self.files)["notAfter"]    # a trial handshake
                self.context = tls_context(*self.files)
                log("certificate_renewed", file=self.files[0], until=until)
            except (OSError, ValueError) as error:
                log("certificate_not_renewed", file=self.files[0], error=str(error),
                    meaning="the one before stays in service")


def certificate_of(cert, key):
    """What clients are shown of that pair: a dict with notAfter, subjectAltName and more.

    Raises OSError, as ssl.SSLCertVerificationError when it is not valid at this time. ssl
    tells only of a peer's certificate that it has verified: so shake hands, in memory.
    """
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= 0x80000         # X509_V_FLAG_PARTIAL_CHAIN: no root is needed
    client.load_verify_locations(cert)
    there, here = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client.wrap_bio(here, there)
    server = tls_context(cert, key).wrap_bio(there, here, server_side=True)
    for side in (client, server, client):  # hello; hello and certificate; verdict
        with contextlib.suppress(ssl.SSLWantReadError):
            side.do_handshake()
    return client.getpeercert()


def self_signed(directory, make=True):
    """Return (cert, key): files of a certificate made here once, by openssl."""
    cert = os.path.join(directory, "neuroengine-cert.pem")
    key = os.path.join(directory, "neuroengine-key.pem")
    if make and not (os.path.exists(cert) and os.path.exists(key)):
        name = socket.gethostname()[:60] or "localhost"
        old = os.umask(0o077)
        try:
            subprocess.run(
                ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt",
                 "ec_paramgen_curve:prime256v1", "-nodes", "-days", "3650", "-subj",
                 "/CN=" + name, "-addext", "subjectAltName=DNS:%s,DNS:localhost,"
                 "IP:127.0.0.1" % name, "-keyout", key, "-out", cert],
                check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        except (OSError, subprocess.CalledProcessError) as error:
            raise StoreError("No certificate was given, and openssl could not make one "
                             "(%s): use --cert and --key, or --tls off." % error)
        finally:
            os.umask(old)
    return cert, key


##############################################################################
# Demo: a built-in provider, after Joseph Weizenbaum's Eliza (1966)
##############################################################################

ELIZA = (
    (r"\bi need (.*)", "Why do you need {}? Would it really help you to get {}?"),
    (r"\bi am (.*)", "How long have you been {}? How do you feel about being {}?"),
    (r"\bi feel (.*)", "Tell me more about feeling {}. Do you often feel {}?"),
    (r"\bbecause (.*)", "Is that the real reason? What else could be, if {}?"),
    (r"\bare you (.*)", "Why does it matter to you whether I am {}?"),
    (r"\bpoem\b", "Roses are red,\nviolets are blue,\nthis relay is running,\nand so, "
     "I hope, are you."),
    (r"\b(?:hello|hi|hey)\b", "Hello. How are you feeling today? I am Eliza, a demo that "
     "needs no model; share your own with `python3 neuroengine.py share NAME`."),
    (r"\?", "What do *you* think? And why do you ask?"),
    (r"", "Please go on: what does that suggest to you?"),
)
_MIRROR = {"i": "you", "me": "you", "my": "your", "am": "are", "mine": "yours",
           "you": "I", "your": "my", "are": "am", "myself": "yourself"}


def eliza(prompt):
    """Yield an answer to a prompt, word by word."""
    for pattern, answer in ELIZA:
        match = re.search(pattern, prompt, re.I)
        if match:
            break
    rest = match.group(1).strip(" .!?\n") if match.groups() else ""
    rest = " ".join(_MIRROR.get(word.lower(), word) for word in rest.split())
    return re.findall(r"\S+\s*|\s+", answer.format(rest, rest))


def serve_eliza(broker, service, pause=0.04):
    """Be a provider of a service, in this process. It shows how one polls and replies."""
    session = broker.login(service, workers=8)
    running = {}                           # (job id, attempt) -> set to cancel it

    def answer(job, attempt, at, cancelled):
        request = json.loads(job.payload)
        messages = request.get("messages") or [{}]
        prompt = request.get("message") or request.get("prompt") \
            or messages[-1].get("content") or ""
        for at, word in enumerate(eliza(prompt if isinstance(prompt, str) else "")):
            if cancelled.wait(pause):
                break
            push(job, attempt, at=at, items=[word])
        push(job, attempt, at=at + 1, items=[], done=True)
        running.pop((job.id, attempt), None)

    def push(job, attempt, **entry):
        with contextlib.suppress(RelayError):
            _, jobs, cancels = broker.reply(
                service, session, [dict(entry, job=job.id, attempt=attempt)])
            take(jobs, cancels)

    def take(jobs, cancels):
        for pair in cancels:
            if pair in running:
                running[pair].set()
        for job, attempt, at, _ in jobs:
            cancelled = running[job.id, attempt] = threading.Event()
            threading.Thread(target=answer, args=(job, attempt, at, cancelled),
                             daemon=True).start()

    while not broker.draining:
        with contextlib.suppress(RelayError):
            jobs, cancels = broker.poll(service, session, Poll(), list(running))
            take(jobs, cancels)


def start_demo(relay):
    """Add the service Eliza to a relay, and its provider in a thread."""
    service = Service("Eliza", "", "neuroengine", "A demo that needs no model",
                      time.time())
    relay.broker.add(service)
    threading.Thread(target=serve_eliza, args=(relay.broker, service),
                     daemon=True).start()


##############################################################################
# Command line
##############################################################################


TAKEN_UP = "a running relay takes that up within %d s" % RELOAD_SECONDS


def whole(text):
    """A number of things, for argparse."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def seconds(text):
    """A length of time, for argparse."""
    number = float(text)
    if not 0 <= number < 10**9:
        raise ValueError
    return number


def port_number(text):
    """A TCP port, for argparse."""
    number = int(text)
    if not 0 <= number <= 65535:
        raise ValueError
    return number


REGISTRATION = ("open", "invited", "closed")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter,
                    argparse.RawDescriptionHelpFormatter):
    """Shows each option's default, and the table of commands as it is."""


def build_parser():
    """The command line's options."""
    parser = argparse.ArgumentParser(
        prog="neuroengine_server.py", formatter_class=HelpFormatter,
        usage="%(prog)s [options] [COMMAND] [ARGUMENT]",
        description="The neuroengine relay: people share a locally hosted LLM through it.\n"
                    "Try it: python3 neuroengine_server.py --demo",
        epilog="commands, which work on the data file, also while the relay runs:\n"
               + "".join("  %-10s %-8s%s\n" % (name, argument, text)
                         for name, (_, argument, text) in COMMANDS.items()))
    add = parser.add_argument
    add("command", nargs="?", choices=list(COMMANDS), help=argparse.SUPPRESS)
    add("argument", nargs="?", default="", help=argparse.SUPPRESS)
    add("--host", default="", help="address to listen on; empty for all")
    add("--port", type=port_number, default=8000, help="port to listen on; 0 for any free one")
    add("--data", default="neuroengine.sqlite3", metavar="FILE",
        help="where services and counters are kept")
    add("--cert", metavar="FILE", help="certificate chain in PEM, for TLS")
    add("--key", metavar="FILE", help="its private key in PEM")
    add("--tls", choices=("auto", "off"), default="auto",
        help="auto: with --cert, or self-signed on port 443 and 8443; off: plain HTTP, "
             "for a relay behind a proxy that does TLS")
    add("--registration", choices=REGISTRATION, default="open",
        help="who may register a service: everybody, who has an invitation, nobody")
    add("--acme-webroot", metavar="DIR",
        help="certbot's webroot, so that it can renew while the relay runs")
    add("--acme-port", type=port_number, default=80, metavar="PORT",
        help="with --acme-webroot and TLS: plain HTTP for certbot, and for browsers, which "
             "are sent to https")
    add("--trusted-proxy", type=ipaddress.ip_network, action="append", default=[],
        metavar="ADDRESS", help="believe X-Forwarded-For of this address or network; may "
        "be given more than once")
    add("--trusted-hops", type=whole, default=1, metavar="N",
        help="how many such proxies, one behind the other")
    add("--allow-host", action="append", default=[], metavar="NAME",
        help="answer to this name only, and to localhost; may be given more than once; "
             "otherwise to any, or, if --host is this machine alone, to localhost")
    add("--log", choices=("text", "json"), default="text", help="form of the log's lines")
    add("--demo", action="store_true",
        help="loopback only, nothing on disk, and a built-in service Eliza")
    add("--version", action="version", version="neuroengine " + __version__)
    group = parser.add_argument_group("limits")
    for name, default, text in LIMITS:
        group.add_argument("--" + name.replace("_", "-"), default=default, metavar="N",
                           type=seconds if name.endswith("_seconds") else whole,
                           help=text)
    return parser


def parse(argv):
    """The options of a command line. Exits, with words, if they make no sense."""
    parser = build_parser()
    options = parser.parse_intermixed_args(argv)
    takes = COMMANDS[options.command][1] if options.command else ""
    if options.argument and not takes or takes.isalpha() and not options.argument:
        parser.error("%s takes %s" % (options.command, takes or "no argument"))
    if options.demo:
        options.data, options.host = ":memory:", options.host or "127.0.0.1"
    return options


def read_page():
    """The bytes of chat.html beside this file, or None."""
    try:
        with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "chat.html"),
                  "rb") as file:
            return file.read()
    except OSError:
        return None


def certificate_files(options, make=True):
    """The files (cert, key) that the options ask for, or None. Raises StoreError."""
    if options.tls == "off" and options.cert or options.key and not options.cert:
        raise StoreError("TLS needs --cert and --key together, and no --tls off.")
    if options.cert:
        return options.cert, options.key or options.cert
    if options.tls == "off" or options.port not in (443, 8443) or options.demo:
        return None
    return self_signed(data_directory(options), make)


def choose_tls(options):
    """The TLS context that the options ask for, or None. Raises StoreError."""
    files = certificate_files(options)
    try:
        return files and Certificate(*files)
    except (OSError, ValueError) as error:
        raise StoreError(cannot_use(files, error))


def cannot_use(files, error):
    """Say why a certificate and its key cannot be used."""
    why = str(getattr(error, "reason", None) or getattr(error, "strerror", None)
              or error).lower()
    for file in files:
        if not os.access(file, os.R_OK):
            why = file + (" may not be read by this user" if os.path.exists(file)
                          else " is not there")
    return ("The certificate %s with the key %s cannot be used: %s. Both are files in PEM "
            "form." % (*files, why.replace("_", " ")))


def data_directory(options):
    """Where the data file is, or will be."""
    return os.path.dirname(os.path.abspath(options.data))


def open_relay(options):
    """Build the relay that the options describe. Raises StoreError, OSError."""
    limits = Limits(**{name: getattr(options, name) for name, _, _ in LIMITS})
    listeners = inherited_listeners()
    if listeners:
        options.port = listeners[0].getsockname()[1]
    store, tls, plain = Store(options.data), choose_tls(options), None
    if tls and options.acme_webroot:
        plain = listeners[1] if listeners[1:] else listen_plain(options)
    return Relay(options.host, options.port, store=store, limits=limits, tls=tls,
                 page=read_page(), registration=options.registration,
                 proxies=options.trusted_proxy, hops=options.trusted_hops,
                 names=options.allow_host, webroot=options.acme_webroot, plain=plain,
                 listener=listeners[0] if listeners else None)


def inherited_listeners():
    """The sockets that systemd listens on for us (sd_listen_fds(3)): with them a restart
    refuses no connection."""
    count = 0
    if os.environ.get("LISTEN_PID") == str(os.getpid()):
        count = int(os.environ.get("LISTEN_FDS", "0"))
    return [socket.socket(fileno=3 + number) for number in range(count)]


def listen_plain(options):
    """The socket for certbot's challenges; None, with a warning, if it cannot be had."""
    try:
        if options.host:
            return socket.create_server((options.host, options.acme_port))
        dual = socket.has_dualstack_ipv6()
        return socket.create_server(("", options.acme_port), dualstack_ipv6=dual,
                                    family=socket.AF_INET6 if dual else socket.AF_INET)
    except OSError as error:
        print("warning: cannot listen on port %d for certbot: %s." % (
            options.acme_port, error.strerror or error), file=sys.stderr)
        return None


def cannot_listen(options, error):
    """Say why a port cannot be listened on."""
    why = error.strerror or str(error)
    if error.errno == errno.EADDRINUSE:
        why = "%s has it" % (who_listens(options.host, options.port) or "another program")
    elif error.errno == errno.EACCES:
        why = ("ports below 1024 are for root, or for who has CAP_NET_BIND_SERVICE, as "
               "deploy/neuroengine.service gives it")
    return "Cannot listen on %s port %d: %s. Choose another with --port." % (
        options.host or "any address", options.port, why)


def who_listens(host, port):
    """What the program that listens there calls itself over HTTP, or None."""
    any_peer = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    any_peer.check_hostname, any_peer.verify_mode = False, ssl.CERT_NONE
    for wrap in (contextlib.closing, any_peer.wrap_socket):
        with contextlib.suppress(OSError):
            with wrap(socket.create_connection((host or "localhost", port), 1)) as sock:
                sock.sendall(b"HEAD /healthz HTTP/1.0\r\n\r\n")
                match = re.search(rb"\r\nServer: ([\x21-\x7e]+)", sock.recv(4096), re.I)
                if match:
                    return match[1].decode("ascii")
    return None


# What the doctor looks at. Each check returns ("ok", "warning" or "error", words).


def check_versions(options):
    return "ok", "This is neuroengine %s on Python %s, %s, SQLite %s." % (
        __version__, sys.version.split()[0], ssl.OPENSSL_VERSION, sqlite3.sqlite_version)


def check_clock(options):
    words = time.strftime("The clock says %Y-%m-%d %H:%M UTC", time.gmtime())
    if time.time() < EARLIEST_TIME:
        return "error", words + (", which cannot be: set it (timedatectl set-ntp true), or "
                                 "certificates and keys seem to expire at wrong times.")
    return "ok", words + "."


def check_port(options):
    try:
        Relay(options.host, options.port).server_close()
    except OSError as error:
        words = cannot_listen(options, error)
        return ("ok", "A relay runs at port %d." % options.port
                ) if ": neuroengine has it" in words else ("error", words)
    return "ok", "Port %d is free." % options.port


def check_certificate(options):
    try:
        files = certificate_files(options, make=False)
        if files is None:
            return "ok", "It speaks plain HTTP: for this machine, or behind a proxy."
        if not options.cert:
            return "warning", ("The certificate %s is made here, so clients must be told "
                               "to trust it. For a real one: certbot certonly --standalone "
                               "-d YOUR.NAME, then --cert and --key; behind a proxy that "
                               "does TLS: --tls off." % files[0])
        seen = certificate_of(*files)
    except StoreError as error:
        return "error", str(error)
    except ssl.SSLCertVerificationError as error:
        return "error", "Clients will not accept the certificate %s: %s. Renew it." % (
            files[0], error.verify_message)
    except (OSError, ValueError) as error:
        return "error", cannot_use(files, error)
    words = "The certificate %s, for %s, is valid until %s" % (files[0], ", ".join(
        name for _, name in seen.get("subjectAltName", ())) or "no name", seen["notAfter"])
    if ssl.cert_time_to_seconds(seen["notAfter"]) - time.time() < RENEWAL_SECONDS:
        return "warning", words + ": renew it, and see why that was not done in time."
    return "ok", words + "."


def check_descriptors(options):
    needed, allowed = options.max_connections + OTHER_DESCRIPTORS, math.inf
    with contextlib.suppress(ImportError):
        import resource                    # not on Windows
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        allowed = hard if hard >= 0 else allowed
    if allowed < needed:
        return "warning", ("Only %d files may be open, and %d connections need %d: raise it "
                           "(LimitNOFILE= in a systemd unit, ulimit -Hn), or lower "
                           "--max-connections." % (allowed, options.max_connections, needed))
    return "ok", "Enough files may be open for %d connections." % options.max_connections


def check_data(options):
    directory = data_directory(options)
    if options.demo:
        return "ok", "Nothing is kept on disk."
    if not os.access(directory, os.W_OK | os.X_OK):
        return "error", ("The directory %s, for the data file, is missing, or may not be "
                         "written by this user. Another can be named with --data."
                         % directory)
    if not os.path.exists(options.data):
        return "ok", "The data file %s will be made at the first start." % options.data
    try:
        with contextlib.closing(Store(options.data, existing=True)) as store:
            return "ok", "The data file %s is whole%s." % (
                options.data, ", and will be brought up to date at the next start"
                if store.version < len(MIGRATIONS) else "")
    except StoreError as error:
        return "error", str(error)


def check_disk(options):
    directory = data_directory(options)
    free = shutil.disk_usage(directory).free // MIB if os.path.isdir(directory) else 0
    if free < MIN_FREE_MIB and not options.demo:
        return "warning", ("The disk of %s has only %d MB left: when it is full, no service "
                           "or key can be made, and counts are lost." % (directory, free))
    return "ok", "The disk has room: %d MB." % free


def check_page(options):
    if read_page() is None:
        return "warning", "There is no chat.html beside this program, so there is no page."
    return "ok", "The page, chat.html, is there."


AT_START = (check_versions, check_clock, check_certificate, check_descriptors, check_disk,
            check_page)


def run_doctor(options):
    found = [check(options) for check in (*AT_START, check_data, check_port)]
    for level, words in found:
        print("%-8s %s" % (level, words))
    return int("error" in dict(found))


# The other commands. Each gets the Store, and the argument.


def find_stored(store, name):
    """The stored service of that name, in any case. Raises StoreError."""
    for service in store.load():
        if service.name.lower() == name.lower():
            return service
    raise StoreError("There is no service %s." % name)


def run_list(store, _):
    for service in sorted(store.load(), key=lambda service: service.name.lower()):
        seen = "never connected" if service.last_seen is None else time.strftime(
            "last seen %Y-%m-%d %H:%M UTC", time.gmtime(service.last_seen))
        words = ["private"] * service.private + ["paused"] * service.paused + [
            "by " + printable(service.operator)] * bool(service.operator)
        print("%-24s %6d prompts  %3d keys  %-30s %s" % (
            service.name, service.numreq, len(service.keys), seen,
            " ".join(words)))


def run_reset_key(store, name):
    service, key = find_stored(store, name), new_key()
    store.change(service, key_digest=digest(key))
    print("%s has a new service key, which is not shown again; %s. Providers with the old "
          "one are logged out.\n%s" % (service.name, TAKEN_UP, key))


def run_delete(store, name):
    service = find_stored(store, name)
    store.remove(service)
    print("Deleted %s; %s." % (service.name, TAKEN_UP))


def run_invite(store, uses):
    try:
        uses = whole(uses or "1")
    except ValueError:
        raise StoreError("USES is a number: how many services may be registered with it.")
    code = new_key()
    store.invite(digest(code), uses)
    print("An invitation to register %d service%s, at a relay that runs with --registration "
          "invited. It is not shown again.\n%s" % (uses, "s" * (uses > 1), code))


def run_backup(store, path):
    try:
        store.backup(path)
    except OSError as error:
        raise StoreError("Cannot write %s: %s." % (path, error.strerror))
    print("Copied to %s. To restore it: stop the relay, copy it over the data file, delete "
          "the files of the same name with -wal and -shm, and start the relay." % path)


COMMANDS = {   # name: (function, its argument, what it does)
    "list": (run_list, "", "show the services"),
    "reset-key": (run_reset_key, "NAME", "give a service a new key; print it, this once"),
    "delete": (run_delete, "NAME", "delete a service"),
    "invite": (run_invite, "[USES]", "print an invitation to register, this once"),
    "backup": (run_backup, "FILE", "copy the data to a new file"),
    "doctor": (run_doctor, "", "say what is wrong; with all options that the relay has"),
}


def run_command(options):
    """Do what the command line asks for, beside running the relay; the exit status."""
    run = COMMANDS[options.command][0]
    if run is run_doctor:
        return run_doctor(options)
    try:
        with contextlib.closing(Store(options.data, existing=True)) as store:
            if store.version < len(MIGRATIONS) and run is not run_backup:
                raise StoreError("The data file %s is of an older neuroengine: the relay "
                                 "brings it up to date when it starts." % options.data)
            run(store, options.argument)
    except (StoreError, sqlite3.Error) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def raise_descriptor_limit():
    """Allow as many open files as the system lets us; each connection is one."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource                    # not on Windows
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def keep_to_one_core():
    """Run all threads on one core, where the system lets us choose.

    One interpreter lock lets one thread run at a time; on two cores they fight over it.
    Measured with 64 clients on two cores: 1.7 to 2 times the requests a second, for 0.6
    to 0.8 of the processor time of each.
    """
    if getattr(sys, "_is_gil_enabled", lambda: True)():
        with contextlib.suppress(AttributeError, OSError):    # Linux has it
            os.sched_setaffinity(0, {secrets.choice(sorted(os.sched_getaffinity(0)))})


def wake_up_calmly():
    """Let a thread that is woken not push aside the one that woke it.

    That one has the interpreter lock, so the other could only try for it and wait again.
    Measured with 64 clients: 5 instead of 20 switches between threads for each prompt,
    and two thirds of the processor time. The longer interval is for crowds: when 10,000
    connections end at once, it takes 1.5 instead of 34 s.
    """
    sys.setswitchinterval(0.02)
    with contextlib.suppress(AttributeError, OSError):       # Linux has it
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def main(argv=None):
    """Run the relay until a signal ends it, or one of COMMANDS; the exit status."""
    options = parse(argv)
    if options.command:
        return run_command(options)
    LOG["format"] = options.log
    raise_descriptor_limit()
    keep_to_one_core()
    wake_up_calmly()
    threading.stack_size(STACK_BYTES)
    try:
        relay = open_relay(options)
    except StoreError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(cannot_listen(options, error), file=sys.stderr)
        return 1
    for level, words in [check(options) for check in AT_START]:
        if level != "ok":
            print("%s: %s" % (level, words), file=sys.stderr)
    # The kernel may give a signal to any thread, and then nothing wakes the main one, in
    # which handlers run. The byte that Python writes to a wake-up socket always does.
    signals, wake_up = socket.socketpair()
    wake_up.setblocking(False)
    signal.set_wakeup_fd(wake_up.fileno())
    # Windows has none; and who closes a relay's terminal wants it to end.
    hangup = None if sys.stderr.isatty() else getattr(signal, "SIGHUP", None)
    for number in filter(None, (signal.SIGTERM, signal.SIGINT, hangup)):
        signal.signal(number, lambda *_: None)
    relay.start()
    print("neuroengine %s listens at %s" % (__version__, relay.url), flush=True)
    if options.demo:
        start_demo(relay)
        print("Open %s/Eliza in a browser. Ctrl-C stops it." % relay.url, flush=True)
    log("started", version=__version__, url=relay.url)
    while signals.recv(1)[0] == hangup:
        relay.reload()
        relay.show(read_page())
    log("stopping", drain_seconds=options.drain_seconds)
    for number in (signal.SIGTERM, signal.SIGINT):   # a second one ends it at once
        signal.signal(number, lambda *_: os._exit(1))
    relay.stop(options.drain_seconds)
    log("stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
