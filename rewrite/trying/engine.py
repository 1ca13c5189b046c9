"""Runs the driver in an engine's Python and reads what it answers."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rewrite.errors import RewriteError, UsageError

_DRIVER = Path(__file__).with_name("driver.py")


class EngineError(RewriteError):
    """The engine did not start, or this version has not what is needed: nothing was learnt of the checkpoint."""

    exit_code = 4


def command_of(python: str | None, template: str | None, checkpoint: Path) -> list[str]:
    """The command that starts the engine's Python; this Python where nothing is named."""
    if template is None:
        return [python or sys.executable]
    try:
        words = shlex.split(template)
    except ValueError as error:
        raise UsageError("The engine command can't be split into words", found=f"{template}: {error}") from error
    if not words:
        raise UsageError("The engine command is empty", expected="a command that ends in python3")
    return [word.replace("{checkpoint}", str(checkpoint)) for word in words]


def ask(command: Sequence[str], request: Mapping[str, Any], progress: Callable[[str], None]) -> dict[str, Any]:
    """The driver's result; ``progress`` is told each step. Raises :class:`EngineError` where there is none."""
    with tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                [*command, "-c", _DRIVER.read_text(encoding="utf-8"), json.dumps(request)],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace",
            )  # fmt: skip
        except OSError as error:
            hint = "--engine takes one file; a command of several words goes to --engine-command"
            raise EngineError(
                "The engine's Python does not start", where=command[0], found=error.strerror, hint=hint
            ) from error
        result = None
        try:
            for line in process.stdout or ():
                said = _read(line)
                if "step" in said:
                    progress(str(said["step"]))
                result = said.get("result", result)
        finally:
            if result is None:
                process.terminate()
            code = process.wait()
        if not isinstance(result, dict):
            errors.seek(0)
            last = errors.read().decode(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
            raise EngineError(
                "The engine ended without a result", where=command[0], found=f"exit code {code}: {last[0]}",
                hint="exit code -9 or 137: too little memory; --layers with fewer layers takes less",
            )  # fmt: skip
        return result


def _read(line: str) -> dict[str, Any]:
    """A line of the driver; nothing for what others print."""
    try:
        said = json.loads(line)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}
