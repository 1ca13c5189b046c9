"""A few members of a large JSON object: texts and objects, without a value for anything else."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewrite.checkpoint.bounded_json import read_members
from rewrite.checkpoint.local import LocalDirectory
from rewrite.errors import ConfigError


def members(text: str, tmp_path: Path, **options: int) -> dict[str, object]:
    (tmp_path / "a.json").write_text(text)
    return read_members(LocalDirectory(tmp_path), "a.json", ("text", "costs"), **options)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"text": "a", "costs": {"b.c": 0.5, "d": [1]}, "other": {"text": "e"}}', ("a", {"b.c": 0.5, "d": [1]})),
        ('{"other": {"costs": {"a": 1}}, "text": "costs", "costs": {}}', ("costs", {})),
        ('{"costs": [{"a": 1}], "text": {}}', ({}, None)),
        ('{"costs": 1, "other": {"a": 1}}', (None, None)),
    ],
)
def test_texts_and_objects(text: str, found: tuple[object, object], tmp_path: Path) -> None:
    """At the first level only; of a list, nothing."""
    value = members(text, tmp_path)
    assert (value.get("text"), value.get("costs")) == found


def test_the_first_bytes_only(tmp_path: Path) -> None:
    text = '{"costs": {"a": 0.5}, "other": [1, 2, 3], "text": "b"}'
    assert members(text, tmp_path, first=30) == {"costs": {"a": 0.5}}
    with pytest.raises(ConfigError, match="brackets"):
        members(text[:30], tmp_path)


def test_an_object_that_is_no_json(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not valid JSON"):
        members('{"costs": {"a": nothing}}', tmp_path)
