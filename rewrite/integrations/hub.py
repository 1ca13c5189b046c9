"""The Hugging Face hub as a storage: headers, config and scales of a model by range requests, pinned to one commit.

Plain GETs of ranges: a reader that reads ahead (``HfFileSystem``) fetches 300,000 bytes for a scale of 2. What lies in
the cache of huggingface_hub at that commit is read there. Settings are those of that library: ``HF_TOKEN``,
``HF_ENDPOINT``, ``HF_HUB_OFFLINE``, ``HF_HUB_CACHE``, ``HF_HUB_DOWNLOAD_TIMEOUT``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from huggingface_hub import constants, get_token, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import LocalEntryNotFoundError

from rewrite.checkpoint.checkpoint import is_inside
from rewrite.checkpoint.local import LocalDirectory, open_regular
from rewrite.checkpoint.storage import FileId, Listing
from rewrite.errors import CheckpointError, StorageError, UsageError
from rewrite.integrations.addresses import HUB_NAME
from rewrite.integrations.http import Answer, Http
from rewrite.integrations.remote import RemoteStorage
from rewrite.version import __version__

SCHEME = "hf://"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_MAX_LISTING = 64 << 20  # bytes of JSON


def split(address: str) -> tuple[str, str | None]:
    """Name and revision of ``org/name@revision``, with or without ``hf://``. Raises :class:`UsageError`."""
    text = address.removeprefix(SCHEME).rstrip("/")
    if not HUB_NAME.fullmatch(text):
        raise UsageError("Not the name of a model on the hub", expected="org/name or org/name@revision", found=address)
    name, _, revision = text.partition("@")
    return name, revision or None


def open_hub(address: str) -> HubStorage | LocalDirectory:
    """The model ``org/name[@revision]``. With ``HF_HUB_OFFLINE``: what of it is in the cache."""
    name, revision = split(address)
    if constants.is_offline_mode():
        return _cached(name, revision)
    return HubStorage(name, revision)


def _cached(name: str, revision: str | None) -> LocalDirectory:
    try:
        path = snapshot_download(name, revision=revision, local_files_only=True)
    except LocalEntryNotFoundError:
        raise StorageError(
            "The model is not in the cache, and HF_HUB_OFFLINE is set", where=SCHEME + name,
            hint="unset HF_HUB_OFFLINE, or pass a local directory",
        ) from None  # fmt: skip
    return Snapshot(path, name)


class Snapshot(LocalDirectory):
    """A model in the cache of huggingface_hub: a directory that is named after its commit."""

    def __init__(self, root: str, model: str) -> None:
        super().__init__(root)
        self._model = model

    @property
    def name(self) -> str:
        return f"{self._model}@{self.root.name}"


