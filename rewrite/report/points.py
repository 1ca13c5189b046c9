"""Values of groups → points by layer: what charts are drawn from."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from rewrite.wording import EXACT

#: What a chart's caption says of layers that have several values.
BAND = "Line: median of the groups of a layer; band: smallest to largest."


@dataclass(frozen=True)
class Point:
    """The values of one layer: the smallest, the median and the largest of ``count``."""

    layer: int
    low: float
    middle: float
    high: float
    count: int = 1


@dataclass(frozen=True)
class Series:
    """Values by layer under one name."""

    name: str
    points: tuple[Point, ...]

    @property
    def is_band(self) -> bool:
        """Whether some layer has several values."""
        return any(point.count > 1 for point in self.points)


@dataclass(frozen=True)
class Gathered:
    """A series, and how many values it leaves out: no finite numbers from 0 on, which a log axis cannot show, and
    values of groups without a layer number."""

    series: Series
    odd: int = 0
    unplaced: int = 0


def gather(name: str, values: Iterable[tuple[int | None, float]], *, zero: bool = False) -> Gathered:
    """Values by layer. ``zero``: zero is a value, and so is what rounding leaves of it; without it zero is odd."""
    layers: dict[int, list[float]] = {}
    odd = unplaced = 0
    for layer, value in values:
        if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
            odd += 1
        elif layer is None:
            unplaced += 1
        else:
            layers.setdefault(layer, []).append(0.0 if zero and value < EXACT else value)
    points = (Point(layer, min(v), median(v), max(v), len(v)) for layer, v in sorted(layers.items()))
    return Gathered(Series(name, tuple(points)), odd, unplaced)


def merge(series: Iterable[Series]) -> tuple[Series, ...]:
    """Series with the same points as one, ``q, k, v``: drawn one over the other, only the last would be seen. Those
    without points are left out."""
    names: dict[tuple[Point, ...], list[str]] = {}
    for each in series:
        if each.points:
            names.setdefault(each.points, []).append(each.name)
    return tuple(Series(_joined(found), points) for points, found in names.items())


def _joined(names: list[str]) -> str:
    return ("; " if any("," in name for name in names) else ", ").join(names)
