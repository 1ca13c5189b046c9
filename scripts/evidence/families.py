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
from collections.abc import Iterator, Mapping, Sequence
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
    **{"out_hidden_size": 256, "num_position_embeddings": 16, "mamba_num_heads": 4, "mamba_head_dim": 64},
    **{"ssm_state_size": 32, "mamba_n_heads": 4, "mamba_d_head": 64, "mamba_d_ssm": 256, "n_groups": 1},
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
    "minimax_m2": {"scoring_func": "sigmoid", "num_mtp_modules": 0},
    "afmoe": {"score_func": "sigmoid"},
    "deepseek_v2": {"topk_method": "group_limited_greedy", "scoring_func": "softmax"},
}
#: Modules that producers leave plain, by their last names, and towers.
_PLAIN = re.compile(
    r"(?:gate|router|proj_router|shared_expert_gate|weights_proj|conv1d|in_proj_[ab]|in_proj_ba|x_proj|dt_proj|g_proj"
    r"|embed\w*|wte|wpe|lm_head|per_layer\w*|\w*norm\w*|classifier|output_router|wo_a)"
)
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
        return sorted((next(v for v in value if str(v) == kind) for kind in kinds[:2]), key=str) * (3 - len(kinds[:2]))
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
    values.setdefault("head_dim", SIZES["head_dim"])
    return kind(**{**values, **MORE.get(model_type, {}), "tie_word_embeddings": False})


@cache
def made(model_type: str) -> tuple[dict[str, Any], dict[str, tuple[torch.Size, torch.dtype]]]:
    """config.json of a family, and the names of its tensors as it is published, with shapes and dtypes."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    texts, towers = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    tower = model_type in towers
    named = towers[model_type] if tower else texts[model_type]
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
        value = json.loads((Path(folder) / "config.json").read_text())
    return value, {name: (tensor.shape, tensor.dtype) for name, tensor in stored.items()}


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


def _tensor(weight: torch.Tensor) -> Tensors:
    scale = weight.abs().amax() / 448
    return {"weight": _fp8(weight, scale), "weight_scale": scale, "input_scale": torch.tensor(0.02)}


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


def _fp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, block scales, and the global scale to multiply with."""
    factor = weight.abs().amax() / (6 * 448)
    blocks = weight.reshape(len(weight), -1, 16)
    scale = (blocks.abs().amax(2) / 6 / factor).clamp(max=448).to(FP8)
    unit = (scale.float() * factor).clamp(min=1e-12)[..., None]
    codes = (blocks.abs() / unit)[..., None].sub(_GRID).abs().argmin(-1)
    codes = torch.where(blocks < 0, codes + 8, codes).reshape(weight.shape).to(torch.uint8)
    return codes[:, ::2] | (codes[:, 1::2] << 4), scale, factor


def _nvfp4(weight: torch.Tensor) -> Tensors:
    codes, scale, factor = _fp4(weight)
    return {"weight": codes, "weight_scale": scale, "weight_scale_2": factor, "input_scale": torch.tensor(0.002)}


def _nvfp4_ct(weight: torch.Tensor) -> Tensors:
    codes, scale, factor = _fp4(weight)
    return {
        "weight_packed": codes,
        "weight_scale": scale,
        "weight_global_scale": 1 / factor.reshape(1),
        "input_global_scale": torch.tensor([500.0]),
    }


def _args(**given: Any) -> dict[str, Any]:
    return {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False, **given}


def _compressed(form: str, weights: dict[str, Any], inputs: dict[str, Any], ignore: list[str]) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "format": form}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ignore,
    }


_FOUR = _args(num_bits=4, strategy="tensor_group", group_size=16)
#: How a matrix is stored, and the config of it all, given what is left plain.
FORMS: Mapping[str, tuple[Any, Any]] = {
    "modelopt-fp8": (
        _tensor,
        lambda ignore: {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ignore},
    ),
    "ct-tensor": (_tensor_ct, lambda ignore: _compressed("float-quantized", _args(), _args(), ignore)),
    "ct-channel": (
        _channel,
        lambda ignore: _compressed(
            "float-quantized", _args(strategy="channel"), _args(strategy="token", dynamic=True), ignore
        ),
    ),
    "fp8-block": (
        _block,
        lambda ignore: {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": ignore,
        },
    ),
    "fp8-tensor": (
        _tensor,
        lambda ignore: {"quant_method": "fp8", "activation_scheme": "static", "modules_to_not_convert": ignore},
    ),
    "modelopt-nvfp4": (
        _nvfp4,
        lambda ignore: {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": ignore},
    ),
    "ct-nvfp4": (
        _nvfp4_ct,
        lambda ignore: _compressed("nvfp4-pack-quantized", _FOUR, {**_FOUR, "dynamic": "local"}, ignore),
    ),
}
#: The same with more left plain, as NVFP4 releases have it: what else is quantized, if anything of its kind is there.
VARIANTS: Mapping[str, re.Pattern[str]] = {
    "plain-attention": re.compile(r"(?!.*(?:attn|attention)\.).*"),
    "experts-only": re.compile(r".*\.experts\..*"),
    "output-projection": re.compile(r"(?!.*attn\.).*|.*attn\.o_proj"),
}


def write(model_type: str, form: str, folder: Path) -> None:
    """The checkpoint of a family in a form."""
    config, shapes = made(model_type)
    base, _, variant = form.partition("+")
    (store, stated), wanted = FORMS[base], VARIANTS.get(variant, re.compile(".*"))
    tensors: Tensors = {}
    ignored = ["lm_head"]
    for name, (shape, dtype) in sorted(shapes.items()):
        module = name.removesuffix(".weight")
        if _linear(name, shape) and wanted.fullmatch(module):
            tensors |= {f"{module}.{last}": each.contiguous() for last, each in store(_drawn(name, shape)).items()}
            continue
        tensors[name] = torch.ones(shape, dtype=dtype) if "norm" in name else _drawn(name, shape).to(dtype)
        if name.endswith(".weight") and len(shape) == 2 and module != "lm_head" and "embed" not in module:
            ignored.append(module)
    if not any(each.dtype in (FP8, torch.uint8) for each in tensors.values()):
        return  # nothing of the kind is there
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    value = {**config, "quantization_config": stated(ignored)}
    (folder / "config.json").write_text(json.dumps(value, indent=2))
    if base.startswith("modelopt"):
        quantization = {"quant_algo": "FP8" if base == "modelopt-fp8" else "NVFP4", "exclude_modules": ignored}
        side = {
            "producer": {"name": "modelopt", "version": "0.47.0"},
            "quantization": {**quantization, "group_size": 16},
        }
        (folder / "hf_quant_config.json").write_text(json.dumps(side, indent=2))


def known() -> Iterator[str]:
    """The families that transformers and an engine of the atlas have classes for."""
    from transformers.models.auto import modeling_auto as auto

    from rewrite.quantization.atlas import architectures

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
