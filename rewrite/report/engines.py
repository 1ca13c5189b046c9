"""What the loader model says of engines → a chart and tables. Nothing here was run: each caption says so."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rewrite.loaders.kernels import in_words
from rewrite.loaders.outcome import Outcome
from rewrite.loaders.versions import LOADERS, Loader
from rewrite.report.data import Change, OutcomeChart, Table, clean
from rewrite.wording import count

MODEL = (
    "Predicted by the loader model, which agrees with recorded runs of the versions under Sources of the predictions. "
    "This run started no engine."
)
_MOST_NAMES = 12
_BY_NAME = {(loader.name, loader.versions): loader for loader in LOADERS}


def known(name: str, versions: str) -> Loader | None:
    """The loader of a row that has its names only."""
    return _BY_NAME.get((name, versions))


def affected(outcome: Outcome, by_layer: bool) -> str:
    """The partitions that are hurt, with what they are multiplied by where that is all that is wrong: ``q x0.15``."""
    return hurt(outcome.partitions, dict(outcome.factors), by_layer)


def hurt(partitions: Sequence[str], factors: dict[str, float], by_layer: bool) -> str:
    """Partitions with the same factor together: ``q, k, v x0.176``."""
    said: dict[str, list[str]] = {}
    for full in partitions[:_MOST_NAMES]:
        factor = f" x{factors[full]:.3g}" if full in factors else ""
        said.setdefault(factor, []).append(clean(full if by_layer else full.rpartition(".")[2], 60))
    more = f" and {len(partitions) - _MOST_NAMES} more" if len(partitions) > _MOST_NAMES else ""
    return ", ".join(f"{', '.join(names)}{factor}" for factor, names in said.items()) + more


def several_layers(outcomes: Iterable[Outcome]) -> bool:
    """Whether partitions are of more than one kind of layer, so that their names alone say too little."""
    return len({name.partition(".")[0] for outcome in outcomes for name in outcome.partitions}) > 1


def where(platform: str | None) -> str:
    """The platform with the cards that it stands for."""
    return "loading only" if platform is None else in_words(platform)


def outcome_chart(
    title: str, lines: Sequence[tuple[str, str, tuple[str, str | None]]], names: tuple[str, str], caption: str
) -> OutcomeChart | None:
    """``lines`` have the kind before, and the kind after; None where there is none."""
    changes = tuple(Change(f"{name} {versions}", *kinds) for name, versions, kinds in lines)
    return OutcomeChart(title, changes, names, caption) if changes else None


def source_table(loaders: Iterable[Loader]) -> Table:
    """What is known of each range of versions, and from where."""
    rows = tuple((loader.name, loader.versions, loader.source) for loader in loaders)
    note = "Versions after `run` were run with test checkpoints; others of a range are assumed to be like these."
    return Table("Sources of the predictions", ("loader", "versions", "known from"), rows, note, folded=True)


def kernel_table(rows: Iterable[tuple[str, str, tuple[str, ...]]], columns: tuple[str, ...]) -> Table | None:
    """What multiplies the fused FP8 layers on each card."""
    found = tuple((name, versions, *cells) for name, versions, cells in rows if set(cells[1:]) - {"-"})
    if not found:
        return None
    note = (
        "The kernels that these engines choose for the fused FP8 layers, recorded from their own code; none ran here."
    )
    return Table(
        f"What multiplies the fused layers: {count(len(found), 'row')}",
        ("loader", "versions", "cards", *columns),
        found,
        note,
        folded=True,
    )


def kernels(kind: str, families: Sequence[str]) -> str:
    """What multiplies where a checkpoint is loaded with this outcome."""
    return "-" if kind == "fails to load" else ", ".join(families) or "not FP8"
