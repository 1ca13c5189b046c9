"""NVFP4 layers are multiplied: by the engines' emulation, against what the weights of IN mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import rewrite
from rewrite.verification.nvfp4_outputs import quantized
from tests.support import FIXTURES, raw_tensors, replace_tensor

RECORD = Path(__file__).parents[1] / "nvfp4_outputs.json"
LLMC = "llmcompressor-qwen3_5-nvfp4"
FREE = "modelfree-qwen3_5-moe-nvfp4a16"


def verified(name: str, profile: str, tmp_path: Path, **options: Any) -> rewrite.Verification:
    rewrite.convert(FIXTURES / name, tmp_path / "out", profile=profile)
    return rewrite.verify(FIXTURES / name, tmp_path / "out", device="cpu", **options)


@pytest.mark.parametrize("profile", ["exact", "rescaled"])
@pytest.mark.parametrize("name", [LLMC, FREE, "modelfree-deepseek_v3-nvfp4a16"])
def test_every_module_is_multiplied(name: str, profile: str, tmp_path: Path) -> None:
    """Folded ones are exact; rescaled ones off by no more than a rounding explains."""
    found = verified(name, profile, tmp_path)
    assert found.ok
    assert found.not_checked == ()
    assert found.numbers
    for row in found.numbers:
        assert row.outputs_out < (0.05 if row.reason == "rescaled" else 1e-12)
        assert row.bound_used is None or 0 <= row.bound_used <= 1
    assert profile == "exact" or max(row.bound_used or 0 for row in found.numbers) > 0.1
    assert {row.reason for row in found.numbers} == {"agrees", "folded" if profile == "exact" else "rescaled"}


def test_the_numbers_of_in_are_those_that_vllm_was_measured_with(tmp_path: Path) -> None:
    """vLLM 0.32's own emulation, on the same weights: what it makes of IN, and of a rescaled module of OUT."""
    record = {(row["fixture"], row["profile"]): row["errors"] for row in json.loads(RECORD.read_text())["cells"]}
    original, rescaled = (record[FREE, profile]["in_proj_qkvz"] for profile in ("original", "rescaled"))
    found = verified(FREE, "rescaled", tmp_path, rows=None)
    worst = {name: [r for r in found.numbers if r.partition == name] for name in ("in_proj_qkv", "in_proj_z")}
    assert max(row.outputs_fixed for row in worst["in_proj_qkv"]) == pytest.approx(original["q"], rel=0.02)
    assert max(row.outputs_out for row in worst["in_proj_z"]) == pytest.approx(rescaled["z"], rel=0.1)


@pytest.mark.parametrize(("name", "tensor"), [(LLMC, "in_proj_z.weight_scale"), (LLMC, "in_proj_z.weight_packed")])
def test_a_wrong_module_fails(name: str, tensor: str, tmp_path: Path) -> None:
    """Block scales, or codes."""
    assert verified(name, "exact", tmp_path).ok
    full = next(each for each in raw_tensors(tmp_path / "out") if each.endswith(f"layers.0.linear_attn.{tensor}"))
    _, _, _, data = raw_tensors(tmp_path / "out")[full]
    replace_tensor(tmp_path / "out", full, bytes([data[0] ^ 3]) + data[1:])
    found = rewrite.verify(FIXTURES / name, tmp_path / "out", device="cpu")
    (outputs,) = [check for check in found.checks if check.name == "outputs"]
    assert "in_proj_qkvz: in_proj_z, outputs differ from those of the weights of IN" in outputs.problems[0]


def test_activations_are_quantized_to_fp4() -> None:
    """Values of E2M1, ties to even, times an E4M3 scale of 16 and the global scale; 0 stays 0."""
    x = torch.tensor([[6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.75, -5.0, 0.3, 0.0, 4.9, 1.2, 2.6, -6.0]])
    found = quantized(x.double(), 1.0)
    assert found.tolist() == [[6, 0, 1, 1, 2, 2, 4, 4, -1, -4, 0.5, 0, 4, 1, 3, -6]]
    assert quantized(x.double() * 2.0**-20, 2.0**-20).tolist() == (found * 2.0**-20).tolist()
    assert not quantized(torch.zeros(2, 32).double(), 1.0).any()
    assert not quantized(x.double(), 0.0).any()


def test_any_bit_of_a_filter_that_took_a_ratio(tmp_path: Path) -> None:
    """Half of the last place is rounding, all of it is not."""
    assert verified(LLMC, "exact", tmp_path).ok
    name = next(each for each in raw_tensors(tmp_path / "out") if each.endswith("layers.0.linear_attn.conv1d.weight"))
    data = raw_tensors(tmp_path / "out")[name][3]
    for at in range(0, 64, 2):
        replace_tensor(tmp_path / "out", name, data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        found = rewrite.verify(FIXTURES / LLMC, tmp_path / "out", device="cpu", quick=True, weights_only=True)
        (weights,) = [check for check in found.checks if check.name == "weights"]
        assert "conv1d.weight: does not make up for the factor" in "".join(weights.problems), at
