"""Names, shapes and config of Qwen3.5 checkpoints as llm-compressor 0.14 writes them (see tests/fixtures/README.md)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

_FIXTURES = Path(__file__).parents[2] / "tests" / "fixtures"
_NVFP4 = "llmcompressor-qwen3_5-nvfp4"  # whose config says it
_BYTES = {"BF16": 2, "F8_E4M3": 1, "U8": 1, "F32": 4}
PERIOD = 4  # three Gated DeltaNet layers, then one of full attention


class Tensor(NamedTuple):
    """A tensor to make."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * _BYTES[self.dtype]

    @property
    def is_scale(self) -> bool:
        return self.name.endswith("_scale")


@dataclass(frozen=True)
class Model:
    """The sizes of a model. ``experts`` is 0 for a dense one; ``intermediate`` is then the MLP's, else an expert's."""

    fixture: str  # whose config.json this model's config is made from
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    experts: int = 0
    head_dim: int = 256
    key_heads: int = 16
    value_heads: int = 32
    linear_head_dim: int = 128
    vocabulary: int = 248320
    nvfp4: bool = False


def dense(layers: int) -> Model:
    """Qwen3.5-9B with another number of layers."""
    return Model("llmcompressor-qwen3_5-text", layers, hidden=4096, intermediate=12288, heads=16, kv_heads=4)


def moe(layers: int) -> Model:
    """Qwen3.5-35B-A3B with another number of layers."""
    return Model("llmcompressor-qwen3_5-moe", layers, hidden=2048, intermediate=512, heads=16, kv_heads=2, experts=256)


def tensors(model: Model) -> Iterator[Tensor]:
    """All tensors, in the order of the model's state dict, which decides what shares a shard."""
    found = _fp8_tensors(model)
    return (packed for tensor in found for packed in _as_nvfp4(tensor)) if model.nvfp4 else found


