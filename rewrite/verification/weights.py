"""Check 3: the dequantized weights of every fused group are equal in IN and OUT, exactly."""

from __future__ import annotations

from collections.abc import Iterator

from rewrite.checkpoint.checkpoint import Checkpoint
from rewrite.verification.configs import Schemes
from rewrite.verification.expected import MANIFEST_NAME, Expected, in_checkpoint
from rewrite.verification.nvfp4 import problems_of
from rewrite.verification.oracle import GroupReader
from rewrite.verification.result import Check, judge


def check_weights(source: Checkpoint, out: Checkpoint, expected: Expected, schemes: Schemes) -> Check:
    """Code times scale, in float64, where the product is exact. NaN equals NaN of the same place.

    A weight that is plain in OUT must be the product rounded to float32 and then, once, to its dtype. ``schemes`` is
    what the config of IN says.
    """
    groups = expected.groups

    def blocks(module: str) -> tuple[int, int] | None:
        found = schemes.of_module(module)
        return found.block if found else None

    readers = (
        (GroupReader(source, group, blocks=blocks), GroupReader(out, in_checkpoint(group, out))) for group in groups
    )
    problems = [problem for before, after in readers for problem in _compare(before, after)]
    problems += problems_of(expected.packed, source, out, expected.promise, stated=MANIFEST_NAME in out.files)
    partitions = sum(len(module.partitions) for group in groups for module in group.modules)
    summary = f"{partitions} partitions of {len(groups)} fused groups dequantize to the same values"
    if expected.packed:
        packed = f"{len(expected.packed)} fused NVFP4 layers mean what they meant, within rounding"
        summary = f"{summary}; {packed}" if groups else packed
    return judge("weights", problems, summary)


def _compare(before: GroupReader, after: GroupReader) -> Iterator[str]:
    for partition, module in before.partitions():
        different, largest = 0, 0.0
        for old, new in zip(before.chunks(partition, module), after.chunks(partition, module), strict=True):
            true, found = old.true(), new.true()
            if new.weight.dtype != old.weight.dtype:
                true = true.float().to(new.weight.dtype).double()
            unequal = (true != found) & ~(true.isnan() & found.isnan())
            if unequal.any():
                different += int(unequal.any(1).sum())
                largest = max(largest, float((true - found).abs().max()))
        if different:
            yield f"{module}: {partition.name}, {different} of {partition.rows} rows differ, by up to {largest:.3g}"
