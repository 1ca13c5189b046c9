"""Coverage-guided fuzzing of a whole checkpoint: config, index and two shards in one input, between separators."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["rewrite", "json"]):
    from tests.crafted_cases import CONFIG, INDEX, SHARDS, judge
from fuzz.seeds import SEPARATOR

MEMORY = tempfile.TemporaryDirectory(dir="/dev/shm")
DIRECTORY = Path(MEMORY.name)


def one(data: bytes) -> None:
    parts = data.split(SEPARATOR)
    for i, name in enumerate((CONFIG, INDEX, *SHARDS)):
        if i < len(parts):
            (DIRECTORY / name).write_bytes(parts[i])
        else:
            (DIRECTORY / name).unlink(missing_ok=True)
    judge(DIRECTORY)


atheris.Setup(sys.argv, one)
atheris.Fuzz()
