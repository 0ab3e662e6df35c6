// Drives OpenAI's SDK for Node for tests: one request of the test's a line on stdin, one answer a line on stdout.
//
// {"id", "do", "client": {baseURL, apiKey, …}, "params", "options"} is answered by {"id", "value" or "error", …}; what
// was read of a stream before it failed is in "chunks". {"do": "abort", "which"} leaves an earlier request.

import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { pathToFileURL } from 'node:url';

// Where the SDK is installed is for who runs this to say.
const { default: OpenAI } = await import(pathToFileURL(join(process.argv[2], 'index.mjs')));

const controllers = new Map();

async function* read(stream, found) {
  for await (const chunk of stream) {
    found.push(chunk);
    yield chunk;
  }
}

const acts = {
  async chat(client, params, options) {
    const value = await client.chat.completions.create(params, options);
    return { value, request_id: value._request_id };
  },
  async stream(client, params, options, { chunks, stop_after }) {
    const stream = await client.chat.completions.create({ ...params, stream: true }, options);
    for await (const _ of read(stream, chunks)) {
      // Leaving the loop is how its users leave a stream.
      if (stop_after && chunks.length >= stop_after) break;
    }
    return {};
  },
  async helper(client, params, options) {
    const runner = client.chat.completions.stream(params, options);
    return { value: await runner.finalChatCompletion() };
  },
  async parse(client, params, options) {
    return { value: await client.chat.completions.parse(params, options) };
  },
  async complete(client, params, options) {
    return { value: await client.completions.create(params, options) };
  },
  async embed(client, params, options) {
    return { value: await client.embeddings.create(params, options) };
  },
  async models(client) {
    const value = [];
    for await (const model of client.models.list()) value.push(model);
    return { value };
  },
  async model(client, params) {
    return { value: await client.models.retrieve(params.model) };
  },
};

function told(error) {
  const { status, code, param, type, requestID, message } = error;
  const kinds = [];
  for (let kind = error.constructor; kind?.name; kind = Object.getPrototypeOf(kind)) kinds.push(kind.name);
  return { kinds, status, code, param, type, request_id: requestID, message: String(message) };
}

async function serve(asked) {
  if (asked.do === 'abort') return controllers.get(asked.which)?.abort();
  const controller = new AbortController();
  controllers.set(asked.id, controller);
  const chunks = [];
  let answer;
  try {
    const client = new OpenAI({ maxRetries: 0, ...asked.client });
    const options = { ...asked.options, signal: controller.signal };
    answer = await acts[asked.do](client, asked.params, options, { chunks, stop_after: asked.stop_after });
  } catch (error) {
    answer = { error: told(error) };
  }
  controllers.delete(asked.id);
  process.stdout.write(`${JSON.stringify({ id: asked.id, chunks, ...answer })}\n`);
}

for await (const line of createInterface({ input: process.stdin })) serve(JSON.parse(line));
