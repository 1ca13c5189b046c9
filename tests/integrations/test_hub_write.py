"""Conversions from the hub and to it: through the cache, in one commit, as a pull request."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import pytest
from click.testing import CliRunner, Result
from huggingface_hub import constants

import rewrite
from rewrite import schemas
from rewrite.cli.commands import main
from rewrite.errors import RewriteError, StorageError, UsageError
from tests.servers.http import Fault
from tests.servers.hub import HubStub, make_file
from tests.servers.s3 import S3Stub
from tests.support import edit_json, in_one_shard, tree

ATTRIBUTES = ".gitattributes"


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    """To write takes one."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")


def run(*words: object) -> Result:
    """The command line, in this process."""
    return CliRunner().invoke(main, [str(word) for word in words])


def without_source(files: dict[str, bytes]) -> dict[str, bytes]:
    """The manifest names what was converted: a directory, or a model and its commit."""
    manifest = {**json.loads(files["rewrite_manifest.json"]), "source": ""}
    return {**files, "rewrite_manifest.json": json.dumps(manifest).encode()}


def on_hub(hub: HubStub, name: str, revision: str = "main") -> dict[str, bytes]:
    return {path: data for path, data in hub.tree(name, revision).items() if path != ATTRIBUTES}


def test_from_the_hub_to_a_directory(hub: HubStub, vl: Path, tmp_path: Path) -> None:
    """Through the cache: the same files; the manifest names the commit; a second conversion downloads nothing."""
    commit = hub.add("org/model", vl)
    rewrite.convert(vl, tmp_path / "local")
    result = run("convert", "--profile", "exact", "org/model", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert without_source(tree(tmp_path / "out")) == without_source(tree(tmp_path / "local"))
    assert json.loads((tmp_path / "out" / "rewrite_manifest.json").read_text())["source"] == f"org/model@{commit}"
    hub.requests.clear()
    rewrite.convert("org/model", tmp_path / "again", profile="portable")
    assert not [request for request in hub.requests if "/resolve/" in request.path]


def test_what_is_refused_is_not_downloaded(hub: HubStub, copy: Path, tmp_path: Path) -> None:
    """The plan is made of headers first."""
    edit_json(copy / "config.json", quantization_config={"quant_method": "unheard-of"})
    hub.add("org/model", copy)
    with pytest.raises(RewriteError) as refused:
        rewrite.convert("org/model", tmp_path / "out")
    assert refused.value.exit_code == 3
    assert not list((tmp_path / "hf-cache").rglob("*.safetensors"))


def test_a_download_that_breaks_off_is_resumed(hub: HubStub, vl: Path, tmp_path: Path) -> None:
    """OUT does not appear before."""
    hub.add("org/model", vl)
    rewrite.convert(vl, tmp_path / "local")
    hub.misbehave = lambda r: Fault("status", 403) if "00005-of" in r.path and "range" not in r.headers else None
    result = run("convert", "--profile", "exact", "org/model", tmp_path / "out")
    assert result.exit_code == 4
    assert "hf_secret" not in result.output
    assert not (tmp_path / "out").exists()
    hub.misbehave = lambda r: None
    assert run("convert", "--profile", "exact", "org/model", tmp_path / "out").exit_code == 0
    assert without_source(tree(tmp_path / "out")) == without_source(tree(tmp_path / "local"))


def test_in_parts_from_the_hub(hub: HubStub, vl: Path, tmp_path: Path) -> None:
    """Each machine reads its files from the hub, at the commit of the plan."""
    hub.add("org/model", vl)
    rewrite.convert(vl, tmp_path / "local")
    assert (
        run("plan", "--profile", "exact", "org/model", tmp_path / "out", "--output", tmp_path / "plan.json").exit_code
        == 0
    )
    hub.add("org/model", tmp_path / "local")  # somebody pushes meanwhile
    for part in ("0/2", "1/2"):
        assert run("run", tmp_path / "plan.json", "--part", part).exit_code == 0
    assert run("finish", tmp_path / "plan.json").exit_code == 0
    assert without_source(tree(tmp_path / "out")) == without_source(tree(tmp_path / "local"))


def test_from_a_directory_to_the_hub(hub: HubStub, vl: Path, tmp_path: Path) -> None:
    """In one commit, to a new private model."""
    rewrite.convert(vl, tmp_path / "local")
    result = run("convert", "--profile", "exact", vl, "hf://me/fixed")
    assert result.exit_code == 0, result.output
    assert on_hub(hub, "me/fixed") == tree(tmp_path / "local")
    assert len(hub.models["me/fixed"]) == 2  # an empty one, and ours
    created = next(request for request in hub.requests if request.path == "/api/repos/create")
    assert json.loads(created.body).get("private") or json.loads(created.body).get("visibility") == "private"
    assert run("verify", vl, "hf://me/fixed", "-q").exit_code == 0


def test_from_the_hub_to_the_hub(hub: HubStub, vl: Path, tmp_path: Path) -> None:
    """Shards that do not change are copied by the hub: neither downloaded nor uploaded."""
    hub.add("org/model", vl)
    rewrite.convert(vl, tmp_path / "local")
    manifest = rewrite.convert("org/model", "hf://me/fixed")
    assert without_source(on_hub(hub, "me/fixed")) == without_source(tree(tmp_path / "local"))
    copied = [f for f in manifest.files if f.name.endswith(".safetensors") and not f.rewritten]
    uploaded = [r for r in hub.requests if r.path.startswith("/blob/")]
    assert copied
    assert len(uploaded) == sum(f.rewritten for f in manifest.files if f.name.endswith(".safetensors"))
    whole = {r.path.rpartition("/")[2] for r in hub.requests if "/resolve/" in r.path and "range" not in r.headers}
    assert not whole & {f.name for f in copied}


def test_a_hub_that_does_not_copy(hub: HubStub, vl: Path, tmp_path: Path) -> None:
    """Another storage region: the bytes go through here, the result is the same."""
    hub.add("org/model", vl)
    hub.copies = False
    rewrite.convert(vl, tmp_path / "local")
    rewrite.convert("org/model", "hf://me/fixed")
    assert without_source(on_hub(hub, "me/fixed")) == without_source(tree(tmp_path / "local"))
    assert run("verify", "org/model", "hf://me/fixed", "-q").exit_code == 0


def test_a_pull_request(hub: HubStub, vl: Path, tmp_path: Path) -> None:
    """To the very model that is repaired: main stays, and files that do not change are not part of it."""
    hub.add("org/model", vl)
    before = hub.tree("org/model")
    result = run("convert", "--profile", "exact", "org/model", "hf://org/model", "--create-pr")
    assert result.exit_code == 0, result.output
    assert hub.tree("org/model") == before
    rewrite.convert(vl, tmp_path / "local")
    assert without_source(hub.tree("org/model", "refs/pr/1")) == without_source(tree(tmp_path / "local"))
    commit = next(r for r in hub.requests if "/commit/" in r.path)
    keys = [json.loads(line)["key"] for line in commit.body.splitlines()]
    assert "copyFile" not in keys


def test_a_model_that_exists_is_not_replaced_unasked(hub: HubStub, vl: Path, text: Path) -> None:
    """With --overwrite nothing of the old one is left, and all changes at once."""
    hub.add("me/fixed", text)
    before = hub.tree("me/fixed")
    result = run("convert", "--profile", "exact", vl, "hf://me/fixed")
    assert result.exit_code == 4
    assert "output exists" in result.stderr
    assert hub.tree("me/fixed") == before
    hub.models["me/fixed"][-1].files["old.bin"] = make_file(b"old", False)
    assert run("convert", "--profile", "exact", vl, "hf://me/fixed", "--overwrite").exit_code == 0
    assert "old.bin" not in hub.tree("me/fixed")
    assert rewrite.verify(vl, "hf://me/fixed", quick=True).ok


def test_the_same_again_does_nothing(hub: HubStub, vl: Path) -> None:
    """No second commit."""
    rewrite.convert(vl, "hf://me/fixed")
    counts = rewrite.convert(vl, "hf://me/fixed").counts
    assert counts is not None
    assert counts.written == 0
    assert len(hub.models["me/fixed"]) == 2


def test_the_hub_dies_at_any_request(hub: HubStub, text: Path, tmp_path: Path) -> None:
    """From the n-th on, before it was carried out: readers see nothing or all of it, and the next run completes it."""
    _dies_at_any_request(hub, text, tmp_path, Fault("status", 400))


def test_the_hub_dies_after_any_request(
    hub: HubStub, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was carried out, and the answer never came: also the commit itself."""
    # The library waits before it tries again.
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda _: None, time=time.time))
    _dies_at_any_request(hub, in_one_shard(text, tmp_path / "one"), tmp_path, Fault("drop"))


def _dies_at_any_request(hub: HubStub, text: Path, tmp_path: Path, fault: Fault) -> None:
    rewrite.convert(text, tmp_path / "local")
    local = tree(tmp_path / "local")
    rewrite.convert(text, "hf://me/count")
    total = len(hub.requests)
    died = 0
    for number in range(total):
        name, begin = f"me/out{number}", len(hub.requests)
        hub.misbehave = lambda r, begin=begin, number=number: (  # type: ignore[misc]
            fault if r.number >= begin + number else None
        )
        hub.blobs.clear()
        try:
            rewrite.convert(text, f"hf://{name}")
        except RewriteError:
            died += 1
        else:  # the first one asked for something more
            assert len(hub.requests) <= begin + number
        hub.misbehave = lambda r: None
        assert on_hub(hub, name) in ({}, local)
        rewrite.convert(text, f"hf://{name}")
        assert on_hub(hub, name) == local
    assert 9 <= total <= died + 2


def test_a_source_that_changes_meanwhile(hub: HubStub, copy: Path) -> None:
    """Nothing is committed."""
    planned = rewrite.plan_conversion(copy, "hf://me/fixed")
    (copy / "new.txt").write_text("x")
    with pytest.raises(StorageError, match="changed while it was converted"):
        planned.publish(2)
    assert on_hub(hub, "me/fixed") == {}


def test_what_makes_no_sense(hub: HubStub, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 2, and nothing is written."""
    planned = rewrite.plan_conversion(text, "hf://me/fixed")
    for wrong, what in (
        (lambda: planned.run_part(0, 1), "no parts"),
        (planned.finish, "no parts"),
        (lambda: rewrite.convert(text, "hf://me/fixed@main"), "no revision yet"),
        (lambda: rewrite.convert(text, "hf://me"), "Not the name of a model"),
        (lambda: rewrite.convert(text, "hf://me/fixed", create_pr=True), "needs a model that exists"),
        (lambda: rewrite.convert(text, tmp_path / "out", create_pr=True), "pull requests"),
    ):
        with pytest.raises(UsageError, match=what):
            wrong()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE"):
        rewrite.convert(text, "hf://me/fixed")
    assert hub.models == {}


def test_documents_of_remote_checkpoints_keep_the_schemas(hub: HubStub, s3: S3Stub, vl: Path, tmp_path: Path) -> None:
    """With identities that are tags, and counts of bytes over a network."""
    hub.add("org/model", vl)
    rewrite.convert(vl, "s3://models/in")
    plan = tmp_path / "plan.json"
    for kind, words in (
        ("inspect", ("inspect", "org/model")),
        ("plan", ("convert", "org/model", tmp_path / "out", "--dry-run")),
        ("convert", ("convert", "org/model", "hf://me/fixed")),
        ("inspect", ("inspect", "s3://models/in")),
        ("convert", ("convert", "org/model", "s3://models/out")),
        ("plan", ("plan", "org/model", "s3://models/out2", "--profile", "portable", "--output", plan)),
        ("part", ("run", plan, "--part", "0/1")),
        ("convert", ("finish", plan)),
    ):
        document = json.loads(run(*words, "--json").stdout)
        jsonschema.validate(document, schemas.schema(kind), jsonschema.Draft202012Validator)  # type: ignore[arg-type]


def test_nothing_to_do_twice(hub: HubStub, vl: Path, tmp_path: Path) -> None:
    """There is no manifest to know the output by: its files are compared by their hashes. Another file is refused."""
    rewrite.convert(vl, tmp_path / "fixed")
    hub.add("org/fixed", tmp_path / "fixed")
    for source in (tmp_path / "fixed", "hf://org/fixed"):
        rewrite.convert(source, "hf://me/again", profile="exact")
        assert len(hub.models["me/again"]) == 2
    (tmp_path / "fixed" / "tokenizer.json").write_bytes(
        (tmp_path / "fixed" / "tokenizer.json").read_bytes().replace(b" ", b"\t")
    )
    with pytest.raises(StorageError, match="output exists"):
        rewrite.convert(tmp_path / "fixed", "hf://me/again")


def test_what_the_closing_line_says(hub: HubStub, vl: Path) -> None:
    """Bytes that nobody has counted are not said to be none; and why others do not see the model."""
    hub.add("org/model", vl)
    result = run("convert", "--profile", "exact", "org/model", "hf://me/fixed")
    assert "what was sent was not counted" in result.output
    assert "private" in result.output
    document = json.loads(run("convert", "org/model", "hf://me/fixed2", "--json").stdout)
    assert document["bytes"]["sent"] is None
