"""Which loader version does what: a row for each range of versions. Adding a version is adding or extending a row.

The recorded runs of the real loaders (tests/loader_matrix.json) are what the predictions must agree with.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TypeVar

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
from rewrite.loaders.kernel_rules import NEWEST_RUN
from rewrite.loaders.kernels import Used, judge, used
from rewrite.loaders.lookups import SGLANG, VLLM, VLLM_CLASS_FIRST, VLLM_RAISES, Lookup
from rewrite.loaders.nvfp4 import Nvfp4Behavior, not_run, one_global_scale, one_or_refused, separate, unset_slots
from rewrite.loaders.obstacles import (
    Obstacle,
    attention_is_cast,
    block_size_is_of_the_class,
    blocks_are_torn,
    blocks_are_torn_in_sglang,
    cache_scales_of_qwen3_next,
    dialect_is_not_read,
    experts_lose_their_scale,
    family_is_not_known,
    ignore_must_survive_renaming,
    latent_attention_was_not_run,
    latent_scales_are_joined,
    minicpmv_is_unknown,
    minicpmv_vision_is_cast,
    missing_scales_are_made_up,
    mixed_is_unknown,
    mixed_was_run_with_qwen_only,
    mixed_without_nvfp4,
    needs_quark,
    parts_are_cast,
    parts_follow_the_quantized_one,
    router_bias_is_not_stated,
    scalars_are_refused,
    scales_are_left_out,
    scales_are_rounded,
    text_only_is_unknown,
    vocabulary_is_quantized,
)
from rewrite.loaders.outcome import Outcome
from rewrite.loaders.ranges import version_key
from rewrite.loaders.views import CheckpointView, GroupView

_Row = TypeVar("_Row")
_Said = TypeVar("_Said")


def _qualified(outcome: Outcome, layer: str) -> Outcome:
    partitions = tuple(f"{layer}.{name}" for name in outcome.partitions)
    factors = tuple((f"{layer}.{name}", factor) for name, factor in outcome.factors)
    return replace(outcome, partitions=partitions, factors=factors)


def _furthest(outcomes: Iterable[Outcome]) -> tuple[tuple[str, float], ...]:
    """For each partition the factor that is furthest from 1, of all groups."""
    factors = [each for outcome in outcomes for each in outcome.factors]
    found = dict(sorted(factors, key=lambda each: abs(each[1] - 1)))  # the last one counts
    return tuple(sorted(found.items()))


#: What ends a load in every version of an engine that was run.
_OF_ENGINE: Mapping[str, tuple[Obstacle, ...]] = {
    "vLLM": (blocks_are_torn, router_bias_is_not_stated),
    "SGLang": (blocks_are_torn_in_sglang, block_size_is_of_the_class, cache_scales_of_qwen3_next),
}


@dataclass(frozen=True)
class Loader:
    """A range of released versions with one behavior. ``last`` None: up to the newest that was run."""

    name: str
    first: str
    last: str | None
    behavior: Behavior
    source: str
    obstacles: tuple[Obstacle, ...] = ()  # end the load before any group is looked at
    caveats: tuple[Obstacle, ...] = ()  # come on top of what is made of the groups
    ran_quark: bool = False  # whether a version of the range was run with AMD Quark's dialect
    lookup: Lookup | None = None  # of schemes in a compressed-tensors config; None: as the library does
    nvfp4: Nvfp4Behavior = not_run

    @property
    def takes_vectors(self) -> bool:
        """Whether it reads a scale of one value per partition."""
        return self.behavior is every_slot_or_vector

    @property
    def fills_slot_zero_only(self) -> bool:
        """Whether it has the fault of issue #38197."""
        return self.behavior is slot_zero_only

    @property
    def versions(self) -> str:
        return self.versions_from(self)

    def versions_from(self, earlier: Loader) -> str:
        """The versions of ``earlier`` and of all rows up to this one, in words."""
        if self.last is None:
            return f"{earlier.first}+"
        return self.last if earlier.first == self.last else f"{earlier.first} to {self.last}"

    def covers(self, version: str) -> bool:
        return version_key(self.first) <= version_key(version) and (
            self.last is None or version_key(version) <= version_key(self.last)
        )

    def _quark_was_not_run(self, checkpoint: CheckpointView) -> Outcome | None:
        if checkpoint.dialect != "quark" or needs_quark in self.obstacles:
            return None
        if not self.ran_quark:
            return Outcome("not known", "these versions were not run with AMD Quark's dialect")
        reason = checkpoint.quark_not_run
        return None if reason is None else Outcome("not known", f"no loader was run with AMD Quark where {reason}")

    def predict(self, checkpoint: CheckpointView) -> Outcome:
        """The worst over all groups, naming every partition that is affected that way."""
        if unknown := dialect_is_not_read(checkpoint) or self._quark_was_not_run(checkpoint):
            return unknown
        outcomes = self._met(checkpoint)
        if not outcomes and self.lookup is not None and self.lookup in checkpoint.misread:
            return checkpoint.misread[self.lookup]
        if not outcomes and (unknown := vocabulary_is_quantized(checkpoint) or family_is_not_known(checkpoint)):
            return unknown
        if not outcomes:
            outcomes = [_qualified(self.of_group(group), group.layer) for group in checkpoint.groups]
            outcomes += [outcome for caveat in self.caveats if (outcome := caveat(checkpoint)) is not None]
        if not outcomes:
            return Outcome("exact")
        worst = max(outcomes, key=lambda outcome: (outcome.severity, outcome.error))
        if worst.kind == "garbled" and any(may_be_refused(group) for group in checkpoint.groups):
            return OTHER_FORMAT  # it may end the load
        alike = [outcome for outcome in outcomes if outcome.kind == worst.kind]
        names = {name for outcome in alike for name in outcome.partitions}
        in_order = dict.fromkeys(f"{group.layer}.{p.name}" for group in checkpoint.groups for p in group.partitions)
        hurt = tuple(name for name in in_order if name in names)
        return Outcome(worst.kind, worst.detail, hurt, worst.error, _furthest(alike))

    def _met(self, checkpoint: CheckpointView) -> list[Outcome]:
        """What ends the load before any group is looked at."""
        met = (obstacle(checkpoint) for obstacle in (*self.obstacles, *_OF_ENGINE.get(self.name, ())))
        return [outcome for outcome in met if outcome is not None]

    def serves(self, checkpoint: CheckpointView, platform: str | None) -> Outcome:
        """What is made of the checkpoint when it is loaded and computed with on ``platform``; None: loaded only."""
        loaded = self.predict(checkpoint)
        if platform is None or loaded.kind == "fails to load":
            return loaded
        running = judge(self.name, (self.first, self.last), platform, checkpoint.kernel_schemes)
        return loaded if running is None or running.severity <= loaded.severity else running

    def kernels(self, checkpoint: CheckpointView, platform: str) -> tuple[Used, ...]:
        """What computes with the FP8 layers among the fused groups, for each card of ``platform``."""
        return used(self.name, (self.first, self.last), platform, checkpoint.fused_schemes)

    def of_group(self, group: GroupView) -> Outcome:
        """What is made of one group, where nothing ends the load before."""
        return self.nvfp4(group) if group.nvfp4 else self.behavior(group)


