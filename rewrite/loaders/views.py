"""A checkpoint and its fused groups as a loader sees them. Made from a :class:`~rewrite.quantization.model.Model`."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, Literal

from rewrite.ledger.fault import Fault
from rewrite.ledger.ledger import faults, group_faults, header_faults
from rewrite.ledger.names import is_vision
from rewrite.ledger.values import left
from rewrite.loaders.blocks import BlockLayer, block_layers
from rewrite.loaders.by_source import Sources
from rewrite.loaders.experts import Experts, expert_layers, is_expert
from rewrite.loaders.kernels import kernel_schemes
from rewrite.loaders.lookups import Lookup, misread, plain_by_name
from rewrite.loaders.outcome import Outcome
from rewrite.loaders.quark import what_was_not_run
from rewrite.quantization.architectures import first_class, text_config
from rewrite.quantization.dialects import config_path, config_paths
from rewrite.quantization.dialects.compressed_tensors import CompressedTensors
from rewrite.quantization.dialects.other import Other
from rewrite.quantization.dtypes import decode, model_dtype
from rewrite.quantization.groups import FusedGroup, Module, Selection, is_table
from rewrite.quantization.kv_cache import stored_kv_scales
from rewrite.quantization.model import Model
from rewrite.quantization.scheme import ScaleLayout, Scheme

SeenLayout = Literal["none", "tensor", "partition", "channel", "block", "nvfp4", "group", "unknown", "other"]
_SCALES = (".weight_scale", ".input_scale", ".weight_global_scale", ".input_global_scale")
#: Whether stacked experts are as wide as the config says.
Stack = Literal["fits", "narrower", "wider"]
_GROUPED = ("INT4", "MXFP4", "MXFP8")  # a scale for a few weights of one row, and no other
_POWERS_OF_TWO = ("U8", "F8_E8M0")  # scales of the MX formats, which FP8 weights can have too (MXFP8)


@dataclass(frozen=True)
class PartitionView:
    """A partition as a loader sees it. ``layout`` is that of its module's scale; "none": not quantized; "other": of
    a scheme that no loader was run with; "nvfp4": ``scale`` and ``input_scale`` are the global ones, to multiply
    with; "group": there are scales for groups of a row only, which joining rows leaves as they are."""

    name: str
    module: str
    rows: int
    layout: SeenLayout
    scale: float | None  # None for layouts with more than one value a partition
    scale_dtype: str = "BF16"
    input_scale: float | None = None  # of NVFP4 only


@dataclass(frozen=True)
class GroupView:
    """A fused group as a loader sees it, partitions in slot order. ``layer`` is the fused layer's name."""

    name: str
    layer: str
    partitions: tuple[PartitionView, ...]
    columns: int
    static_activations: bool
    experts: int = 0  # how many of them this layer is: gate and up are those of the expert furthest from equal
    token_activations: bool = False  # quantized by a scale for each token
    furthest: str = ""  # of experts: the one whose gate and up are furthest from equal
    divides: bool = False  # of NVFP4: the stored global scales are divisors (compressed-tensors)

    @property
    def nvfp4(self) -> bool:
        """Whether all of it is NVFP4 of a kind that loaders were run with."""
        return all(p.layout == "nvfp4" for p in self.partitions)


@dataclass(frozen=True)
class CheckpointView:
    """A checkpoint as a loader sees it. ``dtype`` is the model's; ``fp8_with_scales`` says whether any layer is FP8 and
    has a ``weight_scale``, one of a fused group or not; ``ignore_survives_renaming`` whether the config still leaves
    the unquantized parts of a fused layer alone when modules are looked up under other names."""

    model_type: str
    dialect: str
    dialect_is_read: bool  # False: known by its name only, or none is stated and some layers are quantized
    dtype: str
    vocabulary_is_quantized: bool  # lm_head or the embeddings
    fp8_with_scales: bool
    ignore_survives_renaming: bool
    groups: tuple[GroupView, ...]
    architecture: str = ""  # the first of ``architectures``
    quark_not_run: str | None = None  # what of AMD Quark's dialect no loader was run with
    misread: Mapping[Lookup, Outcome] = field(default_factory=dict)  # what goes wrong by each way to look layers up
    plain_by_name: frozenset[Lookup] = frozenset()  # the ways that find all plain layers in ``ignore``
    plain_with_scheme: str | None = None  # the first matrix without scales that the config takes for a quantized layer
    scalar_scale: str | None = None  # a scale of the shape () or [N], but of the KV cache
    nvfp4_experts: bool = False  # of any layer, whether it is among the groups or not
    latent_vectors: bool = False  # of the parts of ``fused_qkv_a_proj``: tensors that do not become one when joined
    kv_cache_scales: bool = False  # whether scales of the KV cache are stored
    nvfp4_layers: bool = False  # whether the config gives any module NVFP4
    router_bias_is_not_stated: bool = False  # of DeepSeek-V3: stored, and no ``topk_method`` in the config
    block_layers: tuple[BlockLayer, ...] = ()  # the same; one of each kind
    kernel_schemes: frozenset[str] = frozenset()  # of all FP8 layers but experts, as kernel_rules.py names them
    fused_schemes: frozenset[str] = frozenset()  # of those among the groups
    fp8_vocabulary: str | None = None  # lm_head by the class Linear, or embed_tokens, in FP8 of compressed-tensors
    weight_only_nvfp4: bool = False  # whether the config gives any module NVFP4 without quantized activations
    faults: tuple[Fault, ...] = ()  # what is wrong in it, whoever loads it
    method_is_stated: bool = True  # False: the quantization part of config.json has no ``quant_method``
    group_scales: bool = False  # whether the config gives any module a format with scales for groups of a row only
    tower_is_quantized: bool = False  # any layer of a vision or audio tower
    places: tuple[str, ...] = ()  # where in config.json the quantization is stated
    not_run_with: str | None = (
        None  # a key of the config that changes what weights mean, and that no engine was run with
    )
    stack: Stack = "fits"  # gpt-oss's experts, against the width that the config says
    by_source: Sources | None = None  # what the releases that were read say of its family


