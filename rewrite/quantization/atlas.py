"""The atlas: which layers each engine fuses in each model, as read from the engines' own source.

``atlas.json`` is written by scripts/evidence/atlas. What an engine was *run* with: ``rewrite/loaders/versions.py``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from rewrite.quantization.architectures import text_config

NOT_SEEN = "not seen"  # the kind of a layer whose class was not found
_FILE = Path(__file__).with_name("atlas.json")


@dataclass(frozen=True)
class SourceLayer:
    """Stored modules in the order of their slots, and what an engine makes of them. ``kind`` is the class of the layer:
    "qkv" and "merged" have a slot for each part, "replicated" has one for all; "slots": a module has several.
    ``parents``: the only ones that it is in, where the engine's table says so."""

    name: str
    parts: tuple[str, ...]
    kind: str
    parents: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """What one release of an engine says of one model, with its language model."""

    engine: str
    version: str
    architecture: str
    file: str
    layers: tuple[SourceLayer, ...]
    experts: tuple[tuple[str, ...], ...] = ()  # gate, up, down; without a gate: up, down
    packed: frozenset[str] = frozenset()  # the layers whose parts the engine tells its quantization
    prefixes: Mapping[str, str] = field(default_factory=dict)  # of stored names, and what they become
    inside: Mapping[str, str] = field(default_factory=dict)  # other parts of them

    @property
    def slots(self) -> frozenset[tuple[object, ...]]:
        """What is fused in which order, and whether each part has a slot: by which class of these does not matter."""
        each = {"qkv", "merged"}
        return frozenset(
            (x.name, x.parts, each.issuperset(x.kind.split("|")) or x.kind, x.parents) for x in self.layers
        )

    def layer_of(self, parts: Iterable[str]) -> SourceLayer | None:
        """What becomes of exactly these parts."""
        wanted = tuple(parts)
        return next((layer for layer in self.layers if layer.parts == wanted), None)

    def served_name(self, name: str) -> str:
        """The name that the engine gives a module."""
        tensor = f"{name}.weight"
        for old, new in self.inside.items():
            tensor = tensor.replace(old, new)
        found = next((old for old in self.prefixes if tensor.startswith(old)), None)
        if found is not None:
            tensor = self.prefixes[found] + tensor.removeprefix(found)
        return tensor.removesuffix(".weight")


@lru_cache(maxsize=1)
def _atlas() -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads(_FILE.read_text(encoding="utf-8"))
    return found


def releases() -> tuple[str, ...]:
    """What was read: ``vLLM 0.32.0``."""
    return tuple(_atlas()["families"])


def architectures(release: str = "") -> frozenset[str]:
    """All that a release that was read, or any, has a class for."""
    families = _atlas()["families"]
    return frozenset(name for each in families if release in ("", each) for name in families[each])


def find_sources(config: Mapping[str, Any]) -> tuple[Source, ...]:
    """What engines say of the model of a config.json, by its ``architectures``; where it has none, by its
    ``model_type``. Empty: no engine that was read has a class for it."""
    stated = list(_stated(config))
    found = (_source(release, name, config) for release in releases() for name in stated)
    return tuple(source for source in found if source is not None)


def _stated(config: Mapping[str, Any]) -> Iterator[str]:
    names = config.get("architectures")
    if isinstance(names, list) and names:
        yield from (name for name in names[:1] if isinstance(name, str))
    elif isinstance(kind := config.get("model_type"), str) and kind in _atlas()["model_types"]:
        yield _atlas()["model_types"][kind]


def _source(release: str, architecture: str, config: Mapping[str, Any]) -> Source | None:
    families = _atlas()["families"][release]
    if architecture not in families:
        return None
    number, file = families[architecture]
    entry = _atlas()["models"][number]
    entries = [entry]
    for name in entry.get("inner", ()):
        names = [name] if name else list(_stated(text_config(config)))
        inner = [each for each in names if each in families and each != architecture]
        entries += [_atlas()["models"][families[each][0]] for each in inner]
    engine, _, version = release.partition(" ")
    return Source(
        engine,
        version,
        architecture,
        file,
        tuple(_layers(layer for each in entries for layer in each["layers"])),
        tuple(dict.fromkeys(tuple(names) for each in entries for names in each.get("experts", ()))),
        frozenset(name for each in entries for name in each.get("packed", ())),
        entry.get("prefixes", {}),
        entry.get("inside", {}),
    )


def _layers(stated: Iterable[tuple[str, list[str], str, list[str]]]) -> Iterator[SourceLayer]:
    """Of a model and its language model: the kind is what either says."""
    found: dict[tuple[str, tuple[str, ...]], SourceLayer] = {}
    for name, parts, kind, parents in stated:
        new = SourceLayer(name, tuple(parts), kind, tuple(parents))
        old = found.get((name, new.parts), new)
        only = {*old.parents, *new.parents} if old.parents and new.parents else ()
        known = new.kind if old.kind == NOT_SEEN else old.kind
        found[name, new.parts] = SourceLayer(name, new.parts, known, tuple(sorted(only)))
    yield from found.values()
