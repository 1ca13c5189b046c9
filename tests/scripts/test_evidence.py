"""The entry point of scripts/evidence: every name runs, and the zoo can be made again from its entries."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.zoo.rebuild import names, read_entry

pytest.importorskip("tomllib")  # the scripts are for Python 3.11

SCRIPT = ROOT / "scripts" / "evidence.sh"
LISTED = re.findall(r"^#   (\w+) ", SCRIPT.read_text(), re.MULTILINE)


def run(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run([str(SCRIPT), *words], env=environment, capture_output=True, text=True, check=False)


def test_without_a_name_all_are_listed() -> None:
    done = run()
    assert done.returncode == 2
    assert "scripts/evidence.sh NAME" in done.stderr
    assert all(name in done.stderr for name in LISTED)


@pytest.mark.parametrize("name", ["loader_matrix", "kernel_choice"])
def test_what_is_listed_has_options(name: str) -> None:
    assert name in LISTED
    done = run(name, "--help")
    assert done.returncode == 0, done.stderr
    assert f"scripts/evidence.sh {name}" in done.stdout
    assert "--ci" in done.stdout


def test_every_listed_name_is_a_case_of_the_script() -> None:
    cases = SCRIPT.read_text().partition("case $name in")[2]
    assert {name for name in LISTED if not re.search(rf"\b{name}\b", cases)} == set()


def test_every_entry_of_the_zoo_names_a_call_that_is_there() -> None:
    modules = {path.stem.removeprefix("by_"): path.read_text() for path in (ROOT / "scripts").rglob("by_*.py")}
    packages = {"llmcompressor": "llmcompressor", "nvidia-modelopt": "modelopt", "amd-quark": "quark"}
    packages |= {"auto-round": "autoround", "torchao": "torchao"}
    models = (ROOT / "scripts" / "evidence" / "producers" / "models.py").read_text()
    for name in names():
        entry = read_entry(name)
        assert f"\ndef {entry['call']}(" in modules[packages[entry["producer"].split()[0]]], name
        assert f'"{entry["model"].removesuffix("+mtp")}":' in models, name


def test_a_record_that_nothing_was_added_to_keeps_its_date(tmp_path: Path) -> None:
    from loader_matrix.results import GENERATIONS

    book = replace(GENERATIONS, path=tmp_path / "record.json")
    text = GENERATIONS.path.read_text().replace(f'"date": "{GENERATIONS.read().date}"', '"date": "2001-02-03"')
    book.path.write_text(text)
    assert book.add([]).date == "2001-02-03"
    assert book.path.read_text() == text
