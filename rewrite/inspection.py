"""Checkpoint → :class:`Inspection`: what a checkpoint is, what is wrong with it, what every known loader makes of it.

Reads headers, config and scales; weights only for ``weights=True``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from rewrite.checkpoint import Checkpoint
from rewrite.dialects import read_dialect
from rewrite.errors import Refused
from rewrite.groups import FP8_DTYPES, PLAIN_DTYPES, FusedGroup, Module, Selection, find_groups, find_lookalikes
from rewrite.header import Header, TensorInfo
from rewrite.layouts import decode, layout_of
from rewrite.loaders import LOADERS, CheckpointView, GroupView, Loader, Outcome, PartitionView
from rewrite.plan import make_plan, preview
from rewrite.profiles import PROFILES, plain_dtype

_WEIGHTS = ("weight", "weight_packed")
_CHUNK = 8 << 20


@dataclass(frozen=True)
class Finding:
    """Something that no loader survives, or that only one reader of many gets right."""

    what: str
    where: str


@dataclass(frozen=True)
class LoaderRow:
    """What one loader version range makes of the checkpoint as it is and after ``convert`` with each profile."""

    loader: Loader
    as_is: Outcome
    converted: dict[str, Outcome | None]  # None: convert refuses this checkpoint with that profile


@dataclass(frozen=True)
class Inspection:
    """Everything that ``rewrite inspect`` says. ``refusals`` has the reason for each profile that cannot convert it."""

    path: str
    selection: Selection
    model_type: str
    dialect: str
    shards: int
    tensors: int
    nbytes: int
    schemes: dict[str, int]  # wording of a scheme → number of linear layers
    groups: tuple[GroupView, ...]
    findings: tuple[Finding, ...]
    rows: tuple[LoaderRow, ...]
    refusals: dict[str, str]

    def hurt(self, loaders: Iterable[Loader] = LOADERS) -> tuple[LoaderRow, ...]:
        """The rows of ``loaders`` that do not serve the checkpoint exactly as it is."""
        chosen = set(loaders)
        return tuple(row for row in self.rows if row.loader in chosen and row.as_is.kind != "exact")

    def to_json(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "selection": self.selection,
            "model_type": self.model_type,
            "dialect": self.dialect,
            "shards": self.shards,
            "tensors": self.tensors,
            "bytes": self.nbytes,
            "schemes": self.schemes,
            "groups": [{**asdict(group), "spread": spread(group)} for group in self.groups],
            "findings": [asdict(finding) for finding in self.findings],
            "loaders": [_row_to_json(row) for row in self.rows],
            "refusals": self.refusals,
        }


def inspect_open(checkpoint: Checkpoint, selection: Selection = "qkvz", *, weights: bool = False) -> Inspection:
    """Inspect an open checkpoint. ``weights`` also reads every FP8 weight and looks for NaN codes.

    Raises :class:`Refused` where the fused groups do not fit the config.
    """
    groups = find_groups(checkpoint, selection)
    view = _view_checkpoint(checkpoint, groups)
    converted, refusals = _after_convert(checkpoint, selection)
    rows = tuple(
        LoaderRow(
            loader,
            loader.predict(view),
            {profile: None if after is None else loader.predict(after) for profile, after in converted.items()},
        )
        for loader in LOADERS
    )
    findings = [*_find_lookalikes(checkpoint), *_find_mixed(groups), *_find_orphans(checkpoint)]
    findings += _find_bad_values(checkpoint)
    if weights:
        findings += _find_nan_codes(checkpoint)
    return Inspection(
        path=str(checkpoint.root),
        selection=selection,
        model_type=str(checkpoint.config.value.get("model_type", "unknown")),
        dialect=_dialect_name(checkpoint),
        shards=len(checkpoint.shards),
        tensors=len(checkpoint.tensors),
        nbytes=checkpoint.nbytes,
        schemes=_count_schemes(checkpoint),
        groups=view.groups,
        findings=tuple(findings),
        rows=rows,
        refusals=refusals,
    )


def view_group(group: FusedGroup, checkpoint: Checkpoint) -> GroupView:
    """A fused group as loaders see it. Reads scales of one value a module or partition, no others."""
    partitions = tuple(p for module in group.modules for p in _view_partitions(module, checkpoint))
    dialect = read_dialect(checkpoint)
    scheme = dialect.scheme(group.modules[0].name)
    # A config that says nothing of it: loaders go by the tensor.
    static = scheme.activations == "static" if scheme else any(m.input_scale for m in group.modules)
    return GroupView(group.name, group.layer.name, partitions, group.modules[0].weight.shape[1], static)


def spread(group: GroupView) -> float | None:
    """The largest scale over the smallest: how far apart the partitions are. None where rows have their own scales."""
    scales = [p.scale for p in group.partitions if p.scale]
    return max(scales) / min(scales) if len(scales) == len(group.partitions) else None


def _view_partitions(module: Module, checkpoint: Checkpoint) -> Iterator[PartitionView]:
    layout = "block" if module.scale is None and module.block_scale else layout_of(module)
    scales: tuple[float | None, ...] = (None,) * len(module.partitions)
    if module.scale is not None and layout in ("tensor", "partition"):
        values = decode(module.scale.dtype, checkpoint.read_tensor(module.scale.name), module.scale.name)
        scales = values if layout == "partition" else values * len(module.partitions)
    for partition, scale in zip(module.partitions, scales, strict=True):
        seen = (layout or "unknown") if module.quantised else "none"
        dtype = module.scale.dtype if module.scale else "F32"
        yield PartitionView(partition.name, module.name, partition.rows, seen, scale, dtype)


def _view_checkpoint(checkpoint: Checkpoint, groups: Iterable[FusedGroup]) -> CheckpointView:
    return CheckpointView(
        model_type=str(checkpoint.config.value.get("model_type")),
        dialect=_dialect_name(checkpoint),
        dtype=plain_dtype(checkpoint),
        fp8_with_scales=any(
            info.dtype in FP8_DTYPES and f"{name}_scale" in checkpoint.tensors
            for name, (_, info) in checkpoint.tensors.items()
        ),
        ignore_survives_renaming=_ignore_survives_renaming(checkpoint),
        groups=tuple(view_group(group, checkpoint) for group in groups if _is_predictable(group)),
    )


def _is_predictable(group: FusedGroup) -> bool:
    """FP8 or not quantised: nothing is known of what loaders make of other formats, such as NVFP4's packed bytes."""
    return all(module.quantised or module.weight.dtype in PLAIN_DTYPES for module in group.modules)


