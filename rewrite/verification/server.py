"""How engines serve a fused group: what their loader put into the slots, and what they then multiply with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rewrite.verification.oracle import (
    SENTINEL,
    EngineWeights,
    Rows,
    as_stored,
    half_precision_bound,
    plain_bound,
    requantization_bound,
    requantized,
)
from rewrite.verification.reader import GroupReader


@dataclass(frozen=True)
class Server:
    """How an engine serves a group's rows, given what its loader put into the slots."""

    reader: GroupReader
    slots: tuple[float | None, ...]

    @property
    def fused_on_disk(self) -> bool:
        """A last slot that nothing was loaded into: engines take the module for one that was fused before it was
        quantized (Phi-3), and requantize nothing."""
        return self.slots[-1] is None

    @property
    def largest(self) -> float:
        return max(scale for scale in self.slots if scale is not None)

    @property
    def requantizes(self) -> bool:
        """Whether the engine makes other weights of those that are stored."""
        return self.reader.is_per_tensor() and not self.fused_on_disk

    def bound(self, slot: int, rows: Rows) -> torch.Tensor | None:
        """How far what the engine multiplies with may be from each weight of the slot; None for not at all."""
        if self.reader.is_plain():
            return plain_bound(rows)
        if not self.requantizes:
            return None
        if self.slots[slot] == self.largest:
            return half_precision_bound(rows, self.largest)
        return requantization_bound(rows, self.largest)

    def __call__(self, slot: int, rows: Rows) -> EngineWeights:
        if not self.requantizes:
            return as_stored(rows)
        scale = self.slots[slot]
        return requantized(rows, SENTINEL if scale is None else scale, self.largest)
