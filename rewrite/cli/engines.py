"""The options ``--for`` and ``--platform``: which engines a command speaks of, and on which cards."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

import click

import rewrite
from rewrite.loaders.asked import CARDS, Asked, ask_for


def _asked(context: click.Context, _option: click.Parameter, names: tuple[str, ...]) -> Asked:
    if context.params.pop("every", False):
        return Asked(rewrite.LOADERS, options=("--all-engines",))
    try:
        return ask_for(names)
    except rewrite.UsageError as error:
        raise click.BadParameter(str(error)) from None


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
            meant = f" Did you mean {near[0]}?" if near else ""
            cards = f"{', '.join(rewrite.PLATFORMS)}; or a card: {', '.join(CARDS)}"
            self.fail(f"{value!r} is not known.{meant} Known: {cards}.", param, ctx)
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
