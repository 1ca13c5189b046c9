"""One shard of a Plan: a new header and an ordered list of segments, most of them ranges of the source file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rewrite.checkpoint import FileId, Shard
from rewrite.header import DTYPE_BITS, TensorInfo, build_header, parse_header
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


@dataclass(frozen=True)
class Lookup:
    """Each of ``count`` bytes of the source file from ``start``, replaced by its entry of a table of 256.

    An FP8 weight times its scale takes one of 256 values: dequantising needs no arithmetic while it is written.
    """

    start: int
    count: int
    entries: tuple[bytes, ...]

    @property
    def length(self) -> int:
        return self.count * len(self.entries[0])


Segment = Copy | Fill | Lookup


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

    def filled(self) -> Iterator[tuple[str, bytes]]:
        """The new tensors that are one value, or one for each partition, repeated: name and bytes."""
        offset, fills = 0, {}
        for segment in self.segments:
            if isinstance(segment, Fill):
                fills[offset] = segment
            offset += segment.length
        for tensor in parse_header(self.header[8:], self.name).tensors:
            fill = fills.get(tensor.start)
            if fill is not None and fill.length == tensor.nbytes:
                yield tensor.name, fill.data * fill.count

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
    """What replaces a tensor of the source. ``Lookup.start`` counts from the beginning of the old tensor; ``name`` is
    the new one's, where it has another."""

    dtype: str
    shape: tuple[int, ...]
    segments: tuple[Fill | Lookup, ...]
    name: str | None = None

    @property
    def nbytes(self) -> int:
        return sum(segment.length for segment in self.segments)

    def info(self, old: str) -> TensorInfo:
        """Its entry of a header, at the beginning of the data. ``old`` is the name of what it replaces."""
        return TensorInfo(self.name or old, self.dtype, self.shape, 0, self.nbytes)


#: What becomes of tensors, by name; None: dropped. All others stay.
Edits = Mapping[str, NewTensor | None]


def touches(edits: Edits, shard: Shard) -> bool:
    """Whether the shard must be written anew."""
    return any(info.name in edits for info in shard.header.tensors)


def plan_shard(shard: Shard, edits: Edits) -> ShardPlan:
    """The new header and every tensor but the dropped ones, where :func:`~rewrite.placement.place` wants them."""
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
        tensors.append((new.info(old.name) if new else old)._replace(start=offset, end=end))
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


def _placed(segment: Fill | Lookup, begin: int) -> Segment:
    return replace(segment, start=segment.start + begin) if isinstance(segment, Lookup) else segment


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


def _segment_to_json(segment: Segment) -> list[str | int]:
    match segment:
        case Copy(start, length):
            return ["copy", start, length]
        case Fill(data, count):
            return ["fill", data.hex(), count]
        case Lookup(start, count, entries):
            return ["lookup", start, count, b"".join(entries).hex()]


def _segment_from_json(value: list[Any]) -> Segment:
    match value:
        case ["copy", start, length]:
            return Copy(start, length)
        case ["fill", data, count]:
            return Fill(bytes.fromhex(data), count)
        case _:
            _, start, count, table = value
            raw = bytes.fromhex(table)
            width = len(raw) // 256
            return Lookup(start, count, tuple(raw[i : i + width] for i in range(0, len(raw), width)))
