"""`python -m benchmark.make DIR GIGABYTES`: a checkpoint of Qwen3.5-9B shapes, random weights, stock `save_file`."""

from __future__ import annotations

import sys
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmark.qwen import PERIOD, Model, Tensor, dense, tensors
from benchmark.shards import name_shards, split, write_side_files

_MAX_SHARD_BYTES = 1_000_000_000


def main(directory: Path, size: int) -> None:
    model = _model_of(size)
    shards = split(tensors(model), _MAX_SHARD_BYTES)
    generator = torch.Generator().manual_seed(0)
    for name, shard in name_shards(shards):
        values = {tensor.name: _random(tensor, generator) for tensor in shard}
        save_file(values, directory / name, metadata={"format": "pt"})
    write_side_files(directory, model, shards)


def _model_of(size: int) -> Model:
    """The fewest whole periods of layers that reach ``size`` bytes."""
    layers = PERIOD
    while sum(tensor.nbytes for tensor in tensors(dense(layers))) < size:
        layers += PERIOD
    return dense(layers)


def _random(tensor: Tensor, generator: torch.Generator) -> torch.Tensor:
    if tensor.is_scale:
        return torch.rand(tensor.shape, generator=generator).mul_(0.01).add_(0.001).bfloat16()
    words = torch.empty(-(-tensor.nbytes // 8), dtype=torch.int64)
    words.random_(-(2**63), 2**63 - 1, generator=generator)  # eight bytes at a time: a gigabyte in about a second
    if tensor.dtype == "F8_E4M3":
        data = words.view(torch.uint8)[: tensor.nbytes]
        data -= ((data & 0x7F) == 0x7F).byte()  # 0x7F and 0xFF are the NaNs of E4M3
        return data.view(torch.float8_e4m3fn).view(tensor.shape)
    data = words.view(torch.int16)[: prod(tensor.shape)]
    data &= ~0x4000  # without the exponent's upper bit: finite, and below 2
    return data.view(torch.bfloat16).view(tensor.shape)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(float(sys.argv[2]) * 1e9))
