"""What a profile of ``convert`` promises about its output, as data.

A profile states its promise beside its plan. The verification gets it as an argument and holds OUT to it: nothing of
the planner's code runs there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Promise:
    """What may become of a converted module ``[N, K]``; everything else of the checkpoint stays as it was."""

    scale: Literal["kept", "channel", "partition", "dropped"]  # as it was; [N, 1]; [P]; none
    weight: Literal["kept", "plain"] = "kept"  # byte for byte; or a floating-point dtype
    input_scale: Literal["kept", "dropped"] = "kept"
    every_layer: bool = False  # every FP8 layer is converted, not only the fused groups that were chosen
    part_of_group: bool = False  # also groups of which only some modules are quantized
    nvfp4: Literal["kept", "folded", "rescaled"] = "kept"  # fused layers with several global scales get one
    nothing_quantized: bool = False  # block scales and scales of the KV cache go, too, and no config states anything
    vectors: bool = False  # made for loaders that read a vector of partitions, and judged by these only
