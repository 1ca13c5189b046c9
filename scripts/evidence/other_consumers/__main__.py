"""Runs consumers x fixtures x profiles, a process for each consumer; prints or records what they make of them."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from click.testing import CliRunner
from engines.driver import Results, Unavailable
from engines.envs import HOME, Environment, environment
from engines.known import Engine
from engines.process import Checkpoint, Process
from environments import Failed, source
from loader_matrix.cases import ORIGINAL

from other_consumers import table
from other_consumers.cases import (
    CONSUMERS,
    CONVERSIONS,
    FIXTURES,
    LLAMA_CPP,
    LLAMA_CPP_SOURCE,
    PROFILES,
    fixtures,
    truth,
)
from other_consumers.record import BOOK, Cell
from rewrite.cli.commands import main as rewrite


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
        done = CliRunner().invoke(rewrite, ["convert", *CONVERSIONS[profile], "--json", str(source), str(out)])
        if done.exit_code:
            said = json.loads(done.stdout)["error"]
            message = said if isinstance(said, str) else "; ".join(str(each) for each in said.values())
            message = message.replace(str(FIXTURES.parents[1]) + "/", "")[:240]
            return Case(fixture, profile, {"type": "refused", "message": message, "where": ""})
    return Case(fixture, profile, Checkpoint(label, out, truth(fixture, profile, out)))


def consume(consumer: Engine, cases: Sequence[Case], folder: Path) -> list[Cell]:
    """The cells of one consumer."""
    ready = [each.made for each in cases if isinstance(each.made, Checkpoint)]
    try:
        process = Process(consumer, _environment(consumer), f"other_consumers.drive_{_module(consumer)}")
        with closing(process):
            found = iter(process.load(ready, folder))
    except (Unavailable, Failed) as failure:
        found = iter([Unavailable(str(failure)[:240])] * len(ready))
    cells = []
    for each in cases:
        if isinstance(each.made, Checkpoint):
            result = _result(next(found))
        else:
            result = {"outcome": "refused", "error": each.made}
        cells.append(Cell(consumer.name, consumer.version, each.fixture, each.profile, **result))
    return cells


def _module(consumer: Engine) -> str:
    return consumer.name.replace(".", "_").replace("-", "_")


def _environment(consumer: Engine) -> Environment:
    where = environment(consumer)
    if consumer != LLAMA_CPP:
        return where
    own = source(HOME / "llama.cpp-source", where.python, LLAMA_CPP_SOURCE) / "vendor" / "llama.cpp"
    return replace(where, variables=where.variables | {"LLAMA_CPP": str(own)})


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
            table.said(cell),
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
        print(table.readme(BOOK.read().cells))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        asked = [converted(name, profile, folder) for name in given.fixture or fixtures() for profile in PROFILES]
        wanted = given.consumer or list(CONSUMERS)
        cells = [cell for name in wanted for cell in consume(CONSUMERS[name], asked, folder)]
    show(cells)
    if given.record:
        BOOK.add(cells)
    return int(any(cell.outcome == "not run" for cell in cells))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
