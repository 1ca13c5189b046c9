"""One shard of a Plan: a new header and an ordered list of segments, most of them ranges of the source file."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rewrite.checkpoint import FileId, Shard
from rewrite.header import DTYPE_BITS, TensorInfo, build_header
from rewrite.layouts import Fill


@dataclass(frozen=True)
class Copy:
    """``length`` bytes of the source file from the absolute offset ``start``."""

    start: int
    length: int


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

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "source": [self.source.size, self.source.mtime_ns],
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
    order = _aligned_order(shard.header.tensors, new_tensors)
    tensors: list[TensorInfo] = []
    segments: list[Segment] = []
    offset = 0
    for old in order:
        new = new_tensors.get(old.name)
        end = offset + (new.nbytes if new else old.nbytes)
        tensors.append(TensorInfo(old.name, old.dtype, new.shape if new else old.shape, offset, end))
        segments += list(new.fills) if new else [Copy(shard.header.size + old.start, old.nbytes)]
        offset = end
    return ShardPlan(shard.name, shard.file_id, build_header(tensors, shard.header.metadata), tuple(_merge(segments)))


def _aligned_order(tensors: tuple[TensorInfo, ...], new_tensors: Mapping[str, NewTensor]) -> Collection[TensorInfo]:
    """The source's order, unless the grown scales push a tensor off its dtype's alignment; then widest dtype first.

    Widest first is the stock writer's order, and aligned whatever the sizes are. Readers sort by offset: any order is
    legal (safetensors ``tensor.rs``).
    """
    shift = 0
    for t in tensors:
        width = max(DTYPE_BITS[t.dtype] // 8, 1)
        if t.start % width == 0 and (t.start + shift) % width:
            return sorted(tensors, key=lambda t: -DTYPE_BITS[t.dtype])
        if t.name in new_tensors:
            shift += new_tensors[t.name].nbytes - t.nbytes
    return tensors


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
