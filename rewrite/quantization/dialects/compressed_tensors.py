"""The compressed-tensors dialect: ``config_groups`` of targets, ``ignore``, one scheme a group.

Matching follows compressed-tensors 0.20 (``utils/match.py``): ``ignore`` wins; then an exact name, then ``re:``
patterns (``re.match``, in *alphabetical* order of the patterns, not in the order of the groups), then class names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

from rewrite.errors import ConfigError, Unsupported
from rewrite.quantization.dialects.base import Dialect
from rewrite.quantization.groups import is_table
from rewrite.quantization.patterns import Patterns
from rewrite.quantization.scheme import (
    Activations,
    Dequantized,
    Layers,
    ScaleLayout,
    Scheme,
    block_shape,
    strings,
)
from rewrite.quantization.targets import fitting_target

_WHERE = "config.json: quantization_config"
_LINEAR = "Linear"  # the class name that every producer uses for torch.nn.Linear
_EMBEDDING = "Embedding"
_CLASSES = (_LINEAR, _EMBEDDING)
_CLASS = "MergedColumnParallelLinear"  # what engines call a fused layer; the others end in Linear, too
_DIGITS = str.maketrans("123456789", "0" * 9)
_SEES_DIGITS = re.compile(r"\d|\(\?P=")  # a digit, or the same text once more: what can tell two numbers apart
_LAYOUTS: dict[str, ScaleLayout] = {"tensor": "tensor", "channel": "channel", "block": "block"}


class _Target(NamedTuple):
    pattern: str
    group: str

    @property
    def rank(self) -> tuple[int, str]:
        """Position in the order in which compressed-tensors tries targets."""
        return (2 if self.pattern in _CLASSES else int(self.pattern.startswith("re:")), self.pattern)


class CompressedTensors(Dialect):
    """A ``quantization_config`` with ``quant_method: compressed-tensors``."""

    name = "compressed-tensors"

    @staticmethod
    def states(value: dict[str, Any]) -> bool:
        method = value.get("quant_method")
        return method == "compressed-tensors" or (method is None and "config_groups" in value)

    def __init__(self, value: dict[str, Any]) -> None:
        self.value = value
        self._groups = _read_groups(value)
        schemes: dict[str | None, Scheme | None] = {name: _scheme(g, name) for name, g in self._groups.items()}
        self._schemes = {None: None, **schemes}
        self._ignore = strings(value.get("ignore") or [], f"{_WHERE}.ignore")
        targets = (_Target(p, group) for group, scheme in self._groups.items() for p in scheme["targets"])
        in_order = sorted(targets, key=lambda target: target.rank)
        self._targets = [target for target in in_order if target.rank[0]]
        self._by_name = {target.pattern: target.group for target in in_order}
        _refuse_twice(in_order, self._groups)
        self._ignored = frozenset(self._ignore)  # lists of 10,000 names are real
        self._ignore_patterns = [entry for entry in self._ignore if entry.startswith("re:")]
        self._patterns = Patterns()
        self._found: dict[str, str | None] = {}  # the group of each name, those that are alike as one
        self._blind = not any(_SEES_DIGITS.search(pattern.replace("[0-9]", "")) for pattern in self._all_patterns())

    def scheme(self, module: str) -> Scheme | None:
        return self._schemes[self._group_of(module)]

    def by_scheme(self, modules: Sequence[str]) -> list[tuple[Scheme | None, Sequence[str]]]:
        """At once, where none is listed by its name and all have one scheme: most of 500,000 do."""
        is_listed = not (self._ignored.isdisjoint(modules) and self._by_name.keys().isdisjoint(modules))
        shapes = "\0".join(modules).translate(_DIGITS).split("\0") if self._blind and not is_listed else []
        if len(shapes) == len(modules):  # no name has a zero byte
            firsts = dict(zip(shapes, modules, strict=True)).values()
            schemes = {id(scheme): scheme for scheme in map(self.scheme, firsts)}
            if len(schemes) == 1:
                return [(scheme, modules) for scheme in schemes.values()]
        return super().by_scheme(modules)

    def scheme_of_group(self, group: str) -> Scheme | None:
        """The scheme that a config group states."""
        return self._schemes[group]

    @property
    def has_targets(self) -> bool:
        """Whether the config quantizes any layer."""
        return bool(self._by_name)

    def scheme_of_class(self) -> Scheme | None:
        """The scheme of the target ``Linear``, of the last group that has it."""
        named = [name for name, group in self._groups.items() if _LINEAR in group["targets"]]
        return self._schemes[named[-1]] if named else None

    def ignores(self, module: str, served: str, *, exactly: bool = False) -> bool:
        """Whether ``ignore`` has the ``module`` or, unless ``exactly``, a pattern for its name as it is ``served``."""
        return module in self._ignored or (not exactly and self._is_target(self._ignore_patterns, served))

    def first_group(self, module: str, served: str) -> str | None:
        """The group of the first target, in the order of the config, that is the ``module`` or a pattern for its name
        as it is ``served``."""
        stated = ((target, name) for name, group in self._groups.items() for target in group["targets"])
        found = (g for t, g in stated if t == module or (t.startswith("re:") and self._patterns.matches(t, served)))
        return next(found, None)

    def class_group(self) -> str | None:
        """The group of the first target, in the order of the config, that is in the name of an engine's class."""
        stated = ((target, name) for name, group in self._groups.items() for target in group["targets"])
        named = (
            group
            for target, group in stated
            if (
                self._patterns.matches(target, _CLASS) if target.startswith("re:") else target.lower() in _CLASS.lower()
            )
        )
        return next(named, None)

    def shape_of(self, module: str) -> str:
        """The same for names that the config cannot tell apart: that differ in digits only, where no pattern has one.
        Names that the config lists one by one are like no other."""
        return f"={module}" if self._is_listed(module) or not self._blind else f"~{module.translate(_DIGITS)}"

    def _is_listed(self, module: str) -> bool:
        return module in self._ignored or module in self._by_name

    def as_compressed_tensors(self, _layers: Layers) -> CompressedTensors:
        return self

    def with_channel_scales(
        self,
        targets: Mapping[str, Collection[str]],
        layers: Layers,
        *,
        per_token: bool = False,
        fused_plain: Collection[str] = (),
    ) -> CompressedTensors:
        """Put groups for ``targets`` with ``strategy: channel`` before the others; all else stays. ``per_token``: their
        activations become dynamic. ``fused_plain`` are ``re:`` patterns for plain layers that engines fuse.

        The other groups' targets that match a converted module are narrowed, since a pattern that sorts before ours
        would win in compressed-tensors and one that stands before ours would win in vLLM. Class names need no
        narrowing: every loader tries them last.
        """
        groups: dict[str, Any] = {}
        ours = []
        for target, names in targets.items():
            base = self._groups[self._common_group(names)]
            group = _channel_group(base, [target], per_token=per_token)
            fitting = self._fitting(target, group, names, layers)
            ours.append(fitting)
            _add(groups, _free_name({**self._groups, **groups}), {**group, "targets": [fitting]})
        converted = frozenset(name for names in targets.values() for name in names)
        others = [name for names in (layers.fp8, layers.others) for name in names if name not in converted]
        last = self._last_narrowed(converted, others)
        for name, group in self._groups.items():
            narrowed = list(self._narrow(group["targets"], ours, converted, others, last))
            if narrowed:
                groups[name] = {**deepcopy(group), "targets": narrowed}
        changes = {"config_groups": groups, "quantization_status": "compressed"}
        ignore = {"ignore": self._lasting_ignore(layers, fused_plain)} if fused_plain else {}
        return CompressedTensors({**deepcopy(self.value), **changes, **ignore})

    def portable(self, converted: Collection[str], layers: Layers, fused_plain: Collection[str]) -> CompressedTensors:
        """Channel scales and activations per token for the groups of the ``converted`` modules, and for those of one
        FP8 scale a weight that no module is left in: engines may find them for one. The others stay.

        Neighboring groups that say the same afterwards become one: some consumers take one group only.
        """
        # By scheme, not by name: where two groups say the same, engines may find the other one for a fused layer.
        chosen = {self._stated(module) for module in converted}
        groups: dict[str, Any] = {}
        for name, group in self._groups.items():
            scheme = self._schemes[name]
            is_chosen = _stated(group) in chosen or (scheme is not None and scheme.fp8 and scheme.layout == "tensor")
            changed = _channel_group(group, group["targets"], per_token=True) if is_chosen else deepcopy(group)
            _add(groups, name, changed)
        ignore = self._lasting_ignore(layers, fused_plain)
        changes = {"config_groups": groups, "ignore": ignore, "quantization_status": "compressed"}
        return CompressedTensors({**deepcopy(self.value), **changes})

    def without(self, plain: Dequantized) -> CompressedTensors:
        return CompressedTensors({**deepcopy(self.value), "ignore": [*self._ignore, *plain.targets]})

    def without_kv_cache(self) -> CompressedTensors:
        if self.value.get("kv_cache_scheme") is None:
            return self
        return CompressedTensors({**deepcopy(self.value), "kv_cache_scheme": None})

    def as_compressed(self) -> CompressedTensors:
        return CompressedTensors({**deepcopy(self.value), "quantization_status": "compressed"})

    def _all_patterns(self) -> Iterator[str]:
        yield from self._ignore_patterns
        yield from (target.pattern for target in self._targets)

    def _is_target(self, targets: Iterable[str], module: str) -> bool:
        """Whether one of the targets (exact names or ``re:`` patterns) matches the module."""
        return any(self._patterns.matches(target, module) for target in targets)

    def _lasting_ignore(self, layers: Layers, fused_plain: Collection[str]) -> list[str]:
        """The ``ignore`` list, and patterns for it that survive the renaming of modules: SGLang 0.5.9 and 0.5.10 look
        for other names than the stored ones."""
        patterns = [*fused_plain, *_renaming_patterns(self._ignore, layers)]
        return list(dict.fromkeys([*self._ignore, *patterns]))

    def _fitting(self, target: str, group: dict[str, Any], names: Collection[str], layers: Layers) -> str:
        """The target, narrowed where it would match a module that is quantized in another way than its group says."""
        stated, wanted = _stated(group), set(names)
        others = [name for name in layers.quantized if name not in wanted]

        def strays(candidate: str) -> list[str]:
            matched = (name for name in others if self._patterns.matches(candidate, name))
            return [name for name in matched if self._stated(name) != stated]

        fitting = fitting_target(target, names, strays)
        if fitting is None:
            found = strays(target)
            raise Unsupported(
                "Fused groups of one kind are quantized in different ways",
                where=min(found),
                expected="every module of this name with one shared scale, or none",
                found=f"{len(found)} with another layout",
                hint="quantize the fused layers of one kind alike",
            )
        return fitting

    def _stated(self, module: str) -> str | None:
        scheme = self.scheme(module)
        return None if scheme is None else scheme.stated

    def _last_narrowed(self, converted: Collection[str], others: Collection[str]) -> str:
        """The last pattern, in the order in which compressed-tensors tries them, that must be narrowed."""
        patterns = (target.pattern for target in self._targets if target.pattern.startswith("re:"))
        matches = self._patterns.matches_any
        return max((p for p in patterns if matches(p, converted) and matches(p, others)), default="")

    def _narrow(
        self, old: Iterable[str], new: Iterable[str], converted: Collection[str], others: Collection[str], last: str
    ) -> Iterator[str]:
        """The targets ``old`` without the converted modules. A target that matched nothing else goes.

        A narrowed pattern begins with a parenthesis, so that it would sort before others that were tried first: those
        up to ``last`` get the same beginning.
        """
        lookahead = "".join(f"(?!{target.removeprefix('re:')})" for target in new)
        for target in old:
            is_ours = self._patterns.matches_any(target, converted)
            if not is_ours and not (target.startswith("re:") and target < last):
                yield target
            elif not is_ours or self._patterns.matches_any(target, others):
                pattern = target.removeprefix("re:")
                yield f"re:{lookahead}(?:{pattern})" if "|" in pattern else f"re:{lookahead}{pattern}"

    def _group_of(self, module: str) -> str | None:
        if self._is_listed(module):
            return self._find_group(module)  # not kept: a list of 500,000 names is real
        shape = module.translate(_DIGITS) if self._blind else module
        if shape not in self._found:
            self._found[shape] = self._find_group(module)
        return self._found[shape]

    def _find_group(self, module: str) -> str | None:
        own = _class_of(module)
        if module in self._ignored or own in self._ignored or self._is_target(self._ignore_patterns, module):
            return None
        if module in self._by_name:
            return self._by_name[module]
        targets = (t for t in self._targets if t.pattern == own or self._patterns.matches(t.pattern, module))
        return next((target.group for target in targets), None)

    def _common_group(self, modules: Collection[str]) -> str:
        """The group whose scheme all ``modules`` have: what the new group is a copy of, strategy aside."""
        groups = {self._group_of(module): module for module in modules}
        stated = {None if name is None else _stated(self._groups[name]) for name in groups}
        name = next(iter(groups))
        if len(stated) == 1 and name is not None:
            return name
        raise Unsupported(
            "The modules of a fused layer belong to different config groups",
            where=_WHERE,
            expected="one scheme for all of them",
            found=", ".join(f"{module}: {name or 'no group'}" for name, module in groups.items()),
            hint="quantize the modules of a fused layer alike",
        )


