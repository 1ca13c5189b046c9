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
from typing import Any

import records
from loader_matrix.cases import REPOSITORY

from kernel_choice.platforms import PLATFORMS
from kernel_choice.schemes import SCHEMES


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


def _order(cell: Cell) -> tuple[Any, ...]:
    places = (list(PLATFORMS).index(cell.platform), list(SCHEMES).index(cell.scheme))
    return (cell.engine, records.numbers(cell.version), *places, -cell.tokens)


def _differs(cell: Cell, recorded: Cell) -> str | None:
    return None if cell.result == recorded.result else f"{cell.result}, recorded: {recorded.result}"


BOOK = records.Book(REPOSITORY / "tests" / "kernel_choice.json", 1, Cell, _order, _differs)
