"""Running a program and measuring it, the same way for everyone.

This process stays small and leaves all large work to others: a child's ``ru_maxrss`` begins with its parent's (`true`
had 330 MB after its parent had filled as much), so a parent with torch in it would lend its size to `cp`.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_DROP_CACHES = Path("/proc/sys/vm/drop_caches")
_BUFFER = 1 << 20


@dataclass(frozen=True)
class Run:
    """One run of a program. ``start`` is what it said that interpreter and imports took; 0 where it said nothing."""

    seconds: float
    start: float
    peak_bytes: int  # ru_maxrss: pages of mapped files count too
    output: str
    cpu: float = 0.0  # seconds of the processor: what others do at the same time counts less


class ProgramFailed(Exception):
    """A program that is measured did not end well."""


def run(
    command: Sequence[str | Path], *, synced: Path | None = None, timed_start: bool = False, findings: bool = False
) -> Run:
    """Run ``command``; the clock stops when its filesystem, that of ``synced``, has everything on disk.

    With ``timed_start`` the first line of its output is the time, on the monotonic clock, at which it began to work.
    ``findings``: status 1 is as good as 0, as of `rewrite inspect`, which found something then. Python may keep its
    bytecode, as it does for what is installed.
    """
    with tempfile.TemporaryFile("w+") as errors:
        started = time.monotonic()
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        process = subprocess.Popen(list(command), stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
        output = process.stdout.read() if process.stdout else ""
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if synced is not None:
            subprocess.run(["sync", "-f", synced], check=True)
        seconds = time.monotonic() - started
        if process.returncode not in ((0, 1) if findings else (0,)):
            errors.seek(0)
            raise ProgramFailed(f"{' '.join(map(str, command))} ended with {process.returncode}:\n{errors.read()}")
    start = float(output.split(maxsplit=1)[0]) - started if timed_start else 0.0
    return Run(seconds, start, usage.ru_maxrss * 1024, output, usage.ru_utime + usage.ru_stime)


def python(module: str, *arguments: str | Path) -> list[str | Path]:
    return [sys.executable, "-m", module, *arguments]


def can_drop_caches() -> bool:
    return os.access(_DROP_CACHES, os.W_OK)


def start_even(*, cold: bool) -> None:
    """Nobody inherits dirty pages from the run before; when cold, nobody finds a file in memory either."""
    os.sync()
    if cold:
        _DROP_CACHES.write_text("3", encoding="ascii")


def read_through(directory: Path) -> None:
    """Bring the files of ``directory`` into the page cache, as far as it holds them."""
    for path in filter(Path.is_file, directory.rglob("*")):
        with path.open("rb", buffering=0) as file:
            while file.read(_BUFFER):
                pass


def machine(directory: Path) -> str:
    """The facts that a reader needs to judge the numbers."""
    kind = subprocess.run(["df", "--output=fstype", directory], check=True, capture_output=True, text=True).stdout
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    cores = len(os.sched_getaffinity(0))
    return (
        f"{cores} cores, {memory:.0f} GB memory, Linux {platform.release()}, {kind.split()[-1]}, "
        f"Python {platform.python_version()}, load {os.getloadavg()[0]:.1f} at the start"
    )
