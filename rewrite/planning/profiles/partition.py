"""``partition``: a vector of one scale per partition, ``[P]``, where several partitions share a module."""

from __future__ import annotations

from rewrite.planning.profiles.base import Builder, Changes, Profile, affected_groups
from rewrite.promise import Promise
from rewrite.quantization.groups import Selection
from rewrite.quantization.model import Model


def _plan(model: Model, selection: Selection) -> Changes:
    """The config stays. Layers that are stored fused (Phi-3) stay as well: they lose nothing as they are, and no loader
    reads a vector there; nor beside a module with a scale for every row."""
    chosen = [
        (group, shared)
        for group, modules in affected_groups(model, selection)
        if len(group.modules) > 1
        and all(module.layout in ("tensor", "partition") for module in group.modules)
        and (shared := [m for m in modules if len(m.partitions) > 1 and m.layout == "tensor"])
    ]
    builder = Builder(model, (module for _, modules in chosen for module in modules), keep_inputs=True)
    for group, modules in chosen:
        builder.group(group.name, (builder.vector(module) for module in modules))
        for module in modules:
            builder.keep_input_scale(module)
            builder.scheme(module.name, "tensor")  # no dialect has another word for a vector
    return builder.changes(model.dialect)


PARTITION = Profile(
    name="partition",
    summary="a vector of one scale for each partition, for SGLang from 0.5.11",
    plan=_plan,
    promise=Promise(scale="partition", vectors=True),
    closing="{modules} in {groups} made a vector",
)
