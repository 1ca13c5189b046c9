"""Kinds of faults that people report: what inspect says, what engines make of it, and that the repair repairs."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest

import rewrite
from rewrite.errors import Refused
from rewrite.ledger.ledger import faults, header_faults
from rewrite.ledger.missing import _torn
from rewrite.loaders.experts import expert_layers
from rewrite.loaders.outcome import Outcome
from rewrite.quantization.model import interpret
from tests.ledger.test_table import Tensors, changed, codes
from tests.support import FIXTURES, edit_json
from tests.zoo.rebuild import rebuild

LLAMA, MOE = "llmcompressor-llama", "llmcompressor-qwen3_5-moe"
NEXT, FP4, KV = "llmcompressor-qwen3_next", "modelopt-qwen3_5-moe-nvfp4", "modelopt-llama"
VL = "llmcompressor-qwen3_5-vl"


def edited(folder: Path, **changes: Any) -> Path:
    """With other members of the quantization part of config.json; None removes one."""
    value = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_json(
        folder / "config.json", quantization_config={k: v for k, v in {**value, **changes}.items() if v is not None}
    )
    return folder


def same(_tensors: Tensors) -> None:
    """Nothing changes."""


def plain(*parts: str, keep: bool = False) -> Callable[[Tensors], None]:
    """Layers of these names stored in BF16, without scales."""

    def change(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.rpartition(".")[0].endswith(parts)]:
            _, shape, _ = tensors[name]
            if name.endswith(".weight"):
                tensors[name] = ("BF16", shape, struct.pack("<H", 0x3C00) * (shape[0] * shape[1]))
            elif name.endswith("_scale") and not keep:
                del tensors[name]

    return change


def outcome(folder: Path, engine: str, selection: rewrite.Selection = "all") -> Outcome:
    """Of the newest versions."""
    return [row for row in rewrite.inspect_checkpoint(folder, selection=selection).rows if row.engine.name == engine][
        -1
    ].as_is


def repaired(folder: Path, out: Path, **how: Any) -> Path:
    """Converted, and verified."""
    manifest = rewrite.convert(folder, out, **how)
    assert manifest.changed
    verified = rewrite.verify(folder, out, device="cpu")
    assert verified.ok, [check.problems for check in verified.checks]
    return out


@pytest.mark.parametrize("profile", ["exact", "portable", "bf16"])
def test_frozen(profile: str, tmp_path: Path) -> None:
    """transformers issue #47145: it serves codes as weights. Every profile states it as compressed."""
    folder = edited(changed(LLAMA, tmp_path, same), quantization_status="frozen")
    assert codes(folder) == ["status"]
    assert outcome(folder, "transformers").kind == "garbled"
    assert outcome(folder, "vLLM", "qkvz").kind == "exact"
    out = repaired(folder, tmp_path / "out", profile=profile)
    assert codes(out) == []
    assert outcome(out, "transformers").kind == "exact"


@pytest.mark.parametrize("name", [LLAMA, NEXT])
def test_plain_layers_that_the_config_quantizes(name: str, tmp_path: Path) -> None:
    """vLLM issue #40252: ignore has other names than the shards. vLLM casts them without a word."""
    parts = ("q_proj", "k_proj", "v_proj") if name == LLAMA else ("in_proj_qkvz", "in_proj_ba")
    folder = changed(name, tmp_path, plain(*parts))
    if name == NEXT:
        ignore = json.loads((folder / "config.json").read_text())["quantization_config"]["ignore"]
        split = [f"model.layers.0.linear_attn.in_proj_{part}" for part in ("qkv", "z", "b", "a")]
        edited(folder, ignore=[*(entry for entry in ignore if "in_proj_ba" not in entry), *split])
    assert codes(folder) == ["plain-layer"]
    assert outcome(folder, "vLLM").kind == "garbled"
    assert outcome(folder, "SGLang").kind == "not known"
    out = repaired(folder, tmp_path / "out")
    assert codes(out) == []
    assert outcome(out, "vLLM", "qkvz").kind == "exact"


def test_plain_layers_that_ignore_has_by_the_name_of_an_engine(tmp_path: Path) -> None:
    """vLLM 0.32.0 and SGLang 0.5.23 were run: the first knows these names and loads it, the second casts the layers."""
    folder = changed("llmcompressor-qwen3_5-vl", tmp_path, same)
    ignore = json.loads((folder / "config.json").read_text())["quantization_config"]["ignore"]
    edited(folder, ignore=[name.replace("model.language_model.", "language_model.model.") for name in ignore])
    assert codes(folder) == ["plain-layer"]
    assert {outcome(folder, engine).kind for engine in ("vLLM", "SGLang")} == {"not known"}


@pytest.mark.parametrize("entries", [["*in_proj_a", "*in_proj_b"], ["*in_proj_[ab]"], ["*in_proj_ba", "*in_proj_[ab]"]])
@pytest.mark.parametrize("profile", ["exact", "portable"])
def test_globs_that_match_the_parts_of_a_fused_layer(entries: list[str], profile: str, tmp_path: Path) -> None:
    """vLLM 0.32.0 and SGLang 0.5.23 were run with the first: both cast the layer. Globs are for the fused name only."""
    folder = changed("modelopt-qwen3_5-vl", tmp_path, same)
    edited(folder, ignore=["lm_head", "model.visual*", *entries])
    (folder / "hf_quant_config.json").unlink(missing_ok=True)
    known = len(entries) == 2 and "ba" in entries[0]
    assert codes(folder) == ([] if known else ["ignore-pattern"])
    kind = "loses precision" if known else "garbled"
    assert {outcome(folder, engine).kind for engine in ("vLLM", "SGLang")} == {kind}
    out = repaired(folder, tmp_path / "out", profile=profile, selection="all")
    assert codes(out) == []
    assert outcome(out, "vLLM").kind == "exact"


@pytest.mark.parametrize(("entries", "kind"), [(["in_proj_a", "in_proj_b"], "not known"), (["in_proj_a."], "garbled")])
def test_words_that_engines_find_in_names(entries: list[str], kind: str, tmp_path: Path) -> None:
    """No glob, so ModelOpt means a layer of this name. vLLM 0.32.0 was run with the first: it looks for the word in
    in_proj_ba, and finds it."""
    folder = changed("modelopt-qwen3_5-vl", tmp_path, same)
    edited(folder, ignore=["lm_head", "model.visual*", *entries])
    (folder / "hf_quant_config.json").unlink(missing_ok=True)
    assert codes(folder) == ["plain-layer"]
    assert outcome(folder, "vLLM").kind == kind


