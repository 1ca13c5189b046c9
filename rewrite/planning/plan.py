""":class:`Plan`: all that a conversion does, as data. It round-trips through JSON, so that any executor can run it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rewrite.planning.jobs import FileCopy, ShardPlan, TextFile
from rewrite.planning.manifest import Manifest


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
            "copies": [copy.to_json() for copy in self.copies],
            "texts": [text.to_json() for text in self.texts],
            "left_out": [copy.to_json() for copy in self.left_out],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Plan:
        """The inverse of :meth:`to_json`. ``value`` is trusted: it is our own output."""
        return cls(
            manifest=Manifest.from_json(value["manifest"]),
            shards=tuple(map(ShardPlan.from_json, value["shards"])),
            copies=tuple(map(FileCopy.from_json, value["copies"])),
            texts=tuple(map(TextFile.from_json, value["texts"])),
            left_out=tuple(map(FileCopy.from_json, value["left_out"])),
        )
