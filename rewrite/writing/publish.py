"""A Plan carried out beside the output's name, then renamed into place: OUT is absent or complete, never in between.

Power loss, where a disk may keep what was not synced in any combination: every file is synced before it gets its name
in the staging directory, so that a name there is a complete file; the staged directories are synced before the final
rename, so that a visible OUT is complete; the parent is synced after it, so that success stays. With --overwrite the
parent is synced before the exchange as well, so that the old output never lies where the next run looks for new files,
and after it before the old output is removed. tests/test_faults.py has a model of this that fails without any one sync.

Beside OUT lie, while a conversion runs or after it was killed::

    .OUT.rewrite-lock                held by the one converter that may work on OUT, or by all that write parts of it
    .OUT.rewrite-<plan digest>/      staging: ``out/`` holds complete files, ``part-<n>`` those being written
    .OUT.rewrite-swap/               with --overwrite: ``out/`` is about to be exchanged with OUT, or was
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from uuid import uuid4

from rewrite.checkpoint.checkpoint import CONFIG_NAME
from rewrite.checkpoint.local import LocalDirectory, io_errors
from rewrite.checkpoint.storage import Storage
from rewrite.errors import StorageError, UsageError
from rewrite.planning.jobs import Job
from rewrite.planning.manifest import MANIFEST_NAME, ByteCounts, Manifest
from rewrite.planning.plan import Plan
from rewrite.progress import Counter, Progress
from rewrite.writing.exchange import move_into_place, repair_swap
from rewrite.writing.shard import can_clone, write_text
from rewrite.writing.staging import Staging, locked, remove_staging, sync_directory
from rewrite.writing.tasks import Tasks, check_complete, part_of, write_by, write_here


def publish_plan(
    plan: Plan,
    source: str | os.PathLike[str] | Storage,
    out: Path,
    *,
    overwrite: bool = False,
    workers: int = 2,
    copy: bool = False,
    created: str | None = None,
    progress: Progress | None = None,
    executor: Executor | None = None,
) -> Manifest:
    """Write the output of ``plan`` to ``out``, all or nothing. Killed at any point, the same call resumes.

    Blocks are shared with the source where the filesystem can, with ``copy`` never. ``created`` is a time for the
    manifest. The manifest that is returned counts the bytes shared, copied and written; the file does not. ``executor``
    writes the files in place of ``workers`` threads: its workers must see ``source`` and the parent of ``out`` under
    the same names.

    Raises :class:`UsageError` when source and output overlap and :class:`StorageError` when the output exists, is being
    written by somebody else, or cannot be written.
    """
    # abspath, not resolve(), which would follow OUT
    out = Path(os.path.abspath(out))  # noqa: PTH100
    storage = LocalDirectory(os.path.abspath(source)) if isinstance(source, str | os.PathLike) else source  # noqa: PTH100
    return Publication(plan, storage, out, overwrite, copy, created).publish(workers, progress, executor)


@dataclass(frozen=True)
class Publication:
    """A plan, and where it is carried out: at once, or in parts on several machines and a last step.

    ``source`` and ``out`` are absolute. Whatever part is written where, the same files come out.
    """

    plan: Plan
    source: Storage
    out: Path
    overwrite: bool = False
    copy: bool = False
    created: str | None = None

    def publish(self, workers: int, progress: Progress | None, executor: Executor | None) -> Manifest:
        """Everything, holding the lock of the output all the time."""
        self._prepare()
        with io_errors(self.out), locked(self.out):
            counts = ByteCounts(kept=self.plan.size)
            repair_swap(self.out)
            if not self._was_moved():
                _check_free_name(self.out, self.overwrite)
                self.staging.make()
                self._check_space(self.plan.jobs)
                counter = Counter(self.plan.size, progress)
                if executor is None:
                    counts = write_here(self._tasks, self.plan.jobs, workers, counter)
                else:
                    counts = write_by(executor, self._tasks, self.plan.jobs, counter)
                counts += self._complete()
            remove_staging(self.out)
        return self._manifest.with_counts(counts)

    def run_part(self, number: int, parts: int, workers: int = 2, progress: Progress | None = None) -> ByteCounts:
        """Write part ``number`` (from 0) of ``parts``. It may run again, and beside the other parts."""
        self._prepare()
        jobs = part_of(self.plan.jobs, number, parts)
        with io_errors(self.out), locked(self.out, shared=True):
            _check_free_name(self.out, self.overwrite)
            self.staging.make()
            self._check_space(jobs)
            counter = Counter(sum(job.size for job in jobs), progress)
            return write_here(self._tasks, jobs, workers, counter, prefix=f"{uuid4().hex}-")

    def finish(self) -> Manifest:
        """Publish, once all parts are written. It may run again."""
        self._prepare()
        with io_errors(self.out), locked(self.out):
            counts = ByteCounts(kept=self.plan.size)
            repair_swap(self.out)
            if not self._was_moved() and not self._is_published():
                _check_free_name(self.out, self.overwrite)
                check_complete(self.plan.jobs, self.staging.root, "run the parts that are missing, then finish again")
                counts = ByteCounts(kept=sum(job.size for job in self.plan.jobs)) + self._complete()
            remove_staging(self.out)
        return self._manifest.with_counts(counts)

    @cached_property
    def staging(self) -> Staging:
        """Named by half of the digest: a run that must not share blocks does not resume one that may have."""
        key = self.plan.digest[16:32] if self.copy else self.plan.digest[:16]
        return Staging(self.out.parent / f".{self.out.name}.rewrite-{key}")

    @property
    def _manifest(self) -> Manifest:
        return self.plan.manifest if self.created is None else self.plan.manifest.created_at(self.created)

    @property
    def _tasks(self) -> Tasks:
        return Tasks(self.source, self.staging.root, self.copy)

    @property
    def _root(self) -> Path | None:
        """The directory of the source, where it is one."""
        return self.source.root if isinstance(self.source, LocalDirectory) else None

    def _prepare(self) -> None:
        self.plan.check()
        if self._root is not None:
            _check_apart(self._root, self.out)
        with io_errors(self.out):
            self.out.parent.mkdir(parents=True, exist_ok=True)

    def _was_moved(self) -> bool:
        if not self.staging.was_moved_to(self.out):
            return False
        sync_directory(self.out.parent)  # the run that was killed may not have come to that
        return True

    def _is_published(self) -> bool:
        """Whether the output is that of this very plan: its manifest says so, and every file has its size."""
        try:
            manifest = (self.out / MANIFEST_NAME).read_text(encoding="utf-8")
        except (OSError, ValueError):
            return False
        files = Staging(self.out)
        files.out = self.out
        return manifest == self._manifest.to_text() and all(files.holds(f.name, f.size) for f in self._manifest.files)

    def _complete(self) -> ByteCounts:
        """From all files staged to the output under its name."""
        staging = self.staging
        counts = self._write_texts(staging)
        check_source(self.plan, self.source)
        _finish_directories(self._root, staging.out)
        move_into_place(staging, self.out)
        return counts

    def _write_texts(self, staging: Staging) -> ByteCounts:
        texts = [(text.name, text.name, text.text) for text in self.plan.texts]
        if self._manifest.changed:  # an output that equals its source says nothing of us
            texts.append((MANIFEST_NAME, CONFIG_NAME, self._manifest.to_text()))
        for number, (name, like, text) in enumerate(texts):
            with staging.new_file(name, str(number)) as part:
                write_text(text, self._root / like if self._root is not None else None, part)
        return ByteCounts(written=sum(len(text.encode()) for _, _, text in texts))

    def _check_space(self, jobs: Iterable[Job]) -> None:
        """Raise if these files cannot fit. Shared blocks take no space: where it is short, see what can be shared."""
        parent = self.staging.root.parent
        jobs = [job for job in jobs if not self.staging.holds(job.name, job.size)]
        todo = sum(job.size for job in jobs)
        status = os.statvfs(parent)
        free = status.f_bavail * status.f_frsize
        root = self._root
        if todo > free and not self.copy and root is not None:
            # A trial for each file: through symlinks they may lie on several filesystems.
            trial = self.staging.root / f"trial-{uuid4().hex}"
            todo -= sum(job.shareable for job in jobs if can_clone(root / job.name, trial))
        if todo > free:
            raise StorageError(
                "Not enough free space for the output",
                where=str(parent),
                expected=f"{todo} bytes",
                found=f"{free} bytes free",
                hint="free some space or choose another disk; complete files are kept for the next run",
            )


def check_source(plan: Plan, source: Storage) -> None:
    """Raise :class:`StorageError` unless the source still holds the files that were planned on, and no others.

    Writers check each file that they read; this is for config and index, which were read when the plan was made, for
    what changed after it was copied, and for what came or went.
    """
    expected = {file.name: file.source for file in (*plan.jobs, *plan.texts, *plan.left_out)}
    found = source.list_files().files
    changed = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if changed:
        raise StorageError(
            "The checkpoint changed while it was converted",
            where=f"{source}/{changed[0]}",
            expected=expected.get(changed[0], "no such file"),
            found=found.get(changed[0], "no such file"),
            hint="wait until whatever writes it is done, then convert again",
        )


def _finish_directories(source: Path | None, out: Path) -> None:
    """Modes of the source (its owner may always write: a read-only directory could not be renamed), then syncs."""
    for directory, _, _ in os.walk(out, topdown=False):
        path = Path(directory)
        mode = 0o755 if source is None else (source / path.relative_to(out)).stat().st_mode
        path.chmod(mode & 0o777 | 0o700)
        sync_directory(path)


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
