"""Check 4: what the layers compute, as served. The fixed loader on IN against OUT, both against float64.

Where both quantize activations alike, every partition is judged against the product of the quantized activations with
the true weights: where its scale is the group's largest, nothing is requantized and the outputs must agree; where it is
smaller, OUT must be no further off than the fixed loader on IN, and the two must not differ by more than
requantization can explain (:func:`rewrite.verification.oracle.requantization_bound`).

Where OUT quantizes activations in another way, or not at all, its outputs cannot agree with those of IN. They are then
judged against the product of OUT's own activations with the true weights, with which they must agree.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from rewrite.checkpoint.checkpoint import Checkpoint
from rewrite.quantization.groups import FusedGroup, Partition
from rewrite.verification import configs, gemm
from rewrite.verification.expected import in_checkpoint
from rewrite.verification.oracle import (
    SENTINEL,
    GroupReader,
    Rows,
    Served,
    as_stored,
    half_precision_bound,
    plain_bound,
    requantization_bound,
    requantized,
)
from rewrite.verification.result import Check, PartitionNumbers, Settings, Verdict, judge, skip

#: What the configs of IN and OUT say.
Schemes = tuple[configs.Schemes, configs.Schemes]


def check_outputs(
    source: Checkpoint, out: Checkpoint, groups: tuple[FusedGroup, ...], settings: Settings, schemes: Schemes
) -> tuple[Check, tuple[PartitionNumbers, ...]]:
    """Group by group: memory is that of 1024 rows, not of the model. ``schemes`` are what the two configs say."""
    if not groups:
        return skip("outputs", "no fused FP8 layer was converted: nothing was multiplied"), ()
    numbers = [row for i, group in enumerate(groups) for row in _group(source, out, group, settings, schemes, i)]
    problems = [f"{row.group}: {row.partition}, {row.reason}" for row in numbers if row.verdict == "FAILED"]
    summary = f"{len(numbers)} partitions on {settings.device}, {settings.tokens} tokens, seed {settings.seed}"
    return judge("outputs", problems, summary), tuple(numbers)


def _group(
    source: Checkpoint, out: Checkpoint, group: FusedGroup, settings: Settings, schemes: Schemes, number: int
) -> Iterator[PartitionNumbers]:
    converted = in_checkpoint(group, out)
    before, after = GroupReader(source, group, settings.device), GroupReader(out, converted, settings.device)
    input_scale = before.input_scale() if _is_static(group, schemes[0]) else None
    columns = group.modules[0].weight.shape[1]
    x = gemm.activations(columns, settings.tokens, settings.seed + number, input_scale).to(settings.device)
    served_x = gemm.quantize(x, input_scale)
    if after.is_plain():
        out_x = gemm.Activations(x, None)
    else:
        out_x = gemm.quantize(x, after.input_scale() if _is_static(converted, schemes[1]) else None)
    alike = out_x.same(served_x)
    reference = served_x.value() if alike else x.double()
    broken, fixed = (_server(before, before.slots(every_slot=every)) for every in (False, True))
    other = _server(after, after.slots(every_slot=settings.every_slot))
    for slot, (partition, module) in enumerate(before.partitions()):
        sums = _Sums(settings.device, alike)
        for old, new in zip(before.chunks(partition, module), after.chunks(partition, module), strict=True):
            results = {
                "before": (served_x, broken(slot, old)),
                "fixed": (served_x, fixed(slot, old)),
                "out": (out_x, other(slot, new)),
            }
            sums.add(reference, old, results, fixed.bound(slot, old) if alike else other.bound(slot, new))
        yield sums.judge(group.name, partition)


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
    """Squared norms and extremes of one partition, added up over its chunks."""

    device: str
    alike: bool  # whether IN and OUT quantize activations alike, so that their outputs can be compared
    truth: list[float] = field(default_factory=lambda: [0.0, 0.0])
    errors: dict[str, list[float]] = field(default_factory=lambda: {n: [0.0, 0.0] for n in ("before", "fixed", "out")})
    bound_used: float | None = None
    beyond: float = 0.0  # largest excess of |fixed - out| over what accumulation and the bound explain

    def add(
        self,
        x: torch.Tensor,
        rows: Rows,
        served: dict[str, tuple[gemm.Activations, Served]],
        bound: torch.Tensor | None,
    ) -> None:
        """``x`` [tokens, K] float64: the activations of the reference."""
        true = rows.true()
        reference = x @ true.T
        self._accumulate(self.truth, true, reference)
        results = {}
        for name, (activations, weights) in served.items():
            results[name] = gemm.multiply(activations, weights)
            self._accumulate(self.errors[name], weights.value() - true, results[name] - reference)
        if self.alike:
            self._compare(x, true, reference, results["fixed"] - results["out"], bound)
        else:
            own = served["out"][0].value()
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

    @staticmethod
    def _accumulate(sums: list[float], weights: torch.Tensor, outputs: torch.Tensor) -> None:
        sums[0] += float(weights.square().sum())
        sums[1] += float(outputs.square().sum())

    def judge(self, group: str, partition: Partition) -> PartitionNumbers:
        def relative(name: str, kind: int) -> float:
            return float((self.errors[name][kind] / self.truth[kind]) ** 0.5) if self.truth[kind] else 0.0

        fixed, out = relative("fixed", 1), relative("out", 1)
        verdict, reason = self._verdict(fixed, out)
        return PartitionNumbers(
            group,
            partition.name,
            relative("before", 0),
            relative("fixed", 0),
            relative("out", 0),
            relative("before", 1),
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
