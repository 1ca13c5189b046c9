"""Logits of NVFP4 checkpoints as engines serve them, computed by transformers: before, rescaled, folded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import rewrite
from tests.support import FIXTURES

pytest.importorskip("transformers")
from loader_matrix import logits
from loader_matrix.truth import read_tensors

LLMC, FREE = "llmcompressor-qwen3_5-nvfp4", "modelfree-qwen3_5-moe-nvfp4a16"
_ROUNDING = 2e-6  # of F32, through the whole model


@pytest.mark.parametrize("fixture", [LLMC, FREE])
def test_repaired_checkpoints_are_served_as_they_are_meant(fixture: str, tmp_path: Path) -> None:
    """Nothing done: logits of another model. Rescaled: as far off as one more rounding of block scales takes them.
    Folded: as far as the rounding of the convolution does; where linear layers take the ratio, not at all."""
    found = {(layers, how): errors["F32"] for layers, how, errors in logits.figures(fixture, tmp_path, ("F32",))}
    for layers, how in [each for each in found if each[1] == "nothing"]:
        assert found[layers, "nothing"] > 0.3, (layers, how)
        assert _ROUNDING < found[layers, "rescaled"] < 0.11
        assert found[layers, "exact"] < (_ROUNDING if layers == "gate_up_proj, experts" else 2e-3)
    assert ("gate_up_proj, experts", "nothing") in found or fixture == LLMC


def test_what_folding_costs_is_the_rounding_of_the_convolution(tmp_path: Path) -> None:
    """With its weights in F32, not rounded to BF16, there is no difference."""
    rewrite.convert(FIXTURES / LLMC, tmp_path / "out")
    original, folded = read_tensors(FIXTURES / LLMC), read_tensors(tmp_path / "out")
    exact = dict(folded)
    for name in (name for name in folded if name.endswith("conv1d.weight")):
        layer = name.removesuffix("conv1d.weight")
        divisors = (original[f"{layer}{each}.weight_global_scale"].double() for each in ("in_proj_z", "in_proj_qkv"))
        exact[name] = original[name].double() * next(divisors) / next(divisors)
    assert sum(not torch.equal(exact[name], folded[name].double()) for name in folded if "conv1d" in name) == 2
    true, rounded, unrounded = (
        logits.logits(FIXTURES / LLMC, tensors, served, torch.float32)
        for tensors, served in ((original, None), (folded, "."), (exact, "."))
    )
    assert logits.relative(unrounded, true) < _ROUNDING
    assert logits.relative(rounded, true) > 100 * _ROUNDING


def test_weights_without_a_place_are_an_error() -> None:
    """A model that is partly random would compare as well as any."""
    tensors = read_tensors(FIXTURES / LLMC)
    name = next(name for name in tensors if name.endswith("layers.0.mlp.up_proj.weight_packed"))
    rest = {each: tensor for each, tensor in tensors.items() if each != name}
    with pytest.raises(ValueError, match=r"no weights of .*up_proj"):
        logits.logits(FIXTURES / LLMC, rest, None, torch.float32)
