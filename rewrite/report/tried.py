"""What an engine made of a checkpoint → :class:`~rewrite.report.page.Page`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from rewrite.report.names import Names
from rewrite.report.page import (
    Cell,
    Colored,
    Page,
    Run,
    Section,
    Table,
    Tone,
    again,
    clean,
    limited,
    outcome_text,
    present,
    whole,
)  # fmt: skip
from rewrite.trying.tried import Trial, Tried, by_kind, worst, worst_of
from rewrite.trying.verdict import AFFECTED, EXACT, LESS, ROUNDED, UNKNOWN, LayerVerdict
from rewrite.wording import count, nbytes

_JSON = "`rewrite try CHECKPOINT --json`"
_COLUMNS = ("layer", "outcome", "worst", "layers", "off by")
_CLEAN = frozenset((EXACT, ROUNDED))


def page(tried: Tried, names: tuple[str, str] | None = None, run: Run | None = None) -> Page:
    """``names`` stand for the checkpoint and OUT on a page that is published."""
    given = [each[0].checkpoint for each in (tried.before, tried.after) if each]
    paths = dict(zip(given, names, strict=False)) if names else {}
    source, out = names or (tried.before[0].checkpoint, tried.after[0].checkpoint if tried.after else "")
    shown = tried.after or tried.before
    kind = worst(shown) if tried.same is not False else "does not mean the same"
    tone: Tone = "good" if kind in _CLEAN else "part" if kind in (LESS, UNKNOWN) else "bad"
    name = out if tried.after else source
    sentence = f"{clean(name)} in {shown[0].engine}: {kind}."
    return Page(
        f"{clean(source)} in {shown[0].engine}", _headline(tried.before, source), kind.upper(), tone, sentence,
        present(answer(tried, Names(paths)), *sections(tried), again(run)),
        (whole(name), f"in {shown[0].engine}:", outcome_text(kind, (), by_layer=False), *_closing(tried)),
    )  # fmt: skip


def sections(tried: Tried) -> tuple[Section, ...]:
    """What is behind the answer."""
    return present(*(_all_layers(trials, name) for trials, name in _sides(tried)), _how(tried))


def _sides(tried: Tried) -> tuple[tuple[Sequence[Trial], str], ...]:
    return ((tried.before, "IN"), (tried.after, "OUT")) if tried.after else ((tried.before, ""),)


def _headline(trials: Sequence[Trial], name: str) -> str:
    """What ran, and what was loaded."""
    first = trials[0]
    layers = "all layers" if first.layers is None else f"{len(first.layers.chosen)} of {first.layers.count} layers"
    words = first.result["words"]
    layers += f", {words[0]:,} of {words[1]:,} words" if words else ""
    ranks = f", {len(trials)} ranks" if len(trials) > 1 else ""
    seconds = sum(sum(each.result["seconds"].values()) for each in trials)
    size = nbytes(max(each.result["peak_bytes"] for each in trials))
    return f"{first.engine} on {first.result['device']}: {whole(name)}, {layers}{ranks}, {seconds:.0f} s, {size}"


def answer(tried: Tried, names: Names) -> Section:
    """A row for each kind of layer: before and after, where there are two."""
    refused = [sentence for trials, name in _sides(tried) for sentence in _refusal(trials, name)]
    return Section(
        f"What {tried.before[0].engine} made of it",
        (*refused,),
        tables=(_side_by_side(tried) if tried.after else _one(tried.before),),
        lines=(*_reasons(tried), *_lines(tried)),
        command=names.hide(tried.command or ""),
        brief=True,
    )


def _one(trials: Sequence[Trial]) -> Table:
    rows = tuple((clean(kind), *_cells(layers)) for kind, layers in by_kind(trials).items())
    return Table("Kinds of layers", _COLUMNS, rows, numbers=3)


def _cells(layers: Sequence[LayerVerdict]) -> tuple[Cell, ...]:
    each = worst_of(layers)
    return Colored(each.kind), _where(each), f"{len(layers)}", _off(each)


def _side_by_side(tried: Tried) -> Table:
    before, after = by_kind(tried.before), by_kind(tried.after)
    both = {**after, **before}
    rows = tuple(
        (clean(kind), _outcome(before.get(kind)), _outcome(after.get(kind)), _where(worst_of(both[kind])))
        for kind in both
    )
    return Table("Kinds of layers", ("layer", "IN", "OUT", "worst"), rows)


def _outcome(layers: Sequence[LayerVerdict] | None) -> Cell:
    if not layers:
        return "-"
    each = worst_of(layers)
    return Colored(each.kind, "" if each.error is None or each.error <= 1e-6 else f" ({_off(each)})")


def _refusal(trials: Sequence[Trial], name: str) -> Iterator[Cell]:
    """The engine's own message and its last frames."""
    failure = next((each.verdict.failure for each in trials if each.verdict.failure), None)
    if failure is None:
        return
    first = (failure["message"].splitlines() or [""])[0]
    where = f"{name} " if name else ""
    yield Colored(worst(trials), f" {where}while {failure['phase']}: {clean(failure['type'])}: {clean(first)}")
    yield from (f"  at {whole(clean(frame))}" for frame in failure["where"])


