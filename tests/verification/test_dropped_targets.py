"""A target that is missing from OUT's config is seen, whatever scheme its layers then fall back to.

Each case was held by an earlier version: found by the search's damaged copies.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import rewrite
from rewrite import Selection
from tests.recipes import draw, make

VL = "modelopt-qwen3_5-vl"
LAYER = "model.language_model.layers.{}.linear_attn.in_proj_z"
Groups = tuple[tuple[str, tuple[str, ...]], ...]
INT8: Groups = (("fp8-tensor-static", ("re:.*self_attn.*", "re:.*linear_attn.*")), ("int8", ("Linear",)))
INT4: Groups = (("fp8-tensor-static", ("Linear",)), ("int4", ("re:.*mlp.*",)))
PLAIN_ACTIVATIONS: Groups = (
    ("fp8-weight-only", ("re:.*linear_attn.*",)),
    ("fp8-tensor-dynamic", (LAYER.format(0), LAYER.format(1))),
)
IGNORED = ("lm_head", "re:.*visual.*", "re:.*in_proj_[ab]$")


@pytest.mark.parametrize(
    ("groups", "profile", "selection", "dropped", "problem"),
    [
        (INT8, "dynamic", "all", "re:.*self_attn\\.(q_proj|k_proj|v_proj|qkv_proj)$", "another format than FP8"),
        (INT4, "portable", "all", "re:.*mlp.*", "another scheme than in the source"),
        (PLAIN_ACTIVATIONS, "partition", "qkvz", LAYER.format(1), "has activations none, not dynamic"),
    ],
)
def test_a_dropped_target_fails(
    groups: Groups, profile: str, selection: Selection, dropped: str, problem: str, tmp_path: Path
) -> None:
    recipe = replace(draw(0), base=VL, dialect="compressed-tensors", groups=groups, ignore=IGNORED, kv_cache=False)
    make(recipe, tmp_path / "in")
    rewrite.convert(tmp_path / "in", tmp_path / "out", profile=profile, selection=selection)
    assert rewrite.verify(tmp_path / "in", tmp_path / "out", device="cpu", tokens=2).ok

    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    held = [g["targets"] for g in config["quantization_config"]["config_groups"].values() if dropped in g["targets"]]
    held[0].remove(dropped)
    path.write_text(json.dumps(config))
    found = rewrite.verify(tmp_path / "in", tmp_path / "out", device="cpu", tokens=2)
    structure = next(check for check in found.checks if check.name == "structure")
    assert structure.verdict == "FAILED"
    assert any(problem in each for each in structure.problems), structure.problems
