"""What is alike in a checkpoint: modules whose names differ in numbers only, with the same dtypes and shapes.

A mixture of experts has 300,000 tensors of a few dozen forms. What depends on the form alone is looked at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rewrite.checkpoint.header import TensorInfo

_NUMBER = re.compile(r"(?<![^.])[0-9]+(?![^.])")  # between two dots, or an end

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
    steps: dict[tuple[int, str, str, tuple[int, ...]], int] = {}
    reached: dict[str, int] = {}
    for name, dtype, shape, *_ in tensors:
        module, _, kind = name.rpartition(".")
        step = (reached.get(module, 0), kind, dtype, shape)
        state = steps.get(step)
        if state is None:
            seen = states[step[0]] | {step[1:]}
            state = steps[step] = numbers.setdefault(seen, len(states))
            if state == len(states):
                states.append(seen)
        reached[module] = state
    forms: dict[tuple[str, int], Form] = {}
    found: dict[str, Form] = {}
    for module, state in reached.items():
        key = (_NUMBER.sub("0", module), state)
        form = forms.get(key)
        if form is None:
            by_kind = {kind: (dtype, shape) for kind, dtype, shape in sorted(states[state])}
            form = forms[key] = Form(key[0], by_kind)
        found[module] = form
    return found
