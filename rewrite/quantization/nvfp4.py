"""NVFP4 as it is stored: which tensors a module has, and the global scales in one form.

A weight is code x block scale x s: E2M1 codes, two a byte; an E4M3 scale for every 16 of them; s, one F32 for the
matrix. compressed-tensors (``nvfp4-pack-quantized``) stores 1 / s, ModelOpt s itself; the same of the activations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from struct import pack, unpack

from rewrite.checkpoint.header import TensorInfo

BLOCK = 16  # weights of one block scale


@dataclass(frozen=True)
class Nvfp4:
    """The tensors of an NVFP4 module beside its codes: ``blocks`` F8_E4M3 [N, K / 16]; ``scale`` F32, one value;
    ``input_scale`` the same, None where the activations are not quantized. ``divides``: both are divisors."""

    blocks: TensorInfo
    scale: TensorInfo
    input_scale: TensorInfo | None
    divides: bool

    def multiplier(self, raw: bytes) -> float:
        """What a stored global scale multiplies with, rounded to F32 as engines do (vLLM 0.32
        ``compressed_tensors_w4a4_nvfp4.py``: ``1.0 / weight_global_scale``). Infinite for a divisor of zero."""
        (stored,) = unpack("<f", raw)
        if not self.divides:
            return float(stored)
        return float("inf") if stored == 0 else as_f32(1 / stored)


def as_f32(value: float) -> float:
    """``value`` rounded to F32; infinite where it is too large."""
    try:
        (rounded,) = unpack("<f", pack("<f", value))
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")
    return float(rounded)


def find_nvfp4(name: str, tensors: Mapping[str, TensorInfo]) -> Nvfp4 | None:
    """The NVFP4 tensors of the module ``name``, or None where its tensors are not exactly those of either dialect."""
    for kind, scale, inputs, divides in (
        ("weight_packed", "weight_global_scale", "input_global_scale", True),
        ("weight", "weight_scale_2", "input_scale", False),
    ):
        codes, blocks, whole = (tensors.get(f"{name}.{each}") for each in (kind, "weight_scale", scale))
        given = tensors.get(f"{name}.{inputs}")
        if codes is None or blocks is None or whole is None or (codes.dtype, blocks.dtype) != ("U8", "F8_E4M3"):
            continue
        fits = len(codes.shape) == 2 and blocks.shape == (codes.shape[0], codes.shape[1] * 2 // BLOCK)
        if fits and _is_one(whole) and (given is None or _is_one(given)):
            return Nvfp4(blocks, whole, given, divides)
    return None


def _is_one(info: TensorInfo) -> bool:
    """F32, one value: ``[1]``, or ``()``."""
    return info.dtype == "F32" and info.shape in ((), (1,))
