"""Editing JSON files without disturbing what is not edited: number spelling, order and spacing stay as they were."""

from __future__ import annotations

import json
import re
from typing import Any

_SPACE = re.compile(r"[ \t\n\r]*")
_SURROGATE = re.compile("[\ud800-\udfff]")
_DECODER = json.JSONDecoder()


def replace_value(text: str, path: tuple[str, ...], value: Any) -> str:
    """``text`` with the value at ``path`` (keys of nested objects) replaced; everything outside it is untouched.

    ``text`` must be a valid JSON object without duplicate keys that has ``path``.
    """
    start, end = _find(text, path)
    indent = _indent_of(text)
    new = _dumps(value, text.isascii(), indent=indent, separators=None if indent else _separators(text))
    begin = text[:start] + new.replace("\n", "\n" + _line_indent(text, start))
    return text.replace(text[:end], begin, 1)  # no copy of what comes behind: an index may be 100 MB


def append_value(text: str, key: str, value: Any) -> str:
    """``text``, a JSON object, with one more member at its end."""
    end = text.rindex("}")
    body = text[:end].rstrip()
    indent = _indent_of(text)
    comma = "" if body.endswith("{") else ","
    unit = indent or ""
    new = json.dumps(value, indent=indent, ensure_ascii=text.isascii()).replace("\n", "\n" + unit)
    gap = f"\n{unit}" if unit else ""
    return f"{body}{comma}{gap}{json.dumps(key)}: {new}{text[len(body) : end]}{text[end:]}"


def remove_member(text: str, path: tuple[str, ...]) -> str:
    """``text`` without the member at ``path`` and the comma that goes with it; everything else is untouched."""
    end = _find(text, path)[1]
    parent = _find(text, path[:-1])[0]
    begin = _member(text, parent, path[-1])[0]
    after = _skip(text, end)
    if text[after] == ",":
        return text[:begin] + text[_skip(text, after + 1) :]
    before = len(text[:begin].rstrip(" \t\n\r"))
    if text[before - 1] == ",":
        return text[: before - 1] + text[end:]
    return text[:before] + text[after:]


def dump(value: Any) -> str:
    """A JSON document of our own, for people and machines: two spaces, a final newline."""
    return _dumps(value, False, indent=2) + "\n"


def _dumps(value: Any, ascii_only: bool, **layout: Any) -> str:
    """JSON that can be written as UTF-8: half a surrogate pair (an undecodable file name) stays an escape."""
    text = json.dumps(value, ensure_ascii=ascii_only, **layout)
    return text if not _SURROGATE.search(text) else json.dumps(value, **layout)


def _find(text: str, path: tuple[str, ...]) -> tuple[int, int]:
    """The span of the value at ``path``."""
    start = _skip(text, 0)
    for key in path:
        start = _member(text, start, key)[1]
    return start, _DECODER.raw_decode(text, start)[1]


def _member(text: str, start: int, key: str) -> tuple[int, int]:
    """Where ``key`` and its value begin in the object that begins at ``start``."""
    at = _skip(text, start + 1)
    while text[at] == '"':
        begin = at
        name, at = _DECODER.raw_decode(text, at)
        value = _skip(text, _skip(text, at) + 1)  # past the colon
        if name == key:
            return begin, value
        at = _skip(text, _DECODER.raw_decode(text, value)[1])
        at = _skip(text, at + 1)  # past the comma, or beyond the brace
    raise KeyError(key)


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _indent_of(text: str) -> str | None:
    """The indentation unit of a document, or None for one that is written on one line."""
    found = re.match(r"\s*\{\r?\n([ \t]+)", text)
    return found.group(1) if found else None


def _line_indent(text: str, at: int) -> str:
    line = text[text.rfind("\n", 0, at) + 1 : at]
    return line[: len(line) - len(line.lstrip(" \t"))]


def _separators(text: str) -> tuple[str, str] | None:
    return (",", ":") if '": ' not in text else None
