"""An S3 server (moto) behind a proxy that counts, and that misbehaves when it is told to."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from typing import Any
from urllib.parse import quote

from tests.servers.http import Reply, Request, Server

_HOP = frozenset({"connection", "transfer-encoding", "content-length", "server", "date"})


class S3Stub(Server):
    """A proxy in front of moto, which checks no signatures."""

    def __init__(self) -> None:
        super().__init__()
        self._port = 0

    @contextmanager
    def running(self) -> Iterator[str]:
        from moto.server import ThreadedMotoServer

        moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        moto.start()
        try:
            self._port = int(moto.get_host_and_port()[1])
            with super().running() as url:
                yield url
        finally:
            moto.stop()

    def behind(self) -> Any:
        """A client of moto itself, which may be asked while a request is answered here."""
        boto3: Any = importlib.import_module("boto3")
        return boto3.client("s3", endpoint_url=f"http://127.0.0.1:{self._port}")

    def answer(self, request: Request) -> Reply:
        connection = HTTPConnection("127.0.0.1", self._port)
        path = quote(request.path) + (f"?{request.query}" if request.query else "")
        connection.request(request.method, path, request.body, dict(request.headers))
        found = connection.getresponse()
        body = found.read()
        headers = {name: value for name, value in found.getheaders() if name.lower() not in _HOP}
        if request.method == "HEAD":
            headers["Content-Length"] = found.getheader("Content-Length") or "0"
        connection.close()
        return Reply(found.status, body, headers)
