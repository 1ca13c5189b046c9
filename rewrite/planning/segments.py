"""The pieces that a new shard is made of: bytes of the source, repeated bytes, bytes looked up in a table, FP8 weights
times their scales."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

from rewrite.checkpoint.header import DTYPE_BITS
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


@dataclass(frozen=True, slots=True)
class Dequantize:
    """FP8 codes ``[rows, columns]`` (E4M3) of the source file from ``start``, each times its scale, as ``dtype``.

    There is a scale for every ``block`` (rows, columns), row of blocks by row of blocks; the last ones may be smaller.
    ``scales`` is where they begin in the source file or, where they lie in another file, their bytes. So a plan stays
    small: a table for each of a million rows would be larger than the weights.
    """

    start: int
    rows: int
    columns: int
    block: tuple[int, int]
    scales: int | bytes
    scale_dtype: str
    dtype: str

    @property
    def length(self) -> int:
        return self.rows * self.columns * DTYPE_BITS[self.dtype] // 8

    @property
    def blocks_across(self) -> int:
        """Scales for each row of blocks."""
        return ceil(self.columns / self.block[1])

    @property
    def scale_bytes(self) -> int:
        return ceil(self.rows / self.block[0]) * self.blocks_across * DTYPE_BITS[self.scale_dtype] // 8


Segment = Copy | Fill | Lookup | Dequantize


def to_json(segment: Segment) -> list[str | int]:
    """A segment as a list: its kind, then its fields."""
    match segment:
        case Copy(start, length):
            return ["copy", start, length]
        case Fill(data, count):
            return ["fill", data.hex(), count]
        case Lookup(start, count, entries):
            return ["lookup", start, count, b"".join(entries).hex()]
        case Dequantize(start, rows, columns, block, scales, scale_dtype, dtype):
            where = scales if isinstance(scales, int) else scales.hex()
            return ["dequantize", start, rows, columns, *block, where, scale_dtype, dtype]


def from_json(value: list[Any]) -> Segment:
    """The inverse of :func:`to_json`."""
    match value:
        case ["copy", start, length]:
            return Copy(start, length)
        case ["fill", data, count]:
            return Fill(bytes.fromhex(data), count)
        case ["dequantize", start, rows, columns, high, wide, scales, scale_dtype, dtype]:
            where = scales if isinstance(scales, int) else bytes.fromhex(scales)
            return Dequantize(start, rows, columns, (high, wide), where, scale_dtype, dtype)
        case _:
            _, start, count, table = value
            raw = bytes.fromhex(table)
            width = len(raw) // 256
            return Lookup(start, count, tuple(raw[i : i + width] for i in range(0, len(raw), width)))


def is_within(segment: Segment, size: int) -> bool:
    """Whether a segment, read from a file that anybody could edit, takes bytes of a source of ``size`` only."""
    match segment:
        case Copy(start, length):
            return _is_range(start, length, size)
        case Fill(data, count):
            return bool(data) and _is_range(0, count, count)
        case Lookup(start, count, entries):
            return _is_range(start, count, size) and len(entries) == 256 and len({len(e) for e in entries} - {0}) == 1
        case Dequantize(start, rows, columns, block, scales, scale_dtype, dtype):
            known = {scale_dtype, dtype} <= DTYPE_BITS.keys() and all(type(n) is int and n > 0 for n in block)
            if not known or not _is_range(rows, columns, rows + columns) or not _is_range(start, rows * columns, size):
                return False
            needed = segment.scale_bytes
            return len(scales) == needed if isinstance(scales, bytes) else _is_range(scales, needed, size)


def _is_range(start: int, length: int, size: int) -> bool:
    return type(start) is int and type(length) is int and 0 <= start <= start + length <= size
