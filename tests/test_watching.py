"Watching a run: the numbers are right, the wish to stop is granted between two updates, and a kernel hears the button while it computes."
import io
import math
import os
import re
import signal
import threading
import time
from dataclasses import replace

import pytest
from hypothesis import given, strategies as st

from llm_scratch.pretraining import Step
from llm_scratch.watching import (READER, SCHEDULER, Curve, LineView, NotebookView, Progress, TerminalView, View, duration, has_subshells, loss_svg, open_view, progress_html, progress_line,
                                  progress_text, sparkline, until_asked)

finite = st.floats(-1e3, 1e3)


def made(n, loss=2., n_tokens=100): return Step(n, loss, lr=1., grad_norm=.5, n_tokens=n_tokens)


class Clock:
    def __init__(self): self.now = 0.
    def __call__(self): return self.now


def training(clock, n_steps, first=1, seconds=1., closed=None):
    try:
        for n in range(first, n_steps+1): clock.now += seconds; yield made(n)
    except GeneratorExit:
        if closed is not None: closed.append(n)
        raise


# --- numbers -------------------------------------------------------------------------------------------------------

@given(st.lists(finite, max_size=300), st.integers(1, 8).map(lambda n: 2*n))
def test_a_curve_loses_nothing_and_stays_small(values, most):
    curve = Curve(most)
    for y in values: curve = curve.after(y)
    sizes = [min(curve.width, curve.n-i*curve.width) for i in range(len(curve.sums))]
    assert sum(sizes) == curve.n == len(values) and len(curve.points) <= most and (curve.width == 1 or len(curve.points) >= most//2)
    at = 0
    for (middle, y), size in zip(curve.points, sizes):  # each point is the mean of its own values, in order
        assert y == pytest.approx(sum(values[at:at+size])/size, abs=1e-9) and middle == at + (size+1)/2
        at += size


@given(st.lists(st.tuples(finite, st.floats(.01, 10), st.floats(.01, 10), st.integers(1, 10**6)), min_size=2, max_size=30), st.floats(.1, .99))
def test_means_are_those_of_the_book(rows, keep):
    p = Progress(100, keep=keep)
    for n, (loss, busy, body, tokens) in enumerate(rows, 1): p = p.after(made(n, loss, tokens), *((busy, busy+body) if n > 1 else ()))
    weights = [keep**(len(rows)-n) for n in range(1, len(rows)+1)]
    def total(value, since=0): return sum(w*value(r) for w, r in list(zip(weights, rows))[since:])
    assert p.loss == pytest.approx(total(lambda r: r[0])/sum(weights), rel=1e-6, abs=1e-6)
    assert p.tokens_per_second == pytest.approx(total(lambda r: r[3], 1)/total(lambda r: r[1], 1))
    assert p.seconds_left == pytest.approx((100-len(rows))*total(lambda r: r[1]+r[2], 1)/sum(weights[1:]))


def test_nothing_is_known_before_it_is_known():
    p = Progress(10)
    assert all(math.isnan(x) for x in (p.loss, p.tokens_per_second, p.seconds_left)) and p.last is None
    p = p.after(made(1))
    assert p.loss == 2. and math.isnan(p.tokens_per_second) and math.isnan(p.seconds_left)
    assert progress_line(p) == "1/10, loss 2.00" and "– left" in progress_text(p) and ">left</span> –" in progress_html(p)


def test_a_resumed_run_begins_where_it_was():
    p = Progress(100).after(made(41)).after(made(42), 1., 1.)
    assert (p.first, p.n, p.seconds_left) == (40, 42, 58.) and ">40</text>" in loss_svg(p)
    for n in range(43, 101): p = p.after(made(n))
    assert re.search(r'points="[^"]*?([\d.]+),[\d.]+"', loss_svg(p, 480, 120))[1] == "470.0"  # the curve ends where the axis does


@pytest.mark.parametrize("seconds, said", [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3599.4, "59:59"), (3600, "1:00:00"), (86399, "23:59:59"), (86400, "1 day 0:00:00"), (200000, "2 days 7:33:20"), (math.nan, "–"), (math.inf, "–")])
def test_durations(seconds, said): assert duration(seconds) == said


@given(st.lists(finite, max_size=200), st.integers(1, 60))
def test_a_sparkline_fits_and_shows_the_ends(values, width):
    line = sparkline(values, width)
    assert len(line) == min(width, len(values)) and set(line) <= set("▁▂▃▄▅▆▇█")
    if len(set(values)) > 1 and len(values) <= width and max(values)-min(values) > 1e-6: assert line[values.index(max(values))] == "█" and line[values.index(min(values))] == "▁"


def test_a_sparkline_uses_every_value(): assert sparkline([0, 0, 0, 0, 9], 2) == "▁█" and sparkline([9, 0, 0, 0, 0], 2) == "█▁" and sparkline([5, 5, 5], 3) == "▄▄▄"