def view_model(
    model: Model,
    selection: Selection,
    before: CheckpointView | None = None,
    changed: Collection[str] = (),
    dropped: Collection[str] = (),
) -> CheckpointView:
    """The checkpoint with the groups that ``selection`` is about; "all": with the experts of every layer, too.

    ``before`` is the view of an earlier state, from which the modules ``changed`` differ: groups without any of these
    are taken from there, where both are of one dialect; the tensors ``dropped`` are gone. Reads scales of one value a
    module or partition, no others.
    Raises :class:`rewrite.errors.Refused` for a broken group.
    """
    wrong = _faults_after(model, selection, before, dropped)
    if before is not None and before.dialect != model.dialect.name:
        before = None  # the same scheme may be stated in another way
    known = {group.name: group for group in before.groups} if before else {}
    groups = [
        _view_group(group, model) if _is_new(group, known, changed) else known[group.name]
        for group in model.select(selection)
    ]
    if before is not None and not any(is_expert(name) for name in changed):
        groups += [group for group in before.groups if group.experts]
        nvfp4_experts = before.nvfp4_experts
    else:
        experts = [each for each in expert_layers(model, nvfp4_only=selection != "all") if each.gated]
        groups += [_view_experts(each, model) for each in experts if selection == "all" or each.gate != each.up]
        nvfp4_experts = any(each.nvfp4 for each in experts)
    fused = (module for group in model.select(selection) for module in group.modules)
    return CheckpointView(
        model_type=str(model.checkpoint.config.value.get("model_type")),
        dialect=model.dialect.name,
        dialect_is_read=not isinstance(model.dialect, Other) or not (model.dialect.value or model.layers.quantized),
        vocabulary_is_quantized=any(
            not kind.first.plain and kind.form.pattern.endswith(("lm_head", "embed_tokens")) for kind in model.kinds
        ),
        dtype=model_dtype(model.checkpoint.config.value),
        fp8_with_scales=any(kind.first.fp8 and "weight_scale" in kind.form.tensors for kind in model.kinds),
        ignore_survives_renaming=_ignore_survives_renaming(model),
        groups=tuple(groups),
        architecture=first_class(model.checkpoint.config.value),
        quark_not_run=what_was_not_run(model),
        misread=misread(model),
        plain_by_name=plain_by_name(model),
        plain_with_scheme=_plain_with_scheme(model),
        scalar_scale=_scalar_scale(model),
        nvfp4_experts=nvfp4_experts,
        latent_vectors=_latent_vectors(model),
        kv_cache_scales=any(True for _ in stored_kv_scales(model.checkpoint)),
        nvfp4_layers=any(_is_nvfp4(kind.first.scheme) for kind in model.kinds),
        router_bias_is_not_stated=_router_bias_is_not_stated(model),
        block_layers=block_layers(model),
        kernel_schemes=kernel_schemes((kind.first for kind in model.kinds), model.dialect.name),
        fused_schemes=kernel_schemes(fused, model.dialect.name),
        weight_only_nvfp4=any(_is_nvfp4(s := k.first.scheme) and s and s.activations == "none" for k in model.kinds),
        fp8_vocabulary=_fp8_vocabulary(model),
        faults=wrong,
        method_is_stated=_method_is_stated(model.checkpoint.config.value),
        group_scales=any((s := kind.first.scheme) is not None and s.format in _GROUPED for kind in model.kinds),
        tower_is_quantized=any(not kind.first.plain and is_vision(kind.form.pattern) for kind in model.kinds),
        places=tuple(".".join(path) for path in config_paths(model.checkpoint.config.value)),
        not_run_with=_not_run_with(model.dialect.value),
        stack=_stack(model),
        by_source=Sources(model),
    )


