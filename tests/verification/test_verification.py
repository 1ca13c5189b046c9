"""verify: it holds for what convert wrote, and catches OUT broken in every way that it promises to see."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rewrite
from rewrite.cli.commands import main
from rewrite.loaders.outcome import SEVERITY, Kind, Outcome
from rewrite.loaders.ranges import Engine
from rewrite.loaders.versions import find_loaders
from rewrite.promise import Promise
from rewrite.verification import gemm, oracle
from rewrite.verification.expected import expect
from rewrite.verification.reader import GroupReader
from rewrite.verification.result import EngineChange
from rewrite.verification.run import _check_engines
from tests.support import (
    compressed_tensors_schemes,
    edit_json,
    raw_tensors,
    replace_tensor,
    shard_of,
    unfolded,
    write_shard,
)

QKV = "model.layers.0.linear_attn.in_proj_qkv"
Z = "model.layers.0.linear_attn.in_proj_z"
OTHER = "model.layers.0.mlp.up_proj"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["verify", *map(str, arguments)])


def failed(verification: rewrite.Verification) -> dict[str, str]:
    """The checks that failed, with all their problems."""
    return {c.name: "\n".join(c.problems) for c in verification.checks if c.verdict == "FAILED"}


@pytest.fixture
def out(text: Path, tmp_path: Path) -> Path:
    """The smallest fixture, converted."""
    rewrite.convert(text, tmp_path / "out")
    return tmp_path / "out"


def test_what_convert_writes_holds(real: Path, tmp_path: Path) -> None:
    """Every check, every fixture; OUT is the truth exactly, and the fixed loader's z is not."""
    rewrite.convert(real, tmp_path / "out")
    found = rewrite.verify(real, tmp_path / "out", device="cpu")
    assert {check.name: check.verdict for check in found.checks} == dict.fromkeys(
        ("structure", "untouched", "weights", "outputs", "engines"), "ok"
    )
    assert found.numbers and all(row.weights_out == 0 and row.outputs_out < 1e-14 for row in found.numbers)
    for row in found.numbers:
        assert (row.weights_before > 5) == (row.partition in "kv")
        assert (0.01 < row.weights_fixed < 0.05) == (row.partition == "z")
        assert (row.bound_used is not None) == (row.partition == "z")
        assert row.bound_used is None or 0.05 < row.bound_used <= 1


