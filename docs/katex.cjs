// node katex.cjs PAGE.html... sets every formula that docs/conf.py marked, in place.
const fs = require('fs'), katex = require('katex');

const entities = { '&lt;': '<', '&gt;': '>', '&quot;': '"', '&#x27;': "'", '&amp;': '&' };
const plain = s => s.replace(/&(lt|gt|quot|#x27|amp);/g, e => entities[e]);

function set(page) {
  const formula = (whole, tag, display, tex) => {
    try { return `<${tag} class="math">${katex.renderToString(plain(tex).trim(), { displayMode: display === '1', strict: 'ignore' })}</${tag}>`; }
    catch (e) { throw new Error(`${page}: KaTeX: ${e.message}`); }
  };
  const text = fs.readFileSync(page, 'utf8');
  fs.writeFileSync(page, text.replace(/<(span|div) class="math" data-display="([01])">([^<]*)<\/\1>/g, formula));
}

try { process.argv.slice(2).forEach(set); }
catch (e) { console.error(e.message); process.exit(1); }
