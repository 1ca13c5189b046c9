"""The command line that ran, as a reader can repeat it: no path of this machine, no address, no credentials."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import click

from rewrite.errors import printable

_WORDS = "rewrite.words"
#: What says where the machine's things are, and not what was done: their names stand for them.
_PLACES = {"--cluster": "ADDRESS", "--endpoint-url": "URL", "--engine": "PYTHON", "--engine-command": "COMMAND"}


class Recorded(click.Command):
    """A command that keeps the words that it was called with."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[_WORDS] = tuple(args)
        return super().parse_args(ctx, args)


def command_line(context: click.Context, names: Mapping[str, str]) -> str:
    """``names`` are those of the arguments, by the name of the parameter."""
    command = context.command
    given, _, order = command.make_parser(context).parse_args(list(context.meta[_WORDS]))
    words = ["rewrite", str(command.name)]
    arguments = [each for each in command.params if isinstance(each, click.Argument)]
    options = [each for each in dict.fromkeys(order) if isinstance(each, click.Option)]
    words += [printable(names[str(each.name)]) for each in arguments]
    for option in options:
        words += _words_of(option, given[str(option.name)])
    return shlex.join(words)


def _words_of(option: click.Option, value: Any) -> list[str]:
    if option.is_flag:
        return [_longest(option.secondary_opts if value is False else option.opts)]
    name, values = _longest(option.opts), value if option.multiple else [value]
    return [word for each in values for word in (name, _shown(option, name, each))]


def _shown(option: click.Option, name: str, value: str) -> str:
    if name in _PLACES:
        return _PLACES[name]
    is_path = isinstance(option.type, click.Path)
    return printable(PurePosixPath(value).name if is_path else value)


def _longest(names: list[str]) -> str:
    return max(names, key=len)
