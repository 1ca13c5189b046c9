"""inspect: what it says of real checkpoints, what it finds in broken ones, and that it reads little."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import rewrite
from rewrite.cli.commands import main
from rewrite.loaders.kernel_rules import NEWEST_RUN
from rewrite.loaders.outcome import Outcome
from rewrite.loaders.versions import newest_run
from tests.support import (
    CONVERTIBLE,
    FIXTURES,
    MIXED_PRECISION,
    OTHER_FAMILIES,
    ROOT,
    edit_json,
    raw_tensors,
    replace_tensor,
    row_of,
    shard_of,
    unfolded,
    write_shard,
)

QKV = "model.layers.0.linear_attn.in_proj_qkv"
Z = "model.layers.0.linear_attn.in_proj_z"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["inspect", *map(str, arguments)])


def outcomes(inspection: rewrite.Inspection) -> dict[str, str]:
    return {f"{row.engine.name} {row.engine.versions}": row.as_is.kind for row in inspection.rows}


def test_an_original_is_garbled_and_convert_mends_it(real: Path) -> None:
    """The table that a publisher decides by."""
    inspection = rewrite.inspect_checkpoint(real)
    newest = {row.engine.name: row for row in inspection.rows}
    assert {name: row.as_is.kind for name, row in newest.items()} == {
        "vLLM": "loses precision",
        "SGLang": "loses precision",
        "transformers": "exact",
    }
    for row in newest.values():
        exact = row.converted["exact"]
        assert exact is not None and exact == Outcome("exact", exact.detail)
    assert inspection.findings == ()
    old = outcomes(inspection)["vLLM 0.17.0 to 0.19.1"]
    assert old == ("garbled" if "vl" in real.name else "fails to load")


@pytest.mark.parametrize("fixture", CONVERTIBLE)
@pytest.mark.parametrize("profile", rewrite.PROFILES)
@pytest.mark.parametrize("selection", rewrite.SELECTIONS)
def test_the_prediction_after_convert_is_the_prediction_of_the_converted(
    selection: rewrite.Selection, profile: str, fixture: str, tmp_path: Path
) -> None:
    """The column is computed from the plan: it must be what inspect says of the real output."""
    rewrite.convert(FIXTURES / fixture, tmp_path / "out", profile=profile, selection=selection)
    before, after = (rewrite.inspect_checkpoint(p, selection=selection) for p in (FIXTURES / fixture, tmp_path / "out"))
    assert [row.converted[profile] for row in before.rows] == [row.as_is for row in after.rows]


@pytest.mark.parametrize("fixture", OTHER_FAMILIES)
def test_families_without_the_split_group(fixture: str) -> None:
    """in_proj_qkvz on disk is one matrix with one scale; Llama and Phi-3 have none."""
    inspection = rewrite.inspect_checkpoint(FIXTURES / fixture, selection="qkvz", weights=True)
    assert inspection.findings == () and inspection.refusals == {}
    is_next = fixture == "llmcompressor-qwen3_next"
    names = [f"model.layers.{i}.linear_attn.in_proj_qkvz" for i in range(2) if is_next]
    assert [group.name for group in inspection.groups] == names
    assert all(len(group.parts) == 1 for group in inspection.groups)
    for row in inspection.rows:
        kinds = {outcome.kind for outcome in (row.as_is, *row.converted.values()) if outcome}
        # SGLang from 0.5.11 has four slots for the one scale.
        raises = is_next and row.engine in [loader for loader in rewrite.LOADERS if loader.takes_vectors]
        if "'deepseek_v3'" in row.as_is.detail or "kv_a_proj_with_mqa" in row.as_is.detail:  # test_latent.py
            assert fixture == "llmcompressor-deepseek_v3"
            continue
        if row.as_is.detail == "leaves the scales of the other layers out":
            assert (row.engine.name, inspection.dialect) == ("transformers", "modelopt")
            continue
        assert kinds == ({"exact", "fails to load"} if raises else {"exact"}), row.engine


def test_mixed_precision_is_explained() -> None:
    """Its Gated DeltaNet layers are those that loaders garble; four profiles refuse, with the reason."""
    inspection = rewrite.inspect_checkpoint(FIXTURES / MIXED_PRECISION, selection="all", weights=True)
    assert inspection.dialect == "modelopt MIXED_PRECISION"
    assert inspection.schemes == {"FP8 weights per tensor, static activations": 10, "NVFP4 weights": 9}
    assert inspection.findings == ()
    layers = [(group.kind, [p.name for p in group.parts]) for group in inspection.groups]
    assert layers[:2] == [("in_proj_qkvz", ["q", "k", "v", "z"])] * 2
    assert {group.kind for group in inspection.groups if group.nvfp4} == {"gate_up_proj"}
    assert outcomes(inspection)["transformers 5.23.0+"] == "fails to load"
    assert inspection.refusals.keys() == {"exact", "dynamic", "portable", "dequantized"}
    (vllm,) = [row for row in inspection.rows if row.engine.covers("0.19.1") and row.engine.name == "vLLM"]
    assert (vllm.as_is.kind, vllm.as_is.partitions) == ("garbled", ("in_proj_qkvz.k", "in_proj_qkvz.v"))
    assert vllm.converted["bf16"].kind == "exact", "the fused NVFP4 layers stay, with one global scale each"
    (unrun,) = [row for row in inspection.rows if row.engine.covers("0.5.22") and row.engine.name == "SGLang"]
    assert unrun.converted["bf16"].kind == "not known"
    (qkvz,) = [row for row in rewrite.inspect_checkpoint(FIXTURES / MIXED_PRECISION).rows if row.engine == vllm.engine]
    assert qkvz.converted["bf16"] == Outcome("exact")


def test_every_fused_layer_is_looked_at_when_asked(vl: Path) -> None:
    """A table for each layer, the layers' names beside the partitions that are affected."""
    result = run(vl, "--groups", "all", "--all-engines", "-v")
    assert result.exit_code == 1
    assert "`rewrite convert --groups all`" in unfolded(result.stdout)
    for layer in ("in_proj_qkvz", "self_attn.qkv_proj", "mlp.gate_up_proj"):
        assert layer in result.stdout
    assert "loses precision: in_proj_qkvz z, qkv_proj q k, gate_up_proj gate up" in unfolded(result.stdout)
    assert "garbled: in_proj_qkvz k v (" in unfolded(result.stdout)
    assert json.loads(run(vl, "--groups", "all", "--json").stdout)["selection"] == "all"


