"""A file of the output as a stream of bytes, from a source that is read in ranges: nothing is shared, all is read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

from rewrite.checkpoint.storage import FileId, Reader, Storage
from rewrite.errors import StorageError
from rewrite.planning.jobs import Job
from rewrite.planning.segments import Segment
from rewrite.writing.values import values


def streamed(job: Job, source: Storage) -> Iterator[bytes | bytearray]:
    """The bytes of ``job``. That the source is the file that was planned on is checked before the first and after the
    last one."""
    if job.header:
        yield job.header
    yield from pieces_of(job.segments, job, source)


def pieces_of(segments: Iterable[Segment], job: Job, source: Storage) -> Iterator[bytes | bytearray]:
    """As :func:`streamed`, of some segments of ``job``."""
    where = f"{source}/{job.name}"
    with source.open(job.name) as file:
        check_unchanged(file.file_id, job.source, where)
        for segment in segments:
            yield from values(segment, partial(read_exactly, file, where), where)
        check_unchanged(file.file_id, job.source, where)


def read_exactly(file: Reader, where: str, start: int, length: int) -> bytes:
    """All of these bytes. Raises :class:`StorageError` where the file ends before."""
    data = file.read(start, length)
    if len(data) != length:
        raise ended(where, length - len(data))
    return data


class SourceChanged(StorageError):
    """A file of the source is not the one that was planned on."""


def check_unchanged(found: FileId | None, expected: FileId | None, where: str) -> None:
    """That a file, or none, is the one that was planned on. Raises :class:`SourceChanged`."""
    if found != expected:
        raise SourceChanged(
            "The checkpoint changed while it was converted", where=where, expected=told(expected), found=told(found),
            hint="wait until whatever writes it is done, then convert again",
        )  # fmt: skip


def told(file: FileId | None) -> str:
    """What a message says of a file, or of none."""
    return "no such file" if file is None else file.text


def ended(where: str, left: int) -> StorageError:
    return StorageError("A file ended while it was read", where=where, expected=f"{left} bytes more")
