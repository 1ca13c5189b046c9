"""What transformers writes with a torchao config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from producers.inputs import byte_tokenizer

_DYNAMIC = "Float8DynamicActivationFloat8WeightConfig"


def save(_model: str, base: Path, out: Path, recipe: Mapping[str, Any]) -> None:
    """``config`` by its class, with ``arguments``; ``granularity`` by its class."""
    import torchao.quantization as ao
    import transformers
    from torchao.quantization import quant_api

    if recipe["config"] == _DYNAMIC:  # it asks for a GPU that multiplies FP8; only the quantization runs here
        quant_api._check_hardware_support = lambda _granularity: None
        quant_api.is_sm_at_least_89 = lambda: True
    arguments = dict(recipe.get("arguments", {}))
    if "granularity" in arguments:
        arguments["granularity"] = getattr(ao, arguments["granularity"])()
    config = transformers.TorchAoConfig(getattr(ao, recipe["config"])(**arguments))
    name = json.loads((base / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, name).from_pretrained(
        base, dtype=torch.bfloat16, quantization_config=config, device_map="cpu"
    )
    model.save_pretrained(out)
    byte_tokenizer().save_pretrained(out)
