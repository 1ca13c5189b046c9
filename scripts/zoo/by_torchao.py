"""What transformers writes with a torchao config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from fixtures.inputs import byte_tokenizer

from zoo.entry import Entry

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


def _of(config: str, **arguments: Any) -> dict[str, Any]:
    return {"config": config, "arguments": arguments}


TABLE = (
    Entry("torchao-float8-weight-only-qwen3_5-vl", "qwen3_5-vl", save, _of("Float8WeightOnlyConfig")),
    Entry("torchao-float8-tensor-qwen3_5-text", "qwen3_5-text", save, _of(_DYNAMIC, granularity="PerTensor")),
    Entry("torchao-float8-row-qwen3_5-vl", "qwen3_5-vl", save, _of(_DYNAMIC, granularity="PerRow")),
    Entry("torchao-int8-weight-only-llama", "llama", save, _of("Int8WeightOnlyConfig")),
    Entry("torchao-int8-dynamic-qwen3_5-text", "qwen3_5-text", save, _of("Int8DynamicActivationInt8WeightConfig")),
    Entry("torchao-intx-llama", "llama", save, _of("IntxWeightOnlyConfig")),
)
