"""What configs say, read with the verification's own eyes.

compressed-tensors is read by its own parser and matcher. The other dialects have no parser to ask, and are read here a
second time: their rules are a few lines each.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

from rewrite.checkpoint.bounded_json import JsonFile
from rewrite.checkpoint.checkpoint import CONFIG_NAME, Checkpoint
from rewrite.errors import ConfigError
from rewrite.quantization.groups import is_table

QUANT_FILE_NAME = "hf_quant_config.json"  # ModelOpt's
#: Where loaders look for the quantization part of config.json, in their order (vLLM ``get_quant_config``).
PLACES = (("quantization_config",), ("text_config", "quantization_config"), ("compression_config",))


#: Left plain, by a stored scale, by a scale made on the way, or by one for each token.
Activations = Literal["none", "static", "dynamic", "token"]


@dataclass(frozen=True)
class StatedScheme:
    """What a config says of a layer: ``strategy`` of its weights, what activations are quantized by, the rows and
    columns that share a scale, where it names them, and whether weights and activations are FP8 (activations perhaps
    plain)."""

    strategy: str
    activations: Activations
    block: tuple[int, int] | None = None
    fp8: bool = True

    @property
    def static(self) -> bool:
        return self.activations == "static"


class CompressedTensorsSchemes:
    """compressed-tensors' own parser and matcher."""

    def __init__(self, value: object) -> None:
        import torch
        from compressed_tensors.quantization import QuantizationConfig

        try:
            config = QuantizationConfig.model_validate(value)
        except (ValueError, TypeError, LookupError, AttributeError, NotImplementedError) as error:  # its validators'
            raise ConfigError(
                f"compressed-tensors cannot parse it: {str(error).splitlines()[0]}", where=CONFIG_NAME
            ) from error
        self._targets = {target: scheme for scheme in config.config_groups.values() for target in scheme.targets}
        self._target_names, self._other_targets = _sorted_out(self._targets)
        self._ignored_names, self._other_ignored = _sorted_out(config.ignore or [])
        self._found: dict[str, Any] = {}
        self._linear = torch.nn.Linear(1, 1, device="meta")
        self._table = torch.nn.Embedding(1, 1, device="meta")

    def of_module(self, name: str) -> StatedScheme | None:
        """The scheme of a linear layer, or None."""
        found = self._raw(name)
        return None if found is None else _found(found)

    def stated(self, name: str) -> dict[str, Any] | None:
        """All that the config says of a linear layer, but the targets that led to it."""
        found = self._raw(name)
        return None if found is None else dict(found.model_dump(exclude={"targets"}))

    def of_fused(self, name: str, parts: Iterable[str]) -> StatedScheme | None:
        """The scheme of a fused layer as vLLM and SGLang look it up: by its name, then by its class, ``…Linear``, then
        by its stored ``parts``, which must all match (vLLM 0.32 ``find_matched_target``)."""
        names = (name, *parts)
        if self._ignored_names.intersection(names):
            return None
        if any(_matches(entry, each) for entry in self._other_ignored for each in names):
            return None
        named = next((t for t in self._targets if _matches(t, name)), "Linear" if "Linear" in self._targets else None)
        if named is not None:
            return _found(self._targets[named])
        of_parts = [next((t for t in self._targets if _matches(t, part)), None) for part in names[1:]]
        return None if None in of_parts or not of_parts else _found(self._targets[of_parts[0]])

    def _raw(self, name: str) -> Any:
        """compressed-tensors' own object."""
        if name not in self._found:
            self._found[name] = self._look_up(name)
        return self._found[name]

    def _look_up(self, name: str) -> Any:
        """Only entries that can match are handed to the matcher: it tries each of them, and exports list thousands."""
        from compressed_tensors.utils.match import is_match, match_targets

        module = self._table if is_table(name) else self._linear
        targets = [*self._other_targets, *self._target_names.intersection({name})]
        ignored = [*self._other_ignored, *self._ignored_names.intersection({name})]
        if not is_match(name, module, targets, ignored):
            return None
        return self._targets[match_targets(name, module, targets)[0]]


