"""The command line: output, exit codes, signals, help texts."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import rewrite
from rewrite.cli.commands import main
from rewrite.cli.progress import progress_bar
from tests.support import FIXTURES, README, tree, unfolded


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_convert_says_what_it_did(vl: Path, tmp_path: Path) -> None:
    """Two sentences; on stderr, before anything is written, the profile and what it means."""
    result = run("convert", vl, tmp_path / "out")
    assert result.exit_code == 0
    chosen, kernels = result.stderr.split("note: ")[1:]
    assert chosen.startswith("profile exact, chosen for vLLM") and kernels.startswith("These engines")
    first, second = unfolded(result.stdout).split(f" {tmp_path / 'out'}: ")
    assert first == "Converted: 6 shared scales in 3 fused groups made explicit, 4 of 7 shards rewritten."
    assert re.fullmatch(r"1\.95 MB in .+ s; (.+) shared, (.+) copied, (.+) written\.", second)


def test_convert_with_nothing_to_do_says_so(vl: Path, tmp_path: Path) -> None:
    """And still makes the directory that the next step of a pipeline expects."""
    run("convert", vl, tmp_path / "once")
    result = run("convert", tmp_path / "once", tmp_path / "twice")
    assert result.exit_code == 0
    assert result.stdout.startswith("Nothing to do")
    assert tree(tmp_path / "once") == tree(tmp_path / "twice")


def test_dry_run_shows_the_plan_and_writes_nothing(text: Path, tmp_path: Path) -> None:
    """In short: how many layers of each kind change; with -v each group with the scale of each partition."""
    short = run("convert", text, tmp_path / "out", "--dry-run")
    assert "Fused layers that change: 2 in_proj_qkvz" in unfolded(short.stdout)
    assert "model.layers.0" not in short.stdout
    result = run("convert", text, tmp_path / "out", "--dry-run", "-v")
    assert result.exit_code == 0
    above, groups, _, below = result.stdout.split("\n\n")
    groups = groups.removeprefix("Scales:\n")
    assert "\nnote: " in above
    names = [f"model.layers.{i}.linear_attn.in_proj_qkvz" for i in (0, 1)]
    head, *rows = re.split(f"({'|'.join(map(re.escape, names))})", unfolded(groups))
    assert head.split() == ["scale", "of", "each", "partition", "q", "k", "v", "z"]
    assert rows[::2] == names and [len(row.split()) for row in rows[1::2]] == [4, 4]
    size = r"Would write 246 kB \(.+ kB can be shared, not copied, where the filesystem can\)"
    assert re.match(size, unfolded(below))
    assert list(tmp_path.iterdir()) == []


def test_dry_run_with_nothing_to_do(text: Path, tmp_path: Path) -> None:
    """Says so, too."""
    run("convert", text, tmp_path / "once")
    result = run("convert", tmp_path / "once", tmp_path / "out", "--dry-run")
    assert "Nothing to do" in result.stdout


def test_json_is_one_document_on_stdout(text: Path, tmp_path: Path) -> None:
    """Manifest, or plan with --dry-run."""
    plan = run("convert", text, tmp_path / "out", "--dry-run", "--json")
    assert rewrite.Plan.from_json(json.loads(plan.stdout)).manifest.changed
    manifest = run("convert", text, tmp_path / "out", "--json")
    returned = json.loads(manifest.stdout)
    assert returned.pop("schema") == "urn:rewrite:convert:1"
    size = sum(len(data) for data in tree(tmp_path / "out").values())
    assert sum(returned.pop("bytes").values()) == size
    assert returned == json.loads((tmp_path / "out" / "rewrite_manifest.json").read_text())


def test_quiet_prints_nothing(text: Path, tmp_path: Path) -> None:
    """Not even notes."""
    result = run("convert", text, tmp_path / "out", "--quiet")
    assert (result.exit_code, result.output) == (0, "")


def test_timestamp_is_noted_on_request(text: Path, tmp_path: Path) -> None:
    """UTC, ISO 8601."""
    run("convert", text, tmp_path / "out", "--timestamp")
    created = json.loads((tmp_path / "out" / "rewrite_manifest.json").read_text())["created"]
    assert created.endswith("+00:00")


@pytest.mark.parametrize(
    ("code", "arguments", "message"),
    [
        (2, ["convert"], "Missing argument"),
        (2, ["convert", "IN", "OUT", "--profile", "nonesuch"], "nonesuch"),
        (2, ["convert", "IN", "OUT", "--workers", "0"], "--workers"),
        (2, ["convert", "IN", "IN/sub"], "overlap"),
        (3, ["convert", "HALF", "OUT"], "config.json is missing"),
        (4, ["convert", "GONE", "OUT"], "no checkpoint directory"),
        (4, ["convert", "IN", "THERE"], "exists"),
    ],
)
def test_exit_codes(code: int, arguments: list[str], message: str, text: Path, tmp_path: Path) -> None:
    """As documented: 2 usage, 3 refused, 4 input and output."""
    (tmp_path / "there").mkdir()
    names = {"IN": text, "OUT": tmp_path / "out", "GONE": tmp_path / "gone", "THERE": tmp_path / "there"}
    names["HALF"] = tmp_path / "there"
    result = run(*(str(names.get(a.split("/")[0], a)) + a[len(a.split("/")[0]) :] for a in arguments))
    assert result.exit_code == code
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_errors_are_json_too_when_asked_for(tmp_path: Path) -> None:
    """A pipeline can read why."""
    result = run("convert", tmp_path, tmp_path / "out", "--json")
    error = json.loads(result.stdout)["error"]
    assert (result.exit_code, error["exit_code"], error["type"]) == (3, 3, "CheckpointError")
    assert "config.json" in error["what"]


def test_hostile_names_do_not_reach_the_terminal(copy: Path, tmp_path: Path) -> None:
    """Escape sequences in a tensor name are printed as escapes."""
    index = copy / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    value["weight_map"]["\x1b[31mred\nnext"] = next(iter(value["weight_map"].values()))
    index.write_text(json.dumps(value))
    result = run("convert", copy, tmp_path / "out")
    assert result.exit_code == 3
    assert "\x1b" not in result.stderr and "\\x1b[31mred\\nnext" in result.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_cleanly_and_the_next_run_resumes(number: int, code: int, vl: Path, tmp_path: Path) -> None:
    """One line, no traceback, nothing under OUT."""
    out = tmp_path / "out"
    script = (
        "import os, signal, sys, time; from rewrite.cli.commands import main; slow = os.fsync\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job inherits "ignore"
        "os.fsync = lambda fd: (time.sleep(0.3), slow(fd))\n"
        "main(sys.argv[1:])"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, "convert", str(vl), str(out)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(README.parent)},
    )
    deadline = time.monotonic() + 20
    while not list(tmp_path.glob(".out.rewrite-*/out/*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(number)
    _, stderr = child.communicate(timeout=20)
    assert child.returncode == code
    assert stderr.endswith(f"Interrupted. {out} is not complete; run the same command to resume.\n")
    assert not out.exists()
    assert run("convert", vl, out).exit_code == 0


def test_python_dash_m() -> None:
    """The module runs as a program."""
    done = subprocess.run([sys.executable, "-m", "rewrite", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"rewrite, version {rewrite.__version__}\n"


def test_progress_bar_on_a_terminal(monkeypatch: Any) -> None:
    """In bytes, on stderr; --quiet turns it off."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress_bar(quiet=False) as bar:
        assert bar.show is not None
        bar.name("bytes")
        bar.show(400, 1000)
        bar.show(1000, 1000)
    with progress_bar(quiet=True) as bar:
        assert bar.show is None
        bar.name("bytes")


