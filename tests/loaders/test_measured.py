"""Families of the atlas that engines were run with: what is claimed of them is what was seen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from safetensors.torch import save_file

from rewrite import open_checkpoint
from rewrite.loaders import measured
from rewrite.loaders.outcome import Outcome
from rewrite.loaders.versions import find_loaders
from rewrite.loaders.views import view_model
from rewrite.quantization.atlas import architectures, releases
from rewrite.quantization.model import interpret
from tests.support import FIXTURES, edit_json

RECORD = json.loads(measured.FILE.read_text())
#: Quick to make; of the last one the rules and SGLang disagree.
SAMPLED = [(family, form) for family in ("qwen3", "gemma3_text") for form in families.FORMS if form != "mxfp4"]
SAMPLED += [("qwen3_moe", "fp8-tensor"), ("qwen3_moe", "modelopt-nvfp4"), ("gpt_oss", "mxfp4")]
SAMPLED += [("mistral3", "ct-channel"), ("llama4", "ct-channel"), ("llama4", "ct-channel+plain-attention")]
SAMPLED += [("glm4_moe", "ct-nvfp4"), ("qwen3_5", "modelopt-mixed+listed-head"), ("gemma4", "modelopt-nvfp4+moe-names")]


def predicted(folder: Path, release: str) -> Outcome:
    (loader,) = find_loaders(release.lower().replace(" ", "@"))
    return loader.predict(view_model(interpret(open_checkpoint(folder)), "all"))


def test_the_record_is_of_releases_and_classes_that_were_read() -> None:
    for release, found in RECORD["engines"].items():
        assert release in releases()
        assert set(found) <= architectures(release)
        for cell in (cell for cells in found.values() for cell in cells):
            assert RECORD["modules"][cell["modules"]]
            assert cell["seen"] in ("exact", "loses precision", "garbled", "fails to load")
            assert cell.get("said") != cell["seen"]


@pytest.mark.parametrize(("family", "form"), SAMPLED)
def test_what_is_claimed_is_what_was_seen(family: str, form: str, tmp_path: Path) -> None:
    """Made again by the same script: the signature is in the record, and the rules say what the engine did."""
    families.write(family, form, tmp_path / "in")
    runs = list(measured.measured(interpret(open_checkpoint(tmp_path / "in"))))
    assert runs, "scripts/evidence.sh try_families --record"
    for run in runs:
        found = predicted(tmp_path / "in", f"{run.engine} {run.version}")
        assert found.kind == (run.seen if run.agrees else "not known")


@pytest.mark.parametrize(
    ("family", "form", "kind"),
    [
        ("mistral3", "fp8-tensor", "garbled"),
        ("mistral3", "fp8-tensor+towers", "loses precision"),
        ("gemma3", "ct-tensor+newer-names", "fails to load"),
        ("kimi_k25", "ct-int4", "fails to load"),
        ("kimi_k25", "ct-int4+experts-only", "fails to load"),
        ("kimi_k25", "ct-int4+experts-by-pattern", "exact"),
    ],
)
def test_sglang_has_other_names_for_what_a_config_leaves_plain(
    family: str, form: str, kind: str, tmp_path: Path
) -> None:
    """The record knows these apart by the rules only: its signature has no ``ignore``."""
    families.write(family, form, tmp_path / "in")
    assert predicted(tmp_path / "in", "SGLang 0.5.23").kind == kind


@pytest.mark.parametrize("release", ["vLLM 0.32.0", "SGLang 0.5.23"])
@pytest.mark.parametrize("stated", ["deepseek_ref", "step3p7"])
def test_a_model_that_an_engine_does_not_know(stated: str, release: str, tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "fp8-qwen3_5-vl", tmp_path / "in")
    name = "Step3p7FlashForCausalLM" if stated == "step3p7" else "DeepseekV4ForCausalLM"
    edit_json(tmp_path / "in" / "config.json", model_type=stated, architectures=[name])
    assert predicted(tmp_path / "in", release).kind == "fails to load"


@pytest.mark.parametrize("release", ["vLLM 0.32.0", "SGLang 0.5.23"])
def test_experts_that_are_not_as_wide_as_the_config_says(release: str, tmp_path: Path) -> None:
    families.write("gpt_oss", "mxfp4+narrow-experts", tmp_path / "in")
    assert predicted(tmp_path / "in", release).kind == "garbled"


def add(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "more.safetensors", {"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(tensors, "more.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture
def granite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, Any]]:
    """A checkpoint by source, and a record with one run of it, which agrees."""
    shutil.copytree(FIXTURES / "llmcompressor-llama", tmp_path / "in")
    edit_json(tmp_path / "in" / "config.json", model_type="granite", architectures=["GraniteForCausalLM"])
    architecture, scheme, modules = measured.signature(interpret(open_checkpoint(tmp_path / "in")))
    cell = {"scheme": scheme, "modules": 0, "seen": "loses precision"}
    record = {"modules": [sorted(modules)], "engines": {"vLLM 0.32.0": {architecture: [cell]}}}
    monkeypatch.setattr(measured, "_record", lambda: record)
    return tmp_path / "in", cell


def test_a_run_makes_it_known(granite: tuple[Path, dict[str, Any]]) -> None:
    found = predicted(granite[0], "vLLM 0.32.0")
    assert found.kind == "loses precision"
    assert predicted(granite[0], "SGLang 0.5.23").kind == "not known", "which has no run"


def test_the_engine_is_right_and_its_source_is_not(granite: tuple[Path, dict[str, Any]]) -> None:
    granite[1].update(seen="fails to load", said="loses precision", why="KeyError: 'x'")
    found = predicted(granite[0], "vLLM 0.32.0")
    assert found.kind == "not known"
    assert "vLLM 0.32.0 was run with such a one: fails to load; KeyError: 'x'" in found.detail


def test_other_modules_were_not_run(granite: tuple[Path, dict[str, Any]]) -> None:
    measured._record()["modules"][0].remove(MLP)
    assert predicted(granite[0], "vLLM 0.32.0").kind == "not known"


#: The parents of the fixture.
MLP = "model.layers.0.mlp: down_proj gate_proj up_proj"
ATTENTION = "model.layers.0.self_attn: k_proj o_proj q_proj v_proj"


def in_parts(cell: dict[str, Any], *runs: list[str]) -> None:
    """A record of several runs."""
    record = measured._record()
    record["modules"] = [*runs]
    record["engines"]["vLLM 0.32.0"]["GraniteForCausalLM"] = [{**cell, "modules": n} for n in range(len(runs))]


def test_its_parts_were_run_one_by_one(granite: tuple[Path, dict[str, Any]]) -> None:
    plain = [each.replace(": ", ": (") + ")" for each in (MLP, ATTENTION)]
    in_parts(granite[1], [MLP, plain[1]], [plain[0], ATTENTION])
    assert predicted(granite[0], "vLLM 0.32.0").kind == "loses precision"
    in_parts(granite[1], [MLP, plain[1]])
    assert predicted(granite[0], "vLLM 0.32.0").kind == "not known", "attention was plain"


def test_a_part_of_it_that_disagrees_counts(granite: tuple[Path, dict[str, Any]]) -> None:
    plain = [each.replace(": ", ": (") + ")" for each in (MLP, ATTENTION)]
    in_parts(granite[1], [MLP, plain[1]], [plain[0], ATTENTION])
    cells = measured._record()["engines"]["vLLM 0.32.0"]["GraniteForCausalLM"]
    measured._record()["modules"].append([MLP])
    cells.append({**granite[1], "modules": 2, "said": "exact []", "why": "KeyError: 'y'"})
    found = predicted(granite[0], "vLLM 0.32.0")
    assert found.kind == "not known"
    assert "KeyError: 'y'" in found.detail


def test_layers_that_are_left_plain_were_run(granite: tuple[Path, dict[str, Any]]) -> None:
    add(granite[0], {"model.layers.2.mlp.down_proj.weight": torch.zeros(16, 16)})
    edit_json(granite[0] / "config.json", num_hidden_layers=3)
    model = interpret(open_checkpoint(granite[0]))
    assert not list(measured.measured(model)), "no run left any of it plain"
    in_parts(granite[1], [MLP, ATTENTION], ["model.layers.0.mlp: (down_proj)", ATTENTION])
    assert [run.agrees for run in measured.measured(model)] == [True]


@pytest.mark.parametrize(
    ("tensor", "value"),
    [
        ("model.layers.0.self_attn.k_scale", torch.ones(1)),
        ("model.layers.2.eh_proj.weight", torch.zeros(64, 64)),
        ("model.layers.0.mlp.experts.gate_up_proj", torch.zeros(2, 64, 64).to(torch.float8_e4m3fn)),
    ],
)
def test_what_else_engines_have_code_for_was_not_run(
    granite: tuple[Path, dict[str, Any]], tensor: str, value: torch.Tensor
) -> None:
    """Scales of a KV cache, MTP layers, stacked FP8 experts: the same modules, and another checkpoint."""
    add(granite[0], {tensor: value})
    assert predicted(granite[0], "vLLM 0.32.0").kind == "not known"


def test_a_plain_head_that_the_config_quantizes_was_not_run(tmp_path: Path) -> None:
    families.write("qwen3", "modelopt-fp8", tmp_path / "in")
    assert list(measured.measured(interpret(open_checkpoint(tmp_path / "in"))))
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    config["quantization_config"]["ignore"].remove("lm_head")
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    assert not list(measured.measured(interpret(open_checkpoint(tmp_path / "in"))))