def test_a_model_without_the_layer_is_judged_by_the_others(tmp_path: Path) -> None:
    """Llama has no in_proj_qkvz, but layers that are requantized: nobody has to know an option to see and repair it."""
    llama = FIXTURES / "llmcompressor-llama"
    assert run(llama).stdout == run(llama, "--groups", "all").stdout
    assert "loses precision: qkv_proj k v" in run(llama).stdout
    said = run(llama, "--groups", "qkvz")
    assert said.exit_code == 0 and said.stdout.endswith(f"Try --groups all.\n  rewrite inspect {llama} --groups all\n")
    assert rewrite.convert(llama, tmp_path / "OUT").selection == "all"
    assert rewrite.verify(llama, tmp_path / "OUT", device="cpu", tokens=2).ok
    assert run(tmp_path / "OUT").exit_code == 0


def test_groups_show_rows_scales_and_spread(text: Path) -> None:
    """How far apart the partitions' scales are."""
    group = rewrite.inspect_checkpoint(text).groups[0]
    assert [(p.name, p.rows, p.layout) for p in group.parts] == [
        ("q", 64, "tensor"),
        ("k", 64, "tensor"),
        ("v", 128, "tensor"),
        ("z", 128, "tensor"),
    ]
    raw = raw_tensors(text)
    qkv, z = (struct.unpack("<f", b"\0\0" + raw[f"{name}.weight_scale"][3])[0] for name in (QKV, Z))
    assert [p.scale for p in group.parts] == [qkv, qkv, qkv, z]
    assert group.spread == qkv / z


def test_neighboring_versions_with_the_same_outcomes_are_one_row(vl: Path) -> None:
    """Also where --loader leaves some out: a version that it does not name is not spoken of."""
    assert "\nvLLM 0.20.0+  " in run(vl, "--all-engines").stdout
    affected = run(vl, "--for", "vllm@0.20.0", "--loader", "vllm@0.32.0").stdout
    assert all(f"\n{row_of(asked)}  " in affected for asked in ("vllm@0.20.0", "vllm@0.32.0"))
    assert "0.21.0 to 0.26.0 (loses precision)" in unfolded(affected)


def test_what_convert_refuses_is_explained(copy_of: Callable[[str], Path]) -> None:
    """What cannot be converted can still be looked at."""
    directory = copy_of("modelopt-qwen3_5-vl")
    edit_json(directory / "config.json", quantization_config={"quant_method": "torchao"})
    result = run(directory, "-v")
    assert result.exit_code == 0, "not known is neither affected nor served"
    assert run(directory, "--fail-on", "unknown").exit_code == 1
    assert "not known" in result.stdout
    assert "`convert --profile exact` refuses" in unfolded(result.stdout)


