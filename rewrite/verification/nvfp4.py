"""NVFP4 in the check of the weights: fused layers have one global scale in OUT, and mean what they meant in IN.

Written without the planning. What may have become of a layer whose modules had different global scales:

- A module *keeps* its scale: its block scales are the same bytes.
- A module is *rescaled* to the largest scale S of the layer: its block scales b became b', and each |b' S - b s| is at
  most half the spacing of E4M3 there: 2^-4 of b s for normal numbers, 2^-10 S for subnormal ones; twice that where b'
  is the smallest number, which a positive b may not fall below.
- A module is *folded*: another scale, the same block scales, and what follows it makes up for the factor f: the
  filters of the convolution are 1 / f times what they were, within one rounding of their dtype; or the scale of the
  linear layer is 1 / f and that of its activations f times what it was, within the roundings of F32.

Codes are the same bytes always. Whether rows, order and everything else stayed is asked by the other checks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from rewrite.checkpoint.checkpoint import Checkpoint
from rewrite.checkpoint.header import TensorInfo
from rewrite.promise import Promise
from rewrite.quantization.groups import find_groups

#: Stored modules of an expert that engines fuse, and the one behind them.
_EXPERT = re.compile(r"((?!mtp\.).*\.experts\.\d+)\.(gate_proj|w1)")
_PAIRS = {"gate_proj": ("gate_proj", "up_proj"), "w1": ("w1", "w3")}
#: Of a pair of modules: the one whose scale may go on to a module behind it, and that module.
_BEHIND = {"in_proj_qkv": "conv1d", "up_proj": "down_proj", "w3": "w2"}
_F32_ROUNDINGS = 2.0**-22  # four of them
_CHUNK = 1 << 22


@dataclass(frozen=True)
class PackedModule:
    """The tensors of an NVFP4 module. ``divides``: its scales are divisors (compressed-tensors)."""

    name: str
    codes: TensorInfo
    blocks: TensorInfo
    scale: TensorInfo
    input_scale: TensorInfo | None
    divides: bool


@dataclass(frozen=True)
class PackedLayer:
    """NVFP4 modules that engines fuse, with different scales in IN. ``behind`` is what may make up for a factor of the
    module ``folded``: an NVFP4 module, or the weight of a convolution."""

    name: str
    modules: tuple[PackedModule, ...]
    folded: str | None
    behind: PackedModule | TensorInfo | None


def unequal_layers(source: Checkpoint) -> tuple[PackedLayer, ...]:
    """The layers of IN in which a scale differs, to the bit. Scales that are no positive numbers cannot be repaired."""
    layers = [layer for layer in _layers(source) if len({module.divides for module in layer.modules}) == 1]
    found = []
    for layer in layers:
        infos = [info for m in layer.modules for info in (m.scale, m.input_scale) if info is not None]
        values = {info.name: _value(source, info) for info in infos}
        kinds: dict[str, set[float]] = {}
        for info in infos:
            kinds.setdefault(info.name.rpartition(".")[2], set()).add(values[info.name])
        if all(0 < value < float("inf") for value in values.values()) and any(len(kind) > 1 for kind in kinds.values()):
            found.append(layer)
    return tuple(found)


def changeable(layers: tuple[PackedLayer, ...], promise: Promise) -> dict[str, TensorInfo]:
    """The tensors that the promise lets change: their bytes, not their form. The check below looks at each of them."""
    if promise.nvfp4 == "kept":
        return {}
    infos: list[TensorInfo | None] = []
    for layer in layers:
        for module in layer.modules:
            infos += [module.blocks, module.scale, module.input_scale]
        if promise.nvfp4 == "folded" and isinstance(layer.behind, PackedModule):
            infos += [layer.behind.scale, layer.behind.input_scale]
        elif promise.nvfp4 == "folded":
            infos.append(layer.behind)  # type: ignore[arg-type]
    return {info.name: info for info in infos if info is not None}


def problems_of(
    layers: tuple[PackedLayer, ...], source: Checkpoint, out: Checkpoint, promise: Promise
) -> Iterator[str]:
    """What is wrong with the layers of OUT."""
    if promise.nvfp4 == "kept":
        return
    for layer in layers:
        yield from _problems_of_layer(layer, source, out, promise)


def _layers(source: Checkpoint) -> Iterator[PackedLayer]:
    for group in find_groups(source).whole:
        names = [module.name for module in group.modules]
        if len(names) > 1:
            yield from _layer(group.name, names, source)
    for name in source.tensors:
        module, _, kind = name.rpartition(".")
        if kind in ("weight", "weight_packed") and (match := _EXPERT.fullmatch(module)):
            yield from _layer(match[1], [f"{match[1]}.{part}" for part in _PAIRS[match[2]]], source)


def _layer(name: str, names: list[str], source: Checkpoint) -> Iterator[PackedLayer]:
    modules = [_module(each, source) for each in names]
    if any(module is None for module in modules):
        return
    folded = next((each for each in names if each.rpartition(".")[2] in _BEHIND), None)
    behind: PackedModule | TensorInfo | None = None
    if folded is not None:
        parent, _, last = folded.rpartition(".")
        place = f"{parent}.{_BEHIND[last]}"
        behind = _filters(f"{place}.weight", source) if last == "in_proj_qkv" else _module(place, source)
    yield PackedLayer(name, tuple(m for m in modules if m is not None), folded, behind)


def _filters(name: str, source: Checkpoint) -> TensorInfo | None:
    info = source.tensors.get(name)
    return info if info is not None and info.dtype in ("BF16", "F32") else None


def _module(name: str, source: Checkpoint) -> PackedModule | None:
    get = source.tensors.get
    blocks = get(f"{name}.weight_scale")
    packed, divisor = get(f"{name}.weight_packed"), get(f"{name}.weight_global_scale")
    plain, multiplier = get(f"{name}.weight"), get(f"{name}.weight_scale_2")
    if blocks is None or blocks.dtype != "F8_E4M3":
        return None
    if packed is not None and divisor is not None:
        found = PackedModule(name, packed, blocks, divisor, get(f"{name}.input_global_scale"), divides=True)
    elif plain is not None and multiplier is not None:
        found = PackedModule(name, plain, blocks, multiplier, get(f"{name}.input_scale"), divides=False)
    else:
        return None
    scales = [info for info in (found.scale, found.input_scale) if info is not None]
    fits = found.codes.dtype == "U8" and len(found.codes.shape) == 2
    fits = fits and blocks.shape == (found.codes.shape[0], found.codes.shape[1] // 8)
    return found if fits and all((i.dtype, i.numel) == ("F32", 1) and len(i.shape) <= 1 for i in scales) else None


def _problems_of_layer(layer: PackedLayer, source: Checkpoint, out: Checkpoint, promise: Promise) -> Iterator[str]:
    for kind in ("scale", "input_scale"):
        infos = [info for module in layer.modules if (info := getattr(module, kind)) is not None]
        if len({out.read_tensor(info.name) for info in infos}) > 1:
            yield f"{layer.name}: the modules still have different values of {infos[0].name.rpartition('.')[2]}"
            return
    if layer.modules[0].input_scale is not None:
        yield from _widest_input(layer, source, out)
    old = {module.name: _multiplier(source, module) for module in layer.modules}
    new = _multiplier(out, layer.modules[0])
    if new not in old.values():
        yield f"{layer.name}: the global scale of OUT is that of none of its modules in IN"
        return
    factor = 1.0
    for module in layer.modules:
        if not _same_bytes(source, out, module.codes):
            yield f"{module.codes.name}: the codes differ"
        same_blocks = _same_bytes(source, out, module.blocks)
        if new == old[module.name]:
            if not same_blocks:
                yield f"{module.blocks.name}: the block scales differ, the global scale does not"
        elif same_blocks and promise.nvfp4 == "folded" and module.name == layer.folded:
            factor = new / old[module.name]
        elif new != max(old.values()):
            yield f"{module.name}: rescaled to a scale that is not the largest of the layer"
        else:
            yield from _rescaled(module, source, out, old[module.name], new)
    if promise.nvfp4 == "folded":
        yield from _made_up(layer.behind, source, out, factor)


def _widest_input(layer: PackedLayer, source: Checkpoint, out: Checkpoint) -> Iterator[str]:
    infos = [module.input_scale for module in layer.modules if module.input_scale is not None]
    values = [_value(source, info) for info in infos]
    widest = min(values) if layer.modules[0].divides else max(values)
    if _value(out, infos[0]) != widest:
        yield f"{infos[0].name}: not the widest of the layer's"


def _rescaled(module: PackedModule, source: Checkpoint, out: Checkpoint, old: float, new: float) -> Iterator[str]:
    """``old`` and ``new`` are scales to multiply with."""
    before, after = (_read(each, module.blocks).double() for each in (source, out))
    meant, found = before * old, after * new
    bound = torch.clamp(meant.abs() * 2.0**-4, min=2.0**-10 * new)
    smallest = after.abs() == 2.0**-9
    bound = torch.where(smallest & (meant.abs() < 2.0**-9 * new), 2.0**-9 * new, bound)
    # Divisors make the ratio one of two F32 numbers, none of which is rounded; this is float64's own rounding.
    wrong = (found - meant).abs() > bound * (1 + 1e-9)
    wrong |= (before == 0) != (after == 0)
    wrong |= before.isnan() != after.isnan()
    if wrong.any():
        yield f"{module.blocks.name}: {int(wrong.sum())} block scales are off by more than one rounding"


def _made_up(
    behind: PackedModule | TensorInfo | None, source: Checkpoint, out: Checkpoint, factor: float
) -> Iterator[str]:
    """What follows a folded module takes the inverse of ``factor``; 1: it must be as it was."""
    if behind is None:
        if factor != 1:
            yield "a scale was folded into nothing"
        return
    if isinstance(behind, TensorInfo):
        before, after = (_read(each, behind).double() for each in (source, out))
        rounding = 0.0 if factor == 1 else torch.finfo(_DTYPES[behind.dtype]).eps / 2 + _F32_ROUNDINGS
        if ((after * factor - before).abs() > before.abs() * rounding).any() or bool(
            (before == 0).ne(after == 0).any()
        ):
            yield f"{behind.name}: does not make up for the factor {factor:.6g} of what it follows"
        return
    pairs = [(behind.scale, 1 / factor)] + ([(behind.input_scale, factor)] if behind.input_scale else [])
    for info, wanted in pairs:
        ratio = _value(out, info) / _value(source, info)
        ratio = 1 / ratio if behind.divides else ratio
        if abs(ratio / wanted - 1) > (0 if factor == 1 else _F32_ROUNDINGS):
            yield f"{info.name}: {ratio:.9g} times what it was, to make up for the layer before it {wanted:.9g}"


def _multiplier(checkpoint: Checkpoint, module: PackedModule) -> float:
    value = _value(checkpoint, module.scale)
    return 1 / value if module.divides else value


_DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16}


def _value(checkpoint: Checkpoint, info: TensorInfo) -> float:
    return float(torch.frombuffer(bytearray(checkpoint.read_tensor(info.name)), dtype=torch.float32))


def _read(checkpoint: Checkpoint, info: TensorInfo) -> torch.Tensor:
    raw = b"".join(_chunks(checkpoint, info))
    return torch.frombuffer(bytearray(raw), dtype=_DTYPES[info.dtype])


def _chunks(checkpoint: Checkpoint, info: TensorInfo) -> Iterator[bytes]:
    """The bytes of a tensor of this name, a few MB at a time."""
    own = checkpoint.tensors[info.name]
    start = checkpoint.shards[own.shard].header.size + own.start
    with checkpoint.storage.open(own.shard) as file:
        for offset in range(0, own.nbytes, _CHUNK):
            yield file.read(start + offset, min(_CHUNK, own.nbytes - offset))


def _same_bytes(source: Checkpoint, out: Checkpoint, info: TensorInfo) -> bool:
    return all(a == b for a, b in zip(_chunks(source, info), _chunks(out, info), strict=True))
