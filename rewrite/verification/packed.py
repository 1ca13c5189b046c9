"""Which fused NVFP4 layers of IN have several global scales, and which tensors a conversion may change for it.

Written without the planning, and without torch: what is done to them is judged in ``nvfp4.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from struct import unpack

from rewrite.checkpoint.checkpoint import Checkpoint
from rewrite.checkpoint.header import TensorInfo
from rewrite.promise import Promise
from rewrite.quantization.architectures import find_architecture
from rewrite.quantization.atlas import find_sources
from rewrite.quantization.groups import Partition, find_groups

#: Stored modules of an expert that engines fuse, and the one behind them.
_EXPERT = re.compile(r"((?!mtp\.).*\.experts\.\d+)\.(gate_proj|w1)")
_PAIRS = {"gate_proj": ("gate_proj", "up_proj"), "w1": ("w1", "w3")}
#: Of a pair of modules: the one whose scale may go on to a module behind it, and that module.
_BEHIND = {"in_proj_qkv": "conv1d", "up_proj": "down_proj", "w3": "w2", "q_a_proj": "q_a_layernorm"}


@dataclass(frozen=True)
class PackedModule:
    """The tensors of an NVFP4 module. ``divides``: its scales are divisors (compressed-tensors)."""

    name: str
    codes: TensorInfo
    blocks: TensorInfo
    scale: TensorInfo
    input_scale: TensorInfo | None
    divides: bool

    @property
    def partition(self) -> Partition:
        """All of its rows."""
        return Partition("", 0, self.codes.shape[0])


@dataclass(frozen=True)
class Norm:
    """A norm without a bias, behind a projection without one: its output does not depend on the size of its input."""


@dataclass(frozen=True)
class PackedLayer:
    """NVFP4 modules that engines fuse, with different scales in IN. ``behind`` is what may make up for a factor of the
    module ``folded``: an NVFP4 module, the weight of a convolution, or a norm, which does so without a change."""

    name: str
    modules: tuple[PackedModule, ...]
    folded: str | None
    behind: PackedModule | TensorInfo | Norm | None


def unequal_layers(source: Checkpoint) -> tuple[PackedLayer, ...]:
    """The layers of IN in which a scale differs, to the bit. Scales that are no positive numbers cannot be repaired."""
    layers = [layer for layer in _layers(source) if len({module.divides for module in layer.modules}) == 1]
    found = []
    for layer in layers:
        infos = [info for m in layer.modules for info in (m.scale, m.input_scale) if info is not None]
        values = {info.name: read_value(source, info) for info in infos}
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
        elif promise.nvfp4 == "folded" and isinstance(layer.behind, TensorInfo):
            infos.append(layer.behind)
    return {info.name: info for info in infos if info is not None}


def tensors_of(layers: tuple[PackedLayer, ...]) -> list[TensorInfo]:
    """Every tensor of the layers, and of what is behind them."""
    behind = [layer.behind for layer in layers if isinstance(layer.behind, PackedModule)]
    infos = [layer.behind for layer in layers if isinstance(layer.behind, TensorInfo)]
    for module in (*(module for layer in layers for module in layer.modules), *behind):
        infos += [module.codes, module.blocks, module.scale, *([module.input_scale] if module.input_scale else [])]
    return infos


def _layers(source: Checkpoint) -> Iterator[PackedLayer]:
    for group in find_groups(source).whole:
        if len(group.modules) > 1 and group.nvfp4:  # all of one kind: of others it is not known what engines make
            yield from _layer(group.name, [module.name for module in group.modules], source)
    config = source.config.value
    if find_architecture(config) is None and not find_sources(config):
        return  # what engines fuse there is not known
    for name in source.tensors:
        module, _, kind = name.rpartition(".")
        if kind in ("weight", "weight_packed") and (match := _EXPERT.fullmatch(module)):
            yield from _layer(match[1], [f"{match[1]}.{part}" for part in _PAIRS[match[2]]], source)


def _layer(name: str, names: list[str], source: Checkpoint) -> Iterator[PackedLayer]:
    modules = [_module(each, source) for each in names]
    if any(module is None for module in modules):
        return
    folded = next((each for each in names if each.rpartition(".")[2] in _BEHIND), None)
    behind: PackedModule | TensorInfo | Norm | None = None
    if folded is not None:
        parent, _, last = folded.rpartition(".")
        place = f"{parent}.{_BEHIND[last]}"
        if last == "q_a_proj":
            behind = _norm(folded, place, source)
        else:
            behind = _filters(f"{place}.weight", source) if last == "in_proj_qkv" else _module(place, source)
    yield PackedLayer(name, tuple(m for m in modules if m is not None), folded, behind)


def _norm(folded: str, place: str, source: Checkpoint) -> Norm | None:
    biases = {f"{folded}.bias", f"{place}.bias"} & source.tensors.keys()
    return Norm() if f"{place}.weight" in source.tensors and not biases else None


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


def read_value(checkpoint: Checkpoint, info: TensorInfo) -> float:
    """A scale of one F32, as stored."""
    return float(unpack("<f", checkpoint.read_tensor(info.name))[0])
