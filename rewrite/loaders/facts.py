"""What a fact about an engine is. All facts are in ``versions.py``, those about kernels in ``kernel_rules.py``.

What no fact says is not known: a model family, a format or a platform claims nothing until an engine was run with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from rewrite.loaders.ranges import version_key

Where = TypeVar("Where")
What = TypeVar("What")


@dataclass(frozen=True)
class Fact(Generic[Where, What]):
    """``outcome`` is what versions ``since`` to ``until`` (None: to the newest that was run, and later ones, which are
    assumed to be like it) make of that which it ``applies`` to."""

    engine: str
    since: str
    until: str | None
    applies: Where
    outcome: What
    source: str

    def holds(self, version: str) -> bool:
        begun = version_key(self.since) <= version_key(version)
        return begun and (self.until is None or version_key(version) <= version_key(self.until))


def held(facts: Iterable[Fact[Where, What]], engine: str, version: str) -> tuple[Fact[Where, What], ...]:
    """Those that are about a version."""
    return tuple(fact for fact in facts if fact.engine == engine and fact.holds(version))
