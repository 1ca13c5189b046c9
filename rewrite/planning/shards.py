"""Laying out one shard: a new header, and an ordered list of segments, most of them ranges of the source file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from rewrite.checkpoint.checkpoint import Shard
from rewrite.checkpoint.header import DTYPE_BITS, TensorInfo, build_header
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
    olds = {info.name: info for info in shard.header.tensors}
    placement = place(
        [_piece(shard, old, edits.get(name)) for name, old in olds.items() if edits.get(name, old) is not None]
    )
    tensors: list[TensorInfo] = []
    segments: list[Segment] = []
    offset = 0
    for piece in placement.order:
        old, new = olds[piece.name], edits.get(piece.name)
        end = offset + piece.size
        tensors.append((new.info(old) if new else old)._replace(start=offset, end=end))
        begin = shard.header.size + old.start
        segments += [_placed(segment, begin) for segment in new.segments] if new else [Copy(begin, old.nbytes)]
        offset = end
    start = () if placement.residue is None else (placement.residue, BLOCK)
    header = build_header(tensors, shard.header.metadata, *start)
    return ShardPlan(shard.name, shard.file_id, header, tuple(_merge(segments)))


def _piece(shard: Shard, old: TensorInfo, new: NewTensor | None) -> Piece:
    width = max(DTYPE_BITS[new.dtype if new else old.dtype] // 8, 1)
    if new:
        return Piece(old.name, width, new.nbytes, None)
    return Piece(old.name, width, old.nbytes, shard.header.size + old.start, strict=old.start % width == 0)


def _placed(segment: Segment, begin: int) -> Segment:
    return segment if isinstance(segment, Fill) else replace(segment, start=segment.start + begin)


def _merge(segments: Iterable[Segment]) -> Iterator[Segment]:
    """Adjacent ranges become one run: one system call copies gigabytes."""
    last: Copy | None = None
    for segment in segments:
        if not segment.length:
            continue  # empty tensors
        if isinstance(segment, Copy) and last and last.start + last.length == segment.start:
            last = Copy(last.start, last.length + segment.length)
            continue
        if last:
            yield last
        last = segment if isinstance(segment, Copy) else None
        if not isinstance(segment, Copy):
            yield segment
    if last:
        yield last
