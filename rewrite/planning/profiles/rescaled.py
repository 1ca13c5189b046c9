"""``rescaled``: fused NVFP4 layers with one global scale, and no other layer changes, not even what follows them."""

from __future__ import annotations

from rewrite.planning.profiles.base import Changes, Profile
from rewrite.promise import Promise
from rewrite.quantization.groups import Selection
from rewrite.quantization.model import Model


def _plan(_model: Model, _selection: Selection) -> Changes:
    """FP8 layers stay as they are."""
    return Changes()


RESCALED = Profile(
    name="rescaled",
    summary="one global scale for fused NVFP4 layers, by their own block scales; FP8 layers stay",
    plan=_plan,
    promise=Promise(scale="kept", nvfp4="rescaled"),
    closing="",
    nvfp4="rescale",
)
