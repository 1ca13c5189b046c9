# ruff: noqa: F811
"""Bytes that somebody else puts into OUT, in any way and at any time, are never published as ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import rewrite
from rewrite import Conversion
from rewrite.errors import StorageError
from rewrite.integrations import s3 as s3_module
from rewrite.integrations.s3_parts import numbered_sizes, plan_parts
from rewrite.planning.jobs import FileCopy, Job, ShardPlan
from tests.integrations.test_s3 import (  # noqa: F401 (fixtures)
    _pending,
    download,
    exists,
    local,
    run,
    source,
    uploads,
)
from tests.servers.http import Request
from tests.servers.s3 import S3Stub

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
OUT = "s3://models/out"


def planned() -> Conversion:
    return rewrite.plan_conversion("s3://models/in", OUT)


def put(name: str, data: bytes) -> None:
    s3_module._client().put_object(Bucket="models", Key=f"out/{name}", Body=data)


def largest(conversion: Conversion, kind: type = ShardPlan) -> Job:
    return max((job for job in conversion.plan.jobs if isinstance(job, kind)), key=lambda job: job.size)


def hijack(job: Job, upload: str | None = None) -> str:
    """A multipart upload with parts of the planned sizes and other bytes; in ``upload``, where it is given."""
    client = s3_module._client()
    upload = upload or client.create_multipart_upload(Bucket="models", Key=f"out/{job.name}")["UploadId"]
    for number, size in numbered_sizes(plan_parts(job, copies=True)).items():
        client.upload_part(
            Bucket="models", Key=f"out/{job.name}", UploadId=upload, PartNumber=number, Body=b"\xee" * size
        )
    return upload


@pytest.mark.parametrize("kind", [ShardPlan, FileCopy])
@pytest.mark.parametrize("when", ["before any part", "after all parts", "before the claim is known"])
def test_an_object_of_the_right_size(
    s3: S3Stub,
    source: Path,
    local: dict[str, bytes],
    kind: type,
    when: str,
) -> None:
    """Written again by the part whose file it is; ``finish`` says that the file is missing."""
    conversion = planned()
    job = largest(conversion, kind)
    if when == "before the claim is known":
        put(job.name, b"\xff" * job.size)
        with pytest.raises(StorageError, match="output exists"):
            conversion.run_part(0, 1)
        return
    conversion.run_part(0, 1) if when == "after all parts" else conversion.run_part(0, 1000)
    put(job.name, b"\xff" * job.size)
    with pytest.raises(StorageError, match="were not written"):
        planned().finish()
    assert not exists("out.rewrite-complete")
    assert not exists("out/config.json")
    planned().run_part(0, 1)
    planned().finish()
    assert download("out") == local


@pytest.mark.parametrize("moment", ["/models/out/config.json", "/models/out/rewrite_manifest.json"])
def test_an_object_that_is_replaced_at_the_very_end(s3: S3Stub, source: Path, moment: str) -> None:
    """While the last files are written: seen before the mark."""
    conversion = planned()
    job = largest(conversion)

    def replace(request: Request) -> None:
        if request.method == "PUT" and request.path == moment:
            s3.behind.put_object(Bucket="models", Key=f"out/{job.name}", Body=b"\xff" * job.size)

    s3.misbehave = replace
    with pytest.raises(StorageError, match="has not kept what was written"):
        conversion.publish(2)
    assert not exists("out.rewrite-complete")


@pytest.mark.parametrize("last", ["config.json", "model.safetensors.index.json", "rewrite_manifest.json", "shard"])
def test_an_object_of_a_complete_output_that_is_replaced(s3: S3Stub, source: Path, last: str) -> None:
    """The same command does not say that all is well: the mark names the ETag of every file."""
    conversion = planned()
    conversion.publish(2)
    name = largest(conversion).name if last == "shard" else last
    put(name, b"\xff" * len(download("out")[name]))
    for again in (lambda: planned().publish(2), lambda: planned().run_part(0, 1), lambda: planned().finish()):
        with pytest.raises(StorageError, match="output exists"):
            again()


@pytest.mark.parametrize("when", ["before", "after the claim", "after a killed run"])
def test_an_upload_of_somebody_else(s3: S3Stub, source: Path, local: dict[str, bytes], when: str) -> None:
    """Refused by its key. It is neither taken for ours nor thrown away."""
    conversion = planned()
    job = largest(conversion)
    if when != "before":
        conversion.run_part(0, 1000)
    if when == "after a killed run":
        conversion.run_part(0, 1)
    upload = hijack(job)
    result = run("convert", "--profile", "exact", "s3://models/in", OUT)
    assert result.exit_code == 4
    assert "Somebody else has begun to upload" in result.stderr
    assert f"out/{job.name}" in result.stderr
    assert not exists("out/config.json")
    assert [found["UploadId"] for found in _pending()] == [upload]
    s3_module._client().abort_multipart_upload(Bucket="models", Key=f"out/{job.name}", UploadId=upload)
    planned().publish(2)
    assert download("out") == local


def test_an_upload_of_somebody_else_who_replaced_our_object(s3: S3Stub, source: Path) -> None:
    """Our record says that we have completed it: no upload of this key can be ours."""
    conversion = planned()
    job = largest(conversion)
    conversion.run_part(0, 1)
    put(job.name, b"\xff" * len(download("out")[job.name]))
    upload = hijack(job)
    with pytest.raises(StorageError, match="Somebody else has begun"):
        planned().publish(1)
    assert [found["UploadId"] for found in _pending()] == [upload]


def test_parts_that_somebody_put_into_our_upload(s3: S3Stub, source: Path, local: dict[str, bytes]) -> None:
    """Of an upload that was interrupted, only parts with the ETags that we noted are kept."""
    conversion = planned()
    job = largest(conversion)
    _stop_before_completing(s3, job, conversion)
    (upload,) = [found["UploadId"] for found in _pending() if found["Key"] == f"out/{job.name}"]
    hijack(job, upload)
    planned().publish(1)
    assert download("out") == local
    assert uploads() == 0


@pytest.mark.parametrize(
    "record",
    [
        lambda text, upload: text.replace(upload, "unknown"),
        lambda text, upload: text[: len(text) // 2],
        lambda text, upload: "[]",
        lambda text, upload: text.replace('"plan": "', '"plan": "0'),
    ],
)
def test_a_record_that_fits_nothing(
    s3: S3Stub,
    source: Path,
    local: dict[str, bytes],
    record: Callable[[str, str], str],
) -> None:
    """Of another plan, or not one: nothing is kept because of it, and our own upload is a stranger's then."""
    conversion = planned()
    job = largest(conversion)
    _stop_before_completing(s3, job, conversion)
    (upload,) = [found["UploadId"] for found in _pending() if found["Key"] == f"out/{job.name}"]
    client, key = s3_module._client(), f"out.rewrite-files/{job.name}"
    text = client.get_object(Bucket="models", Key=key)["Body"].read().decode()
    client.put_object(Bucket="models", Key=key, Body=record(text, upload).encode())
    with pytest.raises(StorageError, match="Somebody else has begun"):
        planned().publish(1)
    client.abort_multipart_upload(Bucket="models", Key=f"out/{job.name}", UploadId=upload)
    planned().publish(1)
    assert download("out") == local


