"""The record, tests/kernel_choice.json:

schema   1
date     when it was recorded
cells    one for each engine, version, platform, scheme (`schemes.py`) and number of tokens:
  outcome    runs       a kernel was chosen and took the layer's operands
             raises     the engine loads the layer, and raises when it computes with it
             not built  the engine raises before: the layer is not loaded
             not run    nothing was learnt of the engine: `error` says why
  kernel     the class that the engine chose: a kernel's, else a scheme's or a method's
  operators  the compiled operators that it called; none are noted on CPU, where nothing stands in for them
  error      type, message and place of what was raised
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cells

from kernel_choice.platforms import PLATFORMS
from kernel_choice.schemes import SCHEMES

SCHEMA = 1


@dataclass(frozen=True)
class Cell:
    """What an engine makes of one layer; see the module's docstring."""

    engine: str
    version: str
    platform: str
    scheme: str
    tokens: int
    outcome: str
    kernel: str | None = None
    operators: list[str] = field(default_factory=list)
    error: dict[str, str] | None = None

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        return (self.engine, self.version, self.platform, self.scheme, self.tokens)

    @property
    def result(self) -> tuple[Any, ...]:
        """What must be the same each time: an exception's message may differ."""
        error = self.error and (self.error["type"], self.error["where"])
        return (self.outcome, self.kernel, tuple(self.operators), error)


Record = cells.Record[Cell]


def read(path: Path) -> Record:
    """The record; an empty one where there is none of this schema."""
    return cells.read(path, SCHEMA, Cell)


def write(path: Path, record: Record) -> None:
    """Write the record."""
    cells.write(path, SCHEMA, record)


def merged(old: Record, date: str, new: Iterable[Cell]) -> Record:
    """The record with its cells replaced by, and added to from, the new ones; sorted."""
    found = {cell.key: cell for cell in (*old.cells, *new)}
    return Record(date, sorted(found.values(), key=_order))


def _order(cell: Cell) -> tuple[Any, ...]:
    numbers = [int(number) for number in re.findall(r"\d+", cell.version)]
    places = (list(PLATFORMS).index(cell.platform), list(SCHEMES).index(cell.scheme))
    return (cell.engine, numbers, *places, -cell.tokens)


def differences(cells: Iterable[Cell], recorded: Iterable[Cell]) -> list[str]:
    """A line for each cell that was not run, or is not as recorded."""
    known = {cell.key: cell for cell in recorded}
    lines = []
    for cell in cells:
        name = f"{cell.engine} {cell.version}, {cell.platform}, {cell.scheme}, {cell.tokens} tokens"
        if cell.outcome == "not run":
            lines.append(f"{name}: not run: {cell.error}")
        elif cell.key not in known:
            lines.append(f"{name}: not recorded")
        elif cell.result != known[cell.key].result:
            lines.append(f"{name}: {cell.result}, recorded: {known[cell.key].result}")
    return lines
