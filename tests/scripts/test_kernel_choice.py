"""The engines' own choice of kernels, recorded by scripts/evidence.sh kernel_choice, and the script that records it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kernel_choice import operators, table
from kernel_choice.__main__ import ENGINES
from kernel_choice.platforms import PLATFORMS, platforms
from kernel_choice.record import BOOK, Cell
from kernel_choice.schemes import SCHEMES, TOKENS, schemes

from tests.support import ROOT

CELLS = BOOK.read().cells
CELL = Cell("vllm", "0.19.1", "sm90", "channel-static", 32, "runs", "Kernel", ["cutlass_scaled_mm"])


def test_everything_is_recorded() -> None:
    """Every engine on every platform that it is run with, each scheme, both numbers of tokens; nothing else."""
    wanted = {
        (name, version, platform.name, scheme, tokens)
        for name, version in (spec.split("==") for spec in ENGINES)
        for platform in platforms(name, version)
        for scheme in schemes(name)
        for tokens in TOKENS
    }
    assert {cell.key for cell in CELLS} == wanted
    assert len(CELLS) == len(wanted)
    assert {cell.outcome for cell in CELLS} == {"runs", "raises", "not built"}


def test_what_runs_names_an_operator() -> None:
    """Stand-ins note their names; on CPU the engine's own kernel multiplies, and only its class is known."""
    for cell in CELLS:
        noted = bool(cell.operators) or (cell.engine, cell.platform) == ("vllm", "cpu")
        assert noted if cell.outcome == "runs" else cell.error, cell


def test_the_record_survives_a_round_trip(tmp_path: Path) -> None:
    """Whose bytes do not change, either."""
    book = replace(BOOK, path=tmp_path / "record.json")
    assert book.read().cells == []
    assert book.add(CELLS) == book.read()
    assert book.read().cells == CELLS
    assert _cells(book.path) == _cells(BOOK.path)


def _cells(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if '"date"' not in line]


def test_a_new_run_replaces_what_it_ran_only(tmp_path: Path) -> None:
    other = replace(CELL, tokens=1)
    again = replace(CELL, outcome="raises", operators=[], error={"type": "E", "message": "", "where": ""})
    book = replace(BOOK, path=tmp_path / "record.json")
    book.add([CELL, other])
    assert book.add([again]).cells == [again, other]


def test_differences_from_the_record_are_named(tmp_path: Path) -> None:
    book = replace(BOOK, path=tmp_path / "record.json")

    def differences(now: list[Cell], recorded: list[Cell]) -> list[str]:
        book.add(recorded, anew=True)
        assert book.check(now) == bool(book.differences(now))
        return book.differences(now)

    raised = {"type": "RuntimeError", "message": "one", "where": "a.py:f"}
    recorded = replace(CELL, outcome="raises", operators=[], error=raised)
    assert differences([recorded], [recorded]) == []
    assert differences([replace(recorded, error=raised | {"message": "two"})], [recorded]) == []
    assert differences([replace(recorded, error=raised | {"where": "b.py:f"})], [recorded])
    assert "not recorded" in differences([CELL], [])[0]
    assert "not run" in differences([replace(CELL, outcome="not run")], [CELL])[0]
    assert "recorded" in differences([replace(CELL, kernel="Other")], [CELL])[0]


A, B = torch.zeros(32, 64).to(torch.float8_e4m3fn), torch.zeros(128, 64).to(torch.float8_e4m3fn).t()
ONE, ROWS, COLUMNS = torch.ones(()), torch.ones(32, 1), torch.ones(128, 1)


def test_stand_ins_check_their_operands() -> None:
    """As the compiled operators do: which scales each takes is what the record rests on."""
    old, new = operators.SglScaledMM(takes_one=False), operators.SglScaledMM(takes_one=True)
    with pytest.raises(RuntimeError, match="scales_a"):
        old(A, B, ONE, COLUMNS, torch.bfloat16)
    assert new(A, B, ONE, COLUMNS, torch.bfloat16).shape == (32, 128)
    assert old(A, B, ROWS, COLUMNS, torch.bfloat16).shape == (32, 128)
    with pytest.raises(RuntimeError, match="scales_b"):
        new(A, B, ONE, ONE, torch.bfloat16)
    with pytest.raises(RuntimeError, match="scaling configuration"):
        operators.torch_scaled_mm(A, B, ONE, COLUMNS.t())
    assert operators.torch_scaled_mm(A, B, ROWS, COLUMNS.t()).shape == (32, 128)
    assert operators.torch_scaled_mm(A, B, ONE, ONE).shape == (32, 128)
    with pytest.raises(RuntimeError, match="one scale"):
        operators.flashinfer_mm(A, B, torch.bfloat16, ONE, COLUMNS)
    with pytest.raises(RuntimeError, match="number of scales"):
        operators.cutlass_scaled_mm(torch.zeros(32, 128), A, B, torch.ones(16), COLUMNS)


def test_every_scheme_and_platform_is_named_once() -> None:
    assert [each.name for each in PLATFORMS.values()] == list(PLATFORMS)
    assert set(schemes("transformers")) < set(schemes("vllm")) == set(SCHEMES)


def test_the_table_of_the_loaders_is_the_recorded_one() -> None:
    """As `scripts/evidence.sh kernel_choice --readme` prints it."""
    assert table.readme(CELLS) in (ROOT / "rewrite" / "loaders" / "README.md").read_text()
