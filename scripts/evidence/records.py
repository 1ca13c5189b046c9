"""A record of what was run: a date and cells. As JSON, one cell a line, so that a changed cell is a changed line.

A cell is a frozen dataclass with an `outcome`; its `key` names it.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    class Keyed(DataclassInstance, Protocol):
        """What is merged and compared by its key."""

        @property
        def key(self) -> tuple[Any, ...]: ...
        @property
        def outcome(self) -> str: ...


Cell = TypeVar("Cell", bound="Keyed")


@dataclass(frozen=True)
class Record(Generic[Cell]):
    """The whole file."""

    date: str
    cells: list[Cell]


@dataclass(frozen=True)
class Book(Generic[Cell]):
    """Where cells of a kind are recorded: sorted by ``order``; ``differs`` says in what two cells of a key differ."""

    path: Path
    schema: int
    kind: type[Cell]
    order: Callable[[Cell], Any]
    differs: Callable[[Cell, Cell], str | None] = lambda one, other: None if one == other else "differs"

    def read(self) -> Record[Cell]:
        """The record; an empty one where there is none of this schema: its cells have to be run again."""
        data: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {"schema": None}
        if data["schema"] != self.schema:
            return Record("", [])
        return Record(data["date"], [self.kind(**each) for each in data["cells"]])

    def add(self, new: Iterable[Cell], *, anew: bool = False) -> Record[Cell]:
        """Write the new cells of today into the record, instead of those with their keys; ``anew``: of all cells."""
        new = list(new)
        if not new and not anew:
            return self.read()  # its date is that of a run
        found = {cell.key: cell for cell in (*([] if anew else self.read().cells), *new)}
        record = Record(datetime.date.today().isoformat(), sorted(found.values(), key=self.order))
        rows = ",\n".join(f"    {json.dumps(asdict(cell))}" for cell in record.cells)
        head = f'{{\n  "schema": {self.schema},\n  "date": "{record.date}",\n  "cells": [\n'
        self.path.write_text(f"{head}{rows}\n  ]\n}}\n")
        return record

    def differences(self, cells: Iterable[Cell]) -> list[str]:
        """A line for each cell that was not run, or is not as recorded."""
        known = {cell.key: cell for cell in self.read().cells}
        lines = []
        for cell in cells:
            name = ", ".join(str(each) for each in cell.key)
            if cell.outcome == "not run":
                lines.append(f"{name}: not run: {cell}")
            elif cell.key not in known:
                lines.append(f"{name}: not recorded")
            elif difference := self.differs(cell, known[cell.key]):
                lines.append(f"{name}: {difference}")
        return lines

    def check(self, cells: list[Cell]) -> int:
        """Print what differs from the record; the exit status."""
        lines = self.differences(cells)
        print("\n".join(lines) or f"all {len(cells)} cells are as recorded on {self.read().date}")
        return 1 if lines else 0


def numbers(version: str) -> list[int]:
    """By which versions are sorted."""
    return [int(number) for number in re.findall(r"\d+", version)]


def markdown(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    head = list(header)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_escaped(entry) for entry in row)} |" for row in lines)


def _escaped(entry: object) -> str:
    return str(entry).replace("|", "\\|").replace("<", "&lt;")
