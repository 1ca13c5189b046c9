"""Scales: recognizing a layout, reading values, repeating bytes."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rewrite.checkpoint.header import TensorInfo
from rewrite.errors import CheckpointError, Unsupported
from rewrite.quantization.dtypes import decode
from rewrite.quantization.groups import Module, Partition
from rewrite.quantization.kv_cache import is_kv_cache_scale
from rewrite.quantization.scales import read_values, repeated_by_row

QKV = (Partition("q", 0, 2), Partition("k", 2, 4), Partition("v", 4, 8))


def module(shape: tuple[int, ...] | None) -> Module:
    scale = None if shape is None else TensorInfo("m.weight_scale", "F32", shape, 0, 0)
    return Module("m", QKV, TensorInfo("m.weight", "F8_E4M3", (8, 4), 0, 32), scale, None, None)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [((), "tensor"), ((1,), "tensor"), ((3,), "partition"), ((8, 1), "channel"), ((1, 1), "block"), ((2, 1), "block"),
     ((8,), "rows"), ((2,), None), (None, None), ((8, 1, 1), None)],
)  # fmt: skip
def test_layout_of(shape: tuple[int, ...] | None, layout: str | None) -> None:
    """By shape alone; None for what no loader would take."""
    assert module(shape).layout == layout


@given(st.binary(min_size=2, max_size=2))
def test_expanding_one_value_repeats_its_bits(raw: bytes) -> None:
    """NaN payloads and negative zeros included: bytes are bytes."""
    assert b"".join(data * count for data, count in repeated_by_row(QKV, "BF16", raw)) == raw * 8


def test_expanding_a_vector_follows_the_partitions() -> None:
    """Each row gets the scale of its partition."""
    fills = repeated_by_row(QKV, "F32", struct.pack("<3f", 1, 2, 3))
    assert b"".join(data * count for data, count in fills) == struct.pack("<8f", 1, 1, 2, 2, 3, 3, 3, 3)


@given(st.floats(width=16, allow_nan=False), st.sampled_from(["BF16", "F16", "F32", "F64"]))
def test_decode_agrees_with_torch(value: float, dtype: str) -> None:
    """For every dtype that scales come in."""
    kinds = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
    tensor = torch.tensor([value, -value], dtype=kinds[dtype])
    assert list(decode(dtype, tensor.view(torch.uint8).numpy().tobytes(), "x")) == tensor.tolist()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0, -1.0])
def test_scales_that_no_engine_survives_are_refused(bad: float) -> None:
    """Named, with the value found."""
    with pytest.raises(CheckpointError, match=r"shard: m\.weight_scale"):
        read_values(TensorInfo("m.weight_scale", "F32", (1,), 0, 4, "shard"), struct.pack("<f", bad))


def test_integer_scales_are_refused() -> None:
    """Not a dtype that a scale can have."""
    with pytest.raises(Unsupported, match="I32"):
        decode("I32", bytes(4), "x")


def test_names_of_the_scales_of_a_kv_cache() -> None:
    """As vLLM's ``maybe_remap_kv_scale_name`` has them."""
    names = ["self_attn.k_scale", "self_attn.v_proj.v_scale", "mixer.k_proj.k_scale", "self_attn.k_proj.output_scale"]
    assert all(is_kv_cache_scale(f"model.layers.0.{name}") for name in names)
    assert not is_kv_cache_scale("model.layers.0.mixer.k_proj.weight_scale")
