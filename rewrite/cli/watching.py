"""What a person sees while a long command runs, and what one that is interrupted can say."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import rewrite


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Bar]:
    """A bar in bytes on stderr; one that shows nothing without a terminal."""
    if quiet or not sys.stderr.isatty():
        yield Bar()
        return
    from tqdm import tqdm  # 20 ms that a run without a terminal need not pay

    with tqdm(total=0, unit="B", unit_scale=True, leave=False, file=sys.stderr) as bar:
        yield Bar(bar)


class Bar:
    """A bar in bytes with the name of what is done, or nothing. ``show`` is the Progress of a call; None for none."""

    def __init__(self, bar: Any = None) -> None:
        self._bar = bar
        self.show: rewrite.Progress | None = None if bar is None else self._show

    def _show(self, done: int, total: int) -> None:
        self._bar.total = total or None
        self._bar.update(done - self._bar.n)

    def name(self, doing: str) -> None:
        """Say what is done from now on."""
        if self._bar is not None:
            self._bar.set_description(doing)


class Shown:
    """The checks of a verification that have their verdict: what a run that is interrupted can say."""

    def __init__(self) -> None:
        self._checks: list[rewrite.Check] = []

    def following(self, bar: Bar) -> Callable[[str, rewrite.Check | None], None]:
        """What :func:`rewrite.verify` calls for each check."""

        def follow(name: str, check: rewrite.Check | None) -> None:
            bar.name(name)
            if check is not None:
                self._checks.append(check)

        return follow

    def __str__(self) -> str:
        if not self._checks:
            return "No check was completed: OUT is not verified."
        said = ", ".join(f"{check.name} {check.verdict}" for check in self._checks)
        return f"Completed: {said}. The other checks were not: OUT is not verified."
