"""transformers with compressed-tensors: real are the library's config, layer and forward pass. Replaced: what torch
says of the card. There is no choice of kernels: this shows that the card does not matter."""

from __future__ import annotations

import copy
from typing import Any

import torch

from kernel_choice import card, operators
from kernel_choice.driver import main
from kernel_choice.layers import HIDDEN, PARTITIONS, Cell, attempt
from kernel_choice.platforms import Platform
from kernel_choice.schemes import SCHEMES, TOKENS, schemes

_PARTS = {"in_proj_qkv": sum(PARTITIONS[:3]), "in_proj_z": PARTITIONS[3]}  # transformers does not fuse them


def run(platform: Platform) -> tuple[str, list[Cell]]:
    """The version that is installed, and the cells of what it reads: compressed-tensors' dialect."""
    import transformers

    card.pretend(platform, available=False)
    return str(transformers.__version__), [cell for name in schemes("transformers") for cell in _of_scheme(name)]


def _of_scheme(scheme: str) -> list[Cell]:
    layers, error = attempt(lambda: _build(scheme), "compressed_tensors")
    if layers is None:
        return [{"scheme": scheme, "tokens": tokens, "outcome": "not built", "error": error} for tokens in TOKENS]
    return [{"scheme": scheme, "tokens": tokens, **_multiply(layers, tokens)} for tokens in TOKENS]


def _build(scheme: str) -> torch.nn.ModuleDict:
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationStatus,
        apply_quantization_config,
    )

    layers = torch.nn.ModuleDict({name: torch.nn.Linear(HIDDEN, rows, bias=False) for name, rows in _PARTS.items()})
    config: Any = copy.deepcopy(SCHEMES[scheme])
    apply_quantization_config(layers, QuantizationConfig(**config | {"quantization_status": QuantizationStatus.FROZEN}))
    for parameter in layers.parameters():
        parameter.data.fill_(1)
    return layers


def _multiply(layers: torch.nn.ModuleDict, tokens: int) -> Cell:
    operators.CALLS.clear()
    names = {type(layer).__name__ for layer in layers.values()}
    with operators.noted(torch.nn.functional, "linear"), torch.no_grad():
        out, error = attempt(
            lambda: [each(torch.ones(tokens, HIDDEN)) for each in layers.values()], "compressed_tensors"
        )
    kernel = ", ".join(sorted(names))
    if out is None:
        return {"outcome": "raises", "kernel": kernel, "error": error}
    return {"outcome": "runs", "kernel": kernel, "operators": sorted(set(operators.CALLS))}


if __name__ == "__main__":
    main(run, ("compressed_tensors", "kernel_choice"))
