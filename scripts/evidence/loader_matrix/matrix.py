"""Runs the matrix: engines x fixtures x profiles. A process imports an engine once and forks a child for each cell."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import records
from engines import process
from engines.driver import Results, Unavailable
from engines.envs import HOME
from engines.known import ENGINES, Engine, find_engine
from engines.process import Checkpoint

import rewrite
from loader_matrix import cases, results, table
from loader_matrix.cases import ORIGINAL
from loader_matrix.results import Cell, Generation

Load = tuple[Engine, str, str, int]  # engine, fixture, profile, ranks


@dataclass(frozen=True)
class Selection:
    """What to run; `profiles` None stands for each fixture's own."""

    engines: tuple[Engine, ...]
    fixtures: tuple[str, ...]
    profiles: tuple[str, ...] | None
    extras: bool  # tensor parallelism and generation

    def checkpoints(self) -> list[tuple[str, str]]:
        """(fixture, profile) of every checkpoint."""
        return [(f, p) for f in self.fixtures for p in self.profiles or cases.profiles(f)]

    def loads(self) -> list[Load]:
        """Every load."""
        parallel = [e for e in self.engines if e.serves_tp and self.extras]
        rows = [(e, f, p, 1) for f, p in self.checkpoints() for e in self.engines if cases.loads(e, f, p)]
        return rows + [
            (e, f, p, cases.TP_RANKS) for f, p in self.checkpoints() if f in cases.PARALLEL_FIXTURES for e in parallel
        ]

    def generations(self) -> list[Load]:
        """Every generation."""
        engines = [e for e in self.engines if e.generates and self.extras]
        return [(e, f, p, 1) for f, p in self.checkpoints() if f in cases.GENERATING_FIXTURES for e in engines]


@cache
def converted(fixture: str, profile: str) -> Path | Unavailable:
    """The fixture, or what `rewrite` makes of it; Unavailable where it refuses."""
    source = cases.folder(fixture)
    if profile == ORIGINAL:
        return source
    out = HOME / "converted" / f"{fixture}-{profile}"
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        rewrite.convert(source, out, **cases.CONVERSIONS[profile])
    except rewrite.Refused as refusal:
        return Unavailable(f"rewrite convert refuses: error: {refusal.what}")
    return out


def run_driver(driver: str, loads: Sequence[Load]) -> dict[Load, Results]:
    """The driver's results for loads of one engine, one for each rank; or why there are none."""
    found = {load: _checkpoint(driver, load) for load in loads}
    ready = {load: each for load, each in found.items() if isinstance(each, Checkpoint)}
    made = process.load(loads[0][0], f"loader_matrix.{driver}", list(ready.values()))
    refused: dict[Load, Results] = {load: each for load, each in found.items() if isinstance(each, Unavailable)}
    results = refused | dict(zip(ready, made, strict=True))
    return {load: results[load] for load in loads}


def _checkpoint(driver: str, load: Load) -> Checkpoint | Unavailable:
    _, fixture, profile, ranks = load
    model = converted(fixture, profile)
    if isinstance(model, Unavailable):
        return model
    is_own = driver == "drive" and cases.is_own_truth(fixture, profile)
    return Checkpoint(f"{fixture}-{profile}-{ranks}", model, model if is_own else cases.folder(fixture), ranks)


def _key(row: Load) -> dict[str, Any]:
    """What names a generation, and but for the ranks a cell."""
    engine, fixture, profile, _ = row
    return {"engine": engine.name, "version": engine.version, "fixture": fixture, "profile": profile}


def generate(row: Load, found: Results) -> Generation:
    """One generation, not yet compared with the original's."""
    key = _key(row)
    if isinstance(found, Unavailable):
        return Generation(**key, outcome="not run", reason=str(found))
    (result,) = found
    if "fault" in result:
        return Generation(**key, outcome="not run", reason=str(result["fault"]))
    if "error" in result:
        return Generation(**key, outcome="raises", error=result["error"])
    return Generation(**key, outcome="runs", **result)


def batches(kind: str, loads: list[Load]) -> list[tuple[str, tuple[Load, ...]]]:
    """(driver, its loads): one process for each engine and number of ranks."""
    found: dict[tuple[Engine, int], list[Load]] = {}
    for each in loads:
        found.setdefault((each[0], each[3]), []).append(each)
    return [(kind, tuple(own)) for own in found.values()]


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


