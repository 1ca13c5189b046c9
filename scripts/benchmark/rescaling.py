"""One global scale for fused NVFP4 layers, at the shapes of Qwen3.5-35B-A3B: every expert, every Gated DeltaNet."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

from benchmark.copying import BASE, Contestant, contest
from benchmark.measure import python, run
from benchmark.runs import Runs, peak, ratios, rows
from benchmark.table import Bound, judge, table

LAYERS = 8  # of 40
FOLDED, RESCALED = "rewrite convert", "rewrite convert --profile rescaled"
_CONTESTANTS = (
    Contestant(BASE, ("cp", "-r"), agrees=False),
    Contestant(FOLDED, python("rewrite", "convert", "--json"), agrees=False),
    Contestant(RESCALED, python("rewrite", "convert", "--json", "--profile", "rescaled"), agrees=False),
)
_BOUNDS = (
    Bound("time of rescaling / cp -r", 1.5, lambda runs: median(ratios(runs, RESCALED, BASE))),
    Bound("time of folding / cp -r", 1.5, lambda runs: median(ratios(runs, FOLDED, BASE))),
    Bound("peak memory, MB", 80, lambda runs: peak(runs, FOLDED, RESCALED)),
)


def measure(work: Path, rounds: int, *, cold: bool, say: Callable[[str], None]) -> Runs:
    """``rounds`` times every program."""
    source = work / "nvfp4"
    source.mkdir()
    run(python("benchmark.make", source, "--nvfp4", str(LAYERS)))
    return contest(_CONTESTANTS, source, work, rounds, cold=cold, say=say)


def report(runs: Runs) -> Iterator[str]:
    """A table, and whether the bounds are reached."""
    yield f"NVFP4 checkpoint: Qwen3.5-35B-A3B shapes, {LAYERS} of 40 layers."
    head, *found = rows(runs, BASE)
    yield from table([(*head, "written MB"), *((*row, _written(runs, row[0])) for row in found)], right=range(1, 6))
    yield ""
    yield from judge(_BOUNDS, runs)


def _written(runs: Runs, name: str) -> str:
    """What was made anew in OUT."""
    return "-" if name == BASE else f"{json.loads(runs[name][-1].output)['bytes']['written'] / 1e6:.1f}"
