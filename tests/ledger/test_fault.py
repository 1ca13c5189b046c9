"""Faults that differ in the place only are one, with the first place."""

from __future__ import annotations

from rewrite.ledger.fault import Fault, is_finite, merged


def test_what_is_alike_is_counted_together() -> None:
    found = [Fault("label", "a", "x", count=2), Fault("label", "b", "y"), Fault("label", "c", "x")]
    assert list(merged(found)) == [Fault("label", "a", "x", count=3), Fault("label", "b", "y")]


def test_which_scales_are_numbers() -> None:
    bad = [Fault("scale-value", "a", found) for found in ("NaN (2 times)", "nan", "inf and 3 more", "-inf")]
    good = [Fault("scale-value", "a", "0.0"), Fault("scale-size", "a", "inf")]
    assert not any(map(is_finite, bad)) and all(map(is_finite, good))
