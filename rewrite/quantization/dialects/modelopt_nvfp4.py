"""ModelOpt's dialect, NVFP4: ``quant_algo: NVFP4``, with the same list of ignored layers as per-tensor FP8."""

from __future__ import annotations

from typing import Any, NoReturn

from rewrite.errors import Unsupported
from rewrite.quantization.dialects.modelopt import ModelOpt
from rewrite.quantization.scheme import Dequantized, Layers, Scheme

_NVFP4 = Scheme("NVFP4", None, "static", "NVFP4 weights, static activations")


class ModelOptNvfp4(ModelOpt):
    """A ``quantization_config`` with ``quant_method: modelopt`` and ``quant_algo: NVFP4``."""

    name = "modelopt NVFP4"

    @staticmethod
    def states(value: dict[str, Any]) -> bool:
        return value.get("quant_method") == "modelopt" and value.get("quant_algo") == "NVFP4"

    def scheme(self, module: str) -> Scheme | None:
        return None if super().scheme(module) is None else _NVFP4

    def as_compressed_tensors(self, _layers: Layers) -> NoReturn:
        raise Unsupported(
            "NVFP4 of ModelOpt is not restated as compressed-tensors",
            where="config.json: quantization_config",
            expected="one FP8 scheme",
            found="NVFP4",
        )

    def without(self, plain: Dequantized) -> ModelOptNvfp4:
        return ModelOptNvfp4(super().without(plain).value)
