"""What `--json` prints is what the JSON Schemas in the package say, for every test checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from click.testing import CliRunner

from rewrite import schemas
from rewrite.cli.commands import main
from tests.support import FIXTURES

NAMES = sorted(path.parent.name for path in FIXTURES.glob("*/config.json"))


def printed(*words: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(CliRunner().invoke(main, [*map(str, words), "--json"]).stdout)
    return found


def check(document: dict[str, Any], kind: schemas.Kind) -> None:
    assert document["schema"] == schemas.schema(kind)["$id"]
    jsonschema.validate(document, schemas.schema(kind), jsonschema.Draft202012Validator)


@pytest.mark.parametrize("kind", schemas.KINDS)
def test_the_schemas_are_schemas(kind: schemas.Kind) -> None:
    jsonschema.Draft202012Validator.check_schema(schemas.schema(kind))


@pytest.mark.parametrize("name", NAMES)
def test_inspect_and_plans(name: str, tmp_path: Path) -> None:
    for options in ((), ("--groups", "all", "--platform", "rocm"), ("--weights",)):
        check(printed("inspect", FIXTURES / name, *options), "inspect")
    document = printed("convert", FIXTURES / name, tmp_path / "out", "--dry-run", "--groups", "all")
    check(document, "error" if "error" in document else "plan")


@pytest.mark.parametrize("name", NAMES)
def test_convert_and_verify(name: str, tmp_path: Path) -> None:
    """The first profile that takes the checkpoint, with all groups; what is refused is an error of the schema."""
    for profile in ("exact", "bf16"):
        out = tmp_path / profile
        document = printed("convert", FIXTURES / name, out, "--profile", profile, "--groups", "all", "--timestamp")
        if "error" in document:
            check(document, "error")
            continue
        check(document, "convert")
        verified = printed("verify", FIXTURES / name, out, "--digest", "--platform", "cuda")
        check(verified, "verify")
        assert set(verified["digests"]) == {path.name for path in out.iterdir()}
        check(printed("verify", FIXTURES / name, out, "--quick"), "verify")
        break


def test_conversions_in_parts(tmp_path: Path) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    check(printed("plan", FIXTURES / "llmcompressor-qwen3_5-text", out, "--output", plan), "plan")
    check(printed("run", plan, "--part", "0/1"), "part")
    check(printed("finish", plan), "convert")


def test_a_failed_verification_and_a_refusal(tmp_path: Path) -> None:
    source, broken = FIXTURES / "llmcompressor-qwen3_5-text", tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    document = printed("verify", source, broken)
    assert document["ok"] is False
    check(document, "verify")
    check(printed("inspect", broken), "error")


@pytest.mark.parametrize(
    "change", [("shards", "two"), ("platform", 3), ("new", 1), ("schema", "urn:rewrite:inspect:2")]
)
def test_the_schema_sees_what_is_wrong(change: tuple[str, Any]) -> None:
    document = printed("inspect", FIXTURES / "llmcompressor-qwen3_5-text") | dict([change])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, schemas.schema("inspect"))
