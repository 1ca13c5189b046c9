"""How engines look layers up: each case was loaded in vLLM 0.19.1, vLLM 0.32.0 and SGLang 0.5.23 by the search."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

import rewrite
from rewrite.loaders.lookups import LOOKUPS, SGLANG, VLLM, VLLM_CLASS_FIRST, VLLM_RAISES, Lookup, misread
from rewrite.loaders.outcome import Outcome
from rewrite.quantization.model import interpret
from tests.support import edit_json

Config = dict[str, Any]
VL = "llmcompressor-qwen3_5-vl"
LAYER = "model.language_model.layers.0.linear_attn"
GDN = r"re:.*linear_attn\.(in_proj_qkv|in_proj_z|out_proj)$"


@pytest.fixture
def found(copy_of: Callable[[str], Path]) -> Callable[[Callable[[Config], None]], dict[Lookup, Outcome]]:
    """What goes wrong in the vision-language fixture after an edit of its quantization config."""

    def edited(edit: Callable[[Config], None]) -> dict[Lookup, Outcome]:
        directory = copy_of(VL)
        value = json.loads((directory / "config.json").read_text())["quantization_config"]
        edit(value)
        edit_json(directory / "config.json", quantization_config=value)
        return misread(interpret(rewrite.open_checkpoint(directory)))

    return edited


Found = Callable[[Callable[[Config], None]], dict[Lookup, Outcome]]


def test_all_is_well_as_the_producer_wrote_it(found: Found) -> None:
    assert found(lambda value: None) == {}


def test_a_layer_that_nothing_names(found: Found) -> None:
    """Raises in SGLang and up to vLLM 0.20; later ones take it for plain, which it is."""

    def edit(value: Config) -> None:
        value["config_groups"]["group_0"]["targets"] = [GDN, ".*", "re:.*self_attn.*", r"re:.*mlp\..*_proj$"]
        value["ignore"] = [name for name in value["ignore"] if "in_proj_" not in name]

    wrong = found(edit)
    assert set(wrong) == {VLLM_RAISES, SGLANG}
    for outcome in wrong.values():
        assert (outcome.kind, outcome.detail) == ("fails to load", f"finds no target for {LAYER}.in_proj_ba")


def test_a_pattern_that_begins_with_the_stored_name(found: Found) -> None:
    """vLLM calls the module ``language_model.model...``: the pattern misses it there."""

    def edit(value: Config) -> None:
        value["config_groups"]["group_0"]["targets"] = [r"re:^model\..*proj.*", r"re:^model\.visual.*"]

    wrong = found(edit)
    assert set(wrong) == {VLLM_RAISES, VLLM_CLASS_FIRST, VLLM}
    assert wrong[VLLM_RAISES].kind == "fails to load"
    assert wrong[VLLM].kind == "not known", "takes FP8 weights for plain ones"


def test_the_class_or_the_parts_first(found: Found) -> None:
    """A group for ``Linear`` wins over the names of a fused layer's parts, before vLLM 0.27 and in SGLang."""

    def edit(value: Config) -> None:
        groups = value["config_groups"]
        groups["group_1"] = deepcopy(groups["group_0"])
        groups["group_0"]["input_activations"] = {**groups["group_0"]["input_activations"], "dynamic": True}
        groups["group_1"]["targets"] = [f"{LAYER}.in_proj_qkv", f"{LAYER}.in_proj_z"]

    wrong = found(edit)
    assert set(wrong) == {VLLM_RAISES, VLLM_CLASS_FIRST, SGLANG}
    assert all("in_proj_qkvz" in outcome.detail and outcome.kind == "not known" for outcome in wrong.values())


def test_the_order_of_the_config_counts(found: Found) -> None:
    """compressed-tensors tries patterns in alphabetical order, engines as they stand."""

    def edit(value: Config) -> None:
        groups = value["config_groups"]
        groups["group_1"] = deepcopy(groups["group_0"])
        groups["group_1"]["input_activations"] = {**groups["group_0"]["input_activations"], "dynamic": True}
        groups["group_0"]["targets"] = ["re:.*z_proj|.*proj.*"]
        groups["group_1"]["targets"] = ["re:.*proj.*"]

    assert set(found(edit)) == set(LOOKUPS)


def test_a_part_that_is_ignored_alone(found: Found) -> None:
    def edit(value: Config) -> None:
        value["ignore"] = [name for name in value["ignore"] if not name.endswith("in_proj_a")]

    wrong = found(edit)
    assert set(wrong) == set(LOOKUPS)
    assert {outcome.detail for outcome in wrong.values()} == {f"ignore names some parts of {LAYER}.in_proj_ba only"}


@pytest.mark.parametrize(
    ("layout", "activations", "kind"),
    [
        ("tensor", {"strategy": "tensor", "dynamic": False}, "loses precision"),
        ("tensor", {"strategy": "token", "dynamic": True}, "fails to load"),
        ("channel", {"strategy": "tensor", "dynamic": False}, "fails to load"),
        ("channel", {"strategy": "token", "dynamic": True}, "exact"),
        ("tensor", None, "not known"),
    ],
)
def test_schemes_of_experts(layout: str, activations: Config | None, kind: str, tmp_path: Path) -> None:
    """vLLM 0.32 ``compressed_tensors_moe_w8a8_fp8.py``; weights alone were not run."""
    from tests.recipes import KINDS, Recipe, make

    wanted = (layout, activations and activations["strategy"], activations and activations["dynamic"])
    (name,) = [
        name
        for name, each in KINDS.items()
        if each.weights["type"] == "float"
        and (each.weights["strategy"], each.inputs and each.inputs["strategy"], each.inputs and each.inputs["dynamic"])
        == wanted
    ]
    ignore = ("lm_head", r"re:.*mlp\.gate$", "re:.*shared_expert.*", "re:.*attn.*")
    make(
        Recipe(0, "llmcompressor-qwen3_5-moe", ((name, ("Linear",)),), ignore, False, 1, alike_inputs=True),
        tmp_path / "in",
    )
    rows = rewrite.inspect_checkpoint(tmp_path / "in", selection="all").rows
    (row,) = [row for row in rows if row.loader.name == "vLLM" and row.loader.covers("0.32.0")]
    assert row.as_is.kind == kind
