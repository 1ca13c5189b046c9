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

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from rewrite.checkpoint.checkpoint import Checkpoint
from rewrite.quantization.dtypes import FP8_DTYPES
from rewrite.quantization.groups import FusedGroup, Partition
from rewrite.verification import configs, gemm
from rewrite.verification.counts import CodeCounts, count_codes
from rewrite.verification.expected import has_blocks, in_checkpoint
from rewrite.verification.norms import WeightErrors
from rewrite.verification.oracle import (
    SENTINEL,
    Rows,
    Served,
    all_codes,
    as_rows,
    as_stored,
    half_precision_bound,
    plain_bound,
    requantization_bound,
    requantized,
    rounded,
)
from rewrite.verification.reader import ROWS, GroupReader
from rewrite.verification.result import Check, PartitionNumbers, Settings, Verdict, judge, skip
from rewrite.verification.sample import Sample
from rewrite.verification.weights import Different

#: What the configs of IN and OUT say.
Schemes = tuple[configs.Schemes, configs.Schemes]
#: By module and partition.
Counts = Mapping[tuple[str, str], CodeCounts]
_ROWS_ON_CPU = 64  # at a time: what is made of them stays in the processor's cache
_SINGLE_LAYERS = 256  # of those that no engine fuses: the weights of all of them are compared


@dataclass(frozen=True)
class Looked:
    """What the other checks have seen of the weights, and which rows are multiplied."""

    sample: Sample
    counts: Counts
    different: Different

    def rows(self, module: str, partition: Partition) -> tuple[range, ...]:
        """The sampled rows, among them those with the extreme codes and some of those that differ."""
        key = (module, partition.name)
        counted = self.counts.get(key)
        return self.sample.of(module, partition, (*(counted.extremes if counted else ()), *self.different.get(key, ())))


def choose_groups(groups: tuple[FusedGroup, ...], seed: int) -> tuple[FusedGroup, ...]:
    """The groups to multiply: all that are fused, and of other layers a sample. None with scales for blocks: no engine
    requantizes these, so that the weights are equal says all."""
    fused = [group for group in groups if not has_blocks(group)]
    single = [group.name for group in fused if len(group.modules) == 1 and len(group.modules[0].partitions) == 1]
    drawn = set(single if len(single) <= _SINGLE_LAYERS else random.Random(seed).sample(single, _SINGLE_LAYERS))
    left_out = set(single) - drawn
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


def check_outputs(
    source: Checkpoint,
    out: Checkpoint,
    groups: tuple[FusedGroup, ...],
    settings: Settings,
    schemes: Schemes,
    looked: Looked,
) -> tuple[Check, tuple[PartitionNumbers, ...]]:
    """Group by group: memory is that of 1024 rows, not of the model. ``schemes`` are what the two configs say."""
    if not groups:
        return skip("outputs", "no fused FP8 layer was converted: nothing was multiplied"), ()
    with _one_thread():
        numbers = [
            row for i, group in enumerate(groups) for row in _group(source, out, group, settings, schemes, looked, i)
        ]
    problems = [f"{row.group}: {row.partition}, {row.reason}" for row in numbers if row.verdict == "FAILED"]
    return judge("outputs", problems, _summary(groups, numbers, settings, looked.sample)), tuple(numbers)


