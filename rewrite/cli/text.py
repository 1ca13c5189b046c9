"""Plans and reports as text for people. Pure: the command line prints what these return."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import groupby

from rewrite.checkpoint.checkpoint import Checkpoint
from rewrite.checkpoint.storage import Storage
from rewrite.inspection.advice import Advice, Alternative
from rewrite.inspection.inspection import Inspection, LoaderRow
from rewrite.integrations.remote import RemoteStorage
from rewrite.loaders.kernels import cards_of
from rewrite.loaders.outcome import Outcome
from rewrite.loaders.views import GroupView, spread
from rewrite.planning.manifest import ByteCounts, GroupChange, Manifest, PartitionChange
from rewrite.planning.plan import Plan
from rewrite.planning.profiles import PROFILES
from rewrite.quantization.kv_cache import kv_cache_scales
from rewrite.verification.result import PartitionNumbers, Served, Verification, worst


def render_plan(plan: Plan, checkpoint: Checkpoint) -> str:
    """What a conversion would do: the groups with the scale of each partition, and what is written."""
    manifest = plan.manifest
    lines = [_headline(checkpoint), *(f"note: {note}" for note in manifest.notes)]
    if not manifest.changed:
        return "\n".join([*lines, "Nothing to do: no fused group shares a scale. The output would equal the input."])
    lines += ["", *_group_table(manifest.groups), ""]
    size = f"{_bytes(plan.size)} ({_bytes(plan.shareable)} can be shared, not copied, where the filesystem can)"
    lines.append(f"Would write {size}: {_what_changes(manifest)}.")
    return "\n".join(lines)


def render_conversion(manifest: Manifest, out: str, seconds: float) -> str:
    """The closing line of a conversion."""
    size = sum(file.size for file in manifest.files)
    if not manifest.changed:
        return (
            f"Nothing to do: no fused group shares a scale. {out} equals the input "
            f"({_bytes(size)}, {seconds:.1f} s{_how(manifest.counts)})."
        )
    private = (
        "\nA new model on the hub is private until you change that on its page." if out.startswith("hf://") else ""
    )
    done = f"{out}: {_bytes(size)} in {seconds:.1f} s{_how(manifest.counts)}."
    return f"Converted: {_what_changes(manifest)}.\n{done}{private}"


def render_planned(plan: Plan, path: str) -> str:
    """That a plan was written, and what comes next."""
    size = f"{_bytes(plan.size)} in {_count(len(plan.jobs), 'file')} that can be written in parts"
    what = _what_changes(plan.manifest) if plan.manifest.changed else "nothing to do, all files come along as they are"
    runs = f"`rewrite run {path} --part I/N` for each I from 0 to N - 1"
    return f"{path}: {size}; {what}.\nNext: {runs}, then `rewrite finish {path}`."


def render_part(part: tuple[int, int], counts: ByteCounts, seconds: float) -> str:
    """The closing line of a part."""
    size = counts.shared + counts.copied + counts.written + counts.kept
    return f"Part {part[0]}/{part[1]}: {_bytes(size)} in {seconds:.1f} s{_how(counts)}."


def _how(counts: ByteCounts | None) -> str:
    """The ways that the bytes came, to go on a sentence."""
    if counts is None:
        return ""
    kept = f", {_bytes(counts.kept)} kept from earlier runs" if counts.kept else ""
    ways = f"{_bytes(counts.shared)} shared, {_bytes(counts.copied)} copied, {_bytes(counts.written)} written"
    sent = "what was sent was not counted" if counts.sent is None else f"{_bytes(counts.sent)} sent"
    network = f"; over the network: {_bytes(counts.read)} read, {sent}"
    return f"; {ways}{kept}{network if counts.read or counts.sent != 0 else ''}"


def traffic_lines(storage: Storage, nbytes: int) -> list[str]:
    """How much was read over a network; nothing of a directory."""
    if not isinstance(storage, RemoteStorage):
        return []
    traffic = storage.traffic
    return [f"{_bytes(traffic.read)} of {_bytes(nbytes)} read, in {_count(traffic.requests, 'request')}"]


def render_inspection(inspection: Inspection, affected: Sequence[LoaderRow], advice: Advice) -> str:
    """What a checkpoint is, its fused groups, what is wrong with it, and what every known loader makes of it."""
    size = f"{_count(inspection.shards, 'shard')}, {_count(inspection.tensors, 'tensor')}, {_bytes(inspection.nbytes)}"
    lines = [inspection.path, f"{inspection.model_type}, {inspection.dialect}, {size}"]
    lines += [f"{_count(number, 'linear layer')}: {text}" for text, number in inspection.schemes.items()]
    lines += ["", *_groups(inspection)]
    if inspection.findings:
        lines += ["", "Wrong in the checkpoint:"]
        lines += table([[f"  {finding.what}", finding.where] for finding in inspection.findings])
    if inspection.groups:
        lines += ["", *_loader_table(inspection)]
    lines += [f"convert --profile {profile} refuses: {why}" for profile, why in inspection.refusals.items()]
    lines += _kernel_table(inspection)
    lines += ["", *_verdict(inspection, affected, advice)]
    return "\n".join(lines)


def _loader_table(inspection: Inspection) -> list[str]:
    """A row for each loader version range: the checkpoint as it is, and after convert with each profile."""
    profiles = _shown_profiles(inspection)
    title = ["loader", "versions", "as it is", *(f"--profile {profile}" for profile in profiles)]
    say = _kind if len(_layers(inspection)) > 1 else _outcome  # the names would make the table too wide
    rows = _by_versions(
        inspection.rows, lambda row: [say(outcome) for outcome in (row.as_is, *(row.converted[p] for p in profiles))]
    )
    command = "rewrite convert" + (" --groups all" if inspection.selection == "all" else "")
    notes = (PROFILES[profile].notes.get("static") for profile in profiles)
    static = any(group.static_activations and not group.nvfp4 for group in inspection.groups)
    said = [f"note: {p}: {note}" for p, note in zip(profiles, notes, strict=True) if note and static]
    head = f"What loaders make of the fused groups{_where(inspection)}, as they are and after `{command}`:"
    return [head, *table([title, *rows]), *said, *_others_note(inspection)]


def _shown_profiles(inspection: Inspection) -> list[str]:
    left_out = {*inspection.refusals, *(p for p in inspection.idle if PROFILES[p].promise.scale == "kept")}
    return [profile for profile in inspection.rows[0].converted if profile not in left_out]


def _where(inspection: Inspection) -> str:
    """The platform, with the cards that it stands for."""
    if inspection.platform is None:
        return ""
    cards, name = ", ".join(cards_of(inspection.platform)), inspection.platform.replace(",", ", ")
    return f" on {name}" + (f" ({cards})" if cards != name else "")


def _kernel_table(inspection: Inspection) -> list[str]:
    """What multiplies the fused FP8 layers, for each range of versions and cards of which the same is true; nothing
    where no such layer is FP8."""
    if inspection.platform is None or not any(used.families for row in inspection.rows for used in row.kernels):
        return []
    profiles = _shown_profiles(inspection)
    lines = [["loader", "versions", "cards", "as it is", *(f"--profile {profile}" for profile in profiles)]]
    for (name, said), run in groupby(inspection.rows, lambda row: (row.loader.name, _kernel_cells(row, profiles))):
        first, *rest = (row.loader for row in run)
        versions = (rest[-1] if rest else first).versions_from(first)
        lines += [[name, versions, *cells] for cells in said if set(cells[1:]) != {"-"}]
    return ["", "What multiplies these layers there:", *table(lines)]


def _others_note(inspection: Inspection) -> list[str]:
    """Of other layers than FP8 ones, loading is all that outcomes are about."""
    others = [group for group in inspection.groups if group.nvfp4 or group.experts or _has_blocks(group)]
    if inspection.platform is None or not others:
        return []
    return ["note: what multiplies experts, NVFP4 and block scales was not run: of these, the table is about loading"]


def _has_blocks(group: GroupView) -> bool:
    return any(p.layout == "block" for p in group.partitions)


def _kernel_cells(row: LoaderRow, profiles: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Cards, and what multiplies there before and after; cards of which the same is true as one."""
    cards: dict[tuple[str, ...], list[str]] = {}
    states = [(row.as_is, row.kernels), *((row.converted[p], row.kernels_converted[p]) for p in profiles)]
    for number, used in enumerate(row.kernels):
        cells = (
            kernels[number].text if outcome and outcome.kind != "fails to load" else "-" for outcome, kernels in states
        )
        cards.setdefault(tuple(cells), []).append(used.card)
    return tuple((", ".join(names), *cells) for cells, names in cards.items())


