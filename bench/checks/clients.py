#!/usr/bin/env python3
"""Run the real OpenAI clients against a relay, and print what works.

    python bench/checks/clients.py --install --upstream http://127.0.0.1:8080

It starts a relay, a provider that answers by a callback, and `neuroengine.py share` before
a fake LLM server (and before the real one that --upstream names); then it runs each
package's cases in a separate process. --install fetches the packages into --cache first:
openai, langchain-openai and litellm from PyPI, openai from npm. Exit status 1 if a case
fails.
"""

import argparse
import contextlib
import http.client
import http.server
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.parse
import urllib.request
import venv

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, ".."))

from harness import Workspace, end_on_signals, serving, share

PYPI = ("openai", "langchain-openai", "litellm")
NEEDED = ("mcp",)          # litellm imports it when there are tools, and does not say so
NPM = ("openai",)
SOON = 20.0                # seconds that only a failure reaches
CLOSED_SECONDS = 1.0       # the promise: so long from a hang-up to the provider's stop
TOOL = {"type": "function", "function": {
    "name": "weather", "description": "The weather in a city.", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}}}}}

##############################################################################
# The world: a relay, providers, and a fake LLM server, in this process
##############################################################################


class Watch:
    """What became of each prompt: its last word names it. The cases ask over HTTP."""

    def __init__(self):
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._calls, self._closed = {}, set()

    def begin(self, name):
        with self._lock:
            self._calls[name] = self._calls.get(name, 0) + 1

    def end(self, name):
        with self._lock:
            self._closed.add(name)
            self._changed.notify_all()

    def closed(self, name, timeout=10.0):
        """Wait until the answer to that prompt was closed; whether it was."""
        with self._lock:
            return self._changed.wait_for(lambda: name in self._closed, timeout)

    def calls(self, name):
        with self._lock:
            return self._calls.get(name, 0)


def pieces_for(text):
    """What both the callback and the fake LLM answer to a prompt: its first word says
    how. Yields texts; raises where the answer is to break."""
    # A conversation comes to a callback as lines "Role: text"; the user's last counts.
    text = text.rpartition("User: ")[2].split("\n")[0]
    word = text.split()[0] if text.split() else ""
    if word == "fail":
        raise ValueError("as asked")
    if word == "break":
        yield "half"
        time.sleep(0.3)        # so that the half has gone out alone
        raise ValueError("as asked")
    if word == "endless":
        while True:
            yield "on "
            time.sleep(0.02)
    if word == "silent":
        time.sleep(2)
    yield from ("Hel", "lo ", "w\u00f6rld")


class Callback:
    """A provider's callback, whose iterators say when they are closed."""

    def __init__(self, watch):
        self.watch = watch

    def __call__(self, request):
        name = (request["message"].split() or [""])[-1]
        if request["message"].endswith("Assistant:"):
            name = request["message"].split()[-2]
        self.watch.begin(name)
        try:
            yield from pieces_for(request["message"])
        finally:
            self.watch.end(name)


