"""Which layer of a model a fused group belongs to, by its name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from rewrite.report.page import shorten

_Member = TypeVar("_Member")
_NUMBER = re.compile(r"(?:^|\.)([0-9]{1,6})(?=\.|$)")


@dataclass(frozen=True)
class Position:
    """``model.layers.12.mlp.gate_up_proj`` is layer 12 of the stack ``model.layers``. A name without a number has
    none."""

    stack: str
    layer: int | None


def position(name: str) -> Position:
    found = _NUMBER.search(name)
    return Position("", None) if found is None else Position(name[: found.start()], int(found[1]))


@dataclass(frozen=True)
class Kind(Generic[_Member]):
    """What belongs to one kind of fused layer, in one stack of layers."""

    layer: str
    stack: str
    members: tuple[tuple[Position, _Member], ...]
    title: str  # for charts

    def by_layer(self) -> Iterator[tuple[str, list[_Member]]]:
        """The members of each layer, and a name for them."""
        found: dict[int | None, list[_Member]] = {}
        for place, member in self.members:
            found.setdefault(place.layer, []).append(member)
        for layer, members in found.items():
            yield self.title if layer is None else f"{self.title}, layer {layer}", members


def kinds(
    members: Iterable[_Member], name_of: Callable[[_Member], str], layer_of: Callable[[_Member], str]
) -> tuple[Kind[_Member], ...]:
    """Members by the layer that they are and by their stack, in the order in which they come."""
    found: dict[tuple[str, str], list[tuple[Position, _Member]]] = {}
    for member in members:
        place = position(name_of(member))
        found.setdefault((layer_of(member), place.stack), []).append((place, member))
    stacks = Counter(layer for layer, _ in found)
    return tuple(
        Kind(layer, stack, tuple(pairs), _title(layer, stack if stacks[layer] > 1 else None))
        for (layer, stack), pairs in found.items()
    )


def _title(layer: str, stack: str | None) -> str:
    return shorten(layer) if stack is None else f"{shorten(layer, 24)} of {shorten(stack, 24) or 'the others'}"
