"""What a module is, by its name: nothing else in a checkpoint tells."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

#: The layer that sends tokens to experts, and the one that weighs the shared expert: engines never quantize these.
_ROUTER = re.compile(
    r"(?:.*\.)?(?:mlp|moe|block_sparse_moe|feed_forward|ffn|mixer)\.(?:gate|router)(?:\.(?:proj|layer|wg))?"
    r"|(?:.*\.)?shared_experts?_gate"
)
#: Linear layers by the names that families give them: engines quantize these wherever the config says so.
LINEARS = frozenset(
    (
        *("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj"),
        *("in_proj_qkv", "in_proj_z", "in_proj_qkvz", "in_proj_a", "in_proj_b", "in_proj_ba", "out_proj"),
        *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "w1", "w2", "w3", "c_attn", "c_fc", "fc1", "fc2"),
    )
)
_VISION = re.compile(r"(?:.*\.)?(?:visual|vision_\w+|vpm|audio_\w+|multi_modal_projector|mm_projector|merger)\.")
_LAYER = re.compile(r"(?:.*\.)?layers\.(\d{1,9})\.")


def is_router(module: str) -> bool:
    return _ROUTER.fullmatch(module) is not None


def is_vision(module: str) -> bool:
    """Of a tower beside the language model."""
    return _VISION.match(module) is not None


def mtp_layers(config: Mapping[str, Any]) -> int:
    """How many layers for multi-token prediction a text config promises."""
    named = (config.get(key) for key in ("num_nextn_predict_layers", "mtp_num_hidden_layers"))
    return next((value for value in named if type(value) is int and value > 0), 0)


def is_mtp(module: str, config: Mapping[str, Any]) -> bool:
    """``mtp.`` of Qwen; of DeepSeek the layers behind the last one."""
    if module.startswith("mtp.") or ".mtp." in module:
        return True
    number, last = _LAYER.match(module), config.get("num_hidden_layers")
    return mtp_layers(config) > 0 and number is not None and type(last) is int and int(number[1]) >= last
