// One of the official TypeScript clients against one server: a JSON line for each scenario, then the end.
//
// usage, in the folder of the installed packages: node --input-type=module - {v1|v2} {http|sse} URL < driver.mjs

const [version, kind, url] = process.argv.slice(2);
const WATCHED = 'test://watched-resource';
const TIMEOUT = 8000;

setTimeout(() => process.exit(2), 40000).unref();

const sleep = ms => new Promise(done => setTimeout(done, ms));
const within = (ms, what, promise) =>
  Promise.race([promise, sleep(ms).then(() => Promise.reject(new Error(`not within ${ms} ms: ${what}`)))]);
const eventually = async (what, condition) => {
  for (const end = Date.now() + TIMEOUT; !(await condition()); await sleep(20)) {
    if (Date.now() > end) throw new Error(`not within ${TIMEOUT} ms: ${what}`);
  }
};

// The two versions under one surface

async function load() {
  if (version === 'v2') {
    const { Client, StreamableHTTPClientTransport, SSEClientTransport } = await import('@modelcontextprotocol/client');
    return { Client, Transport: kind === 'http' ? StreamableHTTPClientTransport : SSEClientTransport, name: x => x };
  }
  const { Client } = await import('@modelcontextprotocol/sdk/client/index.js');
  const { StreamableHTTPClientTransport } = await import('@modelcontextprotocol/sdk/client/streamableHttp.js');
  const { SSEClientTransport } = await import('@modelcontextprotocol/sdk/client/sse.js');
  const types = await import('@modelcontextprotocol/sdk/types.js');
  const schemas = {
    'elicitation/create': types.ElicitRequestSchema,
    'sampling/createMessage': types.CreateMessageRequestSchema,
    'roots/list': types.ListRootsRequestSchema,
    'notifications/message': types.LoggingMessageNotificationSchema,
    'notifications/resources/updated': types.ResourceUpdatedNotificationSchema,
  };
  return {
    Client,
    Transport: kind === 'http' ? StreamableHTTPClientTransport : SSEClientTransport,
    name: method => schemas[method],
  };
}

// Connections that can be cut: the client sees a broken body, the server a client that hung up

const cuttable = exchanges => (at, init = {}) => {
  const cutter = new AbortController();
  exchanges.push({
    method: init.method ?? 'GET',
    resumes: new Headers(init.headers).has('last-event-id'),
    cut: () => cutter.abort(new TypeError('terminated')),
  });
  const signal = init.signal ? AbortSignal.any([init.signal, cutter.signal]) : cutter.signal;
  return fetch(at, { ...init, signal });
};
const cutAll = exchanges => exchanges.forEach(exchange => exchange.cut());
const gets = (exchanges, resumes) => exchanges.filter(x => x.method === 'GET' && x.resumes === resumes).length;

const { Client, Transport, name } = await load();
const updated = [];
const logged = [];

function newClient() {
  const client = new Client(
    { name: `typescript ${version}`, version: '1' },
    { capabilities: { sampling: {}, elicitation: {}, roots: {} } },
  );
  client.setRequestHandler(name('elicitation/create'), async ({ params }) => ({
    action: 'accept',
    content: Object.fromEntries(Object.keys(params.requestedSchema.properties).map(key => [key, key])),
  }));
  client.setRequestHandler(name('sampling/createMessage'), async ({ params }) => ({
    role: 'assistant',
    model: 'none',
    content: { type: 'text', text: `${params.messages.length} message` },
  }));
  client.setRequestHandler(name('roots/list'), async () => ({ roots: [{ uri: 'file:///root', name: 'root' }] }));
  client.setNotificationHandler(name('notifications/resources/updated'), ({ params }) => void updated.push(params.uri));
  client.setNotificationHandler(name('notifications/message'), ({ params }) => void logged.push(params.data));
  return client;
}

const newTransport = exchanges => new Transport(new URL(url), { fetch: cuttable(exchanges) });

const client = newClient();
const exchanges = [];
const transport = newTransport(exchanges);
const errors = [];
const wire = [];
client.onerror = error => errors.push(String(error.message).slice(0, 200));

const callOn = (caller, tool, args = {}, options = {}) => {
  const rest = [{ timeout: TIMEOUT, ...options }];
  return caller.callTool({ name: tool, arguments: args }, ...(version === 'v1' ? [undefined, ...rest] : rest));
};
const call = (...args) => callOn(client, ...args);
const text = async (...args) => (await call(...args)).content[0].text;
const value = async (...args) => (await call(...args)).structuredContent.result;
const steps = (seconds, wanted, onstep = () => {}) => {
  const told = [];
  const onprogress = ({ progress: step }) => {
    told.push(step);
    onstep(step);
  };
  wire.length = 0;
  return call('slow', { seconds, steps: wanted }, { onprogress }).then(result => ({
    answer: result.content[0].text,
    told,
    wire: wire.map(message => message.params?.progress ?? 'answer'), // as the messages came in
  }));
};
const repeat = async (times, work) => {
  const results = [];
  for (let n = 0; n < times; n++) results.push(await work(n));
  return results;
};

