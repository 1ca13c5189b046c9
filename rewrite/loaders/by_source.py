"""A family that no engine was run with: what can be said of it by the engines' source (the atlas).

The rule, all of it. What an engine makes of a family that it was not run with is "not known", but where

- the family's source says in full what is fused, and how stored names become the engine's: :func:`_unread`;
- nothing in the checkpoint is outside what was run: one scheme, no scales of a KV cache, no MTP layers, no tower around
  the language model, experts under the names that were run: :func:`_outside`;
- these versions of the engine were run, in another family, with the same form of checkpoint and the same fused layers:
  ``needs``, which ``versions.py`` compares with its facts. Block scales whose parts end on whole blocks, and a scale
  for each row, are served as stored whatever they are joined with: of these the form alone must have been run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain

from rewrite.loaders.lookups import LOOKUPS, SGLANG, Lookup, misread
from rewrite.loaders.measured import Measured, measured
from rewrite.loaders.outcome import Outcome
from rewrite.quantization.architectures import text_config
from rewrite.quantization.atlas import Source, find_sources
from rewrite.quantization.dialects.quark import Quark
from rewrite.quantization.kv_cache import is_kv_cache_scale
from rewrite.quantization.model import Kind, Model
from rewrite.quantization.scales import stored_layout

_SLOT_FOR_EACH = ("qkv", "merged")
_ALONE = ("row", "column", "replicated")


@dataclass(frozen=True)
class BySource:
    """What one release says of a checkpoint. ``unknown``: why its rules do not tell what is made of the fused groups.
    ``apart``: groups that it does not fuse. ``needs``: the fused layers, and "experts", of which a run must tell."""

    engine: str
    version: str
    where: str
    unknown: str | None
    apart: frozenset[str]
    needs: frozenset[str]
    misread: Mapping[Lookup, Outcome]


@dataclass(frozen=True, eq=False)
class Sources:
    """What each release that was read says of the model: looked up where no run says anything, once."""

    model: Model

    @cached_property
    def said(self) -> tuple[BySource, ...]:
        sources = find_sources(self.model.checkpoint.config.value)
        layers = tuple(_layers(self.model)) if sources else ()
        return tuple(_view(source, self.model, layers) for source in sources)

    @cached_property
    def measured(self) -> tuple[Measured, ...]:
        """The runs with a checkpoint like this."""
        return tuple(measured(self.model))


@dataclass(frozen=True)
class _Layers:
    """Quantized modules that are alike, and where they are parts of a group: its parts, and the last name of its
    parent."""

    kind: Kind
    parts: tuple[str, ...]
    parent: str
    safe: bool


def _layers(model: Model) -> Iterator[_Layers]:
    places = {
        module.name: (tuple(group.layer.modules), group.name.rpartition(".")[0].rpartition(".")[2])
        for group in model.groups.whole
        for module in group.modules
    }
    for kind in model.kinds:
        if not kind.first.plain and not kind.form.pattern.startswith("mtp."):
            for parts, parent in {places.get(name, ((), "")) for name in kind.names}:
                yield _Layers(kind, parts, parent, _is_safe(kind, bool(parts), model))


def _view(source: Source, model: Model, layers: tuple[_Layers, ...]) -> BySource:
    groups = model.groups.whole
    named = ", ".join(dict.fromkeys(group.layer.name for group in groups)) or "no layer"
    why = next(chain(_outside(model), _unread(source, model, layers)), None)
    return BySource(
        source.engine,
        source.version,
        f"{source.engine} {source.version}, {source.file}",
        None if why is None else f"{why}; fuses {named} by its source",
        frozenset(group.name for group in groups if source.layer_of(group.layer.modules) is None),
        frozenset(_rules_for(model, layers)),
        _misread(source, model),
    )


def _rules_for(model: Model, layers: tuple[_Layers, ...]) -> Iterator[str]:
    """The fused layers that are not served as they are stored by arithmetic alone."""
    fused = {tuple(group.layer.modules): group.layer.name for group in model.groups.whole}
    for each in layers:
        if not each.safe and ".experts." in each.kind.form.pattern:
            yield "experts"
        elif not each.safe and each.parts:
            yield fused[each.parts]


def _outside(model: Model) -> Iterator[str]:
    """What no run with another family tells anything about."""
    quantized = [kind for kind in model.kinds if not kind.first.plain]
    if not quantized:
        yield "finds nothing quantized, and was not run with the names of this family"
    if len({kind.first.scheme for kind in quantized}) > 1 or "MIXED" in model.dialect.name:
        yield "was not run with several schemes in this family"
    if any(True for _ in model.checkpoint.tensors_like(is_kv_cache_scale)):
        yield "was not run with scales of a KV cache in this family"
    if any(pattern.startswith("mtp.") for pattern in _patterns(model)) or _has_layers_beyond(model):
        yield "was not run with the MTP layers of this family"
    if any(not pattern.startswith(("model.layers.", "lm_head")) for pattern in _names(model)):
        yield "was not run with a language model inside another one in this family"
    for kind in model.kinds:
        if ".experts." in kind.form.pattern and not _EXPERTS_RUN.fullmatch(kind.form.pattern):
            yield f"was not run with experts of such names ({kind.names[0]})"


#: The names of experts in the families of versions.py.
_EXPERTS_RUN = re.compile(r".*\.mlp\.experts\.\d+\.(?:gate|up|down)_proj")


def _has_layers_beyond(model: Model) -> bool:
    """Whether there are more layers than the config says: of multi-token prediction (DeepSeek-V3, GLM)."""
    count = text_config(model.checkpoint.config.value).get("num_hidden_layers")
    beyond = f".layers.{count}."
    return any(beyond in name for kind in model.kinds for name in kind.names)


def _unread(source: Source, model: Model, layers: tuple[_Layers, ...]) -> Iterator[str]:
    """What the source does not say, or says in code that was not read."""
    if not source.whole:
        yield "finds the language model in a way that was not read"
    touched = any(old in f"{name}.weight" for name in _names(model) for old in source.inner)
    if not source.names_seen or touched:
        yield "renames modules in a way that was not read"
    if isinstance(model.dialect, Quark):
        yield "looks layers of AMD Quark up by names that were not read"
    if source.file.endswith("deepseek_v2.py") and _lacks_router_bias(model):
        yield "may have no place for e_score_correction_bias: config.json lacks topk_method"
    if source.alters:
        yield f"changes tensors before it loads them, in code that was not read ({source.alters[0]})"
    yield from _not_matrices(model)
    for each in layers:
        why = _of_layer(source, each)
        if why is not None:
            yield why


def _lacks_router_bias(model: Model) -> bool:
    stated = text_config(model.checkpoint.config.value).get("topk_method") is not None
    return not stated and any("e_score_correction_bias" in form.tensors for form in model.checkpoint.alike)


def _patterns(model: Model) -> Iterator[str]:
    yield from (kind.form.pattern for kind in model.kinds)


def _names(model: Model) -> Iterator[str]:
    yield from (kind.form.pattern for kind in model.kinds if not kind.first.plain)


def _not_matrices(model: Model) -> Iterator[str]:
    for form, names in model.checkpoint.alike.items():
        for kind, (dtype, shape) in form.tensors.items():
            if dtype in ("U8", "I8", "I32", "F8_E4M3", "F8_E5M2") and len(shape) > 2:
                yield f"has quantized tensors with {len(shape)} dimensions ({names[0]}.{kind})"


def _is_safe(kind: Kind, grouped: bool, model: Model) -> bool:
    """Whether the modules are served as they are stored whatever they are joined with: each row has its own scales, or
    they end on whole blocks. Of a group the engine's own check is asked: ``blocks.py``."""
    scheme, rows = kind.first.scheme, kind.first.weight.shape[0]
    if scheme is None or not scheme.fp8 or not kind.first.fp8:
        return False
    layout = stored_layout(kind.names[0], rows, model.checkpoint.tensors)
    if layout == "block" and scheme.layout == "block" and scheme.block is not None:
        return grouped or rows % scheme.block[0] == 0
    return layout == "channel" and scheme.layout == "channel" and scheme.per_token


