"""Whether `rewrite try` agrees with the record of the loader matrix, module by module.

    scripts/evidence.sh try_agreement [--converted] [--engine NAME==VERSION] [--fixture F]

Runs the driver of `try` in the environments of the loader matrix: one process an engine, which forks a child for each
fixture, and with --converted for each profile that it was recorded with. The record (tests/loader_matrix.json) was made
by other code, with an independent reading of the files. --keep DIR keeps the results; what is there is not run again.

Exits with 1 where numbers differ, where a sound checkpoint is called affected or an affected one sound, and where a
load gives nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DRIVER = ROOT / "rewrite" / "trying" / "driver.py"
ENGINES = ("vllm==0.32.0", "vllm==0.19.1", "sglang==0.5.23", "transformers==5.24.0")
ROUNDED = 2.0**-8  # once to BF16
WRONG = ("differs", "false alarm", "missed", "no result")


def inside(package: str, jobs: list[dict[str, str]]) -> None:
    """In the engine's Python: start it once, fork a child for each checkpoint."""
    spec = importlib.util.spec_from_file_location("driver", DRIVER)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{DRIVER} can't be loaded")
    driver = importlib.util.module_from_spec(spec)
    sys.modules["driver"] = driver
    spec.loader.exec_module(driver)
    engine = driver.chosen(package)({})
    version = engine.start()
    about = {"engine": engine.name, "version": version, "replaced": engine.replaced, "stopped": None, "gpu": False}
    for job in jobs:
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            continue
        try:
            Path(job["out"]).write_text(json.dumps(driver.measure(engine, job, lambda *_: None) | about))
        finally:
            sys.stderr.flush()
            os._exit(0)
    os._exit(0)


def canonical(name: str) -> str:
    """A module's name from its layer on, as engines have different names before it."""
    found = re.search(r"layers\.\d+\..+$", name)
    return (found[0] if found else name).replace(".routed_experts", "")


def errors(row: dict[str, Any]) -> list[float]:
    """In the order of the rows of the fused layer."""
    parts = sorted(row["parts"], key=lambda part: part["rows"] or [0, 0])
    return [float(part["error"]) for part in parts]


def close(one: float, other: float) -> bool:
    """As the record compares, but zero is anything below 1e-6."""
    if math.isnan(one) or math.isnan(other):
        return math.isnan(one) and math.isnan(other)
    return (one < 1e-6 and other < 1e-6) or math.isclose(one, other, rel_tol=0.02)


