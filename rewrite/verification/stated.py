"""What the quantization part of a config may have become: every key is IN's, or what the promise makes of it.

Nothing is read as an engine reads it here: whether each layer has the scheme of its tensors is asked in ``structure``.
A key is compared as the text that JSON has for it, so that ``1`` is not ``true``, whatever its name and however deep it
lies.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

from rewrite.checkpoint.bounded_json import JsonFile
from rewrite.checkpoint.checkpoint import CONFIG_NAME, Checkpoint
from rewrite.promise import Promise
from rewrite.verification.configs import (
    KV_CACHE,
    LEFT_ALONE,
    QUANT_FILE_NAME,
    dialect_key,
    path_of,
    quantization_of,
    states_kv_cache,
)
from rewrite.verification.expected import Expected

Value = Mapping[str, Any]
_CT = ("compressed-tensors",)
_NOTHING = object()
#: The faults that are mended by leaving layers alone that are stored plain.
_OF_PLAIN_LAYERS = frozenset({"plain-layer", "fused-name", "mtp-format"})


def stated_problems(source: Checkpoint, out: Checkpoint, expected: Expected) -> Iterator[str]:
    """Every key that is neither IN's nor what the promise makes of it. Raises what reading the configs raises."""
    if expected.promise.nothing_quantized:
        return  # nothing may be stated at all: asked elsewhere
    old, new = quantization_of(source), quantization_of(out)
    before, after = (path_of(each.config.value) for each in (source, out))
    where = f"{CONFIG_NAME}: {'.'.join(after)}" if after else QUANT_FILE_NAME
    if after not in (before, None if before else ("quantization_config",)):
        yield f"{where}: the quantization is stated in another place than {'.'.join(before or ('in no part',))}"
    same = dialect_key(old) == dialect_key(new)
    if not same and (dialect_key(new) != _CT or expected.promise.scale != "channel"):
        yield f"{where}: the dialect is {_short(dialect_key(new))}, that of IN is {_short(dialect_key(old))}"
        return
    yield from _keys(where, old, new, expected) if same else _restated(where, old, new, expected)
    one, other = (checkpoint.read_json(QUANT_FILE_NAME) for checkpoint in (source, out))
    if before and one and other:
        yield from _second_file(one, other, old, new, expected)


def _keys(where: str, old: Value, new: Value, expected: Expected) -> Iterator[str]:
    for key in {**old, **new}:
        before, after = old.get(key, _NOTHING), new.get(key, _NOTHING)
        if _same(before, after) or (after is not _NOTHING and _may_become(key, before, after, old, expected)):
            continue
        if key == "config_groups" and dialect_key(old) == _CT and expected.promise.scale == "channel":
            yield from _groups(where, before, after, expected.promise)
        else:
            yield f"{where}.{key}: {_short(before)} became {_short(after)}"


def _may_become(key: str, before: Any, after: Any, old: Value, expected: Expected) -> bool:
    """Whether the promise names this change of a key."""
    promise = expected.promise
    explicit = promise.scale == "channel" and dialect_key(old) == _CT
    if key in LEFT_ALONE and (
        promise.weight == "plain"
        or (explicit and promise.input_scale == "dropped")
        or expected.mended & _OF_PLAIN_LAYERS
    ):
        return _grew(before, after)
    if key in KV_CACHE:
        return expected.kv_dropped and after is None
    if key == "quantization_status":
        return (explicit or "status" in expected.mended) and after == "compressed"
    if key in ("export", "layer_quant_config"):
        return expected.kv_dropped and _same(after, _without_kv(key, before, old))
    if key in ("quantized_layers", "config_groups") and "quantized_layers" in old:
        gone = _converted(expected) if promise.weight == "plain" else frozenset()
        return _same(after, _without_layers(before, gone | expected.plain if expected.mended else gone))
    return False


def _grew(before: Any, after: Any) -> bool:
    """Whether a list of layers has all of its entries still, and perhaps more. What these match is asked elsewhere."""
    names = [each for each in before if isinstance(each, str)] if isinstance(before, list) else []
    kept = list(dict.fromkeys(names))
    return isinstance(after, list) and after[: len(kept)] == kept and all(isinstance(each, str) for each in after)


def _without_kv(key: str, before: Any, old: Value) -> Any:
    """Quark's words for a quantized KV cache, taken away."""
    export = old.get("export")
    if not isinstance(before, dict) or not isinstance(export, dict):
        return before
    if key == "export":
        return {**before, "kv_cache_group": []}
    named = export.get("kv_cache_group") or []
    return {name: {**layer, "output_tensors": None} if name in named else layer for name, layer in before.items()}


def _without_layers(before: Any, gone: frozenset[str]) -> Any:
    """ModelOpt's ``quantized_layers``, or its config groups, without the layers that became plain."""
    if not isinstance(before, dict):
        return before
    left = {name: each for name, each in before.items() if name not in gone}
    for name, each in before.items():
        if isinstance(each, dict) and isinstance(each.get("targets"), list):
            targets = [target for target in each["targets"] if target not in gone]
            left[name] = {**each, "targets": targets}
            if not targets:
                del left[name]
    return left


