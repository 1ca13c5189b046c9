"""Whether `rewrite try` agrees with the record of the loader matrix, partition by partition.

    PYTHONPATH=scripts:. python scripts/evidence/try_agreement.py [--engine NAME==VERSION] [--fixture NAME] [--keep DIR]

Runs the driver of `try` in the environments of the loader matrix, one process an engine, which forks a child for each
fixture. The record (tests/loader_matrix.json) was made by other code, with an independent reading of the files. Exits
with 1 where they differ, or where a fixture gives nothing.
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
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DRIVER = ROOT / "rewrite" / "trying" / "driver.py"
ENGINES = ("vllm==0.32.0", "vllm==0.19.1", "sglang==0.5.23", "transformers==5.24.0")


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
    for job in jobs:
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            continue
        try:
            result = driver.measure(engine, job, lambda *_: None) | {"version": version, "replaced": engine.replaced}
            Path(job["out"]).write_text(json.dumps(result))
        finally:
            sys.stderr.flush()
            os._exit(0)
    os._exit(0)


def canonical(name: str) -> str:
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


def judge(result: dict[str, Any] | None, cell: dict[str, Any]) -> tuple[Counter[str], list[str]]:
    """How many modules agree, and what does not."""
    count: Counter[str] = Counter()
    if result is None:
        return Counter(["no result"]), ["no result"]
    failure = result["failure"]
    if cell["outcome"] == "raises" or failure:
        agrees = cell["outcome"] == "raises" and bool(failure)
        count["raises" if agrees else "differs"] += 1
        said = (failure or {}).get("loading") or (failure or {}).get("reference") or {}
        return count, [] if agrees else [
            f"record {cell['outcome']}, try {said.get('type')}: {said.get('message', '')[:150]}"
        ]
    rows = {canonical(row["module"]): row for row in result["layers"] if row["parameter"] == "weight"}
    found = []
    for group in cell["groups"]:
        row, recorded = rows.get(canonical(group["module"])), [float(each) for each in group["errors"].values()]
        if row is None or not row["parts"]:
            count["not compared"] += 1
            found.append(f"{group['module']}: {row['held'] if row else 'no such module'}")
            continue
        seen = errors(row)
        if len(seen) != len(recorded):  # several partitions were written, or measured, as one: the worst counts
            seen, recorded = [max(seen)], [max(recorded)]
        agrees = all(map(close, seen, recorded))
        count["agrees" if agrees else "differs"] += 1
        if not agrees:
            found.append(f"{group['module']}: record {recorded}, try {seen}")
    other, differing = _others(result, cell)
    return count + other, found + differing


def _others(result: dict[str, Any], cell: dict[str, Any]) -> tuple[Counter[str], list[str]]:
    """The same of all other kinds of linear: the worst of each."""
    count: Counter[str] = Counter()
    found = []
    worst: dict[str, float] = {}
    for row in result["layers"]:
        name = canonical(row["module"])
        kind = name.rpartition(".")[2]
        if ".experts" in name:
            kind = f"experts.{row['parameter'].removesuffix('_weight')}"
        for error in errors(row):
            worst[kind] = error if math.isnan(error) else max(worst.get(kind, 0.0), error)
    for kind, other in cell["others"].items():
        if kind in worst:
            agrees = close(worst[kind], float(other["error"]))
            count["agrees" if agrees else "differs"] += 1
            if not agrees:
                found.append(f"{kind}: record {other['error']}, try {worst[kind]}")
        else:
            count["not compared"] += 1
            found.append(f"{kind}: not compared")
    return count, found


def main() -> int:
    """Run and compare."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine", action="append", choices=ENGINES)
    parser.add_argument("--fixture", action="append")
    parser.add_argument("--keep", type=Path, help="a folder for the results")
    given = parser.parse_args()
    from engines.envs import environment
    from engines.known import find_engine
    from loader_matrix.cases import fixtures, folder

    cells = json.loads((ROOT / "tests" / "loader_matrix.json").read_text())["cells"]
    names = ("engine", "version", "fixture", "profile", "ranks")
    recorded = {tuple(cell[key] for key in names): cell for cell in cells}
    total: Counter[str] = Counter()
    for spec in given.engine or ENGINES:
        name, _, version = spec.partition("==")
        where = environment(find_engine(spec))
        with tempfile.TemporaryDirectory() as scratch:
            home = given.keep or Path(scratch)
            home.mkdir(parents=True, exist_ok=True)
            outs = {each: home / f"{spec}-{each}.json" for each in given.fixture or fixtures()}
            jobs = [{"checkpoint": str(folder(each)), "out": str(out)} for each, out in outs.items()]
            command = [str(where.python), __file__, "--inside", name, json.dumps(jobs)]
            with (home / f"{spec}.log").open("w") as log:
                subprocess.run(command, env=where.variables, stdout=log, stderr=log, check=False)
            for each, out in outs.items():
                cell = recorded.get((name, version, each, "original", 1))
                if cell is None:
                    continue
                count, found = judge(json.loads(out.read_text()) if out.exists() else None, cell)
                total += count
                print(f"{spec:21} {each:32} {dict(count)}", flush=True)
                for line in found:
                    print(f"    {line}")
    print(f"in all: {dict(total)}")
    return 1 if total["differs"] or total["no result"] else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        inside(sys.argv[2], json.loads(sys.argv[3]))
    sys.exit(main())
