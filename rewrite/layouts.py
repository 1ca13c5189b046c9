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


def expand_to_partitions(partitions: tuple[Partition, ...], raw: bytes) -> tuple[Fill, ...]:
    """One value per partition, ``[P]``, from one for all of them."""
    return (Fill(raw, len(partitions)),)


def dequantise(dtype: str, scale: float, plain: str) -> tuple[bytes, ...]:
    """What each of the 256 codes of an FP8 ``dtype`` times ``scale`` is in the dtype ``plain``, little-endian.

    Rounded once, to nearest even, from the float32 product.
    """
    if dtype != "F8_E4M3":
        raise Unsupported("This FP8 format is not dequantised", expected="F8_E4M3", found=dtype)
    products = (struct.unpack("<f", struct.pack("<f", value * scale))[0] for value in map(_e4m3, range(256)))
    return tuple(_encode(product, plain) for product in products)


def _e4m3(code: int) -> float:
    """The value of an E4M3 code: no infinities, NaN at 0x7f and 0xff (OCP OFP8 specification, table 1)."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code >> 3) & 0xF, code & 0x7
    if code & 0x7F == 0x7F:
        return math.nan
    return sign * (mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10))


def _encode(value: float, dtype: str) -> bytes:
    """A float32 value as F32, F16 or BF16."""
    if dtype == "BF16":
        bits = int.from_bytes(struct.pack("<f", value), "little")
        if math.isnan(value):
            return (bits >> 16 | 0x40).to_bytes(2, "little")
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).to_bytes(2, "little")
    try:
        return struct.pack(_FORMATS[dtype], value)
    except OverflowError:  # beyond F16's largest: what a cast gives
        return struct.pack(_FORMATS[dtype], math.copysign(math.inf, value))


def _describe(scale: TensorInfo | None) -> str:
    return "no scale" if scale is None else f"a {scale.dtype} scale of shape {list(scale.shape)}"
