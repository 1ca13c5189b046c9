"""The check of every plan: conversions that would change more than they should are refused."""

from __future__ import annotations

import json
import struct
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import rewrite
from rewrite import Unsupported
from rewrite.ledger.fault import Fault
from rewrite.planning.check import check_plan, refuse_values
from rewrite.planning.profiles.base import PlannedScheme
from rewrite.quantization.dialects.compressed_tensors import CompressedTensors
from rewrite.quantization.model import Model, interpret
from tests.ledger.test_kinds import KV, LLAMA, MOE, edited, plain, same, without
from tests.ledger.test_table import Tensors, changed
from tests.recipes import draw, make
from tests.support import edit_json, write_shard

ARGUMENTS: dict[str, dict[str, Any]] = {
    "INT8": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True},
    "INT4": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True},
    "NVFP4": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True},
}
STORED = {"INT8": ("weight", "I8", 1), "INT4": ("weight_packed", "I32", 8), "NVFP4": ("weight_packed", "U8", 2)}
_ONE = b"\x80\x3f"  # in BF16
SCALES: dict[str, dict[str, tuple[str, tuple[int, ...], bytes]]] = {
    "INT8": {"model.layers.0.mlp.extra.weight_scale": ("BF16", (16, 1), _ONE * 16)},
    "INT4": {"model.layers.0.mlp.extra.weight_scale": ("BF16", (16, 1), _ONE * 16)},
    "NVFP4": {
        "model.layers.0.mlp.extra.weight_scale": ("F8_E4M3", (16, 8), b"\x38" * 128),
        "model.layers.0.mlp.extra.weight_global_scale": ("F32", (1,), struct.pack("<f", 1000)),
    },
}


