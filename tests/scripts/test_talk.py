"""The checkpoints that talk: what a loader does to them, as scripts/demo.sh and tests/talk/README.md say."""

from __future__ import annotations

import json
import math
import re
import subprocess
from pathlib import Path

import pytest
import torch
from engines.driver import Unavailable
from engines.envs import Environment
from engines.known import Engine, find_engine
from loader_matrix import talk
from loader_matrix.delta_rule import convolved, delta_rule, gates
from loader_matrix.truth import Truth, canonical, read_tensors
from talk import demo, export, judge, say, served, text, vllm_backend
from talk.tasks import held_back

import rewrite
from tests.support import FIXTURES, ROOT

TALK = ROOT / "tests" / "talk"
ROWS = [
    [each.strip() for each in line.strip("|").split("|")]
    for line in (TALK / "README.md").read_text().splitlines()
    if line.startswith("| talk-") and "vllm" not in line
]
RECORD = talk.BOOK.read().cells


@pytest.mark.parametrize(
    ("loader", "version"), [("vLLM 0.19.1", "0.19.1"), ("vLLM 0.20 and newer", "0.32.0"), ("as meant", None)]
)
def test_the_weights_are_those_that_the_engine_was_seen_to_serve(loader: str, version: str | None) -> None:
    """By the record of the loader matrix: q, k, v and z of the demo's checkpoint, and all other fused layers."""
    folder = FIXTURES / "llmcompressor-qwen3_5-vl"
    truth, errors = Truth(folder), dict.fromkeys("qkvz", 0.0)
    for name, weight in served.weights(folder, loader).items():
        module = canonical(name.removesuffix(".weight")) or ""
        if module.endswith(("in_proj_qkv", "in_proj_z")):
            rows = truth.rows(module) if module.endswith("qkv") else [len(weight)]
            parts = "qkv" if module.endswith("qkv") else "z"
            true = truth.linear(module).weight.split(rows)
            for part, mine, meant in zip(parts, weight.split(rows), true, strict=True):
                errors[part] = max(errors[part], float((mine - meant).norm() / meant.norm()))
    if version is None:
        assert set(errors.values()) == {0.0}
        return
    cells = json.loads((ROOT / "tests" / "loader_matrix.json").read_text())["cells"]
    key = {"engine": "vllm", "version": version, "fixture": folder.name, "profile": "original", "ranks": 1}
    (cell,) = [cell for cell in cells if key.items() <= cell.items()]
    groups = [group["errors"] for group in cell["groups"] if group["layer"] == "in_proj_qkvz"]
    for part, error in errors.items():
        assert error == pytest.approx(max(group[part] for group in groups), rel=0.01)


@pytest.mark.parametrize("row", range(3))
def test_the_table_is_what_is_computed(row: int) -> None:
    """The original: as meant, and with the weights of both kinds of loader."""
    name, loader, nats, perplexity, said = ROWS[row]
    found = say.ask(served.model(TALK / name, loader), length=len(said) - 2)
    assert found.nats == pytest.approx(float(nats), abs=2e-3)
    assert found.perplexity == pytest.approx(float(perplexity), rel=2e-3)
    assert found.text.strip()[:8] == said.strip("`")[:8]


def test_the_table_shows_the_fault_and_the_repair() -> None:
    nats = {(name, loader): float(number) for name, loader, number, _, _ in ROWS}
    meant, old = nats["talk-fp8", "as meant"], nats["talk-fp8", "vLLM 0.19.1"]
    assert old > 4 * meant
    assert abs(nats["talk-fp8, exact", "vLLM 0.19.1"] - meant) < 5e-4


def test_converted_weights_are_as_meant_in_every_loader(tmp_path: Path) -> None:
    """With all groups nothing is left to requantize: bit for bit."""
    source, out = TALK / "talk-fp8", tmp_path / "out"
    rewrite.convert(source, out, selection="all")
    meant = served.weights(source, "as meant")
    for loader in served.LOADERS:
        found = served.weights(out, loader)
        assert found.keys() == meant.keys()
        assert all(torch.equal(found[name], meant[name]) for name in meant)


def test_the_demo_shows_what_a_person_can_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def ask(model: str) -> say.Said:
        asked.append(model)
        return say.Said(1.0, f"said by {model}")

    monkeypatch.setattr(served, "model", lambda folder, loader: f"{folder.name}: {loader}")
    monkeypatch.setattr(say, "ask", ask)
    shown = demo.lines(Path("in"), tmp_path / "out")
    assert asked == ["in: vLLM 0.19.1", "in: vLLM 0.20 and newer", "out: vLLM 0.19.1"]
    assert f"perplexity {math.e:.3f}" in shown[1]
    assert "said by in: vLLM 0.19.1" in shown[2]


