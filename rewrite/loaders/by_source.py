"""What the engines' source says of a checkpoint (the atlas), and what they were seen to make of one like it.

The rule, all of it: a family that ``versions.py`` has no fact for is "not known", but where an engine was run with a
checkpoint like this one (``measured.py``) and did what its rules say. Its source alone is not enough. It tells which
layers are fused, and so what ``--groups all`` repairs; it does not tell which of them get a quantization at all. Rules
that hold for other families and the source together were wrong in 10 of 155 checkpoints that were then run: SGLang
0.5.23 has no scales for ``qkv_proj`` of StableLM, vLLM 0.32.0 casts ``lm_head`` of EXAONE-MoE to FP8.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from rewrite.loaders.lookups import LOOKUPS, SGLANG, Lookup, misread
from rewrite.loaders.measured import Measured, measured
from rewrite.loaders.outcome import Outcome
from rewrite.quantization.atlas import Source, find_sources
from rewrite.quantization.model import Model


@dataclass(frozen=True)
class BySource:
    """What one release says of a checkpoint. ``apart``: groups that it does not fuse; ``misread``: what goes wrong by
    its ways to look layers up, with the names of this model."""

    engine: str
    version: str
    slots: frozenset[tuple[object, ...]]
    apart: frozenset[str]
    misread: Mapping[Lookup, Outcome]


@dataclass(frozen=True, eq=False)
class Sources:
    """Looked up where no fact says anything, once."""

    model: Model

    @cached_property
    def said(self) -> tuple[BySource, ...]:
        return tuple(_view(source, self.model) for source in find_sources(self.model.checkpoint.config.value))

    @cached_property
    def measured(self) -> tuple[Measured, ...]:
        """The runs with a checkpoint like this."""
        return tuple(measured(self.model))


def _view(source: Source, model: Model) -> BySource:
    apart = (group.name for group in model.groups.whole if source.layer_of(group.layer.modules) is None)
    return BySource(source.engine, source.version, source.slots, frozenset(apart), _misread(source, model))


def _some_parts_are_listed(source: Source, model: Model) -> str:
    """The first fused layer of which the config leaves plain what is stored, but not what is not: Gemma 4 stores no
    ``v_proj`` in some layers. vLLM 0.32 asks for all by their names ("some but not all shards")."""
    for layer in source.layers if model.dialect.name.startswith("modelopt") else ():
        first, *others = (f".{part}" for part in layer.parts)
        for kind in model.kinds if layer.kind != "slots" else ():
            if not kind.form.pattern.endswith(first) or not kind.first.plain:
                continue
            for parent in (name.removesuffix(first) for name in kind.names):
                absent = [f"{parent}{other}" for other in others if f"{parent}{other}" not in model.kind_of]
                if 0 < len(absent) < len(others) and any(model.dialect.scheme(name) for name in absent):
                    return f"{parent}.{layer.name}"
    return ""


def _misread(source: Source, model: Model) -> Mapping[Lookup, Outcome]:
    known = {layer.name for layer in source.layers if layer.name in source.packed}
    also = {group.layer.name: group.layer.also for group in model.groups.whole}

    if source.engine == "vLLM" and (name := _some_parts_are_listed(source, model)):
        return dict.fromkeys(
            LOOKUPS, Outcome("not known", f"may take some parts of {name} for quantized: not all are stored")
        )

    def knows_parts(_model_type: str, layer: str) -> bool:
        return layer in known or any(name in known for name in also.get(layer, ()))

    lookups = {
        lookup: replace(lookup, served_name=served, knows_parts=knows_parts)
        for lookup in LOOKUPS
        if (lookup is SGLANG) == (source.engine == "SGLang")
        for served in [lookup.served_name if lookup is SGLANG else source.served_name]
    }
    found = misread(model, tuple(lookups.values()))
    said = {lookup: found.get(lookup, found.get(own)) for lookup, own in lookups.items()}
    return {lookup: outcome for lookup, outcome in said.items() if outcome is not None}
