"""The tests of neuroengine: python -m pytest. Sections: Broker, Store, HTTP reader,
Relay, Client and provider, Bridge, Command lines, README. No network but loopback."""

import contextlib
import http.client
import http.server
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
import uuid

import pytest

import neuroengine
import neuroengine_server
from neuroengine import Neuroengine
from neuroengine import NeuroengineError
from neuroengine import NeuroengineServer
from neuroengine_server import Broker
from neuroengine_server import Limits
from neuroengine_server import Relay
from neuroengine_server import RelayError
from neuroengine_server import Service
from neuroengine_server import Store
from neuroengine_server import parse_head

HERE = os.path.dirname(os.path.abspath(__file__))
SOON = 10.0      # seconds that only a failure reaches


def until(fact, seconds=SOON):
    """Wait until fact() is true, and return what it returned."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = fact()
        if value:
            return value
        time.sleep(0.005)
    raise AssertionError("it did not happen within %g s" % seconds)


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
        jobs, cancels = self.broker.poll(self.service, session, token or object(),
                                         running, timeout=0)
        return [(job.id, attempt, at, text) for job, attempt, at, text in jobs], cancels

    def submit(self, text=b'{"message":"hi"}', **kw):
        kw.setdefault("caller", "alice")
        return self.broker.submit(self.service, text, **kw)

    def reply(self, session, job, items=(), at=0, attempt=1, **kw):
        entry = dict(kw, job=job, attempt=attempt, at=at, items=list(items))
        refused, jobs, cancels = self.broker.reply(self.service, session, [entry])
        return refused, [job.id for job, _, _, _ in jobs], cancels

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
    desk.reply(session, job, ["a", "b"])
    assert desk.broker.read(reader) == (["a", "b"], False)
    desk.reply(session, job, ["c"], at=2, done=True)
    assert desk.broker.read(reader) == (["c"], True)
    assert reader.job.state == "done"


def test_a_parked_poll_wakes_on_submit(desk):
    session, got = desk.login(), []
    thread = threading.Thread(target=lambda: got.extend(desk.broker.poll(
        desk.service, session, object(), (), timeout=SOON)[0]))
    thread.start()
    until(lambda: desk.service.idle)
    desk.submit()
    thread.join(SOON)
    assert len(got) == 1


def test_a_job_moves_only_as_the_table_says(desk):
    reader, session, job = desk.start()
    desk.reply(session, job, done=True)
    for state in neuroengine_server.MOVES:
        with pytest.raises(AssertionError):
            desk.broker._move_locked(reader.job, state)


def test_callers_take_turns_and_the_operator_goes_first(desk):
    desk.login()
    order = []
    for caller, text in (("a", b'"a1"'), ("a", b'"a2"'), ("a", b'"a3"'), ("b", b'"b1"'),
                         ("c", b'"c1"'), ("b", b'"b2"')):
        order.append(desk.submit(text, caller=caller))
    own = desk.submit(b'"own"', own=True)
    assert desk.broker.place(own.job)["position"] == 1
    places = [desk.broker.place(reader.job)["position"] for reader in order]
    assert places == [2, 5, 7, 3, 4, 6]
    session = desk.login(workers=7)
    jobs, _ = desk.broker.poll(desk.service, session, object(), (), timeout=0)
    assert [job.payload for job, _, _, _ in jobs] == [
        b'"own"', b'"a1"', b'"b1"', b'"c1"', b'"a2"', b'"b2"', b'"a3"']


def test_queues_are_bounded_per_service_and_per_caller():
    desk = Desk(max_queue=3, max_queue_per_caller=2)
    desk.login()
    desk.submit(), desk.submit()
    with pytest.raises(RelayError) as refused:
        desk.submit()
    assert refused.value.name == "rate_limited" and refused.value.retry_after
    desk.submit(caller="bob")
    with pytest.raises(RelayError) as refused:
        desk.submit(caller="carol")
    assert refused.value.name == "queue_full" and refused.value.retry_after


def test_held_bytes_are_bounded_and_come_back_to_zero():
    desk = Desk(max_held_bytes=100)
    reader, session, job = desk.start()
    with pytest.raises(RelayError) as refused:
        desk.submit(b"x" * 90)
    assert refused.value.name == "relay_busy"
    desk.reply(session, job, ["abc"], done=True)
    desk.broker.read(reader)
    desk.broker.leave(reader, delivered=True)
    assert desk.broker.totals()["held_bytes"] == 0


def test_a_repeat_is_dropped_and_a_gap_is_refused(desk):
    reader, session, job = desk.start()
    desk.reply(session, job, ["a", "b"])
    desk.reply(session, job, ["a", "b", "c"])
    refused, _, _ = desk.reply(session, job, ["x"], at=7)
    assert refused == [{"job": job, "error": "gap", "at": 3}]
    desk.reply(session, job, ["a"], done=True)
    assert desk.broker.read(reader) == (["a", "b", "c"], True)


def test_a_reply_larger_than_its_bound_fails_that_job_alone():
    desk = Desk(max_reply_bytes=10)
    reader, session, job = desk.start()
    refused, _, cancels = desk.reply(session, job, ["x" * 50])
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
    reader = desk.broker.submit(service, b"{}")
    desk.later(desk.broker.limits.offline_seconds + 0.1)
    assert reader.job.error.name == "service_offline"
    with pytest.raises(RelayError):
        desk.broker.submit(service, b"{}")


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
    session, token = desk.login(), object()
    first = desk.submit(b'"first"')
    (job, _, _, _), = desk.poll(session)[0]
    desk.poll(session, [(job, 1)], token)
    second = desk.submit(b'"second"')
    desk.broker.lost(session, token)
    desk.later(1.0)
    assert desk.broker.place(first.job)["position"] == 1
    assert desk.broker.place(second.job)["position"] == 2
    assert not desk.broker.model(desk.service)["connected"]


def test_silence_is_loss_after_the_lease(desk):
    reader, session, job = desk.start()
    desk.later(14)
    assert reader.job.state == "leased"
    desk.later(1.1)
    assert reader.job.state == "queued"
    with pytest.raises(RelayError):
        desk.poll(session)


def test_a_heartbeat_keeps_the_lease(desk):
    reader, session, job = desk.start()
    for _ in range(10):
        desk.later(10)
        desk.broker.reply(desk.service, session, [])
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


def test_after_seen_tokens_a_lost_provider_means_an_error_after_the_text(desk):
    reader, session, job = desk.start()
    desk.reply(session, job, ["seen"])
    assert desk.broker.read(reader)[0] == ["seen"]
    desk.later(15.1)
    assert desk.broker.read(reader) == ([], True)
    assert reader.job.error.name == "provider_lost"


def test_items_that_nobody_saw_are_made_anew_by_another(desk):
    reader, session, job = desk.start()
    desk.reply(session, job, ["unseen"])
    desk.broker.logout(desk.service, session)
    other = desk.login()
    assert desk.poll(other)[0] == [(job, 2, 0, None)]
    desk.reply(other, job, ["new"], attempt=2, done=True)
    assert desk.broker.read(reader) == (["new"], True)


def test_seen_text_goes_on_with_a_provider_that_can_continue(desk):
    reader, session, job = desk.start()
    desk.reply(session, job, ["Once ", "upon "])
    desk.broker.read(reader)
    other = desk.login(continues=True)
    desk.later(10)
    desk.poll(other)
    desk.later(5.1)
    assert desk.poll(other)[0] == [(job, 2, 2, "Once upon ")]
    desk.reply(other, job, ["a time"], at=2, attempt=2, done=True)
    assert desk.broker.read(reader) == (["a time"], True)


def test_a_provider_whose_job_passed_to_another_is_fenced_off(desk):
    reader, session, job = desk.start()
    token = object()
    desk.poll(session, [(job, 1)], token)
    other = desk.login()
    desk.broker.lost(session, token)
    desk.later(1)
    assert desk.poll(other)[0] == [(job, 2, 0, None)]
    refused, _, _ = desk.reply(session, job, ["late"], attempt=1)
    assert refused == [{"job": job, "error": "fenced"}]
    assert desk.poll(session, [(job, 1)])[1] == [(job, 1)]
    desk.reply(other, job, ["x"], attempt=2, done=True)
    assert desk.broker.read(reader) == (["x"], True)


def test_a_job_that_waits_for_a_continuing_provider_does_not_wait_for_ever(desk):
    reader, session, job = desk.start()
    desk.reply(session, job, ["seen"])
    desk.broker.read(reader)
    going, plain = desk.login(continues=True), desk.login()
    desk.broker.logout(desk.service, session)
    assert reader.job.state == "queued"
    desk.broker.logout(desk.service, going)
    for _ in range(2):
        desk.later(desk.broker.limits.offline_seconds / 2 + 0.1)
        desk.poll(plain)
    assert reader.job.error.name == "provider_lost"


def test_a_begun_job_that_its_provider_lost_is_not_begun_again_behind_its_items(desk):
    reader, session, job = desk.start()
    desk.reply(session, job, ["Once "])
    assert desk.poll(session, ())[0] == []       # this poll may have been under way
    desk.poll(session, [(job, 1)])
    assert desk.poll(session, ())[0] == []
    desk.later(5)
    assert reader.job.state == "queued" and not reader.job.items
    assert desk.poll(session, ())[0] == [(job, 2, 0, None)]


def test_a_new_sessions_first_reply_takes_its_job_back_before_its_first_poll(desk):
    reader, session, job = desk.start()
    desk.login()
    desk.later(15)
    assert reader.job.state == "queued"
    again = desk.login()
    assert desk.reply(again, job, ["x"], done=True)[0] == []
    assert desk.broker.read(reader) == (["x"], True)


def test_a_provider_that_only_lost_its_connection_gets_its_job_back(desk):
    reader, session, job = desk.start()
    token = object()
    desk.poll(session, [(job, 1)], token)
    desk.broker.lost(session, token)
    desk.later(1)
    assert reader.job.state == "queued"
    assert desk.poll(session, [(job, 1)]) == ([], [])
    desk.reply(session, job, ["x"], done=True)
    assert desk.broker.read(reader) == (["x"], True)


def test_a_stream_goes_on_when_its_provider_is_back_within_the_lease(desk):
    reader, session, job = desk.start()
    desk.reply(session, job, ["a"])
    desk.broker.read(reader)
    token = object()
    desk.poll(session, [(job, 1)], token)
    desk.broker.lost(session, token)
    desk.later(14)
    desk.reply(session, job, ["b"], at=1)
    desk.poll(session, [(job, 1)])
    desk.later(14)
    desk.reply(session, job, ["c"], at=2, done=True)
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
    session, token = desk.login(), object()
    reader = desk.submit()
    assert desk.poll(session, (), token)[0]
    desk.broker.lost(session, token)
    assert desk.poll(session)[0] == [(reader.job.id, 1, 0, None)]


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
    assert desk.reply(session, job, ["x"], done=True)[1] == [waiting.job.id]


# Clients that go away, come back, or say stop.


def test_a_job_nobody_waits_for_is_cancelled_after_the_grace_time(desk):
    reader, session, job = desk.start()
    desk.broker.leave(reader)
    for _ in range(2):
        desk.later(14.5)
        desk.broker.reply(desk.service, session, [])
    assert reader.job.state == "leased"
    desk.later(1.1)
    assert reader.job.state == "cancelled"
    assert desk.poll(session, [(job, 1)])[1] == [(job, 1)]


def test_a_queued_job_nobody_waits_for_is_cancelled_too(desk):
    desk.login()
    reader = desk.submit()
    desk.broker.leave(reader)
    desk.later(31)
    assert reader.job.state == "cancelled" and desk.service.waiting == 0


def test_without_grace_a_job_is_cancelled_at_once(desk):
    reader, session, job = desk.start(grace=0.0)
    desk.broker.hangup(reader)
    assert reader.job.state == "cancelled"
    assert desk.poll(session, [(job, 1)])[1] == [(job, 1)]


def test_a_cancelled_job_occupies_its_worker_until_the_provider_let_go(desk):
    reader, session, job = desk.start()
    waiting = desk.submit()
    desk.broker.cancel(reader.job)
    assert desk.poll(session, [(job, 1)]) == ([], [(job, 1)])
    assert desk.reply(session, job, error=RelayError("cancelled", ""))[1] == [
        waiting.job.id]


def test_an_identical_prompt_finds_the_job_its_client_left_but_no_other(desk):
    desk.login()
    reader = desk.submit(twin="t")
    assert desk.submit(twin="t").job is not reader.job
    desk.broker.hangup(reader)
    assert desk.submit(twin="t").job is reader.job
    assert desk.service.numreq == 2


def test_an_answer_that_came_after_its_client_left_waits_for_its_return(desk):
    reader, session, job = desk.start(twin="t")
    desk.broker.hangup(reader)
    desk.reply(session, job, ["x"], done=True)
    again = desk.submit(twin="t")
    assert desk.broker.read(again) == (["x"], True)
    desk.broker.leave(again, delivered=True)
    assert desk.submit(twin="t").job is not reader.job


def test_a_name_finds_its_job_for_five_minutes_after_the_end(desk):
    reader, session, job = desk.start(name="k", fingerprint="p")
    desk.reply(session, job, ["x"], done=True)
    desk.broker.leave(reader, delivered=True)
    desk.later(299)
    again = desk.broker.open(desk.service, "k", 0)
    assert desk.broker.read(again) == (["x"], True)
    desk.broker.leave(again)
    desk.later(302)
    with pytest.raises(RelayError) as gone:
        desk.broker.open(desk.service, "k", 0)
    assert gone.value.name == "stream_unknown"
    assert not desk.broker._jobs and not desk.broker._kept


def test_a_name_with_another_prompt_is_refused(desk):
    desk.start(name="k", fingerprint="p")
    with pytest.raises(RelayError) as refused:
        desk.submit(name="k", fingerprint="q")
    assert refused.value.name == "key_reused"


def test_a_prompt_that_failed_may_be_tried_again_with_its_idempotency_key(desk):
    reader, session, job = desk.start(name=("repeat", "alice", "k"), fingerprint="p")
    desk.reply(session, job, error=RelayError("provider_error", "no"))
    assert desk.submit(name=("repeat", "alice", "k"), fingerprint="p").job is not reader.job


def test_who_comes_back_after_the_grace_time_with_an_idempotency_key_may_try_again(desk):
    reader, session, job = desk.start(name=("repeat", "alice", "k"))
    desk.broker.leave(reader)
    desk.later(31)
    assert reader.job.state == "cancelled"
    again = desk.submit(name=("repeat", "alice", "k"), wait=True)
    assert again.job is not reader.job and again.job.error is None


def test_reading_on_an_unknown_stream_never_starts_it_afresh(desk):
    desk.login()
    with pytest.raises(RelayError) as refused:
        desk.submit(name="k", fingerprint="p", at=3)
    assert refused.value.name == "stream_unknown"


def test_reading_at_a_position_is_repeatable(desk):
    reader, session, job = desk.start(name="k")
    desk.reply(session, job, list("abcdef"), done=True)
    for _ in range(2):
        again = desk.broker.open(desk.service, "k", 2)
        assert desk.broker.read(again, most=3) == (["c", "d", "e"], False)


def test_without_a_position_only_what_was_delivered_counts_as_read(desk):
    reader, session, job = desk.start(name="k")
    desk.reply(session, job, list("abc"), done=True)
    for delivered in (False, True):
        again = desk.broker.open(desk.service, "k")
        assert desk.broker.read(again, most=2)[0] == ["a", "b"]
        desk.broker.leave(again, delivered)
    assert desk.broker.read(desk.broker.open(desk.service, "k")) == (["c"], True)


def test_a_reader_is_woken_only_when_it_has_what_it_wants(desk):
    reader, session, job = desk.start()
    got = []
    thread = threading.Thread(target=lambda: got.append(
        desk.broker.read(reader, want=3, timeout=SOON)))
    thread.start()
    until(lambda: reader.job.wanted == 3)
    desk.reply(session, job, ["a"])
    assert reader.job.wanted == 3                # nobody was woken to reset it
    desk.reply(session, job, ["b", "c"], at=1)
    thread.join(SOON)
    assert got == [(["a", "b", "c"], False)]


def test_draining_fails_the_waiting_and_lets_the_running_finish(desk):
    reader, session, job = desk.start()
    waiting = desk.submit()
    desk.broker.drain()
    assert waiting.job.error.name == "shutting_down"
    with pytest.raises(RelayError):
        desk.submit()
    desk.reply(session, job, ["x"], done=True)
    assert desk.broker.read(reader) == (["x"], True) and desk.broker.idle()


def test_closing_wakes_every_waiter(desk):
    reader, session, job = desk.start()
    threads = [threading.Thread(target=desk.broker.read, args=(reader, 1, SOON)),
               threading.Thread(target=desk.broker.poll, args=(
                   desk.service, session, object(), [(job, 1)])),
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
        desk.reply(session, job, ["x"], done=True)
        desk.broker.read(reader)
        desk.broker.leave(reader, delivered=True)
    assert not desk.broker._jobs and len(desk.broker._timers) < 10
    assert desk.broker.totals()["held_bytes"] == 0 and desk.service.numreq == 10000


def test_the_estimate_comes_from_measured_times(desk):
    reader, session, job = desk.start()
    desk.later(4)
    desk.reply(session, job, ["x"], done=True)
    desk.poll(session)
    desk.submit(), desk.submit()
    place = desk.broker.place(desk.submit().job)
    assert place == {"position": 3, "waiting": 3, "eta_s": 12.0}


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
        name: getattr(loaded, name) for name in ("sessions", "idle", "returned", "own",
                                                 "turns")})


@pytest.mark.skipif(os.name == "nt", reason="no such modes on Windows")
def test_the_data_file_is_private(tmp_path):
    path = tmp_path / "data.sqlite3"
    Store(str(path)).close()
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_newer_or_broken_data_file_is_refused_in_words(tmp_path):
    import sqlite3
    newer, broken = tmp_path / "newer", tmp_path / "broken"
    with contextlib.closing(sqlite3.connect(str(newer))) as db:
        db.execute("PRAGMA user_version=99")
    broken.write_bytes(b"this is no database, not at all" * 100)
    for path in (newer, broken):
        with pytest.raises(neuroengine_server.StoreError, match=path.name):
            Store(str(path))


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

GOOD = b"POST /a HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize("head", [
    b"GET /\r\nHost: x\r\n", b"GET / HTTP/2.0\r\nHost: x\r\n", b"GET / HTTP/1.1\r\n",
    b"GET  / HTTP/1.1\r\nHost: x\r\n", b"GET /a b HTTP/1.1\r\nHost: x\r\n",
    b"G\x00T / HTTP/1.1\r\nHost: x\r\n", b"GET / HTTP/1.1\nHost: x\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nHost: x\r\n", b"GET / HTTP/1.1\r\nHost: a b\r\n",
    b"GET / http/1.1\r\nHost: x\r\n", b"GET / HTTP/1.1 \r\nHost: x\r\n",
    b"GET a HTTP/1.1\r\nHost: x\r\n",
    GOOD + b"Content-Length: 3\r\nContent-Length: 3\r\n",
    GOOD + b"Content-Length: +3\r\n", GOOD + b"Content-Length: 1_0\r\n",
    GOOD + b"Content-Length: -1\r\n", GOOD + b"Content-Length: 0x3\r\n",
    GOOD + b"Content-Length: \xb2\r\n", GOOD + b"Content-Length: 3, 3\r\n",
    GOOD + b"Content-Length: 9999999999999999\r\n", GOOD + b"Content-Length:\r\n",
    GOOD + b"Content-Length : 3\r\n", GOOD + b"X Y: 3\r\n", GOOD + b": 3\r\n",
    GOOD + b"no colon\r\n", GOOD + b"X: a\r\n folded\r\n", GOOD + b" X: a\r\n",
    GOOD + b"X: a\rb\r\n", GOOD + b"X: a\nb\r\n", GOOD + b"X: a\x00b\r\n",
    GOOD + b"X: a\x0bb\r\n",
    GOOD + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n",
    GOOD + b"Transfer-Encoding: gzip, chunked\r\n",
    GOOD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
    GOOD + b"Transfer-Encoding: xchunked\r\n", GOOD + b"Transfer-Encoding: \r\n",
    b"POST /a HTTP/1.0\r\nTransfer-Encoding: chunked\r\n",
    GOOD + b"Authorization: a\r\nAuthorization: b\r\nContent-Length: 0\r\n",
    GOOD + b"A: b\r\n" * 65,
])
def test_an_ambiguous_or_malformed_head_is_refused(head):
    with pytest.raises(RelayError) as refused:
        parse_head(head)
    assert neuroengine_server.ERRORS[refused.value.name][1] in (400, 411)


@pytest.mark.parametrize("target, path", [
    (b"/", ()), (b"/a", ("a",)), (b"//a//b/", ("a", "b")), (b"/a%20b?c=d", ("a b",)),
    (b"http://host/a", ("a",)), (b"*", ()), (b"/a%2Fb", ("a", "b")),
])
def test_paths_are_decoded_and_empty_segments_do_not_count(target, path):
    assert parse_head(b"GET " + target + b" HTTP/1.1\r\nHost: x\r\n").path == path


def test_a_good_head_is_read_whole():
    head = parse_head(GOOD + b"Content-Length: 12\r\nX-A:  b \r\nx-a: c\r\n")
    assert (head.method, head.length, head.fields["x-a"]) == ("POST", 12, "b, c")
    assert head.keep_alive
    assert not parse_head(GOOD + b"Content-Length: 0\r\nConnection: a, Close\r\n").keep_alive


def test_random_bytes_are_refused_and_nothing_else_happens():
    import random
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
    with running_relay(limits=Limits(
            grace_seconds=1.0, wait_seconds=1.0, head_seconds=1.0, heartbeat_seconds=0.4,
            body_seconds=1.0, max_request_bytes=1 << 20)) as relay:
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
    sock.sendall(("POST %s HTTP/1.1\r\nHost: x\r\n%sContent-Length: %d\r\n\r\n"
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
        while True:
            jobs = self.poll()["jobs"]
            if jobs:
                return jobs[0]

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
        thread.join(SOON)
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
    answer = in_thread(ask, relay, "/" + hand.name, dict(fields, gettokens=5, key=""))
    job = hand.next_job()
    assert job["request"] == fields
    hand.reply(job, ["x"], done=True)
    answer()


BAD_NATIVE = [
    (b"{", 400, "invalid_json"), (b"[1]", 400, "invalid_json"),
    (b'"x"', 400, "invalid_json"), (b"\xff", 400, "invalid_json"),
    (b"[" * 100000, 400, "invalid_json"), (b'{"a":NaN}', 400, "invalid_json"),
    (b'{"message":"x","seed":' + b"9" * 5000 + b"}", 400, None),
    ({}, 400, "invalid_request"), ({"message": 5}, 400, "invalid_request"),
    ({"message": None}, 400, "invalid_request"), ({"messages": []}, 400, "invalid_request"),
    ({"messages": [1]}, 400, "invalid_request"),
    ({"messages": [{"role": "user", "content": 3}]}, 400, "invalid_request"),
    ({"message": "x", "temperature": -1}, 400, "invalid_request"),
    ({"message": "x", "temperature": "hot"}, 400, "invalid_request"),
    ({"message": "x", "temperature": True}, 400, "invalid_request"),
    (b'{"message":"x","temperature":1e400}', 400, "invalid_request"),
    ({"message": "x", "max_new_len": 0}, 400, "invalid_request"),
    ({"message": "x", "max_new_len": 1.5}, 400, "invalid_request"),
    ({"message": "x", "seed": 10**400}, 400, "invalid_request"),
    ({"message": "x", "top_k": [1]}, 400, "invalid_request"),
    ({"message": "x", "raw": "maybe"}, 400, "invalid_request"),
    ({"message": "x", "key": 5}, 400, "invalid_request"),
    ({"message": "x", "gettokens": 0}, 400, "invalid_request"),
    ({"message": "x", "stream": "yes"}, 400, "invalid_request"),
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
    ("/", "POST", 400, "invalid_request"),
])
def test_unknown_paths_names_and_methods_are_told_apart(relay, path, method, status, error):
    got, answer, headers = ask(relay, path, {"message": "x"}, method)
    assert (got, answer["error"]) == (status, error)
    assert status != 405 or headers["Allow"]


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
    assert 0.9 < time.monotonic() - began < 5


def test_a_long_wait_for_the_first_token_says_still_waiting(relay, hand):
    status, answer, _ = ask(relay, "/" + hand.name, {"message": "hi", "key": name_of()})
    assert status == 202 and answer["error"] == "still_waiting" and answer["errorcode"]


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


def test_a_stream_brings_items_and_heartbeats_and_a_last_record(relay, hand):
    with contextlib.closing(sent(relay, "/" + hand.name,
                                 {"message": "x", "stream": True})) as sock:
        job = hand.next_job()
        hand.reply(job, ["a"])
        records = records_of(sock)
        assert next(records) == {"at": 0, "items": ["a"]}
        assert next(records) == {}
        hand.reply(job, ["b", {"finish_reason": "stop"}], at=1, done=True)
        assert [r for r in records if r][:1] == [
            {"at": 1, "items": ["b", {"finish_reason": "stop"}]}]


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


def test_a_waiting_stream_hears_its_place(relay, hand):
    with contextlib.closing(sent(relay, "/" + hand.name, {"message": "x"})):
        hand.next_job()
        with contextlib.closing(sent(relay, "/" + hand.name, {
                "message": "y", "stream": True})) as sock:
            assert next(records_of(sock))["queue"] == {
                "position": 1, "waiting": 1, "eta_s": None}


def test_an_error_before_the_first_item_has_its_status(relay, hand):
    answer = in_thread(ask, relay, "/" + hand.name, {"message": "x", "stream": True})
    hand.reply(hand.next_job(), error={"error": "provider_error", "message": "no\r\nluck"})
    status, body, _ = answer()
    assert status == 502 and body["error"] == "provider_error"
    assert body["reply"] == "The provider could not answer: no??luck."


def test_an_error_after_the_first_item_is_the_last_record(relay, hand):
    with contextlib.closing(sent(relay, "/" + hand.name,
                                 {"message": "x", "stream": True})) as sock:
        job = hand.next_job()
        hand.reply(job, ["a"])
        records = records_of(sock)
        assert next(records)["items"] == ["a"]
        hand.reply(job, at=1, error="boom")
        assert [r for r in records if r][-1]["error"] == "provider_error"


def test_a_reply_that_is_not_text_is_an_error_for_its_client(relay, hand):
    answer = in_thread(ask, relay, "/" + hand.name, {"message": "x"})
    hand.reply(hand.next_job(), [5], done=True)
    assert answer()[1]["error"] == "provider_error"


def test_a_failed_polled_stream_tells_once_those_who_do_not_count(relay, hand):
    body = {"message": "x", "key": name_of()}
    first = in_thread(ask, relay, "/" + hand.name, body)
    hand.reply(hand.next_job(), error="boom")
    assert first()[0] == 502
    status, answer, _ = ask(relay, "/" + hand.name, body)
    assert (status, answer["reply"], answer["errorcode"]) == (200, "", 0)
    assert ask(relay, "/" + hand.name, dict(body, at=0))[0] == 502


@pytest.mark.parametrize("path, body", [
    ("", {"message": "x"}), ("", {"message": "x", "stream": True}),
    ("", {"message": "x", "key": "k"})])
def test_a_client_that_hangs_up_is_noticed_within_a_second(relay, hand, path, body):
    if "key" in body:
        body = dict(body, key=name_of())
    sock = sent(relay, "/" + hand.name, body)
    job = hand.next_job()
    reader_job = relay.broker._jobs[job["job"]]
    time.sleep(0.3)                        # until it is watched; either way must do
    sock.close()
    began = time.monotonic()
    until(lambda: reader_job.readers == 0)
    assert time.monotonic() - began < 1
    while not hand.poll()["cancel"]:       # after the grace time
        pass
    assert 0.9 < time.monotonic() - began < 4


def test_through_v1_a_client_that_hangs_up_cancels_at_once(relay, hand):
    for stream in (False, True):
        sock = sent(relay, "/v1/chat/completions", {
            "model": hand.name, "stream": stream,
            "messages": [{"role": "user", "content": "x"}]})
        job = hand.next_job()
        sock.close()
        began = time.monotonic()
        assert [job["job"], job["attempt"]] in hand.poll()["cancel"]
        assert time.monotonic() - began < 1
        hand.reply(job, error="cancelled")


def test_a_stop_cancels_at_once_and_a_second_one_does_no_harm(relay, hand):
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


def test_a_client_that_gives_up_and_retries_five_times_causes_one_generation(relay, hand):
    body = json.dumps({"message": "slow"}).encode()
    for _ in range(4):
        connection = http.client.HTTPConnection(*relay.server_address[:2], timeout=0.4)
        connection.request("POST", "/" + hand.name, body)
        with pytest.raises(socket.timeout):
            connection.getresponse()
        connection.close()
    job = hand.next_job()
    last = in_thread(ask, relay, "/" + hand.name, body)
    until(lambda: relay.broker._jobs[job["job"]].readers)
    hand.reply(job, ["done"], done=True)
    assert last()[1]["reply"] == "done"
    assert relay.broker.find(hand.name).numreq == 1


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


def test_connected_turns_false_within_a_second_of_a_providers_end(relay, hand):
    sock = sent(relay, "/provider/%s/poll" % hand.name, {"session": hand.session},
                Authorization="Bearer " + hand.key)
    service = relay.broker.find(hand.name)
    until(lambda: service.idle)
    model = next(m for m in ask(relay, "/api/models")[1] if m["name"] == hand.name)
    assert model["connected"] and model["queuelen"] == 0
    sock.close()
    began = time.monotonic()
    until(lambda: not relay.broker.model(service)["connected"])
    assert time.monotonic() - began < 1


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
    assert time.monotonic() - began < 1
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


def test_an_error_reply_arrives_although_the_request_is_too_large(relay):
    body = b"x" * (8 << 20)
    for _ in range(20):
        status, answer, _ = ask(relay, "/nosuch", body)
        assert status == 413 and answer["error"] == "request_too_large"


def test_requests_on_one_connection_are_answered_in_order(relay):
    one = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    two = b"GET /nosuch/x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    answers = raw(relay, one + two)
    assert answers.index(b"200 OK") < answers.index(b"404 Not Found")


def test_a_chunked_request_is_read_and_cannot_smuggle_another(relay, hand):
    head = b"POST /%s HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" \
        % hand.name.encode()
    body = b'5\r\n{"com\r\n16;a=b\r\nmand":"getmodels"    }\r\n0\r\n\r\n'
    assert raw(relay, head + body).startswith(b"HTTP/1.1 200")
    for bad in (b"5 x\r\n", b"-5\r\n", b"0x5\r\n", b"5\r\nabcdefg\r\n", b"FFFFFFFFF\r\n",
                b"0\r\nTrailer: x\r\n\r\n"):
        answer = raw(relay, head + bad + b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answer.count(b"HTTP/1.1") == 1 and b" 400 " in answer[:20]


def test_head_and_options_are_answered(relay):
    answer = raw(relay, b"HEAD /api/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200") and answer.endswith(b"\r\n\r\n")
    status, _, headers = ask(relay, "/v1/models", method="OPTIONS",
                             Access_Control_Request_Headers="authorization, x-stainless-os")
    assert status == 204
    assert headers["Access-Control-Allow-Headers"] == "authorization, x-stainless-os"
    assert headers["Access-Control-Allow-Origin"] == "*"


def test_an_expected_continue_comes_only_if_the_body_is_wanted(relay, hand):
    head = b"POST /%s HTTP/1.1\r\nHost: x\r\nExpect: %s\r\nContent-Length: %d\r\n" \
        b"Connection: close\r\n\r\n"
    body = b'{"command":"getmodels"}'
    name = hand.name.encode()
    good = raw(relay, head % (name, b"100-continue", len(body)) + body)
    assert good.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200")
    assert raw(relay, head % (name, b"100-continue", 1 << 30)).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize("data", [
    b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 20000 + b"\r\n\r\n",
    b"POST /a HTTP/1.1\r\nHost: x\r\n\r\n", b"nonsense\r\n\r\n", b"\x16\x03\x01\x02\x00",
    b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nshort"])
def test_broken_requests_are_answered_or_closed_and_never_a_500(relay, data):
    answer = raw(relay, data)
    assert not answer or answer[9:10] == b"4"
    assert not relay.errors.get("internal_error")


def test_a_head_that_drips_is_cut_in_the_end(relay):
    began = time.monotonic()
    with socket.create_connection(relay.server_address[:2], SOON) as sock:
        with contextlib.suppress(OSError):
            while time.monotonic() - began < SOON:
                sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n"[:1])
                time.sleep(0.2)
        assert 0.8 < time.monotonic() - began < 5


def test_a_header_of_ours_cannot_be_ill_formed(relay):
    handler = object.__new__(neuroengine_server.Handler)
    handler.server, handler.id, handler.openai, handler.keep_alive = relay, "x", False, True
    with pytest.raises(ValueError):
        handler.head_bytes(200, "text/plain", {"x": "a\r\nInjected: b"})


def test_connections_are_bounded_and_the_next_one_hears_why():
    with running_relay(limits=Limits(max_connections=2)) as relay:
        with socket.create_connection(relay.server_address[:2]), \
                socket.create_connection(relay.server_address[:2]):
            until(lambda: relay.connections == 2)
            status, answer, headers = ask(relay, "/healthz")
            assert status == 503 and answer["error"] == "relay_busy"
            assert headers["Retry-After"]
        until(lambda: relay.connections == 0)
        assert ask(relay, "/healthz")[0] == 200


def test_the_relay_logs_neither_prompt_nor_reply_nor_key(relay, hand, capfd):
    secret = "canary" + uuid.uuid4().hex
    answer = in_thread(ask, relay, "/" + hand.name, {"message": secret, "key": secret})
    hand.reply(hand.next_job(), [secret + "reply"], done=True)
    answer()
    ask(relay, "/" + secret, {"message": secret}, Authorization="Bearer " + secret)
    ask(relay, "/api/services", {"name": name_of(), "comment": "x"})
    hand.logout()
    out, err = capfd.readouterr()
    assert secret not in out + err and hand.key not in out + err and "registered" in err


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs the openssl program")
def test_tls_a_silent_peer_holds_up_nobody_and_a_hang_up_is_noticed(tmp_path):
    cert, key = neuroengine_server.self_signed(str(tmp_path))
    with running_relay(tls=neuroengine_server.tls_context(cert, key),
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
            sock.sendall(b'POST /Tls HTTP/1.1\r\nHost: x\r\nContent-Length: 15\r\n\r\n'
                         b'{"message":"x"}')
            until(lambda: relay.broker.find("Tls").numreq)
            time.sleep(0.4)
            sock.close()
            assert closed.wait(2)
            provider.stop()


def test_a_page_is_served_with_a_policy_of_hashes(relay):
    status, page, headers = ask(relay, "/")
    assert status == 200 and page == relay.page
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert ask(relay, "/Some-Name")[0] == 200 and ask(relay, "/v1/nosuch")[0] == 404


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
    assert deltas[1] == {"reasoning_content": "hm"}
    assert [d["tool_calls"] for d in deltas if "tool_calls" in d] == [
        item["tool_calls"] for item in items if "tool_calls" in item]


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
    ({}, 400, "invalid_value", "model"), ({"model": "nosuch"}, 404, "model_not_found",
                                          "model"),
    ({"model": "{}"}, 400, "invalid_value", "messages"),
    ({"model": "{}", "messages": []}, 400, "invalid_value", "messages"),
    ({"model": "{}", "messages": [{"role": "user", "content": "x"}], "n": 2}, 400,
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


def test_an_offline_service_is_503_with_retry_after_and_not_listed(relay, hand):
    hand.logout()
    status, answer, headers = chat(relay, hand.name)
    assert status == 503 and answer["error"]["code"] == "provider_offline"
    assert headers["Retry-After"]
    listed = [m["id"] for m in ask(relay, "/v1/models")[1]["data"]]
    everything = [m["id"] for m in ask(relay, "/v1/models?all=1")[1]["data"]]
    assert hand.name not in listed and hand.name in everything
    assert ask(relay, "/v1/models/" + hand.name)[1]["status"] == "offline"


def test_an_error_amid_a_streamed_chat_is_an_event_and_the_body_ends_well(relay, hand):
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


def test_the_place_in_the_queue_is_a_comment_or_a_field_if_asked(relay, hand):
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
            until(lambda: not relay.broker.find(hand.name).waiting)


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages", "/v1/nosuch/x"])
def test_what_openai_has_and_we_have_not_is_unknown_url(relay, path):
    status, answer, _ = ask(relay, path, {})
    assert status == 404 and answer["error"]["code"] == "unknown_url"


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


@pytest.mark.parametrize("answer, reply", [
    ('{"reply": "This is the LLM"}', "This is the LLM"), ("plain", "plain"),
    ({"reply": "dict"}, "dict"), (["a", "b"], "ab"), ('{"no": "r"}', '{"no": "r"}'),
    ("{broken", "{broken"), ("snow \u2603 \U0001f600", "snow \u2603 \U0001f600"),
    ("", "")])
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


def test_messages_become_a_prompt_for_a_callback_that_takes_text(relay, provide):
    name, _ = provide(lambda request: request["message"])
    api = client_of(relay, name)
    assert api.request([{"role": "user", "content": "hi"}]) == "hi"
    assert api.request([
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]}]) == (
            "System: Be brief.\n\nUser: hi\n\nAssistant:")
    assert chat(relay, name)[1]["choices"][0]["message"]["content"] == "hi"
    answer = ask(relay, "/v1/completions", {"model": name, "prompt": "once"})[1]
    assert answer["choices"][0]["text"] == "once"


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


def test_closing_the_stream_closes_the_providers_iterator_within_a_second(relay, provide):
    closed = threading.Event()

    def answer(request):
        try:
            while True:
                yield "x"
                time.sleep(0.01)
        finally:
            closed.set()
    name, _ = provide(answer)
    stream = client_of(relay, name).stream("x")
    next(stream)
    stream.close()
    assert closed.wait(1)


def test_cancel_stops_a_polled_stream(relay, provide):
    closed = threading.Event()

    def answer(request):
        try:
            while True:
                yield "x"
                time.sleep(0.01)
        finally:
            closed.set()
    name, _ = provide(answer)
    api = client_of(relay, name)
    assert api.request("x", streamkey="s" * 32, gettokens=1)
    api.cancel("s" * 32)
    assert closed.wait(1)


def test_a_stream_whose_provider_was_lost_is_begun_anew_or_told_at_once(relay, hand):
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
    lose(second)
    began = time.monotonic()
    with pytest.raises(NeuroengineError, match="went away"):
        next(stream)
    assert time.monotonic() - began < 0.1


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


def test_request_never_raises_and_stream_and_getmodels_do():
    with contextlib.closing(socket.socket()) as sock:
        sock.bind(("127.0.0.1", 0))
        api = Neuroengine("x", "http://127.0.0.1:%d" % sock.getsockname()[1])
        assert "Connection error" in api.request("hi", tries=1)
        for call in (lambda: list(api.stream("hi", tries=1)), api.getModels):
            with pytest.raises(NeuroengineError) as failed:
                call()
            assert failed.value.errorcode == -1
        assert NeuroengineServer(api._transport.base).login("x", "y") == -1


def test_login_tells_a_wrong_key_by_a_negative_number(relay, hand):
    server = NeuroengineServer(relay.url)
    assert server.login(hand.name, "wrong") == -30
    assert server.login("nosuch", "wrong") == -40
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


@pytest.mark.parametrize("address, port, url", [
    ("host.example", 443, "https://host.example:443"), ("host", 8443, "https://host:8443"),
    ("http://localhost:8000/", 443, "http://localhost:8000"),
    ("host:99", 443, "https://host:99"), ("[::1]:99", 443, "https://[::1]:99")])
def test_an_address_is_a_host_name_or_a_url(address, port, url):
    assert neuroengine.relay_url(address, port) == url


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


def test_outbox_repeats_until_settled_and_forgets_after_the_end():
    outbox = neuroengine.Outbox()
    work = neuroengine.Work("j", 1, 0, {})
    assert outbox.add(work) and not outbox.add(neuroengine.Work("j", 1, 0, {}))
    outbox.put(work, "a")
    entries, taken = outbox.take()
    outbox.put(work, "b")
    outbox.settle(taken, sent=False)
    entries, taken = outbox.take()
    assert entries == [{"job": "j", "attempt": 1, "at": 0, "items": ["a", "b"]}]
    outbox.settle(taken, sent=True)
    outbox.end(work)
    entries, taken = outbox.take()
    assert entries == [{"job": "j", "attempt": 1, "at": 2, "items": [], "done": True}]
    outbox.settle(taken, sent=True)
    assert outbox.running() == []


def test_outbox_sends_a_long_outage_in_pieces(monkeypatch):
    monkeypatch.setattr(neuroengine, "MAX_BATCH_BYTES", 10)
    outbox, got = neuroengine.Outbox(), []
    work = neuroengine.Work("j", 1, 0, {})
    outbox.add(work)
    for n in range(30):
        outbox.put(work, "abc")
    outbox.end(work)
    while outbox.running():
        entries, taken = outbox.take()
        assert entries[0]["at"] == len(got) and len(entries[0]["items"]) <= 5
        got += entries[0]["items"]
        outbox.settle(taken, sent=True)
    assert got == ["abc"] * 30


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


def test_connections_are_kept_alive(relay, provide):
    name, _ = provide(count_to(1))
    api = client_of(relay, name)
    api.request("hi")
    before = relay.connections
    for _ in range(5):
        api.request("hi")
    assert relay.connections <= before      # those of other tests may end meanwhile


##############################################################################
# Bridge
##############################################################################


@contextlib.contextmanager
def serving(handler):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
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
    owner = "llamacpp"

    def do_GET(self):
        if self.path == "/v1/models":
            self.json(200, {"data": [{"id": "/secret/model.gguf",
                                      "owned_by": type(self).owner}]})
        else:
            self.json(404, {"error": "no"})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/embeddings":
            return self.json(501, {"error": "no embeddings"})
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
    """(the fake's class, the service's name, the Upstream), bridged to the relay."""
    fake = type("Fake", (FakeLLM,), {"got": [], "script": [], "gone": threading.Event()})
    with serving(fake) as url:
        upstream = neuroengine.Upstream(url)
        upstream.find()
        name, key = name_of("B"), None
        key = ask(relay, "/api/services", {"name": name})[1]["key"]
        provider = NeuroengineServer(relay.url)
        provider._ready = lambda: upstream.wait(pause=0.05)
        assert provider.login(name, key) == 0
        thread = threading.Thread(target=provider.listen, args=(upstream.answer, 2),
                                  kwargs={"continues": True}, daemon=True)
        thread.start()
        yield fake, name, upstream
        provider.stop()
        thread.join(SOON)


def test_the_bridge_translates_sampling_fields_and_hides_the_model(relay, llm):
    fake, name, _ = llm
    answer = client_of(relay, name).request("hi", max_new_len=7, seed=5)
    assert answer == "Hello"
    (path, body), = fake.got
    assert path == "/v1/chat/completions"
    assert body == {"model": "/secret/model.gguf", "stream": True, "temperature": 1.0,
                    "top_p": 0.9, "top_k": 40, "seed": 5, "max_tokens": 7,
                    "repeat_penalty": 1.2, "stream_options": {"include_usage": True},
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
    upstream = neuroengine.Upstream("http://x")
    upstream.kind = kind
    _, body = upstream.build({"message": "x", "repetition_penalty": 1.3})
    assert {name for name in body if "pen" in name} == names


def test_the_bridge_absorbs_upstream_quirks(relay, llm):
    fake, name, upstream = llm
    upstream.kind = "LM Studio"
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


def test_an_upstream_that_refuses_unknown_fields_is_asked_in_plain_words(relay, llm):
    fake, name, _ = llm
    fake.script.append((400, {"error": {"message": "unknown field top_k"}}))
    assert client_of(relay, name).request("hi") == "Hello"
    assert set(fake.got[1][1]) <= set(neuroengine.PLAIN_FIELDS)


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
        assert gone.wait(2)


def stop_keeping_alive(upstream):
    """The fake's threads outlive its listener: let go of the connections to them."""
    for handler in upstream._transport._opener.handlers:
        for free in getattr(handler, "_free", {}).values():
            while free:
                free.pop().close()


