"""Plans and reports as text for people. Pure: the command line prints what these return."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rewrite.checkpoint import Checkpoint
from rewrite.manifest import GroupChange, Manifest
from rewrite.plan import Plan


def render_plan(plan: Plan, checkpoint: Checkpoint) -> str:
    """What a conversion would do: the groups with the scale of each partition, and what is written."""
    manifest = plan.manifest
    lines = [_headline(checkpoint), *(f"note: {note}" for note in plan.notes)]
    if not manifest.changed:
        return "\n".join([*lines, "Nothing to do: no fused group shares a scale. The output would equal the input."])
    lines += ["", *_group_table(manifest.groups), ""]
    lines.append(f"Would write {_bytes(plan.size)}: {_what_changes(manifest)}.")
    return "\n".join(lines)


def render_conversion(manifest: Manifest, out: str, seconds: float) -> str:
    """The closing line of a conversion."""
    size = sum(file.size for file in manifest.files)
    if not manifest.changed:
        return (
            f"Nothing to do: no fused group shares a scale. {out} equals the input ({_bytes(size)}, {seconds:.1f} s)."
        )
    return f"Converted: {_what_changes(manifest)}.\n{out}: {_bytes(size)} in {seconds:.1f} s."


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
    return f"{checkpoint.root}: {model}, {shards}, {tensors}, {_bytes(checkpoint.nbytes)}"


def _group_table(groups: Iterable[GroupChange]) -> list[str]:
    rows = []
    names: list[str] = []
    for group in groups:
        partitions = [p for module in group.modules for p in module.partitions]
        names = names or [p.name for p in partitions]
        rows.append([group.name, *(f"{p.scale:.4g}" for p in partitions)])
    width = max(map(len, rows))
    header = ["scale of each partition", *names]
    return table([row + [""] * (width - len(row)) for row in (header, *rows)], right=range(1, width))


def _what_changes(manifest: Manifest) -> str:
    scales = sum(len(group.modules) for group in manifest.groups)
    shards = [file for file in manifest.files if file.name.endswith(".safetensors")]
    rewritten = sum(file.rewritten for file in shards)
    return (
        f"{_count(scales, 'shared scale')} in {_count(len(manifest.groups), 'fused group')} made explicit, "
        f"{rewritten} of {_count(len(shards), 'shard')} rewritten"
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _bytes(number: int) -> str:
    size, units = float(number), ["bytes", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{number} bytes" if units[0] == "bytes" else f"{size:.3g} {units[0]}"
