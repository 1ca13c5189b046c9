"""Scales of fused groups → charts by layer, and tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from statistics import median

from rewrite.loaders.layer import Layer
from rewrite.report import layers
from rewrite.report.page import (
    MOST_CHARTS,
    MOST_ROWS,
    MOST_SERIES,
    LayerChart,
    Section,
    Table,
    clean,
    limited,
    number,
    shorten,
)
from rewrite.report.points import BAND, gather, merge
from rewrite.wording import count

_UNDRAWN = {
    "channel": "scales for each row, not one for a partition; not drawn",
    "block": "scales for each block, not one for a partition; not drawn",
    "unknown": "scales in a form that is not known; not drawn",
    "other": "of a scheme that no engine was run with; its scales were not read",
}
_Kind = layers.Kind[Layer]


def section(groups: Sequence[Layer], whose: str, where: str) -> Section:
    """The scales of ``whose`` fused groups: charts of scales and of how far apart they are, and the table. ``where`` is
    where all numbers are."""
    found = layers.kinds(groups, lambda group: group.name, lambda group: group.kind)
    drawn = [_scales(kind, whose) for kind in found[:MOST_CHARTS]]
    charts = [chart for chart, _ in drawn if chart]
    text = [sentence for _, said in drawn for sentence in said]
    spreads = (gather(k.title, ((place.layer, ratio) for place, g in k.members if (ratio := g.spread))) for k in found)
    if apart := merge(each.series for each in list(spreads)[:MOST_CHARTS]):
        caption = (
            f"Of each fused layer of {whose} the largest scale of a partition over the smallest; 1: all are equal."
        )
        charts.append(LayerChart("Spread", "largest / smallest scale", apart, f"{caption} {_read(whose, groups)}"))
    if left_out := [kind.title for kind in found[MOST_CHARTS:]]:
        more = f" and {len(left_out) - 5:,} more" if len(left_out) > 5 else ""
        text.append(
            f"{count(len(left_out), 'more kind')} of layers not drawn: {', '.join(left_out[:5])}{more}. {where}."
        )
    if not charts and not text:
        none = f"no fused group of {whose} has one scale for a partition"
        text = [
            f"Nothing is drawn: {none if groups else f'{whose} has no fused groups of the kinds that were looked at'}."
        ]
    return Section(f"Scales of {whose}", tuple(text), tuple(charts), tuple(_tables(found, whose, where)))


def _read(whose: str, groups: Iterable[Layer]) -> str:
    experts = " Of the experts of a layer: gate and up of the one whose two are furthest apart."
    return f"As stored in {whose}; read by this run. {BAND}{experts if any(g.experts for g in groups) else ''}"


def _scales(kind: _Kind, whose: str) -> tuple[LayerChart | None, list[str]]:
    """A line for each partition, and what of the values is not drawn."""
    groups = [group for _, group in kind.members]
    names = list(dict.fromkeys(p.name for group in groups for p in group.parts))
    gathered = [
        gather(
            shorten(name, 24),
            ((at.layer, p.scale) for at, g in kind.members for p in g.parts if p.name == name and p.scale is not None),
        )
        for name in names[:MOST_SERIES]
    ]
    said = [f"{kind.title}: {each}." for each in _not_drawn(groups, sum(g.odd for g in gathered))]
    if unplaced := sum(g.unplaced for g in gathered):
        said.append(f"{kind.title}: {count(unplaced, 'scale')} of groups without a layer number, not drawn.")
    if len(names) > MOST_SERIES:
        said.append(f"{kind.title}: {MOST_SERIES} of {len(names)} partitions are drawn.")
    series = merge(each.series for each in gathered)
    if not series:
        return None, said
    what, unit = "The scale of each partition.", "scale"
    if all(group.nvfp4 for group in groups):
        what, unit = "The global scale that the weights of each partition are multiplied with.", "global scale"
    return LayerChart(f"Scales of {kind.title}", unit, series, f"{what} {_read(whose, groups)}"), said


def _not_drawn(groups: Sequence[Layer], odd: int) -> Iterator[str]:
    if odd:
        verb = "is not a finite number" if odd == 1 else "are not finite numbers"
        yield f"{count(odd, 'scale')} {verb} above 0, and not drawn"
    layouts = {p.layout for group in groups for p in group.parts}
    yield from (text for layout, text in _UNDRAWN.items() if layout in layouts)
    if layouts == {"none"}:
        yield "not quantized"


def _tables(found: Sequence[_Kind], whose: str, where: str) -> Iterator[Table]:
    """A row for each group; where there are too many, one for each layer."""
    shown = [kind for kind in found if any(p.scale is not None for _, group in kind.members for p in group.parts)]
    groups = sum(len(kind.members) for kind in shown)
    if groups > MOST_ROWS:
        note = (
            f"{groups:,} groups by layer: smallest, median and largest scale of a partition, and the largest max/min. "
            f"Each group on its own: {where}."
        )
        columns = ("layer", "groups", "with one scale a partition", "smallest", "median", "largest", "max/min, most")
        rows = tuple(row for kind in shown for row in _layer_rows(kind))
        yield limited(Table(f"Scales of {whose} by layer", columns, rows, note, numbers=1, folded=True), where)
        return
    for kind in shown:
        names = tuple(dict.fromkeys(clean(p.name) for _, group in kind.members for p in group.parts))
        lines = tuple(_row(group, names) for _, group in kind.members)
        title = f"{kind.title}: {count(len(lines), 'group')} of {whose}"
        yield Table(title, ("group", "scales for", *names, "max/min"), lines, numbers=2, folded=True)


def _row(group: Layer, names: Iterable[str]) -> tuple[str, ...]:
    scales = {clean(p.name): p.scale for p in group.parts}
    layouts = ", ".join(dict.fromkeys(p.layout for p in group.parts))
    furthest = f" (furthest apart: {clean(group.furthest)})" if group.furthest else ""
    return (clean(group.name) + furthest, layouts, *map(number, (*(scales.get(name) for name in names), group.spread)))


def _layer_rows(kind: _Kind) -> Iterator[tuple[str, ...]]:
    for name, groups in kind.by_layer():
        scales = sorted(p.scale for group in groups for p in group.parts if p.scale is not None)
        ratios = [ratio for group in groups if (ratio := group.spread) is not None]
        values = (scales[0], median(scales), scales[-1]) if scales else (None,) * 3
        cells = map(number, (*values, max(ratios, default=None)))
        yield (name, f"{len(groups):,}", f"{len(ratios):,}", *cells)
