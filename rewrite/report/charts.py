"""Charts as SVG, by matplotlib: the same data gives the same bytes.

Text stays text: it can be selected, read aloud and searched, and no name can be anything else. Every color here is one
of :data:`COLORS`, so that the page can give them others in the dark; without a page they are dark on a white panel.
Series differ in marker and in dashes too.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import wrap
from typing import Any
from xml.etree import ElementTree as ET

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from rewrite.report.page import LayerChart
from rewrite.report.points import Series

#: Okabe and Ito's, told apart without color vision, a little darker for lines on white.
_SERIES = ("#0067a5", "#c25100", "#00785a", "#a8528a", "#8a6100", "#4b4b8f", "#5b6770", "#9a3324")
INK, MUTED, GRID, PANEL = "#1f2328", "#57606a", "#d8dee4", "#fffffe"
COLORS = (*_SERIES, INK, MUTED, GRID, PANEL)
_MARKERS = ("o", "^", "s", "D", "v", "P", "X", "<")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
_STYLE = Path(__file__).with_name("templates") / "charts.mplstyle"  # its colors are of COLORS
_WIDTH = 4.1  # inches: what a telephone shows about as large as it is
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"


def draw(chart: LayerChart, key: str, *, panel: bool) -> bytes:
    """``chart`` as an SVG file. ``key`` goes into its identifiers, which differ between charts of one page. ``panel``:
    on white; without it on whatever is behind it."""
    with _style(key, panel), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that matplotlib's font has not: the reader's fonts have them
        figure = _layers(chart)
        FigureCanvasSVG(figure)
        file = io.BytesIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", metadata=nothing)
    return file.getvalue()


def inline(svg: bytes, alt: str, key: str) -> str:
    """An SVG of :func:`draw` as an element of a page: no document around it, no identifier that another one has."""
    root = ET.fromstring(svg)
    for style in list(root.iter(f"{{{_SVG}}}style")):
        style.text = ""  # it would hold for all of the page; the page has it for charts
    used = set(re.findall(rb'(?:#)([\w.-]+)[")]', svg))
    for element in root.iter():
        if (name := element.get("id")) is not None and name.encode() not in used:
            del element.attrib["id"]
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib |= {"class": "chart", "role": "img", "aria-labelledby": f"{key}-title"}
    title = ET.Element(f"{{{_SVG}}}title", {"id": f"{key}-title"})
    title.text = alt
    root.insert(0, title)
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", _XLINK)
    return ET.tostring(root, encoding="unicode")


@contextmanager
def _style(key: str, panel: bool) -> Iterator[None]:
    """matplotlib's own defaults, whatever the machine's settings are, with ours on top."""
    background = PANEL if panel else "none"
    with mpl.rc_context():
        mpl.rcParams.update(mpl.rcParamsDefault)
        mpl.rcParams.update(mpl.rc_params_from_file(_STYLE, use_default_template=False))
        mpl.rcParams.update({"svg.hashsalt": key, "figure.facecolor": background})
        yield


def _layers(chart: LayerChart) -> Figure:
    series = chart.series
    labels = ["\n".join(wrap(each.name, 44) or [each.name]) for each in series]
    lines = sum(label.count("\n") + 1 for label in labels) if _long(labels) else 1
    height = 2.35 + 0.17 * lines
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    axis = _LogAxis(series, chart.zero)
    axis.apply(axes)
    handles = [_draw_series(axes, each, i, len(series), axis) for i, each in enumerate(series)]
    axes.set_ylabel(chart.unit)
    axes.set_xlabel("layer")
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    _layer_ticks(axes, series)
    figure.legend(
        handles, labels, loc="outside upper left", ncols=1 if _long(labels) else min(4, len(labels)),
        frameon=False, fontsize=9, handlelength=3.2, borderaxespad=0.1, columnspacing=1.4,
    )  # fmt: skip
    return figure


def _long(labels: Sequence[str]) -> bool:
    """Whether they do not fit side by side."""
    return len(labels) > 1 and sum(len(label) + 8 for label in labels) > 50


def _draw_series(axes: Axes, series: Series, number: int, total: int, axis: _LogAxis) -> Line2D:
    color, marker = _SERIES[number], _MARKERS[number]
    layers = [point.layer for point in series.points]
    few = len(layers) <= 12
    shift = (number - (total - 1) / 2) * 0.12 if few else 0.0  # side by side where there is room
    xs = [layer + shift for layer in layers]
    if series.is_band:
        low, high = ([axis.at(value) for value in values] for values in _edges(series))
        axes.fill_between(xs, low, high, color=color, alpha=0.15, linewidth=0)
        for edge in (low, high):
            axes.plot(xs, edge, color=color, linewidth=0.6, linestyle=_DASHES[number % len(_DASHES)])
        if len(xs) == 1:
            axes.vlines(xs, low, high, colors=color, linewidth=4, alpha=0.3)
    (line,) = axes.plot(
        xs, [axis.at(point.middle) for point in series.points], color=color, marker=marker,
        markersize=5 if few else 3.6, markeredgewidth=0, linewidth=1.3, linestyle=_DASHES[number % len(_DASHES)],
    )  # fmt: skip
    return line


def _edges(series: Series) -> tuple[list[float], list[float]]:
    return [point.low for point in series.points], [point.high for point in series.points]


def _layer_ticks(axes: Axes, series: Sequence[Series]) -> None:
    layers = sorted({point.layer for each in series for point in each.points})
    first, last = layers[0], layers[-1]
    axes.set_xlim(first - 0.6, last + 0.6)
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 10**6) if (last - first) / step <= 12)
    axes.set_xticks([layer for layer in range(first, last + 1) if layer % step == 0])


class _LogAxis:
    """Decades from the smallest to the largest value, and where zero is a value one line below them for it."""

    def __init__(self, series: Sequence[Series], zero: bool) -> None:
        values = [value for each in series for edge in _edges(each) for value in edge]
        logs = [math.log10(value) for value in values if value > 0]
        self._zero = zero and min(values) == 0
        self._nothing = not logs
        if self._zero:  # whole decades: the axis is broken, so that a reader needs more to go by
            low, high = (math.floor(min(logs)), math.ceil(max(logs))) if logs else (0, 1)
            self._low, self._high = float(low), high + 0.05 + (high == low)
        else:
            margin = 0.08 * max(max(logs) - min(logs), 0.3)
            self._low, self._high = min(logs) - margin, max(logs) + margin
        self._floor = self._low - 0.2 * (self._high - self._low)

    def at(self, value: float) -> float:
        return math.log10(value) if value > 0 else self._floor

    def apply(self, axes: Axes) -> None:
        ticks = {} if self._nothing else {math.log10(value): _decimal(value) for value in self._values()}
        if self._zero:
            ticks[self._floor] = "0"
        if self._zero and not self._nothing:
            axes.axhline((self._low + self._floor) / 2, color=GRID, linewidth=2.4)  # the axis is broken here
        axes.set_ylim((self._floor - 0.06 * (self._high - self._floor)) if self._zero else self._low, self._high)
        axes.set_yticks(sorted(ticks), [ticks[at] for at in sorted(ticks)])
        axes.tick_params(axis="y", which="minor", length=0)

    def _values(self) -> list[float]:
        """Powers of ten; where there are too few of them also 2 and 5 times these, or round numbers."""
        low, high = math.floor(self._low), math.ceil(self._high)
        for factors in ((1,), (1, 2, 5)):
            found = [factor * 10.0**k for k in range(low, high + 1) for factor in factors]
            found = [value for value in found if self._low <= math.log10(value) <= self._high]
            if len(found) >= 3:
                return found[:: math.ceil(len(found) / 8)]
        rounds = MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(10**self._low, 10**self._high)
        return [float(value) for value in rounds if value > 0 and self._low <= math.log10(value) <= self._high]


def _decimal(value: float) -> str:
    """``0.001``, ``2·10⁻⁵``, ``500``."""
    if 1e-3 <= value < 1e5:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    power = "10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    digits = f"{float(mantissa):g}"
    return power if digits == "1" else f"{digits}·{power}"
