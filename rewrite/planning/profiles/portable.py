"""``portable``: channel scales for every FP8 layer, activations dynamic per token; other formats stay."""

from __future__ import annotations

from rewrite.planning.profiles.base import (
    Builder,
    Changes,
    Profile,
    affected_groups,
    check_scheme,
    fused_plain,
)
from rewrite.promise import Promise
from rewrite.quantization.groups import Selection, is_table
from rewrite.quantization.model import Model
from rewrite.quantization.scales import known_layout


def _plan(model: Model, selection: Selection) -> Changes:
    """Layers with block scales stay, since every known loader reads these right; so do tables of embeddings."""
    grouped = {module.name: module for group in model.select(selection) for module in group.modules}
    names = (name for name in sorted(model.layers.fp8) if not is_table(name))
    found = [grouped.get(name) or model.module(name) for name in names]
    layouts = {module.name: known_layout(module) for module in found}
    modules = [module for module in found if layouts[module.name] != "block"]
    if all(layouts[module.name] == "channel" and not module.is_static for module in modules):
        return Changes()
    affected_groups(model, selection)  # refuses groups that are quantized in part
    builder = Builder(model, modules)
    for module in modules:
        check_scheme(module, model)
        if layouts[module.name] != "channel":
            builder.group(module.name, [builder.reshape(module) if module.has_rows else builder.channel(module)])
        builder.drop(module.input_scale)
        builder.scheme(module.name, "channel", per_token=True)
    dialect = model.dialect.as_compressed_tensors(model.layers)
    converted = [module.name for module in modules]
    return builder.changes(dialect.portable(converted, model.layers, fused_plain(model)))


PORTABLE = Profile(
    name="portable",
    summary="a scale for every row of every FP8 layer, activations quantized per token",
    plan=_plan,
    promise=Promise(scale="channel", input_scale="dropped", every_layer=True, nvfp4="folded"),
    nvfp4="fold",
    closing="{layers} with a scale for every row, dynamic activations",
    notes={"dynamic": "activations are now quantized dynamically, per token: outputs differ slightly from static ones"},
)