def _refuse_twice(targets: Iterable[_Target], groups: Mapping[str, Any]) -> None:
    """A target of two groups that say different things: readers disagree on which one counts."""
    seen: dict[str, str] = {}
    for target, group in targets:
        first = seen.setdefault(target, group)
        if _stated(groups[first]) != _stated(groups[group]):
            raise ConfigError(
                "A target stands in two config groups",
                where=f"{_WHERE}.config_groups",
                expected="each target in one group",
                found=f"{target} in {first} and {group}",
                hint="state it once: readers disagree on which group counts",
            )


def per_tensor_fp8(
    layers: Layers, ignore: Iterable[str], activations: Activations, kv_cache_fp8: bool
) -> CompressedTensors:
    """A config for per-tensor FP8, as llm-compressor 0.14 writes it, for a checkpoint of another dialect."""
    group = fp8_group("tensor", activations, [_LINEAR])
    return fp8_groups(layers, ignore, [group], kv_cache_fp8=kv_cache_fp8)


def fp8_group(
    strategy: str, activations: Activations, targets: Iterable[str], *, dynamic_strategy: str = "token"
) -> dict[str, Any]:
    """A config group of FP8 weights: ``strategy`` tensor or channel; dynamic activations by ``dynamic_strategy``."""
    inputs = {
        "static": _arguments("tensor"),
        "dynamic": _arguments(dynamic_strategy, dynamic=True),
        "none": None,
    }
    return {
        "format": "float-quantized",
        "input_activations": inputs[activations],
        "output_activations": None,
        "targets": list(targets),
        "weights": _arguments(strategy),
    }


