"""The command that `inspect` names: it runs as it is printed, and repairs what it was named for."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import rewrite
from rewrite.cli.commands import main
from rewrite.inspection.advice import Advice, advise, repair_command
from rewrite.loaders.outcome import Outcome
from tests.support import FIXTURES

NAMES = sorted(path.parent.name for path in FIXTURES.glob("*/config.json"))
VL = FIXTURES / "llmcompressor-qwen3_5-vl"
#: All, each end of what is known, and one that no profile serves together with the others.
LOADERS = ((), ("vllm@0.19.1",), ("vllm@0.32.0",), ("sglang@0.5.9",), ("sglang@0.5.23", "transformers"))


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def named(*words: object) -> tuple[list[str] | None, list[str]]:
    """The words of the command that is printed, and the loaders that it is not for. JSON says the same."""
    shown = run("inspect", *words).stdout.splitlines()
    lines = [line for line in shown if line.startswith("  rewrite convert ")]
    advice = json.loads(run("inspect", "--json", *words).stdout)["advice"]
    assert [line.strip() for line in lines] == ([] if advice["command"] is None else [advice["command"]])
    return (shlex.split(lines[0]) if lines else None), advice["unserved"]


@pytest.mark.parametrize("groups", ["qkvz", "all"])
@pytest.mark.parametrize("name", NAMES)
def test_the_command_that_is_named_repairs(name: str, groups: str, tmp_path: Path) -> None:
    """For the very loaders: of OUT, only those that were named as unserved are affected."""
    for number, loaders in enumerate(LOADERS):
        options = [word for loader in loaders for word in ("--for", loader)] or ["--all-engines"]
        command, unserved = named(FIXTURES / name, "--groups", groups, *options)
        if command is None:
            continue
        out = tmp_path / str(number)
        words = [str(out) if word == "OUT" else word for word in command[1:]]
        assert run(*words).exit_code == 0
        chosen = [row for loader in loaders for row in rewrite.find_loaders(loader)] or list(rewrite.LOADERS)
        before = rewrite.inspect_checkpoint(FIXTURES / name, selection="all" if groups == "all" else "qkvz")
        after = rewrite.inspect_checkpoint(out, selection="all" if groups == "all" else "qkvz")
        left = advise(after, chosen)
        affected = {row.engine for row in after.affected(chosen)}
        unknown = {row.engine for row in after.rows if row.engine in chosen and row.as_is.kind == "not known"}
        kinds = {row.engine: row.as_is for row in before.rows}
        better = [row for row in after.rows if row.engine in chosen and row.as_is.severity < kinds[row.engine].severity]
        assert better, "some engine is repaired"
        rounded = {row.engine for row in before.rows for each in row.converted.values() if each and _rounds(each)}
        assert affected <= _named_in(unserved, chosen) <= affected | unknown | rounded
        assert left.needed == bool(affected)


def _rounds(outcome: Outcome) -> bool:
    """What a conversion costs cannot be seen in OUT alone."""
    return outcome.detail.startswith("the conversion rounds")


def _named_in(unserved: Sequence[str], chosen: Sequence[rewrite.Loader]) -> set[rewrite.Loader]:
    """``SGLang 0.5.9 to 0.5.14``: the rows from its first version to its last."""
    found = set()
    for text in unserved:
        name, _, versions = text.partition(" ")
        rows = [row for row in rewrite.LOADERS if row.name == name]
        ends = [i for i, row in enumerate(rows) if versions.startswith(row.first)]
        begin = max(ends, key=lambda i: len(rows[i].first))
        until = next(i for i, row in enumerate(rows) if i >= begin and rows[i].versions_from(rows[begin]) == versions)
        found |= set(rows[begin : until + 1])
    return found & set(chosen)


def test_a_command_is_named_for_most_checkpoints() -> None:
    """Else the test above would show nothing."""
    commands = [named(FIXTURES / name, "--groups", "all")[0] for name in NAMES]
    assert sum(command is not None for command in commands) >= 12


@pytest.mark.parametrize("name", ["with space", "quote's", "-x", "$(touch x)", "Ünï"])
def test_names_are_quoted_for_a_shell(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the command still runs."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(VL, tmp_path / name)
    command, _ = named("--", name)
    assert command is not None
    assert run(*(word.replace("OUT", "there") for word in command[1:])).exit_code == 0
    assert (tmp_path / "there" / "config.json").exists()


def test_a_name_that_cannot_be_shown_is_not(tmp_path: Path) -> None:
    place = tmp_path / "evil\x1b[2J\nname"
    shutil.copytree(VL, place)
    assert named(place)[0] == ["rewrite", "convert", "IN", "OUT"]


def test_no_command_where_no_profile_is_advised() -> None:
    inspection = rewrite.inspect_checkpoint(VL)
    assert repair_command(inspection, Advice(needed=False)) is None
    rows = tuple(replace(row, outcomes={"as it is": row.as_is}) for row in inspection.rows)
    everywhere = replace(inspection, rows=rows, refusals=dict.fromkeys(rewrite.PROFILES, "refused"))
    assert repair_command(everywhere, advise(everywhere, rewrite.LOADERS)) is None


def test_the_server_that_was_named_is_named_again() -> None:
    advice = advise(inspection := rewrite.inspect_checkpoint(VL), rewrite.LOADERS)
    command = repair_command(replace(inspection, path="s3://bucket/in"), advice, "--endpoint-url", "http://here:9000")
    assert command == "rewrite convert s3://bucket/in OUT --endpoint-url http://here:9000"
