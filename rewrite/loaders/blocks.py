"""FP8 weights with a scale for each block of rows and columns: what engines refuse of them.

Engines cut the scales of a fused layer at the borders of its partitions, so these must be borders of blocks. vLLM
0.17.0 to 0.32.0 check it in ``fp8_utils.py`` (``validate_fp8_block_shape``) for ``fp8`` and compressed-tensors; SGLang
0.5.9 to 0.5.23 there and in ``fp8.py``, which also counts the last partition. Both check experts, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from rewrite.loaders.experts import is_expert
from rewrite.quantization.architectures import text_config
from rewrite.quantization.dialects.compressed_tensors import CompressedTensors
from rewrite.quantization.groups import FusedGroup
from rewrite.quantization.model import Model
from rewrite.quantization.scheme import Scheme

Block = tuple[int, int]


@dataclass(frozen=True)
class BlockLayer:
    """A fused layer, or the experts of a layer, with block scales: ``rows`` are those of its partitions, ``slots``
    those of the slots that SGLang has for a layer that is stored fused. ``class_block``: the block that the target
    ``Linear`` of a compressed-tensors config states; None without one."""

    name: str
    rows: tuple[int, ...]
    slots: tuple[int, ...]
    block: Block
    class_block: Block | None
    experts: bool = False

    @property
    def kind(self) -> tuple[object, ...]:
        """The same for layers that engines treat alike."""
        return self.name.rpartition(".")[2], self.rows, self.block


def block_layers(model: Model) -> tuple[BlockLayer, ...]:
    """The layers with block scales that engines cut: one of each kind."""
    kinds: dict[tuple[object, ...], BlockLayer] = {}
    for layer in (*_fused(model), *_experts(model)):
        kinds.setdefault(layer.kind, layer)
    return tuple(kinds.values())


def _fused(model: Model) -> Iterator[BlockLayer]:
    for group in model.groups.whole:
        block = _block(group.modules[0].scheme)
        if block is None or not all(module.fp8 for module in group.modules):
            continue
        rows = tuple(p.rows for module in group.modules for p in module.partitions)
        yield BlockLayer(group.name, rows, _slots(group, rows, model), block, _class_block(model))


def _experts(model: Model) -> Iterator[BlockLayer]:
    for kind in model.kinds:
        block, pattern = _block(kind.first.scheme), kind.form.pattern
        if block is None or not kind.first.fp8 or not is_expert(pattern) or pattern.startswith("mtp."):
            continue
        rows = (kind.first.weight.shape[0],)
        for name in kind.names if pattern.endswith((".gate_proj", ".w1")) else ():
            if name.rpartition(".")[0].endswith(".0"):
                yield BlockLayer(name.rpartition(".0.")[0], rows, rows, block, _class_block(model), experts=True)


def _block(scheme: Scheme | None) -> Block | None:
    return scheme.block if scheme is not None and scheme.fp8 and scheme.layout == "block" else None


def _class_block(model: Model) -> Block | None:
    return _block(model.dialect.scheme_of_class()) if isinstance(model.dialect, CompressedTensors) else None


def _slots(group: FusedGroup, rows: tuple[int, ...], model: Model) -> tuple[int, ...]:
    """SGLang has several slots for Qwen3-Next's layers, which are stored fused (``models/qwen3_next.py``)."""
    if len(rows) > 1 or group.layer.name not in ("in_proj_qkvz", "in_proj_ba"):
        return rows
    if group.layer.name == "in_proj_ba":
        return (rows[0] // 2, rows[0] // 2)
    config = text_config(model.checkpoint.config.value)
    heads = config.get("linear_num_key_heads"), config.get("linear_key_head_dim")
    if not all(type(value) is int and value > 0 for value in heads):
        return rows
    key = int(heads[0] or 0) * int(heads[1] or 0)
    value = (rows[0] - 2 * key) // 2
    return (key, key, value, value) if value > 0 else rows


def torn(layers: Iterable[BlockLayer], *, slots: bool, every_part: bool) -> BlockLayer | None:
    """The first layer with a partition that ends inside a block. Engines allow that for the last one, unless
    ``every_part``. ``slots``: as SGLang has them."""
    for layer in layers:
        parts = layer.slots if slots else layer.rows
        checked = parts if layer.experts or (every_part and len(parts) > 1) else parts[:-1]
        if any(rows % layer.block[0] for rows in checked):
            return layer
    return None
