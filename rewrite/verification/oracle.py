"""What rows of weights mean, and what engines make of them: in torch, by the arithmetic that engines use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from rewrite.verification.reader import GroupReader, StoredRows

#: torch's names for the dtypes of safetensors that weights and scales have.
_DTYPES = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max  # 448
#: vLLM creates the scale slots of a fused layer with this value (``create_fp8_scale_parameter``).
SENTINEL = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class Scaled:
    """Rows of weights or of activations: ``codes`` [n, K], FP8 or plain numbers, and the float32 ``scale`` that they
    are multiplied with: ``[]``; [n, 1], one a row; or [n, K] where blocks have scales."""

    codes: torch.Tensor
    scale: torch.Tensor

    def value(self) -> torch.Tensor:
        """[n, K] float64. A product of an FP8 and a float32 value is exact in float64."""
        return doubles(self.codes) * self.scale.double()

    def same(self, other: Scaled) -> bool:
        """Whether both are the same codes with the same scales."""
        if self.codes.dtype != other.codes.dtype or not bool((self.scale == other.scale).all()):
            return False
        return self.codes is other.codes or torch.equal(self.codes.view(torch.uint8), other.codes.view(torch.uint8))

    def for_each(self, make: Callable[[Scaled], torch.Tensor]) -> torch.Tensor:
        """[n, K]: what ``make`` makes of each weight. It depends on the code alone where all rows have one scale: then
        it is made once for each code, and looked up."""
        one_scale = self.scale.shape[1] == 1 and bool((self.scale == self.scale[:1]).all())
        if self.codes.element_size() != 1 or not one_scale or len(self.codes) == 0:
            return make(self)
        codes = torch.arange(256, dtype=torch.uint8, device=self.codes.device).view(self.codes.dtype)
        table = make(Scaled(codes.reshape(256, 1), self.scale[:1].expand(256, 1))).reshape(256)
        looked_up = _look_up(table.view(torch.uint8) if table.element_size() == 1 else table, self.codes)
        return looked_up.view(table.dtype)


def doubles(codes: torch.Tensor) -> torch.Tensor:
    """[n, K] float64. FP8 is looked up: on a CPU that is seven times as fast as torch's own conversion."""
    if codes.element_size() != 1:
        return codes.double()
    every = torch.arange(256, dtype=torch.uint8, device=codes.device)
    return _look_up(every.view(codes.dtype).double(), codes)


def _look_up(table: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """The entry of ``table`` [256] for each code."""
    return table.index_select(0, codes.view(torch.uint8).reshape(-1).int()).view(codes.shape)


def as_rows(stored: StoredRows, device: str) -> Scaled:
    """Rows of weights, on a device, to multiply with."""
    raw = torch.from_numpy(stored.raw.copy()).view(_DTYPES[stored.dtype])
    return Scaled(raw.to(device), torch.from_numpy(np.ascontiguousarray(stored.scale)).to(device))


def all_codes(dtype: str, scale: float) -> Scaled:
    """[256, 1]: a row for each code of an FP8 dtype. What engines make of a weight depends on its code, where all rows
    have one scale."""
    codes = torch.arange(256, dtype=torch.uint8).view(_DTYPES[dtype]).reshape(256, 1)
    return Scaled(codes, torch.full((256, 1), scale))


def rounded(rows: Scaled, dtype: str) -> Scaled:
    """``rows`` as plain weights: the product rounded to float32 and then, once, to a dtype of safetensors."""
    return Scaled(rows.value().float().to(_DTYPES[dtype]), torch.ones_like(rows.scale))


@dataclass(frozen=True)
class Server:
    """How an engine serves the rows of a group, given what its loader put into the slots."""

    reader: GroupReader
    slots: tuple[float | None, ...]

    @property
    def largest(self) -> float:
        return max(scale for scale in self.slots if scale is not None)

    @property
    def requantizes(self) -> bool:
        """Whether the engine makes other weights of those that are stored. Not where nothing was loaded into the last
        slot: engines take the module for one that was fused before it was quantized (Phi-3)."""
        return self.reader.is_per_tensor() and self.slots[-1] is not None

    def bound(self, slot: int, rows: Scaled) -> torch.Tensor | None:
        """How far what the engine multiplies with may be from each weight of the slot; None for not at all."""
        if self.reader.is_plain():
            return plain_bound(rows)
        if not self.requantizes:
            return None
        if self.slots[slot] == self.largest:
            return half_precision_bound(rows, self.largest)
        return requantization_bound(rows, self.largest)

    def __call__(self, slot: int, rows: Scaled) -> Scaled:
        """What the engine multiplies with: the weights as they are, or requantized with one scale."""
        if not self.requantizes:
            return rows
        scale = self.slots[slot]
        return requantized(rows, SENTINEL if scale is None else scale, self.largest)


def requantized(rows: Scaled, slot: float, largest: float) -> Scaled:
    """vLLM's and SGLang's ``requantize_with_max_scale``: dequantize by the slot's scale, quantize by the largest.

    Dequantization goes through float16, as theirs does (``per_tensor_dequantize``, w8a8_utils.py).
    """

    def requantize(rows: Scaled) -> torch.Tensor:
        half = (rows.codes.to(torch.float16).float() * slot).to(torch.float16)
        return (half.float() / largest).clamp(-FP8_MAX, FP8_MAX).to(FP8)

    scale = torch.tensor(largest, dtype=torch.float32, device=rows.codes.device)
    return Scaled(rows.for_each(requantize), scale)


def half_precision_bound(rows: Scaled, scale: float) -> torch.Tensor | None:
    """[n, K] float64: how far going through float16 and back to the *same* scale can move each weight.

    Not at all for scales from 2^-15: the detour then stays within half the spacing of FP8 codes. Below, weights that
    are subnormal in float16 move by up to 2^-25, and by as much again when they are rounded to a code.
    """
    if scale >= 2.0**-15:
        return None
    return rows.for_each(lambda rows: torch.where(rows.value().abs() < 2.0**-14, 2.0**-24, 0.0).double())


def plain_bound(rows: Scaled) -> torch.Tensor:
    """[n, K] float64: how far rounding to the dtype of the plain weights ``rows`` can have moved each of them: half a
    unit in the last place, and half the smallest number."""
    info = torch.finfo(rows.codes.dtype)
    return rows.value().abs() * info.eps / 2 + info.smallest_normal * info.eps / 2


def requantization_bound(rows: Scaled, largest: float) -> torch.Tensor:
    """[n, K] float64: how far requantizing to ``largest`` can move each weight w = code x scale.

    One rounding to e4m3 moves x by at most 2^-4 |x| where x / largest is a normal number (three mantissa bits: half a
    unit in the last place), and by at most half the spacing of subnormals, 2^-10 x largest, below. The rounding to
    float16 before it adds 2^-11 |w| or 2^-25, and is itself amplified by the second: hence the factor 1 + 2^-4.
    """

    def bound(rows: Scaled) -> torch.Tensor:
        true = rows.value().abs()
        half = torch.clamp(true * 2.0**-11, min=2.0**-25)
        return torch.clamp((true + half) * 2.0**-4, min=2.0**-10 * largest) + half

    return rows.for_each(bound)
