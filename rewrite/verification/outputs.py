"""Check 4: what the layers compute, as served. The fixed loader on IN against OUT, both against float64.

Where both quantize activations alike, every partition is judged against the product of the quantized activations with
the true weights: where its scale is the group's largest, nothing is requantized and the outputs must agree; where it is
smaller, OUT must be no further off than the fixed loader on IN, and the two must not differ by more than
requantization can explain (:func:`rewrite.verification.oracle.requantization_bound`).

A sample of the rows of each partition is multiplied (:mod:`rewrite.verification.sample`); the weights have been
compared in full. Where OUT quantizes activations in another way, or not at all, its outputs cannot agree with those of
IN. They are then judged against the product of OUT's own activations with the true weights, with which they must agree.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from rewrite.checkpoint.checkpoint import Checkpoint
from rewrite.progress import Counter, Progress
from rewrite.quantization.dtypes import FP8_DTYPES
from rewrite.quantization.groups import FusedGroup, Partition
from rewrite.verification import configs, gemm
from rewrite.verification.counts import CodeCounts, count_codes
from rewrite.verification.expected import Expected, has_blocks, in_checkpoint
from rewrite.verification.nvfp4_outputs import packed_numbers
from rewrite.verification.oracle import Scaled, Server, all_codes, as_rows, rounded
from rewrite.verification.reader import ROWS, GroupReader
from rewrite.verification.result import Check, PartitionNumbers, Settings, judge, skip
from rewrite.verification.sample import Sample, draw
from rewrite.verification.sums import OutputSums, WeightErrors
from rewrite.verification.weights import Different

#: What the configs of IN and OUT say.
Schemes = tuple[configs.Schemes, configs.Schemes]
#: By module and partition.
Counts = Mapping[tuple[str, str], CodeCounts]
_ROWS_ON_CPU = 64  # at a time: what is made of them stays in the processor's cache


@dataclass(frozen=True)
class RowsToMultiply:
    """What the other checks have seen of the weights, and which rows are multiplied."""

    sample: Sample
    counts: Counts
    different: Different

    def rows(self, module: str, partition: Partition) -> tuple[range, ...]:
        """The sampled rows, among them those with the extreme codes and some of those that differ."""
        key = (module, partition.name)
        counted = self.counts.get(key)
        return self.sample.of(module, partition, (*(counted.extremes if counted else ()), *self.different.get(key, ())))

    def only(self, group: FusedGroup) -> RowsToMultiply:
        """Of the modules of one group."""
        names = {module.name for module in group.modules}
        counts = {key: found for key, found in self.counts.items() if key[0] in names}
        return RowsToMultiply(
            self.sample, counts, {key: rows for key, rows in self.different.items() if key[0] in names}
        )

    def nbytes(self, group: FusedGroup) -> int:
        """Bytes of the rows of a group of IN."""
        return sum(
            len(run) * module.weight.nbytes // module.weight.shape[0]
            for module in group.modules
            for partition in module.partitions
            for run in self.rows(module.name, partition)
            if run
        )


def choose_groups(groups: tuple[FusedGroup, ...], seed: int) -> tuple[FusedGroup, ...]:
    """The groups to multiply: all that are fused, and of other layers a sample. None with scales for blocks: no engine
    requantizes these, so that the weights are equal says all."""
    fused = [group for group in groups if not has_blocks(group)]
    single = [group.name for group in fused if len(group.modules) == 1 and len(group.modules[0].partitions) == 1]
    left_out = set(single).difference(draw(single, seed))
    return tuple(group for group in fused if group.name not in left_out)


def watch_codes(
    source: Checkpoint, groups: Iterable[FusedGroup], sample: Sample
) -> Iterator[tuple[str, list[tuple[Partition, CodeCounts | None]]]]:
    """For each weight of which codes have to be counted its partitions: where an engine makes other weights of them, or
    where only some of the rows are looked at."""
    for group in groups:
        reader = GroupReader(source, group)
        slots = {*reader.slots(every_slot=True), *reader.slots(every_slot=False)} if reader.is_per_tensor() else set()
        for module in group.modules:
            columns = module.weight.shape[1]
            wanted = [len(slots) > 1 or not sample.covers(partition) for partition in module.partitions]
            if any(wanted) and columns and module.weight.dtype in FP8_DTYPES:
                pairs = zip(module.partitions, wanted, strict=True)
                yield module.weight.name, [(p, CodeCounts(p, columns) if want else None) for p, want in pairs]


class Multiplication:
    """The layers of IN and OUT that are multiplied: none where there is nothing to choose from. ``counters`` are to be
    filled before :meth:`check`, as far as all bytes are read."""

    def __init__(
        self, source: Checkpoint, out: Checkpoint, expected: Expected, settings: Settings, sample: Sample
    ) -> None:
        self._source, self._out, self._settings, self._sample = source, out, settings, sample
        self._groups = choose_groups(expected.groups, settings.seed)
        self._layers = draw(expected.packed, settings.seed)
        self.counters = {} if settings.quick else dict(watch_codes(source, self._groups, sample))

    def check(
        self, different: Different, progress: Progress | None, executor: Executor | None = None
    ) -> tuple[Check, tuple[PartitionNumbers, ...]]:
        """Group by group: memory is that of 1024 rows, not of the model. ``different``: rows whose weights differ;
        ``progress`` is about the bytes of the rows of IN that are multiplied. The workers of an ``executor`` take a
        group each."""
        schemes = (configs.read_schemes(self._source), configs.read_schemes(self._out))
        if not self._groups and not self._layers:
            return skip("outputs", "no fused layer was converted: nothing was multiplied"), ()
        counts = {
            (name.removesuffix(".weight"), partition.name): counter
            for name, pairs in self.counters.items()
            for partition, counter in pairs
            if counter is not None
        }
        chosen = RowsToMultiply(self._sample, counts, different)
        counter = Counter(sum(map(chosen.nbytes, self._groups)), progress)
        tasks = (self._task(number, group, schemes, chosen) for number, group in enumerate(self._groups))
        numbers = [row for rows in _multiplied(tasks, counter, executor) for row in rows]
        numbers += packed_numbers(self._source, self._out, self._layers, self._settings, self._sample)
        problems = [f"{row.group}: {row.partition}, {row.reason}" for row in numbers if row.verdict == "FAILED"]
        return judge("outputs", problems, self._summary(numbers)), tuple(numbers)

    def _task(self, number: int, group: FusedGroup, schemes: Schemes, chosen: RowsToMultiply) -> GroupTask:
        converted = in_checkpoint(group, self._out)
        return GroupTask(
            _only(self._source, group), _only(self._out, converted), group, converted, self._settings,
            (_is_static(group, schemes[0]), _is_static(converted, schemes[1])),
            chosen.only(group), self._settings.seed + number,
        )  # fmt: skip

    def _summary(self, numbers: list[PartitionNumbers]) -> str:
        partitions = [p for group in self._groups for module in group.modules for p in module.partitions]
        partitions += [module.partition for layer in self._layers for module in layer.modules]
        rows = "" if all(map(self._sample.covers, partitions)) else f"{self._sample.rows} rows of each of "
        costs = max((row.weights_out for row in numbers if row.reason == "rescaled"), default=0.0)
        said = f"; rescaled weights are off by up to {costs:.3g} of their norm" if costs else ""
        settings = self._settings
        made = f"{len(numbers)} partitions on {settings.device}, {settings.tokens} tokens, seed {settings.seed}"
        return f"{rows}{made}{said}"


def _multiplied(
    tasks: Iterable[GroupTask], counter: Counter, executor: Executor | None
) -> Iterator[list[PartitionNumbers]]:
    if executor is None:
        yield from (task.numbers(counter) for task in tasks)
        return
    futures = [(task.nbytes, executor.submit(task.numbers)) for task in tasks]
    try:
        for nbytes, future in futures:
            yield future.result()
            counter.advance(nbytes)
    finally:
        for _, future in futures:
            future.cancel()


@dataclass(frozen=True)
class GroupTask:
    """One fused group of IN and of OUT, to be multiplied. Picklable, and no larger than the group: any process that
    sees the storages can do it. ``static``: whether the inputs of each are quantized by a stored scale."""

    source: Checkpoint
    out: Checkpoint
    group: FusedGroup
    converted: FusedGroup
    settings: Settings
    static: tuple[bool, bool]
    chosen: RowsToMultiply
    seed: int

    @property
    def nbytes(self) -> int:
        return self.chosen.nbytes(self.group)

    def numbers(self, counter: Counter | None = None) -> list[PartitionNumbers]:
        """A row for each partition."""
        with _one_thread():
            return list(_Group(self).numbers(counter or Counter(0, None)))


def _only(checkpoint: Checkpoint, group: FusedGroup) -> Checkpoint:
    """Of a checkpoint what reading one group takes."""
    infos = (i for m in group.modules for i in (m.weight, m.scale, m.block_scale, m.input_scale) if i is not None)
    tensors = {info.name: info for info in infos}
    names = {info.shard for info in tensors.values()}
    shards = {n: replace(s, header=replace(s.header, tensors=())) for n, s in checkpoint.shards.items() if n in names}
    config = replace(checkpoint.config, text="", value={})
    return replace(checkpoint, config=config, index=None, shards=shards, tensors=tensors, files={})


@contextmanager
def _one_thread() -> Iterator[None]:
    """torch's threads wait for each other after every small step: on a busy machine longer than the step takes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Group:
    """A fused group of IN and OUT, with activations to multiply it with."""

    def __init__(self, task: GroupTask) -> None:
        group, settings = task.group, task.settings
        self._group, self._device, self._chosen = group, settings.device, task.chosen
        self._before, self._after = GroupReader(task.source, group), GroupReader(task.out, task.converted)
        input_scale = self._before.input_scale() if task.static[0] else None
        columns = group.modules[0].weight.shape[1]
        x = gemm.activations(columns, settings.tokens, task.seed, input_scale).to(settings.device)
        served_x = gemm.quantize(x, input_scale)
        if self._after.is_plain():
            out_x = gemm.plain(x)
        else:
            out_x = gemm.quantize(x, self._after.input_scale() if task.static[1] else None)
        self._alike = torch.equal(out_x.value(), served_x.value())
        self._inputs = {"before": served_x, "fixed": served_x, "out": served_x if self._alike else out_x}
        self._reference = served_x.value() if self._alike else x.double()
        self._servers = {
            "before": Server(self._before, self._before.slots(every_slot=False)),
            "fixed": Server(self._before, self._before.slots(every_slot=True)),
            "out": Server(self._after, self._after.slots(every_slot=settings.every_slot)),
        }

    def numbers(self, counter: Counter) -> Iterator[PartitionNumbers]:
        """A row for each partition."""
        for slot, (partition, module) in enumerate(self._before.partitions()):
            yield self._partition(slot, partition, module, counter)

    def _partition(self, slot: int, partition: Partition, module: str, counter: Counter) -> PartitionNumbers:
        chosen = self._chosen
        sums, errors = OutputSums(self._device, self._alike), WeightErrors()
        differ = chosen.different.get((module, partition.name))
        every = None if differ else _every_code(self._before, self._after, module, partition)
        counts = chosen.counts.get((module, partition.name))
        times = torch.zeros(256, dtype=torch.int64) if counts is None else counts.counts
        bounding = self._servers["fixed" if self._alike else "out"]
        for old, new in self._rows(module, chosen.rows(module, partition)):
            served = self._serve(slot, old, new)
            bound = bounding.bound(slot, old if self._alike else new)
            requantized = (self._servers["fixed"].requantizes, self._servers["out"].requantizes)
            sums.add(self._reference, old, self._inputs, served, bound, requantized=requantized)
            if every is None:
                errors.add(old, served)
            elif counts is None:
                times += count_codes(old.codes)
            counter.advance(old.codes.nbytes)
        if every is not None:
            errors.add(every[0], self._serve(slot, *every), times)
        return sums.judge(self._group.name, partition, errors)

    def _rows(self, module: str, rows: tuple[range, ...]) -> Iterator[tuple[Scaled, Scaled]]:
        """The same rows of IN and OUT, some at a time."""
        most = _ROWS_ON_CPU if self._device == "cpu" else ROWS
        chunks = (reader.chunks(module, rows, most) for reader in (self._before, self._after))
        for old, new in zip(*chunks, strict=True):
            yield as_rows(old, self._device), as_rows(new, self._device)

    def _serve(self, slot: int, old: Scaled, new: Scaled) -> dict[str, Scaled]:
        return {name: server(slot, new if name == "out" else old) for name, server in self._servers.items()}


def _every_code(
    before: GroupReader, after: GroupReader, module: str, partition: Partition
) -> tuple[Scaled, Scaled] | None:
    """A row for each code of IN, and what it is in OUT, whose weights are equal; None where rows have other scales."""
    one, other = before.module(module).weight, after.module(module).weight
    scales = [set(reader.scales(module)[partition.start : partition.stop].tolist()) for reader in (before, after)]
    if any(len(each) != 1 for each in scales) or one.dtype not in FP8_DTYPES:
        return None
    old = all_codes(one.dtype, scales[0].pop())
    if other.dtype == one.dtype:
        return old, all_codes(other.dtype, scales[1].pop())
    return old, rounded(old, other.dtype)


def _is_static(group: FusedGroup, schemes: configs.Schemes) -> bool:
    """Whether engines quantize the input by a stored scale. A config that says nothing: they go by the tensor."""
    found = schemes.of_module(group.modules[0].name)
    return found.static if found else any(module.input_scale for module in group.modules)
