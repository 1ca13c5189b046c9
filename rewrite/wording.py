"""Numbers in words, the same wherever they are shown."""

from __future__ import annotations


def count(number: int, noun: str) -> str:
    """``1 shard``, ``2,000 shards``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def nbytes(number: int) -> str:
    """In units of 1000: ``3.21 MB``."""
    size, units = float(number), ["bytes", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{number} bytes" if units[0] == "bytes" else f"{size:.3g} {units[0]}"
