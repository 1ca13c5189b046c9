"""Charts: the same bytes for the same data, text that stays text, and nothing that a color alone says."""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

import matplotlib as mpl
import pytest

from rewrite.report import charts
from rewrite.report.page import MOST_SERIES, LayerChart
from rewrite.report.points import Point, Series
from tests.report.samples import HOSTILE

TEXT, USE = "{http://www.w3.org/2000/svg}text", "{http://www.w3.org/2000/svg}use"


def layers(*series: Series, zero: bool = False) -> LayerChart:
    return LayerChart("Scales", "scale", series, "caption", zero)


def flat(name: str, *values: float) -> Series:
    return Series(name, tuple(Point(i, value, value, value) for i, value in enumerate(values)))


SAMPLES: dict[str, LayerChart] = {
    "two": layers(flat("q, k, v", 7e-4, 6e-4, 5e-4), flat("z", 1e-4, 1e-4, 1e-4)),
    "one layer": layers(flat("q", 1e-4)),
    "equal": layers(flat("q", 1.0, 1.0)),
    "zeros": layers(flat("OUT", 0.0, 0.0), zero=True),
    "zero and more": layers(flat("IN", 21.0, 17.0), flat("OUT", 0.0, 0.0), zero=True),
    "wide": layers(flat("q", 1e-38, 1.0, 3e38)),
    "band": layers(Series("up", tuple(Point(i, 0.1, 0.2, 0.4, 9) for i in range(60)))),
    "band of one layer": layers(Series("up", (Point(7, 0.1, 0.2, 0.4, 9),))),
    "many": layers(*(flat(f"series {i}", 1.0 + i, 2.0 + i) for i in range(8))),
}


def words(svg: bytes) -> list[str]:
    return [element.text or "" for element in ET.fromstring(svg).iter(TEXT)]


@pytest.mark.parametrize("chart", SAMPLES.values(), ids=SAMPLES)
@pytest.mark.parametrize("panel", [True, False])
def test_the_same_data_gives_the_same_bytes(chart: LayerChart, panel: bool) -> None:
    """Whatever the settings of the machine; without a time; in colors that the page knows."""
    one = charts.draw(chart, "chart-1", panel=panel)
    with mpl.rc_context({"font.size": 30, "text.usetex": True, "svg.fonttype": "path", "lines.color": "red"}):
        assert charts.draw(chart, "chart-1", panel=panel) == one
    assert b"metadata" not in one
    assert set(re.findall(r"#[0-9a-f]{6}", one.decode())) <= set(charts.COLORS)


def test_series_differ_in_more_than_color() -> None:
    """Marker and dashes: two lines with the colors taken away are not alike."""
    svg = charts.draw(SAMPLES["two"], "c", panel=False)
    lines = set(re.findall(r"stroke-dasharray: [\d., ]+", svg.decode()))
    markers = {element.get(f"{{{charts._XLINK}}}href") for element in ET.fromstring(svg).iter(USE)}
    assert lines
    assert len(markers) >= 4  # two of the axes, two of the series


@pytest.mark.parametrize("name", HOSTILE)
def test_names_stay_text(name: str) -> None:
    """No element, no formula, no name that is left out of the legend for its first letter."""
    shown = name.replace("\x1b", "").replace("\x00", "").replace("\n", " ").replace("\r", " ")[:40]
    svg = charts.draw(layers(flat(shown, 1.0, 2.0)), "c", panel=True)
    assert re.sub(r"\s", "", "".join(words(svg))).find(re.sub(r"\s", "", shown)) >= 0
    tags = {element.tag.rpartition("}")[2] for element in ET.fromstring(svg).iter()}
    assert tags <= {"svg", "defs", "style", "g", "path", "use", "text", "tspan", "clipPath", "rect"}


def test_every_series_has_its_own_look() -> None:
    """As many as a chart may have: color, marker, or dashes differ between any two."""
    assert len(set(charts._SERIES)) == len(set(charts._MARKERS)) == MOST_SERIES
    assert "series 7" in words(charts.draw(SAMPLES["many"], "c", panel=False))


def test_zero_is_named_on_a_log_axis() -> None:
    """It has a line of its own, and decades above it."""
    said = words(charts.draw(SAMPLES["zero and more"], "c", panel=False))
    assert "0" in said
    assert "100" in said
    assert "1" not in words(charts.draw(SAMPLES["zeros"], "c", panel=False))[2:]


def test_an_element_of_a_page_has_names_of_its_own() -> None:
    """Two charts of a page share no identifier; a title says what is drawn; no style holds for the page."""
    found = [charts.inline(charts.draw(SAMPLES["two"], key, panel=False), "q & z", key) for key in ("a", "b")]
    names = [set(re.findall(r' id="([^"]+)"', svg)) for svg in found]
    assert names[0]
    assert not names[0] & names[1]
    for svg in found:
        assert set(re.findall(r'href="#([^"]+)"', svg)) <= set(re.findall(r' id="([^"]+)"', svg))
        assert "q &amp; z</title>" in svg
        assert "stroke-linejoin: round" not in svg
        assert "<!DOCTYPE" not in svg