def _sorted_out(entries: Iterable[str]) -> tuple[frozenset[str], list[str]]:
    """Entries that match a module of this very name and nothing else, and the others: patterns, and names of classes,
    which have no dots."""
    others = [entry for entry in entries if entry.startswith("re:") or "." not in entry]
    return frozenset(entries) - frozenset(others), others


def _matches(target: str, name: str) -> bool:
    return target == name or (target.startswith("re:") and re.match(target[3:], name) is not None)


class OtherSchemes:
    """ModelOpt, ``fp8``, and configs that say nothing that is known here."""

    def __init__(self, value: dict[str, Any]) -> None:
        self.value = value
        lists = (value.get(key) for key in LEFT_ALONE)
        self._left_alone = [n for names in lists if isinstance(names, list) for n in names if isinstance(n, str)]
        self._exact = frozenset(self._left_alone)
        self._globs = [name for name in self._left_alone if set(name) & set("*?[")]

    def of_module(self, name: str) -> StatedScheme | None:
        """The scheme of a linear layer, or None."""
        algorithm = self.value.get("quant_algo")
        if algorithm == "MIXED_PRECISION":
            layer = _objects(self.value, "quantized_layers").get(name)
            return None if layer is None else _of_algorithm(str(layer.get("quant_algo")).upper())
        if self.value.get("quant_method") == "fp8":
            if name in self._exact:
                return None
            block = self.value.get("weight_block_size")
            if block:
                return StatedScheme("block", "dynamic", _pair(block))
            return StatedScheme("tensor", "static" if self.value.get("activation_scheme") == "static" else "dynamic")
        if algorithm != "FP8" or self.leaves_alone(name):
            return None
        return StatedScheme("tensor", "static")

    def leaves_alone(self, name: str) -> bool:
        """Whether the config names a layer as one that is not quantized."""
        return name in self._exact or any(fnmatchcase(name, glob) for glob in self._globs)


class QuarkSchemes:
    """AMD Quark: names, then globs of names, then the class ``Linear``, then everything (Quark 0.13
    ``get_layer_quant_config``)."""

    _STRATEGIES: ClassVar = {"per_tensor": "tensor", "per_channel": "channel", "per_block": "block"}

    def __init__(self, value: dict[str, Any]) -> None:
        self._value = value
        named = value.get("exclude")
        entries = [entry for entry in named if isinstance(entry, str)] if isinstance(named, list) else []
        self._exact = frozenset(entries)
        self._globs = [entry for entry in entries if set(entry) & set("*?[")]
        self._patterns = [entry for entry in entries if entry.startswith("re:")]  # as engines read it

    def of_module(self, name: str) -> StatedScheme | None:
        """The scheme of a linear layer, or None."""
        if is_table(name) or self.leaves_alone(name):
            return None
        by_class = _objects(self._value, "layer_type_quant_config").get("Linear")
        of_all = self._value.get("global_quant_config")
        stated = by_class or (of_all if isinstance(of_all, dict) else {})
        for pattern, layer in _objects(self._value, "layer_quant_config").items():
            if fnmatchcase(name, pattern):
                stated = layer
                break
        weight = stated.get("weight")
        if not isinstance(weight, dict):  # a list: NVFP4
            return None if weight is None else StatedScheme("other", "none", fp8=False)
        qscheme = str(weight.get("qscheme"))
        fp8 = str(weight.get("dtype")).startswith("fp8")
        return StatedScheme(self._STRATEGIES.get(qscheme, qscheme), self._activations(stated), fp8=fp8)

    def leaves_alone(self, name: str) -> bool:
        """Whether the config names a layer as one that is not quantized."""
        is_named = name in self._exact or any(fnmatchcase(name, glob) for glob in self._globs)
        return is_named or any(_matches(pattern, name) for pattern in self._patterns)

    @staticmethod
    def _activations(stated: dict[str, Any]) -> Activations:
        inputs = stated.get("input_tensors")
        if not isinstance(inputs, dict):
            return "none"
        if not inputs.get("is_dynamic"):
            return "static"
        return "token" if inputs.get("qscheme") == "per_channel" else "dynamic"


