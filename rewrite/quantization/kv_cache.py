"""The scales of an FP8 KV cache, by the names that producers give them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Literal

from rewrite.checkpoint.checkpoint import Checkpoint
from rewrite.checkpoint.header import TensorInfo

#: What a conversion does with them.
KvScales = Literal["keep", "drop"]
KV_SCALES: tuple[KvScales, ...] = ("keep", "drop")

#: llm-compressor ``self_attn.k_scale``; ModelOpt ``self_attn.k_proj.k_scale``, of Nemotron-H ``mixer.k_proj.k_scale``;
#: Quark ``self_attn.k_proj.output_scale`` (vLLM ``maybe_remap_kv_scale_name``). ``q_scale`` quantizes the queries that
#: meet such a cache.
_SCALE = re.compile(
    r".*(?:attn|mixer)\.(?:attn\.)?(?:(?:(?:qkv|[qkv])_proj\.)?(?:[qkv]|kv)_scale|[kv]_proj\.output_scale)"
)


def is_kv_cache_scale(tensor: str) -> bool:
    """Whether a tensor of this name is a scale of the KV cache."""
    return tensor.endswith("_scale") and _SCALE.fullmatch(tensor) is not None


def stored_kv_scales(checkpoint: Checkpoint) -> Iterator[TensorInfo]:
    """Those that a checkpoint has."""
    return checkpoint.tensors_like(lambda info: is_kv_cache_scale(info.name))


def kv_cache_scales(tensors: Iterable[str]) -> Iterator[str]:
    """Those of ``tensors`` that are scales of the KV cache."""
    return filter(is_kv_cache_scale, tensors)