def test_an_upstream_that_goes_away_takes_the_service_offline_until_it_is_back(relay):
    fake = type("Fake", (FakeLLM,), {"got": [], "script": []})
    port = None
    with serving(fake) as url:
        port = int(url.rsplit(":", 1)[1])
        upstream = neuroengine.Upstream(url)
        upstream.find()
        name = name_of("B")
        key = ask(relay, "/api/services", {"name": name})[1]["key"]
        provider = NeuroengineServer(relay.url)
        provider._ready = lambda: upstream.wait(pause=0.05)
        assert provider.login(name, key) == 0
        thread = threading.Thread(target=provider.listen, args=(upstream.answer,),
                                  daemon=True)
        thread.start()
        api = client_of(relay, name)
        assert api.request("hi") == "Hello"
    stop_keeping_alive(upstream)
    waiting = in_thread(ask, relay, "/" + name, {"message": "x"}, Idempotency_Key="i")
    service = relay.broker.find(name)
    until(lambda: not service.sessions)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), fake)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    assert waiting()[1]["reply"] == "Hello"
    server.shutdown()
    server.server_close()
    provider.stop()
    thread.join(SOON)


def test_a_relay_is_not_taken_for_an_llm(relay):
    with pytest.raises(neuroengine.Unavailable):
        neuroengine.Upstream("http://127.0.0.1:9").find()
    Hand(relay)
    with pytest.raises(neuroengine.Unavailable, match="a relay, not an LLM"):
        neuroengine.Upstream(relay.url).find()


