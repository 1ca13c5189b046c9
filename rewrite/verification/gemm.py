"""The FP8 product as it is served: on CUDA by the kernels that engines call, on CPU exactly."""

from __future__ import annotations

import torch

from rewrite.verification.oracle import FP8, FP8_MAX, Scaled, doubles

#: What float32 accumulation may be off by, relative to the sum of absolute products. Exact arithmetic on CPU; on
#: Hopper the FP8 tensor cores align products to about 14 bits before they add them (DeepSeek-V3 report, section 3.3.2).
ACCUMULATION = {"cpu": 0.0, "cuda": 2.0**-12}
#: The same of a float64 product whose operands are scaled before and not after it: they have more bits than codes.
SCALED = 2.0**-45
#: Rounding of the result: float64 on CPU, BF16 on CUDA (half a unit in the last place of 8 bits).
OUTPUT = {"cpu": 2.0**-50, "cuda": 2.0**-8}
#: Input scales that BF16 activations can be made for, and their products with weights in float64.
_USABLE = (2.0**-100, 2.0**100)


def activations(columns: int, tokens: int, seed: int, input_scale: float | None) -> torch.Tensor:
    """[tokens, columns] BF16, shaped like the real thing: normal, one channel in 128 twenty times as large.

    Scaled so that the largest magnitude is the one that ``input_scale`` was calibrated for (448 times it), or 1: also
    where it was calibrated with nothing (0, as of a layer that no sample reached) or is too large or small for BF16.
    """
    usable = input_scale is not None and _USABLE[0] <= input_scale <= _USABLE[1]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator)
    outliers = torch.randperm(columns, generator=generator)[: max(1, columns // 128)]
    x[:, outliers] *= 20
    return (x / x.abs().max() * (FP8_MAX * input_scale if usable and input_scale else 1.0)).to(torch.bfloat16)


def plain(x: torch.Tensor) -> Scaled:
    """BF16 activations as they are."""
    return Scaled(x, torch.ones((), device=x.device))


def quantize(x: torch.Tensor, input_scale: float | None) -> Scaled:
    """FP8 codes by the static scale, or without one by a scale for each token."""
    x = x.float()
    if input_scale is None:
        scale = x.abs().amax(1, keepdim=True) / FP8_MAX
    else:
        scale = torch.tensor(input_scale, dtype=torch.float32, device=x.device)
    return Scaled((x / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale)


def multiply(x: Scaled, served: Scaled) -> torch.Tensor:
    """[tokens, n] float64: activations times the transposed weights, as served on the device of ``x``."""
    if x.codes.device.type == "cpu":
        return _scaled(doubles(x.codes) @ doubles(served.codes).T, x.scale, served)
    if x.codes.dtype != FP8:
        return (x.codes @ served.codes.to(x.codes.dtype).T).double()
    per_row = served.scale.numel() > 1 or x.scale.numel() > 1
    try:
        tokens, rows = len(x.codes), len(served.codes)
        scale_a = x.scale.expand(tokens, 1).contiguous() if per_row else x.scale
        scale_b = served.scale.reshape(1, -1).expand(1, rows).contiguous() if per_row else served.scale
        return torch._scaled_mm(
            x.codes, served.codes.T, scale_a=scale_a, scale_b=scale_b, out_dtype=torch.bfloat16, use_fast_accum=False
        ).double()
    except (RuntimeError, ValueError):
        # Row-wise scales are not offered on every GPU: scale the float32 product, as engines fall back to do.
        one = torch.ones((), dtype=torch.float32, device=x.codes.device)
        product = torch._scaled_mm(
            x.codes, served.codes.T, scale_a=one, scale_b=one, out_dtype=torch.float32, use_fast_accum=False
        )
        return _scaled(product, x.scale, served).to(torch.bfloat16).double()


def _scaled(product: torch.Tensor, scale: torch.Tensor, served: Scaled) -> torch.Tensor:
    columns = served.scale.reshape(1, -1) if served.scale.numel() > 1 else served.scale
    return product * scale.to(product.dtype) * columns.to(product.dtype)
