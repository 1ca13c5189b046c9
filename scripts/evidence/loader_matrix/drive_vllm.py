"""vLLM: builds the model and loads it through `get_model`, one process for each tensor parallel rank."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any
from unittest.mock import MagicMock

from engines import driver
from engines.driver import Job

from loader_matrix.comparing import compare
from loader_matrix.reference import scaled_fp8_quant

if TYPE_CHECKING:
    import torch


def start() -> str:
    """Import vLLM and replace what a CPU build lacks. Nothing replaced reads, places or merges a weight or a scale."""
    import torch
    import vllm
    import vllm._custom_ops as ops

    # A CUDA kernel, missing from CPU builds; requantization to the largest scale calls it while loading.
    ops.scaled_fp8_quant = scaled_fp8_quant
    # Raises where torch has no accelerator; called once the weights are loaded, to give device memory back.
    torch.accelerator.empty_cache = lambda: None
    # The compiled half of 0.26 does not load beside this torch. Layers look this operator up when they are made;
    # nothing calls it while loading. RuntimeError: it is there.
    with contextlib.suppress(RuntimeError):
        torch.library.define("_C::silu_and_mul", "(Tensor! result, Tensor input) -> ()")
    _replace_expert_kernels()
    _offer_nvfp4_kernel()
    _replace_nvfp4_layouts()
    _replace_linear_kernels()
    if os.environ.get("LOADER_MATRIX_AMX"):
        _pretend_amx()
    _keep_weights_as_loaded()
    _offer_fp8_cache()
    _inspect_models_here()
    driver.preload(
        "vllm.engine.arg_utils",
        "vllm.model_executor.model_loader",
        "vllm.model_executor.layers.quantization.modelopt",
        *(f"vllm.model_executor.models.{family}" for family in ("llama", "qwen3_5", "qwen3_next")),
    )
    return str(vllm.__version__)


def _inspect_models_here() -> None:
    """vLLM asks a model's class what it can do in a new process, which imports all of vLLM once more (20 s for every
    class): so that the engine's own process does not touch CUDA. Here, children are forked anyway."""
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda ask: ask()


def _replace_expert_kernels() -> None:
    """FP8 expert kernels exist for accelerators only. Has to run before vLLM's quantization modules are imported."""
    import vllm.model_executor.layers.fused_moe.oracle.fp8 as oracle

    # Finds no backend on CPU. Triton's takes weights in the order they were loaded in, so nothing is shuffled.
    oracle.select_fp8_moe_backend = lambda *_, **__: (oracle.Fp8MoeBackend.TRITON, object)
    # Would build the kernel that computes with the weights once they are loaded.
    oracle.make_fp8_moe_kernel = lambda *_, **__: None
    _keep_plain_experts_as_loaded()


def _keep_plain_experts_as_loaded() -> None:
    """*Unquantized* experts are repacked for a CPU kernel: they could not be compared."""
    with contextlib.suppress(ImportError):  # 0.19.1 has no such module
        from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

        CPUUnquantizedExperts.process_weights_after_loading = lambda *_: None
    with contextlib.suppress(ImportError):  # nor 0.32 this one
        from vllm.model_executor.layers.fused_moe import cpu_fused_moe

        cpu_fused_moe.CPUFusedMOE = cpu_fused_moe.SGLFusedMOE = lambda _: None


def _replace_linear_kernels() -> None:
    from vllm.model_executor.layers import utils
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
    from vllm.model_executor.layers.quantization.quark.quark import QuarkConfig

    # Repacks *unquantized* weights for a CPU GEMM and drops them: it can't take the 3-D convolution weight of a GDN
    # layer (0.19.1), and what it drops could not be compared.
    utils.dispatch_cpu_unquantized_gemm = lambda *_, **__: None
    # Asks for a card's compute capability and, where there is none, falls back to weight-only Marlin, another layout,
    # or finds no scheme (Quark). A card of Ada's generation or newer, which FP8 checkpoints are made for, says yes.
    CompressedTensorsConfig._check_scheme_supported = lambda *_, **__: True
    QuarkConfig._check_scheme_supported = lambda *_, **__: True


def _offer_nvfp4_kernel() -> None:
    """NVFP4 kernels exist for accelerators only. vLLM's own emulation leaves weights as they were loaded."""
    from vllm.model_executor.kernels import linear
    from vllm.platforms import PlatformEnum

    # 0.19.1 has it behind this variable, later ones in a list for each platform that lacks the CPU.
    os.environ["VLLM_USE_NVFP4_CT_EMULATIONS"] = "1"
    if hasattr(linear, "EmulationNvFp4LinearKernel"):
        kernels: Any = linear
        emulation = _nvfp4_emulation(kernels.EmulationNvFp4LinearKernel)
        kernels._POSSIBLE_NVFP4_KERNELS[PlatformEnum.CPU] = [emulation]
        # Weight-only layers get Marlin, whatever is in the list (0.32). It is looked for when a layer is made.
        kernels.init_nvfp4_linear_kernel = lambda **_: emulation(kernels.NvFp4LinearLayerConfig())


def _nvfp4_emulation(stock: Any) -> Any:
    """vLLM's emulation, which takes weight-only layers, too: multi-head latent attention multiplies with ``kv_b_proj``
    while it is loaded."""
    from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import dequantize_to_dtype

    class Emulation(stock):  # type: ignore[misc]
        def apply_weights(self, layer: Any, x: Any, bias: Any = None) -> Any:
            if hasattr(layer, "input_global_scale_inv"):
                return super().apply_weights(layer, x, bias)
            scales = layer.weight_scale, layer.weight_global_scale
            return x @ dequantize_to_dtype(layer.weight, *scales, x.dtype, 16, swizzle=False).T

    return Emulation