class FakeLLM(http.server.BaseHTTPRequestHandler):
    """An OpenAI-compatible server with tools, reasoning, embeddings and failures."""

    protocol_version = "HTTP/1.1"
    watch = None

    def do_GET(self):
        if self.path == "/v1/models":
            return self.json(200, {"data": [{"id": "/secret/model.gguf",
                                             "owned_by": "llamacpp",
                                             "meta": {"n_ctx": 2048}}]})
        self.json(404, {"error": {"message": "File Not Found", "code": 404}})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/embeddings":
            inputs = body["input"] if isinstance(body["input"], list) else [body["input"]]
            vector = [0.5, -1.0]
            if body.get("encoding_format") == "base64":
                vector = "AAAAPwAAgL8="
            return self.json(200, {"object": "list", "model": "/secret/model.gguf",
                                   "usage": {"prompt_tokens": 1, "total_tokens": 1},
                                   "data": [{"object": "embedding", "index": number,
                                             "embedding": vector}
                                            for number, _ in enumerate(inputs)]})
        if self.path == "/v1/completions":
            return self.stream(iter(("Hel", "lo")))
        if self.path != "/v1/chat/completions":            # share looks what there is
            return self.json(404, {"error": {"message": "File Not Found", "code": 404}})
        text = body["messages"][-1]["content"]
        if isinstance(text, list):
            text = "".join(part.get("text", "") for part in text)
        word, name = text.split()[0], text.split()[-1]
        self.watch.begin(name)
        try:
            if word == "context":          # as llama.cpp says it
                return self.json(400, {"error": {
                    "code": 400, "type": "exceed_context_size_error", "n_ctx": 2048,
                    "n_prompt_tokens": 9000, "message": "request (9000 tokens) exceeds "
                    "the available context size (2048 tokens), try increasing it"}})
            if word == "fail":
                return self.json(500, {"error": "out of memory in /secret/model.gguf"})
            if body.get("tools") and word == "tools":
                return self.stream(self.tool_calls(), "tool_calls")
            if word == "think":
                return self.stream([{"reasoning_content": "Let me "},
                                    {"reasoning_content": "see."}, "Hel", "lo"])
            self.stream(pieces_for(text))
        except ValueError:
            self.close_connection = True   # an end in the middle, without any word
        except OSError:
            pass
        finally:
            self.watch.end(name)

    def tool_calls(self):
        for index, city in enumerate(("Rome", "Oslo")):
            yield {"tool_calls": [{"index": index, "id": "call_%d" % index,
                                   "type": "function", "function": {
                                       "name": "weather", "arguments": ""}}]}
            for part in ('{"city": ', '"%s"}' % city):
                yield {"tool_calls": [{"index": index, "function": {"arguments": part}}]}

    def json(self, status, value):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def stream(self, deltas, end="stop"):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        for delta in deltas:
            delta = delta if isinstance(delta, dict) else {"content": delta}
            choice = {"index": 0, "delta": delta, "finish_reason": None}
            if self.path == "/v1/completions":
                choice = {"index": 0, "text": delta["content"], "finish_reason": None}
            self.event({"model": "/secret/model.gguf", "choices": [choice]})
        self.event({"choices": [{"index": 0, "delta": {}, "finish_reason": end}]})
        self.event({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2,
                                             "total_tokens": 5}})
        self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    def event(self, value):
        self.wfile.write(b"data: %s\n\n" % json.dumps(value).encode())
        self.wfile.flush()

    def log_message(self, *args):
        pass


class Control(http.server.BaseHTTPRequestHandler):
    """How the cases ask the Watch: GET /closed/NAME waits for it, GET /calls/NAME."""

    watches = ()

    def do_GET(self):
        question, name = self.path.strip("/").split("/")
        if question == "closed":
            answer = any(watch.calls(name) and watch.closed(name)
                         for watch in self.watches)
        else:
            answer = sum(watch.calls(name) for watch in self.watches)
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def world(upstream, space):
    """All that the cases need; what they have to know of it, as a dict."""
    import neuroengine
    import neuroengine_server
    texts, fakes = Watch(), Watch()
    # One with a name: a relay for this machine alone refuses pages from elsewhere.
    relay = neuroengine_server.Relay("127.0.0.1", 0, names=["relay.example.org"])
    relay.start()
    with contextlib.ExitStack() as stack:
        stack.callback(relay.stop)
        call = neuroengine.Transport(relay.url).call
        keys = {name: call("POST", "/api/services", {"name": name})["key"]
                for name in ("Text", "Offline", "Private", "Paused")}
        for name, changes in (("Private", {"private": True}), ("Paused", {"paused": True})):
            call("PATCH", "/api/services/" + name, changes, key=keys[name])
        guests = {label: call("POST", "/api/services/Private/keys", dict(
            limits, label=label), key=keys["Private"])["key"] for label, limits in (
                ("guest", {}), ("spent", {"requests_per_day": 0}))}
        for name in ("Text", "Private"):
            provider = neuroengine.NeuroengineServer(relay.url)
            provider.login(name, keys[name])
            threading.Thread(target=provider.listen, args=(Callback(texts),),
                             kwargs={"workers": 8}, daemon=True).start()
            stack.callback(provider.stop)
        llm = stack.enter_context(serving(FakeLLM, watch=fakes))
        control = stack.enter_context(serving(Control, watches=(texts, fakes)))
        share(space, relay.url, "Bridge", llm, "--workers", "4")
        if upstream:
            share(space, relay.url, "Real", upstream, "--workers", "4")
        yield {"relay": relay.url, "control": control, "real": bool(upstream),
               "keys": guests}


##############################################################################
# Cases: functions whose names are what they show; run in the package's own process
##############################################################################

CASES = []                 # (package, name, services, function)
CONFIG = {}
COUNT = [0]


