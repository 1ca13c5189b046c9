"""A hub to talk to, and a client that believes it is the real one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import close_session, constants

from rewrite.integrations.http import Http
from tests.servers.hub import Cdn, HubStub


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
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.4)
        monkeypatch.setattr(Http, "first_wait", 0.01)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield stub
        close_session()
