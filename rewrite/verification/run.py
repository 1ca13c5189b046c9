"""Two checkpoints → :class:`Verification`: the checks, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, replace

from rewrite.checkpoint.checkpoint import Checkpoint, read_checkpoint
from rewrite.checkpoint.storage import Storage
from rewrite.errors import Refused, StorageError, UsageError
from rewrite.loaders.outcome import SERVED, merged
from rewrite.progress import Progress
from rewrite.promise import Promise
from rewrite.quantization.groups import find_groups
from rewrite.verification.ahead import read_ahead
from rewrite.verification.configs import read_schemes
from rewrite.verification.expected import Expected, expect, has_blocks
from rewrite.verification.packed import tensors_of
from rewrite.verification.reader import Blocks
from rewrite.verification.reading import Reading, read_files
from rewrite.verification.result import (
    ENGINES,
    IN,
    NOT_OPENED,
    OUT,
    Check,
    EngineChange,
    OnCheck,
    PartitionNumbers,
    Settings,
    Verification,
    judge,
    skip,
)
from rewrite.verification.sample import Sample
from rewrite.verification.spans import SpansNeeded, plan_spans
from rewrite.verification.structure import check_structure
from rewrite.verification.untouched import check_untouched
from rewrite.verification.weights import check_weights, rules

#: What engines are predicted to serve from IN and OUT: given by the caller, since it is the loaders' knowledge.
Predict = Callable[[Checkpoint, Checkpoint, Expected], tuple[EngineChange, ...]]


@dataclass(frozen=True)
class Request:
    """How to verify: ``promises`` by profile, the strictest first."""

    promises: Mapping[str, Promise]
    predict: Predict
    settings: Settings
    digest: bool
    workers: int
    progress: Progress | None
    on_check: OnCheck
    executor: Executor | None = None


def verify_storages(source: Storage, out: Storage, request: Request) -> Verification:
    """What :func:`rewrite.verify` does, which has the defaults and says what they mean."""
    settings = request.settings
    before = read_checkpoint(source)
    find_groups(before).select("all")  # a source that does not add up is refused, not judged
    result = Verification(str(source), str(out), settings, (), (), ())
    try:
        after = read_checkpoint(out)
        expected = expect(before, after, request.promises)
    except (Refused, StorageError) as error:
        names = ("untouched", "weights", "outputs", ENGINES)
        return replace(
            result, checks=(judge("structure", [str(error)], ""), *(skip(name, NOT_OPENED) for name in names))
        )
    checks = _Checks(request.on_check)
    checks.run("structure", lambda: check_structure(before, after, expected, configs=not settings.weights_only))
    comparable = _comparable(after, expected, configs=not settings.weights_only)
    blocks = _blocks_of(before, expected)
    sample = Sample(settings.rows, settings.seed)
    multiplication: Multiplication | None = None
    if comparable and not settings.weights_only:
        from rewrite.verification.outputs import Multiplication  # torch: seconds to import

        multiplication = Multiplication(before, after, expected, settings, sample)
    reading: Reading | None = None
    if settings.quick:
        checks.add(skip("untouched", "--quick: no byte outside the fused groups was compared"))
    else:
        request.on_check("bytes", None)
        needed = SpansNeeded(
            dict(rules(before, after, expected.groups, blocks)) if comparable else {},
            multiplication.counters if multiplication else {},
        )
        files = plan_spans(before, after, expected, needed)
        reading = read_files(
            files, before, after,
            digest=request.digest, workers=request.workers, progress=request.progress, executor=request.executor,
        )  # fmt: skip
        checks.add(check_untouched(before, after, expected, reading))
    result = replace(result, digests=reading.digests if reading else None, selection=expected.selection)
    if not comparable:
        # Not skipped: what could not be compared has not been shown to be equal.
        checks.add(
            judge("weights", ["the fused groups of IN are not in OUT, or not in a form that convert writes"], "")
        )
        for name in ("outputs", ENGINES):
            checks.add(skip(name, "the groups cannot be compared"))
        return replace(result, checks=checks.done)
    request.on_check("weights", None)
    if settings.quick:
        read_ahead((before, after), expected, sample)
    weights, different = check_weights(before, after, expected, blocks, reading, sample)
    checks.add(weights)
    numbers: tuple[PartitionNumbers, ...] = ()
    if multiplication is None:
        checks.add(skip("outputs", "--weights-only: nothing was multiplied"))
    else:
        request.on_check("outputs", None)
        outputs, numbers = multiplication.check(different, request.progress, request.executor)
        checks.add(outputs)
    request.on_check(ENGINES, None)
    try:
        rows = request.predict(before, after, expected)
    except Refused as error:  # --weights-only: nobody has read the config of OUT yet
        checks.add(judge(ENGINES, [str(error)], ""))
        return replace(result, checks=checks.done, numbers=numbers)
    checks.add(_check_engines(rows, expected, settings.platform) if rows else skip(ENGINES, result.nothing_judged))
    return replace(result, checks=checks.done, numbers=numbers, loaders=rows)


class _Checks:
    """The checks that have their verdict, in order; each is told to whoever watches."""

    def __init__(self, on_check: OnCheck) -> None:
        self.done: tuple[Check, ...] = ()
        self._on_check = on_check

    def run(self, name: str, check: Callable[[], Check]) -> None:
        self._on_check(name, None)
        self.add(check())

    def add(self, check: Check) -> None:
        self.done += (check,)
        self._on_check(check.name, check)


def _blocks_of(before: Checkpoint, expected: Expected) -> Blocks | None:
    """What the config of IN says of scales for blocks. Not read where there are none: compressed-tensors' own parser
    takes seconds to import."""
    if not any(map(has_blocks, expected.groups)):
        return None
    schemes = read_schemes(before)

    def blocks(module: str) -> tuple[int, int] | None:
        found = schemes.of_module(module)
        return found.block if found else None

    return blocks


def _comparable(after: Checkpoint, expected: Expected, *, configs: bool) -> bool:
    """Whether every group of IN is there in OUT in a form that a conversion can give it."""
    try:
        find_groups(after).select("all")
        if configs:
            read_schemes(after)
    except Refused:
        return False
    modules = (module for group in expected.groups for module in group.modules)
    infos = [info for module in modules for info in (module.weight, module.scale, module.input_scale) if info]
    infos += tensors_of(expected.packed)
    return all(expected.allows(info, after.tensors.get(info.name)) for info in infos)


def _check_engines(rows: tuple[EngineChange, ...], expected: Expected, platform: str) -> Check:
    """The engines that OUT is for serve it, and none of them worse than IN; where none was named, no known engine that
    the profile is meant for reads it worse. Others that do are named."""
    asked = [row for row in rows if row.asked]
    meant = asked or list(rows)
    known = [row for row in meant if row.outcomes[OUT].kind != "not known"]
    if not known:
        return skip(ENGINES, f"not known: {meant[-1].outcomes[OUT].detail}")
    if asked:
        problems = [_worse(row) for row in known if row.change > 0 or row.outcomes[OUT].kind not in SERVED]
        served = merged(rows, lambda row: row.outcomes[OUT].kind if row in known else None)
        summary = ", ".join(f"{name} {versions}: {kind}" for name, versions, kind in served if kind)
    else:
        problems = [_worse(row) for row in rows if row.change > 0 and row.judged]
        better = sum(row.change < 0 and not row.does_not_run for row in rows)
        kind = "engine that takes vectors" if expected.promise.vectors else "known engine"
        summary = f"no {kind} reads OUT worse than IN, {better} read it better"
    stopped = ", ".join(_named(rows, lambda row: row.stopped and row.judged and not row.asked))
    if stopped:
        summary += f"; without a kernel for OUT on {platform}: {stopped}"
    worse = ", ".join(_named(rows, lambda row: row.change > 0 and not row.asked)) if asked else ""
    if worse:
        summary += f"; worse than before, but not asked for: {worse}"
    unknown = ", ".join(_named(rows, lambda row: row.asked and row not in known))
    return judge(ENGINES, problems, summary, f"what {unknown} makes of OUT" if unknown else "")


def _named(rows: tuple[EngineChange, ...], is_meant: Callable[[EngineChange], bool]) -> Iterator[str]:
    """The engines that are meant; rows that follow each other as one."""
    yield from (f"{name} {versions}" for name, versions, meant in merged(rows, is_meant) if meant)


def _worse(row: EngineChange) -> str:
    before, after = row.outcomes[IN], row.outcomes[OUT]
    was = "as before" if before.kind == after.kind else f"was {before.kind}"
    return f"{row.engine.name} {row.engine.versions}: {after.kind}, {was}: {after.detail}"


def choose_device(device: str) -> str:
    """The device that ``device`` (auto, cpu, cuda, cuda:N) means. Raises :class:`UsageError` where there is none."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise UsageError("Unknown device", expected="auto, cpu, cuda or cuda:N", found=device)
    if kind == "cuda" and (not torch.cuda.is_available() or int(index or 0) >= torch.cuda.device_count()):
        raise UsageError("There is no such device", found=device, hint="use --device cpu")
    return device
