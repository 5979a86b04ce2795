// Open a notebook in JupyterLab, run all its cells, and press the right arrow on its first slider, or a button, when asked to; every other address is refused.
//
//     node tests/lab.mjs URL [--presses N --until TEXT] [--click LABEL --after TEXT --until TEXT] [--interrupt --after TEXT --until TEXT]
//
// URL is that of the notebook, with its token. Prints one line of JSON: { cells, saw, problems }, where saw tells whether TEXT appeared before and after
// the presses. A button is clicked, or the kernel interrupted, when the TEXT of --after is there and the cells still run; saw then tells whether they ran before, and whether TEXT appeared. Leaves with status 1 when there are problems; what cells show is for the caller to judge. CHROMIUM names the browser.
import { createRequire } from 'node:module';
import { parseArgs } from 'node:util';

const { chromium } = createRequire(new URL('../docs/package.json', import.meta.url))('playwright-core'); // from docs/node_modules
const { values: { presses, until, click, interrupt, after }, positionals: [url] } = parseArgs({ allowPositionals: true, options: {
  presses: { type: 'string', default: '0' }, until: { type: 'string' }, click: { type: 'string' }, after: { type: 'string' }, interrupt: { type: 'boolean', default: false } } });
const limit = 60000, report = { cells: [], saw: [], problems: [] };
const problem = what => report.problems.push(what);

const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM || '/usr/bin/chromium',
  args: ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync'],
});

const stays = address => /^(data|blob|about):/.test(address) || new URL(address).hostname === '127.0.0.1';

async function open() {
  const page = await (await browser.newContext({ viewport: { width: 1280, height: 900 } })).newPage();
  page.setDefaultTimeout(limit);
  await page.route('**/*', route => {
    if (stays(route.request().url())) return route.continue();
    problem(`asks for ${route.request().url()}`);
    return route.abort();
  });
  page.on('websocket', socket => { if (!stays(socket.url())) problem(`asks for ${socket.url()}`); });
  page.on('pageerror', e => problem(`error: ${String(e).slice(0, 200)}`));
  await page.goto(url, { waitUntil: 'domcontentloaded' });
  await page.locator('.jp-Notebook .jp-CodeCell').first().waitFor();
  return page;
}

const runAll = async wait => { // in the page: what the menu's Run All Cells does, once there is a kernel to hear it
  const panel = window.jupyterapp.shell.currentWidget, session = panel.sessionContext;
  await panel.context.ready;
  await session.ready;
  await session.session.kernel.info; // a kernel that is not connected yet drops Run All without a word
  await session.session.kernel.requestExecute({ code: '', silent: true }).done;
  window.allRun = window.jupyterapp.commands.execute('notebook:run-all-cells');
  if (wait) await window.allRun;
};

const seen = async () => { // in the page: the cells when all have run
  await window.allRun;
  return window.jupyterapp.shell.currentWidget.model.toJSON().cells.filter(c => c.cell_type === 'code');
};

async function slide(page) {
  const text = page.locator('.jp-OutputArea-output').getByText(until, { exact: true }), handle = page.locator('.jp-OutputArea-output .noUi-handle').first();
  await handle.focus();
  report.saw.push(await text.isVisible());
  for (let i = 0; i < Number(presses); i++) await handle.press('ArrowRight');
  report.saw.push(await text.waitFor({ timeout: limit / 3 }).then(() => true, () => false));
}

const runs = page => page.evaluate(() => Promise.race([window.allRun.then(() => false), new Promise(go => setTimeout(go, 100, true))]));

async function intervene(page) { // while the cells run
  const text = page.locator('.jp-OutputArea-output').getByText(until), button = page.locator('.jp-OutputArea-output').getByRole('button', { name: click });
  if (click) await button.waitFor();
  await page.locator('.jp-OutputArea-output').getByText(after).waitFor();
  report.saw.push(await runs(page));
  if (click) await button.click();
  else await page.evaluate(() => window.jupyterapp.commands.execute('notebook:interrupt-kernel'));
  report.saw.push(await text.waitFor({ timeout: limit / 3 }).then(() => true, () => false));
}

async function visit() {
  const page = await open(), amid = click || interrupt;
  await page.evaluate(runAll, !amid);
  if (amid) await intervene(page);
  else if (until) await slide(page);
  report.cells = await page.evaluate(seen);
  await page.waitForTimeout(1000); // what a cell shows may ask for something late
}

const late = new Promise((_, fail) => setTimeout(fail, 100000, 'not done after 100 s').unref());
try { await Promise.race([visit(), late]); }
catch (e) { problem(String(e).split('\n')[0]); }
await browser.close();
console.log(JSON.stringify(report));
process.exitCode = report.problems.length ? 1 : 0;
