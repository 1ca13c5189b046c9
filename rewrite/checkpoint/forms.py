"""What is alike in a checkpoint: modules whose names differ in numbers only, with the same dtypes and shapes.

A mixture of experts has 300,000 tensors of a few dozen forms. What depends on the form alone is looked at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rewrite.checkpoint.header import TensorInfo

_Tensor = tuple[str, str, tuple[int, ...]]  # the last part of the name, dtype, shape


@dataclass(frozen=True, eq=False)
class Form:
    """One object for modules that are alike. ``pattern`` is their name with 0 for each number; ``tensors`` are dtype
    and shape by the last part of the tensor's name (``weight``, ``weight_scale``)."""

    pattern: str
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]


def find_forms(tensors: Iterable[TensorInfo]) -> dict[str, Form]:
    """The form of each module that has some of ``tensors``, which are all of its tensors."""
    # A state is the set of tensors of a module that were seen so far: all modules go through the same few states.
    states: list[frozenset[_Tensor]] = [frozenset()]
    numbers: dict[frozenset[_Tensor], int] = {states[0]: 0}
    steps: dict[_Tensor, dict[int, int]] = {}  # what a tensor makes of each state
    reached: dict[str, int] = {}
    for name, dtype, shape, *_ in tensors:
        module, _, kind = name.rpartition(".")
        tensor = kind, dtype, shape
        own = steps.get(tensor)
        if own is None:
            own = steps[tensor] = {}
        before = reached.get(module, 0)
        state = own.get(before)
        if state is None:
            seen = states[before] | {tensor}
            state = own[before] = numbers.setdefault(seen, len(states))
            if state == len(states):
                states.append(seen)
        reached[module] = state
    forms: dict[tuple[str, int], Form] = {}
    found: dict[str, Form] = {}
    for module, state in reached.items():
        parts = ["0" if part.isdigit() and part.isascii() else part for part in module.split(".")]
        key = (".".join(parts), state)
        form = forms.get(key)
        if form is None:
            by_kind = {kind: (dtype, shape) for kind, dtype, shape in sorted(states[state])}
            form = forms[key] = Form(key[0], by_kind)
        found[module] = form
    return found
