"""References for the CUDA kernels that CPU builds lack: quantizing a tensor to FP8 E4M3, under each engine's names.

Engines requantize the partitions of a fused weight to the group's largest scale with it while they load. Generating
needs it for activations too, after an MLP's gate and up have been multiplied. The arithmetic is the kernels' own:
value / scale, clamped to the finite range, rounded to nearest even.
"""

from __future__ import annotations

from typing import Any

import torch

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max  # 448


def scaled_fp8_quant(
    input: torch.Tensor,  # noqa: A002 - the name that callers pass it by
    scale: torch.Tensor | None = None,
    *_: Any,
    use_per_token_if_dynamic: bool = False,
    **__: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(FP8 tensor of `input`'s shape, its scale F32): by `scale` if given, else by the largest magnitude found."""
    values = input.float()
    if scale is None and use_per_token_if_dynamic:
        scale = values.abs().amax(-1, keepdim=True) / LARGEST
    elif scale is None:
        scale = (values.abs().max() / LARGEST).reshape(1)
    return (values / scale.float()).clamp(-LARGEST, LARGEST).to(FP8), scale


def silu_and_mul_quant(result: torch.Tensor, input: torch.Tensor, scale: torch.Tensor) -> None:  # noqa: A002
    """Fill `result` (FP8, [..., d]) with silu(gate) x up of `input` ([..., 2 d]), quantized by `scale`."""
    gate, up = input.float().chunk(2, -1)
    result.copy_(scaled_fp8_quant(torch.nn.functional.silu(gate) * up, scale)[0])


def sgl_per_tensor_quant_fp8(
    input: torch.Tensor,  # noqa: A002
    output: torch.Tensor,
    scale: torch.Tensor,
    is_static: bool,
) -> None:
    """Fill `output` (FP8, `input`'s shape); by `scale` if static, else by the largest magnitude, put into `scale`."""
    quantized, used = scaled_fp8_quant(input, scale if is_static else None)
    output[: input.shape[0]].copy_(quantized)
    scale.copy_(used.reshape(scale.shape))
