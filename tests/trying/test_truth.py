"""What the driver of `try` takes for the truth, against an independent reading of the same files (`truth.py`)."""

from __future__ import annotations

from pathlib import Path

import pytest
from loader_matrix.trials import misread
from loader_matrix.truth import Truth

import rewrite
from rewrite.trying import driver
from tests.support import FIXTURES, NVFP4

NAMES = sorted(path.parent.name for path in FIXTURES.glob("*/config.json"))


@pytest.mark.parametrize("converted", [False, True], ids=["original", "converted"])
@pytest.mark.parametrize("name", NAMES)
def test_every_quantized_weight_means_the_same(name: str, converted: bool, tmp_path: Path) -> None:
    """Bit by bit, and the scales of activations."""
    folder = FIXTURES / name
    if converted:
        profile = "rescaled" if name in NVFP4 else "bf16" if name == "modelopt-qwen3_5-mixed" else "exact"
        rewrite.convert(folder, tmp_path / "out", profile=profile, selection="all")
        folder = tmp_path / "out"
    assert Truth(folder).quantized()
    assert misread(folder) is None


def test_another_reading_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a driver that takes a divisor of NVFP4 for a multiplier, or reads no scale of activations."""
    folder = FIXTURES / "llmcompressor-qwen3_5-nvfp4"
    with monkeypatch.context() as patched:
        patched.setattr(driver, "fp4", lambda codes, blocks, factor: driver_fp4(codes, blocks, 1 / factor))
        assert misread(folder)
    monkeypatch.setattr(driver.Checkpoint, "input_scale", lambda *_: None)
    assert misread(folder)


driver_fp4 = driver.fp4
