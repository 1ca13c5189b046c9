"""Outcomes and verdicts in words, and the colors that go with them."""

from __future__ import annotations

from collections.abc import Sequence

from rewrite.cli.layout import Span

GOOD, LESS, BAD = "green", "yellow", "red"
_COLORS = {"exact": GOOD, "ok": GOOD, "loses precision": LESS, "not known": LESS, "skipped": LESS, "-": None}


def told(kind: str) -> Span:
    """An outcome or a verdict. What is neither good nor less good is bad: the word says it, the color repeats it."""
    return Span(kind, _COLORS.get(kind, BAD))


def worded(kind: str, partitions: Sequence[str], *, by_layer: bool) -> list[str | Span]:
    """``garbled: k, v``, of several layers ``loses precision: in_proj_qkvz z, qkv_proj k v``."""
    if not partitions:
        return [told(kind)]
    if not by_layer:
        return [told(kind), f": {', '.join(name.partition('.')[2] for name in partitions)}"]
    hurt: dict[str, list[str]] = {}
    for layer, _, name in (partition.partition(".") for partition in partitions):
        hurt.setdefault(layer, []).append(name)
    return [told(kind), f": {', '.join(f'{layer} {chr(32).join(names)}' for layer, names in hurt.items())}"]
