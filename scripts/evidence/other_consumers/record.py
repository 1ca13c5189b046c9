"""The record, tests/other_consumers.json, and the table of rewrite/loaders/README.md that it becomes:

schema   1
date     when it was recorded
cells    one for each consumer, version, fixture and profile:
  outcome    reads          every tensor was compared with the truth: `worst` is the largest relative error, of `tensor`
             raises         `error` has type, message and place of what was raised
             refused        `rewrite convert` refuses: `error` has its message
             unknown model  the consumer raises on the same model without any quantization, too: `error`
             other tensors  it reads the checkpoint into other tensors than those of the unquantized model: `unmatched`
                            names some; not compared
             not run        nothing was learnt of the consumer
  compared   number of tensors
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import records
from loader_matrix.cases import REPOSITORY

from other_consumers.cases import PROFILES


@dataclass(frozen=True)
class Cell:
    """What a consumer makes of one checkpoint; see the module's docstring."""

    consumer: str
    version: str
    fixture: str
    profile: str
    outcome: str
    worst: float | None = None
    tensor: str | None = None
    compared: int = 0
    unmatched: list[str] = field(default_factory=list)
    error: dict[str, str] | None = None

    @property
    def key(self) -> tuple[str, str, str, str]:
        return (self.consumer, self.version, self.fixture, self.profile)


def _order(cell: Cell) -> tuple[str | int, ...]:
    return (*cell.key[:3], PROFILES.index(cell.profile))


BOOK = records.Book(REPOSITORY / "tests" / "other_consumers.json", 1, Cell, _order)


def readme(cells: Sequence[Cell]) -> str:
    """A row for each consumer and fixture; fixtures of which the same is true share one."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for cell in cells:
        rows.setdefault((cell.consumer, cell.fixture), {})[cell.profile] = said(cell)
    alike: dict[tuple[str, ...], list[str]] = {}
    for (consumer, fixture), by_profile in rows.items():
        alike.setdefault((consumer, *(by_profile[profile] for profile in PROFILES)), []).append(fixture)
    lines = [(line[0], ", ".join(names), *line[1:]) for line, names in alike.items()]
    return records.markdown(("consumer", "fixture", *PROFILES), lines)


def said(cell: Cell) -> str:
    """A cell in a word or a number."""
    if cell.outcome != "reads":
        return "-" if cell.outcome == "refused" else cell.outcome
    return f"{cell.worst:.1e}".replace("e-0", "e-") if cell.worst else "0"
