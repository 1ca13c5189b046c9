"""Make entries of the zoo: ``python -m zoo llmcompressor [NAME...]``, in an environment with that producer.

The base models and the whole exports stay in --work; the entries go to tests/zoo/entries. README.md has the commands.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import shutil
import sys
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from zoo.entry import Entry
from zoo.strip import strip

#: The package of each producer's module, whose version is kept with the entry.
PRODUCERS = {
    "llmcompressor": "llmcompressor",
    "modelopt": "nvidia-modelopt",
    "quark": "amd-quark",
    "autoround": "auto-round",
    "torchao": "torchao",
}
REPOSITORY = Path(__file__).resolve().parents[2]
_BESIDE = ("transformers", "compressed-tensors", "safetensors", "torch")


def main() -> int:
    """Make the entries that the command line names, or all of one producer; go on when one fails."""
    parser = argparse.ArgumentParser(prog="python -m zoo", description=__doc__)
    parser.add_argument("producer", choices=PRODUCERS)
    parser.add_argument("name", nargs="*", help="entries (default: all of the producer)")
    parser.add_argument(
        "--work", type=Path, default=REPOSITORY / ".cache" / "zoo", help="base models and whole exports"
    )
    parser.add_argument("--missing", action="store_true", help="only what is not there yet")
    parser.add_argument("--restrip", action="store_true", help="strip the exports that are there again")
    arguments = parser.parse_args()
    table: tuple[Entry, ...] = importlib.import_module(f"zoo.by_{arguments.producer}").TABLE
    unknown = set(arguments.name) - {entry.name for entry in table}
    if unknown:
        parser.error(f"no such entry: {', '.join(sorted(unknown))}")
    failed = []
    for entry in table:
        if arguments.name and entry.name not in arguments.name:
            continue
        full = arguments.work / entry.name
        done = (full / "config.json").exists()
        if arguments.missing and done and not arguments.restrip:
            continue
        try:
            if not (arguments.restrip and done):
                _produce(entry, full, arguments.work)
            out = strip(full, _about(entry, arguments.producer))
            size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
            print(f"OK   {entry.name} {size} bytes", flush=True)
        except Exception as error:  # a producer's own: say so and go on
            failed.append(entry.name)
            traceback.print_exc(limit=-6)
            print(f"FAIL {entry.name} {type(error).__name__}: {str(error)[:400]}", flush=True)
            shutil.rmtree(full, ignore_errors=True)
    print(f"{len(failed)} failed: {', '.join(failed)}")
    return 1 if failed else 0


def _produce(entry: Entry, full: Path, work: Path) -> None:
    import torch
    from fixtures.constants import SEED

    from zoo.models import base_model

    base = base_model(entry.model, work / "base")
    shutil.rmtree(full, ignore_errors=True)
    random.seed(SEED)
    torch.manual_seed(SEED)
    entry.produce(entry.model, base, full, entry.recipe)


def _about(entry: Entry, producer: str) -> dict[str, object]:
    versions = {}
    for package in (PRODUCERS[producer], *_BESIDE):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    about = {
        "producer": f"{PRODUCERS[producer]} {versions.pop(PRODUCERS[producer])}",
        "with": versions,
        "model": entry.model,
        "call": getattr(entry.produce, "__name__", ""),
        "recipe": entry.recipe,
        "note": entry.note,
    }
    value: dict[str, object] = json.loads(json.dumps(about))
    return value


if __name__ == "__main__":
    sys.exit(main())
