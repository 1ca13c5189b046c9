"""`rewrite try`, and what `verify --try` takes of it: asks an engine, and says what it made of a checkpoint."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

import rewrite
from rewrite.checkpoint.local import io_errors
from rewrite.cli import reports
from rewrite.cli.command_line import Recorded
from rewrite.cli.common import Address, json_option, quiet_option, reporting, say, show, verbose_option
from rewrite.cli.terminal import show_message
from rewrite.errors import UsageError
from rewrite.report import files, tried
from rewrite.schemas import named
from rewrite.trying.engine import EngineError
from rewrite.trying.trial import Question, try_checkpoint
from rewrite.trying.tried import Trial, Tried

_ENGINE = (
    click.option("--engine", metavar="PYTHON", help="The Python that has the engine; without it, this one."),
    click.option(
        "--engine-command", metavar="COMMAND",
        help="What starts the engine's Python, as `docker run ... IMAGE python3`; {checkpoint}: the directory.",
    ),
    click.option(
        "--using", type=click.Choice(["vllm", "sglang", "transformers"]),
        help="Which engine of that Python; without it, the first of these that it has.",
    ),
    click.option(
        "--layers", default="auto", show_default=True, metavar="auto|all|0-3",
        help="auto: one of each kind, the first, the last, and the one whose scales differ most.",
    ),
    click.option(
        "--tensor-parallel", "ranks", type=click.IntRange(1, 64), default=1, show_default=True,
        help="Try each rank of this many, one after the other.",
    ),
    click.option("--trust-remote-code", is_flag=True, help="Let the engine run code of the checkpoint."),
)  # fmt: skip


def engine_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """How to start an engine, and what to ask of it. They come as one :class:`Question`."""
    for option in reversed(_ENGINE):
        function = option(function)
    return function


def question_of(given: dict[str, Any]) -> Question:
    """Takes the values of :func:`engine_options` out of ``given``."""
    python, command = given.pop("engine"), given.pop("engine_command")
    if python is not None and command is not None:
        raise UsageError("--engine and --engine-command are two ways to say the same", hint="give one of them")
    return Question(
        python, command, **{name: given.pop(name) for name in ("using", "layers", "ranks", "trust_remote_code")}
    )


@click.command("try", short_help="Let an engine load CHECKPOINT, and compare.", cls=Recorded)
@click.argument("checkpoint", metavar="CHECKPOINT", type=Address(file_okay=False))
@engine_options
@click.option(
    "--against", metavar="OUT", type=Address(file_okay=False), help="Try OUT, too, which is CHECKPOINT converted."
)
@reports.report_option("a page (FILE.html, FILE.md; needs rewrite[report]), or all numbers, no weights (FILE.json)")
@json_option
@verbose_option
@quiet_option
@click.pass_context
def try_(
    context: click.Context,
    /,
    checkpoint: str,
    against: str | None,
    report_file: Path | None,
    as_json: bool,
    verbose: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Let an engine load CHECKPOINT, and compare what it holds with what the files mean.

    The engine's own loader runs, here or in a container. Exits with 0 when every quantized layer is exact, 1 when one
    is not or the loader refuses the checkpoint, 4 when nothing was learnt. With --against, the exit code is about OUT.
    """
    with reporting(as_json):
        question = question_of(given)
        if report_file is not None and report_file.suffix != ".json":
            files.check(report_file)
        found = try_checkpoint(checkpoint, question, against, progress=progress(quiet))
        note_replaced(found.before[0], quiet)
        if report_file is not None:
            _write(context, found, report_file)
        show(
            lambda: tried.page(found), lambda: named("try", found.to_json()),
            as_json=as_json, quiet=quiet, verbose=verbose,
        )  # fmt: skip
        sys.exit(found.exit_code)


def try_both(found: rewrite.Verification, question: Question, quiet: bool) -> Tried | EngineError:
    """IN and OUT of a verification in the engine. The verification is worth showing where nothing was learnt, too: an
    error is returned."""
    try:
        both = try_checkpoint(found.source, question, found.out, found, progress(quiet))
    except EngineError as error:
        return error
    note_replaced(both.before[0], quiet)
    return both


def progress(quiet: bool) -> Callable[[str], None]:
    return lambda step: None if quiet else show_message(f"{step} ...")


def note_replaced(trial: Trial, quiet: bool) -> None:
    """What a build for CPUs lacks, and this program stood in for."""
    if trial.result["replaced"]:
        say(f"a CPU build of {trial.result['engine']}; replaced: {'; '.join(trial.result['replaced'])}", quiet)


def _write(context: click.Context, found: Tried, path: Path) -> None:
    if path.suffix == ".json":
        with io_errors(path):
            path.write_text(json.dumps(named("try", found.to_json()), indent=1) + "\n", encoding="utf-8")
        return
    sides = [found.before, *([found.after] if found.after else [])]
    names = [Path(side[0].checkpoint).resolve().name for side in sides]
    run = reports.run_of(context, {"checkpoint": names[0]}, [])
    files.write(tried.page(found, (names[0], names[-1]), run), path)
