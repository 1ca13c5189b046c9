"""The command line: parse, call, render, exit code. No logic.

Exit codes: 0 done; 1 a check failed; 2 usage; 3 the checkpoint is refused; 4 reading or writing failed; 130 and 143 for
SIGINT and SIGTERM, as shells have them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click

import rewrite
from rewrite.checkpoint.local import io_errors
from rewrite.cli import cards, parts, reports, trying
from rewrite.cli.common import Address as _Address
from rewrite.cli.common import (
    copy_option,
    endpoint_option,
    endpoint_words,
    kv_scales_option,
    now,
    overwrite_option,
    profile_option,
    quiet_option,
    timestamp_option,
)
from rewrite.cli.common import json_option as _json
from rewrite.cli.common import reporting as _reporting
from rewrite.cli.common import say as _say
from rewrite.cli.common import selection_option as _selection
from rewrite.cli.common import show as _print
from rewrite.cli.common import workers_option as _workers
from rewrite.cli.conversion_text import render_conversion, render_plan
from rewrite.cli.inspection_text import render_inspection, traffic_lines
from rewrite.cli.repeat import Recorded
from rewrite.cli.terminal import width
from rewrite.cli.verification_text import render_verification, verdict_lines
from rewrite.cli.watching import Shown, progress_bar
from rewrite.inspection.advice import advise, repair_command
from rewrite.integrations import attestation
from rewrite.integrations.remote import RemoteStorage
from rewrite.loaders.kernels import begins_later
from rewrite.loaders.versions import assumptions
from rewrite.report import files
from rewrite.schemas import named


class _Rows(click.ParamType[int | None]):
    """A number of rows, or all of them."""

    name = "rows"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        return None if value is None or value == "all" else click.IntRange(1).convert(value, param, ctx)


_Command = TypeVar("_Command", bound=Callable[..., Any])
_ADDRESS = _Address(file_okay=False)


def _joined(
    context: click.Context, _option: click.Parameter, names: tuple[str, ...], default: str | None
) -> str | None:
    """Several platforms as one, and the default where none is given."""
    platform = ",".join(names) or default
    context.meta[_WHERE] = platform or rewrite.DEFAULT_PLATFORM
    return platform


def _platform(default: str | None) -> Callable[[_Command], _Command]:
    return click.option(
        "--platform",
        type=click.Choice(list(rewrite.PLATFORMS)),
        multiple=True,
        callback=partial(_joined, default=default),
        help="Where loaders compute: a kind of card, or cuda (sm89, sm90, sm100 and sm120; the default), rocm, cpu; "
        "may be repeated.",
    )


_NAMES = [loader.name for loader in rewrite.LOADERS]
_WHERE = "rewrite.platform"
_WANTED = "rewrite.loaders"  # where a context keeps what --loader was given


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(rewrite.__version__, prog_name="rewrite")
def main() -> None:
    """Repair quantized model checkpoints offline.

    Inference engines fuse projections when they load a model. Where several partitions of a fused layer share one
    scale, some engines read it wrong. `convert` writes a checkpoint with an explicit scale for every partition.
    """


@main.command()
@click.argument("source", metavar="IN", type=_ADDRESS)
@click.argument("out", metavar="OUT", type=_ADDRESS)
@profile_option
@_selection
@kv_scales_option
@click.option("--dry-run", is_flag=True, help="Show the plan; write nothing.")
@overwrite_option
@_workers
@copy_option
@click.option(
    "--cluster", metavar="ADDRESS", help="Let the workers of this Dask scheduler (tcp://host:8786) write the files."
)
@click.option("--create-pr", is_flag=True, help="Make a pull request; OUT is a model on the hub.")
@timestamp_option
@endpoint_option
@_json
@quiet_option
def convert(
    source: str,
    out: str,
    profile: str,
    selection: rewrite.Selection,
    kv_scales: rewrite.KvScales,
    dry_run: bool,
    overwrite: bool,
    workers: int,
    copy: bool,
    cluster: str | None,
    create_pr: bool,
    timestamp: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write the checkpoint IN to the new directory OUT, with an explicit scale for every partition.

    IN may also be a model on the Hugging Face hub (org/name, hf://org/name) or lie in a bucket (s3://bucket/prefix). So
    may OUT: hf://org/name, where a new model is made private, or s3://bucket/prefix.

    OUT is absent or complete, never in between; after an interruption the same command resumes. Tensors that need no
    change stay byte for byte; where the filesystem can, OUT shares their disk blocks with IN. A checkpoint with nothing
    to do is copied as it is.
    """
    with _reporting(as_json, f"{out} was not touched; run the same command to resume."):
        started = time.monotonic()
        if dry_run:
            checkpoint = rewrite.open_checkpoint(source)
            plan = rewrite.make_plan(checkpoint, profile, selection, kv_scales)
            if as_json:
                _print(named("plan", plan.to_json()))
            else:
                _print(render_plan(plan, checkpoint, width()), quiet)
            return
        with progress_bar(quiet) as bar, _executor(cluster) as executor:
            manifest = rewrite.convert(
                source, out, profile=profile, selection=selection, kv_scales=kv_scales, workers=workers,
                overwrite=overwrite, copy=copy, created=now() if timestamp else None, progress=bar.show,
                executor=executor, create_pr=create_pr,
            )  # fmt: skip
        for note in manifest.notes:
            _say(note, quiet)
        if as_json:
            _print(named("convert", manifest.to_json()))
        else:
            _print(render_conversion(manifest, str(out), time.monotonic() - started, width()), quiet)


