"""Inspection → :class:`~rewrite.report.page.Page`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rewrite.inspection.advice import Advice, who_make
from rewrite.inspection.inspection import Inspection
from rewrite.loaders.outcome import AS_IT_IS, Row, merged
from rewrite.loaders.ranges import Engine
from rewrite.planning.profiles import PROFILES
from rewrite.report import engines, scales
from rewrite.report.checkpoints import Place, Side, facts_of, headline
from rewrite.report.page import Colored, Page, Run, Section, Table, Tone, again, clean, limited, present
from rewrite.wording import count

_JSON = "`rewrite inspect CHECKPOINT --json`"
_MAX_HINTS = 5
_NOTHING = {
    "qkvz": "No in_proj_qkvz layer here, so nothing was judged. Try --groups all.",
    "all": "No fused layer here, so nothing was judged.",
}


def page(
    found: Inspection,
    asked: Sequence[Engine],
    advice: Advice,
    command: str | None,
    place: Place,
    run: Run | None = None,
) -> Page:
    """``advice``, and the ``command`` that it comes to, are about the engines that were ``asked`` for."""
    word, tone, sentence = _verdict(found, found.affected(asked), advice.unknown)
    rows = [_row(row, found.shown_profiles) for row in found.rows]
    every = " with `--groups all`" if found.selection == "all" else ""
    sections = present(
        _findings(found),
        _answer(found, rows, asked, advice, command, _conclusion(found, advice, sentence)),
        _worth_knowing(found),
        _every_engine(found, rows),
        scales.section(found.groups, "the checkpoint", f"{_JSON}{every} lists every group"),
        Section("What it is", tables=(_facts(found, place),)),
        again(run),
    )
    return Page(f"Inspection of {clean(place.name)}", headline(found, place), word, tone, sentence, sections)


def _row(row: Row, profiles: Sequence[str]) -> Row:
    """With the profiles that are shown, as they are named on a command line."""
    shown = {AS_IT_IS: AS_IT_IS, **{name: f"--profile {name}" for name in profiles}}
    outcomes = {name: row.outcomes[state] for state, name in shown.items()}
    return Row(
        row.engine, outcomes, {name: row.kernels[state] for state, name in shown.items() if state in row.kernels}
    )


def _verdict(found: Inspection, affected: Sequence[Row], unknown: Sequence[str]) -> tuple[str, Tone, str]:
    faults = f"{count(len(found.findings), 'fault')} in the checkpoint itself."
    said = [faults] if found.findings else []
    if unknown:
        said = [f"Not known: what {who_make(unknown)} of it.", *said]
    if affected:
        verb = "do" if len(affected) > 1 else "does"
        named = [f"{row.engine.name} {row.engine.versions}" for row in affected]
        which = " and ".join(named) if len(named) < 3 else count(len(named), "range") + " of engine versions"
        wrong = f"{which} {verb} not serve it right."
        return "AFFECTED", "bad", " ".join([wrong, *said])
    if unknown:
        return "NOT KNOWN", "part", " ".join(said)
    if found.findings:
        return "FAULTS", "bad", f"{faults} The engines that were asked for serve its layers all the same."
    if not found.groups:
        return "NOTHING TO JUDGE", "part", _NOTHING[found.selection]
    return "NOT AFFECTED", "good", "None of the engines that were asked for is affected."


def _conclusion(found: Inspection, advice: Advice, sentence: str) -> Iterable[str]:
    """The advice, or the verdict but for what the lines around it say."""
    if advice.needed:
        return _advice(advice)
    if advice.unknown:
        return () if found.findings or "://" in found.path else ("Your own engine can tell; PYTHON is its Python:",)
    return (sentence,)


def _answer(
    found: Inspection,
    rows: Sequence[Row],
    asked: Sequence[Engine],
    advice: Advice,
    command: str | None,
    conclusion: Iterable[str],
) -> Section:
    """What the engines make of it that were asked for, and what helps. The command is last: a person copies it."""
    schemes = [f"{count(number, 'linear layer')}: {clean(text)}" for text, number in found.schemes.items()]
    more = [f"{len(schemes) - 3} more kinds of linear layers: -v lists them."] if len(schemes) > 3 else []
    judged = found.groups or advice.needed or advice.unknown
    return Section(
        "What engines make of it",
        (*schemes[:3], *more),
        tables=(engines.answer(rows, AS_IT_IS, asked),) if judged else (),
        lines=(*_costs(found), *_others(found, rows, asked), *conclusion),
        command=command or "",
        brief=True,
    )


def _costs(found: Inspection) -> Iterator[str]:
    """What looking at this checkpoint alone does not show."""
    for cost in sorted(set(found.costs.values()), reverse=True):
        names = ", ".join(clean(name) for name, own in found.costs.items() if own == cost)
        yield (
            f"The conversion that made this checkpoint rounded: weights of {names} moved by up to {cost:.1%}, tiny "
            "scales by more. `verify` measures it."
        )


def _others(found: Inspection, rows: Sequence[Row], asked: Sequence[Engine]) -> Iterator[str]:
    """What the answer leaves out, in a sentence."""

    def say(row: Row) -> str:
        return "" if row.engine in asked or row.as_is.kind == "exact" else row.as_is.kind

    left_out = [f"{name} {versions} ({kind})" for name, versions, kind in merged(rows, say) if kind]
    if left_out:
        yield f"Not asked for: {', '.join(left_out)}."
    if found.groups and found.selection == "qkvz":
        yield "Not judged: fused layers other than in_proj_qkvz; --groups all judges them."


def _advice(advice: Advice) -> Iterator[str]:
    others = " or ".join(clean(each.text) for each in advice.alternatives)
    if advice.unknown:
        yield f"Not known: what {who_make(advice.unknown)} of it, converted or not."
    if advice.profile is None:
        yield f"No profile repairs this{f': use {others}' if others else ''}."
        return
    yield from ([f"Without a conversion: {others}."] if others else [])
    yield from (f"A{clean(each)[1:]}." for each in advice.left)
    repaired = "Repaired in part" if advice.left else "Repaired"
    yield f"{repaired} by profile {advice.profile} ({PROFILES[advice.profile].summary}):"


def _findings(found: Inspection) -> Section | None:
    if not found.findings:
        return None
    rows = tuple((Colored("wrong"), clean(f.what), clean(f.where)) for f in found.findings)
    table = limited(Table("Faults", ("", "what", "where"), rows, labels=2), f"{_JSON} lists all `findings`")
    hints = dict.fromkeys(clean(fault.next) for fault in found.findings if fault.next)
    lines = tuple(f"What to do: {hint}." for hint in list(hints)[:_MAX_HINTS])
    return Section("Wrong in the checkpoint", tables=(table,), lines=lines, brief=True)


def _worth_knowing(found: Inspection) -> Section | None:
    if not found.notes:
        return None
    text = (f"{clean(each.what)}; {clean(each.next)}." for each in found.notes)
    return Section("Worth knowing", tuple(f"{line[:1].upper()}{line[1:]}" for line in text))


def _every_engine(found: Inspection, rows: Sequence[Row]) -> Section | None:
    """All engines that are known, before and after each profile."""
    if not rows or not (found.groups or found.affected()):
        return None
    on = engines.where(found.platform)
    command = "rewrite convert" + (" --groups all" if found.selection == "all" else "")
    note = f"{engines.MODEL} Computing with it: on {on}. `--profile`: after `{command}`; nothing was converted."
    kernels = engines.kernel_table(rows) if found.platform else None
    tables = (engines.by_state(rows, "What each engine makes of it", note), *([kernels] if kernels else []))
    refused = [f"`convert --profile {clean(name)}` refuses: {clean(why)}." for name, why in found.refusals.items()]
    text = (*refused, *_notes(found))
    return Section("All known engines, before and after a conversion", text, (), (*tables, engines.source_table(rows)))


def _notes(found: Inspection) -> Iterator[str]:
    static = any(group.static_activations and not group.nvfp4 for group in found.groups)
    notes = ((name, PROFILES[name].notes.get("static")) for name in (found.shown_profiles if static else ()))
    yield from (f"Profile {name}: {note}" for name, note in notes if note)
    others = (g.nvfp4 or g.experts or any(p.layout == "block" for p in g.parts) for g in found.groups)
    if found.platform is not None and any(others):
        yield "What multiplies experts, NVFP4 and block scales was not run: of these, outcomes are about loading."


def _facts(found: Inspection, place: Place) -> Table:
    rows = [
        *facts_of(Side(place, found)),
        ("fused groups", f"{len(found.groups):,} (--groups {found.selection})"),
        ("engines compute on", engines.where(found.platform)),
    ]
    return Table("What it is", ("", "checkpoint"), tuple(rows))
