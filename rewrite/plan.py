"""From a Checkpoint and a profile to a :class:`Plan`: everything that will be written, as data.

Pure but for reading the scales. A Plan round-trips through JSON, and writing a shard needs its
:class:`~rewrite.shardplan.ShardPlan` and the source file alone, so any executor can run it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rewrite.checkpoint import CONFIG_NAME, INDEX_NAME, QUANT_FILE_NAME, Checkpoint, FileId, JsonFile, Shard
from rewrite.dialects import Dialect, config_path, read_dialect, read_quant_file
from rewrite.errors import CheckpointError, Unsupported, UsageError
from rewrite.groups import Selection, find_lookalikes
from rewrite.header import parse_header
from rewrite.jsontext import append_value, replace_value
from rewrite.manifest import MANIFEST_NAME, Manifest, ManifestFile
from rewrite.profiles import PROFILES, Changes, context_of
from rewrite.shardplan import Edits, ShardPlan, plan_shard, touches


@dataclass(frozen=True)
class FileCopy:
    """A file that comes along as it is."""

    name: str
    source: FileId

    @property
    def size(self) -> int:
        return self.source.size

    @property
    def shareable(self) -> int:
        """All of it: a file that does not change is cloned whole."""
        return self.source.size

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "source": [self.source.size, self.source.mtime_ns]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> FileCopy:
        return cls(value["name"], FileId(*value["source"]))


@dataclass(frozen=True)
class TextFile:
    """A small file that is written anew: config or index. ``like`` names the source file whose mode it takes.

    ``source`` is what that file was when it was planned on.
    """

    name: str
    like: str
    text: str
    source: FileId

    @property
    def size(self) -> int:
        return len(self.text.encode())


@dataclass(frozen=True)
class Plan:
    """All that a conversion does. Nothing in it depends on where the output goes."""

    manifest: Manifest
    shards: tuple[ShardPlan, ...]
    copies: tuple[FileCopy, ...]
    texts: tuple[TextFile, ...]
    left_out: tuple[FileCopy, ...]  # files of the source that do not come along

    @property
    def jobs(self) -> tuple[ShardPlan | FileCopy, ...]:
        """The files that take time; each can be written on its own."""
        return (*self.shards, *self.copies)

    @property
    def size(self) -> int:
        """Bytes of the output, the manifest left out."""
        return sum(job.size for job in self.jobs) + sum(text.size for text in self.texts)

    @property
    def shareable(self) -> int:
        """Bytes of the output that need not be copied on a filesystem that can share them with the source."""
        return sum(job.shareable for job in self.jobs)

    @property
    def digest(self) -> str:
        """Same digest, same output from the same source files."""
        digest = hashlib.sha256()
        for key, value in self.to_json().items():
            for item in value if isinstance(value, list) else [value]:  # piece by piece: a plan may be 100 MB of JSON
                digest.update(json.dumps([key, item], sort_keys=True).encode())
        return digest.hexdigest()

    def to_json(self) -> dict[str, Any]:
        return {
            "manifest": self.manifest.to_json(),
            "shards": [shard.to_json() for shard in self.shards],
            "copies": [c.to_json() for c in self.copies],
            "texts": [
                {"name": t.name, "like": t.like, "text": t.text, "source": [t.source.size, t.source.mtime_ns]}
                for t in self.texts
            ],
            "left_out": [c.to_json() for c in self.left_out],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Plan:
        """The inverse of :meth:`to_json`. ``value`` is trusted: it is our own output."""
        return cls(
            manifest=Manifest.from_json(value["manifest"]),
            shards=tuple(ShardPlan.from_json(shard) for shard in value["shards"]),
            copies=tuple(map(FileCopy.from_json, value["copies"])),
            texts=tuple(TextFile(t["name"], t["like"], t["text"], FileId(*t["source"])) for t in value["texts"]),
            left_out=tuple(map(FileCopy.from_json, value["left_out"])),
        )


def make_plan(checkpoint: Checkpoint, profile: str = "exact", selection: Selection = "qkvz") -> Plan:
    """Plan the conversion of ``checkpoint``.

    Raises :class:`rewrite.errors.Refused` for what cannot be converted with certainty, before anything is written.
    """
    if profile not in PROFILES:
        raise UsageError("Unknown profile", expected=", ".join(PROFILES), found=profile)
    dialect = read_dialect(checkpoint)
    _refuse_lookalikes(checkpoint, dialect)
    changes = PROFILES[profile](context_of(checkpoint, dialect, selection))
    shards = tuple(plan_shard(shard, changes.edits) for shard in checkpoint.shards if touches(changes.edits, shard))
    texts = tuple(_texts(checkpoint, changes, dialect))
    left_out = tuple(FileCopy(name, checkpoint.files[name]) for name in _stale_files(checkpoint, changes, dialect))
    gone = {shard.name for shard in shards} | {text.name for text in texts} | {file.name for file in left_out}
    copies = tuple(FileCopy(name, file_id) for name, file_id in checkpoint.files.items() if name not in gone)
    manifest = Manifest(
        profile=profile,
        selection=selection,
        source=checkpoint.root.absolute().name,
        groups=changes.groups,
        dropped=tuple(name for name, new in changes.edits.items() if new is None),
        renamed={old: new.name for old, new in changes.edits.items() if new is not None and new.name is not None},
        notes=tuple(_notes(checkpoint, changes, dialect, profile)),
        files=_manifest_files(shards, copies, texts),
    )
    return Plan(manifest, shards, copies, texts, left_out)


def preview(checkpoint: Checkpoint, plan: Plan) -> Checkpoint:
    """The checkpoint as it would be after ``plan``. Scales can be read, new weights cannot."""
    shards = {shard.name: shard for shard in checkpoint.shards}
    for new in plan.shards:
        shards[new.name] = Shard(new.name, parse_header(new.header[8:], new.name), FileId(new.size, 0))
    tensors = {info.name: (shard, info) for shard in shards.values() for info in shard.header.tensors}
    unwritten = {name: data for shard in plan.shards for name, data in shard.filled()}
    for name, (_, old) in checkpoint.tensors.items():
        if name in tensors and name not in unwritten and tensors[name][1].nbytes == old.nbytes:
            tensors[name] = checkpoint.tensors[name]  # still to be found where it lies now
    texts = {text.name: JsonFile(text.name, text.text, json.loads(text.text)) for text in plan.texts}
    kept = {copy.name for copy in plan.copies}
    return replace(
        checkpoint,
        config=texts.get(CONFIG_NAME, checkpoint.config),
        quant_file=texts.get(QUANT_FILE_NAME, checkpoint.quant_file if QUANT_FILE_NAME in kept else None),
        shards=tuple(shards.values()),
        tensors=tensors,
        unwritten=unwritten,
    )


def _refuse_lookalikes(checkpoint: Checkpoint, dialect: Dialect) -> None:
    """A pipeline must not take an unknown model with the tell-tale names for one that needs nothing."""
    for name in find_lookalikes(checkpoint):
        scale = checkpoint.tensors.get(f"{name}.weight_scale")
        if scale is not None and scale[1].numel == 1:
            raise Unsupported(
                "An unknown architecture has modules that engines may fuse",
                where=f"{scale[0].name}: {name}",
                expected="a model_type that rewrite knows",
                found=f"model_type {checkpoint.config.value.get('model_type')!r}, quantised as {dialect.name}",
                hint="report the architecture, so that its fused groups can be added",
            )


def _texts(checkpoint: Checkpoint, changes: Changes, old: Dialect) -> Iterator[TextFile]:
    """Index, config and ModelOpt's own file, where they change."""
    if not changes.edits:
        return
    if checkpoint.index is not None:
        text = _index_text(checkpoint, checkpoint.index, changes.edits)
        if text != checkpoint.index.text:
            yield TextFile(INDEX_NAME, INDEX_NAME, text, checkpoint.files[INDEX_NAME])
    new = changes.dialect
    if new is None or new.value == old.value:
        return
    path = config_path(checkpoint.config.value)
    if path is not None:
        yield TextFile(
            CONFIG_NAME,
            CONFIG_NAME,
            replace_value(checkpoint.config.text, path, new.value),
            checkpoint.files[CONFIG_NAME],
        )
    elif new.name != old.name:
        text = append_value(checkpoint.config.text, "quantization_config", new.value)
        yield TextFile(CONFIG_NAME, CONFIG_NAME, text, checkpoint.files[CONFIG_NAME])
    if checkpoint.quant_file is not None and not _contradicts(checkpoint.quant_file, changes, old):
        text = _quant_file_text(checkpoint.quant_file, old, new)
        if text != checkpoint.quant_file.text:
            yield TextFile(QUANT_FILE_NAME, QUANT_FILE_NAME, text, checkpoint.files[QUANT_FILE_NAME])


