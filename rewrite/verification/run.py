"""Two checkpoints → :class:`Verification`: the checks, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from rewrite.checkpoint.checkpoint import Checkpoint, read_checkpoint
from rewrite.checkpoint.storage import Storage
from rewrite.errors import Refused, StorageError, UsageError
from rewrite.progress import Progress
from rewrite.promise import Promise
from rewrite.quantization.groups import find_groups
from rewrite.verification.configs import read_schemes
from rewrite.verification.expected import Expected, expect, has_blocks
from rewrite.verification.outputs import check_outputs
from rewrite.verification.result import Check, PartitionNumbers, Served, Settings, Verification, judge, skip
from rewrite.verification.structure import check_structure
from rewrite.verification.untouched import check_untouched
from rewrite.verification.weights import check_weights

_NOT_OPENED = "OUT cannot be opened"

#: What engines are predicted to serve from IN and OUT: given by the caller, since it is the loaders' knowledge.
Predict = Callable[[Checkpoint, Checkpoint, Expected], tuple[Served, ...]]


@dataclass(frozen=True)
class Request:
    """How to verify: ``promises`` by profile, the strictest first."""

    promises: Mapping[str, Promise]
    predict: Predict
    settings: Settings
    quick: bool
    workers: int
    progress: Progress | None


def verify_storages(source: Storage, out: Storage, request: Request) -> Verification:
    """What :func:`rewrite.verify` does, which has the defaults and says what they mean."""
    before = read_checkpoint(source)
    find_groups(before).select("all")  # a source that does not add up is refused, not judged
    result = Verification(str(source), str(out), request.settings, (), (), ())
    try:
        after = read_checkpoint(out)
        expected = expect(before, after, request.promises)
    except (Refused, StorageError) as error:
        names = ("untouched", "weights", "outputs", "loaders")
        return replace(
            result, checks=(judge("structure", [str(error)], ""), *(skip(name, _NOT_OPENED) for name in names))
        )
    structure = check_structure(before, after, expected)
    if request.quick:
        untouched = skip("untouched", "--quick: no byte outside the fused groups was compared")
    else:
        untouched = check_untouched(before, after, expected, workers=request.workers, progress=request.progress)
    numbers: tuple[PartitionNumbers, ...] = ()
    rows: tuple[Served, ...] = ()
    if _comparable(after, expected):
        schemes = (read_schemes(before), read_schemes(after))
        weights = check_weights(before, after, expected, schemes[0])
        # No engine requantizes blocks: that the weights are equal says all of them.
        multiplied = tuple(group for group in expected.groups if not has_blocks(group))
        outputs, numbers = check_outputs(before, after, multiplied, request.settings, schemes)
        rows = request.predict(before, after, expected)
        loaders = _check_loaders(rows, expected, request.settings.platform)
    else:
        # Not skipped: what could not be compared has not been shown to be equal.
        weights = judge("weights", ["the fused groups of IN are not in OUT, or not in a form that convert writes"], "")
        outputs, loaders = (skip(name, "the groups cannot be compared") for name in ("outputs", "loaders"))
    return replace(result, checks=(structure, untouched, weights, outputs, loaders), numbers=numbers, loaders=rows)


def _comparable(after: Checkpoint, expected: Expected) -> bool:
    """Whether every group of IN is there in OUT in a form that a conversion can give it."""
    try:
        find_groups(after).select("all")
        read_schemes(after)
    except (Refused, ValueError):  # ValueError: pydantic's, of a config that compressed-tensors cannot parse
        return False
    modules = (module for group in expected.groups for module in group.modules)
    infos = (info for module in modules for info in (module.weight, module.scale, module.input_scale) if info)
    return all(expected.allows(info, after.tensors.get(info.name)) for info in infos)


def _check_loaders(rows: tuple[Served, ...], expected: Expected, platform: str) -> Check:
    """No known loader that the profile is meant for reads OUT worse than IN."""
    problems = [
        f"{row.loader} {row.versions}: {row.after}, was {row.before}: {row.detail}"
        for row in rows
        if row.change > 0 and row.judged
    ]
    better = sum(row.change < 0 and not row.does_not_run for row in rows)
    kind = "no loader that takes vectors" if expected.promise.vectors else "no known loader"
    stopped = sum(row.does_not_run for row in rows)
    said = f"; {stopped} load it and cannot compute with it on {platform}" if stopped else ""
    return judge("loaders", problems, f"{kind} reads OUT worse than IN, {better} read it better{said}")


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
