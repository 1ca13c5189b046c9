"""Every checkpoint of the zoo, through every command, profile and choice of groups.

``outcomes.json`` has what came of it. ``python -m tests.zoo`` writes it anew, and prints what must not be.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.zoo.rebuild import ENTRIES, names, rebuild
from tests.zoo.run import outcomes

OUTCOMES = Path(__file__).parent / "outcomes.json"
_MAX_BYTES = 6_000_000


@pytest.mark.slow
@pytest.mark.parametrize("name", names())
def test_entry(name: str, tmp_path: Path) -> None:
    """Exit codes are documented ones, what convert writes is verified, inspect's promises are kept, and nothing has
    changed since the table was written."""
    found, faults = outcomes(rebuild(name, tmp_path / "IN"), tmp_path)
    assert not faults, "\n".join(faults)
    assert found == json.loads(OUTCOMES.read_text())[name]


def test_rebuilt_twice_is_the_same(tmp_path: Path) -> None:
    name = names()[0]
    first, second = (rebuild(name, tmp_path / each) for each in ("a", "b"))
    for path in first.rglob("*"):
        assert path.is_dir() or path.read_bytes() == (second / path.relative_to(first)).read_bytes()


def test_the_zoo_is_small_and_every_entry_has_outcomes() -> None:
    assert sum(path.stat().st_size for path in ENTRIES.rglob("*") if path.is_file()) <= _MAX_BYTES
    assert sorted(json.loads(OUTCOMES.read_text())) == names()
