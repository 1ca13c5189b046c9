"""Multi-head latent attention (DeepSeek-V3): ``fused_qkv_a_proj``. The recorded runs: test_loader_matrix.py."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

import rewrite
from rewrite.loaders.outcome import Outcome
from rewrite.loaders.ranges import version_key
from rewrite.quantization.architectures import find_architecture
from tests.support import FIXTURES, edit_json, raw_tensors, replace_tensor, write_shard

NVFP4, FP8 = "modelfree-deepseek_v3-nvfp4a16", "llmcompressor-deepseek_v3"
ATTENTION = "model.layers.0.self_attn."
Q_A, KV_A = f"{ATTENTION}q_a_proj", f"{ATTENTION}kv_a_proj_with_mqa"


@pytest.fixture
def copy(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return Path(shutil.copytree(FIXTURES / request.param, tmp_path / "in"))


def outcomes(folder: Path, selection: rewrite.Selection = "all") -> dict[str, Outcome]:
    """Of every row of the table, by its first version."""
    rows = rewrite.inspect_checkpoint(folder, selection=selection).rows
    return {f"{row.engine.name} {row.engine.first}": row.as_is for row in rows}


def f32(raw: bytes) -> float:
    return float(struct.unpack("<f", raw)[0])


def test_vllm_serves_q_a_with_the_scale_of_kv_a() -> None:
    """The smaller of the two scales; SGLang loads neither of two."""
    found = outcomes(FIXTURES / NVFP4)
    assert found["vLLM 0.27.0"].kind == "garbled"
    assert dict(found["vLLM 0.27.0"].factors)["fused_qkv_a_proj.q_a"] == pytest.approx(1 / 2.37, rel=2e-3)
    assert found["SGLang 0.5.23"].kind == "fails to load"


@pytest.mark.parametrize("fixture", [NVFP4, FP8])
def test_versions_that_were_not_run_are_not_known(fixture: str) -> None:
    """Latent attention was run in these and later versions."""
    since = {"vLLM": "0.27.0", "SGLang": "0.5.23", "transformers": "5.17.0"}
    for name, outcome in outcomes(FIXTURES / fixture).items():
        engine, first = name.split()
        assert (outcome.kind == "not known") == (version_key(first) < version_key(since[engine])), name


#: By profile, the tensors of a layer of attention that change.
CHANGES = {
    "exact": {f"{Q_A}.weight_global_scale"},
    "rescaled": {f"{KV_A}.weight_global_scale", f"{KV_A}.weight_scale"},
}


@pytest.mark.parametrize("profile", CHANGES)
def test_latent_projections_get_one_scale(profile: str, tmp_path: Path) -> None:
    """q_a takes kv_a's, as the norm behind it takes any factor away; or kv_a is rescaled to q_a's, which is larger."""
    rewrite.convert(FIXTURES / NVFP4, tmp_path / "out", profile=profile)
    old, new = raw_tensors(FIXTURES / NVFP4), raw_tensors(tmp_path / "out")
    changed = {name for name in old if old[name] != new[name] and ATTENTION in name}
    assert changed == CHANGES[profile]
    (kept,) = {f"{KV_A}.weight_global_scale", f"{Q_A}.weight_global_scale"} - changed
    assert all(new[f"{name}.weight_global_scale"][3] == old[kept][3] for name in (Q_A, KV_A))
    manifest = json.loads((tmp_path / "out" / "rewrite_manifest.json").read_text())
    how = {each["name"]: each["how"] for each in manifest["global_scales"]}
    assert how[f"{ATTENTION}fused_qkv_a_proj"] == ("folded" if profile == "exact" else "rescaled")
    assert how["model.layers.1.mlp.shared_experts.gate_up_proj"] == ("folded" if profile == "exact" else "rescaled")
    assert rewrite.verify(FIXTURES / NVFP4, tmp_path / "out", device="cpu", tokens=1).ok
    assert outcomes(tmp_path / "out")["vLLM 0.27.0"].kind == "exact"
    assert not rewrite.convert(tmp_path / "out", tmp_path / "again", profile=profile).changed


def add_bias(folder: Path, module: str) -> None:
    """Beside a weight, in the same shard."""
    tensors = {name: found[1:] for name, found in raw_tensors(folder).items()}
    shape = tensors[f"{module}.weight" if module.endswith("norm") else f"{module}.weight_packed"][1][:1]
    write_shard(folder / "model.safetensors", {**tensors, f"{module}.bias": ("BF16", shape, bytes(2 * shape[0]))})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"][f"{module}.bias"] = "model.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def small_q_a(folder: Path) -> None:
    """A ratio of 2,000, at which the epsilon of the norm would count."""
    name = f"{Q_A}.weight_global_scale"
    replace_tensor(folder, name, struct.pack("<f", f32(raw_tensors(folder)[name][3]) * 5000))


@pytest.mark.parametrize("copy", [NVFP4], indirect=True)
@pytest.mark.parametrize(
    "change",
    [lambda copy: add_bias(copy, Q_A), lambda copy: add_bias(copy, f"{ATTENTION}q_a_layernorm"), small_q_a],
    ids=["bias", "bias of the norm", "large ratio"],
)
def test_what_a_norm_does_not_take_away_is_rescaled(change: Callable[[Path], None], copy: Path, tmp_path: Path) -> None:
    """And verify does not accept a fold there."""
    change(copy)
    manifest = rewrite.convert(copy, tmp_path / "out")
    (how,) = [each.how for each in manifest.scales if each.name == f"{ATTENTION}fused_qkv_a_proj"]
    assert how == "rescaled"
    assert rewrite.verify(copy, tmp_path / "out", device="cpu", tokens=1).ok
    for kind in ("weight_global_scale", "weight_scale"):  # folded by hand
        for module in (Q_A, KV_A):
            name = f"{module}.{kind}"
            data = raw_tensors(copy)[f"{KV_A}.{kind}" if kind == "weight_global_scale" else name][3]
            replace_tensor(tmp_path / "out", name, data)
    result = rewrite.verify(copy, tmp_path / "out", device="cpu", tokens=1)
    assert {check.name for check in result.checks if check.verdict == "FAILED"} - {"structure"} == {"weights"}


def test_verify_sees_a_scale_that_was_put_back(tmp_path: Path) -> None:
    """The layer has two again."""
    rewrite.convert(FIXTURES / NVFP4, tmp_path / "out")
    name = f"{Q_A}.weight_global_scale"
    replace_tensor(tmp_path / "out", name, raw_tensors(FIXTURES / NVFP4)[name][3])
    assert not rewrite.verify(FIXTURES / NVFP4, tmp_path / "out", device="cpu", tokens=1).ok


@pytest.mark.parametrize("copy", [FP8], indirect=True)
def test_sglang_takes_the_first_of_two_scalars(copy: Path) -> None:
    for name, (_, _, shape, data) in raw_tensors(copy).items():
        if name.startswith(("model.layers.0.self_attn.", "model.layers.1.self_attn.")) and shape == (1,):
            replace_tensor(copy, name, data, ())
    outcome = outcomes(copy)["SGLang 0.5.23"]
    assert (outcome.kind, outcome.partitions) == ("garbled", ("fused_qkv_a_proj.kv_a",))


@pytest.mark.parametrize("profile", ["exact", "dynamic", "portable", "bf16", "dequantized", "partition"])
def test_fp8_is_converted_for_both_names_of_the_layer(profile: str, tmp_path: Path) -> None:
    """SGLang loads what has no scale of one value there."""
    rewrite.convert(FIXTURES / FP8, tmp_path / "out", profile=profile, selection="all")
    assert rewrite.verify(FIXTURES / FP8, tmp_path / "out", device="cpu", tokens=1).ok
    loads = profile in ("dynamic", "portable", "bf16", "dequantized")
    assert (outcomes(tmp_path / "out")["SGLang 0.5.23"].kind != "fails to load") == loads
    if profile == "dynamic":
        config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
        targets = [target for group in config["config_groups"].values() for target in group["targets"]]
        assert r"re:.*self_attn\.(q_a_proj|kv_a_proj_with_mqa|fused_qkv_a_proj|fused_qkv_a_proj_with_mqa)$" in targets


@pytest.mark.parametrize("copy", [NVFP4], indirect=True)
def test_without_a_rank_of_queries_there_is_no_such_layer(copy: Path) -> None:
    """DeepSeek-V2-Lite and Moonlight: ``q_lora_rank`` is null, q has one projection and kv_a is a layer of its own."""
    edit_json(copy / "config.json", q_lora_rank=0)
    assert find_architecture(json.loads((copy / "config.json").read_text())) is not None
    layers = {group.kind for group in rewrite.inspect_checkpoint(copy, selection="all").groups}
    assert layers == {"gate_up_proj", "experts"}
