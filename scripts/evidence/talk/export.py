"""Writes a model with its weights as a loader serves them, so that any program can run it.

    PYTHONPATH=scripts:. .venv/bin/python -m talk.export tests/talk/talk-fp8 "vLLM 0.19.1" OUT

OUT is unquantized, in F32.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from talk import served


def export(source: Path, loader: str, out: Path) -> None:
    """The model, its config and its tokenizer."""
    served.model(source, loader).save_pretrained(out)
    for path in source.glob("tokenizer*"):
        shutil.copyfile(path, out / path.name)


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[2] not in served.LOADERS:
        sys.exit(f"usage: talk.export IN LOADER OUT; LOADER is one of {', '.join(served.LOADERS)}")
    export(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
