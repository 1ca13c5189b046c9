"""Runs the matrix: engines x fixtures x profiles, one process (or one for each rank) a cell."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from loader_matrix import cases, results, table
from loader_matrix.cases import ORIGINAL, Engine
from loader_matrix.envs import HOME, Environment, Unavailable, environment
from loader_matrix.results import Cell, Generation

CONVERTER = cases.engine("transformers==5.17.0")  # has everything the project needs
T = TypeVar("T")
LIMIT = 900  # seconds for one process; the slowest takes about 60 on two cores


@dataclass(frozen=True)
class Selection:
    """What to run."""

    engines: tuple[Engine, ...]
    fixtures: tuple[str, ...]
    profiles: tuple[str, ...]
    extras: bool  # tensor parallelism and generation

    def loads(self) -> list[tuple[Engine, str, str, int]]:
        """(engine, fixture, profile, ranks) of every load."""
        rows = [(e, f, p, 1) for f in self.fixtures for e in self.engines for p in self.profiles]
        return rows + [(e, f, p, cases.TP_RANKS) for e, f, p in self._extra() if e.serves_tp]

    def generations(self) -> list[tuple[Engine, str, str]]:
        """(engine, fixture, profile) of every generation."""
        return [(e, f, p) for e, f, p in self._extra() if e.generates]

    def _extra(self) -> list[tuple[Engine, str, str]]:
        wanted = [f for f in cases.EXTRA_FIXTURES if self.extras and f in self.fixtures]
        return [(e, f, p) for f in wanted for e in self.engines for p in self.profiles]


class Runner:
    """Prepares environments and converted checkpoints once, and runs drivers in them."""

    def __init__(self, selection: Selection) -> None:
        self._environments: dict[Engine, Environment | Unavailable] = {}
        self._checkpoints: dict[tuple[str, str], Path | Unavailable] = {}
        for engine in selection.engines:
            self._environments[engine] = _or_reason(partial(environment, engine))
        for fixture in selection.fixtures:
            for profile in selection.profiles:
                self._checkpoints[fixture, profile] = _or_reason(partial(converted, fixture, profile))

    def run(self, driver: str, engine: Engine, fixture: str, profile: str, ranks: int = 1) -> list[dict[str, Any]]:
        """The driver's results, one for each rank; Unavailable where the cell can't be run."""
        where = _available(self._environments[engine])
        model = _available(self._checkpoints[fixture, profile])
        label = f"{driver}-{engine.slug}-{fixture}-{profile}-{ranks}"
        print(f"loader matrix: {label}", file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            commands = [
                _command(where, driver, engine, model, cases.FIXTURES / fixture, Path(folder), (rank, ranks))
                for rank in range(ranks)
            ]
            _together(commands, where, label)
            return [_read(Path(folder) / f"{rank}.json", label) for rank in range(ranks)]


def _or_reason(make: Callable[[], T]) -> T | Unavailable:
    """What `make` makes, or why it can't: one engine that can't be installed must not stop the others."""
    try:
        return make()
    except Unavailable as reason:
        return reason


def _available(made: T | Unavailable) -> T:
    if isinstance(made, Unavailable):
        raise made
    return made


def converted(fixture: str, profile: str) -> Path:
    """The fixture, or what `rewrite convert` makes of it; Unavailable where it refuses."""
    source = cases.FIXTURES / fixture
    if profile == ORIGINAL:
        return source
    out = HOME / "converted" / f"{fixture}-{profile}"
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    where = environment(CONVERTER)
    path = os.pathsep.join([str(cases.REPOSITORY), where.variables["PYTHONPATH"]])
    options = cases.CONVERSIONS[profile]
    command = [str(where.python), "-m", "rewrite", "convert", *options, "--json", str(source), str(out)]
    done = subprocess.run(
        command, env=where.variables | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise Unavailable(f"rewrite convert refuses: {_message(done.stdout, done.stderr)}")
    return out


def _message(stdout: str, stderr: str) -> str:
    try:
        return str(json.loads(stdout)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        lines = [line for line in (stderr or stdout).splitlines() if line.strip()] or ["no message"]
        return lines[0][:200]


def _command(
    where: Environment, driver: str, engine: Engine, model: Path, truth: Path, folder: Path, place: tuple[int, int]
) -> list[str]:
    rank, ranks = place
    options = {
        "model": model,
        "truth": truth,
        "version": engine.version,
        "out": folder / f"{rank}.json",
        "rank": rank,
        "world": ranks,
        "rendezvous": f"file://{folder}/rendezvous",
    }
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [str(where.python), "-m", f"loader_matrix.{driver}", *flags]


def _together(commands: list[list[str]], where: Environment, label: str) -> None:
    """Run the ranks side by side; what they print goes to a log."""
    logs = HOME / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    with (logs / f"{label}.log").open("w") as log:
        ranks = [subprocess.Popen(each, env=where.variables, stdout=log, stderr=log) for each in commands]
        for rank in ranks:
            try:
                rank.wait(timeout=LIMIT)
            except subprocess.TimeoutExpired:
                rank.kill()


def _read(out: Path, label: str) -> dict[str, Any]:
    if out.exists():
        return dict(json.loads(out.read_text()))
    raise Unavailable(f"the process ended without a result; see {HOME.name}/logs/{label}.log")


def load(runner: Runner, engine: Engine, fixture: str, profile: str, ranks: int) -> Cell:
    """One cell."""
    key: dict[str, Any] = {
        "engine": engine.name,
        "version": engine.version,
        "fixture": fixture,
        "profile": profile,
        "ranks": ranks,
    }
    try:
        return results.cell(key, runner.run(f"drive_{engine.name}", engine, fixture, profile, ranks))
    except Unavailable as reason:
        return Cell(**key, outcome="not run", reason=str(reason))


def generate(runner: Runner, engine: Engine, fixture: str, profile: str) -> Generation:
    """One generation, not yet compared with the original's."""
    key: dict[str, Any] = {
        "engine": engine.name,
        "version": engine.version,
        "fixture": fixture,
        "profile": profile,
    }
    try:
        (result,) = runner.run(f"generate_{engine.name}", engine, fixture, profile)
    except Unavailable as reason:
        return Generation(**key, outcome="not run", reason=str(reason))
    if "fault" in result:
        return Generation(**key, outcome="not run", reason=str(result["fault"]))
    if "error" in result:
        return Generation(**key, outcome="raises", error=result["error"])
    return Generation(**key, outcome="runs", **result)


