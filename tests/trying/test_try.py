"""`rewrite try` with a fake engine: the same driver, and loaders with known faults."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from rewrite import schemas
from rewrite.api import open_checkpoint
from rewrite.cli.commands import main
from rewrite.errors import UsageError
from rewrite.trying import driver, engine, selection, tried, verdict
from rewrite.trying.engine import EngineError
from tests.support import unfolded
from tests.trying import fake

K = "model.layers.0.attn.k_proj"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return fake.write(tmp_path / "fake")


def result_of(folder: Path, fault: str = "", *, recorded: bool = True, **request: Any) -> dict[str, Any]:
    """What the driver answers when its only engine is the fake one."""
    kind = type("Faulty", (fake.FakeEngine,), {"fault": fault, "recorded": recorded})
    known = dict(driver.ENGINES)
    driver.ENGINES.clear()
    driver.ENGINES["json"] = kind
    try:
        found = driver.answer({"checkpoint": str(folder), **request}, lambda _: None)
    finally:
        driver.ENGINES.clear()
        driver.ENGINES.update(known)
    return json.loads(json.dumps(found, allow_nan=False))  # type: ignore[no-any-return]


def run(monkeypatch: pytest.MonkeyPatch, *words: str | Path, fault: str = "") -> Result:
    """The command, with the driver in this process."""
    monkeypatch.setattr(
        engine, "ask", lambda _, request, __: result_of(Path(request["checkpoint"]), fault, **{
            key: value for key, value in request.items() if key != "checkpoint"
        })
    )  # fmt: skip
    return CliRunner().invoke(main, ["try", *map(str, words)])


def test_a_sound_engine_is_exact(checkpoint: Path) -> None:
    result = result_of(checkpoint)
    assert verdict.judge(result).kind == "exact"
    assert not result["unused"] and not result["unfilled"] and not result["twice"]
    rows = [row for row in result["layers"] if row["judged"]]
    assert [part["rows"] for part in rows[0]["parts"]] == [[0, 8], [8, 16], [16, 24]]


@pytest.mark.parametrize("recorded", [True, False])
def test_rows_are_judged_by_their_shares(checkpoint: Path, recorded: bool) -> None:
    """Where all of a tensor lies in one region: each share of it has an error of its own."""
    last = "k_proj" if recorded else "qkv_proj"
    rows = result_of(checkpoint, "doubled", recorded=recorded, cuts={last: [1, 2, 1]})["layers"]
    parts = next(row["parts"] for row in rows if row["parameter"] == "weight" and "attn" in row["module"])
    shown = {tuple(part["rows"]): round(part["error"], 6) for part in parts}
    if recorded:  # k is twice as large, whatever its share
        assert shown == {(0, 8): 0, (8, 10): 1, (10, 14): 1, (14, 16): 1, (16, 24): 0}
    else:  # k has a third of the rows
        assert list(shown) == [(0, 6), (6, 18), (18, 24)]
        assert shown[0, 6] == shown[18, 24] == 0 < shown[6, 18]


def test_a_conversion_can_be_held_to_what_it_was_made_of(checkpoint: Path, tmp_path: Path) -> None:
    """A scale that was doubled before it was stored is loaded exactly, and is not what the original says."""
    shutil.copytree(checkpoint, tmp_path / "out")
    fake.change(tmp_path / "out", lambda tensors: tensors.update({f"{K}.weight_scale": torch.tensor(1.0)}))
    assert verdict.judge(result_of(tmp_path / "out")).kind == "exact"
    found = verdict.judge(result_of(tmp_path / "out", truth=str(checkpoint)))
    assert found.kind == "garbled"
    assert {layer.tensor for layer in found.layers if layer.kind == "garbled"} == {f"{K}.weight"}


def test_what_a_loader_does_in_threads_is_seen(checkpoint: Path) -> None:
    """A recorder is one thread's: DeepSeek in SGLang gave no layer at all."""
    result = result_of(checkpoint, "in threads")
    assert verdict.judge(result).kind == "exact"
    assert len([row for row in result["layers"] if row["judged"]]) == 2


