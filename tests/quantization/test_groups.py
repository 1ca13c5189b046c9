"""Finding fused groups: names, partitions, and refusals when the config does not fit the weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from rewrite import open_checkpoint
from rewrite.errors import CheckpointError, ConfigError
from rewrite.quantization.architectures import ARCHITECTURES
from rewrite.quantization.groups import find_groups, find_lookalikes
from tests.support import FIXTURES, QKVZ, edit_json


def test_groups_of_every_fixture(real: Path) -> None:
    """One for each Gated DeltaNet layer, q k v of qkv and z of z, in layer order."""
    groups = find_groups(open_checkpoint(real)).select("qkvz")
    prefix = "model.language_model.layers" if "vl" in real.name else "model.layers"
    layers = 3 if "vl" in real.name else 2
    assert [g.name for g in groups] == [f"{prefix}.{i}.linear_attn.in_proj_qkvz" for i in range(layers)]
    key, value = (128, 256) if "vl" in real.name else (64, 128)
    for group in groups:
        qkv, z = group.modules
        assert [(p.name, p.start, p.stop) for p in qkv.partitions] == [
            ("q", 0, key),
            ("k", key, 2 * key),
            ("v", 2 * key, 2 * key + value),
        ]
        assert [(p.name, p.start, p.stop) for p in z.partitions] == [("z", 0, value)]
        assert qkv.fp8 and z.fp8 and qkv.scale and z.input_scale


def test_modelopt_names(copy_of: Callable[[str], Path]) -> None:
    """Groups are found by name, whatever the dialect."""
    assert len(find_groups(open_checkpoint(copy_of("modelopt-qwen3_5-moe"))).select("qkvz")) == 2


def test_the_target_matches_parts_and_fused_name_only() -> None:
    """One regex for the stored names and the fused one: loaders look for the latter first (LOADERS: vLLM 0.19.1)."""
    layer = ARCHITECTURES[0].fused_layers[0]
    assert layer.target == QKVZ
    pattern = re.compile(layer.target.removeprefix("re:"))
    for name in ("in_proj_qkv", "in_proj_z", "in_proj_qkvz"):
        assert pattern.match(f"model.language_model.layers.3.linear_attn.{name}")
    for name in ("in_proj_ba", "in_proj_b", "in_proj_qkv.weight", "out_proj", "in_proj_zz"):
        assert not pattern.match(f"model.layers.3.linear_attn.{name}")


def test_rows_that_do_not_add_up_are_refused(copy: Path) -> None:
    """The partition sizes come from the config and are checked against the weight."""
    edit_json(copy / "config.json", linear_num_value_heads=2)
    with pytest.raises(CheckpointError, match=r"q 64 \+ k 64 \+ v 64 = 192 rows"):
        find_groups(open_checkpoint(copy)).select("qkvz")


@pytest.mark.parametrize("value", [None, 0, -2, "4", 2.0, True])
def test_sizes_that_are_none_are_refused(value: object, copy: Path) -> None:
    """Missing, or not a positive integer."""
    edit_json(copy / "config.json", linear_key_head_dim=value)
    with pytest.raises(ConfigError, match="linear_key_head_dim"):
        find_groups(open_checkpoint(copy)).select("qkvz")


def test_unknown_architectures_have_lookalikes_not_groups(copy: Path) -> None:
    """Reported, not guessed at."""
    edit_json(copy / "config.json", model_type="qwen9")
    by_class = open_checkpoint(copy)  # it still states a class that engines have: in_proj_qkv has three slots there
    assert "in_proj_qkvz" not in {group.layer.name for group in find_groups(by_class).select("all")}
    assert find_lookalikes(by_class)
    edit_json(copy / "config.json", architectures=["Qwen9ForCausalLM"])
    checkpoint = open_checkpoint(copy)
    assert find_groups(checkpoint).select("all") == ()
    assert "model.layers.0.linear_attn.in_proj_qkv" in find_lookalikes(checkpoint)


def test_known_architectures_have_no_lookalikes(text: Path) -> None:
    """They have groups."""
    assert find_lookalikes(open_checkpoint(text)) == ()


def test_vision_towers_are_left_alone() -> None:
    """MiniCPM-V's has q_proj, k_proj and v_proj too; what engines make of it is another question."""
    groups = find_groups(open_checkpoint(FIXTURES / "llmcompressor-minicpmv4_6")).select("all")
    assert {group.name.partition(".layers.")[0] for group in groups} == {"model.language_model"}
    assert {group.layer.name for group in groups} == {"in_proj_qkvz", "in_proj_ba", "qkv_proj", "gate_up_proj"}
