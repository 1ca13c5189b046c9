"""NVFP4 weights, as they are stored.

A weight is code x block scale x global scale: E2M1 codes, two a byte with the first in the low half; an E4M3 scale for
every 16 of them; one F32 for the matrix, which compressed-tensors stores as a divisor and ModelOpt as a multiplier.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
_BLOCK = 16


@dataclass(frozen=True)
class Packed:
    """``codes`` U8 [N, K / 2], ``blocks`` F8_E4M3 [N, K / 16], ``scale`` F32, one value, to multiply with;
    ``input_scale`` the same of the activations, None where they are not quantized."""

    codes: torch.Tensor
    blocks: torch.Tensor
    scale: torch.Tensor
    input_scale: torch.Tensor | None

    def products(self) -> torch.Tensor:
        """F32 [N, K] of codes and block scales: exact."""
        codes = torch.stack([self.codes & 15, self.codes >> 4], -1).flatten(-2).long()
        products: torch.Tensor = _E2M1[codes].unflatten(-1, (-1, _BLOCK)) * self.blocks.float().unsqueeze(-1)
        return products.flatten(-2)

    def dequantized(self) -> torch.Tensor:
        """F32 [N, K]: the product with the global scale is rounded once."""
        weight: torch.Tensor = self.products() * self.scale.float()
        return weight


def stored(tensors: dict[str, torch.Tensor], name: str) -> Packed | None:
    """The NVFP4 linear ``name`` of a checkpoint, or None where it is no such."""
    divisor, multiplier = tensors.get(f"{name}.weight_global_scale"), tensors.get(f"{name}.weight_scale_2")
    blocks = tensors.get(f"{name}.weight_scale")
    if blocks is None or blocks.dtype != torch.float8_e4m3fn:
        return None
    if divisor is not None and f"{name}.weight_packed" in tensors:
        given = tensors.get(f"{name}.input_global_scale")
        inputs = None if given is None else 1 / given
        return Packed(tensors[f"{name}.weight_packed"], blocks, 1 / divisor, inputs)
    if multiplier is not None and tensors[f"{name}.weight"].dtype == torch.uint8:
        return Packed(tensors[f"{name}.weight"], blocks, multiplier, tensors.get(f"{name}.input_scale"))
    return None
