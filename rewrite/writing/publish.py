"""A Plan carried out beside the output's name, then renamed into place: OUT is absent or complete, never in between.

Power loss, where a disk may keep what was not synced in any combination: every file is synced before it gets its name
in the staging directory, so that a name there is a complete file; the staged directories are synced before the final
rename, so that a visible OUT is complete; the parent is synced after it, so that success stays. With --overwrite the
parent is synced before the exchange as well, so that the old output never lies where the next run looks for new files,
and after it before the old output is removed. tests/test_faults.py has a model of this that fails without any one sync.

Beside OUT lie, while a conversion runs or after it was killed::

    .OUT.rewrite-lock                held by the one converter that may work on OUT
    .OUT.rewrite-<plan digest>/      staging: ``out/`` holds complete files, ``part-<n>`` those being written
    .OUT.rewrite-swap/               with --overwrite: ``out/`` is about to be exchanged with OUT, or was
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

from rewrite.checkpoint.checkpoint import CONFIG_NAME
from rewrite.checkpoint.local import LocalDirectory, io_errors
from rewrite.errors import StorageError, UsageError
from rewrite.planning.jobs import FileCopy, ShardPlan
from rewrite.planning.manifest import MANIFEST_NAME, ByteCounts, Manifest
from rewrite.planning.plan import Plan
from rewrite.progress import Counter, Progress, Stopped
from rewrite.writing.shard import can_clone, copy_file, write_shard, write_text

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NO_EXCHANGE = frozenset({errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP})


def publish_plan(
    plan: Plan,
    source: Path,
    out: Path,
    *,
    overwrite: bool = False,
    workers: int = 2,
    copy: bool = False,
    created: str | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Write the output of ``plan`` to ``out``, all or nothing. Killed at any point, the same call resumes.

    Blocks are shared with the source where the filesystem can, with ``copy`` never. ``created`` is a time for the
    manifest. The manifest that is returned counts the bytes shared, copied and written; the file does not.

    Raises :class:`UsageError` when source and output overlap and :class:`StorageError` when the output exists, is being
    written by somebody else, or cannot be written.
    """
    source, out = Path(os.path.abspath(source)), Path(os.path.abspath(out))  # noqa: PTH100 - resolve() would follow OUT
    _check_apart(source, out)
    with io_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    with io_errors(out), _locked(out):
        manifest = plan.manifest if created is None else plan.manifest.created_at(created)
        counts = ByteCounts(kept=plan.size)
        staging = _Staging(out.parent / f".{out.name}.rewrite-{_staging_key(plan, copy)}")
        _repair_swap(out)
        if staging.was_moved_to(out):
            _sync_directory(out.parent)  # the run that was killed may not have come to that
        else:
            _check_free_name(out, overwrite)
            staging.make()
            _check_space(plan, source, staging, copy)
            counts = _write_all(plan, source, staging, workers, copy, Counter(plan.size, progress))
            counts += _write_texts(plan, source, staging, manifest)
            _check_source(plan, source)
            _finish_directories(source, staging.out)
            _move_into_place(staging, out)
        _remove_staging(out)
    return manifest.with_counts(counts)


def _staging_key(plan: Plan, copy: bool) -> str:
    """Half of the digest: a run that must not share blocks does not resume one that may have."""
    return plan.digest[16:32] if copy else plan.digest[:16]


