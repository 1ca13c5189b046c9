"""What every dialect can be asked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rewrite.quantization.scheme import Dequantized, Layers, Scheme

if TYPE_CHECKING:
    from rewrite.quantization.dialects.compressed_tensors import CompressedTensors


class Dialect(ABC):
    """One way of stating quantization. ``value`` is the stated part of the config."""

    name: str

    def __init__(self, value: dict[str, Any]) -> None:
        self.value = value

    @staticmethod
    def states(_value: dict[str, Any]) -> bool:
        """Whether a quantization part is of this dialect: never, unless it is one that is read."""
        return False

    @abstractmethod
    def scheme(self, module: str) -> Scheme | None:
        """The scheme of a linear layer by its stored name; None when the config leaves it alone."""

    def by_scheme(self, modules: Sequence[str]) -> list[tuple[Scheme | None, Sequence[str]]]:
        """The schemes of these modules, each with the modules that have it."""
        found: dict[int, tuple[Scheme | None, list[str]]] = {}  # by identity: dialects share their schemes
        for module in modules:
            scheme = self.scheme(module)
            found.setdefault(id(scheme), (scheme, []))[1].append(module)
        return list(found.values())

    @abstractmethod
    def as_compressed_tensors(self, layers: Layers) -> CompressedTensors:
        """The same quantization stated as compressed-tensors, which can state every layout.

        Raises :class:`rewrite.errors.Unsupported` for what cannot be said there.
        """

    @abstractmethod
    def without(self, plain: Dequantized) -> Dialect:
        """The dialect after some modules became plain.

        Raises :class:`rewrite.errors.Unsupported` where the dialect cannot say that.
        """

    def without_kv_cache(self) -> Dialect:
        """The dialect where the KV cache is not quantized any more; as it is where it has no words for one."""
        return self

    def as_compressed(self) -> Dialect:
        """The dialect where it says that the weights are stored as codes; as it is where it has no word for that."""
        return self
