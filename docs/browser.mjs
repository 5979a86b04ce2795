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
  response.writeHead(200, { 'content-type': types[extname(file)] ?? 'application/octet-stream', 'cache-control': 'max-age=3600' });
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
  const grounds = new Map([[null, 'rgb(255,255,255)']]), ratios = new Map(); // what has been asked of a parent, or of two colours, is not asked for each of its thousands of words
  const ground = e => {
    if (!grounds.has(e)) { const c = getComputedStyle(e).backgroundColor; grounds.set(e, (numbers(c)[3] ?? 1) > .5 ? c : ground(e.parentElement)); }
    return grounds.get(e);
  };
  const contrast = (front, back) => {
    const key = front + back;
    if (!ratios.has(key)) { const [a, b] = [light(front), light(back)].sort((x, y) => y - x); ratios.set(key, (a + .05) / (b + .05)); }
    return ratios.get(key);
  };
  const texts = document.querySelectorAll(['p', 'h1', 'h2', 'td', 'summary', 'pre span', 'dt'].map(tag => `article ${tag}`).join() + ', .widget-label, .widget-readout, .widget-html-content, .sidebar-tree a');
  return [...texts].filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()) && e.offsetParent).flatMap(e => {
    const ratio = contrast(getComputedStyle(e).color, ground(e));
    return ratio < 3 ? [`contrast ${ratio.toFixed(1)}: ${e.textContent.trim().slice(0, 40)}`] : [];
  }).slice(0, 3);
};

const formulas = () => ({ marked: document.querySelectorAll('.math').length, set: document.querySelectorAll('.math .katex-html').length, wrong: document.querySelectorAll('.katex-error').length });
const theme = () => document.body.dataset.theme + ' ' + getComputedStyle(document.body).backgroundColor;

// --- the visit ----------------------------------------------------------------------------------------------------

const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM || '/usr/bin/chromium',
  args: ['--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync'],
});
const report = { pages: 0, formulas: 0, widgets: 0, followers: [], results: null, problems: [] };
const problem = (where, what) => report.problems.push(`${where}: ${what}`);

let visited = ''; // the page that complaints are about

async function tab() { // one for all pages: a process for each costs more than the page
  const page = await browser.newPage({ viewport: desk, colorScheme: 'light' });
  const complain = what => problem(visited, what);
  page.on('request', request => { // another host is not found; a route for each request would switch the browser's cache off
    if (!request.url().startsWith(home) && !/^(data|blob|about):/.test(request.url())) complain(`asks for ${request.url()}`);
  });
  page.on('response', r => { if (r.status() >= 400) complain(`${r.status()} ${r.url().replace(home, '')}`); });
  page.on('console', m => { if (m.type() === 'error') complain(`console: ${m.text().slice(0, 200)}`); });
  page.on('pageerror', e => complain(`error: ${String(e).slice(0, 200)}`));
  return page;
}

async function open(file, page) {
  visited = file;
  await page.setViewportSize(desk);
  await page.goto(home + file, { waitUntil: 'load', timeout: 60000 });
  await page.evaluate(() => document.fonts.ready);
}

async function shot(page, name) {
  if (!options.shots) return;
  mkdirSync(options.shots, { recursive: true });
  await page.screenshot({ path: join(options.shots, `${name}.png`) });
}

async function visit(file, page) {
  await open(file, page);
  const name = file.replace('.html', '');
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
  await page.evaluate(() => { document.body.dataset.theme = 'dark'; });
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
  await page.evaluate(() => localStorage.clear()); // the next visitor is a new one: the chosen theme is remembered
  await page.goto('about:blank'); // or the next change of size would lay this page out again
  report.pages++;
}

async function button(page) { // what brings the dark theme; it is the same one on each page
  await open('index.html', page);
  for (let i = 0; i < 3 && !(await page.evaluate(theme)).startsWith('dark'); i++) await page.locator('.theme-toggle:visible').first().click();
  if (!(await page.evaluate(theme)).startsWith('dark')) problem('index.html', 'the button does not bring the dark theme');
  await page.evaluate(() => localStorage.clear());
}

async function search(page) {
  const [word, expected] = options.search.split('=');
  await open('index.html', page);
  await page.locator('input[name="q"]:visible').first().fill(word);
  await page.keyboard.press('Enter');
  await page.waitForURL('**/search.html?**');
  const links = page.locator('#search-results li a');
  await links.first().waitFor({ timeout: 20000 }).catch(() => problem('search.html', `nothing found for ${word}`));
  report.results = await links.evaluateAll(all => [...new Set(all.map(a => new URL(a.href).pathname.slice(1)))]);
  if (!report.results.includes(expected)) problem('search.html', `${word} is not found in ${expected}: ${report.results}`);
  await shot(page, 'search-light');
}

try {
  let page = await tab();
  for (const file of readdirSync(site).filter(f => f.endsWith('.html')).sort()) await visit(file, page).catch(async e => {
    problem(file, String(e).split('\n')[0]);
    await page.close();
    page = await tab();
  });
  await button(page).catch(e => problem('index.html', String(e).split('\n')[0]));
  if (options.search) await search(page);
} finally {
  await browser.close();
  server.close();
}
console.log(JSON.stringify(report));
process.exitCode = report.problems.length ? 1 : 0;
