"""AMD Quark's dialect: read as Quark reads it, restated as compressed-tensors, refused by name where that cannot be."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

import rewrite
from rewrite.errors import ConfigError, Refused, Unsupported
from rewrite.loaders.lookups import vllm_name
from rewrite.loaders.outcome import Outcome
from rewrite.quantization.dialects.quark import Quark
from rewrite.quantization.scheme import Layers, Scheme
from rewrite.verification.configs import CompressedTensorsSchemes, QuarkSchemes
from tests.support import edit_json, raw_tensors, replace_tensor
from tests.zoo.rebuild import ENTRIES, FILES, rebuild

NAME = "quark-fp8-kv-qwen3_5-vl"
VALUE = json.loads((ENTRIES / NAME / FILES / "config.json").read_text())["quantization_config"]
LAYER = "model.language_model.layers.0"
STATIC: dict[str, Any] = {
    "weight": {"dtype": "fp8_e4m3", "qscheme": "per_tensor"},
    "input_tensors": {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False},
}
PTPC: dict[str, Any] = {
    "weight": {"dtype": "fp8_e4m3", "qscheme": "per_channel", "ch_axis": 0},
    "input_tensors": {"dtype": "fp8_e4m3", "qscheme": "per_channel", "ch_axis": 1, "is_dynamic": True},
}


def quark(**changes: Any) -> Quark:
    """The fixture's config with some keys changed."""
    return Quark({**deepcopy(VALUE), **changes})


def kind(scheme: Scheme | None) -> tuple[Any, ...] | None:
    return None if scheme is None else (scheme.format, scheme.layout, scheme.activations, scheme.per_token)


TENSOR, ROWS = ("FP8", "tensor", "static", False), ("FP8", "rows", "dynamic", True)


@pytest.mark.parametrize(
    ("changes", "module", "expected"),
    [
        ({}, f"{LAYER}.mlp.up_proj", TENSOR),
        ({}, f"{LAYER}.linear_attn.in_proj_a", None),
        ({}, "model.language_model.embed_tokens", None),
        ({"exclude": ["*up_proj"]}, f"{LAYER}.mlp.up_proj", None),
        ({"exclude": ["up_proj"]}, f"{LAYER}.mlp.up_proj", TENSOR),
        ({"exclude": ["re:.*up_proj$"]}, f"{LAYER}.mlp.up_proj", None),
        ({"layer_quant_config": {"*up_proj": PTPC}}, f"{LAYER}.mlp.up_proj", ROWS),
        ({"layer_quant_config": {"*up_proj": PTPC}}, f"{LAYER}.mlp.gate_proj", TENSOR),
        ({"layer_quant_config": {"*proj": STATIC, "*up_proj": PTPC}}, f"{LAYER}.mlp.up_proj", TENSOR),
        ({"layer_type_quant_config": {"Linear": PTPC}}, f"{LAYER}.mlp.up_proj", ROWS),
        ({"layer_type_quant_config": {"Conv2d": PTPC}}, f"{LAYER}.mlp.up_proj", TENSOR),
        ({"global_quant_config": None}, f"{LAYER}.mlp.up_proj", None),
        ({"layer_quant_config": {"*up_proj": PTPC}, "exclude": ["*up_proj"]}, f"{LAYER}.mlp.up_proj", None),
    ],
)
def test_schemes(changes: dict[str, Any], module: str, expected: tuple[Any, ...] | None) -> None:
    """exclude, then the first pattern, then the class, then everything: Quark 0.13 ``get_layer_quant_config``. The
    verification's own reading says the same."""
    assert kind(quark(**changes).scheme(module)) == expected
    found = QuarkSchemes({**VALUE, **changes}).of_module(module)
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        strategy = "channel" if expected == ROWS else "tensor"
        assert (found.strategy, found.static, found.fp8) == (strategy, expected == TENSOR, True)


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        ({"dtype": "fp4", "qscheme": "per_group", "group_size": 32}, "MXFP4"),
        ([{"dtype": "fp4", "qscheme": "per_group", "group_size": 16}, {"dtype": "fp8_e4m3"}], "NVFP4"),
        ({"dtype": "int8", "qscheme": "per_tensor"}, "INT8"),
        ({"dtype": "uint4", "qscheme": "per_group", "group_size": 64}, "INT4"),
        ({"dtype": "bfloat16"}, "bfloat16"),
    ],
)
def test_other_formats(weight: Any, expected: str) -> None:
    scheme = quark(global_quant_config={"weight": weight}).scheme("a")
    assert scheme is not None and scheme.format == expected


def test_a_scale_for_each_column_is_no_layout() -> None:
    columns = {**PTPC, "weight": {**PTPC["weight"], "ch_axis": 1}}
    scheme = quark(global_quant_config=columns).scheme("a")
    assert scheme is not None and scheme.layout is None


