"""A hub to talk to, and a client that believes it is the real one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import close_session, constants

from rewrite.integrations import s3 as s3_module
from rewrite.integrations import s3_parts, s3_write
from rewrite.integrations.http import Http
from tests.servers.hub import Cdn, HubStub
from tests.servers.s3 import S3Stub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStub]:
    """An empty hub. There is no token, and nothing in the cache."""
    stub = HubStub()
    stub.cdn = Cdn(stub)
    with stub.running() as url, stub.cdn.running():
        cache = tmp_path / "hf-cache"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(cache), raising=False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 10)
        monkeypatch.setattr(Http, "first_wait", 0.01)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield stub
        close_session()


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Stub]:
    """A store with the empty bucket ``models``. Parts may be small, so that test checkpoints have many."""
    moto_models = pytest.importorskip("moto.s3.models")
    monkeypatch.setattr(moto_models, "S3_UPLOAD_PART_MIN_SIZE", 256)
    for module in (s3_parts, s3_write):
        monkeypatch.setattr(module, "MIN_PART", 4096)
    monkeypatch.setattr(s3_parts, "_COPIED", 16 << 10)
    monkeypatch.setattr(s3_parts, "_SENT", 8 << 10)
    monkeypatch.setattr(s3_module, "ATTEMPTS", 1)
    server = S3Stub()
    with server.running() as url:
        for name, value in {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "AKIDEXAMPLE",
            "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("AWS_PROFILE", raising=False)
        s3_module._client_of.cache_clear()
        s3_module._client().create_bucket(Bucket="models")
        server.requests.clear()
        server.sent = server.received = 0
        yield server
        s3_module._client_of.cache_clear()
