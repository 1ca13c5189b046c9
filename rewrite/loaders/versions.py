"""What is known of each engine, as dated facts, and the rows of versions that follow from their dates.

The recorded runs of the real engines (tests/loader_matrix.json, tests/zoo/engines.json) are what the predictions must
agree with. What no fact is about is not known.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from rewrite.ledger.fault import Code, Fault
from rewrite.loaders.behaviors import (
    OTHER_FORMAT,
    Behavior,
    every_slot,
    every_slot_or_vector,
    may_be_refused,
    separate_gated_delta_net,
    separate_modules,
    slot_zero_only,
    split_by_sizes,
)
from rewrite.loaders.facts import Fact, held
from rewrite.loaders.kernel_rules import KERNEL_RULES, NEWEST_RUN
from rewrite.loaders.kernels import NOT_KNOWN, cards_of, judge, used
from rewrite.loaders.layer import Layer
from rewrite.loaders.lookups import SGLANG, VLLM, VLLM_CLASS_FIRST, VLLM_RAISES, Lookup
from rewrite.loaders.measured import Measured
from rewrite.loaders.nvfp4 import Nvfp4Behavior, not_run, one_global_scale, one_or_refused, separate, unset_slots
from rewrite.loaders.obstacles import (
    Obstacle,
    attention_is_cast,
    block_scales_are_renamed,
    block_size_is_of_the_class,
    blocks_are_torn,
    blocks_are_torn_in_sglang,
    cache_scales_of_qwen3_next,
    experts_have_another_name,
    experts_lose_their_scale,
    ignore_must_survive_renaming,
    key_was_not_run,
    latent_scales_are_joined,
    listed_head_is_plain,
    method_is_not_stated,
    minicpmv_vision_is_cast,
    missing_scales_are_made_up,
    mixed_without_nvfp4,
    names_are_newer,
    nested_config_is_not_read,
    nested_config_was_not_run,
    old_key_is_not_read,
    parts_are_cast,
    parts_follow_the_quantized_one,
    quark_was_not_run,
    router_bias_is_not_stated,
    rows_are_turned,
    scalars_are_refused,
    scales_are_left_out,
    scales_are_rounded,
    shared_experts_have_no_weight,
    stack_does_not_fit,
    tower_was_not_run,
    vocabulary_has_no_scale,
    vocabulary_is_quantized,
)
from rewrite.loaders.of_faults import (
    OfFault,
    codes_are_served,
    config_is_not_read,
    fp8_is_no_nvfp4,
    is_beside,
    key_is_needed,
    nan_is_refused,
    no_place_beside_fp8,
    no_such_layer,
    no_such_parameter,
    no_such_scheme,
    not_known,
    nothing_fills_it,
    nothing_is_loaded,
    plain_weights_are_cast,
    router_has_no_scale,
    sizes_are_checked,
    stacked_experts_are_refused,
    unset_scale_is_taken,
    v_needs_k,
)
from rewrite.loaders.outcome import Kernels, Outcome
from rewrite.loaders.ranges import Engine, version_key
from rewrite.loaders.views import CheckpointView


@dataclass(frozen=True)
class Checkpoints:
    """Checkpoints of these families (``model_type``), in no other forms than these, of these classes
    (``architectures``); empty: of all."""

    families: tuple[str, ...] = ()
    forms: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()

    def has(self, checkpoint: CheckpointView) -> bool:
        named = not self.families or checkpoint.model_type in self.families
        of_class = not self.classes or checkpoint.architecture in self.classes
        return named and of_class and (not self.forms or forms(checkpoint) <= set(self.forms))


def forms(checkpoint: CheckpointView) -> frozenset[str]:
    """How a checkpoint is quantized: its dialect ("none": not at all), and what engines have code of its own for."""
    found = {checkpoint.dialect, *([] if checkpoint.dialect_is_read else ["layers that it does not state"])}
    if checkpoint.block_layers:
        found.add("blocks")
    if checkpoint.weight_only_nvfp4 and checkpoint.dialect == "modelopt MIXED_PRECISION":
        found.add("W4A16_NVFP4")
    if checkpoint.group_scales:
        found.add("scales for groups")
    if checkpoint.nvfp4_layers and checkpoint.dialect == "compressed-tensors":
        found.add("NVFP4")
    return frozenset(found)


#: Every version whose loading was run, oldest first. A new version is added here; facts say where it differs.
RUN: Mapping[str, tuple[str, ...]] = {
    "vLLM": (
        *("0.17.0", "0.17.1", "0.19.1", "0.20.0", "0.20.2", "0.21.0", "0.22.0", "0.26.0", "0.27.0", "0.32.0"),
        "0.33.0 with the compiled parts of 0.32.0",
    ),
    "SGLang": (
        *("0.5.9", "0.5.10", "0.5.10.post1", "0.5.11", "0.5.12", "0.5.14", "0.5.15", "0.5.16", "0.5.17", "0.5.18"),
        *("0.5.22", "0.5.23"),
    ),
    "transformers": ("5.17.0", "5.22.2", "5.23.0", "5.24.0"),
}

#: Every family was run with compressed-tensors, and so with layers that are left plain: all of them are in "none".
_CT, _MODELOPT, _FP8, _QUARK = ("compressed-tensors", "none"), ("modelopt",), ("fp8",), ("quark",)
_MIXED, _MODELOPT_FP4 = ("modelopt MIXED_PRECISION",), ("modelopt NVFP4",)
_W4A16, _GEMMA_4 = (*_MIXED, "W4A16_NVFP4"), ("gemma4", "gemma4_text")
_FP4 = (*_CT, "NVFP4")
_VISION, _TEXT, _MINICPM = ("qwen3_5", "qwen3_5_moe"), ("qwen3_5_text", "qwen3_5_moe_text"), ("minicpmv4_6",)
_NEXT, _DEEPSEEK = ("qwen3_next",), ("deepseek_v3",)
_FP8_BLOCKS = (*_FP8, "blocks")
_LLAMAS = ("llama", "phi3", "mistral", "ministral3", "internlm3", "teleflm")  # SGLang's classes of these are Llama's
_OTHERS = ("llama", "phi3", *_NEXT)
_ALL = (*_VISION, *_TEXT, *_OTHERS, *_MINICPM, *_DEEPSEEK)
#: What the search draws for every family (tests/recipes.py), and what is in the zoo.
_SEARCHED = (*_FP4, *_MODELOPT, *_FP8, *_MODELOPT_FP4, "blocks")

RECORD = "tests/loader_matrix.json"
_ZOO = "tests/zoo/engines.json, search"


def _fails(detail: str) -> Outcome:
    return Outcome("fails to load", detail)


_TEXT_IS_UNKNOWN = _fails("knows Qwen3.5 with a vision tower only")
_MINICPM_IS_UNKNOWN = _fails("does not know MiniCPM-V 4.6")
_PACKED = _fails("takes packed NVFP4 weights for matrices of another shape")
_REF_IS_UNKNOWN = _fails("knows no model_type 'deepseek_ref', nor does transformers")
_STEP, _STEP_IS_UNKNOWN = ("Step3p7FlashForCausalLM",), _fails("has no class Step3p7FlashForCausalLM")

#: What each engine was run with, family by family. The outcome of a whole family or form, or None: it depends on more.
#: Each first and last version of a range, or another one of its row, was run; those between are assumed to be alike.
RUNS: tuple[Fact[Checkpoints, Outcome | None], ...] = (
    Fact("vLLM", "0.17.0", "0.26.0", Checkpoints(_TEXT, (*_SEARCHED, *_MIXED)), _TEXT_IS_UNKNOWN, RECORD),
    Fact("vLLM", "0.17.0", "0.19.1", Checkpoints(_TEXT, _QUARK), _TEXT_IS_UNKNOWN, _ZOO),
    Fact("vLLM", "0.27.0", None, Checkpoints(_TEXT, (*_SEARCHED, *_MIXED)), None, _ZOO),
    Fact("vLLM", "0.17.0", "0.21.0", Checkpoints(_MINICPM, _CT), _MINICPM_IS_UNKNOWN, RECORD),
    Fact("vLLM", "0.22.0", None, Checkpoints(_MINICPM, _CT), None, RECORD),
    Fact("vLLM", "0.17.0", None, Checkpoints((*_VISION, *_OTHERS), (*_SEARCHED, *_MIXED)), None, _ZOO),
    Fact("vLLM", "0.17.0", "0.19.1", Checkpoints((*_VISION, *_OTHERS), _QUARK), None, _ZOO),
    Fact("vLLM", "0.27.0", None, Checkpoints((*_VISION, *_TEXT, *_OTHERS), _QUARK), None, _ZOO),
    Fact("vLLM", "0.27.0", None, Checkpoints(_DEEPSEEK, (*_FP4, *_MODELOPT)), None, RECORD),
    Fact("vLLM", "0.27.0", None, Checkpoints(("deepseek_ref",), _FP8_BLOCKS), _REF_IS_UNKNOWN, "run: 0.32.0"),
    Fact("SGLang", "0.5.23", None, Checkpoints(("deepseek_ref",), _FP8_BLOCKS), _REF_IS_UNKNOWN, "run: 0.5.23"),
    Fact("vLLM", "0.27.0", None, Checkpoints(("step3p7",), _FP8_BLOCKS, _STEP), _STEP_IS_UNKNOWN, "run: 0.32.0"),
    Fact("SGLang", "0.5.23", None, Checkpoints(("step3p7",), _FP8_BLOCKS, _STEP), _STEP_IS_UNKNOWN, "run: 0.5.23"),
    Fact("SGLang", "0.5.9", "0.5.16", Checkpoints(_TEXT, (*_SEARCHED, *_MIXED)), _TEXT_IS_UNKNOWN, RECORD),
    Fact("SGLang", "0.5.9", "0.5.11", Checkpoints(_MINICPM, _CT), _MINICPM_IS_UNKNOWN, RECORD),
    Fact("SGLang", "0.5.12", None, Checkpoints(_MINICPM, _CT), None, RECORD),
    Fact("SGLang", "0.5.9", "0.5.14", Checkpoints(_VISION, _MIXED), _fails("takes MIXED_PRECISION for w4afp8"), RECORD),
    Fact("SGLang", "0.5.15", None, Checkpoints(_VISION, _MIXED), None, RECORD),
    Fact("SGLang", "0.5.17", None, Checkpoints(_TEXT, _CT), None, RECORD),
    Fact("SGLang", "0.5.9", None, Checkpoints((*_VISION, *_OTHERS), _CT), None, RECORD),
    Fact("SGLang", "0.5.9", None, Checkpoints((*_VISION, "llama"), _MODELOPT), None, RECORD),
    Fact("SGLang", "0.5.9", None, Checkpoints(("qwen3_5",), _FP8), None, RECORD),
    Fact("SGLang", "0.5.23", None, Checkpoints((*_VISION, *_TEXT, *_OTHERS), _SEARCHED), None, _ZOO),
    Fact("SGLang", "0.5.23", None, Checkpoints(_TEXT, _MIXED), None, _ZOO),
    Fact("SGLang", "0.5.23", None, Checkpoints((*_VISION, *_TEXT, *_OTHERS), _QUARK), None, _ZOO),
    Fact("SGLang", "0.5.23", None, Checkpoints(_DEEPSEEK, (*_FP4, *_MODELOPT)), None, RECORD),
    Fact("transformers", "5.17.0", None, Checkpoints(_ALL, _QUARK), _fails("needs the package amd-quark"), "tests/zoo"),
    Fact("transformers", "5.17.0", None, Checkpoints(_ALL, _CT), None, RECORD),
    Fact("transformers", "5.17.0", None, Checkpoints((*_VISION, *_DEEPSEEK), _FP4), None, RECORD),
    Fact("transformers", "5.17.0", None, Checkpoints((*_VISION, "llama"), _MODELOPT), None, RECORD),
    Fact("transformers", "5.17.0", None, Checkpoints(("qwen3_5",), _FP8), None, RECORD),
    Fact("transformers", "5.17.0", None, Checkpoints(("qwen3_5",), _MIXED), _PACKED, RECORD),
    Fact("transformers", "5.17.0", None, Checkpoints(("qwen3_5_moe",), _MODELOPT_FP4), _PACKED, RECORD),
)

_EVERY = Checkpoints()
_IN_CT = Checkpoints(forms=("compressed-tensors", "NVFP4", "blocks"))
_CT_020 = "run with compressed-tensors 0.20.0"

#: What ends a load, whatever the groups are, where the function has an outcome for the checkpoint.
OBSTACLES: tuple[Fact[Checkpoints, Obstacle], ...] = (
    Fact("SGLang", "0.5.9", "0.5.22", _EVERY, nested_config_was_not_run, "read in 0.5.9, 0.5.12"),
    Fact("SGLang", "0.5.23", None, _EVERY, nested_config_is_not_read, "run: 0.5.23"),
    Fact("transformers", "5.17.0", None, _IN_CT, old_key_is_not_read, "read in 5.17.0, run: 5.24.0"),
    Fact("vLLM", "0.17.0", None, _IN_CT, key_was_not_run, "0.32.0 compressed_tensors/transform"),
    Fact("SGLang", "0.5.9", None, _IN_CT, key_was_not_run, "read in 0.5.23"),
    Fact("transformers", "5.17.0", None, _IN_CT, key_was_not_run, "not run"),
    Fact("vLLM", "0.17.0", None, Checkpoints(forms=_QUARK), quark_was_not_run, "quark.py"),
    Fact("SGLang", "0.5.23", None, Checkpoints(forms=_QUARK), quark_was_not_run, "quark.py"),
    Fact("vLLM", "0.17.0", None, _EVERY, method_is_not_stated, "model_arch_config_convertor.py"),
    Fact("vLLM", "0.17.0", None, _EVERY, blocks_are_torn, "fp8_utils.py: validate_fp8_block_shape"),
    Fact("vLLM", "0.17.0", None, Checkpoints(_DEEPSEEK), router_bias_is_not_stated, "0.32.0 models/deepseek_v2.py"),
    Fact("vLLM", "0.17.0", None, _IN_CT, vocabulary_has_no_scale, "tests/zoo/engines.json"),
    Fact("vLLM", "0.27.0", None, Checkpoints(forms=_W4A16), listed_head_is_plain, "run: 0.32.0"),
    Fact("SGLang", "0.5.23", None, Checkpoints(forms=_W4A16), listed_head_is_plain, "run: 0.5.23"),
    Fact("vLLM", "0.27.0", None, Checkpoints(("gpt_oss",)), stack_does_not_fit, "run: 0.32.0"),
    Fact("SGLang", "0.5.23", None, Checkpoints(("gpt_oss",)), stack_does_not_fit, "run: 0.5.23"),
    Fact("vLLM", "0.27.0", None, Checkpoints(_GEMMA_4), experts_have_another_name, "run: 0.32.0"),
    Fact("SGLang", "0.5.9", None, _EVERY, blocks_are_torn_in_sglang, "fp8_utils.py, fp8.py"),
    Fact("SGLang", "0.5.9", None, _IN_CT, block_size_is_of_the_class, "read in 0.5.9 to 0.5.23"),
    Fact(
        "SGLang",
        "0.5.23",
        None,
        Checkpoints((*_LLAMAS, "mistral3"), _FP8_BLOCKS),
        block_scales_are_renamed,
        "models/llama.py",
    ),
    Fact("SGLang", "0.5.9", None, Checkpoints(_NEXT), cache_scales_of_qwen3_next, "0.5.23 models/qwen3_next.py"),
    Fact("SGLang", "0.5.9", "0.5.9", _IN_CT, ignore_must_survive_renaming, RECORD),
    Fact("SGLang", "0.5.12", "0.5.22", Checkpoints(_MINICPM), minicpmv_vision_is_cast, RECORD),
    Fact("SGLang", "0.5.23", None, Checkpoints((*_VISION, *_MINICPM)), tower_was_not_run, "search, seed 9580"),
    Fact("SGLang", "0.5.15", None, Checkpoints(forms=_MIXED), mixed_without_nvfp4, "0.5.23 model_config.py"),
    Fact("SGLang", "0.5.23", None, Checkpoints(forms=_MIXED), parts_follow_the_quantized_one, "modelopt_quant.py"),
    Fact("SGLang", "0.5.23", None, _EVERY, latent_scales_are_joined, "deepseek_weight_loader.py"),
    Fact("SGLang", "0.5.23", None, Checkpoints(("glm4_moe",), _FP4), shared_experts_have_no_weight, "run: 0.5.23"),
    Fact("SGLang", "0.5.23", None, Checkpoints(("gemma3",)), names_are_newer, "run: 0.5.23"),
    Fact("SGLang", "0.5.23", None, Checkpoints(("llama4", "llama4_text")), rows_are_turned, "run: 0.5.23"),
    Fact("transformers", "5.17.0", None, Checkpoints(forms=(*_MODELOPT, *_FP8)), scales_are_left_out, RECORD),
    Fact("transformers", "5.17.0", None, _EVERY, scales_are_rounded, _CT_020),
    Fact("transformers", "5.17.0", None, _IN_CT, missing_scales_are_made_up, _CT_020),
    Fact("transformers", "5.17.0", None, _IN_CT, experts_lose_their_scale, RECORD),
    Fact("transformers", "5.23.0", None, _IN_CT, scalars_are_refused, "core_model_loading.py"),
)

#: What comes of faults of a checkpoint. The versions that were run: vLLM 0.32.0, SGLang 0.5.23, transformers 5.17.0.
OF_FAULTS: tuple[Fact[Code, OfFault], ...] = (
    Fact("vLLM", "0.27.0", None, "plain-layer", plain_weights_are_cast, "issue #40252"),
    Fact("vLLM", "0.27.0", None, "ignore-pattern", plain_weights_are_cast, "run: 0.32.0"),
    Fact("SGLang", "0.5.23", None, "ignore-pattern", plain_weights_are_cast, "run: 0.5.23"),
    Fact("vLLM", "0.27.0", None, "router", router_has_no_scale, "llm-compressor issue #2714"),
    Fact("vLLM", "0.27.0", None, "scale-value", nan_is_refused, "ModelOpt issue #1633"),
    Fact("vLLM", "0.27.0", None, "no-input-scale", unset_scale_is_taken, "issue #45212"),
    Fact("vLLM", "0.27.0", None, "no-scale", unset_scale_is_taken, "PR #54444"),
    Fact("vLLM", "0.27.0", None, "label", fp8_is_no_nvfp4, "ModelOpt issue #868"),
    Fact("vLLM", "0.27.0", None, "no-matrix", stacked_experts_are_refused, "routed_experts.py"),
    Fact("vLLM", "0.27.0", None, "kv-scale-alone", v_needs_k, "issue #46264"),
    Fact("vLLM", "0.27.0", None, "scale-name", no_such_parameter, "run: 0.32.0"),
    Fact("vLLM", "0.27.0", None, "label", no_such_scheme, "run: 0.32.0"),
    Fact("SGLang", "0.5.23", None, "label", no_such_scheme, "run: 0.5.23"),
    Fact("vLLM", "0.27.0", None, "no-role", no_place_beside_fp8, "run: 0.32.0"),
    Fact("vLLM", "0.27.0", None, "no-activations", key_is_needed, "run: 0.32.0"),
    Fact("SGLang", "0.5.23", None, "no-activations", key_is_needed, "run: 0.5.23"),
    Fact("vLLM", "0.27.0", None, "arguments", config_is_not_read, "run: 0.32.0"),
    Fact("SGLang", "0.5.23", None, "arguments", config_is_not_read, "run: 0.5.23"),
    Fact("transformers", "5.23.0", None, "arguments", config_is_not_read, "run: 5.24.0"),
    Fact("vLLM", "0.27.0", None, "missing", nothing_fills_it, "run: 0.32.0"),
    Fact("vLLM", "0.27.0", None, "uncounted", no_such_layer, "run: 0.32.0"),
    Fact("SGLang", "0.5.23", None, "uncounted", sizes_are_checked, "run: 0.5.23"),
    Fact("vLLM", "0.27.0", None, "wrapped-name", no_such_layer, "run: 0.32.0"),
    Fact("SGLang", "0.5.23", None, "wrapped-name", nothing_is_loaded, "run: 0.5.23"),
    Fact("SGLang", "0.5.23", None, "missing", nothing_fills_it, "run: 0.5.23"),
    Fact("transformers", "5.17.0", None, "status", codes_are_served, "issue #47145"),
)

#: What comes on top of what is made of the groups.
CAVEATS: tuple[Fact[Checkpoints, Obstacle], ...] = (
    Fact("SGLang", "0.5.10", "0.5.10.post1", _IN_CT, parts_are_cast, RECORD),
    Fact("SGLang", "0.5.10", "0.5.10.post1", Checkpoints(forms=_FP8), attention_is_cast, RECORD),
)

#: How the scales of one FP8 group are read.
FP8_GROUPS: tuple[Fact[str, Behavior], ...] = (
    Fact("vLLM", "0.17.0", "0.19.1", "FP8", slot_zero_only, "issue #38197"),
    Fact("vLLM", "0.20.0", None, "FP8", every_slot, "PR #38517"),
    Fact("SGLang", "0.5.9", "0.5.9", "FP8", separate_gated_delta_net, RECORD),
    Fact("SGLang", "0.5.10", "0.5.10.post1", "FP8", split_by_sizes, RECORD),
    Fact("SGLang", "0.5.11", None, "FP8", every_slot_or_vector, RECORD),
    Fact("transformers", "5.17.0", None, "FP8", separate_modules, "compressed-tensors 0.20.0"),
)

#: How the global scales of one NVFP4 group are read.
NVFP4_GROUPS: tuple[Fact[str, Nvfp4Behavior], ...] = (
    Fact("vLLM", "0.17.0", "0.19.1", "NVFP4", unset_slots, "issue #38197"),
    Fact("vLLM", "0.20.0", None, "NVFP4", one_global_scale, RECORD),
    Fact("SGLang", "0.5.23", None, "NVFP4", one_or_refused, RECORD),
    Fact("transformers", "5.17.0", None, "NVFP4", separate, RECORD),
)

#: How layers are looked up in a config; where there is none, as the library does.
LOOKUPS: tuple[Fact[str, Lookup], ...] = (
    Fact("vLLM", "0.17.0", "0.20.2", "names", VLLM_RAISES, "compressed_tensors/utils.py"),
    Fact("vLLM", "0.21.0", "0.26.0", "names", VLLM_CLASS_FIRST, "compressed_tensors/utils.py"),
    Fact("vLLM", "0.27.0", None, "names", VLLM, "compressed_tensors/utils.py"),
    Fact("SGLang", "0.5.9", None, "names", SGLANG, "compressed_tensors/utils.py"),
)


def _qualified(outcome: Outcome, layer: str) -> Outcome:
    partitions = tuple(f"{layer}.{name}" for name in outcome.partitions)
    factors = tuple((f"{layer}.{name}", factor) for name, factor in outcome.factors)
    return replace(outcome, partitions=partitions, factors=factors)


def _furthest(outcomes: Iterable[Outcome]) -> tuple[tuple[str, float], ...]:
    """For each partition the factor that is furthest from 1, of all groups."""
    factors = [each for outcome in outcomes for each in outcome.factors]
    found = dict(sorted(factors, key=lambda each: abs(each[1] - 1)))  # the last one counts
    return tuple(sorted(found.items()))


@dataclass(frozen=True)
class Loader(Engine):
    """Neighboring versions of an engine of which the same facts are known."""

    behavior: Behavior
    runs: tuple[Fact[Checkpoints, Outcome | None], ...] = ()
    obstacles: tuple[Fact[Checkpoints, Obstacle], ...] = ()
    caveats: tuple[Fact[Checkpoints, Obstacle], ...] = ()
    of_faults: tuple[Fact[Code, OfFault], ...] = ()
    lookup: Lookup | None = None
    nvfp4: Nvfp4Behavior = not_run

    @property
    def takes_vectors(self) -> bool:
        """Whether it reads a scale of one value per partition."""
        return self.behavior is every_slot_or_vector

    @property
    def fills_slot_zero_only(self) -> bool:
        """Whether it has the fault of issue #38197."""
        return self.behavior is slot_zero_only

    def was_run(self, checkpoint: CheckpointView) -> bool:
        """Whether any of these versions was run with a checkpoint of this family and form."""
        return any(fact.applies.has(checkpoint) for fact in self.runs)

    def predict(self, checkpoint: CheckpointView) -> Outcome:
        """The worst over all groups, naming every partition that is affected that way."""
        run = next((fact for fact in self.runs if fact.applies.has(checkpoint)), None)
        if run is None:
            return self._of_family(checkpoint)
        return self._judge(checkpoint) if run.outcome is None else run.outcome

    def is_judged(self, checkpoint: CheckpointView) -> bool:
        """Whether anything is known of the family in this form."""
        run = None if self.was_run(checkpoint) else self._measured(checkpoint)
        return self.was_run(checkpoint) if run is None else run.agrees

    def _measured(self, checkpoint: CheckpointView) -> Measured | None:
        """A run of one of these versions with such a checkpoint, of a family that no fact is about."""
        runs = () if checkpoint.by_source is None else checkpoint.by_source.measured
        return next((run for run in runs if run.engine == self.name and self.covers(run.version)), None)

    def by_rules(self, checkpoint: CheckpointView) -> Outcome:
        """What the rules of these versions give for the layers that the atlas has, whether anybody ran them or not."""
        known = () if checkpoint.by_source is None else checkpoint.by_source.said
        sources = [each for each in known if each.engine == self.name and self.covers(each.version)]
        if not sources:
            return Outcome("not known", f"{self.name} has no class for it")
        source, *later = sources
        if any(each.slots != source.slots for each in later):  # of a release that was read, and not run
            said = (
                f"{self.name} {later[-1].version} fuses its layers in another way than {source.version}, which was run"
            )
            return Outcome("not known", said)
        groups = tuple(group for group in checkpoint.groups if group.name not in source.apart)
        # Only what was run counts: a head that was quantized in no run is covered by none.
        return self._judge(replace(checkpoint, groups=groups, misread=source.misread, vocabulary_is_quantized=False))

    def _of_family(self, checkpoint: CheckpointView) -> Outcome:
        """Of a family that no fact is about."""
        run = self._measured(checkpoint)
        if run is None:
            form = " with ".join(sorted(forms(checkpoint), key=lambda name: name != checkpoint.dialect))
            return Outcome("not known", f"not run with {checkpoint.model_type!r} in the form {form!r}")
        if run.agrees:
            return self.by_rules(checkpoint)
        return Outcome("not known", f"{run.engine} {run.version} was run with such a one: {run.seen}; {run.why}")

    def _judge(self, checkpoint: CheckpointView) -> Outcome:
        wrong = [
            outcome for fault in checkpoint.faults if (outcome := self._of_fault_in(checkpoint, fault)) is not None
        ]
        if any(outcome.kind == "fails to load" for outcome in wrong):
            return _worst(wrong, checkpoint)
        if obstacles := _said(self.obstacles, checkpoint):
            return _worst(obstacles, checkpoint)
        misread = checkpoint.misread.get(self.lookup) if self.lookup is not None else None
        if unknown := misread or vocabulary_is_quantized(checkpoint):
            return unknown if unknown.kind == "not known" else _worst([unknown, *wrong], checkpoint)
        outcomes = [_qualified(self.of_group(group), group.kind) for group in checkpoint.groups]
        worst = _worst([*outcomes, *wrong, *_said(self.caveats, checkpoint)], checkpoint)
        unsure = (outcome for outcome in wrong if outcome.kind == "not known")  # what may end the load
        return worst if worst.kind == "fails to load" else next(unsure, worst)

    def serves(self, checkpoint: CheckpointView, platform: str | None) -> Outcome:
        """What is made of the checkpoint when it is loaded and computed with on ``platform``; None: loaded only."""
        loaded = self.predict(checkpoint)
        if platform is None or loaded.kind == "fails to load" or not self.is_judged(checkpoint):
            return loaded
        running = judge(self.name, (self.first, self.last), platform, checkpoint.kernel_schemes)
        return loaded if running is None or running.severity <= loaded.severity else running

    def kernels(self, checkpoint: CheckpointView, platform: str) -> Kernels:
        """What computes with the FP8 layers among the fused groups, for each card of ``platform``."""
        schemes = checkpoint.fused_schemes
        if schemes and not self.is_judged(checkpoint):
            return dict.fromkeys(cards_of(platform), (NOT_KNOWN,))
        return used(self.name, (self.first, self.last), platform, schemes)

    def of_fault(self, fault: Fault) -> Outcome | None:
        """What comes of a fault; None: nothing that is about the weights."""
        if is_beside(fault):
            return None
        known = (fact.outcome(fault) for fact in self.of_faults if fact.applies == fault.code)
        return next((outcome for outcome in known if outcome is not None), None) or not_known(fault)

    def _of_fault_in(self, checkpoint: CheckpointView, fault: Fault) -> Outcome | None:
        """As ``of_fault``. Whether a plain layer is taken for a quantized one depends on the name that it has in the
        engine: vLLM 0.32.0 finds ``language_model.model.…`` in ``ignore``, which is no stored name, and is right."""
        by_name = fault.code == "plain-layer" and self.lookup in checkpoint.plain_by_name
        return not_known(fault) if by_name else self.of_fault(fault)

    def of_group(self, group: Layer) -> Outcome:
        """What is made of one group, where nothing ends the load before."""
        return self.nvfp4(group) if group.nvfp4 else self.behavior(group)


