"""The files of a plan, each written as a task of its own: by threads here, or by any executor, also on other machines.

A task is idempotent: what is complete is kept, and a file gets its name only when it is. So a task may be run again, or
twice at the same time, wherever its worker died.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Executor, Future, ThreadPoolExecutor, as_completed, wait
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from rewrite.checkpoint.local import LocalDirectory, io_errors
from rewrite.checkpoint.storage import Storage
from rewrite.errors import StorageError
from rewrite.planning.jobs import Job, ShardPlan
from rewrite.planning.manifest import ByteCounts
from rewrite.progress import Counter, Stopped
from rewrite.writing.shard import Advance, copy_file, write_shard, write_streamed
from rewrite.writing.staging import Staging


@dataclass(frozen=True)
class Tasks:
    """What all tasks of a conversion need. Picklable."""

    source: Storage
    staging: Path
    copy: bool

    def write(self, job: Job, label: str, advance: Advance) -> ByteCounts:
        """Write one file into the staging directory, unless it is there."""
        staging = Staging(self.staging)
        if staging.holds(job.name, job.size):
            advance(job.size)
            return ByteCounts(kept=job.size)
        with staging.new_file(job.name, label) as part:
            if not isinstance(self.source, LocalDirectory):
                return write_streamed(job, self.source, part, advance)
            path = self.source.root / job.name
            if isinstance(job, ShardPlan):
                return write_shard(job, path, part, advance, copy=self.copy)
            return copy_file(job, path, part, advance, copy=self.copy)

    def write_alone(self, job: Job) -> ByteCounts:
        """As :meth:`write`, where others may write the same file at the same time: each under a name of its own."""
        with io_errors(self.staging):
            return self.write(job, uuid4().hex, lambda _: None)


def largest_first(jobs: Iterable[Job]) -> list[Job]:
    """A long job must not start last."""
    return sorted(jobs, key=lambda job: -job.size)


def part_of(jobs: Iterable[Job], number: int, parts: int) -> list[Job]:
    """The jobs of part ``number`` of ``parts``: the same in every process, and about the same bytes in each part."""
    shares: list[list[Job]] = [[] for _ in range(parts)]
    loads = [0] * parts
    for job in largest_first(jobs):
        least = loads.index(min(loads))
        shares[least].append(job)
        loads[least] += job.size
    return shares[number]


def write_here(tasks: Tasks, jobs: Sequence[Job], workers: int, counter: Counter, prefix: str = "") -> ByteCounts:
    """Write all ``jobs`` with threads. Temporary files begin with ``prefix``, where others write parts as well."""
    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        ordered = largest_first(jobs)
        futures = [pool.submit(tasks.write, job, f"{prefix}{i}", counter.advance) for i, job in enumerate(ordered)]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            errors = [error for future in done if (error := future.exception())]
            if errors:
                raise next((error for error in errors if not isinstance(error, Stopped)), errors[0])
            return sum((future.result() for future in futures), ByteCounts())
        finally:
            counter.stop.set()
            pool.shutdown(cancel_futures=True)


def write_by(executor: Executor, tasks: Tasks, jobs: Sequence[Job], counter: Counter) -> ByteCounts:
    """Write all ``jobs`` with ``executor``, whose workers see the same directories under the same names."""
    futures: dict[Future[ByteCounts], Job] = {
        executor.submit(tasks.write_alone, job): job for job in largest_first(jobs)
    }
    counts = ByteCounts()
    try:
        for future in as_completed(futures):
            counts += future.result()
            counter.advance(futures[future].size)
    finally:
        for future in futures:
            future.cancel()
    check_complete(jobs, tasks.staging, "the workers need the same directories, under the same names, as this machine")
    return counts


def check_complete(jobs: Iterable[Job], staging: Path, hint: str) -> None:
    """Raise :class:`StorageError` unless every file is staged."""
    missing = [job.name for job in jobs if not Staging(staging).holds(job.name, job.size)]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise StorageError(
            "Files of the output were not written",
            where=str(staging),
            expected="every file of the plan",
            found="missing: " + ", ".join(missing[:5]) + more,
            hint=hint,
        )
