"""What users hear of platforms: inspect, verify and the advice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import rewrite
from rewrite.cli.commands import main
from rewrite.cli.terminal import page_lines
from rewrite.inspection.advice import Advice, advise, repair_command
from rewrite.inspection.inspection import LEAST_CHANGE
from rewrite.loaders.outcome import AS_IT_IS, Outcome
from rewrite.report import inspected
from rewrite.report.checkpoints import Place
from tests.support import FIXTURES, row_of, unfolded

VL = FIXTURES / "llmcompressor-qwen3_5-vl"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def kinds(path: Path, platform: str | None, profile: str = "") -> dict[str, str]:
    rows = rewrite.inspect_checkpoint(path, platform=platform).rows
    said = {
        f"{row.engine.name} {row.engine.versions}": row.converted[profile] if profile else row.as_is for row in rows
    }
    return {name: outcome.kind for name, outcome in said.items() if outcome is not None}


def chosen(*wanted: str) -> list[rewrite.Loader]:
    return [loader for name in wanted for loader in rewrite.find_loaders(name)]


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("platforms") / "OUT"
    rewrite.convert(VL, out)
    return out


def test_what_is_loaded_may_not_run(exact: Path) -> None:
    """The same of a converted checkpoint, and as a prediction for the original."""
    assert set(kinds(exact, None).values()) == {"exact", "fails to load"}
    for said in (kinds(exact, "cuda"), kinds(VL, "cuda", "exact")):
        stopped = {name for name, kind in said.items() if kind == "does not run"}
        assert stopped == {"SGLang 0.5.11", "SGLang 0.5.12 to 0.5.14", "SGLang 0.5.15 to 0.5.16", "SGLang 0.5.17"}
    assert kinds(exact, "rocm")[row_of("vllm@0.32.0")] == "does not run"
    assert kinds(exact, "rocm")[row_of("sglang@0.5.23")] == "exact"
    assert kinds(VL, "rocm", "dynamic")[row_of("vllm@0.32.0")] == "exact"
    assert kinds(exact, "sm80")["SGLang 0.5.17"] == "exact"  # weights only: Marlin


def test_where_nothing_was_run_nothing_is_fine(exact: Path) -> None:
    said = kinds(exact, "cpu")
    assert said[row_of("vllm@0.32.0")] == "does not run"  # run with 0.32.0
    assert said[row_of("sglang@0.5.23")] == said[row_of("vllm@0.20.0")] == "not known"
    assert said["transformers 5.23.0+"] == "exact"
    assert set(kinds(VL, "cpu", "dequantized").values()) == {"exact"}  # nothing is FP8 any more


def test_failing_to_load_is_said_first(exact: Path) -> None:
    assert kinds(exact, "rocm")["SGLang 0.5.9"] == "fails to load"


def test_a_layer_outside_the_groups_counts(tmp_path: Path) -> None:
    """`exact --groups all` gives the other layers channel scales, too; in_proj_qkvz alone is then `dynamic`."""
    rewrite.convert(FIXTURES / "llmcompressor-llama", tmp_path / "OUT", selection="all")
    inspection = rewrite.inspect_checkpoint(tmp_path / "OUT", selection="qkvz")  # there is none
    assert inspection.groups == ()
    (row,) = [row for row in inspection.rows if row.engine.first == "0.5.17"]
    assert row.as_is.kind == "does not run"


def test_the_profile_with_the_least_change_is_named(exact: Path) -> None:
    inspection = rewrite.inspect_checkpoint(VL)
    assert advise(inspection, rewrite.LOADERS) == Advice(needed=True, profile="dynamic")
    assert advise(inspection, chosen("vllm", "transformers")).profile == "exact"
    assert advise(inspection, chosen("sglang@0.5.15")).profile == "dynamic"
    assert advise(rewrite.inspect_checkpoint(VL, platform="rocm"), chosen("vllm")).profile == "dynamic"
    assert advise(rewrite.inspect_checkpoint(exact), chosen("vllm")) == Advice(needed=False)
    assert set(LEAST_CHANGE) == set(rewrite.PROFILES)


def test_where_no_profile_serves_all_the_others_are_named() -> None:
    """And the profile is named that serves the rest."""
    inspection = rewrite.inspect_checkpoint(FIXTURES / "modelopt-qwen3_5-mixed")
    advice = advise(inspection, rewrite.LOADERS)
    assert (advice.profile, advice.unknown) == ("bf16", ())
    assert {"SGLang 0.5.9 to 0.5.14", "transformers 5.17.0+"} <= set(advice.unserved)
    said = unfolded(run("inspect", FIXTURES / "modelopt-qwen3_5-mixed", "--all-engines").stdout)
    assert "After the conversion SGLang 0.5.9 to 0.5.14: fails to load (takes MIXED_PRECISION for w4afp8)" in said
    assert "Repaired in part by profile bf16 (" in said
    nobody = advise(inspection, chosen("transformers"))
    assert nobody == Advice(True, None, ("transformers 5.17.0+",))


def test_where_engines_need_different_profiles_the_other_one_is_told() -> None:
    """Made up: `exact` is exact in one, `bf16` in the other. The one that changes less is taken."""
    inspection = rewrite.inspect_checkpoint(VL)
    bad = Outcome("garbled")
    first, second = inspection.rows[:2]
    rows = (
        replace(first, outcomes={AS_IT_IS: bad, "exact": Outcome("exact"), "bf16": bad}),
        replace(second, outcomes={AS_IT_IS: bad, "exact": bad, "bf16": Outcome("exact")}),
    )
    made_up = replace(inspection, rows=rows)
    advice = advise(made_up, [first.engine, second.engine])
    left = f"after the conversion {second.engine.name} {second.engine.versions}: garbled; --profile bf16 is exact there"
    assert (advice.profile, advice.left) == ("exact", (left,))
    assert repair_command(made_up, advice) is not None


def test_what_is_not_known_is_neither_affected_nor_repaired() -> None:
    """Made up: one engine is repaired, and of the other nothing is known, before and after."""
    inspection = rewrite.inspect_checkpoint(VL)
    bad, exact, unknown = Outcome("garbled"), Outcome("exact"), Outcome("not known")
    first, second = inspection.rows[:2]
    rows = (
        replace(first, outcomes={AS_IT_IS: bad, "exact": exact, "bf16": exact}),
        replace(second, outcomes={AS_IT_IS: unknown, "exact": unknown, "bf16": exact}),
    )
    made_up = replace(inspection, rows=rows, idle=())
    asked = [first.engine, second.engine]
    assert made_up.affected(asked) == rows[:1]
    advice = advise(made_up, asked)
    assert (advice.profile, advice.unserved, advice.left) == ("exact", (), ())
    assert advice.unknown == (f"{second.engine.name} {second.engine.versions}",)
    page = inspected.page(made_up, asked, advice, "rewrite convert model OUT", Place("model", "a directory"))
    shown = unfolded("\n".join(line.plain for line in page_lines(page, 80)))
    assert f"Not known: what {advice.unknown[0]} makes of it, converted or not." in shown
    nothing = advise(made_up, asked[1:])
    assert (nothing.needed, nothing.profile) == (False, None)


def test_inspect_judges_by_the_platform(exact: Path) -> None:
    assert run("inspect", exact, "--loader", "vllm").exit_code == 0
    stopped = run("inspect", exact, "--loader", "vllm", "--platform", "rocm")
    assert stopped.exit_code == 1
    assert "vLLM 0.17.0+ does not run (its kernel cannot take one scale" in unfolded(stopped.stdout)
    assert stopped.stdout.endswith(f"\n  rewrite convert {exact} OUT --for vllm --platform rocm\n")
    more = run("inspect", exact, "--for", "vllm", "--platform", "rocm", "-v")
    assert "on rocm (gfx942, gfx950)" in unfolded(more.stdout)


def test_kernels_are_shown_before_and_after() -> None:
    lines = run("inspect", VL, "--platform", "b200", "-v").stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("Kernels used for these layers, by GPU: "))
    at = lines.index("vLLM  0.17.0+  sm100", start)
    assert lines[at + 1].split("  ", 2) == ["", "FlashInfer or CUTLASS", " " * 10 + "as it is"]


def test_json_has_all_of_it() -> None:
    shown = json.loads(run("inspect", VL, "--json", "--platform", "h100", "--all-engines").stdout)
    assert shown["platform"] == "sm90"
    command = f"rewrite convert {VL} OUT --all-engines --platform sm90"
    said = {"profile": "dynamic", "unserved": [], "left": [], "unknown": [], "alternatives": [], "command": command}
    assert shown["advice"] == {"needed": True, **said}
    (row,) = [row for row in shown["loaders"] if row["versions"] == "0.5.17"]
    assert row["kernels"] == {"sm90": ["torch"]}
    assert row["kernels_converted"]["exact"] == {"sm90": ["does not run"]}
    assert row["converted"]["exact"]["kind"] == "does not run"


def test_verify_says_what_does_not_run_and_fails_only_where_it_was_asked(exact: Path) -> None:
    found = rewrite.verify(VL, exact, device="cpu", quick=True)
    assert found.ok
    assert [row.engine.versions for row in found.loaders if row.does_not_run][-1] == "0.5.17"
    assert found.checks[-1].summary.endswith("without a kernel for OUT on cuda: SGLang 0.5.11 to 0.5.17")
    asked = rewrite.verify(VL, exact, device="cpu", quick=True, platform="rocm")
    assert not asked.ok
    assert any("does not run" in problem for problem in asked.checks[-1].problems)
    (vllm,) = chosen("vllm@0.32.0")
    assert rewrite.verify(VL, exact, device="cpu", quick=True, loader=vllm).ok
    assert rewrite.verify(VL, exact, device="cpu", quick=True, loader=vllm, platform="sm90").ok
    assert not rewrite.verify(VL, exact, device="cpu", quick=True, loader=vllm, platform="rocm").ok
    # Also where IN does not run either.
    assert not rewrite.verify(exact, exact, device="cpu", quick=True, loader=vllm, platform="rocm").ok


def test_verify_takes_the_platform_from_the_command_line(exact: Path) -> None:
    failed = run("verify", VL, exact, "--device", "cpu", "--quick", "--platform", "rocm", "--json")
    assert failed.exit_code == 1
    shown = json.loads(failed.stdout)
    assert shown["settings"]["platform"] == "rocm"
    (row,) = [row for row in shown["loaders"] if f"{row['loader']} {row['versions']}" == row_of("sglang@0.5.23")]
    assert row["kernels_before"] == {card: ["torch"] for card in ("gfx942", "gfx950")}
    assert row["kernels_after"] == {card: ["torch, scaled afterwards"] for card in ("gfx942", "gfx950")}


def test_an_unknown_platform_is_refused() -> None:
    with pytest.raises(rewrite.UsageError, match="Unknown platform"):
        rewrite.inspect_checkpoint(VL, platform="sm70")
    with pytest.raises(rewrite.UsageError, match="Unknown platform"):
        rewrite.verify(VL, VL, platform="sm70")
    assert run("inspect", VL, "--platform", "sm70").exit_code == 2


def test_several_platforms_are_the_worst_of_all(exact: Path) -> None:
    assert kinds(exact, "sm90,rocm")[row_of("vllm@0.32.0")] == "does not run"
    assert kinds(exact, "sm90,rocm")[row_of("sglang@0.5.23")] == "exact"
    # What stops is known, whatever else is not.
    assert kinds(exact, "cpu,rocm")["SGLang 0.5.17"] == "does not run"
    result = run("inspect", VL, "--loader", "vllm", "--platform", "cuda", "--platform", "rocm", "-v")
    assert "on cuda, rocm (sm89, sm90, sm100, sm120, gfx942, gfx950)" in unfolded(result.stdout)
    assert "Repaired by profile dynamic (" in unfolded(result.stdout)
    assert " OUT --for vllm --platform cuda --platform rocm\n" in result.stdout


def test_versions_before_the_first_run_on_a_platform_are_noted() -> None:
    """vLLM runs Qwen3.5 on CPU from 0.32.0 on; the range of the table begins before."""
    note = "vLLM was run on cpu from 0.32.0 on: earlier versions are not known there"
    assert f"note: {note}" in run("inspect", VL, "--platform", "cpu").stderr
    assert note in json.loads(run("inspect", VL, "--platform", "cpu", "--json").stdout)["assumptions"]
    assert note not in run("inspect", VL, "--platform", "cpu", "--loader", "sglang").stderr
    assert run("inspect", VL, "--platform", "rocm").stderr == run("inspect", VL).stderr == ""


def test_what_was_not_run_is_noted() -> None:
    """Kernels of experts and of NVFP4: outcomes are about loading."""
    note = "What multiplies experts, NVFP4 and block scales was not run"
    for name in ("llmcompressor-qwen3_5-nvfp4", "llmcompressor-qwen3_5-moe"):
        assert note in unfolded(run("inspect", FIXTURES / name, "--groups", "all", "-v").stdout)
    assert note not in unfolded(run("inspect", VL, "--groups", "all", "-v").stdout)


def test_the_command_that_is_named_converts_what_was_looked_at() -> None:
    assert run("inspect", VL, "--groups", "all").stdout.endswith(" OUT --groups all\n")


def test_other_versions_that_serve_it_better_as_it_is() -> None:
    """Named where not all versions of an engine were asked for."""
    inspection = rewrite.inspect_checkpoint(VL)
    (found,) = advise(inspection, chosen("vllm@0.19.1")).alternatives
    assert (found.engine, found.versions, found.kind) == ("vLLM", "0.20.0+", "loses precision")
    (sglang,) = advise(inspection, chosen("sglang@0.5.10")).alternatives
    assert (sglang.engine, sglang.versions, sglang.kind) == ("SGLang", "0.5.11+", "loses precision")
    assert advise(inspection, chosen("vllm")).alternatives == ()
    assert advise(inspection, chosen("vllm@0.32.0")).alternatives == ()
    assert advise(inspection, rewrite.LOADERS).alternatives == ()


def test_a_version_that_was_asked_for_is_no_alternative() -> None:
    """The oldest and the newest are asked for: those between them are left."""
    inspection = rewrite.inspect_checkpoint(VL)
    oldest, first, *_, last, newest = rewrite.find_loaders("vllm")
    (found,) = advise(inspection, (oldest, newest)).alternatives
    assert found.versions == last.versions_from(first)
