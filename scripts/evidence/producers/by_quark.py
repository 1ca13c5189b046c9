"""What AMD Quark writes: ``quantize_model`` and its export, and ``direct_quantize_checkpoint`` from file to file."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from producers.inputs import calibration_ids
from producers.models import load

_EXPORT = ("mode", "weight_format")


def _config(model: str, recipe: Mapping[str, Any]) -> Any:
    from quark.torch import LLMTemplate

    kind = {"qwen3_5-moe": "qwen3_5_moe", "qwen3_5-moe-vl": "qwen3_5_moe"}.get(model, model.split("-", maxsplit=1)[0])
    arguments = {k: v for k, v in recipe.items() if k not in _EXPORT}
    return LLMTemplate.get(kind).get_config(**arguments)


def _copy_side_files(base: Path, out: Path) -> None:
    for path in base.glob("*.json"):
        if path.name.startswith(("token", "generation")) and not (out / path.name).exists():
            shutil.copy(path, out)


def quantize(model: str, base: Path, out: Path, recipe: Mapping[str, Any]) -> None:
    """With calibration."""
    from quark.torch import ModelQuantizer, export_safetensors
    from torch.utils.data import DataLoader

    quantizer = ModelQuantizer(_config(model, recipe))
    quantized = quantizer.freeze(quantizer.quantize_model(load(base), DataLoader(calibration_ids(), batch_size=1)))
    more = {"weight_format": recipe.get("weight_format", "real_quantized")}
    with torch.no_grad():
        export_safetensors(quantized, out, custom_mode=recipe.get("mode", "quark"), **more)
    _copy_side_files(base, out)


def file_to_file(model: str, base: Path, out: Path, recipe: Mapping[str, Any]) -> None:
    """Without calibration and without the model."""
    from quark.torch import ModelQuantizer

    ModelQuantizer(_config(model, recipe)).direct_quantize_checkpoint(
        pretrained_model_path=str(base), save_path=str(out), device="cpu"
    )
    _copy_side_files(base, out)
