"""What the verification reads in configs of other dialects than compressed-tensors'."""

from __future__ import annotations

from typing import Any

import pytest

from rewrite.verification.configs import OtherSchemes, StatedScheme, dialect_key

STATIC, DYNAMIC = StatedScheme("tensor", "static"), StatedScheme("tensor", "dynamic")
FP8 = {"quant_method": "fp8", "modules_to_not_convert": ["a.head"]}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8", "exclude_modules": ["a.head", "*.vision*"]}


def mixed(algorithm: object) -> dict[str, Any]:
    return {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a.up": {"quant_algo": algorithm}, "a.odd": 3}}


@pytest.mark.parametrize(
    ("value", "module", "found"),
    [
        (FP8, "a.up", DYNAMIC),
        ({**FP8, "activation_scheme": "static"}, "a.up", STATIC),
        ({**FP8, "activation_scheme": "dynamic"}, "a.up", DYNAMIC),
        ({**FP8, "weight_block_size": [128, 64]}, "a.up", StatedScheme("block", "dynamic", (128, 64))),
        ({**FP8, "weight_block_size": [128]}, "a.up", StatedScheme("block", "dynamic")),
        (FP8, "a.head", None),
        ({**FP8, "modules_to_not_convert": ["*"]}, "a.up", DYNAMIC),
        (MODELOPT, "a.up", STATIC),
        (MODELOPT, "a.head", None),
        (MODELOPT, "a.head2", STATIC),
        (MODELOPT, "a.vision.up", None),
        ({**MODELOPT, "exclude_modules": None}, "a.head", STATIC),
        ({**MODELOPT, "exclude_modules": [3, "a.up"]}, "a.up", None),
        ({**MODELOPT, "quant_algo": "NVFP4"}, "a.up", None),
        ({}, "a.up", None),
        (mixed("FP8"), "a.up", STATIC),
        (mixed("fp8_per_channel_per_token"), "a.up", StatedScheme("channel", "token")),
        (mixed("FP8_PB_WO"), "a.up", StatedScheme("block", "dynamic")),
        (mixed("NVFP4"), "a.up", StatedScheme("NVFP4", "static", fp8=False)),
        (mixed("FP8"), "a.down", None),
        (mixed("FP8"), "a.odd", None),
        ({**mixed("FP8"), "quantized_layers": 3}, "a.up", None),
    ],
)
def test_schemes(value: dict[str, Any], module: str, found: StatedScheme | None) -> None:
    assert OtherSchemes(value).of_module(module) == found


@pytest.mark.parametrize(
    ("value", "key"),
    [
        ({"quant_method": "compressed-tensors"}, ("compressed-tensors",)),
        ({"config_groups": {}}, ("compressed-tensors",)),
        ({"config_groups": {}, "quant_method": "modelopt"}, ("modelopt", None)),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, ("modelopt", "FP8")),
        ({}, (None, None)),
    ],
)
def test_dialects(value: dict[str, Any], key: tuple[object, ...]) -> None:
    assert dialect_key(value) == key