def _ignore_survives_renaming(checkpoint: Checkpoint) -> bool:
    """Whether the config leaves ``in_proj_b`` alone under the name that SGLang 0.5.9 looks it up by."""
    dialect = read_dialect(checkpoint)
    for name in checkpoint.tensors:
        module = name.removesuffix(".weight")
        if module.endswith("linear_attn.in_proj_b") and dialect.scheme(module) is None:
            renamed = module.replace("model.language_model.", "language_model.model.")
            return dialect.scheme(renamed) is None
    return True


def _after_convert(
    checkpoint: Checkpoint, selection: Selection
) -> tuple[dict[str, CheckpointView | None], dict[str, str]]:
    """The checkpoint as loaders would see them after ``convert`` with each profile, and why some profiles refuse."""
    views: dict[str, CheckpointView | None] = {}
    refusals: dict[str, str] = {}
    checkpoint = _essence(checkpoint, find_groups(checkpoint, selection))
    for profile in PROFILES:
        try:
            after = preview(checkpoint, make_plan(checkpoint, profile, selection))
        except Refused as refusal:
            views[profile], refusals[profile] = None, refusal.what
        else:
            views[profile] = _view_checkpoint(after, find_groups(after, selection))
    return views, refusals


def _essence(checkpoint: Checkpoint, groups: Iterable[FusedGroup]) -> Checkpoint:
    """The checkpoint as if it held the fused groups and what stands beside them only: planning it whole for every
    profile takes seconds where there are 100,000 tensors, most of them experts."""
    modules = (*(group.name for group in groups), *find_lookalikes(checkpoint))  # convert refuses the latter
    parents = {module.rpartition(".")[0] for module in modules}

    def kept(info: TensorInfo) -> bool:
        return info.name.rsplit(".", 2)[0] in parents

    shards = {s.name: replace(s, header=_restricted(s.header, kept)) for s in checkpoint.shards}
    tensors = {name: (shards[shard.name], info) for name, (shard, info) in checkpoint.tensors.items() if kept(info)}
    return replace(checkpoint, index=None, shards=tuple(shards.values()), tensors=tensors)


