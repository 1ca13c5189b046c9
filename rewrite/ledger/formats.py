"""How each format stores a layer: which tensors it has, in which dtypes and shapes, and when each must be there.

One table for all formats, so that none is checked less than another. Names as compressed-tensors 0.20
(``compressors/``), ModelOpt 0.47 (``export/``), DeepSeek and Mistral write them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Literal

from rewrite.quantization.dtypes import FP8_DTYPES, PLAIN_DTYPES
from rewrite.quantization.scheme import Scheme, layout_of_shape

Shape = tuple[int, ...]
#: What a scale is one of: each has its own bounds.
Role = Literal["weight", "block", "global", "input"]
_Fits = Callable[[Shape, Shape, Scheme], bool]  # shape of the scale, rows and columns of the weight, its scheme


@dataclass(frozen=True)
class Scale:
    """A scale of a layer: one of ``names``. ``needed``: by which schemes."""

    role: Role
    names: tuple[str, ...]
    dtypes: frozenset[str]
    fits: _Fits
    shape: str  # in words
    needed: Callable[[Scheme], bool] = lambda _scheme: True


@dataclass(frozen=True)
class Format:
    """``weights``: what the weights are called, and their dtypes. ``packed``: weights in an element of each dtype."""

    weights: Mapping[str, frozenset[str]]
    scales: tuple[Scale, ...]
    packed: Mapping[str, int]

    def size(self, dtype: str, shape: Shape) -> Shape:
        """Rows and columns of the matrix that a weight is."""
        return shape[0], shape[1] * self.packed.get(dtype, 1)


def _one(scale: Shape, _weight: Shape, _scheme: Scheme) -> bool:
    return scale in ((), (1,))


def _blocks_of(columns: int) -> _Fits:
    def fits(scale: Shape, weight: Shape, _scheme: Scheme) -> bool:
        return scale == (weight[0], ceil(weight[1] / columns))

    return fits


def _by_layout(scale: Shape, weight: Shape, scheme: Scheme) -> bool:
    """As the scheme of FP8 says."""
    if scheme.layout == "tensor":
        return scale in ((), (1,))
    if scheme.layout in ("channel", "rows"):
        return layout_of_shape(scale, weight[0]) == scheme.layout
    if scheme.layout == "block" and scheme.block is not None and len(scale) == 2 and scale != (weight[0], 1):
        return scale == (ceil(weight[0] / scheme.block[0]), ceil(weight[1] / scheme.block[1]))
    return scheme.layout is None or layout_of_shape(scale, weight[0]) in ("block", "channel")


def _by_row(scale: Shape, weight: Shape, _scheme: Scheme) -> bool:
    """Integers: one number, or some for each row."""
    return scale in ((), (1,)) or (len(scale) < 3 and scale[0] == weight[0])


def _any(_scale: Shape, _weight: Shape, _scheme: Scheme) -> bool:
    return True


def _is_static(scheme: Scheme) -> bool:
    return scheme.activations == "static"


def _quantizes_inputs(scheme: Scheme) -> bool:
    """NVFP4 has a global scale for its inputs where these are quantized at all, with dynamic block scales, too."""
    return scheme.activations != "none"


#: No dialect has a word for the others, which vLLM 0.32.0 and SGLang 0.5.23 read as this one.
_E4M3 = frozenset({"F8_E4M3"})
_E8M0 = frozenset({"U8", "F8_E8M0"})
_FLOAT = PLAIN_DTYPES | _E8M0
_F32 = frozenset({"F32"})
_INPUT = ("input_scale", "activation_scale")
WEIGHT_SCALES = ("weight_scale", "weight_scale_inv", "scale")

FP8 = Format(
    {"weight": _E4M3},
    (
        Scale("weight", WEIGHT_SCALES, _FLOAT, _by_layout, "as the config says"),
        Scale("input", _INPUT, PLAIN_DTYPES, _one, "one number", _is_static),
    ),
    {},
)
_NVFP4_BLOCKS = Scale("block", ("weight_scale",), frozenset({"F8_E4M3"}), _blocks_of(16), "[rows, columns / 16]")
#: compressed-tensors.
NVFP4_PACKED = Format(
    {"weight_packed": frozenset({"U8"})},
    (
        _NVFP4_BLOCKS,
        Scale("global", ("weight_global_scale",), _F32, _one, "one number"),
        Scale("input", ("input_global_scale",), _F32, _one, "one number", _quantizes_inputs),
    ),
    {"U8": 2},
)
#: ModelOpt.
NVFP4 = Format(
    {"weight": frozenset({"U8"})},
    (
        _NVFP4_BLOCKS,
        Scale("global", ("weight_scale_2",), _F32, _one, "one number"),
        Scale("input", ("input_scale",), _F32, _one, "one number", _quantizes_inputs),
    ),
    {"U8": 2},
)
MXFP4 = Format(
    {"weight_packed": frozenset({"U8"}), "weight": frozenset({"U8", "I8"})},
    (Scale("block", ("weight_scale", "scale"), _E8M0, _blocks_of(32), "[rows, columns / 32]"),),
    {"U8": 2, "I8": 2},
)
MXFP8 = Format(
    {"weight": FP8_DTYPES},
    (Scale("block", ("weight_scale",), _E8M0, _blocks_of(32), "[rows, columns / 32]"),),
    {},
)
_INT_INPUT = Scale("input", ("input_scale",), PLAIN_DTYPES, _one, "one number", _is_static)
INT8 = Format(
    {"weight": frozenset({"I8"}), "weight_packed": frozenset({"I32"})},
    (
        Scale("weight", ("weight_scale",), PLAIN_DTYPES, _by_row, "some for each row"),
        _INT_INPUT,
    ),
    {"I32": 4},
)
#: compressed-tensors.
INT4_PACKED = Format(
    {"weight_packed": frozenset({"I32"})},
    (Scale("weight", ("weight_scale",), PLAIN_DTYPES, _by_row, "some for each row"), _INT_INPUT),
    {"I32": 8},
)
#: ModelOpt packs two rows into one, Quark has columns first.
INT4 = Format(
    {"weight": frozenset({"I8", "U8", "I32"})},
    (Scale("weight", ("weight_scale",), PLAIN_DTYPES, _any, "as the config says"), _INT_INPUT),
    {"I32": 8},
)

#: By the name that a scheme has for it: what a layer may be stored as.
FORMATS: Mapping[str, tuple[Format, ...]] = {
    "FP8": (FP8,),
    "NVFP4": (NVFP4_PACKED, NVFP4),
    "MXFP4": (MXFP4,),
    "MXFP8": (MXFP8,),
    "INT8": (INT8,),
    "INT4": (INT4_PACKED, INT4),
}

#: Every name of a scale in any of them.
SCALE_NAMES = frozenset(
    name for formats in FORMATS.values() for each in formats for scale in each.scales for name in scale.names
)