def render_verification(verification: Verification) -> str:
    """Verdicts with their problems, the worst partition of each kind, the loader table, one closing line."""
    lines = []
    for check, cells in zip(
        verification.checks,
        table([[check.name, check.verdict, check.summary] for check in verification.checks]),
        strict=True,
    ):
        lines += [cells, *(f"  {line}" for problem in check.problems for line in problem.splitlines())]
    if verification.numbers:
        lines += ["", *_numbers_table(worst(verification.numbers), "worst of all groups")]
    if verification.loaders:
        lines += ["", *table([["loader", "versions", "fused groups of OUT"], *_served(verification)])]
    return "\n".join([*lines, "", verdict_line(verification)])


def verdict_line(verification: Verification) -> str:
    """One sentence."""
    failed = [check.name for check in verification.checks if check.verdict == "FAILED"]
    if failed:
        return f"{verification.out} FAILED: {', '.join(failed)}."
    left_out = verification.not_checked
    return f"{verification.out} is verified." + (f" Not checked: {', '.join(left_out)}." if left_out else "")


_EXACT = 1e-12  # float64's own rounding of a product is no error of anybody's


def _numbers_table(numbers: Sequence[PartitionNumbers], title: str) -> list[str]:
    head = ["", "weights off by", "", "", "outputs off by", "", "", "bound"]
    names = [title, "before fix", "fixed, IN", "OUT", "before fix", "fixed, IN", "OUT", "used"]
    several = len({row.layer for row in numbers}) > 1
    labels = [f"{r.layer} {r.partition}" if several and r.layer != r.partition else r.partition for r in numbers]
    cells = [[label, *_number_cells(row)[2:]] for label, row in zip(labels, numbers, strict=True)]
    return table([head, names, *cells], right=range(1, len(names)))


