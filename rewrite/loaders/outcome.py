"""What a loader serves: exact, less precise, garbled, nothing at all; or that this is not known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["exact", "loses precision", "not known", "garbled", "does not run", "fails to load"]
#: What is not known may be worse than a loss of precision. What does not run loads, and raises when it computes.
SEVERITY: tuple[Kind, ...] = ("exact", "loses precision", "not known", "garbled", "does not run", "fails to load")

#: The magnitude of what engines create scale slots with (the least finite float32).
SENTINEL = 3.4e38
#: One rounding to e4m3 (three mantissa bits) moves a normal value by at most half a unit in the last place.
E4M3_ROUNDING = 2.0**-4


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
