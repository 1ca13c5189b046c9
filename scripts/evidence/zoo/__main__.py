"""Make entries of the zoo again: ``scripts/evidence.sh zoo llmcompressor [NAME...]``, with PYTHON an environment of it.

The recipe of an entry is what its own ``entry.json`` says. The base models and the whole exports stay in --work; the
entries go to tests/zoo/entries. README.md says how to add one.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from producers.models import base_model
from producers.produce import produce

from tests.zoo.rebuild import ENTRIES, names, read_entry
from zoo.strip import strip

#: The package of each producer's module, whose version is kept with the entry.
PRODUCERS = {
    "llmcompressor": "llmcompressor",
    "modelopt": "nvidia-modelopt",
    "quark": "amd-quark",
    "autoround": "auto-round",
    "torchao": "torchao",
}
_BESIDE = ("transformers", "compressed-tensors", "safetensors", "torch")
_KEPT = ("model", "call", "recipe", "note")
Recipe = dict[str, Any]


def main() -> int:
    """Make the entries that the command line names, or all of one producer; go on when one fails."""
    parser = argparse.ArgumentParser(prog="scripts/evidence.sh zoo", description=__doc__)
    parser.add_argument("producer", choices=PRODUCERS)
    parser.add_argument("name", nargs="*", help="entries (default: all of the producer)")
    parser.add_argument(
        "--work", type=Path, default=ENTRIES.parents[2] / ".cache" / "zoo", help="base models and whole exports"
    )
    parser.add_argument("--missing", action="store_true", help="only what is not there yet")
    parser.add_argument("--restrip", action="store_true", help="strip the exports that are there again")
    arguments = parser.parse_args()
    recipes = recipes_of(arguments.producer)
    if unknown := set(arguments.name) - recipes.keys():
        parser.error(f"no such entry: {', '.join(sorted(unknown))}")
    failed = []
    for name in arguments.name or recipes:
        full = arguments.work / name
        done = (full / "config.json").exists()
        if arguments.missing and done and not arguments.restrip:
            continue
        try:
            if not (arguments.restrip and done):
                _produce(arguments.producer, recipes[name], full, arguments.work)
            out = strip(full, _about(recipes[name], arguments.producer))
            size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
            print(f"OK   {name} {size} bytes", flush=True)
        except Exception as error:  # a producer's own: say so and go on
            failed.append(name)
            traceback.print_exc(limit=-6)
            print(f"FAIL {name} {type(error).__name__}: {str(error)[:400]}", flush=True)
            shutil.rmtree(full, ignore_errors=True)
    print(f"{len(failed)} failed: {', '.join(failed)}")
    return 1 if failed else 0


def recipes_of(producer: str) -> dict[str, Recipe]:
    """By name: the base model, the function of the producer's module that is called, its recipe, and a note."""
    entries = {name: read_entry(name) for name in names()}
    own = {name: entry for name, entry in entries.items() if entry["producer"].split()[0] == PRODUCERS[producer]}
    return {name: {key: entry[key] for key in _KEPT} for name, entry in own.items()}


def _produce(producer: str, recipe: Recipe, full: Path, work: Path) -> None:
    base = base_model(recipe["model"], work / "base")
    produce(producer, recipe["call"], recipe["model"], base, full, recipe["recipe"])


def _about(recipe: Recipe, producer: str) -> dict[str, object]:
    versions = {}
    for package in (PRODUCERS[producer], *_BESIDE):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    made_by = f"{PRODUCERS[producer]} {versions.pop(PRODUCERS[producer])}"
    return {"producer": made_by, "with": versions, **recipe}


if __name__ == "__main__":
    sys.exit(main())
