"""``--report``: what the commands found, and what is read beside it, as a file for people."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

import rewrite
from rewrite.checkpoint.checkpoint import Checkpoint, read_checkpoint
from rewrite.checkpoint.local import LocalDirectory
from rewrite.checkpoint.storage import Storage
from rewrite.cli.command_line import command_line
from rewrite.environment import versions
from rewrite.errors import RewriteError, StorageError
from rewrite.inspection.inspection import inspect_model
from rewrite.quantization.groups import Selection
from rewrite.quantization.model import interpret
from rewrite.report import files, verified
from rewrite.report.checkpoints import Place, Side
from rewrite.report.page import Run, whole
from rewrite.trying.tried import Tried
from rewrite.verification.expected import MANIFEST_NAME, profile_of
from rewrite.wording import count, nbytes

_ON_HUB = re.compile(r"(?P<model>[^/@]+/[^/@]+)@(?P<commit>[0-9a-f]{40})")


AS_PAGE = "as a page (FILE.html) or Markdown with images (FILE.md); needs rewrite[report]"


def report_option(what: str) -> Callable[[Any], Any]:
    return click.option(
        "--report", "report_file", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
        help=f"Also write {what}.",
    )  # fmt: skip


class Compared:
    """IN and OUT of a verification, as they were when it began."""

    def __init__(self, source: Storage, out: Storage, path: Path) -> None:
        self._storages = (source, out)
        self._path = path
        self._opened = [_open(source), _open(out)]

    def write(
        self, context: click.Context, found: rewrite.Verification, remarks: list[str], trial: Tried | None = None
    ) -> None:
        """The report of ``found``. Raises :class:`StorageError` where a file has changed since it was opened."""
        for storage, (checkpoint, _) in zip(self._storages, self._opened, strict=True):
            if checkpoint is not None and storage.list_files().files != dict(checkpoint.files):
                raise StorageError("The checkpoint has changed while it was verified", where=str(storage))
        out = self._opened[1][0]
        selection, profile = held_to(out)
        sides = [
            _side(storage, opened, selection, found.settings.platform)
            for storage, opened in zip(self._storages, self._opened, strict=True)
        ]
        names = {"source": sides[0].place.name, "out": sides[1].place.name}
        run = run_of(context, names, remarks)
        files.write(verified.report(found, sides[0], sides[1], profile, run, trial), self._path)


def run_of(context: click.Context, names: dict[str, str], remarks: list[str]) -> Run:
    """How a reader can do it again; ``names`` stand for the arguments."""
    ran = {"rewrite": rewrite.__version__, **versions()}
    return Run(command_line(context, names), tuple(ran.items()), tuple(remarks))


def headline_of(checkpoint: Checkpoint) -> str:
    """A checkpoint in a line."""
    model = checkpoint.config.value.get("model_type", "unknown model type")
    shards, tensors = count(len(checkpoint.shards), "shard"), count(len(checkpoint.tensors), "tensor")
    return f"{whole(str(checkpoint.storage))}: {model}, {shards}, {tensors}, {nbytes(checkpoint.nbytes)}"


def place_of(storage: Storage) -> Place:
    """What a report may say of where a checkpoint lies."""
    on_hub = _ON_HUB.fullmatch(storage.name)
    if on_hub:
        return Place(storage.name, "the Hugging Face hub", on_hub["commit"])
    return Place(storage.name, "a directory" if isinstance(storage, LocalDirectory) else "a bucket")


def _open(storage: Storage) -> tuple[Checkpoint | None, str]:
    try:
        return read_checkpoint(storage), ""
    except RewriteError as error:  # the verification says it, too
        return None, error.what


def held_to(out: Checkpoint | None) -> tuple[Selection, str]:
    """The selection, and in words the profile that OUT is held to."""
    if out is None:
        return "qkvz", "not known: OUT cannot be opened"
    profile, selection, _ = profile_of(out)
    if MANIFEST_NAME not in out.files:
        return selection, "exact: OUT has no manifest"
    if profile not in rewrite.PROFILES:
        return selection, f"exact: the manifest names {profile}, which is not known"
    return selection, f"profile {profile}, groups {selection}"


def _side(storage: Storage, opened: tuple[Checkpoint | None, str], selection: Selection, platform: str) -> Side:
    checkpoint, reason = opened
    place = place_of(storage)
    if checkpoint is None:
        return Side(place, None, reason)
    try:
        return Side(place, inspect_model(interpret(checkpoint), selection, platform=platform, profiles=()))
    except RewriteError as error:
        return Side(place, None, error.what)
