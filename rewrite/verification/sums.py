"""How far weights and outputs are off, added up over the rows of a partition, and the verdict on the outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from rewrite.quantization.groups import Partition
from rewrite.verification import gemm
from rewrite.verification.oracle import Scaled
from rewrite.verification.result import PartitionNumbers, Verdict

_HALF_MAX = 65504  # of float16, which engines dequantize to


class WeightErrors:
    """How far the weights that engines multiply with are from the true ones: squared norms, added up over rows, or over
    codes that occur so many times."""

    def __init__(self) -> None:
        self._truth = 0.0
        self._errors: dict[str, float] = {}

    def add(self, rows: Scaled, served: Mapping[str, Scaled], times: torch.Tensor | None = None) -> None:
        """``served`` is what each engine makes of ``rows``. With ``times`` [256] int64 these are a row for each code
        (:func:`rewrite.verification.oracle.all_codes`); codes that do not occur do not count, whatever they mean."""
        moved = {name: each for name, each in served.items() if not each.same(rows)}
        self._errors |= dict.fromkeys(served.keys() - self._errors.keys(), 0.0)
        if not moved:
            return
        true = rows.value()
        self._truth += _squared(true, times)
        for name, each in moved.items():
            self._errors[name] += _squared(each.value() - true, times)

    def relative(self, name: str) -> float:
        """norm(found - true) / norm(true); 0 where nothing was moved."""
        error = self._errors[name]
        return float((error / self._truth) ** 0.5) if error and self._truth else 0.0


def _squared(values: torch.Tensor, times: torch.Tensor | None) -> float:
    if times is None:
        return float(values.square().sum())
    occurring = times > 0
    return float((values[occurring].square().sum(1) * times[occurring]).sum())


@dataclass
class OutputSums:
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
        rows: Scaled,
        inputs: Mapping[str, Scaled],
        served: Mapping[str, Scaled],
        bound: torch.Tensor | None,
        *,
        requantized: tuple[bool, bool],
    ) -> None:
        """``x`` [tokens, K] float64: the activations of the reference. Each of ``served`` is multiplied with its own of
        ``inputs``. ``requantized``: whether engines make other weights of those of IN, and of OUT. Weights beyond
        float16 then become anything: OUT is compared with the truth, and with nothing where it is requantized, too."""
        true = rows.value()
        reference = x @ true.T
        self.truth += float(reference.square().sum())
        results: dict[str, torch.Tensor] = {}
        for name, weights in served.items():
            likely = (each for each in results if inputs[each] is inputs[name] and _one_kernel(served[each], weights))
            twin = next((each for each in likely if served[each].same(weights)), None)
            results[name] = gemm.multiply(inputs[name], weights) if twin is None else results[twin]
            self.errors[name] += float((results[name] - reference).square().sum())
        scaled = not self.alike  # one side is a product of true weights, the other scales what codes give
        if self.alike:
            difference = results["fixed"] - results["out"]
            lost = (true.abs() >= _HALF_MAX).any(1)
            if requantized[0] and bool(lost.any()):
                scaled = True
                truth = difference * 0 if requantized[1] else reference - results["out"]
                difference = torch.where(lost, truth, difference)
                bound = None if bound is None else torch.where(lost[:, None], 0.0, bound)
            self._compare(x, true, reference, difference, bound, scaled=scaled)
        else:
            own = inputs["out"].value()
            self._compare(own, true, own @ true.T, results["out"] - own @ true.T, bound, scaled=scaled)

    def _compare(
        self,
        x: torch.Tensor,
        true: torch.Tensor,
        reference: torch.Tensor,
        difference: torch.Tensor,
        bound: torch.Tensor | None,
        *,
        scaled: bool,
    ) -> None:
        """How much of what can explain the ``difference`` is used, and what is beyond it."""
        kind = x.device.type
        slack = gemm.OUTPUT[kind] * reference.abs() + 1e-300
        accumulation = max(gemm.ACCUMULATION[kind], gemm.SCALED) if scaled else gemm.ACCUMULATION[kind]
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
            return "FAILED", f"outputs are off by {out:.3g} of their norm, a fixed engine on IN by {fixed:.3g}"
        if self.beyond > 1:
            other = "a fixed engine's" if self.alike else "the true weights'"
            return "FAILED", f"outputs differ from {other} by {self.beyond:.3g} times what is explained"
        if not self.alike:
            return "ok", "agrees with the true weights, for the activations as OUT quantizes them"
        return "ok", "requantized by a fixed engine only" if self.bound_used is not None else "agrees"


def _one_kernel(one: Scaled, other: Scaled) -> bool:
    """Whether the same kernel multiplies with both: a GPU has another for a scale by row."""
    return one.codes.device.type == "cpu" or one.scale.shape == other.scale.shape