def test_exit_codes_and_the_gate(text: Path, tmp_path: Path) -> None:
    """1 when a known loader is hurt; --loader narrows the question."""
    assert run(text).exit_code == 1
    assert run(text, "--loader", "transformers").exit_code == 0
    rewrite.convert(text, tmp_path / "out")
    assert run(tmp_path / "out", "--loader", "vllm@0.32").exit_code == 0
    assert run(tmp_path / "out", "--loader", "vllm@0.32", "--loader", "sglang@0.5.10").exit_code == 1
    assert run(text, "--loader", "vllm@0.1").exit_code == 2
    assert run(tmp_path).exit_code == 3
    assert run(tmp_path / "gone").exit_code == 4


def test_json_holds_everything(text: Path) -> None:
    """One document, the same figures."""
    value = json.loads(run(text, "--json").stdout)
    assert value["dialect"] == "compressed-tensors"
    (newest,) = [row for row in value["loaders"] if f"{row['loader']} {row['versions']}" == row_of("vllm@0.32.0")]
    assert newest["as_is"]["kind"] == "loses precision"
    assert newest["converted"]["exact"]["kind"] == "exact"
    assert value["groups"][0]["spread"] > 1
    assert all(row["source"] for row in value["loaders"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
@pytest.mark.parametrize("name", [f"{Z}.weight_scale", "model.layers.2.self_attn.q_proj.input_scale"])
def test_scales_that_no_loader_survives(name: str, value: float, copy: Path) -> None:
    """Anywhere in the checkpoint, with file and tensor."""
    replace_tensor(copy, name, struct.pack("<f", value)[2:])
    (finding,) = rewrite.inspect_checkpoint(copy).findings
    assert name in finding.where
    assert ".safetensors" in finding.where
    assert run(copy, "--loader", "transformers").exit_code == 1


def test_quantized_in_part(copy: Path) -> None:
    """AngelSlim quantizes in_proj_qkv but not in_proj_z by default."""
    replace_tensor(copy, f"{Z}.weight", bytes(128 * 64 * 2), (128, 64), "BF16")
    inspection = rewrite.inspect_checkpoint(copy)
    assert any("quantized in part" in finding.what for finding in inspection.findings)
    assert outcomes(inspection)[row_of("vllm@0.32.0")] == "fails to load"
    assert "exact" in inspection.refusals


def _rename(directory: Path, old: str, new: str) -> None:
    shard = shard_of(directory, old)
    raw = raw_tensors(directory)
    tensors = {(new if t.name == old else t.name): raw[t.name][1:] for t in shard.header.tensors}
    write_shard(directory / shard.name, tensors, format="pt")
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    index["weight_map"][new] = index["weight_map"].pop(old)
    edit_json(directory / "model.safetensors.index.json", weight_map=index["weight_map"])


def test_orphans(copy: Path) -> None:
    """A scale without its weight, a weight without its scale."""
    _rename(copy, "model.layers.0.mlp.up_proj.weight_scale", "model.layers.0.mlp.lost_proj.weight_scale")
    found = {finding.what: finding.where for finding in rewrite.inspect_checkpoint(copy).findings}
    assert "lost_proj.weight_scale" in found["a scale without its weight"]
    assert "up_proj" in found["a quantized weight without its scale: no weight_scale"]


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_nan_codes_are_found_when_weights_are_read(code: int, copy: Path) -> None:
    """Only with --weights: it reads everything."""
    name = f"{Z}.weight"
    data = bytearray(raw_tensors(copy)[name][3])
    data[100] = data[-1] = code
    replace_tensor(copy, name, bytes(data))
    assert rewrite.inspect_checkpoint(copy).findings == ()
    (finding,) = rewrite.inspect_checkpoint(copy, weights=True).findings
    assert finding.what.startswith("2 FP8 NaN codes") and name in finding.where
    assert "NaN codes" in run(copy, "--weights").stdout


def test_healthy_weights_have_no_nan_codes(real: Path) -> None:
    """Real producers write none."""
    assert rewrite.inspect_checkpoint(real, weights=True).findings == ()


def test_unknown_architectures_are_reported(copy: Path) -> None:
    """Tell-tale names, no entry in the table."""
    edit_json(copy / "config.json", model_type="qwen9")
    inspection = rewrite.inspect_checkpoint(copy, selection="qkvz")
    assert "unknown architecture 'qwen9'" in inspection.findings[0].what
    assert inspection.groups == ()


def test_a_checkpoint_without_fused_groups(copy: Path) -> None:
    """Nothing to say of it: not that all is well."""
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    raw = raw_tensors(copy)
    kept = {name: value[1:] for name, value in raw.items() if "linear_attn" not in name}
    for path in copy.glob("*.safetensors"):
        path.unlink()
    write_shard(copy / "model.safetensors", kept, format="pt")
    edit_json(
        copy / "model.safetensors.index.json", **{**index, "weight_map": dict.fromkeys(kept, "model.safetensors")}
    )
    result = run(copy, "--loader", "vllm@0.32.0", "--groups", "qkvz")
    assert result.exit_code == 0
    assert "No in_proj_qkvz layer here, so nothing was judged. Try --groups all." in result.stdout
    assert json.loads(run(copy, "--json", "--groups", "qkvz").stdout)["judged"] is False
    assert json.loads(run(copy, "--json").stdout)["judged"] is True


def test_scales_are_missed_without_fused_groups_too() -> None:
    """transformers leaves the scales of ModelOpt's dialect out, whatever layers they belong to."""
    result = run(FIXTURES / "modelopt-llama", "--loader", "transformers", "--groups", "qkvz")
    assert result.exit_code == 1
    assert "leaves the scales of the other layers out" in unfolded(result.stdout)


def test_neither_torch_nor_weights_are_needed(vl: Path) -> None:
    """Seconds on 400 GB: no tensor library is imported."""
    script = (
        "import sys; from rewrite.cli.commands import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'compressed_tensors', 'numpy', 'safetensors'} & sys.modules.keys()"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", script, "inspect", str(vl)], check=True, env=environment)


KERNELS = f"kernels of vLLM {{}} were not run: assumed to be those of {NEWEST_RUN['vLLM']}"


def test_a_version_that_was_only_loaded_has_kernels_that_are_assumed(vl: Path) -> None:
    """There is no wheel of vLLM 0.33.0 for CPU."""
    result = run(vl, "--loader", "vllm@0.33.0", "--json")
    assert json.loads(result.stdout)["assumptions"] == [KERNELS.format("0.33.0")]


def test_versions_that_were_not_run_are_said_to_be_assumed(vl: Path) -> None:
    """On stderr and in JSON; a version that was run is not."""
    result = run(vl, "--loader", "vllm@99.0", "--json")
    said = [f"vLLM 99.0 was not run: assumed to be like {newest_run('vLLM')}", KERNELS.format("99.0")]
    assert all(text in result.stderr for text in said)
    assert json.loads(result.stdout)["assumptions"] == said
    assert json.loads(run(vl, "--loader", "vllm@0.32.0", "--json").stdout)["assumptions"] == []


def _fill(copy: Path, name: str, fill: Callable[[int, int], int]) -> None:
    """Make each byte of a tensor from its number and the byte that was there."""
    info = rewrite.open_checkpoint(copy).tensors[name]
    data = raw_tensors(copy)[name][3]
    assert info.nbytes == len(data)
    replace_tensor(copy, name, bytes(fill(i, byte) for i, byte in enumerate(data)))


@pytest.mark.parametrize(
    ("name", "width", "zero"),
    [("mlp.up_proj.weight", 1, 0x80), ("linear_attn.in_proj_a.weight", 2, 0)],
)
def test_rows_of_zeros_are_found_when_weights_are_read(name: str, width: int, zero: int, copy: Path) -> None:
    """In FP8 and in plain layers; a minus sign does not hide them (BitNet issue #608: whole tensors were zero)."""
    full = next(each for each in rewrite.open_checkpoint(copy).tensors if each.endswith(f"0.{name}"))
    columns = rewrite.open_checkpoint(copy).tensors[full].shape[1] * width
    _fill(copy, full, lambda i, byte: zero if columns <= i < 3 * columns else byte)
    assert rewrite.inspect_checkpoint(copy).findings == ()
    (finding,) = rewrite.inspect_checkpoint(copy, weights=True).findings
    assert full in finding.where
    assert finding.what.startswith("2 of ")
    assert finding.what.endswith(" rows are nothing but zeros")
    assert run(copy, "--weights").exit_code == 1


def test_codes_that_hardly_use_the_range_are_found(copy: Path) -> None:
    """A scale 32 times too large: five bits of range are lost, whoever loads it."""
    full = next(each for each in rewrite.open_checkpoint(copy).tensors if each.endswith("mlp.up_proj.weight"))
    _fill(copy, full, lambda i, byte: (byte & 0x80) | min(byte & 0x7F, 0x56))  # 14
    (finding,) = rewrite.inspect_checkpoint(copy, weights=True).findings
    assert finding.what == "the largest FP8 code stands for 14 of 448: its scale is 32 times too large"


def test_a_vocabulary_may_be_padded(copy: Path) -> None:
    """Rows of zeros in tables of embeddings and in lm_head are no finding."""
    names = [n for n in rewrite.open_checkpoint(copy).tensors if "embed_tokens" in n or n == "lm_head.weight"]
    assert names
    for name in names:
        _fill(copy, name, lambda i, byte: 0 if i < 64 else byte)
    assert rewrite.inspect_checkpoint(copy, weights=True).findings == ()
