"""Targets for some layers of a kind: patterns that match these, their fused name, and no other quantized layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator

from rewrite.quantization.patterns import Patterns

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_NOT_MTP = r"(?!mtp\.)"  # MTP layers have modules of the same names; no conversion is about them


def fitting_target(target: str, wanted: Collection[str], strays: Callable[[str], Collection[str]]) -> str | None:
    """``target`` (``re:.*...``), or the first narrower pattern that matches all of ``wanted`` and for which ``strays``
    finds nothing: without MTP layers, then for the numbers of the wanted layers only. None where no pattern will do.

    The narrowed patterns still match the name of the fused layer, which engines look up before its parts.
    """
    patterns = Patterns()
    for candidate in _candidates(target, wanted):
        if all(patterns.matches(candidate, name) for name in wanted) and not strays(candidate):
            return candidate
    return None


def _candidates(target: str, wanted: Collection[str]) -> Iterator[str]:
    yield target
    body = target.removeprefix("re:")
    yield f"re:{_NOT_MTP}{body}"
    numbers = {found[1] for name in wanted if (found := _LAYER.search(name))}
    if numbers and body.startswith(".*"):
        layers = rf".*\blayers\.({'|'.join(sorted(numbers, key=lambda n: (len(n), n)))})\.{body.removeprefix('.*')}"
        yield f"re:{layers}"
        yield f"re:{_NOT_MTP}{layers}"
