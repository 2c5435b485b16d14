#!/usr/bin/env python3
"""A random walk of the relay's Broker on a fake clock: nothing lost, nothing twice.

    python bench/checks/walk.py [--walks 200] [--steps 2000] [--seed N]

Prompts of all kinds are submitted, found again, read, left and cancelled; providers log in,
poll, push, repeat themselves, leave gaps, lose responses, come back too late and vanish;
services are deleted, keys revoked, memory runs out, time passes. While a poll or a read
waits, other steps happen. After each step the Broker's records are compared
with each other, and what readers got with what the providers said; at the end everything
must be over. One thread, no sockets; the same seed is the same walk.

The test suite runs a few short walks. Exit status 1 if anything was wrong.
"""

import argparse
import contextlib
import os
import random
import sys
import threading
import traceback

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

import neuroengine_server as ne

CALLERS = ("203.0.113.1", "203.0.113.2", "203.0.113.3", "2001:db8::/64", "2001:db8:0:1::/64")
LIMITS = dict(
    max_queue=10, max_queue_per_caller=4, max_held_bytes=150000, max_reply_bytes=9000,
    max_sessions=3, max_prompts_per_minute=10**6, max_anonymous_per_day=10**6)
STALE = "stale"          # what providers push for jobs that are not theirs any more
DEEPEST = 30             # how deep steps may happen within steps


class Wrong(Exception):
    """Something was wrong; the message says what."""


def insist(fact, words, *values):
    if not fact:
        raise Wrong(words % values)


def item_of(job, number):
    """The item that any provider makes for a job at this offset: text, mostly."""
    number += job.number
    if number % 11 == 0:
        return b'{"reasoning":"%d"}' % number
    return "%d " % number * (60 if number % 7 == 0 else 1)


def group(job):
    return ne.widest_group(job.caller)


class Fair(ne.Queue):
    """A Queue that looks at whom it passes over."""

    def take(self, session):
        job = super().take(session)
        for other in self if job is not None else ():
            mine = other.caller == job.caller and other.by_operator == job.by_operator and (
                other.urgent == job.urgent)
            if session.may_take(other):
                insist(not mine or other.number > job.number or job.returned,
                       "%s overtook %s", job.number, other.number)
                insist(not other.by_operator or job.by_operator or job.returned
                       or any(third.by_operator and third.number < other.number
                              and group(third) == group(other) for third in self),
                       "%s before the operator's %s", job.number, other.number)
                insist(not other.returned or job.returned and job.number < other.number,
                       "%s before the returned %s", job.number, other.number)
        return job


class Provider:
    """What one session's program believes. It is right, unless responses got lost."""

    def __init__(self, service, id, continues):
        self.service, self.id, self.continues = service, id, continues
        self.running = {}             # (job id, attempt) -> [Job, offset of the next item,
                                      # how many it has made]

    def take(self, offers, cancels):
        for job, attempt, at, text in offers:
            insist(at == 0 or text is not None, "an offer at %d without its text", at)
            insist(at == 0 or self.continues, "a begun answer for one that cannot go on")
            self.running[job.id, attempt] = [job, at, at]
        for pair in cancels:
            self.running.pop(pair, None)


class Prompt:
    """One reader, and what it got."""

    def __init__(self, reader, caller, identity):
        self.reader, self.caller, self.identity = reader, caller, identity
        self.start, self.ended = reader.cursor, False


