"""`inspect` as a gate: --fail-on, severities, SARIF and JUnit."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result

from rewrite.cli.commands import main
from tests.support import FIXTURES, replace_tensor

VL = FIXTURES / "llmcompressor-qwen3_5-vl"
GARBLED, FAILS, PRECISE = ("--for", "vllm@0.19.1"), ("--for", "sglang@0.5.9"), ("--for", "vllm@0.32.0")
UNKNOWN = ("--for", "sglang@0.5.22")
NVFP4 = FIXTURES / "llmcompressor-qwen3_5-nvfp4"


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.mark.parametrize(
    ("source", "engines", "stops"),
    [
        (VL, GARBLED, ("garbled", "fails", "precision", "unknown")),
        (VL, FAILS, ("fails", "precision", "unknown")),
        (VL, PRECISE, ("precision", "unknown")),
        (NVFP4, UNKNOWN, ("unknown",)),
        (VL, ("--for", "transformers"), ()),
    ],
)
def test_each_level_stops_what_is_as_bad_or_worse(
    source: Path, engines: tuple[str, ...], stops: tuple[str, ...]
) -> None:
    levels = ("garbled", "fails", "precision", "unknown")
    found = [level for level in levels if run("inspect", source, *engines, "--fail-on", level).exit_code == 1]
    assert found == list(stops)
    assert run("inspect", source, *engines).exit_code == int("precision" in stops)


def test_every_finding_has_a_severity(copy: Path) -> None:
    replace_tensor(copy, "model.layers.2.self_attn.q_proj.input_scale", b"\xc0\x7f")  # NaN
    result = run("inspect", copy, "--for", "transformers", "--json", "--fail-on", "garbled")
    (finding,) = json.loads(result.stdout)["findings"]
    assert (finding["severity"], result.exit_code) == ("garbled", 1)


def test_sarif_has_the_engines_the_faults_and_the_repair(copy: Path) -> None:
    replace_tensor(copy, "model.layers.2.self_attn.q_proj.input_scale", b"\xc0\x7f")
    result = run("inspect", copy, "--for", "vllm@0.32.0", "--format", "sarif")
    (ran,) = json.loads(result.stdout)["runs"]
    assert result.exit_code == 1
    assert [(each["ruleId"], each["level"]) for each in ran["results"]] == [("unknown", "note"), ("garbled", "error")]
    assert {rule["id"] for rule in ran["tool"]["driver"]["rules"]} >= {each["ruleId"] for each in ran["results"]}
    (sound,) = json.loads(run("inspect", VL, "--for", "vllm@0.32.0", "--format", "sarif").stdout)["runs"]
    assert [(each["ruleId"], each["level"]) for each in sound["results"]] == [("precision", "warning")]
    assert "Repaired by: rewrite convert" in sound["results"][0]["message"]["text"]
    place = ran["results"][1]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
    assert place.endswith(".safetensors")


def test_junit_fails_where_the_gate_does() -> None:
    words = ("inspect", VL, "--for", "vllm@0.32.0", "--for", "transformers", "--format", "junit")
    for level, failures in (("precision", "1"), ("fails", "0")):
        suite = ElementTree.fromstring(run(*words, "--fail-on", level).stdout)
        assert (suite.get("tests"), suite.get("failures")) == ("2", failures)


def test_json_has_a_format_too() -> None:
    """The same document; `loaders` is the old name of `engines`."""
    document = json.loads(run("inspect", VL, "--format", "json").stdout)
    assert document == json.loads(run("inspect", VL, "--json").stdout)
    assert document["engines"] == document["loaders"]
    assert document["engines"][0]["engine"] == document["engines"][0]["loader"]
