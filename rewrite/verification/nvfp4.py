"""NVFP4 in the check of the weights: fused layers have one global scale in OUT, and mean what they meant in IN.

Written without the planning. What may have become of a layer whose modules had different global scales:

- A module *keeps* its scale: its block scales are the same bytes.
- A module is *rescaled* to the largest scale S of the layer: its block scales b became b', and each |b' S - b s| is at
  most half the spacing of E4M3 there: 2^-4 of b s for normal numbers, 2^-10 S for subnormal ones; twice that where b'
  is the smallest number, which a positive b may not fall below.
- A module is *folded*: another scale, the same block scales, and what follows it makes up for the factor f: the
  filters of the convolution are 1 / f times what they were, within one rounding of their dtype; or the scale of the
  linear layer is 1 / f and that of its activations f times what it was, within the roundings of F32. A norm makes up
  for any f without a change, but for its epsilon.

Codes are the same bytes always. Whether rows, order and everything else stayed is asked by the other checks.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from rewrite.checkpoint.checkpoint import Checkpoint
from rewrite.checkpoint.header import TensorInfo
from rewrite.promise import Promise
from rewrite.verification.packed import Norm, PackedLayer, PackedModule, read_value
from rewrite.verification.reader import in_chunks, read_rows
from rewrite.verification.reading import Reading
from rewrite.verification.sample import Sample
from rewrite.verification.values import Bytes, Values, code_values, decode

_F32_ROUNDINGS = 2.0**-22  # four of them
_LARGEST = 16.5  # factor of the input of a norm
_CHUNK = 1 << 22


def problems_of(
    layers: tuple[PackedLayer, ...],
    source: Checkpoint,
    out: Checkpoint,
    promise: Promise,
    reading: Reading | None,
    sample: Sample,
) -> Iterator[str]:
    """What is wrong with the layers of OUT. ``reading``: what the pass over the files found of the codes; None: those
    of ``sample`` are compared."""
    if promise.nvfp4 == "kept":
        return
    for layer in layers:
        for module in layer.modules:
            if _codes_differ(source, out, module, reading, sample):
                yield f"{module.codes.name}: the codes differ"
        yield from _problems_of_layer(layer, source, out, promise)


def cost_of(layers: tuple[PackedLayer, ...], source: Checkpoint, out: Checkpoint) -> float:
    """By what share rounding moved a weight at most: by its block scale, or by the filter that took a ratio."""
    costs = [0.0]
    for layer in layers:
        new = multiplier(out, layer.modules[0])
        for module in layer.modules:
            if not same_bytes(source, out, module.blocks):
                before, after, _ = _code_pairs(module, source, out)
                meant, found = before * multiplier(source, module), after * new
                costs.append(float(np.max(np.abs(found - meant)[meant != 0] / np.abs(meant[meant != 0]), initial=0.0)))
        if isinstance(layer.behind, TensorInfo) and not same_bytes(source, out, layer.behind):
            costs.append(2.0 ** -_DIGITS[layer.behind.dtype])
    return max(costs)


def _codes_differ(
    source: Checkpoint, out: Checkpoint, module: PackedModule, reading: Reading | None, sample: Sample
) -> bool:
    info = module.codes
    if reading is not None:
        return not reading.same(info.name) and not same_bytes(source, out, info)
    return not all(
        np.array_equal(read_rows(source, info.name, runs), read_rows(out, info.name, runs))
        for runs in in_chunks(sample.of(module.name, module.partition))
    )


def _problems_of_layer(layer: PackedLayer, source: Checkpoint, out: Checkpoint, promise: Promise) -> Iterator[str]:
    for kind in ("scale", "input_scale"):
        infos = [info for module in layer.modules if (info := getattr(module, kind)) is not None]
        if len({out.read_tensor(info.name) for info in infos}) > 1:
            yield f"{layer.name}: the modules still have different values of {infos[0].name.rpartition('.')[2]}"
            return
    if layer.modules[0].input_scale is not None:
        yield from _widest_input(layer, source, out)
    old = {module.name: multiplier(source, module) for module in layer.modules}
    new = multiplier(out, layer.modules[0])
    if new not in old.values():
        yield f"{layer.name}: the global scale of OUT is that of none of its modules in IN"
        return
    factor = 1.0
    for module in layer.modules:
        same_blocks = same_bytes(source, out, module.blocks)
        if new == old[module.name]:
            if not same_blocks:
                yield f"{module.blocks.name}: the block scales differ, the global scale does not"
        elif same_blocks and promise.nvfp4 == "folded" and module.name == layer.folded and layer.behind is not None:
            factor = new / old[module.name]
        elif new != max(old.values()):
            yield f"{module.name}: rescaled to a scale that is not the largest of the layer"
        else:
            yield from rescaled(module, source, out, old[module.name], new)
    if promise.nvfp4 == "folded":
        yield from _made_up(layer.behind, source, out, factor)


def _widest_input(layer: PackedLayer, source: Checkpoint, out: Checkpoint) -> Iterator[str]:
    infos = [module.input_scale for module in layer.modules if module.input_scale is not None]
    values = [read_value(source, info) for info in infos]
    widest = min(values) if layer.modules[0].divides else max(values)
    if read_value(out, infos[0]) != widest:
        yield f"{infos[0].name}: not the widest of the layer's"


def rescaled(module: PackedModule, source: Checkpoint, out: Checkpoint, old: float, new: float) -> Iterator[str]:
    """Where block scales are no longer what they meant. ``old`` and ``new`` are scales to multiply with."""
    before, after, times = _code_pairs(module, source, out)
    with np.errstate(invalid="ignore"):
        wrong = _too_far(before, after, old, new)
    if wrong.any():
        yield f"{module.blocks.name}: {int(times[wrong].sum())} block scales are off by more than one rounding"


def _code_pairs(module: PackedModule, source: Checkpoint, out: Checkpoint) -> tuple[Values, Values, Values]:
    """Which block scales of IN became which of OUT, and how often."""
    seen = np.zeros(1 << 16, np.int64)
    for one, other in zip(_chunks(source, module.blocks), _chunks(out, module.blocks), strict=True):
        pairs = np.frombuffer(one, np.uint8).astype(np.uint16) << 8 | np.frombuffer(other, np.uint8)
        seen += np.bincount(pairs, minlength=1 << 16)
    pairs = np.flatnonzero(seen)
    before, after = (code_values("F8_E4M3").astype(np.float64)[codes] for codes in (pairs >> 8, pairs & 0xFF))
    return before, after, seen[pairs].astype(np.float64)


def _too_far(before: Values, after: Values, old: float, new: float) -> npt.NDArray[np.bool_]:
    meant, found = before * old, after * new
    bound = np.maximum(np.abs(meant) * 2.0**-4, 2.0**-10 * new)
    smallest = np.abs(after) == 2.0**-9
    bound = np.where(smallest & (np.abs(meant) < 2.0**-9 * new), 2.0**-9 * new, bound)
    # Divisors make the ratio one of two F32 numbers, none of which is rounded; this is float64's own rounding.
    too_far = np.abs(found - meant) > bound * (1 + 1e-9)
    zero, nan = (before == 0) != (after == 0), np.isnan(before) != np.isnan(after)
    return np.asarray(np.logical_or.reduce([too_far, zero, nan]), np.bool_)


def _made_up(
    behind: PackedModule | TensorInfo | Norm | None, source: Checkpoint, out: Checkpoint, factor: float
) -> Iterator[str]:
    """What follows a folded module takes the inverse of ``factor``; 1: it must be as it was."""
    if behind is None:
        if factor != 1:
            yield "a scale was folded into nothing"
        return
    if isinstance(behind, Norm):  # its weight is compared with all that must not change
        if not 1 / _LARGEST <= factor <= _LARGEST:
            yield f"a norm stands behind a factor of {factor:.3g}: its epsilon may count"
        return
    if isinstance(behind, TensorInfo):
        before, after = (_values(each, behind) for each in (source, out))
        rounding = np.zeros(after.shape) if factor == 1 else _half_a_unit(after, behind.dtype)
        off = np.abs(after - before / factor) > rounding
        if (off | ((before == 0) != (after == 0))).any():
            yield f"{behind.name}: does not make up for the factor {factor:.6g} of what it follows"
        return
    pairs = [(behind.scale, 1 / factor)] + ([(behind.input_scale, factor)] if behind.input_scale else [])
    for info, wanted in pairs:
        ratio = read_value(out, info) / read_value(source, info)
        ratio = 1 / ratio if behind.divides else ratio
        if abs(ratio / wanted - 1) > (0 if factor == 1 else _F32_ROUNDINGS):
            yield f"{info.name}: {ratio:.9g} times what it was, to make up for the layer before it {wanted:.9g}"


def multiplier(checkpoint: Checkpoint, module: PackedModule) -> float:
    """What the global scale of a module multiplies with."""
    value = read_value(checkpoint, module.scale)
    return 1 / value if module.divides else value


_DIGITS = {"BF16": 8, "F32": 24}  # of a number, in bits


def _half_a_unit(values: Values, dtype: str) -> Values:
    """Half of the last place of each; BF16 is rounded from F32, F32 from float64."""
    place = np.frexp(values)[1] - _DIGITS[dtype] - 1
    return np.asarray(np.ldexp(1.0, place) + np.abs(values) * (2.0**-24 if dtype == "BF16" else 2.0**-48))


def _values(checkpoint: Checkpoint, info: TensorInfo) -> Values:
    raw: Bytes = np.frombuffer(b"".join(_chunks(checkpoint, info)), np.uint8)
    return decode(info.dtype, raw).astype(np.float64)


def _chunks(checkpoint: Checkpoint, info: TensorInfo) -> Iterator[bytes]:
    """The bytes of the tensor of this name, a few MB at a time."""
    own = checkpoint.tensors[info.name]
    start = checkpoint.shards[own.shard].header.size + own.start
    with checkpoint.storage.open(own.shard) as file:
        for offset in range(0, own.nbytes, _CHUNK):
            yield file.read(start + offset, min(_CHUNK, own.nbytes - offset))


def same_bytes(source: Checkpoint, out: Checkpoint, info: TensorInfo) -> bool:
    """Whether a tensor of this name is the same bytes in both."""
    return all(a == b for a, b in zip(_chunks(source, info), _chunks(out, info), strict=True))
