"""Inspections as text for people. Pure: the command line prints what this returns."""

from __future__ import annotations

from collections.abc import Sequence

from rewrite.checkpoint.storage import Storage
from rewrite.cli.layout import Cell, Line, Span, line, paragraph
from rewrite.cli.outcomes import BAD, GOOD, LESS, told, worded
from rewrite.cli.tables import table
from rewrite.inspection.advice import Advice
from rewrite.inspection.inspection import Inspection, LoaderRow
from rewrite.integrations.remote import RemoteStorage
from rewrite.loaders.kernels import by_cards, in_words
from rewrite.loaders.outcome import Outcome
from rewrite.loaders.versions import Loader, merged
from rewrite.loaders.views import GroupView, spread
from rewrite.planning.profiles import PROFILES
from rewrite.wording import count, nbytes


def traffic_lines(storage: Storage, size: int) -> list[str]:
    """How much was read over a network; nothing of a directory."""
    if not isinstance(storage, RemoteStorage):
        return []
    traffic = storage.traffic
    return [f"{nbytes(traffic.read)} of {nbytes(size)} read, in {count(traffic.requests, 'request')}"]


def render_inspection(
    inspection: Inspection, affected: Sequence[LoaderRow], advice: Advice, command: str | None, width: int
) -> list[Line]:
    """What a checkpoint is, its fused groups, what is wrong with it, and what every known loader makes of it."""
    lines = [line(inspection.path), *paragraph(_headline(inspection), width)]
    for text, number in inspection.schemes.items():
        lines += paragraph(f"{count(number, 'linear layer')}: {text}", width)
    lines += [line(), *_groups(inspection, width)]
    if inspection.findings:
        lines += [line(), line(Span("Wrong in the checkpoint:", BAD))]
        lines += table([[f.what, f.where] for f in inspection.findings], width, indent=2)
    if inspection.groups:
        lines += [line(), *_loader_table(inspection, width)]
    for profile, why in inspection.refusals.items():
        lines += paragraph(f"convert --profile {profile} refuses: {why}", width)
    lines += _kernel_table(inspection, width)
    return [*lines, line(), *_verdict(inspection, affected, advice, command, width)]


def _headline(inspection: Inspection) -> str:
    size = f"{count(inspection.shards, 'shard')}, {count(inspection.tensors, 'tensor')}, {nbytes(inspection.nbytes)}"
    return f"{inspection.model_type}, {inspection.dialect}, {size}"


def _groups(inspection: Inspection, width: int) -> list[Line]:
    """A table for each fused layer."""
    lines: list[Line] = []
    for layer in _layers(inspection):
        groups = [group for group in inspection.groups if group.layer == layer]
        lines += [line(), *_groups_of_layer(groups, width)]
    if lines:
        return lines[1:]
    if inspection.selection == "all":
        return [line("No fused groups.")]
    none = "No in_proj_qkvz groups, which are what loaders get wrong."
    return paragraph(f"{none} (--groups all: every fused layer)", width)


def _layers(inspection: Inspection) -> tuple[str, ...]:
    """The fused layers of which some group is quantized."""
    quantized = (group for group in inspection.groups if any(p.layout != "none" for p in group.partitions))
    return tuple(dict.fromkeys(group.layer for group in quantized))


def _groups_of_layer(groups: Sequence[GroupView], width: int) -> list[Line]:
    first = groups[0]
    start, ranges = 0, []
    for partition in first.partitions:
        ranges.append(f"{partition.name} {start}:{start + partition.rows}")
        start += partition.rows
    head = [f"fused group (rows {', '.join(ranges)})", "scales", *(p.name for p in first.partitions), "max/min"]
    body = []
    for group in groups:
        layouts = ", ".join(dict.fromkeys(p.layout for p in group.partitions))
        scales = ["-" if p.scale is None else f"{p.scale:.4g}" for p in group.partitions]
        ratio = spread(group)
        name = f"{group.name} (most apart: {group.furthest.rpartition('.')[2]})" if group.furthest else group.name
        body.append([name, layouts, *scales, "-" if ratio is None else f"{ratio:.2f}"])
    return table(body, width, head=[head], right=range(2, len(head)))


def _loader_table(inspection: Inspection, width: int) -> list[Line]:
    """A row for each loader version range: the checkpoint as it is, and after convert with each profile."""
    profiles = inspection.shown_profiles
    head = ["loader", "versions", *_states(profiles)]
    several = len(_layers(inspection)) > 1  # the names would make the table too wide

    def say(row: LoaderRow) -> list[Cell]:
        return [_cell(outcome, several) for outcome in (row.as_is, *(row.converted[p] for p in profiles))]

    rows = [[name, versions, *cells] for name, versions, cells in merged(inspection.rows, _loader, say)]
    command = "rewrite convert" + (" --groups all" if inspection.selection == "all" else "")
    where = f" on {in_words(inspection.platform)}" if inspection.platform else ""
    what = f"What loaders make of the fused groups{where}, as they are and after `{command}`:"
    lines = [*paragraph(what, width, hang=0), *table(rows, width, head=[head], labels=2)]
    static = any(group.static_activations and not group.nvfp4 for group in inspection.groups)
    for profile in profiles if static else ():
        note = PROFILES[profile].notes.get("static")
        lines += paragraph(f"note: {profile}: {note}", width) if note else []
    return [*lines, *_others_note(inspection, width)]


