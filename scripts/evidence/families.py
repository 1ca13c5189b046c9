"""Writes small FP8 checkpoints of families that no table of rewrite names, by their real producers.

    PYTHONPATH=scripts PYTHON -m evidence.families FOLDER [NAME ...]

PYTHON is the environment of scripts/make_fixtures.sh, which has the producers. `try_families.py` judges what comes out.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from fixtures.build import build_model
from fixtures.by_llmcompressor import produce_llmcompressor
from fixtures.by_modelopt import produce_modelopt
from fixtures.fixture import Fixture
from fixtures.geometry import PLAIN
from fixtures.plain import plain_settings
from fixtures.qwen import multimodal_settings, vision_settings
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)


def granite() -> PreTrainedModel:
    """A Granite: multipliers of attention, embeddings and residuals, which no weight has."""
    return GraniteForCausalLM(GraniteConfig(**plain_settings(PLAIN)))


def gemma3() -> PreTrainedModel:
    """A Gemma 3, text only: norms around each block, and norms of q and k."""
    settings = plain_settings(PLAIN) | {"head_dim": PLAIN.head_dim, "sliding_window": 128}
    del settings["rope_parameters"]
    settings["layer_types"] = ["sliding_attention", "full_attention"]
    return Gemma3ForCausalLM(Gemma3TextConfig(**settings))


def qwen3_vl() -> PreTrainedModel:
    """A Qwen3-VL with its vision tower."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 4, 4], "mrope_interleaved": True}
    text = plain_settings(PLAIN) | {"head_dim": PLAIN.head_dim, "rope_parameters": rope}
    vision = vision_settings(PLAIN) | {"deepstack_visual_indexes": [0]}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **multimodal_settings())
    return Qwen3VLForConditionalGeneration(config)


def glm4_moe() -> PreTrainedModel:
    """A GLM 4.5: a dense layer, then one with experts and a shared one."""
    experts = {
        "head_dim": PLAIN.head_dim, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "use_qk_norm": True,
    }  # fmt: skip
    return Glm4MoeForCausalLM(Glm4MoeConfig(**plain_settings(PLAIN) | experts))


def mixtral() -> PreTrainedModel:
    """A Mixtral: experts in every layer."""
    return MixtralForCausalLM(
        MixtralConfig(**plain_settings(PLAIN), head_dim=PLAIN.head_dim, num_local_experts=4, num_experts_per_tok=2)
    )


ROUTERS: tuple[Any, ...] = ("lm_head", "re:.*mlp.gate$", "re:.*block_sparse_moe.gate$")
TABLE = (
    Fixture("granite", granite, produce_llmcompressor, ("lm_head",)),
    Fixture("gemma3", gemma3, produce_llmcompressor, ("lm_head",)),
    Fixture("qwen3_vl", qwen3_vl, produce_llmcompressor, ("lm_head", "re:.*visual.*")),
    Fixture("glm4_moe", glm4_moe, produce_llmcompressor, ROUTERS, spread_mlp=True),
    Fixture("mixtral", mixtral, produce_modelopt, ("*lm_head*", "*gate.*", "*router*"), spread_mlp=True),
)


def main() -> None:
    """Write those that are named, or all."""
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    for fixture in TABLE:
        if names and fixture.name not in names:
            continue
        with tempfile.TemporaryDirectory(prefix="family-") as scratch:
            model = build_model(fixture.model, Path(scratch) / "source", spread_mlp=fixture.spread_mlp)
            out = folder / fixture.name
            out.mkdir(parents=True, exist_ok=True)
            fixture.produce(model, out, fixture)
        print(f"{fixture.name}: {sorted(path.name for path in out.iterdir())}")


if __name__ == "__main__":
    main()
