"""Writing one shard: every way for bytes to get there gives the same bytes, and faults are reported."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from pathlib import Path
from typing import Any

import pytest

from rewrite.checkpoint.local import file_id
from rewrite.errors import StorageError
from rewrite.planning.jobs import FileCopy, ShardPlan
from rewrite.planning.manifest import ByteCounts
from rewrite.planning.placement import BLOCK
from rewrite.planning.segments import Copy, Fill
from rewrite.writing.shard import can_clone, write_file

SOURCE = bytes(range(256)) * 80
HEADER = b"H" * 24
EXPECTED = HEADER + SOURCE[100:4000] + b"ab" * 1000 + SOURCE[4000:]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(SOURCE)
    return path


def plan(source: Path) -> ShardPlan:
    segments = (Copy(100, 3900), Fill(b"ab", 1000), Copy(4000, len(SOURCE) - 4000))
    return ShardPlan("s", file_id(source.stat()), HEADER, segments)


def write(source: Path, target: Path) -> int:
    done: list[int] = []
    write_file(plan(source), source, target, done.append)
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


@pytest.mark.parametrize("call", ["copy_file_range", "pwrite", "fsync", "fchmod", "ioctl"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_faults_of_the_disk_are_storage_errors(
    call: str, code: int, source: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """With errno and file; never swallowed."""

    def fail(*_: Any) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl if call == "ioctl" else os, call, fail)
    with pytest.raises(StorageError, match=f"errno {code}") as caught:
        write_file(aligned_plan(source), source, tmp_path / "t", lambda _: None)
    assert caught.value.exit_code == 4


#: From 5000 on, bytes come to the same place in a block as in the source: its blocks 2, 3 and 4 can be shared.
ALIGNED = (Copy(0, 70), Fill(b"ab", 300), Copy(100, 26), Fill(b"c", 5000 + BLOCK - 24 - 696), Copy(5000, 15480))


def aligned_plan(source: Path) -> ShardPlan:
    return ShardPlan("s", file_id(source.stat()), HEADER, ALIGNED)


@pytest.fixture
def clones(monkeypatch: Any) -> list[tuple[int, int, int]]:
    """A filesystem that can share blocks, as far as can be seen: it takes whole blocks (or a whole file) and copies."""
    calls: list[tuple[int, int, int]] = []

    def clone(target: int, request: int, argument: bytes) -> int:
        assert request == 0x4020940D, "FICLONERANGE of linux/fs.h"
        source, start, length, offset = struct.unpack("qQQQ", argument)
        end = os.fstat(source).st_size
        if start % BLOCK or offset % BLOCK or (length % BLOCK and start + length != end):
            raise OSError(errno.EINVAL, "not whole blocks")
        os.pwrite(target, os.pread(source, length, start), offset)
        calls.append((start, length, offset))
        return 0

    monkeypatch.setattr(fcntl, "ioctl", clone)
    return calls


def test_whole_blocks_are_shared_and_the_edges_copied(source: Path, tmp_path: Path, clones: list[Any]) -> None:
    """One call for the run; the bytes, and the count of them, are those of a copy."""
    done: list[int] = []
    expected = HEADER + SOURCE[:70] + b"ab" * 300 + SOURCE[100:126] + b"c" * 8376 + SOURCE[5000:]
    counts = write_file(aligned_plan(source), source, tmp_path / "t", done.append)
    assert (tmp_path / "t").read_bytes() == expected
    assert clones == [(2 * BLOCK, 3 * BLOCK, 3 * BLOCK)]
    assert counts == ByteCounts(3 * BLOCK, len(expected) - 3 * BLOCK - 24 - 600 - 8376, 24 + 600 + 8376)
    assert sum(done) == len(expected)
    assert aligned_plan(source).shareable == 3 * BLOCK

    write_file(aligned_plan(source), source, tmp_path / "copy", done.append, copy=True)
    assert (tmp_path / "copy").read_bytes() == expected
    assert len(clones) == 1


def test_a_file_that_does_not_change_is_shared_whole(source: Path, tmp_path: Path, clones: list[Any]) -> None:
    """Its last block too, though only part of it is in use."""
    source.write_bytes(SOURCE + b"tail")
    plan = FileCopy("s", file_id(source.stat()))
    assert write_file(plan, source, tmp_path / "t", lambda _: None) == ByteCounts(shared=plan.size)
    assert (tmp_path / "t").read_bytes() == SOURCE + b"tail"
    assert clones == [(0, plan.size, 0)]


def test_an_empty_file(source: Path, tmp_path: Path, clones: list[Any]) -> None:
    """Has nothing to share: a length of 0 would mean all there is."""
    source.write_bytes(b"")
    write_file(FileCopy("s", file_id(source.stat())), source, tmp_path / "t", lambda _: None)
    assert (tmp_path / "t").read_bytes() == b""
    assert clones == []


NOT_OFFERED = [errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.EPERM, errno.ETXTBSY, errno.ENOSYS]


@pytest.mark.parametrize("code", NOT_OFFERED)
def test_a_filesystem_that_cannot_share_gets_a_copy(code: int, source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Without a word."""

    def refuse(*_: Any) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "ioctl", refuse)
    counts = write_file(aligned_plan(source), source, tmp_path / "t", lambda _: None)
    assert counts == ByteCounts(0, 70 + 26 + 15480, 24 + 600 + 8376)
    assert (tmp_path / "t").read_bytes()[24 + 696 + 8376 :] == SOURCE[5000:]
    plan = FileCopy("s", file_id(source.stat()))
    assert write_file(plan, source, tmp_path / "u", lambda _: None) == ByteCounts(copied=plan.size)
    assert (tmp_path / "u").read_bytes() == SOURCE


