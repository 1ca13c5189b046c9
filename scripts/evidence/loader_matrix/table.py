"""The matrix as text: aligned for a terminal, Markdown for rewrite/loaders/README.md."""

from __future__ import annotations

from collections.abc import Sequence

import records
from benchmark import table as text
from engines.known import ENGINES

from loader_matrix.cases import NVFP4_FIXTURES, ORIGINAL, PROFILES
from loader_matrix.results import Cell, Generation

# The fused layers, and the order in which their partitions are shown.
PARTITIONS = {
    "in_proj_qkvz": ("q", "k", "v", "z", "qkvz"),
    "qkv_proj": ("q", "k", "v"),
    "fused_qkv_a_proj": ("q_a", "kv_a"),
    "gate_up_proj": ("gate", "up"),
}
LOADS = ("loader", "fixture", "profile", "outcome", *PARTITIONS, "KV cache", "detail")
GENERATES = ("loader", "fixture", "profile", "outcome", "detail")
# The columns of the first table of rewrite/loaders/README.md.
SHOWN = (ORIGINAL, "exact", "exact-all", "portable", "bf16", "partition")
# Of its table of families: what leaves no fused layer to be requantized, the preferred first.
MENDS = ("exact-all", "portable", "bf16-all")


def figure(error: float | str) -> str:
    """`0` only for an error of exactly zero."""
    if isinstance(error, str):
        return error
    if error == 0:
        return "0"
    return f"{error:.1e}".replace("e-0", "e-") if error < 1 else f"{error:.1f}" if error < 100 else f"{error:.0f}"


def _worst(values: list[float | str]) -> float | str:
    words = [value for value in values if isinstance(value, str)]  # nan, inf
    return words[0] if words else max(value for value in values if not isinstance(value, str))


def _partition(cell: Cell, layer: str, part: str) -> str:
    """The worst error of a partition over layers and ranks."""
    errors = [group["errors"][part] for group in cell.groups if group["layer"] == layer and part in group["errors"]]
    return figure(_worst(errors)) if errors else ""


def _layer(cell: Cell, layer: str) -> str:
    """The worst errors of a fused layer's partitions; one 0 stands for all of them."""
    errors = {part: _partition(cell, layer, part) for part in PARTITIONS[layer]}
    found = {part: error for part, error in errors.items() if error}
    if not found:
        return "-"
    return "0" if set(found.values()) == {"0"} else ", ".join(f"{part} {error}" for part, error in found.items())


def _said(error: dict[str, str], length: int) -> str:
    message = error["message"] if len(error["message"]) <= length else error["message"][: length - 1] + "…"
    return f"{error['type']}: {message} ({error['where']})"


def _detail(cell: Cell, length: int) -> str:
    if cell.error:
        return _said(cell.error, length)
    if cell.reason:
        return cell.reason
    found = []
    if cell.cast:
        found.append(f"served in FP8, not so on disk: {', '.join(cell.cast[:2])}")
    if any(group["input_scale"] == "differs" for group in cell.groups):
        found.append("input_scale differs")
    if cell.groups and not any(group["module"].endswith(group["layer"]) for group in cell.groups):
        found.append("not fused")
    if cell.not_compared:
        found.append(f"not compared: {', '.join(cell.not_compared)}")
    return "; ".join(found)


def _loader(entry: Cell | Generation) -> str:
    ranks = f", {entry.ranks} ranks" if isinstance(entry, Cell) and entry.ranks > 1 else ""
    return f"{entry.engine} {entry.version}{ranks}"


def loads(cells: list[Cell], length: int = 90) -> list[tuple[str, ...]]:
    """A row for each load; exceptions' messages cut to `length`."""
    return [
        (
            _loader(cell),
            cell.fixture,
            cell.profile,
            cell.outcome,
            *(_layer(cell, layer) for layer in PARTITIONS),
            cell.kv_cache or "",
            _detail(cell, length),
        )
        for cell in cells
    ]


def generates(generation: list[Generation], length: int = 90) -> list[tuple[str, ...]]:
    """A row for each generation."""
    rows: list[tuple[str, ...]] = []
    for each in generation:
        detail = each.reason or (_said(each.error, length) if each.error else "")
        if each.agrees is not None:
            detail = f"first {each.agrees} of {len(each.tokens)} tokens as the original's"
        if each.largest_difference is not None:
            detail += f", log-probabilities within {each.largest_difference:.1g}"
        rows.append((_loader(each), each.fixture, each.profile, each.outcome, detail))
    return rows


