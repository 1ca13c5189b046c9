"""ModelOpt's dialect, per-tensor FP8: ``quant_algo: FP8`` and ``ignore`` with globs, in config.json.

Older exports state it in ``hf_quant_config.json`` only, where the list is called ``exclude_modules``. The dialect has
no word for channel scales with static activations: such checkpoints are re-housed as compressed-tensors.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from fnmatch import fnmatchcase
from typing import Any

from rewrite.dialects.compressed_tensors import CompressedTensors, house
from rewrite.dialects.scheme import Layers, Scheme, strings
from rewrite.errors import Unsupported

_WHERE = "config.json: quantization_config"


#: ``quant_algo: FP8``, of a whole checkpoint or of one layer.
PER_TENSOR = Scheme(True, "tensor", "static", "FP8 weights per tensor, static activations")


class ModelOpt:
    """A ``quantization_config`` with ``quant_method: modelopt`` and ``quant_algo: FP8``."""

    name = "modelopt"

    def __init__(self, value: dict[str, Any]) -> None:
        self.value = value
        self._key = "ignore" if "ignore" in value or "exclude_modules" not in value else "exclude_modules"
        self._ignore = strings(value.get(self._key) or [], f"{_WHERE}.{self._key}")

    def scheme(self, module: str) -> Scheme | None:
        if any(fnmatchcase(module, pattern) for pattern in self._ignore):
            return None
        return PER_TENSOR

    def housed(self, layers: Layers) -> CompressedTensors:
        return house(
            layers, [_as_target(pattern, layers) for pattern in self._ignore], "static", self._kv_cache_is_fp8()
        )

    def ignoring(self, _targets: Collection[str], modules: Collection[str], fused: Collection[str]) -> ModelOpt:
        return ModelOpt({**self.value, self._key: [*self._ignore, *modules, *map(_survives_renaming, fused)]})

    def _kv_cache_is_fp8(self) -> bool:
        algorithm = self.value.get("kv_cache_quant_algo")
        scheme = self.value.get("kv_cache_scheme")
        if algorithm not in (None, "FP8"):
            raise Unsupported(
                "This KV-cache quantisation has no compressed-tensors form",
                where=f"{_WHERE}.kv_cache_quant_algo",
                expected="FP8 or none",
                found=algorithm,
                hint="use --profile bf16 or partition, which keep the dialect",
            )
        return algorithm == "FP8" or bool(scheme)


def _survives_renaming(name: str) -> str:
    """A glob for a fused name that none of SGLang's renamings touches.

    SGLang 0.5.9 and 0.5.10 know no parts of ``qkv_proj``, and rename ``model.language_model.`` and ``attn.qkv`` in this
    list, but not in what they look up (``Qwen3VLForConditionalGeneration.hf_to_sglang_mapper``).
    """
    return re.sub(r"^model\.(language_model\.)?", "model.*", name).replace("attn.qkv", "att*.qkv")


def _as_target(glob: str, layers: Layers) -> str:
    """A glob as an ``ignore`` entry. Engines rename ``model.visual`` to ``visual``: the pattern survives that."""
    if not any(character in glob for character in "*?["):
        return glob
    pattern = "re:.*" + "".join(_GLOB.get(c, c) for c in glob.removeprefix("model.").lstrip("*"))
    matched = CompressedTensors.matching([pattern], layers.quantised)
    wanted = [name for name in layers.quantised if fnmatchcase(name, glob)]
    if sorted(matched) != sorted(wanted):
        raise Unsupported(
            "An ignore pattern has no compressed-tensors form",
            where=f"{_WHERE}.ignore",
            found=glob,
            hint="use --profile bf16 or partition, which keep the dialect",
        )
    return pattern


_GLOB = {"*": ".*", "?": ".", ".": r"\.", "(": r"\(", ")": r"\)", "+": r"\+"}