def _not_run_with(stated: Mapping[str, Any]) -> str | None:
    """Rotations that engines compute (vLLM 0.32.0 does, SGLang 0.5.23 does not read the key), and sparse storage."""
    if stated.get("transform_config"):
        return "transform_config"
    sparsity = stated.get("sparsity_config")
    is_sparse = isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense"
    return "sparsity_config" if is_sparse else None


def _faults_after(
    model: Model, selection: Selection, before: CheckpointView | None, dropped: Collection[str]
) -> tuple[Fault, ...]:
    """Scales are read once: what is wrong in their values is wrong after a change, too."""
    groups = model.select(selection)
    if before is None:
        return faults(model, groups)
    return (*group_faults(model, groups), *header_faults(model), *left(before.faults, dropped))


def _is_new(group: FusedGroup, known: Mapping[str, GroupView], changed: Collection[str]) -> bool:
    return group.name not in known or any(module.name in changed for module in group.modules)


def spread(group: GroupView) -> float | None:
    """The largest scale over the smallest: how far apart the partitions are. None where rows have their own scales."""
    scales = [p.scale for p in group.partitions if p.scale]
    return max(scales) / min(scales) if len(scales) == len(group.partitions) else None


def _view_group(group: FusedGroup, model: Model) -> GroupView:
    if group.nvfp4 and all(_is_nvfp4(module.scheme) for module in group.modules):
        return _view_nvfp4(group, model)
    partitions = tuple(p for module in group.modules for p in _view_partitions(module, model))
    first = group.modules[0]
    # A config that says nothing of it: loaders go by the tensor.
    static = first.scheme.activations == "static" if first.scheme else any(m.input_scale for m in group.modules)
    return GroupView(group.name, group.layer.name, partitions, group.modules[0].weight.shape[1], static)


def _is_nvfp4(scheme: Scheme | None) -> bool:
    return scheme is not None and scheme.format == "NVFP4"


def _view_nvfp4(group: FusedGroup, model: Model) -> GroupView:
    scales = [(module, module.nvfp4) for module in group.modules if module.nvfp4]
    read = model.checkpoint.read_tensor
    partitions = tuple(
        PartitionView(
            partition.name,
            module.name,
            partition.rows,
            "nvfp4",
            own.multiplier(read(own.scale.name)),
            "F32",
            None if own.input_scale is None else own.multiplier(read(own.input_scale.name)),
        )
        for module, own in scales
        for partition in module.partitions
    )
    (_, first), columns = scales[0], group.modules[0].weight.shape[1] * 2
    static = first.input_scale is not None
    return GroupView(group.name, group.layer.name, partitions, columns, static, divides=first.divides)


def _view_experts(experts: Experts, model: Model) -> GroupView:
    is_known = experts.fp8 and experts.alike and _is_run(experts.scheme, experts.scale_dtype)
    layout: SeenLayout = (
        "none" if experts.plain else _seen(experts.layout, experts.scheme, experts.scale_dtype) if is_known else "other"
    )
    if experts.nvfp4 and experts.alike and _is_nvfp4(experts.scheme):
        layout = "nvfp4"
    if experts.alike and not experts.plain and _has_groups(experts.scheme, model):
        layout = "group"
    named = (("gate", experts.gate), ("up", experts.up))
    partitions = tuple(
        PartitionView(name, f"{experts.name}.{name}", experts.rows, layout, scale, experts.scale_dtype)
        for name, scale in named
    )
    scheme = experts.scheme
    return GroupView(
        experts.name,
        "experts",
        partitions,
        experts.columns,
        scheme is not None and (scheme.activations == "static" or (experts.nvfp4 and scheme.activations != "none")),
        experts.count,
        scheme is not None and scheme.per_token,
        experts.furthest,
        experts.divides,
    )


def _view_partitions(module: Module, model: Model) -> Iterator[PartitionView]:
    layout = module.layout
    scales: tuple[float | None, ...] = (None,) * len(module.partitions)
    if module.fp8 and module.scale is not None and layout in ("tensor", "partition"):
        values = decode(module.scale.dtype, model.checkpoint.read_tensor(module.scale.name), module.scale.name)
        scales = values if layout == "partition" else values * len(module.partitions)
    found = module.scale or module.block_scale
    dtype = found.dtype if found else ""
    is_known = module.fp8 and _is_run(module.scheme, dtype)
    seen = "none" if module.plain else _seen(layout, module.scheme, dtype) if is_known else "other"
    if not module.plain and _has_groups(module.scheme, model):
        seen = "group"
    for partition, scale in zip(module.partitions, scales, strict=True):
        yield PartitionView(partition.name, module.name, partition.rows, seen, scale, dtype)


