"""Opening a directory: what is found, and what is refused when index, shards and config do not add up."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from rewrite import open_checkpoint
from rewrite.checkpoint.checkpoint import INDEX_NAME, is_inside
from rewrite.errors import CheckpointError, ConfigError, HeaderError, StorageError
from tests.support import edit_json, raw_tensors


def edit_index(directory: Path, **changes: str | None) -> None:
    """Set entries of the weight map; None removes one."""
    path = directory / INDEX_NAME
    index = json.loads(path.read_text())
    index["weight_map"] = {k: v for k, v in {**index["weight_map"], **changes}.items() if v is not None}
    path.write_text(json.dumps(index))


def any_tensor(directory: Path) -> tuple[str, str]:
    weight_map: dict[str, str] = json.loads((directory / INDEX_NAME).read_text())["weight_map"]
    return sorted(weight_map.items())[0]


def test_opens_real_checkpoints(real: Path) -> None:
    """Same names, dtypes and shapes as the stock reader gives, and every file listed."""
    checkpoint = open_checkpoint(real)
    stock = {name: (shard, dtype, shape) for name, (shard, dtype, shape, _) in raw_tensors(real).items()}
    assert {name: (t.shard, t.dtype, t.shape) for name, t in checkpoint.tensors.items()} == stock
    assert set(checkpoint.files) == {p.name for p in real.iterdir()}


def test_read_tensor_gives_the_bytes_of_the_stock_reader(text: Path) -> None:
    """Scales are read by offset."""
    checkpoint = open_checkpoint(text)
    scales = [name for name in checkpoint.tensors if name.endswith("_scale")]
    assert scales
    raw = raw_tensors(text)
    assert all(checkpoint.read_tensor(name) == raw[name][3] for name in scales)


def test_single_file_without_index(copy_of: Any) -> None:
    """ModelOpt writes one file and no index."""
    checkpoint = open_checkpoint(copy_of("modelopt-qwen3_5-vl"))
    assert checkpoint.index is None
    assert list(checkpoint.shards) == ["model.safetensors"]


def test_symlinks_are_read_through(text: Path, tmp_path: Path) -> None:
    """The hub cache is a directory of symlinks into a blob store."""
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in text.iterdir():
        (snapshot / path.name).symlink_to(path.resolve())
    assert open_checkpoint(snapshot).tensors.keys() == open_checkpoint(text).tensors.keys()


def test_safetensors_outside_the_index_do_not_count(copy: Path) -> None:
    """As in loaders: the index names the shards."""
    shutil.copy(next(copy.glob("model-00001*")), copy / "consolidated.safetensors")
    assert "consolidated.safetensors" not in open_checkpoint(copy).shards


def break_index_missing_shard(directory: Path) -> None:
    next(directory.glob("model-00001*")).unlink()


def break_index_wrong_shard(directory: Path) -> None:
    name, shard = any_tensor(directory)
    other = next(p.name for p in sorted(directory.glob("*.safetensors")) if p.name != shard)
    edit_index(directory, **{name: other})


def break_index_extra_entry(directory: Path) -> None:
    edit_index(directory, **{"no.such.weight": any_tensor(directory)[1]})


def break_index_lacks_entry(directory: Path) -> None:
    edit_index(directory, **{any_tensor(directory)[0]: None})


def break_index_parent(directory: Path) -> None:
    edit_index(directory, **{any_tensor(directory)[0]: "../evil.safetensors"})


def break_index_absolute(directory: Path) -> None:
    edit_index(directory, **{any_tensor(directory)[0]: "/etc/passwd"})


def break_index_not_a_map(directory: Path) -> None:
    (directory / INDEX_NAME).write_text('{"weight_map": ["a"]}')


def break_duplicate_tensor(directory: Path) -> None:
    first = next(directory.glob("model-00001*"))
    shutil.copy(first, directory / "again.safetensors")
    with safe_open(first, "pt") as file:
        edit_index(directory, **{sorted(file.keys())[0]: "again.safetensors"})


def break_no_index(directory: Path) -> None:
    (directory / INDEX_NAME).unlink()


def break_no_config(directory: Path) -> None:
    (directory / "config.json").unlink()


def break_no_shards(directory: Path) -> None:
    (directory / INDEX_NAME).unlink()
    for path in directory.glob("*.safetensors"):
        path.rename(path.with_suffix(".bin"))


def break_dangling_symlink(directory: Path) -> None:
    (directory / "tokenizer.model").symlink_to("gone")


def break_fifo(directory: Path) -> None:
    os.mkfifo(directory / "pipe")


def break_symlink_loop(directory: Path) -> None:
    (directory / "sub").mkdir()
    (directory / "sub" / "up").symlink_to("..")


BREAKERS = {name.removeprefix("break_"): value for name, value in list(globals().items()) if name.startswith("break_")}


@pytest.mark.parametrize("case", BREAKERS)
def test_what_does_not_add_up_is_refused(case: str, copy: Path) -> None:
    """With a message that says where."""
    BREAKERS[case](copy)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(copy)
    assert caught.value.where
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": 1, "a": 2}', "\udcff", "[" * 100_000])
def test_config_that_is_no_json_object_is_refused(content: str, copy: Path) -> None:
    """Of every wrong shape."""
    (copy / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=r"config\.json"):
        open_checkpoint(copy)


def test_truncated_shard_is_refused(copy: Path) -> None:
    """Before anything else happens."""
    shard = next(copy.glob("model-00002*"))
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(HeaderError, match="model-00002"):
        open_checkpoint(copy)


def test_no_directory(tmp_path: Path) -> None:
    """A path that is nothing, or a file."""
    with pytest.raises(StorageError, match="nothing"):
        open_checkpoint(tmp_path / "gone")
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="a file"):
        open_checkpoint(tmp_path / "file")


def test_index_keys_may_be_anything(copy: Path) -> None:
    """Other keys of the index are no business of ours."""
    edit_json(copy / INDEX_NAME, extra={"a": [1]})
    assert open_checkpoint(copy).index


@pytest.mark.parametrize("name", ["", "/a", "../a", "a/../b", "a//b", ".", "a\0b", "a\\b", "a/"])
def test_names_that_leave_the_directory(name: str) -> None:
    """On any system."""
    assert not is_inside(name)


@pytest.mark.parametrize("name", ["a", "a/b.safetensors", "..a", "a..b/c"])
def test_names_that_stay(name: str) -> None:
    """Dots are fine where they are not the whole part."""
    assert is_inside(name)
