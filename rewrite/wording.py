"""Numbers in words, the same wherever they are shown."""

from __future__ import annotations

#: A relative error below this is none: float64's own rounding of a product is no error of anybody's.
EXACT = 1e-12


def error(value: float) -> str:
    """A relative error, in three digits."""
    return "0" if value < EXACT else f"{value:.3g}"


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
