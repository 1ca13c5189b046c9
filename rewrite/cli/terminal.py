"""What a stream can show: how wide it is, and whether it takes colors."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable
from typing import TextIO

import click

from rewrite.cli.layout import WIDTH, Line, Span, paint, paragraph

_NARROWEST = 40


def width(stream: TextIO | None = None) -> int:
    """Of a terminal what it has, or what ``COLUMNS`` says, but 40 at least. Pipes and files get 80, always: the same
    text wherever a command runs."""
    if not (stream or sys.stdout).isatty():
        return WIDTH
    return max(shutil.get_terminal_size((WIDTH, 24)).columns, _NARROWEST)


def colored(stream: TextIO | None = None) -> bool:
    """On a terminal, unless ``NO_COLOR`` is set or ``TERM`` is ``dumb``; elsewhere where ``FORCE_COLOR`` is set."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return (stream or sys.stdout).isatty() and os.environ.get("TERM") != "dumb"


def show_lines(lines: Iterable[Line]) -> None:
    """Print a result."""
    click.echo(paint(lines), color=colored())


def show_message(text: str, *, hang: int = 2, color: str | None = None) -> None:
    """Print a note or an error on stderr. ``color`` is that of its first word."""
    first, space, rest = text.partition(" ")
    lines = paragraph([Span(first, color), space + rest], width(sys.stderr), hang=hang)
    click.echo(paint(lines), err=True, color=colored(sys.stderr))
