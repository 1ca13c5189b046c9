"""How checkpoints state their quantisation. One file a dialect; each answers the same questions (:class:`Dialect`)."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple, Protocol

from rewrite.dialects.compressed_tensors import CompressedTensors
from rewrite.dialects.other import Other
from rewrite.dialects.scheme import Scheme

__all__ = ["Dialect", "QuantizationPart", "Scheme", "find_quantization", "read_dialect"]

#: Where loaders look for the quantisation part of config.json, in their order (vLLM ``get_quant_config``).
_PLACES = (("quantization_config",), ("text_config", "quantization_config"), ("compression_config",))


class Dialect(Protocol):
    """The questions that the rest of the library asks of a quantisation config."""

    name: str
    value: dict[str, Any]  # the quantisation part of the config

    def scheme(self, module: str) -> Scheme | None:
        """The scheme of a linear layer by its stored name; None when the config leaves it alone."""

    def check_convertible(self) -> None:
        """Raise :class:`rewrite.errors.Unsupported` where this dialect cannot be converted."""

    def with_channel_scales(self, target: str, converted: Collection[str], others: Collection[str]) -> Dialect:
        """The dialect after the modules ``converted`` got one scale per row; ``others`` are the other linear layers.

        ``target`` is a ``re:`` pattern for the converted modules and their fused name.
        Raises :class:`rewrite.errors.Unsupported` where the dialect cannot say that.
        """


class QuantizationPart(NamedTuple):
    """The quantisation part of a config and the keys that lead to it."""

    path: tuple[str, ...]
    value: dict[str, Any]


def find_quantization(config: dict[str, Any]) -> QuantizationPart | None:
    """The part of ``config.json`` that states the quantisation, or None for an unquantised model."""
    for path in _PLACES:
        value: Any = config
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, dict):
            return QuantizationPart(path, value)
    return None


def read_dialect(part: QuantizationPart | None) -> Dialect:
    """The dialect of a checkpoint. Unknown ones come back as :class:`Other`, which refuses when asked to convert."""
    if part is None:
        return Other("none", {})
    method = part.value.get("quant_method")
    if method == "compressed-tensors" or (method is None and "config_groups" in part.value):
        return CompressedTensors(part.value)
    return Other(str(method), part.value)
