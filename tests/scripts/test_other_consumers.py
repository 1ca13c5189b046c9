"""What other consumers make of the fixtures, recorded by scripts/evidence.sh other_consumers; and that script."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from loader_matrix.truth import Truth, read_tensors
from other_consumers import driver, record
from other_consumers.cases import CONSUMERS, FIXTURES, PROFILES, fixtures
from other_consumers.record import BOOK, Cell
from other_consumers.reference import write_reference

from tests.support import ROOT

CELLS = BOOK.read().cells
DOCUMENT = (ROOT / "rewrite" / "loaders" / "README.md").read_text()
SECTION = DOCUMENT.partition("## Other consumers\n")[2].partition("\n## ")[0]
QUANTIZED = "llmcompressor-llama"


def of(consumer: str, profile: str) -> list[Cell]:
    """The cells of which something can be said: the consumer knows the model, and `convert` converts it."""
    own = (cell for cell in CELLS if (cell.consumer, cell.profile) == (consumer, profile))
    return [cell for cell in own if cell.outcome not in ("refused", "unknown model")]


def test_everything_is_recorded() -> None:
    """Every consumer, fixture and profile, once; nothing else, and nothing that was not run."""
    wanted = {
        (each.name, each.version, fixture, profile)
        for each in CONSUMERS.values()
        for fixture in fixtures()
        for profile in PROFILES
    }
    assert {cell.key for cell in CELLS} == wanted
    assert len(CELLS) == len(wanted)
    assert {cell.outcome for cell in CELLS} <= {"reads", "raises", "refused", "unknown model", "other tensors"}


def test_a_cell_says_what_was_compared_or_raised() -> None:
    for cell in CELLS:
        assert (cell.worst is not None) == (cell.outcome == "reads"), cell
        assert (cell.error is not None) == (cell.outcome in ("raises", "refused", "unknown model")), cell
        assert cell.outcome != "reads" or cell.compared > 10, cell


def test_the_table_is_the_recorded_one() -> None:
    """As `scripts/evidence.sh other_consumers --readme` prints it."""
    assert record.readme(CELLS) in SECTION


def test_the_versions_are_the_recorded_ones() -> None:
    for each in CONSUMERS.values():
        assert each.version in SECTION


def test_what_is_said_of_dequantized_is_recorded() -> None:
    """Both read it, exactly, wherever they know the model."""
    for consumer in CONSUMERS:
        assert {cell.worst for cell in of(consumer, "dequantized")} == {0.0}


def test_what_is_said_of_scales_of_the_cache_is_recorded() -> None:
    """llama.cpp's converter raises on them; without them it reads `portable`."""
    (kept,) = (cell for cell in of("llama.cpp", "portable") if cell.fixture == "modelopt-llama")
    assert kept.error and "k_scale" in kept.error["message"]
    (dropped,) = (cell for cell in of("llama.cpp", "portable, no KV scales") if cell.fixture == "modelopt-llama")
    assert dropped.worst == 0


def test_what_is_said_of_mlx_is_recorded() -> None:
    """It reads no FP8 checkpoint."""
    for profile in set(PROFILES) - {"dequantized"}:
        assert {cell.outcome for cell in of("mlx-lm", profile)} == {"raises"}


def test_what_is_said_of_llama_cpp_is_recorded() -> None:
    """Of FP8: `portable` without scales of the cache exactly, `exact` never."""
    fp8 = [fixture for fixture in fixtures() if "nvfp4" not in fixture]
    read = [cell for cell in of("llama.cpp", "portable, no KV scales") if cell.fixture in fp8]
    assert read
    assert {cell.worst for cell in read} == {0.0}
    assert {cell.outcome for cell in of("llama.cpp", "exact") if cell.fixture in fp8} == {"raises"}


def test_other_consumers_are_not_named_anywhere() -> None:
    """What was not run is not claimed, and what was run is said in the two places that are tested."""
    said = re.compile(r"LMDeploy|TensorRT|\bATOM\b|vllm-ascend", re.IGNORECASE)
    for path in (ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "rewrite").rglob("*.md")):
        assert not said.search(path.read_text()), path


