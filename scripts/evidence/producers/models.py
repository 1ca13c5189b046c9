"""The base models: tiny, seeded, BF16, with clearly different ranges for the parts of whatever engines fuse."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, PreTrainedModel

from producers import geometry
from producers.geometry import Geometry
from producers.inputs import BYTES, SEED, VOCAB_SIZE, byte_tokenizer
from producers.ranges import spread_mlp_ranges, spread_ranges


def _settings(sizes: Geometry) -> dict[str, Any]:
    """Keyword arguments common to all of them."""
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": sizes.hidden,
        "num_hidden_layers": len(sizes.layer_types),
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "max_position_embeddings": 512,
        # The stock 0.02 suits wide models: at this width the layers would hardly move the residual stream, and k and v
        # wrong by a factor of eight would change the logits by 8 % only. So they change by 85 %, FP8 rounding by 12 %.
        "initializer_range": 0.5 * sizes.hidden**-0.5,
        "eos_token_id": BYTES,
    }


def _plain(sizes: Geometry) -> dict[str, Any]:
    """Full attention and a dense MLP in every layer."""
    return _settings(sizes) | {
        "intermediate_size": sizes.intermediate,
        "bos_token_id": BYTES,
        "pad_token_id": BYTES,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }


def _gated(sizes: Geometry) -> dict[str, Any]:
    """Gated DeltaNet in most layers; the MLPs are still to be said."""
    quarter = sizes.head_dim // 8  # rotary pairs: a quarter of the head, two values a pair
    return _settings(sizes) | {
        "layer_types": list(sizes.layer_types),
        "head_dim": sizes.head_dim,
        "linear_num_key_heads": sizes.gdn_key_heads,
        "linear_num_value_heads": sizes.gdn_value_heads,
        "linear_key_head_dim": sizes.gdn_head_dim,
        "linear_value_head_dim": sizes.gdn_head_dim,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
            "mrope_section": [quarter // 2, quarter // 4, quarter // 4],
            "mrope_interleaved": True,
        },
    }


def dense(sizes: Geometry) -> dict[str, Any]:
    """Gated DeltaNet and dense MLPs."""
    return _gated(sizes) | {"intermediate_size": sizes.intermediate}


def _moe(sizes: Geometry) -> dict[str, Any]:
    """Four experts, two of them taken, and a shared one."""
    return _gated(sizes) | {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": sizes.intermediate,
        "shared_expert_intermediate_size": sizes.intermediate,
    }


def vision(hidden: int, width: int) -> dict[str, Any]:
    """The smallest vision tower that still has every kind of layer; 8-pixel patches keep its input projection small."""
    return {
        "depth": 1,
        "hidden_size": width,
        "intermediate_size": width * 2,
        "num_heads": 2,
        "patch_size": 8,
        "out_hidden_size": hidden,
        "num_position_embeddings": 16,
    }


def vision_tokens() -> dict[str, Any]:
    """The ids of the four vision tokens, in the tokenizer's order."""
    keys = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return {key: BYTES + 1 + i for i, key in enumerate(keys)}


def _made(family: str, settings: dict[str, Any], *, config: str = "", kind: str = "ForCausalLM") -> PreTrainedModel:
    """A model of transformers' class, untrained."""
    made: PreTrainedModel = getattr(transformers, family + kind)(
        getattr(transformers, config or f"{family}Config")(**settings)
    )
    return made


def _qwen_text(sizes: Geometry) -> PreTrainedModel:
    return _made("Qwen3_5", dense(sizes), config="Qwen3_5TextConfig")


def _qwen_moe_text(sizes: Geometry) -> PreTrainedModel:
    return _made("Qwen3_5Moe", _moe(sizes), config="Qwen3_5MoeTextConfig")


def _seeing(family: str, text: dict[str, Any], sizes: Geometry) -> PreTrainedModel:
    """Beside a vision tower."""
    tower = vision(sizes.hidden, sizes.vision_hidden)
    settings = {"text_config": text, "vision_config": tower, **vision_tokens()}
    return _made(family, settings, kind="ForConditionalGeneration")


def _qwen(sizes: Geometry) -> PreTrainedModel:
    return _seeing("Qwen3_5", dense(sizes), sizes)


def _qwen_moe(sizes: Geometry) -> PreTrainedModel:
    return _seeing("Qwen3_5Moe", _moe(sizes), sizes)


