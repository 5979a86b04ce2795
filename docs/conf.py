"Sphinx settings, and the two hooks that let KaTeX set every formula while the site is built."
import html
import re
import subprocess
from configparser import ConfigParser
from pathlib import Path

from docutils.nodes import SkipNode
from sphinx.errors import ExtensionError

DOCS = Path(__file__).resolve().parent
settings = ConfigParser(delimiters=["="])
settings.read(DOCS.parent/"settings.ini", encoding="utf-8")

project = html_title = settings["DEFAULT"]["lib_name"]
author = copyright = settings["DEFAULT"]["author"]
language = "en"
extensions = ["myst_nb", "sphinx_design", "sphinx_copybutton"]
suppress_warnings = ["mystnb.unknown_mime_type"]

exclude_patterns = ["notebooks"] # the originals, offered for download
nb_execution_mode = "off" # outputs are those stored in the notebooks
nb_render_markdown_format = "myst" # tables in outputs, too
nb_ipywidgets_js = {"widgets/embed.js": {}} # our copy, in place of two addresses elsewhere
myst_enable_extensions = ["amsmath", "attrs_block", "attrs_inline", "colon_fence", "deflist", "dollarmath", "fieldlist", "tasklist"]
myst_dmath_allow_space = False # "$5 and $6" is money
myst_heading_anchors = 3
html_math_renderer = "katex"

add_module_names = False
modindex_common_prefix = [f"{project}."]
python_display_short_literal_types = True
python_maximum_signature_line_length = 72
toc_object_entries_show_parents = "hide"
copybutton_exclude = ".linenos, .gp, .go"

html_theme = "furo"
html_theme_options = dict(
    light_css_variables={"color-brand-primary": "#7a3b10", "color-brand-content": "#9a4a12", "color-brand-visited": "#7d5a3c"},
    dark_css_variables={"color-brand-primary": "#f0b27a", "color-brand-content": "#f0b27a", "color-brand-visited": "#d0a07a"})
html_static_path = ["_static"] # docs/build.py adds what comes from npm
html_favicon = "_static/icon.svg"
html_css_files = ["katex/katex.min.css", "custom.css"]
html_copy_source = html_show_sourcelink = False
pygments_style, pygments_dark_style = "default", "github-dark"

# --- math ------------------------------------------------------------------------------------------------------

def tex_span(tex:str, display:bool)->str:
    "The place of a formula, filled in by `set_formulas`."
    tag = "div" if display else "span"
    return f'<{tag} class="math" data-display="{int(display)}">{html.escape(tex)}</{tag}>'

def visit_math(self, node):
    self.body.append(tex_span(node.astext(), display=False))
    raise SkipNode

def visit_displaymath(self, node):
    tex = node.astext()
    if "\\\\" in tex and "\\begin{" not in tex: tex = f"\\begin{{aligned}}{tex}\\end{{aligned}}"
    self.body.append(tex_span(tex, display=True))
    raise SkipNode

def set_formulas(app, error):
    "Let one run of node set the formulas of all pages; a formula that is wrong fails the build."
    if error: return
    pages = [p for p in Path(app.outdir).rglob("*.html") if re.search('class="math" data-display', p.read_text(encoding="utf-8"))]
    if not pages: return
    done = subprocess.run(["node", DOCS/"katex.cjs", *pages], capture_output=True, text=True, timeout=120, check=False)
    if done.returncode: raise ExtensionError(done.stderr.strip())

def setup(app):
    app.add_html_math_renderer("katex", (visit_math, None), (visit_displaymath, None))
    app.connect("build-finished", set_formulas)
