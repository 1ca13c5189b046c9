"""What the drivers of the matrix measure. Torch is imported once an engine has started."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from engines.driver import Job, Result


def compare(model: torch.nn.Module, this: Job) -> Result:
    """What `model` would serve against the truth."""
    from loader_matrix.served import Rank, measure
    from loader_matrix.truth import Truth

    return measure(model, Truth(this.truth), Rank(this.rank, this.world))
