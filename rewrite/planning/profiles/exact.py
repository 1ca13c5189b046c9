"""``exact`` and ``dynamic``: one scale for every row of the fused groups; no other layer changes."""

from __future__ import annotations

from functools import partial

from rewrite.planning.profiles.base import (
    Builder,
    Changes,
    Profile,
    affected_groups,
    fused_plain,
    modules_by_target,
)
from rewrite.promise import Promise
from rewrite.quantization.groups import Selection
from rewrite.quantization.model import Model


def _plan(model: Model, selection: Selection, *, per_token: bool) -> Changes:
    affected = affected_groups(model, selection, per_token=per_token)
    if not affected:
        return Changes()
    every_module = (module for _, modules in affected for module in modules)
    builder = Builder(model, every_module, keep_inputs=not per_token)
    for group, modules in affected:
        implicit = (module for module in modules if module.layout != "channel" and not module.has_rows)
        builder.group(group.name, (builder.channel(module) for module in implicit))
        for module in modules:
            builder.scheme(module.name, "channel", per_token=per_token)
            if per_token:
                builder.drop(module.input_scale)
            else:
                builder.keep_input_scale(module)
    dialect = model.dialect.as_compressed_tensors(model.layers)
    targets = modules_by_target(affected)
    if not per_token:
        return builder.changes(dialect.with_channel_scales(targets, model.layers))
    plain = fused_plain(model)
    return builder.changes(dialect.with_channel_scales(targets, model.layers, per_token=True, fused_plain=plain))


#: The engines' own choice of kernels, run with the platform mocked, without a GPU (tests/kernel_choice.json): what they
#: have for channel scales narrows a scale without dimensions; SGLang's own kernel refuses it for more than one token.
_NO_KERNEL = (
    "These engines have no kernel for OUT and stop at the first token: vLLM on CPU and ROCm, SGLang before 0.5.18 "
    "(ROCm: 0.5.23). For them use --profile dynamic."
)

EXACT = Profile(
    name="exact",
    summary="explicit scales for the fused layers; quantized weights stay as they are",
    plan=partial(_plan, per_token=False),
    promise=Promise(scale="channel", nvfp4="folded"),
    nvfp4="fold",
    closing="{modules} in {groups} made explicit",
    notes={"static": _NO_KERNEL},
)
DYNAMIC = Profile(
    name="dynamic",
    summary="explicit scales for the fused layers, whose activations are quantized per token",
    plan=partial(_plan, per_token=True),
    promise=Promise(scale="channel", input_scale="dropped", nvfp4="folded"),
    nvfp4="fold",
    closing="{modules} in {groups} made explicit, dynamic activations",
    notes={"dynamic": "activations of the fused layers are now dynamic, per token: outputs differ slightly"},
)
