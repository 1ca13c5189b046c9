"""Damage to true conversions: every key and every byte that the promise does not name must be IN's."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import rewrite
from rewrite.cli.commands import main
from rewrite.planning.profiles import PROFILES
from tests.planning.test_check import mixed
from tests.support import FIXTURES, edit_json, raw_tensors, replace_tensor, unfolded
from tests.zoo.rebuild import rebuild

MANIFEST = "rewrite_manifest.json"
HF = "hf_quant_config.json"


def converted(name: str, profile: str, out: Path, **options: Any) -> tuple[Path, Path]:
    rewrite.convert(FIXTURES / name, out, profile=profile, **options)
    return FIXTURES / name, out


def problems(source: Path, out: Path, **options: Any) -> dict[str, str]:
    found = rewrite.verify(source, out, device="cpu", tokens=2, rows=16, **options)
    return {check.name: "\n".join(check.problems) for check in found.checks if check.problems}


def quantization(directory: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads((directory / "config.json").read_text())
    edit(value["quantization_config"])
    (directory / "config.json").write_text(json.dumps(value, indent=2))


def zero(directory: Path, wanted: Callable[[str], bool]) -> None:
    for name, (_, _, _, data) in raw_tensors(directory).items():
        if wanted(name):
            replace_tensor(directory, name, bytes(len(data)))


@pytest.mark.parametrize(
    ("name", "profile"), [("llmcompressor-qwen3_5-vl", "dynamic"), ("llmcompressor-qwen3_5-moe", "portable")]
)
def test_a_tensor_that_may_be_gone_and_is_still_there_is_compared(name: str, profile: str, tmp_path: Path) -> None:
    """Input scales of 0, under the manifest of a profile that drops them."""
    converted(name, profile, tmp_path / "other")
    source, out = converted(name, "exact", tmp_path / "out")
    shutil.copy(tmp_path / "other" / MANIFEST, out)
    zero(out, lambda tensor: tensor.endswith("input_scale") and ("experts." in tensor or "in_proj" in tensor))
    found = problems(source, out)
    assert "input_scale differs at byte" in found["untouched"]
    assert "input_scale: is what it was in IN" in found["structure"]


def _edits(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], str]]:
    """Every way to change one key of a JSON value: another value, gone, one more."""
    if isinstance(value, dict | list):
        yield path, "more"
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _edits(each, (*path, key))
            yield (*path, key), "gone"
    else:
        yield path, "other"


def _edited(document: Any, path: tuple[Any, ...], how: str) -> Any:
    document = deepcopy(document)
    inner = document
    for key in path if how == "more" else path[:-1]:
        inner = inner[key]
    if how == "more":
        inner.append("odd.name") if isinstance(inner, list) else inner.update(odd=1)
    elif how == "gone":
        del inner[path[-1]]
    else:
        old = inner[path[-1]]
        inner[path[-1]] = not old if isinstance(old, bool) else f"{old}x" if not isinstance(old, int) else old + 1
    return document


@pytest.mark.parametrize(
    ("name", "profile", "options"),
    [
        ("llmcompressor-qwen3_5-text", "exact", {}),
        ("llmcompressor-qwen3_5-text", "portable", {}),
        ("fp8-qwen3_5-vl", "dynamic", {}),
        ("modelopt-llama", "portable", {"selection": "all"}),
        ("modelopt-llama", "bf16", {"selection": "all", "kv_scales": "drop"}),
        ("modelopt-llama", "partition", {"kv_scales": "drop"}),
        ("modelfree-qwen3_5-moe-nvfp4a16", "exact", {}),
    ],
)
def test_no_key_of_the_quantization_may_change(
    name: str, profile: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """Whatever its name and wherever it is nested, in config.json and in ModelOpt's own file."""
    source, out = converted(name, profile, tmp_path / "out", **options)
    assert problems(source, out) == {}
    tried = 0
    for file, under in (("config.json", "quantization_config"), (HF, "quantization")):
        if not (out / file).exists():
            continue
        text = (out / file).read_text()
        document = json.loads(text)
        for path, how in _edits(document[under], (under,)):
            if {"ignore", "targets"} & set(path) or (path[-1] == "observer" and how == "gone"):
                continue  # judged by what they match, and nothing is what no observer says
            (out / file).write_text(json.dumps(_edited(document, path, how), indent=2))
            fast = problems(source, out, quick=True, weights_only=True)  # without what groups match
            assert fast or problems(source, out, quick=True), (file, path, how)
            tried += 1
        (out / file).write_text(text)
    assert tried > 30


