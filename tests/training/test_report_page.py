"""The page of a run in a real browser, at the width of a phone and of a desk; runs that kept no samples, and a folder
without a run."""

import html
import json
import re

import pytest

from dcpo_megatron.cli import report
from tests.training import browser

STEPS = [
    {"step": step, "reward": 0.1 * step, "accuracy": 0.1 * step, "seconds": 1.5, "response_utilization_ratio": 0.5}
    for step in (1, 2, 3)
]
HOSTILE = '<script>document.title = "broken"</script>&amp;'
TOKENS = [
    ["12", -0.1, 1.0, 0.8, 1.2, ""],
    ["+" * 90, -1.5, 1.4, 0.8, 1.2, "upper"],
    [HOSTILE, -2.0, 0.7, 0.8, None, ""],
    ["", -0.2, 1.01, 0.8, 1.2, ""],
]
SAMPLES = [
    {"kind": "response", "step": step, "prompt_id": "sums/12+5", "correct": True, "reward": 1.0,
     "advantage": 0.75, "length": 4, "minibatch": 2, "tokens": TOKENS}
    for step in (1, 3)
] + [
    {"kind": "visit", "step": step, "prompt_id": "sums/12+5", "rewards": [0.0, 1.0],
     "advantages": [-0.5, 0.75], "visits": step, "mean": 0.5, "std": 0.5}
    for step in (1, 2)
]  # fmt: skip

# Runs in the page after it is there: taps the clipped token, and says what is to be seen. The page is a frame, since no
# window of Chromium is narrower than 500 pixels.
LOOK = """<script>addEventListener("load", () => {
  const clipped = document.querySelector(".tokens .clip"),
    found = {title: document.title, wide: document.documentElement.scrollWidth, window: innerWidth};
  found.pictures = [...document.images].filter(image => image.checkVisibility()).map(image => image.naturalWidth);
  found.tokens = document.querySelectorAll("details[open] .tokens span").length;
  found.colours = new Set([...document.querySelectorAll(".tokens span")].map(
    token => getComputedStyle(token).backgroundColor)).size;
  if (clipped) clipped.click();
  found.told = document.getElementById("told").innerText;
  parent.postMessage(JSON.stringify(found), "*");
})</script>"""
FRAME = """<!doctype html><body><script>
addEventListener("message", event => { document.body.dataset.found = event.data; })</script>
<iframe style="border: 0" width="%d" height="900" srcdoc="%s"></iframe></body>"""


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "a run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in STEPS) + '{"step": 4, "rew')
    return folder


def page_of(folder):
    assert report.main([str(folder)]) == 0
    return folder / "report.html"


def look(page, width):
    frame = page.with_name("frame.html")
    text = page.read_text(encoding="utf-8").replace("</body>", LOOK + "</body>")
    frame.write_text(FRAME % (width, html.escape(text)), encoding="utf-8")
    dom = browser.open_page(frame, width + 100, 1000)
    return json.loads(html.unescape(re.search(r'data-found="([^"]*)"', dom)[1]))


@pytest.fixture(scope="module")
def chromium():
    missing = browser.install()
    if missing:
        pytest.skip(missing)


@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_curves_tokens_and_visits(run, chromium, width):
    (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SAMPLES))
    page = page_of(run)
    assert "http" not in page.read_text(encoding="utf-8").replace("http://www.w3.org", "")  # nothing is fetched
    found = look(page, width)
    assert found["window"] == width and found["wide"] <= width  # nothing sticks out to the right
    assert found["title"] == "a run"
    assert len(found["pictures"]) >= 4 and all(found["pictures"])
    assert found["tokens"] == len(TOKENS) and found["colours"] == 4
    assert "ratio 1.4000" in found["told"] and "clipped (upper)" in found["told"]


def test_a_run_that_kept_no_samples_still_has_its_curves(run):
    text = page_of(run).read_text(encoding="utf-8")
    assert text.count("<img") == 4 and text.count("logging.samples") == 2


def test_what_a_run_holds_is_shown_and_never_becomes_a_part_of_the_page(run):
    hostile = [row | {"prompt_id": HOSTILE} for row in SAMPLES]
    (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in hostile))
    text = page_of(run).read_text(encoding="utf-8")
    assert HOSTILE not in text and text.count("<script>") == 1
    shown = html.unescape(text)
    assert f"<summary>{HOSTILE}: 2 visits</summary>" in shown and f">{HOSTILE}</span>" in shown
    assert shown.count(f'alt="rewards of {HOSTILE}"') == 1


def test_no_white_space_comes_between_tokens(run):
    (run / "samples.jsonl").write_text(json.dumps(SAMPLES[0]) + "\n")
    (tokens,) = re.findall(r'<div class="tokens">(.*?)</div>', page_of(run).read_text(encoding="utf-8"), re.S)
    assert html.unescape(re.sub(r"<[^>]*>", "", tokens)) == "".join(token[0] or "·" for token in TOKENS)


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    assert "has no metrics.jsonl" in capsys.readouterr().err and not (tmp_path / "report.html").exists()