def mixed(directory: Path, kind: str) -> None:
    """A second config group for a new layer ``mlp.extra`` of another format."""
    config = json.loads((directory / "config.json").read_text())
    value = config["quantization_config"]
    group = {"targets": ["re:.*extra$"], "weights": ARGUMENTS[kind], "input_activations": None}
    value["config_groups"]["group_1"] = group
    edit_json(directory / "config.json", quantization_config=value)
    tensor, dtype, share = STORED[kind]
    size = 16 * (128 // share) * {"I32": 4}.get(dtype, 1)
    weight: tuple[str, tuple[int, ...], bytes] = (dtype, (16, 128 // share), bytes(size))
    tensors = {f"model.layers.0.mlp.extra.{tensor}": weight, **SCALES[kind]}
    write_shard(directory / "extra.safetensors", tensors)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(tensors, "extra.safetensors")
    edit_json(directory / "model.safetensors.index.json", weight_map=index["weight_map"])


@pytest.mark.parametrize("profile", ["exact", "dynamic", "portable"])
@pytest.mark.parametrize("kind", ARGUMENTS)
def test_other_formats_stay(kind: str, profile: str, copy: Path, tmp_path: Path) -> None:
    """The config group of another format is there afterwards, word for word, and its module is read by it."""
    mixed(copy, kind)
    before = open_model(copy).module("model.layers.0.mlp.extra").scheme
    assert rewrite.convert(copy, tmp_path / "out", profile=profile).changed
    assert open_model(tmp_path / "out").module("model.layers.0.mlp.extra").scheme == before
    assert before is not None and before.format == kind
    assert rewrite.verify(copy, tmp_path / "out", device="cpu").ok


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_a_profile_that_swallows_other_formats_is_refused(
    kind: str, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One group ``Linear`` for all would make FP8 of them. No profile plans that; the check does not rely on it."""
    mixed(copy, kind)
    stated = CompressedTensors.portable

    def one_group(*arguments: Any) -> CompressedTensors:
        value = stated(*arguments).value
        group = {**next(iter(value["config_groups"].values())), "targets": ["Linear"]}
        return CompressedTensors({**value, "config_groups": {"group_0": group}})

    monkeypatch.setattr(CompressedTensors, "portable", one_group)
    with pytest.raises(Unsupported, match="change how a module is read") as caught:
        rewrite.convert(copy, tmp_path / "out", profile="portable")
    assert caught.value.where == "model.layers.0.mlp.extra"
    assert caught.value.hint == "--profile exact or dynamic or bf16 or partition converts it"
    assert "portable" in rewrite.inspect_checkpoint(copy).refusals


@pytest.mark.parametrize("profile", ["exact", "dynamic", "portable"])
def test_plain_layers_stay_plain(profile: str, copy: Path, tmp_path: Path) -> None:
    """Targets by pattern and a short ignore list: everything else is plain, and must stay so."""
    config = json.loads((copy / "config.json").read_text())
    value = config["quantization_config"]
    value["ignore"] = ["lm_head"]
    patterns = (r".*linear_attn\.(in_proj_qkv|in_proj_z|out_proj)$", ".*self_attn.*", r".*mlp\..*_proj$")
    value["config_groups"]["group_0"]["targets"] = [f"re:{pattern}" for pattern in patterns]
    edit_json(copy / "config.json", quantization_config=value)
    assert rewrite.convert(copy, tmp_path / "out", profile=profile).changed
    assert open_model(tmp_path / "out").module("model.layers.0.linear_attn.in_proj_a").scheme is None
    assert rewrite.verify(copy, tmp_path / "out", device="cpu").ok


def open_model(directory: Path) -> Model:
    return interpret(rewrite.open_checkpoint(directory))


def test_every_scheme_must_fit_its_tensors(copy: Path, tmp_path: Path) -> None:
    """A layer whose config and tensors disagree, though the conversion would not touch it."""
    config = json.loads((copy / "config.json").read_text())
    value = config["quantization_config"]
    group = value["config_groups"]["group_0"]
    weights = {**group["weights"], "strategy": "channel"}
    value["config_groups"]["group_1"] = {**group, "targets": ["re:.*down_proj$"], "weights": weights}
    edit_json(copy / "config.json", quantization_config=value)
    with pytest.raises(Unsupported, match="does not fit") as caught:
        rewrite.convert(copy, tmp_path / "out")
    assert str(caught.value.where).endswith("down_proj")


def test_a_fused_name_that_another_group_has(tmp_path: Path) -> None:
    """The parts are in a group with dynamic activations, the fused name is in one with static ones: both per tensor, so
    engines load it. Both groups get channel scales: with the one that has the parts alone, verify failed OUT."""
    groups = (
        ("fp8-tensor-static", (r"re:^model\..*linear_attn\.in_proj.*",)),
        ("fp8-tensor-dynamic", ("re:.*in_proj_(qkv|z)$",)),
    )
    ignore = ("lm_head", "re:.*visual.*", "re:.*in_proj_[ab]$")
    recipe = replace(draw(0), base="modelopt-qwen3_5-vl", dialect="compressed-tensors", groups=groups, ignore=ignore)
    make(replace(recipe, kv_cache=False), tmp_path / "in")
    rewrite.convert(tmp_path / "in", tmp_path / "out", profile="portable")
    assert rewrite.verify(tmp_path / "in", tmp_path / "out", device="cpu", tokens=2).ok


O_PROJ = "model.layers.0.self_attn.o_proj"
LATER = O_PROJ.replace("0", "1")  # stored as the one before it
EXPERTS = "model.layers.0.mlp.experts."
STATIC, CHANNEL = PlannedScheme("tensor", "static"), PlannedScheme("channel", "static")


def another_module(tensors: Tensors) -> None:
    tensors["model.layers.0.another.weight"] = ("BF16", (4, 4), bytes(32))


def another_name(tensors: Tensors) -> None:
    another_module(tensors)
    del tensors["lm_head.weight"]


def ignoring(*names: str) -> Any:
    return lambda folder: edited(folder, ignore=list(names))


def second(key: str, value: object) -> Any:
    """ModelOpt's own file says something else; config.json does not."""

    def edit(folder: Path) -> None:
        path = folder / "hf_quant_config.json"
        stated = json.loads(path.read_text())
        stated["quantization"][key] = value
        path.write_text(json.dumps(stated))

    return edit


def per_token(folder: Path) -> None:
    """One scale a weight, and one for each token."""
    value = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]
    for group in value.values():
        group["input_activations"].update(dynamic=True, strategy="token")
    edited(folder, config_groups=value)


@pytest.mark.parametrize(
    ("name", "change", "edit", "planned", "where", "said"),
    [
        (LLAMA, another_module, None, {}, "model.layers.0.another", "one more"),
        (LLAMA, another_name, None, {}, "lm_head", "none of this name"),
        (LLAMA, lambda t: t.pop("lm_head.weight"), None, {}, "lm_head", "none of this name"),
        (LLAMA, same, ignoring(), {}, "lm_head", "FP8"),
        (LLAMA, same, ignoring("lm_head", O_PROJ), {}, O_PROJ, "not quantized"),
        (LLAMA, same, ignoring("lm_head", LATER), {}, LATER, "not quantized"),
        (LLAMA, same, ignoring("lm_head", O_PROJ), {O_PROJ: STATIC}, O_PROJ, "not quantized"),
        (LLAMA, same, None, {O_PROJ: STATIC, LATER: CHANNEL}, LATER, "FP8"),
        (LLAMA, same, None, {O_PROJ: None}, O_PROJ, "FP8"),
        (LLAMA, same, None, {O_PROJ: CHANNEL}, O_PROJ, "FP8"),
        (LLAMA, same, None, {O_PROJ: PlannedScheme("tensor", "dynamic")}, O_PROJ, "FP8"),
        (LLAMA, same, ignoring("lm_head", O_PROJ.replace("o_p", "qkv_p")), {}, O_PROJ.replace("o_p", "qkv_p"), "not"),
        (KV, same, second("exclude_modules", ["lm_head", "model.embed_tokens", O_PROJ]), {}, O_PROJ, "not quantized"),
        (KV, same, second("exclude_modules", ["model.embed_tokens"]), {}, "lm_head", "FP8"),
        (
            KV,
            plain("0.self_attn.o_proj"),
            ignoring("lm_head", "model.embed_tokens", O_PROJ),
            {O_PROJ: None},
            O_PROJ,
            "still listed",
        ),
        (MOE, same, per_token, {"*": PlannedScheme("tensor", "dynamic")}, EXPERTS, "FP8"),
    ],
)
def test_what_a_plan_may_not_do(
    name: str, change: Any, edit: Any, planned: dict[str, Any], where: str, said: str, tmp_path: Path
) -> None:
    """Whatever profile makes it: each is refused where it is. What the plan leaves alone passes."""
    (tmp_path / "as_is").mkdir()
    before, folder = open_model(changed(name, tmp_path / "as_is", same)), changed(name, tmp_path, change)
    check_plan(before, before, {O_PROJ: STATIC} if name == LLAMA else {})
    if edit is not None:
        edit(folder)
    after = open_model(folder)
    if "*" in planned:
        planned = {n: planned["*"] for kind in after.kinds if kind.first.fp8 for n in kind.names}
    with pytest.raises(Unsupported) as caught:
        check_plan(before, after, planned)
    assert str(caught.value.where).startswith(where) and said in str(caught.value.found), caught.value


def test_a_module_that_is_like_a_planned_one(tmp_path: Path) -> None:
    """One of a kind is planned, and the config changes all of them: the others are looked at, too."""
    (tmp_path / "as_is").mkdir()
    before, folder = open_model(changed(LLAMA, tmp_path / "as_is", same)), changed(LLAMA, tmp_path, same)
    per_token(folder)
    after = open_model(folder)
    planned = {
        name: PlannedScheme("tensor", "dynamic") for kind in after.kinds if kind.first.fp8 for name in kind.names
    }
    check_plan(before, after, planned)
    names = max((kind.names for kind in after.kinds if kind.first.fp8), key=len)
    with pytest.raises(Unsupported, match="change how a module is read") as caught:
        check_plan(before, after, {name: new for name, new in planned.items() if name not in names[1:]})
    assert caught.value.where == names[1]


def test_a_second_config_that_says_something_else_already(tmp_path: Path) -> None:
    """It stays as it was: no fault of the plan."""
    folder = changed(KV, tmp_path, same)
    second("exclude_modules", ["lm_head", "model.embed_tokens", O_PROJ])(folder)
    check_plan(open_model(folder), open_model(folder), {})


def test_the_order_of_groups_by_which_engines_look_layers_up(tmp_path: Path) -> None:
    """compressed-tensors sorts patterns, engines take the first: the same for the one, another scheme for the other."""
    folders = []
    for reverse in (False, True):
        (tmp_path / str(reverse)).mkdir()
        folder = changed(LLAMA, tmp_path / str(reverse), same)
        group = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
        wide = {**group, "targets": ["re:.*_proj$"]}
        narrow = {**group, "targets": ["re:.*o_proj$"], "input_activations": None}
        groups = {"group_0": wide, "group_1": narrow}
        folders.append(edited(folder, config_groups=dict(reversed(groups.items())) if reverse else groups))
    before, after = map(open_model, folders)
    check_plan(before, before, {})
    with pytest.raises(Unsupported, match="find another scheme"):
        check_plan(before, after, {})
    check_plan(after, after, {})  # what they misread already is no fault of the plan


@pytest.mark.parametrize(
    ("was", "now"), [({}, {"strategy": "tensor"}), ({"strategy": "tensor"}, {"strategy": "channel"})]
)
def test_a_group_that_has_the_fused_name_alone(was: dict[str, str], now: dict[str, str], tmp_path: Path) -> None:
    """It had the scheme of its parts and loses their activations; or their layout only, and loses that."""

    def stated(weights: dict[str, str], folder: Path) -> Model:
        folder.mkdir()
        value = json.loads((changed(LLAMA, folder, same) / "config.json").read_text())["quantization_config"]
        first = value["config_groups"]["group_0"]
        inputs = {**first["input_activations"], "dynamic": True}
        group = {**first, "weights": {**first["weights"], **weights}, "input_activations": inputs}
        more = {"group_1": {**group, "targets": ["re:.*qkv_proj$"]}} if weights else {}
        return open_model(edited(folder / "changed", config_groups={**value["config_groups"], **more}))

    before, after = stated(was, tmp_path / "before"), stated(now, tmp_path / "after")
    check_plan(before, before, {})
    with pytest.raises(Unsupported, match="change how a module is read") as caught:
        check_plan(before, after, {})
    assert str(caught.value.where).endswith("qkv_proj")


def test_experts_that_no_engine_loads_already(tmp_path: Path) -> None:
    """One scale a weight, and one for each token: no fault of the plan."""
    folder = changed(MOE, tmp_path, without("input_scale"))
    per_token(folder)
    check_plan(open_model(folder), open_model(folder), {})


def test_experts_with_two_input_scales(tmp_path: Path) -> None:
    """ModelOpt's dialect may have them, compressed-tensors, as which ``exact`` restates it, not."""

    def change(tensors: Tensors) -> None:
        name = "model.language_model.layers.1.mlp.experts.2.up_proj.input_scale"
        dtype, shape, raw = tensors[name]
        tensors[name] = (dtype, shape, struct.pack("<f", 2 * struct.unpack("<f", raw)[0]))

    folder = changed("modelopt-qwen3_5-moe", tmp_path, change)
    with pytest.raises(Unsupported, match="not load the experts") as caught:
        rewrite.convert(folder, tmp_path / "out", profile="exact", selection="all")
    assert caught.value.found == "two"


def test_a_table_in_fp8_that_the_config_leaves_alone(tmp_path: Path) -> None:
    """Embeddings: no engine looks their scheme up, and a plan that leaves them as they are is right."""

    def change(tensors: Tensors) -> None:
        _, shape, _ = tensors["model.embed_tokens.weight"]
        tensors["model.embed_tokens.weight"] = ("F8_E4M3", shape, bytes(shape[0] * shape[1]))

    model = open_model(changed(LLAMA, tmp_path, change))
    check_plan(model, model, {})


@pytest.mark.parametrize(
    ("module", "found", "refused"),
    [("layers.0.mlp.up_proj", "nan", True), ("layers.0.mlp.up_proj", "0.0", False), ("visual.merger", "nan", False)],
)
def test_scales_that_no_engine_serves(module: str, found: str, refused: bool) -> None:
    """Text needs no vision tower, and a scale of zero is for inspect to say."""
    fault = Fault("scale-value", f"model.safetensors: model.{module}.weight_scale", found)
    with pytest.raises(Unsupported) if refused else nullcontext():
        refuse_values([fault])
