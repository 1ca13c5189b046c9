"""Families that no engine was run with, by the engines' source: what is said, and what is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import rewrite
from rewrite import open_checkpoint
from rewrite.cli.commands import main
from rewrite.loaders import by_source, measured
from rewrite.loaders.outcome import Outcome
from rewrite.loaders.versions import find_loaders
from rewrite.loaders.views import view_model
from rewrite.quantization.atlas import Source, find_sources
from rewrite.quantization.model import interpret
from tests.support import FIXTURES, edit_json

Named = Callable[[str, str], Path]


@pytest.fixture
def named(tmp_path: Path) -> Named:
    """The fixture of a Llama under the names of another family."""

    def make(model_type: str, architecture: str) -> Path:
        shutil.copytree(FIXTURES / "llmcompressor-llama", tmp_path / "in")
        edit_json(tmp_path / "in" / "config.json", model_type=model_type, architectures=[architecture])
        return tmp_path / "in"

    return make


def outcome(path: Path, engine: str) -> Outcome:
    (loader,) = find_loaders(engine)
    return loader.predict(view_model(interpret(open_checkpoint(path)), "all"))


def by_rules(path: Path, engine: str = "vllm@0.32.0") -> Outcome:
    """What would be said where such a checkpoint was run."""
    (loader,) = find_loaders(engine)
    return loader.by_rules(view_model(interpret(open_checkpoint(path)), "all"))


@pytest.fixture(autouse=True)
def nothing_was_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "_record", lambda: {"modules": [], "engines": {}})


@pytest.mark.parametrize("engine", ["vllm@0.32.0", "sglang@0.5.23", "vllm@0.20.0", "transformers@5.24.0"])
def test_the_source_alone_is_not_enough(engine: str, named: Named) -> None:
    """Granite has the layers of a Llama; the same was said of StableLM, and SGLang raised a KeyError."""
    assert outcome(named("granite", "GraniteForCausalLM"), engine).kind == "not known"


def test_what_is_fused_is_found_and_repaired(named: Named, tmp_path: Path) -> None:
    path = named("granite", "GraniteForCausalLM")
    assert {group.layer.name for group in interpret(open_checkpoint(path)).groups.whole} == {"qkv_proj", "gate_up_proj"}
    assert by_rules(path).kind == "loses precision"
    result = CliRunner().invoke(main, ["convert", str(path), str(tmp_path / "out"), "--groups", "all"])
    assert result.exit_code == 0, result.output
    assert by_rules(tmp_path / "out").kind == "exact"
    assert rewrite.verify(path, tmp_path / "out", tokens=1, device="cpu").ok


def test_a_layer_that_is_quantized_in_part_is_not_exact(named: Named, tmp_path: Path) -> None:
    """One v_proj is plain, all others are FP8. Seen: "exact", vLLM 0.32.0 raises, SGLang 0.5.23 casts it to FP8."""
    path = named("granite", "GraniteForCausalLM")
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    plain = "model.layers.1.self_attn.v_proj"
    edit_json(path / "config.json", quantization_config={**config, "ignore": [*config["ignore"], plain]})
    for shard in path.glob("*.safetensors"):
        tensors = {name: value for name, value in load_file(shard).items() if not name.startswith(f"{plain}.")}
        if (
            shard.name
            == json.loads((path / "model.safetensors.index.json").read_text())["weight_map"][f"{plain}.weight"]
        ):
            tensors[f"{plain}.weight"] = torch.zeros(32, 64, dtype=torch.bfloat16)
        save_file(tensors, shard, {"format": "pt"})
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"] = {
        name: shard
        for name, shard in index["weight_map"].items()
        if name.endswith("v_proj.weight") or plain not in name
    }
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert by_rules(path).kind != "exact"
    assert [fault.code for fault in rewrite.inspect_checkpoint(path).findings] == ["group-in-part"]
    with pytest.raises(rewrite.Refused, match="quantized in part"):
        rewrite.convert(path, tmp_path / "out", profile="portable")


def test_experts_of_a_family_by_source_get_one_global_scale(tmp_path: Path) -> None:
    """Rescaled: that up and down are a product was seen in families that were run only. Seen: `verify` asked for the
    experts, which `convert` had left alone."""
    source, out = tmp_path / "in", tmp_path / "out"
    shutil.copytree(FIXTURES / "modelopt-qwen3_5-moe-nvfp4", source)
    text = json.loads((source / "config.json").read_text())["text_config"]
    named = {"model_type": "glm4v_moe", "architectures": ["Glm4vMoeForConditionalGeneration"]}
    edit_json(source / "config.json", **named, text_config={**text, "model_type": "glm4v_moe_text"})
    for shard in source.glob("*.safetensors"):
        tensors = load_file(shard)
        for name in [name for name in tensors if name.endswith("experts.0.up_proj.weight_scale_2")]:
            tensors[name] *= 2
        save_file(tensors, shard, {"format": "pt"})
    manifest = rewrite.convert(source, out, profile="exact", selection="all")
    assert {change.how for change in manifest.scales if ".experts." in change.name} == {"rescaled"}
    assert rewrite.verify(source, out, tokens=1, device="cpu").ok


@pytest.mark.parametrize(("kind", "known"), [("merged|qkv", True), ("replicated", False)])
def test_a_newer_release_that_fuses_in_another_way(
    kind: str, known: bool, named: Named, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was run in 0.32.0 is said of 0.27.0 and later: not where 0.33.0, which was read, has other slots."""

    def newer(config: dict[str, Any]) -> tuple[Source, ...]:
        return tuple(
            replace(each, layers=tuple(replace(layer, kind=kind) for layer in each.layers))
            if each.version == "0.33.0"
            else each
            for each in find_sources(config)
        )

    monkeypatch.setattr(by_source, "find_sources", newer)
    found = by_rules(named("granite", "GraniteForCausalLM"))
    assert ("0.33.0" in found.detail) != known