def _executor(cluster: str | None) -> AbstractContextManager[Executor | None]:
    if cluster is None:
        return nullcontext()
    from rewrite.integrations import executors

    return executors.cluster(cluster)


for command in (parts.plan, parts.run, parts.finish, trying.try_):
    main.add_command(command)


def _find_loaders(
    context: click.Context, _option: click.Parameter, wanted: tuple[str, ...]
) -> tuple[rewrite.Loader, ...]:
    """The loaders that --loader names; all of them without it."""
    context.meta[_WANTED] = wanted
    chosen: list[rewrite.Loader] = []
    for name in wanted:
        found = rewrite.find_loaders(name)
        if not found:
            known = ", ".join(f"{loader.name}@{loader.first}" for loader in rewrite.LOADERS)
            raise click.BadParameter(
                f"nothing is known of {name!r}; known: {known} (a name alone means all of its versions)"
            )
        chosen += found
    return tuple(chosen) or rewrite.LOADERS


def _assumptions(context: click.Context) -> list[str]:
    """What is assumed of the versions of --loader that are newer than those that were run, or older than those
    that were run on the platform."""
    wanted = context.meta.get(_WANTED, ())
    found = [text for name in wanted for text in assumptions(name)]
    names = dict.fromkeys(row.name for name in wanted for row in rewrite.find_loaders(name)) or dict.fromkeys(_NAMES)
    since = (_since(name, context.meta[_WHERE]) for name in names)
    return [*found, *(text for text in since if text is not None)]


def _since(name: str, platform: str) -> str | None:
    first = begins_later(name, platform)
    where = platform.replace(",", ", ")
    return None if first is None else f"{name} was run on {where} from {first} on: earlier versions are not known there"


def _find_one_loader(context: click.Context, option: click.Parameter, wanted: str | None) -> rewrite.Loader | None:
    """The loader that --loader names; None without it. A name alone means its newest versions."""
    return None if wanted is None else _find_loaders(context, option, (wanted,))[-1]


@main.command(cls=Recorded)
@click.argument("checkpoint", metavar="CHECKPOINT", type=_ADDRESS)
@click.option(
    "--loader", "loaders", multiple=True, metavar="NAME[@VERSION]", callback=_find_loaders,
    help="Judge by this loader only (vllm, vllm@0.19.1, sglang, transformers, ...); may be repeated.",
)  # fmt: skip
@_platform(rewrite.DEFAULT_PLATFORM)
@_selection
@click.option(
    "--weights", is_flag=True, help="Also read every weight: NaN codes, rows of zeros, codes that are too small."
)
@_workers
@reports.report_option("it")
@endpoint_option
@_json
@click.pass_context
def inspect(
    context: click.Context,
    checkpoint: str,
    loaders: tuple[rewrite.Loader, ...],
    platform: str,
    selection: rewrite.Selection,
    weights: bool,
    workers: int,
    report_file: Path | None,
    as_json: bool,
) -> None:
    """Say what CHECKPOINT is and what every known loader makes of its fused groups.

    CHECKPOINT is a directory, or a model on the Hugging Face hub: org/name[@revision], hf://org/name. Reads headers,
    config and scales only. Exits with 0 when no loader is affected and nothing is wrong, else with 1.
    """
    with _reporting(as_json):
        if report_file is not None:
            files.check(report_file)
        storage = rewrite.open_storage(checkpoint)
        with _reading_bar(storage), progress_bar(quiet=not weights or isinstance(storage, RemoteStorage)) as bar:
            bar.name("weights")
            inspection = rewrite.inspect_checkpoint(
                storage, selection=selection, weights=weights, platform=platform, workers=workers, progress=bar.show
            )
        affected, advice = inspection.affected(loaders), advise(inspection, loaders)
        assumptions = _assumptions(context)
        if report_file is not None:
            reports.write_inspection(context, storage, inspection, (affected, advice), assumptions, report_file)
        for line in [*traffic_lines(storage, inspection.nbytes), *assumptions]:
            _say(line, False)
        command = repair_command(inspection, advice, *endpoint_words(context))
        if as_json:
            said = {"advice": {**asdict(advice), "command": command}, "assumptions": assumptions}
            _print(named("inspect", {**inspection.to_json(), **said, **_traffic(storage)}))
        else:
            _print(render_inspection(inspection, affected, advice, command, width()))
        if affected or inspection.findings:
            sys.exit(1)


