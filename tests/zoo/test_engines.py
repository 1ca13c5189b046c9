"""What engines were seen to make of the zoo is what inspect says: before a conversion, and after it.

``engines.json`` is recorded by ``scripts/evidence.sh search 0 --record``.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

import rewrite
from rewrite.loaders.outcome import Outcome
from rewrite.loaders.versions import find_loaders
from tests.zoo.rebuild import ENTRIES, names, rebuild

RECORD: dict[str, dict[str, dict[str, str]]] = json.loads((ENTRIES.parent / "engines.json").read_text())
SHOWS_NOTHING = ("nothing learnt", "no kernel on CPU")
_LARGEST_SHARE_NOT_KNOWN = 0.35


@pytest.mark.slow
@pytest.mark.parametrize("name", names())
def test_engines_do_what_inspect_says(name: str, tmp_path: Path) -> None:
    try:
        inspection = rewrite.inspect_checkpoint(rebuild(name, tmp_path / "IN"), selection="all")
    except rewrite.Refused:
        return  # nothing is said of it
    said = {row.engine: {"original": row.as_is, **row.converted} for row in inspection.rows}
    refused = any(fault.code == "scale-value" for fault in inspection.findings)  # no conversion keeps a NaN
    for profile, seen in RECORD[name].items():
        for spec, kind in seen.items():
            (loader,) = find_loaders(spec.replace("==", "@"))
            if refused and profile not in said[loader]:
                continue
            problem = _disagreement(said[loader][profile], kind)
            assert problem is None, f"{profile}, {spec}: {problem}"


def _disagreement(said: Outcome | None, seen: str) -> str | None:
    if seen in SHOWS_NOTHING or (said is not None and said.kind == "not known"):
        return None
    if said is None:
        return f"is said to be refused, and was loaded: {seen}"
    if said.kind == seen or (seen == "exact" and said.detail.startswith("the conversion rounds")):
        return None
    return f"predicted {said.kind}, seen {seen}"


def test_every_entry_was_loaded_as_it_is() -> None:
    """But those that rewrite refuses to read: nothing is predicted of these."""
    assert RECORD.keys() == set(names())
    lacking = [name for name, profiles in RECORD.items() if len(profiles.get("original", {})) < 3]
    assert not lacking


def test_most_loads_showed_something() -> None:
    seen = Counter(kind for profiles in RECORD.values() for own in profiles.values() for kind in own.values())
    assert sum(seen[kind] for kind in SHOWS_NOTHING) < _LARGEST_SHARE_NOT_KNOWN * seen.total()


def test_a_wrong_prediction_is_seen() -> None:
    assert _disagreement(Outcome("exact"), "garbled")
    assert _disagreement(Outcome("garbled"), "exact")
    assert _disagreement(None, "exact")
    assert _disagreement(Outcome("not known"), "garbled") is None
