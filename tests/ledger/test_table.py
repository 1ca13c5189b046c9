"""Each format against each check: none is looked at less than another."""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Callable, Iterator
from itertools import product
from math import isnan, prod
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import rewrite
from rewrite.ledger import values
from rewrite.ledger.config import contradiction
from rewrite.ledger.formats import FORMATS, Format, Scale
from rewrite.ledger.ledger import faults
from rewrite.quantization.model import interpret
from rewrite.quantization.scheme import ScaleLayout, Scheme
from tests.support import FIXTURES, edit_json, raw_tensors, write_shard
from tests.zoo.rebuild import rebuild

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]

#: A checkpoint of each format, as a producer wrote it: a fixture, or an entry of the zoo.
SOURCES = {
    "FP8": ("llmcompressor-llama", "model.layers.0.self_attn.o_proj"),
    "FP8 by blocks": ("autoround-fp8-block-qwen3_5-text", "model.layers.0.mlp.down_proj"),
    "NVFP4 packed": ("llmcompressor-qwen3_5-nvfp4", "model.language_model.layers.0.mlp.down_proj"),
    "NVFP4": ("modelopt-qwen3_5-moe-nvfp4", "model.language_model.layers.2.self_attn.o_proj"),
    "NVFP4 experts": ("modelopt-qwen3_5-moe-nvfp4", "model.language_model.layers.1.mlp.experts.2.down_proj"),
    "MXFP4": ("llmc-mxfp4-qwen3_5-text", "model.layers.0.mlp.down_proj"),
    "INT8": ("llmc-w8a8-qwen3_5-vl", "model.language_model.layers.0.mlp.down_proj"),
    "INT4": ("llmc-w4a16-qwen3_5-text", "model.layers.0.mlp.down_proj"),
}


def source(name: str, tmp_path: Path) -> Path:
    if (FIXTURES / name).is_dir():
        return FIXTURES / name
    folder = tmp_path / name
    return folder if folder.exists() else rebuild(name, folder)


def changed(name: str, tmp_path: Path, change: Callable[[Tensors], None]) -> Path:
    """A copy in one shard, with other tensors."""
    folder = source(name, tmp_path)
    tensors = {n: (dtype, shape, raw) for n, (_, dtype, shape, raw) in raw_tensors(folder).items()}
    change(tensors)
    out = tmp_path / "changed"
    out.mkdir()
    for file in ("config.json", "hf_quant_config.json"):
        if (folder / file).exists():
            shutil.copy(folder / file, out)
    write_shard(out / "model.safetensors", tensors, format="pt")
    return out


def codes(folder: Path) -> list[str]:
    model = interpret(rewrite.open_checkpoint(folder))
    return [fault.code for fault in faults(model, model.select("all"))]


def format_of(kind: str, tmp_path: Path) -> tuple[str, str, Format]:
    """Checkpoint, module, and what its format stores."""
    name, module = SOURCES[kind]
    model = interpret(rewrite.open_checkpoint(source(name, tmp_path)))
    scheme, weight = model.module(module).scheme, model.module(module).weight
    assert scheme is not None
    (form,) = [f for f in FORMATS[scheme.format] if weight.name.rpartition(".")[2] in f.weights]
    return name, module, form


def stored(tensors: Tensors, module: str, form: Format) -> Iterator[tuple[Scale, str]]:
    """The scales of a module that are there."""
    for scale in form.scales:
        for each in scale.names:
            if f"{module}.{each}" in tensors:
                yield scale, f"{module}.{each}"


@pytest.mark.parametrize("kind", SOURCES)
def test_what_producers_write_has_no_fault(kind: str, tmp_path: Path) -> None:
    name, _ = SOURCES[kind]
    assert not [code for code in codes(source(name, tmp_path)) if code != "mtp-missing"]


@pytest.mark.parametrize("kind", SOURCES)
def test_each_scale_must_be_there(kind: str, tmp_path: Path) -> None:
    name, module, form = format_of(kind, tmp_path)
    tensors = {n: t[1:] for n, t in raw_tensors(source(name, tmp_path)).items()}
    own = list(stored(tensors, module, form))
    assert own
    for number, (scale, full) in enumerate(own):
        folder = tmp_path / str(number)
        folder.mkdir()
        found = codes(changed(name, folder, lambda t, full=full: t.__delitem__(full)))  # type: ignore[misc]
        assert ("no-input-scale" if scale.role == "input" else "no-scale") in found, full


