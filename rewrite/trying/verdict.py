"""What the measurements of the driver mean: one verdict for each layer, one for the checkpoint. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rewrite.trying.engine import EngineError

EXACT, ROUNDED, LESS, GARBLED = "exact", "rounded", "loses precision", "garbled"
UNFILLED, NO_KERNEL, FAILS, UNKNOWN = "never filled", "cannot compute here", "fails to load", "not known"
#: From the worst to the best.
ORDER = (FAILS, GARBLED, UNFILLED, LESS, NO_KERNEL, UNKNOWN, ROUNDED, EXACT)
AFFECTED = frozenset(ORDER[:5])
_EXACT = 1e-6  # F32 products in another order
_ROUNDED = 2.0**-8  # once to BF16: what computing in BF16 costs anyhow
_GARBLED = 0.2
_COMPUTED = 0.01  # a kernel's own rounding, of products in BF16

# What is said where a build or a card has no kernel. None of it speaks of the checkpoint.
_LACKS_KERNEL = re.compile(
    r"no kernel image|kernel that can implement|find a kernel|kernel \w+ is not supported|compute capability"
    r"|min capability|not compiled with|no NVIDIA"
    r"|_OpNamespace|Could not run '|active driver|backend supports"
    r"|not supported (?:on|for) (?:the )?(?:current |this )?(?:GPU|CPU|platform|device)"
    r"|No module named",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class LayerVerdict:
    """One matrix of the engine: what it is, how far off its worst part, which tensor of the checkpoint that is."""

    module: str
    parameter: str
    kind: str
    error: float | None
    tensor: str | None
    rows: tuple[int, int] | None
    how: str  # "weights": as the engine holds them; "kernel": as it multiplies with them; else why nothing was read
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """``failure`` is the loader's own exception, where the checkpoint was refused. ``empty``: parameters of the engine
    that the checkpoint has nothing for, quantized or not. ``cache``: scales of the KV cache that the engine holds and
    that are not those of the files; they count where the cache is FP8, and are in no ``kind``."""

    kind: str
    layers: tuple[LayerVerdict, ...]
    unlearnt: tuple[str, ...]
    failure: Mapping[str, Any] | None = None
    empty: tuple[str, ...] = ()
    cache: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """0 all is exact, 1 affected, 4 where a quantized layer is not known and nothing else is wrong."""
        return 1 if self.kind in AFFECTED else 4 if self.kind == UNKNOWN else 0


def judge(result: Mapping[str, Any]) -> Verdict:
    """The verdict on a driver's result. Raises :class:`EngineError` where nothing was learnt."""
    if result["stopped"]:
        raise _nothing("The engine did not start", result["stopped"], result)
    if result["failure"]:
        return _refusal(result)
    layers = tuple(_layer(row, result) for row in result["layers"] if row["judged"])
    layers = layers or tuple(_plain(row) for row in result["layers"] if len(row["shape"]) > 1)
    unlearnt = tuple(f"{name}: {reason}" for name, reason in sorted(result["meaningless"].items()))
    kinds = {layer.kind for layer in layers} | ({UNKNOWN} if unlearnt else set())
    if result["communicated"]:
        unlearnt += ("the loader asked other ranks for data, which a single process can't answer",)
        kinds.add(UNKNOWN)
    if not layers and not unlearnt:
        raise EngineError(
            "The engine holds no layer of this checkpoint", where=f"{result['engine']} {result['version']}",
            hint="nothing was learnt of the checkpoint; --layers all looks at all layers",
        )  # fmt: skip
    empty = tuple(sorted(result["empty"]))
    if empty:
        kinds.add(UNFILLED)
    return Verdict(
        next(kind for kind in ORDER if kind in kinds), layers, unlearnt, empty=empty, cache=tuple(_cache(result))
    )


def _cache(result: Mapping[str, Any]) -> Iterator[str]:
    """Towers beside the language model number their layers, too: one of all that have the number must be right."""
    for layer, stated in result["stated_cache"].items():
        held = [scales for name, scales in result["cache"].items() if f".{layer}." in f".{name}."]
        for which, number in stated.items():
            served = [float(scales[which]) for scales in held if which in scales]
            if served and not any(abs(value - number) <= _ROUNDED * number for value in served):
                word = "keys" if which == "k" else "values"
                yield f"layer {layer}, {word} by {served[0]:.4g}, the files say {number:.4g}"


def _refusal(result: Mapping[str, Any]) -> Verdict:
    """Why loading failed. A model that does not load without quantization either says nothing about the checkpoint, nor
    does a kernel that this build does not have."""
    loading, reference = result["failure"]["loading"], result["failure"]["reference"]
    if reference is not None:
        raise _nothing("This engine does not load the model without quantization either", loading or reference, result)
    if loading["own"]:
        raise _nothing("This version of the engine has not what is needed to look into it", loading, result)
    if lacks_kernel(loading):
        if not result["gpu"]:
            raise _nothing("This build of the engine has no kernel for this checkpoint", loading, result)
        return Verdict(NO_KERNEL, (), (), loading)
    return Verdict(FAILS, (), (), loading)


