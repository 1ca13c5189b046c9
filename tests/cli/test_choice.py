"""`convert` without --profile: what `inspect` names, for the engines of --for, and what it says before it writes."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import rewrite
from rewrite.cli.commands import main
from tests.support import FIXTURES, edit_json, replace_tensor, unfolded

VL = FIXTURES / "llmcompressor-qwen3_5-vl"
NAMES = sorted(path.parent.name for path in FIXTURES.glob("*/config.json"))


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.mark.parametrize("name", NAMES)
def test_inspect_has_nothing_left_to_say_but_what_convert_said(name: str, tmp_path: Path) -> None:
    """OUT is served exactly by the engines of --for, or `convert` named what is left before it wrote. What it rounds
    itself it says too: nobody can see that in OUT."""
    made = run("convert", FIXTURES / name, tmp_path / "out")
    assert made.exit_code == 0
    after = run("inspect", tmp_path / "out")
    assert after.exit_code == 0 or "note: after the conversion" in unfolded(made.stderr), made.stderr + after.stdout


@pytest.mark.parametrize(
    ("words", "profile", "served"),
    [
        ((), "exact", ["vLLM 0.27.0+", "SGLang 0.5.23+"]),
        (("--for", "sglang@0.5.14"), "dynamic", ["SGLang 0.5.12 to 0.5.14"]),
        (("--for", "vllm@0.32.0", "--platform", "mi300x"), "dynamic", ["vLLM 0.27.0+"]),
    ],
)
def test_the_manifest_says_for_whom(words: tuple[str, ...], profile: str, served: list[str], tmp_path: Path) -> None:
    result = run("convert", VL, tmp_path / "out", *words)
    assert f"note: profile {profile}, chosen for {' and '.join(served)} on " in unfolded(result.stderr)
    manifest = json.loads((tmp_path / "out" / "rewrite_manifest.json").read_text())
    platform = "gfx942" if words[2:] else "cuda"
    assert manifest["profile"] == profile
    assert manifest["chosen"] == {"by": "rewrite", "for": served, "platform": platform}
    assert rewrite.Manifest.from_json(manifest).to_json() == manifest


def test_a_profile_that_is_named_is_taken(tmp_path: Path) -> None:
    """And nobody else is said to have chosen it."""
    result = run("convert", VL, tmp_path / "out", "--profile", "portable")
    manifest = json.loads((tmp_path / "out" / "rewrite_manifest.json").read_text())
    assert (manifest["profile"], "chosen" in manifest) == ("portable", False)
    assert "least change" not in result.stderr


def test_what_no_profile_repairs_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """It says what to do instead."""
    result = run("convert", FIXTURES / "llmcompressor-qwen3_5-text", tmp_path / "out", "--for", "vllm@0.19.1")
    assert result.exit_code == 3
    assert "No profile repairs this" in result.stderr and "use vLLM 0.27.0 or newer" in unfolded(result.stderr)
    assert not list(tmp_path.iterdir())
    shown = run("inspect", FIXTURES / "llmcompressor-qwen3_5-text", "--for", "vllm@0.19.1").stdout
    assert "No profile repairs this: use vLLM 0.27.0 or newer" in unfolded(shown)


def test_a_fault_that_stays_is_said(copy: Path, tmp_path: Path) -> None:
    replace_tensor(copy, "model.layers.2.self_attn.q_proj.input_scale", struct.pack("<f", 1e9)[2:])
    result = run("convert", copy, tmp_path / "out")
    assert "note: 1 fault in the checkpoint itself, which no profile repairs" in unfolded(result.stderr)
    assert run("inspect", tmp_path / "out").exit_code == 1


def test_a_fault_that_goes_is_not_said(copy: Path, tmp_path: Path) -> None:
    """A scale of activations that is NaN: the profile with the least change is the one that leaves it out."""
    replace_tensor(copy, "model.layers.2.self_attn.q_proj.input_scale", b"\xc0\x7f")
    result = run("convert", copy, tmp_path / "out")
    assert "profile portable, chosen for" in unfolded(result.stderr) and "fault" not in result.stderr
    assert run("inspect", tmp_path / "out").exit_code == 0


def test_what_is_not_known_has_a_line_of_its_own(copy: Path, tmp_path: Path) -> None:
    """And is no reason to say that all is well, nor that anything is wrong."""
    words = ("--for", "vllm@0.32.0", "--for", "sglang@0.5.22")
    source = FIXTURES / "llmcompressor-qwen3_5-nvfp4"
    assert "Not known: what SGLang 0.5.18 to 0.5.22 makes of it" in unfolded(run("inspect", source, *words).stdout)
    made = run("convert", source, tmp_path / "out", *words)
    assert "note: not known: what SGLang 0.5.18 to 0.5.22 makes of IN, and of OUT" in unfolded(made.stderr)
    alone = run("inspect", source, "--for", "sglang@0.5.22")
    assert (alone.exit_code, "SGLang 0.5.18 to 0.5.22  not known" in alone.stdout) == (0, True)
    assert alone.stdout.endswith(f"\n  rewrite try {source} --engine PYTHON\n")


def test_what_is_not_known_for_a_fault_is_not_copied_as_if_it_were_well(copy: Path, tmp_path: Path) -> None:
    """A layer that would be repaired has a scale that is NaN, so that engines are not known to need anything."""
    replace_tensor(copy, "model.layers.0.linear_attn.in_proj_qkv.weight_scale", b"\xc0\x7f")
    result = run("convert", copy, tmp_path / "out")
    assert (result.exit_code, "found:    nan" in result.stderr) == (3, True)
    assert not (tmp_path / "out").exists()


def test_verify_is_about_those_whom_the_conversion_was_for(tmp_path: Path) -> None:
    """Unless somebody names others."""
    run("convert", VL, tmp_path / "out", "--for", "sglang@0.5.14", "--platform", "h100")
    found = run("verify", VL, tmp_path / "out")
    assert "note: judged for SGLang 0.5.12 to 0.5.14 on sm90, as the manifest of OUT says" in unfolded(found.stderr)
    assert "Engines: SGLang 0.5.12 to 0.5.14 serves its in_proj_qkvz layers exactly." in unfolded(found.stdout)
    named = run("verify", VL, tmp_path / "out", "--for", "vllm")
    assert "judged for" not in named.stderr and "Engines: vLLM 0.17.0+ serves" in unfolded(named.stdout)


@pytest.mark.parametrize("engine", ["Other 1.0+", "vLLM", "vLLM 9.9.9"])
def test_a_manifest_that_names_nobody_who_is_known_gets_the_default(engine: str, tmp_path: Path) -> None:
    run("convert", VL, tmp_path / "out", "--for", "sglang@0.5.14")
    edit_json(tmp_path / "out" / "rewrite_manifest.json", chosen={"for": [engine], "platform": "cuda"})
    assert "Engines: vLLM 0.27.0+, SGLang 0.5.23+" in unfolded(run("verify", VL, tmp_path / "out").stdout)


def test_where_no_layer_is_judged_no_engine_serves_it_exactly(tmp_path: Path) -> None:
    """Its other fused layers lose precision."""
    source, out = FIXTURES / "llmcompressor-llama", tmp_path / "OUT"
    assert run("convert", source, out, "--groups", "qkvz").exit_code == 0
    found = unfolded(run("verify", source, out).stdout)
    assert "is verified in part." in found and "Engines: no in_proj_qkvz layer, so nothing was judged." in found


def test_plan_chooses_as_convert_does(tmp_path: Path) -> None:
    result = run("plan", VL, tmp_path / "out", "--output", tmp_path / "plan.json", "--for", "sglang@0.5.14")
    assert "profile dynamic, chosen for SGLang 0.5.12 to 0.5.14" in unfolded(result.stderr)
    loaded = rewrite.Conversion.load(tmp_path / "plan.json")
    assert loaded.plan.manifest.chosen is not None
    assert loaded.plan.manifest.profile == "dynamic"


def test_python_chooses_where_it_is_told_to(tmp_path: Path) -> None:
    """`exact` stays the default of the library."""
    engines = rewrite.find_loaders("sglang@0.5.14")
    plan = rewrite.make_plan(rewrite.open_checkpoint(VL), None, engines=engines)
    assert plan.manifest.profile == "dynamic"
    assert rewrite.make_plan(rewrite.open_checkpoint(VL)).manifest.chosen is None


def test_an_unknown_family_is_refused_as_before(copy: Path, tmp_path: Path) -> None:
    edit_json(copy / "config.json", model_type="qwen9")
    result = run("convert", copy, tmp_path / "out")
    assert (result.exit_code, "unknown architecture" in result.stderr) == (3, True)
