"""Engines that stay: each is imported once, and loads one batch of checkpoints after another."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

from loader_matrix.driver import Batch, Task
from loader_matrix.engines import find_engine
from loader_matrix.envs import HOME, environment
from loader_matrix.results import Cell, cell

LOGS = HOME / "logs"


class Standing:
    """One engine's process. A process that ended is started again for the next batch."""

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self._engine = find_engine(spec)
        self._environment = environment(self._engine)
        self._process: subprocess.Popen[str] | None = None
        self._batches = 0

    def load(self, checkpoints: Sequence[tuple[str, Path, Path]], folder: Path) -> list[Cell]:
        """Load each (label, checkpoint, the one that holds the truth), in order. ``folder`` takes the results."""
        LOGS.mkdir(parents=True, exist_ok=True)
        self._batches += 1
        tasks = []
        for number, (label, model, truth) in enumerate(checkpoints):
            # its name is that of the ranks' shared memory: unique on this machine
            own = folder / f"{folder.name}-{self._engine.slug}-{self._batches}-{number}"
            own.mkdir()
            log = LOGS / f"search-{self._engine.slug}-{label}.log"
            log.unlink(missing_ok=True)
            tasks.append(Task(label, str(model), str(truth), str(own), str(log), 1))
        batch = folder / f"{self._engine.slug}-{self._batches}.json"
        Batch(self._engine.version, str(LOGS / f"search-{self._engine.slug}.log"), tuple(tasks)).write(batch)
        self._run(batch)
        return [self._cell(task) for task in tasks]

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.communicate()
            self._process = None

    def _run(self, batch: Path) -> None:
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [str(self._environment.python), "-m", f"loader_matrix.drive_{self._engine.name}", "-"],
                env=self._environment.variables,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        ends = self._process.stdin, self._process.stdout
        if ends[0] is None or ends[1] is None:
            raise RuntimeError("the process has no pipes")
        try:
            ends[0].write(f"{batch}\n")
            ends[0].flush()
            ends[1].readline()  # empty, if the process ended: cells without a result say so
        except BrokenPipeError:
            self._process = None

    def _cell(self, task: Task) -> Cell:
        key = (self._engine.name, self._engine.version, task.label, "", 1)
        result = task.out(0)
        if not result.exists():
            return Cell(*key, outcome="not run", reason="the process ended without a result")
        named = dict(zip(("engine", "version", "fixture", "profile", "ranks"), key, strict=True))
        return cell(named, [json.loads(result.read_text())])
