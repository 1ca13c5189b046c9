"""What the drivers share. Each platform has a process of its own: engines look at the card while they are imported."""

from __future__ import annotations

from collections.abc import Callable

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
