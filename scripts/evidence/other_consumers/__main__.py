"""Runs consumers x fixtures x profiles, a process for each consumer; prints or records what they make of them."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import records
from click.testing import CliRunner
from engines.driver import Unavailable
from engines.envs import HOME, environment
from engines.known import Engine
from environments import Failed, source
from loader_matrix.cases import ORIGINAL

from other_consumers import record, table
from other_consumers.cases import (
    CONSUMERS,
    CONVERSIONS,
    FIXTURES,
    LLAMA_CPP,
    LLAMA_CPP_SOURCE,
    PROFILES,
    RECORD,
    fixtures,
    truth,
)
from other_consumers.record import Cell
from rewrite.cli.commands import main as rewrite

LIMIT = 1800  # seconds for a consumer
Tasks = list[dict[str, Any]]


def converted(fixture: str, profile: str, folder: Path) -> dict[str, Any]:
    """The task of one checkpoint; with its result, where `rewrite convert` refuses."""
    named = {"fixture": fixture, "profile": profile}
    checkpoint = FIXTURES / fixture
    if profile != ORIGINAL:
        checkpoint, options = folder / f"{fixture}-{profile.replace(', ', '-').replace(' ', '-')}", CONVERSIONS[profile]
        done = CliRunner().invoke(rewrite, ["convert", *options, "--json", str(FIXTURES / fixture), str(checkpoint)])
        if done.exit_code:
            said = json.loads(done.stdout)["error"]
            message = said if isinstance(said, str) else "; ".join(str(each) for each in said.values())
            error = {
                "type": "refused",
                "message": message.replace(str(FIXTURES.parents[1]) + "/", "")[:240],
                "where": "",
            }
            return {**named, "result": {"outcome": "refused", "error": error}}
    return {**named, "checkpoint": str(checkpoint), "truth": str(truth(fixture, profile, checkpoint))}


def consume(consumer: Engine, tasks: Tasks, folder: Path) -> list[Cell]:
    """The cells of one consumer."""
    file = folder / f"{consumer.name}.json"
    file.write_text(json.dumps([task for task in tasks if "result" not in task]))
    log = HOME / "logs" / f"other-{consumer.name}.log"
    reason = f"the process ended without a result; see logs/{log.name}"
    try:
        where = environment(consumer)
        arguments = []
        if consumer == LLAMA_CPP:
            arguments = [source(HOME / "llama.cpp-source", where.python, LLAMA_CPP_SOURCE) / "vendor" / "llama.cpp"]
        module = f"other_consumers.drive_{consumer.name.replace('.', '_').replace('-', '_')}"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as output:
            where.run(module, file, *arguments, stdout=output, stderr=subprocess.STDOUT, timeout=LIMIT)
    except (Unavailable, Failed, subprocess.TimeoutExpired) as failure:
        reason = str(failure)[:240]
    nothing = {"outcome": "not run", "error": {"type": "not run", "message": reason, "where": ""}}
    done = {(task["fixture"], task["profile"]): task.get("result", nothing) for task in json.loads(file.read_text())}
    results = [(task, task.get("result") or done[task["fixture"], task["profile"]]) for task in tasks]
    return [
        Cell(consumer.name, consumer.version, task["fixture"], task["profile"], **result) for task, result in results
    ]


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
        print(table.readme(record.read(RECORD).cells))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tasks = [converted(name, profile, folder) for name in given.fixture or fixtures() for profile in PROFILES]
        wanted = given.consumer or list(CONSUMERS)
        cells = [cell for name in wanted for cell in consume(CONSUMERS[name], tasks, folder)]
    show(cells)
    if given.record:
        records.write(RECORD, record.SCHEMA, records.merged(record.read(RECORD), cells, record.order))
    return int(any(cell.outcome == "not run" for cell in cells))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