@pytest.mark.parametrize("kind", SOURCES)
def test_each_scale_must_fit(kind: str, tmp_path: Path) -> None:
    """Another dtype, which no format has for its scales; two values of its own; rows and columns swapped."""
    name, module, form = format_of(kind, tmp_path)
    tensors = {n: t[1:] for n, t in raw_tensors(source(name, tmp_path)).items()}
    for number, (_, full) in enumerate(stored(tensors, module, form)):
        dtype, shape, raw = tensors[full]
        two = 2 * len(raw) // prod(shape)
        others = [("I64", shape, bytes(8 * prod(shape))), (dtype, (2,), (raw * 2)[:two])]
        others += [(dtype, shape[::-1], raw)] if shape != shape[::-1] else []
        for case, other in enumerate(others):
            folder = tmp_path / f"{number} {case}"
            folder.mkdir()

            def change(t: Tensors, full: str = full, other: tuple[str, tuple[int, ...], bytes] = other) -> None:
                t[full] = other

            assert "scale-shape" in codes(changed(name, folder, change)), (full, other[:2])


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("value", [float("nan"), 0.0, float("inf"), -1.0])
def test_each_scale_must_be_a_number(value: float, kind: str, tmp_path: Path) -> None:
    """Of powers of two NaN only: they have no zero and no infinity; of E4M3 no infinity; of integers any sign."""
    any_sign = kind.startswith("INT") and value < 0
    name, module, form = format_of(kind, tmp_path)
    tensors = {n: t[1:] for n, t in raw_tensors(source(name, tmp_path)).items()}
    for number, (scale, full) in enumerate(stored(tensors, module, form)):
        dtype, shape, raw = tensors[full]
        if (dtype == "U8" and not isnan(value)) or (dtype == "F8_E4M3" and value == float("inf")):
            continue
        code = {"F8_E4M3": b"\x7f" if isnan(value) else b"\xb8" if value else b"\0", "U8": b"\xff"}
        first = code.get(dtype) or struct.pack("<f", value)[2 if dtype == "BF16" else 0 :]
        folder = tmp_path / str(number)
        folder.mkdir()

        def change(t: Tensors, full: str = full, new: bytes = first + raw[len(first) :]) -> None:
            t[full] = (*t[full][:2], new)

        assert ("scale-value" in codes(changed(name, folder, change))) != any_sign, (scale.role, full, shape)


@pytest.mark.parametrize("kind", SOURCES)
def test_each_weight_must_be_what_the_config_says(kind: str, tmp_path: Path) -> None:
    """Weights of another dtype; plain ones; and none at all."""
    name, module, form = format_of(kind, tmp_path)
    full = next(
        f"{module}.{each}" for each in form.weights if f"{module}.{each}" in raw_tensors(source(name, tmp_path))
    )

    def other(t: Tensors) -> None:
        t[full] = ("I16", t[full][1], bytes(2 * prod(t[full][1])))

    def plain(t: Tensors) -> None:
        for key in [key for key in t if key.startswith(f"{module}.")]:
            del t[key]
        t[f"{module}.weight"] = ("BF16", (64, 64), bytes(64 * 64 * 2))

    def none(t: Tensors) -> None:
        del t[full]

    for number, (change, code) in enumerate(((other, "label"), (plain, "plain-layer"), (none, "orphan-scale"))):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert code in codes(changed(name, folder, change)), code


@pytest.mark.parametrize("kind", ["NVFP4 packed", "MXFP4"])
def test_codes_by_the_name_that_modelopt_has_for_them(kind: str, tmp_path: Path) -> None:
    name, module, _ = format_of(kind, tmp_path)
    folder = changed(name, tmp_path, lambda t: t.update({f"{module}.weight": t.pop(f"{module}.weight_packed")}))
    assert set(codes(folder)) - {"no-role"} == {"label"}


