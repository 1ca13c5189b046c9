"""A page on a terminal: lines of its width, tables that fit it, colors that repeat what words say.

What a terminal would obey is escaped before it is measured. :mod:`rich` measures, breaks lines and colors; its tables
would cut names of modules, so a table that is too wide is folded here: the labels of a row on a line of their own.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from rewrite.errors import printable
from rewrite.report.page import JOINT, Cell, Colored, Page, Section, Table

#: Of everything that is not written to a terminal, and what documents show.
WIDTH = 80
_NARROWEST = 40
_GAP = 2  # between columns, and how far the rest of a row is indented under its labels
_LEAST = 24  # columns that a wrapped last column must have: less is hard to read
_WHOLE = re.compile(r"`[^`]*`|[\d,.]+ (?:bytes|[kMGT]B|shards?|tensors?)\b|--[a-z]+(?:-[a-z]+)* [a-z]\w*")
_STYLES = {"good": "green", "part": "yellow", "bad": "red", "": ""}


def show_page(page: Page, *, verbose: bool = False) -> None:
    """Print a page: the answer; with ``verbose`` all of it but for charts."""
    _print(page_lines(page, width(sys.stdout), verbose=verbose), sys.stdout)


def show_message(text: str, *, hang: int = 2, style: str = "") -> None:
    """Print a note or an error on stderr. ``style`` is that of its first word."""
    line = _text(text)
    line.stylize(style, 0, text.find(" ") + 1)
    _print(_wrap(line, width(sys.stderr), hang), sys.stderr)


def width(stream: TextIO) -> int:
    """Of a terminal what it has, or what ``COLUMNS`` says, but 40 at least. Pipes and files get 80, always: the same
    text wherever a command runs."""
    if not stream.isatty():
        return WIDTH
    return max(shutil.get_terminal_size((WIDTH, 24)).columns, _NARROWEST)


def _print(lines: Sequence[Text], stream: TextIO) -> None:
    """rich leaves colors out for ``NO_COLOR``, ``TERM=dumb`` and where no terminal is, but for ``FORCE_COLOR``."""
    console = Console(file=stream, width=width(stream), highlight=False, markup=False, emoji=False)
    console.print(Text("\n").join(lines), soft_wrap=True)


def page_lines(page: Page, width: int, *, verbose: bool = False) -> list[Text]:
    """The lines of a page."""
    lines = _wrap(_text(page.headline), width, 2) if page.headline else []
    blank = False  # between the sections of the answer
    for section in page.sections:
        if section.brief and (said := _section(section, width)):
            lines += [*([Text()] if blank else []), *said]
            blank = True
        elif not section.brief and verbose and (section.tables or not section.charts):
            lines += [Text(), _text(section.title + ":"), *_section(section, width, notes=True)]
    if page.closing:
        gap = [Text()] if lines else []
        lines += [*gap, *_wrap(Text(" ").join(map(_text, page.closing)), width, 2)]
    return lines


def _section(section: Section, width: int, *, notes: bool = False) -> list[Text]:
    lines = [line for sentence in section.text for line in _wrap(_text(sentence), width, 2)]
    for table in section.tables:
        head = [Text(), *_wrap(_text(table.title), width, 2)] if notes and table.title != section.title else []
        said = _wrap(_text(table.note), width, 2) if notes and table.note else []
        lines += [*head, *said, *table_lines(table, width, head=notes or table.numbers is not None)]
    lines += [line for sentence in section.lines for line in _wrap(_text(sentence), width, 2)]
    return [*lines, *([Text(f"  {printable(section.command)}")] if section.command else [])]


def table_lines(table: Table, width: int, *, head: bool = True) -> list[Text]:
    """Nothing is cut off: only a word that is too long by itself makes a line longer than the width."""
    rows = [[_text(cell) for cell in row] for row in (*([table.columns] if head else []), *table.rows)]
    if not rows:
        return []
    numbers = len(rows[0]) if table.numbers is None else table.numbers
    flat = _flat(rows, width, numbers)
    if flat is not None:
        return [line for row in flat for line in row]
    below = _flat([row[table.labels :] for row in rows], width - _GAP, numbers - table.labels)
    if below is None:
        below = [list(_listed(row[table.labels :], width - _GAP)) for row in rows]
    lines: list[Text] = []
    label = None
    for row, rest in zip(rows, below, strict=True):
        if (said := Text(" " * _GAP).join(cell for cell in row[: table.labels] if cell)) != label and said:
            lines += _wrap(said, width, 2)
        label = said
        lines += [Text(" " * _GAP) + line for line in rest if line]
    return lines


def _flat(rows: Sequence[Sequence[Text]], width: int, numbers: int) -> list[list[Text]] | None:
    """Aligned columns, the last one wrapped where it is text; None where they do not fit."""
    *widths, last = [max(cell.cell_len for cell in column) for column in zip(*rows, strict=True)]
    room = width - sum(widths) - _GAP * len(widths)
    if room < last:
        longest = max(cell_len(word) for row in rows for word in row[-1].plain.split(" "))
        if numbers <= len(widths) or room < max(longest, min(_LEAST, last)):
            return None
    return [_row(row, [*widths, min(last, room)], numbers) for row in rows]


def _row(row: Sequence[Text], widths: Sequence[int], numbers: int) -> list[Text]:
    lines = [Text()]
    for number, (cell, size) in enumerate(zip(row, widths, strict=True)):
        start = sum(widths[:number]) + _GAP * number
        first, *rest = _wrap(cell, size, 0) if number == len(row) - 1 else [cell]
        lines[0].pad_right(start - lines[0].cell_len + (size - first.cell_len if number >= numbers else 0))
        lines[0].append_text(first)
        lines += [Text(" " * start) + line for line in rest]
    lines[0].rstrip()
    lines[0].plain = lines[0].plain.replace(JOINT, " ")
    return lines


def _listed(cells: Sequence[Text], width: int) -> Iterator[Text]:
    for cell in filter(None, cells):
        yield from _wrap(cell, width, 2)


def _wrap(text: Text, width: int, hang: int) -> list[Text]:
    """Lines of at most ``width``, the later ones indented by ``hang``. A word that is wider stays whole."""
    breaks: list[int] = []
    used = 0
    for word in re.finditer("( *)([^ ]+)", text.plain):
        gap, size = len(word[1]), cell_len(word[2])
        if used and used + gap + size > width:
            breaks.append(word.start(2))
            used, gap = hang, 0
        used += gap + size
    first, *rest = text.divide(breaks)
    lines = [first, *(Text(" " * hang) + line for line in rest)]
    for line in lines:
        line.rstrip()
        line.plain = line.plain.replace(JOINT, " ")
    return lines


def _text(cell: Cell) -> Text:
    """Printable; what stands in backticks is one word, and so are `1.91 MB` and `--profile exact`."""
    joined = _WHOLE.sub(lambda found: found[0].replace(" ", JOINT), str(cell))
    text = Text(JOINT.join(map(printable, joined.split(JOINT))))
    if isinstance(cell, Colored):
        text.stylize(_STYLES[cell.tone], 0, len(printable(cell.word)))
    return text