def test_a_started_answer_goes_on_through_the_upstreams_prefill():
    upstream = neuroengine.Upstream("http://x")
    upstream.kind = "llama.cpp"
    so_far = {"reply_so_far": "Once upon"}
    assert upstream.build(dict(so_far, message="a", raw="True"))[1]["prompt"] == "aOnce upon"
    _, body = upstream.build(dict(so_far, message="a"))
    assert body["messages"][-1] == {"role": "assistant", "content": "Once upon"}
    upstream.kind = "vLLM"
    assert upstream.build(dict(so_far, message="a"))[1]["continue_final_message"] is True


##############################################################################
# Command lines, signals, and what a crash leaves
##############################################################################


class Program:
    """One of our programs, started as a user would, with its output gathered."""

    def __init__(self, *args, **environment):
        self.process = subprocess.Popen(
            [sys.executable, "-u"] + [str(a) for a in args], stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=HERE,
            env=dict(os.environ, PYTHONDONTWRITEBYTECODE="1", **environment))
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
        code = self.process.wait(40)
        self._reader.join(SOON)
        self.process.stdout.close()
        return code


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
        time.sleep(0.01)
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


def test_ask_models_and_register_do_what_they_say(start, tmp_path):
    relay = Address(start("neuroengine_server.py", "--demo", "--port", 0))
    environment = {"NEUROENGINE_SERVER": relay.url}
    for args, pattern in ((["I am sad"], "How long have you been sad"),
                          (["ask", "--service", "Eliza", "I am sad"], "been sad"),
                          (["models"], "Eliza +connected"),
                          (["register", "New"], "Registered New"),
                          (["register", "New"], "The name 'New' is taken"),
                          (["ask", "--service", "nosuch", "x"], "no service nosuch")):
        program = start("neuroengine.py", *args, **environment)
        program.says(pattern)
        program.process.wait(SOON)
        assert "Traceback" not in program.output