#: What keeps any version of transformers from serving a checkpoint as it is meant.
_TRANSFORMERS: tuple[Obstacle, ...] = (
    needs_quark,
    scales_are_left_out,
    scales_are_rounded,
    missing_scales_are_made_up,
    experts_lose_their_scale,
)

#: Every loader version that was run or read. One row each; the source says where the behavior comes from.
LOADERS = (
    Loader(
        "vLLM",
        "0.17.0",
        "0.19.1",
        slot_zero_only,
        "issue #38197; run: 0.17.0, 0.17.1, 0.19.1",
        (text_only_is_unknown, minicpmv_is_unknown, latent_attention_was_not_run),
        ran_quark=True,
        lookup=VLLM_RAISES,
        nvfp4=unset_slots,
    ),
    Loader(
        "vLLM",
        "0.20.0",
        "0.20.2",
        every_slot,
        "PR #38517; run: 0.20.0, 0.20.2",
        (text_only_is_unknown, minicpmv_is_unknown, latent_attention_was_not_run),
        lookup=VLLM_RAISES,
        nvfp4=one_global_scale,
    ),
    Loader(
        "vLLM",
        "0.21.0",
        "0.21.0",
        every_slot,
        "run: 0.21.0",
        (text_only_is_unknown, minicpmv_is_unknown, latent_attention_was_not_run),
        lookup=VLLM_CLASS_FIRST,
        nvfp4=one_global_scale,
    ),
    Loader(
        "vLLM",
        "0.22.0",
        "0.26.0",
        every_slot,
        "run: 0.22.0, 0.26.0",
        (text_only_is_unknown, latent_attention_was_not_run),
        lookup=VLLM_CLASS_FIRST,
        nvfp4=one_global_scale,
    ),
    Loader(
        "vLLM",
        "0.27.0",
        None,
        every_slot,
        "run: 0.27.0, 0.32.0; 0.33.0 with the compiled parts of 0.32.0",
        ran_quark=True,
        lookup=VLLM,
        nvfp4=one_global_scale,
    ),
    Loader(
        "SGLang",
        "0.5.9",
        "0.5.9",
        separate_gated_delta_net,
        "run: 0.5.9",
        (
            text_only_is_unknown,
            minicpmv_is_unknown,
            mixed_is_unknown,
            ignore_must_survive_renaming,
            latent_attention_was_not_run,
        ),
        lookup=SGLANG,
    ),
    Loader(
        "SGLang",
        "0.5.10",
        "0.5.10.post1",
        split_by_sizes,
        "run: 0.5.10, 0.5.10.post1",
        (text_only_is_unknown, minicpmv_is_unknown, mixed_is_unknown, latent_attention_was_not_run),
        (parts_are_cast, attention_is_cast),
        lookup=SGLANG,
    ),
    Loader(
        "SGLang",
        "0.5.11",
        "0.5.11",
        every_slot_or_vector,
        "run: 0.5.11",
        (text_only_is_unknown, minicpmv_is_unknown, mixed_is_unknown, latent_attention_was_not_run),
        lookup=SGLANG,
    ),
    Loader(
        "SGLang",
        "0.5.12",
        "0.5.14",
        every_slot_or_vector,
        "run: 0.5.12, 0.5.14",
        (text_only_is_unknown, minicpmv_vision_is_cast, mixed_is_unknown, latent_attention_was_not_run),
        lookup=SGLANG,
    ),
    Loader(
        "SGLang",
        "0.5.15",
        "0.5.16",
        every_slot_or_vector,
        "run: 0.5.15, 0.5.16",
        (
            text_only_is_unknown,
            minicpmv_vision_is_cast,
            mixed_was_run_with_qwen_only,
            mixed_without_nvfp4,
            latent_attention_was_not_run,
        ),
        lookup=SGLANG,
    ),
    Loader(
        "SGLang",
        "0.5.17",
        "0.5.17",
        every_slot_or_vector,
        "run: 0.5.17",
        (minicpmv_vision_is_cast, mixed_was_run_with_qwen_only, mixed_without_nvfp4, latent_attention_was_not_run),
        lookup=SGLANG,
    ),
    Loader(
        "SGLang",
        "0.5.18",
        "0.5.22",
        every_slot_or_vector,
        "run: 0.5.18, 0.5.22",
        (minicpmv_vision_is_cast, mixed_was_run_with_qwen_only, mixed_without_nvfp4, latent_attention_was_not_run),
        lookup=SGLANG,
    ),
    Loader(
        "SGLang",
        "0.5.23",
        None,
        every_slot_or_vector,
        "run: 0.5.23",
        (mixed_was_run_with_qwen_only, mixed_without_nvfp4, parts_follow_the_quantized_one, latent_scales_are_joined),
        ran_quark=True,
        lookup=SGLANG,
        nvfp4=one_or_refused,
    ),
    Loader(
        "transformers",
        "5.17.0",
        "5.22.2",
        separate_modules,
        "run: 5.17.0, 5.22.2 with compressed-tensors 0.20.0",
        _TRANSFORMERS,
        nvfp4=separate,
    ),
    Loader(
        "transformers",
        "5.23.0",
        None,
        separate_modules,
        "run: 5.23.0, 5.24.0 with compressed-tensors 0.20.0",
        (*_TRANSFORMERS, scalars_are_refused),
        nvfp4=separate,
    ),
)


