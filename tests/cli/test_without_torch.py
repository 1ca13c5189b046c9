"""`inspect`, `convert` and `verify --weights-only` run where torch and compressed-tensors cannot be imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import FIXTURES, ROOT

_BLOCKED = """
import importlib.util, sys
NAMES = ("torch", "compressed_tensors", "transformers")
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in NAMES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in NAMES else spec(name, package)
from rewrite.cli.commands import main
main(sys.argv[1:])
"""


def run(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _BLOCKED, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.mark.parametrize("name", ["llmcompressor-qwen3_5-vl", "llmcompressor-qwen3_5-nvfp4", "fp8-qwen3_5-vl"])
def test_all_but_multiplying(name: str, tmp_path: Path) -> None:
    source, out = FIXTURES / name, tmp_path / "out"
    assert run("inspect", source).returncode == 1
    made = run("convert", source, out, "--verify")
    assert made.returncode == 0, made.stderr
    assert "outputs" in made.stdout.partition("Not checked:")[2], "what was not multiplied is said"
    found = run("verify", source, out, "--weights-only")
    assert found.returncode == 0, found.stderr


def test_multiplying_says_what_it_needs(tmp_path: Path) -> None:
    """And what to do without."""
    result = run("verify", FIXTURES / "llmcompressor-qwen3_5-vl", FIXTURES / "llmcompressor-qwen3_5-vl")
    assert result.returncode == 2
    assert "torch, which is not installed" in result.stderr and "--weights-only" in result.stderr
