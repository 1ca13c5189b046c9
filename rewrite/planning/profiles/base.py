"""What profiles share: the object, the changes that it plans, and how the changes of a module are collected."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from rewrite.checkpoint.header import TensorInfo
from rewrite.errors import CheckpointError, Unsupported
from rewrite.ledger.fault import Code
from rewrite.planning.manifest import GroupChange, ModuleChange, PartitionChange
from rewrite.planning.nvfp4 import Method, Repair
from rewrite.planning.segments import Copy, Fill, Lookup
from rewrite.planning.shards import Edits, NewTensor
from rewrite.promise import Promise
from rewrite.quantization.dialects.base import Dialect
from rewrite.quantization.dialects.compressed_tensors import kv_scale_name
from rewrite.quantization.dialects.other import Other
from rewrite.quantization.dtypes import dequantize, fits
from rewrite.quantization.groups import FusedGroup, Module, Selection
from rewrite.quantization.model import Model
from rewrite.quantization.scales import known_layout, read_values, repeated_by_row
from rewrite.quantization.scheme import Activations, ScaleLayout


class PlannedScheme(NamedTuple):
    """The FP8 scheme that the config must give a converted module."""

    layout: ScaleLayout
    activations: Activations


@dataclass(frozen=True)
class Changes:
    """What becomes of the tensors (None: dropped), of the modules (None: plain) and of the config (None: nothing)."""

    edits: Edits = field(default_factory=dict)
    groups: tuple[GroupChange, ...] = ()
    schemes: Mapping[str, PlannedScheme | None] = field(default_factory=dict)
    dialect: Dialect | None = None
    repair: Repair = field(default_factory=Repair)  # of NVFP4 layers; its edits are among ``edits``
    mended: tuple[Code, ...] = ()  # the faults of the config that are mended, by their codes

    @property
    def any(self) -> bool:
        """Whether anything changes, tensors or config."""
        return bool(self.edits) or self.dialect is not None

    def with_repair(self, repair: Repair) -> Changes:
        """These changes, and those of NVFP4 layers."""
        return replace(self, edits={**self.edits, **repair.edits}, repair=repair)


@dataclass(frozen=True)
class Profile:
    """A layout of the output, with all that is special about it.

    ``plan`` decides which tensors change and what the config must say; it writes nothing. ``closing`` is the closing
    line of a conversion, ``notes`` what those who serve the output must know, by the activations of converted layers.
    """

    name: str
    summary: str
    plan: Callable[[Model, Selection], Changes]
    promise: Promise
    closing: str  # of {modules} and {groups}
    notes: Mapping[Activations, str] = field(default_factory=dict)
    nvfp4: Method | None = None  # how fused NVFP4 layers with several global scales get one; None: they stay


class Builder:
    """Collects edits and what the manifest says of them.

    Reads the weight scales of ``modules``, all at once, and the input scales of those that ``keep_inputs``.
    """

    def __init__(self, model: Model, modules: Iterable[Module], *, keep_inputs: bool = False) -> None:
        self._model = model
        self._edits: dict[str, NewTensor | None] = {}
        self._schemes: dict[str, PlannedScheme | None] = {}
        self._groups: list[GroupChange] = []
        stored = ((module.scale, module.input_scale if keep_inputs else None) for module in modules)
        scales = (info for pair in stored for info in pair if info is not None)
        self._raw = {info.name: raw for info, raw in model.checkpoint.read_tensors(scales)}

    def group(self, name: str, modules: Iterable[ModuleChange]) -> None:
        """A group whose modules change."""
        self._groups.append(GroupChange(name, tuple(modules)))

    def scheme(self, module: str, layout: ScaleLayout, *, per_token: bool = False) -> None:
        """The scheme that the config must give the module. With ``per_token`` its activations, where they are quantized
        at all, become dynamic; else they stay."""
        old = self._model.kind_of[module].first.scheme
        activations = old.activations if old else "none"
        self._schemes[module] = PlannedScheme(layout, "dynamic" if per_token and activations != "none" else activations)

    def changes(self, dialect: Dialect) -> Changes:
        """All that was collected, with the config that goes with it."""
        if not self._edits:
            return Changes()
        restated = dialect.name != self._model.dialect.name
        others = {**kv_scales(self._model), **row_scales(self._model)} if restated else {}
        return Changes({**others, **self._edits}, tuple(self._groups), self._schemes, dialect)

    def drop(self, info: TensorInfo | None) -> None:
        """The tensor goes."""
        if info is not None:
            self._edits[info.name] = None

    def keep_input_scale(self, module: Module) -> None:
        """The input scale stays beside the new weight scale. Refuses one that is not a positive number."""
        if module.input_scale is not None:
            read_values(module.input_scale, self._raw[module.input_scale.name])

    def channel(self, module: Module) -> ModuleChange:
        """One scale for every row, ``[N, 1]``."""
        raw, values, dtype = self._read(module)
        fills = tuple(Fill(*repeated) for repeated in repeated_by_row(module.partitions, dtype, raw))
        return self._scale(module, (module.weight.shape[0], 1), fills, values)

    def reshape(self, module: Module) -> ModuleChange:
        """A scale for every row as ``[N, 1]``, where it was ``[N]``: the same bytes."""
        scale = _scale_of(module)
        new = _reshaped(scale)
        self._edits[scale.name] = new
        return ModuleChange(scale.name, scale.shard, scale.dtype, scale.shape, (), scale.dtype, new.shape, ())

    def vector(self, module: Module) -> ModuleChange:
        """One scale for every partition, ``[P]``, from one for all of them."""
        raw, values, _ = self._read(module)
        count = len(module.partitions)
        return self._scale(module, (count,), (Fill(raw, count),), values)

    def plain(self, module: Module, dtype: str) -> ModuleChange:
        """The weight in ``dtype``, its scales dropped."""
        _, values, _ = self._read(module)
        refuse_overflow(module.name, values, dtype)
        columns = module.weight.shape[1]
        segments = tuple(
            Lookup(p.start * columns, p.rows * columns, dequantize(module.weight.dtype, scale, dtype))
            for p, scale in zip(module.partitions, _each(values, module), strict=True)
        )
        self._edits[module.weight.name] = NewTensor(dtype, module.weight.shape, segments)
        self.drop(module.scale)
        self.drop(module.input_scale)
        self._schemes[module.name] = None
        return _describe(module, module.weight, dtype, module.weight.shape, values)

    def _scale(
        self, module: Module, shape: tuple[int, ...], fills: tuple[Fill, ...], values: tuple[float, ...]
    ) -> ModuleChange:
        scale = _scale_of(module)
        self._edits[scale.name] = NewTensor(scale.dtype, shape, fills)
        return _describe(module, scale, scale.dtype, shape, values)

    def _read(self, module: Module) -> tuple[bytes, tuple[float, ...], str]:
        """Bytes, values and dtype of the weight scale. Refuses scales that are not positive numbers."""
        scale = _scale_of(module)
        raw = self._raw[scale.name]
        return raw, read_values(scale, raw), scale.dtype


def refuse_overflow(module: str, scales: Collection[float], dtype: str) -> None:
    """Raise where a weight times its scale is no number in the floating-point ``dtype``."""
    largest = max(scales, default=0.0)
    if not fits(largest, dtype):
        raise Unsupported(
            "Dequantized weights would not be finite",
            where=module,
            expected=f"448 times the scale to be a number in {dtype}",
            found=f"a scale of {largest:.3g}",
            hint="calibration failed for this layer: quantize the model again",
        )


def kv_scales(model: Model) -> dict[str, NewTensor]:
    """The scales of the KV cache as compressed-tensors has them: its names, ``[1]``. The value stays, to the bit."""
    tensors = model.checkpoint.tensors
    edits = {}
    for old, info in tensors.items():
        new = kv_scale_name(old)
        if new is not None and new not in tensors and info.numel == 1:
            edits[old] = NewTensor(info.dtype, (1,), (Fill(model.checkpoint.read_tensor(old), 1),), new)
    return edits


def row_scales(model: Model) -> dict[str, NewTensor]:
    """The scales for every row as compressed-tensors has them, ``[N, 1]``: Quark has ``[N]``."""
    rows = (kind for kind in model.kinds if kind.first.has_rows and kind.first.scale is not None)
    scales = (model.checkpoint.tensors[f"{name}.weight_scale"] for kind in rows for name in kind.names)
    return {info.name: _reshaped(info) for info in scales}


def _reshaped(scale: TensorInfo) -> NewTensor:
    return NewTensor(scale.dtype, (*scale.shape, 1), (Copy(0, scale.nbytes),))


Affected = list[tuple[FusedGroup, tuple[Module, ...]]]


def affected_groups(model: Model, selection: Selection, *, per_token: bool = False) -> Affected:
    """The groups whose partitions share a scale, or have a vector of them, with the modules that must change; with
    ``per_token`` also those with channel scales and static activations.

    Raises :class:`rewrite.errors.Refused` where these cannot be told with certainty.
    """
    affected = []
    for group in model.select(selection):
        modules = _implicit(group)
        if per_token and not _is_left_alone(group) and (modules or any(m.is_static for m in group.modules)):
            modules = group.modules
        for module in modules:
            check_scheme(module, model)
        if modules:
            affected.append((group, modules))
    return affected


def modules_by_target(affected: Affected) -> dict[str, list[str]]:
    """The names of the modules by the target that matches them and the layer that engines fuse them to."""
    targets: dict[str, list[str]] = {}
    for group, modules in affected:
        targets.setdefault(group.layer.target, []).extend(module.name for module in modules)
    return targets


def fused_plain(model: Model) -> Collection[str]:
    """Patterns for plain layers under their fused name: SGLang looks ``in_proj_ba`` up, not its parts."""
    parts = ("linear_attn.in_proj_a", "linear_attn.in_proj_b")
    plain = {kind.first.plain for kind in model.kinds if kind.form.pattern.endswith(parts)}
    return (r"re:.*linear_attn\.in_proj_(a|b|ba)$",) if plain == {True} else ()


def check_scheme(module: Module, model: Model) -> None:
    """Raise unless the config gives the module the scheme that its tensors have."""
    scheme, layout = module.scheme, module.layout
    stored = "tensor" if layout == "partition" else layout  # no dialect words a vector of partitions differently
    if isinstance(model.dialect, Other):
        model.dialect.as_compressed_tensors(model.layers)  # refuses
    if module.scale is not None and not module.scale.name.endswith(".weight_scale"):
        raise Unsupported(
            "Scales under Mistral's names are not restated",
            where=f"{module.scale.shard}: {module.scale.name}",
            expected=f"{module.name}.weight_scale",
            found=module.scale.name.rpartition(".")[2],
        )
    if scheme is None or not scheme.fp8 or scheme.layout != stored:
        raise CheckpointError(
            "Config and tensors disagree on how a module is quantized",
            where=module.name,
            expected=f"what the config says: {scheme.text if scheme else 'not quantized'}",
            found=f"{module.weight.dtype} weight with {_described(module.scale)}",
            hint="loaders follow the config and then fail on the tensors: export the model again",
        )


def _implicit(group: FusedGroup) -> tuple[Module, ...]:
    """The modules of a group that have no scale of their own for each row."""
    if group.quantized_in_part:
        raise Unsupported(
            "A fused group is quantized in part",
            where=group.name,
            expected="all of its modules in FP8, or none",
            found=", ".join(f"{m.name.rpartition('.')[2]}: {m.weight.dtype}" for m in group.modules),
            hint="no engine that fuses these modules can serve this: quantize all of them, or none",
        )
    if _is_left_alone(group):
        return ()
    layouts = {module.name: known_layout(module) for module in group.modules}
    if any(layout == "block" for layout in layouts.values()):
        raise Unsupported("A fused group mixes block scales with others", where=group.name, found=layouts)
    return tuple(m for m in group.modules if layouts[m.name] != "channel" and not m.has_rows)


def _is_left_alone(group: FusedGroup) -> bool:
    """Not quantized, one scale for one partition, or block scales, which every loader reads right."""
    plain = not group.modules[0].fp8
    return plain or _is_one_partition(group) or all(known_layout(module) == "block" for module in group.modules)


def _is_one_partition(group: FusedGroup) -> bool:
    """A layer that is stored as loaders want it (Qwen3-Next's ``in_proj_qkvz``): it has one scale, not a shared one."""
    return sum(len(module.partitions) for module in group.modules) == 1


def _describe(
    module: Module, old: TensorInfo, dtype: str, shape: tuple[int, ...], values: tuple[float, ...]
) -> ModuleChange:
    partitions = tuple(
        PartitionChange(p.name, p.start, p.stop, value)
        for p, value in zip(module.partitions, _each(values, module), strict=True)
    )
    return ModuleChange(old.name, old.shard, old.dtype, old.shape, values, dtype, shape, partitions)


def _scale_of(module: Module) -> TensorInfo:
    if module.scale is None:
        raise CheckpointError("An FP8 weight has no scale", where=module.name)
    return module.scale


def _each(values: tuple[float, ...], module: Module) -> tuple[float, ...]:
    """A value for each partition."""
    return values * len(module.partitions) if len(values) == 1 else values


def _described(scale: TensorInfo | None) -> str:
    return "no scale" if scale is None else f"a {scale.dtype} scale of shape {list(scale.shape)}"