def test_scales_of_caches_are_told(checkpoint: Path) -> None:
    assert result_of(checkpoint)["cache"] == {f"layers.{n}.attn": {"k": 0.5} for n in range(2)}


@pytest.mark.parametrize(
    ("name", "stated"),
    [
        ("attn.k_scale", {"k": 0.25}),
        ("attn.v_proj.v_scale", {"v": 0.25}),
        ("attn.k_proj.output_scale", {"k": 0.25}),
        ("attn.kv_scale", {"k": 0.25, "v": 0.25}),
        ("attn.q_scale", {}),
        ("mlp.k_scale", {}),
    ],
)
def test_scales_of_caches_are_those_of_the_files(checkpoint: Path, name: str, stated: dict[str, float]) -> None:
    """The engine holds 0.5 for keys, and nothing for values."""
    result = result_of(checkpoint)
    fake.change(checkpoint, lambda tensors: tensors.update({f"layers.0.{name}": torch.tensor(0.25)}))
    result["stated_cache"] = driver.Checkpoint(checkpoint).cache_scales()
    assert result["stated_cache"] == ({"0": stated} if stated else {})
    found = verdict.judge(result)
    assert found.kind == "exact"
    assert found.cache == (("layer 0, keys by 0.5, the files say 0.25",) if "k" in stated else ())
    result["stated_cache"] = {"0": dict.fromkeys(stated, 0.5)}
    assert verdict.judge(result).cache == ()


@pytest.mark.parametrize(
    ("fault", "kind", "tensor", "reason"),
    [
        ("slot 0 only", "never filled", "k_proj", "2 of 3 elements of weight_scale never filled"),
        ("dropped", "never filled", "k_proj", "k_proj.weight_scale was never used"),
        ("doubled", "garbled", "k_proj", ""),
        ("swapped", "garbled", "_proj", ""),
        ("half the input scale", "loses precision", "_proj", "quantized by 0.25, the files say 0.5"),
    ],
)
def test_faults_of_a_loader_are_named(checkpoint: Path, fault: str, kind: str, tensor: str, reason: str) -> None:
    found = verdict.judge(result_of(checkpoint, fault))
    assert found.kind == kind and found.exit_code == 1
    layer = found.layers[0]
    assert tensor in str(layer.tensor)
    assert reason in "; ".join(layer.reasons)


def test_a_doubled_scale_is_off_by_its_own_size(checkpoint: Path) -> None:
    parts = result_of(checkpoint, "doubled")["layers"][0]["parts"]
    assert [(part["tensor"].split(".")[-2], part["error"]) for part in parts] == [
        ("q_proj", 0.0), ("k_proj", 1.0), ("v_proj", 0.0),
    ]  # fmt: skip


