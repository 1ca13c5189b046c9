"""A record of what was run: a date and cells. As JSON, one cell a line, so that a changed cell is a changed line."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Cell = TypeVar("Cell", bound="DataclassInstance")


@dataclass(frozen=True)
class Record(Generic[Cell]):
    """The whole file."""

    date: str
    cells: list[Cell]


def read(path: Path, schema: int, kind: type[Cell]) -> Record[Cell]:
    """The record; an empty one where there is none of this schema."""
    data: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"schema": None}
    if data["schema"] != schema:
        return Record("", [])
    return Record(data["date"], [kind(**each) for each in data["cells"]])


def write(path: Path, schema: int, record: Record[Cell]) -> None:
    """As JSON."""
    rows = ",\n".join(f"    {json.dumps(asdict(cell))}" for cell in record.cells)
    path.write_text(f'{{\n  "schema": {schema},\n  "date": "{record.date}",\n  "cells": [\n{rows}\n  ]\n}}\n')
