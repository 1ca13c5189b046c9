"""A checkpoint, or one before and after its repair, is tried in an engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewrite.api import inspect_checkpoint, open_checkpoint, verify
from rewrite.errors import RewriteError, UsageError
from rewrite.inspection.advice import advise, repair_command
from rewrite.inspection.inspection import Inspection
from rewrite.loaders.versions import LOADERS, find_loaders
from rewrite.trying import engine, verdict
from rewrite.trying.selection import Layers, select
from rewrite.trying.tried import Trial, Tried, lacking, worst
from rewrite.trying.verdict import AFFECTED, NO_KERNEL
from rewrite.verification.result import Verification


@dataclass(frozen=True)
class Question:
    """How the engine is started, and what it is asked. ``python`` and ``command`` are two ways to start it."""

    python: str | None = None
    command: str | None = None
    using: str | None = None
    layers: str = "auto"
    ranks: int = 1
    trust_remote_code: bool = False


def try_checkpoint(
    source: str,
    question: Question,
    against: str | None = None,
    verified: Verification | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Tried:
    """Let an engine load ``source``, and ``against``, which is ``source`` repaired; ``verified``: that it is.

    Raises :class:`~rewrite.trying.engine.EngineError` where nothing was learnt.
    """
    for each in filter(None, (source, against)):
        if not Path(each).is_dir():
            raise UsageError("An engine is tried with a directory", found=each, hint="download the model first")
    before = _ranks(source, question, progress)
    after = () if against is None else _ranks(against, question, progress)
    inspection = _inspection(source)
    predicted, command = _predicted(inspection, before[0]), _command(inspection, before)
    if against is None:
        return Tried(before, after, predicted, command)
    found = verified or verify(source, against, weights_only=True)
    problems = tuple(problem for check in found.checks for problem in check.problems)
    return Tried(before, after, predicted, command, found.ok, problems)


def _ranks(source: str, question: Question, progress: Callable[[str], None]) -> tuple[Trial, ...]:
    layers = select(open_checkpoint(source), question.layers)
    return tuple(_try(source, question, rank, layers, progress) for rank in range(question.ranks))


def _try(source: str, question: Question, rank: int, layers: Layers | None, progress: Callable[[str], None]) -> Trial:
    folder = Path(source).resolve()
    request: dict[str, Any] = {
        "checkpoint": str(folder), "using": question.using, "rank": rank, "world": question.ranks,
        "trust_remote_code": question.trust_remote_code,
    }  # fmt: skip
    if layers is not None:
        request |= {"stack": layers.stack, "runs": layers.runs}
    result = engine.ask(engine.command_of(question.python, question.command, folder), request, progress)
    judged = verdict.judge(result)
    return Trial(source, rank, None if result["whole"] else layers, result, judged)


def _inspection(source: str) -> Inspection | None:
    """What `inspect` makes of it, loading only; None where it refuses the checkpoint."""
    try:
        return inspect_checkpoint(source, selection="all", platform=None)
    except RewriteError:
        return None


def _predicted(inspection: Inspection | None, trial: Trial) -> str | None:
    rows = find_loaders(_name(trial))
    known = [] if inspection is None else [row.as_is.kind for row in inspection.rows if row.engine in rows]
    return known[0] if known else None


def _command(inspection: Inspection | None, trials: Sequence[Trial]) -> str | None:
    """Nothing where this engine is not affected, where only a kernel is missing, or where the files lack what it
    wants."""
    kind = worst(trials)
    if inspection is None or kind not in AFFECTED or kind == NO_KERNEL or lacking(trials):
        return None
    return repair_command(inspection, advise(inspection, find_loaders(_name(trials[0])) or LOADERS))


def _name(trial: Trial) -> str:
    return f"{trial.result['engine'].lower()}@{trial.result['version'].partition('+')[0]}"
