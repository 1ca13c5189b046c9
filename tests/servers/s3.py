"""An S3 server (moto) behind one that counts, that knows checksums as AWS does, and that misbehaves when it is told to.

moto's application is called in this process: a second server would cost a connection and a thread for each request.
"""

from __future__ import annotations

import importlib
import io
import re
import sys
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from hashlib import sha256
from typing import Any, Literal
from urllib.parse import parse_qs, quote

from tests.servers.http import Reply, Request, Server

_HOP = frozenset({"connection", "transfer-encoding", "content-length", "server", "date"})


class _Moto(Server):
    """moto itself, which checks no signatures."""

    def answer(self, request: Request) -> Reply:
        from werkzeug.test import run_wsgi_app

        environ = {f"HTTP_{name.upper().replace('-', '_')}": value for name, value in request.headers.items()}
        environ["CONTENT_TYPE"] = environ.pop("HTTP_CONTENT_TYPE", "")
        uri = quote(request.path) + (f"?{request.query}" if request.query else "")
        server = {"SERVER_NAME": "127.0.0.1", "SERVER_PORT": "80", "SERVER_PROTOCOL": "HTTP/1.1"}
        target = {"REQUEST_URI": uri, "RAW_URI": uri, "QUERY_STRING": request.query, "REQUEST_METHOD": request.method}
        body: dict[str, Any] = {"CONTENT_LENGTH": str(len(request.body)), "wsgi.input": io.BytesIO(request.body)}
        wsgi = {"wsgi.url_scheme": "http", "wsgi.errors": sys.stderr, "wsgi.multithread": True}
        path = {"PATH_INFO": request.path.encode().decode("latin-1"), "SCRIPT_NAME": ""}  # as WSGI has it
        chunks, status, headers = run_wsgi_app(_application(), {**environ, **server, **target, **body, **wsgi, **path})
        found = {name: value for name, value in headers if name.lower() not in _HOP}
        if request.method == "HEAD":
            found["Content-Length"] = headers.get("Content-Length") or "0"
        return Reply(int(status.split()[0]), b"".join(chunks), found)


@cache
def _application() -> Any:
    application: Any = importlib.import_module("moto.server").create_backend_app("s3")
    application.config["PROPAGATE_EXCEPTIONS"] = False  # one of moto's own is an answer with status 500
    application.logger.disabled = True
    return application


