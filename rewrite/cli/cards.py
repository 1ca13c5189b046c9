"""``--card``: a card in README.md of OUT, in one step, where the verification holds."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import rewrite
from rewrite import card
from rewrite.checkpoint.checkpoint import Checkpoint, read_checkpoint
from rewrite.checkpoint.local import LocalDirectory, io_errors, open_regular
from rewrite.checkpoint.storage import Storage
from rewrite.cli.common import say
from rewrite.cli.reports import held_to, place_of
from rewrite.errors import StorageError, UsageError
from rewrite.integrations.addresses import scheme_of
from rewrite.verification.configs import quantization_of
from rewrite.verification.expected import MANIFEST_NAME, profile_of


class Card:
    """README.md of OUT as it was before the verification, which must still be there after it."""

    def __init__(self, out: str) -> None:
        """Raises :class:`UsageError` where OUT is no directory, and :class:`StorageError` for a README.md that a card
        cannot be put into: before any work."""
        if scheme_of(out) is not None or not Path(out).is_dir():
            raise UsageError(
                "A card is written into a directory", expected="OUT is a directory", found=out,
                hint="verify a local copy of OUT with --card, then publish that",
            )  # fmt: skip
        self._folder = Path(out)
        self._path = self._folder / card.README_NAME
        self._before = self._read()
        card.insert(self._before or b"", "")

    def write(self, source: Storage, found: rewrite.Verification) -> None:
        """The card of ``found``, which holds."""
        from rewrite.report.card import card as text_of

        out = read_checkpoint(LocalDirectory(self._folder))
        text, keys = text_of(found, _done(source, out)), _keys(source, out)
        new = card.new(text, keys) if self._before is None else card.insert(self._before, text, keys)
        if self._read() != self._before:
            raise StorageError("README.md changed while OUT was verified", where=str(self._path), hint="verify again")
        _replace(self._path, new)

    def _read(self) -> bytes | None:
        if not os.path.lexists(self._path):
            return None
        with open_regular(self._path) as file:
            return file.read(0, card.MAX_BYTES + 1)  # insert() refuses what is longer


def _done(source: Storage, out: Checkpoint) -> str:
    """What was done, in a sentence."""
    place = place_of(source)
    old = f"{place.name} on the Hugging Face hub" if place.commit else "the checkpoint that it was made from"
    words = held_to(out)[1]
    if MANIFEST_NAME not in out.files or profile_of(out)[0] not in rewrite.PROFILES:
        return f"Compared with {old}, as profile {words}."
    return f"Written by rewrite convert, as its manifest says ({words}), and compared with {old}."


def _keys(source: Storage, out: Checkpoint) -> card.Keys | None:
    place = place_of(source)
    model = place.name.partition("@")[0]
    if place.commit is None or not card.MODEL.fullmatch(model):
        return None
    return card.Keys(model, bool(quantization_of(out)))


def finish(card: Card | None, source: Storage, found: rewrite.Verification) -> None:
    """Write the card that was asked for, or say why not."""
    if card is not None and found.ok:
        card.write(source, found)
    elif card is not None:
        say("no card was written: a check failed", quiet=False)


def _replace(path: Path, raw: bytes) -> None:
    """In one step; with the mode of what was there."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with io_errors(path):
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            with os.fdopen(fd, "wb") as file:
                if path.exists():
                    os.fchmod(fd, path.stat().st_mode & 0o7777)
                file.write(raw)
                file.flush()
                os.fsync(fd)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
