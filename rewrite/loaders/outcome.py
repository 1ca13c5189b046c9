"""What a loader serves: exact, less precise, garbled, nothing at all; or that this is not known."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal, TypeVar

from rewrite.loaders.ranges import Engine

Kind = Literal["exact", "loses precision", "not known", "garbled", "does not run", "fails to load"]
#: What is not known may be worse than a loss of precision. What does not run loads, and raises when it computes.
SEVERITY: tuple[Kind, ...] = ("exact", "loses precision", "not known", "garbled", "does not run", "fails to load")

#: What an engine serves without anybody having to know: not always to the bit.
SERVED: tuple[Kind, ...] = ("exact", "loses precision")

#: The magnitude of what engines create scale slots with (the least finite float32).
SENTINEL = 3.4e38
#: One rounding to e4m3 (three mantissa bits) moves a normal value by at most half a unit in the last place.
E4M3_ROUNDING = 2.0**-4


#: The kernels that an engine has for some layers, or ``does not run``, or ``not known``; for each card.
Kernels = Mapping[str, tuple[str, ...]]
AS_IT_IS = "as it is"


@dataclass(frozen=True)
class Outcome:
    """What a loader serves. ``error`` is the relative error of the weights of the worst partition: a bound where
    precision is lost, an estimate (see :func:`saturation`) where weights are garbled. ``partitions`` names those that
    are hurt: ``z`` of one group, ``in_proj_qkvz.z`` of a checkpoint. ``factors``: what the weights of a
    partition are multiplied by, where all that is wrong with them is one number."""

    kind: Kind
    detail: str = ""
    partitions: tuple[str, ...] = ()
    error: float = 0.0
    factors: tuple[tuple[str, float], ...] = ()

    @property
    def severity(self) -> int:
        return SEVERITY.index(self.kind)


def gap(before: Outcome, after: Outcome) -> int:
    """How far an engine is from serving a state of a checkpoint exactly: 0, it does; or as little is known of it as
    was before, which is neither a fault nor a repair."""
    return 0 if before.kind == after.kind == "not known" else after.severity


@dataclass(frozen=True)
class Row:
    """What an engine makes of a checkpoint in each of its states: as it is and converted with each profile that takes
    it, or IN and OUT. ``kernels`` are those of the fused groups, by state."""

    engine: Engine
    outcomes: Mapping[str, Outcome]
    kernels: Mapping[str, Kernels] = field(default_factory=dict)

    @property
    def as_is(self) -> Outcome:
        return self.outcomes[AS_IT_IS]

    @property
    def converted(self) -> dict[str, Outcome]:
        """By profile."""
        return {state: outcome for state, outcome in self.outcomes.items() if state != AS_IT_IS}


_Row = TypeVar("_Row", bound=Row)
_Said = TypeVar("_Said")


def merged(rows: Iterable[_Row], say: Callable[[_Row], _Said]) -> list[tuple[str, str, _Said]]:
    """Name, versions and what ``say`` says of each row; neighboring ranges of which it says the same as one."""
    lines = []
    for (name, said), run in groupby(rows, lambda row: (row.engine.name, say(row))):
        engines = [row.engine for row in run]
        lines.append((name, engines[-1].versions_from(engines[0]), said))
    return lines
