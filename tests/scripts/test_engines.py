"""Environments of the loader matrix: an engine without a wheel for CPU takes the compiled parts of another version."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("tomllib")  # the scripts are for Python 3.11

from engines import envs
from engines.known import ENGINES, find_engine


def package(folder: Path, version: str, *names: str) -> Path:
    for name in ("loader.py", *names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(version)
    return folder


def test_extension_modules_are_replaced_and_python_is_not(tmp_path: Path) -> None:
    """Those that only the engine itself has are for libraries that are not there."""
    donor = package(tmp_path / "donor", "old", "_C.so", "inner/_D.so")
    own = package(tmp_path / "own", "new", "_C.so", "_cuda.so")
    for _ in range(2):  # a second time changes nothing
        envs.take_compiled(donor, own)
        assert {str(path.relative_to(own)): path.read_text() for path in own.rglob("*.*")} == {
            "loader.py": "new",
            "_C.so": "old",
            "inner/_D.so": "old",
        }
        assert (donor / "_C.so").read_text() == "old"


def test_the_compiled_parts_are_those_of_a_version_that_has_all_its_own() -> None:
    """And an engine in parts is not said to generate: nothing computes."""
    for engine in ENGINES:
        if engine.compiled is not None:
            assert find_engine(f"{engine.name}=={engine.compiled}").compiled is None
            assert not engine.generates
