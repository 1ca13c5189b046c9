"""The rules for kernels against what was recorded of the engines' own choice, and what users hear of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

import rewrite
from rewrite.loaders.kernel_rules import KERNEL_RULES, NEWEST_RUN, KernelFact
from rewrite.loaders.kernels import PLATFORMS, judge, used
from rewrite.loaders.ranges import version_key
from rewrite.loaders.versions import LOADERS
from tests.support import FIXTURES, LOADER_MATRIX, ROOT

CELLS: list[dict[str, Any]] = json.loads((ROOT / "tests" / "kernel_choice.json").read_text())["cells"]
NAMES = {"vllm": "vLLM", "sglang": "SGLang", "transformers": "transformers"}


#: What no rule claims, as the script may be the reason: vLLM 0.19.1 raises in Marlin for ModelOpt's layers on sm80, a
#: part of which the script replaces; torch's own _scaled_mm, which is a stand-in here, takes no card before sm89.
UNCLAIMED = {("vllm", "modelopt", "sm80"), ("sglang", "modelopt", "sm80")}


def covers(rule: KernelFact, version: str) -> bool:
    return rule.holds(version) and version_key(version) <= version_key(NEWEST_RUN[rule.engine])


def rules_of(cell: dict[str, Any]) -> list[KernelFact]:
    return [
        rule
        for rule in KERNEL_RULES
        if rule.engine == NAMES[cell["engine"]] and covers(rule, cell["version"])
        if cell["platform"] in rule.applies.platforms and cell["scheme"] in rule.applies.schemes
    ]


def test_every_recorded_cell_is_what_the_rules_say() -> None:
    """One rule for each cell: the same operators, or the same failure with several tokens."""
    for cell in CELLS:
        rules = rules_of(cell)
        if not rules and (cell["engine"], cell["scheme"], cell["platform"]) in UNCLAIMED:
            continue
        (rule,) = rules
        if rule.outcome.family is not None:
            assert cell["outcome"] == "runs", cell
            assert set(cell["operators"] or [cell["kernel"]]) <= set(rule.outcome.calls), cell
        elif not rule.outcome.loads:
            assert cell["outcome"] == "not built", cell
        elif cell["tokens"] > 1:
            assert cell["outcome"] == "raises", cell
        else:
            assert cell["outcome"] in ("raises", "runs"), cell


def ends(rule: KernelFact) -> Iterator[tuple[str, str, str, str]]:
    for version in (rule.since, rule.until or NEWEST_RUN[rule.engine]):
        yield from ((rule.engine, version, p, s) for p in rule.applies.platforms for s in rule.applies.schemes)


def test_both_ends_of_every_rule_were_run() -> None:
    """A version or a platform that was not run is not known."""
    recorded = {(NAMES[c["engine"]], c["version"], c["platform"], c["scheme"]) for c in CELLS}
    assert {end for rule in KERNEL_RULES for end in ends(rule)} <= recorded


def test_no_rule_begins_or_ends_within_a_range_of_loaders() -> None:
    """But for a platform that an engine has come to within it: vLLM's CPU runs Qwen3.5 from 0.32.0 on."""
    firsts, lasts = {(row.name, row.first) for row in LOADERS}, {(row.name, row.last) for row in LOADERS}
    for rule in KERNEL_RULES:
        assert (rule.engine, rule.until) in lasts, rule
        assert (rule.engine, rule.since) in firsts or rule.applies.platforms == ("cpu",), rule


ROW_0511 = ("0.5.11", "0.5.11")


def test_what_loads_and_has_no_kernel_does_not_run() -> None:
    """`exact` in SGLang 0.5.11 to 0.5.17 on CUDA; `dynamic` runs there."""
    outcome = judge("SGLang", ROW_0511, "cuda", {"channel-static"})
    assert outcome is not None
    assert outcome.kind == "does not run"
    assert "several tokens" in outcome.detail
    assert judge("SGLang", ROW_0511, "cuda", {"channel-token"}) is None
    assert judge("SGLang", ("0.5.18", "0.5.22"), "cuda", {"channel-static"}) is None
    assert judge("vLLM", ("0.27.0", None), "cuda", {"channel-static"}) is None
    on_rocm = judge("vLLM", ("0.27.0", None), "rocm", {"channel-static", "tensor-static"})
    assert on_rocm is not None
    assert on_rocm.kind == "does not run"


