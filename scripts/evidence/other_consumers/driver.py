"""What the drivers share. A driver runs inside a consumer's environment."""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from engines import driver
from engines.driver import Job, Result, described

from other_consumers.reference import write_reference

Arrays = dict[str, "np.ndarray[Any, np.dtype[np.float32]]"]


def compared(found: Arrays, wanted: Arrays) -> Result:
    """The worst relative error (Frobenius norms) of any tensor, and the names that only one of both has."""
    errors = {name: _error(found[name], wanted[name]) for name in found.keys() & wanted.keys()}
    worst = max(errors, key=lambda name: (np.isnan(errors[name]), errors[name]))
    unmatched = sorted(found.keys() ^ wanted.keys())
    return {
        "outcome": "other tensors" if unmatched else "reads",
        "worst": None if unmatched else float(errors[worst]),
        "tensor": worst if errors[worst] and not unmatched else None,
        "compared": len(errors),
        "unmatched": unmatched[:3],
    }


def _error(found: Any, wanted: Any) -> float:
    if found.shape != wanted.shape:
        raise ValueError(f"shapes {found.shape} and {wanted.shape}")
    size = np.linalg.norm(wanted)
    return float(np.linalg.norm(found.astype(np.float64) - wanted) / (size or 1.0))


def judge(
    read: Callable[[Path], Arrays], truth: Path, checkpoint: Path, packages: tuple[str, ...], folder: Path
) -> Result:
    """What the consumer makes of one checkpoint. Broad excepts: whatever it raises is the result."""
    reference = folder / "reference"
    write_reference(truth, checkpoint, reference)
    try:
        wanted = read(reference)
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        return {"outcome": "unknown model", "error": described(error, packages)}
    try:
        found = read(checkpoint)
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        return {"outcome": "raises", "error": described(error, packages)}
    return compared(found, wanted)


def run(read: Callable[[Path], Arrays], packages: tuple[str, ...]) -> None:
    """Judge every checkpoint."""

    def measure(_: None, job: Job) -> Result:
        with tempfile.TemporaryDirectory() as folder:
            return judge(read, job.truth, job.model, packages, Path(folder))

    driver.run(packages, None, lambda _: None, measure)
