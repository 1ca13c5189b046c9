"""What a checkpoint is, as rows of a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rewrite.inspection.inspection import Inspection
from rewrite.report.page import clean, whole
from rewrite.wording import count, nbytes


@dataclass(frozen=True)
class Place:
    """Where a checkpoint lies, as far as a report says it: name, kind of place, and the commit on the hub."""

    name: str
    kind: str
    commit: str | None = None


@dataclass(frozen=True)
class Side:
    """A checkpoint: where it is, and what it is; None with the reason where that could not be read."""

    place: Place
    inspection: Inspection | None
    reason: str = ""


def headline(found: Inspection, place: Place) -> str:
    """A checkpoint in a line."""
    return f"{whole(clean(place.name))}: {clean(found.model_type)}, {clean(found.dialect)}, {_size(found)}"


def facts_of(*sides: Side) -> Iterator[tuple[str, ...]]:
    """A row for each fact, a cell for each checkpoint."""

    def row(label: str, say: Callable[[Inspection], str]) -> tuple[str, ...]:
        return (label, *(_said(side, say) for side in sides))

    yield ("name", *(clean(side.place.name) for side in sides))
    yield ("read from", *(side.place.kind for side in sides))
    yield ("commit", *(side.place.commit or "not known: not read from the hub" for side in sides))
    yield row("model type", lambda found: clean(found.model_type))
    yield row("quantization", lambda found: clean(found.dialect))
    yield row("linear layers", _schemes)
    yield row("size", _size)


def _said(side: Side, say: Callable[[Inspection], str]) -> str:
    return f"not known: {clean(side.reason)}" if side.inspection is None else say(side.inspection)


def _schemes(found: Inspection) -> str:
    said = [f"{number:,}: {clean(text)}" for text, number in found.schemes.items()]
    more = f"; and {len(said) - 8} more schemes, which rewrite inspect --json lists" if len(said) > 8 else ""
    return "; ".join(said[:8]) + more if said else "none is quantized"


def _size(found: Inspection) -> str:
    return f"{count(found.shards, 'shard')}, {count(found.tensors, 'tensor')}, {nbytes(found.nbytes)}"
