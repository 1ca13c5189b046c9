"""Two checkpoints → :class:`Verification`: the five checks, one after the other."""

from __future__ import annotations

import os
from dataclasses import replace

from rewrite.checkpoint import Checkpoint, open_checkpoint
from rewrite.dialects import read_dialect
from rewrite.errors import Refused, StorageError, UsageError
from rewrite.groups import find_groups
from rewrite.inspection import Inspection, inspect_open
from rewrite.loaders import (
    Behaviour,
    Loader,
    every_slot_or_vector,
    fill_every_slot,
    fill_slot_zero,
    slot_zero_only,
)
from rewrite.verification.expected import Expected, expect
from rewrite.verification.outputs import check_outputs
from rewrite.verification.result import (
    Check,
    PartitionNumbers,
    Settings,
    Verification,
    judge,
    skip,
)
from rewrite.verification.structure import check_structure
from rewrite.verification.untouched import Progress, check_untouched
from rewrite.verification.weights import check_weights

_NOT_OPENED = "OUT cannot be opened"


def verify_checkpoints(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    device: str,
    tokens: int,
    seed: int,
    quick: bool,
    loader: Loader | None,
    workers: int,
    progress: Progress | None,
) -> Verification:
    """What :func:`rewrite.verify` does, which has the defaults and says what they mean."""
    settings = Settings(_device(device), tokens, seed, f"{loader.name} {loader.versions}" if loader else "fixed")
    before = open_checkpoint(source)
    find_groups(before, "all")  # a source that does not add up is refused, not judged
    result = Verification(str(source), str(out), settings, (), (), None)
    try:
        after = open_checkpoint(out)
        expected = expect(before, after)
    except (Refused, StorageError) as error:
        names = ("untouched", "weights", "outputs", "loaders")
        return replace(
            result, checks=(judge("structure", [str(error)], ""), *(skip(name, _NOT_OPENED) for name in names))
        )
    structure = check_structure(before, after, expected)
    if quick:
        untouched = skip("untouched", "--quick: no byte outside the fused groups was compared")
    else:
        untouched = check_untouched(before, after, expected, workers=workers, progress=progress)
    numbers: tuple[PartitionNumbers, ...] = ()
    inspection: Inspection | None = None
    if _comparable(before, after, expected):
        weights = check_weights(before, after, expected.groups)
        fill = fill_slot_zero if loader is not None and loader.behaviour is slot_zero_only else fill_every_slot
        outputs, numbers = check_outputs(before, after, expected.groups, settings, fill)
        loaders, inspection = _check_loaders(before, after, expected)
    else:
        # Not skipped: what could not be compared has not been shown to be equal.
        weights = judge("weights", ["the fused groups of IN are not in OUT, or not in a form that convert writes"], "")
        outputs, loaders = (skip(name, "the groups cannot be compared") for name in ("outputs", "loaders"))
    return replace(
        result, checks=(structure, untouched, weights, outputs, loaders), numbers=numbers, inspection=inspection
    )


def _comparable(before: Checkpoint, after: Checkpoint, expected: Expected) -> bool:
    """Whether every group of IN is there in OUT in a form that a conversion can give it."""
    try:
        find_groups(after, "all")
        read_dialect(after)
    except Refused:
        return False
    modules = (module for group in expected.groups for module in group.modules)
    infos = (info for module in modules for info in (module.weight, module.scale, module.input_scale) if info)
    return all(expected.allows(info, after.tensors.get(info.name, (None, None))[1]) for info in infos)


#: Loaders that a profile is meant for, where these are not all of them: the others are shown, not judged.
_MEANT_FOR: dict[str, Behaviour] = {"partition": every_slot_or_vector}


def _check_loaders(before: Checkpoint, after: Checkpoint, expected: Expected) -> tuple[Check, Inspection]:
    """No known loader that the profile is meant for reads OUT worse than IN."""
    meant = _MEANT_FOR.get(expected.profile)
    old, new = inspect_open(before, expected.selection), inspect_open(after, expected.selection)
    problems = [
        f"{row.loader.name} {row.loader.versions}: {row.as_is.kind}, was {earlier.as_is.kind}: {row.as_is.detail}"
        for row, earlier in zip(new.rows, old.rows, strict=True)
        if row.as_is.severity > earlier.as_is.severity and meant in (None, row.loader.behaviour)
    ]
    better = sum(row.as_is.severity < earlier.as_is.severity for row, earlier in zip(new.rows, old.rows, strict=True))
    kind = "no loader that takes vectors" if meant else "no known loader"
    return judge("loaders", problems, f"{kind} reads OUT worse than IN, {better} read it better"), new


def _device(device: str) -> str:
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise UsageError("Unknown device", expected="auto, cpu, cuda or cuda:N", found=device)
    if kind == "cuda" and (not torch.cuda.is_available() or int(index or 0) >= torch.cuda.device_count()):
        raise UsageError("There is no such device", found=device, hint="use --device cpu")
    return device
