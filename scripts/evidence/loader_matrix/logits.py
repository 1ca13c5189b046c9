"""Logits of NVFP4 checkpoints with the weights as engines serve them, held against those of the checkpoint as meant.

    scripts/evidence.sh logits [FIXTURE ...]

transformers computes the model; the weights are dequantized here, with the global scale that vLLM 0.32 gives a fused
layer (`compressed_tensors_w4a4_nvfp4.py`, `modelopt.py`, `compressed_tensors_moe_w4a4_nvfp4.py`): the smallest of a
layer where divisors are stored, the largest of multipliers, gate's of experts. Activations are not quantized.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

import rewrite
from loader_matrix import cases, nvfp4
from loader_matrix.truth import read_tensors

_FUSED = (
    ("in_proj_qkv", "in_proj_z"),
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj")
#: Layers that are converted and served, the others are as the original means them: by a part of their names.
LAYERS = {
    "in_proj_qkvz": ".linear_attn.",
    "fused_qkv_a_proj": ".self_attn.",
    "gate_up_proj, experts": ".mlp.",
    "all": ".",
}
#: What the model is computed in.
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
Tensors = Mapping[str, torch.Tensor]


def relative(found: torch.Tensor, true: torch.Tensor) -> float:
    """|found - true| / |true|."""
    return float((found.double() - true.double()).norm() / true.double().norm())


def logits(folder: Path, tensors: Tensors, served: str | None, dtype: torch.dtype) -> torch.Tensor:
    """Of 8 fixed sequences of 64 tokens, computed in ``dtype``. ``served``: part of the names of those fused layers
    that get one global scale; None: all weights are what they mean."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = getattr(transformers, config.architectures[0])._from_config(config, dtype=torch.float32).eval()
    _fill(model.state_dict(), tensors, dict(weights(tensors, served)))
    tokens = torch.randint(0, 256, (8, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found: torch.Tensor = model.to(dtype)(input_ids=tokens).logits
    return found


def mixed(original: Tensors, converted: Tensors, part: str) -> Tensors:
    """The tensors of ``original``, but those with ``part`` in their names of ``converted``."""
    return {name: (converted if part in name else original)[name] for name in original}


def weights(tensors: Tensors, served: str | None) -> Iterator[tuple[str, torch.Tensor]]:
    """Every NVFP4 module with its weights in float64."""
    names = [name.rpartition(".")[0] for name in tensors if name.endswith(("weight_global_scale", "weight_scale_2"))]
    packed = {name: found for name in names if (found := nvfp4.stored(dict(tensors), name)) is not None}
    scales = {name: own.scale.double() for name, own in packed.items()}
    if served is not None:
        scales |= _one_scale(scales, served, divides=any(name.endswith("weight_packed") for name in tensors))
    yield from ((name, own.products().double() * scales[name]) for name, own in packed.items())


def _one_scale(scales: Mapping[str, torch.Tensor], served: str, *, divides: bool) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for name in (name for name in scales if served in name):
        stem, _, last = name.rpartition(".")
        modules = next(([f"{stem}.{each}" for each in fused] for fused in _FUSED if last == fused[0]), [])
        own = [scales[module] for module in modules if module in scales]
        if own and len(own) == len(modules):
            taken = own[0] if _EXPERT.fullmatch(name) else min(own) if divides else max(own)
            found |= dict.fromkeys(modules, taken)
    return found


def _fill(state: dict[str, torch.Tensor], tensors: Tensors, packed: dict[str, torch.Tensor]) -> None:
    """Every weight of the language model; transformers has all experts of a layer in one tensor."""
    filled = set()
    for name, weight in [*packed.items(), *((n.removesuffix(".weight"), t) for n, t in tensors.items() if n in state)]:
        expert = _EXPERT.fullmatch(name)
        place = f"{name}.weight" if f"{name}.weight" in state else name
        if expert is None:
            target = state[place]
        elif expert[3] == "down":
            target = state[place := f"{expert[1]}.down_proj"][int(expert[2])]
        else:
            both = state[place := f"{expert[1]}.gate_up_proj"][int(expert[2])]
            target = both[: len(weight)] if expert[3] == "gate" else both[-len(weight) :]
        target.copy_(weight)
        filled.add(place)
    if missing := {name for name in state if name not in filled and "visual" not in name}:
        raise ValueError(f"no weights of {', '.join(sorted(missing)[:3])}")


def figures(
    fixture: str, folder: Path, kinds: tuple[str, ...] = tuple(DTYPES)
) -> Iterator[tuple[str, str, dict[str, float]]]:
    """(layers, what is served, errors against the original as it is meant) of a fixture, converted into ``folder``.
    The truth is computed in F32; "as meant" is the noise of each dtype."""
    source = cases.FIXTURES / fixture
    original = read_tensors(source)
    converted = {"nothing": original}
    for profile in ("rescaled", "exact"):
        rewrite.convert(source, folder / profile, profile=profile)
        converted[profile] = read_tensors(folder / profile)
    true = logits(source, original, None, torch.float32)

    def errors(tensors: Tensors, served: str | None) -> dict[str, float]:
        return {kind: relative(logits(source, tensors, served, DTYPES[kind]), true) for kind in kinds}

    yield "-", "as meant", errors(original, None)
    for layers, part in LAYERS.items():
        if _differs(original, part):
            for name, tensors in converted.items():
                yield layers, name, errors(mixed(original, tensors, part), part)


def _differs(tensors: Tensors, part: str) -> bool:
    meant, served = (dict(weights(tensors, each)) for each in (None, part))
    return any(not torch.equal(meant[name], served[name]) for name in meant)


def main(words: list[str]) -> None:
    """A Markdown table."""
    print("| fixture | layers | profile | F32 | BF16 |\n| --- | --- | --- | --- | --- |")
    for fixture in words or [name for name in cases.NVFP4_FIXTURES if not name.startswith("modelopt")]:
        with tempfile.TemporaryDirectory() as folder:
            for layers, profile, errors in figures(fixture, Path(folder)):
                numbers = " | ".join(f"{error:.1e}" for error in errors.values())
                print(f"| {fixture} | {layers} | {profile} | {numbers} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
