"""What a verification found: one :class:`Check` for each question, with its numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rewrite.loaders.outcome import Row
from rewrite.verification.sample import DEFAULT_ROWS

IN, OUT = "IN", "OUT"
Verdict = Literal["ok", "FAILED", "skipped"]
DEFAULT_TOKENS = 32
#: The summary of the checks that were not made for it.
NOT_OPENED = "OUT cannot be opened"
CARD_REMARK = "; README.md has a card of rewrite, whose text was not checked"  # at the end of a summary
ENGINES = "engines"  # the check of what engines make of OUT; the others are about its bytes
_KEPT = 20  # problems kept of a check: a wrong config makes one for every module


@dataclass(frozen=True)
class Check:
    """One question and its answer. ``problems`` names what is wrong, the first 20 of them; ``left_out`` the part of the
    question that was not asked; ``rounded`` by what share a weight moved at most, where the promise is to round."""

    name: str
    verdict: Verdict
    summary: str
    problems: tuple[str, ...] = ()
    left_out: str = ""
    rounded: float = 0.0


#: Called with the name of a check and None when it begins, and with the check itself when it has its verdict.
OnCheck = Callable[[str, "Check | None"], object]


@dataclass(frozen=True)
class PartitionNumbers:
    """How far a partition is from the truth: norm(found - true) / norm(true), of its weights and of its outputs.

    ``before`` is what the loader before the fix serves from IN, ``fixed`` what the fixed loader serves from IN, ``out``
    what the chosen loader serves from OUT. ``bound_used`` is the largest |fixed - out| over its analytic bound; None
    where the bound is zero because nothing is requantized.
    """

    group: str
    partition: str
    weights_before: float
    weights_fixed: float
    weights_out: float
    outputs_before: float
    outputs_fixed: float
    outputs_out: float
    bound_used: float | None
    verdict: Verdict
    reason: str

    @property
    def layer(self) -> str:
        """``in_proj_qkvz`` of ``model.layers.0.linear_attn.in_proj_qkvz``."""
        return self.group.rpartition(".")[2]


@dataclass(frozen=True)
class Settings:
    """How it was verified. ``rows`` of each partition are multiplied; None: all of them."""

    device: str
    tokens: int
    seed: int
    loader: str
    every_slot: bool = True  # whether the loader of OUT fills every scale slot of a fused layer
    platform: str = "cuda"  # where loaders compute with OUT
    rows: int | None = DEFAULT_ROWS
    quick: bool = False  # only what lies in the fused groups, and of their weights only these rows
    weights_only: bool = False  # nothing was multiplied, and no config was compared


@dataclass(frozen=True)
class EngineChange(Row):
    """What an engine makes of IN and OUT. ``judged``: whether the profile is made for it. ``change``: above 0, OUT is
    served worse than IN. ``does_not_run``: it loads OUT and cannot compute with it on the platform; ``stopped``: and it
    can with IN. ``asked``: it is one that OUT is for."""

    asked: bool = False
    judged: bool = True
    change: int = 0
    does_not_run: bool = False
    stopped: bool = False

    def to_json(self) -> dict[str, Any]:
        before, after = self.outcomes[IN], self.outcomes[OUT]
        kernels = {state: {card: list(names) for card, names in used.items()} for state, used in self.kernels.items()}
        return {
            "engine": self.engine.name,
            "loader": self.engine.name,
            "versions": self.engine.versions,
            "asked": self.asked,
            "judged": self.judged,
            "before": before.kind,
            "after": after.kind,
            "detail": after.detail,
            "change": self.change,
            "partitions": list(after.partitions),
            "does_not_run": self.does_not_run,
            "stopped": self.stopped,
            "kernels_before": kernels.get(IN, {}),
            "kernels_after": kernels.get(OUT, {}),
        }


@dataclass(frozen=True)
class Verification:
    """The report of ``rewrite verify``."""

    source: str
    out: str
    settings: Settings
    checks: tuple[Check, ...]
    numbers: tuple[PartitionNumbers, ...]
    loaders: tuple[EngineChange, ...]  # empty when OUT cannot be opened
    digests: Mapping[str, str] | None = None  # SHA-256 of each file of OUT, of the bytes that were compared

    @property
    def ok(self) -> bool:
        return not self.failed

    @property
    def failed(self) -> tuple[str, ...]:
        """The checks that failed."""
        return tuple(check.name for check in self.checks if check.verdict == "FAILED")

    @property
    def bytes_ok(self) -> bool:
        """Whether OUT is what the conversion promises, whoever serves it."""
        return set(self.failed) <= {ENGINES}

    @property
    def rounded(self) -> float:
        """By what share the conversion moved a weight at most, as was measured."""
        return max((check.rounded for check in self.checks), default=0.0)

    @property
    def not_checked(self) -> tuple[str, ...]:
        """What the verdict is not about."""
        left_out = (check.name if check.verdict == "skipped" else check.left_out for check in self.checks)
        return tuple(filter(None, left_out))

    def to_json(self) -> dict[str, Any]:
        return {
            "in": self.source,
            "out": self.out,
            "ok": self.ok,
            "settings": asdict(self.settings),
            "checks": [asdict(check) for check in self.checks],
            "numbers": [asdict(numbers) for numbers in self.numbers],
            "engines": (rows := [row.to_json() for row in self.loaders]),
            "loaders": rows,
            "digests": None if self.digests is None else dict(self.digests),
        }


def worst(numbers: Iterable[PartitionNumbers]) -> tuple[PartitionNumbers, ...]:
    """For each partition of each kind of layer the row that is furthest off, over all groups."""
    rows: dict[tuple[str, str], PartitionNumbers] = {}
    for row in numbers:
        old = rows.setdefault((row.layer, row.partition), row)
        if _how_far_off(row) > _how_far_off(old):
            rows[row.layer, row.partition] = row
    return tuple(rows.values())


def _how_far_off(row: PartitionNumbers) -> tuple[float, float, float]:
    return row.outputs_out, row.outputs_fixed, row.outputs_before


def judge(name: str, problems: Iterable[str], summary: str, left_out: str = "") -> Check:
    """A check that holds when there are no problems."""
    found = list(problems)
    if not found:
        return Check(name, "ok", summary, left_out=left_out)
    more = f" (the first {_KEPT} are listed)" if len(found) > _KEPT else ""
    return Check(
        name, "FAILED", f"{len(found)} problem{'s' if len(found) > 1 else ''}{more}", tuple(found[:_KEPT]), left_out
    )


def skip(name: str, reason: str) -> Check:
    return Check(name, "skipped", reason)
