"""What the drivers share: how a batch of cells is run, and how one cell's outcome is written down.

A driver runs inside an engine's environment. It imports the engine once, which takes longer than most loads, and then
forks a process for each cell (or one for each of its ranks): the child loads the checkpoint, measures and ends, so that
no load sees what another left behind. Nothing that a fork breaks (threads, process groups) exists before it.

Two things make a load cheap. What a child had to import, the parent imports too, for the children after it. And objects
that exist before the fork are frozen: engines collect garbage while they load, which would visit all of them (3 s with
vLLM 0.32, whose loads take 0.3 s without).

A child writes a JSON object: `fault` when the engine did not start or the measuring failed, so that nothing was learnt
about the checkpoint; `error` when the engine's loader raised; else the measurements of `served.measure`. A child that
dies or takes too long writes nothing.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

Result = dict[str, Any]


class Unavailable(Exception):
    """There are no results; says why: an environment or a checkpoint can't be made, or a process ended."""


Results = list[Result] | Unavailable  # one for each rank
T = TypeVar("T")
LIMIT = 900  # seconds for one cell; the slowest takes about 60 on two cores


@dataclass(frozen=True)
class Task:
    """One cell of a batch: the checkpoint to load, the one that holds the truth, and where the results go."""

    label: str
    model: str
    truth: str
    folder: str  # of the results, RANK.json each; its name is unique on this machine
    log: str
    ranks: int

    def out(self, rank: int) -> Path:
        """The file of one rank's result."""
        return Path(self.folder) / f"{rank}.json"

    def done(self) -> bool:
        """Whether every rank has a result."""
        return all(self.out(rank).exists() for rank in range(self.ranks))

    def imported(self) -> Path:
        """Names of the modules that loading the first rank imported."""
        return Path(self.folder) / "imported"


@dataclass(frozen=True)
class Batch:
    """The cells of one engine; `log` takes what it prints while it is imported."""

    version: str
    log: str
    tasks: tuple[Task, ...]

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Batch:
        """From JSON."""
        data = json.loads(path.read_text())
        return cls(data["version"], data["log"], tuple(Task(**task) for task in data["tasks"]))


@dataclass(frozen=True)
class Job:
    """What one process loads and measures: a cell, or one rank of it."""

    model: Path
    truth: Path
    rank: int
    world: int


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


def first_line(message: str) -> str:
    """Of what an exception says, without this machine's paths. Pydantic's only counts the faults; the next ones say
    what they are."""
    lines = [line.strip() for line in message.splitlines() if line.strip()] or [""]
    said = " ".join(lines[1:]) if re.match(r"\d+ validation error", lines[0]) else lines[0]
    return re.sub(r"(/[\w.+-]+){2,}/", "", said)[:240]


def described(error: BaseException, packages: tuple[str, ...]) -> dict[str, str]:
    """Type, message and place of an exception."""
    return {"type": type(error).__name__, "message": first_line(str(error)), "where": where(error, packages)}


def attempt(
    this: Job, packages: tuple[str, ...], load: Callable[[Job], T], measure: Callable[[T, Job], Result]
) -> Result:
    """The outcome of one job.

    Broad excepts, because whatever an engine raises is the result that this program is there to record.
    """
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


def run(
    packages: tuple[str, ...],
    start: Callable[[], str] | None,
    load: Callable[[Job], T],
    measure: Callable[[T, Job], Result],
) -> None:
    """Start the engine (`start` returns its version), `load` and `measure` every cell of each batch, end the process.

    Without `start` each child starts the engine anew, and nothing that it imports is shared with the next one. Files of
    batches are read from standard input, one a line, and named on standard output once they are done.
    """
    progress, answers = os.dup(sys.stderr.fileno()), os.dup(sys.stdout.fileno())
    work = partial(attempt, packages=packages, load=load, measure=measure)
    fault: Result | None = None
    for number, line in enumerate(iter(sys.stdin.readline, "")):
        batch_file = line.strip()
        batch = Batch.read(Path(batch_file))
        _print_to(batch.log)
        if number == 0 and start is not None:
            fault = _started(batch.version, packages, start)
        for task in batch.tasks:
            os.write(progress, f"{packages[0]} {batch.version}: {task.label}\n".encode())
            _done(task, fault, work)
            if start is not None:
                _import_what_children_did(task)
        os.write(answers, f"{batch_file}\n".encode())
    _end()


def _done(task: Task, fault: Result | None, work: Callable[[Job], Result]) -> None:
    """Run one cell; where the engine did not start, say why."""
    if fault is None:
        gc.freeze()
        _forked(task, work)
        return
    for rank in range(task.ranks):
        task.out(rank).write_text(json.dumps(fault))


def _import_what_children_did(task: Task) -> None:
    """Whatever cannot be imported here, each child tries again, as it did before."""
    found = task.imported()
    for name in found.read_text().split() if found.exists() else ():
        with suppress(Exception):
            importlib.import_module(name)


def _started(version: str, packages: tuple[str, ...], start: Callable[[], str]) -> Result | None:
    """None, or why the engine did not start."""
    try:
        found = start()
        if found.split("+")[0] != version:
            raise RuntimeError(f"version {found} is installed, {version} was asked for")
    except Exception as error:
        traceback.print_exc()
        return {"fault": described(error, packages)}
    return None


def _forked(task: Task, work: Callable[[Job], Result]) -> None:
    """Run the ranks of a cell side by side, each in a process of its own; end those that take too long."""
    children = [_child(task, rank, work) for rank in range(task.ranks)]
    deadline = time.monotonic() + LIMIT
    try:
        for child in children:
            while os.waitpid(child, os.WNOHANG) == (0, 0) and time.monotonic() < deadline:
                time.sleep(0.02)
    finally:  # an interrupt ends them too; and whatever an engine started and left behind
        for child in children:
            with suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)


def _child(task: Task, rank: int, work: Callable[[Job], Result]) -> int:
    """The process id of a child that does one rank's work. It never returns into the loop over the batch."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        with suppress(OSError):  # done already, if the child came first
            os.setpgid(child, child)
        return child
    try:
        os.setpgid(0, 0)  # a group, so that processes which the engine starts end with it
        _print_to(task.log)
        before = set(sys.modules)
        found = work(Job(Path(task.model), Path(task.truth), rank, task.ranks))
        task.out(rank).write_text(json.dumps(found))
        if rank == 0 and (new := set(sys.modules) - before):
            task.imported().write_text("\n".join(name for name in sys.modules if name in new))
    except BaseException:
        traceback.print_exc()
    finally:
        _end()
    return 0


def _print_to(log: str) -> None:
    """From here on standard output and error are appended to a file, those of C code and of children too."""
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(target, stream.fileno())
    os.close(target)


def _end() -> None:
    """End at once: engines leave threads and process groups behind that can hang an orderly exit."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
