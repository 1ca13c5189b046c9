"""What each known loader version makes of a fused group, as small pure functions: the prediction.

A behaviour is a function from a :class:`GroupView` to an :class:`Outcome`; :data:`LOADERS` says which version has
which. The recorded runs of the real loaders (tests/loader_matrix.json) are what these functions must agree with.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import log, sqrt
from typing import Literal

Kind = Literal["exact", "loses precision", "garbled", "fails to load"]
SEVERITY: tuple[Kind, ...] = ("exact", "loses precision", "garbled", "fails to load")

#: The magnitude of what engines create scale slots with (the least finite float32).
SENTINEL = 3.4e38
#: One rounding to e4m3 (three mantissa bits) moves a normal value by at most half a unit in the last place.
E4M3_ROUNDING = 2.0**-4


@dataclass(frozen=True)
class PartitionView:
    """A partition as a loader sees it. ``layout`` is that of its module's scale; "none": not quantised."""

    name: str
    module: str
    rows: int
    layout: Literal["none", "tensor", "partition", "channel", "block", "unknown"]
    scale: float | None  # None for layouts with more than one value a partition
    scale_dtype: str = "BF16"


@dataclass(frozen=True)
class GroupView:
    """A fused group as a loader sees it, partitions in slot order. ``layer`` is the fused layer's name."""

    name: str
    layer: str
    partitions: tuple[PartitionView, ...]
    columns: int
    static_activations: bool


@dataclass(frozen=True)
class CheckpointView:
    """A checkpoint as a loader sees it. ``dtype`` is the model's; ``fp8_with_scales`` says whether any layer is FP8 and
    has a ``weight_scale``, one of a fused group or not; ``ignore_survives_renaming`` whether the config still leaves
    the unquantised parts of a fused layer alone when modules are looked up under other names."""

    model_type: str
    dialect: str
    dtype: str
    fp8_with_scales: bool
    ignore_survives_renaming: bool
    groups: tuple[GroupView, ...]


@dataclass(frozen=True)
class Outcome:
    """What a loader serves. ``error`` is the relative error of the weights of the worst partition: a bound where
    precision is lost, an estimate (see :func:`saturation`) where weights are garbled. ``partitions`` names those that
    are hurt: ``z`` of one group, ``in_proj_qkvz.z`` of a checkpoint."""

    kind: Kind
    detail: str = ""
    partitions: tuple[str, ...] = ()
    error: float = 0.0

    @property
    def severity(self) -> int:
        return SEVERITY.index(self.kind)


Behaviour = Callable[[GroupView], Outcome]
Obstacle = Callable[[CheckpointView], Outcome | None]  # what a loader makes of the whole checkpoint, before any group
Slots = tuple[float | None, ...]  # None: the sentinel that the slot was created with


def slot_zero_only(group: GroupView) -> Outcome:
    """vLLM 0.17 to 0.19.1, ``MergedColumnParallelLinear.weight_loader_v2``: a per-tensor scale for several partitions
    is loaded with ``shard_id=0`` (issue #38197)."""
    return _unless_per_tensor(group) or _requantised(group, fill_slot_zero(group))


def every_slot(group: GroupView) -> Outcome:
    """vLLM from 0.20.0 (PR #38517): the scale goes into every slot that the tuple of shard ids names."""
    return _unless_per_tensor(group) or _requantised(group, fill_every_slot(group))


def every_slot_or_vector(group: GroupView) -> Outcome:
    """SGLang from 0.5.11: as :func:`every_slot`, and a vector fills one slot each, but of a layer that is stored fused.

    Qwen3-Next's ``in_proj_qkvz`` gets four slots there, and a scale of one value does not fit them.
    """
    layouts = {p.layout for p in group.partitions}
    if (
        _is_stored_gated_delta_net(group)
        and layouts != {"none"}
        and (layouts == {"tensor"} or group.static_activations)
    ):
        return Outcome("fails to load", "has four slots for the one scale of in_proj_qkvz (Shape mismatch)")
    if layouts <= {"tensor", "partition"} and len({p.module for p in group.partitions}) > 1:
        return _requantised(group, fill_every_slot(group))
    return every_slot(group)


def split_by_sizes(group: GroupView) -> Outcome:
    """SGLang 0.5.10: every tensor of the stored ``in_proj_qkv`` is split by the partitions' sizes; one value cannot be.

    Only Qwen3.5's: Qwen3-Next's ``in_proj_qkvz`` is one plain ``ColumnParallelLinear`` (``models/qwen3_next.py``).
    """
    if not _is_gated_delta_net(group):
        return every_slot(group)
    if any(p.layout == "tensor" for p in group.partitions):
        return Outcome("fails to load", "splits the shared weight_scale by the partitions' sizes")
    if group.static_activations and any(p.layout != "none" for p in group.partitions):
        return Outcome("fails to load", "splits the shared input_scale by the partitions' sizes")
    return every_slot(group)


