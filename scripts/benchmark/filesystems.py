"""The same conversion on ext4, XFS and Btrfs: in images on loop devices, made for this and removed afterwards.

`cp -r` stands for a copy that shares nothing: since coreutils 9.0 plain `cp` shares blocks where it can.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmark.measure import Run, python, run, start_even
from benchmark.table import Bound, judge, spread, table

BASE = "cp -r"
OURS = "rewrite convert"
UNSYNCED = "  its syncs left out"
KINDS = ("ext4", "xfs", "btrfs")
CONTESTANTS: dict[str, Sequence[str | Path]] = {
    BASE: ("cp", "-r", "--reflink=never"),
    "cp -r --reflink=auto": ("cp", "-r", "--reflink=auto"),
    "convert_checkpoint": python("benchmark.convert_checkpoint"),
    OURS: python("rewrite", "convert", "--quiet"),
    UNSYNCED: python("benchmark.unsynced", "convert", "--quiet"),
    "  with --copy": python("rewrite", "convert", "--quiet", "--copy"),
}
_EXTENT = re.compile(r"^\s*\d+:\s+\d+\.\.\s*\d+:\s+\d+\.\.\s*\d+:\s+(\d+):.*\bshared\b", re.MULTILINE)


@dataclass(frozen=True)
class Outcome:
    """One run: ``synced`` counts the seconds until all is on disk, ``new`` bytes in use then, ``shared`` bytes."""

    run: Run
    synced: float
    new: int
    shared: int


@dataclass(frozen=True)
class Measured:
    kind: str
    outcomes: dict[str, list[Outcome]]
    size: int


class Skipped(Exception):
    """A filesystem that cannot be had here; the message says why."""


@contextmanager
def mounted(kind: str, work: Path, size: int) -> Iterator[Path]:
    """An empty filesystem of ``size`` bytes (or a little more), in a sparse image below ``work``."""
    tool = shutil.which(f"mkfs.{kind}", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if os.geteuid() != 0:
        raise Skipped("mounting takes root")
    if tool is None:
        raise Skipped(f"there is no mkfs.{kind}")
    image, mount = work / f"{kind}.image", work / kind
    try:
        with image.open("wb") as file:
            file.truncate(size)
        mount.mkdir()
        commands: tuple[list[str | Path], ...] = ([tool, "-q", image], ["mount", "-o", "loop", image, mount])
        for command in commands:
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            if done.returncode:
                raise Skipped(f"{command[0]}: {done.stderr.strip()}")
        try:
            yield mount
        finally:
            subprocess.run(["umount", mount], check=True)  # frees the loop device, too
    finally:
        image.unlink(missing_ok=True)


def measure(kind: str, source: Path, work: Path, rounds: int, *, cold: bool, say: Callable[[str], None]) -> Measured:
    """Everyone ``rounds`` times, alone beside the source. Raises :class:`Skipped`."""
    size = sum(path.stat().st_size for path in source.iterdir())
    outcomes: dict[str, list[Outcome]] = {name: [] for name in CONTESTANTS}
    with mounted(kind, work, 3 * size + (1 << 30)) as mount:
        shutil.copytree(source, mount / "source")
        for number in range(rounds):
            for name, command in CONTESTANTS.items():
                outcome = _measure(command, mount, cold=cold, timed_start=name == UNSYNCED)
                outcomes[name].append(outcome)
                say(f"{kind}, round {number + 1}: {name.strip()}: {outcome.run.seconds:.2f} s")
    return Measured(kind, outcomes, size)


def _measure(command: Sequence[str | Path], mount: Path, *, cold: bool, timed_start: bool) -> Outcome:
    before = _used(mount)
    start_even(cold=cold)
    result = run([*command, mount / "source", mount / "out"], timed_start=timed_start)
    started = time.monotonic()
    subprocess.run(["sync", "-f", mount], check=True)
    synced = result.seconds + time.monotonic() - started
    outcome = Outcome(result, synced, _used(mount) - before, _shared(mount / "out"))
    shutil.rmtree(mount / "out")
    return outcome


def _used(mount: Path) -> int:
    """Bytes in use, as `df` has them, once it stands still: XFS and Btrfs free removed files later."""
    free = -1
    while True:
        subprocess.run(["sync", "-f", mount], check=True)
        status = os.statvfs(mount)
        if free == status.f_bfree:
            return (status.f_blocks - free) * status.f_frsize
        free = status.f_bfree
        time.sleep(1)


def _shared(out: Path) -> int:
    """Bytes of extents that other files have too, by `filefrag`."""
    listing = subprocess.run(
        ["filefrag", "-v", "-b4096", *sorted(out.glob("*.safetensors"))], check=False, capture_output=True, text=True
    )
    return 4096 * sum(int(length) for length in _EXTENT.findall(listing.stdout))


def report(measured: Measured) -> Iterator[str]:
    rows: list[Sequence[str]] = [("", "seconds", "/ cp -r", "and sync", "new blocks, MB", "shared", "peak MB")]
    for name, outcomes in measured.outcomes.items():
        rows.append(
            (
                f"{measured.kind}: {name}" if not name.startswith(" ") else name,
                f"{median(o.run.seconds for o in outcomes):.2f}",
                spread(_ratios(measured, name)),
                f"{median(o.synced for o in outcomes):.2f}",
                f"{median(o.new for o in outcomes) / 1e6:.1f}",
                f"{median(o.shared for o in outcomes) / measured.size:.2%}",
                f"{max(o.run.peak_bytes for o in outcomes) / 1e6:.0f}",
            )
        )
    yield from table(rows, right=range(1, len(rows[0])))
    yield ""
    yield from judge(_bounds(measured), measured)


def _ratios(measured: Measured, name: str) -> list[float]:
    pairs = zip(measured.outcomes[name], measured.outcomes[BASE], strict=True)
    return [one.synced / base.synced for one, base in pairs]


def _bounds(measured: Measured) -> Iterator[Bound]:
    peak = Bound("peak memory of rewrite, MB", 80, lambda m: max(o.run.peak_bytes for o in m.outcomes[OURS]) / 1e6)
    if measured.kind == "ext4":
        yield Bound("time of rewrite / cp -r, synced", 1.1, lambda m: median(_ratios(m, OURS)))
        yield peak
        return
    base = median(o.synced for o in measured.outcomes[BASE])
    limit = max(0.5, 0.01 * base)
    what = "seconds, without syncs, interpreter and imports"
    yield Bound(what, limit, lambda m: median(o.run.seconds - o.run.start for o in m.outcomes[UNSYNCED]))
    yield Bound("bytes not shared, %", 1, lambda m: 100 * (1 - median(o.shared for o in m.outcomes[OURS]) / m.size))
    yield peak
