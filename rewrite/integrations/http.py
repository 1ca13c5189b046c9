"""Ranges by HTTP, from servers that may be slow, busy, wrong or hostile. No message has an address: it may be signed.

The client is huggingface_hub's: proxies and certificates are set up as for all else that uses the hub. That is httpx
in huggingface_hub 1.x and httpx2 in 2.x, which have the same methods.
"""

from __future__ import annotations

import importlib
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub import get_session

from rewrite.errors import StorageError

ATTEMPTS = 5
_BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
_LONGEST_WAIT = 120.0  # seconds: what a server may ask for with Retry-After
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class Unavailable(Exception):
    """Worth another try: it says what happened, ``wait`` how long the server asked to wait."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


@dataclass(frozen=True)
class Answer:
    """What a server sent: the first response of a chain of redirects, and the last one."""

    status: int
    body: bytes
    headers: Mapping[str, str]  # of the last response
    first: Mapping[str, str]  # of the first response: it comes from the server that was asked


class Http:
    """GETs that are tried again where that may help."""

    first_wait = 1.0  # seconds, then twice as long each time

    def __init__(self, timeout: float) -> None:
        self._client: Any = get_session()
        self._timeout = timeout
        roots = [kind.__module__.partition(".")[0] for kind in type(self._client).__mro__]
        self._errors: Any = importlib.import_module(next(root for root in roots if root in ("httpx", "httpx2")))

    def get(
        self, url: str, headers: Mapping[str, str], limit: int, where: str, span: tuple[int, int] | None = None
    ) -> Answer:
        """The body, of at most ``limit`` bytes; with ``span`` exactly these bytes of a file. ``where`` is for messages.

        Any status that is an answer (404, 403) is returned. Raises :class:`StorageError` when it stays unavailable.
        """
        asked = {"accept-encoding": "identity", **headers}
        if span is not None:
            asked["range"] = f"bytes={span[0]}-{span[1] - 1}"
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return self._once(url, asked, limit, span)
            except Unavailable as reason:
                if attempt == ATTEMPTS:
                    raise StorageError(
                        "The server does not answer as it should", where=where, found=f"{reason}, {attempt} times",
                        hint="try again later",
                    ) from None  # fmt: skip
                wait = self.first_wait * 2 ** (attempt - 1) if reason.wait is None else reason.wait
                time.sleep(min(wait, _LONGEST_WAIT))
        raise AssertionError  # not reached

    def _once(self, url: str, headers: Mapping[str, str], limit: int, span: tuple[int, int] | None) -> Answer:
        try:
            with self._client.stream(
                "GET", url, headers=headers, timeout=self._timeout, follow_redirects=True
            ) as response:
                if response.status_code in _BUSY:
                    raise Unavailable(f"HTTP status {response.status_code}", _retry_after(response.headers))
                return self._answer(response, limit, span)
        except (self._errors.HTTPError, self._errors.InvalidURL) as error:
            # Only the kind: the text of these errors may hold an address with a signature.
            kind = f"a broken connection ({type(error).__name__})"
            kind = "a time-out" if isinstance(error, self._errors.TimeoutException) else kind
            raise Unavailable("redirects without an end" if "Redirects" in type(error).__name__ else kind) from None

    def _answer(self, response: Any, limit: int, span: tuple[int, int] | None) -> Answer:
        first = dict((response.history[0] if response.history else response).headers)
        status, headers = response.status_code, dict(response.headers)
        if status >= 300:
            return Answer(status, b"", headers, first)
        if span is not None:
            _check_range(status, headers, span)
            limit = span[1] - span[0]
        body = bytearray()
        # Counted as it comes: a server may send without an end. A range is bytes as they are stored.
        for chunk in response.iter_raw() if span is not None else response.iter_bytes():
            body += chunk
            if len(body) > limit:
                raise Unavailable(f"more than the {limit} bytes asked for")
        if span is not None and len(body) != limit:
            raise Unavailable(f"{len(body)} of the {limit} bytes asked for")
        return Answer(status, bytes(body), headers, first)


def _check_range(status: int, headers: Mapping[str, str], span: tuple[int, int]) -> None:
    """That the body will be the range and nothing else, before a byte of it is read."""
    if status != 206:
        if span[0] == 0 and headers.get("content-length") == str(span[1]):
            return  # all of a small file: the same bytes
        raise Unavailable(f"HTTP status {status} where a range was asked for")
    found = _RANGE.fullmatch(headers.get("content-range", ""))
    if found is None or (int(found[1]), int(found[2])) != (span[0], span[1] - 1):
        raise Unavailable("another range than the one asked for")


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds; None for a date or nothing: then we choose."""
    text = headers.get("retry-after", "")
    return float(text) if re.fullmatch(r"\d{1,6}", text) else None
