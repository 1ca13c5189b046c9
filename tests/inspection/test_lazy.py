"""`inspect` plans what its answer needs: fewer profiles, and the same advice."""

from __future__ import annotations

from dataclasses import replace

import pytest

import rewrite
from rewrite.inspection.advice import advise
from rewrite.loaders.outcome import AS_IT_IS, Outcome
from tests.support import FIXTURES

VL = FIXTURES / "llmcompressor-qwen3_5-vl"


@pytest.mark.parametrize("name", ["llmcompressor-qwen3_5-vl", "modelopt-qwen3_5-moe-nvfp4", "modelopt-llama"])
@pytest.mark.parametrize("engine", ["vllm@0.19.1", "vllm@0.32.0", "sglang@0.5.9", "transformers"])
def test_the_advice_is_that_of_all_profiles(name: str, engine: str) -> None:
    """Also where no profile serves all."""
    loaders = rewrite.find_loaders(engine)
    every = rewrite.inspect_checkpoint(FIXTURES / name, selection="all")
    few = rewrite.inspect_checkpoint(FIXTURES / name, selection="all", enough_for=loaders)
    assert advise(few, loaders) == advise(every, loaders)


@pytest.mark.parametrize(
    ("engine", "planned"),
    [("vllm@0.32.0", ["exact"]), ("transformers", []), ("sglang@0.5.12", ["exact", "rescaled", "dynamic"])],
)
def test_no_more_is_planned_than_is_needed(engine: str, planned: list[str]) -> None:
    """None where nothing is wrong; else up to the first profile that serves."""
    inspection = rewrite.inspect_checkpoint(VL, enough_for=rewrite.find_loaders(engine))
    assert list(inspection.rows[0].converted) == planned


def test_vectors_have_a_column_only_where_they_help() -> None:
    """They serve nothing better than the other profiles here; those who read JSON still find them."""
    inspection = rewrite.inspect_checkpoint(VL)
    assert "partition" in inspection.rows[0].converted
    assert "partition" not in inspection.shown_profiles
    worse = {name: Outcome("garbled") for name in inspection.rows[0].converted}
    first = inspection.rows[0]
    first = replace(first, outcomes={AS_IT_IS: first.as_is, **worse, "partition": Outcome("exact")})
    assert "partition" in replace(inspection, rows=(first, *inspection.rows[1:])).shown_profiles
