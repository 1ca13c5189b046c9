"""How checkpoints state their quantization: one file a dialect, each with all that is special about it.

A new dialect is a file here and its class in :data:`DIALECTS`.
"""

from __future__ import annotations

from typing import Any

from rewrite.checkpoint.checkpoint import Checkpoint
from rewrite.quantization.dialects import hf_quant_config
from rewrite.quantization.dialects.base import Dialect
from rewrite.quantization.dialects.compressed_tensors import CompressedTensors
from rewrite.quantization.dialects.fp8 import Fp8
from rewrite.quantization.dialects.modelopt import ModelOpt, ModelOptNvfp4
from rewrite.quantization.dialects.modelopt_mixed import ModelOptMixed
from rewrite.quantization.dialects.other import Other
from rewrite.quantization.dialects.quark import Quark

#: Where loaders look for the quantization part of config.json, in their order (vLLM ``get_quant_config``).
_PLACES = (("quantization_config",), ("text_config", "quantization_config"), ("compression_config",))


DIALECTS: tuple[type[Dialect], ...] = (CompressedTensors, Fp8, ModelOpt, ModelOptMixed, ModelOptNvfp4, Quark)


def config_path(config: dict[str, Any]) -> tuple[str, ...] | None:
    """The keys that lead to the quantization part of ``config.json``, or None where it has none."""
    return next(iter(config_paths(config)), None)


def config_paths(config: dict[str, Any]) -> list[tuple[str, ...]]:
    """The same of every part that some loader may take for the quantization."""
    return [path for path in _PLACES if isinstance(_at(config, path), dict)]


def read_dialect(checkpoint: Checkpoint) -> Dialect:
    """The dialect of a checkpoint. Unknown ones come back as :class:`Other`, which refuses when asked to convert.

    ``config.json`` counts before ``hf_quant_config.json``, as in vLLM and SGLang.
    """
    path = config_path(checkpoint.config.value)
    if path is not None:
        value = _at(checkpoint.config.value, path)
        if Fp8.states(value):
            return Fp8(value, fp4_experts=checkpoint.config.value.get("expert_dtype") == "fp4")
        return dialect_of(value)
    return read_side_dialect(checkpoint) or Other.none()


def read_side_dialect(checkpoint: Checkpoint) -> Dialect | None:
    """What ModelOpt's own ``hf_quant_config.json`` states; None where there is no such file.

    Raises :class:`rewrite.errors.ConfigError` for a file that states nothing.
    """
    file = checkpoint.read_json(hf_quant_config.NAME)
    return None if file is None else dialect_of(hf_quant_config.stated(file))


def dialect_of(value: dict[str, Any]) -> Dialect:
    """The dialect of a quantization part."""
    if "quant_method" not in value and "quant_algo" in value:
        value = {**value, "quant_method": "modelopt"}  # ModelOpt before 0.33 leaves it out
    return next((dialect(value) for dialect in DIALECTS if dialect.states(value)), None) or Other.named(value)


def _at(config: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        config = config.get(key) if isinstance(config, dict) else None
    return config
