"""SGLang: builds the model and loads it through `DefaultModelLoader`."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import MagicMock

from engines import driver, mocks
from engines.driver import Job

from loader_matrix.comparing import compare
from loader_matrix.reference import sgl_per_tensor_quant_fp8

if TYPE_CHECKING:
    import torch


def start() -> str:
    """Import SGLang and replace what CPU lacks. Nothing replaced reads, places or merges a weight or a scale."""
    # CUDA kernels without a CPU build, imported at module level (vllm: for its rotary embedding where CUDA is absent).
    mocks.install("sgl_kernel", "flashinfer", "vllm")
    import sglang
    from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
    from sglang.srt.layers.quantization.quark.quark import QuarkConfig
    from sglang.srt.model_loader import loader

    # A CUDA kernel; requantization to the largest scale calls it while loading.
    _kernels().sgl_per_tensor_quant_fp8 = sgl_per_tensor_quant_fp8
    # They ask for the card's compute capability; FP8 checkpoints are made for 8.9 and newer.
    loader.get_device_capability = lambda *_, **__: (9, 0)
    CompressedTensorsConfig._check_scheme_supported = lambda *_, **__: True
    QuarkConfig._check_scheme_supported = lambda *_, **__: True
    _replace_nvfp4_layouts()
    driver.preload("sglang.srt.models.registry")  # imports every model
    _keep_resampler_on_cpu()
    return str(sglang.__version__)


def _keep_resampler_on_cpu() -> None:
    """MiniCPM-V's (unquantized) resampler goes where an accelerator is asked for, or, before 0.5.14, to "cuda" by name;
    everything else goes where the loader is told to."""
    import torch

    model: Any = sys.modules["sglang.srt.models.minicpmv"]
    model.get_device = lambda *_: "cpu"
    stock: Any = torch.nn.Module.to

    def to(module: torch.nn.Module, *arguments: Any, device: Any = None, **others: Any) -> Any:
        return stock(module, *arguments, **({} if device is None else {"device": "cpu"}), **others)

    torch.nn.Module.to = to  # type: ignore[method-assign, assignment] # fewer overloads


def _replace_nvfp4_layouts() -> None:
    """What shuffles NVFP4 weights for a GPU's kernel once they are loaded, and what asks which GPU there is: a card of
    Blackwell's generation, which these checkpoints are made for. Reading, placing and merging scales stay as they are.
    """
    from sglang.srt.layers.quantization import modelopt_quant

    schemes = "sglang.srt.layers.quantization.compressed_tensors.schemes.compressed_tensors"
    if importlib.util.find_spec(f"{schemes}_w4a16_nvfp4") is None:  # earlier ones: not compared
        modelopt_quant.ModelOptFp4LinearMethod.process_weights_after_loading = lambda *_: None
        return
    # Of ModelOpt's: Marlin's way, the only one whose layout is not shuffled before Marlin's own repacking.
    modelopt_quant.prepare_nvfp4_layer_for_marlin = lambda *_: None
    modelopt_quant.prepare_moe_nvfp4_layer_for_marlin = lambda *_: None
    modelopt_quant.get_fp4_gemm_runner_backend = lambda: MagicMock(is_marlin=lambda: True)
    modelopt_quant.get_moe_runner_backend = lambda: modelopt_quant.MoeRunnerBackend.MARLIN
    w4a4, w4a16 = (_module(f"{schemes}_{kind}_nvfp4") for kind in ("w4a4", "w4a16"))
    w4a4.swizzle_blockscale = lambda scale: scale.data.clone()
    w4a4.get_fp4_gemm_runner_backend = lambda: MagicMock(is_flashinfer_trtllm=lambda: False, is_marlin=lambda: False)
    w4a16._use_flashinfer_bf16_fp4 = lambda *_: False
    w4a16.prepare_nvfp4_layer_for_marlin = lambda *_: None
    _take_small_experts(_module(f"{schemes}_w4a16_nvfp4_moe"))


def _take_small_experts(experts: Any) -> None:
    """Marlin wants experts of at least 128 columns, which the published models have; asked once the scales are merged.
    The sizes are only looked at there."""
    scheme = next(kind for name, kind in vars(experts).items() if name.startswith("CompressedTensorsW4A16"))
    stock = scheme.process_weights_after_loading

    def process(self: Any, layer: Any) -> None:
        layer.hidden_size, layer.intermediate_size_per_partition = 128, 64
        stock(self, layer)

    scheme.process_weights_after_loading = process
    marlin = _module("sglang.srt.layers.quantization.marlin_utils_fp4")
    marlin.prepare_moe_nvfp4_layer_for_marlin = lambda *_, **__: None  # looked for each time


def _module(name: str) -> Any:
    return importlib.import_module(name)


def _kernels() -> Any:
    """The module that wraps the FP8 kernels; 0.5.23 has it in another place."""
    try:
        return importlib.import_module("sglang.kernels.ops.quantization.fp8_kernel")
    except ModuleNotFoundError:
        return importlib.import_module("sglang.srt.layers.quantization.fp8_kernel")


def load(job: Job) -> torch.nn.Module:
    """The model, loaded and post-processed by SGLang's own loader."""
    arguments = _server_arguments(job.model)
    from sglang.srt.configs.device_config import DeviceConfig
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.model_loader.loader import DefaultModelLoader

    config = ModelConfig.from_server_args(arguments)
    _state_interval(config.hf_config, job.model)
    _one_rank(arguments, config, job.rendezvous)
    loader = DefaultModelLoader(LoadConfig())
    model: torch.nn.Module = loader.load_model(model_config=config, device_config=DeviceConfig("cpu"))
    return model