@pytest.mark.parametrize("kind", ["NVFP4 packed", "NVFP4", "NVFP4 experts"])
@pytest.mark.parametrize("role", ["global", "input"])
def test_the_reciprocal_of_a_global_scale(role: str, kind: str, tmp_path: Path) -> None:
    """Divisors in ModelOpt's dialect, multipliers in compressed-tensors': weights are off by 1e8."""
    name, module, form = format_of(kind, tmp_path)
    (scale,) = [scale for scale in form.scales if scale.role == role]
    full = f"{module}.{scale.names[0]}"

    def change(t: Tensors) -> None:
        (value,) = struct.unpack("<f", t[full][2])
        t[full] = (*t[full][:2], struct.pack("<f", 1 / value))

    assert codes(changed(name, tmp_path, change)) == ["scale-inverse"]


def test_a_scale_that_is_far_from_its_neighbors(tmp_path: Path) -> None:
    """A thousand times as large as in the layers that are alike; a layer of zeros may have any."""
    name = "modelopt-qwen3_5-moe"
    module = "model.language_model.layers.1.mlp.experts.2.down_proj"

    def larger(t: Tensors, factor: float = 1000) -> None:
        (value,) = struct.unpack("<f", t[f"{module}.weight_scale"][2])
        t[f"{module}.weight_scale"] = ("F32", (), struct.pack("<f", value * factor))

    def smaller(t: Tensors) -> None:
        larger(t, 1e-4)

    def empty(t: Tensors) -> None:
        smaller(t)
        t[f"{module}.weight"] = (*t[f"{module}.weight"][:2], bytes(len(t[f"{module}.weight"][2])))

    def more(t: Tensors) -> None:  # whatever their order
        empty(t)
        for other in ("experts.0", "experts.3"):
            t[f"{module.replace('experts.2', other)}.weight_scale"] = ("F32", (), struct.pack("<f", 10))

    changes: tuple[tuple[Callable[[Tensors], None], list[str]], ...]
    changes = ((larger, ["scale-size"]), (smaller, ["scale-size"]), (empty, []), (more, ["scale-size"] * 2))
    for number, (change, found) in enumerate(changes):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert codes(changed(name, folder, change)) == found


def test_activations_of_layers_that_are_alike_may_differ(tmp_path: Path) -> None:
    """By thousands: only scales of weights are held to their neighbors."""

    def change(t: Tensors) -> None:
        for layer in range(2, 6):
            t.update({name.replace(".1.", f".{layer}."): t[name] for name in t if ".layers.1." in name})
        t["model.layers.3.self_attn.o_proj.input_scale"] = ("F32", (1,), struct.pack("<f", 30))

    folder = changed("llmcompressor-llama", tmp_path, change)
    edit_json(folder / "config.json", num_hidden_layers=6)
    assert codes(folder) == []


@pytest.mark.parametrize(("layers", "found"), [(4, []), (5, ["scale-size"])])
def test_a_few_neighbors_do_not_say_what_is_usual(layers: int, found: list[str], tmp_path: Path) -> None:
    module = "model.layers.{}.self_attn.o_proj"

    def change(t: Tensors) -> None:
        for name in [name for name in t if ".layers.1." in name]:
            t.update({name.replace(".1.", f".{layer}."): t[name] for layer in range(2, layers)})
        t[f"{module.format(1)}.weight_scale"] = ("F32", (1,), struct.pack("<f", 30))
        first: Tensors = {f"a.{i}.prob_scale": ("F32", (3,), struct.pack("<3f", 0.01, 0.01, 0.01)) for i in range(3)}
        for name in [name for name in t if name not in first]:  # scales of several numbers before those of one
            first[name] = t.pop(name)
        t.update(first)

    folder = changed("llmcompressor-llama", tmp_path, change)
    edit_json(folder / "config.json", num_hidden_layers=layers)
    assert codes(folder) == found


_BLOCK = (128, 128)


