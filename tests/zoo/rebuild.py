"""Rebuilds a checkpoint of the zoo from what is stored of it. Pure Python, nothing but the standard library.

An entry is a folder: ``entry.json`` (where it comes from, its shards and their tensors), ``small.bin`` (the tensors
that were kept, byte for byte, in the order of ``entry.json``), and ``files``: the small files of the producer as they
were. The tensors that were left out are made up: seeded by entry and name, finite, of plausible size. The headers come
out as the producer wrote them, to the byte.
"""

from __future__ import annotations

import json
import random
import shutil
import struct
from functools import cache
from pathlib import Path
from statistics import NormalDist
from typing import Any

ENTRIES = Path(__file__).parent / "entries"
INDEX = "entry.json"
SMALL = "small.bin"
FILES = "files"
#: Bytes of a weight. Sub-byte types are stored in U8 by all producers.
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2}  # the others: 1
_STANDARD_DEVIATION = 0.02


def names() -> list[str]:
    """Every entry."""
    return sorted(path.parent.name for path in ENTRIES.glob(f"*/{INDEX}"))


def read_entry(name: str, entries: Path = ENTRIES) -> dict[str, Any]:
    """What is known of an entry."""
    value: dict[str, Any] = json.loads((entries / name / INDEX).read_text(encoding="utf-8"))
    return value


def rebuild(name: str, out: Path, entries: Path = ENTRIES) -> Path:
    """Write the checkpoint ``name`` to the new directory ``out``: the same bytes every time."""
    folder, entry = entries / name, read_entry(name, entries)
    shutil.copytree(folder / FILES, out, copy_function=shutil.copyfile)
    small, at = (folder / SMALL).read_bytes(), 0
    for shard in entry["shards"]:
        data = [header(shard)]
        for tensor, dtype, shape, kept in shard["tensors"]:
            size = nbytes(dtype, shape)
            if kept:
                data.append(small[at : at + size])
                at += size
            else:
                data.append(made_up(f"{name}/{tensor}", dtype, size))
        (out / shard["name"]).write_bytes(b"".join(data))
    if at != len(small):
        raise ValueError(f"{name}: {SMALL} has {len(small)} bytes, the kept tensors have {at}")
    return out


def header(shard: dict[str, Any]) -> bytes:
    """Length and header of a shard, as safetensors writes them."""
    value: dict[str, Any] = {} if shard["metadata"] is None else {"__metadata__": shard["metadata"]}
    start = 0
    for tensor, dtype, shape, _ in shard["tensors"]:
        stop = start + nbytes(dtype, shape)
        value[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def nbytes(dtype: str, shape: list[int]) -> int:
    """Bytes of a tensor."""
    size = SIZES.get(dtype, 1)
    for dimension in shape:
        size *= dimension
    return size


def made_up(seed: str, dtype: str, size: int) -> bytes:
    """``size`` bytes of a weight: normally distributed numbers, or any codes where several share a byte."""
    drawn = random.Random(seed).randbytes(size // SIZES.get(dtype, 1))
    if dtype in ("U8", "I32", "I64"):
        return random.Random(seed).randbytes(size)
    codes = _codes(dtype)
    return b"".join([codes[byte] for byte in drawn])


@cache
def _codes(dtype: str) -> tuple[bytes, ...]:
    """256 numbers of a normal distribution, one for each byte that can be drawn."""
    normal = NormalDist()
    drawn = [normal.inv_cdf((i + 0.5) / 256) for i in range(256)]
    if dtype == "F8_E4M3":  # the largest of a row is 448, which is what weights are scaled to
        return tuple(_e4m3(x / drawn[-1] * 448) for x in drawn)
    if dtype == "I8":
        return tuple(struct.pack("b", round(x / drawn[-1] * 127)) for x in drawn)
    if dtype == "BF16":
        return tuple(struct.pack("<f", x * _STANDARD_DEVIATION)[2:] for x in drawn)
    code = {"F64": "<d", "F32": "<f", "F16": "<e"}[dtype]
    return tuple(struct.pack(code, x * _STANDARD_DEVIATION) for x in drawn)


def _e4m3(value: float) -> bytes:
    """The nearest E4M3 code, never NaN."""
    code = min(range(0x7F), key=lambda each: abs(_magnitude(each) - abs(value)))
    return bytes([code | 0x80 if value < 0 else code])


def _magnitude(code: int) -> float:
    exponent, mantissa = code >> 3, code & 7
    return mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
