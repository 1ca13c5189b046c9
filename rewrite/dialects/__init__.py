"""How checkpoints state their quantisation. One file a dialect; each answers the same questions (:class:`Dialect`)."""

from __future__ import annotations

from typing import Any

from rewrite.checkpoint import Checkpoint, JsonFile
from rewrite.dialects.compressed_tensors import CompressedTensors
from rewrite.dialects.fp8 import Fp8
from rewrite.dialects.modelopt import ModelOpt
from rewrite.dialects.modelopt_mixed import ModelOptMixed
from rewrite.dialects.other import Other
from rewrite.dialects.scheme import Dialect, Layers, Scheme
from rewrite.errors import ConfigError

__all__ = ["Dialect", "Layers", "Other", "Scheme", "config_path", "read_dialect", "read_quant_file"]

#: Where loaders look for the quantisation part of config.json, in their order (vLLM ``get_quant_config``).
_PLACES = (("quantization_config",), ("text_config", "quantization_config"), ("compression_config",))


def config_path(config: dict[str, Any]) -> tuple[str, ...] | None:
    """The keys that lead to the quantisation part of ``config.json``, or None where it has none."""
    return next((path for path in _PLACES if isinstance(_at(config, path), dict)), None)


def read_dialect(checkpoint: Checkpoint) -> Dialect:
    """The dialect of a checkpoint. Unknown ones come back as :class:`Other`, which refuses when asked to convert.

    ``config.json`` counts before ``hf_quant_config.json``, as in vLLM and SGLang.
    """
    path = config_path(checkpoint.config.value)
    if path is not None:
        return _dialect(_at(checkpoint.config.value, path))
    return Other("none", {}) if checkpoint.quant_file is None else read_quant_file(checkpoint.quant_file)


def read_quant_file(file: JsonFile) -> Dialect:
    """The dialect that ModelOpt's own ``hf_quant_config.json`` states."""
    stated = file.value.get("quantization")
    if not isinstance(stated, dict):
        raise ConfigError("The file states no quantisation", where="hf_quant_config.json: quantization", found=stated)
    return _dialect({**stated, "quant_method": "modelopt"})


def _dialect(value: dict[str, Any]) -> Dialect:
    method, algorithm = value.get("quant_method"), value.get("quant_algo")
    if method == "compressed-tensors" or (method is None and "config_groups" in value):
        return CompressedTensors(value)
    if method == "fp8":
        return Fp8(value)
    if method == "modelopt" and algorithm == "FP8":
        return ModelOpt(value)
    if method == "modelopt" and algorithm == "MIXED_PRECISION":
        return ModelOptMixed(value)
    return Other(" ".join(filter(None, [str(method), str(algorithm or "")])), value)


def _at(config: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        config = config.get(key) if isinstance(config, dict) else None
    return config
