"""A model that talks through real vLLM, end to end on CPU, before and after a conversion: a Markdown table.

    scripts/evidence.sh talk [--record | --readme | --first]

`--record` writes tests/talk/record.json. `--readme` prints the whole table from it, `--first` that of the root README.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace

import records
from engines.driver import Results, Unavailable
from engines.known import Engine, find_engine

from loader_matrix import cases
from loader_matrix.cases import ORIGINAL
from loader_matrix.matrix import Load, run_driver

#: The extension modules of vLLM 0.19.1 are for torch 2.10: it runs with those of 0.32.0.
ENGINES = (replace(find_engine("vllm==0.19.1"), compiled="0.32.0", variant="-talk"), find_engine("vllm==0.32.0"))
PROFILES = {
    "talk-fp8": (ORIGINAL, "exact", "exact-all", "dynamic", "portable", "dequantized"),
    "talk-nvfp4": (ORIGINAL, "exact", "rescaled"),
}
#: What vLLM 0.19.1 makes of it is in memory that nothing has filled, and so another thing each time.
LEFT_OUT = ("0.19.1", "talk-nvfp4")
SHOWN = 32  # bytes of the text, in a table


@dataclass(frozen=True)
class Cell:
    """What an engine made of a checkpoint. ``outcome``: runs, raises or not run; ``error`` says more of these. ``nats``
    a byte of the held-back text; ``text`` that follows the prompt."""

    engine: str
    version: str
    fixture: str
    profile: str
    outcome: str
    nats: float | None = None
    text: str | None = None
    error: str | None = None

    @property
    def key(self) -> tuple[str, str, str, str]:
        return (self.engine, self.version, self.fixture, self.profile)


def _order(each: Cell) -> tuple[int, int, int]:
    versions = [engine.version for engine in ENGINES]
    places = list(PROFILES).index(each.fixture), PROFILES[each.fixture].index(each.profile)
    return places[0], versions.index(each.version), places[1]


BOOK = records.Book(cases.TALKING / "record.json", 1, Cell, _order)


def cell(load: Load, found: Results) -> Cell:
    """A driver's result."""
    engine, fixture, profile, _ = load
    key = (engine.name, engine.version, fixture, profile)
    if isinstance(found, Unavailable):
        return Cell(*key, "not run", error=str(found))
    (result,) = found
    if "fault" in result:
        return Cell(*key, "not run", error=str(result["fault"]))
    if "error" in result:
        return Cell(*key, "raises", error=f"{result['error']['type']}: {result['error']['message']}")
    return Cell(*key, "runs", result["nats"], result["text"])


def loads(engine: Engine) -> list[Load]:
    """All of an engine."""
    every = [(engine, fixture, profile, 1) for fixture, profiles in PROFILES.items() for profile in profiles]
    return [load for load in every if (engine.version, load[1]) != LEFT_OUT]


def run() -> list[Cell]:
    """Everything, one engine after the other."""
    found = [cell(*each) for engine in ENGINES for each in run_driver("talk_vllm", loads(engine)).items()]
    return sorted(found, key=_order)


def perplexity(nats: float | None) -> str:
    """Of a byte."""
    return "-" if nats is None else f"{math.exp(nats):.3f}"


def readme(found: list[Cell]) -> str:
    """A line for each cell."""
    head = ("checkpoint", "engine", "profile", "nats a byte", "perplexity", "goes on")
    lines: list[tuple[str, ...]] = []
    for each in found:
        nats = "-" if each.nats is None else f"{each.nats:.4f}"
        engine = f"{each.engine} {each.version}"
        lines.append((each.fixture, engine, each.profile, nats, perplexity(each.nats), _said(each, 80)))
    return records.markdown(head, lines)


def _said(each: Cell, length: int) -> str:
    return each.outcome if each.text is None else f"`{each.text[:length].strip()}`"


def first(found: list[Cell]) -> str:
    """The FP8 checkpoint as published and converted, for the root README."""
    by_key = {(each.version, each.profile): each for each in found if each.fixture == "talk-fp8"}
    lines: list[tuple[str, ...]] = []
    for engine in ENGINES:
        for name, profile in (("original", ORIGINAL), ("converted", "dynamic")):
            each = by_key[engine.version, profile]
            lines.append((f"{each.engine} {each.version}", name, perplexity(each.nats), _said(each, SHOWN)))
    return records.markdown(("engine", "checkpoint", "perplexity", "goes on"), lines)


def main(words: list[str]) -> None:
    """Run and print, or print what is recorded."""
    recorded = words in (["--readme"], ["--first"])
    found = BOOK.read().cells if recorded else run()
    if words == ["--record"]:
        BOOK.add(found, anew=True)
    print(first(found) if words == ["--first"] else readme(found))


if __name__ == "__main__":
    main(sys.argv[1:])
