"""Random checkpoints through real engines: does each serve what was predicted?

A seed becomes a recipe (tests/recipes.py), the recipe a checkpoint, and each profile a conversion of it. Every one is
loaded by every engine. Judged, and printed with the seed where it does not hold:

- An engine raises where "fails to load" was predicted, and nowhere else; what it serves of every module is as far from
  the original's weights as the prediction says.
- No engine serves worse what ``verify`` holds than it serves the original.
- ``verify`` holds what ``convert`` wrote, and fails a copy that was damaged on purpose.
- ``inspect`` promises what ``convert`` does.

Where the prediction is "not known" nothing can be judged; such checkpoints are not loaded, but for ``--survey``. With
``--shrink`` the recipe of each disagreement is made smaller while it still shows.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from engines.envs import environment
from engines.known import ENGINES, find_engine
from engines.process import Checkpoint, Process

from loader_matrix.judging import NO_KERNEL, NOT_LEARNT, disagreement, observed, worse
from loader_matrix.results import Cell, cell
from loader_matrix.trials import ORIGINAL, Trial, Tried, attempt
from tests.recipes import BASES, KINDS, Recipe, draw, make, with_fault
from tests.shrinking import shrink
from tests.zoo.rebuild import ENTRIES, names, rebuild

JUDGES = ("vllm==0.19.1", "vllm==0.32.0", "sglang==0.5.23")
_AT_A_TIME = 10  # recipes on disk, with their conversions
Loaded = dict[str, Cell]  # by digest


@dataclass(frozen=True)
class Named:
    """A recipe, and what its checkpoint is called."""

    name: str
    recipe: Recipe


Source = Named | Path  # a directory is a checkpoint that is there already


@dataclass(frozen=True)
class Problem:
    """A disagreement: who says something else (an engine, "verify", "inspect") of what a profile made of a recipe."""

    source: str
    profile: str
    who: str
    what: str


@dataclass
class Count:
    """All that was judged, and all that was not."""

    predictions: Counter[tuple[str, str]] = field(default_factory=Counter)  # engine, kind
    surveyed: Counter[tuple[str, str]] = field(default_factory=Counter)  # engine, what was seen of "not known"
    done: Counter[str] = field(default_factory=Counter)
    outcomes: dict[str, dict[str, dict[str, str]]] = field(
        default_factory=dict
    )  # checkpoint, profile, engine: what was seen

    def lines(self) -> Iterator[str]:
        for spec in dict.fromkeys(spec for spec, _ in sorted(self.predictions)):
            own = {kind: count for (each, kind), count in sorted(self.predictions.items()) if each == spec}
            total, unjudged = sum(own.values()), own.get("not known", 0) + own.get("refused", 0)
            said = ", ".join(f"{kind} {count}" for kind, count in own.items())
            yield f"{spec}: {total - unjudged} of {total} judged ({unjudged / total:.0%} not); predicted: {said}"
        for (spec, seen), count in sorted(self.surveyed.items()):
            yield f"{spec}: not known, seen: {seen} {count}"
        yield ", ".join(f"{what} {count}" for what, count in sorted(self.done.items()))


class Search:
    """The engines that are asked, what is asked of them, and the counts."""

    def __init__(self, engines: Sequence[str], *, survey: bool = False) -> None:
        self.engines = tuple(engines)
        self.count = Count()
        self._survey = survey
        self._processes = {spec: _process(spec) for spec in engines}
        # a thread for each engine: a process answers one question at a time
        self._threads = {spec: ThreadPoolExecutor(1) for spec in engines}

    def run(self, sources: Iterable[Source], profiles: Sequence[str] | None = None) -> Iterator[Problem]:
        """Every disagreement. While engines load some of the checkpoints, the next are made."""
        waiting: _Chunk | None = None
        for some in _chunks(list(sources)):
            chunk = _Chunk(some, self.engines, profiles)
            chunk.send(self._threads, self._processes, survey=self._survey)
            if waiting is not None:
                yield from waiting.problems(self.count)
            waiting = chunk
        if waiting is not None:
            yield from waiting.problems(self.count)

    def close(self) -> None:
        """End the engines."""
        for process in self._processes.values():
            process.close()
        for threads in self._threads.values():
            threads.shutdown()

    def shows(self, problem: Problem, recipes: Sequence[Recipe]) -> list[bool]:
        """Whether each recipe shows the same disagreement: of the same profile, by the same engine or command."""
        named = [Named(f"{problem.source} smaller {number}", recipe) for number, recipe in enumerate(recipes)]
        profiles = () if problem.profile == ORIGINAL else (problem.profile,)
        count, self.count = self.count, Count()  # these were counted before
        try:
            alike = {
                p.source for p in self.run(named, profiles) if (p.profile, p.who) == (problem.profile, problem.who)
            }
        finally:
            self.count = count
        return [each.name in alike for each in named]


class _Chunk:
    """Some checkpoints on disk, from the recipe to the verdict."""

    def __init__(self, sources: Sequence[Source], engines: Sequence[str], profiles: Sequence[str] | None) -> None:
        self._disk = tempfile.TemporaryDirectory(prefix="search-")
        folder = Path(self._disk.name)
        self._tried = [_attempt(source, folder, engines, profiles) for source in sources]
        self._loads: dict[str, tuple[list[Trial], Future[list[Cell]]]] = {}

    def send(
        self, threads: Mapping[str, ThreadPoolExecutor], processes: Mapping[str, Process], *, survey: bool
    ) -> None:
        """Let every engine load what can be judged, each of the same bytes once."""
        folder = Path(self._disk.name)
        for spec, process in processes.items():
            own = [t for t in self._trials() if _is_loaded(t.predictions[spec], survey=survey)]
            once = list({trial.digest: trial for trial in reversed(own)}.values())[::-1]
            self._loads[spec] = once, threads[spec].submit(_load, spec, process, once, folder)

    def problems(self, count: Count) -> Iterator[Problem]:
        """Wait for the engines, and judge. The checkpoints are gone then."""
        loaded = {
            spec: {trial.digest: cell for trial, cell in zip(trials, cells.result(), strict=True)}
            for spec, (trials, cells) in self._loads.items()
        }
        for tried in self._tried:
            count.done["recipes"] += 1
            count.done.update(tried.counts)
            yield from (Problem(tried.name, *problem) for problem in tried.problems)
            for spec, cells in loaded.items():
                yield from _judged(tried, spec, cells, count)
        count.done["loads"] += sum(len(cells) for cells in loaded.values())
        self._disk.cleanup()

    def _trials(self) -> Iterator[Trial]:
        return (trial for tried in self._tried for trial in tried.trials)


def _process(spec: str) -> Process:
    engine = find_engine(spec)
    return Process(engine, environment(engine), "loader_matrix.drive", quiet=True)


def _load(spec: str, process: Process, trials: Sequence[Trial], folder: Path) -> list[Cell]:
    results = process.load([Checkpoint(each.label, each.folder, each.truth) for each in trials], folder)
    engine, _, version = spec.partition("==")
    keys = ({"engine": engine, "version": version, "fixture": each.label, "profile": "", "ranks": 1} for each in trials)
    return [cell(key, found) for key, found in zip(keys, results, strict=True)]


def _is_loaded(predicted: str, *, survey: bool) -> bool:
    return survey or predicted not in ("not known", "refused")


def _attempt(source: Source, folder: Path, engines: Sequence[str], profiles: Sequence[str] | None) -> Tried:
    if isinstance(source, Path):
        return attempt(source, folder, engines, 0, profiles)
    made = folder / source.name
    make(source.recipe, made)
    return attempt(made, folder, engines, source.recipe.seed, profiles)


def _judged(tried: Tried, spec: str, cells: Loaded, count: Count) -> Iterator[Problem]:
    """What one engine says of a recipe and its conversions."""
    before: Cell | None = None
    for trial in tried.trials:
        predicted, found = trial.predictions[spec], cells.get(trial.digest)
        count.predictions[spec, predicted] += 1
        if trial.profile == ORIGINAL and predicted != "not known":
            before = found
        if found is None:
            continue
        count.outcomes.setdefault(tried.name, {}).setdefault(trial.profile, {})[spec] = observed(found)
        if predicted in ("not known", "refused"):
            count.surveyed[spec, observed(found)] += 1
            continue
        if (seen := observed(found)) in (NOT_LEARNT, NO_KERNEL):
            count.done[seen] += 1
        if found.not_compared:
            count.done["loads of which not all was compared"] += 1
        problem = disagreement(predicted, found)
        if problem is not None:
            yield Problem(tried.name, trial.profile, spec, f"predicted {predicted}; {problem}")
        elif before is not None and trial.profile not in (ORIGINAL, "partition") and (harm := worse(before, found)):
            # "partition" is made for loaders that take vectors, and verify judges it by these only
            yield Problem(tried.name, trial.profile, spec, f"verify holds it, served: {harm}")


def _chunks(sources: list[Source]) -> Iterator[list[Source]]:
    for start in range(0, len(sources), _AT_A_TIME):
        yield sources[start : start + _AT_A_TIME]


def search(sources: Sequence[Source], asked: Search, *, shrinks: bool) -> int:
    """Print every disagreement, and the counts; how many there were."""
    recipes = {source.name: source.recipe for source in sources if isinstance(source, Named)}
    problems = []
    for problem in asked.run(sources):
        problems.append(problem)
        print(f"{problem.source}, {problem.profile}, {problem.who}: {problem.what}", flush=True)
    if shrinks:
        for problem in _distinct(problems):
            if (recipe := recipes.get(problem.source)) is not None:
                smallest = shrink(recipe, partial(asked.shows, problem))
                print(f"smallest for {problem.profile}, {problem.who} ({problem.what:.90}):\n  {smallest}", flush=True)
    print("\n".join(asked.count.lines()))
    print(f"{len(sources)} checkpoints, {len(problems)} disagreements")
    return len(problems)


def _distinct(problems: Sequence[Problem]) -> list[Problem]:
    """One for each recipe and engine: what shows in one profile often shows in all."""
    return list({(problem.source, problem.who): problem for problem in reversed(problems)}.values())[::-1]


def main(words: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="scripts/evidence.sh search", description=__doc__)
    parser.add_argument("recipes", type=int, help="how many recipes")
    parser.add_argument("--faulty", action="store_true", help="something is wrong in each: tests/recipes.py, FAULTS")
    parser.add_argument("--bases", type=Path, help="a folder of checkpoints to take weights from: of `families`")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--checkpoint", action="append", type=Path, default=[], help="a directory, as well")
    parser.add_argument("--zoo", action="store_true", help="the checkpoints of tests/zoo, as well")
    parser.add_argument("--record", action="store_true", help="survey the zoo, and write what was seen to tests/zoo")
    parser.add_argument("--engine", action="append", choices=[e.spec for e in ENGINES], help="NAME==VERSION")
    parser.add_argument("--no-engine", action="store_true", help="only inspect, convert and verify against each other")
    parser.add_argument("--kind", action="append", help="schemes of tests/recipes.py; all of them")
    parser.add_argument("--survey", action="store_true", help="load what is not known, too, and count what is seen")
    parser.add_argument("--shrink", action="store_true", help="make the recipe of each disagreement smaller")
    given = parser.parse_args(words)
    kinds = tuple(given.kind or KINDS)
    bases = dict.fromkeys(map(str, sorted(given.bases.resolve().iterdir())), 1) if given.bases else BASES
    drawn = [draw(seed, kinds, bases) for seed in range(given.seed, given.seed + given.recipes)]
    recipes = [Named(f"seed {each.seed}", with_fault(each) if given.faulty else each) for each in drawn]
    _one_thread()
    asked = Search(() if given.no_engine else given.engine or JUDGES, survey=given.survey or given.record)
    with tempfile.TemporaryDirectory(prefix="zoo-") as folder:
        zoo = [rebuild(name, Path(folder) / name) for name in names() if given.zoo or given.record]
        try:
            found = search([*given.checkpoint, *zoo, *recipes], asked, shrinks=given.shrink)
        finally:
            asked.close()
    if given.record:
        record({name: asked.count.outcomes.get(name, {}) for name in names()})
    return 1 if found else 0


def record(outcomes: Mapping[str, Mapping[str, Mapping[str, str]]]) -> None:
    """Write what engines were seen to make of the zoo: checkpoint, profile, engine, kind of outcome."""
    text = json.dumps(outcomes, indent=1, sort_keys=True)
    (ENTRIES.parent / "engines.json").write_text(text + "\n", encoding="utf-8")


def _one_thread() -> None:
    """The weights are small, and the engines want the other cores."""
    import torch

    torch.set_num_threads(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
