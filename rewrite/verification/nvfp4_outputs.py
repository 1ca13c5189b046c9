"""NVFP4 in the check of the outputs: what fused layers compute, by the engines' own emulation of NVFP4.

Activations are quantized as vLLM 0.32 does on a card without FP4 (``ref_nvfp4_quant``): an E4M3 scale for every 16 of
them, E2M1 codes. Products are exact. An engine multiplies the codes and block scales of a fused layer with one global
scale, which it takes from the stored ones. What it makes of OUT must be what the weights of IN mean, within what
rescaling can explain; a module that was folded is that much larger, which ``nvfp4`` has found made up for behind it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from rewrite.checkpoint.checkpoint import Checkpoint
from rewrite.verification import gemm
from rewrite.verification.nvfp4 import multiplier, same_bytes
from rewrite.verification.packed import PackedLayer, PackedModule, read_value
from rewrite.verification.reader import read_rows
from rewrite.verification.result import PartitionNumbers, Settings
from rewrite.verification.sample import Sample

_BLOCK = 16
_VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)  # of E2M1
_BETWEEN = (_VALUES[:-1] + _VALUES[1:]) / 2  # ties go to the even code
_LARGEST = 448 * 6  # of activations, in units of their global scale


def packed_numbers(
    source: Checkpoint, out: Checkpoint, layers: Iterable[PackedLayer], settings: Settings, sample: Sample
) -> Iterator[PartitionNumbers]:
    """A row for each module. Numbers of weights, too, are about the sampled rows."""
    for number, layer in enumerate(layers):
        columns = layer.modules[0].codes.shape[1] * 2
        sides = _Side.of(source, layer), _Side.of(out, layer)
        largest = 1.0 if sides[1].inputs is None else _LARGEST * sides[1].inputs
        x = gemm.activations(columns, settings.tokens, settings.seed + number, None).double() * largest
        x = x.bfloat16().double()
        activations = [x if side.inputs is None else quantized(x, side.inputs) for side in sides]
        for module in layer.modules:
            yield _numbers(layer.name, module, sides, activations, sample)


@dataclass(frozen=True)
class _Side:
    """What an engine takes for the global scales of a whole layer; ``inputs`` None: activations stay as they are."""

    checkpoint: Checkpoint
    weights: float
    inputs: float | None

    @classmethod
    def of(cls, checkpoint: Checkpoint, layer: PackedLayer) -> _Side:
        """The largest that is stored, be it a divisor (vLLM ``weight_global_scale.max()``) or not."""
        infos = [module.input_scale for module in layer.modules if module.input_scale is not None]
        stored = [read_value(checkpoint, info) for info in infos]
        scales = [read_value(checkpoint, module.scale) for module in layer.modules]
        taken = [max(scales), max(stored, default=0.0)]
        if layer.modules[0].divides:
            taken = [1 / value if value else 0.0 for value in taken]
        return cls(checkpoint, taken[0], taken[1] if stored else None)


def _numbers(
    layer: str, module: PackedModule, sides: tuple[_Side, _Side], x: list[torch.Tensor], sample: Sample
) -> PartitionNumbers:
    before, after = sides
    own, new = (multiplier(side.checkpoint, module) for side in sides)
    is_rescaled = own != new and not same_bytes(before.checkpoint, after.checkpoint, module.blocks)
    factor = 1.0 if is_rescaled else new / own
    rows = sample.of(module.name, module.partition)
    codes, blocks = _rows(before.checkpoint, module, rows)
    true = codes * blocks * own
    found_codes, found_blocks = _rows(after.checkpoint, module, rows)
    fixed, out = codes * blocks * before.weights, found_codes * found_blocks * after.weights / factor
    reference = x[1] @ true.T
    outputs = {"fixed": x[0] @ fixed.T, "out": x[1] @ out.T}
    slack = 2.0**-40 * (x[1].abs() @ true.abs().T) + 1e-300
    bound = slack
    if is_rescaled:
        bound = slack + x[1].abs() @ (codes.abs() * torch.clamp(blocks.abs() * own / 16, min=new / 512)).T
    used = float(((outputs["out"] - reference).abs() / bound).nan_to_num(torch.inf).max()) if reference.numel() else 0.0
    reason = "rescaled" if is_rescaled else "folded" if factor != 1 else "agrees"
    if used > 1:
        reason = f"outputs differ from those of the weights of IN by {used:.3g} times what is explained"
    served = _relative(fixed, true), _relative(outputs["fixed"], reference)  # every version takes one scale
    return PartitionNumbers(
        layer,
        module.name.rpartition(".")[2],
        weights_before=served[0],
        weights_fixed=served[0],
        weights_out=_relative(out, true),
        outputs_before=served[1],
        outputs_fixed=served[1],
        outputs_out=_relative(outputs["out"], reference),
        bound_used=used if is_rescaled else None,
        verdict="FAILED" if used > 1 else "ok",
        reason=reason,
    )


def _rows(checkpoint: Checkpoint, module: PackedModule, rows: tuple[range, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """The values of the codes and of the block scales of some rows, both [n, K] float64."""
    raw, blocks = (
        torch.from_numpy(read_rows(checkpoint, info.name, rows).copy()) for info in (module.codes, module.blocks)
    )
    codes = torch.stack((raw & 15, raw >> 4), -1).reshape(len(raw), -1)  # two codes a byte, the low one first
    values = _VALUES[(codes & 7).long()] * torch.where(codes >= 8, -1.0, 1.0).double()
    return values, blocks.view(torch.float8_e4m3fn).double().repeat_interleave(_BLOCK, 1)


def quantized(x: torch.Tensor, scale: float) -> torch.Tensor:
    """[tokens, K] float64: activations after FP4, by the global ``scale`` that they are multiplied with."""
    blocks = x.reshape(len(x), -1, _BLOCK)
    steps = blocks.abs().amax(-1, keepdim=True) / 6 / scale if scale else torch.zeros_like(blocks[..., :1])
    steps = steps.float().clamp(max=448).to(torch.float8_e4m3fn).double() * scale
    units = torch.where(steps > 0, blocks / steps, 0.0)
    code = torch.bucketize(units.abs(), _BETWEEN)
    tie = (code < 7) & (code % 2 == 1) & (units.abs() == _BETWEEN[code.clamp(max=6)])
    return (_VALUES[code + tie] * units.sign() * steps).reshape(x.shape)


def _relative(found: torch.Tensor, true: torch.Tensor) -> float:
    norm = float(true.norm())
    return float((found - true).norm()) / norm if norm else 0.0
