"""``hf_quant_config.json``: the file in which ModelOpt states the quantization, alone (older exports) or a second time.

Its list of layers that are left alone is called ``exclude_modules`` there, and ``ignore`` in config.json.
"""

from __future__ import annotations

from typing import Any

from rewrite.checkpoint.bounded_json import JsonFile
from rewrite.checkpoint.json_edit import replace_value
from rewrite.errors import ConfigError
from rewrite.quantization.dialects.base import Dialect

NAME = "hf_quant_config.json"


#: What this file, and config.json, call the quantization of the KV cache.
KV_CACHE = ("kv_cache_quant_algo", "kv_cache_scheme")


def states_kv_cache(value: dict[str, Any]) -> bool:
    """Whether a quantization part says that the KV cache is quantized."""
    return any(value.get(key) for key in KV_CACHE)


def stated(file: JsonFile) -> dict[str, Any]:
    """The quantization part, as config.json would have it. Raises :class:`ConfigError` where there is none."""
    value = file.value.get("quantization")
    if not isinstance(value, dict):
        raise ConfigError("The file states no quantization", where=f"{NAME}: quantization", found=value)
    return {**value, "quant_method": "modelopt"}


def states_something(file: JsonFile) -> bool:
    """Whether there is a quantization part at all."""
    return isinstance(file.value.get("quantization"), dict)


def updated(file: JsonFile, old: Dialect, new: Dialect) -> str:
    """The text of the file after the config went from ``old`` to ``new``: modules among the excluded ones, or no more
    among the quantized ones. A file that states no quantization stays as it is."""
    value = file.value.get("quantization")
    if not isinstance(value, dict):
        return file.text
    changes: dict[str, Any] = {}
    excluded = [dialect.value.get("ignore", dialect.value.get("exclude_modules")) for dialect in (old, new)]
    if excluded[0] != excluded[1]:
        changes["exclude_modules"] = excluded[1]
    if new.value.get("quantized_layers") != old.value.get("quantized_layers"):
        changes["quantized_layers"] = new.value["quantized_layers"]
    if states_kv_cache(old.value) and not states_kv_cache(new.value):
        changes |= {key: None for key in KV_CACHE if value.get(key)}
    if not changes.keys() <= value.keys():
        return replace_value(file.text, ("quantization",), {**value, **changes})
    text = file.text
    for key, change in changes.items():
        text = replace_value(text, ("quantization", key), change)
    return text


def disagrees(file: JsonFile, config: dict[str, Any]) -> bool:
    """Whether the file states another algorithm or leaves out other layers than config.json's quantization part."""
    value = file.value.get("quantization")
    if not isinstance(value, dict):
        return True
    if any(value.get(key) != config.get(key) for key in ("quant_algo", "quantized_layers")):
        return True
    ours, theirs = (part.get("ignore") or part.get("exclude_modules") or [] for part in (config, value))
    if any(not isinstance(names, list) or not all(isinstance(name, str) for name in names) for names in (ours, theirs)):
        return bool(ours != theirs)
    return sorted(ours) != sorted(theirs)
