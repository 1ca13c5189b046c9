"""JSON files of strangers: read in bounded time and memory, without duplicate keys."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from rewrite.checkpoint.storage import Storage
from rewrite.errors import ConfigError, StorageError

MAX_TENSORS = 1_000_000  # of a checkpoint, at some 600 bytes of memory each; the largest known has 300,000
MAX_DEPTH = 64  # of nested values
_MAX_BRACKETS = 100_000
_MAX_TEXT = 1_000_000_000  # a file of which a few words are read
#: Strings, those that are keys with their colon, and brackets.
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"([ \t\r\n]*:)?|[][{}]', re.DOTALL)


@dataclass(frozen=True)
class Bound:
    """How large a file may be: in bytes, and in values."""

    size: int
    values: int


CONFIG_BOUND = Bound(10_000_000, 200_000)
INDEX_BOUND = Bound(100_000_000, MAX_TENSORS + 1000)


@dataclass(frozen=True)
class JsonFile:
    """A JSON file as text and as value: the text is what an edit must preserve."""

    name: str
    text: str
    value: dict[str, Any]


def read_json(storage: Storage, name: str, bound: Bound = CONFIG_BOUND) -> JsonFile:
    """The JSON object in the file ``name``.

    Raises :class:`ConfigError` for what is not one or is beyond ``bound``, and :class:`StorageError` for what cannot be
    read.
    """
    with storage.open(name) as file:
        size = file.file_id.size
        if size > bound.size:
            raise ConfigError(f"{name} is too large", where=name, expected=bound.size, found=size)
        raw = file.read(0, size + 1)
    if len(raw) != size:
        raise StorageError("A file changed while it was read", where=f"{storage}/{name}", expected=size, found=len(raw))
    # A value takes two bytes of text and a hundred of memory: counted before they are made.
    if raw.count(b"[") + raw.count(b"{") > _MAX_BRACKETS or raw.count(b",") > bound.values:
        raise ConfigError(
            f"{name} holds too many values",
            where=name,
            expected=f"at most {bound.values}, and {_MAX_BRACKETS} lists or objects",
        )
    return _parse_object(raw, name)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, for ``object_pairs_hook``. Raises :class:`ValueError` for a key that occurs twice."""
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value] # the set.add idiom
        raise ValueError(f"the key {twice!r} occurs twice")
    return result


def _unique_keys_shared_values(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = unique_keys(pairs)
    values = found.values()
    if set(map(type, values)) == {str}:  # an index names each shard thousands of times
        texts: dict[str, str] = {}
        return dict(zip(found, map(texts.setdefault, values, values), strict=True))
    return found


def read_members(storage: Storage, name: str, wanted: Collection[str], *, first: int = _MAX_TEXT) -> dict[str, Any]:
    """Of the JSON object in the file ``name`` the members ``wanted``, as far as they are strings or objects.

    For a file that names every layer, of which a few words are needed: nothing else of it becomes a value. Raises as
    :func:`read_json`, for what is wrong between the members. Only those in the ``first`` bytes are found.
    """
    with storage.open(name) as file:
        size = file.file_id.size
        if size > _MAX_TEXT:
            raise ConfigError(f"{name} is too large", where=name, expected=_MAX_TEXT, found=size)
        text = file.read(0, min(size, first)).decode("utf-8", errors="replace")
    found: dict[str, Any] = {}
    depth, key, begin = 0, None, 0
    for token in _TOKEN.finditer(text):
        kind = token[0][0]
        if kind in "[{":
            begin = token.start() if depth == 1 else begin
            depth += 1
        elif kind in "]}":
            depth -= 1
            if depth == 1 and kind == "}" and key in wanted:
                found[str(key)] = _parse_object(text[begin : token.end()].encode(), name).value
        elif depth == 1 and token[1]:  # a string before a colon
            key = _string(token[0].rstrip(": \t\r\n"), name)
            if key in found:
                raise ConfigError("A key stands twice", where=name, found=key)
        elif depth == 1 and kind == '"' and key in wanted:
            found[str(key)] = _string(token[0], name)
    if depth and size <= first:
        raise ConfigError(f"{name} is not valid JSON", where=name, found="brackets that do not fit each other")
    return found


def _string(raw: str, name: str) -> str:
    try:
        return str(json.loads(raw))
    except ValueError as error:
        raise ConfigError(f"{name} is not valid JSON: {error}", where=name, found=raw[:80]) from error


def _parse_object(raw: bytes, name: str) -> JsonFile:
    try:
        text = raw.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_unique_keys_shared_values)
    except (ValueError, RecursionError) as error:
        raise ConfigError("The file is not valid JSON", where=name, found=str(error)) from error
    if not isinstance(value, dict):
        raise ConfigError("The file does not hold a JSON object", where=name, expected="{…}", found=value)
    _check_depth(value, name)
    return JsonFile(name, text, value)


def _check_depth(value: Mapping[str, Any], name: str) -> None:
    """What parses may still be too deep to be copied or printed: that costs more stack."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        children = (child for node in level for child in (node.values() if isinstance(node, dict) else node))
        level = [child for child in children if isinstance(child, (dict, list))]
    if level:
        raise ConfigError("The file is nested too deep", where=name, expected=f"at most {MAX_DEPTH} levels")
