"""ShardPlan → shard on disk. Bytes that do not change are copied by the kernel and never enter this process."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path

from rewrite.checkpoint import FileId, io_errors, open_regular
from rewrite.errors import StorageError
from rewrite.layouts import Fill
from rewrite.plan import FileCopy
from rewrite.shardplan import Copy, Lookup, Segment, ShardPlan

#: Called with the number of bytes just written; may raise to stop the write.
Advance = Callable[[int], None]

_KERNEL_CHUNK = 64 << 20  # between two looks at whether to stop
_BUFFER = 1 << 20
#: The kernel or the filesystem cannot do it; reads and writes can (copy_file_range(2); ENOSYS and EPERM by seccomp).
_NO_KERNEL_COPY = frozenset({errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM, errno.ETXTBSY})


def write_shard(plan: ShardPlan, source: Path, target: Path, advance: Advance) -> None:
    """Write the shard that ``plan`` describes to ``target``, synced, with the source's mode.

    Raises :class:`StorageError` when reading or writing fails or ``source`` is not the file that was planned on.
    """
    _write(plan.header, plan.segments, plan.source, source, target, advance)


def copy_file(plan: FileCopy, source: Path, target: Path, advance: Advance) -> None:
    """Copy a whole file, synced, with the source's mode. Raises as :func:`write_shard` does."""
    _write(b"", [Copy(0, plan.size)], plan.source, source, target, advance)


def write_text(text: str, like: Path, target: Path) -> None:
    """Write a small UTF-8 file, synced, with the mode of the file ``like``."""
    with io_errors(target), _Target(target) as out:
        _pwrite_all(out, text.encode(), 0)
        _finish(out, like.stat().st_mode)


def _write(
    header: bytes, segments: Iterable[Segment], expected: FileId, source: Path, target: Path, advance: Advance
) -> None:
    with open_regular(source) as file, io_errors(target), _Target(target) as out:
        _check_unchanged(file.fileno(), expected, source)
        _pwrite_all(out, header, 0)
        advance(len(header))
        offset = len(header)
        for segment in segments:
            match segment:
                case Fill():
                    _fill(out, segment, offset)
                    advance(segment.length)
                case Lookup():
                    _look_up(file.fileno(), out, segment, offset, advance, source)
                case Copy():
                    _copy(file.fileno(), out, segment, offset, advance, source)
            offset += segment.length
        _check_unchanged(file.fileno(), expected, source)
        _finish(out, os.fstat(file.fileno()).st_mode)


class _Target:
    """A new file, open for writing by its owner only until it is complete."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> int:
        self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        return self._fd

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def _finish(fd: int, mode: int) -> None:
    os.fchmod(fd, stat.S_IMODE(mode) & 0o777)  # no set-user-ID bits from strangers
    os.fsync(fd)


def _copy(source: int, target: int, run: Copy, offset: int, advance: Advance, where: Path) -> None:
    """Copy ``run`` of ``source`` to ``offset`` of ``target``: in the kernel if it can, else through a buffer."""
    start, left, in_kernel = run.start, run.length, True
    while left:
        done = _kernel_copy(source, target, start, offset, min(left, _KERNEL_CHUNK)) if in_kernel else 0
        if not done:  # not offered, or the filesystem gave up half way: the buffer takes over for good
            in_kernel = False
            done = _buffer_copy(source, target, start, offset, min(left, _BUFFER))
        if not done:
            raise _ended(where, left)
        start, offset, left = start + done, offset + done, left - done
        advance(done)


def _kernel_copy(source: int, target: int, start: int, offset: int, length: int) -> int:
    try:
        return os.copy_file_range(source, target, length, start, offset)
    except OSError as error:
        if error.errno in _NO_KERNEL_COPY:
            return 0
        raise


def _buffer_copy(source: int, target: int, start: int, offset: int, length: int) -> int:
    data = os.pread(source, length, start)
    _pwrite_all(target, data, offset)
    return len(data)


def _fill(target: int, fill: Fill, offset: int) -> None:
    per_write = max(1, _BUFFER // len(fill.data))
    left = fill.count
    while left:
        count = min(left, per_write)
        _pwrite_all(target, fill.data * count, offset)
        offset, left = offset + len(fill.data) * count, left - count


def _look_up(source: int, target: int, run: Lookup, offset: int, advance: Advance, where: Path) -> None:
    """Replace every byte by its table entry: one translation for each byte of an entry, interleaved."""
    columns = [bytes(entry[i] for entry in run.entries) for i in range(len(run.entries[0]))]
    start, left = run.start, run.count
    while left:
        data = os.pread(source, min(left, _BUFFER), start)
        if not data:
            raise _ended(where, left)
        wide = bytearray(len(data) * len(columns))
        for i, column in enumerate(columns):
            wide[i :: len(columns)] = data.translate(column)
        _pwrite_all(target, wide, offset)
        start, offset, left = start + len(data), offset + len(wide), left - len(data)
        advance(len(wide))


def _ended(where: Path, left: int) -> StorageError:
    return StorageError("A file ended while it was read", where=str(where), expected=f"{left} bytes more")


def _pwrite_all(fd: int, data: bytes | bytearray, offset: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, offset)  # may be short, on a full disk or a signal
        view, offset = view[done:], offset + done


def _check_unchanged(fd: int, expected: FileId, path: Path) -> None:
    found = FileId.of(os.fstat(fd))
    if found != expected:
        raise StorageError(
            "A file of the checkpoint changed while it was converted",
            where=str(path),
            expected=f"{expected.size} bytes, modified at {expected.mtime_ns} ns",
            found=f"{found.size} bytes, modified at {found.mtime_ns} ns",
            hint="wait until whatever writes it is done, then convert again",
        )
