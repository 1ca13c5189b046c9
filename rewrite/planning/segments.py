"""The pieces that a new shard is made of: bytes of the source, repeated bytes, bytes looked up in a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rewrite.planning.placement import BLOCK, whole_blocks


@dataclass(frozen=True, slots=True)
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


@dataclass(frozen=True, slots=True)
class Fill:
    """``count`` repetitions of ``data``."""

    data: bytes
    count: int

    @property
    def length(self) -> int:
        return len(self.data) * self.count


@dataclass(frozen=True, slots=True)
class Lookup:
    """Each of ``count`` bytes of the source file from ``start``, replaced by its entry of a table of 256.

    An FP8 weight times its scale takes one of 256 values: dequantizing needs no arithmetic while it is written.
    """

    start: int
    count: int
    entries: tuple[bytes, ...]

    @property
    def length(self) -> int:
        return self.count * len(self.entries[0])


Segment = Copy | Fill | Lookup


def to_json(segment: Segment) -> list[str | int]:
    """A segment as a list: its kind, then its fields."""
    match segment:
        case Copy(start, length):
            return ["copy", start, length]
        case Fill(data, count):
            return ["fill", data.hex(), count]
        case Lookup(start, count, entries):
            return ["lookup", start, count, b"".join(entries).hex()]


def from_json(value: list[Any]) -> Segment:
    """The inverse of :func:`to_json`."""
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
