"""What a converted checkpoint should look like: each profile is one function from what there is to :class:`Changes`.

A profile decides which tensors change and what the config must say; it writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from rewrite.checkpoint import Checkpoint
from rewrite.dialects import Dialect, Layers, Other
from rewrite.dialects.compressed_tensors import kv_scale_name
from rewrite.errors import CheckpointError, Unsupported
from rewrite.groups import FP8_DTYPES, FusedGroup, Module, Selection, find_groups, single_module
from rewrite.header import TensorInfo
from rewrite.layouts import (
    Fill,
    check_scheme,
    dequantise,
    expand_to_channel,
    expand_to_partitions,
    layout_of,
    read_values,
)
from rewrite.manifest import GroupChange, ModuleChange, PartitionChange
from rewrite.shardplan import Lookup, NewTensor


@dataclass(frozen=True)
class Context:
    """A checkpoint and what its config says of it."""

    checkpoint: Checkpoint
    dialect: Dialect
    layers: Layers
    groups: tuple[FusedGroup, ...]


@dataclass(frozen=True)
class Changes:
    """What becomes of the tensors (None: dropped) and of the quantisation config (None: nothing)."""

    edits: dict[str, NewTensor | None] = field(default_factory=dict)
    groups: tuple[GroupChange, ...] = ()
    dialect: Dialect | None = None


Profile = Callable[[Context], Changes]


def context_of(checkpoint: Checkpoint, dialect: Dialect, selection: Selection) -> Context:
    """All that a profile looks at."""
    matrices = {
        name.removesuffix(".weight"): info.dtype in FP8_DTYPES
        for name, (_, info) in checkpoint.tensors.items()
        if name.endswith(".weight") and len(info.shape) == 2
    }
    layers = Layers(
        frozenset(name for name, quantised in matrices.items() if quantised),
        frozenset(name for name, quantised in matrices.items() if not quantised),
    )
    return Context(checkpoint, dialect, layers, find_groups(checkpoint, selection))


def exact(context: Context) -> Changes:
    """One scale for every row of the fused groups; nothing else changes."""
    affected = affected_groups(context)
    if not affected:
        return Changes()
    builder = _Builder(context)
    for group, modules in affected:
        builder.group(group.name, (builder.channel(module) for module in modules))
    names = {module.name for _, modules in affected for module in modules}
    targets = tuple(dict.fromkeys(group.layer.target for group, _ in affected))
    return builder.changes(context.dialect.housed(context.layers).with_channel_scales(targets, names, context.layers))


def portable(context: Context) -> Changes:
    """What the most software reads: one config group, channel scales everywhere, activations dynamic per token."""
    grouped = {module.name: group for group in context.groups for module in group.modules}
    modules = [_module_of(name, grouped, context.checkpoint) for name in sorted(context.layers.quantised)]
    layouts = {module.name: _layout(module) for module in modules}
    if "block" in layouts.values():
        raise Unsupported(
            "Block scales have no portable form",
            where=next(name for name, layout in layouts.items() if layout == "block"),
            expected="one scale for each layer, partition or row",
            hint="every known loader reads block scales right: no conversion is needed",
        )
    schemes = {name: context.dialect.scheme(name) for name in layouts}
    if all(layouts[name] == "channel" and s is not None and s.activations == "dynamic" for name, s in schemes.items()):
        return Changes()
    affected_groups(context)  # refuses groups that are quantised in part
    builder = _Builder(context)
    for module in modules:
        _check_scheme(module, context)
        if layouts[module.name] != "channel":
            builder.group(module.name, [builder.channel(module)])
        builder.drop(module.input_scale)
    fused_plain = _fused_plain(context)
    return builder.changes(context.dialect.housed(context.layers).portable(context.layers, fused_plain))


def partition(context: Context) -> Changes:
    """A vector of one scale per partition, ``[P]``, where several partitions share a module; the config stays.

    Not of layers that are stored fused (Phi-3): they lose nothing as they are, and no loader reads a vector there.
    """
    builder = _Builder(context)
    for group, modules in affected_groups(context):
        if len(group.modules) == 1:
            continue
        shared = [m for m in modules if len(m.partitions) > 1 and layout_of(m) == "tensor"]
        if shared:
            builder.group(group.name, (builder.vector(module) for module in shared))
    return builder.changes(context.dialect)


def bf16(context: Context) -> Changes:
    """The fused groups dequantised: what every loader reads, also where a group was quantised in part."""
    builder = _Builder(context)
    dtype = plain_dtype(context.checkpoint)
    names: list[str] = []
    fused: list[str] = []
    targets: dict[str, None] = {}
    for group in context.groups:
        quantised = [module for module in group.modules if module.quantised]
        if not quantised or any(_layout(module) == "block" for module in quantised):
            continue
        for module in quantised:
            if _layout(module) == "channel":
                raise Unsupported(
                    "A scale for every row is not dequantised",
                    where=group.name,
                    expected="one scale for each module or partition",
                    hint="convert the original checkpoint with --profile bf16",
                )
            _check_scheme(module, context)
            names.append(module.name)
        builder.group(group.name, [builder.plain(module, dtype) for module in quantised])
        fused.append(group.name)
        targets[group.layer.target] = None
    if not names:
        return Changes()
    return builder.changes(context.dialect.ignoring(list(targets), names, fused))


PROFILES: dict[str, Profile] = {"exact": exact, "portable": portable, "bf16": bf16, "partition": partition}


class _Builder:
    """Collects edits and what the manifest says of them."""

    def __init__(self, context: Context) -> None:
        self._checkpoint = context.checkpoint
        self._dialect = context.dialect
        self._edits: dict[str, NewTensor | None] = {}
        self._groups: list[GroupChange] = []

    def group(self, name: str, modules: Iterable[ModuleChange]) -> None:
        self._groups.append(GroupChange(name, tuple(modules)))

    def changes(self, dialect: Dialect) -> Changes:
        if not self._edits:
            return Changes()
        renamed = kv_scales(self._checkpoint) if dialect.name != self._dialect.name else {}
        return Changes({**self._edits, **renamed}, tuple(self._groups), dialect)

    def drop(self, info: TensorInfo | None) -> None:
        if info is not None:
            self._edits[info.name] = None

    def channel(self, module: Module) -> ModuleChange:
        """One scale for every row, ``[N, 1]``."""
        raw, values, dtype = self._read(module)
        fills = expand_to_channel(module.partitions, dtype, raw)
        return self._scale(module, (module.weight.shape[0], 1), fills, values)

    def vector(self, module: Module) -> ModuleChange:
        """One scale for every partition, ``[P]``."""
        raw, values, _ = self._read(module)
        return self._scale(module, (len(module.partitions),), expand_to_partitions(module.partitions, raw), values)

    def plain(self, module: Module, dtype: str) -> ModuleChange:
        """The weight in ``dtype``, its scales dropped."""
        _, values, _ = self._read(module)
        each = _each(values, module)
        columns = module.weight.shape[1]
        segments = tuple(
            Lookup(p.start * columns, p.rows * columns, dequantise(module.weight.dtype, scale, dtype))
            for p, scale in zip(module.partitions, each, strict=True)
        )
        self._edits[module.weight.name] = NewTensor(dtype, module.weight.shape, segments)
        self.drop(module.scale)
        self.drop(module.input_scale)
        return self._describe(module, module.weight.name, dtype, module.weight.shape, values)

    def _scale(
        self, module: Module, shape: tuple[int, ...], fills: tuple[Fill, ...], values: tuple[float, ...]
    ) -> ModuleChange:
        scale = _scale_of(module)
        self._edits[scale.name] = NewTensor(scale.dtype, shape, fills)
        return self._describe(module, scale.name, scale.dtype, shape, values)

    def _describe(
        self, module: Module, tensor: str, dtype: str, shape: tuple[int, ...], values: tuple[float, ...]
    ) -> ModuleChange:
        shard, old = self._checkpoint.tensors[tensor]
        partitions = tuple(
            PartitionChange(p.name, p.start, p.stop, value)
            for p, value in zip(module.partitions, _each(values, module), strict=True)
        )
        return ModuleChange(tensor, shard.name, old.dtype, old.shape, values, dtype, shape, partitions)

    def _read(self, module: Module) -> tuple[bytes, tuple[float, ...], str]:
        """Bytes, values and dtype of the weight scale. Refuses scales that are no positive numbers."""
        scale = _scale_of(module)
        raw = self._checkpoint.read_tensor(scale.name)
        if module.input_scale is not None:
            name = module.input_scale.name
            read_values(module.input_scale, self._checkpoint.read_tensor(name), self._checkpoint.tensors[name][0].name)
        return raw, read_values(scale, raw, self._checkpoint.tensors[scale.name][0].name), scale.dtype


def kv_scales(checkpoint: Checkpoint) -> dict[str, NewTensor]:
    """The scales of the KV cache as compressed-tensors has them: its names, ``[1]``. The value stays, to the bit."""
    edits = {}
    for old, (_, info) in checkpoint.tensors.items():
        new = kv_scale_name(old)
        if new is not None and new not in checkpoint.tensors and info.numel == 1:
            edits[old] = NewTensor(info.dtype, (1,), (Fill(checkpoint.read_tensor(old), 1),), new)
    return edits


def affected_groups(context: Context) -> list[tuple[FusedGroup, tuple[Module, ...]]]:
    """The groups whose partitions share a scale, or have a vector of them, with the modules that must change.

    Raises :class:`rewrite.errors.Refused` where these cannot be told with certainty.
    """
    affected = []
    for group in context.groups:
        modules = _implicit(group)
        for module in modules:
            _check_scheme(module, context)
        if modules:
            affected.append((group, modules))
    return affected


def _implicit(group: FusedGroup) -> tuple[Module, ...]:
    if len({module.quantised for module in group.modules}) > 1:
        raise Unsupported(
            "A fused group is quantised in part",
            where=group.name,
            expected="all of its modules in FP8, or none",
            found=", ".join(f"{m.name.rpartition('.')[2]}: {m.weight.dtype}" for m in group.modules),
            hint="no engine that fuses these modules can serve this: quantise again, or convert with --profile bf16",
        )
    if not group.modules[0].quantised or _is_one_partition(group):
        return ()
    layouts = {module.name: _layout(module) for module in group.modules}
    if all(layout in ("channel", "block") for layout in layouts.values()):
        return ()
    if any(layout == "block" for layout in layouts.values()):
        raise Unsupported("A fused group mixes block scales with others", where=group.name, found=layouts)
    return tuple(module for module in group.modules if layouts[module.name] != "channel")


def _is_one_partition(group: FusedGroup) -> bool:
    """A layer that is stored as loaders want it (Qwen3-Next's ``in_proj_qkvz``): it has one scale, not a shared one."""
    return sum(len(module.partitions) for module in group.modules) == 1


def _check_scheme(module: Module, context: Context) -> None:
    scheme = context.dialect.scheme(module.name)
    if isinstance(context.dialect, Other):
        context.dialect.housed(context.layers)  # refuses
    check_scheme(module, scheme)


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


def _scale_of(module: Module) -> TensorInfo:
    if module.scale is None:
        raise CheckpointError("An FP8 weight has no scale", where=module.name)
    return module.scale


def _each(values: tuple[float, ...], module: Module) -> tuple[float, ...]:
    """A value for each partition."""
    return values * len(module.partitions) if len(values) == 1 else values


def _module_of(name: str, grouped: dict[str, FusedGroup], checkpoint: Checkpoint) -> Module:
    if name in grouped:
        return next(module for module in grouped[name].modules if module.name == name)
    return single_module(name, checkpoint)


def plain_dtype(checkpoint: Checkpoint) -> str:
    """The dtype that the config gives the model; BF16 where it says nothing that a weight can be stored in."""
    config = checkpoint.config.value
    nested = config.get("text_config")
    places = (config, nested if isinstance(nested, dict) else {})
    named = (place.get(key) for place in places for key in ("dtype", "torch_dtype"))
    names = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
    return next((names[name] for name in named if isinstance(name, str) and name in names), "BF16")


def _fused_plain(context: Context) -> Collection[str]:
    """Patterns for unquantised layers under their fused name: SGLang looks ``in_proj_ba`` up, not its parts."""
    patterns = []
    for name in ("in_proj_a", "in_proj_b"):
        if any(module.endswith(f"linear_attn.{name}") for module in context.layers.plain):
            patterns.append(r"re:.*linear_attn\.in_proj_(a|b|ba)$")
    return tuple(dict.fromkeys(patterns))
