"""Verifications as text for people. Pure: the command line prints what these return."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from rewrite.cli.layout import Cell, Line, Span, line, paragraph, path
from rewrite.cli.outcomes import BAD, GOOD, LESS, told, worded
from rewrite.cli.tables import rows_of, table
from rewrite.verification.result import EngineChange, PartitionNumbers, Verification, worst
from rewrite.wording import error


def render_verification(verification: Verification, width: int) -> list[Line]:
    """Verdicts with their problems, the worst partition of each kind, the loader table, one closing line."""
    lines = _checks(verification, width)
    if verification.numbers:
        lines += [line(), *_numbers_table(worst(verification.numbers), width)]
    if verification.loaders:
        head = ["loader", "versions", "fused groups of OUT"]
        lines += [line(), *table(list(_served(verification)), width, head=[head], labels=2)]
    return [*lines, line(), *verdict_lines(verification, width)]


def _checks(verification: Verification, width: int) -> list[Line]:
    cells: list[list[Cell]] = [[each.name, told(each.verdict), each.summary] for each in verification.checks]
    lines: list[Line] = []
    for check, row in zip(verification.checks, rows_of(cells, width, labels=2)[1:], strict=True):
        lines += row
        for problem in check.problems:
            lines += [each for part in problem.splitlines() for each in paragraph(part, width, indent=2)]
    return lines


def verdict_lines(verification: Verification, width: int) -> list[Line]:
    """One sentence, perhaps with what it is not about."""
    failed = [check.name for check in verification.checks if check.verdict == "FAILED"]
    if failed:
        return paragraph([path(f"{verification.out} "), Span("FAILED", BAD), f": {', '.join(failed)}."], width)
    left_out = f" Not checked: {', '.join(verification.not_checked)}." if verification.not_checked else ""
    return paragraph([path(f"{verification.out} is "), Span("verified", GOOD), ".", Span(left_out, LESS)], width)


def _numbers_table(numbers: Sequence[PartitionNumbers], width: int) -> list[Line]:
    head = [
        ["worst of all", *["weights"] * 3, *["outputs"] * 3, "bound"],
        ["groups, off by", *["before", "fixed", "OUT"] * 2, "used"],
    ]
    several = len({row.layer for row in numbers}) > 1
    labels = [f"{r.layer} {r.partition}" if several and r.layer != r.partition else r.partition for r in numbers]
    rows = [[label, *_number_cells(row)[2:]] for label, row in zip(labels, numbers, strict=True)]
    return table(rows, width, head=head, right=range(1, len(head[0])))


def _number_cells(row: PartitionNumbers) -> list[str]:
    weights = (row.weights_before, row.weights_fixed, row.weights_out)
    errors = (*weights, row.outputs_before, row.outputs_fixed, row.outputs_out)
    used = "-" if row.bound_used is None else f"{row.bound_used:.2f}"
    return [row.group, row.partition, *map(error, errors), used]


def _served(verification: Verification) -> Iterator[list[Cell]]:
    """A row for each loader: what it makes of OUT."""
    layers = {name.partition(".")[0] for row in verification.loaders for name in row.partitions}
    layers |= {row.layer for row in verification.numbers}

    def say(row: EngineChange) -> list[str | Span]:
        return worded(row.after, row.partitions, by_layer=len(layers) > 1)

    for (name, cell), run in groupby(verification.loaders, lambda row: (row.loader, say(row))):
        rows = list(run)
        yield [name, rows[-1].engine.versions_from(rows[0].engine), cell]
