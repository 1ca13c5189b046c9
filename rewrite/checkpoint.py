"""A directory on disk as a :class:`Checkpoint`: headers, index and config read and cross-checked; no tensor data.

Follows what loaders do: with an index, its ``weight_map`` names the shards and other safetensors files do not count;
without one, the single safetensors file is the checkpoint (transformers, vLLM ``filter_duplicate_safetensors_files``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rewrite.errors import CheckpointError, ConfigError, StorageError
from rewrite.header import Header, TensorInfo, read_header

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
QUANT_FILE_NAME = "hf_quant_config.json"  # ModelOpt's
MAX_JSON_BYTES = 100_000_000  # an index of a million tensors; nothing real comes near
_MAX_VALUE_BYTES = 1 << 20  # what read_tensor may bring into memory: scales, never weights


@dataclass(frozen=True)
class FileId:
    """What a file looked like when it was planned on; if this differs later, the file has changed underneath."""

    size: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileId:
        return cls(status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class Shard:
    """One safetensors file of the checkpoint. ``name`` is its path relative to the root, with ``/``."""

    name: str
    header: Header
    file_id: FileId


@dataclass(frozen=True)
class JsonFile:
    """A JSON file as text and as value: the text is what an edit must preserve."""

    name: str
    text: str
    value: dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """Everything that planning needs to know of a directory. Tensor data stays on disk."""

    root: Path
    config: JsonFile
    index: JsonFile | None
    quant_file: JsonFile | None
    shards: tuple[Shard, ...]
    tensors: Mapping[str, tuple[Shard, TensorInfo]]
    files: Mapping[str, FileId]  # every regular file under root (symlinks followed), shards and config included
    unwritten: Mapping[str, bytes] = field(default_factory=dict)  # tensors of a plan that is not carried out yet

    @property
    def nbytes(self) -> int:
        return sum(shard.file_id.size for shard in self.shards)

    def read_tensor(self, name: str) -> bytes:
        """The bytes of a small tensor (a scale). Raises :class:`CheckpointError` for one beyond 1 MiB."""
        ((_, _, data),) = self.read_tensors([self.tensors[name][1]])
        return data

    def read_tensors(self, infos: Iterable[TensorInfo]) -> Iterator[tuple[Shard, TensorInfo, bytes]]:
        """As :meth:`read_tensor` for many: each shard is opened once."""
        by_shard: dict[str, list[TensorInfo]] = {}
        for info in infos:
            if info.name in self.unwritten:
                yield self.tensors[info.name][0], info, self.unwritten[info.name]
                continue
            by_shard.setdefault(self.tensors[info.name][0].name, []).append(info)
        for name, wanted in by_shard.items():
            shard = self.tensors[wanted[0].name][0]
            with io_errors(self.root / name), (self.root / name).open("rb") as file:
                for info in wanted:
                    yield shard, info, _read_small(file.fileno(), shard, info)


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open the directory ``path`` and check index and headers against each other, both ways.

    Raises :class:`CheckpointError` (or :class:`HeaderError`, :class:`ConfigError`) for what does not add up and
    :class:`StorageError` for what cannot be read.
    """
    root = Path(path)
    with io_errors(root):
        return _open(root)


def _open(root: Path) -> Checkpoint:
    if not root.is_dir():
        raise StorageError(
            "There is no checkpoint directory here",
            where=str(root),
            expected="a directory",
            found="a file" if root.exists() else "nothing",
            hint="pass the directory that holds config.json and the safetensors files",
        )
    files = _list_files(root)
    config = _read_json(root, CONFIG_NAME, files, hint="a checkpoint has a config.json beside its shards")
    index = _read_json(root, INDEX_NAME, files) if INDEX_NAME in files else None
    quant_file = _read_json(root, QUANT_FILE_NAME, files) if QUANT_FILE_NAME in files else None
    weight_map = None if index is None else _weight_map(index)
    shards = tuple(_open_shard(root, name) for name in _shard_names(weight_map, files, root))
    tensors = _collect_tensors(shards)
    if weight_map is not None:
        _check_index(weight_map, tensors)
    return Checkpoint(root, config, index, quant_file, shards, tensors, files)


def _read_small(fd: int, shard: Shard, info: TensorInfo) -> bytes:
    if info.nbytes > _MAX_VALUE_BYTES:
        raise CheckpointError(
            "A scale is too large to be one",
            where=f"{shard.name}: {info.name}",
            expected=f"at most {_MAX_VALUE_BYTES} bytes",
            found=f"{info.dtype} {list(info.shape)}, {info.nbytes} bytes",
        )
    data = os.pread(fd, info.nbytes, shard.header.size + info.start)
    if len(data) != info.nbytes:
        raise StorageError("A shard shrank while it was read", where=f"{shard.name}: {info.name}")
    return data


def is_inside(name: str) -> bool:
    """Whether a relative file name stays inside its directory on every path that it could be joined to."""
    parts = name.split("/")
    return bool(name) and "\0" not in name and "\\" not in name and not any(part in ("", ".", "..") for part in parts)


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