def arguments(words: Sequence[str]) -> argparse.Namespace:
    """The command line, parsed."""
    parser = argparse.ArgumentParser(prog="scripts/evidence.sh loader_matrix", description=__doc__)
    parser.add_argument("--engine", action="append", help="NAME==VERSION; all by default")
    parser.add_argument("--fixture", action="append", help="a folder of tests/fixtures; all by default")
    parser.add_argument("--profile", action="append", choices=cases.PROFILES, help="the fixture's own by default")
    parser.add_argument(
        "--record", action="store_true", help="write tests/loader_matrix.json and tests/generation.json, print Markdown"
    )
    parser.add_argument("--ci", action="store_true", help="a few cells; exit 1 where one differs from the record")
    parser.add_argument("--amx", action="store_true", help="vLLM takes the CPU for one with AMX: results are the same")
    parser.add_argument("--readme", action="store_true", help="print the README's table from the record; runs nothing")
    parser.add_argument("--readme-families", action="store_true", help="the same of its table of all other fixtures")
    parser.add_argument("--readme-nvfp4", action="store_true", help="the same of its table of NVFP4 fixtures")
    parser.add_argument(
        "--jobs", type=int, default=min(2, os.cpu_count() or 1), help="engines at a time (about 2 GB each)"
    )
    return parser.parse_args(words)


def select(given: argparse.Namespace) -> Selection:
    """What the command line asks for."""
    default = cases.CI_ENGINES if given.ci else tuple(each.spec for each in ENGINES)
    return Selection(
        tuple(find_engine(spec) for spec in given.engine or default),
        tuple(given.fixture or (cases.CI_FIXTURES if given.ci else cases.fixtures())),
        tuple(given.profile) if given.profile else cases.CI_PROFILES if given.ci else None,
        extras=not given.ci,
    )


def run(selection: Selection, jobs: int) -> tuple[list[Cell], list[Generation]]:
    """Every load and every generation of the selection, in its order."""
    loads, generations = selection.loads(), selection.generations()
    for each in selection.checkpoints():
        converted(*each)  # before engines run side by side
    rows = [*batches("generate_vllm", generations), *batches("drive", loads)]  # the slowest first
    with ThreadPoolExecutor(jobs) as pool:
        done = list(pool.map(lambda batch: run_driver(*batch), rows))
    found = {(driver, row): result for (driver, _), own in zip(rows, done, strict=True) for row, result in own.items()}
    return (
        [results.cell({**_key(row), "ranks": row[-1]}, found["drive", row]) for row in loads],
        [generate(row, found["generate_vllm", row]) for row in generations],
    )


def main(words: Sequence[str]) -> int:
    """Run, print, record or compare; the exit status."""
    given = arguments(words)
    if given.readme_nvfp4:
        print(table.readme_nvfp4(results.LOADS.read().cells, cases.NVFP4_FIXTURES))
        return 0
    if given.readme or given.readme_families:
        form = table.readme if given.readme else table.readme_families
        print(form(results.LOADS.read().cells, cases.CI_FIXTURES[0]))
        return 0
    if given.amx:
        os.environ["LOADER_MATRIX_AMX"] = "1"  # the drivers' environments have it, too
    selection = select(given)
    whole = given.record and not (given.engine or given.fixture or given.profile or given.ci)
    cells, generation = run(selection, given.jobs)
    generation = compared(generation, [] if whole else results.GENERATIONS.read().cells)
    show(table.aligned, cells, generation)
    status = results.LOADS.check(cells) if given.ci else 0
    if given.record:
        recorded, generated = results.LOADS.add(cells, anew=whole), results.GENERATIONS.add(generation, anew=whole)
        show(records.markdown, recorded.cells, generated.cells)
    return status


def show(form: Callable[[Any, Any], str], cells: list[Cell], generation: list[Generation]) -> None:
    """Print both tables."""
    print(form(table.LOADS, table.loads(cells)))
    if generation:
        print()
        print(form(table.GENERATES, table.generates(generation)))
    print()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
