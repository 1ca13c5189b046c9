"""How a reader can do the run again."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Run:
    """The command line, with names for paths; the versions of what ran; what was assumed."""

    command: str
    versions: tuple[tuple[str, str], ...]
    remarks: tuple[str, ...] = ()
