"""Reading a fused group: rows as stored, the scale of each, what a loader puts into the slots.

Written a second time: shares no layout code with ``convert``, so that one cannot hide the other's mistake. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rewrite.checkpoint.checkpoint import Checkpoint
from rewrite.errors import CheckpointError, StorageError
from rewrite.quantization.groups import FusedGroup, Module, Partition
from rewrite.verification.values import Bytes, Values, code_values, decode, encode

#: Rows and columns of the blocks of a module, by what the config says; None: it has none.
Blocks = Callable[[str], tuple[int, int] | None]
ROWS = 1024  # in memory at a time: 40 MB in float64 for 5120 columns
Scales = npt.NDArray[np.float32]


@dataclass(frozen=True)
class StoredRows:
    """Some rows of one partition: ``raw`` [n, bytes of a row], and float32 ``scale`` [n, 1], one a row; or [n, K] where
    blocks have scales."""

    dtype: str
    raw: Bytes
    scale: Scales

    def value(self) -> Values:
        """[n, K] float64: what the checkpoint means. A product of an FP8 and a float32 value is exact in float64."""
        with np.errstate(invalid="ignore"):
            return decode(self.dtype, self.raw).astype(np.float64) * self.scale

    def rounded(self, dtype: str) -> Bytes:
        """[n, K x its size]: the bytes in the plain ``dtype``: the product rounded to float32 and then, once, to it."""
        with np.errstate(invalid="ignore", over="ignore"):
            return encode(decode(self.dtype, self.raw) * self.scale, dtype)


@dataclass(frozen=True)
class ScaleTable:
    """The scales of a module: ``values`` [N], a row each; or by ``block`` (rows, columns), of K ``columns``."""

    values: Scales
    block: tuple[int, int] | None
    columns: int

    def of(self, rows: range) -> Scales:
        """[n, 1], or [n, K] where blocks have scales."""
        if self.block is None:
            return self.values[rows.start : rows.stop, None]
        of_rows = self.values[np.arange(rows.start, rows.stop) // self.block[0]]
        return of_rows[:, np.arange(self.columns) // self.block[1]]


def read_rows(checkpoint: Checkpoint, name: str, runs: Sequence[range]) -> Bytes:
    """[n, bytes of a row]: some rows of a tensor, as stored."""
    info, count = checkpoint.tensors[name], sum(map(len, runs))
    size = info.nbytes // info.shape[0] if info.shape[0] else 0
    start = checkpoint.shards[info.shard].header.size + info.start
    with checkpoint.storage.open(info.shard) as file:
        raw = b"".join([file.read(start + run.start * size, len(run) * size) for run in runs])
    if len(raw) != count * size:
        raise StorageError("A shard shrank while it was read", where=f"{info.shard}: {name}")
    return np.frombuffer(raw, np.uint8).reshape(count, size)


def in_chunks(rows: Iterable[range], most: int = ROWS) -> Iterator[list[range]]:
    """Rows to be read together, at ``most`` so many; several short runs of them come together."""
    pending: list[range] = []
    for run in rows:
        for start in range(run.start, run.stop, most):
            piece = range(start, min(start + most, run.stop))
            if sum(map(len, pending)) + len(piece) > most:
                yield pending
                pending = []
            pending.append(piece)
    if pending:
        yield pending


class GroupReader:
    """Reads one fused group from a checkpoint, a few rows at a time."""

    def __init__(self, checkpoint: Checkpoint, group: FusedGroup, blocks: Blocks | None = None) -> None:
        self._checkpoint, self._blocks = checkpoint, blocks
        self._read: dict[str, Scales] = {}
        self.group = group

    def partitions(self) -> Iterator[tuple[Partition, str]]:
        """Every partition with its module, in slot order."""
        return ((partition, module.name) for module in self.group.modules for partition in module.partitions)

    def module(self, name: str) -> Module:
        return next(module for module in self.group.modules if module.name == name)

    def scales(self, module: str) -> Scales:
        """[N] float32: the stored scale of a module spread over its rows."""
        found = self.module(module)
        rows = found.weight.shape[0]
        if found.scale is None:
            return np.ones(rows, np.float32)
        stored = self._values(found.scale.name)
        if stored.size == 1:
            return np.broadcast_to(stored, rows)
        if stored.size == rows:
            return stored
        if stored.size != len(found.partitions):
            raise CheckpointError(
                "A scale fits neither the rows nor the partitions of its weight",
                where=f"{found.scale.shard}: {found.scale.name}",
                expected=f"1, {len(found.partitions)} or {rows} values",
                found=f"{list(found.scale.shape)}",
            )
        return stored.repeat([partition.rows for partition in found.partitions])

    def scale_table(self, module: str) -> ScaleTable:
        """The scales of a module, as data."""
        block = self.block(module)
        if block is None:
            return ScaleTable(self.scales(module), None, 0)
        found = self.module(module)
        stored = found.block_scale or found.scale
        assert stored is not None  # there are blocks of it
        return ScaleTable(self._values(stored.name).reshape(stored.shape), block, found.weight.shape[1])

    def block(self, module: str) -> tuple[int, int] | None:
        """Rows and columns that share a scale, where the config says so and a scale of that shape is stored."""
        found, block = self.module(module), self._blocks(module) if self._blocks else None
        stored = found.block_scale or found.scale
        if block is None or stored is None:
            return None
        shape = tuple(-(-size // step) for size, step in zip(found.weight.shape, block, strict=True))
        return block if stored.shape == shape else None

    def is_per_tensor(self) -> bool:
        """Whether every module has one scale: what fusing loaders put into slots and requantize."""
        counts = (
            (m.scale.numel if m.scale and len(m.scale.shape) < 2 else 0, len(m.partitions)) for m in self.group.modules
        )
        return all(count in (1, partitions) for count, partitions in counts)

    def is_plain(self) -> bool:
        """Whether the weights are not quantized."""
        return all(module.scale is None and module.block_scale is None for module in self.group.modules)

    def chunks(self, module: str, rows: Iterable[range], most: int = ROWS) -> Iterator[StoredRows]:
        """These rows of a module, at ``most`` so many at a time."""
        info = self._checkpoint.tensors[self.module(module).weight.name]
        for runs in in_chunks(rows, most):
            scale = [self.scale_table(module).of(run) for run in runs]
            yield StoredRows(info.dtype, read_rows(self._checkpoint, info.name, runs), np.concatenate(scale))

    def input_scale(self) -> float | None:
        """The scale that the fused layer quantizes its input with: engines take the largest of the modules'."""
        stored = [self._values(module.input_scale.name) for module in self.group.modules if module.input_scale]
        return max(float(scale.max()) for scale in stored) if stored else None

    def slots(self, *, every_slot: bool) -> tuple[float | None, ...]:
        """The scale in each slot of the fused layer, as loaded; None: the value that the slot was created with.

        Fixed loaders fill every slot (``every_slot``), the faulty ones the first slot of each module only (vLLM issue
        #38197, PR #38517); of a layer that is stored fused both fill the first.
        """
        slots: list[float | None] = []
        for module in self.group.modules:
            values = self._slot_values(module)
            spread = every_slot and len(self.group.modules) > 1
            for i, _ in enumerate(module.partitions):
                slots.append(values[i if len(values) > 1 else 0] if spread or i == 0 else None)
        return tuple(slots)

    def _slot_values(self, module: Module) -> list[float | None]:
        stored = module.scale
        if stored is None or len(stored.shape) > 1 or stored.numel not in (1, len(module.partitions)):
            return [None]
        return [float(value) for value in self._values(stored.name)]

    def _values(self, name: str) -> Scales:
        """[n] float32, read once."""
        if name not in self._read:
            raw = np.frombuffer(self._checkpoint.read_tensor(name), np.uint8)
            self._read[name] = np.asarray(decode(self._checkpoint.tensors[name].dtype, raw), np.float32)
        return self._read[name]