def fp8_groups(
    layers: Layers, ignore: Iterable[str], groups: Iterable[dict[str, Any]], *, kv_cache_fp8: bool
) -> CompressedTensors:
    """A config of FP8 groups, as llm-compressor 0.14 writes it, for a checkpoint of another dialect."""
    names = list(ignore)
    value = {
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "format": "float-quantized",
        "ignore": list(dict.fromkeys([*names, *_renaming_patterns(names, layers)])),
        "kv_cache_scheme": _arguments("tensor") if kv_cache_fp8 else None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }
    return CompressedTensors(value)


_KV_SCALE = re.compile(r"(.*\.)([kv])_proj\.(?:\2_scale|output_scale)")


def kv_scale_name(name: str) -> str | None:
    """ModelOpt's and Quark's names for a scale of the KV cache, ``….k_proj.k_scale`` and ``….k_proj.output_scale``, as
    compressed-tensors has it: ``….k_scale``.

    vLLM and SGLang read ModelOpt's name, too (``maybe_remap_kv_scale_name``), transformers this one only. None for
    other tensors.
    """
    found = _KV_SCALE.fullmatch(name)
    return None if found is None else f"{found.group(1)}{found.group(2)}_scale"


def _arguments(strategy: str, *, dynamic: bool = False) -> dict[str, Any]:
    """FP8 ``QuantizationArgs``."""
    return {"dynamic": dynamic, "num_bits": 8, "strategy": strategy, "symmetric": True, "type": "float"}


