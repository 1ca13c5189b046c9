"""What is wrong in a checkpoint, whoever loads it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from rewrite.checkpoint.checkpoint import Checkpoint
from rewrite.checkpoint.header import TensorInfo
from rewrite.quantization.dtypes import FP8_DTYPES, PLAIN_DTYPES, decode
from rewrite.quantization.fit import lacks_input_scale, odd_weight
from rewrite.quantization.groups import WEIGHTS, FusedGroup, find_lookalikes
from rewrite.quantization.model import Model
from rewrite.quantization.scales import bad_values, implausible_values

_SCALES = (
    *("weight_scale", "weight_scale_inv", "input_scale"),
    *("weight_scale_2", "weight_global_scale", "input_global_scale"),
)
_GLOBAL_SCALES = ("_global_scale", "_scale_2")  # of NVFP4: divisors in one dialect, multipliers in the other


@dataclass(frozen=True)
class Finding:
    """Something that no loader survives, or that only one reader of many gets right."""

    what: str
    where: str


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
        yield Finding(f"unknown architecture {model_type!r} with modules that engines may fuse", names[0])


def _find_orphans(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Scales without their weight, FP8 weights without their scale."""
    for name, info in checkpoint.tensors.items():
        module, _, kind = name.rpartition(".")
        if kind in _SCALES:
            if not any(f"{module}.{weight}" in checkpoint.tensors for weight in WEIGHTS):
                yield Finding("a scale without its weight", f"{info.shard}: {name}")
        elif kind == "weight" and info.dtype in FP8_DTYPES and not _has_scale(module, checkpoint):
            yield Finding("an FP8 weight without its scale", f"{info.shard}: {name}")


def _find_missing_input_scales(model: Model) -> Iterator[Finding]:
    lacking = [name for kind in model.kinds if lacks_input_scale(kind) for name in kind.names]
    if lacking:
        yield Finding(f"static activations without an input_scale ({len(lacking)} layers)", lacking[0])


def _has_scale(module: str, checkpoint: Checkpoint) -> bool:
    return f"{module}.weight_scale" in checkpoint.tensors or f"{module}.weight_scale_inv" in checkpoint.tensors


def _find_bad_values(model: Model) -> Iterator[Finding]:
    scales = (
        info for info in model.checkpoint.tensors.values() if _is_scale(info) and not _may_be_negative(info, model)
    )
    for info, raw in model.checkpoint.read_tensors(scales):
        values = decode(info.dtype, raw, info.name)
        where = f"{info.shard}: {info.name}"
        if bad := bad_values(values):
            yield Finding(f"a scale of {bad[0]}{_and_more(bad)}", where)
        elif not info.name.endswith(_GLOBAL_SCALES) and (odd := implausible_values(values)):
            yield Finding(f"a scale of {odd[0]:.3g}{_and_more(odd)}: probably never set by calibration", where)


def _and_more(values: list[float]) -> str:
    return f" and {len(values) - 1} more" if len(values) > 1 else ""


def _may_be_negative(info: TensorInfo, model: Model) -> bool:
    """Whether the scale belongs to integers: AutoRound gives these negative scales on purpose (-8 to 7 is not even)."""
    module = model.modules.get(info.name.rpartition(".")[0])
    return module is not None and module.scheme is not None and module.scheme.format.startswith("INT")


def _is_scale(info: TensorInfo) -> bool:
    return info.name.endswith(("_scale", "_scale_inv", "_scale_2")) and info.dtype in PLAIN_DTYPES
