"""Tables that fit a width: flat where they do, else folded, else a block for each row.

    flat      NAME  VERSIONS  SCALE     folded    NAME  VERSIONS      block     name  versions
              a     1.0+      0.5                   SCALE                         0.5  SCALE
                                                  a  1.0+
                                                    0.5

The last column of text is wrapped where that is enough. Nothing is cut off: only a word that is too long by itself
makes a line longer than the width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

from rewrite.cli.layout import Cell, Line, longest_word, pad, paragraph, plain, wide, wrap

_GAP = 2  # between columns
_FOLD = 2  # how far a row is indented under its label
_LEAST = 24  # columns that a wrapped last column must have: less is hard to read

Row: TypeAlias = Sequence[Cell]


def table(
    rows: Sequence[Row],
    width: int,
    *,
    head: Sequence[Sequence[str]] = (),
    labels: int = 1,
    right: Iterable[int] = (),
    indent: int = 0,
) -> list[Line]:
    """``head`` are the lines above the columns; the first ``labels`` columns say what a row is about; the columns
    named in ``right`` are flush right."""
    above, *below = rows_of(rows, width, head=head, labels=labels, right=right, indent=indent)
    return [*above, *(each for row in below for each in row)]


def rows_of(
    rows: Sequence[Row],
    width: int,
    *,
    head: Sequence[Sequence[str]] = (),
    labels: int = 1,
    right: Iterable[int] = (),
    indent: int = 0,
) -> list[list[Line]]:
    """The same, as the lines of the head and the lines of each row."""
    flush = set(right)
    if not rows:
        return [[]]
    found = _flat([*head, *rows], width - indent, flush) or _folded([*head, *rows], width - indent, labels, flush)
    if found is None:
        found = [*([] for _ in head), *_blocks(rows, width - indent, head, labels)]
    moved = [[pad(indent) + each for each in row] for row in found]
    return [[each for row in moved[: len(head)] for each in row], *moved[len(head) :]]


def _flat(rows: Sequence[Row], width: int, flush: set[int]) -> list[list[Line]] | None:
    """Aligned columns; None where they do not fit."""
    widths = [max(map(wide, column)) for column in zip(*rows, strict=True)]
    last = len(widths) - 1
    room = width - sum(widths[:last]) - _GAP * last
    if room < widths[last]:
        needed = max(map(longest_word, (row[last] for row in rows)))
        if last in flush or room < max(needed, min(_LEAST, widths[last])):
            return None
        widths[last] = room
    return [_row(row, widths, flush) for row in rows]


def _row(row: Row, widths: Sequence[int], flush: set[int]) -> list[Line]:
    *before, last = row
    start: Line = ()
    for number, (cell, width) in enumerate(zip(before, widths, strict=False)):
        (text,) = wrap(cell, width)
        gap = pad(width - wide(text))
        start += (*gap, *text, *pad(_GAP)) if number in flush else (*text, *gap, *pad(_GAP))
    first, *rest = wrap(last, widths[-1])
    if len(before) in flush:
        first = pad(widths[-1] - wide(first)) + first
    return [_trimmed(start + first), *(pad(sum(widths[:-1]) + _GAP * len(before)) + each for each in rest)]


def _trimmed(text: Line) -> Line:
    """Without spaces at its end."""
    if not text:
        return ()
    *before, last = text
    left = last._replace(text=last.text.rstrip())
    return (*before, left) if left.text else _trimmed(tuple(before))


def _folded(rows: Sequence[Row], width: int, labels: int, flush: set[int]) -> list[list[Line]] | None:
    """The label of a row on a line of its own, the rest of it aligned below; None where that does not fit either."""
    rest = _flat([row[labels:] for row in rows], width - _FOLD, {number - labels for number in flush})
    if rest is None:
        return None
    return [[*_label(row[:labels], width), *map(_moved, lines)] for row, lines in zip(rows, rest, strict=True)]


def _moved(text: Line) -> Line:
    return pad(_FOLD) + text if text else ()


def _label(cells: Row, width: int) -> list[Line]:
    """Nothing where a line of the head says nothing here."""
    said = [part for part in map(_parts, cells) if plain([part])]
    joined = [span for number, part in enumerate(said) for span in (*pad(_GAP if number else 0), *part)]
    return paragraph(joined, width) if said else []


def _parts(cell: Cell) -> Line:
    (text,) = wrap(cell, wide(cell))
    return text


def _blocks(rows: Sequence[Row], width: int, head: Sequence[Sequence[str]], labels: int) -> list[list[Line]]:
    """Under each label its cells, with the names of their columns; columns with the same cell as one line."""
    names = [" ".join(filter(None, parts)) for parts in zip(*head, strict=True)] or [""] * len(rows[0])
    pairs = [_by_cell(row[labels:], names[labels:]) for row in rows]
    every = [pair for block in pairs for pair in block]
    flat = _flat(every, width - _FOLD, set()) if every else []
    if flat is None:  # not even two columns
        flat = [paragraph([*_parts(cell), f": {name}"], width - _FOLD) for cell, name in every]
    lines = iter(flat)
    return [
        [*_label(row[:labels], width), *(_moved(each) for _ in block for each in next(lines))]
        for row, block in zip(rows, pairs, strict=True)
    ]


def _by_cell(cells: Row, names: Sequence[str]) -> list[tuple[Cell, str]]:
    same: dict[str, tuple[Cell, list[str]]] = {}
    for cell, name in zip(cells, names, strict=True):
        if text := plain([_parts(cell)]):  # not its width: a combining character alone has none
            same.setdefault(text, (cell, []))[1].append(name)
    return [(cell, _joined(found)) for cell, found in same.values()]


def _joined(names: Sequence[str]) -> str:
    """``--profile exact, bf16``: what several begin with is said once."""
    said, before = [], ""
    for name in names:
        first, _, rest = name.rpartition(" ")
        said.append(rest if first and first == before else name)
        before = first
    return ", ".join(filter(None, said))
