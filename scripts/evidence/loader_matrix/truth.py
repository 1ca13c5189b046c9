"""What the original checkpoint says every linear weight is, read and dequantized independently of `rewrite`.

Reads the safetensors bytes itself (8-byte little-endian header length, JSON header, data), so neither `rewrite` nor an
engine's reader can share a mistake with it.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loader_matrix import nvfp4

_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
}
#: Of values that are multiplied by ``weight_scale``.
SCALED = (torch.float8_e4m3fn, torch.int8)
#: Beside a language model, or its second stack (HRM): they number their layers as it does.
_TOWER = re.compile(r"visual|vision|audio|(?:^|\.)(?:vit|vpm|L_module)\.")
_LAYER = re.compile(r"(?:^|\.)(layers\.\d+\..+)$")
# Of a cache of keys or values: ModelOpt has it in the projection, llm-compressor in the attention layer, Quark as the
# scale of the projection's output.
_KV_SCALE = re.compile(r"(layers\.\d+\.).*?self_attn\.(?:(?:[kv]_proj\.)?([kv])_scale|([kv])_proj\.output_scale)")


def canonical(name: str) -> str | None:
    """`layers.0.mlp.up_proj` for any spelling of a language model's module; None for vision, MTP and the rest.

    Engines prefix the same layer with `model.`, `language_model.model.` or `model.language_model.`.
    """
    if _TOWER.search(name) or name.startswith("mtp."):
        return None
    found = _LAYER.search(name)
    return found.group(1) if found else None


def _tensors(shard: Path) -> Iterator[tuple[str, torch.Tensor]]:
    data = shard.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    for name, entry in header.items():
        if name == "__metadata__" or entry["dtype"] not in _DTYPES:
            continue
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        raw = torch.frombuffer(bytearray(data[begin:end]) or bytearray(8), dtype=torch.uint8)[: end - begin]
        yield name, raw.view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])


def _shards(checkpoint: Path) -> list[Path]:
    index = checkpoint / "model.safetensors.index.json"
    if not index.exists():
        return [checkpoint / "model.safetensors"]
    return [checkpoint / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]


def read_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint by its stored name."""
    return {name: tensor for shard in _shards(checkpoint) for name, tensor in _tensors(shard)}


@dataclass(frozen=True)
class Linear:
    """One stored linear: dequantized `weight` F32 [N, K], and whether FP8, INT8 or NVFP4 lies on disk.

    `input_scale` is the static activation scale, None where the checkpoint has none.
    """

    weight: torch.Tensor
    quantized: bool
    input_scale: float | None


def _block(config: dict[str, Any]) -> tuple[int, int] | None:
    """The blocks of FP8 weights with block scales: `fp8` states them once, compressed-tensors for each group."""
    quantization = config.get("quantization_config") or {}
    stated = [quantization.get("weight_block_size")]
    for group in (quantization.get("config_groups") or {}).values():
        stated.append((group.get("weights") or {}).get("block_structure"))
    found = {tuple(each) for each in stated if isinstance(each, list)}
    if len(found) > 1:
        raise ValueError(f"several sizes of blocks, which truth.py can't read: {sorted(found)}")
    return found.pop() if found else None


