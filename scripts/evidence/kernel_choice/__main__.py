"""Runs engines x platforms, a process each; prints, records or compares what they choose."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from engines.driver import Unavailable
from engines.known import Engine, find_engine
from engines.process import Checkpoint, load

from kernel_choice import table
from kernel_choice.platforms import PLATFORMS, Platform, platforms
from kernel_choice.record import BOOK, Cell
from kernel_choice.schemes import TOKENS, schemes

# Both sides of every change, and both ends of the table.
ENGINES = (
    *("vllm==0.17.0", "vllm==0.19.1", "vllm==0.32.0"),
    *("sglang==0.5.9", "sglang==0.5.10.post1", "sglang==0.5.11", "sglang==0.5.12"),
    *("sglang==0.5.17", "sglang==0.5.18", "sglang==0.5.22", "sglang==0.5.23"),
    "transformers==5.17.0",
)
CI = (("vllm==0.32.0", "sm90"), ("sglang==0.5.23", "sm90"), ("sglang==0.5.23", "gfx942"))
Run = tuple[Engine, Platform]


def choose(run: Run) -> list[Cell]:
    """The cells of one engine on one platform."""
    engine, platform = run
    (found,) = load(
        engine, f"kernel_choice.drive_{engine.name}", [Checkpoint(platform.name, Path(platform.name), Path())]
    )
    if isinstance(found, Unavailable):
        return _not_run(run, {"type": "Unavailable", "message": str(found), "where": ""})
    (result,) = found
    if fault := result.get("error") or result.get("fault"):  # nothing was learnt of the engine
        return _not_run(run, fault)
    if result["version"] != engine.version:
        message = f"version {result['version']} is installed, {engine.version} was asked for"
        return _not_run(run, {"type": "RuntimeError", "message": message, "where": ""})
    return [Cell(engine.name, engine.version, platform.name, **cell) for cell in result["cells"]]


def _not_run(run: Run, error: dict[str, Any]) -> list[Cell]:
    engine, platform = run
    return [
        Cell(engine.name, engine.version, platform.name, scheme, tokens, "not run", error=error)
        for scheme in schemes(engine.name)
        for tokens in TOKENS
    ]


def show(cells: Sequence[Cell]) -> None:
    """A line each."""
    for cell in cells:
        error = f"{cell.error['type']}: {cell.error['message']}" if cell.error else ""
        said = (cell.outcome, cell.kernel or "", *cell.operators, error)
        print(f"{cell.engine} {cell.version} {cell.platform} {cell.scheme} {cell.tokens}:", *said)


def selected(given: argparse.Namespace) -> list[Run]:
    """What the command line asks for, the slowest first."""
    if given.ci and not given.engine:
        return [(find_engine(spec), PLATFORMS[name]) for spec, name in CI]
    engines = [find_engine(spec) for spec in given.engine or ENGINES]
    wanted = given.platform or list(PLATFORMS)
    return [(e, p) for e in engines for p in platforms(e.name, e.version) if p.name in wanted]


def main(words: Sequence[str]) -> int:
    """Run, print, record or compare; the exit status."""
    parser = argparse.ArgumentParser(prog="scripts/evidence.sh kernel_choice", description=__doc__)
    parser.add_argument("--engine", action="append", help="NAME==VERSION; those of the record by default")
    parser.add_argument("--platform", action="append", choices=list(PLATFORMS), help="all by default")
    parser.add_argument("--record", action="store_true", help="write tests/kernel_choice.json")
    parser.add_argument("--ci", action="store_true", help="a few; exit 1 where one differs from the record")
    parser.add_argument("--readme", action="store_true", help="only print the README's table from the record")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes at a time")
    given = parser.parse_args(words)
    if given.readme:
        print(table.readme(BOOK.read().cells))
        return 0
    runs = selected(given)
    with ThreadPoolExecutor(given.jobs) as pool:
        cells = [cell for own in pool.map(choose, runs) for cell in own]
    show(cells)
    status = BOOK.check(cells) if given.ci else 0
    if given.record:
        BOOK.add(cells)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