def test_layers_that_the_config_does_not_count(tmp_path: Path) -> None:
    """vLLM 0.32.0 and SGLang 0.5.23 were run: the first has no module of such a name, the second leaves it out."""
    folder = changed(LLAMA, tmp_path, same)
    edit_json(folder / "config.json", num_hidden_layers=1)
    assert codes(folder) == ["uncounted"]
    assert outcome(folder, "vLLM").kind == "fails to load"
    assert outcome(folder, "SGLang").kind == "not known"
    edit_json(folder / "config.json", hybrid_override_pattern="M*")  # of Nemotron-H
    assert "uncounted" not in codes(folder)
    edit_json(
        folder / "config.json", hybrid_override_pattern=None, num_nextn_predict_layers=1
    )  # it is one for multi-token prediction
    assert "uncounted" not in codes(folder)


@pytest.mark.parametrize(
    ("stated", "code", "kind"),
    [(4, None, "loses precision"), (3, "uncounted", "fails to load"), (5, "missing", "garbled")],
)
def test_experts_are_counted(stated: int, code: str | None, kind: str, tmp_path: Path) -> None:
    folder = changed(MOE, tmp_path, same)
    edit_json(folder / "config.json", num_experts=stated)
    assert set(codes(folder)) == ({code} if code else set())
    assert {outcome(folder, engine).kind for engine in ("vLLM", "SGLang")} == {kind}


@pytest.mark.parametrize("side", ["pre_quant_scale", "weight_zero_point", "weight_g_idx", "qzeros"])
def test_tensors_of_other_formats(side: str, tmp_path: Path) -> None:
    """vLLM 0.32.0 was run with the first three: it has no place for them."""

    def change(tensors: Tensors) -> None:
        tensors[f"model.layers.0.self_attn.o_proj.{side}"] = ("F32", (128,), struct.pack("<f", 1) * 128)

    folder = changed(LLAMA, tmp_path, change)
    assert codes(folder) == ["no-role"]
    assert outcome(folder, "vLLM").kind == ("not known" if side == "qzeros" else "fails to load")
    assert outcome(folder, "SGLang").kind == "not known"


@pytest.mark.parametrize(("key", "part"), [("attention_bias", "q_proj"), ("mlp_bias", "gate_proj")])
def test_biases_that_are_promised(key: str, part: str, tmp_path: Path) -> None:
    """vLLM 0.32.0 and SGLang 0.5.23 were run: they never fill these, and say nothing."""
    folder = changed(LLAMA, tmp_path, same)
    edit_json(folder / "config.json", **{key: True})
    (fault,) = rewrite.inspect_checkpoint(folder).findings
    assert (fault.code, fault.where.rpartition(".layers.")[2]) in {
        ("missing", f"{n}.{'self_attn' if part == 'q_proj' else 'mlp'}.{part}.bias") for n in (0, 1)
    }


@pytest.mark.parametrize("tower", ["qwen3_5-vl", "minicpmv4_6"])
def test_a_quantized_tower(tower: str, tmp_path: Path) -> None:
    """SGLang 0.5.23 was run: it serves the codes of Qwen3.5's, and raises at MiniCPM-V's. vLLM 0.32.0 loads both."""
    name = "model.visual.blocks.0.attn.proj" if "qwen" in tower else "model.vision_tower.encoder.layers.0.mlp.fc1"

    def change(tensors: Tensors) -> None:
        _, (rows, columns), _ = tensors[f"{name}.weight"]
        tensors[f"{name}.weight"] = ("F8_E4M3", (rows, columns), bytes([56]) * rows * columns)
        for scale in ("weight_scale", "input_scale"):
            tensors[f"{name}.{scale}"] = ("F32", (1,), struct.pack("<f", 0.01))

    folder = changed(f"llmcompressor-{tower}", tmp_path, change)
    ignore = json.loads((folder / "config.json").read_text())["quantization_config"]["ignore"]
    edited(folder, ignore=[entry for entry in ignore if entry != name])
    assert codes(folder) == []
    assert outcome(folder, "vLLM").kind == "loses precision"
    assert outcome(folder, "SGLang").kind == "not known"


@pytest.mark.parametrize("gone", ["self_attn.q_proj", "linear_attn.in_proj_qkv"])
def test_a_scale_that_is_not_stored_ends_no_load(gone: str, tmp_path: Path) -> None:
    """vLLM 0.32.0 and SGLang 0.5.23 were run (search, seed 21032): "fails to load" was said, and they load it."""
    name = "llmcompressor-llama" if "q_proj" in gone else "llmcompressor-qwen3_5-vl"

    def change(tensors: Tensors) -> None:
        del tensors[next(each for each in tensors if each.endswith(f"layers.0.{gone}.weight_scale"))]

    folder = changed(name, tmp_path, change)
    assert codes(folder) == ["no-scale"]
    assert {outcome(folder, engine).kind for engine in ("vLLM", "SGLang")} == {"not known"}


def test_floats_that_are_not_symmetric(tmp_path: Path) -> None:
    """vLLM 0.32.0 and SGLang 0.5.23 were run: both raise, "No compressed-tensors compatible scheme was found"."""
    folder = changed(LLAMA, tmp_path, same)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    groups = {
        name: {**group, "weights": {**group["weights"], "symmetric": False}}
        for name, group in config["config_groups"].items()
    }
    edited(folder, config_groups=groups)
    assert codes(folder) == ["label"]
    assert {outcome(folder, engine).kind for engine in ("vLLM", "SGLang")} == {"fails to load"}


def test_blocks_that_the_config_calls_larger(tmp_path: Path) -> None:
    """vLLM 0.32.0 passes it over, SGLang 0.5.23 raises: both were run."""
    folder = changed(FP4, tmp_path, same)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    groups = json.loads(json.dumps(config["config_groups"]).replace('"group_size": 16', '"group_size": 32'))
    edited(folder, config_groups=groups)
    assert codes(folder) == ["label"]
    assert {outcome(folder, engine).kind for engine in ("vLLM", "SGLang")} == {"not known"}


@pytest.mark.parametrize("more", [-64, 0, 64])
def test_words_are_counted(more: int, tmp_path: Path) -> None:
    """vLLM 0.32.0 and SGLang 0.5.23 were run: an AssertionError each. Some models have rows to spare (mllama)."""
    folder = changed(LLAMA, tmp_path, same)
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    edit_json(folder / "config.json", vocab_size=size + more)
    assert codes(folder) == (["uncounted"] if more > 0 else [])
    kind = "fails to load" if more > 0 else "loses precision"
    assert {outcome(folder, engine).kind for engine in ("vLLM", "SGLang")} == {kind}


@pytest.mark.parametrize("part", ["", "down_proj."])
def test_an_expert_that_is_not_stored(part: str, tmp_path: Path) -> None:
    """Seen: "loses precision", of three experts of four."""

    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if f"layers.1.mlp.experts.2.{part}" in name]:
            del tensors[name]

    folder = changed(MOE, tmp_path, change)
    assert set(codes(folder)) == {"missing"}
    with pytest.raises(Refused):
        rewrite.convert(folder, tmp_path / "out")


