"""Finding the fused groups of a checkpoint: which stored modules become one layer, which rows are which partition."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from rewrite.checkpoint.checkpoint import Checkpoint
from rewrite.checkpoint.forms import Form
from rewrite.checkpoint.header import TensorInfo
from rewrite.errors import CheckpointError, ConfigError, Refused
from rewrite.quantization.architectures import QKVZ, FusedLayer, PartitionSpec, find_architecture, text_config
from rewrite.quantization.by_source import layers_by_source
from rewrite.quantization.dtypes import FP8_DTYPES, PLAIN_DTYPES
from rewrite.quantization.nvfp4 import Nvfp4, find_nvfp4
from rewrite.quantization.scheme import ScaleLayout, Scheme, layout_of_shape

#: What a module's weights are stored as: ``weight_packed`` where several of them share a byte.
WEIGHTS = ("weight", "weight_packed")
_NOT_THE_LANGUAGE_MODEL = r"mtp\.|(?:.*\.)?(?:visual|vision_\w+)\."
#: The same, and other towers, by the names that families give them; experts are no groups.
_BESIDE = re.compile(
    rf"{_NOT_THE_LANGUAGE_MODEL}|(?:.*\.)?(?:\w*(?:vision|visual|audio|image|speech|projector)\w*|vpm|apm|merger|experts)\."
)
_MAX_FACTOR = 2**31  # a product of numbers with thousands of digits could not even be printed

#: Which fused layers a conversion is about: the one that loaders garble, or every one that they requantize.
Selection = Literal["qkvz", "all"]
SELECTIONS: tuple[Selection, ...] = ("qkvz", "all")


@dataclass(frozen=True, slots=True)
class Partition:
    """Rows ``[start, stop)`` of its module."""

    name: str
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Module:
    """A matrix of weights as stored, and the scheme that the config gives it (None: it is left alone). The scales are
    None when the checkpoint holds none.

    Whether a plain matrix is a linear layer cannot be seen in a checkpoint: embeddings, too, have a scheme on paper
    where a config names the class ``Linear`` only.

    ``block_scale`` is the ``weight_scale_inv`` of block-wise FP8 (DeepSeek-V3's format, Qwen's own FP8 releases).
    """

    name: str
    partitions: tuple[Partition, ...]
    weight: TensorInfo  # ``.weight``, or ``.weight_packed``
    scale: TensorInfo | None
    input_scale: TensorInfo | None
    block_scale: TensorInfo | None
    nvfp4: Nvfp4 | None = None  # of an NVFP4 module: its scales in the words of both dialects
    scheme: Scheme | None = None  # None, too, where no config was asked

    @property
    def fp8(self) -> bool:
        return self.weight.dtype in FP8_DTYPES

    @property
    def plain(self) -> bool:
        """Whether the weights are stored as ordinary floating-point numbers."""
        return self.weight.dtype in PLAIN_DTYPES

    @property
    def layout(self) -> ScaleLayout | None:
        """How the weight scale is stored, by its shape; None for no scale, or a shape that is no layout."""
        if self.scale is None:
            return None if self.block_scale is None else "block"
        return layout_of_shape(self.scale.shape, self.weight.shape[0], len(self.partitions))

    @property
    def has_rows(self) -> bool:
        """Whether there is a scale for each row, in the form ``[N]`` that the dialect has for it."""
        return self.layout == "rows" and self.scheme is not None and self.scheme.layout == "rows"

    @property
    def is_static(self) -> bool:
        """Whether the config gives the activations a stored scale."""
        return self.scheme is not None and self.scheme.activations == "static"


@dataclass(frozen=True)
class FusedGroup:
    """The modules of one layer of the model that loaders make one. ``name`` is the full fused name."""

    name: str
    layer: FusedLayer
    modules: tuple[Module, ...]

    @property
    def quantized_in_part(self) -> bool:
        """Whether some of the modules are FP8 and some are not: no engine that fuses them can serve that."""
        return len({module.fp8 for module in self.modules}) > 1

    @property
    def nvfp4(self) -> bool:
        """Whether all of the modules are NVFP4, with the same scales."""
        kinds = {None if m.nvfp4 is None else (m.nvfp4.divides, m.nvfp4.input_scale is None) for m in self.modules}
        return None not in kinds and len(kinds) == 1


@dataclass(frozen=True)
class BrokenGroup:
    """A fused group that cannot be made out, and why."""

    name: str
    layer: FusedLayer
    error: Refused


@dataclass(frozen=True)
class Groups:
    """Every fused group of a checkpoint, broken ones too, in natural order of their names within each layer."""

    found: tuple[FusedGroup | BrokenGroup, ...]

    @property
    def default(self) -> Selection:
        """What is looked at unless a user says more: every fused layer where none is ``in_proj_qkvz``."""
        return "qkvz" if any(group.layer.name == QKVZ.name for group in self.found) else "all"

    def select(self, selection: Selection) -> tuple[FusedGroup, ...]:
        """The groups that ``selection`` is about: "qkvz" for ``in_proj_qkvz`` only, "all" for every fused layer.

        Raises the :class:`Refused` of the first broken group among them.
        """
        chosen = [group for group in self.found if selection == "all" or group.layer.name == QKVZ.name]
        for group in chosen:
            if isinstance(group, BrokenGroup):
                raise group.error
        return tuple(group for group in chosen if isinstance(group, FusedGroup))

    @property
    def whole(self) -> tuple[FusedGroup, ...]:
        """The groups that are not broken."""
        return tuple(group for group in self.found if isinstance(group, FusedGroup))


#: What the config says of a module, by its name.
SchemeOf = Callable[[str], Scheme | None]


def _no_scheme(_module: str) -> None:
    """Where no config is asked."""


def find_groups(checkpoint: Checkpoint, scheme_of: SchemeOf = _no_scheme) -> Groups:
    """The fused groups of a checkpoint of a known architecture, of the language model: MTP layers and vision towers are
    left alone. A group is broken when it lacks a module or its rows are not what the config says."""
    architecture = find_architecture(checkpoint.config.value)
    if architecture is None:
        return Groups(tuple(_groups_by_source(checkpoint, scheme_of)))
    text = text_config(checkpoint.config.value)
    layers = [layer for layer in architecture.fused_layers if not layer.needs or text.get(layer.needs)]
    stored = _stored_modules(layers, checkpoint)
    found = (_groups_of(layer, stored[layer.name], checkpoint, scheme_of) for layer in layers)
    return Groups(tuple(group for groups in found for group in groups))


def _groups_by_source(checkpoint: Checkpoint, scheme_of: SchemeOf) -> Iterator[FusedGroup]:
    """What the atlas says of a family that is not among :data:`ARCHITECTURES`. A layer that lacks a module, or is
    quantized in part wherever it is, is no group: engines may have a rule for it (Gemma 4 stores no v where it is k,
    DeepSeek-V3.2 a plain part beside the FP8 one of its indexer)."""
    modules = (names for form, names in checkpoint.alike.items() if _has_rows(form))
    stored = {name for names in modules for name in names if not _BESIDE.match(name)}
    for layer, parents in layers_by_source(checkpoint.config.value, stored):
        names = (f"{parent}.{part}" for parent in parents for part in layer.modules)
        groups = [group for group in _groups_of(layer, names, checkpoint, scheme_of) if isinstance(group, FusedGroup)]
        if any(len({module.weight.dtype for module in group.modules}) == 1 for group in groups):
            yield from groups


def single_module(name: str, checkpoint: Checkpoint, scheme: Scheme | None = None) -> Module:
    """A linear layer on its own, as one partition."""
    return _module(name, (PartitionSpec(name.rpartition(".")[2]),), checkpoint, scheme)


_EXPERT = re.compile(rf"(?!{_NOT_THE_LANGUAGE_MODEL})(.*\.experts\.\d+)\.(\w+)")


def packed_experts(checkpoint: Checkpoint) -> Iterator[tuple[str, frozenset[str]]]:
    """The experts of the language model that are stored one by one in packed bytes: name, and the names of its
    projections. There may be 500,000 others."""
    found: dict[str, set[str]] = {}
    for form, names in checkpoint.alike.items():
        if ".experts." in form.pattern and any(form.tensors.get(weight, ("",))[0] == "U8" for weight in WEIGHTS):
            for match in filter(None, map(_EXPERT.fullmatch, names)):
                found.setdefault(match[1], set()).add(match[2])
    yield from ((name, frozenset(found[name])) for name in sorted(found, key=_natural))


def is_table(module: str) -> bool:
    """Whether a module is a table of embeddings, by its name (``embed_tokens``, ``pos_embed``): nothing else tells."""
    return "embed" in module.rpartition(".")[2]


def find_lookalikes(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Modules named like the parts of ``in_proj_qkvz``, in a checkpoint whose architecture is not known."""
    if find_architecture(checkpoint.config.value) is not None:
        return ()
    return tuple(_stored_modules((QKVZ,), checkpoint)[QKVZ.name])


