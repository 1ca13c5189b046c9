"""The Containerfile says what pyproject.toml says, and is built where a builder runs and has a base image."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import FIXTURES, ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

TEXT = (ROOT / "Containerfile").read_text()
VL = "llmcompressor-qwen3_5-vl"


def said(pattern: str) -> str:
    (found,) = re.findall(pattern, TEXT, re.MULTILINE)
    return str(found)


def test_it_agrees_with_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    least = re.fullmatch(r">=3\.(\d+)", project["requires-python"])
    assert least and int(said(r"^ARG BASE=.*python:3\.(\d+)-slim$")) >= int(least[1])
    assert set(said(r'"\.\[(.*)\]"').split(",")) <= project["optional-dependencies"].keys() - {"test", "lint", "fuzz"}
    assert said(r'^ENTRYPOINT \["(.*)"\]$') in project["scripts"]


def test_it_copies_what_the_wheel_is_made_of_and_runs_without_root() -> None:
    copied = [name for line in re.findall(r"^COPY (.*)$", TEXT, re.MULTILINE) for name in line.split()[:-1]]
    assert {"rewrite", "pyproject.toml", "README.md", "LICENSE"} <= set(copied)
    assert all((ROOT / name).exists() for name in copied)
    assert said("^USER (.*)$") not in ("root", "0")
    assert TEXT.index("\nUSER ") < TEXT.index("\nENTRYPOINT ")


@pytest.mark.slow
def test_it_is_built_and_converts(tmp_path: Path) -> None:
    """As its own user, in a directory of whoever runs it."""
    builder = next(filter(shutil.which, ("podman", "docker")), None)
    if builder is None:
        pytest.skip("neither podman nor docker is there")
    base = said("^ARG BASE=(.*)$")
    if subprocess.run([builder, "run", "--rm", base, "true"], capture_output=True, check=False).returncode:
        pytest.skip(f"{builder} cannot get or run {base}")
    built = [builder, "build", "--quiet", "--file", "Containerfile", "--tag", "rewrite-test", "."]
    subprocess.run(built, cwd=ROOT, check=True, capture_output=True)
    shutil.copytree(FIXTURES / VL, tmp_path / "in")
    tmp_path.chmod(0o777)
    run = [builder, "run", "--rm", "--volume", f"{tmp_path}:/work", "rewrite-test"]
    subprocess.run([*run, "convert", "in", "out", "--verify"], check=True)
    assert subprocess.run([*run, "inspect", "out"], check=False).returncode == 0
    who = [builder, "run", "--rm", "--entrypoint", "id", "rewrite-test", "-u"]
    assert subprocess.run(who, check=True, capture_output=True, text=True).stdout.strip() != "0"
