"""The wheel has all that the commands need: built, installed where the repository is not, and run.

Not skipped where hatchling is missing: it is part of the tests' environment (``pip install .[test]``).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.support import FIXTURES, ROOT

VL = FIXTURES / "llmcompressor-qwen3_5-vl"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with the wheel. Its dependencies are those of this environment, by a path that
    does not bring along what is installed here from the repository."""
    folder = tmp_path_factory.mktemp("wheel")
    source, home = folder / "source", folder / "home"
    shutil.copytree(ROOT / "rewrite", source / "rewrite", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source], check=True)
    shutil.rmtree(source)
    (wheel,) = folder.glob("rewrite-*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    subprocess.run([*pip, "--python", home, "install", "--no-deps", "--no-index", wheel], check=True)
    (own,) = home.glob("lib/python*/site-packages")
    (own / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home / "bin"


def run(programs: Path, place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(programs / words[0]), *words[1:]]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=place, env=environment)


def test_the_wheel_converts_without_the_repository(installed: Path, tmp_path: Path) -> None:
    where = run(installed, tmp_path, "python", "-c", "import rewrite; print(rewrite.__file__)").stdout
    assert Path(where.strip()).is_relative_to(installed.parent)
    shutil.copytree(VL, tmp_path / "in")
    assert run(installed, tmp_path, "rewrite", "inspect", "in").returncode == 1
    assert run(installed, tmp_path, "rewrite", "convert", "in", "out", "--verify").returncode == 0
    assert run(installed, tmp_path, "rewrite", "inspect", "out").returncode == 0
    schema = "from rewrite import schemas; print(schemas.schema('inspect')['$id'])"
    assert run(installed, tmp_path, "python", "-c", schema).stdout == "urn:rewrite:inspect:1\n"
