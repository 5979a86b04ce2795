// Talk to a model in a page as a visitor would: load it, write, stop, another seed; light and dark, wide and on a phone, with every other address refused.
//
//     node tests/talk.mjs URL [--prompt TEXT]... [--strings FILE] [--shots FOLDER] [--brief] [--broken]
//
// URL is a page with page_piece of llm_scratch.browser in it. Each prompt is written with temperature 0; FILE is a JSON list of texts to be encoded by the page's own tokenizer, its prefix the folder of the page's scripts.
// Prints one line of JSON: { before, focus, ready, texts, again, stopped, long, ids, sent, problems }. --brief does without seeds, Stop and what is too long; --broken expects that loading fails, and reports what the page says. CHROMIUM names the browser.
import { readFileSync, mkdirSync } from 'node:fs';
import { createRequire } from 'node:module';
import { join } from 'node:path';
import { parseArgs } from 'node:util';

const { chromium } = createRequire(new URL('../docs/package.json', import.meta.url))('playwright-core'); // from docs/node_modules
const { values: options, positionals: [url] } = parseArgs({ allowPositionals: true, options: {
  prompt: { type: 'string', multiple: true, default: [] }, strings: { type: 'string' }, shots: { type: 'string' }, brief: { type: 'boolean', default: false }, broken: { type: 'boolean', default: false } } });
const report = { before: null, focus: [], ready: null, texts: [], again: [], stopped: null, long: null, ids: null, sent: [], problems: [] };
const limit = 60000, phone = { width: 390, height: 844 }, desk = { width: 1280, height: 900 }, home = new URL('/', url).href;
const problem = what => report.problems.push(what);

const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM || '/usr/bin/chromium',
  args: ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync'],
});

async function open() {
  const page = await (await browser.newContext({ viewport: desk, colorScheme: 'light' })).newPage();
  page.setDefaultTimeout(limit);
  await page.route('**/*', route => {
    const address = route.request().url();
    if (route.request().method() !== 'GET' || route.request().postData()) problem(`sends to ${address}`);
    if (address.startsWith(home)) { report.sent.push(address.slice(home.length)); return route.continue(); }
    if (/^(data|blob):/.test(address)) return route.continue();
    problem(`asks for ${address}`);
    return route.abort();
  });
  page.on('websocket', socket => problem(`asks for ${socket.url()}`));
  page.on('response', r => { if (r.status() >= 400 && !options.broken) problem(`${r.status()} ${r.url()}`); });
  page.on('console', m => { if (m.type() === 'error' && !options.broken) problem(`console: ${m.text().slice(0, 200)}`); });
  page.on('pageerror', e => problem(`error: ${String(e).slice(0, 200)}`));
  await page.goto(url, { waitUntil: 'load' });
  return page;
}

async function shot(page, name) {
  if (!options.shots) return;
  mkdirSync(options.shots, { recursive: true });
  await page.screenshot({ path: join(options.shots, `${name}.png`), fullPage: true });
}

const text = page => page.locator('#talk-text').textContent(), status = page => page.locator('#talk-status').innerText();
const idle = page => page.waitForFunction(() => document.getElementById('talk-text').getAttribute('aria-busy') === 'false');
const set = (page, name, value) => page.locator(`#talk-${name}`).evaluate((e, v) => { e.value = v; e.dispatchEvent(new Event('input')); }, value);
const wide = () => document.documentElement.scrollWidth > document.documentElement.clientWidth && `too wide at ${innerWidth} px: ${document.documentElement.scrollWidth}`;

async function write(page, button = 'write') {
  await page.locator(`#talk-${button}`).click();
  await idle(page);
  return { text: await text(page), status: await status(page) };
}

async function turn(page) { // dials, seeds, Stop, and more than fits
  await set(page, 'temperature', '0.8');
  for (const button of ['write', 'write', 'again']) report.again.push({ ...(await write(page, button)), seed: await page.locator('#talk-seed').inputValue() });
  await set(page, 'temperature', '1.5');
  await set(page, 'topp', '1');
  await page.locator('#talk-prompt').fill('# Soup');
  await page.evaluate(() => { document.getElementById('talk-write').click(); setTimeout(() => document.getElementById('talk-stop').click(), 20); }); // from within: a small model is done before a click from without arrives
  await idle(page);
  report.stopped = await status(page);
  await page.locator('#talk-prompt').fill('word '.repeat(790));
  report.long = (await write(page)).status;
}

async function visit() {
  const page = await open();
  report.before = { status: await status(page), loaded: report.sent.filter(f => /onnx$|wasm$/.test(f)), button: await page.locator('#talk-load').innerText() };
  const unnamed = await page.locator('#talk :is(button, input, textarea, progress)').evaluateAll(all => all.filter(e => !(e.labels?.length || e.ariaLabel || e.innerText.trim() || e.hidden)).map(e => e.id));
  if (unnamed.length) problem(`no name for ${unnamed}`);
  await page.locator('#talk-prompt').focus();
  const focus = [];
  for (let i = 0; i < 12; i++) { focus.push(await page.evaluate(() => document.activeElement.id || document.activeElement.textContent.slice(0, 40))); await page.keyboard.press('Tab'); }
  report.focus = focus; // what the keyboard reaches, in order
  await shot(page, 'before-light');
  await page.locator('#talk-load').click();
  await idle(page);
  report.ready = { text: await text(page), status: await status(page) };
  if (options.broken) return;
  await shot(page, 'written-light');
  await set(page, 'temperature', '0');
  for (const prompt of options.prompt) {
    await page.locator('#talk-prompt').fill(prompt);
    report.texts.push(await write(page));
  }
  if (!options.brief) await turn(page);
  if (options.strings) report.ids = await page.evaluate(async strings => {
    const base = document.querySelector('script[src$="talk.js"]').src, { Tokenizer } = await import(new URL('tokenizer.js', base).href), json = async name => (await fetch(new URL(name, base))).json();
    const tok = new Tokenizer(await json('tokenizer.json'), await json('kinds.json'));
    return strings.map(s => tok.encode(s));
  }, JSON.parse(readFileSync(options.strings, 'utf8')));
  for (const [size, name] of [[desk, 'desk'], [phone, 'phone']]) for (const colorScheme of ['light', 'dark']) {
    await page.setViewportSize(size);
    await page.emulateMedia({ colorScheme });
    const found = await page.evaluate(wide);
    if (found) problem(found);
    await shot(page, `${name}-${colorScheme}`);
  }
}

const late = new Promise((_, fail) => setTimeout(fail, 280000, 'not done after 280 s').unref());
try { await Promise.race([visit(), late]); }
catch (e) { problem(String(e).split('\n')[0]); }
await browser.close();
console.log(JSON.stringify(report));
process.exitCode = report.problems.length ? 1 : 0;
