"""Checkpoints in buckets: the store copies what does not change, and nobody ever sees half a checkpoint."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from urllib.parse import unquote_plus

import pytest
from click.testing import CliRunner, Result

import rewrite
from rewrite import Conversion
from rewrite.cli.commands import main
from rewrite.errors import CheckpointError, RewriteError, StorageError, UsageError
from rewrite.integrations import s3 as s3_module
from rewrite.integrations import s3_parts
from rewrite.integrations.s3 import Place, S3Storage
from rewrite.planning.jobs import ShardPlan
from tests.servers.http import Fault, Reply, Request
from tests.servers.s3 import S3Stub, bucket, objects
from tests.support import in_one_shard, tree

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
SECRETS = ("AKIDEXAMPLE", "wJalrXUtnFEMI", "Signature", "127.0.0.1")


def run(*words: object) -> Result:
    """The command line, in this process."""
    return CliRunner().invoke(main, [str(word) for word in words])


def upload(directory: Path, prefix: str) -> None:
    for name, data in tree(directory).items():
        s3_module._client().put_object(Bucket="models", Key=f"{prefix}/{name}", Body=data)


def download(prefix: str) -> dict[str, bytes]:
    """Every object below a prefix, and nothing beside it: as the store has it, no request is made."""
    return {key.removeprefix(f"{prefix}/"): data for key, data in objects().items() if key.startswith(f"{prefix}/")}


def exists(key: str) -> bool:
    return key in objects()


def uploads() -> int:
    return len(bucket().multiparts)


@pytest.fixture
def source(s3: S3Stub, vl: Path) -> Path:
    """A checkpoint at s3://models/in, whose directory has the name ``in`` as well: the manifest says it."""
    upload(vl, "in")
    s3.requests.clear()
    s3.sent = s3.received = 0
    return vl


@pytest.fixture
def local(vl: Path, tmp_path: Path) -> dict[str, bytes]:
    """What a conversion of a directory called ``in`` gives."""
    (tmp_path / "in").symlink_to(vl)
    rewrite.convert(tmp_path / "in", tmp_path / "local")
    return tree(tmp_path / "local")


# --- reading


def test_inspect_says_the_same_of_a_bucket(s3: S3Stub, source: Path) -> None:
    """But for the address, and that bytes came over a network."""
    here, there = run("inspect", source, "--json"), run("inspect", "s3://models/in/", "--json")
    assert there.exit_code == 1, there.output
    one, other = json.loads(here.stdout), json.loads(there.stdout)
    assert other["path"] == "s3://models/in"
    assert other.pop("traffic")["requests"] == len(s3.requests)
    here_in, there_in = (shlex.split(each["advice"].pop("command"))[2] for each in (one, other))
    assert (here_in, there_in) == (one["path"], other["path"])
    assert {**one, "path": None} == {**other, "path": None}


def test_only_what_lies_below_the_prefix_is_read(s3: S3Stub, source: Path) -> None:
    """Neither s3://models/in2 nor what a browser leaves for a folder."""
    for key in ("in2/config.json", "in.json", "in/"):
        s3_module._client().put_object(Bucket="models", Key=key, Body=b"")
    assert set(S3Storage("s3://models/in").list_files().files) == set(tree(source))


def test_the_whole_bucket_is_a_place(s3: S3Stub, vl: Path) -> None:
    """To read from."""
    for name, data in tree(vl).items():
        s3_module._client().put_object(Bucket="models", Key=name, Body=data)
    assert rewrite.open_storage("s3://models").name == "models"
    assert rewrite.inspect_checkpoint("s3://models").groups == rewrite.inspect_checkpoint(vl).groups


def test_an_object_that_changes_between_two_reads(s3: S3Stub, source: Path) -> None:
    """The plan was made of other bytes."""
    storage = S3Storage("s3://models/in")
    name = next(name for name in storage.list_files().files if name.endswith(".safetensors"))
    storage.fetch(name, 0, 8)
    s3_module._client().put_object(Bucket="models", Key=f"in/{name}", Body=b"x" * storage.identify(name).size)
    with pytest.raises(StorageError, match="changed while it was read"):
        storage.fetch(name, 8, 16)


