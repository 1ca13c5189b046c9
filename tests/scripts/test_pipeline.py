"""The files of scripts/pipeline: the shell part of each runs, word for word, and fails where it should."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from tests.support import FIXTURES, ROOT

pytestmark = pytest.mark.slow
PIPELINE = ROOT / "scripts" / "pipeline"
SOURCE = FIXTURES / "llmcompressor-qwen3_5-vl"


def shell(words: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run in ``folder``, with this interpreter's `rewrite` first on the path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        words, cwd=folder, env={**os.environ, **variables, "PATH": path}, capture_output=True, text=True, check=False
    )


def github(folder: Path, **changed: str) -> tuple[list[str], int]:
    """The steps that ran, as GitHub runs them (bash -e FILE), and the last exit code."""
    workflow: dict[str, Any] = yaml.safe_load((PIPELINE / "github.yml").read_text())
    ran = []
    for step in workflow["jobs"]["repair"]["steps"]:
        if "run" not in step or step["name"] == "Install":
            continue
        script = folder / "step.sh"
        script.write_text(step["run"])
        variables = {**workflow["env"], **changed, "GITHUB_STEP_SUMMARY": str(folder / "summary.md")}
        done = shell(["bash", "-e", str(script)], folder, **variables)
        ran.append(step["name"])
        if done.returncode:
            return ran, done.returncode
    return ran, 0


def test_github(tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(SOURCE)
    assert github(tmp_path) == (["Convert", "Verify", "Inspect"], 0)
    summary = (tmp_path / "summary.md").read_text().splitlines()
    assert any(line.startswith("**model-repaired is verified. Bytes: as the") for line in summary)
    report = (tmp_path / "VERIFICATION.md").read_text().splitlines()
    assert summary == [line for line in report if not line.startswith("![")] != report
    workflow = yaml.safe_load((PIPELINE / "github.yml").read_text())
    kept = workflow["jobs"]["repair"]["steps"][-1]["with"]["path"].split()
    assert all(list(tmp_path.glob(name)) for name in kept)


@pytest.mark.parametrize(
    ("changed", "last", "code"),
    [
        ({"PROFILE": "partition"}, "Verify", 1),
        ({"LOADER": "sglang@0.5.9"}, "Inspect", 1),
        ({"IN": "no"}, "Convert", 4),
    ],
)
def test_github_fails(tmp_path: Path, changed: dict[str, str], last: str, code: int) -> None:
    """vLLM does not load `partition`, SGLang 0.5.9 does not load `exact`, IN is not there."""
    (tmp_path / "model").symlink_to(SOURCE)
    ran, found = github(tmp_path, **changed)
    assert (ran[-1], found) == (last, code)


def pre_commit(folder: Path, *files: str) -> int:
    """As pre-commit calls a hook: the words of `entry`, then the names of files."""
    (repo,) = yaml.safe_load((PIPELINE / "pre-commit-config.yaml").read_text())["repos"]
    return shell([*shlex.split(repo["hooks"][0]["entry"]), *files], folder).returncode


def test_pre_commit(tmp_path: Path) -> None:
    (tmp_path / "published").symlink_to(SOURCE)
    done = shell(["rewrite", "convert", str(SOURCE), "repaired model", "--quiet"], tmp_path)
    assert done.returncode == 0
    assert pre_commit(tmp_path, "repaired model/config.json") == 0
    assert pre_commit(tmp_path, "published/config.json", "repaired model/config.json") == 1
    assert pre_commit(tmp_path) == 0


def kubernetes(folder: Path, **changed: str) -> int:
    """The command of the container, with its variables; its volume is ``folder``."""
    job = yaml.safe_load((PIPELINE / "kubernetes.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    variables = {each["name"]: each["value"].replace("/models", str(folder)) for each in container["env"]}
    return shell(container["command"], folder, **{**variables, **changed}).returncode


def test_kubernetes(tmp_path: Path) -> None:
    """It may run again."""
    (tmp_path / "in").symlink_to(SOURCE)
    assert kubernetes(tmp_path) == 0
    assert kubernetes(tmp_path) == 0
    statement = json.loads((tmp_path / "out-verification.json").read_text())
    assert {each["name"] for each in statement["subject"]} == {path.name for path in (tmp_path / "out").iterdir()}
    assert kubernetes(tmp_path, LOADER="sglang@0.5.9") == 1
    (tmp_path / "out" / "config.json").write_text("{}")
    assert kubernetes(tmp_path) == 1
