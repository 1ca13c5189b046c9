"""Regular expressions that strangers wrote: matched only where that is sure to end.

Python's matcher tries one way after the other and cannot be told to stop. ``(a+)+b`` has 2^n ways to fail on n
characters, so what a pattern may cost is bounded before it is tried: a repeated group is refused, and ``k`` repeated
characters (``.*``) split a name of ``n`` in at most C(n + k, k) ways. Real patterns have one to three of them.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from math import comb, prod
from time import perf_counter
from typing import NamedTuple

from rewrite.errors import ConfigError

_WHERE = "config.json: quantization_config"
_MAX_LENGTH = 4096  # characters of a pattern
_MAX_WAYS = 10**9  # of one match: a second or two
_MAX_SECONDS = 60.0  # of all matches; 100,000 modules and 50 real patterns take 5
#: A pattern from left to right, in pieces: an escape, a class, the opening of a group, any other character.
_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?[:=!]|\(\?<[=!]|\(\?P<\w+>|.", re.DOTALL)


def matches(target: str, module: str) -> bool:
    """Whether ``target`` is the module's name or a ``re:`` pattern for its beginning.

    Raises :class:`ConfigError` for a pattern that is none, or that may take for ever.
    """
    if not target.startswith("re:"):
        return target == module
    pattern = _compile(target[3:])
    if pattern.ways(len(module)) > _MAX_WAYS:
        raise _too_slow(target, f"{pattern.repeats} repetitions on a name of {len(module)} characters")
    started = perf_counter()
    found = pattern.compiled.match(module) is not None
    _account.spent += perf_counter() - started
    if _account.spent > _MAX_SECONDS:
        raise _too_slow(target, f"{_MAX_SECONDS:.0f} seconds of matching all targets")
    return found


def matches_any(target: str, modules: Collection[str]) -> bool:
    """Whether ``target`` matches one of ``modules``."""
    if not target.startswith("re:"):
        return target in modules
    return any(matches(target, module) for module in modules)


def open_account(config: object) -> None:
    """Count time anew, for a config that is not the last one: one command reads the same config many times."""
    if _account.config is not config:
        _account.config, _account.spent = config, 0.0


@dataclass
class _Account:
    """The seconds that matching the targets of a config has taken."""

    config: object = None
    spent: float = 0.0


_account = _Account()


class _Pattern(NamedTuple):
    compiled: re.Pattern[str]
    choices: int  # ways through alternatives and optional parts
    repeats: int  # ``*``, ``+``, ``{``

    def ways(self, length: int) -> int:
        return self.choices * comb(length + self.repeats, self.repeats)


@lru_cache(maxsize=4096)
def _compile(pattern: str) -> _Pattern:
    if len(pattern) > _MAX_LENGTH:
        raise ConfigError(
            "A target is too long", where=_WHERE, expected=f"at most {_MAX_LENGTH} characters", found=f"re:{pattern}"
        )
    try:
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError("A target is not a regular expression", where=_WHERE, found=f"re:{pattern}") from error
    return _Pattern(compiled, *_count(pattern))


def _count(pattern: str) -> tuple[int, int]:
    """Upper bounds for choices and repeats of a valid pattern: what is unclear counts as the worst it could be."""
    alternatives, choices, repeats, last = [1], [], 0, ""
    for token in _TOKEN.findall(pattern):
        if token in ("*", "+", "{"):
            if last == ")":
                raise _too_slow(f"re:{pattern}", "a group that is repeated")
            repeats += 1
        elif token == "?" and last == "(":
            raise _too_slow(f"re:{pattern}", "(? with something other than a plain, looking or named group")
        elif token == "?" and last not in ("*", "+", "?"):  # after those it only says "as few as possible"
            choices.append(2)
        elif token == "|":
            alternatives[-1] += 1
        elif token == ")":
            choices.append(alternatives.pop())
        elif token.startswith("("):
            alternatives.append(1)
        last = token
    return prod(choices) * prod(alternatives), repeats


def _too_slow(target: str, found: str) -> ConfigError:
    return ConfigError(
        "A target may take too long to match",
        where=f"{_WHERE}: {target}",
        expected="a pattern of few repetitions, none of them of a group",
        found=found,
        hint="write the pattern without repeated groups, or list the modules by name",
    )
