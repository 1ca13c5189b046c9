"""README.md of OUT with a card of rewrite: without it, it must be IN's, byte for byte. The text of the card is nobody's
promise."""

from __future__ import annotations

from dataclasses import dataclass

from rewrite.card import MAX_BYTES, README_NAME, find, remove
from rewrite.checkpoint.checkpoint import Checkpoint
from rewrite.errors import StorageError


@dataclass(frozen=True)
class Carded:
    """A README.md that is IN's but for a card: ``same`` bytes of it were compared and are the same. ``problem`` where
    it is not."""

    same: int = 0
    problem: str = ""


def carded(source: Checkpoint, out: Checkpoint) -> Carded | None:
    """None where the rule of all other files is that of README.md: it has no card that can be told from the rest, or is
    IN's with its card."""
    new = _read(out)
    try:
        if new is None or find(new) is None:
            return None
    except StorageError:
        return None  # markers that are not in order: a file like any other
    old = _read(source) if README_NAME in source.files else b""
    if old == new:
        return None
    try:
        before = None if old is None else remove(old)
    except StorageError:
        before = old
    if before != remove(new):
        return Carded(problem=f"{README_NAME}: differs outside the card of rewrite")
    return Carded(len(before))


def _read(checkpoint: Checkpoint) -> bytes | None:
    """All of it; None where there is none, or more than a card may stand in.

    Raises :class:`StorageError` where it is not what it was when the checkpoint was opened."""
    stated = checkpoint.files.get(README_NAME)
    if stated is None or stated.size > MAX_BYTES:
        return None
    with checkpoint.storage.open(README_NAME) as file:
        raw = file.read(0, stated.size)
        if file.file_id != stated or len(raw) != stated.size:
            raise StorageError("The file changed while it was read", where=f"{checkpoint.storage}: {README_NAME}")
    return raw
