"""Predictions against recorded runs of the real loaders (scripts/evidence.sh loader_matrix --record).

A cell that disagrees is a defect of the prediction in ``rewrite/loaders/``, or a loader that has changed.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import rewrite
from rewrite.loaders.nvfp4 import not_run
from rewrite.loaders.outcome import E4M3_ROUNDING, SENTINEL, Outcome
from rewrite.loaders.versions import RUN, find_loaders
from tests.support import FIXTURES, LOADER_MATRIX, NVFP4, ROOT, SPLIT_QKVZ

LATENT = "llmcompressor-deepseek_v3"
RECORD = json.loads(LOADER_MATRIX.read_text())
CELLS = [cell for cell in RECORD["cells"] if cell["outcome"] != "not run"]


@cache
def inspection(fixture: str, selection: rewrite.Selection) -> rewrite.Inspection:
    """Of loading only: the record does not compute."""
    return rewrite.inspect_checkpoint(FIXTURES / fixture, selection=selection, platform=None)


def selection_of(cell: dict[str, Any]) -> rewrite.Selection:
    """Which layers a cell says something about: a conversion of in_proj_qkvz leaves the others as they were."""
    if cell["fixture"] in NVFP4:  # the conversion is of every layer whose scales differ
        return "all"
    return "qkvz" if cell["profile"] in ("exact", "dynamic", "bf16", "partition") else "all"


Outs = Callable[[str, str], rewrite.Inspection]


@pytest.fixture(scope="module")
def outs(tmp_path_factory: pytest.TempPathFactory) -> Outs:
    """What inspect says of a converted NVFP4 fixture: its runs are held to what it says itself."""

    @cache
    def inspect_out(fixture: str, profile: str) -> rewrite.Inspection:
        out = tmp_path_factory.mktemp("outs") / "out"
        rewrite.convert(FIXTURES / fixture, out, profile=profile)
        return rewrite.inspect_checkpoint(out, selection="all", platform=None)

    return inspect_out


def predicted(cell: dict[str, Any], outs: Outs) -> Outcome:
    (loader,) = find_loaders(f"{cell['engine']}@{cell['version']}")
    if cell["fixture"] in NVFP4 and cell["profile"] != "original":
        (row,) = [row for row in outs(cell["fixture"], cell["profile"]).rows if row.engine == loader]
        return row.as_is
    (row,) = [row for row in inspection(cell["fixture"], selection_of(cell)).rows if row.engine == loader]
    profile = cell["profile"].removesuffix("-all")
    outcome = row.as_is if profile == "original" else row.converted[profile]
    assert outcome is not None
    return outcome


def worst_errors(cell: dict[str, Any]) -> dict[str, float]:
    """The largest relative error of each partition of a fused layer, over the model's layers and ranks."""
    errors: dict[str, float] = {}
    for group in cell["groups"]:
        if selection_of(cell) == "all" or group["layer"] == "in_proj_qkvz":
            for name, error in group["errors"].items():
                key = f"{group['layer']}.{name}"
                errors[key] = largest([errors.get(key, 0.0), float(error)])
    experts = [float(other["error"]) for kind, other in cell["others"].items() if kind.startswith("experts.")]
    return errors | ({"experts": max(experts)} if experts and selection_of(cell) == "all" else {})


def largest(errors: list[float]) -> float:
    """NaN if any is."""
    return next((error for error in errors if math.isnan(error)), max(errors))


def affected(outcome: Outcome) -> set[str]:
    """The partitions that a prediction names; gate and up of experts as one, as they are measured."""
    return {"experts" if name.startswith("experts.") else name for name in outcome.partitions}


def engine_of(cell: dict[str, Any]) -> str:
    return f"{cell['engine']}@{cell['version']}"


def name_of(cell: dict[str, Any]) -> str:
    return f"{cell['engine']}-{cell['version']}-{cell['fixture']}-{cell['profile']}-{cell['ranks']}"


def check_nvfp4(outcome: Outcome, errors: dict[str, float]) -> None:
    """One global scale for several modules: each partition is off by its factor, all others are exact. A scale that
    nothing has filled is NaN in the recorded runs."""
    hurt = {name: error for name, error in errors.items() if error != 0}
    assert affected(outcome) >= set(hurt)
    unset = {name for name, error in hurt.items() if math.isnan(error)}
    assert bool(unset) == (outcome.error == SENTINEL)
    factors: dict[str, float] = {}
    for name, factor in outcome.factors:
        key = "experts" if name.startswith("experts.") else name
        factors[key] = max(factors.get(key, 0.0), abs(factor - 1))
    for name in set(hurt) - unset:
        assert hurt[name] == pytest.approx(factors[name], rel=2e-3), name


