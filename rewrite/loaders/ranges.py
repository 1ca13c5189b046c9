"""Versions of engines, compared."""

from __future__ import annotations

import re


def version_key(version: str) -> tuple[int, ...]:
    """0.5.10 < 0.5.10.post1 < 0.5.11."""
    return tuple(int(number) for number in re.findall(r"\d+", version))