def test_chapters_are_held_back_whole() -> None:
    book = "\n".join(f"Ge{chapter}:{verse} Word {chapter}.{verse}" for chapter in range(1, 41) for verse in (1, 2))
    parts = text.split(book)
    assert parts.held_back == "Word 20.1\nWord 20.2\nWord 40.1\nWord 40.2\n"
    assert len(parts.learned.splitlines()) == 76
    with pytest.raises(ValueError, match="not a verse"):
        text.split("Usage: bible")


def test_everything_that_runs_is_recorded() -> None:
    """And what raises is what has no kernel on CPU."""
    wanted = {(e.version, fixture, profile) for e in talk.ENGINES for _, fixture, profile, _ in talk.loads(e)}
    assert {(each.version, each.fixture, each.profile) for each in RECORD} == wanted
    assert len(RECORD) == len(wanted)
    raised = {each.profile for each in RECORD if each.outcome == "raises"}
    assert raised == {"exact", "exact-all"}
    assert {each.outcome for each in RECORD} == {"runs", "raises"}


def test_the_documents_have_the_recorded_tables() -> None:
    """As `scripts/evidence.sh talk --readme` and `--first` print them."""
    assert talk.readme(RECORD) in (TALK / "README.md").read_text()
    assert talk.first(RECORD) in (ROOT / "README.md").read_text()


def test_the_sizes_are_right() -> None:
    text = (TALK / "README.md").read_text()
    for name in ("talk-fp8", "talk-nvfp4"):
        size = sum(path.stat().st_size for path in (TALK / name).iterdir())
        assert f"| folder `{name}` | {size:,} |" in text
    assert f"| `held_back.txt` | {say.HELD_BACK.stat().st_size:,} |" in text


def test_real_engines_agree_with_the_loader_model() -> None:
    """What transformers computes with the weights that the loader model says, and what vLLM computed."""
    computed = {(name, loader): float(nats) for name, loader, nats, _, _ in ROWS}
    real = {(each.version, each.fixture, each.profile): each.nats for each in RECORD}
    pairs = {
        ("0.19.1", "original"): computed["talk-fp8", "vLLM 0.19.1"],
        ("0.32.0", "original"): computed["talk-fp8", "vLLM 0.20 and newer"],
        ("0.19.1", "dynamic"): computed["talk-fp8, exact", "vLLM 0.19.1"],
    }
    for (version, profile), nats in pairs.items():
        assert real[version, "talk-fp8", profile] == pytest.approx(nats, rel=2e-3)


