"""Families that no engine was run with, by the engines' source: what is said, and what is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import rewrite
from rewrite import open_checkpoint
from rewrite.cli.commands import main
from rewrite.loaders.outcome import Outcome
from rewrite.loaders.versions import find_loaders
from rewrite.loaders.views import view_model
from rewrite.quantization.model import interpret
from tests.support import FIXTURES, edit_json, unfolded

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


def test_the_same_layers_the_same_outcome(named: Named) -> None:
    """Granite has the layers of a Llama: what was measured of these holds, and it is said from where."""
    found = outcome(named("granite", "GraniteForCausalLM"), "vllm@0.32.0")
    assert (found.kind, found.partitions) == ("loses precision", outcome_of_llama().partitions)
    assert found.by_source == "vLLM 0.32.0, model_executor/models/granite.py"
    assert outcome_of_llama().by_source == ""


def outcome_of_llama() -> Outcome:
    return outcome(FIXTURES / "llmcompressor-llama", "vllm@0.32.0")


@pytest.mark.parametrize("engine", ["vllm@0.20.0", "sglang@0.5.11", "transformers@5.24.0"])
def test_a_release_that_was_not_read_is_not_known(engine: str, named: Named) -> None:
    assert outcome(named("granite", "GraniteForCausalLM"), engine).kind == "not known"


def test_a_class_that_no_engine_has_is_not_known(named: Named) -> None:
    found = outcome(named("made_up", "MadeUpForCausalLM"), "vllm@0.32.0")
    assert found.kind == "not known" and not found.by_source


def test_a_layer_of_another_kind_is_not_known(named: Named) -> None:
    """OLMo-2 is made of transformers' classes in vLLM 0.32; Falcon stores other names."""
    path = named("falcon", "FalconForCausalLM")
    found = outcome(path, "vllm@0.32.0")
    assert found.kind == "not known" and "was not read" in found.detail


def test_inspect_and_convert(named: Named, tmp_path: Path) -> None:
    """``inspect`` says by what it knows; ``convert`` repairs by name, and OUT is exact by the same source."""
    portable = ("--groups", "all", "--profile", "portable")
    path = named("granite", "GraniteForCausalLM")
    said = unfolded(CliRunner().invoke(main, ["inspect", str(path), "--groups", "all"]).output)
    assert "by the source of vLLM 0.32.0" in said and "not run" in said
    result = CliRunner().invoke(main, ["convert", str(path), str(tmp_path / "out"), *portable])
    assert result.exit_code == 0, result.output
    assert outcome(tmp_path / "out", "vllm@0.32.0").kind == "exact"
    assert rewrite.verify(path, tmp_path / "out", tokens=1, device="cpu").ok
    said = json.loads(CliRunner().invoke(main, ["inspect", str(path), "--groups", "all", "--json"]).output)
    newest = [row for row in said["loaders"] if row["loader"] == "vLLM"][-1]
    assert newest["as_is"]["by_source"] and newest["converted"]["portable"]["by_source"]
    assert newest["converted"]["exact"]["kind"] == "not known", "two schemes"


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
    found = outcome(path, "vllm@0.32.0")
    assert (found.kind, bool(found.by_source)) == ("exact", True)


def test_torn_blocks_are_refused_by_the_engines_rule(named: Named) -> None:
    found = outcome(blocks(named("granite", "GraniteForCausalLM"), 96), "vllm@0.32.0")
    assert found.kind == "fails to load" and found.by_source


def add(path: Path, **tensors: torch.Tensor) -> None:
    save_file(tensors, path / "more.safetensors", {"format": "pt"})
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(tensors, "more.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


PLAIN = torch.zeros(64, 64, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("tensor", "value", "said"),
    [
        ("model.layers.0.self_attn.k_scale", torch.ones(1), "KV cache"),
        ("mtp.fc.weight", PLAIN, "MTP"),
        ("model.layers.99.mlp.up_proj.weight", PLAIN, "MTP"),
        ("model.layers.0.block_sparse_moe.experts.0.w1.weight", PLAIN, "experts of such names"),
    ],
)
def test_what_no_run_tells_of_is_not_known(named: Named, tensor: str, value: torch.Tensor, said: str) -> None:
    """The same checkpoint as above, and one thing more that engines have code for."""
    path = named("granite", "GraniteForCausalLM")
    edit_json(path / "config.json", num_hidden_layers=99)
    assert outcome(path, "vllm@0.32.0").by_source
    add(path, **{tensor: value})
    found = outcome(path, "vllm@0.32.0")
    assert found.kind == "not known" and said in found.detail


def test_nothing_quantized_is_not_known(named: Named, tmp_path: Path) -> None:
    rewrite.convert(named("granite", "GraniteForCausalLM"), tmp_path / "out", profile="dequantized")
    found = outcome(tmp_path / "out", "vllm@0.32.0")
    assert found.kind == "not known" and "nothing quantized" in found.detail


def test_a_fused_layer_that_these_versions_were_not_run_with(tmp_path: Path) -> None:
    """vLLM 0.19.1 fuses latent attention by its source, and no family with it was run there."""
    shutil.copytree(FIXTURES / "llmcompressor-deepseek_v3", tmp_path / "in")
    edit_json(tmp_path / "in" / "config.json", topk_method="noaux_tc")
    found = outcome(tmp_path / "in", "vllm@0.19.1")
    assert found.kind == "not known" and "was not run with" in found.detail and "fused_qkv_a_proj" in found.detail


def test_code_that_was_not_read_is_not_known(named: Named) -> None:
    """MiMo's q, k and v are put together by a function of its own."""
    found = outcome(blocks(named("mimo_v2_flash", "MiMoV2FlashForCausalLM"), 32), "vllm@0.32.0")
    assert found.kind == "not known" and "MiMoV2Model.load_weights" in found.detail


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
    assert {p.layout for group in view.groups for p in group.partitions} <= {"block"}
    (loader,) = find_loaders("vllm@0.32.0")
    assert loader.by_rules(view).kind == "exact"
