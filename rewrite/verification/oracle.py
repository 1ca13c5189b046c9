"""The truth, written a second time: reading a module's rows, dequantizing them, and what engines make of them.

Shares no layout code with ``convert``, so that one cannot hide the other's mistake. torch only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from rewrite.checkpoint.checkpoint import Checkpoint
from rewrite.quantization.groups import FusedGroup, Module, Partition

#: torch's names for the dtypes of safetensors that weights and scales have.
_DTYPES = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max  # 448
#: vLLM creates the scale slots of a fused layer with this value (``create_fp8_scale_parameter``).
SENTINEL = torch.finfo(torch.float32).min
#: Rows and columns of the blocks of a module, by what the config says; None: it has none.
Blocks = Callable[[str], tuple[int, int] | None]
_ROWS = 1024  # rows in memory at a time: 40 MB in float64 for 5120 columns


@dataclass(frozen=True)
class Rows:
    """Some rows of one partition: ``weight`` [n, K] as stored (FP8, or plain), float32 ``scale`` [n, 1], one a row; or
    [n, K] where blocks have scales."""

    weight: torch.Tensor
    scale: torch.Tensor

    def true(self) -> torch.Tensor:
        """[n, K] float64: what the checkpoint means. A product of an FP8 and a float32 value is exact in float64."""
        return self.weight.double() * self.scale.double()


@dataclass(frozen=True)
class Served:
    """Rows as an engine multiplies with them: FP8 ``weight`` [n, K] and float32 ``scale``, ``[]`` or [n, 1]."""

    weight: torch.Tensor
    scale: torch.Tensor

    def value(self) -> torch.Tensor:
        return self.weight.double() * self.scale.double()


class GroupReader:
    """Reads one fused group from a checkpoint, a few rows at a time."""

    def __init__(
        self, checkpoint: Checkpoint, group: FusedGroup, device: str = "cpu", blocks: Blocks | None = None
    ) -> None:
        self._checkpoint, self._device, self._blocks = checkpoint, device, blocks
        self.group = group

    def partitions(self) -> Iterator[tuple[Partition, str]]:
        """Every partition with its module, in slot order."""
        return ((partition, module.name) for module in self.group.modules for partition in module.partitions)

    def scales(self, module: str) -> torch.Tensor:
        """The stored scale of a module spread over its rows: [N] float32."""
        found = self._module(module)
        rows = found.weight.shape[0]
        if found.scale is None:
            return torch.ones(rows)
        stored = self._read(found.scale.name).float()
        if stored.numel() == 1:
            return stored.reshape(1).expand(rows)
        if stored.numel() == rows:
            return stored.reshape(rows)
        sizes = torch.tensor([partition.rows for partition in found.partitions])
        return stored.reshape(-1).repeat_interleave(sizes)

    def _block_scales(self, module: str, start: int, stop: int) -> torch.Tensor | None:
        """[stop - start, K] float32: each weight's scale, where blocks have one."""
        found, block = self._module(module), self._blocks(module) if self._blocks else None
        stored = found.block_scale or found.scale
        if block is None or stored is None:
            return None
        rows = torch.arange(start, stop) // block[0]
        columns = torch.arange(found.weight.shape[1]) // block[1]
        return self._read(stored.name).float()[rows][:, columns]

    def _module(self, name: str) -> Module:
        return next(module for module in self.group.modules if module.name == name)

    def is_per_tensor(self) -> bool:
        """Whether every module has one scale: what fusing loaders put into slots and requantize."""
        counts = (
            (m.scale.numel if m.scale and len(m.scale.shape) < 2 else 0, len(m.partitions)) for m in self.group.modules
        )
        return all(count in (1, partitions) for count, partitions in counts)

    def is_plain(self) -> bool:
        """Whether the weights are not quantized."""
        return all(module.scale is None and module.block_scale is None for module in self.group.modules)

    def chunks(self, partition: Partition, module: str) -> Iterator[Rows]:
        """The partition's rows, 1024 at a time."""
        info = self._checkpoint.tensors[f"{module}.weight"]
        columns = info.shape[1]
        row = info.nbytes // info.shape[0] if info.shape[0] else 0
        data = self._checkpoint.shards[info.shard].header.size + info.start
        with self._checkpoint.storage.open(info.shard) as file:
            for start in range(partition.start, partition.stop, _ROWS):
                stop = min(start + _ROWS, partition.stop)
                raw = bytearray(file.read(data + start * row, (stop - start) * row))
                weight = torch.frombuffer(raw, dtype=_DTYPES[info.dtype]).reshape(stop - start, columns)
                scales = self._block_scales(module, start, stop)
                if scales is None:
                    scales = self.scales(module)[start:stop, None]
                yield Rows(weight.to(self._device), scales.to(self._device))

    def input_scale(self) -> float | None:
        """The scale that the fused layer quantizes its input with: engines take the largest of the modules'."""
        stored = [self._read(module.input_scale.name) for module in self.group.modules if module.input_scale]
        return max(float(scale.float().max()) for scale in stored) if stored else None

    def slots(self, *, every_slot: bool) -> tuple[float | None, ...]:
        """The scale in each slot of the fused layer, as loaded; None: the value that the slot was created with.

        Fixed loaders fill every slot (``every_slot``), the faulty ones the first slot of each module only (vLLM issue
        #38197, PR #38517); of a layer that is stored fused both fill the first.
        """
        slots: list[float | None] = []
        for module in self.group.modules:
            values = [None] if module.scale is None else self._slot_values(module.scale.name, len(module.partitions))
            spread = every_slot and len(self.group.modules) > 1
            for i, _ in enumerate(module.partitions):
                slots.append(values[i if len(values) > 1 else 0] if spread or i == 0 else None)
        return tuple(slots)

    def _slot_values(self, name: str, partitions: int) -> list[float | None]:
        stored = self._read(name)
        if stored.dim() > 1 or stored.numel() not in (1, partitions):
            return [None]
        return [float(value) for value in stored.float().reshape(-1)]

    def _read(self, name: str) -> torch.Tensor:
        info = self._checkpoint.tensors[name]
        raw = bytearray(self._checkpoint.read_tensor(name))
        return torch.frombuffer(raw, dtype=_DTYPES[info.dtype]).reshape(info.shape)