def compared(generation: list[Generation], recorded: list[Generation]) -> list[Generation]:
    """Every generation with its agreement with the original's: leading equal tokens, their log-probabilities.

    The original's is the recorded one where it was not run again.
    """
    originals = {each.key[:3]: each for each in (*recorded, *generation) if each.profile == ORIGINAL}
    found = []
    for each in generation:
        original = originals.get(each.key[:3])
        if original is None or each.profile == ORIGINAL or not (each.tokens and original.tokens):
            found.append(each)
            continue
        pairs = list(zip(each.tokens, original.tokens, strict=True))
        agrees = next((n for n, (a, b) in enumerate(pairs) if a != b), len(pairs))
        differences = [abs(a - b) for a, b in zip(each.logprobs, original.logprobs, strict=True)][:agrees]
        largest = round(max(differences), 4) if differences else None
        found.append(replace(each, agrees=agrees, largest_difference=largest))
    return found


def disagreements(cells: list[Cell], recorded: list[Cell]) -> list[str]:
    """A line for each cell that was not run, or differs from the record."""
    known = {cell.key: cell for cell in recorded}
    lines = []
    for cell in cells:
        name = f"{cell.engine} {cell.version}, {cell.fixture}, {cell.profile}, {cell.ranks} rank(s)"
        if cell.outcome == "not run":
            lines.append(f"{name}: not run: {cell.reason}")
        elif cell.key not in known:
            lines.append(f"{name}: not recorded")
        elif differs := results.differences(cell, known[cell.key]):
            lines.append(f"{name}: differs from the record in {', '.join(differs)}")
    return lines


def arguments(words: Sequence[str]) -> argparse.Namespace:
    """The command line, parsed."""
    parser = argparse.ArgumentParser(prog="loader_matrix.sh", description=__doc__)
    parser.add_argument("--engine", action="append", help="NAME==VERSION; all by default")
    parser.add_argument("--fixture", action="append", help="a folder of tests/fixtures; all by default")
    parser.add_argument("--profile", action="append", choices=cases.PROFILES, help="all by default")
    parser.add_argument("--record", action="store_true", help="write tests/loader_matrix.json, print Markdown")
    parser.add_argument("--ci", action="store_true", help="a few cells; exit 1 where one differs from the record")
    parser.add_argument("--readme", action="store_true", help="print the README's table from the record; runs nothing")
    parser.add_argument(
        "--jobs", type=int, default=min(2, os.cpu_count() or 1), help="cells at a time (about 2 GB each)"
    )
    return parser.parse_args(words)


def select(given: argparse.Namespace) -> Selection:
    """What the command line asks for."""
    default = cases.CI_ENGINES if given.ci else tuple(each.spec for each in cases.ENGINES)
    return Selection(
        tuple(cases.engine(spec) for spec in given.engine or default),
        tuple(given.fixture or (cases.CI_FIXTURES if given.ci else cases.fixtures())),
        tuple(given.profile or (cases.CI_PROFILES if given.ci else cases.PROFILES)),
        extras=not given.ci,
    )


def main(words: Sequence[str]) -> int:
    """Run, print, record or compare; the exit status."""
    given = arguments(words)
    if given.readme:
        print(table.readme(results.read(cases.RECORD).cells, cases.CI_FIXTURES[0]))
        return 0
    selection = select(given)
    runner = Runner(selection)
    with ThreadPoolExecutor(given.jobs) as pool:
        cells = list(pool.map(lambda row: load(runner, *row), selection.loads()))
        generation = list(pool.map(lambda row: generate(runner, *row), selection.generations()))
    recorded = results.read(cases.RECORD)
    generation = compared(generation, recorded.generation)
    show(table.aligned, cells, generation)
    if given.record:
        whole = not (given.engine or given.fixture or given.profile or given.ci)
        kept = results.Record("", [], []) if whole else recorded
        record = results.merged(kept, datetime.date.today().isoformat(), cells, generation)
        results.write(cases.RECORD, record)
        show(table.markdown, record.cells, record.generation)
    if not given.ci:
        return 0
    lines = disagreements(cells, recorded.cells)
    print("\n".join(lines) or f"all {len(cells)} cells are as recorded on {recorded.date}")
    return 1 if lines else 0


def show(form: Callable[[Any, Any], str], cells: list[Cell], generation: list[Generation]) -> None:
    """Print both tables."""
    print(form(table.LOADS, table.loads(cells)))
    if generation:
        print()
        print(form(table.GENERATES, table.generates(generation)))
    print()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