def _of_layer(source: Source, each: _Layers) -> str | None:
    """Why what becomes of modules is not known, or None."""
    pattern, first = each.kind.form.pattern, each.kind.names[0]
    name = pattern.rpartition(".")[2]
    if ".experts." in pattern:
        read = any(name in names for names in source.experts)
        return None if read or each.safe else f"has experts with names that were not read ({first})"
    if each.parts and (layer := source.layer_of(each.parts)) is not None:
        known = layer.kind in _SLOT_FOR_EACH and (not layer.parents or each.parent in layer.parents)
        return None if known or each.safe else f"has code of its own for {layer.name} ({layer.kind})"
    sharing = next((layer for layer in source.layers if name in layer.parts), None)
    if sharing is not None and (each.parts or not _is_stored_alone(source, name)):
        return f"fuses {first} as a part of {sharing.name}, and not all parts are stored alike"
    known = each.safe or source.linears.get(name) in _ALONE
    return None if known else f"has a layer {first} of a kind that was not read"


def _is_stored_alone(source: Source, name: str) -> bool:
    """Whether a part of one layer is a layer on its own in another place: ``up_proj`` of an MLP without a gate."""
    return source.linears.get(name) in _ALONE and name not in ("q_proj", "k_proj", "v_proj", "gate_proj")


def _misread(source: Source, model: Model) -> Mapping[Lookup, Outcome]:
    """What goes wrong by the engine's ways to look layers up, with the names of this model."""
    known = {layer.name for layer in source.layers if layer.name in source.packed}
    also = {name: group.layer.also for group in model.groups.whole for name in [group.layer.name]}

    def knows_parts(_model_type: str, layer: str) -> bool:
        return layer in known or any(name in known for name in also.get(layer, ()))

    lookups = {
        lookup: replace(lookup, served_name=served, knows_parts=knows_parts)
        for lookup in LOOKUPS
        if (lookup is SGLANG) == (source.engine == "SGLang")
        for served in [lookup.served_name if lookup is SGLANG else source.served_name]
    }
    found = misread(model, tuple(lookups.values()))
    return {lookup: found[own] for lookup, own in lookups.items() if own in found}
