"""ModelOpt's dialect for layers of several formats: ``quant_algo: MIXED_PRECISION``, one ``quant_algo`` a layer in
``quantized_layers``. Published models have FP8 Gated DeltaNet layers beside NVFP4.

A layer that is not listed is not quantized, in every loader that reads the dialect (vLLM and SGLang,
``ModelOptMixedPrecisionConfig``). Channel scales have a word here, ``FP8_PER_CHANNEL_PER_TOKEN``, but vLLM before 0.30
and SGLang up to 0.5.23 take such a layer for an unquantized one, without a word, so it is not used.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NoReturn

from rewrite.errors import ConfigError, Unsupported
from rewrite.quantization.dialects.base import Dialect
from rewrite.quantization.dialects.modelopt import PER_TENSOR, without_kv_cache
from rewrite.quantization.scheme import Dequantized, Layers, Scheme, strings

NVFP4 = Scheme("NVFP4", None, "static", "NVFP4 weights")
_WHERE = "config.json: quantization_config"
_SCHEMES = {
    "FP8": PER_TENSOR,
    "FP8_PER_CHANNEL_PER_TOKEN": Scheme("FP8", "channel", "dynamic", "FP8 weights per channel, dynamic activations"),
    "NVFP4": NVFP4,
    "W4A16_NVFP4": Scheme("NVFP4", None, "none", "W4A16_NVFP4 weights"),
    "MXFP8": Scheme("MXFP8", "block", "dynamic", "MXFP8 weights"),
    "FP8_PB_WO": Scheme("FP8", "block", "dynamic", "FP8 weights per block, dynamic activations"),
}


class ModelOptMixed(Dialect):
    """A ``quantization_config`` with ``quant_method: modelopt`` and ``quant_algo: MIXED_PRECISION``."""

    name = "modelopt MIXED_PRECISION"

    @staticmethod
    def states(value: dict[str, Any]) -> bool:
        return value.get("quant_method") == "modelopt" and value.get("quant_algo") == "MIXED_PRECISION"

    def __init__(self, value: dict[str, Any]) -> None:
        self.value = value
        layers = value.get("quantized_layers")
        if not isinstance(layers, dict) or not all(_states_algorithm(layer) for layer in layers.values()):
            raise ConfigError(
                "quantized_layers is not an object of layers",
                where=f"{_WHERE}.quantized_layers",
                expected='{module: {"quant_algo": "…"}}',
                found=layers,
            )
        self._algorithms = {name: layer["quant_algo"].upper() for name, layer in layers.items()}
        self._schemes = {algorithm: _scheme(algorithm) for algorithm in set(self._algorithms.values())}

    def scheme(self, module: str) -> Scheme | None:
        algorithm = self._algorithms.get(module) or self._algorithms.get(experts_of(module))
        return None if algorithm is None else self._schemes[algorithm]

    def as_compressed_tensors(self, _layers: Layers) -> NoReturn:
        raise Unsupported(
            "Mixed precision has no form with channel scales that loaders read",
            where=_WHERE,
            expected="one FP8 scheme",
            found=", ".join(sorted(set(self._algorithms.values()))),
        )

    def without_kv_cache(self) -> ModelOptMixed:
        return ModelOptMixed(without_kv_cache(self.value))

    def without(self, plain: Dequantized) -> ModelOptMixed:
        """The modules leave ``quantized_layers``, and the config groups that name them one by one. They join
        ``ignore``, where it is: vLLM and SGLang raise where it names some parts of a fused layer only
        (``is_layer_skipped``)."""
        gone = set(plain.modules)
        value = {**self.value}
        value["quantized_layers"] = {name: v for name, v in value["quantized_layers"].items() if name not in gone}
        if isinstance(ignored := value.get("ignore"), list):
            value["ignore"] = list(dict.fromkeys([*ignored, *plain.modules]))
        if isinstance(groups := value.get("config_groups"), dict):
            value["config_groups"] = {name: left for name, v in groups.items() if (left := _without(v, gone, name))}
        if not value["quantized_layers"]:
            raise Unsupported(
                "No layer would stay quantized",
                where=f"{_WHERE}.quantized_layers",
                expected="a layer that is not converted: loaders refuse an empty list",
                found="none",
                hint="quantize the model again without these layers",
            )
        return ModelOptMixed(value)


def experts_of(module: str) -> str:
    """The name of all experts of a layer, under which a config may list them, for one of them; else nothing."""
    layer, found, _ = module.rpartition(".experts.")
    return f"{layer}.experts" if found else ""


def _scheme(algorithm: str) -> Scheme:
    return _SCHEMES.get(algorithm, Scheme(algorithm, None, "static", f"{algorithm} weights"))


def _states_algorithm(layer: object) -> bool:
    return isinstance(layer, dict) and isinstance(layer.get("quant_algo"), str)


def _without(group: Any, gone: Collection[str], name: str) -> Any:
    """The config group without some of its targets; None where none is left."""
    if not isinstance(group, dict) or "targets" not in group:
        return group
    targets = strings(group["targets"], f"{_WHERE}.config_groups.{name}.targets")
    left = [target for target in targets if target not in gone]
    return {**group, "targets": left} if left else None
