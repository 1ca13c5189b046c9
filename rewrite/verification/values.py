"""What stored bytes mean, in numpy: FP8 codes, plain numbers, and the bytes that a plain weight must have.

Written a second time: shares no code with what ``convert`` writes, and needs no torch.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from rewrite.errors import Unsupported

Bytes = npt.NDArray[np.uint8]
Values = npt.NDArray[np.floating[Any]]

_E4M3_BIAS, _E4M3_MANTISSA = 7, 3
_PLAIN: dict[str, npt.DTypeLike] = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}


@cache
def code_values(dtype: str) -> npt.NDArray[np.float32]:
    """[256] float32: the value of each code of an FP8 ``dtype`` (OCP OFP8 specification, table 1).

    Raises :class:`Unsupported` for a dtype whose codes are not known here.
    """
    codes = np.arange(256, dtype=np.uint16)
    if dtype == "F8_E5M2":  # the upper byte of an F16
        return (codes << 8).astype("<u2").view("<f2").astype(np.float32)
    if dtype != "F8_E4M3":
        raise Unsupported("verify does not know this dtype", expected="F8_E4M3, F8_E5M2", found=dtype)
    exponents = (codes >> _E4M3_MANTISSA) & 15
    fractions = (codes & 7) / 8
    sizes = np.where(
        exponents == 0,
        fractions * 2.0 ** (1 - _E4M3_BIAS),
        (1 + fractions) * 2.0 ** (exponents.astype(float) - _E4M3_BIAS),
    )
    sizes[(codes & 0x7F) == 0x7F] = np.nan
    return np.where(codes & 0x80, -sizes, sizes).astype(np.float32)


def decode(dtype: str, raw: Bytes) -> Values:
    """The values of bytes, one row of values for each row of bytes: float32, or float64 of F64."""
    if dtype == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    if dtype in _PLAIN:
        return raw.view(_PLAIN[dtype]).astype(np.float64 if dtype == "F64" else np.float32)
    return code_values(dtype)[raw]


def encode(values: npt.NDArray[np.float32], dtype: str) -> Bytes:
    """The bytes of float32 values after one rounding, to nearest even, to a plain ``dtype``. Those of a NaN are any.

    Raises :class:`Unsupported` for a dtype that plain weights do not have.
    """
    if dtype == "BF16":
        bits = values.view(np.uint32)
        return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2").view(np.uint8)
    if dtype not in ("F16", "F32"):
        raise Unsupported("verify does not know this dtype of weights", expected="BF16, F16, F32", found=dtype)
    with np.errstate(over="ignore"):
        return values.astype(_PLAIN[dtype]).view(np.uint8)