@pytest.mark.parametrize("cell", CELLS, ids=name_of)
def test_every_recorded_cell_is_predicted(cell: dict[str, Any], outs: Outs) -> None:
    """The kind, the partitions that are hurt, and the size of the error."""
    outcome = predicted(cell, outs)
    if cell["outcome"] == "raises":
        assert outcome.kind == "fails to load", cell["error"]
        return
    if outcome.kind == "not known":
        assert cell["not_compared"], "only of formats that the matrix does not read"
        return
    errors = worst_errors(cell)
    if outcome.factors or "global scale from memory" in outcome.detail:
        check_nvfp4(outcome, errors)
        return
    hurt = {name: error for name, error in errors.items() if error > 0}
    assert errors, "the run measured nothing"
    if cell["cast"]:
        assert outcome.kind == "garbled", "layers that are BF16 on disk are served in FP8"
        assert "in_proj_ba" in outcome.detail
        return
    if outcome.kind == "garbled" and not outcome.partitions:
        assert not hurt
        assert max(float(other["error"]) for other in cell["others"].values()) > 1, "the layers beside the fused ones"
        return
    if not hurt:
        assert outcome.kind == "exact"
        return
    named = {name: error for name, error in hurt.items() if name in affected(outcome)}
    if max(hurt.values()) > 1:
        assert outcome.kind == "garbled"
        assert named
        assert all(error <= E4M3_ROUNDING for name, error in hurt.items() if name not in named), "the rest: requantized"
        assert all(error >= outcome.error * 0.15 for error in named.values()), "the estimate is of the right size"
    else:
        assert outcome.kind == "loses precision"
        assert affected(outcome) >= set(hurt)
        if "rounds" not in outcome.detail:  # some scale may be one that rounding does not change
            assert affected(outcome) == set(hurt)
        assert max(hurt.values()) <= outcome.error


ORACLE = [
    (name, version, field)
    for version, field in (("0.19.1", "weights_before"), ("0.20.0", "weights_fixed"), ("0.32.0", "weights_fixed"))
    for name in sorted({cell["fixture"] for cell in CELLS} - {*NVFP4})  # the oracle of NVFP4 has its own test
    if any(c["fixture"] == name and c["version"] == version and c["outcome"] == "loads" for c in CELLS)
]


@pytest.mark.parametrize(("fixture", "version", "field"), ORACLE)
def test_verify_computes_what_vllm_serves(fixture: str, version: str, field: str, tmp_path: Path) -> None:
    """The oracle's error of every partition of every fused layer is the one that was measured in the engine."""
    (cell,) = [
        c for c in CELLS if (c["fixture"], c["version"], c["profile"], c["ranks"]) == (fixture, version, "original", 1)
    ]
    profile = "bf16" if fixture == "modelopt-qwen3_5-mixed" else "exact"
    rewrite.convert(FIXTURES / fixture, tmp_path / "out", profile=profile, selection="all")
    numbers = rewrite.verify(FIXTURES / fixture, tmp_path / "out", device="cpu", tokens=1).numbers
    computed = {(re.sub(r"^.*?(?=layers\.)", "", n.group), n.partition): getattr(n, field) for n in numbers}
    measured = {(g["module"], name): float(error) for g in cell["groups"] for name, error in g["errors"].items()}
    assert computed
    for key, error in computed.items():
        assert error == pytest.approx(measured[key], rel=2e-3, abs=0 if measured[key] else 1e-12), key


def test_scales_of_the_kv_cache_are_read_from_what_convert_writes() -> None:
    """No loader makes less of them than of the original's; ``dequantized`` drops them. SGLang up to 0.5.11 reads none
    beside compressed-tensors: the cache then stays in the model's dtype, so nothing is wrong."""
    order = ("equal", "rounded", "absent", "differs")
    with_scales = [c for c in CELLS if c["kv_cache"] not in (None, "none") and c["profile"] != "dequantized"]
    originals = {(c["engine"], c["version"], c["fixture"]): c for c in with_scales if c["profile"] == "original"}
    assert any(cell["kv_cache"] == "equal" for cell in originals.values())
    for cell in with_scales:
        original = originals[cell["engine"], cell["version"], cell["fixture"]]["kv_cache"]
        old_sglang = cell["engine"] == "sglang" and cell["version"] in ("0.5.9", "0.5.10.post1", "0.5.11")
        if not (old_sglang and cell["kv_cache"] == "absent"):
            assert order.index(cell["kv_cache"]) <= order.index(original), name_of(cell)


