"""Whether the scheme that a config gives a module fits the tensors that are stored for it: names, dtypes and shapes.

Where an engine's scheme and the tensors differ, it raises or reads other numbers than were meant. What is not known
here (other formats, plain matrices that may be no linear layers) is not judged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rewrite.checkpoint.header import TensorInfo
from rewrite.quantization.dtypes import FP8_DTYPES
from rewrite.quantization.model import StoredModule
from rewrite.quantization.scales import layout_of_shape

#: Tensor and dtypes that each format stores its weights in (compressed-tensors 0.20 ``compressors/``, ModelOpt 0.47
#: ``export/``).
_STORED = {
    "FP8": {"weight": FP8_DTYPES},
    "NVFP4": {"weight_packed": frozenset({"U8"}), "weight": frozenset({"U8"})},
    "MXFP4": {"weight_packed": frozenset({"U8"}), "weight": frozenset({"U8"})},
    "INT8": {"weight": frozenset({"I8"}), "weight_packed": frozenset({"I32"})},
    "INT4": {"weight_packed": frozenset({"I32"}), "weight": frozenset({"I8", "U8", "I32"})},
}


def misfit(module: StoredModule, tensors: Mapping[str, TensorInfo]) -> str | None:
    """What the module's tensors are, where its scheme asks for others; None where they fit or are not judged."""
    scheme, weight = module.scheme, module.weight
    if scheme is None or module.plain or scheme.format not in _STORED:
        return None
    kind = weight.name.rpartition(".")[2]
    if weight.dtype not in _STORED[scheme.format].get(kind, ()):
        return f"{kind} of dtype {weight.dtype}"
    if scheme.format != "FP8":
        return None
    scale = tensors.get(f"{module.name}.weight_scale") or tensors.get(f"{module.name}.weight_scale_inv")
    if scale is None:
        return "FP8 weight without a scale"
    if not _fits(scale, module):
        return f"{weight.dtype} weight with a {scale.dtype} scale of {list(scale.shape)}"
    return "static activations without an input_scale" if lacks_input_scale(module, tensors) else None


def odd_weight(tensors: Iterable[TensorInfo]) -> TensorInfo | None:
    """An FP8 weight that is no matrix. Quark quantizes the convolution of Gated DeltaNet from file to file unless that
    is left out: vLLM 0.32 raises on its scale, others were not seen to read it."""
    odd = (t for t in tensors if t.dtype in FP8_DTYPES and t.name.endswith(".weight") and len(t.shape) != 2)
    return next(odd, None)


def lacks_input_scale(module: StoredModule, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether the config says of FP8 weights that their input has a stored scale, and none is stored. Engines then take
    what they created the slot with."""
    static = module.fp8 and module.scheme is not None and module.scheme.activations == "static"
    return static and f"{module.name}.input_scale" not in tensors


def _fits(scale: TensorInfo, module: StoredModule) -> bool:
    layout = module.scheme.layout if module.scheme else None
    if layout == "tensor":  # also a vector of partitions: no dialect has another word for it
        return len(scale.shape) <= 1
    if layout in ("channel", "rows"):
        return layout_of_shape(scale.shape, module.weight.shape[0]) == layout
    return layout is None or layout_of_shape(scale.shape, module.weight.shape[0]) in ("block", "channel")
