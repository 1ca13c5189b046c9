"""How many bytes of a checkpoint in a bucket, or on the hub, go over the network, by the client's own count; and the
seconds, of which the servers of the tests, in this very process, take most.

S3 is moto, or the server of ``REWRITE_S3_ENDPOINT`` (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY); the hub is that of
the tests, whose large files the genuine Xet client keeps in a directory. Every output is compared with that of a local
conversion, byte for byte.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import rewrite
from benchmark.copying import Disagreement
from benchmark.table import table
from rewrite.integrations import s3
from rewrite.integrations.s3 import S3Storage
from tests.servers.hub import Cas, HubStub

_CHUNK = 8 << 20


@dataclass(frozen=True)
class Moved:
    """One command: bytes ``read`` and ``sent`` of ``size``, seconds by the clock and of the processor."""

    command: str
    read: int
    sent: int
    size: int
    seconds: tuple[float, float]


def _now() -> tuple[float, float]:
    return time.monotonic(), time.process_time()


def _since(began: tuple[float, float]) -> tuple[float, float]:
    now = _now()
    return now[0] - began[0], now[1] - began[1]


def measure(source: Path, work: Path) -> list[Moved]:
    """Convert ``source`` here, in a bucket and to the hub. Raises :class:`Disagreement` where an output differs."""
    source = source.rename(source.with_name("in"))  # the manifest says the name
    rewrite.convert(source, work / "local")
    with _store() as bucket:
        s3 = list(_in_bucket(source, work / "local", bucket))
    return [*s3, *_on_hub(source, work)]


def report(moved: list[Moved]) -> list[str]:
    """A row for each command."""
    rows = [
        [
            m.command,
            f"{m.read:,}",
            f"{m.sent:,}",
            f"{100 * (m.read + m.sent) / m.size:.4f} %",
            *map("{:.2f}".format, m.seconds),
        ]
        for m in moved
    ]
    head = ["command", "bytes read", "bytes sent", f"of {moved[0].size:,}", "seconds", "processor"]
    return list(table([head, *rows], right=range(1, 6)))


@contextmanager
def _store() -> Iterator[str]:
    """An S3 server with an empty bucket, whose name it gives."""
    name = f"rewrite-{uuid.uuid4().hex[:12]}"
    moto: Any = None
    if "REWRITE_S3_ENDPOINT" in os.environ:
        os.environ["AWS_ENDPOINT_URL"] = os.environ["REWRITE_S3_ENDPOINT"]
    else:
        from moto.server import ThreadedMotoServer

        moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        moto.start()
        os.environ["AWS_ENDPOINT_URL"] = "http://127.0.0.1:{1}".format(*moto.get_host_and_port())
        os.environ.update(AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="testtest")
    os.environ.setdefault("AWS_REGION", "us-east-1")
    client = s3._client()
    client.create_bucket(Bucket=name)
    try:
        yield name
    finally:
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=name):
            for entry in page.get("Contents", []):
                client.delete_object(Bucket=name, Key=entry["Key"])
        client.delete_bucket(Bucket=name)
        if moto is not None:
            moto.stop()


def _in_bucket(source: Path, local: Path, bucket: str) -> Iterator[Moved]:
    client = s3._client()
    for path in source.iterdir():
        client.upload_file(str(path), bucket, f"in/{path.name}")
    began = _now()
    storage = S3Storage(f"s3://{bucket}/in")
    rewrite.inspect_checkpoint(storage)
    size = sum(file.size for file in storage.list_files().files.values())
    yield Moved("inspect s3://…", storage.traffic.read, storage.traffic.sent, size, _since(began))
    began = _now()
    counts = rewrite.convert(f"s3://{bucket}/in", f"s3://{bucket}/out").counts
    assert counts is not None
    assert counts.sent is not None
    yield Moved("convert s3://… s3://…", counts.read, counts.sent, size, _since(began))
    for path in local.iterdir():
        body = client.get_object(Bucket=bucket, Key=f"out/{path.name}")["Body"]
        _compare(path, body.iter_chunks(_CHUNK), "s3://")


def _on_hub(source: Path, work: Path) -> Iterator[Moved]:
    """Through the genuine client of Xet. What it sends is what the directory grows by."""
    os.environ.update(
        HF_TOKEN="hf_secret", HF_XET_CACHE=str(work / "xet-cache"), HF_HUB_DISABLE_PROGRESS_BARS="1", HF_HOME=str(work)
    )
    from huggingface_hub import HfApi, constants

    cas = Cas(work / "cas")
    (work / "cas").mkdir()
    for directory in (source, work / "local"):
        for path in directory.glob("*.safetensors"):
            cas.know(path)
    stub = HubStub()
    stub.cas = cas
    with stub.running() as url:
        constants.ENDPOINT, constants.HF_HUB_OFFLINE = url, False
        constants.HUGGINGFACE_CO_URL_TEMPLATE = url + "/{repo_id}/resolve/{revision}/{filename}"
        constants.HF_HUB_CACHE = str(work / "hf-cache")
        api = HfApi(endpoint=url)
        api.create_repo("org/model")
        api.upload_folder(repo_id="org/model", folder_path=source)
        began = _now()
        storage: Any = rewrite.open_storage("hf://org/model")
        rewrite.inspect_checkpoint(storage)
        size = sum(file.size for file in storage.list_files().files.values())
        yield Moved("inspect hf://…", storage.traffic.read, storage.traffic.sent, size, _since(began))
        before, began = cas.size, _now()
        rewrite.convert(source, "hf://me/out")
        yield Moved("convert IN hf://… (Xet)", 0, cas.size - before, size, _since(began))
        for path in (work / "local").iterdir():
            _compare(path, _pieces(stub, path.name), "hf://")


def _pieces(stub: HubStub, name: str) -> Iterator[bytes]:
    commit = stub.at("me/out", "main")
    assert commit is not None
    file = commit.files[name]
    for start in range(0, file.size, _CHUNK):
        yield file.read(start, min(start + _CHUNK, file.size))


def _compare(path: Path, pieces: Iterator[bytes], where: str) -> None:
    found, expected = sha256(), sha256()
    for piece in pieces:
        found.update(piece)
    with path.open("rb") as file:
        while data := file.read(_CHUNK):
            expected.update(data)
    if found.digest() != expected.digest():
        raise Disagreement(f"{where}: {path.name} is not that of a local conversion")
