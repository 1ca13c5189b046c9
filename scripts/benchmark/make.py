"""`python -m benchmark.make DIR GIGABYTES`: a checkpoint of Qwen3.5-9B shapes, random weights, stock `save_file`.

`python -m benchmark.make DIR --small TENSORS`: as many tensors, those of weights 4 kB each.

`python -m benchmark.make DIR --nvfp4 LAYERS`: Qwen3.5-35B-A3B in NVFP4; what engines fuse has different global scales.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmark.qwen import PERIOD, Model, Tensor, dense, moe, tensors
from benchmark.shards import name_shards, split, write_side_files

_MAX_SHARD_BYTES = 1_000_000_000


def main(directory: Path, model: Model) -> None:
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


def _small(count: int) -> Model:
    """Experts of 64 x 64."""

    def model(layers: int) -> Model:
        return replace(moe(layers), hidden=64, intermediate=64, heads=2, head_dim=32, vocabulary=1024,
                       key_heads=2, value_heads=2, linear_head_dim=32)  # fmt: skip

    layers = PERIOD
    while sum(1 for _ in tensors(model(layers))) < count:
        layers += PERIOD
    return model(layers)


def _random(tensor: Tensor, generator: torch.Generator) -> torch.Tensor:
    if tensor.dtype == "F32":  # divisors, as llm-compressor's: up to six times apart
        return torch.rand(tensor.shape, generator=generator) * 25_000 + 5_000
    if tensor.is_scale and tensor.dtype == "BF16":
        return torch.rand(tensor.shape, generator=generator).mul_(0.01).add_(0.001).bfloat16()
    words = torch.empty(-(-tensor.nbytes // 8), dtype=torch.int64)
    words.random_(-(2**63), 2**63 - 1, generator=generator)  # eight bytes at a time: a gigabyte in about a second
    if tensor.dtype == "U8":
        return words.view(torch.uint8)[: tensor.nbytes].view(tensor.shape)
    if tensor.dtype == "F8_E4M3":
        data = words.view(torch.uint8)[: tensor.nbytes]
        if tensor.is_scale:  # of blocks: positive
            data &= 0x7F
        data -= ((data & 0x7F) == 0x7F).byte()  # 0x7F and 0xFF are the NaNs of E4M3
        return data.view(torch.float8_e4m3fn).view(tensor.shape)
    data = words.view(torch.int16)[: prod(tensor.shape)]
    data &= ~0x4000  # without the exponent's upper bit: finite, and below 2
    return data.view(torch.bfloat16).view(tensor.shape)


def _asked(kind: str, number: str = "") -> Model:
    if kind == "--small":
        return _small(int(number))
    return replace(moe(int(number)), nvfp4=True) if kind == "--nvfp4" else _model_of(int(float(kind) * 1e9))


if __name__ == "__main__":
    main(Path(sys.argv[1]), _asked(*sys.argv[2:]))
