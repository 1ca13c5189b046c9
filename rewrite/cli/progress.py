"""What a person sees while a long command runs, and what one that is interrupted can say."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import rewrite
from rewrite.integrations.remote import RemoteStorage


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Bar]:
    """A bar in bytes on stderr; one that shows nothing without a terminal."""
    if quiet or not sys.stderr.isatty():
        yield Bar()
        return
    from rich import progress as rich  # 20 ms that a run without a terminal need not pay
    from rich.console import Console

    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.DownloadColumn(),
        rich.TransferSpeedColumn(),
    )
    shown = rich.Progress(*columns, rich.TimeRemainingColumn(), console=Console(stderr=True), transient=True)
    try:
        yield Bar(shown)
    finally:
        shown.stop()


@contextmanager
def reading_bar(storage: rewrite.Storage) -> Iterator[None]:
    """A bar of the bytes that came over a network, on a terminal."""
    with progress_bar(quiet=not isinstance(storage, RemoteStorage)) as bar:
        show = bar.show
        if show is not None and isinstance(storage, RemoteStorage):
            storage.traffic.watch = lambda done: show(done, 0)
        yield


class Bar:
    """A bar in bytes with the name of what is done, or nothing. ``show`` is the Progress of a call; None for none."""

    def __init__(self, shown: Any = None) -> None:
        self._shown = shown
        self._task = None if shown is None else shown.add_task("", total=None)
        self.show: rewrite.Progress | None = None if shown is None else self._show

    def _show(self, done: int, total: int) -> None:
        self._shown.start()  # not before: notes are printed until then, and would run into it
        self._shown.update(self._task, completed=done, total=total or None)

    def name(self, doing: str) -> None:
        """Say what is done from now on."""
        if self._shown is not None:
            self._shown.start()
            self._shown.update(self._task, description=doing)


class Completed:
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
        return f"Completed: {said}. The remaining checks did not run: OUT is not verified."
