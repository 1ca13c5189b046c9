"""Write the small FP8 checkpoints under tests/fixtures with the real producers: llm-compressor and ModelOpt.

The weights are random and seeded; everything else (tensor names, dtypes, scale shapes, sharding, config dialects) is
what the two libraries write, because that is what the tests need to be true (one config apart: see assemble_fp8).
Run it through make_fixtures.sh, which pins the versions. A fixture is built and checked beside its final place and
swapped in last, so a failed run leaves the old one alone.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.quantization.utils import update_quant_cfg_with_kv_cache_quant
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MiniCPMV4_6Config,
    MiniCPMV4_6ForConditionalGeneration,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3_5Config,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

FIXTURES = Path(__file__).resolve().parent.parent / "tests" / "fixtures"
SEED = 20260217
# Tests read whole fixtures again and again and git keeps every version of them: stay small.
BUDGET_BYTES = 4_600_000

END_OF_TEXT = "<|endoftext|>"
IMAGE_TOKENS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
BYTES = 256
VOCAB_SIZE = 272  # 256 bytes, 5 special tokens, padded to a multiple of 16
CALIBRATION_SAMPLES = 8
SEQUENCE_LENGTH = 64

# Where one partition has a wider range than the next, a wrong or swapped scale changes the values by far more than
# rounding does, and a loader that requantizes to the group's largest scale visibly loses precision in z.
ROW_GAINS = {"q": 2.0, "k": 1.0, "v": 0.5, "z": 0.35}
# The families beside Qwen3.5: their attention (the same q, k, v) and their MLPs too.
MLP_GAINS = {"gate": 2.0, "up": 0.5}

# Recipes of published Qwen3.5 FP8 checkpoints leave these in BF16: fused with each other they are a few rows only,
# and routers and shared-expert gates steer the whole layer.
IGNORED = ("lm_head", "re:.*in_proj_a$", "re:.*in_proj_b$", "re:.*visual.*")
IGNORED_MINICPM = ("lm_head", "re:.*in_proj_a$", "re:.*in_proj_b$", "re:.*vision_tower.*", "re:.*merger.*")
IGNORED_NEXT = ("lm_head", "re:.*in_proj_ba$")
IGNORED_ROUTERS = ("re:.*mlp.gate$", "re:.*mlp.shared_expert_gate$")
MODELOPT_OFF = ("*lm_head*", "*in_proj_a*", "*in_proj_b*", "*conv1d*", "*visual*")
MODELOPT_ROUTERS_OFF = ("*mlp.gate.*", "*mlp.shared_expert_gate.*")
# The matrices that may be left in BF16 for it; every other one has to come out in FP8.
KEPT_IN_BF16 = re.compile(
    r"((visual|vision_tower|merger)\..*|lm_head|embed_tokens|in_proj_a|in_proj_b|in_proj_ba|mlp\.gate"
    r"|mlp\.shared_expert_gate)\.weight$"
)
# Half a step of E4M3 is 1/16 of a value at most, so about 2.6e-2 overall; scales stored as BF16 add little.
WEIGHT_TOLERANCE = 0.05
# E2M1 has one mantissa bit: half a step is 1/4 of a value at most, about 0.1 overall.
NVFP4_TOLERANCE = 0.15
LOGIT_TOLERANCE = 0.25


@dataclass(frozen=True)
class Geometry:
    """The sizes of one model; head counts stay even so that tensor parallelism of two can be tested."""

    hidden: int
    intermediate: int
    layer_types: tuple[str, ...]
    head_dim: int
    gdn_head_dim: int
    vision_hidden: int = 32
    heads: int = 4
    kv_heads: int = 2
    gdn_key_heads: int = 2
    gdn_value_heads: int = 4


GDN, ATTENTION = "linear_attention", "full_attention"
DEMO = Geometry(256, 128, (GDN, GDN, GDN, ATTENTION), head_dim=64, gdn_head_dim=64)
SMALL = Geometry(64, 64, (GDN, GDN, ATTENTION), head_dim=32, gdn_head_dim=32)
SMALL_MOE = Geometry(64, 32, (GDN, GDN, ATTENTION), head_dim=32, gdn_head_dim=32)
NEXT = Geometry(32, 32, (GDN, GDN, ATTENTION), head_dim=32, gdn_head_dim=32)
MIXED = Geometry(32, 32, (GDN, GDN, ATTENTION), head_dim=32, gdn_head_dim=32)
MINICPM = Geometry(32, 32, (GDN, GDN, ATTENTION), head_dim=32, gdn_head_dim=32, vision_hidden=8)
PLAIN = Geometry(64, 64, (ATTENTION, ATTENTION), head_dim=32, gdn_head_dim=0)


@dataclass(frozen=True)
class Fixture:
    """One checkpoint to write: which model, which producer, how it is cut into shards."""

    name: str
    model: Callable[[], PreTrainedModel]
    produce: Callable[[PreTrainedModel, Path, Fixture], None]
    ignore: tuple[str, ...]
    max_shard_size: str = "5GB"
    scale_in_other_shard: bool = False
    nvfp4: re.Pattern[str] | None = None  # the matrices that come out in NVFP4
    fused: tuple[str, ...] = ("in_proj_qkv", "in_proj_z")  # the stored modules that it is for, in two layers or more
    kv_cache: bool = False  # the KV cache is FP8 too


# --- models ---------------------------------------------------------------------------------------------------------


def text_settings(geometry: Geometry) -> dict[str, Any]:
    """Keyword arguments common to the dense and MoE text configs."""
    quarter = geometry.head_dim // 8  # rotary pairs: a quarter of the head, two values a pair
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": geometry.hidden,
        "num_hidden_layers": len(geometry.layer_types),
        "layer_types": list(geometry.layer_types),
        "num_attention_heads": geometry.heads,
        "num_key_value_heads": geometry.kv_heads,
        "head_dim": geometry.head_dim,
        "linear_num_key_heads": geometry.gdn_key_heads,
        "linear_num_value_heads": geometry.gdn_value_heads,
        "linear_key_head_dim": geometry.gdn_head_dim,
        "linear_value_head_dim": geometry.gdn_head_dim,
        "max_position_embeddings": 512,
        # The stock 0.02 suits wide models: at this width the layers would hardly move the residual stream, and k and v
        # wrong by a factor of eight would change the logits by 8 % only. So they change by 85 %, FP8 rounding by 12 %.
        "initializer_range": 0.5 * geometry.hidden**-0.5,
        "eos_token_id": BYTES,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
            "mrope_section": [quarter // 2, quarter // 4, quarter // 4],
            "mrope_interleaved": True,
        },
    }


def dense_settings(geometry: Geometry) -> dict[str, Any]:
    """Text settings with a dense MLP."""
    return text_settings(geometry) | {"intermediate_size": geometry.intermediate}


def moe_settings(geometry: Geometry) -> dict[str, Any]:
    """Text settings with four experts, two of them taken, and a shared one."""
    return text_settings(geometry) | {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": geometry.intermediate,
        "shared_expert_intermediate_size": geometry.intermediate,
    }


def vision_settings(geometry: Geometry) -> dict[str, Any]:
    """The smallest vision tower that still has every kind of layer; 8-pixel patches keep its input projection small."""
    return {
        "depth": 1,
        "hidden_size": geometry.vision_hidden,
        "intermediate_size": geometry.vision_hidden * 2,
        "num_heads": 2,
        "patch_size": 8,
        "out_hidden_size": geometry.hidden,
        "num_position_embeddings": 16,
    }


def multimodal_settings() -> dict[str, int]:
    """The ids of the four vision tokens, in the tokenizer's order."""
    keys = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return {key: BYTES + 1 + i for i, key in enumerate(keys)}


