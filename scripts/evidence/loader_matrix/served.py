"""Compares what an engine would serve with the truth, partition by partition.

`rel` is |served - true| / |true| (Frobenius norms, F32) of the dequantized weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from loader_matrix import nvfp4
from loader_matrix.results import worst, worst_kv
from loader_matrix.truth import SCALED, Linear, Truth, canonical, is_by_blocks, spread

# A module that holds all experts of a layer: attribute of the weight, of its scale, and the experts' projections in it.
# vLLM's and SGLang's is quantized; transformers' is not.
EXPERTS = {
    "w13": ("w13_weight", "w13_weight_scale", "w13_input_scale", ("gate_proj", "up_proj")),
    "w2": ("w2_weight", "w2_weight_scale", "w2_input_scale", ("down_proj",)),
    "gate_up_proj": ("gate_up_proj", "", "", ("gate_proj", "up_proj")),
    "down_proj": ("down_proj", "", "", ("down_proj",)),
}
# Linears split over ranks along their input; every other linear that is split, is split along its output.
ROW_PARALLEL = ("out_proj", "o_proj", "down_proj")
# What multi-head latent attention multiplies out while it is loaded.
TAKEN_APART = ("kv_b_proj",)
REPLICATED = ("gate", "shared_expert_gate")
# The layer that engines fuse a stored linear into, by its last name; and served fused ones by their own. An engine that
# serves the parts as modules of their own has the partitions all the same.
FUSED = {
    "in_proj_qkvz": "in_proj_qkvz",
    "in_proj_qkv": "in_proj_qkvz",
    "in_proj_z": "in_proj_qkvz",
    "qkv_proj": "qkv_proj",
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_up_proj": "gate_up_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "fused_qkv_a_proj": "fused_qkv_a_proj",
    "fused_qkv_a_proj_with_mqa": "fused_qkv_a_proj",  # SGLang
    "q_a_proj": "fused_qkv_a_proj",
    "kv_a_proj_with_mqa": "fused_qkv_a_proj",
}
# Which stored linears a served one may hold, in order, with the names of their partitions (those that
# rewrite/quantization has): stored one by one, or fused on disk.
SOURCES: dict[str, tuple[dict[str, tuple[str, ...]], ...]] = {
    "in_proj_qkvz": ({"in_proj_qkv": ("q", "k", "v"), "in_proj_z": ("z",)}, {"in_proj_qkvz": ("qkvz",)}),
    "in_proj_qkv": ({"in_proj_qkv": ("q", "k", "v")},),
    "in_proj_z": ({"in_proj_z": ("z",)},),
    "in_proj_ba": ({"in_proj_b": ("b",), "in_proj_a": ("a",)}, {"in_proj_ba": ("ba",)}),
    "qkv_proj": ({"q_proj": ("q",), "k_proj": ("k",), "v_proj": ("v",)}, {"qkv_proj": ("q", "k", "v")}),
    "gate_up_proj": ({"gate_proj": ("gate",), "up_proj": ("up",)}, {"gate_up_proj": ("gate", "up")}),
    **dict.fromkeys(
        ("fused_qkv_a_proj", "fused_qkv_a_proj_with_mqa"), ({"q_a_proj": ("q_a",), "kv_a_proj_with_mqa": ("kv_a",)},)
    ),
    "q_a_proj": ({"q_a_proj": ("q_a",)},),
    "kv_a_proj_with_mqa": ({"kv_a_proj_with_mqa": ("kv_a",)},),
    **{f"{part}_proj": ({f"{part}_proj": (part,)},) for part in ("q", "k", "v", "gate", "up")},
}


@dataclass(frozen=True)
class Rank:
    """Which slice of every layer this process holds."""

    rank: int = 0
    world: int = 1


@dataclass(frozen=True)
class Part:
    """A partition: its name, and the true weight [n, K] this rank has to serve."""

    name: str
    weight: torch.Tensor


@dataclass(frozen=True)
class Layer:
    """The truth of one served layer: the stored modules it holds, its partitions in order, FP8 or not on disk, the
    activation scale it needs, and the blocks that share a weight scale (None: rows do)."""

    sources: tuple[str, ...]
    parts: tuple[Part, ...]
    quantized: bool
    input_scale: float | None
    block: tuple[int, int] | None = None


def _sources(name: str, truth: Truth) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """(stored module, names of the partitions in it) of the served layer `name`."""
    stem, _, last = name.rpartition(".")
    for prefix in (f"{stem}.", f"{stem}.self_attn."):  # SGLang has an attention layer's linears in the layer itself
        for found in SOURCES.get(last, ({last: (last,)},)):
            sources = tuple((f"{prefix}{module}", parts) for module, parts in found.items())
            if all(module in truth for module, _ in sources):
                return sources
    return ()


def _slice(weight: torch.Tensor, last: str, rank: Rank) -> torch.Tensor:
    if rank.world == 1 or last in REPLICATED:
        return weight
    dim = 1 if last in ROW_PARALLEL else 0
    return weight.chunk(rank.world, dim)[rank.rank]


def expected(name: str, truth: Truth, rank: Rank) -> Layer | None:
    """The truth of the served layer `name` (canonical), or None where the checkpoint has no such linear."""
    sources = _sources(name, truth)
    if not sources:
        return None
    linears = [truth.linear(module) for module, _ in sources]
    last = name.rpartition(".")[2]
    parts = tuple(
        Part(part, _slice(rows, last, rank))
        for linear, (module, names) in zip(linears, sources, strict=True)
        for part, rows in zip(names, linear.weight.split(truth.rows(module, len(names))), strict=True)
    )
    scales = [linear.input_scale for linear in linears if linear.input_scale is not None]
    # Every partition gets the same activations; engines quantize them by the largest of the partitions' scales.
    stored = tuple(module for module, _ in sources)
    return Layer(
        stored, parts, all(linear.quantized for linear in linears), max(scales, default=None), linears[0].block
    )


def rel(served: torch.Tensor, true: torch.Tensor) -> float:
    """|served - true| / |true|; exactly 0.0 only when every element is equal.

    A weight that is served in BF16 is compared with the truth rounded to BF16, the best that it can be.
    """
    return float((served.float() - true).norm() / true.norm())


def dequantized(weight: torch.Tensor, scale: torch.Tensor | None, layer: Layer) -> torch.Tensor:
    """F32 [N, K] of a served weight, stored [N, K] or as its transposed view (what FP8 GEMMs want).

    `scale` has one element, one for every row or one for every block: no engine computes with one for every partition.
    """
    rows = [part.weight.shape[0] for part in layer.parts]
    shape = (sum(rows), layer.parts[0].weight.shape[1])
    # A square weight's shape doesn't tell; its memory does: engines transpose by a view, never by a copy.
    if tuple(weight.shape) != shape or (weight.t().is_contiguous() and not weight.is_contiguous()):
        weight = weight.t()
    if tuple(weight.shape) != shape:
        raise ValueError(f"served weight has shape {tuple(weight.shape)}, the checkpoint's is {shape}")
    if scale is None:
        return weight.float()
    scale = scale.detach().float()
    if layer.block is not None and is_by_blocks(scale, weight, layer.block):  # partitions end where blocks do
        return weight.float() * spread(scale, weight, layer.block)
    if scale.numel() not in (1, sum(rows)):
        raise ValueError(f"served scale has shape {tuple(scale.shape)} for {sum(rows)} rows")
    return weight.float() * scale.reshape(-1, 1)


def _input_scale(served: Any, true: float | None) -> str:
    """`equal`, `differs`, or `absent` (the engine quantizes activations dynamically, or not at all)."""
    if not isinstance(served, torch.Tensor):
        return "absent"
    if true is None:
        return "differs"
    return "equal" if bool((served.detach().float() == true).all()) else "differs"


def _errors(weight: torch.Tensor, scale: torch.Tensor | None, layer: Layer) -> dict[str, float]:
    """Of each partition of a served weight; `scale` None where it is not FP8."""
    rows = dequantized(weight, scale, layer).split([len(part.weight) for part in layer.parts])
    true = [part.weight if scale is not None else part.weight.to(weight.dtype).float() for part in layer.parts]
    return {part.name: rel(*each) for part, *each in zip(layer.parts, rows, true, strict=True)}


def _packed_errors(packed: nvfp4.Packed, layer: Layer) -> dict[str, float]:
    """Of each partition of a served NVFP4 weight."""
    rows = packed.dequantized().split([len(part.weight) for part in layer.parts])
    return {part.name: rel(served, part.weight) for part, served in zip(layer.parts, rows, strict=True)}


def _measure_packed(name: str, packed: nvfp4.Packed, layer: Layer) -> dict[str, Any]:
    return {
        "module": name,
        "layer": FUSED.get(name.rpartition(".")[2]),
        "sources": layer.sources,
        "errors": _packed_errors(packed, layer),
        "input_scale": _input_scale(packed.input_scale, layer.input_scale),
        "quantized": True,
        "quantized_on_disk": layer.quantized,
    }


def _tensor(module: torch.nn.Module, name: str) -> torch.Tensor:
    """A parameter, or another attribute of the module that is a tensor."""
    held: torch.Tensor = getattr(module, name)
    return held


def _scale(module: torch.nn.Module) -> torch.Tensor:
    """Of a weight; engines call block scales of `fp8` as the checkpoint does."""
    return _tensor(module, "weight_scale" if hasattr(module, "weight_scale") else "weight_scale_inv")


def _measure(name: str, module: torch.nn.Module, layer: Layer) -> dict[str, Any]:
    weight = _tensor(module, "weight").detach()
    quantized = weight.dtype in SCALED
    return {
        "module": name,
        "layer": FUSED.get(name.rpartition(".")[2]),
        "sources": layer.sources,
        "errors": _errors(weight, _scale(module) if quantized else None, layer),
        "input_scale": _input_scale(getattr(module, "input_scale", None), layer.input_scale) if quantized else "absent",
        "quantized": quantized,
        "quantized_on_disk": layer.quantized,
    }


def _expert_layer(name: str, module: torch.nn.Module, which: str, truth: Truth) -> dict[str, Any]:
    """The experts' weights [E, N, K], with scales [E] or [E, N]: the worst error over the experts."""
    weight_name, scale_name, input_name, projections = EXPERTS[which]
    weights = getattr(module, weight_name).detach()
    packed = [nvfp4.served_expert(module, which, expert) for expert in range(len(weights))]
    quantized = weights.dtype in SCALED
    scale_name = scale_name if hasattr(module, scale_name) else f"{scale_name}_inv"
    scales = getattr(module, scale_name) if quantized else [None] * len(weights)
    found: list[dict[str, float]] = []
    linears: dict[str, Linear] = {}
    for expert, (weight, scale) in enumerate(zip(weights, scales, strict=True)):
        own = {f"{name}.{expert}.{projection}": projection for projection in projections}
        linears |= {module: truth.linear(module) for module in own}
        parts = tuple(Part(projection, linears[module].weight) for module, projection in own.items())
        layer = Layer(tuple(own), parts, quantized, None, next(iter(linears.values())).block)
        served = packed[expert]
        found.append(_errors(weight, scale, layer) if served is None else _packed_errors(served, layer))
    inputs = [linear.input_scale for linear in linears.values() if linear.input_scale is not None]
    if packed[0] is not None:  # of the activations engines keep what their kernels want: not compared
        quantized, inputs, input_name = True, [], ""
    return {
        "module": f"{name}.{which}",
        "layer": None,
        "sources": tuple(linears),
        "errors": {projection: worst([errors[projection] for errors in found]) for projection in projections},
        "input_scale": _input_scale(getattr(module, input_name or "-", None), max(inputs, default=None)),
        "quantized": quantized,
        "quantized_on_disk": all(linear.quantized for linear in linears.values()),
    }


