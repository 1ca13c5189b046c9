"""A checkpoint as a loader sees it. Made from a :class:`~rewrite.quantization.model.Model`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, Literal

from rewrite.ledger.fault import Fault
from rewrite.ledger.ledger import faults, group_faults, header_faults
from rewrite.ledger.names import is_vision
from rewrite.ledger.values import left
from rewrite.loaders.blocks import BlockLayer, block_layers
from rewrite.loaders.by_source import Sources
from rewrite.loaders.experts import expert_layers, is_expert
from rewrite.loaders.kernels import kernel_schemes
from rewrite.loaders.layer import GROUPED, Layer, fused_layer, is_nvfp4
from rewrite.loaders.lookups import Lookup, misread, plain_by_name
from rewrite.loaders.outcome import Outcome
from rewrite.loaders.quark import what_was_not_run
from rewrite.quantization.architectures import first_class, text_config
from rewrite.quantization.dialects import config_path, config_paths
from rewrite.quantization.dialects.compressed_tensors import CompressedTensors
from rewrite.quantization.dialects.other import Other
from rewrite.quantization.dtypes import model_dtype
from rewrite.quantization.groups import FusedGroup, Selection, is_table
from rewrite.quantization.kv_cache import stored_kv_scales
from rewrite.quantization.model import Model

_SCALES = (".weight_scale", ".input_scale", ".weight_global_scale", ".input_global_scale")
#: Whether stacked experts are as wide as the config says.
Stack = Literal["fits", "narrower", "wider"]


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
    groups: tuple[Layer, ...]
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
        fused_layer(group, model) if _is_new(group, known, changed) else known[group.name]
        for group in model.select(selection)
    ]
    if before is not None and not any(is_expert(name) for name in changed):
        groups += [group for group in before.groups if group.experts]
        nvfp4_experts = before.nvfp4_experts
    else:
        experts = [each for each in expert_layers(model, nvfp4_only=selection != "all") if len(each.parts) > 1]
        groups += [each for each in experts if selection == "all" or each.parts[0].scale != each.parts[1].scale]
        nvfp4_experts = any(each.divides is not None for each in experts)
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
        nvfp4_layers=any(is_nvfp4(kind.first.scheme) for kind in model.kinds),
        router_bias_is_not_stated=_router_bias_is_not_stated(model),
        block_layers=block_layers(model),
        kernel_schemes=kernel_schemes((kind.first for kind in model.kinds), model.dialect.name),
        fused_schemes=kernel_schemes(fused, model.dialect.name),
        weight_only_nvfp4=any(is_nvfp4(s := k.first.scheme) and s and s.activations == "none" for k in model.kinds),
        fp8_vocabulary=_fp8_vocabulary(model),
        faults=wrong,
        method_is_stated=_method_is_stated(model.checkpoint.config.value),
        group_scales=any((s := kind.first.scheme) is not None and s.format in GROUPED for kind in model.kinds),
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


def _is_new(group: FusedGroup, known: Mapping[str, Layer], changed: Collection[str]) -> bool:
    return group.name not in known or any(module.name in changed for module in group.modules)


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