def _groups_of(
    layer: FusedLayer, stored: Iterable[str], checkpoint: Checkpoint, scheme_of: SchemeOf
) -> Iterator[FusedGroup | BrokenGroup]:
    for parent in sorted({name.rpartition(".")[0] for name in stored}, key=_natural):
        name = f"{parent}.{layer.name}"
        try:
            _check_complete(parent, layer, checkpoint)
            parts = ((f"{parent}.{part}", specs) for part, specs in layer.modules.items())
            modules = tuple(_module(own, specs, checkpoint, scheme_of(own)) for own, specs in parts)
        except Refused as error:
            yield BrokenGroup(name, layer, error)
        else:
            yield FusedGroup(name, layer, modules)


def _check_complete(parent: str, layer: FusedLayer, checkpoint: Checkpoint) -> None:
    for part in layer.modules:
        if not any(f"{parent}.{part}.{weight}" in checkpoint.tensors for weight in WEIGHTS):
            raise CheckpointError(
                "A fused group is incomplete",
                where=f"{parent}.{layer.name}",
                expected=", ".join(layer.modules),
                found=f"no {parent}.{part}.weight",
                hint="loaders fill the missing rows with whatever memory held: export the model again",
            )


def _stored_modules(layers: Iterable[FusedLayer], checkpoint: Checkpoint) -> dict[str, list[str]]:
    """The stored parts of each layer: no number in a name tells whether it is one."""
    patterns = {layer.name: re.compile(rf"(?!{_NOT_THE_LANGUAGE_MODEL})(?:.*\.)?{layer.parent}") for layer in layers}
    by_part = {part: layer.name for layer in layers for part in layer.modules}  # layers share no part
    stored: dict[str, list[str]] = {name: [] for name in patterns}
    for form, names in checkpoint.alike.items():
        parent, _, part = form.pattern.rpartition(".")
        layer = by_part.get(part)
        if layer and _has_rows(form) and patterns[layer].fullmatch(parent):
            stored[layer] += names
    return stored


