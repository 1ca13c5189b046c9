"""Recorded outputs of NVFP4 layers through vLLM's own emulation: scripts/evidence.sh outputs --record."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.support import NVFP4, ROOT

RECORD: list[dict[str, Any]] = json.loads((ROOT / "tests" / "nvfp4_outputs.json").read_text())["cells"]
#: By how much the emulation is off where nothing is wrong: of activations in NVFP4, and of an MLP with two such layers;
#: of activations in BF16.
NOISE = {"llmcompressor-qwen3_5-nvfp4": {"in_proj_qkvz": 0.1, "gate_up_proj": 0.2}}
PLAIN_NOISE = 6e-3
#: Of equal scales; and q_a of DeepSeek, whose norm takes the factor away.
UNHARMED = (("llmcompressor-qwen3_5-nvfp4", "gate_up_proj"), ("modelfree-deepseek_v3-nvfp4a16", "fused_qkv_a_proj"))
RESCALED = 0.04  # the most by which a rescaled matrix is off


def noise(row: dict[str, Any], layer: str) -> float:
    return NOISE.get(row["fixture"], {}).get(layer, PLAIN_NOISE)


@pytest.mark.parametrize("row", RECORD, ids=lambda row: f"{row['fixture']}-{row['profile']}")
def test_outputs_are_right_once_repaired(row: dict[str, Any]) -> None:
    """Before, fused layers with several scales are off by more than half; after, by the activations' share and at most
    one rounding of block scales."""
    for layer, errors in row["errors"].items():
        worst = max(errors.values())
        if row["profile"] != "original":
            assert worst < noise(row, layer) + RESCALED * (row["profile"] == "rescaled"), layer
        elif (row["fixture"], layer) not in UNHARMED:
            assert worst > 0.5, layer


def test_every_fixture_with_several_scales_is_there() -> None:
    """ModelOpt's are equal."""
    found = {(row["fixture"], row["profile"]) for row in RECORD}
    fixtures = [name for name in NVFP4 if not name.startswith("modelopt")]
    assert found == {(name, profile) for name in fixtures for profile in ("original", "exact", "rescaled")}


def test_the_readme_shows_the_record() -> None:
    """Generated, not written."""
    pytest.importorskip("tomllib")
    command = [str(ROOT / "scripts" / "evidence.sh"), "outputs", "--readme"]
    table = subprocess.run(command, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, check=True)
    assert table.stdout.decode().strip() in (ROOT / "scripts" / "evidence" / "loader_matrix" / "README.md").read_text()