def case(package, *services):
    """Register a case, to be run once with each of these services."""
    def add(function):
        CASES.append((package, function.__name__.replace("_", " "), services, function))
        return function
    return add


def unique(word):
    """A prompt whose first word says how it is answered and whose last names it."""
    COUNT[0] += 1
    return "%s please n%d-%d" % (word, os.getpid(), COUNT[0])


def ask_control(question, prompt):
    with urllib.request.urlopen("%s/%s/%s" % (
            CONFIG["control"], question, prompt.split()[-1]), timeout=SOON) as response:
        return json.loads(response.read().decode())


def closed_soon(service, prompt):
    """Check that the provider stops within the promised second; how long it took."""
    began = time.monotonic()
    if service == "Real":
        return "no error"              # bench: its slots are looked at elsewhere
    assert ask_control("closed", prompt), "the provider went on"
    took = time.monotonic() - began
    assert took < CLOSED_SECONDS, "closed after %.2f s" % took
    return "closed after %.0f ms" % (1000 * took)


@contextlib.contextmanager
def raises(*names):
    """Expect an exception of one of these classes; yields what gets it."""
    got = []
    try:
        yield got
    except Exception as error:
        got.append(error)
        classes = [base.__name__ for base in type(error).__mro__]
        assert set(names) & set(classes), "%s: %s" % (type(error).__name__, error)
    else:
        raise AssertionError("nothing was raised")


def said(text, service):
    """Check an answer's text."""
    assert text and (service == "Real" or text.startswith("Hello")), repr(text)
    return repr(text[:30]) if service == "Real" else ""


def user(text):
    return [{"role": "user", "content": text}]


# -- openai --


def openai_client(path="/v1", key="dummy", **more):
    import openai
    return openai.OpenAI(base_url=CONFIG["relay"] + path, api_key=key, **more)


@case("openai", "Text")
def models_list_and_retrieve(service):
    models = {model.id: model for model in openai_client().models.list()}
    assert service in models and "Offline" not in models
    assert openai_client().models.retrieve(service).id == service
    assert openai_client().models.retrieve("Offline").status == "offline"
    assert models["Bridge"].context_length == models["Bridge"].max_model_len == 2048
    for wrong in ("nosuch", "no/such"):
        with raises("NotFoundError") as got:
            openai_client().models.retrieve(wrong)
        assert got[0].code == "model_not_found", got[0]


@case("openai", "Text", "Bridge", "Real")
def chat_whole(service):
    answer = openai_client().chat.completions.create(
        model=service, messages=user("Hello there"), max_tokens=16)
    assert answer.usage.total_tokens > 0 and answer.model == service
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert "secret" not in answer.to_json() and ".gguf" not in answer.to_json()
    return said(answer.choices[0].message.content, service)


@case("openai", "Text", "Bridge", "Real")
def chat_streamed_with_usage(service):
    stream = openai_client().chat.completions.create(
        model=service, messages=user("Hello there"), max_tokens=16, stream=True,
        stream_options={"include_usage": True})
    chunks = list(stream)
    assert chunks[-1].usage.total_tokens > 0 and not chunks[-1].choices
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason in ("stop", "length")
    assert ".gguf" not in "".join(chunk.to_json() for chunk in chunks)
    return said("".join(c.choices[0].delta.content or "" for c in chunks if c.choices),
                service)


@case("openai", "Text", "Bridge")
def chat_streamed_without_usage(service):
    chunks = list(openai_client().chat.completions.create(
        model=service, messages=user("Hello there"), stream=True))
    return said("".join(chunk.choices[0].delta.content or "" for chunk in chunks), service)


@case("openai", "Text", "Bridge")
def chat_stream_helper(service):
    with openai_client().chat.completions.stream(
            model=service, messages=user("Hello there")) as stream:
        final = stream.get_final_completion()
    return said(final.choices[0].message.content, service)