FAULTS = {
    "drop": Fault("drop"),
    "short": Fault("short"),
    "clipped": Fault("clipped"),
    "hang": Fault("hang"),
    "whole": Fault("whole"),
    "403": Fault("status", 403),
    "500": Fault("status", 500),
    "503": Fault("status", 503),
    "302": Fault("status", 302, {"Location": "http://127.0.0.1:1/elsewhere"}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_store_that_misbehaves_is_an_error(
    s3: S3Stub, source: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 4; never a wrong result, never a secret."""
    monkeypatch.setattr("rewrite.integrations.remote.HEAD", 1024)  # less than a file: "whole" is another answer
    if name == "hang":
        monkeypatch.setattr(s3_module, "_READ_TIMEOUT", 0.5)
        s3_module._client_of.cache_clear()
    s3.misbehave = lambda request: FAULTS[name] if request.path.endswith(".safetensors") else None
    result = run("inspect", "s3://models/in")
    assert result.exit_code == 4, result.output
    assert not [secret for secret in SECRETS if secret in result.output]


@pytest.mark.parametrize(
    ("code", "status", "what"),
    [
        ("ExpiredToken", 400, "get new credentials"),
        ("RequestTimeTooSkewed", 403, "set the clock"),
        ("InvalidAccessKeyId", 403, "check the credentials"),
        ("SlowDown", 503, "what is complete is kept"),
        ("PermanentRedirect", 301, "set AWS_REGION"),
        ("AuthorizationHeaderMalformed", 400, "set AWS_REGION"),
    ],
)
@pytest.mark.parametrize("words", [("inspect", "s3://models/in"), ("convert", "s3://models/in", "s3://models/out")])
def test_what_to_do_about_a_refusal(s3: S3Stub, source: Path, code: str, status: int, what: str, words: str) -> None:
    """Exit code 4 and a next step; what the server wrote is not shown."""
    text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>AKIDEXAMPLE wJalrXUtnFEMI</Message></Error>"
    reply = Reply(status, text.encode(), {"Content-Type": "application/xml"})
    s3.answer = lambda request: reply  # type: ignore[method-assign]
    result = run(*words)
    assert result.exit_code == 4, result.output
    assert what in " ".join(result.stderr.split())
    assert not [secret for secret in SECRETS if secret in result.output]


def test_another_range_of_the_same_length(s3: S3Stub, source: Path, tmp_path: Path) -> None:
    """A broken proxy, whose Content-Range says what it sent; refused, nothing is converted."""
    s3.misbehave = lambda r: Fault("shifted") if r.method == "GET" and "range" in r.headers else None
    result = run("convert", "s3://models/in", tmp_path / "out")
    assert result.exit_code == 4
    assert "another range" in result.stderr
    assert not (tmp_path / "out").exists()


def test_all_of_an_object_said_to_be_another_range(
    s3: S3Stub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The length is right, the range is shifted by one."""
    real = S3Stub.answer

    def shifted(self: S3Stub, request: Request) -> Reply:
        reply = real(self, request)
        if request.method == "GET" and "range" in request.headers:
            reply.headers["Content-Range"] = f"bytes 1-{len(reply.body)}/{len(reply.body) + 1}"
        return reply

    monkeypatch.setattr(S3Stub, "answer", shifted)
    assert run("convert", "s3://models/in", tmp_path / "out").exit_code == 4
    assert not (tmp_path / "out").exists()


def test_an_endpoint_with_a_password(s3: S3Stub, source: Path, tmp_path: Path) -> None:
    """It would be in reports and in commands that are shown."""
    url = s3.url.replace("http://", "http://user:TOPSECRET@")
    result = run("inspect", "s3://models/in", "--endpoint-url", url, "--json", "--report", tmp_path / "r.html")
    assert result.exit_code == 2
    assert "TOPSECRET" not in result.output
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize("versions", [False, True])
def test_keys_of_any_letters(
    s3: S3Stub, vl: Path, local: dict[str, bytes], versions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spaces, plus, percent, accents; a sibling with the same beginning; pages of listings, which moto ends after 100
    keys and AWS after 1,000; encrypted, versioned."""
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "100")
    client = s3_module._client()
    rule = {"ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "aws:kms" if versions else "AES256"}}
    client.put_bucket_encryption(Bucket="models", ServerSideEncryptionConfiguration={"Rules": [rule]})
    if versions:
        client.put_bucket_versioning(Bucket="models", VersioningConfiguration={"Status": "Enabled"})
    prefix, extra = "a b+c%20é/in", 0 if versions else 201
    files = {**tree(vl), **dict.fromkeys(("x y+z%2B.txt", "ünï.json", "d/e f.txt", "%41.txt"), b"{}")}
    files |= {f"many/{number:04d}.txt": b"" for number in range(extra)}
    behind = s3.behind
    for name, data in files.items():
        behind.put_object(Bucket="models", Key=f"{prefix}/{name}", Body=data)
    behind.put_object(Bucket="models", Key=f"{prefix}2/config.json", Body=b"sibling")
    out = "o ut+%/é"
    for _ in range(2):
        assert run("convert", f"s3://models/{prefix}", f"s3://models/{out}").exit_code == 0
    later = [unquote_plus(request.query) for request in s3.requests if "continuation-token" in request.query]
    assert versions or all(any(f"prefix={place}/" in query for query in later) for place in (prefix, out))
    found = download(out)
    assert found.keys() == {*files, "rewrite_manifest.json"}
    assert all(found[name] == data for name, data in files.items() if name not in local)
    shards = [name for name in local if name.endswith(".safetensors")]
    assert [found[name] for name in shards] == [local[name] for name in shards]


def test_a_fault_that_passes_is_survived(s3: S3Stub, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """boto3 tries again."""
    monkeypatch.setattr(s3_module, "ATTEMPTS", 3)
    s3_module._client_of.cache_clear()
    s3.misbehave = lambda request: Fault("status", 503) if request.number == 3 else None
    assert rewrite.inspect_checkpoint("s3://models/in").groups == rewrite.inspect_checkpoint(source).groups


@pytest.mark.parametrize(
    ("address", "what"),
    [("s3://models/no-such", "no checkpoint here"), ("s3://no-such-bucket/in", "no such object, bucket")],
)
def test_nothing_there(s3: S3Stub, address: str, what: str) -> None:
    """Exit code 4."""
    result = run("inspect", address)
    assert result.exit_code == 4
    assert what in result.stderr


@pytest.mark.parametrize("address", ["s3://", "s3://key:secret@models/in", "s3://models/../in", "s3://models//in"])
def test_what_is_no_place(address: str) -> None:
    """Exit code 2."""
    with pytest.raises(UsageError, match="Not a place in a bucket"):
        rewrite.open_storage(address)


def test_keys_that_lead_elsewhere(s3: S3Stub, source: Path) -> None:
    """They would become paths."""
    s3_module._client().put_object(Bucket="models", Key="in/a/../../etc", Body=b"x")
    with pytest.raises(CheckpointError, match="leads out"):
        rewrite.open_checkpoint("s3://models/in")


def test_without_credentials(s3: S3Stub, source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What to set is said."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    s3_module._client_of.cache_clear()
    result = run("inspect", "s3://models/in")
    assert result.exit_code == 4
    assert "set AWS_PROFILE" in result.stderr


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """What to install is said."""

    def absent(name: str) -> None:
        raise ImportError(name)

    s3_module._client_of.cache_clear()
    monkeypatch.setattr(s3_module.importlib, "import_module", absent)  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="needs the package boto3"):
        S3Storage("s3://models/in")


def test_another_endpoint(s3: S3Stub, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By an option, before what the environment says."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    s3_module._client_of.cache_clear()
    assert run("inspect", "s3://models/in").exit_code == 4
    s3_module._client_of.cache_clear()
    assert run("inspect", "s3://models/in", "--endpoint-url", s3.url).exit_code == 1


# --- writing


def test_within_a_store_the_store_copies(s3: S3Stub, source: Path, local: dict[str, bytes]) -> None:
    """The same bytes as a local conversion, byte for byte; what went through here is little, by the server's count."""
    result = run("convert", "s3://models/in", "s3://models/out", "--profile", "exact", "--json")
    assert result.exit_code == 0, result.output
    counted = json.loads(result.stdout)["bytes"]
    data = [r for r in s3.requests if r.method == "PUT" and b"<?xml" not in r.body[:5]]
    assert counted["sent"] == sum(len(r.body) for r in data if "x-amz-copy-source" not in r.headers)
    assert counted["read"] <= s3.sent
    assert download("out") == local
    assert counted["copied"] > 0.7 * sum(map(len, local.values()))
    assert any("uploadId" in r.query and "x-amz-copy-source-range" in r.headers for r in s3.requests)
    assert exists("out.rewrite-complete")
    assert not exists("out.rewrite-started")
    assert uploads() == 0


def test_an_output_is_verified_before_anybody_can_open_it(s3: S3Stub, source: Path) -> None:
    """When it is looked at, neither config.json nor the mark is there; what is not verified never gets them."""
    there: list[bool] = []

    def look(_: rewrite.Storage, out: rewrite.Storage) -> None:
        there.extend(exists(f"out{name}") for name in ("/config.json", "/model.safetensors.index.json"))
        assert rewrite.open_checkpoint(out).tensors.keys() == rewrite.open_checkpoint(source).tensors.keys()
        raise rewrite.StorageError("not as promised")

    with pytest.raises(StorageError, match="not as promised"):
        rewrite.convert("s3://models/in", "s3://models/out", check=look)
    assert there == [False, False]
    assert not any(exists(name) for name in ("out/config.json", "out.rewrite-complete"))
    result = run("convert", "s3://models/in", "s3://models/out", "--profile", "exact", "--verify")
    assert (result.exit_code, exists("out.rewrite-complete")) == (0, True), result.output
    assert "Not checked: nothing." in " ".join(result.stdout.split())


def test_config_comes_last(s3: S3Stub, source: Path) -> None:
    """The index before it, all else before both, the marker after them."""
    rewrite.convert("s3://models/in", "s3://models/out")
    done = [
        r.path.removeprefix("/models/")
        for r in s3.requests
        if (r.method == "PUT" and "uploadId" not in r.query) or (r.method == "POST" and "uploadId" in r.query)
        if ".rewrite-files/" not in r.path
    ]
    assert done[0] == "out.rewrite-started"
    assert done[-3:] == ["out/model.safetensors.index.json", "out/config.json", "out.rewrite-complete"]


@pytest.mark.parametrize("profile", ["exact", "dequantized"])
def test_between_here_and_there(s3: S3Stub, source: Path, vl: Path, tmp_path: Path, profile: str) -> None:
    """Directory to bucket, bucket to directory; profiles that compute, too. The manifests name their sources."""
    rewrite.convert(vl, tmp_path / "out", profile=profile)
    rewrite.convert(vl, "s3://models/up", profile=profile)
    assert download("up") == tree(tmp_path / "out")
    assert run("convert", "s3://models/in", tmp_path / "down", "--profile", profile).exit_code == 0
    down = tree(tmp_path / "down")
    (manifest, other) = (json.loads(t.pop("rewrite_manifest.json")) for t in (down, tree(tmp_path / "out")))
    assert {**manifest, "source": ""} == {**other, "source": ""}
    assert manifest["source"] == "in"
    assert down.items() <= tree(tmp_path / "out").items()


def test_verify_reads_buckets(s3: S3Stub, source: Path, vl: Path, tmp_path: Path) -> None:
    """On both sides, and finds a byte that differs."""
    rewrite.convert("s3://models/in", "s3://models/out")
    assert run("verify", "s3://models/in", "s3://models/out", "-q").stdout.startswith("s3://models/out is verified.")
    assert run("verify", vl, "s3://models/out", "-q").exit_code == 0
    key = next(f"out/{name}" for name in download("out") if name.endswith(".safetensors"))
    data = bytearray(s3_module._client().get_object(Bucket="models", Key=key)["Body"].read())
    data[-1] ^= 1
    s3_module._client().put_object(Bucket="models", Key=key, Body=bytes(data))
    assert run("verify", "s3://models/in", "s3://models/out", "-q").exit_code == 1


def test_nothing_to_do_is_a_copy(s3: S3Stub, source: Path, local: dict[str, bytes], tmp_path: Path) -> None:
    """All by the store, config and index last as well; no manifest of ours is added."""
    rewrite.convert("s3://models/in", "s3://models/out")
    s3.requests.clear()
    rewrite.convert("s3://models/out", "s3://models/again")
    assert download("again") == local
    copied = [r for r in s3.requests if "x-amz-copy-source" in r.headers]
    assert len(copied) == len(local)
    assert copied[-1].path == "/models/again/config.json"


@pytest.mark.parametrize("fault", [Fault("drop"), Fault("status", 503)], ids=["after", "before"])
@pytest.mark.parametrize(("shards", "step"), [(1, 1), (4, 17)])
def test_the_store_dies_at_any_request(
    s3: S3Stub, text: Path, tmp_path: Path, fault: Fault, shards: int, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the n-th request on, after or before it was carried out: OUT cannot be opened or is whole, and the next run
    completes it. For every n with one shard; with four for some, or for all of them with REWRITE_EVERY_REQUEST."""
    source = text if shards > 1 else in_one_shard(text, tmp_path / "one")
    step = 1 if os.environ.get("REWRITE_EVERY_REQUEST") else step
    if shards == 1:
        monkeypatch.setattr(s3_parts, "_COPIED", 1 << 20)  # few parts
    upload(source, "in")
    (tmp_path / "in").symlink_to(source)
    rewrite.convert(tmp_path / "in", tmp_path / "local")
    local, total = tree(tmp_path / "local"), _requests(s3, "count")
    assert total > 20 * shards
    early = tried = 0
    for number in range(0, total, step):
        out, tried = f"out{number}", tried + 1
        s3.misbehave = _dead_from(len(s3.requests) + number, fault)
        with pytest.raises(RewriteError):
            rewrite.convert("s3://models/in", f"s3://models/{out}", workers=1)
        s3.misbehave = lambda request: None
        found = download(out)
        assert not exists(f"{out}.rewrite-complete") or found == local
        if "config.json" in found:
            assert found == local
        else:
            early += 1
            with pytest.raises(RewriteError):
                rewrite.open_checkpoint(f"s3://models/{out}")
        rewrite.convert("s3://models/in", f"s3://models/{out}", workers=1)
        assert download(out) == local
        assert exists(f"{out}.rewrite-complete")
        assert not exists(f"{out}.rewrite-started")
        assert uploads() == 0
    assert early > tried * 0.6


def _requests(s3: S3Stub, out: str) -> int:
    began = len(s3.requests)
    rewrite.convert("s3://models/in", f"s3://models/{out}", workers=1)
    return len(s3.requests) - began


def _dead_from(number: int, fault: Fault) -> Callable[[Request], Fault | None]:
    return lambda request: fault if request.number >= number else None


def test_parts_that_an_upload_has_are_not_sent_again(
    s3: S3Stub, source: Path, local: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a kill, which can abort nothing, the next run goes on."""
    with monkeypatch.context() as patch:
        patch.setattr("rewrite.integrations.s3_write.Upload.abort", lambda self: None)
        s3.misbehave = lambda request: Fault("status", 500) if _completes(request) else None
        with pytest.raises(StorageError):
            rewrite.convert("s3://models/in", "s3://models/out", workers=1)
    left = uploads()
    assert left
    s3.misbehave = lambda request: None
    before = len(s3.requests)
    rewrite.convert("s3://models/in", "s3://models/out", workers=1)
    begun = [r for r in s3.requests[before:] if r.method == "POST" and r.query.startswith("uploads")]
    all_shards = [r for r in s3.requests[:before] if r.method == "POST" and r.query.startswith("uploads")]
    assert len(all_shards) == left
    assert not {r.path for r in begun} & {r.path for r in all_shards}
    assert download("out") == local


def _completes(request: Request) -> bool:
    return request.method == "POST" and "uploadId" in request.query


def test_an_upload_of_a_source_that_changed_is_thrown_away(s3: S3Stub, source: Path) -> None:
    """Its parts cost money, and are of use to nobody."""
    planned = rewrite.plan_conversion("s3://models/in", "s3://models/out")
    shard = planned.plan.shards[0]

    def change(request: Request) -> None:
        if request.path == f"/models/out/{shard.name}" and "partNumber=2" in request.query:
            s3.behind.put_object(Bucket="models", Key=f"in/{shard.name}", Body=b"x" * shard.source.size)

    s3.misbehave = change
    with pytest.raises(StorageError, match="changed while"):
        planned.publish(1)
    s3.misbehave = lambda request: None
    assert f"out/{shard.name}" not in [u["Key"] for u in _pending()]


def _pending() -> list[dict[str, str]]:
    return list(s3_module._client().list_multipart_uploads(Bucket="models").get("Uploads", []))


@pytest.mark.parametrize("status", [503, 500, 403])
def test_a_store_that_refuses_for_long_loses_no_part(
    s3: S3Stub, source: Path, local: dict[str, bytes], status: int
) -> None:
    """Parts that are there are kept for the next run, and not sent or copied again."""
    made: list[tuple[str, str]] = []

    def refuse(request: Request) -> Fault | None:
        if request.method == "PUT" and "partNumber" in request.query:
            if len(made) >= 6:
                return Fault("status", status)
            made.append((request.path, request.query.partition("&uploadId")[0]))
        return None

    s3.misbehave = refuse
    with pytest.raises(StorageError):
        rewrite.convert("s3://models/in", "s3://models/out", workers=1)
    kept, before = list(made), len(s3.requests)
    assert len(kept) == 6
    assert uploads() > 0
    s3.misbehave = lambda request: None
    rewrite.convert("s3://models/in", "s3://models/out", workers=1)
    again = [(r.path, r.query.partition("&uploadId")[0]) for r in s3.requests[before:] if "partNumber" in r.query]
    assert not set(kept) & set(again)
    assert download("out") == local
    assert uploads() == 0


def test_a_store_that_answers_and_keeps_nothing(s3: S3Stub, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """rclone does it with copied parts: found before the object is made."""
    real = S3Stub.answer

    def lying(self: S3Stub, request: Request) -> object:
        if "x-amz-copy-source-range" in request.headers:
            shorter = {**request.headers, "x-amz-copy-source-range": "bytes=0-299"}
            request = Request(request.method, request.path, request.query, shorter, request.body, request.number)
        return real(self, request)

    monkeypatch.setattr(S3Stub, "answer", lying)
    with pytest.raises(StorageError, match="has not kept what was written"):
        rewrite.convert("s3://models/in", "s3://models/out")
    assert not exists("out/config.json")


def test_a_store_that_quotes_etags_now_and_then(
    s3: S3Stub, source: Path, local: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ceph 16 does not, where it has copied a part; where it has completed an object, it says none."""
    real = S3Stub.answer

    def unquoted(self: S3Stub, request: Request) -> Reply:
        reply = real(self, request)
        if _completes(request):
            reply.body = re.sub(rb"<ETag>.*</ETag>", b"<ETag></ETag>", reply.body)
            assert b"<ETag></ETag>" in reply.body
        if "x-amz-copy-source-range" in request.headers:
            reply.body = (
                reply.body.replace(b"&quot;", b"").replace(b'<ETag>"', b"<ETag>").replace(b'"</ETag>', b"</ETag>")
            )
            assert b"CopyPartResult" in reply.body
        return reply

    monkeypatch.setattr(S3Stub, "answer", unquoted)
    rewrite.convert("s3://models/in", "s3://models/out")
    assert download("out") == local


def test_a_store_that_answers_without_an_etag(s3: S3Stub, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing could be checked afterwards."""
    real = S3Stub.answer

    def without(self: S3Stub, request: Request) -> Reply:
        reply = real(self, request)
        if "x-amz-copy-source-range" in request.headers:
            reply.body = re.sub(rb"<ETag>.*</ETag>", b"", reply.body)
        return reply

    monkeypatch.setattr(S3Stub, "answer", without)
    with pytest.raises(StorageError, match="without an ETag"):
        rewrite.convert("s3://models/in", "s3://models/out")


def test_a_source_that_changes_meanwhile(s3: S3Stub, source: Path) -> None:
    """Servers ignore CopySourceIfMatch; we look before and after."""
    planned = rewrite.plan_conversion("s3://models/in", "s3://models/out")
    shard = planned.plan.shards[0]
    s3_module._client().put_object(Bucket="models", Key=f"in/{shard.name}", Body=b"x" * shard.source.size)
    with pytest.raises(StorageError, match="changed while it was converted"):
        planned.publish(2)
    assert not exists("out/config.json")


def test_a_file_that_came_meanwhile(s3: S3Stub, source: Path) -> None:
    """The whole list is looked at before the config is written."""
    planned = rewrite.plan_conversion("s3://models/in", "s3://models/out")
    s3_module._client().put_object(Bucket="models", Key="in/new.txt", Body=b"x")
    with pytest.raises(StorageError, match="changed while it was converted"):
        planned.publish(2)
    assert not exists("out/config.json")


def test_an_out_that_exists_is_refused(s3: S3Stub, source: Path) -> None:
    """Unless it is the result of the same plan: then there is nothing to do."""
    s3_module._client().put_object(Bucket="models", Key="out/mine", Body=b"x")
    with pytest.raises(StorageError, match="output exists"):
        rewrite.convert("s3://models/in", "s3://models/out")
    rewrite.convert("s3://models/in", "s3://models/out2")
    counts = rewrite.convert("s3://models/in", "s3://models/out2").counts
    assert counts is not None
    assert (counts.copied, counts.written, counts.sent) == (0, 0, 0)
    with pytest.raises(StorageError, match="output exists"):
        rewrite.convert("s3://models/in", "s3://models/out2", profile="portable")


def test_two_conversions_to_one_place(s3: S3Stub, source: Path) -> None:
    """The second one, of another plan, is told."""
    one = rewrite.plan_conversion("s3://models/in", "s3://models/out")
    one.run_part(0, 2)
    with pytest.raises(StorageError, match="Another conversion has begun"):
        rewrite.convert("s3://models/in", "s3://models/out", profile="portable")
    one.run_part(1, 2)
    one.finish()


def test_in_parts(s3: S3Stub, source: Path, local: dict[str, bytes], tmp_path: Path) -> None:
    """As in a directory: nothing is there before the last step, which may run again. The plan has no credentials."""
    path = tmp_path / "plan.json"
    assert run("plan", "--profile", "exact", "s3://models/in", "s3://models/out", "--output", path).exit_code == 0
    assert not [secret for secret in SECRETS if secret in path.read_text()]
    assert run("run", path, "--part", "0/2").exit_code == 0
    result = run("finish", path)
    assert result.exit_code == 4
    assert "run the parts that are missing" in result.stderr
    assert run("run", path, "--part", "0/2").exit_code == 0
    assert run("run", path, "--part", "1/2").exit_code == 0
    assert not exists("out/config.json")
    assert run("finish", path).exit_code == 0
    assert download("out") == local
    assert Conversion.load(path).finish().counts is not None
    assert Conversion.load(path).run_part(0, 2).written == 0


def test_by_other_processes(s3: S3Stub, source: Path, local: dict[str, bytes]) -> None:
    """Each with a client of its own."""
    with ProcessPoolExecutor(2) as executor:
        rewrite.convert("s3://models/in", "s3://models/out", executor=executor)
    assert download("out") == local


@pytest.mark.parametrize(
    ("out", "options", "what"),
    [
        ("s3://models", {}, "no name for an output"),
        ("s3://models/in/out", {}, "overlap"),
        ("s3://models/out", {"overwrite": True}, "not replaced"),
        ("s3://models/out", {"copy": True}, "disk blocks"),
        ("gs://models/out", {}, "Google"),
    ],
)
def test_what_makes_no_sense(s3: S3Stub, source: Path, out: str, options: dict[str, bool], what: str) -> None:
    """Exit code 2, and nothing is written."""
    with pytest.raises(UsageError, match=what):
        rewrite.convert("s3://models/in", out, **options)  # type: ignore[arg-type]
    assert not [r for r in s3.requests if r.method in ("PUT", "POST")]


def test_places_that_overlap() -> None:
    """By whole names."""
    place = Place.parse("s3://models/in")
    assert place.overlaps(Place.parse("s3://models/in/x"))
    assert place.overlaps(Place.parse("s3://models"))
    assert not place.overlaps(Place.parse("s3://models/in2"))
    assert not place.overlaps(Place.parse("s3://other/in"))


# --- what an earlier output, or somebody else, left or writes there


@pytest.mark.parametrize("earlier", ["exact", "portable"])
def test_the_mark_of_an_output_that_was_deleted(s3: S3Stub, source: Path, earlier: str) -> None:
    """Whoever waits for the new one must not see the mark of the old one, of the same plan or not, while it is made."""
    rewrite.convert("s3://models/in", "s3://models/out", profile=earlier)
    for name in download("out"):
        s3_module._client().delete_object(Bucket="models", Key=f"out/{name}")
    assert exists("out.rewrite-complete")
    seen: set[bool] = set()

    def look(request: Request) -> None:
        if request.method in ("PUT", "POST") and request.path.startswith("/models/out/"):
            seen.add("Contents" in s3.behind.list_objects_v2(Bucket="models", Prefix="out.rewrite-complete"))

    s3.misbehave = look
    rewrite.convert("s3://models/in", "s3://models/out")
    s3.misbehave = lambda request: None
    assert seen == {False}
    assert exists("out.rewrite-complete")


def test_somebody_comes_and_goes_before_the_claim(s3: S3Stub, source: Path) -> None:
    """Between the look at an empty place and the claim of it another output appears there."""

    def come(request: Request) -> None:
        if request.method == "PUT" and request.path.endswith(".rewrite-started"):
            s3.behind.put_object(Bucket="models", Key="out/config.json", Body=b"theirs")

    s3.misbehave = come
    with pytest.raises(StorageError, match="output exists"):
        rewrite.convert("s3://models/in", "s3://models/out")
    assert download("out") == {"config.json": b"theirs"}
    assert not exists("out.rewrite-started")


def test_an_object_of_somebody_else(s3: S3Stub, source: Path) -> None:
    """It would be part of the checkpoint: the output is not completed with it."""
    planned = rewrite.plan_conversion("s3://models/in", "s3://models/out")
    planned.run_part(0, 1)
    s3_module._client().put_object(Bucket="models", Key="out/model-extra.safetensors", Body=b"x")
    with pytest.raises(StorageError, match="no files of the output") as refused:
        planned.finish()
    assert refused.value.found == "model-extra.safetensors"
    assert not exists("out/config.json")
    s3_module._client().delete_object(Bucket="models", Key="out/model-extra.safetensors")
    planned.finish()
    assert exists("out/config.json")


def test_a_folder_that_a_browser_made_is_empty(s3: S3Stub, source: Path, local: dict[str, bytes]) -> None:
    """An object of no bytes whose name ends with a slash."""
    s3_module._client().put_object(Bucket="models", Key="out/", Body=b"")
    rewrite.convert("s3://models/in", "s3://models/out")
    assert {name: data for name, data in download("out").items() if name} == local


def test_a_copy_of_what_changed_does_not_stay(
    s3: S3Stub, source: Path, local: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server ignores CopySourceIfMatch, and the source changes while it is copied: the next run would keep it."""
    planned = rewrite.plan_conversion("s3://models/in", "s3://models/out")
    name = next(job.name for job in planned.plan.jobs if not isinstance(job, ShardPlan))
    real = S3Stub.answer

    def changing(self: S3Stub, request: Request) -> Reply:
        if request.method == "PUT" and request.path == f"/models/out/{name}":
            s3.behind.put_object(Bucket="models", Key=f"in/{name}", Body=b"x" * len(local[name]))
            without = {k: v for k, v in request.headers.items() if k != "x-amz-copy-source-if-match"}
            request = Request(request.method, request.path, request.query, without, request.body, request.number)
        return real(self, request)

    with monkeypatch.context() as patch:
        patch.setattr(S3Stub, "answer", changing)
        with pytest.raises(StorageError, match="changed while it was converted"):
            planned.publish(1)
    assert not exists(f"out/{name}")
    s3_module._client().put_object(Bucket="models", Key=f"in/{name}", Body=local[name])
    planned.publish(1)
    assert download("out") == local


def test_half_an_answer_is_asked_for_again(s3: S3Stub, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """boto3 tries requests again, not the reading of answers."""
    monkeypatch.setattr(s3_module, "ATTEMPTS", 3)
    broken: set[str] = set()

    def once(request: Request) -> Fault | None:
        if request.method != "GET" or "range" not in request.headers or request.path in broken:
            return None
        broken.add(request.path)
        return Fault("short")

    s3.misbehave = once
    assert rewrite.open_checkpoint("s3://models/in").tensors
    assert broken
    s3.misbehave = lambda r: Fault("short") if r.method == "GET" and "range" in r.headers else None
    with pytest.raises(StorageError):
        rewrite.open_checkpoint("s3://models/in")


@pytest.mark.parametrize("what", [b"ETag", b"Size"])
def test_a_list_without_what_is_needed(s3: S3Stub, source: Path, what: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a traceback."""
    real = S3Stub.answer

    def without(self: S3Stub, request: Request) -> Reply:
        reply = real(self, request)
        if "list-type" in request.query:
            reply.body = re.sub(b"<%s>[^<]*</%s>" % (what, what), b"", reply.body)
        return reply

    monkeypatch.setattr(S3Stub, "answer", without)
    with pytest.raises(StorageError, match="without size or ETag"):
        rewrite.open_checkpoint("s3://models/in")


def test_bytes_of_other_processes_are_counted(s3: S3Stub, source: Path) -> None:
    """As those of this one are: within some requests more, as each task lists the source."""
    here = rewrite.convert("s3://models/in", "s3://models/out").counts
    with ProcessPoolExecutor(2) as executor:
        there = rewrite.convert("s3://models/in", "s3://models/out2", executor=executor).counts
    assert here is not None
    assert there is not None
    assert here.sent is not None
    assert there.sent is not None
    assert abs(there.sent - here.sent) < 100  # ids of uploads have no fixed length
    assert here.read <= there.read <= here.read * 3
