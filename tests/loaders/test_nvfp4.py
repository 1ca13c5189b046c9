"""What is predicted of NVFP4 groups: one global scale for several modules. The recorded runs: test_loader_matrix.py."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

import rewrite
from rewrite.loaders.layer import Layer, Part
from rewrite.loaders.nvfp4 import one_global_scale, one_or_refused, separate, unset_slots
from rewrite.loaders.outcome import Outcome
from rewrite.quantization.nvfp4 import as_f32
from tests.support import FIXTURES, raw_tensors, replace_tensor

LLMC, FREE, MODELOPT = "llmcompressor-qwen3_5-nvfp4", "modelfree-qwen3_5-moe-nvfp4a16", "modelopt-qwen3_5-moe-nvfp4"


def gate_up(gate: float | None, up: float | None, **more: object) -> Layer:
    """Global scales to multiply with."""
    partitions = tuple(Part(name, name, 8, "nvfp4", s) for name, s in (("gate", gate), ("up", up)))
    return Layer("mlp.gate_up_proj", "gate_up_proj", partitions, 16, static_activations=True, **more)  # type: ignore[arg-type]


def as_is(inspection: rewrite.Inspection, loader: str, version: str) -> Outcome:
    (row,) = [row for row in inspection.rows if row.engine.name == loader and row.engine.covers(version)]
    return row.as_is


@pytest.fixture
def copy(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    import shutil

    return Path(shutil.copytree(FIXTURES / request.param, tmp_path / "in"))


def test_divisors_leave_the_smallest_scale_multipliers_the_largest() -> None:
    """The largest number of those that are stored."""
    by_divisor = one_global_scale(gate_up(4.0, 1.0, divides=True))
    assert (by_divisor.kind, by_divisor.factors, by_divisor.error) == ("garbled", (("gate", 0.25),), 0.75)
    by_multiplier = one_global_scale(gate_up(4.0, 1.0))
    assert (by_multiplier.kind, by_multiplier.factors, by_multiplier.error) == ("garbled", (("up", 4.0),), 3.0)


def test_experts_get_the_scale_of_gate() -> None:
    """Whichever is larger."""
    for divides in (True, False):
        outcome = one_global_scale(gate_up(1.0, 4.0, divides=divides, experts=8, furthest="experts.3"))
        assert outcome.factors == (("up", 0.25),)
        assert "experts.3" in outcome.detail


def test_a_ratio_as_small_as_rounding_is_a_loss_of_precision() -> None:
    outcome = one_global_scale(gate_up(1.0, 1.03125))
    assert (outcome.kind, outcome.partitions, outcome.error) == ("loses precision", ("gate",), 0.03125)


@pytest.mark.parametrize("behavior", [one_global_scale, one_or_refused, separate])
def test_equal_scales_are_exact(behavior: object) -> None:
    assert behavior(gate_up(2.0, 2.0)).kind == "exact"  # type: ignore[operator]


@pytest.mark.parametrize("behavior", [one_global_scale, one_or_refused, separate, unset_slots])
@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), None])
def test_scales_that_are_no_positive_numbers_are_not_known(behavior: object, scale: float | None) -> None:
    assert behavior(gate_up(1.0, scale)).kind == "not known"  # type: ignore[operator]


def test_sglang_refuses_weight_only_layers() -> None:
    """But not experts that have scales of activations: they get gate's."""
    view = gate_up(4.0, 1.0, divides=True)
    weight_only = Layer(view.name, view.kind, view.parts, 16, static_activations=False, divides=True)
    assert one_or_refused(weight_only).kind == "fails to load"
    assert one_or_refused(view).kind == "garbled"
    experts = one_or_refused(gate_up(4.0, 1.0, divides=True, experts=4))
    assert (experts.kind, experts.factors) == ("garbled", (("up", 4.0),))
    assert "before Blackwell" in experts.detail
    assert "flashinfer_trtllm" in one_or_refused(gate_up(4.0, 1.0, experts=4)).detail


@pytest.mark.parametrize("fixture", [LLMC, FREE, MODELOPT])
def test_old_vllm_takes_what_memory_held(fixture: str) -> None:
    """Whatever the scales are: two of four slots are never filled."""
    outcome = as_is(rewrite.inspect_checkpoint(FIXTURES / fixture), "vLLM", "0.19.1")
    assert outcome.kind == "garbled"
    assert "memory" in outcome.detail
    assert {f"in_proj_qkvz.{name}" for name in "qkvz"} <= set(outcome.partitions)


