"""The sizes of the models."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Geometry:
    """The sizes of one model; head counts stay even so that tensor parallelism of two can be tested."""

    hidden: int
    intermediate: int
    layer_types: tuple[str, ...]
    head_dim: int = 32
    gdn_head_dim: int = 32
    vision_hidden: int = 32
    heads: int = 4
    kv_heads: int = 2
    gdn_key_heads: int = 2
    gdn_value_heads: int = 4


GDN, ATTENTION = "linear_attention", "full_attention"
DEMO = Geometry(256, 128, (GDN, GDN, GDN, ATTENTION), head_dim=64, gdn_head_dim=64)
SMALL = Geometry(64, 64, (GDN, GDN, ATTENTION))
SMALL_MOE = Geometry(64, 32, (GDN, GDN, ATTENTION))
SMALL_PLAIN = Geometry(64, 64, (ATTENTION, ATTENTION))
TINY = Geometry(32, 32, (GDN, GDN, ATTENTION))
TINY_VISION = Geometry(32, 32, (GDN, GDN, ATTENTION), vision_hidden=8)
# Of the zoo: key heads of 64, so that q, k and v start at multiples of 128, as recipes with blocks of 128 need it.
DENSE = Geometry(128, 128, (GDN, GDN, ATTENTION), gdn_head_dim=64)
DENSE_WIDE = Geometry(128, 128, (GDN, GDN, ATTENTION), gdn_head_dim=64, vision_hidden=128)
MOE = Geometry(128, 64, (GDN, ATTENTION), gdn_head_dim=64)
PLAIN = Geometry(128, 128, (ATTENTION, ATTENTION))
