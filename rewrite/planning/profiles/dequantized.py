"""``dequantized``: every FP8 layer in the dtype of the model, no quantization left: for what reads no FP8 at all."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from rewrite.checkpoint.header import DTYPE_BITS, TensorInfo
from rewrite.errors import CheckpointError, Unsupported
from rewrite.ledger.formats import WEIGHT_SCALES
from rewrite.planning.manifest import GroupChange, ModuleChange, PartitionChange
from rewrite.planning.profiles.base import Changes, Profile, refuse_overflow
from rewrite.planning.segments import Dequantize
from rewrite.planning.shards import NewTensor
from rewrite.promise import Promise
from rewrite.quantization.dialects.other import Other
from rewrite.quantization.dtypes import FP8_DTYPES, model_dtype
from rewrite.quantization.groups import Module, Partition, Selection
from rewrite.quantization.kv_cache import stored_kv_scales
from rewrite.quantization.model import Model
from rewrite.quantization.scales import read_values
from rewrite.quantization.scheme import Scheme, layout_of_shape

_SCALES = WEIGHT_SCALES  # no name of them means an inverse: all are multiplied with
#: What only a reader of the quantization config knows what to do with.
_OF_A_QUANTIZATION = re.compile(
    r"(.*\.)?(?:(?:weight|input|output)_(?:packed|shape|scale\w*|global_scale|zero_point|g_idx)"
    r"|qweight|qzeros|scales|g_idx|pre_quant_scale|activation_scale|\w+_(?:blocks|scales|scale_inv)|\w+_proj_scale\w*)"
)


@dataclass(frozen=True)
class _Layer:
    """An FP8 module with its scale, and how they go together: rows of ``parts`` in blocks of ``block``."""

    module: Module
    scale: TensorInfo
    parts: tuple[Partition, ...]
    block: tuple[int, int]


def _plan(model: Model, _selection: Selection) -> Changes:
    """Every layer, whatever groups are chosen: the quantization config goes, so nothing may be left that needs it."""
    _refuse_other_formats(model)
    tensors, dtype = model.checkpoint.tensors, model_dtype(model.checkpoint.config.value)
    partitions = {m.name: m.partitions for group in model.groups.whole for m in group.modules}
    layers = [_layer(model.module(name), partitions.get(name), model) for name in sorted(model.layers.fp8)]
    edits: dict[str, NewTensor | None] = {i.name: None for i in stored_kv_scales(model.checkpoint)}
    edits |= {name: None for layer in layers for name in _dropped(layer) if name in tensors}
    groups = []
    scales = {layer.scale.name: layer for layer in layers}
    for info, raw in model.checkpoint.read_tensors(layer.scale for layer in layers):
        layer, values = scales[info.name], read_values(info, raw)
        refuse_overflow(layer.module.name, values, dtype)
        edits[layer.module.weight.name] = NewTensor(
            dtype, layer.module.weight.shape, _segments(layer, raw, dtype, model)
        )
        groups.append(GroupChange(layer.module.name, (_change(layer, values, dtype),)))
    _refuse_leftovers(model, edits)
    groups.sort(key=lambda group: group.name)
    schemes = {layer.module.name: None for layer in layers}
    return Changes(edits, tuple(groups), schemes, Other.none()) if edits else Changes()


def _layer(module: Module, partitions: tuple[Partition, ...] | None, model: Model) -> _Layer:
    found = [info for kind in _SCALES if (info := model.checkpoint.tensors.get(f"{module.name}.{kind}"))]
    if module.weight.dtype != "F8_E4M3":
        raise Unsupported(
            "This FP8 format is not dequantized", where=module.name, expected="F8_E4M3", found=module.weight.dtype
        )
    if len(found) != 1:
        raise CheckpointError(
            "An FP8 weight has two scales" if found else "An FP8 weight has no scale", where=module.name
        )
    rows, columns = module.weight.shape
    whole = (Partition(module.name.rpartition(".")[2], 0, rows),)
    scheme = module.scheme or (None if model.dialect.value else _by_shape(found[0].shape, rows))
    parts, block = _geometry(scheme, found[0].shape, (rows, columns), partitions or whole)
    if block is None:
        raise CheckpointError(
            "Config and tensors disagree on how a module is quantized",
            where=module.name,
            expected=f"what the config says: {module.scheme.text if module.scheme else 'not quantized'}",
            found=f"{module.weight.dtype} weight {[rows, columns]} with a scale of shape {list(found[0].shape)}",
            hint="which scale belongs to which weight cannot be told: export the model again",
        )
    return _Layer(module, found[0], parts, block)


def _by_shape(scale: tuple[int, ...], rows: int) -> Scheme:
    """Where no config says anything: the one that the scale can be of. Blocks are 128 x 128 in every known model."""
    return Scheme("FP8", layout_of_shape(scale, rows), "dynamic", "FP8 weights", block=(128, 128))


def _geometry(
    scheme: Scheme | None, scale: tuple[int, ...], weight: tuple[int, int], partitions: tuple[Partition, ...]
) -> tuple[tuple[Partition, ...], tuple[int, int] | None]:
    """The parts of a weight that have scales of their own, and the block in each; None where config and shapes do not
    say the same."""
    rows, columns = weight
    whole = (Partition("", 0, rows),)
    layout = scheme.layout if scheme is not None and scheme.fp8 else None
    if layout == "tensor" and scale in ((), (1,)):
        return partitions, (max(rows, 1), max(columns, 1))
    if layout == "tensor" and scale == (len(partitions),):
        return partitions, (max(rows, 1), max(columns, 1))
    if layout in ("channel", "rows") and scale in ((rows, 1), (rows,)):
        return whole, (1, max(columns, 1))
    block = scheme.block if scheme is not None and layout == "block" else None
    if block is not None and scale == (ceil(rows / block[0]), ceil(columns / block[1])):
        return whole, block
    return whole, None


def _segments(layer: _Layer, raw: bytes, dtype: str, model: Model) -> tuple[Dequantize, ...]:
    """Scales beside the weight are read when the shard is written; the few that lie in another shard are carried."""
    rows, columns = layer.module.weight.shape
    scale, width = layer.scale, DTYPE_BITS[layer.scale.dtype] // 8
    if scale.numel > 1 and scale.numel == len(layer.parts):
        return tuple(
            Dequantize(p.start * columns, p.rows, columns, layer.block, raw[i * width :][:width], scale.dtype, dtype)
            for i, p in enumerate(layer.parts)
        )
    is_near = scale.shard == layer.module.weight.shard
    where = model.checkpoint.shards[scale.shard].header.size + scale.start if is_near else raw
    return (Dequantize(0, rows, columns, layer.block, where, scale.dtype, dtype),)


def _change(layer: _Layer, values: tuple[float, ...], dtype: str) -> ModuleChange:
    """What the manifest says. Scales for rows and blocks are not listed: there are millions of them."""
    weight, count = layer.module.weight, len(layer.parts)
    listed = values if len(values) in (1, count) else ()
    each = listed * count if len(listed) == 1 else listed or (None,) * count
    parts = tuple(PartitionChange(p.name, p.start, p.stop, v) for p, v in zip(layer.parts, each, strict=True))
    return ModuleChange(weight.name, weight.shard, weight.dtype, weight.shape, listed, dtype, weight.shape, parts)


def _dropped(layer: _Layer) -> Iterator[str]:
    yield layer.scale.name
    yield f"{layer.module.name}.input_scale"
    yield f"{layer.module.name}.activation_scale"


def _refuse_other_formats(model: Model) -> None:
    """A checkpoint that is dequantized in part must not lose its config, nor one whose rotations engines compute."""
    if model.dialect.value.get("transform_config"):
        raise Unsupported(
            "The weights are rotated, and without its config nobody turns the activations",
            where="config.json: quantization_config.transform_config",
            expected="no transforms",
            hint="choose another profile: these keep the config",
        )
    others = sorted(model.layers.quantized - model.layers.fp8)
    if others:
        schemes = {model.kind_of[name].first.scheme for name in others}
        formats = sorted({scheme.format if scheme else "unknown" for scheme in schemes})
        raise Unsupported(
            "Layers of other formats than FP8 are not dequantized",
            where=others[0],
            expected="FP8 layers and plain ones",
            found=f"{len(others)} layers in {', '.join(formats)}",
        )


def _refuse_leftovers(model: Model, edits: dict[str, NewTensor | None]) -> None:
    """Nothing may stay that only the config explains."""
    for name, info in model.checkpoint.tensors.items():
        if name not in edits and (
            info.dtype in FP8_DTYPES or info.dtype.startswith(("F4", "F6", "F8")) or _OF_A_QUANTIZATION.fullmatch(name)
        ):
            raise Unsupported(
                "A quantized tensor belongs to no layer that can be dequantized",
                where=f"{info.shard}: {name}",
                expected="weights [rows, columns] in FP8 with a weight_scale, perhaps an input_scale",
                found=f"{info.dtype} {list(info.shape)}",
            )


DEQUANTIZED = Profile(
    name="dequantized",
    summary="every FP8 layer dequantized to the dtype of the model; no quantization is left",
    plan=_plan,
    promise=Promise(scale="dropped", weight="plain", input_scale="dropped", every_layer=True, nothing_quantized=True),
    closing="{layers} dequantized, no quantization left",
)
