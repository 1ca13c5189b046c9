"""What is wrong in the values of scales: each is finite, positive, and of a size that trained weights have.

Scales of one number, of rows and of large blocks are looked at as they are read, thousands at a time: there may be
300,000, and hardly ever a bad one. Block scales of FP4 are a ninth of a checkpoint: up to 64 MiB of them are read,
then of each its beginning.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, islice, pairwise
from math import inf, isfinite, prod
from statistics import median

from rewrite.checkpoint.header import TensorInfo
from rewrite.ledger.fault import CALIBRATE, VALUES, Fault
from rewrite.ledger.formats import WEIGHT_SCALES
from rewrite.quantization.dtypes import PLAIN_DTYPES, decode
from rewrite.quantization.model import Model
from rewrite.quantization.scales import PLAUSIBLE, bad_values

_BLOCK_BYTES = 64 << 20  # of block scales, of a checkpoint that is at hand
_REMOTE_BYTES = 4 << 20  # of one that is not
_MAX_RUN = 1 << 20  # what a checkpoint reads of a tensor at most
_LARGEST_WEIGHT = 1e5  # weights of 1e5 have no model; activations of 1e5 do not fit F16
_FP8, _NVFP4 = 448.0, 448.0 * 6  # the largest code, and the largest code with the largest block scale
_FAR = 512  # layers that are alike differ by less than 100
_ENOUGH = 4  # neighbors that say what is usual
_LOOKS = 16  # blocks with a scale of zero whose codes are looked at
_NOT_SET = "probably never set by calibration"


#: Scales of one number, and it.
_Single = list[tuple[TensorInfo, float]]


def value_faults(model: Model) -> tuple[Fault, ...]:
    return (*_floats(model), *_blocks(model))


def left(found: Iterable[Fault], dropped: Collection[str]) -> Iterator[Fault]:
    """Those of the values of scales that are there after a conversion, too, which ``dropped`` these tensors: none makes
    a scale good that is not, whatever it calls it then, but some leave it out."""
    gone = frozenset(dropped)
    return (fault for fault in found if fault.code in VALUES and fault.tensor not in gone)


def _floats(model: Model) -> Iterator[Fault]:
    """The sign of scales of integers does not count: AutoRound makes some negative on purpose (-8 to 7 is not
    even)."""
    integers = {name for kind in model.kinds if _is_integer(kind.first.scheme) for name in kind.names}
    checkpoint = model.checkpoint
    single: _Single = []
    wrong: set[str] = set()
    for run, raw in checkpoint.read_runs(_scales(checkpoint.tensors.values())):
        for own, values in _decoded(run, raw):
            places = list(accumulate([prod(info.shape) for info in own], initial=0))
            if not _is_usual(own[0], values):
                for info, (begin, end) in zip(own, pairwise(places), strict=True):
                    numbers = values[begin:end]
                    is_signed = info.name.rpartition(".")[0] in integers
                    bad = [*_bad_value(info, tuple(map(abs, numbers)) if is_signed else numbers, model)]
                    wrong |= {info.name for _ in bad}
                    yield from bad
            single += [
                (info, values[place])
                for info, place in zip(own, places, strict=False)
                if info.shape in ((), (1,)) and info.name.endswith(_ENDS_OF_WEIGHTS)
            ]
    yield from (fault for info, fault in _far_off(single, model) if info.name not in wrong)


def _decoded(run: Sequence[TensorInfo], raw: bytes) -> Iterator[tuple[Sequence[TensorInfo], tuple[float, ...]]]:
    """The numbers of tensors that were read in one go, by dtype; those to divide by apart."""
    kinds = [(info.dtype, info.name.endswith(_DIVISORS)) for info in run]
    for kind in sorted(set(kinds)):
        own = [info for info, its in zip(run, kinds, strict=True) if its == kind]
        is_all = sum([info.end - info.start for info in own]) == len(raw)
        first = run[0].start
        theirs = raw if is_all else b"".join([raw[info.start - first : info.end - first] for info in own])
        yield own, decode(kind[0], theirs, own[0].name)


def _is_usual(first: TensorInfo, values: Sequence[float]) -> bool:
    """Whether nothing is wrong with any of these; NaN is seen by the sum."""
    low, high = (1 / _USUAL, 1 / PLAUSIBLE[0]) if first.name.endswith(_DIVISORS) else (PLAUSIBLE[0], _USUAL)
    return isfinite(sum(values)) and low <= min(values, default=low) and max(values, default=high) <= high


def _bad_value(info: TensorInfo, values: tuple[float, ...], model: Model) -> Iterator[Fault]:
    where, kind = f"{info.shard}: {info.name}", info.name.rpartition(".")[2]
    if bad := sorted(bad_values(values), key=isfinite):  # what is no number first: is_finite
        yield Fault("scale-value", where, f"{bad[0]}{_and_more(bad)}", "finite and above 0", CALIBRATE)
        return
    is_inverse = kind in _DIVISORS
    factor = _NVFP4 if _is_global(info, model) else _FP8
    sizes = [factor / value if is_inverse else factor * value for value in values]
    low, high = (_NVFP4 * PLAUSIBLE[0], _LARGEST_WEIGHT) if factor == _NVFP4 else _bounds(kind)
    odd = [value for value, size in zip(values, sizes, strict=True) if not low <= size <= high]
    if not odd:
        return
    meant = factor * odd[0] if is_inverse else factor / odd[0]
    if (factor == _NVFP4 or kind in WEIGHT_SCALES) and 1e-6 <= meant <= _LARGEST_WEIGHT:
        word = "divisor" if is_inverse else "multiplier"
        found = f"{odd[0]:.3g}, a {word}: numbers up to {sizes[values.index(odd[0])]:.3g}"
        yield Fault("scale-inverse", where, found, f"its reciprocal gives {meant:.3g}", CALIBRATE)
    else:
        yield Fault(
            "scale-value", where, f"{odd[0]:.3g}{_and_more(odd)}: {_NOT_SET}", "what training leads to", CALIBRATE
        )


_DIVISORS = ("weight_global_scale", "input_global_scale")
_ENDS_OF_WEIGHTS = tuple(f".{kind}" for kind in (*WEIGHT_SCALES, "weight_scale_2", "weight_global_scale"))
_USUAL = _LARGEST_WEIGHT / _NVFP4  # what is not above this needs no second look, but for divisors


def _bounds(kind: str) -> tuple[float, float]:
    if kind in WEIGHT_SCALES:
        return _FP8 * PLAUSIBLE[0], _LARGEST_WEIGHT
    return _FP8 * PLAUSIBLE[0], _FP8 * PLAUSIBLE[1]


def _is_global(info: TensorInfo, model: Model) -> bool:
    """Of NVFP4, to multiply a whole matrix with, or its input."""
    module, _, kind = info.name.rpartition(".")
    if kind in (*_DIVISORS, "weight_scale_2"):
        return True
    return kind == "input_scale" and f"{module}.weight_scale_2" in model.checkpoint.tensors


def _far_off(single: _Single, model: Model) -> Iterator[tuple[TensorInfo, Fault]]:
    """The weight scales of one number that are far from those of layers that are alike, which are near each other.
    Activations of layers that are alike do differ by thousands."""
    if _are_near([value for _, value in single]):
        return
    alike: dict[tuple[str, str], _Single] = {}
    for info, value in single:
        module, _, kind = info.name.rpartition(".")
        alike.setdefault((model.checkpoint.forms[module].pattern, kind), []).append((info, value))
    for (_, kind), own in alike.items():
        values = [value for _, value in own]
        if len(values) > _ENOUGH and not _are_near(values):
            yield from _far_from_usual(kind, own, median(values), model)


def _are_near(values: Sequence[float]) -> bool:
    """Of all weight scales, or of those of layers that are alike: where all are, so are some."""
    return not values or 0 < max(values) < min(values) * _FAR


def _far_from_usual(kind: str, own: _Single, usual: float, model: Model) -> Iterator[tuple[TensorInfo, Fault]]:
    far = [(i, v) for i, v in own if not usual / _FAR < v < usual * _FAR]
    if len(far) * 4 > len(own) or not PLAUSIBLE[0] < usual < PLAUSIBLE[1]:
        return
    for info, value in far:
        if not 0 < value < inf:
            continue  # found already
        is_small = (value < usual) != (kind in _DIVISORS)
        if is_small and _is_empty(info, model):
            continue  # a layer of zeros
        found, expected = f"{value:.3g}", f"about {usual:.3g}, as in {len(own) - len(far):,} layers like it"
        yield info, Fault("scale-size", f"{info.shard}: {info.name}", found, expected, CALIBRATE)


def _is_empty(scale: TensorInfo, model: Model) -> bool:
    """Whether the beginning of the weight of a scale is nothing but zeros."""
    module, tensors = scale.name.rpartition(".")[0], model.checkpoint.tensors
    weight = tensors.get(f"{module}.weight") or tensors.get(f"{module}.weight_packed")
    if weight is None:
        return True
    (_, raw), *_ = model.checkpoint.read_tensors([_part(weight, 0, min(weight.nbytes, 4096))])
    return not raw.strip(b"\0\x80\x88\x08")


def _blocks(model: Model) -> Iterator[Fault]:
    """Block scales of one byte: E4M3 of NVFP4, powers of two of the MX formats."""
    infos = list(model.checkpoint.tensors_like(_is_block))
    total = sum(info.nbytes for info in infos)
    budget = _BLOCK_BYTES if model.checkpoint.storage.readers == 1 else _REMOTE_BYTES
    limit = max(budget // max(len(infos), 1), 16) if total > budget else budget
    whole = {info.name: info for info in infos}
    pieces = (piece for info in infos for piece in _pieces(info, min(info.nbytes, limit)))
    for info, raw in model.checkpoint.read_tensors(pieces):
        yield from _in_block(whole[info.name], info.start - whole[info.name].start, raw, model)
    if total > budget:
        found = f"{limit:,} bytes of each of {len(infos):,} tensors"
        hint = "--weights looks for NaN in all of those that are E4M3"
        yield Fault("block-sample", infos[0].name, found, f"{total:,} bytes", hint)


def _in_block(info: TensorInfo, start: int, raw: bytes, model: Model) -> Iterator[Fault]:
    where, expected = f"{info.shard}: {info.name}", "finite and above 0"
    if info.dtype != "F8_E4M3":
        if nans := raw.count(b"\xff"):
            yield Fault("scale-value", where, f"NaN{_times(nans)}", expected, CALIBRATE)
        return
    if nans := raw.count(b"\x7f") + raw.count(b"\xff"):
        yield Fault("scale-value", where, f"NaN{_times(nans)}", expected, CALIBRATE)
    if negative := len(raw.translate(None, _NOT_NEGATIVE)):
        yield Fault("scale-value", where, f"less than 0{_times(negative)}", expected, CALIBRATE)
    zeros = raw.count(b"\0") + raw.count(b"\x80")
    if zeros and _has_codes(info, start, raw, model):
        yield Fault("scale-value", where, f"0.0{_times(zeros)}, of blocks that have codes", expected, CALIBRATE)


_NOT_NEGATIVE = bytes([*range(0x81), 0xFF])


def _has_codes(info: TensorInfo, start: int, raw: bytes, model: Model) -> bool:
    """Whether a block with a scale of zero has weights: it may be the padding of a matrix. 16 weights, 8 bytes."""
    module, tensors = info.name.rpartition(".")[0], model.checkpoint.tensors
    weight = tensors.get(f"{module}.weight_packed") or tensors.get(f"{module}.weight")
    if weight is None or weight.nbytes != info.nbytes * 8:
        return False
    zeros = islice((i for i, byte in enumerate(raw) if byte in (0, 0x80)), _LOOKS)
    codes = (_part(weight, (start + i) * 8, 8) for i in zeros)
    return any(raw.strip(b"\0\x80\x88\x08") for _, raw in model.checkpoint.read_tensors(codes))


def _pieces(info: TensorInfo, length: int) -> Iterator[TensorInfo]:
    yield from (_part(info, at, min(_MAX_RUN, length - at)) for at in range(0, length, _MAX_RUN))


def _part(info: TensorInfo, start: int, length: int) -> TensorInfo:
    """Some bytes of a tensor, by its name."""
    begin = info.start + start
    return info._replace(shape=(length,), start=begin, end=begin + length)


def _times(count: int) -> str:
    return f" ({count:,} times)" if count > 1 else ""


def _and_more(values: list[float]) -> str:
    return f" and {len(values) - 1} more" if len(values) > 1 else ""


def _is_integer(scheme: object) -> bool:
    return str(getattr(scheme, "format", "")).startswith("INT")


#: Of quantization: models have trained parameters that end like that (Gemma 4's ``per_expert_scale``).
_SCALE = re.compile(r"\.(?:(?:weight|input)(?:_global)?|activation|output|[kqv]|kv|prob)_scale(?:_inv|_2)?")


def _scales(tensors: Iterable[TensorInfo]) -> list[TensorInfo]:
    return [t for t in tensors if t.dtype in PLAIN_DTYPES and _is_scale(t.name[t.name.rfind(".") :])]


@lru_cache(1024)
def _is_scale(ending: str) -> bool:
    return _SCALE.fullmatch(ending) is not None


def _is_block(info: TensorInfo) -> bool:
    if not info.name.endswith((".weight_scale", ".scale", "_scales")):
        return False
    is_power = info.dtype == "F8_E8M0" or (info.dtype == "U8" and not info.name.endswith(".scale"))
    return len(info.shape) >= 2 and (info.dtype == "F8_E4M3" or is_power)