class HubStorage(RemoteStorage):
    """A model on the hub, at the commit that ``revision`` (None: main) was when it was opened."""

    def __init__(self, model: str, revision: str | None = None) -> None:
        super().__init__()
        self.model = model
        self._endpoint = constants.ENDPOINT.rstrip("/")
        self._http = Http(float(constants.HF_HUB_DOWNLOAD_TIMEOUT))
        self._signed: dict[str, str] = {}  # where the hub sends us for a file; never shown to anybody
        info = self._info(revision)
        self.commit: str = info["sha"]
        self._listing = Listing.of(map(self._entry, info["siblings"]))

    def __str__(self) -> str:
        return f"{SCHEME}{self.model}@{self.commit}"

    @property
    def name(self) -> str:
        return f"{self.model}@{self.commit}"

    def __reduce__(self) -> tuple[type[HubStorage], tuple[str, str]]:
        return type(self), (self.model, self.commit)  # another process has a client of its own

    def list_files(self) -> Listing:
        return self._listing

    def in_cache(self, name: str) -> Path | None:
        """Where the file lies in the cache of huggingface_hub, at this commit."""
        path = try_to_load_from_cache(self.model, name, revision=self.commit)
        if not isinstance(path, str) or Path(path).stat().st_size != self.identify(name).size:
            return None
        return Path(path)

    def fetch(self, name: str, start: int, end: int) -> bytes:
        expected = self.identify(name)
        if (path := self.in_cache(name)) is not None:
            with open_regular(path) as file:
                return file.read(start, end - start)
        signed = self._signed.get(name)
        if signed is not None:
            answer = self._get(signed, name, {}, (start, end))
            if answer.status < 300:
                return self._checked(answer, name, expected)
            self._signed.pop(name, None)  # signatures expire
        url = f"{self._endpoint}/{self.model}/resolve/{self.commit}/{quote(name)}"
        answer = self._get(url, name, self._authorization(), (start, end))
        self._refuse(answer, f"{self}/{name}")
        tag = (answer.first.get("x-linked-etag") or answer.first.get("etag") or "").removeprefix("W/").strip('"')
        if tag and tag != expected.tag:
            raise self._changed(name, expected.text, tag)
        location = answer.first.get("location", "")
        if urlsplit(location).netloc not in ("", urlsplit(self._endpoint).netloc):
            self._signed[name] = location
        return self._checked(answer, name, expected)

    def _checked(self, answer: Answer, name: str, expected: FileId) -> bytes:
        # Without Content-Range it is said to be all of the file.
        total = answer.headers.get("content-range", f"/{len(answer.body)}").rpartition("/")[2]
        if total != str(expected.size):
            raise self._changed(name, f"{expected.size} bytes", f"{total} bytes")
        if len(answer.body) == expected.size:  # all of a file, such as config.json: its hash says whether it is the one
            found = content_tag(expected, (answer.body,))
            if found != expected.tag:
                raise self._changed(name, expected.text, found)
        return answer.body

    def _changed(self, name: str, expected: str, found: str) -> StorageError:
        return StorageError(
            "A file is not the one of the commit", where=f"{self}/{name}", expected=expected, found=found,
            hint="the server is at fault, or something between it and here: do not trust this copy",
        )  # fmt: skip

    def _get(self, url: str, name: str, headers: Mapping[str, str], span: tuple[int, int]) -> Answer:
        answer = self._http.get(url, headers, 0, f"{self}/{name}", span)
        self.traffic.count(read=len(answer.body), requests=1)
        return answer

    def _authorization(self) -> dict[str, str]:
        token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
        agent = {"user-agent": f"rewrite/{__version__}"}
        return agent if token is None else {**agent, "authorization": f"Bearer {token}"}

    def _info(self, revision: str | None) -> dict[str, Any]:
        where = SCHEME + self.model + (f"@{revision}" if revision else "")
        url = f"{self._endpoint}/api/models/{self.model}/revision/{quote(revision or 'main', safe='')}?blobs=true"
        answer = self._http.get(url, self._authorization(), _MAX_LISTING, where)
        self._refuse(answer, where)
        self.traffic.count(read=len(answer.body), requests=1)
        try:
            info = json.loads(answer.body)
            if _COMMIT.fullmatch(info["sha"]) and isinstance(info["siblings"], list):
                return dict(info)
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
        raise StorageError("The hub's answer cannot be understood", where=where, found=answer.body[:80])

    def _entry(self, entry: Any) -> tuple[str, FileId]:
        try:
            lfs = entry.get("lfs")
            name, size, tag = entry["rfilename"], entry["size"], lfs["sha256"] if lfs else entry["blobId"]
        except (AttributeError, KeyError, TypeError):
            name = size = tag = None
        if not isinstance(name, str) or not isinstance(tag, str) or type(size) is not int or size < 0:
            raise StorageError("The hub's list of files cannot be understood", where=str(self), found=entry)
        if not is_inside(name):
            raise CheckpointError("A file name leads out of the checkpoint", where=str(self), found=name)
        return name, FileId(size, 0, tag)

    def _refuse(self, answer: Answer, where: str) -> None:
        if answer.status < 300:
            return
        if answer.status in (401, 403):
            token = "a token" if "authorization" in self._authorization() else "no token"
            raise StorageError(
                "The hub does not let us read this", where=where,
                found=f"HTTP status {answer.status}, {token} was sent",
                hint="set HF_TOKEN (or run `hf auth login`), and accept the model's terms on its page",
            )  # fmt: skip
        absent = answer.status == 404
        raise StorageError(
            "The hub has no such model, revision or file" if absent else "The hub refuses the request",
            where=where, found=f"HTTP status {answer.status}",
            hint="check the name; private models need HF_TOKEN" if absent else None,
        )  # fmt: skip


def content_tag(like: FileId, pieces: Iterable[bytes | bytearray]) -> str:
    """What the hub calls a file with the bytes ``pieces``, of the size and the kind of ``like``: in LFS and Xet its
    SHA-256, else its id in git (SHA-1 of the bytes behind "blob", their number and a zero)."""
    if len(like.tag) == 64:
        digest = hashlib.sha256()
    else:
        digest = hashlib.sha1(f"blob {like.size}\0".encode(), usedforsecurity=False)
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()
