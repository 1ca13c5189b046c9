"""What the commands share: options, messages, exit codes, the bar."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

import click

import rewrite
from rewrite.cli.engines import for_option, platform_option
from rewrite.cli.terminal import show_message, show_page
from rewrite.report import converted
from rewrite.report.page import Page
from rewrite.schemas import named


class Address(click.Path):
    """A directory, or where else a checkpoint lies: ``org/name`` stays text, as a path would lose a slash of
    ``hf://``. Where a file of it is named that is to be read, its directory is meant."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        path = Path(value)
        if param is not None and param.name != "out" and path.is_file():
            show_message(f"note: {value} is a file: its folder {path.parent} is taken")
            return str(path.parent)
        return value if "://" in value else str(super().convert(value, param, ctx))


_Command = TypeVar("_Command", bound=Callable[..., Any])

workers_option = click.option(
    "--workers", type=click.IntRange(1, 64), default=rewrite.DEFAULT_WORKERS, show_default=True, help="Files at a time."
)
groups_option = click.option(
    "--groups", "selection", type=click.Choice(rewrite.SELECTIONS),
    help="in_proj_qkvz only, or every fused layer. Default: qkvz, or all in a model without this layer.",
)  # fmt: skip
cluster_option = click.option(
    "--cluster", metavar="ADDRESS", help="Let the workers of this Dask scheduler (tcp://host:8786) do the work."
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="One JSON document on stdout: the result, or the error."
)
quiet_option = click.option("-q", "--quiet", is_flag=True, help="No progress, no notes, no closing line.")
verbose_option = click.option("-v", "--verbose", is_flag=True, help="All tables, not the answer alone.")
_CONVERSION = (
    click.argument("source", metavar="IN", type=Address(file_okay=False)),
    click.argument("out", metavar="OUT", type=Address(file_okay=False)),
    click.option(
        "--profile", type=click.Choice(list(rewrite.PROFILES)),
        help="Layout of OUT. Default: the one that serves the engines of --for with the least change.",
    ),
    for_option,
    platform_option(rewrite.DEFAULT_PLATFORM),
    groups_option,
    click.option(
        "--kv-scales", type=click.Choice(rewrite.KV_SCALES), default="keep", show_default=True,
        help="Scales of an FP8 KV cache; dequantized always drops them.",
    ),
    click.option("--overwrite", is_flag=True, help="Replace OUT, once the new one is complete."),
    click.option("--copy", is_flag=True, help="Copy every byte: OUT shares no disk blocks with IN."),
    click.option(
        "--timestamp", "created", is_flag=True, callback=lambda _context, _option, wanted: now() if wanted else None,
        help="Note the time in the manifest; without it, same input gives same bytes.",
    ),
)  # fmt: skip


def conversion_options(function: _Command) -> _Command:
    """What `convert` and `plan` take alike."""
    for option in reversed(_CONVERSION):
        function = option(function)
    return function


_ENDPOINT = "rewrite.endpoint"  # where a context keeps what --endpoint-url was given


def endpoint_words(context: click.Context) -> tuple[str, ...]:
    """The option again, for a command that is shown."""
    url = context.meta.get(_ENDPOINT)
    return () if url is None else ("--endpoint-url", url)


def _use_endpoint(context: click.Context, _option: click.Parameter, url: str | None) -> None:
    """boto3 reads it in this process, as if the user had set it."""
    if url is not None and "@" in url:  # it is part of commands that are shown
        raise click.BadParameter("no user and password, please: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    context.meta[_ENDPOINT] = url
    if url is not None:
        os.environ["AWS_ENDPOINT_URL_S3"] = url


endpoint_option = click.option(
    "--endpoint-url", metavar="URL", expose_value=False, callback=_use_endpoint,
    help="Of an S3 server that is not AWS; or set AWS_ENDPOINT_URL.",
)  # fmt: skip


def now() -> str:
    """For the manifest."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@contextmanager
def reporting(as_json: bool, when_interrupted: object = "") -> Iterator[None]:
    """Turn the library's errors and signals into messages and exit codes."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    except rewrite.RewriteError as error:
        show_error(error)
        if as_json:
            click.echo(json.dumps(named("error", {"error": error.to_json()}), indent=2))
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, _Terminated) as signal_:
        click.echo(f"Interrupted. {when_interrupted}".strip(), err=True)
        sys.exit(143 if isinstance(signal_, _Terminated) else 130)


class _Terminated(BaseException):
    """SIGTERM, as an exception of the main thread."""


def _terminate(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise _Terminated


def say(note: str, quiet: bool) -> None:
    """On stderr: stdout is for the result."""
    if not quiet:
        show_message(f"note: {note}")


def say_all(plan: rewrite.Plan, quiet: bool) -> None:
    """What has to be known of a conversion before anything is written: the profile that was chosen, and notes."""
    for note in (*converted.choice(plan.manifest), *plan.manifest.notes):
        say(note, quiet)


def executor_of(cluster: str | None) -> AbstractContextManager[Executor | None]:
    """The workers of a scheduler; None: threads of this process."""
    if cluster is None:
        return nullcontext()
    from rewrite.integrations import executors

    return executors.cluster(cluster)


def show(
    page: Callable[[], Page], document: Callable[[], dict[str, Any]], *, as_json: bool, quiet: bool = False,
    verbose: bool = False,
) -> None:  # fmt: skip
    """The result on stdout: a document for programs, or a page for people."""
    if as_json:
        click.echo(json.dumps(document(), indent=2))
    elif not quiet:
        show_page(page(), verbose=verbose)


def show_error(error: rewrite.RewriteError) -> None:
    """On stderr."""
    what, *details = f"error: {error}".split("\n")
    show_message(what, style="red")
    for detail in details:
        show_message(detail, hang=len("  expected: "))
