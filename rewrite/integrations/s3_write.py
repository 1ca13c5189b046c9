"""One object of an output in a bucket: copied by the store as far as possible, checked part by part, or aborted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from rewrite.checkpoint.storage import Storage
from rewrite.errors import StorageError, UsageError
from rewrite.integrations.s3 import SCHEME, Bucket, Missing, Place, S3Storage, md5
from rewrite.integrations.s3_parts import MAX_PART, MIN_PART, CopyPart, PutParts, Run, numbered_sizes, plan_parts
from rewrite.planning.jobs import Job, ShardPlan
from rewrite.planning.manifest import ByteCounts
from rewrite.writing.stream import check_unchanged, pieces_of, streamed

_AT_ONCE = 8  # parts of an object

Advance = Callable[[int], object]


@dataclass(frozen=True)
class ObjectWriter:
    """What writes the files of an output into ``place``. ``resume``: an earlier run may have left parts."""

    source: Storage
    bucket: Bucket
    place: Place
    resume: bool

    def write(self, job: Job, advance: Advance) -> ByteCounts:
        """One file of the output. Where the source has changed meanwhile, there is no such object afterwards."""
        inside = self.source if isinstance(self.source, S3Storage) else None
        if inside is not None and not isinstance(job, ShardPlan) and job.size <= MAX_PART:
            return self._copy_object(inside, job, advance)
        if job.size < MIN_PART:
            data = b"".join(streamed(job, self.source))
            self.bucket.put(self.place.key(job.name), data)
            self._check(job)
            advance(job.size)
            return ByteCounts(written=job.size)
        return self._multipart(inside, job, advance)

    def _copy_object(self, source: S3Storage, job: Job, advance: Advance) -> ByteCounts:
        self._check_source(source, job)
        where = f"{self.place}/{job.name}"
        copied = self.bucket.call(
            "copy_object", where, Key=self.place.key(job.name), CopySource=_copy_source(source, job),
            CopySourceIfMatch=f'"{job.source.tag}"',
        )  # fmt: skip
        _etag(copied.get("CopyObjectResult", {}), where)
        try:
            self._check_source(source, job)
            self._check(job)
        except StorageError:
            with suppress(StorageError):  # the error that led here is the one to tell
                self.bucket.call("delete_object", where, Key=self.place.key(job.name))  # a later run would keep it
            raise
        advance(job.size)
        return ByteCounts(copied=job.size)

    def _multipart(self, source: S3Storage | None, job: Job, advance: Advance) -> ByteCounts:
        try:
            runs = plan_parts(job, copies=source is not None)
        except ValueError as error:
            raise UsageError(
                "The object cannot be written", where=f"{self.place}/{job.name}", found=str(error)
            ) from None
        upload = _Upload.begin(self.bucket, self.place.key(job.name), resume=self.resume)
        try:
            if source is not None:
                self._check_source(source, job)
            done = self._write_runs(upload, runs, source, job, advance)
            if source is not None:
                self._check_source(source, job)
            upload.complete(numbered_sizes(runs), done)
        except Missing:  # no upload: a run beside this one has completed it, or thrown it away
            self._check(job)
        except BaseException:
            upload.abort()
            raise
        self._check(job)
        copied = sum(run.size for run in runs if isinstance(run, CopyPart))
        return ByteCounts(copied=copied, written=job.size - copied)

    def _write_runs(
        self, upload: _Upload, runs: tuple[Run, ...], source: S3Storage | None, job: Job, advance: Advance
    ) -> dict[int, str]:
        """The ETag of every part by its number."""
        sizes = numbered_sizes(runs)
        kept = {number: tag for number, (size, tag) in upload.parts().items() if sizes.get(number) == size}

        def write(run: Run) -> dict[int, str]:
            numbers = range(run.number, run.number + (1 if isinstance(run, CopyPart) else len(run.sizes)))
            if kept.keys() >= set(numbers):
                found = {number: kept[number] for number in numbers}
            elif isinstance(run, CopyPart):
                if source is None:
                    raise AssertionError("planned without copies")
                found = {run.number: upload.copy(run, _copy_source(source, job), job.source.tag)}
            else:
                found = dict(self._put(upload, run, job))
            advance(sum(sizes[number] for number in numbers))
            return found

        tags: dict[int, str] = {}
        with ThreadPoolExecutor(max_workers=_AT_ONCE) as pool:
            futures = [pool.submit(write, run) for run in runs]
            try:
                for future in futures:
                    tags.update(future.result())
            finally:
                pool.shutdown(cancel_futures=True)
        return tags

    def _put(self, upload: _Upload, run: PutParts, job: Job) -> Iterator[tuple[int, str]]:
        """Upload the bytes of a run, in parts of the planned sizes."""
        waiting = bytearray()
        sizes = list(enumerate(run.sizes, run.number))
        for piece in pieces_of(run.segments, job, self.source):
            waiting += piece
            while sizes and len(waiting) >= sizes[0][1]:
                number, size = sizes.pop(0)
                yield number, upload.put(number, bytes(waiting[:size]))
                del waiting[:size]

    def _check_source(self, source: S3Storage, job: Job) -> None:
        """That the object is the one that was planned on: servers ignore CopySourceIfMatch."""
        where = f"{source}/{job.name}"
        found = source.bucket.head(source.place.key(job.name))
        if found is None:
            raise StorageError("An object of the source is gone", where=where)
        check_unchanged(found, job.source, where)

    def _check(self, job: Job) -> None:
        """The size of what was written: rclone answers 200 and stores nothing of a copied part."""
        found = self.bucket.head(self.place.key(job.name))
        if found is None or found.size != job.size:
            raise StorageError(
                "The store has not kept what was written",
                where=f"{self.place}/{job.name}",
                expected=f"{job.size} bytes",
                found="no object" if found is None else f"{found.size} bytes",
            )


@dataclass(frozen=True)
class _Upload:
    """A multipart upload: nothing of it is an object before it is complete."""

    bucket: Bucket
    key: str
    id: str

    @classmethod
    def begin(cls, bucket: Bucket, key: str, *, resume: bool) -> _Upload:
        """A new one; with ``resume`` the one that an earlier run of the same plan left."""
        if resume:
            found = pending(bucket, key)
            ours = [upload for upload in found if upload.key == key]
            if ours:
                return ours[0]
        answer = bucket.call("create_multipart_upload", f"{SCHEME}{bucket.name}/{key}", Key=key)
        if not isinstance(answer.get("UploadId"), str):
            raise StorageError("The store answers without an upload", where=f"{SCHEME}{bucket.name}/{key}")
        return cls(bucket, key, answer["UploadId"])

    @property
    def where(self) -> str:
        return f"{SCHEME}{self.bucket.name}/{self.key}"

    def parts(self) -> dict[int, tuple[int, str]]:
        """Size and ETag of the parts that the store has."""
        pages = self.bucket.pages("list_parts", self.where, Key=self.key, UploadId=self.id)
        return {p["PartNumber"]: (p["Size"], p["ETag"].strip('"')) for page in pages for p in page.get("Parts", [])}

    def copy(self, part: CopyPart, source: dict[str, str], tag: str) -> str:
        answer = self.bucket.call(
            "upload_part_copy", self.where, Key=self.key, UploadId=self.id, PartNumber=part.number, CopySource=source,
            CopySourceRange=f"bytes={part.start}-{part.start + part.size - 1}", CopySourceIfMatch=f'"{tag}"',
        )  # fmt: skip
        return _etag(answer.get("CopyPartResult", {}), self.where)

    def put(self, number: int, data: bytes) -> str:
        answer = self.bucket.call(
            "upload_part",
            self.where,
            Key=self.key,
            UploadId=self.id,
            PartNumber=number,
            Body=data,
            ContentMD5=md5(data),
        )
        self.bucket.traffic.count(sent=len(data))
        return _etag(answer, self.where)

    def complete(self, sizes: dict[int, int], tags: dict[int, str]) -> None:
        """Make the object, if the store has every part with its size and ETag."""
        expected = {number: (size, tags[number]) for number, size in sizes.items()}
        found = self.parts()
        if found != expected:
            wrong = min(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
            raise StorageError(
                "The store has not kept a part", where=f"{self.where}, part {wrong}",
                expected="{} bytes, ETag {}".format(*expected.get(wrong, (0, "none"))),
                found="{} bytes, ETag {}".format(*found.get(wrong, (0, "none"))),
            )  # fmt: skip
        parts = [{"PartNumber": number, "ETag": f'"{tags[number]}"'} for number in sorted(tags)]
        self.bucket.call(
            "complete_multipart_upload", self.where, Key=self.key, UploadId=self.id, MultipartUpload={"Parts": parts}
        )

    def abort(self) -> None:
        """Throw the parts away: they cost money. One that cannot be aborted is left to the next run."""
        with suppress(StorageError):  # the error that led here is the one to tell
            self.bucket.call("abort_multipart_upload", self.where, Key=self.key, UploadId=self.id)


def pending(bucket: Bucket, prefix: str) -> list[_Upload]:
    """Uploads that were begun and neither completed nor aborted, of keys that begin with ``prefix``."""
    pages = bucket.pages("list_multipart_uploads", f"{SCHEME}{bucket.name}/{prefix}", Prefix=prefix)
    return [_Upload(bucket, entry["Key"], entry["UploadId"]) for page in pages for entry in page.get("Uploads", [])]


def _copy_source(source: S3Storage, job: Job) -> dict[str, str]:
    return {"Bucket": source.place.bucket, "Key": source.place.key(job.name)}


def _etag(answer: dict[str, Any], where: str) -> str:
    """Without its quotation marks: Ceph sends them in lists of parts, and not when it has copied one."""
    tag = str(answer.get("ETag") or "").strip('"')
    if not tag:
        raise StorageError("The store answers without an ETag", where=where)
    return tag
