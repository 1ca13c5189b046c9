"""Regular expressions that strangers wrote, matched within a bounded time.

Python's ``re`` cannot be told to stop, and ``(a+)+b`` may take longer than a life. The ``regex`` package matches with a
time limit. Engines match with ``re``, so a pattern must mean the same in both: the few that do not are refused.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection
from time import monotonic
from typing import Any, NamedTuple

import regex

from rewrite.errors import ConfigError

_WHERE = "config.json: quantization_config"
_MAX_LENGTH = 4096  # characters of a pattern
_SECONDS = 30.0  # for all matches of one config; 100,000 modules and 50 real patterns take 5

#: What ``regex`` reads in its own way: ``{`` of anything but a count (approximate matching), POSIX classes, and
#: POSIX-style or set operations inside a class.
_OTHER_MEANING = re.compile(r"\{(?!\d+(?:,\d*)?\}|,\d+\})|\[[^\]]*(?:\[:|--|\|\||&&|~~)|\[\[")
_ESCAPED = re.compile(r"\\.", re.DOTALL)
#: Patterns of literal characters, a few alternatives of words, and at most two of ``.*``, ``\d+``, ``[0-9]+``: most of
#: those that producers write. A name of 512 characters can be split in 512²/2 x 2⁶ ways: they end within 0.2 s, and
#: need no time limit, which costs ten times as much as the match.
_SIMPLE = re.compile(r"(?:[\w-]|\\\.|\.(?![*+?{])|\.\*|\\d\+|\[0-9\]\+|\((?:\?:)?[\w|]+\)(?![*+?{])|[$^])*")
_MAX_SIMPLE_REPEATS = 2
_MAX_SIMPLE_BARS = 6
_MAX_SIMPLE_NAME = 512


class Patterns:
    """The ``re:`` targets of one config, compiled once; matching them all takes bounded time."""

    def __init__(self, seconds: float = _SECONDS) -> None:
        self._seconds = self._left = seconds
        self._compiled: dict[str, _Pattern] = {}

    def matches(self, target: str, module: str) -> bool:
        """Whether ``target`` is the module's name, or a ``re:`` pattern for its beginning.

        Raises :class:`ConfigError` for a pattern that cannot be compiled, or when the time for all patterns is used up.
        """
        if not target.startswith("re:"):
            return target == module
        pattern = self._compiled.get(target)
        if pattern is None:
            pattern = self._compiled[target] = _compile(target)
        started = monotonic()
        try:
            if self._left <= 0:
                raise TimeoutError
            if pattern.simple is not None and len(module) <= _MAX_SIMPLE_NAME:
                return pattern.simple.match(module) is not None
            return pattern.bounded.match(module, timeout=self._left) is not None
        except TimeoutError:
            raise ConfigError(
                "Matching the targets takes too long",
                where=f"{_WHERE}: {target}",
                expected=f"all targets matched in {self._seconds:.0f} seconds",
                hint="write simpler patterns, or list the modules by name",
            ) from None
        finally:
            self._left -= monotonic() - started

    def matches_any(self, target: str, modules: Collection[str]) -> bool:
        """Whether ``target`` matches one of ``modules``."""
        if not target.startswith("re:"):
            return target in modules
        return any(self.matches(target, module) for module in modules)


class _Pattern(NamedTuple):
    bounded: Any  # of the regex package, which has no types
    simple: re.Pattern[str] | None


def _compile(target: str) -> _Pattern:
    pattern = target.removeprefix("re:")
    if len(pattern) > _MAX_LENGTH:
        raise ConfigError(
            "A target is too long", where=_WHERE, expected=f"at most {_MAX_LENGTH} characters", found=target
        )
    if _OTHER_MEANING.search(_ESCAPED.sub("", pattern)):
        raise ConfigError(
            "A target has an unusual pattern",
            where=f"{_WHERE}: {target}",
            expected="no '{' but in counts such as {2,3}, and no class within a class",
            hint="write the pattern in another way, or list the modules by name",
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of patterns whose meaning will change
            compiled = re.compile(pattern)
            return _Pattern(regex.compile(pattern, regex.VERSION0), compiled if _is_simple(pattern) else None)
    except (re.error, regex.error, RecursionError, OverflowError, MemoryError, Warning) as error:
        raise ConfigError(
            "A target is not a regular expression", where=f"{_WHERE}: {target}", found=str(error)
        ) from error


def _is_simple(pattern: str) -> bool:
    few = pattern.count("*") + pattern.count("+") <= _MAX_SIMPLE_REPEATS and pattern.count("|") <= _MAX_SIMPLE_BARS
    return few and _SIMPLE.fullmatch(pattern) is not None
