"""The atlas against what is known of the families that engines were run with, and what is found by it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from rewrite.quantization.architectures import ARCHITECTURES
from rewrite.quantization.atlas import Source, find_sources, releases
from rewrite.quantization.by_source import layers_by_source

#: A class of each family of :data:`ARCHITECTURES` that the engines were run with, as its config.json states it.
CLASSES = {
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
    "qwen3_next": "Qwen3NextForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}
#: Stored fused, so no table of parts has them.
ON_DISK = {("qwen3_next", "in_proj_qkvz"), ("qwen3_next", "in_proj_ba"), ("phi3", "qkv_proj"), ("phi3", "gate_up_proj")}


def sources(**config: Any) -> tuple[Source, ...]:
    return find_sources(config)


@pytest.mark.parametrize("model_type", CLASSES)
def test_agrees_with_the_families_that_were_run(model_type: str) -> None:
    """Each layer that was measured is in the source of each engine, with the same parts in the same order."""
    found = sources(architectures=[CLASSES[model_type]])
    assert {source.engine for source in found} == {"vLLM", "SGLang"}
    (entry,) = [entry for entry in ARCHITECTURES if model_type in entry.model_types]
    for source in found:
        for layer in entry.fused_layers:
            if (model_type, layer.name) not in ON_DISK:
                read = source.layer_of(layer.modules)
                assert read is not None, (source.engine, source.version, layer.name)
                assert read.name in (layer.name, *layer.also)


def test_slots_are_in_the_order_of_the_partitions() -> None:
    for source in sources(architectures=["Qwen3_5ForConditionalGeneration"]):
        layer = source.layer_of(("in_proj_qkv", "in_proj_z"))
        assert layer is not None and layer.kind == "slots", "in_proj_qkv has three slots"


def test_experts_with_and_without_a_gate() -> None:
    for source in sources(architectures=["MiniMaxM2ForCausalLM"]):
        assert ("w1", "w3", "w2") in source.experts
    for source in sources(architectures=["NemotronHForCausalLM"]):
        assert all(len(names) == 2 for names in source.experts), source


def test_the_class_counts_before_the_model_type() -> None:
    """Kimi-K2 has a model_type of its own and states the class of DeepSeek-V3."""
    kimi = sources(model_type="kimi_k2", architectures=["DeepseekV3ForCausalLM"])
    assert kimi == sources(architectures=["DeepseekV3ForCausalLM"]) != ()
    assert sources(model_type="deepseek_v3") == kimi, "without a class the model_type counts"
    assert sources(model_type="made_up", architectures=["MadeUpForCausalLM"]) == ()
    assert sources() == sources(architectures="LlamaForCausalLM") == sources(architectures=[1]) == ()


def test_the_language_model_of_another_config_is_added() -> None:
    """vLLM makes Gemma 3's language model by the text_config."""
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": {"model_type": "gemma3_text"}}
    (newest,) = [each for each in find_sources(config) if (each.engine, each.version) == ("vLLM", "0.32.0")]
    layer = newest.layer_of(("gate_proj", "up_proj"))
    assert layer is not None and layer.kind == "merged"
    assert (
        newest.served_name("model.language_model.layers.0.mlp.up_proj") == "language_model.model.layers.0.mlp.up_proj"
    )
    pixtral = {"architectures": ["Mistral3ForConditionalGeneration"]}
    lost, known = (find_sources({**pixtral, "text_config": {"model_type": kind}}) for kind in ("made_up", "mistral"))
    both = [pair for pair in zip(lost, known, strict=True) if pair[0].engine == "SGLang"]
    assert both and all(len(one.layers) < len(other.layers) for one, other in both)


def test_only_where_all_parts_are_stored() -> None:
    config = {"architectures": ["GraniteForCausalLM"]}
    stored = {f"model.layers.{i}.self_attn.{part}_proj" for i in (0, 1) for part in "qkvo"} - {
        "model.layers.1.self_attn.v_proj"
    }
    found = {layer.name: parents for layer, parents in layers_by_source(config, stored)}
    assert found == {"qkv_proj": ("model.layers.0.self_attn",)}


def test_what_was_read_is_not_loaded_with_the_package() -> None:
    """Import time must not grow: 300 kB are read when a family is looked up, once."""
    code = (
        "import rewrite, rewrite.cli.commands; from rewrite.quantization import atlas; print(atlas._atlas.cache_info())"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "currsize=0" in said
    assert len(releases()) >= 3
