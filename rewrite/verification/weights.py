"""Check 3: the dequantized weights of every fused group are equal in IN and OUT, exactly.

Equal codes with equal scales are equal weights: of what keeps its codes, the bytes and the scales are compared. A
weight that is plain in OUT must be code times scale rounded to float32 and then, once, to its dtype: its bytes follow
from IN's. Only where bytes or scales are not as they must be are values compared: code times scale, in float64, where
the product is exact. NaN equals NaN of the same place, and 0 equals -0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from rewrite.checkpoint.checkpoint import Checkpoint
from rewrite.quantization.dtypes import PLAIN_DTYPES
from rewrite.quantization.groups import FusedGroup, Partition
from rewrite.verification.expected import Expected, in_checkpoint
from rewrite.verification.nvfp4 import cost_of, problems_of
from rewrite.verification.reader import Blocks, DequantizedRows, GroupReader, StoredRows
from rewrite.verification.reading import Reading
from rewrite.verification.result import Check, judge
from rewrite.verification.sample import Sample
from rewrite.verification.values import Values, decode

_KEPT = 256  # rows that differ, of a partition: what the check of the outputs looks at
_LARGEST_CODE = 57344.0  # of E5M2
_LARGEST = {"F16": 65504.0, "BF16": 3.38e38, "F32": 3.4e38}


#: The first rows that differ of each module and partition.
Different = Mapping[tuple[str, str], tuple[int, ...]]


def rules(
    source: Checkpoint, out: Checkpoint, groups: Iterable[FusedGroup], blocks: Blocks | None
) -> Iterator[tuple[str, Sequence[tuple[Partition, DequantizedRows]]]]:
    """For each weight that is plain in OUT what its rows must be."""
    for group in groups:
        reader = GroupReader(source, group, blocks)
        for module in group.modules:
            new = out.tensors[module.weight.name]
            if new.dtype in PLAIN_DTYPES and module.weight.dtype not in PLAIN_DTYPES and module.weight.shape[0]:
                yield (
                    module.weight.name,
                    [
                        (partition, DequantizedRows.of(reader, module.name, partition, new.dtype))
                        for partition in module.partitions
                    ],
                )


def check_weights(
    source: Checkpoint,
    out: Checkpoint,
    expected: Expected,
    blocks: Blocks | None,
    reading: Reading | None,
    sample: Sample,
) -> tuple[Check, Different]:
    """``blocks``: what the config of IN says of scales for blocks. ``reading``: what the pass over the files found;
    None: none was made, and the rows of ``sample`` are compared."""
    problems: list[str] = []
    different: dict[tuple[str, str], tuple[int, ...]] = {}
    for group in expected.groups:
        before, after = GroupReader(source, group, blocks), GroupReader(out, in_checkpoint(group, out), blocks)
        for partition, module in before.partitions():
            suspects = _suspects(before, after, module, partition, reading, sample)
            found = _Differences()
            for rows in suspects:
                found.add(rows, before, after, module)
            if found.count:
                different[module, partition.name] = tuple(found.rows)
                whole = reading is not None or sample.covers(partition)
                problems.append(f"{module}: {partition.name}, {found.of(partition, whole)}")
    problems += problems_of(expected.packed, source, out, expected.promise, reading, sample)
    whole = reading is not None or all(map(sample.covers, _partitions(expected)))
    left_out = "" if whole else "weights of other rows"
    cost = cost_of(expected.packed, source, out)
    check = judge("weights", problems, _summary(expected, sample, whole, cost), left_out)
    return replace(check, rounded=cost), different


def _suspects(
    before: GroupReader, after: GroupReader, module: str, partition: Partition, reading: Reading | None, sample: Sample
) -> tuple[range, ...]:
    """The rows of a partition whose values have to be compared."""
    if reading is None:
        return sample.of(module, partition)
    every = (range(partition.start, partition.stop),)
    one, other = before.module(module), after.module(module)
    if not reading.same(one.weight.name):
        return every
    if one.weight.dtype != other.weight.dtype:
        largest = float(np.abs(before.scale_table(module).values).max(initial=0)) * _LARGEST_CODE
        return () if largest < _LARGEST[other.weight.dtype] else every  # the pass compared all bytes
    if before.block(module) or after.block(module):
        return every
    old, new = (reader.scales(module)[partition.start : partition.stop] for reader in (before, after))
    unequal = np.flatnonzero((old != new) & ~(np.isnan(old) & np.isnan(new))) + partition.start
    return tuple(
        range(run[0], run[-1] + 1) for run in np.split(unequal, np.flatnonzero(np.diff(unequal) > 1) + 1) if run.size
    )


@dataclass
class _Differences:
    """Rows of a partition that mean something else in OUT."""

    count: int = 0
    compared: int = 0
    largest: float = 0.0
    rows: list[int] = field(default_factory=list)  # the first of them

    def add(self, rows: range, before: GroupReader, after: GroupReader, module: str) -> None:
        at = rows.start
        self.compared += len(rows)
        for old, new in zip(before.chunks(module, [rows]), after.chunks(module, [rows]), strict=True):
            same_bytes = (
                old.dtype == new.dtype and np.array_equal(old.raw, new.raw) and np.array_equal(old.scale, new.scale)
            )
            if not same_bytes:
                self._compare(old, new, at)
            at += len(old.raw)

    def _compare(self, old: StoredRows, new: StoredRows, at: int) -> None:
        found = new.value()
        true = old.value() if new.dtype == old.dtype else _meant(old, new.dtype)
        unequal = (true != found) & ~(np.isnan(true) & np.isnan(found))
        if unequal.any():
            wrong = np.flatnonzero(unequal.any(axis=1))
            self.count += wrong.size
            self.largest = float(np.maximum(self.largest, np.abs(true - found)[unequal].max()))  # NaN, too
            self.rows += (wrong[: _KEPT - len(self.rows)] + at).tolist()

    def of(self, partition: Partition, whole: bool) -> str:
        among = f"{partition.rows} rows" if whole else f"{self.compared} rows that were compared"
        return f"{self.count} of {among} differ, by up to {self.largest:.3g}"


def _meant(old: StoredRows, dtype: str) -> Values:
    """What plain weights in OUT must be: not infinite, where they are too large for their dtype."""
    found = decode(dtype, old.rounded(dtype)).astype(np.float64)
    return np.where(np.isinf(found), old.value(), found)


def _partitions(expected: Expected) -> list[Partition]:
    """All that weights are compared of."""
    groups = [p for group in expected.groups for module in group.modules for p in module.partitions]
    return [*groups, *(module.partition for layer in expected.packed for module in layer.modules)]


def _summary(expected: Expected, sample: Sample, whole: bool, cost: float) -> str:
    groups = expected.groups
    partitions = sum(len(module.partitions) for group in groups for module in group.modules)
    rows = "" if whole else f"{sample.rows} rows of each of "
    summary = f"{rows}{partitions} partitions of {len(groups)} fused groups dequantize to the same values"
    if not expected.packed:
        return summary
    codes = "" if whole else f", {sample.rows} rows of their codes compared"
    within = f"rounding moved weights by up to {cost:.1%}" if cost else "exactly"
    packed = f"{len(expected.packed)} fused NVFP4 layers mean what they meant, {within}{codes}"
    return f"{summary}; {packed}" if groups else packed
