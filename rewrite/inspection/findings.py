"""What is wrong in a checkpoint, whoever loads it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from rewrite.checkpoint.checkpoint import Checkpoint
from rewrite.checkpoint.header import TensorInfo
from rewrite.quantization.dtypes import FP8_DTYPES, PLAIN_DTYPES, decode
from rewrite.quantization.fit import lacks_input_scale, odd_weight
from rewrite.quantization.groups import WEIGHTS, FusedGroup, find_lookalikes
from rewrite.quantization.model import Model
from rewrite.quantization.scales import bad_values, implausible_values
from rewrite.quantization.scheme import Scheme

#: What a gate can be set to, each with all before it: silent garbage; what does not load or run; a loss of precision;
#: what is not known.
Severity = Literal["garbled", "fails", "precision", "unknown"]
SEVERITIES: tuple[Severity, ...] = ("garbled", "fails", "precision", "unknown")
_SCALES = (
    *("weight_scale", "weight_scale_inv", "input_scale"),
    *("weight_scale_2", "weight_global_scale", "input_global_scale"),
)
_AT_ONCE = 4096  # scales that are looked at together: there may be 300,000, and hardly ever a bad one
_GLOBAL_SCALES = ("_global_scale", "_scale_2")  # of NVFP4: divisors in one dialect, multipliers in the other


@dataclass(frozen=True)
class Finding:
    """Something that no engine survives, or that only one reader of many gets right. ``severity``: the worst that comes
    of it."""

    what: str
    where: str
    severity: Severity = "fails"


def find_faults(model: Model, groups: Iterable[FusedGroup]) -> Iterator[Finding]:
    """Everything that can be seen in headers, config and scales."""
    yield from _find_lookalikes(model)
    for group in groups:
        if group.quantized_in_part:
            yield Finding("quantized in part: no loader that fuses these modules can serve them", group.name)
    yield from _find_orphans(model.checkpoint)
    yield from _find_bad_values(model)
    yield from _find_missing_input_scales(model)
    if (odd := odd_weight(model.checkpoint)) is not None:
        what = f"a quantized weight that is no matrix {list(odd.shape)}: no loader was seen to read it"
        yield Finding(what, f"{odd.shard}: {odd.name}")


def _find_lookalikes(model: Model) -> Iterator[Finding]:
    names = find_lookalikes(model.checkpoint)
    if names:
        model_type = model.checkpoint.config.value.get("model_type")
        yield Finding(f"unknown architecture {model_type!r} with modules that engines may fuse", names[0], "garbled")


def _find_orphans(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Scales without their weight, FP8 weights without their scale."""
    for form, names in checkpoint.alike.items():
        stored = form.tensors
        scales = () if any(weight in stored for weight in WEIGHTS) else [kind for kind in stored if kind in _SCALES]
        faults = [(kind, "a scale without its weight") for kind in scales]
        is_fp8 = stored.get("weight", ("",))[0] in FP8_DTYPES
        if is_fp8 and not ("weight_scale" in stored or "weight_scale_inv" in stored):
            faults.append(("weight", "an FP8 weight without its scale"))
        for kind, what in faults:
            found = (checkpoint.tensors[f"{name}.{kind}"] for name in names)
            yield from (Finding(what, f"{info.shard}: {info.name}") for info in found)


def _find_missing_input_scales(model: Model) -> Iterator[Finding]:
    lacking = [name for kind in model.kinds if lacks_input_scale(kind) for name in kind.names]
    if lacking:
        yield Finding(f"static activations without an input_scale ({len(lacking)} layers)", lacking[0])


def _find_bad_values(model: Model) -> Iterator[Finding]:
    """Of scales of integers none: AutoRound gives these negative scales on purpose (-8 to 7 is not even)."""
    integers = {name for kind in model.kinds if _is_integer(kind.first.scheme) for name in kind.names}
    checkpoint = model.checkpoint
    scales = (info for info in checkpoint.tensors_like(_is_scale) if info.name.rpartition(".")[0] not in integers)
    read = checkpoint.read_tensors(info for info in scales if info.dtype in PLAIN_DTYPES)
    while some := list(islice(read, _AT_ONCE)):
        for dtype in sorted({info.dtype for info, _ in some}):
            own = [(info, raw) for info, raw in some if info.dtype == dtype]
            values = decode(dtype, b"".join([raw for _, raw in own]), own[0][0].name)
            if bad_values(values) or implausible_values(values):
                for info, raw in own:
                    yield from _bad_value(info, decode(dtype, raw, info.name))


def _bad_value(info: TensorInfo, values: tuple[float, ...]) -> Iterator[Finding]:
    where = f"{info.shard}: {info.name}"
    if bad := bad_values(values):
        yield Finding(f"a scale of {bad[0]}{_and_more(bad)}", where, "garbled")
    elif not info.name.endswith(_GLOBAL_SCALES) and (odd := implausible_values(values)):
        yield Finding(f"a scale of {odd[0]:.3g}{_and_more(odd)}: probably never set by calibration", where, "garbled")


def _and_more(values: list[float]) -> str:
    return f" and {len(values) - 1} more" if len(values) > 1 else ""


def _is_integer(scheme: Scheme | None) -> bool:
    return scheme is not None and scheme.format.startswith("INT")


def _is_scale(name: str) -> bool:
    return name.endswith(("_scale", "_scale_inv", "_scale_2"))
