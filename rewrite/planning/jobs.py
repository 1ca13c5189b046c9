"""The files of an output, each as a job that can be done on its own: pure data, for the writer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rewrite.checkpoint.storage import FileId
from rewrite.planning import segments
from rewrite.planning.segments import Copy, Segment


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
        """Bytes that need not be copied on a filesystem that can share blocks with the source."""
        shareable, offset = 0, len(self.header)
        for segment in self.segments:
            if isinstance(segment, Copy) and (blocks := segment.blocks(offset)):
                shareable += blocks.length
            offset += segment.length
        return shareable

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "source": self.source.to_json(),
            "shareable": self.shareable,
            "header": self.header[8:].decode(),
            "segments": [segments.to_json(segment) for segment in self.segments],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ShardPlan:
        """The inverse of :meth:`to_json`."""
        raw = value["header"].encode()
        header = len(raw).to_bytes(8, "little") + raw
        return cls(value["name"], FileId(*value["source"]), header, tuple(map(segments.from_json, value["segments"])))


@dataclass(frozen=True)
class FileCopy:
    """A file that comes along as it is."""

    name: str
    source: FileId

    @property
    def header(self) -> bytes:
        return b""

    @property
    def segments(self) -> tuple[Segment, ...]:
        """As of a shard: all of the source."""
        return (Copy(0, self.size),)

    @property
    def size(self) -> int:
        return self.source.size

    @property
    def shareable(self) -> int:
        """All of it: a file that does not change is cloned whole."""
        return self.source.size

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "source": self.source.to_json()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> FileCopy:
        """The inverse of :meth:`to_json`."""
        return cls(value["name"], FileId(*value["source"]))


#: A file that takes time, and can be written on its own.
Job = ShardPlan | FileCopy


@dataclass(frozen=True)
class TextFile:
    """A small file that is written anew: config or index. ``source`` is what that file was when it was planned on."""

    name: str
    text: str
    source: FileId

    @property
    def size(self) -> int:
        return len(self.text) if self.text.isascii() else len(self.text.encode())  # an index may be 100 MB

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "text": self.text, "source": self.source.to_json()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TextFile:
        """The inverse of :meth:`to_json`."""
        return cls(value["name"], value["text"], FileId(*value["source"]))
