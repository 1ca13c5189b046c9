"""The profile ``dequantized``: every layout of scales, everywhere in a checkpoint, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import rewrite
from rewrite.planning.jobs import ShardPlan
from rewrite.planning.segments import Dequantize
from tests.support import FIXTURES, edit_json, raw_tensors, tree

FP8 = torch.float8_e4m3fn
_GROUP: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}


def codes(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Every E4M3 code but NaN."""
    found = torch.randint(0, 127, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return (found | (torch.arange(columns) % 2 * 128).to(torch.uint8)).view(FP8)


def scales(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 0.01 + 1e-4).to(dtype)


def group(strategy: str, targets: list[str], **weights: Any) -> dict[str, Any]:
    inputs = {**_GROUP, "strategy": "token", "dynamic": True}
    return {"targets": targets, "weights": {**_GROUP, "strategy": strategy, **weights}, "input_activations": inputs}


def write(
    directory: Path, shards: list[dict[str, torch.Tensor]], quantization: dict[str, Any] | None, **config: Any
) -> Path:
    """A checkpoint of some Llama, quantized as stated."""
    directory.mkdir()
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, tensors in zip(names, shards, strict=True):
        save_file(tensors, directory / name, {"format": "pt"})
    weight_map = {tensor: name for name, tensors in zip(names, shards, strict=True) for tensor in tensors}
    index = {"metadata": {"total_size": 1, "kept": 2}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    stated = {} if quantization is None else {"quantization_config": quantization}
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", **stated, "vocab_size": 8, **config}))
    return directory


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in sorted(directory.glob("*.safetensors")) for name, t in load_file(path).items()}


def check_sound(source: Path, out: Path, dtype: torch.dtype, gone: set[str]) -> None:
    """Index, config and tensors of OUT: plain, none but ``gone`` missing, nothing but the quantization changed."""
    after = tensors_of(out)
    assert tensors_of(source).keys() - after.keys() == gone
    assert {tensor.dtype for tensor in after.values()} == {dtype}
    config, old = (json.loads((d / "config.json").read_text()) for d in (out, source))
    old.pop("quantization_config", None)
    assert config == old and list(config) == list(old)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(t.nbytes for t in after.values()), "kept": 2}
    assert index["weight_map"].keys() == after.keys()
    found = rewrite.verify(source, out, device="cpu", tokens=4)
    assert found.ok, [problem for check in found.checks for problem in check.problems]


