"""Check 2: every tensor and file that a conversion must not change is byte for byte the same."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from rewrite.card import README_NAME
from rewrite.checkpoint.bounded_json import JsonFile
from rewrite.checkpoint.checkpoint import CONFIG_NAME, INDEX_NAME, Checkpoint, Shard
from rewrite.checkpoint.header import TensorInfo
from rewrite.errors import Refused
from rewrite.verification.configs import (
    KV_CACHE,
    PLACES,
    QUANT_FILE_NAME,
    dialect_key,
    path_of,
    quantization_of,
    stated_by,
    value_at,
)
from rewrite.verification.expected import MANIFEST_NAME, Expected
from rewrite.verification.reading import Reading
from rewrite.verification.readme import carded
from rewrite.verification.result import CARD_REMARK, Check, judge

CONFIG_COPY_NAME = "quantization_config.json"
_MAY_CHANGE = {CONFIG_NAME, INDEX_NAME, QUANT_FILE_NAME, MANIFEST_NAME}


def same_tensors(shard: Shard, out: Checkpoint, expected: Expected) -> Iterator[tuple[TensorInfo, TensorInfo]]:
    """The tensors of a shard of IN that must be the same bytes in OUT. Missing or reshaped ones are another check's."""
    for old in shard.header.tensors:
        new = out.tensors.get(expected.renamed.get(old.name, old.name))
        if new is None or old.name in expected.recomputed or new.shard != shard.name or new.nbytes != old.nbytes:
            continue
        if new.dtype == old.dtype and (new.shape == old.shape or old.name in expected.moved):
            yield old, new


def same_files(source: Checkpoint, out: Checkpoint) -> Iterator[str]:
    """The names of the files, besides the shards, that must be the same bytes."""
    others = source.files.keys() - source.shards.keys() - _MAY_CHANGE
    for name, file in source.files.items():
        if name in others and name in out.files and out.files[name].size == file.size:
            yield name


def check_untouched(source: Checkpoint, out: Checkpoint, expected: Expected, reading: Reading) -> Check:
    """All tensors that may not change, all other files, and all of config and index but the edits. ``reading`` is what
    the pass over the files found."""
    card = carded(source, out)
    judged_apart = set() if card is None else {README_NAME}
    problems = [*_files(source, out, judged_apart), *_json_edits(source, out, expected)]
    same = [name for name in same_files(source, out) if name not in judged_apart]
    tensors, size = 0, sum(source.files[name].size for name in same)
    remark = ""
    if card is not None:
        problems += [card.problem] if card.problem else []
        size, remark = size + card.same, CARD_REMARK
    for shard in source.shards.values():
        for old, _ in same_tensors(shard, out, expected):
            tensors, size = tensors + 1, size + old.nbytes
            if old.name in reading.tensors:
                problems.append(f"{shard.name}: {old.name} differs at byte {reading.tensors[old.name]}")
    for name in same:
        if name in reading.files:
            problems.append(f"{name}: differs at byte {reading.files[name]}")
    return judge("untouched", problems, f"{tensors} tensors and all other files, {size:,} bytes, are the same{remark}")


def _files(source: Checkpoint, out: Checkpoint, judged_apart: set[str]) -> Iterator[str]:
    for name in source.files:
        contradicts = _contradicts(name, source, out)
        if name in out.files and contradicts:
            yield f"{name}: contradicts the quantization that config.json states now, and must be gone"
        elif name not in out.files and contradicts is False:
            yield f"{name}: missing"
    for name in sorted(out.files.keys() - source.files.keys() - {MANIFEST_NAME} - judged_apart):
        yield f"{name}: not in the source"
    for name in sorted((source.files.keys() & out.files.keys()) - source.shards.keys() - _MAY_CHANGE - judged_apart):
        if source.files[name].size != out.files[name].size:
            yield f"{name}: {source.files[name].size} bytes became {out.files[name].size}"
    for shard in source.shards.values():
        other = out.shards.get(shard.name)
        if other is not None and other.header.metadata != shard.header.metadata:
            yield f"{shard.name}: the metadata differs"


