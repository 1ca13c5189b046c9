"""Loads a checkpoint with the inference engine of this Python and measures what the engine made of it.

`rewrite try` sends this file into the engine's own Python (``python -c FILE REQUEST``). It imports nothing but the
standard library, torch, safetensors and the engine, and knows no model family. The model is loaded twice, by the
engine's own classes: as it is, through the whole loader; and without quantization, from weights that are dequantized
here. The second is the truth, fused, stacked and sliced by the engine itself. Both are compared parameter by parameter,
and below the loader a recorder sees which tensor of the checkpoint went where.

Standard output has a JSON document on every line: progress, then the result. Whatever the engine prints goes to
standard error. Verdicts are not made here: this file measures.
"""

from __future__ import annotations

import abc
import bisect
import contextlib
import dataclasses
import functools
import gc
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import json
import math
import os
import re
import resource
import sys
import tempfile
import time
import traceback
import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

Result = dict[str, Any]
Weights = Iterable[tuple[str, torch.Tensor]]
FP8 = torch.float8_e4m3fn
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
ONE = torch.ones(())
EXPONENTS = (torch.uint8, torch.float8_e8m0fnu)
CODES = (FP8, torch.float8_e5m2, torch.int8, torch.uint8, torch.int32)
LARGE = 1 << 26  # elements
WORDS = 1024  # of a vocabulary that is cut
LAYER = re.compile(r"^(.*?\b(?:layers|h|blocks))\.(\d+)\.")
#: Tensors that say how another one is to be read, or how activations and caches are quantized.
SIDE = re.compile(
    r"(?:_scale|_scales|_scale_inv|_scale_2|_global_scale|_zero_point|_shape|_g_idx|\binput_scale|\binput_global_scale)$"
)

#: Scales of an FP8 KV cache, of one layer: of keys, of values, or of both.
CACHE = re.compile(
    r".*\b(?:layers|h|blocks)\.(\d+)\..*(?:attn|mixer)\.(?:.*\.)?(?:(k|v|kv)_scale|([kv])_proj\.output_scale)"
)


class Lacking(Exception):
    """Nothing can be learnt with this engine: it is not there, or this version lacks what this file needs."""


# --- what the files mean --------------------------------------------------------------------------------------------


