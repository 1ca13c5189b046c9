"""The compressed-tensors dialect against compressed-tensors' own matcher."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import is_match, match_targets
from hypothesis import example, given
from hypothesis import strategies as st

from rewrite import open_checkpoint
from rewrite.errors import ConfigError, Unsupported
from rewrite.quantization.dialects import read_dialect
from rewrite.quantization.dialects.compressed_tensors import CompressedTensors
from rewrite.quantization.dialects.fp8 import Fp8
from rewrite.quantization.scheme import Dequantized, Layers
from tests.support import FIXTURES, QKVZ, compressed_tensors_schemes, edit_json

TEMPLATE = json.loads((FIXTURES / "llmcompressor-qwen3_5-text" / "config.json").read_text())["quantization_config"]
MODULES = [
    *(f"model.layers.{i}.linear_attn.in_proj_{part}" for i in (0, 1) for part in ("qkv", "z", "a")),
    "model.layers.0.mlp.up_proj",
    "lm_head",
]
QKVZ_MODULES = {name for name in MODULES if name.endswith(("qkv", "z"))}
LAYERS = Layers(frozenset(MODULES), (), frozenset(MODULES))
ONLY = Layers(frozenset(QKVZ_MODULES), (), frozenset(QKVZ_MODULES))
TARGETS = [
    "Linear",
    "re:.*",
    "re:.*in_proj.*",
    "re:.*in_proj_qkv$",
    "re:.*linear_attn.in_proj_z",
    "re:model.layers.0.*",
    *MODULES,
]


def config_of(groups: list[list[str]], ignore: list[str] | tuple[str, ...] = (), **changes: Any) -> dict[str, Any]:
    """A config with a group for each list of targets, made from a real one."""
    base = TEMPLATE["config_groups"]["group_0"]
    named = {f"group_{i}": {**base, "targets": targets} for i, targets in enumerate(groups)}
    return {**TEMPLATE, "config_groups": named, "ignore": list(ignore), **changes}


def stock_strategy(value: dict[str, Any], module: str) -> str | None:
    """What compressed-tensors itself makes of a module."""
    config = QuantizationConfig.model_validate(value)
    targets = {t: scheme for scheme in config.config_groups.values() for t in scheme.targets}
    linear = torch.nn.Linear(1, 1, device="meta")
    if not is_match(module, linear, targets, config.ignore or []):
        return None
    return str(targets[match_targets(module, linear, targets)[0]].weights.strategy)


def test_schemes_of_real_configs(real: Path) -> None:
    """Our reading of config.json is compressed-tensors' reading, for every linear layer."""
    dialect = read_dialect(open_checkpoint(real))
    stock = compressed_tensors_schemes(real)
    assert sum(scheme is not None for scheme in stock.values()) > 10
    for module, scheme in stock.items():
        ours = dialect.scheme(module)
        assert (ours is None) == (scheme is None), module
        if ours is not None:
            assert (ours.fp8, ours.layout, ours.activations) == (True, scheme.weights.strategy, "static")


@given(st.lists(st.lists(st.sampled_from(TARGETS), min_size=1, max_size=3, unique=True), min_size=1, max_size=3),
       st.lists(st.sampled_from(["Linear", "lm_head", "re:.*in_proj_a$", "re:.*mlp.*"]), max_size=2))  # fmt: skip
def test_matching_agrees_with_compressed_tensors(groups: list[list[str]], ignore: list[str]) -> None:
    """Which modules are quantized, whatever targets compete."""
    value = config_of(groups, ignore)
    dialect = CompressedTensors(value)
    for module in MODULES:
        assert (dialect.scheme(module) is None) == (stock_strategy(value, module) is None)


@given(
    st.lists(st.sampled_from([*TARGETS, "re:.*layers\\.1\\..*"]), min_size=1, max_size=4, unique=True),
    st.lists(st.sampled_from([*MODULES, "model.layers.0.mlp.gate_proj", "re:.*in_proj_a$"]), max_size=3),
    st.lists(st.sampled_from([*MODULES, "a\0lm_head", "model.layers.5.mlp.gate_proj"]), min_size=1, unique=True),
)
@example(["Linear"], ["model.layers.0.mlp.gate_proj"], ["model.layers.5.mlp.gate_proj"])
def test_many_are_looked_up_as_each_is(targets: list[str], ignore: list[str], modules: list[str]) -> None:
    """Also where ``ignore`` has a name that differs from theirs in digits only, and that none of them has."""
    value = config_of([targets], ignore)
    found = {name: scheme for scheme, names in CompressedTensors(value).by_scheme(modules) for name in names}
    assert found == {name: CompressedTensors(value).scheme(name) for name in modules}


@given(st.lists(st.sampled_from(TARGETS), min_size=1, max_size=4, unique=True))
def test_converted_modules_become_channel_and_the_rest_stay(targets: list[str]) -> None:
    """In compressed-tensors' own reading, whatever targets the modules were matched by."""
    value = config_of([targets])
    dialect = CompressedTensors(value)
    if any(dialect.scheme(module) is None for module in QKVZ_MODULES):
        return
    after = dialect.with_channel_scales({QKVZ: QKVZ_MODULES}, LAYERS)
    for module in MODULES:
        expected = "channel" if module in QKVZ_MODULES else stock_strategy(value, module)
        assert stock_strategy(after.value, module) == expected
        ours = after.scheme(module)
        assert (ours.layout if ours else None) == expected
    # vLLM and SGLang take the first group whose target matches the fused name, then class names.
    fused = "language_model.model.layers.0.linear_attn.in_proj_qkvz"
    first = next(
        name
        for name, group in after.value["config_groups"].items()
        for target in group["targets"]
        if target.startswith("re:") and re.match(target[3:], fused)
    )
    assert after.value["config_groups"][first]["weights"]["strategy"] == "channel"