def test_no_other_layer_is_served_worse() -> None:
    """A conversion of the fused layers, and a new config, leave all others as they were."""
    loaded = [cell for cell in CELLS if cell["outcome"] == "loads" and not cell["cast"]]
    key = ("engine", "version", "fixture", "ranks")
    originals = {tuple(c[name] for name in key): c for c in loaded if c["profile"] == "original"}
    compared = 0
    for cell in loaded:
        original = originals.get(tuple(cell[name] for name in key))
        if original is None or cell["profile"] == "original" or cell["fixture"] in NVFP4:
            continue
        assert cell["others"].keys() == original["others"].keys()
        for kind, other in cell["others"].items():
            assert other["error"] <= original["others"][kind]["error"], (name_of(cell), kind)
            compared += 1
    assert compared > 1000


@pytest.mark.parametrize("option", ["--readme", "--readme-families", "--readme-nvfp4"])
def test_the_readme_shows_the_recorded_table(option: str) -> None:
    """Generated, not written."""
    pytest.importorskip("tomllib")  # the script is for Python 3.11; the project's tests also run on 3.10
    command = [str(ROOT / "scripts" / "evidence.sh"), "loader_matrix", option]
    table = subprocess.run(command, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, check=True)
    assert table.stdout.decode().strip() in (ROOT / "rewrite" / "loaders" / "README.md").read_text()


def runs_of(fixture: str) -> set[Any]:
    """The rows of which a version was run with the fixture."""
    return {loader for cell in CELLS if cell["fixture"] == fixture for loader in find_loaders(engine_of(cell))}


def test_the_record_covers_every_fixture_profile_and_engine() -> None:
    """So that a new dialect, family, profile or loader row cannot go unmeasured: a cell that was not run needs convert
    to refuse the fixture with that profile."""
    newest = {loader for loader in rewrite.LOADERS if loader.last is None}
    split = {*SPLIT_QKVZ, "modelopt-qwen3_5-mixed"}
    recorded = {(c["fixture"], c["profile"], f"{c['engine']}=={c['version']}"): c for c in RECORD["cells"]}
    engines = {engine for fixture, _, engine in recorded if fixture == "llmcompressor-llama"}  # not of a boundary only
    for fixture in (path.parent.name for path in FIXTURES.glob("*/config.json")):
        if fixture in NVFP4:
            continue
        if fixture == LATENT:  # by the versions that have such attention on CPU
            assert runs_of(fixture) >= newest
            continue
        some = ("exact", "bf16", "partition") if fixture in split else ("partition-all",)
        for profile in ("original", "exact-all", "portable", "bf16-all", *some):
            for engine in engines:
                cell = recorded[fixture, profile, engine]
                assert cell["outcome"] != "not run" or "convert refuses" in cell["reason"], cell["reason"]
    for fixture in NVFP4:  # by the versions that say something of it
        assert runs_of(fixture) >= newest, fixture
    predicting = {loader for loader in rewrite.LOADERS if loader.nvfp4 is not not_run}
    recorded_nvfp4 = [engine_of(cell) for cell in CELLS if cell["fixture"] in NVFP4]
    assert {loader for engine in recorded_nvfp4 for loader in find_loaders(engine)} >= predicting
    measured = {loader for cell in CELLS for loader in find_loaders(f"{cell['engine']}@{cell['version']}")}
    assert measured == set(rewrite.LOADERS)
    assert {c["profile"].removesuffix("-all") for c in CELLS} == {"original", *rewrite.PROFILES}


@pytest.mark.parametrize("name", RUN)
def test_every_version_that_is_said_to_have_run_was_recorded(name: str) -> None:
    """Of one that was not run ``inspect`` says that it is assumed to be like another one; of these it does not."""
    stated = {run.partition(" ")[0] for run in RUN[name]}
    recorded = {cell["version"] for cell in CELLS if cell["engine"].lower() == name.lower()}
    assert stated == recorded, f"{name}: needs recorded runs (scripts/evidence.sh loader_matrix), or no entry of RUN"