def test_an_identical_copy_was_not_repaired(real: Path, tmp_path: Path) -> None:
    """Nothing changed, nothing worse, and nothing better; a copy of what needs no repair holds."""
    shutil.copytree(real, tmp_path / "same")
    found = failed(rewrite.verify(real, tmp_path / "same", device="cpu"))
    assert found.keys() == {"structure"}
    assert "nothing was repaired: " in found["structure"]
    rewrite.convert(real, tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    assert rewrite.verify(tmp_path / "out", tmp_path / "copy", device="cpu").ok


def test_the_original_under_the_loader_before_the_fix_fails_on_k_and_v(vl: Path) -> None:
    """By a factor near 9 and more (LOADERS: 8.95 for equal ranges); the tool says which partitions and why."""
    (before,) = find_loaders("vllm@0.19.1")
    found = rewrite.verify(vl, vl, device="cpu", loader=before)
    assert set(failed(found)) == {"structure", "outputs", "engines"}  # nothing was repaired
    off = {row.partition for row in found.numbers if row.verdict == "FAILED"}
    assert off == {"k", "v"}
    assert all(8 < row.weights_out < 25 for row in found.numbers if row.partition in off)
    assert "in_proj_qkvz: k, outputs are off by" in failed(found)["outputs"]


def _flip(directory: Path, name: str, byte: int, bit: int) -> None:
    shard, info = shard_of(directory, name), rewrite.open_checkpoint(directory).tensors[name]
    path = directory / shard.name
    data = bytearray(path.read_bytes())
    data[shard.header.size + info.start + byte % info.nbytes] ^= 1 << bit
    path.write_bytes(data)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_one_flipped_bit_in_any_tensor_is_caught(data: st.DataObject, text: Path, out: Path, tmp_path: Path) -> None:
    """By the check that owns it, which names the tensor: scales of groups by weights, all else by untouched."""
    names = sorted(rewrite.open_checkpoint(out).tensors)
    name = data.draw(st.sampled_from(names) | st.sampled_from([n for n in names if n.endswith("weight_scale")]))
    broken = Path(shutil.copytree(out, tmp_path / "broken", dirs_exist_ok=True))
    byte = data.draw(st.integers(0, rewrite.open_checkpoint(out).tensors[name].nbytes - 1))
    _flip(broken, name, byte, data.draw(st.integers(0, 7)))
    problems = failed(rewrite.verify(text, broken, device="cpu", tokens=2))
    if name.endswith(("in_proj_qkv.weight_scale", "in_proj_z.weight_scale")):
        assert name.removesuffix(".weight_scale") in problems["weights"]
        assert "untouched" not in problems
    else:
        assert f"{name} differs at byte {byte}" in problems["untouched"].splitlines()[0]


def test_a_scale_off_by_a_lot_fails_the_outputs_too(text: Path, out: Path) -> None:
    """Not only bit equality notices."""
    rows = raw_tensors(out)[f"{Z}.weight_scale"][3]
    one = struct.pack("<f", 1.0)[2:]
    replace_tensor(out, f"{Z}.weight_scale", one + rows[2:-2] + one)
    problems = failed(rewrite.verify(text, out, device="cpu"))
    assert problems.keys() >= {"weights", "outputs"}
    assert "2 of 128 rows differ" in problems["weights"]
    assert "in_proj_qkvz: z" in problems["outputs"]


def swapped_rows(directory: Path) -> None:
    data = raw_tensors(directory)[f"{QKV}.weight"][3]
    replace_tensor(directory, f"{QKV}.weight", data[64:128] + data[:64] + data[128:])


def swapped_scale_rows(directory: Path) -> None:
    """Rows of q given z's scale would be silent in a check of shapes."""
    raw = raw_tensors(directory)
    qkv, z = raw[f"{QKV}.weight_scale"][3], raw[f"{Z}.weight_scale"][3]
    replace_tensor(directory, f"{QKV}.weight_scale", z[:2] + qkv[2:])


def other_file(directory: Path) -> None:
    (directory / "tokenizer.json").write_text((directory / "tokenizer.json").read_text().replace("a", "b", 1))


def longer_file(directory: Path) -> None:
    with (directory / "recipe.yaml").open("a") as file:
        file.write("#")


def missing_file(directory: Path) -> None:
    (directory / "recipe.yaml").unlink()


def extra_file(directory: Path) -> None:
    (directory / "evil.py").touch()


def config_key(directory: Path) -> None:
    edit_json(directory / "config.json", rms_norm_eps=1e-5)


def config_order(directory: Path) -> None:
    value = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(dict(reversed(value.items())), indent=2))


def _edit_quantization(directory: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads((directory / "config.json").read_text())
    edit(value["quantization_config"])
    (directory / "config.json").write_text(json.dumps(value, indent=2))


def wrong_strategy(directory: Path) -> None:
    _edit_quantization(directory, lambda q: q["config_groups"]["group_1"]["weights"].update(strategy="tensor"))


def group_missing(directory: Path) -> None:
    _edit_quantization(directory, lambda q: q["config_groups"].pop("group_1"))


def target_misses_the_fused_name(directory: Path) -> None:
    target = [r"re:.*linear_attn\.in_proj_(qkv|z)$"]
    _edit_quantization(directory, lambda q: q["config_groups"]["group_1"].update(targets=target))


def target_misses_z(directory: Path) -> None:
    target = [r"re:.*linear_attn\.in_proj_(qkv|qkvz)$"]
    _edit_quantization(directory, lambda q: q["config_groups"]["group_1"].update(targets=target))


def target_too_wide(directory: Path) -> None:
    target = [r"re:.*linear_attn\..*proj.*$"]
    _edit_quantization(directory, lambda q: q["config_groups"]["group_1"].update(targets=target))


def ignore_grows(directory: Path) -> None:
    _edit_quantization(directory, lambda q: q["ignore"].append("re:.*up_proj"))


def nonsense_config(directory: Path) -> None:
    _edit_quantization(directory, lambda q: q["config_groups"]["group_1"]["weights"].update(strategy="nonsense"))


def index_edit(directory: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = directory / "model.safetensors.index.json"
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value, indent=2))


