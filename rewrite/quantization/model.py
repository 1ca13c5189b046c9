"""Checkpoint → :class:`Model`: the checkpoint interpreted, once, for everybody who asks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from rewrite.checkpoint.checkpoint import Checkpoint
from rewrite.checkpoint.forms import Form
from rewrite.checkpoint.header import TensorInfo
from rewrite.errors import ConfigError
from rewrite.quantization.dialects import config_path, read_dialect, read_side_dialect
from rewrite.quantization.dtypes import FP8_DTYPES, PLAIN_DTYPES
from rewrite.quantization.groups import WEIGHTS, FusedGroup, Groups, Selection, find_groups
from rewrite.quantization.scheme import Dialect, Layers, Scheme


class StoredModule(NamedTuple):
    """A module with a matrix of weights, and the scheme that the config gives it (None: it is left alone).

    Whether a plain matrix is a linear layer cannot be seen in a checkpoint: embeddings, too, have a scheme on paper
    where a config names the class ``Linear`` only. A named tuple, as there may be 100,000 of them.
    """

    name: str
    weight: TensorInfo  # ``.weight``, or ``.weight_packed`` where several weights share a byte
    scheme: Scheme | None

    @property
    def plain(self) -> bool:
        """Whether the weights are stored as ordinary floating-point numbers."""
        return self.weight.dtype in PLAIN_DTYPES

    @property
    def fp8(self) -> bool:
        return self.weight.dtype in FP8_DTYPES


@dataclass(frozen=True)
class Kind:
    """Modules with a matrix of weights that are alike: of one form and one scheme. ``first`` stands for all."""

    first: StoredModule
    form: Form
    names: Sequence[str]


@dataclass(frozen=True)
class Model:
    """A checkpoint, and what its config says of it. Immutable; made by :func:`interpret`."""

    checkpoint: Checkpoint
    dialect: Dialect
    second_dialect: Dialect | None  # what hf_quant_config.json says, where config.json counts instead
    groups: Groups
    modules: Mapping[str, StoredModule]  # every module with a matrix of weights, by its stored name
    kinds: tuple[Kind, ...]  # the same, by what is alike

    @property
    def model_type(self) -> str:
        """As config.json names it."""
        return str(self.checkpoint.config.value.get("model_type", "unknown"))

    @cached_property
    def layers(self) -> Layers:
        """The modules by how they are stored. Made when a profile asks: 60 bytes a module."""
        fp8 = frozenset(name for kind in self.kinds if kind.first.fp8 for name in kind.names)
        quantized = frozenset(name for kind in self.kinds if not kind.first.plain for name in kind.names)
        return Layers(fp8, tuple(name for name in self.modules if name not in fp8), quantized)

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


def interpret(checkpoint: Checkpoint, earlier: Model | None = None) -> Model:
    """Read config and headers of ``checkpoint`` as a :class:`Model`.

    What is equal in a model of an ``earlier`` state is shared with it: there may be 500,000 modules.

    Raises :class:`rewrite.errors.ConfigError` for a quantization config that cannot be understood.
    """
    dialect = read_dialect(checkpoint)
    shared: Mapping[str, StoredModule] = earlier.modules if earlier else {}
    tensors = checkpoint.tensors
    modules: dict[str, StoredModule] = {}
    alike: list[Kind] = []
    for form, suffix in _matrices(checkpoint):
        kinds: dict[int, tuple[StoredModule, list[str]]] = {}  # schemes by identity: dialects share theirs
        for name in checkpoint.alike[form]:
            weight, scheme, old = tensors[name + suffix], dialect.scheme(name), shared.get(name)
            is_kept = old is not None and old.weight is weight and (old.scheme is scheme or old.scheme == scheme)
            module = modules[name] = old if old is not None and is_kept else StoredModule(name, weight, scheme)
            key = id(module.scheme)
            if key in kinds:
                kinds[key][1].append(name)
            else:
                kinds[key] = (module, [name])
        alike += [Kind(first, form, names) for first, names in kinds.values()]
    return Model(checkpoint, dialect, _second_dialect(checkpoint), find_groups(checkpoint), modules, tuple(alike))


def _second_dialect(checkpoint: Checkpoint) -> Dialect | None:
    """What a second config says. One that cannot be understood is no fault: config.json counts."""
    if config_path(checkpoint.config.value) is None:
        return None
    try:
        return read_side_dialect(checkpoint)
    except ConfigError:
        return None


def _matrices(checkpoint: Checkpoint) -> Iterator[tuple[Form, str]]:
    """Whatever may be linear layers, and how the names of their weights end."""
    for form in checkpoint.alike:
        stored = [weight for weight in WEIGHTS if weight in form.tensors and len(form.tensors[weight][1]) == 2]
        if stored and form.pattern:  # a tensor without a module is none
            yield form, f".{stored[-1]}"
