"""vLLM: real are the class of the platform, config, scheme, choice of the kernel, parameters, what is done with them
once they are loaded, and ``apply``. Replaced: what torch says of the card, and compiled operators."""

from __future__ import annotations

import contextlib
import importlib
import sys
from types import SimpleNamespace
from typing import Any

import torch
from engines.trying import trying

from kernel_choice import operators
from kernel_choice.driver import main, pretend
from kernel_choice.layers import PARTITIONS, Cell, cells, replace
from kernel_choice.platforms import Platform

_BINARIES = "_C _C_stable_libtorch _qutlass_C _moe_C _moe_C_stable_libtorch _rocm_C _rocm_C_stable_libtorch"
_LAYERS = "vllm.model_executor.layers"


def run(platform: Platform) -> tuple[str, list[Cell]]:
    """The version that is installed, and the cells."""
    if platform.capability is None:
        _start_on_cpu()
    else:
        _start_on_card(platform)
    from vllm import __version__
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    config: Any = VllmConfig()
    config.model_config = SimpleNamespace(dtype=torch.bfloat16, is_moe=False)
    state: Any = parallel_state
    state._TP = SimpleNamespace(rank_in_group=0, world_size=1, rank=0)
    with contextlib.ExitStack() as within:
        within.enter_context(set_current_vllm_config(config))
        return str(__version__), cells(_LAYERS, {"disable_tp": True})


def _start_on_cpu() -> None:
    """The CPU's own kernels multiply. Missing from CPU builds is what quantizes. Results must not depend on the CPU:
    where there is AMX, vLLM has another kernel for scales per tensor (``CPUFp8PerTensorScaledMMLinearKernel``)."""
    import vllm._custom_ops as ops

    ops.scaled_fp8_quant = trying.scaled_fp8_quant
    cpu: Any = torch.cpu
    cpu._is_amx_tile_supported = lambda: False


def _start_on_card(platform: Platform) -> None:
    # vLLM asks is_available only where it would then open the device.
    pretend(platform, available=False)
    binaries = (f"vllm.{name}" for name in _BINARIES.split())
    flashinfer = ("flashinfer", "flashinfer_cubin") if platform.flashinfer else ()
    trying.stand_in("flash_attn", "vllm.vllm_flash_attn", *flashinfer, *binaries, first=True)
    platforms: Any = importlib.import_module("vllm.platforms")
    known: Any = importlib.import_module("vllm.platforms.rocm" if platform.rocm else "vllm.platforms.cuda")
    platforms._current_platform = known.RocmPlatform() if platform.rocm else known.CudaPlatform()
    _say_what_was_compiled()
    importlib.import_module(f"{_LAYERS}.linear")
    for dialect in ("compressed_tensors.compressed_tensors", "modelopt", "quark.quark", "fp8"):
        importlib.import_module(f"{_LAYERS}.quantization.{dialect}")
    _replace_operators(platform)


def _say_what_was_compiled() -> None:
    """Wheels for CUDA have these kernels for all of the cards (CMakeLists.txt, csrc/.../scaled_mm_entry.cu)."""
    binary: Any = torch.ops._C
    binary.cutlass_scaled_mm_supports_fp8 = lambda capability: capability >= 89
    binary.cutlass_scaled_mm_supports_block_fp8 = lambda capability: capability >= 90
    binary.cutlass_group_gemm_supported = lambda capability: capability >= 90


def _replace_operators(platform: Platform) -> None:
    binary: Any = torch.ops._C
    binary.cutlass_scaled_mm = operators.cutlass_scaled_mm
    # They fill tensors that the stand-ins do not read.
    for name in ("static_scaled_fp8_quant", "dynamic_scaled_fp8_quant", "dynamic_per_token_scaled_fp8_quant"):
        setattr(binary, name, lambda *_: None)
    replace("vllm", flashinfer_scaled_fp8_mm=operators.flashinfer_mm)
    anywhere: Any = torch
    anywhere._scaled_mm = operators.torch_scaled_mm
    ops: Any = sys.modules["vllm._custom_ops"]
    ops.gptq_marlin_repack = operators.marlin_repack
    replace("vllm", apply_fp8_marlin_linear=operators.Marlin(sum(PARTITIONS)))
    if platform.rocm:
        # Registered for a card's tensors only. What it calls is replaced.
        own: Any = importlib.import_module("vllm.model_executor.kernels.linear.scaled_mm.rocm")
        custom: Any = torch.ops.vllm
        name = "rocm_per_tensor_float_w8a8_scaled_mm_impl"
        setattr(custom, name, getattr(own, name))
        own.num_compute_units = lambda *_: 100
        ops.wvSplitKQ = operators.rocm_few_tokens


if __name__ == "__main__":
    main(run, ("vllm", "kernel_choice"))
