"""What computes with the FP8 layers of a checkpoint once an engine has loaded it, on a platform."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from rewrite.loaders.experts import is_expert
from rewrite.loaders.facts import held
from rewrite.loaders.kernel_rules import KERNEL_RULES, NEWEST_RUN, KernelFact
from rewrite.loaders.outcome import Kernels, Outcome
from rewrite.loaders.ranges import version_key
from rewrite.quantization.groups import Module
from rewrite.quantization.scheme import Activations, ScaleLayout

#: What a user names, one or several joined by commas, and the cards that it stands for: the worst of all is said.
PLATFORMS: Mapping[str, tuple[str, ...]] = {
    "cuda": ("sm89", "sm90", "sm100", "sm120"),
    "rocm": ("gfx942", "gfx950"),
    "cpu": ("cpu",),
    **{card: (card,) for card in ("sm80", "sm89", "sm90", "sm100", "sm120", "gfx942", "gfx950")},
}
DEFAULT_PLATFORM = "cuda"
DOES_NOT_RUN, NOT_KNOWN = "does not run", "not known"
# vLLM's wheels for CUDA ask for FlashInfer, and it can be missing: a card stands for both.
_VARIANTS = ("", "+flashinfer")
_LAYOUTS = {"partition": "tensor", "rows": "channel"}


def cards_of(platform: str) -> tuple[str, ...]:
    """The cards that ``platform`` stands for. KeyError where one of its names is unknown."""
    return tuple(dict.fromkeys(card for name in platform.split(",") for card in PLATFORMS[name]))


def in_words(platform: str) -> str:
    """``cuda (sm89, sm90)``: the platform with the cards that it stands for."""
    cards, name = ", ".join(cards_of(platform)), platform.replace(",", ", ")
    return name if cards == name else f"{name} ({cards})"


def by_cards(said: Iterable[tuple[str, tuple[str, ...]]]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Cards of which the same is ``said`` as one: their names, and what is said of them."""
    cards: dict[tuple[str, ...], list[str]] = {}
    for card, cells in said:
        cards.setdefault(cells, []).append(card)
    return tuple((", ".join(names), cells) for cells, names in cards.items())


def is_platform(platform: str) -> bool:
    return all(name in PLATFORMS for name in platform.split(","))


def kernel_schemes(modules: Iterable[Module], dialect: str) -> frozenset[str]:
    """The schemes of the FP8 layers among ``modules``, as the record names them. Not of experts: these have kernels of
    their own, which were not run."""
    found = {
        (scheme.layout, scheme.activations, scheme.per_token)
        for module in modules
        if (scheme := module.scheme) is not None and module.fp8 and scheme.fp8 and not is_expert(module.name)
    }
    return frozenset(_named(layout, activations, per_token, dialect) for layout, activations, per_token in found)


def _named(layout: ScaleLayout | None, activations: Activations, per_token: bool, dialect: str) -> str:
    """As the record names it. Of most names nothing is recorded: kernels are not known then."""
    each = "token" if activations == "dynamic" and per_token else activations
    name = f"{_LAYOUTS.get(layout or '', layout)}-{each}"
    if dialect == "compressed-tensors":
        return name
    if dialect == "quark" and layout in ("channel", "rows") and activations == "dynamic":
        return "quark-rows"
    return dialect if name == "tensor-static" else f"{dialect} {name}"


def used(engine: str, versions: tuple[str, str | None], platform: str, schemes: Iterable[str]) -> Kernels:
    """What each card of ``platform`` computes layers of these schemes with; nothing where there are none."""
    rules, wanted = _of(engine, versions), sorted(schemes)
    return {card: _families(rules, card, wanted) for card in cards_of(platform)}


def _families(rules: tuple[KernelFact, ...], card: str, schemes: list[str]) -> tuple[str, ...]:
    found = (_find(rules, card, scheme) for scheme in schemes)
    return tuple(dict.fromkeys(" or ".join(dict.fromkeys(map(_said, each))) or NOT_KNOWN for each in found))


def _said(rule: KernelFact) -> str:
    return rule.outcome.family or (DOES_NOT_RUN if rule.outcome.loads else "fails to load")


def judge(engine: str, versions: tuple[str, str | None], platform: str, schemes: Collection[str]) -> Outcome | None:
    """What the choice of kernels makes of layers that are loaded; None: it takes them, or nothing is known of this
    scheme on any platform, as of blocks. Of a platform that the engine was not run on, everything is not known."""
    rules, cards = _of(engine, versions), cards_of(platform)
    problems: dict[tuple[bool, str], list[str]] = {}
    for card in cards:
        found = (rule.outcome for name in schemes for rule in _find(rules, card, name))
        stops = {(kernel.loads, kernel.problem) for kernel in found if not kernel.family}
        for stop in stops:
            problems.setdefault(stop, []).append(card)
    if problems:
        (loads, problem), where = min(problems.items())
        return Outcome("does not run" if loads else "fails to load", f"{problem}{_where(where, cards)}")
    unknown = [card for card in cards if not any(_on(rule, card) for rule in rules)]
    if schemes and unknown:
        return Outcome("not known", f"its kernels were not run on {', '.join(unknown)}")
    return None


def _where(some: Sequence[str], cards: Sequence[str]) -> str:
    return "" if len(some) == len(cards) else f" ({', '.join(some)})"


def begins_later(engine: str, platform: str) -> str | None:
    """The first version that was run on ``platform``, where earlier ones were run on others only."""
    rules = [rule for rule in KERNEL_RULES if rule.engine == engine]
    on_cards = ([rule.since for rule in rules if _on(rule, card)] for card in cards_of(platform))
    first = max((min(found, key=version_key) for found in on_cards if found), key=version_key, default=None)
    is_later = first is not None and any(version_key(rule.since) < version_key(first) for rule in rules)
    return first if is_later else None


def _of(engine: str, versions: tuple[str, str | None]) -> tuple[KernelFact, ...]:
    """The rules for the newest of ``versions``. Tests hold that no rule begins or ends between two of them, but those
    of a platform that the engine has come to only then."""
    return held(KERNEL_RULES, engine, versions[1] or NEWEST_RUN[engine])


def _on(rule: KernelFact, card: str) -> bool:
    return any(f"{card}{variant}" in rule.applies.platforms for variant in _VARIANTS)


def _find(rules: tuple[KernelFact, ...], card: str, scheme: str) -> tuple[KernelFact, ...]:
    """The rules for the card, with FlashInfer first."""
    names = (f"{card}{variant}" for variant in reversed(_VARIANTS))
    return tuple(r for name in names for r in rules if name in r.applies.platforms and scheme in r.applies.schemes)
