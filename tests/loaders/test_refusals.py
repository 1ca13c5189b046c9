"""What engines refuse, or may: block scales that they cannot cut, schemes of experts, families that nobody ran."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import rewrite
from rewrite.loaders.blocks import BlockLayer, torn
from rewrite.loaders.outcome import Outcome
from rewrite.loaders.versions import find_loaders
from tests.recipes import draw, make
from tests.support import FIXTURES
from tests.zoo.rebuild import rebuild

BLOCK = (128, 128)


def layer(*rows: int, slots: tuple[int, ...] = (), experts: bool = False) -> BlockLayer:
    return BlockLayer("m.qkv_proj", rows, slots or rows, BLOCK, BLOCK, experts)


@pytest.mark.parametrize(
    ("one", "every_part", "slots", "refused"),
    [
        (layer(256, 128, 128), False, False, False),
        (layer(256, 64, 128), False, False, True),
        (layer(256, 128, 64), False, False, False),  # the last one may end anywhere
        (layer(256, 128, 64), True, False, True),  # but not with `fp8` in SGLang
        (layer(64), False, False, False),  # nothing is cut
        (layer(64), True, False, False),
        (layer(64, experts=True), False, False, True),  # gate and up are cut
        (layer(512, slots=(64, 64, 192, 192)), False, False, False),
        (layer(512, slots=(64, 64, 192, 192)), False, True, True),  # as SGLang has Qwen3-Next's layers
    ],
)
def test_partitions_end_where_blocks_do(one: BlockLayer, every_part: bool, slots: bool, refused: bool) -> None:
    assert (torn([layer(128, 128), one], slots=slots, every_part=every_part) is one) is refused


def predicted(folder: Path, loader: str) -> Outcome:
    (found,) = find_loaders(loader)
    (row,) = (row for row in rewrite.inspect_checkpoint(folder).rows if row.engine is found)
    return row.as_is


@pytest.mark.parametrize("loader", ["vLLM@0.32.0", "SGLang@0.5.23"])
def test_a_small_model_is_refused(loader: str, tmp_path: Path) -> None:
    """Seen in both: "Weight output_partition_size = 64 is not divisible by weight quantization block_n = 128"."""
    outcome = predicted(rebuild("llmc-fp8-block-qwen3_5-text", tmp_path / "in"), loader)
    assert outcome.kind == "fails to load"
    assert "not whole blocks of 128" in outcome.detail


def test_sglang_wants_a_target_linear(tmp_path: Path) -> None:
    """The MLPs have block scales by a pattern. Seen in SGLang 0.5.23: TypeError in ``linear.py``; vLLM loads them."""
    source = rebuild("llmc-mixed-block-qwen3_5-text", tmp_path / "in")
    outcome = predicted(source, "SGLang@0.5.23")
    assert (outcome.kind, "no target Linear" in outcome.detail) == ("fails to load", True)
    assert predicted(source, "vLLM@0.32.0").kind == "loses precision"

    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_1"]["targets"].append("Linear")
    (source / "config.json").write_text(json.dumps(config))
    assert "Linear states" not in predicted(source, "SGLang@0.5.23").detail


def test_another_block_size_of_linear_is_not_known(tmp_path: Path) -> None:
    source = rebuild("llmc-mixed-block-qwen3_5-text", tmp_path / "in")
    config = json.loads((source / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    groups["group_2"] = {**groups["group_1"], "targets": ["Linear"]}
    groups["group_2"]["weights"] = {**groups["group_1"]["weights"], "block_structure": [64, 64]}
    (source / "config.json").write_text(json.dumps(config))
    outcome = predicted(source, "SGLang@0.5.23")
    assert (outcome.kind, "block size" in outcome.detail) == ("not known", True)


def test_experts_per_tensor_with_activations_per_token_raise_in_sglang(tmp_path: Path) -> None:
    """Seen in SGLang 0.5.23 and vLLM 0.32.0: AssertionError in ``compressed_tensors_w8a8_fp8_moe.py``."""
    source = rebuild("mfree-tensor-qwen3_5-moe-vl", tmp_path / "in")
    found = rewrite.inspect_checkpoint(source, selection="all").rows
    kinds = {row.engine.name: row.as_is.kind for row in found if row.engine.last is None}
    assert (kinds["SGLang"], kinds["vLLM"]) == ("fails to load", "fails to load")


def test_a_cache_alone_needs_no_target(tmp_path: Path) -> None:
    """vLLM 0.19.1 and SGLang 0.5.23 load a config without groups, which they were said to refuse."""
    rows = rewrite.inspect_checkpoint(rebuild("llmc-kv-only-llama", tmp_path / "in"), selection="all").rows
    assert {row.as_is.kind for row in rows} == {"exact"}


def test_a_family_that_nobody_ran_is_not_known(tmp_path: Path) -> None:
    """Plain weights, too: vLLM 0.19.1 does not find the names of this Mixtral, SGLang 0.5.23 serves it garbled."""
    source = rebuild("llmc-fp8-mixtral", tmp_path / "in")
    rewrite.convert(source, tmp_path / "out", profile="dequantized")
    assert {row.as_is.kind for row in rewrite.inspect_checkpoint(tmp_path / "out").rows} == {"not known"}


def test_a_router_bias_without_topk_method_is_not_known(tmp_path: Path) -> None:
    """Seen in vLLM 0.32.0: KeyError 'layers.1.mlp.gate.e_score_correction_bias'."""
    source = rebuild("llmc-fp8-deepseek_v3", tmp_path / "in")
    outcome = predicted(source, "vLLM@0.32.0")
    assert (outcome.kind, "topk_method" in outcome.detail) == ("not known", True)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "topk_method": "noaux_tc"}))
    assert "topk_method" not in predicted(source, "vLLM@0.32.0").detail


def search_recipe(seed: int, folder: Path, **changes: Any) -> Path:
    """The checkpoint of a recipe of the search, with some of it changed."""
    make(replace(draw(seed), **changes), folder)
    return folder


def test_quark_names_do_not_count_for_layers_stored_fused_in_vllm(tmp_path: Path) -> None:
    """Phi-3, channel scales but for a glob. Seen in vLLM 0.19.1 and 0.32.0: "narrow() cannot be applied to a 0-dim
    tensor"; SGLang 0.5.23 serves it."""
    groups = (("fp8-channel-token", ("Linear",)), ("fp8-tensor-static", ("*mlp*",)))
    source = search_recipe(0, tmp_path / "in", base="llmcompressor-phi3", dialect="quark", groups=groups, ignore=())
    outcome = predicted(source, "vLLM@0.32.0")
    assert (outcome.kind, "another way than Quark" in outcome.detail) == ("not known", True)
    assert "another way than Quark" not in predicted(source, "SGLang@0.5.23").detail


