"""vLLM: what fused NVFP4 layers compute once they are loaded, by vLLM's own emulation of NVFP4 on CPU.

Seeded activations go through a layer as served, with activations quantized as it quantizes them, and through the
weights that the original checkpoint means, in F64. Where a repair may fold a factor into what follows, that is
included: q, k and v after the convolution, q_a after its norm, an MLP as a whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engines import driver, trying
from engines.driver import Job

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from loader_matrix.truth import Truth

    #: Partition, its output as served and as meant.
    Outputs = Iterator[tuple[str, torch.Tensor, torch.Tensor]]

TOKENS = 64


def measure(model: Any, job: Job) -> dict[str, Any]:
    """Relative errors of the outputs, by layer and partition."""
    import torch

    from loader_matrix.truth import Truth, canonical

    truth, found = Truth(job.truth), {}
    for name, module in model.named_modules():
        own = canonical(name) or ""
        if own.endswith("mla_attn"):  # holds the layer once more
            continue
        torch.manual_seed(0)
        for layer, made in _ways(module):
            if layer is not None:
                errors = {part: float((a - b).norm() / b.norm()) for part, a, b in made(own, module, truth)}
                found[f"{own}.{layer.prefix.rpartition('.')[2]}"] = errors
    return {"outputs": found}


def _ways(module: torch.nn.Module) -> list[tuple[Any, Any]]:
    """A fused layer in the module, and how it is measured."""
    mlp = getattr(module, "gate_up_proj", None) if hasattr(module, "down_proj") else None
    return [
        (getattr(module, "in_proj_qkvz", None), _gated_delta_net),
        (getattr(module, "fused_qkv_a_proj", None), _latent),
        (mlp, _mlp),
    ]


def _gated_delta_net(own: str, module: Any, truth: Truth) -> Outputs:
    x, name = _activations(module.in_proj_qkvz), f"{own}.in_proj_qkv"
    weight = truth.linear(name).weight
    true, rows = x.double() @ weight.double().T, truth.rows(name)
    served = _apply(module.in_proj_qkvz, x)
    ours = _convolved(served[:, : len(weight)], module.conv1d.weight).split(rows, -1)
    yield from zip("qkv", ours, _convolved(true, truth.filters(f"{own}.conv1d")).split(rows, -1), strict=True)
    yield "z", served[:, len(weight) :], x.double() @ truth.linear(f"{own}.in_proj_z").weight.double().T


def _convolved(x: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
    """A depthwise convolution over the tokens."""
    from torch.nn.functional import conv1d

    kernel = filters.detach().double().reshape(len(filters), 1, -1)
    return conv1d(x.T[None], kernel, padding=kernel.shape[-1] - 1, groups=len(filters))[0, :, :TOKENS].T


def _latent(own: str, module: Any, truth: Truth) -> Outputs:
    x, parts = _activations(module.fused_qkv_a_proj), ("q_a_proj", "kv_a_proj_with_mqa")
    true = [x.double() @ truth.linear(f"{own}.{part}").weight.double().T for part in parts]
    served = _apply(module.fused_qkv_a_proj, x).split([each.shape[1] for each in true], -1)
    yield "q_a", _normed(served[0]), _normed(true[0])
    yield "kv_a", served[1], true[1]


def _normed(x: torch.Tensor) -> torch.Tensor:
    """As DeepSeek's ``q_a_layernorm`` does, without its weight."""
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def _mlp(own: str, module: Any, truth: Truth) -> Outputs:
    from torch.nn.functional import silu

    x = _activations(module.gate_up_proj)
    gate, up, down = (truth.linear(f"{own}.{part}_proj").weight.double() for part in ("gate", "up", "down"))
    a, b = _apply(module.gate_up_proj, x).chunk(2, -1)
    served = _apply(module.down_proj, (silu(a) * b).bfloat16())
    yield "mlp", served, (silu(x.double() @ gate.T) * (x.double() @ up.T)) @ down.T


def _activations(layer: Any) -> torch.Tensor:
    import torch

    return torch.randn(TOKENS, layer.input_size_per_partition).bfloat16()


def _apply(layer: Any, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = layer.quant_method.apply(layer, x).double()
    return out


if __name__ == "__main__":
    driver.run(("vllm", "compressed_tensors", "transformers"), trying.start, trying.load, measure)