# --- the script


def test_the_reference_is_the_truth_without_a_quantization(tmp_path: Path) -> None:
    write_reference(FIXTURES / QUANTIZED, FIXTURES / QUANTIZED, tmp_path / "out")
    known, found = Truth(FIXTURES / QUANTIZED), read_tensors(tmp_path / "out")
    assert "quantization_config" not in (tmp_path / "out" / "config.json").read_text()
    assert not [name for name in found if name.endswith("scale")]
    for name in known.quantized():
        assert torch.equal(found[f"model.{name}.weight"], known.linear(name).weight)


def test_the_reference_is_rounded_where_the_checkpoint_is(tmp_path: Path) -> None:
    write_reference(FIXTURES / QUANTIZED, FIXTURES / QUANTIZED, tmp_path / "exact")
    write_reference(FIXTURES / QUANTIZED, tmp_path / "exact", tmp_path / "same")
    (tmp_path / "rounded").mkdir()
    from safetensors.torch import save_file

    exact = read_tensors(tmp_path / "exact")
    save_file({name: each.bfloat16() for name, each in exact.items()}, tmp_path / "rounded" / "model.safetensors")
    write_reference(FIXTURES / QUANTIZED, tmp_path / "rounded", tmp_path / "wanted")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(read_tensors(tmp_path / "same")[name], exact[name])
    assert torch.equal(read_tensors(tmp_path / "wanted")[name], exact[name].bfloat16())


def test_errors_and_names_are_compared() -> None:
    one = {"a": np.ones((2, 2), np.float32), "b": np.ones(4, np.float32)}
    assert driver.compared(one, one)["worst"] == 0
    off = driver.compared({**one, "b": np.full(4, 1.5, np.float32)}, one)
    assert (off["outcome"], off["worst"], off["tensor"]) == ("reads", 0.5, "b")
    assert np.isnan(driver.compared({**one, "a": np.full((2, 2), np.nan, np.float32)}, one)["worst"])
    more = driver.compared({**one, "c": one["b"]}, one)
    assert (more["outcome"], more["worst"], more["unmatched"]) == ("other tensors", None, ["c"])
    with pytest.raises(ValueError, match="shapes"):
        driver.compared({**one, "b": np.ones(5, np.float32)}, one)


def test_what_raises_is_told_from_an_unknown_model(tmp_path: Path) -> None:
    """By whether the reference is read."""
    at = FIXTURES / QUANTIZED

    def never(_: Path) -> driver.Arrays:
        raise ValueError("no such model")

    def unquantized_only(path: Path) -> driver.Arrays:
        if "quantization_config" in (path / "config.json").read_text():
            raise ValueError("no such format")
        return {}

    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    assert driver.judge(never, at, at, (), folders[0])["outcome"] == "unknown model"
    assert driver.judge(unquantized_only, at, at, (), folders[1])["outcome"] == "raises"


def test_a_new_run_replaces_what_it_ran_only(tmp_path: Path) -> None:
    cell = Cell("mlx-lm", "1", "f", "exact", "reads", worst=0.0, compared=20)
    other, again = Cell(*cell.key[:3], "original", "reads"), Cell(*cell.key, "raises")
    book = replace(BOOK, path=tmp_path / "record.json")
    assert book.read().cells == []
    book.add([cell, other])
    found = book.add([again])
    assert found.cells == [other, again]
    assert book.read() == found
    assert replace(book, schema=2).read().cells == []
    assert book.add([cell], anew=True).cells == [cell]


def test_cells_are_said_in_a_word_or_a_number() -> None:
    cell = Cell("mlx-lm", "1", "f", "exact", "reads", worst=0.0)
    assert [record.said(cell), record.said(Cell(*cell.key, "reads", worst=0.0123))] == ["0", "1.2e-2"]
    assert [record.said(Cell(*cell.key, "refused")), record.said(Cell(*cell.key, "raises"))] == ["-", "raises"]