class Truth:
    """The linears of a checkpoint's language model, by canonical name."""

    def __init__(self, checkpoint: Path) -> None:
        config = json.loads((checkpoint / "config.json").read_text())
        self._config: dict[str, Any] = config.get("text_config", config)
        self._block = _block(config)
        self._tensors: dict[str, torch.Tensor] = {}
        for shard in _shards(checkpoint):
            for stored, tensor in _tensors(shard):
                name = canonical(stored)
                if name is None:
                    continue
                if name in self._tensors:
                    raise ValueError(f"{shard.name}: {stored} is there twice as {name}")
                self._tensors[name] = tensor

    def _weights(self, *dtypes: torch.dtype) -> set[str]:
        return {
            name.rpartition(".")[0]
            for name, tensor in self._tensors.items()
            if name.endswith((".weight", ".weight_packed")) and tensor.dtype in dtypes
        }

    def quantized(self) -> set[str]:
        """Names of all FP8, INT8 and NVFP4 linears, but those of ``packed``."""
        return (self._weights(*SCALED) | self.nvfp4()) - self.packed()

    def nvfp4(self) -> set[str]:
        """Names of all NVFP4 linears."""
        return {name for name in self._weights(torch.uint8) if nvfp4.stored(self._tensors, name) is not None}

    def packed(self) -> set[str]:
        """Names of all other linears with several weights in a value (INT4): nothing here reads them, and results list
        them as not compared."""
        return self._weights(torch.uint8, torch.int32) - self.nvfp4()

    def _scale(self, name: str) -> torch.Tensor:
        """The scales of a weight. `weight_scale_inv` is no inverse, either: both are multiplied with."""
        found = self._tensors.get(f"{name}.weight_scale")
        return self._tensors[f"{name}.weight_scale_inv"] if found is None else found

    def kv_scales(self) -> dict[tuple[str, str], float]:
        """Scales of the KV cache: (`layers.N.`, "k" or "v") to the scale."""
        found = {}
        for name, tensor in self._tensors.items():
            if (match := _KV_SCALE.fullmatch(name)) and tensor.numel() == 1:  # not one for each head
                found[match.group(1), match.group(2) or match.group(3)] = tensor.float().item()
        return found

    def shares(self) -> dict[str, list[int]]:
        """By the last name of a stored linear that is several: how its rows are shared among its partitions."""
        stored = {name.rpartition(".")[0].rpartition(".")[2] for name in self._tensors} | {"gate_up_proj"}
        return {last: shares(self._config) for last, shares in _PARTITIONS.items() if last in stored}

    def rows(self, name: str) -> list[int]:
        """Rows of each partition of a stored linear that is several."""
        count, shares = len(self.linear(name).weight), self.shares()[name.rpartition(".")[2]]
        return [count * share // sum(shares) for share in shares]

    def filters(self, name: str) -> torch.Tensor:
        """The weights of a convolution."""
        return self._tensors[f"{name}.weight"]

    def linear(self, name: str) -> Linear:
        """The linear `name`, dequantized: value x scale, both in F32, which is exact for one product."""
        packed = nvfp4.stored(self._tensors, name)
        if packed is not None:
            inputs = packed.input_scale
            return Linear(packed.dequantized(), quantized=True, input_scale=None if inputs is None else inputs.item())
        weight = self._tensors[f"{name}.weight"]
        if weight.dtype == torch.uint8:
            raise ValueError(f"{name}: packed weights, which truth.py can't read")
        if weight.dtype not in SCALED:
            return Linear(weight.float(), quantized=False, input_scale=None)
        scale = self._scale(name).float()
        if self._block is not None and is_by_blocks(scale, weight, self._block):
            scale = spread(scale, weight, self._block)
        elif scale.numel() == 1:
            scale = scale.reshape(1, 1)
        elif scale.shape == (weight.shape[0],):  # Quark's channel scales
            scale = scale.reshape(-1, 1)
        elif scale.shape != (weight.shape[0], 1):  # one for each row
            raise ValueError(f"{name}: a fixture's scale has shape {tuple(scale.shape)}, which truth.py can't read")
        given = self._tensors.get(f"{name}.input_scale")
        static = None if given is None else given.max().item()
        return Linear(weight.float() * scale, quantized=True, input_scale=static)


def is_by_blocks(scale: torch.Tensor, weight: torch.Tensor, block: tuple[int, int]) -> bool:
    """Whether `scale` has a value for each block of `weight`. A [1, 1] of a small weight is one."""
    return tuple(scale.shape) == tuple(-(-size // each) for size, each in zip(weight.shape, block, strict=True))


def spread(scale: torch.Tensor, weight: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """[N, K] scales, one for each weight, from one for each block."""
    rows, columns = weight.shape
    return scale.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]


def _gdn_rows(config: dict[str, Any]) -> list[int]:
    """q, k and v of a Gated DeltaNet layer."""
    key = config["linear_num_key_heads"] * config["linear_key_head_dim"]
    return [key, key, config["linear_num_value_heads"] * config["linear_value_head_dim"]]


def _attention_rows(config: dict[str, Any]) -> list[int]:
    """q, k and v of an attention layer; configs leave head_dim out where it is the hidden size over the heads."""
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or config["hidden_size"] // heads
    return [heads * head, config["num_key_value_heads"] * head, config["num_key_value_heads"] * head]


_PARTITIONS: dict[str, Callable[[dict[str, Any]], list[int]]] = {
    "in_proj_qkv": _gdn_rows,
    "qkv_proj": _attention_rows,
    "gate_up_proj": lambda _: [1, 1],
}
