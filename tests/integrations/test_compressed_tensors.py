"""The converter for compressed-tensors' own entry point."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compressed_tensors.entrypoints.convert import convert_checkpoint

import rewrite
from rewrite.integrations.compressed_tensors import ExplicitScales
from tests.support import CONVERTIBLE, FIXTURES, KV_SCALES, SPLIT_QKVZ, compressed_tensors_schemes, raw_tensors


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_the_converter_gives_the_same_tensors(name: str, tmp_path: Path) -> None:
    """Through compressed-tensors' convert_checkpoint, for pipelines that chain converters."""
    source = FIXTURES / name
    selection: rewrite.Selection = "qkvz" if name in SPLIT_QKVZ else "all"
    rewrite.convert(source, tmp_path / "ours", selection=selection)
    convert_checkpoint(source, tmp_path / "theirs", ExplicitScales(source, selection=selection), device="cpu")
    ours, theirs = raw_tensors(tmp_path / "ours"), raw_tensors(tmp_path / "theirs")
    assert {n: v[1:] for n, v in ours.items()} == {n: v[1:] for n, v in theirs.items()}
    assert compressed_tensors_schemes(tmp_path / "ours") == compressed_tensors_schemes(tmp_path / "theirs")


def test_the_converter_restates_other_dialects_where_nothing_is_to_be_done(tmp_path: Path) -> None:
    """convert_checkpoint would else leave FP8 weights behind without any config: it writes compressed-tensors only."""
    source = FIXTURES / "modelopt-llama"
    convert_checkpoint(source, tmp_path / "out", ExplicitScales(source, selection="qkvz"), device="cpu")
    before, after = raw_tensors(source), raw_tensors(tmp_path / "out")
    assert {KV_SCALES.get(name, name) for name in before} == after.keys()
    assert all(after[name] == entry for name, entry in before.items() if name not in KV_SCALES)
    scheme = compressed_tensors_schemes(tmp_path / "out")["model.layers.0.mlp.up_proj"]
    assert (scheme.weights.strategy, scheme.input_activations.dynamic) == ("tensor", False)


def test_the_converter_leaves_other_checkpoints_alone(text: Path, tmp_path: Path) -> None:
    """Nothing to do: nothing done."""
    rewrite.convert(text, tmp_path / "done")
    converter = ExplicitScales(tmp_path / "done")
    tensors = {"a": torch.zeros(2)}
    assert converter.process(tensors) == tensors
    assert converter.update_config(None) is None
