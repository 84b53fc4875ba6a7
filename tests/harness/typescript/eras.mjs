// Both official TypeScript clients on one server at once: v1 with a session, v2 without one (2026-07-28).
//
// usage, in the folder of the installed packages: node --input-type=module - URL CALLS < eras.mjs

const [url, calls] = process.argv.slice(2);
const N = Number(calls);

setTimeout(() => process.exit(2), 60000).unref();

const v1 = {
  ...(await import('@modelcontextprotocol/sdk/client/index.js')),
  ...(await import('@modelcontextprotocol/sdk/client/streamableHttp.js')),
};
const { ElicitRequestSchema } = await import('@modelcontextprotocol/sdk/types.js');
const v2 = await import('@modelcontextprotocol/client');

const fill = async ({ params }) => ({
  action: 'accept',
  content: Object.fromEntries(
    Object.entries(params.requestedSchema.properties).map(([key, { type }]) => [key, type === 'boolean' ? true : key]),
  ),
});

async function connected(kind, options, elicitation) {
  const sent = [];
  const client = new kind.Client({ name: 'eras', version: '1' }, { capabilities: { elicitation: {} }, ...options });
  client.setRequestHandler(elicitation, fill);
  const transport = new kind.StreamableHTTPClientTransport(new URL(url), {
    fetch: (at, init = {}) => {
      const headers = new Headers(init.headers);
      sent.push([init.method ?? 'GET', headers.get('mcp-protocol-version'), headers.has('mcp-session-id')]);
      return fetch(at, init);
    },
  });
  await client.connect(transport);
  return { client, sent };
}

const text = answer => answer.content[0].text;
const old = await connected(v1, {}, ElicitRequestSchema);
const modern = await connected(v2, { versionNegotiation: { mode: 'auto' } }, 'elicitation/create');

const counted = [];
const said = [];
const confirmed = [];
const asked = [];
const progress = [];

async function oldCalls() {
  for (let n = 0; n < N; n++) {
    counted.push(Number(text(await old.client.callTool({ name: 'count', arguments: {} }))));
    asked.push(text(await old.client.callTool({ name: 'test_elicitation', arguments: { message: 'Who?' } })));
  }
}

async function modernCalls() {
  for (let n = 0; n < N; n++) {
    said.push(text(await modern.client.callTool({ name: 'test_simple_text', arguments: {} })));
    confirmed.push(
      text(await modern.client.callTool({ name: 'test_input_required_result_request_state', arguments: {} })),
    );
    const told = [];
    await modern.client.callTool(
      { name: 'test_tool_with_progress', arguments: {} },
      { onprogress: ({ progress }) => told.push(progress) },
    );
    progress.push(told);
  }
}

await Promise.all([oldCalls(), modernCalls()]);
console.log(JSON.stringify({ counted, asked, said, confirmed, progress, old: old.sent, modern: modern.sent }));
await old.client.close();
await modern.client.close();
process.exit(0);
