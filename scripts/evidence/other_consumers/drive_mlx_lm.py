"""Loads checkpoints with MLX-LM's own `load_model`, on CPU. Nothing is replaced."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.utils
import numpy as np
from mlx_lm.utils import load_model

from other_consumers.driver import Arrays, run


def read(checkpoint: Path) -> Arrays:
    """Every parameter of the model."""
    model, _ = load_model(checkpoint)
    return {name: np.array(value.astype(mx.float32)) for name, value in mlx.utils.tree_flatten(model.parameters())}


if __name__ == "__main__":
    run(read, ("mlx_lm", "mlx"))
