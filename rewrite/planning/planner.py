"""From a Model and a profile to a checked :class:`~rewrite.planning.plan.Plan`. Pure but for reading the scales."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from rewrite.card import BEGIN, MAX_BYTES, README_NAME
from rewrite.checkpoint.checkpoint import Checkpoint
from rewrite.errors import Refused, Unsupported, UsageError
from rewrite.ledger.fault import TITLES
from rewrite.ledger.values import left, value_faults
from rewrite.planning.check import check_plan, refuse_faults, refuse_values
from rewrite.planning.jobs import FileCopy, ShardPlan, TextFile
from rewrite.planning.kv_cache import without_kv_scales
from rewrite.planning.manifest import Chosen, Manifest, ManifestFile
from rewrite.planning.nvfp4 import repair, repair_notes
from rewrite.planning.plan import Plan
from rewrite.planning.preview import preview
from rewrite.planning.profiles import PROFILES
from rewrite.planning.profiles.base import Changes, Profile
from rewrite.planning.repairs import with_mended_config
from rewrite.planning.shards import plan_shard, touches
from rewrite.planning.side_files import new_index, new_texts, notes, stale_files
from rewrite.quantization.dialects.other import Other
from rewrite.quantization.groups import Selection, find_lookalikes, single_module
from rewrite.quantization.kv_cache import KV_SCALES, KvScales, kv_cache_scales
from rewrite.quantization.model import Model, interpret


@dataclass(frozen=True)
class Checked:
    """Changes that passed the check, with the model ``after`` them."""

    profile: Profile
    changes: Changes
    texts: tuple[TextFile, ...]
    left_out: tuple[FileCopy, ...]
    after: Model

    @property
    def changed(self) -> frozenset[str]:
        """The modules whose tensors or schemes change, by their names."""
        return frozenset(name.rpartition(".")[0] for name in self.changes.edits).union(self.changes.schemes)

    @property
    def dropped(self) -> tuple[str, ...]:
        """The tensors that OUT does not have."""
        return tuple(name for name, new in self.changes.edits.items() if new is None)


def plan_changes(model: Model, profile: str, selection: Selection, kv_scales: KvScales = "keep") -> Checked:
    """What a conversion would change, without laying the shards out.

    Raises :class:`rewrite.errors.Refused` for what cannot be converted with certainty.
    """
    if kv_scales not in KV_SCALES:
        raise UsageError("Unknown choice for the scales of the KV cache", expected="keep or drop", found=kv_scales)
    if profile not in PROFILES:
        raise UsageError("Unknown profile", expected=", ".join(PROFILES), found=profile)
    _refuse_lookalikes(model)
    model.select(selection)  # refuses a broken group, whatever the profile makes of the others
    if isinstance(model.dialect, Other) and model.dialect.value:
        model.dialect.as_compressed_tensors(model.layers)  # refuses: not even "nothing to do" is known of it
    chosen, files = PROFILES[profile], model.checkpoint.files
    changes = chosen.plan(model, selection).with_repair(repair(model, chosen.nvfp4))
    if kv_scales == "drop":
        changes = without_kv_scales(model, changes)
    changes = with_mended_config(model, changes)
    texts = tuple(new_texts(model, changes))
    left_out = tuple(FileCopy(name, files[name]) for name in stale_files(model, changes))
    if not changes.any:
        refuse_faults(model)
        return Checked(chosen, changes, texts, left_out, model)
    gone = [file.name for file in left_out]
    after = interpret(preview(model.checkpoint, changes.edits, texts, gone))
    check_plan(model, after, changes.schemes)
    return Checked(chosen, changes, texts, left_out, after)


def make_plan(
    model: Model,
    profile: str = "exact",
    selection: Selection = "qkvz",
    kv_scales: KvScales = "keep",
    chosen: Chosen | None = None,
    more_notes: Iterable[str] = (),
    checked: Checked | None = None,
) -> Plan:
    """Plan the conversion of a checkpoint. ``chosen``, with ``more_notes``: for whom the profile was chosen, where
    nobody named it. ``checked``: what :func:`plan_changes` says of the profile, where it was asked already; not of
    ``kv_scales``.

    Raises :class:`rewrite.errors.Refused` for what cannot be converted with certainty, before anything is written.
    """
    try:
        if checked is None or kv_scales != "keep":
            checked = plan_changes(model, profile, selection, kv_scales)
            _refuse_values(model, checked)
        checked = replace(checked, after=model)  # frees the model after the changes
    except Refused as refusal:
        raise refusal.with_hint(_way_out(model, profile, selection)) from refusal
    checkpoint, changes = model.checkpoint, checked.changes
    shards = tuple(
        plan_shard(shard, changes.edits) for shard in checkpoint.shards.values() if touches(changes.edits, shard)
    )
    texts = (*new_index(checkpoint, changes.edits), *checked.texts)
    written: tuple[ShardPlan | TextFile | FileCopy, ...] = (*shards, *texts, *checked.left_out)
    gone = {file.name for file in written}
    copies = tuple(FileCopy(name, file_id) for name, file_id in checkpoint.files.items() if name not in gone)
    manifest = Manifest(
        profile=profile,
        selection=selection,
        source=checkpoint.storage.name,
        groups=changes.groups,
        scales=changes.repair.changes,
        costs=changes.repair.losses,
        dropped=checked.dropped,
        kv_scales="dropped" if "kv-no-scale" in changes.mended or any(kv_cache_scales(checked.dropped)) else "kept",
        mended=changes.mended,
        renamed={old: new.name for old, new in changes.edits.items() if new is not None and new.name is not None},
        notes=(*more_notes, *_notes(model, checked, selection)),
        files=_manifest_files(shards, copies, texts),
        chosen=chosen,
    )
    return Plan(manifest, shards, copies, texts, checked.left_out)


def _way_out(model: Model, refusing: str, selection: Selection) -> str:
    """Which profiles convert the checkpoint: found by planning them, never a guess."""
    others = [profile for profile in PROFILES if profile != refusing and _converts(model, profile, selection)]
    return f"--profile {' or '.join(others)} converts it" if others else "no profile converts it"


def _converts(model: Model, profile: str, selection: Selection) -> bool:
    try:
        checked = plan_changes(model, profile, selection)
        _refuse_values(model, checked)
        return bool(checked.changes.any)
    except Refused:
        return False


def _refuse_values(model: Model, checked: Checked) -> None:
    refuse_values(left(value_faults(model), checked.dropped))


def _refuse_lookalikes(model: Model) -> None:
    """A pipeline must not take an unknown model with the tell-tale names for one that needs nothing."""
    checkpoint, names = model.checkpoint, find_lookalikes(model.checkpoint)
    global_scales: dict[str, set[bytes]] = defaultdict(set)  # by layer
    for name in names:
        if own := single_module(name, checkpoint).nvfp4:
            global_scales[name.rpartition(".")[0]].add(checkpoint.read_tensor(own.scale.name))
    for name in names:
        scale, differ = checkpoint.tensors.get(f"{name}.weight_scale"), len(global_scales[name.rpartition(".")[0]]) > 1
        if scale is not None and (scale.numel == 1 or differ):
            raise Unsupported(
                "An unknown architecture has modules that engines may fuse",
                where=f"{scale.shard}: {name}",
                expected="a model_type that rewrite knows",
                found=f"model_type {model.checkpoint.config.value.get('model_type')!r}, "
                f"quantized as {model.dialect.name}",
                hint="report the architecture, so that its fused groups can be added",
            )


def _notes(model: Model, checked: Checked, selection: Selection) -> Iterator[str]:
    yield from notes(model, checked.changes)
    packed = [group for group in model.select(selection) if any(not m.plain and not m.fp8 for m in group.modules)]
    yield from repair_notes(checked.changes.repair.changes)
    unequal = [] if checked.profile.nvfp4 else [group for group in packed if group in model.unequal_nvfp4]
    if unequal:
        yield (
            f"{len(unequal)} fused NVFP4 layers have different global scales and stay as they are "
            f"({unequal[0].name} is the first): engines take one for all, see `rewrite inspect`"
        )
    others = [group for group in packed if not group.nvfp4]
    if others:
        yield (
            f"{len(others)} fused groups of other formats than FP8 and NVFP4 stay as they are "
            f"({others[0].name} is the first): what loaders make of them is not known"
        )
    if gone := sum(1 for _ in kv_cache_scales(name for name, new in checked.changes.edits.items() if new is None)):
        yield f"the {gone} scales of the KV cache are dropped, and the config does not quantize it"
    if checked.changes.mended:
        yield f"config.json is mended: {', '.join(TITLES[code] for code in checked.changes.mended)}"
    if checked.changes.any and _has_card(model.checkpoint):
        yield (
            f"{README_NAME} has a card of rewrite, which is about IN: `rewrite verify IN OUT --card` writes another one"
        )
    planned = {scheme.activations for scheme in checked.changes.schemes.values() if scheme is not None}
    yield from (note for activations, note in checked.profile.notes.items() if activations in planned)


def _has_card(checkpoint: Checkpoint) -> bool:
    """Whether the model card says something of an earlier conversion: it comes along as it is."""
    found = checkpoint.files.get(README_NAME)
    if found is None or found.size > MAX_BYTES:
        return False
    with checkpoint.storage.open(README_NAME) as file:
        return BEGIN in file.read(0, found.size)


def _manifest_files(
    shards: Iterable[ShardPlan], copies: Iterable[FileCopy], texts: Iterable[TextFile]
) -> tuple[ManifestFile, ...]:
    files = [ManifestFile(shard.name, shard.size, True) for shard in shards]
    files += [ManifestFile(text.name, text.size, True) for text in texts]
    files += [ManifestFile(copy.name, copy.size, False) for copy in copies]
    return tuple(sorted(files, key=lambda file: file.name))
