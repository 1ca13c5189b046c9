"""Repair FP8 model checkpoints offline: explicit scales for every partition of a fused projection.

>>> import rewrite
>>> manifest = rewrite.convert("Qwen3.5-9B-FP8", "Qwen3.5-9B-FP8-fixed")  # doctest: +SKIP
"""

from __future__ import annotations

import os
from pathlib import Path

from rewrite.checkpoint import Checkpoint, open_checkpoint
from rewrite.errors import (
    CheckpointError,
    ConfigError,
    HeaderError,
    Refused,
    RewriteError,
    StorageError,
    Unsupported,
    UsageError,
)
from rewrite.manifest import Manifest
from rewrite.plan import PROFILES, Plan, make_plan
from rewrite.publish import Progress, publish_plan
from rewrite.version import __version__

__all__ = [
    "DEFAULT_WORKERS",
    "PROFILES",
    "Checkpoint",
    "CheckpointError",
    "ConfigError",
    "HeaderError",
    "Manifest",
    "Plan",
    "Progress",
    "Refused",
    "RewriteError",
    "StorageError",
    "Unsupported",
    "UsageError",
    "__version__",
    "convert",
    "make_plan",
    "open_checkpoint",
    "publish_plan",
]

DEFAULT_WORKERS = 2


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    profile: str = "exact",
    workers: int = DEFAULT_WORKERS,
    overwrite: bool = False,
    created: str | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Convert the checkpoint directory ``src`` into the new directory ``dst`` and say what changed.

    ``dst`` is absent or complete, never in between; the same call after an interruption resumes. ``workers`` files are
    written at a time; ``overwrite`` replaces an existing ``dst`` at the very end; ``created`` is a time to note in the
    manifest; ``progress(done, total)`` is called with bytes.

    Raises :class:`Refused` for a checkpoint that cannot be converted with certainty (before anything is written),
    :class:`UsageError` for arguments that make no sense and :class:`StorageError` when reading or writing fails.
    """
    plan = make_plan(open_checkpoint(src), profile)
    return publish_plan(
        plan, Path(src), Path(dst), overwrite=overwrite, workers=workers, created=created, progress=progress
    )