def _replace_nvfp4_layouts() -> None:
    """What shuffles NVFP4 weights for an accelerator's kernel once they are loaded. vLLM's emulation of experts leaves
    them as they are; 0.19.1 has none, so there Marlin's repacking is left out, of experts and of weight-only layers."""
    import vllm.model_executor.layers.fused_moe.oracle.nvfp4 as oracle

    backends = oracle.NvFp4MoeBackend
    backend = getattr(backends, "EMULATION", backends.MARLIN)
    oracle.select_nvfp4_moe_backend = lambda *_, **__: (backend, MagicMock())
    oracle.make_nvfp4_moe_kernel = lambda *_, **__: MagicMock()
    oracle.prepare_nvfp4_moe_layer_for_marlin = _as_loaded
    with contextlib.suppress(ImportError):  # 0.32 has one scheme for both
        from vllm.model_executor.layers.quantization.compressed_tensors.schemes import compressed_tensors_w4a16_nvfp4

        compressed_tensors_w4a16_nvfp4.prepare_fp4_layer_for_marlin = lambda *_: None


def _as_loaded(**given: Any) -> tuple[Any, ...]:
    return tuple(given[name] for name in ("w13", "w13_scale", "w13_scale_2", "w2", "w2_scale", "w2_scale_2"))


def _show_unset_memory() -> None:
    """Parameters are created in memory that holds anything. What nothing fills is NaN in this process, so that it shows
    in every run: torch does it where deterministic algorithms are asked for."""
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)


def _pretend_amx() -> None:
    """A CPU with AMX, as far as the choice of kernels and the repacking of weights go: results must not depend on it.

    The build of vLLM for such CPUs does not run on others. Its repacking is stood in for by another order of the rows.
    """
    import torch
    import vllm._custom_ops as ops

    torch.cpu._is_amx_tile_supported = lambda: True
    ops._supports_cpu_fp8_w8a16 = True
    with contextlib.suppress(RuntimeError):  # this CPU has it
        torch.library.define("_C::convert_weight_packed", "(Tensor weight) -> Tensor")
        torch.library.impl("_C::convert_weight_packed", "CPU", lambda weight: weight.flip(0).contiguous())


def _keep_weights_as_loaded() -> None:
    """On a CPU with AMX, vLLM 0.32 chooses a kernel that repacks FP8 weights (``CPUFp8PerTensorScaledMMLinearKernel``):
    they could not be compared. The kernels of torch, which every CPU has, leave them as they were loaded."""
    from vllm.model_executor.kernels import linear
    from vllm.platforms import PlatformEnum

    kernels = getattr(linear, "_POSSIBLE_FP8_KERNELS", {})
    plain = [kernel for kernel in kernels.get(PlatformEnum.CPU, ()) if "Torch" in kernel.__name__]
    if plain:
        kernels[PlatformEnum.CPU] = plain
    # Of block scales there are only kernels that repack, and not for every size: one of them, without its repacking.
    blocks = getattr(linear, "_POSSIBLE_FP8_BLOCK_KERNELS", {})
    if kernel := getattr(linear, "CPUFp8BlockScaledMMKernel", None):
        kernel.is_supported = kernel.can_implement = staticmethod(lambda *_, **__: (True, None))
        kernel.process_weights_after_loading = lambda *_: None
        blocks[PlatformEnum.CPU] = [kernel]
    if kernel := getattr(linear, "CPUInt8ScaledMMLinearKernel", None):  # repacks, if the size allows it
        kernel.process_weights_after_loading = lambda *_: None


def _offer_fp8_cache() -> None:
    """The CPU has FP8 caches since 0.32; before, it refuses one, or takes it for a BF16 one without scales."""
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends import cpu_attn

    if "fp8" in cpu_attn.CPUAttentionBackend.supported_kv_cache_dtypes:
        return
    # The backend, which would compute with the cache, refuses to be built. The scales are the layer's, not its.
    cpu_attn.is_quantized_kv_cache = lambda _: False
    check = CpuPlatform.check_and_update_config

    def keep_cache_type(config: Any) -> None:
        given = config.cache_config.cache_dtype
        config.cache_config.cache_dtype = "auto"
        check(config)
        config.cache_config.cache_dtype = given

    CpuPlatform.check_and_update_config = staticmethod(keep_cache_type)


def load(job: Job) -> torch.nn.Module:
    """The model, loaded and post-processed by vLLM's own loader."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    # Names the ranks' shared memory; the executor that would start them sets it.
    os.environ["VLLM_DIST_IDENT"] = job.out.parent.name
    config = EngineArgs(
        model=str(job.model),
        tensor_parallel_size=job.world,
        enforce_eager=True,
        max_model_len=128,
        dtype="bfloat16",
        language_model_only=True,
    ).create_engine_config()
    _show_unset_memory()
    with set_current_vllm_config(config):
        init_distributed_environment(job.world, job.rank, job.rendezvous, job.rank, "gloo")
        initialize_model_parallel(job.world, 1)
        model: torch.nn.Module = get_model(vllm_config=config)
    return model


if __name__ == "__main__":
    driver.run(("vllm", "compressed_tensors", "transformers"), start, load, compare)
