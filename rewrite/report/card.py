"""A verification as the text of a model card: Markdown between the markers of :mod:`rewrite.card`. Pure.

No paths, no times, and of what is there already no word: the same run gives the same text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rewrite.loaders.versions import merged
from rewrite.report import engines
from rewrite.report.data import clean
from rewrite.report.markdown import cell, text
from rewrite.report.names import Names
from rewrite.report.verified import loader_of
from rewrite.verification.result import CARD_REMARK, Check, Verification
from rewrite.version import __version__


def card(found: Verification, done: str) -> str:
    """``done``: in one sentence, what was done. Only of a verification that holds."""
    names = Names({found.source: "IN", found.out: "OUT"})
    parts = [
        "### Conversion",
        text(clean(done)),
        _verdict(found, names),
        "\n".join(_table(("check", "verdict", "what was found"), [_check(check, names) for check in found.checks])),
    ]
    if found.loaders:
        rows = merged(found.loaders, loader_of, lambda row: (row.before, row.after))
        cells = [(name, versions, *kinds) for name, versions, kinds in rows]
        parts += [
            f"What engines make of its fused layers, on {text(engines.where(found.settings.platform))}. Predicted by "
            "the loader model of rewrite; this run started no engine.",
            "\n".join(_table(("loader", "versions", "before", "after"), cells)),
        ]
    parts.append(f"Written by rewrite {__version__}. The text of this card is not part of what is compared.")
    return "\n\n".join(parts)


def _verdict(found: Verification, names: Names) -> str:
    """As the closing line of the command; but with a check left out, nothing here may be taken for more."""
    left_out = [text(clean(names.hide(each))) for each in found.not_checked]
    if left_out:
        return f"**No check that was made failed. Not checked: {', '.join(left_out)}.**"
    return "**This checkpoint is verified.** All checks were made, and all hold."


def _check(check: Check, names: Names) -> tuple[str, ...]:
    left_out = f"; not checked: {check.left_out}" if check.left_out else ""
    return check.name, check.verdict, names.hide(check.summary.removesuffix(CARD_REMARK) + left_out)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"| {' | '.join('---' for _ in head)} |"
    yield from (f"| {' | '.join(cell(clean(each)) for each in row)} |" for row in rows)