def _has_rows(form: Form) -> bool:
    """Whether a weight is stored that is no mere string of bytes, as of bitsandbytes: that one has no rows."""
    stored = [form.tensors[weight] for weight in WEIGHTS if weight in form.tensors]
    return bool(stored) and not any(dtype == "U8" and shape[1:] == (1,) for dtype, shape in stored)


def _module(name: str, specs: tuple[PartitionSpec, ...], checkpoint: Checkpoint, scheme: Scheme | None) -> Module:
    tensors = checkpoint.tensors
    stored = [tensors[full] for kind in WEIGHTS if (full := f"{name}.{kind}") in tensors]
    weight = next((each for each in reversed(stored) if len(each.shape) == 2), stored[0])
    if len(weight.shape) != 2:
        raise CheckpointError(
            "A linear layer is not a matrix",
            where=f"{weight.shard}: {weight.name}",
            expected="[rows, columns]",
            found=list(weight.shape),
        )
    partitions, start = [], 0
    for spec in specs:
        stop = start + (_size(spec, checkpoint.config.value) if spec.size else weight.shape[0])
        partitions.append(Partition(spec.name, start, stop))
        start = stop
    if weight.shape[0] != start:
        raise CheckpointError(
            "The rows of a fused module are not what the config says",
            where=f"{weight.shard}: {weight.name}",
            expected=" + ".join(f"{p.name} {p.rows}" for p in partitions) + f" = {start} rows",
            found=f"shape {list(weight.shape)}",
            hint="config.json and weights are of different models, or the rows are stored in another order",
        )
    scale, input_scale, block_scale = (
        next((tensors[full] for kind in kinds if (full := f"{name}.{kind}") in tensors), None) for kinds in _SCALES
    )
    if scale is None and block_scale is not None and block_scale.shape in ((), (1,)):
        scale, block_scale = block_scale, None  # Mistral's name for a scale of one value
    return Module(name, tuple(partitions), weight, scale, input_scale, block_scale, find_nvfp4(name, tensors), scheme)


#: The names of a scale, of a scale of the input, and of block scales: those of Mistral and of DeepSeek-V4 are last.
_SCALES = (("weight_scale",), ("input_scale", "activation_scale"), ("weight_scale_inv", "scale"))
_HEADS = PartitionSpec("", ("num_attention_heads",))


def _size(spec: PartitionSpec, config: Mapping[str, Any]) -> int:
    """Rows of a partition."""
    factors = []
    for key in spec.size:
        value = text_config(config).get(key)
        if key == "head_dim" and value is None:  # transformers' default where a config leaves it out
            value = _size(PartitionSpec("", ("hidden_size",)), config) // _size(_HEADS, config)
        if type(value) is not int or not 0 < value <= _MAX_FACTOR:
            raise ConfigError(
                "The config does not say how large a partition is",
                where=f"config.json: {key}",
                expected=f"an integer from 1 to {_MAX_FACTOR}",
                found="nothing" if value is None else value,
            )
        factors.append(value)
    return prod(factors)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layer 2 before layer 10. Every other part is digits; they may be more than int() takes."""
    parts = re.split(r"(\d+)", name)
    return [(len(digits := part.lstrip("0")), digits) if i % 2 else (0, part) for i, part in enumerate(parts)]
