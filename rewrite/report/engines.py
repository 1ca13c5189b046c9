"""What engines make of a checkpoint → tables. Nothing here was run: each note says so."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rewrite.loaders.kernels import by_cards, in_words
from rewrite.loaders.outcome import Outcome, Row, merged
from rewrite.loaders.ranges import Engine
from rewrite.report.page import Cell, Colored, Table, clean, outcome_text
from rewrite.wording import count

MODEL = "Predicted from recorded runs of the versions under Sources of the predictions. This run started no engine."
KERNELS = "Kernels used for these layers, by GPU"


def where(platform: str | None) -> str:
    """The platform with the cards that it stands for."""
    return "loading only" if platform is None else in_words(platform)


def several_layers(outcomes: Iterable[Outcome]) -> bool:
    """Whether partitions are of more than one kind of layer, so that their names alone say too little."""
    return len({name.partition(".")[0] for each in outcomes for name in each.partitions}) > 1


def outcome_cell(outcome: Outcome, by_layer: bool, *, why: bool = False) -> Colored:
    """With what each partition is multiplied by, where that is all that is wrong: ``garbled: q x0.15, k x0.15``."""
    factors = dict(outcome.factors)
    names = (f"{name} x{factors[name]:.3g}" if name in factors else name for name in outcome.partitions)
    return outcome_text(outcome.kind, names, outcome.detail if why else "", by_layer=by_layer)


def answer(rows: Sequence[Row], state: str, shown: Iterable[Engine]) -> Table:
    """What the engines that were asked for make of one state, and why."""
    chosen = set(shown)
    by_layer = several_layers(row.outcomes[state] for row in rows)

    def say(row: Row) -> Cell | None:
        return outcome_cell(row.outcomes[state], by_layer, why=True) if row.engine in chosen else None

    lines = [(f"{name} {versions}", cell) for name, versions, cell in merged(rows, say) if cell is not None]
    return Table("Engines that were asked for", ("engine", state), tuple(lines), MODEL)


def by_state(rows: Sequence[Row], title: str, note: str) -> Table:
    """For each engine the outcomes, and the states that they are of."""
    by_layer = several_layers(outcome for row in rows for outcome in row.outcomes.values())

    def say(row: Row) -> tuple[tuple[Cell, str], ...]:
        return tuple(_by_cell((state, outcome_cell(each, by_layer)) for state, each in row.outcomes.items()))

    lines = merged(rows, say)
    cells = tuple((name, versions, *each) for name, versions, said in lines for each in said)
    return Table(title, ("engine", "versions", "outcome", "of the checkpoint"), cells, note, labels=2)


def side_by_side(rows: Sequence[Row], title: str, note: str) -> Table:
    """For each engine a column for each state, and why the last is as it is."""
    states = tuple(rows[0].outcomes)
    by_layer = several_layers(outcome for row in rows for outcome in row.outcomes.values())

    def say(row: Row) -> tuple[Cell, ...]:
        last = row.outcomes[states[-1]]
        return (*(outcome_cell(row.outcomes[s], by_layer) for s in states), clean(last.detail))

    lines = tuple((name, versions, *cells) for name, versions, cells in merged(rows, say))
    return Table(title, ("engine", "versions", *states, f"why {states[-1]}"), lines, note, labels=2)


def kernel_table(rows: Sequence[Row]) -> Table | None:
    """What multiplies the fused FP8 layers on each card; None where no such layer is FP8."""

    def say(row: Row) -> tuple[tuple[str, tuple[str, ...]], ...]:
        cards = next(iter(row.kernels.values()), {})
        return by_cards((card, tuple(_kernel(row, state, card) for state in row.outcomes)) for card in cards)

    lines = tuple(
        (name, versions, cards, *each)
        for name, versions, said in merged(rows, say)
        for cards, cells in said
        if set(cells) != {"-"}
        for each in _by_cell(zip(rows[0].outcomes, cells, strict=True))
    )
    if not lines or not any(families for row in rows for of in row.kernels.values() for families in of.values()):
        return None
    note = "The kernels that these engines choose, recorded from their own code; none ran here."
    columns = ("engine", "versions", "cards", "kernel", "of the checkpoint")
    return Table(f"{KERNELS}: {count(len(lines), 'row')}", columns, lines, note, folded=True, labels=3)


def _kernel(row: Row, state: str, card: str) -> str:
    if row.outcomes[state].kind == "fails to load":
        return "-"
    return ", ".join(row.kernels.get(state, {}).get(card, ())) or "not FP8"


def source_table(rows: Iterable[Row]) -> Table:
    """What is known of each range of versions, and from where."""
    lines = tuple((row.engine.name, row.engine.versions, row.engine.source) for row in rows)
    note = "Versions after `run` were run with test checkpoints; others of a range are assumed to be like these."
    return Table("Sources of the predictions", ("engine", "versions", "known from"), lines, note, folded=True, labels=2)


def _by_cell(cells: Iterable[tuple[str, Cell]]) -> Iterator[tuple[Cell, str]]:
    """States of which the same is said as one: ``as it is, --profile exact, bf16``."""
    found: dict[Cell, list[str]] = {}
    for state, cell in cells:
        found.setdefault(cell, []).append(state)
    for cell, states in found.items():
        profiles = [state.removeprefix("--profile ") for state in states if state.startswith("--profile ")]
        others = [state for state in states if not state.startswith("--profile ")]
        yield cell, ", ".join([*others, *([f"--profile {', '.join(profiles)}"] if profiles else [])])