def _rename(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{K}.weight_scales"] = tensors.pop(f"{K}.weight_scale")


def _reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{K}.weight_scale"] = torch.ones(3)


@pytest.mark.parametrize(
    ("edit", "kind", "says"),
    [
        (lambda tensors: tensors.pop(f"{K}.weight_scale"), "not known", f"{K}.weight: FP8 codes without a scale"),
        (_rename, "not known", f"{K}.weight: FP8 codes without a scale"),
        (_reshape, "fails to load", "expected one value, found [3]"),
    ],
)
def test_mutations_of_a_checkpoint(checkpoint: Path, edit: Callable[[Any], Any], kind: str, says: str) -> None:
    """No false "exact": what the files do not say can't be served right, whatever the engine does."""
    fake.change(checkpoint, edit)
    found = verdict.judge(result_of(checkpoint))
    assert found.exit_code != 0
    assert kind in {found.kind, *(("not known",) if found.unlearnt else ())}
    assert says in " ".join([*found.unlearnt, str((found.failure or {}).get("message"))])


@pytest.mark.parametrize(
    ("lost", "empty"),
    [
        ("layers.1.", ["layers.1.attn.qkv_proj.weight", "layers.1.norm.weight"]),
        ("layers.0.norm", ["layers.0.norm.weight"]),
        (f"{K}.", ["layers.0.attn.qkv_proj.weight"]),
    ],
)
def test_what_the_files_have_nothing_for_is_never_filled(checkpoint: Path, lost: str, empty: list[str]) -> None:
    """A server is green with such a layer, and no tensor that is there says so. Without a recorder the engine's own
    list of what it missed is taken."""

    def lose(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if lost in name]:
            del tensors[name]

    fake.change(checkpoint, lose)
    found = verdict.judge(result := result_of(checkpoint))
    assert (found.kind, list(found.empty), found.exit_code) == ("never filled", empty, 1)
    trial = tried.Trial(str(checkpoint), 0, None, result, found)
    # Seen: "agrees: it predicts 'loses precision'", and "Repaired by" a conversion that cannot make up a tensor.
    agreed = {
        kind: tried.Tried((trial,), predicted=kind).agrees for kind in ("loses precision", "garbled", "not known")
    }
    assert agreed == {"loses precision": False, "garbled": True, "not known": None}
    assert tried.lacking((trial,))


@pytest.mark.parametrize(
    ("seen", "said"),
    [
        ("exact", "exact"),
        ("rounded", "exact"),
        ("loses precision", "loses precision"),
        ("garbled", "garbled"),
        ("fails to load", "fails to load"),
    ],
)
def test_inspect_agrees_in_kind(checkpoint: Path, seen: str, said: str) -> None:
    """Seen: "agrees: it predicts 'loses precision'" of layers that were garbled."""
    result = result_of(checkpoint)
    trial = tried.Trial(str(checkpoint), 0, None, result, verdict.Verdict(seen, (), ()))
    kinds = ("exact", "loses precision", "garbled", "fails to load")
    assert [kind for kind in kinds if tried.Tried((trial,), predicted=kind).agrees] == [said]


@pytest.mark.parametrize(
    ("empty", "alarms"),
    [
        (["visual.extra.0.norm.weight", "visual.extra.1.norm.weight"], False),  # SGLang builds them for no family
        (["layers.1.norm.weight", "layers.1.attn.q.weight"], True),
        (["layers.0.norm.weight", "layers.1.norm.weight"], True),
        (["lm_head.weight"], True),
    ],
)
def test_modules_that_a_model_does_not_have_are_no_alarm(empty: list[str], alarms: bool) -> None:
    names = [f"layers.{n}.{part}.weight" for n in (0, 1) for part in ("norm", "attn.q")]
    names += ["visual.extra.0.norm.weight", "visual.extra.1.norm.weight"]
    names += ["visual.merger.weight", "norm.weight", "lm_head.weight"]
    found = driver._with_neighbors(dict.fromkeys(empty, (1, 1)), names)
    assert list(found) == (empty if alarms else [])


@pytest.mark.parametrize(
    ("served", "held", "kind"),
    [
        (0.25, "float8_e4m3fn", "exact"),
        (4.0, "float8_e4m3fn", "loses precision"),
        (4.0, "nvfp4", "exact"),  # vLLM 0.32 keeps the divisors of experts in w13_input_scale
        (2.0, "nvfp4", "loses precision"),
    ],
)
def test_an_input_scale_of_nvfp4_may_be_kept_as_its_divisor(
    checkpoint: Path, served: float, held: str, kind: str
) -> None:
    result = result_of(checkpoint)
    for row in result["layers"]:
        row |= {"held": held, "input_scale": {"stated": 0.25, "served": [served, served]}}
    assert verdict.judge(result).kind == kind


def test_what_is_never_filled_is_named(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.change(checkpoint, lambda tensors: tensors.pop("model.layers.0.norm.weight"))
    done = run(monkeypatch, checkpoint)
    assert done.exit_code == 1
    assert "nothing, or not enough, for layers.0.norm.weight: the engine never fills it." in unfolded(done.output)


def test_a_model_of_transformers_that_lacks_a_tensor(tmp_path: Path) -> None:
    """Its own list says so: it fills such parameters with random numbers."""
    source, lost = (
        Path(__file__).parents[1] / "fixtures" / "llmcompressor-llama",
        "model.layers.1.input_layernorm.weight",
    )
    tensors = {name: t for shard in source.glob("*.safetensors") for name, t in load_file(shard).items()}
    del tensors[lost]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    shutil.copy(source / "config.json", tmp_path)
    model = driver.Transformers({}).load(tmp_path, "float32", None, finish=False)
    assert dict(model.empty()) == {lost: (64, 64)}


def test_refusal_missing_kernel_and_no_start_are_three_things(checkpoint: Path) -> None:
    refused = verdict.judge(result_of(checkpoint, "raises"))
    assert (refused.kind, refused.exit_code) == ("fails to load", 1)
    for fault, what in (
        ("kernel", "no kernel for this checkpoint"),
        ("does not start", "did not start"),
        ("unknown model", "without quantization either"),
        ("unknown version", "has not what is needed"),
    ):
        with pytest.raises(EngineError, match=what) as error:
            verdict.judge(result_of(checkpoint, fault))
        assert error.value.exit_code == 4


def test_no_scheme_for_a_config_is_no_missing_kernel() -> None:
    """No card has one for FP8 of ``symmetric: false``; vLLM 0.32.0 and SGLang 0.5.23 raise NotImplementedError."""
    scheme = "No compressed-tensors compatible scheme was found for layer_name='model.layers.0.self_attn.qkv_proj'"
    assert not verdict.lacks_kernel({"type": "NotImplementedError", "message": scheme})
    assert verdict.lacks_kernel({"type": "NotImplementedError", "message": "Sparse Attention is not supported on CPU."})


def test_what_an_engine_merged_unseen_is_judged(checkpoint: Path) -> None:
    """Without a recorder, nothing says which tensors a merged matrix is of: it may be of quantized ones."""
    assert verdict.judge(result_of(checkpoint, recorded=False)).kind == "exact"
    assert verdict.judge(result_of(checkpoint, "doubled", recorded=False)).kind == "garbled"


def test_what_the_files_do_not_explain_is_compared_with_nothing(checkpoint: Path) -> None:
    """Without a recorder, nothing says that a parameter of the reference was left as it was made."""
    fake.change(checkpoint, lambda tensors: tensors.pop(f"{K}.weight_scale"))
    found = verdict.judge(result_of(checkpoint, recorded=False))
    assert (found.kind, found.layers, found.exit_code) == ("not known", (), 4)


def _dequantize(tensors: dict[str, torch.Tensor]) -> None:
    for part in fake.PARTS:
        stem = f"model.layers.0.attn.{part}_proj"
        tensors[f"{stem}.weight"] = tensors[f"{stem}.weight"].to(torch.bfloat16)
        del tensors[f"{stem}.weight_scale"], tensors[f"{stem}.input_scale"]


def test_what_the_engine_quantizes_and_the_files_do_not_is_judged(checkpoint: Path) -> None:
    fake.change(checkpoint, _dequantize)
    found = verdict.judge(result_of(checkpoint))
    assert found.kind in ("garbled", "never filled") and found.exit_code == 1
    assert found.layers[0].reasons[0] == "the files do not quantize it, the engine does"


def test_paths_of_this_machine_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "loader.py").write_text("def load():\n    raise ValueError('bad')\n")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        driver.module("engine.loader").load()
    except ValueError as error:
        assert driver.described(error)["where"][-1] == "engine/loader.py:2 load"
    else:
        pytest.fail("it raises")


def test_on_a_gpu_a_missing_kernel_is_an_answer(checkpoint: Path) -> None:
    found = verdict.judge(result_of(checkpoint, "kernel") | {"gpu": True})
    assert (found.kind, found.exit_code) == ("cannot compute here", 1)


def test_only_the_chosen_layers_are_loaded(checkpoint: Path) -> None:
    result = result_of(checkpoint, stack="model.layers", runs=[[1, 1]])
    assert {row["module"] for row in result["layers"]} == {"layers.1.attn.qkv_proj", "layers.1.norm"}
    assert verdict.judge(result).kind == "exact"


def with_words(folder: Path, **tensors: torch.Tensor) -> Path:
    """The checkpoint with an output head of 3000 words."""
    head = {"lm_head.weight": torch.randn(3000, 16).to(torch.bfloat16)} | {
        f"lm_head.{name}": tensor for name, tensor in tensors.items()
    }
    fake.change(folder, lambda held: held.update(head))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"text_config": {"vocab_size": 3000}}))
    return folder


