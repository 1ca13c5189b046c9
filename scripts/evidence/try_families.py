"""Whether `rewrite try` judges families right that no table names, as they are and repaired.

    scripts/evidence.sh try_families FOLDER [--engine NAME==VERSION]

FOLDER is what `families` wrote: FP8, a scale for each module. What is right is computed here, from the files alone:
an engine that fuses such modules has one scale, the largest, and rounds all weights of the others to it. Repaired by
`--profile portable`: a scale for each row, which fused layers keep.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from try_agreement import run

import rewrite
from rewrite.errors import RewriteError
from rewrite.trying import verdict

ENGINES = ("vllm==0.32.0", "sglang==0.5.23")
PARTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))


def expected(folder: Path) -> dict[str, float]:
    """For each module of a fused layer: how far off it is once rounded to the largest scale of the layer."""
    tensors = load_file(folder / "model.safetensors")
    found: dict[str, float] = {}
    for parts in PARTS:
        for name in [name for name in tensors if name.endswith(f".{parts[0]}.weight_scale")]:
            stem = name.removesuffix(f"{parts[0]}.weight_scale")
            if tensors[f"{stem}{parts[0]}.weight"].dtype == torch.float8_e4m3fn and tensors[name].numel() == 1:
                scales = {part: tensors[f"{stem}{part}.weight_scale"].float() for part in parts}
                largest = max(scales.values())
                for part in parts:
                    weight = tensors[f"{stem}{part}.weight"].float() * scales[part]
                    rounded = (weight / largest).clamp(-448, 448).to(torch.float8_e4m3fn).float() * largest
                    found[f"{stem}{part}"] = float((rounded - weight).norm() / weight.norm())
    return found


def compared(result: dict[str, Any], truth: dict[str, float]) -> Iterator[tuple[str, bool]]:
    """Each part that the driver measured. Of experts it tells the worst of each kind."""
    for row in result["layers"]:
        for part in row["parts"] if row["judged"] else ():
            name = part["tensor"].removesuffix(".weight")
            of_kind = [error for key, error in truth.items() if _alike(key, name)] if ".experts." in name else []
            wanted = max(of_kind, default=truth.get(name, 0.0))
            yield name, abs(float(part["error"]) - wanted) <= 0.02 * wanted + 1e-6


def _alike(one: str, other: str) -> bool:
    return one == other or re.sub(r"experts\.\d+", "", one) == re.sub(r"experts\.\d+", "", other)


def main() -> int:
    """Run and judge; 1 where anything is judged wrong."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--engine", action="append")
    given = parser.parse_args()
    sources = sorted(path.parent for path in given.folder.glob("*/config.json"))
    wrong = 0
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        for source in sources:
            rewrite.convert(source, home / source.name, profile="portable")
        for spec in given.engine or ENGINES:
            cases = [(source.name, kind, folder) for source in sources
                     for kind, folder in (("original", source), ("repaired", home / source.name))]  # fmt: skip
            outs = [home / f"{spec}-{name}-{kind}.json" for name, kind, _ in cases]
            jobs = [
                {"checkpoint": str(case[2].resolve()), "out": str(out)} for case, out in zip(cases, outs, strict=True)
            ]
            run(spec, jobs, home)
            for (name, kind, folder), out in zip(cases, outs, strict=True):
                ok, said = _judged(out, kind, folder)
                wrong += not ok
                print(f"{spec} {name} {kind}: {'right' if ok else 'WRONG'}: {said}", flush=True)
    return 1 if wrong else 0


def _judged(out: Path, kind: str, folder: Path) -> tuple[bool, str]:
    if not out.exists():
        return False, "no result"
    result = json.loads(out.read_text())
    try:
        found = verdict.judge(result)
    except RewriteError as error:
        return False, str(error)
    if found.failure is not None:
        return False, f"{found.kind}: {found.failure['type']}: {found.failure['message'][:200]}"
    parts = list(compared(result, expected(folder)))
    off = [name for name, right in parts if not right]
    wanted = verdict.LESS if kind == "original" else verdict.EXACT
    said = f"{found.kind}, {len(parts) - len(off)} of {len(parts)} parts as computed"
    return found.kind == wanted and bool(parts) and not off, f"{said} {off[:3] or ''}"


if __name__ == "__main__":
    sys.exit(main())