def _per_token(base: dict[str, Any] | None) -> dict[str, Any]:
    """Dynamic activations per token. A dynamic observer would be a contradiction: it never sees calibration data."""
    return {**(base or {}), **_arguments("token", dynamic=True), **({"observer": None} if base else {})}


def _channel_group(base: dict[str, Any], targets: Iterable[str], *, per_token: bool = False) -> dict[str, Any]:
    """The group ``base`` with channel scales, for ``targets``. ``per_token``: activations that are quantized get a
    scale for each token; those of weight-only groups stay plain."""
    group = {**deepcopy(base), "targets": list(targets)}
    group["weights"]["strategy"] = "channel"
    if per_token and base.get("input_activations") is not None:
        group["input_activations"] = _per_token(base.get("input_activations"))
    return group


def _add(groups: dict[str, Any], name: str, group: dict[str, Any]) -> None:
    """Add a group, or join it to the last one where that says the same."""
    last = next(reversed(groups), None)
    if last is None or _stated(groups[last]) != _stated(group):
        groups[name] = group
        return
    targets = list(dict.fromkeys([*groups[last]["targets"], *group["targets"]]))
    others = [target for target in targets if target == _EMBEDDING]
    groups[last]["targets"] = [_LINEAR, *others] if _LINEAR in targets else targets  # the class includes all its layers


