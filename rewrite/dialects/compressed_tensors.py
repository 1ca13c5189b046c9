"""The compressed-tensors dialect: ``config_groups`` of targets, ``ignore``, one scheme a group.

Matching follows compressed-tensors 0.20 (``utils/match.py``): ``ignore`` wins; then an exact name, then ``re:``
patterns (``re.match``, in *alphabetical* order of the patterns, not in the order of the groups), then class names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from rewrite.dialects.patterns import matches, matches_any, open_account
from rewrite.dialects.scheme import Activations, ScaleLayout, Scheme
from rewrite.errors import ConfigError, Unsupported

_WHERE = "config.json: quantization_config"
_LINEAR = "Linear"  # the class name that every producer uses for torch.nn.Linear
_LAYOUTS: dict[str, ScaleLayout] = {"tensor": "tensor", "channel": "channel", "block": "block"}


@dataclass(frozen=True)
class _Target:
    pattern: str
    group: str

    @property
    def rank(self) -> tuple[int, str]:
        """Position in the order in which compressed-tensors tries targets."""
        return (2 if self.pattern == _LINEAR else int(self.pattern.startswith("re:")), self.pattern)


class CompressedTensors:
    """A ``quantization_config`` with ``quant_method: compressed-tensors``."""

    name = "compressed-tensors"

    def __init__(self, value: dict[str, Any]) -> None:
        self.value = value
        self._groups = _read_groups(value)
        self._ignore = _strings(value.get("ignore") or [], "ignore")
        self._ignored = frozenset(self._ignore)  # lists of 10,000 names are real
        self._ignore_patterns = [entry for entry in self._ignore if entry.startswith("re:")]
        targets = (_Target(p, group) for group, scheme in self._groups.items() for p in scheme["targets"])
        targets_in_order = sorted(targets, key=lambda target: target.rank)
        self._targets = [target for target in targets_in_order if target.rank[0]]
        self._by_name: dict[str, str] = {}
        for target in targets_in_order:
            self._by_name.setdefault(target.pattern, target.group)
        open_account(value)

    def scheme(self, module: str) -> Scheme | None:
        group = self._group_of(module)
        return None if group is None else _scheme(self._groups[group], group)

    def check_convertible(self) -> None:
        """It is."""

    def with_channel_scales(
        self, target: str, converted: Collection[str], others: Collection[str]
    ) -> CompressedTensors:
        """Put a group for ``target`` with ``strategy: channel`` before the others; all else stays.

        The other groups' targets that match a converted module are narrowed, since a pattern that sorts before ours
        would win in compressed-tensors and one that stands before ours would win in vLLM. Class names need no
        narrowing: every loader tries them last.
        """
        base = self._common_group(converted)
        pattern = target.removeprefix("re:")
        strays = [name for name in others if self._group_of(name) and re.match(pattern, name)]
        if strays:
            raise Unsupported(
                "Fused groups of one kind are quantised in different ways",
                where=strays[0],
                expected="every module of this name with one shared scale, or none",
                found=f"{len(strays)} with another layout",
            )
        groups: dict[str, Any] = {_free_name(self._groups): _channel_group(self._groups[base], target)}
        for name, group in self._groups.items():
            targets = list(_narrow(group["targets"], pattern, converted, others))
            if targets:
                groups[name] = {**deepcopy(group), "targets": targets}
        return CompressedTensors({**deepcopy(self.value), "config_groups": groups, "quantization_status": "compressed"})

    def _group_of(self, module: str) -> str | None:
        if module in self._ignored or _LINEAR in self._ignored:
            return None
        if any(matches(entry, module) for entry in self._ignore_patterns):
            return None
        if module in self._by_name:
            return self._by_name[module]
        targets = (t.group for t in self._targets if t.pattern == _LINEAR or matches(t.pattern, module))
        return next(targets, None)

    def _common_group(self, modules: Collection[str]) -> str:
        """The one group that all ``modules`` belong to: what the new group is a copy of, strategy aside."""
        groups = {self._group_of(module): module for module in modules}
        if len(groups) == 1 and (name := next(iter(groups))) is not None:
            return name
        raise Unsupported(
            "The modules of a fused layer belong to different config groups",
            where=_WHERE,
            expected="one config group for all of them",
            found=", ".join(f"{module}: {name or 'no group'}" for name, module in groups.items()),
        )


def _channel_group(base: dict[str, Any], target: str) -> dict[str, Any]:
    group = {**deepcopy(base), "targets": [target]}
    group["weights"]["strategy"] = "channel"
    return group


def _narrow(targets: Iterable[str], pattern: str, converted: Collection[str], others: Collection[str]) -> Iterator[str]:
    """``targets`` without the converted modules. A target that matched nothing else goes."""
    for target in targets:
        if not matches_any(target, converted):
            yield target
        elif matches_any(target, others):
            yield f"re:(?!{pattern}){target.removeprefix('re:')}"


def _free_name(groups: Collection[str]) -> str:
    return next(name for i in range(len(groups) + 1) if (name := f"group_{i}") not in groups)


def _read_groups(value: dict[str, Any]) -> dict[str, Any]:
    groups = value.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise ConfigError(
            "config_groups is not an object of groups", where=_WHERE, expected="{name: {…}}", found=groups
        )
    for name, group in groups.items():
        _strings(group.get("targets"), f"config_groups.{name}.targets")
    return groups


def _strings(value: object, where: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ConfigError("A list of names was expected", where=f"{_WHERE}.{where}", expected='["…"]', found=value)
    return value


def _scheme(group: dict[str, Any], name: str) -> Scheme | None:
    weights, inputs = group.get("weights"), group.get("input_activations")
    if weights is None:
        return None
    if not isinstance(weights, dict) or not isinstance(inputs, dict | None):
        raise ConfigError("A scheme is not an object", where=f"{_WHERE}.config_groups.{name}", found=group)
    fp8 = weights.get("type") == "float" and weights.get("num_bits") == 8
    activations: Activations = "none" if inputs is None else "dynamic" if inputs.get("dynamic") else "static"
    kind, bits, strategy = (_word(weights.get(key)) for key in ("type", "num_bits", "strategy"))
    layout = _LAYOUTS.get(strategy)
    return Scheme(fp8, layout, activations, f"{kind}{bits} weights per {strategy}, {activations} activations")


def _word(value: object) -> str:
    """A setting as text; what is neither a word nor a number is no setting, and may be of any size."""
    return str(value) if isinstance(value, str | int | None) else type(value).__name__
