"""Which profile serves all loaders and platforms that were asked for, with the least change."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile

from rewrite.inspection.inspection import LEAST_CHANGE, Inspection
from rewrite.loaders.outcome import Row
from rewrite.loaders.ranges import Engine

_SERVED = ("exact", "loses precision")


@dataclass(frozen=True)
class Alternative:
    """A range of versions of an engine that serves the checkpoint better as it is."""

    loader: str
    versions: str
    kind: str
    detail: str
    partitions: tuple[str, ...]

    @property
    def text(self) -> str:
        """One sentence."""
        names = dict.fromkeys(name.rpartition(".")[2] for name in self.partitions)
        said = self.kind if self.kind == "exact" else f"{self.kind}: {', '.join(names)}, {self.detail}"
        return f"Without a conversion: {self.loader} {self.versions} ({said})."


@dataclass(frozen=True)
class Advice:
    """``profile`` is exact in every loader that was asked for, but in those of ``unserved``, in which no profile is.
    None: no one profile is exact in all others, or none is needed. ``alternatives``: where not all versions of an
    engine were asked for, others of it that are better without a conversion."""

    needed: bool
    profile: str | None = None
    unserved: tuple[str, ...] = ()
    alternatives: tuple[Alternative, ...] = ()


def advise(inspection: Inspection, loaders: Iterable[Engine]) -> Advice:
    """For ``loaders``, on the platform of the inspection."""
    chosen = set(loaders)
    rows = [row for row in inspection.rows if row.engine in chosen]
    if all(row.as_is.kind == "exact" for row in rows):
        return Advice(needed=False)
    possible = [profile for profile in LEAST_CHANGE if profile not in inspection.refusals]
    served = [row for row in rows if any(_exact(row, profile) for profile in possible)]
    hurt = any(row.as_is.kind != "exact" for row in served)  # else a conversion repairs nothing
    helped = (profile for profile in possible if hurt and all(_exact(row, profile) for row in served))
    return Advice(
        True,
        next(helped, None),
        tuple(_unserved(inspection, chosen, possible)),
        tuple(_alternatives(inspection, chosen)),
    )


def repair_command(inspection: Inspection, advice: Advice, *options: str) -> str | None:
    """What a person copies to repair the checkpoint, quoted for a shell; OUT is a place holder, and so is IN where its
    name cannot be shown. ``options`` are added. None where no profile is advised: none is named that refuses."""
    if advice.profile is None:
        return None
    source = inspection.path if inspection.path.isprintable() else "IN"
    groups = ("--groups", "all") if inspection.selection == "all" else ()
    place = f"./{source}" if source.startswith("-") else source
    return shlex.join(["rewrite", "convert", place, "OUT", "--profile", advice.profile, *groups, *options])


def _alternatives(inspection: Inspection, chosen: Collection[Engine]) -> Iterator[Alternative]:
    """Of each engine the newest versions that are no worse than any other of it, where one that was asked for is. What
    does not load at all, or is not known, is no alternative."""
    for name in dict.fromkeys(row.engine.name for row in inspection.rows if row.engine in chosen):
        rows = [row for row in inspection.rows if row.engine.name == name]
        others = [row for row in rows if row.engine not in chosen and row.as_is.kind in _SERVED]
        worst = max(row.as_is.severity for row in rows if row.engine in chosen)
        least = min((row.as_is.severity for row in others), default=worst)
        if least < worst:
            *_, newest = (row for row in others if row.as_is.severity == least)
            run = _run_up_to(newest, rows, chosen)
            outcome, versions = newest.as_is, newest.engine.versions_from(run[0].engine)
            yield Alternative(name, versions, outcome.kind, outcome.detail, outcome.partitions)


def _run_up_to(newest: Row, rows: Sequence[Row], chosen: Collection[Engine]) -> list[Row]:
    """The neighboring version ranges that end with this one and of which the same is true."""
    before = reversed(rows[: rows.index(newest) + 1])
    run = takewhile(lambda row: row.as_is == newest.as_is and row.engine not in chosen, before)
    return list(run)[::-1]


def _unserved(inspection: Inspection, chosen: Collection[Engine], profiles: Collection[str]) -> Iterator[str]:
    """The loaders that no profile is exact in, neighboring version ranges as one."""

    def is_unserved(row: Row) -> bool:
        return row.engine in chosen and not any(_exact(row, profile) for profile in profiles)

    for (name, unserved), run in groupby(inspection.rows, lambda row: (row.engine.name, is_unserved(row))):
        first, *rest = (row.engine for row in run)
        if unserved:
            yield f"{name} {(rest[-1] if rest else first).versions_from(first)}"


def _exact(row: Row, profile: str) -> bool:
    outcome = row.outcomes.get(profile)
    return outcome is not None and outcome.kind == "exact"
