#!/usr/bin/env python3
"""Run the programs that people use with an LLM server through a relay.

    python bench/checks/programs.py --install --upstream http://127.0.0.1:8080
    python bench/checks/programs.py --readme --upstream http://127.0.0.1:8080

Each program is an entry of PROGRAMS: the packages that it needs, and its features, each a
script in Python or JavaScript, or a command. Each feature runs in a separate process with a
time limit and an empty home folder, through a relay and `neuroengine.py share`; what fails
is also tried directly against the LLM server. A feature that fails only through the relay
is a fault: then the exit status is 1. --readme runs the examples of README's section "Use it
with..." as printed, except for the relay's port.

--install fetches the packages into --cache: each program has a separate virtual environment
or node_modules, because their versions conflict. The LLM server should be a
real one, with room for 32,000 tokens: the agents send long prompts.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from harness import ROOT, Broken, Relay, Workspace, end_on_signals, share

NAME = "MYGPT"                     # the service, and the model that programs ask for
MOST_TOKENS = 60                   # of an answer through the relay: the model rambles
PASSED, FAILED, MISSING = "pass", "FAIL", "-"


class Program:
    """A program, its packages of PyPI or npm, and its features: {name: script or command}.

    agent: it asks for answers without end, which only `share --max-tokens` bounds, so it is
    not run directly. says: what it says of an answer that this has ended: then all is well,
    whatever its status."""

    def __init__(self, name, features, pip=(), npm=(), agent=False, says=None):
        self.name, self.features, self.pip, self.npm = name, features, pip, npm
        self.agent, self.says = agent, says

    def folder(self, cache):
        return os.path.join(cache, self.name.replace(" ", "-"))

    def python(self, cache):
        return os.path.join(self.folder(cache), "bin", "python")

    def install(self, cache):
        folder = self.folder(cache)
        if self.pip:
            subprocess.check_call([sys.executable, "-m", "venv", folder])
            for packages in ("pip",), self.pip:
                subprocess.check_call([self.python(cache), "-m", "pip", "install", "-q",
                                       "-U", "--prefer-binary", *packages])
        if self.npm:
            os.makedirs(folder, exist_ok=True)
            subprocess.check_call(["npm", "install", "--prefix", folder, "--no-audit",
                                   "--no-fund", "--silent", *self.npm])

    def is_installed(self, cache):
        folder = self.folder(cache)
        return (not self.pip or os.path.exists(self.python(cache))) and (
            not self.npm or os.path.isdir(os.path.join(folder, "node_modules")))

    def version(self, cache):
        """The version of its first package."""
        if self.pip:
            name = re.split(r"[\[=<>]", self.pip[0])[0]
            return subprocess.run(
                [self.python(cache), "-c", "import importlib.metadata as m; print("
                 "m.version(%r))" % name], stdout=subprocess.PIPE,
                universal_newlines=True).stdout.strip()
        name = re.match(r"@?[^@]+", self.npm[0]).group()
        with open(os.path.join(self.folder(cache), "node_modules", name,
                               "package.json")) as file:
            return json.load(file)["version"]

    def command(self, cache, script, folder):
        """The command that runs a feature in that folder."""
        if isinstance(script, list):
            return script
        file = os.path.join(folder, "feature.mjs" if self.npm else "feature.py")
        with open(file, "w") as out:
            out.write(script)
        if self.npm:                           # modules are looked up from where it stands
            os.symlink(os.path.join(self.folder(cache), "node_modules"),
                       os.path.join(folder, "node_modules"))
            return ["node", file]
        return [self.python(cache), file]


def addresses(url):
    """The environment variables that tell a script, or a program, where to ask."""
    return {"URL": url, "BASE": url + "/v1", "MODEL": NAME, "OPENAI_BASE_URL": url + "/v1",
            "OPENAI_API_BASE": url + "/v1", "OPENAI_API_KEY": "none",
            "ANTHROPIC_BASE_URL": url, "ANTHROPIC_API_KEY": "none"}


def run(program, options, script, space, url, variables):
    """Run a feature against that base URL: (whether it passed, seconds, its last line)."""
    cache, seconds = options.cache, options.seconds
    folder = tempfile.mkdtemp(dir=space.directory)
    binaries = [os.path.join(program.folder(cache), part)
                for part in ("bin", "node_modules/.bin")]
    env = {  # nothing of this user's: keys and settings stay out
        "PATH": os.pathsep.join(binaries + [os.environ["PATH"]]), "HOME": folder,
        "LANG": "C.UTF-8", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "HF_HUB_OFFLINE": "1",
        "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "DISABLE_AUTOUPDATER": "1",
        "AIDER_MESSAGE": "Say hi", "AIDER_GIT": "false", "AIDER_YES_ALWAYS": "true",
        "AIDER_CHECK_UPDATE": "false", "AIDER_ANALYTICS": "false", "AIDER_PRETTY": "false",
        "AIDER_SHOW_MODEL_WARNINGS": "false", "AIDER_FANCY_INPUT": "false"}
    env.update(variables)
    command = [word.replace("$URL", url).replace("$MODEL", NAME)
               for word in program.command(cache, script, folder)]
    began = time.monotonic()
    process = subprocess.Popen(
        command, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True)
    late = threading.Timer(seconds, lambda: os.killpg(process.pid, signal.SIGKILL))
    late.start()
    try:
        out = process.communicate()[0].decode("utf-8", "replace")
    finally:
        late.cancel()
        with contextlib.suppress(OSError):     # what it has started
            os.killpg(process.pid, signal.SIGKILL)
    if process.returncode == -signal.SIGKILL:
        out += "\nno end within %d s" % seconds
    out = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out)
    lines = [line.strip() for line in out.splitlines() if line.strip()]
    with open(space.path("output.log"), "a") as log:
        log.write("\n== %s at %s: status %s\n%s\n" % (program.name, url,
                                                      process.returncode, out))
    well = process.returncode == 0 and bool(lines) or program.says and program.says in out
    return bool(well), time.monotonic() - began, \
        lines[-1] if lines else "nothing was printed"


##############################################################################
# Programs
##############################################################################

OPENAI = """
import os, openai
client = openai.OpenAI(max_retries=0, timeout=120)
MODEL, messages = os.environ["MODEL"], [{"role": "user", "content": "Name a colour."}]
def chat(**more):
    return client.chat.completions.create(**{**dict(
        model=MODEL, messages=messages, max_tokens=12, temperature=0), **more})
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {
    "type": "object", "properties": {"city": {"enum": ["Rome"]}}, "required": ["city"]}}}
