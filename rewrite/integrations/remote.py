"""What storages behind a network share: few requests, whole answers, and a count of the bytes that came and went."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock

from rewrite.checkpoint.storage import FileId, Listing, Reader
from rewrite.errors import StorageError

#: Read in one go from the beginning of a file: length, header and first scales of most shards, all of most configs.
HEAD = 64 << 10
_CACHE = 64 << 20  # bytes kept of what was read: the scales are read once for each profile that is looked at
_CACHED = 8 << 20  # beyond this a range is not kept


class Traffic:
    """Counts what went over the network. ``watch``, where set, is called with the bytes read so far."""

    def __init__(self) -> None:
        self.read = self.sent = self.requests = 0
        self.watch: Callable[[int], object] | None = None
        self._lock = Lock()

    def count(self, *, read: int = 0, sent: int = 0, requests: int = 0) -> None:
        with self._lock:
            self.read, self.sent, self.requests = self.read + read, self.sent + sent, self.requests + requests
            if self.watch is not None and read:
                self.watch(self.read)

    def to_json(self) -> dict[str, int]:
        return {"read": self.read, "sent": self.sent, "requests": self.requests}


class RemoteStorage(ABC):
    """A :class:`~rewrite.checkpoint.storage.Storage` that reads ranges over a network."""

    readers = 16
    _listing: Listing  # what was there when it was opened

    def __init__(self) -> None:
        self.traffic = Traffic()
        self._kept: dict[tuple[str, int, int], bytes] = {}  # ranges that were read, the latest used one last
        self._kept_size = 0
        self._lock = Lock()

    def identify(self, name: str) -> FileId:
        """What the file ``name`` is. Raises :class:`StorageError` where there is none."""
        try:
            return self._listing.files[name]
        except KeyError:
            raise StorageError("There is no such file", where=f"{self}/{name}") from None

    @abstractmethod
    def fetch(self, name: str, start: int, end: int) -> bytes:
        """These bytes of a file, not one less: anything else raises :class:`StorageError`."""

    @contextmanager
    def open(self, name: str) -> Iterator[Reader]:
        yield RemoteFile(self, name, self.identify(name))

    def read(self, name: str, start: int, end: int) -> bytes:
        """As :meth:`fetch`, from memory where it was read before."""
        key = (name, start, end)
        with self._lock:
            if key in self._kept:
                self._kept[key] = self._kept.pop(key)
                return self._kept[key]
        data = self.fetch(name, start, end)
        if len(data) != end - start:
            raise StorageError(
                "The server sent another number of bytes", where=f"{self}/{name}", expected=end - start, found=len(data)
            )
        if len(data) <= _CACHED:
            with self._lock:
                self._kept_size += len(data) - len(self._kept.pop(key, b""))
                self._kept[key] = data
                while self._kept_size > _CACHE:
                    self._kept_size -= len(self._kept.pop(next(iter(self._kept))))
        return data


class RemoteFile:
    """A :class:`~rewrite.checkpoint.storage.Reader` of a remote file."""

    def __init__(self, storage: RemoteStorage, name: str, file_id: FileId) -> None:
        self.file_id = file_id
        self._storage, self._name = storage, name

    def read(self, start: int, length: int) -> bytes:
        end = min(start + length, self.file_id.size)
        if end <= start:
            return b""
        top = min(HEAD, self.file_id.size)
        if start >= top:
            return self._storage.read(self._name, start, end)
        head = self._storage.read(self._name, 0, top)[start:end]
        return head if end <= top else head + self._storage.read(self._name, top, end)