@case("openai", "Text", "Bridge", "Real")
def chat_in_parts_with_roles_and_unknown_fields(service):
    answer = openai_client().chat.completions.create(
        model=service, max_completion_tokens=16, temperature=0.5, top_p=0.9, stop=["#"],
        user="u", extra_body={"top_k": 5, "min_p": 0.05, "nosuch": {"a": 1}}, messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hello there"}]}])
    return said(answer.choices[0].message.content, service)


@case("openai", "Text", "Bridge", "Real")
def completions_whole_and_streamed(service):
    client = openai_client()
    answer = client.completions.create(model=service, prompt="Once", max_tokens=8)
    text = "".join(chunk.choices[0].text for chunk in client.completions.create(
        model=service, prompt=["Once"], max_tokens=8, stream=True))
    said(answer.choices[0].text, service)
    return said(text, service)


@case("openai", "Text")
def unknown_model(service):
    with raises("NotFoundError") as got:
        openai_client().chat.completions.create(model="nosuch", messages=user("x"))
    assert got[0].code == "model_not_found" and got[0].param == "model"
    assert got[0].request_id


@case("openai", "Text")
def a_bad_key_on_management(service):
    with raises("AuthenticationError"):
        openai_client("/api", key="wrong").get("/services/" + service, cast_to=object)


@case("openai", "Offline")
def offline_is_503_and_not_sat_out(service):
    for stream in (False, True):
        began = time.monotonic()
        with raises("InternalServerError") as got:
            openai_client().chat.completions.create(
                model=service, messages=user("x"), stream=stream)
        assert got[0].status_code == 503 and got[0].code == "provider_offline"
        assert time.monotonic() - began < 10, "it was retried for long"
    return "%.1f s" % (time.monotonic() - began)


@case("openai", "Paused")
def paused_is_503_and_not_sat_out(service):
    began = time.monotonic()
    with raises("InternalServerError") as got:
        openai_client().chat.completions.create(model=service, messages=user("x"))
    assert got[0].code == "provider_paused" and time.monotonic() - began < 10


@case("openai", "Private")
def a_private_service_takes_its_access_keys(service):
    def ask(key):
        return openai_client(key=key).chat.completions.create(
            model=service, messages=user("x"))
    said(ask(CONFIG["keys"]["guest"]).choices[0].message.content, service)
    with raises("AuthenticationError") as got:
        ask("dummy")
    assert got[0].code == "invalid_api_key"
    began = time.monotonic()
    with raises("RateLimitError") as got:
        ask(CONFIG["keys"]["spent"])
    assert got[0].code == "insufficient_quota" and time.monotonic() - began < 10


@case("openai", "Text", "Bridge")
def an_error_before_the_first_token(service):
    for stream in (False, True):
        prompt = unique("fail")
        with raises("InternalServerError") as got:
            openai_client().chat.completions.create(
                model=service, messages=user(prompt), stream=stream)
        assert got[0].status_code == 502 and got[0].code == "provider_error"
        assert "secret" not in str(got[0])
        assert ask_control("calls", prompt) <= 2, "it was retried"


@case("openai", "Text", "Bridge")
def an_error_after_the_first_token(service):
    texts = []
    with raises("APIError") as got:
        for chunk in openai_client().chat.completions.create(
                model=service, messages=user(unique("break")), stream=True):
            texts.append(chunk.choices[0].delta.content or "")
    assert "".join(texts) == "half" and got[0].code == "provider_error"


@case("openai", "Text", "Bridge", "Real")
def closing_the_stream_stops_the_provider(service):
    prompt = unique("endless")
    stream = openai_client().chat.completions.create(
        model=service, messages=user(prompt), stream=True, max_tokens=800)
    next(stream), next(stream)
    stream.close()
    return closed_soon(service, prompt)


@case("openai", "Text", "Bridge")
def a_timeout_of_a_whole_answer_stops_the_provider(service):
    prompt = unique("endless")
    with raises("APITimeoutError"):
        openai_client(timeout=0.5, max_retries=0).chat.completions.create(
            model=service, messages=user(prompt))
    return closed_soon(service, prompt)


@case("openai", "Bridge")
def tools_whole_and_streamed(service):
    client = openai_client()
    answer = client.chat.completions.create(model=service, messages=user("tools x"),
                                            tools=[TOOL], tool_choice="required")
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "tool_calls" and message.content is None
    assert [json.loads(call.function.arguments)["city"]
            for call in message.tool_calls] == ["Rome", "Oslo"]
    with client.chat.completions.stream(model=service, messages=user("tools x"),
                                        tools=[TOOL]) as stream:
        message = stream.get_final_completion().choices[0].message
    assert [(call.id, call.function.name, call.function.arguments)
            for call in message.tool_calls] == [
                ("call_0", "weather", '{"city": "Rome"}'),
                ("call_1", "weather", '{"city": "Oslo"}')]
    answer = client.chat.completions.create(model=service, tools=[TOOL], messages=[
        {"role": "user", "content": "x"}, message.to_dict(),
        {"role": "tool", "tool_call_id": "call_0", "content": "sunny"}])
    said(answer.choices[0].message.content, service)


@case("openai", "Bridge", "Real")
def a_stream_has_lines_of_data_alone(service):
    with openai_client().chat.completions.with_streaming_response.create(
            model=service, messages=user("Hello there"), max_tokens=16, stream=True) as got:
        lines = list(filter(None, got.iter_lines()))
    assert lines[-1] == "data: [DONE]"
    assert all(line[:6] == "data: " or line[2:] for line in lines), lines


@case("openai", "Bridge")
def before_tool_calls_stands_no_empty_text(service):
    chunks = openai_client().chat.completions.create(
        model=service, messages=user("tools x"), tools=[TOOL], stream=True)
    assert {chunk.choices[0].delta.content for chunk in chunks} == {None}


@case("openai", "Real")
def logprobs_by_the_name_that_llama_cpp_has_for_them(service):
    answer = openai_client().chat.completions.create(
        model=service, messages=user("Hello there"), max_tokens=4, extra_body={"n_probs": 2})
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 2


@case("openai", "Text")
def required_tools_of_a_provider_of_text(service):
    for stream in (False, True):
        with raises("BadRequestError") as got:
            openai_client().chat.completions.create(
                model=service, messages=user("x"), tools=[TOOL], stream=stream,
                tool_choice="required")
        assert got[0].code == "unsupported_parameter"
    answer = openai_client().chat.completions.create(
        model=service, messages=user("x"), tools=[TOOL])
    said(answer.choices[0].message.content, service)


@case("openai", "Bridge")
def reasoning_whole_and_streamed(service):
    client = openai_client()
    answer = client.chat.completions.create(model=service, messages=user("think x"))
    assert answer.choices[0].message.reasoning_content == "Let me see."
    said(answer.choices[0].message.content, service)
    deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(
        model=service, messages=user("think x"), stream=True)]
    assert "".join(getattr(delta, "reasoning_content", None) or ""
                   for delta in deltas) == "Let me see."


