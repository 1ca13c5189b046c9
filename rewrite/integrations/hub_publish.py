"""A Plan carried out on the hub: one commit, so that readers see all of it or nothing.

Shards that change are written to a temporary file, one for each worker, and uploaded (Xet sends the chunks that the hub
has not seen yet). Files that do not change are copied by the hub where they come from it, or left where they are. What
was uploaded before an interruption is not sent again: the hub knows files by their hashes.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rewrite.checkpoint.local import LocalDirectory
from rewrite.checkpoint.storage import FileId, Storage
from rewrite.errors import StorageError, UsageError
from rewrite.integrations.hub import SCHEME, HubStorage, content_tag, split
from rewrite.integrations.hub_errors import CannotCopy, hub_errors
from rewrite.integrations.remote import RemoteStorage
from rewrite.planning.jobs import FileCopy, Job, ShardPlan
from rewrite.planning.manifest import MANIFEST_NAME, ByteCounts, Manifest
from rewrite.planning.plan import Plan
from rewrite.progress import Counter, Progress
from rewrite.writing.publish import check_source
from rewrite.writing.stream import streamed
from rewrite.writing.tasks import largest_first

_SMALL = 1 << 20  # bytes that are read into memory


@dataclass(frozen=True)
class HubPublication:
    """A plan and the model that its output becomes. ``create_pr``: as a pull request."""

    plan: Plan
    source: Storage
    out: str
    overwrite: bool = False
    created: str | None = None
    create_pr: bool = False

    def publish(self, workers: int, progress: Progress | None, executor: Executor | None) -> Manifest:
        """Everything, in one commit."""
        if executor is not None:
            raise UsageError("An output on the hub is one commit: one process makes it", where=self.out)
        target = self._target()
        there = {} if target is None else dict(target.list_files().files)
        if target is not None and self._is_there(target, there):
            return self._manifest.with_counts(ByteCounts(kept=self.plan.size))
        gone = sorted(name for name in there if name not in self._files())
        self._check_free(there)
        if target is None:
            with hub_errors(self.out):
                self._api.create_repo(self._model, private=True)
            target = HubStorage(self._model)
        with _without_bars():
            return self._write(target, there, gone, workers, Counter(self.plan.size, progress))

    def _write(
        self, target: HubStorage, there: dict[str, FileId], gone: list[str], workers: int, counter: Counter
    ) -> Manifest:
        jobs = [job for job in self._jobs if there.get(job.name) != job.source or isinstance(job, ShardPlan)]
        counter.advance(sum(job.size for job in self._jobs) - sum(job.size for job in jobs))
        with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
            done = list(pool.map(lambda job: self._operation(job, counter), jobs))
        check_source(self.plan, self.source)
        try:
            self._commit(target, [operation for operation, _ in done], gone)
        except CannotCopy:  # another storage region, or a file that the hub keeps in its older way: through here
            again = [
                self._upload(job) if is_copy(operation) else operation
                for job, (operation, _) in zip(jobs, done, strict=True)
            ]
            self._commit(target, again, gone)
        counts = sum((counts for _, counts in done), ByteCounts(kept=sum(j.size for j in self._jobs if j not in jobs)))
        read = self.source.traffic.read if isinstance(self.source, RemoteStorage) else 0
        # Xet sends the chunks that the hub has not seen, and does not tell us how many.
        return self._manifest.with_counts(counts + ByteCounts(read=read, sent=None))

    def run_part(self, number: int, parts: int, workers: int = 2, progress: Progress | None = None) -> ByteCounts:
        raise self._no_parts()

    def finish(self) -> Manifest:
        raise self._no_parts()

    def _no_parts(self) -> UsageError:
        return UsageError(
            "An output on the hub is one commit: it has no parts", where=self.out,
            hint="use `rewrite convert`, or write a directory or a bucket in parts",
        )  # fmt: skip

    @cached_property
    def _model(self) -> str:
        name, revision = split(self.out)
        if revision is not None:
            raise UsageError("An output has no revision yet", expected=SCHEME + name, found=self.out)
        return name

    @cached_property
    def _api(self) -> Any:
        from huggingface_hub import HfApi, constants

        if constants.is_offline_mode():
            raise UsageError("The hub cannot be written to while HF_HUB_OFFLINE is set", where=self.out)
        return HfApi(endpoint=constants.ENDPOINT)

    @property
    def _manifest(self) -> Manifest:
        return self.plan.manifest if self.created is None else self.plan.manifest.created_at(self.created)

    @property
    def _jobs(self) -> list[Job]:
        return largest_first(self.plan.jobs)

    @cached_property
    def _texts(self) -> dict[str, bytes]:
        texts = {text.name: text.text.encode() for text in self.plan.texts}
        if self._manifest.changed:  # an output that equals its source says nothing of us
            texts[MANIFEST_NAME] = self._manifest.to_text().encode()
        return texts

    def _files(self) -> dict[str, int]:
        """Every file of the output with its size."""
        return {**{job.name: job.size for job in self._jobs}, **{name: len(data) for name, data in self._texts.items()}}

    def _target(self) -> HubStorage | None:
        self.plan.check()
        with hub_errors(self.out):
            exists = self._api.repo_exists(self._model)
        if not exists and self.create_pr:
            raise UsageError("A pull request needs a model that exists", where=self.out)
        return HubStorage(self._model) if exists else None

    def _is_there(self, target: HubStorage, there: dict[str, FileId]) -> bool:
        """Whether the model is the output of this very plan: its manifest says so, and every file has its size. Where
        nothing was to be done there is no manifest: every file is the same by its hash."""
        manifest = self._texts.get(MANIFEST_NAME)
        sizes = {name: file.size for name, file in there.items()}
        if sizes != self._files():
            return False
        if manifest is not None:
            return target.read(MANIFEST_NAME, 0, sizes[MANIFEST_NAME]) == manifest
        return all(
            there[job.name] == job.source
            or content_tag(there[job.name], streamed(job, self.source)) == there[job.name].tag
            for job in self._jobs
        )

    def _check_free(self, there: dict[str, FileId]) -> None:
        taken = sorted(name for name in there)
        if taken and not (self.overwrite or self.create_pr):
            raise StorageError(
                "The output exists", where=self.out, expected="no model of this name, or an empty one",
                found=", ".join(taken[:5]), hint="choose another name, --create-pr for a pull request, or --overwrite",
            )  # fmt: skip

    def _operation(self, job: Job, counter: Counter) -> tuple[Any, ByteCounts]:
        """What the commit does for a file; its bytes are on the hub already when it is large."""
        from huggingface_hub import CommitOperationCopy

        if isinstance(job, FileCopy) and isinstance(self.source, HubStorage) and len(job.source.tag) == 64:
            # In LFS, by its SHA-256: the hub copies it. Others are small, and part of the commit itself.
            copy = CommitOperationCopy(
                job.name,
                job.name,
                src_revision=self.source.commit,
                src_repo_id=self.source.model,
                src_repo_type="model",
            )
            counter.advance(job.size)
            return copy, ByteCounts(copied=job.size)
        add = self._upload(job)
        counter.advance(job.size)
        copied = job.size if isinstance(job, FileCopy) else 0
        return add, ByteCounts(copied=copied, written=job.size - copied)

    def _upload(self, job: Job) -> Any:
        """A large file is on the hub afterwards; a small one is part of the commit."""
        from huggingface_hub import CommitOperationAdd

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

    def _commit(self, target: HubStorage, operations: list[Any], gone: list[str]) -> None:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        operations = [
            *operations,
            *(CommitOperationAdd(name, data) for name, data in self._texts.items()),
            *(CommitOperationDelete(name) for name in gone),
        ]
        copies = any(map(is_copy, operations))
        with hub_errors(self.out, CannotCopy if copies else StorageError):
            done = self._api.create_commit(
                self._model,
                operations,
                commit_message=f"rewrite: {self.plan.manifest.profile}",
                create_pr=self.create_pr,
                parent_commit=target.commit,  # refused if somebody pushed meanwhile
            )
        found = {name: file.size for name, file in HubStorage(self._model, done.oid).list_files().files.items()}
        wrong = sorted(name for name, size in self._files().items() if found.get(name) != size)
        if wrong:
            raise StorageError("The hub has not kept what was written", where=f"{self.out}@{done.oid}/{wrong[0]}")


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
