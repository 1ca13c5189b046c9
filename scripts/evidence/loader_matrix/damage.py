"""Damages a converted checkpoint on purpose: ``rewrite verify`` has to find it.

Only damage that changes what the checkpoint means is made: scales are changed to other values, and an entry of
``ignore`` or a target is dropped only where compressed-tensors' own matcher then finds another scheme for a module.
"""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Damage = Callable[[Path, random.Random], str | None]


@dataclass(frozen=True)
class _Place:
    """Where the bytes of a tensor lie."""

    shard: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    def read(self) -> bytes:
        return self.shard.read_bytes()[self.begin : self.end]

    def write(self, data: bytes) -> None:
        with self.shard.open("r+b") as file:
            file.seek(self.begin)
            file.write(data)


def damaged(source: Path, out: Path, seed: int) -> str | None:
    """Make a damaged copy of ``source`` at ``out``; what was done, None where the drawn kind is impossible."""
    chance = random.Random(seed)
    shutil.copytree(source, out)  # copies, no links: what is changed below is changed here only
    return chance.choice(DAMAGES)(out, chance)


def _places(folder: Path, suffixes: tuple[str, ...]) -> Iterator[_Place]:
    for shard in sorted(folder.glob("*.safetensors")):
        with shard.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        for name, entry in header.items():
            if name != "__metadata__" and name.endswith(suffixes):
                begin, end = (8 + length + offset for offset in entry["data_offsets"])
                if end > begin:
                    yield _Place(shard, name, entry["dtype"], tuple(entry["shape"]), begin, end)


def flip_scale(folder: Path, chance: random.Random) -> str | None:
    """Double or halve one value of a scale: the lowest bit of its exponent."""
    places = [place for place in _places(folder, (".weight_scale", ".input_scale")) if place.dtype in ("BF16", "F32")]
    if not places:
        return None
    place = chance.choice(places)
    data, width = bytearray(place.read()), 2 if place.dtype == "BF16" else 4
    data[chance.randrange(len(data) // width) * width + width - 2] ^= 0x80
    place.write(bytes(data))
    return f"one value of {place.name} changed"


def swap_scales(folder: Path, chance: random.Random) -> str | None:
    """Exchange the scales of two modules."""
    places = list(_places(folder, (".weight_scale",)))
    chance.shuffle(places)
    for number, one in enumerate(places):
        for other in places[number + 1 :]:
            if (one.dtype, one.shape) == (other.dtype, other.shape) and one.read() != other.read():
                first, second = one.read(), other.read()
                one.write(second)
                other.write(first)
                return f"{one.name} and {other.name} exchanged"
    return None


def flip_weight(folder: Path, chance: random.Random) -> str | None:
    """The sign bit of one FP8 value."""
    places = [place for place in _places(folder, (".weight",)) if place.dtype == "F8_E4M3"]
    if not places:
        return None
    place = chance.choice(places)
    data = bytearray(place.read())
    # 0 and -0 are the same weight, 0x7F and 0xFF both NaN
    meaning = [at for at, code in enumerate(data) if code & 0x7F not in (0, 0x7F)]
    if not meaning:
        return None
    data[chance.choice(meaning)] ^= 0x80
    place.write(bytes(data))
    return f"the sign of one value of {place.name} changed"


def drop_ignored(folder: Path, chance: random.Random) -> str | None:
    """An entry of ``ignore``, where some module was left alone because of it only."""
    return _drop(folder, chance, lambda config: [config["ignore"]])


def drop_target(folder: Path, chance: random.Random) -> str | None:
    """A target of a config group, where some module then has another scheme, or none."""
    return _drop(folder, chance, lambda config: [group["targets"] for group in config["config_groups"].values()])


def _drop(folder: Path, chance: random.Random, lists: Callable[[dict[str, Any]], list[list[str]]]) -> str | None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    quantization = config.get("quantization_config", {})
    if quantization.get("quant_method") != "compressed-tensors" or not all(map(len, lists(quantization))):
        return None
    before = _schemes(folder, quantization)
    places = [(number, entry) for number, own in enumerate(lists(quantization)) for entry in range(len(own))]
    chance.shuffle(places)
    for number, entry in places:
        changed = json.loads(json.dumps(quantization))
        gone = lists(changed)[number].pop(entry)
        if all(group["targets"] for group in changed["config_groups"].values()) and _schemes(folder, changed) != before:
            path.write_text(json.dumps({**config, "quantization_config": changed}, indent=2))
            return f"{gone} dropped from ignore or targets"
    return None


def _schemes(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """The scheme of each linear layer, by compressed-tensors' own matcher."""
    import torch
    from compressed_tensors.utils.match import is_match, match_targets

    linear = torch.nn.Linear(1, 1, device="meta")
    groups = {
        target: json.dumps([group.get("weights"), group.get("input_activations")])
        for group in config["config_groups"].values()
        for target in group["targets"]
    }
    found = {}
    for place in _places(folder, (".weight", ".weight_packed")):
        name = place.name.rpartition(".")[0]
        linear_like = len(place.shape) == 2 and "embed" not in name
        if linear_like and is_match(name, linear, groups, config["ignore"]):
            found[name] = groups[match_targets(name, linear, groups)[0]]
    return found


DAMAGES: tuple[Damage, ...] = (flip_scale, swap_scales, flip_weight, drop_ignored, drop_target)