@case("openai", "Bridge", "Real")
def a_prompt_too_long(service):
    text = "context x" if service == "Bridge" else "word " * 40000
    for stream in (False, True):
        with raises("BadRequestError") as got:
            openai_client().chat.completions.create(
                model=service, messages=user(text), stream=stream)
        assert got[0].code == "context_length_exceeded", got[0]
    return str(got[0].body["message"])[:70]


@case("openai", "Text")
def bases_and_aliases(service):
    for path in ("/v1", "/v1/", "//v1", "", "/", "/%s/v1" % service,
                 "/%s/v1/" % service.lower()):
        client = openai_client(path, key="sk-" + "x" * 40)
        model = "anything" if service.lower() in path.lower() else service
        answer = client.chat.completions.create(model=model, messages=user("hi"))
        said(answer.choices[0].message.content, service)
        assert service in [entry.id for entry in client.models.list()]
        assert client.models.retrieve(service).id == service, path


@case("openai", "Bridge")
def embeddings(service):
    for more in ({}, {"encoding_format": "float"}):
        answer = openai_client().embeddings.create(model=service, input=["a", "b"], **more)
        assert [entry.embedding for entry in answer.data] == [[0.5, -1.0]] * 2
        assert answer.model == service
    with raises("NotFoundError"):
        openai_client().embeddings.create(model="Text", input="a")


@case("openai", "Text")
def what_is_not_there_says_so(service):
    with raises("NotFoundError") as got:
        openai_client().responses.create(model=service, input="x")
    assert got[0].code == "unknown_url"


@case("openai", "Text")
def an_asynchronous_client_cancels(service):
    import asyncio
    import openai
    prompt = unique("endless")

    async def run():
        async with openai.AsyncOpenAI(base_url=CONFIG["relay"] + "/v1", api_key="x") as api:
            stream = await api.chat.completions.create(
                model=service, messages=user(prompt), stream=True)
            async for _ in stream:
                break
            await stream.close()
    asyncio.run(run())
    return closed_soon(service, prompt)


# -- langchain-openai --


def langchain_model(service, path="/v1", **more):
    from langchain_openai import ChatOpenAI
    return ChatOpenAI(model=service, base_url=CONFIG["relay"] + path, api_key="dummy",
                      **more)


