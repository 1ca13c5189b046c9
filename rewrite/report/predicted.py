"""What the loader model says of each group → charts of errors by layer. Nothing of this was measured."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from rewrite.inspection.inspection import Inspection, LoaderRow
from rewrite.loaders.outcome import SENTINEL
from rewrite.loaders.versions import merged
from rewrite.loaders.views import GroupView
from rewrite.report import engines, layers
from rewrite.report.data import MOST_SERIES, LayerChart, Section
from rewrite.report.points import Point, Series, gather, merge

_MOST_GROUPS = 20_000  # each is judged by every loader
_NUMERIC = ("exact", "loses precision", "garbled")
_CAPTION = (
    "norm(served - true) / norm(true) of weights, of each layer the worst group. Where weights are multiplied by a "
    "wrong factor, it follows from the scales. Where they saturate, it is an estimate, which may be several times too "
    "low. Where they are rounded again, it is a bound. 0: exact."
)


def section(found: Inspection) -> Section:
    """Of a checkpoint as it is."""
    charts, text = _chart(found, "the checkpoint", frozenset())
    return Section("Predicted error", tuple(text), charts)


def between(before: Inspection | None, after: Inspection | None, measured: Collection[str]) -> Section | None:
    """Of IN and OUT: of the groups that were not ``measured``. None where there are no such groups."""
    sides = [(whose, found) for whose, found in (("IN", before), ("OUT", after)) if found is not None]
    if not any(group.name not in measured for _, found in sides for group in found.groups):
        return None
    charts: tuple[LayerChart, ...] = ()
    text = ["Of groups that this run did not measure."]
    for whose, found in sides:
        drawn, said = _chart(found, whose, measured)
        charts += drawn
        text += said
    return Section("Predicted error", tuple(text), charts)


def _chart(found: Inspection, whose: str, measured: Collection[str]) -> tuple[tuple[LayerChart, ...], list[str]]:
    groups = [group for group in found.groups if group.name not in measured]
    if not groups:
        return (), [f"{whose[:1].upper()}{whose[1:]}: no fused group to predict anything of."]
    if len(groups) > _MOST_GROUPS:
        return (), [
            f"Not drawn for {whose}: {len(groups):,} groups are too many. The table of engines has the worst of all."
        ]
    lines = merged(found.rows, lambda row: row.loader, lambda row: _points(row, groups, found.groups))
    series = merge(Series(f"{name} {versions}", points or ()) for name, versions, points in lines)
    not_drawn = [f"{name} {versions}" for name, versions, points in lines if points is None]
    said = []
    if not_drawn:
        said.append(
            f"Not drawn for {whose}, as there is no number for each group: {', '.join(not_drawn)}. "
            "What these engines make of it is in the table."
        )
    if not series:
        return (), said
    if len(series) > MOST_SERIES:
        more = "; ".join(each.name for each in series[MOST_SERIES:])
        said.append(f"Not drawn for {whose}, as more than {MOST_SERIES} lines differ: {more}.")
    name = "Predicted error" if whose == "the checkpoint" else f"Predicted error, {whose}"
    return (
        LayerChart(name, "relative error of weights", series[:MOST_SERIES], f"{engines.MODEL} {_CAPTION}", zero=True),
    ), said


def _points(row: LoaderRow, groups: Sequence[GroupView], every: Sequence[GroupView]) -> tuple[Point, ...] | None:
    """None where the outcome is not that of the groups one by one, or has no number."""
    if row.as_is.kind not in _NUMERIC:
        return None
    outcomes = {group.name: row.loader.of_group(group) for group in every}
    worst = max(outcomes.values(), key=lambda outcome: (outcome.severity, outcome.error))
    if (worst.kind, worst.error) != (row.as_is.kind, row.as_is.error) or worst.error >= SENTINEL:
        return None
    values = ((layers.position(group.name).layer, outcomes[group.name].error) for group in groups)
    points = gather("", values, zero=True).series.points
    return tuple(Point(point.layer, point.high, point.high, point.high) for point in points) or None