@contextmanager
def _one_thread() -> Iterator[None]:
    """torch's threads wait for each other after every small step: on a busy machine longer than the step takes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _summary(
    groups: tuple[FusedGroup, ...], numbers: list[PartitionNumbers], settings: Settings, sample: Sample
) -> str:
    partitions = (p for group in groups for module in group.modules for p in module.partitions)
    rows = "" if all(map(sample.covers, partitions)) else f"{sample.rows} rows of each of "
    return f"{rows}{len(numbers)} partitions on {settings.device}, {settings.tokens} tokens, seed {settings.seed}"


def _group(
    source: Checkpoint,
    out: Checkpoint,
    group: FusedGroup,
    settings: Settings,
    schemes: Schemes,
    looked: Looked,
    number: int,
) -> Iterator[PartitionNumbers]:
    converted = in_checkpoint(group, out)
    before, after = GroupReader(source, group), GroupReader(out, converted)
    input_scale = before.input_scale() if _is_static(group, schemes[0]) else None
    columns = group.modules[0].weight.shape[1]
    x = gemm.activations(columns, settings.tokens, settings.seed + number, input_scale).to(settings.device)
    served_x = gemm.quantize(x, input_scale)
    if after.is_plain():
        out_x = gemm.Activations(x, None)
    else:
        out_x = gemm.quantize(x, after.input_scale() if _is_static(converted, schemes[1]) else None)
    alike = out_x.same(served_x)
    if alike:
        out_x = served_x
    reference = served_x.value() if alike else x.double()
    broken, fixed = (_server(before, before.slots(every_slot=every)) for every in (False, True))
    other = _server(after, after.slots(every_slot=settings.every_slot))
    for slot, (partition, module) in enumerate(before.partitions()):
        sums, errors = _Sums(settings.device, alike), WeightErrors()
        serve = {"before": broken, "fixed": fixed, "out": other}
        differ = looked.different.get((module, partition.name))
        every = None if differ else _every_code(before, after, module, partition)
        counts = looked.counts.get((module, partition.name))
        times = torch.zeros(256, dtype=torch.int64) if counts is None else counts.counts
        rows = looked.rows(module, partition)
        most = _ROWS_ON_CPU if settings.device == "cpu" else ROWS
        for stored, found in zip(*(each.chunks(module, rows, most) for each in (before, after)), strict=True):
            old, new = as_rows(stored, settings.device), as_rows(found, settings.device)
            served = {name: loader(slot, new if name == "out" else old) for name, loader in serve.items()}
            inputs = {name: out_x if name == "out" else served_x for name in serve}
            sums.add(reference, old, inputs, served, fixed.bound(slot, old) if alike else other.bound(slot, new))
            if every is None:
                errors.add(old, served)
            elif counts is None:
                times += count_codes(old.weight)
        if every is not None:
            old, new = every
            errors.add(
                old, {name: loader(slot, new if name == "out" else old) for name, loader in serve.items()}, times
            )
        yield sums.judge(group.name, partition, errors)


def _every_code(before: GroupReader, after: GroupReader, module: str, partition: Partition) -> tuple[Rows, Rows] | None:
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


@dataclass(frozen=True)
class _server:  # noqa: N801 - used as a function of slot and rows
    """How an engine serves a group's rows, given what its loader put into the slots."""

    reader: GroupReader
    slots: tuple[float | None, ...]

    @property
    def fused_on_disk(self) -> bool:
        """A last slot that nothing was loaded into: engines take the module for one that was fused before it was
        quantized (Phi-3), and requantize nothing."""
        return self.slots[-1] is None

    @property
    def largest(self) -> float:
        return max(scale for scale in self.slots if scale is not None)

    def bound(self, slot: int, rows: Rows) -> torch.Tensor | None:
        """How far what the engine multiplies with may be from each weight of the slot; None for not at all."""
        if self.reader.is_plain():
            return plain_bound(rows)
        if not self.reader.is_per_tensor() or self.fused_on_disk:
            return None
        if self.slots[slot] == self.largest:
            return half_precision_bound(rows, self.largest)
        return requantization_bound(rows, self.largest)

    def __call__(self, slot: int, rows: Rows) -> Served:
        if not self.reader.is_per_tensor() or self.fused_on_disk:
            return as_stored(rows)
        scale = self.slots[slot]
        return requantized(rows, SENTINEL if scale is None else scale, self.largest)


