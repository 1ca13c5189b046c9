"""What came back of an engine, and what it means: nothing here starts one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rewrite.trying.selection import Layers
from rewrite.trying.verdict import ORDER, LayerVerdict, Verdict

_KEPT = ("engine", "version", "torch", "python", "device", "replaced", "words", "seconds", "peak_bytes", "operators")


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
            "never_filled": list(self.verdict.empty), "kv_cache": list(self.verdict.cache),
            "failure": None if failure is None else dict(failure),
            "modules": [{**asdict(each), "error": _number(each.error)} for each in self.verdict.layers],
            "measured": self.result["layers"],
        }  # fmt: skip


#: What `inspect` calls it, for what a trial can see.
_PREDICTED = {
    "exact": ("exact",),
    "rounded": ("exact",),
    "loses precision": ("loses precision",),
    "garbled": ("garbled",),
    "never filled": ("garbled",),
    "fails to load": ("fails to load",),
}


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
        seen = worst(self.before)
        if self.predicted in (None, "not known") or seen not in _PREDICTED:
            return None
        return self.predicted in (("garbled", "fails to load") if lacking(self.before) else _PREDICTED[seen])

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


def lacking(trials: Sequence[Trial]) -> bool:
    """Whether the files have nothing for a parameter of the engine."""
    return any(trial.verdict.empty for trial in trials)


def worst(trials: Sequence[Trial]) -> str:
    return min((each.verdict.kind for each in trials), key=ORDER.index)


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
