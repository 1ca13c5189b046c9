"""A quantisation config that this version recognises by name only, and a model without one."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NoReturn

from rewrite.dialects.scheme import Layers, Scheme
from rewrite.errors import Unsupported


class Other:
    """Knows no scheme of any module, and refuses to state a new one."""

    def __init__(self, name: str, value: dict[str, Any]) -> None:
        self.name = name
        self.value = value

    def scheme(self, _module: str) -> Scheme | None:
        return None

    def housed(self, _layers: Layers) -> NoReturn:
        raise Unsupported(
            "This quantisation dialect cannot be converted",
            where="config.json: quantization_config.quant_method",
            expected="compressed-tensors, modelopt (quant_algo FP8) or fp8",
            found=self.name,
        )

    def ignoring(self, _targets: Collection[str], _modules: Collection[str], _fused: Collection[str]) -> NoReturn:
        self.housed(Layers(frozenset(), frozenset()))