def _has_groups(scheme: Scheme | None, model: Model) -> bool:
    """Zero points, and groups of columns in another order, were not run."""
    more = ("weight_zero_point", "weight_g_idx")
    known = scheme is not None and scheme.format in _GROUPED
    return known and not any(name in form.tensors for form in model.checkpoint.alike for name in more)


def _seen(layout: ScaleLayout | None, scheme: Scheme | None, dtype: str) -> SeenLayout:
    """A scale of ``[N]`` is one for each row where the dialect has that form for it, and no layout elsewhere. One that
    is not stored, and has no ``dtype``, ends no load: vLLM 0.32.0 and SGLang 0.5.23 were run."""
    if layout == "rows":
        return "channel" if scheme is not None and scheme.layout == "rows" else "unknown"
    return layout or ("unknown" if dtype else "other")


def _is_run(scheme: Scheme | None, scale_dtype: str) -> bool:
    """Whether loaders were run with FP8 weights of this scheme: not with MX scales, nor with plain activations."""
    return scale_dtype not in _POWERS_OF_TWO and (scheme is None or scheme.activations != "none")


def _plain_with_scheme(model: Model) -> str | None:
    """MTP layers are left out: transformers does not load them."""
    listed = (
        kind.names[0]
        for kind in model.kinds
        if kind.first.plain
        and kind.first.scheme is not None
        and not is_table(name := kind.form.pattern)
        and not name.startswith("mtp.")
    )
    return next(listed, None)


def _scalar_scale(model: Model) -> str | None:
    """The first by name: a conversion changes the order. MTP layers are left out, as above, and so is what the config
    leaves alone."""
    found = (
        f"{min(kind.names)}.{name}"
        for kind in model.kinds
        for name, (_, shape) in kind.form.tensors.items()
        if f".{name}".endswith(_SCALES) and not kind.form.pattern.startswith("mtp.") and kind.first.scheme is not None
        if not shape or (len(shape) == 1 and shape[0] == kind.first.weight.shape[0] > 1)
    )
    return min(found, default=None)


def _fp8_vocabulary(model: Model) -> str | None:
    if not isinstance(model.dialect, CompressedTensors):
        return None
    for kind in model.kinds:
        name = kind.names[0]
        is_head = name.endswith("lm_head") and model.dialect.first_group(name, name) is None
        if kind.first.fp8 and kind.first.scheme is not None and (is_head or name.endswith("embed_tokens")):
            return name
    return None


def _latent_vectors(model: Model) -> bool:
    """Scales of the shape ``[1]``, and the ``weight_shape`` of INT4."""
    modules = [m for group in model.groups.whole if group.layer.name == "fused_qkv_a_proj" for m in group.modules]
    scales = [scale for m in modules for scale in (m.scale, m.input_scale)]
    scales += [scale for m in modules if m.nvfp4 for scale in (m.nvfp4.scale, m.nvfp4.input_scale)]
    stated = any(f"{m.name}.weight_shape" in model.checkpoint.tensors for m in modules)
    return stated or any(scale is not None and scale.shape == (1,) for scale in scales)


def _router_bias_is_not_stated(model: Model) -> bool:
    config = model.checkpoint.config.value
    if text_config(config).get("model_type") != "deepseek_v3" or text_config(config).get("topk_method") is not None:
        return False
    return any("e_score_correction_bias" in form.tensors for form in model.checkpoint.alike)


def _stack(model: Model) -> Stack:
    """Of ``experts.gate_up_proj_blocks``."""
    stated = text_config(model.checkpoint.config.value).get("intermediate_size")
    shapes = (form.tensors.get("gate_up_proj_blocks") for form in model.checkpoint.alike)
    rows = {shape[1] for _, shape in filter(None, shapes) if len(shape) > 1}
    if not rows or not isinstance(stated, int) or rows == {2 * stated}:
        return "fits"
    return "narrower" if max(rows) < 2 * stated else "wider"


def _method_is_stated(config: dict[str, Any]) -> bool:
    """ModelOpt's own file may lie in the part as it is: engines read the algorithm there."""
    path = config_path(config)
    part = reduce(lambda found, key: found[key], path or (), config)
    return path is None or "quant_method" in part or "quantization" in part


def _ignore_survives_renaming(model: Model) -> bool:
    """Whether the config leaves ``in_proj_b`` alone under the name that SGLang 0.5.9 looks it up by."""
    for kind in model.kinds:
        if kind.form.pattern.endswith("linear_attn.in_proj_b") and kind.first.scheme is None:
            renamed = kind.names[0].replace("model.language_model.", "language_model.model.")
            return model.dialect.scheme(renamed) is None
    return True
