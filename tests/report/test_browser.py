"""The page in headless Chromium: it renders on a telephone and in the dark, asks for nothing, and no name becomes more
than text."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from rewrite.report import render
from tests.report import samples
from tests.report.browser import CHROMIUM, Browser, running
from tests.report.test_page import verified

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH (apt-get install chromium)"),
]
CONTRAST = """
(() => {
  const channel = v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number);
    return 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b); };
  const behind = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
    if (!/, 0\\)|transparent/.test(c)) return c; } return 'rgb(255, 255, 255)'; };
  let worst = 99;
  for (const e of document.querySelectorAll('p, th, td, summary, figcaption, h1, h2, h3, a, code, svg text')) {
    const style = getComputedStyle(e), one = light(e.closest('svg') ? style.fill : style.color), two = light(behind(e));
    worst = Math.min(worst, (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05));
  }
  return worst;
})()
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with running(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages by what they are of."""
    folder = tmp_path_factory.mktemp("pages")
    found, source = samples.hostile()
    reports = {
        "verified": verified(),
        "hostile": samples.of_verification(found, source),
        "inspected": samples.of_inspection(source),
    }
    for name, report in reports.items():
        (folder / f"{name}.html").write_text(render.html(report), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in reports}


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("name", ["verified", "hostile", "inspected"])
def test_it_renders(browser: Browser, pages: dict[str, Path], name: str, width: int, dark: bool) -> None:
    """No request but for the page, nothing on the console, no scrolling sideways, text that stands out."""
    opened = browser.open(pages[name], width, dark=dark)
    browser.evaluate("for (const e of document.querySelectorAll('details')) e.open = true")
    assert [each for each in opened.asked if not each.startswith("data:,")] == [pages[name].as_uri()]
    assert opened.said == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("document.scripts.length") == 0
    charts = browser.evaluate("[...document.querySelectorAll('svg.chart')].map(e => e.getBoundingClientRect().height)")
    assert charts
    assert min(charts) > 100
    assert browser.evaluate(CONTRAST) >= 4.5


def test_charts_change_with_the_page(browser: Browser, pages: dict[str, Path]) -> None:
    """In the dark their text is light, and so are hollow markers, which lie in a definition of their own."""
    ask = "getComputedStyle(document.querySelector('svg.chart text')).fill"
    browser.open(pages["verified"], 390)
    light = browser.evaluate(ask)
    browser.open(pages["verified"], 390, dark=True)
    assert browser.evaluate(ask) != light
    shown = Image.open(io.BytesIO(browser.screenshot())).convert("RGB").getcolors(1 << 24)
    colors = {color for _, color in shown or ()}
    assert (255, 154, 87) in colors
    assert (194, 81, 0) not in colors


def test_hostile_names_are_text(browser: Browser, pages: dict[str, Path]) -> None:
    """As the browser understands the page, not as we do."""
    browser.open(pages["hostile"], 1400)
    assert browser.evaluate("document.querySelectorAll('script, img, iframe, object').length") == 0
    said = browser.evaluate("document.body.textContent")
    assert "<script>alert(1)</script>" in said
    assert "</title></style></svg><script>alert(5)</script>" in said
    assert browser.evaluate("document.title") == "Verification of out: FAILED"


def test_it_is_printed_in_full(browser: Browser, pages: dict[str, Path]) -> None:
    """What is folded on the screen is on paper."""
    browser.open(pages["verified"], 1000)
    browser.call("Emulation.setEmulatedMedia", media="print")
    tables = "[...document.querySelectorAll('details table')].map(e => e.checkVisibility())"
    assert browser.evaluate(tables)
    assert all(browser.evaluate(tables))
    browser.call("Emulation.setEmulatedMedia", media="screen")
    assert not any(browser.evaluate(tables))
    assert browser.pdf().startswith(b"%PDF")


def test_a_request_or_a_script_would_be_seen(browser: Browser, tmp_path: Path) -> None:
    """What the tests above look for is found where it is."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<!DOCTYPE html><img src='http://example.invalid/x.png'><script>console.log('ran')</script>"
        "<p style='width:900px;color:#777;background:#888'>x</p>"
    )
    opened = browser.open(bad, 390)
    assert "http://example.invalid/x.png" in opened.asked
    assert "['ran']" in opened.said
    assert browser.evaluate("document.documentElement.scrollWidth") > 390
    assert browser.evaluate(CONTRAST) < 4.5
