"""Fused NVFP4 layers get one global scale: folded or rescaled; and what verify says of every way to do it wrong."""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

import rewrite
from rewrite.planning.nvfp4 import RESCALING, rescaled
from rewrite.quantization.dtypes import e4m3
from tests.support import FIXTURES, raw_tensors, replace_tensor, tree

LLMC, FREE, MODELOPT = "llmcompressor-qwen3_5-nvfp4", "modelfree-qwen3_5-moe-nvfp4a16", "modelopt-qwen3_5-moe-nvfp4"
_LAYER = "model.language_model.layers.0."
QKV, Z, CONV = (f"{_LAYER}linear_attn.{name}" for name in ("in_proj_qkv", "in_proj_z", "conv1d.weight"))
SHARED = f"{_LAYER}mlp.shared_expert."
EXPERT = f"{_LAYER}mlp.experts.2."
GLOBAL, INPUT, BLOCKS = "weight_global_scale", "input_global_scale", "weight_scale"


def f32(raw: bytes) -> float:
    return float(struct.unpack("<f", raw)[0])


def bf16(raw: bytes) -> list[float]:
    return [f32(b"\0\0" + raw[i : i + 2]) for i in range(0, len(raw), 2)]


@cache
def original(fixture: str) -> dict[str, bytes]:
    return {name: found[3] for name, found in raw_tensors(FIXTURES / fixture).items()}


@pytest.fixture(scope="module")
def outs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Every fixture with both profiles."""
    folder, found = tmp_path_factory.mktemp("outs"), {}
    for fixture in (LLMC, FREE, MODELOPT):
        for profile in ("exact", "rescaled"):
            found[fixture, profile] = folder / f"{fixture}-{profile}"
            rewrite.convert(FIXTURES / fixture, found[fixture, profile], profile=profile)
    return found


def changed(fixture: str, out: Path) -> dict[str, bytes]:
    """The tensors of OUT that are not those of IN."""
    new = {name: found[3] for name, found in raw_tensors(out).items()}
    assert new.keys() == original(fixture).keys()
    return {name: raw for name, raw in new.items() if raw != original(fixture)[name]}


def test_fold_moves_the_ratio_into_the_convolution(outs: dict[tuple[str, str], Path]) -> None:
    """qkv takes z's scale; conv1d takes the ratio, each weight rounded once to BF16; nothing else changes."""
    new = changed(LLMC, outs[LLMC, "exact"])
    kinds = {name.partition("layers.")[2][2:] for name in new}
    assert kinds == {f"linear_attn.in_proj_qkv.{GLOBAL}", "linear_attn.conv1d.weight"}
    old = original(LLMC)
    assert new[f"{QKV}.{GLOBAL}"] == old[f"{Z}.{GLOBAL}"]
    ratio = f32(old[f"{Z}.{GLOBAL}"]) / f32(old[f"{QKV}.{GLOBAL}"])  # divisors
    assert ratio == pytest.approx(5.574, rel=1e-3)
    for before, after in zip(bf16(old[CONV]), bf16(new[CONV]), strict=True):
        assert after == pytest.approx(before * ratio, rel=2**-8, abs=0)


def test_fold_moves_the_ratio_of_up_into_down(outs: dict[tuple[str, str], Path]) -> None:
    """Of shared experts and experts: three scales of one value, no block scale, no code."""
    new, old = changed(FREE, outs[FREE, "exact"]), original(FREE)
    assert {name.rpartition(".")[2] for name in new} == {GLOBAL, "weight"}
    assert {name for name in new if name.endswith(".weight")} == {CONV, CONV.replace("layers.0", "layers.1")}
    for prefix in (SHARED, EXPERT):
        gate, up, down = (f"{prefix}{name}_proj.{GLOBAL}" for name in ("gate", "up", "down"))
        assert new[up] == old[gate]
        product = f32(new[up]) * f32(new[down])
        assert product == pytest.approx(f32(old[up]) * f32(old[down]), rel=2**-23)


