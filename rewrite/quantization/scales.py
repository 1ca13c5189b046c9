"""The layouts of a weight scale: recognizing one, reading its values, and making it explicit.

Expanding a scale is repetition of its bytes: exact, dtype kept, nothing computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from rewrite.checkpoint.header import DTYPE_BITS, TensorInfo
from rewrite.errors import CheckpointError
from rewrite.quantization.dtypes import decode
from rewrite.quantization.groups import Module, Partition
from rewrite.quantization.scheme import ScaleLayout


def layout_of(module: Module) -> ScaleLayout | None:
    """How the module's weight scale is stored, by its shape; None for no scale, or a shape that is no layout."""
    if module.scale is None:
        return None if module.block_scale is None else "block"
    return layout_of_shape(module.scale.shape, module.weight.shape[0], len(module.partitions))


def stored_layout(name: str, rows: int, tensors: Mapping[str, TensorInfo]) -> ScaleLayout | None:
    """As :func:`layout_of` for a module ``name`` of ``rows`` rows that is one partition, by its tensors."""
    scale = tensors.get(f"{name}.weight_scale")
    if scale is not None:
        return layout_of_shape(scale.shape, rows)
    blocks = tensors.get(f"{name}.weight_scale_inv") or tensors.get(f"{name}.scale")
    return None if blocks is None else "tensor" if blocks.shape in ((), (1,)) else "block"


def layout_of_shape(shape: tuple[int, ...], rows: int, partitions: int = 1) -> ScaleLayout | None:
    """The layout of a scale of ``shape`` for a weight of ``rows`` rows in so many partitions."""
    if shape in ((), (1,)):
        return "tensor"
    if shape == (rows, 1):
        return "channel"
    if shape == (partitions,):
        return "partition"
    if shape == (rows,):
        return "rows"
    return "block" if len(shape) == 2 else None


def known_layout(module: Module) -> ScaleLayout:
    """As :func:`layout_of`. Raises :class:`CheckpointError` where there is none."""
    layout = layout_of(module)
    if layout is None:
        raise CheckpointError(
            "An FP8 weight has no scale" if module.scale is None else "A weight scale has an unknown shape",
            where=f"{module.name}.weight_scale",
            expected=f"() or [1], [{len(module.partitions)}] or [{module.weight.shape[0]}, 1]",
            found=None if module.scale is None else list(module.scale.shape),
        )
    return layout


def bad_values(values: tuple[float, ...]) -> list[float]:
    """The values that no scale may have, as no engine can serve them: NaN, infinite, zero, negative."""
    return [value for value in values if not (math.isfinite(value) and value > 0)]


#: Where the scales of trained weights and activations lie, with orders of magnitude to spare: producers keep them above
#: 1e-12 / 448, and weights of 1e6 have no model.
PLAUSIBLE = (1e-20, 1e6)


def implausible_values(values: tuple[float, ...]) -> list[float]:
    """Positive values that no training leads to: what memory held where a producer set no scale (llm-compressor 0.14
    wrote 4e+28 for layers that its calibration never ran)."""
    return [value for value in values if 0 < value < PLAUSIBLE[0] or PLAUSIBLE[1] < value < math.inf]


def read_values(scale: TensorInfo, raw: bytes) -> tuple[float, ...]:
    """The values of a floating-point scale from its bytes.

    Raises :class:`CheckpointError` for one that is NaN, infinite, zero or negative.
    """
    where = f"{scale.shard}: {scale.name}"
    values = decode(scale.dtype, raw, where)
    for value in bad_values(values):
        raise CheckpointError(
            "A scale is not a positive number",
            where=where,
            expected="finite and above 0",
            found=str(value),
            hint="calibration failed for this layer: quantize the model again",
        )
    return values


def repeated_by_row(partitions: tuple[Partition, ...], dtype: str, raw: bytes) -> tuple[tuple[bytes, int], ...]:
    """The values of a channel scale ``[N, 1]`` as (bytes of one value, rows): from one value (``()``, ``[1]``) or one
    per partition (``[P]``)."""
    width = DTYPE_BITS[dtype] // 8
    values = [raw[i : i + width] for i in range(0, len(raw), width)]
    if len(values) == 1:
        return ((values[0], sum(p.rows for p in partitions)),)
    return tuple((value, p.rows) for value, p in zip(values, partitions, strict=True))