def stale_total_size(directory: Path) -> None:
    index_edit(directory, lambda v: v["metadata"].update(total_size=1))


def stale_index_entry(directory: Path) -> None:
    index_edit(directory, lambda v: v["weight_map"].update({"gone.weight": next(iter(v["weight_map"].values()))}))


def index_metadata(directory: Path) -> None:
    index_edit(directory, lambda v: v["metadata"].update(extra=1))


def _reshard(directory: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    shard = shard_of(directory, f"{OTHER}.weight")
    raw = raw_tensors(directory)
    tensors = {t.name: raw[t.name][1:] for t in shard.header.tensors}
    edit(tensors)
    write_shard(directory / shard.name, tensors, format="pt")
    index_edit(directory, lambda v: v.update(weight_map={k: s for k, s in v["weight_map"].items() if s != shard.name}))
    index_edit(directory, lambda v: v["weight_map"].update(dict.fromkeys(tensors, shard.name)))


def missing_tensor(directory: Path) -> None:
    _reshard(directory, lambda tensors: tensors.pop(f"{OTHER}.input_scale"))


def two_missing_tensors(directory: Path) -> None:
    _reshard(directory, lambda tensors: [tensors.pop(f"{OTHER}.{kind}") for kind in ("input_scale", "weight_scale")])


def extra_tensor(directory: Path) -> None:
    _reshard(directory, lambda tensors: tensors.update({"extra": ("F8_E4M3", (1,), b"x")}))


def metadata_lost(directory: Path) -> None:
    shard = shard_of(directory, f"{OTHER}.weight")
    raw = raw_tensors(directory)
    write_shard(directory / shard.name, {t.name: raw[t.name][1:] for t in shard.header.tensors})


def other_dtype(directory: Path) -> None:
    data = raw_tensors(directory)["model.norm.weight"][3]
    replace_tensor(directory, "model.norm.weight", data, dtype="F16")


def other_shape(directory: Path) -> None:
    data = raw_tensors(directory)[f"{OTHER}.weight"][3]
    replace_tensor(directory, f"{OTHER}.weight", data, (len(data) // 32, 32))


def scale_of_another_shape(directory: Path) -> None:
    data = raw_tensors(directory)[f"{Z}.weight_scale"][3]
    replace_tensor(directory, f"{Z}.weight_scale", data, (len(data) // 2,))


def truncated_shard(directory: Path) -> None:
    shard = sorted(directory.glob("*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 3)


def missing_shard(directory: Path) -> None:
    sorted(directory.glob("*.safetensors"))[1].unlink()


def group_module_missing(directory: Path) -> None:
    shard = shard_of(directory, f"{Z}.weight_scale")
    raw = raw_tensors(directory)
    tensors = {t.name: raw[t.name][1:] for t in shard.header.tensors if t.name != f"{Z}.weight_scale"}
    write_shard(directory / shard.name, tensors, format="pt")
    index_edit(directory, lambda v: v["weight_map"].pop(f"{Z}.weight_scale"))


def test_problems_are_in_the_order_of_names(tmp_path: Path, text: Path) -> None:
    """The same in every run, where only the first of many are kept, too."""
    rewrite.convert(text, tmp_path / "out")
    names = [f"{number:02}.txt" for number in range(15)]
    for name in names:
        (tmp_path / "out" / name).touch()
    found = rewrite.verify(text, tmp_path / "out", weights_only=True).checks
    said = [problem for check in found if check.name == "untouched" for problem in check.problems]
    assert said == [f"{name}: not in the source" for name in names]


@pytest.mark.parametrize(
    ("breaker", "owner", "named"),
    [
        (swapped_rows, "untouched", f"{QKV}.weight differs"),
        (swapped_scale_rows, "weights", f"{QKV}: q, 1 of 64 rows"),
        (other_file, "untouched", "tokenizer.json: differs at byte 30"),
        (longer_file, "untouched", "recipe.yaml"),
        (missing_file, "untouched", "recipe.yaml: missing"),
        (extra_file, "untouched", "evil.py: not in the source"),
        (config_key, "untouched", "config.json: differs outside"),
        (config_order, "untouched", "config.json: differs outside"),
        (metadata_lost, "untouched", "metadata differs"),
        (index_metadata, "untouched", "index.json: differs outside"),
        (wrong_strategy, "structure", f"{QKV} has strategy tensor"),
        (group_missing, "structure", f"{QKV} has strategy tensor"),
        (target_misses_the_fused_name, "structure", "in_proj_qkvz strategy tensor, its scales are channel"),
        (target_misses_z, "structure", f"{Z} has strategy tensor"),
        (target_too_wide, "structure", "out_proj has another scheme"),
        (ignore_grows, "structure", "up_proj has another scheme"),
        (nonsense_config, "structure", "cannot parse"),
        (stale_total_size, "structure", "total_size is 1"),
        (stale_index_entry, "structure", "gone.weight"),
        (missing_tensor, "structure", f"{OTHER}.input_scale: missing"),
        (two_missing_tensors, "structure", f"{OTHER}.weight_scale: missing"),
        (two_missing_tensors, "structure", f"{OTHER}.input_scale: missing"),
        (extra_tensor, "structure", "extra: not in the source"),
        (other_dtype, "structure", "model.norm.weight: BF16 [64] became F16"),
        (other_shape, "structure", f"{OTHER}.weight: F8_E4M3 [64, 64] became"),
        (scale_of_another_shape, "structure", f"{Z}.weight_scale: BF16 [1] became"),
        (truncated_shard, "structure", "model-00002"),
        (missing_shard, "structure", "model-00002"),
        (group_module_missing, "structure", f"{Z}.weight_scale: missing"),
    ],
)
def test_every_way_to_break_out_is_caught_by_its_owner(
    breaker: Callable[[Path], None], owner: str, named: str, text: Path, out: Path
) -> None:
    """And named in the report."""
    breaker(out)
    problems = failed(rewrite.verify(text, out, device="cpu", tokens=2))
    assert named in problems[owner]
    result = run(text, out, "--device", "cpu", "--tokens", "2")
    assert result.exit_code == 1
    assert named in unfolded(result.stdout)
    assert f"{out} FAILED" in unfolded(result.stdout)


def test_quick_says_what_it_left_out(text: Path, out: Path) -> None:
    """A bit outside the groups is not seen then; one inside still is."""
    _flip(out, f"{OTHER}.weight", 0, 0)
    result = run(text, out, "--quick", "--device", "cpu")
    assert result.exit_code == 0
    assert "Not checked: untouched." in result.stdout
    _flip(out, f"{QKV}.weight", 0, 0)
    assert "weights" in failed(rewrite.verify(text, out, quick=True, device="cpu"))


def test_what_cannot_be_compared_does_not_hold(text: Path, out: Path) -> None:
    """A config whose sizes do not fit the groups: with --quick no other check looks at it."""
    edit_json(out / "config.json", linear_num_value_heads=2)
    found = rewrite.verify(text, out, quick=True, device="cpu")
    assert not found.ok
    assert "not in a form that convert writes" in failed(found)["weights"]


def test_report_and_json(vl: Path, tmp_path: Path) -> None:
    """A table of every layer and partition; no path of this machine in what is published."""
    rewrite.convert(vl, tmp_path / "out")
    result = run(vl, tmp_path / "out", "--device", "cpu", "--json", "--report", tmp_path / "report.md")
    value = json.loads(result.stdout)
    assert value["ok"] is True
    assert len(value["numbers"]) == 12
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# Verification of out\n\n**out is verified. Bytes: as the conversion promises.")
    rows = [line for line in text.splitlines() if line.startswith("| model.language_model.")]
    assert len(rows) == 12 + 3  # partitions with their errors, groups of IN with their scales
    assert str(tmp_path) not in text
    assert str(vl.parent) not in text


def test_exit_codes(text: Path, out: Path, tmp_path: Path) -> None:
    """2 usage, 3 a source that is refused, 4 a report that cannot be written."""
    assert run(text, out, "--device", "tpu").exit_code == 2
    assert run(tmp_path, out, "--device", "cpu").exit_code == 3
    assert run(text, out, "--device", "cpu", "--report", tmp_path / "gone" / "r.md").exit_code == 4
    assert run(text, out, "--loader", "nonesuch").exit_code == 2
    assert unfolded(run(text, out, "--device", "cpu", "-q").stdout).startswith(f"{out} is verified.")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_gpu_that_is_not_there_is_a_usage_error(text: Path, out: Path) -> None:
    """Not a traceback of torch's."""
    result = run(text, out, "--device", "cuda")
    assert result.exit_code == 2
    assert "no such device" in result.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_outputs_hold_on_cuda(real: Path, tmp_path: Path) -> None:
    """torch._scaled_mm: per tensor on one side, per row on the other."""
    rewrite.convert(real, tmp_path / "out")
    found = rewrite.verify(real, tmp_path / "out", device="cuda")
    assert found.ok, failed(found)


@given(st.integers(-14, 1), st.floats(1e-4, 1), st.integers(0, 2**31))
def test_the_requantization_bound_is_a_bound(exponent: int, ratio: float, seed: int) -> None:
    """For scales from 2^-14 to 2 and partitions down to a ten-thousandth of the largest scale; and it is not idle."""
    largest = 2.0**exponent
    codes = torch.randint(0, 256, (16, 64), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0  # no NaN
    scale = torch.tensor(ratio * largest, dtype=torch.float32)
    rows = oracle.Scaled(codes.view(oracle.FP8), scale.expand(16, 1))
    served = oracle.requantized(rows, float(scale), largest)
    bound = oracle.requantization_bound(rows, largest)
    moved = (served.value() - rows.value()).abs()
    assert (moved <= bound * (1 + 1e-6)).all()
    assert (bound <= rows.value().abs() * 2.0**-3 + 2.0**-9 * largest + 2.0**-24).all()


@given(st.floats(2.0**-30, 2.0), st.integers(0, 2**31))
def test_going_through_float16_to_the_same_scale(scale: float, seed: int) -> None:
    """Changes nothing for scales from 2^-15; below, no more than the bound."""
    codes = torch.randint(0, 256, (16, 64), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0
    exact = float(torch.tensor(scale, dtype=torch.float32))
    rows = oracle.Scaled(codes.view(oracle.FP8), torch.tensor(exact).expand(16, 1))
    moved = (oracle.requantized(rows, exact, exact).value() - rows.value()).abs()
    bound = oracle.half_precision_bound(rows, exact)
    assert (moved <= (0 if bound is None else bound)).all()


def test_activations_look_like_the_real_thing() -> None:
    """Seeded, outlier channels, largest value at what the scale was calibrated for."""
    x = gemm.activations(256, 8, 1, 0.01)
    assert torch.equal(x, gemm.activations(256, 8, 1, 0.01))
    assert not torch.equal(x, gemm.activations(256, 8, 2, 0.01))
    assert x.abs().max().item() == pytest.approx(4.48, rel=1e-2)
    per_channel = x.abs().amax(0).float()
    assert (per_channel > 5 * per_channel.median()).sum() == 2
    for scale in (0.01, None):
        assert ((gemm.quantize(x, scale).value() - x.double()).norm() / x.double().norm()).item() < 0.04


def test_compressed_tensors_own_decompressor_agrees(real: Path, tmp_path: Path) -> None:
    """A second opinion on the dequantized weights of IN and OUT."""
    from compressed_tensors.quantization.lifecycle.forward import dequantize
    from safetensors import safe_open

    from rewrite.quantization.groups import find_groups

    rewrite.convert(real, tmp_path / "out")
    for directory in (real, tmp_path / "out"):
        checkpoint, schemes = rewrite.open_checkpoint(directory), compressed_tensors_schemes(directory)
        for group in find_groups(checkpoint).select("qkvz"):
            reader = GroupReader(checkpoint, group)
            for partition, module in reader.partitions():
                ours = torch.cat(
                    [
                        torch.from_numpy(rows.value())
                        for rows in reader.chunks(module, [range(partition.start, partition.stop)])
                    ]
                )
                stored = {}
                for kind in ("weight", "weight_scale"):
                    path = directory / checkpoint.tensors[f"{module}.{kind}"].shard
                    with safe_open(path, "pt") as file:
                        stored[kind] = file.get_tensor(f"{module}.{kind}").double()
                theirs = dequantize(stored["weight"], stored["weight_scale"], args=schemes[module].weights)
                assert torch.equal(ours, theirs[partition.start : partition.stop].double())


def engine(name: str, before: Kind, after: Kind, **facts: Any) -> EngineChange:
    change = SEVERITY.index(after) - SEVERITY.index(before)
    outcomes = {"IN": Outcome(before), "OUT": Outcome(after, f"as {name} is")}
    return EngineChange(Engine(name, "1", None, ""), outcomes, change=change, **facts)


@pytest.mark.parametrize(
    ("rows", "verdict", "said"),
    [
        ([engine("a", "garbled", "exact", asked=True)], "ok", "a 1+: exact"),
        ([engine("a", "exact", "loses precision", asked=True)], "FAILED", "a 1+: loses precision, was exact"),
        ([engine("a", "garbled", "garbled", asked=True)], "FAILED", "a 1+: garbled, as before"),
        ([engine("a", "exact", "not known", asked=True)], "skipped", "not known"),
        (
            [engine("a", "not known", "not known", asked=True), engine("b", "exact", "fails to load")],
            "skipped",
            "not known: as a is",
        ),
        ([engine("a", "exact", "exact", asked=True), engine("b", "exact", "garbled")], "ok", "not asked for: b 1+"),
        (
            [engine("a", "exact", "exact", asked=True), engine("b", "exact", "not known", asked=True)],
            "ok",
            "what b 1+ makes of OUT",
        ),
        ([engine("a", "garbled", "exact"), engine("b", "exact", "garbled")], "FAILED", "b 1+: garbled, was exact"),
        ([engine("a", "garbled", "exact"), engine("b", "exact", "garbled", judged=False)], "ok", "1 read it better"),
        ([engine("a", "garbled", "exact", does_not_run=True)], "ok", "0 read it better"),
    ],
)
def test_when_engines_fail_a_conversion(rows: list[EngineChange], verdict: str, said: str, text: Path) -> None:
    """Those that were asked for must serve OUT, and no worse than IN; else none that the profile is made for may be
    worse off."""
    checkpoint = rewrite.open_checkpoint(text)
    expected = expect(checkpoint, checkpoint, {"exact": Promise("channel")})
    found = _check_engines(tuple(rows), expected, "cuda")
    assert found.verdict == verdict
    assert said in " ".join((found.summary, *found.problems, found.left_out))
