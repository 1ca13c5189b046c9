"""The same against a real S3 server, with the real size of parts. scripts/ceph/test.sh runs it against Ceph.

``REWRITE_S3_ENDPOINT`` names the server, the variables of AWS the credentials.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from click.testing import CliRunner, Result

import rewrite
from rewrite.cli.commands import main
from rewrite.errors import StorageError
from rewrite.integrations import s3 as s3_module
from rewrite.integrations import s3_write
from tests.support import raw_tensors, tree, write_shard

ENDPOINT = os.environ.get("REWRITE_S3_ENDPOINT")
pytestmark = [
    pytest.mark.s3_server,
    pytest.mark.skipif(ENDPOINT is None, reason="needs an S3 server: scripts/ceph/test.sh starts one"),
]


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("AWS_ENDPOINT_URL", ENDPOINT or "")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    s3_module._client_of.cache_clear()
    return s3_module._client()


@pytest.fixture
def bucket(client: Any) -> Iterator[str]:
    """A new bucket, removed afterwards."""
    name = f"rewrite-{uuid4().hex}"
    client.create_bucket(Bucket=name)
    yield name
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=name):
        for entry in page.get("Contents", []):
            client.delete_object(Bucket=name, Key=entry["Key"])
    client.delete_bucket(Bucket=name)


@pytest.fixture
def large(vl: Path, tmp_path: Path) -> Path:
    """A checkpoint with a shard of more than 40 MB that is rewritten, so that parts have their real size."""
    root = Path(shutil.copytree(vl, tmp_path / "in"))
    raw = raw_tensors(root)
    shard = next(file for name, (file, *_) in raw.items() if name.endswith("in_proj_qkv.weight"))
    tensors = {name: (dtype, shape, data) for name, (file, dtype, shape, data) in raw.items() if file == shard}
    tensors["padding"] = ("BF16", (20 << 20,), bytes(40 << 20))
    write_shard(root / shard, tensors, format="pt")
    index = json.loads((root / "model.safetensors.index.json").read_text())
    index["weight_map"]["padding"] = shard
    index["metadata"]["total_size"] += 40 << 20
    (root / "model.safetensors.index.json").write_text(json.dumps(index))
    return root


def run(*words: object) -> Result:
    """The command line, in this process."""
    return CliRunner().invoke(main, [str(word) for word in words])


def download(client: Any, bucket: str, prefix: str) -> dict[str, bytes]:
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/")
    keys = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
    return {k.removeprefix(f"{prefix}/"): client.get_object(Bucket=bucket, Key=k)["Body"].read() for k in keys}


def test_a_conversion_within_the_server(client: Any, bucket: str, large: Path, tmp_path: Path) -> None:
    """The same bytes as a local conversion; parts have 5 MiB at least, most are copied. Verified there, too."""
    rewrite.convert(large, tmp_path / "local")
    local = tree(tmp_path / "local")
    for name, data in tree(large).items():
        client.put_object(Bucket=bucket, Key=f"in/{name}", Body=data)
    result = run("convert", f"s3://{bucket}/in", f"s3://{bucket}/out", "--json", "--profile", "exact")
    assert result.exit_code == 0, result.output
    assert download(client, bucket, "out") == local
    counted = json.loads(result.stdout)["bytes"]
    assert counted["read"] + counted["sent"] < 0.4 * sum(map(len, local.values()))
    assert run("verify", f"s3://{bucket}/in", f"s3://{bucket}/out", "-q", "--device", "cpu").exit_code == 0


def test_small_ones_both_ways(client: Any, bucket: str, vl: Path, tmp_path: Path) -> None:
    """Up, there, and down again."""
    rewrite.convert(vl, tmp_path / "local")
    rewrite.convert(vl, f"s3://{bucket}/up")
    assert download(client, bucket, "up") == tree(tmp_path / "local")
    rewrite.convert(f"s3://{bucket}/up", tmp_path / "down")
    assert tree(tmp_path / "down") == tree(tmp_path / "local")


def test_an_upload_goes_on_where_it_stopped(
    client: Any, bucket: str, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts are listed, kept, and not sent again."""
    with monkeypatch.context() as patch:
        patch.setattr(s3_write.Upload, "complete", _killed)
        patch.setattr(s3_write.Upload, "abort", lambda self: None)
        with pytest.raises(StorageError, match="killed"):
            rewrite.convert(large, f"s3://{bucket}/out", workers=1)
    left = client.list_multipart_uploads(Bucket=bucket)["Uploads"]
    assert left
    counts = rewrite.convert(large, f"s3://{bucket}/out").counts
    assert counts is not None
    assert counts.sent is not None
    assert counts.sent < 0.6 * sum(path.stat().st_size for path in large.iterdir())
    assert not client.list_multipart_uploads(Bucket=bucket).get("Uploads")


def _killed(*_: object) -> None:
    raise StorageError("killed")


def test_an_object_that_changed_is_noticed(client: Any, bucket: str, vl: Path) -> None:
    """Also where the server ignores the conditions of a copy."""
    for name, data in tree(vl).items():
        client.put_object(Bucket=bucket, Key=f"in/{name}", Body=data)
    planned = rewrite.plan_conversion(f"s3://{bucket}/in", f"s3://{bucket}/out")
    shard = planned.plan.shards[0]
    client.put_object(Bucket=bucket, Key=f"in/{shard.name}", Body=b"x" * shard.source.size)
    with pytest.raises(StorageError, match="changed while it was"):
        planned.publish(2)
    assert "config.json" not in download(client, bucket, "out")
