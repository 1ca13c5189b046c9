"""ShardPlan → shard on disk. Bytes that do not change are shared with the source or copied by the kernel.

Three ways, each run of bytes by the first that works: whole blocks are cloned, on a filesystem that can (FICLONERANGE);
the kernel copies (copy_file_range); a buffer is read and written. The bytes are the same whichever way they came.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rewrite.checkpoint.local import LocalFile, io_errors, open_regular
from rewrite.checkpoint.storage import FileId
from rewrite.errors import StorageError
from rewrite.planning.jobs import FileCopy, ShardPlan
from rewrite.planning.manifest import ByteCounts
from rewrite.planning.placement import BLOCK
from rewrite.planning.segments import Copy, Dequantize, Fill, Lookup, Segment
from rewrite.quantization.dtypes import decode, dequantizing_tables

#: Called with the number of bytes just written; may raise to stop the write.
Advance = Callable[[int], None]

_KERNEL_CHUNK = 64 << 20  # between two looks at whether to stop
_BUFFER = 1 << 20
#: The kernel or the filesystem cannot do it; the next way can (ioctl_ficlonerange(2), copy_file_range(2); ENOSYS and
#: EPERM by seccomp, ENOTTY where there is no such ioctl, EINVAL also where blocks are larger than ours).
_NOT_OFFERED = frozenset(
    {errno.EXDEV, errno.ENOSYS, errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM, errno.ETXTBSY}
)
#: linux/fs.h, _IOW(0x94, 13, struct file_clone_range); Python has it from 3.12 on.
_FICLONERANGE: int = getattr(fcntl, "FICLONERANGE", 0x4020940D)


def write_shard(plan: ShardPlan, source: Path, target: Path, advance: Advance, *, copy: bool = False) -> ByteCounts:
    """Write the shard that ``plan`` describes to ``target``, synced, with the source's mode.

    With ``copy`` no block is shared with the source. Raises :class:`StorageError` when reading or writing fails or
    ``source`` is not the file that was planned on.
    """
    with _opened(plan.source, source, target, advance, copy) as files:
        return _write(files, plan.header, plan.segments)


def copy_file(plan: FileCopy, source: Path, target: Path, advance: Advance, *, copy: bool = False) -> ByteCounts:
    """Bring a whole file along, synced, with the source's mode. ``copy`` and errors as in :func:`write_shard`."""
    with _opened(plan.source, source, target, advance, copy) as files:
        if plan.size and files.clone(Copy(0, plan.size), 0):  # also its last block, which may be part of one
            return ByteCounts(shared=plan.size)
        return _write(files, b"", [Copy(0, plan.size)])


def can_clone(source: Path, scratch: Path) -> bool:
    """Whether blocks of ``source`` can be shared with a file at ``scratch``, found out by sharing one.

    A disk too full to try counts as one that cannot.
    """
    try:
        with source.open("rb", buffering=0) as file, _Target(scratch) as out:
            files = _Files(file.fileno(), out, source, lambda _: None, real_copy=False)
            return files.clone(Copy(0, BLOCK), 0)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return False
        raise
    finally:
        scratch.unlink(missing_ok=True)


def write_text(text: str, like: Path, target: Path) -> None:
    """Write a small UTF-8 file, synced, with the mode of the file ``like``."""
    with io_errors(target), _Target(target) as out:
        _pwrite_all(out, text.encode(), 0)
        _finish(out, like.stat().st_mode)


@contextmanager
def _opened(expected: FileId, source: Path, target: Path, advance: Advance, copy: bool) -> Iterator[_Files]:
    """Both files; that the source is the expected one is checked before and after, then the target is synced."""
    with open_regular(source) as file, io_errors(target), _Target(target) as out:
        _check_unchanged(file, expected, source)
        yield _Files(file.fd, out, source, advance, copy)
        _check_unchanged(file, expected, source)
        _finish(out, os.fstat(file.fd).st_mode)


@dataclass(frozen=True)
class _Files:
    """An open source and an open target, and the ways for bytes to get from one to the other."""

    source: int
    target: int
    where: Path
    advance: Advance
    real_copy: bool

    def bring(self, run: Copy, offset: int) -> int:
        """Bring ``run`` to ``offset`` of the target; how many of its bytes are shared."""
        blocks = run.blocks(offset)
        if blocks is None:
            self.copy(run, offset)
            return 0
        head = blocks.start - run.start
        self.copy(Copy(run.start, head), offset)
        if not self.clone(blocks, offset + head):
            self.copy(Copy(blocks.start, run.length - head), offset + head)
            return 0
        done = head + blocks.length
        self.copy(Copy(run.start + done, run.length - done), offset + done)
        return blocks.length

    def clone(self, run: Copy, offset: int) -> bool:
        """Let the target share the blocks of ``run``; False where the filesystem does not offer it."""
        if self.real_copy:
            return False
        try:
            request = struct.pack("qQQQ", self.source, run.start, run.length, offset)
            fcntl.ioctl(self.target, _FICLONERANGE, request)
        except OSError as error:
            if error.errno in _NOT_OFFERED:
                return False
            raise
        self.advance(run.length)
        return True

    def copy(self, run: Copy, offset: int) -> None:
        """Copy in the kernel if it can, else through a buffer."""
        start, left = run.start, run.length
        in_kernel = not self.real_copy  # copy_file_range, too, shares blocks where it can
        while left:
            done = self._kernel_copy(start, offset, min(left, _KERNEL_CHUNK)) if in_kernel else 0
            if not done:  # not offered, or the filesystem gave up half way: the buffer takes over for good
                in_kernel = False
                done = self._buffer_copy(start, offset, min(left, _BUFFER))
            if not done:
                raise _ended(self.where, left)
            start, offset, left = start + done, offset + done, left - done
            self.advance(done)

    def _kernel_copy(self, start: int, offset: int, length: int) -> int:
        try:
            return os.copy_file_range(self.source, self.target, length, start, offset)
        except OSError as error:
            if error.errno in _NOT_OFFERED:
                return 0
            raise

    def _buffer_copy(self, start: int, offset: int, length: int) -> int:
        data = os.pread(self.source, length, start)
        _pwrite_all(self.target, data, offset)
        return len(data)


