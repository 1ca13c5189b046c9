"""The check of every plan: conversions that would change more than they should are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import rewrite
from rewrite import Unsupported
from tests.support import edit_json

ARGUMENTS: dict[str, dict[str, Any]] = {
    "INT8": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True},
    "INT4": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True},
    "NVFP4": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True},
}
STORED = {"INT8": ("weight", "I8", 1), "INT4": ("weight_packed", "I32", 8), "NVFP4": ("weight_packed", "U8", 2)}


def mixed(directory: Path, kind: str) -> None:
    """A second config group for a new layer ``mlp.extra`` of another format."""
    config = json.loads((directory / "config.json").read_text())
    value = config["quantization_config"]
    group = {"targets": ["re:.*extra$"], "weights": ARGUMENTS[kind], "input_activations": None}
    value["config_groups"]["group_1"] = group
    edit_json(directory / "config.json", quantization_config=value)
    tensor, dtype, share = STORED[kind]
    width = {"I32": 4}.get(dtype, 1)
    shape = [16, 128 // share]
    size = 16 * (128 // share) * width
    name = f"model.layers.0.mlp.extra.{tensor}"
    header = {name: {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    (directory / "extra.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(size))
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    index["weight_map"][name] = "extra.safetensors"
    edit_json(directory / "model.safetensors.index.json", weight_map=index["weight_map"])


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_portable_does_not_swallow_other_formats(kind: str, copy: Path, tmp_path: Path) -> None:
    """One group for all layers would make FP8 of them: refused, and inspect says so. exact leaves them alone."""
    mixed(copy, kind)
    with pytest.raises(Unsupported, match="change how a module is read") as caught:
        rewrite.convert(copy, tmp_path / "out", profile="portable")
    assert caught.value.where == "model.layers.0.mlp.extra" and caught.value.hint
    assert "portable" in rewrite.inspect_checkpoint(copy).refusals
    assert rewrite.convert(copy, tmp_path / "out").changed


def test_portable_does_not_quantize_plain_layers(copy: Path, tmp_path: Path) -> None:
    """Targets by pattern and a short ignore list: everything else is plain, and must stay so."""
    config = json.loads((copy / "config.json").read_text())
    value = config["quantization_config"]
    value["ignore"] = ["lm_head"]
    patterns = (r".*linear_attn\.(in_proj_qkv|in_proj_z|out_proj)$", ".*self_attn.*", r".*mlp\..*_proj$")
    value["config_groups"]["group_0"]["targets"] = [f"re:{pattern}" for pattern in patterns]
    edit_json(copy / "config.json", quantization_config=value)
    with pytest.raises(Unsupported, match="change how a module is read"):
        rewrite.convert(copy, tmp_path / "out", profile="portable")
    assert rewrite.convert(copy, tmp_path / "out").changed


def test_every_scheme_must_fit_its_tensors(copy: Path, tmp_path: Path) -> None:
    """A layer whose config and tensors disagree, though the conversion would not touch it."""
    config = json.loads((copy / "config.json").read_text())
    value = config["quantization_config"]
    group = value["config_groups"]["group_0"]
    weights = {**group["weights"], "strategy": "channel"}
    value["config_groups"]["group_1"] = {**group, "targets": ["re:.*down_proj$"], "weights": weights}
    edit_json(copy / "config.json", quantization_config=value)
    with pytest.raises(Unsupported, match="do not fit") as caught:
        rewrite.convert(copy, tmp_path / "out")
    assert str(caught.value.where).endswith("down_proj")
