"""The fused layers of a family that no engine was run with: what the atlas says, where all parts are stored."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from rewrite.quantization.architectures import FusedLayer, PartitionSpec
from rewrite.quantization.atlas import SourceLayer, find_sources


def layers_by_source(
    config: Mapping[str, Any], stored: Collection[str]
) -> Iterator[tuple[FusedLayer, tuple[str, ...]]]:
    """The layers that any engine fuses, and the modules that they are in, of those ``stored``. Of layers that share a
    part the one counts that most releases have: what becomes of it in the others is not known."""
    counted: Counter[tuple[str, ...]] = Counter()
    names: dict[tuple[str, ...], dict[str, None]] = {}
    allowed: dict[tuple[str, ...], list[SourceLayer]] = {}
    for source in find_sources(config):
        for layer in source.layers:
            if layer.kind != "slots" and not layer.name.isdigit():
                counted[layer.parts] += 1
                names.setdefault(layer.parts, {}).setdefault(layer.name)
                allowed.setdefault(layer.parts, []).append(layer)
    taken: set[str] = set()
    for parts, _ in counted.most_common():
        parents = _parents(parts, allowed[parts], stored)
        if parents and not taken & set(parts):
            taken |= set(parts)
            first, *also = names[parts]
            lasts = sorted({parent.rpartition(".")[2] for parent in parents})
            parent = re.escape(lasts[0]) if len(lasts) == 1 else f"(?:{'|'.join(map(re.escape, lasts))})"
            modules = {part: (PartitionSpec(part.removesuffix("_proj")),) for part in parts}
            yield FusedLayer(first, parent, modules, also=tuple(also), by_source=True), parents


def _parents(parts: tuple[str, ...], layers: list[SourceLayer], stored: Collection[str]) -> tuple[str, ...]:
    """The modules that have all of these parts."""
    only = set() if any(not layer.parents for layer in layers) else {p for layer in layers for p in layer.parents}
    suffix = f".{parts[0]}"
    found = (name.removesuffix(suffix) for name in stored if name.endswith(suffix))
    return tuple(
        parent
        for parent in found
        if (not only or parent.rpartition(".")[2] in only) and all(f"{parent}.{part}" in stored for part in parts[1:])
    )
