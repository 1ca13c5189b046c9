"""What AMD Quark writes: ``quantize_model`` and its export, and ``direct_quantize_checkpoint`` from file to file."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from fixtures.inputs import calibration_ids

from zoo.entry import Entry
from zoo.models import load

EXCLUDE = ["lm_head", "*visual*", "*in_proj_a", "*in_proj_b", "*mlp.gate", "*shared_expert_gate*"]
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


def _of(scheme: str = "fp8", exclude: list[str] | None = EXCLUDE, **more: Any) -> dict[str, Any]:
    return {"scheme": scheme, "exclude_layers": exclude, **more}


TABLE = (
    Entry("quark-fp8-qwen3_5-text", "qwen3_5-text", quantize, _of()),
    Entry("quark-fp8-qwen3_5-vl-default", "qwen3_5-vl", quantize, _of(exclude=None), "the template's own excludes"),
    Entry("quark-fp8-kv-qwen3_5-vl", "qwen3_5-vl", quantize, _of(kv_cache_scheme="fp8")),
    Entry("quark-fp8-mode-qwen3_5-vl", "qwen3_5-vl", quantize, _of(mode="fp8"), "exported as quant_method fp8"),
    Entry("quark-ptpc-qwen3_5-vl", "qwen3_5-vl", quantize, _of("ptpc_fp8")),
    Entry(
        "quark-fp8-llama-attention",
        "llama",
        quantize,
        _of(exclude=["lm_head"], kv_cache_scheme="fp8", attention_scheme="fp8"),
    ),
    Entry("quark-fp8-mode-llama", "llama", quantize, _of(exclude=["lm_head"], mode="fp8")),
    Entry(
        "quark-mxfp4-fp8-qwen3_5-vl",
        "qwen3_5-vl",
        quantize,
        _of("mxfp4", layer_config={"*linear_attn*": "fp8", "*self_attn*": "fp8"}),
    ),
    Entry("quark-mxfp4-llama", "llama", quantize, _of("mxfp4", ["lm_head"])),
    Entry("quark-int8-llama", "llama", quantize, _of("int8", ["lm_head"])),
    Entry("quark-uint4-llama", "llama", quantize, _of("uint4_wo_64", ["lm_head"])),
    Entry("quark-fp8-qwen3_5-moe-vl", "qwen3_5-moe-vl", quantize, _of(exclude=None)),
    Entry("quark-file-ptpc-qwen3_5-vl", "qwen3_5-vl", file_to_file, _of("ptpc_fp8")),
    Entry("quark-file-fp8-qwen3_5-vl", "qwen3_5-vl", file_to_file, _of(), "declares static activations"),
    Entry("quark-file-fp8-qwen3_5-moe-vl", "qwen3_5-moe-vl", file_to_file, _of(exclude=[*EXCLUDE, "*conv1d*"])),
    Entry("quark-file-mxfp4-llama", "llama", file_to_file, _of("mxfp4", ["lm_head"])),
)
