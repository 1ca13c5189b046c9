"""Which modules inference engines fuse when they load, and finding those groups in a checkpoint.

:data:`ARCHITECTURES` is the whole knowledge about model families; adding one is adding an entry.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from rewrite.checkpoint import Checkpoint
from rewrite.errors import CheckpointError, ConfigError
from rewrite.header import TensorInfo

_MAX_FACTOR = 2**31  # a product of numbers with thousands of digits could not even be printed
FP8_DTYPES = frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})
PLAIN_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True)
class PartitionSpec:
    """A slice of output rows: as many as the product of these keys of the text config; () for all of the module's."""

    name: str
    size: tuple[str, ...] = ()


@dataclass(frozen=True)
class FusedLayer:
    """Stored modules, in the order in which loaders concatenate them, and the name of the layer they become."""

    name: str
    parent: str  # regex for the last part of the module's parent
    modules: Mapping[str, tuple[PartitionSpec, ...]]

    @property
    def target(self) -> str:
        """A ``re:`` target for the stored modules *and* the fused layer.

        vLLM and SGLang look a fused layer up under its own name, then under its class name (``…Linear``), and only
        then under its parts: a target that misses the fused name loses to a catch-all ``Linear`` group.
        """
        names = list(dict.fromkeys([*self.modules, self.name]))
        prefix = _common_prefix(names)
        tails = "|".join(name[len(prefix) :] for name in names)
        return rf"re:.*{self.parent}\.{prefix}({tails})$" if tails else rf"re:.*{self.parent}\.{prefix}$"


@dataclass(frozen=True)
class Architecture:
    """Model families with the same fused layers, by ``model_type`` of config.json or of its ``text_config``."""

    model_types: tuple[str, ...]
    fused_layers: tuple[FusedLayer, ...]


_KEY_DIM = ("linear_num_key_heads", "linear_key_head_dim")
_VALUE_DIM = ("linear_num_value_heads", "linear_value_head_dim")
_QUERY = ("num_attention_heads", "head_dim")
_KEY_VALUE = ("num_key_value_heads", "head_dim")

#: Gated DeltaNet of Qwen3.5: vLLM ``Qwen3_5ForCausalLM.packed_modules_mapping``, output sizes [key, key, value, value].
_QKVZ = FusedLayer(
    name="in_proj_qkvz",
    parent="linear_attn",
    modules={
        "in_proj_qkv": (PartitionSpec("q", _KEY_DIM), PartitionSpec("k", _KEY_DIM), PartitionSpec("v", _VALUE_DIM)),
        "in_proj_z": (PartitionSpec("z", _VALUE_DIM),),
    },
)
#: Gated DeltaNet of Qwen3-Next: fused on disk, rows interleaved per key head, so one partition for all of it.
_QKVZ_ON_DISK = FusedLayer("in_proj_qkvz", "linear_attn", {"in_proj_qkvz": (PartitionSpec("qkvz"),)})
_QKV = FusedLayer(
    name="qkv_proj",
    parent="self_attn",
    modules={f"{name}_proj": (PartitionSpec(name),) for name in "qkv"},
)
_GATE_UP = FusedLayer(
    name="gate_up_proj",
    parent=r"mlp(?:\.shared_expert)?",
    modules={f"{name}_proj": (PartitionSpec(name),) for name in ("gate", "up")},
)
#: Phi-3 and Phi-4 store both fused.
_QKV_ON_DISK = FusedLayer(
    name="qkv_proj",
    parent="self_attn",
    modules={
        "qkv_proj": (PartitionSpec("q", _QUERY), PartitionSpec("k", _KEY_VALUE), PartitionSpec("v", _KEY_VALUE)),
    },
)
_GATE_UP_ON_DISK = FusedLayer(
    name="gate_up_proj",
    parent="mlp",
    modules={
        "gate_up_proj": (PartitionSpec("gate", ("intermediate_size",)), PartitionSpec("up", ("intermediate_size",))),
    },
)

ARCHITECTURES = (
    Architecture(
        ("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", "minicpmv4_6"), (_QKVZ, _QKV, _GATE_UP)
    ),
    Architecture(("qwen3_next",), (_QKVZ_ON_DISK, _QKV, _GATE_UP)),
    Architecture(("llama", "mistral", "qwen2", "qwen3"), (_QKV, _GATE_UP)),
    Architecture(("phi3",), (_QKV_ON_DISK, _GATE_UP_ON_DISK)),
)

#: Which fused layers a conversion is about: the one that loaders garble, or every one that they requantise.
Selection = Literal["qkvz", "all"]
SELECTIONS: tuple[Selection, ...] = ("qkvz", "all")


@dataclass(frozen=True)
class Partition:
    """Rows ``[start, stop)`` of its module."""

    name: str
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Module:
    """A linear layer as stored. The scales are None when the checkpoint holds none.

    ``block_scale`` is the ``weight_scale_inv`` of block-wise FP8 (DeepSeek-V3's format, Qwen's own FP8 releases).
    """

    name: str
    partitions: tuple[Partition, ...]
    weight: TensorInfo
    scale: TensorInfo | None
    input_scale: TensorInfo | None
    block_scale: TensorInfo | None

    @property
    def quantised(self) -> bool:
        return self.weight.dtype in FP8_DTYPES


