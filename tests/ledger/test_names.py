"""What a module is, by its name."""

from __future__ import annotations

from typing import Any

import pytest

from rewrite.ledger.names import is_mtp, is_router, is_vision, mtp_layers

DEEPSEEK = {"num_hidden_layers": 61, "num_nextn_predict_layers": 1}


@pytest.mark.parametrize(
    ("module", "config", "found"),
    [
        ("mtp.fc", {}, True),
        ("model.mtp.layers.0.mlp", {}, True),
        ("model.mtpx.layers.0.mlp", {}, False),
        ("model.layers.61.mlp.up_proj", DEEPSEEK, True),
        ("layers.61.mlp.up_proj", DEEPSEEK, True),
        ("model.layers.60.mlp.up_proj", DEEPSEEK, False),
        ("model.layers.61.mlp.up_proj", {"num_hidden_layers": 61}, False),
        ("model.layers.61.mlp.up_proj", {**DEEPSEEK, "num_hidden_layers": "61"}, False),
        ("model.norm", DEEPSEEK, False),
    ],
)
def test_layers_that_predict_tokens(module: str, config: dict[str, Any], found: bool) -> None:
    assert is_mtp(module, config) == found


@pytest.mark.parametrize(
    ("config", "count"),
    [
        ({}, 0),
        ({"num_nextn_predict_layers": 1}, 1),
        ({"num_nextn_predict_layers": 0, "mtp_num_hidden_layers": 2}, 2),
        ({"num_nextn_predict_layers": True}, 0),
        ({"num_nextn_predict_layers": -1}, 0),
        ({"mtp_num_hidden_layers": None}, 0),
    ],
)
def test_how_many_of_them_a_config_promises(config: dict[str, Any], count: int) -> None:
    assert mtp_layers(config) == count


@pytest.mark.parametrize(
    ("module", "router", "vision"),
    [
        ("model.layers.0.mlp.gate", True, False),
        ("model.layers.0.block_sparse_moe.router.layer", True, False),
        ("model.layers.0.mlp.shared_expert_gate", True, False),
        ("model.layers.0.mlp.gate_proj", False, False),
        ("model.layers.0.mlp.gate.other", False, False),
        ("model.visual.blocks.0.mlp.gate", True, True),
        ("vision_tower.blocks.0.attn.q_proj", False, True),
        ("model.supervision.0.q_proj", False, False),
    ],
)
def test_routers_and_towers(module: str, router: bool, vision: bool) -> None:
    assert (is_router(module), is_vision(module)) == (router, vision)
