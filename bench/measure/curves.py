#!/usr/bin/env python3
"""What a job costs the relay's Broker, against the number of everything else.

No sockets, one process: microseconds a job (or an item, or a question), the best of
several batches, as JSON: {curve: [[how many, microseconds], ...]}. A curve that rises
shows something that is scanned. compare.py runs this and draws it.
"""

import argparse
import importlib.util
import itertools
import json
import os
import sys
import threading
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BATCHES, JOBS = 5, 200
ITEM = "word~ "


def load(file):
    """The relay's module, from that file."""
    spec = importlib.util.spec_from_file_location("relay", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["relay"] = module
    spec.loader.exec_module(module)
    return module


def best(work, count=JOBS):
    """Microseconds of one `work`, in the best batch."""
    times = []
    for _ in range(BATCHES):
        begun = time.perf_counter()
        for _ in range(count):
            work()
        times.append(time.perf_counter() - begun)
    return 1e6 * min(times) / count


class World:
    """A Broker with its upkeep, a service, and one session of many workers."""

    def __init__(self, relay, services=1):
        most = 10**6
        self.relay = relay
        self.broker = relay.Broker(relay.Limits(
            max_queue=most, max_queue_per_caller=most, max_services=most,
            max_sessions=most, max_reply_bytes=1 << 30, max_held_bytes=1 << 32))
        for number in range(services):
            self.service = relay.Service("S%d" % number, "digest")
            self.broker.add(self.service)
        self.session = self.broker.login(self.service, 1000)
        self.readers = {}
        self.callers = itertools.cycle("caller %d" % n for n in range(100))
        self.upkeep = threading.Thread(target=self.keep_up, daemon=True)
        self.upkeep.start()

    def keep_up(self):
        while self.broker.upkeep():
            pass

    def submit(self, caller=None):
        reader = self.broker.submit(self.relay.Job(
            self.service, b'{"message":"Hello"}', caller or next(self.callers), wait=True))
        self.readers[reader.job.id] = reader
        return reader

    def serve(self):
        """Take what waits, and answer it."""
        jobs, _ = self.broker.poll(self.service, self.session, self.relay.Poll(), (), 0)
        for job, attempt, at, _ in jobs:
            self.broker.push(self.service, self.session, [
                {"job": job.id, "attempt": attempt, "at": at, "items": [ITEM],
                 "done": True}])
            reader = self.readers.pop(job.id)
            self.broker.wait_for_items(reader, None, 1)
            self.broker.read(reader)
            self.broker.leave(reader, True)

    def job(self):
        self.submit()
        self.serve()

    def close(self):
        self.broker.close()
        self.upkeep.join()


def services(relay, count):
    """One job, from submit to leave."""
    world = World(relay, count)
    try:
        return best(world.job)
    finally:
        world.close()


def parked(relay, count):
    """One job, taken by one of `count` parked polls."""
    world = World(relay)
    broker, service = world.broker, world.service
    broker.logout(service, world.session)

    def provide(session):
        while not broker.closed:
            for job, attempt, at, _ in broker.poll(service, session, relay.Poll(), ())[0]:
                broker.push(service, session, [
                    {"job": job.id, "attempt": attempt, "at": at, "items": [ITEM],
                     "done": True}])

    def ask():
        reader = broker.submit(relay.Job(service, b'{"message":"Hello"}', wait=True))
        broker.wait_for_items(reader, None, 10)
        broker.read(reader)
        broker.leave(reader, True)

    threads = [threading.Thread(target=provide, args=(broker.login(service),), daemon=True)
               for _ in range(count)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 30
    while len(service.idle) < count and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        return best(ask)
    finally:
        world.close()
        for thread in threads:
            thread.join()


def waiting(world_of, work_of):
    """A curve over the number of jobs in the queue."""
    def curve(relay, count):
        world = world_of(relay)
        world.broker.logout(world.service, world.session)
        for _ in range(count):
            world.submit()
        try:
            return best(work_of(world))
        finally:
            world.close()
    return curve


def queued(relay, count):
    """One job comes and one is answered, while `count` wait."""
    world = World(relay)
    broker, service = world.broker, world.service
    broker.logout(service, world.session)
    for _ in range(count - 1):
        world.submit()
    world.session = broker.login(service, 1)        # one worker: the others go on waiting
    try:
        return best(world.job)
    finally:
        world.close()


def place_of(world):
    reader = world.submit()
    return lambda: world.broker.queue_position(reader.job)


def cancel_of(world):
    def work():
        world.broker.cancel(world.submit().job)
    return work


def answered(relay, count):
    """One more item of an answer, and one read of it."""
    world = World(relay)
    broker, service, session = world.broker, world.service, world.session
    reader = world.submit()
    ((job, attempt, _, _),), _ = broker.poll(service, session, relay.Poll(), (), 0)
    at = itertools.count(count)

    def item():
        broker.push(service, session, [
            {"job": job.id, "attempt": attempt, "at": next(at), "items": [ITEM]}])
        broker.wait_for_items(reader, 1, 1)
        broker.read(reader)

    broker.push(service, session, [
        {"job": job.id, "attempt": attempt, "at": 0, "items": [ITEM] * count}])
    broker.wait_for_items(reader, 1, 1)
    broker.read(reader)
    try:
        return best(item)
    finally:
        world.close()


CURVES = {  # title: (what is measured, how many there are)
    "job, by services": (services, (1, 10, 100, 1000, 10000)),
    "job, by parked polls": (parked, (1, 10, 100, 1000, 5000)),
    "job, by queued jobs": (queued, (1, 10, 100, 1000, 10000)),
    "place in the queue, by queued jobs": (waiting(World, place_of),
                                           (1, 10, 100, 1000, 10000)),
    "cancel of a queued job, by queued jobs": (waiting(World, cancel_of),
                                               (1, 10, 100, 1000, 10000)),
    "item, by items before it": (answered, (1, 10, 100, 1000, 10000, 100000)),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", nargs="?", default=os.path.join(ROOT, "neuroengine_server.py"),
                        help="the relay's file (default: that of this checkout)")
    parser.add_argument("--quick", action="store_true", help="at most 1,000 of each")
    options = parser.parse_args()
    relay = load(options.file)
    threading.stack_size(256 * 1024)
    curves = {}
    for title, (measure, counts) in CURVES.items():
        curves[title] = [[count, round(measure(relay, count), 2)] for count in counts
                         if count <= 1000 or not options.quick]
    print(json.dumps(curves))


if __name__ == "__main__":
    main()
