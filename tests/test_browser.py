"""Pages and demo in a real browser (Debian's chromium, driven by Playwright): `make test-browser`.

Screenshots go to the folder that BROWSER_SHOTS names, if it names one: look at them.
"""

import os
import shutil
from dataclasses import replace

import numpy as np
import pytest

from erc_moe.conversations import Conversation, Utterance
from erc_moe.corpora import load_corpus
from erc_moe.training import Predictions

pytestmark = pytest.mark.browser

GRADIO_SAYS = "Method not implemented."  # of its own upload, on the console
SIZES = {"phone": (390, 844), "desktop": (1400, 900)}


def predictions(conversations, labels, experts=("text", "speech", "multimodal"), seed=0):
    rng, M = np.random.default_rng(seed), sum(map(len, conversations))
    said = {e: rng.dirichlet(0.5 * np.ones(len(labels)), M) for e in experts}
    gate = rng.dirichlet([4, 2, 5], M) if experts else None
    mixture = (
        sum(g[:, None] * p for g, p in zip(gate.T, said.values()))
        if experts
        else rng.dirichlet(0.5 * np.ones(len(labels)), M)
    )
    return Predictions(list(conversations), list(labels), mixture, said, gate)


def unlabelled(conv, **more):
    return replace(conv, utterances=tuple(replace(u, label=None, **more) for u in conv.utterances))


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    "One page of each kind: labelled clips, a chat, three hours, sound beside the page."
    from erc_moe import page

    folder, corpus = tmp_path_factory.mktemp("pages"), load_corpus("sample")
    scene, other = corpus.splits["test"][:2]
    predictions([scene], corpus.labels).to_html(folder / "scene.html")
    predictions([scene, other], corpus.labels).to_html(folder / "two.html")
    predictions([unlabelled(other, audio=None)], corpus.labels, experts=()).to_html(
        folder / "chat.html"
    )
    words = [u for c in corpus.conversations for u in c.utterances]
    turns = [
        Utterance(
            f"u{i}",
            f"Speaker {i % 3}",
            words[i % len(words)].text,
            None,
            None,
            5.4 * i,
            5.4 * i + 5,
        )
        for i in range(2000)
    ]
    predictions([Conversation("Three hours", turns)], corpus.labels).to_html(folder / "long.html")
    embedded, page.EMBEDDED = page.EMBEDDED, 0
    predictions([scene], corpus.labels).to_html(folder / "a talk #1.html")
    page.EMBEDDED = embedded
    return folder


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = (
        os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    )
    assert chromium, "install Debian's chromium, or name a browser in CHROMIUM"
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def tab(browser, request):
    "Opens a page; at the end there was no word on the console and no request to elsewhere."
    told, opened = [], []

    def open_page(
        url, size="desktop", theme="light", allowed=("file:", "data:", "blob:", "about:")
    ):
        width, height = SIZES[size]
        tab = browser.new_page(
            viewport=dict(width=width, height=height), color_scheme=theme, has_touch=size == "phone"
        )
        tab.on("console", lambda m: told.append(m.text) if m.type in ("error", "warning") else None)
        tab.on("pageerror", lambda e: told.append(str(e)))
        tab.on(
            "request",
            lambda r: None if r.url.startswith(allowed) else told.append(f"asks for {r.url}"),
        )
        tab.goto(url, timeout=120_000)
        opened.append(tab)
        return tab

    yield open_page
    for i, tab in enumerate(opened):
        if shots := os.environ.get("BROWSER_SHOTS"):
            os.makedirs(shots, exist_ok=True)
            name = "".join(c if c.isalnum() else "-" for c in request.node.name)
            tab.screenshot(path=f"{shots}/{name}{'-' + str(i) if i else ''}.png")
        tab.close()
    assert [words for words in told if words != GRADIO_SAYS] == []


