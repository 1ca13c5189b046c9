"""What every byte of OUT must be: the spans that the one pass over the files follows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rewrite.checkpoint.checkpoint import Checkpoint, Shard
from rewrite.checkpoint.header import TensorInfo
from rewrite.quantization.groups import Partition
from rewrite.verification.expected import Expected
from rewrite.verification.reader import DequantizedRows
from rewrite.verification.reading import FileSpans, Span
from rewrite.verification.untouched import same_files, same_tensors

if TYPE_CHECKING:
    from rewrite.verification.counts import CodeCounts

#: Counts of codes by the name of the weight, with all partitions of it.
CodeCounters = Mapping[str, Sequence[tuple[Partition, "CodeCounts | None"]]]
_LONGEST = 256 << 20  # of one span: several workers share a large file


@dataclass(frozen=True)
class SpansNeeded:
    """What the other checks want of the pass, for weights by name, with all of their partitions in order: the ``rules``
    of those that are converted, and who ``watches``."""

    rules: Mapping[str, Sequence[tuple[Partition, DequantizedRows]]]
    watches: CodeCounters


def plan_spans(source: Checkpoint, out: Checkpoint, expected: Expected, needed: SpansNeeded) -> list[FileSpans]:
    """Every file of OUT; those that IN does not have, or that may change, without a span."""
    same = set(same_files(source, out))
    files = []
    for name, file in out.files.items():
        if name in source.shards and name in out.shards:
            spans = tuple(_of_shard(source.shards[name], out.shards[name], out, expected, needed))
        else:
            spans = (Span(0, file.size, old=0),) if name in same else ()
        files.append(FileSpans(name, file.size, spans))
    return files


def _of_shard(old: Shard, new: Shard, out: Checkpoint, expected: Expected, needed: SpansNeeded) -> Iterator[Span]:
    pairs = [*same_tensors(old, out, expected), *_converted(old, out, needed)]
    pending: list[tuple[TensorInfo, TensorInfo]] = []
    for one, other in sorted(pairs, key=lambda pair: (pair[1].start, pair[1].end)):
        apart = one.name in needed.rules or one.name in needed.watches
        if pending and (apart or not _follows(pending, one, other)):
            yield _joined(pending, old, new)
            pending = []
        if apart:
            yield from _by_partition(one, other, old, new, needed)
        else:
            pending.append((one, other))
    if pending:
        yield _joined(pending, old, new)


def _converted(old: Shard, out: Checkpoint, needed: SpansNeeded) -> Iterator[tuple[TensorInfo, TensorInfo]]:
    for info in old.header.tensors:
        if info.name in needed.rules and out.tensors[info.name].shard == old.name:
            yield info, out.tensors[info.name]


def _follows(pending: list[tuple[TensorInfo, TensorInfo]], one: TensorInfo, other: TensorInfo) -> bool:
    """Whether a tensor lies behind the pending ones in both shards."""
    first, last = pending[0], pending[-1]
    short = one.end - first[0].start <= _LONGEST
    return short and last[0].end == one.start and last[1].end == other.start


def _joined(pairs: list[tuple[TensorInfo, TensorInfo]], old: Shard, new: Shard) -> Span:
    """Tensors that lie side by side in both shards, as one span."""
    (one, other), (last, _) = pairs[0], pairs[-1]
    start = new.header.size + other.start
    return Span(start, last.end - one.start, old.header.size + one.start, tuple(each for each, _ in pairs))


def _by_partition(one: TensorInfo, other: TensorInfo, old: Shard, new: Shard, needed: SpansNeeded) -> Iterator[Span]:
    """A weight in whole rows, partition by partition."""
    rows = one.shape[0]
    old_row, new_row = one.nbytes // rows, other.nbytes // rows
    watches = {partition.start: watch for partition, watch in needed.watches.get(one.name, ())}
    rules = needed.rules.get(one.name)
    unchanged = [(partition, None) for partition, _ in needed.watches.get(one.name, ())]
    for partition, rule in rules or unchanged:
        yield Span(
            new.header.size + other.start + partition.start * new_row,
            partition.rows * new_row,
            old.header.size + one.start + partition.start * old_row,
            (one,),
            partition.start * new_row,
            rule,
            watches.get(partition.start),
        )
