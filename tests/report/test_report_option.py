"""``--report`` of verify and inspect: files, refusals before any work, the command line that is published."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import rewrite
from rewrite.checkpoint.local import LocalDirectory
from rewrite.cli.command_line import command_line
from rewrite.cli.commands import main
from rewrite.cli.reports import place_of
from rewrite.inspection.inspection import inspect_model
from rewrite.integrations.hub import Snapshot
from rewrite.quantization.model import interpret
from tests.integrations.conftest import hub  # noqa: F401 (a fixture)
from tests.report.test_page import Parsed
from tests.servers.hub import HubStub
from tests.support import FIXTURES, ROOT

COMMANDS = ("inspect", "verify")


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def test_a_page_of_a_verification(vl: Path, tmp_path: Path) -> None:
    """Scales, errors before and after as measured, loaders, digests; the same run gives the same bytes."""
    out = tmp_path / "OUT"
    rewrite.convert(vl, out)
    name = tmp_path / "report.html"
    for _ in range(2):
        assert run("verify", vl, out, "--device", "cpu", "--rows", "all", "-q", "--report", name).exit_code == 0
    first = name.read_bytes()
    said = Parsed(first.decode()).said
    assert "VERIFIED OUT is verified." in said
    assert "IN, vLLM 0.17.0 to 0.19.1: 21.4; IN, fixed engines: 0.0288; OUT, fixed engines: 0." in said
    assert "profile exact, groups qkvz" in said
    assert f"rewrite verify {vl.name} OUT --device cpu --rows all --quiet --report report.html" in said
    assert "not known: not read from the hub" in said
    digests = json.loads(run("verify", vl, out, "--digest", "--tokens", 2, "--json").stdout)["digests"]
    assert all(digest in said for digest in digests.values())
    assert not [path for path in (tmp_path, vl.parent, Path.home()) if str(path) in first.decode()]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["OUT", "report.html"]
    assert run("verify", vl, out, "--device", "cpu", "--rows", "all", "-q", "--report", name).exit_code == 0
    assert name.read_bytes() == first


def test_markdown_has_its_images_beside_it(vl: Path, tmp_path: Path) -> None:
    """Named after it; what was there of an earlier run is replaced."""
    name = tmp_path / "VERIFICATION.md"
    name.write_text("old")
    assert run("verify", vl, vl, "--tokens", 2, "-q", "--report", name).exit_code == 1  # not repaired
    images = sorted(path.name for path in tmp_path.iterdir() if path.suffix == ".svg")
    assert images[0] == "VERIFICATION-chart-1.svg"
    text = name.read_text()
    assert all(f"]({image})" in text for image in images)
    assert "exact: OUT has no manifest" in text


@pytest.mark.parametrize("suffix", ["html", "md"])
def test_an_inspection_has_a_report_too(vl: Path, tmp_path: Path, suffix: str) -> None:
    """What the JSON says, for people; the exit code is the same."""
    name = tmp_path / f"report.{suffix}"
    result = run("inspect", vl, "--report", name, "--json")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    text = name.read_text() if suffix == "md" else Parsed(name.read_text()).said
    assert "do not serve it right" in text
    assert "--profile exact" in text
    assert all(group["name"] in text for group in document["groups"])
    assert f"{document['groups'][0]['spread']:.4g}" in text
    assert str(vl.parent) not in text


@pytest.mark.parametrize(
    ("fixture", "word"),
    [("llmcompressor-qwen3_5-nvfp4", "AFFECTED"), ("llmcompressor-llama", "NOTHING TO JUDGE")],
)
def test_inspections_of_other_kinds(fixture: str, word: str, tmp_path: Path) -> None:
    """NVFP4: scales are the global ones. No fused groups: nothing is drawn, and that is said."""
    name = tmp_path / "report.html"
    run("inspect", FIXTURES / fixture, "--report", name, "--groups", "qkvz")
    said = Parsed(name.read_text()).said
    assert word in said
    expected = "The global scale that the weights of each partition are multiplied with"
    assert (expected in said) == (word == "AFFECTED")
    assert ("Nothing is drawn" in said) == (word != "AFFECTED")


def test_nvfp4_is_measured(tmp_path: Path) -> None:
    """And what rescaling cost is said."""
    source, out, name = FIXTURES / "llmcompressor-qwen3_5-nvfp4", tmp_path / "OUT", tmp_path / "report.html"
    rewrite.convert(source, out, profile="rescaled")
    assert run("verify", source, out, "-q", "--report", name).exit_code == 0
    said = Parsed(name.read_text()).said
    assert "VERIFIED OUT is verified." in said
    assert "Not checked: nothing." in said
    assert "rescaled weights are off by up to 0.0" in said
    assert "Not measured" not in said


def test_nothing_to_do(tmp_path: Path) -> None:
    """A copy: it holds, nothing was multiplied."""
    source, out, name = FIXTURES / "llmcompressor-llama", tmp_path / "OUT", tmp_path / "report.html"
    rewrite.convert(source, out, selection="qkvz")
    assert run("verify", source, out, "-q", "--report", name).exit_code == 0
    said = Parsed(name.read_text()).said
    assert "Nothing is drawn: IN has no fused groups of the kinds that were looked at." in said
    assert "Not measured." in said


def test_a_failure_is_reported(text: Path, tmp_path: Path) -> None:
    """Also where OUT cannot be opened: the problem by names, no path."""
    out, name = tmp_path / "OUT", tmp_path / "report.html"
    shutil.copytree(text, out)
    (out / "config.json").write_text("{")
    assert run("verify", text, out, "-q", "--report", name).exit_code == 1
    said = Parsed(name.read_text()).said
    assert "OUT FAILED: structure." in said
    assert "Not known" in said
    assert str(tmp_path) not in name.read_text()


@pytest.mark.parametrize("command", COMMANDS)
def test_refused_before_any_work(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that says no form, no folder, no packages: nothing is read for that, so no checkpoint need be there."""
    checkpoints = [tmp_path / "none"] * (1 if command == "inspect" else 2)

    def refused(name: str) -> Result:
        return run(command, *checkpoints, "--report", tmp_path / name)

    for name in ("report.txt", "report", "report.HTML.gz"):
        result = refused(name)
        assert result.exit_code == 2
        assert "FILE.html or FILE.md" in result.stderr
    result = refused("gone/report.html")
    assert result.exit_code == 4
    assert "There is no such folder" in result.stderr
    for package in ("matplotlib", "jinja2"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            for name in ("report.html", "report.md"):
                result = refused(name)
                assert result.exit_code == 2
                assert f"needs the package `{package}`" in result.stderr
                assert "pip install 'rewrite[report]'" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_report_that_cannot_be_written(vl: Path, tmp_path: Path) -> None:
    """Exit code 4, as for any file: here one of its images."""
    (tmp_path / "report-chart-1.svg").mkdir()
    result = run("inspect", vl, "--report", tmp_path / "report.md")
    assert result.exit_code == 4
    assert "report-chart-1.svg" in result.stderr


def test_the_published_command_line_names_no_place_of_the_machine(
    vl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paths by their names; addresses of servers not at all."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "")  # the option sets it, for good
    name = tmp_path / "my report.md"
    words = ["--endpoint-url", "http://host.internal:9000", "--loader", "vllm", f"--report={name}"]
    run("inspect", vl, "--platform", "cpu", *words)
    text = name.read_text()
    assert f"rewrite inspect {vl.name} --platform cpu --endpoint-url URL --loader vllm --report 'my report.md'" in text
    assert "host.internal" not in text


def test_the_published_command_line_has_every_kind_of_option() -> None:
    """Flags and their opposites, repeated ones, joined ones; names that a shell would take for more are quoted."""
    words = ["/a/in put", "/b/out", "--no-digest", "--rows=all", "-q", "--platform", "cpu", "--platform", "cuda"]
    words += ["--cluster", "tcp://10.0.0.1:8786", "--attest", "/c/a.json", "--loader", "vllm@0.19.1"]
    context = main.commands["verify"].make_context("verify", words)
    line = command_line(context, {"source": "in put", "out": "out; rm -rf"})
    assert line == (
        "rewrite verify 'in put' 'out; rm -rf' --no-digest --rows all --quiet --platform cpu --platform cuda "
        "--cluster ADDRESS --attest a.json --loader vllm@0.19.1"
    )


@pytest.mark.parametrize(
    ("storage", "kind", "commit"),
    [
        (LocalDirectory("/data/model"), "a directory", None),
        (Snapshot(f"/cache/{'a' * 40}", "org/model"), "the Hugging Face hub", "a" * 40),
    ],
)
def test_where_a_checkpoint_was_read_from(storage: LocalDirectory, kind: str, commit: str | None) -> None:
    """The commit is known of what came from the hub, from its cache, too."""
    place = place_of(storage)
    assert (place.kind, place.commit) == (kind, commit)
    assert "/data" not in place.name
    assert "/cache" not in place.name


def test_the_commit_of_a_model_on_the_hub(hub: HubStub, vl: Path, tmp_path: Path) -> None:  # noqa: F811
    """The one that was read, also where somebody pushes meanwhile; the command names it."""
    commit = hub.add("org/model", vl)
    name = tmp_path / "report.html"
    assert run("verify", "org/model", vl, "--tokens", 2, "-q", "--report", name).exit_code == 1  # not repaired
    said = Parsed(name.read_text()).said
    assert f"rewrite verify org/model@{commit} {vl.name} --tokens 2" in said
    assert f"commit {commit} not known: not read from the hub" in said


def test_a_checkpoint_that_changes_meanwhile_is_not_described(
    vl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page would speak of two states."""
    out, name = tmp_path / "OUT", tmp_path / "report.html"
    shutil.copytree(vl, out)
    verify = rewrite.verify

    def and_change(*arguments: object, **options: object) -> rewrite.Verification:
        found = verify(*arguments, **options)  # type: ignore[arg-type]
        (out / "config.json").write_text("{}")
        return found

    monkeypatch.setattr(rewrite, "verify", and_change)
    result = run("verify", vl, out, "--tokens", 2, "--report", name)
    assert result.exit_code == 4
    assert "has changed while it was verified" in result.stderr
    assert not name.exists()


def test_names_of_tensors_are_text(copy: Path, tmp_path: Path) -> None:
    """In a real run: the name of a file of OUT."""
    hostile = "<script>alert(1)<"
    (copy / hostile).write_text("x")
    name = tmp_path / "report.html"
    assert run("verify", copy, copy, "--tokens", 2, "-q", "--report", name).exit_code == 1  # not repaired
    found = Parsed(name.read_text())
    assert hostile in found.said
    assert not [tag for tag, _ in found.tags if tag == "script"]


@pytest.mark.parametrize("words", [["inspect"], ["verify", "--weights-only", "--quiet"]])
def test_without_a_report_nothing_is_imported_for_it(words: list[str], vl: Path) -> None:
    """Neither matplotlib nor Jinja2: they take time, and need not be there."""
    command, *options = words
    checkpoints = [str(vl)] * (1 if command == "inspect" else 2)
    script = "\n".join(
        [
            "import sys",
            "from rewrite.cli.commands import main",
            "try:",
            f"    main({[command, *checkpoints, *options]!r})",
            "except SystemExit:",
            "    print('loaded', sorted({'matplotlib', 'jinja2'} & set(sys.modules)))",
        ]
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded []"


def test_what_a_checkpoint_is_needs_no_plan(vl: Path) -> None:
    """Beside a verification no conversion is planned; what is said of the checkpoint is the same."""
    model = interpret(rewrite.open_checkpoint(vl))
    full, short = inspect_model(model), inspect_model(model, profiles=())
    assert [row.as_is for row in short.rows] == [row.as_is for row in full.rows]
    assert (short.groups, short.schemes, short.findings) == (full.groups, full.schemes, full.findings)
    assert not short.rows[0].converted
    assert full.rows[0].converted


def test_only_the_report_imports_what_draws() -> None:
    """And there only the two modules that files.py imports when it writes."""
    found = set()
    for path in (ROOT / "rewrite").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] in ("matplotlib", "jinja2", "markupsafe") for name in names):
                found.add(path.relative_to(ROOT).as_posix())
    assert found == {"rewrite/report/charts.py", "rewrite/report/render.py"}