@pytest.mark.parametrize("key", ["global_quant_config", "layer_quant_config", "layer_type_quant_config", "exclude"])
@pytest.mark.parametrize("value", [3, "text", [3], {"a": 3}])
def test_configs_of_another_shape_are_refused(key: str, value: Any) -> None:
    """Never a traceback."""
    if (key, value) == ("global_quant_config", {"a": 3}):
        return  # an object that states nothing
    with pytest.raises(ConfigError):
        quark(**{key: value})


def test_engines_look_layers_up_in_their_own_way() -> None:
    """vLLM 0.32 ``get_layer_quant_config_from_name``, ``should_ignore_layer``."""
    name = f"{LAYER}.mlp.up_proj"

    def found(**changes: Any) -> tuple[Any, ...] | None:
        return kind(quark(**changes).scheme_in_engines(name, vllm_name))

    assert found() == TENSOR
    assert found(exclude=["*up_proj"]) == TENSOR, "no globs in exclude"
    assert found(exclude=[name]) is None
    assert found(layer_quant_config={"*language_model.layers*": PTPC}) == TENSOR, "patterns see vLLM's names"
    assert found(layer_quant_config={"model.language_model.layers.0.*": PTPC}) == ROWS, "renamed with them"
    assert found(layer_quant_config={name: PTPC}) == ROWS
    assert found(layer_type_quant_config={"Linear": PTPC}) == TENSOR


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """FP8 per tensor, static, with an FP8 KV cache."""
    return rebuild(NAME, tmp_path / "source")


def predictions(folder: Path) -> dict[str, Outcome]:
    rows = rewrite.inspect_checkpoint(folder).rows
    return {f"{row.engine.name} {row.engine.first}": row.as_is for row in rows}


def test_what_engines_find_elsewhere_is_not_known(source: Path) -> None:
    """A glob in exclude leaves a layer alone that engines take for FP8."""
    exclude = ["*in_proj_a" if name.endswith("in_proj_a") else name for name in VALUE["exclude"]]
    edit_json(source / "config.json", quantization_config={**VALUE, "exclude": exclude})
    found = predictions(source)
    assert found["vLLM 0.27.0"].kind == found["SGLang 0.5.23"].kind == "not known"
    assert "in_proj_ba" in found["vLLM 0.27.0"].detail


def test_versions_that_were_not_run_are_not_known(source: Path) -> None:
    found = predictions(source)
    assert found["vLLM 0.22.0"].kind == "not known" and "not run" in found["vLLM 0.22.0"].detail
    assert found["transformers 5.17.0"].kind == "fails to load"


def layers_of(*names: str) -> Layers:
    return Layers(frozenset(names), (), frozenset(names))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"softmax_quant_spec": {"dtype": "fp8_e4m3"}}, "no compressed-tensors form"),
        ({"layer_quant_config": {"*q_proj": {**STATIC, "output_tensors": {}, "bias": STATIC["weight"]}}}, "no compr"),
        ({"layer_quant_config": {"*": {**STATIC, "output_tensors": STATIC["weight"]}}}, "no compressed-tensors form"),
        ({"global_quant_config": {"weight": {"dtype": "int8", "qscheme": "per_tensor"}}}, "Only FP8"),
        ({"export": {"kv_cache_group": ["*k_proj"]}}, "KV-cache"),
    ],
)
def test_what_compressed_tensors_cannot_say_is_refused(changes: dict[str, Any], message: str) -> None:
    base: dict[str, Any] = {"layer_quant_config": {}, "export": {"kv_cache_group": []}}
    with pytest.raises(Unsupported, match=message):
        quark(**{**base, **changes}).as_compressed_tensors(layers_of(f"{LAYER}.mlp.up_proj"))


def test_two_fp8_schemes_become_two_groups() -> None:
    """By compressed-tensors' own matcher."""
    names = [f"{LAYER}.{part}" for part in ("mlp.up_proj", "mlp.gate_proj", "self_attn.o_proj", "self_attn.q_proj")]
    dialect = quark(layer_quant_config={"*self_attn*": PTPC, "*x": STATIC}, export={"kv_cache_group": []})
    stock = CompressedTensorsSchemes(dialect.as_compressed_tensors(layers_of(*names)).value)
    found = [stock.of_module(name) for name in names]
    assert [(each.strategy, each.static) for each in found if each] == [("tensor", True)] * 2 + [("channel", False)] * 2


@pytest.mark.parametrize("profile", rewrite.PROFILES)
def test_every_profile_converts_and_is_verified(profile: str, source: Path, tmp_path: Path) -> None:
    changed = rewrite.convert(source, tmp_path / "out", profile=profile, selection="all").changed
    assert rewrite.verify(source, tmp_path / "out", device="cpu", tokens=4).ok == changed
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    if profile == "dequantized":
        assert "quantization_config" not in config
    else:
        method = config["quantization_config"]["quant_method"]
        assert method == ("quark" if profile in ("bf16", "partition", "rescaled") else "compressed-tensors")


