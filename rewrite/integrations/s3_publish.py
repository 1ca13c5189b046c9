"""A Plan carried out in a bucket: no reader of OUT sees half of it, and the same call resumes.

A bucket has no rename. So the files that make a checkpoint come last: all shards and other files, then the index, then
``config.json``, without which nothing opens it. Beside OUT lie two objects of a few bytes, each written with
``If-None-Match: *``::

    OUT.rewrite-started     while a conversion runs, or after it was killed: the digest of its plan. Whoever comes with
                            the same plan goes on; whoever comes with another one is refused
    OUT.rewrite-complete    OUT is complete: for those who wait for it. One that an earlier output left is removed first
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Executor, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from functools import cached_property

from rewrite.checkpoint.checkpoint import CONFIG_NAME, INDEX_NAME
from rewrite.checkpoint.storage import Storage
from rewrite.errors import StorageError, UsageError
from rewrite.integrations.remote import RemoteStorage
from rewrite.integrations.s3 import Bucket, Place, Precondition, S3Storage
from rewrite.integrations.s3_write import ObjectWriter, pending
from rewrite.planning.jobs import Job
from rewrite.planning.manifest import MANIFEST_NAME, ByteCounts, Manifest
from rewrite.planning.plan import Plan
from rewrite.progress import Counter, Progress, Stopped
from rewrite.writing.publish import check_source
from rewrite.writing.tasks import largest_first, part_of

STARTED, COMPLETE = ".rewrite-started", ".rewrite-complete"
_LAST = (INDEX_NAME, CONFIG_NAME)  # in this order


@dataclass(frozen=True)
class S3Publication:
    """A plan and the place in a bucket where its output goes."""

    plan: Plan
    source: Storage
    out: str
    overwrite: bool = False
    created: str | None = None

    def publish(self, workers: int, progress: Progress | None, executor: Executor | None) -> Manifest:
        """Everything."""
        began = self._begin()
        counter = Counter(self.plan.size, progress)
        counts = self._write(self._early, workers, counter, executor) if began else ByteCounts(kept=self.plan.size)
        if began:
            counts += self._complete()
        return self._manifest.with_counts(counts + self._traffic)

    def run_part(self, number: int, parts: int, workers: int = 2, progress: Progress | None = None) -> ByteCounts:
        """Write part ``number`` (from 0) of ``parts``. It may run again, and beside the other parts."""
        jobs = part_of(self._early, number, parts)
        if not self._begin():
            return ByteCounts(kept=sum(job.size for job in jobs))
        counter = Counter(sum(job.size for job in jobs), progress)
        return self._write(jobs, workers, counter, None) + self._traffic

    def finish(self) -> Manifest:
        """Publish, once all parts are written. It may run again."""
        counts = ByteCounts(kept=self.plan.size)
        if self._begin():
            self._check_objects(self._early, "run the parts that are missing, then finish again")
            counts = ByteCounts(kept=sum(job.size for job in self._early)) + self._complete()
        return self._manifest.with_counts(counts + self._traffic)

    @cached_property
    def _place(self) -> Place:
        self.plan.check()
        place = Place.parse(self.out)
        if not place.prefix:
            raise UsageError("A bucket is no name for an output", expected="s3://bucket/prefix", found=self.out)
        if self.overwrite:
            raise UsageError(
                "An output in a bucket is not replaced",
                where=self.out,
                hint="delete it first, or choose another prefix",
            )
        if isinstance(self.source, S3Storage) and place.overlaps(self.source.place):
            raise UsageError("Output and source overlap", where=self.out, found=f"source {self.source}")
        return place

    @cached_property
    def _bucket(self) -> Bucket:
        return Bucket(self._place.bucket)

    @property
    def _manifest(self) -> Manifest:
        return self.plan.manifest if self.created is None else self.plan.manifest.created_at(self.created)

    @cached_property
    def _digest(self) -> bytes:
        return f"{self.plan.digest}\n".encode()

    @property
    def _early(self) -> list[Job]:
        """All files but those that come last."""
        return [job for job in self.plan.jobs if job.name not in _LAST]

    @property
    def _traffic(self) -> ByteCounts:
        """What went through this machine so far, planning included."""
        source = self.source.traffic if isinstance(self.source, RemoteStorage) else None
        read = self._bucket.traffic.read + (source.read if source else 0)
        return ByteCounts(read=read, sent=self._bucket.traffic.sent)

    def _begin(self) -> bool:
        """Claim the place. False: it holds the output of this very plan already, complete."""
        started, complete = self._read(STARTED), self._read(COMPLETE)
        if complete == self._digest and not self._misfits(self._files()):
            return started == self._digest  # a run that was killed at its very end has to tidy up
        if started is None:
            self._check_free()
            started = self._claim()
        if started != self._digest:
            raise StorageError(
                "Another conversion has begun to write this output",
                where=str(self._place),
                found=f"{self._place}{STARTED} is not of this plan",
                hint="finish it, or delete that object and all objects of the output",
            )
        if complete is not None:  # of an output that was deleted: whoever waits for this one must not be told so
            self._delete(COMPLETE)
        return True

    def _claim(self) -> bytes:
        """Whose the place is now: ours, if nobody was faster."""
        place, bucket = self._place, self._bucket
        try:
            bucket.put(place.beside(STARTED), self._digest, IfNoneMatch="*")
        except Precondition:
            return self._read(STARTED) or b""
        try:
            self._check_free()  # once more: somebody may have come and gone since we looked
        except StorageError:
            self._delete(STARTED)
            raise
        for upload in pending(bucket, place.key("")):
            upload.abort()  # of whoever wrote here before: from now on all that is pending is ours
        return self._digest

    def _check_free(self) -> None:
        found = sorted(self._objects())
        if found:
            raise StorageError(
                "The output exists", where=str(self._place), expected="no objects with this prefix",
                found=", ".join(found[:5]), hint="choose another prefix",
            )  # fmt: skip

    def _delete(self, suffix: str) -> None:
        self._bucket.call("delete_object", str(self._place), Key=self._place.beside(suffix))

    def _read(self, suffix: str) -> bytes | None:
        key = self._place.beside(suffix)
        found = self._bucket.head(key)
        return None if found is None or not found.size else self._bucket.get(key, 0, found.size, found.tag)

    def _objects(self) -> dict[str, int]:
        return {name: found.size for name, found in self._bucket.objects(self._place)}

    def _files(self) -> dict[str, int]:
        """Every file of the output with its size."""
        texts = {text.name: text.size for text in self.plan.texts}
        if self._manifest.changed:
            texts[MANIFEST_NAME] = len(self._manifest.to_text().encode())
        return {**{job.name: job.size for job in self.plan.jobs}, **texts}

    def _misfits(self, files: dict[str, int]) -> list[str]:
        """What is missing or has another size; and what is there and is no file of the output."""
        found, known = self._objects(), self._files()
        return [
            *(name for name, size in files.items() if found.get(name) != size),
            *(name for name in found if name not in known),
        ]

    def _check_objects(self, jobs: Sequence[Job], hint: str) -> None:
        found = self._objects()
        missing = [job.name for job in jobs if found.get(job.name) != job.size]
        if missing:
            raise StorageError(
                "Files of the output were not written", where=str(self._place), expected="every file of the plan",
                found="missing: " + ", ".join(missing[:5]), hint=hint,
            )  # fmt: skip
        strange = sorted(found.keys() - self._files().keys())
        if strange:
            raise StorageError(
                "There are objects that are no files of the output", where=str(self._place),
                found=", ".join(strange[:5]), hint="somebody else writes here: delete them, or choose another prefix",
            )  # fmt: skip

    def _write(self, jobs: Sequence[Job], workers: int, counter: Counter, executor: Executor | None) -> ByteCounts:
        there = self._objects()
        left = [job for job in largest_first(jobs) if there.get(job.name) != job.size]
        kept = sum(job.size for job in jobs) - sum(job.size for job in left)
        counter.advance(kept)
        writer = S3Tasks(self.source, self.out)
        if executor is not None:
            return ByteCounts(kept=kept) + _gather([executor.submit(writer.write, job) for job in left], counter)
        local = writer.connected(self._bucket)
        with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
            futures = [pool.submit(local.write, job, counter.advance) for job in left]
            try:
                return ByteCounts(kept=kept) + _gather(futures, None)
            finally:
                counter.stop.set()
                pool.shutdown(cancel_futures=True)

    def _complete(self) -> ByteCounts:
        """From all files written to an output that can be opened."""
        self._check_objects(self._early, "run the same command again")
        check_source(self.plan, self.source)
        texts = {text.name: text.text for text in self.plan.texts}
        if self._manifest.changed:  # an output that equals its source says nothing of us
            texts[MANIFEST_NAME] = self._manifest.to_text()
        jobs = {job.name: job for job in self.plan.jobs if job.name in _LAST}
        writer = S3Tasks(self.source, self.out).connected(self._bucket)
        counts = ByteCounts()
        for name in sorted(texts.keys() | jobs.keys(), key=lambda name: (*_LAST,).index(name) if name in _LAST else -1):
            if name in jobs:
                counts += writer.write(jobs[name], lambda _: None)
            else:
                data = texts[name].encode()
                self._bucket.put(self._place.key(name), data)
                counts += ByteCounts(written=len(data))
        if wrong := self._misfits(self._files()):
            raise StorageError("The store has not kept what was written", where=f"{self._place}/{wrong[0]}")
        for upload in pending(self._bucket, self._place.key("")):
            upload.abort()  # begun by a run that never learned of it
        with suppress(Precondition):  # a run beside this one was faster: the same bytes
            self._bucket.put(self._place.beside(COMPLETE), self._digest, IfNoneMatch="*")
        self._delete(STARTED)
        return counts


@dataclass(frozen=True)
class S3Tasks:
    """Writes single files, also in another process: picklable."""

    source: Storage
    out: str

    def write(self, job: Job) -> ByteCounts:
        bucket = Bucket(Place.parse(self.out).bucket)
        source = copy(self.source)  # with a count of its own: whoever gathers the counts cannot see ours
        counts = S3Tasks(source, self.out).connected(bucket).write(job, lambda _: None)
        read = source.traffic.read if isinstance(source, RemoteStorage) else 0
        return counts + ByteCounts(read=read + bucket.traffic.read, sent=bucket.traffic.sent)

    def connected(self, bucket: Bucket) -> ObjectWriter:
        place = Place.parse(self.out)
        return ObjectWriter(self.source, bucket, place, resume=True)


def _gather(futures: Sequence[Future[ByteCounts]], counter: Counter | None) -> ByteCounts:
    """The sum of what all did; the first error that is one."""
    done, _ = wait(futures, return_when=FIRST_EXCEPTION)
    errors: list[BaseException] = [error for future in done if (error := future.exception())]
    if errors:
        for future in futures:
            future.cancel()
        raise next((error for error in errors if not isinstance(error, Stopped)), errors[0])
    counts = sum((future.result() for future in futures), ByteCounts())
    if counter is not None:
        counter.advance(counts.copied + counts.written)
    return counts
