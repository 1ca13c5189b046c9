"""What loaders make of a fused group of NVFP4 modules: how many global scales they keep of those that are stored.

Kernels multiply a fused layer with one global scale. Where the modules have different ones, all weights but those of
one module are served too large or too small, by the ratio of two scales; block scales and codes stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from rewrite.loaders.layer import Layer
from rewrite.loaders.outcome import E4M3_ROUNDING, SENTINEL, Outcome

LATENT = "fused_qkv_a_proj"  # of DeepSeek: SGLang takes the scale of its first part (``deepseek_weight_loader.py``)
#: What is made of a group whose global scales are positive numbers.
Nvfp4Behavior = Callable[[Layer], Outcome]


def not_run(_layer: Layer) -> Outcome:
    """Versions that were not run with NVFP4."""
    return Outcome("not known", "this version was not run with NVFP4")


def one_global_scale(layer: Layer) -> Outcome:
    """vLLM 0.32, ``compressed_tensors_w4a4_nvfp4.py``: the largest divisor of the layer, so the smallest scale;
    ``modelopt.py``: the largest multiplier; of experts gate's, ``[:, 0]`` (``compressed_tensors_moe_w4a4_nvfp4.py``,
    ``ModelOptNvFp4FusedMoE``). It only warns."""
    return _unless_odd(layer) or served_with(layer, _taken(layer))


def unset_slots(layer: Layer) -> Outcome:
    """vLLM to 0.19.1: the same, but the one scale of a module that holds several partitions (``in_proj_qkv``, Phi-3's
    ``qkv_proj``) is loaded into the first slot of these (issue #38197). The others keep what memory held, and the
    largest number of all slots is taken."""
    if not layer.experts and len({p.module for p in layer.parts}) < len(layer.parts):
        names = tuple(p.name for p in layer.parts)
        return Outcome("garbled", "takes a global scale from memory that nothing has filled", names, SENTINEL)
    return one_global_scale(layer)


def one_or_refused(layer: Layer) -> Outcome:
    """SGLang 0.5.23: as :func:`one_global_scale`, but weight-only layers of compressed-tensors with different scales
    raise (``compressed_tensors_w4a16_nvfp4.py``), as do Qwen3-Next's layers that are stored fused
    (``qwen3_next.py``, ``_make_packed_weight_loader``). Experts were run with the code for Marlin (ModelOpt) and for
    CUTLASS (compressed-tensors); what others do is by the source: :data:`_OTHER_KERNELS`."""
    if layer.kind in ("in_proj_qkvz", "in_proj_ba") and len(layer.parts) == 1:
        if layer.divides:
            return Outcome("fails to load", f"looks for an unpacked weight of {layer.kind} (AttributeError)")
        return Outcome("not known", f"was not run with an NVFP4 {layer.kind} that is stored fused")
    odd = _unless_odd(layer)
    if odd is not None or _is_equal(layer):
        return odd or Outcome("exact")
    if layer.divides and not layer.static_activations:
        return Outcome("fails to load", "wants one global scale for all of a fused layer (Re-export the checkpoint)")
    found = served_with(layer, layer.parts[0].scale or 0) if layer.kind == LATENT else one_global_scale(layer)
    if layer.experts and found.kind != "exact":
        return replace(found, detail=f"{found.detail}; by its source, {_OTHER_KERNELS[bool(layer.divides)]}")
    return found


#: Of SGLang's experts, by whether their global scales are divisors: ``modelopt_quant.py`` (``_compute_gemm1_alphas``,
#: ``_build_mega_moe_weights``), ``arg_groups/model_overrides``; ``compressed_tensors_w4a16_nvfp4_moe.py``.
_OTHER_KERNELS = {
    False: "the kernels flashinfer_trtllm (the default of many models on B200) and megamoe take both scales",
    True: "cards before Blackwell refuse to load it",
}


def separate(layer: Layer) -> Outcome:
    """transformers with compressed-tensors does not fuse."""
    return _unless_odd(layer) or Outcome("exact", "does not fuse")


def _unless_odd(layer: Layer) -> Outcome | None:
    """The outcome for scales that loaders were not run with."""
    scales = [p.scale for p in layer.parts]
    if any(scale is None or not (math.isfinite(scale) and scale > 0) for scale in scales):
        return Outcome("not known", "a global scale is missing, or not a positive number")
    if _is_equal(layer) and len({p.input_scale for p in layer.parts}) > 1:
        return Outcome("not known", "the global scales of the activations differ")
    return None


def _is_equal(layer: Layer) -> bool:
    return len({p.scale for p in layer.parts}) == 1


def _taken(layer: Layer) -> float:
    scales = [p.scale for p in layer.parts if p.scale is not None]
    if layer.experts:
        return scales[0]
    return min(scales) if layer.divides else max(scales)


def served_with(layer: Layer, taken: float) -> Outcome:
    """With a scale that is not that of all parts, which nothing is requantized for."""
    factors = tuple((p.name, taken / p.scale) for p in layer.parts if p.scale and p.scale != taken)
    if not factors:
        return Outcome("exact")
    furthest = max((factor for _, factor in factors), key=lambda factor: abs(factor - 1))
    error = abs(furthest - 1)
    where = f"gate's, of {layer.furthest}" if layer.experts else layer.name
    names = tuple(name for name, _ in factors)
    return Outcome(
        "garbled" if error > E4M3_ROUNDING else "loses precision",
        f"takes one scale for the whole layer: weights are served {furthest:.3g} times as large ({where})",
        names,
        error,
        factors,
    )