def separate_modules(group: GroupView) -> Outcome:
    """Loaders that do not fuse: transformers with compressed-tensors."""
    if any(p.layout in ("partition", "unknown") for p in group.partitions):
        return Outcome("fails to load", "takes one scale for a module, or one for each row")
    return Outcome("exact", "does not fuse")


def separate_gated_delta_net(group: GroupView) -> Outcome:
    """SGLang up to 0.5.9: ``in_proj_qkv`` and ``in_proj_z`` stay apart, attention and MLPs are fused."""
    return separate_modules(group) if _is_gated_delta_net(group) else every_slot(group)


def _is_gated_delta_net(group: GroupView) -> bool:
    """Qwen3.5's, stored as two modules."""
    return group.layer == "in_proj_qkvz" and len(group.partitions) > 1


def _is_stored_gated_delta_net(group: GroupView) -> bool:
    """Qwen3-Next's, stored as one."""
    return group.layer == "in_proj_qkvz" and len(group.partitions) == 1


def unknown(detail: str, *model_types: str) -> Obstacle:
    """Loaders that were released before these models, or know others of the family only."""

    def obstacle(checkpoint: CheckpointView) -> Outcome | None:
        return Outcome("fails to load", detail) if checkpoint.model_type in model_types else None

    return obstacle


text_only_is_unknown = unknown("knows Qwen3.5 with a vision tower only", "qwen3_5_text", "qwen3_5_moe_text")
minicpmv_is_unknown = unknown("does not know MiniCPM-V 4.6", "minicpmv4_6")


def minicpmv_vision_is_cast(checkpoint: CheckpointView) -> Outcome | None:
    """SGLang before 0.5.23 calls MiniCPM-V's vision tower ``vpm`` and its merger ``resampler``: the names in ``ignore``
    miss them, their BF16 layers get FP8 parameters, and loading those raises ("Downcasting not allowed")."""
    if checkpoint.model_type == "minicpmv4_6" and checkpoint.fp8_with_scales:
        return Outcome("fails to load", "takes the vision tower for quantised: it has other names there")
    return None


def mixed_is_unknown(checkpoint: CheckpointView) -> Outcome | None:
    """SGLang before 0.5.15 takes MIXED_PRECISION of all models but Nemotron-H for another format, ``w4afp8``."""
    if checkpoint.dialect == "modelopt MIXED_PRECISION":
        return Outcome("fails to load", "takes MIXED_PRECISION for w4afp8")
    return None


def ignore_must_survive_renaming(checkpoint: CheckpointView) -> Outcome | None:
    """SGLang 0.5.9 and 0.5.10 rename the entries of ``ignore``, but not the modules: exact names miss, the BF16
    ``in_proj_ba`` gets an FP8 parameter, and 0.5.9 refuses to load it ("Downcasting not allowed")."""
    if checkpoint.dialect == "compressed-tensors" and not checkpoint.ignore_survives_renaming:
        return Outcome("fails to load", "takes in_proj_ba for quantised: exact names in ignore miss it")
    return None


def parts_are_cast(checkpoint: CheckpointView) -> Outcome | None:
    """SGLang 0.5.10 misses the same names, but casts the BF16 ``in_proj_ba`` to FP8 without a word."""
    missed = ignore_must_survive_renaming(checkpoint)
    return missed and Outcome("garbled", "casts the BF16 in_proj_ba to FP8: exact names in ignore miss it")


def attention_is_cast(checkpoint: CheckpointView) -> Outcome | None:
    """SGLang 0.5.10 renames ``ignored_layers`` of ``fp8``, but not the modules: a BF16 ``qkv_proj`` of a
    vision-language model gets FP8 parameters whose scales are never set."""
    groups = [group for group in checkpoint.groups if group.layer == "qkv_proj" and "language_model." in group.name]
    plain = [p for group in groups for p in group.partitions if p.layout == "none"]
    if checkpoint.dialect != "fp8" or not checkpoint.fp8_with_scales or not plain:
        return None
    names = tuple(dict.fromkeys(f"qkv_proj.{p.name}" for p in plain))
    return Outcome("garbled", "casts the BF16 qkv_proj to FP8: the names in ignored_layers miss it", names, SENTINEL)


