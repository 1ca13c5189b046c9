"""What is wrong in a config and needs no new tensor: every conversion mends it, whatever its profile."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from rewrite.ledger.fault import Code
from rewrite.ledger.layers import plain_layers
from rewrite.ledger.ledger import header_faults
from rewrite.planning.profiles.base import Changes
from rewrite.quantization.dialects.base import Dialect
from rewrite.quantization.dialects.modelopt import ModelOpt
from rewrite.quantization.model import Model
from rewrite.quantization.scheme import Dequantized

#: The faults that an edit of config.json mends: layers that are left alone, and a status.
OF_PLAIN_LAYERS: frozenset[Code] = frozenset({"plain-layer", "fused-name", "ignore-pattern", "mtp-format"})
_MANY = 64
_NUMBER = re.compile(r"(?<=\.)[0-9]+(?=\.)")
_ESCAPED_NUMBER = re.compile(r"(?<=\\\.)[0-9]+(?=\\\.)")
MENDED = OF_PLAIN_LAYERS | {"status"}


def with_mended_config(model: Model, changes: Changes) -> Changes:
    """``changes``, and a config that says of plain layers that they are plain, and of its status what is so."""
    if changes.dialect is not None and not changes.dialect.value:
        return changes  # no quantization is left
    found = {fault.code for fault in header_faults(model)} & MENDED
    if not found:
        return changes
    dialect, schemes = changes.dialect or model.dialect, dict(changes.schemes)
    torn = _torn(model, changes)
    by_engines = "ignore-pattern" in found and isinstance(dialect, ModelOpt)
    plain = tuple(n for n in plain_layers(model) if n not in torn and (by_engines or dialect.scheme(n) is not None))
    if plain:
        dialect = _leaving_alone(plain, dialect, model)
        schemes |= dict.fromkeys(plain)
    if "status" in found:
        dialect = dialect.as_compressed()
    if not plain:
        found -= OF_PLAIN_LAYERS
    if not found:
        return changes
    return replace(changes, dialect=dialect, schemes=schemes, mended=(*changes.mended, *sorted(found)))


def _torn(model: Model, changes: Changes) -> frozenset[str]:
    """The layers that engines fuse with others that stay quantized: left alone, they would still be read with these."""
    stay = {m.name for group in model.groups.whole for m in group.modules if not m.plain}
    stay.difference_update(name for name, scheme in changes.schemes.items() if scheme is None)
    groups = ({module.name for module in group.modules} for group in model.groups.whole)
    return frozenset(name for names in groups if names & stay for name in names)


def _leaving_alone(plain: tuple[str, ...], dialect: Dialect, model: Model) -> Dialect:
    """The config with the layers left alone, by their names and by those that engines fuse them to."""
    names = set(plain)
    fused = tuple(
        group.name
        for group in model.groups.whole
        if names.issuperset(module.name for module in group.modules) and group.name not in names
    )
    return dialect.without(Dequantized(plain, fused, tuple(_targets((*plain, *fused), model))))


def _targets(names: tuple[str, ...], model: Model) -> Iterator[str]:
    """The names; where there are many that differ in numbers only, as of experts, one pattern for them, if no quantized
    layer has such a name."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(_NUMBER.sub("0", name), []).append(name)
    quantized = {_NUMBER.sub("0", kind.form.pattern) for kind in model.kinds if not kind.first.plain}
    for shape, own in alike.items():
        if len(own) <= _MANY or shape in quantized:
            yield from own
        else:
            tail = re.escape(own[0].removeprefix("model.").removeprefix("language_model."))
            yield f"re:.*{_ESCAPED_NUMBER.sub('[0-9]+', tail)}$"