def _worst(outcomes: Sequence[Outcome], checkpoint: CheckpointView) -> Outcome:
    """With the partitions of all that are of its kind."""
    if not outcomes:
        return Outcome("exact")
    worst = max(outcomes, key=lambda outcome: (outcome.severity, outcome.error))
    if worst.kind == "garbled" and any(may_be_refused(group) for group in checkpoint.groups):
        return OTHER_FORMAT  # it may end the load
    alike = [outcome for outcome in outcomes if outcome.kind == worst.kind]
    names = {name for outcome in alike for name in outcome.partitions}
    in_order = dict.fromkeys(f"{group.kind}.{p.name}" for group in checkpoint.groups for p in group.parts)
    hurt = tuple(name for name in in_order if name in names)
    return Outcome(worst.kind, worst.detail, hurt, worst.error, _furthest(alike))


def _said(facts: Iterable[Fact[Checkpoints, Obstacle]], checkpoint: CheckpointView) -> list[Outcome]:
    outcomes = (fact.outcome(checkpoint) for fact in facts if fact.applies.has(checkpoint))
    return [outcome for outcome in outcomes if outcome is not None]


_TABLES: tuple[Iterable[Fact[Any, Any]], ...] = (RUNS, OBSTACLES, CAVEATS, OF_FAULTS, FP8_GROUPS, NVFP4_GROUPS, LOOKUPS)


