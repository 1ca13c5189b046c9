"""What a conversion may change, stated a second time: the verdict must not depend on the plan that did it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rewrite.checkpoint.bounded_json import read_members
from rewrite.checkpoint.checkpoint import Checkpoint
from rewrite.checkpoint.header import TensorInfo
from rewrite.checkpoint.storage import Storage
from rewrite.errors import Refused, StorageError
from rewrite.promise import Promise
from rewrite.quantization.architectures import FusedLayer
from rewrite.quantization.dtypes import FP8_DTYPES, PLAIN_DTYPES, model_dtype
from rewrite.quantization.groups import FusedGroup, Module, Selection, find_groups, is_table, single_module
from rewrite.verification.configs import states_compressed_tensors
from rewrite.verification.packed import PackedLayer, changeable, unequal_layers

#: dtype and shape that a tensor may have in OUT; None: it may be missing.
Form = tuple[str, tuple[int, ...]] | None
MANIFEST_NAME = "rewrite_manifest.json"


@dataclass(frozen=True)
class Expected:
    """The groups to compare, and the forms that tensors may take besides their own.

    Layers with block scales are among them only where nothing may stay quantized: no other profile changes these."""

    profile: str
    promise: Promise
    selection: Selection
    groups: tuple[FusedGroup, ...]
    forms: Mapping[str, frozenset[Form]]
    renamed: Mapping[str, str]  # old name → new name
    kv_dropped: bool  # the scales of the KV cache are gone, by choice or with all that is quantized
    moved: frozenset[str] = frozenset()  # another name or shape, the same bytes: [N] that becomes [N, 1], KV scales
    recomputed: frozenset[str] = frozenset()  # the same form, other bytes: NVFP4 scales, and what makes up for them
    packed: tuple[PackedLayer, ...] = ()  # fused NVFP4 layers with several global scales
    required: Mapping[str, frozenset[Form]] = field(default_factory=dict)  # what a conversion must have changed
    plain: frozenset[str] = frozenset()  # the layers that are stored plain in IN
    mended: frozenset[str] = frozenset()  # the faults of the config that OUT's manifest says are mended
    profiles: tuple[str, ...] = ()  # all that there are

    def allows(self, old: TensorInfo, new: TensorInfo | None) -> bool:
        """Whether ``old`` may have become ``new``."""
        form = None if new is None else (new.dtype, new.shape)
        return form == (old.dtype, old.shape) or form in self.forms.get(old.name, ())

    def unrepaired(self, out: Checkpoint) -> list[str]:
        """The tensors that are not in OUT what the profile makes of them."""
        found = ((name, forms, out.tensors.get(name)) for name, forms in self.required.items())
        return [name for name, forms, new in found if (None if new is None else (new.dtype, new.shape)) not in forms]


def expect(source: Checkpoint, out: Checkpoint, promises: Mapping[str, Promise]) -> Expected:
    """By the profile that OUT's manifest names; the first of ``promises`` where there is none."""
    profile, selection, kv_dropped = profile_of(out)
    promise = promises.get(profile, next(iter(promises.values())))
    found = find_groups(source).select("all" if promise.every_layer else selection)
    if promise.nothing_quantized:
        groups: tuple[FusedGroup, ...] = _all_quantized(source, found)
    elif promise.scale == "kept":
        groups = ()
    elif promise.part_of_group:
        groups = tuple(group for g in found if (group := _quantized_part(g)).modules)
    else:
        groups = tuple(g for g in found if all(m.fp8 and m.scale for m in g.modules))
    if not promise.nothing_quantized:
        groups = tuple(group for group in groups if not has_blocks(group))
    if promise.every_layer and not promise.nothing_quantized:
        groups += tuple(g for g in _others(source, groups, tables=False) if g.modules[0].scale and not has_blocks(g))
    plain = model_dtype(source.config.value)
    forms: dict[str, frozenset[Form]] = {}
    kv_dropped = kv_dropped or promise.nothing_quantized
    if kv_dropped:
        forms |= {name: frozenset({None}) for name in source.tensors if is_kv_scale(name)}
    for module in (module for group in groups for module in group.modules):
        forms |= _forms(module, promise, plain)
    required = {
        name: may
        for group in groups
        for name, may in _required(group, promise, plain)
        if (old := source.tensors.get(name)) is not None and (old.dtype, old.shape) not in may
    }
    restated = _is_restated(source, out)
    renamed = dict(_renamed(source)) if restated and not kv_dropped else {}
    scalar = {old: frozenset({(source.tensors[old].dtype, (1,))}) for old in renamed}
    rows = {name: (info.dtype, (*info.shape, 1)) for name, info in _row_scales(source)} if restated else {}
    column = {name: frozenset({form}) for name, form in rows.items()}
    packed = unequal_layers(source) if promise.nvfp4 != "kept" else ()
    recomputed = frozenset(changeable(packed, promise))
    moved = frozenset(rows) | renamed.keys()
    return Expected(
        profile,
        promise,
        selection,
        groups,
        forms | scalar | column,
        renamed,
        kv_dropped,
        moved,
        recomputed,
        packed,
        required,
        _plain_layers(source) if (mended := mended_of(out)) else frozenset(),
        mended,
        tuple(promises),
    )