def _restricted(header: Header, kept: Callable[[TensorInfo], bool]) -> Header:
    return replace(header, tensors=tuple(info for info in header.tensors if kept(info)))


def _dialect_name(checkpoint: Checkpoint) -> str:
    return read_dialect(checkpoint).name


def _count_schemes(checkpoint: Checkpoint) -> dict[str, int]:
    dialect = read_dialect(checkpoint)
    counts: Counter[str] = Counter()
    for name, (_, info) in checkpoint.tensors.items():
        if name.endswith(".weight") and len(info.shape) == 2 and info.dtype not in PLAIN_DTYPES:
            scheme = dialect.scheme(name.removesuffix(".weight"))
            counts[scheme.text if scheme else f"{info.dtype} weights, scheme unknown"] += 1
    return dict(counts)


def _find_lookalikes(checkpoint: Checkpoint) -> Iterator[Finding]:
    names = find_lookalikes(checkpoint)
    if names:
        model = checkpoint.config.value.get("model_type")
        yield Finding(f"unknown architecture {model!r} with modules that engines may fuse", names[0])


def _find_mixed(groups: Iterable[FusedGroup]) -> Iterator[Finding]:
    for group in groups:
        if len({module.quantised for module in group.modules}) > 1:
            yield Finding("quantised in part: no loader that fuses these modules can serve them", group.name)


def _find_orphans(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Scales without their weight, FP8 weights without their scale."""
    for name, (shard, info) in checkpoint.tensors.items():
        module, _, kind = name.rpartition(".")
        if kind in ("weight_scale", "weight_scale_inv", "input_scale"):
            if not any(f"{module}.{weight}" in checkpoint.tensors for weight in _WEIGHTS):
                yield Finding("a scale without its weight", f"{shard.name}: {name}")
        elif kind == "weight" and info.dtype in FP8_DTYPES and not _has_scale(module, checkpoint):
            yield Finding("an FP8 weight without its scale", f"{shard.name}: {name}")


def _has_scale(module: str, checkpoint: Checkpoint) -> bool:
    return f"{module}.weight_scale" in checkpoint.tensors or f"{module}.weight_scale_inv" in checkpoint.tensors


def _find_bad_values(checkpoint: Checkpoint) -> Iterator[Finding]:
    scales = (info for _, info in checkpoint.tensors.values() if _is_scale(info))
    for shard, info, raw in checkpoint.read_tensors(scales):
        bad = [value for value in decode(info.dtype, raw, info.name) if not (math.isfinite(value) and value > 0)]
        if bad:
            many = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
            yield Finding(f"a scale of {bad[0]}{many}", f"{shard.name}: {info.name}")


def _is_scale(info: TensorInfo) -> bool:
    return info.name.endswith(("_scale", "_scale_inv")) and info.dtype in PLAIN_DTYPES


def _find_nan_codes(checkpoint: Checkpoint) -> Iterator[Finding]:
    """NaN in E4M3 is 0x7f and 0xff: everything it touches becomes NaN (OCP OFP8 specification, table 1)."""
    for shard in checkpoint.shards:
        with (checkpoint.root / shard.name).open("rb") as file:
            for info in shard.header.tensors:
                if info.dtype != "F8_E4M3":
                    continue
                file.seek(shard.header.size + info.start)
                nans, left = 0, info.nbytes
                while left and (chunk := file.read(min(left, _CHUNK))):
                    nans += chunk.count(b"\x7f") + chunk.count(b"\xff")
                    left -= len(chunk)
                if nans:
                    yield Finding(f"{nans:,} FP8 NaN codes among {info.nbytes:,} weights", f"{shard.name}: {info.name}")


def _row_to_json(row: LoaderRow) -> dict[str, Any]:
    return {
        "loader": row.loader.name,
        "versions": row.loader.versions,
        "source": row.loader.source,
        "as_is": asdict(row.as_is),
        "converted": {profile: None if o is None else asdict(o) for profile, o in row.converted.items()},
    }
