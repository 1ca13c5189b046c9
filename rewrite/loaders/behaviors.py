"""What loaders make of one fused group: pure functions from a :class:`Layer` to an :class:`Outcome`."""

from __future__ import annotations

from collections.abc import Callable
from math import log, sqrt

from rewrite.loaders.layer import Layer
from rewrite.loaders.nvfp4 import LATENT, served_with
from rewrite.loaders.outcome import E4M3_ROUNDING, Outcome

Behavior = Callable[[Layer], Outcome]
OTHER_FORMAT = Outcome(
    "not known", "no loader was run with this scheme: not FP8, weights only, or several in one layer"
)
Slots = tuple[float | None, ...]  # None: the sentinel that the slot was created with


def slot_zero_only(layer: Layer) -> Outcome:
    """vLLM 0.17 to 0.19.1, ``MergedColumnParallelLinear.weight_loader_v2``: a per-tensor scale for several partitions
    is loaded with ``shard_id=0`` (issue #38197)."""
    return _unless_per_tensor(layer) or _requantized(layer, fill_slot_zero(layer))


def every_slot(layer: Layer) -> Outcome:
    """vLLM from 0.20.0 (PR #38517): the scale goes into every slot that the tuple of shard ids names."""
    return _unless_per_tensor(layer) or _requantized(layer, fill_every_slot(layer))


def every_slot_or_vector(layer: Layer) -> Outcome:
    """SGLang from 0.5.11: as :func:`every_slot`, and a vector fills one slot each, but of a layer that is stored fused.

    Qwen3-Next's ``in_proj_qkvz`` gets four slots there, its ``in_proj_ba`` two, and a scale of one value does not fit.
    """
    layouts = {p.layout for p in layer.parts}
    if "other" in layouts:
        return OTHER_FORMAT
    if (
        _is_stored_gated_delta_net(layer)
        and layouts != {"none"}
        and (layouts == {"tensor"} or layer.static_activations)
    ):
        return Outcome("fails to load", f"has several slots for the one scale of {layer.kind} (Shape mismatch)")
    if layer.kind == LATENT and layouts == {"tensor"} and (first := layer.parts[0].scale):
        return served_with(layer, first)
    if not layer.experts and layouts <= {"tensor", "partition"} and len({p.module for p in layer.parts}) > 1:
        return _requantized(layer, fill_every_slot(layer))
    return every_slot(layer)


def split_by_sizes(layer: Layer) -> Outcome:
    """SGLang 0.5.10: every tensor of the stored ``in_proj_qkv`` is split by the partitions' sizes; one value cannot be.

    Only Qwen3.5's: Qwen3-Next's ``in_proj_qkvz`` is one plain ``ColumnParallelLinear`` (``models/qwen3_next.py``).
    """
    if not _is_gated_delta_net(layer) or any(p.layout == "other" for p in layer.parts):
        return every_slot(layer)
    if any(p.layout == "tensor" for p in layer.parts):
        return Outcome("fails to load", "splits the shared weight_scale by the partitions' sizes")
    if layer.static_activations and any(p.layout != "none" for p in layer.parts):
        return Outcome("fails to load", "splits the shared input_scale by the partitions' sizes")
    return every_slot(layer)


def separate_modules(layer: Layer) -> Outcome:
    """Loaders that do not fuse: transformers with compressed-tensors."""
    if any(p.layout == "other" for p in layer.parts):
        return OTHER_FORMAT
    if any(p.layout in ("partition", "unknown") for p in layer.parts):
        return Outcome("fails to load", "takes one scale for a module, or one for each row")
    return Outcome("exact", "does not fuse")


def separate_gated_delta_net(layer: Layer) -> Outcome:
    """SGLang up to 0.5.9: ``in_proj_qkv`` and ``in_proj_z`` stay apart, attention and MLPs are fused."""
    return separate_modules(layer) if _is_gated_delta_net(layer) else every_slot(layer)


def _is_gated_delta_net(layer: Layer) -> bool:
    """Qwen3.5's, stored as two modules."""
    return layer.kind == "in_proj_qkvz" and len(layer.parts) > 1


