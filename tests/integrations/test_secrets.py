"""Tokens, keys and signed addresses: in nothing that we print, write or send to anybody else."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from rewrite.cli.commands import main
from rewrite.integrations import s3 as s3_module
from tests.servers.http import Fault, Request
from tests.servers.hub import SIGNATURE, HubStub
from tests.servers.s3 import S3Stub
from tests.support import tree

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
TOKEN = "hf_secret"
SECRETS = (TOKEN, "5ecre7", "AKIDEXAMPLE", "wJalrXUtnFEMI", "Bearer", "X-Amz-")


def said(*words: object, code: int) -> str:
    """What a command prints, which ends with ``code``."""
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return result.output


def test_of_the_hub(hub: HubStub, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan, manifest, JSON, reports, attestation, messages of every fault; nor does the other host see the token."""
    assert hub.cdn is not None
    monkeypatch.setattr("rewrite.integrations.http.ATTEMPTS", 1)
    monkeypatch.setattr("rewrite.integrations.remote.HEAD", 1024)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name in ("org/model", "org/other"):  # the first one will be in the cache
        hub.add(name, text)
        hub.gated.add(name)
    hub.signed = True
    hub.cdn.url = hub.cdn.url.replace("127.0.0.1", "localhost")  # huggingface_hub goes by names, not by ports
    plan = tmp_path / "written" / "plan.json"
    plan.parent.mkdir()
    printed = [
        said("inspect", "org/model", "--json", "--report", plan.with_name("inspection.html"), code=1),
        said("plan", "org/model", plan.with_name("parts"), "--output", plan, code=0),
        said("run", plan, "--part", "0/1", code=0),
        said("finish", plan, code=0),
        said("convert", "org/model", plan.with_name("out"), "--json", code=0),
    ]
    out = plan.with_name("out")
    for option in ("--report", "--attest"):
        printed.append(said("verify", "org/model", out, option, plan.with_name(f"a{option}.html"), code=0))
    for fault in (Fault("status", 403), Fault("status", 500), Fault("drop"), Fault("whole"), Fault("shifted")):
        hub.cdn.misbehave = lambda request, fault=fault: fault  # type: ignore[misc]
        printed += [said("inspect", "org/other", code=4), said("convert", "hf://org/other", tmp_path / "no", code=4)]
    hub.token = "another"
    printed.append(said("inspect", "org/other", code=4))
    written = tree(plan.parent)
    assert {"plan.json", "out/rewrite_manifest.json", "inspection.html", "a--attest.html"} <= written.keys()
    assert not _found(printed, written)
    assert hub.cdn.requests
    assert not [request for request in hub.cdn.requests if "authorization" in request.headers]
    assert SIGNATURE in hub.cdn.requests[0].query


def test_of_a_bucket(s3: S3Stub, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same; and in none of the objects that lie in OUT or beside it, also while a conversion runs."""
    client = s3_module._client()
    for name, data in tree(text).items():
        client.put_object(Bucket="models", Key=f"in/{name}", Body=data)
    plan = tmp_path / "plan.json"
    s3.misbehave = lambda request: Fault("status", 403) if _completes(request) else None
    printed = [
        said("inspect", "s3://models/in", "--json", "--report", tmp_path / "inspection.html", code=1),
        said("plan", "s3://models/in", "s3://models/out", "--output", plan, code=0),
        said("convert", "s3://models/in", "s3://models/out", code=4),
    ]
    written = {**tree(tmp_path), **_objects()}
    s3.misbehave = lambda request: None
    printed += [
        said("run", plan, "--part", "0/1", code=0),
        said("finish", plan, code=0),
        said("verify", "s3://models/in", "s3://models/out", "--report", tmp_path / "verification.html", code=0),
    ]
    assert [name for name in written if name.startswith("out.rewrite-files/")]
    assert not _found(printed, {**written, **tree(tmp_path), **_objects()})


def _completes(request: Request) -> bool:
    return request.method == "POST" and "uploadId" in request.query


def _objects() -> dict[str, bytes]:
    client = s3_module._client()
    keys = [entry["Key"] for entry in client.list_objects_v2(Bucket="models")["Contents"]]
    return {key: client.get_object(Bucket="models", Key=key)["Body"].read() for key in keys if key.startswith("out")}


def _found(printed: list[str], written: dict[str, bytes]) -> list[tuple[str, str]]:
    """Secrets, and where they are."""
    everything = {**{f"output {i}": text.encode() for i, text in enumerate(printed)}, **written}
    return [(name, secret) for name, data in everything.items() for secret in SECRETS if secret.encode() in data]
