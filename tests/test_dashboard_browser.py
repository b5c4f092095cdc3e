"""The dashboard in a real browser: Debian's Chromium, driven by Playwright."""

import fcntl
import os
import re
import shutil
import subprocess
import sys
import threading
import time

import pytest
from conftest import left_out
from fakenight import PROGRESS, ROOT, FakeNight

pytestmark = pytest.mark.slow
CHROMIUM = shutil.which("chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync"]  # fmt: skip
NASTY = "<script>document.title='stolen'</script><img src=x onerror=document.title='stolen'>"


def progress_lines(rise):
    """Progress lines of a training loss that falls, and that rises by so much in the second half of the run."""
    xs = [i / 30 for i in range(31)]
    losses = [2 + 5 * 0.001**x + 2 * rise * max(0.0, x - 0.5) + 0.001 * (i % 3) for i, x in enumerate(xs)]
    return "".join(
        f"step {10 * i + 2:05d} ({x:.1%}) | loss {y:.6f} | 318 ms | 1,648,000 tok/s\n" for i, (x, y) in enumerate(zip(xs, losses, strict=True))
    )


@pytest.fixture(scope="module")
def night(tmp_path_factory):
    night = FakeNight(tmp_path_factory.mktemp("night") / "tree")
    night.baseline()
    night.experiment(NASTY, 0.99)
    night.experiment("worse", 1.002, progress=progress_lines(0.4))
    night.experiment("broken", None, tail="Traceback (most recent call last):\nRuntimeError: a shape\n")
    night.experiment("better still", 0.95, progress=progress_lines(0.0))
    (archive,) = (night.path / "runs").glob("0002-*")
    (archive / "sample_output.txt").write_text(f"Once upon a time {NASTY}\n")
    return night


@pytest.fixture(scope="module")
def served(night):
    command = [sys.executable, "-m", "lab", "dashboard", "--port", "0", "--tree", str(night.path)]
    process = subprocess.Popen(
        command, cwd=night.path, env=night.env | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
    )
    yield re.match(r"(http://\S+/)", process.stdout.readline())[1]
    process.terminate()
    assert process.wait(timeout=20) == 0


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        left_out("chromium is not installed: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, served):
    """visit(path, **context) -> Page; at the end: nothing was said on the console, no request left the machine."""
    contexts, said, outside = [], [], []

    def open_page(path="", **context):
        contexts.append(browser.new_context(**context))
        page = contexts[-1].new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: outside.append(request.url))
        page.goto(served + path)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []
    assert outside and [url for url in outside if not url.startswith((served, "data:", "blob:"))] == []


def until(page, expression, seconds=20):
    """Waits for a JavaScript expression to hold. (Playwright's own wait_for_function is stopped by the page's policy.)"""
    deadline = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, f"never: {expression}"
        page.wait_for_timeout(100)


def drawn(page):
    page.wait_for_selector("#chart .main-svg")
    until(page, "document.querySelectorAll('#chart .points path').length > 0")
    return page


def shown(page):
    return page.eval_on_selector_all(
        "#table tbody tr:not([hidden]) .c-number", "cells => cells.map(c => Number(c.textContent))"
    )


def test_the_chart_has_as_many_points_as_rows(visit):
    page = drawn(visit())
    assert page.locator("#chart .points path.point").count() == page.locator("#table tbody tr").count() == 5
    assert page.title() == "test · autoresearch"
    buttons = page.eval_on_selector_all(".modebar-btn", "all => all.map(b => b.dataset.title || b.ariaLabel)")
    assert "Zoom" in buttons and not [b for b in buttons if re.search("share|cloud|edit", b, re.IGNORECASE)]


def test_filter_and_sort_by_mouse_and_by_keyboard(visit):
    page = drawn(visit())
    assert shown(page) == [1, 2, 3, 4, 5]
    page.click("button[data-sort=val_bpb]")
    assert shown(page) == [5, 2, 1, 3, 4]  # the crash has no value: last
    page.click("button[data-sort=val_bpb]")
    assert shown(page) == [3, 1, 2, 5, 4]
    assert page.get_attribute("th.c-val_bpb", "aria-sort") == "descending" and not page.get_attribute(
        "th.c-number", "aria-sort"
    )
    page.focus("#filter")
    page.keyboard.type("BETTER")
    assert shown(page) == [5] and page.inner_text("#shown") == "1 of 5"
    page.fill("#filter", "")
    page.select_option("#status", "keep")
    assert sorted(shown(page)) == [1, 2, 5]
    page.select_option("#status", "")
    page.focus("button[data-sort=number]")
    page.keyboard.press("Enter")
    assert shown(page) == [1, 2, 3, 4, 5]
    page.focus("#table tbody tr:nth-child(5) a")
    page.keyboard.press("Enter")
    page.wait_for_url("**/experiment/**")
    assert page.inner_text("h1") == "better still"


