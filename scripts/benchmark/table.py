"""Numbers as text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Bound:
    """What is to be reached: ``value`` of the measurements at most ``limit``."""

    name: str
    limit: float
    value: Callable[[Any], float]


def judge(bounds: Iterable[Bound], measured: object) -> Iterator[str]:
    for bound in bounds:
        value = bound.value(measured)
        verdict = "reached" if value <= bound.limit else "MISSED"
        yield f"{verdict}: {bound.name}: {value:.2f}, to reach: {bound.limit:.2f} at most"


def spread(values: Sequence[float]) -> str:
    """The median, and how far the rounds were apart."""
    return f"{median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def table(rows: Sequence[Sequence[str]], *, right: Collection[int] = ()) -> Iterator[str]:
    """Aligned columns; those in ``right`` are flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = zip(row, widths, strict=True)
        yield "  ".join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(cells)).rstrip()
