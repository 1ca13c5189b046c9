"""Random checkpoints through real engines: does each serve what was predicted?

A seed becomes a recipe (tests/recipes.py), the recipe a checkpoint, and each profile a conversion of it. Every one is
loaded by every engine. Judged for each load: the engine raises where "fails to load" was predicted, and nowhere else;
what it serves of every module is as far from the original's weights as the prediction says. Where the prediction is
"not known", nothing is judged. Every disagreement is printed with the seed of its recipe.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loader_matrix.driver import LIMIT, Batch, Task
from loader_matrix.engines import ENGINES, find_engine
from loader_matrix.envs import HOME, environment
from loader_matrix.results import Cell, cell

JUDGES = ("vllm==0.19.1", "vllm==0.32.0", "sglang==0.5.23")
#: Schemes of ``tests/recipes.py`` that engines load on CPU. Blocks and INT4 need other kernels.
KINDS = (
    *("fp8-tensor-static", "fp8-tensor-dynamic", "fp8-tensor-token", "fp8-channel-token", "fp8-channel-static"),
    *("int8", "nvfp4a16"),
)
#: One rounding to e4m3 moves a weight by at most a sixteenth; the worst partition is off by less.
LOST = 2.0**-4
_AT_A_TIME = 20  # checkpoints on disk, with their conversions
NAMES = {"vllm": "vLLM", "sglang": "SGLang", "transformers": "transformers"}


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint: the original, or what a profile makes of it, and the predictions by loader."""

    name: str
    profile: str
    folder: str
    truth: str
    predictions: dict[str, str]  # NAME==VERSION → kind of outcome


def converted(source: Path, folder: Path, engines: Sequence[str]) -> list[Checkpoint]:
    """The checkpoint ``source`` and its conversions with every profile, and what is predicted of all."""
    import rewrite

    found = [Checkpoint(source.name, "original", str(source), str(source), predict(source, engines))]
    for profile in rewrite.PROFILES:
        out = folder / f"{source.name}-{profile}"
        with suppress(rewrite.Refused):
            if rewrite.convert(source, out, profile=profile, selection="all").changed:
                found.append(Checkpoint(source.name, profile, str(out), str(source), predict(out, engines)))
    return found


def from_recipe(seed: int, folder: Path, kinds: Sequence[str]) -> Path:
    """The checkpoint of a recipe."""
    from tests.recipes import draw, make

    source = folder / f"seed {seed}"
    make(draw(seed, tuple(kinds)), source)
    return source


def predict(folder: Path, engines: Iterable[str]) -> dict[str, str]:
    """The kind of outcome for each engine; "refused" where inspect refuses the checkpoint."""
    import rewrite

    try:
        rows = rewrite.inspect_checkpoint(folder, selection="all").rows
    except rewrite.Refused:
        return dict.fromkeys(engines, "refused")
    kinds: dict[str, str] = {}
    for spec in engines:
        name, _, version = spec.partition("==")
        kinds[spec] = next(r.as_is.kind for r in rows if r.loader.name == NAMES[name] and r.loader.covers(version))
    return kinds


def load(spec: str, checkpoints: Sequence[Checkpoint], folder: Path) -> Iterator[tuple[Checkpoint, Cell]]:
    """Every checkpoint through one engine."""
    engine = find_engine(spec)
    where = environment(engine)
    logs = HOME / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    tasks = []
    for number, each in enumerate(checkpoints):
        own = folder / f"{folder.name}-{engine.slug}-{number}"
        own.mkdir()
        label = f"search-{engine.slug}-{each.name}-{each.profile}"
        (logs / f"{label}.log").unlink(missing_ok=True)
        tasks.append(Task(label, each.folder, each.truth, str(own), str(logs / f"{label}.log"), 1))
    batch = folder / f"{engine.slug}.json"
    Batch(engine.version, str(logs / f"search-{engine.slug}.log"), tuple(tasks)).write(batch)
    command = [str(where.python), "-m", f"loader_matrix.drive_{engine.name}", str(batch)]
    with suppress(subprocess.TimeoutExpired):
        subprocess.run(command, env=where.variables, check=False, timeout=LIMIT, stderr=subprocess.DEVNULL)
    for each, task in zip(checkpoints, tasks, strict=True):
        key: dict[str, Any] = {
            "engine": engine.name,
            "version": engine.version,
            "fixture": each.name,
            "profile": each.profile,
            "ranks": 1,
        }
        result = task.out(0)
        yield (
            each,
            cell(key, [json.loads(result.read_text())])
            if result.exists()
            else Cell(**key, outcome="not run", reason="the process ended without a result"),
        )


