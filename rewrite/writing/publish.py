"""A Plan carried out beside the output's name, then renamed into place: OUT is absent or complete, never in between.

Power loss, where a disk may keep what was not synced in any combination: every file is synced before it gets its name
in the staging directory, so that a name there is a complete file; the staged directories are synced before the final
rename, so that a visible OUT is complete; the parent is synced after it, so that success stays. With --overwrite the
parent is synced before the exchange as well, so that the old output never lies where the next run looks for new files,
and after it before the old output is removed. tests/test_faults.py has a model of this that fails without any one sync.

What lies beside OUT while a conversion runs, or after it was killed: README.md.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from uuid import uuid4

from rewrite.checkpoint.checkpoint import CONFIG_NAME
from rewrite.checkpoint.local import LocalDirectory, io_errors
from rewrite.errors import StorageError, UsageError
from rewrite.planning.jobs import Job
from rewrite.planning.manifest import MANIFEST_NAME, ByteCounts
from rewrite.writing.exchange import move_into_place, repair_swap
from rewrite.writing.output import Output, Step, exists
from rewrite.writing.shard import can_clone, write_text
from rewrite.writing.staging import Staging, locked, remove_staging, sync_directory
from rewrite.writing.tasks import Tasks


@dataclass(frozen=True)
class DirectoryOutput(Output):
    """An output that becomes a directory. ``source`` and ``out`` are absolute."""

    copy: bool = False

    @contextmanager
    def claim(self, step: Step) -> Iterator[bool]:
        """Hold the lock of the output: alone, but for parts. The staging goes once the output is complete."""
        if self._root is not None:
            _check_apart(self._root, self._path)
        with io_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
        with io_errors(self._path), locked(self._path, shared=step == "part"):
            if step != "part":
                repair_swap(self._path)
            done = step != "part" and (self._was_moved() or (step == "finish" and self._is_published()))
            if not done:
                self._check_free_name()
            if not done and step != "finish":
                self._staging.make(alone=step == "publish")
            yield not done
            if step != "part":
                remove_staging(self._path)

    def missing(self, jobs: Iterable[Job]) -> list[Job]:
        return [job for job in jobs if not self._staging.holds(job.name, job.size)]

    def writer(self) -> Tasks:
        return Tasks(self.source, self._staging.root, self.copy)

    def complete(self) -> ByteCounts:
        staging, counts = self._staging, ByteCounts()
        for number, (name, text) in enumerate(self.stamped.texts_to_write.items()):
            like = CONFIG_NAME if name == MANIFEST_NAME else name
            with staging.new_file(name, str(number)) as part:
                write_text(text, self._root / like if self._root is not None else None, part)
            counts += ByteCounts(written=len(text.encode()))
        self.check_source()
        _finish_directories(self._root, staging.out)
        self.check_output(LocalDirectory(staging.out))
        move_into_place(staging, self._path)
        return counts

    def check_room(self, jobs: Iterable[Job]) -> None:
        """Shared blocks take no space: where it is short, see what can be shared."""
        parent, jobs = self._staging.root.parent, list(jobs)
        todo = sum(job.size for job in jobs)
        status = os.statvfs(parent)
        free = status.f_bavail * status.f_frsize
        root = self._root
        if todo > free and not self.copy and root is not None:
            # A trial for each file: through symlinks they may lie on several filesystems.
            trial = self._staging.root / f"trial-{uuid4().hex}"
            todo -= sum(job.shareable for job in jobs if can_clone(root / job.name, trial))
        if todo > free:
            raise StorageError(
                "Not enough free space for the output", where=str(parent), expected=f"{todo} bytes",
                found=f"{free} bytes free",
                hint="free some space or choose another disk; complete files are kept for the next run",
            )  # fmt: skip

    @cached_property
    def _path(self) -> Path:
        return Path(self.out)

    @cached_property
    def _staging(self) -> Staging:
        """Named by half of the digest: a run that must not share blocks does not resume one that may have."""
        key = self.plan.digest[16:32] if self.copy else self.plan.digest[:16]
        return Staging(self._path.parent / f".{self._path.name}.rewrite-{key}")

    @property
    def _root(self) -> Path | None:
        """The directory of the source, where it is one."""
        return self.source.root if isinstance(self.source, LocalDirectory) else None

    def _was_moved(self) -> bool:
        if not self._staging.was_moved_to(self._path):
            return False
        sync_directory(self._path.parent)  # the run that was killed may not have come to that
        return True

    def _is_published(self) -> bool:
        """Whether the output is that of this very plan: its manifest says so, and every file has its size."""
        try:
            manifest = (self._path / MANIFEST_NAME).read_text(encoding="utf-8")
        except (OSError, ValueError):
            return False
        files = Staging(self._path)
        files.out = self._path
        return manifest == self.manifest.to_text() and all(files.holds(*file) for file in self.stamped.files.items())

    def _check_free_name(self) -> None:
        out = self._path
        if not os.path.lexists(out) or (self.overwrite and out.is_dir() and not out.is_symlink()):
            return
        raise exists(
            self.out, "a directory" if out.is_dir() else "a file",
            "choose another path" + ("" if self.overwrite else ", or pass --overwrite to replace it at the end"),
            "a directory" if self.overwrite else "nothing at this path",
        )  # fmt: skip


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
            "Output and source overlap", where=str(out), found=f"source {source}",
            expected="an output outside the source, and the source outside it",
            hint="convert into a new directory; the source is never changed",
        )  # fmt: skip
