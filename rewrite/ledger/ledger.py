"""Every fault of a checkpoint, found in one place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from weakref import WeakKeyDictionary

from rewrite.ledger.cache import cache_faults
from rewrite.ledger.config import config_faults
from rewrite.ledger.fault import Fault, merged
from rewrite.ledger.layers import layer_faults
from rewrite.ledger.missing import missing_faults
from rewrite.ledger.values import value_faults
from rewrite.quantization.groups import FusedGroup, find_lookalikes
from rewrite.quantization.model import Model


def faults(model: Model, groups: Iterable[FusedGroup] = ()) -> tuple[Fault, ...]:
    """Everything that headers, config and scales show; ``groups`` are the fused layers that the question is about."""
    return (*group_faults(model, groups), *header_faults(model), *value_faults(model))


_FOUND: WeakKeyDictionary[Model, tuple[Fault, ...]] = WeakKeyDictionary()  # a model does not change: found once


def header_faults(model: Model) -> tuple[Fault, ...]:
    """Those that headers and config show: no scale is read."""
    if model not in _FOUND:
        found = (layer_faults(model), config_faults(model), cache_faults(model), missing_faults(model))
        _FOUND[model] = tuple(merged(fault for some in found for fault in some))
    return _FOUND[model]


def group_faults(model: Model, groups: Iterable[FusedGroup]) -> Iterator[Fault]:
    """Those of fused layers that the question is about."""
    names = find_lookalikes(model.checkpoint)
    if names:
        model_type = model.checkpoint.config.value.get("model_type")
        found = f"{model_type!r} with modules that engines may fuse"
        yield Fault("architecture", names[0], found, "a model_type that rewrite knows", "report the architecture")
    for group in groups:
        if group.quantized_in_part:
            yield Fault(
                "group-in-part",
                group.name,
                "no engine that fuses these modules can serve them",
                "all of its modules in one format",
                "quantize all of them, or none",
            )