def dense_text() -> PreTrainedModel:
    """A text-only Qwen3.5."""
    return Qwen3_5ForCausalLM(Qwen3_5TextConfig(**dense_settings(SMALL)))


def dense_multimodal(geometry: Geometry) -> PreTrainedModel:
    """A Qwen3.5 with its vision tower."""
    config = Qwen3_5Config(
        text_config=dense_settings(geometry), vision_config=vision_settings(geometry), **multimodal_settings()
    )
    return Qwen3_5ForConditionalGeneration(config)


def moe_text() -> PreTrainedModel:
    """A text-only Qwen3.5 MoE."""
    return Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**moe_settings(SMALL_MOE)))


def moe_multimodal() -> PreTrainedModel:
    """A Qwen3.5 MoE with its vision tower."""
    config = Qwen3_5MoeConfig(
        text_config=moe_settings(SMALL_MOE), vision_config=vision_settings(SMALL_MOE), **multimodal_settings()
    )
    return Qwen3_5MoeForConditionalGeneration(config)


def next_text() -> PreTrainedModel:
    """A Qwen3-Next: in_proj_qkvz and in_proj_ba stored fused, experts in every layer, as in the published models."""
    settings = moe_settings(NEXT)
    settings["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    return Qwen3NextForCausalLM(Qwen3NextConfig(**settings))


def minicpm() -> PreTrainedModel:
    """A MiniCPM-V 4.6: Qwen3.5's text model under a vision tower of its own, the smallest that has every kind of layer.
    Its tower merges windows of four patches after one of its blocks, so the merger is four times as wide as a block."""
    vision = {
        "hidden_size": MINICPM.vision_hidden,
        "intermediate_size": MINICPM.vision_hidden,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    tokens = multimodal_settings()
    config = MiniCPMV4_6Config(
        text_config=Qwen3_5TextConfig(**dense_settings(MINICPM)),
        vision_config=vision,
        image_size=32,
        insert_layer_id=0,
        image_token_id=tokens["image_token_id"],
        video_token_id=tokens["video_token_id"],
    )
    return MiniCPMV4_6ForConditionalGeneration(config)


def plain_settings(geometry: Geometry) -> dict[str, Any]:
    """Keyword arguments common to Llama and Phi-3: every layer has full attention and a dense MLP."""
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": geometry.hidden,
        "intermediate_size": geometry.intermediate,
        "num_hidden_layers": len(geometry.layer_types),
        "num_attention_heads": geometry.heads,
        "num_key_value_heads": geometry.kv_heads,
        "max_position_embeddings": 512,
        "initializer_range": 0.5 * geometry.hidden**-0.5,
        "bos_token_id": BYTES,
        "eos_token_id": BYTES,
        "pad_token_id": BYTES,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }


def llama() -> PreTrainedModel:
    """A Llama with grouped-query attention; q, k, v and gate, up are stored one by one."""
    return LlamaForCausalLM(LlamaConfig(**plain_settings(PLAIN), head_dim=PLAIN.head_dim))


def phi3() -> PreTrainedModel:
    """A Phi-3: qkv_proj and gate_up_proj stored fused; its config has no head_dim."""
    return Phi3ForCausalLM(Phi3Config(**plain_settings(PLAIN)))


def spread_ranges(model: PreTrainedModel) -> None:
    """Give the rows of q, k, v and z clearly different ranges; beside Qwen3.5 those of gate and up as well."""
    config = model.config.get_text_config()
    if not config.model_type.startswith("qwen3_5"):
        spread_other_ranges(model)
        return
    key_dim = config.linear_num_key_heads * config.linear_key_head_dim
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("in_proj_qkv.weight"):
                parameter[:key_dim].mul_(ROW_GAINS["q"])
                parameter[key_dim : 2 * key_dim].mul_(ROW_GAINS["k"])
                parameter[2 * key_dim :].mul_(ROW_GAINS["v"])
            elif name.endswith("in_proj_z.weight"):
                parameter.mul_(ROW_GAINS["z"])


def spread_other_ranges(model: PreTrainedModel) -> None:
    """The same for Qwen3-Next, Llama and Phi-3: row ranges of the fused modules, whole matrices of the others."""
    config = model.config
    single = {f"{name}_proj": gain for name, gain in (ROW_GAINS | MLP_GAINS).items()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            module = name.removesuffix(".weight").rpartition(".")[2]
            if module == "qkv_proj":
                heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
                heads["v"] = heads["k"]
                head_dim = config.hidden_size // config.num_attention_heads
                scale_rows(parameter, [(ROW_GAINS[part], count * head_dim) for part, count in heads.items()])
            elif module == "gate_up_proj" and parameter.ndim == 2:  # experts are one 3-D tensor here, of any range
                scale_rows(parameter, [(gain, config.intermediate_size) for gain in MLP_GAINS.values()])
            elif module == "in_proj_qkvz":  # for every key head its q, k, and the v and z of its value heads
                value_heads = config.linear_num_value_heads // config.linear_num_key_heads
                key, value = config.linear_key_head_dim, config.linear_value_head_dim * value_heads
                sizes = {"q": key, "k": key, "v": value, "z": value}
                scale_rows(parameter, [(ROW_GAINS[p], n) for p, n in sizes.items()] * config.linear_num_key_heads)
            elif module in single:
                parameter.mul_(single[module])


def scale_rows(parameter: torch.Tensor, gains: list[tuple[float, int]]) -> None:
    """Multiply rows by gains: pairs of a gain and a number of rows, which must make up the whole matrix."""
    require(sum(count for _, count in gains) == parameter.shape[0], "the rows of a fused module do not add up")
    for part, (gain, _) in zip(parameter.split([count for _, count in gains]), gains, strict=True):
        part.mul_(gain)


def build_model(factory: Callable[[], PreTrainedModel], source: Path) -> PreTrainedModel:
    """A seeded BF16 model, the same in every run, loaded from a folder: llm-compressor reads its config there again."""
    random.seed(SEED)
    torch.manual_seed(SEED)
    model = factory().to(torch.bfloat16).eval()
    # As published configs do; without it llm-compressor does not keep the original config but writes its own.
    model.config.get_text_config().dtype = torch.bfloat16
    spread_ranges(model)
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=BYTES, pad_token_id=BYTES)
    model.save_pretrained(source)
    return type(model).from_pretrained(source, dtype=torch.bfloat16)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: the smallest tokenizer that takes any text, so that a test can generate without downloads."""
    vocab = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT, *IMAGE_TOKENS])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)


def calibration_ids() -> torch.Tensor:
    """Random byte tokens from their own generator, so that no other draw can shift them."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(0, BYTES, (CALIBRATION_SAMPLES, SEQUENCE_LENGTH), generator=generator)


# --- producers ------------------------------------------------------------------------------------------------------


def produce_llmcompressor(model: PreTrainedModel, out: Path, fixture: Fixture) -> None:
    """The documented one-shot recipe: scheme FP8, so per-tensor weights and static per-tensor activations."""
    tokenizer = byte_tokenizer()
    samples = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in calibration_ids().tolist()]
    oneshot(
        model=model,
        dataset=Dataset.from_list(samples),
        recipe=QuantizationModifier(targets="Linear", scheme="FP8", ignore=list(fixture.ignore)),
        max_seq_length=SEQUENCE_LENGTH,
        num_calibration_samples=CALIBRATION_SAMPLES,
        processor=tokenizer,
    )
    model.save_pretrained(out, save_compressed=True, max_shard_size=fixture.max_shard_size)
    tokenizer.save_pretrained(out)


