"""What torch says of a card that is not here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from kernel_choice.platforms import Platform


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
