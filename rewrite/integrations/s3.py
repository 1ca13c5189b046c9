"""A prefix of an S3 bucket as a storage, and the calls that write to one. Needs boto3, the extra ``s3``.

Endpoint, region, profile and credentials are boto3's: ``AWS_ENDPOINT_URL``, ``AWS_PROFILE``, ``~/.aws``, and so on.
Servers differ in what they check, so nothing is taken for granted: sizes and ETags are compared here.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from rewrite.checkpoint.checkpoint import is_inside
from rewrite.checkpoint.storage import FileId, Listing
from rewrite.errors import CheckpointError, StorageError, UsageError
from rewrite.integrations.remote import RemoteStorage, Traffic

SCHEME = "s3://"
_ADDRESS = re.compile(r"s3://([A-Za-z0-9][A-Za-z0-9.-]{1,61}[A-Za-z0-9])(?:/(.*))?", re.DOTALL)
_CONNECTIONS = 32
ATTEMPTS = 5
_READ_TIMEOUT = 300  # seconds: a store may copy 5 GiB before it answers


@dataclass(frozen=True)
class Place:
    """A bucket and the beginning of all keys of a checkpoint."""

    bucket: str
    prefix: str  # without a slash at its end; may be empty

    @classmethod
    def parse(cls, address: str) -> Place:
        """Raises :class:`UsageError` for what is no ``s3://bucket/prefix``."""
        found = _ADDRESS.fullmatch(address)
        prefix = (found[2] or "").rstrip("/") if found else ""
        if found is None or (prefix and not is_inside(prefix)):
            raise UsageError("Not a place in a bucket", expected="s3://bucket/prefix", found=address)
        return cls(found[1], prefix)

    def __str__(self) -> str:
        return f"{SCHEME}{self.bucket}/{self.prefix}"

    def key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    def beside(self, suffix: str) -> str:
        """The key of an object beside the prefix, which is no file of the checkpoint."""
        return self.prefix + suffix

    def overlaps(self, other: Place) -> bool:
        one, two = self.key(""), other.key("")
        return self.bucket == other.bucket and (one.startswith(two) or two.startswith(one))


def _client() -> Any:
    return _client_of(os.getpid())  # a fork must not send on the connections of its parent


@functools.lru_cache(maxsize=1)
def _client_of(_process: int) -> Any:
    try:
        boto3: Any = importlib.import_module("boto3")
        config: Any = importlib.import_module("botocore.config")
    except ImportError:
        raise UsageError("S3 needs the package boto3", hint="pip install 'rewrite[s3]'") from None
    settings = config.Config(
        max_pool_connections=_CONNECTIONS, connect_timeout=10, read_timeout=_READ_TIMEOUT,
        retries={"mode": "standard", "max_attempts": ATTEMPTS},
        # Servers other than AWS refuse the trailers of the newer checksums; Content-MD5 is sent instead.
        request_checksum_calculation="when_required", response_checksum_validation="when_required",
    )  # fmt: skip
    client = boto3.session.Session().client("s3", config=settings)
    # A redirect that does not say the region: botocore would ask for it, and be redirected again, without an end.
    headers: dict[str, str] = {}
    unknown = SimpleNamespace(status_code=200), {"ResponseMetadata": {"HTTPHeaders": headers}}
    client.meta.events.register("before-call.s3.HeadBucket", lambda **_: unknown)
    return client


