"""Smaller recipes of a recipe: each leaves one thing out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

from tests.recipes import Recipe

T = TypeVar("T")
#: Given recipes, whether each still shows what was found.
Shows = Callable[[Sequence[Recipe]], Sequence[bool]]


def shrink(recipe: Recipe, shows: Shows) -> Recipe:
    """The smallest recipe that can be reached by leaving out one thing after the other, while it still ``shows`` it."""
    while True:
        smaller = list(simpler(recipe))
        answers = shows(smaller) if smaller else ()
        kept = next((each for each, answer in zip(smaller, answers, strict=True) if answer), None)
        if kept is None:
            return recipe
        recipe = kept


def simpler(recipe: Recipe) -> Iterator[Recipe]:
    """Recipes with one thing less, what matters most first: a group, a target, an entry of ``ignore``, shards, KV."""
    for at in range(len(recipe.groups)):
        if len(recipe.groups) > 1:
            yield replace(recipe, groups=_without(recipe.groups, at))
    for at, (kind, targets) in enumerate(recipe.groups):
        for target in range(len(targets)):
            if len(targets) > 1:
                fewer = (kind, _without(targets, target))
                yield replace(recipe, groups=(*recipe.groups[:at], fewer, *recipe.groups[at + 1 :]))
    for entries in _halves(recipe.ignore):
        yield replace(recipe, ignore=entries)
    if recipe.shards > 1:
        yield replace(recipe, shards=1)
    if recipe.kv_cache:
        yield replace(recipe, kv_cache=False)
    if not recipe.alike_inputs:
        yield replace(recipe, alike_inputs=True)


def _halves(entries: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Without half of the entries, where they are many; and without each of them."""
    if len(entries) > 3:
        middle = len(entries) // 2
        yield from (entries[:middle], entries[middle:])
    yield from (_without(entries, at) for at in range(len(entries)))


def _without(entries: tuple[T, ...], at: int) -> tuple[T, ...]:
    return (*entries[:at], *entries[at + 1 :])