@case("langchain-openai", "Text", "Bridge", "Real")
def invoke(service):
    answer = langchain_model(service, max_tokens=16).invoke("Hello there")
    assert answer.usage_metadata["total_tokens"] > 0
    return said(answer.content, service)


@case("langchain-openai", "Text", "Bridge", "Real")
def stream(service):
    whole = None
    for chunk in langchain_model(service, max_tokens=16, stream_usage=True).stream("Hello"):
        whole = chunk if whole is None else whole + chunk
    assert whole.usage_metadata["total_tokens"] > 0
    return said(whole.content, service)


@case("langchain-openai", "Text", "Real")
def text_completion(service):
    from langchain_openai import OpenAI
    return said(OpenAI(model=service, base_url=CONFIG["relay"] + "/v1", api_key="dummy",
                       max_tokens=8).invoke("Once"), service)


@case("langchain-openai", "Bridge")
def tools(service):
    model = langchain_model(service).bind_tools([TOOL])
    for answer in (model.invoke("tools x"), None):
        if answer is None:
            for chunk in model.stream("tools x"):
                answer = chunk if answer is None else answer + chunk
        assert [(call["name"], call["args"]["city"]) for call in answer.tool_calls] == [
            ("weather", "Rome"), ("weather", "Oslo")]


@case("langchain-openai", "Bridge", "Real")
def context_overflow_is_its_own_class(service):
    text = "context x" if service == "Bridge" else "word " * 40000
    with raises("OpenAIContextOverflowError"):
        langchain_model(service).invoke(text)
    with raises("OpenAIContextOverflowError"):
        list(langchain_model(service).stream(text))


@case("langchain-openai", "Text")
def unknown_model_is_not_found(service):
    with raises("NotFoundError"):
        langchain_model("nosuch").invoke("x")


@case("langchain-openai", "Offline")
def offline_service(service):
    began = time.monotonic()
    with raises("InternalServerError"):
        langchain_model(service).invoke("x")
    assert time.monotonic() - began < 10, "it was retried for long"


@case("langchain-openai", "Text", "Bridge")
def errors_before_and_after_the_first_token(service):
    with raises("InternalServerError"):
        langchain_model(service).invoke(unique("fail"))
    texts = []
    with raises("APIError"):
        for chunk in langchain_model(service).stream(unique("break")):
            texts.append(chunk.content)
    assert "".join(texts) == "half"


@case("langchain-openai", "Text", "Bridge")
def closing_the_iterator_stops_the_provider(service):
    prompt = unique("endless")
    chunks = langchain_model(service).stream(prompt)
    next(chunks), next(chunks)
    chunks.close()
    return closed_soon(service, prompt)


@case("langchain-openai", "Text")
def the_services_own_base(service):
    said(langchain_model("anything", "/%s/v1" % service).invoke("hi").content, service)


@case("langchain-openai", "Bridge")
def embed_documents(service):
    from langchain_openai import OpenAIEmbeddings
    model = OpenAIEmbeddings(model=service, base_url=CONFIG["relay"] + "/v1",
                             api_key="dummy", check_embedding_ctx_length=False)
    assert model.embed_documents(["a", "b"]) == [[0.5, -1.0]] * 2


# -- litellm --


def lite(service, prompt, path="/v1", **more):
    import litellm
    litellm.suppress_debug_info = True
    return litellm.completion("openai/" + service, user(prompt), api_key="dummy",
                              api_base=CONFIG["relay"] + path, **more)


@case("litellm", "Text", "Bridge", "Real")
def completion(service):
    answer = lite(service, "Hello there", max_tokens=16)
    assert answer.usage.total_tokens > 0
    return said(answer.choices[0].message.content, service)


@case("litellm", "Text", "Bridge", "Real")
def streamed_completion(service):
    chunks = list(lite(service, "Hello there", max_tokens=16, stream=True,
                       stream_options={"include_usage": True}))
    assert any(getattr(chunk, "usage", None) for chunk in chunks)
    return said("".join(chunk.choices[0].delta.content or "" for chunk in chunks
                        if chunk.choices), service)


@case("litellm", "Text")
def lite_text_completion(service):
    import litellm
    answer = litellm.text_completion(
        model="text-completion-openai/" + service, prompt="Once", api_key="dummy",
        api_base=CONFIG["relay"] + "/v1")
    said(answer.choices[0].text, service)