def other_dialect(value: dict[str, Any]) -> None:
    value.clear()
    value.update(quant_method="fp8", activation_scheme="static")


def other_targets(value: dict[str, Any]) -> None:
    for group in value["config_groups"].values():
        group["targets"] = ["re:.*proj$" if target == "Linear" else target for target in group["targets"]]


def old_size(source: Path, out: Path) -> None:
    metadata = json.loads((source / "model.safetensors.index.json").read_text())["metadata"]
    edit_json(out / "model.safetensors.index.json", metadata=metadata)


def no_copy(_source: Path, out: Path) -> None:
    files = json.loads((out / MANIFEST).read_text())["files"]
    edit_json(out / MANIFEST, files=[{**each, "rewritten": False} for each in files])


def stated(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path, Path], None]:
    return lambda _source, out: quantization(out, edit)


def still_fp8(source: Path, out: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    _, dtype, shape, data = raw_tensors(source)[name]
    replace_tensor(out, name, data, shape, dtype)


def empty(_source: Path, out: Path) -> None:
    edit_json(out / "config.json", quantization_config={"quant_method": "compressed-tensors", "config_groups": {}})


@pytest.mark.parametrize(
    ("profile", "edit", "said"),
    [
        ("bf16", stated(lambda q: q["ignore"].pop()), "in_proj_z has a scheme, its weight is BF16"),
        ("portable", stated(lambda q: q["ignore"].append("re:.*in_proj_z$")), "in_proj_z has no scheme, its scale"),
        ("exact", stated(lambda q: q["ignore"].append("odd.name")), "quantization_config.ignore: "),
        ("bf16", stated(lambda q: q["ignore"].pop(0)), "quantization_config.ignore: "),
        ("exact", stated(other_targets), "targets of classes were ['Linear'], are []"),
        ("bf16", stated(other_dialect), "the dialect is"),
        ("dequantized", empty, "still states a quantization"),
        ("dequantized", still_fp8, "up_proj.weight: F8_E4M3 [64, 64] is left of the quantization"),
        ("exact", stated(lambda q: q["ignore"].remove("lm_head")), "lm_head has another scheme than in the source"),
        ("exact", old_size, "total_size is 212204, the tensors take"),
        ("exact", no_copy, "safetensors: is said to be a copy, and is none"),
    ],
)
def test_what_structure_alone_sees(
    profile: str, edit: Callable[[Path, Path], None], said: str, text: Path, tmp_path: Path
) -> None:
    """No byte of a tensor tells."""
    source, out = converted(text.name, profile, tmp_path / "out")
    edit(source, out)
    assert said in problems(source, out, quick=True)["structure"]


def test_modelopts_file_keeps_what_it_says(tmp_path: Path) -> None:
    """Beside its lists of layers."""
    source, out = converted("modelopt-llama", "bf16", tmp_path / "out", selection="all")
    edit_json(out / HF, producer={"name": "another"})
    assert f"{HF}: differs outside its lists of layers" in problems(source, out)["untouched"]


@pytest.mark.parametrize(
    ("file", "kv_scales", "other", "said"),
    [
        ("config.json", "drop", "keep", "config.json: still states a quantized KV cache"),
        (HF, "drop", "keep", f"{HF}: still states a quantized KV cache"),
        ("config.json", "keep", "drop", "config.json: no longer states a quantized KV cache"),
    ],
)
def test_the_configs_follow_the_scales_of_a_cache(
    file: str, kv_scales: Any, other: Any, said: str, tmp_path: Path
) -> None:
    """Engines go by the one or the other."""
    converted("modelopt-llama", "bf16", tmp_path / "other", selection="all", kv_scales=other)
    source, out = converted("modelopt-llama", "bf16", tmp_path / "out", selection="all", kv_scales=kv_scales)
    shutil.copy(tmp_path / "other" / file, out)
    assert said in problems(source, out, quick=True)["structure"]


def test_layers_that_keep_their_format_stay_listed(tmp_path: Path) -> None:
    """ModelOpt's quantized_layers and the targets of its groups: without them engines take codes for weights."""
    source, out = converted("modelopt-qwen3_5-mixed", "partition", tmp_path / "out")
    assert problems(source, out, quick=True) == {}

    def edit(value: dict[str, Any]) -> None:
        for name in [name for name in value["quantized_layers"] if "in_proj" in name]:
            del value["quantized_layers"][name]
            for group in value["config_groups"].values():
                group["targets"] = [target for target in group["targets"] if target != name]

    quantization(out, edit)
    assert "quantization_config.quantized_layers: " in problems(source, out, quick=True)["structure"]


def test_a_copy_of_the_quantization_must_be_gone(text: Path, tmp_path: Path) -> None:
    """AutoRound's, which engines may read first; where nothing changed, it stays."""
    source, name = Path(shutil.copytree(text, tmp_path / "in")), "quantization_config.json"
    (source / name).write_text("{}")
    for profile, file, said in (
        ("exact", source / name, f"{name}: contradicts"),
        ("partition", None, f"{name}: missing"),
    ):
        out = tmp_path / profile
        rewrite.convert(source, out, profile=profile)
        assert problems(source, out) == {}
        shutil.copy(file, out) if file else (out / name).unlink()
        assert said in problems(source, out)["untouched"]


def test_a_norm_does_not_make_up_for_any_factor(tmp_path: Path) -> None:
    """Its epsilon counts where its input is much smaller than it was."""
    source = Path(shutil.copytree(FIXTURES / "modelfree-deepseek_v3-nvfp4a16", tmp_path / "in"))
    rewrite.convert(source, tmp_path / "out")
    for name, (_, _, shape, raw) in raw_tensors(source).items():
        if name.endswith("q_a_proj.weight_global_scale"):
            replace_tensor(source, name, struct.pack("<f", struct.unpack("<f", raw)[0] * 300), shape)
    found = problems(source, tmp_path / "out", quick=True, weights_only=True)
    assert "a norm stands behind a factor of 127: its epsilon may count" in found["weights"]


def test_the_kv_cache_keeps_its_scheme(tmp_path: Path) -> None:
    """FP8 static that became INT4 dynamic."""
    source, out = converted("modelopt-llama", "portable", tmp_path / "out")
    quantization(out, lambda q: q["kv_cache_scheme"].update(num_bits=4, type="int", dynamic=True))
    assert 'quantization_config.kv_cache_scheme: {"dynamic": true' in problems(source, out)["structure"]


def test_a_key_is_compared_as_json_has_it(text: Path, tmp_path: Path) -> None:
    """1 is not true."""
    source, out = converted(text.name, "exact", tmp_path / "out")
    quantization(out, lambda q: q["config_groups"]["group_0"]["weights"].update(symmetric=1))
    assert "config_groups.group_0: says what no group of IN says" in problems(source, out)["structure"]


@pytest.mark.parametrize("edit", [{"sparsity_config": {"format": "dense"}}, {"transform_config": {"a": 1}}])
def test_a_new_key_is_named(edit: dict[str, Any], text: Path, tmp_path: Path) -> None:
    """Whatever it is called."""
    source, out = converted(text.name, "exact", tmp_path / "out")
    quantization(out, lambda q: q.update(edit))
    assert f"quantization_config.{next(iter(edit))}: " in problems(source, out)["structure"]


def test_the_quantization_stays_where_it_was(text: Path, tmp_path: Path) -> None:
    """Under another key engines find it later, or not at all."""
    source, out = converted(text.name, "exact", tmp_path / "out")
    value = json.loads((out / "config.json").read_text())
    value["compression_config"] = value.pop("quantization_config")
    (out / "config.json").write_text(json.dumps(value, indent=2))
    assert "stated in another place than quantization_config" in problems(source, out)["structure"]


def test_a_list_of_layers_that_matches_a_fused_name_only(tmp_path: Path) -> None:
    """No stored module has the name; engines look it up."""
    source, out = converted("llmcompressor-qwen3_5-vl", "dynamic", tmp_path / "out")
    quantization(out, lambda q: q["ignore"].append(r"re:.*self_attn\.qkv_proj$"))
    assert "engines give the fused" in problems(source, out)["structure"]


def test_a_target_that_matches_the_fused_name_of_plain_layers(copy: Path, tmp_path: Path) -> None:
    """The parts are matched by nothing; engines quantize what has the name."""
    targets = [r"re:.*linear_attn\.(in_proj_qkv|in_proj_z|out_proj)$", "re:.*self_attn.*", r"re:.*mlp\..*_proj$"]
    quantization(copy, lambda q: q.update(ignore=["lm_head"]))
    quantization(copy, lambda q: q["config_groups"]["group_0"].update(targets=targets))
    out = tmp_path / "out"
    rewrite.convert(copy, out)
    assert problems(copy, out) == {}
    quantization(out, lambda q: q["config_groups"]["group_0"]["targets"].append("re:.*in_proj_ba$"))
    assert "0.linear_attn.in_proj_ba strategy tensor, its scales are gone" in problems(copy, out)["structure"]


def test_a_target_of_another_format_that_matches_a_fused_name(copy: Path, tmp_path: Path) -> None:
    """INT8 with a scale for each row, as the FP8 layer has."""
    mixed(copy, "INT8")
    out = tmp_path / "out"
    rewrite.convert(copy, out)
    quantization(out, lambda q: q["config_groups"]["group_1"]["targets"].append("re:.*in_proj_qkvz$"))
    first = {
        "group_1": json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"]["group_1"]
    }
    quantization(out, lambda q: q.update(config_groups=first | q["config_groups"]))
    assert "in_proj_qkvz another format than FP8" in problems(copy, out)["structure"]


def test_groups_keep_their_order(tmp_path: Path) -> None:
    """Engines take the first that matches."""
    source = rebuild("mfree-mixed-qwen3_5-vl", tmp_path / "in")
    rewrite.convert(source, tmp_path / "out", profile="portable")
    assert problems(source, tmp_path / "out") == {}
    quantization(tmp_path / "out", lambda q: q.update(config_groups=dict(reversed(q["config_groups"].items()))))
    assert "config_groups: in another order" in problems(source, tmp_path / "out")["structure"]


def test_a_file_that_contradicts_the_config_must_be_gone(tmp_path: Path) -> None:
    """ModelOpt's own beside a config of compressed-tensors."""
    source, out = converted("modelopt-llama", "portable", tmp_path / "out")
    shutil.copy(source / HF, out)
    assert f"{HF}: contradicts the quantization" in problems(source, out)["untouched"]


@pytest.mark.parametrize("profile", [name for name in PROFILES if name != "rescaled"])
def test_a_copy_under_the_manifest_of_a_conversion(profile: str, tmp_path: Path) -> None:
    """Nothing was repaired, and the manifest says otherwise."""
    source, out = converted("llmcompressor-qwen3_5-vl", profile, tmp_path / "out")
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    shutil.copy(out / MANIFEST, copy)
    assert "nothing was repaired: " in problems(source, copy)["structure"]


def test_a_part_that_was_not_repaired_is_named(text: Path, tmp_path: Path) -> None:
    """One scale of a layer."""
    source, out = converted(text.name, "exact", tmp_path / "out")
    name = "model.layers.0.linear_attn.in_proj_z.weight_scale"
    _, _, shape, data = raw_tensors(source)[name]
    replace_tensor(out, name, data, shape)
    assert f"{name}: is what it was in IN" in problems(source, out)["structure"]


def test_unequal_nvfp4_layers_that_were_not_repaired(tmp_path: Path) -> None:
    """Also without a manifest."""
    source = FIXTURES / "modelfree-qwen3_5-moe-nvfp4a16"
    assert "the modules still have different values" in problems(source, source)["weights"]


def _numbers(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _numbers(each, (*path, key))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path


@pytest.mark.parametrize(
    ("name", "profile"),
    [
        ("llmcompressor-qwen3_5-text", "exact"),
        ("llmcompressor-qwen3_5-text", "bf16"),
        ("llmcompressor-qwen3_5-text", "partition"),
        ("modelfree-qwen3_5-moe-nvfp4a16", "exact"),
        ("modelfree-qwen3_5-moe-nvfp4a16", "rescaled"),
    ],
)
def test_every_number_of_the_manifest_is_that_of_the_tensors(name: str, profile: str, tmp_path: Path) -> None:
    """Scales, rows, shapes, sizes of files."""
    source, out = converted(name, profile, tmp_path / "out")
    manifest = json.loads((out / MANIFEST).read_text())
    paths = list(_numbers(manifest))
    assert len(paths) > 10
    for path in paths:
        if path[0] == "files" and not manifest["files"][path[1]]["name"].endswith(".safetensors"):
            continue  # how JSON is spelled is not compared
        value = deepcopy(manifest)
        inner = value
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = inner[path[-1]] * 2 + 1
        (out / MANIFEST).write_text(json.dumps(value))
        assert MANIFEST in problems(source, out, quick=True, weights_only=True)["structure"], path


def test_what_a_conversion_costs_is_in_the_manifest_and_said(tmp_path: Path) -> None:
    """OUT alone does not show it: its own weights are exact."""
    source, out = converted("modelfree-qwen3_5-moe-nvfp4a16", "rescaled", tmp_path / "out")
    manifest = json.loads((out / MANIFEST).read_text())
    assert manifest["costs"] == dict.fromkeys(("in_proj_qkvz.z", "gate_up_proj.up", "experts.up"), 1 / 17)
    found = rewrite.verify(source, out, device="cpu")
    assert "rounding moved weights by up to 5." in found.checks[2].summary
    assert "; rescaled weights are off by up to 0.0" in found.checks[3].summary
    assert rewrite.inspect_checkpoint(source).costs == {}
    assert rewrite.inspect_checkpoint(out).costs == manifest["costs"]
    assert "experts.up moved by up to 5.9%" in unfolded(CliRunner().invoke(main, ["inspect", str(out)]).stdout)
    edit_json(out / MANIFEST, costs={})
    assert "costs: says {}, what was done costs {'in_proj_qkvz': 0.0588" in problems(source, out)["structure"]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("groups", [], "changed, and is not named"),
        ("dropped", ["model.norm.weight"], "dropped: 1 tensors, not the 0"),
        ("renamed", {"a": "b"}, "renamed: 1 tensors, not the 0"),
        ("files", [], "files: other names than those of OUT"),
        ("global_scales", [{"name": "a"}], "global_scales: names 1 layers, not the 0"),
        ("files", 3, "not a manifest of rewrite"),
        ("profile", "exactly", "profile: none of rewrite's"),
        ("selection", "some", "selection: none of rewrite's"),
    ],
)
def test_what_the_manifest_leaves_out_or_makes_up(
    key: str, value: object, said: str, text: Path, tmp_path: Path
) -> None:
    """Whatever its type."""
    source, out = converted(text.name, "exact", tmp_path / "out")
    edit_json(out / MANIFEST, **{key: value})
    assert said in problems(source, out)["structure"]


