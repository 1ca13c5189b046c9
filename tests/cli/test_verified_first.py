"""`convert --verify`: nothing is published unless it is verified."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import rewrite
from rewrite.cli.commands import main
from rewrite.writing.publish import DirectoryOutput
from tests.support import FIXTURES, tree, unfolded

TEXT = FIXTURES / "llmcompressor-qwen3_5-text"


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def test_one_step_converts_and_verifies(tmp_path: Path) -> None:
    """The same bytes as in two steps, and the three answers of `verify`."""
    result = run("convert", TEXT, tmp_path / "out", "--verify")
    assert result.exit_code == 0, result.output
    assert (
        unfolded(result.stdout)
        .rstrip()
        .endswith(
            f"{tmp_path / 'out'} is verified. Bytes: as the conversion promises. "
            "Engines: vLLM 0.27.0+, SGLang 0.5.23+ serve it exactly. Not checked: nothing."
        )
    )
    run("convert", TEXT, tmp_path / "two")
    assert tree(tmp_path / "out") == tree(tmp_path / "two")
    document = json.loads(run("convert", TEXT, tmp_path / "json", "--verify", "--json").stdout)
    assert document["verification"]["ok"] is True


def test_a_damaged_output_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte of a weight flips on the way to disk."""
    complete = DirectoryOutput.check_source

    def damage(self: DirectoryOutput) -> None:
        complete(self)
        (shard,) = (self._staging.out).glob("model-00001-of-*.safetensors")
        raw = bytearray(shard.read_bytes())
        raw[-1] ^= 1
        shard.write_bytes(raw)

    monkeypatch.setattr(DirectoryOutput, "check_source", damage)
    assert run("convert", TEXT, tmp_path / "unseen").exit_code == 0, "nothing else sees it"
    result = run("convert", TEXT, tmp_path / "out", "--verify")
    assert result.exit_code == 1
    assert "was not published" in result.stderr
    assert not (tmp_path / "out").exists()


def test_what_the_engine_cannot_serve_is_not_published(tmp_path: Path) -> None:
    """The bytes are right, and SGLang 0.5.14 has no kernel for them."""
    vl = FIXTURES / "llmcompressor-qwen3_5-vl"
    words = ("--profile", "exact", "--for", "sglang@0.5.14", "--verify")
    result = run("convert", vl, tmp_path / "out", *words)
    assert (result.exit_code, (tmp_path / "out").exists()) == (1, False)
    assert "does not run" in result.stderr and "--for" in result.stderr


def test_an_output_that_an_earlier_run_published_is_verified_too(tmp_path: Path, monkeypatch: Any) -> None:
    """Killed after the rename: nothing is left to write."""
    rewrite.convert(TEXT, tmp_path / "out")
    monkeypatch.setattr(DirectoryOutput, "_was_moved", lambda _: True)
    result = run("convert", TEXT, tmp_path / "out", "--verify")
    assert "is verified" in unfolded(result.stdout)


def test_the_hub_has_no_place_to_look_before_the_commit(tmp_path: Path, monkeypatch: Any) -> None:
    """Said before anything is sent."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    result = run("convert", TEXT, "hf://me/fixed", "--verify")
    assert result.exit_code == 2
    assert "cannot be read before its commit" in result.stderr
