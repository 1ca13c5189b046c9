"""`rewrite try`: asks an engine, and says what it made of a checkpoint."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

import rewrite
from rewrite.checkpoint.local import io_errors
from rewrite.cli.common import json_option, quiet_option, reporting, say, show
from rewrite.cli.layout import Line, Span, line, paragraph, path
from rewrite.cli.tables import table
from rewrite.cli.terminal import show_message, width
from rewrite.errors import UsageError
from rewrite.inspection.advice import advise, repair_command
from rewrite.schemas import named
from rewrite.trying import engine as engines
from rewrite.trying import verdict as verdicts
from rewrite.trying.selection import Layers, select
from rewrite.trying.verdict import AFFECTED, EXACT, LayerVerdict, Verdict

_COLORS = {EXACT: "green", verdicts.ROUNDED: "green", verdicts.LESS: "yellow", verdicts.UNKNOWN: "yellow"}


@dataclass(frozen=True)
class Trial:
    """One checkpoint in one engine, on one rank."""

    checkpoint: str
    rank: int
    layers: Layers | None
    result: dict[str, Any]
    verdict: Verdict

    def to_json(self) -> dict[str, Any]:
        """Without weights, and without paths of this machine."""
        kept = ("engine", "version", "torch", "python", "device", "replaced", "seconds", "peak_bytes", "operators")
        found = {name: self.result[name] for name in kept}
        return {
            "checkpoint": Path(self.checkpoint).name, "rank": self.rank,
            "layers": None if self.layers is None else list(self.layers.chosen), **found,
            "verdict": self.verdict.kind, "not_known": list(self.verdict.unlearnt),
            "failure": None if self.verdict.failure is None else dict(self.verdict.failure),
            "modules": [{**asdict(each), "error": _number(each.error)} for each in self.verdict.layers],
            "measured": self.result["layers"],
        }  # fmt: skip


def _number(value: float | None) -> float | str | None:
    return value if value is None or value - value == 0 else str(value)


@click.command("try")
@click.argument("checkpoint", metavar="CHECKPOINT", type=click.Path(exists=True, file_okay=False))
@click.option("--engine", metavar="PYTHON", help="The Python that has the engine; this one if not given.")
@click.option(
    "--engine-command", metavar="COMMAND",
    help="What starts the engine's Python, as `docker run ... IMAGE python3`; {checkpoint} stands for the directory.",
)  # fmt: skip
@click.option(
    "--using", type=click.Choice(["vllm", "sglang", "transformers"]),
    help="Which engine of that Python; the first of these that is installed if not given.",
)  # fmt: skip
@click.option("--layers", default="auto", show_default=True, help="auto: one of each kind; all; or 0-3, 0-3,17.")
@click.option(
    "--tensor-parallel", type=click.IntRange(1, 64), default=1, show_default=True, help="Try each rank of this many."
)
@click.option("--against", metavar="OUT", type=click.Path(exists=True, file_okay=False), help="Try OUT, too.")
@click.option("--trust-remote-code", is_flag=True, help="Let the engine run code of the checkpoint.")
@click.option(
    "--report", "report_file", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
    help="Also write all that was measured, as JSON; it holds no weights.",
)  # fmt: skip
@json_option
@quiet_option
def try_(
    checkpoint: str,
    engine: str | None,
    engine_command: str | None,
    using: str | None,
    layers: str,
    tensor_parallel: int,
    against: str | None,
    trust_remote_code: bool,
    report_file: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Let an engine load CHECKPOINT and compare what it holds with what the files mean.

    The engine's own loader runs, here or in a container. Exits with 0 when every quantized layer is exact, 1 when one
    is not or the loader refuses the checkpoint, 4 when nothing was learnt.
    """
    with reporting(as_json):
        if engine is not None and engine_command is not None:
            raise UsageError("--engine and --engine-command are two ways to say the same", hint="give one of them")
        asked = {"using": using, "world": tensor_parallel, "trust_remote_code": trust_remote_code}
        trials = []
        for source in filter(None, (checkpoint, against)):
            opened = rewrite.open_checkpoint(source)
            command = engines.command_of(engine, engine_command, Path(source).resolve())
            chosen = None if using == "transformers" else select(opened, layers)
            for rank in range(tensor_parallel):
                trials.append(_try(source, command, {**asked, "rank": rank}, chosen, quiet))
        sound = None if against is None else rewrite.verify(checkpoint, against, weights_only=True).ok
        document = {
            "trials": [each.to_json() for each in trials], "inspect": _inspected(checkpoint, trials[0]),
            "out_means_the_same": sound, "command": _repair(checkpoint, trials),
        }  # fmt: skip
        if report_file is not None:
            with io_errors(report_file):
                report_file.write_text(json.dumps(named("try", document), indent=1) + "\n", encoding="utf-8")
        if as_json:
            show(named("try", document))
        else:
            show(_text(trials, document, width()))
        judged = [each for each in trials if each.checkpoint == (against or checkpoint)]
        sys.exit(1 if sound is False else _exit_code(judged))


def _try(source: str, command: Sequence[str], asked: dict[str, Any], layers: Layers | None, quiet: bool) -> Trial:
    request = {**asked, "checkpoint": str(Path(source).resolve())}
    if layers is not None:
        request |= {"stack": layers.stack, "runs": layers.runs}
    result = engines.ask(command, request, lambda step: None if quiet else show_message(f"{step} ..."))
    if asked["rank"] == 0 and result["replaced"]:
        what = "; ".join(result["replaced"])
        say(f"this is a CPU build of {result['engine']}. Stood in for: {what}", quiet)
    return Trial(source, int(asked["rank"]), layers, result, verdicts.judge(result))


