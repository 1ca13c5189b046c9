"""What a quantisation config says of one linear layer, whatever the dialect."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: How a weight scale is stored: one value; one per partition ``[P]``; one per row ``[N, 1]``; one per block.
ScaleLayout = Literal["tensor", "partition", "channel", "block"]
Activations = Literal["static", "dynamic", "none"]


@dataclass(frozen=True)
class Scheme:
    """FP8 (or other) weights with a scale layout, and when activations are quantised."""

    fp8: bool
    layout: ScaleLayout | None  # None: a layout that this library does not know
    activations: Activations
    text: str  # as the config words it, for people
