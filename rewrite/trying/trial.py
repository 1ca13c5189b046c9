"""A checkpoint, or one before and after its repair, in an engine: what was asked, what came back, what it means."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rewrite.api import inspect_checkpoint, open_checkpoint, verify
from rewrite.errors import RewriteError, UsageError
from rewrite.inspection.advice import advise, repair_command
from rewrite.inspection.inspection import Inspection
from rewrite.loaders.versions import LOADERS, find_loaders
from rewrite.trying import engine, verdict
from rewrite.trying.selection import Layers, select
from rewrite.trying.verdict import AFFECTED, NO_KERNEL, ORDER, LayerVerdict, Verdict
from rewrite.verification.result import Verification

_KEPT = ("engine", "version", "torch", "python", "device", "replaced", "seconds", "peak_bytes", "operators")


@dataclass(frozen=True)
class Question:
    """How the engine is started, and what it is asked. ``python`` and ``command`` are two ways to start it."""

    python: str | None = None
    command: str | None = None
    using: str | None = None
    layers: str = "auto"
    ranks: int = 1
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Trial:
    """One checkpoint in one engine, on one rank. ``layers``: None for all."""

    checkpoint: str
    rank: int
    layers: Layers | None
    result: Mapping[str, Any]
    verdict: Verdict

    @property
    def engine(self) -> str:
        return f"{self.result['engine']} {self.result['version']}"

    def to_json(self) -> dict[str, Any]:
        """Without weights, and without paths of this machine."""
        failure = self.verdict.failure
        return {
            "checkpoint": Path(self.checkpoint).resolve().name, "rank": self.rank,
            "layers": None if self.layers is None else list(self.layers.chosen),
            **{name: self.result[name] for name in _KEPT},
            "verdict": self.verdict.kind, "not_known": list(self.verdict.unlearnt),
            "failure": None if failure is None else dict(failure),
            "modules": [{**asdict(each), "error": _number(each.error)} for each in self.verdict.layers],
            "measured": self.result["layers"],
        }  # fmt: skip


@dataclass(frozen=True)
class Tried:
    """Trials of a checkpoint on each rank, and with OUT the same of OUT. ``predicted`` is what `inspect` says of this
    engine, ``command`` the conversion that helps; None where nothing is known. ``same``: whether OUT has the weights
    of the checkpoint."""

    before: tuple[Trial, ...]
    after: tuple[Trial, ...] = ()
    predicted: str | None = None
    command: str | None = None
    same: bool | None = None
    differs: tuple[str, ...] = ()  # where OUT has other weights

    @property
    def agrees(self) -> bool | None:
        """Whether `inspect` predicted it; None where it predicts nothing."""
        if self.predicted in (None, "not known") or worst(self.before) not in AFFECTED | {"exact", "rounded"}:
            return None
        return (self.predicted != "exact") == (worst(self.before) in AFFECTED)

    @property
    def exit_code(self) -> int:
        """That of OUT, where there is one."""
        if self.same is False:
            return 1
        codes = {each.verdict.exit_code for each in self.after or self.before}
        return 1 if 1 in codes else max(codes)

    def to_json(self) -> dict[str, Any]:
        return {
            "trials": [each.to_json() for each in (*self.before, *self.after)],
            "inspect": None if self.predicted is None else {"predicted": self.predicted, "agrees": self.agrees},
            "out_means_the_same": self.same, "differs": list(self.differs), "command": self.command,
        }  # fmt: skip


def worst(trials: Sequence[Trial]) -> str:
    return min((each.verdict.kind for each in trials), key=ORDER.index)


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
    known = [] if inspection is None else [row.as_is.kind for row in inspection.rows if row.loader in rows]
    return known[0] if known else None


def _command(inspection: Inspection | None, trials: Sequence[Trial]) -> str | None:
    """Nothing where this engine is not affected, or where all that is wrong is that a kernel is missing."""
    kind = worst(trials)
    if inspection is None or kind not in AFFECTED or kind == NO_KERNEL:
        return None
    return repair_command(inspection, advise(inspection, find_loaders(_name(trials[0])) or LOADERS))


def _name(trial: Trial) -> str:
    return f"{trial.result['engine'].lower()}@{trial.result['version'].partition('+')[0]}"


def by_kind(trials: Sequence[Trial]) -> dict[str, list[LayerVerdict]]:
    """Layers of all ranks whose names differ in numbers only."""
    found: dict[str, list[LayerVerdict]] = {}
    for layer in (layer for trial in trials for layer in trial.verdict.layers):
        name = re.sub(r"^.*?\b(?:layers|h|blocks)\.\d+\.", "", layer.module)
        suffix = "" if layer.parameter == "weight" else f".{layer.parameter.removesuffix('_weight')}"
        found.setdefault(f"{re.sub(r'[0-9]+', 'N', name)}{suffix}", []).append(layer)
    return found


def worst_of(layers: Sequence[LayerVerdict]) -> LayerVerdict:
    return min(layers, key=lambda each: (ORDER.index(each.kind), -(each.error or 0.0)))


def _number(value: float | None) -> float | str | None:
    """JSON has no NaN and no infinity: these become words."""
    return value if value is None or value - value == 0 else str(value)
