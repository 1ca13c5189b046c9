"""``exact``: one scale for every row of the fused groups; nothing else changes."""

from __future__ import annotations

from rewrite.planning.profiles.base import Builder, Changes, Profile, affected_groups
from rewrite.promise import Promise
from rewrite.quantization.groups import Selection
from rewrite.quantization.model import Model


def _plan(model: Model, selection: Selection) -> Changes:
    affected = affected_groups(model, selection)
    if not affected:
        return Changes()
    builder = Builder(model, (module for _, modules in affected for module in modules))
    names = {module.name for _, modules in affected for module in modules}
    for group, modules in affected:
        builder.group(group.name, (builder.channel(module) for module in modules))
    for name in names:
        builder.scheme(name, "channel")
    targets = tuple(dict.fromkeys(group.layer.target for group, _ in affected))
    dialect = model.dialect.as_compressed_tensors(model.layers)
    return builder.changes(dialect.with_channel_scales(targets, names, model.layers))


EXACT = Profile(
    name="exact",
    summary="one scale for every row of the fused layers; nothing else changes",
    plan=_plan,
    promise=Promise(scale="channel"),
    closing="{modules} in {groups} made explicit",
)