def is_kv_scale(name: str) -> bool:
    """Whether a tensor is a scale of the KV cache, or of the queries that meet it, by any producer's name."""
    path = name.split(".")
    if not path[-1].endswith("_scale") or not any("attn" in part for part in path[-4:-1]):
        return False
    kinds = ("q_scale", "k_scale", "v_scale", "kv_scale")
    return path[-1] in kinds or (path[-1] == "output_scale" and path[-2] in ("k_proj", "v_proj"))


def _is_restated(source: Checkpoint, out: Checkpoint) -> bool:
    return states_compressed_tensors(out) and not states_compressed_tensors(source)


def _renamed(source: Checkpoint) -> Iterator[tuple[str, str]]:
    """ModelOpt's and Quark's names for the scales of the KV cache, as compressed-tensors has them."""
    for name, info in source.tensors.items():
        for kind in ("k", "v"):
            for old in (f".{kind}_proj.{kind}_scale", f".{kind}_proj.output_scale"):
                new = f"{name.removesuffix(old)}.{kind}_scale"
                if name.endswith(old) and info.numel == 1 and new not in source.tensors:
                    yield name, new


def _row_scales(source: Checkpoint) -> Iterator[tuple[str, TensorInfo]]:
    """Quark's scales for each row, which compressed-tensors has as a column."""
    for name, info in source.tensors.items():
        weight = source.tensors.get(name.removesuffix("_scale"))
        if name.endswith(".weight_scale") and weight is not None and info.shape == weight.shape[:1] != (1,):
            yield name, info


def in_checkpoint(group: FusedGroup, checkpoint: Checkpoint) -> FusedGroup:
    """The same modules and partitions with the tensors of another checkpoint."""

    modules = [
        replace(
            module,
            weight=checkpoint.tensors[module.weight.name],
            scale=checkpoint.tensors.get(f"{module.name}.weight_scale"),
            block_scale=checkpoint.tensors.get(f"{module.name}.weight_scale_inv"),
            input_scale=checkpoint.tensors.get(f"{module.name}.input_scale"),
        )
        for module in group.modules
    ]
    return replace(group, modules=tuple(modules))


def profile_of(out: Checkpoint) -> tuple[str, Selection, bool]:
    """Profile and selection by OUT's manifest, and whether the scales of the KV cache were dropped. One that is not
    ours, or broken: the strictest reading."""
    stated = _stated(out, "profile", "selection", "kv_scales")
    if not isinstance(stated.get("profile"), str) or "selection" not in stated:
        return "exact", "qkvz", False
    selection: Selection = "all" if stated["selection"] == "all" else "qkvz"
    return stated["profile"], selection, stated.get("kv_scales") == "dropped"


def _stated(out: Checkpoint, *keys: str) -> dict[str, Any]:
    """What OUT's manifest says under some keys; nothing where there is none, or one that is broken."""
    try:
        return read_members(out.storage, MANIFEST_NAME, keys) if MANIFEST_NAME in out.files else {}
    except Refused:
        return {}


def chosen_of(out: Storage) -> tuple[tuple[str, ...], str]:
    """The engines that OUT was made for, and the platform, by its manifest; none where nobody noted any."""
    try:
        stated = read_members(out, MANIFEST_NAME, ("chosen",)).get("chosen")
    except (Refused, StorageError):
        return (), ""
    if not isinstance(stated, dict) or not isinstance(engines := stated.get("for"), list):
        return (), ""
    return tuple(map(str, engines)), str(stated.get("platform"))


