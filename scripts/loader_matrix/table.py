"""The matrix as text: aligned for a terminal, Markdown for the README."""

from __future__ import annotations

import re
from typing import Any

from loader_matrix.cases import PROFILES
from loader_matrix.results import Cell, Generation

LOADS = ("loader", "fixture", "profile", "outcome", "q", "k", "v", "z", "other fused layers", "detail")
GENERATES = ("loader", "fixture", "profile", "outcome", "detail")
# Layers that every engine here fuses; `exact` does not touch them.
FUSED = ("gate_up_proj", "qkv_proj")


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


def _partition(cell: Cell, part: str) -> str:
    """The worst error of a partition over layers and ranks."""
    errors = [group["errors"][part] for group in cell.groups if part in group["errors"]]
    return figure(_worst(errors)) if errors else ""


def _others(cell: Cell) -> str:
    return ", ".join(f"{kind} {figure(cell.others[kind]['error'])}" for kind in FUSED if kind in cell.others)


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
    if not any(group["module"].endswith("in_proj_qkvz") for group in cell.groups) and cell.groups:
        found.append("not fused")
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
            *(_partition(cell, part) for part in "qkvz"),
            _others(cell),
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
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = ["  ".join(entry.ljust(width) for entry, width in zip(row, widths, strict=True)) for row in (header, *rows)]
    return "\n".join(line.rstrip() for line in lines)


def _escaped(entry: Any) -> str:
    return str(entry).replace("|", "\\|").replace("<", "&lt;")


def markdown(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join(f"| {' | '.join(_escaped(entry) for entry in row)} |" for row in lines)


def readme(cells: list[Cell], fixture: str) -> str:
    """The README's table: a row for each engine, a column for each profile, the errors of q, k, v, z in each cell."""
    profiles = [profile for profile in PROFILES if any(cell.profile == profile for cell in cells)]
    chosen = {(_loader(c), c.profile): c for c in cells if c.fixture == fixture and c.ranks == 1}
    engines = sorted({engine for engine, _ in chosen}, key=_by_version)
    rows = [(engine, *(_brief(chosen.get((engine, profile))) for profile in profiles)) for engine in engines]
    return markdown(("engine", *profiles), rows)


def _brief(cell: Cell | None) -> str:
    if cell is None or cell.outcome == "not run":
        return "not run"
    if cell.outcome == "raises":
        return "raises"
    errors = [_partition(cell, part) for part in "qkvz"]
    brief = "0" if set(errors) == {"0"} else ", ".join(errors)
    return f"{brief}; {cell.cast[0].rpartition('.')[2]} cast to FP8" if cell.cast else brief


def _by_version(engine: str) -> tuple[str, list[int]]:
    name, version = engine.split(" ")
    return name, [int(number) for number in re.findall(r"[0-9]+", version)]
