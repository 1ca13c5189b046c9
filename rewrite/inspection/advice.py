"""Which profile serves all loaders and platforms that were asked for, with the least change."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

from rewrite.inspection.inspection import Inspection, LoaderRow
from rewrite.loaders.versions import Loader

#: By how much of a checkpoint each changes: scales only; activations of the fused layers, of all; weights; everything.
LEAST_CHANGE = ("exact", "rescaled", "dynamic", "portable", "partition", "bf16", "dequantized")


@dataclass(frozen=True)
class Advice:
    """``profile`` is exact in every loader that was asked for, but in those of ``unserved``, in which no profile is.
    None: no one profile is exact in all others, or none is needed."""

    needed: bool
    profile: str | None = None
    unserved: tuple[str, ...] = ()


def advise(inspection: Inspection, loaders: Iterable[Loader]) -> Advice:
    """For ``loaders``, on the platform of the inspection."""
    chosen = set(loaders)
    rows = [row for row in inspection.rows if row.loader in chosen]
    if all(row.as_is.kind == "exact" for row in rows):
        return Advice(needed=False)
    possible = [profile for profile in LEAST_CHANGE if profile not in inspection.refusals]
    served = [row for row in rows if any(_exact(row, profile) for profile in possible)]
    helped = (profile for profile in possible if served and all(_exact(row, profile) for row in served))
    return Advice(True, next(helped, None), tuple(_unserved(inspection, chosen, possible)))


def _unserved(inspection: Inspection, chosen: Collection[Loader], profiles: Collection[str]) -> Iterator[str]:
    """The loaders that no profile is exact in, neighboring version ranges as one."""

    def is_unserved(row: LoaderRow) -> bool:
        return row.loader in chosen and not any(_exact(row, profile) for profile in profiles)

    for (name, unserved), run in groupby(inspection.rows, lambda row: (row.loader.name, is_unserved(row))):
        first, *rest = (row.loader for row in run)
        if unserved:
            yield f"{name} {(rest[-1] if rest else first).versions_from(first)}"


def _exact(row: LoaderRow, profile: str) -> bool:
    outcome = row.converted.get(profile)
    return outcome is not None and outcome.kind == "exact"
