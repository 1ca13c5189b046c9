"""Where the output of a plan goes: a directory, a bucket or a model on the hub. What all of them do is said here, once.

Four steps: *claim* the place, so that nobody else writes there; *write* the files, each on its own; *publish*, so that
readers see all of it at once; or end at any point, and leave what is complete to the next run of the same plan.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar, Literal

from rewrite.checkpoint.storage import Storage
from rewrite.errors import StorageError
from rewrite.planning.jobs import Job
from rewrite.planning.manifest import ByteCounts, Manifest
from rewrite.planning.plan import Plan
from rewrite.progress import Counter, Progress
from rewrite.writing.stream import check_unchanged
from rewrite.writing.tasks import Writer, part_of, write_by, write_here

#: Called with the source and with the output, complete, before anybody can see it; what it raises keeps it unseen.
Check = Callable[[Storage, Storage], object]
#: All of a conversion at once, a part of it, or the last step after all parts.
Step = Literal["publish", "part", "finish"]


@dataclass(frozen=True)
class Output(ABC):
    """A plan, and where it is carried out. Every step may run again. ``created`` is a time for the manifest; ``check``
    looks at the output before it is published."""

    plan: Plan
    source: Storage
    out: str
    overwrite: bool = False
    created: str | None = None
    check: Check | None = field(default=None, compare=False, repr=False, kw_only=True)
    last: ClassVar[Sequence[str]] = ()  # files that ``complete`` writes

    @abstractmethod
    def claim(self, step: Step) -> AbstractContextManager[bool]:
        """Hold the place while something is written there. False: it has the output of this very plan, complete.

        Raises :class:`StorageError` where it is taken, and :class:`UsageError` for a place that makes no sense.
        """

    @abstractmethod
    def missing(self, jobs: Iterable[Job]) -> list[Job]:
        """Those that this plan has not written yet."""

    @abstractmethod
    def writer(self) -> Writer:
        """What writes the files; picklable where executors can use it."""

    @abstractmethod
    def complete(self) -> ByteCounts:
        """From all files written to an output that readers see."""

    def check_room(self, jobs: Iterable[Job]) -> None:
        """Raise :class:`StorageError` where these files cannot fit. Where nobody knows, they can."""
        return

    @property
    def traffic(self) -> ByteCounts:
        """What went over a network so far."""
        return ByteCounts()

    def publish(self, workers: int, progress: Progress | None = None, executor: Executor | None = None) -> Manifest:
        """Everything. ``executor`` writes the files in place of ``workers`` threads."""
        self.plan.check()
        with self.claim("publish") as begun:
            counts = ByteCounts(kept=self.plan.size)
            if begun:
                counter = Counter(self.plan.size, progress)
                counts = self._write(self._jobs, workers, counter, executor)
                counts += self.complete()
        return self.manifest.with_counts(counts + self.traffic)

    def run_part(self, number: int, parts: int, workers: int = 2, progress: Progress | None = None) -> ByteCounts:
        """Write part ``number`` (from 0) of ``parts``. It may run beside the other parts."""
        self.plan.check()
        jobs = part_of(self._jobs, number, parts)
        with self.claim("part") as begun:
            if not begun:
                return ByteCounts(kept=_size(jobs))
            return self._write(jobs, workers, Counter(_size(jobs), progress), None) + self.traffic

    def finish(self) -> Manifest:
        """Publish, once all parts are written."""
        self.plan.check()
        with self.claim("finish") as begun:
            counts = ByteCounts(kept=self.plan.size)
            if begun:
                self.check_written(self._jobs, "run the parts that are missing, then finish again")
                counts = ByteCounts(kept=_size(self._jobs)) + self.complete()
        return self.manifest.with_counts(counts + self.traffic)

    @cached_property
    def stamped(self) -> Plan:
        """The plan with the time in its manifest. Its digest is another one: the same plan must resume later."""
        return self.plan if self.created is None else replace(self.plan, manifest=self.manifest)

    @property
    def manifest(self) -> Manifest:
        return self.plan.manifest if self.created is None else self.plan.manifest.created_at(self.created)

    @property
    def _jobs(self) -> list[Job]:
        return [job for job in self.plan.jobs if job.name not in self.last]

    def _write(self, jobs: list[Job], workers: int, counter: Counter, executor: Executor | None) -> ByteCounts:
        left = self.missing(jobs)
        counts = ByteCounts(kept=_size(jobs) - _size(left))
        if counts.kept:
            counter.advance(counts.kept)
        self.check_room(left)
        if executor is None:
            return counts + write_here(self.writer(), left, workers, counter)
        counts += write_by(executor, self.writer(), left, counter)
        self.check_written(jobs, "the workers need the same directories, under the same names, as this machine")
        return counts

    def check_written(self, jobs: Iterable[Job], hint: str) -> None:
        """Raise :class:`StorageError` unless every file is there."""
        missing = [job.name for job in self.missing(jobs)]
        if missing:
            raise StorageError(
                "Files of the output were not written", where=self.out, expected="every file of the plan",
                found="missing: " + some(missing), hint=hint,
            )  # fmt: skip

    def check_output(self, out: Storage) -> None:
        """Let whoever asked for it look at the output, which nobody else can see yet."""
        if self.check is not None:
            self.check(self.source, out)

    def check_source(self) -> None:
        """Raise :class:`StorageError` unless the source still holds the files that were planned on, and no others.

        Writers check each file that they read; this is for config and index, which were read when the plan was made,
        for what changed after it was copied, and for what came or went.
        """
        plan = self.plan
        expected = {file.name: file.source for file in (*plan.jobs, *plan.texts, *plan.left_out)}
        found = self.source.list_files().files
        for name in sorted(expected.keys() | found.keys()):
            check_unchanged(found.get(name), expected.get(name), f"{self.source}/{name}")


def exists(out: str, found: object, hint: str, expected: str = "nothing there") -> StorageError:
    """That a place is taken."""
    return StorageError("The output exists", where=out, expected=expected, found=found, hint=hint)


def some(names: Sequence[str]) -> str:
    """The first few of many."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _size(jobs: Iterable[Job]) -> int:
    return sum(job.size for job in jobs)
