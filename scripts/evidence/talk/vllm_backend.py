"""lm-evaluation-harness through its back end `vllm`, on CPU: prints JSON, by engine and name of the folder.

    PYTHONPATH=scripts:scripts/evidence:. .venv/bin/python -m talk.vllm_backend FOLDER...

The environments are those of `scripts/evidence.sh talk`. What the harness needs more lies in a folder of its
own, last on PYTHONPATH: nothing that vLLM imports is replaced by another version. One process for each folder, as an
engine leaves state behind.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from engines.envs import BASE, HOME, Environment, environment
from engines.known import Engine
from environments import SOURCES_TOO, overlay, read_pins
from loader_matrix.talk import ENGINES

HERE = Path(__file__).parent
#: dill, with which `datasets` hashes, takes modules for installed ones by this name of their folder.
HARNESS = HOME / "lm_eval" / "site-packages"


def missing(engine: Engine) -> list[str]:
    """The pins of the harness that the environment of an engine has no version of; the harness itself comes first."""
    present = {_name(pin) for pin in (*read_pins(BASE), *engine.pins)}
    pins = [pin for pin in read_pins(HERE / "lm_eval.txt") if _name(pin) not in present]
    return sorted(pins, key=lambda pin: _name(pin) != "lm-eval")


def _name(pin: str) -> str:
    return re.sub(r"[-_.]+", "-", pin.partition("==")[0]).lower()


def variables(where: Environment) -> dict[str, str]:
    """Those of the engine; the harness is found last."""
    path = os.pathsep.join([where.variables["PYTHONPATH"], str(HARNESS)])
    return where.variables | {"HF_DATASETS_OFFLINE": "1", "PYTHONPATH": path}


def judged(engine: Engine, folders: Sequence[str]) -> dict[str, dict[str, float]]:
    """The results of an engine, by the names of the folders."""
    where = environment(engine)
    overlay(HARNESS, where.python, missing(engine), how=SOURCES_TOO)
    found: dict[str, dict[str, float]] = {}
    for folder in folders:
        words = ("--vllm", Path(folder).absolute())
        done = replace(where, variables=variables(where)).run("talk.judge", *words, stdout=subprocess.PIPE, check=True)
        found |= json.loads(done.stdout.splitlines()[-1])  # before it is what vLLM prints
    return found


if __name__ == "__main__":
    print(json.dumps({f"vLLM {each.version}": judged(each, sys.argv[1:]) for each in ENGINES}))