class S3Stub(Server):
    """In front of moto.

    ``sums``: what it makes of SHA-256 checksums. "all", as AWS; "ignored", as Ceph 16; "refused", as Backblaze B2 did
    and Cloudflare R2 does; "copies without", as LocalStack. What it says of an object, or a part, is that of the bytes
    that it has at that moment.
    """

    def __init__(self) -> None:
        super().__init__()
        self._moto = _Moto()
        self.sums: Literal["all", "ignored", "refused", "copies without"] = "all"

    @contextmanager
    def running(self) -> Iterator[str]:
        backends: Any = importlib.import_module("moto.s3.models").s3_backends
        with self._moto.running(), super().running() as url:
            yield url
        for account in backends.values():
            account.reset()

    @cached_property
    def behind(self) -> Any:
        """A client of moto itself, which may be asked while a request is answered here."""
        boto3: Any = importlib.import_module("boto3")
        return boto3.client("s3", endpoint_url=self._moto.url)

    def stored(self, key: str) -> Any:
        """The object of moto itself, whose bytes (``value``) can be changed behind its ETag."""
        return bucket().keys[key]

    def part(self, upload: str, number: int) -> Any:
        """A part, as :meth:`stored`."""
        return bucket().multiparts[upload].parts[number]

    def answer(self, request: Request) -> Reply:
        if self.sums == "ignored":
            return self._passed(request)
        asked = [name for name in request.headers if name.startswith("x-amz-checksum-")]
        if self.sums == "refused" and asked:
            return _refused("InvalidArgument", f"Unsupported header '{asked[0]}' received for this API call.")
        return self._refuse(request) or self._summed(request, self._passed(request))

    def _refuse(self, request: Request) -> Reply | None:
        """Bytes that are not those of their checksum; an object whose parts are named without theirs."""
        stated = request.headers.get("x-amz-checksum-sha256")
        if stated and stated != _sum(request.body):
            return _refused("BadDigest", "The SHA256 you specified did not match the calculated checksum.")
        upload = _upload(request)
        begun = bucket().multiparts.get(upload) if upload else None
        if request.method == "POST" and begun is not None and begun.metadata.get("x-amz-checksum-algorithm"):
            for part in re.findall(r"<Part>.*?</Part>", request.body.decode(), re.DOTALL):
                number = int(re.findall(r"<PartNumber>(\d+)<", part)[0])
                told = re.findall(r"<ChecksumSHA256>([^<]*)<", part)
                if not told:
                    return _refused("InvalidRequest", f"The checksum was missing for part {number} in the request.")
                if told[0] != _sum(begun.parts[number].value):
                    return _refused("InvalidPart", "One or more of the specified parts could not be found.")
        return None

    def _summed(self, request: Request, reply: Reply) -> Reply:
        """The answer, with the checksum of what the store has now."""
        upload = _upload(request)
        if reply.status >= 300 or request.method not in ("PUT", "GET", "HEAD"):
            return reply
        if upload and "x-amz-copy-source" in request.headers and self.sums != "copies without":
            part = self.part(upload, int(parse_qs(request.query)["partNumber"][0]))
            reply.body = reply.body.replace(b"</CopyPartResult>", _element(part.value) + b"</CopyPartResult>")
        elif upload and request.method == "GET":
            parts = {str(number): part for number, part in bucket().multiparts[upload].parts.items()}
            reply.body = re.sub(
                rb"<PartNumber>(\d+)</PartNumber>", lambda m: m[0] + _element(parts[m[1].decode()].value), reply.body
            )
        elif request.method == "HEAD" and "x-amz-checksum-mode" in request.headers:
            reply.headers = {k: v for k, v in reply.headers.items() if not k.lower().startswith("x-amz-checksum-")}
            reply.headers["x-amz-checksum-sha256"] = _of_object(bucket().keys[request.path.split("/", 2)[2]])
        return reply

    def _passed(self, request: Request) -> Reply:
        reply, upload = self._moto.answer(request), _upload(request)
        if reply.status == 500 and upload and upload not in bucket().multiparts:  # moto's KeyError
            return _refused("NoSuchUpload", "The specified multipart upload does not exist.", 404)
        return reply


def objects() -> dict[str, bytes]:
    """What is in the bucket ``models``, by key; of versions the last, where it is not a deletion."""
    return {name: key.value for name, key in bucket().keys.items() if hasattr(key, "value")}


def bucket() -> Any:
    """The bucket ``models`` of moto itself."""
    backends: Any = importlib.import_module("moto.s3.models").s3_backends
    return backends["123456789012"]["aws"].buckets["models"]


def _upload(request: Request) -> str | None:
    return parse_qs(request.query).get("uploadId", [None])[0]


def _sum(data: bytes) -> str:
    return b64encode(sha256(data).digest()).decode()


def _of_object(key: Any) -> str:
    """That of its bytes or, where it was put together, that of those of its parts."""
    data = key.value
    if key.multipart is None:
        return _sum(data)
    sums, start = b"", 0
    for number in key.multipart.partlist:
        size = key.multipart.parts[number].size
        sums, start = sums + sha256(data[start : start + size]).digest(), start + size
    return f"{_sum(sums)}-{len(key.multipart.partlist)}"


def _element(data: bytes) -> bytes:
    return f"<ChecksumSHA256>{_sum(data)}</ChecksumSHA256>".encode()


def _refused(code: str, message: str, status: int = 400) -> Reply:
    text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
    return Reply(status, text.encode(), {"Content-Type": "application/xml"})
