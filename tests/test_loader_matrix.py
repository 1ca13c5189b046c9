"""Predictions against recorded runs of the real loaders (scripts/loader_matrix.sh --record).

A cell that disagrees is a defect of the prediction in ``rewrite/loaders.py``, or a loader that has changed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import rewrite
from rewrite.loaders import Outcome, find_loaders
from tests.support import FIXTURES

RECORD = json.loads((Path(__file__).parent / "loader_matrix.json").read_text())
CELLS = [cell for cell in RECORD["cells"] if cell["outcome"] != "not run"]


@cache
def inspection(fixture: str) -> rewrite.Inspection:
    return rewrite.inspect_checkpoint(FIXTURES / fixture)


def predicted(cell: dict[str, Any]) -> Outcome:
    (loader,) = find_loaders(f"{cell['engine']}@{cell['version']}")
    (row,) = [row for row in inspection(cell["fixture"]).rows if row.loader == loader]
    profile = cell["profile"].removesuffix("-all")  # --groups all changes nothing for in_proj_qkvz
    outcome = row.as_is if profile == "original" else row.converted[profile]
    assert outcome is not None
    return outcome


def worst_errors(cell: dict[str, Any]) -> dict[str, float]:
    """The largest relative error of each partition, over layers and ranks."""
    errors: dict[str, float] = {}
    for group in cell["groups"]:
        for name, error in group["errors"].items():
            errors[name] = max(errors.get(name, 0.0), error)
    return errors


@pytest.mark.parametrize(
    "cell", CELLS, ids=lambda c: f"{c['engine']}-{c['version']}-{c['fixture']}-{c['profile']}-{c['ranks']}"
)
def test_every_recorded_cell_is_predicted(cell: dict[str, Any]) -> None:
    """The kind, the partitions that are hurt, and the size of the error."""
    outcome = predicted(cell)
    if cell["outcome"] == "raises":
        assert outcome.kind == "fails to load", cell["error"]
        return
    errors = worst_errors(cell)
    hurt = {name: error for name, error in errors.items() if error > 0}
    assert errors, "the run measured nothing"
    if cell["cast"]:
        assert outcome.kind == "garbled", "layers that are BF16 on disk are served in FP8"
        assert "in_proj_ba" in outcome.detail
        return
    if not hurt:
        assert outcome.kind == "exact"
        return
    named = {name: error for name, error in hurt.items() if name in outcome.partitions}
    if max(hurt.values()) > 1:
        assert outcome.kind == "garbled"
        assert named
        assert all(error < 0.0626 for name, error in hurt.items() if name not in named), "the rest is requantised"
        assert all(error >= outcome.error * 0.15 for error in named.values()), "the estimate is of the right size"
    else:
        assert outcome.kind == "loses precision"
        assert set(outcome.partitions) == set(hurt)
        assert max(hurt.values()) <= outcome.error


def test_the_readme_shows_the_recorded_table() -> None:
    """Generated, not written."""
    root = Path(__file__).parents[1]
    command = [root / "scripts" / "loader_matrix.sh", "--readme"]
    table = subprocess.run(command, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, check=True)
    assert table.stdout.decode().strip() in (root / "README.md").read_text()


def test_the_record_covers_every_profile_and_engine() -> None:
    """So that a new profile or loader row cannot go unmeasured, on every fixture of the family that is garbled."""
    assert {cell["profile"] for cell in CELLS} == {"original", "exact-all", *rewrite.PROFILES}
    family = {path.name for path in FIXTURES.glob("*-qwen3_5-*")} - {"modelopt-qwen3_5-mixed"}
    assert {cell["fixture"] for cell in CELLS} == family
    measured = {loader for cell in CELLS for loader in find_loaders(f"{cell['engine']}@{cell['version']}")}
    assert measured == set(rewrite.LOADERS)