def _number_cells(row: PartitionNumbers) -> list[str]:
    weights = (row.weights_before, row.weights_fixed, row.weights_out)
    errors = (*weights, row.outputs_before, row.outputs_fixed, row.outputs_out)
    used = "-" if row.bound_used is None else f"{row.bound_used:.2f}"
    return [row.group, row.partition, *("0" if error < _EXACT else f"{error:.3g}" for error in errors), used]


def _groups(inspection: Inspection) -> list[str]:
    """A table for each fused layer."""
    lines: list[str] = []
    for layer in _layers(inspection):
        lines += ["", *_groups_of_layer([group for group in inspection.groups if group.layer == layer])]
    if lines:
        return lines[1:]
    if inspection.selection == "all":
        return ["No fused groups."]
    return ["No in_proj_qkvz groups, which are what loaders get wrong. (--groups all: every fused layer)"]


def _layers(inspection: Inspection) -> tuple[str, ...]:
    """The fused layers of which some group is quantized."""
    quantized = (group for group in inspection.groups if any(p.layout != "none" for p in group.partitions))
    return tuple(dict.fromkeys(group.layer for group in quantized))


def _groups_of_layer(groups: Sequence[GroupView]) -> list[str]:
    first = groups[0]
    start, rows = 0, []
    for partition in first.partitions:
        rows.append(f"{partition.name} {start}:{start + partition.rows}")
        start += partition.rows
    header = ["fused group (rows " + ", ".join(rows) + ")", "scales", *(p.name for p in first.partitions), "max/min"]
    body = []
    for group in groups:
        layouts = ", ".join(dict.fromkeys(p.layout for p in group.partitions))
        scales = ["-" if p.scale is None else f"{p.scale:.4g}" for p in group.partitions]
        ratio = spread(group)
        name = f"{group.name} (most apart: {group.furthest.rpartition('.')[2]})" if group.furthest else group.name
        body.append([name, layouts, *scales, "-" if ratio is None else f"{ratio:.2f}"])
    return table([header, *body], right=range(2, len(header)))


