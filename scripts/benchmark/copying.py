"""The contest: who copies and changes a checkpoint, in what time, and do they agree."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

from benchmark.digest import Digests, differences, digest
from benchmark.measure import Run, python, read_through, run, start_even
from benchmark.runs import Runs, in_turns, peak, ratios, rows
from benchmark.table import Bound, judge, spread, table

BASE = "cp -r"
OURS = "rewrite convert"
THEIRS = "convert_checkpoint"


@dataclass(frozen=True)
class Contestant:
    """A program that writes the directory OUT from IN, both put after ``command``.

    ``timed_start``: it prints when it began to work. ``agrees``: its tensors have to be those of all others of which
    that is said.
    """

    name: str
    command: Sequence[str | Path]
    timed_start: bool = False
    agrees: bool = True


CONTESTANTS = (
    Contestant(BASE, ("cp", "-r"), agrees=False),  # it does not expand the scales
    Contestant("safetensors load, change, save", python("benchmark.stock"), timed_start=True),
    Contestant(THEIRS, python("benchmark.convert_checkpoint"), timed_start=True),
    Contestant(OURS, python("rewrite", "convert", "--quiet")),
    Contestant("rewrite convert --workers 1", python("rewrite", "convert", "--quiet", "--workers", "1")),
    Contestant("rewrite convert --workers 4", python("rewrite", "convert", "--quiet", "--workers", "4")),
)
_BOUNDS = (
    Bound("time of rewrite / cp -r", 1.1, lambda runs: median(ratios(runs, OURS, BASE))),
    Bound("time of rewrite / convert_checkpoint", 1 / 1.8, lambda runs: median(ratios(runs, OURS, THEIRS))),
    Bound("peak memory of rewrite, MB", 80, lambda runs: peak(runs, OURS)),
)


class Disagreement(Exception):
    """Two programs wrote different tensors."""


class _Contest:
    """Each alone on disk; what the first round writes is compared."""

    def __init__(self, source: Path, out: Path, *, cold: bool) -> None:
        self._source, self._out, self._cold = source, out, cold
        self._agreed: Digests = {}
        self._seen: set[str] = set()

    def run(self, contestant: Contestant) -> Run:
        start_even(cold=self._cold)
        if not self._cold:
            read_through(self._source)
        command = [*contestant.command, self._source, self._out]
        result = run(command, synced=self._out.parent, timed_start=contestant.timed_start)
        if contestant.agrees and contestant.name not in self._seen:
            self._seen.add(contestant.name)
            self._compare(contestant.name, digest(self._out))
        shutil.rmtree(self._out)
        return result

    def _compare(self, name: str, found: Digests) -> None:
        """Everyone against the first one."""
        if self._agreed and (names := differences(self._agreed, found)):
            raise Disagreement(f"{name} wrote other tensors than the others: {', '.join(names[:5])}")
        self._agreed = found


def contest(
    contestants: Sequence[Contestant], source: Path, work: Path, rounds: int, *, cold: bool, say: Callable[[str], None]
) -> Runs:
    """``rounds`` times everyone. Raises :class:`Disagreement` when two outputs differ in a tensor."""
    own = _Contest(source, work / "out", cold=cold)
    return in_turns({each.name: partial(own.run, each) for each in contestants}, rounds, say)


def report(runs: Runs) -> Iterator[str]:
    """A table, and whether the bounds are reached."""
    found: list[Sequence[str]] = []
    for row in rows(runs, BASE):
        found.append(row)
        if any(each.start for each in runs.get(row[0], ())):
            seconds = median(each.seconds - each.start for each in runs[row[0]])
            found.append(("  without start", f"{seconds:.2f}", spread(ratios(runs, row[0], BASE, by=_worked)), "", ""))
    yield from table(found, right=range(1, 5))
    yield ""
    yield f"{THEIRS} / {OURS}, in all: {spread(ratios(runs, THEIRS, OURS))}"
    yield f"{THEIRS} / {OURS}, without its interpreter and imports: {spread(ratios(runs, THEIRS, OURS, by=_worked))}"
    yield ""
    yield from judge(_BOUNDS, runs)


def _worked(result: Run) -> float:
    return result.seconds - result.start
