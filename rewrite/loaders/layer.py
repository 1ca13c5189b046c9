"""What an engine makes one layer: modules that it fuses, or the experts of a layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rewrite.quantization.dtypes import decode
from rewrite.quantization.groups import FusedGroup, Module
from rewrite.quantization.model import Model
from rewrite.quantization.nvfp4 import Nvfp4
from rewrite.quantization.scheme import Scheme

SeenLayout = Literal["none", "tensor", "partition", "channel", "block", "nvfp4", "group", "unknown", "other"]
GROUPED = ("INT4", "MXFP4", "MXFP8")  # a scale for a few weights of one row, and no other
_POWERS_OF_TWO = ("U8", "F8_E8M0")  # scales of the MX formats, which FP8 weights can have too (MXFP8)


@dataclass(frozen=True)
class Part:
    """A partition as a loader sees it. ``layout`` is that of its module's scale; "none": not quantized; "other": of
    a scheme that no loader was run with; "nvfp4": ``scale`` and ``input_scale`` are the global ones, to multiply
    with; "group": there are scales for groups of a row only, which joining rows leaves as they are."""

    name: str
    module: str
    rows: int
    layout: SeenLayout
    scale: float | None  # None for layouts with more than one value a partition
    scale_dtype: str = "BF16"
    input_scale: float | None = None  # of NVFP4 only


@dataclass(frozen=True)
class Layer:
    """A layer as a loader sees it, parts in slot order. ``kind`` is the fused layer's last name. The experts of a layer
    are one, of the kind "experts": gate and up are those of the expert where these are ``furthest`` from equal."""

    name: str
    kind: str
    parts: tuple[Part, ...]
    columns: int
    static_activations: bool
    experts: int = 0  # how many there are
    token_activations: bool = False  # quantized by a scale for each token
    furthest: str = ""
    divides: bool | None = None  # whether stored global scales are divisors (compressed-tensors); None: not NVFP4
    alike: bool = True  # of experts: one scheme, one layout, and the input scales that engines want

    @property
    def nvfp4(self) -> bool:
        """Whether all of it is NVFP4 of a kind that loaders were run with."""
        return all(part.layout == "nvfp4" for part in self.parts)

    @property
    def spread(self) -> float | None:
        """The largest scale over the smallest: how far apart the parts are. None where rows have their own scales."""
        scales = [part.scale for part in self.parts if part.scale]
        return max(scales) / min(scales) if len(scales) == len(self.parts) else None

    def to_json(self) -> dict[str, Any]:
        """In the words of ``rewrite/schemas``."""
        return {
            "name": self.name,
            "layer": self.kind,
            "partitions": [asdict(part) for part in self.parts],
            "columns": self.columns,
            "static_activations": self.static_activations,
            "experts": self.experts,
            "token_activations": self.token_activations,
            "furthest": self.furthest,
            "divides": bool(self.divides),
            "spread": self.spread,
        }


def fused_layer(group: FusedGroup, model: Model) -> Layer:
    """Reads scales of one value a module or partition, no others."""
    modules, columns = group.modules, group.modules[0].weight.shape[1]
    packed = [(module, module.nvfp4) for module in modules if module.nvfp4 and is_nvfp4(module.scheme)]
    if group.nvfp4 and len(packed) == len(modules):
        parts = tuple(part for module, own in packed for part in _nvfp4_parts(module, own, model))
        own = packed[0][1]
        static = own.input_scale is not None
        return Layer(group.name, group.layer.name, parts, columns * 2, static, divides=own.divides)
    parts = tuple(part for module in modules for part in _parts(module, model))
    scheme = modules[0].scheme
    # A config that says nothing of it: loaders go by the tensor.
    static = scheme.activations == "static" if scheme else any(module.input_scale for module in modules)
    return Layer(group.name, group.layer.name, parts, columns, static)


def is_nvfp4(scheme: Scheme | None) -> bool:
    return scheme is not None and scheme.format == "NVFP4"


def seen_layout(module: Module, scale_dtype: str, model: Model) -> SeenLayout:
    """How loaders see its scale. They were run with FP8, but not with MX scales, nor with plain activations."""
    scheme = module.scheme
    if module.plain:
        return "none"
    if scheme is not None and scheme.format in GROUPED and not _is_reordered(model):
        return "group"
    if not module.fp8 or scale_dtype in _POWERS_OF_TWO or (scheme is not None and scheme.activations == "none"):
        return "other"
    # A scale of ``[N]`` is one for each row where the dialect has that form for it, and no layout elsewhere.
    if module.layout == "rows":
        return "channel" if module.has_rows else "unknown"
    # One that is not stored ends no load: vLLM 0.32.0 and SGLang 0.5.23 were run.
    return module.layout or ("unknown" if scale_dtype else "other")


def _is_reordered(model: Model) -> bool:
    """Zero points, and groups of columns in another order, were not run."""
    more = ("weight_zero_point", "weight_g_idx")
    return any(name in form.tensors for form in model.checkpoint.alike for name in more)


def _nvfp4_parts(module: Module, own: Nvfp4, model: Model) -> Iterator[Part]:
    read = model.checkpoint.read_tensor
    scale = own.multiplier(read(own.scale.name))
    input_scale = None if own.input_scale is None else own.multiplier(read(own.input_scale.name))
    for partition in module.partitions:
        yield Part(partition.name, module.name, partition.rows, "nvfp4", scale, "F32", input_scale)


def _parts(module: Module, model: Model) -> Iterator[Part]:
    found = module.scale or module.block_scale
    scales: tuple[float | None, ...] = (None,) * len(module.partitions)
    if module.fp8 and module.scale is not None and module.layout in ("tensor", "partition"):
        values = decode(module.scale.dtype, model.checkpoint.read_tensor(module.scale.name), module.scale.name)
        scales = values if module.layout == "partition" else values * len(module.partitions)
    dtype = found.dtype if found else ""
    layout = seen_layout(module, dtype, model)
    for partition, scale in zip(module.partitions, scales, strict=True):
        yield Part(partition.name, module.name, partition.rows, layout, scale, dtype)