const scenarios = {
  async connect() {
    await client.connect(transport);
    const handle = transport.onmessage;
    transport.onmessage = (message, ...more) => {
      wire.push(message);
      handle(message, ...more);
    };
    return { server: client.getServerVersion().name, session: Boolean(transport.sessionId) };
  },
  async tools() {
    const tools = (await client.listTools()).tools.map(tool => tool.name);
    const failed = await call('test_error_handling');
    return {
      tools,
      text: await text('test_simple_text'),
      isError: failed.isError,
      counted: await repeat(6, () => value('count')),
    };
  },
  async others() {
    const unknown = await client.getPrompt({ name: 'nobody knows it' }).then(() => null, error => error.code);
    const prompt = await client.getPrompt({ name: 'test_prompt_with_arguments', arguments: { arg1: 'a', arg2: 'b' } });
    const ref = { type: 'ref/prompt', name: 'test_prompt_with_arguments' };
    return {
      unknown,
      prompt: prompt.messages[0].content.text,
      resource: (await client.readResource({ uri: 'test://template/7/data' })).contents[0].text,
      completed: (await client.complete({ ref, argument: { name: 'arg1', value: 'par' } })).completion.values,
      pong: await client.ping(),
    };
  },
  progress: () => repeat(3, () => steps(0.1, 10)),
  parallel: () => Promise.all(
    Array.from({ length: 9 }, (_, n) => text('slow', { seconds: 0.02 * (9 - n), steps: 1 }))),
  elicitation: () => repeat(3, () => text('test_elicitation', { message: 'Who are you?' })),
  sampling: () => repeat(3, () => text('test_sampling', { prompt: 'Hello?' })),
  roots: () => repeat(3, () => value('client_roots')),
  async notifications() {
    updated.length = 0;
    await client.subscribeResource({ uri: WATCHED });
    for (let n = 1; n <= 3; n++) {
      await call('touch_watched_resource', { text: `change ${n}` });
      await eventually(`update ${n}`, () => updated.length >= n);
    }
    await client.unsubscribeResource({ uri: WATCHED });
    await call('touch_watched_resource', { text: 'nobody listens' });
    await text('test_simple_text');
    return { updated: [...updated] };
  },
  async logging() {
    logged.length = 0;
    await client.setLoggingLevel('warning');
    await call('test_tool_with_logging');
    const quiet = logged.length;
    await client.setLoggingLevel('info');
    await call('test_tool_with_logging');
    await eventually('log messages', () => logged.length >= 3);
    return { quiet, logged: [...logged] };
  },
  cancel: () => repeat(3, async () => {
    const stop = new AbortController();
    let begun;
    const first = new Promise(done => { begun = done; });
    const outcome = call('slow', { seconds: 60, steps: 600 }, { signal: stop.signal, onprogress: begun }).then(
      () => 'answered', () => 'cancelled');
    await within(TIMEOUT, 'first progress', first);
    const before = await value('slow_calls_running');
    stop.abort();
    await eventually('the end of the call', async () => (await value('slow_calls_running')) === 0);
    return { before, outcome: await outcome };
  }),
};

if (kind === 'http') {
  Object.assign(scenarios, {
    async closed() { // the server asks the client to come back
      const resumed = gets(exchanges, true);
      return { answer: await text('test_reconnection'), resumed: gets(exchanges, true) - resumed };
    },
    async cut() { // every connection is cut, twice in one call: the call's stream, its resumption, the standalone stream
      const resumed = gets(exchanges, true);
      const result = await steps(0.9, 9, step => {
        if (step === 2 || step === 6) cutAll(exchanges);
      });
      return { ...result, resumed: gets(exchanges, true) - resumed };
    },
    async afterwards() { // the standalone stream has come back as well
      updated.length = 0;
      await client.subscribeResource({ uri: WATCHED });
      await call('touch_watched_resource', { text: 'after the cut' });
      await eventually('the update', () => updated.length >= 1);
      await client.unsubscribeResource({ uri: WATCHED });
      return { updated: [...updated], counted: await value('count') };
    },
    async terminate() {
      await transport.terminateSession();
      return { sessionId: transport.sessionId ?? null };
    },
  });
} else {
  // This client comes back without Last-Event-ID, into a session that it never initializes; when, the server says.
  const lost = newClient();
  const seen = [];
  await lost.connect(newTransport(seen));
  cutAll(seen);
  Object.assign(scenarios, {
    async cut() {
      await eventually('the new stream', () => gets(seen, false) >= 2);
      await sleep(200);
      const outcome = await callOn(lost, 'test_simple_text').then(
        result => ({ text: result.content[0].text }), error => ({ code: error.code }));
      await lost.close();
      return { ...outcome, resumed: gets(seen, true) };
    },
    async anew() {
      const next = newClient();
      await next.connect(newTransport([]));
      const tools = (await next.listTools()).tools.length;
      await next.close();
      return { tools };
    },
  });
}

for (const [scenario, run] of Object.entries(scenarios)) {
  const start = Date.now();
  let outcome;
  try {
    outcome = { result: await within(15000, scenario, run()) };
  } catch (error) {
    outcome = { error: `${error.constructor.name} ${error.code ?? ''}: ${error.message}` };
  }
  console.log(JSON.stringify({ scenario, ...outcome, ms: Date.now() - start, errors: errors.splice(0) }));
}
await client.close();
process.exit(0);