def test_a_real_copy_asks_for_neither_clone_nor_kernel_copy(source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """copy_file_range shares blocks too, where it can."""

    def fail(*_: Any) -> int:
        raise AssertionError

    monkeypatch.setattr(fcntl, "ioctl", fail)
    monkeypatch.setattr(os, "copy_file_range", fail)
    write_file(aligned_plan(source), source, tmp_path / "t", lambda _: None, copy=True)
    write_file(FileCopy("s", file_id(source.stat())), source, tmp_path / "u", lambda _: None, copy=True)
    assert (tmp_path / "u").read_bytes() == SOURCE


def test_the_trial_leaves_nothing_behind(source: Path, tmp_path: Path, clones: list[Any], monkeypatch: Any) -> None:
    """Whether it works, is not offered, or finds the disk full."""
    assert can_clone(source, tmp_path / "trial")
    for code in (errno.EOPNOTSUPP, errno.ENOSPC, errno.EDQUOT):

        def refuse(*_: Any, code: int = code) -> int:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(fcntl, "ioctl", refuse)
        assert not can_clone(source, tmp_path / "trial")
    assert not (tmp_path / "trial").exists()


def test_a_source_that_differs_from_the_plan_is_refused(source: Path, tmp_path: Path) -> None:
    """Checked before the first byte."""
    old = plan(source)
    source.write_bytes(SOURCE[:-1] + b"x")
    os.utime(source, ns=(0, 0))
    with pytest.raises(StorageError, match="changed"):
        write_file(old, source, tmp_path / "t", lambda _: None)


def test_a_source_that_changes_while_it_is_read_is_refused(source: Path, tmp_path: Path) -> None:
    """Checked again after the last byte."""
    with pytest.raises(StorageError, match="changed"):
        write_file(plan(source), source, tmp_path / "t", lambda _: os.utime(source, ns=(0, 0)))


def test_a_source_that_ends_early_is_refused(source: Path, tmp_path: Path) -> None:
    """Truncated between two chunks."""
    with pytest.raises(StorageError, match="ended while it was read"):
        write_file(plan(source), source, tmp_path / "t", lambda _: os.truncate(source, 50))


def test_set_user_id_bits_are_not_copied(source: Path, tmp_path: Path) -> None:
    """Modes follow the source, but not these."""
    source.chmod(0o4755)
    write(source, tmp_path / "t")
    assert (tmp_path / "t").stat().st_mode & 0o7777 == 0o755
