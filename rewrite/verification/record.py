"""The manifest of OUT: what it says was changed is what lies there. Numbers are read from the tensors once more."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from math import frexp
from typing import Any

import numpy as np

from rewrite.card import README_NAME
from rewrite.checkpoint.checkpoint import Checkpoint
from rewrite.checkpoint.header import TensorInfo
from rewrite.errors import RewriteError
from rewrite.quantization.groups import Module
from rewrite.verification.expected import MANIFEST_NAME, Expected
from rewrite.verification.nvfp4 import multiplier, rescaled, same_bytes
from rewrite.verification.packed import PackedLayer
from rewrite.verification.values import Values, decode

_MOST_VALUES = 20_000_000  # of a file with an entry for every one of a million tensors
_RESCALING = 1 / 17  # of what a block scale should be: half of the last of three mantissa bits
_FILTERS = 2.0**-8  # half of the last place of a BF16 filter
_FEW = 20  # problems that are looked for


def record_problems(source: Checkpoint, out: Checkpoint, expected: Expected) -> list[str]:
    """Where the manifest says what is not so. None: nothing is said of this conversion, as there is no manifest, or it
    came along with IN."""
    if MANIFEST_NAME not in out.files:
        return []
    text = _read(out)
    if MANIFEST_NAME in source.files and _read(source) == text:
        return []
    record = _Record(source, out, expected)
    try:
        if text.count(b"[") + text.count(b"{") + text.count(b",") > _MOST_VALUES:
            raise ValueError("more values than a checkpoint has tensors")
        value = json.loads(text, object_hook=record.each)
        found = [*record.problems, *islice(record.all_in_all(value), _FEW)]
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError, RewriteError) as error:
        found = [f"not a manifest of rewrite: {type(error).__name__} {error}"]
    return [f"{MANIFEST_NAME}: {problem}" for problem in found]


def _read(checkpoint: Checkpoint) -> bytes:
    with checkpoint.storage.open(MANIFEST_NAME) as file:
        return file.read(0, file.file_id.size)


class _Record:
    """A manifest while it is read: the entries of tensors are compared one by one, and forgotten."""

    def __init__(self, source: Checkpoint, out: Checkpoint, expected: Expected) -> None:
        self._source, self._out, self._expected = source, out, expected
        self._modules = {module.name: module for group in expected.groups for module in group.modules}
        self._named: set[str] = set()
        self.problems: list[str] = []

    def each(self, value: dict[str, Any]) -> Any:
        """Called with each object, from the innermost one on."""
        if value.keys() != {"tensor", "shard", "before", "after"}:
            return value
        self._named.add(value["tensor"])
        if len(self.problems) < _FEW and (wrong := self._wrong(value)):
            self.problems.append(f"{value['tensor']}: {wrong}")
        return None

    def all_in_all(self, value: Mapping[str, Any]) -> Iterator[str]:
        """What is said of tensors by name, and of files."""
        old, new, renamed = self._source.tensors, self._out.tensors, self._expected.renamed
        changed = {n for n in old.keys() & new.keys() if (old[n].dtype, old[n].shape) != (new[n].dtype, new[n].shape)}
        yield from (
            f"{name}: changed, and is not named" for name in sorted(changed - self._named - self._expected.moved)
        )
        gone = {name for name in old if renamed.get(name, name) not in new}
        for key, wanted in (("dropped", gone), ("renamed", {k: v for k, v in renamed.items() if v in new})):
            said: Any = value[key] if key == "renamed" else set(value[key])
            if said != wanted:
                yield f"{key}: {len(said)} tensors, not the {len(wanted)} of OUT"
        files = {each["name"]: each for each in value["files"]}
        if (files.keys() ^ self._out.files.keys()) - {MANIFEST_NAME, README_NAME}:  # a card is added later
            yield "files: other names than those of OUT"
        for name, each in files.items():
            if name == README_NAME:
                continue
            copied, there = not each["rewritten"], self._out.files.get(name)
            if there is not None and (copied or name in self._out.shards) and each["size"] != there.size:
                yield f"files: {name}: {each['size']} bytes, not {there.size}"
            if copied and (name not in self._source.files or self._source.files[name].size != each["size"]):
                yield f"files: {name}: is said to be a copy, and is none"
        for key, known in (("profile", self._expected.profiles), ("selection", ("all", "qkvz"))):
            if value[key] not in known:
                yield f"{key}: none of rewrite's"
        yield from self._global_scales(value.get("global_scales", []), value.get("costs", {}))

    def _wrong(self, value: Mapping[str, Any]) -> str | None:
        """What an entry says that is not so. That OUT carries the scales of IN is compared by the weights."""
        name = value["tensor"]
        old, new = self._source.tensors.get(name), self._out.tensors.get(name)
        module = self._modules.get(name.rpartition(".")[0])
        if module is None or old is None or new is None or (old.dtype, old.shape) == (new.dtype, new.shape):
            return "did not change"
        before, after = value["before"], value["after"]
        forms = [(each["dtype"], tuple(each["shape"])) for each in (before, after)]
        if value["shard"] != old.shard or forms != [(old.dtype, old.shape), (new.dtype, new.shape)]:
            return f"was {old.dtype} {list(old.shape)} in {old.shard} and is {new.dtype} {list(new.shape)}"
        scales = self._scales(module)
        if not before["scales"] and (scales is None or scales.size == module.weight.shape[0]):
            scales = None  # a scale for each row or block: none is listed
        if (scales is None) != (not before["scales"]) or not _is_tiled(after["partitions"], module, scales):
            return "other scales or rows than those of IN"
        return (
            None if scales is None or set(before["scales"]) == set(scales.tolist()) else "other scales than those of IN"
        )

    def _scales(self, module: Module) -> Values | None:
        """The scale of each row of IN; None where one is for a part of a row."""
        scale = module.scale or module.block_scale
        if scale is None or (scale.numel not in (1, len(module.partitions), module.weight.shape[0])):
            return None
        values = decode(scale.dtype, np.frombuffer(self._source.read_tensor(scale.name), np.uint8))
        rows = [partition.rows for partition in module.partitions]
        each = np.broadcast_to(values, len(rows)) if values.size == 1 else values
        return np.repeat(each, rows) if each.size == len(rows) else each

    def _global_scales(self, stated: list[dict[str, Any]], costs: Mapping[str, float]) -> Iterator[str]:
        layers = {layer.name: layer for layer in self._expected.packed}
        if sorted(each["name"] for each in stated) != sorted(layers):
            yield f"global_scales: names {len(stated)} layers, not the {len(layers)} that differ in IN"
            return
        largest: dict[str, float] = {}
        for each in stated:
            layer, how = layers[each["name"]], each["how"]
            old = {module.name: multiplier(self._source, module) for module in layer.modules}
            new = multiplier(self._out, layer.modules[0])
            ratios = {name: value / new for name, value in old.items() if value != new}
            near = each["ratios"].keys() == ratios.keys() and all(
                abs(each["ratios"][name] / ratio - 1) < 2.0**-22 for name, ratio in ratios.items()
            )
            kept = old.get(each["kept"], new if how == "activations" else None)
            if not near or kept != new or not self._is_how(how, layer, old, new):
                yield f"global_scales: {layer.name}: says {how}, {each['kept']}, {each['ratios']}, found {ratios}"
            cost, kind = _cost(how, layer, ratios.values()), _kind(layer.name)
            if cost:
                largest[kind] = max(cost, largest.get(kind, 0.0))
        said: dict[str, float] = {}
        for name, cost in costs.items():
            said[name.partition(".")[0]] = max(cost, said.get(name.partition(".")[0], 0.0))
        if said != largest or not set(costs.values()) <= set(largest.values()):
            yield f"costs: says {dict(costs)}, what was done costs {largest}"

    def _is_how(self, how: str, layer: PackedLayer, old: Mapping[str, float], new: float) -> bool:
        """Whether the block scales are those of IN, or, where they are said to be rescaled, what this makes of them:
        they may be those of IN then, too."""
        if how != "rescaled":
            return all(same_bytes(self._source, self._out, module.blocks) for module in layer.modules)
        moved = [module for module in layer.modules if old[module.name] != new]
        return not any(problem for m in moved for problem in rescaled(m, self._source, self._out, old[m.name], new))


def _cost(how: str, layer: PackedLayer, ratios: Iterable[float]) -> float:
    """What a weight may be off by: half of the last place of a block scale, or of a BF16 filter that took a ratio."""
    if how == "rescaled":
        return _RESCALING
    rounds = how == "folded" and isinstance(layer.behind, TensorInfo)
    return _FILTERS if rounds and any(frexp(ratio)[0] != 0.5 for ratio in ratios) else 0.0


def _kind(layer: str) -> str:
    """``gate_up_proj``, or ``experts``."""
    parent, _, last = layer.rpartition(".")
    return parent.rpartition(".")[2] if last.isdigit() else last


def _is_tiled(partitions: list[dict[str, Any]], module: Module, scales: Values | None) -> bool:
    """Whether the partitions are all rows of the module in order, with the scale of each."""
    at = 0
    for each in partitions:
        start, stop = each["rows"]
        carried = {None} if scales is None else set(scales[start:stop].tolist())
        if start != at or (stop > start and carried != {each["scale"]}):
            return False
        at = stop
    return at == module.weight.shape[0] or (scales is None and not partitions)