def test_scales_of_the_kv_cache_come_along(source: Path, tmp_path: Path) -> None:
    """The scale of the output of k_proj is that of the cache: vLLM 0.32 ``QuarkConfig.get_cache_scale_mapper``."""
    rewrite.convert(source, tmp_path / "out")
    old, new = raw_tensors(source), raw_tensors(tmp_path / "out")
    renamed = {name: value for name, value in new.items() if name.endswith((".k_scale", ".v_scale"))}
    assert len(renamed) == 2 and not any(name.endswith("output_scale") for name in new)
    for name, (_, dtype, shape, raw) in renamed.items():
        before = old[name.replace("k_scale", "k_proj.output_scale").replace("v_scale", "v_proj.output_scale")]
        assert (dtype, shape, raw) == (before[1], (1,), before[3])
    value = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert value["kv_cache_scheme"]["num_bits"] == 8


def test_verify_sees_a_scale_of_the_cache_that_changed(source: Path, tmp_path: Path) -> None:
    rewrite.convert(source, tmp_path / "out")
    name = next(name for name in raw_tensors(tmp_path / "out") if name.endswith(".k_scale"))
    replace_tensor(tmp_path / "out", name, b"\x00\x40")
    assert not rewrite.verify(source, tmp_path / "out", device="cpu", tokens=4).ok


def test_a_cache_whose_scales_are_dropped(source: Path, tmp_path: Path) -> None:
    """Where the config stays Quark's, it says so in Quark's words."""
    rewrite.convert(source, tmp_path / "out", profile="bf16", kv_scales="drop")
    value = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert value["quant_method"] == "quark" and value["export"]["kv_cache_group"] == []
    assert rewrite.verify(source, tmp_path / "out", device="cpu", tokens=4).ok


def test_a_scale_for_every_row(tmp_path: Path) -> None:
    """``ptpc_fp8``: engines read ``[N]`` of Quark's, so only ``portable`` has something to do."""
    source = rebuild("quark-ptpc-qwen3_5-vl", tmp_path / "in")
    for profile in ("exact", "dynamic", "partition"):
        assert not rewrite.convert(source, tmp_path / profile, profile=profile, selection="all").changed
    assert rewrite.convert(source, tmp_path / "out", profile="portable").changed
    old, new = raw_tensors(source), raw_tensors(tmp_path / "out")
    for name, (_, _, shape, raw) in old.items():
        if name.endswith("weight_scale"):
            assert new[name][2] == (*shape, 1) and new[name][3] == raw
    assert rewrite.verify(source, tmp_path / "out", device="cpu", tokens=4).ok
    name = next(name for name in old if name.endswith("mlp.up_proj.weight_scale"))
    replace_tensor(tmp_path / "out", name, bytes(2) + new[name][3][2:])
    assert not rewrite.verify(source, tmp_path / "out", device="cpu", tokens=4).ok


@pytest.mark.parametrize("profile", rewrite.PROFILES)
def test_static_activations_without_input_scales(profile: str, tmp_path: Path) -> None:
    """What Quark writes from file to file. Only activations per token, or none, need no stored scale."""
    source = rebuild("quark-file-fp8-qwen3_5-moe-vl", tmp_path / "in")
    inspection = rewrite.inspect_checkpoint(source)
    assert any((finding.code, finding.count) == ("no-input-scale", 37) for finding in inspection.findings)
    if profile in ("portable", "dequantized"):
        changed = rewrite.convert(source, tmp_path / "out", profile=profile).changed
        assert rewrite.verify(source, tmp_path / "out", device="cpu", tokens=4).ok == changed
        return
    with pytest.raises(Refused, match="without an input_scale") as caught:
        rewrite.convert(source, tmp_path / "out", profile=profile)
    assert caught.value.hint == "--profile portable converts it" or "--profile portable" in str(caught.value.hint)


@pytest.mark.parametrize("entry", ["quark-file-fp8-qwen3_5-vl", "quark-file-ptpc-qwen3_5-vl"])
def test_a_quantized_convolution_is_refused_and_found(entry: str, tmp_path: Path) -> None:
    """vLLM 0.32 raises on its scale (run)."""
    source = rebuild(entry, tmp_path / "in")
    inspection = rewrite.inspect_checkpoint(source)
    assert any("no matrix: [512, 1, 4]" in finding.what for finding in inspection.findings)
    assert {row.as_is.kind for row in inspection.rows} == {"not known", "fails to load"}
    with pytest.raises(Unsupported, match=r"no matrix|do not fit"):
        rewrite.convert(source, tmp_path / "out", profile="portable")