class Walk:
    """One Broker, its clock, and all who use it."""

    def __init__(self, seed):
        self.rand = random.Random(seed)
        self.time, self.depth = 1000.0, 0
        self.broker = ne.Broker(ne.Limits(**LIMITS), clock=lambda: self.time,
                                wall=lambda: self.time)
        self.services, self.providers, self.prompts = [], [], []
        self.identities, self.sessions_of, self.done = [], {}, {}
        self.keys = []
        for name in ("One", "Two"):
            self.add_service(name)
        self.moves = [
            (12, self.submit), (5, self.find_again), (12, self.read), (4, self.leave),
            (2, self.hang_up), (1, self.cancel), (3, self.log_in), (14, self.poll),
            (16, self.push), (2, self.push_nonsense), (2, self.forget), (1, self.log_out),
            (2, self.lose_poll), (5, self.wait), (1, self.keep_encoded), (1, self.position),
            (0.3, self.change_key), (0.2, self.delete_service), (0.3, self.revoke_key)]

    # -- steps --

    def step(self):
        weights, moves = zip(*self.moves)
        move, = self.rand.choices(moves, weights)
        try:
            move()
        except ne.RelayError as error:
            insist(error.words and error.name in ne.ERRORS, "no words: %r", error.name)
        return move.__name__

    def pick(self, of):
        return self.rand.choice(of) if of else None

    def add_service(self, name):
        service = ne.Service(name, "digest")
        service.queue = Fair()
        self.broker.add(service)
        self.services.append(service)
        for n in range(2):
            key = ne.AccessKey("%s%d%f" % (name, n, self.time), "digest", "", 0, None, None,
                               self.rand.choice((None, 3)), None, None, 0, 0, 0, None)
            service.keys[key.id] = key
            self.keys.append(key)

    def submit(self):
        rand, service = self.rand, self.pick(self.services)
        kind = rand.random()
        access = self.pick(list(service.keys.values())) if kind < 0.2 else None
        address = rand.choice(CALLERS)
        caller = "key " + access.id if access else address
        identity = None
        if rand.random() < 0.6:
            identity = ne.Identity(rand.choice(("stream", "repeat", "body")), service, caller,
                                   "%d" % rand.randrange(10**9), fingerprint=b"f")
            self.identities.append(identity)
        job = ne.Job(
            service, b"x" * rand.choice((2, 50, 3000, 9000)), caller, holder=address,
            rated=True, by_operator=kind > 0.9, wait=rand.random() < 0.5,
            grace=rand.choice((None, None, 0)), access=access, urgent=rand.random() < 0.1,
            needs=rand.choice((None,) * 4 + ("chat",)),
            prefixes=rand.choice(((), (b"a",), (b"a", b"b"))))
        self.attach(lambda: self.broker.submit(job, identity, 0), identity)

    def attach(self, open_reader, identity):
        reader = open_reader()
        self.prompts.append(Prompt(reader, reader.job.caller, identity))
        # A read that waits lets others do what they do.
        reader.woken = SteppingCondition(self)

    def find_again(self):
        identity = self.pick(self.identities)
        if identity is None:
            return
        if self.rand.random() < 0.3:
            identity = ne.Identity(identity.kind, identity.key[1], *identity.key[2:],
                                   fingerprint=self.rand.choice((b"f", b"other")))
        self.attach(lambda: self.broker.open(identity, self.rand.choice((0, 0, 3, 10**6))),
                    identity)

    def read(self):
        prompt = self.pick(self.prompts)
        if prompt is None:
            return
        reader, job = prompt.reader, prompt.reader.job
        if not reader.attached:
            return
        at = reader.cursor
        self.broker.wait_for_items(
            reader, self.rand.choice((1, 2, None)), self.rand.choice((0, 0, 5)))
        items, ended = self.broker.read(reader, self.rand.choice((None, 1, 5)))
        # Others may have read with this reader while it waited.
        insist(reader.cursor - at >= len(items), "the cursor went back")
        at = reader.cursor - len(items)
        for number, item in enumerate(items, at):
            insist(item == item_of(job, number), "job %s, item %d is %r", job.number, number,
                   item)
        insist(not (prompt.ended and items), "items after the end")
        prompt.ended = prompt.ended or ended
        # A reader may claim to have had more than there will be, of an answer begun anew.
        if ended and job.error is None and prompt.start <= self.done.get(job.id, 0):
            insist(self.done.get(job.id) == reader.cursor, "job %s ended at %d, said %s",
                   job.number, reader.cursor, self.done.get(job.id))

    def leave(self):
        prompt = self.pick(self.prompts)
        if prompt is not None:
            self.prompts.remove(prompt)
            self.broker.leave(prompt.reader, prompt.ended and self.rand.random() < 0.8)

    def hang_up(self):
        prompt = self.pick(self.prompts)
        if prompt is not None:
            self.prompts.remove(prompt)
            self.broker.hang_up(prompt.reader)

    def cancel(self):
        prompt = self.pick(self.prompts)
        if prompt is not None:
            lease = prompt.reader.job.lease
            known = lease is not None and lease.state != "offered"
            self.broker.cancel(prompt.reader.job)
            insist(not known or lease.state == "cancelled", "its provider is not told")

    def log_in(self):
        service, continues = self.pick(self.services), self.rand.random() < 0.5
        id = self.broker.login(service, self.rand.choice((1, 1, 2, 5)), continues=continues,
                               apis=self.rand.choice(((), ("chat",))))
        self.broker._sessions[id].has_response = SteppingCondition(self)
        self.providers.append(Provider(service, id, continues))

    def poll(self):
        provider = self.pick(self.providers)
        if provider is None:
            return
        running = list(provider.running)
        if self.rand.random() < 0.05:
            running += [("unknown", self.rand.randrange(3)), self.pick(running) or ("a", 1)]
        token = ne.Poll()
        try:
            offers, cancels = self.broker.poll(provider.service, provider.id, token, running,
                                               self.rand.choice((0, 0, 20)))
        except ne.RelayError:
            return self.ended(provider)
        for job, attempt, _, _ in offers:
            sessions = self.sessions_of.setdefault(job.id, set())
            sessions.add(provider.id)
            insist(len(sessions) <= 3, "job %s went to %d sessions", job.number, len(sessions))
        lost = self.rand.random()
        if lost < 0.9:
            provider.take(offers, cancels)
        elif lost < 0.95:                  # the response is lost, and the connection with it
            self.broker.poll_broken(provider.id, token)

    def ended(self, provider):
        if provider in self.providers and self.rand.random() < 0.8:
            self.providers.remove(provider)

    def push(self):
        provider = self.pick(self.providers)
        pair = self.pick(list(provider.running)) if provider is not None else None
        if pair is None:
            return
        rand, (job, at, made) = self.rand, provider.running[pair]
        valid = self.may_push(provider, pair, at)
        start = max(0, at - rand.choice((0, 0, 0, 1, 5))) + rand.choice((0,) * 9 + (3,))
        end = max(made, at + rand.choice((0, 1, 1, 3, 8)))
        provider.running[pair][2] = end
        items = [item_of(job, n) if valid else STALE for n in range(start, end)]
        entry = {"job": pair[0], "attempt": pair[1], "at": start, "items": items}
        ending = rand.random()
        if start <= at <= end and ending < 0.3:
            entry["done"] = ending < 0.25
            if not entry["done"]:
                entry["error"] = ne.RelayError("provider_error", "It failed.")
        try:
            refused, offers, cancels = self.broker.push(provider.service, provider.id, [entry])
        except ne.RelayError:
            return self.ended(provider)
        insist(valid or refused, "items of %s were taken, and it is not its", job.number)
        if entry.get("done") and not refused:
            insist(job.id not in self.done, "job %s was answered twice", job.number)
            self.done[job.id] = end
        if rand.random() < 0.05:           # the response is lost: all of it comes again
            return
        for job_, attempt, _, _ in offers:
            self.sessions_of.setdefault(job_.id, set()).add(provider.id)
        provider.take(offers, cancels)
        if any(refusal["error"] == "fenced" for refusal in refused) or (
                not refused and ("done" in entry or "error" in entry)):
            provider.running.pop(pair, None)
        elif refused:
            provider.running[pair][1] = refused[0]["at"]
        elif pair in provider.running:
            provider.running[pair][1] = max(end, start)

    def may_push(self, provider, pair, at):
        """Whether this lease is the session's, or may be so again."""
        session = self.broker._sessions.get(provider.id)
        if session is None or session.service is not provider.service:
            return False
        lease, job = session.leases.get(pair), self.broker._jobs.get(pair[0])
        if lease is not None:
            return lease.state != "cancelled"
        return job is not None and job.state == "queued" and job.attempt == pair[1]

    def push_nonsense(self):
        provider, prompt = self.pick(self.providers), self.pick(self.prompts)
        if provider is None:
            return
        pair = (prompt.reader.job.id if prompt is not None else "x", self.rand.randrange(4))
        if not self.may_push(provider, pair, 0):
            with contextlib.suppress(ne.RelayError):
                refused, offers, cancels = self.broker.push(provider.service, provider.id, [
                    {"job": pair[0], "attempt": pair[1], "at": 0, "items": [STALE],
                     "done": True}])
                insist(refused, "a made-up lease was believed")
                provider.take(offers, cancels)

    def forget(self):
        """The provider's program lost a job."""
        provider = self.pick(self.providers)
        if provider is not None and provider.running:
            del provider.running[self.pick(list(provider.running))]

    def log_out(self):
        provider = self.pick(self.providers)
        if provider is not None:
            self.providers.remove(provider)
            self.broker.logout(provider.service, provider.id)

    def lose_poll(self):
        provider = self.pick(self.providers)
        session = provider and self.broker._sessions.get(provider.id)
        if session is not None and session.poll is not None:
            self.broker.poll_broken(provider.id, session.poll)
            if self.rand.random() < 0.5:   # for good
                self.providers.remove(provider)

    def wait(self):
        self.time += self.rand.choice((0.1, 0.6, 1, 1, 3, 6, 16, 16, 40))
        self.broker.expire()

    def keep_encoded(self):
        prompt = self.pick(self.prompts)
        if prompt is not None and prompt.reader.job.ended_at is not None:
            self.broker.keep_encoded(prompt.reader.job, "native", b"e" * 2000)

    def position(self):
        for service in self.services:
            ranks = [self.broker.queue_position(job)["position"] for job in service.queue]
            insist(sorted(ranks) == list(range(1, len(ranks) + 1)), "positions %r", ranks)

    def change_key(self):
        self.broker.close_sessions(self.pick(self.services))

    def delete_service(self):
        service = self.pick(self.services)
        self.services.remove(service)
        self.broker.remove(service)
        self.add_service(service.name)

    def revoke_key(self):
        service = self.pick(self.services)
        if service.keys:
            del service.keys[self.pick(list(service.keys))]

    # -- what must be true after each step --

    def check(self):
        broker, jobs = self.broker, self.broker._jobs
        queued = [job for service in self.services for job in service.queue]
        leases = [lease for session in broker._sessions.values()
                  for lease in session.leases.values()]
        insist(len(set(queued)) == len(queued), "a job is in the queue twice")
        for service in self.services:
            insist(service.queue.size == len(list(service.queue)), "the queue's size is wrong")
            insist(service.queue.size <= broker.limits.max_queue * 1.1 + sum(
                job.returned for job in service.queue), "the queue is too long")
            for job in service.queue:
                insist(service.queue.count_like(job) == sum(
                    not other.returned and other.by_operator == job.by_operator
                    and (job.by_operator or other.caller == job.caller)
                    for other in service.queue), "the count of %s is wrong", job.caller)
            for id, session in service.sessions.items():
                insist(broker._sessions.get(id) is session, "a session is half known")
            for session in service.idle:
                insist(session.parked and session.free() > 0 and not session.closed,
                       "a session is idle and is not")
        for job in jobs.values():
            places = (job in queued) + (job.lease is not None) + (job.ended_at is not None)
            insist(places == 1, "job %s, %s, is in %d places", job.number, job.state, places)
            insist((job.state == "queued") == (job in queued)
                   and (job.state == "leased") == (job.lease is not None),
                   "job %s is said to be %s", job.number, job.state)
            insist(job.lease is None or job.lease in leases and job.lease.job is job,
                   "the lease of %s is nobody's", job.number)
            insist(job.readers or job.has_timer, "job %s has no reader, and nothing ends it",
                   job.number)
            for item in job.items:
                insist(item != STALE, "job %s took items of a stale lease", job.number)
        for lease in leases:
            insist(lease.state != "handed_out" or lease.session.has_handover_timer,
                   "nothing looks whether a job has arrived")
            insist(lease.state == "cancelled" if lease.job is None else lease.job.lease is lease,
                   "a lease of no job is %s", lease.state)
            insist((lease in lease.session.outbox) == (lease.state in lease.TO_SAY)
                   or lease.state == "cancelled", "the outbox lacks a lease")
        for job in queued:
            insist(jobs.get(job.id) is job, "job %s waits and is unknown", job.number)
        self.check_memory()
        for key, job in broker._identified.items():
            insist(jobs.get(job.id) is job and job.identity.key == key,
                   "an identity finds a job that is gone")
        open_jobs = [job for job in jobs.values() if job.ended_at is None]
        for key in self.keys:
            insist(key.running == sum(job.access is key for job in open_jobs),
                   "key %s runs %d", key.id, key.running)
        counts = broker.counts
        insist(counts["jobs"] == len(open_jobs) + counts["done"] + counts["failed"]
               + counts["cancelled"], "prompts and their ends are not as many: %r", counts)
        for prompt in self.prompts:
            job = prompt.reader.job
            insist(not prompt.reader.attached or jobs.get(job.id) is job,
                   "job %s has a reader and is forgotten", job.number)
            insist(prompt.reader.cursor in range(prompt.start, 1 + max(
                job.seen, prompt.start)), "job %s was seen further", job.number)

    def check_memory(self):
        memory, by = self.broker._memory, {}
        for job in self.broker._jobs.values():
            by[job.holder] = by.get(job.holder, 0) + job.size
            size = ne.JOB_BYTES + len(job.payload) + ne.size_of(job.items) + (
                len(job.encoded[1]) if job.encoded else 0)
            insist(job.size == size, "job %s takes %d and counts %d", job.number, size,
                   job.size)
        insist(memory.held == sum(by.values()) <= memory.most, "memory is %d, jobs have %d",
               memory.held, sum(by.values()))
        insist({holder: memory.held_by(holder) for holder in memory._holdings} == by,
               "holders are wrong")

    def finish(self):
        """All leave, and time passes: nothing may be left."""
        for prompt in self.prompts:
            self.broker.hang_up(prompt.reader)
        self.prompts, broker = [], self.broker
        for _ in range(100):
            self.time += 20
            broker.expire()
        insist(not broker._jobs and not broker._identified and not broker._sessions,
               "left at the end: %r", list(broker._jobs.values()))
        insist(not broker._memory.held and not broker._memory._holdings,
               "memory is left at the end")
        insist(not len(broker._timers), "%d timers are left", len(broker._timers))
        insist(not broker._lock.deliveries, "deliveries are left")


