#!/usr/bin/env python3
"""The lean provider of compare.py: as little work as Python allows, and an LLM without delay.

    python bench/measure/provider.py PORT SERVICE KEY [tls]

One thread, one connection for polls and one for replies, raw sockets. While a reply is
under way, what is generated gathers for the next, as docs/provider-protocol.md says.
A prompt tells what to answer: "tokens=8 rate=50" is 8 tokens, the first at once, 50 a
second; rate=0 is all at once. Prints "ready" once it is logged in.
"""

import gc
import json
import re
import select
import socket
import ssl
import sys
import time

WORKERS = 1024
TOKEN = '"word~ "'
WISH = re.compile(r"tokens=(\d+) rate=(\d+)")


class Line:
    """A kept-alive connection to the relay, for one kind of request."""

    def __init__(self, port, path, key, tls):
        self.sock = socket.create_connection(("127.0.0.1", port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if tls:                            # trusting anyone: it is our own relay
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            # Of 1.3, a session ticket looks like an answer where none is due.
            context.maximum_version = ssl.TLSVersion.TLSv1_2
            self.sock = context.wrap_socket(self.sock)
        self.head = ("POST %s HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer %s\r\n"
                     "Content-Length: %%d\r\n\r\n%%s" % (path, key))
        self.busy = False

    def send(self, body):
        self.sock.sendall((self.head % (len(body), body)).encode("ascii"))
        self.busy = True

    def receive(self):
        """The body of the response, of which something has come."""
        data = self.sock.recv(1 << 18)
        while b"\r\n\r\n" not in data:
            data += self._more()
        head, body = data.split(b"\r\n\r\n", 1)
        length = int(re.search(rb"(?i)content-length: *(\d+)", head).group(1))
        while len(body) < length:
            body += self._more()
        if not head.startswith(b"HTTP/1.1 200"):
            sys.exit("the relay answered " + data.decode("utf-8", "replace"))
        self.busy = False
        return json.loads(body)

    def _more(self):
        data = self.sock.recv(1 << 18)
        if not data:
            sys.exit("the relay closed the connection")
        return data


class Provider:
    """The jobs in hand, and what was generated of them."""

    def __init__(self, port, service, key, tls):
        path = "/provider/%s/" % service
        login = Line(port, path + "login", key, tls)
        login.send('{"workers": %d}' % WORKERS)
        self.session = login.receive()["session"]
        self.polls = Line(port, path + "poll", key, tls)
        self.replies = Line(port, path + "reply", key, tls)
        self.replies.send('{"session": "%s"}' % self.session)     # a relay closes what is
        self.replies.receive()                                    # silent from the start
        self.jobs = {}       # id -> [attempt, tokens sent, tokens in all, rate, begun]
        self.done = []       # entries of jobs that were answered as they came
        self.interval = None      # seconds between steps of the running streams

    def tick(self):
        """The time, in whole steps, so that all streams are served together."""
        now = time.monotonic()
        return now // self.interval * self.interval if self.interval else now

    def take(self, answer):
        for job in answer["jobs"]:
            request = job["request"]
            text = request.get("message") or request["messages"][-1]["content"]
            tokens, rate = map(int, WISH.search(text).groups())
            if rate:
                self.interval = min(self.interval or 1, max(0.001, 1 / rate))
                self.jobs[job["job"]] = [job["attempt"], 0, tokens, rate, self.tick()]
            else:
                self.done.append('{"job":"%s","attempt":%d,"at":0,"items":[%s],"done":true}'
                                 % (job["job"], job["attempt"],
                                    ",".join([TOKEN] * tokens)))
        for job, _ in answer["cancel"]:
            self.jobs.pop(job, None)

    def entries(self):
        """What is due, as JSON."""
        entries, self.done, now, ended = self.done, [], self.tick(), []
        for job, state in self.jobs.items():
            attempt, sent, tokens, rate, begun = state
            due = min(tokens, 1 + int((now - begun) * rate + 0.01))
            if due > sent:
                entries.append('{"job":"%s","attempt":%d,"at":%d,"items":[%s]%s}' % (
                    job, attempt, sent, ",".join([TOKEN] * (due - sent)),
                    ',"done":true' if due == tokens else ""))
                state[1] = due
                if due == tokens:
                    ended.append(job)
        for job in ended:
            del self.jobs[job]
        if not self.jobs:
            self.interval = None
        return entries

    def poll(self):
        self.polls.send('{"session":"%s","running":[%s]}' % (self.session, ",".join(
            '["%s",%d]' % (job, state[0]) for job, state in self.jobs.items())))

    def run(self):
        poller = select.epoll()
        for line in (self.polls, self.replies):
            poller.register(line.sock, select.EPOLLIN)
        self.poll()
        step = 0.0                          # the last tick that was served
        fresh = False                       # jobs came: their first token is due at once
        while True:
            wait = -1
            if not self.replies.busy and (fresh or self.interval):
                wait = 0 if fresh else max(0.0, step + self.interval - time.monotonic())
            for fileno, _ in poller.poll(wait):
                line = self.polls if fileno == self.polls.sock.fileno() else self.replies
                answer = line.receive()
                if answer["jobs"] or answer["cancel"]:
                    self.take(answer)
                    fresh = True
            if not self.replies.busy and (fresh or self.interval):
                now = self.tick()
                if fresh or now > step:
                    fresh, step = False, now
                    entries = self.entries()
                    if entries:
                        self.replies.send('{"session":"%s","replies":[%s]}' % (
                            self.session, ",".join(entries)))
            if not self.polls.busy and not self.replies.busy:
                self.poll()                # the response to a reply brings jobs, too


def main():
    provider = Provider(int(sys.argv[1]), sys.argv[2], sys.argv[3], "tls" in sys.argv)
    print("ready", flush=True)
    gc.disable()             # nothing here makes cycles
    provider.run()


if __name__ == "__main__":
    main()
