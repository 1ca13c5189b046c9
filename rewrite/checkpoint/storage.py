"""The door to where a checkpoint lies: list the files, and read ranges of them.

A local directory is :mod:`rewrite.checkpoint.local`. Whatever else can list files and read ranges can be another one:
:mod:`rewrite.integrations` has the Hugging Face hub.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class FileId:
    """Size and identity of a file. If a later look gives another value, the file has changed in the meantime."""

    size: int  # bytes
    mtime_ns: int  # last modification, in nanoseconds; 0 where the storage names contents instead
    tag: str = ""  # what a remote storage calls the contents: a hash or an ETag

    @property
    def text(self) -> str:
        return f"{self.size} bytes, " + (self.tag or f"modified at {self.mtime_ns} ns")

    def to_json(self) -> list[int | str]:
        return [self.size, self.mtime_ns, *([self.tag] if self.tag else [])]


@dataclass(frozen=True)
class Listing:
    """The files of a checkpoint by their relative name with ``/``, and the folders that were passed over."""

    files: dict[str, FileId]
    passed_over: tuple[str, ...]

    @classmethod
    def of(cls, found: Iterable[tuple[str, FileId]]) -> Listing:
        """Of all names of a storage that lists the files of folders, too."""
        files: dict[str, FileId] = {}
        passed_over: set[str] = set()
        for name, file_id in found:
            parts = name.split("/")
            above = ("/".join(parts[:n]) for n in range(1, len(parts) + 1))
            theirs = next(filter(is_passed_over, above), None)
            if theirs is None:
                files[name] = file_id
            else:
                passed_over.add(theirs)
        return cls(dict(sorted(files.items())), tuple(sorted(passed_over)))


class Reader(Protocol):
    """An open file."""

    @property
    def file_id(self) -> FileId:
        """What the file is at this moment."""

    def read(self, start: int, length: int) -> bytes:
        """``length`` bytes from the offset ``start``; fewer only where the file ends.

        Raises :class:`rewrite.errors.StorageError` when reading fails.
        """


class Storage(Protocol):
    """Where a checkpoint lies. ``str()`` of it is what messages say."""

    @property
    def name(self) -> str:
        """The last part of its address: what a manifest may say of it, without the machine that it was read on."""

    @property
    def readers(self) -> int:
        """How many reads at a time pay off: many where each waits for a network."""

    def list_files(self) -> Listing:
        """Every file, but those of folders that other tools keep beside a checkpoint (:func:`is_passed_over`).

        Raises :class:`rewrite.errors.StorageError` where nothing can be listed and
        :class:`rewrite.errors.CheckpointError` for what is neither a file nor a folder.
        """

    def open(self, name: str) -> AbstractContextManager[Reader]:
        """The file ``name`` for reading. Raises :class:`rewrite.errors.StorageError` for what is not a file."""


def is_passed_over(name: str) -> bool:
    """Whether the file or folder ``name`` belongs to a tool, not to the checkpoint: ``.git``, ``.cache/huggingface``.

    ``huggingface_hub`` leaves the same out when it uploads a folder (``DEFAULT_IGNORE_PATTERNS``,
    ``utils/_paths.py``, 1.33). ``.gitattributes`` is the hub's: it makes one in each repository, so a model there has
    it, and the same model in a directory may not.
    """
    parts = name.split("/")
    return parts[-1] == ".git" or parts[-2:] == [".cache", "huggingface"] or name == ".gitattributes"
