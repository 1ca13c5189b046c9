"""`python -m benchmark.convert_checkpoint IN OUT`: the change with compressed-tensors' own entry point."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from compressed_tensors.entrypoints.convert import Converter, convert_checkpoint
from compressed_tensors.quantization import QuantizationConfig

from benchmark.expansion import TARGET, expand_scales, read_rows


class ExplicitScales(Converter):  # type: ignore[misc] # a class without types
    def __init__(self, rows: dict[str, int]) -> None:
        self._rows = rows

    def process(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return expand_scales(tensors, self._rows)

    def update_config(self, config: QuantizationConfig | None) -> QuantizationConfig | None:
        if config is None:
            return None
        group = config.config_groups["group_0"].model_copy(deep=True, update={"targets": [TARGET]})
        group.weights.strategy = "channel"
        return config.model_copy(update={"config_groups": {**config.config_groups, "group_1": group}})

    def get_dependencies(self, weight_name: str) -> set[str]:
        return set()


if __name__ == "__main__":
    print(time.monotonic(), flush=True)  # the parent takes what came before, interpreter and imports, off the time
    source = Path(sys.argv[1])
    convert_checkpoint(source, sys.argv[2], ExplicitScales(read_rows(source)), device="cpu")
