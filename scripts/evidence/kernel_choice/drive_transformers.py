"""transformers with compressed-tensors: real are the library's config, layer and forward pass. Replaced: what torch
says of the card. There is no choice of kernels: this shows that the card does not matter."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch

from kernel_choice import operators
from kernel_choice.driver import main, pretend
from kernel_choice.layers import HIDDEN, PARTITIONS, Cell, attempt, of_scheme
from kernel_choice.platforms import Platform
from kernel_choice.schemes import SCHEMES, schemes

_LIBRARY = "compressed_tensors"
_PARTS = {"in_proj_qkv": sum(PARTITIONS[:3]), "in_proj_z": PARTITIONS[3]}  # transformers does not fuse them


def run(platform: Platform) -> tuple[str, list[Cell]]:
    """The version that is installed, and the cells of what it reads: compressed-tensors' dialect."""
    import transformers

    pretend(platform, available=False)
    found = (
        of_scheme(name, "compressed_tensors", partial(_build, name), _multiply) for name in schemes("transformers")
    )
    return str(transformers.__version__), [cell for cells in found for cell in cells]


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


def _multiply(layers: torch.nn.ModuleDict, tokens: int, library: str) -> Cell:
    operators.CALLS.clear()
    names = {type(layer).__name__ for layer in layers.values()}
    with operators.noted(torch.nn.functional, "linear"), torch.no_grad():
        out, error = attempt(lambda: [each(torch.ones(tokens, HIDDEN)) for each in layers.values()], library)
    kernel = ", ".join(sorted(names))
    if out is None:
        return {"outcome": "raises", "kernel": kernel, "error": error}
    return {"outcome": "runs", "kernel": kernel, "operators": sorted(set(operators.CALLS))}


if __name__ == "__main__":
    main(run, (_LIBRARY, "kernel_choice"))