def _quant_file_text(file: JsonFile, old: Dialect, new: Dialect) -> str:
    """ModelOpt's own file with what ``new`` leaves out: modules among the excluded ones, or no more among the
    quantised ones. A file that states no quantisation stays as it is."""
    stated = file.value.get("quantization")
    if not isinstance(stated, dict):
        return file.text
    changes: dict[str, Any] = {}
    excluded = [dialect.value.get("ignore", dialect.value.get("exclude_modules")) for dialect in (old, new)]
    if excluded[0] != excluded[1]:
        changes["exclude_modules"] = excluded[1]
    if new.value.get("quantized_layers") != old.value.get("quantized_layers"):
        changes["quantized_layers"] = new.value["quantized_layers"]
    if not changes.keys() <= stated.keys():
        return replace_value(file.text, ("quantization",), {**stated, **changes})
    text = file.text
    for key, value in changes.items():
        text = replace_value(text, ("quantization", key), value)
    return text


def _index_text(checkpoint: Checkpoint, index: JsonFile, edits: Edits) -> str:
    """The index with its ``total_size`` brought up to date, where it has one, and tensors dropped and renamed."""
    text = index.text
    metadata = index.value.get("metadata")
    if isinstance(metadata, dict) and "total_size" in metadata:
        after = (edits.get(info.name, info) for _, info in checkpoint.tensors.values())
        total = sum(tensor.nbytes for tensor in after if tensor is not None)
        text = replace_value(text, ("metadata", "total_size"), total)
    names = {old: new and (new.name or old) for old, new in edits.items()}
    if any(new != old for old, new in names.items()):
        weight_map = index.value["weight_map"].items()
        kept = {new: shard for old, shard in weight_map if (new := names.get(old, old)) is not None}
        text = replace_value(text, ("weight_map",), kept)
    return text


