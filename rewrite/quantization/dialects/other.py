"""A quantization config that this version recognizes by name only, and a model without one."""

from __future__ import annotations

from typing import Any, NoReturn

from rewrite.errors import Unsupported
from rewrite.quantization.dialects.base import Dialect
from rewrite.quantization.scheme import Dequantized, Layers, Scheme


class Other(Dialect):
    """Knows no scheme of any module, and refuses to state a new one."""

    def __init__(self, name: str, value: dict[str, Any]) -> None:
        super().__init__(value)
        self.name = name

    @classmethod
    def named(cls, value: dict[str, Any]) -> Other:
        """By the method and the algorithm that a quantization part names."""
        method, algorithm = value.get("quant_method"), value.get("quant_algo")
        return cls(" ".join(filter(None, [str(method), str(algorithm or "")])), value)

    @classmethod
    def none(cls) -> Other:
        """No quantization is stated."""
        return cls("none", {})

    def scheme(self, _module: str) -> Scheme | None:
        return None

    def as_compressed_tensors(self, _layers: Layers) -> NoReturn:
        raise Unsupported(
            "This quantization dialect cannot be converted",
            where="config.json: quantization_config.quant_method",
            expected="compressed-tensors, modelopt (quant_algo FP8) or fp8",
            found=self.name,
        )

    def without(self, _plain: Dequantized) -> NoReturn:
        self.as_compressed_tensors(Layers(frozenset(), (), frozenset()))
