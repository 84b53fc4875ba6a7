// One of the official TypeScript clients under steady work until SIGTERM; then one JSON line: what it called and saw.
//
// usage, in the folder of the installed packages: node --input-type=module - {v1|v2} URL NAME SECONDS < load.mjs

const [version, url, label, seconds] = process.argv.slice(2);
const LONG = Number(seconds);
const OPTIONS = { timeout: 60000 };
const sleep = ms => new Promise(done => setTimeout(done, ms));

const v1 = version === 'v1';
const from = v1 ? '@modelcontextprotocol/sdk/client/index.js' : '@modelcontextprotocol/client';
const { Client } = await import(from);
const { StreamableHTTPClientTransport } = await import(
  v1 ? '@modelcontextprotocol/sdk/client/streamableHttp.js' : from);
const types = v1 ? await import('@modelcontextprotocol/sdk/types.js') : undefined;

const calls = [];
const told = [];
const failures = [];
const client = new Client({ name: `typescript ${version}`, version: '1' }, { capabilities: { elicitation: {} } });
client.setRequestHandler(v1 ? types.ElicitRequestSchema : 'elicitation/create', async () => {
  await sleep(200);
  return { action: 'accept', content: { ok: true } };
});
client.setNotificationHandler(
  v1 ? types.ResourceUpdatedNotificationSchema : 'notifications/resources/updated',
  ({ params }) => void told.push(params.uri));
await client.connect(new StreamableHTTPClientTransport(new URL(url)));

let going = true;
process.on('SIGTERM', () => { going = false; });

async function loop(tool, pause, args, expected) {
  for (let n = 0; going; n++, await sleep(pause)) {
    const text = `${label}-${tool}-${n}`;
    const start = performance.now();
    try {
      const params = { name: tool, arguments: { text, ...args } };
      const result = await client.callTool(params, ...(v1 ? [undefined, OPTIONS] : [OPTIONS]));
      if (result.isError || result.content[0].text !== expected(text)) throw new Error(JSON.stringify(result));
      calls.push([tool, text, (performance.now() - start) / 1000]);
    } catch (error) {
      failures.push(`${text}: ${error.constructor.name} ${error.code ?? ''}: ${error.message}`);
    }
  }
}

console.log('ready');
await Promise.all([
  loop('unsafe', 200, {}, text => text),
  loop('unsafe_long', 100, { seconds: LONG }, text => text),
  loop('ask', 300, {}, text => `${text}: accept`),
  loop('announce', 300, {}, text => text),
]);
for (const end = Date.now() + 10000; Date.now() < end && told.length < calls.filter(c => c[0] === 'announce').length;) {
  await sleep(50);
}
console.log(JSON.stringify({ calls, told, failures }));
await client.close();
process.exit(0);
