"""The base models: tiny, seeded, BF16, with clearly different ranges for the parts of whatever engines fuse."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from fixtures.constants import BYTES, SEED
from fixtures.geometry import ATTENTION, GDN, Geometry
from fixtures.inputs import byte_tokenizer
from fixtures.plain import plain_settings
from fixtures.qwen import dense_settings, moe_settings, multimodal_settings, vision_settings
from fixtures.ranges import spread_ranges
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen3_5Config,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

# Key heads of 64, so that q, k and v start at multiples of 128: recipes with blocks of 128 need that, real models do.
DENSE = Geometry(128, 128, (GDN, GDN, ATTENTION), head_dim=32, gdn_head_dim=64)
MOE = Geometry(128, 64, (GDN, ATTENTION), head_dim=32, gdn_head_dim=64)
PLAIN = Geometry(128, 128, (ATTENTION, ATTENTION), head_dim=32, gdn_head_dim=0)

_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 96,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}


def _qwen_vl(geometry: Geometry = DENSE) -> PreTrainedModel:
    config = Qwen3_5Config(
        text_config=dense_settings(geometry), vision_config=vision_settings(geometry), **multimodal_settings()
    )
    return Qwen3_5ForConditionalGeneration(config)


def _qwen_moe_vl() -> PreTrainedModel:
    config = Qwen3_5MoeConfig(
        text_config=moe_settings(MOE), vision_config=vision_settings(MOE), **multimodal_settings()
    )
    return Qwen3_5MoeForConditionalGeneration(config)


def _next() -> PreTrainedModel:
    settings = moe_settings(MOE)
    settings["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    return Qwen3NextForCausalLM(Qwen3NextConfig(**settings))


def _tied() -> dict[str, Any]:
    return {**plain_settings(PLAIN), "head_dim": 32, "tie_word_embeddings": True}


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen3_5-text": lambda: Qwen3_5ForCausalLM(Qwen3_5TextConfig(**dense_settings(DENSE))),
    "qwen3_5-vl": _qwen_vl,
    "qwen3_5-vl-wide": lambda: _qwen_vl(replace(DENSE, vision_hidden=128)),
    "qwen3_5-moe": lambda: Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**moe_settings(MOE))),
    "qwen3_5-moe-vl": _qwen_moe_vl,
    "qwen3_next": _next,
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**plain_settings(PLAIN), head_dim=32)),
    "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(**_tied())),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**plain_settings(PLAIN))),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**plain_settings(PLAIN), head_dim=32)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**plain_settings(PLAIN), **_EXPERTS, head_dim=32)),
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**plain_settings(PLAIN), num_local_experts=4, num_experts_per_tok=2, head_dim=32)
    ),
    "deepseek_v3": lambda: DeepseekV3ForCausalLM(DeepseekV3Config(**{**plain_settings(PLAIN), **_MLA})),
}


def base_model(name: str, root: Path) -> Path:
    """The folder of a base model; made the first time. ``<name>+mtp`` has a layer of multi-token prediction, too."""
    folder = root / name
    if not (folder / "config.json").exists():
        plain = name.removesuffix("+mtp")
        random.seed(SEED)
        torch.manual_seed(SEED)
        model = MODELS[plain]().bfloat16().eval()
        model.config.get_text_config().dtype = torch.bfloat16
        spread_ranges(model)
        model.generation_config = GenerationConfig(do_sample=False, eos_token_id=BYTES, pad_token_id=BYTES)
        model.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        if plain != name:
            _add_mtp(folder)
    return folder


def _add_mtp(folder: Path) -> None:
    """The tensors of Qwen3.5's MTP layer, which transformers neither makes nor keeps: copies of the last layer's."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    config = json.loads((folder / "config.json").read_text())
    last = (config.get("text_config") or config)["num_hidden_layers"] - 1
    mark = f"layers.{last}."
    copies = {f"mtp.layers.0.{name.split(mark)[1]}": t.clone() for name, t in tensors.items() if mark in name}
    norm = next(t for name, t in tensors.items() if name.endswith("norm.weight") and t.shape == (DENSE.hidden,))
    for each in ("norm", "pre_fc_norm_hidden", "pre_fc_norm_embedding"):
        copies[f"mtp.{each}.weight"] = norm.clone()
    copies["mtp.fc.weight"] = torch.randn(DENSE.hidden, 2 * DENSE.hidden, dtype=torch.bfloat16) * 0.05
    save_file({**tensors, **copies}, path, metadata={"format": "pt"})


def load(folder: Path) -> PreTrainedModel:
    """The base model, in the class that its config names."""
    import transformers

    config = AutoConfig.from_pretrained(folder)
    model: PreTrainedModel = getattr(transformers, config.architectures[0]).from_pretrained(
        folder, dtype=torch.bfloat16
    )
    return model.eval()
