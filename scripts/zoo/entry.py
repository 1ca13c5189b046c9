"""What the zoo's tables are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Entry:
    """One checkpoint: ``produce(base model's name and folder, OUT, recipe)`` writes it. ``recipe`` is kept with it."""

    name: str
    model: str
    produce: Callable[[str, Path, Path, Mapping[str, Any]], None]
    recipe: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
