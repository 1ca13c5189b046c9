"""The experts of a mixture-of-experts layer as engines see them: one layer, however many there are.

vLLM and SGLang put gate (w1) and up (w3) of an expert into one weight, ``w13``, and requantize it to the larger of the
two scales (``CompressedTensorsW8A8Fp8MoEMethod``, ``ModelOptFp8MoEMethod``; recorded in ``tests/loader_matrix.json``
under ``others``). They take the scheme of a layer's first expert for all of its projections.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import groupby

from rewrite.loaders.layer import Layer, Part, SeenLayout, is_nvfp4, seen_layout
from rewrite.quantization.dtypes import decode
from rewrite.quantization.groups import Module
from rewrite.quantization.model import Model

#: Of a stored expert: the layer's experts, the number, the projection.
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)")
_GATE, _UP = ("gate_proj", "w1"), ("up_proj", "w3")


def is_expert(module: str) -> bool:
    """Whether the module is a projection of an expert, by its name."""
    return ".experts." in module


def expert_layers(model: Model, *, nvfp4_only: bool = False) -> Iterator[Layer]:
    """The experts of every layer of the language model; with ``nvfp4_only`` no scale of other layers is read."""
    kinds = [kind for kind in model.kinds if is_expert(kind.form.pattern)]
    if nvfp4_only and all(kind.first.weight.dtype != "U8" for kind in kinds):
        return
    named = ((name, model.module(name)) for kind in kinds for name in kind.names)
    found = ((match, module) for name, module in named if (match := _EXPERT.fullmatch(name)))
    by_layer = sorted(
        ((match[1], int(match[2]), match[3], module) for match, module in found if not match[1].startswith("mtp.")),
        key=lambda each: each[:3],
    )
    for layer, own in groupby(by_layer, key=lambda each: each[0]):
        projections = {(number, projection): module for _, number, projection, module in own}
        first = next(iter(projections.values()))
        if nvfp4_only and first.nvfp4 is None:
            continue
        yield _layer(layer, projections, model)


def _layer(name: str, projections: dict[tuple[int, str], Module], model: Model) -> Layer:
    """Gate and up have the scales (of NVFP4: global, to multiply with) of the expert whose two are furthest apart;
    None where there is not one for each. Without gate there is one part: nothing is joined (Nemotron-H: relu2)."""
    modules = list(projections.values())
    gate = next((module for (_, kind), module in projections.items() if kind in _GATE), None)
    first = gate or modules[0]
    scheme, (rows, columns) = first.scheme, first.weight.shape
    packed = {None if module.nvfp4 is None else module.nvfp4.divides for module in modules}
    divides = packed.pop() if len(packed) == 1 else None
    nvfp4 = divides is not None
    comparable = nvfp4 or (modules[0].fp8 and all(module.layout == "tensor" for module in modules))
    furthest, *scales = _furthest(projections, model) if comparable else ("", None, None)
    stored = first.scale or first.block_scale
    dtype = "F32" if nvfp4 else stored.dtype if stored else ""
    kinds = {(module.scheme, module.weight.dtype, module.layout) for module in modules}
    alike = len(kinds) == 1 and _inputs_alike(projections, model)
    layout: SeenLayout = "other"
    if all(module.plain for module in modules):
        layout = "none"
    elif alike:
        layout = "nvfp4" if nvfp4 and is_nvfp4(scheme) else seen_layout(first, dtype, model)
    named = zip(("gate", "up"), scales, strict=True) if gate else [("up", None)]
    return Layer(
        name,
        "experts",
        tuple(Part(part, f"{name}.{part}", rows, layout, scale, dtype) for part, scale in named),
        columns * 2 if nvfp4 else columns,
        scheme is not None and (scheme.activations == "static" or (nvfp4 and scheme.activations != "none")),
        experts=len({number for number, _ in projections}),
        token_activations=scheme is not None and scheme.per_token,
        furthest=furthest,
        divides=divides,
        alike=alike,
    )


def _furthest(projections: dict[tuple[int, str], Module], model: Model) -> tuple[str, float | None, float | None]:
    """The expert where the scales of gate and up differ most, and these two."""
    gates, ups = (
        {number: module for (number, kind), module in projections.items() if kind in kinds} for kinds in (_GATE, _UP)
    )
    if gates.keys() != ups.keys() or not gates:
        return "", None, None
    values = _values([*gates.values(), *ups.values()], model)
    pairs = {number: (values[gates[number].name], values[ups[number].name]) for number in gates}
    number = max(pairs, key=lambda each: _apart(pairs[each]))
    return gates[number].name.rpartition(".")[0], *pairs[number]


def _inputs_alike(projections: dict[tuple[int, str], Module], model: Model) -> bool:
    """Whether gate and up of each expert have the same input scale, to the bit, or none, or may have two: not in
    compressed-tensors (vLLM 0.32 ``routed_experts.py``, SGLang 0.5.23 ``layer.py``: both raise)."""
    if model.dialect.name == "fp8" or model.dialect.name.startswith("modelopt"):
        return True
    tensors = model.checkpoint.tensors
    named = {(number, module.name) for (number, kind), module in projections.items() if kind in (*_GATE, *_UP)}
    scales = {
        full: number
        for number, name in named
        for kind in ("input_scale", "input_global_scale")
        if (full := f"{name}.{kind}") in tensors
    }
    found: dict[int, set[bytes]] = {}
    for info, raw in model.checkpoint.read_tensors(tensors[name] for name in scales):
        found.setdefault(scales[info.name], set()).add(raw)
    return all(len(values) == 1 for values in found.values())


def _values(modules: Iterable[Module], model: Model) -> dict[str, float]:
    """The scale of each module, to multiply with."""
    scales = {info.name: m for m in modules if (info := m.nvfp4.scale if m.nvfp4 else m.scale) is not None}
    return {
        (module := scales[info.name]).name: module.nvfp4.multiplier(raw)
        if module.nvfp4
        else decode(info.dtype, raw, info.name)[0]
        for info, raw in model.checkpoint.read_tensors(model.checkpoint.tensors[name] for name in scales)
    }


def _apart(pair: tuple[float, float]) -> float:
    smaller, larger = sorted(pair)
    return larger / smaller if smaller > 0 else float("inf")
