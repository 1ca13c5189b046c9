"""What the drivers share: a card that is not here, and what is run with it.

Each platform has a process of its own: engines look at the card while they are imported.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from engines import driver
from engines.driver import Job

from kernel_choice.layers import Cell
from kernel_choice.platforms import PLATFORMS, Platform


def main(run: Callable[[Platform], tuple[str, list[Cell]]], packages: tuple[str, ...]) -> None:
    """A job's model is the name of a platform. The result: the version that is installed, and the cells."""

    def choose(job: Job) -> tuple[str, list[Cell]]:
        torch.set_default_dtype(torch.bfloat16)
        return run(PLATFORMS[job.model.name])

    driver.run(packages, None, choose, lambda found, _: {"version": found[0].split("+")[0], "cells": found[1]})


def pretend(platform: Platform, *, available: bool) -> None:
    """From here on torch has this card. ``available``: whether it also says so where it is asked for one; whoever then
    opens the device fails."""
    if platform.capability is None:
        return
    major, minor = platform.capability
    name = platform.architecture
    card = SimpleNamespace(gcnArchName=name, name=name, major=major, minor=minor, multi_processor_count=100)
    cuda: Any = torch.cuda
    cuda.get_device_capability = lambda *_: platform.capability
    cuda.get_device_properties = lambda *_: card
    cuda.device_count, cuda.current_device = (lambda: 1), (lambda: 0)
    cuda.is_available = lambda: available
    cuda.get_device_name = lambda *_: name
    version: Any = torch.version
    version.hip, version.cuda = ("7.0.0", None) if platform.rocm else (None, "12.9")
    accelerator: Any = torch.accelerator
    accelerator.empty_cache = lambda: None
