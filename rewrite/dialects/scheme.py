"""What every dialect can say: the scheme of a linear layer, and the names of layers that a config is about."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from rewrite.errors import ConfigError

#: How a weight scale is stored: one value; one per partition ``[P]``; one per row ``[N, 1]``; one per block.
ScaleLayout = Literal["tensor", "partition", "channel", "block"]
Activations = Literal["static", "dynamic", "none"]


@dataclass(frozen=True)
class Scheme:
    """FP8 (or other) weights with a scale layout, and when activations are quantised."""

    fp8: bool
    layout: ScaleLayout | None  # None: a layout that this library does not know
    activations: Activations
    text: str  # as the config words it, for people


@dataclass(frozen=True)
class Layers:
    """The matrices of a checkpoint by name: those stored in FP8 and those that are not."""

    quantised: frozenset[str]
    plain: frozenset[str]


class Dialect(Protocol):
    """The questions that the rest of the library asks of a quantisation config."""

    name: str
    value: dict[str, Any]  # the quantisation part of the config

    def scheme(self, module: str) -> Scheme | None:
        """The scheme of a linear layer by its stored name; None when the config leaves it alone."""

    def housed(self, layers: Layers) -> Housed:
        """The same quantisation stated as compressed-tensors, which can state every layout.

        Raises :class:`rewrite.errors.Unsupported` for what cannot be said there.
        """

    def ignoring(self, targets: Collection[str], modules: Collection[str], fused: Collection[str]) -> Dialect:
        """The dialect after ``modules`` became unquantised, which engines fuse to ``fused``. ``targets`` are ``re:``
        patterns for both.

        Raises :class:`rewrite.errors.Unsupported` where the dialect cannot say that.
        """


class Housed(Dialect, Protocol):
    """A dialect that can state channel scales and dynamic activations: compressed-tensors."""

    def with_channel_scales(self, targets: Collection[str], converted: Collection[str], layers: Layers) -> Housed:
        """The config after the modules ``converted`` got one scale per row. ``targets`` as in :meth:`ignoring`."""

    def portable(self, layers: Layers, fused_plain: Collection[str]) -> Housed:
        """One config group: every FP8 layer with channel scales and dynamic activations per token.

        ``fused_plain`` are ``re:`` patterns for unquantised layers that engines fuse.
        """


def strings(value: object, where: str) -> list[str]:
    """``value`` if it is a list of strings. Raises :class:`ConfigError` otherwise."""
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ConfigError("A list of names was expected", where=where, expected='["…"]', found=value)
    return value
