"""The directory that an output is built in, and the lock that keeps others out. What lies where: :mod:`.publish`."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rewrite.errors import StorageError


class Staging:
    """The directory that a conversion is built in. Temporary files lie beside the files, so no name can collide."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.out = root / "out"
        self.moving = root / "moving"  # exists from just before ``out`` is renamed to OUT

    def make(self, *, alone: bool) -> None:
        """The directories; ``alone``, what a killed writer left half written goes."""
        self.root.mkdir(exist_ok=True)
        self.out.mkdir(exist_ok=True)
        for part in self.root.glob("part-*") if alone else ():
            part.unlink()

    def was_moved_to(self, out: Path) -> bool:
        """Whether a run of this very plan was killed after OUT had become complete: nothing is left to do."""
        return self.moving.exists() and not self.out.exists() and out.is_dir()

    def holds(self, name: str, size: int) -> bool:
        """Whether an earlier run of the same plan completed this file: only complete, synced files get their name."""
        try:
            return (self.out / name).stat().st_size == size
        except FileNotFoundError:
            return False

    @contextmanager
    def new_file(self, name: str, label: str) -> Iterator[Path]:
        """A temporary path, which no other writer of ``label`` may have; the file gets its name when the block ends
        well."""
        part = self.root / f"part-{label}"
        yield part
        directory = self.out
        for folder in name.split("/")[:-1]:  # one by one: a parent that has vanished is not made again
            directory /= folder
            directory.mkdir(exist_ok=True)
        part.rename(self.out / name)


@contextmanager
def locked(out: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold the lock file of ``out``: alone, or ``shared`` with others who write parts of it. It goes away with the last
    one who held it alone; a killed holder leaves it unlocked."""
    path = out.parent / f".{out.name}.rewrite-lock"
    mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    while not _is_named(fd := _open_locked(path, out, mode), path):
        os.close(fd)  # its last holder removed it between our open and our lock: lock the next one
    try:
        yield
    finally:
        if not shared:
            path.unlink(missing_ok=True)
        os.close(fd)


def _open_locked(path: Path, out: Path, mode: int) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, mode | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        if not isinstance(error, BlockingIOError):
            raise
        hint = "wait for it to end, or choose another output"
        raise StorageError("Another conversion is writing this output", where=str(out), hint=hint) from None
    return fd


def _is_named(fd: int, path: Path) -> bool:
    """Whether the open file is the one that has this name now."""
    try:
        return os.fstat(fd).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False
    except OSError:
        os.close(fd)
        raise


def remove_staging(out: Path) -> None:
    """Remove our staging directory and those of other plans for this OUT: under the lock nobody else needs them."""
    pattern = re.compile(re.escape(f".{out.name}.rewrite-") + r"[0-9a-f]{16}")
    for path in out.parent.iterdir():
        if pattern.fullmatch(path.name):
            shutil.rmtree(path)


def sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
