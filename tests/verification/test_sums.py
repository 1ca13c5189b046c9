"""The verdict on the outputs of a partition."""

from __future__ import annotations

from math import inf, nan

import pytest
import torch

from rewrite.quantization.groups import Partition
from rewrite.verification.oracle import Scaled
from rewrite.verification.sums import OutputSums, WeightErrors


@pytest.mark.parametrize(
    ("alike", "fixed", "out", "beyond", "verdict"),
    [
        (True, 0.01, 0.01, 1.0, "ok"),
        (True, 0.01, 0.0, 0.0, "ok"),
        (True, 0.01, 0.0101, 0.0, "FAILED"),
        (True, 0.0, 1e-6, 0.0, "FAILED"),
        (True, 0.01, nan, 0.0, "FAILED"),
        (True, nan, 0.01, 0.0, "FAILED"),
        (True, 0.01, 0.01, 1.01, "FAILED"),
        (False, 0.0, 0.5, 1.0, "ok"),
        (False, 0.0, 0.5, inf, "FAILED"),
    ],
)
def test_verdicts(alike: bool, fixed: float, out: float, beyond: float, verdict: str) -> None:
    """Norms are added up squared. Not a number is never right."""
    weights = WeightErrors()
    weight = torch.ones(2, 4, dtype=torch.float64)
    served = Scaled(weight, torch.ones(2, 1, dtype=torch.float64))
    weights.add(Scaled(weight, served.scale), dict.fromkeys(("before", "fixed", "out"), served))
    errors = {"before": 4.0, "fixed": 16 * fixed**2, "out": 16 * out**2}
    found = OutputSums("cpu", alike, 16.0, errors, beyond=beyond).judge("a", Partition("k", 0, 2), weights)
    assert found.verdict == verdict
    assert found.outputs_before == 0.5
    assert found.outputs_fixed == pytest.approx(fixed, nan_ok=True)
