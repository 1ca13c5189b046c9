"""Runs consumers x fixtures x profiles, a process for each consumer; prints or records what they make of them."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.driver import Results, Unavailable
from engines.known import Engine
from engines.process import Checkpoint, load
from loader_matrix.cases import ORIGINAL

import rewrite
from other_consumers.cases import CONSUMERS, CONVERSIONS, FIXTURES, PROFILES, fixtures, truth
from other_consumers.record import BOOK, Cell, readme, said


@dataclass(frozen=True)
class Case:
    """A fixture and a profile: what is read, or the error with which `rewrite convert` refuses."""

    fixture: str
    profile: str
    made: Checkpoint | dict[str, str]


def converted(fixture: str, profile: str, folder: Path) -> Case:
    """The checkpoint."""
    source = out = FIXTURES / fixture
    label = f"{fixture}-{profile.replace(', ', '-').replace(' ', '-')}"
    if profile != ORIGINAL:
        out = folder / label
        try:
            rewrite.convert(source, out, **CONVERSIONS[profile])
        except rewrite.Refused as refusal:
            message = "; ".join(str(each) for each in refusal.to_json().values())
            message = message.replace(str(FIXTURES.parents[1]) + "/", "")[:240]
            return Case(fixture, profile, {"type": "refused", "message": message, "where": ""})
    return Case(fixture, profile, Checkpoint(label, out, truth(fixture, profile, out)))


def consume(consumer: Engine, cases: Sequence[Case]) -> list[Cell]:
    """The cells of one consumer."""
    driver = f"other_consumers.drive_{consumer.name.replace('.', '_').replace('-', '_')}"
    found = iter(load(consumer, driver, [each.made for each in cases if isinstance(each.made, Checkpoint)]))
    cells = []
    for each in cases:
        if isinstance(each.made, Checkpoint):
            result = _result(next(found))
        else:
            result = {"outcome": "refused", "error": each.made}
        cells.append(Cell(consumer.name, consumer.version, each.fixture, each.profile, **result))
    return cells


def _result(found: Results) -> dict[str, Any]:
    if isinstance(found, Unavailable):
        return {"outcome": "not run", "error": {"type": "not run", "message": str(found), "where": ""}}
    return {"outcome": "not run", "error": found[0]["fault"]} if "fault" in found[0] else found[0]


def show(cells: Sequence[Cell]) -> None:
    """A line each."""
    for cell in cells:
        error = f"{cell.error['type']}: {cell.error['message']} ({cell.error['where']})" if cell.error else ""
        print(
            cell.consumer,
            cell.fixture,
            f"[{cell.profile}]",
            said(cell),
            cell.tensor or "",
            error,
            *cell.unmatched,
        )


def main(words: Sequence[str]) -> int:
    """Run, print, record; the exit status: 1 where something was not run."""
    parser = argparse.ArgumentParser(prog="scripts/evidence.sh other_consumers", description=__doc__)
    parser.add_argument("--consumer", action="append", choices=list(CONSUMERS), help="all by default")
    parser.add_argument("--fixture", action="append", choices=fixtures(), help="all by default")
    parser.add_argument("--record", action="store_true", help="write tests/other_consumers.json")
    parser.add_argument("--readme", action="store_true", help="only print the README's table from the record")
    given = parser.parse_args(words)
    if given.readme:
        print(readme(BOOK.read().cells))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        asked = [converted(name, profile, folder) for name in given.fixture or fixtures() for profile in PROFILES]
        wanted = given.consumer or list(CONSUMERS)
        cells = [cell for name in wanted for cell in consume(CONSUMERS[name], asked)]
    show(cells)
    if given.record:
        BOOK.add(cells)
    return int(any(cell.outcome == "not run" for cell in cells))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