def _stated(group: dict[str, Any]) -> str:
    """All that a group says but its targets."""
    return json.dumps({**group, "targets": None}, sort_keys=True)


_NUMBER = re.compile(r"(?<=\\\.)\d+(?=\\\.)")


def _renaming_patterns(ignore: Iterable[str], layers: Layers) -> list[str]:
    """Patterns for the exact names of an ``ignore`` list: no prefix that engines change, any layer number."""
    safe: dict[str, bool] = {}  # whether a pattern leaves the quantized layers alone; many names give the same one
    patterns = []
    for name in ignore:
        if name.startswith("re:") or name == _LINEAR or "." not in name:
            continue
        tail = re.escape(name.removeprefix("model.").removeprefix("language_model."))
        for pattern in (f".*{_NUMBER.sub('[0-9]+', tail)}$", f".*{tail}$"):
            if pattern not in safe:  # of our own making, one run of anything and digits: sure to end
                match = re.compile(pattern).match
                safe[pattern] = not any(match(module) for module in layers.quantized)
            if safe[pattern]:
                patterns.append(f"re:{pattern}")
                break
    return list(dict.fromkeys(patterns))


def _class_of(module: str) -> str:
    return _EMBEDDING if is_table(module) else _LINEAR


def _free_name(groups: Collection[str]) -> str:
    return next(name for i in range(len(groups) + 1) if (name := f"group_{i}") not in groups)


def _read_groups(value: dict[str, Any]) -> dict[str, Any]:
    groups = value.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise ConfigError(
            "config_groups is not an object of groups", where=_WHERE, expected="{name: {…}}", found=groups
        )
    for name, group in groups.items():
        strings(group.get("targets"), f"{_WHERE}.config_groups.{name}.targets")
    return groups


def _scheme(group: dict[str, Any], name: str) -> Scheme | None:
    weights, inputs = group.get("weights"), group.get("input_activations")
    if weights is None:
        return None
    if not isinstance(weights, dict) or not isinstance(inputs, dict | None):
        raise ConfigError("A scheme is not an object", where=f"{_WHERE}.config_groups.{name}", found=group)
    activations: Activations = "none" if inputs is None else "dynamic" if inputs.get("dynamic") else "static"
    form, strategy = _format(weights), _word(weights.get("strategy"))
    return Scheme(
        form,
        _LAYOUTS.get(strategy),
        activations,
        f"{form} weights per {strategy.replace('_', ' ')}, {activations} activations",
        _stated(group),
        inputs is not None and inputs.get("strategy") == "token",
        block_shape(weights.get("block_structure")),
    )


def _format(weights: dict[str, Any]) -> str:
    """By ``type``, ``num_bits`` and ``group_size`` of ``QuantizationArgs``: compressed-tensors' preset schemes."""
    kind, bits, group_size = weights.get("type"), weights.get("num_bits"), weights.get("group_size")
    if kind == "float" and weights.get("symmetric") is False:
        return "asymmetric float"  # vLLM 0.32.0 and SGLang 0.5.23 raise: no such scheme
    if kind == "float" and bits == 4:
        return {16: "NVFP4", 32: "MXFP4"}.get(group_size if isinstance(group_size, int) else 0, "float4")
    return {"float": "FP8" if bits == 8 else "float", "int": f"INT{_word(bits)}"}.get(_word(kind), _word(kind))


def _word(value: object) -> str:
    """A setting as text; what is neither a word nor a number is no setting, and may be of any size."""
    return str(value) if isinstance(value, str | int | None) else type(value).__name__