def test_a_busy_port_or_a_missing_certificate_is_one_sentence(start, relay, tmp_path):
    port = relay.server_address[1]
    for args, words in ((["--port", port, "--host", "127.0.0.1", "--demo"], "Cannot listen"),
                        (["--port", 0, "--cert", "nosuch.pem", "--demo"], "nosuch.pem"),
                        (["--port", 0, "--data", "/nosuch/dir/x"], "/nosuch/dir/x")):
        program = start("neuroengine_server.py", *args)
        assert program.process.wait(SOON) == 1
        program.says(words)
        assert "Traceback" not in program.output


def test_help_names_every_option_and_its_default():
    text = neuroengine_server.build_parser().format_help()
    for name, default, _ in neuroengine_server.LIMITS:
        assert "--" + name.replace("_", "-") in text
    for command in neuroengine.COMMANDS:
        assert command in neuroengine.build_parser().format_help()


def test_ctrl_c_of_a_provider_hands_its_jobs_back_at_once(start, relay):
    hand = Hand(relay)
    hand.logout()
    first = start("-c", PROVIDER, relay.url, hand.name, hand.key)
    first.says("login 0")
    # A client that waits for the whole reply has seen no token of it.
    answer = in_thread(Neuroengine(hand.name, relay.url).request, "200")
    service = relay.broker.find(hand.name)
    job = until(lambda: [j for s in service.sessions.values() for j in s.jobs.values()])[0]
    until(lambda: len(job.items) > 5)
    began = time.monotonic()
    first.process.send_signal(signal.SIGINT)
    until(lambda: job.state == "queued")
    assert time.monotonic() - began < 1
    second = start("-c", PROVIDER, relay.url, hand.name, hand.key)
    assert answer() == numbers(200)
    first.says("listen returned")
    assert first.process.wait(SOON) == 0 and "Traceback" not in first.output
    second.end(signal.SIGINT)


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_a_provider_killed_amid_a_whole_reply_is_replaced(start, relay):
    hand = Hand(relay)
    hand.logout()
    first = start("-c", PROVIDER, relay.url, hand.name, hand.key)
    first.says("login 0")
    answer = in_thread(Neuroengine(hand.name, relay.url).request, "100")
    service = relay.broker.find(hand.name)
    job = until(lambda: [j for s in service.sessions.values() for j in s.jobs.values()])[0]
    until(lambda: len(job.items) > 5)
    began = time.monotonic()
    first.end(signal.SIGKILL)
    until(lambda: job.state == "queued")
    assert time.monotonic() - began < 1
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
    until(lambda: ask(relay, "/" + hand.name, {"message": "y"})[0] == 503)
    hand.reply(job, ["finished"], done=True)
    assert answer()[1]["reply"] == "finished"
    assert program.process.wait(SOON) == 0
    poll()
    assert "Traceback" not in program.output


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_a_signal_that_reaches_another_thread_than_the_main_one_ends_the_relay(start):
    program = start("-c", """
import neuroengine_server, signal, threading
threading.Timer(0.5, lambda: signal.pthread_kill(
    threading.get_ident(), signal.SIGTERM)).start()
neuroengine_server.main(["--demo", "--port", "0"])""")
    assert program.process.wait(SOON) == 0


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_after_kill_9_and_a_restart_everything_goes_on_by_itself(start, tmp_path):
    program, relay = start_relay(start, tmp_path)
    hand = Hand(relay)
    hand.logout()
    provider = start("-c", PROVIDER, relay.url, hand.name, hand.key)
    provider.says("login 0")
    api = Neuroengine(hand.name, relay.url)
    assert api.request("3") == numbers(3)
    time.sleep(1.1)                        # the promise: counters within a second
    answer = in_thread(api.request, "100")
    until(lambda: api.getModels()[0]["running"])
    port = relay.server_address[1]
    program.end(signal.SIGKILL)
    program, relay = start_relay(start, tmp_path, port=port)
    assert answer() == numbers(100)
    model, = api.getModels()
    assert model["name"] == hand.name and model["connected"] and model["numreq"] >= 2
    assert program.end() == 0
    provider.end(signal.SIGINT)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it reads /proc")
def test_a_short_fault_run_loses_and_doubles_nothing():
    spec = importlib.util.spec_from_file_location(
        "faults", os.path.join(HERE, "bench", "faults.py"))
    faults = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(faults)
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
        assert program.process.wait(SOON) == 0
        assert "Roses are red" in program.output
