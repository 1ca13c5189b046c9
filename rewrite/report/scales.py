"""Scales of fused groups → charts by layer, and a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median

from rewrite.loaders.views import GroupView, spread
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
from rewrite.report.points import Gathered, Series, gather, merge
from rewrite.wording import count

_OWN_SCALES = {"channel": "each row", "block": "each block", "unknown": "a form that is not known"}


Kind = layers.Kind[GroupView]


def section(groups: Sequence[GroupView], whose: str, where: str) -> Section:
    """The scales of ``whose`` fused groups: charts of scales and of how far apart they are, and the table. ``where`` is
    where all numbers are."""
    found = layers.kinds(groups, lambda group: group.name, lambda group: group.layer)
    text, charts = [], []
    left_out = [kind.title for kind in found[MOST_CHARTS:]]
    for kind in found[:MOST_CHARTS]:
        chart, said = _scales(kind, whose)
        charts += [chart] if chart else []
        text += said
    apart = merge(_spread(kind).series for kind in found[:MOST_CHARTS])
    if apart:
        caption = (
            f"Of each fused layer of {whose} the largest scale of a partition over the smallest; 1: all are equal. "
        )
        charts.append(
            LayerChart(
                "Spread", "largest / smallest scale", apart, caption + _read(whose) + _band(apart) + _experts(groups)
            )
        )
    if left_out:
        text.append(f"{count(len(left_out), 'more kind')} of layers not drawn: {_some(left_out)}. {where}.")
    if not charts and not text:
        text = [f"Nothing is drawn: {_why_nothing(groups, whose)}."]
    title = f"Scales of {whose}"
    return Section(title, tuple(text), tuple(charts), tuple(_tables(found, whose, where)))


def _why_nothing(groups: Sequence[GroupView], whose: str) -> str:
    if not groups:
        return f"{whose} has no fused groups of the kinds that were looked at"
    return f"no fused group of {whose} has one scale for a partition"


def _read(whose: str) -> str:
    return f"As stored in {whose}; read by this run."


def _band(series: Iterable[Series]) -> str:
    return " Line: median; band: smallest to largest of a layer." if any(each.is_band for each in series) else ""


def _experts(groups: Iterable[GroupView]) -> str:
    if not any(group.experts for group in groups):
        return ""
    return " Of the experts of a layer: gate and up of the one whose two are furthest apart."


def _scales(kind: Kind, whose: str) -> tuple[LayerChart | None, list[str]]:
    names = dict.fromkeys(p.name for _, group in kind.members for p in group.partitions)
    gathered = [
        gather(
            shorten(name, 24),
            (
                (place.layer, p.scale)
                for place, group in kind.members
                for p in group.partitions
                if p.name == name and p.scale is not None
            ),
        )
        for name in list(names)[:MOST_SERIES]
    ]
    series = merge(each.series for each in gathered)
    said = _left_out(kind, gathered) + _own_scales(kind)
    if len(names) > MOST_SERIES:
        said.append(f"{kind.title}: {MOST_SERIES} of {len(names)} partitions are drawn.")
    if not series:
        return None, said
    nvfp4 = all(group.nvfp4 for _, group in kind.members)
    what = (
        "The global scale that the weights of each partition are multiplied with"
        if nvfp4
        else "The scale of each partition"
    )
    caption = f"{what}. {_read(whose)}{_band(series)}{_experts(group for _, group in kind.members)}"
    return LayerChart(f"Scales of {kind.title}", "global scale" if nvfp4 else "scale", series, caption), said


def _left_out(kind: Kind, gathered: Iterable[Gathered]) -> list[str]:
    """What of the values is not in a chart."""
    odd, unplaced = (sum(values) for values in zip(*((g.odd, g.unplaced) for g in gathered), strict=True))
    said = []
    if odd:
        verb = "is not a finite number" if odd == 1 else "are not finite numbers"
        said.append(f"{kind.title}: {count(odd, 'scale')} {verb} above 0, and not drawn.")
    if unplaced:
        said.append(f"{kind.title}: {count(unplaced, 'scale')} of groups without a layer number, not drawn.")
    return said


def _own_scales(kind: Kind) -> list[str]:
    layouts = {p.layout for _, group in kind.members for p in group.partitions}
    said = []
    for layout in sorted(layouts & _OWN_SCALES.keys()):
        said.append(f"{kind.title}: scales for {_OWN_SCALES[layout]}, not one for a partition; not drawn.")
    if layouts == {"none"}:
        said.append(f"{kind.title}: not quantized.")
    if "other" in layouts:
        said.append(f"{kind.title}: of a scheme that no loader was run with; its scales were not read.")
    return said


def _spread(kind: Kind) -> Gathered:
    values = ((place.layer, ratio) for place, group in kind.members if (ratio := spread(group)) is not None)
    return gather(kind.title, values)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _tables(found: Sequence[Kind], whose: str, where: str) -> Iterable[Table]:
    """A row for each group; where there are too many, one for each layer."""
    shown = [kind for kind in found if any(p.scale is not None for _, group in kind.members for p in group.partitions)]
    if sum(len(kind.members) for kind in shown) > MOST_ROWS:
        yield _by_layer(shown, whose, where)
        return
    for kind in shown:
        names = tuple(dict.fromkeys(clean(p.name) for _, group in kind.members for p in group.partitions))
        rows = [_row(group, names) for _, group in kind.members]
        title = f"{kind.title}: {count(len(rows), 'group')} of {whose}"
        yield Table(title, ("group", "scales for", *names, "max/min"), tuple(rows), numbers=2, folded=True)


def _row(group: GroupView, names: Iterable[str]) -> tuple[str, ...]:
    scales = {clean(p.name): p.scale for p in group.partitions}
    layouts = ", ".join(dict.fromkeys(p.layout for p in group.partitions))
    values = (scales.get(name) for name in names)
    ratio = spread(group)
    furthest = f" (furthest apart: {clean(group.furthest)})" if group.furthest else ""
    cells = ("-" if value is None else number(value) for value in (*values, ratio))
    return (clean(group.name) + furthest, layouts, *cells)


def _by_layer(found: Sequence[Kind], whose: str, where: str) -> Table:
    rows = [row for kind in found for row in _layer_rows(kind)]
    shown, cut = limited(rows, where)
    groups = sum(len(kind.members) for kind in found)
    note = (
        f"{groups:,} groups by layer: smallest, median and largest scale of a partition, and the largest max/min. "
        f"Each group on its own: {where}."
    )
    columns = ("layer", "groups", "with one scale a partition", "smallest", "median", "largest", "max/min, most")
    return Table(f"Scales of {whose} by layer", columns, shown, f"{note} {cut}".strip(), numbers=1, folded=True)


def _layer_rows(kind: Kind) -> Iterable[tuple[str, ...]]:
    found: dict[int | None, list[GroupView]] = {}
    for place, group in kind.members:
        found.setdefault(place.layer, []).append(group)
    for layer, groups in found.items():
        scales = sorted(p.scale for group in groups for p in group.partitions if p.scale is not None)
        ratios = [ratio for group in groups if (ratio := spread(group)) is not None]
        name = clean(kind.layer) if layer is None else f"{clean(kind.stack)}.{layer}: {clean(kind.layer)}".lstrip(".")
        values = (scales[0], median(scales), scales[-1]) if scales else (None,) * 3
        cells = ("-" if value is None else number(value) for value in (*values, max(ratios, default=None)))
        yield (name, f"{len(groups):,}", f"{len(ratios):,}", *cells)
