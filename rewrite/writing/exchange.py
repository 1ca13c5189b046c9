"""The last step: what was staged gets the name of the output, which may be taken by an older one."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from pathlib import Path

from rewrite.writing.staging import Staging, sync_directory

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NO_EXCHANGE = frozenset({errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP})


def move_into_place(staging: Staging, out: Path) -> None:
    if os.path.lexists(out):
        _swap(staging, out)
    else:
        staging.moving.touch()
        sync_directory(staging.root)
        staging.out.rename(out)
        sync_directory(out.parent)


def _swap(staging: Staging, out: Path) -> None:
    """Exchange the new directory with the old one, in one step where the filesystem can, and remove the old one.

    The staging directory gets another name first: after the exchange it holds the old output, which a later run must
    not mistake for files of its own.
    """
    swap = Staging(_swap_path(out))
    staging.root.rename(swap.root)
    sync_directory(out.parent)
    if not exchange(swap.out, out):
        old = swap.root / "old"
        out.rename(old)  # from here to the next line OUT is absent; repair_swap completes it
        swap.out.rename(out)
    sync_directory(out.parent)
    shutil.rmtree(swap.root)


def repair_swap(out: Path) -> None:
    """Complete or undo an exchange that was killed. OUT is the old or the new directory, both of them complete."""
    swap = Staging(_swap_path(out))
    if not swap.root.is_dir():
        return
    if not os.path.lexists(out):
        (swap.out if swap.out.is_dir() else swap.root / "old").rename(out)
    sync_directory(out.parent)
    shutil.rmtree(swap.root)


def _swap_path(out: Path) -> Path:
    return out.parent / f".{out.name}.rewrite-swap"


def exchange(one: Path, other: Path) -> bool:
    """renameat2(RENAME_EXCHANGE), Linux 3.15; False where the kernel or filesystem has none."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    if libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(other))
