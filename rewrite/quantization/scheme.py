"""How a module is quantized, as a config states it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from rewrite.errors import ConfigError

#: How a weight scale is stored: one value; one per partition ``[P]``; one per row, ``[N, 1]`` ("channel") or ``[N]``
#: ("rows"); one per block.
ScaleLayout = Literal["tensor", "partition", "channel", "rows", "block"]
Activations = Literal["static", "dynamic", "none"]


@dataclass(frozen=True)
class Scheme:
    """The quantization of one module. Two schemes are equal when their configs say the same of the module."""

    format: str  # FP8, NVFP4, MXFP4, INT8, INT4; else as the config words it
    layout: ScaleLayout | None  # None: a layout that this library does not know
    activations: Activations
    text: str  # for people
    stated: str = ""  # everything that the config says of it, in a form that can be compared
    per_token: bool = False  # whether the activations get a scale for each token
    block: tuple[int, int] | None = None  # rows and columns that share a scale, where the config says so

    @property
    def fp8(self) -> bool:
        return self.format == "FP8"

    def means(self, other: Scheme) -> bool:
        """Whether both are the same quantization. Across dialects, only the parts that all of them state count."""
        if self.stated and other.stated:
            return self.stated == other.stated
        # How a scale for each row is stored is a matter of the dialect.
        layouts = ["channel" if scheme.layout == "rows" else scheme.layout for scheme in (self, other)]
        return layouts[0] == layouts[1] and (self.format, self.activations) == (other.format, other.activations)


@dataclass(frozen=True)
class Layers:
    """The matrices of a checkpoint by the names of their modules: those stored in FP8, and all others. ``quantized``
    are those that are not stored as ordinary floating-point numbers: FP8, packed, integers."""

    fp8: frozenset[str]
    others: Collection[str]
    quantized: frozenset[str]


@dataclass(frozen=True)
class Dequantized:
    """Modules that a conversion makes plain: ``fused`` are the names that engines fuse them to, ``targets`` are ``re:``
    patterns for both."""

    modules: tuple[str, ...]
    fused: tuple[str, ...]
    targets: tuple[str, ...]


def layout_of_shape(shape: tuple[int, ...], rows: int, partitions: int = 1) -> ScaleLayout | None:
    """The layout of a scale of ``shape`` for a weight of ``rows`` rows in so many partitions."""
    if shape in ((), (1,)):
        return "tensor"
    if shape == (rows, 1):
        return "channel"
    if shape == (partitions,):
        return "partition"
    if shape == (rows,):
        return "rows"
    return "block" if len(shape) == 2 else None


def block_shape(value: object) -> tuple[int, int] | None:
    """``[rows, columns]`` of a block as a config states it; None for anything else."""
    if not isinstance(value, list) or len(value) != 2 or not all(type(n) is int and n > 0 for n in value):
        return None
    return value[0], value[1]


def strings(value: object, where: str) -> list[str]:
    """``value`` if it is a list of strings. Raises :class:`ConfigError` otherwise."""
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ConfigError("A list of names was expected", where=where, expected='["…"]', found=value)
    return value
