"""SGLang: real are config, scheme, choice of the kernel, parameters, what is done with them once they are loaded, and
``apply``. Replaced: what torch says of the card, the server's settings, and compiled operators."""

from __future__ import annotations

import importlib
import inspect
import re
from types import SimpleNamespace
from typing import Any

import torch
from engines.trying import trying

from kernel_choice import operators
from kernel_choice.driver import main, pretend
from kernel_choice.layers import PARTITIONS, Cell, cells, replace
from kernel_choice.platforms import Platform

_LAYERS = "sglang.srt.layers"


def run(platform: Platform) -> tuple[str, list[Cell]]:
    """The version that is installed, and the cells."""
    pretend(platform, available=True)
    packages = ("sgl_kernel", "deep_gemm", "flash_mla", "flashinfer", "vllm", *["aiter"] * platform.rocm)
    trying.stand_in(*packages)
    _declare_operators()
    anywhere: Any = torch
    anywhere.compile = lambda function=None, **_: function or (lambda each: each)  # there is no compiler for the card
    from sglang import __version__
    from sglang.srt.layers.linear import MergedColumnParallelLinear

    for dialect in ("compressed_tensors.compressed_tensors", "modelopt_quant", "quark.quark", "fp8"):
        importlib.import_module(f"{_LAYERS}.quantization.{dialect}")
    version = str(__version__)
    _settle()
    _replace_operators(_one_scale_is_taken(version, platform))
    grouped = "parallel_group" in inspect.signature(MergedColumnParallelLinear.__init__).parameters
    one_rank: dict[str, Any] = {"parallel_group": "replicated"} if grouped else {"tp_rank": 0, "tp_size": 1}
    return version, cells(_LAYERS, one_rank, modelopt="modelopt_quant")


def _declare_operators() -> None:
    """SGLang adds to these operators of sgl_kernel while it is imported. Nothing calls them here."""
    quantizers = (f"sgl_per_token_{kind}" for kind in ("group_quant_8bit", "group_quant_fp8", "quant_fp8"))
    for name in (*quantizers, "fp8_scaled_mm", "moe_fused_gate"):
        torch.library.define(f"sgl_kernel::{name}", "(Tensor x) -> ()")


def _one_scale_is_taken(version: str, platform: Platform) -> bool:
    """Of the kernels that each release asks for: see ``SglScaledMM``."""
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:3])
    return numbers >= (0, 5, 18) and platform.name != "sm89"


def _settle() -> None:
    """Settings that the server would have published: the defaults."""
    fp8: Any = importlib.import_module(f"{_LAYERS}.quantization.fp8_utils")
    graph = SimpleNamespace(prefill=SimpleNamespace(tc_compiler="eager"))
    settings = SimpleNamespace(piecewise_cuda_graph_compiler="eager", cuda_graph_config=graph)
    fp8.get_global_server_args = fp8.get_server_args = lambda: settings
    fp8.get_exec = lambda: SimpleNamespace(graph=settings)


def _replace_operators(takes_one: bool) -> None:
    fp8: Any = importlib.import_module(f"{_LAYERS}.quantization.fp8_utils")
    fp8.fp8_scaled_mm = operators.SglScaledMM(takes_one=takes_one)
    anywhere: Any = torch
    anywhere._scaled_mm = operators.torch_scaled_mm
    # They fill tensors that the stand-ins do not read. On ROCm, vLLM's.
    binary: Any = torch.ops._C
    for name in ("static_scaled_fp8_quant", "dynamic_scaled_fp8_quant", "dynamic_per_token_scaled_fp8_quant"):
        setattr(binary, name, lambda *_: None)
    replace("sglang", **dict.fromkeys(("sgl_per_tensor_quant_fp8", "sgl_per_token_quant_fp8"), lambda *_, **__: None))
    replace("sglang", static_quant_fp8=operators.static_quant, per_token_group_quant_fp8=operators.group_quant)
    marlin = operators.Marlin(sum(PARTITIONS))
    replace("sglang", apply_fp8_marlin_linear=marlin, gptq_marlin_repack=operators.marlin_repack)
    replace("sglang", flashinfer_bmm_fp8=operators.sgl_flashinfer_mm)
    registered: Any = torch.ops.sglang  # some call it by the name that it was registered by
    registered.apply_fp8_marlin_linear = marlin


if __name__ == "__main__":
    main(run, ("sglang", "kernel_choice"))