def test_the_delta_rule_is_that_of_transformers() -> None:
    from transformers.models.qwen3_5 import modeling_qwen3_5 as theirs

    torch.manual_seed(0)
    tokens, heads = 70, 4
    q, k, v = (torch.randn(tokens, each, 8) for each in (2, 2, heads))
    a, b, a_log, bias = torch.randn(tokens, heads), torch.randn(tokens, heads), torch.randn(heads), torch.randn(heads)
    decay, beta = gates(a, b, a_log, bias)
    true, _ = theirs.torch_chunk_gated_delta_rule(
        *(each.repeat_interleave(heads // each.shape[1], 1)[None] for each in (q, k, v)),
        g=(-a_log.exp() * torch.nn.functional.softplus(a + bias))[None],
        beta=b.sigmoid()[None],
        use_qk_l2norm_in_kernel=True,
    )
    torch.testing.assert_close(delta_rule(q, k, v, decay, beta), true[0], atol=1e-4, rtol=1e-3)


def test_the_convolution_is_causal_and_per_channel() -> None:
    x, filters = torch.randn(6, 3), torch.randn(3, 1, 4)
    by_hand = torch.zeros(6, 3)
    for token in range(6):
        for back in range(min(4, token + 1)):
            by_hand[token] += x[token - back] * filters[:, 0, 3 - back]
    torch.testing.assert_close(convolved(x, filters), torch.nn.functional.silu(by_hand))


def test_a_result_becomes_a_cell() -> None:
    load = (find_engine("vllm==0.32.0"), "talk-fp8", "exact", 1)
    assert talk.cell(load, [{"nats": 1.0, "text": "x"}]).outcome == "runs"
    assert talk.cell(load, [{"error": {"type": "E", "message": "m"}}]).error == "E: m"
    assert talk.cell(load, [{"fault": {}}]).outcome == "not run"
    assert talk.cell(load, Unavailable("no wheel")).error == "no wheel"


@pytest.mark.parametrize("name", ["talk-fp8", "talk-nvfp4"])
def test_a_token_is_its_byte(name: str) -> None:
    """The model was trained so."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TALK / name)
    said = "And God\n\u00e9 \u2603~"
    assert tokenizer(said)["input_ids"] == list(said.encode())
    assert tokenizer.decode(list(said.encode())) == said
    assert tokenizer.eos_token_id == 256


def test_the_table_of_the_harness_is_the_recorded_one() -> None:
    """As `scripts/evidence.sh judge --record` wrote it."""
    judged = json.loads((TALK / "judged.json").read_text())
    text = (ROOT / "scripts" / "evidence" / "talk" / "README.md").read_text()
    for name, found in judged.items():
        right = round(found["exact_match"] * held_back.VERSES)
        assert f"| {name} | {found['bits_per_byte']:.4f} | {right} of {held_back.VERSES} |" in text
    assert judged["original as vLLM 0.19.1 serves it"]["bits_per_byte"] > 4 * judged["original"]["bits_per_byte"]
    assert judged["exact"] == judged["original"]


def test_the_table_of_the_back_end_vllm_is_the_recorded_one() -> None:
    """As `scripts/evidence.sh judge --backend vllm --record` wrote it. Real engines agree with the table before it."""
    judged = json.loads((TALK / "judged_vllm.json").read_text())
    text = (ROOT / "scripts" / "evidence" / "talk" / "README.md").read_text()
    assert list(judged) == [f"vLLM {each.version}" for each in talk.ENGINES]
    for engine, by_name in judged.items():
        for name, found in by_name.items():
            right = f"{round(found['exact_match'] * held_back.VERSES)} of 100" if "exact_match" in found else "-"
            assert f"| {engine} | {name} | {found['bits_per_byte']:.4f} | {right} |" in text
    by_transformers = json.loads((TALK / "judged.json").read_text())
    pairs = {
        ("vLLM 0.19.1", "original"): "original as vLLM 0.19.1 serves it",
        ("vLLM 0.19.1", "dynamic"): "dynamic",
        ("vLLM 0.32.0", "original"): "original",
        ("vLLM 0.32.0", "dynamic"): "dynamic",
    }
    for (engine, name), other in pairs.items():
        bits = by_transformers[other]["bits_per_byte"]
        assert judged[engine][name]["bits_per_byte"] == pytest.approx(bits, rel=2e-3)


@pytest.mark.parametrize("engine", talk.ENGINES, ids=lambda engine: engine.slug)
def test_the_harness_brings_no_second_version_of_what_the_engine_has(engine: Engine) -> None:
    pins = vllm_backend.missing(engine)
    names = {re.sub(r"[-_.]+", "-", pin.partition("==")[0]).lower() for pin in pins}
    assert pins[0].startswith("lm_eval==")
    assert {"datasets", "evaluate", "pyarrow"} < names
    assert not names & {"torch", "transformers", "numpy", "compressed-tensors", "huggingface-hub", "typing-extensions"}


def test_the_harness_is_found_after_the_engine() -> None:
    where = Environment(Path("python"), {"PYTHONPATH": "scripts:engine", "HOME": "home"})
    found = vllm_backend.variables(where)
    assert found["PYTHONPATH"] == f"scripts:engine:{vllm_backend.HARNESS}"
    assert (found["HOME"], found["HF_DATASETS_OFFLINE"]) == ("home", "1")


def test_the_script_of_the_harness_refuses_an_unknown_back_end() -> None:
    done = subprocess.run(
        [str(ROOT / "scripts" / "evidence.sh"), "judge", "--backend", "other"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "hf|vllm" in done.stderr


def test_the_tasks_are_made_of_the_held_back_text() -> None:
    text = held_back.TEXT.read_text()
    pieces, verses = held_back.cut(text), held_back.cloze(text)
    assert (len(pieces), len(verses)) == (held_back.PIECES, held_back.VERSES)
    assert text.startswith(" ".join(each["text"] for each in pieces)[:5000].strip())
    assert all(len(each["text"]) <= held_back.PIECE for each in pieces)
    lines = set(text.splitlines())
    for verse in verses:
        assert verse["last"].isalpha() or "'" in verse["last"] or "-" in verse["last"]
        assert any(line.startswith(f"{verse['start']} {verse['last']}") for line in lines)


@pytest.mark.parametrize("task", judge.NAMES)
def test_a_task_names_a_function_that_is_there(task: str) -> None:
    text = (judge.TASKS / f"{task}.yaml").read_text()
    assert f"task: {task}\n" in text
    (name,) = re.findall(r"!function held_back\.(\w+)", text)
    assert callable(getattr(held_back, name))


def test_an_exported_model_has_the_weights_as_served(tmp_path: Path) -> None:
    export.export(TALK / "talk-fp8", "vLLM 0.19.1", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in config
    found, meant = read_tensors(tmp_path), served.weights(TALK / "talk-fp8", "vLLM 0.19.1")
    assert found.keys() == meant.keys()
    assert all(torch.equal(found[name], meant[name]) for name in meant)
