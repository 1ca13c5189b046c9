"""Where a checkpoint lies, from what a user wrote: a directory, a model on the hub, a place in a bucket."""

from __future__ import annotations

import importlib
import os
import re
from typing import Any, NamedTuple

from rewrite.checkpoint.local import LocalDirectory
from rewrite.checkpoint.storage import Storage
from rewrite.errors import StorageError, UsageError

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")  # org/name or org/name@revision

#: What users may pass: a directory, ``org/name[@revision]``, ``hf://…``, or a storage of their own.
Address = str | os.PathLike[str] | Storage


class Store(NamedTuple):
    """How its addresses look, what opens one and what writes there: ``module:name`` of this folder, each imported only
    where it is used."""

    form: str
    reads: str
    writes: str


STORES = {
    "hf": Store("hf://org/name", "hub:open_hub", "hub_output:HubOutput"),
    "s3": Store("s3://bucket/prefix", "s3:S3Storage", "s3_output:S3Output"),
}
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_REFUSED = {
    **dict.fromkeys(("gs", "gcs"), "Google Cloud Storage cannot copy a range of an object on the server"),
    **dict.fromkeys(("az", "abfs", "abfss"), "Azure can copy ranges on the server, but this was never run"),
}


def scheme_of(address: Address) -> str | None:
    """One of :data:`STORES`; None for a path. Raises :class:`UsageError` for what is neither."""
    found = _SCHEME.match(address) if isinstance(address, str) else None
    if found is None:
        return None
    scheme = found[1].lower()
    if scheme not in STORES:
        forms = " or ".join(store.form for store in STORES.values())
        raise UsageError(
            _REFUSED.get(scheme, "Unknown kind of address"), expected=f"a directory, {forms}",
            found=f"{scheme}://", hint="copy the checkpoint to a directory first",
        )  # fmt: skip
    return scheme


def open_storage(address: Address) -> Storage:
    """The storage behind an address. A directory of the name ``org/name`` is taken before a model on the hub.

    Raises :class:`UsageError` for an address that makes no sense and :class:`rewrite.errors.StorageError` where the
    hub cannot be asked.
    """
    if not isinstance(address, str | os.PathLike):
        return address
    scheme = scheme_of(address)
    if scheme is not None:
        storage: Storage = load(STORES[scheme].reads)(str(address))
        return storage
    if isinstance(address, str) and not os.path.lexists(address) and HUB_NAME.fullmatch(address):
        try:
            return open_storage(f"hf://{address}")
        except StorageError as error:
            raise error.with_hint("there is no directory of this name here, either") from None
    return LocalDirectory(address)


def load(named: str) -> Any:
    """What a :class:`Store` names."""
    module, _, name = named.partition(":")
    return getattr(importlib.import_module(f"rewrite.integrations.{module}"), name)
