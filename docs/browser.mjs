// Read the built site in Chromium as a visitor would: light and dark, wide and on a phone, with every other address refused.
//
//     node docs/browser.mjs FOLDER [--search WORD=PAGE] [--shots FOLDER]
//
// Prints one line of JSON: { pages, formulas, widgets, followers, results, problems }; followers are the pages where a picture follows the first slider; leaves with status 1 when there are problems.
// CHROMIUM names the browser; /usr/bin/chromium otherwise.
import { createReadStream, existsSync, mkdirSync, readdirSync, statSync } from 'node:fs';
import { createServer } from 'node:http';
import { extname, join, normalize } from 'node:path';
import { parseArgs } from 'node:util';
import { chromium } from 'playwright-core';

const { values: options, positionals: [site] } = parseArgs({ allowPositionals: true, options: { search: { type: 'string', default: '' }, shots: { type: 'string' } } });
const phone = { width: 390, height: 844 }, desk = { width: 1280, height: 900 };
const types = { '.html': 'text/html; charset=utf-8', '.css': 'text/css', '.js': 'text/javascript', '.svg': 'image/svg+xml', '.png': 'image/png', '.woff2': 'font/woff2' };

const server = createServer((request, response) => {
  const file = join(site, normalize(decodeURIComponent(new URL(request.url, 'http://x').pathname)));
  if (!existsSync(file) || !statSync(file).isFile()) return response.writeHead(404).end();
  response.writeHead(200, { 'content-type': types[extname(file)] ?? 'application/octet-stream' });
  createReadStream(file).pipe(response);
});
await new Promise(done => server.listen(0, '127.0.0.1', done));
const home = `http://127.0.0.1:${server.address().port}/`;

// --- what a page can be asked -------------------------------------------------------------------------------------

const wide = () => { // what is cut off at the right or makes the page scroll: text that leaves the window with no box of its own to scroll in
  const room = document.documentElement.clientWidth, article = document.querySelector('article') ?? document.body;
  const boxed = e => e !== article && e !== document.body && (/auto|scroll|hidden|clip/.test(getComputedStyle(e).overflowX) || boxed(e.parentElement));
  const culprits = [...article.querySelectorAll('*')].filter(e => e.getBoundingClientRect().right > room + 1 && !boxed(e.parentElement)).map(e => e.outerHTML.slice(0, 90));
  const page = document.documentElement.scrollWidth;
  return page > room ? [`the page is ${page} px wide`, ...culprits.slice(0, 3)] : culprits.slice(0, 3);
};

const faint = () => { // texts with too little contrast against what lies behind them
  const numbers = c => (c.match(/[\d.]+/g) ?? [0, 0, 0, 0]).map(Number), light = c => {
    const [r, g, b] = numbers(c).map(v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const ground = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor; if ((numbers(c)[3] ?? 1) > .5) return c; } return 'rgb(255,255,255)'; };
  const texts = document.querySelectorAll(['p', 'h1', 'h2', 'td', 'summary', 'pre span', 'dt'].map(tag => `article ${tag}`).join() + ', .widget-label, .widget-readout, .widget-html-content, .sidebar-tree a');
  return [...texts].filter(e => e.offsetParent && [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())).flatMap(e => {
    const [a, b] = [light(getComputedStyle(e).color), light(ground(e))].sort((x, y) => y - x), ratio = (a + .05) / (b + .05);
    return ratio < 3 ? [`contrast ${ratio.toFixed(1)}: ${e.textContent.trim().slice(0, 40)}`] : [];
  }).slice(0, 3);
};

const formulas = () => ({ marked: document.querySelectorAll('.math').length, set: document.querySelectorAll('.math .katex-html').length, wrong: document.querySelectorAll('.katex-error').length });
const theme = () => document.body.dataset.theme + ' ' + getComputedStyle(document.body).backgroundColor;

// --- the visit ----------------------------------------------------------------------------------------------------

const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM || '/usr/bin/chromium',
  args: ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync'],
});
const report = { pages: 0, formulas: 0, widgets: 0, followers: [], results: null, problems: [] };
const problem = (where, what) => report.problems.push(`${where}: ${what}`);