def _number(run: str) -> str:
    return run.partition(" ")[0]


def _known(engine: str, version: str) -> tuple[Fact[Any, Any], ...]:
    """All facts about a version, and the rules for kernels that have ended before it. A rule that only begins is of a
    platform that the engine has come to, and makes no row of its own."""
    ended = (rule for rule in KERNEL_RULES if rule.engine == engine and rule.until and _after(version, rule.until))
    return (*(fact for table in _TABLES for fact in held(table, engine, version)), *ended)


def _after(version: str, other: str) -> bool:
    return version_key(version) > version_key(other)


def _rows(engine: str, runs: Iterable[str]) -> Iterator[Loader]:
    """A row for each run of neighboring versions of which the same facts are known."""
    ranges = [list(alike) for _, alike in groupby(runs, lambda run: _known(engine, _number(run)))]
    for alike in ranges:
        version = _number(alike[-1])
        (behavior,) = held(FP8_GROUPS, engine, version)
        cited = "" if behavior.source == RECORD else f"{behavior.source}; "
        yield Loader(
            engine,
            _number(alike[0]),
            None if alike is ranges[-1] else version,
            f"{cited}run: {', '.join(alike)}",
            behavior.outcome,
            held(RUNS, engine, version),
            held(OBSTACLES, engine, version),
            held(CAVEATS, engine, version),
            held(OF_FAULTS, engine, version),
            next((fact.outcome for fact in held(LOOKUPS, engine, version)), None),
            next((fact.outcome for fact in held(NVFP4_GROUPS, engine, version)), not_run),
        )


LOADERS = tuple(row for engine, runs in RUN.items() for row in _rows(engine, runs))


def newest_run(name: str) -> str:
    """The newest version of the loader ``name`` that was run."""
    return _number(RUN[name][-1])


def assumptions(wanted: str) -> Iterator[str]:
    """What is assumed of ``NAME@VERSION`` where that version is newer than all that were run, or whose kernels were."""
    rows, version = find_loaders(wanted), wanted.partition("@")[2]
    if not rows or not version:
        return
    name, loaded, kernels = rows[0].name, newest_run(rows[0].name), NEWEST_RUN[rows[0].name]
    if version_key(version) > version_key(loaded):
        yield f"{name} {version} was not run: assumed to be like {loaded}"
    if version_key(version) > version_key(kernels) and kernels != loaded:
        yield f"kernels of {name} {version} were not run: assumed to be those of {kernels}"


def find_loaders(wanted: str) -> tuple[Loader, ...]:
    """The rows for ``NAME`` or ``NAME@VERSION``, the name in any case. Empty when nothing is known of it."""
    name, _, version = wanted.partition("@")
    rows = (loader for loader in LOADERS if loader.name.lower() == name.lower())
    return tuple(loader for loader in rows if not version or loader.covers(version))
