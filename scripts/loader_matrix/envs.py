"""One isolated environment for each engine version, under .cache/loaders: pinned, wheels only, cached.

The engines share one base (torch and what they all import) to save gigabytes; an engine's own packages lie in a folder
of their own that comes first on PYTHONPATH, so that no engine sees another's.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from loader_matrix.cases import REPOSITORY, Engine

HOME = REPOSITORY / ".cache" / "loaders"
CONSTRAINTS = REPOSITORY / "scripts" / "constraints-loaders"
SCRIPTS = REPOSITORY / "scripts"
PIP = ("-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--no-deps", "--only-binary", ":all:")


class Unavailable(Exception):
    """The environment can't be made; says why."""


@dataclass(frozen=True)
class Environment:
    """A Python and the variables that make it see one engine and nothing else."""

    python: Path
    variables: dict[str, str]


def _stamp(requirements: Path) -> str:
    seed = requirements.read_bytes() + platform.python_version().encode()
    return hashlib.sha256(seed).hexdigest()


def _ready(folder: Path, requirements: Path) -> bool:
    stamp = folder / ".stamp"
    return stamp.exists() and stamp.read_text() == _stamp(requirements)


def _checked(command: list[str], purpose: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise Unavailable(f"{purpose}: {lines[-1].strip()[:200]}")
    return done.stdout


def _base() -> Path:
    """The shared base's Python, made if its pins have changed."""
    folder, requirements = HOME / "base", CONSTRAINTS / "base.txt"
    python = folder / "bin" / "python"
    if _ready(folder, requirements):
        return python
    print("loader matrix: building the shared environment (once)", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    _checked([sys.executable, "-m", "venv", str(folder)], "python -m venv")
    _checked([str(python), *PIP, "-r", str(requirements)], "installing base.txt")
    # A CUDA build needs GPU libraries that are not installed here, and fails to import without them.
    _checked([str(python), "-c", "import torch; assert torch.version.cuda is None"], "torch has to be a CPU build")
    (folder / ".stamp").write_text(_stamp(requirements))
    return python


def _overlay(engine: Engine, python: Path) -> Path:
    """The folder with the engine's own packages, made if its pins have changed."""
    folder, requirements = HOME / engine.slug, CONSTRAINTS / f"{engine.slug}.txt"
    if _ready(folder, requirements):
        return folder
    print(f"loader matrix: installing {engine.spec} (once)", file=sys.stderr)
    partial = folder.with_suffix(".partial")
    for stale in (folder, partial):
        shutil.rmtree(stale, ignore_errors=True)
    _checked([str(python), *PIP, "--target", str(partial), "-r", str(requirements)], f"installing {engine.spec}")
    (partial / ".stamp").write_text(_stamp(requirements))
    partial.rename(folder)
    return folder


def environment(engine: Engine) -> Environment:
    """The environment of `engine`, ready to run; Unavailable where it can't be installed."""
    HOME.mkdir(parents=True, exist_ok=True)
    python = _base()
    overlay = _overlay(engine, python)
    path = (SCRIPTS, SCRIPTS / "loader_matrix" / "site", overlay)
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
    return Environment(
        python,
        kept
        | {
            # Caches of engines and of transformers end up in here. Two versions of vLLM overwrite each other's.
            "HOME": str(HOME / "home" / engine.slug),
            "PYTHONPATH": os.pathsep.join(str(each) for each in path),
            "PYTHONNOUSERSITE": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # generation: one process, so that the replaced kernel is seen
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
            "GLOO_SOCKET_IFNAME": "lo",
        },
    )
