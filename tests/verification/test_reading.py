"""The pass over the files and the sample of rows: they must not change which fault is seen, and by which check."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

import rewrite
from rewrite.cli.commands import main
from rewrite.quantization.groups import Partition
from rewrite.verification import run as running
from rewrite.verification.reading import first_difference
from rewrite.verification.sample import Sample
from rewrite.verification.values import code_values, decode, encode
from tests.support import FIXTURES, raw_tensors, replace_tensor, shard_of, unfolded, write_shard
from tests.verification.test_verification import QKV, Z, _flip, failed

NVFP4 = FIXTURES / "llmcompressor-qwen3_5-nvfp4"
K, ROWS = 64, 512  # of q, k and z; v has the same


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["verify", *map(str, arguments), "--device", "cpu"])


@pytest.fixture
def tall(tmp_path: Path) -> Path:
    """One group whose partitions have 512 rows, of which a sample is looked at; one row has the largest code."""
    config = json.loads((FIXTURES / "llmcompressor-qwen3_5-text" / "config.json").read_text())
    config |= {"num_hidden_layers": 1, "layer_types": config["layer_types"][:1], "tie_word_embeddings": True}
    config |= {"hidden_size": K, "linear_key_head_dim": 128, "linear_value_head_dim": 128}
    config |= {"linear_num_key_heads": ROWS // 128, "linear_num_value_heads": ROWS // 128}
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    for name, rows, scale in ((QKV, 3 * ROWS, 0.02), (Z, ROWS, 0.01)):
        codes = torch.randint(0, 0x70, (rows, K), generator=generator, dtype=torch.uint8)
        codes[rows - 100, 3] = 0x7E  # 448
        codes[rows - 200] = 1
        tensors[f"{name}.weight"] = ("F8_E4M3", (rows, K), codes.numpy().tobytes())
        tensors[f"{name}.weight_scale"] = ("F32", (1,), struct.pack("<f", scale))
        tensors[f"{name}.input_scale"] = ("F32", (1,), struct.pack("<f", 0.01))
    source = tmp_path / "tall"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    write_shard(source / "model.safetensors", tensors, format="pt")
    return source


@pytest.fixture
def tall_out(tall: Path, tmp_path: Path) -> Path:
    rewrite.convert(tall, tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_fp8_codes_mean_what_torch_says(dtype: str) -> None:
    """All 256, signs of zeros and NaN included."""
    theirs = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}[dtype]
    expected = torch.arange(256, dtype=torch.uint8).view(theirs).float().numpy()
    assert np.array_equal(code_values(dtype), expected, equal_nan=True)
    assert np.array_equal(np.signbit(code_values(dtype)), np.signbit(expected))


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1))
def test_plain_numbers_are_rounded_as_torch_does(values: list[float]) -> None:
    """To nearest even, infinities and subnormal numbers included."""
    found = np.array(values, np.float32)
    for dtype, theirs in (("BF16", torch.bfloat16), ("F16", torch.float16), ("F32", torch.float32)):
        expected = torch.from_numpy(found).to(theirs)
        assert np.array_equal(encode(found, dtype), expected.view(torch.uint8).numpy())
        assert np.array_equal(decode(dtype, encode(found, dtype)), expected.float().numpy())


def test_codes_that_are_not_known_are_refused() -> None:
    """Rather than read as another format."""
    with pytest.raises(rewrite.Unsupported, match="F8_E4M3FNUZ"):
        code_values("F8_E4M3FNUZ")
    with pytest.raises(rewrite.Unsupported, match="F64"):
        encode(np.ones(1, np.float32), "F64")


@given(st.binary(min_size=1, max_size=300), st.data())
def test_the_first_difference_is_the_first(one: bytes, data: st.DataObject) -> None:
    """Wherever others are."""
    at = data.draw(st.integers(0, len(one) - 1))
    other = bytearray(one)
    for place in {at, *data.draw(st.lists(st.integers(at, len(one) - 1)))}:
        other[place] ^= 0xFF
    assert first_difference(one, bytes(other)) == at


@given(st.integers(1, 5000), st.integers(0, 3000), st.integers(1, 600), st.integers(0, 99), st.data())
def test_a_sample_is_rows_of_the_partition(rows: int, start: int, asked: int, seed: int, data: st.DataObject) -> None:
    """In order, without overlaps, with the first, the last and those that are wanted; the same for the same seed."""
    partition = Partition("k", start, start + rows)
    wanted = data.draw(st.lists(st.integers(start, start + rows - 1), max_size=5))
    sample = Sample(asked, seed)
    runs = sample.of("m", partition, wanted)
    chosen = [row for run in runs for row in run]
    assert chosen == sorted(set(chosen))
    assert {start, start + rows - 1, *wanted} <= set(chosen) <= set(range(start, start + rows))
    assert len(chosen) <= max(asked + 15, 8 * 8)
    assert len(chosen) == rows if sample.covers(partition) else len(chosen) > asked - 8
    assert runs == Sample(asked, seed).of("m", partition, wanted)
    assert Sample(None, seed).of("m", partition) == (range(start, start + rows),)


def test_numbers_of_weights_are_about_all_rows_whatever_the_sample(tall: Path, tall_out: Path) -> None:
    """Norms by counts of codes are those of every row; only outputs are about the sample."""
    whole, some = (rewrite.verify(tall, tall_out, device="cpu", rows=rows) for rows in (None, 16))
    assert whole.ok
    assert some.ok
    for one, other in zip(whole.numbers, some.numbers, strict=True):
        for kind in ("weights_before", "weights_fixed", "weights_out"):
            assert getattr(one, kind) == pytest.approx(getattr(other, kind), rel=1e-12)
    assert [row.outputs_before for row in whole.numbers] != [row.outputs_before for row in some.numbers]
    assert "16 rows of each of 4 partitions" in next(c for c in some.checks if c.name == "outputs").summary
    assert "rows" not in next(c for c in whole.checks if c.name == "outputs").summary


def test_rows_with_extreme_codes_are_in_the_sample(tall: Path, tall_out: Path, monkeypatch: Any) -> None:
    """Whatever the seed."""
    from rewrite.verification import outputs

    seen: dict[str, set[int]] = {}

    def rows(self: outputs.RowsToMultiply, module: str, partition: Partition) -> tuple[range, ...]:
        found = real(self, module, partition)
        seen.setdefault(f"{module} {partition.name}", set()).update(row for run in found for row in run)
        return found

    real = outputs.RowsToMultiply.rows
    monkeypatch.setattr(outputs.RowsToMultiply, "rows", rows)
    for seed in range(5):
        seen.clear()
        assert rewrite.verify(tall, tall_out, device="cpu", rows=64, seed=seed).ok
        assert {3 * ROWS - 100, 3 * ROWS - 200} <= seen[f"{QKV} v"]
        assert {ROWS - 100, ROWS - 200} <= seen[f"{Z} z"]


@pytest.mark.parametrize("row", [0, 77, 200, 333, 511])
def test_a_wrong_scale_of_any_row_fails_weights_and_outputs(row: int, tall: Path, tall_out: Path) -> None:
    """Rows that differ are among those that are multiplied, however few are sampled."""
    raw = bytearray(raw_tensors(tall_out)[f"{Z}.weight_scale"][3])
    raw[4 * row : 4 * row + 4] = struct.pack("<f", 1.0)
    replace_tensor(tall_out, f"{Z}.weight_scale", bytes(raw))
    problems = failed(rewrite.verify(tall, tall_out, device="cpu", rows=16))
    assert problems.keys() >= {"weights", "outputs"}
    assert f"{Z}: z, 1 of 512 rows differ" in problems["weights"]


@pytest.mark.parametrize("profile", ["exact", "portable", "bf16"])
@pytest.mark.parametrize("place", [0, 9_999, 20_000, -1])
def test_a_flipped_bit_anywhere_in_a_weight_is_caught_with_the_smallest_sample(
    place: int, profile: str, tall: Path, tmp_path: Path
) -> None:
    """By untouched and weights where codes stay, by weights where they became BF16."""
    out = tmp_path / profile
    rewrite.convert(tall, out, profile=profile)
    _flip(out, f"{QKV}.weight", place, 1)
    for weights_only in (False, True):
        problems = failed(rewrite.verify(tall, out, device="cpu", rows=1, weights_only=weights_only))
        assert f"{QKV}: " in problems["weights"]
        assert "1 of 512 rows differ" in problems["weights"]
        assert ("untouched" in problems) == (profile != "bf16")


def test_quick_compares_the_sample_and_says_so(tall: Path, tall_out: Path) -> None:
    """A row outside the sample is not looked at; one inside is."""
    found = rewrite.verify(tall, tall_out, device="cpu", quick=True, rows=16)
    assert found.ok
    assert found.not_checked == ("untouched", "weights of other rows")
    assert "what the config says of layers" in rewrite.verify(tall, tall_out, weights_only=True).not_checked
    assert "16 rows of each of 4 partitions" in next(c for c in found.checks if c.name == "weights").summary
    rows = {row for run in Sample(16, 0).of(Z, Partition("z", 0, ROWS)) for row in run}
    inside, outside = min(rows), min(set(range(ROWS)) - rows)
    _flip(tall_out, f"{Z}.weight", outside * K, 0)
    assert rewrite.verify(tall, tall_out, device="cpu", quick=True, rows=16).ok
    _flip(tall_out, f"{Z}.weight", inside * K, 0)
    problems = failed(rewrite.verify(tall, tall_out, device="cpu", quick=True, rows=16))
    assert "1 of 16 rows that were compared differ" in problems["weights"]


def test_digests_are_of_all_files_and_of_the_bytes_that_were_compared(vl: Path, tmp_path: Path) -> None:
    """Beside the verdict in JSON and report; the same with any number of workers."""
    out = tmp_path / "out"
    rewrite.convert(vl, out, profile="portable")
    expected = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in out.iterdir()}
    for workers in (1, 5):
        assert rewrite.verify(vl, out, device="cpu", tokens=2, digest=True, workers=workers).digests == expected
    value = json.loads(run(vl, out, "--json", "--digest", "--tokens", 2).stdout)
    assert value["digests"] == expected
    assert json.loads(run(vl, out, "--json", "--tokens", 2).stdout)["digests"] is None
    assert run(vl, out, "--report", tmp_path / "report.md").exit_code == 0
    text = (tmp_path / "report.md").read_text()
    assert all(f"| {name} | `{digest}` |" in text for name, digest in expected.items())
    assert run(vl, out, "--report", tmp_path / "none.md", "--no-digest").exit_code == 0
    none = (tmp_path / "none.md").read_text()
    assert "SHA-256 of the files: not noted" in none and not any(digest in none for digest in expected.values())


def test_digests_exclude_quick(vl: Path, tmp_path: Path) -> None:
    """A report of a quick run has none; asking for both is a usage error."""
    result = run(vl, vl, "--quick", "--digest")
    assert result.exit_code == 2
    assert "every byte of OUT" in result.stderr
    assert run(vl, vl, "--quick", "--report", tmp_path / "report.md").exit_code == 1  # nothing was repaired
    assert "SHA-256 of the files: not noted; --quick" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("source", "profile"),
    [
        (FIXTURES / "llmcompressor-qwen3_5-vl", "exact"),
        (FIXTURES / "llmcompressor-qwen3_5-vl", "dequantized"),
        (FIXTURES / "modelopt-qwen3_5-vl", "portable"),
        (FIXTURES / "fp8-qwen3_5-vl", "dequantized"),
        (NVFP4, "exact"),
        (NVFP4, "rescaled"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_weights_only_needs_neither_torch_nor_compressed_tensors(source: Path, profile: str, tmp_path: Path) -> None:
    """Not even where weights became BF16 or block scales were rescaled."""
    out = tmp_path / "out"
    rewrite.convert(source, out, profile=profile, selection="all")
    program = (
        "import sys, rewrite\n"
        "for name in ('torch', 'compressed_tensors', 'transformers'): sys.modules[name] = None\n"
        "found = rewrite.verify(sys.argv[1], sys.argv[2], weights_only=True)\n"
        "assert found.ok, found.checks\n"
        "print(found.not_checked)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, source, out], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "('what the config says of layers', 'outputs')\n"


def test_weights_only_says_what_it_left_out(vl: Path, tmp_path: Path) -> None:
    """And sees a changed byte all the same."""
    out = tmp_path / "out"
    rewrite.convert(vl, out)
    result = run(vl, out, "--weights-only")
    assert result.exit_code == 0
    assert unfolded(result.stdout).endswith("Not checked: what the config says of layers, outputs.")
    assert "index and headers agree" in result.stdout
    name = next(name for name in rewrite.open_checkpoint(out).tensors if name.endswith("norm.weight"))
    _flip(out, name, 0, 0)
    assert f"{name} differs at byte 0" in unfolded(run(vl, out, "--weights-only").stdout)


def test_a_file_that_changes_while_it_is_read_is_no_verdict(vl: Path, tmp_path: Path) -> None:
    """The verdict would be about other bytes than those of the checkpoint that was opened."""
    out = tmp_path / "out"
    rewrite.convert(vl, out)

    def touch(name: str, check: rewrite.Check | None) -> None:
        if name == "bytes" and check is None:
            os.utime(out / "config.json", ns=(1, 1))

    with pytest.raises(rewrite.StorageError, match="changed while it was read"):
        rewrite.verify(vl, out, device="cpu", on_check=touch, digest=True)


def test_an_interrupted_run_says_what_it_has_shown(vl: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """And that it is no verdict."""
    rewrite.convert(vl, tmp_path / "out")

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "check_weights", interrupt)
    result = run(vl, tmp_path / "out")
    assert result.exit_code == 130
    said = "Completed: structure ok, untouched ok. The remaining checks did not run: OUT is not verified."
    assert said in result.stderr
    monkeypatch.setattr(running, "check_structure", interrupt)
    assert "No check was completed" in run(vl, tmp_path / "out").stderr


def test_each_check_is_told_as_it_begins_and_ends(vl: Path, tmp_path: Path) -> None:
    """In order; progress is in bytes and comes to its end."""
    rewrite.convert(vl, tmp_path / "out")
    told: list[str] = []
    done: list[tuple[int, int]] = []
    found = rewrite.verify(
        vl, tmp_path / "out", device="cpu", tokens=2,
        on_check=lambda name, check: told.append(name if check is None else f"{name} {check.verdict}"),
        progress=lambda *step: done.append(step),
    )  # fmt: skip
    assert found.ok
    assert [each for each in told if " " in each] == [f"{check.name} ok" for check in found.checks]
    assert [each for each in told if " " not in each] == ["structure", "bytes", "weights", "outputs", "engines"]
    totals = list(dict.fromkeys(total for _, total in done))  # the bytes of all files, then of the rows to multiply
    assert totals[0] > 1_000_000 > totals[1]
    assert [max(step for step, of in done if of == total) for total in totals] == totals


@pytest.mark.parametrize("rows", ["0", "-1", "many"])
def test_rows_that_make_no_sense_are_a_usage_error(rows: str, vl: Path) -> None:
    """Exit code 2."""
    assert run(vl, vl, "--rows", rows).exit_code == 2


def test_a_manifest_of_any_size_names_the_profile(vl: Path, tmp_path: Path) -> None:
    """That of 34,000 layers takes 30 MB: it was read as a broken one, and portable judged by the promise of exact."""
    out = tmp_path / "out"
    rewrite.convert(vl, out, profile="portable")
    path = out / "rewrite_manifest.json"
    value = json.loads(path.read_text())
    words = {"profile": "exact", "[{": 'a "quoted" } brace'}  # what must not be taken for the manifest's own
    value["groups"] += [{"name": f"layer {i}", "modules": [words]} for i in range(120_000)]
    path.write_text(json.dumps(value))
    assert path.stat().st_size > 10_000_000
    assert rewrite.verify(vl, out, device="cpu", tokens=2).ok
    path.write_text(path.read_text()[:-1])
    assert failed(rewrite.verify(vl, out, device="cpu", tokens=2)).keys() >= {"structure"}


@pytest.mark.parametrize(
    "text", ['{"profile": "dequantized", "profile": "exact", "selection": "all"}', '{"profile": ', "[]"]
)
def test_a_broken_manifest_promises_nothing(text: str, vl: Path, tmp_path: Path) -> None:
    """OUT is then judged by the strictest promise, that of exact."""
    out = tmp_path / "out"
    rewrite.convert(vl, out, profile="dequantized")
    (out / "rewrite_manifest.json").write_text(text)
    assert "structure" in failed(rewrite.verify(vl, out, device="cpu", tokens=2))


@pytest.mark.parametrize("profile", ["exact", "bf16"])
def test_a_weight_that_moved_to_another_shard_is_compared_all_the_same(
    profile: str, text: Path, tmp_path: Path
) -> None:
    """The pass compares files of the same name. What it did not see is not said to be equal."""
    out = tmp_path / "out"
    rewrite.convert(text, out, profile=profile)
    name = f"{QKV}.weight"
    home = shard_of(out, name).name
    other = next(shard for shard in rewrite.open_checkpoint(out).shards if shard != home)
    raw = raw_tensors(out)
    dtype, shape, data = raw[name][1:]
    raw[name] = (raw[name][0], dtype, shape, bytes([data[0] ^ 1]) + data[1:])
    shards = rewrite.open_checkpoint(out).shards
    for shard in (home, other):
        names = [info.name for info in shards[shard].header.tensors if info.name != name]
        tensors = {each: raw[each][1:] for each in (*names, *([name] if shard == other else []))}
        write_shard(out / shard, tensors, format="pt")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    index["weight_map"][name] = other
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    problems = failed(rewrite.verify(text, out, device="cpu", tokens=2))
    assert f"{name}: moved from {home} to {other}" in problems["structure"]
    assert f"{QKV}: q, 1 of 64 rows differ" in problems["weights"]
