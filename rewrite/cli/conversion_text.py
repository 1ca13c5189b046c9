"""Plans and conversions as text for people. Pure: the command line prints what these return."""

from __future__ import annotations

import shlex
from collections.abc import Iterable

from rewrite.checkpoint.checkpoint import Checkpoint
from rewrite.cli.layout import Line, Span, line, paragraph, path
from rewrite.cli.outcomes import GOOD
from rewrite.cli.tables import table
from rewrite.planning.manifest import ByteCounts, GroupChange, Manifest, PartitionChange
from rewrite.planning.plan import Plan
from rewrite.planning.profiles import PROFILES
from rewrite.quantization.kv_cache import kv_cache_scales
from rewrite.wording import count, nbytes

_NOTHING = "Nothing to do: no fused group shares a scale."


def render_plan(plan: Plan, checkpoint: Checkpoint, width: int) -> list[Line]:
    """What a conversion would do: the groups with the scale of each partition, and what is written."""
    manifest = plan.manifest
    lines = paragraph(_headline(checkpoint), width)
    lines += [each for note in manifest.notes for each in paragraph(f"note: {note}", width)]
    if not manifest.changed:
        return [*lines, *paragraph(f"{_NOTHING} The output would equal the input.", width)]
    lines += [line(), *_group_table(manifest.groups, width), line()]
    size = f"{nbytes(plan.size)} ({nbytes(plan.shareable)} can be shared, not copied, where the filesystem can)"
    return [*lines, *paragraph(f"Would write {size}: {_what_changes(manifest)}.", width)]


def render_conversion(manifest: Manifest, out: str, seconds: float, width: int) -> list[Line]:
    """The closing lines of a conversion."""
    size = nbytes(sum(file.size for file in manifest.files))
    how = f"{seconds:.1f} s{_how(manifest.counts)}"
    if not manifest.changed:
        return paragraph([f"{_NOTHING} ", path(out), f" equals the input ({size}, {how})."], width)
    private = "A new model on the hub is private until you change that on its page."
    return [
        *paragraph([Span("Converted", GOOD), f": {_what_changes(manifest)}."], width),
        *paragraph([path(out), f": {size} in {how}."], width),
        *(paragraph(private, width) if out.startswith("hf://") else []),
    ]


def render_planned(plan: Plan, file: str, width: int) -> list[Line]:
    """That a plan was written, and what comes next."""
    size = f"{nbytes(plan.size)} in {count(len(plan.jobs), 'file')} that can be written in parts"
    what = _what_changes(plan.manifest) if plan.manifest.changed else "nothing to do, all files come along as they are"
    named = shlex.quote(file)  # a person copies these
    runs = f"`rewrite run {named} --part I/N` for each I from 0 to N - 1"
    return [
        *paragraph([path(file), f": {size}; {what}."], width),
        *paragraph(f"Next: {runs}, then `rewrite finish {named}`.", width),
    ]


def render_part(part: tuple[int, int], counts: ByteCounts, seconds: float, width: int) -> list[Line]:
    """The closing line of a part."""
    size = counts.shared + counts.copied + counts.written + counts.kept
    return paragraph(f"Part {part[0]}/{part[1]}: {nbytes(size)} in {seconds:.1f} s{_how(counts)}.", width)


def _how(counts: ByteCounts | None) -> str:
    """The ways that the bytes came, to go on a sentence."""
    if counts is None:
        return ""
    kept = f", {nbytes(counts.kept)} kept from earlier runs" if counts.kept else ""
    ways = f"{nbytes(counts.shared)} shared, {nbytes(counts.copied)} copied, {nbytes(counts.written)} written"
    sent = "what was sent was not counted" if counts.sent is None else f"{nbytes(counts.sent)} sent"
    network = f"; over the network: {nbytes(counts.read)} read, {sent}"
    return f"; {ways}{kept}{network if counts.read or counts.sent != 0 else ''}"


def _headline(checkpoint: Checkpoint) -> list[str | Span]:
    model = checkpoint.config.value.get("model_type", "unknown model type")
    shards, tensors = count(len(checkpoint.shards), "shard"), count(len(checkpoint.tensors), "tensor")
    return [path(str(checkpoint.storage)), f": {model}, {shards}, {tensors}, {nbytes(checkpoint.nbytes)}"]


def _group_table(groups: Iterable[GroupChange], width: int) -> list[Line]:
    """A row for each group, a column for each partition; a new heading where the partitions have other names."""
    tables: dict[tuple[str, ...], list[list[str]]] = {}
    for group in groups:
        partitions = [p for module in group.modules for p in module.partitions]
        if not partitions:
            continue  # its scales were explicit already
        names = tuple(p.name for p in partitions) if len(partitions) > 1 else ("",)
        tables.setdefault(names, []).append([group.name, *map(_scale, partitions)])
    lines: list[Line] = []
    for names, rows in tables.items():
        head = ["scale of each partition", *names]
        lines += [line(), *table(rows, width, head=[head], right=range(1, len(head)))]
    return lines[1:]


def _scale(partition: PartitionChange) -> str:
    return "-" if partition.scale is None else f"{partition.scale:.4g}"


def _what_changes(manifest: Manifest) -> str:
    repaired = count(len(manifest.scales), "NVFP4 layer") + " with one global scale"
    modules = sum(len(group.modules) for group in manifest.groups)
    shards = [file for file in manifest.files if file.name.endswith(".safetensors")]
    rewritten = sum(file.rewritten for file in shards)
    groups = count(len(manifest.groups), "fused group")
    what = PROFILES[manifest.profile].closing.format(
        modules=count(modules, "shared scale"), layers=count(modules, "layer"), groups=groups
    )
    kv_cache = sum(1 for _ in kv_cache_scales(manifest.dropped))
    if not modules:  # the scales were explicit already
        inputs = len(manifest.dropped) - kv_cache
        what = f"{count(inputs, 'input scale')} dropped, dynamic activations" if inputs else "no weight"
    if manifest.scales:
        what = f"{what}, {repaired}" if manifest.groups else repaired
    if kv_cache:
        what += f", {count(kv_cache, 'scale')} of the KV cache dropped"
    return f"{what}, {rewritten} of {count(len(shards), 'shard')} rewritten"