@case("litellm", "Bridge")
def tools_and_reasoning(service):
    answer = lite(service, "tools x", tools=[TOOL])
    assert [call.function.arguments for call in answer.choices[0].message.tool_calls] == [
        '{"city": "Rome"}', '{"city": "Oslo"}']
    arguments = {}
    for chunk in lite(service, "tools x", tools=[TOOL], stream=True):
        for call in chunk.choices[0].delta.tool_calls or ():
            arguments[call.index] = (arguments.get(call.index, "")
                                     + (call.function.arguments or ""))
    assert arguments == {0: '{"city": "Rome"}', 1: '{"city": "Oslo"}'}
    answer = lite(service, "think x")
    assert answer.choices[0].message.reasoning_content == "Let me see."
    assert "".join(getattr(chunk.choices[0].delta, "reasoning_content", None) or ""
                   for chunk in lite(service, "think x", stream=True)) == "Let me see."


@case("litellm", "Bridge", "Real")
def context_window_exceeded(service):
    text = "context x" if service == "Bridge" else "word " * 40000
    with raises("ContextWindowExceededError"):
        lite(service, text)


@case("litellm", "Text")
def not_found(service):
    with raises("NotFoundError"):
        lite("nosuch", "x")


@case("litellm", "Offline")
def offline_is_service_unavailable(service):
    began = time.monotonic()
    with raises("ServiceUnavailableError"):
        lite(service, "x")
    assert time.monotonic() - began < 10, "it was retried for long"


@case("litellm", "Text", "Bridge")
def failures_before_and_after_the_first_token(service):
    with raises("BadGatewayError"):
        lite(service, unique("fail"))
    texts = []
    with raises("APIError", "APIConnectionError", "MidStreamFallbackError",
                "InternalServerError", "BadGatewayError"):
        for chunk in lite(service, unique("break"), stream=True):
            texts.append(chunk.choices[0].delta.content or "")
    assert "".join(texts) == "half", texts


@case("litellm", "Text", "Bridge")
def closing_the_connection_stops_the_provider(service):
    prompt = unique("endless")
    chunks = lite(service, prompt, stream=True)
    next(chunks), next(chunks)
    chunks.completion_stream.close()       # its wrapper has no close()
    return closed_soon(service, prompt)


@case("litellm", "Text")
def own_base(service):
    said(lite("anything", "hi", "/%s/v1" % service).choices[0].message.content, service)


@case("litellm", "Bridge")
def lite_embedding(service):
    import litellm
    answer = litellm.embedding("openai/" + service, input=["a"], api_key="dummy",
                               api_base=CONFIG["relay"] + "/v1")
    assert answer.data[0]["embedding"] == [0.5, -1.0]


# -- what a browser does, by the standard library --


def browse(method, path, body=None, **headers):
    """A request as a page of another origin makes it: status, headers, body."""
    host = urllib.parse.urlsplit(CONFIG["relay"]).netloc
    connection = http.client.HTTPConnection(host, timeout=SOON)
    with contextlib.closing(connection):
        connection.request(method, path, body and json.dumps(body), dict(
            {name.replace("_", "-"): value for name, value in headers.items()},
            Origin="https://app.example"))
        response = connection.getresponse()
        return response.status, response.headers, response.read()


@case("browser", "Text")
def preflight_reflects_the_headers(service):
    wanted = ("authorization,content-type,x-stainless-arch,x-stainless-lang,"
              "x-stainless-os,x-stainless-package-version,x-stainless-retry-count,"
              "x-stainless-runtime,x-stainless-runtime-version,x-stainless-timeout")
    for path in ("/v1/chat/completions", "/v1/models", "/chat/completions",
                 "/v1/models/" + service, "/%s/v1/chat/completions" % service):
        status, headers, _ = browse("OPTIONS", path, Access_Control_Request_Method="POST",
                                    Access_Control_Request_Headers=wanted)
        assert status in (200, 204), (path, status)
        assert headers["Access-Control-Allow-Origin"] == "*"
        assert headers["Access-Control-Allow-Headers"].lower() == wanted
        assert "POST" in headers["Access-Control-Allow-Methods"]
        assert headers["Access-Control-Allow-Credentials"] is None


@case("browser", "Text")
def answers_and_errors_may_be_read(service):
    for model, expected in ((service, 200), ("nosuch", 404), ("Offline", 503)):
        status, headers, _ = browse("POST", "/v1/chat/completions", {
            "model": model, "messages": user("hi")}, Content_Type="application/json")
        assert status == expected and headers["Access-Control-Allow-Origin"] == "*"
        assert "x-request-id" in headers["Access-Control-Expose-Headers"].lower()


