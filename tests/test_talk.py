"""The checkpoints that talk: what a loader does to them, as scripts/demo.sh and tests/talk/README.md say."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from loader_matrix.served import rel
from loader_matrix.truth import Truth, canonical
from talk import demo, say, served, text

import rewrite
from tests.support import FIXTURES, ROOT

TALK = ROOT / "tests" / "talk"
ROWS = [
    [each.strip() for each in line.strip("|").split("|")]
    for line in (TALK / "README.md").read_text().splitlines()
    if line.startswith("| talk-")
]


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
            rows = truth.rows(module, 3) if module.endswith("qkv") else [len(weight)]
            parts = "qkv" if module.endswith("qkv") else "z"
            true = truth.linear(module).weight.split(rows)
            for part, mine, meant in zip(parts, weight.split(rows), true, strict=True):
                errors[part] = max(errors[part], rel(mine, meant))
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