def until(tab, true, seconds=20):
    "Waits for a condition. (Playwright's own waiting needs eval, which the pages' policy forbids.)"
    for _ in range(10 * seconds):
        if tab.evaluate(true):
            return
        tab.wait_for_timeout(100)
    raise AssertionError(f"never true: {true}")


def plays(tab, start=0.0):
    "Waits until the sound has advanced by .3 s from `start`."
    until(tab, f"document.querySelector('audio').currentTime > {start + 0.3}")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["scene", "two", "chat", "long"])
def test_fits_and_is_readable(pages, tab, name, size, theme):
    page = tab((pages / f"{name}.html").as_uri(), size, theme)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (
        "it scrolls sideways"
    )
    assert page.evaluate("""[...document.querySelectorAll('.words, .pill, .who, .when, .sure, h1')]
        .slice(0, 60).every(e => {
        const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
        const rgb = c => c.match(/[\\d.]+/g).slice(0, 3).map(v => linear(v / 255));
        const light = c => { const [r, g, b] = rgb(c); return .2126 * r + .7152 * g + .0722 * b; };
        const fill = e => getComputedStyle(e).backgroundColor;
        let ground = e;
        while (/rgba\\(0, 0, 0, 0\\)|transparent/.test(fill(ground))) ground = ground.parentElement;
        const a = light(getComputedStyle(e).color), b = light(fill(ground));
        return (Math.max(a, b) + .05) / (Math.min(a, b) + .05) >= 4.5; })"""), (
        "words stand out too little"
    )
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(246, 244, 240)"
    assert dark == (theme == "dark")


@pytest.mark.parametrize("size", SIZES)
def test_a_turn_is_heard(pages, tab, size):
    page = tab((pages / "scene.html").as_uri(), size)
    turn = page.locator(".say").nth(3)
    span = page.evaluate("JSON.parse(document.querySelector('.facts').textContent).heard[3]")
    turn.click()
    plays(page, span[0])
    assert turn.get_attribute("aria-current") == "true"
    assert "Turn 4" in page.locator(".detail").inner_text()
    until(page, "document.querySelector('audio').paused", 10)
    assert abs(page.evaluate("document.querySelector('audio').currentTime") - span[1]) < 0.3, (
        "it ends where the turn ends"
    )


def test_the_whole_is_heard_and_followed(pages, tab):
    page = tab((pages / "scene.html").as_uri())
    page.get_by_role("button", name="Play", exact=True).click()
    plays(page)
    until(
        page,
        "document.querySelectorAll('.turn.chosen').length == 1 && "
        "!document.querySelectorAll('.turn')[0].classList.contains('chosen')",
        15,
    )
    page.get_by_role("button", name="Pause").click()
    assert page.evaluate("document.querySelector('audio').paused")


def test_the_time_line_is_clicked(pages, tab):
    page = tab((pages / "scene.html").as_uri())
    page.locator(".block").nth(5).click()
    span = page.evaluate("JSON.parse(document.querySelector('.facts').textContent).heard[5]")
    plays(page, span[0])
    assert page.evaluate("document.querySelector('audio').currentTime") < span[1] + 0.3


def test_keyboard_alone(pages, tab):
    page = tab((pages / "scene.html").as_uri())
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.classList.contains('say')"):
            break
    at = lambda: page.evaluate(
        "[...document.querySelectorAll('.say')].indexOf(document.activeElement)"
    )
    assert at() == 0
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    assert at() == 2
    page.keyboard.press("ArrowUp")
    assert at() == 1
    page.keyboard.press("End")
    assert at() == page.locator(".say").count() - 1
    page.keyboard.press("Home")
    page.keyboard.press("Enter")
    plays(page)
    page.keyboard.press("Space")
    assert page.evaluate("document.querySelector('audio').paused"), "the same key pauses"
    box = page.evaluate(
        "(r => [r.top, r.bottom, innerHeight])(document.activeElement.getBoundingClientRect())"
    )
    assert 0 <= box[0] and box[1] <= box[2], "the chosen turn is in sight"


