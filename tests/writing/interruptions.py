"""Ways to stop a conversion at any system call, and to see what it left behind."""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import rewrite

_OF_OS = (
    "open mkdir rename copy_file_range pread pwrite fsync fchmod chmod unlink rmdir close statvfs scandir stat utime"
)
#: Every system call through which rewrite/writing touches the disk.
CALLS: tuple[tuple[Any, str], ...] = (*((os, name) for name in _OF_OS.split()), (fcntl, "ioctl"))


def leftovers(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir() if path.name.startswith(f".{out.name}."))


def fork(action: Callable[[], object]) -> int:
    """Run ``action`` in a child and return its exit status; 0 when it returned."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


@contextmanager
def before_call(number: int, then: Callable[[], object]) -> Iterator[list[int]]:
    """Count the calls of :data:`CALLS`; at the given one, run ``then`` first. Yields a list of one: the count."""
    count = [0]
    originals = {call: getattr(*call) for call in CALLS}

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] == number:
                then()
            return original(*args, **kwargs)

        return call

    try:
        for (module, name), original in originals.items():
            setattr(module, name, counted(original))
        yield count
    finally:
        for (module, name), original in originals.items():
            setattr(module, name, original)


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def converter(source: Path, out: Path, **options: Any) -> Callable[[], object]:
    return lambda: rewrite.convert(source, out, workers=1, **options)


def count_calls(action: Callable[[], object]) -> int:
    with before_call(-1, kill_self) as count:
        action()
    return count[0]
