"""Strips an export to what the tests need: small files, headers, and every tensor but the weights."""

from __future__ import annotations

import json
import re
import shutil
import struct
from pathlib import Path
from typing import Any

from tests.zoo.rebuild import ENTRIES, FILES, INDEX, SMALL, nbytes, rebuild

#: Of these a checkpoint of the zoo has none: nothing reads them here, and they are the same in all.
_LEFT_OUT = re.compile(r"token|special|vocab|merges|chat_template|preprocessor|\.(pt|bin|log|png|html|csv)$")
_MAX_FILE = 64 * 1024
_MAX_KEPT = 64 * 1024
#: Weights, by the last part of the name: everything else (scales, zero points, norms, biases) is kept.
_WEIGHTS = re.compile(r"(^|[._])(weight|weight_packed|qweight|qdata|experts\.\w+_proj|down_proj|gate_up_proj|packed)$")
_TINY = 512


def strip(full: Path, about: dict[str, Any], entries: Path = ENTRIES) -> Path:
    """Write the entry of an export, and check that it is rebuilt with the same headers and the same kept tensors."""
    out = entries / full.name
    shutil.rmtree(out, ignore_errors=True)
    (out / FILES).mkdir(parents=True)
    left_out = []
    for path in sorted(full.rglob("*")):
        if not path.is_file() or path.suffix == ".safetensors":
            continue
        relative = path.relative_to(full)
        if _LEFT_OUT.search(path.name) or path.stat().st_size > _MAX_FILE:
            left_out.append(str(relative))
            continue
        (out / FILES / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, out / FILES / relative)
    shards, small, replaced = [], [], 0
    for path in sorted(full.rglob("*.safetensors")):
        shard, kept = _read_shard(path)
        shards.append({"name": str(path.relative_to(full)), **shard})
        small += kept
        replaced += sum(nbytes(dtype, shape) for _, dtype, shape, is_kept in shard["tensors"] if not is_kept)
    (out / SMALL).write_bytes(b"".join(small))
    value = {**about, "replaced": f"weights of {replaced} bytes, by seeded random ones", "left_out": left_out}
    (out / INDEX).write_text(_text(value, shards), encoding="utf-8")
    _check(full, out)
    return out


def _read_shard(path: Path) -> tuple[dict[str, Any], list[bytes]]:
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    value = json.loads(raw[8 : 8 + size])
    metadata = value.pop("__metadata__", None)
    in_order = sorted(value.items(), key=lambda item: item[1]["data_offsets"])
    tensors, kept = [], []
    for name, info in in_order:
        start, stop = (8 + size + offset for offset in info["data_offsets"])
        is_kept = not _is_weight(name, info["shape"], stop - start)
        if is_kept:
            kept.append(raw[start:stop])
        tensors.append([name, info["dtype"], info["shape"], is_kept])
    return {"metadata": metadata, "tensors": tensors}, kept


def _is_weight(name: str, shape: list[int], size: int) -> bool:
    return size > _MAX_KEPT or (len(shape) > 1 and size > _TINY and _WEIGHTS.search(name) is not None)


def _text(value: dict[str, Any], shards: list[dict[str, Any]]) -> str:
    """JSON with a line for each tensor."""
    lines = [json.dumps(value, indent=1)[:-2] + ',\n "shards": [']
    for shard in shards:
        rows = ",\n  ".join(json.dumps(tensor, separators=(",", ":")) for tensor in shard["tensors"])
        head = json.dumps({"name": shard["name"], "metadata": shard["metadata"]})[:-1]
        lines.append(f'  {head}, "tensors": [\n  {rows}\n  ]}}{"" if shard is shards[-1] else ","}')
    return "\n".join([*lines, " ]\n}\n"])


def _check(full: Path, out: Path) -> None:
    """The rebuilt checkpoint has the producer's headers to the byte, and its kept tensors."""
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        made = rebuild(out.name, Path(scratch) / "made", out.parent)
        for path in full.rglob("*.safetensors"):
            old, new = path.read_bytes(), (made / path.relative_to(full)).read_bytes()
            (size,) = struct.unpack("<Q", old[:8])
            if len(old) != len(new) or old[: 8 + size] != new[: 8 + size]:
                raise ValueError(f"{out.name}: {path.name} is not rebuilt with its header")
            for name, info in json.loads(old[8 : 8 + size]).items():
                if name != "__metadata__":
                    start, stop = (8 + size + offset for offset in info["data_offsets"])
                    if not _is_weight(name, info["shape"], stop - start) and old[start:stop] != new[start:stop]:
                        raise ValueError(f"{out.name}: {name} is not rebuilt")
