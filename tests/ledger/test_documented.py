"""Every code of a fault is documented, with what a program needs to know of it."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

import rewrite
from rewrite.ledger.fault import NOTES, REFUSED, TITLES, Code, Fault
from rewrite.planning.repairs import MENDED

README = Path(rewrite.__file__).parent / "ledger" / "README.md"


def row(code: Code) -> str:
    """Its line of the table in README.md."""
    treated = "mended" if code in MENDED else "refused" if code in REFUSED else "-"
    kind = "a note" if code in NOTES else Fault(code, "").severity
    return f"| `{code}` | {TITLES[code] or 'what was found says it'} | {kind} | {treated} |"


def test_every_code_has_its_words() -> None:
    """The type and the table name the same."""
    assert set(get_args(Code)) == TITLES.keys()


@pytest.mark.parametrize("code", TITLES)
def test_every_code_is_documented(code: Code) -> None:
    """As it is in the code: what it means, how bad it is, what `convert` does."""
    assert row(code) in README.read_text(encoding="utf-8").splitlines()


def test_nothing_else_is_documented() -> None:
    """No row of a code that is gone."""
    documented = [line for line in README.read_text(encoding="utf-8").splitlines() if line.count("|") == 5]
    assert len(documented) == len(TITLES) + 2  # the head and the line below it
