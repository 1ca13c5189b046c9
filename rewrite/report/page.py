"""What a command says, as data: a page of sections with sentences, tables and charts. :mod:`rewrite.cli.terminal` and
:mod:`rewrite.report.render` show it.

All text is plain: whoever renders it escapes it. Names come from strangers' files.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from rewrite.errors import printable
from rewrite.report.points import Series
from rewrite.wording import count

#: The most rows of a table that are shown. What is left out is said, and where it is.
MOST_ROWS = 600
#: The most charts of a section, and the most series of a chart.
MOST_CHARTS = MOST_SERIES = 8
_LONGEST = 300

#: A space at which no line is broken: what a person copies stays whole.
JOINT = "\ue000"

Tone = Literal["good", "part", "bad", ""]
_TONES: dict[str, Tone] = {
    **dict.fromkeys(("exact", "rounded", "ok", "verified", "Converted"), "good"),
    **dict.fromkeys(("loses precision", "not known", "skipped"), "part"),
    **dict.fromkeys(("refused", "-"), ""),
}


@dataclass(frozen=True)
class Colored:
    """A verdict or a kind of outcome with ``rest`` behind it. The word says it, a color repeats it."""

    word: str
    rest: str = ""

    @property
    def tone(self) -> Tone:
        """What is neither good nor less good is bad."""
        return _TONES.get(self.word, "bad")

    def __str__(self) -> str:
        return self.word + self.rest


Cell = str | Colored


def outcome_text(kind: str, partitions: Iterable[str], detail: str = "", *, by_layer: bool) -> Colored:
    """``garbled: k, v (why)``, of several layers ``loses precision: in_proj_qkvz z, qkv_proj k v``."""
    why = f" ({clean(detail)})" if detail else ""
    text = partition_text(partitions, by_layer=by_layer)
    return Colored(kind, f": {text}{why}" if text else why)


def partition_text(partitions: Iterable[str], *, by_layer: bool) -> str:
    """``k, v``, of several layers ``in_proj_qkvz z, qkv_proj k v``."""
    layers: dict[str, list[str]] = {}
    for layer, _, name in (partition.partition(".") for partition in partitions):
        layers.setdefault(layer, []).append(clean(name or layer, 60))
    if not by_layer:
        return ", ".join(name for names in layers.values() for name in names)
    return ", ".join(f"{clean(layer, 60)} {' '.join(names)}" for layer, names in layers.items())


@dataclass(frozen=True)
class LayerChart:
    """Values by layer, on a logarithmic axis. ``zero``: zero is a value too, below all others. ``alt`` says in words
    what is drawn."""

    title: str
    unit: str
    series: tuple[Series, ...]
    caption: str
    zero: bool = False

    @property
    def alt(self) -> str:
        ranges = (f"{each.name}: {_range(each)}" for each in self.series)
        return f"{self.title}, {self.unit} by layer. {'; '.join(ranges)}."


@dataclass(frozen=True)
class Table:
    """Rows of text. The first ``labels`` columns say what a row is about; from ``numbers`` on columns are flush right.
    ``folded``: shown when somebody asks for it. ``note``: what has to be known to read it, and what is left out."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    numbers: int | None = None
    folded: bool = False
    code: bool = False  # whether cells after the first are to be copied letter by letter
    labels: int = 1


@dataclass(frozen=True)
class Section:
    """A heading, sentences, charts and tables. ``brief``: part of the answer, which a terminal shows without being
    asked for more. ``command`` is what a reader copies; ``lines`` are sentences after it."""

    title: str
    text: tuple[Cell, ...] = ()
    charts: tuple[LayerChart, ...] = ()
    tables: tuple[Table, ...] = ()
    command: str = ""
    lines: tuple[Cell, ...] = ()
    brief: bool = False


@dataclass(frozen=True)
class Run:
    """How a reader can do it again: the command line, with names for paths; the versions of what ran; remarks."""

    command: str
    versions: tuple[tuple[str, str], ...]
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Page:
    """``headline`` is what was looked at, in a line. ``word`` is the verdict in one word, ``tone`` its color, and
    ``sentence`` says it; on a terminal ``closing`` does, at the end."""

    title: str
    headline: str
    word: str
    tone: Tone
    sentence: str
    sections: tuple[Section, ...]
    closing: tuple[Cell, ...] = ()


def again(run: Run | None) -> Section | None:
    """The last section of a page that is published."""
    if run is None:
        return None
    versions = Table("Versions", ("what ran", "version"), run.versions)
    return Section("To do it again", (), (), (versions,), run.command, run.remarks)


def present(*sections: Section | None) -> tuple[Section, ...]:
    """Those that are there."""
    return tuple(section for section in sections if section is not None)


def clean(text: str, longest: int = _LONGEST) -> str:
    """``text`` on one line, of bounded length, with escapes for what cannot be shown or turns the direction of
    writing."""
    shown = printable(text[:longest])
    return shown if len(text) <= longest else f"{shown}… ({len(text)} characters)"


def whole(text: str) -> str:
    """A path, in which spaces are part of the name."""
    return text.replace(" ", JOINT)


def shorten(text: str, longest: int = 44) -> str:
    """``text`` for a chart: its end, which tells names of tensors apart."""
    shown = printable(text)
    return shown if len(shown) <= longest else f"…{shown[1 - longest :]}"


def number(value: float | None) -> str:
    """Four digits."""
    return "-" if value is None else f"{value:.4g}"


def limited(table: Table, where: str) -> Table:
    """At most :data:`MOST_ROWS` rows of it. The note then says what was left out and ``where`` it is."""
    rows = len(table.rows)
    if rows <= MOST_ROWS:
        return table
    cut = f"The first {MOST_ROWS} of {rows:,} rows; {rows - MOST_ROWS:,} are left out: {where}."
    return replace(table, rows=table.rows[:MOST_ROWS], note=f"{table.note} {cut}".strip())


def _range(series: Series) -> str:
    low, high = min(p.low for p in series.points), max(p.high for p in series.points)
    values = number(low) if low == high else f"{number(low)} to {number(high)}"
    return f"{values} in {count(len(series.points), 'layer')}"
