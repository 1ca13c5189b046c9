"""The FP8 product as it is served: on CUDA by the kernels that engines call, on CPU exactly."""

from __future__ import annotations

import torch

from rewrite.verification.oracle import FP8, FP8_MAX, Served

#: What float32 accumulation may be off by, relative to the sum of absolute products. Exact arithmetic on CPU; on
#: Hopper the FP8 tensor cores align products to about 14 bits before they add them (DeepSeek-V3 report, section 3.3.2).
ACCUMULATION = {"cpu": 0.0, "cuda": 2.0**-12}
#: Rounding of the result: float64 on CPU, BF16 on CUDA (half a unit in the last place of 8 bits).
OUTPUT = {"cpu": 2.0**-50, "cuda": 2.0**-8}


def activations(columns: int, tokens: int, seed: int, input_scale: float | None) -> torch.Tensor:
    """[tokens, columns] BF16, shaped like the real thing: normal, one channel in 128 twenty times as large.

    Scaled so that the largest magnitude is the one that ``input_scale`` was calibrated for (448 times it), or 1.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator)
    outliers = torch.randperm(columns, generator=generator)[: max(1, columns // 128)]
    x[:, outliers] *= 20
    return (x / x.abs().max() * (1.0 if input_scale is None else FP8_MAX * input_scale)).to(torch.bfloat16)


def quantise(x: torch.Tensor, input_scale: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [tokens, K] and float32 scale: the static one (``[]``), or without one a scale per token ([tokens, 1])."""
    x = x.float()
    if input_scale is None:
        scale = x.abs().amax(1, keepdim=True) / FP8_MAX
    else:
        scale = torch.tensor(input_scale, dtype=torch.float32, device=x.device)
    return (x / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale


def multiply(codes: torch.Tensor, scale: torch.Tensor, served: Served) -> torch.Tensor:
    """[tokens, n] float64: activations times the transposed weights, as served on the device of ``codes``."""
    if codes.device.type == "cpu":
        return _scaled(codes.double() @ served.weight.double().T, scale, served)
    per_row = served.scale.numel() > 1
    try:
        rows = scale.expand(len(codes), 1).contiguous() if per_row else scale
        columns = served.scale.reshape(1, -1).contiguous() if per_row else served.scale
        return torch._scaled_mm(
            codes, served.weight.T, scale_a=rows, scale_b=columns, out_dtype=torch.bfloat16, use_fast_accum=False
        ).double()
    except (RuntimeError, ValueError):
        # Row-wise scales are not offered on every GPU: scale the float32 product, as engines fall back to do.
        one = torch.ones((), dtype=torch.float32, device=codes.device)
        product = torch._scaled_mm(
            codes, served.weight.T, scale_a=one, scale_b=one, out_dtype=torch.float32, use_fast_accum=False
        )
        return _scaled(product, scale, served).to(torch.bfloat16).double()


def _scaled(product: torch.Tensor, scale: torch.Tensor, served: Served) -> torch.Tensor:
    columns = served.scale.reshape(1, -1) if served.scale.numel() > 1 else served.scale
    return product * scale.to(product.dtype) * columns.to(product.dtype)