def test_the_curve_is_drawn_downwards_and_to_scale():
    p = Progress(10)
    for n in range(1, 6): p = p.after(made(n, 6.-n))
    points = [tuple(map(float, q.split(","))) for q in re.search(r'points="([^"]*)"', loss_svg(p, 480, 120))[1].split()]
    assert points[0] == (40 + 430*.1, 12) and points[-1] == (40 + 430*.5, 100), "first of ten updates at a tenth of the axis and on top; the fifth in the middle, at the bottom"
    assert all(a[0] < b[0] and a[1] < b[1] for a, b in zip(points, points[1:])) and ">5.00<" in loss_svg(p) and ">1.00<" in loss_svg(p) and "10 updates" in loss_svg(p)


@given(st.text(max_size=300), st.integers(60, 120))
def test_what_a_model_wrote_cannot_break_the_screen(text, width):
    p = replace(Progress(10).after(made(1)).after(made(2), 1., 1.), text=text)
    shown, page = progress_text(p, width), progress_html(p)
    assert all(c.isprintable() for line in shown.split("\n") for c in line) and all(len(line) <= width for line in shown.split("\n")) and len(shown.split("\n")) <= 8
    assert all(len(line) <= width for line in progress_text(replace(p, text=text + "x"*200), width).split("\n"))
    assert not set(re.findall(r"<(\w+)", page)) - {"div", "svg", "path", "polyline", "text", "span", "pre"}


def test_a_page_is_escaped(): assert "<b>" not in progress_html(replace(Progress(2).after(made(1)), text="<b>x</b> & y")) and "&lt;b&gt;x&lt;/b&gt; &amp; y" in progress_html(replace(Progress(2).after(made(1)), text="<b>x</b> & y"))


def test_the_bar_grows():
    bars = [progress_text(Progress(10).after(made(n)), 80).split("\n")[0].count("━") for n in (1, 5, 10)]
    assert bars == [4, 20, 40]


# --- watching --------------------------------------------------------------------------------------------------------

def test_two_clocks():
    clock = Clock()
    view = View(10, clock=clock)
    for step in view.watch(training(clock, 10, seconds=2.)):
        clock.now += 3.
        if step.n == 4: break
    assert view.progress.tokens_per_second == pytest.approx(50.) and view.progress.seconds_left == pytest.approx(6*5.)


@pytest.mark.parametrize("n", [1, 2, 9])
def test_a_wish_is_granted_after_the_update_and_what_is_watched_is_closed(n):
    clock, closed = Clock(), []
    view, steps = View(10, clock=clock), training(clock, 10, closed=closed)  # held here, so that no garbage collector closes it
    seen = []
    for step in view.watch(steps):
        seen.append(step.n)
        if step.n == n: view.stop()
    assert seen == list(range(1, n+1)) and closed == [n] and view.stopped_by == READER


def test_after_the_last_update_nobody_leaves():
    ended = []
    def steps():
        for n in (1, 2): yield made(n)
        ended.append("the model is written")
    view = View(2)
    for step in view.watch(steps()):
        if step.n == 2: view.stop()
    assert ended and view.stopped_by == 0


def test_a_loop_that_is_left_closes_what_is_watched():
    clock, closed = Clock(), []
    steps = View(10, clock=clock).watch(training(clock, 10, closed=closed))
    assert next(steps).n == 1
    steps.close()
    assert closed == [1] and list(View(3).watch([made(1), made(2)])) == [made(1), made(2)]  # a list has nothing to close


def test_an_error_passes_and_the_signals_are_given_back():
    def broken():
        yield made(1)
        raise RuntimeError("the disk is full")
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError, match="full"): list(View(5).watch(broken()))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize("sent, who", [(signal.SIGINT, READER), (signal.SIGTERM, SCHEDULER)])
def test_a_signal_ends_the_loop_and_says_who(sent, who):
    view = View(10)
    for step in view.watch(training(Clock(), 10)):
        if step.n == 3: os.kill(os.getpid(), sent)
    assert (view.progress.n, view.stopped_by) == (3, who)


def test_the_second_ctrl_c_interrupts_and_the_second_sigterm_does_not():
    with pytest.raises(KeyboardInterrupt), until_asked():
        for _ in range(2): os.kill(os.getpid(), signal.SIGINT)
    with until_asked() as asked:
        for _ in range(2): os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert asked() == SCHEDULER


def test_a_thread_may_watch_too():
    view, done = View(5), []
    t = threading.Thread(target=lambda: done.append(len(list(view.watch(training(Clock(), 5))))))
    t.start(); t.join()
    assert done == [5]


@pytest.mark.parametrize("wishes, who", [([0, 0, READER], READER), ([SCHEDULER, 0, 0], SCHEDULER), ([READER]*1000 + [SCHEDULER], SCHEDULER), ([READER]*1000, READER)])
def test_who_asked_survives_the_sum_over_ranks(wishes, who):
    view = View(10)
    for _ in view.watch(training(Clock(), 10), total=lambda mine: float(sum(wishes))): pass
    assert (view.progress.n, view.stopped_by) == (1, who)