def _served(verification: Verification) -> list[list[str]]:
    """A row for each loader: what it makes of OUT."""
    layers = {name.partition(".")[0] for row in verification.loaders for name in row.partitions}
    layers |= {row.layer for row in verification.numbers}

    def say(row: Served) -> str:
        return _worded(row.after, row.partitions, by_layer=len(layers) > 1)

    lines = []
    for (name, cell), run in groupby(verification.loaders, lambda row: (row.loader, say(row))):
        rows = list(run)
        lines.append([name, _joined_versions(rows[0].versions, rows[-1].versions), cell])
    return lines


def _joined_versions(first: str, last: str) -> str:
    """``0.17.0 to 0.19.1`` and ``0.20.0+`` are ``0.17.0+``."""
    if first == last:
        return first
    begin = first.removesuffix("+").partition(" to ")[0]
    return f"{begin}+" if last.endswith("+") else f"{begin} to {last.rpartition(' to ')[2]}"


def _by_versions(rows: Iterable[LoaderRow], say: Callable[[LoaderRow], list[str] | None]) -> list[list[str]]:
    """Name, versions and what ``say`` says of each row, neighboring version ranges of which it says the same as one.
    None leaves a row out."""
    said = groupby(rows, lambda row: (row.loader.name, say(row)))
    lines = []
    for (name, cells), run in said:
        first, *rest = (row.loader for row in run)
        if cells is not None:
            lines.append([name, (rest[-1] if rest else first).versions_from(first), *cells])
    return lines


def _wording(inspection: Inspection) -> Callable[[Outcome], str]:
    """How to say an outcome: with the layers' names where there are several."""
    return partial(_with_factors, by_layer=len(_layers(inspection)) > 1)


def _kind(outcome: Outcome | None) -> str:
    return "-" if outcome is None else outcome.kind


def _outcome(outcome: Outcome | None) -> str:
    """The kind, and the partitions of the one layer that there is: ``garbled: k, v``."""
    return "-" if outcome is None else _worded(outcome.kind, outcome.partitions, by_layer=False)


def _outcome_by_layer(outcome: Outcome) -> str:
    """The kind, and the partitions of each layer: ``loses precision: in_proj_qkvz z, qkv_proj k v``."""
    return _worded(outcome.kind, outcome.partitions, by_layer=True)


def _with_factors(outcome: Outcome, *, by_layer: bool) -> str:
    """The same with what each partition is multiplied by, where that is all: ``garbled: q x0.15, k x0.15``."""
    factors = dict(outcome.factors)
    said = [f"{name} x{factors[name]:.3g}" if name in factors else name for name in outcome.partitions]
    return _worded(outcome.kind, said, by_layer=by_layer)


def _worded(kind: str, partitions: Sequence[str], *, by_layer: bool) -> str:
    if not partitions:
        return kind
    if not by_layer:
        return f"{kind}: {', '.join(name.partition('.')[2] for name in partitions)}"
    hurt: dict[str, list[str]] = {}
    for layer, _, name in (partition.partition(".") for partition in partitions):
        hurt.setdefault(layer, []).append(name)
    return f"{kind}: {', '.join(f'{layer} {chr(32).join(names)}' for layer, names in hurt.items())}"


def _verdict(inspection: Inspection, affected: Sequence[LoaderRow], advice: Advice) -> list[str]:
    if not affected and inspection.findings:
        return ["No known loader can serve this checkpoint right."]
    if not inspection.groups and not affected:
        return ["There is no such fused layer to judge. Nothing else was looked at."]
    if not affected:
        return ["No known loader is affected."]
    say = _wording(inspection)
    lines = _by_versions(inspection.rows, lambda row: [say(row.as_is), row.as_is.detail] if row in affected else None)
    rows = [[f"  {name} {versions}", *cells] for name, versions, *cells in lines]
    outcomes = [(row, outcome) for row in affected for outcome in row.converted.values() if outcome is not None]
    helps = any(outcome.severity < row.as_is.severity for row, outcome in outcomes)
    title = "Affected loaders:"
    if all(row.as_is.kind == "not known" for row in affected):
        title = "It is not known what these loaders make of the checkpoint:"
    said = _advice(advice, inspection) if helps else []
    return [title, *table(rows), *said, *map(_alternative, advice.alternatives)]


