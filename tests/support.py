"""What tests share: reading checkpoints with the stock reader, and asking compressed-tensors for schemes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from rewrite import find_loaders, open_checkpoint
from rewrite.checkpoint.checkpoint import Shard
from rewrite.checkpoint.header import TensorInfo, build_header

#: Of the repository. Every test that reads a file of it starts here, wherever the test itself lies.
ROOT = Path(__file__).resolve().parents[1]
FIXTURES = ROOT / "tests" / "fixtures"
README = ROOT / "README.md"
#: What the engines made of the fixtures, recorded by scripts/evidence.sh loader_matrix.
LOADER_MATRIX = ROOT / "tests" / "loader_matrix.json"
#: FP8 beside NVFP4: no channel scales there, so ``exact`` and ``portable`` refuse it.
MIXED_PRECISION = "modelopt-qwen3_5-mixed"
#: Every matrix of the language model is NVFP4.
NVFP4 = sorted(path.name for path in FIXTURES.glob("*nvfp4*"))
CONVERTIBLE = sorted({path.parent.name for path in FIXTURES.glob("*/config.json")} - {MIXED_PRECISION, *NVFP4})
#: The layer that loaders garble: in_proj_qkv and in_proj_z. The other families have no such group.
SPLIT_QKVZ = [name for name in CONVERTIBLE if "qwen3_5" in name or "minicpmv4_6" in name]
OTHER_FAMILIES = [name for name in CONVERTIBLE if name not in SPLIT_QKVZ]
QKVZ = r"re:.*linear_attn\.in_proj_(qkv|z|qkvz)$"
#: Scales of the KV cache in modelopt-llama, and their names in compressed-tensors' dialect.
KV_SCALES = {
    f"model.layers.{i}.self_attn.{kind}_proj.{kind}_scale": f"model.layers.{i}.self_attn.{kind}_scale"
    for i in (0, 1)
    for kind in "kv"
}


def unfolded(shown: str) -> str:
    """What was printed, in one line: tables and sentences are folded at 80 columns."""
    return " ".join(shown.split())


def raw_tensors(directory: Path) -> dict[str, tuple[str, str, tuple[int, ...], bytes]]:
    """Every tensor as (shard, dtype, shape, bytes), through the stock reader."""
    from safetensors import deserialize

    result = {}
    for path in sorted(directory.glob("*.safetensors")):
        for name, info in deserialize(path.read_bytes()):
            result[name] = (path.name, info["dtype"], tuple(info["shape"]), bytes(info["data"]))
    return result


def tree(directory: Path) -> dict[str, bytes]:
    """Every file below a directory with its bytes."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def edit_json(path: Path, **changes: Any) -> None:
    """Set top-level keys of a JSON file; None removes one."""
    value = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not None}, indent=2))


def write_shard(path: Path, tensors: dict[str, tuple[str, tuple[int, ...], bytes]], **metadata: str) -> None:
    """A shard with tensors in the given order, which may be one that the stock writer never produces."""
    infos, data = [], b""
    for name, (dtype, shape, raw) in tensors.items():
        infos.append(TensorInfo(name, dtype, shape, len(data), len(data) + len(raw)))
        data += raw
    path.write_bytes(build_header(infos, metadata or None) + data)


def in_one_shard(directory: Path, out: Path) -> Path:
    """A checkpoint as a single shard without an index, and nothing but its config beside it. Returns ``out``."""
    out.mkdir()
    shutil.copy(directory / "config.json", out)
    tensors = {name: (dtype, shape, data) for name, (_, dtype, shape, data) in raw_tensors(directory).items()}
    write_shard(out / "model.safetensors", tensors)
    return out


def replace_tensor(
    directory: Path, name: str, data: bytes, shape: tuple[int, ...] | None = None, dtype: str | None = None
) -> None:
    """Give a stored tensor other bytes (and shape, dtype); the shard is written anew in the same order."""
    shard = shard_of(directory, name)
    raw = raw_tensors(directory)
    tensors = {
        t.name: (dtype or t.dtype, shape if shape is not None else t.shape, data)
        if t.name == name
        else (t.dtype, t.shape, raw[t.name][3])
        for t in shard.header.tensors
    }
    write_shard(directory / shard.name, tensors, **(shard.header.metadata or {}))


def shard_of(directory: Path, tensor: str) -> Shard:
    """The shard that holds a tensor."""
    checkpoint = open_checkpoint(directory)
    return checkpoint.shards[checkpoint.tensors[tensor].shard]


def compressed_tensors_schemes(directory: Path) -> dict[str, Any]:
    """The scheme of every stored linear layer, found by compressed-tensors' own parser and matcher."""
    import torch
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import is_match, match_targets

    value = json.loads((directory / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(value)
    targets = {target: scheme for scheme in config.config_groups.values() for target in scheme.targets}
    linear = torch.nn.Linear(1, 1, device="meta")
    schemes = {}
    for name, info in open_checkpoint(directory).tensors.items():
        if name.endswith(".weight") and len(info.shape) == 2 and "embed" not in name:
            module = name.removesuffix(".weight")
            hit = is_match(module, linear, targets, config.ignore or [])
            schemes[module] = targets[match_targets(module, linear, targets)[0]] if hit else None
    return schemes


def row_of(wanted: str) -> str:
    """``vLLM 0.27.0+`` for ``vllm@0.32.0``: the row of this version, whatever its borders are."""
    (loader,) = find_loaders(wanted)
    return f"{loader.name} {loader.versions}"
