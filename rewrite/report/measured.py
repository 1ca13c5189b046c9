"""The numbers of a verification → charts by layer, and tables. These were measured by the run itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import median

from rewrite.loaders.versions import LOADERS
from rewrite.report import layers
from rewrite.report.page import MOST_CHARTS, MOST_ROWS, LayerChart, Section, Table, clean, limited
from rewrite.report.points import BAND, gather, merge
from rewrite.verification.result import PartitionNumbers, Settings, Verification, worst
from rewrite.wording import count, error

WHERE = "`rewrite verify IN OUT --json` lists all of them under `numbers`"
_Pick = Callable[[PartitionNumbers], float]
_WEIGHTS: tuple[_Pick, ...] = (lambda r: r.weights_before, lambda r: r.weights_fixed, lambda r: r.weights_out)
_OUTPUTS: tuple[_Pick, ...] = (lambda r: r.outputs_before, lambda r: r.outputs_fixed, lambda r: r.outputs_out)


#: The rows of each group.
_Rows = tuple[PartitionNumbers, ...]
_Kind = layers.Kind[_Rows]


def section(found: Verification) -> Section:
    """The error of weights and outputs, by layer, before and after the conversion."""
    if not found.numbers:
        return Section("Measured error", (_why_nothing(found),))
    settings, shown = found.settings, _kinds(found.numbers)
    drawn = sorted(shown, key=_furthest, reverse=True)[: MOST_CHARTS // 2]
    charts = [
        chart
        for kind in shown
        if kind in drawn
        for chart in (
            _chart("Error of outputs", kind, _OUTPUTS, settings, _sampled(settings)),
            _chart("Error of weights", kind, _WEIGHTS, settings, _of_weights(settings)),
        )
        if chart is not None
    ]
    text = [_largest(found), _explained(settings)]
    if any(row.partition == row.layer for row in found.numbers):
        text.append("Of layers that no engine fuses at most 256 are multiplied, drawn by the seed.")
    if len(drawn) < len(shown):
        text.append(
            f"Drawn: the {len(drawn)} kinds of layers with the largest errors, of {len(shown):,}. "
            "The tables have the others."
        )
    tables = (_largest_of_each(found.numbers), *_tables(found.numbers, shown))
    return Section("Measured error", tuple(text), tuple(charts), tables)


def _why_nothing(found: Verification) -> str:
    reason = next((check.summary for check in found.checks if check.name == "outputs"), "")
    return f"Not measured. {reason[:1].upper()}{reason[1:]}.".replace("..", ".") if reason else "Not measured."


def _largest(found: Verification) -> str:
    """The worst partition of all, of each that was measured."""
    said = (
        f"{name}: {error(max(map(pick, found.numbers)))}"
        for name, pick in zip(names(found.settings), _OUTPUTS, strict=True)
    )
    return f"Largest relative error of outputs, of {count(len(found.numbers), 'partition')}: {'; '.join(said)}."


def _largest_of_each(numbers: Sequence[PartitionNumbers]) -> Table:
    """Of all groups of a kind, for each partition the one that is furthest off."""
    several = len({row.layer for row in numbers}) > 1
    rows = tuple(
        (clean(f"{r.layer} {r.partition}" if several and r.layer != r.partition else r.partition), *_cells(r))
        for r in worst(numbers)
    )
    return Table("Largest relative error", ("partition", *_COLUMNS, "bound"), rows, _USED, numbers=1)


def unfixed() -> str:
    """The versions with the fault of issue #38197."""
    loaders = [loader for loader in LOADERS if loader.fills_slot_zero_only]
    return f"{loaders[0].name} {loaders[-1].versions_from(loaders[0])}"


def names(settings: Settings) -> tuple[str, str, str]:
    """What the three numbers of a row are of."""
    return f"IN, {unfixed()}", "IN, fixed engines", f"OUT, {_loader(settings)}"


def _loader(settings: Settings) -> str:
    return "fixed engines" if settings.loader == "fixed" else clean(settings.loader)


