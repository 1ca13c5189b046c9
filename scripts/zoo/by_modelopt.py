"""What ModelOpt writes: ``mtq.quantize`` and the Hugging Face export."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from fixtures.inputs import byte_tokenizer, calibration_ids

from zoo.entry import Entry
from zoo.models import load

OFF = ["*lm_head*", "*in_proj_a*", "*in_proj_b*", "*conv1d*", "*visual*"]
ROUTERS_OFF = ["*mlp.gate.*", "*mlp.shared_expert_gate.*"]
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


def _of(config: str, off: list[str] = OFF, **more: Any) -> dict[str, Any]:
    return {"config": config, "off": off, **more}


_FP8 = "FP8_DEFAULT_CFG"
TABLE = (
    Entry("modelopt-fp8-qwen3_5-text", "qwen3_5-text", export, _of(_FP8)),
    Entry("modelopt-fp8-qwen3_5-vl-default", "qwen3_5-vl", export, _of(_FP8, []), "nothing switched off by hand"),
    Entry("modelopt-fp8-shards-qwen3_5-vl", "qwen3_5-vl", export, _of(_FP8, max_shard_size="100KB")),
    Entry("modelopt-fp8-kv-qwen3_5-vl", "qwen3_5-vl", export, _of(_FP8, kv="FP8_KV_CFG")),
    Entry("modelopt-fp8-qwen3_5-moe", "qwen3_5-moe", export, _of(_FP8, OFF + ROUTERS_OFF)),
    Entry("modelopt-fp8-phi3", "phi3", export, _of(_FP8, ["*lm_head*"])),
    Entry("modelopt-fp8-qwen3_next", "qwen3_next", export, _of(_FP8, [*OFF, *ROUTERS_OFF, "*in_proj_ba*"])),
    Entry("modelopt-fp8-deepseek_v3", "deepseek_v3", export, _of(_FP8, ["*lm_head*", "*mlp.gate.*"])),
    Entry("modelopt-fp8-qwen3_moe", "qwen3_moe", export, _of(_FP8, ["*lm_head*", "*mlp.gate.*"])),
    Entry("modelopt-pc-pt-qwen3_5-text", "qwen3_5-text", export, _of("FP8_PER_CHANNEL_PER_TOKEN_CFG")),
    Entry("modelopt-pb-wo-qwen3_5-text", "qwen3_5-text", export, _of("FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG")),
    Entry("modelopt-nvfp4-qwen3_5-text", "qwen3_5-text", export, _of("NVFP4_DEFAULT_CFG")),
    Entry("modelopt-nvfp4-mlp-llama", "llama", export, _of("NVFP4_MLP_ONLY_CFG", ["*lm_head*"])),
    Entry(
        "modelopt-nvfp4-experts-qwen3_5-moe-vl",
        "qwen3_5-moe-vl",
        export,
        _of("NVFP4_EXPERTS_ONLY_CFG", OFF + ROUTERS_OFF, kv="FP8_KV_CFG"),
    ),
    Entry(
        "modelopt-mixed-qwen3_5-text",
        "qwen3_5-text",
        export,
        _of("NVFP4_DEFAULT_CFG", fp8=["linear_attn", "self_attn"]),
    ),
    Entry(
        "modelopt-mixed-qwen3_5-moe-vl",
        "qwen3_5-moe-vl",
        export,
        _of("NVFP4_DEFAULT_CFG", OFF + ROUTERS_OFF, fp8=["linear_attn", "self_attn", "shared_expert"]),
    ),
    Entry(
        "modelopt-mixed-kv-llama",
        "llama",
        export,
        _of("NVFP4_DEFAULT_CFG", ["*lm_head*"], fp8=["self_attn"], kv="FP8_KV_CFG"),
    ),
    Entry("modelopt-w4a8-awq-llama", "llama", export, _of("W4A8_AWQ_BETA_CFG", ["*lm_head*"])),
    Entry("modelopt-mxfp8-llama", "llama", export, _of("MXFP8_DEFAULT_CFG", ["*lm_head*"])),
    Entry("modelopt-int8-sq-llama", "llama", export, _of("INT8_SMOOTHQUANT_CFG", ["*lm_head*"])),
)
