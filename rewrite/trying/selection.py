"""Which layers of a checkpoint are enough: one of each kind, the first, the last, the one whose scales differ most."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rewrite.checkpoint.checkpoint import Checkpoint
from rewrite.checkpoint.forms import Form
from rewrite.checkpoint.header import TensorInfo
from rewrite.errors import Unsupported, UsageError
from rewrite.quantization.dtypes import decode

_LAYER = re.compile(r"^(.*?\b(?:layers|h|blocks))\.(\d+)\.(.+)$")
_AT_ONCE = 1 << 29  # weights that are loaded at once: 2 GiB without quantization


@dataclass(frozen=True)
class Layers:
    """``runs``: first and last layers of the ``stack``, each loaded at once; ``count``: how many the stack has."""

    stack: str
    runs: tuple[tuple[int, int], ...]
    count: int

    @property
    def chosen(self) -> tuple[int, ...]:
        return tuple(layer for first, last in self.runs for layer in range(first, last + 1))


def select(checkpoint: Checkpoint, wanted: str) -> Layers | None:
    """The layers that ``wanted`` names: ``auto``, ``all``, ``5``, ``0-3`` or ``0-3,17``; None where the whole model is
    loaded at once: nothing would be left out, and it is small."""
    stacks = _stacks(checkpoint)
    if not stacks:
        return None
    stack = max(stacks, key=lambda name: stacks[name][1])
    layers = stacks[stack][0]
    if wanted == "all":
        chosen = set(layers)
    else:
        chosen = _auto(checkpoint, layers) if wanted == "auto" else _named(wanted, layers)
    sizes = {layer: sum(_weights(checkpoint.tensors[name]) for name in layers[layer]) for layer in layers}
    runs = _runs(chosen, sizes)
    return None if chosen == set(layers) and len(runs) == 1 else Layers(stack, runs, len(layers))


def _stacks(checkpoint: Checkpoint) -> dict[str, tuple[dict[int, list[str]], int]]:
    """Prefix to the names of each layer's tensors, and how many bytes they have."""
    found: dict[str, tuple[dict[int, list[str]], int]] = {}
    for name, info in checkpoint.tensors.items():
        if match := _LAYER.match(name):
            layers, size = found.get(match[1], ({}, 0))
            layers.setdefault(int(match[2]), []).append(name)
            found[match[1]] = layers, size + info.nbytes
    return found


def _auto(checkpoint: Checkpoint, layers: dict[int, list[str]]) -> set[int]:
    kinds: dict[frozenset[Form], int] = {}
    for layer in sorted(layers):  # of a kind: experts count once, whatever their numbers are
        kinds.setdefault(frozenset(checkpoint.forms[name.rpartition(".")[0]] for name in layers[layer]), layer)
    return {*kinds.values(), min(layers), max(layers), _worst(checkpoint, layers)}


def _worst(checkpoint: Checkpoint, layers: dict[int, list[str]]) -> int:
    """The layer in which two modules side by side have the scales that are furthest apart."""
    names = {name: layer for layer, held in layers.items() for name in held}
    scales = [
        info for name, info in checkpoint.tensors.items()
        if name in names and "weight" in _last(name) and "scale" in name and info.dtype in ("F32", "BF16", "F16")
        and math.prod(info.shape) == 1
    ]  # fmt: skip
    values: dict[tuple[int, str], list[float]] = {}
    for info, raw in checkpoint.read_tensors(scales):
        try:
            (value,) = decode(info.dtype, raw, info.name)
        except Unsupported:
            continue
        if 0 < value < math.inf:
            values.setdefault((names[info.name], info.name.rpartition(".")[0].rpartition(".")[0]), []).append(value)
    ratios = {key: max(found) / min(found) for key, found in values.items()}
    return max(ratios, key=lambda key: ratios[key])[0] if ratios else min(layers)


def _weights(info: TensorInfo) -> int:
    """How many weights a tensor holds: two a byte in NVFP4."""
    return math.prod(info.shape) * (2 if info.dtype == "U8" else 1)


def _last(name: str) -> str:
    """The name inside its layer."""
    match = _LAYER.match(name)
    return match[3] if match else name


def _named(wanted: str, layers: Iterable[int]) -> set[int]:
    known, chosen = set(layers), set[int]()
    for part in wanted.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if match is None:
            raise UsageError("--layers can't be read", expected="auto, all, 5, 0-3 or 0-3,17", found=wanted)
        chosen |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    if not chosen or chosen - known:
        raise UsageError("There are no such layers", expected=f"{min(known)} to {max(known)}", found=wanted)
    return chosen


def _runs(chosen: Iterable[int], sizes: Mapping[int, int]) -> tuple[tuple[int, int], ...]:
    """First and last of layers that follow each other, as many as can be loaded at once."""
    runs: list[tuple[int, int]] = []
    loaded = 0
    for layer in sorted(chosen):
        if runs and runs[-1][1] == layer - 1 and loaded + sizes[layer] <= _AT_ONCE:
            runs[-1] = runs[-1][0], layer
            loaded += sizes[layer]
        else:
            runs.append((layer, layer))
            loaded = sizes[layer]
    return tuple(runs)
