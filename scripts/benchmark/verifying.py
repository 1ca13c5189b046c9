"""How long `rewrite verify` takes beside reading the same bytes: `cmp` of two directories, `sha256sum` of one.

Per profile, for both choices of groups; and whether its cost follows the bytes rather than the tensors.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

from benchmark.measure import Run, python, read_through, run, start_even
from benchmark.runs import Runs, in_turns, peak
from benchmark.table import Bound, judge, table

PROFILES = ("exact", "dynamic", "portable", "partition", "bf16")
_CMP, _SHA, _IMPORTS = "cmp of both", "sha256sum of OUT", "imports alone"
_FULL, _DIGEST, _QUICK, _LIGHT = "verify", "verify --digest", "verify --quick", "verify --weights-only"
_SMALL = 100_000  # tensors; the weights among them take 4 kB each


@dataclass(frozen=True)
class Case:
    """The runs of every program on one conversion. ``size`` is that of OUT in bytes."""

    name: str
    size: int
    runs: Runs

    def seconds(self, name: str) -> float:
        """The median."""
        return median(each.seconds for each in self.runs[name])

    def processor(self, name: str) -> float:
        """The median of the seconds of the processor: what others do at the same time counts less."""
        return median(each.cpu for each in self.runs[name])

    @property
    def reading(self) -> float:
        """Seconds that looking at the bytes takes: the larger of cmp and sha256sum."""
        return max(self.seconds(_CMP), self.seconds(_SHA))

    def ratio(self, name: str) -> float:
        """Seconds without imports, over those of looking at the bytes."""
        return max(self.seconds(name) - self.seconds(_IMPORTS), 0.0) / self.reading

    def peak(self, name: str) -> float:
        """MB."""
        return peak(self.runs, name)


def measure(
    source: Path, work: Path, profiles: Sequence[str], rounds: int, *, cold: bool, say: Callable[[str], None]
) -> list[Case]:
    """Every profile for both choices of groups; at the end many small tensors, beside ``exact`` of large ones."""
    cases = []
    for profile in profiles:
        for groups in ("qkvz", "all"):
            options = ("--profile", profile, "--groups", groups)
            cases.append(_case(f"{profile}, {groups}", source, work, options, rounds, cold, say))
    small = work / "small"
    small.mkdir()
    run(python("benchmark.make", small, "--small", str(_SMALL)))
    for profile in ("exact", "portable"):
        cases.append(
            _case(f"{profile}, small", small, work, ("--profile", profile, "--groups", "all"), rounds, cold, say)
        )
    shutil.rmtree(small)
    return cases


def _case(
    name: str,
    source: Path,
    work: Path,
    options: Sequence[str],
    rounds: int,
    cold: bool,
    say: Callable[[str], None],
) -> Case:
    out, twin = work / "out", work / "twin"
    run([*python("rewrite", "convert", "--quiet"), *options, source, out])
    shutil.copytree(out, twin)  # cmp would stop at the first difference of IN and OUT
    files = sorted(path.name for path in out.glob("*.safetensors"))
    verify = python("rewrite", "verify", "--quiet")
    programs: dict[str, Sequence[str | Path]] = {
        _CMP: ["bash", "-c", 'for name in "${@:3}"; do cmp "$1/$name" "$2/$name"; done', "_", out, twin, *files],
        _SHA: ["sha256sum", *(out / file for file in files)],
        _IMPORTS: python("benchmark.imports"),
        _FULL: [*verify, source, out],
        _DIGEST: [*verify, "--digest", source, out],
        _QUICK: [*verify, "--quick", source, out],
        _LIGHT: [*verify, "--weights-only", source, out],
    }

    def each(command: Sequence[str | Path]) -> Run:
        start_even(cold=cold)
        if not cold:
            read_through(source)
            read_through(out)
        return run(command)

    runs = in_turns({program: partial(each, command) for program, command in programs.items()}, rounds, say)
    size = sum(path.stat().st_size for path in out.iterdir())
    shutil.rmtree(out)
    shutil.rmtree(twin)
    return Case(name, size, runs)


def _large(cases: Sequence[Case], *, bf16: bool) -> list[Case]:
    return [case for case in cases if not case.name.endswith("small") and case.name.startswith("bf16") == bf16]


def _worst(ratios: Iterator[float]) -> float:
    return max(ratios, default=0.0)


def _growth(cases: Sequence[Case]) -> float:
    """Seconds of many small tensors over seconds of ten times the bytes in large ones."""
    small = [case.seconds(_FULL) for case in cases if case.name.endswith("small")]
    large = [case.seconds(_FULL) for case in _large(cases, bf16=False)]
    return max(small) / median(large) if small and large else 0.0


_BOUNDS = (
    Bound("verify / reading, but for bf16", 1.5, lambda c: _worst(x.ratio(_FULL) for x in _large(c, bf16=False))),
    Bound("verify / reading, bf16", 4, lambda c: _worst(x.ratio(_FULL) for x in _large(c, bf16=True))),
    Bound("verify --quick / reading", 0.25 * 1.5, lambda c: _worst(x.ratio(_QUICK) for x in _large(c, bf16=False))),
    Bound("peak memory of verify, MB", 700, lambda c: _worst(x.peak(_FULL) for x in c)),
    Bound("peak memory of --weights-only, MB", 120, lambda c: _worst(x.peak(_LIGHT) for x in _large(c, bf16=False))),
    Bound("seconds, many small tensors / large ones", 3, _growth),
)


def report(cases: Sequence[Case]) -> Iterator[str]:
    """A table in seconds and MB, and whether the bounds are reached."""
    names = (_CMP, _SHA, _IMPORTS, _FULL, _DIGEST, _QUICK, _LIGHT)
    rows: list[Sequence[str]] = [("seconds (of the processor; peak MB)", "GB", *names)]
    for case in cases:
        cells = (f"{case.seconds(name):.1f} ({case.processor(name):.1f}; {case.peak(name):.0f})" for name in names)
        rows.append((case.name, f"{case.size / 1e9:.2f}", *cells))
    yield from table(rows, right=range(1, len(rows[0])))
    yield ""
    yield "Reading is the larger of cmp and sha256sum; the time of the imports is taken off."
    yield from judge(_BOUNDS, cases)
