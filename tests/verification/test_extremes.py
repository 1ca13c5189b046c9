"""Scales that no calibration should leave: a right conversion passes all the same, whatever engines made of IN."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

import rewrite
from rewrite.loaders.versions import find_loaders
from rewrite.verification.values import code_values, encode
from tests.support import FIXTURES, edit_json, raw_tensors, replace_tensor

QKV = "layers.0.linear_attn.in_proj_qkv"
Z = "layers.0.linear_attn.in_proj_z"
DOWN = "layers.0.mlp.down_proj"


def extreme(name: str, values: dict[str, float | None], tmp_path: Path) -> Path:
    """A copy of a fixture with other scales; None: all of the tensor is 0."""
    copy = Path(shutil.copytree(FIXTURES / name, tmp_path / "in"))
    for tensor, (_, dtype, shape, data) in raw_tensors(copy).items():
        for end, value in values.items():
            if tensor.endswith(end):
                raw = bytes(len(data)) if value is None else struct.pack("<f", value)[0 if dtype == "F32" else 2 :]
                replace_tensor(copy, tensor, raw, shape)
    return copy


@pytest.mark.parametrize("profile", ["exact", "dynamic", "portable", "dequantized"])
@pytest.mark.parametrize("name", ["llmcompressor-qwen3_5-text", "fp8-qwen3_5-vl"])
@pytest.mark.parametrize("scale", [1e30, 1e18, 1e-12, 1e-30])
@pytest.mark.parametrize("modules", [(QKV,), (QKV, Z)])
def test_weight_scales(modules: tuple[str, ...], scale: float, name: str, profile: str, tmp_path: Path) -> None:
    """Engines dequantize to float16, where these are infinite or 0: a fault of IN."""
    source = extreme(name, {f"{module}.weight_scale": scale for module in modules}, tmp_path)
    rewrite.convert(source, tmp_path / "out", profile=profile)
    found = rewrite.verify(source, tmp_path / "out", device="cpu", tokens=4)
    assert found.ok, [problem for check in found.checks for problem in check.problems]


@pytest.mark.parametrize("weights", [None, "kept"])
@pytest.mark.parametrize("scale", [0.0, 1e18, 3e38, 1e-40, float("inf"), float("nan")])
def test_input_scales_of_layers_that_no_sample_reached(scale: float, weights: str | None, tmp_path: Path) -> None:
    """``portable`` drops them."""
    zeros = {f"{DOWN}.weight": None} if weights is None else {}
    source = extreme("llmcompressor-qwen3_5-text", {f"{DOWN}.input_scale": scale, **zeros}, tmp_path)
    rewrite.convert(source, tmp_path / "out", profile="portable")
    found = rewrite.verify(source, tmp_path / "out", device="cpu", tokens=4)
    assert found.ok, [problem for check in found.checks for problem in check.problems]


@pytest.mark.parametrize("scale", [1e18, 1e30, 1e-40])
def test_a_layer_of_zeros(scale: float, tmp_path: Path) -> None:
    """A vision tower that no sample reached."""
    source = extreme("llmcompressor-qwen3_5-text", {f"{DOWN}.weight": None, f"{DOWN}.weight_scale": scale}, tmp_path)
    rewrite.convert(source, tmp_path / "out", profile="portable")
    assert rewrite.verify(source, tmp_path / "out", device="cpu", tokens=4).ok


def test_a_wrong_row_is_still_found_beside_an_extreme_scale(tmp_path: Path) -> None:
    """What engines lose of IN does not excuse OUT."""
    source = extreme("llmcompressor-qwen3_5-text", {f"{QKV}.weight_scale": 1e30}, tmp_path)
    rewrite.convert(source, tmp_path / "out")
    name = next(tensor for tensor in raw_tensors(tmp_path / "out") if tensor.endswith(f"{QKV}.weight_scale"))
    raw = raw_tensors(tmp_path / "out")[name][3]
    replace_tensor(tmp_path / "out", name, struct.pack("<f", 1e29)[2:] + raw[2:])
    found = rewrite.verify(source, tmp_path / "out", device="cpu", tokens=4)
    failed = {check.name: check.problems for check in found.checks if check.verdict == "FAILED"}
    assert any("q, outputs" in problem for problem in failed["outputs"])


@pytest.mark.parametrize("quick", [False, True])
def test_a_weight_that_is_too_large_for_its_dtype(quick: bool, tmp_path: Path) -> None:
    """In F16 it is infinite: convert refuses to write that, and verify must not take it for what IN means."""
    source = extreme("llmcompressor-qwen3_5-text", {}, tmp_path)
    edit_json(source / "config.json", dtype="float16")
    rewrite.convert(source, tmp_path / "out", profile="dequantized")
    for name, (_, dtype, shape, data) in raw_tensors(source).items():
        if name.endswith(f"{DOWN}.weight"):
            values = code_values(dtype)[np.frombuffer(data, np.uint8)] * np.float32(300)
            replace_tensor(tmp_path / "out", name, encode(values, "F16").tobytes(), shape)
        if name.endswith(f"{DOWN}.weight_scale"):
            replace_tensor(source, name, struct.pack("<f", 300)[2:], shape)
    found = rewrite.verify(source, tmp_path / "out", weights_only=True, quick=quick)
    (weights,) = [check for check in found.checks if check.name == "weights"]
    assert f"{DOWN}: down_proj, " in weights.problems[0]
    assert "rows differ, by up to inf" in weights.problems[0]


def test_a_weight_that_is_not_a_number_stays_so(tmp_path: Path) -> None:
    """Any NaN is as good as another; a number in its place is not."""
    source = extreme("llmcompressor-qwen3_5-text", {}, tmp_path)
    name = next(name for name in raw_tensors(source) if name.endswith(f"{DOWN}.weight"))
    replace_tensor(source, name, b"\x7f" + raw_tensors(source)[name][3][1:])
    rewrite.convert(source, tmp_path / "out", profile="dequantized")
    data = raw_tensors(tmp_path / "out")[name][3]
    for value, said in ((b"\xff\xff", ""), (b"\0\x3f", "1 of 64 rows differ, by up to nan")):
        replace_tensor(tmp_path / "out", name, value + data[2:])
        found = rewrite.verify(source, tmp_path / "out", weights_only=True)
        (weights,) = [check for check in found.checks if check.name == "weights"]
        assert said in "".join(weights.problems) and bool(said) == bool(weights.problems)


@pytest.mark.parametrize(("dtype", "size"), [("float16", 2), ("float32", 4)])
def test_models_that_are_not_in_bf16(dtype: str, size: int, tmp_path: Path) -> None:
    """Right weights hold, and one other row is found."""
    source = extreme("llmcompressor-qwen3_5-text", {}, tmp_path)
    edit_json(source / "config.json", dtype=dtype)
    rewrite.convert(source, tmp_path / "out", profile="dequantized")
    assert rewrite.verify(source, tmp_path / "out", weights_only=True).ok
    name = next(name for name in raw_tensors(source) if name.endswith(f"{DOWN}.weight"))
    data = raw_tensors(tmp_path / "out")[name][3]
    replace_tensor(tmp_path / "out", name, data[: -64 * size] + bytes(64 * size))
    found = rewrite.verify(source, tmp_path / "out", weights_only=True)
    assert [check.problems for check in found.checks if check.name == "weights" and "1 of 64 rows" in check.problems[0]]


def test_plain_weights_have_the_dtype_of_the_model(tmp_path: Path) -> None:
    """In F16 small ones are 0."""
    source = extreme("llmcompressor-qwen3_5-text", {f"{DOWN}.weight_scale": 1e-11}, tmp_path)
    edit_json(source / "config.json", dtype="float16")
    rewrite.convert(source, tmp_path / "out", profile="dequantized")
    for folder in (source, tmp_path / "out"):
        edit_json(folder / "config.json", dtype="bfloat16")
    found = rewrite.verify(source, tmp_path / "out", weights_only=True)
    (structure,) = [check for check in found.checks if check.name == "structure"]
    assert f"{DOWN}.weight: F8_E4M3 [64, 64] became F16" in "".join(structure.problems)


def test_engines_that_compute_with_in_and_not_with_out_are_named(vl: Path, tmp_path: Path) -> None:
    """And fail where they are asked for."""
    rewrite.convert(vl, tmp_path / "out")
    found = rewrite.verify(vl, tmp_path / "out", device="cpu", tokens=4)
    rows = [row for row in found.loaders if row.stopped]
    assert (
        [tuple(outcome.kind for outcome in row.outcomes.values()) for row in rows]
        == [("loses precision", "does not run")] * len(rows)
        != []
    )
    (engines,) = [check for check in found.checks if check.name == "engines"]
    assert engines.summary.endswith("without a kernel for OUT on cuda: SGLang 0.5.11 to 0.5.17")
    (engine,) = find_loaders("sglang@0.5.17")
    asked = rewrite.verify(vl, tmp_path / "out", device="cpu", tokens=4, loader=engine)
    assert {check.name for check in asked.checks if check.verdict == "FAILED"} == {"engines"}


@pytest.mark.parametrize("profile", ["exact", "rescaled"])
@pytest.mark.parametrize("zeros", [False, True])
def test_global_scales_that_need_no_other_block_scale(zeros: bool, profile: str, tmp_path: Path) -> None:
    """0.1 percent apart, or of a layer of zeros: each block scale rounds to what it was."""
    source = Path(shutil.copytree(FIXTURES / "llmcompressor-qwen3_5-nvfp4", tmp_path / "in"))
    tensors = raw_tensors(source)
    for name in tensors:
        if name.endswith("up_proj.weight_global_scale"):
            other = name.replace("up_proj", "gate_proj")
            (value,) = struct.unpack("<f", tensors[other][3])
            replace_tensor(source, name, struct.pack("<f", value * (2.5 if zeros else 1.001)), tensors[name][2])
            for blocks in (each.replace("global_scale", "scale") for each in (name, other) if zeros):
                replace_tensor(source, blocks, bytes(len(tensors[blocks][3])), tensors[blocks][2])
    rewrite.convert(source, tmp_path / "out", profile=profile)
    found = rewrite.verify(source, tmp_path / "out", device="cpu", tokens=4)
    assert found.ok, [problem for check in found.checks for problem in check.problems]
