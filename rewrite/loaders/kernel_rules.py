"""Which kernel each engine computes an FP8 layer with, by platform and scheme, as data; or that it has none.

Every rule was run: tests/kernel_choice.json has both ends of its versions, on each of its platforms, with each of its
schemes (``scripts/evidence.sh kernel_choice``: the engine's own choice of kernels, the platform mocked). What no rule
covers is not known.
"""

from __future__ import annotations

from dataclasses import dataclass

from rewrite.loaders.facts import Fact

#: Schemes as the record names them: compressed-tensors' by weights and activations, other dialects' by their name.
PER_TENSOR = ("tensor-static", "modelopt", "quark", "fp8")
_TENSOR_DYNAMIC = ("tensor-dynamic", "tensor-token")
CHANNEL_STATIC = ("channel-static",)
_CHANNEL_TOKEN = ("channel-token", "quark-rows")
_ALL = (*PER_TENSOR, *_TENSOR_DYNAMIC, *CHANNEL_STATIC, *_CHANNEL_TOKEN)
_OWN = ("tensor-static", *_TENSOR_DYNAMIC, *CHANNEL_STATIC, "channel-token")  # compressed-tensors'

_AMPERE, _ADA, _HOPPER = ("sm80",), ("sm89",), ("sm90",)
_BLACKWELL = ("sm100", "sm120")
_BLACKWELL_FLASHINFER = ("sm100+flashinfer", "sm120+flashinfer")
_CUDA = (*_ADA, *_HOPPER, *_BLACKWELL)
_ROCM = ("gfx942", "gfx950")


#: The newest version whose choice of kernels was run: rules without a last version are up to it.
NEWEST_RUN = {"vLLM": "0.32.0", "SGLang": "0.5.23", "transformers": "5.17.0"}


@dataclass(frozen=True)
class Layers:
    """FP8 layers of these schemes, computed with on these platforms."""

    platforms: tuple[str, ...]
    schemes: tuple[str, ...]


@dataclass(frozen=True)
class Kernel:
    """``family`` is the kernel, for people; None: the engine loads the layer and raises ``problem`` when it computes.
    ``calls`` are the operators that were called (on CPU: the kernel's class); empty where it raises."""

    family: str | None
    calls: tuple[str, ...]
    problem: str = ""
    loads: bool = True  # False: it raises before, while the layer is made


KernelFact = Fact[Layers, Kernel]

_VLLM = "vllm/model_executor/kernels/linear/scaled_mm"
_NO_DIMENSION = "its kernel cannot take one scale of the activations beside a scale for every row"
_MANY_TOKENS = "its kernel refuses one scale of the activations for several tokens"
_NO_SCHEME = "no scheme of Quark's for this card"
_SGLANG = "sglang/srt/layers/quantization/fp8_utils.py: apply_fp8_linear"
_COMMON = ("torch._scaled_mm",)


def _vllm(
    platforms: tuple[str, ...],
    schemes: tuple[str, ...],
    family: str | None,
    calls: tuple[str, ...],
    file: str,
    *,
    first: str = "0.17.0",
    problem: str = "",
) -> KernelFact:
    source = f"{_VLLM}/{file}"
    return Fact("vLLM", first, None, Layers(platforms, schemes), Kernel(family, calls, problem), source)


def _sglang(
    versions: tuple[str, str | None],
    platforms: tuple[str, ...],
    schemes: tuple[str, ...],
    family: str | None,
    calls: tuple[str, ...],
    *,
    problem: str = "",
    loads: bool = True,
) -> KernelFact:
    first, last = versions
    source = _SGLANG
    return Fact("SGLang", first, last, Layers(platforms, schemes), Kernel(family, calls, problem, loads), source)


_VLLM_RULES = (
    # modelopt is left out: 0.19.1 raises there in a way that may come from what the script replaces.
    _vllm(_AMPERE, (*_OWN, "fp8"), "Marlin (weights only)", ("marlin_gemm",), "marlin.py"),
    Fact(
        "vLLM",
        "0.17.0",
        None,
        Layers(_AMPERE, ("quark", "quark-rows")),
        Kernel(None, (), _NO_SCHEME, loads=False),
        "vllm/model_executor/layers/quantization/quark/quark.py",
    ),
    _vllm((*_CUDA, "sm90+flashinfer"), _ALL, "CUTLASS", ("cutlass_scaled_mm",), "cutlass.py"),
    _vllm(_BLACKWELL_FLASHINFER, PER_TENSOR, "FlashInfer", ("flashinfer.bmm_fp8",), "flashinfer.py"),
    _vllm(
        _BLACKWELL_FLASHINFER,
        (*_TENSOR_DYNAMIC, *CHANNEL_STATIC, *_CHANNEL_TOKEN),
        "CUTLASS",
        ("cutlass_scaled_mm",),
        "cutlass.py",
    ),
    _vllm(_ROCM, PER_TENSOR, "wvSplitKQ or torch", ("wvSplitKQ", *_COMMON), "rocm.py"),
    _vllm(_ROCM, _TENSOR_DYNAMIC, "torch, scaled afterwards", _COMMON, "pytorch.py"),
    _vllm(_ROCM, CHANNEL_STATIC, None, (), "pytorch.py", problem=_NO_DIMENSION),
    _vllm(_ROCM, _CHANNEL_TOKEN, "torch, by rows", ("torch._scaled_mm (rows)",), "pytorch.py"),
    _vllm(
        ("cpu",),
        PER_TENSOR,
        "torch (AMX, where the CPU has it)",
        ("PerTensorTorchFP8ScaledMMLinearKernel",),
        "pytorch.py",
        first="0.32.0",
    ),
    _vllm(
        ("cpu",),
        (*_TENSOR_DYNAMIC, *_CHANNEL_TOKEN),
        "torch, scaled afterwards",
        ("ChannelWiseTorchFP8ScaledMMLinearKernel",),
        "pytorch.py",
        first="0.32.0",
    ),
    _vllm(("cpu",), CHANNEL_STATIC, None, (), "pytorch.py", first="0.32.0", problem=_NO_DIMENSION),
)

