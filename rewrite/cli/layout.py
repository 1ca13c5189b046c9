"""Text in lines of a given width: spans with a color, words that stay whole, paragraphs with a hanging indent.

All text of results goes through here. What a terminal would obey is escaped before it is measured: names come from
strangers' files.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple, TypeAlias

import click

from rewrite.errors import printable

#: Of everything that is not written to a terminal, and what documents show.
WIDTH = 80


class Span(NamedTuple):
    """Text of one color; ``whole``: not broken at its spaces, as a person copies it (a path, a command)."""

    text: str
    color: str | None = None
    whole: bool = False


Line: TypeAlias = tuple[Span, ...]
Cell: TypeAlias = str | Span | Sequence[str | Span]
_WORD = re.compile(r"( *)((?:`[^`]*`|[^ ])+)")  # what stands in backticks is a word


def line(*spans: str | Span) -> Line:
    """One line as it is, however long."""
    return tuple(_spans(spans))


def path(text: str) -> Span:
    """What a person copies."""
    return Span(text, whole=True)


def paragraph(cell: Cell, width: int, *, indent: int = 0, hang: int = 2) -> list[Line]:
    """Lines of at most ``width``, all but the first indented by ``hang`` more. A word that is wider stays whole."""
    first, *rest = wrap(cell, width - indent, hang)
    return [pad(indent) + first, *(pad(indent + hang) + each for each in rest)]


def wrap(cell: Cell, width: int, hang: int = 0) -> list[Line]:
    """The words of ``cell`` in lines of at most ``width``, the later ones shorter by ``hang``; one line at least."""
    lines: list[list[Span]] = [[]]
    used = 0
    for gap, word in _words(cell):
        size, room = wide(word), width - (hang if len(lines) > 1 else 0)
        if lines[-1] and used + gap + size > room:
            lines.append([])
            used, gap = 0, 0  # noqa: PLW2901 - no space begins a line
        lines[-1] += [*pad(gap), *word]
        used += gap + size
    return [tuple(each) for each in lines]


def longest_word(cell: Cell) -> int:
    """What a column must have room for."""
    return max((wide(word) for _, word in _words(cell)), default=0)


def pad(width: int) -> Line:
    return (Span(" " * width),) if width > 0 else ()


def wide(cell: Cell) -> int:
    """How many columns of a terminal it takes: East Asian wide characters two, combining ones none."""
    return sum(map(_columns, "".join(span.text for span in _spans(cell))))


def _columns(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def plain(lines: Iterable[Line]) -> str:
    """Without colors."""
    return "\n".join("".join(span.text for span in each) for each in lines)


def paint(lines: Iterable[Line]) -> str:
    """With colors, as escape sequences: the only ones, as all text is escaped."""
    return "\n".join("".join(_painted(span) for span in each) for each in lines)


def _painted(span: Span) -> str:
    text = printable(span.text)
    return text if span.color is None else click.style(text, fg=span.color)


def _spans(cell: Cell) -> Iterator[Span]:
    parts = [cell] if isinstance(cell, str | Span) else cell
    for part in parts:
        span = part if isinstance(part, Span) else Span(part)
        yield span._replace(text=printable(span.text))


def _words(cell: Cell) -> Iterator[tuple[int, Line]]:
    """Each word with the number of spaces before it. A word may have several colors."""
    spans = list(_spans(cell))
    colors = [span.color for span in spans for _ in span.text]
    text = "".join(span.text for span in spans)
    unbroken = "".join(span.text.replace(" ", "_") if span.whole else span.text for span in spans)
    for found in _WORD.finditer(unbroken):
        runs = groupby(range(*found.span(2)), colors.__getitem__)
        yield len(found[1]), tuple(Span("".join(text[i] for i in run), color) for color, run in runs)