def refused(action):
    try:
        action()
    except openai.APIStatusError as error:
        return print(type(error).__name__, error.status_code, error.type)
    raise SystemExit("it was not refused")
"""

OPENAI_FEATURES = {
    "chat": "answer = chat(); assert answer.usage.completion_tokens; "
            "print(repr(answer.choices[0].message.content))",
    "stream": "chunks = list(chat(stream=True, stream_options={'include_usage': True}))\n"
              "assert chunks[-1].usage.completion_tokens\n"
              "print(repr(''.join(c.choices[0].delta.content or '' for c in chunks "
              "if c.choices)))",
    "n=2": "assert len(chat(n=2).choices) == 2; print(len({c.choices[0].index for c in "
           "chat(n=2, stream=True) if c.choices}))",
    "logprobs": "top = chat(logprobs=True, top_logprobs=3).choices[0].logprobs.content[0]\n"
                "assert len(top.top_logprobs) == 3; print(repr(top.token))\n"
                "assert any(c.choices and c.choices[0].logprobs for c in chat("
                "logprobs=True, stream=True))",
    "JSON schema": "import json\nprint(sorted(json.loads(chat(max_tokens=40, response_format="
                   "{'type': 'json_schema', 'json_schema': {'name': 'x', 'schema': {"
                   "'type': 'object', 'properties': {'ok': {'type': 'boolean'}}, 'required':"
                   " ['ok'], 'additionalProperties': False}}}).choices[0].message.content)))",
    "grammar": "print(chat(extra_body={'grammar': 'root ::= \"yes\" | \"no\"'}).choices[0]"
               ".message.content in ('yes', 'no'))",
    "tools": "call = chat(max_tokens=60, tools=[TOOL], tool_choice='required').choices[0]"
             ".message.tool_calls[0].function; print(call.name)",
    "tools, streamed": "names = [call.function.name for c in chat(max_tokens=60, "
                       "tools=[TOOL], tool_choice='required', stream=True) if c.choices "
                       "for call in c.choices[0].delta.tool_calls or () "
                       "if call.function.name]; assert names; print(names)",
    "completions, a list": "print([c.index for c in client.completions.create(model=MODEL, "
                           "prompt=['a', 'b'], max_tokens=3).choices])",
    "completions, echo": "answer = client.completions.create(model=MODEL, prompt='Once', "
                         "max_tokens=3, echo=True); print(answer.choices[0].text[:4])",
    "responses": "answer = client.responses.create(model=MODEL, input='Name a colour.', "
                 "max_output_tokens=12, temperature=0)\n"
                 "assert answer.usage.output_tokens; print(repr(answer.output_text))",
    "responses, streamed": "events = list(client.responses.create(model=MODEL, stream=True, "
                           "input='Hi', max_output_tokens=8)); print(events[-1].type)",
    "context exceeded": "refused(lambda: chat(messages=[{'role': 'user', 'content': "
                        "'word ' * 40000}]))",
    "wrong grammar": "refused(lambda: chat(extra_body={'grammar': 'root ::= (('}))",
    "wrong schema": "refused(lambda: chat(response_format={'type': 'json_schema', "
                    "'json_schema': {'name': 'x', 'schema': {'type': 'nosuch'}}}))",
    "wrong field": "refused(lambda: chat(extra_body={'messages': 5}))",
    "models": "assert [model.id for model in client.models.list()]; print('listed')",
}

ANTHROPIC = """
import os, anthropic
client = anthropic.Anthropic(max_retries=0, timeout=120)
asked = dict(model=os.environ["MODEL"], messages=[{"role": "user", "content": "Hi"}])
"""

ANTHROPIC_FEATURES = {
    "messages": "answer = client.messages.create(max_tokens=12, **asked)\n"
                "assert answer.usage.output_tokens; print(repr(answer.content[0].text))",
    "stream": "with client.messages.stream(max_tokens=12, **asked) as s:\n"
              "    text = ''.join(s.text_stream); assert s.get_final_message().usage."
              "output_tokens\nprint(repr(text))",
    "tools": "answer = client.messages.create(max_tokens=60, tool_choice={'type': 'any'}, "
             "tools=[{'name': 'weather', 'input_schema': {'type': 'object', 'properties': "
             "{'city': {'enum': ['Rome']}}, 'required': ['city']}}], **asked)\n"
             "print([part.name for part in answer.content if part.type == 'tool_use'])",
    "count_tokens": "print(client.messages.count_tokens(**asked).input_tokens)",
    "context exceeded": "try:\n    client.messages.create(max_tokens=4, model=asked['model'], "
                        "messages=[{'role': 'user', 'content': 'word ' * 40000}])\n"
                        "except anthropic.APIStatusError as error:\n"
                        "    print(type(error).__name__, error.status_code)",
}

AI = """
import { generateText, streamText, generateObject, tool } from "ai";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { createAnthropic } from "@ai-sdk/anthropic";
import { z } from "zod";
const baseURL = process.env.BASE, apiKey = "none", name = process.env.MODEL;
const openai = createOpenAI({ baseURL, apiKey });
const compatible = createOpenAICompatible({ name: "mine", baseURL, apiKey,
  includeUsage: true });
