"""Predictions: each behavior on each layout, and which version has which."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest

from rewrite.loaders import behaviors
from rewrite.loaders.layer import Layer, Part
from rewrite.loaders.versions import LOADERS, find_loaders
from rewrite.loaders.views import CheckpointView
from tests.support import LOADER_MATRIX

S = 0.5


def group(qkv: str, z: str, *, scales: tuple[float | None, ...] = (S, S, S, S / 3), static: bool = True) -> Layer:
    """q, k, v of one module and z of another, with these layouts."""
    names = (("q", "qkv", qkv), ("k", "qkv", qkv), ("v", "qkv", qkv), ("z", "z", z))
    partitions = tuple(
        Part(name, module, 64, layout, scale if layout in ("tensor", "partition") else None)  # type: ignore[arg-type]
        for (name, module, layout), scale in zip(names, scales, strict=True)
    )
    return Layer("g", "in_proj_qkvz", partitions, 128, static)


SHARED, CHANNEL, VECTOR, MIXED = (
    group("tensor", "tensor"),
    group("channel", "channel"),
    group("partition", "tensor"),
    group("tensor", "none"),
)


STORED_FUSED = Layer("g", "qkv_proj", tuple(Part(name, "qkv_proj", 64, "partition", S) for name in "qkv"), 128, True)


@pytest.mark.parametrize(
    ("behavior", "view", "kind", "hurt"),
    [
        (behaviors.slot_zero_only, SHARED, "garbled", ("k", "v")),
        (behaviors.slot_zero_only, CHANNEL, "exact", ()),
        (behaviors.slot_zero_only, VECTOR, "fails to load", ()),
        (behaviors.every_slot, SHARED, "loses precision", ("z",)),
        (behaviors.every_slot, CHANNEL, "exact", ()),
        (behaviors.every_slot, VECTOR, "fails to load", ()),
        (behaviors.every_slot_or_vector, VECTOR, "loses precision", ("z",)),
        (behaviors.every_slot_or_vector, STORED_FUSED, "fails to load", ()),
        (behaviors.split_by_sizes, SHARED, "fails to load", ()),
        (behaviors.split_by_sizes, CHANNEL, "fails to load", ()),
        (behaviors.separate_modules, SHARED, "exact", ()),
        (behaviors.separate_modules, CHANNEL, "exact", ()),
        (behaviors.separate_modules, VECTOR, "fails to load", ()),
        (behaviors.slot_zero_only, MIXED, "fails to load", ()),
        (behaviors.every_slot, MIXED, "fails to load", ()),
        (behaviors.every_slot, group("none", "none"), "exact", ()),
        (behaviors.every_slot, group("block", "block"), "exact", ()),
        (behaviors.every_slot, group("channel", "tensor"), "fails to load", ()),
        (behaviors.every_slot, group("unknown", "tensor"), "fails to load", ()),
    ],
)
def test_outcomes(behavior: behaviors.Behavior, view: Layer, kind: str, hurt: tuple[str, ...]) -> None:
    """As measured on the real loaders (tests/loader_matrix.json) or read in their source."""
    outcome = behavior(view)
    assert (outcome.kind, outcome.partitions) == (kind, hurt)
    assert (outcome.error > 0) == (kind in ("garbled", "loses precision"))


def test_dynamic_activations_leave_nothing_to_split() -> None:
    """SGLang 0.5.10 fails on the shared input_scale only."""
    assert behaviors.split_by_sizes(group("channel", "channel", static=False)).kind == "exact"


def test_only_the_gated_delta_net_is_split_or_kept_apart() -> None:
    """SGLang fuses attention and MLPs in every version."""
    shared = replace(group("tensor", "tensor"), kind="qkv_proj")
    for behavior in (behaviors.split_by_sizes, behaviors.separate_gated_delta_net):
        assert behavior(shared) == behaviors.every_slot(shared)
        assert behavior(shared).kind == "loses precision"


FAILING = dict.fromkeys(["original", "exact"], "fails to load")


@pytest.mark.parametrize("layer", ["in_proj_qkvz", "in_proj_ba"])
def test_one_partition_is_not_split(layer: str) -> None:
    """Qwen3-Next stores in_proj_qkvz as one matrix, and in_proj_ba: no loader fuses or splits anything there. But
    SGLang from 0.5.11 has four or two slots for it, which scales of one value do not fit, be they the weight's or the
    activations'."""
    module = Part(layer.removeprefix("in_proj_"), layer, 768, "tensor", S)
    views = {
        "original": Layer("g", layer, (module,), 64, True),
        "exact": Layer("g", layer, (replace(module, layout="channel", scale=None),), 64, True),
        "portable": Layer("g", layer, (replace(module, layout="channel", scale=None),), 64, False),
        "bf16": Layer("g", layer, (replace(module, layout="none", scale=None),), 64, True),
    }
    for loader in LOADERS:
        kinds = {name: loader.behavior(view).kind for name, view in views.items()}
        raises = loader.behavior is behaviors.every_slot_or_vector
        assert kinds == {**dict.fromkeys(views, "exact"), **(FAILING if raises else {})}


def test_equal_scales_lose_nothing() -> None:
    """Requantizing to the same scale changes nothing; slot 0 alone still garbles."""
    equal = group("tensor", "tensor", scales=(S, S, S, S))
    assert behaviors.every_slot(equal).kind == "exact"
    assert behaviors.slot_zero_only(equal).kind == "garbled"


