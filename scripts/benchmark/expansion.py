"""The change that all contestants make, in torch: one scale for several partitions becomes one for each row."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch

TARGET = r"re:.*linear_attn\.in_proj_(qkv|z|qkvz)$"
_SCALE = re.compile(r"linear_attn\.(in_proj_qkv|in_proj_z)\.weight_scale$")


def read_rows(source: Path) -> dict[str, int]:
    """Output rows of the modules to change. From the config: a weight may lie in another shard than its scale."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    key = config["linear_num_key_heads"] * config["linear_key_head_dim"]
    value = config["linear_num_value_heads"] * config["linear_value_head_dim"]
    return {"in_proj_qkv": 2 * key + value, "in_proj_z": value}


def expand_scales(tensors: dict[str, torch.Tensor], rows: dict[str, int]) -> dict[str, torch.Tensor]:
    found = ((name, _SCALE.search(name)) for name in tensors)
    return tensors | {name: tensors[name].reshape(1, 1).repeat(rows[m.group(1)], 1) for name, m in found if m}
