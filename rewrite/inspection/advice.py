"""Which profile serves the engines that were asked for with the least change: what `inspect` names, `convert` takes."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import Any

from rewrite.errors import Unsupported
from rewrite.inspection.inspection import LEAST_CHANGE, Inspection, inspect_and_plan
from rewrite.loaders.kernels import DEFAULT_PLATFORM
from rewrite.loaders.outcome import AS_IT_IS, SERVED, Outcome, Row, gap, merged
from rewrite.loaders.ranges import Engine
from rewrite.loaders.versions import Loader
from rewrite.planning.manifest import Chosen
from rewrite.planning.planner import Checked
from rewrite.quantization.groups import Selection
from rewrite.quantization.model import Model
from rewrite.wording import count


@dataclass(frozen=True)
class Alternative:
    """A range of versions of an engine that serves the checkpoint better as it is."""

    engine: str
    versions: str
    kind: str
    detail: str
    partitions: tuple[str, ...]

    @property
    def text(self) -> str:
        """What goes on "use ..."."""
        names = dict.fromkeys(name.rpartition(".")[2] for name in self.partitions)
        said = self.kind if self.kind == "exact" else f"{self.kind}: {', '.join(names)}, {self.detail}"
        return f"{self.engine} {self.versions.replace('+', ' or newer')} ({said})"


@dataclass(frozen=True)
class Advice:
    """``needed``: an engine that was asked for is known not to serve the checkpoint exactly. ``profile`` makes it exact
    in the most of them, and in all but ``unserved``, of which ``left`` says what they make of it then; None: none is
    needed, or none makes it any better. ``unknown``: engines of which it is not known what they make of the checkpoint.
    ``alternatives``: where not all versions of an engine were asked for, others of it that are better without a
    conversion."""

    needed: bool
    profile: str | None = None
    unserved: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    alternatives: tuple[Alternative, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """``loader`` is the old name of ``engine``."""
        found = asdict(self)
        found["alternatives"] = [{"loader": each["engine"], **each} for each in found["alternatives"]]
        return found


def advise(inspection: Inspection, engines: Iterable[Engine]) -> Advice:
    """For ``engines``, on the platform of the inspection."""
    chosen = set(engines)
    rows = [row for row in inspection.rows if row.engine in chosen]
    unknown = _named(inspection, chosen, lambda row: row.as_is.kind == "not known")
    if not any(gap(row.as_is, row.as_is) for row in rows):
        return Advice(needed=False, unknown=unknown)
    best = _least_change(inspection, rows)
    helps = best is not None and _gaps(rows, best) < _gaps(rows, AS_IT_IS)
    state = best if best is not None and helps else AS_IT_IS
    return Advice(
        True,
        best if helps else None,
        _named(inspection, chosen, lambda row: gap(row.as_is, row.outcomes[state]) > 0),
        tuple(_left(inspection, rows, state)) if helps else (),
        unknown,
        tuple(_alternatives(inspection, chosen)),
    )


@dataclass(frozen=True)
class Choice:
    """The profile that a conversion takes where nobody named one; ``notes`` say what it does not repair. ``checked``:
    what it changes, where it was planned."""

    profile: str
    chosen: Chosen
    notes: tuple[str, ...] = ()
    checked: Checked | None = None


def choose(
    model: Model, selection: Selection, engines: Collection[Loader], platform: str | None = DEFAULT_PLATFORM
) -> Choice:
    """For ``engines`` on ``platform``. Raises :class:`Unsupported` where they need a repair and no profile is one."""
    found, planned = inspect_and_plan(model, selection, engines, platform)
    advice = advise(found, engines)
    chosen = Chosen(_named(found, set(engines), lambda _: True), platform or "loading only")
    rows = [row for row in found.rows if row.engine in set(engines)]
    profile = _least_change(found, rows)
    idle = profile in planned and not planned[profile].changes.any
    unsure = advice.profile is None if advice.needed else bool(advice.unknown) and idle
    if profile is None or (unsure and LEAST_CHANGE[0] in found.refusals):
        return Choice(LEAST_CHANGE[0], chosen)  # refused, and so it will be by the planner, who says why
    if advice.needed and advice.profile is None:
        (name, versions, outcome), *_ = _outcomes(found, rows, AS_IT_IS)
        raise Unsupported(
            "No profile repairs this for the engines that serve it", where=found.path, expected="an engine that reads "
            "it right after a conversion", found=f"{name} {versions}: {_told(outcome)}",
            hint="; ".join([*(f"use {each.text}" for each in advice.alternatives), "name a --profile to convert it"]),
        )  # fmt: skip
    notes = (*advice.left, *_unknown(advice), *_faults(found, planned[profile]))
    return Choice(profile, chosen, notes, planned[profile])


def repair_command(inspection: Inspection, advice: Advice, *options: str) -> str | None:
    """What a person copies to repair the checkpoint, quoted for a shell; OUT is a place holder, and so is IN where its
    name cannot be shown. ``options`` are added: those that name the engines. None where no profile is advised."""
    if advice.profile is None:
        return None
    groups = ("--groups", "all") if inspection.selection == "all" else ()
    return _command("convert", inspection, "OUT", *groups, *options)


def next_command(inspection: Inspection, advice: Advice, *options: str) -> str | None:
    """Where nothing is to be repaired: what tells more, if anything does. ``options`` as of :func:`repair_command`."""
    if advice.needed or inspection.findings:
        return None
    if advice.unknown:  # an engine is started with a directory only
        return None if "://" in inspection.path else _command("try", inspection, "--engine", "PYTHON")
    unjudged = not inspection.groups and inspection.selection == "qkvz"
    return _command("inspect", inspection, "--groups", "all", *options) if unjudged else None


def _command(name: str, inspection: Inspection, *words: str) -> str:
    source = inspection.path if inspection.path.isprintable() else "IN"
    place = f"./{source}" if source.startswith("-") else source
    return shlex.join(["rewrite", name, place, *words])


def _least_change(inspection: Inspection, rows: Sequence[Row]) -> str | None:
    """Of the profiles that are exact in the most engines, and least bad in the others, the one that changes least."""
    planned = [name for name in LEAST_CHANGE if name in inspection.rows[0].outcomes]
    return min(planned, key=lambda name: _gaps(rows, name), default=None)


def _gaps(rows: Sequence[Row], state: str) -> tuple[int, list[int]]:
    """How far the engines are from serving this state exactly: how many do not, and how badly, the worst first."""
    gaps = [gap(row.as_is, row.outcomes[state]) for row in rows]
    return sum(each > 0 for each in gaps), sorted(gaps, reverse=True)


def _left(inspection: Inspection, rows: Sequence[Row], profile: str) -> Iterator[str]:
    """What the conversion does not repair, or makes worse: engines of which the same is true in one sentence."""
    engines: dict[str, list[str]] = {}
    for name, versions, outcome in _outcomes(inspection, rows, profile):
        of_these = [row for row in rows if row.engine.name == name and row.outcomes[profile] == outcome]
        if any(gap(row.as_is, outcome) for row in of_these):
            others = (p for p in inspection.rows[0].converted if p != profile)
            exact = [p for p in others if not any(gap(row.as_is, row.outcomes[p]) for row in of_these)]
            way = f"--profile {' or '.join(exact)} is exact there" if exact else "no profile is exact there"
            engines.setdefault(f"{_told(outcome)}; {way}", []).append(f"{name} {versions}")
    yield from (f"after the conversion {', '.join(names)}: {said}" for said, names in engines.items())


def _outcomes(inspection: Inspection, rows: Sequence[Row], state: str) -> list[tuple[str, str, Outcome]]:
    """Name, versions and outcome of ``rows``, neighboring version ranges of the same outcome as one."""
    found = merged(inspection.rows, lambda row: row.outcomes[state] if row in rows else None)
    return [(name, versions, outcome) for name, versions, outcome in found if outcome is not None]


def who_make(engines: Sequence[str]) -> str:
    """What goes on "what ... of it"."""
    return f"{', '.join(engines)} {'make' if len(engines) > 1 else 'makes'}"


def _unknown(advice: Advice) -> Iterator[str]:
    if advice.unknown:
        yield f"not known: what {who_make(advice.unknown)} of IN, and of OUT"


def _faults(inspection: Inspection, checked: Checked) -> Iterator[str]:
    """Those that OUT has, too."""
    mended, dropped = checked.changes.mended, frozenset(checked.dropped)
    stay = [fault for fault in inspection.findings if fault.code not in mended and fault.tensor not in dropped]
    if stay:
        faults = count(len(stay), "fault")
        first = f"{stay[0].what} ({stay[0].where})"
        yield f"{faults} in the checkpoint itself, which no profile repairs; the first: {first}"


def _told(outcome: Outcome) -> str:
    names = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in outcome.partitions))
    return f"{outcome.kind}{f': {names}' if names else ''}{f' ({outcome.detail})' if outcome.detail else ''}"


def _alternatives(inspection: Inspection, chosen: Collection[Engine]) -> Iterator[Alternative]:
    """Of each engine the newest versions that are no worse than any other of it, where one that was asked for is. What
    does not load at all, or is not known, is no alternative."""
    for name in dict.fromkeys(row.engine.name for row in inspection.rows if row.engine in chosen):
        rows = [row for row in inspection.rows if row.engine.name == name]
        others = [row for row in rows if row.engine not in chosen and row.as_is.kind in SERVED]
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


def _named(inspection: Inspection, chosen: Collection[Engine], is_meant: Callable[[Row], bool]) -> tuple[str, ...]:
    """Those of the chosen engines that are meant, neighboring version ranges as one."""
    found = merged(inspection.rows, lambda row: row.engine in chosen and is_meant(row))
    return tuple(f"{name} {versions}" for name, versions, meant in found if meant)
