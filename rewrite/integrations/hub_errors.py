"""The errors of huggingface_hub as ours: kinds and HTTP statuses only, as their texts may hold signed addresses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rewrite.errors import StorageError

_LIBRARIES = ("huggingface_hub", "httpx", "httpcore", "hf_xet", "requests")
_OF_THE_USER = (401, 403, 412, 429)  # no right, somebody pushed meanwhile, too much


class CannotCopy(StorageError):
    """The hub does not copy a file by itself: it lies in another region, or is not in Xet."""


@contextmanager
def hub_errors(where: str, refused: type[StorageError] = StorageError) -> Iterator[None]:
    """Raises :class:`StorageError` for what the library, or what it stands on, raises in the block.

    What a request can be blamed for is raised as ``refused``.
    """
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        # Xet raises RuntimeError, a file that cannot be copied is a ValueError.
        ours = any(kind.__module__.startswith(_LIBRARIES) for kind in type(error).__mro__)
        if not ours and not isinstance(error, OSError | RuntimeError | ValueError):
            raise
        status = getattr(getattr(error, "response", None), "status_code", None)
        blamed = status is None or (400 <= status < 500 and status not in _OF_THE_USER)
        kind = refused if blamed and (status or isinstance(error, ValueError)) else StorageError
        raise kind(
            "The hub refuses the request" if status else "Reading or writing the hub failed",
            where=where,
            found=type(error).__name__ + (f", HTTP status {status}" if status else ""),
            hint="check HF_TOKEN and what it may do there" if status in (401, 403) else "try again: what came is kept",
        ) from None