def test_quark_names_count_for_other_layers(tmp_path: Path) -> None:
    groups = (("fp8-channel-token", ("Linear",)), ("fp8-tensor-static", ("*down_proj",)))
    source = search_recipe(0, tmp_path / "in", base="llmcompressor-phi3", dialect="quark", groups=groups, ignore=())
    assert "another way than Quark" not in predicted(source, "vLLM@0.32.0").detail


def test_a_layer_quantized_in_part_in_mixed_precision(tmp_path: Path) -> None:
    """Seen in SGLang 0.5.23: loads, and casts the plain part to FP8. vLLM raises."""
    names = ("gate_proj", "in_proj_qkv", "in_proj_z")
    groups = (("fp8-tensor-static", tuple(f"model.language_model.layers.0.{name}" for name in _with_parents(names))),)
    mixed = {"dialect": "modelopt MIXED_PRECISION", "base": "modelopt-qwen3_5-vl", "groups": groups, "ignore": ()}
    source = search_recipe(0, tmp_path / "in", **mixed)
    rows = {row.engine: row.as_is for row in rewrite.inspect_checkpoint(source, selection="all").rows}
    kinds = [rows[find_loaders(name)[0]].kind for name in ("SGLang@0.5.23", "vLLM@0.32.0")]
    assert kinds == ["not known", "fails to load"]


