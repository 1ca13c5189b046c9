"""A page as HTML in one file, or as Markdown with the images that belong to it. Templates are Jinja2's, which escapes
for HTML; markdown.py escapes for Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from rewrite.report import charts
from rewrite.report.markdown import cell
from rewrite.report.markdown import text as markdown_text
from rewrite.report.page import JOINT, Cell, LayerChart, Page
from rewrite.version import __version__

_CODE = re.compile(r"`([^`]*)`")


@dataclass(frozen=True)
class _Drawn:
    """A chart with what stands for it in a page: an element, or the name of a file."""

    chart: LayerChart
    svg: str = ""
    file: str = ""


def html(page: Page) -> str:
    """One file that needs nothing else: no script, no font, no image beside it."""
    drawn = [
        [
            _Drawn(chart, Markup(charts.inline(charts.draw(chart, key, panel=False), chart.alt, key)))
            for key, chart in row
        ]
        for row in _numbered(page)
    ]
    environment = _environment(autoescape=True)
    environment.filters["prose"] = _prose_html
    return environment.get_template("report.html.j2").render(
        page=page, drawn=drawn, version=__version__, colors=charts.COLORS
    )


def markdown(page: Page, name: str) -> tuple[str, Mapping[str, bytes]]:
    """The text, and the images that lie beside it by their names, which begin with ``name``."""
    numbered = list(_numbered(page))
    drawn = [[_Drawn(chart, file=f"{name}-{key}.svg") for key, chart in row] for row in numbered]
    environment = _environment(autoescape=False)
    environment.filters |= {"text": markdown_text, "cell": cell, "prose": _prose_markdown, "url": quote}
    text = environment.get_template("report.md.j2").render(page=page, drawn=drawn, version=__version__)
    return text, {f"{name}-{key}.svg": charts.draw(chart, key, panel=True) for row in numbered for key, chart in row}


def _numbered(page: Page) -> Iterator[list[tuple[str, LayerChart]]]:
    """The charts of each section under names that no other chart of the report has."""
    number = count(1)
    for section in page.sections:
        yield [(f"chart-{next(number)}", chart) for chart in section.charts]


def _environment(*, autoescape: bool) -> Environment:
    return Environment(
        loader=PackageLoader("rewrite.report"),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _prose_html(sentence: Cell) -> Markup:
    """A sentence of ours, in which backquotes stand around what is typed."""
    parts = _CODE.split(str(sentence).replace(JOINT, " "))
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if i % 2 else Markup.escape(part) for i, part in enumerate(parts)
    )


def _prose_markdown(sentence: Cell) -> str:
    parts = _CODE.split(str(sentence).replace(JOINT, " "))
    return "".join(f"`{part}`" if i % 2 else markdown_text(part) for i, part in enumerate(parts))
