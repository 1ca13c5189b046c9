"""Versions of engines, compared, and a range of them."""

from __future__ import annotations

import re
from dataclasses import dataclass


def version_key(version: str) -> tuple[int, ...]:
    """0.5.10 < 0.5.10.post1 < 0.5.11."""
    return tuple(int(number) for number in re.findall(r"\d+", version))


@dataclass(frozen=True)
class Engine:
    """An engine in a range of released versions. ``last`` None: to the newest that was run, and later ones, which are
    assumed to be like it. ``source``: the runs."""

    name: str
    first: str
    last: str | None
    source: str

    @property
    def versions(self) -> str:
        return self.versions_from(self)

    def versions_from(self, earlier: Engine) -> str:
        """The versions of ``earlier`` and of all ranges up to this one, in words."""
        if self.last is None:
            return f"{earlier.first}+"
        return self.last if earlier.first == self.last else f"{earlier.first} to {self.last}"

    def covers(self, version: str) -> bool:
        return version_key(self.first) <= version_key(version) and (
            self.last is None or version_key(version) <= version_key(self.last)
        )
