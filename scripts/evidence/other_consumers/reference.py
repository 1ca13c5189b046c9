"""A checkpoint without any quantization whose weights are the truth: what a consumer makes of it is what it should make
of the quantized one.

So the names, orders and permutations of a consumer need not be known here: it applies them to both.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from loader_matrix.truth import Truth, canonical, read_tensors
from safetensors.torch import save_file

#: Tensors that only a quantization has.
_OF_A_QUANTIZATION = (
    *("weight_scale", "weight_scale_inv", "weight_scale_2", "weight_global_scale"),
    *("input_scale", "input_global_scale", "k_scale", "v_scale"),
)
_COPIED = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def write_reference(truth: Path, checkpoint: Path, out: Path) -> None:
    """Write the reference for `checkpoint` to `out`: the weights of `truth` in F32; rounded to BF16 where `checkpoint`
    has a BF16 weight, the best that it can be."""
    known, stored = Truth(truth), read_tensors(checkpoint)
    quantized, tensors = known.quantized(), {}
    for name, tensor in read_tensors(truth).items():
        module, _, kind = name.rpartition(".")
        short = canonical(module)
        if short in quantized and kind in ("weight", "weight_packed"):
            weight = known.linear(short).weight
            there = stored.get(f"{module}.weight")
            rounded = there is not None and there.dtype == torch.bfloat16
            tensors[f"{module}.weight"] = (weight.bfloat16() if rounded else weight).contiguous()
        elif kind not in _OF_A_QUANTIZATION:
            if tensor.dtype not in (torch.bfloat16, torch.float32, torch.float16):
                raise ValueError(f"{name}: {tensor.dtype}, of which the truth is not known")
            tensors[name] = tensor
    out.mkdir()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((truth / "config.json").read_text())
    config.pop("quantization_config", None)
    (out / "config.json").write_text(json.dumps(config))
    for name in _COPIED:
        if (truth / name).exists():
            shutil.copy(truth / name, out)