def test_names_for_screen_readers(pages, tab):
    page = tab((pages / "scene.html").as_uri())
    tree = page.locator("main").aria_snapshot()
    first = load_corpus("sample").splits["test"][0].utterances[0]
    assert 'list "Turns"' in tree and first.text in tree and "% sure" in tree
    unnamed = page.evaluate(
        "[...document.querySelectorAll('button, select, [role=button]')]"
        ".filter(e => !(e.innerText.trim() || e.ariaLabel || e.labels?.length)).length"
    )
    assert unnamed == 0


def test_filter(pages, tab):
    page = tab((pages / "scene.html").as_uri())
    key = page.locator(".legend button").first
    count = int(key.locator("small").inner_text())
    key.click()
    assert (
        page.locator(".turn:not(.dim)").count() == count
        and key.get_attribute("aria-pressed") == "true"
    )
    key.click()
    assert page.locator(".turn.dim").count() == 0


def test_one_voice_at_a_time(pages, tab):
    page = tab((pages / "two.html").as_uri())
    for n in (0, 1):
        page.locator(".conv").nth(n).locator(".say").first.click()
        page.wait_for_timeout(500)
    assert page.evaluate("[...document.querySelectorAll('audio')].map(a => a.paused)") == [
        True,
        False,
    ]


def test_sound_beside_the_page(pages, tab):
    page = tab((pages / "a talk #1.html").as_uri())
    page.locator(".say").nth(2).click()
    plays(page)


def test_three_hours_stay_quick(pages, tab):
    "In seconds of one core, which a busy machine does not change."
    page = tab("about:blank")
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})

    def cpu():
        metrics = session.send("Performance.getMetrics")["metrics"]
        return next(m["value"] for m in metrics if m["name"] == "TaskDuration")

    page.goto((pages / "long.html").as_uri(), timeout=120_000)
    assert cpu() < 6, "until it can be used"
    page.locator(".say").nth(0).click()
    before = cpu()
    page.evaluate("""async () => {
        for (let i = 0; i < 40; i++) {
            const down = new KeyboardEvent('keydown', {key: 'ArrowDown', bubbles: true});
            document.activeElement.dispatchEvent(down);
            await new Promise(requestAnimationFrame);
        }}""")
    assert (cpu() - before) / 40 < 0.1, "a turn"
    box = page.locator(".detail").bounding_box()
    assert 0 < box["y"] < 600, "the details stay in sight"
    page.locator(".zoom .in").click()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_prints_every_turn(pages, tab):
    page = tab((pages / "scene.html").as_uri())
    page.locator(".legend button").first.click()  # a filter does not shorten the print
    page.emulate_media(media="print")
    assert page.evaluate(
        "[...document.querySelectorAll('.turn')].every(e => e.getBoundingClientRect().height > 10)"
    )
    assert page.evaluate("getComputedStyle(document.querySelector('.controls')).display") == "none"
    pdf = page.pdf(format="A4", print_background=True)
    assert pdf.startswith(b"%PDF") and len(pdf) > 10_000


def test_works_within_a_frame(pages, tab, tmp_path):
    "As a notebook and the demo show it."
    corpus = load_corpus("sample")
    frame = predictions(corpus.splits["test"][:1], corpus.labels).timeline()._repr_html_()
    (tmp_path / "notebook.html").write_text(
        f"<!DOCTYPE html><title>n</title>{frame}", encoding="utf-8"
    )
    page = tab((tmp_path / "notebook.html").as_uri())
    inner = page.frame_locator("iframe")
    inner.locator(".say").nth(1).click()
    handle = page.query_selector("iframe").content_frame()
    until(handle, "document.querySelector('audio').currentTime > 1")


