"""Environments and processes of engines: one without a wheel for CPU takes the compiled parts of another version."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

pytest.importorskip("tomllib")  # the scripts are for Python 3.11

from engines import envs, process
from engines.driver import Unavailable
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


# Reads a file; where that says "once" or "always", its process is ended from outside, as for want of memory.
_ENGINE = """
import os, signal
from pathlib import Path
from engines.driver import run

def load(job):
    said = job.model.read_text()
    if said == "always" or (said == "once" and not job.truth.exists()):
        job.truth.touch()
        os.kill(os.getppid(), signal.SIGKILL)
        os._exit(0)
    return said

run(("engine",), lambda: os.environ["VERSION"], load, lambda loaded, job: {"read": loaded})
"""


@pytest.mark.parametrize("second", ["fine", "once", "always"])
def test_a_process_that_is_ended_is_started_again_for_what_is_left(
    second: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for each batch; the batches after it have a process again."""
    engine = ENGINES[0]
    (tmp_path / "engine_that_ends.py").write_text(_ENGINE)
    monkeypatch.setattr(process, "LOGS", tmp_path / "logs")
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    where = envs.Environment(Path(sys.executable), {**os.environ, "VERSION": engine.version, "PYTHONPATH": path})
    models = [tmp_path / name for name in ("first", second, "last")]
    for model in models:
        model.write_text(model.name)
    batch = [process.Checkpoint(model.name, model, tmp_path / f"{model.name}-seen") for model in models]
    running = process.Process(engine, where, "engine_that_ends", quiet=True)
    try:
        found, after = running.load(batch, tmp_path), running.load(batch[:1], tmp_path)
    finally:
        running.close()
    assert found[0] == after[0] == [{"read": "first"}]
    if second == "always":
        for lost in found[1:]:
            assert isinstance(lost, Unavailable)
            assert f"exit code {-signal.SIGKILL}" in str(lost)
    else:
        assert found[1:] == [[{"read": second}], [{"read": "last"}]]
