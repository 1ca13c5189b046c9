"""A conversion as a file: planned once, carried out in parts on any machines, published by a last step."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import UnionType
from typing import Any

from rewrite.checkpoint.checkpoint import Checkpoint, read_checkpoint
from rewrite.checkpoint.local import LocalDirectory, io_errors
from rewrite.checkpoint.storage import Storage
from rewrite.errors import StorageError, UsageError
from rewrite.integrations.addresses import STORES, load, open_storage, scheme_of
from rewrite.planning.manifest import ByteCounts, Manifest
from rewrite.planning.plan import Plan
from rewrite.progress import Progress
from rewrite.version import __version__
from rewrite.writing.output import Check, Output
from rewrite.writing.publish import DirectoryOutput

_KIND = "rewrite conversion"
#: What a file says beside IN and the plan.
_TYPES: dict[str, type | UnionType] = {
    "out": str, "overwrite": bool, "copy": bool, "create_pr": bool, "created": str | None,
}  # fmt: skip


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

    def publish(
        self,
        workers: int,
        progress: Progress | None = None,
        executor: Executor | None = None,
        check: Check | None = None,
    ) -> Manifest:
        """All of it; ``check`` looks at the output before anybody else can see it."""
        return replace(self._publication, check=check).publish(workers, progress, executor)

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
    def _publication(self) -> Output:
        if self.create_pr and scheme_of(self.out) != "hf":
            raise UsageError("Only the hub has pull requests", expected="hf://org/name", found=self.out)
        place = as_path(self.source)
        storage = self.storage or open_storage(self.source if place is None else place)
        if isinstance(storage, LocalDirectory) and not storage.root.is_absolute():
            storage = LocalDirectory(self.source)  # workers may run in other directories
        if as_path(self.out) is not None:
            return DirectoryOutput(self.plan, storage, self.out, self.overwrite, self.created, self.copy)
        if self.copy:
            raise UsageError("Only an output in a directory can share disk blocks", where=self.out, found="--copy")
        more = {"create_pr": True} if self.create_pr else {}
        store = STORES[scheme_of(self.out) or ""]
        output: Output = load(store.writes)(self.plan, storage, self.out, self.overwrite, self.created, **more)
        return output

    def save(self, path: Path) -> None:
        """Write it to a file, which others see complete or not at all."""
        document = {
            "kind": _KIND, "version": __version__, **self._fields, "digest": self.digest, "plan": self.plan.to_json(),
        }  # fmt: skip
        partial = path.with_name(f".{path.name}.partial")
        with io_errors(path):
            partial.write_text(json.dumps(document, indent=1), encoding="utf-8", errors="surrogatepass")
            partial.replace(path)

    @property
    def digest(self) -> str:
        """Of all that the file says. It shows accidents; whoever edits a plan on purpose can compute it, too."""
        return hashlib.sha256(json.dumps([self.plan.digest, self._fields], sort_keys=True).encode()).hexdigest()

    @property
    def _fields(self) -> dict[str, str | bool | None]:
        return {"in": self.source, **{name: getattr(self, name) for name in _TYPES}}

    @classmethod
    def load(cls, path: Path, out: str | os.PathLike[str] | None = None) -> Conversion:
        """The inverse of :meth:`save`. ``out``, where given, must be the output of the plan. A plan that replaces its
        output is not loaded without: a file alone must not say what is removed.

        Raises :class:`StorageError` for what is no such file, or was changed, and :class:`UsageError` for another
        output.
        """
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
            fields = {name: value[name] for name in _TYPES}
            loaded = cls(plan=Plan.from_json(value["plan"]), source=value["in"], **fields)
            typed = all(isinstance(fields[name], kind) for name, kind in _TYPES.items()) and isinstance(
                value["in"], str
            )
            if not typed or loaded.digest != value["digest"] or absolute(loaded.out) != loaded.out:
                raise _unreadable(path, "a file that was changed")
            loaded.plan.check()
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise _unreadable(path, "a file that was changed") from None
        if loaded.overwrite and out is None:
            raise UsageError(
                "This plan replaces an output, which has to be named", where=str(path), found=loaded.out,
                hint="give OUT after the plan, if it is the one to replace",
            )  # fmt: skip
        if out is not None and absolute(out) != loaded.out:
            raise UsageError(
                "The plan has another output", where=str(path), expected=absolute(out), found=loaded.out,
                hint="plan again if the plan is not yours",
            )  # fmt: skip
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