##############################################################################
# Running the cases
##############################################################################


def run_cases(package):
    """Run the cases of one package here, and print a line of JSON for each."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)                          # packages may print what they like
    for of, name, services, function in CASES:
        if of != package:
            continue
        for service in services:
            if service == "Real" and not CONFIG["real"]:
                continue
            began = time.monotonic()
            try:
                ok, note = True, function(service) or ""
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)
                line = [frame.lineno for frame in where
                        if frame.filename == os.path.abspath(__file__)][-1:]
                ok, note = False, "line %s: %s: %s" % (
                    line, type(error).__name__, str(error)[:300])
            out.write(json.dumps([package, name, service, ok,
                                  time.monotonic() - began, note]) + "\n")
            out.flush()


def install(cache):
    """Fetch the packages into cache."""
    python = python_of(cache)
    if not os.path.exists(python):
        venv.create(os.path.join(cache, "python"), with_pip=True)
    # Old versions of pip take minutes over these packages' long lists of versions.
    for packages in (("pip",), PYPI + NEEDED):
        subprocess.check_call([python, "-m", "pip", "install", "-q", "-U",
                               "--prefer-binary"] + list(packages))
    if shutil.which("npm"):
        subprocess.check_call(["npm", "install", "--prefix", cache, "--no-audit",
                               "--no-fund", "--silent"] + list(NPM))


def python_of(cache):
    return os.path.join(cache, "python", "Scripts" if os.name == "nt" else "bin", "python")


def commands(cache):
    """(package, command that runs its cases) for all that are installed."""
    python, me = python_of(cache), os.path.abspath(__file__)
    found = [("browser", [sys.executable, me, "--run", "browser"])]
    for package in PYPI:
        module = package.replace("-", "_")
        if os.path.exists(python) and not subprocess.call(
                [python, "-c", "import importlib.util as u, sys; sys.exit("
                 "u.find_spec(%r) is None)" % module]):
            found.append((package, [python, me, "--run", package]))
        else:
            print("%s is not installed: --install fetches it." % package)
    if os.path.isdir(os.path.join(cache, "node_modules", "openai")) \
            and shutil.which("node"):
        found.append(("npm openai", ["node", os.path.join(HERE, "clients.mjs"), cache]))
    else:
        print("npm openai is not installed: --install fetches it.")
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--install", action="store_true", help="fetch the packages first")
    parser.add_argument("--cache", metavar="DIR", default=os.path.join(
        tempfile.gettempdir(), "neuroengine-clients"), help="where they are "
        "(default: %(default)s)")
    parser.add_argument("--upstream", metavar="URL", help="a real LLM server to share too")
    parser.add_argument("--only", metavar="PACKAGE", help="the cases of this package alone")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.run:
        CONFIG.update(json.loads(os.environ["CLIENTS_CONFIG"]))
        run_cases(options.run)
        return 0
    end_on_signals()
    os.makedirs(options.cache, exist_ok=True)
    if options.install:
        install(options.cache)
    rows = []
    with Workspace("clients") as space, world(options.upstream, space) as config:
        for package, command in commands(options.cache):
            if options.only in (None, package):
                rows += run_package(package, command, config)
    failed = [row for row in rows if not row[3]]
    print("%d cases, %d failed" % (len(rows), len(failed)))
    return 1 if failed or not rows else 0


def run_package(package, command, config):
    """Run one package's cases in a process; its rows, printed as they come."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, universal_newlines=True,
        stderr=None if os.environ.get("VERBOSE") else subprocess.DEVNULL,
        # litellm would fetch its table of prices from elsewhere.
        env=dict(os.environ, CLIENTS_CONFIG=json.dumps(config),
                 LITELLM_LOCAL_MODEL_COST_MAP="True"))
    rows = []
    killer = threading.Timer(300, process.kill)
    killer.start()
    for line in process.stdout:
        row = json.loads(line)
        rows.append(row)
        print("%-4s %-16s %-48s %-8s %5.1f s  %s" % (
            ("pass" if row[3] else "FAIL",) + tuple(row[:3]) + (row[4], row[5])), flush=True)
    killer.cancel()
    if process.wait() or not rows:
        rows.append([package, "its process", "", False, 0, ""])
        print("FAIL %-16s its process ended with %s" % (package, process.returncode))
    return rows


if __name__ == "__main__":
    sys.exit(main())
