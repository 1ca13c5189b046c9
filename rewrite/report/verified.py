"""Verification, and what IN and OUT are → :class:`~rewrite.report.page.Page`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from rewrite.loaders.outcome import merged
from rewrite.report import engines, measured, scales, tried
from rewrite.report.checkpoints import Side, facts_of
from rewrite.report.names import Names
from rewrite.report.page import Cell, Colored, Page, Run, Section, Table, Tone, again, clean, limited, present, whole
from rewrite.trying.tried import Tried
from rewrite.verification.result import ENGINES, IN, NOT_OPENED, OUT, Check, Verification
from rewrite.wording import count

_JSON = "`rewrite verify IN OUT --json`"


def page(found: Verification, trial: Tried | None = None, *, brief: bool = False) -> Page:
    """For a terminal: without what is read beside the verification, with the paths of this machine. ``brief``: the
    closing line only. ``trial``: of an engine that was started."""
    names = Names({})
    if brief:
        return _page(found, names, found.out, (), trial)
    sections = (
        _checks(found, names),
        *_tried(trial, names),
        measured.section(found),
        _engines(found),
        _files(found),
    )
    return _page(found, names, found.out, present(*sections), trial)


def _tried(trial: Tried | None, names: Names) -> tuple[Section, ...]:
    return () if trial is None else (tried.answer(trial, names), *tried.sections(trial))


def report(found: Verification, source: Side, out: Side, profile: str, run: Run, trial: Tried | None = None) -> Page:
    """For others. ``profile``: what OUT was held to, in words."""
    names = Names({found.source: source.place.name, found.out: out.place.name})
    sections = (
        _checks(found, names),
        *_tried(trial, names),
        _engines(found),
        measured.section(found),
        *(_scales(which, side) for which, side in ((IN, source), (OUT, out))),
        Section("What was compared", tables=(_facts(found, source, out, profile),)),
        _files(found),
        again(run),
    )
    return _page(found, names, clean(out.place.name), present(*sections), trial)


def _page(found: Verification, names: Names, name: str, sections: tuple[Section, ...], trial: Tried | None) -> Page:
    failed, left_out = [clean(each) for each in found.failed], found.not_checked
    word = "FAILED" if failed else "VERIFIED IN PART" if left_out else "VERIFIED"
    tone: Tone = "bad" if failed else "part" if left_out else "good"
    in_part = " in part." if left_out else "."
    verdict = Colored("FAILED", f": {', '.join(failed)}.") if failed else Colored("verified", in_part)
    said: tuple[Cell, ...] = (verdict, *answers(found, names))
    is_ = "" if failed else " is"
    in_engine = () if trial is None else (tried.in_short(trial),)
    sentence = " ".join([name + is_, *map(str, said), *(f"Tried: {each}." for each in in_engine)])
    closing = (whole(found.out) + is_, *said, *in_engine)
    return Page(f"Verification of {name}", "", word, tone, sentence, sections, closing)


def answers(found: Verification, names: Names) -> Iterator[str]:
    """The three answers, apart: what OUT is, who serves it, and what nobody looked at."""
    promised = "as the conversion promises" if found.bytes_ok else "not as the conversion promises"
    rounded = f", which rounded weights by up to {found.rounded:.1%}" if found.bytes_ok and found.rounded else ""
    yield f"Bytes: {promised}{rounded}."
    unjudged = any(check.summary == found.nothing_judged for check in found.checks)
    yield f"Engines: {', '.join(_served(found)) or (found.nothing_judged if unjudged else 'not known')}."
    yield f"Not checked: {', '.join(left_out_of(found, names)) or 'nothing'}."


def _served(found: Verification) -> Iterator[str]:
    """The engines that OUT is for, with what they make of it where that is less than exact."""
    said = merged(found.loaders, lambda row: row.outcomes[OUT].kind if row.asked else None)
    kinds = [(f"{name} {versions}", kind) for name, versions, kind in said if kind]
    exact = [engine for engine, kind in kinds if kind == "exact"]
    if exact:
        yield f"{', '.join(exact)} {'serve' if len(exact) > 1 else 'serves'} its {found.layers} layers exactly"
    yield from (f"{engine} {kind}" for engine, kind in kinds if kind != "exact")
    if found.loaders and not kinds:
        yield "no known one was named" if found.bytes_ok and ENGINES not in found.failed else "some read it worse"


def left_out_of(found: Verification, names: Names) -> list[str]:
    return [clean(names.hide(each)) for each in found.not_checked]


def _checks(found: Verification, names: Names) -> Section:
    rows = tuple(check_row(check, names) for check in found.checks)
    problems = tuple(
        (clean(check.name), clean("; ".join(" ".join(line.split()) for line in names.hide(problem).splitlines())))
        for check in found.checks
        for problem in check.problems
    )
    tables = [Table("Checks", ("check", "verdict", "what was found"), rows, labels=2)]
    tables += [Table("Problems", ("check", "what is wrong"), problems)] if problems else []
    return Section("Checks", tables=tuple(tables), brief=True)


def check_row(check: Check, names: Names) -> tuple[Cell, ...]:
    left_out = f"; not checked: {check.left_out}" if check.left_out else ""
    return clean(check.name), Colored(check.verdict), clean(names.hide(check.summary + left_out))


def _scales(which: str, side: Side) -> Section:
    if side.inspection is None:
        return Section(f"Scales of {which}", (f"Not known: {clean(side.reason)}.",))
    every = " --groups all" if side.inspection.selection == "all" else ""
    return scales.section(side.inspection.groups, which, f"`rewrite inspect {which}{every} --json` lists every group")


def _facts(found: Verification, source: Side, out: Side, profile: str) -> Table:
    served = (
        "engine versions with the fix of vLLM issue #38197"
        if found.settings.loader == "fixed"
        else clean(found.settings.loader)
    )
    rows = [
        *facts_of(source, out),
        ("compared as", "", clean(profile)),
        ("judged as served by", "", f"{served}; on {engines.where(found.settings.platform)}"),
    ]
    return Table("What was compared", ("", IN, OUT), tuple(rows))


def _engines(found: Verification) -> Section:
    title = "What engines make of it"
    if not found.loaders:
        reason = next((check.summary for check in found.checks if check.name == ENGINES), "")
        return Section(title, (f"Not known: {clean(reason)}.",))
    rows = found.loaders
    note = (
        f"{engines.MODEL} OUT: as it is loaded, and `does not run` where it is known that the engine cannot compute "
        f"with it on {engines.where(found.settings.platform)}. IN: as it is loaded; computed with, too, by engines "
        "that `--for` or `--platform` asked for."
    )
    kernels = engines.kernel_table(rows)
    asked, others = [row for row in rows if row.asked], [row for row in rows if not row.asked]
    tables = [engines.side_by_side(asked or rows, "Before and after", note)]
    if asked and others:  # what befalls them is no part of the verdict
        aside = "The verdict is not about these."
        tables.append(replace(engines.side_by_side(others, "Engines that were not asked for", aside), folded=True))
    return Section(title, tables=(*tables, *([kernels] if kernels else []), engines.source_table(rows)))


def _files(found: Verification) -> Section:
    if not found.digests:
        reason = "--quick: not all bytes were read" if found.settings.quick else "no digests were asked for"
        if any(check.summary == NOT_OPENED for check in found.checks):
            reason = NOT_OPENED
        return Section("Files", (f"SHA-256 of the files: not noted; {reason}.",))
    rows = tuple((clean(name), sha) for name, sha in found.digests.items())
    note = "SHA-256 of each file of OUT, of the bytes that were compared."
    title = f"{count(len(rows), 'file')} of OUT"
    table = Table(title, ("file", "SHA-256"), rows, note, folded=len(rows) > 12, code=True)
    return Section("Files", tables=(limited(table, f"{_JSON} lists all of them under `digests`"),))