const anthropic = createAnthropic({ baseURL, apiKey });
const asked = { prompt: "Name a colour.", maxOutputTokens: 16, temperature: 0, maxRetries: 0 };
async function whole(model) {
  const { text, usage } = await generateText({ model, ...asked });
  if (!text || !usage.outputTokens) throw new Error("no text or no usage");
  console.log(JSON.stringify(text));
}
async function streamed(model) {
  let text = "";
  const result = streamText({ model, ...asked, onError: ({ error }) => { throw error; } });
  for await (const part of result.textStream) text += part;
  if (!text || !(await result.usage).outputTokens) throw new Error("no text or no usage");
  console.log(JSON.stringify(text));
}
"""

AGENTS = """
import os
from typing import Literal
from agents import (Agent, Runner, ModelSettings, OpenAIChatCompletionsModel, function_tool,
                    set_tracing_disabled)
from openai import AsyncOpenAI
set_tracing_disabled(True)
MODEL, settings = os.environ["MODEL"], ModelSettings(max_tokens=24, temperature=0)
"""

PYDANTIC = """
import os
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.models.anthropic import AnthropicModel
MODEL, settings = os.environ["MODEL"], {"max_tokens": 24, "temperature": 0}
def whole(model):
    result = Agent(model, model_settings=settings).run_sync("Name a colour.")
    assert result.output; print(repr(result.output))
