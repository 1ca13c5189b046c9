"""A verification as the text of a model card: Markdown between the markers of :mod:`rewrite.card`. Pure.

No paths, no times, and of what is there already no word: the same run gives the same text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from rewrite.loaders.outcome import merged
from rewrite.report.engines import where
from rewrite.report.markdown import cell, text
from rewrite.report.names import Names
from rewrite.report.page import clean
from rewrite.report.verified import check_row, left_out_of
from rewrite.verification.result import CARD_REMARK, Check, Verification
from rewrite.version import __version__


def card(found: Verification, done: str) -> str:
    """``done``: in one sentence, what was done. Only of a verification that holds."""
    names = Names({found.source: "IN", found.out: "OUT"})
    parts = [
        "### Conversion",
        text(clean(done)),
        _verdict(found, names),
        "\n".join(
            _table(("check", "verdict", "what was found"), [check_row(_plain(check), names) for check in found.checks])
        ),
    ]
    if found.loaders:
        lines = merged(found.loaders, lambda row: tuple(each.kind for each in row.outcomes.values()))
        cells = [(name, versions, *kinds) for name, versions, kinds in lines]
        parts += [
            f"What engines make of its fused layers, on {text(where(found.settings.platform))}. Predicted by "
            "rewrite from recorded runs; this run started no engine.",
            "\n".join(_table(("engine", "versions", "before", "after"), cells)),
        ]
    parts.append(f"Written by rewrite {__version__}. The text of this card is not part of what is compared.")
    return "\n\n".join(parts)


def _verdict(found: Verification, names: Names) -> str:
    """As the closing line of the command; but with a check left out, nothing here may be taken for more."""
    left_out = [text(each) for each in left_out_of(found, names)]
    if left_out:
        return f"**No check that was made failed. Not checked: {', '.join(left_out)}.**"
    return "**This checkpoint is verified.** All checks were made, and all hold."


def _plain(check: Check) -> Check:
    """Without the remark on an earlier card, which this one replaces."""
    return replace(check, summary=check.summary.removesuffix(CARD_REMARK))


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"| {' | '.join('---' for _ in head)} |"
    yield from (f"| {' | '.join(cell(clean(str(each))) for each in row)} |" for row in rows)