def produce_modelopt(model: PreTrainedModel, out: Path, fixture: Fixture) -> None:
    """ModelOpt's default FP8 configuration with the usual layers switched off, and its Hugging Face export."""
    export_modelopt(model, out, copy.deepcopy(mtq.FP8_DEFAULT_CFG), fixture)


def produce_modelopt_mixed(model: PreTrainedModel, out: Path, fixture: Fixture) -> None:
    """ModelOpt's default NVFP4 configuration with the projections of both kinds of attention in FP8 instead."""
    config = copy.deepcopy(mtq.NVFP4_DEFAULT_CFG)
    fp8 = {"num_bits": (4, 3), "axis": None}
    names = [f"*{layer}*{side}_quantizer" for layer in ("linear_attn", "self_attn") for side in ("weight", "input")]
    config["quant_cfg"] += [{"quantizer_name": name, "cfg": fp8, "enable": True} for name in names]
    export_modelopt(model, out, config, fixture)


def produce_modelopt_kv(model: PreTrainedModel, out: Path, fixture: Fixture) -> None:
    """ModelOpt's default FP8 configuration with an FP8 KV cache, merged as it does it itself."""
    config = update_quant_cfg_with_kv_cache_quant(mtq.FP8_DEFAULT_CFG, mtq.FP8_KV_CFG["quant_cfg"])
    export_modelopt(model, out, config, fixture)


