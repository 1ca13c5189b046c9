"""The driver of `rewrite try`, inside an engine. Run as a module, it answers what it measured of each checkpoint."""

from __future__ import annotations

import importlib.util
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from engines import driver
from engines.driver import Job, Result

_FILE = Path(__file__).resolve().parents[3] / "rewrite" / "trying" / "driver.py"


def _load() -> Any:
    """One file: an engine's Python has no package for it."""
    spec = importlib.util.spec_from_file_location("trying", _FILE)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(_FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["trying"] = module
    spec.loader.exec_module(module)
    return module


trying = _load()
engine = trying.chosen(None)({})


def start() -> str:
    """Import the engine of this Python, and replace what CPUs lack."""
    version: str = engine.start()
    if os.environ.get("LOADER_MATRIX_AMX"):
        _pretend_amx()
    return version


def _pretend_amx() -> None:
    """A CPU with AMX, as far as vLLM's choice of kernels and its repacking of weights go: results don't depend on it.

    The build of vLLM for such CPUs does not run on others. Its repacking is stood in for by another order of the rows.
    """
    import torch

    setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)  # noqa: B010
    trying.module("vllm._custom_ops")._supports_cpu_fp8_w8a16 = True
    with suppress(RuntimeError):  # this CPU has it
        torch.library.define("_C::convert_weight_packed", "(Tensor weight) -> Tensor")
        torch.library.impl("_C::convert_weight_packed", "CPU", lambda weight: weight.flip(0).contiguous())


def load(job: Job) -> Any:
    """The model, by the engine's own loader."""
    return engine.load(job.model, "bfloat16", None, finish=True).model


def measure(job: Job, **asked: Any) -> Result:
    """What the engine made of a checkpoint, as one rank of several; the truth is in ``job.truth``."""
    engine.rank, engine.world = job.rank, job.world
    request = {"checkpoint": str(job.model), "truth": str(job.truth), **asked}
    about = {"engine": engine.name, "replaced": engine.replaced, "stopped": None, "gpu": False}
    result: Result = trying.measure(engine, request, lambda *_: None)
    return result | about


def run(measured: Any) -> None:
    """Answer ``measured`` of every job."""
    driver.run((engine.package,), start, lambda job: job, lambda _, job: measured(job))


if __name__ == "__main__":
    run(measure)
