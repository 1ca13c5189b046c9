"""Whether what an engine did is what was predicted, and what the verification said."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from loader_matrix.results import Cell

#: One rounding to e4m3 moves a weight by at most a sixteenth; the worst partition is off by less.
LOST = 2.0**-4
NOT_LEARNT = "nothing learnt"
#: Where engines look for a kernel. Kernels of some formats exist for accelerators only: such a load shows nothing.
_NO_KERNEL = (
    *(":choose_scaled_mm_linear_kernel", ":init_nvfp4_linear_kernel", ":choose_mp_linear_kernel"),
    *(":num_compute_units", ":marlin_make_workspace"),  # of Marlin, for weight-only FP8
    *("vllm/platforms/cpu.py:get_attn_backend_cls", "rotary_embedding/factory.py:get_rope_cpu"),  # MLA
    "compressed_tensors_w4a4_nvfp4_moe.py:__init__",  # wants Blackwell
)
NO_KERNEL = "no kernel on CPU"
#: From best to worst, as ``rewrite`` orders them. "not known" is a prediction, never seen.
SEVERITY = ("exact", "loses precision", "garbled", "fails to load")


def observed(found: Cell) -> str:
    """The kind of outcome that a load shows; ``NOT_LEARNT`` where it shows none."""
    if found.outcome == "not run":
        return NOT_LEARNT
    if found.error is not None:
        return NO_KERNEL if found.error["where"].endswith(_NO_KERNEL) else "fails to load"
    errors = [error for _, error in _errors(found)]
    if found.cast or any(isinstance(error, str) or error > LOST for error in errors):
        return "garbled"
    return "loses precision" if any(errors) else "exact"


def disagreement(predicted: str, found: Cell) -> str | None:
    """What is wrong with a prediction, or None."""
    seen = observed(found)
    if predicted in ("not known", "refused") or seen in (predicted, NO_KERNEL):
        return None
    if seen == NOT_LEARNT:
        return f"{NOT_LEARNT}: {found.reason}"
    if found.error is not None:
        return f"raises {found.error.get('type')}: {found.error.get('message', '')[:160]} ({found.error.get('where')})"
    return f"serves: {seen}; {worst_of(found)}"


def worse(before: Cell, after: Cell) -> str | None:
    """Where an engine serves the converted checkpoint worse than the original."""
    kinds = observed(before), observed(after)
    if not set(kinds) <= set(SEVERITY) or SEVERITY.index(kinds[1]) <= SEVERITY.index(kinds[0]):
        return None
    return f"{kinds[1]}, the original was {kinds[0]}"


def worst_of(found: Cell) -> str:
    """The layer that is furthest off."""
    worst = max(_errors(found), key=lambda each: math.inf if isinstance(each[1], str) else each[1], default=("-", 0.0))
    cast = f", cast to FP8: {found.cast[:2]}" if found.cast else ""
    return f"{worst[0]} off by {worst[1]}{cast}"


def _errors(found: Cell) -> Iterator[tuple[str, Any]]:
    for group in found.groups:
        for part, error in group["errors"].items():
            yield f"{group['module']}.{part}", error
    for kind, other in found.others.items():
        yield kind, other["error"]