@pytest.mark.parametrize("wrapper", ["base_model.model.", "module.", "_orig_mod.", "_fsdp_wrapped_module."])
def test_names_of_a_wrapper(wrapper: str, tmp_path: Path) -> None:
    """vLLM 0.32.0 and SGLang 0.5.23 were run with the first: one raises, the other loads nothing, without a word."""

    def change(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[wrapper + name] = tensors.pop(name)

    folder = changed(LLAMA, tmp_path, change)
    assert "wrapped-name" in codes(folder)
    assert outcome(folder, "vLLM").kind == "fails to load"
    assert outcome(folder, "SGLang").kind == "garbled"


def test_a_global_scale_of_inputs_that_are_not_quantized(tmp_path: Path) -> None:
    """vLLM 0.32.0 and SGLang 0.5.23 were run: the first has no place for it, the second takes it out."""
    folder = changed("llmcompressor-qwen3_5-nvfp4", tmp_path, same)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    groups = {name: {**group, "input_activations": None} for name, group in config["config_groups"].items()}
    edited(folder, config_groups=groups)
    assert codes(folder) == ["scale-name"]
    assert outcome(folder, "vLLM").kind == "fails to load"
    assert outcome(folder, "SGLang").kind == "not known"


@pytest.mark.parametrize("dtype", ["F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ"])
def test_other_formats_of_eight_bits(dtype: str, tmp_path: Path) -> None:
    """vLLM 0.32.0 and SGLang 0.5.23 were run with the first: they read it as E4M3, and garble."""

    def change(tensors: Tensors) -> None:
        for name, (_, shape, data) in tensors.items():
            if name.endswith("q_proj.weight"):
                tensors[name] = (dtype, shape, data)

    folder = changed(LLAMA, tmp_path, change)
    assert codes(folder) == ["label"]
    assert {outcome(folder, engine).kind for engine in ("vLLM", "SGLang")} == {"not known"}
    with pytest.raises(Refused, match="disagree"):
        rewrite.convert(folder, tmp_path / "no")


def test_a_plain_layer_that_modelopt_lists(tmp_path: Path) -> None:
    """Under quantized_layers and among the targets of a group: the repair takes it out of both."""
    folder = changed("modelopt-qwen3_5-mixed", tmp_path, plain("layers.2.self_attn.o_proj"))
    assert codes(folder) == ["plain-layer"]
    assert codes(repaired(folder, tmp_path / "out", profile="partition")) == []


def test_an_old_config_of_plain_weights(tmp_path: Path) -> None:
    """Somebody dequantized all of it and left the config."""
    folder = edited(changed(LLAMA, tmp_path, plain("_proj")), ignore=[])  # the head is no such layer
    (fault,) = rewrite.inspect_checkpoint(folder).findings
    assert (fault.code, fault.count) == ("plain-layer", 14)
    out = repaired(folder, tmp_path / "out")
    assert codes(out) == [] and outcome(out, "vLLM").kind == "exact"


@pytest.mark.parametrize(("stored", "found"), [(["0"], ["plain-layer"]), (["0", "1"], [])])
def test_a_plain_layer_by_a_name_that_no_family_has(stored: list[str], found: list[str], tmp_path: Path) -> None:
    """It is a linear layer where another one of its name is quantized; else nobody knows what it is."""

    def change(tensors: Tensors) -> None:
        for name in [n for n in tensors if ".self_attn.o_proj." in n]:
            tensors[name.replace("o_proj", "odd")] = tensors[name]
        plain(*(f"layers.{layer}.self_attn.odd" for layer in stored))(tensors)

    folder = changed(LLAMA, tmp_path, change)
    assert codes(folder) == found
    assert not found or codes(repaired(folder, tmp_path / "out")) == []


@pytest.mark.parametrize(
    ("module", "found"),
    [
        ("model.layers.0.mlp.gate", []),
        ("model.visual.blocks.0.attn.q_proj", []),
        ("model.layers.0.odd_head", []),
        ("mtp.odd", ["mtp-format"]),
    ],
)
def test_a_plain_layer_that_the_config_does_not_name(module: str, found: list[str], tmp_path: Path) -> None:
    """Routers, vision towers and heads are never sure to be quantized; what predicts tokens is, whatever its name."""
    folder = changed(LLAMA, tmp_path, lambda t: t.update({f"{module}.weight": ("BF16", (64, 64), bytes(64 * 64 * 2))}))
    assert codes(folder) == found


@pytest.mark.parametrize(
    ("parts", "fused"),
    [(("q_proj", "k_proj", "v_proj"), "self_attn.qkv_proj"), (("gate_proj", "up_proj"), "mlp.gate_up_proj")],
)
def test_ignore_has_the_fused_name_only(parts: tuple[str, ...], fused: str, tmp_path: Path) -> None:
    """Engines that do not fuse look for the names of the parts."""
    folder = changed(LLAMA, tmp_path, plain(*parts))
    edited(folder, ignore=["lm_head", *(f"model.layers.{i}.{fused}" for i in (0, 1))])
    assert set(codes(folder)) == {"fused-name"}
    assert outcome(folder, "transformers").kind == "not known"
    assert codes(repaired(folder, tmp_path / "out")) == []


def test_a_format_that_is_not_read(tmp_path: Path) -> None:
    """Three bits: of other weights nobody knows whether they are right; of FP8 it is sure that they are not."""

    def change(tensors: Tensors) -> None:
        _, shape, raw = tensors["model.layers.0.self_attn.o_proj.weight"]
        tensors["model.layers.0.self_attn.o_proj.weight"] = ("I8", shape, raw)

    folder = changed(LLAMA, tmp_path, change)
    group = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    weights = {**group["weights"], "num_bits": 3, "type": "int"}
    edited(folder, config_groups={"group_0": {**group, "weights": weights}})
    (fault,) = rewrite.inspect_checkpoint(folder).findings
    assert (fault.code, fault.count) == ("label", 13)


def test_a_router_in_fp8(tmp_path: Path) -> None:
    """llm-compressor issue #2714: vLLM has no place for its scales. dequantized repairs it, the others refuse."""

    def change(tensors: Tensors) -> None:
        name = "model.layers.0.mlp.gate"
        _, shape, _ = tensors[f"{name}.weight"]
        tensors[f"{name}.weight"] = ("F8_E4M3", shape, b"\x38" * (shape[0] * shape[1]))
        for scale in ("weight_scale", "input_scale"):
            tensors[f"{name}.{scale}"] = ("BF16", (1,), struct.pack("<f", 0.02)[2:])

    folder = changed(MOE, tmp_path, change)
    ignore = json.loads((folder / "config.json").read_text())["quantization_config"]["ignore"]
    edited(folder, ignore=[entry for entry in ignore if not entry.endswith("mlp.gate")])
    assert codes(folder) == ["router"]
    assert outcome(folder, "vLLM").kind == "fails to load"
    with pytest.raises(Refused, match="quantized router"):
        rewrite.convert(folder, tmp_path / "no")
    assert codes(repaired(folder, tmp_path / "out", profile="dequantized")) == []


def test_experts_in_one_fp8_tensor(tmp_path: Path) -> None:
    """vLLM: IndexError."""

    def change(tensors: Tensors) -> None:
        tensors["model.layers.0.mlp.experts.gate_up_proj"] = ("F8_E4M3", (4, 64, 64), bytes(4 * 64 * 64))

    folder = changed(MOE, tmp_path, change)
    assert codes(folder) == ["no-matrix"]
    assert outcome(folder, "vLLM").kind == "fails to load"
    with pytest.raises(Refused, match="no matrix"):
        rewrite.convert(folder, tmp_path / "no")


@pytest.mark.parametrize("text", [{}, {"text_config": {"model_type": "step3_text"}}])
def test_families_that_keep_experts_in_one_tensor(text: dict[str, Any], tmp_path: Path) -> None:
    """Step-3.5, Llama 4 and gpt-oss do, by themselves or inside of another family: no fault. Of experts only."""

    def change(tensors: Tensors) -> None:
        for name in ("moe.gate_proj", "mlp.odd"):
            tensors[f"model.layers.0.{name}.weight"] = ("F8_E4M3", (4, 64, 64), bytes(4 * 64 * 64))

    folder = changed(LLAMA, tmp_path, change)
    edit_json(folder / "config.json", **(text or {"model_type": "step3p5"}))
    found = [
        fault.where for fault in header_faults(interpret(rewrite.open_checkpoint(folder))) if fault.code == "no-matrix"
    ]
    assert found == ["model.safetensors: model.layers.0.mlp.odd.weight"]


def test_scales_of_a_cache_by_head(tmp_path: Path) -> None:
    """llm-compressor's ``attn_head``: no fault where the config says so."""
    folder = rebuild("llmc-kv-head-llama", tmp_path / "in")
    assert codes(folder) == []
    scheme = json.loads((folder / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    edited(folder, kv_cache_scheme={**scheme, "strategy": "tensor"})
    assert set(codes(folder)) == {"kv-scale-shape"}


def test_a_config_of_another_format(tmp_path: Path) -> None:
    """ModelOpt issue #868: the config says NVFP4, the tensors are FP8. What convert refuses, inspect lists."""
    folder = changed("modelopt-qwen3_5-moe", tmp_path, same)
    for file in ("config.json", "hf_quant_config.json"):
        (folder / file).write_text((folder / file).read_text().replace('"FP8"', '"NVFP4"'))
    assert "label" in codes(folder)
    assert outcome(folder, "vLLM").kind == "fails to load"
    with pytest.raises(Refused, match="disagree"):
        rewrite.convert(folder, tmp_path / "no")


@pytest.mark.parametrize(("gone", "kind"), [("k", "fails to load"), ("v", "not known")])
def test_half_of_the_scales_of_a_cache(gone: str, kind: str, tmp_path: Path) -> None:
    """vLLM issue #46264: a v_scale without a k_scale."""
    name = f"model.layers.0.self_attn.{gone}_proj.{gone}_scale"
    folder = changed(KV, tmp_path, lambda tensors: tensors.__delitem__(name))
    assert codes(folder) == ["kv-scale-alone"]
    assert outcome(folder, "vLLM", "qkvz").kind == kind
    with pytest.raises(Refused, match="without its partner"):
        rewrite.convert(folder, tmp_path / "no")
    assert codes(repaired(folder, tmp_path / "out", kv_scales="drop")) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_scales_of_a_cache_are_numbers(value: float, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors["model.layers.0.self_attn.k_proj.k_scale"] = ("F32", (), struct.pack("<f", value))

    folder = changed(KV, tmp_path, change)
    assert codes(folder) == ["scale-value"]
    assert codes(repaired(folder, tmp_path / "out", kv_scales="drop")) == []


def test_scales_of_a_cache_are_one_number(tmp_path: Path) -> None:
    """Per channel: engines have one place."""

    def change(tensors: Tensors) -> None:
        tensors["model.layers.0.self_attn.k_proj.k_scale"] = ("F32", (64,), struct.pack("<f", 0.01) * 64)

    folder = changed(KV, tmp_path, change)
    assert codes(folder) == ["kv-scale-shape"]
    assert codes(repaired(folder, tmp_path / "out", kv_scales="drop")) == []


@pytest.mark.parametrize("stated", [{}, {"kv_cache_scheme": None, "kv_cache_quant_algo": "FP8"}])
def test_a_cache_that_is_stated_and_has_no_scales(stated: dict[str, Any], tmp_path: Path) -> None:
    """Engines take 1.0: NemoClaw issue #7899."""

    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith((".k_scale", ".v_scale"))]:
            del tensors[name]

    folder = edited(changed(KV, tmp_path, change), **stated)
    (folder / "hf_quant_config.json").unlink()
    (fault,) = rewrite.inspect_checkpoint(folder).findings
    assert fault.code == "kv-no-scale" and "--kv-scales drop" in fault.next
    assert codes(repaired(folder, tmp_path / "out", kv_scales="drop")) == []


def test_one_scale_for_keys_and_values(tmp_path: Path) -> None:
    """The old ``kv_scale`` is both, not one without its partner, and not none."""

    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith((".k_scale", ".v_scale"))]:
            tensors[name.rsplit(".", 2)[0] + ".kv_scale"] = tensors.pop(name)

    folder = changed(KV, tmp_path, change)
    assert codes(folder) == []
    assert codes(repaired(folder, tmp_path / "out", kv_scales="drop")) == []


def test_scales_of_a_cache_by_quarks_names(tmp_path: Path) -> None:
    """compressed-tensors of 2024 had them beside k_proj and v_proj: vLLM 0.32.0 was run and does not load that."""

    def change(tensors: Tensors) -> None:
        for which, at in product("kv", (0, 1)):
            tensors[f"model.layers.{at}.self_attn.{which}_proj.output_scale"] = ("F32", (1,), struct.pack("<f", 0.05))

    folder = changed(LLAMA, tmp_path, change)
    assert codes(folder) == ["scale-name"]
    assert outcome(folder, "vLLM").kind == "fails to load"
    assert codes(repaired(folder, tmp_path / "out", kv_scales="drop")) == []


def mtp(tensors: Tensors) -> None:
    """A layer for multi-token prediction, in BF16."""
    for name in ("fc", "layers.0.self_attn.q_proj", "layers.0.mlp.down_proj"):
        tensors[f"mtp.{name}.weight"] = ("BF16", (64, 64), bytes(64 * 64 * 2))
    tensors["mtp.norm.weight"] = ("BF16", (64,), bytes(128))


def test_mtp_layers_that_are_plain(tmp_path: Path) -> None:
    """vLLM PR #38650: in BF16, and not among the excluded modules."""
    folder = changed(FP4, tmp_path, mtp)
    assert codes(folder) == ["mtp-format"]
    assert codes(repaired(folder, tmp_path / "out")) == []


@pytest.mark.parametrize(("change", "notes"), [(same, ["mtp-missing"]), (mtp, [])])
def test_mtp_layers_that_are_promised(change: Callable[[Tensors], None], notes: list[str], tmp_path: Path) -> None:
    """A note: only speculative decoding needs them."""
    folder = changed(FP4, tmp_path, change)
    text = json.loads((folder / "config.json").read_text())["text_config"]
    edit_json(folder / "config.json", text_config={**text, "mtp_num_hidden_layers": 1})
    found = rewrite.inspect_checkpoint(folder)
    assert [note.code for note in found.notes] == notes
    assert [fault.code for fault in found.findings] == ([] if notes else ["mtp-format"])


@pytest.mark.parametrize(
    ("tensor", "code", "kind"),
    [
        ("layers.1.mlp.experts.2.down_proj.input_scale", "no-input-scale", "garbled"),
        ("layers.2.self_attn.o_proj.weight_scale_2", "no-scale", "garbled"),
    ],
)
def test_nvfp4_that_lacks_a_scale(tensor: str, code: str, kind: str, tmp_path: Path) -> None:
    """vLLM issue #45212, PR #54444: it loads them, and takes what memory held."""
    folder = changed(FP4, tmp_path, lambda t: t.__delitem__(f"model.language_model.{tensor}"))
    assert codes(folder) == [code]
    assert outcome(folder, "vLLM", "qkvz").kind == kind
    with pytest.raises(Refused):
        rewrite.convert(folder, tmp_path / "no")


def test_nan_among_block_scales(tmp_path: Path) -> None:
    """ModelOpt issue #1633: vLLM raises."""

    def change(tensors: Tensors) -> None:
        name = "model.language_model.layers.2.self_attn.o_proj.weight_scale"
        dtype, shape, raw = tensors[name]
        tensors[name] = (dtype, shape, raw[:7] + b"\x7f" + raw[8:-1] + b"\xff")

    folder = changed(FP4, tmp_path, change)
    (fault,) = rewrite.inspect_checkpoint(folder).findings
    assert fault.what == "a scale of NaN (2 times)"
    assert outcome(folder, "vLLM", "qkvz").kind == "fails to load"


def test_nan_among_scales_of_stacked_experts(tmp_path: Path) -> None:
    """gpt-oss has one tensor for all of them, with a name of its own."""
    scales = ("U8", (2, 4, 2), b"\x7f" * 15 + b"\xff")
    folder = changed(MOE, tmp_path, lambda t: t.update({"model.layers.0.mlp.experts.gate_up_proj_scales": scales}))
    (fault,) = rewrite.inspect_checkpoint(folder).findings
    assert fault.what == "a scale of NaN"


def test_fp8_weights_without_a_config(tmp_path: Path) -> None:
    """unsloth issue #4919: the config was stripped. dequantized goes by the shapes of the scales."""
    folder = changed(LLAMA, tmp_path, same)
    edit_json(folder / "config.json", quantization_config=None)
    (fault,) = rewrite.inspect_checkpoint(folder).findings
    assert fault.code == "no-config" and "--profile dequantized" in fault.next
    assert codes(repaired(folder, tmp_path / "out", profile="dequantized")) == []


def test_names_of_mistral(tmp_path: Path) -> None:
    """vLLM issue #38818: activation_scale, and a weight_scale_inv of one value, which is no inverse."""

    def change(tensors: Tensors) -> None:
        for name in list(tensors):
            new = name.replace(".weight_scale", ".weight_scale_inv").replace(".input_scale", ".activation_scale")
            tensors[new] = tensors.pop(name)

    folder = changed("llmcompressor-llama", tmp_path, change)
    config = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
    edit_json(folder / "config.json", quantization_config={**config, "modules_to_not_convert": ["lm_head"]})
    assert codes(folder) == ["scale-name", "scale-name"]  # of llama, which has no such names
    edit_json(folder / "config.json", model_type="mistral3")
    assert codes(folder) == []
    with pytest.raises(Refused, match="Mistral"):
        rewrite.convert(folder, tmp_path / "no", profile="portable")
    assert codes(repaired(folder, tmp_path / "out", profile="dequantized")) == []


def test_modelopt_without_its_method(tmp_path: Path) -> None:
    """ModelOpt 0.31 wrote no quant_method, and groups without targets."""
    folder = changed(KV, tmp_path, same)
    edited(folder, quant_method=None, config_groups={"group_0": {"weights": {"num_bits": 8, "type": "float"}}})
    found = rewrite.inspect_checkpoint(folder)
    assert found.dialect == "modelopt"
    assert {row.as_is.kind for row in found.rows if row.engine.name == "vLLM"} == {"fails to load"}, "run: 0.32.0"
    assert "fails to load" not in {row.as_is.kind for row in found.rows if row.engine.name == "SGLang"}
    assert codes(folder) == []


def test_mixed_precision_that_names_all_experts_of_a_layer(tmp_path: Path) -> None:
    """``...mlp.experts`` in quantized_layers; W4A16_NVFP4 has no scale of the input, and no engine was run with it."""
    folder = changed(FP4, tmp_path, _without_input_scales)
    tensors = rewrite.open_checkpoint(folder).tensors
    modules = {name.removesuffix(".weight_scale_2") for name in tensors if name.endswith(".weight_scale_2")}
    named = {name.rpartition(".experts.")[0] + ".experts" if ".experts." in name else name for name in modules}
    layers = {name: {"quant_algo": "W4A16_NVFP4", "group_size": 16} for name in named}
    edited(folder, quant_algo="MIXED_PRECISION", quantized_layers=layers, config_groups=None)
    (folder / "hf_quant_config.json").unlink()
    found = rewrite.inspect_checkpoint(folder)
    assert found.schemes == {"W4A16_NVFP4 weights": len(modules)}
    assert codes(folder) == []
    assert {row.as_is.kind for row in found.rows if row.engine.name != "transformers"} <= {"not known", "fails to load"}
    assert not any("w4afp8" in row.as_is.detail for row in found.rows)


def _without_input_scales(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.endswith(".input_scale")]:
        del tensors[name]


@pytest.mark.parametrize("some", ["", "o_proj"])
@pytest.mark.parametrize("name", [FP4, "llmcompressor-qwen3_5-nvfp4"])
def test_fp4_by_the_names_of_another_dialect(name: str, some: str, tmp_path: Path) -> None:
    """Divisors under ModelOpt's config, multipliers under compressed-tensors': engines have no place for them."""
    names = {"weight_packed": "weight", "weight_global_scale": "weight_scale_2", "input_global_scale": "input_scale"}
    names = {new: old for old, new in names.items()} if name == FP4 else names

    def change(tensors: Tensors) -> None:
        for full, (dtype, shape, raw) in list(tensors.items()):
            module, _, kind = full.rpartition(".")
            if kind in names and dtype in ("U8", "F32") and module.endswith(some):
                new = struct.pack("<f", 1 / struct.unpack("<f", raw)[0]) if dtype == "F32" else raw
                tensors[f"{module}.{names[kind]}"] = (dtype, shape, new)
                del tensors[full]

    folder = changed(name, tmp_path, change)
    assert set(codes(folder)) == {"label"}
    assert outcome(folder, "vLLM").kind != "exact"
    with pytest.raises(Refused, match="disagree"):
        rewrite.convert(folder, tmp_path / "no")


def test_experts_without_a_gate(tmp_path: Path) -> None:
    """Nemotron-H: up and down, nothing is joined."""

    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".experts." in name and ".gate_proj." in name]:
            del tensors[name]

    found = rewrite.inspect_checkpoint(changed(MOE, tmp_path, change), selection="all")
    assert not [group for group in found.groups if group.experts]


def test_mtp_layers_in_another_format(tmp_path: Path) -> None:
    """FP8 where the config says NVFP4. Other engines than those that draft do not load them."""

    def change(tensors: Tensors) -> None:
        tensors["mtp.layers.0.mlp.down_proj.weight"] = ("F8_E4M3", (64, 64), bytes(64 * 64))
        tensors["mtp.layers.0.mlp.down_proj.weight_scale"] = ("F32", (), struct.pack("<f", 0.01))

    folder = changed(FP4, tmp_path, change)
    assert codes(folder) == ["mtp-label"]
    assert outcome(folder, "vLLM", "qkvz").kind == "exact"


def test_a_scale_that_a_layer_has_no_place_for(tmp_path: Path) -> None:
    """The weights of one layer were dequantized, its scale was left; another layer has a scale of another dialect."""

    def change(tensors: Tensors) -> None:
        plain("layers.0.self_attn.o_proj", keep=True)(tensors)
        tensors["model.layers.1.self_attn.o_proj.weight_scale_2"] = ("F32", (), struct.pack("<f", 0.01))

    folder = edited(changed(LLAMA, tmp_path, change))
    ignore = json.loads((folder / "config.json").read_text())["quantization_config"]["ignore"]
    edited(folder, ignore=[*ignore, "model.layers.0.self_attn.o_proj"])
    found = rewrite.inspect_checkpoint(folder).findings
    assert {fault.where.rpartition(".")[2] for fault in found} == {"weight_scale", "input_scale", "weight_scale_2"}
    assert {fault.code for fault in found} == {"no-role"}
    with pytest.raises(Refused, match="no place"):
        rewrite.convert(folder, tmp_path / "no")


def test_a_cache_with_scales_of_some_layers(tmp_path: Path) -> None:
    """Engines take 1.0 for the others."""

    def change(tensors: Tensors) -> None:
        for kind in ("k", "v"):
            del tensors[f"model.layers.1.self_attn.{kind}_proj.{kind}_scale"]

    folder = changed(KV, tmp_path, change)
    (fault,) = rewrite.inspect_checkpoint(folder).findings
    assert (fault.code, fault.where) == ("kv-no-scale", "model.layers.1.self_attn")


def test_a_scale_of_the_queries(tmp_path: Path) -> None:
    """It has no partner."""
    scale = ("F32", (), struct.pack("<f", 0.01))
    assert codes(changed(KV, tmp_path, lambda t: t.update({"model.layers.0.self_attn.q_proj.q_scale": scale}))) == []


def test_a_cache_of_layers_that_are_stored_fused(tmp_path: Path) -> None:
    """Phi-3: one of its layers has no scales."""

    def change(tensors: Tensors) -> None:
        for kind in ("k", "v"):
            tensors[f"model.layers.0.self_attn.{kind}_scale"] = ("F32", (), struct.pack("<f", 0.01))

    folder = changed("llmcompressor-phi3", tmp_path, change)
    (fault,) = rewrite.inspect_checkpoint(folder).findings
    assert (fault.code, fault.where) == ("kv-no-scale", "model.layers.1.self_attn")


@pytest.mark.parametrize("beside", ["scale", "weight"])
def test_a_parameter_that_is_called_scale(beside: str, tmp_path: Path) -> None:
    """It belongs to a model, beside a plain weight or alone; DeepSeek-V4's scales of this name stand beside FP8."""
    odd: Tensors = {"model.layers.0.odd.scale": ("F32", (), struct.pack("<f", 3.0))}
    odd[f"model.layers.0.odd.{beside}"] = ("F32", (4, 4), bytes(64))
    assert codes(changed(LLAMA, tmp_path, lambda t: t.update(odd))) == []


def test_two_scales_of_one_weight(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors["model.layers.0.self_attn.o_proj.weight_scale_inv"] = ("BF16", (1,), struct.pack("<f", 0.01)[2:])

    assert codes(changed(LLAMA, tmp_path, change)) == ["no-role"]


def test_the_reciprocal_of_an_fp8_scale(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors["model.layers.0.self_attn.o_proj.weight_scale"] = ("F32", (1,), struct.pack("<f", 2000.0))

    assert codes(changed(LLAMA, tmp_path, change)) == ["scale-inverse"]


@pytest.mark.parametrize(
    ("scale", "value", "found"),
    [
        ("weight_scale", 200.0, []),
        ("weight_scale", 1e12, ["scale-value"]),
        ("weight_scale", 1e-21, ["scale-value"]),
        ("input_scale", 1e4, []),
        ("input_scale", 1e7, ["scale-value"]),
        ("input_scale", 1e-21, ["scale-value"]),
    ],
)
def test_sizes_that_no_training_leads_to(scale: str, value: float, found: list[str], tmp_path: Path) -> None:
    """Activations are larger than weights: what is far too large for the one may be right for the other."""

    def change(tensors: Tensors) -> None:
        tensors[f"model.layers.0.self_attn.o_proj.{scale}"] = ("F32", (1,), struct.pack("<f", value))

    assert codes(changed(LLAMA, tmp_path, change)) == found


@pytest.mark.parametrize("name", ["lm_head", "model.embed_tokens"])
def test_a_vocabulary_in_fp8(name: str, tmp_path: Path) -> None:
    """vLLM has no place for its scales: run with entries of the zoo."""

    def change(tensors: Tensors) -> None:
        _, shape, _ = tensors[f"{name}.weight"]
        tensors[f"{name}.weight"] = ("F8_E4M3", shape, b"\x38" * (shape[0] * shape[1]))
        tensors[f"{name}.weight_scale"] = ("BF16", (1,), struct.pack("<f", 0.01)[2:])
        tensors[f"{name}.input_scale"] = ("BF16", (1,), struct.pack("<f", 0.01)[2:])

    folder = edited(changed(LLAMA, tmp_path, change), ignore=[])
    value = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    edited(folder, config_groups={"group_0": {**value, "targets": ["Linear", "Embedding"]}})
    assert outcome(folder, "vLLM", "qkvz").kind == "fails to load"
    assert outcome(folder, "SGLang", "qkvz").kind == "not known"


def test_many_plain_experts_are_one_pattern(tmp_path: Path) -> None:
    """A list of 36,000 names helps nobody."""

    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".experts." in name and not name.endswith(".weight")]:
            del tensors[name]
        for layer in range(3):
            for expert in range(32):
                for part in ("gate_proj", "up_proj", "down_proj"):
                    name = f"model.layers.{layer}.mlp.experts.{expert}.{part}.weight"
                    tensors[name] = ("BF16", (32, 32), bytes(2048))

    folder = changed(MOE, tmp_path, change)
    edit_json(folder / "config.json", num_experts=32)
    ignored = json.loads((folder / "config.json").read_text())["quantization_config"]["ignore"]
    out = repaired(folder, tmp_path / "out")
    value = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    assert codes(out) == [] and len(value) == len(ignored) + 3


def renamed(old: str, new: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.endswith(f".{old}")]:
            tensors[name.removesuffix(old) + new] = tensors.pop(name)

    return change


def without(*parts: str) -> Callable[[Tensors], None]:
    """Tensors with one of these in their names are lost."""

    def change(tensors: Tensors) -> None:
        for name in [n for n in tensors if any(part in n for part in parts)]:
            del tensors[name]

    return change


@pytest.mark.parametrize("name", [LLAMA, KV, "fp8-qwen3_5-vl"])
@pytest.mark.parametrize(("old", "new"), [("weight_scale", "weight_scale_inv"), ("input_scale", "activation_scale")])
def test_scales_by_the_names_of_another_dialect(old: str, new: str, name: str, tmp_path: Path) -> None:
    """vLLM 0.32.0 was run: it has no parameter of that name. SGLang passes some over, which was not looked into."""
    folder = changed(name, tmp_path, renamed(old, new))
    assert set(codes(folder)) - {"mtp-missing", "kv-no-scale"} == {"scale-name"}
    assert outcome(folder, "vLLM").kind == "fails to load"
    assert outcome(folder, "SGLang").kind == "not known"
    out = repaired(folder, tmp_path / "out", profile="dequantized")
    assert outcome(out, "vLLM").kind == "exact"


@pytest.mark.parametrize("model_type", ["mistral3", "ministral3", "pixtral"])
def test_names_of_mistral_in_its_own_models(model_type: str, tmp_path: Path) -> None:
    """vLLM maps both (models/mistral3.py)."""
    folder = changed("fp8-qwen3_5-vl", tmp_path, renamed("input_scale", "activation_scale"))
    edit_json(folder / "config.json", model_type=model_type)
    assert "scale-name" not in codes(folder)


@pytest.mark.parametrize("name", ["weight_scale_inv", "scale"])
def test_names_of_block_scales(name: str, tmp_path: Path) -> None:
    """DeepSeek has two."""

    def change(tensors: Tensors) -> None:
        without("input_scale")(tensors)
        for full in [full for full in tensors if full.endswith(".weight_scale")]:
            module = full.removesuffix(".weight_scale")
            shape = tuple(-(-size // 64) for size in tensors[f"{module}.weight"][1])
            tensors[f"{module}.{name}"] = ("F32", shape, struct.pack("<f", 0.01) * (shape[0] * shape[1]))
            del tensors[full]

    folder = changed(LLAMA, tmp_path, change)
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [64, 64]}
    edit_json(folder / "config.json", quantization_config={**config, "modules_to_not_convert": ["lm_head"]})
    assert codes(folder) == []


def test_input_scales_beside_dynamic_activations(tmp_path: Path) -> None:
    """vLLM 0.32.0 was run: "There is no module or parameter named ...input_scale"."""
    folder = edited(changed("fp8-qwen3_5-vl", tmp_path, same), activation_scheme="dynamic")
    assert "scale-name" in codes(folder)
    assert outcome(folder, "vLLM").kind == "fails to load"
    assert outcome(repaired(folder, tmp_path / "out", profile="portable", selection="all"), "vLLM").kind == "exact"


@pytest.mark.parametrize("profile", ["exact", "portable"])
def test_fp8_with_dynamic_activations(profile: str, tmp_path: Path) -> None:
    """Restated with channel scales they stay dynamic, or get a scale for each token."""
    folder = edited(changed("fp8-qwen3_5-vl", tmp_path, without("input_scale")), activation_scheme="dynamic")
    repaired(folder, tmp_path / "out", profile=profile)


def test_a_scale_for_each_partition_fits(tmp_path: Path) -> None:
    """Of a layer that is stored fused."""
    assert rewrite.convert(FIXTURES / "llmcompressor-qwen3_5-text", tmp_path / "out", profile="partition").changed
    assert codes(tmp_path / "out") == []


def test_fp8_that_does_not_say_how_activations_are_quantized(tmp_path: Path) -> None:
    """vLLM 0.32.0 and SGLang 0.5.23 were run: they need the key."""
    folder = edited(changed("fp8-qwen3_5-vl", tmp_path, without("input_scale")), activation_scheme=None)
    assert [code for code in codes(folder) if code != "mtp-missing"] == ["no-activations"]
    assert outcome(folder, "vLLM").kind == outcome(folder, "SGLang").kind == "fails to load"


@pytest.mark.parametrize(
    ("parts", "where"),
    [
        (["layers.1."], "model.layers.1"),
        (["layers.0.input_layernorm"], "model.layers.0.input_layernorm.weight"),
        (["layers.0.self_attn.o_proj"], "model.layers.0.self_attn.o_proj.weight"),
        (["lm_head"], "lm_head"),
        (["embed_tokens"], "embeddings"),
        (["model.norm"], "model.norm"),
    ],
)
def test_a_part_of_the_model_is_not_stored(parts: list[str], where: str, tmp_path: Path) -> None:
    """vLLM 0.32.0 and SGLang 0.5.23 were run: they load the rest without a word. No profile brings it back."""
    folder = changed(LLAMA, tmp_path, without(*parts))
    (fault,) = rewrite.inspect_checkpoint(folder).findings
    assert (fault.code, fault.where, fault.severity) == ("missing", where, "garbled")
    assert outcome(folder, "vLLM").kind == outcome(folder, "SGLang").kind == "garbled"
    with pytest.raises(Refused, match="not stored"):
        rewrite.convert(folder, tmp_path / "out", profile="dequantized")


def test_the_language_model_is_where_most_layers_are(tmp_path: Path) -> None:
    """What else is called layers may have fewer, a tower more; families with a tower say ForConditionalGeneration."""

    def change(tensors: Tensors) -> None:
        without("language_model.norm", "language_model.layers.1.")(tensors)
        odd = ("a.layers.0", *(f"model.visual.layers.{layer}" for layer in range(9)))
        tensors.update({f"{name}.odd.weight": ("BF16", (4, 4), bytes(32)) for name in odd})

    found = rewrite.inspect_checkpoint(changed(VL, tmp_path, change)).findings
    assert {fault.where for fault in found} == {"model.language_model.layers.1", "model.language_model.norm"}


def test_a_model_without_layers(tmp_path: Path) -> None:
    """Nobody knows what it would have."""
    assert codes(changed(LLAMA, tmp_path, without(".layers."))) == []


_A, _AB, _AXYZ = ({f"m.{name}.weight" for name in names} for names in ("a", "ab", "axyz"))


@pytest.mark.parametrize(
    ("layers", "found"),
    [
        ((_AXYZ, _AXYZ, _AB, _AB, _A), ["layers.4.m.b.weight"]),  # not what layers of quite another kind have
        ((_AB, _AB, _A, _A), []),  # two of them are a kind
        ((_AXYZ, _AXYZ, _A), []),
        ((_AB, _A), []),
    ],
)
def test_a_layer_that_lacks_what_the_most_like_it_has(layers: tuple[set[str], ...], found: list[str]) -> None:
    assert [fault.where for fault in _torn("layers", dict(enumerate(layers)))] == found


@pytest.mark.parametrize(("kind", "rows"), [("q_proj.bias", (128,)), ("sinks", (4,)), ("A_log", (4,))])
def test_a_layer_that_lacks_what_is_no_matrix(kind: str, rows: tuple[int, ...], tmp_path: Path) -> None:
    """Biases, and parameters of their own; where one layer alone has them, nobody knows."""

    def change(tensors: Tensors, layers: tuple[int, ...] = (0, 2)) -> None:
        for name in [n for n in tensors if ".layers.1." in n]:
            tensors[name.replace(".1.", ".2.")] = tensors[name]
        for layer in layers:
            tensors[f"model.layers.{layer}.self_attn.{kind}"] = ("BF16", rows, bytes(2 * rows[0]))

    cases: list[tuple[tuple[int, ...], list[str]]] = [((0, 2), ["missing"]), ((0, 1, 2), [])]
    for layers, found in [*cases, *([((1,), [])] if kind == "sinks" else [])]:
        (tmp_path / str(layers)).mkdir()
        folder = changed(LLAMA, tmp_path / str(layers), lambda t, layers=layers: change(t, layers))  # type: ignore[misc]
        edit_json(folder / "config.json", num_hidden_layers=3)
        assert codes(folder) == found, layers


@pytest.mark.parametrize("name", ["embed_out", "transformer.output_layer", "output"])
def test_a_head_by_another_name_is_not_missing(name: str, tmp_path: Path) -> None:
    """GPT-NeoX, ChatGLM and InternLM2 call it so, and say that it is not tied."""

    def change(tensors: Tensors) -> None:
        tensors[f"{name}.weight"] = tensors.pop("lm_head.weight")

    assert "missing" not in codes(changed(LLAMA, tmp_path, change))


@pytest.mark.parametrize(
    "stated", [{"tie_word_embeddings": True}, {"architectures": ["LlamaModel"]}, {"architectures": None}]
)
def test_a_model_may_have_no_head_of_its_own(stated: dict[str, Any], tmp_path: Path) -> None:
    folder = changed(LLAMA, tmp_path, without("lm_head"))
    edit_json(folder / "config.json", **stated)
    assert codes(folder) == []


@pytest.mark.parametrize(("tied", "found"), [(True, []), (False, ["missing"])])
def test_the_text_config_says_whether_the_head_is_tied(tied: bool, found: list[str], tmp_path: Path) -> None:
    """Where it says so: some families have both."""
    folder = changed(VL, tmp_path, without("lm_head"))
    text = json.loads((folder / "config.json").read_text())["text_config"]
    edit_json(folder / "config.json", text_config={**text, "tie_word_embeddings": tied}, tie_word_embeddings=not tied)
    assert codes(folder) == found


def test_a_scale_without_a_number(tmp_path: Path) -> None:
    """It is between others, which are looked at together with it."""

    def change(tensors: Tensors) -> None:
        tensors["model.layers.1.self_attn.o_proj.weight_scale"] = ("F32", (0,), b"")
        tensors["model.layers.1.mlp.down_proj.weight_scale"] = ("BF16", (1,), struct.pack("<H", 0x7FC0))

    model = interpret(rewrite.open_checkpoint(changed(LLAMA, tmp_path, change)))
    found = {(fault.code, fault.tensor) for fault in faults(model, model.select("all"))}
    assert ("scale-value", "model.layers.1.mlp.down_proj.weight_scale") in found
    assert "model.layers.1.self_attn.o_proj" in {tensor for _, tensor in found}


def test_a_fused_name_that_modelopt_leaves_alone(tmp_path: Path) -> None:
    """Found by a search: convert left it as it was, and verify took it for a fault of OUT's."""
    folder = changed("modelopt-qwen3_5-vl", tmp_path, same)
    name = next(n for n in rewrite.open_checkpoint(folder).tensors if n.endswith("self_attn.q_proj.weight"))
    fused = name.replace("q_proj.weight", "qkv_proj")
    edited(folder, ignore=[*json.loads((folder / "config.json").read_text())["quantization_config"]["ignore"], fused])
    assert outcome(folder, "vLLM").kind == "not known"
    repaired(folder, tmp_path / "out", selection="all", profile="exact")


def test_experts_with_scales_of_powers_of_two(tmp_path: Path) -> None:
    """No engine was run with these beside FP8 weights: of experts, too, nothing is said."""

    def change(tensors: Tensors) -> None:
        for name in [n for n in tensors if ".experts." in n and n.endswith(".weight_scale")]:
            del tensors[name]
            tensors[f"{name}_inv"] = ("F8_E8M0", (1, 1), b"\x76")

    model = interpret(rewrite.open_checkpoint(changed("modelopt-qwen3_5-moe", tmp_path, change)))
    assert {part.layout for layer in expert_layers(model) for part in layer.parts} == {"other"}
