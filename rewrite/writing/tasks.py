"""The files of a plan, each written as a task of its own: by threads here, or by any executor, also on other machines.

A task is idempotent: what is complete is kept, and a file gets its name only when it is. So a task may be run again, or
twice at the same time, wherever its worker died.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from concurrent.futures import FIRST_EXCEPTION, Executor, Future, ThreadPoolExecutor, as_completed, wait
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from rewrite.checkpoint.local import LocalDirectory, io_errors
from rewrite.checkpoint.storage import Storage
from rewrite.planning.jobs import Job
from rewrite.planning.manifest import ByteCounts
from rewrite.progress import Counter, Stopped
from rewrite.writing.shard import Advance, write_file, write_streamed
from rewrite.writing.staging import Staging


class Writer(ABC):
    """Writes single files of an output."""

    @abstractmethod
    def write(self, job: Job, advance: Advance) -> ByteCounts:
        """One file. ``advance`` is called with the bytes just written; it may raise to stop."""

    def write_alone(self, job: Job) -> ByteCounts:
        """The same in another process, which counts for itself."""
        return self.write(job, lambda _: None)


@dataclass(frozen=True)
class Tasks(Writer):
    """Writes into a staging directory. Picklable."""

    source: Storage
    staging: Path
    copy: bool

    def write(self, job: Job, advance: Advance) -> ByteCounts:
        staging = Staging(self.staging)
        if staging.holds(job.name, job.size):
            advance(job.size)
            return ByteCounts(kept=job.size)
        with io_errors(self.staging), staging.new_file(job.name, uuid4().hex) as part:
            if not isinstance(self.source, LocalDirectory):
                return write_streamed(job, self.source, part, advance)
            return write_file(job, self.source.root / job.name, part, advance, copy=self.copy)


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


def write_here(writer: Writer, jobs: Iterable[Job], workers: int, counter: Counter) -> ByteCounts:
    """Write all ``jobs`` with threads; the first error that is one ends all of them."""
    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        futures = [pool.submit(writer.write, job, counter.advance) for job in largest_first(jobs)]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            errors = [error for future in done if (error := future.exception())]
            if errors:
                raise next((error for error in errors if not isinstance(error, Stopped)), errors[0])
            return sum((future.result() for future in futures), ByteCounts())
        finally:
            counter.stop.set()
            pool.shutdown(cancel_futures=True)


def write_by(executor: Executor, writer: Writer, jobs: Iterable[Job], counter: Counter) -> ByteCounts:
    """Write all ``jobs`` with ``executor``, whose workers see the same places under the same names."""
    futures: dict[Future[ByteCounts], Job] = {
        executor.submit(writer.write_alone, job): job for job in largest_first(jobs)
    }
    counts = ByteCounts()
    try:
        for future in as_completed(futures):
            counts += future.result()
            counter.advance(futures[future].size)
    finally:
        for future in futures:
            future.cancel()
    return counts
