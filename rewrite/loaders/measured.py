"""Families of the atlas that engines were run with: ``measured.json``, written by ``scripts/evidence.sh try_families``.

A checkpoint counts as one that was run where architecture, dialect and scheme are the same, and of each parent the same
modules are quantized as in a run that agrees with the rules: engines fuse what has one parent only, so experts in one
run and attention in another one are enough. Where a run of a part of it disagrees, nothing is claimed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from rewrite.quantization.architectures import first_class, text_config
from rewrite.quantization.dtypes import PLAIN_DTYPES
from rewrite.quantization.kv_cache import stored_kv_scales
from rewrite.quantization.model import Kind, Model

FILE = Path(__file__).with_name("measured.json")
_NUMBER = re.compile(r"(?<![^.])[0-9]+(?![^.])")  # as rewrite.checkpoint.forms has it


@dataclass(frozen=True)
class Measured:
    """What a version of an engine was seen to make of such a checkpoint. ``agrees``: its rules say the same. ``seen``:
    "" where it was run in parts."""

    engine: str
    version: str
    seen: str
    agrees: bool
    why: str


def signature(model: Model) -> tuple[str, str, frozenset[str]]:
    """The architecture, how a checkpoint is quantized, and of which parents, with 0 for each number, which modules are:
    ``model.layers.0.mlp: down_proj gate_proj up_proj``, of several schemes with the number of it. Where none is,
    ``model.layers.0.mlp: (down_proj gate_proj up_proj)``. And what else engines have code for: stacked quantized
    tensors, scales of a KV cache, MTP layers, a head that is not as the config says."""
    config = model.checkpoint.config.value
    schemes = sorted({_scheme(kind) for kind in model.kinds if not kind.first.plain})
    found = _states(model, schemes)
    for form in model.checkpoint.alike:
        for dtype, shape in form.tensors.values():
            if len(shape) > 2 and dtype not in PLAIN_DTYPES:
                found.add(form.pattern)
            elif len(shape) == 3 and re.search("expert|moe", form.pattern):
                found.add(f"{form.pattern}: stacked")  # plain: engines may quantize them
    if any(True for _ in stored_kv_scales(model.checkpoint)):
        found.add("scales of a KV cache")
    kinds = [text_config(config).get(key) for key in ("hybrid_override_pattern", "layers_block_type")]  # Nemotron-H
    listed = [len(each) for each in kinds if isinstance(each, str | list)]
    beyond = f".layers.{listed[0] if listed else text_config(config).get('num_hidden_layers')}."
    if any(beyond in name or name.startswith("mtp.") for kind in model.kinds for name in kind.names):
        found.add("MTP layers")
    heads = (kind.first for kind in model.kinds if kind.form.pattern.endswith("lm_head"))
    if model.dialect.name.startswith("modelopt") and any(head.plain and head.scheme is not None for head in heads):
        found.add("a plain lm_head that the config quantizes")  # engines make a quantized one of some families
    return first_class(config), f"{model.dialect.name}: {'; '.join(schemes)}", frozenset(found)


def _scheme(kind: Kind) -> str:
    return str(kind.first.scheme.text) if kind.first.scheme else "none"


def _states(model: Model, schemes: list[str]) -> set[str]:
    """Layer by layer: some may be left plain."""
    plain: dict[str, set[str]] = {}
    quantized: dict[str, set[str]] = {}
    for kind in model.kinds:
        of = plain if kind.first.plain else quantized
        number = f" {schemes.index(_scheme(kind))}" if len(schemes) > 1 and not kind.first.plain else ""
        for name in kind.names:
            parent, _, last = name.rpartition(".")
            of.setdefault(parent, set()).add(last + number)
    states = {(parent, f"{' '.join(sorted(own))}") for parent, own in quantized.items()}
    states |= {(parent, f"({' '.join(sorted(own))})") for parent, own in plain.items() if parent not in quantized}
    return {f"{_NUMBER.sub('0', parent)}: {own}" for parent, own in states}


def _of_interest(states: frozenset[str], ever: frozenset[str]) -> frozenset[str]:
    """Without plain modules that no run has ``ever`` quantized: routers, towers."""
    found = set()
    for state in states:
        parent, plain, own = state.rstrip(")").partition(": (")
        kept = [name for name in own.split() if f"{parent}.{name}" in ever]
        found |= {f"{parent}: ({' '.join(kept)})"} if plain and kept else set() if plain else {state}
    return frozenset(found)


def _quantized(states: frozenset[str]) -> Iterator[str]:
    """All modules that are, without what else is in a signature."""
    for parent, _, own in (state.partition(": ") for state in states):
        if not own.startswith("("):
            yield from (f"{parent}.{name}" for name in own.split() if not name.isdigit())


@lru_cache(maxsize=1)
def _record() -> Any:
    return json.loads(FILE.read_text(encoding="utf-8"))


def measured(model: Model) -> Iterator[Measured]:
    """All runs with such a checkpoint; where there is none, of all its parts."""
    record = _record()
    architecture, scheme, states = signature(model)
    for release, families in record["engines"].items():
        engine, _, version = release.partition(" ")
        runs = [(cell, frozenset(record["modules"][cell["modules"]])) for cell in families.get(architecture, ())]
        ever = frozenset(name for _, own in runs for name in _quantized(own))
        alike = [(cell, _of_interest(own, ever)) for cell, own in runs if cell["scheme"] == scheme]
        wanted = _of_interest(states, ever)
        same = [cell for cell, own in alike if own == wanted]
        parts = [own for cell, own in alike if "said" not in cell]
        against = [
            cell for cell, own in alike if "said" in cell and {each for each in own if ": (" not in each} <= wanted
        ]
        if same or against:
            for cell in same or against[:1]:
                yield Measured(engine, version, cell["seen"], "said" not in cell, cell.get("why", ""))
        elif parts and wanted <= frozenset[str]().union(*parts):
            yield Measured(engine, version, "", True, "")
