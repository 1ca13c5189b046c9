"""The tensors of a checkpoint as digests, to compare outputs that need not lie on disk at the same time."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, BinaryIO

_BUFFER = 1 << 20

#: name → dtype, shape, digest of the bytes; which shard a tensor lies in, and where, is each writer's own choice
Digests = dict[str, tuple[str, tuple[int, ...], str]]


def digest(directory: Path) -> Digests:
    """Every tensor of every shard, a buffer at a time."""
    result: Digests = {}
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(length))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                start, end = entry["data_offsets"]
                file.seek(8 + length + start)
                result[name] = (entry["dtype"], tuple(entry["shape"]), _digest(file, end - start))
    return result


def differences(one: Digests, other: Digests) -> list[str]:
    """Names of the tensors that are not the same in both."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def _digest(file: BinaryIO, left: int) -> str:
    total = hashlib.sha256()
    while left:
        data = file.read(min(left, _BUFFER))
        if not data:
            raise ValueError(f"{file.name} ends early")
        total.update(data)
        left -= len(data)
    return total.hexdigest()
