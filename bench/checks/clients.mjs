// The cases of npm's openai, run by clients.py: node clients.mjs DIR_WITH_NODE_MODULES.
// Prints a line of JSON for each: [package, case, service, passed, seconds, note].
import assert from 'node:assert';
import { createRequire } from 'node:module';
import path from 'node:path';

const require = createRequire(path.resolve(process.argv[2], 'package.json'));
const { OpenAI } = require('openai');
const config = JSON.parse(process.env.CLIENTS_CONFIG);
const client = new OpenAI({ baseURL: config.relay + '/v1', apiKey: 'dummy' });
const user = (content) => [{ role: 'user', content }];
let count = 0;
const unique = (word) => `${word} please js${process.pid}-${++count}`;

function said(text, service) {
  assert.ok(text && (service === 'Real' || text.startsWith('Hello')), JSON.stringify(text));
  return service === 'Real' ? JSON.stringify(text.slice(0, 30)) : '';
}

async function closedSoon(service, prompt) {
  if (service === 'Real') return 'no error';
  const began = performance.now();
  const name = prompt.split(' ').pop();
  assert.ok(await (await fetch(`${config.control}/closed/${name}`)).json(), 'it went on');
  const took = performance.now() - began;
  assert.ok(took < 1000, `closed after ${took} ms`);
  return `closed after ${took.toFixed(0)} ms`;
}

async function rejects(promise, check) {
  let error;
  try { await promise; } catch (caught) { error = caught; }
  assert.ok(error, 'nothing was thrown');
  check(error);
}

async function textOf(stream) {
  let text = '';
  for await (const chunk of stream) text += chunk.choices[0]?.delta?.content ?? '';
  return text;
}

const cases = [
  ['models list and retrieve', ['Text'], async (service) => {
    const ids = [];
    for await (const model of client.models.list()) ids.push(model.id);
    assert.ok(ids.includes(service));
    assert.equal((await client.models.retrieve(service)).id, service);
  }],
  ['chat whole', ['Text', 'Bridge', 'Real'], async (service) => {
    const answer = await client.chat.completions.create({
      model: service, messages: user('Hello there'), max_tokens: 16 });
    assert.ok(answer.usage.total_tokens > 0);
    return said(answer.choices[0].message.content, service);
  }],
  ['chat streamed with usage', ['Text', 'Bridge', 'Real'], async (service) => {
    let text = '', usage;
    for await (const chunk of await client.chat.completions.create({
      model: service, messages: user('Hello there'), max_tokens: 16, stream: true,
      stream_options: { include_usage: true } })) {
      text += chunk.choices[0]?.delta?.content ?? '';
      usage = chunk.usage ?? usage;
    }
    assert.ok(usage.total_tokens > 0);
    return said(text, service);
  }],
  ['the stream helper, with tools', ['Bridge'], async (service) => {
    const answer = await client.chat.completions.stream({
      model: service, messages: user('tools x'), tools: [{ type: 'function', function: {
        name: 'weather', parameters: { type: 'object', properties: {} } } }],
    }).finalChatCompletion();
    assert.deepEqual(answer.choices[0].message.tool_calls.map((call) =>
      JSON.parse(call.function.arguments).city), ['Rome', 'Oslo']);
  }],
  ['completions', ['Text'], async (service) => {
    const answer = await client.completions.create({ model: service, prompt: 'Once' });
    return said(answer.choices[0].text, service);
  }],
  ['embeddings', ['Bridge'], async (service) => {
    const answer = await client.embeddings.create({ model: service, input: ['a'] });
    assert.deepEqual([...answer.data[0].embedding], [0.5, -1]);
  }],
  ['unknown model', ['Text'], () => rejects(client.chat.completions.create({
    model: 'nosuch', messages: user('x') }), (error) => {
    assert.ok(error instanceof OpenAI.NotFoundError, error);
    assert.equal(error.code, 'model_not_found');
  })],
  ['offline is 503 and not sat out', ['Offline'], async (service) => {
    const began = performance.now();
    await rejects(client.chat.completions.create({ model: service, messages: user('x') }),
      (error) => assert.ok(error instanceof OpenAI.InternalServerError, error));
    assert.ok(performance.now() - began < 10000, 'it was retried for long');
  }],
  ['an error before the first token', ['Text', 'Bridge'], (service) => rejects(
    client.chat.completions.create({ model: service, messages: user(unique('fail')) }),
    (error) => assert.equal(error.status, 502))],
  ['an error after the first token', ['Text', 'Bridge'], async (service) => {
    let text = '';
    await rejects((async () => {
      for await (const chunk of await client.chat.completions.create({
        model: service, messages: user(unique('break')), stream: true })) {
        text += chunk.choices[0]?.delta?.content ?? '';
      }
    })(), (error) => assert.ok(error instanceof OpenAI.APIError, error));
    assert.equal(text, 'half');
  }],
  ['context_length_exceeded', ['Bridge', 'Real'], (service) => rejects(
    client.chat.completions.create({ model: service, messages: user(
      service === 'Bridge' ? 'context x' : 'word '.repeat(40000)) }),
    (error) => assert.equal(error.code, 'context_length_exceeded'))],
  ['aborting the stream stops the provider', ['Text', 'Bridge', 'Real'], async (service) => {
    const prompt = unique('endless');
    const stream = await client.chat.completions.create({
      model: service, messages: user(prompt), stream: true, max_tokens: 800 });
    for await (const chunk of stream) if (chunk.choices[0].delta.content) break;
    stream.controller.abort();
    return closedSoon(service, prompt);
  }],
  ['aborting a whole answer stops the provider', ['Text', 'Bridge'], async (service) => {
    const prompt = unique('endless'), abort = new AbortController();
    const answer = client.chat.completions.create({
      model: service, messages: user(prompt) }, { signal: abort.signal });
    setTimeout(() => abort.abort(), 400);
    await rejects(answer, (error) =>
      assert.ok(error instanceof OpenAI.APIUserAbortError, error));
    return closedSoon(service, prompt);
  }],
  ["the service's own base", ['Text'], async (service) => {
    const own = new OpenAI({ baseURL: `${config.relay}/${service}/v1/`, apiKey: 'dummy' });
    const stream = await own.chat.completions.create({
      model: 'anything', messages: user('hi'), stream: true });
    return said(await textOf(stream), service);
  }],
];

for (const [name, services, run] of cases) {
  for (const service of services) {
    if (service === 'Real' && !config.real) continue;
    const began = performance.now();
    let passed = true, note;
    try {
      note = await run(service);
    } catch (error) {
      [passed, note] = [false, String(error?.stack ?? error).slice(0, 400)];
    }
    console.log(JSON.stringify(['npm openai', name, service, passed,
      (performance.now() - began) / 1000, note ?? '']));
  }
}
process.exit(0);
