"""Clusters that write the files of an output: what gives an executor for an address."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import Any

from rewrite.errors import StorageError, UsageError

_TIMEOUT = 30  # seconds for the scheduler to answer


@contextmanager
def cluster(address: str) -> Iterator[Executor]:
    """The workers of the Dask scheduler at ``address``, as an executor. Tasks of a worker that dies go to another one.

    Raises :class:`UsageError` where `distributed` is not installed and :class:`StorageError` where nobody answers.
    """
    try:
        distributed: Any = importlib.import_module("distributed")
    except ImportError:
        hint = "pip install 'rewrite[dask]'"
        raise UsageError("A cluster needs the package `distributed`", found=address, hint=hint) from None
    try:
        client = distributed.Client(address, timeout=_TIMEOUT)
    except (OSError, ValueError) as error:
        raise StorageError(
            "The scheduler does not answer", where=address, found=type(error).__name__,
            expected="the address of a Dask scheduler, such as tcp://host:8786",
        ) from None  # fmt: skip
    with client:
        if not client.scheduler_info()["workers"]:
            raise StorageError("The cluster has no workers", where=address, hint="start some: `dask worker ADDRESS`")
        yield client.get_executor(pure=False)
