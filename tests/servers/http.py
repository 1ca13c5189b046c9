"""What the servers of the tests share: an HTTP/1.1 server in a thread, and the ways in which it can misbehave.

``server.misbehave`` is called with each request before it is answered. It may return a :class:`Fault`.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import unquote, urlsplit


@dataclass(frozen=True)
class Request:
    """One request, and how many came before it."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    body: bytes
    number: int


@dataclass(frozen=True)
class Fault:
    """What goes wrong: an answer with this status, or a broken one.

    ``drop``: the connection ends without an answer; ``short``: it ends half way; ``clipped``: a whole answer of half
    the bytes; ``hang``: no answer for a second; ``whole``: the range is ignored; ``shifted``: another range.
    """

    kind: Literal["status", "drop", "short", "clipped", "hang", "whole", "shifted"]
    status: int = 500
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Reply:
    """A status, headers and a body."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class Server(ABC):
    """Answers with :meth:`answer`. Use as ``with server.running():``."""

    def __init__(self) -> None:
        self.misbehave: Callable[[Request], Fault | None] = lambda request: None
        self.requests: list[Request] = []
        self.sent = self.received = 0  # bytes of bodies
        self.lock = threading.RLock()
        self.url = ""

    @abstractmethod
    def answer(self, request: Request) -> Reply:
        """What this server is about."""

    @contextmanager
    def running(self) -> Iterator[str]:
        """Its address, while it runs."""
        http = _Listener(("127.0.0.1", 0), _Handler)
        http.owner = self
        self.url = f"http://127.0.0.1:{http.server_address[1]}"
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield self.url
        finally:
            http.shutdown()
            http.server_close()
            thread.join()


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    owner: Server

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Listener

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name in the standard library
        pass

    def do_GET(self) -> None:
        owner = self.server.owner
        url = urlsplit(self.path)
        body = self._body()
        with owner.lock:
            headers = {name.lower(): value for name, value in self.headers.items()}
            request = Request(self.command, unquote(url.path), url.query, headers, body, len(owner.requests))
            owner.requests.append(request)
            owner.received += len(body)
            fault = owner.misbehave(request)
            reply = self._reply(request, fault)
        self._send(reply, fault)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815 - names of the standard library

    def _reply(self, request: Request, fault: Fault | None) -> Reply:
        if fault is None or fault.kind in ("short", "clipped", "hang", "drop"):
            return self.server.owner.answer(request)
        if fault.kind == "status":
            return Reply(fault.status, b"{}", dict(fault.headers))
        headers = dict(request.headers)
        start, end = map(int, headers.pop("range", "bytes=0-0").removeprefix("bytes=").split("-"))
        if fault.kind == "shifted":
            headers["range"] = f"bytes={start + 1}-{end + 1}"
        return self.server.owner.answer(Request(request.method, request.path, request.query, headers, b"", 0))

    def _send(self, reply: Reply, fault: Fault | None) -> None:
        kind = fault.kind if fault is not None else ""
        if kind == "hang":
            time.sleep(1)
        if kind in ("drop", "hang"):
            self.close_connection = True
            return
        body = reply.body[: len(reply.body) // 2] if kind == "clipped" else reply.body
        self.send_response(reply.status)
        for name, value in {"Content-Length": str(len(body)), **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if kind == "short":
            body = body[: len(body) // 2]
            self.close_connection = True
        self.wfile.write(body)
        with self.server.owner.lock:
            self.server.owner.sent += len(body)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body
