"""Writing one shard: every way for bytes to get there gives the same bytes, and faults are reported."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from rewrite.checkpoint import FileId
from rewrite.errors import StorageError
from rewrite.layouts import Fill
from rewrite.shardplan import Copy, ShardPlan
from rewrite.write import write_shard

SOURCE = bytes(range(256)) * 20
HEADER = b"H" * 24
EXPECTED = HEADER + SOURCE[100:4000] + b"ab" * 1000 + SOURCE[4000:]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(SOURCE)
    return path


def plan(source: Path) -> ShardPlan:
    segments = (Copy(100, 3900), Fill(b"ab", 1000), Copy(4000, len(SOURCE) - 4000))
    return ShardPlan("s", FileId.of(source.stat()), HEADER, segments)


def write(source: Path, target: Path) -> int:
    done: list[int] = []
    write_shard(plan(source), source, target, done.append)
    return sum(done)


def test_segments_become_a_file(source: Path, tmp_path: Path) -> None:
    """In order, with every byte counted."""
    assert write(source, tmp_path / "t") == len(EXPECTED) == plan(source).size
    assert (tmp_path / "t").read_bytes() == EXPECTED


@pytest.mark.parametrize("code", [errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM])
def test_without_the_kernels_copy(code: int, source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Reads and writes take over where copy_file_range is not offered."""

    def refuse(*_: Any) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "copy_file_range", refuse)
    write(source, tmp_path / "t")
    assert (tmp_path / "t").read_bytes() == EXPECTED


def test_a_kernel_copy_that_gives_up_half_way(source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Some filesystems return 0 before the end; short counts are normal."""
    real, calls = os.copy_file_range, iter([700, 1, 0])

    def short(src: int, dst: int, count: int, *offsets: int) -> int:
        limit = next(calls, 0)
        return real(src, dst, min(count, limit), *offsets) if limit else 0

    monkeypatch.setattr(os, "copy_file_range", short)
    write(source, tmp_path / "t")
    assert (tmp_path / "t").read_bytes() == EXPECTED


def test_short_writes_are_continued(source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """pwrite may take less than it was given."""
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, bytes(data)[:7], at))
    write(source, tmp_path / "t")
    assert (tmp_path / "t").read_bytes() == EXPECTED


@pytest.mark.parametrize("call", ["copy_file_range", "pwrite", "fsync", "fchmod"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_faults_of_the_disk_are_storage_errors(
    call: str, code: int, source: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """With errno and file; never swallowed."""

    def fail(*_: Any) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(StorageError, match=f"errno {code}") as caught:
        write(source, tmp_path / "t")
    assert caught.value.exit_code == 4


def test_a_source_that_differs_from_the_plan_is_refused(source: Path, tmp_path: Path) -> None:
    """Checked before the first byte."""
    old = plan(source)
    source.write_bytes(SOURCE[:-1] + b"x")
    os.utime(source, ns=(0, 0))
    with pytest.raises(StorageError, match="changed"):
        write_shard(old, source, tmp_path / "t", lambda _: None)


def test_a_source_that_changes_while_it_is_read_is_refused(source: Path, tmp_path: Path) -> None:
    """Checked again after the last byte."""
    with pytest.raises(StorageError, match="changed"):
        write_shard(plan(source), source, tmp_path / "t", lambda _: os.utime(source, ns=(0, 0)))


def test_a_source_that_ends_early_is_refused(source: Path, tmp_path: Path) -> None:
    """Truncated between two chunks."""
    with pytest.raises(StorageError, match="ended while it was read"):
        write_shard(plan(source), source, tmp_path / "t", lambda _: os.truncate(source, 50))


def test_set_user_id_bits_are_not_copied(source: Path, tmp_path: Path) -> None:
    """Modes follow the source, but not these."""
    source.chmod(0o4755)
    write(source, tmp_path / "t")
    assert (tmp_path / "t").stat().st_mode & 0o7777 == 0o755