@pytest.fixture
def large(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(driver, "LARGE", 3000 * 16)
    return with_words(checkpoint)


def test_of_a_large_vocabulary_the_first_words_are_loaded(large: Path) -> None:
    """It was loaded whole, for every run of layers: gigabytes, of which nothing was learnt."""
    result = result_of(large, stack="model.layers", runs=[[0, 0], [1, 1]])
    heads = [row for row in result["layers"] if row["module"] == "lm_head"]
    assert [head["shape"] for head in heads] == [[driver.WORDS, 16]] * 2
    assert heads[0]["parts"] == [{"tensor": "lm_head.weight", "rows": [0, driver.WORDS], "error": 0.0}]
    assert verdict.judge(result).kind == "exact"
    assert "lm_head" not in {row["module"] for row in result_of(large)["layers"]}  # all at once: as it lies there


def test_how_many_words_were_loaded_is_said(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "1 of 2 layers, 1,024 of 3,000 words" in unfolded(run(monkeypatch, large, "--layers", "1").stdout)
    document = json.loads(run(monkeypatch, large, "--layers", "1", "--json", "--quiet").stdout)
    jsonschema.validate(document, schemas.schema("try"), jsonschema.Draft202012Validator)
    assert document["trials"][0]["words"] == [driver.WORDS, 3000]


def test_an_engine_that_needs_all_words_gets_them(large: Path) -> None:
    result = result_of(large, "needs all words", stack="model.layers", runs=[[1, 1]])
    assert verdict.judge(result).kind == "exact"
    assert result_of(large, "raises", stack="model.layers", runs=[[1, 1]])["failure"]["loading"]


@pytest.mark.parametrize("rows", [3000, -(-3000 // 128)])
def test_the_scales_of_words_are_cut_with_them(large: Path, rows: int) -> None:
    def quantize(held: dict[str, torch.Tensor]) -> None:
        held["lm_head.weight"] = held["lm_head.weight"].to(torch.float8_e4m3fn)
        held["lm_head.weight_scale"] = torch.rand(rows, 1)

    fake.change(large, quantize)
    config = json.loads((large / "config.json").read_text())
    blocks = {"weight_block_size": [128, 128]} if rows < 3000 else {}
    (large / "config.json").write_text(json.dumps(config | {"quantization_config": blocks}))
    whole = dict(driver.Checkpoint(large).plain(whole=True))["lm_head.weight"]
    cut = driver.Checkpoint(large, cut=True)
    assert torch.equal(dict(cut.plain(whole=False))["lm_head.weight"], whole[: driver.WORDS])
    assert not cut.meaningless


def test_the_command(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done = run(monkeypatch, checkpoint, "--layers", "all")
    assert done.exit_code == 0, done.output
    assert "Fake 1.0 on" in done.stdout and unfolded(done.stdout).endswith("in Fake 1.0: exact")
    report = tmp_path / "record.json"
    done = run(monkeypatch, checkpoint, "--json", "--quiet", "--report", report, fault="slot 0 only")
    assert done.exit_code == 1
    document = json.loads(done.stdout)
    jsonschema.validate(document, schemas.schema("try"), jsonschema.Draft202012Validator)
    assert json.loads(report.read_text()) == document
    assert str(tmp_path) not in done.stdout
    done = run(monkeypatch, checkpoint, fault="does not start")
    assert done.exit_code == 4 and "libcudart" in done.stderr
    done = run(monkeypatch, checkpoint, fault="raises")
    assert done.exit_code == 1 and "fails to load while reading weights: ValueError" in done.stdout


def test_usage(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, checkpoint, "--engine", "a", "--engine-command", "b").exit_code == 2
    assert run(monkeypatch, checkpoint, "--layers", "7").exit_code == 2
    assert run(monkeypatch, checkpoint, "--layers", "x").exit_code == 2
    with pytest.raises(UsageError):
        engine.command_of(None, "'", Path("x"))


def test_the_engine_command_gets_the_directory() -> None:
    found = engine.command_of(None, "docker run -v {checkpoint}:{checkpoint}:ro image python3", Path("a b"))
    assert found == ["docker", "run", "-v", "a b:a b:ro", "image", "python3"]


def test_a_python_that_dies_or_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="ended without a result"):
        engine.ask([sys.executable, "-c", "import sys; sys.exit('out of memory')"], {}, lambda _: None)
    with pytest.raises(EngineError, match="does not start"):
        engine.ask([str(tmp_path / "python")], {}, lambda _: None)


def test_the_driver_runs_as_one_argument(checkpoint: Path) -> None:
    """In a Python of its own, as it is sent; an engine that is not installed is said to be so."""
    steps: list[str] = []
    result = engine.ask([sys.executable], {"checkpoint": str(checkpoint), "using": "sglang"}, steps.append)
    with pytest.raises(EngineError, match="did not start") as error:
        verdict.judge(result)
    assert "sglang is not installed" in str(error.value)


class Toy(torch.nn.Module):
    """Loaders of the kinds that engines have."""

    cast: torch.nn.Parameter
    given: torch.nn.Parameter
    twice: torch.nn.Parameter
    joined: torch.nn.Parameter
    experts: torch.nn.Parameter

    def __init__(self) -> None:
        super().__init__()
        for name, shape in {
            "cast": (4, 4),
            "given": (3, 3),
            "twice": (4,),
            "joined": (6, 2),
            "experts": (2, 8, 4),
        }.items():
            dtype = torch.bfloat16 if name == "cast" else torch.float32
            self.register_parameter(name, torch.nn.Parameter(torch.empty(shape, dtype=dtype)))

    def load_weights(self, weights: Any) -> None:
        held = []
        for name, tensor in weights:
            if name == "cast":
                self.cast.data.copy_(tensor.to(torch.bfloat16) * 1)  # through temporaries
            if name == "given":
                self.given.data = tensor
            if name == "twice":
                self.twice.data.copy_(tensor)
                self.twice.data[1:3] = tensor[:2]
            if name.startswith("e"):
                self.experts.data[int(name[1]), :4].copy_(tensor.t())
            if name in ("j0", "j1"):
                held.append(tensor)
                if len(held) == 2:
                    self.joined.data.copy_(torch.cat(held))


def test_the_recorder_sees_through_any_loader() -> None:
    toy = Toy()
    recorder = driver.Recorder(toy)
    weights = {
        "cast": torch.ones(4, 4), "given": torch.ones(3, 3), "twice": torch.ones(4), "e0": torch.ones(4, 4),
        "e1": torch.ones(4, 4), "j0": torch.ones(3, 2), "j1": torch.zeros(3, 2), "lost": torch.ones(2),
    }  # fmt: skip
    with recorder:
        toy.load_weights(recorder.watch(weights.items()))
    recorder.finish()
    assert set(weights) - recorder.used == {"lost"}
    assert recorder.coverage["cast"] == (0, 0, 16)
    assert recorder.coverage["twice"] == (0, 2, 4)
    assert recorder.coverage["experts"] == (32, 0, 64)
    assert recorder.coverage["joined"][0] == 0
    assert {name for names, _ in recorder.writes["joined"] for name in names} == {"j0", "j1"}


class InThreads(torch.nn.Module):
    """As SGLang loads DeepSeek."""

    def __init__(self) -> None:
        super().__init__()
        self.held = torch.nn.Parameter(torch.zeros(4), requires_grad=False)

    def load_weights(self, weights: Any) -> None:
        with ThreadPoolExecutor() as pool:
            for each in [pool.submit(self.held.copy_, tensor) for _, tensor in weights]:
                each.result()


def test_the_recorder_sees_what_is_loaded_in_threads() -> None:
    model, into = InThreads(), list[driver.Recorder]()
    with driver.Transformers({}).watched(model, None, into):
        model.load_weights([("stored", torch.ones(4))])
    assert into[0].used == {"stored"}


def test_dequantizing() -> None:
    codes = torch.tensor([[0x21] * 8], dtype=torch.uint8)  # 0.5, 1.0, ...
    weight = driver.fp4(codes, torch.tensor([[2.0]]), torch.tensor(0.25))
    assert weight.tolist() == [[0.25, 0.5] * 8]
    blocks = driver.spread(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), (3, 3), (2, 2))
    assert blocks.tolist() == [[1.0, 1.0, 2.0], [1.0, 1.0, 2.0], [3.0, 3.0, 4.0]]
    with pytest.raises(ValueError, match="a scale of shape"):
        driver.spread(torch.ones(5), (4, 4), None)
    assert driver.number(math.nan) == "nan"


def test_formats_with_a_scale_for_each_group(tmp_path: Path) -> None:
    """INT4, MXFP4 and MXFP8: what lies there and what an engine holds, by columns, too."""
    codes = torch.arange(64, dtype=torch.int32).reshape(1, 8, 8) % 16
    packed = (codes << torch.arange(0, 32, 4, dtype=torch.int32)).sum(2, dtype=torch.int32)
    halves = torch.tensor([[0x21, 0x9A] * 16], dtype=torch.uint8)  # 0.5, 1, -1, -0.5
    exponents = torch.tensor([[127, 129]], dtype=torch.uint8)
    tensors = {
        "int4.weight_packed": packed, "int4.weight_scale": torch.tensor([[1.0, 2.0]]),
        "int4.weight_shape": torch.tensor([1, 64]),
        "mxfp4.weight_packed": halves, "mxfp4.weight_scale": exponents,
        "mxfp8.weight": torch.ones(1, 64).to(torch.float8_e4m3fn), "mxfp8.weight_scale": exponents.clone(),
    }  # fmt: skip
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    read = dict(driver.Checkpoint(tmp_path).plain(whole=True))
    scale = torch.tensor([1.0] * 32 + [2.0] * 32)
    assert torch.equal(read["int4.weight"][0], (codes.flatten() - 8) * scale)
    assert torch.equal(read["mxfp4.weight"][0], torch.tensor([0.5, 1, -1, -0.5] * 16) * scale**2)
    assert torch.equal(read["mxfp8.weight"][0], scale**2)
    for name in ("int4", "mxfp4"):
        held = SimpleNamespace(
            weight_packed=tensors[f"{name}.weight_packed"].t(), weight_scale=tensors[f"{name}.weight_scale"].t()
        )
        weight, kind = driver.held_weight(held, "weight", torch.Size([1, 64]), None)
        assert weight is not None
        assert (kind, torch.equal(weight, read[f"{name}.weight"])) == (name, True)
    nvfp4 = SimpleNamespace(weight=halves, weight_scale=torch.ones(1, 4).to(torch.float8_e4m3fn))
    assert driver.held_weight(nvfp4, "weight", torch.Size([1, 64]), None)[0] is None, "without its global scale"


def test_against_what_means_the_same(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Before and after side by side; the exit code is OUT's."""
    out = fake.write(tmp_path / "out")
    done = run(monkeypatch, checkpoint, "--against", out)
    assert done.exit_code == 0, done.output
    assert "OUT has the weights of IN." in done.stdout


def _swap(tensors: dict[str, torch.Tensor]) -> None:
    q = "model.layers.0.attn.q_proj.weight_scale"
    tensors[q], tensors[f"{K}.weight_scale"] = tensors[f"{K}.weight_scale"], tensors[q]


def _double(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{K}.weight_scale"] = tensors[f"{K}.weight_scale"] * 2


@pytest.mark.parametrize("edit", [_swap, _double])
def test_scales_of_out_that_mean_something_else_are_named(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, edit: Callable[[Any], Any]
) -> None:
    """An engine can load them as they are: only IN says what was meant."""
    out = fake.write(tmp_path / "out")
    fake.change(out, edit)
    assert run(monkeypatch, out).exit_code == 0
    done = run(monkeypatch, checkpoint, "--against", out)
    assert done.exit_code == 1, done.output
    assert "OUT does not have the weights of IN" in done.stdout and K in done.stdout.replace("\n  ", "")


def test_reports(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("page.html", "page.md"):
        done = run(monkeypatch, checkpoint, "--report", tmp_path / name, fault="doubled")
        assert done.exit_code == 1, done.output
        text = (tmp_path / name).read_text()
        assert "garbled" in text and str(tmp_path) not in text
    assert run(monkeypatch, checkpoint, "--report", tmp_path / "page.pdf").exit_code == 2


def test_verify_tries_both(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = fake.write(tmp_path / "out")
    words = ["verify", str(checkpoint), str(out), "--weights-only"]

    def answer(fault: str, *more: str) -> Result:
        run(monkeypatch, checkpoint, fault=fault)  # sets the engine
        return CliRunner().invoke(main, [*words, *more])

    plain = answer("", "--json").exit_code
    document = json.loads(answer("doubled", "--try", "--json", "--quiet").stdout)
    jsonschema.validate(document, schemas.schema("verify"), jsonschema.Draft202012Validator)
    assert [each["verdict"] for each in document["try"]["trials"]] == ["garbled", "garbled"]
    assert "garbled (in Fake 1.0)" in " ".join(answer("doubled", "--try").stdout.split())
    assert answer("", "--try").exit_code == plain
    assert answer("doubled", "--try").exit_code == 1
    started = answer("does not start", "--try")
    assert "libcudart" in started.stderr and started.exit_code == (4 if plain == 0 else plain)
    assert answer("", "--engine", "python3").exit_code == 2


def test_one_rank_after_the_other(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run(monkeypatch, checkpoint, "--tensor-parallel", "2", "--json", "--quiet")
    assert [each["rank"] for each in json.loads(done.stdout)["trials"]] == [0, 1]


@pytest.mark.parametrize("packed", [False, True])
def test_weights_loaded_at_once_are_counted_not_bytes(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    def pack(held: dict[str, torch.Tensor]) -> None:
        for name in [name for name in held if name.endswith("proj.weight")]:
            held[name] = torch.zeros(fake.ROWS, fake.COLUMNS // 2, dtype=torch.uint8)

    if packed:
        fake.change(checkpoint, pack)
    layer = len(fake.PARTS) * (fake.ROWS * fake.COLUMNS + 2) + fake.COLUMNS
    monkeypatch.setattr(selection, "_AT_ONCE", 2 * layer - 1)
    chosen = selection.select(open_checkpoint(checkpoint), "all")
    assert chosen is not None and chosen.runs == ((0, 0), (1, 1))
    monkeypatch.setattr(selection, "_AT_ONCE", 2 * layer)
    assert selection.select(open_checkpoint(checkpoint), "all") is None