@dataclass(frozen=True)
class DequantizedRows:
    """Rows of plain weights, made from rows of FP8 codes. Data alone: it goes to whoever reads the file."""

    fp8: str
    plain: str
    old_row: int
    new_row: int
    start: int  # the first row of the partition
    scales: ScaleTable
    table: npt.NDArray[Any] | None  # [256]: where all rows have one scale

    @classmethod
    def of(cls, reader: GroupReader, name: str, partition: Partition, plain: str) -> DequantizedRows:
        module, scales = reader.module(name), reader.scale_table(name)
        size = {"F16": 2, "BF16": 2, "F32": 4}.get(plain, 0)
        columns = module.weight.shape[1]
        table = None
        scale = None if scales.block else scales.of(range(partition.start, partition.stop))
        if scale is not None and scale.size and (scale == scale[0]).all():
            with np.errstate(invalid="ignore", over="ignore"):
                table = encode(code_values(module.weight.dtype)[:, None] * scale[0], plain).view(f"<u{size}").ravel()
        return cls(module.weight.dtype, plain, columns, columns * size, partition.start, scales, table)

    def expected(self, old: bytes, first: int) -> bytes:
        codes = np.frombuffer(old, np.uint8)
        if self.table is not None:
            return np.take(self.table, codes).tobytes()
        start = self.start + first
        scale = self.scales.of(range(start, start + len(old) // self.old_row))
        return StoredRows(self.fp8, codes.reshape(-1, self.old_row), scale).rounded(self.plain).tobytes()