def _with_parents(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{'linear_attn' if name.startswith('in_') else 'mlp'}.{name}" for name in names)


def test_sglang_looks_no_parts_up_in_a_llama(tmp_path: Path) -> None:
    """Seen in SGLang 0.5.23: "Unable to find matching target for model.layers.0.self_attn.qkv_proj". Qwen3.5 loads."""
    groups = (("fp8-tensor-static", (r"re:.*\.(q|k|v|o)_proj$", "re:.*mlp.*", "re:.*linear_attn.*")),)
    changes = {"dialect": "compressed-tensors", "groups": groups, "kv_cache": False}
    for base, kind in (("llmcompressor-llama", "fails to load"), ("modelopt-qwen3_5-vl", "loses precision")):
        ignore = ("lm_head", "re:.*visual.*", "re:.*in_proj_[ab].*")
        source = search_recipe(0, tmp_path / base, base=base, ignore=ignore, **changes)
        rows = {row.engine: row.as_is for row in rewrite.inspect_checkpoint(source, selection="all").rows}
        assert rows[find_loaders("SGLang@0.5.23")[0]].kind == kind, base
        assert rows[find_loaders("vLLM@0.32.0")[0]].kind == "loses precision"


def test_layers_ignored_by_their_parts_are_not_found_in_a_llama(tmp_path: Path) -> None:
    names = tuple(f"model.layers.0.self_attn.{part}_proj" for part in "qkv")
    changes = {"dialect": "compressed-tensors", "groups": (("fp8-tensor-static", ("Linear",)),), "kv_cache": False}
    source = search_recipe(0, tmp_path / "in", base="llmcompressor-llama", ignore=("lm_head", *names), **changes)
    outcome = predicted(source, "SGLang@0.5.23")
    assert (outcome.kind, "self_attn.qkv_proj" in outcome.detail) == ("not known", True)


def test_portable_of_a_fused_layer_that_two_groups_match(tmp_path: Path) -> None:
    """compressed-tensors tries patterns by the alphabet, engines in the order of the config: the group that no module
    is in was found for the fused name, and kept its one scale."""
    second = ("fp8-tensor-token", (r"re:.*layers\.[01]\..*",))
    groups = (second, ("fp8-tensor-static", ("re:.*_proj.*",)))
    changes = {"dialect": "compressed-tensors", "groups": groups, "kv_cache": False}
    ignore = ("lm_head", "re:.*in_proj_[ab]$")
    source = search_recipe(0, tmp_path / "in", base="llmcompressor-qwen3_5-text", ignore=ignore, **changes)
    rewrite.convert(source, tmp_path / "out", profile="portable", selection="all")
    assert rewrite.verify(source, tmp_path / "out", device="cpu", tokens=2).ok
    assert predicted(tmp_path / "out", "vLLM@0.32.0").kind == "exact"


def test_stored_fused_layers_that_fp8_leaves_alone_by_their_own_name(tmp_path: Path) -> None:
    """Phi-3. Seen: SGLang 0.5.23 casts the plain layer to FP8, off by infinity; not where the parts are named, too."""
    changes = {"dialect": "fp8", "groups": (("fp8-tensor-static", ("Linear",)),), "kv_cache": False}
    fused = "model.layers.1.self_attn.qkv_proj"
    source = search_recipe(0, tmp_path / "in", base="llmcompressor-phi3", ignore=("lm_head", fused), **changes)
    assert predicted(source, "vLLM@0.32.0").kind == "exact"
    assert predicted(source, "SGLang@0.5.23").kind == "garbled"
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["ignored_layers"] += [fused.replace("qkv", part) for part in "qkv"]
    (source / "config.json").write_text(json.dumps(config))
    assert predicted(source, "SGLang@0.5.23").kind == "exact"


@pytest.mark.parametrize("fixture", ["modelopt-qwen3_5-vl", "modelopt-qwen3_5-mixed"])
def test_modelopt_with_the_name_of_a_fused_layer_in_ignore(fixture: str, tmp_path: Path) -> None:
    """Its parts are quantized. Seen: "loses precision"; vLLM 0.32.0 raises, SGLang 0.5.23 serves codes as weights."""
    shutil.copytree(FIXTURES / fixture, tmp_path / "in")
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    config["quantization_config"]["ignore"].append("model.language_model.layers.2.self_attn.qkv_proj")
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    for engine in ("vLLM@0.32.0", "SGLang@0.5.23"):
        assert predicted(tmp_path / "in", engine).kind not in ("exact", "loses precision", "garbled")


def test_fp8_weights_under_a_config_of_four_bits(tmp_path: Path) -> None:
    """No format of the ledger's table, so nothing was compared. Seen: SGLang 0.5.23 raises NotImplementedError."""
    shutil.copytree(FIXTURES / "llmcompressor-llama", tmp_path / "in")
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 4
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    assert "label" in [fault.code for fault in rewrite.inspect_checkpoint(tmp_path / "in").findings]
    assert predicted(tmp_path / "in", "SGLang@0.5.23").kind == "not known"


def test_nvfp4_of_a_module_with_several_partitions_in_vllm_0_19(tmp_path: Path) -> None:
    """Phi-3, stored fused. Seen: q served as NaN in vLLM 0.19.1, right in 0.32.0."""
    changes = {"dialect": "compressed-tensors", "groups": (("nvfp4", ("Linear",)),), "kv_cache": False}
    source = search_recipe(0, tmp_path / "in", base="llmcompressor-phi3", ignore=("lm_head",), **changes)
    rows = {row.engine: row.as_is for row in rewrite.inspect_checkpoint(source, selection="all").rows}
    kinds = [rows[find_loaders(name)[0]].kind for name in ("vLLM@0.19.1", "vLLM@0.32.0")]
    assert kinds == ["garbled", "exact"]


def test_nvfp4_of_qwen3_next_raises_in_sglang(tmp_path: Path) -> None:
    """Seen in 0.5.23: "'MergedColumnParallelLinear' object has no attribute 'weight'"."""
    changes = {"dialect": "compressed-tensors", "groups": (("nvfp4a16", ("re:.*linear_attn.*",)),), "kv_cache": False}
    ignore = ("lm_head", "re:.*in_proj_ba$", "re:.*mlp.*", "re:.*self_attn.*")
    source = search_recipe(0, tmp_path / "in", base="llmcompressor-qwen3_next", ignore=ignore, **changes)
    outcome = predicted(source, "SGLang@0.5.23")
    assert (outcome.kind, "unpacked" in outcome.detail) == ("fails to load", True)


def test_experts_that_engines_would_not_load_any_more(tmp_path: Path) -> None:
    """`fp8` with dynamic activations, which engines load; restated as compressed-tensors they would not. Seen: vLLM
    0.32.0 served IN and raised on OUT, which verify held."""
    changes = {"dialect": "fp8", "groups": (("fp8-tensor-dynamic", ("Linear",)),), "kv_cache": False}
    ignore = ("lm_head", "re:.*visual.*", "re:.*in_proj_[ab]$", "re:.*mlp.gate$", "re:.*shared_expert_gate$")
    source = search_recipe(0, tmp_path / "in", base="modelopt-qwen3_5-moe", ignore=ignore, **changes)
    for profile in ("exact", "dynamic"):
        with pytest.raises(rewrite.Refused, match="would not load the experts") as refused:
            rewrite.convert(source, tmp_path / profile, profile=profile, selection="all")
        assert "--profile portable" in str(refused.value)
        assert not (tmp_path / profile).exists()
    rewrite.convert(source, tmp_path / "portable", profile="portable", selection="all")


def test_mixed_precision_without_nvfp4_is_w4afp8_to_sglang(tmp_path: Path) -> None:
    names = tuple(f"model.language_model.layers.0.linear_attn.in_proj_{part}" for part in ("qkv", "z"))
    mixed = {"dialect": "modelopt MIXED_PRECISION", "base": "modelopt-qwen3_5-vl", "ignore": ()}
    source = search_recipe(0, tmp_path / "in", groups=(("fp8-tensor-static", names),), **mixed)
    outcome = predicted(source, "SGLang@0.5.23")
    assert (outcome.kind, "w4afp8" in outcome.detail) == ("not known", True)


@pytest.mark.parametrize(("ignored", "kind"), [("lm_head", "not known"), ("re:.*lm_head", "loses precision")])
def test_a_pattern_for_lm_head(ignored: str, kind: str, tmp_path: Path) -> None:
    """vLLM 0.32.0 calls it language_model.lm_head: seen cast to FP8."""
    groups = (("fp8-tensor-static", ("re:.*_proj.*", "re:.*lm_head")),)
    ignore = (ignored, "re:.*visual.*", "re:.*in_proj_[ab]$")
    changes = {"dialect": "compressed-tensors", "base": "modelopt-qwen3_5-vl", "kv_cache": False}
    outcome = predicted(search_recipe(0, tmp_path / "in", groups=groups, ignore=ignore, **changes), "vLLM@0.32.0")
    assert (outcome.kind, "lm_head" in outcome.detail) == (kind, kind == "not known")


def test_cache_scales_of_qwen3_next_are_not_known_in_sglang(tmp_path: Path) -> None:
    """Seen in 0.5.23: "Expected 1.0, got 0.7109375 in skipped model.layers.2.k_scale"."""
    changes = {"dialect": "compressed-tensors", "groups": (("fp8-channel-token", ("Linear",)),)}
    ignore = ("lm_head", "re:.*mlp.gate$", "re:.*shared_expert_gate$", "re:.*in_proj_ba$")
    base = "llmcompressor-qwen3_next"
    source = search_recipe(0, tmp_path / "in", base=base, ignore=ignore, kv_cache=True, **changes)
    outcome = predicted(source, "SGLang@0.5.23")
    assert (outcome.kind, "--kv-scales drop" in outcome.detail) == ("not known", True)


def test_transformers_refuses_scales_without_a_dimension(tmp_path: Path) -> None:
    """Seen in 5.23.0 and 5.24.0, not in 5.22.2: "MISMATCH ... ckpt: torch.Size([]) vs model:torch.Size([1])"."""
    for profile, kinds in (("exact", ["loses precision", "fails to load"]), ("portable", ["loses precision"] * 2)):
        rewrite.convert(FIXTURES / "modelopt-qwen3_5-vl", tmp_path / profile, profile=profile)
        rows = rewrite.inspect_checkpoint(tmp_path / profile).rows
        assert [row.as_is.kind for row in rows if row.engine.name == "transformers"] == kinds
    assert "of this shape" in predicted(tmp_path / "exact", "transformers@5.24.0").detail
    assert predicted(FIXTURES / "llmcompressor-qwen3_5-vl", "transformers@5.24.0").kind == "exact"
