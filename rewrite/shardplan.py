"""One shard of a Plan: a new header and an ordered list of segments, most of them ranges of the source file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rewrite.checkpoint import FileId, Shard
from rewrite.header import DTYPE_BITS, TensorInfo, build_header
from rewrite.layouts import Fill
from rewrite.placement import BLOCK, Piece, place, whole_blocks


@dataclass(frozen=True)
class Copy:
    """``length`` bytes of the source file from the absolute offset ``start``."""

    start: int
    length: int

    def blocks(self, offset: int) -> Copy | None:
        """The part that can be shared when the range comes to ``offset`` of another file: its whole blocks, or None.

        They must lie in both files where blocks begin.
        """
        start, length = whole_blocks(self.start, self.length)
        return Copy(start, length) if length and (self.start - offset) % BLOCK == 0 else None


Segment = Copy | Fill


@dataclass(frozen=True)
class ShardPlan:
    """A shard to write: header bytes, then the segments in order. ``source`` is what its source must still be."""

    name: str
    source: FileId
    header: bytes
    segments: tuple[Segment, ...]

    @property
    def size(self) -> int:
        return len(self.header) + sum(segment.length for segment in self.segments)

    @property
    def shareable(self) -> int:
        """Bytes that need not be copied on a filesystem that shares blocks of :data:`~rewrite.placement.BLOCK`."""
        shareable, offset = 0, len(self.header)
        for segment in self.segments:
            if isinstance(segment, Copy) and (blocks := segment.blocks(offset)):
                shareable += blocks.length
            offset += segment.length
        return shareable

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "source": [self.source.size, self.source.mtime_ns],
            "shareable": self.shareable,
            "header": self.header[8:].decode(),
            "segments": [_segment_to_json(segment) for segment in self.segments],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ShardPlan:
        """The inverse of :meth:`to_json`."""
        raw = value["header"].encode()
        header = len(raw).to_bytes(8, "little") + raw
        segments = tuple(_segment_from_json(segment) for segment in value["segments"])
        return cls(value["name"], FileId(*value["source"]), header, segments)


@dataclass(frozen=True)
class NewTensor:
    """What replaces a tensor of the source."""

    shape: tuple[int, ...]
    fills: tuple[Fill, ...]

    @property
    def nbytes(self) -> int:
        return sum(fill.length for fill in self.fills)


def touches(shard: Shard, new_tensors: Mapping[str, NewTensor]) -> bool:
    return any(info.name in new_tensors for info in shard.header.tensors)


def plan_shard(shard: Shard, new_tensors: Mapping[str, NewTensor]) -> ShardPlan:
    """The new header and every tensor, in the source's order but for those whose moving lets more bytes be shared."""
    infos = {info.name: info for info in shard.header.tensors}
    placement = place([_piece(shard, info, new_tensors.get(info.name)) for info in infos.values()])
    tensors: list[TensorInfo] = []
    segments: list[Segment] = []
    offset = 0
    for piece in placement.order:
        old, new = infos[piece.name], new_tensors.get(piece.name)
        tensors.append(TensorInfo(old.name, old.dtype, new.shape if new else old.shape, offset, offset + piece.size))
        segments += list(new.fills) if new else [Copy(shard.header.size + old.start, old.nbytes)]
        offset += piece.size
    start = () if placement.residue is None else (placement.residue, BLOCK)
    header = build_header(tensors, shard.header.metadata, *start)
    return ShardPlan(shard.name, shard.file_id, header, tuple(_merge(segments)))


def _piece(shard: Shard, old: TensorInfo, new: NewTensor | None) -> Piece:
    width = max(DTYPE_BITS[old.dtype] // 8, 1)
    if new:
        return Piece(old.name, width, new.nbytes, None)
    return Piece(old.name, width, old.nbytes, shard.header.size + old.start, strict=old.start % width == 0)


def _merge(segments: Iterable[Segment]) -> Iterator[Segment]:
    """Adjacent ranges become one run: one system call copies gigabytes."""
    last: Copy | None = None
    for segment in segments:
        if isinstance(segment, Copy) and last and last.start + last.length == segment.start:
            last = Copy(last.start, last.length + segment.length)
            continue
        if last and last.length:
            yield last
        last = segment if isinstance(segment, Copy) else None
        if isinstance(segment, Fill):
            yield segment
    if last and last.length:
        yield last


def _segment_to_json(segment: Segment) -> list[str | int]:
    if isinstance(segment, Copy):
        return ["copy", segment.start, segment.length]
    return ["fill", segment.data.hex(), segment.count]


def _segment_from_json(value: list[Any]) -> Segment:
    kind, first, second = value
    return Copy(first, second) if kind == "copy" else Fill(bytes.fromhex(first), second)
