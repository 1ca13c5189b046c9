"""From a Checkpoint and a profile to a :class:`Plan`: everything that will be written, as data.

Pure but for reading the scales. A Plan round-trips through JSON, and writing a shard needs its
:class:`~rewrite.shardplan.ShardPlan` and the source file alone, so any executor can run it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rewrite.checkpoint import Checkpoint, FileId, JsonFile, Shard
from rewrite.dialects import Dialect, find_quantization, read_dialect
from rewrite.errors import CheckpointError, Unsupported, UsageError
from rewrite.groups import FusedGroup, Module, find_groups, find_lookalikes
from rewrite.header import TensorInfo, parse_header
from rewrite.jsontext import replace_value
from rewrite.layouts import check_scheme, expand_to_channel, layout_of, read_values
from rewrite.manifest import MANIFEST_NAME, GroupChange, Manifest, ManifestFile, ModuleChange, PartitionChange
from rewrite.shardplan import NewTensor, ShardPlan, plan_shard, touches

PROFILES = ("exact",)


@dataclass(frozen=True)
class FileCopy:
    """A file that comes along as it is."""

    name: str
    source: FileId

    @property
    def size(self) -> int:
        return self.source.size

    @property
    def shareable(self) -> int:
        """All of it: a file that does not change is cloned whole."""
        return self.source.size


@dataclass(frozen=True)
class TextFile:
    """A small file that is written anew: config or index. ``like`` names the source file whose mode it takes."""

    name: str
    like: str
    text: str

    @property
    def size(self) -> int:
        return len(self.text.encode())


@dataclass(frozen=True)
class Plan:
    """All that a conversion does. Nothing in it depends on where the output goes."""

    manifest: Manifest
    shards: tuple[ShardPlan, ...]
    copies: tuple[FileCopy, ...]
    texts: tuple[TextFile, ...]
    notes: tuple[str, ...]

    @property
    def jobs(self) -> tuple[ShardPlan | FileCopy, ...]:
        """The files that take time; each can be written on its own."""
        return (*self.shards, *self.copies)

    @property
    def size(self) -> int:
        """Bytes of the output, the manifest left out."""
        return sum(job.size for job in self.jobs) + sum(text.size for text in self.texts)

    @property
    def shareable(self) -> int:
        """Bytes of the output that need not be copied on a filesystem that can share them with the source."""
        return sum(job.shareable for job in self.jobs)

    @property
    def digest(self) -> str:
        """Same digest, same output from the same source files."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        return {
            "manifest": self.manifest.to_json(),
            "shards": [shard.to_json() for shard in self.shards],
            "copies": [{"name": c.name, "source": [c.source.size, c.source.mtime_ns]} for c in self.copies],
            "texts": [{"name": t.name, "like": t.like, "text": t.text} for t in self.texts],
            "notes": list(self.notes),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Plan:
        """The inverse of :meth:`to_json`. ``value`` is trusted: it is our own output."""
        return cls(
            manifest=Manifest.from_json(value["manifest"]),
            shards=tuple(ShardPlan.from_json(shard) for shard in value["shards"]),
            copies=tuple(FileCopy(c["name"], FileId(*c["source"])) for c in value["copies"]),
            texts=tuple(TextFile(**t) for t in value["texts"]),
            notes=tuple(value["notes"]),
        )


def make_plan(checkpoint: Checkpoint, profile: str = "exact") -> Plan:
    """Plan the conversion of ``checkpoint``.

    Raises :class:`rewrite.errors.Refused` for what cannot be converted with certainty, before anything is written.
    """
    if profile not in PROFILES:
        raise UsageError("Unknown profile", expected=" or ".join(PROFILES), found=profile)
    part = find_quantization(checkpoint.config.value)
    dialect = read_dialect(part)
    affected = [(group, modules) for group in find_groups(checkpoint) if (modules := _affected(group))]
    _refuse_lookalikes(checkpoint, dialect)
    if affected:
        dialect.check_convertible()
    for _, modules in affected:
        for module in modules:
            check_scheme(module, dialect.scheme(module.name))

    new_tensors: dict[str, NewTensor] = {}
    changes = tuple(_change_group(group, modules, checkpoint, new_tensors) for group, modules in affected)
    shards = tuple(plan_shard(shard, new_tensors) for shard in checkpoint.shards if touches(shard, new_tensors))
    texts: tuple[TextFile, ...] = ()
    if affected and part is not None:
        texts = (*_index_text(checkpoint, new_tensors), _config_text(checkpoint, part.path, dialect, affected))
    written = {shard.name for shard in shards} | {text.name for text in texts}
    if affected:
        written.add(MANIFEST_NAME)  # one that an earlier conversion left is out of date
    copies = tuple(FileCopy(name, file_id) for name, file_id in checkpoint.files.items() if name not in written)
    manifest = Manifest(profile, checkpoint.root.absolute().name, changes, _manifest_files(shards, copies, texts))
    return Plan(manifest, shards, copies, texts, tuple(_notes(checkpoint)))


def preview(checkpoint: Checkpoint, plan: Plan) -> Checkpoint:
    """The checkpoint as it would be after ``plan``: headers and config only, its new tensors cannot be read."""
    shards = {shard.name: shard for shard in checkpoint.shards}
    for new in plan.shards:
        shards[new.name] = Shard(new.name, parse_header(new.header[8:], new.name), FileId(new.size, 0))
    config = next((text for text in plan.texts if text.name == checkpoint.config.name), None)
    return replace(
        checkpoint,
        config=checkpoint.config if config is None else JsonFile(config.name, config.text, json.loads(config.text)),
        shards=tuple(shards.values()),
        tensors={info.name: (shard, info) for shard in shards.values() for info in shard.header.tensors},
    )


