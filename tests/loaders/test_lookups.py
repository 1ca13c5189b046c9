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
    (row,) = [row for row in rows if row.engine.name == "vLLM" and row.engine.covers("0.32.0")]
    assert row.as_is.kind == kind


def make_mixed(base: str, folder: Path, fp8: tuple[str, ...], fp4: tuple[str, ...], *ignored: str) -> None:
    """A checkpoint of ModelOpt's mixed precision: the last names of FP8 and of NVFP4 linears, names that are plain."""
    from tests.recipes import Recipe, base_weights, is_linear, make

    names = [n.removesuffix(".weight") for n, tensor in base_weights(base)[1].items() if is_linear(n, tensor)]
    groups = tuple(
        (kind, tuple(name for name in names if name.endswith(lasts) and "visual" not in name))
        for kind, lasts in (("fp8-tensor-static", fp8), ("nvfp4", fp4))
    )
    make(Recipe(0, base, groups, ignored, False, 1, dialect="modelopt MIXED_PRECISION"), folder)


def kind_of(folder: Path, loader: str, version: str) -> str:
    rows = rewrite.inspect_checkpoint(folder, selection="all").rows
    (row,) = [row for row in rows if row.engine.name == loader and row.engine.covers(version)]
    return row.as_is.kind


def test_a_layer_of_two_formats_may_end_the_load(tmp_path: Path) -> None:
    """All raise "Mixed quant_algo within fused layer": whatever NVFP4 layers beside it would be served as, it is not
    known to be served."""
    make_mixed("modelopt-qwen3_5-vl", tmp_path / "in", ("q_proj", "k_proj"), ("v_proj", "in_proj_qkv", "in_proj_z"))
    for loader, version in (("vLLM", "0.19.1"), ("vLLM", "0.32.0"), ("SGLang", "0.5.23")):
        assert kind_of(tmp_path / "in", loader, version) not in ("garbled", "exact", "loses precision")


def test_mixed_precision_of_a_llama_is_not_known_to_sglang(tmp_path: Path) -> None:
    """SGLang 0.5.23 raises an AssertionError, which its NVFP4 layers do not explain."""
    make_mixed("llmcompressor-llama", tmp_path / "in", ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
    assert kind_of(tmp_path / "in", "SGLang", "0.5.23") == "not known"


def test_what_leaves_quantized_layers_joins_ignore(tmp_path: Path) -> None:
    """vLLM 0.32 "Detected some but not all shards of model.layers.0.self_attn.qkv_proj are quantized", after bf16."""
    plain = "model.layers.0.self_attn.q_proj"
    make_mixed("llmcompressor-llama", tmp_path / "in", ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), plain)
    rewrite.convert(tmp_path / "in", tmp_path / "out", profile="bf16", selection="all")
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert {plain, plain.replace("q_proj", "k_proj"), plain.replace("q_proj", "v_proj")} <= set(ignored)
    assert rewrite.verify(tmp_path / "in", tmp_path / "out", device="cpu", tokens=2).ok


def test_a_plain_layer_that_the_config_takes_for_quantized(copy_of: Callable[[str], Path]) -> None:
    """AutoRound's FP8_STATIC ignores nothing: transformers makes scales of ``lm_head`` up."""
    directory = copy_of("llmcompressor-llama")
    value = json.loads((directory / "config.json").read_text())["quantization_config"]
    edit_json(directory / "config.json", quantization_config={**value, "ignore": []})
    rows = [row for row in rewrite.inspect_checkpoint(directory).rows if row.engine.name == "transformers"]
    assert rows and all(row.as_is.kind == "not known" and "lm_head" in row.as_is.detail for row in rows)