def lacks_kernel(error: Mapping[str, Any]) -> bool:
    """Whether an exception says that a kernel is missing, not that the checkpoint is wrong."""
    if "compatible scheme was found" in error["message"]:  # of vLLM and SGLang: no card has one for such a config
        return False
    return error["type"] in ("ImportError", "ModuleNotFoundError", "NotImplementedError") or bool(
        _LACKS_KERNEL.search(error["message"])
    )


def _nothing(what: str, error: Mapping[str, Any], result: Mapping[str, Any]) -> EngineError:
    where = f"{result['engine']} {result['version']}" if result["engine"] else None
    last = f" ({error['where'][-1]})" if error["where"] else ""
    lines = error["message"].splitlines() or [""]
    return EngineError(
        what, where=where, found=f"{error['type']}: {' '.join(lines[:3])}{last}",
        hint="nothing was learnt of the checkpoint; --engine names another Python",
    )  # fmt: skip


def _layer(row: Mapping[str, Any], result: Mapping[str, Any]) -> LayerVerdict:
    """By the weights where they can be read, else by the kernel. An order of codes that was taken for another one looks
    garbled; the kernel that reads it knows better."""
    error, part = _worst(row["parts"])
    computed, kernel_part = _worst(row["kernel"])
    how, kind = "weights", _kind(error, _EXACT)
    if error is None or (kind in (GARBLED, LESS) and computed is not None and computed < _COMPUTED):
        error, part, how = computed, kernel_part, "kernel"
        kind = _kind(computed, _COMPUTED)
    if error is None:
        how = row["held"]
    reasons = _reasons(row, result)
    if kind == UNKNOWN and reasons:
        kind = UNFILLED
    if kind == GARBLED and error is not None and math.isnan(error) and reasons:
        kind = UNFILLED
    if kind in (EXACT, ROUNDED):
        reasons = _input_scale(row["input_scale"], divides=row["held"] == "nvfp4")
        kind = LESS if reasons else kind
    if row["cast"] and kind not in (EXACT, ROUNDED):
        reasons = ("the files do not quantize it, the engine does", *reasons)
    if row["kernel_error"] and result["gpu"] and kind in (EXACT, ROUNDED, UNKNOWN):
        kind, reasons = NO_KERNEL, (row["kernel_error"],)
    rows = tuple(part["rows"]) if part and part["rows"] else None
    return LayerVerdict(
        row["module"],
        row["parameter"],
        kind,
        error,
        part and part["tensor"],
        rows,
        how,
        reasons,
    )


def _plain(row: Mapping[str, Any]) -> LayerVerdict:
    """A layer of a checkpoint in which nothing is quantized. Engines may reorder such a weight for a kernel: what
    differs is not known to be wrong."""
    error, part = _worst(row["parts"])
    kind = _kind(error, _EXACT)
    known = kind in (EXACT, ROUNDED)
    how = "weights" if known else row["held"] if error is None else "in an order of a kernel"
    tensor = part["tensor"] if part else None
    return LayerVerdict(row["module"], row["parameter"], kind if known else UNKNOWN, error, tensor, None, how)


def _kind(error: float | None, exact: float) -> str:
    if error is None:
        return UNKNOWN
    if error <= exact:
        return EXACT
    if error <= _ROUNDED:
        return ROUNDED
    return LESS if error < _GARBLED else GARBLED


def _worst(parts: Any) -> tuple[float | None, Any]:
    """NaN is the worst, then the largest."""
    if not parts:
        return None, None
    part = max(parts, key=lambda each: (math.isnan(float(each["error"])), float(each["error"])))
    return float(part["error"]), part


def _input_scale(scale: Mapping[str, Any] | None, *, divides: bool) -> tuple[str, ...]:
    """Activations that are quantized by another scale than the files state; nothing where the engine takes its own.
    ``divides``: kernels of NVFP4 take a divisor, which some engines keep in the place of the scale."""
    if scale is None or scale["served"] is None:
        return ()
    low, high = map(float, scale["served"])
    stated = float(scale["stated"])
    for meant in (stated, 1 / stated) if divides and stated else (stated,):
        if abs(low - meant) <= _ROUNDED * meant and abs(high - meant) <= _ROUNDED * meant:
            return ()
    return (f"activations are quantized by {high:.4g}, the files say {stated:.4g}",)


def _reasons(row: Mapping[str, Any], result: Mapping[str, Any]) -> tuple[str, ...]:
    """What the recorder saw of this layer: tensors never used, elements never filled, or written twice."""
    module = f"{row['module']}."
    stems = {part["tensor"].rpartition(".")[0] for part in row["parts"] + row["kernel"]}
    said = [f"{name} was never used" for name in result["unused"] if name.rpartition(".")[0] in stems]
    for word, key in (("never filled", "unfilled"), ("written more than once", "twice")):
        for name, (some, count) in result[key].items():
            if name.startswith(module) and "." not in name[len(module) :]:
                said.append(f"{some} of {count} elements of {name[len(module) :]} {word}")
    return tuple(said)
