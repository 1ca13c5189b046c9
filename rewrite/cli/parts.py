"""``plan``, ``run`` and ``finish``: a conversion in parts, on as many machines as see the same directories."""

from __future__ import annotations

import re
import time
from pathlib import Path

import click

import rewrite
from rewrite.cli.common import (
    Address,
    copy_option,
    endpoint_option,
    json_option,
    kv_scales_option,
    now,
    overwrite_option,
    profile_option,
    quiet_option,
    reporting,
    say,
    selection_option,
    show,
    timestamp_option,
    workers_option,
)
from rewrite.cli.conversion_text import render_conversion, render_part, render_planned
from rewrite.cli.terminal import width
from rewrite.cli.watching import progress_bar
from rewrite.schemas import named

_ADDRESS = Address(file_okay=False)
_PLAN = click.Path(path_type=Path, dir_okay=False)
_out_argument = click.argument("out", metavar="[OUT]", type=_ADDRESS, required=False)


def _part(_context: click.Context, _option: click.Parameter, value: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", value)
    if found is None or int(found[1]) >= int(found[2]):
        raise click.BadParameter(f"{value!r} is not I/N with I from 0 to N - 1")
    return int(found[1]), int(found[2])


@click.command()
@click.argument("source", metavar="IN", type=_ADDRESS)
@click.argument("out", metavar="OUT", type=_ADDRESS)
@click.option("--output", type=_PLAN, required=True, metavar="FILE", help="Where the plan goes.")
@profile_option
@selection_option
@kv_scales_option
@overwrite_option
@copy_option
@timestamp_option
@endpoint_option
@json_option
@quiet_option
def plan(
    source: str,
    out: str,
    output: Path,
    profile: str,
    selection: rewrite.Selection,
    kv_scales: rewrite.KvScales,
    overwrite: bool,
    copy: bool,
    timestamp: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Plan the conversion of IN to OUT, to be carried out by `run` and `finish`.

    IN and OUT must have the same paths wherever `run` and `finish` are called.
    """
    with reporting(as_json):
        conversion = rewrite.plan_conversion(
            source, out, profile=profile, selection=selection, kv_scales=kv_scales, overwrite=overwrite, copy=copy,
            created=now() if timestamp else None,
        )  # fmt: skip
        conversion.save(output)
        if as_json:
            show(named("plan", conversion.plan.to_json()))
            return
        for note in conversion.plan.manifest.notes:
            say(note, quiet)
        show(render_planned(conversion.plan, str(output), width()), quiet)


@click.command()
@click.argument("plan_file", metavar="PLAN", type=_PLAN)
@_out_argument
@click.option("--part", required=True, metavar="I/N", callback=_part, help="Part I, from 0, of N parts.")
@workers_option
@endpoint_option
@json_option
@quiet_option
def run(plan_file: Path, out: str | None, part: tuple[int, int], workers: int, as_json: bool, quiet: bool) -> None:
    """Write part I of N of the files of a plan. Parts may run at the same time; a part that was killed may run again.

    All parts must have the same N. OUT appears with `finish` only. A plan with another OUT than the one given is
    refused; it has to be given where the plan replaces it.
    """
    with reporting(as_json, "Run the same part again to resume."):
        started = time.monotonic()
        conversion = rewrite.Conversion.load(plan_file, out)
        with progress_bar(quiet) as bar:
            counts = conversion.run_part(*part, workers, bar.show)
        if as_json:
            show(named("part", {"part": list(part), "bytes": counts.to_json()}))
        else:
            show(render_part(part, counts, time.monotonic() - started, width()), quiet)


@click.command()
@click.argument("plan_file", metavar="PLAN", type=_PLAN)
@_out_argument
@endpoint_option
@json_option
@quiet_option
def finish(plan_file: Path, out: str | None, as_json: bool, quiet: bool) -> None:
    """Publish OUT, once all parts of a plan were run. May be run again.

    A plan with another OUT than the one given is refused; it has to be given where the plan replaces it.
    """
    with reporting(as_json, "OUT is not complete; run the same command to resume."):
        started = time.monotonic()
        conversion = rewrite.Conversion.load(plan_file, out)
        manifest = conversion.finish()
        if as_json:
            show(named("convert", manifest.to_json()))
        else:
            show(render_conversion(manifest, conversion.out, time.monotonic() - started, width()), quiet)