def _is_stored_gated_delta_net(layer: Layer) -> bool:
    """Qwen3-Next's, stored as one (SGLang ``models/qwen3_next.py``: ``_override_weight_loader`` of both layers)."""
    return layer.kind in ("in_proj_qkvz", "in_proj_ba") and len(layer.parts) == 1


def fill_slot_zero(layer: Layer) -> Slots:
    """Each module's scale in the slot of the module's first partition."""
    seen: set[str] = set()
    slots: list[float | None] = []
    for p in layer.parts:
        slots.append(None if p.module in seen else p.scale)
        seen.add(p.module)
    return tuple(slots)


def fill_every_slot(layer: Layer) -> Slots:
    """Each partition's scale in the partition's slot; of a layer that is stored fused (Phi-3) in slot zero only."""
    if len({p.module for p in layer.parts}) == 1:
        return fill_slot_zero(layer)
    return tuple(p.scale for p in layer.parts)


def saturation(layer: Layer) -> float:
    """By what factor weights are too large when they saturate, estimated without reading them.

    The sentinel -3.4e38 turns every weight into ∓448 times the group's largest scale. Among n normally distributed
    weights the largest, which 448 stands for, is about sqrt(2 ln n) standard deviations. Partitions that are smaller
    than their module's largest are off by more.
    """
    return sqrt(2 * log(max(2, sum(p.rows for p in layer.parts) * layer.columns)))


def may_be_refused(layer: Layer) -> bool:
    """Whether a layer has several schemes, or experts one that was not run: engines raise on some of these (vLLM and
    SGLang ``_resolve_quant_algo``, ``get_moe_method``: "Mixed quant_algo", "need to have same quantization scheme"),
    whatever the other layers are."""
    layouts = {p.layout for p in layer.parts}
    return "other" in layouts and (len(layouts) > 1 or layer.experts > 0)


def _unless_per_tensor(layer: Layer) -> Outcome | None:
    """The outcome for every layout but one value a module, which is where fusing loaders differ."""
    layouts = {p.layout for p in layer.parts}
    if "other" in layouts:
        return OTHER_FORMAT
    if layer.experts and layouts in ({"tensor"}, {"channel"}):
        return _expert_scheme(layer, layouts.pop())
    if layouts == {"tensor"}:
        return None
    if "partition" in layouts or "unknown" in layouts:
        return Outcome("fails to load", "expects one weight_scale for a module (AssertionError)")
    if len(layouts) > 1:
        mix = ", ".join(sorted(layouts)).replace("none", "not quantized")
        return Outcome("fails to load", f"has one scheme for the whole fused layer, not {mix}")
    return Outcome("exact")


def _expert_scheme(layer: Layer, layout: str) -> Outcome | None:
    """Experts have two FP8 schemes: one scale a weight with one for all tokens, or channel scales with one for each
    token (vLLM 0.19.1 and 0.32.0 ``compressed_tensors_moe_w8a8_fp8.py``: AssertionError for others)."""
    if layer.token_activations != (layout == "channel"):
        return Outcome("fails to load", f"has no scheme for experts with {layout} scales and such activations")
    return Outcome("exact") if layout == "channel" else None


def _requantized(layer: Layer, slots: Slots) -> Outcome:
    """``requantize_with_max_scale`` (vLLM and SGLang, ``w8a8_utils.py``): all partitions go to the largest scale.

    A last slot that still holds the sentinel means "fused on disk": nothing is requantized.
    """
    filled = [scale for scale in slots if scale is not None]
    if not filled:
        return Outcome("fails to load", "finds no scale")
    if slots[-1] is None:
        return Outcome("exact")
    named = list(zip(slots, layer.parts, strict=True))
    garbled = tuple(p.name for scale, p in named if scale is None)
    if garbled:
        factor = saturation(layer)
        return Outcome(
            "garbled", f"weights saturate with the wrong sign, about {factor:.0f}x too large", garbled, factor
        )
    lossy = tuple(p.name for scale, p in named if scale != max(filled))
    if lossy:
        return Outcome("loses precision", f"up to {E4M3_ROUNDING:.1%} of each weight", lossy, E4M3_ROUNDING)
    return Outcome("exact")
