"""The one pass over all files of OUT: compare bytes, take digests, count codes, all from the same buffers.

Every file of OUT is a list of :class:`Span` in the order of its bytes. A span either must be the same bytes as a part
of IN, or follows from it by a rule, or is not compared. Files are independent of each other, so several workers can
read.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING

from rewrite.checkpoint.checkpoint import Checkpoint
from rewrite.checkpoint.header import TensorInfo
from rewrite.checkpoint.storage import FileId, Reader, Storage
from rewrite.errors import StorageError
from rewrite.progress import Counter, Progress
from rewrite.verification.reader import DequantizedRows

if TYPE_CHECKING:
    from rewrite.verification.counts import CodeCounts

#: What looks at the rows of IN as they come by, for each span.
Watches = tuple["CodeCounts | None", ...]
_CHUNK = 1 << 20  # both sides of a comparison stay in the processor's cache
_TASK = 256 << 20  # bytes for one worker, where files need not be read from end to end


@dataclass(frozen=True)
class Span:
    """``length`` bytes from ``start`` of a file of OUT. ``old``: where they come from in IN's file of the same name;
    None: from nowhere, they are only digested. ``tensors`` of IN, to name a difference; the span begins ``skipped``
    bytes into the first of them (by a rule: into what it becomes)."""

    start: int
    length: int
    old: int | None = None
    tensors: tuple[TensorInfo, ...] = ()
    skipped: int = 0
    rule: DequantizedRows | None = None
    watch: CodeCounts | None = None

    @property
    def rows(self) -> tuple[int, int]:
        """Bytes of a row in IN and in OUT: of what is read in whole rows only."""
        if self.rule is not None:
            return self.rule.old_row, self.rule.new_row
        return (self.watch.row, self.watch.row) if self.watch else (1, 1)


@dataclass(frozen=True)
class FileSpans:
    """A file of OUT: ``spans`` in order, without overlaps."""

    name: str
    size: int
    spans: tuple[Span, ...]

    def without_gaps(self) -> FileSpans:
        """With spans for the bytes in between."""
        complete: list[Span] = []
        at = 0
        for span in self.spans:
            if span.start > at:
                complete.append(Span(at, span.start - at))
            complete.append(span)
            at = span.start + span.length
        if at < self.size:
            complete.append(Span(at, self.size - at))
        return replace(self, spans=tuple(complete))

    def take(self, watches: Watches) -> None:
        """What the watches of the spans have seen in another process."""
        for span, watch in zip(self.spans, watches, strict=True):
            if span.watch is not None and watch is not None and span.watch is not watch:
                span.watch.take(watch)

    def tasks(self) -> Iterator[FileSpans]:
        """Parts of some 256 MB."""
        part: list[Span] = []
        for span in self.spans:
            if part and sum(each.length for each in part) + span.length > _TASK:
                yield replace(self, spans=tuple(part))
                part = []
            part.append(span)
        if part:
            yield replace(self, spans=tuple(part))


@dataclass
class Reading:
    """What the pass found, of all files or of a part: the first byte of OUT that is not as it must be, of ``tensors``
    (by their name in IN) and of ``files`` that are no shards; and the tensors that were ``compared`` at all.
    ``digests`` are SHA-256, by file of OUT; None where they were not asked for."""

    compared: set[str] = field(default_factory=set)
    tensors: dict[str, int] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    digests: dict[str, str] | None = None

    def add(self, part: Reading) -> None:
        """What a part found."""
        self.compared |= part.compared
        self.tensors = part.tensors | self.tensors  # parts of a weight come in order: the first that differs is kept
        self.files |= part.files
        if self.digests is not None:
            self.digests |= part.digests or {}

    def same(self, name: str) -> bool:
        """Whether a tensor was compared and is what it must be. One that lies in another shard was not compared."""
        return name in self.compared and name not in self.tensors


def read_files(
    files: Sequence[FileSpans],
    source: Checkpoint,
    out: Checkpoint,
    *,
    digest: bool,
    workers: int,
    progress: Progress | None,
    executor: Executor | None = None,
) -> Reading:
    """Read all ``files``, ``workers`` at a time, or by the workers of an ``executor``, whose tasks are pickled. With
    ``digest`` each is read from its first byte to its last.

    Raises :class:`StorageError` for what cannot be read, or changes while it is read.
    """
    tasks = [file.without_gaps() for file in files] if digest else [*chain.from_iterable(f.tasks() for f in files)]
    sizes = [sum(span.length for span in task.spans) for task in tasks]
    counter = Counter(sum(sizes), progress)
    found = Reading(digests={} if digest else None)

    def part(task: FileSpans) -> Part:
        return Part(task, source.storage, out.storage, source.files.get(task.name), out.files[task.name], digest)

    here = executor is None
    pool: AbstractContextManager[Executor] = nullcontext(executor) if executor else ThreadPoolExecutor(workers)
    with pool as readers:
        futures = [readers.submit(part(task).read, counter if here else None) for task in tasks]
        try:
            for task, size, future in zip(tasks, sizes, futures, strict=True):
                done, watches = future.result()
                task.take(watches)
                found.add(done)
                if not here:
                    counter.advance(size)
        finally:
            counter.stop.set()  # threads that still read end at their next chunk
            for future in futures:
                future.cancel()
    return found


@dataclass(frozen=True)
class Part:
    """One file, or a part of one, and where it lies. Picklable: any process that sees the storages can read it."""

    file: FileSpans
    source: Storage
    out: Storage
    source_id: FileId | None
    out_id: FileId
    digest: bool

    def read(self, counter: Counter | None = None) -> tuple[Reading, Watches]:
        """Read it once: what was found, and the watches of the spans, filled."""
        return _Pass(self, counter).run(), tuple(span.watch for span in self.file.spans)


class _Pass:
    """A part while it is read."""

    def __init__(self, part: Part, counter: Counter | None) -> None:
        self._part, self._counter = part, counter
        self._sha = hashlib.sha256() if part.digest else None
        self._found = Reading({info.name for span in part.file.spans for info in span.tensors})

    def run(self) -> Reading:
        part = self._part
        name = part.file.name
        with part.out.open(name) as other:
            new = _Window(other, name)
            if any(span.old is not None for span in part.file.spans):
                with part.source.open(name) as one:
                    self._read(_Window(one, name), new)
                    _unchanged(one, part.source_id, f"{part.source}: {name}")
            else:
                self._read(None, new)
            _unchanged(other, part.out_id, f"{part.out}: {name}")
        self._found.digests = {name: self._sha.hexdigest()} if self._sha else None
        return self._found

    def _read(self, old: _Window | None, new: _Window) -> None:
        for span in self._part.file.spans:
            old_row, new_row = span.rows
            step = max(1, _CHUNK // max(old_row, new_row, 1))
            rows = span.length // new_row if new_row else 0
            for first in range(0, rows, step):
                count = min(step, rows - first)
                found = new.read(span.start + first * new_row, count * new_row)
                if old is not None and span.old is not None:
                    stored = old.read(span.old + first * old_row, count * old_row)
                    self._compare(span, stored, found, first)
                if self._sha is not None:
                    self._sha.update(found)
                if self._counter is not None:
                    self._counter.advance(len(found))

    def _compare(self, span: Span, stored: bytes, found: bytes, first: int) -> None:
        expected = stored if span.rule is None else span.rule.expected(stored, first)
        if expected != found:
            self._locate(span, expected, found, first * span.rows[1])
        if span.watch is not None:
            span.watch.add(stored, first)

    def _locate(self, span: Span, expected: bytes, found: bytes, offset: int) -> None:
        """Note the first different byte of every tensor in this chunk, which begins ``offset`` bytes into the span."""
        tensors, at = self._found.tensors, offset + first_difference(expected, found)
        if not span.tensors:
            self._found.files.setdefault(self._part.file.name, span.start + at)
            return
        if span.rule is not None:
            tensors.setdefault(span.tensors[0].name, span.skipped + at)
            return
        place = span.tensors[0].start + span.skipped + offset
        number = bisect_right(span.tensors, place, key=lambda info: info.start) - 1
        for info in span.tensors[number:]:
            if info.start >= place + len(found):
                return
            low, high = max(info.start - place, 0), min(info.end - place, len(found))
            if info.name not in tensors and expected[low:high] != found[low:high]:
                at = low + first_difference(expected[low:high], found[low:high])
                tensors[info.name] = place + at - info.start


class _Window:
    """Reads of a file in order: many small ones become one of a chunk."""

    def __init__(self, reader: Reader, name: str) -> None:
        self._reader, self._name = reader, name
        self._start, self._block = 0, b""

    def read(self, start: int, length: int) -> bytes:
        """Exactly ``length`` bytes. Raises :class:`StorageError` where the file ends before."""
        if length >= _CHUNK // 2:
            return self._whole(self._reader.read(start, length), length)
        if not self._start <= start <= start + length <= self._start + len(self._block):
            self._start, self._block = start, self._reader.read(start, _CHUNK)
        return self._whole(self._block[start - self._start : start - self._start + length], length)

    def _whole(self, found: bytes, length: int) -> bytes:
        if len(found) != length:
            raise StorageError("A file shrank while it was read", where=self._name)
        return found


def first_difference(one: bytes, other: bytes) -> int:
    """The first place where two runs of bytes of the same length differ."""
    low, high = 0, len(one)
    while high - low > 1:
        middle = (low + high) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low


def _unchanged(reader: Reader, opened: FileId | None, where: str) -> None:
    """That the verdict is about the bytes that were there when the checkpoint was opened."""
    if reader.file_id != opened:
        raise StorageError(
            "The file changed while it was read",
            where=where,
            expected=opened.text if opened else "no file",
            found=reader.file_id.text,
            hint="let nothing write to the checkpoint, then verify again",
        )