def test_a_class_that_no_engine_has(named: Named) -> None:
    assert by_rules(named("made_up", "MadeUpForCausalLM")).kind == "not known"


def blocks(path: Path, rows: int) -> Path:
    """The FP8 layers with a scale for each block of so many rows and 32 columns, as DeepSeek-V3 stores them."""
    tensors: dict[str, Any] = {}
    for shard in sorted(path.glob("*.safetensors")):
        tensors |= load_file(shard)
        shard.unlink()
    (path / "model.safetensors.index.json").unlink()
    for name in [name for name in tensors if name.endswith("_scale")]:
        scale, module = tensors.pop(name), name.rpartition(".")[0]
        if name.endswith(".weight_scale"):
            height, width = tensors[f"{module}.weight"].shape
            grid = torch.full((-(-height // rows), -(-width // 32)), scale.item(), dtype=torch.float32)
            tensors[f"{module}.weight_scale_inv"] = grid
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [rows, 32]}
    edit_json(path / "config.json", quantization_config={**config, "modules_to_not_convert": ["lm_head"]})
    return path


def test_block_scales_are_not_affected_where_parts_end_on_whole_blocks(named: Named) -> None:
    """Decided by the rows, 64 and 128: the family was not run."""
    path = blocks(named("granite", "GraniteForCausalLM"), 32)
    assert by_rules(path).kind == "exact"


def test_torn_blocks_are_refused_by_the_engines_rule(named: Named) -> None:
    assert by_rules(blocks(named("granite", "GraniteForCausalLM"), 96)).kind == "fails to load"


@pytest.mark.parametrize("selection", ["qkvz", "all"])
def test_one_block_is_no_scale_for_the_tensor(selection: rewrite.Selection, tmp_path: Path) -> None:
    """A scale of [1, 1], of experts no larger than a block: a KeyError before, and taken for one scale a matrix."""
    names = {f"mlp.experts.{n}.{p}_proj": (128, 64) for n in (0, 1) for p in ("gate", "up", "down")}
    names |= {f"self_attn.{p}_proj": (128, 64) for p in "qkvo"}
    tensors = {}
    for name, (rows, columns) in names.items():
        tensors[f"model.layers.0.{name}.weight"] = torch.ones(rows, columns).to(torch.float8_e4m3fn)
        tensors[f"model.layers.0.{name}.weight_scale_inv"] = torch.full((1, 1), 0.01 * (1 + len(tensors)))
    (tmp_path / "in").mkdir()
    save_file(tensors, tmp_path / "in" / "model.safetensors", {"format": "pt"})
    stated = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    config = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "quantization_config": stated}
    (tmp_path / "in" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    view = view_model(interpret(open_checkpoint(tmp_path / "in")), selection)
    assert {p.layout for group in view.groups for p in group.parts} <= {"block"}
    (loader,) = find_loaders("vllm@0.32.0")
    assert loader.by_rules(view).kind == "exact"


def test_sglang_loads_no_block_scales_of_a_llama(tmp_path: Path) -> None:
    """Seen in 0.5.23 (`try`): all ``weight_scale_inv`` unused, all block scales unfilled; predicted "exact" before."""
    shutil.copytree(FIXTURES / "llmcompressor-llama", tmp_path / "in")
    found = outcome(blocks(tmp_path / "in", 32), "sglang@0.5.23")
    assert (found.kind, "never loaded" in found.detail) == ("garbled", True)
    assert outcome(tmp_path / "in", "vllm@0.32.0").kind == "exact"


def test_parts_that_are_not_stored_may_not_be_left_out(tmp_path: Path) -> None:
    """Run: vLLM 0.32 refuses a Gemma 4 whose config lists q_proj and k_proj of layers without a v_proj."""
    families.write("gemma4", "modelopt-nvfp4+output-projection", tmp_path / "in")
    assert "may take some parts of" in by_rules(tmp_path / "in").detail
    families.write("gemma4", "modelopt-nvfp4+plain-attention", tmp_path / "whole")
    assert by_rules(tmp_path / "whole").kind == "garbled", "all of self_attn* is listed"
