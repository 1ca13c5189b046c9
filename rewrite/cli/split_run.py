"""``plan``, ``run`` and ``finish``: a conversion in parts, on as many machines as see the same directories."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import click

import rewrite
from rewrite.cli.common import (
    Address,
    conversion_options,
    endpoint_option,
    json_option,
    quiet_option,
    reporting,
    say_all,
    show,
    verbose_option,
    workers_option,
)
from rewrite.cli.progress import progress_bar
from rewrite.loaders.asked import Asked
from rewrite.report import converted
from rewrite.schemas import named
from rewrite.writing.tasks import part_of

_PLAN = click.Path(path_type=Path, dir_okay=False)
_out_argument = click.argument("out", metavar="[OUT]", type=Address(file_okay=False), required=False)


def _part(_context: click.Context, _option: click.Parameter, value: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", value)
    if found is None or int(found[1]) >= int(found[2]):
        raise click.BadParameter(f"{value!r} is not I/N with I from 0 to N - 1")
    return int(found[1]), int(found[2])


@click.command()
@conversion_options
@click.option("--output", type=_PLAN, required=True, metavar="FILE", help="Where the plan goes.")
@endpoint_option
@json_option
@verbose_option
@quiet_option
def plan(
    source: str,
    out: str,
    output: Path,
    as_json: bool,
    verbose: bool,
    quiet: bool,
    asked: Asked,
    platform: str,
    **how: Any,
) -> None:
    """Plan the conversion of IN to OUT, for `run` and `finish`.

    IN and OUT must have the same paths wherever `run` and `finish` are called.
    """
    with reporting(as_json):
        conversion = rewrite.plan_conversion(source, out, engines=asked.engines, platform=platform, **how)
        conversion.save(output)
        say_all(conversion.plan, quiet)
        show(
            lambda: converted.plan_written(conversion.plan, str(output)),
            lambda: named("plan", conversion.plan.to_json()),
            as_json=as_json, quiet=quiet, verbose=verbose,
        )  # fmt: skip


@click.command()
@click.argument("plan_file", metavar="PLAN", type=_PLAN)
@_out_argument
@click.option("--part", required=True, metavar="I/N", callback=_part, help="Part I, from 0, of N parts.")
@workers_option
@endpoint_option
@json_option
@verbose_option
@quiet_option
def run(
    plan_file: Path, out: str | None, part: tuple[int, int], workers: int, as_json: bool, verbose: bool, quiet: bool
) -> None:
    """Write part I of N of the files of a plan.

    Parts may run at the same time; a part that was killed may run again. All parts must have the same N. OUT appears
    with `finish` only. A plan with another OUT than the one given is refused; it has to be given where the plan
    replaces it.
    """
    with reporting(as_json, "Run the same part again to resume."):
        started = time.monotonic()
        conversion = rewrite.Conversion.load(plan_file, out)
        with progress_bar(quiet) as bar:
            counts = conversion.run_part(*part, workers, bar.show)
        show(
            lambda: converted.part_written(
                part, part_of(conversion.plan.jobs, *part), counts, time.monotonic() - started
            ),
            lambda: named("part", {"part": list(part), "bytes": counts.to_json()}),
            as_json=as_json, quiet=quiet, verbose=verbose,
        )  # fmt: skip


@click.command()
@click.argument("plan_file", metavar="PLAN", type=_PLAN)
@_out_argument
@endpoint_option
@json_option
@verbose_option
@quiet_option
def finish(plan_file: Path, out: str | None, as_json: bool, verbose: bool, quiet: bool) -> None:
    """Publish OUT, once all parts of a plan were run. May be run again.

    A plan with another OUT than the one given is refused; it has to be given where the plan replaces it.
    """
    with reporting(as_json, "OUT is not complete; run the same command to resume."):
        started = time.monotonic()
        conversion = rewrite.Conversion.load(plan_file, out)
        manifest = conversion.finish()
        show(
            lambda: converted.converted(manifest, conversion.out, time.monotonic() - started),
            lambda: named("convert", manifest.to_json()),
            as_json=as_json, quiet=quiet, verbose=verbose,
        )  # fmt: skip