def test_rescaling_changes_block_scales_of_the_smaller_ones_only(outs: dict[tuple[str, str], Path]) -> None:
    """The module with the largest scale keeps every byte; each block scale of the other is rounded once."""
    new, old = changed(LLMC, outs[LLMC, "rescaled"]), original(LLMC)
    assert {name.partition("linear_attn.")[2] for name in new} == {f"in_proj_z.{GLOBAL}", f"in_proj_z.{BLOCKS}"}
    assert new[f"{Z}.{GLOBAL}"] == old[f"{QKV}.{GLOBAL}"]
    ratio = f32(old[f"{QKV}.{GLOBAL}"]) / f32(old[f"{Z}.{GLOBAL}"])
    for before, after in zip(old[f"{Z}.{BLOCKS}"], new[f"{Z}.{BLOCKS}"], strict=True):
        assert abs(e4m3(after) - e4m3(before) * ratio) <= max(RESCALING * e4m3(before) * ratio, 2**-10)


@pytest.mark.parametrize("fixture", [LLMC, FREE])
@pytest.mark.parametrize("profile", ["exact", "rescaled"])
def test_the_newest_engines_serve_it_right(fixture: str, profile: str, outs: dict[tuple[str, str], Path]) -> None:
    """As predicted; the engines' own runs of both are recorded."""
    inspection = rewrite.inspect_checkpoint(outs[fixture, profile], selection="all")
    newest = {row.engine.name: row.as_is.kind for row in inspection.rows if row.engine.last is None}
    assert newest["vLLM"] == newest["SGLang"] == "exact"


