"""What the drivers share: their command line, and how one cell's outcome is written down.

A driver runs inside an engine's environment. It starts the engine, lets it load one checkpoint, measures, and writes a
JSON object: `fault` when the engine did not start or the measuring failed, so that nothing was learnt about the
checkpoint; `error` when the engine's loader raised; else the measurements of `served.measure`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

Result = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """One cell: the checkpoint to load, the one that holds the truth, and this process's place among the ranks."""

    model: Path
    truth: Path
    version: str
    out: Path
    rank: int
    world: int
    rendezvous: str


def job() -> Job:
    """The command line, parsed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--truth", type=Path, required=True)
    parser.add_argument("--version", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--world", type=int, default=1)
    parser.add_argument("--rendezvous", default="tcp://127.0.0.1:29500")
    return Job(**vars(parser.parse_args()))


def where(error: BaseException, packages: tuple[str, ...]) -> str:
    """`file:function` of the innermost frame in the first of `packages` that has one; the engine comes first."""
    frames = traceback.extract_tb(error.__traceback__)
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            continue
        root = Path(spec.origin).parent
        inside = [frame for frame in frames if frame.filename.startswith(f"{root}/")]
        if inside:
            return f"{Path(inside[-1].filename).relative_to(root.parent)}:{inside[-1].name}"
    return "unknown"


def described(error: BaseException, packages: tuple[str, ...]) -> dict[str, str]:
    """Type, first line of the message (without this machine's paths) and place of an exception."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    message = re.sub(r"(/[\w.+-]+){2,}/", "", lines[0])
    return {"type": type(error).__name__, "message": message[:240], "where": where(error, packages)}


def attempt(
    this: Job,
    packages: tuple[str, ...],
    start: Callable[[Job], str],
    load: Callable[[Job], T],
    measure: Callable[[T, Job], Result],
) -> Result:
    """The outcome of one job.

    Broad excepts, because whatever an engine raises is the result that this program is there to record.
    """
    try:
        found = start(this)
        if found.split("+")[0] != this.version:
            raise RuntimeError(f"version {found} is installed, {this.version} was asked for")
    except Exception as error:
        traceback.print_exc()
        return {"fault": described(error, packages)}
    try:
        loaded = load(this)
    except Exception as error:
        traceback.print_exc()
        return {"error": described(error, packages)}
    try:
        return measure(loaded, this)
    except Exception as error:
        traceback.print_exc()
        return {"fault": described(error, ("loader_matrix",))}


def compare(model: torch.nn.Module, this: Job) -> Result:
    """What `model` would serve against the truth."""
    from loader_matrix.served import Rank, measure
    from loader_matrix.truth import Truth

    return measure(model, Truth(this.truth), Rank(this.rank, this.world))


def run(
    packages: tuple[str, ...],
    start: Callable[[Job], str],
    load: Callable[[Job], T],
    measure: Callable[[T, Job], Result],
) -> None:
    """Start the engine (`start` returns its version), `load`, `measure`, write the outcome, end the process."""
    this = job()
    finish(this, attempt(this, packages, start, load, measure))


def finish(this: Job, result: Result) -> None:
    """Write `result` and end: engines leave threads and process groups behind that can hang an orderly exit."""
    this.out.write_text(json.dumps(result))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
