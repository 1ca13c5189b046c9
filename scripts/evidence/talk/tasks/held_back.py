"""The held-back text as data sets of lm-evaluation-harness: pieces for the loss, verses without their last word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TEXT = Path(__file__).resolve().parents[4] / "tests" / "talk" / "held_back.txt"
PIECE, PIECES = 256, 64  # bytes
VERSES = 100


def cut(text: str) -> list[dict[str, str]]:
    """Pieces of the text, none of which is cut in a word."""
    found, piece = [], ""
    for word in text.split(" "):
        if len(piece) + len(word) >= PIECE:
            found.append({"text": piece.strip()})
            piece = ""
        piece += f"{word} "
    return found[:PIECES]


def cloze(text: str) -> list[dict[str, str]]:
    """Of every fifth verse that has six words or more: all but its last word, and that word."""
    found = []
    for verse in text.splitlines()[::5]:
        start, _, last = verse.rpartition(" ")
        if len(start.split()) >= 5:
            found.append({"start": start, "last": last.strip(".,:;?!()")})
    return found[:VERSES]


def pieces(**_: Any) -> dict[str, Any]:
    """For `rewrite_talk`."""
    return _dataset(cut(TEXT.read_text()))


def verses(**_: Any) -> dict[str, Any]:
    """For `rewrite_talk_cloze`."""
    return _dataset(cloze(TEXT.read_text()))


def _dataset(rows: list[dict[str, str]]) -> dict[str, Any]:
    from datasets import Dataset

    return {"test": Dataset.from_list(rows)}
