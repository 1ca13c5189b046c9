"""A conversion as a file: planned once, carried out in parts on any machines, published by a last step."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewrite.checkpoint.checkpoint import Checkpoint, read_checkpoint
from rewrite.checkpoint.local import LocalDirectory, io_errors
from rewrite.checkpoint.storage import Storage
from rewrite.errors import StorageError, UsageError
from rewrite.integrations.addresses import open_storage, scheme_of
from rewrite.planning.manifest import ByteCounts, Manifest
from rewrite.planning.plan import Plan
from rewrite.progress import Progress
from rewrite.version import __version__
from rewrite.writing.publish import Publication

if TYPE_CHECKING:
    from rewrite.integrations.hub_publish import HubPublication
    from rewrite.integrations.s3_publish import S3Publication

_KIND = "rewrite conversion"


@dataclass(frozen=True)
class Conversion:
    """A plan, where it reads and where it writes. Addresses only: every machine has credentials of its own.

    Every part, and the last step, may run again: what is complete is kept.
    """

    plan: Plan
    source: str
    out: str
    overwrite: bool = False
    copy: bool = False
    created: str | None = None
    create_pr: bool = False
    storage: Storage | None = field(default=None, compare=False, repr=False)  # the source, where it is open already

    def publish(self, workers: int, progress: Progress | None = None, executor: Executor | None = None) -> Manifest:
        """All of it."""
        return self._publication.publish(workers, progress, executor)

    def downloaded(
        self, workers: int, progress: Progress | None, make_plan: Callable[[Checkpoint], Plan]
    ) -> Conversion:
        """The same from a complete copy in the cache, where a model of the hub goes to a directory: files are shared
        with the cache, or copied by the kernel. The plan was made before, so that what is refused is not downloaded."""
        if as_path(self.out) is None or scheme_of(self.source) != "hf" or self.storage is None:
            return self
        from rewrite.integrations.hub import HubStorage
        from rewrite.integrations.hub_download import download

        if not isinstance(self.storage, HubStorage):
            return self
        storage = download(self.storage, workers, progress)
        return replace(self, plan=make_plan(read_checkpoint(storage)), storage=storage)

    def run_part(self, number: int, parts: int, workers: int = 2, progress: Progress | None = None) -> ByteCounts:
        """Write part ``number``, from 0, of ``parts``. Parts may run at the same time, here and on other machines.

        Raises :class:`UsageError` for a part that there is not, else as :func:`rewrite.convert`.
        """
        if not 0 <= number < parts:
            raise UsageError("There is no such part", expected="I/N with I from 0 to N - 1", found=f"{number}/{parts}")
        return self._publication.run_part(number, parts, workers, progress)

    def finish(self) -> Manifest:
        """Publish the output. Raises :class:`StorageError` while files of it are missing."""
        return self._publication.finish()

    @property
    def _publication(self) -> Publication | S3Publication | HubPublication:
        if self.create_pr and scheme_of(self.out) != "hf":
            raise UsageError("Only the hub has pull requests", expected="hf://org/name", found=self.out)
        place = as_path(self.source)
        storage = self.storage or open_storage(self.source if place is None else place)
        out = as_path(self.out)
        if out is not None:
            return Publication(self.plan, storage, out, self.overwrite, self.copy, self.created)
        if self.copy:
            raise UsageError("Only an output in a directory can share disk blocks", where=self.out, found="--copy")
        if scheme_of(self.out) == "hf":
            from rewrite.integrations.hub_publish import HubPublication

            return HubPublication(self.plan, storage, self.out, self.overwrite, self.created, self.create_pr)
        from rewrite.integrations.s3_publish import S3Publication

        return S3Publication(self.plan, storage, self.out, self.overwrite, self.created)

    def save(self, path: Path) -> None:
        """Write it to a file, which others see complete or not at all."""
        document = {
            "kind": _KIND,
            "version": __version__,
            "in": self.source,
            "out": self.out,
            "overwrite": self.overwrite,
            "copy": self.copy,
            "create_pr": self.create_pr,
            "created": self.created,
            "digest": self.plan.digest,
            "plan": self.plan.to_json(),
        }
        partial = path.with_name(f".{path.name}.partial")
        with io_errors(path):
            partial.write_text(json.dumps(document, indent=1), encoding="utf-8", errors="surrogatepass")
            partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Conversion:
        """The inverse of :meth:`save`. Raises :class:`StorageError` for what is no such file, or was changed."""
        with io_errors(path):
            raw = path.read_bytes()
        try:
            value: dict[str, Any] = json.loads(raw.decode("utf-8", errors="surrogatepass"))
            kind, version = value["kind"], value["version"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise _unreadable(path, "no such file") from None
        if kind != _KIND or version != __version__:
            raise _unreadable(path, f"{kind} by rewrite {version}")
        try:
            plan = Plan.from_json(value["plan"])
            fields = {key: value[key] for key in ("out", "overwrite", "copy", "created", "create_pr")}
            loaded = cls(plan=plan, source=value["in"], **fields)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise _unreadable(path, "a file that was changed") from None
        if plan.digest != value.get("digest"):
            raise _unreadable(path, "a file that was changed")
        return loaded


def as_path(address: str) -> Path | None:
    """The path that an address is; None for what lies elsewhere."""
    return Path(address) if scheme_of(address) is None else None


def absolute(address: str | os.PathLike[str]) -> str:
    """An address as another machine, or another directory of this one, understands it. Symlinks stay."""
    if isinstance(address, str) and scheme_of(address) is not None:
        return address.rstrip("/")
    return os.path.abspath(address)  # noqa: PTH100 - resolve() would follow OUT


def address_of(storage: Storage) -> str:
    """The same of a storage that is open: with the commit, of a model on the hub."""
    return absolute(storage.root) if isinstance(storage, LocalDirectory) else str(storage)


def _unreadable(path: Path, found: str) -> StorageError:
    return StorageError(
        "This is not a plan of `rewrite plan`",
        where=str(path),
        expected=f"{_KIND} by rewrite {__version__}",
        found=found,
        hint="plan again, with the version that runs the parts",
    )