def requantized(rows: Rows, slot: float, largest: float) -> Served:
    """vLLM's and SGLang's ``requantize_with_max_scale``: dequantize by the slot's scale, quantize by the largest.

    Dequantization goes through float16, as theirs does (``per_tensor_dequantize``, w8a8_utils.py).
    """
    half = (rows.weight.to(torch.float16).float() * slot).to(torch.float16)
    weight = (half.float() / largest).clamp(-FP8_MAX, FP8_MAX).to(FP8)
    return Served(weight, torch.tensor(largest, dtype=torch.float32, device=rows.weight.device))


def as_stored(rows: Rows) -> Served:
    """A scale for each row: engines multiply with the weights as they are."""
    return Served(rows.weight, rows.scale)


def half_precision_bound(rows: Rows, scale: float) -> torch.Tensor | None:
    """[n, K] float64: how far going through float16 and back to the *same* scale can move each weight.

    Not at all for scales from 2^-15: the detour then stays within half the spacing of FP8 codes. Below, weights that
    are subnormal in float16 move by up to 2^-25, and by as much again when they are rounded to a code.
    """
    if scale >= 2.0**-15:
        return None
    return torch.where(rows.true().abs() < 2.0**-14, 2.0**-24, 0.0)


def plain_bound(rows: Rows) -> torch.Tensor:
    """[n, K] float64: how far rounding to the dtype of the plain weights ``rows`` can have moved each of them: half a
    unit in the last place, and half the smallest number."""
    info = torch.finfo(rows.weight.dtype)
    return rows.true().abs() * info.eps / 2 + info.smallest_normal * info.eps / 2


def requantization_bound(rows: Rows, largest: float) -> torch.Tensor:
    """[n, K] float64: how far requantizing to ``largest`` can move each weight w = code x scale.

    One rounding to e4m3 moves x by at most 2^-4 |x| where x / largest is a normal number (three mantissa bits: half a
    unit in the last place), and by at most half the spacing of subnormals, 2^-10 x largest, below. The rounding to
    float16 before it adds 2^-11 |w| or 2^-25, and is itself amplified by the second: hence the factor 1 + 2^-4.
    """
    true = rows.true().abs()
    half = torch.clamp(true * 2.0**-11, min=2.0**-25)
    return torch.clamp((true + half) * 2.0**-4, min=2.0**-10 * largest) + half
