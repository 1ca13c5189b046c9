"""The model with its weights as a loader serves them, computed by transformers in F32.

What a loader puts into the slots of a fused layer is said by `rewrite.loaders`, which the recorded runs of the engines
hold to what they do. The arithmetic of requantizing is theirs: through float16, by the largest scale, clamped. Layers
that no loader garbles have the weights that the checkpoint means. Activations are not quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from loader_matrix import nvfp4
from loader_matrix.truth import read_tensors

from rewrite.api import open_checkpoint
from rewrite.loaders.behaviors import Slots, fill_every_slot, fill_slot_zero
from rewrite.loaders.layer import Layer
from rewrite.loaders.views import view_model
from rewrite.quantization.model import interpret

#: By what is written on the screen: which slots of a fused layer a loader fills. None: it does not fuse.
LOADERS: Mapping[str, Callable[[Layer], Slots] | None] = {
    "vLLM 0.19.1": fill_slot_zero,
    "vLLM 0.20 and newer": fill_every_slot,
    "as meant": None,
}
FP8 = torch.float8_e4m3fn
LARGEST, SENTINEL = torch.finfo(FP8).max, torch.finfo(torch.float32).min


def weights(folder: Path, loader: str) -> dict[str, torch.Tensor]:
    """All tensors of the model by the name of their parameter; those of quantized layers in F32, as served."""
    tensors = read_tensors(folder)
    found = {name: tensor.float() for name, tensor in tensors.items() if tensor.dtype == torch.bfloat16}
    modules = {name.rpartition(".")[0] for name in tensors if name.endswith((".weight", ".weight_packed"))}
    found |= {f"{name}.weight": meant for name in modules if (meant := _meant(tensors, name)) is not None}
    fill = LOADERS[loader]
    if fill is not None:
        for group in _fused(folder):
            found |= _served(group, fill(group), tensors)
    return {name: tensor for name, tensor in found.items() if not name.endswith("_scale")}


def _meant(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor | None:
    """What a quantized module means; None where it is not quantized."""
    packed = nvfp4.stored(tensors, name)
    if packed is not None:
        return packed.dequantized()
    codes, scale = tensors.get(f"{name}.weight"), tensors.get(f"{name}.weight_scale")
    if codes is None or scale is None:
        return None
    return codes.float() * scale.float().reshape(-1, 1)


def _fused(folder: Path) -> Iterator[Layer]:
    """Layers with one scale for a module. A scale for each row is served as it is."""
    model = interpret(open_checkpoint(folder))
    groups = view_model(model, "all").groups
    yield from (group for group in groups if all(each.layout in ("tensor", "nvfp4") for each in group.parts))


def _served(group: Layer, slots: Slots, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of the modules of a group."""
    largest = max(scale for scale in slots if scale is not None)
    parts: dict[str, list[torch.Tensor]] = {}
    for partition, slot in zip(group.parts, slots, strict=True):
        begin = sum(len(part) for part in parts.setdefault(partition.module, []))
        rows = slice(begin, begin + partition.rows)
        packed = nvfp4.stored(tensors, partition.module)
        if packed is None:
            codes = tensors[f"{partition.module}.weight"][rows]
            parts[partition.module].append(requantized(codes, SENTINEL if slot is None else slot, largest))
        else:  # one global scale for all: the smallest where divisors are stored, else the largest
            scales = [each.scale for each in group.parts if each.scale is not None]
            parts[partition.module].append(packed.products()[rows] * (min if group.divides else max)(scales))
    return {f"{module}.weight": torch.cat(rows) for module, rows in parts.items()}


def requantized(codes: torch.Tensor, slot: float, largest: float) -> torch.Tensor:
    """What an engine multiplies with: dequantized by the slot's scale, quantized by the largest."""
    half = (codes.half().float() * slot).half()
    return (half.float() / largest).clamp(-LARGEST, LARGEST).to(FP8).float() * largest


def model(folder: Path, loader: str) -> Any:
    """In F32, ready to compute."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    config = transformers.AutoConfig.from_pretrained(folder)
    del config.quantization_config
    found = getattr(transformers, config.architectures[0])._from_config(config, dtype=torch.float32).eval()
    found.load_state_dict(weights(folder, loader))
    return found