def _affected(group: FusedGroup) -> tuple[Module, ...]:
    """The modules of a group whose scales one value, or one vector, stands for several partitions."""
    if len({module.quantised for module in group.modules}) > 1:
        raise Unsupported(
            "A fused group is quantised in part",
            where=group.name,
            expected="all of its modules in FP8, or none",
            found=", ".join(f"{m.name.rpartition('.')[2]}: {m.weight.dtype}" for m in group.modules),
            hint="no engine that fuses these modules can serve this: quantise again with all of them, or none",
        )
    if not group.modules[0].quantised:
        return ()
    layouts = {module.name: _layout(module) for module in group.modules}
    if all(layout in ("channel", "block") for layout in layouts.values()):
        return ()
    if any(layout == "block" for layout in layouts.values()):
        raise Unsupported("A fused group mixes block scales with others", where=group.name, found=layouts)
    return tuple(module for module in group.modules if layouts[module.name] != "channel")


def _layout(module: Module) -> str:
    layout = layout_of(module)
    if layout is None and module.scale is None and module.block_scale is not None:
        return "block"
    if layout is None:
        raise CheckpointError(
            "An FP8 weight has no scale" if module.scale is None else "A weight scale has an unknown shape",
            where=f"{module.name}.weight_scale",
            expected=f"() or [1], [{len(module.partitions)}] or [{module.weight.shape[0]}, 1]",
            found=None if module.scale is None else list(module.scale.shape),
        )
    return layout


def _refuse_lookalikes(checkpoint: Checkpoint, dialect: Dialect) -> None:
    """A pipeline must not take an unknown model with the tell-tale names for one that needs nothing."""
    for name in find_lookalikes(checkpoint):
        scale = checkpoint.tensors.get(f"{name}.weight_scale")
        if scale is not None and scale[1].numel == 1:
            raise Unsupported(
                "An unknown architecture has modules that engines may fuse",
                where=f"{scale[0].name}: {name}",
                expected="a model_type that rewrite knows",
                found=f"model_type {checkpoint.config.value.get('model_type')!r}, quantised as {dialect.name}",
                hint="report the architecture, so that its fused groups can be added",
            )


def _change_group(
    group: FusedGroup, modules: Collection[Module], checkpoint: Checkpoint, new_tensors: dict[str, NewTensor]
) -> GroupChange:
    """Record the new scales of a group in ``new_tensors`` and describe the change."""
    changes = []
    for module in modules:
        scale = module.scale
        if scale is None:  # _affected has refused this
            raise CheckpointError("An FP8 weight has no scale", where=module.name)
        shard = checkpoint.tensors[scale.name][0].name
        raw = checkpoint.read_tensor(scale.name)
        values = read_values(scale, raw, shard)
        if module.input_scale is not None:
            home = checkpoint.tensors[module.input_scale.name][0].name
            read_values(module.input_scale, checkpoint.read_tensor(module.input_scale.name), home)
        shape = (module.weight.shape[0], 1)
        new_tensors[scale.name] = NewTensor(shape, expand_to_channel(module.partitions, scale.dtype, raw))
        each = values * len(module.partitions) if len(values) == 1 else values
        partitions = tuple(
            PartitionChange(p.name, p.start, p.stop, value) for p, value in zip(module.partitions, each, strict=True)
        )
        changes.append(ModuleChange(scale.name, shard, scale.dtype, scale.shape, values, shape, partitions))
    return GroupChange(group.name, tuple(changes))


def _index_text(checkpoint: Checkpoint, new_tensors: Mapping[str, NewTensor]) -> Iterator[TextFile]:
    """The index with its ``total_size`` brought up to date, if there is one to bring up to date."""
    index = checkpoint.index
    metadata = None if index is None else index.value.get("metadata")
    if index is None or not isinstance(metadata, dict) or "total_size" not in metadata:
        return
    grown = sum(new.nbytes - checkpoint.tensors[name][1].nbytes for name, new in new_tensors.items())
    total = sum(shard.header.data_bytes for shard in checkpoint.shards) + grown
    yield TextFile(index.name, index.name, replace_value(index.text, ("metadata", "total_size"), total))


def _config_text(
    checkpoint: Checkpoint,
    path: tuple[str, ...],
    dialect: Dialect,
    affected: Iterable[tuple[FusedGroup, Collection[Module]]],
) -> TextFile:
    """config.json with a config group for the converted modules of each kind of fused layer."""
    converted: dict[str, set[str]] = {}
    for group, modules in affected:
        converted.setdefault(group.layer.target, set()).update(module.name for module in modules)
    linears = {name.removesuffix(".weight") for name, (_, info) in checkpoint.tensors.items() if _is_linear(info)}
    for target, names in converted.items():
        dialect = dialect.with_channel_scales(target, names, linears - names)
    config = checkpoint.config
    return TextFile(config.name, config.name, replace_value(config.text, path, dialect.value))


def _is_linear(info: TensorInfo) -> bool:
    return info.name.endswith(".weight") and len(info.shape) == 2


def _manifest_files(
    shards: Iterable[ShardPlan], copies: Iterable[FileCopy], texts: Iterable[TextFile]
) -> tuple[ManifestFile, ...]:
    files = [ManifestFile(shard.name, shard.size, True) for shard in shards]
    files += [ManifestFile(text.name, text.size, True) for text in texts]
    files += [ManifestFile(copy.name, copy.size, False) for copy in copies]
    return tuple(sorted(files, key=lambda file: file.name))


def _notes(checkpoint: Checkpoint) -> Iterator[str]:
    shards = {shard.name for shard in checkpoint.shards}
    for name in checkpoint.files:
        if name.endswith(".safetensors") and name not in shards:
            yield f"{name} is not in the index, so no loader reads it: copied as it is"
