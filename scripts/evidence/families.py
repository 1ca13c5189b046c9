"""Writes small quantized checkpoints of the families of the atlas, with a scale of its own for each part.

    scripts/evidence.sh families FOLDER [NAME ...] [--form FORM ...]

Names, shapes and config are those of transformers' own class for a family, at tiny sizes; the numbers are drawn here.
A family that cannot be made small is listed with the reason. `try_families` lets engines load what comes out.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
FP8, BLOCK = torch.float8_e4m3fn, 128
_LARGEST = 40_000_000  # weights

#: What the sizes of a config become: parts of fused layers end on whole blocks of 128 rows.
SIZES: Mapping[str, int] = {
    **{"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 512, "head_dim": 64},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "sliding_window": 128},
    **dict.fromkeys(("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts", "moe_top_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "expert_intermediate_size", "intermediate_size_expert"), 128),
    **dict.fromkeys(("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"), 128),
    **dict.fromkeys(("shared_intermediate_size", "expert_ffn_hidden_size", "intermediate_size_mlp"), 256),
    **{"n_shared_experts": 1, "num_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    **{"q_lora_rank": 128, "kv_lora_rank": 128, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64},
    **{"qk_head_dim": 128, "index_n_heads": 2, "index_head_dim": 128, "index_topk": 64, "num_nextn_predict_layers": 0},
    **{"ffn_hidden_size": 256, "num_attention_groups": 2, "swa_num_key_value_heads": 2, "swa_num_attention_heads": 4},
    **{"global_head_dim": 64, "num_global_key_value_heads": 2, "vocab_size_per_layer_input": 512, "swa_head_dim": 64},
    **{"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "swa_v_head_dim": 64, "depth": 1, "num_heads": 2},
    **{"out_hidden_size": 256, "num_position_embeddings": 16, "mamba_num_heads": 16, "mamba_head_dim": 16},
    **{"ssm_state_size": 32, "mamba_n_heads": 4, "mamba_d_head": 64, "mamba_d_ssm": 256, "n_groups": 1},
    **{"projector_hidden_size": 256, "share_expert_dim": 128, "index_n_heads": 2, "num_index_heads": 2},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 64, "linear_value_head_dim": 64},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "image_token_id": 5, "image_token_index": 5},
}
_YARN: Mapping[str, Any] = {
    **{"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0},
    **{"mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 128},
}
#: Keys of a config that its class does not set by itself, and engines ask for.
MORE: Mapping[str, Mapping[str, Any]] = {
    **{
        key: {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1, "rope_parameters": _YARN}
        for key in ("deepseek_v3", "deepseek_v32")
    },
    "glm_moe_dsa": {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1},
    "minimax_m2": {"scoring_func": "sigmoid", "num_mtp_modules": 0, "rotary_dim": 64, "use_routing_bias": True},
    "mimo_v2_flash": {
        **{"hybrid_layer_pattern": [1, 0], "moe_layer_freq": [0, 1], "attention_value_scale": 0.707},
        **{"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True, "layernorm_epsilon": 1e-5},
        **{
            "add_swa_attention_sink_bias": True,
            "add_full_attention_sink_bias": False,
            "swa_rope_theta": 10000,
            "sliding_window_size": 128,
        },
        **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 64, "swa_v_head_dim": 64},
    },
    "qwen3_vl_moe": {"norm_topk_prob": True},
    "afmoe": {"score_func": "sigmoid"},
    "deepseek_v2": {"topk_method": "group_limited_greedy", "scoring_func": "softmax"},
    "nemotron_h": {"n_groups": 8},  # SGLang 0.5.23 reads it under another name, and takes 8
    "gemma4": {"enable_moe_block": True, "attention_k_eq_v": True},
}
#: Whose quantized releases have stacked experts.
STACKED = ("gpt_oss",)
#: Modules that producers leave plain, by their last names, and towers.
_PLAIN = re.compile(
    r"(?:gate|router|proj_router|shared_expert_gate|weights_proj|conv1d|in_proj_[ab]|in_proj_ba|x_proj|dt_proj|g_proj"
    r"|embed\w*|wte|wpe|lm_head|per_layer\w*|\w*norm\w*|classifier|output_router|wo_a)"
)
_TABLE = re.compile(r"(?:^|\.)(?:lm_head|embed_tokens\w*|\w*embeddings?|wte|wpe)$")
_TOWER = re.compile(r"(?:^|\.)(?:\w*(?:vision|visual|audio|projector|image|aligner|embedder)\w*|mtp)\.")


# --- names and shapes -----------------------------------------------------------------------------------------------


def _cut(value: Any, key: str, layers: int) -> Any:
    """A default of a config at our sizes. Lists with an entry for each layer keep one of each kind."""
    if isinstance(value, dict):
        count = value.get("num_hidden_layers", layers)
        return {name: _cut(each, name, count) for name, each in value.items()}
    if key in SIZES and isinstance(value, int | None) and not isinstance(value, bool):
        return SIZES[key]
    if isinstance(value, list) and layers and len(value) in (layers, layers + 1):
        kinds = list(dict.fromkeys(map(str, value)))
        found = (next(each for each in value if str(each) == kind) for kind in kinds[:2])
        return sorted(found, key=lambda each: (each == "full_attention", str(each))) * (3 - len(kinds[:2]))
    return value


def _config(model_type: str, *, tower: bool) -> Any:
    """The config of a family at our sizes."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    stated = kind().to_dict()
    drop = ("architectures", "transformers_version", "dtype", "model_type", "tie_word_embeddings")
    values = {key: value for key, value in _cut(stated, "", 0).items() if key not in drop}
    for key in ("rope_scaling", "per_layer_config"):  # of layers that are not there
        values.pop(key, None)
        if isinstance(values.get("text_config"), dict):
            values["text_config"].pop(key, None)
    if not tower:
        values = {key: value for key, value in values.items() if not key.endswith(("vision_config", "audio_config"))}
    elif stated.get("vision_config", {}) is None:
        values["vision_config"] = _cut(kind.sub_configs["vision_config"]().to_dict(), "", 0)
    if model_type == "gemma3":
        values["vision_config"]["vision_use_head"] = False
    values.setdefault("head_dim", SIZES["head_dim"])
    values.get("text_config", values).update(MORE.get(model_type, {}))
    return kind(**{**values, "tie_word_embeddings": model_type == "gemma3"})  # as it is published


