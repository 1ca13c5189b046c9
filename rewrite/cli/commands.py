"""The command line: parse, call, render, exit code. No logic.

Exit codes: 0 done; 1 a check failed; 2 usage; 3 the checkpoint is refused; 4 reading or writing failed; 130 and 143 for
SIGINT and SIGTERM, as shells have them.
"""

from __future__ import annotations

import atexit
import gc
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

import rewrite
from rewrite.checkpoint.local import io_errors
from rewrite.cli import cards, reports, split_run, trying
from rewrite.cli.checked import CheckBefore
from rewrite.cli.command_line import Recorded
from rewrite.cli.common import (
    Address,
    cluster_option,
    conversion_options,
    endpoint_option,
    endpoint_words,
    executor_of,
    groups_option,
    json_option,
    quiet_option,
    reporting,
    say,
    say_all,
    show,
    show_error,
    verbose_option,
    workers_option,
)
from rewrite.cli.engines import asked_words, for_option, made_for, platform_option
from rewrite.cli.progress import Completed, progress_bar, reading_bar
from rewrite.inspection.advice import advise, next_command, repair_command
from rewrite.integrations import attestation
from rewrite.integrations.remote import RemoteStorage
from rewrite.ledger.fault import SEVERITIES, Severity
from rewrite.loaders.asked import Asked
from rewrite.report import converted, files, inspected, machine, verified
from rewrite.schemas import named
from rewrite.trying.engine import EngineError
from rewrite.trying.trial import Question
from rewrite.trying.tried import Tried
from rewrite.wording import count, nbytes

_ADDRESS = Address(file_okay=False)


class _Rows(click.ParamType[int | None]):
    """A number of rows, or all of them."""

    name = "rows"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        return None if value is None or value == "all" else click.IntRange(1).convert(value, param, ctx)


