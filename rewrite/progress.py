"""How far a long job has come: told to the caller in bytes, added up over threads."""

from __future__ import annotations

from collections.abc import Callable
from threading import Event, Lock

#: Called with bytes done and bytes in all, from several threads but never at once.
Progress = Callable[[int, int], object]


class Stopped(Exception):
    """Another thread failed, or the user interrupted: this one ends early."""


class Counter:
    """Adds up what all threads have done. After ``stop`` is set, each of them ends at its next step."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total, self._progress = total, progress
        self._done = 0
        self._lock = Lock()
        self.stop = Event()

    def advance(self, count: int) -> None:
        """``count`` more bytes are done. Raises :class:`Stopped` once the job was stopped."""
        if self.stop.is_set():
            raise Stopped
        with self._lock:
            self._done += count
            if self._progress:
                self._progress(self._done, self._total)
