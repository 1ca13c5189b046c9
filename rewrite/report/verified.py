"""Verification, and what IN and OUT are → :class:`~rewrite.report.data.Report`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rewrite.loaders.kernels import by_cards
from rewrite.loaders.versions import Loader, merged
from rewrite.report import engines, measured, predicted, scales
from rewrite.report.checkpoints import Side, facts_of
from rewrite.report.data import Report, Section, Table, Verdict, clean, clean_lines, limited
from rewrite.report.names import Names
from rewrite.report.run import Run
from rewrite.verification.result import NOT_OPENED, Check, EngineChange, Verification
from rewrite.wording import count

_JSON = "`rewrite verify IN OUT --json`"


def report(found: Verification, source: Side, out: Side, profile: str, run: Run) -> Report:
    """``profile``: what OUT was held to, in words."""
    names = Names({found.source: source.place.name, found.out: out.place.name})
    verdicts = tuple(_verdict(check, names) for check in found.checks)
    name = clean(out.place.name)
    failed = [clean(check.name) for check in found.checks if check.verdict == "FAILED"]
    left_out = tuple(clean(names.hide(each)) for each in found.not_checked)
    word = "FAILED" if failed else "VERIFIED IN PART" if left_out else "VERIFIED"
    sections = (
        scales.section(source.inspection.groups, "IN", f"{_inspect('IN', source)} lists every group")
        if source.inspection
        else _unread("Scales of IN", source),
        *_of_out(out),
        measured.section(found),
        predicted.between(source.inspection, out.inspection, {row.group for row in found.numbers}),
        _loaders(found),
        _files(found),
    )
    return Report(
        title=f"Verification of {name}",
        word=word,
        state="bad" if failed else "part" if left_out else "good",
        sentence=_sentence(name, failed, left_out),
        facts=_facts(found, source, out, profile),
        verdicts=verdicts,
        not_checked=left_out,
        sections=tuple(section for section in sections if section is not None),
        command=run.command,
        versions=run.versions,
        remarks=run.remarks,
    )


def _sentence(name: str, failed: Sequence[str], left_out: Sequence[str]) -> str:
    if failed:
        return f"{name} FAILED: {', '.join(failed)}."
    return f"{name} is verified." + (f" Not checked: {', '.join(left_out)}." if left_out else "")


def _verdict(check: Check, names: Names) -> Verdict:
    problems = tuple(clean_lines(names.hide(problem)) for problem in check.problems)
    return Verdict(
        clean(check.name), check.verdict, clean(names.hide(check.summary)), problems, clean(names.hide(check.left_out))
    )


def _inspect(which: str, side: Side) -> str:
    every = " --groups all" if side.inspection and side.inspection.selection == "all" else ""
    return f"`rewrite inspect {which}{every} --json`"


def _unread(title: str, side: Side) -> Section:
    return Section(title, (f"Not known: {clean(side.reason)}.",))


def _of_out(out: Side) -> Iterable[Section]:
    if out.inspection is None:
        yield _unread("Scales of OUT", out)
        return
    yield scales.section(out.inspection.groups, "OUT", f"{_inspect('OUT', out)} lists every group")


def _facts(found: Verification, source: Side, out: Side, profile: str) -> Table:
    rows = list(facts_of(source, out))
    rows.append(("held to", "", clean(profile)))
    served = "loaders with the fix" if found.settings.loader == "fixed" else clean(found.settings.loader)
    rows.append(("judged as served by", "", f"{served}; on {engines.where(found.settings.platform)}"))
    return Table("What was compared", ("", "IN", "OUT"), tuple(rows))


def loader_of(row: EngineChange) -> Loader:
    return row.engine


def _loaders(found: Verification) -> Section:
    title = "What engines make of it"
    if not found.loaders:
        reason = next((check.summary for check in found.checks if check.name == "loaders"), "")
        return Section(title, (f"Not known: {clean(reason)}.",))
    by_layer = len({name.partition(".")[0] for row in found.loaders for name in row.partitions}) > 1

    def cells(row: EngineChange) -> tuple[str, ...]:
        affected = engines.hurt(row.partitions, {}, by_layer)
        return row.before, f"{row.after}: {affected}" if affected else row.after, clean(row.detail)

    on = engines.where(found.settings.platform)
    judged = (
        f"OUT: as it is loaded, and `does not run` where it is known that the engine cannot compute with it on {on}. "
        "IN: as it is loaded; computed with, too, by loaders that `--loader` or `--platform` asked for."
    )
    chart = engines.outcome_chart(
        "Engines, before and after",
        merged(found.loaders, loader_of, lambda row: (row.before, row.after)),
        ("IN", "OUT"),
        f"{engines.MODEL} {judged}",
    )
    rows = merged(found.loaders, loader_of, cells)
    table = Table(
        "What known loaders make of the fused groups",
        ("loader", "versions", "IN", "OUT", "why OUT"),
        tuple((*names, *said) for *names, said in rows),
        engines.MODEL,
    )
    kernels = engines.kernel_table(_kernels(found.loaders), ("IN", "OUT"))
    tables = (table, *([kernels] if kernels else []), engines.source_table(map(loader_of, found.loaders)))
    return Section(title, (), (chart,) if chart else (), tables)


def _kernels(rows: Iterable[EngineChange]) -> Iterable[tuple[str, str, tuple[str, ...]]]:
    run = [row for row in rows if any(row.kernels_before.values()) or any(row.kernels_after.values())]
    for name, versions, said in merged(run, loader_of, _kernels_of):
        yield from ((name, versions, (cards, *cells)) for cards, cells in said)


def _kernels_of(row: EngineChange) -> tuple[tuple[str, tuple[str, ...]], ...]:
    sides = ((row.before, row.kernels_before), (row.after, row.kernels_after))
    return by_cards(
        (card, tuple(engines.kernels(kind, used.get(card, ())) for kind, used in sides)) for card in row.kernels_before
    )


def _files(found: Verification) -> Section:
    if not found.digests:
        reason = "--quick: not all bytes were read" if found.settings.quick else "no digests were asked for"
        if any(check.summary == NOT_OPENED for check in found.checks):
            reason = NOT_OPENED
        return Section("Files", (f"SHA-256 of the files: not noted; {reason}.",))
    rows, cut = limited(
        [(clean(name), sha) for name, sha in found.digests.items()], f"{_JSON} lists all of them under `digests`"
    )
    total = len(found.digests)
    note = f"SHA-256 of each file of OUT, of the bytes that were compared. {cut}".strip()
    title = f"{count(total, 'file')} of OUT"
    return Section("Files", (), (), (Table(title, ("file", "SHA-256"), rows, note, folded=total > 12, code=True),))