@pytest.fixture
def layouts(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """Every layout of compressed-tensors in one checkpoint, scales beside their weights and in other shards, with the
    true weights in float32."""
    first: dict[str, torch.Tensor] = {"model.norm.weight": torch.ones(4, dtype=torch.bfloat16)}
    second: dict[str, torch.Tensor] = {}
    truth = {}
    shapes: dict[str, tuple[tuple[int, int], torch.Tensor]] = {
        "model.layers.0.self_attn.o_proj": ((6, 8), scales(1, dtype=torch.bfloat16)),
        "model.layers.1.self_attn.o_proj": ((6, 8), scales()),
        "model.layers.0.mlp.down_proj": ((40, 24), scales(40, 1)),
        "model.layers.1.mlp.down_proj": ((40, 24), scales(40, 1, dtype=torch.bfloat16)),
        "mtp.layers.0.mlp.down_proj": ((300, 260), scales(3, 3, dtype=torch.bfloat16)),
        "model.visual.blocks.0.mlp.down_proj": ((129, 128), scales(2, 1)),
        "lm_head": ((4, 8), scales(1)),
        "model.embed_tokens": ((8, 8), scales(8, 1)),
    }
    for number, (name, (shape, scale)) in enumerate(shapes.items()):
        weight = codes(*shape, seed=number)
        first[f"{name}.weight"] = weight
        (second if number % 2 else first)[f"{name}.weight_scale"] = scale
        rows, columns = shape
        spread = scale.float().reshape(scale.shape if scale.dim() == 2 else (1, 1))
        high, wide = (128, 128) if scale.shape in ((3, 3), (2, 1)) else (max(rows // spread.shape[0], 1), columns)
        truth[name] = weight.float() * spread.repeat_interleave(high, 0)[:rows].repeat_interleave(wide, 1)[:, :columns]
    first["model.layers.0.self_attn.o_proj.input_scale"] = scales(1)
    second["model.layers.0.self_attn.k_scale"] = scales(1)
    second["model.layers.0.self_attn.v_scale"] = scales(1)
    config = {
        "quant_method": "compressed-tensors",
        "config_groups": {
            "a": {**group("tensor", [r"re:.*layers\.0\.self_attn\.o_proj"]), "input_activations": {**_GROUP}},
            "b": group("tensor", [r"re:.*layers\.1\.self_attn\.o_proj", "lm_head"]),
            "c": group("channel", [r"re:model\.layers.*down_proj", "Embedding"]),
            "d": group("block", [r"re:(mtp|model\.visual).*"], block_structure=[128, 128]),
        },
        "ignore": [],
        "kv_cache_scheme": {**_GROUP, "strategy": "tensor"},
    }
    return write(tmp_path / "in", [first, second], config), truth


def test_every_layout_everywhere(layouts: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    """Tensor, channel and block scales of several dtypes; MTP, vision, lm_head, embeddings; scales in another shard."""
    source, truth = layouts
    manifest = rewrite.convert(source, tmp_path / "out", profile="dequantized")
    after = tensors_of(tmp_path / "out")
    for name, weight in truth.items():
        assert torch.equal(after[f"{name}.weight"], weight.bfloat16()), name
    gone = {name for name in tensors_of(source) if name.endswith("_scale")}
    assert set(manifest.dropped) == gone
    check_sound(source, tmp_path / "out", torch.bfloat16, gone)


@pytest.mark.parametrize(("name", "dtype"), [("float16", torch.float16), ("float32", torch.float32)])
def test_the_dtype_of_the_model(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Rounded once from the float32 product, as torch does it."""
    weight, scale = codes(16, 32), scales(16, 1)
    config = {"quant_method": "compressed-tensors", "config_groups": {"a": group("channel", ["Linear"])}, "ignore": []}
    source = write(tmp_path / "in", [{"lm_head.weight": weight, "lm_head.weight_scale": scale}], config, dtype=name)
    rewrite.convert(source, tmp_path / "out", profile="dequantized")
    assert torch.equal(tensors_of(tmp_path / "out")["lm_head.weight"], (weight.float() * scale).to(dtype))
    check_sound(source, tmp_path / "out", dtype, {"lm_head.weight_scale"})


def native_blocks(directory: Path, **changes: Any) -> Path:
    """``weight_scale_inv``, as DeepSeek-V3 and Qwen write it: multiplied with, whatever its name says."""
    tensors = {"model.layers.0.mlp.up_proj.weight": codes(260, 130)}
    tensors["model.layers.0.mlp.gate_proj.weight"] = codes(260, 130, seed=2)
    for name in list(tensors):
        tensors[f"{name}_scale_inv"] = scales(3, 2)
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128], **changes}
    return write(directory, [tensors], config)


def test_native_block_scales(tmp_path: Path) -> None:
    """Weights whose sides are no multiples of the block."""
    source = native_blocks(tmp_path / "in")
    rewrite.convert(source, tmp_path / "out", profile="dequantized", selection="all")
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight"):
        spread = before[f"{name}_scale_inv"].repeat_interleave(128, 0)[:260].repeat_interleave(128, 1)[:, :130]
        assert torch.equal(after[name], (before[name].float() * spread).bfloat16())
    check_sound(source, tmp_path / "out", torch.bfloat16, {n for n in before if n.endswith("_inv")})


def test_modelopts_files_go(copy_of: Callable[[str], Path], tmp_path: Path) -> None:
    """Also where only hf_quant_config.json states the quantization, and AutoRound's copy of a config."""
    source = copy_of("modelopt-llama")
    (source / "quantization_config.json").write_text("{}")
    rewrite.convert(source, tmp_path / "out", profile="dequantized")
    assert not {"hf_quant_config.json", "quantization_config.json"} & tree(tmp_path / "out").keys()
    edit_json(source / "config.json", quantization_config=None)
    rewrite.convert(source, tmp_path / "older", profile="dequantized")
    for out in ("out", "older"):
        assert "quantization_config" not in json.loads((tmp_path / out / "config.json").read_text())
    assert raw_tensors(tmp_path / "older") == raw_tensors(tmp_path / "out")
    assert rewrite.verify(source, tmp_path / "older", device="cpu", tokens=4).ok


def test_a_vector_of_partitions(tmp_path: Path) -> None:
    """One scale each, of partitions of different sizes."""
    source = FIXTURES / "llmcompressor-qwen3_5-text"
    rewrite.convert(source, tmp_path / "vectors", profile="partition")
    rewrite.convert(tmp_path / "vectors", tmp_path / "out", profile="dequantized")
    rewrite.convert(source, tmp_path / "expected", profile="dequantized")
    assert raw_tensors(tmp_path / "out") == raw_tensors(tmp_path / "expected")


def test_every_config_that_a_loader_may_read_goes(copy_of: Callable[[str], Path], tmp_path: Path) -> None:
    """Loaders look in three places: what stays in the second would count once the first is gone."""
    source = copy_of("llmcompressor-qwen3_5-vl")
    config = json.loads((source / "config.json").read_text())
    config["text_config"]["quantization_config"] = config["compression_config"] = config["quantization_config"]
    (source / "config.json").write_text(json.dumps(config))
    rewrite.convert(source, tmp_path / "out", profile="dequantized")
    assert "quant" not in (tmp_path / "out" / "config.json").read_text()
    assert rewrite.verify(source, tmp_path / "out", device="cpu", tokens=4).ok


def test_the_plan_stays_small(layouts: tuple[Path, dict[str, torch.Tensor]]) -> None:
    """It round-trips through JSON; scales in the weight's shard are read when they are needed."""
    source, _ = layouts
    plan = rewrite.make_plan(rewrite.open_checkpoint(source), "dequantized")
    segments = [s for shard in plan.shards for s in shard.segments if isinstance(s, Dequantize)]
    assert len(segments) == 8 and sum(isinstance(s.scales, int) for s in segments) == 4
    for shard in plan.shards:
        assert ShardPlan.from_json(json.loads(json.dumps(shard.to_json()))) == shard


def _spoil_config(out: Path, source: Path) -> None:
    stated = json.loads((source / "config.json").read_text())["quantization_config"]
    edit_json(out / "config.json", quantization_config=stated)


def _spoil_weight(out: Path, _source: Path) -> None:
    """One weight of one block, by its last bit."""
    tensors = load_file(path := out / "model-00001-of-00002.safetensors")
    tensors["mtp.layers.0.mlp.down_proj.weight"].view(torch.int16)[299, 259] ^= 1
    save_file(tensors, path, {"format": "pt"})


def _spoil_scale(out: Path, _source: Path) -> None:
    """A scale of the KV cache comes back."""
    tensors = load_file(path := out / "model-00001-of-00002.safetensors")
    tensors["model.layers.0.self_attn.k_scale"] = scales(1).bfloat16()
    save_file(tensors, path, {"format": "pt"})
    index = json.loads((out / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.layers.0.self_attn.k_scale"] = path.name
    index["metadata"]["total_size"] += 2
    (out / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("spoil", "check"), [(_spoil_config, "structure"), (_spoil_weight, "weights"), (_spoil_scale, "structure")]
)
def test_verification_can_fail(
    spoil: Callable[[Path, Path], None], check: str, layouts: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    """A config or a scale that stayed, a weight that is off by a bit."""
    source, _ = layouts
    rewrite.convert(source, tmp_path / "out", profile="dequantized")
    spoil(tmp_path / "out", source)
    found = rewrite.verify(source, tmp_path / "out", device="cpu", tokens=4)
    assert check in {c.name for c in found.checks if c.verdict == "FAILED"}


def test_weights_that_are_rotated(copy_of: Callable[[str], Path], tmp_path: Path) -> None:
    """Without its config nobody turns the activations."""
    source = copy_of("llmcompressor-llama")
    config = json.loads((source / "config.json").read_text())["quantization_config"]
    edit_json(source / "config.json", quantization_config={**config, "transform_config": {"config_groups": {"u": {}}}})
    with pytest.raises(rewrite.RewriteError, match="rotated"):
        rewrite.convert(source, tmp_path / "out", profile="dequantized")


def test_nothing_to_do(tmp_path: Path) -> None:
    """A plain checkpoint is copied."""
    source = write(tmp_path / "in", [{"lm_head.weight": torch.ones(4, 4)}], None)
    assert not rewrite.convert(source, tmp_path / "out", profile="dequantized").changed
    assert tree(tmp_path / "out") == tree(source)


def _refused(source: Path, match: str) -> rewrite.Refused:
    with pytest.raises(rewrite.Refused, match=match) as caught:
        rewrite.make_plan(rewrite.open_checkpoint(source), "dequantized")
    return caught.value


def test_other_formats_are_refused() -> None:
    """By their name, with what can be done."""
    error = _refused(FIXTURES / "modelopt-qwen3_5-mixed", "Layers of other formats than FP8 are not dequantized")
    assert error.found == "9 layers in NVFP4"
    assert error.hint == "--profile bf16 or partition converts it"


@pytest.mark.parametrize(
    ("changes", "tensors", "match"),
    [
        ({}, {"lm_head.weight": codes(4, 4)}, "An FP8 weight has no scale"),
        ({}, {"lm_head.weight_zero_point": torch.zeros(1)}, "belongs to no layer"),
        ({}, {"model.experts.gate_up_proj": codes(4, 4).reshape(2, 2, 4)}, "belongs to no layer"),
        ({}, {"lm_head.weight": torch.ones(4, 4), "lm_head.weight_scale": scales(1)}, "belongs to no layer"),
        ({}, {"lm_head.weight": codes(4, 4).view(torch.float8_e5m2), "lm_head.weight_scale": scales(1)}, "E4M3"),
        ({}, {"lm_head.weight": codes(4, 4).view(torch.int8)}, "other formats"),
        ({}, {"lm_head.weight": codes(4, 4), "lm_head.weight_scale": scales(1)}, "disagree"),
        ({"weight_block_size": [64, 128]}, {}, "disagree"),
        ({"weight_block_size": [128]}, {}, "disagree"),
        ({"modules_to_not_convert": ["model.layers.0.mlp.up_proj"]}, {}, "disagree"),
        ({}, {"lm_head.weight": codes(4, 4), "lm_head.weight_scale_inv": torch.full((1, 1), 1e37)}, "not be finite"),
        ({}, {"lm_head.weight": codes(4, 4), "lm_head.weight_scale_inv": torch.zeros(1, 1)}, "not a positive number"),
    ],
)  # fmt: skip
def test_what_cannot_be_dequantized_for_sure_is_refused(
    changes: dict[str, Any], tensors: dict[str, torch.Tensor], match: str, tmp_path: Path
) -> None:
    """Never a checkpoint that is plain in part, without the config that explains the rest."""
    source = native_blocks(tmp_path / "in", **changes)
    path = next(source.glob("*.safetensors"))
    save_file({**load_file(path), **tensors}, path, {"format": "pt"})
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(tensors, path.name)
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    _refused(source, match)
