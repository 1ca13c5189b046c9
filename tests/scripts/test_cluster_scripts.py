"""scripts/cluster: SLURM's script runs against an `sbatch` that runs at once; the Kubernetes jobs are looked at."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

import rewrite
from rewrite.cli.commands import main
from tests.support import ROOT, tree

CLUSTER = ROOT / "scripts" / "cluster"
#: Runs what is given to --wrap, for each index of --array, as slurmd would; prints an id.
_SBATCH = r"""#!/bin/bash
echo "$@" >> "$LOG"
for word in "$@"; do
  case $previous in --wrap) wrap=$word;; esac
  case $word in --array=0-*) last=${word#--array=0-};; esac
  previous=$word
done
export SLURM_ARRAY_TASK_COUNT=$((last + 1))
for SLURM_ARRAY_TASK_ID in $(seq 0 "${last:-0}"); do
  export SLURM_ARRAY_TASK_ID
  sh -c "$wrap" >&2 || exit 1
done
echo 7
"""


def test_slurm(text: Path, tmp_path: Path) -> None:
    """All parts, then the last step, which depends on them. Other options go to sbatch."""
    sbatch, log, plan = tmp_path / "bin" / "sbatch", tmp_path / "log", tmp_path / "plan.json"
    sbatch.parent.mkdir()
    sbatch.write_text(_SBATCH)
    sbatch.chmod(0o755)
    rewrite.plan_conversion(text, tmp_path / "out").save(plan)
    environment = {
        **os.environ,
        "PATH": f"{sbatch.parent}:{os.environ['PATH']}",
        "LOG": str(log),
        "REWRITE": str(Path(sys.executable).parent / "rewrite"),
    }
    done = subprocess.run(
        [CLUSTER / "slurm.sh", plan, "3", "--partition=io"],
        env=environment, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "7: 3 parts, 7: finish\n"
    assert [f"Part {number}/3: " in done.stderr for number in range(3)] == [True] * 3
    first, last = log.read_text().splitlines()
    assert "--array=0-2" in first
    assert "--dependency=afterok:7" in last
    assert "--partition=io" in first
    assert "--partition=io" in last
    rewrite.convert(text, tmp_path / "local")
    assert tree(tmp_path / "out") == tree(tmp_path / "local")


def _containers() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    jobs = list(yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text()))
    return {job["metadata"]["name"]: (job["spec"], job["spec"]["template"]["spec"]["containers"][0]) for job in jobs}


def test_kubernetes_runs_our_commands() -> None:
    """With options that they have; as many parts as the job has indices."""
    (parts, runner), (_, finisher) = _containers()["rewrite-parts"], _containers()["rewrite-finish"]
    *shell, script = runner["command"]
    assert shell == ["sh", "-c"]
    found = re.fullmatch(r'exec rewrite run (\S+) --part "\$JOB_COMPLETION_INDEX/(\d+)"', script)
    assert found
    assert parts["completionMode"] == "Indexed"
    assert parts["completions"] == parts["parallelism"] == int(found[2])
    assert finisher["command"] == ["rewrite", "finish", found[1]]
    assert {"run", "finish"} <= main.commands.keys()
    for container in (runner, finisher):
        assert container["volumeMounts"] == [{"name": "models", "mountPath": "/models"}]


@pytest.mark.parametrize("name", ["slurm.sh", "kubernetes.yaml"])
def test_the_readme_names_the_files(name: str) -> None:
    """And they are there."""
    assert name in (CLUSTER / "README.md").read_text()
    assert (CLUSTER / name).exists()