def _states(profiles: Sequence[str]) -> list[str]:
    return ["as it is", *(f"--profile {profile}" for profile in profiles)]


def _others_note(inspection: Inspection, width: int) -> list[Line]:
    """Of other layers than FP8 ones, loading is all that outcomes are about."""
    others = [group for group in inspection.groups if group.nvfp4 or group.experts or _has_blocks(group)]
    if inspection.platform is None or not others:
        return []
    note = "what multiplies experts, NVFP4 and block scales was not run: of these, the table is about loading"
    return paragraph(f"note: {note}", width)


def _has_blocks(group: GroupView) -> bool:
    return any(p.layout == "block" for p in group.partitions)


def _kernel_table(inspection: Inspection, width: int) -> list[Line]:
    """What multiplies the fused FP8 layers, for each range of versions and cards of which the same is true; nothing
    where no such layer is FP8."""
    if inspection.platform is None or not any(used.families for row in inspection.rows for used in row.kernels):
        return []
    profiles = inspection.shown_profiles
    lines = merged(inspection.rows, _loader, lambda row: _kernel_cells(row, profiles))
    rows = [
        [name, versions, cards, *cells]
        for name, versions, said in lines
        for cards, cells in said
        if set(cells) != {"-"}
    ]
    head = ["loader", "versions", "cards", *_states(profiles)]
    title = line("What multiplies these layers there:")
    return [line(), title, *table(rows, width, head=[head], labels=3)]


def _kernel_cells(row: LoaderRow, profiles: Sequence[str]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Cards, and what multiplies there before and after."""
    states = [(row.as_is, row.kernels), *((row.converted[p], row.kernels_converted[p]) for p in profiles)]

    def cells(number: int) -> tuple[str, ...]:
        return tuple(
            kernels[number].text if outcome and outcome.kind != "fails to load" else "-" for outcome, kernels in states
        )

    return by_cards((used.card, cells(number)) for number, used in enumerate(row.kernels))


def _loader(row: LoaderRow) -> Loader:
    return row.loader


def _cell(outcome: Outcome | None, several: bool) -> Cell:
    """The kind, and the partitions where the layer is the only one: ``garbled: k, v``."""
    if outcome is None:
        return "-"
    return told(outcome.kind) if several else worded(outcome.kind, outcome.partitions, by_layer=False)


def _with_factors(outcome: Outcome, *, by_layer: bool) -> list[str | Span]:
    """The same with what each partition is multiplied by, where that is all: ``garbled: q x0.15, k x0.15``."""
    factors = dict(outcome.factors)
    said = [f"{name} x{factors[name]:.3g}" if name in factors else name for name in outcome.partitions]
    return worded(outcome.kind, said, by_layer=by_layer)


def _verdict(
    inspection: Inspection, affected: Sequence[LoaderRow], advice: Advice, command: str | None, width: int
) -> list[Line]:
    if not affected and inspection.findings:
        return [line(Span("No known loader can serve this checkpoint right.", BAD))]
    if not inspection.groups and not affected:
        return paragraph("There is no such fused layer to judge. Nothing else was looked at.", width)
    if not affected:
        return [line(Span("No known loader is affected.", GOOD))]
    title = Span("Affected loaders:", BAD)
    if all(row.as_is.kind == "not known" for row in affected):
        title = Span("It is not known what these loaders make of the checkpoint:", LESS)
    lines = [line(title), *_affected_table(inspection, affected, width)]
    lines += _advice(inspection, affected, advice, command, width)
    return [*lines, *(each for found in advice.alternatives for each in paragraph(found.text, width))]


def _affected_table(inspection: Inspection, affected: Sequence[LoaderRow], width: int) -> list[Line]:
    several = len(_layers(inspection)) > 1

    def say(row: LoaderRow) -> list[Cell] | None:
        if row not in affected:
            return None
        detail = f" ({row.as_is.detail})" if row.as_is.detail else ""
        return [[*_with_factors(row.as_is, by_layer=several), detail]]

    lines = merged(inspection.rows, _loader, say)
    rows = [[f"{name} {versions}", *cells] for name, versions, cells in lines if cells is not None]
    return table(rows, width, indent=2)


def _advice(
    inspection: Inspection, affected: Sequence[LoaderRow], advice: Advice, command: str | None, width: int
) -> list[Line]:
    """The command on a line of its own, however long: a person copies it."""
    unserved = ", ".join(advice.unserved)
    if command is not None:
        served = f"all but {unserved}" if unserved else "all of these"
        title = f"Repaired for {served}, with the least change, by:"
        return [*paragraph(title, width), line("  ", Span(command, GOOD))]
    outcomes = [(row, outcome) for row in affected for outcome in row.converted.values() if outcome is not None]
    if not any(outcome.severity < row.as_is.severity for row, outcome in outcomes):
        return []
    none = f"No profile is exact in {unserved}." if unserved else "No one profile is exact in all of these."
    return paragraph(f"{none} Some help, see the table.", width)
