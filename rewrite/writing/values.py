"""The bytes of the segments that are new: repeated, looked up, dequantized. A megabyte or so is in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rewrite.planning.segments import Copy, Dequantize, Fill, Lookup, Segment
from rewrite.quantization.dtypes import decode, dequantizing_tables

#: Exactly ``length`` bytes of the source from ``start``, or an error.
Read = Callable[[int, int], bytes]

BUFFER = 1 << 20
_COPY = 8 << 20  # bytes at a time where they come over a network


def values(segment: Segment, read: Read, where: str) -> Iterator[bytes | bytearray]:
    """The bytes of any segment, in order; ``where`` names the source in messages."""
    match segment:
        case Copy(start, length):
            for done in range(0, length, _COPY):
                yield read(start + done, min(_COPY, length - done))
        case Fill():
            yield from _filled(segment)
        case Lookup():
            yield from _looked_up(segment, read)
        case Dequantize():
            yield from _dequantized(segment, read, where)


def _filled(fill: Fill) -> Iterator[bytes]:
    per_write = max(1, BUFFER // len(fill.data))
    left = fill.count
    while left:
        count = min(left, per_write)
        yield fill.data * count
        left -= count


def _looked_up(run: Lookup, read: Read) -> Iterator[bytearray]:
    """Replace every byte by its table entry: one translation for each byte of an entry, interleaved."""
    columns = [bytes(entry[i] for entry in run.entries) for i in range(len(run.entries[0]))]
    for start in range(0, run.count, BUFFER):
        data = read(run.start + start, min(run.count - start, BUFFER))
        wide = bytearray(len(data) * len(columns))
        for i, column in enumerate(columns):
            wide[i :: len(columns)] = data.translate(column)
        yield wide


def _dequantized(run: Dequantize, read: Read, where: str) -> Iterator[bytearray]:
    """Each row of codes through the tables of its scales. One block of rows, or a megabyte, is in memory at a time."""
    raw = run.scales if isinstance(run.scales, bytes) else read(run.scales, run.scale_bytes)
    scales = decode(run.scale_dtype, raw, where)
    across, high = run.blocks_across, run.block[0]
    rows_at_once = max(1, BUFFER // max(1, run.columns))
    for band, first in enumerate(range(0, run.rows, high)):
        tables = [dequantizing_tables(s, run.dtype) for s in scales[band * across : (band + 1) * across]]
        last = min(first + high, run.rows)
        for start in range(first, last, rows_at_once):
            count = min(rows_at_once, last - start) * run.columns
            codes = read(run.start + start * run.columns, count)
            yield _through(tables, codes, run.columns, run.block[1])


def _through(tables: list[tuple[bytes, ...]], codes: bytes, columns: int, width: int) -> bytearray:
    """Rows of ``columns`` codes, where each ``width`` of them go through tables of their own."""
    wide = bytearray(len(codes) * len(tables[0]))
    for i in range(len(tables[0])):
        if len(tables) == 1:
            plane = codes.translate(tables[0][i])
        else:
            plane = b"".join(
                codes[row + j * width : row + min((j + 1) * width, columns)].translate(table[i])
                for row in range(0, len(codes), columns)
                for j, table in enumerate(tables)
            )
        wide[i :: len(tables[0])] = plane
    return wide
