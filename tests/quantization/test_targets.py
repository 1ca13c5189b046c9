"""Targets for some layers of a kind: no other quantized layer matches them, and no other pattern changes its turn."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import pytest

import rewrite
from rewrite.quantization.dialects.compressed_tensors import CompressedTensors
from rewrite.quantization.patterns import Patterns
from rewrite.quantization.scheme import Layers
from rewrite.quantization.targets import fitting_target
from rewrite.verification.configs import CompressedTensorsSchemes
from tests.support import FIXTURES, QKVZ
from tests.zoo.rebuild import rebuild

LAYERS = [f"model.layers.{i}.linear_attn.in_proj_{part}" for i in (0, 1, 10, 11) for part in ("qkv", "z")]
MTP = ["mtp.layers.0.linear_attn.in_proj_qkv", "mtp.layers.0.linear_attn.in_proj_z"]


@pytest.mark.parametrize(
    ("wanted", "strays", "begin"),
    [
        (LAYERS, [], "re:.*linear"),
        (LAYERS, MTP, r"re:(?!mtp\.).*linear"),
        (LAYERS[2:4], LAYERS[:2] + LAYERS[4:], r"re:.*\blayers\.(1)\."),
        (LAYERS[:6], LAYERS[6:] + MTP, r"re:(?!mtp\.).*\blayers\.(0|1|10)\."),
        (LAYERS[:1], LAYERS[1:2], None),
    ],
)
def test_the_first_pattern_without_strays(wanted: list[str], strays: list[str], begin: str | None) -> None:
    """It also matches the name of the fused layer, which engines look up first. The parts of one layer cannot be told
    apart: no pattern will do."""
    patterns = Patterns()
    found = fitting_target(QKVZ, wanted, lambda target: [name for name in strays if patterns.matches(target, name)])
    assert (found is None) == (begin is None)
    if found is not None and begin is not None:
        assert found.startswith(begin)
        assert all(patterns.matches(found, name) for name in wanted)
        assert patterns.matches(found, wanted[0].rpartition(".")[0] + ".in_proj_qkvz")


def test_patterns_keep_their_turn() -> None:
    """compressed-tensors tries patterns in alphabetical order, and a narrowed one begins with a parenthesis."""
    base = json.loads((FIXTURES / "llmcompressor-qwen3_5-text" / "config.json").read_text())["quantization_config"]
    first, second = (deepcopy(base["config_groups"]["group_0"]) for _ in range(2))
    first["targets"], second["targets"] = [r"re:.*(up|down)_proj$"], ["re:.*_proj.*", "re:.*in_proj.*"]
    first["input_activations"]["dynamic"] = True
    value = {**base, "config_groups": {"a": first, "b": second}, "ignore": []}
    others = ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj", "model.layers.0.linear_attn.in_proj_a"]
    names = frozenset([*LAYERS[:2], *others])
    dialect = CompressedTensors(value)
    assert dialect.scheme(others[0]) != dialect.scheme(others[1])
    new = dialect.with_channel_scales({QKVZ: LAYERS[:2]}, Layers(names, (), names))
    stock, old = CompressedTensorsSchemes(new.value), CompressedTensorsSchemes(value)
    assert {found.strategy for name in LAYERS[:2] if (found := stock.of_module(name))} == {"channel"}
    for name in others:
        assert stock.stated(name) == old.stated(name), name


@pytest.mark.parametrize("profile", ["exact", "dynamic", "bf16"])
def test_quantized_mtp_layers_stay(profile: str, tmp_path: Path) -> None:
    """What ``model_free_ptq`` writes of every Qwen3.5."""
    source = rebuild("mfree-tensor-qwen3_5-vl-mtp", tmp_path / "in")
    assert rewrite.convert(source, tmp_path / "out", profile=profile, selection="all").changed
    assert rewrite.verify(source, tmp_path / "out", device="cpu", tokens=4).ok
