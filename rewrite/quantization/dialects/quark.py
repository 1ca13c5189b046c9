"""AMD Quark's dialect: ``quant_method: quark``.

``global_quant_config`` is the scheme of every linear layer, ``layer_type_quant_config`` that of a class of layers,
``layer_quant_config`` that of names and globs (the first that matches counts, before the class), ``exclude`` leaves
names and globs alone, whatever the others say. Globs are those of ``fnmatch``: read in Quark 0.13
(``torch/export/main_export/quant_config_parser.py``). An entry of ``exclude`` that begins with ``re:`` is a pattern to
engines, and is read as they read it (vLLM 0.32 and SGLang 0.5.23, ``should_ignore_layer``).

Static activations of per-tensor weights have no form with channel scales here that engines were run with: such
checkpoints are restated as compressed-tensors. Quark keeps a scale for each row in ``[N]``, not ``[N, 1]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from fnmatch import fnmatchcase
from typing import Any

from rewrite.errors import ConfigError, Unsupported
from rewrite.quantization.dialects.base import Dialect
from rewrite.quantization.dialects.compressed_tensors import CompressedTensors, fp8_group, fp8_groups
from rewrite.quantization.globs import as_target, compile_globs, is_glob
from rewrite.quantization.groups import is_table
from rewrite.quantization.patterns import Patterns
from rewrite.quantization.scheme import Activations, Dequantized, Layers, ScaleLayout, Scheme, strings

_WHERE = "config.json: quantization_config"
_LAYOUTS: dict[str, ScaleLayout] = {"per_tensor": "tensor", "per_channel": "rows", "per_block": "block"}
_FORMATS = {"fp8_e4m3": "FP8", "int8": "INT8", "uint8": "INT8", "int4": "INT4", "uint4": "INT4"}


class Quark(Dialect):
    """A ``quantization_config`` with ``quant_method: quark``."""

    name = "quark"

    @staticmethod
    def states(value: dict[str, Any]) -> bool:
        return value.get("quant_method") == "quark"

    def __init__(self, value: dict[str, Any]) -> None:
        self.value = value
        self._global = _optional_object(value, "global_quant_config")
        self._by_pattern = _objects(value, "layer_quant_config")
        self._by_class = _objects(value, "layer_type_quant_config")
        self._exclude = strings(value.get("exclude") or [], f"{_WHERE}.exclude")
        self._excluded = frozenset(self._exclude)  # lists of 10,000 names are real
        self._globs = compile_globs([name for name in self._exclude if is_glob(name)], f"{_WHERE}.exclude")
        self._patterns = Patterns()
        self._exclude_patterns = [name for name in self._exclude if name.startswith("re:")]
        self._pattern_schemes = {pattern: _scheme(layer) for pattern, layer in self._by_pattern.items()}
        self._global_scheme = None if self._global is None else _scheme(self._global)
        linear = self._by_class.get("Linear")
        self._linear_scheme = self._global_scheme if linear is None else _scheme(linear)

    def scheme(self, module: str) -> Scheme | None:
        if is_table(module) or module in self._excluded or self._globs.match(module):
            return None
        if any(self._patterns.matches(pattern, module) for pattern in self._exclude_patterns):
            return None
        matching = (scheme for pattern, scheme in self._pattern_schemes.items() if fnmatchcase(module, pattern))
        return next(matching, self._linear_scheme)

    def scheme_in_engines(
        self, module: str, served_name: Callable[[str], str], *, by_name: bool = True
    ) -> Scheme | None:
        """As vLLM and SGLang find it, which differs: ``exclude`` has no globs there, a name of ``layer_quant_config``
        without a star is searched for the layer's, and classes do not count (they look a class object up). Not
        ``by_name``: without ``layer_quant_config``."""
        if module in self._excluded:
            return None
        served = served_name(module)
        if any(self._patterns.matches(pattern, served) for pattern in self._exclude_patterns):
            return None
        for pattern, scheme in self._pattern_schemes.items() if by_name else ():
            renamed = served_name(pattern)
            if fnmatchcase(served, renamed) if "*" in pattern else served in renamed:
                return scheme
        return self._global_scheme

    @property
    def unsupported(self) -> str | None:
        """What the config says beside weights and inputs of linear layers that has no compressed-tensors form here."""
        if self.value.get("softmax_quant_spec"):
            return "the softmax of attention is quantized (softmax_quant_spec)"
        for where, layer in self._stated():
            if layer.get("bias"):
                return f"biases are quantized ({where})"
            if layer.get("output_tensors") and where not in self._kv_patterns():
                return f"outputs are quantized ({where})"
        return None

    @property
    def kv_cache_fp8(self) -> bool:
        """Whether the KV cache is FP8, by one scale for each layer."""
        return bool(self._kv_patterns())

    def as_compressed_tensors(self, layers: Layers) -> CompressedTensors:
        if unsupported := self.unsupported:
            raise Unsupported(
                "This Quark config has no compressed-tensors form",
                where=_WHERE,
                expected="weights and inputs of linear layers, and an FP8 KV cache",
                found=unsupported,
            )
        self._check_kv_cache()
        found = list(dict.fromkeys(filter(None, map(self.scheme, sorted(layers.quantized)))))
        others = [scheme.text for scheme in found if not scheme.fp8 or scheme.layout not in ("tensor", "rows")]
        if others:
            raise Unsupported(
                "Only FP8 with a scale for each layer or row is restated as compressed-tensors",
                where=_WHERE,
                expected="FP8 for every quantized layer",
                found=", ".join(sorted(others)),
            )
        ignore = [as_target(name, layers.fp8, f"{_WHERE}.exclude") for name in self._exclude]
        return fp8_groups(layers, ignore, self._groups(found, layers), kv_cache_fp8=self.kv_cache_fp8)

    def without(self, plain: Dequantized) -> Quark:
        # Engines look the fused name up, SGLang before its parts.
        names = dict.fromkeys([*self._exclude, *plain.modules, *plain.fused])
        return Quark({**self.value, "exclude": list(names)})

    def without_kv_cache(self) -> Quark:
        if not (patterns := self._kv_patterns()):
            return self
        value = deepcopy(self.value)
        value["export"]["kv_cache_group"] = []
        for pattern in patterns:
            if pattern in (value.get("layer_quant_config") or {}):
                value["layer_quant_config"][pattern]["output_tensors"] = None
        return Quark(value)

    def _stated(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        if self._global is not None:
            yield "global_quant_config", self._global
        yield from self._by_pattern.items()
        yield from self._by_class.items()

    def _groups(self, found: Sequence[Scheme], layers: Layers) -> list[dict[str, Any]]:
        """A config group for each scheme: that of most layers for the class, the others by their patterns."""
        catch_all = self._linear_scheme if self._linear_scheme in found else found[0]
        groups = []
        for scheme in found:
            if scheme != catch_all:
                patterns = [p for p, each in self._pattern_schemes.items() if each == scheme]
                where = f"{_WHERE}.layer_quant_config"
                groups.append(_group(scheme, [as_target(p, layers.fp8, where) for p in patterns]))
        return [*groups, *([_group(catch_all, ["Linear"])] if catch_all else [])]

    def _kv_patterns(self) -> list[str]:
        export = self.value.get("export")
        named = export.get("kv_cache_group") if isinstance(export, dict) else None
        return strings(named or [], f"{_WHERE}.export.kv_cache_group")

    def _check_kv_cache(self) -> None:
        for pattern in self._kv_patterns():
            outputs = self._by_pattern.get(pattern, {}).get("output_tensors")
            stated = outputs if isinstance(outputs, dict) else {}
            kind = (stated.get("dtype"), stated.get("qscheme"), bool(stated.get("is_dynamic")))
            if kind != ("fp8_e4m3", "per_tensor", False):
                raise Unsupported(
                    "This KV-cache quantization has no compressed-tensors form",
                    where=f"{_WHERE}.layer_quant_config: {pattern}",
                    expected="output_tensors with dtype fp8_e4m3, qscheme per_tensor, static",
                    found=outputs,
                )


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    strategy = "token" if scheme.per_token else "tensor"
    layout = "tensor" if scheme.layout == "tensor" else "channel"
    return fp8_group(layout, scheme.activations, targets, dynamic_strategy=strategy)


def _scheme(layer: Mapping[str, Any]) -> Scheme | None:
    """The scheme of a layer's config; None where it leaves the weights alone."""
    weight, inputs = _tensor_spec(layer, "weight"), _tensor_spec(layer, "input_tensors")
    if weight is None:
        return None
    activations: Activations = "none" if inputs is None else "dynamic" if inputs.get("is_dynamic") else "static"
    layout = _LAYOUTS.get(str(weight.get("qscheme")))
    if layout == "rows" and weight.get("ch_axis") not in (0, None):
        layout = None  # a scale for each column
    if inputs is not None and (inputs.get("dtype") != weight.get("dtype") or _is_static_by_row(inputs)):
        layout = None
    form = _format(weight)
    return Scheme(
        form,
        layout,
        activations,
        f"{form} weights {str(weight.get('qscheme')).replace('_', ' ')}, {activations} activations",
        per_token=activations == "dynamic" and inputs is not None and inputs.get("qscheme") == "per_channel",
    )


