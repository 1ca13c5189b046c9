"""A checkpoint in a local directory."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rewrite.checkpoint.storage import FileId, Listing, is_passed_over
from rewrite.errors import CheckpointError, StorageError

_MAX_DEPTH = 64  # of nested directories


class LocalDirectory:
    """A :class:`~rewrite.checkpoint.storage.Storage`. Symlinks are followed: the hub's cache is made of them."""

    readers = 1

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    def __str__(self) -> str:
        return str(self.root)

    @property
    def name(self) -> str:
        return self.root.absolute().name

    def list_files(self) -> Listing:
        passed_over: list[str] = []
        with io_errors(self.root):
            if not self.root.is_dir():
                raise StorageError(
                    "There is no checkpoint directory here",
                    where=str(self.root),
                    expected="a directory",
                    found="a file" if self.root.exists() else "nothing",
                    hint="pass the directory that holds config.json and the safetensors files",
                )
            files = dict(sorted(_walk(self.root, "", {}, passed_over)))
        return Listing(files, tuple(sorted(passed_over)))

    @contextmanager
    def open(self, name: str) -> Iterator[LocalFile]:
        with open_regular(self.root / name) as file:
            yield file


class LocalFile:
    """An open regular file: a :class:`~rewrite.checkpoint.storage.Reader` with a file descriptor ``fd``."""

    def __init__(self, fd: int, path: Path) -> None:
        self.fd = fd
        self._path = path

    @property
    def file_id(self) -> FileId:
        return file_id(os.fstat(self.fd))

    def read(self, start: int, length: int) -> bytes:
        chunks = []
        with io_errors(self._path):
            while length > 0 and (chunk := os.pread(self.fd, length, start)):
                chunks.append(chunk)
                start, length = start + len(chunk), length - len(chunk)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def file_id(status: os.stat_result) -> FileId:
    return FileId(status.st_size, status.st_mtime_ns)


class io_errors:  # noqa: N801 - used as a function: ``with io_errors(path):``
    """Turn an :class:`OSError` of the block into a :class:`StorageError` that names ``path``."""

    def __init__(self, path: object) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: object, _trace: object) -> None:
        if isinstance(error, OSError):
            raise StorageError(
                f"{error.strerror or error} (errno {error.errno})", where=str(error.filename or self.path)
            ) from error


@contextmanager
def open_regular(path: Path) -> Iterator[LocalFile]:
    """Open a file for reading without ever waiting for it, whatever took its place since it was listed.

    Raises :class:`StorageError` for what cannot be read and for anything but a regular file.
    """
    with io_errors(path):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO without a writer would block for ever
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise StorageError("Not a regular file", where=str(path))
            yield LocalFile(fd, path)
        finally:
            os.close(fd)


def _walk(
    directory: Path, prefix: str, seen: dict[tuple[int, int], Path], passed_over: list[str], depth: int = 0
) -> Iterator[tuple[str, FileId]]:
    """Every file below ``directory``. The names that do not count are added to ``passed_over``."""
    status = directory.stat()
    other = seen.setdefault((status.st_dev, status.st_ino), directory)
    if other is not directory:  # a loop, or a few links that multiply into millions of paths
        raise CheckpointError(
            "A symlink leads to a directory that was already listed", where=str(directory), found=other
        )
    if depth > _MAX_DEPTH:
        raise CheckpointError("Directories are nested too deep", where=str(directory), expected=f"at most {_MAX_DEPTH}")
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        path, name = directory / entry.name, prefix + entry.name
        if is_passed_over(name):
            passed_over.append(name)
        elif path.is_dir():
            yield from _walk(path, name + "/", seen, passed_over, depth + 1)
        elif path.is_file():
            yield name, file_id(path.stat())
        else:
            raise CheckpointError(
                "Neither a file nor a directory",
                where=str(path),
                found="a dangling symlink" if path.is_symlink() else "a special file",
                hint="remove it, or complete the download",
            )
