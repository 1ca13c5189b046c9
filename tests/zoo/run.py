"""Everything that rewrite is asked about an entry of the zoo, through the command line, and what it answers."""

from __future__ import annotations

import json
import re
import shutil
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

import rewrite
from rewrite.cli.commands import main

#: Of the command line: done; a check failed or a loader is affected; usage; refused; reading or writing failed.
DOCUMENTED = frozenset(range(5))


@dataclass(frozen=True)
class Answer:
    """One command: its exit code (None: a traceback), and its closing line, or the error."""

    command: str
    code: int | None
    line: str
    output: str

    @property
    def short(self) -> list[object]:
        return [self.code, self.line]


def ask(command: list[str], shown: str) -> tuple[Answer, str]:
    """Run one command; ``shown`` is how it is written without the machine's paths. Also its standard output."""
    result = CliRunner().invoke(main, command)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return Answer(shown, None, f"traceback: {type(result.exception).__name__}", _where(result)), result.stdout
    return Answer(shown, result.exit_code, _closing(result), result.output), result.stdout


def _where(result: Result) -> str:
    """The frames of a traceback that are ours."""
    assert result.exc_info is not None
    root = Path(rewrite.__file__).parent
    frames = [f for f in traceback.extract_tb(result.exc_info[2]) if Path(f.filename).is_relative_to(root)]
    lines = [f"{Path(f.filename).relative_to(root.parent)}:{f.lineno} {f.name}: {f.line}" for f in frames]
    return "\n".join([*lines, "".join(traceback.format_exception_only(result.exception)).strip()])


def _closing(result: Result) -> str:
    """The line that says what came of it, without sizes that depend on the filesystem, times and folders."""
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    if errors:
        return _without_paths(errors[0])
    lines = [line for line in result.stdout.splitlines() if line.strip()]
    told = [line for line in lines if line.startswith(("Converted: ", "Nothing to do: ", "Would write "))]
    return _without_paths((told or lines or [""])[-1])


def _without_paths(line: str) -> str:
    return re.sub(r"( equals the input) \(.*\)|/\S*/(?=(?:IN|OUT)\b)", r"\1", line).strip()


def outcomes(source: Path, scratch: Path) -> tuple[dict[str, Any], list[str]]:
    """What comes of every command on ``source``, for the table, and the sentences about what must not be."""
    found: dict[str, Any] = {}
    faults: list[str] = []
    for groups in rewrite.SELECTIONS:
        promised = _inspect(source, groups, found, faults)
        for profile in rewrite.PROFILES:
            name = f"{profile} --groups {groups}"
            answers = list(_convert(source, scratch, profile, groups))
            found[name] = {answer.command: answer.short for answer in answers}
            faults += [f"{name}: {fault}" for fault in _faults(answers, promised.get(profile))]
    return found, faults


def _inspect(source: Path, groups: str, found: dict[str, Any], faults: list[str]) -> dict[str, bool]:
    """Fill in what inspect says. Returns by profile whether it says that convert refuses it."""
    answer, _ = ask(["inspect", str(source), "--groups", groups], "inspect")
    as_json, text = ask(["inspect", str(source), "--groups", groups, "--json"], "inspect --json")
    name = f"inspect --groups {groups}"
    for each in (answer, as_json):
        faults += [f"{name}: {fault}" for fault in _undocumented(each)]
    found[name] = {"inspect": [answer.code, answer.line]}
    if answer.code not in (0, 1) or as_json.code not in (0, 1):
        return dict.fromkeys(rewrite.PROFILES, True) if answer.code == 3 else {}
    value = json.loads(text)
    found[name]["schemes"] = value["schemes"]
    loaders: dict[str, list[str]] = {}
    for row in value["loaders"]:
        loaders.setdefault(_kinds(row), []).append(f"{row['loader']} {row['versions']}")
    found[name]["loaders"] = loaders
    found[name]["findings"] = sorted({finding["what"] for finding in value["findings"]})
    found[name]["refusals"] = value["refusals"]
    return {profile: profile in value["refusals"] for profile in rewrite.PROFILES}


def _kinds(row: dict[str, Any]) -> str:
    """As it is, then after each profile: a dash where convert refuses."""
    converted = [f"{name} {outcome['kind'] if outcome else '-'}" for name, outcome in row["converted"].items()]
    return "; ".join([row["as_is"]["kind"], *converted])


def _convert(source: Path, scratch: Path, profile: str, groups: str) -> Iterator[Answer]:
    out = scratch / f"OUT-{profile}-{groups}"
    options = ["--profile", profile, "--groups", groups]
    yield ask(["convert", str(source), str(out), *options, "--dry-run"], "plan")[0]
    converted, _ = ask(["convert", str(source), str(out), *options], "convert")
    yield converted
    if converted.code == 0:
        yield ask(["verify", str(source), str(out), "--device", "cpu"], "verify")[0]
    shutil.rmtree(out, ignore_errors=True)


def _undocumented(answer: Answer) -> Iterator[str]:
    if answer.code is None:
        yield f"{answer.command}: a traceback\n{answer.output}"
    elif answer.code not in DOCUMENTED:
        yield f"{answer.command}: exit code {answer.code}\n{answer.output}"


def _faults(answers: list[Answer], refused: bool | None) -> Iterator[str]:
    for answer in answers:
        yield from _undocumented(answer)
    plan, convert, *verify = answers
    if plan.code != convert.code:
        yield f"plan exits with {plan.code}, convert with {convert.code}: {convert.line}"
    if refused is not None and convert.code is not None and refused != (convert.code == 3):
        yield f"inspect says {'refused' if refused else 'not refused'}, convert: {convert.code} {convert.line}"
    for answer in verify:
        if answer.code not in (0, None):
            yield f"convert exits with 0, verify with {answer.code}\n{answer.output}"