@pytest.mark.parametrize(
    ("layout", "block", "fitting"),
    [
        ("tensor", None, {(), (1,)}),
        ("channel", None, {(256, 1)}),
        ("rows", None, {(256,)}),
        ("block", _BLOCK, {(2, 4), (256, 1)}),
        ("block", None, {(2, 4), (4, 2), (256, 1), (1, 1), (256, 4)}),
        (None, None, {(), (1,), (256,), (256, 1), (2, 4), (4, 2), (1, 1), (2,), (256, 4)}),
    ],
)
def test_which_scales_fit_an_fp8_weight(
    layout: ScaleLayout | None, block: tuple[int, int] | None, fitting: set[tuple[int, ...]]
) -> None:
    """Of 256 rows and 500 columns."""
    shapes: list[tuple[int, ...]] = [(), (1,), (256,), (256, 1), (2, 4), (4, 2), (1, 1), (2,), (256, 4)]
    scheme = Scheme("FP8", layout, "static", "", block=block)
    (scale,) = [scale for scale in FORMATS["FP8"][0].scales if scale.role == "weight"]
    assert {shape for shape in shapes if scale.fits(shape, (256, 500), scheme)} == fitting


@pytest.mark.parametrize("padded", [0, 3, 511])
@pytest.mark.parametrize("zero", [0, 3, 511])
def test_blocks_of_zeros_may_have_a_scale_of_zero(zero: int, padded: int, tmp_path: Path) -> None:
    """Where their own codes are zero, too: a matrix that was padded."""
    name, module, _ = format_of("NVFP4", tmp_path)

    def change(t: Tensors) -> None:
        scale, weight = t[f"{module}.weight_scale"], t[f"{module}.weight"]
        t[f"{module}.weight_scale"] = (*scale[:2], scale[2][:zero] + b"\x80" + scale[2][zero + 1 :])
        codes = weight[2][: padded * 8] + b"\0\x08\x80\x88" * 2 + weight[2][padded * 8 + 8 :]
        t[f"{module}.weight"] = (*weight[:2], codes)

    assert codes(changed(name, tmp_path, change)) == ([] if zero == padded else ["scale-value"])


def test_block_scales_of_zero_without_their_weight(tmp_path: Path) -> None:
    """Nobody knows what they would scale: what is said is that the weight is gone."""
    name, module, _ = format_of("NVFP4", tmp_path)

    def change(t: Tensors) -> None:
        del t[f"{module}.weight"]
        t[f"{module}.weight_scale"] = (*t[f"{module}.weight_scale"][:2], bytes(512))

    assert set(codes(changed(name, tmp_path, change))) == {"orphan-scale"}


def test_block_scales_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte of them once, and no byte of the tensor behind them."""
    name, module, _ = format_of("NVFP4", tmp_path)
    monkeypatch.setattr(values, "_MAX_RUN", 96)
    found = []
    for at in (0, 95, 96, 511):
        folder = tmp_path / str(at)
        folder.mkdir()

        def change(t: Tensors, at: int = at) -> None:
            dtype, shape, raw = t[f"{module}.weight_scale"]
            t[f"{module}.weight_scale"] = (dtype, shape, raw[:at] + b"\x7f" + raw[at + 1 :])
            t[f"{module}.weight_scales"] = ("U8", (4096,), b"\xff" * 4096)

        model = interpret(rewrite.open_checkpoint(changed(name, folder, change)))
        found += [fault.what for fault in faults(model) if fault.code == "scale-value"]
    assert found == ["a scale of NaN"] * 4


def test_a_part_of_the_block_scales_is_said_to_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than are read of any checkpoint: of each its beginning, and 16 of them at least."""
    name, module, _ = format_of("NVFP4", tmp_path)
    monkeypatch.setattr(values, "_REMOTE_BYTES", 1 << 20)
    infos = rewrite.open_checkpoint(source(name, tmp_path)).tensors_like(values._is_block)
    whole = sum(info.nbytes for info in infos)
    cases = ((100, 15, ["scale-value", "block-sample"]), (100, 16, ["block-sample"]), (whole, 511, ["scale-value"]))
    for budget, at, found in cases:
        monkeypatch.setattr(values, "_BLOCK_BYTES", budget)
        folder = tmp_path / str(at)
        folder.mkdir()

        def change(t: Tensors, at: int = at) -> None:
            dtype, shape, raw = t[f"{module}.weight_scale"]
            t[f"{module}.weight_scale"] = (dtype, shape, raw[:at] + b"\x7f" + raw[at + 1 :])

        assert codes(changed(name, folder, change)) == found