def _stale_files(checkpoint: Checkpoint, changes: Changes, dialect: Dialect) -> Iterator[str]:
    """Files that would contradict the output: an earlier manifest, and a second config of the old dialect."""
    if changes.edits:
        _refuse_directory_of_our_name(checkpoint)
        if MANIFEST_NAME in checkpoint.files:
            yield MANIFEST_NAME
        if _contradicts(checkpoint.quant_file, changes, dialect):
            yield QUANT_FILE_NAME


def _contradicts(file: JsonFile | None, changes: Changes, dialect: Dialect) -> bool:
    """Whether ModelOpt's own file would be wrong beside the new config: one of another dialect, or changed while the
    file stated another dialect all along."""
    if file is None or changes.dialect is None or changes.dialect.value == dialect.value:
        return False
    if changes.dialect.name != dialect.name:
        return True
    return isinstance(file.value.get("quantization"), dict) and read_quant_file(file).name != dialect.name


def _refuse_directory_of_our_name(checkpoint: Checkpoint) -> None:
    inside = next((name for name in checkpoint.files if name.startswith(MANIFEST_NAME + "/")), None)
    if inside is not None:
        raise CheckpointError(
            "A directory has the name of the manifest",
            where=str(checkpoint.root / MANIFEST_NAME),
            expected="nothing, or the manifest of an earlier conversion",
            found=f"a directory with {inside.partition('/')[2]}",
            hint="rename it",
        )


def _manifest_files(
    shards: Iterable[ShardPlan], copies: Iterable[FileCopy], texts: Iterable[TextFile]
) -> tuple[ManifestFile, ...]:
    files = [ManifestFile(shard.name, shard.size, True) for shard in shards]
    files += [ManifestFile(text.name, text.size, True) for text in texts]
    files += [ManifestFile(copy.name, copy.size, False) for copy in copies]
    return tuple(sorted(files, key=lambda file: file.name))


def _notes(checkpoint: Checkpoint, changes: Changes, dialect: Dialect, profile: str) -> Iterator[str]:
    shards = {shard.name for shard in checkpoint.shards}
    for name in checkpoint.files:
        if name.endswith(".safetensors") and name not in shards:
            yield f"{name} is not in the index, so no loader reads it: copied as it is"
    if checkpoint.quant_file is not None and config_path(checkpoint.config.value) and _configs_disagree(checkpoint):
        yield f"{QUANT_FILE_NAME} and config.json disagree: config.json counted, as in vLLM and SGLang"
    if changes.dialect is not None and changes.dialect.name != dialect.name:
        yield f"the config is stated as {changes.dialect.name} now: {dialect.name} has no words for this layout"
    if _contradicts(checkpoint.quant_file, changes, dialect):
        yield f"{QUANT_FILE_NAME} is left out: it would contradict the new config"
    if changes.edits and profile == "portable":
        yield "activations are quantised dynamically, per token, now: outputs differ slightly from static activations"


def _configs_disagree(checkpoint: Checkpoint) -> bool:
    """Whether ModelOpt's own file states another algorithm or leaves out other layers than config.json does."""
    value = checkpoint.quant_file.value.get("quantization") if checkpoint.quant_file else None
    inner = read_dialect(checkpoint).value
    if not isinstance(value, dict):
        return True
    if any(value.get(key) != inner.get(key) for key in ("quant_algo", "quantized_layers")):
        return True
    ours, theirs = (stated.get("ignore") or stated.get("exclude_modules") or [] for stated in (inner, value))
    if any(not isinstance(names, list) or not all(isinstance(name, str) for name in names) for names in (ours, theirs)):
        return bool(ours != theirs)
    return sorted(ours) != sorted(theirs)