@dataclass(frozen=True)
class FusedGroup:
    """The modules of one layer of the model that loaders make one. ``name`` is the full fused name."""

    name: str
    layer: FusedLayer
    modules: tuple[Module, ...]


def find_architecture(config: Mapping[str, Any]) -> Architecture | None:
    """The entry of :data:`ARCHITECTURES` for a config.json, or None."""
    types = (config.get("model_type"), _text_config(config).get("model_type"))
    return next((a for a in ARCHITECTURES if any(t in a.model_types for t in types)), None)


def find_groups(checkpoint: Checkpoint, selection: Selection = "qkvz") -> tuple[FusedGroup, ...]:
    """The fused groups of a checkpoint of a known architecture, in natural order of their names.

    "qkvz" finds ``in_proj_qkvz`` only, "all" every fused layer of the language model; MTP layers and vision towers are
    left alone.
    Raises :class:`CheckpointError` for a group that lacks a module or whose rows are not what the config says.
    """
    architecture = find_architecture(checkpoint.config.value)
    layers = architecture.fused_layers if architecture else ()
    chosen = (layer for layer in layers if selection == "all" or layer.name == _QKVZ.name)
    return tuple(group for layer in chosen for group in _groups_of(layer, checkpoint))


def single_module(name: str, checkpoint: Checkpoint) -> Module:
    """A linear layer on its own, as one partition."""
    return _module(name, (PartitionSpec(name.rpartition(".")[2]),), checkpoint)


def find_lookalikes(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Modules named like the parts of a fused layer, in a checkpoint whose architecture is not known."""
    if find_architecture(checkpoint.config.value) is not None:
        return ()
    return tuple(_stored_modules(_QKVZ, checkpoint.tensors))


def _groups_of(layer: FusedLayer, checkpoint: Checkpoint) -> Iterable[FusedGroup]:
    stored = set(_stored_modules(layer, checkpoint.tensors))
    for parent in sorted({name.rpartition(".")[0] for name in stored}, key=_natural):
        modules = []
        for part, specs in layer.modules.items():
            name = f"{parent}.{part}"
            if name not in stored:
                raise CheckpointError(
                    "A fused group is incomplete",
                    where=f"{parent}.{layer.name}",
                    expected=", ".join(layer.modules),
                    found=f"no {name}.weight",
                    hint="loaders fill the missing rows with whatever memory held: export the model again",
                )
            modules.append(_module(name, specs, checkpoint))
        yield FusedGroup(f"{parent}.{layer.name}", layer, tuple(modules))


_NOT_THE_LANGUAGE_MODEL = r"mtp\.|(?:.*\.)?(?:visual|vision_\w+)\."


def _stored_modules(layer: FusedLayer, tensors: Iterable[str]) -> list[str]:
    names = "|".join(re.escape(name) for name in layer.modules)
    pattern = re.compile(rf"((?!{_NOT_THE_LANGUAGE_MODEL})(?:.*\.)?{layer.parent}\.(?:{names}))\.weight")
    return [found.group(1) for found in map(pattern.fullmatch, tensors) if found]


def _module(name: str, specs: tuple[PartitionSpec, ...], checkpoint: Checkpoint) -> Module:
    shard, weight = checkpoint.tensors[f"{name}.weight"]
    if len(weight.shape) != 2:
        raise CheckpointError(
            "A linear layer is not a matrix",
            where=f"{shard.name}: {weight.name}",
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
            where=f"{shard.name}: {weight.name}",
            expected=" + ".join(f"{p.name} {p.rows}" for p in partitions) + f" = {start} rows",
            found=f"shape {list(weight.shape)}",
            hint="config.json and weights are of different models, or the rows are stored in another order",
        )
    return Module(name, tuple(partitions), weight, *(_optional(f"{name}.{s}", checkpoint) for s in _SCALES))


_SCALES = ("weight_scale", "input_scale", "weight_scale_inv")


def _optional(name: str, checkpoint: Checkpoint) -> TensorInfo | None:
    found = checkpoint.tensors.get(name)
    return None if found is None else found[1]


_HEADS = PartitionSpec("", ("num_attention_heads",))


def _size(spec: PartitionSpec, config: Mapping[str, Any]) -> int:
    text_config = _text_config(config)
    factors = []
    for key in spec.size:
        value = text_config.get(key)
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


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a config: vision-language models nest it."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layer 2 before layer 10. Every other part is digits; they may be more than int() takes."""
    parts = re.split(r"(\d+)", name)
    return [(len(digits := part.lstrip("0")), digits) if i % 2 else (0, part) for i, part in enumerate(parts)]


def _common_prefix(names: list[str]) -> str:
    first, last = min(names), max(names)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:same]