def scales_are_left_out(checkpoint: CheckpointView) -> Outcome | None:
    """transformers knows no ``quant_method: modelopt``, and takes ``fp8`` for block-wise: of per-tensor checkpoints it
    loads FP8 values and leaves the scales out. NVFP4 packs two weights a byte: matrices of half the width, which it
    refuses."""
    if checkpoint.dialect == "modelopt MIXED_PRECISION":
        return Outcome("fails to load", "takes packed NVFP4 weights for matrices of another shape")
    if checkpoint.dialect not in ("modelopt", "fp8") or not checkpoint.fp8_with_scales:
        return None
    quantised = [p for group in checkpoint.groups for p in group.partitions if p.layout not in ("none", "block")]
    if not quantised:
        return Outcome("garbled", "leaves the scales of the other layers out")
    factor = 1 / min(p.scale or 1.0 for p in quantised)
    detail = f"leaves the scales out: weights up to {factor:.0f}x too large"
    return Outcome("garbled", detail, _quantised_names(checkpoint), factor)


def scales_are_rounded(checkpoint: CheckpointView) -> Outcome | None:
    """transformers with compressed-tensors creates scales in the model's dtype: F32 scales are rounded to it."""
    partitions = [p for group in checkpoint.groups for p in group.partitions if p.layout != "none"]
    if checkpoint.dtype in ("BF16", "F16") and any(p.scale_dtype == "F32" for p in partitions):
        names = _quantised_names(checkpoint)
        error = 2.0**-8 if checkpoint.dtype == "BF16" else 2.0**-11
        return Outcome("loses precision", f"rounds F32 scales to {checkpoint.dtype}: up to {error:.1%}", names, error)
    return None


def _quantised_names(checkpoint: CheckpointView) -> tuple[str, ...]:
    named = ((group.layer, p) for group in checkpoint.groups for p in group.partitions)
    return tuple(dict.fromkeys(f"{layer}.{p.name}" for layer, p in named if p.layout != "none"))


def fill_slot_zero(group: GroupView) -> Slots:
    """Each module's scale in the slot of the module's first partition."""
    seen: set[str] = set()
    slots: list[float | None] = []
    for p in group.partitions:
        slots.append(None if p.module in seen else p.scale)
        seen.add(p.module)
    return tuple(slots)


def fill_every_slot(group: GroupView) -> Slots:
    """Each partition's scale in the partition's slot; of a layer that is stored fused (Phi-3) in slot zero only."""
    if len({p.module for p in group.partitions}) == 1:
        return fill_slot_zero(group)
    return tuple(p.scale for p in group.partitions)


def saturation(group: GroupView) -> float:
    """By what factor weights are too large when they saturate, estimated without reading them.

    The sentinel -3.4e38 turns every weight into ∓448 times the group's largest scale. Among n normally distributed
    weights the largest, which 448 stands for, is about sqrt(2 ln n) standard deviations. Partitions that are smaller
    than their module's largest are off by more.
    """
    return sqrt(2 * log(max(2, sum(p.rows for p in group.partitions) * group.columns)))


def _unless_per_tensor(group: GroupView) -> Outcome | None:
    """The outcome for every layout but one value a module, which is where fusing loaders differ."""
    layouts = {p.layout for p in group.partitions}
    if layouts == {"tensor"}:
        return None
    if "partition" in layouts or "unknown" in layouts:
        return Outcome("fails to load", "expects one weight_scale for a module (AssertionError)")
    if len(layouts) > 1:
        mix = ", ".join(sorted(layouts)).replace("none", "not quantised")
        return Outcome("fails to load", f"has one scheme for the whole fused layer, not {mix}")
    return Outcome("exact")


def _requantised(group: GroupView, slots: Slots) -> Outcome:
    """``requantize_with_max_scale`` (vLLM and SGLang, ``w8a8_utils.py``): all partitions go to the largest scale.

    A last slot that still holds the sentinel means "fused on disk": nothing is requantised.
    """
    filled = [scale for scale in slots if scale is not None]
    if not filled:
        return Outcome("fails to load", "finds no scale")
    if slots[-1] is None:
        return Outcome("exact")
    named = list(zip(slots, group.partitions, strict=True))
    garbled = tuple(p.name for scale, p in named if scale is None)
    if garbled:
        factor = saturation(group)
        return Outcome(
            "garbled", f"weights saturate with the wrong sign, about {factor:.0f}x too large", garbled, factor
        )
    lossy = tuple(p.name for scale, p in named if scale != max(filled))
    if lossy:
        return Outcome("loses precision", f"up to {E4M3_ROUNDING:.1%} of each weight", lossy, E4M3_ROUNDING)
    return Outcome("exact")


def _qualified(outcome: Outcome, layer: str) -> Outcome:
    return replace(outcome, partitions=tuple(f"{layer}.{name}" for name in outcome.partitions))


