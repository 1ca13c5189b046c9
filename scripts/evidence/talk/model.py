"""The model: a Qwen3.5 small enough for a repository, with every kind of layer that the published ones have."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

BYTES = 256
VOCABULARY = 272  # 256 bytes, 5 special tokens, padded to a multiple of 16
LAYERS = ("linear_attention", "linear_attention", "linear_attention", "full_attention")
SETTINGS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": len(LAYERS),
    "layer_types": list(LAYERS),
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "max_position_embeddings": 1024,
    "initializer_range": 0.04,
    "tie_word_embeddings": False,
    "eos_token_id": BYTES,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}


def new_model() -> Qwen3_5ForCausalLM:
    """An untrained one. transformers starts every head with a memory of a few bytes; here it is some to a thousand."""
    model = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**SETTINGS))
    for name, parameter in model.named_parameters():
        if name.endswith("dt_bias"):
            step = torch.exp(torch.rand_like(parameter) * math.log(100) + math.log(1e-3))
            parameter.data.copy_(step + torch.log(-torch.expm1(-step)))  # softplus of it is the step
        if name.endswith("conv1d.weight"):
            torch.nn.init.uniform_(parameter, -0.5, 0.5)
    return model
