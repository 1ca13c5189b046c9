"""vLLM: whether fused layers of formats without a kernel on CPU (INT4, MXFP4) hold the stored tensors, joined.

A group or a block of weights has a scale of its own there, and no other. If codes and scales of a fused layer are those
of its modules, byte for byte, it is served as it is stored, up to what a kernel makes of it.
"""

from __future__ import annotations

import importlib
from typing import Any

from engines import driver, trying
from engines.driver import Job

_SCHEMES = "vllm.model_executor.layers.quantization.compressed_tensors.schemes"
_FUSED = {
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


class _NoKernel:
    """In the place of a kernel: it neither repacks nor computes."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def process_weights_after_loading(self, _layer: Any) -> None: ...


def start() -> str:
    """Import vLLM, and leave out the kernels that it would repack these weights for."""
    version = trying.start()
    packed: Any = importlib.import_module(f"{_SCHEMES}.compressed_tensors_wNa16")
    packed.choose_mp_linear_kernel = lambda *_, **__: _NoKernel
    packed.CompressedTensorsWNA16.process_weights_after_loading = lambda *_: None
    mx: Any = importlib.import_module(f"{_SCHEMES}.compressed_tensors_w4a4_mxfp4")
    mx.init_mxfp4_linear_kernel = _NoKernel
    mx.CompressedTensorsW4A4Mxfp4.process_weights_after_loading = lambda *_: None
    return version


def measure(model: Any, job: Job) -> dict[str, Any]:
    """By fused layer and parameter: `joined`, or what it is instead."""
    from loader_matrix.truth import canonical, read_tensors

    stored = {canonical(name): tensor for name, tensor in read_tensors(job.truth).items()}
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        own = canonical(name) or ""
        stem, _, last = own.rpartition(".")
        for kind in ("weight_packed", "weight_scale") if last in _FUSED else ():
            parts = [stored.get(f"{stem}.{each}.{kind}") for each in _FUSED[last]]
            found[f"{own}.{kind}"] = _compared(getattr(module, kind, None), parts)
    return {"joined": found}


def _compared(held: Any, parts: list[Any]) -> str:
    import torch

    if held is None or any(part is None for part in parts):
        return "not there"
    whole = torch.cat(parts)
    is_same = whole.shape == held.shape and torch.equal(_bytes(whole), _bytes(held))
    return "joined" if is_same else "differs"


def _bytes(tensor: Any) -> Any:
    import torch

    return tensor.detach().contiguous().view(torch.uint8)


if __name__ == "__main__":
    driver.run(("vllm", "compressed_tensors", "transformers"), start, trying.load, measure)