def _unrolled(shapes: Mapping[str, tuple[torch.Size, torch.dtype]]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Stacked experts one by one, as producers of quantized checkpoints store them."""
    found: dict[str, tuple[torch.Size, torch.dtype]] = {}
    for name, (shape, dtype) in shapes.items():
        stem, _, last = name.rpartition(".")
        if stem.endswith(".experts") and last in ("gate_up_proj", "down_proj"):
            width = min(shapes[f"{stem}.down_proj"][0][1:])
            hidden = max(shapes[f"{stem}.down_proj"][0][1:])
            parts = (
                {"down_proj": (hidden, width)}
                if last == "down_proj"
                else dict.fromkeys(("gate_proj", "up_proj"), (width, hidden))
            )
            found |= {
                f"{stem}.{number}.{part}.weight": (torch.Size(size), dtype)
                for number in range(shape[0])
                for part, size in parts.items()
            }
        else:
            found[name] = shape, dtype
    return found


def _as_published(model_type: str, config: dict[str, Any]) -> dict[str, Any]:
    """Keys of a config that the class of transformers writes in another way than releases have them."""
    if model_type == "nemotron_h":
        kinds = {"linear_attention": "mamba", "full_attention": "attention"}
        lists = ("layers_block_type", "mtp_layers_block_type")
        return {key: [kinds.get(k, k) for k in each] if key in lists else each for key, each in config.items()}
    if model_type == "mimo_v2_flash":
        rope = config["rope_parameters"]["full_attention"]
        return {key: each for key, each in (config | rope).items() if key not in ("rope_parameters", "rope_type")}
    return config


#: Prefixes of names in releases, where transformers 5 saves other ones.
_RENAMED: Mapping[str, tuple[str, str]] = {"gemma3": ("vision_tower.", "vision_tower.vision_model.")}
#: Families whose language model is another family's under a prefix. Their towers are left out.
WRAPPED: Mapping[str, tuple[str, str, str]] = {
    "kimi_k25": ("KimiK25ForConditionalGeneration", "deepseek_v3", "language_model."),
}


@cache
def made(model_type: str) -> tuple[dict[str, Any], dict[str, tuple[torch.Size, torch.dtype]]]:
    """config.json of a family, and the names of its tensors as it is published, with shapes and dtypes."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    if model_type in WRAPPED:
        architecture, inner, prefix = WRAPPED[model_type]
        text, shapes = made(inner)
        vision: dict[str, Any] = {
            f"vt_{key}": SIZES[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads")
        }
        vision |= {
            "vt_num_hidden_layers": 1,
            "text_hidden_size": 256,
            "mm_hidden_size": 256,
            "merge_kernel_size": [2, 2],
        }
        value: dict[str, Any] = {"architectures": [architecture], "model_type": model_type}
        value |= {"text_config": text, "vision_config": vision}
        return value, {f"{prefix}{name}": each for name, each in shapes.items()}
    texts, towers = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    named = towers[model_type] if model_type in towers else texts[model_type]
    tower = named.endswith("ForConditionalGeneration")
    config = _config(model_type, tower=tower)
    with torch.device("meta"):
        size = sum(each.numel() for each in getattr(transformers, named)(config).parameters())
    if size > _LARGEST:
        raise ValueError(f"{size} weights at these sizes")
    torch.manual_seed(0)
    model = getattr(transformers, named)(config).bfloat16()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        stored = load_file(Path(folder) / "model.safetensors")
        value = _as_published(model_type, json.loads((Path(folder) / "config.json").read_text()))
    old, new = _RENAMED.get(model_type, ("", ""))
    shapes = {
        new + name.removeprefix(old) if name.startswith(old) else name: (tensor.shape, tensor.dtype)
        for name, tensor in stored.items()
    }
    return value, shapes if model_type in STACKED else _unrolled(shapes)


# --- quantization ---------------------------------------------------------------------------------------------------


def _linear(name: str, shape: Sequence[int]) -> bool:
    """Whether producers quantize it."""
    module, _, last = name.rpartition(".")
    is_matrix = last == "weight" and len(shape) == 2 and not any(size % 16 for size in shape)
    in_layer = re.search(r"\.\d+\.", f".{name}") is not None
    return is_matrix and in_layer and not _PLAIN.fullmatch(module.rpartition(".")[2]) and not _TOWER.search(name)


def _drawn(name: str, shape: torch.Size) -> torch.Tensor:
    """Weights whose range differs from module to module."""
    seed = zlib.crc32(name.encode())
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02 * (1 + seed % 7 / 3)


def _fp8(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (weight / scale).clamp(-448, 448).to(FP8)


def _input(weight: torch.Tensor, scale: float) -> torch.Tensor:
    """A scale of activations that differs from module to module: of gate and up, too."""
    return scale * (1 + weight.abs().amax())


def _tensor(weight: torch.Tensor) -> Tensors:
    scale = weight.abs().amax() / 448
    return {"weight": _fp8(weight, scale), "weight_scale": scale, "input_scale": _input(weight, 0.02)}


def _tensor_ct(weight: torch.Tensor) -> Tensors:
    scale = (weight.abs().amax() / 448).bfloat16()
    return {
        "weight": _fp8(weight, scale.float()),
        "weight_scale": scale.reshape(1),
        "input_scale": torch.tensor([0.02]).bfloat16(),
    }


def _channel(weight: torch.Tensor) -> Tensors:
    scale = (weight.abs().amax(1, keepdim=True) / 448).bfloat16()
    return {"weight": _fp8(weight, scale.float()), "weight_scale": scale}


def _block(weight: torch.Tensor) -> Tensors:
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % BLOCK, 0, -rows % BLOCK))
    grid = padded.reshape(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK).abs().amax((1, 3)) / 448
    each = grid.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    return {"weight": _fp8(weight, each), "weight_scale_inv": grid}


_GRID = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def _codes(groups: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The nearest E2M1 numbers, a byte each."""
    codes = (groups.abs() / scale[..., None])[..., None].sub(_GRID).abs().argmin(-1)
    return torch.where(groups < 0, codes + 8, codes).to(torch.uint8)


def _fp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, block scales, and the global scale to multiply with."""
    factor = weight.abs().amax() / (6 * 448)
    blocks = weight.reshape(len(weight), -1, 16)
    scale = (blocks.abs().amax(2) / 6 / factor).clamp(max=448).to(FP8)
    codes = _codes(blocks, (scale.float() * factor).clamp(min=1e-12)).reshape(weight.shape)
    return codes[:, ::2] | (codes[:, 1::2] << 4), scale, factor


def _nvfp4(weight: torch.Tensor) -> Tensors:
    codes, scale, factor = _fp4(weight)
    return {"weight": codes, "weight_scale": scale, "weight_scale_2": factor, "input_scale": _input(weight, 0.002)}


def _nvfp4_weights(weight: torch.Tensor) -> Tensors:
    return {name: each for name, each in _nvfp4(weight).items() if name != "input_scale"}


def _nvfp4_ct(weight: torch.Tensor) -> Tensors:
    codes, scale, factor = _fp4(weight)
    return {
        "weight_packed": codes,
        "weight_scale": scale,
        "weight_global_scale": 1 / factor.reshape(1),
        "input_global_scale": torch.tensor([500.0]),
    }


def _exponents(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Groups of 32, and the exponents of their scales: the largest is at most 4 of them, and all that E2M1 has is 6."""
    groups = weight.reshape(len(weight), -1, 32)
    return groups, groups.abs().amax(2).log2().floor() - 2


def _mxfp4_ct(weight: torch.Tensor) -> Tensors:
    groups, exponents = _exponents(weight)
    codes = _codes(groups, torch.exp2(exponents)).reshape(weight.shape)
    return {"weight_packed": codes[:, ::2] | (codes[:, 1::2] << 4), "weight_scale": (exponents + 127).to(torch.uint8)}


def _mxfp8(weight: torch.Tensor) -> Tensors:
    groups, exponents = _exponents(weight)
    scale = torch.exp2(exponents - 5)
    values = _fp8(groups, scale[..., None]).reshape(weight.shape)
    return {"weight": values, "weight_scale": (exponents + 122).to(torch.uint8)}


def _int4_ct(weight: torch.Tensor) -> Tensors:
    groups = weight.reshape(len(weight), -1, 32)
    scale = (groups.abs().amax(2) / 7).bfloat16()
    codes = ((groups / scale.float()[..., None]).round().clamp(-8, 7) + 8).reshape(len(weight), -1, 8).int()
    packed = (codes << torch.arange(0, 32, 4, dtype=torch.int32)).sum(2, dtype=torch.int32)
    return {"weight_packed": packed, "weight_scale": scale, "weight_shape": torch.tensor(weight.shape)}


def _args(**given: Any) -> dict[str, Any]:
    return {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False, **given}


def _compressed(form: str, weights: dict[str, Any], inputs: dict[str, Any] | None, ignore: list[str]) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "format": form}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ignore,
    }


_FOUR = _args(num_bits=4, strategy="tensor_group", group_size=16)
Stores = Mapping[str, tuple[str, Callable[[torch.Tensor], Tensors]]]  # by a pattern of modules: algorithm, function
Quantized = Mapping[str, str]  # the algorithm of each module


def _all(store: Callable[[torch.Tensor], Tensors]) -> Stores:
    return {"": ("", store)}


def _native(ignored: list[str], **more: Any) -> dict[str, Any]:
    return {"quant_method": "fp8", "modules_to_not_convert": ignored, **more}


def _modelopt(algorithm: str, ignored: list[str], **more: Any) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ignored, **more}


def _mixed(ignored: list[str], quantized: Quantized) -> dict[str, Any]:
    layers = {
        name: {"quant_algo": algorithm, **({"group_size": 16} if "NVFP4" in algorithm else {})}
        for name, algorithm in quantized.items()
    }
    return _modelopt("MIXED_PRECISION", ignored, quantized_layers=layers)


#: How matrices are stored, and the config of it all, given what is left plain and what is not.
FORMS: Mapping[str, tuple[Stores, Callable[[list[str], Quantized], dict[str, Any]]]] = {
    "modelopt-fp8": (_all(_tensor), lambda ignored, _: _modelopt("FP8", ignored)),
    "ct-tensor": (_all(_tensor_ct), lambda ignored, _: _compressed("float-quantized", _args(), _args(), ignored)),
    "ct-channel": (
        _all(_channel),
        lambda ignored, _: _compressed(
            "float-quantized", _args(strategy="channel"), _args(strategy="token", dynamic=True), ignored
        ),
    ),
    "fp8-block": (
        _all(_block),
        lambda ignored, _: _native(ignored, activation_scheme="dynamic", fmt="e4m3", weight_block_size=[BLOCK, BLOCK]),
    ),
    "fp8-tensor": (_all(_tensor), lambda ignored, _: _native(ignored, activation_scheme="static")),
    "modelopt-nvfp4": (_all(_nvfp4), lambda ignored, _: _modelopt("NVFP4", ignored, group_size=16)),
    "ct-nvfp4": (
        _all(_nvfp4_ct),
        lambda ignored, _: _compressed("nvfp4-pack-quantized", _FOUR, {**_FOUR, "dynamic": "local"}, ignored),
    ),
    "ct-int4": (
        _all(_int4_ct),
        lambda ignored, _: _compressed(
            "pack-quantized", _args(num_bits=4, type="int", strategy="group", group_size=32), None, ignored
        ),
    ),
    "ct-mxfp4": (
        _all(_mxfp4_ct),
        lambda ignored, _: _compressed(
            "mxfp4-pack-quantized",
            _args(num_bits=4, strategy="group", group_size=32, scale_dtype="torch.uint8"),
            None,
            ignored,
        ),
    ),
    "mxfp4": ({}, lambda ignored, _: {"quant_method": "mxfp4", "modules_to_not_convert": ignored}),
    "modelopt-mxfp8": ({r"\.experts\.": ("NVFP4", _nvfp4), "": ("MXFP8", _mxfp8)}, _mixed),
    "modelopt-mixed": (
        {r"attn\.|mixer\.\w+$": ("FP8", _tensor), "": ("W4A16_NVFP4", _nvfp4_weights)},
        _mixed,
    ),
}
#: The same with more left plain, as NVFP4 releases have it: what else is quantized, if anything of its kind is there.
VARIANTS: Mapping[str, re.Pattern[str]] = {
    "plain-attention": re.compile(r"(?!.*(?:attn|attention)\.|.*mixer\.[qkvo]_proj).*"),
    "plain-experts": re.compile(r"(?!.*(?:attn|attention)\.|.*mixer\.[qkvo]_proj|.*\.experts\.).*"),
    "plain-shared-experts": re.compile(r"(?!.*shared_expert).*"),
    "experts-only": re.compile(r".*\.experts\..*"),
    "output-projection": re.compile(r"(?!.*attn\.|.*mixer\.[qkv]_proj).*|.*attn\.o_proj"),
    "head": re.compile(r".*"),
    "kv-scales": re.compile(r".*"),
    "newer-names": re.compile(r".*"),
    "moe-names": re.compile(r"(?!.*(?:attn|attention)\.|.*\.mlp\.).*"),
    "towers": re.compile(r".*"),
    "listed-head": re.compile(r".*"),
    "narrow-experts": re.compile(r".*"),
    "experts-by-pattern": re.compile(r".*\.experts\..*"),
}
#: ``ignore`` of Kimi-K2.5 in INT4.
_PATTERNS = [
    *("lm_head", "re:.*self_attn.*", "re:.*shared_experts.*"),
    r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
]


def _moe(name: str) -> str:
    """As Gemma 4 is stored by some."""
    return name.replace(".experts.", ".moe.experts.")


def _newer(name: str) -> str:
    """As transformers 5 saves what it calls ``language_model.model`` in older checkpoints."""
    if name.startswith("language_model.model."):
        return name.replace("language_model.model.", "model.language_model.", 1)
    return name.removeprefix("language_model.")


def _globs(ignored: list[str], quantized: Collection[str]) -> list[str]:
    """As ModelOpt lists modules of which none is quantized: ``model.vision_tower*``."""
    within = {parent for name in quantized for parent in _parents(name)}
    highest = ((module, [each for each in _parents(module) if each not in within]) for module in ignored)
    return list(dict.fromkeys(f"{parents[-1]}*" if parents else module for module, parents in highest))


def _by_tower(ignored: list[str], form: str) -> list[str]:
    """Towers as a whole, not module by module."""
    towers = {module: re.match(r"(?:model\.)?[^.]+", module) for module in ignored if _TOWER.search(f"{module}.")}
    prefix, suffix = ("re:", ".*") if form.startswith("ct-") else ("", "")
    return list(dict.fromkeys(f"{prefix}{at[0]}{suffix}" if (at := towers.get(m)) else m for m in ignored))


def _parents(module: str) -> Iterator[str]:
    while module := module.rpartition(".")[0]:
        yield module


def _stack(tensors: Tensors) -> Quantized:
    """The experts of gpt-oss as OpenAI stores them."""
    found = {}
    for name in [name for name, each in tensors.items() if name.endswith("_proj") and each.ndim == 3]:
        stack = tensors.pop(name).float().transpose(1, 2)
        own = _mxfp4_ct(stack.flatten(0, 1))
        groups = (*stack.shape[:2], stack.shape[2] // 32)
        tensors[f"{name}_blocks"] = own["weight_packed"].reshape(*groups, 16).contiguous()
        tensors[f"{name}_scales"] = own["weight_scale"].reshape(groups).contiguous()
        found[name] = "MXFP4"
    return found


def _ignore(ignored: list[str], quantized: Collection[str], base: str, variant: str) -> list[str]:
    """The entries by which a config leaves these modules plain."""
    if variant == "experts-by-pattern":
        return _PATTERNS
    if base.startswith("modelopt"):
        ignored = _globs(ignored, quantized)
    if variant == "listed-head":
        ignored = [name for name in ignored if name != "lm_head"]
    return _by_tower(ignored, base) if variant == "towers" else ignored


def write(model_type: str, form: str, folder: Path) -> None:
    """The checkpoint of a family in a form."""
    config, shapes = made(model_type)
    if form.endswith("+narrow-experts"):
        config = config | {"intermediate_size": 2 * config["intermediate_size"]}
    base, _, variant = form.partition("+")
    renamed = {"newer-names": _newer, "moe-names": _moe}.get(variant, str)
    shapes = {renamed(name): each for name, each in shapes.items()}
    (stores, stated), wanted = FORMS[base], VARIANTS.get(variant, re.compile(".*"))
    tensors: Tensors = {}
    ignored = [] if variant == "head" else ["lm_head"]
    quantized: dict[str, str] = {}
    for name, (shape, dtype) in sorted(shapes.items()):
        module = name.removesuffix(".weight")
        is_head = variant == "head" and name.endswith("lm_head.weight")
        if stores and (is_head or (_linear(name, shape) and wanted.fullmatch(module))):
            quantized[module], store = next(held for pattern, held in stores.items() if re.search(pattern, module))
            tensors |= {f"{module}.{last}": each.contiguous() for last, each in store(_drawn(name, shape)).items()}
            continue
        tensors[name] = torch.ones(shape, dtype=dtype) if "norm" in name else _drawn(name, shape).to(dtype)
        if name.endswith(".weight") and len(shape) == 2 and not _TABLE.search(module):
            ignored.append(module)
    if base == "mxfp4":
        quantized |= _stack(tensors)
    if not quantized:
        return  # nothing of the kind is there
    ignored = _ignore(ignored, quantized, base, variant)
    # The head is listed, and plain all the same.
    value = stated(ignored, quantized | ({"lm_head": "W4A16_NVFP4"} if variant == "listed-head" else {}))
    if variant == "kv-scales":
        value |= {"kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}}
        for module in (name for name in quantized if re.search(r"\.[kv]_proj$", name)):
            tensors[f"{module}.{module[-6]}_scale"] = torch.tensor(0.02)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": value}, indent=2))
    if base.startswith("modelopt"):
        said: dict[str, Any] = {key: value[key] for key in ("quant_algo", "quantized_layers") if key in value}
        if variant == "kv-scales":
            said["kv_cache_quant_algo"] = "FP8"
        quantization = {**said, "exclude_modules": ignored, "group_size": 16}
        side = {"producer": {"name": "modelopt", "version": "0.47.0"}, "quantization": quantization}
        (folder / "hf_quant_config.json").write_text(json.dumps(side, indent=2))


def known() -> Iterator[str]:
    """The families that transformers and an engine of the atlas have classes for."""
    from transformers.models.auto import modeling_auto as auto

    from rewrite.quantization.atlas import architectures

    yield from WRAPPED
    served = architectures()
    for table in (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES):
        yield from (model_type for model_type, name in table.items() if str(name) in served)


def main() -> int:
    """Write those that are named, or all."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--form", action="append")
    given = parser.parse_args()
    for name in given.names or dict.fromkeys(known()):
        for form in given.form or (*FORMS, *(f"modelopt-nvfp4+{variant}" for variant in VARIANTS)):
            folder = given.folder / f"{name}@{form}"
            try:
                if not folder.exists():
                    write(name, form, folder)
            except Exception as error:  # whatever transformers' class ends with: it is listed
                print(f"{name}: not built: {type(error).__name__}: {str(error)[:150]!r}", flush=True)
                break
    return 0


if __name__ == "__main__":
    sys.exit(main())