def test_an_experiment_opens_from_table_and_chart_and_shows_its_texts_as_text(visit):
    page = drawn(visit())
    page.click("#table tbody tr:nth-child(2) a")
    page.wait_for_url("**/experiment/**")
    assert page.inner_text("h1") == NASTY and page.title() != "stolen"
    assert NASTY in page.inner_text("pre.text") and page.locator(".diff .add").count() >= 1
    assert page.locator("img, script").count() == 0
    page.go_back()
    drawn(page)
    page.evaluate(
        "document.getElementById('chart').emit('plotly_click', {points: [{customdata: [5, document.querySelector('#table tbody tr:nth-child(5) a').textContent]}]})"
    )
    page.wait_for_url("**/experiment/**")
    assert page.inner_text("h1") == "better still"


def test_an_experiment_draws_its_loss_curve_over_the_bests(visit):
    page = drawn(visit())
    page.click("#table tbody tr:nth-child(3) a")
    page.wait_for_selector("#curves .main-svg")
    until(page, "document.querySelectorAll('#curves .scatterlayer .trace').length === 2")
    assert "It parts from the best (row 5) at" in page.inner_text("main")
    assert "parts from the best" in page.text_content("#curves")
    assert page.locator("#curves .shapelayer path").count() == 1


def test_hovering_a_point_shows_the_description_as_text(visit):
    page = drawn(visit())
    box = page.locator("#chart .points path.point").nth(2).bounding_box()
    for i in range(5):  # kept ones are drawn last: look for the nasty one among all
        box = page.locator("#chart .points path.point").nth(i).bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.wait_for_timeout(150)
        if "script" in (page.text_content("#chart .hoverlayer") or ""):
            break
    assert "<script>" in page.text_content("#chart .hoverlayer") and page.title() != "stolen"


def test_the_strip_moves_while_a_run_goes_on_and_a_new_row_appears(visit, night):
    page = drawn(visit())
    assert page.inner_text("[data-live=stage]") == "none in progress"
    log = night.path / "run.log"
    before, going = log.read_bytes(), threading.Event()
    holder = os.open(night.path, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)

    def grow():
        step = 0
        while not going.is_set():
            step += 10
            log.write_text(PROGRESS.replace("00123", f"{step:05d}").replace("41.0%", f"{step / 10:.1f}%"))
            going.wait(0.3)

    thread = threading.Thread(target=grow)
    thread.start()
    try:
        until(page, "document.querySelector('[data-live=stage]').textContent === 'training'")
        first = int(page.inner_text("[data-live=step]").replace(",", ""))
        width = page.evaluate("document.getElementById('bar').offsetWidth")
        until(page, f"Number(document.querySelector('[data-live=step]').textContent) > {first}")
        assert (
            page.inner_text("[data-live=tokens_per_second]") == "1,648,000"
            and page.inner_text("[data-live=seconds_left]") == "177 s"
        )
        assert page.evaluate("document.getElementById('bar').offsetWidth") > width
    finally:
        going.set()
        thread.join()
        os.close(holder)
        log.write_bytes(before)
    until(page, "document.querySelector('[data-live=stage]').textContent === 'none in progress'")
    page.fill("#filter", "row")
    night.experiment("a new row", 1.1)
    until(page, "document.getElementById('shown').textContent === '1 of 6'")
    until(page, "document.querySelectorAll('#chart .points path.point').length === 6")
    night.git("reset", "-q", "--hard")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_it_fits_the_screen_and_follows_the_scheme(visit, scheme, width):
    page = drawn(visit(viewport={"width": width, "height": 800}, color_scheme=scheme))
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    background, ink = (
        page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("backgroundColor", "color")
    )
    light = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (background, ink)]
    assert (light[0] > light[1]) == (scheme == "light") and abs(light[0] - light[1]) > 400
    legend = page.locator("#chart .legendtext").first
    ink = legend.evaluate("e => getComputedStyle(e).fill")
    page.emulate_media(color_scheme="light" if scheme == "dark" else "dark")
    until(page, f"getComputedStyle(document.querySelector('#chart .legendtext')).fill !== '{ink}'")
    page.goto(page.url + "docs")
    assert page.locator("h2").count() == 11 and page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_token_is_asked_for_once(browser, night):
    token = "a-token-of-24-characters"
    command = [sys.executable, "-m", "lab", "dashboard", "--host", "0.0.0.0", "--port", "0", "--tree", str(night.path)]
    env = night.env | {"PYTHONPATH": str(ROOT), "AUTORESEARCH_TOKEN": token}
    process = subprocess.Popen(command, cwd=night.path, env=env, stdout=subprocess.PIPE, text=True)
    try:
        url = re.match(r"http://0\.0\.0\.0(:\d+/)", process.stdout.readline())[1]
        context = browser.new_context()
        page = context.new_page()
        page.goto(f"http://127.0.0.1{url}?tree=test")
        page.fill("#token", "wrong-wrong-wrong")
        page.click("button")
        assert page.inner_text("[role=alert]") == "This is not the token."
        page.fill("#token", token)
        page.click("button")
        drawn(page)
        assert token not in page.url
        assert page.evaluate("document.cookie") == ""  # out of a script's reach
        page.reload()
        drawn(page)
        context.close()
    finally:
        process.terminate()
        process.wait(timeout=20)