def test_a_larger_z_hurts_the_others() -> None:
    """Whatever is not at the largest scale is requantized."""
    assert behaviors.every_slot(group("tensor", "tensor", scales=(S, S, S, 3 * S))).partitions == ("q", "k", "v")


def test_an_empty_last_slot_means_fused_on_disk() -> None:
    """requantize_with_max_scale skips a group whose last slot holds the sentinel."""
    one = tuple(Part(name, "qkvz", 64, "tensor", S) for name in "qkvz")
    assert behaviors.slot_zero_only(Layer("g", "in_proj_qkvz", one, 128, True)).kind == "exact"


def checkpoint(*groups: Layer, **changes: Any) -> CheckpointView:
    """A vision-language checkpoint of llm-compressor's, but for ``changes``."""
    base = CheckpointView("qwen3_5", "compressed-tensors", True, "BF16", False, True, True, groups)
    return replace(base, **changes)


def test_predict_takes_the_worst_and_names_all_that_are_hurt() -> None:
    """Over groups that differ."""
    other = group("tensor", "tensor", scales=(S, S, S, 2 * S))
    outcome = LOADERS[1].predict(checkpoint(SHARED, CHANNEL, other))
    assert (outcome.kind, set(outcome.partitions)) == ("loses precision", {f"in_proj_qkvz.{name}" for name in "qkvz"})
    assert LOADERS[1].predict(checkpoint()).kind == "exact"


F32_CHANNEL = replace(CHANNEL, parts=tuple(replace(p, scale_dtype="F32") for p in CHANNEL.parts))


@pytest.mark.parametrize(
    ("loader", "view", "kind"),
    [
        ("vllm@0.19.1", checkpoint(CHANNEL, model_type="qwen3_5_text"), "fails to load"),
        ("vllm@0.32.0", checkpoint(CHANNEL, model_type="qwen3_5_text"), "exact"),
        ("vllm@0.21.0", checkpoint(CHANNEL, model_type="minicpmv4_6"), "fails to load"),
        ("vllm@0.22.0", checkpoint(CHANNEL, model_type="minicpmv4_6"), "exact"),
        ("sglang@0.5.11", checkpoint(CHANNEL, model_type="minicpmv4_6"), "fails to load"),
        ("sglang@0.5.22", checkpoint(CHANNEL, model_type="minicpmv4_6"), "fails to load"),
        ("sglang@0.5.23", checkpoint(CHANNEL, model_type="minicpmv4_6"), "exact"),
        ("sglang@0.5.9", checkpoint(CHANNEL), "exact"),
        ("sglang@0.5.9", checkpoint(CHANNEL, ignore_survives_renaming=False), "fails to load"),
        ("transformers@5.17.0", checkpoint(CHANNEL), "exact"),
        ("transformers@5.17.0", checkpoint(SHARED, dialect="modelopt"), "garbled"),
        ("transformers@5.17.0", checkpoint(SHARED, dialect="fp8"), "garbled"),
        ("transformers@5.17.0", checkpoint(group("none", "none"), dialect="fp8"), "garbled"),  # the layers beside them
        ("transformers@5.17.0", checkpoint(group("block", "block"), dialect="fp8", fp8_with_scales=False), "exact"),
        ("transformers@5.17.0", checkpoint(F32_CHANNEL), "loses precision"),
        ("transformers@5.17.0", checkpoint(F32_CHANNEL, dtype="F32"), "exact"),
    ],
)
def test_obstacles(loader: str, view: CheckpointView, kind: str) -> None:
    """What a loader makes of the whole checkpoint comes before what it makes of a group."""
    (row,) = find_loaders(loader)
    assert row.predict(view).kind == kind


@pytest.mark.parametrize(
    ("wanted", "versions"),
    [
        ("vllm@0.17.1", ["0.17.0 to 0.19.1"]),
        ("vLLM@0.19.1", ["0.17.0 to 0.19.1"]),
        ("vllm@0.20.0", ["0.20.0 to 0.20.2"]),
        ("vllm@1000.0", [[loader.versions for loader in LOADERS if loader.name == "vLLM"][-1]]),
        ("vllm", [loader.versions for loader in LOADERS if loader.name == "vLLM"]),
        ("sglang@0.5.10.post1", ["0.5.10 to 0.5.10.post1"]),
        ("sglang@0.5.11", ["0.5.11"]),
        ("vllm@0.16", []),
        ("other", []),
    ],
)
def test_find_loaders(wanted: str, versions: list[str]) -> None:
    """By name in any case, with or without a version."""
    assert [loader.versions for loader in find_loaders(wanted)] == versions


def test_every_row_cites_runs_that_are_recorded() -> None:
    """Of its first and its last version."""
    cells = json.loads(LOADER_MATRIX.read_text())["cells"]
    recorded = {(cell["engine"], cell["version"]) for cell in cells}
    for loader in LOADERS:
        versions = re.findall(r"[\d.]+\d(?:\.post\d)?", loader.source.partition("run: ")[2].partition(" with ")[0])
        assert versions and {(loader.name.lower(), version) for version in versions} <= recorded, loader
        assert {loader.first, loader.last} - {None} <= set(versions), loader
