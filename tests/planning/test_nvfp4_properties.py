"""NVFP4 with scales that nobody chose: what a conversion may change, that twice is once, and that verify agrees."""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import rewrite
from tests.support import FIXTURES, NVFP4, raw_tensors, tree, write_shard

_GLOBAL, _INPUT = ("weight_global_scale", "weight_scale_2"), ("input_global_scale", "input_scale")
_MODULES = ("in_proj_qkv", "in_proj_z", "q_proj", "v_proj", "gate_proj", "up_proj", "q_a_proj", "kv_a_proj_with_mqa")
#: Powers of two and any other number, far more than producers write.
FACTORS = st.one_of(st.sampled_from([0.25, 0.5, 2.0, 4.0]), st.floats(2**-7, 128.0, width=32))
#: What OUT may change, by the last name of the module: never a code, a norm or a plain matrix.
_MAY_CHANGE = ("weight_scale", *_GLOBAL, *_INPUT)


def changed_scales(fixture: str, factors: dict[str, float], inputs: dict[str, float], folder: Path) -> Path:
    """The fixture with global scales, and those of activations, times a factor by the name of the module."""
    source = Path(shutil.copytree(FIXTURES / fixture, folder / "in"))
    for shard in source.glob("*.safetensors"):
        own = {name: t[1:] for name, t in raw_tensors(source).items() if t[0] == shard.name}
        for name, (dtype, shape, data) in own.items():
            module, kind = name.split(".")[-2:]
            factor = factors.get(module) if kind in _GLOBAL else inputs.get(module) if kind in _INPUT else None
            if factor is not None:
                own[name] = (dtype, shape, struct.pack("<f", struct.unpack("<f", data)[0] * factor))
        write_shard(shard, own, format="pt")
    return source


def without_manifest(out: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree(out).items() if name != "rewrite_manifest.json"}


@pytest.mark.parametrize("fixture", NVFP4)
@given(
    factors=st.dictionaries(st.sampled_from(_MODULES), FACTORS),
    inputs=st.dictionaries(st.sampled_from(_MODULES), FACTORS, max_size=2),
    profile=st.sampled_from(["exact", "rescaled", "portable"]),
)
@example(factors={"q_a_proj": 100.0, "in_proj_qkv": 100.0, "up_proj": 100.0}, inputs={}, profile="exact")
@example(factors={"kv_a_proj_with_mqa": 0.01, "in_proj_z": 100.0}, inputs={"up_proj": 3.0}, profile="rescaled")
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_scales_are_repaired(
    fixture: str, factors: dict[str, float], inputs: dict[str, float], profile: str
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        source = changed_scales(fixture, factors, inputs, place)
        manifest = rewrite.convert(source, place / "out", profile=profile)
        old, new = raw_tensors(source), raw_tensors(place / "out")
        assert old.keys() == new.keys()
        named = {name.rpartition(".")[0] for change in manifest.scales for name in (change.name, change.kept)}
        into = {change.into for change in manifest.scales if change.into}
        for name in (name for name in old if old[name] != new[name]):
            module, _, kind = name.rpartition(".")
            assert old[name][:3] == new[name][:3], "only bytes change"
            assert kind in _MAY_CHANGE or (name.endswith("conv1d.weight") and module in into), name
            assert module.rpartition(".")[0] in named or module in into or ".experts." in module, name
        for shard in ("config.json", "tokenizer.json"):
            assert (place / "out" / shard).read_bytes() == (source / shard).read_bytes() or profile == "portable"
        assert rewrite.verify(source, place / "out", device="cpu", tokens=1).ok
        again = rewrite.convert(place / "out", place / "again", profile=profile)
        assert not again.changed
        assert without_manifest(place / "again") == without_manifest(place / "out")
        layers = rewrite.inspect_checkpoint(place / "out", selection="all").groups
        assert all(len({p.scale for p in group.parts}) == 1 for group in layers if group.nvfp4)


def test_the_manifest_names_every_layer() -> None:
    """Of the test above: an empty list of changes would let nothing change."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        rewrite.convert(FIXTURES / "modelfree-deepseek_v3-nvfp4a16", out)
        manifest = json.loads((out / "rewrite_manifest.json").read_text())
        assert len(manifest["global_scales"]) == 7
