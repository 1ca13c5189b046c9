"""What the matrix covers: which engine (see `engines.toml`) loads which fixtures, converted by which profiles."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from engines.known import Engine

REPOSITORY = Path(__file__).resolve().parents[3]
FIXTURES = REPOSITORY / "tests" / "fixtures"
TALKING = REPOSITORY / "tests" / "talk"
RECORD = REPOSITORY / "tests" / "loader_matrix.json"
GENERATION = REPOSITORY / "tests" / "generation.json"

# `original` is the fixture as it is; every other name stands for what `rewrite.convert` is told: `-all` for all groups.
ORIGINAL = "original"
_WITH_ALL = ("exact", "dynamic", "bf16", "partition")
CONVERSIONS: dict[str, dict[str, Any]] = {
    **{name: {"profile": name} for name in (*_WITH_ALL, "portable", "dequantized", "rescaled")},
    **{f"{name}-all": {"profile": name, "selection": "all"} for name in _WITH_ALL},
}
PROFILES = (ORIGINAL, *CONVERSIONS)
# What a fixture gets unless told otherwise: where in_proj_qkv and in_proj_z lie on disk, the group that loaders garble,
# on its own; elsewhere only `--groups all` has something to convert. `portable` and
# `dequantized` convert all layers in any case.
GDN_PROFILES = (ORIGINAL, "exact", "exact-all", "dynamic", "portable", "bf16", "bf16-all", "dequantized", "partition")
OTHER_PROFILES = (ORIGINAL, "exact-all", "dynamic-all", "portable", "bf16-all", "dequantized", "partition-all")
NVFP4_FIXTURES = (
    "llmcompressor-qwen3_5-nvfp4",
    "modelfree-qwen3_5-moe-nvfp4a16",
    "modelopt-qwen3_5-moe-nvfp4",
    "modelfree-deepseek_v3-nvfp4a16",
)
NVFP4_PROFILES = (ORIGINAL, "exact", "rescaled")

BOUNDARY_FIXTURES = (
    *("llmcompressor-qwen3_5-vl", "llmcompressor-qwen3_5-text", "llmcompressor-qwen3_next"),
    *("llmcompressor-minicpmv4_6", "modelopt-qwen3_5-mixed"),
    *NVFP4_FIXTURES,
)
# What shows the boundaries of transformers: scales without a dimension, once they are stated as compressed-tensors.
SCALAR_FIXTURES = ("modelopt-qwen3_5-vl",)
BOUNDARY_PROFILES = (ORIGINAL, "exact-all", "portable", "bf16-all")

# Multi-head latent attention: vLLM has no such layer on CPU before 0.27.
LATENT_FIXTURES = ("modelfree-deepseek_v3-nvfp4a16", "llmcompressor-deepseek_v3")
LATENT_ENGINES = (
    *("vllm==0.32.0", "vllm==0.33.0", "sglang==0.5.23"),
    *("transformers==5.17.0", "transformers==5.24.0"),
)

CI_ENGINES = ("vllm==0.19.1", "vllm==0.32.0", "sglang==0.5.23", "transformers==5.17.0")
CI_FIXTURES = ("llmcompressor-qwen3_5-vl",)
CI_PROFILES = (ORIGINAL, "exact")

# Tensor parallelism is about the engine, not about the producer: one fixture is enough. Generation: two families. On
# CPU vLLM takes no FP8 KV cache, no FP8 experts and few sizes of heads.
PARALLEL_FIXTURES = ("llmcompressor-qwen3_5-vl",)
GENERATING_FIXTURES = ("llmcompressor-qwen3_5-vl", "llmcompressor-llama")
TP_RANKS = 2


def folder(fixture: str) -> Path:
    """Where a checkpoint of the tests lies: those that talk have a folder of their own."""
    return (TALKING if fixture.startswith("talk-") else FIXTURES) / fixture


def fixtures() -> tuple[str, ...]:
    """Names of the checkpoints under tests/fixtures."""
    return tuple(sorted(path.parent.name for path in FIXTURES.glob("*/config.json")))


def profiles(fixture: str) -> tuple[str, ...]:
    """The profiles that a fixture is loaded with."""
    if fixture in NVFP4_FIXTURES:
        return NVFP4_PROFILES
    stored = {name for shard in sorted((FIXTURES / fixture).glob("*.safetensors")) for name in _header(shard)}
    return GDN_PROFILES if any(name.endswith(".in_proj_z.weight") for name in stored) else OTHER_PROFILES


def is_own_truth(fixture: str, profile: str) -> bool:
    """Whether a conversion is held to what it says itself: one of NVFP4 moves factors between layers, and rounds block
    scales. That it means what the original meant is for `rewrite verify`."""
    return fixture in NVFP4_FIXTURES and profile != ORIGINAL


def loads(engine: Engine, fixture: str, profile: str) -> bool:
    """Whether the recording has this cell."""
    if fixture in LATENT_FIXTURES:
        return engine.spec in LATENT_ENGINES
    boundary = SCALAR_FIXTURES if engine.name == "transformers" else BOUNDARY_FIXTURES
    return not engine.boundary or (fixture in boundary and profile in BOUNDARY_PROFILES)


def _header(shard: Path) -> dict[str, Any]:
    with shard.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return dict(json.loads(file.read(length)))
