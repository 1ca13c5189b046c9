"""How far the weights that an engine multiplies with are from the true ones: norm(found - true) / norm(true)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from rewrite.verification.oracle import EngineWeights, Rows


class WeightErrors:
    """Squared norms, added up over rows, or over codes that occur so many times."""

    def __init__(self) -> None:
        self._truth = 0.0
        self._errors: dict[str, float] = {}

    def add(self, rows: Rows, served: Mapping[str, EngineWeights], times: torch.Tensor | None = None) -> None:
        """``served`` is what each engine makes of ``rows``. With ``times`` [256] int64 these are a row for each code
        (:func:`rewrite.verification.oracle.all_codes`); codes that do not occur do not count, whatever they mean."""
        moved = {name: each for name, each in served.items() if not _as_stored(each, rows)}
        self._errors |= dict.fromkeys(served.keys() - self._errors.keys(), 0.0)
        if not moved:
            return
        true = rows.true()
        self._truth += _squared(true, times)
        for name, each in moved.items():
            self._errors[name] += _squared(each.value() - true, times)

    def relative(self, name: str) -> float:
        """0 where nothing was moved."""
        error = self._errors[name]
        return float((error / self._truth) ** 0.5) if error and self._truth else 0.0


def _squared(values: torch.Tensor, times: torch.Tensor | None) -> float:
    if times is None:
        return float(values.square().sum())
    occurring = times > 0
    return float((values[occurring].square().sum(1) * times[occurring]).sum())


def _as_stored(served: EngineWeights, rows: Rows) -> bool:
    """Whether an engine multiplies with the weights as they are: the same codes with the same scales."""
    if served.weight.dtype != rows.weight.dtype or not torch.equal(_bits(served.weight), _bits(rows.weight)):
        return False
    return bool((served.scale == rows.scale).all())


def _bits(weight: torch.Tensor) -> torch.Tensor:
    return weight.view(torch.uint8) if weight.element_size() == 1 else weight