async function open(file, context) {
  const page = await context.newPage();
  const complain = what => problem(file, what);
  await page.route('**/*', route => {
    const url = route.request().url();
    if (url.startsWith(home) || /^(data|blob):/.test(url)) return route.continue();
    complain(`asks for ${url}`);
    return route.abort();
  });
  page.on('response', r => { if (r.status() >= 400) complain(`${r.status()} ${r.url().replace(home, '')}`); });
  page.on('console', m => { if (m.type() === 'error') complain(`console: ${m.text().slice(0, 200)}`); });
  page.on('pageerror', e => complain(`error: ${String(e).slice(0, 200)}`));
  await page.goto(home + file, { waitUntil: 'load', timeout: 60000 });
  await page.evaluate(() => document.fonts.ready);
  return page;
}

async function shot(page, name) {
  if (!options.shots) return;
  mkdirSync(options.shots, { recursive: true });
  await page.screenshot({ path: join(options.shots, `${name}.png`) });
}

async function visit(file, context) {
  const page = await open(file, context), name = file.replace('.html', '');
  const math = await page.evaluate(formulas);
  if (math.marked !== math.set || math.wrong) problem(file, `${math.set} of ${math.marked} formulas set, ${math.wrong} wrong`);
  report.formulas += math.set;
  const wanted = await page.locator('script[type="application/vnd.jupyter.widget-view+json"]').count();
  if (wanted) await page.locator('.jupyter-widgets').first().waitFor({ timeout: 20000 }).catch(() => problem(file, 'no widget appeared'));
  report.widgets += await page.locator('.jupyter-widgets').count();
  const handle = page.locator('.jupyter-widgets .noUi-handle').first(), shown = () => page.locator('.widget-html-content:visible').allInnerTexts();
  if (wanted && await handle.count()) {
    const before = (await shown()).join();
    await handle.press('ArrowRight');
    await page.waitForTimeout(300);
    if ((await shown()).join() !== before) report.followers.push(file);
  }
  for (const what of await page.evaluate(faint)) problem(file, `light: ${what}`);
  await shot(page, `${name}-light`);

  const before = await page.evaluate(theme);
  for (let i = 0; i < 3 && !(await page.evaluate(theme)).startsWith('dark'); i++) await page.locator('.theme-toggle:visible').first().click();
  const after = await page.evaluate(theme);
  if (!after.startsWith('dark') || after.split(' rgb')[1] === before.split(' rgb')[1]) problem(file, `the dark theme does not come: ${before} to ${after}`);
  for (const what of await page.evaluate(faint)) problem(file, `dark: ${what}`);
  await shot(page, `${name}-dark`);

  for (const size of [desk, phone]) {
    await page.setViewportSize(size);
    await page.evaluate(() => document.querySelectorAll('details').forEach(d => { d.open = true; })); // hints and solutions must fit too
    const culprits = await page.evaluate(wide);
    if (culprits.length) problem(file, `too wide at ${size.width} px: ${culprits.join(' | ')}`);
  }
  await shot(page, `${name}-phone`);
  await page.close();
  report.pages++;
}

async function search(context) {
  const [word, expected] = options.search.split('=');
  const page = await open('index.html', context);
  await page.locator('input[name="q"]:visible').first().fill(word);
  await page.keyboard.press('Enter');
  await page.waitForURL('**/search.html?**');
  const links = page.locator('#search-results li a');
  await links.first().waitFor({ timeout: 20000 }).catch(() => problem('search.html', `nothing found for ${word}`));
  report.results = await links.evaluateAll(all => [...new Set(all.map(a => new URL(a.href).pathname.slice(1)))]);
  if (!report.results.includes(expected)) problem('search.html', `${word} is not found in ${expected}: ${report.results}`);
  await shot(page, 'search-light');
  await page.close();
}

try {
  for (const file of readdirSync(site).filter(f => f.endsWith('.html')).sort()) {
    const context = await browser.newContext({ viewport: desk, colorScheme: 'light' }); // a fresh visitor: the chosen theme is remembered
    await visit(file, context).catch(e => problem(file, String(e).split('\n')[0]));
    await context.close();
  }
  if (options.search) await search(await browser.newContext({ viewport: desk }));
} finally {
  await browser.close();
  server.close();
}
console.log(JSON.stringify(report));
process.exitCode = report.problems.length ? 1 : 0;
