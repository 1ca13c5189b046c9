"""How a cell of the loader matrix is made of what `rewrite try` measured; engines are run by scripts/evidence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loader_matrix.truth import Truth

from tests.support import FIXTURES

pytest.importorskip("tomllib")  # the scripts are for Python 3.11

from loader_matrix.drive import told

DENSE, KV = "llmcompressor-llama", "modelopt-llama"
STEM = "model.layers.{}."
FAILURE = {"type": "ValueError", "message": "no\nsuch", "own": False}


def row(module: str, *parts: tuple[str, object], **more: Any) -> dict[str, Any]:
    """A row of the driver: each part is a tensor and its error."""
    tensors = [{"tensor": f"{tensor}.weight", "rows": None, "error": error} for tensor, error in parts]
    scale = {"stated": 0.5, "served": [0.5, 0.5]}
    plain = {"module": module, "parameter": "weight", "shape": [8, 8], "held": "float8_e4m3fn", "cast": False}
    return {**plain, "parts": tensors, "input_scale": scale, **more}


def llama(*, but: str = "-") -> list[dict[str, Any]]:
    """Every linear of the fixture, as vLLM fuses them; layer 0's k is off."""
    rows = []
    for layer in range(len({name.split(".")[1] for name in Truth(FIXTURES / DENSE).quantized()})):
        stem = STEM.format(layer)
        for module, parts in {
            "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "self_attn.o_proj": ("self_attn.o_proj",),
            "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
            "mlp.down_proj": ("mlp.down_proj",),
        }.items():
            own = ((f"{stem}{part}", 0.25 if f"{layer}{part}" == "0self_attn.k_proj" else 0.0) for part in parts)
            rows += [] if module.endswith(but) else [row(f"{stem}{module}", *own)]
    return rows


def result(rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"layers": rows, "failure": None, "cache": {}, **more}


def test_partitions_have_the_names_of_the_predictions() -> None:
    found = told(result(llama()), Truth(FIXTURES / DENSE), 1)
    first = found["layers"][0]
    assert (first["layer"], first["module"], first["rank"]) == ("qkv_proj", "layers.0.self_attn.qkv_proj", 1)
    assert first["errors"] == {"q": 0.0, "k": 0.25, "v": 0.0} and first["input_scale"] == "equal"
    assert (found["strays"], found["not_compared"], found["kv_cache"]) == ([], [], "none")


def test_several_partitions_of_one_stored_linear_are_told_apart() -> None:
    """q, k and v of a Gated DeltaNet layer, z beside them; and what lies outside of the language model is left out."""
    stem = f"{STEM.format(0)}linear_attn."
    qkvz = row(
        f"{stem}in_proj_qkvz", *((f"{stem}in_proj_qkv", e) for e in (0.0, 0.5, "nan")), (f"{stem}in_proj_z", 2.0)
    )
    vision = row("visual.blocks.0.mlp.up", ("visual.blocks.0.mlp.up", 0.0), cast=True)
    truth = Truth(FIXTURES / "llmcompressor-qwen3_5-vl")
    truth.quantized = set  # type: ignore[method-assign]
    found = told(result([qkvz, vision]), truth, 0)
    (layer,) = found["layers"]
    assert list(layer["errors"]) == ["q", "k", "v", "z"] and layer["layer"] == "in_proj_qkvz"
    assert layer["errors"]["v"] != layer["errors"]["v"]
    assert found["strays"] == ["visual.blocks.0.mlp.up"]


def test_the_rows_of_packed_weights_are_known() -> None:
    """Of NVFP4, too."""
    truth = Truth(FIXTURES / "llmcompressor-qwen3_5-nvfp4")
    name = next(name for name in sorted(truth.nvfp4()) if name.endswith("in_proj_qkv"))
    assert sum(truth.rows(name)) == len(truth.linear(name).weight) and len(truth.rows(name)) == 3


def test_nothing_that_was_not_compared_may_pass() -> None:
    with pytest.raises(ValueError, match=r"were not compared: layers\.0\.mlp\.down_proj"):
        told(result(llama(but="down_proj")), Truth(FIXTURES / DENSE), 0)


@pytest.mark.parametrize(
    ("scale", "word"),
    [(None, "absent"), ({"stated": 0.5, "served": None}, "absent"), ({"stated": 0.5, "served": [0.5, 0.6]}, "differs")],
)
def test_scales_of_activations(scale: Any, word: str) -> None:
    rows = llama()
    rows[0]["input_scale"] = scale
    assert told(result(rows), Truth(FIXTURES / DENSE), 0)["layers"][0]["input_scale"] == word


def test_scales_of_the_cache_are_those_of_the_files() -> None:
    truth = Truth(FIXTURES / KV)
    truth.quantized = set  # type: ignore[method-assign]
    stored = truth.kv_scales()
    own: dict[str, dict[str, Any]] = {}
    for (layer, which), scale in stored.items():
        own.setdefault(f"model.{layer}self_attn.attn", {})[which] = scale
    rounded = {n: {w: torch.tensor(s).bfloat16().item() for w, s in each.items()} for n, each in own.items()}
    ones = {name: dict.fromkeys(each, 1.0) for name, each in own.items()}
    words = [told(result([], cache=cache), truth, 0)["kv_cache"] for cache in (own, rounded, ones, {})]
    assert words == ["equal", "rounded", "absent", "absent"]


def test_a_loader_that_raises_is_no_fault_of_the_run() -> None:
    """And what does not load without quantization either, alone, says nothing."""
    frames = ["vllm/a.py:1 load", "vllm/b.py:22 read", "torch/c.py:3 copy_"]
    loading, reference = FAILURE | {"where": frames}, FAILURE | {"where": []}
    truth = Truth(FIXTURES / DENSE)
    refused = told(result([], failure={"loading": loading, "reference": reference}), truth, 0)
    assert refused == {"error": {"type": "ValueError", "message": "no", "where": "vllm/b.py:read"}}
    assert told(result([], failure={"loading": None, "reference": reference}), truth, 0)["fault"]["where"] == "unknown"
