"""Dropping the scales of an FP8 KV cache, with any profile: some consumers do not know them."""

from __future__ import annotations

from dataclasses import replace

from rewrite.ledger.cache import states_kv_cache
from rewrite.planning.profiles.base import Changes
from rewrite.quantization.kv_cache import stored_kv_scales
from rewrite.quantization.model import Model


def without_kv_scales(model: Model, changes: Changes) -> Changes:
    """``changes``, and the scales of the KV cache dropped; the config states no quantized KV cache then."""
    names = [info.name for info in stored_kv_scales(model.checkpoint)]
    if not names and not states_kv_cache(model):
        return changes
    dialect = (changes.dialect or model.dialect).without_kv_cache()
    mended = changes.mended if names else (*changes.mended, "kv-no-scale")
    return replace(changes, edits={**changes.edits, **dict.fromkeys(names)}, dialect=dialect, mended=mended)
