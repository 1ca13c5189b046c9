"""The layouts of a weight scale: recognising one, reading its values, and making it explicit.

Expanding a scale is repetition of its bytes: exact, dtype kept, nothing computed.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

from rewrite.dialects import Scheme
from rewrite.dialects.scheme import ScaleLayout
from rewrite.errors import CheckpointError, Unsupported
from rewrite.groups import Module, Partition
from rewrite.header import DTYPE_BITS, TensorInfo

_FORMATS = {"F64": "<d", "F32": "<f", "F16": "<e"}


@dataclass(frozen=True)
class Fill:
    """``count`` repetitions of ``data``."""

    data: bytes
    count: int

    @property
    def length(self) -> int:
        return len(self.data) * self.count


def layout_of(module: Module) -> ScaleLayout | None:
    """How the module's ``weight_scale`` is stored, by its shape; None for a shape that is no layout."""
    if module.scale is None:
        return None
    rows, shape = module.weight.shape[0], module.scale.shape
    if shape in ((), (1,)):
        return "tensor"
    if shape == (rows, 1):
        return "channel"
    if shape == (len(module.partitions),):
        return "partition"
    return "block" if len(shape) == 2 else None


def check_scheme(module: Module, scheme: Scheme | None) -> None:
    """Raise unless the config gives the module the scheme that its tensors have."""
    layout = layout_of(module)
    stored = "tensor" if layout == "partition" else layout  # no dialect words a vector of partitions differently
    if scheme is None or not scheme.fp8 or scheme.layout != stored:
        raise CheckpointError(
            "Config and tensors disagree on how a module is quantised",
            where=module.name,
            expected=f"what the config says: {scheme.text if scheme else 'not quantised'}",
            found=f"{module.weight.dtype} weight with {_describe(module.scale)}",
            hint="loaders follow the config and then fail on the tensors: export the model again",
        )


def read_values(scale: TensorInfo, raw: bytes, where: str) -> tuple[float, ...]:
    """The values of a floating-point scale.

    Raises :class:`CheckpointError` for one that is NaN, infinite, zero or negative: no engine can serve it.
    """
    values = decode(scale.dtype, raw, where)
    for value in values:
        if not (math.isfinite(value) and value > 0):
            raise CheckpointError(
                "A scale is not a positive number",
                where=f"{where}: {scale.name}",
                expected="finite and above 0",
                found=str(value),
                hint="calibration failed for this layer: quantise the model again",
            )
    return values


def decode(dtype: str, raw: bytes, where: str) -> tuple[float, ...]:
    """Floating-point values from little-endian bytes. BF16 is the upper half of an F32."""
    if dtype == "BF16":
        padded = b"".join(b"\0\0" + raw[i : i + 2] for i in range(0, len(raw), 2))
        return decode("F32", padded, where)
    if dtype not in _FORMATS:
        raise Unsupported(
            "A scale has a dtype that is none", where=where, expected="F32, BF16, F16 or F64", found=dtype
        )
    return tuple(value for (value,) in struct.iter_unpack(_FORMATS[dtype], raw))


def expand_to_channel(partitions: tuple[Partition, ...], dtype: str, raw: bytes) -> tuple[Fill, ...]:
    """One value per row, ``[N, 1]``, from one value (``()``, ``[1]``) or one per partition (``[P]``)."""
    width = DTYPE_BITS[dtype] // 8
    values = [raw[i : i + width] for i in range(0, len(raw), width)]
    if len(values) == 1:
        return (Fill(values[0], sum(p.rows for p in partitions)),)
    return tuple(Fill(value, p.rows) for value, p in zip(values, partitions, strict=True))


def _describe(scale: TensorInfo | None) -> str:
    return "no scale" if scale is None else f"a {scale.dtype} scale of shape {list(scale.shape)}"