class _InOrder(click.Group):
    """Its commands in the order in which they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_InOrder, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(rewrite.__version__, "-V", "--version", prog_name="rewrite")
def main() -> None:
    """Repair quantized model checkpoints offline.

    Inference engines fuse projections when they load a model. Where several partitions of a fused layer share one
    scale, some engines read it wrong. `convert` writes a checkpoint with an explicit scale for every partition.

    Begin with: rewrite inspect CHECKPOINT. It names the command that repairs it.
    """
    # A checkpoint of 300,000 tensors is made of as many small objects, none of them a cycle: seldom look for these, and
    # not at the end of the process.
    gc.set_threshold(200_000)
    atexit.register(gc.freeze)


@main.command(short_help="Say which engines serve CHECKPOINT right.", cls=Recorded)
@click.argument("checkpoint", metavar="CHECKPOINT", type=_ADDRESS)
@for_option
@platform_option(rewrite.DEFAULT_PLATFORM)
@groups_option
@click.option(
    "--weights", is_flag=True, help="Also read every weight: NaN codes, rows of zeros, codes that are too small."
)
@click.option(
    "--fail-on",
    "level",
    type=click.Choice(SEVERITIES),
    default="precision",
    show_default=True,
    help="Exit with 1 from this on: garbled output, engines that fail, lost precision, what is not known.",
)
@workers_option
@reports.report_option(f"it {reports.AS_PAGE}")
@endpoint_option
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "json", "sarif", "junit"]),
    default="text",
    show_default=True,
    help="Of what is printed; sarif and junit are for pipelines.",
)
@json_option
@verbose_option
@quiet_option
@click.pass_context
def inspect(
    context: click.Context,
    checkpoint: str,
    asked: Asked,
    platform: str,
    selection: rewrite.Selection | None,
    weights: bool,
    level: Severity,
    workers: int,
    form: str,
    report_file: Path | None,
    as_json: bool,
    verbose: bool,
    quiet: bool,
) -> None:
    """Say what CHECKPOINT is, and what engines make of its fused groups.

    CHECKPOINT is a directory, a model on the Hugging Face hub (org/name[@revision], hf://org/name) or lies in a bucket
    (s3://bucket/prefix). Reads headers, config and scales only. Exits with 0 when no engine of --for is affected and
    nothing is wrong, else with 1: see --fail-on.
    """
    as_json = as_json or form == "json"
    with reporting(as_json):
        if report_file is not None:
            files.check(report_file)
        storage = rewrite.open_storage(checkpoint)
        slow = weights and not isinstance(storage, RemoteStorage)
        with reading_bar(storage), progress_bar(quiet or not slow) as bar:
            bar.name("weights")
            every = as_json or verbose or report_file is not None  # these show what each profile gives
            found = rewrite.inspect_checkpoint(
                storage, selection=selection, weights=weights, platform=platform,
                enough_for=None if every else asked.engines, workers=workers, progress=bar.show,
            )  # fmt: skip
        advice, assumptions = advise(found, asked.engines), asked.assumptions(platform)
        place = reports.place_of(storage)
        words = asked_words(asked, platform)
        options = (*words, *endpoint_words(context))
        command = repair_command(found, advice, *options)
        if report_file is not None:
            run = reports.run_of(context, {"checkpoint": place.name}, assumptions)
            public = replace(found, path=place.name)
            published = repair_command(public, advice, *words) or next_command(public, advice, *words)
            files.write(inspected.page(found, asked.engines, advice, published, place, run), report_file)
        for line in [*_traffic_lines(storage, found.nbytes), *assumptions]:
            say(line, quiet)
        if form == "sarif" and not as_json:
            click.echo(json.dumps(machine.sarif(found, asked.engines, command), indent=2))
        elif form == "junit" and not as_json:
            click.echo(machine.junit(found, asked.engines, level))
        else:
            said = {"advice": {**advice.to_json(), "command": command}, "assumptions": assumptions}
            show(
                lambda: inspected.page(
                    found, asked.engines, advice, command or next_command(found, advice, *options),
                    replace(place, name=found.path),
                ),
                lambda: named("inspect", {**found.to_json(), **said, **_traffic(storage)}),
                as_json=as_json, quiet=quiet, verbose=verbose,
            )  # fmt: skip
        sys.exit(int(found.fails_at(level, asked.engines)))


@main.command(short_help="Write IN, repaired, to the new directory OUT.")
@conversion_options
@click.option("--dry-run", is_flag=True, help="Show the plan; write nothing.")
@workers_option
@cluster_option
@click.option(
    "--verify", "verified_first", is_flag=True, help="Verify the output first; publish nothing that is not verified."
)
@click.option("--create-pr", is_flag=True, help="Make a pull request; OUT is a model on the hub.")
@endpoint_option
@json_option
@verbose_option
@quiet_option
def convert(
    source: str,
    out: str,
    dry_run: bool,
    workers: int,
    cluster: str | None,
    create_pr: bool,
    verified_first: bool,
    as_json: bool,
    verbose: bool,
    quiet: bool,
    asked: Asked,
    platform: str,
    **how: Any,
) -> None:
    """Write the checkpoint IN to the new directory OUT, repaired for the engines of --for.

    IN may also be a model on the Hugging Face hub (org/name, hf://org/name) or lie in a bucket (s3://bucket/prefix). So
    may OUT: hf://org/name, where a new model is made private, or s3://bucket/prefix.

    OUT is absent or complete, never in between; after an interruption the same command resumes. Tensors that need no
    change stay byte for byte; where the filesystem can, OUT shares their disk blocks with IN. A checkpoint with nothing
    to do is copied as it is.
    """
    with reporting(as_json, f"{out} is not complete; run the same command to resume."):
        started = time.monotonic()
        if dry_run:
            checkpoint = rewrite.open_checkpoint(source)
            plan = rewrite.make_plan(
                checkpoint, how["profile"], how["selection"], how["kv_scales"], asked.engines, platform
            )
            show(
                lambda: converted.planned(plan, reports.headline_of(checkpoint)),
                lambda: named("plan", plan.to_json()),
                as_json=as_json, quiet=quiet, verbose=verbose,
            )  # fmt: skip
            return
        check = CheckBefore(out, asked, platform, workers) if verified_first else None
        with progress_bar(quiet) as bar, executor_of(cluster) as executor:
            manifest = rewrite.convert(
                source, out, workers=workers, progress=bar.show, executor=executor, create_pr=create_pr,
                engines=asked.engines, platform=platform, on_plan=lambda plan: say_all(plan, quiet), check=check, **how,
            )  # fmt: skip
        found = None if check is None else check.result(source)
        show(
            lambda: converted.converted(manifest, out, time.monotonic() - started),
            lambda: named("convert", {**manifest.to_json(), **({"verification": found.to_json()} if found else {})}),
            as_json=as_json, quiet=quiet, verbose=verbose,
        )  # fmt: skip
        if found is not None and not as_json:
            show(lambda: verified.page(found, brief=True), dict, as_json=False, quiet=quiet)


@main.command(short_help="Prove that OUT is IN converted, and who serves it.", cls=Recorded)
@click.argument("source", metavar="IN", type=_ADDRESS)
@click.argument("out", metavar="OUT", type=_ADDRESS)
@click.option("--device", default="auto", show_default=True, help="Where to multiply: auto, cpu, cuda or cuda:N.")
@click.option(
    "--tokens", type=click.IntRange(1, 4096), default=rewrite.DEFAULT_TOKENS, show_default=True,
    help="Activations for each group.",
)  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed for the random activations.")
@click.option(
    "--rows", type=_Rows(), default=str(rewrite.DEFAULT_ROWS), show_default=True, metavar="N|all",
    help="Rows of each partition to multiply.",
)  # fmt: skip
@click.option("--quick", is_flag=True, help="Compare only these rows of the fused layers' weights, and no other bytes.")
@click.option("--weights-only", is_flag=True, help="Compare weights only; needs no torch.")
@click.option("--digest/--no-digest", default=None, help="Note the SHA-256 of each file of OUT; on with --report.")
@for_option
@platform_option(None)
@workers_option
@cluster_option
@reports.report_option(f"the verdict, charts and all numbers {reports.AS_PAGE}")
@endpoint_option
@click.option(
    "--attest", "attest_file", type=click.Path(path_type=Path, dir_okay=False),
    help="Write an in-toto Statement, to be signed; nothing if OUT is not verified.",
)  # fmt: skip
@click.option("--try", "with_engine", is_flag=True, help="Let an engine load IN and OUT, too: see `rewrite try`.")
@trying.engine_options
@click.option("--card", "with_card", is_flag=True, help="Write a model card block into README.md of OUT, a directory.")
@json_option
@verbose_option
@click.option("-q", "--quiet", is_flag=True, help="The closing line only.")
@click.pass_context
def verify(
    context: click.Context,
    /,
    source: str,
    out: str,
    digest: bool | None,
    asked: Asked,
    platform: str | None,
    cluster: str | None,
    report_file: Path | None,
    attest_file: Path | None,
    with_card: bool,
    with_engine: bool,
    as_json: bool,
    verbose: bool,
    quiet: bool,
    **how: Any,
) -> None:
    """Prove that OUT is IN converted, and say whether the engines of --for serve it.

    Without --for the engines are those that OUT was converted for, as its manifest says.

    Three answers: the bytes are what the conversion promises; the engines serve OUT, and none worse than IN; what was
    not checked. Exits with 0 when OUT is verified, 1 when one of the first two is not so, 3 when IN is refused. With
    --try also with 1 when the engine serves OUT wrong, and with 4 when nothing was learnt of it.
    """
    if digest is None:
        digest = (report_file is not None or attest_file is not None) and not how["quick"]
    if attest_file is not None and not digest:
        raise click.UsageError("--attest needs the digests of all files: leave --quick and --no-digest out")
    if with_card and digest:
        raise click.UsageError(
            "--card changes README.md after its digest was taken: first --card, then verify again without it"
        )
    completed = Completed()
    with reporting(as_json, completed):
        question = trying.question_of(how)
        if question != Question() and not with_engine:
            raise rewrite.UsageError("Options about an engine mean nothing without --try", hint="add --try")
        card = cards.Card(out) if with_card else None
        if report_file is not None:
            files.check(report_file)
        # Opened once: of a model on the hub all that follows speaks of one commit.
        storages = rewrite.open_storage(source), rewrite.open_storage(out)
        if not asked.options:
            asked, platform, notes = made_for(storages[1], platform)
            for note in notes:
                say(note, quiet)
        compared = None if report_file is None else reports.Compared(*storages, report_file)
        loader = asked.engines[-1] if asked.words else None
        with progress_bar(quiet) as bar, executor_of(cluster) as executor:
            found = rewrite.verify(
                *storages, digest=digest, loader=loader, engines=None if asked.every else asked.engines,
                platform=platform, progress=bar.show,
                on_check=completed.following(bar), executor=executor, **how,
            )  # fmt: skip
        trial = trying.try_both(found, question, quiet) if with_engine else None
        learnt = trial if isinstance(trial, Tried) else None
        assumptions = asked.assumptions(platform)
        if compared is not None:
            compared.write(context, found, assumptions, learnt)
        if attest_file is not None and found.ok:
            with io_errors(attest_file):
                attest_file.write_text(attestation.dump(found), encoding="utf-8")
        cards.finish(card, storages[0], found)
        for line in assumptions:
            say(line, quiet)
        show(
            lambda: verified.page(found, learnt, brief=quiet),
            lambda: named("verify", {**found.to_json(), "assumptions": assumptions, "try": trial and trial.to_json()}),
            as_json=as_json, verbose=verbose,
        )  # fmt: skip
        if isinstance(trial, EngineError):
            show_error(trial)
        if not found.ok or (trial is not None and trial.exit_code):
            sys.exit(trial.exit_code if found.ok and trial is not None else 1)


def _traffic(storage: rewrite.Storage) -> dict[str, Any]:
    return {"traffic": storage.traffic.to_json()} if isinstance(storage, RemoteStorage) else {}


def _traffic_lines(storage: rewrite.Storage, size: int) -> list[str]:
    """How much was read over a network; nothing of a directory."""
    if not isinstance(storage, RemoteStorage):
        return []
    traffic = storage.traffic
    return [f"{nbytes(traffic.read)} of {nbytes(size)} read, in {count(traffic.requests, 'request')}"]


for command in (trying.try_, split_run.plan, split_run.run, split_run.finish):
    main.add_command(command)