def test_a_platform_that_was_not_run_is_not_known() -> None:
    outcome = judge("SGLang", ("0.5.23", None), "cpu", {"tensor-static"})
    assert outcome is not None
    assert (outcome.kind, outcome.detail) == ("not known", "its kernels were not run on cpu")
    assert judge("SGLang", ("0.5.23", None), "cpu", set()) is None  # nothing is FP8
    assert used("SGLang", ("0.5.23", None), "cpu", {"tensor-static"}) == {"cpu": ("not known",)}
    early = judge("vLLM", ("0.20.0", "0.20.2"), "cpu", {"tensor-static"})  # vLLM runs Qwen3.5 there from 0.32.0 on
    assert early is not None
    assert early.kind == "not known"


def test_a_scheme_that_was_not_run_is_judged_by_loading_only() -> None:
    """Block scales: their kernels are others. What is shown says that they are not known."""
    assert judge("vLLM", ("0.27.0", None), "cuda", {"block-dynamic"}) is None
    assert set(used("vLLM", ("0.27.0", None), "cuda", {"block-dynamic"}).values()) == {("not known",)}


def test_what_a_conversion_costs_is_shown() -> None:
    """FlashInfer multiplies layers with one scale only."""
    shown = used("vLLM", ("0.27.0", None), "cuda", {"tensor-static"})
    old, new = ("CUTLASS",), ("FlashInfer or CUTLASS",)
    assert shown == {"sm89": old, "sm90": old, "sm100": new, "sm120": new}
    assert set(used("vLLM", ("0.27.0", None), "cuda", {"channel-static"}).values()) == {old}


@pytest.mark.parametrize("platform", PLATFORMS)
def test_every_platform_is_known_to_some_rule(platform: str) -> None:
    for card in PLATFORMS[platform]:
        assert any(card in rule.applies.platforms for rule in KERNEL_RULES)


GENERATIONS = json.loads(LOADER_MATRIX.with_name("generation.json").read_text())["cells"]


@pytest.mark.parametrize("cell", GENERATIONS, ids=lambda cell: f"{cell['fixture']}-{cell['profile']}")
def test_what_generates_on_cpu_is_what_was_predicted(cell: dict[str, Any]) -> None:
    """End to end, and not one layer only: vLLM generates text on CPU, or raises in the kernel."""
    name, _, everything = cell["profile"].partition("-")
    selection: rewrite.Selection = "all" if everything else "qkvz"
    inspection = rewrite.inspect_checkpoint(FIXTURES / cell["fixture"], selection=selection, platform="cpu")
    (row,) = [row for row in inspection.rows if row.engine in rewrite.find_loaders(f"vllm@{cell['version']}")]
    outcome = row.as_is if name == "original" else row.converted[name]
    assert outcome is not None
    if cell["outcome"] == "raises":
        assert outcome.kind == ("fails to load" if name == "partition" else "does not run")
    else:
        assert cell["outcome"] == "runs"
        assert outcome.kind in ("exact", "loses precision")


def test_the_note_of_exact_is_what_the_rules_say() -> None:
    """It is shown by `convert`, which knows no platform."""
    raising = [rule for rule in KERNEL_RULES if not rule.outcome.family and rule.outcome.loads]
    assert {(rule.engine, rule.applies.platforms, rule.until) for rule in raising} == {
        ("vLLM", PLATFORMS["rocm"], None),
        ("vLLM", PLATFORMS["cpu"], None),
        ("SGLang", PLATFORMS["cuda"], "0.5.17"),
        ("SGLang", PLATFORMS["rocm"], "0.5.22"),
    }
    assert {rule.applies.schemes for rule in raising} == {("channel-static",)}
    note = rewrite.PROFILES["exact"].notes["static"]
    assert "stop at the first token: vLLM on CPU and ROCm, SGLang before 0.5.18 (ROCm: 0.5.23)." in note