def _write(files: _Files, header: bytes, segments: Iterable[Segment]) -> ByteCounts:
    _pwrite_all(files.target, header, 0)
    files.advance(len(header))
    offset = written = len(header)
    shared = copied = 0
    for segment in segments:
        match segment:
            case Copy():
                cloned = files.bring(segment, offset)
                shared, copied = shared + cloned, copied + segment.length - cloned
            case Fill():
                _fill(files, segment, offset)
                written += segment.length
            case Lookup():
                _look_up(files, segment, offset)
                written += segment.length
            case Dequantize():
                _dequantize(files, segment, offset)
                written += segment.length
        offset += segment.length
    return ByteCounts(shared, copied, written)


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


def _fill(files: _Files, fill: Fill, offset: int) -> None:
    per_write = max(1, _BUFFER // len(fill.data))
    left = fill.count
    while left:
        count = min(left, per_write)
        _pwrite_all(files.target, fill.data * count, offset)
        offset, left = offset + len(fill.data) * count, left - count
    files.advance(fill.length)


def _look_up(files: _Files, run: Lookup, offset: int) -> None:
    """Replace every byte by its table entry: one translation for each byte of an entry, interleaved."""
    columns = [bytes(entry[i] for entry in run.entries) for i in range(len(run.entries[0]))]
    start, left = run.start, run.count
    while left:
        data = os.pread(files.source, min(left, _BUFFER), start)
        if not data:
            raise _ended(files.where, left)
        wide = bytearray(len(data) * len(columns))
        for i, column in enumerate(columns):
            wide[i :: len(columns)] = data.translate(column)
        _pwrite_all(files.target, wide, offset)
        start, offset, left = start + len(data), offset + len(wide), left - len(data)
        files.advance(len(wide))


def _dequantize(files: _Files, run: Dequantize, offset: int) -> None:
    """Each row of codes through the tables of its scales. One block of rows, or a megabyte, is in memory at a time."""
    raw = run.scales if isinstance(run.scales, bytes) else _read(files, run.scales, run.scale_bytes)
    scales = decode(run.scale_dtype, raw, str(files.where))
    across, high = run.blocks_across, run.block[0]
    rows_at_once = max(1, _BUFFER // max(1, run.columns))
    for band, first in enumerate(range(0, run.rows, high)):
        tables = [dequantizing_tables(s, run.dtype) for s in scales[band * across : (band + 1) * across]]
        last = min(first + high, run.rows)
        for start in range(first, last, rows_at_once):
            count = min(rows_at_once, last - start) * run.columns
            codes = _read(files, run.start + start * run.columns, count)
            wide = _through(tables, codes, run.columns, run.block[1])
            _pwrite_all(files.target, wide, offset)
            offset += len(wide)
            files.advance(len(wide))


def _through(tables: list[tuple[bytes, ...]], codes: bytes, columns: int, width: int) -> bytearray:
    """Rows of ``columns`` codes, where each ``width`` of them go through tables of their own."""
    wide = bytearray(len(codes) * len(tables[0]))
    for i in range(len(tables[0])):
        if len(tables) == 1:
            plane = codes.translate(tables[0][i])
        else:
            plane = b"".join(
                codes[row + j * width : row + min((j + 1) * width, columns)].translate(table[i])
                for row in range(0, len(codes), columns)
                for j, table in enumerate(tables)
            )
        wide[i :: len(tables[0])] = plane
    return wide


def _read(files: _Files, start: int, length: int) -> bytes:
    """Exactly these bytes of the source."""
    data = os.pread(files.source, length, start)
    while len(data) < length:
        more = os.pread(files.source, length - len(data), start + len(data))
        if not more:
            raise _ended(files.where, length - len(data))
        data += more
    return data


def _ended(where: Path, left: int) -> StorageError:
    return StorageError("A file ended while it was read", where=str(where), expected=f"{left} bytes more")


def _pwrite_all(fd: int, data: bytes | bytearray, offset: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, offset)  # may be short, on a full disk or a signal
        view, offset = view[done:], offset + done


def _check_unchanged(file: LocalFile, expected: FileId, path: Path) -> None:
    found = file.file_id
    if found != expected:
        raise StorageError(
            "A file of the checkpoint changed while it was converted",
            where=str(path),
            expected=expected.text,
            found=found.text,
            hint="wait until whatever writes it is done, then convert again",
        )
