"""A quantisation config that this version recognises by name only, and a model without one."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from rewrite.dialects.scheme import Scheme
from rewrite.errors import Unsupported


class Other:
    """Knows no scheme of any module, and refuses to state a new one."""

    def __init__(self, name: str, value: dict[str, Any]) -> None:
        self.name = name
        self.value = value

    def scheme(self, module: str) -> Scheme | None:
        return None

    def check_convertible(self) -> None:
        raise Unsupported(
            "This quantisation dialect cannot be converted yet",
            where="config.json: quantization_config.quant_method",
            expected="compressed-tensors",
            found=self.name,
        )

    def with_channel_scales(
        self,
        target: str,
        converted: Collection[str],
        others: Collection[str],
    ) -> Other:
        self.check_convertible()
        return self
