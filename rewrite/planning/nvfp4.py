"""One global scale for every fused NVFP4 layer, as edits. Reads global scales, and the weights of convolutions.

Engines multiply a fused layer with one global scale (``rewrite/loaders/nvfp4.py``). Two ways give it one. Codes stay in
both, and one module keeps every byte.

- *Folded*: a module takes the scale of the other one, and the ratio goes into what follows it, where the architecture
  says that nothing but products lies between. No block scale changes. Into a linear layer it is exact but for F32
  rounding of its global scale; into a convolution its weights are rounded once; a norm takes it away without a change.
- *Rescaled*: with S, the largest scale of the layer, block scales b of a module with the scale s become b x s / S,
  rounded to the nearest E4M3. A result from 2^-6 up is off by at most 1/17 of what it should be (half of the last of
  three mantissa bits), a smaller one by at most 2^-10 x S, or 2^-9 x S where it would become 0. As s <= S, none can
  exceed 448.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from struct import pack, unpack
from typing import Literal

from rewrite.planning.manifest import ScaleChange
from rewrite.planning.segments import Fill, Lookup
from rewrite.planning.shards import NewTensor
from rewrite.quantization.architectures import EXPERT_PROJECTIONS, Absorber, FusedLayer, find_architecture, text_config
from rewrite.quantization.atlas import find_sources
from rewrite.quantization.dtypes import decode, e4m3, encode, model_dtype
from rewrite.quantization.groups import FusedGroup, Module, Partition, packed_experts
from rewrite.quantization.model import Model
from rewrite.quantization.nvfp4 import Nvfp4, as_f32, find_nvfp4

Method = Literal["fold", "rescale"]

#: Of a rescaled block scale that is a normal number afterwards.
RESCALING = 1 / 17
#: Of a weight of a convolution in BF16: half a unit in the last place.
BF16_ROUNDING = 2.0**-8

#: A ratio that the epsilon of a norm (1e-6 beside the mean square of its input) does not notice; real ones are below 4.
_MAX_BEFORE_NORM = 16.0
_MAX_FILTERS = 1 << 20  # bytes; Qwen3.5-397B has 96 kB
_LEVELS = [e4m3(code) for code in range(127)]  # every value from 0 to 448, in order


@dataclass(frozen=True)
class Repair:
    """Edits by tensor, what they do to which layer, and by what share the weights of a partition may move."""

    edits: Mapping[str, NewTensor] = field(default_factory=dict)
    changes: tuple[ScaleChange, ...] = ()
    losses: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Scales:
    """Stored scales of one value, as bytes, by tensor."""

    raw: Mapping[str, bytes]

    def ratio(self, one: Nvfp4, other: Nvfp4) -> float:
        """How much larger the scale of ``one`` is than that of the ``other``."""
        a, b = (unpack("<f", self.raw[own.scale.name])[0] for own in (one, other))
        return float(b / a if one.divides else a / b)


def repair(model: Model, method: Method | None) -> Repair:
    """What gives every fused NVFP4 layer one global scale; layers that have one already are left alone.

    A layer with a scale that is not a positive number is left alone, too: ``inspect`` names it.
    """
    if method is None:
        return Repair()
    layers = [each for each in (*model.unequal_nvfp4, *_experts(model)) if all(map(_is_nvfp4, each.modules))]
    packed = {name: own for layer in layers for name, own in _packed(layer, model).items()}
    raw = _read(model, packed.values())
    edits: dict[str, NewTensor] = {}
    changes: list[ScaleChange] = []
    losses: dict[str, float] = {}
    for layer in layers:
        members = {module.name: packed[module.name] for module in layer.modules}
        if not _needs_repair(members, raw):
            continue
        done = _fold(layer, packed, raw, model) if method == "fold" else None
        own = done or _rescale(layer, members, raw)
        edits |= {**own.edits, **_one_input_scale(members, raw)}
        changes += own.changes or (ScaleChange(layer.name, "activations", "", {}, None),)
        losses |= {name: max(loss, losses.get(name, 0.0)) for name, loss in own.losses.items()}
    return Repair(edits, tuple(changes), losses)


def _experts(model: Model) -> Iterator[FusedGroup]:
    """Gate and up of every expert; folded in a model family that is known, and rescaled in one that the atlas has."""
    config = model.checkpoint.config.value
    is_known = find_architecture(config) is not None
    if not is_known and not find_sources(config):
        return
    for name, projections in packed_experts(model.checkpoint):
        for gate, up, down in EXPERT_PROJECTIONS:
            if {gate, up} <= projections and all(f"{name}.{each}" in model.kind_of for each in (gate, up)):
                pair = [model.module(f"{name}.{each}") for each in (gate, up)]
                named = zip(("gate", "up"), pair, strict=True)
                modules = tuple(replace(m, partitions=(Partition(part, 0, m.weight.shape[0]),)) for part, m in named)
                absorber = Absorber(gate, up, down) if is_known else None
                yield FusedGroup(name, FusedLayer("experts", "", {}, absorber), modules)


def _is_nvfp4(module: Module) -> bool:
    return module.nvfp4 is not None and module.scheme is not None and module.scheme.format == "NVFP4"


def _packed(layer: FusedGroup, model: Model) -> dict[str, Nvfp4]:
    """The modules of a layer, and the one behind it that may take a factor."""
    found = {module.name: module.nvfp4 for module in layer.modules}
    if (absorber := layer.layer.absorber) is not None:
        into = f"{_parent(layer)}.{absorber.into}"
        found[into] = find_nvfp4(into, model.checkpoint.tensors)
    return {name: own for name, own in found.items() if own is not None}


def _parent(layer: FusedGroup) -> str:
    return layer.modules[0].name.rpartition(".")[0]


def _read(model: Model, packed: Iterable[Nvfp4]) -> _Scales:
    infos = [info for own in packed for info in (own.scale, own.input_scale) if info is not None]
    return _Scales({info.name: raw for info, raw in model.checkpoint.read_tensors(infos)})


def _needs_repair(members: Mapping[str, Nvfp4], scales: _Scales) -> bool:
    own = list(members.values())
    if len({each.divides for each in own}) > 1:
        return False
    names = [info.name for each in own for info in (each.scale, each.input_scale) if info is not None]
    values = [unpack("<f", scales.raw[name])[0] for name in names]
    if not all(math.isfinite(value) and value > 0 for value in values):
        return False
    inputs = [each.input_scale for each in own]
    if any(info is None for info in inputs) and any(info is not None for info in inputs):
        return False
    kinds = ({scales.raw[each.scale.name] for each in own}, {scales.raw[info.name] for info in inputs if info})
    return any(len(kind) > 1 for kind in kinds)


def _one_input_scale(members: Mapping[str, Nvfp4], scales: _Scales) -> dict[str, NewTensor]:
    """All modules of a layer have the same input: the scale with the widest range, which saturates none of it."""
    infos = [own.input_scale for own in members.values() if own.input_scale is not None]
    if not infos:
        return {}
    divides = next(iter(members.values())).divides
    widest = (min if divides else max)((scales.raw[i.name] for i in infos), key=lambda raw: float(unpack("<f", raw)[0]))
    return {
        info.name: NewTensor("F32", info.shape, (Fill(widest, 1),)) for info in infos if scales.raw[info.name] != widest
    }


def _rescale(layer: FusedGroup, members: Mapping[str, Nvfp4], scales: _Scales) -> Repair:
    kept = next(iter(members))
    for name, own in members.items():
        if scales.ratio(own, members[kept]) > 1:
            kept = name
    edits: dict[str, NewTensor] = {}
    losses: dict[str, float] = {}
    ratios: dict[str, float] = {}
    for module, (name, own) in zip(layer.modules, members.items(), strict=True):
        if scales.raw[own.scale.name] == scales.raw[members[kept].scale.name]:
            continue
        ratio = ratios[name] = scales.ratio(own, members[kept])
        edits[own.scale.name] = _value(own, scales.raw[members[kept].scale.name])
        edits[own.blocks.name] = NewTensor(
            own.blocks.dtype, own.blocks.shape, (Lookup(0, own.blocks.nbytes, rescaled(ratio)),)
        )
        losses |= {f"{layer.layer.name}.{partition.name}": RESCALING for partition in module.partitions}
    return Repair(edits, (ScaleChange(layer.name, "rescaled", kept, ratios, None),) if ratios else (), losses)


def rescaled(ratio: float) -> tuple[bytes, ...]:
    """The E4M3 code of each of the 256 codes times ``ratio``, which is at most 1: to nearest, ties to even. What is not
    zero does not become zero; NaN stays."""
    return tuple(
        bytes([code if code & 0x7F == 0x7F else code & 0x80 | _nearest(_LEVELS[code & 0x7F] * ratio)])
        for code in range(256)
    )


def _nearest(value: float) -> int:
    """The code of the E4M3 number nearest to a ``value`` from 0 up."""
    if value == 0:
        return 0
    high = min(bisect_left(_LEVELS, value), 126)
    below, above = value - _LEVELS[high - 1], _LEVELS[high] - value
    code = high if above < below or (above == below and high % 2 == 0) else high - 1
    return max(code, 1)


def _fold(layer: FusedGroup, packed: Mapping[str, Nvfp4], scales: _Scales, model: Model) -> Repair | None:
    """None where the layer, or what follows it, is not of a kind that can take the ratio."""
    absorber, parent = layer.layer.absorber, _parent(layer)
    if absorber is None or len(layer.modules) != 2 or not _may_fold(model, f"{parent}.{absorber.folded}"):
        return None
    kept, folded = packed[f"{parent}.{absorber.kept}"], packed[f"{parent}.{absorber.folded}"]
    if scales.raw[kept.scale.name] == scales.raw[folded.scale.name]:
        return Repair()  # only the scales of the activations differ
    ratio, into = scales.ratio(folded, kept), f"{parent}.{absorber.into}"
    taken: dict[str, NewTensor] | None
    if absorber.kind == "convolution":
        taken = _convolution(into, folded, ratio, model)
    elif absorber.kind == "norm":
        taken = {} if _is_norm(into, model) and 1 / _MAX_BEFORE_NORM <= ratio <= _MAX_BEFORE_NORM else None
    else:
        taken = _linear(packed.get(into), folded, ratio, scales)
    if taken is None:
        return None
    edits = {folded.scale.name: _value(folded, scales.raw[kept.scale.name]), **taken}
    is_rounded = absorber.kind == "convolution" and not _is_power_of_two(ratio)
    name = f"{parent}.{absorber.folded}"
    hurt = [p.name for m in layer.modules if m.name == name for p in m.partitions] if is_rounded else []
    change = ScaleChange(layer.name, "folded", f"{parent}.{absorber.kept}", {name: ratio}, into)
    return Repair(edits, (change,), {f"{layer.layer.name}.{partition}": BF16_ROUNDING for partition in hurt})


def _is_power_of_two(ratio: float) -> bool:
    return math.frexp(ratio)[0] == 0.5


def _may_fold(model: Model, folded: str) -> bool:
    """Not where something is added between (a bias), or cut off (``swiglu_limit``), nor in float16, where the larger
    numbers in between might overflow."""
    config = model.checkpoint.config.value
    limited = "swiglu_limit" in text_config(config)
    return f"{folded}.bias" not in model.checkpoint.tensors and not limited and model_dtype(config) != "F16"


def _is_norm(into: str, model: Model) -> bool:
    """A norm that adds nothing."""
    tensors = model.checkpoint.tensors
    return f"{into}.weight" in tensors and f"{into}.bias" not in tensors


def _convolution(into: str, folded: Nvfp4, ratio: float, model: Model) -> dict[str, NewTensor] | None:
    """The depthwise convolution behind a projection: one filter a row."""
    info = model.checkpoint.tensors.get(f"{into}.weight")
    if info is None or info.nbytes > _MAX_FILTERS or info.dtype not in ("BF16", "F32"):
        return None
    if info.shape[:2] != (folded.blocks.shape[0], 1):
        return None
    old = decode(info.dtype, model.checkpoint.read_tensor(info.name), info.name)
    new = [as_f32(value * ratio) for value in old]
    raw = b"".join(encode(value, info.dtype) for value in new)
    rounded = decode(info.dtype, raw, info.name)
    if not all(math.isfinite(value) for value in rounded) or any(0 < abs(v) < 2.0**-126 for v in rounded):
        return None
    return {info.name: NewTensor(info.dtype, info.shape, (Fill(raw, 1),))}


def _linear(down: Nvfp4 | None, folded: Nvfp4, ratio: float, scales: _Scales) -> dict[str, NewTensor] | None:
    """The projection behind gate and up: its weights grow by the ratio, its input shrinks by it."""
    if down is None or down.divides != folded.divides:
        return None
    scale = _times(down, scales.raw[down.scale.name], ratio)
    if scale is None:
        return None
    edits = {down.scale.name: _value(down, scale)}
    if down.input_scale is not None:
        inputs = _times(down, scales.raw[down.input_scale.name], 1 / ratio)
        if inputs is None:
            return None
        edits[down.input_scale.name] = NewTensor("F32", down.input_scale.shape, (Fill(inputs, 1),))
    return edits


def _times(own: Nvfp4, raw: bytes, factor: float) -> bytes | None:
    """A stored scale that means ``factor`` times as much; None where it would not be a normal F32 number."""
    (stored,) = unpack("<f", raw)
    value = as_f32(stored / factor if own.divides else stored * factor)
    return pack("<f", value) if 2.0**-126 <= value < math.inf else None


def _value(own: Nvfp4, raw: bytes) -> NewTensor:
    return NewTensor("F32", own.scale.shape, (Fill(raw, 1),))


def repair_notes(changes: Iterable[ScaleChange]) -> Iterator[str]:
    """What was done to the scales, for people: a line for each way."""
    done = list(changes)
    into: dict[str, list[ScaleChange]] = {}
    for change in done:
        if change.how == "folded" and change.into is not None:
            into.setdefault(change.into.rpartition(".")[2], []).append(change)
    for last, own in into.items():
        where = f"they went into {last} behind it"
        if last.endswith("norm"):
            where = f"{last} behind it takes them away, but for its epsilon"
        elif not _is_linear(last):
            where += ", whose weights were rounded once"
        yield (
            f"NVFP4: {_several(own)} with one global scale now, ratios up to {_largest(own):.3g}: {where}; no block "
            "scale changed"
        )
    if own := [change for change in done if change.how == "rescaled"]:
        yield (
            f"NVFP4: {_several(own)} with one global scale now, ratios up to {_largest(own):.3g}: they went into the "
            f"block scales, each rounded once (by {RESCALING:.1%} at most; below 2^-6 by more). Quantizing the "
            "original again with one scale for these modules is more exact. Marlin kernels flush block scales below "
            "2^-6 where the largest is above 224"
        )
    if own := [change for change in done if change.how == "activations"]:
        yield f"NVFP4: {_several(own)} with one scale of the activations now, the widest"


def _is_linear(last: str) -> bool:
    return any(last == down for _, _, down in EXPERT_PROJECTIONS)


def _several(changes: list[ScaleChange]) -> str:
    return f"{len(changes):,} fused layers" if len(changes) > 1 else f"1 fused layer ({changes[0].name})"


def _largest(changes: list[ScaleChange]) -> float:
    """The ratio that is furthest from 1."""
    return max((max(r, 1 / r) for change in changes for r in change.ratios.values()), default=1.0)
