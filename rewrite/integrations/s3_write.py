"""One object of an output in a bucket: copied by the store as far as possible, checked part by part, and noted."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Iterable
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from typing import Any

from rewrite.checkpoint.concurrent import in_order
from rewrite.checkpoint.storage import FileId, Storage
from rewrite.errors import StorageError, UsageError
from rewrite.integrations.remote import RemoteStorage
from rewrite.integrations.s3 import SCHEME, Bucket, Missing, Place, S3Storage, Unsupported, agree, at_once, seal, sha256
from rewrite.integrations.s3_parts import MAX_PART, MIN_PART, CopyPart, PutParts, Run, numbered_sizes, plan_parts
from rewrite.planning.jobs import Job, ShardPlan
from rewrite.planning.manifest import ByteCounts
from rewrite.writing.output import some
from rewrite.writing.shard import Advance
from rewrite.writing.stream import SourceChanged, check_unchanged, pieces_of, streamed, told
from rewrite.writing.tasks import Writer

_AT_ONCE = 8  # parts of an object
_NOTED = 5.0  # seconds between two notes of an upload: what a killed run may have to do again
_SUMS = {"ChecksumAlgorithm": "SHA256"}  # for what the store puts together: it computes them


@dataclass
class Record:
    """What we know of one file, as we made it: its seal once it is complete, before that the upload and its parts.

    A record with neither says that an upload is about to begin.
    """

    plan: str
    tag: str = ""
    upload: str = ""
    parts: dict[str, str] = field(default_factory=dict)  # seals by number: all that is kept of an upload


@dataclass(frozen=True)
class Records:
    """Beside OUT, an object for each file of it. Nothing that lies in OUT is taken for ours without: somebody else's
    object, or upload, may have the same name and size."""

    bucket: Bucket
    place: Place
    plan: str  # its digest

    def key(self, name: str) -> str:
        return self.place.beside(f".rewrite-files/{name}")

    def note(self, name: str, **what: Any) -> None:
        self.bucket.put(self.key(name), json.dumps(asdict(Record(self.plan, **what))).encode())

    def read(self, name: str, found: FileId | None = None) -> Record | None:
        data = self.bucket.read(self.key(name), found)
        try:
            return None if data is None else Record(**json.loads(data))
        except (ValueError, TypeError):
            return None  # not ours: as if there was none

    def all(self) -> dict[str, Record]:
        """Those of this plan and of earlier ones."""
        start = Place(self.bucket.name, self.key("").rstrip("/"))
        found = dict(self.bucket.objects(start))
        read = zip(found, at_once(self.read, found, found.values()), strict=True)
        return {name: record for name, record in read if record is not None}

    def clear(self, names: Iterable[str]) -> None:
        at_once(self.bucket.delete, map(self.key, names))


@dataclass(frozen=True)
class ObjectWriter(Writer):
    """Writes the files of an output into a bucket."""

    source: Storage
    records: Records

    def write(self, job: Job, advance: Advance) -> ByteCounts:
        """One file of the output. Where the source has changed meanwhile, there is no such object afterwards."""
        inside = self.source if isinstance(self.source, S3Storage) else None
        key = self.records.place.key(job.name)
        if inside is not None and not isinstance(job, ShardPlan) and job.size <= MAX_PART:
            tag, copied = self._copy_object(inside, job), job.size
        elif job.size < MIN_PART:
            tag, copied = self.records.bucket.put(key, b"".join(streamed(job, self.source))), 0
        else:
            return self._multipart(inside, job, advance)
        self._done(job, tag)
        advance(job.size)
        return ByteCounts(copied=copied, written=job.size - copied)

    def write_alone(self, job: Job) -> ByteCounts:
        alone = deepcopy(self)  # with counts of its own: whoever gathers the counts cannot see ours
        counts = alone.write(job, lambda _: None)
        read = alone.source.traffic.read if isinstance(alone.source, RemoteStorage) else 0
        return counts + ByteCounts(
            read=read + alone.records.bucket.traffic.read, sent=alone.records.bucket.traffic.sent
        )

    def _copy_object(self, source: S3Storage, job: Job) -> str:
        self._check_source(source, job)
        key, where = self.records.place.key(job.name), f"{self.records.place}/{job.name}"
        copied = self.records.bucket.call(
            "copy_object", where, _SUMS, Key=key, CopySource=_copy_source(source, job),
            CopySourceIfMatch=f'"{job.source.tag}"',
        )  # fmt: skip
        tag = seal(copied.get("CopyObjectResult", {}), where)
        try:
            self._check_source(source, job)
        except StorageError:
            with suppress(StorageError):  # the error that led here is the one to tell
                self.records.bucket.delete(key)
            raise
        return tag

    def _multipart(self, source: S3Storage | None, job: Job, advance: Advance) -> ByteCounts:
        try:
            runs = plan_parts(job, copies=source is not None)
        except ValueError as error:
            where = f"{self.records.place}/{job.name}"
            raise UsageError("The object cannot be written", where=where, found=str(error)) from None
        sizes = numbered_sizes(runs)
        upload = self._begin(job, sizes)
        try:
            if source is not None:
                self._check_source(source, job)
            self._write_runs(upload, runs, source, job, advance)
            if source is not None:
                self._check_source(source, job)
            upload.note()
            tag = upload.complete(sizes)
        except Missing:  # no upload: a run beside this one has completed it, or thrown it away
            tag = upload.expected
        except NoSums:  # then without
            upload.abort()
            self.records.bucket.sums = False
            return self._multipart(source, job, advance)
        except (SourceChanged, NotKept):
            upload.abort()  # of no use to anybody
            raise
        except BaseException:
            with suppress(StorageError):  # the error that led here is the one to tell
                upload.note()  # the next run goes on from here
            raise
        self._done(job, tag)
        copied = sum(run.size for run in runs if isinstance(run, CopyPart))
        return ByteCounts(copied=copied, written=job.size - copied)

    def _begin(self, job: Job, sizes: dict[int, int]) -> Upload:
        """The upload that our record names, with the parts that it names; else a new one."""
        key, record = self.records.place.key(job.name), self.records.read(job.name)
        ours = record if record is not None and record.plan == self.records.plan else None
        begun = [upload for upload, of in pending(self.records.bucket, key) if of == key]
        upload = Upload(self.records, job.name, ours.upload if ours else "")
        if ours is not None and ours.upload in begun:
            upload.tags.update({
                number: ours.parts[str(number)] for number, part in upload.parts().items()
                if agree(part, FileId(sizes.get(number, 0), 0, ours.parts.get(str(number), "")))
            })  # fmt: skip
            return upload
        if ours is None or ours.upload or ours.tag:  # else the record says that one is about to begin
            refuse_uploads(self.records.place, [key] if begun else [])
        self.records.note(job.name)
        asked = self.records.bucket.sums
        answer = self.records.bucket.call("create_multipart_upload", upload.where, _SUMS, Key=key)
        if not isinstance(answer.get("UploadId"), str):
            raise StorageError("The store answers without an upload", where=upload.where)
        upload = Upload(self.records, job.name, answer["UploadId"], asked)
        self.records.note(job.name, upload=upload.id)
        for other, of in pending(self.records.bucket, key):  # begun by a request whose answer was lost
            if of == key and other != upload.id:
                Upload(self.records, job.name, other).abort()
        return upload

    def _write_runs(
        self, upload: Upload, runs: tuple[Run, ...], source: S3Storage | None, job: Job, advance: Advance
    ) -> None:
        def write(run: Run) -> None:
            if upload.tags.keys() >= set(range(run.number, run.number + len(run.sizes))):
                pass  # kept
            elif isinstance(run, PutParts):
                self._put(upload, run, job)
            elif source is not None:
                upload.copy(run, _copy_source(source, job), job.source.tag)
            advance(sum(run.sizes))

        for _ in in_order(write, runs, _AT_ONCE):
            pass

    def _put(self, upload: Upload, run: PutParts, job: Job) -> None:
        """Upload the bytes of a run, in parts of the planned sizes."""
        waiting = bytearray()
        sizes = list(enumerate(run.sizes, run.number))
        for piece in pieces_of(run.segments, job, self.source):
            waiting += piece
            while sizes and len(waiting) >= sizes[0][1]:
                number, size = sizes.pop(0)
                upload.put(number, bytes(waiting[:size]))
                del waiting[:size]

    def _check_source(self, source: S3Storage, job: Job) -> None:
        """That the object is the one that was planned on: servers ignore CopySourceIfMatch."""
        check_unchanged(source.bucket.head(source.place.key(job.name)), job.source, f"{source}/{job.name}")

    def _done(self, job: Job, tag: str) -> None:
        """Size and seal of what was written (rclone answers 200 and stores nothing of a copied part), noted as ours."""
        found = self.records.bucket.head(self.records.place.key(job.name), seal)
        check_kept(found, FileId(job.size, 0, tag), f"{self.records.place}/{job.name}")
        self.records.note(job.name, tag=tag)


class NotKept(StorageError):
    """The store has other bytes than those that it was given."""


class NoSums(StorageError):
    """The store wants a checksum of each part, and says none of those that it copies (LocalStack)."""


def check_kept(found: FileId | None, expected: FileId | None, where: str) -> FileId:
    """The object, or the part, that was written, as the store has it. Raises :class:`NotKept`."""
    if found is None or not agree(found, expected):
        raise NotKept(
            "The store has not kept what was written", where=where, expected=told(expected), found=told(found),
            hint="run the same command again; if it stays so, somebody else writes here or the store is at fault",
        )  # fmt: skip
    return found


@dataclass
class Upload:
    """A multipart upload: nothing of it is an object before it is complete. ``tags``: seals of the parts by number."""

    records: Records
    name: str
    id: str
    asked: bool = True  # for checksums, as far as we know
    tags: dict[int, str] = field(default_factory=dict)
    noted: float = field(default_factory=time.monotonic)

    @property
    def where(self) -> str:
        return f"{self.records.place}/{self.name}"

    @property
    def expected(self) -> str:
        """The seal of the object: an ETag, where those of its parts are MD5 sums (a run beside this one may have made
        it), and a checksum, where the store says those of all parts."""
        parts = [self.tags[number].partition(" ") for number in sorted(self.tags)]
        try:
            tags = b"".join(bytes.fromhex(tag) for tag, _, _ in parts)
            tag = f"{hashlib.md5(tags, usedforsecurity=False).hexdigest()}-{len(parts)}"
        except ValueError:
            tag = ""
        digests = b"".join(base64.b64decode(digest) for _, _, digest in parts)
        digest = f"{sha256(digests)}-{len(parts)}" if all(digest for _, _, digest in parts) else ""
        return f"{tag} {digest}".rstrip()

    @property
    def _named(self) -> dict[str, Any]:
        return {"Key": self.records.place.key(self.name), "UploadId": self.id}

    def call(self, method: str, **arguments: Any) -> dict[str, Any]:
        return self.records.bucket.call(method, self.where, **self._named, **arguments)

    def parts(self) -> dict[int, FileId]:
        """Size and seal of the parts that the store has."""
        pages = self.records.bucket.pages("list_parts", self.where, **self._named)
        found = (part for page in pages for part in page.get("Parts", []))
        return {part["PartNumber"]: FileId(part["Size"], 0, seal(part, self.where)) for part in found}

    def copy(self, part: CopyPart, source: dict[str, str], tag: str) -> None:
        answer = self.call(
            "upload_part_copy", PartNumber=part.number, CopySource=source, CopySourceIfMatch=f'"{tag}"',
            CopySourceRange=f"bytes={part.start}-{part.start + part.size - 1}",
        )  # fmt: skip
        self._made(part.number, seal(answer.get("CopyPartResult", {}), self.where))

    def put(self, number: int, data: bytes) -> None:
        tag = self.records.bucket.send("upload_part", self.where, data, PartNumber=number, **self._named)
        self._made(number, tag)

    def _made(self, number: int, tag: str) -> None:
        self.tags[number] = tag
        if time.monotonic() - self.noted > _NOTED:
            self.note()

    def note(self) -> None:
        """What a later run may keep."""
        self.noted = time.monotonic()
        self.records.note(
            self.name, upload=self.id, parts={str(number): tag for number, tag in sorted(self.tags.items())}
        )

    def complete(self, sizes: dict[int, int]) -> str:
        """Make the object, if the store has every part with its size and seal. The seal of the object."""
        expected = {number: FileId(size, 0, self.tags[number]) for number, size in sizes.items()}
        found = self.parts()
        for number in sorted(expected.keys() | found.keys()):
            check_kept(found.get(number), expected.get(number), f"{self.where}, part {number}")
        tag, _, digest = self.expected.partition(" ")
        try:
            answer = self.call("complete_multipart_upload", MultipartUpload={"Parts": list(map(self._part, expected))})
        except Unsupported:
            if digest or not self.asked:
                raise
            raise NoSums("The store says no checksum of parts that it copies", where=self.where) from None
        made = str(answer.get("ETag") or tag).strip('"')  # Ceph 16 says none here
        return f"{made} {digest}".rstrip()

    def _part(self, number: int) -> dict[str, Any]:
        tag, _, digest = self.tags[number].partition(" ")
        return {"PartNumber": number, "ETag": f'"{tag}"', **({"ChecksumSHA256": digest} if digest else {})}

    def abort(self) -> None:
        """Throw the parts away: they cost money. One that cannot be aborted is left to the next run."""
        with suppress(StorageError):  # the error that led here is the one to tell
            self.call("abort_multipart_upload")


def pending(bucket: Bucket, prefix: str) -> list[tuple[str, str]]:
    """Id and key of uploads that were begun and neither completed nor aborted, of keys that begin with ``prefix``."""
    pages = bucket.pages("list_multipart_uploads", f"{SCHEME}{bucket.name}/{prefix}", Prefix=prefix)
    return [(entry["UploadId"], entry["Key"]) for page in pages for entry in page.get("Uploads", [])]


def refuse_uploads(place: Place, keys: Iterable[str]) -> None:
    """Uploads that nobody of us has begun: their parts are not ours to keep, nor to throw away."""
    if found := sorted(keys):
        raise StorageError(
            "Somebody else has begun to upload files of the output", where=str(place), found=some(found),
            hint="choose another prefix; or, if nobody needs them, abort these uploads "
            "(aws s3api list-multipart-uploads, abort-multipart-upload)",
        )  # fmt: skip


def _copy_source(source: S3Storage, job: Job) -> dict[str, str]:
    return {"Bucket": source.place.bucket, "Key": source.place.key(job.name)}
