"""What a report says, as data: text, tables and what charts are drawn from. How it looks is for page.py and charts.py.

All text is plain: whoever renders it escapes it. Names come from strangers' files, so :func:`clean` has been over it.
"""

from __future__ import annotations

from dataclasses import dataclass

from rewrite.errors import printable
from rewrite.loaders.outcome import SEVERITY
from rewrite.report.points import Series
from rewrite.wording import count

#: The most rows of a table that are shown. What is left out is said, and where it is.
MOST_ROWS = 600
#: The most charts of a section, and the most series of a chart.
MOST_CHARTS = MOST_SERIES = 8
_LONGEST = 300


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
class Change:
    """What a range of versions makes of a checkpoint before and after a conversion; None: there is none."""

    loader: str
    before: str
    after: str | None


@dataclass(frozen=True)
class OutcomeChart:
    """A line for each range of versions, on an axis of the kinds of outcome."""

    title: str
    changes: tuple[Change, ...]
    names: tuple[str, str]  # of before and after
    caption: str

    @property
    def kinds(self) -> tuple[str, ...]:
        return SEVERITY

    @property
    def alt(self) -> str:
        said = (
            f"{each.loader}: {each.before}" + ("" if each.after is None else f", then {each.after}")
            for each in self.changes
        )
        return f"{self.title}. {'; '.join(said)}."


Chart = LayerChart | OutcomeChart


@dataclass(frozen=True)
class Table:
    """Rows of text. ``numbers``: columns of numbers begin here. ``folded``: shown when somebody asks for it.
    ``note``: what has to be known to read it, and what is left out."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    numbers: int | None = None
    folded: bool = False
    code: bool = False  # whether cells after the first are to be copied letter by letter


@dataclass(frozen=True)
class Section:
    """A heading, sentences, charts and tables."""

    title: str
    text: tuple[str, ...] = ()
    charts: tuple[Chart, ...] = ()
    tables: tuple[Table, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """One check: its word (``ok``, ``FAILED``, ``skipped``), what it saw, what is wrong, what it did not ask."""

    name: str
    word: str
    summary: str
    problems: tuple[str, ...] = ()
    left_out: str = ""


@dataclass(frozen=True)
class Report:
    """A page. ``word`` is the verdict in one word, ``state`` one of good, bad, unknown."""

    title: str
    word: str
    state: str
    sentence: str
    facts: Table
    verdicts: tuple[Verdict, ...]
    not_checked: tuple[str, ...]
    sections: tuple[Section, ...]
    command: str
    versions: tuple[tuple[str, str], ...]
    remarks: tuple[str, ...] = ()


def clean(text: str, longest: int = _LONGEST) -> str:
    """``text`` on one line, of bounded length, with escapes for what cannot be shown or turns the direction of
    writing."""
    shown = printable(text[:longest])
    return shown if len(text) <= longest else f"{shown}… ({len(text)} characters)"


def clean_lines(text: str) -> str:
    """The same for text that may have several lines."""
    return "\n".join(clean(line) for line in text.split("\n"))


def shorten(text: str, longest: int = 44) -> str:
    """``text`` for a chart: its end, which tells names of tensors apart."""
    shown = printable(text)
    return shown if len(shown) <= longest else f"…{shown[1 - longest :]}"


def number(value: float) -> str:
    """Four digits."""
    return f"{value:.4g}"


def limited(rows: list[tuple[str, ...]], where: str) -> tuple[tuple[tuple[str, ...], ...], str]:
    """At most :data:`MOST_ROWS` of ``rows``, and the sentence that says what was left out and ``where`` it is."""
    left_out = len(rows) - MOST_ROWS
    if left_out <= 0:
        return tuple(rows), ""
    return tuple(rows[:MOST_ROWS]), f"The first {MOST_ROWS} of {len(rows):,} rows; {left_out:,} are left out: {where}."


def _range(series: Series) -> str:
    low, high = min(p.low for p in series.points), max(p.high for p in series.points)
    values = number(low) if low == high else f"{number(low)} to {number(high)}"
    return f"{values} in {count(len(series.points), 'layer')}"