def _expert_layers(served: str, module: torch.nn.Module, truth: Truth) -> list[dict[str, Any]]:
    name = served.removesuffix(".routed_experts")  # vLLM 0.32's name for the module inside `experts`
    stored = f"{name}.0.down_proj"
    held = [which for which, (weight, *_) in EXPERTS.items() if getattr(getattr(module, weight, None), "ndim", 0) == 3]
    if stored in truth.packed():
        return []
    if stored in truth.nvfp4():  # BF16 where they are dequantized on loading; else in an order that must be known
        is_packed = {which: getattr(module, EXPERTS[which][0]).dtype == torch.uint8 for which in held}
        held = [which for which in held if not is_packed[which] or nvfp4.served_expert(module, which, 0) is not None]
    return [_expert_layer(name, module, which, truth) for which in held]


def _kv_scale(module: torch.nn.Module, which: str) -> float | None:
    """What an attention layer scales its cache of keys or values by; None where it holds no such scale.

    vLLM keeps `_k_scale` and, on the host, `_k_scale_float`; SGLang `k_scale` (None without a cache scheme) and
    `k_scale_float`; compressed-tensors' in transformers `k_scale`.
    """
    held = [getattr(module, name, None) for name in (f"_{which}_scale", f"{which}_scale")]
    scale = next((each for each in held if isinstance(each, torch.Tensor) and each.numel() == 1), None)
    return None if scale is None else scale.detach().float().item()