def disagreement(predicted: str, found: Cell) -> str | None:
    """What is wrong with a prediction, or None."""
    if found.outcome == "not run" and predicted != "not known":
        return f"nothing learnt: {found.reason}"
    if predicted in ("not known", "refused"):
        return None
    if found.outcome == "raises":
        error = found.error or {}
        if predicted == "fails to load":
            return None
        return f"raises {error.get('type')}: {error.get('message', '')[:160]} ({error.get('where')})"
    seen = observed(found)
    if seen == predicted:
        return None
    return f"serves: {seen}; {worst_of(found)}"


def observed(found: Cell) -> str:
    """The kind of outcome that the errors of a load say."""
    errors = [error for _, error in _errors(found)]
    if found.cast or any(isinstance(error, str) or error > LOST for error in errors):
        return "garbled"
    return "loses precision" if any(errors) else "exact"


def worst_of(found: Cell) -> str:
    """The layer that is furthest off."""
    worst = max(_errors(found), key=lambda each: math.inf if isinstance(each[1], str) else each[1], default=("-", 0.0))
    cast = f", cast to FP8: {found.cast[:2]}" if found.cast else ""
    return f"{worst[0]} off by {worst[1]}{cast}"


def _errors(found: Cell) -> Iterator[tuple[str, Any]]:
    for group in found.groups:
        for part, error in group["errors"].items():
            yield f"{group['module']}.{part}", error
    for kind, other in found.others.items():
        yield kind, other["error"]


def search(sources: Sequence[Path | int], engines: Sequence[str], kinds: Sequence[str]) -> int:
    """Run the search over checkpoints and seeds of recipes; the number of disagreements."""
    counts: Counter[tuple[str, str]] = Counter()
    wrong = loads = 0
    for start in range(0, len(sources), _AT_A_TIME):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            some = sources[start : start + _AT_A_TIME]
            folders = [each if isinstance(each, Path) else from_recipe(each, folder, kinds) for each in some]
            made = [each for source in folders for each in converted(source, folder, engines)]
            for spec in engines:
                for each, found in load(spec, made, folder):
                    predicted = each.predictions[spec]
                    counts[spec, predicted] += 1
                    loads += 1
                    problem = disagreement(predicted, found)
                    if problem is not None:
                        wrong += 1
                        print(f"{each.name}, {each.profile}, {spec}: predicted {predicted}; {problem}", flush=True)
    for (spec, predicted), count in sorted(counts.items()):
        print(f"{spec:16} {predicted:16} {count}")
    print(f"{len(sources)} checkpoints, {loads} loads with their conversions, {wrong} disagreements")
    return wrong


def main(words: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="loader_matrix.sh --search", description=__doc__)
    parser.add_argument("recipes", type=int, help="how many recipes")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--checkpoint", action="append", type=Path, default=[], help="a directory, as well")
    parser.add_argument("--engine", action="append", choices=[e.spec for e in ENGINES], help="NAME==VERSION")
    parser.add_argument("--kind", action="append", help="schemes of tests/recipes.py; all that the matrix reads")
    given = parser.parse_args(words)
    sources = [*given.checkpoint, *range(given.seed, given.seed + given.recipes)]
    return 1 if search(sources, given.engine or JUDGES, given.kind or KINDS) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
