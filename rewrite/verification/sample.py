"""Which rows of a partition are looked at one by one, where not all of them are.

The weights are compared in full. An output depends on one row of weights and its scale, so a sample of the rows says of
the kernels what all of them would. Rows are taken in runs of 8, which one read brings.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

from rewrite.quantization.groups import Partition

DEFAULT_ROWS = 256
_RUN = 8
_LAYERS = 256  # of experts there may be 100,000: the weights of all of them are compared
_Layer = TypeVar("_Layer")


def draw(layers: Sequence[_Layer], seed: int) -> Sequence[_Layer]:
    """The layers to multiply: all, or some of many."""
    return layers if len(layers) <= _LAYERS else random.Random(seed).sample(layers, _LAYERS)


@dataclass(frozen=True)
class Sample:
    """``rows`` of each partition, rounded up to a multiple of 16, more where more are wanted; None: all of them."""

    rows: int | None
    seed: int

    def covers(self, partition: Partition) -> bool:
        """Whether all rows of the partition are looked at."""
        return self.rows is None or partition.rows <= self._runs() * _RUN

    def of(self, module: str, partition: Partition, wanted: Iterable[int] = ()) -> tuple[range, ...]:
        """Rows of the module, in order: the first and the last of the partition, those ``wanted``, the others drawn."""
        if self.covers(partition):
            return (range(partition.start, partition.stop),)
        count = -(-partition.rows // _RUN)
        drawn = random.Random(f"{self.seed} {module} {partition.start}").sample(range(count), self._runs())
        needed = {0, count - 1, *((row - partition.start) // _RUN for row in wanted)}
        enough = max(self._runs(), len(needed) + len(needed) % 2)
        chosen = list(dict.fromkeys(chain(sorted(needed), drawn)))[:enough]
        found: list[range] = []
        for run in (self._run(number, partition) for number in sorted(chosen)):
            if found and run.start <= found[-1].stop:  # they touch or overlap
                found[-1] = range(found[-1].start, run.stop)
            else:
                found.append(run)
        return tuple(found)

    def _runs(self) -> int:
        # Twice 8: GPUs multiply FP8 matrices only whose sizes are multiples of 16.
        return 0 if self.rows is None else 2 * -(-self.rows // (2 * _RUN))

    @staticmethod
    def _run(number: int, partition: Partition) -> range:
        """The last run ends where the partition does, and overlaps the one before it rather than be shorter."""
        start = min(partition.start + number * _RUN, partition.stop - _RUN)
        return range(start, start + _RUN)