class _Staging:
    """The directory that a conversion is built in. Temporary files lie beside the files, so no name can collide."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.out = root / "out"
        self.moving = root / "moving"  # exists from just before ``out`` is renamed to OUT

    def make(self) -> None:
        self.root.mkdir(exist_ok=True)
        self.out.mkdir(exist_ok=True)

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
    def new_file(self, name: str, number: int) -> Iterator[Path]:
        """A temporary path; the file gets its name when the block ends well."""
        part = self.root / f"part-{number}"
        yield part
        directory = self.out
        for folder in name.split("/")[:-1]:  # one by one: a parent that has vanished is not made again
            directory /= folder
            directory.mkdir(exist_ok=True)
        part.rename(self.out / name)


def _write_all(plan: Plan, source: Path, staging: _Staging, workers: int, copy: bool, counter: Counter) -> ByteCounts:
    # Largest first: a long job must not start last.
    jobs = sorted(plan.jobs, key=lambda job: -job.size)

    def write(number: int, job: ShardPlan | FileCopy) -> ByteCounts:
        if staging.holds(job.name, job.size):
            counter.advance(job.size)
            return ByteCounts(kept=job.size)
        with staging.new_file(job.name, number) as part:
            if isinstance(job, ShardPlan):
                return write_shard(job, source / job.name, part, counter.advance, copy=copy)
            return copy_file(job, source / job.name, part, counter.advance, copy=copy)

    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        futures = [pool.submit(write, number, job) for number, job in enumerate(jobs)]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            errors = [error for future in done if (error := future.exception())]
            if errors:
                raise next((error for error in errors if not isinstance(error, Stopped)), errors[0])
            return sum((future.result() for future in futures), ByteCounts())
        finally:
            counter.stop.set()
            pool.shutdown(cancel_futures=True)


def _write_texts(plan: Plan, source: Path, staging: _Staging, manifest: Manifest) -> ByteCounts:
    texts = [(text.name, text.name, text.text) for text in plan.texts]
    if manifest.changed:  # an output that equals its source says nothing of us
        texts.append((MANIFEST_NAME, CONFIG_NAME, manifest.to_text()))
    for number, (name, like, text) in enumerate(texts):
        with staging.new_file(name, number) as part:
            write_text(text, source / like, part)
    return ByteCounts(written=sum(len(text.encode()) for _, _, text in texts))


def _check_source(plan: Plan, source: Path) -> None:
    """Raise :class:`StorageError` unless the source still holds the files that were planned on, and no others.

    Writers check each file that they read; this is for config and index, which were read when the plan was made, for
    what changed after it was copied, and for what came or went.
    """
    expected = {file.name: file.source for file in (*plan.jobs, *plan.texts, *plan.left_out)}
    found = LocalDirectory(source).list_files().files
    changed = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if changed:
        raise StorageError(
            "The checkpoint changed while it was converted",
            where=str(source / changed[0]),
            expected=expected.get(changed[0], "no such file"),
            found=found.get(changed[0], "no such file"),
            hint="wait until whatever writes it is done, then convert again",
        )


def _finish_directories(source: Path, out: Path) -> None:
    """Modes of the source (its owner may always write: a read-only directory could not be renamed), then syncs."""
    for directory, _, _ in os.walk(out, topdown=False):
        path = Path(directory)
        path.chmod((source / path.relative_to(out)).stat().st_mode & 0o777 | 0o700)
        _sync_directory(path)


def _move_into_place(staging: _Staging, out: Path) -> None:
    if os.path.lexists(out):
        _swap(staging, out)
    else:
        staging.moving.touch()
        _sync_directory(staging.root)
        staging.out.rename(out)
        _sync_directory(out.parent)


def _swap(staging: _Staging, out: Path) -> None:
    """Exchange the new directory with the old one, in one step where the filesystem can, and remove the old one.

    The staging directory gets another name first: after the exchange it holds the old output, which a later run must
    not mistake for files of its own.
    """
    swap = _Staging(_swap_path(out))
    staging.root.rename(swap.root)
    _sync_directory(out.parent)
    if not _exchange(swap.out, out):
        old = swap.root / "old"
        out.rename(old)  # from here to the next line OUT is absent; _repair_swap completes it
        swap.out.rename(out)
    _sync_directory(out.parent)
    shutil.rmtree(swap.root)


def _repair_swap(out: Path) -> None:
    """Complete or undo an exchange that was killed. OUT is the old or the new directory, both of them complete."""
    swap = _Staging(_swap_path(out))
    if not swap.root.is_dir():
        return
    if not os.path.lexists(out):
        (swap.out if swap.out.is_dir() else swap.root / "old").rename(out)
    _sync_directory(out.parent)
    shutil.rmtree(swap.root)


def _swap_path(out: Path) -> Path:
    return out.parent / f".{out.name}.rewrite-swap"


def _exchange(one: Path, other: Path) -> bool:
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


def _remove_staging(out: Path) -> None:
    """Remove our staging directory and those of other plans for this OUT: under the lock nobody else needs them."""
    pattern = re.compile(re.escape(f".{out.name}.rewrite-") + r"[0-9a-f]{16}")
    for path in out.parent.iterdir():
        if pattern.fullmatch(path.name):
            shutil.rmtree(path)


def _check_apart(source: Path, out: Path) -> None:
    real_source, real_out = source.resolve(), out.resolve()
    if real_source == real_out or real_source in real_out.parents or real_out in real_source.parents:
        raise UsageError(
            "Output and source overlap",
            where=str(out),
            expected="an output outside the source, and the source outside it",
            found=f"source {source}",
            hint="convert into a new directory; the source is never changed",
        )


def _check_free_name(out: Path, overwrite: bool) -> None:
    if not os.path.lexists(out):
        return
    if overwrite and out.is_dir() and not out.is_symlink():
        return
    raise StorageError(
        "The output exists",
        where=str(out),
        expected="nothing at this path" if not overwrite else "a directory",
        found="a directory" if out.is_dir() else "a file",
        hint="choose another path" + ("" if overwrite else ", or pass --overwrite to replace it at the end"),
    )


def _check_space(plan: Plan, source: Path, staging: _Staging, copy: bool) -> None:
    """Raise if the output cannot fit. Shared blocks take no space: where it is short, see what can be shared."""
    parent = staging.root.parent
    jobs = [job for job in plan.jobs if not staging.holds(job.name, job.size)]
    todo = sum(job.size for job in jobs)
    status = os.statvfs(parent)
    free = status.f_bavail * status.f_frsize
    if todo > free and not copy:  # a trial for each file: through symlinks they may lie on several filesystems
        todo -= sum(job.shareable for job in jobs if can_clone(source / job.name, staging.root / "trial"))
    if todo > free:
        raise StorageError(
            "Not enough free space for the output",
            where=str(parent),
            expected=f"{todo} bytes",
            found=f"{free} bytes free",
            hint="free some space or choose another disk; complete files are kept for the next run",
        )


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the lock file of ``out``. It goes away with the last holder; a killed holder leaves it unlocked."""
    path = out.parent / f".{out.name}.rewrite-lock"
    while not _is_named(fd := _open_locked(path, out), path):
        os.close(fd)  # its last holder removed it between our open and our lock: lock the next one
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(fd)


def _open_locked(path: Path, out: Path) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        if not isinstance(error, BlockingIOError):
            raise
        raise StorageError(
            "Another conversion is writing this output",
            where=str(out),
            hint="wait for it to end, or choose another output",
        ) from None
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


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
