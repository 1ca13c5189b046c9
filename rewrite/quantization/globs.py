"""Globs that name layers, as ModelOpt and AMD Quark write them: matched at once, and as compressed-tensors has them."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase, translate

from rewrite.errors import ConfigError, Unsupported
from rewrite.quantization.patterns import Patterns

_MAX_GLOBS = 100_000  # characters in all; real lists have a few thousand
_GLOB = {"*": ".*", "?": ".", ".": r"\.", "(": r"\(", ")": r"\)", "+": r"\+"}


def is_glob(name: str) -> bool:
    """Whether a name has a character that stands for others."""
    return any(character in name for character in "*?[")


def compile_globs(globs: Sequence[str], where: str) -> re.Pattern[str]:
    """One pattern for all globs. A star of a glob never goes back (``fnmatch.translate``), so it ends in time.

    Raises :class:`ConfigError` for more than 100,000 characters; ``where`` names the list.
    """
    if sum(map(len, globs)) > _MAX_GLOBS:
        raise ConfigError(
            "There are too many patterns of layers", where=where, expected=f"at most {_MAX_GLOBS} characters"
        )
    return re.compile("|".join(map(translate, globs)) or "(?!)")


def as_target(glob: str, modules: Collection[str], where: str) -> str:
    """A glob as a compressed-tensors target that matches the same of ``modules``; a plain name stays.

    Engines rename ``model.visual`` to ``visual``: the pattern survives that. Raises :class:`Unsupported` where it would
    match other modules; ``where`` names the list.
    """
    if not is_glob(glob):
        return glob
    pattern = "re:.*" + "".join(_GLOB.get(c, c) for c in glob.removeprefix("model.").lstrip("*"))
    patterns = Patterns()
    if any(patterns.matches(pattern, name) != fnmatchcase(name, glob) for name in modules):
        raise Unsupported("A pattern of layers has no compressed-tensors form", where=where, found=glob)
    return pattern
