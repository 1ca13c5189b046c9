# ruff: noqa: F811
"""Several machines that write one output, a signal in the midst of it, and more keys than a page of a list has."""

from __future__ import annotations

import importlib
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from rewrite.errors import StorageError
from rewrite.integrations.s3 import S3Storage
from tests.integrations.test_s3 import download, exists, local, run, source, uploads  # noqa: F401 (fixtures)
from tests.integrations.test_s3_foreign import planned
from tests.servers.http import Request
from tests.servers.s3 import S3Stub

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


#: What a machine is told where another one works on the same objects.
_BESIDE = {
    "The store has not kept what was written",
    "The object is not as it was expected to be",
    "Somebody else has begun to upload files of the output",
}


def test_the_same_parts_on_two_machines_at_once(s3: S3Stub, source: Path, local: dict[str, bytes]) -> None:
    """Each writes all it is told, or is told why not; what they leave is completed by either of them."""

    def part(number: int) -> str:
        try:
            planned().run_part(number % 2, 2, 1)  # with a client and notes of its own
        except StorageError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(4) as machines:
        refused = [text for text in machines.map(part, range(4)) if text]
    # All may be refused: each throws away the upload that the other has begun. No object is another one for that.
    assert {text.partition("\n")[0] for text in refused} <= _BESIDE, refused
    assert download("out").items() <= local.items()
    assert not exists("out/config.json")
    for number in range(2):
        planned().run_part(number, 2, 1)
    with ThreadPoolExecutor(2) as machines:
        list(machines.map(lambda _: planned().finish(), range(2)))
    assert download("out") == local
    assert uploads() == 0
    assert not exists("out.rewrite-started")


def test_a_signal_while_a_bucket_is_written(s3: S3Stub, source: Path, local: dict[str, bytes]) -> None:
    """What is said of OUT is true: objects are there, and it is not complete. The same command goes on from them."""
    command = ("convert", "s3://models/in", "s3://models/out", "--profile", "exact")
    made: list[str] = []

    def interrupt(request: Request) -> None:
        if request.method == "PUT" and request.path.startswith("/models/out/") and "uploadId" not in request.query:
            made.append(request.path)
            if len(made) == 3:
                child.send_signal(signal.SIGTERM)

    s3.misbehave = interrupt
    child = subprocess.Popen([sys.executable, "-m", "rewrite", *command], stderr=subprocess.PIPE, text=True)
    _, said = child.communicate(timeout=120)
    s3.misbehave = lambda request: None
    assert child.returncode == 143, said
    assert said.endswith("Interrupted. s3://models/out is not complete; run the same command to resume.\n")
    assert download("out")
    assert not exists("out/config.json")
    assert not exists("out.rewrite-complete")
    assert run(*command).exit_code == 0
    assert download("out") == local


def test_more_keys_than_a_page_has(s3: S3Stub, source: Path) -> None:
    """2,300, on three pages; none of the prefix beside it."""
    store: Any = importlib.import_module("moto.s3.models").s3_backends["123456789012"]["aws"]
    keys = {f"é +%/{number:04d}.txt" for number in range(2300)}
    for key in keys | {"in2/sibling.txt"}:
        store.put_object("models", key if "/sib" in key else f"in/{key}", b"x")
    storage = S3Storage("s3://models/in")
    s3.requests.clear()
    found = storage.list_files().files
    assert keys < found.keys()
    assert len(found) == 2300 + len(list(source.iterdir()))
    assert len([request for request in s3.requests if "list-type" in request.query]) == 3
