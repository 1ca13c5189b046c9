"""The main job on real checkpoints: what changes, and that nothing else does."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import rewrite
from tests.support import QKVZ, compressed_tensors_schemes, raw_tensors, tree

SCALES = ("in_proj_qkv.weight_scale", "in_proj_z.weight_scale")


@pytest.fixture
def out(real: Path, tmp_path: Path) -> Path:
    """Each real checkpoint, converted."""
    rewrite.convert(real, tmp_path / "out")
    return tmp_path / "out"


def test_scales_become_explicit_and_all_else_is_byte_identical(real: Path, out: Path) -> None:
    """``[1]`` becomes ``[N, 1]`` of the same bits; every other tensor is the same bytes in the same shard."""
    before, after = raw_tensors(real), raw_tensors(out)
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {name for name in before if name.endswith(SCALES)}
    for name in changed:
        shard, dtype, shape, data = before[name]
        rows = before[name.removesuffix("_scale")][2][0]
        assert shape == (1,)
        assert after[name] == (shard, dtype, (rows, 1), data * rows)


def test_every_file_without_a_changed_tensor_is_byte_identical(real: Path, out: Path) -> None:
    """Tokenizer, recipe and untouched shards come along; config, index and manifest are the only other news."""
    before, after = tree(real), tree(out)
    touched = {shard for name, (shard, *_) in raw_tensors(real).items() if name.endswith(SCALES)}
    assert after.keys() - before.keys() == {"rewrite_manifest.json"}
    changed = {name for name in before if before[name] != after[name]}
    assert changed == touched | {"config.json", "model.safetensors.index.json"}


def test_compressed_tensors_gives_every_module_the_scheme_of_its_tensors(real: Path, out: Path) -> None:
    """Its own parser and matcher, over every linear layer, before and after."""
    before, after = compressed_tensors_schemes(real), compressed_tensors_schemes(out)
    assert before.keys() == after.keys()
    for module, scheme in after.items():
        if not module.endswith(("in_proj_qkv", "in_proj_z")):
            assert scheme == before[module]
            continue
        assert scheme.weights.strategy == "channel"
        assert scheme.input_activations == before[module].input_activations
        assert scheme.targets == [QKVZ]


def test_config_changes_in_one_place_only(real: Path, out: Path) -> None:
    """Cutting the new group out of the text gives the old text back, byte for byte."""
    before, after = (real / "config.json").read_text(), (out / "config.json").read_text()
    assert json.loads(after)["quantization_config"]["quantization_status"] == "compressed"
    new = json.loads(after)["quantization_config"]["config_groups"]["group_1"]
    body = json.dumps({"group_1": new}, indent=2)[2:-2].replace("\n", "\n    ")
    assert after.replace("    " + body + ",\n", "", 1) == before


def test_index_keeps_its_keys_and_counts_tensor_bytes(real: Path, out: Path) -> None:
    """Only ``total_size`` changes, to the sum of all tensors' bytes."""
    before, after = (json.loads((d / "model.safetensors.index.json").read_text()) for d in (real, out))
    assert after["metadata"].pop("total_size") == sum(len(data) for *_, data in raw_tensors(out).values())
    before["metadata"].pop("total_size")
    assert after == before


def test_converting_twice_equals_once(out: Path, tmp_path: Path) -> None:
    """Nothing is left to do, and the output is the input, the manifest included."""
    manifest = rewrite.convert(out, tmp_path / "twice")
    assert not manifest.changed
    assert tree(out) == tree(tmp_path / "twice")


def test_two_runs_give_identical_bytes(real: Path, out: Path, tmp_path: Path) -> None:
    """Whatever the name of the output and the number of workers."""
    rewrite.convert(real, tmp_path / "elsewhere", workers=1)
    assert tree(out) == tree(tmp_path / "elsewhere")


def test_manifest_file_is_what_was_returned(real: Path, tmp_path: Path) -> None:
    """And it lists every other file with its true size."""
    manifest = rewrite.convert(real, tmp_path / "m")
    returned = manifest.to_json()
    assert set(returned.pop("bytes")) == {"shared", "copied", "written", "kept"}, (
        "not the file's: it depends on the disk"
    )
    assert json.loads((tmp_path / "m" / "rewrite_manifest.json").read_text()) == returned
    sizes = {file.name: file.size for file in manifest.files}
    assert sizes == {n: len(data) for n, data in tree(tmp_path / "m").items() if n != "rewrite_manifest.json"}
    assert rewrite.Manifest.from_json(manifest.to_json()) == manifest


def test_subfolders_modes_and_symlinks(copy: Path, tmp_path: Path) -> None:
    """The hub cache is symlinks: OUT holds regular files, with the source's modes and folders."""
    (copy / "original" / "deep").mkdir(parents=True)
    (copy / "original" / "deep" / "params.json").write_text("{}")
    blob = (copy / "tokenizer.json").rename(tmp_path / "blob")
    (copy / "tokenizer.json").symlink_to(blob)
    blob.chmod(0o640)
    shard = next(copy.glob("model-00001*"))
    shard.chmod(0o444)
    (copy / "config.json").chmod(0o600)
    rewrite.convert(copy, tmp_path / "out")
    assert tree(tmp_path / "out")["original/deep/params.json"] == b"{}"
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    for name, mode in {"tokenizer.json": 0o640, shard.name: 0o444, "config.json": 0o600}.items():
        assert stat.S_IMODE((tmp_path / "out" / name).stat().st_mode) == mode


def test_a_checkpoint_behind_a_symlink(text: Path, tmp_path: Path) -> None:
    """IN itself may be a link to a snapshot."""
    (tmp_path / "link").symlink_to(text)
    assert rewrite.convert(tmp_path / "link", tmp_path / "out").changed


def test_progress_counts_every_byte(real: Path, tmp_path: Path) -> None:
    """Monotonous, and complete but for the small texts."""
    seen: list[tuple[int, int]] = []
    rewrite.convert(real, tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    total = seen[-1][1]
    texts = sum((tmp_path / "out" / n).stat().st_size for n in ("config.json", "model.safetensors.index.json"))
    assert seen[-1][0] == total - texts


def test_timestamp_only_when_asked_for(text: Path, tmp_path: Path) -> None:
    """Otherwise the manifest would differ from run to run."""
    rewrite.convert(text, tmp_path / "plain")
    rewrite.convert(text, tmp_path / "dated", created="2026-01-02T03:04:05+00:00")
    plain, dated = (json.loads((tmp_path / d / "rewrite_manifest.json").read_text()) for d in ("plain", "dated"))
    assert dated.pop("created") == "2026-01-02T03:04:05+00:00"
    assert plain == dated


def test_neither_torch_nor_compressed_tensors_is_imported(text: Path, tmp_path: Path) -> None:
    """They cost seconds and hundreds of megabytes (5 s and 350 MB for compressed-tensors)."""
    script = (
        "import sys; from rewrite.cli.commands import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "heavy = {'torch', 'compressed_tensors', 'numpy', 'safetensors', 'transformers'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    for arguments in (["--help"], ["convert", str(text), str(tmp_path / "out")]):
        subprocess.run([sys.executable, "-c", script, *arguments], check=True, env={**os.environ, "PYTHONPATH": "."})
