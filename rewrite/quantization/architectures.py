"""Which modules inference engines fuse when they load a model, by model family.

:data:`ARCHITECTURES` has the families that engines were run with (the facts of ``rewrite/loaders/versions.py``): their
rows are checked, and their NVFP4 scales folded. The layers of all others are found by the atlas, ``by_source.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal


@dataclass(frozen=True)
class PartitionSpec:
    """A slice of output rows: as many as the product of these keys of the text config; () for all of the module's."""

    name: str
    size: tuple[str, ...] = ()


@dataclass(frozen=True)
class Absorber:
    """Where a factor of the output of the module ``folded`` can go: nothing but products with each row of it come
    before the module ``into``. ``kept`` cannot give a factor away: what follows it is not linear. A norm divides by the
    size of its input: it needs no change, and nothing but its epsilon sees the factor."""

    kept: str
    folded: str
    into: str
    kind: Literal["linear", "convolution", "norm"] = "linear"  # the convolution is depthwise: a filter for each row


@dataclass(frozen=True)
class FusedLayer:
    """Stored modules, in the order in which loaders concatenate them, and the name of the layer they become."""

    name: str
    parent: str  # regex for the last part of the module's parent
    modules: Mapping[str, tuple[PartitionSpec, ...]]
    absorber: Absorber | None = None
    also: tuple[str, ...] = ()  # other names that engines give the fused layer
    needs: str = ""  # a key of the text config; without a value for it, there is no such layer
    by_source: bool = False  # from the atlas: no entry of ARCHITECTURES has it

    @property
    def target(self) -> str:
        """A ``re:`` target for the stored modules *and* the fused layer.

        vLLM and SGLang look a fused layer up under its own name, then under its class name (``…Linear``), and only
        then under its parts: a target that misses the fused name loses to a catch-all ``Linear`` group.
        """
        names = list(dict.fromkeys([*self.modules, self.name, *self.also]))
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
QKVZ = FusedLayer(
    name="in_proj_qkvz",
    parent="linear_attn",
    modules={
        "in_proj_qkv": (PartitionSpec("q", _KEY_DIM), PartitionSpec("k", _KEY_DIM), PartitionSpec("v", _VALUE_DIM)),
        "in_proj_z": (PartitionSpec("z", _VALUE_DIM),),
    },
    # transformers ``Qwen3_5GatedDeltaNet.forward``: a depthwise convolution over q, k and v, then SiLU; z is a gate.
    absorber=Absorber(kept="in_proj_z", folded="in_proj_qkv", into="conv1d", kind="convolution"),
)
#: Its two small projections, nearly always left in BF16.
_BA = FusedLayer(
    name="in_proj_ba",
    parent="linear_attn",
    modules={"in_proj_b": (PartitionSpec("b"),), "in_proj_a": (PartitionSpec("a"),)},
)
#: Gated DeltaNet of Qwen3-Next: fused on disk, rows interleaved per key head, so one partition for all of it.
_QKVZ_ON_DISK = FusedLayer("in_proj_qkvz", "linear_attn", {"in_proj_qkvz": (PartitionSpec("qkvz"),)})
_BA_ON_DISK = FusedLayer("in_proj_ba", "linear_attn", {"in_proj_ba": (PartitionSpec("ba"),)})
_QKV = FusedLayer(
    name="qkv_proj",
    parent="self_attn",
    modules={f"{name}_proj": (PartitionSpec(name),) for name in "qkv"},
)
_GATE_UP = FusedLayer(
    name="gate_up_proj",
    parent=r"mlp(?:\.shared_expert)?",
    modules={f"{name}_proj": (PartitionSpec(name),) for name in ("gate", "up")},
    absorber=Absorber(kept="gate_proj", folded="up_proj", into="down_proj"),  # down(act(gate(x)) * up(x))
)
#: Of DeepSeek-V3, whose shared experts are one MLP under another name.
_GATE_UP_SHARED = replace(_GATE_UP, parent=r"mlp(?:\.shared_experts)?")
#: Multi-head latent attention: vLLM ``DeepseekV2ForCausalLM.packed_modules_mapping``; SGLang gives it the longer name.
_LATENT = FusedLayer(
    name="fused_qkv_a_proj",
    parent="self_attn",
    modules={"q_a_proj": (PartitionSpec("q_a"),), "kv_a_proj_with_mqa": (PartitionSpec("kv_a"),)},
    # transformers ``DeepseekV3Attention.forward``: a norm of all of q_a; of kv_a only what no positions are put into.
    absorber=Absorber(kept="kv_a_proj_with_mqa", folded="q_a_proj", into="q_a_layernorm", kind="norm"),
    also=("fused_qkv_a_proj_with_mqa",),
    needs="q_lora_rank",
)
#: Gate, up and down of an expert, by the names that families give them.
EXPERT_PROJECTIONS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
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
        ("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", "minicpmv4_6"), (QKVZ, _BA, _QKV, _GATE_UP)
    ),
    Architecture(("qwen3_next",), (_QKVZ_ON_DISK, _BA_ON_DISK, _QKV, _GATE_UP)),
    Architecture(("llama", "mistral", "qwen2", "qwen3"), (_QKV, _GATE_UP)),
    Architecture(("phi3",), (_QKV_ON_DISK, _GATE_UP_ON_DISK)),
    Architecture(("deepseek_v3",), (_LATENT, _GATE_UP_SHARED)),
)


def find_architecture(config: Mapping[str, Any]) -> Architecture | None:
    """The entry of :data:`ARCHITECTURES` for a config.json, or None."""
    types = (config.get("model_type"), text_config(config).get("model_type"))
    return next((a for a in ARCHITECTURES if any(t in a.model_types for t in types)), None)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a config: vision-language models nest it."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def first_class(config: Mapping[str, Any]) -> str:
    """The first of ``architectures``; "" where there is none."""
    stated = config.get("architectures")
    return str(stated[0]) if isinstance(stated, list) and stated else ""


def _common_prefix(names: list[str]) -> str:
    first, last = min(names), max(names)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:same]
