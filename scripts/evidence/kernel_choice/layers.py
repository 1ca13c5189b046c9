"""Builds one FP8 layer with an engine's own classes, finishes its weights and multiplies with it."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from engines.driver import described

from kernel_choice import operators
from kernel_choice.schemes import SCHEMES, TOKENS

# A small in_proj_qkvz (q, k, v, z): kernels ask for multiples of 16, 64 or 128, not for a size.
HIDDEN, PARTITIONS = 1024, (512, 512, 1024, 1024)
_FUSED = {"in_proj_qkvz": ["in_proj_qkv", "in_proj_z"], "in_proj_ba": ["in_proj_b", "in_proj_a"]}
_PREFIX = "model.layers.0.linear_attn.in_proj_qkvz"
# Where both engines have the class that reads a config, by quant_method.
_CONFIGS = {
    "compressed-tensors": ("compressed_tensors.compressed_tensors", "CompressedTensorsConfig"),
    "modelopt": ("modelopt", "ModelOptFp8Config"),
    "quark": ("quark.quark", "QuarkConfig"),
    "fp8": ("fp8", "Fp8Config"),
}
Cell = dict[str, Any]
T = TypeVar("T")


def cells(package: str, arguments: dict[str, Any], *, modelopt: str = "modelopt") -> list[Cell]:
    """Two cells for each scheme, 32 tokens and 1: what was called, or what was raised. ``package`` has the engine's
    layers, ``arguments`` are for the layer's constructor, ``modelopt`` is the module of that dialect."""
    engine = package.partition(".")[0]
    return [
        cell
        for scheme in SCHEMES
        for cell in of_scheme(scheme, engine, partial(_build, scheme, package, arguments, modelopt), _multiply)
    ]


def of_scheme(scheme: str, engine: str, build: Callable[[], T], multiply: Callable[[T, int, str], Cell]) -> list[Cell]:
    """The cells of a scheme: what is built is multiplied with each number of tokens."""
    layer, error = attempt(build, engine)
    if layer is None:
        return [{"scheme": scheme, "tokens": tokens, "outcome": "not built", "error": error} for tokens in TOKENS]
    return [{"scheme": scheme, "tokens": tokens, **multiply(layer, tokens, engine)} for tokens in TOKENS]


def _build(scheme: str, package: str, arguments: dict[str, Any], modelopt: str) -> Any:
    """The layer, every parameter 1: as an engine has it once a checkpoint is loaded."""
    method = SCHEMES[scheme]["quant_method"]
    module, name = _CONFIGS[method]
    module = modelopt if method == "modelopt" else module
    stored = SCHEMES[scheme] | {"packed_modules_mapping": _FUSED}  # SGLang's loader adds it
    config = getattr(importlib.import_module(f"{package}.quantization.{module}"), name).from_config(stored)
    config.packed_modules_mapping = _FUSED
    kind = importlib.import_module(f"{package}.linear").MergedColumnParallelLinear
    given = {"bias": False, "params_dtype": torch.bfloat16, "quant_config": config, "prefix": _PREFIX, **arguments}
    layer = kind(HIDDEN, list(PARTITIONS), **given)
    for parameter in layer.parameters():
        parameter.data.copy_(torch.ones(1).to(parameter.dtype).expand_as(parameter))
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def _multiply(layer: Any, tokens: int, engine: str) -> Cell:
    operators.CALLS.clear()
    out, error = attempt(lambda: layer.quant_method.apply(layer, torch.ones(tokens, HIDDEN)), engine)
    kernel = _kernel(layer)
    if out is None:
        return {"outcome": "raises", "kernel": kernel, "error": error}
    if tuple(out.shape) != (tokens, sum(PARTITIONS)):
        raise RuntimeError(f"{kernel}: output of shape {tuple(out.shape)}")
    return {"outcome": "runs", "kernel": kernel, "operators": list(operators.CALLS)}


def _kernel(layer: Any) -> str:
    """The class that the engine chose: a kernel's where it has such classes, else a scheme's or a method's."""
    owner = getattr(layer, "scheme", None) or layer.quant_method
    chosen = (type(value).__name__ for value in vars(owner).values())
    return next((name for name in chosen if name.endswith("Kernel")), type(owner).__name__)


def attempt(action: Callable[[], T], engine: str) -> tuple[T | None, dict[str, str] | None]:
    """Broad, because whatever an engine raises is the result."""
    try:
        return action(), None
    except Exception as error:
        traceback.print_exc()
        return None, described(error, (engine, "kernel_choice"))


def replace(package: str, **functions: Any) -> None:
    """In every module of the package that has a function of that name."""
    import sys

    for module in [each for name, each in sys.modules.items() if name.startswith(f"{package}.")]:
        for name in functions.keys() & vars(module).keys():
            setattr(module, name, functions[name])