def aligned(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Columns padded to the widest entry; the last is not."""
    return "\n".join(text.table((header, *rows)))


def readme(cells: list[Cell], fixture: str) -> str:
    """The README's table: a row for each engine, a column for each profile, the errors of q, k, v, z in each cell."""
    chosen = {(_loader(c), c.profile): c for c in _shown(cells) if c.fixture == fixture}
    engines = sorted({engine for engine, _ in chosen}, key=_by_version)
    rows = [(engine, *(_brief(chosen.get((engine, profile))) for profile in SHOWN)) for engine in engines]
    return records.markdown(("engine", *SHOWN), rows)


def _shown(cells: list[Cell]) -> list[Cell]:
    """Of one rank, and of engines that are not there for a boundary only."""
    boundary = {(each.name, each.version) for each in ENGINES if each.boundary}
    return [cell for cell in cells if cell.ranks == 1 and (cell.engine, cell.version) not in boundary]


def _brief(cell: Cell | None) -> str:
    if cell is None or cell.outcome == "not run":
        return "not run"
    if cell.outcome == "raises":
        return "raises"
    errors = [_partition(cell, "in_proj_qkvz", part) for part in "qkvz"]
    brief = "0" if set(errors) == {"0"} else ", ".join(errors)
    return f"{brief}; {cell.cast[0].rpartition('.')[2]} cast to FP8" if cell.cast else brief


def readme_families(cells: list[Cell], but: str) -> str:
    """The README's second table: a row for each fixture `but` one, a column for each engine.

    An entry is the worst error over all fused layers, of the original and after a conversion: `exact-all`, or the first
    other profile of `MENDS` that loads where it does not.
    """
    shown = [cell for cell in _shown(cells) if cell.fixture not in (but, *NVFP4_FIXTURES)]
    chosen = {(_loader(c), c.fixture, c.profile): c for c in shown}
    engines = sorted({engine for engine, _, _ in chosen}, key=_by_version)
    rows = []
    for fixture in sorted({fixture for _, fixture, _ in chosen}):
        entries = []
        for engine in engines:
            if (engine, fixture, ORIGINAL) not in chosen:
                entries.append("-")
                continue
            after = {p: cell for p in MENDS if (cell := chosen.get((engine, fixture, p))) and cell.outcome == "loads"}
            original = _all(chosen[engine, fixture, ORIGINAL])
            best = next(iter(after), None)
            profile = f" ({best.removesuffix('-all')})" if best and best != MENDS[0] else ""
            mended = f"{_all(after[best])}{profile}" if best else "raises"
            entries.append(f"{original} → {mended}" if original != "raises" or best else "raises")
        rows.append((fixture, *entries))
    return records.markdown(("fixture", *engines), rows)


def readme_nvfp4(cells: list[Cell], fixtures: Sequence[str]) -> str:
    """The README's third table: a row for each load of these fixtures, the worst errors of each fused layer."""
    order = {profile: i for i, profile in enumerate(PROFILES)}
    chosen = [c for c in _shown(cells) if c.fixture in fixtures and c.outcome != "not run"]
    chosen.sort(key=lambda c: (fixtures.index(c.fixture), order[c.profile], _by_version(_loader(c))))
    rows = []
    for cell in chosen:
        layers = [_layer(cell, layer) for layer in PARTITIONS]
        if cell.outcome == "raises":
            layers = ["raises"] * len(PARTITIONS)
        experts = cell.others.get("experts.w13") or cell.others.get("experts.gate_up_proj")
        rows.append((cell.fixture, cell.profile, _loader(cell), *layers, figure(experts["error"]) if experts else "-"))
    return records.markdown(("fixture", "profile", "engine", *PARTITIONS, "experts"), rows)


def _all(cell: Cell) -> str:
    """The worst error over all fused layers, and a layer that is served in FP8 but is not on disk."""
    if cell.outcome != "loads":
        return cell.outcome
    found = [figure(_worst([error for group in cell.groups for error in group["errors"].values()]))]
    found += [f"{name} cast" for name in sorted({module.rpartition(".")[2] for module in cell.cast})[:1]]
    return ", ".join(found)


def _by_version(engine: str) -> tuple[str, list[int]]:
    name, version = engine.split(" ")
    return name, records.numbers(version)