@main.command(cls=Recorded)
@click.argument("source", metavar="IN", type=_ADDRESS)
@click.argument("out", metavar="OUT", type=_ADDRESS)
@click.option("--device", default="auto", show_default=True, help="Where to multiply: auto, cpu, cuda or cuda:N.")
@click.option(
    "--tokens",
    type=click.IntRange(1, 4096),
    default=rewrite.DEFAULT_TOKENS,
    show_default=True,
    help="Activations for each group.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed for the random activations.")
@click.option(
    "--rows", type=_Rows(), default=str(rewrite.DEFAULT_ROWS), show_default=True, metavar="N|all",
    help="Rows of each partition to multiply.",
)  # fmt: skip
@click.option("--quick", is_flag=True, help="Compare only these rows of the fused layers' weights, and no other bytes.")
@click.option(
    "--weights-only", is_flag=True, help="Multiply nothing and leave out the config of layers; needs no torch."
)
@click.option("--digest/--no-digest", default=None, help="Note the SHA-256 of each file of OUT; on with --report.")
@click.option(
    "--loader", "loader", metavar="NAME[@VERSION]", callback=_find_one_loader,
    help="The loader that serves OUT; without it, one with the fix.",
)  # fmt: skip
@_platform(None)
@_workers
@click.option(
    "--cluster",
    metavar="ADDRESS",
    help="Let the workers of this Dask scheduler (tcp://host:8786) read the files and multiply.",
)
@reports.report_option("the verdict, charts and all numbers")
@endpoint_option
@click.option(
    "--attest", "attest_file", type=click.Path(path_type=Path, dir_okay=False),
    help="Write an in-toto Statement, to be signed; nothing if OUT is not verified.",
)  # fmt: skip
@click.option("--card", "with_card", is_flag=True, help="Write a model card block into README.md of OUT, a directory.")
@_json
@click.option("-q", "--quiet", is_flag=True, help="The closing line only.")
@click.pass_context
def verify(
    context: click.Context,
    source: str,
    out: str,
    device: str,
    tokens: int,
    seed: int,
    rows: int | None,
    quick: bool,
    weights_only: bool,
    digest: bool | None,
    loader: rewrite.Loader | None,
    platform: str | None,
    workers: int,
    cluster: str | None,
    report_file: Path | None,
    attest_file: Path | None,
    with_card: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Prove that OUT is IN converted: sound, untouched elsewhere, the same weights, outputs as served.

    Exits with 0 when OUT is verified, 1 when a check fails, 3 when IN is refused.
    """
    if digest is None:
        digest = (report_file is not None or attest_file is not None) and not quick
    if attest_file is not None and not digest:
        raise click.UsageError("--attest needs the digests of all files: leave --quick and --no-digest out")
    if with_card and digest:
        raise click.UsageError(
            "--card changes README.md after its digest was taken: first --card, then verify again without it"
        )
    shown = Shown()
    with _reporting(as_json, shown):
        card = cards.Card(out) if with_card else None
        if report_file is not None:
            files.check(report_file)
        # Opened once: of a model on the hub all that follows speaks of one commit.
        storages = rewrite.open_storage(source), rewrite.open_storage(out)
        compared = None if report_file is None else reports.Compared(*storages, report_file)
        with progress_bar(quiet) as bar, _executor(cluster) as executor:
            found = rewrite.verify(
                *storages, device=device, tokens=tokens, seed=seed, rows=rows, quick=quick,
                weights_only=weights_only, digest=digest, loader=loader, platform=platform, workers=workers,
                progress=bar.show, on_check=shown.following(bar), executor=executor,
            )  # fmt: skip
        assumptions = _assumptions(context)
        if compared is not None:
            compared.write(context, found, assumptions)
        if attest_file is not None and found.ok:
            with io_errors(attest_file):
                attest_file.write_text(attestation.dump(found), encoding="utf-8")
        cards.finish(card, storages[0], found)
        for line in assumptions:
            _say(line, quiet)
        if as_json:
            _print(named("verify", {**found.to_json(), "assumptions": assumptions}))
        else:
            _print((verdict_lines if quiet else render_verification)(found, width()))
        if not found.ok:
            sys.exit(1)


@contextmanager
def _reading_bar(storage: rewrite.Storage) -> Iterator[None]:
    """A bar of the bytes that came over a network, on a terminal."""
    with progress_bar(quiet=not isinstance(storage, RemoteStorage)) as bar:
        show = bar.show
        if show is not None and isinstance(storage, RemoteStorage):
            storage.traffic.watch = lambda done: show(done, 0)
        yield


def _traffic(storage: rewrite.Storage) -> dict[str, Any]:
    return {"traffic": storage.traffic.to_json()} if isinstance(storage, RemoteStorage) else {}
