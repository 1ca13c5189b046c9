"""The cost of many tensors: processor time of `rewrite` over that of reading all headers with the stock reader.

307,793 tensors are as many as Qwen3.5-397B-A17B has: 132 layers of 256 experts in Qwen3.5-35B-A3B shapes. Each module
has its own weight scale. Caches are warm. A run is a whole process with all its children, and what it imports.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

from benchmark.measure import python, run
from benchmark.runs import CPU, Runs, in_turns, peak, ratios, rows
from benchmark.table import Bound, judge, table

BASE, INSPECT, DRY_RUN = "safe_open, all headers", "rewrite inspect", "rewrite convert --dry-run"


@dataclass(frozen=True)
class Case:
    """A checkpoint, and what is to be reached with it."""

    tensors: int
    shards: int
    bounds: tuple[Bound, ...]


def _planning(seconds: float, megabytes: float) -> tuple[Bound, ...]:
    return (
        Bound("--dry-run, s", seconds, lambda runs: median(each.seconds for each in runs[DRY_RUN])),
        Bound("--dry-run, peak MB", megabytes, lambda runs: peak(runs, DRY_RUN)),
    )


CASES = (
    Case(100_000, 200, _planning(2, 80)),
    Case(
        307_793,
        94,
        (
            Bound("inspect / safe_open", 6, lambda runs: median(ratios(runs, INSPECT, BASE, by=CPU))),
            Bound("convert --dry-run / safe_open", 5, lambda runs: median(ratios(runs, DRY_RUN, BASE, by=CPU))),
            Bound("peak memory, MB", 300, lambda runs: peak(runs, INSPECT, DRY_RUN)),
        ),
    ),
    Case(500_000, 1000, _planning(10, 500)),
)


def measure(case: Case, work: Path, rounds: int, *, say: Callable[[str], None]) -> Runs:
    """``rounds`` times every program, side by side, with warm caches."""
    source = work / f"many-{case.tensors}"
    source.mkdir()
    run(python("benchmark.sparse", source, str(case.shards), str(case.tensors)))
    commands = {
        BASE: python("benchmark.headers", source),
        INSPECT: python("rewrite", "inspect", source),
        DRY_RUN: python("rewrite", "convert", "--dry-run", source, work / "out"),
    }
    found = int(run(commands[BASE]).output)  # also fills the caches
    if found < case.tensors:
        raise RuntimeError(f"the checkpoint has {found} tensors, not {case.tensors}")
    return in_turns(
        {name: partial(run, each, findings=name == INSPECT) for name, each in commands.items()}, rounds, say
    )


def report(case: Case, runs: Runs) -> Iterator[str]:
    """A table, and whether the bounds are reached."""
    yield f"{case.tensors:,} tensors in {case.shards} shards; ratios of the processor's time:"
    yield from table(list(rows(runs, BASE, by=CPU)), right=range(1, 5))
    yield ""
    yield from judge(case.bounds, runs)