def test_looks_are_rationed():
    class Looks(View):
        n = 0
        def draw(self): self.n += 1
    clock = Clock()
    view = Looks(1000, every=.5, clock=clock)
    for _ in view.watch(training(clock, 1000, seconds=.01)): pass
    assert 18 <= view.n <= 23  # ten seconds


# --- screens -----------------------------------------------------------------------------------------------------------

def test_lines_where_there_is_no_terminal():
    said, clock = [], Clock()
    view = LineView(25, 10, said.append, clock)
    for _ in view.watch(training(clock, 25)): pass
    assert said == ["10/25, loss 2.00, 100 tokens/s, 0:15 left", "20/25, loss 2.00, 100 tokens/s, 0:05 left", "25/25, loss 2.00, 100 tokens/s, 0:00 left"]


def test_nothing_is_said_of_a_run_that_never_began():
    said = []
    def broken(): raise RuntimeError("no tokens"); yield
    with pytest.raises(RuntimeError): list(LineView(25, 10, said.append).watch(broken()))
    assert said == []


def test_the_view_follows_the_output():
    from rich.console import Console
    file, terminal = (Console(file=io.StringIO(), force_terminal=t, force_jupyter=False, width=90) for t in (False, True))
    assert type(open_view(9, file)) is LineView and type(open_view(9, terminal)) is TerminalView
    clock = Clock()
    for screen in (file, terminal):
        view = open_view(9, screen, every=3)
        view.clock = clock
        for step in view.watch(training(clock, 9)): view.say("# Onion\x1b[31m Soup")
    assert file.file.getvalue().splitlines()[0] == "pretrain  3/9, loss 2.00, 100 tokens/s, 0:06 left" and "\x1b" not in file.file.getvalue()
    shown = terminal.file.getvalue()
    assert "9 of 9" in shown and "# Onion [31m Soup" in shown and "\x1b[31m" not in shown and "\x1b[?25h" in shown  # the cursor is back


def test_the_button_is_pressed():
    pytest.importorskip("ipywidgets")
    closed, view = [], NotebookView(30, every=0)
    assert "waiting" in view.picture.value
    for step in view.watch(training(Clock(), 30, closed=closed)):
        if step.n == 7: view.button.click()
        assert f"{step.n} of 30" in view.picture.value
    assert closed == [7] and view.stopped_by == READER and view.button.disabled and view.button.description == "stopping after this update"
    assert not has_subshells() and "interrupt it" in view.note.value  # no kernel here


LOOP = """import time
from llm_scratch.pretraining import Step
from llm_scratch.watching import NotebookView
def updates():
    try:
        for n in range(1, 6001): time.sleep(.05); yield Step(n, 2., 1., .5, 100)
    except GeneratorExit: print("saved after", n)
view = NotebookView(6000, every=.1)
display(view)
for step in view.watch(updates()): pass
print("left by", view.stopped_by, "at", step.n, view.note.value)"""


def clicked(kernel, subshell:str)->str:
    "Run the loop, click its button as JupyterLab does, amid the running cell; what the cell printed."
    kernel.execute(LOOP)
    button, said, end = None, "", time.monotonic() + 200
    while time.monotonic() < end:
        message = kernel.get_iopub_msg(timeout=150)
        kind, content = message["msg_type"], message["content"]
        assert kind != "error", content
        if kind == "comm_open" and content["data"]["state"].get("_model_name") == "ButtonModel": button = content["comm_id"]
        if kind == "stream" and content["name"] == "stdout": said += content["text"]
        if button and " of 6,000" in str(content.get("data", "")):
            click = kernel.session.msg("comm_msg", content=dict(comm_id=button, data=dict(method="custom", content=dict(event="click"))))
            click["header"]["subshell_id"] = subshell
            kernel.shell_channel.send(click)
            button = None
        if kind == "status" and content["execution_state"] == "idle" and message["parent_header"].get("msg_type") == "execute_request": break
    return said


def test_a_real_kernel_hears_the_button_while_it_computes():
    ipykernel = pytest.importorskip("ipykernel")
    if ipykernel.version_info[0] < 7: pytest.skip(f"ipykernel {ipykernel.__version__} has no subshells: from 7 on")
    from jupyter_client.manager import start_new_kernel
    manager, kernel = start_new_kernel()
    try:
        kernel.control_channel.send(kernel.session.msg("create_subshell_request"))
        said = clicked(kernel, kernel.get_control_msg(timeout=150)["content"]["subshell_id"])
    finally: manager.shutdown_kernel(now=True)
    assert re.fullmatch(r"saved after (\d+)\nleft by 1 at \1 \n", said) and "6000" not in said, said
