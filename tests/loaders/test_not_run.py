"""What no fact is about is not known: a model family, and a quantization, that no engine was run with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

import rewrite
from rewrite.cli.commands import main
from rewrite.loaders.outcome import Outcome
from rewrite.loaders.versions import RUNS, Checkpoints
from rewrite.quantization import architectures
from tests.support import FIXTURES, edit_json, unfolded

FAMILY, LOST = "made_up", "loses precision"


@pytest.fixture
def new_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of a family whose fused layers are known, as one more entry says them, and nothing else."""
    llama = next(entry for entry in architectures.ARCHITECTURES if "llama" in entry.model_types)
    entry = architectures.Architecture((FAMILY,), llama.fused_layers)
    monkeypatch.setattr(architectures, "ARCHITECTURES", (*architectures.ARCHITECTURES, entry))
    shutil.copytree(FIXTURES / "llmcompressor-llama", tmp_path / "in")
    edit_json(tmp_path / "in" / "config.json", model_type=FAMILY, architectures=["MadeUpForCausalLM"])
    return tmp_path / "in"


def run(*words: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(main, [*map(str, words)])
    return result.exit_code, unfolded(result.output)


def test_an_entry_of_architectures_claims_nothing_about_engines(new_family: Path) -> None:
    """The fused layers are found, and converted; of engines nothing is said, as it is and with every profile."""
    found = rewrite.inspect_checkpoint(new_family, selection="all")
    assert found.groups
    assert set(found.rows[0].converted) >= {"exact", "portable", "bf16", "dequantized"}
    outcomes = [outcome for row in found.rows for outcome in row.outcomes.values()]
    assert {outcome.kind for outcome in outcomes} == {"not known"}
    assert all(repr(FAMILY) in outcome.detail for outcome in outcomes)
    kernels = [names for row in found.rows for used in row.kernels.values() for names in used.values()]
    assert set(kernels) == {("not known",), ()}, "() of layers that are not FP8"


def test_inspect_says_so(new_family: Path) -> None:
    code, said = run("inspect", new_family, "--groups", "all", "--all-engines", "-v", "--fail-on", "unknown")
    assert code == 1
    assert "not known" in said
    assert not any(word in said for word in ("exact in", "garbled", "loses precision", "fails to load", "CUTLASS"))
    assert "Repaired for" not in said


@pytest.mark.parametrize("profile", ["exact", "dynamic", "bf16"])
def test_convert_and_verify_say_so(new_family: Path, tmp_path: Path, profile: str) -> None:
    """The bytes are verified; the check of what engines make of them is left out, and named."""
    code, said = run("convert", new_family, tmp_path / "out", "--profile", profile, "--groups", "all")
    assert code == 0
    assert "load OUT" not in said
    code, said = run("verify", new_family, tmp_path / "out", "--tokens", "1", "--device", "cpu")
    assert code == 0
    assert "Not checked: engines" in said
    result = rewrite.verify(new_family, tmp_path / "out", tokens=1, device="cpu")
    assert result.ok and "engines" in result.not_checked
    assert {outcome.kind for row in result.loaders for outcome in row.outcomes.values()} == {"not known"}
    assert not any(row.change or row.does_not_run for row in result.loaders)


def test_engines_that_are_asked_for_do_not_fail_what_is_not_known(new_family: Path, tmp_path: Path) -> None:
    run("convert", new_family, tmp_path / "out", "--groups", "all")
    code, said = run("verify", new_family, tmp_path / "out", "--tokens", "1", "--device", "cpu", "--for", "vllm")
    assert code == 0
    assert "not known" in said


def test_what_no_config_states_was_not_run(tmp_path: Path) -> None:
    """FP8 layers beside a config without a quantization: no producer writes that, and engines cannot know it."""
    shutil.copytree(FIXTURES / "modelopt-llama", tmp_path / "in")
    (tmp_path / "in" / "hf_quant_config.json").unlink(missing_ok=True)
    path = tmp_path / "in" / "config.json"
    config = json.loads(path.read_text())
    config.pop("quantization_config", None)
    path.write_text(json.dumps(config))
    rows = rewrite.inspect_checkpoint(tmp_path / "in", selection="all").rows
    assert {row.as_is.kind for row in rows} == {"not known"}
    assert "does not state" in rows[0].as_is.detail


def test_every_fact_of_a_whole_family_is_no_promise() -> None:
    """A run may say at once that a family or form fails to load, and never that it is served well."""
    at_once: set[Outcome] = {fact.outcome for fact in RUNS if fact.outcome is not None}
    assert {outcome.kind for outcome in at_once} == {"fails to load"}
    for fact in RUNS:
        assert isinstance(fact.applies, Checkpoints) and fact.applies.families, fact
        assert fact.applies.forms or fact.outcome is not None, fact  # a family that fails does so in every form


@pytest.mark.parametrize(
    ("key", "value", "known"),
    [
        ("transform_config", {"config_groups": {"u": {"type": "hadamard", "apply": []}}}, False),
        ("transform_config", {}, True),
        ("sparsity_config", {"format": "sparse-24-bitmask"}, False),
        ("sparsity_config", {"format": "dense", "sparsity_structure": "2:4"}, True),
        ("sparsity_config", {}, True),
    ],
)
def test_keys_that_no_engine_was_run_with(key: str, value: object, known: bool, tmp_path: Path) -> None:
    """Rotations that engines compute: vLLM 0.32.0 reads them, SGLang 0.5.23 does not."""
    shutil.copytree(FIXTURES / "llmcompressor-llama", tmp_path / "in")
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    edit_json(tmp_path / "in" / "config.json", quantization_config={**config["quantization_config"], key: value})
    rows = rewrite.inspect_checkpoint(tmp_path / "in", selection="all").rows
    assert {row.as_is.kind == "not known" for row in rows if row.engine.name != "transformers"} == {not known}


@pytest.mark.parametrize(
    ("place", "kinds"), [("text_config", (LOST, "garbled", "exact")), ("old key", (LOST, LOST, "garbled"))]
)
def test_a_config_that_some_engines_do_not_find(place: str, kinds: tuple[str, ...], tmp_path: Path) -> None:
    """vLLM 0.32.0, SGLang 0.5.23 and transformers 5.24.0 were run with each."""
    name, change = ("qwen3_5-vl", nested) if place == "text_config" else ("llama", renamed)
    shutil.copytree(FIXTURES / f"llmcompressor-{name}", tmp_path / "in")
    change(tmp_path / "in" / "config.json")
    rows = rewrite.inspect_checkpoint(tmp_path / "in", selection="all").rows
    newest = {row.engine.name: row.as_is.kind for row in rows}  # the last row of each engine
    assert (newest["vLLM"], newest["SGLang"], newest["transformers"]) == kinds


def nested(path: Path) -> None:
    config = json.loads(path.read_text())
    text = {**config["text_config"], "quantization_config": config["quantization_config"]}
    edit_json(path, quantization_config=None, text_config=text)


def renamed(path: Path) -> None:
    edit_json(path, quantization_config=None, compression_config=json.loads(path.read_text())["quantization_config"])