"""

LANGCHAIN = """
import os
from langchain_openai import ChatOpenAI
from langchain_anthropic import ChatAnthropic
MODEL = os.environ["MODEL"]
def model(**more):
    return ChatOpenAI(**{**dict(model=MODEL, max_tokens=12, temperature=0, max_retries=0),
                         **more})
"""

LITELLM = """
import os, litellm
litellm.suppress_debug_info = True
asked = dict(messages=[{"role": "user", "content": "Name a colour."}], max_tokens=12,
             temperature=0)
MODEL = os.environ["MODEL"]
"""

LLAMA_INDEX = """
import os
from llama_index.llms.openai_like import OpenAILike
from llama_index.core.llms import ChatMessage
llm = OpenAILike(model=os.environ["MODEL"], api_base=os.environ["BASE"], api_key="none",
                 is_chat_model=True, context_window=4000, max_tokens=12, temperature=0,
                 max_retries=0)
"""

# Without loglikelihood: llama.cpp tells no probabilities of the prompt.
LM_EVAL = r"""
import json, os, subprocess
with open("data.jsonl", "w") as file:
    for n in range(8):
        file.write(json.dumps({"q": "%d plus 1 is" % n, "a": str(n + 1)}) + "\n")
with open("writes.yaml", "w") as file:     # YAML holds JSON
    json.dump({"task": "writes", "dataset_path": "json", "test_split": "test",
               "dataset_kwargs": {"data_files": {"test": os.path.abspath("data.jsonl")}},
               "output_type": "generate_until", "doc_to_text": "{{q}}",
               "doc_to_target": "{{a}}", "metric_list": [{"metric": "exact_match"}],
               "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8}}, file)
subprocess.check_call([
    "lm_eval", "--model", "local-completions", "--tasks", "writes", "--include_path", ".",
    "--batch_size", "4", "--output_path", "out", "--model_args",
    "model=%s,base_url=%s/completions,tokenizer_backend=None,tokenized_requests=False,"
    "max_retries=1,num_concurrent=1" % (os.environ["MODEL"], os.environ["BASE"])])
for folder, _, files in os.walk("out"):
    for file in files:
        with open(os.path.join(folder, file)) as result:
            print(json.load(result)["results"]["writes"])
"""

PROXY = r"""
import json, os, subprocess, sys, time, urllib.request
with open("config.yaml", "w") as file:
    json.dump({"model_list": [{"model_name": "mine", "litellm_params": {
        "model": os.environ["KIND"] + os.environ["MODEL"], "api_key": "none",
        "api_base": os.environ[os.environ["WHERE"]]}}]}, file)
port = 20000 + os.getpid() % 10000
proxy = subprocess.Popen([os.path.join(os.path.dirname(sys.executable), "litellm"),
                          "--config", "config.yaml", "--port", str(port), "--host",
                          "127.0.0.1"])
try:
    for attempt in range(1200):
        try:
            urllib.request.urlopen("http://127.0.0.1:%d/health/liveliness" % port)
            break
        except OSError:
            time.sleep(0.1)
    request = urllib.request.Request(
        "http://127.0.0.1:%d/v1/chat/completions" % port, json.dumps({
            "model": "mine", "max_tokens": 12, "temperature": 0, "messages": [
                {"role": "user", "content": "Name a colour."}]}).encode(),
        {"Content-Type": "application/json"})
    answer = json.load(urllib.request.urlopen(request))
finally:
    proxy.terminate()
    proxy.wait()
print(repr(answer["choices"][0]["message"]["content"]))
"""

CODEX = """mkdir -p .codex && cat > .codex/config.toml <<END
model = "$MODEL"
model_provider = "mine"
[model_providers.mine]
name = "mine"
base_url = "$URL/v1"
wire_api = "responses"
END
codex exec --skip-git-repo-check "Say hi"
"""

OPENCODE = """cat > opencode.json <<END
{"provider": {"mine": {"npm": "@ai-sdk/openai-compatible", "name": "mine",
  "options": {"baseURL": "$URL/v1", "apiKey": "none"}, "models": {"$MODEL": {}}}},
 "autoupdate": false, "share": "disabled"}
END
opencode run --model mine/$MODEL "Say hi"
"""

LLM = """export LLM_USER_PATH=$HOME/llm && mkdir -p $LLM_USER_PATH
cat > $LLM_USER_PATH/extra-openai-models.yaml <<END
- model_id: mine
  model_name: $MODEL
  api_base: $URL/v1
  api_key_name: mine
END
llm keys set mine --value none
llm -m mine %s "Name a colour." -o max_tokens 12 -o temperature 0
"""

PROMPTFOO = """cat > promptfooconfig.yaml <<END
prompts: ["Name a {{thing}}."]
providers:
  - id: openai:chat:$MODEL
    config: {apiBaseUrl: $URL/v1, apiKey: none, max_tokens: 12, temperature: 0}
  - id: openai:responses:$MODEL
    config: {apiBaseUrl: $URL/v1, apiKey: none, max_output_tokens: 12}
  - id: anthropic:messages:$MODEL
    config: {apiBaseUrl: $URL, apiKey: none, max_tokens: 12}
tests: [{vars: {thing: colour}}, {vars: {thing: city}}]
END
PROMPTFOO_DISABLE_TELEMETRY=1 PROMPTFOO_DISABLE_UPDATE=1 promptfoo eval --no-cache --no-table \
  -j 2 -o out.json && node -e 'const s = require("./out.json").results.stats;
  console.log(JSON.stringify(s)); process.exit(s.errors + s.failures)'
"""

CLAUDE = """export ANTHROPIC_MODEL=$MODEL ANTHROPIC_DEFAULT_HAIKU_MODEL=$MODEL
claude -p %s "Say hi"
"""

AIDER = "aider --model openai/$MODEL --exit %s"


def scripts(setup, features):
    """Features that share what comes first."""
    return {name: setup + script + "\n" for name, script in features.items()}


def shell(script):
    return ["sh", "-ec", script]


PROGRAMS = [
    Program("openai", scripts(OPENAI, OPENAI_FEATURES), pip=("openai",)),
    Program("openai 1.3", scripts(OPENAI, {
        "n=2": OPENAI_FEATURES["n=2"], "models": OPENAI_FEATURES["models"],
        "chat": "print(repr(chat().choices[0].message.content))",
        "stream": "print(repr(''.join(c.choices[0].delta.content or '' for c in "
                  "chat(stream=True))))"}), pip=("openai==1.3.0", "httpx<0.28")),
    Program("anthropic", scripts(ANTHROPIC, ANTHROPIC_FEATURES), pip=("anthropic",)),
    Program("npm openai", scripts(
        'import OpenAI from "openai";\nconst client = new OpenAI();\n'
        'const model = process.env.MODEL, messages = [{role: "user", content: "Hi"}];\n', {
            "chat": "console.log((await client.chat.completions.create({model, messages, "
                    "max_tokens: 12})).choices[0].message.content.length > 0);",
            "stream": "let text = ''; for await (const c of await client.chat.completions."
                      "create({model, messages, max_tokens: 12, stream: true})) text += "
                      "c.choices[0]?.delta?.content ?? ''; if (!text) throw 1; "
                      "console.log(true);",
            "responses": "console.log((await client.responses.create({model, input: 'Hi', "
                         "max_output_tokens: 12})).output_text.length > 0);"}),
            npm=("openai",)),
    Program("npm anthropic", scripts(
        'import Anthropic from "@anthropic-ai/sdk";\nconst client = new Anthropic();\n'
        'const asked = {model: process.env.MODEL, max_tokens: 12, messages: [{role: "user", '
        'content: "Hi"}]};\n', {
            "messages": "console.log((await client.messages.create(asked)).content[0].text"
                        ".length > 0);",
            "stream": "console.log((await client.messages.stream(asked).finalMessage())"
                      ".content[0].text.length > 0);"}), npm=("@anthropic-ai/sdk",)),
    Program("Vercel AI SDK", scripts(AI, {
        "openai, whole": "await whole(openai(name));",
        "openai, streamed": "await streamed(openai(name));",
        "openai.chat, streamed": "await streamed(openai.chat(name));",
        "openai-compatible, whole": "await whole(compatible(name));",
        "openai-compatible, streamed": "await streamed(compatible(name));",
        "anthropic, whole": "await whole(anthropic(name));",
        "anthropic, streamed": "await streamed(anthropic(name));",
        "generateObject": "const { object } = await generateObject({ model: openai.chat(name),"
                          " ...asked, maxOutputTokens: 40, schema: z.object({ ok: "
                          "z.boolean() }) }); console.log(Object.keys(object));",
        "a tool": "const { toolCalls } = await generateText({ model: compatible(name), "
                  "...asked, maxOutputTokens: 60, toolChoice: 'required', tools: { weather: "
                  "tool({ inputSchema: z.object({ city: z.enum(['Rome']) }) }) } }); "
                  "console.log(toolCalls[0].toolName);"}),
            npm=("ai", "@ai-sdk/openai", "@ai-sdk/openai-compatible", "@ai-sdk/anthropic",
                 "zod")),
    Program("openai-agents", scripts(AGENTS, {
        "default model": "print(repr(Runner.run_sync(Agent('a', model=MODEL, model_settings="
                         "settings), 'Say hi').final_output))",
        "streamed": "import asyncio\nasync def main():\n    result = Runner.run_streamed(Agent("
                    "'a', model=MODEL, model_settings=settings), 'Say hi')\n"
                    "    print(len([e async for e in result.stream_events()]) > 2)\n"
                    "asyncio.run(main())",
        "chat": "print(repr(Runner.run_sync(Agent('a', model=OpenAIChatCompletionsModel(MODEL, "
                "AsyncOpenAI()), model_settings=settings), 'Say hi').final_output))",
        "a tool": "@function_tool\ndef weather(city: Literal['Rome']) -> str:\n"
                  "    return 'sunny'\n"
                  "print(len(Runner.run_sync(Agent('a', model=MODEL, tools=[weather], "
                  "model_settings=ModelSettings(max_tokens=60, temperature=0, tool_choice="
                  "'required')), 'Weather in Rome?').raw_responses))"}),
            pip=("openai-agents",)),
    Program("pydantic-ai", scripts(PYDANTIC, {
        "chat": "whole(OpenAIChatModel(MODEL))",
        "responses": "whole(OpenAIResponsesModel(MODEL))",
        "anthropic": "whole(AnthropicModel(MODEL))",
        "streamed": "import asyncio\nasync def main():\n    async with Agent(OpenAIChatModel("
                    "MODEL), model_settings=settings).run_stream('Hi') as r:\n"
                    "        print(len([t async for t in r.stream_text()]) > 0)\n"
                    "asyncio.run(main())"}), pip=("pydantic-ai-slim[openai,anthropic]",)),
    Program("instructor", {
        "JSON schema": OPENAI + "import instructor\nfrom pydantic import BaseModel\n"
                       "class Answer(BaseModel):\n    ok: bool\n"
                       "made = instructor.from_openai(client, mode=instructor.Mode."
                       "JSON_SCHEMA)\nprint(type(made.chat.completions.create(model=MODEL, "
                       "messages=messages, response_model=Answer, max_tokens=40, "
                       "temperature=0, max_retries=0)))\n",
        "tools": OPENAI + "import instructor\nfrom pydantic import BaseModel\n"
                 "class Answer(BaseModel):\n    ok: bool\n"
                 "made = instructor.from_openai(client)\nprint(type(made.chat.completions."
                 "create(model=MODEL, messages=messages, response_model=Answer, "
                 "max_tokens=60, temperature=0, max_retries=0)))\n"}, pip=("instructor",)),
    Program("langchain", scripts(LANGCHAIN, {
        "invoke": "answer = model().invoke('Name a colour.'); assert answer.usage_metadata"
                  "['output_tokens']; print(repr(answer.content))",
        "stream": "print(repr(''.join(c.content for c in model(stream_usage=True).stream("
                  "'Name a colour.'))))",
        "batch": "print(len(model().batch(['a', 'b', 'c'])))",
        "logprobs": "print(bool(model(logprobs=True).invoke('a').response_metadata["
                    "'logprobs']['content']))",
        "responses": "print(bool(model(use_responses_api=True).invoke('Hi').content))",
        "structured output": "print(sorted(model(max_tokens=40).with_structured_output({"
                             "'title': 'x', 'type': 'object', 'properties': {'ok': {'type': "
                             "'boolean'}}, 'required': ['ok'], 'additionalProperties': "
                             "False}, method='json_schema').invoke('Hi')))",
        "anthropic": "print(bool(ChatAnthropic(model=MODEL, max_tokens=12).invoke('Hi')"
                     ".content))"}), pip=("langchain-openai", "langchain-anthropic")),
    Program("llama-index", scripts(LLAMA_INDEX, {
        "chat": "print(repr(llm.chat([ChatMessage(role='user', content='Hi')]).message"
                ".content))",
        "complete": "print(repr(llm.complete('Name a colour.').text))",
        "stream_chat": "print(len(list(llm.stream_chat([ChatMessage(role='user', "
                       "content='Hi')]))) > 1)"}),
            pip=("llama-index-llms-openai-like", "llama-index-core")),
    Program("litellm", dict(scripts(LITELLM, {
        "openai/": "print(repr(litellm.completion('openai/' + MODEL, api_base=os.environ["
                   "'BASE'], **asked).choices[0].message.content))",
        "openai/, streamed": "print(repr(''.join(c.choices[0].delta.content or '' for c in "
                             "litellm.completion('openai/' + MODEL, stream=True, api_base="
                             "os.environ['BASE'], **asked))))",
        "anthropic/": "print(repr(litellm.completion('anthropic/' + MODEL, api_base=os."
                      "environ['URL'], **asked).choices[0].message.content))",
        "hosted_vllm/": "print(repr(litellm.completion('hosted_vllm/' + MODEL, api_base="
                        "os.environ['BASE'], **asked).choices[0].message.content))",
        "responses": "print(litellm.responses(model='openai/' + MODEL, input='Hi', "
                     "max_output_tokens=12, api_base=os.environ['BASE']).status)"}),
            **{"proxy, openai/": "import os; os.environ.update(KIND='openai/', WHERE='BASE')\n"
                                 + PROXY,
               "proxy, anthropic/": "import os; os.environ.update(KIND='anthropic/', "
                                    "WHERE='URL')\n" + PROXY}),
            pip=("litellm[proxy]", "mcp")),
    Program("lm_eval", {"generate_until, batches of 4": LM_EVAL}, pip=("lm_eval[api]",)),
    Program("llm", {"streamed": shell(LLM % ""), "whole": shell(LLM % "--no-stream")},
            pip=("llm",)),
    Program("promptfoo", {"eval of three providers": shell(PROMPTFOO)}, npm=("promptfoo",)),
    Program("aider", {"message": shell(AIDER % ""), "whole": shell(AIDER % "--no-stream")},
            pip=("aider-chat",), agent=True),
    Program("opencode", {"run": shell(OPENCODE)}, npm=("opencode-ai",), agent=True),
    Program("Codex", {"exec": shell(CODEX)}, npm=("@openai/codex",), agent=True),
    Program("Claude Code", {
        "print": shell(CLAUDE % ""),
        "stream-json": shell(CLAUDE % "--verbose --output-format stream-json")},
        npm=("@anthropic-ai/claude-code",), agent=True, says="output token maximum"),
]


##############################################################################
# Running them
##############################################################################


@contextlib.contextmanager
def relayed(space, upstream):
    """The LLM server's address below a relay."""
    with Relay(space, provider=False) as relay:
        share(space, relay.url, NAME, upstream, "--workers", "4", "--max-tokens",
              str(MOST_TOKENS))
        yield relay.url


def try_program(program, options, space, url):
    """Run all its features directly and through the relay; the number of faults."""
    faults = 0
    if not program.is_installed(options.cache):
        print("%-4s %-16s is not installed: --install fetches it" % (MISSING, program.name))
        return 0
    version = program.version(options.cache)
    for name, script in program.features.items():
        passed, took, line = run(program, options, script, space, url, addresses(url))
        word, note = PASSED if passed else FAILED, ""
        if not program.agent and (options.compare or not passed):
            direct = run(program, options, script, space, options.upstream,
                         addresses(options.upstream))
            word = MISSING if not passed and not direct[0] else word
            note = "as directly" if (passed, line) == direct[::2] else \
                "directly: %s%s" % ("" if direct[0] else "fails, ", direct[2][:90])
        faults += word == FAILED
        show(word, program, version, name, took, line, note)
    return faults


def show(word, program, version, name, took, line, note=""):
    print("%-4s %-14s %-10s %-28s %5.1f s  %s%s" % (
        word, program.name, version, name, took, line[:90], "  (%s)" % note if note else ""),
        flush=True)


README = {"openai (Python)": "openai", "openai (JavaScript)": "npm openai",
          "LangChain": "langchain", "LiteLLM": "litellm", "Anthropic's client": "anthropic"}
SETTINGS = {  # which file README's block is, and what asks with it
    "Codex": (".codex/config.toml", "codex exec --skip-git-repo-check 'Say hi'"),
    "opencode": ("opencode.json", "opencode run --model relay/%s 'Say hi'" % NAME)}


def readme_entries(url):
    """(program, script or command) for each entry of README's section, as printed there."""
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
        section = re.search(r"^## Use it with.*?(?=^## )", file.read(), re.M | re.S).group()
    section = section.replace("http://localhost:8000", url)
    for title, language, text in re.findall(r"^\*\*(.+?)\*\*[^\n]*\n```(\w+)\n(.*?)^```",
                                            section, re.M | re.S):
        program, = [each for each in PROGRAMS if each.name == README.get(title, title)]
        if language == "sh":
            text = shell(text)
        elif title in SETTINGS:
            path, command = SETTINGS[title]
            text = shell("mkdir -p $(dirname %s)\ncat > %s <<'END'\n%sEND\n%s\n" % (
                path, path, text, command))
        yield program, text


def try_readme(options, space, url):
    """Run what README prints; the number of faults."""
    faults = 0
    for program, text in readme_entries(url):
        if options.only and program.name not in options.only.split(","):
            continue
        if not program.is_installed(options.cache):
            print("%-4s %-16s is not installed: --install fetches it" % (MISSING, program.name))
            continue
        passed, took, line = run(program, options, text, space, url, {})
        faults += not passed
        show(PASSED if passed else FAILED, program, program.version(options.cache),
             "as README prints it", took, line)
    return faults


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--upstream", metavar="URL", required=True,
                        help="the LLM server, without /v1")
    parser.add_argument("--install", action="store_true", help="fetch the packages first")
    parser.add_argument("--cache", metavar="DIR", default=os.path.join(
        tempfile.gettempdir(), "neuroengine-programs"), help="where they are "
        "(default: %(default)s)")
    parser.add_argument("--only", metavar="NAME,...", help="these programs alone")
    parser.add_argument("--seconds", type=float, default=300, help="the time limit of a "
                        "feature (default: %(default)s)")
    parser.add_argument("--readme", action="store_true",
                        help="run what README prints instead")
    parser.add_argument("--compare", action="store_true", help="run all directly, too, and "
                        "compare; otherwise only what fails")
    parser.add_argument("--keep", action="store_true", help="keep the logs")
    options = parser.parse_args(argv)
    end_on_signals()
    os.makedirs(options.cache, exist_ok=True)
    chosen = [program for program in PROGRAMS
              if not options.only or program.name in options.only.split(",")]
    faults = 0
    for program in chosen:
        if options.install and not program.is_installed(options.cache):
            try:
                program.install(options.cache)
            except (OSError, subprocess.CalledProcessError) as error:
                print("%s cannot be installed: %s" % (program.name, error))
                shutil.rmtree(program.folder(options.cache), ignore_errors=True)
    space = Workspace("programs")
    try:
        with relayed(space, options.upstream.rstrip("/")) as url:
            if options.readme:
                faults += try_readme(options, space, url)
            else:
                faults += sum(try_program(program, options, space, url)
                              for program in chosen)
    except Broken as error:
        print(error)
        faults += 1
    finally:
        space.close(options.keep)
    print("%d faults" % faults)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
