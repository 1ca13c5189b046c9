"""A Plan carried out in a bucket: no reader of OUT sees half of it, and the same call resumes.

A bucket has no rename. So the files that make a checkpoint come last: all shards and other files, then the index, then
``config.json``, without which nothing opens it. What lies beside OUT: README.md. The claim and the mark of completion
are written with ``If-None-Match: *``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from rewrite.checkpoint.checkpoint import CONFIG_NAME, INDEX_NAME
from rewrite.checkpoint.storage import FileId
from rewrite.errors import StorageError, UsageError
from rewrite.integrations.remote import RemoteStorage
from rewrite.integrations.s3 import Bucket, Place, Precondition, S3Storage
from rewrite.integrations.s3_write import ObjectWriter, Record, Records, Upload, check_kept, pending, refuse_uploads
from rewrite.planning.jobs import Job
from rewrite.planning.manifest import ByteCounts
from rewrite.writing.output import Output, Step, exists, some
from rewrite.writing.overlay import Overlay

STARTED, COMPLETE = ".rewrite-started", ".rewrite-complete"


@dataclass(frozen=True)
class S3Output(Output):
    """An output that becomes objects below a prefix."""

    last: ClassVar = (INDEX_NAME, CONFIG_NAME)  # in this order

    @contextmanager
    def claim(self, step: Step) -> Iterator[bool]:
        yield self._begin()

    def missing(self, jobs: Iterable[Job]) -> list[Job]:
        found, ours = self._objects(), {name: record.tag for name, record in self._own_records().items()}
        return [job for job in jobs if found.get(job.name) != FileId(job.size, 0, ours.get(job.name, ""))]

    def writer(self) -> ObjectWriter:
        return ObjectWriter(self.source, self._records)

    def complete(self) -> ByteCounts:
        self.check_written(self._jobs, "run the same command again")
        self._refuse_strangers()
        self.check_source()
        counts, texts = ByteCounts(), self.stamped.texts_to_write
        jobs = {job.name: job for job in self.plan.jobs if job.name in self.last}
        for name in (*(name for name in texts if name not in self.last), *self.last):
            if name == self.last[0]:  # all others are there: what is opened comes last, and is looked at before
                self._check_unopened(texts)
            if name in jobs:
                counts += self.writer().write(jobs[name], lambda _: None)
            elif name in texts:
                data = texts[name].encode()
                self._records.note(name, tag=self._bucket.put(self._place.key(name), data))
                counts += ByteCounts(written=len(data))
        found, records = self._objects(), self._own_records()
        for name, size in self.stamped.files.items():
            check_kept(found.get(name), FileId(size, 0, records[name].tag), f"{self._place}/{name}")
        self._refuse_strangers()
        with suppress(Precondition):  # a run beside this one was faster: the same bytes
            self._bucket.put(self._place.beside(COMPLETE), self._mark(found), IfNoneMatch="*")
        self._tidy_up()
        return counts

    def _check_unopened(self, texts: Mapping[str, str]) -> None:
        """The output as it will be, while nobody can open it."""
        if self.check is None:
            return
        files = {name: texts[name].encode() for name in self.last if name in texts}
        for job in self.plan.jobs:
            if job.name in self.last:
                with self.source.open(job.name) as file:
                    files[job.name] = file.read(0, job.size)
        self.check_output(Overlay(S3Storage(str(self._place)), files))

    @property
    def traffic(self) -> ByteCounts:
        """What went through this machine so far, planning included."""
        source = self.source.traffic if isinstance(self.source, RemoteStorage) else None
        read = self._bucket.traffic.read + (source.read if source else 0)
        return ByteCounts(read=read, sent=self._bucket.traffic.sent)

    @cached_property
    def _place(self) -> Place:
        place = Place.parse(self.out)
        if not place.prefix:
            raise UsageError("A bucket is no name for an output", expected="s3://bucket/prefix", found=self.out)
        if self.overwrite:
            hint = "delete it first, or choose another prefix"
            raise UsageError("An output in a bucket is not replaced", where=self.out, hint=hint)
        if isinstance(self.source, S3Storage) and place.overlaps(self.source.place):
            raise UsageError("Output and source overlap", where=self.out, found=f"source {self.source}")
        return place

    @cached_property
    def _bucket(self) -> Bucket:
        return Bucket(self._place.bucket)

    @cached_property
    def _records(self) -> Records:
        return Records(self._bucket, self._place, self.plan.digest)

    @cached_property
    def _digest(self) -> bytes:
        return f"{self.plan.digest}\n".encode()

    def _begin(self) -> bool:
        """Claim the place. False: it holds the output of this very plan already, complete."""
        started, complete, found = self._read(STARTED), self._read(COMPLETE), self._objects()
        sizes = {name: file.size for name, file in found.items()}
        if complete == self._mark(found) and sizes == self.stamped.files:
            if started == self._digest:
                self._tidy_up()  # after a run that was killed at its very end
            return False
        if started is None:
            self._check_free(found)
            started = self._claim()
        if started != self._digest:
            raise StorageError(
                "Another conversion has begun to write this output", where=str(self._place),
                found=f"{self._place}{STARTED} is not of this plan",
                hint="finish it, or delete that object and all objects of the output",
            )  # fmt: skip
        if complete is not None:  # of an output that was deleted: whoever waits for this one must not be told so
            self._delete(COMPLETE)
        return True

    def _claim(self) -> bytes:
        """Whose the place is now: ours, if nobody was faster."""
        try:
            self._bucket.put(self._place.beside(STARTED), self._digest, IfNoneMatch="*")
        except Precondition:
            return self._read(STARTED) or b""
        try:
            self._check_free(self._objects())  # once more: somebody may have come and gone since we looked
            begun = pending(self._bucket, self._place.key(""))
            earlier = {name: each for name, each in self._records.all().items() if each.plan != self.plan.digest}
            uploads = [
                Upload(self._records, self._name(key), id_)
                for id_, key in begun
                if _began(earlier.get(self._name(key)), id_)
            ]
            self._refuse_strangers(but={upload.id for upload in uploads})
        except StorageError:
            self._delete(STARTED)
            raise
        for upload in uploads:
            upload.abort()
        self._records.clear(earlier)
        return self._digest

    def _check_free(self, found: dict[str, FileId]) -> None:
        strange = sorted(found.keys() - self._own_records().keys())  # ours: of another part that began with us
        if strange:
            raise exists(str(self._place), some(strange), "choose another prefix", "no objects with this prefix")

    def _refuse_strangers(self, but: Collection[str] = ()) -> None:
        """Objects and uploads in the place that are not of this plan."""
        strange = sorted(self._objects().keys() - self.stamped.files.keys())
        if strange:
            raise StorageError(
                "There are objects that are no files of the output", where=str(self._place), found=some(strange),
                hint="somebody else writes here: delete them, or choose another prefix",
            )  # fmt: skip
        begun = pending(self._bucket, self._place.key(""))
        ours = self._own_records() if begun else {}  # looked at later: a record comes before its upload
        refuse_uploads(
            self._place, [key for id_, key in begun if id_ not in but and not _began(ours.get(self._name(key)), id_)]
        )

    def _tidy_up(self) -> None:
        self._records.clear(self._records.all())
        self._delete(STARTED)

    def _own_records(self) -> dict[str, Record]:
        return {name: each for name, each in self._records.all().items() if each.plan == self.plan.digest}

    def _mark(self, found: dict[str, FileId]) -> bytes:
        """What the mark of a complete output says."""
        return self._digest + "".join(f"{found[name].tag}  {name}\n" for name in sorted(found)).encode()

    def _name(self, key: str) -> str:
        return key.removeprefix(self._place.key(""))

    def _delete(self, suffix: str) -> None:
        self._bucket.delete(self._place.beside(suffix))

    def _read(self, suffix: str) -> bytes | None:
        return self._bucket.read(self._place.beside(suffix))

    def _objects(self) -> dict[str, FileId]:
        return dict(self._bucket.objects(self._place))


def _began(record: Record | None, upload: str) -> bool:
    """Whether the record says that this upload is ours. An upload whose beginning was noted and not its id may be."""
    return record is not None and (record.upload == upload or not (record.upload or record.tag))
