"""The layouts of a weight scale: recognizing one, reading its values, and making it explicit.

Expanding a scale is repetition of its bytes: exact, dtype kept, nothing computed.
"""

from __future__ import annotations

import math

from rewrite.checkpoint.header import DTYPE_BITS, TensorInfo
from rewrite.errors import CheckpointError
from rewrite.quantization.dtypes import decode
from rewrite.quantization.groups import Module, Partition
from rewrite.quantization.scheme import ScaleLayout


def known_layout(module: Module) -> ScaleLayout:
    """How its weight scale is stored. Raises :class:`CheckpointError` for none, or a shape that is no layout."""
    layout = module.layout
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
#: 1e-12 / 448, and weights of 1e6 have no model. (llm-compressor 0.14 wrote 4e+28 for layers that its calibration never
#: ran.)
PLAUSIBLE = (1e-20, 1e6)


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