def compared(result: dict[str, Any], cell: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """For each fused module, and for the worst of each other kind of linear: a word, and what is to be said of it."""
    if cell["outcome"] == "raises" or result["failure"]:
        agrees = cell["outcome"] == "raises" and bool(result["failure"])
        said = (result["failure"] or {}).get("loading") or (result["failure"] or {}).get("reference") or {}
        text = f"record {cell['outcome']}, try {said.get('type')}: {said.get('message', '')[:150]}"
        yield ("raises", "") if agrees else ("differs", text)
        return
    rows = {canonical(row["module"]): row for row in result["layers"] if row["parameter"] == "weight"}
    for group in cell["groups"]:
        row, recorded = rows.get(canonical(group["module"])), [float(each) for each in group["errors"].values()]
        if row is None or not row["parts"]:
            yield "not compared", f"{group['module']}: {row['held'] if row else 'no such module'}"
            continue
        seen = errors(row)
        if len(seen) != len(recorded):  # several partitions were written, or measured, as one: the worst counts
            seen, recorded = [max(seen)], [max(recorded)]
        agrees = all(map(close, seen, recorded))
        yield ("agrees", "") if agrees else ("differs", f"{group['module']}: record {recorded}, try {seen}")
    worst = worst_of_kinds(result)
    for kind, other in cell["others"].items():
        stored = float(other["error"])
        if kind not in worst:
            yield "not compared", f"{kind}: no such module"
        elif close(worst[kind], stored):
            yield "agrees", ""
        elif result["engine"] == "transformers" and kind.startswith("experts.") and min(worst[kind], stored) > 0.2:
            # gate and up of an expert are one matrix there: the record judges its halves, try the whole
            yield "agrees in kind", f"{kind}: record {stored}, try {worst[kind]:.0f}"
        else:
            yield "differs", f"{kind}: record {stored}, try {worst[kind]}"


def worst_of_kinds(result: dict[str, Any]) -> dict[str, float]:
    """The largest error of each kind of linear, by the end of its name."""
    worst: dict[str, float] = {}
    for row in result["layers"]:
        name = canonical(row["module"])
        kind = name.rpartition(".")[2]
        if ".experts" in name:
            kind = f"experts.{row['parameter'].removesuffix('_weight')}"
        for error in errors(row):
            worst[kind] = error if math.isnan(error) else max(worst.get(kind, 0.0), error)
    return worst


def judged(result: dict[str, Any], cell: dict[str, Any]) -> tuple[str, str]:
    """Whether the verdict is right, by the record's numbers alone."""
    from rewrite.errors import RewriteError
    from rewrite.trying import verdict

    try:
        found = verdict.judge(result).kind
    except RewriteError as error:
        found = f"nothing learnt: {error.what}"
    scales = [each["input_scale"] for each in (*cell["groups"], *cell["others"].values())]
    numbers = [float(error) for group in cell["groups"] for error in group["errors"].values()]
    numbers += [float(other["error"]) for other in cell["others"].values()]
    sound = (
        cell["outcome"] == "loads"
        and not cell["cast"]
        and "differs" not in scales
        and all(error <= ROUNDED for error in numbers)
    )
    if cell["outcome"] == "raises":
        right = found == verdict.FAILS or found.startswith("nothing learnt")
        return ("refusal seen" if found == verdict.FAILS else "nothing learnt") if right else "missed", found
    if found == verdict.UNKNOWN:
        return "not known", "; ".join(verdict.judge(result).unlearnt[:1])
    if sound:
        return "sound" if found in (verdict.EXACT, verdict.ROUNDED) else "false alarm", found
    return "affected" if found in verdict.AFFECTED else "missed", found


def checkpoints(spec: str, names: list[str], *, converted: bool) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Fixture, profile and what was recorded of it on one rank."""
    name, _, version = spec.partition("==")
    for cell in json.loads((ROOT / "tests" / "loader_matrix.json").read_text())["cells"]:
        is_this = (cell["engine"], cell["version"], cell["ranks"]) == (name, version, 1)
        is_wanted = cell["fixture"] in names and cell["outcome"] in ("loads", "raises")
        if is_this and is_wanted and (converted or cell["profile"] == "original"):
            yield cell["fixture"], cell["profile"], cell


def written(fixture: str, profile: str, folder: Path) -> Path:
    """The fixture, or what `convert` makes of it."""
    from loader_matrix import cases

    import rewrite

    source = cases.folder(fixture)
    if profile == cases.ORIGINAL:
        return source
    out = folder / f"{fixture}-{profile}"
    if not out.exists():
        words = cases.CONVERSIONS[profile]
        rewrite.convert(source, out, profile=words[1], selection="all" if "all" in words else "qkvz")
    return out


def run(spec: str, jobs: list[dict[str, str]], home: Path) -> None:
    """Let an engine try the checkpoints of ``jobs``; what it prints goes to a file in ``home``."""
    from engines.envs import environment
    from engines.known import find_engine

    where = environment(find_engine(spec))
    command = [str(where.python), __file__, "--inside", spec.partition("==")[0], json.dumps(jobs)]
    with (home / f"{spec}.log").open("w") as log:
        subprocess.run(command, env=where.variables, stdout=log, stderr=log, check=False)


def main() -> int:
    """Run and compare."""
    from loader_matrix.cases import fixtures

    parser = argparse.ArgumentParser()
    parser.add_argument("--engine", action="append", choices=ENGINES)
    parser.add_argument("--fixture", action="append")
    parser.add_argument("--converted", action="store_true")
    parser.add_argument("--keep", type=Path)
    given = parser.parse_args()
    total: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        home = (given.keep or Path(scratch)).absolute()
        home.mkdir(parents=True, exist_ok=True)
        for spec in given.engine or ENGINES:
            wanted = [
                (home / f"{spec}-{fixture}-{profile}.json", fixture, profile, cell)
                for fixture, profile, cell in checkpoints(
                    spec, given.fixture or list(fixtures()), converted=given.converted
                )
            ]
            jobs = [
                {"checkpoint": str(written(fixture, profile, Path(scratch))), "out": str(out)}
                for out, fixture, profile, _ in wanted
                if not out.exists()
            ]
            run(spec, jobs, home)
            count: Counter[str] = Counter()
            for out, fixture, profile, cell in wanted:
                result = json.loads(out.read_text()) if out.exists() else None
                said = [("no result", "")] if result is None else [*compared(result, cell), judged(result, cell)]
                count.update(word for word, _ in said)
                for word, text in said:
                    if word in WRONG or word.startswith(("not", "agrees in", "raises", "refusal")):
                        print(f"{spec} {fixture} {profile}: {word} {text}", flush=True)
            print(f"{spec}: {len(wanted)} checkpoints {dict(sorted(count.items()))}", flush=True)
            total += count
    print(f"in all: {dict(sorted(total.items()))}")
    return 1 if any(total[word] for word in WRONG) else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        inside(sys.argv[2], json.loads(sys.argv[3]))
    sys.exit(main())
