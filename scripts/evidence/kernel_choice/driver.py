"""What the drivers share. There is a process for each engine and platform: engines look at the card while they are
imported."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from engines.driver import described

from kernel_choice.layers import Cell
from kernel_choice.platforms import PLATFORMS, Platform


def main(run: Callable[[Platform], tuple[str, list[Cell]]]) -> None:
    """The command line is VERSION PLATFORM OUT: the cells are written to OUT as JSON, or why there are none."""
    version, platform, out = sys.argv[1:]
    torch.set_default_dtype(torch.bfloat16)
    try:
        found, cells = run(PLATFORMS[platform])
        if found.split("+")[0] != version:
            raise RuntimeError(f"version {found} is installed, {version} was asked for")
        result: object = cells
    except Exception as error:  # whatever it is, nothing was learnt of the engine
        traceback.print_exc()
        result = {"fault": described(error, ("vllm", "sglang", "compressed_tensors", "kernel_choice"))}
    Path(out).write_text(json.dumps(result))