class Bucket:
    """The calls on one bucket, with their errors as ours and their bytes counted."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.traffic = Traffic()
        self._small: dict[tuple[str, str], bytes] = {}  # small objects that were read, by key and ETag
        with _errors(f"{SCHEME}{name}"):
            self._s3 = _client()

    def __reduce__(self) -> tuple[type[Bucket], tuple[str]]:
        return type(self), (self.name,)  # another process has a client, and a count, of its own

    def call(self, method: str, where: str, **arguments: Any) -> dict[str, Any]:
        """Any method of the client. Raises :class:`StorageError`, or :class:`Precondition`."""
        self.traffic.count(requests=1)
        with _errors(where):
            return dict(getattr(self._s3, method)(Bucket=self.name, **arguments))

    def pages(self, method: str, where: str, **arguments: Any) -> Iterator[dict[str, Any]]:
        """All pages of a listing."""
        with _errors(where):
            for page in self._s3.get_paginator(method).paginate(Bucket=self.name, **arguments):
                self.traffic.count(requests=1)
                yield page

    def objects(self, place: Place) -> Iterator[tuple[str, FileId]]:
        """What lies in a place, by the name there; without "folders", empty objects that browsers make."""
        start = place.key("")
        for page in self.pages("list_objects_v2", str(place), Prefix=start):
            for entry in page.get("Contents", []):
                name = entry["Key"].removeprefix(start)
                found = _identity(entry, "Size", f"{place}/{name}")
                if name and not (name.endswith("/") and not found.size):
                    yield name, found

    def head(self, key: str) -> FileId | None:
        """Size and ETag of an object; None where there is none."""
        try:
            found = self.call("head_object", f"{SCHEME}{self.name}/{key}", Key=key)
        except Missing:
            return None
        return _identity(found, "ContentLength", f"{SCHEME}{self.name}/{key}")

    def get(self, key: str, start: int, end: int, tag: str) -> bytes:
        """Bytes of an object that is still the one with this ETag. A connection that breaks is tried again."""
        where = f"{SCHEME}{self.name}/{key}"
        for attempt in range(1, ATTEMPTS + 1):
            answer = self.call("get_object", where, Key=key, Range=f"bytes={start}-{end - 1}", IfMatch=f'"{tag}"')
            found = _identity(answer, "ContentLength", where).tag
            if found != tag:  # a server that ignores If-Match
                raise changed(where, tag, found)
            got = str(answer.get("ContentRange", f"bytes 0-{answer['ContentLength'] - 1}/")).rpartition("/")[0]
            if got != f"bytes {start}-{end - 1}":
                raise StorageError(
                    "The store sent another range than the one asked for", where=where,
                    expected=f"bytes {start}-{end - 1}", found=got,
                )  # fmt: skip
            try:
                with _errors(where):  # boto3 tries a request again, and not the reading of its answer
                    data: bytes = answer["Body"].read(end - start + 1)
            except StorageError:
                if attempt == ATTEMPTS:
                    raise
                continue
            self.traffic.count(read=len(data))
            if len(data) == end - start or attempt == ATTEMPTS:
                return data  # whoever asked looks at the length
        raise AssertionError  # not reached

    def read(self, key: str, listed: FileId | None = None) -> bytes | None:
        """All of a small object, as it is ``listed``; None where there is none, or an empty one. Kept in memory."""
        found = listed or self.head(key)
        if found is None or not found.size:
            return None
        try:
            if (key, found.tag) not in self._small:
                self._small[key, found.tag] = self.get(key, 0, found.size, found.tag)
        except (Missing, Precondition):
            if listed is None:
                raise
            return self.read(key)  # it has changed since
        return self._small[key, found.tag]

    def put(self, key: str, data: bytes, **conditions: str) -> str:
        """A small object, all at once. Its ETag."""
        where = f"{SCHEME}{self.name}/{key}"
        answer = self.call("put_object", where, Key=key, Body=data, ContentMD5=md5(data), **conditions)
        self.traffic.count(sent=len(data))
        return etag(answer, where)

    def delete(self, key: str) -> None:
        self.call("delete_object", f"{SCHEME}{self.name}/{key}", Key=key)


class S3Storage(RemoteStorage):
    """A checkpoint in a bucket. What is read must be what was listed when it was opened."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self.place = Place.parse(address)
        self.bucket = Bucket(self.place.bucket)
        self.traffic = self.bucket.traffic
        self._listing = self.list_files()

    def __str__(self) -> str:
        return str(self.place)

    def __reduce__(self) -> tuple[type[S3Storage], tuple[str]]:
        return type(self), (str(self),)  # another process has a client of its own

    @property
    def name(self) -> str:
        return self.place.key("").rstrip("/").rpartition("/")[2] or self.place.bucket

    def list_files(self) -> Listing:
        found = list(self.bucket.objects(self.place))
        outside = next((name for name, _ in found if not is_inside(name)), None)
        if outside is not None:
            raise CheckpointError("A key leads out of the checkpoint", where=str(self), found=outside)
        listing = Listing.of(found)
        if not listing.files:
            raise StorageError("There is no checkpoint here", where=str(self), expected="objects with this prefix")
        return listing

    def fetch(self, name: str, start: int, end: int) -> bytes:
        try:
            return self.bucket.get(self.place.key(name), start, end, self.identify(name).tag)
        except Precondition:
            raise changed(f"{self}/{name}", self.identify(name).tag, "another one") from None


