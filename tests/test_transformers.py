"""transformers with compressed-tensors computes the same logits from the original and the converted checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import rewrite
from tests.support import CONVERTIBLE, FIXTURES, raw_tensors, replace_tensor

transformers = pytest.importorskip("transformers")
#: Beside Qwen3.5 itself. Of llm-compressor only: transformers drops the scales of ModelOpt's dialect.
OTHERS = [name for name in CONVERTIBLE if name.startswith("llmcompressor-") and "qwen3_5" not in name]


def load(directory: Path, **options: Any) -> Any:
    """The model as its config names it, in BF16."""
    config = transformers.AutoConfig.from_pretrained(directory)
    return getattr(transformers, config.architectures[0]).from_pretrained(directory, dtype=torch.bfloat16, **options)


def logits(directory: Path) -> torch.Tensor:
    """[1, 30, vocabulary] of a fixed prompt."""
    return logits_of(load(directory))


def logits_of(model: Any) -> torch.Tensor:
    """The same of a loaded model."""
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(10, 40)[None]).logits
    return found


def test_logits_are_bit_identical(real: Path, tmp_path: Path) -> None:
    """transformers loads the modules one by one, so it reads the original right: the truth to compare with."""
    rewrite.convert(real, tmp_path / "out")
    before, after = logits(real), logits(tmp_path / "out")
    assert before.isfinite().all() and before.std() > 0
    assert torch.equal(before, after)


@pytest.mark.parametrize("name", OTHERS)
def test_logits_of_other_families_are_bit_identical(name: str, tmp_path: Path) -> None:
    """With every fused layer converted."""
    assert rewrite.convert(FIXTURES / name, tmp_path / "out", selection="all").changed
    before, after = logits(FIXTURES / name), logits(tmp_path / "out")
    assert before.isfinite().all() and before.std() > 0
    assert torch.equal(before, after)


def test_scales_of_the_kv_cache_are_found(tmp_path: Path) -> None:
    """Under ModelOpt's names it would make them up from whatever memory held."""
    rewrite.convert(FIXTURES / "modelopt-llama", tmp_path / "out", selection="all")
    stored = raw_tensors(FIXTURES / "modelopt-llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    for i, layer in enumerate(model.model.layers):
        for kind in "kv":
            raw = stored[f"model.layers.{i}.self_attn.{kind}_proj.{kind}_scale"][3]
            value = torch.frombuffer(bytearray(raw), dtype=torch.float32).bfloat16()
            assert torch.equal(getattr(layer.self_attn, f"{kind}_scale").data, value)


@pytest.mark.parametrize("name", [name for name in CONVERTIBLE if name.startswith("llmcompressor-")])
def test_dequantized_is_what_transformers_dequantizes(name: str, tmp_path: Path) -> None:
    """The same logits as the original, which transformers dequantizes by itself and whose activations stay plain."""
    from compressed_tensors.quantization import disable_quantization

    rewrite.convert(FIXTURES / name, tmp_path / "out", profile="dequantized")
    dequantize = transformers.CompressedTensorsConfig(dequantize=True)
    original = load(FIXTURES / name, quantization_config=dequantize)
    quantized = logits_of(original)
    original.apply(disable_quantization)
    before, after = logits_of(original), logits(tmp_path / "out")
    assert before.isfinite().all() and before.std() > 0
    assert torch.equal(before, after)
    assert not torch.equal(quantized, after), "activations are quantized there: the comparison can fail"


def test_the_comparison_can_fail(copy: Path, tmp_path: Path) -> None:
    """A scale that is off by its last bit shows in the logits."""
    rewrite.convert(copy, tmp_path / "out")
    name = "model.layers.0.linear_attn.in_proj_qkv.weight_scale"
    data = bytearray(raw_tensors(tmp_path / "out")[name][3])
    data[-2] ^= 1
    replace_tensor(tmp_path / "out", name, bytes(data))
    assert not torch.equal(logits(copy), logits(tmp_path / "out"))
