"""Inspection → :class:`~rewrite.report.data.Report`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rewrite.inspection.advice import Advice
from rewrite.inspection.inspection import LEAST_CHANGE, Inspection, LoaderRow
from rewrite.loaders.kernels import by_cards
from rewrite.loaders.versions import merged
from rewrite.report import engines, predicted, scales
from rewrite.report.checkpoints import Place, Side, facts_of
from rewrite.report.data import Report, Section, Table, clean, limited
from rewrite.report.run import Run
from rewrite.wording import count

_JSON = "`rewrite inspect CHECKPOINT --json`"


def report(found: Inspection, affected: Sequence[LoaderRow], advice: Advice, place: Place, run: Run) -> Report:
    """``affected`` and ``advice`` are about the loaders that were asked for."""
    word, state, sentence = _verdict(found, affected)
    every = " with `--groups all`" if found.selection == "all" else ""
    sections = [
        Section("What helps", tuple(_advice(found, advice))) if affected else None,
        _findings(found),
        scales.section(found.groups, "the checkpoint", f"{_JSON}{every} lists every group"),
        predicted.section(found) if found.groups else None,
        _loaders(found, affected, advice),
    ]
    return Report(
        title=f"Inspection of {clean(place.name)}",
        word=word,
        state=state,
        sentence=sentence,
        facts=_facts(found, place),
        verdicts=(),
        not_checked=(),
        sections=tuple(section for section in sections if section is not None),
        command=run.command,
        versions=run.versions,
        remarks=run.remarks,
    )


def _verdict(found: Inspection, affected: Sequence[LoaderRow]) -> tuple[str, str, str]:
    faults = f" {count(len(found.findings), 'fault')} of the checkpoint itself." if found.findings else ""
    unknown = sum(row.as_is.kind == "not known" for row in affected)
    wrong = len(affected) - unknown
    more = f" What {count(unknown, 'range')} of versions of loaders make of it is not known." if unknown else ""
    if wrong:
        ranges = "range of versions of a loader does" if wrong == 1 else "ranges of versions of loaders do"
        return "AFFECTED", "bad", f"{wrong} {ranges} not serve it exactly.{more}{faults}"
    if unknown:
        return "NOT KNOWN", "part", f"{more.strip()}{faults}"
    if found.findings:
        return "FAULTS", "bad", f"{faults.strip()}"
    if not found.groups:
        return "NOTHING TO JUDGE", "part", "There is no such fused layer to judge. Nothing else was looked at."
    return "NOT AFFECTED", "good", "None of the loaders that were asked for is affected."


def _advice(found: Inspection, advice: Advice) -> Iterable[str]:
    command = "rewrite convert" + (" --groups all" if found.selection == "all" else "")
    unserved = ", ".join(advice.unserved)
    if advice.profile is not None:
        who = f"all but {unserved}" if unserved else "all that were asked for"
        yield f"`{command} --profile {advice.profile}`: with the least change, {who} serve it exactly."
    elif unserved:
        yield f"No profile of `{command}` is exact in {unserved}. The table says what each profile is served as."
    else:
        yield f"No one profile of `{command}` is exact in all of these. The table says what each is served as."
    yield from (clean(each.text) for each in advice.alternatives)


def _best(found: Inspection, affected: Sequence[LoaderRow], advice: Advice, profiles: Sequence[str]) -> str | None:
    """The profile to draw: the one that is advised, else the one that is served best, of the least change."""
    if advice.profile is not None:
        return advice.profile
    rows = affected or found.rows

    def badness(profile: str) -> tuple[int, int]:
        outcomes = [row.converted.get(profile) for row in rows]
        return sum(each.severity if each else 9 for each in outcomes), LEAST_CHANGE.index(profile)

    return min((name for name in profiles if name in LEAST_CHANGE), key=badness, default=None)


def _facts(found: Inspection, place: Place) -> Table:
    rows = list(facts_of(Side(place, found)))
    rows.append(("fused groups", f"{len(found.groups):,} (--groups {found.selection})"))
    rows.append(("loaders compute on", engines.where(found.platform)))
    return Table("What it is", ("", "checkpoint"), tuple(rows))


def _findings(found: Inspection) -> Section | None:
    if not found.findings:
        return None
    rows, cut = limited([(clean(f.what), clean(f.where)) for f in found.findings], f"{_JSON} lists all `findings`")
    return Section("Wrong in the checkpoint", (), (), (Table("Faults", ("what", "where"), rows, cut),))


def _loaders(found: Inspection, affected: Sequence[LoaderRow], advice: Advice) -> Section | None:
    if not found.rows:
        return None
    profiles = found.shown_profiles
    by_layer = engines.several_layers(row.as_is for row in found.rows)
    after = _best(found, affected, advice, profiles)

    def line(row: LoaderRow) -> tuple[str, str | None]:
        converted = row.converted.get(after) if after else None
        return row.as_is.kind, converted.kind if converted else None

    on = engines.where(found.platform)
    chart = engines.outcome_chart(
        "Engines, as it is and converted" if after else "Engines",
        merged(found.rows, lambda row: row.loader, line),
        ("as it is", f"--profile {after}" if after else "converted"),
        f"{engines.MODEL} Computing with it: on {on}.",
    )
    tables = [_as_it_is(found, by_layer), *_converted(found, profiles)]
    refused = [f"`convert --profile {clean(name)}` refuses: {clean(why)}." for name, why in found.refusals.items()]
    kernels = engines.kernel_table(_kernels(found, profiles), ("as it is", *(f"profile {name}" for name in profiles)))
    tables += [kernels] if kernels else []
    sources = engines.source_table(row.loader for row in found.rows)
    return Section("What engines make of it", tuple(refused), (chart,) if chart else (), (*tables, sources))


def _as_it_is(found: Inspection, by_layer: bool) -> Table:
    def cells(row: LoaderRow) -> tuple[str, ...]:
        hurt = engines.affected(row.as_is, by_layer)
        return f"{row.as_is.kind}: {hurt}" if hurt else row.as_is.kind, clean(row.as_is.detail)

    rows = merged(found.rows, lambda row: row.loader, cells)
    note = f"{engines.MODEL} Computing with it: on {engines.where(found.platform)}."
    return Table(
        "What loaders make of the fused groups", ("loader", "versions", "as it is", "why"),
        tuple((*names, *said) for *names, said in rows), note,
    )  # fmt: skip


def _converted(found: Inspection, profiles: Sequence[str]) -> Iterable[Table]:
    """What a conversion with each profile would be served as."""
    if not profiles:
        return

    def cells(row: LoaderRow) -> tuple[str, ...]:
        outcomes = (row.converted[name] for name in profiles)
        return tuple("refused" if each is None else each.kind for each in outcomes)

    rows = merged(found.rows, lambda row: row.loader, cells)
    columns = ("loader", "versions", *(f"profile {name}" for name in profiles))
    every = " --groups all" if found.selection == "all" else ""
    yield Table(
        f"What they would make of it after rewrite convert{every}", columns,
        tuple((*names, *said) for *names, said in rows), "Predicted, as above; nothing was converted.",
    )  # fmt: skip


def _kernels(found: Inspection, profiles: Sequence[str]) -> Iterable[tuple[str, str, tuple[str, ...]]]:
    def cells(row: LoaderRow) -> tuple[tuple[str, tuple[str, ...]], ...]:
        states = [(row.as_is, row.kernels), *((row.converted[p], row.kernels_converted.get(p, ())) for p in profiles)]
        return by_cards(
            (
                used.card,
                tuple(
                    "-" if outcome is None else engines.kernels(outcome.kind, kernels[number].families)
                    for outcome, kernels in states
                ),
            )
            for number, used in enumerate(row.kernels)
        )

    if not any(used.families for row in found.rows for used in row.kernels):
        return
    for name, versions, said in merged(found.rows, lambda row: row.loader, cells):
        yield from ((name, versions, (cards, *each)) for cards, each in said)
