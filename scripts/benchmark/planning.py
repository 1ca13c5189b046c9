"""How long planning takes, by the number of shards and tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmark.measure import Run, python, run, start_even
from benchmark.table import Bound, judge, table


@dataclass(frozen=True)
class Case:
    shards: int
    tensors: int
    max_seconds: float
    max_megabytes: float


CASES = (Case(200, 100_000, 2, 80), Case(1000, 500_000, 10, 500))


@dataclass(frozen=True)
class Planned:
    """The runs of a case: ``dry_runs`` are whole processes, ``inside`` is what a process measured of itself."""

    case: Case
    dry_runs: Sequence[Run]
    inside: Sequence[dict[str, float]]


def measure_planning(case: Case, work: Path, rounds: int, *, cold: bool) -> Planned:
    source = work / f"plan-{case.tensors}"
    source.mkdir()
    run(python("benchmark.sparse", source, str(case.shards), str(case.tensors)))
    look_inside = python("benchmark.planner", source)
    if not cold:
        run(look_inside)  # fills the caches: reading the sparse files through would take minutes
    dry_runs, inside = [], []
    for _ in range(rounds):
        start_even(cold=cold)
        dry_runs.append(run(python("rewrite", "convert", "--dry-run", source, work / "out")))
        start_even(cold=cold)
        inside.append(json.loads(run(look_inside).output))
    return Planned(case, dry_runs, inside)


def report(planned: Sequence[Planned]) -> Iterator[str]:
    rows: list[Sequence[str]] = [("shards", "tensors", "groups", "--dry-run, s", "open, s", "plan, s", "peak MB")]
    rows += [_row(p) for p in planned]
    yield from table(rows, right=range(len(rows[0])))
    yield ""
    for p in planned:
        yield from judge(_bounds(p.case), p)


def _row(planned: Planned) -> tuple[str, ...]:
    counts = (f"{planned.inside[0][key]:,}" for key in ("shards", "tensors", "groups"))
    seconds = [median(r.seconds for r in planned.dry_runs)]
    seconds += [median(inside[key] for inside in planned.inside) for key in ("open", "plan")]
    return (*counts, *(f"{s:.2f}" for s in seconds), f"{_peak(planned):.0f}")


def _peak(planned: Planned) -> float:
    return max(r.peak_bytes for r in planned.dry_runs) / 1e6


def _bounds(case: Case) -> Iterator[Bound]:
    what = f"{case.tensors:,} tensors"
    yield Bound(f"--dry-run, {what}, s", case.max_seconds, lambda p: median(r.seconds for r in p.dry_runs))
    yield Bound(f"--dry-run, {what}, peak MB", case.max_megabytes, _peak)
