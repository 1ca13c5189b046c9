"""An engine's process: it is imported once, and loads one batch of checkpoints after another."""

from __future__ import annotations

import json
import select
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from engines.driver import LIMIT, Batch, Results, Task, Unavailable
from engines.envs import HOME, Environment, environment
from engines.known import Engine

LOGS = HOME / "logs"


@dataclass(frozen=True)
class Checkpoint:
    """What is loaded, and the checkpoint that holds the truth."""

    label: str
    model: Path
    truth: Path
    ranks: int = 1


def load(engine: Engine, driver: str, checkpoints: Sequence[Checkpoint], *, quiet: bool = False) -> list[Results]:
    """Each checkpoint's results by an engine that is started for them and ended; why there are none, where it can't be
    installed: one engine must not stop the others."""
    try:
        process = Process(engine, environment(engine), driver, quiet=quiet)
    except Unavailable as reason:
        return [reason] * len(checkpoints)
    with tempfile.TemporaryDirectory() as folder, closing(process):
        return process.load(checkpoints, Path(folder)) if checkpoints else []


class Process:
    """``driver``: the module that runs inside.

    A process that ended in a batch (for want of memory, say) is started again, once, for what is left of that batch.
    """

    def __init__(self, engine: Engine, where: Environment, driver: str, *, quiet: bool = False) -> None:
        self._engine, self._where, self._driver, self._quiet = engine, where, driver, quiet
        self._name = f"{driver.rpartition('.')[2]}-{engine.slug}"
        self._process: subprocess.Popen[str] | None = None
        self._batches = 0
        self._ended = ""  # how the last process ended

    def load(self, checkpoints: Sequence[Checkpoint], folder: Path) -> list[Results]:
        """Each checkpoint's results, one for each rank; or why there are none. ``folder`` takes the files."""
        LOGS.mkdir(parents=True, exist_ok=True)
        self._batches += 1
        tasks = []
        for number, each in enumerate(checkpoints):
            # engines name shared memory after this folder: unique on this machine
            own = folder / f"{folder.name}-{self._name}-{self._batches}-{number}"
            own.mkdir()
            log = LOGS / f"{self._name}-{each.label}.log"
            log.unlink(missing_ok=True)
            tasks.append(Task(each.label, str(each.model), str(each.truth), str(own), str(log), each.ranks))
        for again in ("", "-again"):
            left = tuple(task for task in tasks if not task.done())
            batch = folder / f"{self._name}-{self._batches}{again}.json"
            Batch(self._engine.version, str(LOGS / f"{self._name}.log"), left).write(batch)
            if self._run(batch, LIMIT * (len(left) + 1)):
                break
        return [_results(task, self._ended) for task in tasks]

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.communicate()
            self._process = None

    def _run(self, batch: Path, limit: float) -> bool:
        """Whether the process lived through the batch, or was ended here for taking too long."""
        if self._process is None or self._process.poll() is not None:
            self._process = self._where.start(self._driver, stderr=subprocess.DEVNULL if self._quiet else None)
        ends = self._process.stdin, self._process.stdout
        if ends[0] is None or ends[1] is None:
            raise RuntimeError("the process has no pipes")
        with suppress(BrokenPipeError):
            ends[0].write(f"{batch}\n")
            ends[0].flush()
        in_time = bool(select.select([ends[1]], [], [], limit)[0])
        if in_time and ends[1].readline() == f"{batch}\n":
            return True
        if not in_time:
            self._process.kill()
        self._ended = f"the process ended (exit code {self._process.wait()})"
        self._process = None
        return not in_time


def _results(task: Task, ended: str) -> Results:
    if not task.done():
        why = ended or "the process of this checkpoint ended"
        return Unavailable(f"{why} without a result; see {HOME.name}/logs/{Path(task.log).name}")
    return [dict(json.loads(task.out(rank).read_text())) for rank in range(task.ranks)]
