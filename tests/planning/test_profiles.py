"""Every profile on every real checkpoint, in every dialect: what changes, that it verifies, what is refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import rewrite
from rewrite.quantization.dialects import read_dialect
from rewrite.quantization.dialects.compressed_tensors import CompressedTensors
from rewrite.quantization.dtypes import dequantize
from rewrite.quantization.scheme import Layers
from tests.support import (
    CONVERTIBLE,
    FIXTURES,
    KV_SCALES,
    MIXED_PRECISION,
    OTHER_FAMILIES,
    QKVZ,
    SPLIT_QKVZ,
    compressed_tensors_schemes,
    edit_json,
    raw_tensors,
    replace_tensor,
    tree,
    write_shard,
)

KINDS = {"BF16": torch.bfloat16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn, "F16": torch.float16}


def tensor(entry: tuple[str, str, tuple[int, ...], bytes]) -> torch.Tensor:
    _, dtype, shape, data = entry
    return torch.frombuffer(bytearray(data), dtype=KINDS[dtype]).reshape(shape)


def under_new_names(directory: Path, manifest: rewrite.Manifest) -> dict[str, tuple[str, str, tuple[int, ...], bytes]]:
    """The tensors before, those that the conversion renames (scales of the KV cache) as it should leave them."""
    tensors = raw_tensors(directory)
    for old, new in manifest.renamed.items():
        shard, dtype, _, data = tensors.pop(old)
        tensors[new] = (shard, dtype, (1,), data)
    return tensors


@pytest.fixture(params=CONVERTIBLE)
def any_fixture(request: pytest.FixtureRequest) -> Path:
    return FIXTURES / str(request.param)


@pytest.fixture(params=SPLIT_QKVZ)
def qwen3_5(request: pytest.FixtureRequest) -> Path:
    """The checkpoints with in_proj_qkv and in_proj_z. Read only."""
    return FIXTURES / str(request.param)


@pytest.fixture(params=OTHER_FAMILIES)
def other_family(request: pytest.FixtureRequest) -> Path:
    """The checkpoints without. Read only."""
    return FIXTURES / str(request.param)


def has_work(name: str, profile: str, selection: str) -> bool:
    """Whether a conversion changes anything: a vector of scales needs a module of several partitions."""
    if profile == "rescaled":  # of NVFP4 only
        return False
    every_layer = profile in ("portable", "dequantized")
    if name in SPLIT_QKVZ or every_layer or (name == "llmcompressor-qwen3_next" and profile == "bf16"):
        return True
    return selection == "all" and profile != "partition"


@pytest.mark.parametrize("selection", ["qkvz", "all"])
@pytest.mark.parametrize("profile", rewrite.PROFILES)
def test_every_profile_verifies(profile: str, selection: Any, any_fixture: Path, tmp_path: Path) -> None:
    """And converting the output again changes nothing. Without work, the output equals the input."""
    manifest = rewrite.convert(any_fixture, tmp_path / "out", profile=profile, selection=selection)
    assert manifest.changed == has_work(any_fixture.name, profile, selection)
    if not manifest.changed:
        assert tree(tmp_path / "out") == tree(any_fixture)
    found = rewrite.verify(any_fixture, tmp_path / "out", device="cpu", tokens=16)
    problems = [problem for check in found.checks for problem in check.problems]
    assert found.ok or not manifest.changed, problems
    assert found.ok == (manifest.changed or not has_work(any_fixture.name, "exact", "qkvz")), problems
    again = rewrite.convert(tmp_path / "out", tmp_path / "again", profile=profile, selection=selection)
    assert not again.changed
    assert tree(tmp_path / "out") == tree(tmp_path / "again")


def restate(directory: Path, dialect: str) -> None:
    """The config of an llm-compressor checkpoint in another dialect. Its ``ignore`` has exact names."""
    ignored = json.loads((directory / "config.json").read_text())["quantization_config"]["ignore"]
    stated = {
        "fp8": {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ignored},
        "modelopt": {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ignored},
    }
    edit_json(directory / "config.json", quantization_config=stated[dialect])


@pytest.mark.parametrize("profile", rewrite.PROFILES)
@pytest.mark.parametrize("dialect", ["fp8", "modelopt"])
@pytest.mark.parametrize("name", [name for name in CONVERTIBLE if name.startswith("llmcompressor-")])
def test_every_family_in_every_dialect_verifies(
    name: str, dialect: str, profile: str, copy_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """Assembled: no producer at hand writes these. The tensors become what those of compressed-tensors do."""
    source = copy_of(name)
    restate(source, dialect)
    manifest = rewrite.convert(source, tmp_path / "out", profile=profile, selection="all")
    assert manifest.changed == has_work(name, profile, "all")
    found = rewrite.verify(source, tmp_path / "out", device="cpu", tokens=4)
    problems = [problem for check in found.checks for problem in check.problems]
    assert found.ok == (manifest.changed or not has_work(name, "exact", "qkvz")), problems
    rewrite.convert(FIXTURES / name, tmp_path / "stock", profile=profile, selection="all")
    assert raw_tensors(tmp_path / "out") == raw_tensors(tmp_path / "stock")


def test_portable_is_one_group_of_channel_scales_without_input_scales(any_fixture: Path, tmp_path: Path) -> None:
    """Weights bit-exact, every scale repeated, no input_scale in shards or index, dynamic activations everywhere."""
    out = tmp_path / "out"
    manifest = rewrite.convert(any_fixture, out, profile="portable")
    before, after = under_new_names(any_fixture, manifest), raw_tensors(out)
    assert before.keys() - after.keys() == {name for name in before if name.endswith("input_scale")}
    assert set(manifest.dropped) == before.keys() - after.keys()
    for name, (_, dtype, shape, data) in after.items():
        if name.endswith("weight_scale"):
            rows = after[name.removesuffix("_scale")][2][0]
            assert (dtype, shape, data) == (before[name][1], (rows, 1), before[name][3] * rows)
        else:
            assert after[name] == before[name]
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert list(config["config_groups"]) == ["group_0"]
    schemes = compressed_tensors_schemes(out)
    for module, (_, dtype, _, _) in ((n.removesuffix(".weight"), v) for n, v in after.items() if n.endswith(".weight")):
        if dtype == "F8_E4M3":
            scheme = schemes[module]
            assert (scheme.weights.strategy, scheme.input_activations.strategy) == ("channel", "token")
            assert scheme.input_activations.dynamic is True
    if (out / "model.safetensors.index.json").exists():
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == after.keys()
    assert any("dynamically" in note for note in manifest.notes)


def test_portable_ignores_by_patterns_that_survive_renaming(any_fixture: Path, tmp_path: Path) -> None:
    """SGLang 0.5.9 looks for ``language_model.model.…`` and for fused names: every plain layer still matches."""
    rewrite.convert(any_fixture, tmp_path / "out", profile="portable")
    config = CompressedTensors(json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"])
    stored = {name.rpartition("in_proj_")[2] for name, v in raw_tensors(any_fixture).items() if v[1] == "BF16"}
    layers = {f"in_proj_{part}" for part in ("a", "b", "ba") if f"{part}.weight" in stored}
    split, next_ = any_fixture.name in SPLIT_QKVZ, any_fixture.name == "llmcompressor-qwen3_next"
    assert layers == ({"in_proj_a", "in_proj_b"} if split else {"in_proj_ba"} if next_ else set())
    for layer in (f"linear_attn.{name}" for name in (layers | {"in_proj_ba"} if layers else ())):
        for prefix in ("model.layers.0", "language_model.model.layers.0", "model.language_model.layers.1"):
            assert config.scheme(f"{prefix}.{layer}") is None
    assert config.scheme("language_model.model.layers.0.linear_attn.in_proj_qkvz") is not None
    if "vl" in any_fixture.name:
        assert config.scheme("visual.blocks.0.attn.qkv") is None


def assert_dequantized(source: Path, out: Path, modules: tuple[str, ...]) -> None:
    """The modules of these names are the products that torch gives, their scales are gone; nothing else changed."""
    before, after = raw_tensors(source), raw_tensors(out)
    plain = {name for name in before if name.endswith(tuple(f"{module}.weight" for module in modules))}
    assert plain
    for name in plain:
        weight, scale = tensor(before[name]), tensor(before[f"{name}_scale"])
        assert torch.equal(tensor(after[name]), (weight.float() * scale.float()).to(torch.bfloat16))
    gone = {f"{name}_scale" for name in plain} | {name.replace("weight", "input_scale") for name in plain}
    assert before.keys() - after.keys() == gone
    assert all(after[name] == before[name] for name in after.keys() - plain)


def test_bf16_is_the_float32_product_rounded_once(qwen3_5: Path, tmp_path: Path) -> None:
    """What torch gives; scales dropped; the modules ignored under their own and their fused names."""
    rewrite.convert(qwen3_5, tmp_path / "out", profile="bf16")
    assert_dequantized(qwen3_5, tmp_path / "out", ("in_proj_qkv", "in_proj_z"))


def test_bf16_keeps_modelopts_dialect_and_both_its_files(tmp_path: Path) -> None:
    """For consumers that read ModelOpt only."""
    source, out = FIXTURES / "modelopt-qwen3_5-vl", tmp_path / "out"
    rewrite.convert(source, out, profile="bf16")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    other = json.loads((out / "hf_quant_config.json").read_text())["quantization"]
    assert config["quant_method"] == "modelopt"
    assert config["ignore"] == other["exclude_modules"]
    assert "model.language_model.layers.0.linear_attn.in_proj_qkv" in config["ignore"]


def test_bf16_mends_groups_that_were_quantized_in_part(copy: Path, tmp_path: Path) -> None:
    """AngelSlim leaves in_proj_z alone by default: no engine that fuses can serve that, and no FP8 layout mends it."""
    left = [f"model.layers.{i}.linear_attn.in_proj_z" for i in (0, 1)]
    weight_map: dict[str, str] = {}
    for path in sorted(copy.glob("*.safetensors")):
        kept = {n: v[1:] for n, v in raw_tensors(copy).items() if v[0] == path.name}
        for name in left:
            if f"{name}.weight" in kept:
                kept[f"{name}.weight"] = ("BF16", (128, 64), bytes(128 * 64 * 2))
            for kind in ("weight_scale", "input_scale"):
                kept.pop(f"{name}.{kind}", None)
        write_shard(path, dict(sorted(kept.items(), key=lambda item: item[1][0] != "BF16")), format="pt")
        weight_map |= dict.fromkeys(kept, path.name)
    edit_json(copy / "model.safetensors.index.json", weight_map=weight_map)
    value = json.loads((copy / "config.json").read_text())
    value["quantization_config"]["ignore"] += left
    edit_json(copy / "config.json", **value)
    with pytest.raises(rewrite.Unsupported, match="--profile bf16"):
        rewrite.convert(copy, tmp_path / "out")
    rewrite.convert(copy, tmp_path / "out", profile="bf16")
    found = rewrite.verify(copy, tmp_path / "out", device="cpu", tokens=4)
    assert found.ok, [problem for check in found.checks for problem in check.problems]
    assert {n.partition for n in found.numbers} == {"q", "k", "v"}
    assert not rewrite.inspect_checkpoint(tmp_path / "out").findings


def test_partition_is_a_vector_and_leaves_the_config(qwen3_5: Path, tmp_path: Path) -> None:
    """``[3]`` of the same bits for q, k, v; z has one partition and stays."""
    out = tmp_path / "out"
    rewrite.convert(qwen3_5, out, profile="partition")
    before, after = raw_tensors(qwen3_5), raw_tensors(out)
    changed = {name for name in before if before[name] != after[name]}
    assert changed
    assert changed == {name for name in before if name.endswith("in_proj_qkv.weight_scale")}
    assert all(after[name][2:] == ((3,), before[name][3] * 3) for name in changed)
    assert (out / "config.json").read_bytes() == (qwen3_5 / "config.json").read_bytes()


#: What engines fuse in the other families, as stored, and `exact` converts. Experts and in_proj_qkvz need nothing: one
#: scale, one matrix.
FUSED = {
    "llmcompressor-llama": ("q_proj", "k_proj", "v_proj", "mlp.gate_proj", "mlp.up_proj"),
    "modelopt-llama": ("q_proj", "k_proj", "v_proj", "mlp.gate_proj", "mlp.up_proj"),
    "llmcompressor-phi3": ("qkv_proj", "gate_up_proj"),
    "llmcompressor-deepseek_v3": (
        *("q_a_proj", "kv_a_proj_with_mqa", "mlp.gate_proj", "mlp.up_proj"),
        *("shared_experts.gate_proj", "shared_experts.up_proj"),
    ),
    "llmcompressor-qwen3_next": (*("q_proj", "k_proj", "v_proj", "shared_expert.gate_proj", "shared_expert.up_proj"),),
}


def test_other_families_convert_with_all_groups(other_family: Path, tmp_path: Path) -> None:
    """``[N, 1]`` of the same bits for q, k, v and gate, up, whether stored apart or fused; nothing else changes."""
    manifest = rewrite.convert(other_family, tmp_path / "out", selection="all")
    before, after = under_new_names(other_family, manifest), raw_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    fused = FUSED[other_family.name]
    scales = {name for name in before if name.endswith(tuple(f"{module}.weight_scale" for module in fused))}
    assert all(any(f"{module}." in name for name in scales) for module in fused)
    assert {name for name in before if before[name] != after[name]} == scales
    schemes = compressed_tensors_schemes(tmp_path / "out")
    for name in scales:
        rows = before[name.removesuffix("_scale")][2][0]
        assert after[name] == (*before[name][:2], (rows, 1), before[name][3] * rows)
        scheme = schemes[name.removesuffix(".weight_scale")]
        assert (scheme.weights.strategy, scheme.input_activations.dynamic) == ("channel", False)


def test_other_families_dequantize_with_all_groups(other_family: Path, tmp_path: Path) -> None:
    """The same modules, and in_proj_qkvz: SGLang from 0.5.11 cannot load its one scale."""
    rewrite.convert(other_family, tmp_path / "out", profile="bf16", selection="all")
    stored_fused = ("in_proj_qkvz",) if other_family.name == "llmcompressor-qwen3_next" else ()
    assert_dequantized(other_family, tmp_path / "out", FUSED[other_family.name] + stored_fused)


def test_a_layer_stored_fused_takes_no_vector(tmp_path: Path) -> None:
    """Phi-3: no loader reads one there, and none loses anything (tests/loader_matrix.json)."""
    source = FIXTURES / "llmcompressor-phi3"
    assert not rewrite.convert(source, tmp_path / "out", profile="partition", selection="all").changed
    assert tree(tmp_path / "out") == tree(source)


@pytest.mark.parametrize("selection", ["qkvz", "all"])
@pytest.mark.parametrize("profile", ["exact", "portable"])
def test_mixed_precision_has_no_channel_scales(profile: str, selection: Any, tmp_path: Path) -> None:
    """No word for them that all of its loaders read: refused, a profile that can is named, nothing is written."""
    with pytest.raises(rewrite.Unsupported, match=r"Mixed precision[^$]*FP8, NVFP4[^$]*--profile bf16"):
        rewrite.convert(FIXTURES / MIXED_PRECISION, tmp_path / "out", profile=profile, selection=selection)
    assert not list(tmp_path.iterdir())


def strip_quantization(directory: Path) -> None:
    edit_json(directory / "config.json", quantization_config=None)


def strip_quant_file(directory: Path) -> None:
    (directory / "hf_quant_config.json").unlink()


@pytest.mark.parametrize("strip", [None, strip_quantization, strip_quant_file])
@pytest.mark.parametrize("selection", ["qkvz", "all"])
def test_mixed_precision_in_bf16(
    strip: Callable[[Path], None] | None, selection: Any, copy_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """The group leaves every list of quantized layers, whichever files state them; NVFP4 layers stay as they are."""
    source, out = copy_of(MIXED_PRECISION), tmp_path / "out"
    if strip:
        strip(source)
    rewrite.convert(source, out, profile="bf16", selection=selection)
    parts = ("in_proj_qkv", "in_proj_z", *(("q_proj", "k_proj", "v_proj") if selection == "all" else ()))
    assert_dequantized(source, out, parts)
    for name, key in (("config.json", "quantization_config"), ("hf_quant_config.json", "quantization")):
        if not (source / name).exists() or key not in (before := json.loads((source / name).read_text())):
            continue
        old, new = before[key], json.loads((out / name).read_text())[key]
        listed = old["quantized_layers"]
        assert new["quantized_layers"] == {k: v for k, v in listed.items() if not k.endswith(parts)} != listed
        targets = {target for group in new.get("config_groups", {}).values() for target in group["targets"]}
        assert targets == (new["quantized_layers"].keys() if "config_groups" in new else set())
    assert rewrite.verify(source, out, device="cpu", tokens=4).ok
    assert not rewrite.convert(out, tmp_path / "again", profile="bf16", selection=selection).changed


@pytest.mark.parametrize("selection", ["qkvz", "all"])
def test_mixed_precision_in_vectors(selection: Any, tmp_path: Path) -> None:
    """Only the scales change, not a byte of config: a vector is worded as per tensor."""
    source, out = FIXTURES / MIXED_PRECISION, tmp_path / "out"
    rewrite.convert(source, out, profile="partition", selection=selection)
    before, after = raw_tensors(source), raw_tensors(out)
    assert {name.rpartition("linear_attn.")[2]: after[name][2] for name in before if before[name] != after[name]} == {
        "in_proj_qkv.weight_scale": (3,)
    }
    changed = {name for name, data in tree(source).items() if tree(out)[name] != data}
    assert changed == {"model.safetensors"}
    assert rewrite.verify(source, out, device="cpu", tokens=4).ok


@pytest.mark.parametrize("name", ["config.json", "hf_quant_config.json"])
@pytest.mark.parametrize("fixture", [MIXED_PRECISION, "modelopt-qwen3_5-vl"])
def test_a_dequantized_module_that_a_config_still_lists_is_found(fixture: str, name: str, tmp_path: Path) -> None:
    """A loader that reads this file would look for its scales."""
    source, out = FIXTURES / fixture, tmp_path / "out"
    rewrite.convert(source, out, profile="bf16")
    (out / name).write_bytes((source / name).read_bytes())
    found = rewrite.verify(source, out, device="cpu", tokens=4)
    structure = next(check for check in found.checks if check.name == "structure")
    assert not found.ok and structure.verdict == "FAILED"
    assert f"{name}: model.language_model.layers.0.linear_attn.in_proj_qkv has a scheme" in "\n".join(
        structure.problems
    )


def test_mixed_precision_keeps_a_layer(copy_of: Callable[[str], Path]) -> None:
    """vLLM and SGLang refuse an empty list of quantized layers."""
    source = copy_of(MIXED_PRECISION)
    value = json.loads((source / "config.json").read_text())
    layers = value["quantization_config"]["quantized_layers"]
    value["quantization_config"]["quantized_layers"] = {k: v for k, v in layers.items() if "in_proj" in k}
    edit_json(source / "config.json", **value)
    with pytest.raises(rewrite.Unsupported, match="No layer would stay quantized"):
        rewrite.make_plan(rewrite.open_checkpoint(source), "bf16")


@pytest.mark.parametrize("fixture", [MIXED_PRECISION, "modelopt-qwen3_5-vl"])
@pytest.mark.parametrize("profile", ["bf16", "partition"])
@pytest.mark.parametrize("stated", [None, [], "FP8", {}, {"quant_algo": "FP8"}, {"exclude_modules": None}])
def test_an_odd_file_of_modelopts_is_no_fault_of_the_conversion(
    stated: Any, profile: str, fixture: str, copy_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """config.json counts; the file comes along where the dialect stays, and says no less than before."""
    source = copy_of(fixture)
    (source / "hf_quant_config.json").write_text(json.dumps({"producer": {}, "quantization": stated}))
    rewrite.convert(source, tmp_path / "out", profile=profile)
    assert rewrite.verify(source, tmp_path / "out", device="cpu", tokens=4).ok
    file = tmp_path / "out" / "hf_quant_config.json"
    if fixture == MIXED_PRECISION and profile == "bf16" and isinstance(stated, dict):
        assert not file.exists(), "it states another dialect than the config that has changed"
        return
    after = json.loads(file.read_text())["quantization"]
    if isinstance(stated, dict):  # it may gain the list of layers that has changed, and nothing else
        assert {**after, "exclude_modules": None} == {**stated, "exclude_modules": None}
    else:
        assert after == stated


@pytest.mark.parametrize("entry", [None, [], {"a": "FP8"}, {"a": {"quant_algo": 8}}])
def test_mixed_precision_of_the_wrong_shape_is_refused(entry: Any, copy_of: Callable[[str], Path]) -> None:
    """With the place in config.json."""
    source = copy_of(MIXED_PRECISION)
    value = json.loads((source / "config.json").read_text())
    value["quantization_config"]["quantized_layers"] = entry
    edit_json(source / "config.json", **value)
    with pytest.raises(rewrite.ConfigError, match=r"quantization_config\.quantized_layers"):
        rewrite.make_plan(rewrite.open_checkpoint(source), "bf16")


@pytest.mark.parametrize("profile", rewrite.PROFILES)
def test_a_dialect_known_by_name_is_refused_by_name(
    profile: str, copy_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """Also where no group is affected, and never as a config that contradicts its tensors."""
    source = copy_of("llmcompressor-llama")
    edit_json(source / "config.json", quantization_config={"quant_method": "torchao"})
    selection: Any = "qkvz" if profile == "portable" else "all"
    with pytest.raises(rewrite.Unsupported, match=r"dialect cannot be converted[^$]*torchao"):
        rewrite.convert(source, tmp_path / "out", profile=profile, selection=selection)


def test_all_groups_are_explicit_and_experts_are_left_alone(tmp_path: Path) -> None:
    """Nothing that engines fuse is requantized; experts take channel scales with dynamic activations only."""
    source, out = FIXTURES / "llmcompressor-qwen3_5-moe", tmp_path / "out"
    rewrite.convert(source, out, selection="all")
    after = raw_tensors(out)
    explicit = {n for n, v in after.items() if n.endswith("weight_scale") and len(v[2]) == 2}
    assert any("self_attn.q_proj" in name for name in explicit)
    assert any("shared_expert.gate_proj" in name for name in explicit)
    assert not any(".experts." in name or "o_proj" in name or "down_proj" in name for name in explicit)
    schemes = compressed_tensors_schemes(out)
    for name in explicit:
        assert schemes[name.removesuffix(".weight_scale")].weights.strategy == "channel"


def test_a_modelopt_checkpoint_is_restated_for_exact(tmp_path: Path) -> None:
    """ModelOpt has no words for channel scales with static activations; nothing about the other layers changes."""
    source, out = FIXTURES / "modelopt-qwen3_5-moe", tmp_path / "out"
    manifest = rewrite.convert(source, out)
    assert not (out / "hf_quant_config.json").exists()
    assert any("hf_quant_config.json is left out" in note for note in manifest.notes)
    schemes, dialect = compressed_tensors_schemes(out), read_dialect(rewrite.open_checkpoint(source))
    for name, (_, dtype, _, _) in raw_tensors(source).items():
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and dtype == "F8_E4M3":
            expected = "channel" if module.endswith(("in_proj_qkv", "in_proj_z")) else "tensor"
            assert schemes[module].weights.strategy == expected
            assert schemes[module].input_activations.dynamic is False
        elif module in schemes:
            assert (schemes[module] is None) == (dialect.scheme(module) is None)


def test_modelopt_with_its_own_file_only(copy_of: Callable[[str], Path], tmp_path: Path) -> None:
    """Older exports say nothing in config.json: the new config is added to it, at its end."""
    source = copy_of("modelopt-qwen3_5-vl")
    edit_json(source / "config.json", quantization_config=None)
    before = (source / "config.json").read_text()
    rewrite.convert(source, tmp_path / "out")
    after = (tmp_path / "out" / "config.json").read_text()
    assert after.startswith(before.rstrip().removesuffix("}").rstrip())
    assert list(json.loads(after))[-1] == "quantization_config"
    assert rewrite.verify(source, tmp_path / "out", device="cpu", tokens=4).ok


def test_modelopts_two_configs_disagree(copy_of: Callable[[str], Path], tmp_path: Path) -> None:
    """Said, and which one counted."""
    source = copy_of("modelopt-qwen3_5-vl")
    value = json.loads((source / "hf_quant_config.json").read_text())
    value["quantization"]["exclude_modules"].append("extra")
    edit_json(source / "hf_quant_config.json", **value)
    manifest = rewrite.convert(source, tmp_path / "out")
    assert any("config.json counted" in note for note in manifest.notes)


def with_index(directory: Path) -> Path:
    """A checkpoint of one shard with the index that it needs not have."""
    weight_map = {name: entry[0] for name, entry in sorted(raw_tensors(directory).items())}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


@pytest.mark.parametrize("profile", ["exact", "portable"])
def test_scales_of_the_kv_cache_get_the_names_that_every_loader_reads(
    profile: str, copy_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """With compressed-tensors' config, transformers looks for its names only, and says nothing of others."""
    source, out = with_index(copy_of("modelopt-llama")), tmp_path / "out"
    manifest = rewrite.convert(source, out, profile=profile, selection="all")
    assert manifest.renamed == KV_SCALES
    before, after = raw_tensors(source), raw_tensors(out)
    for old, new in KV_SCALES.items():
        assert before[old][2] == ()
        assert after[new] == (*before[old][:2], (1,), before[old][3])
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == after.keys()
    assert json.loads((out / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]["num_bits"] == 8
    assert rewrite.verify(source, out, device="cpu", tokens=4).ok
    assert not rewrite.convert(out, tmp_path / "again", profile=profile, selection="all").changed


@pytest.mark.parametrize("profile", ["bf16", "partition"])
def test_scales_of_the_kv_cache_keep_modelopts_names_in_modelopts_dialect(profile: str, tmp_path: Path) -> None:
    """Its loaders read those."""
    source = FIXTURES / "modelopt-llama"
    manifest = rewrite.convert(source, tmp_path / "out", profile=profile, selection="all")
    assert manifest.renamed == {}
    assert raw_tensors(tmp_path / "out").keys() >= KV_SCALES.keys()


def test_a_wrong_scale_of_the_kv_cache_is_found(tmp_path: Path) -> None:
    """Under its new name: another value, none, one more."""
    source, out = FIXTURES / "modelopt-llama", tmp_path / "out"
    rewrite.convert(source, out, selection="all")
    good = {name: entry[1:] for name, entry in raw_tensors(out).items()}
    old, new = next(iter(KV_SCALES.items()))

    def problems(tensors: dict[str, Any]) -> dict[str, str]:
        write_shard(out / "model.safetensors", tensors, format="pt")
        found = rewrite.verify(source, out, device="cpu", tokens=4)
        # The manifest names the sizes of shards.
        said = {c.name: [p for p in c.problems if not p.startswith("rewrite_manifest.json")] for c in found.checks}
        return {name: each[0] for name, each in said.items() if each}

    assert problems(good) == {}
    assert old in problems({**good, new: ("F32", (1,), struct.pack("<f", 0.5))})["untouched"]
    assert f"{old}: missing" in problems({n: v for n, v in good.items() if n != new})["structure"]
    assert "extra: not in the source" in problems({**good, "extra": good[new]})["structure"]


@pytest.mark.parametrize("algorithm", ["FP8", None])
def test_kv_cache_quantization_carries_over(
    algorithm: str | None, copy_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """As compressed-tensors' kv_cache_scheme."""
    source = copy_of("modelopt-qwen3_5-vl")
    value = json.loads((source / "config.json").read_text())
    value["quantization_config"]["kv_cache_quant_algo"] = algorithm
    edit_json(source / "config.json", **value)
    rewrite.convert(source, tmp_path / "out")
    scheme = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    assert (scheme is not None and scheme["num_bits"] == 8) == (algorithm == "FP8")


@pytest.mark.parametrize("activations", ["static", "dynamic"])
@pytest.mark.parametrize("profile", rewrite.PROFILES)
def test_the_fp8_dialect(profile: str, activations: str, copy: Path, tmp_path: Path) -> None:
    """AutoFP8's and vLLM's own: assembled from llm-compressor's tensors, F32 scales of shape ()."""
    weight_map: dict[str, str] = {}
    for path in sorted(copy.glob("*.safetensors")):
        kept = {n: v[1:] for n, v in raw_tensors(copy).items() if v[0] == path.name}
        if activations == "dynamic":
            kept = {n: v for n, v in kept.items() if not n.endswith("input_scale")}
        kept = {n: ("F32", (), b"\0\0" + v[2]) if n.endswith("_scale") else v for n, v in kept.items()}
        write_shard(path, dict(sorted(kept.items(), key=lambda item: item[1][0] != "F32")), format="pt")
        weight_map |= dict.fromkeys(kept, path.name)
    plain = [n.removesuffix(".weight") for n, v in raw_tensors(copy).items() if v[1] == "BF16" and len(v[2]) == 2]
    edit_json(copy / "model.safetensors.index.json", weight_map=weight_map)
    value = {"quant_method": "fp8", "activation_scheme": activations, "ignored_layers": plain}
    edit_json(copy / "config.json", quantization_config=value)
    assert rewrite.convert(copy, tmp_path / "out", profile=profile).changed == (profile != "rescaled")
    found = rewrite.verify(copy, tmp_path / "out", device="cpu", tokens=4)
    assert found.ok == (profile != "rescaled"), [problem for check in found.checks for problem in check.problems]


@pytest.mark.parametrize("scale", [0.001, 1.0, 3.7e-5, 1e30])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_dequantized_codes_are_torchs(scale: float, dtype: str) -> None:
    """All 256 of them, NaN included."""
    scale = struct.unpack("<f", struct.pack("<f", scale))[0]
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    expected = (codes.float() * torch.tensor(scale)).to(KINDS[dtype])
    ours = torch.frombuffer(bytearray(b"".join(dequantize("F8_E4M3", scale, dtype))), dtype=KINDS[dtype])
    assert torch.equal(ours.isnan(), expected.isnan())
    assert torch.equal(ours.nan_to_num(), expected.nan_to_num())


def test_profiles_refuse_what_they_cannot_carry(text: Path, copy: Path, tmp_path: Path) -> None:
    """With a reason, naming what can."""
    rewrite.convert(text, tmp_path / "exact")
    with pytest.raises(rewrite.Unsupported, match="not dequantized") as caught:
        rewrite.convert(tmp_path / "exact", tmp_path / "out", profile="bf16")
    assert caught.value.hint is not None
    assert caught.value.hint.endswith("--profile dynamic or portable or dequantized converts it")
    edit_json(copy / "config.json", quantization_config={"quant_method": "torchao"})
    for profile in rewrite.PROFILES:
        with pytest.raises(rewrite.Refused):
            rewrite.convert(copy, tmp_path / "out", profile=profile)


@pytest.mark.parametrize("profile", ["dynamic", "portable"])
def test_profiles_follow_each_other(profile: str, text: Path, tmp_path: Path) -> None:
    """What exact wrote can be taken a step further: the result is what a direct conversion gives."""
    rewrite.convert(text, tmp_path / "exact")
    rewrite.convert(tmp_path / "exact", tmp_path / "further", profile=profile)
    rewrite.convert(text, tmp_path / "direct", profile=profile)
    further, direct = (raw_tensors(tmp_path / name) for name in ("further", "direct"))
    assert {name: value[1:] for name, value in further.items()} == {n: value[1:] for n, value in direct.items()}
    assert rewrite.verify(tmp_path / "exact", tmp_path / "further", device="cpu").ok


def test_patterns_never_catch_quantized_layers() -> None:
    """An exact name is generalized to all layers only where that is true of all layers."""
    quantized = frozenset({"model.layers.1.mlp.up_proj"})
    layers = Layers(quantized, ("model.layers.0.mlp.up_proj",), quantized)
    base = json.loads((FIXTURES / "llmcompressor-qwen3_5-text" / "config.json").read_text())["quantization_config"]
    value = {**base, "ignore": ["model.layers.0.mlp.up_proj"]}
    after = CompressedTensors(value).portable(quantized, layers, [])
    assert after.scheme("model.layers.1.mlp.up_proj") is not None
    assert after.scheme("language_model.model.layers.0.mlp.up_proj") is None
    assert QKVZ not in after.value["ignore"]


def test_weights_that_would_not_be_finite_are_refused(copy_of: Callable[[str], Path], tmp_path: Path) -> None:
    """A scale that calibration never set. inspect ended in an OverflowError here."""
    source = copy_of("llmcompressor-qwen3_5-text")
    scale = "model.layers.0.linear_attn.in_proj_qkv.weight_scale"
    replace_tensor(source, scale, struct.pack("<f", 1e37)[2:])
    found = rewrite.inspect_checkpoint(source)
    assert any("never set by calibration" in finding.what for finding in found.findings)
    for profile in ("bf16", "dequantized"):
        with pytest.raises(rewrite.Refused, match="would not be finite"):
            rewrite.convert(source, tmp_path / profile, profile=profile)
