"""An output whose last files are not written yet, read as it will be."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from rewrite.checkpoint.storage import FileId, Listing, Reader, Storage


@dataclass(frozen=True)
class Overlay:
    """``below``, with small files that only this process has: a :class:`~rewrite.checkpoint.storage.Storage`."""

    below: Storage
    files: Mapping[str, bytes]

    def __str__(self) -> str:
        return str(self.below)

    @property
    def name(self) -> str:
        return self.below.name

    @property
    def readers(self) -> int:
        return self.below.readers

    def list_files(self) -> Listing:
        found = self.below.list_files()
        new = {name: InMemory(data).file_id for name, data in self.files.items()}
        return Listing(dict(sorted({**found.files, **new}.items())), found.passed_over)

    @contextmanager
    def open(self, name: str) -> Iterator[Reader]:
        if name in self.files:
            yield InMemory(self.files[name])
        else:
            with self.below.open(name) as file:
                yield file


@dataclass(frozen=True)
class InMemory:
    """A :class:`~rewrite.checkpoint.storage.Reader` of bytes."""

    data: bytes

    @property
    def file_id(self) -> FileId:
        return FileId(len(self.data), 0, hashlib.sha256(self.data).hexdigest())

    def read(self, start: int, length: int) -> bytes:
        return self.data[start : start + length]