def _stop_before_completing(s3: S3Stub, job: Job, conversion: Conversion) -> None:
    def stop(request: Request) -> None:
        if request.method == "POST" and "uploadId" in request.query and job.name in request.path:
            raise ConnectionAbortedError

    s3.misbehave = stop
    with pytest.raises(StorageError):
        conversion.publish(1)
    s3.misbehave = lambda request: None


def test_uploads_of_an_earlier_conversion(s3: S3Stub, source: Path, local: dict[str, bytes]) -> None:
    """Of another plan, whose objects were deleted: known by its records, thrown away."""
    earlier = rewrite.plan_conversion("s3://models/in", OUT, profile="portable")
    _stop_before_completing(s3, largest(earlier), earlier)
    assert uploads() > 0
    for key in ("out.rewrite-started", *(f"out/{name}" for name in download("out"))):
        s3_module._client().delete_object(Bucket="models", Key=key)
    planned().publish(2)
    assert download("out") == local
    assert uploads() == 0
    assert not download("out.rewrite-files")


def test_the_mark_names_every_file(s3: S3Stub, source: Path, local: dict[str, bytes]) -> None:
    """With the ETag that the store has for it."""
    planned().publish(2)
    first, *lines = (
        s3_module._client().get_object(Bucket="models", Key="out.rewrite-complete")["Body"].read().splitlines()
    )
    assert first.decode() == planned().plan.digest
    found = s3_module._client().list_objects_v2(Bucket="models", Prefix="out/")["Contents"]
    assert {line.decode() for line in lines} == {
        f"{entry['ETag'].strip(chr(34))}  {entry['Key'].removeprefix('out/')}" for entry in found
    }
    assert len(lines) == len(local)
