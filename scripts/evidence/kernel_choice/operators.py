"""Stand-ins for compiled operators: they check their operands as the operator does, note its name and return zeros.

What each check is taken from stands beside it. Nothing else of an engine is replaced that looks at a scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

#: Names of the operators that were called since it was cleared.
CALLS: list[str] = []


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def _note(name: str, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    CALLS.append(name)
    return torch.zeros(rows, columns, dtype=dtype)


@contextmanager
def noted(module: Any, name: str) -> Iterator[None]:
    """Calls of the function ``name`` of a module are noted, and made."""
    stock = getattr(module, name)

    def note(*given: Any, **others: Any) -> Any:
        CALLS.append(f"{module.__name__}.{name}")
        return stock(*given, **others)

    setattr(module, name, note)
    try:
        yield
    finally:
        setattr(module, name, stock)


def cutlass_scaled_mm(
    out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor, *_: Any
) -> None:
    """vLLM 0.19.1 and 0.32.0: csrc/.../w8a8/cutlass/scaled_mm_entry.cu, c3x/scaled_mm_helper.hpp."""
    _need(a.stride(1) == 1 and b.stride(0) == 1 and b.stride(1) % 16 == 0, "layout of the operands")
    _need(scale_a.numel() in (1, a.shape[0]) and scale_b.numel() in (1, b.shape[1]), "number of scales")
    _need(
        all(each.dtype == torch.float32 and each.is_contiguous() for each in (scale_a, scale_b)), "form of the scales"
    )
    out.copy_(_note("cutlass_scaled_mm", a.shape[0], b.shape[1], out.dtype))


class SglScaledMM:
    """sgl-kernel: csrc/gemm/fp8_gemm_kernel.cu. ``takes_one``: one scale of the activations for many rows, from the
    release that SGLang 0.5.18 asks for on, but not on SM89."""

    def __init__(self, *, takes_one: bool) -> None:
        self._takes_one = takes_one

    def __call__(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        scale_a: torch.Tensor,
        scale_b: torch.Tensor,
        out_dtype: torch.dtype,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        one = self._takes_one and scale_a.numel() == 1
        _need(one or scale_a.numel() == a.shape[0], "size of scales_a is not matched")
        _need(scale_b.numel() == b.shape[1], "size of scales_b is not matched")
        return _note("sgl_kernel.fp8_scaled_mm", a.shape[0], b.shape[1], out_dtype)


def torch_scaled_mm(
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale_result: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    **_: Any,
) -> torch.Tensor:
    """torch 2.13, aten/src/ATen/native/cuda/ScaledBlas.cpp: one scale of each operand, or one for each row of both."""
    rows = tuple(scale_a.shape) == (a.shape[0], 1) and tuple(scale_b.shape) == (1, b.shape[1])
    _need(
        rows or scale_a.numel() == scale_b.numel() == 1,
        f"Invalid scaling configuration {tuple(scale_a.shape)} {tuple(scale_b.shape)}",
    )
    return _note("torch._scaled_mm (rows)" if rows else "torch._scaled_mm", a.shape[0], b.shape[1], out_dtype)


def flashinfer_mm(
    a: torch.Tensor,
    b: torch.Tensor,
    out_dtype: torch.dtype,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """vLLM's wrapper of FlashInfer's bmm_fp8: vllm/utils/flashinfer.py asserts one scale of each."""
    _need(scale_a.numel() == scale_b.numel() == 1, "one scale of each operand")
    return _note("flashinfer.bmm_fp8", a.shape[0], b.shape[1], out_dtype)


def sgl_flashinfer_mm(
    a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor, out_dtype: torch.dtype
) -> torch.Tensor:
    """SGLang's wrapper of the same: sglang/srt/layers/quantization/fp8_utils.py reshapes both scales to one value."""
    return flashinfer_mm(a, b, out_dtype, scale_a, scale_b)


def rocm_few_tokens(
    b: torch.Tensor,
    a: torch.Tensor,
    out_dtype: torch.dtype,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    *_: Any,
) -> torch.Tensor:
    """vLLM's wvSplitKQ: csrc/rocm/skinny_gemms.cu reads one scale of each."""
    _need(scale_a.numel() == scale_b.numel() == 1, "one scale of each operand")
    return _note("wvSplitKQ", a.shape[0], b.shape[0], out_dtype)


class Marlin:
    """Weight-only: activations are not quantized. ``columns`` are those of the output."""

    def __init__(self, columns: int) -> None:
        self._columns = columns

    def __call__(self, input: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:  # noqa: A002 - callers' name
        return _note("marlin_gemm", input.shape[0], self._columns, input.dtype)


def marlin_repack(b_q_weight: torch.Tensor, *_: Any, size_k: int = 0, size_n: int = 0, **__: Any) -> torch.Tensor:
    """Packed 8-bit weights, in their size."""
    return torch.zeros(size_k // 16, size_n * 4, dtype=torch.int32)


def static_quant(x: torch.Tensor, scale: torch.Tensor, repeat_scale: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """SGLang's static_quant_fp8, a kernel in Triton: with ``repeat_scale`` every token gets the one scale."""
    return x.to(torch.float8_e4m3fn), scale.expand(x.shape[0], 1).contiguous() if repeat_scale else scale


def group_quant(x: torch.Tensor, group_size: int, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """SGLang's per_token_group_quant_fp8: a scale for every token and every ``group_size`` columns."""
    return x.to(torch.float8_e4m3fn), torch.ones(x.shape[0], x.shape[1] // group_size, dtype=torch.float32)