def _converted(expected: Expected) -> frozenset[str]:
    return frozenset(module.name for group in expected.groups for module in group.modules)


def _groups(where: str, before: Any, after: Any, promise: Promise) -> Iterator[str]:
    """Each group of OUT says what one of IN says, or that with explicit scales. Groups of IN keep their names and their
    order; which layers the targets match is asked elsewhere."""
    if not isinstance(before, dict) or not isinstance(after, dict):
        yield f"{where}.config_groups: {_short(before)} became {_short(after)}"
        return
    for name, group in after.items():
        parents = [before[name]] if name in before else list(before.values())
        if not any(_text(group, "targets") in _forms(parent, promise) for parent in parents):
            yield f"{where}.config_groups.{name}: says what no group of IN says, nor what explicit scales make of it"
    if [name for name in after if name in before] != [name for name in before if name in after]:
        yield f"{where}.config_groups: in another order"
    if _classes(before) != _classes(after):
        yield f"{where}.config_groups: targets of classes were {_classes(before)}, are {_classes(after)}"


def _forms(group: Any, promise: Promise) -> set[str]:
    """What a group of IN may say in OUT, but for its targets."""
    if not isinstance(group, dict) or not isinstance(weights := group.get("weights"), dict):
        return {_text(group, "targets")}
    explicit = {**deepcopy(group), "weights": {**weights, "strategy": "channel"}}
    if promise.input_scale == "dropped" and isinstance(inputs := group.get("input_activations"), dict):
        explicit["input_activations"] = {**inputs, **_arguments("token", dynamic=True), "observer": None}
    is_fp8 = (weights.get("type"), weights.get("num_bits", 8)) == ("float", 8)
    return {_text(group, "targets"), _text(explicit if is_fp8 else group, "targets")}


def _classes(groups: Value) -> list[str]:
    lists = (group.get("targets") for group in groups.values() if isinstance(group, dict))
    targets = {str(target) for targets in lists if isinstance(targets, list) for target in targets}
    return sorted(target for target in targets if not target.startswith("re:") and "." not in target)


def _restated(where: str, old: Value, new: Value, expected: Expected) -> Iterator[str]:
    """A config of another dialect, restated as compressed-tensors: what each of its keys must say."""
    kv = _arguments("tensor") if states_kv_cache(old) and not expected.kv_dropped else None
    fixed = {
        "format": "float-quantized",
        "kv_cache_scheme": kv,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }
    for key in {**fixed, **new}:
        wanted, found = fixed.get(key, _NOTHING), new.get(key, _NOTHING)
        if key not in ("config_groups", "ignore") and not _same(wanted, found):
            yield f"{where}.{key}: {_short(found)}, not {_short(wanted)}"
    token = _arguments("token", dynamic=True)
    inputs = (None, _arguments("tensor"), _arguments("tensor", dynamic=True), token, {**token, "observer": None})
    forms = {
        _text(
            {
                "format": "float-quantized",
                "input_activations": each,
                "output_activations": None,
                "weights": _arguments(strategy),
            }
        )
        for each in inputs
        for strategy in ("tensor", "channel")
    }
    groups = new.get("config_groups")
    for name, group in groups.items() if isinstance(groups, dict) else (("", groups),):
        if _text(group, "targets") not in forms:
            yield f"{where}.config_groups.{name}: no FP8 scheme as a restated config has it"


def _second_file(one: JsonFile, other: JsonFile, old: Value, new: Value, expected: Expected) -> Iterator[str]:
    """ModelOpt's own file beside config.json: its lists of layers follow those of config.json."""
    before, after = (file.value.get("quantization") for file in (one, other))
    if not isinstance(before, dict) or not isinstance(after, dict):
        return  # compared with all of the file
    wanted = dict(before)
    for key, names in (("exclude_modules", ("ignore", "exclude_modules")), ("quantized_layers", ("quantized_layers",))):
        lists = [next((part[name] for name in names if name in part), None) for part in (old, new)]
        if not _same(*lists):
            wanted[key] = lists[1]
    if expected.kv_dropped:
        wanted |= {key: None for key in KV_CACHE if before.get(key)}
    for key in {**wanted, **after}:
        if not _same(wanted.get(key, _NOTHING), after.get(key, _NOTHING)):
            found = after.get(key, _NOTHING)
            yield f"{QUANT_FILE_NAME}: quantization.{key}: {_short(found)}, not {_short(wanted.get(key, _NOTHING))}"


def _arguments(strategy: str, dynamic: bool = False) -> dict[str, Any]:
    """compressed-tensors' words for FP8."""
    return {"dynamic": dynamic, "num_bits": 8, "strategy": strategy, "symmetric": True, "type": "float"}


def _text(value: Any, *but: str) -> str:
    shown = {k: v for k, v in value.items() if k not in but} if isinstance(value, dict) else value
    return json.dumps(shown, sort_keys=True)


def _same(one: Any, other: Any) -> bool:
    if one is _NOTHING or other is _NOTHING:
        return one is other
    return _text(one) == _text(other)


def _short(value: Any) -> str:
    text = "nothing" if value is _NOTHING else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
