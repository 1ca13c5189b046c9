"""Repair FP8 model checkpoints offline: explicit scales for every partition of a fused projection.

>>> import rewrite
>>> manifest = rewrite.convert("Qwen3.5-9B-FP8", "Qwen3.5-9B-FP8-fixed")  # doctest: +SKIP
"""

from __future__ import annotations

import os
from pathlib import Path

from rewrite.checkpoint import Checkpoint, io_errors, open_checkpoint
from rewrite.dialects import read_dialect
from rewrite.errors import (
    CheckpointError,
    ConfigError,
    HeaderError,
    Refused,
    RewriteError,
    StorageError,
    Unsupported,
    UsageError,
    printable,
)
from rewrite.groups import SELECTIONS, Selection
from rewrite.inspection import Inspection, inspect_open
from rewrite.loaders import LOADERS, Loader, find_loaders
from rewrite.manifest import ByteCounts, Manifest
from rewrite.plan import Plan, make_plan
from rewrite.profiles import PROFILES
from rewrite.publish import Progress, publish_plan
from rewrite.verification.result import DEFAULT_TOKENS, Verification
from rewrite.version import __version__

__all__ = [
    "DEFAULT_TOKENS",
    "DEFAULT_WORKERS",
    "LOADERS",
    "PROFILES",
    "SELECTIONS",
    "ByteCounts",
    "Checkpoint",
    "CheckpointError",
    "ConfigError",
    "HeaderError",
    "Inspection",
    "Loader",
    "Manifest",
    "Plan",
    "Progress",
    "Refused",
    "RewriteError",
    "Selection",
    "StorageError",
    "Unsupported",
    "UsageError",
    "Verification",
    "__version__",
    "convert",
    "find_loaders",
    "inspect_checkpoint",
    "io_errors",
    "make_plan",
    "open_checkpoint",
    "printable",
    "publish_plan",
    "read_dialect",
    "verify",
]

DEFAULT_WORKERS = 2


def inspect_checkpoint(
    path: str | os.PathLike[str], *, selection: Selection = "qkvz", weights: bool = False
) -> Inspection:
    """Say what the checkpoint directory ``path`` is, what is wrong with it and what every known loader makes of it.

    ``selection``: the fused layers to look at, and to convert for the "after convert" columns, as for :func:`convert`.
    Reads headers, config and scales; ``weights`` also reads every FP8 weight and looks for NaN codes. Raises
    :class:`Refused` for a checkpoint that does not add up and :class:`StorageError` for one that cannot be read.
    """
    return inspect_open(open_checkpoint(path), selection, weights=weights)


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    profile: str = "exact",
    selection: Selection = "qkvz",
    workers: int = DEFAULT_WORKERS,
    overwrite: bool = False,
    copy: bool = False,
    created: str | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Convert the checkpoint directory ``src`` into the new directory ``dst`` and say what changed.

    ``profile`` is a key of :data:`PROFILES`; ``selection`` "all" is about every fused layer, not ``in_proj_qkvz`` only.
    ``dst`` is absent or complete, never in between; the same call after an interruption resumes. ``workers`` files are
    written at a time; ``overwrite`` replaces an existing ``dst`` at the very end; without ``copy``, blocks are shared
    with ``src`` where the filesystem can; ``created`` is a time to note in the manifest; ``progress(done, total)`` is
    called with bytes. ``counts`` of the result says how many bytes were shared, copied and written.

    Raises :class:`Refused` for a checkpoint that cannot be converted with certainty (before anything is written),
    :class:`UsageError` for arguments that make no sense and :class:`StorageError` when reading or writing fails.
    """
    plan = make_plan(open_checkpoint(src), profile, selection)
    return publish_plan(
        plan, Path(src), Path(dst), overwrite=overwrite, workers=workers, copy=copy, created=created, progress=progress
    )


def verify(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    device: str = "auto",
    tokens: int = DEFAULT_TOKENS,
    seed: int = 0,
    quick: bool = False,
    loader: Loader | None = None,
    workers: int = DEFAULT_WORKERS,
    progress: Progress | None = None,
) -> Verification:
    """Prove that ``dst`` is ``src`` converted: the same weights, nothing else changed, outputs as the fixed loader's.

    ``device`` (auto, cpu, cuda, cuda:N) multiplies ``tokens`` activations made from ``seed``; ``quick`` leaves out the
    comparison of untouched bytes; ``loader`` is the one that serves ``dst`` (None: one with the fix).

    Raises :class:`Refused` for a source that does not add up, :class:`UsageError` for a device that is not there.
    Whatever is wrong with ``dst`` is a failed check of the result.
    """
    from rewrite.verification.run import verify_checkpoints  # torch and compressed-tensors: seconds to import

    return verify_checkpoints(
        src,
        dst,
        device=device,
        tokens=tokens,
        seed=seed,
        quick=quick,
        loader=loader,
        workers=workers,
        progress=progress,
    )