class SteppingCondition(threading.Condition):
    """A condition whose wait() lets the walk take some steps, and some time pass."""

    def __init__(self, walk):
        super().__init__(walk.broker._lock.lock)
        self.walk = walk

    def wait(self, timeout=None):
        walk, lock = self.walk, self.walk.broker._lock.lock
        lock.release()
        try:
            if walk.depth < DEEPEST:
                walk.depth += 1
                for _ in range(walk.rand.randrange(4)):
                    walk.step()
                walk.depth -= 1
            walk.time += walk.rand.choice((0.1, 1, timeout or 1))
        finally:
            lock.acquire()

    def notify(self, n=1):
        pass

    notify_all = notify


def walk(seed, steps):
    """Take that many steps. Raises Wrong, or whatever else happens, with the last of them
    in its words."""
    one, taken = Walk(seed), []
    try:
        for _ in range(steps):
            taken.append(one.step())
            one.check()
        one.finish()
    except Exception as error:
        raise Wrong("seed %d, step %d (%s): %r" % (
            seed, len(taken), ", ".join(taken[-8:]), error)) from error
    return one


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--walks", type=int, default=200)
    parser.add_argument("--steps", type=int, default=2000, help="of each walk")
    parser.add_argument("--seed", type=int, help="of the first; otherwise a random one")
    options = parser.parse_args()
    seed = random.randrange(10**6) if options.seed is None else options.seed
    print("first seed", seed, flush=True)
    wrong, counts = 0, {}
    for n in range(options.walks):
        try:
            for name, count in walk(seed + n, options.steps).broker.counts.items():
                counts[name] = counts.get(name, 0) + count
        except Wrong:
            traceback.print_exc()
            wrong += 1
    print("%d walks of %d steps, wrong %d: %s" % (options.walks, options.steps, wrong, ", ".join(
        "%s %d" % pair for pair in counts.items())))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
