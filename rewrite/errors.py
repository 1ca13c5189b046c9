"""The exceptions of the library. Each class knows the exit code that the command line ends with.

An error answers five questions: what is wrong, where, what was expected, what was found, what to do next.
"""

from __future__ import annotations

from reprlib import Repr
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self

_MAX_TEXT = 300


class RewriteError(Exception):
    """Base of everything this library raises on purpose.

    ``what`` says what is wrong in one sentence; ``where`` names file and tensor; ``expected`` and ``found`` are values;
    ``hint`` says what to do next. Only ``what`` is required.
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        expected: object = None,
        found: object = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.expected = expected
        self.found = found
        self.hint = hint

    def __str__(self) -> str:
        lines = (f"  {label + ':':<9} {_clip(value)}" for label, value in self._details() if value is not None)
        return "\n".join([_clip(self.what), *lines])

    def to_json(self) -> dict[str, object]:
        """The parts of the message and the exit code, for programs."""
        details = {label: _clip(value) for label, value in self._details() if value is not None}
        return {"type": type(self).__name__, "what": _clip(self.what), **details, "exit_code": self.exit_code}

    def with_hint(self, hint: str) -> Self:
        """The same with one more sentence on what to do next."""
        both = hint if self.hint is None else f"{self.hint}; {hint}"
        return type(self)(self.what, where=self.where, expected=self.expected, found=self.found, hint=both)

    def _details(self) -> tuple[tuple[str, object], ...]:
        return ("where", self.where), ("expected", self.expected), ("found", self.found), ("next", self.hint)


class NotVerified(RewriteError):
    """What was written is not what it should be, and was not published."""


class UsageError(RewriteError):
    """The arguments make no sense together, whatever the checkpoint holds."""

    exit_code = 2


class Refused(RewriteError):
    """The checkpoint is not one that can be converted or judged safely."""

    exit_code = 3


class HeaderError(Refused):
    """A safetensors header breaks the format."""


class CheckpointError(Refused):
    """Index, shards and config of a checkpoint do not add up."""


class ConfigError(Refused):
    """``config.json`` or its quantization part cannot be understood."""


class Unsupported(Refused):
    """A sound checkpoint, in a dialect, family or layout that this version does not convert."""


class StorageError(RewriteError):
    """Reading or writing failed, or would: no space, no permission, output in the way, input changed underneath."""

    exit_code = 4


def printable(text: str) -> str:
    """``text`` with escapes for what a terminal would obey or could not show: names come from strangers' files."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


_REPR = Repr()  # bounded in time and memory, whatever the value is
_REPR.maxlevel, _REPR.maxlist, _REPR.maxtuple, _REPR.maxdict = 6, 50, 50, 50
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = _MAX_TEXT


def _clip(value: object) -> str:
    """Printable, one line, bounded."""
    text = value if isinstance(value, str) else _REPR.repr(value)
    clipped = printable(text[:_MAX_TEXT])
    return clipped if len(text) <= _MAX_TEXT else f"{clipped}… ({len(text)} characters)"
