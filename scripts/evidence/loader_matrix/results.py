"""The recorded matrix: what a cell holds, how a driver's result becomes one, and when two cells differ.

tests/loader_matrix.json:

    schema       2
    date         when it was recorded
    cells        one for each engine, version, fixture, profile and number of tensor parallel ranks:
      outcome      loads    the engine loaded the checkpoint: how well, the errors say
                   raises   the engine's loader raised: `error` has type, message and place
                   not run  nothing was learnt: `reason` says why
      groups       for each served module that belongs to a fused layer, and each rank: `layer` in_proj_qkvz, qkv_proj
                   or gate_up_proj (also where an engine serves the parts as modules of their own); error of each
                   partition; input_scale equal, differs or absent (activations quantized dynamically, or not at all)
      others       worst error of every other kind of linear, routed experts too, and the same of its input_scale
      cast         modules served in FP8 that are not FP8 on disk
      not_compared kinds of stored linears whose format, or order in the engine, is not read: of their errors nothing is
                   known
      kv_cache     scales of the KV cache: none (on disk), equal, rounded (to BF16), differs or absent (on disk, but not
                   served: left out, or left at 1); null where nothing was loaded

tests/generation.json, schema 1, has a cell for each generation: outcome runs, raises or not run; the tokens and their
log-probabilities; how many leading tokens agree with the original's, and by how much their log-probabilities differ at
most.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import records
from engines.driver import Results, Unavailable

from loader_matrix.cases import GENERATION, ORIGINAL, RECORD

Error = dict[str, str]
KEY = ("engine", "version", "fixture", "profile", "ranks")


@dataclass(frozen=True)
class Cell:
    """One load; see the module's docstring."""

    engine: str
    version: str
    fixture: str
    profile: str
    ranks: int
    outcome: str
    groups: list[dict[str, Any]] = field(default_factory=list)
    others: dict[str, dict[str, Any]] = field(default_factory=dict)
    cast: list[str] = field(default_factory=list)
    not_compared: list[str] = field(default_factory=list)
    kv_cache: str | None = None
    error: Error | None = None
    reason: str | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in KEY)


@dataclass(frozen=True)
class Generation:
    """One greedy generation; see the module's docstring."""

    engine: str
    version: str
    fixture: str
    profile: str
    outcome: str
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    agrees: int | None = None
    largest_difference: float | None = None
    error: Error | None = None
    reason: str | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.engine, self.version, self.fixture, self.profile)


def rounded(value: float) -> float | str:
    """Four significant digits; JSON has no NaN and no infinity, so these become words."""
    return float(f"{value:.3e}") if math.isfinite(value) else str(value)


def worst(values: list[float]) -> float:
    """The largest; NaN if any is, which `max` would not promise."""
    return next((value for value in values if math.isnan(value)), max(values))


def worst_kv(words: set[str]) -> str:
    """What is said of several layers' or ranks' KV scales."""
    return next(word for word in ("differs", "absent", "rounded", "equal", "none") if word in words)


def cell(key: dict[str, Any], results: Results) -> Cell:
    """The cell that the ranks' results make."""
    if isinstance(results, Unavailable):
        return Cell(**key, outcome="not run", reason=str(results))
    for result in results:
        if "fault" in result:
            fault = result["fault"]
            return Cell(**key, outcome="not run", reason=f"{fault['type']}: {fault['message']} ({fault['where']})")
    for result in results:
        if "error" in result:
            return Cell(**key, outcome="raises", error=result["error"])
    layers = [layer for result in results for layer in result["layers"]]
    groups = [layer for layer in layers if layer["layer"]]
    if not groups:
        return Cell(**key, outcome="not run", reason="no fused layer was found in the loaded model")
    cast = sorted({layer["module"] for layer in layers if layer["cast"]})
    cast += sorted({stray for result in results for stray in result["strays"]})
    return Cell(
        **key,
        outcome="loads",
        groups=[_group(layer) for layer in groups],
        others=_others([layer for layer in layers if not layer["layer"]]),
        cast=cast,
        not_compared=sorted({kind for result in results for kind in result["not_compared"]}),
        kv_cache=worst_kv({result["kv_cache"] for result in results}),
    )


def _group(layer: dict[str, Any]) -> dict[str, Any]:
    return {
        "layer": layer["layer"],
        "module": layer["module"],
        "rank": layer["rank"],
        "errors": {part: rounded(error) for part, error in layer["errors"].items()},
        "input_scale": layer["input_scale"],
    }


def _kind(layer: dict[str, Any]) -> str:
    _, _, last = layer["module"].rpartition(".")
    return f"experts.{last}" if ".experts." in layer["module"] else last


def _others(layers: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    kinds = sorted({_kind(layer) for layer in layers})
    found = {}
    for kind in kinds:
        own = [layer for layer in layers if _kind(layer) == kind]
        scales = {layer["input_scale"] for layer in own}
        found[kind] = {
            "error": rounded(worst([error for layer in own for error in layer["errors"].values()])),
            "input_scale": scales.pop() if len(scales) == 1 else "differs" if "differs" in scales else "mixed",
        }
    return found


def _close(one: Any, other: Any) -> bool:
    """Equal; but norms may differ in their last digits between CPUs. Zero is only equal to zero."""
    if isinstance(one, float) and isinstance(other, float):
        return one == other or (one != 0.0 != other and math.isclose(one, other, rel_tol=0.01))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_close(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(_close(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def differs(now: Cell, recorded: Cell) -> str | None:
    """The fields in which `now` differs from the record, or None; an exception's message may differ."""
    mine, theirs = asdict(now), asdict(recorded)
    for each in (mine, theirs):
        each["error"] = each["error"] and {name: each["error"][name] for name in ("type", "where")}
    fields = [name for name in mine if name != "reason" and not _close(mine[name], theirs[name])]
    return f"differs from the record in {', '.join(fields)}" if fields else None


def _order(entry: Cell | Generation) -> tuple[Any, ...]:
    """Few ranks first; by fixture, engine, version as numbers; the original before what it is converted to."""
    ranks = entry.ranks if isinstance(entry, Cell) else 1
    version = records.numbers(entry.version)
    return ranks, entry.fixture, entry.engine, version, entry.profile != ORIGINAL, entry.profile


LOADS = records.Book(RECORD, 2, Cell, _order, differs)
GENERATIONS = records.Book(GENERATION, 1, Generation, _order)
