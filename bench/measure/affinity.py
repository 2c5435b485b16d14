#!/usr/bin/env python3
"""What it is worth that a conversation stays with its provider.

    python bench/measure/affinity.py http://127.0.0.1:8081 http://127.0.0.1:8082

Shares two LLM servers as one service and holds conversations with it, once with and once
without --max-conversations. Prints the time to the first token (of all turns but the
first), and how many tokens of the prompts the servers took from their caches, if they
tell (llama.cpp does).
"""

import argparse
import json
import os
import statistics
import sys
import threading
import time
import urllib.request

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from harness import Relay  # noqa: E402
from harness import Workspace  # noqa: E402
from harness import share  # noqa: E402

WORDS = "river stone cloud amber quiet lantern harbor violet meadow copper thunder willow".split()


def text_of(seed, words):
    """A text that no other conversation begins with."""
    return " ".join(WORDS[(seed * 7 + n * (seed + 3)) % len(WORDS)] + str(n % 10)
                    for n in range(words))


def ask(url, messages):
    """(seconds to the first token, tokens of the prompt, of them from a cache, text)."""
    body = {"model": "Both", "messages": messages, "max_tokens": 16, "stream": True,
            "stream_options": {"include_usage": True}}
    request = urllib.request.Request(url + "/v1/chat/completions", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    began, first, texts, usage = time.monotonic(), None, [], {}
    with urllib.request.urlopen(request, timeout=600) as response:
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            usage = event.get("usage") or usage
            for choice in event.get("choices", ()):
                if choice["delta"].get("content"):
                    first = first or time.monotonic() - began
                    texts.append(choice["delta"]["content"])
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    return first, usage.get("prompt_tokens"), cached, "".join(texts)


def converse(url, seed, turns, words, results):
    """One conversation."""
    messages = [{"role": "user", "content": text_of(seed, words) + " Continue."}]
    for turn in range(turns):
        first, tokens, cached, text = ask(url, messages)
        if turn:
            results.append((first, tokens, cached))
        messages += [{"role": "assistant", "content": text or "..."},
                     {"role": "user", "content": "%s And then?" % text_of(seed + turn, 8)}]


def measure(space, upstreams, options, settings):
    """All conversations at once; the results of their turns."""
    with Relay(space, *options, provider=False) as relay:
        key = relay.register("Both")
        for upstream in upstreams:
            share(space, relay.url, "Both", upstream, "--key", key)
        results = []
        threads = [threading.Thread(target=converse, args=(
            relay.url, seed, settings.turns, settings.words, results))
            for seed in range(settings.seed, settings.seed + settings.conversations)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        space.end_children()
        return results


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("upstream", nargs=2, help="an OpenAI-compatible LLM server")
    parser.add_argument("--conversations", type=int, default=4, help="at once (%(default)s)")
    parser.add_argument("--turns", type=int, default=10, help="of each (%(default)s)")
    parser.add_argument("--words", type=int, default=700,
                        help="of each's first prompt, about three tokens each (%(default)s)")
    settings = parser.parse_args()
    settings.seed = int(time.time()) % 100000
    for title, options in (("with affinity", ()),
                           ("without", ("--max-conversations", "0"))):
        settings.seed += 1000          # nothing of it is in a cache yet
        with Workspace("affinity") as space:
            results = measure(space, settings.upstream, options, settings)
        seconds = sorted(first for first, _, _ in results if first is not None)
        told = [(tokens, cached) for _, tokens, cached in results if cached is not None]
        print("%-14s first token: median %.2f s, p90 %.2f s; %d turns; from a cache: %s" % (
            title, statistics.median(seconds), seconds[int(len(seconds) * 0.9)], len(seconds),
            "%.0f %% of %d tokens" % (100 * sum(cached for _, cached in told) / max(1, sum(
                tokens for tokens, _ in told)), sum(tokens for tokens, _ in told))
            if told else "not told"), flush=True)


if __name__ == "__main__":
    main()