def _exit_code(trials: Sequence[Trial]) -> int:
    codes = {each.verdict.exit_code for each in trials}
    return 1 if 1 in codes else max(codes)


def _inspected(checkpoint: str, trial: Trial) -> dict[str, Any] | None:
    """What `inspect` predicts for this engine and version; None where it knows nothing of it."""
    wanted = f"{trial.result['engine'].lower()}@{trial.result['version'].partition('+')[0]}"
    try:
        rows = rewrite.find_loaders(wanted)
        inspection = rewrite.inspect_checkpoint(checkpoint, selection="all")
    except rewrite.RewriteError:
        return None
    known = [row.as_is.kind for row in inspection.rows if row.loader in rows]
    if not known:
        return None
    agrees = None if known[0] == "not known" else (known[0] in AFFECTED) == (trial.verdict.kind in AFFECTED)
    return {"predicted": known[0], "agrees": agrees}


def _repair(checkpoint: str, trials: Sequence[Trial]) -> str | None:
    """The `convert` command that helps, where this engine is affected; None where none is known."""
    if trials[0].verdict.kind not in AFFECTED or trials[0].verdict.kind == verdicts.NO_KERNEL:
        return None
    try:
        inspection = rewrite.inspect_checkpoint(checkpoint, selection="all")
    except rewrite.RewriteError:
        return None
    found = rewrite.find_loaders(
        f"{trials[0].result['engine'].lower()}@{trials[0].result['version'].partition('+')[0]}"
    )
    return repair_command(inspection, advise(inspection, tuple(found) or rewrite.LOADERS))


def _text(trials: Sequence[Trial], document: dict[str, Any], columns: int) -> Iterator[Line]:
    for trial in trials:
        yield from paragraph(_first_line(trial), columns)
        yield from _verdict(trial, columns)
        yield line("")
    inspected = document["inspect"]
    if inspected is None:
        yield line("`inspect` knows nothing of this engine or checkpoint.")
    elif inspected["agrees"] is not None:
        yield line(f"`inspect` {'agrees' if inspected['agrees'] else 'does not agree'}: {inspected['predicted']}.")
    if document["out_means_the_same"] is not None:
        same = document["out_means_the_same"]
        yield line("OUT means the same as IN." if same else "OUT does not mean the same as IN: see `rewrite verify`.")
    if document["command"]:
        yield line("This repairs it:")
        yield line("  ", path(document["command"]))


def _first_line(trial: Trial) -> str:
    result, layers = trial.result, trial.layers
    what = "all layers" if layers is None else f"{len(layers.chosen)} of {layers.count} layers"
    rank = "" if trial.rank == 0 else f", rank {trial.rank}"
    return (
        f"{result['engine']} {result['version']} on {result['device']}{rank}: {trial.checkpoint}, {what}, "
        f"{sum(result['seconds'].values()):.0f} s, {result['peak_bytes'] / 1e9:.1f} GB"
    )


def _verdict(trial: Trial, columns: int) -> Iterator[Line]:
    verdict = trial.verdict
    if verdict.failure is not None:
        failure = verdict.failure
        text = f"{failure['type']}: {failure['message'].splitlines()[0] if failure['message'] else ''}"
        yield from paragraph([_word(verdict.kind), f" while {failure['phase']}: {text}"], columns)
        yield from (line("  at ", path(each)) for each in failure["where"])
        return
    rows: list[Sequence[str | Span]] = [
        [Span(kind), _word(worst.kind), _off(worst), f"{len(layers)}", _where(worst)]
        for kind, layers in _kinds(verdict.layers)
        for worst in (_worst(layers),)
    ]
    yield from table(rows, columns, head=[("LAYER", "", "OFF BY", "COUNT", "WORST")], right=(2, 3))
    for layer in verdict.layers:
        if layer.reasons and layer.kind in AFFECTED:
            yield from paragraph([path(layer.module), f": {'; '.join(layer.reasons)}"], columns)
    for reason in verdict.unlearnt:
        yield from paragraph([_word(verdicts.UNKNOWN), f": {reason}"], columns)
    yield from paragraph(["Verdict: ", _word(verdict.kind), "."], columns)


def _kinds(layers: Sequence[LayerVerdict]) -> list[tuple[str, list[LayerVerdict]]]:
    """Layers of the same name but for numbers."""
    found: dict[str, list[LayerVerdict]] = {}
    for layer in layers:
        name = re.sub(r"^.*?\b(?:layers|h|blocks)\.\d+\.", "", layer.module)
        suffix = "" if layer.parameter == "weight" else f".{layer.parameter.removesuffix('_weight')}"
        found.setdefault(f"{re.sub(r'[0-9]+', 'N', name)}{suffix}", []).append(layer)
    return list(found.items())


def _worst(layers: Sequence[LayerVerdict]) -> LayerVerdict:
    return min(layers, key=lambda each: (verdicts.ORDER.index(each.kind), -(each.error or 0.0)))


def _off(layer: LayerVerdict) -> str:
    if layer.error is None:
        return "-"
    return "NaN" if layer.error != layer.error else "0" if layer.error <= 1e-6 else f"{layer.error:.1e}"


def _where(layer: LayerVerdict) -> str:
    """The tensor of the checkpoint, without what all names begin with."""
    if layer.tensor is None:
        return layer.how
    match = re.match(r"^.*?\b(?:layers|h|blocks)\.(\d+)\.(.+?)(?:\.weight|_packed)*$", layer.tensor)
    return f"layer {match[1]}: {match[2].rpartition('.')[2]}" if match else layer.tensor


def _word(kind: str) -> Span:
    return Span(kind, _COLORS.get(kind, "red"))
