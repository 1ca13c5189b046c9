"""What OUT's manifest says of the engines that it was made for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import rewrite
from rewrite.verification.expected import MANIFEST_NAME, chosen_of
from tests.support import FIXTURES, in_one_shard


@pytest.mark.parametrize(
    ("stated", "found"),
    [
        ({"for": ["vllm@0.32.0", "sglang"], "platform": "cpu"}, (("vllm@0.32.0", "sglang"), "cpu")),
        ({"for": [], "platform": "cuda"}, ((), "cuda")),
        ({"for": "vllm"}, ((), "")),
        ({}, ((), "")),
        (None, ((), "")),
        ([3], ((), "")),
    ],
)
def test_engines_that_were_chosen(stated: object, found: tuple[tuple[str, ...], str], tmp_path: Path) -> None:
    """None where nobody noted any."""
    out = in_one_shard(FIXTURES / "llmcompressor-llama", tmp_path / "out")
    (out / MANIFEST_NAME).write_text(json.dumps({"profile": "exact", "chosen": stated}))
    assert chosen_of(rewrite.open_checkpoint(out).storage) == found
