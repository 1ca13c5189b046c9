"""The options ``--for`` and ``--platform``: which engines a command speaks of, and on which cards."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from textwrap import fill
from typing import Any

import click

import rewrite
from rewrite.cli.terminal import WIDTH
from rewrite.loaders.asked import CARDS, NEWEST, Asked, ask_for, stated
from rewrite.loaders.kernels import is_platform
from rewrite.verification.expected import chosen_of


def _asked(context: click.Context, _option: click.Parameter, names: tuple[str, ...]) -> Asked:
    if context.params.pop("every", False):
        return Asked(rewrite.LOADERS, options=("--all-engines",))
    try:
        return ask_for(names)
    except rewrite.UsageError as error:
        raise click.UsageError(_folded(error), context) from None


def _folded(error: rewrite.UsageError) -> str:
    """To go after "Error: ", in lines of a terminal."""
    hang = " " * len("  expected: ")
    return "\n".join(fill(line, WIDTH, subsequent_indent=hang) for line in str(error).splitlines())


def made_for(out: rewrite.Storage, platform: str | None) -> tuple[Asked, str | None, list[str]]:
    """The engines and the platform that the conversion was for, by OUT's manifest, and a note of them; the default
    where it does not say. ``platform``: the one that was named."""
    engines, where = chosen_of(out)
    asked = stated(engines)
    on = platform or (where if is_platform(where) else rewrite.DEFAULT_PLATFORM)
    if asked is None or (asked.engines, on) == (NEWEST.engines, rewrite.DEFAULT_PLATFORM):
        return NEWEST, platform, []
    return asked, on, [f"judged for {', '.join(engines)} on {on.replace(',', ', ')}, as the manifest of OUT says"]


def asked_words(asked: Asked, platform: str) -> tuple[str, ...]:
    """The options again, for a command that is shown."""
    names = () if platform == rewrite.DEFAULT_PLATFORM else platform.split(",")
    return (*asked.options, *(word for name in names for word in ("--platform", name)))


def for_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """``--for`` and ``--all-engines``."""
    every = click.option("--all-engines", "every", is_flag=True, is_eager=True, help="Every engine that is known.")
    which = click.option(
        "--for", "--loader", "asked", multiple=True, callback=_asked, metavar="ENGINE[@VERSION]",
        help="The engine that serves it (vllm, vllm@0.19.1, 'sglang>=0.5.18'); may be repeated. "
        "Default: the newest vLLM and SGLang.",
    )  # fmt: skip
    return every(which(function))


class _Platform(click.Choice[str]):
    """Kinds of cards by the names of the library, and single cards by those on their boxes."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        name = value.replace(" ", "").replace("-", "").lower()
        if name not in self.choices:
            near = get_close_matches(name, self.choices, 1)
            known = f"{', '.join(rewrite.PLATFORMS)}; or a card: {', '.join(CARDS)}"
            hint = f"did you mean {near[0]}?" if near else None
            error = rewrite.UsageError("Unknown platform", expected=known, found=value, hint=hint)
            raise click.UsageError(_folded(error), ctx)
        return str(CARDS.get(name, name))


def platform_option(default: str | None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Several platforms are one, of which the worst counts."""

    def joined(_context: click.Context, _option: click.Parameter, names: tuple[str, ...]) -> str | None:
        return ",".join(dict.fromkeys(names)) or default

    return click.option(
        "--platform", type=_Platform([*rewrite.PLATFORMS, *CARDS], case_sensitive=False), multiple=True,
        callback=joined, metavar="NAME",
        help="Where engines compute: a card (h100, b200, mi300x, ... or sm90: compute capability 9.0), or cuda (the "
        "default), rocm, cpu; may be repeated.",
    )  # fmt: skip