@pytest.fixture(scope="module")
def demo():
    "The demo for a small model that reads, on a port of its own."
    pytest.importorskip("gradio")
    import socket

    from erc_moe.demo import serve
    from erc_moe.training import train

    run = train(
        "mister_e",
        load_corpus("sample"),
        text="minilm",
        seeds=1,
        changes=dict(epochs=3),
        progress=False,
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return serve(run.predict, port=port, open_browser=False, wait=False)


def shown(page):
    "The time line's frame, once it is there."
    page.locator("iframe").wait_for(timeout=60_000)
    frame = page.query_selector("iframe").content_frame()
    frame.locator(".say").first.wait_for(timeout=30_000)
    return frame


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_demo_of_a_chat(demo, tab, size, theme, tmp_path):
    from erc_moe.demo import EXAMPLE
    from erc_moe.training.predictions import read_csv

    page = tab(demo, size, theme, (demo, "data:", "blob:", "about:"))
    page.get_by_role("button", name="Take an example").click()
    until(page, "document.querySelector('textarea').value.includes('wonderful')")
    page.get_by_role("button", name="Show the emotions").first.click()
    frame = shown(page)
    assert frame.locator(".say").count() == len(EXAMPLE.splitlines())
    frame.locator(".say").nth(2).click()
    assert "Turn 3" in frame.locator(".detail").inner_text()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "sideways"
    with page.expect_download(timeout=30_000) as download:
        page.get_by_text("Download the table").click()
    download.value.save_as(tmp_path / "table.csv")
    assert read_csv(tmp_path / "table.csv").speaker.tolist() == ["Ana", "Ben"] * 3


def test_demo_of_a_recording(demo, tab, tmp_path):
    from erc_moe.recordings import join_scene

    scene = load_corpus("sample").splits["test"][0]
    turns = join_scene(scene, tmp_path / "talk.flac")
    stamp = lambda t: f"{int(t // 60):02d}:{t % 60:06.3f}"
    cues = [f"{stamp(t.start)} --> {stamp(t.end)}\n<v {t.speaker}>{t.text}" for t in turns]
    (tmp_path / "talk.vtt").write_text("WEBVTT\n\n" + "\n\n".join(cues) + "\n")
    page = tab(demo, allowed=(demo, "data:", "blob:", "about:"))
    page.get_by_role("tab", name="A recording").click()
    page.locator("input[type=file]").nth(0).set_input_files(tmp_path / "talk.flac")
    page.locator("input[type=file]").nth(-1).set_input_files(tmp_path / "talk.vtt")
    shown_names = "document.body.innerText.replace(/\\s/g, '')"
    until(page, f"['talk.flac', 'talk.vtt'].every(n => {shown_names}.includes(n))", 60)
    page.get_by_role("button", name="Show the emotions").last.click()
    frame = shown(page)
    assert frame.locator(".say").count() == len(scene)
    frame.locator(".say").nth(1).click()
    until(frame, f"document.querySelector('audio').currentTime > {turns[1].start + 0.3}")
    assert frame.locator(".drawing.dense").count() == 0 and frame.locator(".axis text").count() > 2


def test_demo_says_what_is_wrong_as_words(demo, tab):
    page = tab(demo, allowed=(demo, "data:", "blob:", "about:"))
    page.get_by_role("textbox").fill("<img src=x onerror=alert(1)>")
    page.get_by_role("button", name="Show the emotions").first.click()
    page.locator("[role=alert]").wait_for(timeout=30_000)
    assert page.locator("img[src=x]").count() == 0


def test_demo_listens_here_alone(demo):
    "The kernel's table of listening sockets: the port is bound to 127.0.0.1 and nothing else."
    from pathlib import Path
    from urllib.parse import urlparse

    port = f"{urlparse(demo).port:04X}"
    rows = [
        line.split()
        for table in ("tcp", "tcp6")
        if (path := Path("/proc/net", table)).exists()
        for line in path.read_text().splitlines()[1:]
    ]
    bound = {r[1] for r in rows if r[3] == "0A" and r[1].endswith(f":{port}")}
    assert bound == {f"0100007F:{port}"}
