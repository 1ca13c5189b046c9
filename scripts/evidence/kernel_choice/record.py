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

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import records

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


Record = records.Record[Cell]


def read(path: Path) -> Record:
    """The record; an empty one where there is none of this schema."""
    return records.read(path, SCHEMA, Cell)


def order(cell: Cell) -> tuple[Any, ...]:
    """Of the cells in the record."""
    places = (list(PLATFORMS).index(cell.platform), list(SCHEMES).index(cell.scheme))
    return (cell.engine, records.numbers(cell.version), *places, -cell.tokens)


def differs(cell: Cell, recorded: Cell) -> str | None:
    """In what, or None."""
    return None if cell.result == recorded.result else f"{cell.result}, recorded: {recorded.result}"
