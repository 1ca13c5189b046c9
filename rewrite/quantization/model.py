"""Checkpoint → :class:`Model`: the checkpoint interpreted, once, for everybody who asks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from rewrite.checkpoint.checkpoint import Checkpoint
from rewrite.checkpoint.forms import Form
from rewrite.errors import ConfigError
from rewrite.quantization.dialects import config_path, read_dialect, read_side_dialect
from rewrite.quantization.dialects.base import Dialect
from rewrite.quantization.groups import WEIGHTS, FusedGroup, Groups, Module, Selection, find_groups, single_module
from rewrite.quantization.scheme import Layers


@dataclass(frozen=True)
class Kind:
    """Modules with a matrix of weights that are alike: of one form and one scheme. ``first`` stands for all."""

    first: Module
    form: Form
    names: Sequence[str]


@dataclass(frozen=True, eq=False)
class Model:
    """A checkpoint, and what its config says of it. Immutable; made by :func:`interpret`."""

    checkpoint: Checkpoint
    dialect: Dialect
    second_dialect: Dialect | None  # what hf_quant_config.json says, where config.json counts instead
    groups: Groups
    kinds: tuple[Kind, ...]  # every module with a matrix of weights, by what is alike

    @property
    def model_type(self) -> str:
        """As config.json names it."""
        return str(self.checkpoint.config.value.get("model_type", "unknown"))

    @cached_property
    def kind_of(self) -> Mapping[str, Kind]:
        """The kind of each module, by its stored name."""
        return {name: kind for kind in self.kinds for name in kind.names}

    def module(self, name: str) -> Module:
        """A module on its own: made when it is asked for, as there may be 500,000. Raises :class:`KeyError`."""
        return single_module(name, self.checkpoint, self.kind_of[name].first.scheme)

    @cached_property
    def layers(self) -> Layers:
        """The modules by how they are stored. Made when a profile asks: 60 bytes a module."""
        fp8 = frozenset(name for kind in self.kinds if kind.first.fp8 for name in kind.names)
        others = tuple(name for kind in self.kinds if not kind.first.fp8 for name in kind.names)
        quantized = frozenset(name for kind in self.kinds if not kind.first.plain for name in kind.names)
        return Layers(fp8, others, quantized)

    def select(self, selection: Selection) -> tuple[FusedGroup, ...]:
        """The fused groups that ``selection`` is about: with "qkvz" also those of NVFP4 modules whose global scales
        differ, which loaders garble, too. Raises :class:`rewrite.errors.Refused` for a broken one."""
        chosen = self.groups.select(selection)
        names = {group.name for group in chosen}
        return (*chosen, *(group for group in self.unequal_nvfp4 if group.name not in names))

    @cached_property
    def unequal_nvfp4(self) -> tuple[FusedGroup, ...]:
        """The fused groups of NVFP4 modules whose global scales, or those of their activations, are not the same to the
        bit. Reads these scales."""
        groups = [group for group in self.groups.whole if group.nvfp4 and len(group.modules) > 1]
        layouts = [(group, module.nvfp4) for group in groups for module in group.modules if module.nvfp4]
        scales = {info.name: group for group, own in layouts for info in (own.scale, own.input_scale) if info}
        found: dict[tuple[str, str], set[bytes]] = {}
        for info, raw in self.checkpoint.read_tensors(self.checkpoint.tensors[name] for name in scales):
            found.setdefault((scales[info.name].name, info.name.rpartition(".")[2]), set()).add(raw)
        unequal = {group for (group, _), values in found.items() if len(values) > 1}
        return tuple(group for group in groups if group.name in unequal)


def interpret(checkpoint: Checkpoint) -> Model:
    """Read config and headers of ``checkpoint`` as a :class:`Model`.

    Raises :class:`rewrite.errors.ConfigError` for a quantization config that cannot be understood.
    """
    dialect = read_dialect(checkpoint)
    kinds: list[Kind] = []
    for form in filter(_is_matrix, checkpoint.alike):
        by_scheme = dialect.by_scheme(checkpoint.alike[form])
        kinds += [Kind(single_module(names[0], checkpoint, scheme), form, names) for scheme, names in by_scheme]
    groups = find_groups(checkpoint, dialect.scheme)
    return Model(checkpoint, dialect, _second_dialect(checkpoint), groups, tuple(kinds))


def _second_dialect(checkpoint: Checkpoint) -> Dialect | None:
    """What a second config says. One that cannot be understood is no fault: config.json counts."""
    if config_path(checkpoint.config.value) is None:
        return None
    try:
        return read_side_dialect(checkpoint)
    except ConfigError:
        return None


def _is_matrix(form: Form) -> bool:
    """Whether modules of this form may be linear layers. A tensor without a module is none."""
    shapes = (form.tensors[weight][1] for weight in WEIGHTS if weight in form.tensors)
    return bool(form.pattern) and any(len(shape) == 2 for shape in shapes)
