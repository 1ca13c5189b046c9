"""One isolated environment for each engine version, under .cache/loaders: pinned, wheels only, cached.

The engines share one base (torch and what they all import) to save gigabytes; an engine's own packages lie in a folder
of their own that comes first on PYTHONPATH, so that no engine sees another's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from environments import Failed, exact, overlay, read_pins, source

from engines.driver import Unavailable
from engines.known import Engine, find_engine

HERE = Path(__file__).resolve().parent
SCRIPTS = HERE.parents[1]
HOME = SCRIPTS.parent / ".cache" / "loaders"
BASE = HERE / "base.txt"
# A CUDA build needs GPU libraries that are not installed here, and fails to import without them.
IS_CPU_BUILD = ("-c", "import torch; assert torch.version.cuda is None, 'torch has to be a CPU build'")
_ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True)
class Environment:
    """A Python and the variables that make it see one engine and nothing else."""

    python: Path
    variables: dict[str, str]

    def run(self, module: str, *words: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a module in it, to its end."""
        return subprocess.run(self._command(module, *words), env=self.variables, text=True, **options)  # noqa: PLW1510

    def start(self, module: str, **options: Any) -> subprocess.Popen[str]:
        """Start a module in it that is talked to through pipes."""
        pipe = subprocess.PIPE
        return subprocess.Popen(
            self._command(module), env=self.variables, stdin=pipe, stdout=pipe, text=True, **options
        )

    def _command(self, module: str, *words: str | Path) -> list[str]:
        return [str(self.python), "-m", module, *map(str, words)]


def environment(engine: Engine) -> Environment:
    """The environment of `engine`, ready to run; Unavailable where it can't be installed."""
    with _ONE_AT_A_TIME:
        made = _made(engine)
    if isinstance(made, Unavailable):
        raise made
    return made


@cache
def _made(engine: Engine) -> Environment | Unavailable:
    HOME.mkdir(parents=True, exist_ok=True)
    try:
        python = exact(HOME / "base", read_pins(BASE), IS_CPU_BUILD)
        packages = overlay(HOME / engine.slug, python, engine.pins)
        if engine.compiled:
            donor = find_engine(f"{engine.name}=={engine.compiled}")
            take_compiled(overlay(HOME / donor.slug, python, donor.pins) / donor.name, packages / engine.name)
        sources = (
            {"SOURCE": str(source(HOME / f"{engine.name}-source", python, engine.source))} if engine.source else {}
        )
    except Failed as failure:
        return Unavailable(f"{failure.purpose}: {failure.reason[:200]}")
    path = (SCRIPTS, HERE.parent, HERE / "site", packages)
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR", "LOADER_MATRIX_AMX") if name in os.environ}
    return Environment(
        python,
        kept
        | sources
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
            "VLLM_CONFIGURE_LOGGING": "0",  # it walks all loggers of all packages in every load (0.2 s)
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # generation: one process, so that the replaced kernel is seen
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
            "GLOO_SOCKET_IFNAME": "lo",
        }
        # A build for accelerators finds no platform here, but for this variable.
        | ({"VLLM_TARGET_DEVICE": "cpu"} if engine.compiled else {}),
    )


def take_compiled(donor: Path, package: Path) -> None:
    """Let `package` have the extension modules of `donor`, and none of its own: those are for GPU libraries that are
    not installed here."""
    wanted = {path.relative_to(donor): path for path in donor.rglob("*.so")}
    for own in package.rglob("*.so"):
        if own.relative_to(package) not in wanted:
            own.unlink()
    for name, path in wanted.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, package / name)
