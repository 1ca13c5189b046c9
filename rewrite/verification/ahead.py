"""Scattered rows, told to the system before they are read: a disk then brings them in the order in which they lie."""

from __future__ import annotations

import os
from collections.abc import Iterable

from rewrite.checkpoint.checkpoint import Checkpoint
from rewrite.verification.expected import Expected
from rewrite.verification.sample import Sample


def read_ahead(checkpoints: Iterable[Checkpoint], expected: Expected, sample: Sample) -> None:
    """The sampled rows of all weights that are compared. Of storages that are no local files nothing is told."""
    told = hasattr(os, "posix_fadvise")  # not on macOS
    partitions = [(m, p) for group in expected.groups for m in group.modules for p in m.partitions]
    for checkpoint in checkpoints:
        spans: dict[str, list[tuple[int, int]]] = {}
        for module, partition in partitions:
            info = checkpoint.tensors[module.weight.name]
            start, row = checkpoint.shards[info.shard].header.size + info.start, info.nbytes // max(info.shape[0], 1)
            for run in sample.of(module.name, partition):
                spans.setdefault(info.shard, []).append((start + run.start * row, len(run) * row))
        for shard, found in sorted(spans.items()):
            with checkpoint.storage.open(shard) as file:
                descriptor = getattr(file, "fd", None)
                if told and isinstance(descriptor, int):
                    for start, length in sorted(found):
                        os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_WILLNEED)
