"""What the matrix covers: engines, fixtures and profiles. Adding one is one line here."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
FIXTURES = REPOSITORY / "tests" / "fixtures"
RECORD = REPOSITORY / "tests" / "loader_matrix.json"


@dataclass(frozen=True)
class Engine:
    """A released engine. `serves_tp` and `generates` say which of the extra rows it gets; one that is there for a
    `boundary`, because it is the first to know something or the last not to, loads only what shows that."""

    name: str
    version: str
    serves_tp: bool = False
    generates: bool = False
    boundary: bool = False

    @property
    def slug(self) -> str:
        return f"{self.name}-{self.version}"

    @property
    def spec(self) -> str:
        return f"{self.name}=={self.version}"


ENGINES = (
    Engine("vllm", "0.17.0", boundary=True),  # the first with Qwen3.5
    Engine("vllm", "0.17.1", boundary=True),  # the release of issue #38197
    Engine("vllm", "0.19.1", serves_tp=True),  # the last release with the fault
    Engine("vllm", "0.20.0"),  # the first with the fix (PR #38517)
    Engine("vllm", "0.21.0", boundary=True),  # the last without MiniCPM-V 4.6
    Engine("vllm", "0.22.0", boundary=True),
    Engine("vllm", "0.26.0", boundary=True),  # the last without text-only Qwen3.5
    Engine("vllm", "0.27.0", boundary=True),
    Engine("vllm", "0.32.0", serves_tp=True, generates=True),  # the newest; the first that runs Qwen3.5 on CPU
    Engine("sglang", "0.5.9"),  # serves in_proj_qkv and in_proj_z as separate modules
    Engine("sglang", "0.5.10", boundary=True),  # the first that fuses them
    Engine("sglang", "0.5.10.post1"),
    Engine("sglang", "0.5.11"),  # the first that loads a shared scalar into the fused module
    Engine("sglang", "0.5.12", boundary=True),  # the first with MiniCPM-V 4.6
    Engine("sglang", "0.5.14", boundary=True),  # the last without MIXED_PRECISION of Qwen3.5
    Engine("sglang", "0.5.15", boundary=True),
    Engine("sglang", "0.5.16", boundary=True),  # the last without text-only Qwen3.5
    Engine("sglang", "0.5.17", boundary=True),
    Engine("sglang", "0.5.22", boundary=True),  # the last that misses the names of MiniCPM-V's vision tower
    Engine("sglang", "0.5.23"),  # the newest
    Engine("transformers", "5.17.0"),  # with compressed-tensors
)

# `original` is the fixture as it is; every other name stands for what `rewrite convert` is told.
ORIGINAL = "original"
CONVERSIONS = {
    "exact": ("--profile", "exact"),
    "exact-all": ("--profile", "exact", "--groups", "all"),
    "portable": ("--profile", "portable"),
    "bf16": ("--profile", "bf16"),
    "bf16-all": ("--profile", "bf16", "--groups", "all"),
    "partition": ("--profile", "partition"),
    "partition-all": ("--profile", "partition", "--groups", "all"),
}
PROFILES = (ORIGINAL, *CONVERSIONS)
# What a fixture gets unless told otherwise: where in_proj_qkv and in_proj_z lie on disk, the group that loaders garble,
# on its own; elsewhere only `--groups all` has something to convert. `portable` converts all layers in any case.
GDN_PROFILES = (ORIGINAL, "exact", "exact-all", "portable", "bf16", "bf16-all", "partition")
OTHER_PROFILES = (ORIGINAL, "exact-all", "portable", "bf16-all", "partition-all")

BOUNDARY_FIXTURES = (
    *("llmcompressor-qwen3_5-vl", "llmcompressor-qwen3_5-text", "llmcompressor-qwen3_next"),
    *("llmcompressor-minicpmv4_6", "modelopt-qwen3_5-mixed"),
)
BOUNDARY_PROFILES = (ORIGINAL, "exact-all", "portable", "bf16-all")

CI_ENGINES = ("vllm==0.19.1", "vllm==0.32.0", "sglang==0.5.23", "transformers==5.17.0")
CI_FIXTURES = ("llmcompressor-qwen3_5-vl",)
CI_PROFILES = (ORIGINAL, "exact")

# Tensor parallelism is about the engine, not about the producer: one fixture is enough. Generation: two families. On
# CPU vLLM takes no FP8 KV cache, no FP8 experts and few sizes of heads.
PARALLEL_FIXTURES = ("llmcompressor-qwen3_5-vl",)
GENERATING_FIXTURES = ("llmcompressor-qwen3_5-vl", "llmcompressor-llama")
TP_RANKS = 2


def fixtures() -> tuple[str, ...]:
    """Names of the checkpoints under tests/fixtures."""
    return tuple(sorted(path.parent.name for path in FIXTURES.glob("*/config.json")))


def profiles(fixture: str) -> tuple[str, ...]:
    """The profiles that a fixture is loaded with."""
    stored = {name for shard in sorted((FIXTURES / fixture).glob("*.safetensors")) for name in _header(shard)}
    return GDN_PROFILES if any(name.endswith(".in_proj_z.weight") for name in stored) else OTHER_PROFILES


def loads(engine: Engine, fixture: str, profile: str) -> bool:
    """Whether the recording has this cell."""
    return not engine.boundary or (fixture in BOUNDARY_FIXTURES and profile in BOUNDARY_PROFILES)


def _header(shard: Path) -> dict[str, Any]:
    with shard.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return dict(json.loads(file.read(length)))


def engine(spec: str) -> Engine:
    """The engine that `NAME==VERSION` means; KeyError names the known ones."""
    known = {each.spec: each for each in ENGINES}
    if spec not in known:
        raise KeyError(f"unknown engine {spec!r}; known: {', '.join(known)}")
    return known[spec]
