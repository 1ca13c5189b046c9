"""Checkpoints that nobody chose: inspect, convert and verify agree with each other on every one of them.

``scripts/evidence.sh search`` runs the same recipes through the real engines.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

import rewrite
from rewrite import PROFILES, Refused, Selection
from tests.recipes import Recipe, draw, make, with_fault

SEEDS = range(24)
_UNREPAIRED = re.compile("nothing was repaired|the modules still have different values")


@pytest.mark.parametrize("selection", ["qkvz", "all"])
@pytest.mark.parametrize("seed", SEEDS)
def test_inspect_convert_and_verify_agree(seed: int, selection: Selection, tmp_path: Path) -> None:
    """On any checkpoint."""
    make(draw(seed), tmp_path / "in")
    assert not disagreements(tmp_path / "in", selection, tmp_path)


@pytest.mark.parametrize("seed", range(500, 518))  # three of each fault, and more
def test_they_agree_where_something_is_wrong(seed: int, tmp_path: Path) -> None:
    """The faults are there, and of each profile `inspect` says what `convert` does."""
    recipe = with_fault(draw(seed))
    make(recipe, tmp_path / "in")
    make(replace(recipe, fault=""), tmp_path / "sound")
    assert digest(tmp_path / "in") != digest(tmp_path / "sound"), recipe.fault
    assert not disagreements(tmp_path / "in", "all", tmp_path)


def test_a_fused_layer_of_which_one_part_quantizes_activations(tmp_path: Path) -> None:
    """What engines make of it is not known: it stays as it is, and that is no fault of a conversion."""
    groups = (("nvfp4a16", ("Linear",)), ("nvfp4", ("model.layers.1.linear_attn.in_proj_z",)))
    make(Recipe(31004, "llmcompressor-qwen3_5-text", groups, ("lm_head",), kv_cache=False, shards=1), tmp_path / "in")
    assert rewrite.convert(tmp_path / "in", tmp_path / "out", profile="exact").changed
    found = rewrite.verify(tmp_path / "in", tmp_path / "out", device="cpu")
    assert found.ok, found
    assert not disagreements(tmp_path / "in", "all", tmp_path)


def digest(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def disagreements(source: Path, selection: Selection, folder: Path) -> list[str]:
    """What inspect says of a profile is what convert does, and verify agrees with what convert wrote to ``folder``."""
    try:
        refusals = rewrite.inspect_checkpoint(source, selection=selection).refusals
    except Refused as refusal:
        refusals = dict.fromkeys(PROFILES, refusal.what)
    found = []
    for profile in PROFILES:
        out = folder / profile
        try:
            changed = rewrite.convert(source, out, profile=profile, selection=selection).changed
        except Refused as refusal:
            if refusals.get(profile) != refusal.what:
                found.append(
                    f"{source.name} {selection} {profile}: inspect says {refusals.get(profile)!r}, convert {refusal}"
                )
            continue
        if profile in refusals:
            found.append(f"{source.name} {selection} {profile}: inspect says {refusals[profile]!r}, convert converts")
        result = rewrite.verify(source, out, device="cpu", tokens=4)
        problems = [problem for check in result.checks for problem in check.problems]
        unrepaired = not changed and problems and _UNREPAIRED.search(problems[0])  # by a profile that leaves it
        if not result.ok and not unrepaired:
            found.append(f"{source.name} {selection} {profile}: verify: {problems[0][:300]}")
    return found
