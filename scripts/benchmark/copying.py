"""The contest: who copies and changes a checkpoint, in what time, and do they agree."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmark.digest import Digests, differences, digest
from benchmark.measure import Run, python, read_through, run, start_even
from benchmark.table import Bound, judge, spread, table

BASE = "cp -r"
OURS = "rewrite convert"
THEIRS = "convert_checkpoint"

Runs = Mapping[str, Sequence[Run]]


@dataclass(frozen=True)
class Contestant:
    """A program that writes the directory OUT from IN, both put after ``command``.

    ``timed_start``: it prints when it began to work. ``changes``: it expands the scales; cp does not.
    """

    name: str
    command: Sequence[str | Path]
    options: Sequence[str] = ()
    timed_start: bool = False
    changes: bool = True


CONTESTANTS = (
    Contestant(BASE, ("cp", "-r"), changes=False),
    Contestant("safetensors load, change, save", python("benchmark.stock"), timed_start=True),
    Contestant(THEIRS, python("benchmark.convert_checkpoint"), timed_start=True),
    Contestant(OURS, python("rewrite", "convert", "--quiet")),
    Contestant("rewrite convert --workers 1", python("rewrite", "convert", "--quiet", "--workers", "1")),
    Contestant("rewrite convert --workers 4", python("rewrite", "convert", "--quiet", "--workers", "4")),
)
_BOUNDS = (
    Bound("time of rewrite / cp -r", 1.1, lambda runs: median(ratios(runs, OURS, BASE))),
    Bound("time of rewrite / convert_checkpoint", 1 / 1.8, lambda runs: median(ratios(runs, OURS, THEIRS))),
    Bound("peak memory of rewrite, MB", 80, lambda runs: max(r.peak_bytes for r in runs[OURS]) / 1e6),
)


def contest(source: Path, work: Path, rounds: int, *, cold: bool, say: Callable[[str], None]) -> dict[str, list[Run]]:
    """``rounds`` times everyone, in an order that rotates, each alone on disk; the first round's outputs are compared.

    Raises :class:`Disagreement` when two outputs differ in a tensor.
    """
    runs: dict[str, list[Run]] = {contestant.name: [] for contestant in CONTESTANTS}
    agreed: Digests = {}
    for number in range(rounds):
        turn = number % len(CONTESTANTS)
        for contestant in (*CONTESTANTS[turn:], *CONTESTANTS[:turn]):
            out = work / "out"
            result = _run(contestant, source, out, cold)
            runs[contestant.name].append(result)
            say(f"round {number + 1}: {contestant.name}: {result.seconds:.2f} s")
            if number == 0:
                agreed = _compare(contestant, digest(out), agreed)
            shutil.rmtree(out)
    return runs


class Disagreement(Exception):
    """Two programs wrote different tensors."""


def _run(contestant: Contestant, source: Path, out: Path, cold: bool) -> Run:
    start_even(cold=cold)
    if not cold:
        read_through(source)
    command = [*contestant.command, source, out]
    return run(command, synced=out.parent, timed_start=contestant.timed_start)


def _compare(contestant: Contestant, found: Digests, agreed: Digests) -> Digests:
    """Everyone against the first one who changes the scales."""
    if not contestant.changes:
        return agreed
    if agreed and (names := differences(agreed, found)):
        raise Disagreement(f"{contestant.name} wrote other tensors than the others: {', '.join(names[:5])}")
    return found


def ratios(runs: Runs, one: str, other: str, *, started: bool = False) -> list[float]:
    """Of each round: time of ``one`` over time of ``other``; ``started`` leaves interpreters and imports out."""
    pairs = zip(runs[one], runs[other], strict=True)
    return [_time(a, started) / _time(b, started) for a, b in pairs]


def _time(result: Run, started: bool) -> float:
    return result.seconds - result.start if started else result.seconds


def report(runs: Runs) -> Iterator[str]:
    yield from table(list(_rows(runs)), right={1, 2, 3})
    yield ""
    for started, what in ((False, "in all"), (True, "without its interpreter and imports")):
        yield f"{THEIRS} / {OURS}, {what}: {spread(ratios(runs, THEIRS, OURS, started=started))}"
    yield ""
    yield from judge(_BOUNDS, runs)


def _rows(runs: Runs) -> Iterator[Sequence[str]]:
    yield "", "seconds", "/ cp -r", "peak MB"
    for name, results in runs.items():
        peak = f"{max(r.peak_bytes for r in results) / 1e6:.0f}"
        yield name, f"{median(r.seconds for r in results):.2f}", spread(ratios(runs, name, BASE)), peak
        if any(r.start for r in results):
            seconds = median(_time(r, True) for r in results)
            yield "  without start", f"{seconds:.2f}", spread(ratios(runs, name, BASE, started=True)), ""