def _list_files(root: Path) -> dict[str, FileId]:
    return {name: FileId.of(status) for name, status in sorted(_walk(root, "", frozenset()))}


def _walk(directory: Path, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[tuple[str, os.stat_result]]:
    """Every file below ``directory``. Symlinks are read through (the hub cache is made of them)."""
    status = directory.stat()
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        raise CheckpointError("A symlink leads back to a directory above it", where=str(directory))
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        path, name = directory / entry.name, prefix + entry.name
        if path.is_dir():
            yield from _walk(path, name + "/", above | {identity})
        elif path.is_file():
            yield name, path.stat()
        else:
            raise CheckpointError(
                "Neither a file nor a directory",
                where=str(path),
                found="a dangling symlink" if path.is_symlink() else "a special file",
                hint="remove it, or complete the download",
            )


def _read_json(root: Path, name: str, files: Mapping[str, FileId], hint: str | None = None) -> JsonFile:
    if name not in files:
        raise CheckpointError(f"{name} is missing", where=str(root), hint=hint)
    if files[name].size > MAX_JSON_BYTES:
        raise CheckpointError(f"{name} is too large", where=name, expected=MAX_JSON_BYTES, found=files[name].size)
    return JsonFile(name, *_parse_object((root / name).read_bytes(), name))


def _parse_object(raw: bytes, name: str) -> tuple[str, dict[str, Any]]:
    try:
        text = raw.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise ConfigError("The file is not valid JSON", where=name, found=str(error)) from error
    if not isinstance(value, dict):
        raise ConfigError("The file does not hold a JSON object", where=name, expected="{…}", found=value)
    return text, value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value] # the set.add idiom
        raise ValueError(f"the key {twice!r} occurs twice")
    return result


def _weight_map(index: JsonFile) -> dict[str, str]:
    weight_map = index.value.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            "The index has no weight_map", where=index.name, expected="{tensor: file}", found=weight_map
        )
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not is_inside(name):
            raise CheckpointError(
                "The index points outside the checkpoint",
                where=f"{index.name}: {tensor}",
                expected="a file name inside the directory",
                found=name,
            )
    return weight_map


def _shard_names(weight_map: Mapping[str, str] | None, files: Mapping[str, FileId], root: Path) -> list[str]:
    if weight_map is not None:
        names = sorted(set(weight_map.values()))
        missing = [name for name in names if name not in files]
        if missing:
            raise CheckpointError(
                "The index names shards that do not exist",
                where=INDEX_NAME,
                found=", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else ""),
                hint="complete the download",
            )
        return names
    found = [name for name in files if name.endswith(".safetensors") and "/" not in name]
    if len(found) == 1:
        return found
    if found:
        raise CheckpointError(
            "Several safetensors files and no index to say which of them count",
            where=str(root),
            expected=INDEX_NAME,
            found=", ".join(found[:5]),
            hint="export again with an index; loaders disagree on what this directory holds",
        )
    pickled = [name for name in files if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    raise CheckpointError(
        "There are no safetensors files here",
        where=str(root),
        expected="*.safetensors",
        found=", ".join(pickled[:5]) or "none",
        hint="pickled weights are never opened: save as safetensors first" if pickled else None,
    )


def _open_shard(root: Path, name: str) -> Shard:
    path = root / name
    with io_errors(path), path.open("rb") as file:
        header = read_header(file.fileno(), name)
        return Shard(name, header, FileId.of(os.fstat(file.fileno())))


def _collect_tensors(shards: tuple[Shard, ...]) -> dict[str, tuple[Shard, TensorInfo]]:
    tensors: dict[str, tuple[Shard, TensorInfo]] = {}
    for shard in shards:
        for info in shard.header.tensors:
            if info.name in tensors:
                raise CheckpointError(
                    "A tensor is stored twice",
                    where=f"{shard.name}: {info.name}",
                    expected="each tensor in one shard",
                    found=f"also in {tensors[info.name][0].name}",
                    hint="loaders read every tensor of every shard, so the later one wins: export again",
                )
            tensors[info.name] = (shard, info)
    return tensors


def _check_index(weight_map: Mapping[str, str], tensors: Mapping[str, tuple[Shard, TensorInfo]]) -> None:
    for name, shard_name in weight_map.items():
        if name not in tensors or tensors[name][0].name != shard_name:
            raise CheckpointError(
                "The index names a tensor that its shard does not hold",
                where=f"{INDEX_NAME}: {name}",
                expected=shard_name,
                found=tensors[name][0].name if name in tensors else "in no shard",
                hint="index and shards are from different exports: get both again",
            )
    for name, (shard, _) in tensors.items():
        if name not in weight_map:
            raise CheckpointError(
                "A shard holds a tensor that the index does not name",
                where=f"{shard.name}: {name}",
                expected=f"an entry in {INDEX_NAME}",
                found="none",
                hint="index and shards are from different exports: get both again",
            )
