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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rewrite.checkpoint.local import LocalFile, io_errors, open_regular
from rewrite.checkpoint.storage import Storage
from rewrite.planning.jobs import FileCopy, Job
from rewrite.planning.manifest import ByteCounts
from rewrite.planning.placement import BLOCK
from rewrite.planning.segments import Copy
from rewrite.writing.stream import check_unchanged, ended, read_exactly, streamed
from rewrite.writing.values import BUFFER, values

#: Called with the number of bytes just written; may raise to stop the write.
Advance = Callable[[int], None]

STREAMED_MODE = 0o644  # of files whose source has no mode
_KERNEL_CHUNK = 64 << 20  # between two looks at whether to stop
#: The kernel or the filesystem cannot do it; the next way can (ioctl_ficlonerange(2), copy_file_range(2); ENOSYS and
#: EPERM by seccomp, ENOTTY where there is no such ioctl, EINVAL also where blocks are larger than ours).
_NOT_OFFERED = frozenset(
    {errno.EXDEV, errno.ENOSYS, errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM, errno.ETXTBSY}
)
#: linux/fs.h, _IOW(0x94, 13, struct file_clone_range); Python has it from 3.12 on.
_FICLONERANGE: int = getattr(fcntl, "FICLONERANGE", 0x4020940D)


def write_file(job: Job, source: Path, target: Path, advance: Advance, *, copy: bool = False) -> ByteCounts:
    """Write the file that ``job`` describes to ``target``, synced, with the source's mode.

    With ``copy`` no block is shared with the source. Raises :class:`StorageError` when reading or writing fails or
    ``source`` is not the file that was planned on.
    """
    with open_regular(source) as file, io_errors(target), _new_file(target) as out:
        check_unchanged(file.file_id, job.source, str(source))
        files = _Files(file, out, source, advance, copy)
        # A file that comes along as it is: also its last block, which may be part of one.
        if isinstance(job, FileCopy) and job.size and files.clone(Copy(0, job.size), 0):
            counts = ByteCounts(shared=job.size)
        else:
            counts = _write(files, job)
        check_unchanged(file.file_id, job.source, str(source))
        _finish(out, os.fstat(file.fd).st_mode)
    return counts


def write_streamed(job: Job, source: Storage, target: Path, advance: Advance) -> ByteCounts:
    """As :func:`write_file`, from a source that is no directory: nothing can be shared."""
    with io_errors(target), _new_file(target) as out:
        offset = 0
        for piece in streamed(job, source):
            _pwrite_all(out, piece, offset)
            offset += len(piece)
            advance(len(piece))
        _finish(out, STREAMED_MODE)
    copied = sum(segment.length for segment in job.segments if isinstance(segment, Copy))
    return ByteCounts(copied=copied, written=job.size - copied)


def can_clone(source: Path, scratch: Path) -> bool:
    """Whether blocks of ``source`` can be shared with a file at ``scratch``, found out by sharing one.

    A disk too full to try counts as one that cannot.
    """
    try:
        with source.open("rb", buffering=0) as file, _new_file(scratch) as out:
            files = _Files(LocalFile(file.fileno(), source), out, source, lambda _: None, real_copy=False)
            return files.clone(Copy(0, BLOCK), 0)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return False
        raise
    finally:
        scratch.unlink(missing_ok=True)


def write_text(text: str, like: Path | None, target: Path) -> None:
    """Write a small UTF-8 file, synced, with the mode of the file ``like``."""
    with io_errors(target), _new_file(target) as out:
        _pwrite_all(out, text.encode(), 0)
        _finish(out, STREAMED_MODE if like is None else like.stat().st_mode)


@dataclass(frozen=True)
class _Files:
    """An open source and an open target, and the ways for bytes to get from one to the other."""

    source: LocalFile
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
            request = struct.pack("qQQQ", self.source.fd, run.start, run.length, offset)
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
                done = self._buffer_copy(start, offset, min(left, BUFFER))
            if not done:
                raise ended(str(self.where), left)
            start, offset, left = start + done, offset + done, left - done
            self.advance(done)

    def _kernel_copy(self, start: int, offset: int, length: int) -> int:
        try:
            return os.copy_file_range(self.source.fd, self.target, length, start, offset)
        except OSError as error:
            if error.errno in _NOT_OFFERED:
                return 0
            raise

    def _buffer_copy(self, start: int, offset: int, length: int) -> int:
        data = self.source.read(start, length)
        _pwrite_all(self.target, data, offset)
        return len(data)


def _write(files: _Files, job: Job) -> ByteCounts:
    _pwrite_all(files.target, job.header, 0)
    files.advance(len(job.header))
    offset, where = len(job.header), str(files.where)
    shared = copied = 0
    for segment in job.segments:
        if isinstance(segment, Copy):
            cloned = files.bring(segment, offset)
            shared, copied = shared + cloned, copied + segment.length - cloned
            offset += segment.length
            continue
        for piece in values(segment, partial(read_exactly, files.source, where), where):
            _pwrite_all(files.target, piece, offset)
            files.advance(len(piece))
            offset += len(piece)
    return ByteCounts(shared, copied, offset - shared - copied)


@contextmanager
def _new_file(path: Path) -> Iterator[int]:
    """Open for writing by its owner only until it is complete."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def _finish(fd: int, mode: int) -> None:
    os.fchmod(fd, stat.S_IMODE(mode) & 0o777)  # no set-user-ID bits from strangers
    os.fsync(fd)


def _pwrite_all(fd: int, data: bytes | bytearray, offset: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, offset)  # may be short, on a full disk or a signal
        view, offset = view[done:], offset + done
