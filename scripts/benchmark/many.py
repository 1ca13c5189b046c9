"""The cost of many tensors: processor time of `rewrite` over that of reading all headers with the stock reader.

The checkpoint has 307,793 tensors, as many as Qwen3.5-397B-A17B: 132 layers of 256 experts in Qwen3.5-35B-A3B
shapes. Each module has its own weight scale. Caches are warm. A run is a whole process with all its children, and what
it imports.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median

from benchmark.measure import Run, python, run
from benchmark.table import Bound, judge, spread, table

TENSORS, SHARDS = 307_793, 94
BASE, INSPECT, DRY_RUN = "safe_open, all headers", "rewrite inspect", "rewrite convert --dry-run"

Runs = Mapping[str, Sequence[Run]]


def measure(work: Path, rounds: int, *, say: Callable[[str], None]) -> Runs:
    """``rounds`` times every program, side by side, with warm caches."""
    source = work / "many"
    source.mkdir()
    run(python("benchmark.sparse", source, str(SHARDS), str(TENSORS)))
    commands = {
        BASE: python("benchmark.headers", source),
        INSPECT: python("rewrite", "inspect", source),
        DRY_RUN: python("rewrite", "convert", "--dry-run", source, work / "out"),
    }
    found = run(commands[BASE]).output.strip()  # also fills the caches
    if int(found) != TENSORS:
        raise RuntimeError(f"the checkpoint has {found} tensors, not {TENSORS}")
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for number in range(rounds):
        for name, command in commands.items():
            runs[name].append(run(command, findings=name == INSPECT))
            say(f"round {number + 1}: {name}: {runs[name][-1].cpu:.2f} s of the processor")
    return runs


def ratios(runs: Runs, name: str) -> list[float]:
    """Of each round: processor time over that of reading all headers."""
    return [own.cpu / base.cpu for own, base in zip(runs[name], runs[BASE], strict=True)]


def _peak(runs: Runs, *names: str) -> float:
    return max(each.peak_bytes for name in names for each in runs[name]) / 1e6


_BOUNDS = (
    Bound("inspect / safe_open", 6, lambda runs: median(ratios(runs, INSPECT))),
    Bound("convert --dry-run / safe_open", 5, lambda runs: median(ratios(runs, DRY_RUN))),
    Bound("peak memory, MB", 300, lambda runs: _peak(runs, INSPECT, DRY_RUN)),
)


def report(runs: Runs) -> Iterator[str]:
    """A table, and whether the bounds are reached."""
    rows: list[Sequence[str]] = [(f"{TENSORS:,} tensors", "CPU s", "/ safe_open", "seconds", "peak MB")]
    for name, own in runs.items():
        cpu, seconds = (f"{median(values):.2f}" for values in ([r.cpu for r in own], [r.seconds for r in own]))
        rows.append((name, cpu, spread(ratios(runs, name)), seconds, f"{_peak(runs, name):.0f}"))
    yield from table(rows, right=range(1, 5))
    yield ""
    yield from judge(_BOUNDS, runs)
