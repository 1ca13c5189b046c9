"""What ModelOpt writes: ``mtq.quantize`` and the Hugging Face export."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from producers.inputs import byte_tokenizer, calibration_ids
from producers.models import load

FP8 = {"num_bits": (4, 3), "axis": None}


def export(_model: str, base: Path, out: Path, recipe: Mapping[str, Any]) -> None:
    """``config`` by its name in ModelOpt, ``off`` as patterns, ``fp8``: what becomes FP8 instead, ``kv``."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.quantization.utils import update_quant_cfg_with_kv_cache_quant

    config = copy.deepcopy(getattr(mtq, recipe["config"]))
    if "kv" in recipe:
        config = update_quant_cfg_with_kv_cache_quant(config, getattr(mtq, recipe["kv"])["quant_cfg"])
    for layer in recipe.get("fp8", ()):
        names = [f"*{layer}*{side}_quantizer" for side in ("weight", "input")]
        config["quant_cfg"] += [{"quantizer_name": name, "cfg": FP8, "enable": True} for name in names]
    config["quant_cfg"] += [{"quantizer_name": pattern, "enable": False} for pattern in recipe["off"]]

    def calibrate(quantized: torch.nn.Module) -> None:
        for ids in calibration_ids():
            quantized(input_ids=ids[None])

    model = mtq.quantize(load(base), config, calibrate)
    more = {"max_shard_size": recipe["max_shard_size"]} if "max_shard_size" in recipe else {}
    export_hf_checkpoint(model, dtype=torch.bfloat16, export_dir=out, **more)
    byte_tokenizer().save_pretrained(out)
