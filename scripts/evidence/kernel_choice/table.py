"""The record as the table of rewrite/loaders/README.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

import records

from kernel_choice.record import Cell

#: What `original` of llm-compressor's FP8 preset, `exact` and `dynamic` or `portable` have.
SHOWN = ("tensor-static", "channel-static", "channel-token")
_HEAD = ("engine", "platform", *SHOWN)


def readme(cells: Sequence[Cell]) -> str:
    """For 32 tokens; neighboring versions and platforms of which the same is true as one."""
    lines = []
    engines = ((name, list(run)) for name, run in groupby(cells, lambda cell: cell.engine))
    for name, own in engines:
        rows: dict[tuple[tuple[str, ...], ...], list[str]] = {}
        for version, run in groupby(own, lambda cell: cell.version):
            rows.setdefault(_by_platform(list(run)), []).append(version)
        for said, versions in rows.items():
            ends = versions[0] if len(versions) == 1 else f"{versions[0]} to {versions[-1]}"
            lines += [(f"{name} {ends}", *cells_of) for cells_of in said]
    return records.markdown(_HEAD, lines)


def _by_platform(cells: Iterable[Cell]) -> tuple[tuple[str, ...], ...]:
    """A line for each set of platforms: what computes with each scheme there."""
    found: dict[str, dict[str, str]] = {}
    for cell in cells:
        if cell.tokens > 1 and cell.scheme in SHOWN:
            found.setdefault(cell.platform, {})[cell.scheme] = _said(cell)
    lines: dict[tuple[str, ...], list[str]] = {}
    for platform, by_scheme in found.items():
        lines.setdefault(tuple(by_scheme[scheme] for scheme in SHOWN), []).append(platform)
    return tuple((", ".join(platforms), *said) for said, platforms in lines.items())


def _said(cell: Cell) -> str:
    return ", ".join(cell.operators) or cell.kernel or "" if cell.outcome == "runs" else f"**{cell.outcome}**"
