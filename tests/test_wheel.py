"""The wheel has all that the commands need: built, installed apart from the repository, and run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import FIXTURES, ROOT

pytest.importorskip("hatchling", reason="hatchling builds the wheel: pip install .[test]")
VL = FIXTURES / "llmcompressor-qwen3_5-vl"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the wheel installs, and nothing else; its dependencies are those of this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "rewrite", source / "rewrite", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source], check=True)
    (wheel,) = folder.glob("rewrite-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", folder / "site", wheel], check=True)
    shutil.rmtree(source)
    return folder / "site"


def run(site: Path, place: Path, *words: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-m", "rewrite", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=place, env=environment)


def test_the_wheel_converts_without_the_repository(installed: Path, tmp_path: Path) -> None:
    where = [sys.executable, "-c", "import rewrite; print(rewrite.__file__)"]
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    found = subprocess.run(where, capture_output=True, text=True, check=True, cwd=tmp_path, env=environment).stdout
    assert Path(found.strip()).is_relative_to(installed)
    shutil.copytree(VL, tmp_path / "in")
    assert run(installed, tmp_path, "inspect", "in").returncode == 1
    assert run(installed, tmp_path, "convert", "in", "out", "--verify").returncode == 0
    assert run(installed, tmp_path, "inspect", "out").returncode == 0
    schema = "from rewrite import schemas; print(schemas.schema('inspect')['$id'])"
    command = [sys.executable, "-c", schema]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, env=environment)
    assert said.stdout == "urn:rewrite:inspect:1\n"
