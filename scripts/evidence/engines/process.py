"""An engine's process: it is imported once, and loads one batch of checkpoints after another."""

from __future__ import annotations

import json
import select
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engines.driver import LIMIT, Batch, Results, Task, Unavailable
from engines.envs import HOME, Environment
from engines.known import Engine

LOGS = HOME / "logs"


@dataclass(frozen=True)
class Checkpoint:
    """What is loaded, and the checkpoint that holds the truth."""

    label: str
    model: Path
    truth: Path
    ranks: int = 1


class Process:
    """``driver``: the module that runs inside. One that ended is started again for the next batch."""

    def __init__(self, engine: Engine, where: Environment, driver: str, *, quiet: bool = False) -> None:
        self._engine, self._where, self._driver, self._quiet = engine, where, driver, quiet
        self._name = f"{driver.rpartition('.')[2]}-{engine.slug}"
        self._process: subprocess.Popen[str] | None = None
        self._batches = 0

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
        batch = folder / f"{self._name}-{self._batches}.json"
        Batch(self._engine.version, str(LOGS / f"{self._name}.log"), tuple(tasks)).write(batch)
        self._run(batch, LIMIT * (len(tasks) + 1))
        return [_results(task) for task in tasks]

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.communicate()
            self._process = None

    def _run(self, batch: Path, limit: float) -> None:
        """Checkpoints without a result say so, whatever became of the process."""
        if self._process is None or self._process.poll() is not None:
            self._process = self._where.start(self._driver, stderr=subprocess.DEVNULL if self._quiet else None)
        ends = self._process.stdin, self._process.stdout
        if ends[0] is None or ends[1] is None:
            raise RuntimeError("the process has no pipes")
        try:
            ends[0].write(f"{batch}\n")
            ends[0].flush()
        except BrokenPipeError:
            self._process = None
            return
        if select.select([ends[1]], [], [], limit)[0]:
            ends[1].readline()  # empty, if the process ended
        else:
            self._process.kill()


def _results(task: Task) -> Results:
    outs = [task.out(rank) for rank in range(task.ranks)]
    if not all(out.exists() for out in outs):
        return Unavailable(f"the process ended without a result; see {HOME.name}/logs/{Path(task.log).name}")
    return [dict(json.loads(out.read_text())) for out in outs]
