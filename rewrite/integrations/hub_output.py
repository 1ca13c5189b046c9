"""A Plan carried out on the hub: one commit, so that readers see all of it or nothing.

Shards that change are written to a temporary file, one for each worker, and uploaded (Xet sends the chunks that the hub
has not seen yet). Files that do not change are copied by the hub where they come from it, or left where they are. What
was uploaded before an interruption is not sent again: the hub knows files by their hashes.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi, constants

from rewrite.checkpoint.local import LocalDirectory
from rewrite.checkpoint.storage import FileId
from rewrite.errors import StorageError, UsageError
from rewrite.integrations.hub import SCHEME, HubStorage, content_tag, split
from rewrite.integrations.hub_errors import CannotCopy, hub_errors
from rewrite.integrations.remote import RemoteStorage
from rewrite.planning.jobs import FileCopy, Job, ShardPlan
from rewrite.planning.manifest import ByteCounts, Manifest
from rewrite.progress import Progress
from rewrite.writing.output import Output, Step, exists, some
from rewrite.writing.shard import Advance
from rewrite.writing.stream import streamed
from rewrite.writing.tasks import Writer

_SMALL = 1 << 20  # bytes that are read into memory


@dataclass(frozen=True)
class HubOutput(Output, Writer):
    """An output that becomes a model. ``create_pr``: as a pull request."""

    create_pr: bool = False
    _operations: dict[str, Any] = field(default_factory=dict, repr=False)  # what the commit does for each file

    def publish(self, workers: int, progress: Progress | None = None, executor: Executor | None = None) -> Manifest:
        if executor is not None:
            raise UsageError("An output on the hub is one commit: one process makes it", where=self.out)
        if self.check is not None:
            raise UsageError(
                "An output on the hub cannot be read before its commit", where=self.out, found="--verify",
                hint="convert --verify to a directory and upload that; or --create-pr, and verify what it proposes",
            )  # fmt: skip
        with _without_bars():
            return super().publish(workers, progress)

    @contextmanager
    def claim(self, step: Step) -> Iterator[bool]:
        """Nothing is held: the commit is refused if somebody pushes meanwhile."""
        if step != "publish":
            raise UsageError(
                "An output on the hub is one commit: it has no parts", where=self.out,
                hint="use `rewrite convert`, or write a directory or a bucket in parts",
            )  # fmt: skip
        begun = not self._exists or not self._is_there()
        if begun and self._there and not (self.overwrite or self.create_pr):
            raise exists(
                self.out, some(sorted(self._there)),
                "choose another name, --create-pr for a pull request, or --overwrite",
                "no model of this name, or an empty one",
            )  # fmt: skip
        if begun and not self._exists:
            with hub_errors(self.out):
                self._api.create_repo(self._model, private=True)
        yield begun

    def missing(self, jobs: Iterable[Job]) -> list[Job]:
        return [
            job for job in jobs
            if job.name not in self._operations
            and (isinstance(job, ShardPlan) or self._there.get(job.name) != job.source)
        ]  # fmt: skip

    def writer(self) -> HubOutput:
        return self

    def write(self, job: Job, advance: Advance) -> ByteCounts:
        """What the commit does for a file; its bytes are on the hub already when it is large."""
        copied = job.size if isinstance(job, FileCopy) else 0
        written = job.size - copied
        if copied and isinstance(self.source, HubStorage) and len(job.source.tag) == 64:
            # In LFS, by its SHA-256: the hub copies it. Others are small, and part of the commit itself.
            self._operations[job.name] = CommitOperationCopy(
                job.name, job.name, src_revision=self.source.commit, src_repo_id=self.source.model,
                src_repo_type="model",
            )  # fmt: skip
        else:
            self._operations[job.name] = self._upload(job)
        advance(job.size)
        return ByteCounts(copied=copied, written=written)

    def complete(self) -> ByteCounts:
        self.check_source()
        try:
            self._commit()
        except CannotCopy:  # another storage region, or a file that the hub keeps in its older way: through here
            for job in self.plan.jobs:
                if is_copy(self._operations.get(job.name)):
                    self._operations[job.name] = self._upload(job)
            self._commit()
        # Xet sends the chunks that the hub has not seen, and does not tell us how many.
        return ByteCounts(read=self.source.traffic.read if isinstance(self.source, RemoteStorage) else 0, sent=None)

    @cached_property
    def _model(self) -> str:
        name, revision = split(self.out)
        if revision is not None:
            raise UsageError("An output has no revision yet", expected=SCHEME + name, found=self.out)
        return name

    @cached_property
    def _api(self) -> Any:
        if constants.is_offline_mode():
            raise UsageError("The hub cannot be written to while HF_HUB_OFFLINE is set", where=self.out)
        return HfApi(endpoint=constants.ENDPOINT)

    @cached_property
    def _texts(self) -> dict[str, bytes]:
        return {name: text.encode() for name, text in self.stamped.texts_to_write.items()}

    @cached_property
    def _exists(self) -> bool:
        with hub_errors(self.out):
            found = bool(self._api.repo_exists(self._model))
        if not found and self.create_pr:
            raise UsageError("A pull request needs a model that exists", where=self.out)
        return found

    @cached_property
    def _target(self) -> HubStorage:
        """The model as it was when we came, or as it was made: empty."""
        return HubStorage(self._model)

    @property
    def _there(self) -> dict[str, FileId]:
        return self._target.list_files().files if self._exists else {}

    def _is_there(self) -> bool:
        """Whether the model is the output of this very plan: every file, by its hash. Sizes are compared before bytes
        are read for that."""
        there = self._there
        if {name: file.size for name, file in there.items()} != self.stamped.files:
            return False
        texts = ((name, (data,)) for name, data in self._texts.items())
        # A file of the hub has its hash already; a copy is one that its source has.
        jobs = ((job.name, streamed(job, self.source)) for job in self.plan.jobs if there[job.name] != job.source)
        return all(
            content_tag(there[name], pieces) == there[name].tag for group in (texts, jobs) for name, pieces in group
        )

    def _upload(self, job: Job) -> Any:
        """A large file is on the hub afterwards; a small one is part of the commit."""
        with tempfile.TemporaryDirectory(prefix="rewrite-") as folder:
            path = self._whole(job, Path(folder) / "file")
            add = CommitOperationAdd(job.name, path if job.size > _SMALL else path.read_bytes())
            with hub_errors(f"{self.out}/{job.name}"):
                self._api.preupload_lfs_files(self._model, [add], create_pr=self.create_pr)
            if isinstance(add.path_or_fileobj, Path | str) and not add._is_uploaded:
                return CommitOperationAdd(job.name, path.read_bytes())  # the hub wants it in the commit
        return add

    def _whole(self, job: Job, target: Path) -> Path:
        """The file, on disk."""
        if isinstance(job, FileCopy) and isinstance(self.source, LocalDirectory):
            return self.source.root / job.name
        with target.open("wb") as file:
            for piece in streamed(job, self.source):
                file.write(piece)
        return target

    def _commit(self) -> None:
        copies = any(map(is_copy, self._operations.values()))
        with hub_errors(self.out, CannotCopy if copies else StorageError):
            done = self._api.create_commit(
                self._model,
                [
                    *self._operations.values(),
                    *(CommitOperationAdd(name, data) for name, data in self._texts.items()),
                    *(CommitOperationDelete(name) for name in sorted(self._there) if name not in self.stamped.files),
                ],
                commit_message=f"rewrite: {self.plan.manifest.profile}",
                create_pr=self.create_pr,
                parent_commit=self._target.commit,  # refused if somebody pushed meanwhile
            )
        found = HubStorage(self._model, done.oid).list_files().files
        wrong = sorted(name for name, size in self.stamped.files.items() if not self._was_kept(name, size, found))
        if wrong:
            raise StorageError("The hub has not kept what was written", where=f"{self.out}@{done.oid}/{wrong[0]}")

    def _was_kept(self, name: str, size: int, found: dict[str, FileId]) -> bool:
        """By its size and, where we know it, the hash of what was sent."""
        file, operation = found.get(name), self._operations.get(name)
        if file is None or file.size != size:
            return False
        if name in self._texts:
            return content_tag(file, (self._texts[name],)) == file.tag
        if operation is None or is_copy(operation):
            sources = {job.name: job.source for job in self.plan.jobs}
            return len(sources[name].tag) != 64 or sources[name].tag == file.tag
        return len(file.tag) != 64 or operation.upload_info.sha256.hex() == file.tag


@contextmanager
def _without_bars() -> Iterator[None]:
    """huggingface_hub shows bars of its own, which would mix with ours, and with nothing of ours where it is quiet."""
    utils: Any = importlib.import_module("huggingface_hub.utils")
    if utils.are_progress_bars_disabled():
        yield
        return
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()


def is_copy(operation: Any) -> bool:
    """Whether the hub is asked to copy a file by itself."""
    return hasattr(operation, "src_path_in_repo")
