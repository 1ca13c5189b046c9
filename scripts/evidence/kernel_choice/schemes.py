"""The schemes of FP8 that a layer is built with: parts of a config.json, as the producers write them."""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]


def _numbers(strategy: str, *, dynamic: bool = False) -> Config:
    return {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, "dynamic": dynamic}


def _compressed_tensors(weights: Config, activations: Config) -> Config:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"format": "float-quantized", **group}},
        "ignore": ["lm_head"],
    }


def _quark(weights: Config, activations: Config) -> Config:
    given = {"dtype": "fp8_e4m3", "group_size": None, "symmetric": True, "observer_cls": "PerTensorMinMaxObserver"}
    config = {"weight": given | weights, "input_tensors": given | activations, "output_tensors": None, "bias": None}
    return {
        "quant_method": "quark",
        "global_quant_config": config,
        "layer_quant_config": {},
        "layer_type_quant_config": {},
        "exclude": ["lm_head"],
        "export": {"kv_cache_group": [], "pack_method": "reorder", "weight_format": "real_quantized"},
    }


_STATIC, _DYNAMIC, _TOKEN = _numbers("tensor"), _numbers("tensor", dynamic=True), _numbers("token", dynamic=True)
_QUARK = {"qscheme": "per_tensor", "is_dynamic": False, "ch_axis": None}
_QUARK_ROWS = {"qscheme": "per_channel", "is_dynamic": False, "ch_axis": 0}
_QUARK_TOKEN = {"qscheme": "per_channel", "is_dynamic": True, "ch_axis": 1}
_MODELOPT = {"num_bits": 8, "type": "float", "dynamic": False}

#: Weights, then activations: ``channel-static`` is what ``exact`` writes, ``channel-token`` what ``dynamic`` and
#: ``portable`` write. ``modelopt``, ``quark`` and ``fp8`` are per tensor, in those
#: dialects; ``quark-rows`` is what Quark calls ptpc.
SCHEMES: dict[str, Config] = {
    "tensor-static": _compressed_tensors(_numbers("tensor"), _STATIC),
    "tensor-dynamic": _compressed_tensors(_numbers("tensor"), _DYNAMIC),
    "tensor-token": _compressed_tensors(_numbers("tensor"), _TOKEN),
    "channel-static": _compressed_tensors(_numbers("channel"), _STATIC),
    "channel-token": _compressed_tensors(_numbers("channel"), _TOKEN),
    "modelopt": {
        "quant_method": "modelopt",
        "quant_algo": "FP8",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": _MODELOPT, "input_activations": _MODELOPT},
        },
        "ignore": ["lm_head"],
        "producer": {"name": "modelopt", "version": "0.47.0"},
    },
    "quark": _quark(_QUARK, _QUARK),
    "quark-rows": _quark(_QUARK_ROWS, _QUARK_TOKEN),
    "fp8": {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
}
TOKENS = (32, 1)  # a prefill, a decode


def schemes(engine: str) -> tuple[str, ...]:
    """Those that an engine is run with: transformers reads no other dialect of these than compressed-tensors'."""
    own = (name for name, config in SCHEMES.items() if config["quant_method"] == "compressed-tensors")
    return tuple(own) if engine == "transformers" else tuple(SCHEMES)
