"""What llm-compressor writes: ``oneshot`` with QuantizationModifier (or GPTQ, AWQ), and ``model_free_ptq``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fixtures.constants import CALIBRATION_SAMPLES, SEQUENCE_LENGTH
from fixtures.inputs import byte_tokenizer, calibration_ids

from zoo.entry import Entry
from zoo.models import load

GDN = r"re:.*linear_attn\.(in_proj_qkv|in_proj_z|out_proj)$"
ATTENTION = r"re:.*self_attn\..*_proj$"
MLP = r"re:.*mlp\..*(gate|up|down)_proj$"
EXPERTS = r"re:.*experts\.\d+\..*_proj$"
SHARED = r"re:.*shared_expert\..*_proj$"
#: What the usual recipes leave alone.
USUAL = ["lm_head", "re:.*in_proj_a$", "re:.*in_proj_b$", "re:.*visual.*"]
ROUTERS = ["re:.*mlp.gate$", "re:.*mlp.shared_expert_gate$"]
#: model_free_ptq takes every matrix for a linear layer, and stops at the vectors of pre_fc_norm.
NO_LINEARS = ["re:.*embed_tokens$", "re:.*conv1d$", "re:.*norm.*"]


def _weights(strategy: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, **more}


TENSOR = _weights("tensor", observer="memoryless_minmax")
CHANNEL = _weights("channel", observer="memoryless_minmax")
STATIC = _weights("tensor", dynamic=False)
PER_TOKEN = _weights("token", dynamic=True)
PER_TENSOR_DYNAMIC = _weights("tensor", dynamic=True)
#: Schemes by the names that the table below uses, beside the presets' own names.
SCHEMES = {
    "tensor+static": {"weights": TENSOR, "input_activations": STATIC},
    "tensor+token": {"weights": TENSOR, "input_activations": PER_TOKEN},
    "tensor+dynamic-tensor": {"weights": TENSOR, "input_activations": PER_TENSOR_DYNAMIC},
    "tensor": {"weights": TENSOR},
    "channel+token": {"weights": CHANNEL, "input_activations": PER_TOKEN},
    "channel+static": {"weights": CHANNEL, "input_activations": STATIC},
    "channel": {"weights": CHANNEL},
}
KV_TENSOR = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
KV_HEAD = {**KV_TENSOR, "strategy": "attn_head"}


def _group(scheme: str, targets: list[str]) -> Any:
    from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme

    if scheme in SCHEMES:
        return QuantizationScheme(targets=targets, **SCHEMES[scheme])
    return preset_name_to_scheme(scheme, targets)


def _groups(recipe: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _group(scheme, targets) for name, (scheme, targets) in recipe["groups"].items()}


def _modifier(recipe: Mapping[str, Any]) -> Any:
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    modifier = GPTQModifier if recipe.get("modifier") == "GPTQModifier" else QuantizationModifier
    arguments = {k: v for k, v in recipe.items() if k not in ("groups", "max_shard_size", "modifier")}
    if "groups" in recipe:
        arguments["config_groups"] = _groups(recipe)
    return modifier(**arguments)


def oneshot(_model: str, base: Path, out: Path, recipe: Mapping[str, Any]) -> None:
    """The documented call, with byte tokens."""
    from datasets import Dataset
    from llmcompressor import oneshot as run

    model, tokenizer = load(base), byte_tokenizer()
    samples = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in calibration_ids().tolist()]
    run(
        model=model,
        dataset=Dataset.from_list(samples),
        recipe=_modifier(recipe),
        max_seq_length=SEQUENCE_LENGTH,
        num_calibration_samples=CALIBRATION_SAMPLES,
        processor=tokenizer,
    )
    model.save_pretrained(out, save_compressed=True, max_shard_size=recipe.get("max_shard_size", "5GB"))
    tokenizer.save_pretrained(out)


def model_free(_model: str, base: Path, out: Path, recipe: Mapping[str, Any]) -> None:
    """``model_free_ptq``: from file to file, no calibration."""
    from compressed_tensors.quantization import QuantizationConfig
    from llmcompressor import model_free_ptq

    arguments = {k: v for k, v in recipe.items() if k not in ("groups", "named")}
    if "groups" in recipe:
        ignore = arguments.pop("ignore", [])
        arguments["config"] = QuantizationConfig(config_groups=_groups(recipe), ignore=ignore)
    elif "named" in recipe:
        arguments["scheme"] = _group(recipe["named"], ["Linear"])
    model_free_ptq(str(base), str(out), device="cpu", **arguments)


def _fp8(**more: Any) -> dict[str, Any]:
    return {"targets": "Linear", "scheme": "FP8", "ignore": USUAL, **more}


def _mixed(other: str, **more: Any) -> dict[str, Any]:
    groups = {"attention": ("tensor+static", [GDN, ATTENTION]), "mlp": (other, [MLP])}
    return {"groups": groups, "ignore": USUAL, **more}


_LAYER_1 = [f"model.layers.1.{each}" for each in ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z")]
_MOE = {"targets": "Linear", "ignore": [*USUAL, *ROUTERS]}

TABLE = (
    # one scheme for everything
    Entry("llmc-fp8-qwen3_5-text", "qwen3_5-text", oneshot, _fp8()),
    Entry("llmc-fp8-qwen3_5-vl-shards", "qwen3_5-vl", oneshot, _fp8(max_shard_size="40KB")),
    Entry(
        "llmc-fp8-qwen3_5-vl-lm_head-only",
        "qwen3_5-vl",
        oneshot,
        _fp8(ignore=["lm_head"]),
        "everything that is a Linear: in_proj_a, in_proj_b and the vision tower too",
    ),
    Entry("llmc-fp8-qwen3_5-text-in_proj_ba", "qwen3_5-text", oneshot, _fp8(ignore=["lm_head", "re:.*visual.*"])),
    Entry("llmc-fp8-dynamic-qwen3_5-vl", "qwen3_5-vl", oneshot, _fp8(scheme="FP8_DYNAMIC")),
    Entry("llmc-fp8-block-qwen3_5-text", "qwen3_5-text", oneshot, _fp8(scheme="FP8_BLOCK")),
    Entry("llmc-fp8-block-qwen3_5-moe-vl", "qwen3_5-moe-vl", oneshot, {**_MOE, "scheme": "FP8_BLOCK"}),
    Entry("llmc-w8a8-qwen3_5-vl", "qwen3_5-vl", oneshot, _fp8(scheme="W8A8")),
    Entry("llmc-w4a16-qwen3_5-text", "qwen3_5-text", oneshot, _fp8(scheme="W4A16")),
    Entry("llmc-nvfp4-qwen3_5-text", "qwen3_5-text", oneshot, _fp8(scheme="NVFP4")),
    Entry("llmc-nvfp4a16-llama", "llama", oneshot, _fp8(scheme="NVFP4A16", ignore=["lm_head"])),
    Entry("llmc-mxfp4-qwen3_5-text", "qwen3_5-text", oneshot, _fp8(scheme="MXFP4")),
    Entry("llmc-mxfp8-llama", "llama", oneshot, _fp8(scheme="MXFP8", ignore=["lm_head"])),
    Entry("llmc-w4afp8-qwen3", "qwen3", oneshot, _fp8(scheme="W4AFP8", ignore=["lm_head"])),
    Entry("llmc-w4a16-asym-phi3", "phi3", oneshot, _fp8(scheme="W4A16_ASYM", ignore=["lm_head"])),
    # FP8 that no preset has
    Entry(
        "llmc-tensor-token-qwen3_5-vl",
        "qwen3_5-vl",
        oneshot,
        {"groups": {"group_0": ("tensor+token", ["Linear"])}, "ignore": USUAL},
        "one scale for a matrix, activations dynamic per token",
    ),
    Entry(
        "llmc-tensor-dynamic-qwen3_5-text",
        "qwen3_5-text",
        oneshot,
        {"groups": {"group_0": ("tensor+dynamic-tensor", ["Linear"])}, "ignore": USUAL},
    ),
    Entry(
        "llmc-weight-only-llama",
        "llama",
        oneshot,
        {"groups": {"group_0": ("tensor", ["Linear"])}, "ignore": ["lm_head"]},
        "FP8 W8A16",
    ),
    Entry(
        "llmc-channel-static-qwen3_5-text",
        "qwen3_5-text",
        oneshot,
        {"groups": {"group_0": ("channel+static", ["Linear"])}, "ignore": USUAL},
    ),
    Entry(
        "llmc-channel-only-qwen3_5-text",
        "qwen3_5-text",
        oneshot,
        {"groups": {"group_0": ("channel", ["Linear"])}, "ignore": USUAL},
        "channel scales, FP8 W8A16",
    ),
    # mixed
    Entry("llmc-mixed-int4-qwen3_5-vl", "qwen3_5-vl", oneshot, _mixed("W4A16")),
    Entry("llmc-mixed-nvfp4-qwen3_5-vl", "qwen3_5-vl", oneshot, _mixed("NVFP4", max_shard_size="60KB")),
    Entry("llmc-mixed-int8-qwen3_5-text", "qwen3_5-text", oneshot, _mixed("W8A8")),
    Entry("llmc-mixed-channel-qwen3_5-vl", "qwen3_5-vl", oneshot, _mixed("channel+token")),
    Entry("llmc-mixed-block-qwen3_5-text", "qwen3_5-text", oneshot, _mixed("FP8_BLOCK")),
    Entry("llmc-mixed-mxfp4-qwen3_5-text", "qwen3_5-text", oneshot, _mixed("MXFP4")),
    Entry(
        "llmc-mixed-nvfp4-attention-qwen3_5-text",
        "qwen3_5-text",
        oneshot,
        {"groups": {"fp8": ("tensor+static", [GDN]), "nvfp4": ("NVFP4", [ATTENTION, MLP])}, "ignore": USUAL},
    ),
    Entry(
        "llmc-mixed-lm_head-only-qwen3_5-vl",
        "qwen3_5-vl-wide",
        oneshot,
        {
            "groups": {
                "attention": ("tensor+static", [r"re:.*linear_attn.*", r"re:.*self_attn.*"]),
                "mlp": ("W4A16", [r"re:.*mlp.*"]),
            },
            "ignore": ["lm_head"],
        },
        "wide patterns: they match conv1d, norms and the vision tower's MLP, too",
    ),
    Entry(
        "llmc-mixed-llama",
        "llama",
        oneshot,
        {"groups": {"a": ("tensor+static", [ATTENTION]), "m": ("W4A16", [MLP])}, "ignore": ["lm_head"]},
    ),
    Entry(
        "llmc-mixed-phi3",
        "phi3",
        oneshot,
        {"groups": {"a": ("tensor+static", [ATTENTION]), "m": ("W8A8", [MLP])}, "ignore": ["lm_head"]},
        "the pattern for MLPs matches gate_up_proj and down_proj",
    ),
    # targets
    Entry(
        "llmc-regex-targets-qwen3_5-vl",
        "qwen3_5-vl",
        oneshot,
        {"targets": [r"re:.*layers.*"], "scheme": "FP8", "ignore": ["lm_head"]},
        "matches norms, conv1d, attention",
    ),
    Entry(
        "llmc-gdn-only-qwen3_5-vl", "qwen3_5-vl", oneshot, {"targets": [GDN], "scheme": "FP8", "ignore": ["lm_head"]}
    ),
    Entry(
        "llmc-exact-targets-qwen3_5-text",
        "qwen3_5-text",
        oneshot,
        {"targets": _LAYER_1, "scheme": "FP8", "ignore": []},
        "one layer, by exact names",
    ),
    Entry(
        "llmc-overlapping-qwen3_5-text",
        "qwen3_5-text",
        oneshot,
        {
            "groups": {
                "first": ("channel+token", [r"re:.*layers\.1\..*_proj$", r"re:.*layers\.1\..*(qkv|z)$"]),
                "rest": ("tensor+static", ["Linear"]),
            },
            "ignore": USUAL,
        },
        "a pattern for a layer beside the class of all",
    ),
    Entry(
        "llmc-overlapping-regex-qwen3_5-vl",
        "qwen3_5-vl",
        oneshot,
        {
            "groups": {
                "b": ("tensor+static", [r"re:.*linear_attn\..*"]),
                "a": ("channel+token", [r"re:.*layers\.[0-9]+\..*_proj$"]),
            },
            "ignore": USUAL,
        },
        "both patterns match linear_attn.out_proj: the first in alphabetical order counts",
    ),
    Entry(
        "llmc-nvfp4-lm_head-only-qwen3_5-vl",
        "qwen3_5-vl-wide",
        oneshot,
        _fp8(scheme="NVFP4", ignore=["lm_head"]),
        "in_proj_a, in_proj_b and the vision tower, too",
    ),
    Entry(
        "llmc-gptq-mixed-qwen3_5-text",
        "qwen3_5-text",
        oneshot,
        {
            "modifier": "GPTQModifier",
            "groups": {"a": ("W8A16", [GDN, ATTENTION]), "m": ("W4A16", [MLP])},
            "ignore": USUAL,
        },
        "GPTQ, integers only",
    ),
    Entry("llmc-qkv-only-qwen3_5-vl", "qwen3_5-vl", oneshot, _fp8(ignore=[*USUAL, "re:.*in_proj_z$"])),
    Entry(
        "llmc-no-gdn-qwen3_5-text",
        "qwen3_5-text",
        oneshot,
        _fp8(ignore=["re:.*lm_head", "re:.*linear_attn.*"]),
        "the recipe of llm-compressor's own example",
    ),
    Entry("llmc-fp8-lm_head-llama", "llama", oneshot, _fp8(ignore=[])),
    Entry("llmc-fp8-lm_head-qwen3_5-text", "qwen3_5-text", oneshot, _fp8(ignore=USUAL[1:])),
    Entry(
        "llmc-embeddings-llama",
        "llama",
        oneshot,
        {
            "groups": {"l": ("tensor+static", ["Linear"]), "e": ("channel", ["Embedding"])},
            "ignore": ["lm_head"],
        },
    ),
    Entry("llmc-fp8-llama-tied", "llama-tied", oneshot, _fp8(ignore=["lm_head"]), "tied embeddings"),
    # KV cache
    Entry("llmc-kv-qwen3_5-vl", "qwen3_5-vl", oneshot, _fp8(kv_cache_scheme=KV_TENSOR)),
    Entry("llmc-kv-head-llama", "llama", oneshot, _fp8(ignore=["lm_head"], kv_cache_scheme=KV_HEAD)),
    Entry("llmc-kv-only-llama", "llama", oneshot, {"kv_cache_scheme": KV_TENSOR, "ignore": ["lm_head"]}),
    # MoE and other families
    Entry("llmc-fp8-qwen3_5-moe-vl", "qwen3_5-moe-vl", oneshot, {**_MOE, "scheme": "FP8"}),
    Entry("llmc-fp8-dynamic-qwen3_5-moe", "qwen3_5-moe", oneshot, {**_MOE, "scheme": "FP8_DYNAMIC"}),
    Entry(
        "llmc-channel-static-qwen3_5-moe",
        "qwen3_5-moe",
        oneshot,
        {"groups": {"group_0": ("channel+static", ["Linear"])}, "ignore": [*USUAL, *ROUTERS]},
    ),
    Entry(
        "llmc-nvfp4-experts-qwen3_5-moe-vl",
        "qwen3_5-moe-vl",
        oneshot,
        {
            "groups": {"fp8": ("tensor+static", [GDN, ATTENTION, SHARED]), "nvfp4": ("NVFP4", [EXPERTS])},
            "ignore": [*USUAL, *ROUTERS],
        },
    ),
    Entry("llmc-fp8-qwen3_next", "qwen3_next", oneshot, {**_MOE, "scheme": "FP8", "max_shard_size": "60KB"}),
    Entry("llmc-fp8-block-qwen3_next", "qwen3_next", oneshot, {**_MOE, "scheme": "FP8_BLOCK"}),
    Entry("llmc-fp8-qwen3_moe", "qwen3_moe", oneshot, {**_MOE, "scheme": "FP8"}),
    Entry("llmc-fp8-mixtral", "mixtral", oneshot, {**_MOE, "scheme": "FP8", "ignore": ["lm_head", "re:.*gate$"]}),
    Entry("llmc-fp8-deepseek_v3", "deepseek_v3", oneshot, {**_MOE, "scheme": "FP8"}),
    Entry("llmc-fp8-phi3-shards", "phi3", oneshot, _fp8(ignore=["lm_head"], max_shard_size="30KB")),
    # file to file
    Entry(
        "mfree-fp8-block-qwen3_5-vl-mtp",
        "qwen3_5-vl+mtp",
        model_free,
        {"scheme": "FP8_BLOCK", "ignore": [*USUAL, *NO_LINEARS]},
        "with MTP layers, quantized like the rest",
    ),
    Entry(
        "mfree-fp8-dynamic-qwen3_5-text",
        "qwen3_5-text",
        model_free,
        {"scheme": "FP8_DYNAMIC", "ignore": [*USUAL, *NO_LINEARS]},
    ),
    Entry(
        "mfree-tensor-qwen3_5-vl-mtp",
        "qwen3_5-vl+mtp",
        model_free,
        {"named": "tensor+token", "ignore": [*USUAL, *NO_LINEARS]},
    ),
    Entry(
        "mfree-tensor-qwen3_5-vl-lm_head-only",
        "qwen3_5-vl",
        model_free,
        {"named": "tensor+token", "ignore": ["lm_head", "re:.*conv1d$", "re:.*norm.*", "re:.*patch_embed.*"]},
        "embeddings and vision are quantized, too",
    ),
    Entry(
        "mfree-nvfp4a16-qwen3_5-text",
        "qwen3_5-text",
        model_free,
        {"scheme": "NVFP4A16", "ignore": [*USUAL, *NO_LINEARS]},
    ),
    Entry(
        "mfree-mixed-qwen3_5-vl",
        "qwen3_5-vl",
        model_free,
        {
            "groups": {"a": ("tensor+token", [GDN, ATTENTION]), "b": ("NVFP4A16", [MLP])},
            "ignore": [*USUAL, *NO_LINEARS],
        },
    ),
    Entry(
        "mfree-tensor-qwen3_5-moe-vl",
        "qwen3_5-moe-vl",
        model_free,
        {"named": "tensor+token", "ignore": [*USUAL, *ROUTERS, *NO_LINEARS]},
    ),
)