def _alternative(found: Alternative) -> str:
    names = dict.fromkeys(name.rpartition(".")[2] for name in found.partitions)
    said = found.kind if found.kind == "exact" else f"{found.kind}: {', '.join(names)}, {found.detail}"
    return f"Without a conversion: {found.loader} {found.versions} ({said})."


def _advice(advice: Advice, inspection: Inspection) -> list[str]:
    command = "rewrite convert" + (" --groups all" if inspection.selection == "all" else "")
    unserved = ", ".join(advice.unserved)
    if advice.profile is None:
        some = f"No profile is exact in {unserved}." if unserved else "No one profile is exact in all of these."
        return [f"`{command}` helps some, see the table. {some}"]
    served = f"all but {unserved}" if unserved else "all of these"
    return [f"`{command} --profile {advice.profile}` helps: with the least change, {served} serve it exactly."]


def table(rows: Sequence[Sequence[str]], *, right: Iterable[int] = ()) -> list[str]:
    """Aligned columns, two spaces apart; the columns named in ``right`` are flush right."""
    flush_right = set(right)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i in flush_right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _headline(checkpoint: Checkpoint) -> str:
    model = checkpoint.config.value.get("model_type", "unknown model type")
    shards, tensors = _count(len(checkpoint.shards), "shard"), _count(len(checkpoint.tensors), "tensor")
    return f"{checkpoint.storage}: {model}, {shards}, {tensors}, {_bytes(checkpoint.nbytes)}"


def _group_table(groups: Iterable[GroupChange]) -> list[str]:
    """A line for each group, a column for each partition; a new heading where the partitions have other names."""
    tables: dict[tuple[str, ...], list[list[str]]] = {}
    for group in groups:
        partitions = [p for module in group.modules for p in module.partitions]
        if not partitions:
            continue  # its scales were explicit already
        names = tuple(p.name for p in partitions) if len(partitions) > 1 else ("",)
        tables.setdefault(names, []).append([group.name, *map(_scale, partitions)])
    lines = []
    for names, rows in tables.items():
        lines += ["", *table([["scale of each partition", *names], *rows], right=range(1, len(names) + 1))]
    return lines[1:]


def _scale(partition: PartitionChange) -> str:
    return "-" if partition.scale is None else f"{partition.scale:.4g}"


def _what_changes(manifest: Manifest) -> str:
    repaired = _count(len(manifest.scales), "NVFP4 layer") + " with one global scale"
    modules = sum(len(group.modules) for group in manifest.groups)
    shards = [file for file in manifest.files if file.name.endswith(".safetensors")]
    rewritten = sum(file.rewritten for file in shards)
    groups = _count(len(manifest.groups), "fused group")
    what = PROFILES[manifest.profile].closing.format(
        modules=_count(modules, "shared scale"), layers=_count(modules, "layer"), groups=groups
    )
    kv_cache = sum(1 for _ in kv_cache_scales(manifest.dropped))
    if not modules:  # the scales were explicit already
        inputs = len(manifest.dropped) - kv_cache
        what = f"{_count(inputs, 'input scale')} dropped, dynamic activations" if inputs else "no weight"
    if manifest.scales:
        what = f"{what}, {repaired}" if manifest.groups else repaired
    if kv_cache:
        what += f", {_count(kv_cache, 'scale')} of the KV cache dropped"
    return f"{what}, {rewritten} of {_count(len(shards), 'shard')} rewritten"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _bytes(number: int) -> str:
    size, units = float(number), ["bytes", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{number} bytes" if units[0] == "bytes" else f"{size:.3g} {units[0]}"
