"""Laying out one shard: a new header, and an ordered list of segments, most of them ranges of the source file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from rewrite.checkpoint.checkpoint import Shard
from rewrite.checkpoint.header import DTYPE_BITS, Entry, Header, TensorInfo, build_header
from rewrite.planning.jobs import ShardPlan
from rewrite.planning.placement import BLOCK, Piece, place
from rewrite.planning.segments import Copy, Fill, Segment


@dataclass(frozen=True, slots=True)
class NewTensor:
    """What replaces a tensor of the source. The starts of ``segments`` count from the beginning of the old tensor;
    ``name`` is the new one's, where it has another."""

    dtype: str
    shape: tuple[int, ...]
    segments: tuple[Segment, ...]
    name: str | None = None

    @property
    def nbytes(self) -> int:
        return sum([segment.length for segment in self.segments])

    def info(self, old: TensorInfo) -> TensorInfo:
        """Its entry of a header, at the beginning of the data. ``old`` is what it replaces."""
        return TensorInfo(self.name or old.name, self.dtype, self.shape, 0, self.nbytes, old.shard)


#: What becomes of tensors, by name; None: dropped. All others stay.
Edits = Mapping[str, NewTensor | None]


def touches(edits: Edits, shard: Shard) -> bool:
    """Whether the shard must be written anew."""
    return any(info.name in edits for info in shard.header.tensors)


def plan_shard(shard: Shard, edits: Edits) -> ShardPlan:
    """The new header and every tensor but the dropped ones, where ``placement`` wants them."""
    placement = place(list(_pieces(shard.header, edits)))
    start = () if placement.residue is None else (placement.residue, BLOCK)
    header = build_header(_entries(placement.order), shard.header.metadata, *start)
    segments = _merged(_ranges(placement.order, shard.header.size))
    return ShardPlan(shard.name, shard.file_id, header, tuple(segments))


def _pieces(header: Header, edits: Edits) -> Iterator[Piece]:
    """Each with the tensor of the source or, where it is replaced, with both that and what replaces it."""
    for old in header.tensors:
        name, dtype, _, start, end, _ = old
        new = edits.get(name, old)
        if new is old:
            width = _WIDTHS[dtype]
            yield _new_piece(Piece, (old, width, end - start, header.size + start, not start % width))
        elif isinstance(new, NewTensor):
            yield Piece((old, new), _WIDTHS[new.dtype], new.nbytes, None)


_WIDTHS = {dtype: max(bits // 8, 1) for dtype, bits in DTYPE_BITS.items()}
_new_piece = tuple.__new__  # half the time


def _entries(order: Iterable[Piece]) -> Iterator[Entry]:
    offset = 0
    for tensor, _, size, source, _ in order:
        name, dtype, shape, _, _, where = tensor if source is not None else tensor[1].info(tensor[0])
        yield name, dtype, shape, offset, offset + size, where
        offset += size


def _ranges(order: Iterable[Piece], data: int) -> Iterator[tuple[int, int, Segment | None]]:
    """Start and length of what is copied, None; or of another segment, with it."""
    for tensor, _, size, source, _ in order:
        if source is not None:
            yield source, size, None
            continue
        old, new = tensor
        for segment in new.segments:
            placed = segment if isinstance(segment, Fill) else replace(segment, start=segment.start + data + old.start)
            is_copy = isinstance(placed, Copy)
            yield 0 if isinstance(placed, Fill) else placed.start, placed.length, None if is_copy else placed


def _merged(ranges: Iterable[tuple[int, int, Segment | None]]) -> Iterator[Segment]:
    """Adjacent ranges become one: one system call copies gigabytes."""
    first = end = 0  # no tensor lies there: every file has a header
    for begin, length, segment in ranges:
        if segment is None and begin == end:
            end += length
        elif length:  # else an empty tensor
            if end > first:
                yield Copy(first, end - first)
            first, end = (begin, begin + length) if segment is None else (0, 0)
            if segment is not None:
                yield segment
    if end > first:
        yield Copy(first, end - first)