@dataclass
class _Sums:
    """Squared norms and extremes of the outputs of one partition, added up over its chunks."""

    device: str
    alike: bool  # whether IN and OUT quantize activations alike, so that their outputs can be compared
    truth: float = 0.0
    errors: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("before", "fixed", "out"), 0.0))
    bound_used: float | None = None
    beyond: float = 0.0  # largest excess of |fixed - out| over what accumulation and the bound explain

    def add(
        self,
        x: torch.Tensor,
        rows: Rows,
        inputs: Mapping[str, gemm.Activations],
        served: Mapping[str, Served],
        bound: torch.Tensor | None,
    ) -> None:
        """``x`` [tokens, K] float64: the activations of the reference. Each of ``served`` is multiplied with its own of
        ``inputs``."""
        true = rows.true()
        reference = x @ true.T
        self.truth += float(reference.square().sum())
        results: dict[str, torch.Tensor] = {}
        for name, weights in served.items():
            twin = next(
                (each for each in results if inputs[each] is inputs[name] and _same(served[each], weights)), None
            )
            results[name] = gemm.multiply(inputs[name], weights) if twin is None else results[twin]
            self.errors[name] += float((results[name] - reference).square().sum())
        if self.alike:
            self._compare(x, true, reference, results["fixed"] - results["out"], bound)
        else:
            own = inputs["out"].value()
            self._compare(own, true, own @ true.T, results["out"] - own @ true.T, bound)

    def _compare(
        self,
        x: torch.Tensor,
        true: torch.Tensor,
        reference: torch.Tensor,
        difference: torch.Tensor,
        bound: torch.Tensor | None,
    ) -> None:
        """How much of what can explain the ``difference`` is used, and what is beyond it."""
        kind = x.device.type
        slack = gemm.OUTPUT[kind] * reference.abs() + 1e-300
        accumulation = gemm.ACCUMULATION[kind] if self.alike else max(gemm.ACCUMULATION[kind], gemm.SCALED)
        if accumulation:
            slack = slack + accumulation * (x.abs() @ true.abs().T)
        allowed = 2 * slack
        if bound is not None:
            explained = x.abs() @ bound.T
            self.bound_used = max(self.bound_used or 0.0, float((difference.abs() / (explained + slack)).max()))
            allowed = allowed + explained * (1 + gemm.OUTPUT[kind])
        self.beyond = max(self.beyond, float((difference.abs() / (2 * allowed)).nan_to_num(torch.inf).max()))

    def judge(self, group: str, partition: Partition, weights: WeightErrors) -> PartitionNumbers:
        def relative(name: str) -> float:
            return float((self.errors[name] / self.truth) ** 0.5) if self.truth else 0.0

        fixed, out = relative("fixed"), relative("out")
        verdict, reason = self._verdict(fixed, out)
        return PartitionNumbers(
            group,
            partition.name,
            weights.relative("before"),
            weights.relative("fixed"),
            weights.relative("out"),
            relative("before"),
            fixed,
            out,
            self.bound_used,
            verdict,
            reason,
        )

    def _verdict(self, fixed: float, out: float) -> tuple[Verdict, str]:
        rounding = gemm.OUTPUT[torch.device(self.device).type]
        if self.alike and not out <= fixed + rounding:
            return "FAILED", f"outputs are off by {out:.3g} of their norm, the fixed loader on IN by {fixed:.3g}"
        if self.beyond > 1:
            other = "the fixed loader's" if self.alike else "the true weights'"
            return "FAILED", f"outputs differ from {other} by {self.beyond:.3g} times what is explained"
        if not self.alike:
            return "ok", "agrees with the true weights, for the activations as OUT quantizes them"
        return "ok", "requantized by the fixed loader only" if self.bound_used is not None else "agrees"


def _same(one: Served, other: Served) -> bool:
    """Whether two engines multiply with the same numbers by the same kernel: a GPU has another for a scale by row."""
    if one.weight.dtype != other.weight.dtype or not bool((one.scale == other.scale).all()):
        return False
    if one.weight.device.type != "cpu" and one.scale.shape != other.scale.shape:
        return False
    return one.weight is other.weight or torch.equal(one.weight.view(torch.uint8), other.weight.view(torch.uint8))