def _explained(settings: Settings) -> str:
    return (
        f"Relative error, norm(found - true) / norm(true) in float64, on {clean(settings.device)} (this run). "
        f"{unfixed()} fills the scale slot of the first partition only; fixed engines (vLLM from 0.20.0) fill every "
        "slot and requantize to the largest scale. True outputs are true weights times the activations: as quantized, "
        "where IN and OUT quantize them alike, else as they were before. No engine was started. 0 stands for less than "
        "10⁻¹²."
    )


def _sampled(settings: Settings) -> str:
    rows = "all rows" if settings.rows is None else f"a sample of {settings.rows:,} rows at most"
    return f"{count(settings.tokens, 'random activation')} (seed {settings.seed}) times {rows} of each partition"


def _of_weights(settings: Settings) -> str:
    if settings.quick:
        return "the rows that were multiplied only (--quick)"
    return "all weights of each partition; where they have several scales, or differ, the rows that were multiplied"


def _kinds(numbers: Iterable[PartitionNumbers]) -> tuple[_Kind, ...]:
    groups: dict[str, list[PartitionNumbers]] = {}
    for row in numbers:
        groups.setdefault(row.group, []).append(row)
    return layers.kinds(map(tuple, groups.values()), lambda rows: rows[0].group, lambda rows: rows[0].layer)


def _furthest(kind: _Kind) -> float:
    return max(pick(row) for _, rows in kind.members for row in rows for pick in _OUTPUTS)


def _chart(title: str, kind: _Kind, picks: Sequence[_Pick], settings: Settings, of: str) -> LayerChart | None:
    """Of each group its worst partition."""
    gathered = [
        gather(name, ((place.layer, max(map(pick, rows))) for place, rows in kind.members), zero=True)
        for name, pick in zip(names(settings), picks, strict=True)
    ]
    series = merge(each.series for each in gathered)
    if not series:
        return None
    odd = sum(each.odd for each in gathered)
    left_out = f" {count(odd, 'value')} not finite, and not drawn." if odd else ""
    caption = f"Measured: {of}. Of each group the worst partition. {BAND}{left_out}"
    return LayerChart(f"{title}, {kind.title}", "relative error", series, caption, zero=True)


_USED = (
    "Before: engines without the fix serve IN; fixed: those with it do. Bound: the largest difference of outputs over "
    "what requantization explains; `-`: none is needed."
)
_COLUMNS = ("weights before", "fixed", "OUT", "outputs before", "fixed", "OUT")


def _tables(numbers: Sequence[PartitionNumbers], shown: Sequence[_Kind]) -> Iterable[Table]:
    """A row for each partition of each group; where there are too many, one for each layer."""
    if len(numbers) <= MOST_ROWS:
        each = tuple((clean(r.group), clean(r.partition), *_cells(r)) for r in numbers)
        columns = ("group", "partition", *_COLUMNS, "bound")
        yield Table(f"Each partition: {count(len(each), 'row')}", columns, each, _USED, numbers=2, folded=True)
        return
    rows = tuple(row for kind in shown for row in _layer_rows(kind))
    note = f"{len(numbers):,} partitions by layer: median and largest error of each layer. Each on its own: {WHERE}."
    heads = ("layer", "partitions", *(f"{name}, {which}" for name in _COLUMNS for which in ("median", "largest")))
    yield limited(Table("Error by layer", heads, rows, note, numbers=1, folded=True), WHERE)


def _cells(row: PartitionNumbers) -> tuple[str, ...]:
    used = "-" if row.bound_used is None else f"{row.bound_used:.2f}"
    return (*(error(pick(row)) for pick in (*_WEIGHTS, *_OUTPUTS)), used)


def _layer_rows(kind: _Kind) -> Iterable[tuple[str, ...]]:
    for name, members in kind.by_layer():
        found = [row for rows in members for row in rows]
        columns = ([pick(row) for row in found] for pick in (*_WEIGHTS, *_OUTPUTS))
        cells = [error(value) for values in columns for value in (median(values), max(values))]
        yield (name, f"{len(found):,}", *cells)
