"""The ``fp8`` dialect: AutoFP8's and vLLM's own (``vllm/model_executor/layers/quantization/fp8.py``).

One scheme for every linear layer but ``ignored_layers``: per tensor, ``activation_scheme`` static or dynamic; or by
blocks (``weight_block_size``, DeepSeek-V3's format), which no loader gets wrong.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

from rewrite.errors import ConfigError
from rewrite.quantization.dialects.base import Dialect
from rewrite.quantization.dialects.compressed_tensors import CompressedTensors, per_tensor_fp8
from rewrite.quantization.dialects.modelopt_mixed import NVFP4, experts_of
from rewrite.quantization.scheme import Activations, Dequantized, Layers, Scheme, block_shape, strings

_FP4 = Scheme("MXFP4", None, "dynamic", "FP4 weights with a scale for 32, dynamic activations")
_WHERE = "config.json: quantization_config"


#: SGLang 0.5.23 ``quantization/utils.py``, ``is_layer_skipped``.
_PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class Fp8(Dialect):
    """A ``quantization_config`` with ``quant_method: fp8``."""

    name = "fp8"

    @staticmethod
    def states(value: dict[str, Any]) -> bool:
        return value.get("quant_method") == "fp8"

    def __init__(self, value: dict[str, Any], *, fp4_experts: bool = False) -> None:
        """``fp4_experts``: config.json states ``expert_dtype: fp4`` beside it (DeepSeek-V4)."""
        self.value = value
        self._fp4_experts = fp4_experts
        layers = value.get("quantized_layers")  # DeepSeek-V4 by ModelOpt: its experts in NVFP4
        named = layers if isinstance(layers, dict) else {}
        self._nvfp4 = frozenset(n for n, v in named.items() if isinstance(v, dict) and v.get("quant_algo") == "NVFP4")
        self._key = "modules_to_not_convert" if "modules_to_not_convert" in value else "ignored_layers"
        self._ignored = strings(value.get(self._key) or [], f"{_WHERE}.{self._key}")
        self._names = frozenset(self._ignored)  # lists of 10,000 names are real

    def scheme(self, module: str) -> Scheme | None:
        if module in self._names:
            return None
        experts = experts_of(module)
        if module in self._nvfp4 or experts in self._nvfp4:
            return NVFP4
        return _FP4 if self._fp4_experts and experts else self._scheme

    @cached_property
    def _scheme(self) -> Scheme:
        if block := self.value.get("weight_block_size"):
            text = "FP8 weights per block, dynamic activations"
            return Scheme("FP8", "block", "dynamic", text, block=block_shape(block))
        activations = self._activations()
        return Scheme("FP8", "tensor", activations, f"FP8 weights per tensor, {activations} activations")

    def names(self, module: str) -> bool:
        """Whether ``ignored_layers`` has this very name."""
        return module in self._names

    def skips(self, module: str) -> bool:
        """Whether engines leave alone what they call so: an entry is in the name."""
        return any(entry in module for entry in self._ignored)

    def as_compressed_tensors(self, layers: Layers) -> CompressedTensors:
        return per_tensor_fp8(layers, self._ignored, self._activations(), kv_cache_fp8=False)

    def without(self, plain: Dequantized) -> Fp8:
        # SGLang 0.5.9 and 0.5.10 look for the fused names, 0.5.23 for the parts, of layers that are stored fused, too.
        parts = (name for fused in plain.fused for name in parts_of(fused))
        names = dict.fromkeys([*self._ignored, *plain.modules, *plain.fused, *parts])
        return Fp8({**self.value, self._key: list(names)}, fp4_experts=self._fp4_experts)

    def _activations(self) -> Activations:
        scheme = self.value.get("activation_scheme", "dynamic")
        if scheme not in ("static", "dynamic"):
            raise ConfigError(
                "Unknown activation scheme",
                where=f"{_WHERE}.activation_scheme",
                expected="static or dynamic",
                found=scheme,
            )
        return "static" if scheme == "static" else "dynamic"


def parts_of(fused: str) -> list[str]:
    """The names of the modules that engines take a fused layer to be made of."""
    parent, _, name = fused.rpartition(".")
    return [f"{parent}.{part}" for part in _PARTS.get(name, ())]
