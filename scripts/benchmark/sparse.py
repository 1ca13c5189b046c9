"""`python -m benchmark.sparse DIR SHARDS TENSORS`: a checkpoint that takes next to no disk.

Headers and scales are real, all else is holes.
"""

from __future__ import annotations

import json
import os
import sys
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from benchmark.qwen import PERIOD, Model, Tensor, moe, tensors
from benchmark.shards import name_shards, write_side_files


def main(directory: Path, shard_count: int, tensor_count: int) -> None:
    """Write Qwen3.5-35B-A3B with as many layers as ``tensor_count`` tensors take, in ``shard_count`` shards."""
    model = _model_of(tensor_count)
    shards = list(_slices(list(tensors(model)), shard_count))
    for name, shard in name_shards(shards):
        _write_shard(directory / name, shard)
    write_side_files(directory, model, shards)


def _model_of(tensor_count: int) -> Model:
    base, one_period = (sum(1 for _ in tensors(moe(layers))) for layers in (0, PERIOD))
    return moe(PERIOD * -(-(tensor_count - base) // (one_period - base)))


def _slices(items: list[Tensor], count: int) -> Iterator[list[Tensor]]:
    rest = iter(items)
    for number in range(count):
        yield list(islice(rest, len(items) * (number + 1) // count - len(items) * number // count))


def _write_shard(path: Path, shard: list[Tensor]) -> None:
    """In the order of the stock writer: BF16 before FP8, then by name."""
    document: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    scales = []
    for tensor in sorted(shard, key=lambda tensor: (tensor.dtype != "BF16", tensor.name)):
        end = offset + tensor.nbytes
        document[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, end]}
        if tensor.is_scale:
            scales.append((offset, _scale(tensor.name)))
        offset = end
    raw = json.dumps(document, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + offset)
        file.flush()
        for start, value in scales:
            os.pwrite(file.fileno(), value, 8 + len(raw) + start)


def _scale(name: str) -> bytes:
    """In BF16: another one for each weight, 1.0 for all activations. A hole would read as 0, which is refused."""
    bits = 0x3F80 if name.endswith("input_scale") else 0x3C00 | zlib.crc32(name.encode()) & 0x7F
    return bits.to_bytes(2, "little")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
