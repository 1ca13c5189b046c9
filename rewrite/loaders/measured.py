"""Families of the atlas that engines were run with: ``measured.json``, written by ``scripts/evidence.sh try_families``.

A checkpoint counts as one that was run where architecture, dialect, scheme and the quantized modules are the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from rewrite.quantization.architectures import text_config
from rewrite.quantization.dtypes import PLAIN_DTYPES
from rewrite.quantization.kv_cache import is_kv_cache_scale
from rewrite.quantization.model import Model

FILE = Path(__file__).with_name("measured.json")


@dataclass(frozen=True)
class Measured:
    """What a version of an engine was seen to make of such a checkpoint. ``agrees``: its rules say the same."""

    engine: str
    version: str
    seen: str
    agrees: bool
    why: str


def signature(model: Model) -> tuple[str, str, frozenset[str]]:
    """The architecture, how a checkpoint is quantized, and which modules are, with 0 for each number; and what else
    engines have code for: stacked quantized tensors, scales of a KV cache, MTP layers."""
    config = model.checkpoint.config.value
    stated = config.get("architectures")
    architecture = str(stated[0]) if isinstance(stated, list) and stated else ""
    quantized = [kind for kind in model.kinds if not kind.first.plain]
    schemes = sorted({str(kind.first.scheme.text) if kind.first.scheme else "none" for kind in quantized})
    names = {kind.form.pattern for kind in quantized}
    for form in model.checkpoint.alike:
        names |= {
            form.pattern for dtype, shape in form.tensors.values() if len(shape) > 2 and dtype not in PLAIN_DTYPES
        }
    if any(True for _ in model.checkpoint.tensors_like(is_kv_cache_scale)):
        names.add("scales of a KV cache")
    beyond = f".layers.{text_config(config).get('num_hidden_layers')}."
    if any(beyond in name or name.startswith("mtp.") for kind in model.kinds for name in kind.names):
        names.add("MTP layers")
    return architecture, f"{model.dialect.name}: {'; '.join(schemes)}", frozenset(names)


@lru_cache(maxsize=1)
def _record() -> Any:
    return json.loads(FILE.read_text(encoding="utf-8"))


def measured(model: Model) -> Iterator[Measured]:
    """All runs with such a checkpoint."""
    record = _record()
    architecture, scheme, modules = signature(model)
    for release, families in record["engines"].items():
        engine, _, version = release.partition(" ")
        for cell in families.get(architecture, ()):
            if cell["scheme"] == scheme and modules == frozenset(record["modules"][cell["modules"]]):
                yield Measured(engine, version, cell["seen"], "said" not in cell, cell.get("why", ""))
