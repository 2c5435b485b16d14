#!/usr/bin/env python3
"""neuroengine relay: the meeting point for people who share an LLM from home.

A provider next to the LLM dials out to this relay and holds a long poll here.
A client sends a prompt for a service, the name under which the LLM is shared.
The relay queues it, hands it to a provider, and streams the answer back as it
is generated. It hosts no LLM, and it neither stores nor logs prompts or answers.

    python3 neuroengine_server.py --demo        # a working chat on this machine
    python3 neuroengine_server.py --port 8000   # a relay behind a TLS proxy
    python3 neuroengine_server.py --port 443 --cert fullchain.pem --key privkey.pem
    python3 neuroengine_server.py doctor        # what is wrong? --help: more commands

How to read this file. The spine comes first and takes about an hour; half an hour is enough
for post_native, submit_native; Jobs.submit, _accept_locked, _end_locked, _leave_locked;
Matcher.poll, push, _dispatch_locked, _lease_locked, _hand_over_locked, _push_locked,
_release_locked, _broken_locked, _silent_locked; Lease; Outlet.deliver, work. The machinery
follows, in sections of any order. "####" finds all sections; ROUTES, at the end of the spine,
lists all paths.

In: Connection -> Exchange -> handler -> Broker.submit (Admission says whether) -> Queue ->
Lease (a provider's right to work on a job) -> the response to its poll. Out: push -> Broker
-> Outlet (one per client's response) -> Connection.

Threads: one per request. A client's waits for Reader.woken (a whole answer's first for the
client's next bytes), a provider's poll for Session.has_response, upkeep for Timers. The
thread that pushes items also sends them; the client's own does what could block. When a peer
goes, HangUps calls hang_up (client) or poll_broken (provider). The Lobby holds idle
connections.

docs/ repeats the tables ERRORS, LIMITS and ..._FIELDS. Relay and provider can read what
passes through them.
"""

import sys

if sys.version_info < (3, 8):    # Python 2 cannot parse "from None", and shows this line
    raise SystemExit("neuroengine needs Python 3.8 or newer: try python3.") from None

import argparse
import base64
import bisect
import contextlib
import errno
import fnmatch
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
import queue
import re
import secrets
import select
import selectors
import shutil
import signal
import socket
import socketserver
import sqlite3
import ssl
import struct
import subprocess
import threading
import time
import urllib.parse
import zlib
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from email.utils import formatdate
from http.server import ThreadingHTTPServer

__version__ = "1.0.0"
__all__ = ["Broker", "Limits", "Relay", "RelayError", "Store", "main"]

##############################################################################
# Errors: what can go wrong, for every API
##############################################################################

ErrorKind = namedtuple("ErrorKind", "errorcode status type code retry")

# errorcode, of the native API: 10-29 request, 30-39 caller, 40-49 service or relay, 50-59
# provider, 60 session. type and code are OpenAI's. retry: whether trying again can help.
ERRORS = {name: ErrorKind(*row) for name, row in {
    "internal_error": (1, 500, "server_error", "internal_error", True),
    "invalid_request": (10, 400, "invalid_request_error", "invalid_value", False),
    "invalid_json": (11, 400, "invalid_request_error", "invalid_json", False),
    "invalid_name": (12, 400, "invalid_request_error", "invalid_name", False),
    "context_length_exceeded": (
        13, 400, "invalid_request_error", "context_length_exceeded", False),
    "bad_http": (14, 400, "invalid_request_error", "bad_http", False),
    "not_found": (15, 404, "invalid_request_error", "unknown_url", False),
    "method_not_allowed": (16, 405, "invalid_request_error", "method_not_allowed", False),
    "length_required": (17, 411, "invalid_request_error", "length_required", False),
    "request_too_large": (18, 413, "invalid_request_error", "request_too_large", False),
    "unsupported_encoding": (
        19, 415, "invalid_request_error", "unsupported_encoding", False),
    "head_too_large": (20, 431, "invalid_request_error", "head_too_large", False),
    "request_timeout": (21, 408, "invalid_request_error", "request_timeout", True),
    "invalid_key": (30, 401, "invalid_request_error", "invalid_api_key", False),
    "forbidden": (31, 403, "permission_error", "service_forbidden", False),
    "name_taken": (32, 409, "invalid_request_error", "name_taken", False),
    "key_reused": (33, 422, "invalid_request_error", "key_reused", False),
    "quota_exceeded": (34, 429, "insufficient_quota", "insufficient_quota", False),
    "invitation_needed": (35, 403, "permission_error", "invitation_needed", False),
    "service_unknown": (40, 404, "invalid_request_error", "model_not_found", False),
    "service_offline": (41, 503, "server_error", "provider_offline", True),
    "queue_full": (42, 503, "server_error", "queue_full", True),
    "rate_limited": (43, 429, "rate_limit_error", "rate_limit_exceeded", True),
    "relay_busy": (44, 503, "server_error", "relay_busy", True),
    "shutting_down": (45, 503, "server_error", "shutting_down", True),
    "still_waiting": (46, 202, "server_error", "still_waiting", True),
    "stream_unknown": (47, 404, "invalid_request_error", "stream_unknown", False),
    "service_paused": (48, 503, "server_error", "provider_paused", False),
    "provider_error": (50, 502, "server_error", "provider_error", False),
    "provider_lost": (51, 502, "server_error", "provider_disconnected", True),
    "provider_timeout": (52, 504, "server_error", "provider_timeout", False),
    "reply_too_large": (53, 502, "server_error", "reply_too_large", False),
    "cancelled": (54, 409, "invalid_request_error", "cancelled", False),
    "unsupported": (55, 400, "invalid_request_error", "unsupported_parameter", False),
    "session_unknown": (60, 404, "invalid_request_error", "session_unknown", False),
}.items()}


class RelayError(Exception):
    """What went wrong, in words for the person who asked.

    name: a row of ERRORS. retry, status, type, code: in place of the row's; the last three as
    the upstream LLM server sent them. param: the field at fault. retry_after: seconds. allow: the
    methods of a path. limit: the rate limit that was exceeded.
    """

    def __init__(self, name, words, *, param=None, retry_after=None, allow=None, retry=None,
                 limit=None, status=None, type=None, code=None):
        super().__init__(words)
        kind = ERRORS[name]
        self.name, self.words, self.param, self.allow = name, words, param, allow
        self.retry_after, self.limit = retry_after, limit
        self.errorcode, self.status = kind.errorcode, status or kind.status
        self.type, self.code = type or kind.type, code or kind.code
        self.retry = kind.retry if retry is None else retry

    def native(self):
        """The error as the native, the operators' and the provider API report it."""
        return {"reply": self.words, "errorcode": self.errorcode, "error": self.name,
                "retry": self.retry}


class PeerGone(Exception):
    """The peer went away: normal, and nobody to tell."""


##############################################################################
# Records
##############################################################################

JOB_BYTES = 4096             # what a job takes besides its payload and items
ITEM_BYTES = 64              # what an item takes besides its text


class Service:
    """A name under which an LLM is shared: its queue, and its providers' sessions."""

    def __init__(self, name, key_digest, operator="", comment="", created=0, numreq=0,
                 last_seen=None, private=False, paused=False, anonymous_per_day=None,
                 suggestions="[]", connected=0):
        self.name, self.key_digest = name, key_digest
        self.operator, self.comment, self.created = operator, comment, created
        self.numreq, self.last_seen = numreq, last_seen   # last_seen: wall clock
        self.private, self.paused = bool(private), bool(paused)
        self.anonymous_per_day = anonymous_per_day    # None: as the relay's limit says
        self.suggestions = suggestions    # prompts to try, a JSON list
        self.connected = connected    # sessions, as stored
        self.stored = False           # whether it is in the data file
        self.keys = {}                # digest -> AccessKey
        self.sessions = {}            # id -> Session, the connected ones
        self.idle = OrderedDict()     # sessions with a parked poll, a free worker, no outbox
        self.queue = Queue()          # jobs that wait
        self.job_seconds = None       # moving average
        self.tokens_per_second = None
        self.features = Features()    # as its last provider declared
        self.expected_until = 0.0     # until then prompts wait for a provider: after a restart
        self.cold = self.warm = None  # seconds to the first token, see Affinity

    def continues(self, but=None):
        """Whether a session other than `but` can continue an answer that another began."""
        return any(session.features.continues for session in self.sessions.values()
                   if session is not but)

    def can_answer(self, job):
        """Whether some session can answer this job, when it has a free worker."""
        return any(session.can_answer(job) for session in self.sessions.values())


class Features:
    """What a provider declared at login."""

    def __init__(self, continues=False, embeddings=False, context_length=None, apis=(),
                 vision=None, tools=None):
        self.continues = continues        # can continue an answer that another began
        self.embeddings = embeddings
        self.context_length = context_length          # in tokens; None: unknown
        self.apis = frozenset(apis)       # that it passes through
        self.vision, self.tools = vision, tools       # None: unknown

    def has(self, api):
        """Whether it passes an API through."""
        return api in self.apis or api == "embeddings" and self.embeddings


class Session:
    """One logged-in provider.

    connected (in service.sessions): it gets jobs. away: its poll broke close_seconds ago. It
    keeps the jobs that clients have seen. If it comes back, it has the others again that wait.
    closed: silent for lease_seconds, or logged out; its jobs go to others.
    """

    def __init__(self, service, workers, features, lock):
        self.id = secrets.token_hex(16)
        self.service, self.workers, self.features = service, workers, features
        self.leases = {}              # (job id, attempt) -> Lease; each occupies a worker
        self.outbox = OrderedDict()   # leases that its next response must mention
        self.ended = OrderedDict()    # pairs that it ended recently -> instant
        self.has_response = threading.Condition(lock)   # what its poll waits for: an outbox
                                      # that is not empty, a newer poll, the session's end
        self.poll = None              # the newest Poll
        self.parked = False           # whether that poll waits
        self.deadline = 0.0           # when silence becomes loss
        self.receiving_until = 0.0    # when a large response has surely arrived
        self.has_handover_timer = False  # for unconfirmed leases
        self.closed = False

    def free(self):
        """How many more jobs it can run now."""
        return self.workers - len(self.leases)

    def jobs(self):
        """The jobs it works on, oldest lease first, without cancelled ones."""
        return [lease.job for lease in self.leases.values() if lease.state != "cancelled"]

    def can_answer(self, job):
        """Whether it has the API that the job needs, and can continue what was begun."""
        return (job.needs is None or self.features.has(job.needs)) and (
            not job.seen or self.features.continues)

    def may_take(self, job):
        """Whether it may have this job now, or another session should."""
        if not self.can_answer(job):
            return False
        if job.prefers not in (None, self) and job.prefers.id in self.service.sessions:
            return False                   # see Affinity
        # Not again to the session that it was taken from, if another is free.
        return job.avoid is not self or not any(
            other.free() > 0 and other.can_answer(job)
            for other in self.service.sessions.values() if other is not self)

    def remember_ended(self, pair, now):
        """Note that the provider ended this lease: a poll on its way may name it."""
        self.ended[pair] = now
        if len(self.ended) > 16 + 2 * self.workers:
            self.ended.popitem(last=False)

    def forget_ended(self, before):
        """Forget what ended before that instant: no poll still names it."""
        while self.ended and next(iter(self.ended.values())) < before:
            self.ended.popitem(last=False)


class Poll:
    """One poll: its identity tells it from a newer one of the session."""

    broken = False                    # its connection has closed


class Job:
    """One prompt on its way, and the items that came back.

    An item is a str, or bytes: an object for what text cannot say (see docs/), kept as JSON
    because parsed it takes 18 times the memory.
    """

    MOVES = {  # the only ways a job changes its state
        "queued": ("leased", "failed", "cancelled"),
        "leased": ("queued", "done", "failed", "cancelled"),
        "done": (), "failed": (), "cancelled": (),
    }

    # Class attributes, because most jobs never change them.
    state = "queued"
    number = None                 # in the order of arrival, which ids cannot tell
    identity = None               # how other requests find it
    returned = False              # a provider had it: it goes before all others
    seen = 0                      # items that some reader was given
    resume_at = 0                 # where a read by key that names no `at` goes on
    attempt = deaths = 0          # leases so far; of them, those whose provider died
    died = False                  # whether the last lease is one of these
    lease = avoid = None          # its Lease; the Session that gave it back
    prefers = None                # the Session that should have it, for a while
    continued = False             # whether its session knew the conversation
    left_at = None                # when the last reader left
    stranded_at = -math.inf       # when the last provider left that could answer it
    error, error_told = None, False
    has_timer = False             # see _recheck_locked
    created = leased_at = first_at = ended_at = None
    encoded = None                # (encoder's name, bytes): the whole answer, made once

    def __init__(self, service, payload, caller="", *, holder=None, access=None, rated=False,
                 by_operator=False, urgent=False, wait=False, grace=None, cost=1, needs=None,
                 prefixes=()):
        self.id, self.service = next(JOB_IDS), service
        self.payload = payload            # JSON, as the provider gets it
        self.caller = caller              # "key ID", or an address
        self.holder = holder or caller    # the address whose memory it takes
        self.access = access              # the AccessKey it counts for
        self.rated = rated                # rate limits apply
        self.by_operator = by_operator    # it goes before others
        self.urgent = urgent              # the same: it costs nearly nothing
        self.wait = wait                  # it queues even without a provider
        self.grace = grace                # seconds that it lives without a reader
        self.cost = cost                  # how many prompts it counts as
        self.needs = needs                # the API that its provider must have; None: text
        self.prefixes = prefixes          # see prefixes_of
        self.items, self.readers = [], []
        self.size = 0                     # bytes that it takes, all together

    def move(self, state):
        """Change the state, in one of the ways that MOVES has."""
        if state not in self.MOVES[self.state]:
            raise AssertionError("job %s cannot go from %s to %s" % (
                self.id, self.state, state))
        self.state = state

    def answer_bytes(self):
        """What its items take, and its encoded answer."""
        return self.size - JOB_BYTES - len(self.payload)

    def readable(self):
        """Whether its items may be shown: not while it waits to be generated anew."""
        return self.state != "queued" or self.seen > 0


class Identity:
    """What makes a second request mean the same job.

    kind "stream": a stream key. "repeat": an Idempotency-Key. "body": an equal body of the
    same caller; it finds only a job that its client left. fingerprint: of the prompt, which
    must not differ.
    """

    __slots__ = ("kind", "key", "fingerprint")

    def __init__(self, kind, service, *name, fingerprint=None):
        self.kind, self.key = kind, (kind, service) + name
        self.fingerprint = fingerprint

    @property
    def named(self):
        """Whether the client chose it, and so may come back for the answer."""
        return self.kind != "body"


class Reader:
    """One client's hold on a job: it has read up to `cursor`."""

    __slots__ = ("job", "cursor", "resumed_at", "woken", "wanted", "deliver", "has_work",
                 "attached", "gone")

    def __init__(self, job, cursor):
        self.job, self.cursor = job, cursor
        self.resumed_at = None        # the job's resume_at, before this one advanced it
        self.woken = None             # the condition its own thread waits for
        self.wanted = math.inf        # number of items at which it wants to be told
        self.deliver = None           # called by the thread that brings items, see deliver_to;
                                      # None: its own thread is woken
        self.has_work = False         # for its own thread
        self.attached, self.gone = True, False


##############################################################################
# Queue: whose turn it is
##############################################################################


LOOK_AHEAD = 8               # jobs of one caller: the first may be kept for another session


class Queue:
    """The jobs that wait for one service.

    Returned jobs go first, by number; then the operator's, then urgent ones, then all others.
    Within each of these three kinds callers take turns; those of one IPv6 /48 share theirs.
    """

    def __init__(self):
        self._returned = []           # (number, job), sorted
        self._operators, self._urgent, self._others = self._kinds = (
            OrderedDict(), OrderedDict(), OrderedDict())    # group of callers -> its line
        self._positions = None        # Job -> queue position, until something changes
        self.size = 0                 # of all together

    def __iter__(self):
        yield from self._returned_jobs()
        for lines in self._kinds:
            yield from itertools.chain.from_iterable(lines.values())

    def count_like(self, job):
        """How many prompts of this job's caller wait; or of the operator, if it is one."""
        if job.by_operator:
            return sum(map(len, self._operators.values()))
        group = widest_group(job.caller)
        return sum(other.caller == job.caller for lines in (self._urgent, self._others)
                   for other in lines.get(group, ()))

    def add(self, job):
        """Put a job where it belongs."""
        self.size += 1
        self._positions = None
        if job.returned:
            bisect.insort(self._returned, (job.number, job))
        else:
            self._lines_of(job).setdefault(widest_group(job.caller), deque()).append(job)

    def _lines_of(self, job):
        """The lines of a job that no provider has had."""
        if job.by_operator:
            return self._operators
        return self._urgent if job.urgent else self._others

    def remove(self, job):
        """Take out this very job."""
        self.size -= 1
        self._positions = None
        if job.returned:
            del self._returned[bisect.bisect_left(self._returned, (job.number,))]
            return
        lines, group = self._lines_of(job), widest_group(job.caller)
        lines[group].remove(job)
        if not lines[group]:
            del lines[group]

    def take(self, session):
        """Take out this session's next job; None if there is none. It skips jobs that it may
        not take, so that the others need not wait for them."""
        for _, job in self._returned:
            if session.may_take(job):
                self.remove(job)
                return job
        for lines in self._kinds:
            for group, line in lines.items():
                for job in itertools.islice(line, LOOK_AHEAD):
                    if session.may_take(job):
                        self.remove(job)
                        if line:
                            lines.move_to_end(group)           # behind the other callers
                        return job
        return None

    def _returned_jobs(self):
        return (job for _, job in self._returned)

    def position(self, job):
        """The job's rank among those that wait; 1 is next."""
        # Cached: each of 1,000 waiting streams asks every two seconds.
        if self._positions is None:
            order = itertools.chain(self._returned_jobs(), *map(in_turns, self._kinds))
            self._positions = {job: rank for rank, job in enumerate(order, 1)}
        return self._positions[job]


def in_turns(lines):
    """The jobs of these lines as their callers' turns come."""
    turns = [(turn, job) for line in lines.values() for turn, job in enumerate(line)]
    return [job for _, job in sorted(turns, key=lambda pair: pair[0])]


##############################################################################
# Lease: one job in one session's hands
##############################################################################


class Lease:
    """A provider's right to work on a job, named by (job id, attempt).

    It occupies a worker until it has ended. Its state says what both sides know:

    offered     goes out with the session's next response
    handed_out  a response carried it; the provider has not named it yet
    confirmed   the provider named it in a poll, or pushed items for it
    cancelled   the provider must stop, and has not said that it did
    ended       over

    If a poll does not name a lease that its provider was sent, the provider has lost it. The
    lease is offered again if the provider can begin or continue the job; else it counts as
    handed_out once more, and handover_seconds later the job goes to another session.
    """

    MOVES = {
        "offered": ("handed_out", "confirmed", "ended"),
        "handed_out": ("offered", "confirmed", "cancelled", "ended"),
        "confirmed": ("offered", "handed_out", "cancelled", "ended"),
        "cancelled": ("cancelled", "ended"),
        "ended": (),
    }
    TO_SAY = ("offered", "cancelled")     # in the next response

    __slots__ = ("session", "job", "pair", "state", "since", "sent", "offers")

    def __init__(self, session, job, pair, state, now):
        """job: None if the provider has no right to it and must be told to stop."""
        self.session, self.job, self.pair = session, job, pair
        self.state, self.since = state, now
        self.sent = state != "offered"     # whether the provider may have it
        self.offers = 0                    # responses that carried it
        session.leases[pair] = self
        if state in self.TO_SAY:
            session.outbox[self] = True

    def move(self, state, now):
        """Change the state, in one of the ways that MOVES has."""
        if state not in self.MOVES[self.state]:
            raise AssertionError("lease %s cannot go from %s to %s" % (
                self.pair, self.state, state))
        self.state, self.since = state, now
        self.sent = self.sent or state in ("handed_out", "confirmed")
        if state in self.TO_SAY:
            self.session.outbox[self] = True
        else:
            self.session.outbox.pop(self, None)
        if state == "ended":
            del self.session.leases[self.pair]

    def confirm(self, now):
        """The provider named it, or pushed items for it."""
        if self.state == "confirmed":          # as with all items but the first
            self.since = now
        else:
            self.move("confirmed", now)

    def stop(self, now):
        """Tell the provider to stop, unless it does not have this lease."""
        self.move("ended" if self.state == "offered" else "cancelled", now)
        self.job = None           # a provider that never answers must hold no memory


##############################################################################
# Timers: what happens when
##############################################################################


class Timers:
    """A heap of calls and their instants on the injected clock. Its user holds the lock.
    Arguments name a job by its id, so that no timer keeps a Job in memory."""

    def __init__(self, clock, lock):
        self._clock, self._heap = clock, []
        self._numbers = itertools.count()          # equal instants keep their order
        # Upkeep waits for it; call_later notifies.
        self._earlier = threading.Condition(lock)

    def __len__(self):
        return len(self._heap)

    def call_later(self, delay, action, *arguments):
        """Call action(*arguments) in `delay` seconds. Nothing cancels a timer: the action must
        look at the facts again."""
        due = self._clock() + delay
        if not self._heap or due < self._heap[0][0]:
            self._earlier.notify()
        heapq.heappush(self._heap, (due, next(self._numbers), action, arguments))

    def drop(self, action, is_wanted):
        """Forget the calls action(*arguments) for which is_wanted(*arguments) is false."""
        self._heap = [entry for entry in self._heap
                      if entry[2] != action or is_wanted(*entry[3])]
        heapq.heapify(self._heap)

    def run_due(self):
        """Call what is due."""
        while self._heap and self._heap[0][0] <= self._clock():
            _, _, action, arguments = heapq.heappop(self._heap)
            action(*arguments)

    def wait(self):
        """Block until something is due, or woken."""
        if not self._heap:
            self._earlier.wait()
        elif self._heap[0][0] > self._clock():
            self._earlier.wait(self._heap[0][0] - self._clock())

    def wake(self):
        """Let the waiting thread look again."""
        self._earlier.notify_all()


##############################################################################
# Admission: memory, queue bounds, rate limits, quotas, reserved room
##############################################################################


class Admission:
    """Whether a prompt is accepted. Its user, the Broker, holds the lock.

    When memory is full, room is made by what Memory.victim names; else the asker gets
    relay_busy. Bodies on their way have a Room of their own.
    """

    def __init__(self, limits, clock, wall):
        self._limits, self._clock, self._wall = limits, clock, wall
        self._rates, self.quotas = Rates(clock), Quotas(wall)
        self.memory = Memory(limits.max_held_bytes)

    def admit(self, job):
        """Raise RelayError unless service, quota, queue and rate limits allow this job; return
        the job that must leave a full queue for it, or None. Rates are charged first, even if
        memory is full then: a caller above them makes no others give way."""
        service = job.service
        if service.paused and not job.by_operator:
            raise paused_error(service)
        if job.access is not None:
            job.access.check_quota(self._wall(), job.cost)
        if not (service.sessions or job.wait or self._clock() < service.expected_until):
            raise offline_error(service, self._wall())
        victim = self._check_queue(job)
        charge_rates(job, limits=self._limits, rates=self._rates, quotas=self.quotas)
        return victim

    def _check_queue(self, job):
        """Return the job that must leave a full queue for this one, or None."""
        service, limits = job.service, self._limits
        mine = service.queue.count_like(job)
        if mine >= limits.max_queue_per_caller:
            raise too_many_waiting_error(service, mine, limits, self.retry_after(service))
        most = limits.max_queue
        if job.by_operator or job.access is not None:
            most += most // RESERVED           # a tenth more, for when no stranger gives way
        victim = gives_way(service.queue, job) if service.queue.size >= limits.max_queue else None
        if service.queue.size >= most and victim is None:
            raise queue_full_error(service, self.retry_after(service))
        return victim

    def job_accepted(self, job):
        """Count what a job takes, for its holder and its access key."""
        self.memory.add(job, JOB_BYTES + len(job.payload))
        access = job.access
        if access is not None:
            access.requests += job.cost
            access.running += 1
            access.last_used = self._wall()

    def job_ended(self, job):
        """Count the end of a job for its access key."""
        job.access.running -= 1
        job.access.tokens += count_tokens(job.items)

    def eta(self, service, position):
        """Seconds until that queue position is answered; None: unknown."""
        workers = sum(session.workers for session in service.sessions.values())
        if service.job_seconds is None or not workers:
            return None
        return round(service.job_seconds * position / workers, 1)

    def retry_after(self, service):
        """Seconds until a full queue may have room."""
        eta = self.eta(service, service.queue.size)
        return 10 if eta is None else min(max(math.ceil(eta), 1), 120)


##############################################################################
# Broker: matches jobs with polls, and carries items to readers
##############################################################################

MAX_LEASES_PER_JOB = 3       # then no provider can answer it
MAX_OFFERS_PER_LEASE = 3     # then the provider ignores it, and another gets the job
MAX_DEATHS_PER_JOB = 2       # then the prompt is the cause
MAX_READERS_PER_JOB = 100    # then a push takes 9 ms
CROSSING = 0.2               # of handover_seconds: so late a poll may have crossed a response
REPEAT_AFTER = 0.5           # of handover_seconds: then what was said may be said again
POLL_GAP_SECONDS = 0.5       # a provider with a free worker polls again within this
MAX_UNKNOWN_LEASES = 64      # of a session, which could make up any number
MAX_HANDOVER_BYTES = 1 << 22     # of prompts in one response, if more than one
HANDOVER_BYTES_PER_SECOND = 1 << 16      # a provider that receives more slowly is silent


class DeliveryLock:
    """The broker's lock. The thread that releases it then makes the deliveries gathered under
    it: items go out in the thread that brought them, but not under the lock. A wait would hold
    them up, so no method gathers deliveries and then waits."""

    def __init__(self):
        self.lock = threading.Lock()
        self.deliveries = []

    def __enter__(self):
        self.lock.acquire()

    def __exit__(self, kind, error, trace):
        if not self.deliveries:
            return self.lock.release()
        deliveries, self.deliveries = self.deliveries, []
        self.lock.release()
        for deliver in deliveries:
            deliver()


class Jobs:
    """The clients' half of the Broker: all jobs, in memory.

    A client submits a prompt or opens a stream, reads until the job has ended, and leaves.
    Methods named _locked need the lock; the others take it, except find.

    The Broker is one class in three parts: Jobs, Matcher (next), and Broker (in the machinery:
    services, lost responses, ended jobs, memory, metrics).
    """

    def __init__(self, limits=None, *, clock=time.monotonic, wall=time.time):
        self.limits = limits or Limits()
        self._clock, self._wall = clock, wall
        self.now = clock              # every time in a Job is by this clock
        # Guards everything below, and all records. All conditions share it.
        self._lock = DeliveryLock()
        self._services = {}           # lower-case name -> Service
        self._sessions = {}           # id -> Session, also those that are away
        self._jobs = {}               # id -> Job
        self._identified = {}         # Identity.key -> Job
        self._timers = Timers(clock, self._lock.lock)
        self._stale = 0               # timers of jobs that were forgotten
        self._admission = Admission(self.limits, clock, wall)
        self._memory = self._admission.memory
        self._affinity = Affinity(self.limits.max_conversations, clock)
        self._changed = {}            # name -> Service whose counters are not saved
        self.counters_changed = threading.Event()
        self.draining = self.closed = False
        self._version = 0             # counts changes of services and sessions
        self.counts = {"jobs": 0, "done": 0, "failed": 0, "cancelled": 0, "requeued": 0,
                       "continued": 0, "tokens": 0}
        self.histograms = {name: Histogram() for name in (
            "queue_seconds", "first_token_seconds", "answer_seconds")}

    def find(self, name):
        """Return the Service of that name, in any case. Raises RelayError."""
        service = self._services.get(name.lower())
        if service is None:
            if not is_name(name):
                raise RelayError("invalid_name", invalid_name_words(name), param="model")
            raise RelayError("service_unknown", "There is no service %s here." % name,
                             param="model")
        return service

    # -- clients, in the order a job lives --

    def submit(self, job, identity=None, at=None):
        """Accept a job, or find the one that has this Identity; return a Reader, from item
        offset `at`. Raises RelayError. Does not block."""
        with self._lock:
            known = self._find_job_locked(identity)
            if known is not None:
                return self._attach_locked(known, at)
            if at:                         # what came before is gone
                raise stream_unknown_error(self.limits)
            self._accept_locked(job)
            if identity is not None:
                job.identity = identity
                self._identified[identity.key] = job
            reader = self._attach_locked(job, at)
            self._prefer_locked(job)
            self._enqueue_locked(job)
            self._dispatch_locked(job.service)
            return reader

    def _accept_locked(self, job):
        """Count a new job, if it may be queued. Raises RelayError."""
        if self.draining:
            raise self._shutting_down()
        self._check_service_locked(job.service)
        if job.access is not None and job.access.digest not in job.service.keys:
            raise key_revoked_error()          # while the body came
        job.number, job.created = next(JOB_NUMBERS), self._clock()
        if job.grace is None:
            job.grace = self.limits.grace_seconds
        service, size = job.service, JOB_BYTES + len(job.payload)
        if not self._make_room_in_share_locked(size, job.holder):
            raise share_taken_error(size, self.limits)
        victim = self._admission.admit(job)
        if not self._make_room_locked(size, job.holder):
            # Not counted after all: a quota is renewed only in a day.
            charge_quota(job, self.limits, self._admission.quotas, -job.cost)
            raise memory_full_error()
        if victim is not None:
            self._cancel_locked(victim, gave_way_error(
                service, self._admission.retry_after(service)))
        self._admission.job_accepted(job)
        self._jobs[job.id] = job
        self.counts["jobs"] += 1
        service.numreq += 1
        self._save_later_locked(service)

    def open(self, identity, at=None):
        """Return a Reader of a job that was submitted before. Raises RelayError."""
        with self._lock:
            return self._attach_locked(self._known_job_locked(identity), at)

    def read(self, reader, most=None):
        """Return (the next items, at most `most`; whether none will follow). Does not block:
        see deliver_to, and wait_for_items."""
        with self._lock:
            if reader.job.ended_at is None and not reader.job.readable():
                return [], False
            return self._take_items_locked(reader, most)

    def deliver_to(self, reader, deliver, wanted):
        """From now on call deliver() when the job has ended, and when items have come and it
        has `wanted` in all. The thread that brought them calls it: it must not block. For what
        came before, call it yourself."""
        with self._lock:
            reader.deliver, reader.wanted = deliver, wanted

    def wake_owner(self, reader):
        """Wake the reader's own thread: it has work."""
        with self._lock:
            reader.has_work = True
            self._wake_locked(reader)

    def wait_for_work(self, reader, timeout):
        """Block the reader's own thread until wake_owner, until it has left or its client has
        gone, or for timeout seconds."""
        with self._lock:
            self._wait_locked(reader, timeout,
                              lambda: reader.has_work or not reader.attached)
            reader.has_work = False

    def leave(self, reader, delivered=False):
        """Detach the reader. delivered: what it read has reached its client."""
        with self._lock:
            self._leave_locked(reader, delivered)

    def hang_up(self, reader):
        """The reader's client has hung up."""
        with self._lock:
            reader.gone = True
            self._leave_locked(reader, False)      # which wakes it, unless it has left

    def cancel(self, job, error=None):
        """Stop a job, whatever it is doing; nothing happens if it has ended."""
        with self._lock:
            self._cancel_locked(job, error)

    # -- jobs and their readers; a job is in its service's queue while it is "queued" --

    def _find_job_locked(self, identity):
        """Return the job that a request of this identity means, or None."""
        job = self._identified.get(identity.key) if identity is not None else None
        if job is None or not identity.named and job.left_at is None:
            return None
        if identity.fingerprint is not None and (
                job.identity.fingerprint != identity.fingerprint):
            raise key_reused_error()
        return job

    def _known_job_locked(self, identity):
        """Return the job of this identity. Raises RelayError."""
        job = self._find_job_locked(identity)
        if job is None:
            raise stream_unknown_error(self.limits)
        return job

    def _attach_locked(self, job, at):
        """Return a new Reader of the job, from that item offset. Raises RelayError."""
        if len(job.readers) >= MAX_READERS_PER_JOB:
            raise too_many_readers_error()
        job.left_at = None
        reader = Reader(job, job.resume_at if at is None else min(at, len(job.items)))
        job.readers.append(reader)
        return reader

    def _wait_locked(self, reader, timeout, is_true):
        """Block until is_true(), or the reader's client has gone, or the timeout."""
        if timeout <= 0 or reader.gone or is_true():
            return
        deadline = self._clock() + timeout
        # Only this thread waits for it; _wake_locked notifies.
        reader.woken = reader.woken or threading.Condition(self._lock.lock)
        while not (reader.gone or is_true()):
            left = deadline - self._clock()
            if left <= 0:
                return
            reader.woken.wait(left)

    def _wake_locked(self, reader):
        """Wake the reader's own thread, if it waits."""
        if reader.woken is not None:
            reader.woken.notify()

    def _take_items_locked(self, reader, most):
        """Do what read does, for a job whose items may be shown."""
        job, cursor = reader.job, reader.cursor
        items = job.items[cursor:None if most is None else cursor + most]
        reader.cursor += len(items)
        job.seen = max(job.seen, reader.cursor)
        return items, job.ended_at is not None and reader.cursor >= len(job.items)

    def _tell_readers_locked(self, job):
        """Items came, or the job has ended: tell the readers that want to know."""
        for reader in job.readers:
            if job.ended_at is not None or len(job.items) >= reader.wanted:
                if reader.deliver is not None:
                    self._lock.deliveries.append(reader.deliver)
                else:
                    self._wake_locked(reader)

    def _leave_locked(self, reader, delivered):
        """Detach a reader; see what becomes of a job without any."""
        if not reader.attached:
            return
        reader.attached, reader.deliver = False, None
        self._wake_locked(reader)
        job = reader.job
        job.readers.remove(reader)
        if not delivered and reader.resumed_at is not None and (
                job.resume_at == reader.cursor):
            job.resume_at = reader.resumed_at         # its last read did not arrive
        if job.readers:
            return
        named = job.identity is not None and job.identity.named
        if job.ended_at is not None and not named and (
                delivered or job.identity is None or job.state != "done"):
            self._forget_locked(job)
        elif job.id in self._jobs:
            job.left_at = self._clock()
            if job.ended_at is not None:
                self._memory.keep(job)     # without a reader: the first to make room
            if job.identity is not None:   # an equal body may have taken its place
                self._identified[job.identity.key] = job
            self._recheck_locked(job)

    def _enqueue_locked(self, job):
        """Queue a job; if no connected provider can answer it, for a short time only. To be
        followed by _dispatch_locked."""
        job.service.queue.add(job)
        if not job.service.can_answer(job):
            job.stranded_at = self._clock()
            self._timers.call_later(self.limits.offline_seconds, self._deserted_locked,
                                    job.service, job.id)

    def _end_locked(self, job, state, error=None):
        """End a job: state is "done", "failed" or "cancelled"."""
        if job.state == "queued":
            job.service.queue.remove(job)
        job.move(state)
        job.ended_at, job.error = self._clock(), error
        self.counts[state] += 1
        if job.lease is not None:
            job.lease.move("ended", job.ended_at)
            job.lease = None
        if job.access is not None:
            self._admission.job_ended(job)
            self._save_later_locked(job.service)
        if state == "done":
            self._measure_locked(job)
        self._tell_readers_locked(job)
        if job.identity is not None and job.identity.kind == "repeat" and state != "done":
            # The same Idempotency-Key tries again after a failure; a stream key does not.
            self._disown_locked(job)
        if job.identity is not None and job.identity.named:
            self._memory.keep(job)         # its client may come back for the answer
            self._recheck_locked(job)
        elif not job.readers and (state != "done" or job.identity is None):
            self._forget_locked(job)
        elif not job.readers:              # it waits for an equal body
            self._memory.keep(job)

    def _cancel_locked(self, job, error=None):
        """Do what cancel does, and tell the provider to stop."""
        if job.ended_at is not None:
            return
        error = error or cancelled_error()
        lease = job.lease
        if lease is not None:
            job.lease = None
            lease.stop(self._clock())
            lease.session.has_response.notify()
        self._end_locked(job, "cancelled" if error.name == "cancelled" else "failed", error)
        if lease is not None:
            self._idle_locked(lease.session)
        self._dispatch_locked(job.service)     # to a free worker, or what stood behind this one


class Matcher(Jobs):
    """The providers' half of the Broker: matches jobs with their polls.

    A provider logs in, polls and pushes, and logs out. One thread runs upkeep.

    When a poll's connection breaks, its unseen jobs are queued again after close_seconds, before
    all others (_broken_locked). After lease_seconds of silence, not counting the hold of an
    idle poll, the session ends (_silent_locked), and the jobs that clients have seen go to
    another session that can continue them, or fail. A provider that is back sooner, and names a
    job that still waits, has it again. Two deaths (a confirmed lease lost) or three leases end
    a job.
    """

    # -- providers --

    def login(self, service, workers=1, **features):
        """Open a session for up to `workers` jobs; return its id. features: of Features."""
        with self._lock:
            if self.draining:
                raise self._shutting_down()
            self._check_service_locked(service)
            if len(service.sessions) >= self.limits.max_sessions:
                raise too_many_sessions_error(service)
            session = Session(service, workers, Features(**features), self._lock.lock)
            service.features = session.features
            self._sessions[session.id] = session
            self._connect_locked(session)
            self._heard_locked(session)
            self._timers.call_later(self.limits.lease_seconds, self._silent_locked, session)
            return session.id

    def poll(self, service, session_id, this_poll, running, timeout=None):
        """Wait for work; return (offers, cancels).

        offers: tuples (Job, attempt, offset of its next item, text so far or None).
        cancels: pairs (job id, attempt). running: the pairs that the provider has in hand; what
        it does not name is offered again, what it has no right to is cancelled. this_poll: a
        new Poll, for poll_broken. Blocks up to timeout, poll_seconds, or busy_poll_seconds while
        jobs run, so that silence is noticed within the lease.
        """
        with self._lock:
            session = self._session_locked(service, session_id)
            if this_poll.broken:
                return [], []                   # nobody hears this
            session.poll, session.receiving_until = this_poll, 0.0
            session.has_response.notify_all()        # an older poll of this session ends
            if session.id not in service.sessions:
                self._connect_locked(session)
            self._confirm_locked(session, running)
            self._fill_locked(session)
            hold = self._poll_seconds_locked(session, timeout)
            self._heard_locked(session, 0 if session.jobs() else hold)
            try:
                self._park_locked(session, this_poll, hold)
            finally:
                if session.poll is this_poll:
                    session.parked = False
                    service.idle.pop(session, None)
            if session.poll is not this_poll or this_poll.broken:
                return [], []                   # a newer one speaks, or this one broke
            if session.closed:
                raise session_unknown_error()
            self._fill_locked(session)          # what else fits, if a job woke this poll
            session.deadline = min(session.deadline,
                                   self._clock() + self.limits.lease_seconds)
            return self._hand_over_locked(session)

    def push(self, service, session_id, entries):
        """Take items for many jobs; return (refused, offers, cancels), the last two as poll.

        An entry is a dict: job, attempt, at (offset of its first item), items; at the end done
        or error (a RelayError); raw, if it is not text; fault, a RelayError, if check_entry found
        it malformed, which ends the job. Repeats are dropped. refused: what was not taken, as
        {job, error}: "gap", with `at`, the offset to push from, or "fenced": the session has no
        such lease. Raises RelayError.
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
            return (refused,) + self._hand_over_locked(session)

    def logout(self, service, session_id):
        """End a session, and release its jobs: see _release_locked."""
        with self._lock:
            self._end_session_locked(self._session_locked(service, session_id))

    def poll_broken(self, session_id, this_poll):
        """The connection of this poll has closed."""
        with self._lock:
            this_poll.broken = True             # even if the poll has not begun
            session = self._sessions.get(session_id)
            if session is None or session.poll is not this_poll or session.closed:
                return
            session.has_response.notify_all()
            session.service.idle.pop(session, None)
            session.parked, session.receiving_until = False, 0.0
            session.deadline = min(session.deadline,
                                   self._clock() + self.limits.lease_seconds)
            for lease in session.leases.values():
                if lease.state == "handed_out":
                    # If the next poll does not name it, it is offered again at once.
                    lease.since = self._clock() - REPEAT_AFTER * self.limits.handover_seconds
            self._timers.call_later(self.limits.close_seconds, self._broken_locked, session,
                                    this_poll)

    # -- time --

    def upkeep(self):
        """Run the next timers, waiting for them; return False once closed."""
        self.expire()          # delivers before this thread waits, see DeliveryLock
        with self._lock:
            if not self.closed:
                self._timers.wait()
            return not self.closed

    def expire(self):
        """Run the timers that are due. Does not block."""
        with self._lock:
            self._timers.run_due()

    # -- leases --

    def _dispatch_locked(self, service):
        """Give waiting jobs to the sessions in service.idle, which take turns."""
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
            session.has_response.notify()

    def _fill_locked(self, session):
        """Lease jobs to a session's free workers, for the response being made."""
        service, took = session.service, False
        left = MAX_HANDOVER_BYTES - sum(
            len(lease.job.payload) for lease in session.outbox if lease.job is not None)
        while (session.id in service.sessions and session.free() > 0 and not self.draining
               and left > 0):
            job = service.queue.take(session)
            if job is None:
                break
            self._lease_locked(job, session)
            left -= len(job.payload)
            took = True
        self._idle_locked(session)
        if took:                           # others may take what stood behind those jobs
            self._dispatch_locked(service)

    def _idle_locked(self, session):
        """Put the session into service.idle, or take it out. One with an outbox is awake: it
        takes more by itself, as much as fits."""
        if session.parked and session.free() > 0 and not (session.closed or session.outbox):
            session.service.idle.setdefault(session)
        else:
            session.service.idle.pop(session, None)

    def _lease_locked(self, job, session):
        """Give a job from the queue to a session."""
        job.move("leased")
        if job.items and not job.seen:                # this one begins anew
            job.items.clear()
            self._memory.hold(job, JOB_BYTES + len(job.payload) - job.size)
            job.first_at = None
        job.attempt += 1
        job.lease = Lease(session, job, (job.id, job.attempt), "offered", self._clock())
        if job.first_at is None:           # else its answer goes on
            job.leased_at = self._clock()
        if job.prefixes:
            self.counts["continued"] += self._affinity.note(job, session)

    def _poll_seconds_locked(self, session, timeout):
        """How long a poll of this session is held, in seconds."""
        limits = self.limits
        hold = limits.busy_poll_seconds if session.jobs() else limits.poll_seconds
        if any(lease.state == "handed_out" for lease in session.leases.values()):
            hold = min(hold, REPEAT_AFTER * limits.handover_seconds)  # it may be repeated then
        return hold if timeout is None else min(hold, timeout)

    def _park_locked(self, session, this_poll, timeout):
        """Block until this poll has something to say, or a newer one has come."""
        deadline, idle = self._clock() + timeout, not session.jobs()
        while not (session.outbox or session.closed or self.closed
                   or session.poll is not this_poll or this_poll.broken):
            if self.draining and not session.jobs():
                raise self._shutting_down()
            left = deadline - self._clock()
            if left <= 0 or idle and session.jobs():   # a push took what woke this poll
                return
            session.parked = True
            self._idle_locked(session)
            session.has_response.wait(left)

    def _hand_over_locked(self, session):
        """Empty the outbox into a response: (offers, cancels), as poll returns them."""
        offers, cancels, now = [], [], self._clock()
        size = sum(len(lease.job.payload) for lease in session.outbox
                   if lease.state == "offered")
        arrival = now + size // HANDOVER_BYTES_PER_SECOND
        for lease in list(session.outbox):
            if lease.state == "offered":
                job = lease.job
                offers.append((job, job.attempt, len(job.items),
                               text_of(job.items) if job.items else None))
                lease.move("handed_out", arrival)
                lease.offers += 1
            else:
                cancels.append(lease.pair)
                lease.since = now
        session.outbox.clear()
        if offers:
            session.receiving_until = max(session.receiving_until, arrival)
            self._heard_locked(session)
            self._check_handover_later_locked(session, self.limits.handover_seconds)
        return offers, cancels

    def _push_locked(self, session, entry):
        """Add one entry's items to its job; return a refusal as a dict, or None."""
        now, pair, at = self._clock(), (entry["job"], entry["attempt"]), entry["at"]
        # Or the provider seemed to be gone.
        lease = session.leases.get(pair) or self._restore_lease_locked(session, pair, at)
        error = entry.get("error")
        ending = entry.get("done") or error
        if lease is None or lease.state == "cancelled":
            return self._refuse_locked(session, pair, ending, now)
        job, items = lease.job, entry.get("items", ())
        have = len(job.items)
        if not ending or at > have:
            lease.confirm(now)
        fault = entry.get("fault") or (
            not_text_error() if entry.get("raw") and job.needs is None else None)
        if fault is not None:
            self._cancel_locked(job, fault)
            return self._refuse_locked(session, pair, ending, now)
        if at > have:
            return {"job": pair[0], "error": "gap", "at": have}
        if at < have:
            items = items[have - at:]                 # the others are here already
        if ending:
            session.remember_ended(pair, now)
        if items and not self._append_locked(job, items, now):
            return self._refuse_locked(session, pair, ending, now)
        if ending:
            self._end_locked(job, "failed" if error else "done", error)
        elif items:
            self._tell_readers_locked(job)
        return None

    def _refuse_locked(self, session, pair, ending, now):
        """The refusal of an entry for a job that is the session's no more."""
        lease = session.leases.get(pair)
        if ending and lease is not None:              # no need to tell it to stop
            session.remember_ended(pair, now)
            lease.move("ended", now)
        return {"job": pair[0], "error": "fenced"}

    def _append_locked(self, job, items, now):
        """Add items to a job; return False if there is no room, which ends the job."""
        size = size_of(items)
        if job.size + size > self.limits.max_reply_bytes + JOB_BYTES + len(job.payload):
            self._cancel_locked(job, reply_too_large_error(self.limits))
        elif not self._make_room_locked(size, job.holder):
            self._cancel_locked(job, memory_full_error())
        if job.ended_at is not None:
            return False
        self._memory.hold(job, size)
        self.counts["tokens"] += len(items)
        if not job.items:
            job.first_at = now
        job.items.extend(items)
        return True

    def _release_locked(self, lease, died):
        """Take a job from its session: back to the queue, or to its end. To be followed by
        _dispatch_locked."""
        job, session = lease.job, lease.session
        if lease.sent:
            job.died = died and lease.state == "confirmed"    # it had begun to work on it
            job.deaths += job.died
        else:
            job.attempt -= 1               # the provider never received that attempt
        lease.move("ended", self._clock())
        job.lease = None
        self._idle_locked(session)
        service = session.service
        if job.deaths >= MAX_DEATHS_PER_JOB or job.attempt >= MAX_LEASES_PER_JOB:
            self._end_locked(job, "failed", lost_too_often_error(job))
        elif job.seen and not (only_text(job.items) and service.continues(but=session)):
            # Half a tool call, say, cannot be continued.
            self._end_locked(job, "failed", lost_midway_error(service))
        elif self.draining:
            self._end_locked(job, "failed", self._shutting_down())
        else:
            job.move("queued")
            self.counts["requeued"] += 1
            job.avoid, job.returned = session, True
            # The others have time to poll.
            self._timers.call_later(POLL_GAP_SECONDS, self._open_to_all_locked, job.id)
            self._enqueue_locked(job)

    # -- lost responses: each poll names what its provider has in hand --

    def _confirm_locked(self, session, running):
        """Compare what the provider has in hand with what we think it has."""
        now, running = self._clock(), set(running)
        unknown = sum(lease.job is None for lease in session.leases.values())
        for pair in running:
            lease = session.leases.get(pair) or self._restore_lease_locked(session, pair)
            if lease is not None and lease.state != "cancelled":
                lease.confirm(now)
            elif lease is not None:
                # Say it again only if the response that said it may have been lost.
                if now - lease.since >= REPEAT_AFTER * self.limits.handover_seconds:
                    lease.move("cancelled", now)
            elif pair not in session.ended and unknown < MAX_UNKNOWN_LEASES:
                # Not its own (else its last push overtook this poll).
                Lease(session, None, pair, "cancelled", now)
                unknown += 1
        for lease in list(session.leases.values()):
            if lease.pair not in running and lease not in session.outbox:
                self._missing_locked(session, lease, now)

    def _missing_locked(self, session, lease, now):
        """A poll does not name this lease, which was mentioned in an earlier response."""
        if lease.state == "cancelled":
            lease.move("ended", now)                  # the provider has stopped
        elif now - lease.since < CROSSING * self.limits.handover_seconds:
            pass                                      # it may have crossed this poll
        elif lease.offers < MAX_OFFERS_PER_LEASE and (not lease.job.items or (
                session.features.continues and only_text(lease.job.items))):
            lease.move("offered", now)                # it was lost there, or on the way
        elif lease.state == "confirmed":
            # It was begun there, and would be begun again behind the items we have.
            lease.move("handed_out", now)
            self._check_handover_later_locked(session, self.limits.handover_seconds)

    # -- sessions that come and go --

    def _session_locked(self, service, session_id):
        """Return a session of this service. Raises RelayError."""
        session = self._sessions.get(session_id)
        if session is None or session.service is not service:
            raise session_unknown_error()
        return session

    def _connect_locked(self, session):
        """The provider gets jobs, and the directory shows it."""
        session.service.sessions[session.id] = session
        session.service.last_seen = self._wall()
        self._save_later_locked(session.service)

    def _disconnect_locked(self, session):
        """The provider gets no more jobs."""
        service = session.service
        service.idle.pop(session, None)
        if service.sessions.pop(session.id, None) is None:
            return
        service.last_seen = self._wall()
        self._save_later_locked(service)
        stranded = [job for job in service.queue
                    if session.can_answer(job) and not service.can_answer(job)]
        for job in stranded:
            job.stranded_at = self._clock()
        if stranded:
            self._timers.call_later(self.limits.offline_seconds, self._deserted_locked,
                                    service)
        self._dispatch_locked(service)     # what was kept for this one, or from others

    def _heard_locked(self, session, hold=0.0):
        """The provider spoke: its silence counts from now, or from the end of its poll."""
        due = max(self._clock() + hold, session.receiving_until) + self.limits.lease_seconds
        # A push does not shorten what a parked poll allows.
        session.deadline = max(due, session.deadline) if session.parked else due

    def _end_session_locked(self, session, died=False):
        """End a session, and release its jobs."""
        self._sessions.pop(session.id, None)
        session.closed = True
        self._disconnect_locked(session)
        for job in session.jobs():
            self._release_locked(job.lease, died)
        self._dispatch_locked(session.service)
        session.has_response.notify_all()

    # -- timers: each looks at the facts again, for they may have changed --

    def _silent_locked(self, session):
        """Every lease_seconds, per session: has its provider spoken?"""
        if session.closed:
            return
        left = session.deadline - self._clock()
        session.forget_ended(self._clock() - self.limits.lease_seconds)
        if left > 0:
            # The deadline may come forward.
            self._timers.call_later(min(left, self.limits.lease_seconds),
                                    self._silent_locked, session)
        else:
            self._end_session_locked(session, died=True)

    def _broken_locked(self, session, this_poll):
        """close_seconds after a poll broke: has the provider polled again?"""
        if session.closed or session.poll is not this_poll:
            return
        self._disconnect_locked(session)
        # If a client has seen the beginning, wait: the provider may come back and continue.
        for job in session.jobs():
            if not job.seen:
                self._release_locked(job.lease, died=True)
        self._dispatch_locked(session.service)


##############################################################################
# Exchange: one request and its one response
##############################################################################

JSON = "application/json"
MAX_SMALL_BODY_BYTES = 1 << 18   # of requests that are neither a prompt nor a push
LARGE_BODY_BYTES = 1 << 16       # only one of these is parsed at a time


class Exchange:
    """One request and its response. One thread runs it until it has ended. HttpExchange, in the
    machinery, reads its body and makes its bytes."""

    head = None                        # of the request, once it was read
    api = "native"                     # see ERROR_FORMS
    local = False                      # from this machine
    trusted = False                    # with the service's key
    keep_alive, body_read = False, True
    started = False                    # whether a part of the response was made
    slot = None                        # in bounds.waiting
    began = 0.0                        # when its head was complete
    fingerprint = None                 # SHA-256 of the body
    parsing = False                    # whether it holds bounds.large_bodies
    head_slot = None                   # in bounds.bytes, if its head is large

    def __init__(self, relay, connection):
        self.relay, self.connection = relay, connection
        self.broker, self.limits, self.bounds = relay.broker, relay.limits, relay.bounds
        self.id = next(REQUEST_IDS)
        self.address = connection.address  # whose limits count; run replaces a proxy's

    def run(self):
        """Read the request and answer it; return whether the connection may be used again.
        Blocks until then. Raises PeerGone."""
        try:
            self.head = head = read_head(self.connection, self.limits)
            self.body_read = head.length == 0
            self.keep_alive = head.keep_alive and not self.relay.stopping
            self.began = self.broker.now()
            if self.connection.proxied:
                self.address = self.relay.forwarded_for(head, self.address)
                with self.bounds.proxied.take(self.address):
                    self._dispatch(head)
            else:
                self._dispatch(head)
        except (PeerGone, socket.timeout, ConnectionError):
            raise PeerGone()
        except Exception as error:
            if self.head is None:          # it was never parsed: guess from the raw bytes
                self.api = guess_api(self.connection.last_head)
            self.fail(self.explain(error))
        finally:
            self.release_large_body()
            self.release_slot()
            if self.head_slot is not None:
                self.head_slot.release()
        return self.keep_alive and self.body_read

    def _dispatch(self, head):
        """Find the handler and call it. Raises RelayError."""
        if head.size > SMALL_HEAD_BYTES:
            self.head_slot = self.bounds.bytes.take(self.address, head.size, reserved=True)
        if self.relay.names.known:
            self.relay.names.check(head.fields)
        self.local = self.connection.near and not head.forwarded
        route, arguments = head.route
        if self.relay.tls and self.connection.tls is None and route is not CHALLENGE:
            return redirect_to_https(self)
        if route is None:
            self.api = guess_api(self.connection.last_head)
            raise no_path_error(head)
        self.api = route.api
        self.relay.tally.count("requests", route.api)
        handler = route.handlers.get("GET" if head.method == "HEAD" else head.method)
        if handler is None and head.method == "OPTIONS":
            return answer_options(self, route)
        if handler is None:
            raise no_method_error(head, route)
        if route.api == "operator":
            check_manager(self)
        globals()[handler](self, *arguments)       # most are defined further down

    # -- the request --

    def caller(self, access=None):
        """Whom turns and limits count for: the access key, else the address."""
        return "key " + access.id if access is not None else self.address

    def take_slot(self, reserved):
        """Take a slot in bounds.waiting until the answer. reserved: for operators and key
        holders."""
        self.slot = self.bounds.waiting.take(self.address, reserved=reserved,
                                            give_way=self.connection.abort)

    def release_slot(self):
        """Give the slot back, once."""
        slot, self.slot = self.slot, None
        if slot is not None:
            slot.release()

    def fail(self, error):
        """Answer with an error. Raises PeerGone, also if a part of the response was sent."""
        self.release_slot()
        self.release_large_body()
        if self.started:
            raise PeerGone()               # too late for a status: cut it short
        self.send_whole(*self.error_response(error))


##############################################################################
# Outlet: moves one answer to its connection, from any thread
##############################################################################

PIECE_BYTES = 1 << 18        # of a streamed answer, or one item
DIRECT_BYTES = 1 << 16       # more must wait for memory, in the exchange's own thread
DIRECT_ITEM_BYTES = DIRECT_BYTES // 6    # JSON escapes need up to six bytes for one
WHOLE_WAIT_SECONDS = 0.25    # see WholeOutlet.run
QUEUE_NEWS_SECONDS = 2       # how often a queued stream hears of its queue position


class Outlet:
    """Moves one answer to its connection. Subclasses say what to send next.

    Threads that bring items call deliver, which never blocks: not waking a thread for each
    token halves its processor time. The exchange's own thread calls answer, and does the rest:
    what a full socket did not take, large pieces, heartbeats, queue news. Only the thread that
    holds _sending reads items and sends.
    """

    def __init__(self, exchange, reader, encoder):
        self.exchange, self.reader, self.encoder = exchange, reader, encoder
        self.job, self.connection = reader.job, exchange.connection
        self.broker, self.limits = exchange.broker, exchange.limits
        self.complete = False              # the connection has the last byte
        self.fault = None                  # of a thread that brought items
        self._sending = threading.Lock()   # taken before the Broker's lock, never after

    def answer(self):
        """Send the whole answer, in the exchange's own thread. Raises PeerGone, or RelayError
        before the response has begun."""
        if self.exchange.slot is not None:
            self.exchange.slot.give_way = self._give_way
        self.connection.when_gone(functools.partial(self.broker.hang_up, self.reader))
        try:
            self.run()
        except RelayError as error:
            # After any other error the client may come back.
            self.complete = not self.exchange.started and (
                error is self.job.error or error.name == "still_waiting")
            raise
        finally:
            with self._sending:               # wait for a thread that is sending
                if self.reader.attached:   # else deliver has left it
                    delivered = self.complete and not self.connection.unsent
                    self.broker.leave(self.reader, delivered)

    def _give_way(self):
        """The slot is needed for others."""
        if len(self.job.readers) > 1:      # the job is not only this client's
            return self.connection.abort()
        self.broker.cancel(self.job, slot_lost_error())

    def deliver(self):
        """Send what has come, in the thread that brought it. Never blocks, never raises."""
        if not self._sending.acquire(False):
            return self.broker.wake_owner(self.reader)
        try:
            if self.complete or self.fault or not self.reader.attached:
                return
            if not self.connection.unsent:
                self.send_next(may_block=False)
            if self.connection.unsent or not self.complete and self.items_wait():
                self.broker.wake_owner(self.reader)
            elif self.complete:
                self.broker.leave(self.reader, True)
                self.exchange.release_slot()
        except Exception as error:         # for the exchange's own thread
            self.fault = error
            self.broker.wake_owner(self.reader)
        finally:
            self._sending.release()

    def work(self):
        """Do what is left, in the exchange's own thread. Blocks while the client reads. Raises
        PeerGone."""
        with self._sending:
            if self.fault is not None:
                raise self.fault
            self.connection.flush()
            if self.complete:
                return
            small = self.size() <= DIRECT_ITEM_BYTES
            with self.exchange.room(0 if small else json_size(self.next_items())):
                self.send_next(may_block=True)

    def send(self, data, may_block):
        """Send bytes. may_block: this is the exchange's own thread; else what the kernel does
        not take now is left to it."""
        (self.connection.send if may_block else self.connection.send_now)(data)

    def encoded(self, size, encode, *arguments):
        """Return encode(*arguments). It may parse objects: large ones one at a time."""
        if size <= LARGE_BODY_BYTES:
            return encode(*arguments)
        with self.exchange.bounds.large_bodies.turn(self.exchange.address):
            return encode(*arguments)

    def items_wait(self):
        """Whether there are items to send."""
        return len(self.job.items) > self.reader.cursor and self.job.readable()

    def cancel_if_too_old(self):
        """Cancel a job that takes too long."""
        if self.broker.now() - self.job.created > self.limits.job_seconds:
            self.broker.cancel(self.job, took_too_long_error(self.limits))


class WholeOutlet(Outlet):
    """Sends an answer as one response, when it has ended. SharedOutlet, in the machinery, adds
    its bytes: size and _parts."""

    def run(self):
        self.broker.deliver_to(self.reader, self.deliver, math.inf)
        if self.job.ended_at is not None:  # it ended before deliver_to
            self.deliver()
        # Wait for the next request already, while others bring the answer: one wake-up per
        # prompt, not two, saves a fifth of its processor time.
        if not (self.complete or self.reader.has_work or self.encoder.large) and (
                self.exchange.keep_alive):
            self.connection.wait_for_more(WHOLE_WAIT_SECONDS)
        while not self.complete or self.connection.unsent:
            self.broker.wait_for_work(self.reader, self._patience())
            if self.reader.gone:
                raise PeerGone()
            if self.job.ended_at is not None or self.complete:
                self.work()
            else:
                self._stay_open()
            self.cancel_if_too_old()

    def _patience(self):
        """Seconds until the own thread must act without an answer."""
        return self.limits.heartbeat_seconds

    def _stay_open(self):
        """Nothing came for so long: see LateOutlet."""

    def items_wait(self):
        return self.job.ended_at is not None

    def next_items(self):
        return () if self.size() == 0 else self.job.items

    def send_next(self, may_block):
        if self.job.ended_at is None or not may_block and self.size() > DIRECT_BYTES:
            return
        parts = self._parts(may_block)
        if parts is None:
            return
        self.connection.when_gone(None)    # a client that has it all may disconnect
        for part in parts:
            self.send(part, may_block)
        self.reader.cursor = len(self.job.items)
        self.complete = True


class StreamOutlet(Outlet):
    """Sends an answer item by item, as it is generated."""

    queue_position = None                  # as last told

    def __init__(self, exchange, reader, encoder):
        super().__init__(exchange, reader, encoder)
        self.taken = size_of(self.job.items[:reader.cursor])   # bytes of items, as counted

    def run(self):
        self.wrote_at = self.broker.now()
        self.broker.deliver_to(self.reader, self.deliver, 0)
        if self.items_wait() or self.job.ended_at is not None:  # it came before deliver_to
            self.deliver()
        while not self.complete or self.connection.unsent:
            if not self.items_wait():
                self.broker.wait_for_work(self.reader, self._patience())
            if self.reader.gone:
                raise PeerGone()
            self.work()
            self.cancel_if_too_old()

    def size(self):
        """Roughly the bytes that wait for this reader."""
        return self.job.answer_bytes() - self.taken

    def next_items(self):
        items = self.job.items[self.reader.cursor:]
        if self.size() <= PIECE_BYTES:     # counted before they are added
            return items
        size = 0
        for end, item in enumerate(items):
            size += ITEM_BYTES + len(item)
            if size > PIECE_BYTES:
                return items[:max(end, 1)]
        return items

    def _patience(self):
        """Seconds until the own thread must act without an item."""
        silence = self.wrote_at + self.limits.heartbeat_seconds - self.broker.now()
        if self.job.state == "queued" or self.queue_position:     # as last told
            silence = min(silence, QUEUE_NEWS_SECONDS)
        return max(0.01, silence)

    def send_next(self, may_block):
        # Counted before their size is looked at: those that come later may be large.
        count = len(self.job.items) - self.reader.cursor
        if not may_block and self.size() > DIRECT_ITEM_BYTES:
            return
        most = max(1, len(self.next_items()) if may_block else count)
        items, ended = self.broker.read(self.reader, most)
        if ended:
            self.connection.when_gone(None)
        if ended and not items and not self.exchange.started and self.job.error is not None:
            data = b"".join(self.exchange.error_response(self.job.error))
        else:
            data = self._piece(items, ended, news=may_block)
        if data:
            self.wrote_at = self.broker.now()
            self.send(data, may_block)
        self.complete = ended

    def _piece(self, items, ended, news):
        """The next bytes of the response, if any."""
        body = b""
        if items:
            self.queue_position = None     # its client can tell
            size = size_of(items)
            self.taken += size
            body = self.encoded(size, self.encoder.items, items,
                                self.reader.cursor - len(items))
        elif news and not ended:
            body = self._news()
        if ended:
            body += self.encoder.end(self.job)
        if not body and not ended:
            return b""
        head = b""
        if not self.exchange.started:
            head = self.exchange.chunked_head(
                self.encoder.kind, self.encoder.headers(self.exchange, self.job),
                x_accel_buffering="no", cache_control="no-cache")
        return head + self.exchange.framed(body, last=ended)

    def _news(self):
        """The queue position, or a heartbeat."""
        position = self.broker.queue_position(self.job)
        if position != self.queue_position:
            self.queue_position = position
            return self.encoder.queue(position)
        silence = self.broker.now() - self.wrote_at
        return self.encoder.beat() if silence >= self.limits.heartbeat_seconds - 0.05 else b""


##############################################################################
# Native API: encoders and handlers
##############################################################################


class NativeWhole:
    """Encodes an answer as one JSON object."""

    name, kind, large = "native", JSON, False

    def headers(self, exchange, job):
        return b""

    def whole(self, job):
        return b'{"reply":%s,"errorcode":0,"stats":%s}' % (
            to_json(text_of(job.items)), stats_of(job))


class NativeStream:
    """Encodes an answer as NDJSON. The last record is done or an error."""

    kind = "application/x-ndjson"

    def headers(self, exchange, job):
        return b""

    def items(self, items, at):
        texts = ",".join([quoted(item) if type(item) is str else item.decode("utf-8")
                          for item in items])
        return b'{"at":%d,"items":[%s]}\n' % (at, texts.encode("utf-8"))

    def queue(self, position):
        return dumps({"queue": position}) + b"\n"

    def beat(self):
        return b"{}\n"

    def end(self, job):
        if job.error is not None:
            return dumps(job.error.native()) + b"\n"
        return b'{"done":true,"stats":%s}\n' % stats_of(job)


def send_models(exchange):
    """GET /api/models: the directory"""
    exchange.relay.directory.send(exchange)


def asks_for_models(exchange):
    """Whether the body is the command getmodels. Raises RelayError."""
    return exchange.read_object(MAX_SMALL_BODY_BYTES).get("command") == "getmodels"


def post_root(exchange):
    """POST /: the command getmodels"""
    if not asks_for_models(exchange):
        raise RelayError("invalid_request", "Send prompts to /{service}.")
    send_models(exchange)


def post_native(exchange, name):
    """POST /{service}: a prompt, or a command"""
    try:                                   # before the body, which may be large
        service = exchange.broker.find(name)
        by_operator, access = access_of(exchange, service)
    except RelayError:
        models = False
        with contextlib.suppress(RelayError):
            models = asks_for_models(exchange)
        if not models:
            raise
        return send_models(exchange)       # as on any path
    request = exchange.read_object()
    command = request.get("command")
    if command == "getmodels":
        exchange.drop(request)
        return send_models(exchange)
    if isinstance(request.get("message"), list):
        request["messages"] = request.pop("message")
    check_fields(request, NATIVE_FIELDS)
    if command == "cancel":
        return cancel_native(exchange, service, request, access)
    if command is not None:
        raise no_command_error(command)
    stream, key, at = request.get("stream"), request.get("key"), request.get("at")
    wanted = request.get("gettokens", 20)
    exchange.take_slot(reserved=by_operator or access is not None)
    try:
        reader = submit_native(exchange, service, request, by_operator, access)
    finally:
        exchange.drop(request)
    if stream:
        StreamOutlet(exchange, reader, NativeStream()).answer()
    elif key:
        ReadOutlet(exchange, reader, wanted, counts=at is not None).answer()
    else:
        SharedOutlet(exchange, reader, NativeWhole()).answer()


def submit_native(exchange, service, request, by_operator, access):
    """Submit a native prompt, or find the job that it means; return a Reader."""
    prompt, at = request.get("message", request.get("messages")), request.get("at")
    if prompt is None and not request.get("key"):
        raise RelayError("invalid_request", "message is missing: the prompt, a text.",
                         param="message")
    identity = native_identity(exchange, service, request, access, prompt)
    if identity.kind == "stream" and (prompt is None or at):       # it began before
        with charging_guesses(exchange):
            return exchange.broker.open(identity, at)
    cap_length(request, access, "max_new_len")
    payload = to_json({field: value for field, value in request.items()
                       if field not in NOT_FOR_PROVIDERS})
    job = Job(service, payload, exchange.caller(access), holder=exchange.address,
              access=access, rated=not exchange.local, by_operator=by_operator,
              wait=request.get("wait", False), prefixes=prefixes_of(service, prompt))
    return exchange.broker.submit(job, identity, 0 if identity.kind == "repeat" else at)


##############################################################################
# Provider protocol: each request carries the service key
##############################################################################

MAX_ENTRIES = 8192           # of one push


def post_login(exchange, name):
    """POST login: {workers, continues, ...} -> {session}"""
    charge_change(exchange)
    service, request = read_authorized(exchange, name)
    check_fields(request, LOGIN_FIELDS)
    if request.get("workers", 1) > exchange.limits.max_workers:
        raise RelayError("invalid_request", "workers must be at most %d."
                         % exchange.limits.max_workers, param="workers")
    session = exchange.broker.login(service, **{
        field: request[field] for field in LOGIN_FIELDS if field in request})
    exchange.drop(request)
    log("login", service=service.name, address=exchange.address, session=session[:8])
    exchange.respond(200, {"session": session, "name": service.name, "errorcode": 0,
                           "lease_s": exchange.limits.lease_seconds,
                           "poll_s": exchange.limits.poll_seconds})


def post_poll(exchange, name):
    """POST poll: {session, running: [[job, attempt]]} -> {jobs, cancel}"""
    service, request = read_authorized(exchange, name)
    check_fields(request, POLL_FIELDS)
    session, running = session_of(request), request.get("running") or []
    exchange.drop(request)
    if len(running) > 4 * exchange.limits.max_workers:
        raise RelayError("invalid_request", "running has more than %d jobs."
                         % (4 * exchange.limits.max_workers), param="running")
    this_poll, broker = Poll(), exchange.broker
    lost = functools.partial(broker.poll_broken, session, this_poll)
    # when_gone: while this poll waits. on_close: between two requests.
    exchange.connection.when_gone(lost)
    exchange.connection.on_close = lost if exchange.keep_alive else None
    first = not any(other.parked for other in list(service.sessions.values()))
    with exchange.bounds.polls.take(exchange.address, reserved=first, give_way=lost):
        running = iter(running)            # which frees the list during the wait
        offers, cancels = broker.poll(service, session, this_poll, running)
    if not exchange.keep_alive:            # the provider itself ends this connection
        exchange.connection.when_gone(None)
    send_work(exchange, offers, cancels)


def post_reply(exchange, name):
    """POST reply, which is a push: {session, replies: [entry]} -> {refused, jobs, cancel}"""
    service, request = read_authorized(exchange, name, exchange.limits.max_request_bytes)
    session, entries = session_of(request), request.get("replies", [])
    if not isinstance(entries, list) or len(entries) > MAX_ENTRIES:
        raise RelayError("invalid_request", "replies must be a list of at most %d entries."
                         % MAX_ENTRIES, param="replies")
    for entry in entries:
        check_entry(entry)
    refused, offers, cancels = exchange.broker.push(service, session, entries)
    entries.clear()
    exchange.drop(request)
    send_work(exchange, offers, cancels, refused)


def post_logout(exchange, name):
    """POST logout: {session}; its unfinished jobs go to others"""
    service, request = read_authorized(exchange, name)
    session = session_of(request)
    exchange.drop(request)
    exchange.broker.logout(service, session)
    log("logout", service=service.name, address=exchange.address, session=session[:8])
    exchange.respond(200, {"errorcode": 0})


def send_work(exchange, offers, cancels, refused=None):
    """The response to poll and reply."""
    parts = encode_work(offers, cancels, refused)
    # A provider that does not read holds these bytes even after the jobs have gone. Not
    # send_whole: a poll's connection stays watched.
    with exchange.room(sum(map(len, parts))):
        exchange.send_parts(*exchange.response(200, b"".join(parts)))


##############################################################################
# Routes: what is done at which path
##############################################################################


class Route:
    """The handlers of one path, by method, and its API. arguments: what they get before those
    from the path."""

    def __init__(self, api, *arguments, **handlers):
        self.api, self.arguments, self.handlers = api, arguments, handlers
        self.allow = ", ".join([*handlers, *("HEAD" for name in handlers if name == "GET"),
                                "OPTIONS"])


CHALLENGE = Route("page", GET="send_challenge")

ROUTES = {  # "*" stands for one segment: a service's name, a key's id
    "/": Route("native", GET="send_page", POST="post_root"),
    "/*": Route("native", GET="send_page", POST="post_native"),
    "/neuroengine.py": Route("page", GET="send_client"),
    "/.well-known/acme-challenge/*": CHALLENGE,
    "/healthz": Route("page", GET="send_health"),
    "/metrics": Route("page", GET="send_metrics"),

    "/api/models": Route("native", GET="send_models"),
    "/api/services": Route("operator", GET="send_models", POST="register"),
    "/api/services/*": Route("operator", GET="send_service", PATCH="change_service",
                             DELETE="delete_service"),
    "/api/services/*/keys": Route("operator", GET="send_keys", POST="add_key"),
    "/api/services/*/keys/*": Route("operator", PATCH="change_key", DELETE="revoke_key"),

    "/provider/*/login": Route("provider", POST="post_login"),
    "/provider/*/poll": Route("provider", POST="post_poll"),
    "/provider/*/reply": Route("provider", POST="post_reply"),
    "/provider/*/logout": Route("provider", POST="post_logout"),
}
# And those of APIS, in the section on OpenAI's and Anthropic's APIs.


##############################################################################
# The reader may stop here. What follows is machinery, in sections of any order.
##############################################################################


##############################################################################
# Limits: every bound and every timeout, each a command-line option
#
# The spine reads them as attributes of Limits. --help shows the first two groups.
##############################################################################

DAY_SECONDS = 86400
MIB = 1 << 20
LIMITS = (  # (name, default, group in --help, what it bounds)
    ("max_connections", 2500, "capacity",
     "connections in all (about 20 KB each while idle, with TLS 70 KB)"),
    ("max_held_bytes", 256 * MIB, "capacity", "prompts and answers held in memory"),
    ("max_request_bytes", 20 * MIB, "capacity",
     "body of one request; at most 9/40 of --max-held-bytes"),
    ("max_reply_bytes", 8 * MIB, "capacity", "answer to one prompt"),
    ("max_queue", 1000, "capacity", "prompts waiting for one service"),
    ("max_services", 10000, "capacity", "registered services"),
    ("lease_seconds", 15, "capacity", "silence after which a provider loses its jobs"),
    ("grace_seconds", 30, "capacity", "time for a client that went away to come back"),
    ("keep_seconds", 300, "capacity", "a finished stream stays readable"),
    ("job_seconds", 3600, "capacity", "one job, from prompt to the end of its answer"),
    ("drain_seconds", 30, "capacity", "running jobs may finish after SIGTERM"),
    ("max_connections_per_address", 200, "callers",
     "connections per address (loopback exempt)"),
    ("max_queue_per_caller", 100, "callers", "prompts of one caller waiting for one service"),
    ("max_prompts_per_minute", 300, "callers", "prompts per caller (loopback exempt)"),
    ("max_anonymous_per_day", 500, "callers",
     "prompts per address and service without an access key (loopback exempt)"),
    ("max_registrations_per_hour", 20, "callers",
     "services registered per address (loopback exempt)"),
    ("max_polls", 1000, "more", "connections that hold providers' polls"),
    ("max_waiting", 1400, "more",
     "connections that wait for an answer; the rest are reserved for control requests, at "
     "least a 25th: with fewer --max-connections, these two shrink"),
    ("max_head_bytes", 16384, "more", "request line and headers of one request"),
    ("max_wrong_keys_per_minute", 30, "more",
     "wrong keys per address; a right key still works"),
    ("max_changes_per_minute", 120, "more",
     "logins and changes of services and keys per address (loopback exempt)"),
    ("unused_days", 7, "more",
     "a service that never had a provider is deleted after; 0 for never"),
    ("absent_days", 183, "more",
     "a service without a provider for so long is deleted after; 0 for never"),
    ("max_conversations", 10000, "more",
     "conversations whose next prompt goes to the same provider, if it has several; 0: none"),
    ("max_access_keys", 50000, "more", "access keys of all services together"),
    ("max_sessions", 100, "more", "logged-in providers of one service"),
    ("max_workers", 1024, "more", "jobs that one provider may run at once"),
    ("handshake_seconds", 10, "more", "a TLS handshake"),
    ("head_seconds", 10, "more", "a request's headers, from the first byte to the last"),
    ("body_seconds", 20, "more", "a request's body, plus a second for each 16 KiB"),
    ("idle_seconds", 60, "more", "a kept-alive connection waits for the next request"),
    ("write_seconds", 30, "more", "one write to a peer that reads slowly"),
    ("poll_seconds", 25, "more", "the relay holds an idle provider's poll"),
    ("busy_poll_seconds", 5, "more",
     "the relay holds the poll of a provider with jobs; at most a third of --lease-seconds"),
    ("handover_seconds", 5, "more", "time for a provider to confirm a job it was given"),
    ("close_seconds", 0.5, "more", "time for a provider whose poll broke to poll again"),
    ("offline_seconds", 15, "more", "prompts wait after the last provider has left"),
    ("wait_seconds", 18, "more", "a read by key without a token (old clients give up at 20)"),
    ("heartbeat_seconds", 9, "more", "silence within a streamed answer"),
)


class Limits:
    """The values of LIMITS as attributes; Limits(grace_seconds=5) changes one."""

    def __init__(self, **changes):
        values = {name: default for name, default, _, _ in LIMITS}
        unknown = set(changes) - set(values)
        if unknown:
            raise TypeError("unknown limits: " + ", ".join(sorted(unknown)))
        self.__dict__.update(values, **changes)


##############################################################################
# Words of errors: what the spine tells clients and providers
#
# Each function returns a RelayError that says what happened, why, and what to do. Times come
# in seconds.
##############################################################################

JUST_GONE_SECONDS = 60       # a provider that left this recently may be back soon


def service_deleted_error(service):
    return RelayError("service_unknown", "The service %s was deleted." % service.name)


def key_revoked_error():
    return RelayError("invalid_key", "This access key was revoked. Ask the operator for a new "
                      "one.")


def paused_error(service):
    return RelayError("service_paused", "%s is paused by its operator. Try again later."
                      % service.name, retry_after=60)


def offline_error(service, now, waited=False):
    """For a service without a provider. now: wall clock. waited: the job has waited for one."""
    # A provider that has just left may be restarting. Whether to wait for any other is a
    # person's decision: OpenAI's clients would wait Retry-After out twice, silently.
    left = service.last_seen
    just_gone = left is not None and abs(now - left) < JUST_GONE_SECONDS
    since = "" if left is None else " since %s UTC" % time.strftime(
        "%Y-%m-%d %H:%M", time.gmtime(left))
    if service.sessions:
        since = " that can answer this"
    return RelayError("service_offline", "No provider of %s is connected%s. Try again later, "
                      "or send \"wait\": true to queue." % (service.name, since),
                      retry_after=5 if just_gone else 30, retry=just_gone and not waited)


def share_taken_error(size, limits):
    if size > limits.max_held_bytes // 4:  # waiting cannot help
        return RelayError("request_too_large", "This prompt alone would take more than a "
                          "quarter of the relay's memory.")
    return RelayError("rate_limited", "Your prompts and their answers take a quarter of the "
                      "relay's memory. Wait until some are answered.", retry_after=10)


def memory_full_error():
    return RelayError("relay_busy", "The relay's memory is full. Try again later.",
                      retry_after=10)


def too_many_waiting_error(service, waiting, limits, retry_after):
    return RelayError("rate_limited", "You have %d prompts waiting for %s. Wait until some are "
                      "answered." % (waiting, service.name), retry_after=retry_after,
                      limit=limits.max_queue_per_caller)


def queue_full_error(service, retry_after):
    return RelayError("queue_full", "%d prompts wait for %s already. Try again later."
                      % (service.queue.size, service.name), retry_after=retry_after)


def gave_way_error(service, retry_after):
    """For a job that left a full queue to another."""
    return RelayError("rate_limited", "The queue of %s is full, and you have most of it: "
                      "others need the room." % service.name, retry_after=retry_after)


def slot_lost_error():
    return RelayError("rate_limited", "Your address has more prompts under way than its share, "
                      "and others need the room. Try again in a few seconds.", retry_after=5)


def too_many_sessions_error(service):
    return RelayError("relay_busy", "Too many providers of %s are logged in." % service.name,
                      retry_after=60)


def too_many_readers_error():
    return RelayError("rate_limited", "%d connections read this answer already."
                      % MAX_READERS_PER_JOB, retry_after=5)


def key_reused_error():
    return RelayError("key_reused", "This key already names another prompt: use a new random "
                      "one for each prompt.")


def stream_unknown_error(limits):
    return RelayError("stream_unknown", "There is no stream of that key: it never began, ended "
                      "more than %d s ago, or the relay was restarted. Send the prompt again "
                      "with a new key." % limits.keep_seconds)


def session_unknown_error():
    return RelayError("session_unknown", "This session has ended: log in again.")


def shutting_down_error():
    return RelayError("shutting_down", "The relay is restarting. Try again in a few seconds.",
                      retry_after=3)


def cancelled_error():
    return RelayError("cancelled", "This request was cancelled.")


def took_too_long_error(limits):
    return RelayError("provider_timeout", "This answer took longer than %d s."
                      % limits.job_seconds)


def reply_too_large_error(limits):
    return RelayError("reply_too_large", "The answer is larger than %d bytes."
                      % limits.max_reply_bytes)


def not_text_error():
    return RelayError("provider_error", "The provider answered a prompt for text with something "
                      "else.")


def lost_midway_error(service):
    return RelayError("provider_lost", "The provider of %s went away in the middle of this "
                      "answer. Ask again." % service.name)


def lost_too_often_error(job):
    return RelayError("provider_lost", "%d providers of %s went away after they were given this "
                      "prompt." % (job.attempt, job.service.name), retry=False)


def no_path_error(head):
    hint, rest = "", list(head.path[1:])
    while rest[:1] == ["v1"]:              # a base URL with too few or too many /v1
        rest.pop(0)
    meant = (*head.path[:1], "v1", *rest)
    if rest and find_route(meant)[0]:
        hint = " Did you mean %s?" % printable("/" + "/".join(meant))
    return RelayError("not_found", "There is no %s here.%s" % (
        printable("/" + "/".join(head.path)), hint))


def no_method_error(head, route):
    return RelayError("method_not_allowed", "There is no %s here, only %s." % (
        printable(head.method, 20), route.allow), allow=route.allow)


def no_command_error(command):
    return RelayError("invalid_request", "There is no command %s. The commands are getmodels "
                      "and cancel." % printable(command, 40), param="command")


##############################################################################
# Bounds: rates, rooms and memory
#
# Admission and the exchanges ask these before they accept anything. Without them, one
# address could take what belongs to all.
##############################################################################

RESERVED = 10                # a tenth of each bound is reserved, see Room and Admission
SHARE = 10                   # an address above a tenth gives way to others
WIDE_SHARE = 4               # an IPv6 /48 may have four times what a /64 may


@functools.lru_cache(maxsize=10000)
def is_loopback(address):
    """Whether a canonical address is this machine's own."""
    return ipaddress.ip_address(address.partition("/")[0]).is_loopback


@functools.lru_cache(maxsize=10000)
def groups_of(address):
    """Whom to charge for what an address does: tuples (group, factor of the limit). An IPv6
    /64 is one household; a /48 has 65,536 of them, so it is limited, too."""
    if "/" not in address:
        return ((address, 1),)
    wide = ipaddress.ip_network(address).supernet(new_prefix=48)
    return ((address, 1), (str(wide), WIDE_SHARE))


def widest_group(caller):
    """The largest network that a caller is charged with: a caller that is an access key, or
    an IPv4 address, stands for itself."""
    return groups_of(caller)[-1][0] if "::" in caller else caller


class Rates:
    """Per-caller rate limiter: the generic cell rate algorithm (GCRA), which keeps one
    instant per caller. An unused allowance may be caught up at once. Thread-safe."""

    MOST = 10000     # callers remembered; strangers could fill the memory otherwise
    LOOKED_AT = 20   # of the oldest when it is full; the one that used least is forgotten

    def __init__(self, clock=time.monotonic):
        self._clock = clock
        self._due = OrderedDict()          # caller -> when all that it took is paid off
        self._lock = threading.Lock()

    def take(self, caller, most, seconds, what):
        """Count one `what` of `most` in `seconds`. Raises RelayError if it is one too many."""
        self.take_all([(caller, most)], seconds, what)

    def take_by_address(self, address, most, seconds, what, count=1):
        """The same for an address and the network it belongs to."""
        self.take_all([(group, most * factor) for group, factor in groups_of(address)],
                      seconds, what, count=count)

    def take_all(self, bounds, seconds, what, name="rate_limited", count=1):
        """Take `count` at once for each caller of bounds: pairs (caller, most in `seconds`).
        If that is too many for one of them, take nothing and raise RelayError, of that name."""
        with self._lock:
            now, late, dues = self._clock(), 0, {}
            for caller, most in bounds:
                # More than `seconds` from now it can only be because the clock was set back;
                # far more, because it was wrong.
                due = self._due.pop(caller, now)
                due = now if due > now + 2 * seconds else min(max(now, due), now + seconds)
                dues[caller] = due, count * seconds / most
                too_early = sum(dues[caller]) - now - seconds
                if too_early > max(late, 0.001):      # rounding may leave 1e-12
                    late, bound = too_early, most
            for caller, (due, cost) in dues.items():
                self._due[caller] = due if late else due + cost
            while len(self._due) > self.MOST:
                oldest = itertools.islice(self._due, self.LOOKED_AT)
                del self._due[min(oldest, key=self._due.get)]
        if late and count > bound:         # waiting cannot help
            raise RelayError("invalid_request", "This request counts as %d %s: %d in %s are "
                             "allowed." % (count, what, bound, in_words(seconds)))
        if late:
            raise too_many(what, bound, seconds, late, name)


class Quotas(Rates):
    """Rates over a day, by the wall clock, that outlive the process: see take_changed and
    restore. Callers are known by a hash, so that no address reaches the disk."""

    MOST = 50000

    def __init__(self, wall):
        super().__init__(wall)
        self._changed = {}                 # hash -> instant, what was not saved

    def take(self, caller, most, what):
        """Count one `what` of `most` a day. Raises RelayError (quota_exceeded)."""
        self.take_all([(caller, most)], DAY_SECONDS, what)

    def take_all(self, bounds, seconds, what, name="quota_exceeded", count=1):
        bounds = [(hashlib.sha256(repr(caller).encode()).digest()[:16], most)
                  for caller, most in bounds]
        super().take_all(bounds, seconds, what, name, count)
        with self._lock:
            for caller, _ in bounds:
                self._changed.pop(caller, None)
                self._changed[caller] = self._due.get(caller, 0.0)
            self._forget_unsaved()

    def _forget_unsaved(self):
        """While the disk is full, the oldest changes are lost rather than memory filled."""
        while len(self._changed) > self.MOST:
            del self._changed[next(iter(self._changed))]

    def take_changed(self):
        """Return what changed since the last call: hash -> instant."""
        with self._lock:
            changed, self._changed = self._changed, {}
            return changed

    def give_back(self, changed):
        """What take_changed returned could not be saved."""
        with self._lock:
            self._changed = {**changed, **self._changed}
            self._forget_unsaved()

    def restore(self, pairs):
        """Continue with what was saved: pairs, the latest instants last. What was counted
        since is later, and stays."""
        with self._lock:
            for caller, due in pairs[-self.MOST:]:
                self._due[caller] = max(due, self._due.get(caller, due))


def gives_way(queue, job):
    """The newest job of the group of callers that has most jobs in a queue, if that group would
    stay larger than that of `job`; else None. The operator's do not count, and jobs that a
    provider gave back are not chosen."""
    sizes, newest = Counter(), {}
    for other in queue:
        if not other.by_operator:
            group = widest_group(other.caller)
            sizes[group] += 1
            if not other.returned and (
                    group not in newest or other.number > newest[group].number):
                newest[group] = other
    group = max(sizes, key=sizes.get, default=None)
    if group not in newest or sizes[group] <= 1 + sizes[widest_group(job.caller)]:
        return None
    return newest[group]


def charge_rates(job, limits, rates, quotas):
    """Count a prompt, or a request of several, for its caller. Raises RelayError if that is
    too many."""
    if job.by_operator:
        return
    groups = ((job.caller, 1),) if job.access is not None else groups_of(job.caller)
    if job.rated:
        rates.take_all([(group, limits.max_prompts_per_minute * factor)
                        for group, factor in groups], 60, "prompts", count=job.cost)
    charge_quota(job, limits, quotas, job.cost)


def charge_quota(job, limits, quotas, count):
    """Count prompts for the day of a caller without an access key; count below zero takes some
    back. Raises RelayError if that is too many."""
    if not job.by_operator and job.access is None and (
            job.rated or job.service.anonymous_per_day):
        most, name = job.service.anonymous_per_day or limits.max_anonymous_per_day, (
            job.service.name.lower())
        quotas.take_all([((name, group), most * factor) for group, factor in groups_of(job.caller)],
                        DAY_SECONDS, "prompts without an access key", count=count)


def too_many(what, most, seconds, late, name="rate_limited"):
    """The error for one `what` more than `most` in `seconds`, which is `late` seconds early."""
    return RelayError(name, "Too many %s: %d in %s are allowed. Try again in %s." % (
        what, most, in_words(seconds), in_words(late)), retry_after=late, limit=most)


def in_words(seconds):
    """A length of time as people say it, rounded up."""
    for size, unit in ((DAY_SECONDS, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return "%d %s" % (math.ceil(seconds / size), unit)
    return "%d s" % math.ceil(seconds)


class Slot:
    """A part of a Room that somebody has taken, until it is released."""

    __slots__ = ("room", "groups", "count", "give_way", "released")

    def __init__(self, room, groups, count, give_way):
        self.room, self.groups, self.count = room, groups, count
        self.released = False
        self.give_way = give_way      # called when others need the slot; None: never

    def release(self):
        """Release it. Safe to call twice, and after it was taken away."""
        with self.room.lock:
            self.room.release_locked(self)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.release()


class Room:
    """A bounded resource (connections, polls, waiting prompts, bytes), shared by addresses.

    While there is room, an address may take what it likes (unless `hard` bounds it). When
    there is none, the address that has most, above its share, loses its newest slot to one
    that is below. A tenth is reserved for those that say so. Loopback is exempt from shares.
    Thread-safe.
    """

    def __init__(self, what, most, hard=math.inf):
        self.what, self.most, self.hard = what, most, hard
        self.share = max(1, most // SHARE)
        self.taken = 0
        self._by = defaultdict(int)        # group -> how much
        self._slots = defaultdict(dict)    # group -> {Slot: True}, oldest first
        self.lock = threading.Lock()
        self._released = threading.Condition(self.lock)   # notified when there is more room
        self._waiting = 0                  # threads that wait for it

    def take(self, address, count=1, *, give_way=None, reserved=False, always=False,
             wait=0.0):
        """Take a Slot of `count`. address: whose it is, None for nobody's. reserved: it may
        use the reserved tenth. always: never refused. Raises RelayError if there is no
        room, after blocking up to `wait` seconds for it."""
        groups, lost = self._groups(address), ()
        try:
            with self.lock:
                for group, factor in groups:
                    if self._by.get(group, 0) + count > self.hard * factor and not always:
                        raise self._none_left("rate_limited", "your address")
                most = self.most
                if groups and not reserved:
                    most -= most // RESERVED
                if self.taken + count > most and not always:
                    lost = self._make_way(count, groups, most)
                    self._wait(count, most, wait)
                slot = Slot(self, groups, count, give_way)
                self.taken += count
                for group, _ in groups:
                    self._by[group] += count
                    self._slots[group][slot] = True
                return slot
        finally:
            for other in lost:
                other.give_way()

    def _wait(self, count, most, seconds):
        """Block until there is room. Raises RelayError at the timeout, in seconds."""
        self._waiting += 1
        try:
            if not self._released.wait_for(lambda: self.taken + count <= most, seconds):
                raise self._none_left("relay_busy", "now")
        finally:
            self._waiting -= 1

    def _make_way(self, count, groups, most):
        """Take slots away until there is room, as far as that goes; return them."""
        lost = []
        while self.taken + count > most:
            slot = self._newest_above_share(count, groups)
            if slot is None:
                break
            self.release_locked(slot)
            lost.append(slot)
        return lost

    def _groups(self, address):
        """Whom to charge; nobody for what belongs to this machine."""
        return () if address is None or is_loopback(address) else groups_of(address)

    def _none_left(self, name, whom):
        return RelayError(name, "This relay has no more %s for %s. Try again in a few "
                          "seconds." % (self.what, whom), retry_after=5)

    def _newest_above_share(self, count, groups):
        """The newest slot of the group that has most, if that is above its share and the
        groups that ask would not be above theirs."""
        if max((self._by.get(group, 0) + count) / factor
               for group, factor in groups or ((None, 1),)) > self.share:
            return None
        for group in sorted(self._by, key=self._by.get, reverse=True)[:SHARE]:
            factor = WIDE_SHARE if group.endswith("/48") else 1
            if self._by[group] > self.share * factor:
                for slot in reversed(self._slots[group]):
                    if slot.give_way is not None:
                        return slot
        return None

    def release_locked(self, slot):
        """Take a slot back; nothing happens if that was done already."""
        if slot.released:
            return
        slot.released = True
        self.taken -= slot.count
        if self._waiting:
            self._released.notify_all()
        for group, _ in slot.groups:
            self._by[group] -= slot.count
            del self._slots[group][slot]
            if not self._slots[group]:
                del self._slots[group], self._by[group]


class Turns:
    """A lock for which networks take turns: one with a hundred requests makes another wait for
    one of them only. The thread that has it may take it again."""

    def __init__(self):
        self._lock = threading.Lock()      # guards what follows
        self._owner, self._depth = None, 0             # the thread that has it; how often
        self._waiting = OrderedDict()      # network -> deque of (thread, what it waits for)

    def taken(self):
        """Whether some thread has it."""
        return self._owner is not None

    def is_mine(self):
        """Whether this thread has it."""
        return self._owner == threading.get_ident()

    def acquire(self, address):
        """Take the lock. Blocks until it is the turn of this address."""
        thread = threading.get_ident()
        with self._lock:
            if self._owner in (None, thread):
                self._owner, self._depth = thread, self._depth + 1
                return
            turn = threading.Lock()
            turn.acquire()
            self._waiting.setdefault(widest_group(address), deque()).append((thread, turn))
        turn.acquire()                     # until release passes it on

    def release(self):
        """Give the lock back, or pass it on to the network that waits longest."""
        with self._lock:
            self._depth -= 1
            if self._depth:
                return
            self._owner = None
            if self._waiting:
                network, line = self._waiting.popitem(last=False)
                self._owner, turn = line.popleft()
                self._depth = 1
                if line:
                    self._waiting[network] = line      # behind the others
                turn.release()

    @contextlib.contextmanager
    def turn(self, address):
        """Have the lock for a while."""
        self.acquire(address)
        try:
            yield
        finally:
            self.release()


class Bounds:
    """What is bounded for all connections together, and by address."""

    def __init__(self, limits):
        each = limits.max_connections_per_address
        self.registrations, self.wrong_keys, self.changes = Rates(), Rates(), Rates()
        self.megabytes = Rates()               # of large bodies
        self.connections = Room("connections", limits.max_connections, hard=each)
        self.proxied = Room("connections", 10**9, hard=each)     # behind a proxy's
        self.polls = Room("polls", limits.max_polls)
        self.waiting = Room("slots for prompts", limits.max_waiting)
        self.bytes = Room("memory", limits.max_held_bytes // 4)  # bodies and responses
        self.large_bodies = Turns()            # held while a large body is parsed


class Holding:
    """What the jobs of one address hold."""

    __slots__ = ("bytes", "jobs", "kept")

    def __init__(self):
        self.bytes = 0
        self.jobs = {}                # Job: True, in order of arrival
        self.kept = {}                # those that ended and stay readable, oldest first


class Memory:
    """The bytes that jobs hold, in all and by holder. Its user holds the lock."""

    def __init__(self, most):
        self.most, self.held = most, 0
        self._holdings = defaultdict(Holding)          # holder -> Holding
        self._largest, self._looks = None, 0           # see _largest_holder

    def add(self, job, size):
        """Count a new job, and the bytes that it takes."""
        self._holdings[job.holder].jobs[job] = True
        self.hold(job, size)

    def hold(self, job, size):
        """Count bytes that a job takes from now on, or, below zero, no longer."""
        job.size += size
        self.held += size
        self._holdings[job.holder].bytes += size

    def keep(self, job):
        """An ended job stays readable: it is among the first to be forgotten."""
        self.keep_no_more(job)
        self._holdings[job.holder].kept[job] = True

    def keep_no_more(self, job):
        """To forget an ended job would give nothing."""
        self._holdings[job.holder].kept.pop(job, None)

    def forget(self, job):
        """A job holds nothing any more."""
        holding = self._holdings[job.holder]
        self.hold(job, -job.size)
        holding.jobs.pop(job, None)
        holding.kept.pop(job, None)
        if not holding.jobs:
            del self._holdings[job.holder]

    def held_by(self, holder):
        """The bytes of one holder."""
        return self._holdings[holder].bytes if holder in self._holdings else 0

    def share_left(self, holder):
        """How many bytes more one holder may have: it may have a quarter of all."""
        return self.most // 4 - self.held_by(holder)

    def kept_by(self, holder):
        """The ended jobs of one holder that are kept, oldest first."""
        return list(self._holdings[holder].kept) if holder in self._holdings else []

    def victim(self, size, holder):
        """The job that must go so that `holder` can have `size` bytes more.

        The largest holder loses first: ended streams, the oldest before others; then, if it
        holds twice what this holder would have, its largest job. None: nothing may go.
        """
        largest = self._holdings[self._largest_holder()]
        if largest.kept:
            return next(iter(largest.kept))
        if largest.bytes >= 2 * (self.held_by(holder) + size):
            job = max(largest.jobs, key=lambda job: job.size)
            if job.size > JOB_BYTES:
                return job
        return next((next(iter(holding.kept)) for holding in self._holdings.values()
                     if holding.kept), None)

    def _largest_holder(self):
        """The holder that has most, or had a short time ago: with 20,000 holders it takes
        milliseconds to find."""
        self._looks += 1
        if self._looks % 50 == 1 or self._largest not in self._holdings:
            self._largest = max(self._holdings, key=self.held_by)
        return self._largest


##############################################################################
# The Broker's other duties: services, lost responses, ended jobs, memory, metrics, affinity
#
# The spine has the Broker's halves for clients and providers.
##############################################################################


def unique_ids():
    """Yield names unique to all processes: a random prefix and a number. Easy to guess; random
    ones would cost more than the rest of a job's record."""
    prefix = secrets.token_hex(8)
    return map((prefix + "%08x").__mod__, itertools.count())


JOB_IDS = unique_ids()
REQUEST_IDS = unique_ids()
JOB_NUMBERS = itertools.count()


class Broker(Matcher):
    """All services and jobs of a relay; see Jobs and Matcher."""

    # -- services --

    def add(self, service, returning=False):
        """Make a registered service known. Raises RelayError if the name is taken.

        returning: it was in the data file, so its provider will probably be back soon.
        """
        with self._lock:
            if returning:
                service.expected_until = self._clock() + self.limits.offline_seconds
            if service.name.lower() in self._services:
                raise RelayError("name_taken", "The name %r is taken. Choose another."
                                 % service.name)
            if len(self._services) >= self.limits.max_services and not returning:
                raise RelayError("relay_busy", "This relay has no room for more services.")
            self._services[service.name.lower()] = service
            self._version += 1

    def remove(self, service):
        """Forget a service: its jobs fail, its sessions end."""
        with self._lock:
            if self._services.get(service.name.lower()) is service:
                del self._services[service.name.lower()]
            self._end_sessions_locked(service)
            self._fail_waiting_locked(service, service_deleted_error(service))
            self._changed.pop(service.name, None)
            self._version += 1

    def rename(self, service, name):
        """Give a service another name, which is free. Its providers know the old one, so
        their sessions end."""
        with self._lock:
            del self._services[service.name.lower()]
            self._services[name.lower()] = service
            self._end_sessions_locked(service)
            service.name = name
            self._version += 1

    def services(self):
        """All services, as they are at this moment."""
        with self._lock:
            return list(self._services.values())

    def close_sessions(self, service):
        """End every session of a service, as when its key has changed."""
        with self._lock:
            self._end_sessions_locked(service)

    @property
    def quotas(self):
        """The Quotas of callers without a key, to be saved."""
        return self._admission.quotas

    def renew_last_seen(self):
        """Note that the connected services are connected still."""
        with self._lock:
            for session in self._sessions.values():
                if session.id in session.service.sessions:
                    session.service.last_seen = self._wall()
                    self._save_later_locked(session.service)

    def take_changed(self):
        """Return the services whose counters changed since the last call."""
        with self._lock:
            changed, self._changed = self._changed, {}
            self.counters_changed.clear()
            return list(changed.values())

    def _save_later_locked(self, service):
        """Have the service's counters saved."""
        if not self._changed:
            self.counters_changed.set()
        self._changed[service.name] = service
        self._version += 1

    def _check_service_locked(self, service):
        """Raise RelayError if the service was deleted after it was looked up."""
        if self._services.get(service.name.lower()) is not service:
            raise service_deleted_error(service)

    def _fail_waiting_locked(self, service, error):
        """End all jobs that wait for a service."""
        for job in list(service.queue):
            self._end_locked(job, "failed", error)

    def _end_sessions_locked(self, service):
        """End all sessions of a service."""
        for session in [s for s in self._sessions.values() if s.service is service]:
            self._end_session_locked(session)

    # -- leases that a provider has again, or never confirmed --

    def _restore_lease_locked(self, session, pair, at=0):
        """Give a job back to a provider that seemed to be gone, if it waits and the provider
        can go on from item offset `at`. Return the Lease, or None."""
        job = self._jobs.get(pair[0])
        if (job is None or job.state != "queued" or not job.attempt
                or job.attempt != pair[1]
                or job.service is not session.service or at > len(job.items)):
            return None
        job.service.queue.remove(job)
        job.move("leased")
        job.deaths -= job.died                     # it was not dead after all
        job.died = False
        job.lease = Lease(session, job, pair, "handed_out", self._clock())
        self._dispatch_locked(session.service)     # what stood behind it
        return job.lease

    def _check_handover_later_locked(self, session, delay):
        """Make sure that a timer looks for leases that are not confirmed."""
        if not session.has_handover_timer:
            session.has_handover_timer = True
            self._timers.call_later(delay, self._unconfirmed_locked, session)

    def _unconfirmed_locked(self, session):
        """Take back the leases that were handed out some time ago and never confirmed."""
        session.has_handover_timer = False
        if session.closed:
            return
        now, left = self._clock(), math.inf
        for lease in list(session.leases.values()):
            if lease.state == "handed_out":
                due = lease.since + self.limits.handover_seconds
                if due <= now:
                    self._release_locked(lease, died=False)
                else:
                    left = min(left, due - now)
        self._dispatch_locked(session.service)
        if left < math.inf:
            self._check_handover_later_locked(session, left)

    # -- prompts that no provider comes back for --

    def _deserted_locked(self, service, job_id=None):
        """Some time after the last provider left that could answer a job: has one come back?
        job_id: of the job that must not wait longer; None: all."""
        for job in list(service.queue) if job_id is None else [self._jobs.get(job_id)]:
            if job is None or job.state != "queued" or service.can_answer(job) or (
                    self._clock() < job.stranded_at + self.limits.offline_seconds):
                continue                   # or one came back, and left: a later timer looks
            if job.seen:
                self._end_locked(job, "failed", lost_midway_error(service))
            elif not job.wait:
                self._end_locked(job, "failed", offline_error(service, self._wall(), waited=True))

    # -- what else clients ask --

    def is_known(self, identity):
        """Whether a job has this identity. If its client has hung up unnoticed, submit finds it
        only after HangUps.look."""
        return identity.key in self._identified

    def cancel_stream(self, identity):
        """Stop a job that was submitted before. Raises RelayError."""
        with self._lock:
            self._cancel_locked(self._known_job_locked(identity))

    def queue_position(self, job):
        """Where a queued job stands, as clients are told; None if it is not queued."""
        with self._lock:
            if job.state != "queued":
                return None
            position = job.service.queue.position(job)
            return {"position": position, "waiting": job.service.queue.size,
                    "eta_s": self._admission.eta(job.service, position),
                    "connected": bool(job.service.sessions)}

    # -- reads by key --

    def wait_for_items(self, reader, want, timeout):
        """Block up to timeout seconds until there are `want` items that this reader has not had
        (None: all), or the job has ended, or its client has gone."""
        job = reader.job
        with self._lock:
            target = reader.wanted = math.inf if want is None else reader.cursor + want
            self._wait_locked(reader, timeout, lambda: job.ended_at is not None or (
                len(job.items) >= target and job.readable()))
            reader.wanted = math.inf

    def advance(self, reader):
        """What was read is about to be written: a client that sends no offset gets what
        follows it next time. To be called before the write, since the client may ask again
        at once; leave takes it back if the write failed."""
        job = reader.job
        with self._lock:
            reader.resumed_at = job.resume_at
            job.resume_at = max(job.resume_at, reader.cursor)

    # -- ended jobs, and jobs without a reader: kept for a while, then forgotten --

    def _recheck_locked(self, job):
        """Look at a job without a reader, now and when it is due."""
        if not job.has_timer:
            self._check_job_locked(job.id)

    def _check_job_locked(self, job_id):
        """Cancel a job that nobody came back for; forget one kept long enough."""
        job = self._jobs.get(job_id)
        if job is None:                    # forgotten, to make room
            self._stale = max(0, self._stale - 1)
            return
        job.has_timer = False
        now = self._clock()
        if job.ended_at is not None:
            named = job.identity is not None and job.identity.named
            due = max(job.ended_at, job.left_at or 0) + (
                self.limits.keep_seconds if named else job.grace)
        elif job.left_at is not None:
            due = job.left_at + job.grace
        else:
            return
        if due > now or job.readers:
            job.has_timer = True
            self._timers.call_later(max(due - now, 1), self._check_job_locked, job_id)
        elif job.ended_at is not None:
            self._forget_locked(job)
        else:
            self._cancel_locked(job)

    def _forget_locked(self, job):
        """Let go of an ended job without readers."""
        if self._jobs.pop(job.id, None) is not None:
            self._memory.forget(job)
            self._disown_locked(job)
            if job.has_timer:
                self._timer_left_locked()

    def _disown_locked(self, job):
        """The job is not found by its identity any more."""
        if job.identity is not None and self._identified.get(job.identity.key) is job:
            del self._identified[job.identity.key]
        job.identity = None

    # -- memory --

    def _timer_left_locked(self):
        """A job was forgotten before its timer: drop such timers when they are many."""
        self._stale += 1
        if self._stale > max(1000, len(self._timers) // 2):    # of no use for minutes
            self._timers.drop(self._check_job_locked, self._jobs.__contains__)
            self._stale = 0

    def _make_room_locked(self, size, holder):
        """Return whether `size` more bytes can be held, if necessary after others gave way."""
        while self._memory.held + size > self._memory.most:
            job = self._memory.victim(size, holder) if self._jobs else None
            if job is None:
                return False
            if job.ended_at is None:
                self._cancel_locked(job, memory_full_error())
            if job.id in self._jobs and not job.readers:
                self._forget_locked(job)
            elif job.id in self._jobs:
                self._empty_locked(job)
        return True

    def _make_room_in_share_locked(self, size, holder):
        """Return whether `size` more bytes fit into this holder's share of the memory, if
        necessary after its ended jobs were forgotten, the oldest first."""
        if self._memory.share_left(holder) >= size:
            return True
        for job in self._memory.kept_by(holder):
            if not job.readers and self._memory.share_left(holder) < size:
                self._forget_locked(job)
        return self._memory.share_left(holder) >= size

    def _empty_locked(self, job):
        """Keep only a job's error, which a client has still to read."""
        job.error = job.error or memory_full_error()
        job.payload, job.items, job.encoded = b"", [], None
        self._memory.keep_no_more(job)
        self._memory.hold(job, JOB_BYTES - job.size)
        if job.identity is not None and job.identity.kind == "repeat":
            self._disown_locked(job)       # the same Idempotency-Key starts it again

    def keep_encoded(self, job, encoder, data):
        """Keep a whole answer as it is sent, so that other readers of the job share it."""
        with self._lock:
            # To make room may take this very job.
            if self._make_room_locked(len(data), job.holder) and (
                    job.id in self._jobs and job.items and job.encoded is None):
                self._memory.hold(job, len(data))
                job.encoded = encoder, data

    # -- the directory and metrics --

    def _measure_locked(self, job):
        """Note how long a job took, for estimates and /metrics."""
        durations, service = self.histograms, job.service
        durations["queue_seconds"].observe(job.leased_at - job.created)
        durations["first_token_seconds"].observe((job.first_at or job.ended_at) - job.created)
        durations["answer_seconds"].observe(job.ended_at - job.created)
        service.job_seconds = moving_average(service.job_seconds,
                                             job.ended_at - job.leased_at)
        if job.prefixes and job.first_at is not None:
            self._affinity.measure(job)
        if len(job.items) > 8 and job.ended_at - job.first_at > 0.05:
            service.tokens_per_second = moving_average(
                service.tokens_per_second,
                (len(job.items) - 1) / (job.ended_at - job.first_at))

    def version(self):
        """A number that changes at least when the directory does."""
        return self._version + sum(self.counts.values())

    def eta(self, service):
        """Seconds until a prompt submitted now would be answered; None: unknown."""
        with self._lock:
            return self._admission.eta(service, service.queue.size + 1)

    def touch(self):
        """A setting of a service has changed."""
        with self._lock:
            self._version += 1

    def totals(self):
        """Counters, gauges and histograms for /metrics."""
        with self._lock:
            services = self._services.values()
            return dict(self.counts), {
                "held_bytes": self._memory.held, "held_jobs": len(self._jobs),
                "timers": len(self._timers), "services": len(services),
                "sessions": sum(len(service.sessions) for service in services),
                "queued": sum(service.queue.size for service in services),
                "running": sum(len(session.jobs()) for session in self._sessions.values()),
            }, self.histograms

    # -- affinity --

    def _prefer_locked(self, job):
        """Reserve a job for the session that answered its conversation, for a while."""
        seconds = self._affinity.look(job) if job.prefixes else 0
        if seconds:
            self._timers.call_later(seconds, self._open_to_all_locked, job.id)

    def _open_to_all_locked(self, job_id):
        """A job that was kept for some sessions may go to any."""
        job = self._jobs.get(job_id)
        if job is not None:
            job.prefers = job.avoid = None
            if job.state == "queued":
                self._dispatch_locked(job.service)

    # -- the end --

    def _shutting_down(self):
        return shutting_down_error()

    def drain(self):
        """Take no new jobs and fail those that wait; running ones go on."""
        with self._lock:
            self.draining = True
            for service in self._services.values():
                self._fail_waiting_locked(service, self._shutting_down())
            for session in self._sessions.values():
                session.has_response.notify_all()

    def nothing_runs(self):
        """Whether no job is in a provider's hands."""
        with self._lock:
            return not any(session.jobs() for session in self._sessions.values())

    def close(self):
        """Wake every waiter; what is unfinished ends with an error."""
        with self._lock:
            self.draining = self.closed = True
            for job in list(self._jobs.values()):
                if job.ended_at is None:
                    self._end_locked(job, "failed", self._shutting_down())
            for session in self._sessions.values():
                session.has_response.notify_all()
            self._timers.wake()


##############################################################################
# Affinity: the next prompt of a conversation goes where the last one went
#
# LLM servers keep the beginning of recent conversations (the KV cache). Elsewhere all of it
# would have to be read again. Only services with several sessions come here.
##############################################################################

LEADING_CHARACTERS = 1024    # of a text: what two prompts of one conversation share
MAX_PREFIXES = 64            # of a conversation, that are looked up
MAX_RESERVED_SECONDS = 10    # a job waits for one session at most


def prefixes_of(service, prompt):
    """Return a digest of each beginning of a prompt that may have been a prompt before: of its
    messages up to each, the longest last; or of the beginning of a text."""
    if len(service.sessions) < 2:
        return ()
    if type(prompt) is str:
        prompt = [{"text": prompt[:LEADING_CHARACTERS]}]
    if type(prompt) is not list or any(type(message) is not dict for message in prompt):
        return ()
    hashing, digests = hashlib.blake2b(digest_size=16), deque(maxlen=MAX_PREFIXES)
    for message in prompt:
        hashing.update(to_json(message))
        digests.append(hashing.digest())
    return tuple(digests)


class Affinity:
    """Which session last had each conversation. Its user, the Broker, holds the lock.

    A conversation's next prompt begins with all messages of the one before. So each prompt
    is noted by a digest of its messages, and looked up by those of its beginnings.
    """

    def __init__(self, most, clock):
        self._most, self._clock = most, clock
        self._last = OrderedDict()         # (service's name, digest) -> id of a Session

    def look(self, job):
        """Find the session that should have this job, and note it there. Return for how many
        seconds others are to leave it alone; 0: nobody should."""
        session = self._last_session(job)
        if session is None or not session.may_take(job):
            return 0
        worth = self._worth(job)
        if self._free_in(session) > worth:
            return 0
        job.prefers = session
        return max(worth, POLL_GAP_SECONDS)

    def _last_session(self, job):
        """The session that had the longest beginning of this prompt, if it is connected."""
        for prefix in reversed(job.prefixes):
            session = job.service.sessions.get(self._last.get((job.service.name, prefix)))
            if session is not None:
                return session
        return None

    def _worth(self, job):
        """How many seconds sooner the first token would come from the session that knows the
        conversation, as measured; 0: unknown."""
        service = job.service
        if service.cold is None or service.warm is None:
            return 0
        return min(max(0, service.cold * len(job.payload) - service.warm),
                   MAX_RESERVED_SECONDS)

    def _free_in(self, session):
        """In how many seconds a worker of this session will probably be free."""
        if session.free() > 0:
            return 0
        seconds, now = session.service.job_seconds, self._clock()
        if seconds is None:
            return math.inf
        return max(0, min((job.leased_at + seconds - now for job in session.jobs()), default=0))

    def note(self, job, session):
        """A session got this job. Return whether it had the conversation before."""
        known = self._last_session(job) is session
        key = job.service.name, job.prefixes[-1]
        self._last[key] = session.id
        self._last.move_to_end(key)
        while len(self._last) > self._most:
            self._last.popitem(last=False)
        job.continued = known
        return known

    def measure(self, job):
        """Learn from an answer how long a prompt is read: in all, where the conversation was
        known; else for each byte."""
        service, seconds = job.service, job.first_at - job.leased_at
        if job.continued:
            service.warm = moving_average(service.warm, seconds)
        else:
            service.cold = moving_average(service.cold, seconds / max(1, len(job.payload)))


##############################################################################
# HTTP reader: the bytes of a request, after RFC 9112, strictly
#
# The spine gets a Head and a body, or a RelayError. Without this section's refusals, two
# programs between client and relay could disagree where a request ends, and a request
# could be smuggled past a proxy.
##############################################################################

MAX_FIELDS = 64              # headers of one request; browsers send about 20
# A relay that forwards a request to another adds this header, and up to so much in all.
RELAY_MARK, RELAY_BYTES, RELAY_HEADERS = "\r\nX-Relay: ", 1024, 5
SMALL_HEAD_BYTES = 2048      # a larger one counts as memory until it is answered
MAX_PIPELINED_BYTES = 2048   # of further requests, kept while one is answered
BODY_BYTES_PER_SECOND = 16384
MANY_CHUNKS = 4096           # of one body, whatever their size
CHUNK_BYTES = 512            # average size from there on: each chunk costs 3 us
SMALL_PIECE = 4096           # bytes of a body; those that come in smaller ones are joined
TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
REQUEST_LINE = re.compile(r"(" + TOKEN + r") ([\x21-\x7e]{1,8192}) HTTP/1\.([01])\r\n")
# Control characters, a bare CR or LF, white space before the colon and folded lines do not
# match: each of them has been used to smuggle requests past proxies.
FIELDS = re.compile(r"(?:" + TOKEN + r":[\t\x20-\x7e\x80-\xff]*\r\n)*\Z")
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[\t\x20-\x7e\x80-\xff]{0,256})?\Z")
HOST = re.compile(r"[A-Za-z0-9.:_\[\]-]*\Z")
SINGLE = frozenset(("host", "content-length", "transfer-encoding", "authorization",
                    "content-type", "content-encoding", "expect", "idempotency-key"))
FORWARDED = frozenset(("x-forwarded-for", "forwarded", "x-real-ip"))    # by a proxy


class Head:
    """The request line and headers of one request."""

    __slots__ = ("method", "target", "path", "version", "fields", "length", "keep_alive",
                 "forwarded",              # whether a proxy passed it on
                 "route",                  # (Route, arguments), see find_route
                 "size",                   # in bytes
                 "key_digest")             # of the key in the headers; "" without one


def parse_head(data):
    """Parse a request's head: the bytes up to the CRLF before the blank line.

    Returns a Head, whose length is the body's in bytes, None if it is chunked. Raises
    RelayError for what RFC 9112 forbids, and for what two readers could understand
    differently.
    """
    text = data.decode("latin-1")
    match = REQUEST_LINE.match(text)
    if not match:
        raise RelayError("bad_http", "That is not an HTTP/1.1 request line.")
    head = Head()
    head.size = len(data)
    head.method, head.target, version = match.groups()
    if not FIELDS.match(text, match.end()):
        raise RelayError("bad_http", "A header of this request is malformed.")
    lines = text[match.end():-2].split("\r\n")
    if len(lines) > MAX_FIELDS + RELAY_HEADERS * (RELAY_MARK in text):
        raise RelayError("bad_http", "This request has too many headers.")
    head.version, head.fields = int(version), {}
    fields = head.fields
    for line in filter(None, lines):
        name, _, value = line.partition(":")
        name, value = name.lower(), value.strip(" \t")
        if name not in fields:
            fields[name] = value
        elif name in SINGLE:
            raise RelayError("bad_http", "This request has the header %s twice." % name)
        else:
            fields[name] += ", " + value
    if head.version and "host" not in fields or not HOST.match(fields.get("host", "")):
        raise RelayError("bad_http", "A request must have one valid Host header.")
    head.path = path_of(head.method, head.target)
    head.route = find_route(head.path)
    key = key_of(fields)
    head.key_digest = digest(key) if key else ""
    head.length = length_of(head)
    options = fields.get("connection", "").lower().split(",")
    head.keep_alive = bool(head.version) and "close" not in map(str.strip, options)
    head.forwarded = not FORWARDED.isdisjoint(fields)
    return head


# /v1/models/{id} of a model whose id has slashes, as in "meta-llama/Llama-3".
MODEL_BASES = (("v1", "models"), ("models",))


def find_route(path):
    """Return (Route, arguments) for the segments of a path; (None, ()) if there is none."""
    if len(path) > 16 or sum(map(len, path)) > 512:        # strangers' paths are remembered
        return None, ()
    return cached_route(path)


@functools.lru_cache(maxsize=250)
def cached_route(path):
    for base in MODEL_BASES:
        if path[:len(base)] == base and len(path) > len(base) + 1:
            path = base + ("/".join(path[len(base):]),)
    if "*" in path or len(path) > 6:
        return None, ()
    route = ROUTES.get("/" + "/".join(path))
    if route is not None:
        return route, route.arguments
    for count in (1, 2):
        for places in itertools.combinations(range(len(path)), count):
            pattern = "/" + "/".join("*" if place in places else segment
                                     for place, segment in enumerate(path))
            route = ROUTES.get(pattern)
            if route is not None:
                return route, route.arguments + tuple(path[place] for place in places)
    return None, ()


def path_of(method, target):
    """Return the decoded path as a tuple of segments; empty ones do not count."""
    if method == "CONNECT":
        raise RelayError("method_not_allowed", "This relay is not a proxy.",
                         allow="GET, POST")
    if target == "*" and method == "OPTIONS":
        return ()
    if target[0] != "/":
        _, found, rest = target.partition("://")     # the absolute form
        if not found:
            raise RelayError("bad_http", "The request's target is not a path.")
        target = "/" + rest.partition("/")[2]
    path = target.partition("?")[0]
    if "%" in path:
        path = urllib.parse.unquote(path)
    return tuple(filter(None, path.split("/")))


def key_of(fields):
    """Return the key that a request came with, in any of the usual headers, or None."""
    scheme, _, key = fields.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return key.strip()
    return fields.get("api-key") or fields.get("x-api-key")


def length_of(head):
    """Return the length of the body in bytes, None if it is chunked."""
    length = head.fields.get("content-length")
    coding = head.fields.get("transfer-encoding")
    if coding is not None:
        if length is not None or not head.version or coding.lower() != "chunked":
            raise RelayError("bad_http", "This request's length is ambiguous: send either "
                             "Content-Length or Transfer-Encoding: chunked.")
        return None
    if length is None:
        if head.method in ("POST", "PUT", "PATCH"):
            raise RelayError("length_required", "Send the body's Content-Length.")
        return 0
    if not (1 <= len(length) <= 15 and length.isascii() and length.isdigit()):
        raise RelayError("bad_http", "The Content-Length is not a number.")
    return int(length)


def read_head(connection, limits):
    """Return the Head of the next request, of which some bytes have come.

    Raises PeerGone if the connection closes, RelayError if the head is malformed, too
    large, or not complete by the connection's deadline for it.
    """
    end = connection.buffer.find(b"\r\n\r\n")
    if not 0 < end <= limits.max_head_bytes or connection.buffer[0] in b"\r\x16":
        end = wait_for_head(connection, limits)
    data = connection.buffer[:end + 2]
    connection.buffer = connection.buffer[end + 4:]
    # A client's heads are often alike, and parsing one takes 7 % of a prompt's time.
    if connection.head is None or data != connection.last_head:
        connection.last_head, connection.head = data, None
        head = parse_head(data)
        if len(data) > SMALL_HEAD_BYTES:   # kept for this request only
            connection.last_head = data[:256]
            return head
        connection.head = head
    return connection.head


def wait_for_head(connection, limits):
    """Receive until a head is complete, and return where it ends. Raises as read_head."""
    deadline, most, skipped = connection.head_deadline(), limits.max_head_bytes, False
    while True:
        buffer, error = connection.buffer, None
        end = buffer.find(b"\r\n\r\n")
        if buffer[:2] == b"\r\n" and not skipped:
            connection.buffer, skipped = buffer[2:], True      # RFC 9112, 2.2
        elif buffer[:2] == b"\r\n":
            error = RelayError("bad_http", "That is not an HTTP/1.1 request line.")
        elif buffer[:1] == b"\x16":
            error = RelayError("bad_http", "This port speaks plain HTTP, not TLS.")
        elif (end if end >= 0 else len(buffer)) > most + RELAY_BYTES * (
                RELAY_MARK.encode() in buffer):
            error = RelayError("head_too_large", "The headers are larger than %d bytes."
                               % most)
        elif end >= 0:
            return end
        else:
            error = receive_more(connection, deadline, limits.head_seconds)
        if error is not None:
            connection.last_head, connection.head = connection.buffer[:256], None
            raise error


def receive_more(connection, deadline, seconds):
    """Receive more of a head; return the error to answer with if nothing came."""
    try:
        connection.receive(deadline)
    except socket.timeout:
        if not connection.buffer.strip():
            raise PeerGone() from None
        return RelayError("request_timeout", "The headers did not come within %g s." % seconds)


def read_body(connection, head, limits, most=None, count=None):
    """Return a request's body as bytes. most: its bound in bytes, if below the limit.
    count: called with the number of bytes before they are kept. Raises RelayError,
    PeerGone."""
    most = min(most or math.inf, limits.max_request_bytes)
    if head.length is not None and head.length > most:
        raise too_large(most)
    if head.fields.get("expect"):
        if head.fields["expect"].lower() != "100-continue":
            raise RelayError("bad_http", "This relay does not know that Expect.")
        if head.version:
            connection.send(b"HTTP/1.1 100 Continue\r\n\r\n")
    if head.length is not None and head.length <= len(connection.buffer):
        body = connection.buffer[:head.length]         # it came with the head
        connection.buffer = connection.buffer[head.length:]
        return body
    reader = BodyReader(connection, time.monotonic() + limits.body_seconds, count)
    try:
        if head.length is not None:
            return reader.take(head.length)
        return reader.take_chunked(most)
    except socket.timeout:
        raise RelayError("request_timeout", "The body came too slowly.") from None


def too_large(most):
    return RelayError("request_too_large", "The request is larger than %d bytes." % most)


def gather(parts, piece):
    """Add a piece to a list of texts, or of bytes. Small ones are joined: a million of two
    bytes each would take 250 MB."""
    if parts and len(parts[-1]) < SMALL_PIECE:
        parts[-1] += piece
    elif piece:
        parts.append(piece)


class BodyReader:
    """Takes the bytes of one body off a connection."""

    def __init__(self, connection, deadline, count):
        self._connection, self._deadline = connection, deadline
        self._count = count or (lambda size: None)
        self._uncounted = 0
        # What has come, and how much of it was taken: to cut the buffer for each of a
        # thousand small chunks would copy 200 MB.
        self._data, self._at = connection.buffer, 0

    def take(self, length):
        """Return exactly `length` bytes. Each 16 KiB that come give a second more."""
        parts = []
        self._take_into(parts, length)
        self._connection.buffer = self._data[self._at:]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def take_chunked(self, most):
        """Return a chunked body (RFC 9112, 7.1)."""
        parts, total = [], 0
        for chunks in itertools.count():
            match = CHUNK_LINE.match(self._take_line())
            if not match:
                raise RelayError("bad_http", "The chunked body is malformed.")
            size = int(match[1], 16)
            total += size
            if total > most:
                raise too_large(most)
            if chunks > MANY_CHUNKS + total // CHUNK_BYTES:
                raise RelayError("bad_http", "This body comes in thousands of tiny chunks: "
                                 "send larger ones, or a Content-Length.")
            if size == 0:
                if self._take_line():
                    raise RelayError("bad_http", "Trailers are not accepted.")
                self._connection.buffer = self._data[self._at:]
                return b"".join(parts)
            self._take_into(parts, size)
            while len(self._data) - self._at < 2:
                self._receive()
            if not self._data.startswith(b"\r\n", self._at):
                raise RelayError("bad_http", "The chunked body is malformed.")
            self._at += 2

    def _receive(self):
        """Wait for more bytes, and let go of those that were taken."""
        self._connection.buffer = self._data[self._at:]
        self._connection.receive(self._deadline)
        self._data, self._at = self._connection.buffer, 0

    def _take_into(self, parts, length):
        missing = length
        while missing:
            if self._at == len(self._data):
                self._receive()
            part = self._data[self._at:self._at + missing]
            self._at += len(part)
            self._uncounted += len(part)
            if self._uncounted >= SMALL_PIECE:
                self._count(self._uncounted)
                self._uncounted = 0
            gather(parts, part)
            missing -= len(part)
            self._deadline += len(part) / BODY_BYTES_PER_SECOND

    def _take_line(self):
        end = self._data.find(b"\r\n", self._at)
        while end < 0:
            if len(self._data) - self._at > 512:
                raise RelayError("bad_http", "A chunk's first line is too long.")
            self._receive()
            end = self._data.find(b"\r\n")
        line, self._at = self._data[self._at:end], end + 2
        return line


##############################################################################
# Connection: bytes in order, TLS, keep-alive, deadlines
#
# The spine writes to a Connection and hears from it that its peer has gone. Between two
# requests a connection waits in the Lobby and has no thread.
##############################################################################

LINGER_SECONDS = 2           # for a peer to read the last response
LINGER_BYTES = 1 << 25       # that it may still send
SHORT_WAIT_SECONDS = 0.25    # a thread waits for the next request; then the Lobby does
KEPT_SECONDS = 5             # an idle thread waits for work
MSG_DONTWAIT = getattr(socket, "MSG_DONTWAIT", 0)    # Windows has none
# On Linux the kernel ends a receive after this long (a struct timeval), so that the usual one
# needs no poll: a tenth of a prompt's time. None: sockets do not block, and are polled.
RECEIVE_TIMEOUT = None
if sys.platform == "linux" and sys.maxsize > 1 << 32:
    RECEIVE_TIMEOUT = struct.pack("@ll", 0, int(SHORT_WAIT_SECONDS * 1e6))


class Tls:
    """The server's side of TLS as a codec: bytes in, bytes out, no socket. So one thread can
    send while another waits for the peer; an SSLSocket is for one thread at a time."""

    RECORD_BYTES = 16384                   # the most that a record holds (RFC 8446, 5.1)

    def __init__(self, context):
        self._lock = threading.Lock()
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)

    def shake_hands(self, data):
        """Take the peer's bytes; return (whether the handshake is done, bytes for it)."""
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
                raise PeerGone() from None
            # A peer that only makes us answer on TLS's own level is an attacker.
            if parts == [b""] or self._outgoing.pending > self.RECORD_BYTES:
                raise PeerGone()
        return b"".join(parts)

    def encrypt(self, data):
        """Return the bytes that carry this to the peer, after those encrypted before."""
        parts = []
        with self._lock:
            try:
                for start in range(0, len(data), self.RECORD_BYTES):
                    self._tls.write(data[start:start + self.RECORD_BYTES])
                    parts.append(self._outgoing.read())
            except ssl.SSLError:           # the peer has sent nonsense since
                raise PeerGone() from None
        return b"".join(parts)

    def farewell(self):
        """Return the last bytes for the peer: an alert, or close_notify."""
        with self._lock:
            with contextlib.suppress(ssl.SSLError):
                self._tls.unwrap()
            return self._outgoing.read()


class Connection:
    """Bytes in and out of one socket, each wait under a deadline.

    One thread reads and one writes at a time; they need not be the same. Where a method may
    wait, its docstring says so.
    """

    def __init__(self, sock, limits, tls_context=None):
        """tls_context: an ssl.SSLContext, if the peer is to speak TLS."""
        self.sock, self._limits = sock, limits
        sock.setblocking(RECEIVE_TIMEOUT is not None)
        if RECEIVE_TIMEOUT is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, RECEIVE_TIMEOUT)
        self.tls = Tls(tls_context) if tls_context else None
        self.secured = self.tls is None    # whether the handshake, if any, is done
        self.buffer = b""                  # what has come and was not read
        self.unsent = b""                  # what send_now could not send
        self.last_head = b""               # as it came, even if it was malformed
        self.head = None                   # the same, parsed
        self.address, self.near, self.proxied = "", False, False
        self.slot = None                   # of the Room for connections
        self.idle_until = time.monotonic() + limits.head_seconds    # for the first byte
        self.began = None                  # when the first byte of the next request came
        self.on_gone = self.on_close = None
        self.gone = False                  # the peer has hung up

    def fileno(self):
        return self.sock.fileno()

    # -- waiting --

    def _wait(self, event, deadline):
        """Block until the socket is ready. Raises socket.timeout at the deadline."""
        left = deadline - time.monotonic()
        if left <= 0 or not is_ready(self.sock, event, left):
            raise socket.timeout()

    def _receive_some(self, deadline, most=65536):
        """Return what comes, as it comes. Raises PeerGone, socket.timeout."""
        # With TLS less, because OpenSSL keeps the memory that it once used.
        most, flags = min(most, 65536 if self.tls is None else 16384), (
            0 if deadline else MSG_DONTWAIT)
        while True:
            if deadline and time.monotonic() >= deadline:      # bytes that drip do not help
                raise socket.timeout()
            try:
                data = self.sock.recv(most, flags)
            except (BlockingIOError, InterruptedError):
                self._wait(selectors.EVENT_READ, deadline)
                continue
            except OSError:                # reset, unreachable
                data = b""
            if not data:
                raise PeerGone()
            return data

    def receive(self, deadline, most=65536):
        """Add what comes next to the buffer, about `most` bytes. Blocks until the deadline, an
        instant of time.monotonic. Raises PeerGone, socket.timeout."""
        data = self._receive_some(deadline, most)
        if self.tls is not None:
            data = self.tls.decrypt(data)
            while not data:                # a part of a record, or TLS's own business
                data = self.tls.decrypt(self._receive_some(deadline))
        self._keep(data)

    def _keep(self, data):
        self.buffer = self.buffer + data if self.buffer else data
        if data and self.began is None:
            self.began = time.monotonic()

    def wait_for_more(self, seconds, most=MAX_PIPELINED_BYTES):
        """Block until more bytes are in the buffer, about `most`; return whether they are.
        Raises PeerGone."""
        deadline = time.monotonic() + seconds
        try:
            self.receive(deadline, most)
            return True
        except socket.timeout:
            return False

    def has_request(self, seconds):
        """Block until the next request begins; return whether it has. Raises PeerGone."""
        self.began = time.monotonic() if self.buffer else None
        return bool(self.buffer) or self.wait_for_more(seconds, self._limits.max_head_bytes)

    def take_in(self):
        """Read what is there, without blocking; return whether a request has begun, or a
        handshake. Raises PeerGone."""
        if not self.secured:
            if self.has_hung_up():
                raise PeerGone()
            return True
        try:
            data = self._receive_some(0.0, self._limits.max_head_bytes)
            self._keep(data if self.tls is None else self.tls.decrypt(data))
        except socket.timeout:
            pass
        return bool(self.buffer)

    def head_deadline(self):
        """The instant by which the head of the request that has begun must be complete."""
        if self.idle_until is not None:    # the first request: counted from accept
            return self.idle_until
        return (self.began or time.monotonic()) + self._limits.head_seconds

    def park_until(self):
        """The instant until which the next request must have begun."""
        return self.idle_until or time.monotonic() + self._limits.idle_seconds

    # -- TLS --

    def shake_hands(self, seconds):
        """Do the TLS handshake, if there is one to do. Blocks at most that long. Raises
        PeerGone.

        A peer that does not begin with a TLS record is taken to speak plain HTTP: tls is
        None then, and it can be told where to go.
        """
        if self.secured:
            return
        deadline = time.monotonic() + seconds
        try:
            data = self._receive_some(deadline)
            self.secured = True
            if data[:1] != b"\x16":        # handshake (RFC 8446, 5.1)
                self.buffer, self.tls = data, None
                return
            done = False
            while not done:
                done, answer = self.tls.shake_hands(data)
                self._send_all(answer)
                if not done:
                    data = self._receive_some(deadline)
            self.buffer = self.tls.decrypt(b"")      # what came with its last record
            self.idle_until = time.monotonic() + self._limits.head_seconds
        except OSError:                    # too late, or no TLS that we speak
            self.say_goodbye()
            raise PeerGone() from None

    # -- sending --

    def send(self, data):
        """Send all of data. Blocks at most write_seconds for each 64 KiB. Raises
        PeerGone."""
        try:
            if len(data) <= 65536:
                return self._send_all(self.tls.encrypt(data) if self.tls else data)
            view = memoryview(data)
            for start in range(0, len(data), 65536):
                part = view[start:start + 65536]
                self._send_all(self.tls.encrypt(part) if self.tls else part)
        except (OSError, ValueError):
            raise PeerGone() from None

    def _send_all(self, data, seconds=None):
        deadline = None
        while data:
            try:
                sent = self.sock.send(data, MSG_DONTWAIT)
                if sent == len(data):
                    return
                data = memoryview(data)[sent:]
            except (BlockingIOError, InterruptedError):
                deadline = deadline or time.monotonic() + (
                    seconds or self._limits.write_seconds)
                self._wait(selectors.EVENT_WRITE, deadline)

    def send_now(self, data):
        """Send what the kernel takes at this moment; flush sends the rest. Never blocks.
        Nothing else may be sent while there is something unsent."""
        if self.tls is not None:
            data = self.tls.encrypt(data)
        try:
            sent = self.sock.send(data, MSG_DONTWAIT)
        except OSError:                    # full; or broken, as the next write will see
            sent = 0
        self.unsent = data[sent:]

    def flush(self):
        """Send what send_now could not. Blocks at most write_seconds. Raises PeerGone."""
        try:
            if self.unsent:
                self._send_all(self.unsent)
                self.unsent = b""
        except (OSError, ValueError):
            raise PeerGone() from None

    # -- the end --

    def when_gone(self, callback):
        """Call callback(), in some thread, as soon as the peer has hung up; None: nothing.
        A later call replaces an earlier one."""
        self.on_gone = callback            # both store before loading, so neither misses it
        if self.gone and callback is not None:
            callback()

    def hang_up(self):
        """The peer has hung up: call the callback of when_gone."""
        self.gone = True
        on_gone = self.on_gone
        if on_gone is not None:
            on_gone()

    def has_hung_up(self):
        """Whether the peer has closed, as far as the next byte shows: for systems that do
        not report it."""
        try:
            flags = socket.MSG_PEEK | MSG_DONTWAIT
            return not self.sock.recv(1, flags)
        except (BlockingIOError, InterruptedError):
            return False
        except (OSError, ValueError):
            return True

    def abort(self):
        """Break the connection: every thread that waits for it gets PeerGone."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def say_goodbye(self):
        """Say that this is the end; without it, TLS takes it for a cut. Blocks at most
        LINGER_SECONDS."""
        with contextlib.suppress(OSError):
            if self.tls is not None:
                self._send_all(self.tls.farewell(), LINGER_SECONDS)
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)

    def linger(self):
        """Let the peer read the last response before the connection is reset. Blocks at most
        LINGER_SECONDS.

        Closing with its bytes unread would make the kernel send RST, which destroys the
        response at the peer. nginx does the same (lingering_close).
        """
        deadline = time.monotonic() + LINGER_SECONDS
        self.buffer = b""
        with contextlib.suppress(OSError, PeerGone):
            left = LINGER_BYTES
            while left > 0:
                left -= len(self._receive_some(deadline))

    def close(self, idle=False):
        """Close the socket, give the slot back, and tell the one who waits for it. idle: no
        response was cut, so tell TLS that this is the end, unless that would block."""
        with contextlib.suppress(OSError):
            if idle and self.tls is not None and self.secured:
                self.sock.send(self.tls.farewell(), MSG_DONTWAIT)
        with contextlib.suppress(OSError):
            self.sock.close()
        if self.on_close is not None:
            self.on_close()
        if self.slot is not None:
            self.slot.release()


def is_ready(sock, event, seconds):
    """Block until a socket can be read (EVENT_READ) or written; whether it can."""
    if not hasattr(select, "poll"):        # Windows
        sockets = ([sock], [], []) if event == selectors.EVENT_READ else ([], [sock], [])
        return any(select.select(*sockets, seconds))
    poll = select.poll()
    poll.register(sock, select.POLLIN if event == selectors.EVENT_READ else select.POLLOUT)
    return bool(poll.poll(math.ceil(seconds * 1000)))


class HangUps:
    """One thread that sees connections hang up while their own threads wait elsewhere."""

    ASK_SECONDS = 0.25       # how often connections are asked where the system cannot tell

    def __init__(self):
        self._connections = {}             # file descriptor -> Connection
        self._lock = threading.Lock()      # while held, a descriptor means one Connection
        self._looking = threading.Lock()   # until what was seen is reported
        # Linux reports a hang-up even behind unread bytes, and nothing else.
        # Other systems are asked for each connection with an answer on its way.
        self._epoll = select.epoll() if hasattr(select, "EPOLLRDHUP") else None

    @contextlib.contextmanager
    def watching(self, connection):
        """Call connection.hang_up(), in some thread, when its peer hangs up."""
        descriptor = connection.fileno()
        with self._lock:
            if self._epoll is not None:
                self._epoll.register(descriptor, select.EPOLLRDHUP | select.EPOLLET)
            self._connections[descriptor] = connection
        try:
            yield
        finally:
            with self._lock:
                del self._connections[descriptor]
                if self._epoll is not None:
                    self._epoll.unregister(descriptor)

    def look(self):
        """Report the hang-ups that the kernel knows of at this moment.

        Also called before a prompt is compared with those that a client has left: it may
        have hung up a moment before it asked again.
        """
        with self._looking:
            with self._lock:
                if self._epoll is None:
                    gone = self._ask()
                else:
                    gone = [self._connections[fd] for fd, _ in self._epoll.poll(0)]
            for connection in gone:
                connection.hang_up()

    def _ask(self):
        return [connection for connection in self._connections.values()
                if connection.on_gone is not None and not connection.gone
                and connection.has_hung_up()]

    def run(self):
        """Report hang-ups until the process ends. Run it in its own thread."""
        while True:
            if self._epoll is None:        # macOS, Windows
                time.sleep(self.ASK_SECONDS)
            else:
                select.select([self._epoll], [], [])
            self.look()


class Lobby:
    """Connections between two requests. They need no threads: one watches them all, and
    hands each back when its next request begins. So 10,000 of them may close at once."""

    def __init__(self, serve):
        """serve(connection): called when its next request has begun; it must not block."""
        self._serve = serve
        self._selector = selectors.DefaultSelector()
        # Windows' select takes 512 sockets: there each connection keeps its thread.
        self.holds = not isinstance(self._selector, selectors.SelectSelector)
        self._arriving = deque()           # (Connection, deadline); None: close the oldest
        self._parked = OrderedDict()       # Connection -> deadline; for the own thread only
        self._wake_up, woken = socket.socketpair()
        self._wake_up.setblocking(False)
        woken.setblocking(False)
        self._woken = woken
        self._selector.register(woken, selectors.EVENT_READ)

    def park(self, connection, deadline):
        """Watch a connection until its next request begins, or close it at the deadline."""
        self._arriving.append((connection, deadline))
        self._wake()

    def close_oldest(self):
        """Make room: close the connection that has been here longest."""
        self._arriving.append(None)
        self._wake()

    def _wake(self):
        with contextlib.suppress(OSError):     # full: it will wake up anyhow
            self._wake_up.send(b"x")

    def run(self):
        """Watch until the process ends. Run it in its own thread."""
        next_look = 0.0
        while True:
            for key, _ in self._selector.select(1 if self._parked else None):
                if key.fileobj is self._woken:
                    with contextlib.suppress(OSError):
                        self._woken.recv(4096)
                else:
                    self._hand_back(key.fileobj)
            while self._arriving:
                self._arrive(self._arriving.popleft())
            now = time.monotonic()
            if now < next_look:            # a look at 10,000 takes a millisecond
                continue
            next_look = now + 1
            for connection in [c for c, due in self._parked.items() if due <= now]:
                self._remove(connection)
                connection.close(idle=True)

    def _arrive(self, arrival):
        if arrival is not None:
            connection, self._parked[arrival[0]] = arrival
            self._selector.register(connection, selectors.EVENT_READ)
        elif self._parked:
            connection = next(iter(self._parked))
            self._remove(connection)
            connection.close(idle=True)

    def _remove(self, connection):
        del self._parked[connection]
        self._selector.unregister(connection)

    def _hand_back(self, connection):
        try:
            if not connection.take_in():
                return
            self._remove(connection)
            self._serve(connection)
        except PeerGone:
            self._remove(connection)
            connection.close(idle=True)


class Threads:
    """Runs calls in threads of their own; a thread that is done takes the next call."""

    def __init__(self):
        self._calls = queue.SimpleQueue()
        self._idle = 0                     # threads that wait for a call
        self._lock = threading.Lock()      # guards _idle, and that each call has a thread

    def run(self, call):
        """Run call() in a thread. Raises RuntimeError if the system has no more threads."""
        with self._lock:
            if self._idle:
                self._idle -= 1
                return self._calls.put(call)
        threading.Thread(target=self._work, args=(call,), daemon=True).start()

    def _work(self, call):
        while call is not None:
            call()
            call = None                    # it holds a connection
            with self._lock:
                self._idle += 1
            call = self._next()

    def _next(self):
        """The next call for an idle thread, or None if it should end."""
        while True:
            with contextlib.suppress(queue.Empty):
                return self._calls.get(timeout=KEPT_SECONDS)
            with self._lock:
                if self._calls.empty():    # else the call came just now
                    self._idle -= 1
                    return None


##############################################################################
# JSON: parsing within bounds, and one schema for the fields of requests
#
# The spine gets dicts whose known fields have been checked. Without the bounds, one body
# could stop all threads for seconds, or overflow the stack of one.
##############################################################################

MAX_DEPTH = 100              # of nested JSON
# Parsing holds the interpreter lock, so all other threads wait: these bounds keep a body
# under about 50 ms, measured at 200 ns a number or object and 20 ns an escape.
MAX_BRACKETS = 100000        # objects and lists in one body: each takes 60 to 300 bytes
MAX_COMMAS = 150000          # outside of texts; a prompt may be 128,000 numbers of tokens
MAX_QUOTES = 200000          # that begin or end a text
MAX_ESCAPES = 2000000        # backslashes
MAX_DIGITS = 100             # of a whole number, whose conversion takes quadratic time
LENGTH_FIELDS = ("max_new_len", "max_tokens", "max_completion_tokens", "max_output_tokens",
                 "n_predict", "num_predict", "max_length", "max_new_tokens",
                 "max_tokens_to_sample")
ALIKE = bytes.maketrans(b"{}", b"[]")
NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))

# Pure ASCII, for what is read line by line: the text of others cannot break a line.
quoted = json.encoder.encode_basestring_ascii      # a text as JSON, a third of dumps' time
encode_ascii = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode
encode_utf8 = json.JSONEncoder(separators=(",", ":"), check_circular=False,
                               ensure_ascii=False).encode


def dumps(value):
    """JSON as bytes of ASCII, for a line or an event of a stream."""
    return encode_ascii(value).encode("ascii")


def to_json(value):
    """JSON as bytes of UTF-8, for a whole body: escapes would make it up to six times as
    large. Half a surrogate pair has no UTF-8, so such a text is escaped."""
    try:
        return encode_utf8(value).encode("utf-8")
    except UnicodeEncodeError:
        return dumps(value)


def outside_texts(body):
    """The bytes of JSON that stand between its texts."""
    if b"\\" in body:
        body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    return b"".join(body.split(b'"')[::2])


def too_deep(body, most=MAX_DEPTH):
    """Whether JSON is nested deeper than that, without parsing it.

    The parser recurses in C: 3,000 levels overflow a thread's stack on Python 3.13.
    """
    if body.count(b"[") + body.count(b"{") <= most:
        return False
    brackets = outside_texts(body).translate(ALIKE, NOT_BRACKETS)
    for _ in range(most):
        if not brackets:
            return False
        brackets = brackets.replace(b"[]", b"")      # the innermost level
    return bool(brackets)


def refuse_constant(name):
    raise ValueError(name + " is not JSON")


def finite(text):
    if math.isinf(float(text)):            # it could not be written as JSON again
        raise ValueError(text[:20] + " is too large")
    return float(text)


def short_int(text):
    return int(text) if len(text) <= MAX_DIGITS else refuse_constant("So long a number")


# A thread may lose its turn in a function of Python's, but not between numbers in C.
decode_json = json.JSONDecoder(parse_constant=refuse_constant, parse_float=finite,
                               parse_int=short_int).decode


def check_counts(body):
    """Raise RelayError if parsing this JSON would take too long."""
    def check(what, count, most):
        if count > most:
            raise RelayError("invalid_json", "The body has more than %d %s." % (most, what))

    escapes = body.count(b"\\")
    check("backslashes", escapes, MAX_ESCAPES)
    check("quotes", body.count(b'"') - (body.count(b'\\"') if escapes else 0), MAX_QUOTES)
    check("objects and lists", body.count(b"{") + body.count(b"["), MAX_BRACKETS)
    if body.count(b",") > MAX_COMMAS:      # last: with more quotes this would take long
        check("commas", outside_texts(body).count(b","), MAX_COMMAS)


def parse_json(body):
    """Return the JSON object that body is. Raises RelayError."""
    if body[:3] == b"\xef\xbb\xbf":        # a byte order mark, as PowerShell's files have
        body = body[3:]
    if len(body) > MAX_BRACKETS:
        check_counts(body)
    if too_deep(body):
        raise RelayError("invalid_json", "The body is nested deeper than %d levels."
                         % MAX_DEPTH)
    try:
        value = decode_json(body.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise RelayError("invalid_json", "The body is not JSON: %s." % printable(error))
    if type(value) is not dict:
        raise RelayError("invalid_json", "The body is not a JSON object: {...}.")
    return value


def printable(value, most=200):
    """Text of others, made fit for one line of ours: ASCII without control characters."""
    text = str(value)
    text = text if len(text) <= most else text[:most] + "..."
    return text.encode("ascii", "backslashreplace").decode("ascii").translate(
        {code: "?" for code in [*range(32), 127]})


class Kind:
    """What a field may be. accept(value) returns the value to keep, or raises ValueError or
    TypeError; words complete "FIELD must be ..." in errors and in docs/."""

    def __init__(self, words, accept):
        self.words, self.accept = words, accept


def number(low, high, whole=False):
    """A number; whole: without a fraction, and 5.0 becomes 5."""
    def accept(value):
        if type(value) not in (int, float) or not low <= value <= high or (
                whole and value != int(value)):
            raise ValueError
        return int(value) if whole else value
    return Kind("a %s from %s to %s" % ("whole number" if whole else "number", low, high),
                accept)


def whole_number(low, high):
    return number(low, high, whole=True)


def flag():
    def accept(value):
        if type(value) is not bool:
            raise ValueError
        return value
    return Kind("true or false", accept)


def text(most=None, line=False):
    """A text; line: without line breaks and control characters."""
    def accept(value):
        if type(value) is not str or most and len(value) > most or (
                line and not value.isprintable()):
            raise ValueError
        return value
    words = "one line of text" if line else "a text"
    return Kind(words + (" of at most %d characters" % most if most else ""), accept)


def of_type(kind, words):
    def accept(value):
        if type(value) is not kind:
            raise ValueError
        return value
    return Kind(words, accept)


def leases():
    """A list of [job, attempt], as pairs."""
    def accept(value):
        if type(value) is not list:
            raise ValueError
        pairs = [(job, attempt) for job, attempt in value]
        if not all(is_lease(job, attempt) for job, attempt in pairs):
            raise ValueError
        return pairs
    return Kind("a list of [job, attempt]", accept)


def texts(most, length):
    """A list of short lines."""
    def accept(value):
        if type(value) is not list or len(value) > most:
            raise ValueError
        return [text(length, line=True).accept(item) for item in value]
    return Kind("a list of at most %d lines of at most %d characters" % (most, length),
                accept)


def messages():
    def accept(value):
        if type(value) is not list or not value:
            raise ValueError
        for message in value:
            if type(message) is not dict or type(message.get("role")) is not str or \
                    type(message.get("content")) not in (str, list, type(None)):
                raise ValueError
        return value
    return Kind('a list, not empty, of {"role", "content"}, where content is a text or a '
                "list of parts", accept)


def raw_flag():
    def accept(value):
        if str(value).lower() not in ("true", "false", "", "0", "1", "none"):
            raise ValueError
        return value
    return Kind("true or false", accept)


def no_limit_or_length():
    """-1 means "no limit" to llama.cpp and LM Studio; check_fields then drops the field."""
    length = whole_number(1, 10**7)
    return Kind(length.words, lambda value: None if value == -1 else length.accept(value))


SAMPLING_FIELDS = {
    "temperature": number(0, 100),
    "top_p": number(0, 1),
    "seed": whole_number(-2**63, 2**64 - 1),
}
RELAY_FIELDS = {                           # on which the relay acts itself
    "key": text(512),
    "gettokens": whole_number(1, 10**5),
    "at": whole_number(0, 10**9),
    "stream": flag(),
    "wait": flag(),
}
NATIVE_FIELDS = dict(
    SAMPLING_FIELDS,
    **RELAY_FIELDS,
    message=text(),
    messages=messages(),
    top_k=whole_number(-1, 10**6),
    min_p=number(0, 1),
    repetition_penalty=number(0, 100),
    max_new_len=whole_number(1, 10**7),
    raw=raw_flag(),
    n=whole_number(1, 1),
    best_of=whole_number(1, 1))
# All others go to the provider; the last three only the relay may say.
NOT_FOR_PROVIDERS = frozenset(RELAY_FIELDS) | {"command", "api", "opaque", "reply_so_far"}
OPENAI_FIELDS = dict(
    SAMPLING_FIELDS,
    max_tokens=no_limit_or_length(),
    max_completion_tokens=no_limit_or_length(),
    n=whole_number(1, 128),
    best_of=whole_number(1, 128),
    stream=flag(),
    stream_options=of_type(dict, "an object"),
    wait=flag())
LOGIN_FIELDS = {
    "workers": whole_number(1, 10**6),
    "continues": flag(),
    "embeddings": flag(),
    "context_length": whole_number(1, 10**9),
    "apis": texts(20, 40),
    "vision": flag(),
    "tools": flag(),
}
POLL_FIELDS = {"running": leases()}
SERVICE_FIELDS = {
    "operator": text(100, line=True),
    "comment": text(500, line=True),
    "suggestions": texts(4, 200),
}
CHANGE_FIELDS = dict(
    SERVICE_FIELDS,
    name=text(),
    private=flag(),
    paused=flag(),
    new_key=flag(),
    anonymous_per_day=whole_number(1, 10**9))
KEY_FIELDS = {
    "label": text(100, line=True),
    "requests_per_day": whole_number(0, 10**9),
    "tokens_per_day": whole_number(0, 10**12),
    "concurrency": whole_number(1, 10**4),
    "max_new_len": whole_number(1, 10**7),
    "expires": number(0, 10**11),
}
ITEM_FIELDS = {              # of an item that is an object
    "reasoning": text(),
    "finish_reason": text(),
    "usage": of_type(dict, "an object"),
    "delta": of_type(dict, "an object"),
}


def check_fields(request, fields):
    """Check the fields of a request that a schema has, and drop those that are null. Raises
    RelayError."""
    for name in fields.keys() & request.keys():
        value = request[name]
        try:
            value = None if value is None else fields[name].accept(value)
        except (TypeError, ValueError, OverflowError):
            raise RelayError("invalid_request", "%s must be %s." % (
                name, fields[name].words), param=name) from None
        if value is None:
            del request[name]
        else:
            request[name] = value


def cap_length(request, access, usual):
    """Limit the answer's length to what an access key allows, whichever field asks for it.
    usual: the field to set if there is none; None: there is no such field."""
    most = access.max_new_len if access is not None else None
    if most is None:
        return
    for holder in (request, request.get("options")):   # Ollama's are in options
        for field in LENGTH_FIELDS if type(holder) is dict else ():
            if field in holder:
                asked = holder[field]
                holder[field] = (min(asked, most) if type(asked) in (int, float)
                                 and asked > 0 else most)
    if usual is not None:
        request.setdefault(usual, most)


CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")    # JSON takes six bytes for each


def size_of(items):
    """Roughly the bytes of memory that these items take."""
    size = ITEM_BYTES * len(items)
    for item in items:
        size += len(item) * (1 if item.isascii() or isinstance(item, bytes) else 4)
    return size


def json_size(items):
    """Roughly the bytes that these items take as JSON, and while it is made."""
    texts = [item for item in items if type(item) is str]
    return (6 if any(map(CONTROL.search, texts)) else 2) * size_of(items)


def text_of(items):
    """The text of an answer, or of a part of it."""
    return "".join([item for item in items if type(item) is str])


def only_text(items):
    """Whether an answer so far is nothing but text."""
    return all(type(item) is str for item in items)


class Raw(bytes):
    """An item of an opaque answer: a whole JSON body, or one SSE event, as the upstream sent
    it. The relay writes it out and never parses it."""

    __slots__ = ()


def encoded_item(item):
    """Return a provider's item as a Job keeps it: str, the bytes of a JSON object, or Raw.
    Raises ValueError or TypeError if it can be no piece of an answer."""
    if type(item) is str:
        # A lone surrogate cannot be encoded.
        return item if item.isascii() else item.encode("utf-8", "replace").decode("utf-8")
    if type(item) is not dict:
        raise ValueError
    for name in ("result", "event"):
        if type(item.get(name)) is str:
            return Raw(item[name].encode("utf-8", "replace"))
    if type(item.get("result") or {}) is not dict:
        raise ValueError
    check_calls(item.get("tool_calls"))
    for name, kind in ITEM_FIELDS.items():
        if item.get(name) is not None:
            kind.accept(item[name])
    return dumps(item)


def check_calls(calls):
    """Raise ValueError if these cannot be the tool calls of an item."""
    for call in of_type(list, "").accept(calls) if calls is not None else ():
        function = call.get("function") or {} if type(call) is dict else None
        if type(function) is not dict or any(
                type(part or "") is not str for part in (
                    call.get("id"), call.get("type"), function.get("name"),
                    function.get("arguments"))):
            raise ValueError


MAX_ID_CHARACTERS = 64       # of a job's id, as a provider may name it


def is_lease(job, attempt, at=0):
    """Whether this can be a job's id, the number of an attempt, and an item offset."""
    return (type(job) is str and len(job) <= MAX_ID_CHARACTERS
            and type(attempt) is type(at) is int and 0 <= attempt | at < 2**31)


def session_of(request):
    """Return the session that a provider's request names. Raises RelayError."""
    session = request.get("session")
    if not isinstance(session, str):
        raise RelayError("invalid_request", "session must be the text that login answered.",
                         param="session")
    return session


def check_entry(entry):
    """Check one entry of a push, and encode its items. A mistake of the provider's program
    becomes an error of that one job, so that its client learns of it."""
    if type(entry) is not dict or not is_lease(
            entry.get("job"), entry.setdefault("attempt", 0), entry.setdefault("at", 0)):
        raise RelayError("invalid_request", "Each entry of replies must have job, attempt, "
                         "at and items.", param="replies")
    items, entry["raw"] = entry.setdefault("items", []), False
    if not is_plain(items):
        try:
            if type(items) is not list:
                raise ValueError
            entry["items"] = list(map(encoded_item, items))
            entry["raw"] = any(type(item) is Raw for item in entry["items"])
        except (TypeError, ValueError):
            entry["items"] = []
            entry["fault"] = provider_error({"message": "its reply is not text"})
    if entry.get("error"):
        entry["error"] = provider_error(entry["error"])


def is_plain(items):
    """Whether this is a list of texts in ASCII, as most are: it needs no closer look."""
    try:
        return type(items) is list and "".join(items).isascii()
    except TypeError:
        return False


# The names that a provider may give for a job; any other becomes provider_error.
PROVIDER_ERRORS = frozenset(("provider_error", "invalid_request", "unsupported",
                             "context_length_exceeded", "provider_timeout"))


def provider_error(error):
    """Return the RelayError for what a provider says of a job."""
    error = error if isinstance(error, dict) else {"message": error}
    name = error.get("error")
    if not isinstance(name, str) or name not in PROVIDER_ERRORS:
        name = "provider_error"
    words = str(error.get("message", "no reason given"))
    words = printable(" ".join(words[:2000].split()), 500).rstrip(".")   # many have lines
    upstream = clean_upstream_error(error)
    if not upstream:
        words = "The provider could not answer: %s." % words
    return RelayError(name, words, **upstream)


def encode_work(offers, cancels, refused):
    """The response to poll and reply as JSON, in parts. The prompts are JSON already."""
    parts = [b'{"errorcode":0,"jobs":[']
    for job, attempt, at, text in offers:
        request = job.payload or b"{}"     # empty if the job has just been dropped
        if text is not None and job.payload:
            request = request[:-1] + b',"reply_so_far":%s}' % to_json(text)
        parts += (b'%s{"job":"%s","attempt":%d,"at":%d,"request":' % (
            b"," if len(parts) > 1 else b"", job.id.encode("ascii"), attempt, at),
            request, b"}")
    parts.append(b'],"cancel":%s' % (dumps(cancels) if cancels else b"[]"))
    if refused is not None:
        parts.append(b',"refused":%s' % (dumps(refused) if refused else b"[]"))
    parts.append(b"}")
    return parts


class BytesUnderWay:
    """The memory that one body takes, from the arrival of its bytes until it is parsed."""

    UNCOUNTED = 16384                      # bytes that always pass

    def __init__(self, exchange):
        self._exchange, self._slots, self._total = exchange, [], 0

    def __enter__(self):
        return self._count

    def _count(self, size):
        """Take room for bytes that came. Raises RelayError if there is none."""
        exchange = self._exchange
        self._total += size
        self._slots.append(exchange.bounds.bytes.take(
            exchange.address, size, always=self._total <= self.UNCOUNTED,
            reserved=exchange.trusted, give_way=exchange.connection.abort))

    def __exit__(self, *_):
        for slot in self._slots:
            slot.release()


##############################################################################
# Responses: heads, errors and logs, in the words of each API
##############################################################################

LARGE_PER_MINUTE = 300           # MiB in large bodies, per address
HEADER_VALUE = re.compile(r"[\x20-\x7e]*\Z")
OPENAI_PATH = re.compile(rb"[A-Z]+ \S*/(?:v1/|chat/completions|completions|embeddings|"
                         rb"models\b|responses|rerank|tokenize|detokenize)")
ANTHROPIC_PATH = re.compile(rb"[A-Z]+ \S*/v1/messages\b")
STATUS_LINES = {status.value: ("HTTP/1.1 %d %s\r\n" % (status, status.phrase)).encode()
                for status in http.HTTPStatus}
STATUS_LINES[529] = b"HTTP/1.1 529 Overloaded\r\n"           # Anthropic's
SECURITY_HEADERS = (
    b"Server: neuroengine\r\nX-Content-Type-Options: nosniff\r\n"
    b"Referrer-Policy: no-referrer\r\n")
CORS_HEADERS = (
    b"Access-Control-Allow-Origin: *\r\n"
    b"Access-Control-Expose-Headers: x-request-id, retry-after, x-should-retry, "
    b"x-ratelimit-limit-requests, x-ratelimit-remaining-requests, "
    b"x-ratelimit-reset-requests, "
    b"x-neuroengine-queue-ms, x-neuroengine-overhead-ms\r\n")
HEADER_LIST = re.compile(r"[A-Za-z0-9,_ -]{0,2000}\Z")
ANTHROPIC_TYPES = {          # of an error, by its status
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
    404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error",
    503: "overloaded_error", 529: "overloaded_error"}
UPSTREAM_STATUSES = frozenset((400, 404, 409, 413, 415, 422, 429, 502, 503, 504, 529))


@functools.lru_cache(maxsize=100)
def common_head(status, kind, api, keep_alive, cached):
    """What most responses begin with."""
    lines = [STATUS_LINES[status], SECURITY_HEADERS]
    if status not in (204, 304):
        lines.append(b"Content-Type: %s\r\n" % kind.encode("ascii"))
    if not cached:
        lines.append(b"Cache-Control: no-store\r\n")
    if api in ("openai", "anthropic"):
        lines.append(CORS_HEADERS)
    if not keep_alive:
        lines.append(b"Connection: close\r\n")
    return b"".join(lines)


@functools.lru_cache(maxsize=1)
def date_header(second):
    """The Date header line, made once a second."""
    return b"Date: %s\r\n" % formatdate(second, usegmt=True).encode()


class HttpExchange(Exchange):
    """An Exchange with its bytes: how a body is read, how a response is written."""

    # -- the request --

    def read_object(self, most=None):
        """Return the request's body, a JSON object, as a dict. most: bytes, if less than the
        limit. Raises RelayError."""
        coding = self.head.fields.get("content-encoding", "identity")
        if coding.lower() != "identity":
            raise RelayError("unsupported_encoding", "Send the body without a "
                             "Content-Encoding.")
        with BytesUnderWay(self) as count:
            body = self.read_bytes(most, count)
            self.body_read = True
            if len(self.connection.buffer) > MAX_PIPELINED_BYTES:
                # Its client may send them again (RFC 9112, 9.3.2).
                self.connection.buffer, self.keep_alive, self.body_read = b"", False, False
            self.fingerprint = hashlib.sha256(body).digest()
            if len(body) > LARGE_BODY_BYTES:
                self._charge_large(len(body))
                # Parsed, it may need thirty times its bytes: so one at a time.
                self.bounds.large_bodies.acquire(self.address)
                self.parsing = True
            return parse_json(body)

    def read_bytes(self, most, count):
        """Return the request's body as bytes: see read_body."""
        return read_body(self.connection, self.head, self.limits, most, count)

    def _charge_large(self, size):
        """Count a large body for this address."""
        if not (self.local or self.trusted):
            self.bounds.megabytes.take_by_address(
                self.address, LARGE_PER_MINUTE, 60, "large requests, in MB", size / MIB)

    def drop(self, request):
        """Empty a request before this thread waits: it may be large."""
        request.clear()
        self.release_large_body()

    def release_large_body(self):
        """The body, if it was large, is not in memory as objects any more."""
        if self.parsing:
            self.parsing = False
            self.bounds.large_bodies.release()

    def charge_guess(self, what):
        """Count a wrong key, or a stream key that names nothing, for this address."""
        self.release_large_body()          # it is refused; and an engine may have to be asked
        self.bounds.wrong_keys.take_by_address(
            self.address, self.limits.max_wrong_keys_per_minute, 60, what)

    # -- the response --

    def response(self, status, body, kind=JSON, error=None, more=b"", **headers):
        """Return (head, body) of a whole response as bytes. body: bytes, or a value to be
        sent as JSON. more: encoded header lines. headers: names with "_" for "-"."""
        self.started = True
        if not isinstance(body, bytes):
            body = to_json(body)
        if error is not None:
            headers.update(error_headers(error, self.api))
        if status not in (204, 304):       # RFC 9110, 8.6
            more += b"Content-Length: %d\r\n" % len(body)
        head = self.head_bytes(status, kind, headers, more) + b"\r\n"
        if self.head is not None and self.head.method == "HEAD":
            body = b""
        return head, body

    def chunked_head(self, kind, more=b"", **headers):
        """Return the head of a response whose length is not known yet."""
        self.started = True
        if self.head.version == 0:
            self.keep_alive = False        # its end is the connection's
        else:
            more += b"Transfer-Encoding: chunked\r\n"
        return self.head_bytes(200, kind, headers, more) + b"\r\n"

    def framed(self, data, last=False):
        """Return a piece of such a body as it is sent."""
        if self.head.version == 0:
            return data
        if data:                           # an empty chunk would be the last
            data = b"%x\r\n%s\r\n" % (len(data), data)
        return data + b"0\r\n\r\n" if last else data

    def head_bytes(self, status, kind, headers, more=b""):
        """Return a response's head without its end. Raises ValueError rather than send what
        would not be one line."""
        head = common_head(status, kind, self.api, self.keep_alive and self.body_read,
                           "cache_control" in headers)
        for name, value in headers.items():
            if not HEADER_VALUE.match(value):
                raise ValueError("ill-formed header %s: %r" % (name, value))
            head += ("%s: %s\r\n" % (name.replace("_", "-"), value)).encode("ascii")
        return b"%s%s%sX-Request-Id: %s\r\n" % (
            head, more, date_header(int(time.time())), self.id.encode("ascii"))

    def respond(self, status, body, kind=JSON, **more):
        """Send one whole response: see response."""
        self.send_whole(*self.response(status, body, kind, **more))

    def send_whole(self, head, body):
        """Send a whole response, the last of its exchange."""
        # A client that has the whole answer may disconnect, and ask the same again at once.
        self.connection.when_gone(None)
        self.release_large_body()          # the peer may read slowly
        self.send_parts(head, body)

    def send_parts(self, head, body):
        """Send a whole response. If the peer hangs up, when_gone's callback is called."""
        if len(body) <= MAX_SMALL_BODY_BYTES:
            return self.connection.send(head + body)
        self.connection.send(head)         # two writes, but no copy
        self.connection.send(body)

    def room(self, size):
        """Take memory for the bytes of a response, before they are made. Blocks until there
        is some. Returns a context manager that releases it."""
        if size <= DIRECT_BYTES:
            return contextlib.nullcontext()
        room = self.bounds.bytes
        return room.take(self.address, min(size, room.most // 2), reserved=True,
                         give_way=self.connection.abort, wait=self.limits.write_seconds)

    def explain(self, error):
        """Return the RelayError for whatever went wrong; a fault of ours is logged."""
        if isinstance(error, RelayError):
            return error
        if isinstance(error, sqlite3.Error):
            log("cannot_save", error=str(error))
            return RelayError("relay_busy", "The relay cannot write its data now. Try again "
                              "later.", retry_after=30)
        log("internal_error", request=self.id, error=printable(repr(error)), traceback=True)
        return RelayError("internal_error", "An internal error of the relay, logged as %s."
                          % self.id)

    def error_response(self, error):
        """Return (head, body) of the response for an error, in the form of the API in use."""
        self.relay.tally.count("errors", error.name)
        if self.head is None or not self.body_read:
            self.keep_alive = False        # where the next request begins is unknown
        return self.response(error.status, ERROR_FORMS[self.api](error), error=error)


def guess_api(head):
    """Whose API a request belongs to that has no route, by the bytes of its head."""
    if ANTHROPIC_PATH.match(head):
        return "anthropic"
    return "openai" if OPENAI_PATH.match(head) else "native"


def openai_error(error):
    """A RelayError as OpenAI's clients expect it."""
    words = error.words
    if error.code == "context_length_exceeded":    # LangChain looks for it in the words
        words += " (%s)" % error.code
    return {"error": {"message": words, "type": error.type, "param": error.param,
                      "code": error.code}}


def anthropic_error(error):
    """A RelayError as Anthropic's clients expect it."""
    kind = error.type if error.type in ANTHROPIC_TYPES.values() else ""
    return {"type": "error", "error": {
        "type": ANTHROPIC_TYPES.get(error.status, kind or "api_error"),
        "message": error.words}}


ERROR_FORMS = {                            # whose API: how it reports a RelayError
    "native": RelayError.native, "operator": RelayError.native,
    "provider": RelayError.native, "page": RelayError.native,
    "openai": openai_error,
    "anthropic": anthropic_error,
}


def error_headers(error, api):
    """The response headers that go with an error."""
    headers = {}
    if error.retry_after is not None:
        headers["retry_after"] = str(math.ceil(error.retry_after))
    if error.allow is not None:
        headers["allow"] = error.allow
    if error.status == 401:
        headers["www_authenticate"] = "Bearer"
    if api in ("openai", "anthropic"):
        # Their clients repeat 408, 409, 429 and all from 500 by themselves.
        if not error.retry:
            headers["x_should_retry"] = "false"
        if error.limit is not None:
            headers.update(
                x_ratelimit_limit_requests=str(error.limit),
                x_ratelimit_remaining_requests="0",
                x_ratelimit_reset_requests="%ds" % math.ceil(error.retry_after))
    return headers


def clean_upstream_error(error):
    """What a provider passes on of its upstream's error, as arguments of RelayError."""
    passed = {}
    if type(error.get("status")) is int and error["status"] in UPSTREAM_STATUSES:
        passed["status"] = error["status"]
        passed["retry"] = error["status"] in (429, 503, 529)
    for name in ("type", "code", "param"):
        if type(error.get(name)) is str:
            passed[name] = printable(error[name], 100)
    after = error.get("retry_after")
    if type(after) in (int, float) and 0 <= after <= DAY_SECONDS:
        passed["retry_after"] = after
    return passed


def usage_of(items):
    """The provider's own count of tokens, a dict that comes near the end; or None."""
    for item in items[:-4:-1]:
        if type(item) is bytes and len(item) <= DIRECT_BYTES and b'"usage"' in item:
            usage = json.loads(item).get("usage")
            if isinstance(usage, dict):
                return usage
    return None


def count_tokens(items):
    """How many tokens an answer has: as the provider counted, else one for each text."""
    count = (usage_of(items) or {}).get("completion_tokens")
    if type(count) is int and 0 <= count < 10**9:
        return count
    return [type(item) for item in items].count(str)


def moving_average(old, new):
    """The average in which each new value counts a fifth."""
    return new if old is None else 0.8 * old + 0.2 * new


def stats_of(job):
    """What an answer took, for its client, as JSON: milliseconds, tokens, and their rate."""
    end = job.created if job.ended_at is None else job.ended_at
    leased = end if job.leased_at is None else job.leased_at
    first = end if job.first_at is None else job.first_at
    tokens, more = count_tokens(job.items), {}
    for item in job.items[-3:]:            # the provider's own words come near the end
        if type(item) is bytes and len(item) <= DIRECT_BYTES:
            more.update({name: value for name, value in json.loads(item).items()
                         if name in ("usage", "finish_reason") and value})
    if end - first > 0.001 and tokens > 1:
        more["tokens_per_s"] = round((tokens - 1) / (end - first), 1)
    # By hand: the encoder would take as long as the rest of a short answer.
    return b'{"id":"%s","queue_ms":%.1f,"first_token_ms":%.1f,"total_ms":%.1f,"tokens":%d%s' % (
        job.id.encode("ascii"), 1000 * (leased - job.created), 1000 * (first - job.created),
        1000 * (end - job.created), tokens,
        b"," + dumps(more)[1:] if more else b"}")


def answer_options(exchange, route):
    """OPTIONS: which methods there are, and what another site's page may send."""
    if route.api not in ("openai", "anthropic"):
        return exchange.respond(204, b"", allow=route.allow)
    asked = exchange.head.fields.get("access-control-request-headers", "")
    exchange.respond(204, b"", access_control_allow_methods="GET, POST, OPTIONS",
                     access_control_allow_headers=(
                         asked if HEADER_LIST.match(asked) and asked else "*"),
                     access_control_max_age="86400")


def redirect_to_https(exchange):
    """Answer a request in plain HTTP to a relay with TLS. A key sent so was seen."""
    head, port = exchange.head, exchange.relay.server_port
    name = re.sub(r":\d*\Z", "", head.fields.get("host", ""))
    if head.method not in ("GET", "HEAD") or not name or head.target[0] != "/":
        raise RelayError("forbidden", "This is not https: use https, at port %d." % port)
    exchange.respond(301, b"", "text/plain",
                     location="https://%s:%d%s" % (name, port, head.target))


LOG = {"format": "text"}     # or "json"


def log(event, **fields):
    """Write one line to standard error: when, what, and the fields as JSON. Never a prompt,
    an answer or a key. traceback=True adds that of the exception being handled."""
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
    with contextlib.suppress(OSError, ValueError, AttributeError):   # None: no stderr
        sys.stderr.write(line)
        sys.stderr.flush()


##############################################################################
# Access: who may do what
#
# A service key makes an operator, an access key a guest. Without these checks, everyone
# could manage every service and use the private ones.
##############################################################################


KEY_LIMITS = ("requests_per_day", "tokens_per_day", "concurrency", "max_new_len", "expires")


class AccessKey:
    """A guest's right to use a service: its limits, and what it has used."""

    COLUMNS = ("id", "digest", "label", "created") + KEY_LIMITS + (
        "day", "requests", "tokens", "last_used")

    def __init__(self, *values):
        for column, value in zip(self.COLUMNS, values):
            setattr(self, column, value)
        self.running = 0
        self.written = None           # what the data file knows of its use

    def check_quota(self, now, cost):
        """Raise RelayError if a prompt that counts as `cost` is more than this key may have
        per day, or at once."""
        if not self._counts(now):
            self.day, self.requests, self.tokens = now // DAY_SECONDS, 0, 0
        left = (self.day + 1) * DAY_SECONDS - now
        if self.requests_per_day is not None and cost > max(1, self.requests_per_day):
            raise RelayError("invalid_request", "This request counts as %d: this access key "
                             "allows %d per day." % (cost, self.requests_per_day))
        for used, limit, what in (
                (self.requests + cost - 1, self.requests_per_day, "requests"),
                (self.tokens, self.tokens_per_day, "tokens")):
            if limit is not None and used >= limit:
                raise RelayError("quota_exceeded", "The %d %s per day of this access key "
                                 "are used up. They are renewed at midnight UTC, in %s."
                                 % (limit, what, in_words(left)), retry_after=left)
        if self.concurrency is not None and self.running >= self.concurrency:
            raise RelayError("rate_limited", "This access key allows %d prompts at once. "
                             "Wait for an answer." % self.concurrency, retry_after=2,
                             limit=self.concurrency)

    def _counts(self, now):
        """Whether what was counted still counts: it is of this day, or of the next, if the
        clock was set back over midnight. Further ahead it was wrong."""
        return self.day - now // DAY_SECONDS in (0, 1)

    def shown(self, now):
        """What its operator may see. Only the guest knows the key itself."""
        today = self._counts(now)
        return dict({name: getattr(self, name) for name in (
            "id", "label", "created", "last_used") + KEY_LIMITS},
            requests_today=self.requests if today else 0,
            tokens_today=self.tokens if today else 0, running=self.running)


def check_expiry(access, now):
    """Raise RelayError if an access key has expired, whatever it is used for."""
    if access.expires is not None and now >= access.expires:
        raise RelayError("invalid_key", "This access key expired on %s. Ask the operator "
                         "for a new one." % time.strftime(
                             "%Y-%m-%d at %H:%M UTC", time.gmtime(access.expires)))


def is_operator(exchange, service):
    """Whether this request came with the service's key. No key is nobody's."""
    return bool(exchange.head.key_digest) and hmac.compare_digest(
        exchange.head.key_digest, service.key_digest)


def authorized(exchange, name):
    """Return the service of that name, if this request came with its key."""
    service = exchange.broker.find(name)
    if not is_operator(exchange, service):
        raise wrong_key(exchange, "This needs the service key of %s, as \"Authorization: "
                        "Bearer KEY\"." % service.name, "The key that was sent is not the "
                        "service key of %s." % service.name)
    exchange.trusted = True
    return service


def read_authorized(exchange, name, most=MAX_SMALL_BODY_BYTES):
    """Return (service, body), for a request that must come with the service key, and
    still must after its body has come: the service may have been deleted in between, and
    its name registered by another."""
    service = authorized(exchange, name)
    body = exchange.read_object(most)
    still_authorized(exchange, service)
    return service, body


def still_authorized(exchange, service):
    """Raise RelayError if this request's key is not that of the service any more."""
    if exchange.broker.find(service.name) is not service or not is_operator(exchange, service):
        raise RelayError("invalid_key", "This service was deleted, or its key was "
                         "changed, while the request was on its way.")


def wrong_key(exchange, missing, wrong):
    """The error for a missing or a wrong key, in the words for it, or the one for too many
    wrong ones."""
    if not exchange.head.key_digest:
        return RelayError("invalid_key", missing)
    exchange.charge_guess("wrong keys")
    return RelayError("invalid_key", wrong)


def access_of(exchange, service):
    """Return (whether this is the operator, the client's AccessKey or None).

    Raises RelayError if the service is private and the client has no key for it. An
    open service ignores unknown keys: OpenAI's clients always send one.
    """
    if is_operator(exchange, service):
        return True, None
    # Looked up by its digest: guessing keys by timing learns nothing.
    access = service.keys.get(exchange.head.key_digest)
    if access is not None:
        check_expiry(access, time.time())
    elif service.private and exchange.relay.registry.knows_key(exchange.head.key_digest):
        raise RelayError("forbidden", "This access key is for another service than %s."
                         % service.name)
    elif service.private:
        raise wrong_key(exchange, "%s is private: ask its operator for an access key, and "
                        "send it as \"Authorization: Bearer KEY\"." % service.name,
                        "%s is private, and the key that was sent is none of its access keys: "
                        "it is mistyped, or was revoked. Ask its operator for another."
                        % service.name)
    return False, access


##############################################################################
# Identities: what makes a second request mean the same job
##############################################################################

SHORT_KEY = 16               # a shorter stream key is for the caller that began the stream


def stream_identity(exchange, service, key, access, prompt=None):
    """The identity of a stream key, and of the prompt if it is known."""
    name = (key,) if len(key) >= SHORT_KEY else (key, exchange.caller(access))
    fingerprint = None if prompt is None else hashlib.sha256(to_json(prompt)).digest()
    return Identity("stream", service, *name, fingerprint=fingerprint)


@contextlib.contextmanager
def charging_guesses(exchange):
    """Count it for this address if a stream key names nothing."""
    try:
        yield
    except RelayError as error:
        if error.name != "rate_limited":
            exchange.charge_guess("unknown stream keys")
        raise


def native_identity(exchange, service, request, access, prompt):
    """The identity of a native prompt: its stream key, its Idempotency-Key, or its body."""
    key, repeat = request.get("key"), exchange.head.fields.get("idempotency-key")
    caller = exchange.caller(access)
    if key:
        return stream_identity(exchange, service, key, access, prompt)
    if repeat:
        return repeat_identity(exchange, service, caller, repeat)
    identity = Identity("body", service, caller, exchange.fingerprint)
    if exchange.broker.is_known(identity):
        exchange.relay.hang_ups.look()     # its client may have gone a moment ago
    return identity


def repeat_identity(exchange, service, caller, repeat, api="native"):
    """The identity of an Idempotency-Key, for this caller, body and API."""
    return Identity("repeat", service, caller, digest(repeat),
                    fingerprint=exchange.fingerprint + api.encode())


##############################################################################
# Large whole answers: made once for all their readers
#
# An answer may be sent to a hundred readers, each of them slow. Without this section each
# would hold a copy of it.
##############################################################################


class SharedOutlet(WholeOutlet):
    """A WholeOutlet with its bytes. A large answer is encoded once, kept with its job, and sent
    in parts, by the exchange's own thread."""

    def size(self):
        """Roughly the bytes that wait for this reader, without what each item takes besides."""
        job = self.job
        if job.encoded is not None and job.encoded[0] == self.encoder.name:
            return 0                       # shared with another reader, and counted there
        return job.answer_bytes() - ITEM_BYTES * len(job.items)

    def _parts(self, may_block):
        """The response in parts; None: it is large, and the own thread's work."""
        head, body = self._response(self.job.error)
        if len(body) <= (MAX_SMALL_BODY_BYTES if may_block else DIRECT_BYTES):
            return (head + body,)
        if not may_block:
            return None
        encoded = self.job.encoded
        if encoded is not None and encoded[1] is body:
            return self._shared(head, len(body))
        return head, body

    def _response(self, error):
        """Return (head, body) of the response; an error of ours becomes a 500."""
        try:
            if error is not None:
                return self.exchange.error_response(error)
            return self.exchange.response(200, self._body(), self.encoder.kind,
                                          more=self.encoder.headers(self.exchange, self.job))
        except Exception as fault:
            return self.exchange.error_response(self.exchange.explain(fault))

    def _shared(self, head, size):
        """Yield a response with the job's encoded answer, in copies of small parts, so that a
        slow reader holds only a part in memory. Raises PeerGone if the answer had to make
        room for others."""
        yield head
        for start in range(0, size, DIRECT_BYTES):
            encoded = self.job.encoded
            if encoded is None:
                raise PeerGone()
            # The generator must not hold the answer while the client reads.
            part, encoded = encoded[1][start:start + DIRECT_BYTES], None
            yield part

    def _body(self):
        """The whole answer as bytes, made once for all readers of the job. Raises RelayError:
        the answer had to make room for others while it was encoded."""
        encoder, job = self.encoder, self.job
        encoded = job.encoded
        if encoded is not None and encoded[0] == encoder.name:
            body = encoded[1]
        else:
            body = self.encoded(self.size(), encoder.whole, job)
            if len(body) > MAX_SMALL_BODY_BYTES:
                self.broker.keep_encoded(job, encoder.name, body)
        if job.error is not None:
            raise job.error
        return body


##############################################################################
# Reads by key: the native API for clients that cannot read a stream
#
# The oldest clients ask again and again with one stream key.
##############################################################################


class ReadOutlet(Outlet):
    """Answers one read by key: the next `wanted` tokens, as far as they are there a second
    after the first. All in the exchange's own thread."""

    def __init__(self, exchange, reader, wanted, counts):
        super().__init__(exchange, reader, None)
        self.wanted, self.counts = wanted, counts      # counts: it names an offset itself

    def run(self):
        (texts, ended), job = self._read(), self.job
        answer = {"errorcode": 0, "at": self.reader.cursor}
        self.cancel_if_too_old()
        if not texts and not ended:
            raise RelayError("still_waiting", "No token yet: ask again with the same key.",
                             retry_after=0)
        if texts:
            self.broker.advance(self.reader)
        elif job.error is not None and (self.counts or not job.error_told):
            job.error_told = True          # a client that does not count would loop
            raise job.error
        else:
            answer.update(done=True, stats=json.loads(stats_of(job)))
            if job.error is not None:      # the response that told it may have been lost
                answer["error"] = job.error.name
        with self.exchange.room(json_size(texts)):  # before the texts are joined
            self.exchange.respond(200, dict(answer, reply="".join(texts)))
        self.complete = True

    def _read(self):
        """Return (texts, whether the answer has ended)."""
        texts, ended, deadline = [], False, self.broker.now() + self.limits.wait_seconds
        while len(texts) < self.wanted and not ended:
            left = deadline - self.broker.now()
            if left <= 0:
                break
            # Until there is a first token, one is enough to wake up for.
            want = self.wanted - len(texts) if texts else 1
            self.broker.wait_for_items(self.reader, want, left)
            items, ended = self.broker.read(self.reader, self.wanted - len(texts))
            if self.reader.gone:
                raise PeerGone()
            found = [item for item in items if type(item) is str and item]
            if found and not texts:
                deadline = min(deadline, self.broker.now() + 1)
            texts += found
        return texts, ended


def cancel_native(exchange, service, request, access):
    """{"command": "cancel", "key": ...}: stop a stream, or the caller's own whole prompt
    that came with this Idempotency-Key"""
    key = request.get("key") or ""
    identity = Identity("repeat", service, exchange.caller(access), digest(key))
    if not exchange.broker.is_known(identity):
        identity = stream_identity(exchange, service, key, access)
    exchange.drop(request)
    with charging_guesses(exchange):
        exchange.broker.cancel_stream(identity)
    exchange.respond(200, {"reply": "", "errorcode": 0})


##############################################################################
# OpenAI and Anthropic APIs: the same path as the native API, with other encoders
#
# Two paths. Text that the relay understands, so that any provider can answer it, goes as
# items. Everything else is opaque: request and answer pass through as they are, to a
# provider that declared the API at login.
##############################################################################

FOR_RELAY = ("model", "stream", "stream_options", "wait")
PASSED_HEADERS = ("anthropic-version", "anthropic-beta")

Api = namedtuple("Api", "path usual_length prompt urgent owner", defaults=(False, "openai"))
APIS = {  # name: (path, field for the answer's length, field of the prompt, goes first, whose)
    "chat": Api("/v1/chat/completions", "max_tokens", "messages"),
    "completions": Api("/v1/completions", "max_tokens", "prompt"),
    "embeddings": Api("/v1/embeddings", None, "input"),
    "responses": Api("/v1/responses", "max_output_tokens", "input"),
    "messages": Api("/v1/messages", "max_tokens", "messages", owner="anthropic"),
    "count_tokens": Api("/v1/messages/count_tokens", None, "messages", True, "anthropic"),
    "rerank": Api("/v1/rerank", None, "documents"),
    "tokenize": Api("/tokenize", None, None, True),
    "detokenize": Api("/detokenize", None, None, True),
}
API_ROUTES = dict(
    {re.sub("^/v1", "", api.path): Route(api.owner, name, POST="post_api")
     for name, api in APIS.items()}, **{
        "/models": Route("openai", GET="send_openai_models"),
        "/models/*": Route("openai", GET="send_openai_model")})
# Clients' base addresses end in /v1, in /{service}/v1, or in neither.
ROUTES.update({base + path: route for base in ("", "/v1", "/*/v1")
               for path, route in API_ROUTES.items()})
MAX_COST = 128               # prompts in one request
TEXT_FIELDS = {              # of the APIs whose prompts the relay understands: the prompt's
    "chat": {"messages": NATIVE_FIELDS["messages"]},
    "completions": {"prompt": NATIVE_FIELDS["message"]},
}


# These may ask for more than text. n_probs is llama.cpp's, the next two are vLLM's.
OPAQUE_FIELDS = frozenset(("logprobs", "n_probs", "prompt_logprobs", "return_token_ids", "echo",
                           "n", "best_of"))


def post_api(exchange, api, name=None):
    """POST /v1/...: a request of one of APIS. name: the service, if the path has it."""
    request = exchange.read_object()
    model = request.get("model") if name is None else name
    if not isinstance(model, str):
        raise RelayError("invalid_request", "model is missing: the name of a service.",
                         param="model")
    service = find_model(exchange, model)
    by_operator, access = access_of(exchange, service)
    check_fields(request, OPENAI_FIELDS)
    opaque = is_opaque(api, request)
    check_api(api, service, request, opaque)
    cap_length(request, access, APIS[api].usual_length)
    exchange.take_slot(reserved=by_operator or access is not None)
    stream = request.get("stream")
    tells_usage, tells_queue = stream_options(exchange, request) if stream else (False, False)
    reader = submit_api(exchange, api, service, request, by_operator, access, opaque)
    if opaque:
        encoder = OpaqueStream(api, service) if stream else OpaqueWhole(api)
    elif api == "embeddings":
        encoder, stream = EmbeddingsWhole(service), False
    elif stream:
        encoder = TextStream(api, service.name, reader.job, tells_usage, tells_queue)
    else:
        encoder = TextWhole(api, service.name)
    (StreamOutlet if stream else LateOutlet)(exchange, reader, encoder).answer()


def stream_options(exchange, request):
    """Whether a stream is to tell its usage, and its queue position. Two flags, because the
    options could be large, and the wait long."""
    options = request.get("stream_options") or {}
    return bool(options.get("include_usage")), bool(
        options.get("include_queue")
        or exchange.head.fields.get("x-neuroengine-queue") == "1")


def find_model(exchange, name):
    """Return the service that a client calls its model. Raises RelayError: what no service
    can be called, as "llama3:8b", is unknown, too."""
    try:
        return exchange.broker.find(name)
    except RelayError as error:
        if error.name not in ("service_unknown", "invalid_name"):
            raise                          # of several relays: its home cannot be found now
        if exchange.head.path[:2] == ("v1", "v1"):
            raise RelayError("not_found", "The path has /v1 twice. The base URL of OpenAI's "
                             "clients ends with /v1, that of Anthropic's without.") from None
        raise RelayError("service_unknown", "There is no model %s here. GET /v1/models "
                         "lists the models." % printable(name), param="model") from None


def is_opaque(api, request):
    """Whether a request needs more than text items can say."""
    if api not in TEXT_FIELDS:
        return api != "embeddings"
    if api == "completions" and type(request.get("prompt")) is list:
        prompt = request["prompt"]
        if len(prompt) != 1 or type(prompt[0]) is not str:
            return True
        request["prompt"] = prompt[0]
    if OPAQUE_FIELDS.isdisjoint(request):
        return False
    numbers = request.get("logprobs"), request.get("prompt_logprobs")
    return (any(number is not None and number is not False for number in numbers)   # 0 counts
            or any(map(request.get, ("echo", "n_probs", "return_token_ids")))
            or request.get("n", 1) > 1 or request.get("best_of", 1) > 1)


def check_api(api, service, request, opaque):
    """Raise RelayError if the request has no prompt, or no provider of the service can
    answer it."""
    field = APIS[api].prompt
    if not opaque and api in TEXT_FIELDS:
        check_fields(request, TEXT_FIELDS[api])
    if field is not None and request.get(field) is None and not (
            api == "responses" and request.get("prompt")):
        raise RelayError("invalid_request", "%s is missing." % field, param=field)
    if not opaque and api != "embeddings":
        return                             # any provider can answer text
    sessions = list(service.sessions.values())
    if sessions and not any(session.features.has(api) for session in sessions):
        what = APIS[api].path
        if opaque and api in ("chat", "completions"):
            what += " with n, best_of, echo, a prompt that is a list, or logprobs in any form"
        raise RelayError("not_found", "The provider of %s has no %s." % (service.name, what))


def cost_of(request):
    """How many prompts a request counts as. Raises RelayError if they are too many."""
    prompt = request.get("prompt")
    cost = len(prompt) if type(prompt) is list and prompt and (
        type(prompt[0]) is not int) else 1
    cost *= max(request.get("n", 1), request.get("best_of", 1))
    if cost > MAX_COST:
        raise RelayError("invalid_request", "One request may have at most %d prompts."
                         % MAX_COST, param="prompt" if type(prompt) is list else "n")
    return cost


def submit_api(exchange, api, service, request, by_operator, access, opaque):
    """Submit a request of one of APIS; return a Reader. Empties the request: it may be
    large, and the wait long."""
    repeat = exchange.head.fields.get("idempotency-key")
    caller, wait = exchange.caller(access), request.pop("wait", False)
    cost = cost_of(request) if opaque else 1
    prefixes = prefixes_of(service, request.get(APIS[api].prompt))
    if opaque:
        job = {"api": api, "opaque": True, "stream": bool(request.get("stream")),
               "headers": {name: exchange.head.fields[name] for name in PASSED_HEADERS
                           if name in exchange.head.fields},
               "body": request}
        payload = to_json(job)
    else:
        payload = to_json(dict({field: value for field, value in request.items()
                                if field not in FOR_RELAY and field != "reply_so_far"},
                               api=api))
    exchange.drop(request)
    job = Job(service, payload, caller, holder=exchange.address, access=access,
              rated=not exchange.local, by_operator=by_operator, urgent=APIS[api].urgent,
              wait=wait, grace=None if repeat else 0.0, cost=cost,
              needs=api if opaque or api == "embeddings" else None, prefixes=prefixes)
    return exchange.broker.submit(job, repeat_identity(
        exchange, service, caller, repeat, api) if repeat else None, 0)


def time_headers(exchange, job):
    """The headers that tell how long the prompt queued, and what the relay added."""
    now = exchange.broker.now()
    queued = (job.leased_at or now) - job.created
    added = job.created - exchange.began + (now - (job.ended_at or now))
    return b"X-Neuroengine-Queue-Ms: %d\r\nX-Neuroengine-Overhead-Ms: %.1f\r\n" % (
        1000 * queued, max(0, 1000 * added))       # below 0: a repeat of an older prompt


LATE_HEAD_SECONDS = 60       # then a whole answer begins before it is there


class LateOutlet(SharedOutlet):
    """As SharedOutlet, but keeps the connection open with spaces, which may stand before JSON:
    OpenAI's clients and proxies give up on one that is silent for minutes."""

    late = False                           # the response has begun without the answer

    def _patience(self):
        if self.late:
            return self.limits.heartbeat_seconds
        return min(self.limits.heartbeat_seconds, max(0.01, self._seconds_until_late()))

    def _seconds_until_late(self):
        return self.exchange.began + LATE_HEAD_SECONDS - self.broker.now()

    def _stay_open(self):
        """Send a space. From now on an error can only be told in the body."""
        if not self.late and self._seconds_until_late() > 0:
            return
        with self._sending:
            if self.job.ended_at is None:
                head = b"" if self.late else self.exchange.chunked_head(self.encoder.kind)
                self.late = True
                self.connection.send(head + self.exchange.framed(b" "))

    def _parts(self, may_block):
        if not self.late:
            return super()._parts(may_block)
        return (self.exchange.framed(self._late_body(self.job.error), last=True),)

    def _late_body(self, error):
        """What follows a head that was sent before the answer was there."""
        try:
            if error is None:
                return self._body()
        except Exception as fault:
            error = self.exchange.explain(fault)
        return to_json(ERROR_FORMS[self.exchange.api](error))


def opening(api, model, job, stream):
    """What each object of a text answer begins with, up to its choices."""
    prefix, what = (b"chatcmpl", b"chat.completion") if api == "chat" else (
        b"cmpl", b"text_completion")
    if stream and api == "chat":
        what += b".chunk"
    return b'{"id":"%s-%s","object":"%s","created":%d,"model":"%s","choices":[' % (
        prefix, job.id[:24].encode("ascii"), what, time.time(), model.encode("ascii"))


def usage_json(job, usage, tokens):
    """The upstream's own count of tokens as JSON, if it has told one; else items, and four
    bytes of prompt to a token."""
    if isinstance(usage, dict):
        return dumps(usage)
    prompt = len(job.payload) // 4
    return b'{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d}' % (
        prompt, tokens, prompt + tokens)


class TextWhole:
    """Encodes text items as one of OpenAI's chat completions or completions."""

    kind, large = JSON, False

    def __init__(self, api, model):
        self.api, self.model, self.name = api, model, "openai " + api

    def headers(self, exchange, job):
        return time_headers(exchange, job)

    def whole(self, job):
        message = Message()
        for item in job.items:
            if type(item) is str:
                message.texts.append(item)
            else:
                message.add(json.loads(item))
        said = "".join(message.texts)
        said = b'"message":' + message.whole(said) if self.api == "chat" else (
            b'"text":' + to_json(said))
        reason = message.finish_reason or ("tool_calls" if message.calls else "stop")
        return b'%s{"index":0,%s,"logprobs":null,"finish_reason":%s}],"usage":%s}' % (
            opening(self.api, self.model, job, False), said, dumps(reason),
            usage_json(job, message.usage, len(message.texts)))


class TextStream:
    """Encodes text items as the events of OpenAI's chat completions or completions."""

    kind = "text/event-stream"

    def __init__(self, api, model, job, tells_usage, tells_queue):
        self.chat, self.opening = api == "chat", opening(api, model, job, True)
        self.tells_usage, self.tells_queue = tells_usage, tells_queue
        self.finish_reason = self.usage = None
        self.begun, self.tokens, self.calls = False, 0, False
        # Around each piece of text stands the same: a fifth of a streamed token's cost.
        self.before, self.after = self._chunk({"content": ""}).split(b'""')

    def headers(self, exchange, job):
        return time_headers(exchange, job)

    def items(self, items, at):
        """The events for some items; texts that came together go as one."""
        parts = []
        if not self.begun and self.chat:
            # As OpenAI's: some clients begin an empty text for "", even before tool calls.
            said = "" if not items or type(items[0]) is str else None
            parts.append(self._chunk({"role": "assistant", "content": said}))
        self.begun = True
        for kind, group in itertools.groupby(items, type):
            if kind is str:
                texts = list(group)
                self.tokens += len(texts)
                parts.append(self.before + dumps("".join(texts)) + self.after)
            else:
                for item in group:         # one at a time: parsed, they are large
                    parts += self._events(json.loads(item))
        return b"".join(parts)

    def _events(self, item):
        """The events for an item that is an object."""
        self.finish_reason = item.get("finish_reason") or self.finish_reason
        self.usage = item.get("usage") or self.usage
        self.calls = self.calls or bool(item.get("tool_calls"))
        if item.get("reasoning"):
            yield self._chunk({"reasoning_content": item["reasoning"]})
        if item.get("tool_calls"):
            yield self._chunk({"tool_calls": item["tool_calls"]})
        if item.get("delta"):
            yield self._chunk(item["delta"])

    def queue(self, position):
        if position is None:
            return b": waiting\n\n"
        if self.tells_queue:
            return self._chunk({}, more=b',"queue":' + dumps(position))
        return b": queue %d/%d\n\n" % (position["position"], position["waiting"])

    def beat(self):
        return b": waiting\n\n"

    def end(self, job):
        """The last events."""
        if job.error is not None:
            return b"data: " + dumps(openai_error(job.error)) + b"\n\n"
        parts = [] if self.begun or not self.chat else [self.items((), 0)]
        parts.append(self._chunk({}, self.finish_reason or (
            "tool_calls" if self.calls else "stop")))
        if self.tells_usage:
            parts.append(b'data: %s],"usage":%s}\n\n' % (
                self.opening, usage_json(job, self.usage, self.tokens)))
        return b"".join(parts) + b"data: [DONE]\n\n"

    def _chunk(self, delta, finish_reason=None, more=b""):
        """One event."""
        if self.chat:
            choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        else:
            choice = {"index": 0, "text": delta.get("content", ""), "logprobs": None,
                      "finish_reason": finish_reason}
        return b"data: %s%s]%s}\n\n" % (self.opening, dumps(choice), more)


MAX_CALLS = 1000             # tool calls, or other fields, of one whole answer


class Message:
    """The whole message of a chat, gathered from items as text or JSON: the objects of an
    answer of 8 MB would take 2 GB."""

    def __init__(self):
        self.texts, self.reasoning, self.calls = [], [], []
        self.finish_reason = self.usage = None
        self.more = {}                     # field -> (type of its value, pieces)

    def add(self, item):
        """Add an item that is an object. Raises RelayError."""
        self.finish_reason = item.get("finish_reason") or self.finish_reason
        self.usage = item.get("usage") or self.usage
        gather(self.reasoning, item.get("reasoning") or "")
        for delta in item.get("tool_calls") or ():
            self._add_call(delta)
        for name, value in (item.get("delta") or {}).items():
            self._add_more(name, value)

    def _check_room(self, gathered):
        """Raise RelayError if there are too many calls, or fields, for one more."""
        if len(gathered) >= MAX_CALLS:
            raise RelayError("provider_error", "The provider's answer has more than %d tool "
                             "calls or fields. Stream it: then it is not merged." % MAX_CALLS)

    def _add_call(self, delta):
        """Add one delta of a tool call to the calls gathered so far."""
        index = delta.get("index")
        if not isinstance(index, int) or not 0 <= index <= len(self.calls):
            index = len(self.calls)
        if index == len(self.calls):
            self._check_room(self.calls)
            self.calls.append({"id": "", "type": "function", "name": [], "arguments": []})
        call, function = self.calls[index], delta.get("function") or {}
        call["id"] = delta.get("id") or call["id"]
        call["type"] = delta.get("type") or call["type"]
        for field in ("name", "arguments"):
            gather(call[field], function.get(field) or "")

    def _add_more(self, name, value):
        """Add to another field: texts and lists are joined, others are replaced."""
        if name not in self.more:
            self._check_room(self.more)
        kind, parts = self.more.get(name, (None, []))
        if kind is not type(value) or kind not in (str, list):
            parts = []
        self.more[name] = type(value), parts
        if type(value) is list:
            gather(parts, (b"," if parts and value else b"") + to_json(value)[1:-1])
        else:
            gather(parts, value if type(value) is str else to_json(value))

    def whole(self, said):
        """The message as JSON."""
        message = {b'"role"': b'"assistant"', b'"content"': to_json(said)}
        if self.reasoning:
            message[b'"reasoning_content"'] = to_json("".join(self.reasoning))
        if self.calls:
            message[b'"content"'] = to_json(said or None)
            message[b'"tool_calls"'] = to_json([
                {"id": call["id"], "type": call["type"], "function": {
                    field: "".join(call[field]) for field in ("name", "arguments")}}
                for call in self.calls])
        for name, (kind, parts) in self.more.items():
            if kind is str:
                value = to_json("".join(parts))
            else:
                value = (b"[%s]" if kind is list else b"%s") % b"".join(parts)
            message[to_json(name)] = value
        return b"{%s}" % b",".join(map(b"%s:%s".__mod__, message.items()))


class EmbeddingsWhole:
    """Passes on the one object, or JSON text, that answers /v1/embeddings."""

    name, kind, large = "embeddings", JSON, True

    def __init__(self, service):
        self._model = service.name

    def headers(self, exchange, job):
        return time_headers(exchange, job)

    def whole(self, job):
        for item in job.items:
            if type(item) is Raw:
                return bytes(item)
            result = json.loads(item).get("result") if type(item) is bytes else None
            if result:
                return to_json(dict(result, model=self._model))
        raise RelayError("provider_error", "The provider answered without embeddings.")


class OpaqueWhole:
    """Passes on a whole answer as it is."""

    kind, large = JSON, True

    def __init__(self, api):
        self.name = "opaque " + api

    def headers(self, exchange, job):
        return time_headers(exchange, job)

    def whole(self, job):
        for item in job.items:
            if type(item) is Raw:
                return bytes(item)
        raise RelayError("provider_error", "The provider's answer was empty.")


class OpaqueStream:
    """Passes on the events of a streamed answer as they are."""

    kind = "text/event-stream"

    def __init__(self, api, service):
        self._api, self._service = api, service

    def headers(self, exchange, job):
        return time_headers(exchange, job)

    def items(self, items, at):
        return b"".join([item + b"\n\n" for item in items if type(item) is Raw])

    def queue(self, position):
        if position is None:
            return b": waiting\n\n"
        return b": queue %d/%d\n\n" % (position["position"], position["waiting"])

    def beat(self):
        return b": waiting\n\n"

    def end(self, job):
        error = job.error
        if error is None and not any(type(item) is Raw for item in job.items):
            error = RelayError("provider_error", "The provider's answer was empty.")
        if error is None:
            return b""
        if self._api == "messages":
            return b"event: error\ndata: %s\n\n" % dumps(anthropic_error(error))
        if self._api == "responses":
            return b"event: error\ndata: %s\n\n" % dumps({
                "type": "error", "code": error.code, "message": error.words,
                "param": error.param, "sequence_number": len(job.items)})
        return b"data: %s\n\n" % dumps(openai_error(error))


def send_openai_models(exchange, name=None):
    """GET /v1/models: the services that answer now, or with ?all=1 all of them"""
    directory = exchange.relay.directory
    if name is not None:
        entry = directory.entry(find_model(exchange, name))
        return exchange.respond(200, {"object": "list", "data": [openai_model(entry)]})
    everything = "all=1" in exchange.head.target.partition("?")[2].split("&")
    send_counted(exchange, directory.models(everything))


def send_openai_model(exchange, name, _=None):
    """GET /v1/models/{id}; at a service's own base, whatever the id"""
    entry = exchange.relay.directory.entry(find_model(exchange, name))
    exchange.respond(200, openai_model(entry))


def openai_model(entry):
    """A directory entry as OpenAI's clients expect it."""
    model = {"id": entry["name"], "object": "model", "created": entry["created"],
             "owned_by": "neuroengine"}
    if entry.get("context_length"):
        model["context_length"] = model["max_model_len"] = entry["context_length"]
    for field in ("vision", "tools", "apis"):
        if entry.get(field) is not None:
            model[field] = entry[field]
    if not entry["connected"]:
        model["status"] = "offline"
    return model


##############################################################################
# Operators: register a service, and manage it with its key
#
# These handlers check and answer; what is stored, and in which order it comes into force,
# is the Registry's. None takes a large body, for which others would wait while it is stored.
##############################################################################

REPEAT_SECONDS = 600         # a registration may be repeated with its Idempotency-Key
MAX_KEYS = 1000              # access keys of one service

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")
RESERVED_NAMES = frozenset("""
    v1 api provider healthz metrics models chat completions embeddings responses messages
    rerank tokenize detokenize props slots lora-adapters images audio files admin login
    logout register services keys static assets favicon.ico robots.txt index.html chat.html
    neuroengine.py sitemap.xml manifest.json .well-known""".split())


def is_name(name):
    """Whether a new service can have this name."""
    return bool(NAME.match(name)) and name.lower() not in RESERVED_NAMES


def invalid_name_words(name):
    """Say why a service cannot have this name."""
    if name.lower() in RESERVED_NAMES:
        return "The relay uses the name %s itself. Choose another." % name
    return ("A service name has 1 to 64 characters: letters, digits, '.', '_' and '-'. It "
            "begins with a letter or digit.")


def check_manager(exchange):
    """Raise RelayError if this may not manage services now."""
    if exchange.head.fields.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        raise RelayError("forbidden", "A page of another site may not do this.")
    if exchange.head.method not in ("GET", "HEAD"):
        charge_change(exchange)


def charge_change(exchange):
    """Count a login, or a change of a service or key, for this address."""
    if not exchange.local:
        exchange.bounds.changes.take_by_address(
            exchange.address, exchange.limits.max_changes_per_minute, 60, "logins and changes")


def register(exchange):
    """POST /api/services: {name, operator, comment, suggestions, invitation} -> {name, key}"""
    request, registry = exchange.read_object(LARGE_BODY_BYTES), exchange.relay.registry
    repeat = exchange.head.fields.get("idempotency-key")
    name = request.get("name")
    if not isinstance(name, str) or not is_name(name):
        raise RelayError("invalid_name", invalid_name_words(str(name)), param="name")
    check_fields(request, SERVICE_FIELDS)
    with registry.changing:                # a repeat waits until the first is on the disk
        if not repeat:
            key = new_key()
            register_anew(exchange, name, key, request)
        else:
            caller = exchange.caller()
            key = registry.repeatable_key(caller, repeat, exchange.fingerprint)
            if not registry.is_registered(name, key):
                registry.refuse_used(caller, repeat)
                register_anew(exchange, name, key, request)
                registry.use_repeat(caller, repeat)
    exchange.respond(201, {"name": name, "key": key, "errorcode": 0})


def register_anew(exchange, name, key, request):
    """Register a service. Raises RelayError, sqlite3.Error."""
    registry, invitation = exchange.relay.registry, None
    if registry.registration == "closed":
        raise RelayError("forbidden", "Registration is closed here. Ask the people who run "
                         "this relay.")
    if registry.registration == "invited":
        invitation = digest(str(request.get("invitation"))[:200])
    charge_registration(exchange)
    registry.register(Service(name, digest(key), created=time.time(),
                              **stored_fields(request, SERVICE_FIELDS)), invitation,
                      exchange.head.key_digest)
    log("registered", service=name, address=exchange.address)


def stored_fields(request, fields):
    """The fields of a request that are columns of a service."""
    columns = {field: request[field] for field in fields if field in request}
    if "suggestions" in columns:
        columns["suggestions"] = dumps(columns["suggestions"]).decode("ascii")
    return columns


def send_service(exchange, name):
    """GET /api/services/{name}"""
    service = authorized(exchange, name)
    exchange.respond(200, exchange.relay.directory.entry(service))


def change_service(exchange, name):
    """PATCH /api/services/{name}: the fields of CHANGE_FIELDS; a new name, too"""
    service, request = read_authorized(exchange, name, LARGE_BODY_BYTES)
    reset = {"anonymous_per_day": None} if "anonymous_per_day" in request else {}
    check_fields(request, CHANGE_FIELDS)
    changes, answer = dict(reset, **stored_fields(request, CHANGE_FIELDS)), {}
    if changes.pop("new_key", False):
        answer["key"] = new_key()
        changes["key_digest"] = digest(answer["key"])
    new_name = changes.pop("name", service.name)
    with exchange.relay.registry.changing:
        still_authorized(exchange, service)
        if new_name != service.name:
            rename_service(exchange, service, new_name, changes)
        else:
            exchange.relay.registry.change(service, **changes)
    log_change(exchange, service, request)
    exchange.respond(200, dict(exchange.relay.directory.entry(service), errorcode=0,
                               **answer))


def log_change(exchange, service, request):
    """Log what a request has changed of a service. Switches and numbers are logged as they are
    now; of a text and of a key, only that it changed."""
    if request.get("new_key"):
        log("new_key", service=service.name, address=exchange.address)
    changed = {field: "changed" if field in SERVICE_FIELDS else value
               for field, value in request.items() if field in CHANGE_FIELDS
               and field not in ("name", "new_key")}
    if changed:
        log("changed", service=service.name, address=exchange.address, **changed)


def rename_service(exchange, service, name, changes):
    """Give a service another name, and change its columns. That counts as a registration: the
    old name may stay reserved."""
    if not is_name(name):
        raise RelayError("invalid_name", invalid_name_words(name), param="name")
    charge_registration(exchange)
    old = service.name
    exchange.relay.registry.rename(service, name, **changes)
    log("renamed", service=old, name=name, address=exchange.address)


def charge_registration(exchange):
    """Count a registration for its address. Raises RelayError if there were too many."""
    if not exchange.local:
        exchange.bounds.registrations.take_by_address(
            exchange.address, exchange.limits.max_registrations_per_hour, 3600,
            "registrations")


def send_keys(exchange, name):
    """GET /api/services/{name}/keys: the access keys, with their use so far"""
    service = authorized(exchange, name)
    send_counted(exchange, to_json({"errorcode": 0, "keys": [
        key.shown(time.time()) for key in list(service.keys.values())]}))


def add_key(exchange, name):
    """POST /api/services/{name}/keys: {label, limits} -> {id, key}"""
    service, request = read_authorized(exchange, name, LARGE_BODY_BYTES)
    check_fields(request, KEY_FIELDS)
    key = new_key()
    access = AccessKey(secrets.token_hex(8), digest(key), request.get("label", ""),
                       time.time(), *[request.get(limit) for limit in KEY_LIMITS],
                       *(0, 0, 0, None))
    with exchange.relay.registry.changing:
        still_authorized(exchange, service)
        exchange.relay.registry.add_key(service, access)
    log("key_added", service=service.name, key_id=access.id)
    exchange.respond(201, dict(access.shown(time.time()), key=key, errorcode=0))


def change_key(exchange, name, key_id):
    """PATCH /api/services/{name}/keys/{id}: the fields of KEY_FIELDS; null: no limit"""
    service, request = read_authorized(exchange, name, LARGE_BODY_BYTES)
    for field in request.keys() - KEY_FIELDS.keys():
        raise RelayError("invalid_request", "An access key has no %s to change: there are %s."
                         % (printable(field, 40), ", ".join(KEY_FIELDS)), param=field)
    changes = {limit: None for limit in KEY_LIMITS if limit in request}
    check_fields(request, KEY_FIELDS)
    with exchange.relay.registry.changing:
        still_authorized(exchange, service)
        access = exchange.relay.registry.change_key(service, key_id, dict(changes, **request))
    log("key_changed", service=service.name, key_id=access.id)
    exchange.respond(200, dict(access.shown(time.time()), errorcode=0))


def revoke_key(exchange, name, key_id):
    """DELETE /api/services/{name}/keys/{id}: in force at once, whatever the disk does"""
    service = authorized(exchange, name)
    saved = exchange.relay.registry.revoke_key(service, key_id)
    log("key_revoked", service=service.name, key_id=key_id)
    if not saved:
        raise RelayError("relay_busy", "The access key is revoked, but the relay cannot "
                         "store that now. It will try again; until then a crash of the relay "
                         "would undo it.", retry_after=30)
    exchange.respond(200, {"errorcode": 0})


def delete_service(exchange, name):
    """DELETE /api/services/{name}"""
    service = authorized(exchange, name)
    with exchange.relay.registry.changing:
        still_authorized(exchange, service)
        exchange.relay.registry.delete(service)
    log("deleted", service=service.name, address=exchange.address)
    exchange.respond(200, {"name": service.name, "errorcode": 0})


##############################################################################
# Page, directory, metrics
#
# What people and programs see of the relay without a prompt. All of it is sent from
# memory, so that no number of visitors makes prompts wait.
##############################################################################

DIRECTORY_SECONDS = 1.0      # the directory is built at most this often
DIRECTORY_SHARE = 20         # and takes at most a twentieth of the processor's time


class Directory:
    """All services as the page and clients see them: /api/models."""

    def __init__(self, broker, registry):
        self._broker, self._registry = broker, registry
        self._lock = threading.Lock()      # held while it is built, by one thread
        self._built_at = -math.inf
        self._version, self._took = -1, 0.0
        # Replaced as a whole, since other threads send it.
        self._sent = b"[]", b"", '""'      # body, compressed, ETag
        self._models = {}                  # whether all -> body of /v1/models

    def entry(self, service):
        """One service, as it is at this moment."""
        sessions = list(service.sessions.values())
        features = service.features
        entry = {
            "name": service.name, "numreq": service.numreq, "private": service.private,
            "paused": service.paused, "connected": bool(sessions),
            "comment": service.comment, "operator": service.operator,
            "queuelen": service.queue.size, "created": int(service.created),
            "workers": sum(session.workers for session in sessions),
            "running": sum(len(session.leases) for session in sessions)}
        if service.last_seen is not None and not sessions:
            entry["last_seen"] = int(service.last_seen)
        eta = self._broker.eta(service) if sessions and service.job_seconds else None
        if eta is not None:
            entry["eta_s"] = 0 if service.idle else eta
        deleted_at = self._registry.deleted_at(service)
        if deleted_at is not None and deleted_at - time.time() < WARNING_SECONDS and (
                service.last_seen is not None):
            entry["deleted_at"] = int(deleted_at)
        if service.tokens_per_second:
            entry["tokens_per_s"] = round(service.tokens_per_second, 1)
        if service.suggestions != "[]":
            entry["suggestions"] = json.loads(service.suggestions)
        if features.apis:
            entry["apis"] = sorted(features.apis)
        for name, value in (("context_length", features.context_length),
                            ("anonymous_per_day", service.anonymous_per_day),
                            ("vision", features.vision), ("tools", features.tools)):
            if value is not None:
                entry[name] = value
        return entry

    def entries(self):
        """Those of all services, in any order."""
        entries = []
        for number, service in enumerate(self._broker.services()):
            entries.append(self.entry(service))
            if number % 500 == 499:
                time.sleep(0)              # let other threads run
        return entries

    def models(self, everything):
        """The body of /v1/models: the services that answer now, or all."""
        self._refresh()
        return self._models[everything]

    def _refresh(self):
        with self._lock:
            now, version = self._broker.now(), self._broker.version()
            age = DIRECTORY_SECONDS if version == self._version else min(
                DIRECTORY_SECONDS, DIRECTORY_SHARE * self._took)
            if now - self._built_at < age:
                return
            entries = sorted(self.entries(), key=lambda entry: entry["name"].lower())
            for everything in (False, True):
                self._models[everything] = b'{"object":"list","data":[%s]}' % b",".join([
                    to_json(openai_model(entry)) for entry in entries
                    if everything or entry["connected"]])
            body = b"[" + b",".join(map(to_json, entries)) + b"]"
            self._sent = (body, gzipped(body, 1),
                          '"%s"' % hashlib.sha256(body).hexdigest()[:20])
            self._built_at, self._version = self._broker.now(), version
            self._took = self._built_at - now

    def send(self, exchange):
        """Answer with all entries."""
        self._refresh()
        send_cached(exchange, *self._sent, JSON)


def gzipped(body, level):
    """Return body as gzip (RFC 1952)."""
    coder = zlib.compressobj(level, zlib.DEFLATED, 31, 7)    # 7: shorter blocks fit better
    return coder.compress(body) + coder.flush()


def send_cached(exchange, body, zipped, etag, kind, **headers):
    """Answer with bytes held in memory: 304 if the client has them, gzip if it takes it."""
    codings = exchange.head.fields.get("accept-encoding", "").lower()
    if re.search(r"\bgzip\b(?!\s*;\s*q=0(?:\.0*)?(?:\s|,|$))", codings):
        body, headers["content_encoding"] = zipped, "gzip"
        etag = etag[:-1] + '-gzip"'        # other bytes, another tag (RFC 9110, 8.8.3.3)
    headers.update(etag=etag, cache_control="no-cache", vary="Accept-Encoding")
    # Weak ones, W/"...", count as well (13.1.2).
    seen = re.findall(r'"[^"]*"|\*', exchange.head.fields.get("if-none-match", ""))
    if exchange.head.method in ("GET", "HEAD") and not {etag, "*"}.isdisjoint(seen):
        headers.pop("content_encoding", None)
        return exchange.respond(304, b"", kind, **headers)
    send_counted(exchange, body, kind, **headers)


def send_counted(exchange, body, kind=JSON, **headers):
    """Answer with bytes that count as memory until they are sent: a slow reader keeps them
    when others get a newer version."""
    if len(body) <= DIRECT_BYTES:
        return exchange.respond(200, body, kind, **headers)
    with exchange.bounds.bytes.take(exchange.address, len(body), reserved=exchange.trusted,
                                   give_way=exchange.connection.abort):
        exchange.respond(200, body, kind, **headers)


class Page:
    """A file that is served from memory."""

    def __init__(self, body, kind):
        self.body, self.kind, self._zipped = body, kind, None
        self.etag = '"%s"' % hashlib.sha256(body).hexdigest()[:20]
        self.policy = content_security_policy(body)

    def send(self, exchange):
        if self._zipped is None:           # not at the relay's start, which it would double
            self._zipped = gzipped(self.body, 9)
        send_cached(exchange, self.body, self._zipped, self.etag, self.kind,
                    content_security_policy=self.policy)


def content_security_policy(page):
    """The policy under which only the page's own script and style run: their hashes."""
    def hashes(tag):
        found = re.findall(rb"<%s[^>]*>(.*?)</%s>" % (tag, tag), page, re.S)
        return " ".join("'sha256-%s'" % base64.b64encode(hashlib.sha256(code).digest()).decode()
                        for code in found) or "'none'"
    return ("default-src 'none'; script-src %s; style-src %s; connect-src 'self'; "
            "img-src data: blob:; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'" % (hashes(b"script"), hashes(b"style")))


def send_page(exchange, name=None):
    """GET / and GET /{service}"""
    if name is not None and not is_name(name):
        raise RelayError("not_found", "There is no /%s here." % printable(name))
    if exchange.relay.page_file is None:
        raise RelayError("not_found", "This relay has no chat.html next to its program, so "
                         "it has no page. Its API works: GET /api/models.")
    exchange.relay.page_file.send(exchange)


def send_client(exchange):
    """GET /neuroengine.py: the client file that matches this relay"""
    if exchange.relay.client_file is None:
        raise RelayError("not_found", "This relay has no neuroengine.py next to its program. "
                         "Get it where you got neuroengine_server.py.")
    exchange.relay.client_file.send(exchange)


def send_challenge(exchange, token):
    """GET /.well-known/acme-challenge/{token}: what certbot put into --acme-webroot"""
    webroot = exchange.relay.webroot
    if webroot and re.match(r"[A-Za-z0-9_-]{1,256}\Z", token):
        path = os.path.join(webroot, ".well-known", "acme-challenge", token)
        with contextlib.suppress(OSError), open(path, "rb") as file:
            return exchange.respond(200, file.read(65536), "text/plain")
    raise RelayError("not_found", "There is no such challenge here.")


def send_health(exchange):
    """GET /healthz"""
    if exchange.broker.draining:
        raise RelayError("shutting_down", "The relay is shutting down.")
    exchange.respond(200, {"status": "ok", "version": __version__})


def send_metrics(exchange):
    """GET /metrics, in the text format of Prometheus"""
    if not exchange.local:
        raise RelayError("forbidden", "Metrics are for this machine only.")
    relay = exchange.relay
    counters, gauges, histograms = exchange.broker.totals()
    for name in ("connections", "polls", "waiting", "bytes"):
        gauges[name] = getattr(relay.bounds, name).taken
    lines = []
    for kind, values in (("gauge", gauges), ("counter", counters)):
        for name, value in sorted(values.items()):
            name += "_total" if kind == "counter" else ""
            lines += ["# TYPE neuroengine_%s %s" % (name, kind),
                      "neuroengine_%s %d" % (name, value)]
    counted = sorted(relay.tally.counted().items())
    for what in sorted({what for (what, _), _ in counted}):
        lines.append("# TYPE neuroengine_%s_total counter" % what)
        lines += ['neuroengine_%s_total{kind="%s"} %d' % (what, label, count)
                  for (name, label), count in counted if name == what]
    for name, histogram in sorted(histograms.items()):
        lines += histogram.lines("neuroengine_" + name)
    exchange.respond(200, ("\n".join(lines) + "\n").encode("ascii"),
                     "text/plain; version=0.0.4")


class Tally:
    """Counts what happens, for /metrics. Thread-safe."""

    def __init__(self):
        self._counts, self._lock = Counter(), threading.Lock()

    def count(self, what, label):
        """Count one."""
        with self._lock:
            self._counts[what, label] += 1

    def counted(self):
        """What was counted: (what, label) -> number."""
        with self._lock:
            return Counter(self._counts)


class Histogram:
    """Histogram of durations."""

    BOUNDS = (0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)   # seconds

    def __init__(self):
        self.counts, self.sum = [0] * (len(self.BOUNDS) + 1), 0.0

    def observe(self, seconds):
        """Count one duration."""
        self.counts[bisect.bisect_left(self.BOUNDS, seconds)] += 1
        self.sum += seconds

    def lines(self, name):
        """Its lines for Prometheus, where each bucket includes those before it."""
        totals = list(itertools.accumulate(self.counts))
        return ["# TYPE %s histogram" % name] + [
            '%s_bucket{le="%s"} %d' % (name, bound, total)
            for bound, total in zip(self.BOUNDS + ("+Inf",), totals)] + [
            "%s_sum %.3f" % (name, self.sum), "%s_count %d" % (name, totals[-1])]


##############################################################################
# Store: what survives a restart. Services, hashes of keys, counters; no prompts
##############################################################################

SERVICE_SETTINGS = ("operator", "comment", "private", "paused", "anonymous_per_day",
                    "suggestions")
SERVICE_COLUMNS = ("name", "key_digest", "operator", "comment", "created", "numreq",
                   "last_seen", "private", "paused", "anonymous_per_day", "suggestions",
                   "connected")
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
    ("ALTER TABLE services ADD COLUMN suggestions TEXT NOT NULL DEFAULT '[]'",
     "ALTER TABLE services ADD COLUMN connected INTEGER NOT NULL DEFAULT 0"),
    ("CREATE TABLE reserved (name TEXT PRIMARY KEY COLLATE NOCASE, key_digest TEXT NOT NULL)",
     "CREATE TABLE quotas (caller BLOB PRIMARY KEY, due REAL NOT NULL)",
     "CREATE TABLE facts (name TEXT PRIMARY KEY, value REAL NOT NULL)",
     "INSERT INTO facts VALUES ('expiry_since', strftime('%s', 'now'))"),
)


class StoreError(Exception):
    """The data file cannot be used; the words say why and what to do."""


class Store:
    """The services in an SQLite file (write-ahead log), or in memory: ":memory:"."""

    def __init__(self, path, existing=False):
        """existing: neither create the file nor migrate it: a relay may be using it. Raises
        StoreError."""
        self._lock = threading.Lock()      # one connection, one statement at a time
        try:
            if path != ":memory:":         # private from its first moment on
                os.close(os.open(path, os.O_RDWR | (0 if existing else os.O_CREAT), 0o600))
            self._db = sqlite3.connect(path, timeout=5, isolation_level=None,
                                       check_same_thread=False)
            self.version = self._value("PRAGMA user_version")
            if self.version > len(MIGRATIONS):
                raise StoreError("The data file %s belongs to a newer neuroengine. Use that "
                                 "version, or name another file with --data." % path)
            if not self._value("SELECT count(*)=0 OR sum(name='services') FROM sqlite_master"):
                raise StoreError("%s is not a neuroengine data file, but another program's: "
                                 "name another with --data." % path)
            damage = self._value("PRAGMA quick_check")
            if damage != "ok":
                raise sqlite3.DatabaseError(damage.replace("\n", " "))
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")   # keys outlive a power cut
            self._db.execute("PRAGMA foreign_keys=ON")
            if not existing:
                self._migrate()
                self._db.execute("UPDATE services SET connected=0")    # after kill -9
        except sqlite3.OperationalError as error:
            raise StoreError("The data file %s cannot be used: %s." % (path, error)) from None
        except sqlite3.DatabaseError as error:
            raise StoreError("The data file %s is damaged, or not a data file: %s. Put a "
                             "backup in its place." % (path, error)) from None
        except OSError as error:
            raise StoreError("The data file %s cannot be used: %s. Name another with --data."
                             % (path, error.strerror)) from None

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
        """Return every Service of the file, with its access keys. A key without a service
        is reported and left alone."""
        with self._lock:
            services = {row[0].lower(): Service(*row) for row in self._db.execute(
                "SELECT %s FROM services" % ", ".join(SERVICE_COLUMNS)).fetchall()}
            for row in self._db.execute("SELECT service, %s FROM keys" % ", ".join(
                    AccessKey.COLUMNS)):
                key, service = AccessKey(*row[1:]), services.get(row[0].lower())
                if service is None:
                    log("orphan_key", service=row[0], key_id=key.id)
                else:
                    service.keys[key.digest] = key
        for service in services.values():
            service.stored = True
        return list(services.values())

    def changes(self):
        """Return a number that changes when another process has written to the file."""
        with self._lock:
            return self._value("PRAGMA data_version")

    def add(self, service, invitation=None, old_digest=""):
        """Write a new service; it is on the disk when this returns.

        invitation: the hash of one to be used up for it. Raises RelayError if it is unknown
        or used up, or the name is reserved for another key than that of old_digest.
        """
        with self._transaction():
            self._take_name(service.name, old_digest)
            if invitation is not None and not self._db.execute(
                    "UPDATE invitations SET uses=uses-1 WHERE digest=? AND uses>0",
                    (invitation,)).rowcount:
                raise RelayError("invitation_needed", "A new service needs an invitation "
                                 "here, and this one is unknown or used up. Ask the people "
                                 "who run the relay, and give it as \"invitation\".",
                                 param="invitation")
            self._db.execute(
                "INSERT INTO services (%s) VALUES (?%s)" % (
                    ", ".join(SERVICE_COLUMNS), ", ?" * (len(SERVICE_COLUMNS) - 1)),
                [getattr(service, name) for name in SERVICE_COLUMNS])
        service.stored = True

    def _take_name(self, name, key_digest):
        """End the reservation of a name. Raises RelayError if it is for another key."""
        reserved = self._db.execute("SELECT key_digest FROM reserved WHERE name=?",
                                    (name,)).fetchone()
        if reserved and reserved[0] != key_digest:
            raise RelayError("name_taken", "The name %r is reserved for the operator who had "
                             "it. With its old key it can be registered again; otherwise "
                             "choose another." % name)
        self._db.execute("DELETE FROM reserved WHERE name=?", (name,))

    def rename(self, service, name, reserve, **columns):
        """Write another name of a service, and new values of other columns. reserve: keep the
        old name for the holder of its key. Raises RelayError if the new one is reserved for
        another."""
        with self._transaction():
            self._take_name(name, service.key_digest)
            if reserve:
                self._reserve(service)
            self._db.execute("PRAGMA defer_foreign_keys=ON")     # until the end of this
            self._update(service, name=name, **columns)
            self._db.execute("UPDATE keys SET service=? WHERE service=?", (name, service.name))

    def _reserve(self, service):
        self._db.execute("INSERT OR REPLACE INTO reserved VALUES (?, ?)",
                         (service.name, service.key_digest))

    def invite(self, invitation, uses):
        """Write an invitation, by its hash, to register `uses` services."""
        with self._transaction():
            self._db.execute("INSERT INTO invitations VALUES (?, ?, ?)",
                             (invitation, uses, time.time()))

    def change(self, service, **columns):
        """Write new values of a service's columns."""
        with self._transaction():
            self._update(service, **columns)

    def _update(self, service, **columns):
        self._db.execute(
            "UPDATE services SET %s WHERE name=? AND created=?" % ", ".join(
                column + "=?" for column in columns),
            [*columns.values(), service.name, service.created])
        if "key_digest" in columns:        # the old key opens nothing any more
            self._db.execute("UPDATE reserved SET key_digest=? WHERE key_digest=?",
                             (columns["key_digest"], service.key_digest))

    def save(self, services):
        """Write what these services and their keys have counted, in one transaction. Nothing
        else: the rest may have been changed there by another process."""
        with self._transaction():
            self._db.executemany(
                "UPDATE services SET numreq=?, last_seen=?, connected=? "
                "WHERE name=? AND created=?",
                [(s.numreq, s.last_seen, len(s.sessions), s.name, s.created)
                 for s in services])
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

    def change_key(self, key, **columns):
        """Write new values of an access key's columns."""
        with self._transaction():
            self._db.execute("UPDATE keys SET %s WHERE id=?" % ", ".join(
                name + "=?" for name in columns), [*columns.values(), key.id])

    def remove_key(self, key):
        """Delete an access key."""
        with self._transaction():
            self._db.execute("DELETE FROM keys WHERE id=?", (key.id,))

    def remove(self, service, reserve=False):
        """Delete a service. reserve: keep its name for the holder of its key."""
        with self._transaction():
            self._db.execute("DELETE FROM services WHERE name=? AND created=?",
                             (service.name, service.created))
            if reserve:
                self._reserve(service)

    def rows(self, table):
        """The first two columns of a table."""
        with self._lock:
            return [row[:2] for row in self._db.execute("SELECT * FROM " + table)]

    def reserve(self, pairs):
        """Reserve names for the holders of keys: pairs (name, digest)."""
        with self._transaction():
            self._db.executemany("INSERT OR REPLACE INTO reserved VALUES (?, ?)", pairs)

    def save_quotas(self, pairs):
        """Write quotas of callers: pairs (hash, instant)."""
        with self._transaction():
            self._db.executemany("INSERT OR REPLACE INTO quotas VALUES (?, ?)", pairs)

    def load_quotas(self):
        """Return the quotas of callers, the latest instants last."""
        with self._lock:
            return self._db.execute("SELECT caller, due FROM quotas ORDER BY due").fetchall()

    def forget_quotas(self):
        """Delete the quotas that have ended."""
        with self._transaction():
            self._db.execute("DELETE FROM quotas WHERE due<?", (time.time(),))

    def fact(self, name):
        """Return a number of the file's own; None if it has none of that name."""
        with self._lock:
            row = self._db.execute("SELECT value FROM facts WHERE name=?", (name,)).fetchone()
            return row and row[0]

    def note(self, **facts):
        """Write numbers of the file's own."""
        with self._transaction():
            self._db.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", facts.items())

    def backup(self, path):
        """Copy everything to a new file, while others write. Raises OSError, sqlite3.Error."""
        with new_file(path), contextlib.closing(sqlite3.connect(path)) as copy, self._lock:
            self._db.backup(copy)
            copy.execute("PRAGMA journal_mode=DELETE")       # one file, with all in it

    def close(self):
        """Close the file."""
        with self._lock:
            self._db.close()


@contextlib.contextmanager
def new_file(path):
    """Make a data file, for its owner alone; half of one does not stay. Raises OSError if there
    is a file of that name."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    try:
        yield
    except BaseException:
        remove_data(path)
        raise


def remove_data(path):
    """Delete a data file and its logs, as far as they are there."""
    for suffix in DATA_SUFFIXES:
        with contextlib.suppress(OSError):
            os.remove(path + suffix)


def new_key():
    """Return a new key: 256 random bits, with a prefix that scanners recognise."""
    return "ne_" + secrets.token_urlsafe(32)


def digest(key):
    """What is stored of a key. Plain SHA-256 is right for random keys of 256 bits."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


##############################################################################
# Registry: what is stored, reloaded, revoked, saved
#
# It keeps the Broker's services and the data file the same. Another implementation behind
# these methods may keep them elsewhere.
##############################################################################

SAVE_SECONDS = 0.5           # counters reach the disk this often
RELOAD_SECONDS = 2           # between looks at the data file: Python's standard library
                             # has no way to wait for another process's write
RENEW_SECONDS = 600          # how often "last seen" of connected services is renewed
WARNING_SECONDS = 14 * DAY_SECONDS     # before a service is deleted, the directory says so
GAP_SECONDS = 2 * DAY_SECONDS          # see Registry.check_clock


class Registry:
    """Services and access keys, in force and on the disk."""

    def __init__(self, store, broker, registration="open"):
        """registration: one of REGISTRATION."""
        self.registration = registration
        self._store, self._broker = store, broker
        # Held while services or keys change, or are compared with the file, so that no
        # thread sees half of a change. Taken before the broker's and the store's locks.
        self.changing = threading.RLock()
        self._digests = set()              # of all access keys
        self._revoked = []                 # access keys that are still on the disk
        self._unsaved = {}                 # name -> Service whose counters are not
        self._trouble = None               # why they could not be written the last time
        self._changes = store.changes()    # before it is loaded
        self._secret = secrets.token_bytes(32)         # of repeatable_key
        self._repeats = OrderedDict()      # hash of caller and key -> body's fingerprint
        self._expiry_since = store.fact("expiry_since")    # when this version came
        self._steady_since = 0.0           # see check_clock
        broker.quotas.restore(store.load_quotas())
        for service in store.load():
            broker.add(service, returning=True)
            self._digests.update(service.keys)

    def knows_key(self, hashed):
        """Whether some service has an access key of that digest."""
        return hashed in self._digests

    # -- registration --

    def repeatable_key(self, caller, repeat, fingerprint):
        """Return the key for a registration that may be repeated: the same each time while
        the relay runs, and kept nowhere. Raises RelayError if the body is another one."""
        name = hmac.new(self._secret, repr((caller, repeat)).encode(), "sha256").digest()
        if self._repeats.setdefault(name, fingerprint) != fingerprint:
            raise RelayError("key_reused", "This Idempotency-Key was used with another body, "
                             "or for a service that has changed since.")
        while len(self._repeats) > 1000:               # use_repeat adds to them, too
            self._repeats.popitem(last=False)
        return "ne_" + base64.urlsafe_b64encode(hmac.new(
            self._secret, b"key" + name, "sha256").digest()).decode().rstrip("=")

    def use_repeat(self, caller, repeat):
        """A service was registered with this Idempotency-Key: if it is not there the next time,
        the key ends with it."""
        self._repeats[self._used(caller, repeat)] = b""

    def refuse_used(self, caller, repeat):
        """Raise RelayError if a service was registered with this Idempotency-Key."""
        if self._used(caller, repeat) in self._repeats:
            raise RelayError("key_reused", "This Idempotency-Key was used for a service that "
                             "is not there any more, or has a new key.")

    def _used(self, caller, repeat):
        return b"used" + hmac.new(self._secret, repr((caller, repeat)).encode(),
                                  "sha256").digest()

    def is_registered(self, name, key):
        """Whether a service was registered a short time ago with this very key."""
        with contextlib.suppress(RelayError):
            service = self._broker.find(name)
            return service.key_digest == digest(key) and (
                time.time() - service.created < REPEAT_SECONDS)
        return False

    def register(self, service, invitation=None, old_digest=""):
        """Add a service; it is on the disk when this returns. old_digest: of the key that
        its name may be reserved for. Raises RelayError, sqlite3.Error."""
        with self.changing:
            self._broker.add(service)
            try:
                self._store.add(service, invitation, old_digest)
            except BaseException:
                self._broker.remove(service)
                raise

    # -- changes: on the disk first, then in force; what fails is not in force --

    def change(self, service, **changes):
        """Change columns of a service. Raises sqlite3.Error."""
        with self.changing:
            if changes:
                self._store.change(service, **changes)
            self._put_in_force(service, changes)

    def _put_in_force(self, service, changes):
        for field, value in changes.items():
            setattr(service, field, value)
        self._broker.touch()
        if "key_digest" in changes:
            self._broker.close_sessions(service)

    def rename(self, service, name, **changes):
        """Give a service another name, and change columns: its providers are logged out, its
        prompts wait for them. The old name stays reserved for its key if a provider ever had
        it, so that nobody else receives its clients' prompts. Raises RelayError,
        sqlite3.Error."""
        with self.changing:
            if any(other.name.lower() == name.lower() and other is not service
                   for other in self._broker.services()):
                raise RelayError("name_taken", "The name %r is taken. Choose another." % name)
            self._store.rename(service, name, reserve=service.last_seen is not None
                               and name.lower() != service.name.lower(), **changes)
            self._broker.rename(service, name)
            self._put_in_force(service, changes)

    def delete(self, service, reserve=False):
        """Delete a service; reserve: keep its name for its key. Raises sqlite3.Error."""
        with self.changing:
            self._store.remove(service, reserve)
            self._broker.remove(service)
            self._digests.difference_update(service.keys)

    def add_key(self, service, key):
        """Add an access key. Raises RelayError, sqlite3.Error."""
        limits = self._broker.limits
        with self.changing:
            if len(service.keys) >= MAX_KEYS:
                raise RelayError("invalid_request", "%s has %d access keys: revoke some."
                                 % (service.name, MAX_KEYS))
            if len(self._digests) >= limits.max_access_keys:
                raise RelayError("relay_busy", "This relay has no room for more access keys.")
            self._store.add_key(service, key)
            service.keys[key.digest] = key
            self._digests.add(key.digest)

    def change_key(self, service, key_id, changes):
        """Change the label or limits of an access key, and return it. Raises RelayError,
        sqlite3.Error."""
        with self.changing:
            key = next((k for k in service.keys.values() if k.id == key_id), None)
            if key is None:
                raise RelayError("not_found", "%s has no such access key." % service.name)
            if changes:
                self._store.change_key(key, **changes)
            for field, value in changes.items():
                setattr(key, field, value)
            return key

    def revoke_key(self, service, key_id):
        """Revoke an access key: in force when this returns. Return whether it is on the
        disk, too. Raises RelayError."""
        with self.changing:
            key = next((k for k in service.keys.values() if k.id == key_id), None)
            if key is None:
                if any(key.id == key_id for key in self._revoked):
                    self.save()
                    return not self._revoked
                raise RelayError("not_found", "%s has no such access key." % service.name)
            del service.keys[key.digest]
            self._digests.discard(key.digest)
            self._revoked.append(key)
            self.save()
            return not self._revoked

    # -- counters, and what was revoked while the disk was full --

    def save(self):
        """Write what counted since the last time. Never raises: a full disk stops no
        prompt."""
        with self.changing:
            self._unsaved.update({s.name: s for s in self._broker.take_changed()})
            try:
                while self._revoked:
                    self._store.remove_key(self._revoked[0])
                    self._revoked.pop(0)
                if self._unsaved:
                    self._store.save(list(self._unsaved.values()))
                    self._unsaved.clear()
                self._save_quotas()
                self._trouble = None
            except sqlite3.Error as error:
                if self._trouble is None:  # once, not at each attempt: an engine's words differ
                    log("cannot_save", error=str(error))
                self._trouble = str(error)

    def _save_quotas(self):
        changed = self._broker.quotas.take_changed()
        try:
            if changed:
                self._store.save_quotas(list(changed.items()))
        except sqlite3.Error:
            self._broker.quotas.give_back(changed)
            raise

    def keep_saving(self):
        """Save counters when they change, until the broker closes; for a thread."""
        while not self._broker.closed:
            self._broker.counters_changed.wait()
            time.sleep(SAVE_SECONDS)       # so that a burst is one transaction
            self.save()

    def keep_reloading(self):
        """Look for changes by other processes, until the broker closes; for a thread."""
        renewed = time.monotonic()
        while not self._broker.closed:
            time.sleep(RELOAD_SECONDS)
            self.reload()
            if self._revoked or self._unsaved or self._trouble:    # the disk may have room
                self.save()
            if time.monotonic() - renewed > RENEW_SECONDS:
                renewed = time.monotonic()
                self._broker.renew_last_seen()
                self.delete_unused()

    # -- services that nobody uses --

    def deleted_at(self, service):
        """When a service will be deleted because it has no provider; None: it will not."""
        limits = self._broker.limits
        days = limits.unused_days if service.last_seen is None else limits.absent_days
        if service.sessions or not service.stored or not days:
            return None
        since = service.created if service.last_seen is None else service.last_seen
        if since > time.time():            # the clock was wrong then
            since = 0.0
        return max(since, self._expiry_since, self._steady_since) + days * DAY_SECONDS

    def check_clock(self):
        """Let the days of unused services begin anew if the wall clock is not where it must
        be, as relays note it every few minutes: it is wrong, or was; or no relay ran, and
        no provider could connect. Raises sqlite3.Error."""
        now, seen_at = time.time(), self._store.fact("seen_at")
        if seen_at is None or abs(now - seen_at) < GAP_SECONDS:
            self._store.note(seen_at=now)
        else:
            log("unused_days_begin_anew", clock_was=int(seen_at))
            self._store.note(seen_at=now, steady_since=now)
        self._steady_since = self._store.fact("steady_since") or 0.0

    def delete_unused(self):
        """Delete the services that have had no provider for too long. The name of one that
        once had a provider stays reserved for its key, so that nobody inherits its
        clients' prompts."""
        try:
            self._store.forget_quotas()    # not at the start: the clock may not be set yet
            self.check_clock()
            for service in self._broker.services():
                at = self.deleted_at(service)
                if at is not None and time.time() >= at:
                    self.delete(service, reserve=service.last_seen is not None)
                    log("deleted_unused", service=service.name, last_seen=service.last_seen)
        except sqlite3.Error as error:
            log("cannot_save", error=str(error))

    def reload(self):
        """Read again what another process changed in the data file. Return a list of words
        that name the changes. Never raises."""
        try:
            with self.changing:
                changes = None if self._broker.closed else self._store.changes()
                if changes in (None, self._changes):
                    return []
                self._compare({s.name.lower(): s for s in self._store.load()})
                self._changes = changes
                return ["services"]
        except Exception as error:
            log("cannot_reload", error=repr(error))
            return []

    def _compare(self, there):
        """Make the services here those of the file, except for what is counted."""
        for service in self._broker.services():
            new = there.get(service.name.lower())
            if new is not None and new.created == service.created:
                self._compare_one(service, there.pop(service.name.lower()))
            elif service.stored:
                self._broker.remove(service)
                log("deleted", service=service.name)
        for service in there.values():
            self._broker.add(service, returning=True)
            log("registered", service=service.name)
        self._digests = {hashed for service in self._broker.services()
                         for hashed in service.keys}

    def _compare_one(self, service, new):
        for field in SERVICE_SETTINGS:
            setattr(service, field, getattr(new, field))
        if service.key_digest != new.key_digest:
            service.key_digest = new.key_digest
            self._broker.close_sessions(service)
            log("new_key", service=service.name)
        for hashed in set(service.keys) - set(new.keys):
            del service.keys[hashed]
        revoked = {key.id for key in self._revoked}    # there only as the disk is full
        for hashed, key in new.keys.items():
            if key.id not in revoked:
                known = service.keys.setdefault(hashed, key)
                for field in ("label",) + KEY_LIMITS:
                    setattr(known, field, getattr(key, field))

    def close(self):
        """Save, and close the file."""
        self.save()
        with self.changing:
            self._store.close()


##############################################################################
# Relay: accepts connections, and holds what they share
#
# It gives each connection that has something to say a thread, and owns the Broker, the
# Registry and the Rooms that bound them.
##############################################################################

ACCEPT_PAUSE_SECONDS = 0.05  # after a failed accept, which may fail again at once


def ip_of(address):
    """A peer's IP address; IPv4 within IPv6 as IPv4."""
    ip = ipaddress.ip_address(address.partition("%")[0])       # %: the interface
    return getattr(ip, "ipv4_mapped", None) or ip


def canonical_address(address):
    """A peer's address as limits count it: IPv4 as itself, IPv6 by its /64 network."""
    ip = ip_of(address)
    if ip.version == 6 and not ip.is_loopback:
        return str(ipaddress.ip_network((int(ip) >> 64 << 64, 64)))
    return str(ip)


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


class Names:
    """By which names the relay may be called.

    A page anywhere can make its own name mean 127.0.0.1 (DNS rebinding) and then call a relay
    that only this machine can reach: the name it uses gives it away.
    """

    def __init__(self, names, local):
        """names: none if any will do. local: only this machine can reach the relay."""
        self.known = {name.lower() for name in names}
        if self.known or local:
            self.known.add("localhost")

    def check(self, fields):
        """Raise RelayError if a request's headers call the relay by another name, or if they
        come from a page of elsewhere while the relay is for this machine alone."""
        name, origin = host_name(fields.get("host", "")), fields.get("origin")
        if name and name not in self.known:
            raise RelayError("forbidden", "This relay is not called %s. If a proxy calls it "
                             "so, start it with --allow-host %s." % (name, name))
        if origin and self.known == {"localhost"} and host_name(
                origin.partition("://")[2] or origin) not in ("", "localhost"):
            raise RelayError("forbidden", "This relay is for this machine alone, not for "
                             "pages of %s." % printable(origin, 60))


class Relay(ThreadingHTTPServer):
    """Accepts connections and serves them in threads."""

    exchange_type = HttpExchange
    daemon_threads = True
    request_queue_size = 1024              # the default, 5, drops bursts of connections
    allow_reuse_port = False

    def __init__(self, host="", port=0, *, store=None, limits=None, tls=None, page=None,
                 broker=None, registration="open", proxies=(), hops=1, names=(),
                 webroot=None, listener=None, plain=None, registry=None):
        """tls: a Certificate, or None for plain HTTP. page: the bytes of chat.html.

        registration: one of REGISTRATION. proxies: ipaddress networks of proxies whose
        X-Forwarded-For is believed, namely the address `hops` from its end. names: the
        names of the relay, if it answers to no other. webroot: a folder with ACME's
        challenges. listener: a socket that listens already, in place of host and port.
        plain: a second one, on which a relay with TLS answers those challenges, and
        redirects browsers to https. registry: one that keeps services elsewhere than in a
        Store.
        """
        self.limits = limits or Limits()
        self.broker = broker or Broker(self.limits)
        self.registry = registry or Registry(
            store or Store(":memory:"), self.broker, registration)
        self.directory = Directory(self.broker, self.registry)
        self.tls, self.webroot, self.plain = tls, webroot, plain
        self.proxies, self.hops = proxies, hops
        self.show(page)
        self.bounds = Bounds(self.limits)
        self.hang_ups = HangUps()
        self.threads, self.lobby = Threads(), Lobby(self._start)
        self.stopping = False
        self.active = set()                # exchanges under way
        self.tally = Tally()
        self._spare = os.open(os.devnull, os.O_RDONLY)   # see _accept
        if ":" in host or not host and socket.has_dualstack_ipv6():
            self.address_family = socket.AF_INET6
        super().__init__((host, port), None, bind_and_activate=listener is None)
        if listener is not None:
            self.socket.close()
            self.socket = listener
            self.server_address = listener.getsockname()
            self.server_port = self.server_address[1]
        self.names = Names(names, is_loopback(canonical_address(self.server_address[0])))

    def show(self, page):
        """Serve these bytes of chat.html from now on; None for no page. And the client file
        as it is now."""
        self.page = page
        self.page_file = Page(page, "text/html; charset=utf-8") if page else None
        client = read_beside("neuroengine.py")
        self.client_file = Page(client, "text/x-python; charset=utf-8") if client else None

    def server_bind(self):
        """Bind, without the name look-up that the base class makes."""
        if self.address_family == socket.AF_INET6:
            with contextlib.suppress(AttributeError, OSError):
                self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):     # Windows: else two could bind
            self.allow_reuse_address = False
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
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

    # -- connections --

    def get_request(self):
        """Accept a connection. No TLS handshake here: a silent peer would delay others."""
        return self._accept(self.socket)

    def _accept(self, listener):
        """Accept a connection; when out of file descriptors, turn away those that wait.

        Otherwise the listening socket stays readable and the loop spins: measured elsewhere
        at 350,000 failing accepts a second.
        """
        try:
            sock, address = listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self.tally.count("refused_connections", "descriptors")
                self.lobby.close_oldest()
                spare, self._spare = self._spare, None
                with contextlib.suppress(OSError, TypeError):
                    os.close(spare)
                    for _ in range(self.request_queue_size):
                        listener.accept()[0].close()
                        if not is_ready(listener, selectors.EVENT_READ, 0):
                            break
                with contextlib.suppress(OSError):
                    self._spare = os.open(os.devnull, os.O_RDONLY)
                time.sleep(ACCEPT_PAUSE_SECONDS)
            raise
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        keep_alive(sock)
        return sock, address

    def _accept_plain(self):
        """Accept what comes on the second socket, which speaks plain HTTP."""
        while not self.stopping:
            try:
                self.process_request(*self._accept(self.plain))
            except OSError:
                time.sleep(ACCEPT_PAUSE_SECONDS)

    def process_request(self, request, client_address):
        """Serve a new connection, if the limits allow one more."""
        proxied = self.is_proxy(client_address[0])
        address = canonical_address(client_address[0])
        try:
            # What comes through a proxy counts for its clients, see Exchange.run.
            slot = self.bounds.connections.take(None if proxied else address, reserved=True)
        except RelayError as error:
            if error.name == "relay_busy":
                self.lobby.close_oldest()
            return self._refuse(request, error)
        try:
            connection = Connection(request, self.limits, self.tls and self.tls.context)
        except BaseException:              # its peer has reset it, or no memory is left
            slot.release()
            raise
        connection.address, connection.slot, connection.proxied = address, slot, proxied
        connection.near = not proxied and is_loopback(address)
        self._start(connection)

    def _start(self, connection):
        """Serve a connection in a thread."""
        try:
            self.threads.run(functools.partial(self._serve, connection))
        except RuntimeError:               # the system has no more threads
            connection.close()
            self.tally.count("refused_connections", "threads")
            self.lobby.close_oldest()

    def _serve(self, connection):
        """Answer a connection's requests until it ends, or there is none for a while."""
        parked = idle = False
        try:
            with self.hang_ups.watching(connection):
                connection.shake_hands(self.limits.handshake_seconds)
                while True:
                    idle = True
                    parked = not connection.has_request(self._wait_seconds(connection))
                    idle = parked
                    if parked or not self._exchange(connection):
                        break
        except (PeerGone, OSError):
            parked = False                 # normal: they leave when they like
        except Exception as error:
            parked = False
            log("internal_error", error=printable(repr(error)), traceback=True)
        if parked and self.lobby.holds:
            connection.last_head, connection.head = b"", None      # they may take 40 KB
            self.lobby.park(connection, connection.park_until())
        else:
            connection.close(idle)

    def _wait_seconds(self, connection):
        """How long a thread waits for the next request."""
        if self.lobby.holds:
            return SHORT_WAIT_SECONDS
        return connection.park_until() - time.monotonic()

    def _exchange(self, connection):
        """Answer one request; return whether another may follow."""
        exchange = self.exchange_type(self, connection)
        self.active.add(exchange)
        try:
            goes_on = exchange.run()
        finally:
            self.active.discard(exchange)
        connection.idle_until = None
        if not goes_on:
            connection.say_goodbye()
            if exchange.head is None or not exchange.body_read:
                connection.linger()
        return goes_on

    def _refuse(self, request, error):
        """Answer without reading anything; over TLS there is no way to say it."""
        self.tally.count("refused_connections", error.name)
        body = dumps(error.native())
        with contextlib.suppress(OSError, ValueError):
            if not self.tls:
                request.settimeout(0)
                request.send(STATUS_LINES[error.status] + b"Content-Type: application/json"
                             b"\r\nRetry-After: %d\r\nConnection: close\r\nContent-Length: "
                             b"%d\r\n\r\n" % (math.ceil(error.retry_after), len(body)) + body)
        self.shutdown_request(request)

    def handle_error(self, request, client_address):
        """A connection that broke while it was being accepted: nothing to say."""

    # -- what exchanges ask --

    def is_proxy(self, address):
        """Whether a peer's address is that of a trusted proxy."""
        return any(ip_of(address) in network for network in self.proxies)

    def forwarded_for(self, head, peer):
        """The address that a trusted proxy speaks for. Anybody can write the left part of
        X-Forwarded-For; the proxy adds to its right."""
        addresses = head.fields.get("x-forwarded-for", "").split(",")
        if len(addresses) >= self.hops:
            address = re.sub(r"\A(?:\[(.*)\]|([0-9.]+))(?::[0-9]+)?\Z", r"\1\2",
                             addresses[-self.hops].strip())    # without brackets and port
            with contextlib.suppress(ValueError):
                return canonical_address(address)
        return peer

    # -- start and stop --

    def start(self):
        """Start the relay's threads and return. stop() ends them."""
        targets = [self._keep_up, self.registry.keep_saving, self.registry.keep_reloading,
                   self.hang_ups.run, self.lobby.run, self._keep_certificate,
                   functools.partial(self.serve_forever, poll_interval=0.2)]
        if self.plain is not None:
            targets.append(self._accept_plain)
        for target in targets:
            threading.Thread(target=self._keep_running, args=(target,), daemon=True).start()

    def _keep_running(self, target):
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

    def _keep_certificate(self):
        """Use a renewed certificate; for a thread."""
        while self.tls and not self.broker.closed:
            time.sleep(RELOAD_SECONDS)
            self.tls.renew()

    def reload(self):
        """Read again what may have changed on the disk. Return a list of words that name the
        changes."""
        read = self.registry.reload()
        if self.tls and self.tls.renew():
            read.append("certificate")
        return read

    def stop(self, drain_seconds=0.0):
        """Stop: no new jobs; running ones may finish; then close everything. Blocks up to
        drain_seconds and a few more."""
        self.stopping = True
        self.broker.drain()
        deadline = time.monotonic() + drain_seconds
        while not self.broker.nothing_runs() and time.monotonic() < deadline:
            time.sleep(0.05)               # once in a relay's life
        self.broker.close()
        deadline = time.monotonic() + 2    # for the last responses to be written
        while self.active and time.monotonic() < deadline:
            time.sleep(0.02)
        self.shutdown()
        self.server_close()
        if self.plain is not None:
            self.plain.close()
        self.registry.close()
        with contextlib.suppress(OSError, TypeError):
            os.close(self._spare)


def keep_alive(sock):
    """Notice peers behind a NAT that forgot them, and machines that vanish mid-stream."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3),
                        ("TCP_USER_TIMEOUT", 30000)):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def read_beside(name):
    """The bytes of a file next to this program, or None."""
    try:
        with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), name),
                  "rb") as file:
            return file.read()
    except OSError:
        return None


##############################################################################
# Certificates: TLS contexts, renewal while the relay runs, self-signed pairs
##############################################################################

# Without this section the relay speaks plain HTTP only. The connections ask Certificate for
# the context in use; the command line makes one from --cert and --key; the relay renews it.

RENEWAL_SECONDS = 14 * 86400     # certbot renews a month ahead: later than this is too late
PARTIAL_CHAIN = 0x80000          # X509_V_FLAG_PARTIAL_CHAIN: trust a leaf without its root


def tls_context(cert, key):
    """Return the server's ssl.SSLContext for the certificate chain and private key in two
    PEM files. Raises OSError (ssl.SSLError is one) if they cannot be used."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= getattr(ssl, "OP_NO_RENEGOTIATION", 0)
    context.set_alpn_protocols(["http/1.1"])
    # Without a password callback, OpenSSL would stop and ask for a pass phrase on the terminal.
    context.load_cert_chain(cert, key, password=lambda: "")
    return context


class Certificate:
    """A certificate and its key, in files that may be replaced while the relay runs.

    context: the ssl.SSLContext to use for new connections; read it anew for each.
    """

    def __init__(self, cert, key):
        """cert, key: paths of PEM files. Raises OSError if they cannot be used."""
        self.files = (cert, key)
        self._renewing = threading.Lock()  # one thread loads a new pair, others wait for it
        self._seen = self._stamp()         # of the pair in use
        self._refused = None               # of a pair that cannot be used, and why, as logged
        # Replaced as a whole, never changed: loading a new pair into a context in use would
        # break handshakes in other threads, and all later ones if the pair does not match.
        self.context = tls_context(cert, key)

    def _stamp(self):
        """A value that changes when one of the files is written or replaced."""
        try:
            return [(stat.st_mtime_ns, stat.st_size, stat.st_ino)
                    for stat in map(os.stat, self.files)]
        except OSError as error:
            return str(error)

    def renew(self):
        """Load the files again if they have changed; return whether a new pair is in use.

        Never raises: a pair that cannot be used is logged once, and the old one stays.
        """
        with self._renewing:
            return self._renew()

    def _renew(self):
        stamp = self._stamp()
        if stamp == self._seen:
            return False
        try:
            until = certificate_of(*self.files)["notAfter"]    # includes a trial handshake
            self.context = tls_context(*self.files)
        except (OSError, ValueError) as error:
            if self._refused != (stamp, str(error)):
                self._refused = stamp, str(error)
                log("certificate_not_renewed", file=self.files[0], error=str(error),
                    meaning="the old certificate stays in use")
            return False
        self._seen = stamp
        log("certificate_renewed", file=self.files[0], until=until)
        return True


def certificate_of(cert, key):
    """Return a certificate as clients get it: a dict with notAfter, subjectAltName, ...

    Raises OSError; as ssl.SSLCertVerificationError if it is not valid at this time.
    Python's ssl shows only the certificate of a peer that it has verified, hence this
    handshake in memory.
    """
    client_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client_context.check_hostname = False
    client_context.verify_flags |= PARTIAL_CHAIN
    client_context.load_verify_locations(cert)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context.wrap_bio(to_client, to_server)
    server = tls_context(cert, key).wrap_bio(to_server, to_client, server_side=True)
    for side in (client, server, client):  # ClientHello; certificate; verification
        with contextlib.suppress(ssl.SSLWantReadError):
            side.do_handshake()
    return client.getpeercert()


def names_in(certificate):
    """The names and addresses that a certificate of certificate_of() is for, in words."""
    return ", ".join(short_name(name) for _, name in certificate.get(
        "subjectAltName", ())) or "no name"


def short_name(name):
    """A name of a certificate; an IPv6 address as people write it."""
    with contextlib.suppress(ValueError):
        return str(ipaddress.ip_address(name.strip()))
    return name


def own_names(more=()):
    """What clients may call this machine: its host name, `more`, and its addresses as far as
    the system knows them without asking DNS. The router's address at home is not among them."""
    names = [socket.gethostname()[:60], *more, "localhost", "127.0.0.1", "::1"]
    for family, far in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect((far, 9))         # sends nothing: the system chooses the interface
            names.append(sock.getsockname()[0])
    return list(dict.fromkeys(name for name in names if re.match(r"[\w.:-]+\Z", name)))


def alternative_name(name):
    """A name or an address as openssl wants it in subjectAltName."""
    with contextlib.suppress(ValueError):
        return "IP:%s" % ipaddress.ip_address(name)
    return "DNS:" + name


def self_signed(directory, make=True, names=()):
    """Return the paths (cert, key) of a self-signed certificate in a directory.

    make: create the files with openssl if they do not exist; names: for these names, besides
    own_names(). Raises StoreError.
    """
    cert = os.path.join(directory, "neuroengine-cert.pem")
    key = os.path.join(directory, "neuroengine-key.pem")
    if not make or os.path.exists(cert) and os.path.exists(key):
        return cert, key
    names = own_names(names)
    old = os.umask(0o077)
    try:
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt",
             "ec_paramgen_curve:prime256v1", "-nodes", "-days", "3650", "-subj",
             "/CN=" + names[0][:60], "-addext", "subjectAltName=" + ",".join(
                 map(alternative_name, names)), "-keyout", key, "-out", cert],
            check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE)
    except (OSError, subprocess.CalledProcessError) as error:
        lines = (getattr(error, "stderr", b"") or str(error).encode()).splitlines()
        raise StoreError("No certificate was given, and openssl could not make one (%s). "
                         "Use --cert and --key, or --tls off." % printable(lines[-1].decode(
                             "utf-8", "replace")))
    finally:
        os.umask(old)
    return cert, key


##############################################################################
# Cluster: several relays on one engine (Valkey or Redis)
#
# Each service has one home, the relay whose Broker has it; the other relays forward what
# comes for it. The engine holds what is registered, which relays are alive, and which is
# home to what; no prompt and no token. Only --engine brings any of this to life: then the
# classes below take the places of those they are derived from. docs/cluster.md says how
# to use it, and what each failure looks like.
##############################################################################

ENGINE_SECONDS = 1.0         # timeout of the engine, which may be frozen
BEAT_SECONDS = 1.0           # how often a relay renews its membership
MEMBER_SECONDS = 4.0         # so long it lasts
MISSED_SECONDS = 1.5         # since a relay's last beat, if its port refuses: it is dead
FOLLOW_SECONDS = 0.25        # how often a relay reads what has changed
TAKEOVER_SECONDS = 6.0       # so long a request waits for a home
RESTORE_SECONDS = 3.0        # after data loss: homes first, then relays that remember
PASS_ON_SECONDS = 5.0        # a relay that stops forwards new prompts so long: see drain
PEER_IDLE_SECONDS = 20       # of a pooled connection; the peer closes it after 60
PEER_IDLE_MOST = 64          # connections in the pool of each peer
KEEP_BODY_BYTES = 1 << 16    # a larger request is not kept, to be sent to another home
MIN_SECRET = 16              # characters
SECRET_VARIABLE = "NEUROENGINE_CLUSTER_SECRET"
PASSWORD_VARIABLE = "NEUROENGINE_ENGINE_PASSWORD"
HOP_BY_HOP = frozenset("""connection keep-alive te trailer transfer-encoding upgrade expect
    content-length host origin proxy-authorization proxy-connection""".split())
NOT_HOME = b"X-Relay-Home: no"
# Errors of an engine that is not what it was. Redis before 7 wraps those of a script's commands.
NOT_IN_CHARGE = re.compile("(READONLY|LOADING|MASTERDOWN|NOAUTH|DENIED)|.* -READONLY")


class EngineError(sqlite3.OperationalError):
    """The engine gave no answer, or refused. An sqlite3.Error, because those who write to a
    Store expect that of one that cannot write."""


class Refused(ConnectionError):
    """The engine answers, but refuses what relays need: an EngineError says why."""


class Elsewhere(Exception):
    """The home of a service is another relay: forward the request there."""

    def __init__(self, name, home):
        super().__init__(name, home)
        self.name = name                   # in lower case
        self.home = home                   # "epoch@url"; None: the relay that follows this one


class Homeless(Elsewhere):
    """A home would have to be found for a service, while others wait for this thread."""


class NotSent(Exception):
    """A home did not act on a forwarded request: another may. refused: nobody listens."""

    def __init__(self, refused):
        super().__init__(refused)
        self.refused = refused


# The engine.


class Engine:
    """A client of Valkey or Redis (RESP2), with a connection for each thread that needs one
    at the same time. Thread-safe."""

    def __init__(self, url):
        """url: redis://[USER:PASSWORD@]HOST[:PORT][,HOST[:PORT]]...[/DB], rediss:// for TLS,
        unix:///PATH. Of several hosts, the one that is no replica. Raises StoreError."""
        parts = urllib.parse.urlsplit(url)
        if parts.scheme != "unix" and (parts.query or parts.fragment or "@" in parts.path):
            raise StoreError("--engine: in a password, write / as %%2F, ? as %%3F, # as %%23 "
                             "and @ as %%40; or give it in %s." % PASSWORD_VARIABLE)
        if parts.scheme not in ("redis", "rediss", "unix") or not (
                parts.path if parts.scheme == "unix" else parts.netloc):
            raise StoreError("--engine: redis://HOST, rediss://HOST for TLS, or "
                             "unix:///PATH is needed, not %s." % printable(url, 60))
        login, _, hosts = parts.netloc.rpartition("@")
        user, _, password = map(urllib.parse.unquote, login.partition(":"))
        self.shown = "%s://%s" % (parts.scheme, hosts or parts.path)
        self._login = [word for word in (
            user, password or os.environ.get(PASSWORD_VARIABLE, "")) if word]
        self._unix = parts.path if parts.scheme == "unix" else None
        self._hosts = [urllib.parse.urlsplit("//" + host) for host in hosts.split(",")]
        self._number = "" if self._unix else parts.path.strip("/")
        self._tls = ssl.create_default_context() if parts.scheme == "rediss" else None
        self._idle = []                    # (socket, file), newest last
        self._silent_until = -math.inf     # until then no thread waits for a timeout again
        self.up = False
        self.broken = True                 # since the registry has last read everything
        self.replicas = 0                  # how many follow it, as the last beat said
        self.seconds = Histogram()

    def call(self, *words):
        """Send one command; return its answer. Raises EngineError."""
        return self.calls(words)[0]

    def calls(self, *commands):
        """Send commands together; return their answers: str, int, list or None. Blocks up
        to about ENGINE_SECONDS. Raises EngineError."""
        began = time.monotonic()
        if began < self._silent_until:
            raise EngineError("The engine %s does not answer" % self.shown)
        try:
            answers = self._ask_any(b"".join(map(self._encoded, commands)), len(commands))
        except (OSError, ValueError) as error:
            self.up, self.broken = False, True
            self._silent_until = time.monotonic() + FOLLOW_SECONDS
            raise EngineError("The engine %s %s: %s" % (
                self.shown, "refuses" if isinstance(error, Refused) else "does not answer",
                getattr(error, "strerror", None) or error)) from None
        self.up = True
        self.seconds.observe(time.monotonic() - began)
        for answer in answers:
            if isinstance(answer, EngineError):
                raise EngineError("The engine %s refuses: %s" % (self.shown, answer))
        return answers

    def run(self, script, *arguments):
        """Run one of the scripts below."""
        return self.call("EVAL", LUA + script, 1, KEY + "services", *arguments)

    def change(self, script, *arguments):
        """The same for what must not be lost: if the engine has a replica, that has it, too,
        when this returns."""
        command = ("EVAL", LUA + script, 1, KEY + "services") + arguments
        if not self.replicas:
            return self.call(*command)
        milliseconds = int(ENGINE_SECONDS * 800)
        answer, count = self.calls(command, ("WAIT", 1, milliseconds))
        if not count:
            raise EngineError("no replica of the engine has the change")
        return answer

    @staticmethod
    def _encoded(words):
        words = [word if isinstance(word, bytes) else str(word).encode() for word in words]
        return b"*%d\r\n%s" % (len(words), b"".join(
            [b"$%d\r\n%s\r\n" % (len(word), word) for word in words]))

    def _ask_any(self, data, count):
        """Ask over an idle connection, or, if that was closed, over a new one. All that is
        sent here may be sent twice."""
        try:
            return self._ask(self._idle.pop(), data, count)
        except IndexError:
            pass
        except ConnectionError:            # the engine was restarted
            self.broken = True
            self._drop_idle()
        except OSError:
            self._drop_idle()
            raise
        return self._ask(self._connect(), data, count)

    def _drop_idle(self):
        while self._idle:
            with contextlib.suppress(IndexError):
                self._idle.pop()[0].close()

    def _ask(self, connection, data, count):
        sock, file = connection
        try:
            sock.sendall(data)
            answers = [self._answer(file) for _ in range(count)]
            for answer in answers:
                if isinstance(answer, EngineError) and NOT_IN_CHARGE.match(str(answer)):
                    raise Refused(str(answer))
        except BaseException:
            sock.close()
            raise
        self._idle.append(connection)
        return answers

    def _connect(self):
        """Return a new connection. Raises OSError."""
        trouble = None
        for place in list(self._hosts):
            try:
                sock = self._open(place)
                return self._greet(sock, place)
            except OSError as error:
                trouble = error
        raise trouble

    def _open(self, place):
        if self._unix is not None:
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(ENGINE_SECONDS)
            sock.connect(self._unix)
            return sock
        sock = socket.create_connection((place.hostname, place.port or 6379), ENGINE_SECONDS)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._tls is not None:
            sock = self._tls.wrap_socket(sock, server_hostname=place.hostname)
        return sock

    def _greet(self, sock, place):
        """Log in, and see whether this engine may be written to."""
        words = [("AUTH", *self._login)] if self._login else []
        words += [("SELECT", self._number)] if self._number else []
        words += [("ROLE",)] if len(self._hosts) > 1 else []
        connection = sock, sock.makefile("rb")
        for command in words:
            sock.sendall(self._encoded(command))
            answer = self._answer(connection[1])
            if isinstance(answer, EngineError) or command == ("ROLE",) and (
                    answer[0] != "master"):
                sock.close()
                raise Refused(str(answer) if answer != "OK" else "")
        self._hosts.remove(place)          # the next time it is asked first
        self._hosts.insert(0, place)
        return connection

    def _answer(self, file):
        """Read one answer; one that is an error is returned as EngineError."""
        line = file.readline()
        if not line.endswith(b"\r\n"):
            raise ConnectionError("it closed the connection")
        kind, rest = line[:1], line[1:-2]
        if kind == b"+":
            return rest.decode()
        if kind == b"-":                   # its first sentence: some have many
            return EngineError(rest.decode("utf-8", "replace").partition(". ")[0])
        if kind == b":":
            return int(rest)
        if kind == b"*":
            return None if rest == b"-1" else [self._answer(file) for _ in range(int(rest))]
        if kind != b"$":
            raise ConnectionError("it does not speak RESP")
        if rest == b"-1":
            return None
        data = file.read(int(rest) + 2)
        if len(data) != int(rest) + 2:
            raise ConnectionError("it closed the connection")
        return data[:-2].decode("utf-8", "replace")


KEY = "{neuroengine}:"       # of all keys: the braces keep them together in Redis Cluster

# Each script runs alone, from its beginning to its end. A relay is called "epoch@url". In
# homes, "" stands for a home that was given up.
LUA = """
local function key(name) return '{neuroengine}:' .. name end
local function lives(id) return redis.call('exists', key('relay:' .. id)) == 1 end
local function home(name) return redis.call('hget', key('homes'), name) end
local function announce(name)
    redis.call('xadd', key('changes'), 'maxlen', '~', 10000, '*', 'name', name)
end
local function field(name, of) return redis.call('hget', key(name), of) or '' end
local function reserve_for_new_key(old, new)
    local was, is = cjson.decode(old).key_digest, cjson.decode(new).key_digest
    if was == is then return end
    local reserved = redis.call('hgetall', key('reserved'))
    for i = 1, #reserved, 2 do
        if reserved[i + 1] == was then redis.call('hset', key('reserved'), reserved[i], is) end
    end
end
local a = ARGV
"""

# url, milliseconds, name for the data, id or '' -> id. A new process on a url that another
# had: that one is gone.
JOIN = """
local id, now = a[4], redis.call('time')
redis.call('setnx', key('born'), now[1] .. '-' .. a[3])
if id == '' then
    local epoch = math.max((tonumber(redis.call('get', key('epoch'))) or 0) + 1, now[1])
    id = string.format('%d@%s', epoch, a[1])
    redis.call('set', key('epoch'), string.format('%d', epoch))
    for _, old in ipairs(redis.call('smembers', key('relays'))) do
        if old:match('@(.*)') == a[1] then redis.call('del', key('relay:' .. old)) end
    end
end
redis.call('sadd', key('relays'), id)
redis.call('set', key('relay:' .. id), a[1], 'px', a[2])
return id
"""

# id, milliseconds -> whether it was a member still, the data's name, replicas that have all of
# it, ids of members
BEAT = """
local _, replicas = redis.call('info', 'replication'):gsub('state=online', '')
local answer = {redis.call('pexpire', key('relay:' .. a[1]), a[2]),
    redis.call('get', key('born')) or '', replicas}
for _, id in ipairs(redis.call('smembers', key('relays'))) do
    if lives(id) then answer[#answer + 1] = id
    else redis.call('srem', key('relays'), id) end
end
return answer
"""

# id, name, whether the old home's port refuses, ms of membership, ms after which a beat was
# missed -> what became of it, the home, record, counters. After a restart of the engine,
# those who are alive have to beat first.
CLAIM = """
local id, name = a[1], a[2]
if not lives(id) then return {'late'} end
local old, record = home(name), redis.call('hget', key('services'), name)
if not record then return {'unknown'} end
if old and old ~= '' and old ~= id then
    local left = redis.call('pttl', key('relay:' .. old))
    if left > 0 and not (a[3] == '1' and left < a[4] - a[5]) then return {'held', old} end
    local up = tonumber(redis.call('info', 'server'):match('uptime_in_seconds:(%d+)'))
    if up * 1000 <= tonumber(a[4]) then return {'young', old} end
    redis.call('del', key('relay:' .. old))
end
redis.call('hset', key('homes'), name, id)
announce(name)
return {'home', old or 'nobody', record, field('counters', name)}
"""

# id, name, record, invitation or '', digest of an old key, most services -> what became of
# it. The same record again is the same registration.
ADD = """
local id, name = a[1], a[2]
if id ~= '' and not lives(id) then return 'late' end
local there = redis.call('hget', key('services'), name)
if there then return there == a[3] and 'ok' or 'taken' end
local reserved = redis.call('hget', key('reserved'), name)
if reserved and reserved ~= a[5] then return 'reserved' end
if redis.call('hlen', key('services')) >= tonumber(a[6]) then return 'full' end
if a[4] ~= '' then
    if (tonumber(redis.call('hget', key('invites'), a[4])) or 0) < 1 then return 'invitation' end
    redis.call('hincrby', key('invites'), a[4], -1)
end
redis.call('hdel', key('reserved'), name)
redis.call('hset', key('services'), name, a[3])
announce(name)
return 'ok'
"""

# name, record as it was written, invitation or '', digest that the name was reserved for or '':
# take a registration back
WITHDRAW = """
if field('services', a[1]) ~= a[2] then return end
for _, of in ipairs({'services', 'homes', 'counters'}) do
    redis.call('hdel', key(of), a[1])
end
if a[3] ~= '' then redis.call('hincrby', key('invites'), a[3], 1) end
if a[4] ~= '' then redis.call('hset', key('reserved'), a[1], a[4]) end
announce(a[1])
"""

# id or '' (a command), name, record as it was, new record or '', digest to reserve the name
# for or '' -> what became of it
PUT = """
local id, name = a[1], a[2]
if id ~= '' and home(name) ~= id then return 'fenced' end
local there = field('services', name)
if there ~= a[3] and there ~= a[4] then return 'changed' end
if a[4] == '' then
    for _, of in ipairs({'services', 'homes', 'counters'}) do
        redis.call('hdel', key(of), name)
    end
    if a[5] ~= '' then redis.call('hset', key('reserved'), name, a[5]) end
else
    redis.call('hset', key('services'), name, a[4])
    reserve_for_new_key(a[3], a[4])
end
announce(name)
return 'ok'
"""

# id, name, new name, record as it was, new record, digest to reserve the old name for or '',
# digest of the service's key -> what became of it
RENAME = """
local id, old, new = a[1], a[2], a[3]
local there = field('services', old)
if there == '' and field('services', new) == a[5] and home(new) == id then return 'ok' end
if home(old) ~= id then return 'fenced' end
if there ~= a[4] and there ~= a[5] then return 'changed' end
if new ~= old then
    if redis.call('hexists', key('services'), new) == 1 then return 'taken' end
    local reserved = redis.call('hget', key('reserved'), new)
    if reserved and reserved ~= a[7] then return 'reserved' end
    redis.call('hset', key('counters'), new, field('counters', old))
    for _, of in ipairs({'services', 'homes', 'counters'}) do
        redis.call('hdel', key(of), old)
    end
    redis.call('hdel', key('reserved'), new)
    if a[6] ~= '' then redis.call('hset', key('reserved'), old, a[6]) end
    announce(old)
end
redis.call('hset', key('services'), new, a[5])
redis.call('hset', key('homes'), new, id)
reserve_for_new_key(a[4], a[5])
announce(new)
return 'ok'
"""

# id, then name and counters of each service -> the names that it is not home to
SAVE = """
local fenced = {}
for i = 2, #a, 2 do
    if home(a[i]) == a[1] then redis.call('hset', key('counters'), a[i], a[i + 1])
    else fenced[#fenced + 1] = a[i] end
end
return fenced
"""

# id, names: give up these homes; without names, the membership
LEAVE = """
for i = 2, #a do
    if home(a[i]) == a[1] then
        redis.call('hset', key('homes'), a[i], '')
        announce(a[i])
    end
end
if #a == 1 then redis.call('del', key('relay:' .. a[1])) end
"""

# id or '', name, record, counters: after the engine has lost its data
RESTORE = """
if redis.call('hsetnx', key('services'), a[2], a[3]) == 1 then
    redis.call('hset', key('counters'), a[2], a[4])
    if a[1] ~= '' then redis.call('hset', key('homes'), a[2], a[1]) end
    announce(a[2])
end
"""

# seconds, then what and whom, and most, of each bound -> milliseconds that it comes too early
# (see Rates), and the place of the bound that says so
RATE = """
local time, all, late, place, dues = redis.call('time'), a[1] * 1000, 0, 0, {}
local now = time[1] * 1000 + time[2] / 1000
for i = 2, #a, 2 do
    dues[i] = math.max(now, tonumber(redis.call('get', key('rate:' .. a[i]))) or 0)
        + all / a[i + 1]
    if dues[i] - now - all > math.max(late, 1) then late, place = dues[i] - now - all, i end
end
if late > 0 then return {math.ceil(late), place} end
for i, due in pairs(dues) do
    redis.call('set', key('rate:' .. a[i]), string.format('%.3f', due), 'px',
        string.format('%d', due - now + 1))
end
return {0, 0}
"""


# Services as the engine has them: a record changes rarely, counters often.


COUNTED = ("numreq", "last_seen", "connected")
KEY_COUNTED = ("day", "requests", "tokens", "last_used")


def record_of(service, old="{}"):
    """A service as a record, in JSON. old: its last record; what a newer version of this
    program keeps there stays."""
    record = json.loads(old)
    record.update({name: getattr(service, name) for name in SERVICE_COLUMNS
                   if name not in COUNTED})
    record["keys"] = [key_record(key) for key in list(service.keys.values())]
    return json.dumps(record, sort_keys=True)


def key_record(key):
    return {name: getattr(key, name) for name in AccessKey.COLUMNS if name not in KEY_COUNTED}


def counters_of(service):
    """What a service and its keys have counted, as JSON."""
    return json.dumps({
        "numreq": service.numreq, "last_seen": service.last_seen,
        "connected": len(service.sessions), "keys": {
            key.id: [getattr(key, name) for name in KEY_COUNTED]
            for key in list(service.keys.values()) if key.last_used is not None}})


def service_of(record, counters=""):
    """Return the Service of a record and its counters."""
    record, counters = json.loads(record), json.loads(counters or "{}")
    service = Service(**{name: record[name] for name in SERVICE_COLUMNS if name in record})
    service.numreq = counters.get("numreq", 0)
    service.last_seen = counters.get("last_seen")
    service.connected = counters.get("connected", 0)
    service.stored = True
    for values in record["keys"]:
        used = counters.get("keys", {}).get(values["id"], (0, 0, 0, None))
        key = AccessKey(*[values.get(name) for name in AccessKey.COLUMNS[:-4]], *used)
        key.service = service.name.lower()
        service.keys[key.digest] = key
    return service


class EngineStore:
    """The interface of Store over the engine. A relay writes what it is home to; a command
    writes anything."""

    def __init__(self, engine, most=10**9):
        """most: services in all."""
        self.engine, self._most = engine, most
        self.home = ""                     # the relay's id; "" for a command
        self.fenced = 0                    # writes that were refused
        self._withdrawn = []               # scripts and their arguments, see _change

    def changes(self):
        return 0                           # the registry follows them by itself

    def load(self):
        """Return every Service."""
        counters = self.table("counters")
        return [service_of(record, counters.get(name))
                for name, record in self.table("services").items()]

    def table(self, name):
        """One of the engine's hashes as a dict."""
        flat = self.engine.call("HGETALL", KEY + name)
        return dict(zip(flat[::2], flat[1::2]))

    def add(self, service, invitation=None, old_digest=""):
        """Write a new service, as Store.add does; return its record. Raises RelayError."""
        name, record = service.name.lower(), record_of(service)
        reserved = self.engine.call("HGET", KEY + "reserved", name) or ""
        answer = self._change((WITHDRAW, name, record, invitation or "", reserved), ADD,
                              self.home, name, record, invitation or "", old_digest, self._most)
        if answer != "ok":
            raise self.refusal(answer, service.name)
        service.stored = True
        return record

    def _change(self, undo, script, *arguments):
        """Run a script, and return its answer. If that fails, it may have run all the same:
        undo, a script with its arguments, then takes back what it wrote. undo: or None."""
        self.withdraw()
        if self._withdrawn:
            raise EngineError("The engine has not taken back yet what failed before")
        try:
            return self.engine.change(script, *arguments)
        except EngineError:
            if undo is not None:
                self._withdrawn.append(undo)
                self.withdraw()
            raise

    def withdraw(self):
        """Take back what was refused, but may have been written; as soon as that can be done."""
        with contextlib.suppress(EngineError):
            while self._withdrawn:
                self.engine.run(*self._withdrawn[0])
                self._withdrawn.pop(0)

    def rename(self, service, name, reserve, **columns):
        """Write another name, as Store.rename does; return the record. Raises RelayError."""
        old, new, hashed, answer = service.name.lower(), name.lower(), service.key_digest, ""
        while answer in ("", "changed"):   # by somebody else in between
            before, reserved = self.engine.calls(("HGET", KEY + "services", old),
                                                 ("HGET", KEY + "reserved", new))
            before = before or "{}"
            record = json.dumps(dict(json.loads(before), name=name, **columns), sort_keys=True)
            answer = self._change(
                (RENAME, self.home, new, old, record, before, reserved or "",
                 columns.get("key_digest", hashed)),
                RENAME, self.home, old, new, before, record, hashed if reserve else "", hashed)
        if answer != "ok":
            raise self.refusal(answer, name)
        return record

    def refusal(self, answer, name):
        if answer == "taken":
            return RelayError("name_taken", "The name %r is taken. Choose another." % name)
        if answer == "reserved":
            return RelayError("name_taken", "The name %r is reserved for the operator who had "
                              "it. With its old key it can be registered again; otherwise "
                              "choose another." % name)
        if answer == "invitation":
            return RelayError("invitation_needed", "A new service needs an invitation here, "
                              "and this one is unknown or used up. Ask the people who run "
                              "the relay, and give it as \"invitation\".", param="invitation")
        if answer == "full":
            return RelayError("relay_busy", "These relays have no room for more services.")
        return Moved()

    def _edit(self, name, edit, reserve="", removes=False, home=None):
        """Write the record that edit makes of the present one; "" deletes the service.
        removes: what it takes away stays away, even if that fails. Raises RelayError if
        another relay is home to it, unless home is ""."""
        home = self.home if home is None else home
        answer = "changed"
        while answer == "changed":         # by somebody else in between
            old = self.engine.call("HGET", KEY + "services", name) or ""
            new = edit(old) if old else ""
            answer = self._change(None if removes else (PUT, "", name, new, old, ""),
                                  PUT, home, name, old, new, reserve)
        if answer != "ok":
            self.fenced += 1
            raise Moved()

    def change(self, service, **columns):
        self._edit(service.name.lower(), lambda old: json.dumps(
            dict(json.loads(old), **columns), sort_keys=True))

    def add_key(self, service, key):
        key.service = service.name.lower()
        self._edit_keys(key, [key_record(key)])

    def change_key(self, key, **columns):
        self._edit_keys(key, [dict(key_record(key), **columns)])

    def remove_key(self, key):
        """Revoke a key, wherever its service has its home by now."""
        self._edit_keys(key, [], removes=True, home="")

    def _edit_keys(self, key, more, **how):
        def edit(old):
            record = json.loads(old)
            record["keys"] = [k for k in record["keys"] if k["id"] != key.id] + more
            return json.dumps(record, sort_keys=True)
        self._edit(key.service, edit, **how)

    def remove(self, service, reserve=False):
        self._edit(service.name.lower(), lambda old: "",
                   service.key_digest if reserve else "", removes=True)

    def save(self, services):
        """Write the counters of services. Raises RelayError if some have another home."""
        fenced = []
        for start in range(0, len(services), 500):
            words = []
            for service in services[start:start + 500]:
                words += [service.name.lower(), counters_of(service)]
            fenced += self.engine.run(SAVE, self.home, *words)
        if fenced:
            self.fenced += len(fenced)
            raise Moved()

    def save_quotas(self, pairs):
        words = [word for caller, due in pairs for word in (due, caller.hex())]
        if words:
            self.engine.calls(("ZADD", KEY + "quotas", *words),
                              ("ZREMRANGEBYSCORE", KEY + "quotas", "-inf", time.time()))

    def load_quotas(self):
        flat = self.engine.call("ZRANGE", KEY + "quotas", 0, -1, "WITHSCORES")
        return [(bytes.fromhex(caller), float(due))
                for caller, due in zip(flat[::2], flat[1::2])]

    def invite(self, invitation, uses):
        self.engine.change("redis.call('hset', key('invites'), a[1], a[2])", invitation, uses)

    def backup(self, path):
        """Write everything to a new SQLite file. Raises OSError, EngineError."""
        with new_file(path), contextlib.closing(Store(path)) as copy:
            for service in self.load():
                copy.add(service)
                for key in service.keys.values():
                    copy.add_key(service, key)
            for invitation, uses in self.table("invites").items():
                copy.invite(invitation, int(uses))
            copy.reserve(self.table("reserved").items())
            copy.save_quotas(self.load_quotas())

    def take_in(self, file):
        """Add what a Store has and the engine has not; return the names of the services that
        the engine has already."""
        known = []
        for service in file.load():
            name = service.name.lower()
            try:
                self.add(service, old_digest=service.key_digest)
                self.engine.call("HSETNX", KEY + "counters", name, counters_of(service))
            except RelayError:
                known.append(service.name)
        for table in ("invitations", "reserved"):
            for name, value in file.rows(table):
                self.engine.call("HSETNX", KEY + table.replace("invitations", "invites"),
                                 name.lower(), value)
        self.save_quotas(file.load_quotas())
        return known

    def close(self):
        pass


class Moved(RelayError):
    """This relay is not home to a service, and has done nothing."""

    def __init__(self):
        super().__init__("shutting_down", "The relay that holds this service does not answer, "
                         "or the service is moving to another. Try again.", retry_after=1)


class HomeStore(EngineStore):
    """The same for a registry, which starts before the engine answers, with no service."""

    def load(self):
        return []

    def load_quotas(self):
        return []

    def fact(self, name):
        if name == "expiry_since":         # known when the engine answers
            return time.time()
        value = self.engine.call("HGET", KEY + "facts", name)
        return value and float(value)

    def note(self, **facts):
        for name, value in facts.items():
            self.engine.call("HSET", KEY + "facts", name, repr(value))


class EngineRates(Rates):
    """Rates that are counted in the engine, for all relays together; here alone while it is
    silent."""

    def __init__(self, engine, kind):
        super().__init__()
        self._engine, self._kind = engine, kind

    def take_all(self, bounds, seconds, what, name="rate_limited", count=1):
        """As Rates; count: always 1."""
        super().take_all(bounds, seconds, what)        # so strangers cannot load it
        words = [seconds]
        for caller, most in bounds:
            words += [self._kind + hashlib.sha256(caller.encode()).hexdigest()[:32], most]
        with contextlib.suppress(EngineError):
            late, place = self._engine.run(RATE, *words)
            if late:
                raise too_many(what, words[place], seconds, late / 1000)


# The registry: what each relay knows of all services, and what it is home to.


class ClusterBroker(Broker):
    """A Broker of the services that this relay is home to."""

    registry = None                        # the EngineRegistry, which sets it
    passes_on_until = math.inf             # new prompts to other relays

    def __init__(self, limits=None):
        super().__init__(limits)
        self._given_up = threading.Condition(self._lock.lock)  # lose and close notify

    def find(self, name):
        """The same; a service without a home gets one here. Raises Elsewhere, too."""
        if time.monotonic() > self.registry.sure_until:
            self.registry.make_sure()
        return (self._services.get(name.lower()) or self.registry.locate(name)
                or super().find(name))     # which says why there is none

    def at_home(self, name):
        """The Service of that name, in lower case, if this relay is its home; or None."""
        return self._services.get(name)

    def submit(self, job, identity=None, at=None):
        """The same. If this relay stops, a new prompt is for the next home: raises Elsewhere,
        too. Raises Moved if the service has left since it was found."""
        try:
            return super().submit(job, identity, at)
        except RelayError as error:
            name = job.service.name.lower()
            if error.name == "shutting_down":
                raise Elsewhere(name, None) from None
            if error.name == "service_unknown" and name in self.registry.records:
                raise Moved() from None
            raise

    def _shutting_down(self):
        return RelayError("shutting_down", "This relay is restarting, and its services move "
                          "to another. Try again.", retry_after=1)

    def lose(self, service):
        """Another relay is home to it: end its sessions and jobs, drop what was counted."""
        with self._lock:
            if self._services.get(service.name.lower()) is service:
                del self._services[service.name.lower()]
            error = self._shutting_down()
            for job in [job for job in self._jobs.values() if job.service is service]:
                if job.ended_at is None:
                    self._cancel_locked(job, error)
            self._end_sessions_locked(service)
            self._changed.pop(service.name, None)
            self._version += 1
            self._given_up.notify_all()

    def wait_to_lose(self, name, seconds):
        """Block up to `seconds` until this relay is not home to a service, or closes."""
        with self._lock:
            self._given_up.wait_for(lambda: self.closed or name not in self._services, seconds)

    def drain(self):
        """The same. Balancers need a moment to notice; but new prompts without end, each
        forwarded, would last until the answers that run are cut."""
        self.passes_on_until = time.monotonic() + PASS_ON_SECONDS
        super().drain()

    def nothing_runs(self):
        """Whether no job is in a provider's hands, here or at a home that this relay passes
        the answer on from."""
        return super().nothing_runs() and not self.registry.peers.is_answering()

    def close(self):
        super().close()
        with self._lock:
            self._given_up.notify_all()
        self.registry.peers.abort_all()

    def is_idle(self, service):
        """Whether no provider works for it."""
        with self._lock:
            return not any(session.jobs() for session in self._sessions.values()
                           if session.service is service)

    def totals(self):
        counters, gauges, histograms = super().totals()
        registry = self.registry
        counters.update(registry.counts, fenced_writes=registry.store.fenced)
        gauges.update(engine_up=int(registry.engine.up), homes=gauges["services"],
                      relays=len(registry.relays))
        return counters, gauges, dict(histograms, engine_seconds=registry.engine.seconds)


class EngineFollower(Registry):
    """A Registry over the engine, for one of several relays: what this relay knows of all of
    them, and of all services. EngineRegistry, next, adds what it does as a home.

    `changing` is also held for each conversation with the engine in which something may
    come into force, so that they happen in order. No prompt waits for it, unless
    its service has no home, or this relay missed its beats.
    """

    def __init__(self, engine, broker, registration, peers):
        self.engine, self.peers = engine, peers
        self.store = HomeStore(engine, broker.limits.max_services)
        self.url = self.id = ""            # the id is given by the engine
        self.born = ""                     # names the engine's data
        self.relays = frozenset()          # ids of those alive at the last beat
        self.sure_until = -math.inf        # so long nobody else can have become home
        self.records, self.homes = {}, {}  # lower-case name -> record; -> id of its home
        self.counters = {}                 # name -> counters, when they were last read
        self.counts = {"forwarded": 0, "claims": 0, "lost_homes": 0}
        self._beat_at = self._failed_at = self._followed_at = -math.inf
        self._cursor = "0"                 # in the stream of changes
        self._silence = None               # why the engine is silent, as logged
        self._remembered, self._restore_at = {}, math.inf      # see _write_back
        broker.registry = self
        super().__init__(self.store, broker, registration)

    # -- membership --

    def follow(self):
        """Beat if it is time, and read what changed until now. Return whether the engine
        answered; never raises."""
        now = time.monotonic()
        try:
            with self.changing:
                if self._followed_at < now:          # else another thread just did
                    began = time.monotonic()
                    self.store.withdraw()
                    self._beat()
                    self._read_changes()
                    self._followed_at = began
            if self._silence is not None:
                log("engine_answers", engine=self.engine.shown)
            self._silence = None
            return True
        except EngineError as error:
            self._failed_at = time.monotonic()
            if self._silence is None:
                log("engine_silent", error=str(error), meaning=(
                    "services go on; nothing can be registered or changed until it answers")
                    if self.id else "this relay waits for it")
            self._silence = str(error)
            return False

    def make_sure(self):
        """This relay is late with its beat: ask whether it is still home, before it acts as
        one. Does nothing while the engine is known to be silent: see keep_asking."""
        if time.monotonic() - self._failed_at > MEMBER_SECONDS - BEAT_SECONDS:
            with self.changing:
                if time.monotonic() > max(self.sure_until, self._failed_at + 1):
                    self.follow()

    def keep_asking(self):
        """While the engine is silent, others may have taken homes from this relay, which they
        could not reach, either: lose those, until the broker closes; for a thread."""
        while not self._broker.closed:
            time.sleep(BEAT_SECONDS)
            for other in self.relays - {self.id} if self._is_late() else ():
                for name in self.peers.homes_of(other):
                    with self.changing:
                        if self._is_late() and self._broker.at_home(name) is not None:
                            self._apply(name, self.records[name], other)

    def _is_late(self):
        """Whether this relay's membership may have ended."""
        return time.monotonic() > self.sure_until

    def introduction(self, homes):
        """What this relay says of itself to another. homes: also what it is surely home to."""
        words = {"relay": self.id}
        if homes and not self._is_late():
            words["homes"] = [service.name.lower() for service in self._broker.services()]
        return words

    def _beat(self):
        sent, milliseconds = time.monotonic(), int(MEMBER_SECONDS * 1000)
        if self.id and sent - self._beat_at < BEAT_SECONDS and not self.engine.broken:
            return
        if not self.id:
            self.id = self.store.home = self.engine.run(
                JOIN, self.url, milliseconds, secrets.token_hex(8), "")
            log("joined", relay=self.id, engine=self.engine.shown)
        member, born, self.engine.replicas, *relays = self.engine.run(
            BEAT, self.id, milliseconds)
        if not member:
            self.engine.run(JOIN, self.url, milliseconds, secrets.token_hex(8), self.id)
        if not member or born != self.born or self.engine.broken:
            self.engine.broken = False
            self._read_all()
        gone = self.relays - set(relays)
        if gone:                           # what a lost home counted is of use now
            self.counters = self.store.table("counters")
            self.peers.look_after(gone)
            self.peers.close_idle(gone)
        self.relays = self.peers.members = frozenset(relays) | {self.id}
        self._beat_at, self.sure_until = sent, sent + MEMBER_SECONDS

    # -- what the engine says --

    def _read_all(self):
        """Read everything again: what this relay knew may be wrong."""
        born = self.engine.call("GET", KEY + "born") or ""
        if self.born and born != self.born:
            self._write_back()
        self.born = born
        self._expiry_since = float(born.partition("-")[0] or time.time())
        last = self.engine.call("XREVRANGE", KEY + "changes", "+", "-", "COUNT", 1)
        self._cursor = last[0][0] if last else "0"
        homes, self.counters = self.store.table("homes"), self.store.table("counters")
        records = self.store.table("services")
        for name in set(self.records) | set(records):
            if name in records or name not in self._remembered:      # else it comes back
                self._apply(name, records.get(name), homes.get(name))

    def _write_back(self):
        """The engine has lost its data, and the homes write theirs; what has no home alive
        is written later by those who remember it."""
        log("engine_lost_data", meaning="the relays write back what they know")
        for name, record in list(self.records.items()):
            service = self._broker.at_home(name)
            if service is not None:
                self.engine.run(RESTORE, self.id, name, record_of(service, record),
                                counters_of(service))
        self._remembered = {name: (record, self.counters.get(name, "{}"))
                            for name, record in self.records.items()}
        self._restore_at = time.monotonic() + RESTORE_SECONDS

    def _read_changes(self):
        """Apply the changes that others have announced since the last time."""
        if time.monotonic() > self._restore_at:
            for name, values in self._remembered.items():
                self.engine.run(RESTORE, "", name, *values)
            self._remembered, self._restore_at = {}, math.inf
        while True:
            reply = self.engine.call("XREAD", "COUNT", 1000, "STREAMS", KEY + "changes",
                                     self._cursor)
            if not reply:
                return
            entries = reply[0][1]
            names = list({fields[1] for _, fields in entries})
            records, homes = self.engine.calls(("HMGET", KEY + "services", *names),
                                               ("HMGET", KEY + "homes", *names))
            for name, record, home in zip(names, records, homes):
                self._apply(name, record, home)
            self._cursor = entries[-1][0]

    def _apply(self, name, record, home):
        """Make what is known of a service what the engine says."""
        known, service = self.records.get(name), self._broker.at_home(name)
        self._know(name, record, home)
        if service is None:
            if record is not None and home == self.id and not self._broker.draining:
                self._adopt(name, record, self.counters.get(name), True)
        elif record is None:
            self._broker.remove(service)
            log("deleted", service=service.name)
        elif home != self.id:
            self._broker.lose(service)
            self.counts["lost_homes"] += 1
            log("home_lost", service=service.name, home=home)
        elif record != known:
            self._compare_one(service, service_of(record))

    def _know(self, name, record, home):
        for text in filter(None, (self.records.pop(name, None),)):
            self._digests.difference_update(key["digest"] for key in json.loads(text)["keys"])
        self.homes.pop(name, None)
        if record is not None:
            self.records[name] = record
            self._digests.update(key["digest"] for key in json.loads(record)["keys"])
            if home:
                self.homes[name] = home

    def _adopt(self, name, record, counters, returning):
        service = service_of(record, counters)
        self._broker.add(service, returning=returning)
        return service


class EngineRegistry(EngineFollower):
    """The same, with what this relay does as a home: it finds or becomes the homes of services,
    changes them in the engine, and gives them up."""

    large_bodies = Turns()                 # the relay's, which sets it

    def __init__(self, engine, broker, registration, peers, secret):
        super().__init__(engine, broker, registration, peers)
        self._secret = hmac.new(secret.encode(), b"registrations", "sha256").digest()
        self._quotas_at = -math.inf        # when they were last read
        self._waiting = defaultdict(threading.Lock)    # name -> held by who settles its home

    def keep_reloading(self):
        """Beat and follow the changes, until the broker closes; for a thread."""
        renewed = time.monotonic()
        while not self._broker.closed:
            if self.follow():
                if self._revoked or self._unsaved or self._trouble:
                    self.save()
            if self._broker.draining:
                self._give_up_idle()
            if time.monotonic() - renewed > RENEW_SECONDS:
                renewed = time.monotonic()
                self._broker.renew_last_seen()
                self.delete_unused()
            time.sleep(0.05 if self._broker.draining else FOLLOW_SECONDS)

    # -- homes --

    def locate(self, name):
        """Return the Service of a name that this relay was not home to, after it has become
        home; None if there is none. Raises Elsewhere, RelayError."""
        name = name.lower()
        if name not in self.records and not self.follow():
            raise self.silent_error()
        if name not in self.records:
            return None
        if self.large_bodies.is_mine() and self.homes.get(name) not in self.relays - {self.id}:
            raise Homeless(name, None)
        return self.settle(name)

    def settle(self, name, suspect=None, refused=False):
        """Find or become the home of a service. suspect: a relay that is not, or, if
        `refused`, does not listen any more. Blocks up to TAKEOVER_SECONDS. Returns the
        Service; raises Elsewhere, RelayError."""
        self._forward_from(name, suspect)
        deadline = time.monotonic() + TAKEOVER_SECONDS
        with self._waiting[name]:
            while True:
                self._forward_from(name, suspect)
                service = self._claim(name, refused and self.homes.get(name) == suspect)
                if service is not None:
                    return service
                if time.monotonic() > deadline:
                    raise Moved()
                time.sleep(0.1)
                self.follow()

    def _forward_from(self, name, suspect):
        """Raise Elsewhere if another relay is home, unless that is the suspect."""
        home = self.homes.get(name)
        if home and home not in (suspect, self.id) and (
                home in self.relays or self.peers.answers(home)):
            raise Elsewhere(name, home)

    def wait_to_give_up(self, name):
        """This relay stops: block until it has given up the home of a service, as it does
        when the running answers have ended. Raises Moved if it ends first."""
        while self._broker.at_home(name) is not None:
            if self._broker.closed or len(self.relays) < 2:
                raise Moved()
            self._broker.wait_to_lose(name, BEAT_SECONDS)      # or the last other relay ends

    def next_home(self, name):
        """The relay to which this one, which stops, sends what comes for a service that it
        is not home to. Raises Moved if there is none."""
        self.follow()
        others = sorted(self.relays - {self.id})
        if not others:
            raise Moved()
        home = self.homes.get(name)
        return home if home in others else others[zlib.crc32(name.encode()) % len(others)]

    def has_moved(self, name, home):
        """Whether the engine knows of another home by now."""
        self.follow()
        return self.homes.get(name) != home

    def _claim(self, name, refused):
        """Try to become home; return the Service, or None, with what was learnt in homes."""
        try:
            with self.changing:
                service = self._broker.at_home(name)
                if service is not None:
                    return service
                if self._broker.draining:
                    raise Elsewhere(name, self.next_home(name))
                what, *more = self.engine.run(
                    CLAIM, self.id, name, int(refused), int(1000 * MEMBER_SECONDS),
                    int(1000 * MISSED_SECONDS))
                if what == "home":
                    return self._claimed(name, *more)
                if what == "unknown" and name not in self._remembered:
                    self._know(name, None, None)
                    return Broker.find(self._broker, name)       # which says so
                if what == "held":
                    self.homes[name] = more[0]
                    self.relays |= {more[0]}
                return None                # late, young: beat, and try again
        except EngineError:
            raise self.silent_error() from None

    def _claimed(self, name, old, record, counters):
        self.counts["claims"] += 1
        self._know(name, record, self.id)
        if time.monotonic() - self._quotas_at > 1:     # what the old home had counted
            self._quotas_at = time.monotonic()
            self._broker.quotas.restore(EngineStore.load_quotas(self.store))
        log("home", service=name, before=old or "given up")
        return self._adopt(name, record, counters, returning=old != "nobody")

    def _give_up_idle(self):
        """This relay stops: give up the services without a running job."""
        with contextlib.suppress(EngineError), self.changing:
            self.save()
            self._leave([service for service in self._broker.services()
                         if self._broker.is_idle(service)])

    def _leave(self, services):
        if services and self.id:
            self.engine.run(LEAVE, self.id, *[service.name.lower() for service in services])
        for service in services:
            self._broker.lose(service)
            self.homes.pop(service.name.lower(), None)

    # -- what differs from a Registry on a file --

    def register(self, service, invitation=None, old_digest=""):
        with self.changing:
            if not self.id:
                raise self.silent_error()
            self._refuse_taken(service.name)
            # Its home will be the relay at which its provider logs in: HAProxy chooses.
            record = self.store.add(service, invitation, old_digest)
            self._know(service.name.lower(), record, None)

    def _refuse_taken(self, name):
        """Raise RelayError if a name is taken, even if the engine has just lost its data."""
        self.follow()
        if name.lower() in self.records:
            raise self.store.refusal("taken", name)

    def rename(self, service, name, **changes):
        with self.changing:
            old = service.name.lower()
            if name.lower() != old:
                self._refuse_taken(name)
            record = self.store.rename(service, name, reserve=service.last_seen is not None
                                       and name.lower() != old, **changes)
            self._know(old, None, None)
            self._know(name.lower(), record, self.id)
            self._broker.rename(service, name)
            self._put_in_force(service, changes)
            for key in list(service.keys.values()) + self._revoked:
                if key.service == old:
                    key.service = name.lower()

    def delete(self, service, reserve=False):
        with self.changing:
            super().delete(service, reserve)
            self._know(service.name.lower(), None, None)

    def is_registered(self, name, key):
        self.follow()
        record = json.loads(self.records.get(name.lower(), "{}"))
        return record.get("key_digest") == digest(key) and (
            time.time() - record["created"] < REPEAT_SECONDS)

    def save(self):
        with self.changing:
            self._unsaved = {name: service for name, service in self._unsaved.items()
                             if self._broker.at_home(name.lower()) is service}
            try:
                super().save()
            except RelayError:             # another relay is home to one of them: see which
                self._unsaved.clear()
                self.follow()

    def delete_unused(self):
        """Also of services without a home, which this relay becomes."""
        try:
            self.check_clock()
        except EngineError:
            return
        for name, record in list(self.records.items()):
            if name not in self.homes or self.homes[name] not in self.relays:
                at = self.deleted_at(service_of(record, self.counters.get(name)))
                if at is not None and time.time() >= at:
                    with contextlib.suppress(RelayError, Elsewhere):
                        self.settle(name)
        with contextlib.suppress(RelayError):
            super().delete_unused()

    def close(self):
        """Save, and give up what this relay is home to."""
        self.save()
        with contextlib.suppress(EngineError), self.changing:
            self._leave(self._broker.services())
            self.engine.run(LEAVE, self.id)

    def knows_caller(self, name, hashed):
        """Whether a digest is that of a key of a service, wherever its home is."""
        return bool(hashed) and '"%s"' % hashed in self.records.get(name, "")

    def silent_error(self):
        return RelayError("relay_busy", "The relay's engine, or the engine's replica, does not "
                          "answer. Try again in a few seconds.", retry_after=2)


# Forwarding.


class Peers:
    """Connections to the other relays. Thread-safe."""

    def __init__(self, secret):
        self.secret = secret
        self.members = frozenset()         # ids of the relays alive at the last beat
        self._tls = ssl.create_default_context()
        self._idle = defaultdict(deque)    # url -> (socket, since), newest last
        self._busy = defaultdict(dict)     # home -> {Forward: True}
        self._watched = set()              # homes with a thread of look_after
        self._lock = threading.Lock()      # guards both
        self._held = set()                 # exchanges that wait for a next home
        self._asked = {}                   # home -> (when, whether it answered)
        self._asking = defaultdict(threading.Lock)     # home -> held while it is asked

    def take(self, home):
        """Return a connection to a relay. Raises OSError."""
        idle = self._idle[url_of(home)]
        with contextlib.suppress(IndexError):
            while True:
                sock, since = idle.pop()
                if time.monotonic() - since < PEER_IDLE_SECONDS and not is_ready(
                        sock, selectors.EVENT_READ, 0):
                    return sock            # else the peer has closed it
                sock.close()
        return self._connect(home)

    def give_back(self, home, sock):
        """A response has been read to its end: the connection may be used again."""
        idle = self._idle[url_of(home)]
        if len(idle) < PEER_IDLE_MOST:
            idle.append((sock, time.monotonic()))
        else:
            sock.close()

    def close_idle(self, homes):
        """Close the connections that nothing uses to relays that may not come back."""
        for home in homes:
            idle = self._idle.pop(url_of(home), ())
            with contextlib.suppress(IndexError):      # another thread took the last one
                while idle:
                    idle.pop()[0].close()

    def _connect(self, home):
        parts = urllib.parse.urlsplit(url_of(home))
        port = parts.port or (443 if parts.scheme == "https" else 80)
        sock = socket.create_connection((parts.hostname, port), ENGINE_SECONDS)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        keep_alive(sock)
        if parts.scheme == "https":
            sock = self._tls.wrap_socket(sock, server_hostname=parts.hostname)
        return sock

    def answers(self, home):
        """Whether a relay that missed its beats is there all the same. Blocks up to a few
        seconds; for a while the answer stays the same."""
        with self._asking[home]:
            when, answer = self._asked.get(home, (-math.inf, False))
            if time.monotonic() - when > BEAT_SECONDS:
                answer = not self.trouble_with(home)
                self._asked[home] = time.monotonic(), answer
            return answer

    def trouble_with(self, home):
        """Ask a home's url who it is; return what is wrong with it, in words; "" if it is
        that relay. Blocks up to a few seconds."""
        return self._ask(home, b"")[0]

    def homes_of(self, home):
        """The services that another relay is surely home to, as it says: names in lower case.
        Blocks up to a few seconds."""
        trouble, answer = self._ask(home, b"?homes")
        return () if trouble else answer.get("homes", ())

    def _ask(self, home, query):
        """Return (what is wrong, the relay's answer)."""
        try:
            with contextlib.closing(self._connect(home)) as sock:
                sock.settimeout(ENGINE_SECONDS)
                sock.sendall(b"GET /healthz%s HTTP/1.0\r\nHost: localhost\r\nX-Relay: %s\r\n\r\n"
                             % (query, self.secret.encode()))
                data = b"".join(iter(lambda: sock.recv(4096), b""))
            answer = json.loads(data.partition(b"\r\n\r\n")[2])
            there = answer.get("relay", "") if data[9:12] != b"403" else None
        except ssl.SSLCertVerificationError as error:
            return "its certificate is not trusted here: %s" % error.verify_message, None
        except OSError as error:
            return "no answer: %s" % (getattr(error, "strerror", None) or error), None
        except (ValueError, AttributeError):
            return "something answers there, but not a relay", None
        if there is None:
            return "it has another secret", None
        return "" if there == home else "another relay answers there", answer

    @contextlib.contextmanager
    def holding(self, exchange):
        """Count an exchange as unanswered while it waits for a next home."""
        self._held.add(exchange)
        try:
            yield
        finally:
            self._held.discard(exchange)

    def started(self, forward):
        with self._lock:
            self._busy[forward.home][forward] = True

    def ended(self, forward):
        with self._lock:
            busy = self._busy[forward.home]
            busy.pop(forward, None)
            if not busy:                   # that relay may never be home again
                del self._busy[forward.home]

    def is_answering(self):
        """Whether a response is passed on, other than to a provider's poll, or a request
        waits to be."""
        return bool(self._held) or any(
            not forward.is_poll for forwards in list(self._busy.values())
            for forward in list(forwards))

    def abort_all(self):
        """This relay ends."""
        for forwards in list(self._busy.values()):
            for forward in list(forwards):
                forward.abort()

    def look_after(self, homes):
        """These relays missed their beats: abandon what was forwarded to those that do not
        answer. Returns at once."""
        for home in homes:
            with self._lock:
                if home in self._watched or not self._busy.get(home):
                    continue
                self._watched.add(home)
            threading.Thread(target=self._abandon, args=(home,), daemon=True).start()

    def _abandon(self, home):
        while self.answers(home):          # it is only cut off from the engine
            time.sleep(BEAT_SECONDS)
            with self._lock:
                if home in self.members or not self._busy.get(home):
                    return self._watched.discard(home)
        with self._lock:
            self._watched.discard(home)
            forwards = self._busy.pop(home, ())
        for forward in forwards:
            forward.abort()


def url_of(home):
    """The address of a relay, which is the second part of its id."""
    return home.partition("@")[2]


class Forward:
    """One request on its way to the home of its service, and its response back."""

    def __init__(self, exchange, peers, home):
        self.exchange, self.peers, self.home = exchange, peers, home
        self.connection = exchange.connection
        # A provider's polls have a connection of their own for as long as the provider's
        # lasts: the home takes its closing for the provider's end.
        self.is_poll = exchange.head.path[::2] == ("provider", "poll")
        self._lock = threading.Lock()      # abort must not close a socket that is pooled
        self._sock, self._aborted = None, False

    def run(self):
        """Forward the request, and pass the response on as it comes. Raises NotSent, if the
        home did not act on it; PeerGone, RelayError."""
        self.peers.started(self)           # a home that is frozen takes no large request
        if self.home not in self.exchange.relay.registry.relays:
            self.peers.look_after({self.home})         # it missed its beats before this
        self.connection.when_gone(self.abort)
        try:
            self._send(self._head(len(self.exchange.body)) + self.exchange.body)
            if len(self.exchange.body) > KEEP_BODY_BYTES:
                self.exchange.drop_body()  # the answer may take long
            self.exchange.body_room.close()
            self._pass_on(*self._read_head())
        except (OSError, ValueError):      # the home has gone, or the client
            if self.exchange.started or self.connection.gone:
                raise PeerGone() from None
            raise Moved() from None
        finally:
            self.peers.ended(self)
            self.connection.when_gone(None)
            sock = self._let_go()
            if sock is not None:
                sock.close()

    def abort(self):
        """Break the connection to the home, from any thread."""
        with self._lock:
            self._aborted = True
            if self._sock is not None:
                with contextlib.suppress(OSError):     # not SSLSocket's, for one thread only
                    socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    def _let_go(self):
        with self._lock:
            sock, self._sock = self._sock, None
            return sock

    def _head(self, length):
        """The request's head, for the home."""
        exchange, head = self.exchange, self.exchange.head
        lines = ["%s %s HTTP/1.%d" % (head.method, head.target, head.version),
                 "Host: localhost", "Content-Length: %d" % length,
                 "X-Relay: " + self.peers.secret,
                 "X-Relay-For: " + ("local" if exchange.local else exchange.address)]
        lines += ["%s: %s" % field for field in head.fields.items()
                  if field[0] not in HOP_BY_HOP and field[0] not in FORWARDED]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")

    def _send(self, data):
        for _ in range(2 + PEER_IDLE_MOST):
            try:
                self._sock = self._take()
            except OSError as error:
                raise NotSent(isinstance(error, ConnectionRefusedError)) from None
            if self._aborted:              # before there was a socket to break
                break
            try:
                self._sock.settimeout(self.exchange.limits.write_seconds)
                self._sock.sendall(data)
                return self._sock.settimeout(None)
            except ConnectionError:        # closed before it had all of this: try another
                self._let_go().close()
            except OSError:
                break
        if self.connection.gone:
            raise PeerGone()
        raise NotSent(False)

    def _take(self):
        if self.is_poll:
            home, sock = self.connection.__dict__.pop("upstream", ("", None))
            if home == self.home and not is_ready(sock, selectors.EVENT_READ, 0):
                return sock
            if sock is not None:
                sock.close()
        return self.peers.take(self.home)

    def _receive(self):
        data = self._sock.recv(65536)
        if not data:
            raise ConnectionError()
        return data

    def _read_head(self):
        """Return (head of the response, what has come of its body)."""
        data = self._receive()
        while b"\r\n\r\n" not in data:
            data += self._receive()
        head, _, rest = data.partition(b"\r\n\r\n")
        if NOT_HOME in head:
            raise NotSent(False)
        return head, rest

    def _pass_on(self, head, data):
        exchange, body = self.exchange, body_after(head, self.exchange.head)
        exchange.keep_alive = exchange.keep_alive and body.ends_itself
        lines = [line for line in head.split(b"\r\n") if line[:11].lower() != b"connection:"]
        lines += [] if exchange.keep_alive else [b"Connection: close"]
        ended = body.ends_with(data)
        data = b"\r\n".join(lines + [b"", data])
        exchange.started = True
        while True:
            if ended and body.ends_itself and b"\r\nConnection: close" not in head:
                self._give_back()
            self.connection.send(data)
            if ended:
                return
            try:
                data = self._receive()
            except ConnectionError:
                if body.ends_itself:
                    raise
                return
            ended = body.ends_with(data)

    def _give_back(self):
        """The response has been read: others may use the connection to the home."""
        sock, connection = self._let_go(), self.connection
        if sock is None or connection.gone:
            pass
        elif self.is_poll:
            connection.upstream = self.home, sock
            connection.on_close = functools.partial(close_upstream, connection)
        else:
            self.peers.give_back(self.home, sock)


def close_upstream(connection):
    """A provider's connection has closed: so does the one that carried its polls."""
    connection.__dict__.pop("upstream", ("", contextlib.ExitStack()))[1].close()


class CountedBody:
    """Finds the end of a response's body that passes in pieces."""

    def __init__(self, length):
        """length: in bytes; infinite if the connection ends with it."""
        self._left, self.ends_itself = length, length < math.inf

    def ends_with(self, data):
        """Whether the body ends with these next bytes."""
        self._left -= len(data)
        return self._left <= 0


class ChunkedBody:
    """The same for a chunked body (RFC 9112, 7.1)."""

    ends_itself = True

    def __init__(self):
        self._skip, self._line, self._last = 0, b"", False

    def ends_with(self, data):
        at = 0
        while at < len(data):
            if self._skip:
                step = min(self._skip, len(data) - at)
                self._skip, at = self._skip - step, at + step
                continue
            end = data.find(b"\n", at) + 1
            self._line += data[at:end or len(data)]
            if not end:
                return False
            line, self._line, at = self._line, b"", end
            if self._last:
                return True
            size = int(line.partition(b";")[0], 16)
            self._last, self._skip = size == 0, size and size + 2
        return False


def body_after(head, request):
    """Return the body that follows the head of a relay's response to a request."""
    status, fields = int(head[9:12]), head.lower()
    length = re.search(rb"\r\ncontent-length: (\d+)", fields)
    if request.method == "HEAD" or status in (204, 304):
        return CountedBody(0)
    if b"\r\ntransfer-encoding: chunked" in fields:
        return ChunkedBody()
    return CountedBody(int(length[1]) if length else math.inf)


# What takes the place of the relay's parts.


class ClusterExchange(HttpExchange):
    """An Exchange that may come from another relay, or have to go there."""

    body = None                            # as it was read, until its service is known
    body_dropped = False                   # it was read, and is not here any more
    body_room = None                       # the memory that is taken for it, to be closed
    caller_is_local = None                 # as the relay said that forwards it; None: none does
    comes_late = False                     # a prompt, to a relay that stops: see drain
    _local = False

    @property
    def local(self):
        return self._local if self.caller_is_local is None else self.caller_is_local

    @local.setter
    def local(self, local):
        self._local = local

    def _dispatch(self, head):
        relay, fields = self.relay, head.fields
        if "x-relay" in fields or "x-relay-for" in fields:
            try:
                caller = relay.caller_of(fields)
            except RelayError as error:
                return self._refuse_forwarded(error)
            self.caller_is_local = caller == "local"
            self.address = address_of_caller(caller)
        if head.path == ("healthz",):
            if self.caller_is_local is not None:
                return self.respond(200, relay.registry.introduction(
                    head.target.endswith("?homes")))
            if not relay.registry.born:
                raise relay.registry.silent_error()
            if self.broker.draining and head.target.endswith("?drain=404"):
                # HAProxy's word for a server that gets nothing new, and keeps what it has.
                raise RelayError("not_found", "The relay is shutting down.")
        self.comes_late = self.broker.draining and self.caller_is_local is None and (
            self._is_prompt() and time.monotonic() > self.broker.passes_on_until)
        try:
            self._answer_or_forward()
        except Moved:
            if self.caller_is_local is None or self.started:
                raise
            self._refuse_forwarded(Moved())          # forwarded once at most

    def _answer_or_forward(self):
        """Answer the request, here or by the home of its service. Raises Moved, RelayError."""
        registry, there = self.relay.registry, self._answer_here()
        forwarded = self.caller_is_local is not None
        if there is not None and there[1] is None and not self.comes_late:
            with self.relay.peers.holding(self):     # until the answers before it have ended
                registry.wait_to_give_up(there[0])
                if not forwarded:
                    return self._forward(there[0], registry.next_home(there[0]))
        elif there is not None and forwarded and not self.broker.draining and (
                registry.has_moved(*there)):
            there = self._answer_again()             # the other relay knew first
        if there is None:
            return
        if forwarded or self.comes_late:
            raise Moved()
        self._forward(*there)

    def _answer_here(self):
        """Answer the request if this relay is the home of its service, or becomes it. Else return
        the service's name, in lower case, and its home: the exception that says so would keep
        the parsed request in memory, thirty times its bytes, for as long as the answer takes."""
        try:
            return super()._dispatch(self.head)
        except Homeless as there:
            name = there.name
        except Elsewhere as there:
            return there.name, there.home
        self.release_large_body()          # to find a home may take seconds
        with BytesUnderWay(self) as count:
            count(len(self.body))
            home = self._home_after(name)
        return (name, home) if home is not None else self._answer_again()

    def _answer_again(self):
        """The same for a request that was not answered at the first attempt."""
        if self.head_slot is not None:     # another one is taken
            self.head_slot.release()
        return self._answer_here()

    def explain(self, error):
        if isinstance(error, EngineError):
            log("cannot_save", error=str(error))
            return self.relay.registry.silent_error()
        return super().explain(error)

    def _refuse_forwarded(self, error):
        """Answer a relay that takes this one for a home, or for one of its cluster."""
        self.keep_alive = self.keep_alive and self.body_read
        self.send_whole(*self.response(error.status, error.native(), error=error,
                                       more=NOT_HOME + b"\r\n"))

    def read_bytes(self, most, count):
        """Keep the body, in case it has to be forwarded."""
        if self.body is None:
            self.body = super().read_bytes(most, count)
        else:
            count(len(self.body))
        return self.body

    def take_slot(self, reserved):
        if not self.broker.draining or len(self.body or b"") > KEEP_BODY_BYTES:
            self.drop_body()               # this relay is the home
        super().take_slot(reserved)

    def drop(self, request):
        super().drop(request)
        if not self.broker.draining:       # else what it asks for may leave this relay
            self.drop_body()

    def drop_body(self):
        """The body is not needed here any more, or too large to be kept."""
        self.body, self.body_dropped = None, True

    def _forward(self, name, home):
        """Send the request to the home of a service, and its response to the client. If
        that relay is home no more, another is asked, or this one becomes home."""
        self.release_large_body()
        self.release_slot()
        with self._slot_for(name), contextlib.ExitStack() as self.body_room:
            if not self.body_dropped:
                self.read_bytes(None, self.body_room.enter_context(BytesUnderWay(self)))
                self.body_read = True
            for _ in range(3):
                if self.body_dropped or home is None:
                    break
                self.relay.registry.counts["forwarded"] += 1
                try:
                    return Forward(self, self.relay.peers, home).run()
                except NotSent as why:
                    refused = why.refused  # and no more of it: its frames have the body
                if self.body_dropped:
                    break
                home = self._home_after(name, home, refused)
                if home is None:
                    self.body_room.close()           # it is counted as it is read again
                    there = self._answer_again()     # it is at home here now
                    if there is None:
                        return
                    home = there[1]
        raise Moved()

    def _home_after(self, name, home=None, refused=False):
        """Return the home of a service, after one that did not act, if any; None: this relay.
        Blocks as settle does."""
        try:
            self.relay.registry.settle(name, home, refused)
        except Elsewhere as there:
            return there.home
        return None

    def _is_prompt(self):
        return self.head.method == "POST" and (
            self.head.path[:1] not in (("api",), ("provider",)))

    def _slot_for(self, name):
        """Take a slot here, too, for what waits at the home."""
        path = self.head.path
        if path[::2] != ("provider", "poll") and not self._is_prompt():
            return contextlib.nullcontext()
        return (self.bounds.polls if path[0] == "provider" else self.bounds.waiting).take(
            self.address, give_way=self.connection.abort,
            reserved=self.relay.registry.knows_caller(name, self.head.key_digest))


class ClusterDirectory(Directory):
    """A Directory of the services of all relays."""

    def __init__(self, broker, registry):
        super().__init__(broker, registry)
        self._others = {}                  # id of a relay -> (version, {name: entry})
        self._absent = {}                  # name -> (record, counters, entry), made once
        self._shared = None                # version of what was shared last

    def entries(self):
        """Those of the services at home, those that other relays share, and, of services
        that have no home, what is stored."""
        entries, registry, absent = super().entries(), self._registry, {}
        own = {entry["name"].lower() for entry in entries}
        for name, record in list(registry.records.items()):
            if name not in own:
                home = registry.homes.get(name)
                entry = self._others.get(home, ("", {}))[1].get(name)
                if entry is None:
                    absent[name] = self._absent_as(name, record, registry.counters.get(name))
                    entry = absent[name][2]
                entries.append(entry)
        self._absent = absent
        return entries

    def _absent_as(self, name, record, counters):
        known = self._absent.get(name, ())
        if known[:2] == (record, counters):
            return known
        return record, counters, self.entry(service_of(record, counters))

    def keep_sharing(self):
        """Share the entries with the other relays, and read theirs, in a twentieth of the
        processor's time; for a thread."""
        pause = DIRECTORY_SECONDS
        while not self._broker.closed:
            time.sleep(pause)
            began = time.thread_time()
            with contextlib.suppress(EngineError):
                self._share()
                self._read_others()
            took = time.thread_time() - began
            pause = min(max(DIRECTORY_SECONDS, DIRECTORY_SHARE * took), MEMBER_SECONDS)

    def _share(self):
        registry = self._registry
        key = KEY + "directory:" + registry.id
        body = json.dumps(super().entries())
        version = hashlib.sha256(body.encode()).hexdigest()[:16]
        if version != self._shared and registry.id:
            registry.engine.call("HSET", key, "version", version, "entries", body)
        self._shared = version
        if not registry.engine.call("PEXPIRE", key, int(5000 * MEMBER_SECONDS)):
            self._shared = None            # the engine has lost it

    def _read_others(self):
        registry = self._registry
        others = {home: self._others.get(home, ("", {}))
                  for home in registry.relays if home != registry.id}
        for home, (version, _) in others.items():
            key = KEY + "directory:" + home
            new = registry.engine.call("HGET", key, "version")
            if new and new != version:
                entries = json.loads(registry.engine.call("HGET", key, "entries") or "[]")
                others[home] = new, {entry["name"].lower(): entry for entry in entries}
        self._others = others


class ClusterRelay(Relay):
    """A Relay that shares its services with others on one engine."""

    exchange_type = ClusterExchange

    def __init__(self, host="", port=0, *, engine, secret, advertise=None, limits=None,
                 registration="open", store=None, **more):
        """engine: an Engine. secret: what the relays know each other by. advertise: the url
        at which the others reach this one; by default its own."""
        broker = ClusterBroker(limits)
        self.peers = Peers(secret)
        registry = EngineRegistry(engine, broker, registration, self.peers, secret)
        super().__init__(host, port, limits=broker.limits, broker=broker, registry=registry,
                         **more)
        registry.url, registry.large_bodies = advertise or self.url, self.bounds.large_bodies
        self.directory = ClusterDirectory(broker, registry)
        self.bounds.registrations = EngineRates(engine, "registrations:")
        self.bounds.wrong_keys = EngineRates(engine, "wrong keys:")
        self._peer_addresses = {}          # id of a relay -> addresses

    def start(self):
        self.registry.follow()             # the first requests find it joined
        super().start()
        for target in (self.directory.keep_sharing, self._keep_meeting,
                       self.registry.keep_asking):
            threading.Thread(target=self._keep_running, args=(target,), daemon=True).start()

    def _keep_meeting(self):
        """Know the addresses that other relays come from, and say which relay cannot be
        reached where it advertises, this one included; for a thread."""
        met, troubles = set(), {}
        while not self.broker.closed:
            for home in set(self._peer_addresses) - self.registry.relays:
                del self._peer_addresses[home]       # it may come back from elsewhere
            for home in self.registry.relays - set(self._peer_addresses):
                host = urllib.parse.urlsplit(url_of(home)).hostname
                with contextlib.suppress(OSError):
                    self._peer_addresses[home] = {
                        ip_of(found[4][0]) for found in socket.getaddrinfo(host, None)}
            for home in self.registry.relays - met:
                trouble = self.peers.trouble_with(home)
                if not trouble:
                    met.add(home)
                elif troubles.get(home) == trouble:    # twice: it is not just starting
                    met.add(home)
                    own = home == self.registry.id
                    log("relay_unreachable", url=url_of(home), error=trouble, meaning=(
                        "the others may not reach this relay: see --advertise") if own else
                        "its services are not answered here")
                troubles[home] = trouble
            time.sleep(BEAT_SECONDS)

    def is_proxy(self, address):
        """Other relays may have many connections, too; on loopback everybody may."""
        ip = ip_of(address)
        return super().is_proxy(address) or not ip.is_loopback and any(
            ip in addresses for addresses in list(self._peer_addresses.values()))

    def forwarded_for(self, head, peer):
        if "x-relay" in head.fields:
            return address_of_caller(self.caller_of(head.fields))
        return super().forwarded_for(head, peer) if super().is_proxy(peer) else peer

    def caller_of(self, fields):
        """The caller that another relay forwards for: an address, or "local". Raises
        RelayError if that relay does not have our secret."""
        secret = fields.get("x-relay", "").encode("latin-1")
        if not hmac.compare_digest(secret, self.peers.secret.encode()):
            raise RelayError("forbidden", "X-Relay and X-Relay-For are for relays of one "
                             "cluster, which share a secret.")
        return fields.get("x-relay-for", "")


def address_of_caller(caller):
    """Whose limits count for what another relay forwards."""
    return "127.0.0.1" if caller in ("local", "") else caller


# Options, checks and commands; the command line, below, calls these.


def add_cluster_options(add):
    """Add the options for several relays."""
    add("--engine", metavar="URL",
        help="several relays: Valkey or Redis, redis://HOST, rediss://HOST with TLS, or "
             "unix:///PATH; its password may be in " + PASSWORD_VARIABLE)
    add("--advertise", metavar="URL",
        help="with --engine: where the other relays reach this one, http://10.0.0.1:8000; "
             "use https or a private network")
    add("--cluster-secret-file", metavar="FILE",
        help="with --engine: a secret that all relays share; or in " + SECRET_VARIABLE)


def cluster_secret(options):
    """Return the secret that the relays share. Raises StoreError."""
    secret = os.environ.get(SECRET_VARIABLE, "")
    if options.cluster_secret_file:
        try:
            with open(options.cluster_secret_file, encoding="utf-8") as file:
                secret = file.read()
        except (OSError, ValueError) as error:
            raise StoreError("--cluster-secret-file %s cannot be read: %s." % (
                options.cluster_secret_file, getattr(error, "strerror", None) or error))
    secret = secret.strip()
    if len(secret) < MIN_SECRET or not re.match(r"[\x21-\x7e]*\Z", secret):
        raise StoreError("Several relays share a secret of at least %d letters and digits: "
                         "write it with openssl rand -hex 32 > FILE, and name the file with "
                         "--cluster-secret-file." % MIN_SECRET)
    return secret


def refuse_half_a_cluster(parser, options):
    """Exit if options say both that there are several relays, and that there is one."""
    if not options.engine and (options.advertise or options.cluster_secret_file):
        parser.error("--advertise and --cluster-secret-file are for several relays, which "
                     "share an --engine")
    if options.engine and options.demo:
        parser.error("--demo is one relay, without an --engine")
    if options.engine and options.data != parser.get_default("data"):
        parser.error("with --engine there is no --data file; the command import takes one in")


def advertised(options):
    """Return the url at which the other relays reach this one. Raises StoreError."""
    match = re.match(r"(https?://[A-Za-z0-9.:_\[\]-]+?)/?\Z", options.advertise or "")
    if not match:
        raise StoreError("--engine needs --advertise URL: where the other relays reach this "
                         "one, as http://10.0.0.1:%d." % options.port)
    return match[1]


def open_cluster_relay(options, **more):
    """Return the ClusterRelay that the options describe. Raises StoreError."""
    return ClusterRelay(options.host, options.port, engine=Engine(options.engine),
                        secret=cluster_secret(options), advertise=advertised(options), **more)


def check_engine(options):
    """Whether the engine answers and accepts writes."""
    try:
        engine = Engine(options.engine)
        info = dict(line.split(":", 1) for line in engine.call("INFO").splitlines()
                    if ":" in line)
        seconds, _ = engine.call("TIME")
        policy = engine_setting(engine, "maxmemory-policy")
        keeps = engine_setting(engine, "appendonly")
    except (StoreError, EngineError, ValueError) as error:
        return "error", str(error)
    version = info.get("valkey_version") or info.get("redis_version", "0")
    words = "The engine %s is %s %s" % (
        engine.shown, "Valkey" if "valkey_version" in info else "Redis", version)
    if int(version.split(".")[0]) < 5:
        return "error", words + ": version 5 or newer is needed, which has streams."
    if abs(int(seconds) - time.time()) > 2:
        return "error", words + (". Its clock differs from this machine's by %d s: set both "
                                 "(timedatectl set-ntp true)." % (int(seconds) - time.time()))
    if policy not in ("noeviction", None):
        return "error", words + (", and may drop services when its memory is full: set "
                                 "maxmemory-policy noeviction, not %s." % policy)
    if keeps == "no":
        return "warning", words + (", and forgets services when it restarts: set appendonly "
                                   "yes, as deploy/valkey.conf does.")
    if policy is None:
        return "warning", words + (". It does not show its settings: they should be "
                                   "maxmemory-policy noeviction and appendonly yes.")
    return "ok", words + ", answers, evicts nothing, and persists."


def engine_setting(engine, name):
    """One of the engine's settings; None if it does not show them."""
    try:
        return engine.call("CONFIG", "GET", name)[1]
    except (EngineError, IndexError):
        return None


def check_peers(options):
    """Whether each relay of the cluster answers at its address, with the same secret."""
    try:
        own, peers = advertised(options), Peers(cluster_secret(options))
        homes = Engine(options.engine).call("SMEMBERS", KEY + "relays")
    except (StoreError, EngineError) as error:
        return "error", str(error)
    troubles = {home: peers.trouble_with(home) for home in sorted(homes)}
    silent = ["%s (%s)" % (url_of(home), trouble)
              for home, trouble in troubles.items() if trouble]
    if silent:
        return "error", ("Not all relays answer here: %s. Each must reach the others at what "
                         "they --advertise." % printable(", ".join(silent), 1000))
    if own not in map(url_of, homes):
        return "ok", ("Relays that answer, with the same secret: %d. None runs at %s now."
                      % (len(homes), own))
    return "ok", "Relays that answer, with the same secret: %d, one of them at %s." % (
        len(homes), own)


def check_secret_file(options):
    """Whether the secret is one, and private."""
    try:
        cluster_secret(options)
        path = options.cluster_secret_file
        if path and os.name != "nt" and os.stat(path).st_mode & 0o077:
            return "warning", "Other users may read or write %s: chmod 600 %s" % (path, path)
    except StoreError as error:
        return "error", str(error)
    return "ok", "The cluster's secret is there."


CLUSTER_CHECKS = (check_engine, check_secret_file, check_peers)


def run_import(options):
    """Take the services of a data file into the engine."""
    if not options.engine:
        raise StoreError("import takes a data file into an engine: name it with --engine.")
    path = options.arguments[0]
    if not os.path.isfile(path):
        raise StoreError("There is no data file %s." % path)
    with contextlib.closing(Store(path, existing=True)) as file:
        if file.version < len(MIGRATIONS):
            raise StoreError("The data file %s comes from an older neuroengine: start a relay "
                             "with it once." % path)
        known = EngineStore(Engine(options.engine)).take_in(file)
        count = len(file.load()) - len(known)
    print("Imported %d services from %s.%s" % (count, path, known and (
        " Those that the engine has already stay as they are: %s." % ", ".join(known)) or ""))


##############################################################################
# Demo: a provider inside the relay, after Joseph Weizenbaum's Eliza (1966)
##############################################################################

# Only --demo uses it. It is also the shortest complete provider to read.

ELIZA = (  # (pattern, answer); {} is the rest of the prompt, as seen from the other side
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
MIRRORED = {"i": "you", "me": "you", "my": "your", "am": "are", "mine": "yours",
            "you": "I", "your": "my", "are": "am", "myself": "yourself"}


def eliza(prompt):
    """Return the answer to a prompt, as a list of words with the spaces after them."""
    for pattern, answer in ELIZA:
        match = re.search(pattern, prompt, re.I)
        if match:
            break
    rest = match.group(1).strip(" .!?\n") if match.groups() else ""
    rest = " ".join(MIRRORED.get(word.lower(), word) for word in rest.split())
    return re.findall(r"\S+\s*|\s+", answer.format(rest, rest))


def prompt_of(request):
    """Return the text to answer: the prompt of a request, or its last message."""
    messages = request.get("messages") or [{}]
    prompt = (request.get("message") or request.get("prompt")
              or messages[-1].get("content") or "")
    return prompt if isinstance(prompt, str) else ""


class DemoProvider:
    """A provider of a service in this process, with a thread for each answer."""

    def __init__(self, broker, service, pause=0.04):
        """pause: seconds between two words."""
        self._broker, self._service, self._pause = broker, service, pause
        self._session = broker.login(service, workers=8)
        self._running = {}            # (job id, attempt) -> Event that cancels it

    def run(self):
        """Poll until the relay drains."""
        while not self._broker.draining:
            with contextlib.suppress(RelayError):
                self._take(*self._broker.poll(self._service, self._session, Poll(),
                                              list(self._running)))

    def _take(self, offers, cancels):
        for lease in cancels:
            if lease in self._running:
                self._running[lease].set()
        for job, attempt, at, _ in offers:
            cancelled = self._running[job.id, attempt] = threading.Event()
            threading.Thread(target=self._answer, args=(job, attempt, at, cancelled),
                             daemon=True).start()

    def _answer(self, job, attempt, at, cancelled):
        for word in eliza(prompt_of(json.loads(job.payload))):
            if cancelled.wait(self._pause):
                break
            self._push(job=job.id, attempt=attempt, at=at, items=[word])
            at += 1
        self._push(job=job.id, attempt=attempt, at=at, items=[], done=True)
        self._running.pop((job.id, attempt), None)

    def _push(self, **entry):
        with contextlib.suppress(RelayError):
            _, offers, cancels = self._broker.push(self._service, self._session, [entry])
            self._take(offers, cancels)


def start_demo(relay):
    """Add the service Eliza to a relay, with its provider; returns at once."""
    service = Service("Eliza", "", "neuroengine", "A demo that needs no model",
                      time.time())
    relay.broker.add(service)
    threading.Thread(target=DemoProvider(relay.broker, service).run, daemon=True).start()


##############################################################################
# Command line: options, relay process, doctor, commands on the data file
##############################################################################

# It starts and ends everything above. Each mistake is answered in one sentence that says
# what to do. Exit status: 0, 1 for trouble, 2 for a command line that makes no sense.

EARLIEST_TIME = 1767225600       # 2026: a clock that shows less is wrong
OTHER_DESCRIPTORS = 64           # open files that are not connections
MIN_FREE_MIB = 50                # on the disk with the data file
STACK_BYTES = 256 * 1024         # of a thread; the system's usual 8 MiB add up
REGISTRATION = ("open", "invited", "closed")
MAX_USES = 10**9                 # of an invitation
SQLITE_HEAD = b"SQLite format 3\0"
DATA_SUFFIXES = ("", "-wal", "-shm")    # of a data file and what SQLite keeps next to it
# Commands of neuroengine.py, which people look for here.
CLIENT_COMMANDS = ("ask", "chat", "models", "register", "share", "keys", "describe", "rename",
                   "new-key", "unregister")
# What other programs call our options.
ELSEWHERE = {"--bind": "--host", "--address": "--host", "--listen": "--host", "--ssl": "--cert",
             "--https": "--cert", "--ssl-certfile": "--cert", "--ssl-keyfile": "--key",
             "--db": "--data", "--database": "--data"}
LIMIT_GROUPS = {"capacity": "limits of the relay", "callers": "limits per caller",
                "more": "more limits"}


# Values of options. Each function raises ArgumentTypeError with words.


def bad_value(words):
    """Return the error that the parser shows as "--option: words"."""
    return argparse.ArgumentTypeError(words)


def number_of(text, kind):
    """Return int(text) or float(text), or None if that is not a number."""
    try:
        return kind(text)
    except ValueError:
        return None


def count_option(text):
    """A number of things, at least 1."""
    number = number_of(text, int)
    if number is None or number < 1:
        raise bad_value("a whole number of at least 1 is needed, not %s" % printable(text, 40))
    return number


def duration_option(text):
    """A length of time; also for days."""
    number = number_of(text, float)
    if number is None or not 0 <= number < 10**9:
        raise bad_value("a number of at least 0 is needed, not %s" % printable(text, 40))
    return number


def port_option(text):
    """A TCP port."""
    number = number_of(text, int)
    if number is None or not 0 <= number <= 65535:
        raise bad_value("a port is a number from 0 to 65535, not %s" % printable(text, 40))
    return number


def network_option(text):
    """An IP address or network."""
    try:
        return ipaddress.ip_network(text)
    except ValueError as error:
        raise bad_value("an address (10.0.0.1) or network (10.0.0.0/8) is needed: %s" % error)


def limit_type(name):
    """The function that reads a limit's value: durations may be 0, and numbers that turn
    something off."""
    if name.endswith(("_seconds", "_days")):
        return duration_option
    return whole_option if name == "max_conversations" else count_option


def whole_option(text):
    """A whole number, or 0."""
    return 0 if text == "0" else count_option(text)


# The parser.


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter,
                    argparse.RawDescriptionHelpFormatter):
    """Shows each option's default, if it has one, and the table of commands as it is."""

    def _get_help_string(self, action):
        if action.default in (None, "", []) or action.default is False:
            return action.help
        return super()._get_help_string(action)


def close_matches(word, words, count):
    """The words that somebody may have meant, best first."""
    import difflib                         # only for mistakes: kept out of the start-up
    return difflib.get_close_matches(word, words, count, 0.7)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence in place of the whole usage."""

    def error(self, message):
        """Print one sentence and exit with status 2."""
        message = re.sub(r"^argument (\S+?): expected one argument", r"\1 needs a value",
                         message)
        message = re.sub(r"^argument (\S+?):", r"\1:", message)
        self.exit(2, "%s: %s\n" % (self.prog, message))


class HelpAll(argparse.Action):
    """The option --help-all."""

    def __call__(self, parser, *_):
        build_parser(everything=True).print_help()
        parser.exit()


def how_to_run(file="neuroengine_server.py"):
    """How to run one of our two programs here: pip installs them as commands."""
    if re.search(r"[\\/](site|dist)-packages[\\/]", __file__):
        return file[:-3].replace("_", "-")
    return "%s %s" % ("py" if os.name == "nt" else "python3", file)


def build_parser(everything=False):
    """Return the parser. everything: its help shows all limits, not only two groups."""
    rows = "".join("  %-10s %-11s%s\n" % (name, argument, text)
                   for name, (_, argument, text) in COMMANDS.items())
    parser = Parser(
        prog=how_to_run().split()[-1], formatter_class=HelpFormatter,
        usage="%(prog)s [options] [COMMAND] [ARGUMENT]",
        description="The neuroengine relay: people share a locally hosted LLM through it.\n"
                    "Try it: %s --demo" % how_to_run(),
        epilog="commands; they work on the data file, also while the relay runs:\n" + rows)
    parser.add_argument("words", nargs="*", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--help-all", action=HelpAll, nargs=0, default=argparse.SUPPRESS,
                        help="show this, with all limits, and exit")
    add_network_options(parser)
    add_other_options(parser)
    for group, title in LIMIT_GROUPS.items():
        shown = everything or group != "more"
        section = parser.add_argument_group(title) if shown else parser
        for name, default, of_group, text in LIMITS:
            if of_group == group:
                section.add_argument(
                    "--" + name.replace("_", "-"), default=default, metavar="N",
                    type=limit_type(name), help=text if shown else argparse.SUPPRESS)
    return parser


def add_network_options(parser):
    """Add the options that say where and how the relay listens."""
    add = parser.add_argument
    add("--host", default="", help="address to listen on; empty for all")
    add("--port", type=port_option, default=8000, help="port to listen on; 0 for any free one")
    add("--tls", choices=("auto", "off"), default="auto",
        help="auto: with --cert, or self-signed on ports 443 and 8443; off: plain HTTP, "
             "for a relay behind a proxy that does TLS")
    add("--cert", metavar="FILE", help="certificate chain in PEM, for TLS")
    add("--key", metavar="FILE", help="its private key in PEM, if not in the same file")
    add("--acme-webroot", metavar="DIR",
        help="certbot's webroot, so that it can renew while the relay runs")
    add("--acme-port", type=port_option, default=80, metavar="PORT",
        help="with --acme-webroot and TLS: plain HTTP for certbot; browsers are sent on "
             "to https")
    add("--trusted-proxy", type=network_option, action="append", default=[], metavar="ADDRESS",
        help="believe X-Forwarded-For of this address or network; may be repeated")
    add("--trusted-hops", type=count_option, default=1, metavar="N",
        help="number of such proxies in a row")
    add("--allow-host", action="append", default=[], metavar="NAME",
        help="answer only to this name and to localhost; may be repeated; otherwise to "
             "any, or to localhost if --host is a loopback address")


def add_other_options(parser):
    """Add the options on data, registration, log and commands."""
    add = parser.add_argument
    add("--data", default="neuroengine.sqlite3", metavar="FILE",
        help="file for services, hashes of keys, and counters")
    add("--registration", choices=REGISTRATION, default="open",
        help="who may register a service: everyone, people with an invitation, nobody")
    add_cluster_options(add)
    add("--log", choices=("text", "json"), default="text", help="format of log lines")
    add("--demo", action="store_true",
        help="loopback only, nothing on disk, and a built-in service Eliza")
    add("--unused-since", type=duration_option, metavar="DAYS",
        help="delete: only services without a provider for that many days")
    add("--yes", action="store_true", help="delete: do not ask for confirmation")
    add("--version", action="version", version="neuroengine " + __version__)


def parse(argv):
    """Return the options of a command line (None: this process's). Exits, with one
    sentence, if they make no sense."""
    parser = build_parser()
    argv = sys.argv[1:] if argv is None else argv
    refuse_unknown_options(parser, argv)
    if not {"-h", "--help"}.isdisjoint(argv):
        show_help_of_command(parser, argv)
    options = parser.parse_intermixed_args(argv)
    options.command, options.arguments = (options.words or [None])[0], options.words[1:]
    refuse_wrong_command(parser, options)
    refuse_idle_options(parser, options)
    refuse_half_a_cluster(parser, options)
    if options.demo:
        options.data, options.host = ":memory:", options.host or "127.0.0.1"
    if options.engine:
        options.data = ":memory:"
    return options


def show_help_of_command(parser, argv):
    """Print what a command does, and exit; return if the command line names none."""
    for name in COMMANDS.keys() & set(argv):
        _, argument, text = COMMANDS[name]
        own = "--unused-since DAYS, --yes, " if name == "delete" else ""
        print("usage: %s [options]\n\n%s.\n\nOptions: %s--data FILE, or --engine URL for several "
              "relays; see %s --help" % (" ".join(filter(None, (parser.prog, name, argument))),
                                         text[0].upper() + text[1:], own, parser.prog))
        parser.exit()


def refuse_unknown_options(parser, argv):
    """Exit if there is an option that does not exist. argparse would complain first about
    its value, which it takes for a command."""
    known = [name for action in parser._actions for name in action.option_strings]
    for word in itertools.takewhile(lambda word: word != "--", map(str, argv)):
        name = word.partition("=")[0]
        if not re.match(r"-[^\d.]", word) or any(other.startswith(name) for other in known):
            continue
        close = [ELSEWHERE[name]] if name in ELSEWHERE else close_matches(
            "--" + name.lstrip("-"), known, 1)
        parser.error("unknown option %s; %s" % (printable(name, 60), (
            "did you mean %s?" % close[0]) if close else "see --help and --help-all"))


def refuse_wrong_command(parser, options):
    """Exit if there is no such command, or if it gets what it does not take."""
    name, given = options.command, len(options.arguments)
    if name == "help":
        parser.print_help()
        parser.exit()
    if name is not None and name not in COMMANDS:
        close = close_matches(name, COMMANDS, 1)
        parser.error("unknown command %s; %s" % (printable(name, 60), (
            "did you mean --port %s?" % name) if name.isdigit() else (
            "the client has it: %s %s" % (how_to_run("neuroengine.py"), name)) if (
                name in CLIENT_COMMANDS) else (
            "the relay starts without one") if name in ("start", "run", "serve") else (
            "did you mean %s?" % close[0]) if close else "--help lists them"))
    takes = COMMANDS[name][1] if name else ""
    if given > (math.inf if takes.endswith("...") else bool(takes)):
        parser.error("%s takes %s" % (name, "one argument: " + takes.strip("[]") if takes
                                      else "no argument"))
    if takes.isalpha() and not given:
        parser.error("%s needs an argument: %s %s" % (name, name, takes))
    if name != "delete" and (options.yes or options.unused_since is not None):
        parser.error("--unused-since and --yes belong to the command delete")
    if name == "delete" and not given and options.unused_since is None:
        parser.error("delete needs a name or pattern, or --unused-since DAYS")


def refuse_idle_options(parser, options):
    """Exit if an option would have no effect."""
    if options.demo and options.data != parser.get_default("data"):
        parser.error("--demo keeps nothing on disk: leave --data out")
    if options.trusted_hops != 1 and not options.trusted_proxy:
        parser.error("--trusted-hops needs the --trusted-proxy whose X-Forwarded-For to believe")
    if options.acme_port != parser.get_default("acme_port") and not options.acme_webroot:
        parser.error("--acme-port needs --acme-webroot DIR, certbot's folder")


# One relay per data file.


class DataLock:
    """A lock on a data file that ends with the process that has it, however it ends.

    Two relays on one file would each allow the full quota, overwrite the other's counters,
    and send polled streams twice. Commands do not take it: they work beside a relay. It is
    on a separate file, FILE.lock, as SQLite has its own locks on the data file. The file
    stays: if it were removed, two relays could each lock an inode of that name.
    Use it as a context manager, which raises StoreError.
    """

    WAIT_SECONDS = 1.0           # longer than holder() keeps the lock

    def __init__(self, data):
        """data: the path of the data file; ":memory:" needs no lock."""
        self.data = data
        self._path = None if data == ":memory:" else os.path.realpath(data) + ".lock"
        self._file = None

    def __enter__(self):
        try:
            if self._path is not None:
                self._take()
        except OSError as error:
            raise StoreError("The data file %s cannot be used (%s: %s). Name another file "
                             "with --data." % (self.data, self._path, error.strerror))
        return self

    def _take(self):
        refuse_other_file(self.data)             # nothing must be left next to it
        self._file = open_private(self._path, os.O_RDWR)
        keep_owner(self._path, self.data)
        deadline = time.monotonic() + self.WAIT_SECONDS
        while not lock_file(self._file):
            if time.monotonic() > deadline:
                self.__exit__()
                raise StoreError("%s uses the data file %s: stop it, or name another file "
                                 "with --data." % (self.name(self.holder()), self.data))
            time.sleep(0.02)
        with contextlib.suppress(OSError):       # on a full disk it stays unknown
            os.ftruncate(self._file, 0)
            os.write(self._file, b"%d\n" % os.getpid())

    def __exit__(self, *_):
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def holder(self):
        """Return the process id of the relay that has the lock (0: unknown), or None."""
        try:
            file = os.open(self._path, os.O_RDWR)
        except (OSError, TypeError):     # no relay has run, not our file, or no lock at all
            return None
        try:
            if lock_file(file):
                return None
            return number_of(os.read(file, 20), int) or 0
        finally:
            os.close(file)

    @staticmethod
    def name(holder):
        """What to call the process that holder() found."""
        return "A relay (process %d)" % holder if holder else "Another relay"


def refuse_other_file(path):
    """Raise StoreError if the data file's path is that of a folder, or of another file."""
    if os.path.isdir(path):
        raise StoreError("%s is a folder: name a file in it with --data." % path)
    if os.path.exists(path):
        with open(path, "rb") as file:
            head = file.read(len(SQLITE_HEAD))
        if head and head != SQLITE_HEAD:
            raise StoreError("%s is not a data file of neuroengine: name another with --data, "
                             "or put a backup in its place." % path)


def lock_file(file):
    """Lock an open file for this process, without waiting; return whether that worked.
    The system releases the lock when the file is closed or the process ends."""
    try:
        import fcntl
    except ImportError:          # Windows, where a locked byte cannot be read by others
        import msvcrt
        os.lseek(file, 1 << 20, os.SEEK_SET)
        try:
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        finally:
            os.lseek(file, 0, os.SEEK_SET)
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def open_private(path, flags):
    """Open a file as os.open does; create it, for its owner alone, if it does not exist.
    A symbolic link is not followed: in a folder of another user it could lead anywhere."""
    return os.open(path, flags | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
                   | getattr(os, "O_BINARY", 0), 0o600)


def keep_owner(path, data):
    """Give a new file the owner of the data file, or of its folder: root may run commands
    for a relay that runs as another user."""
    model = data if os.path.exists(data) else os.path.dirname(os.path.abspath(data))
    with contextlib.suppress(AttributeError, OSError):       # Windows has no chown
        stat = os.stat(model)
        os.chown(path, stat.st_uid, stat.st_gid, follow_symlinks=False)


# The relay that the options describe.


def read_page():
    """Return the bytes of chat.html next to this file, or None.

    Comments, indentation, most ends of lines, and a `;` that ends a block are for those who
    read the file: without them the page is an eighth shorter. A comment behind code has two spaces
    before it and no quotes. In a template literal, indented lines hold words between
    spaces, and none of the signs below stands where a line ends or the next begins.
    """
    page = read_beside("chat.html")
    comment = rb"^\t*(?://[^\n]*|/\*(?:(?!\*/).)*\*/)\n|  // [^\n\"'`]*$"
    page = page and re.sub(rb"(?ms)" + comment, b"", page)
    page = page and re.sub(
        rb";\n\t*(?=})|(?<=[,({])\n+\t+|(?<=[;}])\n+\t*|\n\t+(?=[.?:})\]&|+])|(?<=\n)\n*\t*",
        b"", page)
    return page and re.sub(rb"(?s)(?<=<style>).*(?=</style>)", lambda style: re.sub(
        rb"(?<=[:;,{}])\s+|;?\s+(?=[{}])", b"", style.group()), page)


def data_directory(options):
    """Return the folder of the data file."""
    return os.path.dirname(os.path.abspath(options.data))


def certificate_files(options, make=True):
    """Return the files (cert, key) that the options ask for, or None for plain HTTP.

    make: create a self-signed pair if needed. Raises StoreError.
    """
    if options.tls == "off" and options.cert or options.key and not options.cert:
        raise StoreError("TLS needs --cert and --key together, and no --tls off.")
    if options.cert:
        return options.cert, options.key or options.cert
    if options.tls == "off" or options.port not in (443, 8443) or options.demo:
        return None
    return self_signed(data_directory(options), make, names_to_cover(options))


def names_to_cover(options):
    """The names that a self-signed certificate is to have besides own_names()."""
    return [name for name in (*options.allow_host, options.host)
            if name not in ("", "0.0.0.0", "::")]


def choose_tls(options):
    """Return the Certificate that the options ask for, or None. Raises StoreError."""
    files = certificate_files(options)
    try:
        return files and Certificate(*files)
    except (OSError, ValueError) as error:
        raise StoreError(cannot_use(files, error))


def cannot_use(files, error):
    """Say why a certificate and its key cannot be used."""
    why = str(getattr(error, "reason", None) or getattr(error, "strerror", None)
              or error).lower().replace("_", " ")
    (cert, no_cert), (key, no_key) = (what_is_in(file) for file in files)
    if "mismatch" in why:
        why = "the key belongs to another certificate"
    if "key" in cert and "certificate" in key and files[0] != files[1]:
        why = "they are swapped: --cert names the key, and --key the certificate"
    elif "certificate" not in cert:
        why = "%s %s" % (files[0], no_cert or "holds no certificate in PEM format")
    elif "key" not in key and files[0] == files[1]:
        why = "that file holds no key: name its file with --key"
    elif "key" not in key:
        why = "%s %s" % (files[1], no_key or "holds no private key in PEM format")
    elif "encrypted" in key:
        why = "the key has a pass phrase. `openssl pkey -in %s -out NEW` removes it" % files[1]
    pair = " with the key ".join(dict.fromkeys(files))     # one name, if they are one file
    return "The certificate %s cannot be used: %s." % (pair, why)


def what_is_in(path):
    """(the kinds of PEM in a file: "certificate", "key", "encrypted"; why it holds none)."""
    try:
        with open(path, "rb") as file:
            data = file.read(1 << 20)
    except OSError as error:
        return (), "cannot be read (%s)" % error.strerror
    if data[:2] == b"\x30\x82":
        return (), "is in DER format: `openssl x509 -inform der` turns it into PEM"
    return [kind for pattern, kind in (
        (b"-----BEGIN (TRUSTED )?CERTIFICATE", "certificate"),
        (b"-----BEGIN [A-Z ]*PRIVATE KEY", "key"),
        (b"-----BEGIN ENCRYPTED|Proc-Type: 4,ENCRYPTED", "encrypted"))
        if re.search(pattern, data)], ""


def limits_of(options):
    """Return the Limits that the options describe; those that depend on others fit them."""
    limits = Limits(**{name: getattr(options, name) for name, *_ in LIMITS})
    # A provider must not seem to be silent while the relay holds its poll.
    limits.busy_poll_seconds = min(limits.busy_poll_seconds, limits.lease_seconds / 3)
    # What one stranger may have of the memory for bodies, see Bounds.
    limits.max_request_bytes = min(limits.max_request_bytes, limits.max_held_bytes * 9 // 40)
    most, wanted = limits.max_connections * 24 // 25, limits.max_polls + limits.max_waiting
    if wanted > most:
        limits.max_polls = max(1, limits.max_polls * most // wanted)
        limits.max_waiting = max(1, limits.max_waiting * most // wanted)
    return limits


def open_relay(options):
    """Return the Relay that the options describe; it listens but does not serve yet.

    The caller has the DataLock. Raises StoreError, or OSError if it cannot listen.
    """
    limits = limits_of(options)
    listeners = inherited_listeners()
    if listeners:
        options.port = listeners[0].getsockname()[1]
    tls, plain = choose_tls(options), None
    if tls and options.acme_webroot:
        plain = listeners[1] if listeners[1:] else listen_plain(options)
    described = dict(
        limits=limits, tls=tls, page=read_page(), registration=options.registration,
        proxies=options.trusted_proxy, hops=options.trusted_hops, names=options.allow_host,
        webroot=options.acme_webroot, plain=plain,
        listener=listeners[0] if listeners else None)
    if options.engine:
        return open_cluster_relay(options, **described)
    return Relay(options.host, options.port, store=Store(options.data), **described)


def inherited_listeners():
    """Return the sockets that systemd listens on for this process (sd_listen_fds(3));
    with them a restart refuses no connection."""
    count = 0
    if os.environ.get("LISTEN_PID") == str(os.getpid()):
        count = int(os.environ.get("LISTEN_FDS", "0"))
    return [socket.socket(fileno=3 + number) for number in range(count)]


def listen_plain(options):
    """Return a listening socket for certbot's challenges; None, with a warning, if the
    port is not available."""
    try:
        if options.host:
            return socket.create_server((options.host, options.acme_port))
        dual = socket.has_dualstack_ipv6()
        return socket.create_server(("", options.acme_port), dualstack_ipv6=dual,
                                    family=socket.AF_INET6 if dual else socket.AF_INET)
    except OSError as error:
        say("warning: cannot listen on port %d for certbot: %s." % (
            options.acme_port, error.strerror or error), sys.stderr)
        return None


def port_is_taken(error):
    """Whether an OSError of listening means that another program has the port."""
    return error.errno == errno.EADDRINUSE or (     # Windows: it has the port exclusively
        error.errno == errno.EACCES and os.name == "nt")


def cannot_listen(options, error):
    """Say why a port cannot be listened on."""
    why = error.strerror or str(error)
    if port_is_taken(error):
        why = "%s uses it" % (who_listens(options.host, options.port) or "another program")
    elif error.errno == errno.EACCES:
        why = ("ports below 1024 need root or CAP_NET_BIND_SERVICE, which "
               "deploy/neuroengine.service gives")
    elif isinstance(error, socket.gaierror) or error.errno in (
            errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EINVAL):
        return ("Cannot listen on %s: it is no address of this machine. Leave --host out to "
                "listen on all addresses." % printable(options.host, 80))
    return "Cannot listen on %s port %d: %s. Choose another with --port." % (
        options.host or "any address", options.port, why)


def who_listens(host, port):
    """Return the name that the program on a port gives over HTTP or HTTPS, or None.
    Blocks for a few seconds at most."""
    if host in ("", "0.0.0.0", "::"):
        host = "localhost"
    any_peer = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    any_peer.check_hostname, any_peer.verify_mode = False, ssl.CERT_NONE
    for wrap in (contextlib.closing, any_peer.wrap_socket):
        with contextlib.suppress(OSError):
            with wrap(socket.create_connection((host, port), 1)) as sock:
                sock.sendall(b"HEAD /healthz HTTP/1.0\r\n\r\n")
                match = re.search(rb"\r\nServer: ([\x21-\x7e]+)", sock.recv(4096), re.I)
                if match:
                    return match[1].decode("ascii")
    return None


# Doctor: each check returns ("ok", "warning" or "error", a sentence).


def check_versions(options):
    """The versions in use."""
    return "ok", "This is neuroengine %s on Python %s, %s, SQLite %s." % (
        __version__, sys.version.split()[0], ssl.OPENSSL_VERSION, sqlite3.sqlite_version)


def check_clock(options):
    """A wrong clock makes keys and certificates seem expired."""
    words = time.strftime("The clock says %Y-%m-%d %H:%M UTC", time.gmtime())
    if time.time() < EARLIEST_TIME:
        return "error", words + (", which is wrong: set it (timedatectl set-ntp true), or "
                                 "certificates and keys expire at wrong times.")
    return "ok", words + "."


def check_port(options):
    """Whether the relay can listen, or does already."""
    try:
        Relay(options.host, options.port).server_close()
    except OSError as error:
        if not port_is_taken(error) or (
                who_listens(options.host, options.port) != "neuroengine"):
            return "error", cannot_listen(options, error)
        if not options.engine and DataLock(options.data).holder() is None:
            return "warning", ("A relay runs on port %d, but not with the data file %s." % (
                options.port, options.data))
        return "ok", "A relay runs on port %d." % options.port
    if DataLock(options.data).holder() is not None:
        return "error", ("The data file is used by a relay on another port: a second relay "
                         "on it would be refused.")
    return "ok", "Port %d is free." % options.port


def check_certificate(options):
    """Whether clients will accept the certificate, and for how long."""
    files = None
    try:
        files = certificate_files(options, make=False)
        if files is None:
            return check_plain(options)
        if not options.cert:
            return "warning", self_signed_words(options, files)
        seen = certificate_of(*files)
    except StoreError as error:
        return "error", str(error)
    except ssl.SSLCertVerificationError as error:
        return "error", "Clients will not accept the certificate %s: %s. Renew it." % (
            files[0], error.verify_message)
    except (OSError, ValueError) as error:
        return "error", cannot_use(files, error)
    words = "The certificate %s, for %s, is valid until %s" % (
        files[0], names_in(seen), seen["notAfter"])
    if ssl.cert_time_to_seconds(seen["notAfter"]) - time.time() < RENEWAL_SECONDS:
        return "warning", words + ": renew it, and see why that did not happen in time."
    return "ok", words + "."


def self_signed_words(options, files):
    """What to know of a self-signed certificate. Raises OSError if it cannot be used."""
    made = all(map(os.path.exists, files))
    names = names_in(certificate_of(*files)) if made else ", ".join(
        own_names(names_to_cover(options)))
    return (
        "The certificate %s is self-signed%s, for %s: clients need a copy, to trust it, and must "
        "use one of these names. For another, remove the file and start the relay with "
        "--allow-host NAME. For a certificate that all trust, start the relay with "
        "--acme-webroot DIR, run certbot certonly --webroot -w DIR -d YOUR.NAME, and add --cert "
        "and --key; behind a proxy that does TLS, use --tls off."
        % (files[0], "" if made else " (it will be made at the start)", names))


def check_plain(options):
    """Whether plain HTTP is for this machine alone, or for a proxy."""
    local = options.host == "localhost"
    with contextlib.suppress(ValueError):
        local = local or is_loopback(canonical_address(options.host))
    if local or options.demo or options.trusted_proxy:
        return "ok", "The relay speaks plain HTTP: for this machine, or behind a proxy."
    return "warning", (
        "The relay speaks plain HTTP on %s: all who reach it can use it%s, and their network can "
        "read what passes. For this machine alone, add --host 127.0.0.1; for others, --cert, or "
        "a proxy that does TLS." % (
            options.host or "all addresses of this machine",
            ", register services" if options.registration == "open" else ""))


def check_descriptors(options):
    """Whether the system allows as many open files as connections."""
    each = 2 if options.engine else 1      # what is forwarded has a second connection
    needed, allowed = each * options.max_connections + OTHER_DESCRIPTORS, math.inf
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
    """Whether the data file can be used, and which relay uses it."""
    directory = data_directory(options)
    if options.demo:
        return "ok", "Nothing is kept on disk."
    if not os.access(directory, os.W_OK | os.X_OK):
        return "error", ("The folder %s, for the data file, does not exist, or this user may "
                         "not write to it. Name another file with --data." % directory)
    if not os.path.exists(options.data):
        return "ok", "The data file %s will be made at the first start." % options.data
    holder = DataLock(options.data).holder()
    try:
        with contextlib.closing(Store(options.data, existing=True)) as store:
            words = "The data file %s is whole" % options.data
            if store.version < len(MIGRATIONS):
                words += ", and will be brought up to date at the next start"
    except StoreError as error:
        return "error", str(error)
    return "ok", words + (
        "." if holder is None else ". %s uses it." % DataLock.name(holder))


def check_disk(options):
    """Whether the disk has room."""
    directory = data_directory(options)
    free = shutil.disk_usage(directory).free // MIB if os.path.isdir(directory) else 0
    if free < MIN_FREE_MIB and not options.demo:
        return "warning", ("The disk of %s has only %d MB left: when it is full, no service "
                           "or key can be made, and counts are lost." % (directory, free))
    return "ok", "The disk has room: %d MB." % free


def check_page(options):
    """Whether the page is there."""
    if read_page() is None:
        return "warning", "There is no chat.html next to this program, so there is no page."
    return "ok", "The page, chat.html, is there."


AT_START = (check_versions, check_clock, check_certificate, check_descriptors, check_disk,
            check_page)    # the relay prints what is not ok of these


# Commands. Each gets the options and may return an exit status.


@contextlib.contextmanager
def open_data(options):
    """The Store of an existing data file, or that of an engine, for a with statement.
    Raises StoreError."""
    if options.engine:
        yield EngineStore(Engine(options.engine))
        return
    with contextlib.closing(Store(options.data, existing=True)) as store:
        if store.version < len(MIGRATIONS):
            raise StoreError("The data file %s comes from an older neuroengine. The relay "
                             "brings it up to date when it starts." % options.data)
        yield store


def holder_of(options):
    """Return the process id of the relay that uses the data (0: unknown), or None."""
    return 0 if options.engine else DataLock(options.data).holder()


def soon():
    """When a running relay does what a command has written."""
    return "a running relay follows within %d s" % RELOAD_SECONDS


def find_stored(store, name):
    """Return the stored Service of that name, in any case. Raises StoreError."""
    services = {service.name.lower(): service for service in store.load()}
    if name.lower() not in services:
        close = close_matches(name.lower(), services, 1)
        raise StoreError("There is no service %s%s." % (
            printable(name, 80), "; did you mean %s?" % services[close[0]].name
            if close else ""))
    return services[name.lower()]


def is_connected(service, holder):
    """Whether a stored service has a provider now; holder: that of the data file's lock.
    Without a running relay, a service that is stored as connected is not."""
    return holder is not None and service.connected > 0


def service_line(service, holder):
    """Return a line about a stored service; holder: that of the data file's lock."""
    if is_connected(service, holder):
        state = "connected"
    elif service.last_seen is None:
        state = "never connected"
    else:
        state = time.strftime("last seen %Y-%m-%d %H:%M UTC",
                              time.gmtime(service.last_seen))
    words = ["private"] * service.private + ["paused"] * service.paused
    if service.operator:
        words.append("by " + printable(service.operator))
    return ("%-24s %6d prompts  %3d keys  %-30s %s" % (
        service.name, service.numreq, len(service.keys), state, ", ".join(words))).rstrip()


def run_doctor(options):
    """Print the result of each check; the exit status is 1 if there is an error."""
    kept = CLUSTER_CHECKS if options.engine else (check_data,)
    found = [check(options) for check in (*AT_START, *kept, check_port)]
    found = list(dict.fromkeys(found))     # two checks may meet the same error
    for level, words in found:
        print("%-8s %s" % (level, words))
    return int("error" in dict(found))


def run_list(options):
    """Print a line for each service."""
    holder = holder_of(options)
    with open_data(options) as store:
        services = sorted(store.load(), key=lambda service: service.name.lower())
    for service in services:
        print(service_line(service, holder))
    if holder is None:
        say("No relay is running on %s." % options.data, sys.stderr)


def run_reset_key(options):
    """Give a service a new key, and print it."""
    with open_data(options) as store:
        service, key = find_stored(store, options.arguments[0]), new_key()
        store.change(service, key_digest=digest(key))
    print("%s has a new service key, which is not shown again; %s. Providers with the old "
          "one are logged out.\n%s" % (service.name, soon(), key))


def run_delete(options):
    """Delete the services that the patterns and --unused-since select. One exact name
    needs no confirmation."""
    holder = holder_of(options)
    with open_data(options) as store:
        services = select_services(store, options, holder)
        named = [name.lower() for name in options.arguments]
        if options.unused_since is not None or named != [services[0].name.lower()]:
            for service in services:
                print(service_line(service, holder))
            confirm(options, "Delete the services above (%d), with their access keys?"
                    % len(services))
        for service in services:
            store.remove(service)
            print("Deleted %s; %s." % (service.name, soon()))


def select_services(store, options, holder):
    """Return the stored services that match one of the patterns and are unused for long
    enough, sorted by name. Raises StoreError if there are none, or if a name is unknown."""
    for pattern in options.arguments:
        if not re.search(r"[*?[]", pattern):
            find_stored(store, pattern)
    patterns = [pattern.lower() for pattern in options.arguments] or ["*"]
    found = [service for service in store.load() if any(
        fnmatch.fnmatchcase(service.name.lower(), pattern) for pattern in patterns)]
    if options.unused_since is not None:
        since = time.time() - options.unused_since * DAY_SECONDS
        found = [service for service in found if not is_connected(service, holder)
                 and (service.last_seen or service.created) <= since]
    if not found:
        raise StoreError("No service matches: nothing was deleted.")
    return sorted(found, key=lambda service: service.name.lower())


def confirm(options, question):
    """Return if the answer is yes. Raises StoreError otherwise."""
    if options.yes:
        return
    if sys.stdin is None or not sys.stdin.isatty():
        raise StoreError("Nothing was deleted: add --yes to delete these services.")
    try:
        answer = input(question + " Type yes: ")
    except EOFError:
        answer = ""
    if answer.strip().lower() != "yes":
        raise StoreError("Nothing was deleted.")


def run_invite(options):
    """Make an invitation, and print it."""
    uses = number_of((options.arguments or ["1"])[0], int)
    if uses is None or not 1 <= uses <= MAX_USES:
        raise StoreError("USES is a number from 1 to %d: how many services may be registered "
                         "with it." % MAX_USES)
    code = new_key()
    with open_data(options) as store:
        store.invite(digest(code), uses)
    print("An invitation to register %d service%s, at a relay that runs with --registration "
          "invited. It is not shown again.\n%s" % (uses, "s" * (uses > 1), code))


def run_backup(options):
    """Copy the data to a new file; also of an older version, before an update."""
    path = options.arguments[0]
    try:
        if options.engine:
            engine = Engine(options.engine)
            EngineStore(engine).backup(path)
        else:
            with contextlib.closing(Store(options.data, existing=True)) as store:
                store.backup(path)
    except OSError as error:
        raise StoreError("Cannot write %s: %s. Name a new file." % (path, error.strerror))
    if options.engine:
        print("Copied to %s. To restore it into an empty engine: %s import %s --engine %s" % (
            path, how_to_run(), path, engine.shown))
        return
    print("Copied to %s. To restore it, stop the relay and run: %s restore %s" % (
        path, how_to_run(), path))


def run_restore(options):
    """Put a backup in the place of the data file, which is kept under another name."""
    source, target = options.arguments[0], options.data
    if options.engine:
        raise StoreError("restore is for a data file; for an engine, use import.")
    with DataLock(target):
        path = os.path.realpath(target)
        new = path + ".restoring"
        remove_data(new)                   # a log that another restore left belongs to its copy
        try:
            copy_backup(source, new, target)
            kept = set_aside(path)
            os.replace(new, path)
        except OSError as error:
            raise StoreError("Cannot restore %s: %s." % (source, error.strerror or error))
        finally:
            remove_data(new)
    print("Restored %s from %s. Keys that were made or revoked after the backup are as they "
          "were then.%s" % (target, source, kept and " The old data is in %s." % kept))


def copy_backup(source, new, target):
    """Copy a backup to a new file and check it there: opening the original could change it.
    Raises OSError; StoreError if it cannot serve as a data file."""
    if os.path.realpath(source) == os.path.realpath(target):
        raise StoreError("%s is the data file itself: name a backup." % source)
    for suffix in ("", "-wal"):            # a plain copy of a data file may have its log
        if suffix and not os.path.exists(source + suffix):
            break
        file = open_private(new + suffix, os.O_WRONLY | os.O_TRUNC)
        with open(file, "wb") as copy, open(source + suffix, "rb") as old:
            shutil.copyfileobj(old, copy)
    keep_owner(new, target)
    try:
        with contextlib.closing(Store(new, existing=True)) as store:
            if store.version < 1:
                raise StoreError("%s is not a neuroengine data file." % source)
    except StoreError as error:
        raise StoreError("Nothing was restored. " + str(error).replace(new, source))


def set_aside(path):
    """Give a data file a second name, and rename its logs; return the name, or "" if there is
    none. The file itself stays until the new one replaces it: there is always one."""
    if not os.path.exists(path):
        return ""
    kept = path + time.strftime(".before-%Y%m%d-%H%M%S")
    while os.path.exists(kept):             # another restore in this second
        kept += "-"
    try:
        os.link(path, kept)
    except OSError:                         # a file system without links
        shutil.copy2(path, kept)
    for suffix in DATA_SUFFIXES[1:]:        # a log left behind would be read into the new one
        if os.path.exists(path + suffix):
            os.replace(path + suffix, kept + suffix)
    return kept


COMMANDS = {   # name: (function, its argument, what it does)
    "list": (run_list, "", "show the services"),
    "reset-key": (run_reset_key, "NAME", "give a service a new key; print it, this once"),
    "delete": (run_delete, "PATTERN...", "delete services: a name, or a pattern as 'test-*'"),
    "invite": (run_invite, "[USES]", "print an invitation to register, this once"),
    "backup": (run_backup, "FILE", "copy the data to a new file"),
    "import": (run_import, "FILE", "take a data file into the --engine of several relays"),
    "restore": (run_restore, "FILE", "put a backup in place; the relay must be stopped"),
    "doctor": (run_doctor, "", "say what is wrong; add all options of the relay"),
}


def run_command(options):
    """Run one of COMMANDS; return the exit status."""
    try:
        status = COMMANDS[options.command][0](options) or 0
        sys.stdout.flush()
        return status
    except (StoreError, sqlite3.Error) as error:
        say(str(error), sys.stderr)
    except BrokenPipeError:                # `list | head`
        pass
    except OSError as error:               # of print: a full disk, say
        say("Cannot write the output: %s." % (error.strerror or error), sys.stderr)
    return 1


# The process of a relay.


def say(words, file=None):
    """Print a line; one that cannot be written is not worth an exception."""
    with contextlib.suppress(OSError, ValueError):
        print(words, file=file, flush=True)


def prepare_streams():
    """Let print never fail for want of a stream, nor for a character that the terminal
    does not have. pythonw and `2>&-` leave the streams None."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))
        else:
            with contextlib.suppress(AttributeError, ValueError, OSError):
                stream.reconfigure(errors="backslashreplace")


def raise_descriptor_limit():
    """Allow as many open files as the system lets us: each connection is one."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource                    # not on Windows
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def pin_to_one_core(port):
    """Run all threads on one core, on Linux with a global interpreter lock. Relays whose
    ports follow one another get different ones."""
    # Only one thread holds the lock; on two cores they compete for it. Measured with 64
    # clients on two cores: 1.6 times the requests/s.
    if getattr(sys, "_is_gil_enabled", lambda: True)():
        with contextlib.suppress(AttributeError, OSError):
            cores = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, {cores[port % len(cores)]})


TRIM_SECONDS = 5


def return_freed_memory():
    """Let glibc give memory that was freed back to the system: large blocks at once, the rest
    every few seconds.

    By default it keeps what it once used: measured with hostile answers, 193 MB resident of
    which 33 were in use.
    """
    with contextlib.suppress(ImportError, OSError, AttributeError):
        import ctypes                      # only here: kept out of the import
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 128 * 1024)       # M_MMAP_THRESHOLD
        libc.mallopt(-8, 2)                # M_ARENA_MAX
        threading.Thread(target=keep_trimming, args=(libc.malloc_trim,), daemon=True).start()


def keep_trimming(malloc_trim):
    """Return freed memory to the system every few seconds; for a thread."""
    while True:
        time.sleep(TRIM_SECONDS)
        malloc_trim(0)


def use_batch_scheduling():
    """Let a thread that wakes wait until the running one blocks, on Linux."""
    # It would find the interpreter lock taken, and wait again. Measured with 64 clients:
    # 1.2 times the requests/s, and a quarter of the thread switches.
    with contextlib.suppress(AttributeError, OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


SWITCH_SECONDS = 0.001       # a thread that computes in Python gives way after this long,
                             # not 5 ms: a request takes the interpreter lock some ten
                             # times. Measured with three connections that send tiny chunks:
                             # others' p99 94 ms, not 304; free otherwise


class Signals:
    """The signals that end or reload a relay, for its main thread to wait for.

    The kernel may deliver a signal to any thread, and then nothing wakes the main one, in
    which Python runs handlers. The byte that Python writes to a wakeup socket always does.
    """

    def __init__(self, check_seconds=1.0 if os.name == "nt" else None):
        """check_seconds: how often wait() looks up; on Windows Ctrl-C does not interrupt
        a receive. Only the main thread may call this (signal.signal)."""
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        self._receiver.settimeout(check_seconds)
        signal.set_wakeup_fd(self._sender.fileno())
        # Windows has no SIGHUP; on a terminal it means that the window was closed.
        self.hangup = None if sys.stderr.isatty() else getattr(signal, "SIGHUP", None)
        self._ends = [number for number in (signal.SIGTERM, signal.SIGINT, getattr(
            signal, "SIGBREAK", None)) if number is not None]
        for number in self._ends + [self.hangup] * (self.hangup is not None):
            signal.signal(number, lambda *_: None)

    def wait(self):
        """Block until a signal arrives; return its number."""
        while True:
            with contextlib.suppress(socket.timeout):
                return self._receiver.recv(1)[0]

    def end_at_once(self):
        """From now on, a signal ends the process without delay."""
        for number in self._ends:
            signal.signal(number, lambda *_: os._exit(1))


def reload_files(relay):
    """Read again what may have changed on disk, and log what has."""
    again, page = relay.reload(), read_page()
    if page != relay.page:
        again.append("page" if page is not None else "page (chat.html is missing)")
    relay.show(page)                       # it reads the client file, too
    log("reloaded", read=again)


def serve_until_signal(relay, options):
    """Run a relay until a signal ends it. Its answers under way may finish."""
    signals = Signals()
    if options.demo:
        start_demo(relay)
    relay.start()
    say("neuroengine %s listens at %s" % (__version__, relay.url))
    if options.demo:
        say("Open %s/Eliza in a browser. Ctrl-C stops it." % relay.url)
    log("started", version=__version__, url=relay.url)
    while signals.wait() == signals.hangup:
        reload_files(relay)
    signals.end_at_once()
    more = {} if relay.broker.nothing_runs() else {
        "meaning": "running answers may finish; a second signal ends the relay at once"}
    log("stopping", drain_seconds=options.drain_seconds, **more)
    relay.stop(options.drain_seconds)
    log("stopped")


def run_relay(options):
    """Run the relay that the options describe; return the exit status."""
    LOG["format"] = options.log
    raise_descriptor_limit()
    pin_to_one_core(options.port or secrets.randbelow(1 << 16))
    return_freed_memory()
    use_batch_scheduling()
    sys.setswitchinterval(SWITCH_SECONDS)
    threading.stack_size(STACK_BYTES)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(DataLock(options.data))
            relay = open_relay(options)
        except StoreError as error:
            say(str(error), sys.stderr)
            return 1
        except OSError as error:
            say(cannot_listen(options, error), sys.stderr)
            return 1
        for level, words in [check(options) for check in AT_START]:
            if level != "ok":
                say("%s: %s" % (level, words), sys.stderr)
        serve_until_signal(relay, options)
    return 0


def flush_output():
    """Write what print has buffered. If that fails, discard it: Python would try again at
    its exit, and show a traceback."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(argv=None):
    """Run the relay until a signal ends it, or one of COMMANDS; return the exit status."""
    prepare_streams()
    try:
        options = parse(argv)
        return run_command(options) if options.command else run_relay(options)
    except BrokenPipeError:                # `--help | head`, before Python 3.12
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        flush_output()


if __name__ == "__main__":
    sys.exit(main())