def _server_arguments(model: Path) -> Any:
    """ServerArgs for CPU. Before 0.5.13 its __post_init__ probes for GPUs, so it is made from the fields' defaults."""
    from sglang.srt.server_args import ServerArgs

    given = {
        "model_path": str(model),
        "tokenizer_path": str(model),
        "served_model_name": str(model),
        "skip_tokenizer_init": True,
        "device": "cpu",
        "dtype": "bfloat16",
        "attention_backend": "torch_native",
        "mm_attention_backend": "sdpa",
        "sampling_backend": "pytorch",
    }
    if _has_runtime_context():
        from sglang.srt.runtime_context import SpawnRanks, publish

        arguments = ServerArgs(**given, disable_radix_cache=True)
        publish(arguments, role="scheduler", ranks=SpawnRanks(world_rank=0))
        return arguments
    from sglang.srt.server_args import set_global_server_args_for_scheduler

    arguments = ServerArgs.__new__(ServerArgs)
    for field in dataclasses.fields(ServerArgs):
        default = None if field.default is dataclasses.MISSING else field.default
        made = default if field.default_factory is dataclasses.MISSING else field.default_factory()
        setattr(arguments, field.name, made)
    for name, value in given.items():
        setattr(arguments, name, value)
    set_global_server_args_for_scheduler(arguments)
    return arguments


def _has_runtime_context() -> bool:
    spec = importlib.util.find_spec("sglang.srt.runtime_context")
    return spec is not None and spec.origin is not None and "SpawnRanks" in Path(spec.origin).read_text()


def _state_interval(config: Any, model: Path) -> None:
    """Say every how many layers one has full attention, where config.json says it only layer by layer.

    Published configs of models with Gated DeltaNet have `full_attention_interval`, the only form SGLang reads;
    transformers' save_pretrained, which wrote the fixtures, keeps `layer_types` alone. Other families have neither.
    """
    stored = json.loads((model / "config.json").read_text())
    kinds = stored.get("text_config", stored).get("layer_types", ())
    text = getattr(config, "text_config", config)
    if "linear_attention" in kinds and "full_attention_interval" not in vars(text):
        text.full_attention_interval = kinds.index("full_attention") + 1


def _one_rank(arguments: Any, config: Any, rendezvous: str) -> None:
    from sglang.srt.distributed import parallel_state
    from sglang.srt.layers import dp_attention

    parallel_state.init_distributed_environment(
        world_size=1, rank=0, local_rank=0, distributed_init_method=rendezvous, backend="gloo"
    )
    parallel_state.initialize_model_parallel()
    if "model_config" in dp_attention.initialize_dp_attention.__annotations__:
        dp_attention.initialize_dp_attention(arguments, config)
    else:
        dp_attention.initialize_dp_attention(arguments)


if __name__ == "__main__":
    driver.run(("sglang", "compressed_tensors", "transformers"), start, load, compare)