def _next(sizes: Geometry) -> PreTrainedModel:
    """in_proj_qkvz and in_proj_ba stored fused, experts in every layer, as in the published models."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    return _made("Qwen3Next", _moe(sizes) | {"rope_parameters": rope})


def _minicpm(sizes: Geometry) -> PreTrainedModel:
    """MiniCPM-V 4.6: Qwen3.5's text model under a vision tower of its own, the smallest that has every kind of layer.
    Its tower merges windows of four patches after one of its blocks, so the merger is four times as wide as a block."""
    tower = {
        "hidden_size": sizes.vision_hidden,
        "intermediate_size": sizes.vision_hidden,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    tokens = {name: each for name, each in vision_tokens().items() if name in ("image_token_id", "video_token_id")}
    text = transformers.Qwen3_5TextConfig(**dense(sizes))
    settings = {"text_config": text, "vision_config": tower, "image_size": 32, "insert_layer_id": 0, **tokens}
    return _made("MiniCPMV4_6", settings, kind="ForConditionalGeneration")


def _headed(family: str, sizes: Geometry, **more: Any) -> PreTrainedModel:
    """Llama, Mixtral and Qwen3: q, k, v and gate, up are stored one by one."""
    return _made(family, _plain(sizes) | {"head_dim": sizes.head_dim, **more})


def _headless(family: str, sizes: Geometry) -> PreTrainedModel:
    """Phi-3, whose qkv_proj and gate_up_proj are stored fused, and Granite: configs without head_dim."""
    return _made(family, _plain(sizes))


def _deepseek(sizes: Geometry, ranks: tuple[int, int], expert: int, **more: Any) -> PreTrainedModel:
    """DeepSeek-V3: multi-head latent attention; a dense layer, then one with experts and a shared one."""
    latent = {
        "num_key_value_heads": sizes.heads,
        "q_lora_rank": ranks[0],
        "kv_lora_rank": ranks[1],
        "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": expert,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    }
    return _made("DeepseekV3", _plain(sizes) | latent | more)


#: Engines do not load DeepSeek-V3 without the keys of the router (vLLM), the frequency of such layers and YaRN (SGLang
#: on CPU), which the published configs have.
_PUBLISHED = {
    "moe_layer_freq": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 128,
    },
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_ZOO, _SMALL = geometry.PLAIN, geometry.SMALL_PLAIN

#: Those with a size in front are of the fixtures, the others of the zoo.
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen3_5-text": partial(_qwen_text, geometry.DENSE),
    "qwen3_5-vl": partial(_qwen, geometry.DENSE),
    "qwen3_5-vl-wide": partial(_qwen, geometry.DENSE_WIDE),
    "qwen3_5-moe": partial(_qwen_moe_text, geometry.MOE),
    "qwen3_5-moe-vl": partial(_qwen_moe, geometry.MOE),
    "qwen3_next": partial(_next, geometry.MOE),
    "llama": partial(_headed, "Llama", _ZOO),
    "llama-tied": partial(_headed, "Llama", _ZOO, tie_word_embeddings=True),
    "phi3": partial(_headless, "Phi3", _ZOO),
    "qwen3": partial(_headed, "Qwen3", _ZOO),
    "qwen3_moe": partial(_headed, "Qwen3Moe", _ZOO, **_EXPERTS),
    "mixtral": partial(_headed, "Mixtral", _ZOO, num_local_experts=4, num_experts_per_tok=2),
    "deepseek_v3": partial(_deepseek, _ZOO, (64, 96), 64),
    "demo-qwen3_5-vl": partial(_qwen, geometry.DEMO),
    "small-qwen3_5-text": partial(_qwen_text, geometry.SMALL),
    "small-qwen3_5-vl": partial(_qwen, geometry.SMALL),
    "small-qwen3_5-moe": partial(_qwen_moe_text, geometry.SMALL_MOE),
    "small-qwen3_5-moe-vl": partial(_qwen_moe, geometry.SMALL_MOE),
    "tiny-qwen3_5-vl": partial(_qwen, geometry.TINY),
    "tiny-qwen3_next": partial(_next, geometry.TINY),
    "tiny-minicpmv4_6": partial(_minicpm, geometry.TINY_VISION),
    "small-llama": partial(_headed, "Llama", _SMALL),
    "small-phi3": partial(_headless, "Phi3", _SMALL),
    "small-deepseek_v3": partial(_deepseek, _SMALL, (32, 64), 32, **_PUBLISHED),
}


def base_model(name: str, root: Path, *, spread_mlp: bool = False) -> Path:
    """The folder of a base model; made the first time. ``<name>+mtp`` has a layer of multi-token prediction, too."""
    folder = root / name
    if not (folder / "config.json").exists():
        plain = name.removesuffix("+mtp")
        random.seed(SEED)
        torch.manual_seed(SEED)
        model = MODELS[plain]().bfloat16().eval()
        # As published configs do; without it llm-compressor does not keep the original config but writes its own.
        model.config.get_text_config().dtype = torch.bfloat16
        spread_ranges(model)
        if spread_mlp:
            spread_mlp_ranges(model)
        model.generation_config = GenerationConfig(do_sample=False, eos_token_id=BYTES, pad_token_id=BYTES)
        model.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        if plain != name:
            _add_mtp(folder)
    return folder


def _add_mtp(folder: Path) -> None:
    """The tensors of Qwen3.5's MTP layer, which transformers neither makes nor keeps: copies of the last layer's."""
    path, hidden = folder / "model.safetensors", geometry.DENSE.hidden
    tensors = load_file(path)
    config = json.loads((folder / "config.json").read_text())
    last = (config.get("text_config") or config)["num_hidden_layers"] - 1
    mark = f"layers.{last}."
    copies = {f"mtp.layers.0.{name.split(mark)[1]}": t.clone() for name, t in tensors.items() if mark in name}
    norm = next(t for name, t in tensors.items() if name.endswith("norm.weight") and t.shape == (hidden,))
    for each in ("norm", "pre_fc_norm_hidden", "pre_fc_norm_embedding"):
        copies[f"mtp.{each}.weight"] = norm.clone()
    copies["mtp.fc.weight"] = torch.randn(hidden, 2 * hidden, dtype=torch.bfloat16) * 0.05
    save_file({**tensors, **copies}, path, metadata={"format": "pt"})


def load(folder: Path) -> PreTrainedModel:
    """The base model, in the class that its config names."""
    kind: type[PreTrainedModel] = getattr(
        transformers, transformers.AutoConfig.from_pretrained(folder).architectures[0]
    )
    model: PreTrainedModel = kind.from_pretrained(folder, dtype=torch.bfloat16)
    model.eval()
    return model
