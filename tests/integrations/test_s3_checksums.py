# ruff: noqa: F811
"""Bytes that the store no longer has, though size and ETag are the same; and stores that know nothing of checksums."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qs

import pytest

import rewrite
from rewrite.errors import StorageError
from rewrite.planning.jobs import FileCopy, ShardPlan
from tests.integrations.test_s3 import _completes, download, exists, local, run, source, uploads  # noqa: F401 (fixtures)
from tests.integrations.test_s3_foreign import largest, planned
from tests.servers.http import Reply, Request
from tests.servers.s3 import S3Stub

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def damage(stored: object) -> None:
    """Turn a bit, and leave the ETag."""
    before, data = stored.etag, bytearray(stored.value)  # type: ignore[attr-defined]
    data[len(data) // 2] ^= 1
    stored.value = bytes(data)  # type: ignore[attr-defined]
    assert stored.etag == before  # type: ignore[attr-defined]


@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize("moment", ["list of parts", "completion"])
def test_a_part_that_changes_behind_its_etag(s3: S3Stub, source: Path, moment: str, copied: bool, vl: Path) -> None:
    """Before it is listed: seen here. After that: the store itself refuses the checksums that it is told."""
    conversion = planned() if copied else rewrite.plan_conversion(vl, "s3://models/out")
    name, done = largest(conversion).name, list[int]()

    def change(request: Request) -> None:
        listed = request.method == "GET" and "uploadId" in request.query
        if request.path.endswith(f"/out/{name}") and (listed if moment == "list of parts" else _completes(request)):
            if not done:
                damage(s3.part(parse_qs(request.query)["uploadId"][0], 1 + copied))
            done.append(1)

    s3.misbehave = change
    with pytest.raises(StorageError, match="not kept what was written" if moment != "completion" else "refuses"):
        conversion.publish(1)
    assert done
    assert not exists("out/config.json")
    s3.misbehave = lambda request: None
    assert not exists("out.rewrite-complete")


@pytest.mark.parametrize("kind", [ShardPlan, FileCopy])
def test_an_object_that_changes_behind_its_etag(s3: S3Stub, source: Path, kind: type) -> None:
    """While the last files are written: seen before the mark."""
    conversion = planned()
    name = largest(conversion, kind).name
    conversion.run_part(0, 1)
    damage(s3.stored(f"out/{name}"))
    with pytest.raises(StorageError, match="not kept what was written") as refused:
        planned().finish()
    assert refused.value.where == f"s3://models/out/{name}"
    assert not exists("out.rewrite-complete")


@pytest.mark.parametrize("sums", ["ignored", "refused", "copies without"])
def test_a_store_without_checksums(s3: S3Stub, source: Path, local: dict[str, bytes], sums: str) -> None:
    """By size and ETag, also where several uploads are under way when it turns out; and this is said."""
    s3.sums = sums  # type: ignore[assignment]
    result = run("convert", "s3://models/in", "s3://models/out", "--profile", "exact", "--json", "--workers", "8")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["bytes"]["unsummed"] > 0
    assert download("out") == local
    assert uploads() == 0
    result = run("convert", "s3://models/in", "s3://models/again", "--profile", "exact")
    assert "no checksum from the store of" in " ".join(result.stdout.split())


def test_a_store_with_checksums_needs_no_word(s3: S3Stub, source: Path) -> None:
    """Of every file."""
    result = run("convert", "s3://models/in", "s3://models/out", "--profile", "exact", "--json")
    assert "unsummed" not in json.loads(result.stdout)["bytes"]


@pytest.mark.parametrize("what", [lambda r: "partNumber" in r.query, lambda r: r.path.endswith("/out/config.json")])
def test_bytes_that_change_on_the_way(
    s3: S3Stub, vl: Path, what: Callable[[Request], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store refuses them, and they are not sent again without a checksum."""
    real = S3Stub.answer

    def changed(self: S3Stub, request: Request) -> Reply:
        if request.method == "PUT" and what(request):
            body = bytes([request.body[0] ^ 1]) + request.body[1:]
            request = Request(request.method, request.path, request.query, request.headers, body, request.number)
        return real(self, request)

    monkeypatch.setattr(S3Stub, "answer", changed)
    with pytest.raises(StorageError, match="refuses the request") as refused:
        rewrite.convert(vl, "s3://models/out", workers=1)
    assert "BadDigest" in str(refused.value.found)
    assert not exists("out.rewrite-complete")
