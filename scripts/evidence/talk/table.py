"""The table of tests/talk/README.md.

PYTHONPATH=scripts:. .venv/bin/python -m talk.table
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import rewrite
from talk import say, served

FOLDER = say.HELD_BACK.parent
OLD, NEW, MEANT = served.LOADERS
#: Checkpoint, profile, loader.
ROWS = (
    ("talk-fp8", None, MEANT),
    ("talk-fp8", None, OLD),
    ("talk-fp8", None, NEW),
    ("talk-fp8", "exact", OLD),
    ("talk-fp8", "exact", NEW),
    ("talk-nvfp4", None, MEANT),
    ("talk-nvfp4", None, NEW),
    ("talk-nvfp4", "exact", NEW),
    ("talk-nvfp4", "rescaled", NEW),
)


def row(checkpoint: str, profile: str | None, loader: str, length: int = 48) -> str:
    """A line of the table."""
    with tempfile.TemporaryDirectory() as folder:
        path = FOLDER / checkpoint
        if profile is not None:
            rewrite.convert(path, Path(folder) / "out", profile=profile)
            path = Path(folder) / "out"
        said = say.ask(served.model(path, loader), length=length)
    name = f"{checkpoint}, {profile}" if profile else checkpoint
    return f"| {name} | {loader} | {said.nats:.4f} | {said.perplexity:.3f} | `{said.text.strip()}` |"


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    for each in ROWS:
        print(row(*each), flush=True)