def test_everything_else_of_the_config_stays() -> None:
    """The new group is a copy of the old one but for targets and strategy; other keys and their order are kept."""
    value = config_of([["Linear"]], ["lm_head"])
    after = CompressedTensors(value).with_channel_scales({QKVZ: QKVZ_MODULES}, ONLY).value
    assert list(after) == list(value)
    assert {k: v for k, v in after.items() if k != "config_groups"} == {
        k: v for k, v in value.items() if k != "config_groups"
    }
    assert after["config_groups"]["group_0"] == value["config_groups"]["group_0"]
    new = after["config_groups"]["group_1"]
    base = value["config_groups"]["group_0"]
    assert new == {**base, "targets": [QKVZ], "weights": {**base["weights"], "strategy": "channel"}}
    assert value == config_of([["Linear"]], ["lm_head"]), "the input is not modified"


def test_status_becomes_compressed() -> None:
    """The weights are stored compressed, whatever the config said."""
    value = {k: v for k, v in config_of([["Linear"]]).items() if k != "quantization_status"}
    after = CompressedTensors(value).with_channel_scales({QKVZ: QKVZ_MODULES}, ONLY).value
    assert after["quantization_status"] == "compressed"


def test_modules_of_different_groups_are_refused() -> None:
    """Nobody can say which activations the fused layer should have."""
    value = config_of([["re:.*in_proj_qkv$"], ["re:.*in_proj_z$"]])
    CompressedTensors(value).with_channel_scales({QKVZ: QKVZ_MODULES}, ONLY)  # both groups say the same
    value["config_groups"]["group_1"]["input_activations"] = None
    with pytest.raises(Unsupported, match="different config groups"):
        CompressedTensors(value).with_channel_scales({QKVZ: QKVZ_MODULES}, ONLY)


def test_modules_of_the_same_name_left_behind_are_refused() -> None:
    """The regex would catch them: layers can be told apart by their numbers, the parts of one cannot."""
    some = {name for name in QKVZ_MODULES if name.endswith("layers.0.linear_attn.in_proj_qkv")}
    with pytest.raises(Unsupported, match="different ways"):
        CompressedTensors(config_of([["Linear"]])).with_channel_scales({QKVZ: some}, LAYERS)


@pytest.mark.parametrize(
    "value",
    [
        {"quant_method": "compressed-tensors"},
        {"quant_method": "compressed-tensors", "config_groups": []},
        {"quant_method": "compressed-tensors", "config_groups": {"a": 1}},
        {"quant_method": "compressed-tensors", "config_groups": {"a": {"targets": "Linear"}}},
        {"quant_method": "compressed-tensors", "config_groups": {"a": {"targets": [1]}}},
        {"quant_method": "compressed-tensors", "config_groups": {}, "ignore": "lm_head"},
    ],
)
def test_configs_of_the_wrong_shape_are_refused(value: dict[str, Any], copy: Path) -> None:
    """With the place in config.json."""
    edit_json(copy / "config.json", quantization_config=value)
    with pytest.raises(ConfigError, match=r"config\.json: quantization_config"):
        read_dialect(open_checkpoint(copy))


@pytest.mark.parametrize("group", [{"targets": ["re:(("]}, {"targets": ["Linear"], "weights": 8}])
def test_schemes_of_the_wrong_shape_are_refused(group: dict[str, Any]) -> None:
    """When a module is looked up."""
    with pytest.raises(ConfigError):
        CompressedTensors({"config_groups": {"a": group}}).scheme("m")


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (None, "none"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "modelopt W4A8_AWQ"),
        ({}, "None"),
    ],
)
def test_other_dialects_are_named_and_refuse(value: dict[str, Any] | None, name: str, copy: Path) -> None:
    """Nothing is guessed."""
    edit_json(copy / "config.json", quantization_config=value)
    dialect = read_dialect(open_checkpoint(copy))
    assert dialect.name == name
    assert dialect.scheme("m") is None
    with pytest.raises(Unsupported, match=name):
        dialect.as_compressed_tensors(LAYERS)
    with pytest.raises(Unsupported, match=name):
        dialect.without(Dequantized((), (), ()))


def test_fp8_leaves_the_parts_of_layers_that_are_stored_fused_alone() -> None:
    """SGLang 0.5.23 ``is_layer_skipped`` looks for ``q_proj`` where it builds ``qkv_proj``, as Phi-3 stores it."""
    fused = ("layers.0.self_attn.qkv_proj",)
    dialect = Fp8({"quant_method": "fp8", "ignored_layers": ["lm_head"]})
    ignored = dialect.without(Dequantized(fused, fused, ())).value["ignored_layers"]
    assert ignored == ["lm_head", *fused, *(f"layers.0.self_attn.{part}_proj" for part in "qkv")]
