"The chat page in Chromium: a person asks, reads while it is written, stops, asks again, rates; with the keyboard, in the dark, on a phone; and the page asks nobody but its server."
import json
import os
from pathlib import Path

import pytest
from cdp import CHROMIUM, Page
from served import scripted_served

from llm_scratch.server import Limits, background_server, make_app

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium here: apt-get install chromium, or set CHROMIUM")
SHOTS = os.environ.get("SHOTS")  # a folder: look at the page yourself
ANSWER = "Take two eggs, a pinch of salt & <b>butter</b>. Crème brûlée 🍮 wants patience.\n1. Whisk.\n2. Bake."


@pytest.fixture(scope="module")
def page():
    with Page() as p: yield p


def shown(page, name):
    if SHOTS: page.shot(Path(SHOTS)/f"{name}.png")


def ask(page, text):
    page.js("document.getElementById('text').focus()")
    page.type(text)
    page.press("Enter", "\r")


STATUS = "document.getElementById('status').textContent"
LAST = "[...document.querySelectorAll('li.assistant p')].at(-1)?.textContent ?? ''"


def button(page, name): page.js(f"[...document.querySelectorAll('button')].filter(b => !b.hidden && (b.getAttribute('aria-label') ?? b.textContent) === {json.dumps(name)}).at(-1).click()")


def test_a_dialogue_with_thumbs(page, tmp_path):
    served,kept = scripted_served(ANSWER, delay=.002),tmp_path/"feedback.jsonl"
    with background_server(make_app(served, feedback=kept)) as url:
        page.asked.clear(), page.problems.clear()
        page.open(url)
        ask(page, "How do I make <i>eggs</i>?")
        page.until(f"({LAST}).length > 5 && ({STATUS}) === 'Writing …'")  # it is read while it is written
        assert ANSWER.startswith(page.js(LAST)) and page.js("document.getElementById('log').getAttribute('aria-busy')") == "true"
        page.until(f"({STATUS}) === 'Done.'")
        assert page.js(LAST) == ANSWER and page.js("document.querySelectorAll('li b, li i').length") == 0  # text is text
        assert page.js("document.activeElement.id") == "text" and page.js("document.getElementById('log').getAttribute('aria-busy')") == "false"
        shown(page, "light")
        button(page, "Good")
        page.until(f"({STATUS}).includes('without the text')")
        page.js("document.getElementById('consent').click()")
        button(page, "Bad")
        page.until(f"({STATUS}).includes('and the text')")
        assert page.js("[...document.querySelectorAll('[aria-pressed]')].map(b => b.getAttribute('aria-pressed')).join()") == "false,true"
        rows = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
        assert [r["rating"] for r in rows] == ["up", "down"] and rows[0]["id"] == rows[1]["id"]
        assert "messages" not in rows[0] and "answer" not in rows[0]
        assert rows[1]["answer"] == ANSWER and rows[1]["messages"] == [dict(role="user", content="How do I make <i>eggs</i>?")]
        ask(page, "And then?")
        page.until(f"document.querySelectorAll('li').length === 4 && ({STATUS}) === 'Done.'")
        button(page, "Regenerate")
        page.until(f"({STATUS}) === 'Writing …'")
        page.until(f"({STATUS}) === 'Done.'")
        said = [len(j.ids) for j in served.engine.jobs]
        assert len(said) == 3 and said[1] == said[2] > said[0]  # the same question again, with what was said before
        assert page.js("document.querySelectorAll('li').length") == 4
    assert all(a.startswith((url, "data:")) for a in page.asked), page.asked
    assert page.problems == []


@pytest.mark.parametrize("how", ["button", "key"])
def test_an_answer_is_stopped(page, how):
    served = scripted_served("word "*90, delay=.03)
    with background_server(make_app(served)) as url:
        page.open(url)
        ask(page, "Go on.")
        page.until(f"({LAST}).length > 3")
        if how == "button": button(page, "Stop")
        else: page.press("Escape")
        page.until(f"({STATUS}) === 'Stopped.'")
        page.until("document.getElementById('stop').hidden && !document.getElementById('send').disabled")
        for _ in range(100):
            if not served.engine.running: break
            page.js("new Promise(go => setTimeout(go, 20))")
        assert served.engine.running == 0, "the server goes on writing for nobody"
        assert 3 < len(page.js(LAST)) < 400
        button(page, "New dialogue")
        assert page.js("document.querySelectorAll('li').length") == 0


