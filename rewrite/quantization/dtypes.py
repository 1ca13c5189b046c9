"""Dtypes of weights, and what the codes of an FP8 weight stand for. Plain Python: no torch."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import Any

from rewrite.errors import Unsupported
from rewrite.quantization.architectures import text_config

#: Dtypes by the names that safetensors gives them.
FP8_DTYPES = frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})
PLAIN_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})

_FORMATS = {"F64": "<d", "F32": "<f", "F16": "<e"}


def model_dtype(config: Mapping[str, Any]) -> str:
    """The dtype that a config.json gives the model; BF16 where it names none that a weight can be stored in."""
    places = (config, text_config(config))
    named = (place.get(key) for place in places for key in ("dtype", "torch_dtype"))
    names = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
    return next((names[name] for name in named if isinstance(name, str) and name in names), "BF16")


def decode(dtype: str, raw: bytes, where: str) -> tuple[float, ...]:
    """Floating-point values from little-endian bytes. BF16 is the upper half of an F32.

    Raises :class:`Unsupported` for a dtype that is not one of F64, F32, F16, BF16; ``where`` names the tensor.
    """
    if dtype == "BF16":
        count = len(raw) // 2
        raw = struct.pack(f"<{count}I", *(half << 16 for half in struct.unpack(f"<{count}H", raw)))
        dtype = "F32"
    if dtype not in _FORMATS:
        raise Unsupported("Unsupported scale dtype", where=where, expected="F32, BF16, F16 or F64", found=dtype)
    code = _FORMATS[dtype]
    return struct.unpack(f"<{len(raw) // struct.calcsize(code)}{code[1]}", raw)


def dequantize(dtype: str, scale: float, plain: str) -> tuple[bytes, ...]:
    """What each of the 256 codes of an FP8 ``dtype`` times ``scale`` is in the dtype ``plain``, little-endian.

    Rounded once, to nearest even, from the float32 product.
    """
    if dtype != "F8_E4M3":
        raise Unsupported("This FP8 format is not dequantized", expected="F8_E4M3", found=dtype)
    products = (struct.unpack("<f", struct.pack("<f", value * scale))[0] for value in map(e4m3, range(256)))
    return tuple(encode(product, plain) for product in products)


def dequantizing_tables(scale: float, plain: str) -> tuple[bytes, ...]:
    """:func:`dequantize` for E4M3 as tables for ``bytes.translate``, one for each byte of a ``plain`` value.

    Made for every row of a weight with channel scales, so it works on all codes at once. ``scale`` must pass
    :func:`fits`.
    """
    products = struct.pack("<128f", *[value * scale for value in _POSITIVE])
    if plain == "BF16":
        bits = struct.unpack("<128I", products)  # NaN is canonical here: its rounding does not overflow
        raw = struct.pack("<128H", *[(b + 0x7FFF + (b >> 16 & 1)) >> 16 for b in bits])
    elif plain == "F16":
        raw = struct.pack("<128e", *struct.unpack("<128f", products))
    else:
        raw = products
    width = len(raw) // 128
    *low, high = (raw[i::width] for i in range(width))
    negative = high[:127].translate(_WITH_SIGN) + high[127:]  # NaN has no sign, as in dequantize()
    return (*(each * 2 for each in low), high + negative)


def fits(scale: float, plain: str) -> bool:
    """Whether the largest E4M3 value, 448, times ``scale`` is a finite number in the dtype ``plain``."""
    return 448 * scale <= _LARGEST[plain]


_LARGEST = {"BF16": (2 - 2.0**-7) * 2.0**127, "F16": 65504.0, "F32": (2 - 2.0**-23) * 2.0**127}


def e4m3(code: int) -> float:
    """The value of an E4M3 code: no infinities, NaN at 0x7f and 0xff (OCP OFP8 specification, table 1)."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code >> 3) & 0xF, code & 0x7
    if code & 0x7F == 0x7F:
        return math.nan
    return sign * (mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10))


_POSITIVE = tuple(map(e4m3, range(128)))
_WITH_SIGN = bytes(byte | 0x80 for byte in range(256))


def encode(value: float, dtype: str) -> bytes:
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