def assemble_fp8(model: PreTrainedModel, out: Path, fixture: Fixture) -> None:
    """ModelOpt's export with its config restated in the words of AutoFP8 and vLLM's own `fp8`.

    AutoFP8, which wrote that dialect, is older than Qwen3.5. The tensors need no change: it stores F8_E4M3 weights and
    F32 scalars under the same names.
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    produce_modelopt(model, out, fixture)
    tensors, _ = read_tensors(out)
    ignored = sorted(name for name in linears if tensors[f"{name}.weight"].dtype != torch.float8_e4m3fn)
    path = out / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ignored}
    path.write_text(json.dumps(config, indent=4))
    (out / "hf_quant_config.json").unlink()


def export_modelopt(model: PreTrainedModel, out: Path, config: dict[str, Any], fixture: Fixture) -> None:
    """Calibrate with ``config``, the fixture's layers switched off, and export."""
    config["quant_cfg"] += [{"quantizer_name": pattern, "enable": False} for pattern in fixture.ignore]

    def calibrate(quantized: PreTrainedModel) -> None:
        for ids in calibration_ids():
            quantized(input_ids=ids[None])

    model = mtq.quantize(model, config, calibrate)
    export_hf_checkpoint(model, dtype=torch.bfloat16, export_dir=out)
    byte_tokenizer().save_pretrained(out)


