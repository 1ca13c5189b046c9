"""Whether the scheme that a config gives a module fits the tensors that are stored for it: names, dtypes and shapes.

Where an engine's scheme and the tensors differ, it raises or reads other numbers than were meant. What is not known
here (other formats, plain matrices that may be no linear layers) is not judged.
"""

from __future__ import annotations

from rewrite.checkpoint.checkpoint import Checkpoint
from rewrite.checkpoint.header import TensorInfo
from rewrite.quantization.dtypes import FP8_DTYPES
from rewrite.quantization.model import Kind, StoredModule
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


def misfit(kind: Kind) -> str | None:
    """What the tensors of these modules are, where their scheme asks for others; None where they fit or are not
    judged."""
    scheme, weight = kind.first.scheme, kind.first.weight
    if scheme is None or kind.first.plain or scheme.format not in _STORED:
        return None
    name = weight.name.rpartition(".")[2]
    if weight.dtype not in _STORED[scheme.format].get(name, ()):
        return f"{name} of dtype {weight.dtype}"
    if scheme.format != "FP8":
        return None
    tensors = kind.form.tensors
    scale = tensors.get("weight_scale") or tensors.get("weight_scale_inv")
    if scale is None:
        return "FP8 weight without a scale"
    if not _fits(scale[1], kind.first):
        return f"{weight.dtype} weight with a {scale[0]} scale of {list(scale[1])}"
    return "static activations without an input_scale" if lacks_input_scale(kind) else None


def odd_weight(checkpoint: Checkpoint) -> TensorInfo | None:
    """An FP8 weight that is no matrix. Quark quantizes the convolution of Gated DeltaNet from file to file unless that
    is left out: vLLM 0.32 raises on its scale, others were not seen to read it."""
    weights = (
        (module, form.tensors["weight"]) for module, form in checkpoint.forms.items() if "weight" in form.tensors
    )
    odd = (module for module, (dtype, shape) in weights if dtype in FP8_DTYPES and len(shape) != 2)
    name = next(odd, None)
    return None if name is None else checkpoint.tensors[f"{name}.weight"]


def lacks_input_scale(kind: Kind) -> bool:
    """Whether the config says of FP8 weights that their input has a stored scale, and none is stored. Engines then take
    what they created the slot with."""
    scheme = kind.first.scheme
    return (
        kind.first.fp8
        and scheme is not None
        and scheme.activations == "static"
        and "input_scale" not in kind.form.tensors
    )


def _fits(scale: tuple[int, ...], module: StoredModule) -> bool:
    layout = module.scheme.layout if module.scheme else None
    if layout == "tensor":  # also a vector of partitions: no dialect has another word for it
        return len(scale) <= 1
    if layout in ("channel", "rows"):
        return layout_of_shape(scale, module.weight.shape[0]) == layout
    return layout is None or layout_of_shape(scale, module.weight.shape[0]) in ("block", "channel")
