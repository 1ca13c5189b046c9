"""How often each code occurs in a partition, and which of its rows have the largest and the smallest code.

What an engine makes of a weight whose partition has one scale depends on its code alone: norms of weights and of errors
are then sums over 256 codes, exact, after one look at the bytes.
"""

from __future__ import annotations

import numpy as np
import torch

from rewrite.quantization.groups import Partition
from rewrite.verification.values import Bytes


class CodeCounts:
    """Fills up while the rows of a partition, of one byte a weight, come by."""

    def __init__(self, partition: Partition, columns: int) -> None:
        self.row = columns
        self.counts = torch.zeros(256, dtype=torch.int64)
        self._partition = partition
        self._largest = (-1, partition.start)  # code without its sign, row of the module
        self._smallest = (256, partition.start)

    def add(self, rows: bytes, first: int) -> None:
        """Whole rows, the first of which is row ``first`` of the partition."""
        codes: Bytes = np.frombuffer(bytearray(rows), np.uint8)
        self.counts += torch.bincount(torch.from_numpy(codes), minlength=256)
        sizes = (codes & 0x7F).reshape(-1, self.row).max(axis=1)
        high, low, at = int(sizes.argmax()), int(sizes.argmin()), self._partition.start + first
        self._largest = max(self._largest, (int(sizes[high]), at + high), key=lambda found: found[0])
        self._smallest = min(self._smallest, (int(sizes[low]), at + low), key=lambda found: found[0])

    def take(self, other: CodeCounts) -> None:
        """All that another one has seen of the same partition."""
        self.counts = other.counts
        self._largest, self._smallest = other._largest, other._smallest

    @property
    def extremes(self) -> tuple[int, int]:
        """The rows of the module whose largest code is the largest, and the smallest, of the partition."""
        return self._largest[1], self._smallest[1]


def count_codes(codes: torch.Tensor) -> torch.Tensor:
    """[256] int64: how often each code occurs among FP8 weights."""
    return torch.bincount(codes.view(torch.uint8).reshape(-1), minlength=256).cpu()
