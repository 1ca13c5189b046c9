"""The model: a Qwen3.5 small enough for a repository, with every kind of layer that the published ones have."""

from __future__ import annotations

import math

import torch
from producers.geometry import ATTENTION, GDN, Geometry
from producers.inputs import BYTES
from producers.models import dense
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

__all__ = ["BYTES", "SETTINGS", "new_model"]

LAYERS = (GDN, GDN, GDN, ATTENTION)
SETTINGS = dense(Geometry(128, 384, LAYERS, gdn_head_dim=64)) | {
    "max_position_embeddings": 1024,
    "initializer_range": 0.04,
    "tie_word_embeddings": False,
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