# --- checks ---------------------------------------------------------------------------------------------------------


def require(condition: bool, message: str) -> None:
    """Stop with a message unless the condition holds (assert would go away under -O)."""
    if not condition:
        raise SystemExit(f"make_fixtures: {message}")


def read_tensors(directory: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Every tensor of a checkpoint, and the shard that each lies in."""
    tensors: dict[str, torch.Tensor] = {}
    shards: dict[str, str] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 - not a dict: safe_open itself cannot be iterated
                tensors[name], shards[name] = shard.get_tensor(name), path.name
    return tensors, shards


def scales_in_other_shards(fixture: Fixture, shards: Mapping[str, str]) -> list[str]:
    """Scales of the fused modules that lie in another shard than their weight."""
    found = []
    for name, shard in shards.items():
        module, _, leaf = name.rpartition(".")
        is_scale = leaf in ("weight_scale", "input_scale") and module.endswith(fixture.fused)
        if is_scale and shards[f"{module}.weight"] != shard:
            found.append(f"{name}: {shard}, weight in {shards[module + '.weight']}")
    return sorted(found)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what was expected."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def check_tensors(fixture: Fixture, tensors: Mapping[str, torch.Tensor]) -> None:
    """Nothing NaN or infinite; every matrix that should be is FP8; the fused modules have both scales."""
    for name, tensor in tensors.items():
        require(bool(tensor.float().isfinite().all()), f"{fixture.name}: {name} is not finite")
        is_matrix = tensor.ndim == 2 and name.endswith(".weight")
        if is_matrix:
            nvfp4 = fixture.nvfp4 is not None and fixture.nvfp4.search(name)
            kept = KEPT_IN_BF16.search(name)
            dtype = torch.bfloat16 if kept else torch.uint8 if nvfp4 else torch.float8_e4m3fn
            require(tensor.dtype == dtype, f"{fixture.name}: {name} is {tensor.dtype}, not {dtype}")
    modules = [name.removesuffix(".weight") for name in tensors if name.endswith(".weight")]
    for leaf in fixture.fused:
        require(sum(m.endswith(f".{leaf}") for m in modules) >= 2, f"{fixture.name}: fewer than two layers with {leaf}")
    for module in (m for m in modules if m.endswith(fixture.fused)):
        for leaf in ("weight_scale", "input_scale"):
            require(tensors[f"{module}.{leaf}"].numel() == 1, f"{fixture.name}: {module}.{leaf} is not one value")


def check_kv_cache(fixture: Fixture, directory: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Every layer of attention has a scale for k and for v, none of them the 1.0 of a cache that was not calibrated;
    the two files that describe the quantization say FP8."""
    layers = [name.removesuffix(".o_proj.weight") for name in tensors if name.endswith(".self_attn.o_proj.weight")]
    expected = {f"{layer}.{part}_proj.{part}_scale" for layer in layers for part in "kv"}
    found = {name for name in tensors if name.endswith((".k_scale", ".v_scale"))}
    require(found == expected and bool(found), f"{fixture.name}: scales of the KV cache: {sorted(found)}")
    for name in sorted(found):
        scale = tensors[name]
        require(scale.dtype == torch.float32 and scale.numel() == 1, f"{fixture.name}: {name} is not one F32")
        require(scale.item() > 0 and scale.item() != 1, f"{fixture.name}: {name} is {scale.item()}")
    scheme = json.loads((directory / "config.json").read_text())["quantization_config"].get("kv_cache_scheme")
    algorithm = json.loads((directory / "hf_quant_config.json").read_text())["quantization"]["kv_cache_quant_algo"]
    require(algorithm == "FP8", f"{fixture.name}: hf_quant_config.json has kv_cache_quant_algo {algorithm}")
    is_fp8 = isinstance(scheme, dict) and (scheme.get("type"), scheme.get("num_bits")) == ("float", 8)
    require(is_fp8, f"{fixture.name}: config.json has kv_cache_scheme {scheme}")


def check_weights(fixture: Fixture, tensors: Mapping[str, torch.Tensor], source: Mapping[str, torch.Tensor]) -> None:
    """Weight times scale is the BF16 weight that went in (experts apart: they are one 3-D tensor in the source)."""
    for name, weight in tensors.items():
        if not name.endswith(".weight") or name not in source:
            continue
        if weight.dtype == torch.float8_e4m3fn:
            found, tolerance = weight.float() * tensors[f"{name}_scale"].float(), WEIGHT_TOLERANCE
        elif weight.dtype == torch.uint8:
            found, tolerance = dequantize_nvfp4(name, tensors), NVFP4_TOLERANCE
        else:
            continue
        error = relative_error(found, source[name])
        require(error < tolerance, f"{fixture.name}: {name} is {error:.3g} away from the weight that went in")


def dequantize_nvfp4(name: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Two E2M1 codes a byte, the low one first; a scale for every 16 of them, and one for the whole matrix."""
    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    packed, scales = tensors[name].int(), tensors[f"{name}_scale"].float() * tensors[f"{name}_scale_2"].float()
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)
    values = magnitudes[codes & 7] * (1 - 2 * (codes >> 3))
    return values * scales.repeat_interleave(16, dim=1)


def logits_of(model: PreTrainedModel) -> torch.Tensor:
    """Logits of the first calibration sample."""
    with torch.no_grad():
        return model(input_ids=calibration_ids()[:1]).logits


def check_reload(fixture: Fixture, directory: Path, model_class: type[PreTrainedModel], expected: torch.Tensor) -> None:
    """The checkpoint loads back into transformers and gives nearly the logits of the BF16 model."""
    model, report = model_class.from_pretrained(directory, dtype=torch.bfloat16, output_loading_info=True)
    # transformers fuses the experts into one BF16 tensor on loading and has no place for their activation scales.
    unexpected = [key for key in report["unexpected_keys"] if not re.search(r"experts\.\d+\..*input_scale$", key)]
    for kind, keys in (report | {"unexpected_keys": unexpected}).items():
        require(not keys, f"{fixture.name}: {kind} on reload: {sorted(map(str, keys))[:4]}")
    logits = logits_of(model)
    require(bool(logits.isfinite().all()), f"{fixture.name}: the reloaded model gives logits that are not finite")
    error = relative_error(logits, expected)
    print(f"{fixture.name}: reloaded, logits {error:.3g} away from the BF16 model's")
    require(error < LOGIT_TOLERANCE, f"{fixture.name}: logits {error:.3g} away from the BF16 model's")


def check_no_machine_paths(fixture: Fixture, directory: Path) -> None:
    """No file names a folder of the machine that built it."""
    for path in directory.iterdir():
        content = path.read_bytes()
        for place in (tempfile.gettempdir(), str(FIXTURES.parent.parent)):
            require(f"{place}/".encode() not in content, f"{fixture.name}: {path.name} mentions {place}")


# --- driver ---------------------------------------------------------------------------------------------------------

FIXTURE_TABLE = (
    Fixture(
        "llmcompressor-qwen3_5-vl",
        lambda: dense_multimodal(DEMO),
        produce_llmcompressor,
        IGNORED,
        max_shard_size="300KB",
        scale_in_other_shard=True,
    ),
    Fixture(
        "llmcompressor-qwen3_5-text",
        dense_text,
        produce_llmcompressor,
        IGNORED,
        max_shard_size="60KB",
        scale_in_other_shard=True,
    ),
    Fixture(
        "llmcompressor-qwen3_5-moe",
        moe_text,
        produce_llmcompressor,
        IGNORED + IGNORED_ROUTERS,
        max_shard_size="60KB",
        scale_in_other_shard=True,
    ),
    Fixture(
        "llmcompressor-qwen3_next",
        next_text,
        produce_llmcompressor,
        IGNORED_NEXT + IGNORED_ROUTERS,
        max_shard_size="20KB",
        scale_in_other_shard=True,
        fused=("in_proj_qkvz",),
    ),
    Fixture(
        "llmcompressor-llama",
        llama,
        produce_llmcompressor,
        ("lm_head",),
        max_shard_size="20KB",
        scale_in_other_shard=True,
        fused=("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"),
    ),
    Fixture(
        "llmcompressor-phi3",
        phi3,
        produce_llmcompressor,
        ("lm_head",),
        max_shard_size="20KB",
        scale_in_other_shard=True,
        fused=("qkv_proj", "gate_up_proj"),
    ),
    Fixture(
        "llmcompressor-minicpmv4_6",
        minicpm,
        produce_llmcompressor,
        IGNORED_MINICPM,
        max_shard_size="24KB",
        scale_in_other_shard=True,
    ),
    Fixture("modelopt-qwen3_5-vl", lambda: dense_multimodal(SMALL), produce_modelopt, MODELOPT_OFF),
    Fixture("modelopt-qwen3_5-moe", moe_multimodal, produce_modelopt, MODELOPT_OFF + MODELOPT_ROUTERS_OFF),
    Fixture(
        "modelopt-qwen3_5-mixed",
        lambda: dense_multimodal(MIXED),
        produce_modelopt_mixed,
        MODELOPT_OFF,
        nvfp4=re.compile(r"mlp\.\w+\.weight$"),
    ),
    Fixture(
        "modelopt-llama",
        llama,
        produce_modelopt_kv,
        ("*lm_head*",),
        fused=("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"),
        kv_cache=True,
    ),
    Fixture("fp8-qwen3_5-vl", lambda: dense_multimodal(SMALL), assemble_fp8, MODELOPT_OFF),
)


def make(fixture: Fixture, root: Path) -> None:
    """Build one fixture in a scratch folder, check it, and put it in place."""
    with tempfile.TemporaryDirectory(prefix="fixture-") as scratch:
        source = Path(scratch) / "source"
        model = build_model(fixture.model, source)
        model_class, expected = type(model), logits_of(model)
        built = Path(scratch) / fixture.name
        built.mkdir()
        fixture.produce(model, built, fixture)
        tensors, shards = read_tensors(built)
        check_tensors(fixture, tensors)
        check_weights(fixture, tensors, read_tensors(source)[0])
        if fixture.kv_cache:
            check_kv_cache(fixture, built, tensors)
        check_no_machine_paths(fixture, built)
        moved = scales_in_other_shards(fixture, shards)
        require(bool(moved) or not fixture.scale_in_other_shard, f"{fixture.name}: every scale lies beside its weight")
        if fixture.produce is produce_llmcompressor:
            check_reload(fixture, built, model_class, expected)
        shutil.rmtree(root / fixture.name, ignore_errors=True)
        shutil.copytree(built, root / fixture.name, copy_function=shutil.copyfile)
    size = sum(path.stat().st_size for path in (root / fixture.name).iterdir())
    print(f"{fixture.name}: {size} bytes, {len(tensors)} tensors in {len(set(shards.values()))} file(s)")
    for line in moved:
        print(f"  scale in another shard: {line}")


def main() -> None:
    """Build the fixtures that the command line names, or all of them."""
    names = [fixture.name for fixture in FIXTURE_TABLE]
    parser = argparse.ArgumentParser(description="Write the checkpoints under tests/fixtures.")
    parser.add_argument("name", nargs="*", help=f"fixtures to build (default: all of {', '.join(names)})")
    parser.add_argument("--out", type=Path, default=FIXTURES, help="folder to write them into")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.name) - set(names))
    require(not unknown, f"no such fixture: {', '.join(unknown)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    for fixture in FIXTURE_TABLE:
        if not arguments.name or fixture.name in arguments.name:
            make(fixture, arguments.out)
    total = sum(path.stat().st_size for path in arguments.out.rglob("*") if path.is_file())
    print(f"all of {arguments.out.name}: {total} bytes")
    require(total <= BUDGET_BYTES, f"{total} bytes are more than the budget of {BUDGET_BYTES}")


if __name__ == "__main__":
    main()