def newest_run(name: str) -> str:
    """The newest version of the loader ``name`` that was run."""
    versions: Iterator[str] = (
        v for loader in LOADERS if loader.name == name for v in re.findall(r"\d[\w.]*\d", _runs(loader))
    )
    return max(versions, key=version_key)


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


def _runs(loader: Loader) -> str:
    return loader.source.partition("run: ")[2].partition(" with ")[0]


def find_loaders(wanted: str) -> tuple[Loader, ...]:
    """The rows for ``NAME`` or ``NAME@VERSION``, the name in any case. Empty when nothing is known of it."""
    name, _, version = wanted.partition("@")
    rows = (loader for loader in LOADERS if loader.name.lower() == name.lower())
    return tuple(loader for loader in rows if not version or loader.covers(version))


def merged(
    rows: Iterable[_Row], loader_of: Callable[[_Row], Loader], say: Callable[[_Row], _Said]
) -> list[tuple[str, str, _Said]]:
    """Name, versions and what ``say`` says of each row; neighboring ranges of which it says the same as one."""
    lines = []
    for (name, said), run in groupby(rows, lambda row: (loader_of(row).name, say(row))):
        loaders = [loader_of(row) for row in run]
        lines.append((name, loaders[-1].versions_from(loaders[0]), said))
    return lines
