"""A record of what was run: a date and cells. As JSON, one cell a line, so that a changed cell is a changed line.

A cell is a frozen dataclass with an `outcome`; `key` names it, `same` says whether two runs of it gave the same.
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


Cell = TypeVar("Cell", bound="DataclassInstance")
Named = TypeVar("Named", bound="Keyed")


@dataclass(frozen=True)
class Record(Generic[Cell]):
    """The whole file."""

    date: str
    cells: list[Cell]


def read(path: Path, schema: int, kind: type[Cell]) -> Record[Cell]:
    """The record; an empty one where there is none of this schema: its cells have to be run again."""
    data: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"schema": None}
    if data["schema"] != schema:
        return Record("", [])
    return Record(data["date"], [kind(**each) for each in data["cells"]])


def write(path: Path, schema: int, record: Record[Cell]) -> None:
    """As JSON."""
    rows = ",\n".join(f"    {json.dumps(asdict(cell))}" for cell in record.cells)
    path.write_text(f'{{\n  "schema": {schema},\n  "date": "{record.date}",\n  "cells": [\n{rows}\n  ]\n}}\n')


def merged(old: Record[Named], new: Iterable[Named], order: Callable[[Named], Any]) -> Record[Named]:
    """``old`` with its cells replaced by, and added to from, the new ones of today; sorted."""
    found = {cell.key: cell for cell in (*old.cells, *new)}
    return Record(datetime.date.today().isoformat(), sorted(found.values(), key=order))


def differences(
    cells: Iterable[Named], recorded: Iterable[Named], differs: Callable[[Named, Named], str | None]
) -> list[str]:
    """A line for each cell that was not run, or is not as recorded; ``differs`` says in what."""
    known = {cell.key: cell for cell in recorded}
    lines = []
    for cell in cells:
        name = ", ".join(str(each) for each in cell.key)
        if cell.outcome == "not run":
            lines.append(f"{name}: not run: {cell}")
        elif cell.key not in known:
            lines.append(f"{name}: not recorded")
        elif difference := differs(cell, known[cell.key]):
            lines.append(f"{name}: {difference}")
    return lines


def numbers(version: str) -> list[int]:
    """By which versions are sorted."""
    return [int(number) for number in re.findall(r"\d+", version)]


def markdown(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    head = list(header)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(entry) for entry in row)} |" for row in lines)