def _reasons(tried: Tried) -> Iterator[Cell]:
    """What is known of the worst layer of each kind, and what is not known."""
    for layers in by_kind(tried.after or tried.before).values():
        each = worst_of(layers)
        if each.reasons and each.kind in AFFECTED:
            yield f"{clean(each.module)}: {clean('; '.join(each.reasons))}."
    for trial in tried.after or tried.before:
        if empty := trial.verdict.empty:
            more = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
            yield f"The checkpoint has nothing, or not enough, for {clean(empty[0])}{more}: the engine never fills it."
        if cache := trial.verdict.cache:
            more = f" ({_JSON} lists {len(cache) - 1} more)" if len(cache) > 1 else ""
            yield f"An FP8 KV cache is scaled by other numbers than the files have: {cache[0]}{more}."
        yield from (f"Not known: {clean(reason)}." for reason in trial.verdict.unlearnt[:3])
        if len(trial.verdict.unlearnt) > 3:
            yield f"{len(trial.verdict.unlearnt) - 3} more are not known: {_JSON} lists them."


def _lines(tried: Tried) -> Iterator[Cell]:
    if tried.predicted is None:
        yield "`rewrite inspect` knows nothing of this engine or of this checkpoint."
    elif tried.agrees is not None:
        yield f"`rewrite inspect` {'agrees' if tried.agrees else 'does not agree'}: it predicts {tried.predicted!r}."
    if tried.same is False:
        more = f" {len(tried.differs) - 3} more: `rewrite verify IN OUT` lists them." if len(tried.differs) > 3 else ""
        yield f"OUT does not have the weights of IN: {clean('; '.join(tried.differs[:3]))}.{more}"
    if tried.same:
        yield "OUT has the weights of IN."
    if tried.command:
        yield "Repaired by:" if not tried.after else "The conversion that `rewrite inspect` advises:"
    elif worst(tried.before) in AFFECTED and not tried.after:
        yield "No conversion is known that repairs this."


def in_short(tried: Tried) -> Cell:
    """For the closing line of another page."""
    shown = tried.after or tried.before
    return outcome_text(worst(shown), (), f"in {shown[0].engine}", by_layer=False)


def _closing(tried: Tried) -> Iterator[Cell]:
    unknown = sum(len(each.verdict.unlearnt) for each in tried.after or tried.before)
    if unknown:
        yield f"Not known: {count(unknown, 'tensor')}."


def _all_layers(trials: Sequence[Trial], name: str) -> Section | None:
    rows = tuple(_layer(each) for trial in trials for each in trial.verdict.layers)
    if not rows:
        return None
    columns = ("module", "parameter", "outcome", "worst", "off by", "read from")
    title = f"All layers of {name}" if name else "All layers"
    table = Table(title, columns, rows, folded=len(rows) > 12)
    return Section(title, tables=(limited(table, f"{_JSON} lists all of them"),))


def _layer(each: LayerVerdict) -> tuple[Cell, ...]:
    said = clean("; ".join(each.reasons) or each.how)
    return clean(each.module), each.parameter, Colored(each.kind), _where(each), _off(each), said


def _how(tried: Tried) -> Section:
    first = tried.before[0]
    seconds = first.result["seconds"]
    rows = [
        ("engine", first.engine), ("device", first.result["device"]), ("torch", first.result["torch"]),
        ("Python", first.result["python"]), ("memory", nbytes(first.result["peak_bytes"])),
        *((f"seconds: {name}", f"{value:.1f}") for name, value in seconds.items()),
        ("replaced", "; ".join(first.result["replaced"]) or "nothing"),
    ]  # fmt: skip
    note = "Nothing replaced reads, places or merges a weight or a scale." if first.result["replaced"] else ""
    return Section("How it was tried", tables=(Table("How it was tried", ("", "checkpoint"), tuple(rows), note),))


def _off(layer: LayerVerdict) -> str:
    if layer.error is None:
        return "-"
    return "NaN" if layer.error != layer.error else "0" if layer.error <= 1e-6 else f"{layer.error:.1e}"


def _where(layer: LayerVerdict) -> str:
    """The tensor of the checkpoint, without what all names begin with."""
    if layer.tensor is None:
        return clean(layer.how)
    match = re.match(r"^.*?\b(?:layers|h|blocks)\.(\d+)\.(.+?)(?:\.weight|_packed)*$", layer.tensor)
    return clean(f"layer {match[1]}: {match[2].rpartition('.')[2]}" if match else layer.tensor)
