"""The text: the King James Bible, one verse a line, cut into what the model learns from and what is held back.

From Debian's package `bible-kjv-text` (with `bible-kjv`, which prints it). The package says that the translation's
copyright has expired; the data files may be copied and changed freely.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass

COMMAND = ("bible", "-f", "gen1:1-rev22:21")
_VERSE = re.compile(r"(?P<chapter>\S+?\d*):\d+ +(?P<text>.*\S)")
#: One chapter of so many is held back, from all over the book: text of the same kind as the rest.
EVERY = 20


@dataclass(frozen=True)
class Text:
    """Both parts, each with one verse a line."""

    learned: str
    held_back: str


def read() -> str:
    """The whole book as the program of the package prints it: a reference and a verse a line."""
    return subprocess.run(COMMAND, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True).stdout


def split(book: str) -> Text:
    """Whole chapters go to one part or the other."""
    chapters: dict[str, list[str]] = {}
    for line in book.splitlines():
        found = _VERSE.fullmatch(line.strip())
        if found is None:
            raise ValueError(f"not a verse: {line!r}")
        chapters.setdefault(found["chapter"], []).append(found["text"])
    parts: tuple[list[str], list[str]] = ([], [])
    for number, verses in enumerate(chapters.values()):
        parts[number % EVERY == EVERY - 1].extend(verses)
    learned, held_back = ("".join(f"{verse}\n" for verse in part) for part in parts)
    return Text(learned, held_back)
