"""Text of strangers as Markdown in which nothing is markup. Needs no other package."""

from __future__ import annotations

import re

#: Whatever Markdown, GitHub's too, may take for more than text, but `_` within a word.
_SPECIAL = re.compile(
    r"[\\`*{}\[\]<>|~$&]|(?<![^\W_])_|_(?![^\W_])|^[#+=-](?=\s|$)|^(?=\d+[.)]\s)|!(?=\[)|(?<=\w):(?=//)|@"
)


def text(plain: str) -> str:
    """Text of one paragraph, in which nothing is markup."""
    return _SPECIAL.sub(lambda found: f"\\{found[0]}", plain.replace("\n", " "))


def cell(plain: str, code: bool = False) -> str:
    """A cell of a table."""
    return f"`{plain}`" if code and re.fullmatch(r"[\w.-]+", plain) else text(plain)