class Checkpoint:
    """The tensors of a checkpoint and what they mean, by dtypes and the names of their neighbors alone. ``layers``
    leaves out all others of the stack ``stack``; ``cut``: of a large vocabulary only the first words are taken."""

    def __init__(
        self, folder: Path, stack: str = "", layers: Sequence[int] | None = None, *, cut: bool = False
    ) -> None:
        self.folder = folder
        self._stack, self._layers = stack, None if layers is None else frozenset(layers)
        index = folder / "model.safetensors.index.json"
        named = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else None
        files = sorted(path.name for path in folder.glob("*.safetensors") if named is None or path.name in named)
        self._files = {name: safe_open(str(folder / name), "pt") for name in files}
        self.shards = {tensor: name for name, file in self._files.items() for tensor in file.keys()}  # noqa: SIM118
        self.config = json.loads((folder / "config.json").read_text())
        found = re.findall(r'"(?:weight_block_size|block_structure)": \[(\d+), (\d+)\]', json.dumps(self.config))
        self.block = (int(found[0][0]), int(found[0][1])) if found else None
        self.meaningless: dict[str, str] = {}  # quantized tensors that the files do not explain
        self.vocabulary = self._large_vocabulary() if cut else None  # its size, where it is cut
        self.cuts: Mapping[str, Sequence[int]] = {}

    def names(self) -> list[str]:
        return [name for name in self.shards if self._wanted(name)]

    def _wanted(self, name: str) -> bool:
        at = LAYER.match(name)
        return self._layers is None or at is None or at[1] != self._stack or int(at[2]) in self._layers

    def get(self, name: str) -> torch.Tensor:
        stored, (whole, rows) = self._files[self.shards[name]], self._rows(name)
        tensor: torch.Tensor = stored.get_tensor(name) if rows == whole else stored.get_slice(name)[:rows]
        return tensor

    def _find(self, *names: str) -> torch.Tensor | None:
        """The first of these that there is."""
        return next((self.get(name) for name in names if name in self.shards), None)

    def _multiplier(self, name: str, divisor: str) -> torch.Tensor | None:
        """In compressed-tensors global scales of NVFP4 are divisors."""
        factor, inverse = self._find(name), self._find(divisor)
        return factor.float() if factor is not None else None if inverse is None else 1 / inverse.float()

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[self.shards[name]].get_slice(name).get_shape())

    def _large_vocabulary(self) -> int | None:
        """The size that the config states and a large table of words has; None where there is no such table."""
        stated = {int(size) for size in re.findall(r'"vocab_size": (\d+)', json.dumps(self.config))}
        tables = (self._shape(name) for name in self.shards if LAYER.match(name) is None)
        return next((shape[0] for shape in tables if shape and shape[0] in stated and math.prod(shape) >= LARGE), None)

    def _rows(self, name: str) -> tuple[int, int]:
        """How many rows a tensor has, and how many are taken: a cut vocabulary has fewer, and so have its scales."""
        whole = (*self._shape(name), 0)[0]
        if self.vocabulary is None or LAYER.match(name):
            return whole, whole
        high = self.block[0] if self.block else 1
        if SIDE.search(name) and whole == -(-self.vocabulary // high):
            return whole, -(-WORDS // high)
        return whole, WORDS if whole == self.vocabulary else whole

    def is_quantized(self, name: str) -> bool:
        """Whether this is a weight in codes."""
        if name not in self.shards or SIDE.search(name):
            return False
        kind = self._files[self.shards[name]].get_slice(name).get_dtype()
        return kind.startswith("F8") or (kind in ("U8", "I8", "I32") and self._scale(name) is not None)

    def stored(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All wanted tensors, as they lie there."""
        return ((name, self.get(name)) for name in self.names())

    def plain(self, *, whole: bool) -> Iterator[tuple[str, torch.Tensor]]:
        """What the same model would be stored as without quantization, one tensor at a time: what was quantized in F32.
        Not ``whole``: without large tables of words, which nothing is compared with."""
        for name in self.names():
            wanted = not SIDE.search(name) and (whole or not self._is_large_table(name))
            if wanted and (tensor := self._dequantized(name)) is not None:
                yield re.sub(r"(?<=weight)_packed$|_blocks$", "", name), tensor

    def _is_large_table(self, name: str) -> bool:
        if LAYER.match(name) or self.is_quantized(name):
            return False
        return math.prod((self._rows(name)[1], *self._shape(name)[1:])) >= LARGE

    def input_scale(self, name: str) -> float | None:
        """The multiplier of the activations of a weight."""
        stem = name.removesuffix("_packed").removesuffix("weight")
        scale = self._multiplier(f"{stem}input_scale", f"{stem}input_global_scale")
        return None if scale is None else float(scale.max())

    def cache_scales(self) -> dict[str, dict[str, float]]:
        """What the files say, by the number of the layer, of caches with one scale."""
        found: dict[str, dict[str, float]] = {}
        for name in self.names():
            at = CACHE.fullmatch(name)
            if at is not None and (scale := self.get(name)).numel() == 1:
                found.setdefault(at[1], {}).update(dict.fromkeys(at[2] or at[3], float(scale.float())))
        return found

    def _scale(self, name: str) -> torch.Tensor | None:
        if name.endswith("_blocks"):  # of gpt-oss
            return self._find(f"{name.removesuffix('_blocks')}_scales")
        stem = name.removesuffix("_packed")
        return self._find(f"{stem}_scale", f"{stem}_scale_inv")

    def _dequantized(self, name: str) -> torch.Tensor | None:
        weight, scale = self.get(name), self._scale(name)
        if weight.dtype not in CODES:
            return weight
        if scale is None:
            if weight.dtype in (torch.int32, torch.uint8, torch.int8):  # no weight: a counter, a mask
                return weight
            self.meaningless[name] = "FP8 codes without a scale"
            return None
        try:
            return self._multiplied(weight, scale, name.removesuffix("_packed"))
        except (ValueError, RuntimeError) as error:
            self.meaningless[name] = str(error)
            return None

    def _multiplied(self, weight: torch.Tensor, scale: torch.Tensor, stem: str) -> torch.Tensor:
        factor = self._multiplier(f"{stem}_scale_2", f"{stem}_global_scale")
        if weight.dtype == torch.uint8 and factor is not None:
            return fp4(weight, scale, factor)
        if weight.dtype == torch.uint8 and scale.dtype in EXPONENTS and stem.endswith("_blocks"):
            return fp4(weight.flatten(-2), multipliers(scale)).transpose(-1, -2)
        if weight.dtype == torch.uint8 and scale.dtype in EXPONENTS:
            return fp4(weight, multipliers(scale))
        if weight.dtype == torch.int32 and f"{stem}_shape" in self.shards:
            return int4(weight, scale)
        if weight.dtype in (torch.uint8, torch.int32):
            raise ValueError(f"a format that is not read: {weight.dtype} with scales {list(scale.shape)}")
        return weight.float() * spread(multipliers(scale), weight.shape, self.block)


def multipliers(scale: torch.Tensor) -> torch.Tensor:
    """Scales of the MX formats are exponents of 2."""
    return torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()


def by_group(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Values times a scale for every few of a row."""
    grouped = values.reshape(*values.shape[:-1], scale.shape[-1], -1)
    return (grouped * scale.float().unsqueeze(-1)).flatten(-2)


def int4(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Eight codes a word, the first in the lowest bits; 8 is zero."""
    values = codes.unsqueeze(-1) >> torch.arange(0, 32, 4, device=codes.device) & 15
    return by_group(values.flatten(-2).float() - 8, scale)


def fp4(codes: torch.Tensor, blocks: torch.Tensor, factor: torch.Tensor = ONE) -> torch.Tensor:
    """Two E2M1 codes a byte. NVFP4: an E4M3 scale for every 16, one F32 for the matrix, or for each of a stack."""
    values = E2M1.to(codes.device)[torch.stack([codes & 15, codes >> 4], -1).flatten(-2).long()]
    weight = by_group(values, blocks)
    return weight * (factor.reshape(()) if factor.numel() == 1 else factor.reshape(-1, *[1] * (codes.ndim - 1)))


def spread(scale: torch.Tensor, shape: Sequence[int], block: tuple[int, int] | None) -> torch.Tensor:
    """Scales that weights [..., N, K] can be multiplied with, from one, or one for each matrix, row or block."""
    lead, (rows, columns) = tuple(shape[:-2]), shape[-2:]
    matrices = torch.Size(lead).numel()
    if scale.numel() == 1:
        return scale.reshape([1] * len(shape))
    by_block = block and tuple(scale.shape[-2:]) == (-(-rows // block[0]), -(-columns // block[1]))
    if block and by_block and scale.ndim == len(shape):
        scale = scale.repeat_interleave(block[0], -2)[..., :rows, :]
        return scale.repeat_interleave(block[1], -1)[..., :columns]
    if scale.ndim == len(shape) and scale.shape[-2] == rows and columns % scale.shape[-1] == 0:
        return scale.repeat_interleave(columns // scale.shape[-1], -1)
    if scale.numel() == rows * matrices:
        return scale.reshape(*lead, rows, 1)
    if lead and scale.numel() == matrices:
        return scale.reshape(*lead, 1, 1)
    raise ValueError(f"a scale of shape {list(scale.shape)} for a weight of shape {list(shape)}")


# --- which tensor went where ----------------------------------------------------------------------------------------

Place = tuple[tuple[int, ...], tuple[int, ...], int]  # shape, stride, offset in a parameter's memory


class Recorder(TorchDispatchMode):
    """Which tensor of the checkpoint filled which part of which parameter: seen at torch's operators, below any loader.

    Tensors are known by where they lie in memory. What an operator makes of a known tensor is known, too.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.given: set[str] = set()
        self.used: set[str] = set()
        self.writes: dict[str, list[tuple[frozenset[str], Place]]] = {}
        self.coverage: dict[str, tuple[int, int, int]] = {}  # never written, written twice or more, all
        self.communicated = False
        self.operators = 0
        self._model = model
        self._starts: list[int] = []
        self._ranges: dict[int, tuple[int, frozenset[str]]] = {}
        self._scalars: dict[float, frozenset[str]] = {}
        self._homes: dict[int, tuple[str, torch.Tensor]] = {}
        for name, held in model.named_parameters(remove_duplicate=False):
            if held.numel() and held.device.type != "meta":
                self._homes.setdefault(held.untyped_storage().data_ptr(), (name, held))

    def watch(self, weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
        """The same weights, known by name from here on."""
        for name, tensor in weights:
            self.given.add(name)
            with _disable_current_modes():
                tensor = tensor.contiguous()  # noqa: PLW2901
            if tensor.numel():
                size = tensor.numel() * tensor.element_size()
                self._put(tensor.data_ptr(), tensor.data_ptr() + size, frozenset([name]))
            yield name, tensor

    def finish(self) -> None:
        """Parameters that were given other memory count as written as a whole; then all are counted."""
        for name, held in self._model.named_parameters(remove_duplicate=False):
            fresh = held.untyped_storage().data_ptr() not in self._homes
            if fresh and (names := self._of(held)):
                self.used |= names
                self.writes.setdefault(name, []).append((names, (tuple(held.shape), tuple(held.stride()), 0)))
        for name, home in self._homes.values():
            count = torch.zeros(home.untyped_storage().nbytes() // home.element_size(), dtype=torch.uint8)
            for names, place in self.writes.get(name, ()):
                if names:
                    view = count.as_strided(*place)
                    view += 1
            self.coverage[name] = int((count == 0).sum()), int((count > 1).sum()), count.numel()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operators += 1
        name = func._schema.name
        self.communicated |= name.startswith(("c10d::", "_c10d_functional::"))
        tensors = [each for each in tree_leaves((args, kwargs or {})) if isinstance(each, torch.Tensor)]
        if name == "aten::_local_scalar_dense":
            self._scalars = {float(out): self._of(args[0])}
        elif name.endswith("_") and not name.endswith("__") and tensors:
            known = self._scalars.get(float(args[1])) if name == "aten::fill_" and len(tensors) == 1 else None
            self._wrote(tensors[0], (known or frozenset()).union(*map(self._of, tensors[1:])))
        else:
            self._made(tree_leaves(out), tensors)
        return out

    def _made(self, made: Sequence[Any], of: Sequence[torch.Tensor]) -> None:
        names = frozenset[str]().union(*map(self._of, of))
        views = {each.untyped_storage().data_ptr() for each in of if each.device.type != "meta"}
        for each in made:
            if isinstance(each, torch.Tensor) and each.device.type != "meta" and each.numel():
                memory = each.untyped_storage()
                if memory.data_ptr() not in views:
                    self._put(memory.data_ptr(), memory.data_ptr() + memory.nbytes(), names)

    def _wrote(self, target: torch.Tensor, names: frozenset[str]) -> None:
        if target.device.type == "meta" or not target.numel():
            return
        memory = target.untyped_storage()
        home = self._homes.get(memory.data_ptr())
        if home is not None:
            self.used |= names
            place = tuple(target.shape), tuple(target.stride()), int(target.storage_offset())
            self.writes.setdefault(home[0], []).append((names, place))
        elif names:
            self._put(memory.data_ptr(), memory.data_ptr() + memory.nbytes(), names | self._of(target))

    def _put(self, start: int, end: int, names: frozenset[str]) -> None:
        at = max(bisect.bisect_right(self._starts, start) - 1, 0)
        while at < len(self._starts) and self._starts[at] < end:
            if self._ranges[self._starts[at]][0] > start:
                del self._ranges[self._starts.pop(at)]
            else:
                at += 1
        if names:
            bisect.insort(self._starts, start)
            self._ranges[start] = end, names

    def _of(self, tensor: torch.Tensor) -> frozenset[str]:
        if tensor.device.type == "meta" or not tensor.numel():
            return frozenset()
        at = bisect.bisect_right(self._starts, tensor.data_ptr()) - 1
        if at < 0 or self._ranges[self._starts[at]][0] <= tensor.data_ptr():
            return frozenset()
        return self._ranges[self._starts[at]][1]


# --- what the engine holds ------------------------------------------------------------------------------------------


_IN_CODES = ("nvfp4", "mxfp4", "int4", "float8_e4m3fn", "float8_e5m2", "int8")  # kinds of weights


def held_weight(
    module: Any, attribute: str, shape: torch.Size, block: tuple[int, int] | None
) -> tuple[torch.Tensor | None, str]:
    """The F32 weight that a loaded module holds, by what lies beside it, and its kind; None and the reason where that
    can't be read."""
    weight = _tensor(module, attribute, f"{attribute}_packed")
    if weight is None or weight.numel() == 0:
        return None, "the engine repacked it"
    if weight.dtype not in CODES:
        plain = next((each for each in (weight, weight.transpose(-1, -2)) if each.shape == shape), None) \
            if weight.ndim > 1 else weight if weight.shape == shape else None  # fmt: skip
        return (None, "another shape") if plain is None else (plain.float(), _kind(weight))
    scale = _tensor(module, f"{attribute}_scale", f"{attribute}_scale_inv")
    if scale is None:
        return None, "no scale beside it"
    if weight.dtype in (torch.uint8, torch.int32):
        return _held_fp4(module, attribute, shape, weight, scale)
    # A square weight's shape does not tell; its memory does: engines transpose by a view.
    is_view = weight.ndim == 2 and weight.t().is_contiguous() and not weight.is_contiguous()
    if weight.shape != shape or is_view:
        weight = weight.transpose(-1, -2)
    try:
        if weight.shape != shape:
            raise ValueError("another shape")
        return weight.float() * spread(multipliers(scale), shape, block), _kind(weight)
    except ValueError as error:
        return None, str(error)


def _held_fp4(
    module: Any, attribute: str, shape: torch.Size, weight: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor | None, str]:
    factors = f"{attribute}_global_scale", f"{attribute}_scale_2"
    # A stack of experts may keep the divisors that it was loaded with beside the multipliers that it uses.
    factor = _tensor(module, *(factors if len(shape) == 2 else reversed(factors)))
    if factor is None:
        return _held_groups(shape, weight, scale)
    blocks = (*shape[:-1], shape[-1] // 16)
    if tuple(scale.shape) != blocks or 2 * weight.shape[-1] != shape[-1] or weight.ndim < 2:
        return None, "in an order of a kernel"
    if factor.numel() not in (1, torch.Size(shape[:-2]).numel()):
        return None, "several global scales"
    inverse = hasattr(module, f"{attribute}_packed") and not hasattr(module, f"{attribute}_scale_2")
    return fp4(weight, scale, 1 / factor.float() if inverse else factor.float()), "nvfp4"


def _held_groups(shape: torch.Size, weight: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor | None, str]:
    """Codes with a scale for each group and nothing else: MXFP4, INT4. Experts may be held by columns."""
    ratio, kind = (2, "mxfp4") if weight.dtype == torch.uint8 else (8, "int4")
    if kind == "mxfp4" and scale.dtype not in EXPONENTS:
        return None, "in an order of a kernel"
    for held, scales in ((weight, scale), (weight.transpose(-1, -2), scale.transpose(-1, -2))):
        if held.ndim > 1 and (*held.shape[:-1], held.shape[-1] * ratio) == shape and scales.shape[:-1] == shape[:-1]:
            if kind == "int4":
                return int4(held, scales), kind
            return fp4(held, multipliers(scales)), kind
    return None, "in an order of a kernel"


def _kind(weight: torch.Tensor) -> str:
    return str(weight.dtype).removeprefix("torch.")


def _tensor(module: Any, *names: str) -> torch.Tensor | None:
    found = (getattr(module, name, None) for name in names)
    return next((each.detach() for each in found if isinstance(each, torch.Tensor)), None)


def through_kernel(module: Any, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor | None:
    """The weight that the engine's kernel multiplies with: its product with an identity matrix, of a size that the
    quantization of activations keeps exactly. None where the module has no such method."""
    method = getattr(module, "quant_method", None)
    if len(shape) != 2 or not hasattr(method, "apply"):
        return None
    size = 1.0
    for name, code in (("input_scale", 64), ("input_global_scale", 96)):
        scale = _tensor(module, name)
        if scale is not None and scale.numel() == 1 and torch.isfinite(scale.float()).all():
            size = code * float(scale)
    device = next(module.parameters()).device
    eye = (torch.eye(shape[1], device=device) * size).to(dtype)
    with torch.no_grad():
        product: torch.Tensor = method.apply(module, eye)  # type: ignore[union-attr]
    return product.float().t() / float(eye[0, 0])


def compare(loaded: Loaded, plain: Loaded, source: Checkpoint, dtype: torch.dtype) -> list[Result]:
    """A row for every parameter of the plain model that the loader filled from the checkpoint."""
    modules = dict(loaded.model.named_modules())
    rows = []
    for name, module in plain.model.named_modules():
        for attribute, truth in module.named_parameters(recurse=False):
            full = f"{name}.{attribute}".lstrip(".")
            writes = plain.writes(full, truth)
            unset = plain.recorder is None and _may_be_unset(full, source)
            if writes and name in modules and not unset:
                rows.append(_row(modules[name], full, attribute, truth.detach(), writes, source, dtype))
    return rows


def _may_be_unset(name: str, source: Checkpoint) -> bool:
    """Whether a parameter of the plain model may be of a tensor that the files do not explain: transformers fills such
    ones with random numbers, which are no truth."""
    explained = name in source.shards and name not in source.meaningless
    return bool(source.meaningless) and not explained


def _row(
    module: Any,
    full: str,
    attribute: str,
    truth: torch.Tensor,
    writes: Sequence[tuple[frozenset[str], Place]],
    source: Checkpoint,
    dtype: torch.dtype,
) -> Result:
    sources = sorted({name for names, _ in writes for name in names})
    stored = [n for name in sources for n in (name, f"{name}_packed", f"{name}_blocks") if n in source.shards]
    quantized = [name for name in stored if source.is_quantized(name)]
    held, kind = held_weight(module, attribute, truth.shape, source.block)
    # An engine may quantize what the files do not; and what it renamed without a recorder may be of quantized tensors.
    codes = _tensor(module, attribute, f"{attribute}_packed")
    cast = bool(stored) and not quantized and codes is not None and codes.numel() > 0 and codes.dtype in CODES
    row: Result = {
        "module": full.rpartition(".")[0], "parameter": attribute, "shape": list(truth.shape), "held": kind,
        "sources": len(sources), "judged": bool(quantized) or cast or (not stored and truth.ndim > 1), "cast": cast,
        "parts": [], "kernel": [], "kernel_error": None,
        "read": held is not None, "input_scale": _input_scale(module, attribute, quantized, source),
    }  # fmt: skip
    if held is not None:
        exact = truth.float() if kind in _IN_CODES else truth.to(getattr(torch, kind)).float()
        if truth.dtype != torch.float32:  # a reference in fewer bits
            held = held.to(truth.dtype).float()
        regions = list(_cut(writes, math.prod(truth.shape[-2:]), source.cuts))
        row["parts"] = _parts(held.to(exact.device) - exact, exact, regions)
    if (quantized or cast) and attribute == "weight":
        try:
            product = through_kernel(module, truth.shape, dtype)
        except Exception as error:  # whatever a kernel raises is what was to be found out
            row["kernel_error"] = described(error)["message"]
        else:
            if product is not None and product.shape == truth.shape:
                row["kernel"] = _parts(product.to(truth.device) - truth, truth, writes)
    return row


def _parts(
    difference: torch.Tensor, truth: torch.Tensor, writes: Sequence[tuple[frozenset[str], Place]]
) -> list[Result]:
    """The relative error in each region that the loader wrote; of a stack of experts the worst one of each kind."""
    found: dict[Any, Result] = {}
    flat, true = difference.float().contiguous().flatten(), truth.float().contiguous().flatten()
    for names, place in writes:
        size, error = float(true.as_strided(*place).norm()), float(flat.as_strided(*place).norm())
        error = error / size if size else error
        start = place[2] // (truth.stride(0) or 1) if truth.ndim < 3 else 0
        rows = [start, start + place[0][0]] if truth.ndim == 2 and len(place[0]) == 2 else None
        for name in names:
            key = (re.sub(r"\d+", "N", name), tuple(rows or ()))
            if key not in found or math.isnan(error) or error > found[key]["error"]:
                found[key] = {"tensor": name, "rows": rows, "error": error}
    parts = sorted(found.values(), key=lambda part: (part["rows"] or [0], part["tensor"]))
    return [{**part, "error": number(part["error"])} for part in parts]


def _cut(
    writes: Sequence[tuple[frozenset[str], Place]], matrix: int, cuts: Mapping[str, Sequence[int]]
) -> Iterator[tuple[frozenset[str], Place]]:
    """The same regions, of matrices of ``matrix`` elements; where all of a tensor was written at once, one for each of
    its shares."""
    count = Counter((names, place[2] // matrix) for names, place in writes)
    for names, (size, stride, offset) in writes:
        last = next(iter(names)).removesuffix(".weight").rpartition(".")[2]
        shares = cuts.get(last, ()) if count[names, offset // matrix] == 1 else ()
        for share in shares:
            rows = size[0] * share // sum(shares)
            yield names, ((rows, *size[1:]), stride, offset)
            offset += rows * stride[0]  # noqa: PLW2901
        if not shares:
            yield names, (size, stride, offset)


def cache_scales(model: torch.nn.Module) -> dict[str, dict[str, float | str]]:
    """What attention layers scale their caches of keys and values by."""
    found: dict[str, dict[str, float | str]] = {}
    for name, held in model.named_modules():
        for which in ("k", "v"):
            scale = _tensor(held, f"_{which}_scale", f"{which}_scale")
            if scale is not None and scale.numel() == 1:
                found.setdefault(name, {})[which] = number(float(scale.float()))
    return found


def _input_scale(module: Any, attribute: str, quantized: Sequence[str], source: Checkpoint) -> Result | None:
    """What the files say of the layer's activations and what the engine holds; None where the files say nothing."""
    stated = [scale for name in quantized if (scale := source.input_scale(name)) is not None]
    if not stated:
        return None
    held = _tensor(module, attribute.replace("weight", "input_scale"))
    if held is None:
        held = _tensor(module, attribute.replace("weight", "input_global_scale"))
        if held is not None and hasattr(module, f"{attribute}_packed"):
            held = 1 / held.float()
    if held is None:
        return {"stated": max(stated), "served": None}
    served = held.float().flatten().sort().values.cpu()
    if attribute != "weight" and torch.allclose(served, torch.tensor(stated).sort().values):
        served = served[-1:]  # a stack: each expert has its own
    return {"stated": max(stated), "served": [number(float(served[0])), number(float(served[-1]))]}


def number(value: float) -> float | str:
    """JSON has no NaN and no infinity: these become words."""
    return value if math.isfinite(value) else str(value)


# --- engines --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Loaded:
    """A model that an engine loaded, and what the recorder saw; None where nothing could be recorded."""

    model: torch.nn.Module
    recorder: Recorder | None
    missing: Sequence[str] = ()  # what the engine itself found nothing for

    def empty(self) -> dict[str, tuple[int, int]]:
        """Parameters that the checkpoint has nothing for, or not enough: elements never filled, all of them. The end of
        a vocabulary is padding."""
        held = dict(self.model.named_parameters(remove_duplicate=False))
        if self.recorder is None:
            return {name: (held[name].numel(),) * 2 for name in self.missing if name in held}
        found = {}
        for name, (missing, _, count) in self.recorder.coverage.items():
            module = self.model.get_submodule(name.rpartition(".")[0])
            if missing and (missing == count or not hasattr(module, "org_vocab_size")):
                found[name] = missing, count
        return found

    def filled(self) -> set[str]:
        covered = self.recorder.coverage if self.recorder else {}
        return {name for name, (missing, *_) in covered.items() if not missing}

    def writes(self, name: str, held: torch.Tensor) -> Sequence[tuple[frozenset[str], Place]]:
        """What was written into a parameter from the checkpoint; without a recorder: all of it, matrix by matrix."""
        if self.recorder is None:
            matrices = held.flatten(0, -3) if held.ndim > 2 else held.unsqueeze(0)
            stride, size = tuple(matrices[0].contiguous().stride()), matrices[0].numel()
            return [(frozenset([name]), (tuple(matrices[0].shape), stride, n * size)) for n in range(len(matrices))]
        return [(names, place) for names, place in self.recorder.writes.get(name, ()) if names]


def _at_once(_: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
    """Runs in this thread what a loader gives to others, whose operators no recorder sees."""
    future: Future[Any] = Future()
    try:
        future.set_result(function(*args, **kwargs))
    except Exception as error:  # the loader asks the future for it
        future.set_exception(error)
    return future


class Engine(abc.ABC):
    """What this file needs of an engine. ``replaced`` says which parts of it are stood in for, on a CPU."""

    name = ""
    package = ""
    splits = True  # whether it can build some layers of a model only

    def __init__(self, request: Mapping[str, Any]) -> None:
        self.replaced: list[str] = []
        self.rank, self.world = int(request.get("rank", 0)), int(request.get("world", 1))
        self.trust = bool(request.get("trust_remote_code"))
        self.layers: tuple[int, int] | None = None
        self.phase = "starting"
        self._up = False

    @abc.abstractmethod
    def start(self) -> str:
        """Import the engine; its version."""

    @abc.abstractmethod
    def load(self, folder: Path, dtype: str, weights: Weights | None, *, finish: bool) -> Loaded:
        """Load a model: from ``weights`` where they are given, else from the folder's files; ``finish``: prepare them
        for the kernels as well."""

    def stage(self, count: int, *_: Any) -> tuple[int, int]:
        """Stands in for the engine's own split of a model into pipeline stages: this one has ``layers``."""
        return (0, count) if self.layers is None else (self.layers[0], min(self.layers[1] + 1, count))

    @contextlib.contextmanager
    def watched(self, model: Any, weights: Weights | None, into: list[Recorder]) -> Iterator[None]:
        """Let the model's own ``load_weights`` be recorded."""
        own = model.load_weights

        def load_weights(given: Weights, *args: Any, **kwargs: Any) -> Any:
            recorder = Recorder(model)
            into.append(recorder)
            self.phase = "reading weights"
            with recorder, patch.object(ThreadPoolExecutor, "submit", _at_once):
                out = own(recorder.watch(given if weights is None else weights), *args, **kwargs)
            recorder.finish()
            self.phase = "preparing weights"
            return out if weights is None else None  # else vLLM misses what was left out

        model.load_weights = load_weights
        try:
            yield
        finally:
            del model.load_weights

    def replace(self, what: str, *steps: Callable[[], Any]) -> None:
        """Replace parts that a CPU build lacks; a part that this version does not have needs no replacing."""
        done = 0
        for step in steps:
            with suppress(ImportError, AttributeError):
                step()
                done += 1
        if done:
            self.replaced.append(what)


def module(name: str) -> Any:
    return importlib.import_module(name)


def nothing(*_: Any, **__: Any) -> None:
    """Stands in for what need not happen."""


def put(name: str, values: Mapping[str, Any]) -> Callable[[], None]:
    """A step that sets attributes of a module, or of classes in it, up to the first one whose class is not there."""

    def step() -> None:
        for attribute, value in values.items():
            *owners, last = attribute.split(".")
            setattr(functools.reduce(getattr, owners, module(name)), last, value)

    return step


def scaled_fp8_quant(values: Any, scale: Any = None, *_: Any, use_per_token_if_dynamic: bool = False, **__: Any) -> Any:
    """Quantizes to FP8, as the engines' CUDA kernels do: value / scale, clamped, rounded to nearest even."""
    largest, values = torch.finfo(FP8).max, values.float()
    if scale is None and use_per_token_if_dynamic:
        scale = values.abs().amax(-1, keepdim=True) / largest
    elif scale is None:
        scale = (values.abs().max() / largest).reshape(1)
    return (values / scale.float()).clamp(-largest, largest).to(FP8), scale


class Vllm(Engine):
    name, package = "vLLM", "vllm"

    def start(self) -> str:
        for key, value in {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}.items():
            os.environ.setdefault(key, value)
        if not torch.cuda.is_available():
            self._on_cpu()
        version = str(module("vllm").__version__)
        # Asks a model's class what it can do in a new process (20 s for each); nothing here minds CUDA in this one.
        with suppress(AttributeError):
            module("vllm.model_executor.models.registry")._run_in_subprocess = lambda ask: ask()
        module("vllm.distributed.utils").get_pp_indices = self.stage
        return version

    def load(self, folder: Path, dtype: str, weights: Weights | None, *, finish: bool) -> Loaded:
        self.phase = "reading the config"
        arguments = module("vllm.engine.arg_utils").EngineArgs
        known = inspect.signature(arguments).parameters
        asked = {
            "model": str(folder), "tokenizer": str(folder), "skip_tokenizer_init": True, "enforce_eager": True,
            "max_model_len": 128, "dtype": dtype, "language_model_only": True, "tensor_parallel_size": self.world,
            "trust_remote_code": self.trust,
        }  # fmt: skip
        config = arguments(**{key: value for key, value in asked.items() if key in known}).create_engine_config()
        loaders = "vllm.model_executor.model_loader"
        loader, base = module(f"{loaders}.default_loader").DefaultModelLoader, module(f"{loaders}.base_loader")
        stock, process = loader.load_weights, base.process_weights_after_loading
        into: list[Recorder] = []

        def load_weights(own: Any, model: Any, model_config: Any) -> None:
            with self.watched(model, weights, into):
                stock(own, model, model_config)

        with (
            patch.object(loader, "load_weights", load_weights),
            patch.object(base, "process_weights_after_loading", process if finish else nothing),
            module("vllm.config").set_current_vllm_config(config),
        ):
            self._join()
            self.phase = "building the model"
            return Loaded(module(loaders).get_model(vllm_config=config), into[0])

    def _join(self) -> None:
        """One process, as one rank of several: torch's fake process group answers for the others."""
        if self._up:
            return
        self._up = True
        self.phase = "starting"
        parallel, backend = module("vllm.distributed"), "nccl" if torch.cuda.is_available() else "gloo"
        method = f"file://{tempfile.mkdtemp(prefix='rewrite-try-')}/rendezvous"
        if self.world > 1:
            import torch.distributed as dist

            fake = module("torch.testing._internal.distributed.fake_pg")
            dist.init_process_group("fake", store=fake.FakeStore(), rank=self.rank, world_size=self.world)
            new_group: Any = dist.new_group
            dist.new_group = lambda ranks=None, *_, **__: new_group(ranks, backend="fake")
            queue = module("vllm.distributed.device_communicators.shm_broadcast").MessageQueue
            queue.create_from_process_group = staticmethod(lambda *_, **__: None)
            module("vllm.distributed.parallel_state").in_the_same_node_as = lambda *_, **__: [True] * self.world
            with suppress(ImportError):  # memory that the ranks of a CPU share
                shared = module("vllm.distributed.device_communicators.cpu_communicator").CpuCommunicator
                shared._all_group_ranks_share_shm_group_name = lambda _: False
            backend = "fake"
        parallel.init_distributed_environment(self.world, self.rank, method, 0, backend)
        named = "backend" in inspect.signature(parallel.initialize_model_parallel).parameters
        parallel.initialize_model_parallel(self.world, 1, **({"backend": backend} if named else {}))

    def _on_cpu(self) -> None:
        """Nothing replaced here reads, places or merges a weight or a scale."""
        layers, linear = "vllm.model_executor.layers", "vllm.model_executor.kernels.linear"
        fused, quantization = f"{layers}.fused_moe", f"{layers}.quantization"
        schemes, experts = f"{quantization}.{_CT}.schemes.{_CT}", f"{quantization}.{_CT}.{_CT}_moe.{_CT}_moe"
        self.replace("quantizing to FP8", put("vllm._custom_ops", {"scaled_fp8_quant": scaled_fp8_quant}))
        self.replace("an operator that layers look up and do not call (0.26)", _declare_operator)
        torch.accelerator.empty_cache = lambda: None
        self.replace(
            "the kernels of experts, and their repacking",
            lambda: _take_experts(module(f"{fused}.oracle.fp8")),
            lambda: _take_fp4_experts(module(f"{fused}.oracle.nvfp4")),
            put(f"{fused}.experts.cpu_moe", {f"CPUUnquantizedExperts.{_PROCESS}": nothing}),
            put(f"{fused}.cpu_fused_moe", {"CPUFusedMOE": nothing, "SGLFusedMOE": nothing}),
        )
        # Before the schemes are imported, which look their kernels up by name.
        self.replace(
            "the repacking of weights for CPU kernels",
            put(f"{layers}.utils", {"dispatch_cpu_unquantized_gemm": nothing}),
            lambda: _take_torch_kernels(module(linear), module("vllm.platforms").PlatformEnum.CPU),
        )
        self.replace(
            "NVFP4 kernels (vLLM's emulation)",
            offer_fp4_kernel,
            put(f"{schemes}_w4a16_nvfp4", {"prepare_fp4_layer_for_marlin": nothing}),
        )
        kernel = MagicMock(__name__="none")
        one, two = (lambda *_, **__: kernel), (lambda *_, **__: (kernel, kernel))  # a choice of experts has two parts
        self.replace(
            "kernels of INT4 and the MX formats, and their repacking",
            put(f"{schemes}_wNa16", {f"CompressedTensorsWNA16.{_PROCESS}": nothing, "choose_mp_linear_kernel": one}),
            put(
                f"{schemes}_w4a4_mxfp4",
                {f"CompressedTensorsW4A4Mxfp4.{_PROCESS}": nothing, "init_mxfp4_linear_kernel": one},
            ),
            put(
                f"{experts}_wna16",
                {f"CompressedTensorsWNA16MoEMethod.{_PROCESS}": nothing, "select_wna16_moe_backend": two},
            ),
            put(f"{experts}_w4a4_mxfp4", {f"CompressedTensorsW4A4Mxfp4MoEMethod.{_PROCESS}": nothing}),
            put(
                f"{quantization}.mxfp4", {f"GptOssMxfp4MoEMethod.{_PROCESS}": nothing, "select_mxfp4_moe_backend": two}
            ),
            put(f"{quantization}.modelopt", {"init_mxfp8_linear_kernel": lambda **_: MagicMock()}),
        )
        self.replace(
            "the question for the compute capability of a card",
            put(f"{quantization}.{_CT}.{_CT}", {f"CompressedTensorsConfig.{_CHECK}": lambda *_, **__: True}),
            put(f"{quantization}.quark.quark", {f"QuarkConfig.{_CHECK}": lambda *_, **__: True}),
        )
        self.replace("the choice of an FP8 cache", _take_fp8_cache)
        self.replace(
            "the refusal of sparse attention, and of experts without a gate",
            _take_sparse_attention,
            lambda: _take_ungated_experts(fused),
        )
        self.replace("events and streams of a card", put("torch.cuda", {"Event": MagicMock, "Stream": MagicMock}))


_CT, _CHECK, _PROCESS = "compressed_tensors", "_check_scheme_supported", "process_weights_after_loading"


def _declare_operator() -> None:
    """The compiled half of vLLM 0.26 does not load beside every torch."""
    if hasattr(torch.ops._C, "silu_and_mul"):
        raise AttributeError  # nothing to replace
    torch.library.define("_C::silu_and_mul", "(Tensor! result, Tensor input) -> ()")


def _take_experts(oracle: Any) -> None:
    oracle.select_fp8_moe_backend = lambda *_, **__: (oracle.Fp8MoeBackend.TRITON, object)
    oracle.make_fp8_moe_kernel = nothing


def _take_fp4_experts(oracle: Any) -> None:
    backends = oracle.NvFp4MoeBackend
    backend = getattr(backends, "EMULATION", backends.MARLIN)
    names = ("w13", "w13_scale", "w13_scale_2", "w2", "w2_scale", "w2_scale_2")
    oracle.select_nvfp4_moe_backend = lambda *_, **__: (backend, MagicMock())
    oracle.make_nvfp4_moe_kernel = lambda *_, **__: MagicMock()
    oracle.prepare_nvfp4_moe_layer_for_marlin = lambda **given: tuple(given[name] for name in names)


def _take_torch_kernels(linear: Any, cpu: Any) -> None:
    """The kernels that leave weights as they were loaded: those of torch."""
    linear._POSSIBLE_FP8_KERNELS[cpu] = [k for k in linear._POSSIBLE_FP8_KERNELS[cpu] if "Torch" in k.__name__]
    if kernel := getattr(linear, "CPUFp8BlockScaledMMKernel", None):
        kernel.is_supported = kernel.can_implement = staticmethod(lambda *_, **__: (True, None))
        kernel.process_weights_after_loading = nothing
        linear._POSSIBLE_FP8_BLOCK_KERNELS[cpu] = [kernel]
    if kernel := getattr(linear, "CPUInt8ScaledMMLinearKernel", None):
        kernel.process_weights_after_loading = nothing


def offer_fp4_kernel() -> None:
    """vLLM's emulation, which takes weight-only layers, too: latent attention multiplies while it is loaded."""
    os.environ.setdefault("VLLM_USE_NVFP4_CT_EMULATIONS", "1")  # 0.19.1
    layers, linear = "vllm.model_executor.layers", module("vllm.model_executor.kernels.linear")
    stock, config = linear.EmulationNvFp4LinearKernel, linear.NvFp4LinearLayerConfig
    dequantize = module(f"{layers}.quantization.utils.nvfp4_emulation_utils").dequantize_to_dtype

    class Emulation(stock):  # type: ignore[misc,valid-type]
        def apply_weights(self, layer: Any, x: Any, bias: Any = None) -> Any:
            if hasattr(layer, "input_global_scale_inv"):
                return super().apply_weights(layer, x, bias)
            scales = layer.weight_scale, layer.weight_global_scale
            return x @ dequantize(layer.weight, *scales, x.dtype, 16, swizzle=False).T

    linear._POSSIBLE_NVFP4_KERNELS[module("vllm.platforms").PlatformEnum.CPU] = [Emulation]
    linear.init_nvfp4_linear_kernel = lambda **_: Emulation(config())


def _take_ungated_experts(fused: str) -> None:
    config = module(f"{fused}.config")
    config.current_platform = MagicMock(wraps=config.current_platform, is_cuda_alike=lambda: True)
    experts = module(f"{fused}.experts.cpu_moe").CPUUnquantizedExperts
    experts._supports_no_act_and_mul = experts._supports_activation = staticmethod(lambda *_: True)


def _take_sparse_attention() -> None:
    """Which keys are looked at is no matter of weights: the backend of dense attention holds the same ones."""
    platform = module("vllm.platforms.cpu").CpuPlatform
    choose = platform.get_attn_backend_cls

    def dense(backend: Any, attn_selector_config: Any, num_heads: Any = None) -> Any:
        return choose(backend, attn_selector_config._replace(use_sparse=False), num_heads)

    platform.get_attn_backend_cls = staticmethod(dense)


def _take_fp8_cache() -> None:
    """The CPU has FP8 caches since 0.32; before, it refuses one. The scales are the layer's, not the backend's."""
    platform, attention = module("vllm.platforms.cpu").CpuPlatform, module("vllm.v1.attention.backends.cpu_attn")
    if "fp8" in attention.CPUAttentionBackend.supported_kv_cache_dtypes:
        raise AttributeError
    attention.is_quantized_kv_cache = lambda _: False
    check = platform.check_and_update_config

    def keep_cache_type(config: Any) -> None:
        given, config.cache_config.cache_dtype = config.cache_config.cache_dtype, "auto"
        check(config)
        config.cache_config.cache_dtype = given

    platform.check_and_update_config = staticmethod(keep_cache_type)


class Sglang(Engine):
    name, package = "SGLang", "sglang"

    def start(self) -> str:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        if self.world > 1:
            raise Lacking("SGLang is tried on one rank only")
        if not torch.cuda.is_available():
            stand_in("sgl_kernel", "flashinfer", "vllm")
            self.replaced.append("the packages sgl_kernel and flashinfer")
        version = str(module("sglang").__version__)
        for name in ("sglang.srt.distributed.utils", "sglang.srt.distributed"):
            module(name).get_pp_indices = self.stage
        if not torch.cuda.is_available():
            self._on_cpu()
        return version

    def load(self, folder: Path, dtype: str, weights: Weights | None, *, finish: bool) -> Loaded:
        self.phase = "reading the config"
        arguments = self._arguments(folder, dtype)
        config = module("sglang.srt.configs.model_config").ModelConfig.from_server_args(arguments)
        config.dtype = getattr(torch, dtype)
        _state_interval(config.hf_config, json.loads((folder / "config.json").read_text()))
        self._join(arguments, config)
        loader = module("sglang.srt.model_loader.loader").DefaultModelLoader
        stock = loader.load_weights_and_postprocess
        into: list[Recorder] = []

        def load_weights(model: Any, given: Weights, device: Any) -> None:
            with self.watched(model, weights, into):
                stock(model, given, device) if finish else model.load_weights(given)

        device = module("sglang.srt.configs.device_config").DeviceConfig(arguments.device)
        self.phase = "building the model"
        with patch.object(loader, "load_weights_and_postprocess", staticmethod(load_weights)):
            made = loader(module("sglang.srt.configs.load_config").LoadConfig())
            return Loaded(made.load_model(model_config=config, device_config=device), into[0])

    def _arguments(self, folder: Path, dtype: str) -> Any:
        made = module("sglang.srt.server_args")
        on_gpu = torch.cuda.is_available()
        given: dict[str, Any] = {
            "model_path": str(folder), "tokenizer_path": str(folder), "served_model_name": str(folder), "dtype": dtype,
            "skip_tokenizer_init": True, "trust_remote_code": self.trust, "device": "cuda" if on_gpu else "cpu",
        }  # fmt: skip
        if not on_gpu:
            given |= {
                "attention_backend": "torch_native",
                "mm_attention_backend": "sdpa",
                "sampling_backend": "pytorch",
            }
        with suppress(ModuleNotFoundError):
            context = module("sglang.srt.runtime_context")
            if hasattr(context, "SpawnRanks"):
                try:
                    return self._published(context, made.ServerArgs, given)
                except AssertionError:  # gpt-oss and Gemma 4 want another one
                    if on_gpu:
                        raise
                    return self._published(context, made.ServerArgs, given | {"attention_backend": "triton"})
        if on_gpu:
            arguments = made.ServerArgs(**given)
        else:  # its __post_init__ looks for GPUs: made from the defaults of its fields
            arguments = made.ServerArgs.__new__(made.ServerArgs)
            for field in dataclasses.fields(made.ServerArgs):
                default = None if field.default is dataclasses.MISSING else field.default
                lacks = field.default_factory is dataclasses.MISSING
                setattr(arguments, field.name, default if lacks else field.default_factory())  # type: ignore[operator]
            for name, value in given.items():
                setattr(arguments, name, value)
        made.set_global_server_args_for_scheduler(arguments)
        return arguments

    @staticmethod
    def _published(context: Any, made: Any, given: Result) -> Any:
        arguments = made(**given, disable_radix_cache=True)
        context.publish(arguments, role="scheduler", ranks=context.SpawnRanks(world_rank=0))
        return arguments

    def _join(self, arguments: Any, config: Any) -> None:
        if self._up:
            return
        self._up = True
        self.phase = "starting"
        parallel, attention = module("sglang.srt.distributed.parallel_state"), module("sglang.srt.layers.dp_attention")
        parallel.init_distributed_environment(
            world_size=1, rank=0, local_rank=0, backend="nccl" if torch.cuda.is_available() else "gloo",
            distributed_init_method=f"file://{tempfile.mkdtemp(prefix='rewrite-try-')}/rendezvous",
        )  # fmt: skip
        parallel.initialize_model_parallel()
        initialize = attention.initialize_dp_attention
        initialize(arguments, config) if "model_config" in initialize.__annotations__ else initialize(arguments)

    def _on_cpu(self) -> None:
        quantization = "sglang.srt.layers.quantization"
        schemes = f"{quantization}.{_CT}.schemes"

        def keep(held: Any, *_: Any, **__: Any) -> Any:
            return held

        def quantize(values: Any, output: Any, scale: Any, is_static: bool) -> None:
            codes, used = scaled_fp8_quant(values, scale if is_static else None)
            output[: values.shape[0]].copy_(codes)
            scale.copy_(used.reshape(scale.shape))

        capability = {"get_device_capability": lambda *_, **__: (9, 0)}
        self.replace(
            "quantizing to FP8",
            put("sglang.kernels.ops.quantization.fp8_kernel", {"sgl_per_tensor_quant_fp8": quantize}),
            put(f"{quantization}.fp8_kernel", {"sgl_per_tensor_quant_fp8": quantize}),
        )
        self.replace(
            "the question for the compute capability of a card",
            put("sglang.srt.model_loader.loader", capability),
            put("torch.cuda", capability),
            put(f"{quantization}.{_CT}.{_CT}", {f"CompressedTensorsConfig.{_CHECK}": lambda *_, **__: True}),
            put(f"{quantization}.quark.quark", {f"QuarkConfig.{_CHECK}": lambda *_, **__: True}),
        )
        self.replace(
            "the repacking of NVFP4 weights",
            lambda: _no_fp4_repacking(module(f"{quantization}.modelopt_quant"), f"{schemes}.{_CT}", quantization),
        )
        self.replace("the repacking of MXFP4 experts", lambda: _take_mxfp4(module(quantization)))
        self.replace(
            "the repacking of INT4 experts",
            put(
                f"{schemes}.{_CT}_wNa16_moe",
                {"gptq_marlin_moe_repack": keep, "marlin_moe_permute_scales": keep, "marlin_make_workspace": nothing},
            ),
        )
        self.replace("rotary embeddings of MiMo-V2", lambda: _plain_rope(module("sglang.srt.models.mimo_v2")))
        self.replace(
            "rotary embeddings that the CPU lacks",
            lambda: _any_rope(module("sglang.srt.layers.rotary_embedding.factory")),
        )
        self.replace("where MiniCPM-V's resampler is put", lambda: _stay_on_cpu(module("sglang.srt.models.minicpmv")))


def _no_fp4_repacking(modelopt: Any, schemes: str, quantization: str) -> None:
    if importlib.util.find_spec(f"{schemes}_w4a16_nvfp4") is None:
        modelopt.ModelOptFp4LinearMethod.process_weights_after_loading = nothing
        return
    modelopt.prepare_nvfp4_layer_for_marlin = modelopt.prepare_moe_nvfp4_layer_for_marlin = nothing
    modelopt.get_fp4_gemm_runner_backend = lambda: MagicMock(is_marlin=lambda: True)
    modelopt.get_moe_runner_backend = lambda: modelopt.MoeRunnerBackend.MARLIN
    w4a4, w4a16 = module(f"{schemes}_w4a4_nvfp4"), module(f"{schemes}_w4a16_nvfp4")
    w4a4.swizzle_blockscale = lambda scale: scale.data.clone()
    w4a4.get_fp4_gemm_runner_backend = lambda: MagicMock(is_flashinfer_trtllm=lambda: False, is_marlin=lambda: False)
    w4a16._use_flashinfer_bf16_fp4 = lambda *_: False
    w4a16.prepare_nvfp4_layer_for_marlin = nothing
    module(f"{quantization}.marlin_utils_fp4").prepare_moe_nvfp4_layer_for_marlin = nothing
    experts = vars(module(f"{schemes}_w4a16_nvfp4_moe"))
    scheme = next(kind for name, kind in experts.items() if name.startswith("CompressedTensorsW4A16"))
    stock = scheme.process_weights_after_loading

    def process(self: Any, layer: Any) -> None:
        layer.hidden_size, layer.intermediate_size_per_partition = 128, 64  # Marlin asks, once scales are merged
        stock(self, layer)

    scheme.process_weights_after_loading = process
    w4a4_experts = module(f"{schemes}_w4a4_nvfp4_moe")
    w4a4_experts.swizzle_blockscale = w4a4.swizzle_blockscale
    cutlass = w4a4_experts.CompressedTensorsW4A4Nvfp4MoE  # of Blackwell cards; it wants up before gate
    cutlass.requires_blackwell = cutlass.load_up_proj_weight_first = False


def _take_mxfp4(methods: Any) -> None:
    """SGLang offers the method where there is a card for it."""
    mxfp4 = module("sglang.srt.layers.quantization.mxfp4")
    for known in (methods.BASE_QUANTIZATION_METHODS, methods.QUANTIZATION_METHODS):
        known["mxfp4"] = mxfp4.Mxfp4Config
    mxfp4.Mxfp4MoEMethod.process_weights_after_loading = nothing


def _plain_rope(model: Any) -> None:
    """They hold no weights, and the config of transformers 5 has one for each kind of layer, which SGLang does not."""
    own = model.get_rope
    model.get_rope = lambda *given, **more: own(*given, **{**more, "rope_scaling": None})


def _any_rope(factory: Any) -> None:
    own = factory.get_rope_cpu

    def rope(*given: Any, **more: Any) -> Any:
        """Of all but DeepSeek's: they hold no weights."""
        return own(*given, **more) if given[5] is not None else factory.get_rope(*given[:5])

    factory.get_rope_cpu = rope


def _stay_on_cpu(model: Any) -> None:
    """Before 0.5.14 the resampler goes to "cuda" by name."""
    model.get_device = lambda *_: "cpu"
    stock: Any = torch.nn.Module.to

    def to(own: Any, *given: Any, device: Any = None, **others: Any) -> Any:
        return stock(own, *given, **({} if device is None else {"device": "cpu"}), **others)

    torch.nn.Module.to = to  # type: ignore[method-assign, assignment] # fewer overloads


def _state_interval(config: Any, stored: Mapping[str, Any]) -> None:
    """SGLang reads every how many layers one has full attention; save_pretrained of transformers only lists all layers.
    Published configs have both."""
    kinds = stored.get("text_config", stored).get("layer_types") or ()
    text = getattr(config, "text_config", config)
    if "linear_attention" in kinds and "full_attention" in kinds and "full_attention_interval" not in vars(text):
        text.full_attention_interval = kinds.index("full_attention") + 1


class _Mock(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return vars(self).setdefault(name, MagicMock(name=f"{self.__name__}.{name}"))


class _Mocks(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, packages: Sequence[str]) -> None:
        self._packages = packages

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        known = f"{name}.".startswith(tuple(f"{package}." for package in self._packages))
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if known else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        made = _Mock(spec.name)
        made.__path__, made.__file__ = [], "<mock>"
        return made

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""


def stand_in(*packages: str, first: bool = False) -> None:
    """Let imports of GPU packages, and of all that is below them, succeed where they are not installed; ``first``: also
    where they are."""
    sys.meta_path.insert(0 if first else len(sys.meta_path), _Mocks(packages))


class Transformers(Engine):
    name, package, splits = "transformers", "transformers", False

    def start(self) -> str:
        for key in ("HF_HUB_OFFLINE", "HF_DEACTIVATE_ASYNC_LOAD"):
            os.environ.setdefault(key, "1")
        if self.world > 1:
            raise Lacking("transformers is tried on one rank only")
        return str(module("transformers").__version__)

    def load(self, folder: Path, dtype: str, weights: Weights | None, *, finish: bool) -> Loaded:
        self.phase = "reading the config"
        library = module("transformers")
        config = library.AutoConfig.from_pretrained(folder, trust_remote_code=self.trust)
        kind = getattr(library, (config.architectures or ["AutoModelForCausalLM"])[0], library.AutoModelForCausalLM)
        options: dict[str, Any] = {"dtype": getattr(torch, dtype)}
        if torch.cuda.is_available():
            options["device_map"] = "cuda"
        self.phase = "reading weights"
        if weights is not None:
            options |= {"config": config, "state_dict": dict(weights)}
        model, found = kind.from_pretrained(
            None if weights is not None else folder, output_loading_info=True, **options
        )
        if finish:  # scales of any shape are taken, and found out about in the first forward pass
            self.phase = "computing"
            with torch.no_grad():
                module("copy").deepcopy(model)(input_ids=torch.arange(10, 20, device=model.device)[None])
        return Loaded(model, None, sorted(found["missing_keys"]))


ENGINES: dict[str, type[Engine]] = {each.package: each for each in (Vllm, Sglang, Transformers)}


# --- the run --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def shadow(source: Checkpoint, *, quantized: bool) -> Iterator[Path]:
    """A folder with the config of the same model, with the vocabulary that is taken; not ``quantized``: without
    quantization, and without weights."""

    def with_fewer_words(part: Result) -> Result:
        cut = source.vocabulary is not None and part.get("vocab_size") == source.vocabulary
        return {**part, "vocab_size": WORDS} if cut else part

    config = json.loads((source.folder / "config.json").read_text(), object_hook=with_fewer_words)
    with tempfile.TemporaryDirectory(prefix="rewrite-try-") as made:
        target = Path(made)
        for path in source.folder.iterdir():
            weights = path.suffix in (".safetensors", ".bin", ".pt") or path.name.endswith(".index.json")
            plain = path.is_file() and path.name != "hf_quant_config.json" and not weights
            if path.name != "config.json" and (quantized or plain):
                (target / path.name).symlink_to(path.resolve())
        for part in () if quantized else (config, config.get("text_config") or {}):
            for key in ("quantization_config", "compression_config"):
                part.pop(key, None)
        (target / "config.json").write_text(json.dumps(config))
        yield target


def _inside(file: str) -> str:
    """The path of a source file from the folder that Python imports from, as other machines have it."""
    roots = [root for root in map(os.path.abspath, filter(None, sys.path)) if file.startswith(f"{root}/")]
    return file[len(max(roots, key=len)) + 1 :] if roots else Path(file).name


def described(error: BaseException) -> Result:
    """An exception: type, message and its last frames, without the paths of this machine."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    where = [f"{_inside(f.filename)}:{f.lineno} {f.name}" for f in frames]
    message = re.sub(r"(/[\w.+-]+){2,}/", "", str(error)).strip()
    # This file asked for what is not there.
    own = bool(frames) and frames[-1].filename == described.__code__.co_filename
    return {"type": type(error).__name__, "message": message[:600], "where": where, "own": own}


def measure(engine: Engine, request: Mapping[str, Any], tell: Callable[..., None]) -> Result:
    """Load and compare ``checkpoint``; of the layers of ``stack`` those of ``runs``: first and last ones.

    ``truth``: the checkpoint that it was converted from, where that one says what the weights are; ``cuts``: by the
    last part of a stored module's name, the shares of its rows that are judged one by one."""
    result: Result = {
        "layers": [], "unused": [], "unfilled": {}, "twice": {}, "empty": {}, "meaningless": {}, "failure": None,
        "operators": 0, "communicated": False, "words": None, "cache": {}, "stated_cache": {},
        "seconds": {"load": 0.0, "reference": 0.0, "compare": 0.0},
    }  # fmt: skip
    runs = (request.get("runs") if engine.splits else None) or [None]
    result["whole"] = runs == [None]
    for run in runs:
        engine.layers = None if run is None else (run[0], run[1])
        _one_run(engine, request, result, tell)
        if result["failure"]:
            break
    result["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_available():
        result["peak_device_bytes"] = torch.cuda.max_memory_allocated()
    return result


def _one_run(engine: Engine, request: Mapping[str, Any], result: Result, tell: Callable[..., None]) -> None:
    """The layers that the engine is to load, with few words; where that fails, the cut may be why: with all words."""
    run, folders = engine.layers, (request["checkpoint"], request.get("truth", request["checkpoint"]))
    layers = None if run is None else range(run[0], run[1] + 1)
    named = "all layers" if run is None else f"layers {run[0]} to {run[1]}"
    for cut in (True, False) if run else (False,):
        source, truth = (Checkpoint(Path(each), request.get("stack", ""), layers, cut=cut) for each in folders)
        truth.cuts = request.get("cuts", {})
        _loaded_twice(engine, source, truth, result, lambda step: tell(f"{step}: {named}"))
        gc.collect()
        result["words"] = None if source.vocabulary is None else [WORDS, source.vocabulary]
        if not result["failure"] or source.vocabulary is None:
            break


def _loaded_twice(
    engine: Engine, source: Checkpoint, truth: Checkpoint, result: Result, tell: Callable[[str], None]
) -> None:
    """As it is, and without quantization; and what differs."""
    partly = engine.layers is not None
    result["failure"] = None
    dtype = "float16" if "float16" in (source.config.get("dtype"), source.config.get("torch_dtype")) else "bfloat16"
    tell("loading")
    clock, loaded, failure = time.monotonic(), None, None
    try:
        with _unset_memory_shown(), shadow(source, quantized=True) if partly else nullcontext(source.folder) as folder:
            loaded = engine.load(folder, dtype, source.stored() if partly else None, finish=True)
    except Exception as error:  # whatever an engine raises is what is to be found out
        traceback.print_exc()
        failure = {**described(error), "phase": engine.phase}
    result["seconds"]["load"] += time.monotonic() - clock
    tell("loading the dequantized weights")
    clock, plain, reason = time.monotonic(), None, None
    with shadow(truth, quantized=False) as folder:
        for reference in ("float32", "bfloat16"):
            try:
                plain = engine.load(folder, reference, truth.plain(whole=not engine.splits), finish=False)
                break
            except Exception as error:
                traceback.print_exc()
                reason = {**described(error), "phase": engine.phase}
    result["seconds"]["reference"] += time.monotonic() - clock
    result["meaningless"] |= truth.meaningless
    if failure is not None or plain is None or loaded is None:
        result["failure"] = {"loading": failure, "reference": None if plain is not None else reason}
        return
    tell("comparing")
    clock = time.monotonic()
    result["layers"] += compare(loaded, plain, truth, getattr(torch, dtype))
    result["cache"] |= cache_scales(loaded.model)
    result["stated_cache"] |= source.cache_scales()
    if not truth.meaningless:  # those are left out of the plain model
        held = loaded.filled()  # tables of words are left out of the plain model, too
        empty = {name: some for name, some in plain.empty().items() if name not in held}
        result["empty"] |= _with_neighbors(empty, [name for name, _ in plain.model.named_parameters()])
    _provenance(loaded, plain, source, result)
    result["seconds"]["compare"] += time.monotonic() - clock


def _with_neighbors(empty: Result, names: Sequence[str]) -> Result:
    """Those that other layers have something for, or the rest of their own layer has. Engines also build modules that
    a model does not have at all (SGLang: the deepstack mergers of Qwen3-VL for Qwen3.5)."""

    def place(name: str) -> str:
        return re.sub(r"\d+", "N", name)

    full = [name for name in names if name not in empty]
    places, parts = {place(name) for name in full}, {name[:at] for name in full for at in _dots(name)}
    return {
        name: some
        for name, some in empty.items()
        if place(name) in places or name.rpartition(".")[0].rpartition(".")[0] in parts
    }


def _dots(name: str) -> list[int]:
    """Where each module ends that a parameter lies in; first the model."""
    return [0, *(at for at, letter in enumerate(name) if letter == ".")]


def _provenance(loaded: Loaded, plain: Loaded, source: Checkpoint, result: Result) -> None:
    """What the recorder saw of layers that hold a quantized weight, and of nothing else."""
    seen, kept = loaded.recorder, plain.recorder
    if seen is None or kept is None:
        return
    result["operators"] += seen.operators
    result["communicated"] |= seen.communicated or kept.communicated
    for name in source.names():  # what a plain model does not use either was not built: a drafter, a vision tower
        if name not in seen.used:
            stem = re.sub(r"(weight|input)[\w]*$", "", name)
            if any(f"{stem}{each}" in kept.used for each in ("weight", "weight_packed")) or name in kept.used:
                result["unused"].append(name)
    holders = {
        name.rpartition(".")[0]
        for name, writes in seen.writes.items()
        if any(source.is_quantized(tensor) for names, _ in writes for tensor in names)
    }
    for name, (missing, twice, count) in seen.coverage.items():
        if name.rpartition(".")[0] not in holders:
            continue
        padding = kept.coverage.get(name, (0, 0, 0))
        if missing and not padding[0]:
            result["unfilled"][name] = [missing, count]
        if twice and not padding[1]:
            result["twice"][name] = [twice, count]


@contextlib.contextmanager
def _unset_memory_shown() -> Iterator[None]:
    """Parameters are made in memory that holds anything. What nothing fills is NaN here, and shows in every run."""
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)


def chosen(wanted: str | None) -> type[Engine]:
    """The engine to try: the one asked for, or the first that is installed."""
    for package, engine in ENGINES.items():
        if wanted in (None, package) and importlib.util.find_spec(package) is not None:
            return engine
    raise Lacking(f"{wanted or 'No engine (vLLM, SGLang, transformers)'} is not installed in this Python")


def answer(request: Mapping[str, Any], tell: Callable[..., None]) -> Result:
    """The whole result; ``stopped`` says why nothing was learnt."""
    result: Result = {"engine": None, "version": None, "torch": torch.__version__, "python": sys.version.split()[0]}
    gpu = torch.cuda.is_available()
    result |= {"device": torch.cuda.get_device_name() if gpu else "cpu", "gpu": gpu, "stopped": None, "replaced": []}
    clock = time.monotonic()
    try:
        engine = chosen(request.get("using"))(request)
        result["engine"] = engine.name
        tell(f"starting {engine.name}")
        result["version"] = engine.start()
        result["replaced"] = engine.replaced
        started = time.monotonic() - clock
        result |= measure(engine, request, tell)
        result["seconds"]["start"] = started
    except Exception as error:  # the engine's own message is all there is to say
        traceback.print_exc()
        result["stopped"] = described(error)
    return result


def main() -> None:
    """Answer the request on the command line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def tell(step: str) -> None:
        print(json.dumps({"step": step}), file=answers, flush=True)

    print(json.dumps({"result": answer(json.loads(sys.argv[1]), tell)}), file=answers, flush=True)
    sys.stderr.flush()
    os._exit(0)  # engines leave threads and process groups behind that can hang an orderly exit


if __name__ == "__main__":
    main()
