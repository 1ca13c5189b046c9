"""How an object is put together in a bucket: parts that the store copies by itself, and parts that are uploaded. Pure.

S3 takes at most 10,000 parts, each of 5 MiB to 5 GiB; only the last one may be smaller ("Amazon S3 multipart upload
limits"). A new header of some kilobytes is therefore topped up with bytes from behind it, which have to be downloaded.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import ceil

from rewrite.planning.jobs import Job
from rewrite.planning.segments import Copy, Fill, Segment

MIN_PART = 5 << 20
MAX_PART = 5 << 30
MAX_PARTS = 10_000
MAX_OBJECT = 5 << 40
_COPIED = 256 << 20  # what the store copies in one request: parts are copied at the same time
_SENT = 16 << 20  # what is in memory at a time: parts that are uploaded have one to two times this


@dataclass(frozen=True)
class CopyPart:
    """A range of the source object that the store copies: one part."""

    number: int
    start: int
    size: int

    @property
    def sizes(self) -> tuple[int]:
        return (self.size,)


@dataclass(frozen=True)
class PutParts:
    """Segments whose bytes are uploaded one after the other: ``sizes`` of the parts, which count from ``number``."""

    number: int
    segments: tuple[Segment, ...]
    sizes: tuple[int, ...]


Run = CopyPart | PutParts


def numbered_sizes(runs: Iterable[Run]) -> dict[int, int]:
    """The size of every part by its number."""
    return {number: size for run in runs for number, size in enumerate(run.sizes, run.number)}


def plan_parts(job: Job, *, copies: bool) -> tuple[Run, ...]:
    """The parts of an object. Without ``copies`` all of it is uploaded: its source lies somewhere else.

    Raises :class:`ValueError` for an object that no number of parts can make.
    """
    if job.size > MAX_OBJECT:
        raise ValueError(f"more than the {MAX_OBJECT} bytes of the largest object")
    segments = [segment for segment in (Fill(job.header, 1), *job.segments) if segment.length]
    shortest = sorted(
        (i for i, segment in enumerate(segments) if copies and isinstance(segment, Copy)),
        key=lambda i: segments[i].length,
    )
    # Each range that the store copies costs up to two parts: its own, and one for what changed before it. Where that is
    # too many, as few ranges as possible, the shortest ones, are uploaded together with their neighbors.
    uploaded = bisect_left(range(len(shortest) + 1), True, key=lambda n: _fits(_plan(job, segments, shortest[n:])))
    runs = _plan(job, segments, shortest[uploaded:])
    if not _fits(runs):
        raise ValueError(f"more than the {MAX_PARTS} parts of an object")
    return runs


def _fits(runs: tuple[Run, ...]) -> bool:
    return len(numbered_sizes(runs)) <= MAX_PARTS


def _plan(job: Job, segments: Sequence[Segment], copied: Iterable[int]) -> tuple[Run, ...]:
    """The parts, where the store copies the segments of these indices."""
    planner = _Planner(max(_COPIED, ceil(job.size / (MAX_PARTS // 4))), max(_SENT, ceil(job.size / (MAX_PARTS // 4))))
    by_store = set(copied)
    for i, segment in enumerate(segments):
        if i in by_store and isinstance(segment, Copy):
            planner.copy(segment, last=i == len(segments) - 1)
        else:
            planner.put(segment)
    planner.flush()
    return tuple(planner.runs)


@dataclass
class _Planner:
    copied: int  # the largest range to copy
    sent: int  # bytes after which an uploaded part is complete
    runs: list[Run] = field(default_factory=list)
    _waiting: list[Segment] = field(default_factory=list)
    _size: int = 0
    _next: int = 1

    def put(self, segment: Segment) -> None:
        """Bytes to upload."""
        for piece in self._pieces(segment):
            self._waiting.append(piece)
            self._size += piece.length
            if self._size >= self.sent:
                self.flush()

    def copy(self, segment: Copy, *, last: bool) -> None:
        """Bytes that the store can copy, as far as parts are large enough."""
        top_up = max(MIN_PART - self._size, 0) if self._waiting else 0
        if segment.length < top_up + (1 if last else MIN_PART):
            self.put(segment)  # too short for a part of its own
            return
        if top_up:
            self.put(Copy(segment.start, top_up))
        self.flush()
        start, length = segment.start + top_up, segment.length - top_up
        count = ceil(length / self.copied)
        cuts = [start + length * n // count for n in range(count + 1)]
        for begin, end in pairwise(cuts):
            self.runs.append(CopyPart(self._next, begin, end - begin))
            self._next += 1

    def flush(self) -> None:
        """What waits becomes a run of parts of about the same size."""
        if not self._size:
            return
        count = max(1, self._size // self.sent)
        cuts = [self._size * n // count for n in range(count + 1)]
        sizes = tuple(end - begin for begin, end in pairwise(cuts))
        self.runs.append(PutParts(self._next, tuple(self._waiting), sizes))
        self._next += count
        self._waiting, self._size = [], 0

    def _pieces(self, segment: Segment) -> Iterator[Segment]:
        """Long ranges of the source in pieces, so that several are uploaded at the same time."""
        if not isinstance(segment, Copy):
            yield segment
            return
        for done in range(0, segment.length, self.sent):
            yield Copy(segment.start + done, min(self.sent, segment.length - done))