def test_what_the_manifest_leaves_out_is_in_the_order_of_names(vl: Path, tmp_path: Path) -> None:
    """The same in every run, where only the first of many are kept, too."""
    source, out = converted(vl.name, "exact", tmp_path / "out")
    edit_json(out / MANIFEST, groups=[])
    unnamed = [line for line in problems(source, out)["structure"].splitlines() if "is not named" in line]
    assert len(unnamed) > 5 and unnamed == sorted(unnamed)


def test_a_manifest_of_another_conversion(tmp_path: Path) -> None:
    """The same profile, another checkpoint."""
    converted("llmcompressor-qwen3_5-text", "exact", tmp_path / "other")
    source, out = converted("llmcompressor-qwen3_5-vl", "exact", tmp_path / "out")
    shutil.copy(tmp_path / "other" / MANIFEST, out)
    assert "did not change" in problems(source, out)["structure"]


def test_without_a_manifest_the_scales_of_a_cache_are_expected(tmp_path: Path) -> None:
    """Nobody says that they were dropped."""
    source, out = converted("modelopt-llama", "exact", tmp_path / "out", kv_scales="drop")
    assert problems(source, out) == {}
    (out / MANIFEST).unlink()
    assert "k_scale: missing" in problems(source, out)["structure"]


def test_a_conversion_of_a_conversion_keeps_its_manifest(text: Path, tmp_path: Path) -> None:
    """Where nothing is left to do OUT is a copy of IN, whose manifest is about an earlier conversion."""
    _, once = converted(text.name, "exact", tmp_path / "once")
    assert not rewrite.convert(once, tmp_path / "twice").changed
    assert problems(once, tmp_path / "twice") == {}


@pytest.mark.parametrize("value", [{"weights": None}, 1, "x", {"weights": {"num_bits": 9, "type": "float"}}, []])
def test_a_group_of_any_kind_is_a_problem_and_no_traceback(value: object, text: Path, tmp_path: Path) -> None:
    """compressed-tensors' validators raise errors of many kinds."""
    source, out = converted(text.name, "exact", tmp_path / "out")
    quantization(out, lambda q: q["config_groups"].update(group_1=value))
    assert problems(source, out)["structure"]