def _plain_layers(source: Checkpoint) -> frozenset[str]:
    weights = (name for name, info in source.tensors.items() if info.dtype in PLAIN_DTYPES and len(info.shape) == 2)
    return frozenset(name.removesuffix(".weight") for name in weights if name.endswith(".weight"))


def mended_of(out: Checkpoint) -> frozenset[str]:
    """The faults of IN's config that a conversion mended, by OUT's manifest."""
    stated = _stated(out, "mended").get("mended")
    return frozenset(stated) if isinstance(stated, dict) else frozenset()


def _quantized_part(group: FusedGroup) -> FusedGroup:
    """The modules of a group that a conversion to BF16 dequantizes."""
    return replace(group, modules=tuple(m for m in group.modules if m.fp8 and m.scale))


def _all_quantized(source: Checkpoint, found: tuple[FusedGroup, ...]) -> tuple[FusedGroup, ...]:
    """Every FP8 layer: those of fused groups together, the others, tables of embeddings too, on their own."""
    fused = tuple(replace(g, modules=quantized) for g in found if (quantized := tuple(m for m in g.modules if m.fp8)))
    return fused + tuple(_others(source, fused, tables=True))


def _others(source: Checkpoint, groups: tuple[FusedGroup, ...], *, tables: bool) -> Iterator[FusedGroup]:
    """Every other FP8 layer as a group of its own; ``tables``: also those of embeddings."""
    grouped = {module.name for group in groups for module in group.modules}
    for name, info in source.tensors.items():
        module = name.removesuffix(".weight")
        if module == name or module in grouped or info.dtype not in FP8_DTYPES or len(info.shape) == 1:  # a norm
            continue
        if tables or not is_table(module):
            layer = FusedLayer(module.rpartition(".")[2], "", {})
            yield FusedGroup(module, layer, (single_module(module, source),))


def is_block(scale: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Whether a scale of this shape is one for each block of a weight [N, K]: [N / n, K / k], rounded up. Blocks are
    never changed: that they are byte for byte the same is the question of the check ``untouched``."""
    return len(scale) == 2 and scale != (weight[0], 1) and all(0 < s <= w for s, w in zip(scale, weight, strict=True))


def has_blocks(group: FusedGroup) -> bool:
    """Whether some of the weights have a scale for each block."""
    return any(m.scale is not None and is_block(m.scale.shape, m.weight.shape) for m in group.modules) or any(
        module.block_scale for module in group.modules
    )


def _forms(module: Module, promise: Promise, plain: str) -> dict[str, frozenset[Form]]:
    dtype = module.scale.dtype if module.scale else ""
    scale: Form = {
        "channel": (dtype, (module.weight.shape[0], 1)),
        "partition": (dtype, (len(module.partitions),)),
        "dropped": None,
        "kept": None,
    }[promise.scale]
    forms: dict[str, frozenset[Form]] = {f"{module.name}.weight_scale": frozenset({scale})}
    if promise.nothing_quantized:
        forms[f"{module.name}.weight_scale_inv"] = frozenset({None})
        forms[f"{module.name}.activation_scale"] = frozenset({None})  # Mistral's name
    if promise.weight == "plain":
        forms[f"{module.name}.weight"] = frozenset({(plain, module.weight.shape)})
    if promise.input_scale == "dropped":
        forms[f"{module.name}.input_scale"] = frozenset({None})
    return forms


def _required(group: FusedGroup, promise: Promise, plain: str) -> Iterator[tuple[str, frozenset[Form]]]:
    """What must become of the tensors of a group: a layer of one partition has no scale that it shares, and a vector
    of partitions is made where several of them share a module."""
    partitions = [len(module.partitions) for module in group.modules]
    if promise.scale == "channel" and not promise.every_layer and sum(partitions) == 1:
        return
    single = all(module.scale is not None and len(module.scale.shape) <= 1 for module in group.modules)
    for module in group.modules:
        if promise.scale == "partition" and not (single and len(partitions) > 1 and len(module.partitions) > 1):
            continue
        for name, forms in _forms(module, promise, plain).items():
            by_row = module.scale is not None and module.scale.shape == module.weight.shape[:1] != (1,)  # Quark's
            yield name, forms | {(module.scale.dtype, module.scale.shape)} if by_row and module.scale else forms
