"""What a conversion may change, stated a second time: the verdict must not depend on the plan that did it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from rewrite.checkpoint import Checkpoint
from rewrite.dialects import read_dialect
from rewrite.groups import FP8_DTYPES, FusedGroup, FusedLayer, Module, Selection, find_groups, single_module
from rewrite.header import TensorInfo
from rewrite.manifest import MANIFEST_NAME

#: dtype and shape that a tensor may have in OUT; None: it may be missing.
Form = tuple[str, tuple[int, ...]] | None
_PLAIN = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class Expected:
    """The groups to compare, and the forms that tensors may take besides their own."""

    profile: str
    selection: Selection
    groups: tuple[FusedGroup, ...]
    forms: Mapping[str, frozenset[Form]]
    renamed: Mapping[str, str]  # old name → new name

    def allows(self, old: TensorInfo, new: TensorInfo | None) -> bool:
        """Whether ``old`` may have become ``new``."""
        form = None if new is None else (new.dtype, new.shape)
        return form == (old.dtype, old.shape) or form in self.forms.get(old.name, ())


def expect(source: Checkpoint, out: Checkpoint) -> Expected:
    """By the profile that OUT's manifest names; ``exact`` where there is none."""
    profile, selection = _profile_of(out)
    groups = tuple(g for g in find_groups(source, selection) if all(m.quantised and m.scale for m in g.modules))
    if profile == "bf16":
        groups = tuple(group for g in find_groups(source, selection) if (group := _quantised_part(g)).modules)
    if profile == "portable":
        everything = find_groups(source, "all")
        groups = tuple(g for g in everything if all(m.quantised and m.scale for m in g.modules))
        groups += _others(source, groups)
    forms: dict[str, frozenset[Form]] = {}
    for module in (module for group in groups for module in group.modules):
        forms |= _forms(module, profile)
    renamed = dict(_renamed(source)) if _is_rehoused(source, out) else {}
    scalar = {old: frozenset({(source.tensors[old][1].dtype, (1,))}) for old in renamed}
    return Expected(profile, selection, groups, forms | scalar, renamed)


def _is_rehoused(source: Checkpoint, out: Checkpoint) -> bool:
    names = [read_dialect(checkpoint).name for checkpoint in (source, out)]
    return names[0] != names[1] and names[1] == "compressed-tensors"


def _renamed(source: Checkpoint) -> Iterator[tuple[str, str]]:
    """ModelOpt's names for the scales of the KV cache, as compressed-tensors has them."""
    for name, (_, info) in source.tensors.items():
        for kind in ("k", "v"):
            if name.endswith(old := f".{kind}_proj.{kind}_scale") and info.numel == 1:
                new = f"{name.removesuffix(old)}.{kind}_scale"
                if new not in source.tensors:
                    yield name, new


def in_checkpoint(group: FusedGroup, checkpoint: Checkpoint) -> FusedGroup:
    """The same modules and partitions with the tensors of another checkpoint."""

    def find(name: str) -> TensorInfo | None:
        found = checkpoint.tensors.get(name)
        return None if found is None else found[1]

    modules = [
        replace(
            module,
            weight=checkpoint.tensors[module.weight.name][1],
            scale=find(f"{module.name}.weight_scale"),
            input_scale=find(f"{module.name}.input_scale"),
        )
        for module in group.modules
    ]
    return replace(group, modules=tuple(modules))


def _profile_of(out: Checkpoint) -> tuple[str, Selection]:
    if MANIFEST_NAME not in out.files:
        return "exact", "qkvz"
    try:
        manifest = json.loads((out.root / MANIFEST_NAME).read_bytes())
        return str(manifest["profile"]), "all" if manifest["selection"] == "all" else "qkvz"
    except (ValueError, LookupError, TypeError):
        return "exact", "qkvz"  # not ours, or broken: the strictest reading


def _quantised_part(group: FusedGroup) -> FusedGroup:
    """The modules of a group that a conversion to BF16 dequantises."""
    return replace(group, modules=tuple(m for m in group.modules if m.quantised and m.scale))


def _others(source: Checkpoint, groups: tuple[FusedGroup, ...]) -> tuple[FusedGroup, ...]:
    """Every other FP8 layer as a group of its own."""
    grouped = {module.name for group in groups for module in group.modules}
    singles = []
    for name, (_, info) in source.tensors.items():
        module = name.removesuffix(".weight")
        if module != name and module not in grouped and info.dtype in FP8_DTYPES:
            layer = FusedLayer(module.rpartition(".")[2], "", {})
            singles.append(FusedGroup(module, layer, (single_module(module, source),)))
    return tuple(group for group in singles if group.modules[0].scale)


def _forms(module: Module, profile: str) -> dict[str, frozenset[Form]]:
    names = {kind: f"{module.name}.{kind}" for kind in ("weight", "weight_scale", "input_scale")}
    dtype = module.scale.dtype if module.scale else ""
    rows = (dtype, (module.weight.shape[0], 1))
    match profile:
        case "portable":
            return {names["weight_scale"]: frozenset({rows}), names["input_scale"]: frozenset({None})}
        case "partition":
            return {names["weight_scale"]: frozenset({(dtype, (len(module.partitions),))})}
        case "bf16":
            weights: frozenset[Form] = frozenset((plain, module.weight.shape) for plain in _PLAIN)
            gone: frozenset[Form] = frozenset({None})
            return {names["weight"]: weights, names["weight_scale"]: gone, names["input_scale"]: gone}
        case _:
            return {names["weight_scale"]: frozenset({rows})}