@pytest.mark.parametrize("command", main.commands.values(), ids=lambda c: c.name)
def test_every_option_has_a_help_text(command: Any) -> None:
    """That every option is in the command reference is tested in test_documents.py."""
    for parameter in command.params:
        if parameter.param_type_name == "option":
            assert parameter.help, parameter.name


@pytest.mark.parametrize("command", main.commands.values(), ids=lambda c: c.name)
def test_every_command_takes_quiet_and_verbose(command: Any) -> None:
    options = {word for parameter in command.params for word in parameter.opts}
    assert {"-q", "--quiet", "-v", "--verbose", "--json"} <= options


def test_no_summary_is_cut() -> None:
    """click cuts what does not fit, with dots."""
    shown = run("--help").stdout
    assert len(main.commands) == len([line for line in shown.splitlines() if re.match(r"  \w+ +[A-Z].*\.$", line)])
    assert "..." not in shown.partition("Commands:")[2]


def test_a_file_stands_for_its_folder(text: Path) -> None:
    """Said on stderr."""
    result = run("inspect", text / "config.json")
    assert result.stdout == run("inspect", text).stdout
    assert f"{text} is taken" in unfolded(result.stderr)


def test_a_folder_above_the_checkpoint(text: Path, tmp_path: Path) -> None:
    (tmp_path / "above" / "model").mkdir(parents=True)
    (tmp_path / "above" / "model" / "config.json").write_text("{}")
    result = run("inspect", tmp_path / "above")
    assert result.exit_code == 3
    assert "config.json is missing" in result.stderr
    assert f"did you mean {tmp_path / 'above'}/model?" in unfolded(result.stderr)


@pytest.mark.parametrize(
    ("words", "meant"), [(("--for", "vlm"), "did you mean vLLM?"), (("--platform", "h101"), "did you mean h100?")]
)
def test_a_slip_is_guessed(words: tuple[str, str], meant: str, text: Path) -> None:
    result = run("inspect", text, *words)
    assert (result.exit_code, meant in result.stderr) == (2, True)


@pytest.mark.parametrize("name", sorted(path.parent.name for path in FIXTURES.glob("*/config.json")))
def test_the_answer_fits_a_screen(name: str) -> None:
    """24 lines of 80 columns, but for what is to be copied."""
    lines = run("inspect", FIXTURES / name).stdout.splitlines()
    assert len(lines) <= 24
    assert all(len(line) <= 80 or line.startswith("  rewrite ") for line in lines)
