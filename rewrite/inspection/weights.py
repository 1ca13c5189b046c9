"""What is wrong in the weights themselves: seen only by reading all of them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from rewrite.checkpoint.checkpoint import Checkpoint, Shard
from rewrite.checkpoint.header import TensorInfo
from rewrite.errors import StorageError
from rewrite.ledger.fault import CALIBRATE, Fault
from rewrite.progress import Counter, Progress
from rewrite.quantization.dtypes import PLAIN_DTYPES, e4m3
from rewrite.quantization.groups import WEIGHTS, is_table

_CHUNK = 1 << 20
_FP8 = "F8_E4M3"
_NAN = 0x7F  # and 0xff (OCP OFP8 specification, table 1)
_LARGEST = 448.0  # of E4M3
#: A scale is made so that the largest weight becomes 448; powers of two as scales cost a factor of two.
_UNUSED = 16
#: The bits that are set where a number is not zero: all but the sign, of two numbers in a byte of U8 (FP4).
_SIZE_BITS = {_FP8: 0x7F, "U8": 0x77, "BF16": 0x7FFF, "F16": 0x7FFF, "F32": 0x7FFFFFFF}
_WIDTHS = {_FP8: "u1", "U8": "u1", "BF16": "<u2", "F16": "<u2", "F32": "<u4"}


def find_bad_weights(checkpoint: Checkpoint, *, workers: int = 1, progress: Progress | None = None) -> list[Fault]:
    """NaN codes, rows of nothing but zeros, and FP8 codes that hardly use the range.

    Reads every tensor with FP8 codes, and the matrices of linear layers: ``.weight`` of plain and FP8 layers,
    ``.weight_packed``. Not tables of embeddings and ``lm_head``, whose rows are zero where a vocabulary was padded.
    """
    infos = [info for shard in checkpoint.shards.values() for info in shard.header.tensors if _is_read(info)]
    counter = Counter(sum(info.nbytes for info in infos), progress)

    def look(shard: Shard) -> list[Fault]:
        return [*_in_shard(checkpoint, shard, counter)]

    with ThreadPoolExecutor(max_workers=workers) as pool:
        try:
            return [finding for found in pool.map(look, checkpoint.shards.values()) for finding in found]
        except BaseException:
            counter.stop.set()  # the workers end at their next chunk
            raise


def _is_read(info: TensorInfo) -> bool:
    return info.nbytes > 0 and (info.dtype == _FP8 or _is_layer(info))


def _is_layer(info: TensorInfo) -> bool:
    module, _, kind = info.name.rpartition(".")
    stored = info.dtype in _SIZE_BITS and (info.dtype in PLAIN_DTYPES or info.dtype in (_FP8, "U8"))
    named = kind in WEIGHTS and not is_table(module) and module.rpartition(".")[2] != "lm_head"
    return stored and named and len(info.shape) == 2


def _in_shard(checkpoint: Checkpoint, shard: Shard, counter: Counter) -> Iterator[Fault]:
    with checkpoint.storage.open(shard.name) as file:
        for info in shard.header.tensors:
            if not _is_read(info):
                continue
            seen = _Seen(info)
            row = info.nbytes // info.shape[0] if len(info.shape) == 2 else 1
            step = max(_CHUNK // row, 1) * row
            for start in range(info.start, info.end, step):
                length = min(step, info.end - start)
                chunk = file.read(shard.header.size + start, length)
                if len(chunk) != length:
                    raise StorageError("A shard shrank while it was read", where=f"{shard.name}: {info.name}")
                seen.add(chunk, row)
                counter.advance(length)
            yield from seen.findings(f"{shard.name}: {info.name}")


@dataclass
class _Seen:
    """What was seen of a tensor so far."""

    info: TensorInfo
    nans: int = 0
    zero_rows: int = 0
    largest: int = 0  # code, without its sign and without NaN

    def add(self, chunk: bytes, row: int) -> None:
        """Whole rows."""
        if self.info.dtype == _FP8:
            self.nans += chunk.count(b"\x7f") + chunk.count(b"\xff")
        if not _is_layer(self.info):
            return
        width = np.dtype(_WIDTHS[self.info.dtype])
        sizes = (np.frombuffer(chunk, width) & _SIZE_BITS[self.info.dtype]).reshape(-1, row // width.itemsize)
        largest = sizes.max(axis=1)
        self.zero_rows += int((largest == 0).sum())
        if self.info.dtype == _FP8 and self.largest < _NAN - 1:
            numbers = np.where(sizes == _NAN, 0, sizes) if self.nans else largest
            self.largest = max(self.largest, int(numbers.max()))

    def findings(self, where: str) -> Iterator[Fault]:
        if self.nans:
            yield _fault(f"{self.nans:,} FP8 NaN codes among {self.info.nbytes:,} weights", where)
        if not _is_layer(self.info):
            return
        rows = self.info.shape[0]
        if self.zero_rows:
            yield _fault(f"{self.zero_rows:,} of {rows:,} rows are nothing but zeros", where)
        value = e4m3(self.largest)
        if self.info.dtype == _FP8 and self.zero_rows < rows and value * _UNUSED < _LARGEST:
            what = (
                f"the largest FP8 code stands for {value:g} of 448: its scale is {_LARGEST / value:.3g} times too large"
            )
            yield _fault(what, where)


def _fault(found: str, where: str) -> Fault:
    return Fault("weights", where, found, "codes that use the range", CALIBRATE)