_EVERY: tuple[str, str | None] = ("0.5.9", None)
_EARLY, _LATE = ("0.5.9", "0.5.17"), ("0.5.18", None)
_BEFORE_0523, _FROM_0523 = ("0.5.9", "0.5.22"), ("0.5.23", None)
_ROWS, _ROWS_CALL = "CUTLASS of sgl_kernel", ("sgl_kernel.fp8_scaled_mm",)
_TUNED = f"{_ROWS} or Triton"
_FLASHINFER = ("flashinfer.bmm_fp8",)
_TORCH, _TORCH_ROWS = "torch", ("torch._scaled_mm (rows)",)
_MARLIN = "Marlin (weights only)"

_SGLANG_RULES = (
    _sglang(_EVERY, _AMPERE, (*_OWN, "fp8"), _MARLIN, ("marlin_gemm",)),
    _sglang(_LATE, _AMPERE, ("modelopt",), _MARLIN, ("marlin_gemm",)),
    _sglang(_EVERY, _AMPERE, ("quark", "quark-rows"), None, (), problem=_NO_SCHEME, loads=False),
    _sglang(_EVERY, (*_CUDA, *_ROCM), ("tensor-static", *_TENSOR_DYNAMIC, "quark"), _TORCH, _COMMON),
    _sglang(_EARLY, _CUDA, _CHANNEL_TOKEN, _ROWS, _ROWS_CALL),
    # From 0.5.18 on there are tuned kernels in Triton for some shapes; the one that was run is none of these.
    _sglang(_LATE, _CUDA, _CHANNEL_TOKEN, _TUNED, _ROWS_CALL),
    _sglang(_EVERY, _ROCM, _CHANNEL_TOKEN, "torch, by rows", _TORCH_ROWS),
    # sgl_kernel, csrc/gemm/fp8_gemm_kernel.cu: "size of scales_a is not matched"
    _sglang(_EARLY, _CUDA, CHANNEL_STATIC, None, (), problem=_MANY_TOKENS),
    _sglang(_LATE, _CUDA, CHANNEL_STATIC, _TUNED, _ROWS_CALL),
    _sglang(_BEFORE_0523, _ROCM, CHANNEL_STATIC, None, (), problem=_NO_DIMENSION),
    _sglang(_FROM_0523, _ROCM, CHANNEL_STATIC, "torch, scaled afterwards", _COMMON),
    _sglang(_EVERY, _ROCM, ("modelopt", "fp8"), _TORCH, _COMMON),
    _sglang(_EVERY, _ADA, ("modelopt",), _ROWS, _ROWS_CALL),
    _sglang(_EARLY, _HOPPER, ("modelopt",), _ROWS, _ROWS_CALL),
    _sglang(_LATE, _HOPPER, ("modelopt",), "FlashInfer", _FLASHINFER),
    # It changes between 0.5.12 and 0.5.17; which version is the first was not run.
    _sglang(_EARLY, _BLACKWELL, ("modelopt",), f"{_ROWS}, later FlashInfer", (*_ROWS_CALL, *_FLASHINFER)),
    _sglang(_LATE, _BLACKWELL, ("modelopt",), "FlashInfer", _FLASHINFER),
    _sglang(_EVERY, (*_ADA, *_HOPPER, "sm100"), ("fp8",), _ROWS, _ROWS_CALL),
    _sglang(_EARLY, ("sm120",), ("fp8",), _ROWS, _ROWS_CALL),
    # It changes between 0.5.18 and 0.5.22.
    _sglang(_LATE, ("sm120",), ("fp8",), f"{_ROWS}, later torch", (*_ROWS_CALL, *_COMMON)),
)

_TRANSFORMERS_RULES = (
    Fact(
        "transformers",
        "5.17.0",
        None,
        Layers((*_AMPERE, *_CUDA, *_ROCM, "cpu"), _OWN),
        Kernel("torch, dequantized", ("torch.nn.functional.linear",)),
        "compressed-tensors 0.20.0, compressed_tensors/quantization/lifecycle/forward.py: no choice of kernels",
    ),
)

KERNEL_RULES = (*_VLLM_RULES, *_SGLANG_RULES, *_TRANSFORMERS_RULES)
