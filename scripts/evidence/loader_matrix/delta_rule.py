"""The gated delta rule of one sequence from its start, in plain torch: for engines whose kernels need a card.

A state S of [key, value] for every head; each token decays it, reads what it holds for the key, writes the difference
to the value, and is read by the query:

    S <- exp(g) S;  S <- S + k (beta (v - k S));  o = q S
"""

from __future__ import annotations

import torch
from torch.nn.functional import conv1d, normalize, silu, softplus


def convolved(x: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
    """[tokens, channels]: each channel convolved with its own filter over the tokens before it, then SiLU, in F32."""
    width = filters.shape[-1]
    kernel = filters.float().reshape(-1, 1, width)
    before = torch.nn.functional.pad(x.float().T, (width - 1, 0))
    return silu(conv1d(before[None], kernel, groups=len(kernel))[0].T)


def delta_rule(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor
) -> torch.Tensor:
    """[tokens, heads, value]; q and k are [tokens, key heads, key], ``decay`` (in log space) and ``beta``
    [tokens, heads]."""
    heads = v.shape[1]
    q, k = (normalize(each.float(), dim=-1, eps=1e-6).repeat_interleave(heads // each.shape[1], 1) for each in (q, k))
    q = q * q.shape[-1] ** -0.5
    state = torch.zeros(heads, k.shape[-1], v.shape[-1])
    found = []
    for query, key, value, gate, rate in zip(q, k, v.float(), decay.float().exp(), beta.float(), strict=True):
        state = state * gate[:, None, None]
        held = torch.einsum("hk,hkv->hv", key, state)
        state = state + torch.einsum("hk,hv->hkv", key, rate[:, None] * (value - held))
        found.append(torch.einsum("hk,hkv->hv", query, state))
    return torch.stack(found)


def gates(
    a: torch.Tensor, b: torch.Tensor, a_log: torch.Tensor, dt_bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decay in log space, and beta, both [tokens, heads]."""
    return -a_log.float().exp() * softplus(a.float() + dt_bias.float()), b.float().sigmoid()