@dataclass(frozen=True)
class Loader:
    """A range of released versions with one behaviour. ``last`` None: up to the newest that was run."""

    name: str
    first: str
    last: str | None
    behaviour: Behaviour
    source: str
    obstacles: tuple[Obstacle, ...] = ()  # end the load before any group is looked at
    caveats: tuple[Obstacle, ...] = ()  # come on top of what is made of the groups

    @property
    def versions(self) -> str:
        return self.versions_from(self)

    def versions_from(self, earlier: Loader) -> str:
        """The versions of ``earlier`` and of all rows up to this one, in words."""
        if self.last is None:
            return f"{earlier.first}+"
        return self.last if earlier.first == self.last else f"{earlier.first} to {self.last}"

    def covers(self, version: str) -> bool:
        return _key(self.first) <= _key(version) and (self.last is None or _key(version) <= _key(self.last))

    def predict(self, checkpoint: CheckpointView) -> Outcome:
        """The worst over all groups, naming every partition that is hurt that way."""
        if not checkpoint.groups:
            return Outcome("exact")
        met = (obstacle(checkpoint) for obstacle in self.obstacles)
        outcomes = [outcome for outcome in met if outcome is not None]
        if not outcomes:
            outcomes = [_qualified(self.behaviour(group), group.layer) for group in checkpoint.groups]
            outcomes += [outcome for caveat in self.caveats if (outcome := caveat(checkpoint)) is not None]
        worst = max(outcomes, key=lambda outcome: (outcome.severity, outcome.error))
        alike = [outcome for outcome in outcomes if outcome.kind == worst.kind]
        names = {name for outcome in alike for name in outcome.partitions}
        in_order = dict.fromkeys(f"{group.layer}.{p.name}" for group in checkpoint.groups for p in group.partitions)
        hurt = tuple(name for name in in_order if name in names)
        return Outcome(worst.kind, worst.detail, hurt, worst.error)


#: Every loader version that was run or read. One row each; the source says where the behaviour comes from.
LOADERS = (
    Loader(
        "vLLM",
        "0.17.0",
        "0.19.1",
        slot_zero_only,
        "issue #38197; run: 0.17.0, 0.17.1, 0.19.1",
        (text_only_is_unknown, minicpmv_is_unknown),
    ),
    Loader(
        "vLLM",
        "0.20.0",
        "0.21.0",
        every_slot,
        "PR #38517; run: 0.20.0, 0.21.0",
        (text_only_is_unknown, minicpmv_is_unknown),
    ),
    Loader("vLLM", "0.22.0", "0.26.0", every_slot, "run: 0.22.0, 0.26.0", (text_only_is_unknown,)),
    Loader("vLLM", "0.27.0", None, every_slot, "run: 0.27.0, 0.32.0"),
    Loader(
        "SGLang",
        "0.5.9",
        "0.5.9",
        separate_gated_delta_net,
        "run: 0.5.9",
        (text_only_is_unknown, minicpmv_is_unknown, mixed_is_unknown, ignore_must_survive_renaming),
    ),
    Loader(
        "SGLang",
        "0.5.10",
        "0.5.10.post1",
        split_by_sizes,
        "run: 0.5.10, 0.5.10.post1",
        (text_only_is_unknown, minicpmv_is_unknown, mixed_is_unknown),
        (parts_are_cast, attention_is_cast),
    ),
    Loader(
        "SGLang",
        "0.5.11",
        "0.5.11",
        every_slot_or_vector,
        "run: 0.5.11",
        (text_only_is_unknown, minicpmv_is_unknown, mixed_is_unknown),
    ),
    Loader(
        "SGLang",
        "0.5.12",
        "0.5.14",
        every_slot_or_vector,
        "run: 0.5.12, 0.5.14",
        (text_only_is_unknown, minicpmv_vision_is_cast, mixed_is_unknown),
    ),
    Loader(
        "SGLang",
        "0.5.15",
        "0.5.16",
        every_slot_or_vector,
        "run: 0.5.15, 0.5.16",
        (text_only_is_unknown, minicpmv_vision_is_cast),
    ),
    Loader("SGLang", "0.5.17", "0.5.22", every_slot_or_vector, "run: 0.5.17, 0.5.22", (minicpmv_vision_is_cast,)),
    Loader("SGLang", "0.5.23", None, every_slot_or_vector, "run: 0.5.23"),
    Loader(
        "transformers",
        "5.17.0",
        None,
        separate_modules,
        "run: 5.17.0 with compressed-tensors 0.20.0",
        (scales_are_left_out, scales_are_rounded),
    ),
)


def find_loaders(wanted: str) -> tuple[Loader, ...]:
    """The rows for ``NAME`` or ``NAME@VERSION``, the name in any case. Empty when nothing is known of it."""
    name, _, version = wanted.partition("@")
    rows = (loader for loader in LOADERS if loader.name.lower() == name.lower())
    return tuple(loader for loader in rows if not version or loader.covers(version))


def _key(version: str) -> tuple[int, ...]:
    """0.5.10 < 0.5.10.post1 < 0.5.11."""
    return tuple(int(number) for number in re.findall(r"\d+", version))
