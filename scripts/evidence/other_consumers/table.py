"""The record as the table of rewrite/loaders/README.md."""

from __future__ import annotations

from collections.abc import Sequence

import records

from other_consumers.cases import PROFILES
from other_consumers.record import Cell

_HEAD = ("consumer", "fixture", *PROFILES)


def readme(cells: Sequence[Cell]) -> str:
    """A row for each consumer and fixture; fixtures of which the same is true share one."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for cell in cells:
        rows.setdefault((cell.consumer, cell.fixture), {})[cell.profile] = said(cell)
    alike: dict[tuple[str, ...], list[str]] = {}
    for (consumer, fixture), by_profile in rows.items():
        alike.setdefault((consumer, *(by_profile[profile] for profile in PROFILES)), []).append(fixture)
    lines = [(line[0], ", ".join(names), *line[1:]) for line, names in alike.items()]
    return records.markdown(_HEAD, lines)


def said(cell: Cell) -> str:
    """A cell in a word or a number."""
    if cell.outcome != "reads":
        return "-" if cell.outcome == "refused" else cell.outcome
    return f"{cell.worst:.1e}".replace("e-0", "e-") if cell.worst else "0"
