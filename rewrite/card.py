"""The card of rewrite in a README.md: a block between two markers, and the front-matter keys that belong to it.

Pure, and bytes: whatever else a README.md holds stays as it is. The command line puts the card in, the verification
takes it out again; so :func:`remove` gives back what :func:`insert` was given, byte for byte. For that,

- the block ends with a line break exactly where the file without it does, and has one before it where that lacks one;
- front-matter keys are marked as ours by a comment, and come first.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from rewrite.errors import StorageError

README_NAME = "README.md"
BEGIN, END = b"<!-- rewrite:begin -->", b"<!-- rewrite:end -->"
MAX_BYTES = 1 << 20  # of a README.md with a card: it is read whole

#: A model of the hub that is a plain scalar in YAML, and nothing else.
MODEL = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_OURS = re.compile(
    rb"---(?P<newline>\r?\n)base_model: [A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]* # rewrite(?P=newline)"
    rb"(?:base_model_relation: quantized # rewrite(?P=newline))?"
)
_ALL_OURS = re.compile(_OURS.pattern + rb"---(?P=newline)")
_FRONT = re.compile(rb"---(\r?\n)(.*?)^---(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
_MAPPING = re.compile(rb"(?:[ \t]*(?:#[^\n]*)?\r?\n)*[A-Za-z_][\w-]*:[ \t\r\n]")  # perhaps after comments


@dataclass(frozen=True)
class Keys:
    """What the hub reads: the model that it was made from, and whether it is a quantized one."""

    base_model: str
    quantized: bool

    def lines(self, newline: bytes) -> bytes:
        relation = [b"base_model_relation: quantized # rewrite"] if self.quantized else []
        return b"".join(
            line + newline for line in (b"base_model: %s # rewrite" % self.base_model.encode("ascii"), *relation)
        )


def insert(readme: bytes, text: str, keys: Keys | None = None) -> bytes:
    """``readme`` with a card of ``text``, which replaces one that is there. ``keys`` are added where the front matter,
    or the lack of one, is plain to read, and has none of them.

    Raises :class:`StorageError` as :func:`find`, and for what would be too large.
    """
    place = find(readme)
    plain = _without_block(readme, place)
    newline = _newline_of(plain)
    keyed = _with_keys(plain, keys, newline)
    if place is None or place.end == len(readme):
        before = b"" if not keyed or keyed.endswith(b"\n") else newline
        after = newline if keyed.endswith(b"\n") else b""
        found = keyed + before + _block(text, newline) + after
    else:
        at = max(place.begin + len(keyed) - len(plain), 0)  # keys come before it
        found = keyed[:at] + _block(text, place.newline) + place.newline + keyed[at:]
    find(found)  # a text with a marker would end the card too early
    if len(found) > MAX_BYTES:
        raise StorageError(
            "README.md would be too large for a card",
            where=README_NAME, expected=f"at most {MAX_BYTES:,} bytes", found=f"{len(found):,} bytes",
            hint="move what is not a model card into another file",
        )  # fmt: skip
    return found


def new(text: str, keys: Keys | None = None) -> bytes:
    """A README.md of nothing but a card."""
    return _with_keys(b"", keys, b"\n") + _block(text, b"\n") + b"\n"


def remove(readme: bytes) -> bytes:
    """``readme`` without card and keys of rewrite; as it is where it has none. Raises :class:`StorageError` as
    :func:`find`."""
    return _without_keys(_without_block(readme, find(readme)))


def _without_block(readme: bytes, place: CardSpan | None) -> bytes:
    if place is None:
        return readme
    before, after = readme[: place.begin], readme[place.end :]
    if after:
        return before + after[len(place.newline) :]
    return before.removesuffix(place.newline)  # what was there did not end with a line break


@dataclass(frozen=True)
class CardSpan:
    """Where a block is, without the line break after it; and how its lines end."""

    begin: int
    end: int
    newline: bytes


def find(readme: bytes) -> CardSpan | None:
    """The block; None where there is none.

    Raises :class:`StorageError` for markers that are not one begin and, after it, one end, each on a line of its own.
    """
    begins, ends = readme.count(BEGIN), readme.count(END)
    if not begins and not ends:
        return None
    found = f"{begins} begin and {ends} end"
    if begins == ends == 1:
        begin, end = readme.index(BEGIN), readme.index(END) + len(END)
        newline = b"\r\n" if readme.startswith(b"\r\n", begin + len(BEGIN)) else b"\n"
        own_lines = (
            _begins_line(readme, begin) and readme.startswith(newline, begin + len(BEGIN)),
            _begins_line(readme, end - len(END)) and (end == len(readme) or readme.startswith(newline, end)),
        )
        if begin < end and all(own_lines) and (end < len(readme) or not begin or readme.endswith(newline, 0, begin)):
            return CardSpan(begin, end, newline)
        found = (
            "the end before the begin" if end < begin else "other text on their lines, or lines that end in two ways"
        )
    raise StorageError(
        "README.md has markers of a card that are not in order",
        where=README_NAME,
        expected=f"one line {BEGIN.decode()} and, after it, one line {END.decode()}",
        found=found,
        hint="remove these markers, and what is left of the card between them",
    )


def _begins_line(readme: bytes, at: int) -> bool:
    return at == 0 or readme[at - 1 : at] == b"\n"


def _block(text: str, newline: bytes) -> bytes:
    return newline.join([BEGIN, b"", *text.strip("\n").encode("utf-8", "backslashreplace").split(b"\n"), b"", END])


def _newline_of(readme: bytes) -> bytes:
    first = readme.find(b"\n")
    return b"\r\n" if first > 0 and readme[first - 1 : first] == b"\r" else b"\n"


def _with_keys(readme: bytes, keys: Keys | None, newline: bytes) -> bytes:
    if keys is None:
        return readme
    plain = _without_keys(readme)
    front = _FRONT.match(plain)
    if front is None:
        # What only looks like front matter, or stands behind a byte order mark, is left alone: who reads it how is not
        # known.
        if plain.lstrip().startswith((b"---", b"\xef\xbb\xbf")):
            return readme
        return b"---" + newline + keys.lines(newline) + b"---" + newline + plain
    if b"base_model" in front[2] or not _MAPPING.match(front[2]):
        return readme
    start = len(b"---" + front[1])
    return plain[:start] + keys.lines(front[1]) + plain[start:]


def _without_keys(readme: bytes) -> bytes:
    whole = _ALL_OURS.match(readme)
    if whole:
        return readme[whole.end() :]
    ours = _OURS.match(readme)
    return readme if ours is None else b"---" + ours["newline"] + readme[ours.end() :]