def _as_nvfp4(tensor: Tensor) -> Iterator[Tensor]:
    """What NVFP4 has in place of a tensor of FP8."""
    module, _, kind = tensor.name.rpartition(".")
    if kind == "input_scale":
        yield Tensor(f"{module}.input_global_scale", "F32", (1,))
    elif kind == "weight_scale":
        yield Tensor(f"{module}.weight_global_scale", "F32", (1,))
    elif tensor.dtype == "F8_E4M3":
        rows, columns = tensor.shape
        yield Tensor(f"{module}.weight_packed", "U8", (rows, columns // 2))
        yield Tensor(f"{module}.weight_scale", "F8_E4M3", (rows, columns // 16))
    else:
        yield tensor


def _fp8_tensors(model: Model) -> Iterator[Tensor]:
    yield Tensor("model.embed_tokens.weight", "BF16", (model.vocabulary, model.hidden))
    for number in range(model.layers):
        prefix = f"model.layers.{number}."
        yield from _attention(model, prefix) if _is_full(number) else _delta_net(model, prefix)
        yield from _experts(model, prefix) if model.experts else _mlp(model, f"{prefix}mlp.", model.intermediate)
        yield Tensor(f"{prefix}input_layernorm.weight", "BF16", (model.hidden,))
        yield Tensor(f"{prefix}post_attention_layernorm.weight", "BF16", (model.hidden,))
    yield Tensor("model.norm.weight", "BF16", (model.hidden,))


def config(model: Model) -> dict[str, Any]:
    """The fixture's config with this model's sizes. Embeddings are tied: an lm_head would be copied and no more."""
    value = _config(model.fixture)
    value |= {
        "head_dim": model.head_dim,
        "hidden_size": model.hidden,
        "layer_types": ["full_attention" if _is_full(i) else "linear_attention" for i in range(model.layers)],
        "linear_key_head_dim": model.linear_head_dim,
        "linear_num_key_heads": model.key_heads,
        "linear_num_value_heads": model.value_heads,
        "linear_value_head_dim": model.linear_head_dim,
        "num_attention_heads": model.heads,
        "num_hidden_layers": model.layers,
        "num_key_value_heads": model.kv_heads,
        "tie_word_embeddings": True,
        "vocab_size": model.vocabulary,
    }
    if model.experts:
        value |= {
            "moe_intermediate_size": model.intermediate,
            "num_experts": model.experts,
            "shared_expert_intermediate_size": model.intermediate,
        }
    else:
        value["intermediate_size"] = model.intermediate
    if model.nvfp4:
        value["quantization_config"] = _config(_NVFP4)["quantization_config"]
    value["quantization_config"]["ignore"] = list(_ignored(model))
    return value


def _config(fixture: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((_FIXTURES / fixture / "config.json").read_text(encoding="utf-8"))
    return value


def _is_full(layer: int) -> bool:
    return layer % PERIOD == PERIOD - 1


def _delta_net(model: Model, prefix: str) -> Iterator[Tensor]:
    prefix += "linear_attn."
    key, value = model.key_heads * model.linear_head_dim, model.value_heads * model.linear_head_dim
    yield Tensor(f"{prefix}dt_bias", "BF16", (model.value_heads,))
    yield Tensor(f"{prefix}A_log", "BF16", (model.value_heads,))
    yield Tensor(f"{prefix}conv1d.weight", "BF16", (2 * key + value, 1, 4))
    yield Tensor(f"{prefix}norm.weight", "BF16", (model.linear_head_dim,))
    yield from _linear(f"{prefix}out_proj", model.hidden, value)
    yield from _linear(f"{prefix}in_proj_qkv", 2 * key + value, model.hidden)
    yield from _linear(f"{prefix}in_proj_z", value, model.hidden)
    yield Tensor(f"{prefix}in_proj_b.weight", "BF16", (model.value_heads, model.hidden))
    yield Tensor(f"{prefix}in_proj_a.weight", "BF16", (model.value_heads, model.hidden))


def _attention(model: Model, prefix: str) -> Iterator[Tensor]:
    prefix += "self_attn."
    rows, kv_rows = model.heads * model.head_dim, model.kv_heads * model.head_dim
    yield from _linear(f"{prefix}q_proj", 2 * rows, model.hidden)  # twice: the output gate's rows are in it
    yield from _linear(f"{prefix}k_proj", kv_rows, model.hidden)
    yield from _linear(f"{prefix}v_proj", kv_rows, model.hidden)
    yield from _linear(f"{prefix}o_proj", model.hidden, rows)
    yield Tensor(f"{prefix}q_norm.weight", "BF16", (model.head_dim,))
    yield Tensor(f"{prefix}k_norm.weight", "BF16", (model.head_dim,))


def _mlp(model: Model, prefix: str, intermediate: int) -> Iterator[Tensor]:
    yield from _linear(f"{prefix}gate_proj", intermediate, model.hidden)
    yield from _linear(f"{prefix}up_proj", intermediate, model.hidden)
    yield from _linear(f"{prefix}down_proj", model.hidden, intermediate)


def _experts(model: Model, prefix: str) -> Iterator[Tensor]:
    prefix += "mlp."
    yield Tensor(f"{prefix}gate.weight", "BF16", (model.experts, model.hidden))
    for expert in range(model.experts):
        yield from _mlp(model, f"{prefix}experts.{expert}.", model.intermediate)
    yield from _mlp(model, f"{prefix}shared_expert.", model.intermediate)
    yield Tensor(f"{prefix}shared_expert_gate.weight", "BF16", (1, model.hidden))


def _linear(name: str, rows: int, columns: int) -> Iterator[Tensor]:
    yield Tensor(f"{name}.input_scale", "BF16", (1,))
    yield Tensor(f"{name}.weight_scale", "BF16", (1,))
    yield Tensor(f"{name}.weight", "F8_E4M3", (rows, columns))


def _ignored(model: Model) -> Iterator[str]:
    """llm-compressor lists the modules one by one, whatever patterns its recipe had."""
    for number in range(model.layers):
        if not _is_full(number):
            yield f"model.layers.{number}.linear_attn.in_proj_b"
            yield f"model.layers.{number}.linear_attn.in_proj_a"
        if model.experts:
            yield f"model.layers.{number}.mlp.gate"
            yield f"model.layers.{number}.mlp.shared_expert_gate"
    yield "lm_head"
