"""The runs of several programs: in turns, and beside each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import attrgetter
from statistics import median

from benchmark.measure import Run
from benchmark.table import spread

Runs = Mapping[str, Sequence[Run]]
By = Callable[[Run], float]
SECONDS: By = attrgetter("seconds")
CPU: By = attrgetter("cpu")


def in_turns(programs: Mapping[str, Callable[[], Run]], rounds: int, say: Callable[[str], None]) -> Runs:
    """Everyone ``rounds`` times, in an order that rotates."""
    runs: dict[str, list[Run]] = {name: [] for name in programs}
    names = list(programs)
    for number in range(rounds):
        turn = number % len(names)
        for name in (*names[turn:], *names[:turn]):
            result = programs[name]()
            runs[name].append(result)
            say(f"round {number + 1}: {name}: {result.seconds:.2f} s, {result.cpu:.2f} s of the processor")
    return runs


def ratios(runs: Runs, one: str, other: str, *, by: By = SECONDS) -> list[float]:
    """Of each round: ``one`` over ``other``."""
    return [by(a) / by(b) for a, b in zip(runs[one], runs[other], strict=True)]


def peak(runs: Runs, *names: str) -> float:
    """The most memory that any run of these took, in MB."""
    return max(each.peak_bytes for name in names for each in runs[name]) / 1e6


def rows(runs: Runs, base: str, *, by: By = SECONDS) -> Iterator[tuple[str, ...]]:
    """A table: medians, how the rounds compare with those of ``base``, and the peak of memory."""
    yield "", "seconds", f"/ {base}", "CPU s", "peak MB"
    for name, own in runs.items():
        seconds, cpu = (f"{median(map(each, own)):.2f}" for each in (SECONDS, CPU))
        yield name, seconds, spread(ratios(runs, name, base, by=by)), cpu, f"{peak(runs, name):.0f}"
