"""Check 1: OUT is a sound checkpoint of the same tensors, and its config fits them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from safetensors import safe_open

from rewrite.checkpoint import INDEX_NAME, Checkpoint
from rewrite.groups import FP8_DTYPES, FusedGroup
from rewrite.header import TensorInfo
from rewrite.verification.result import Check, judge


def check_structure(source: Checkpoint, out: Checkpoint, groups: tuple[FusedGroup, ...]) -> Check:
    """Stock reader, same tensors in the same shards, ``total_size``, and the config read by compressed-tensors.

    That index and headers of OUT agree both ways is checked by opening it.
    """
    problems = [
        *_stock_reader(out),
        *_same_tensors(source, out, groups),
        *_total_size(out),
        *_config(source, out, groups),
    ]
    summary = f"{len(out.shards)} shards, {len(out.tensors)} tensors; index, headers and config agree"
    return judge("structure", problems, summary)


def allowed_changes(groups: tuple[FusedGroup, ...]) -> frozenset[str]:
    """The tensors that a conversion may change: the weight scales of the fused groups."""
    return frozenset(module.scale.name for group in groups for module in group.modules if module.scale)


def _stock_reader(out: Checkpoint) -> Iterator[str]:
    """safetensors' own reader sees the tensors that we see."""
    for shard in out.shards:
        try:
            with safe_open(out.root / shard.name, framework="pt") as file:
                stock = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
                seen = {name: (piece.get_dtype(), tuple(piece.get_shape())) for name, piece in stock.items()}
        except Exception as error:  # whatever the stock reader raises is the finding
            yield f"{shard.name}: the stock reader refuses it: {error}"
            continue
        if seen != {info.name: (info.dtype, info.shape) for info in shard.header.tensors}:
            yield f"{shard.name}: the stock reader sees other tensors"


def _same_tensors(source: Checkpoint, out: Checkpoint, groups: tuple[FusedGroup, ...]) -> Iterator[str]:
    for name in source.tensors.keys() - out.tensors.keys():
        yield f"{name}: missing"
    for name in out.tensors.keys() - source.tensors.keys():
        yield f"{name}: not in the source"
    may_change = allowed_changes(groups)
    for name in source.tensors.keys() & out.tensors.keys():
        (old_shard, old), (new_shard, new) = source.tensors[name], out.tensors[name]
        if old_shard.name != new_shard.name:
            yield f"{name}: moved from {old_shard.name} to {new_shard.name}"
        if old.dtype != new.dtype:
            yield f"{name}: dtype {old.dtype} became {new.dtype}"
        if old.shape != new.shape and not (name in may_change and new.shape == _rows(name, source)):
            yield f"{name}: shape {list(old.shape)} became {list(new.shape)}"


def _rows(scale: str, source: Checkpoint) -> tuple[int, ...]:
    """``[N, 1]`` for the N rows of the scale's weight."""
    return (source.tensors[scale.removesuffix("_scale")][1].shape[0], 1)


def _total_size(out: Checkpoint) -> Iterator[str]:
    metadata = (out.index.value.get("metadata") if out.index else None) or {}
    actual = sum(shard.header.data_bytes for shard in out.shards)
    if "total_size" in metadata and metadata["total_size"] != actual:
        yield f"{INDEX_NAME}: total_size is {metadata['total_size']}, the tensors take {actual} bytes"


def _config(source: Checkpoint, out: Checkpoint, groups: tuple[FusedGroup, ...]) -> Iterator[str]:
    """compressed-tensors' own parser and matcher give every module the scheme that its tensors have."""
    before, after = source.config.value.get("quantization_config"), out.config.value.get("quantization_config")
    if not isinstance(after, dict) or after.get("quant_method") != "compressed-tensors":
        if before != after:
            yield "config.json: quantization_config differs and is not compressed-tensors"
        return
    try:
        old, new = _Schemes(before), _Schemes(after)
    except Exception as error:  # pydantic's errors are many; any of them is the finding
        yield f"config.json: compressed-tensors cannot parse it: {str(error).splitlines()[0]}"
        return
    grouped = {module.name for group in groups for module in group.modules}
    for name, (_, info) in out.tensors.items():
        module = name.removesuffix(".weight")
        if module != name and len(info.shape) == 2:
            yield from _module_scheme(module, info, out, old if module not in grouped else None, new)
    for group in groups:
        yield from _fused_scheme(group, out, new)


class _Schemes:
    """compressed-tensors' reading of a quantisation config."""

    def __init__(self, value: object) -> None:
        import torch
        from compressed_tensors.quantization import QuantizationConfig

        config = QuantizationConfig.model_validate(value)
        self._targets = {target: scheme for scheme in config.config_groups.values() for target in scheme.targets}
        self._ignore = config.ignore or []
        self._linear = torch.nn.Linear(1, 1, device="meta")

    def of_module(self, name: str) -> Any:
        """The scheme of a linear layer, or None."""
        from compressed_tensors.utils.match import is_match, match_targets

        if not is_match(name, self._linear, self._targets, self._ignore):
            return None
        return self._targets[match_targets(name, self._linear, self._targets)[0]]

    def of_fused(self, name: str) -> Any:
        """The scheme of a fused layer as vLLM and SGLang look it up: by its name, then by its class, ``…Linear``."""
        named = (t for t in self._targets if t == name or (t.startswith("re:") and re.match(t[3:], name)))
        target = next(named, "Linear" if "Linear" in self._targets else None)
        return None if target is None else self._targets[target]


def _module_scheme(
    module: str, weight: TensorInfo, out: Checkpoint, old: _Schemes | None, new: _Schemes
) -> Iterator[str]:
    scheme = new.of_module(module)
    if old is not None and scheme != old.of_module(module):
        yield f"config.json: {module} has another scheme than in the source"
    scale = out.tensors.get(f"{module}.weight_scale")
    if weight.dtype in FP8_DTYPES and scale is not None:
        strategy = None if scheme is None or scheme.weights is None else str(scheme.weights.strategy)
        if strategy != (stored := _strategy(scale[1].shape, weight.shape)):
            yield f"config.json: {module} has strategy {strategy}, its scale {list(scale[1].shape)} is {stored}"


def _strategy(scale: tuple[int, ...], weight: tuple[int, ...]) -> str:
    if scale in ((), (1,)):
        return "tensor"
    return "channel" if scale == (weight[0], 1) else f"of shape {list(scale)}"


def _fused_scheme(group: FusedGroup, out: Checkpoint, new: _Schemes) -> Iterator[str]:
    scale = out.tensors.get(f"{group.modules[0].name}.weight_scale")
    if scale is None or not group.modules[0].quantised:
        return
    scheme = new.of_fused(group.name)
    strategy = None if scheme is None else str(scheme.weights.strategy)
    if strategy != (stored := _strategy(scale[1].shape, group.modules[0].weight.shape)):
        yield f"config.json: engines give the fused {group.name} strategy {strategy}, its scales are {stored}"
