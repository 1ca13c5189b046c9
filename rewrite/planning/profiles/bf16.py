"""``bf16``: the fused groups dequantized: what every loader reads, also where a group was quantized in part."""

from __future__ import annotations

from collections.abc import Iterator

from rewrite.errors import Unsupported
from rewrite.planning.profiles.base import Affected, Builder, Changes, Profile, check_scheme, modules_by_target
from rewrite.promise import Promise
from rewrite.quantization.dtypes import model_dtype
from rewrite.quantization.groups import FusedGroup, Module, Selection
from rewrite.quantization.model import Model
from rewrite.quantization.patterns import Patterns
from rewrite.quantization.scales import known_layout
from rewrite.quantization.scheme import Dequantized
from rewrite.quantization.targets import fitting_target


def _plan(model: Model, selection: Selection) -> Changes:
    chosen = [(group, modules) for group in model.select(selection) if (modules := tuple(_to_dequantize(group, model)))]
    if not chosen:
        return Changes()
    dtype = model_dtype(model.checkpoint.config.value)
    builder = Builder(model, (module for _, modules in chosen for module in modules))
    for group, modules in chosen:
        builder.group(group.name, [builder.plain(module, dtype) for module in modules])
    plain = Dequantized(
        modules=tuple(module.name for _, modules in chosen for module in modules),
        fused=tuple(group.name for group, _ in chosen),
        targets=tuple(_targets(chosen, model)),
    )
    return builder.changes(model.dialect.without(plain))


def _targets(chosen: Affected, model: Model) -> Iterator[str]:
    """Patterns for what becomes plain, narrowed where they would match a module that stays quantized. One that cannot
    be narrowed comes as it is: the check of the plan refuses it."""
    plain = {module.name for _, modules in chosen for module in modules}
    patterns = Patterns()
    for target, names in modules_by_target(chosen).items():

        def strays(candidate: str) -> list[str]:
            return [n for n in model.layers.quantized if n not in plain and patterns.matches(candidate, n)]

        yield fitting_target(target, names, strays) or target


def _to_dequantize(group: FusedGroup, model: Model) -> list[Module]:
    """The quantized modules of a group; none where a scale is for a block, which every loader reads right."""
    quantized = [module for module in group.modules if module.fp8]
    if any(known_layout(module) == "block" for module in quantized):
        return []
    for module in quantized:
        if known_layout(module) in ("channel", "rows"):
            raise Unsupported(
                "A scale for every row is not dequantized",
                where=group.name,
                expected="one scale for each module or partition",
                hint="convert the checkpoint that this one was made from",
            )
        check_scheme(module, model)
    return quantized


BF16 = Profile(
    name="bf16",
    summary="the fused layers dequantized to the dtype of the model",
    plan=_plan,
    promise=Promise(scale="dropped", weight="plain", input_scale="dropped", part_of_group=True),
    closing="{layers} in {groups} dequantized",
)
