"""What every checkpoint has around its tensors: the split into shards, the index, the config and the small files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmark.qwen import Model, Tensor, config

INDEX_NAME = "model.safetensors.index.json"


def split(tensors: Iterable[Tensor], max_bytes: int) -> list[list[Tensor]]:
    """Shards filled in order, a tensor beyond ``max_bytes`` in a shard of its own (as huggingface_hub splits)."""
    large: list[list[Tensor]] = []
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if tensor.nbytes > max_bytes:
            large.append([tensor])
            continue
        if size + tensor.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return large + shards


def name_shards(shards: list[list[Tensor]]) -> Iterator[tuple[str, list[Tensor]]]:
    for number, shard in enumerate(shards, 1):
        yield f"model-{number:05}-of-{len(shards):05}.safetensors", shard


def write_side_files(directory: Path, model: Model, shards: list[list[Tensor]]) -> None:
    """Index, config and what else lies beside the shards."""
    weight_map = {tensor.name: name for name, shard in name_shards(shards) for tensor in shard}
    total = sum(tensor.nbytes for shard in shards for tensor in shard)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(directory / INDEX_NAME, index)
    _write_json(directory / "config.json", config(model))
    _write_json(directory / "generation_config.json", {"eos_token_id": 248046, "do_sample": True})
    (directory / "README.md").write_text("Random weights in real shapes, for scripts/benchmark.sh.\n", encoding="utf-8")


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
