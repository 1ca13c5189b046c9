"""Every checkpoint of the zoo, written by real producers: inspect, convert and verify agree on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewrite import Selection
from tests.test_recipes import disagreements
from tests.zoo.rebuild import ENTRIES, names, rebuild

_MAX_BYTES = 6_000_000


@pytest.mark.slow
@pytest.mark.parametrize("selection", ["qkvz", "all"])
@pytest.mark.parametrize("name", names())
def test_inspect_convert_and_verify_agree(name: str, selection: Selection, tmp_path: Path) -> None:
    """What inspect says of a profile is what convert does, and verify agrees with what convert wrote."""
    assert not disagreements(rebuild(name, tmp_path / "IN"), selection, tmp_path)


def test_rebuilt_twice_is_the_same(tmp_path: Path) -> None:
    name = names()[0]
    first, second = (rebuild(name, tmp_path / each) for each in ("a", "b"))
    for path in first.rglob("*"):
        assert path.is_dir() or path.read_bytes() == (second / path.relative_to(first)).read_bytes()


def test_the_zoo_is_small() -> None:
    assert len(names()) >= 40
    assert sum(path.stat().st_size for path in ENTRIES.rglob("*") if path.is_file()) <= _MAX_BYTES