class Precondition(StorageError):
    """If-Match or If-None-Match was not met."""


class Missing(StorageError):
    """There is no such object, bucket or upload."""


def changed(where: str, expected: str, found: str) -> StorageError:
    return StorageError(
        "An object changed while it was read", where=where, expected=f"ETag {expected}", found=f"ETag {found}",
        hint="wait until whatever writes it is done, then start again",
    )  # fmt: skip


def _identity(entry: Mapping[str, Any], size: str, where: str) -> FileId:
    """What an answer says that an object is: its size, under this key, and its ETag."""
    if not entry.get("ETag") or type(entry.get(size)) is not int:
        raise StorageError("The store answers without size or ETag", where=where)
    return FileId(entry[size], 0, etag(entry, where))


def etag(answer: Mapping[str, Any], where: str) -> str:
    """Without its quotation marks: Ceph sends them in lists of parts, and not when it has copied one."""
    tag = str(answer.get("ETag") or "").strip('"')
    if not tag:
        raise StorageError("The store answers without an ETag", where=where)
    return tag


def md5(data: bytes) -> str:
    """For Content-MD5: the server refuses what arrives with other bytes."""
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


#: What to do about the codes that a store answers with.
_ELSEWHERE = "the bucket lies in another region, or at another endpoint: set AWS_REGION or --endpoint-url"
_LATER = "the store is busy: run the same command again later, what is complete is kept"
_CREDENTIALS = "check the credentials and what they may do there"
_RENEW = "get new credentials and run the same command again, what is complete is kept"
_HINTS = {
    "ExpiredToken": _RENEW, "ExpiredTokenException": _RENEW, "TokenRefreshRequired": _RENEW, "InvalidToken": _RENEW,
    "RequestTimeTooSkewed": "set the clock of this machine: it is not that of the store", "RequestExpired": _RENEW,
    "AuthorizationHeaderMalformed": _ELSEWHERE, "IllegalLocationConstraintException": _ELSEWHERE,
}  # fmt: skip
_BY_STATUS = {301: _ELSEWHERE, 307: _ELSEWHERE, 401: _CREDENTIALS, 403: _CREDENTIALS, 429: _LATER, 503: _LATER}


@contextmanager
def _errors(where: str) -> Iterator[None]:
    """The errors of clients and server as ours. Only kinds and codes: their texts may hold keys or signatures."""
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith(("botocore", "boto3", "urllib3")):
            raise
        raise _as_ours(error, where) from None


def _as_ours(error: Exception, where: str) -> StorageError:
    response = getattr(error, "response", None)
    kind = type(error).__name__
    if not isinstance(response, dict):
        hint = "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" if "Credential" in kind else None
        hint = "set AWS_REGION" if "Region" in kind else hint
        return StorageError("The store cannot be reached", where=where, found=kind, hint=hint)
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    code = str(response.get("Error", {}).get("Code"))
    if status in (412, 409) and code in ("PreconditionFailed", "412", "ConditionalRequestConflict"):
        return Precondition("The object is not as it was expected to be", where=where, found=code)
    if status == 404:
        return Missing("There is no such object, bucket or upload", where=where, found=code)
    hint = _HINTS.get(code, _BY_STATUS.get(status))
    return StorageError("The store refuses the request", where=where, found=f"HTTP status {status}, {code}", hint=hint)