def _is_static_by_row(inputs: Mapping[str, Any]) -> bool:
    """Stored scales of inputs are one for each layer, in every engine."""
    return not inputs.get("is_dynamic") and inputs.get("qscheme") != "per_tensor"


def _format(weight: Mapping[str, Any]) -> str:
    dtype = str(weight.get("dtype"))
    if dtype == "fp4":
        return {16: "NVFP4", 32: "MXFP4"}.get(weight.get("group_size") or 0, "float4")
    return _FORMATS.get(dtype, dtype)


def _tensor_spec(layer: Mapping[str, Any], key: str) -> Mapping[str, Any] | None:
    """The quantization of a layer's tensor. A list is of several steps (NVFP4: codes, and the scale of their scales):
    the first says what the weights are."""
    stated = layer.get(key)
    if isinstance(stated, list) and stated:
        stated = stated[0]
    if stated is not None and not isinstance(stated, dict):
        raise ConfigError("A scheme is not an object", where=f"{_WHERE}: {key}", found=stated)
    return stated


def _objects(value: dict[str, Any], key: str) -> dict[str, dict[str, Any]]:
    stated = value.get(key) or {}
    if not isinstance(stated, dict) or not all(isinstance(each, dict) for each in stated.values()):
        raise ConfigError(
            "A config of layers is not an object", where=f"{_WHERE}.{key}", expected="{pattern: {…}}", found=stated
        )
    return stated


def _optional_object(value: dict[str, Any], key: str) -> dict[str, Any] | None:
    stated = value.get(key)
    if stated is not None and not isinstance(stated, dict):
        raise ConfigError("A scheme is not an object", where=f"{_WHERE}.{key}", expected="{…}", found=stated)
    return stated
