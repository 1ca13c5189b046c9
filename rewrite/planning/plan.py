""":class:`Plan`: all that a conversion does, as data. It round-trips through JSON, so that any executor can run it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rewrite.checkpoint.checkpoint import is_inside
from rewrite.errors import StorageError
from rewrite.planning.jobs import FileCopy, ShardPlan, TextFile
from rewrite.planning.manifest import MANIFEST_NAME, Manifest
from rewrite.planning.segments import is_within


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

    @cached_property  # a bucket asks for it with each file
    def digest(self) -> str:
        """Same digest, same output from the same source files."""
        digest = hashlib.sha256()
        for key, value in self.to_json().items():
            for item in value if isinstance(value, list) else [value]:  # piece by piece: a plan may be 100 MB of JSON
                digest.update(json.dumps([key, item], sort_keys=True).encode())
        return digest.hexdigest()

    @property
    def texts_to_write(self) -> dict[str, str]:
        """Config, index and, where something changed, the manifest. An output that equals its source says nothing of
        us."""
        texts = {text.name: text.text for text in self.texts}
        return {**texts, MANIFEST_NAME: self.manifest.to_text()} if self.manifest.changed else texts

    @property
    def files(self) -> dict[str, int]:
        """Every file of the output with its size."""
        texts = {text.name: text.size for text in self.texts}
        manifest = {MANIFEST_NAME: len(self.manifest.to_text().encode())} if self.manifest.changed else {}
        return {**{job.name: job.size for job in self.jobs}, **texts, **manifest}

    def check(self) -> None:
        """That carrying it out does nothing but write the files of one output from those of one source: it may come
        from a file that anybody could edit. Raises :class:`StorageError`."""
        written = [file.name for file in (*self.jobs, *self.texts)]
        if self.manifest.changed:
            written.append(MANIFEST_NAME)
        names = Counter(written)
        folders = {name[:end] for name in written for end, letter in enumerate(name) if letter == "/"}
        for name in (*written, *(file.name for file in self.left_out)):
            # A backslash is a letter here; elsewhere it may separate folders.
            if not is_inside(name.replace("\\", "/")):
                raise _no_plan(name, "a name that leads out of the output")
        for name in written:
            if name in folders or names[name] > 1:
                raise _no_plan(name, "two files of this name")
        for file in (*self.jobs, *self.texts, *self.left_out):
            if not _is_file(file):
                raise _no_plan(file.name, "bytes that the source does not have")
        stated = {file.name: file.size for file in self.manifest.files}
        if stated != {file.name: file.size for file in (*self.jobs, *self.texts)}:
            raise _no_plan(MANIFEST_NAME, "other files than those of the plan")

    def to_json(self) -> dict[str, Any]:
        return {
            "manifest": self.manifest.to_json(),
            "shards": [shard.to_json() for shard in self.shards],
            "copies": [copy.to_json() for copy in self.copies],
            "texts": [text.to_json() for text in self.texts],
            "left_out": [copy.to_json() for copy in self.left_out],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Plan:
        """The inverse of :meth:`to_json`; whoever has ``value`` from a stranger calls :meth:`check`."""
        return cls(
            manifest=Manifest.from_json(value["manifest"]),
            shards=tuple(map(ShardPlan.from_json, value["shards"])),
            copies=tuple(map(FileCopy.from_json, value["copies"])),
            texts=tuple(map(TextFile.from_json, value["texts"])),
            left_out=tuple(map(FileCopy.from_json, value["left_out"])),
        )


def _is_file(file: ShardPlan | FileCopy | TextFile) -> bool:
    source = file.source
    if type(source.size) is not int or type(source.mtime_ns) is not int or source.size < 0:
        return False
    return isinstance(file, TextFile) or all(is_within(segment, source.size) for segment in file.segments)


def _no_plan(name: str, found: str) -> StorageError:
    return StorageError(
        "This plan was not made by `rewrite plan`", where=name, expected="files of one output", found=found,
        hint="plan again; do not run plans of strangers",
    )  # fmt: skip
