"""Scales of an FP8 KV cache, kept or dropped by choice: with every profile, in every dialect."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import rewrite
from rewrite.quantization.dialects import dialect_of
from rewrite.quantization.kv_cache import kv_cache_scales
from tests.support import FIXTURES, KV_SCALES, edit_json, raw_tensors, tree

SOURCE = FIXTURES / "modelopt-llama"


def problems(source: Path, out: Path) -> list[str]:
    found = rewrite.verify(source, out, device="cpu", tokens=4)
    return [problem for check in found.checks for problem in check.problems]


def states(directory: Path) -> list[Any]:
    """What config.json and hf_quant_config.json say of the KV cache."""
    config = json.loads((directory / "config.json").read_text()).get("quantization_config", {})
    found = [config.get("kv_cache_scheme"), config.get("kv_cache_quant_algo")]
    if (directory / "hf_quant_config.json").exists():
        found.append(
            json.loads((directory / "hf_quant_config.json").read_text())["quantization"]["kv_cache_quant_algo"]
        )
    return found


@pytest.mark.parametrize("selection", rewrite.SELECTIONS)
@pytest.mark.parametrize("profile", rewrite.PROFILES)
def test_they_go_and_nothing_else(profile: str, selection: rewrite.Selection, tmp_path: Path) -> None:
    """Against the same conversion with the scales; also where the profile has nothing else to do."""
    manifest = rewrite.convert(SOURCE, tmp_path / "out", profile=profile, selection=selection, kv_scales="drop")
    kept = rewrite.convert(SOURCE, tmp_path / "kept", profile=profile, selection=selection)
    after, with_scales = raw_tensors(tmp_path / "out"), raw_tensors(tmp_path / "kept")
    assert with_scales.keys() - after.keys() == set(kv_cache_scales(with_scales))
    assert all(with_scales[name] == tensor for name, tensor in after.items())
    assert set(manifest.dropped) - set(kept.dropped) == (KV_SCALES.keys() - set(kept.dropped))
    assert manifest.kv_scales == "dropped" and not any(states(tmp_path / "out"))
    assert kept.kv_scales == ("dropped" if profile == "dequantized" else "kept")
    if profile != "dequantized":
        assert any(states(tmp_path / "kept"))
    assert problems(SOURCE, tmp_path / "out") == [] == problems(SOURCE, tmp_path / "kept")
    again = rewrite.convert(
        tmp_path / "out", tmp_path / "again", profile=profile, selection=selection, kv_scales="drop"
    )
    assert not again.changed and tree(tmp_path / "out") == tree(tmp_path / "again")


def test_without_such_scales_nothing_is_different(tmp_path: Path) -> None:
    """The choice is one about scales that are there."""
    source = FIXTURES / "llmcompressor-llama"
    rewrite.convert(source, tmp_path / "kept", selection="all")
    manifest = rewrite.convert(source, tmp_path / "out", selection="all", kv_scales="drop")
    assert manifest.kv_scales == "kept"
    assert tree(tmp_path / "out") == tree(tmp_path / "kept")


def test_mixed_precision(copy_of: Callable[[str], Path], tmp_path: Path) -> None:
    """ModelOpt's other dialect says it in the same words."""
    source = copy_of("modelopt-qwen3_5-mixed")
    config = json.loads((source / "config.json").read_text())["quantization_config"]
    edit_json(source / "config.json", quantization_config={**config, "kv_cache_scheme": {"num_bits": 8}})
    path = source / "model.safetensors"
    tensors = load_file(path)
    scale = next(tensor for name, tensor in tensors.items() if name.endswith(".input_scale"))
    save_file(
        {**tensors, "model.language_model.layers.3.self_attn.k_proj.k_scale": scale.clone()}, path, {"format": "pt"}
    )
    manifest = rewrite.convert(source, tmp_path / "out", profile="bf16", kv_scales="drop")
    assert "model.language_model.layers.3.self_attn.k_proj.k_scale" in manifest.dropped
    assert not any(states(tmp_path / "out"))
    assert problems(source, tmp_path / "out") == []


def test_modelopts_nvfp4_stays_its_dialect() -> None:
    """Both files that state it follow."""
    dialect = dialect_of({"quant_method": "modelopt", "quant_algo": "NVFP4", "kv_cache_scheme": {"num_bits": 8}})
    without = dialect.without_kv_cache()
    assert without.name == dialect.name
    assert without.value == {**dialect.value, "kv_cache_scheme": None}


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("model.layers.0.self_attn.k_scale", True),
        ("model.layers.0.self_attn.v_proj.v_scale", True),
        ("model.layers.0.self_attn.k_proj.output_scale", True),
        ("model.layers.0.self_attn.q_scale", True),
        ("model.layers.0.self_attn.kv_scale", True),
        ("model.layers.0.self_attn.k_proj.weight_scale", False),
        ("model.layers.0.self_attn.k_proj.input_scale", False),
        ("model.layers.0.self_attn.o_proj.output_scale", False),
        ("model.layers.0.mlp.k_scale", False),
        ("model.logit_scale", False),
    ],
)
def test_names(name: str, is_one: bool) -> None:
    """By any producer's spelling; the verification has its own list."""
    from rewrite.verification.expected import is_kv_scale

    assert list(kv_cache_scales([name])) == [name] * is_one
    assert is_kv_scale(name) == is_one


def test_verify_does_not_take_a_loss_for_a_choice(tmp_path: Path) -> None:
    """A manifest that says "kept" makes missing scales a fault; one that says "dropped", those that are left."""
    for name, choice, said in (("kept", "keep", "dropped"), ("out", "drop", "kept")):
        rewrite.convert(SOURCE, tmp_path / name, selection="all", kv_scales=choice)  # type: ignore[arg-type]
        edit_json(tmp_path / name / "rewrite_manifest.json", kv_scales=said)
        assert len(problems(SOURCE, tmp_path / name)) >= len(KV_SCALES)


@pytest.mark.parametrize(("choice", "scheme"), [("drop", {"num_bits": 8, "type": "float"}), ("keep", {})])
def test_verify_reads_what_the_config_says_of_the_cache(choice: Any, scheme: dict[str, Any], tmp_path: Path) -> None:
    """A scheme that stayed without its scales, or that was lost."""
    rewrite.convert(SOURCE, tmp_path / "out", selection="all", kv_scales=choice)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    edit_json(tmp_path / "out" / "config.json", quantization_config={**config, "kv_cache_scheme": scheme or None})
    assert any("states a quantized KV cache" in problem for problem in problems(SOURCE, tmp_path / "out"))


def test_an_unknown_choice(tmp_path: Path) -> None:
    """From Python; the command line has its own check."""
    with pytest.raises(rewrite.UsageError, match="keep or drop"):
        rewrite.convert(SOURCE, tmp_path / "out", kv_scales="maybe")  # type: ignore[arg-type]
