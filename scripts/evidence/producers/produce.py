"""One quantized checkpoint: a base model, a producer's call, its recipe."""

from __future__ import annotations

import importlib
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from producers.inputs import SEED


def produce(producer: str, call: str, model: str, base: Path, out: Path, recipe: Mapping[str, Any]) -> None:
    """Let ``call`` of the producer's module write ``out``, anew; ``model`` is the name of ``base``."""
    shutil.rmtree(out, ignore_errors=True)
    random.seed(SEED)
    torch.manual_seed(SEED)
    getattr(importlib.import_module(f"producers.by_{producer}"), call)(model, base, out, recipe)