def _contradicts(name: str, source: Checkpoint, out: Checkpoint) -> bool | None:
    """Whether a file states what config.json states no more: ModelOpt's own, of another dialect, or AutoRound's copy.
    None: it does not say of which dialect it is, and may stay or be gone."""
    if name not in (QUANT_FILE_NAME, CONFIG_COPY_NAME):
        return False
    old, new = quantization_of(source), quantization_of(out)
    if new == old or name == CONFIG_COPY_NAME:
        return new != old
    try:
        file = source.read_json(QUANT_FILE_NAME)
        stated = old if file is None else stated_by(file)
    except Refused:
        stated = old  # it states nothing
    if dialect_key(new) != dialect_key(old) or dialect_key(new) == dialect_key(stated):
        return dialect_key(new) != dialect_key(old)
    return None if stated.get("quant_algo") is None else True


def _json_edits(source: Checkpoint, out: Checkpoint, expected: Expected) -> Iterator[str]:
    """All of config.json but the quantization, all of the index but ``total_size``, key order included."""
    strip = _without_any_quantization if expected.promise.nothing_quantized else _without_quantization
    if strip(source.config) != strip(out.config):
        yield f"{CONFIG_NAME}: differs outside quantization_config"
    old_file, new_file = (checkpoint.read_json(QUANT_FILE_NAME) for checkpoint in (source, out))
    may_differ = ("exclude_modules", "quantized_layers", *(KV_CACHE if expected.kv_dropped else ()))
    if old_file and new_file and _without(may_differ, old_file) != _without(may_differ, new_file):
        yield f"{QUANT_FILE_NAME}: differs outside its lists of layers"
    if (source.index is None) != (out.index is None):
        yield f"{INDEX_NAME}: only one of the two checkpoints has it"
    elif source.index and out.index:
        # Whether a tensor may be gone is the structure's question.
        gone = source.tensors.keys() - out.tensors.keys() - expected.renamed.keys()
        if _index_text(source.index, gone, expected.renamed) != _index_text(out.index, frozenset(), {}):
            yield f"{INDEX_NAME}: differs outside metadata.total_size"


def _without_quantization(file: JsonFile) -> str:
    """The config without the value that states the quantization; without its key, too, where it stands last."""
    value: dict[str, Any] = json.loads(file.text)
    path = path_of(value)
    if path is not None:
        inner = value
        for key in path[:-1]:
            inner = inner[key]
        last = next(reversed(inner)) == path[-1]
        inner[path[-1]] = None
        if last:
            del inner[path[-1]]
    return json.dumps(value)


def _without_any_quantization(file: JsonFile) -> str:
    """The config without the keys that state a quantization: OUT must have none of them, which structure asks."""
    value: dict[str, Any] = json.loads(file.text)
    for *parents, last in PLACES:
        inner = value_at(value, tuple(parents))
        if isinstance(inner, dict) and isinstance(inner.get(last), dict):
            del inner[last]
    return json.dumps(value)


def _without(keys: Iterable[str], file: JsonFile) -> str:
    """Without some settings, such as the quantized layers: whether these are right is the structure's question."""
    value: dict[str, Any] = json.loads(file.text)
    if isinstance(stated := value.get("quantization"), dict):
        for name in keys:
            stated.pop(name, None)
    return json.dumps(value)


def _index_text(file: JsonFile, gone: Collection[str], renamed: Mapping[str, str]) -> str:
    value: dict[str, Any] = json.loads(file.text)
    if isinstance(value.get("metadata"), dict):
        value["metadata"]["total_size"] = None
    weight_map = value["weight_map"].items()
    value["weight_map"] = {renamed.get(name, name): shard for name, shard in weight_map if name not in gone}
    return json.dumps(value)
