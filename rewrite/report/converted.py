"""Plan and conversion → :class:`~rewrite.report.page.Page`."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Iterator

from rewrite.planning.jobs import Job
from rewrite.planning.manifest import ByteCounts, GroupChange, Manifest
from rewrite.planning.plan import Plan
from rewrite.planning.profiles import PROFILES
from rewrite.quantization.kv_cache import kv_cache_scales
from rewrite.report.page import Cell, Colored, Page, Section, Table, clean, number, whole
from rewrite.wording import count, nbytes


def _nothing(manifest: Manifest) -> str:
    layer = "fused" if manifest.selection == "all" else "in_proj_qkvz"
    return f"Nothing to do: profile {manifest.profile} finds no {layer} layer to change."


def _page(headline: str, sections: Iterable[Section] = (), closing: tuple[Cell, ...] = ()) -> Page:
    return Page("Conversion", headline, "", "", "", tuple(sections), closing)


def planned(plan: Plan, headline: str) -> Page:
    """What a conversion would do: the groups with the scale of each partition, and what is written."""
    manifest = plan.manifest
    notes = Section("Notes", tuple(f"note: {note}" for note in (*choice(manifest), *manifest.notes)), brief=True)
    if not manifest.changed:
        return _page(headline, [notes], (f"{_nothing(manifest)} The output would equal the input.",))
    kinds = Counter(group.name.rpartition(".")[2] for group in manifest.groups)
    layers = ", ".join(f"{number:,} {name}" for name, number in kinds.items())
    groups = Section("Scales", tables=tuple(_group_tables(manifest.groups)))
    size = f"{nbytes(plan.size)} ({nbytes(plan.shareable)} can be shared, not copied, where the filesystem can)"
    more = (f"Fused layers that change: {layers}; -v lists their scales.",) if layers else ()
    return _page(
        headline, [notes, groups, _files(manifest)], (f"Would write {size}: {_what_changes(manifest)}.", *more)
    )


def _files(manifest: Manifest) -> Section:
    """Every file of the output, where somebody asks."""
    rows = tuple(
        (clean(file.name), "rewritten" if file.rewritten else "as it was", nbytes(file.size)) for file in manifest.files
    )
    return Section("Files", tables=(Table("Files", ("file", "", "size"), rows, numbers=2),))


def choice(manifest: Manifest) -> Iterator[str]:
    """Which profile a conversion takes, for whom and why: one line, where nobody named it."""
    chosen = manifest.chosen
    if chosen is not None and manifest.changed:
        whom = f"{' and '.join(chosen.engines)} on {chosen.platform.replace(',', ', ')}"
        yield f"profile {manifest.profile}, chosen for {whom}: {PROFILES[manifest.profile].summary}"


def converted(manifest: Manifest, out: str, seconds: float) -> Page:
    """The closing lines of a conversion."""
    size = nbytes(sum(file.size for file in manifest.files))
    how = f"{seconds:.1f} s{_how(manifest.counts)}"
    if not manifest.changed:
        return _page("", (), (f"{_nothing(manifest)} {whole(out)} equals the input ({size}, {how}).",))
    private = ("A new model on the hub is private until you change that on its page.",)
    said = (f"{whole(out)}: {size} in {how}.", *(private if out.startswith("hf://") else ()))
    what = Colored("Converted", f": {_what_changes(manifest)}.")
    return _page("", [Section("", (what, *said), brief=True), _files(manifest)])


def plan_written(plan: Plan, file: str) -> Page:
    """That a plan was written, and what comes next."""
    size = f"{nbytes(plan.size)} in {count(len(plan.jobs), 'file')} that can be written in parts"
    what = _what_changes(plan.manifest) if plan.manifest.changed else "nothing to do, all files come along as they are"
    named = shlex.quote(file)  # a person copies these
    runs = f"`rewrite run {named} --part 0/1` (on N machines 0/N, 1/N, ...)"
    return _page(
        f"{whole(file)}: {size}; {what}.", [_files(plan.manifest)], (f"Next: {runs}, then `rewrite finish {named}`.",)
    )


def part_written(part: tuple[int, int], jobs: Iterable[Job], counts: ByteCounts, seconds: float) -> Page:
    """The closing line of a part."""
    size = counts.shared + counts.copied + counts.written + counts.kept
    rows = tuple((clean(job.name), nbytes(job.size)) for job in jobs)
    files = Section("Files", tables=(Table("Files", ("file", "size"), rows, numbers=1),))
    return _page("", [files], (f"Part {part[0]}/{part[1]}: {nbytes(size)} in {seconds:.1f} s{_how(counts)}.",))


def _how(counts: ByteCounts | None) -> str:
    """The ways that the bytes came, to go on a sentence."""
    if counts is None:
        return ""
    kept = f", {nbytes(counts.kept)} kept from earlier runs" if counts.kept else ""
    ways = f"{nbytes(counts.shared)} shared, {nbytes(counts.copied)} copied, {nbytes(counts.written)} written"
    sent = "what was sent was not counted" if counts.sent is None else f"{nbytes(counts.sent)} sent"
    network = f"; over the network: {nbytes(counts.read)} read, {sent}"
    unsummed = f"; no checksum from the store of {count(counts.unsummed, 'file')}: only size and ETag were compared"
    network += unsummed if counts.unsummed else ""
    return f"; {ways}{kept}{network if counts.read or counts.sent != 0 else ''}"


def _group_tables(groups: Iterable[GroupChange]) -> Iterator[Table]:
    """A row for each group, a column for each partition; a table of its own where the partitions have other names."""
    tables: dict[tuple[str, ...], list[tuple[Cell, ...]]] = {}
    for group in groups:
        partitions = [p for module in group.modules for p in module.partitions]
        if not partitions:
            continue  # its scales were explicit already
        names = tuple(p.name for p in partitions) if len(partitions) > 1 else ("",)
        tables.setdefault(names, []).append((group.name, *(number(p.scale) for p in partitions)))
    for names, rows in tables.items():
        yield Table("Scales", ("scale of each partition", *names), tuple(rows), numbers=1)


def _what_changes(manifest: Manifest) -> str:
    repaired = count(len(manifest.scales), "NVFP4 layer") + " with one global scale"
    modules = sum(len(group.modules) for group in manifest.groups)
    shards = [file for file in manifest.files if file.name.endswith(".safetensors")]
    rewritten = sum(file.rewritten for file in shards)
    groups = count(len(manifest.groups), "fused group")
    what = PROFILES[manifest.profile].closing.format(
        modules=count(modules, "shared scale"), layers=count(modules, "layer"), groups=groups
    )
    kv_cache = sum(1 for _ in kv_cache_scales(manifest.dropped))
    if not modules:  # the scales were explicit already
        inputs = len(manifest.dropped) - kv_cache
        what = f"{count(inputs, 'input scale')} dropped, dynamic activations" if inputs else "no weight"
    if manifest.scales:
        what = f"{what}, {repaired}" if manifest.groups else repaired
    if kv_cache:
        what += f", {count(kv_cache, 'scale')} of the KV cache dropped"
    return f"{what}, {rewritten} of {count(len(shards), 'shard')} rewritten"
