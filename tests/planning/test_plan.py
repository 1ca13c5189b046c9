"""Planning: pure, complete, and careful about what it refuses."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from math import ceil, prod
from pathlib import Path

import pytest

from rewrite import Plan, make_plan, open_checkpoint
from rewrite.checkpoint.header import parse_header
from rewrite.errors import CheckpointError, Refused, Unsupported, UsageError
from rewrite.planning.segments import Copy
from rewrite.version import __version__
from tests.support import edit_json, raw_tensors, replace_tensor, shard_of, write_shard

QKV = "model.layers.0.linear_attn.in_proj_qkv"
Z = "model.layers.0.linear_attn.in_proj_z"


def test_a_plan_survives_json(real: Path) -> None:
    """Any executor can run it."""
    plan = make_plan(open_checkpoint(real))
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert again.digest == plan.digest


def test_planning_is_deterministic_and_reads_no_clock(real: Path) -> None:
    """The digest names the staging directory: the same input must give the same."""
    assert make_plan(open_checkpoint(real)).digest == make_plan(open_checkpoint(real)).digest


def test_a_changed_source_is_another_plan(copy: Path) -> None:
    """A staging directory of the old source must not be resumed."""
    before = make_plan(open_checkpoint(copy)).digest
    (copy / "recipe.yaml").write_text("changed")
    assert make_plan(open_checkpoint(copy)).digest != before


def test_manifest_states_every_change(text: Path) -> None:
    """Groups, partitions, row ranges, values before and after, files."""
    manifest = make_plan(open_checkpoint(text)).manifest
    assert (manifest.tool_version, manifest.profile, manifest.source) == (__version__, "exact", text.name)
    assert [group.name for group in manifest.groups] == [f"model.layers.{i}.linear_attn.in_proj_qkvz" for i in (0, 1)]
    qkv, z = manifest.groups[0].modules
    assert (qkv.tensor, qkv.new_dtype, qkv.old_shape, qkv.new_shape) == (f"{QKV}.weight_scale", "BF16", (1,), (256, 1))
    assert [(p.name, p.start, p.stop, p.scale) for p in qkv.partitions] == [
        ("q", 0, 64, qkv.old_values[0]),
        ("k", 64, 128, qkv.old_values[0]),
        ("v", 128, 256, qkv.old_values[0]),
    ]
    assert [(p.name, p.start, p.stop, p.scale) for p in z.partitions] == [("z", 0, 128, z.old_values[0])]
    rewritten = {file.name for file in manifest.files if file.rewritten}
    assert {"config.json", "model.safetensors.index.json"} < rewritten
    assert "tokenizer.json" not in rewritten


def test_unchanged_bytes_are_merged_into_runs(vl: Path) -> None:
    """At most one run more than there are changed scales and moved tensors (four at most): few and large."""
    plan = make_plan(open_checkpoint(vl))
    assert plan.shards
    for shard in plan.shards:
        copies = [s for s in shard.segments if isinstance(s, Copy)]
        assert len(copies) <= len(shard.segments) - len(copies) + 1 + 2 * 4


def test_headers_keep_order_metadata_and_alignment(real: Path) -> None:
    """The source's metadata and order but for a few small tensors behind; all at multiples of their dtype's size."""
    checkpoint = open_checkpoint(real)
    sources = {shard.name: shard.header for shard in checkpoint.shards.values()}
    widths = {"F32": 4, "BF16": 2, "F8_E4M3": 1}
    for shard in make_plan(checkpoint).shards:
        header = parse_header(shard.header[8:], shard.name)
        assert header.size % 8 == 0
        assert header.metadata == sources[shard.name].metadata == {"format": "pt"}
        old, new = [t.name for t in sources[shard.name].tensors], [t.name for t in header.tensors]
        moved = new[new.index(old[-1]) + 1 :]
        assert len(moved) < 4 and all(name.endswith("_scale") for name in moved)
        assert new == [name for name in old if name not in moved] + moved
        assert all(t.start % widths[t.dtype] == 0 for t in header.tensors)


def test_scales_that_would_misalign_others_move(copy: Path) -> None:
    """A BF16 scale before an F32 tensor grows by 510 bytes: widest dtype first keeps everything aligned."""
    shard = shard_of(copy, f"{Z}.weight_scale")
    raw = raw_tensors(copy)
    names = [t.name for t in shard.header.tensors]
    names.sort(key=lambda name: name != f"{Z}.weight_scale")
    tensors = {name: raw[name][1:] for name in names}
    first = tensors.pop(names[0])
    wide = {"pad": ("BF16", (1,), bytes(2)), "wide": ("F32", (1,), bytes(4))}
    write_shard(copy / shard.name, {names[0]: first, **wide, **tensors}, format="pt")
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    index["weight_map"] |= {"pad": shard.name, "wide": shard.name}
    edit_json(copy / "model.safetensors.index.json", weight_map=index["weight_map"])
    (plan,) = [s for s in make_plan(open_checkpoint(copy)).shards if s.name == shard.name]
    header = parse_header(plan.header[8:], "x")
    assert header.tensors[0].name == "wide"
    assert {t.name for t in header.tensors} == {*names, "pad", "wide"}
    assert all(t.start % {"F32": 4, "BF16": 2}.get(t.dtype, 1) == 0 for t in header.tensors)


def test_a_vector_of_partitions_expands_by_partition(copy: Path) -> None:
    """[3] for q, k, v (some exporters: vLLM PR #47396): genuinely different scales."""
    replace_tensor(copy, f"{QKV}.weight_scale", struct.pack("<3f", 1, 2, 3), (3,), "F32")
    qkv = make_plan(open_checkpoint(copy)).manifest.groups[0].modules[0]
    assert qkv.old_values == (1, 2, 3)
    assert [p.scale for p in qkv.partitions] == [1, 2, 3]


def test_unknown_profile(text: Path) -> None:
    """A usage error, not a refusal of the checkpoint."""
    with pytest.raises(UsageError, match="nonesuch"):
        make_plan(open_checkpoint(text), "nonesuch")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
@pytest.mark.parametrize("kind", ["weight_scale", "input_scale"])
def test_scales_that_are_no_numbers_are_refused(kind: str, value: float, copy: Path) -> None:
    """Naming file and tensor."""
    bf16 = struct.pack("<f", value)[2:]
    replace_tensor(copy, f"{Z}.{kind}", bf16)
    with pytest.raises(CheckpointError) as caught:
        make_plan(open_checkpoint(copy))
    assert f"{Z}.{kind}" in str(caught.value) and ".safetensors" in str(caught.value)


def _drop_scale(directory: Path) -> None:
    shard = shard_of(directory, f"{Z}.weight_scale")
    raw = raw_tensors(directory)
    kept = {t.name: raw[t.name][1:] for t in shard.header.tensors if t.name != f"{Z}.weight_scale"}
    write_shard(directory / shard.name, kept, format="pt")
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    del index["weight_map"][f"{Z}.weight_scale"]
    edit_json(directory / "model.safetensors.index.json", weight_map=index["weight_map"])


def _odd_scale(directory: Path) -> None:
    replace_tensor(directory, f"{QKV}.weight_scale", bytes(2 * 5), (5,))


def _half_quantized(directory: Path) -> None:
    replace_tensor(directory, f"{Z}.weight", bytes(128 * 64 * 2), (128, 64), "BF16")


def _config_says_channel(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["strategy"] = "channel"
    edit_json(directory / "config.json", **config)


def _config_ignores_it(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["ignore"].append("re:.*in_proj_z")
    edit_json(directory / "config.json", **config)


def _config_says_int8(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["type"] = "int"
    edit_json(directory / "config.json", **config)


def _config_lost(directory: Path) -> None:
    edit_json(directory / "config.json", quantization_config=None)


def _unknown_architecture(directory: Path) -> None:
    edit_json(directory / "config.json", model_type="qwen9")


@pytest.mark.parametrize(
    ("breaker", "message"),
    [
        (_drop_scale, "no scale"),
        (_odd_scale, "unknown shape"),
        (_half_quantized, "quantized in part"),
        (_config_says_channel, "disagree"),
        (_config_ignores_it, "disagree"),
        (_config_says_int8, "disagree"),
        (_config_lost, "dialect"),
        (_unknown_architecture, "unknown architecture"),
    ],
)
def test_what_cannot_be_converted_with_certainty_is_refused(
    breaker: Callable[[Path], None], message: str, copy: Path
) -> None:
    """Exit code 3 and a message that names the place."""
    breaker(copy)
    with pytest.raises(Refused, match=f"(?i){message}") as caught:
        make_plan(open_checkpoint(copy))
    assert caught.value.where and caught.value.exit_code == 3


def unknown(folder: Path) -> Path:
    """As of an architecture that nobody knows."""
    text = json.loads((folder / "config.json").read_text())["text_config"] | {"model_type": "qwen9"}
    edit_json(folder / "config.json", model_type="qwen9", architectures=["Qwen9ForCausalLM"], text_config=text)
    return folder


def test_global_scales_of_an_unknown_architecture(copy_of: Callable[[str], Path]) -> None:
    """NVFP4: engines that fuse the layer take one of the scales for all of it. Where they are equal nothing is lost."""
    with pytest.raises(Unsupported, match="An unknown architecture"):
        make_plan(open_checkpoint(unknown(copy_of("llmcompressor-qwen3_5-nvfp4"))))
    assert not make_plan(open_checkpoint(unknown(copy_of("modelopt-qwen3_5-moe-nvfp4")))).manifest.changed


def test_no_profile_is_named_for_a_group_that_lacks_a_module(copy: Path) -> None:
    """None converts it: "dequantized" was named, and refused it, too."""
    shard = shard_of(copy, f"{Z}.weight")
    raw = raw_tensors(copy)
    gone = {f"{Z}.weight", f"{Z}.weight_scale"}
    write_shard(copy / shard.name, {t.name: raw[t.name][1:] for t in shard.header.tensors if t.name not in gone})
    index = json.loads((copy / "model.safetensors.index.json").read_text())["weight_map"]
    kept = {name: file for name, file in index.items() if name not in gone}
    edit_json(copy / "model.safetensors.index.json", weight_map=kept)
    for profile in ("exact", "dequantized"):
        with pytest.raises(Refused, match="incomplete") as caught:
            make_plan(open_checkpoint(copy), profile)
        assert "no profile converts it" in str(caught.value)


@pytest.mark.parametrize(
    "quantization", [{"quant_method": "torchao"}, {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}]
)
def test_unknown_dialects_are_refused_by_name(quantization: dict[str, str], copy: Path) -> None:
    """Affected, and in a dialect that is known by name only."""
    edit_json(copy / "config.json", quantization_config=quantization)
    with pytest.raises(Unsupported, match=" ".join(quantization.values())):
        make_plan(open_checkpoint(copy))


def test_block_scales_need_nothing(copy: Path) -> None:
    """Qwen's own FP8 releases: weight_scale_inv per 128 x 128 block."""
    checkpoint = open_checkpoint(copy)
    raw = raw_tensors(copy)
    weight_map: dict[str, str] = {}
    for shard in checkpoint.shards.values():
        tensors: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
        for t in shard.header.tensors:
            if t.name.endswith("_scale"):
                if t.name.endswith("weight_scale"):
                    rows, columns = checkpoint.tensors[t.name.removesuffix("_scale")].shape
                    blocks = (ceil(rows / 128), ceil(columns / 128))
                    tensors[t.name + "_inv"] = ("F32", blocks, struct.pack("<f", 0.01) * prod(blocks))
            else:
                tensors[t.name] = raw[t.name][1:]
        write_shard(copy / shard.name, dict(sorted(tensors.items(), key=lambda kv: kv[1][0] != "F32")), format="pt")
        weight_map |= dict.fromkeys(tensors, shard.name)
    edit_json(copy / "model.safetensors.index.json", weight_map=weight_map)
    plain = json.loads((copy / "config.json").read_text())["quantization_config"]["ignore"]
    config = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": plain}
    edit_json(copy / "config.json", quantization_config=config)
    assert not make_plan(open_checkpoint(copy)).manifest.changed


def test_unquantized_models_need_nothing(copy: Path) -> None:
    """No FP8 weight, no change."""
    for name, info in open_checkpoint(copy).tensors.items():
        if info.dtype == "F8_E4M3":
            replace_tensor(copy, name, bytes(info.numel * 2), info.shape, "BF16")
    edit_json(copy / "config.json", quantization_config=None)
    plan = make_plan(open_checkpoint(copy))
    assert not plan.manifest.changed
    assert not plan.shards and not plan.texts


def test_stray_safetensors_are_noted(copy: Path) -> None:
    """Copied, and said so."""
    (copy / "consolidated.safetensors").write_bytes(b"whatever")
    plan = make_plan(open_checkpoint(copy))
    assert any("consolidated" in note for note in plan.manifest.notes)
    assert "consolidated.safetensors" in {c.name for c in plan.copies}


def test_sizes_are_those_of_what_will_be_written(real: Path) -> None:
    """Header and segments add up to the header's own idea of the file."""
    for shard in make_plan(open_checkpoint(real)).shards:
        assert shard.size == parse_header(shard.header[8:], "x").file_bytes
        assert replace(shard, segments=()).size == len(shard.header)