def test_what_goes_wrong_is_said_and_nothing_is_lost(page):
    keys = ("a-key-that-is-long-enough",)
    with background_server(make_app(scripted_served("Yes."), keys=keys)) as url:
        page.open(url)
        page.problems.clear()
        ask(page, "May I?")
        page.until(f"({STATUS}).includes('API key')")
        assert page.js("document.getElementById('text').value") == "May I?" and page.js("document.querySelectorAll('li').length") == 0
        page.js(f"document.getElementById('key').value = {json.dumps(keys[0])}")
        page.js("document.getElementById('form').requestSubmit()")
        page.until(f"({STATUS}) === 'Done.'")
        assert page.js(LAST) == "Yes."


def test_a_long_dialogue_forgets_its_beginning_and_says_so(page):
    with background_server(make_app(scripted_served("Yes, yes.", context_len=160), Limits(max_tokens=20))) as url:
        page.open(url)
        for n in range(6):
            ask(page, f"Question number {n}: is it so?")
            page.until(f"document.querySelectorAll('li').length === {2*n+2} && !document.getElementById('send').disabled")
            assert page.js(LAST) == "Yes, yes."
        assert page.js(STATUS).startswith("Done. The dialogue is long: its oldest")


def test_a_model_without_a_template_continues(page):
    served = scripted_served(" upon a time", chat=False)
    with background_server(make_app(served)) as url:
        page.open(url)
        ask(page, "Once")
        page.until(f"({STATUS}) === 'Done.'")
        assert page.js(LAST) == " upon a time" and page.js("document.querySelector('label[for=text]').textContent") == "How the text begins"
        assert served.tokenizer.decode(served.engine.jobs[0].ids[1:]) == "Once"


CONTRAST = """(() => { const n = c => (c.match(/[\\d.]+/g) ?? [0, 0, 0, 0]).map(Number), light = c => { const [r, g, b] = n(c).map(v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
  const ground = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor; if ((n(c)[3] ?? 1) > .5) return c; } return 'rgb(255,255,255)'; };
  return [...document.querySelectorAll('h1, h2, p, button, label, small, span')].filter(e => e.offsetParent && e.textContent.trim() && !e.disabled).map(e => { const [a, b] = [light(getComputedStyle(e).color), light(ground(e))].sort((x, y) => y - x); return [(a + .05) / (b + .05), e.outerHTML.slice(0, 80)]; }).filter(([r]) => r < 4.5); })()"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_it_can_be_read_everywhere(page, tmp_path, dark, width):
    with background_server(make_app(scripted_served("A line that is a good deal longer than a phone is wide, and averyveryverylongwordwithoutanyplacewhereitcouldbebroken to end with. 🍮"), feedback=tmp_path/"f", keys=("a-key-that-is-long-enough",))) as url:
        page.open(url, width=width, height=740, dark=dark, mobile=width < 500)
        page.js("document.getElementById('key').value = 'a-key-that-is-long-enough'")
        ask(page, "How wide is it?")
        page.until(f"({STATUS}) === 'Done.'")
        shown(page, f"{'dark' if dark else 'light'}-{width}")
        assert page.js("document.documentElement.scrollWidth") <= width
        assert page.js(CONTRAST) == []
        tall = page.js("[...document.querySelectorAll('button')].filter(b => b.offsetParent).map(b => Math.min(b.offsetHeight, b.offsetWidth))")
        assert min(tall) >= 44
        assert page.js("getComputedStyle(document.body).backgroundColor") == ("rgb(21, 25, 29)" if dark else "rgb(252, 252, 250)")


def test_it_can_be_used_without_eyes_and_mouse(page, tmp_path):
    with background_server(make_app(scripted_served("Yes."), feedback=tmp_path/"f")) as url:
        page.open(url)
        unnamed = "[...document.querySelectorAll('input, textarea, button')].filter(e => !(e.labels?.length || e.getAttribute('aria-label') || e.textContent.trim())).length"
        assert page.js("document.documentElement.lang") == "en" and page.js(unnamed) == 0
        assert page.js("document.querySelector('[role=status]') !== null && document.querySelector('ol[role=log]').getAttribute('aria-label')") == "Dialogue"
        order = []
        page.js("document.activeElement.blur()")
        for _ in range(4):
            page.press("Tab", windowsVirtualKeyCode=9)
            order.append(page.js("document.activeElement.id"))
            assert page.js("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        assert order == ["fresh", "text", "send", "consent"]


def test_the_page_holds_no_foreign_script():
    from llm_scratch.server import chat_page
    html,policy = chat_page('"><script>alert(1)</script>', feedback=True, wants_key=True)
    assert html.count("<script>") == 1 and "alert(1)" not in html.replace("&lt;script&gt;alert(1)&lt;/script&gt;", "")
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in html.replace("http-equiv", "")
