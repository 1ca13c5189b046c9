"""A storage as a :class:`Checkpoint`: headers, index and config read and checked against each other; no tensor data.

Follows what loaders do: with an index, its ``weight_map`` names the shards and other safetensors files do not count;
without one, the single safetensors file is the checkpoint (transformers, vLLM ``filter_duplicate_safetensors_files``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter

from rewrite.checkpoint.bounded_json import INDEX_BOUND, MAX_TENSORS, JsonFile, read_json
from rewrite.checkpoint.concurrent import in_order
from rewrite.checkpoint.forms import Form, find_forms
from rewrite.checkpoint.header import Header, TensorInfo, read_header
from rewrite.checkpoint.storage import FileId, Storage
from rewrite.errors import CheckpointError, StorageError

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
_MAX_VALUE_BYTES = 1 << 20  # what read_tensors may bring into memory a tensor: scales, never weights
_MAX_GAP = 16 << 10  # bytes between two tensors that are read in one go
_MAX_RUN = 4 << 20  # bytes that are read in one go


@dataclass(frozen=True)
class Shard:
    """One safetensors file of the checkpoint. ``name`` is its path relative to the root, with ``/``."""

    name: str
    header: Header
    file_id: FileId


@dataclass(frozen=True)
class Checkpoint:
    """Everything that planning needs to know of a checkpoint. Tensor data stays in the storage."""

    storage: Storage
    config: JsonFile
    index: JsonFile | None
    shards: Mapping[str, Shard]  # by name, in the order of their names
    tensors: Mapping[str, TensorInfo]  # by name
    files: Mapping[str, FileId]  # every file by its relative name, shards and config included
    passed_over: tuple[str, ...]  # folders that do not belong to the checkpoint

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.file_id.size for shard in self.shards.values())

    @cached_property
    def forms(self) -> Mapping[str, Form]:
        """The form of each module, by its name: one object for all that are alike."""
        return find_forms(self.tensors.values())

    @cached_property
    def alike(self) -> Mapping[Form, Sequence[str]]:
        """The names of the modules of each form."""
        found: dict[Form, list[str]] = {}
        for module, form in self.forms.items():
            found.setdefault(form, []).append(module)
        return found

    def tensors_like(self, is_wanted: Callable[[TensorInfo], bool]) -> Iterator[TensorInfo]:
        """The tensors that are wanted, by dtype, shape and a name in which no number counts: asked once for each
        form."""
        for form, modules in self.alike.items():
            for kind in form.tensors:
                end = f".{kind}" if form.pattern else kind
                if is_wanted(self.tensors[modules[0] + end]):
                    yield from map(self.tensors.__getitem__, [name + end for name in modules])

    def read_json(self, name: str) -> JsonFile | None:
        """A JSON file beside the config; None where there is none. Raises as :func:`read_json`."""
        return read_json(self.storage, name) if name in self.files else None

    def read_tensor(self, name: str) -> bytes:
        """The bytes of a small tensor (a scale). Raises :class:`CheckpointError` for one beyond 1 MiB."""
        return dict(self.read_tensors([self.tensors[name]]))[self.tensors[name]]

    def read_tensors(self, infos: Iterable[TensorInfo]) -> Iterator[tuple[TensorInfo, bytes]]:
        """As :meth:`read_tensor` for many, shard by shard."""
        for run, raw in self.read_runs(infos):
            for info in run:
                yield info, raw[info.start - run[0].start : info.end - run[0].start]

    def read_runs(self, infos: Iterable[TensorInfo]) -> Iterator[tuple[list[TensorInfo], bytes]]:
        """The same by what is read in one go: tensors that lie side by side, and the bytes from the first to the last
        of them."""
        by_shard: dict[str, list[TensorInfo]] = {}
        for info in infos:
            if info.end - info.start > _MAX_VALUE_BYTES:
                raise CheckpointError(
                    "A scale is too large",
                    where=f"{info.shard}: {info.name}",
                    expected=f"at most {_MAX_VALUE_BYTES} bytes",
                    found=f"{info.dtype} {list(info.shape)}, {info.nbytes} bytes",
                )
            by_shard.setdefault(info.shard, []).append(info)
        jobs = (
            (name, run) for name, found in by_shard.items() for run in _runs(sorted(found, key=attrgetter("start")))
        )
        yield from in_order(self._read_run, jobs, self.storage.readers)

    def _read_run(self, job: tuple[str, list[TensorInfo]]) -> tuple[list[TensorInfo], bytes]:
        name, run = job
        start, length = run[0].start, run[-1].end - run[0].start
        with self.storage.open(name) as file:
            raw = file.read(self.shards[name].header.size + start, length)
        if len(raw) != length:
            raise StorageError("A shard shrank while it was read", where=f"{name}: {run[-1].name}")
        return run, raw


def read_checkpoint(storage: Storage) -> Checkpoint:
    """Read headers, index and config of ``storage`` and check them against each other, both ways.

    Raises :class:`CheckpointError` (or :class:`HeaderError`, :class:`ConfigError`) for what does not add up and
    :class:`StorageError` for what cannot be read.
    """
    listing = storage.list_files()
    files = listing.files
    if CONFIG_NAME not in files:
        below = [name.removesuffix(f"/{CONFIG_NAME}") for name in files if name.endswith(f"/{CONFIG_NAME}")]
        meant = f"did you mean {storage}/{below[0]}?" if below else "name the folder that holds config.json"
        raise CheckpointError(
            f"This is no checkpoint: {CONFIG_NAME} is missing", where=str(storage),
            expected=f"{CONFIG_NAME} beside *.safetensors files",
            found=", ".join(list(files)[:3]) + (" and more" if len(files) > 3 else "") if files else "an empty folder",
            hint=meant,
        )  # fmt: skip
    config = read_json(storage, CONFIG_NAME)
    index = read_json(storage, INDEX_NAME, INDEX_BOUND) if INDEX_NAME in files else None
    weight_map = None if index is None else _weight_map(index)
    names = _shard_names(weight_map, files, storage)
    shards = {shard.name: shard for shard in _open_shards(storage, names)}
    tensors = _collect_tensors(shards.values())
    if index is not None and weight_map is not None:
        index.value["weight_map"] = _checked_map(weight_map, tensors)
    return Checkpoint(storage, config, index, shards, tensors, files, listing.passed_over)


def is_inside(name: str) -> bool:
    """Whether a relative file name stays inside its directory on every path that it could be joined to."""
    parts = name.split("/")
    return bool(name) and "\0" not in name and "\\" not in name and not any(part in ("", ".", "..") for part in parts)


def _runs(infos: Iterable[TensorInfo]) -> Iterator[list[TensorInfo]]:
    """Tensors in the order of their data, those together that one read should bring."""
    run: list[TensorInfo] = []
    for info in infos:
        if run and (info.start - run[-1].end > _MAX_GAP or info.end - run[0].start > _MAX_RUN):
            yield run
            run = []
        run.append(info)
    if run:
        yield run


def _weight_map(index: JsonFile) -> dict[str, str]:
    weight_map = index.value.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            "The index has no weight_map", where=index.name, expected="{tensor: file}", found=weight_map
        )
    safe: set[str] = set()  # file names that were looked at
    for tensor, name in weight_map.items():
        if isinstance(name, str) and name in safe:
            continue
        if not isinstance(name, str) or not is_inside(name):
            raise CheckpointError(
                "The index points outside the checkpoint",
                where=f"{index.name}: {tensor}",
                expected="a file name inside the directory",
                found=name,
            )
        safe.add(name)
    return weight_map


def _shard_names(weight_map: Mapping[str, str] | None, files: Mapping[str, FileId], storage: Storage) -> list[str]:
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
            where=str(storage),
            expected=INDEX_NAME,
            found=", ".join(found[:5]),
            hint="export again with an index; loaders disagree on what this directory holds",
        )
    pickled = [name for name in files if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    raise CheckpointError(
        "There are no safetensors files here",
        where=str(storage),
        expected="*.safetensors",
        found=", ".join(pickled[:5]) or "none",
        hint="pickled weights are never opened: save as safetensors first" if pickled else None,
    )


def _open_shards(storage: Storage, names: Iterable[str]) -> Iterator[Shard]:
    def read(name: str) -> Shard:
        with storage.open(name) as file:
            return Shard(name, read_header(file, name), file.file_id)

    tensors = 0
    for shard in in_order(read, names, storage.readers):
        tensors += len(shard.header.tensors)
        if tensors > MAX_TENSORS:
            raise CheckpointError(
                "There are too many tensors", where=shard.name, expected=f"at most {MAX_TENSORS} in all"
            )
        yield shard


def _collect_tensors(shards: Iterable[Shard]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        own = {info.name: info for info in shard.header.tensors}
        if twice := tensors.keys() & own.keys():
            name = min(twice)
            raise CheckpointError(
                "A tensor is stored twice",
                where=f"{shard.name}: {name}",
                expected="each tensor in one shard",
                found=f"also in {tensors[name].shard}",
                hint="loaders read every tensor of every shard, so the later one wins: export again",
            )
        tensors |= own
    return tensors


def _checked_map(weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """The same map, of the strings that the headers have already: a hundred bytes less for each tensor."""
    found = {info.name: info.shard for info in map(tensors.get, weight_map) if info is not None}
    if list(found.values()) != list(weight_map.values()):  # of the same names, but for those that no shard has
        name = next(name for name in weight_map if found.get(name) != weight_map[name])
        raise CheckpointError(
            "The index names a tensor that its shard does not hold",
            where=f"{INDEX_NAME}: {name}",
            expected=weight_map[name],
            found=found.get(name, "in no shard"),
            hint="index and shards are from different exports: get both again",
        )
    if len(found) != len(tensors):
        name, info = next((name, info) for name, info in tensors.items() if name not in weight_map)
        raise CheckpointError(
            "A shard holds a tensor that the index does not name",
            where=f"{info.shard}: {name}",
            expected=f"an entry in {INDEX_NAME}",
            found="none",
            hint="index and shards are from different exports: get both again",
        )
    return found
