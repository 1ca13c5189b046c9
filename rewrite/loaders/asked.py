"""Which engines a user names, and which cards: ``vllm``, ``vllm@0.19.1``, ``sglang>=0.5.18``; ``h100``, ``mi300x``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches

from rewrite.errors import UsageError
from rewrite.loaders.kernels import DEFAULT_PLATFORM, begins_later
from rewrite.loaders.ranges import version_key
from rewrite.loaders.versions import LOADERS, Loader, assumptions, find_loaders

#: Cards by the names that people buy them under.
CARDS = {
    **dict.fromkeys(("a100", "a800"), "sm80"),
    **dict.fromkeys(("l4", "l40", "l40s", "rtx4090"), "sm89"),
    **dict.fromkeys(("h20", "h100", "h200", "gh200"), "sm90"),
    **dict.fromkeys(("b200", "gb200"), "sm100"),
    **dict.fromkeys(("rtx5090", "rtxpro6000"), "sm120"),
    **dict.fromkeys(("mi300", "mi300x", "mi325x"), "gfx942"),
    **dict.fromkeys(("mi350x", "mi355x"), "gfx950"),
}
_NAMES = {loader.name.lower(): loader.name for loader in LOADERS}
_DEFAULT = ("vLLM", "SGLang")
_WANTED = re.compile(r"\s*([\w-]+)\s*(?:(@|==|>=)\s*(\d[\w.+-]*))?\s*", re.ASCII)


@dataclass(frozen=True)
class Asked:
    """The engines that a question is about, and the words that named them; no words: the default, or all. ``options``
    ask for the same on a command line."""

    engines: tuple[Loader, ...]
    words: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    @property
    def every(self) -> bool:
        """Whether no engine is meant more than others."""
        return self.engines == LOADERS

    def assumptions(self, platform: str | None) -> list[str]:
        """What is assumed of versions that are newer than those that were run, or older than those that were run on the
        platform."""
        return [
            *(text for word in self.words for text in assumptions(word)),
            *self._since(platform or DEFAULT_PLATFORM),
        ]

    def _since(self, platform: str) -> Iterator[str]:
        for name in dict.fromkeys(engine.name for engine in self.engines):
            if (first := begins_later(name, platform)) is not None:
                where = platform.replace(",", ", ")
                yield f"{name} was run on {where} from {first} on: earlier versions are not known there"


NEWEST = Asked(tuple(row for row in LOADERS if row.last is None and row.name in _DEFAULT))


def ask_for(names: tuple[str, ...]) -> Asked:
    """The engines of ``names``; :data:`NEWEST` without any. Raises :class:`UsageError` for what is not known."""
    if not names:
        return NEWEST
    pairs = [_find(name) for name in names]
    options = tuple(word for name in names for word in ("--for", name.strip()))
    return Asked(tuple(row for _, rows in pairs for row in rows), tuple(word for word, _ in pairs), options)


def _find(wanted: str) -> tuple[str, tuple[Loader, ...]]:
    """``NAME`` or ``NAME@VERSION``, and the rows for it."""
    found = _WANTED.fullmatch(wanted)
    name = _NAMES.get(found[1].lower()) if found else None
    if found is None or name is None:
        near = get_close_matches((found[1] if found else wanted).lower(), _NAMES, 1)
        hint = f"did you mean {_NAMES[near[0]]}?" if near else None
        raise UsageError(
            "Unknown engine", expected=f"{', '.join(_NAMES.values())}; a version: vllm@0.19.1", found=wanted, hint=hint
        )
    how, version = found[2], found[3]
    word = f"{name}@{version}" if version and how != ">=" else name
    rows = find_loaders(word)
    if how == ">=":
        rows = tuple(row for row in rows if row.last is None or version_key(row.last) >= version_key(version))
    if not rows:
        known = ", ".join(row.versions for row in LOADERS if row.name == name)
        raise UsageError(f"Nothing is known of this version of {name}", expected=known, found=wanted)
    return word, rows