@pytest.mark.parametrize("strategy", [None, "tensor", "channel", "group", "block", "token", "tensor_group"])
def test_arguments_that_compressed_tensors_does_not_read(strategy: str | None) -> None:
    """As its own class has it."""
    from compressed_tensors.quantization import QuantizationArgs

    for size, dynamic, blocks in product((None, -1, 0, 16), (False, True, "local"), (None, [128, 128])):
        stated = {"strategy": strategy, "group_size": size, "dynamic": dynamic, "block_structure": blocks}
        try:
            QuantizationArgs.model_validate({"num_bits": 8, "type": "float", **stated})
            is_read = True
        except ValueError:
            is_read = False
        assert (contradiction(stated) is None) == is_read, stated


def test_a_config_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    """Seen: vLLM 0.32.0, SGLang 0.5.23 and transformers 5.24.0 end with a ValidationError; convert wrote it again."""
    folder = tmp_path / "in"
    shutil.copytree(FIXTURES / "llmcompressor-qwen3_5-nvfp4", folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["strategy"] = "channel"
    (folder / "config.json").write_text(json.dumps(config))
    assert "arguments" in codes(folder)
    with pytest.raises(rewrite.Refused, match="contradicts itself"):
        rewrite.convert(folder, tmp_path / "out", profile="rescaled", selection="all")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_scale_that_is_no_number_is_refused_by_what_keeps_it(value: float, tmp_path: Path) -> None:
    """`portable` leaves scales of rows as they are. Seen: exit 0, "exact" promised, and verify failed OUT. Neither a
    zero before it nor the name of its shard hides it."""
    source = tmp_path / "in"
    shutil.copytree(FIXTURES / "llmcompressor-llama", tmp_path / "tensor")
    rewrite.convert(tmp_path / "tensor", source, profile="exact", selection="all")
    shard, name = next(
        (s, n) for s in source.glob("*.safetensors") for n in load_file(s) if "up_proj.weight_scale" in n
    )
    tensors = load_file(shard)
    tensors[name][2], tensors[name][3] = 0.0, value
    save_file(tensors, shard, {"format": "pt"})
    shard.rename(source / "model.visual.safetensors")
    index = json.loads((source / "model.safetensors.index.json").read_text())
    places = {n: "model.visual.safetensors" if s == shard.name else s for n, s in index["weight_map"].items()}
    (source / "model.safetensors.index.json").write_text(json.dumps({**index, "weight_map": places}))
    inspection = rewrite.inspect_checkpoint(source, selection="all")
    assert "portable" in inspection.refusals
    with pytest.raises(rewrite.Refused, match="no number"):
        rewrite.convert(source, tmp_path / "out", profile="portable", selection="all")


def test_a_scale_that_is_no_number_has_another_name_in_out(tmp_path: Path) -> None:
    """Those of a KV cache are renamed where ModelOpt's config is restated; --kv-scales drop leaves them out."""
    source = tmp_path / "in"
    shutil.copytree(FIXTURES / "modelopt-llama", source)
    (shard,) = source.glob("*.safetensors")
    tensors = load_file(shard)
    tensors["model.layers.0.self_attn.k_proj.k_scale"].fill_(math.nan)
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(rewrite.Refused, match="no number"):
        rewrite.convert(source, tmp_path / "out", profile="exact", selection="all")
    assert rewrite.convert(source, tmp_path / "out", profile="exact", selection="all", kv_scales="drop").changed


def test_a_trained_parameter_is_no_scale(tmp_path: Path) -> None:
    """Gemma 4 has ``router.per_expert_scale``; a value of it below 0 was "a scale that is probably wrong"."""
    name, _, _ = format_of("FP8", tmp_path)
    scale = ("F32", (2,), struct.pack("<2f", -0.1, 0.0))
    assert codes(changed(name, tmp_path, lambda t: t.update({"model.layers.0.router.per_expert_scale": scale}))) == []


def test_every_code_is_in_the_json_of_inspect(tmp_path: Path) -> None:
    """Programs go by the code."""
    name, module, _ = format_of("FP8", tmp_path)
    found = rewrite.inspect_checkpoint(changed(name, tmp_path, lambda t: t.__delitem__(f"{module}.weight_scale")))
    (fault,) = json.loads(json.dumps(found.to_json()))["findings"]
    assert (fault["code"], fault["severity"], fault["count"]) == ("no-scale", "garbled", 1)
    assert fault["where"] == module and fault["expected"] and fault["next"] and fault["what"]