def test_llm_compressor_is_garbled_today() -> None:
    """q, k and v at the size that z's scale gives them: 5.57 and 5.67 times too small."""
    inspection = rewrite.inspect_checkpoint(FIXTURES / LLMC)
    for loader, version in (("vLLM", "0.32.0"), ("SGLang", "0.5.23")):
        outcome = as_is(inspection, loader, version)
        assert (outcome.kind, outcome.partitions) == ("garbled", tuple(f"in_proj_qkvz.{name}" for name in "qkv"))
        assert dict(outcome.factors)["in_proj_qkvz.q"] == pytest.approx(1 / 5.67, rel=1e-3)
    assert as_is(inspection, "transformers", "5.17.0").kind == "exact"
    assert as_is(inspection, "SGLang", "0.5.22").kind == "not known"


def test_layers_whose_scales_differ_are_looked_at_unasked() -> None:
    """The default selection is in_proj_qkvz and every NVFP4 layer with different global scales: experts, too."""
    groups = rewrite.inspect_checkpoint(FIXTURES / FREE).groups
    assert {group.kind for group in groups} == {"in_proj_qkvz", "gate_up_proj", "experts"}
    assert all(group.furthest.endswith(".experts.3") for group in groups if group.kind == "experts")
    assert {group.kind for group in rewrite.inspect_checkpoint(FIXTURES / MODELOPT).groups} == {"in_proj_qkvz"}


def test_modelopt_is_fine() -> None:
    """It gives all modules with the same input one global scale."""
    inspection = rewrite.inspect_checkpoint(FIXTURES / MODELOPT, selection="all")
    assert inspection.dialect == "modelopt NVFP4"
    assert as_is(inspection, "vLLM", "0.32.0") == as_is(inspection, "SGLang", "0.5.23") == Outcome("exact")
    assert as_is(inspection, "transformers", "5.17.0").kind == "fails to load"


@pytest.mark.parametrize("copy", [MODELOPT], indirect=True)
def test_modelopt_with_different_scales_is_seen(copy: Path) -> None:
    """Multipliers: the largest wins."""
    name = "model.language_model.layers.1.mlp.shared_expert.gate_proj.weight_scale_2"
    (old,) = struct.unpack("<f", raw_tensors(copy)[name][3])
    replace_tensor(copy, name, struct.pack("<f", old / 4))
    outcome = as_is(rewrite.inspect_checkpoint(copy), "vLLM", "0.32.0")
    ((partition, factor),) = outcome.factors
    assert partition == "gate_up_proj.gate"
    assert factor == pytest.approx(4.0)


@pytest.mark.parametrize("copy", [LLMC], indirect=True)
def test_input_scales_that_differ_are_not_known(copy: Path) -> None:
    """Of layers whose weights are right."""
    name = "model.language_model.layers.1.mlp.up_proj.input_global_scale"
    replace_tensor(copy, name, struct.pack("<f", 100.0))
    outcome = as_is(rewrite.inspect_checkpoint(copy, selection="all"), "vLLM", "0.32.0")
    assert outcome.kind == "garbled", "the Gated DeltaNet layers"
    for layer in (0, 1):
        prefix = f"model.language_model.layers.{layer}.linear_attn.in_proj_"
        replace_tensor(copy, f"{prefix}z.weight_global_scale", raw_tensors(copy)[f"{prefix}qkv.weight_global_scale"][3])
    assert as_is(rewrite.inspect_checkpoint(copy), "vLLM", "0.32.0").kind == "not known"


@pytest.mark.parametrize("copy", [LLMC], indirect=True)
def test_a_divisor_of_zero_is_a_fault(copy: Path) -> None:
    """And no loader is said to be right."""
    replace_tensor(copy, "model.language_model.layers.1.linear_attn.in_proj_z.weight_global_scale", bytes(4))
    inspection = rewrite.inspect_checkpoint(copy)
    assert any("a scale of 0" in finding.what for finding in inspection.findings)
    assert as_is(inspection, "transformers", "5.17.0").kind == "not known"


def test_transformers_leaves_the_scales_of_experts_out() -> None:
    """Run: weights 4,900 to 27,000 times too large."""
    outcome = as_is(rewrite.inspect_checkpoint(FIXTURES / FREE), "transformers", "5.17.0")
    assert (outcome.kind, outcome.partitions) == ("garbled", ("experts.gate", "experts.up"))
    assert outcome.error > 2e4


def test_f32_rounding() -> None:
    assert as_f32(1 / 3) == struct.unpack("<f", struct.pack("<f", 1 / 3))[0]
    assert as_f32(1e300) == float("inf")
    assert as_f32(-1e300) == float("-inf")
