"""ModelOpt's dialect, per-tensor FP8: ``quant_algo: FP8`` and ``ignore`` with globs, in config.json.

Older exports state it in ``hf_quant_config.json`` only, where the list is called ``exclude_modules``. The dialect has
no word for channel scales with static activations: such checkpoints are restated as compressed-tensors.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any, NoReturn

from rewrite.errors import Unsupported
from rewrite.quantization.dialects.base import Dialect
from rewrite.quantization.dialects.compressed_tensors import CompressedTensors, per_tensor_fp8
from rewrite.quantization.dialects.hf_quant_config import KV_CACHE
from rewrite.quantization.globs import as_target, compile_globs, is_glob
from rewrite.quantization.scheme import Dequantized, Layers, Scheme, strings

_WHERE = "config.json: quantization_config"

#: ``quant_algo: FP8``, of a whole checkpoint or of one layer.
PER_TENSOR = Scheme("FP8", "tensor", "static", "FP8 weights per tensor, static activations")
_NVFP4 = Scheme("NVFP4", None, "static", "NVFP4 weights, static activations")


class ModelOpt(Dialect):
    """A ``quantization_config`` with ``quant_method: modelopt`` and ``quant_algo: FP8``."""

    name = "modelopt"

    @staticmethod
    def states(value: dict[str, Any]) -> bool:
        return value.get("quant_method") == "modelopt" and value.get("quant_algo") == "FP8"

    def __init__(self, value: dict[str, Any]) -> None:
        self.value = value
        self._key = "ignore" if "ignore" in value or "exclude_modules" not in value else "exclude_modules"
        self._ignore = strings(value.get(self._key) or [], f"{_WHERE}.{self._key}")
        self.ignored = frozenset(self._ignore)  # lists of 10,000 names are real
        self._globs = compile_globs([name for name in self._ignore if is_glob(name)], f"{_WHERE}.{self._key}")

    def scheme(self, module: str) -> Scheme | None:
        return None if module in self.ignored or self._globs.match(module) else PER_TENSOR

    def leaves_alone(self, fused: str, parts: Collection[str]) -> bool:
        """Whether engines take the layer that they fuse plain ``parts`` to for plain. vLLM 0.32.0 and SGLang 0.5.23
        (``is_layer_skipped``, ``is_layer_excluded``) look names up for the parts, globs for the fused name only: both
        were run, and cast plain ``in_proj_a``, ``in_proj_b`` that ``*in_proj_a`` and ``*in_proj_b`` leave alone."""
        return self.ignored.issuperset(parts) or ModelOpt.scheme(self, fused) is None

    def as_compressed_tensors(self, layers: Layers) -> CompressedTensors:
        ignore = [as_target(pattern, layers.fp8, f"{_WHERE}.ignore") for pattern in self._ignore]
        return per_tensor_fp8(layers, ignore, "static", self._kv_cache_is_fp8())

    def without(self, plain: Dequantized) -> ModelOpt:
        names = [*self._ignore, *plain.modules, *map(_survives_renaming, plain.fused)]
        return type(self)({**self.value, self._key: names})

    def without_kv_cache(self) -> ModelOpt:
        return type(self)(without_kv_cache(self.value))

    def _kv_cache_is_fp8(self) -> bool:
        algorithm = self.value.get("kv_cache_quant_algo")
        scheme = self.value.get("kv_cache_scheme")
        if algorithm not in (None, "FP8"):
            raise Unsupported(
                "This KV-cache quantization has no compressed-tensors form",
                where=f"{_WHERE}.kv_cache_quant_algo",
                expected="FP8 or none",
                found=algorithm,
            )
        return algorithm == "FP8" or bool(scheme)


class ModelOptNvfp4(ModelOpt):
    """``quant_algo: NVFP4``, with the same list of ignored layers."""

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


def without_kv_cache(value: dict[str, Any]) -> dict[str, Any]:
    """ModelOpt's config where the KV cache is not quantized: its words for it say nothing."""
    return {**value, **{key: None for key in KV_CACHE if value.get(key)}}


def _survives_renaming(name: str) -> str:
    """A glob for a fused name that none of SGLang's renamings touches.

    SGLang 0.5.9 and 0.5.10 know no parts of ``qkv_proj``, and rename ``model.language_model.`` and ``attn.qkv`` in this
    list, but not in what they look up (``Qwen3VLForConditionalGeneration.hf_to_sglang_mapper``).
    """
    return re.sub(r"^model\.(language_model\.)?", "model.*", name).replace("attn.qkv", "att*.qkv")
