"""The held-back text as data sets of lm-evaluation-harness: pieces for the loss, verses without their last word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset

TEXT = Path(__file__).resolve().parents[3] / "tests" / "talk" / "held_back.txt"
PIECE, PIECES = 256, 64  # bytes
VERSES = 100


def pieces(**_: Any) -> dict[str, Dataset]:
    """Pieces of the text, none of which is cut in a word."""
    words, found, piece = TEXT.read_text().split(" "), [], ""
    for word in words:
        if len(piece) + len(word) >= PIECE:
            found.append({"text": piece.strip()})
            piece = ""
        piece += f"{word} "
    return {"test": Dataset.from_list(found[:PIECES])}


def verses(**_: Any) -> dict[str, Dataset]:
    """Every fifth verse that has six words or more: all but its last word, and that word."""
    found = []
    for verse in TEXT.read_text().splitlines()[::5]:
        start, _, last = verse.rpartition(" ")
        if len(start.split()) >= 5:
            found.append({"start": start, "last": last.strip(".,:;?!()")})
    return {"test": Dataset.from_list(found[:VERSES])}