#: Lists of layers that are not quantized, of any dialect.
LEFT_ALONE = ("ignore", "exclude_modules", "ignored_layers", "modules_to_not_convert", "exclude")
Schemes = CompressedTensorsSchemes | QuarkSchemes | OtherSchemes


def path_of(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The keys that lead to the quantization part of config.json; None where it has none."""
    return next((path for path in PLACES if isinstance(value_at(config, path), dict)), None)


def value_at(value: Any, path: tuple[str, ...]) -> Any:
    """What lies under these keys; None where there is nothing."""
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def quantization_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The quantization part that counts: config.json's, else ModelOpt's own file's, else none."""
    path = path_of(checkpoint.config.value)
    if path is not None:
        value: dict[str, Any] = value_at(checkpoint.config.value, path)
        return value
    file = checkpoint.read_json(QUANT_FILE_NAME)
    return {} if file is None else stated_by(file)


def stated_by(file: JsonFile) -> dict[str, Any]:
    """What ModelOpt's own file states."""
    value = file.value.get("quantization")
    if not isinstance(value, dict):
        raise ConfigError("The file states no quantization", where=f"{file.name}: quantization", found=value)
    return {**value, "quant_method": "modelopt"}


KV_CACHE = ("kv_cache_scheme", "kv_cache_quant_algo")  # of any dialect


def states_kv_cache(value: object) -> bool:
    """Whether a quantization part says that the KV cache is quantized."""
    if not isinstance(value, dict):
        return False
    export = value.get("export")  # Quark's
    return any(value.get(key) for key in KV_CACHE) or bool(isinstance(export, dict) and export.get("kv_cache_group"))


def states_compressed_tensors(checkpoint: Checkpoint) -> bool:
    """Whether the config is of compressed-tensors' dialect."""
    return _is_compressed_tensors(quantization_of(checkpoint))


def read_schemes(checkpoint: Checkpoint) -> Schemes:
    """The schemes by the config that counts."""
    value = quantization_of(checkpoint)
    if _is_compressed_tensors(value):
        return CompressedTensorsSchemes(value)
    return QuarkSchemes(value) if value.get("quant_method") == "quark" else OtherSchemes(value)


def dialect_key(value: Mapping[str, Any]) -> tuple[object, ...]:
    """Equal for configs of one dialect."""
    if _is_compressed_tensors(value):
        return ("compressed-tensors",)
    return value.get("quant_method"), value.get("quant_algo")


def _is_compressed_tensors(value: Mapping[str, Any]) -> bool:
    method = value.get("quant_method")
    return method == "compressed-tensors" or (method is None and "config_groups" in value)


def _of_algorithm(name: str) -> StatedScheme:
    """vLLM 0.32 and SGLang 0.5.23, ``ModelOptMixedPrecisionConfig``."""
    return {
        "FP8": StatedScheme("tensor", "static"),
        "FP8_PER_CHANNEL_PER_TOKEN": StatedScheme("channel", "token"),
        "FP8_PB_WO": StatedScheme("block", "dynamic"),
    }.get(name, StatedScheme(name, "static", fp8=False))


def _found(scheme: Any) -> StatedScheme | None:
    if scheme.weights is None:
        return None
    inputs = scheme.input_activations
    block = _pair(getattr(scheme.weights, "block_structure", None))
    fp8 = all(str(each.type) == "float" and each.num_bits == 8 for each in (scheme.weights, inputs) if each is not None)
    return StatedScheme(str(scheme.weights.strategy), _activations_of(inputs), block, fp8)


def _activations_of(inputs: Any) -> Activations:
    if inputs is None:
        return "none"
    if not inputs.dynamic:
        return "static"
    return "token" if str(inputs.strategy) == "token" else "dynamic"


def _objects(value: dict[str, Any], key: str) -> dict[str, dict[str, Any]]:
    """Those of the values under a key that are objects."""
    stated = value.get(key)
    return {name: each for name, each in stated.items() if isinstance(each, dict)} if isinstance(stated, dict) else {}


def _pair(value: object) -> tuple[int, int] | None:
    return (int(value[0]), int(value[1])) if isinstance(value, list) and len(value) == 2 else None
