"""Where a checkpoint lies, from what a user wrote: a directory, a model on the hub, a place in a bucket."""

from __future__ import annotations

import os
import re

from rewrite.checkpoint.local import LocalDirectory
from rewrite.checkpoint.storage import Storage
from rewrite.errors import StorageError, UsageError

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")  # org/name or org/name@revision

#: What users may pass: a directory, ``org/name[@revision]``, ``hf://…``, or a storage of their own.
Address = str | os.PathLike[str] | Storage

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_REFUSED = {
    **dict.fromkeys(("gs", "gcs"), "Google Cloud Storage cannot copy a range of an object on the server"),
    **dict.fromkeys(("az", "abfs", "abfss"), "Azure can copy ranges on the server, but this was never run"),
}


def scheme_of(address: Address) -> str | None:
    """``hf`` or ``s3``; None for a path. Raises :class:`UsageError` for what is neither."""
    found = _SCHEME.match(address) if isinstance(address, str) else None
    if found is None:
        return None
    scheme = found[1].lower()
    if scheme not in ("hf", "s3"):
        raise UsageError(
            _REFUSED.get(scheme, "Unknown kind of address"), expected="a directory, hf://org/name or s3://bucket/prefix",
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
    if scheme == "hf":
        from rewrite.integrations.hub import open_hub

        return open_hub(str(address))
    if scheme == "s3":
        from rewrite.integrations.s3 import S3Storage

        return S3Storage(str(address))
    if isinstance(address, str) and not os.path.lexists(address) and HUB_NAME.fullmatch(address):
        try:
            return open_storage(f"hf://{address}")
        except StorageError as error:
            raise error.with_hint("there is no directory of this name here, either") from None
    return LocalDirectory(address)
