"""What is wrong in a config and needs no new tensor: every conversion mends it, whatever its profile."""

from __future__ import annotations

from dataclasses import replace

from rewrite.ledger.fault import Code
from rewrite.ledger.layers import plain_layers
from rewrite.ledger.ledger import header_faults
from rewrite.planning.profiles.base import Changes
from rewrite.quantization.model import Model
from rewrite.quantization.scheme import Dequantized, Dialect

#: The faults that an edit of config.json mends.
MENDED: frozenset[Code] = frozenset({"plain-layer", "fused-name", "mtp-format", "status"})


def with_mended_config(model: Model, changes: Changes) -> Changes:
    """``changes``, and a config that says of plain layers that they are plain, and of its status what is so."""
    if changes.dialect is not None and not changes.dialect.value:
        return changes  # no quantization is left
    found = {fault.code for fault in header_faults(model)} & MENDED
    if not found:
        return changes
    dialect, schemes = changes.dialect or model.dialect, dict(changes.schemes)
    plain = tuple(name for name in plain_layers(model) if dialect.scheme(name) is not None)
    if plain:
        dialect = _leaving_alone(plain, dialect, model)
        schemes |= dict.fromkeys(plain)
    if "status" in found:
        dialect = dialect.as_compressed()
    return replace(changes, dialect=dialect, schemes=schemes, mended=(*changes.mended, *sorted(found)))


def _leaving_alone(plain: tuple[str, ...], dialect: Dialect, model: Model) -> Dialect:
    """The config with the layers left alone, by their names and by those that engines fuse them to."""
    names = set(plain)
    fused = tuple(
        group.name
        for group in model.groups.whole
        if names.issuperset(module.name for module in group.modules) and group.name not in names
    )
    return dialect.without(Dequantized(plain, fused, (*plain, *fused)))