@pytest.mark.parametrize("fixture", [LLMC, FREE, MODELOPT])
@pytest.mark.parametrize("profile", ["exact", "rescaled"])
def test_verify_agrees_and_converting_twice_is_once(
    fixture: str, profile: str, outs: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    out = outs[fixture, profile]
    assert rewrite.verify(FIXTURES / fixture, out, device="cpu", tokens=1).ok
    again = rewrite.convert(out, tmp_path / "again", profile=profile)
    assert not again.changed
    rest = {name: data for name, data in tree(tmp_path / "again").items() if name != "rewrite_manifest.json"}
    assert rest == {name: data for name, data in tree(out).items() if name != "rewrite_manifest.json"}


def test_equal_scales_need_nothing(outs: dict[tuple[str, str], Path]) -> None:
    """ModelOpt's."""
    assert not changed(MODELOPT, outs[MODELOPT, "exact"])


def test_the_manifest_says_what_went_where(outs: dict[tuple[str, str], Path]) -> None:
    manifest = json.loads((outs[LLMC, "exact"] / "rewrite_manifest.json").read_text())
    first = manifest["global_scales"][0]
    assert (first["how"], first["kept"], first["into"]) == ("folded", Z, CONV.removesuffix(".weight"))
    assert first["ratios"][QKV] == pytest.approx(5.574, rel=1e-3)
    assert any("went into conv1d" in note for note in manifest["notes"])
    assert any("block scales" in note for note in rewrite.Manifest.from_json(_manifest(outs[LLMC, "rescaled"])).notes)


def _manifest(out: Path) -> dict[str, object]:
    return dict(json.loads((out / "rewrite_manifest.json").read_text()))


@pytest.fixture
def copy(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return Path(shutil.copytree(FIXTURES / request.param, tmp_path / "in"))


def rescaled_instead(source: Path, out: Path) -> bool:
    rewrite.convert(source, out)
    how = {each.how for each in rewrite.Manifest.from_json(_manifest(out)).scales if SHARED[:-1] in each.name}
    assert rewrite.verify(source, out, device="cpu", tokens=1).ok
    return how == {"rescaled"}


@pytest.mark.parametrize("copy", [FREE], indirect=True)
def test_what_cannot_take_a_ratio_is_rescaled(copy: Path, tmp_path: Path) -> None:
    """A limited activation: the ratio may not pass through it. (Float16 and a bias go the same way.)"""
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["swiglu_limit"] = 7.0
    (copy / "config.json").write_text(json.dumps(config))
    assert rescaled_instead(copy, tmp_path / "out")


@pytest.mark.parametrize("copy", [LLMC], indirect=True)
def test_activations_get_the_widest_scale(copy: Path, tmp_path: Path) -> None:
    """The smallest divisor: a larger one would cut the largest activations off."""
    replace_tensor(copy, f"{Z}.{INPUT}", struct.pack("<f", 100.0))
    for profile in ("exact", "rescaled"):
        out = tmp_path / profile
        rewrite.convert(copy, out, profile=profile)
        assert f32(raw_tensors(out)[f"{QKV}.{INPUT}"][3]) == 100.0
        assert rewrite.verify(copy, out, device="cpu", tokens=1).ok


@pytest.mark.parametrize("copy", [MODELOPT], indirect=True)
def test_multipliers_go_the_other_way(copy: Path, tmp_path: Path) -> None:
    """ModelOpt's dialect: up's scale a quarter of gate's goes into down, whose activations are scaled inversely."""
    gate, up, down = (f"{SHARED}{name}_proj." for name in ("gate", "up", "down"))
    old = original(MODELOPT)
    replace_tensor(copy, f"{up}weight_scale_2", struct.pack("<f", f32(old[f"{gate}weight_scale_2"]) / 4))
    rewrite.convert(copy, tmp_path / "out")
    new = {name: found[3] for name, found in raw_tensors(tmp_path / "out").items()}
    assert new[f"{up}weight_scale_2"] == old[f"{gate}weight_scale_2"]
    assert f32(new[f"{down}weight_scale_2"]) == f32(old[f"{down}weight_scale_2"]) / 4
    assert f32(new[f"{down}input_scale"]) == f32(old[f"{down}input_scale"]) * 4
    assert new[f"{gate}input_scale"] == old[f"{gate}input_scale"]
    assert rewrite.verify(copy, tmp_path / "out", device="cpu", tokens=1).ok


def test_the_table_rounds_to_nearest_even() -> None:
    """Against torch's cast, from float64 by way of float32 where that rounds nothing twice."""
    import torch

    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    for ratio in (1.0, 0.5, 0.25, 0.75, 3 / 16, 1 / 5.574):
        table = torch.frombuffer(bytearray(b"".join(rescaled(ratio))), dtype=torch.uint8)
        wanted = (codes * torch.tensor(ratio)).to(torch.float8_e4m3fn)
        lost = (wanted.float() == 0) & (codes != 0) & ~codes.isnan()
        assert torch.equal(table[~lost], wanted.view(torch.uint8)[~lost])
        assert set((table[lost] & 0x7F).tolist()) <= {1}, "what is not 0 does not become 0"
    assert all(math.isnan(e4m3(rescaled(0.3)[code][0])) for code in (0x7F, 0xFF))


def flip(name: str) -> Callable[[Path], None]:
    """The last bit of the third byte of a tensor."""

    def breaker(out: Path) -> None:
        raw = bytearray(raw_tensors(out)[name][3])
        raw[2] ^= 1
        replace_tensor(out, name, bytes(raw))

    return breaker


def put_back(name: str, fixture: str) -> Callable[[Path], None]:
    return lambda out: replace_tensor(out, name, original(fixture)[name])


def step(name: str) -> Callable[[Path], None]:
    """Block scales, two codes up each."""
    return lambda out: replace_tensor(out, name, bytes(min(code + 2, 0x7E) for code in raw_tensors(out)[name][3]))


def double_first(out: Path, name: str) -> None:
    raw = raw_tensors(out)[name][3]
    (value,) = struct.unpack("<H", raw[:2])
    replace_tensor(out, name, struct.pack("<H", value + 0x80) + raw[2:])  # one exponent up


def both_wrong(out: Path) -> None:
    """Equal, but neither of IN's."""
    for name in (QKV, Z):
        replace_tensor(out, f"{name}.{GLOBAL}", struct.pack("<f", 12345.0))


BROKEN = {
    "folded: convolution as it was": (LLMC, "exact", put_back(CONV, LLMC)),
    "folded: one weight of the convolution": (LLMC, "exact", lambda out: double_first(out, CONV)),
    "folded: scale as it was": (LLMC, "exact", put_back(f"{QKV}.{GLOBAL}", LLMC)),
    "folded: a block scale": (LLMC, "exact", flip(f"{QKV}.{BLOCKS}")),
    "folded: a block scale of z": (LLMC, "exact", flip(f"{Z}.{BLOCKS}")),
    "folded: a code": (LLMC, "exact", flip(f"{QKV}.weight_packed")),
    "folded: scale of another": (LLMC, "exact", flip(f"{Z}.{GLOBAL}")),
    "folded: down as it was": (FREE, "exact", put_back(f"{SHARED}down_proj.{GLOBAL}", FREE)),
    "folded: down of an expert": (FREE, "exact", put_back(f"{EXPERT}down_proj.{GLOBAL}", FREE)),
    "folded: down off by little": (FREE, "exact", flip(f"{EXPERT}down_proj.{GLOBAL}")),
    "rescaled: blocks as they were": (LLMC, "rescaled", put_back(f"{Z}.{BLOCKS}", LLMC)),
    "rescaled: blocks two steps off": (LLMC, "rescaled", step(f"{Z}.{BLOCKS}")),
    "rescaled: scale as it was": (LLMC, "rescaled", put_back(f"{Z}.{GLOBAL}", LLMC)),
    "rescaled: blocks of qkv": (LLMC, "rescaled", flip(f"{QKV}.{BLOCKS}")),
    "rescaled: both scales wrong": (LLMC, "rescaled", both_wrong),
    "rescaled: the convolution": (LLMC, "rescaled", flip(CONV)),
    "rescaled: input scale": (LLMC, "rescaled", flip(f"{Z}.{INPUT}")),
    "rescaled: code of an expert": (FREE, "rescaled", flip(f"{EXPERT}up_proj.weight_packed")),
}


@pytest.mark.parametrize("case", BROKEN)
def test_verify_finds_what_is_wrong(case: str, outs: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    fixture, profile, breaker = BROKEN[case]
    out = Path(shutil.copytree(outs[fixture, profile], tmp_path / "out"))
    breaker(out)
    result = rewrite.verify(FIXTURES / fixture, out, device="cpu", tokens=1)
    failed = {check.name for check in result.checks if check.verdict == "FAILED"}
    assert failed & {"weights", "untouched"}, case


@pytest.mark.parametrize("profile", ["bf16", "partition"])
def test_other_profiles_change_nothing_and_say_so(profile: str, tmp_path: Path) -> None:
    """A copy, without a manifest: nothing was repaired, and no engine is said to read it better."""
    manifest = rewrite.convert(FIXTURES / LLMC, tmp_path / "out", profile=profile)
    assert not manifest.changed
    assert any("different global scales and stay" in note for note in manifest.notes)
    result = rewrite.verify(FIXTURES / LLMC, tmp_path / "out", device="cpu", tokens=1)
    failed = {check.name: check.problems for check in result.checks if check.verdict == "FAILED"}
    assert failed.keys() == {"weights", "outputs"}
    assert "the modules still have different values" in failed["weights"][0]
    assert "outputs differ from those of the weights of IN" in failed["outputs"][0]
    assert not any(row.change < 0 for row in result.loaders)


def test_an_output_without_the_repair_fails(outs: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    """A copy that claims to be converted."""
    out = Path(shutil.copytree(FIXTURES / LLMC, tmp_path / "out"))
    shutil.copy(outs[LLMC, "exact"] / "rewrite_manifest.json", out)
    result = rewrite.verify(FIXTURES / LLMC, out, device="cpu", tokens=1)
    assert not result.ok
    assert any("still have different values" in problem for check in result.checks for problem in check.problems)