def _kv_word(served: set[float], true: float) -> str:
    if not served or (served == {1.0} and true != 1.0):
        return "absent"
    if served == {true}:
        return "equal"
    return "rounded" if served == {torch.tensor(true).bfloat16().item()} else "differs"


def kv_cache(model: torch.nn.Module, truth: Truth) -> str:
    """The scales of the KV cache: `none` on disk, `equal`, `rounded` to BF16, `differs`, or `absent` (no attention
    layer holds one, or it holds 1, what engines set where nothing was loaded). The worst of all layers."""
    found = set()
    for (layer, which), true in truth.kv_scales().items():
        own = [module for name, module in model.named_modules() if (canonical(name) or "").startswith(layer)]
        found.add(_kv_word({scale for module in own if (scale := _kv_scale(module, which)) is not None}, true))
    return worst_kv(found or {"none"})


def measure(model: torch.nn.Module, truth: Truth, rank: Rank) -> dict[str, Any]:
    """Errors of every linear of the language model: a record for each.

    `strays` names FP8 weights that the checkpoint has no FP8 linear for (a vision tower that was cast, say),
    `not_compared` the kinds of linear that are quantized on disk in a way that `truth` does not read.
    """
    layers: list[dict[str, Any]] = []
    strays: list[str] = []
    packed = truth.packed()
    for served, module in model.named_modules():
        name = canonical(served)
        if name is not None:
            layers += _expert_layers(name, module, truth)
        weight = getattr(module, "weight", None)
        weight = getattr(module, "weight_packed", None) if weight is None else weight
        if not isinstance(weight, torch.Tensor) or weight.ndim != 2:
            continue
        sources = {source for source, _ in _sources(name, truth)} if name is not None else set()
        if sources & packed:
            continue
        layer = expected(name, truth, rank) if name is not None else None
        if layer is None:
            if weight.dtype in SCALED:
                strays.append(served)
        elif (held := nvfp4.served(module)) is not None:
            layers.append(_measure_packed(name or "", held, layer))
        elif weight.dtype != torch.uint8:
            layers.append(_measure(name or "", module, layer))
    missing = truth.quantized() - {source for layer in layers for source in layer["sources"]}
    unread = missing & truth.nvfp4()  # engines may shuffle NVFP4 weights for their kernels: that is not read here
    unread |= {name for name in missing if name.endswith(TAKEN_APART)}
    if missing - unread:  # nothing that was not compared may pass
        names = sorted(missing - unread)
        raise ValueError(f"{len(names)} quantized modules are not in the loaded model: {', '.join(names[:3])}")
    packed |= unread
    return {
        "layers": [{**layer, "rank": rank.rank} for layer in layers],
        "strays": strays,
        "not_compared": sorted({name.rpartition(".")[2] for name in packed}),
        "kv_cache": kv_cache(model, truth),
    }
