"""Which consumers read what, and where they come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engines.known import Engine
from loader_matrix import cases
from loader_matrix.cases import FIXTURES, ORIGINAL, fixtures, is_own_truth

#: What `rewrite.convert` is told. ModelOpt's Llama alone has scales of a KV cache; the others are the same without.
CONVERSIONS: dict[str, dict[str, Any]] = {
    "exact": cases.CONVERSIONS["exact-all"],
    "portable": cases.CONVERSIONS["portable"],
    "portable, no KV scales": cases.CONVERSIONS["portable"] | {"kv_scales": "drop"},
    "bf16": cases.CONVERSIONS["bf16-all"],
    "dequantized": cases.CONVERSIONS["dequantized"],
}
PROFILES = (ORIGINAL, *CONVERSIONS)

#: The package whose source has llama.cpp, with its converter and the `gguf` that belongs to it.
LLAMA_CPP = Engine("llama.cpp", "llama-cpp-python 0.3.36", ("gguf==0.19.0",), source="llama-cpp-python==0.3.36")
MLX_LM = Engine("mlx-lm", "0.32.2", ("mlx-lm==0.32.2", "mlx==0.32.4", "mlx-cpu==0.32.4"))
CONSUMERS = {each.name: each for each in (LLAMA_CPP, MLX_LM)}

__all__ = ["CONSUMERS", "CONVERSIONS", "FIXTURES", "PROFILES", "fixtures", "truth"]


def truth(fixture: str, profile: str, checkpoint: Path) -> Path:
    """The checkpoint that says what the weights are."""
    return checkpoint if is_own_truth(fixture, profile) else FIXTURES / fixture
