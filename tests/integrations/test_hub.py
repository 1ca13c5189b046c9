"""Models on the hub: little is read, of one commit, and a server that misbehaves never makes a wrong answer."""

from __future__ import annotations

import gzip
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from huggingface_hub import constants, hf_hub_download, snapshot_download

import rewrite
from rewrite.cli.commands import main
from rewrite.errors import CheckpointError, StorageError, UsageError
from rewrite.integrations.hub import HubStorage
from tests.servers.http import Fault, Reply, Request
from tests.servers.hub import SIGNATURE, HubStub, make_file
from tests.support import unfolded

TOKEN = "hf_secret"


def run(*words: str) -> Result:
    """The command line, in this process."""
    return CliRunner().invoke(main, words)


def test_inspect_says_the_same_of_the_hub_as_of_a_directory(hub: HubStub, vl: Path) -> None:
    """But for the address, which names the commit."""
    commit = hub.add("org/model", vl)
    here, there = run("inspect", str(vl), "--json"), run("inspect", "org/model", "--json")
    assert (here.exit_code, there.exit_code) == (1, 1)
    one, other = json.loads(here.stdout), json.loads(there.stdout)
    assert other["path"] == f"hf://org/model@{commit}"
    traffic = other.pop("traffic")
    assert traffic["requests"] == len(hub.requests)
    here_in, there_in = (shlex.split(each["advice"].pop("command"))[2] for each in (one, other))
    assert (here_in, there_in) == (one["path"], other["path"])
    assert {**one, "path": None} == {**other, "path": None}


@pytest.mark.parametrize("address", ["hf://org/model", "org/model", "org/model@main", "hf://org/model@{commit}"])
def test_addresses(hub: HubStub, text: Path, address: str) -> None:
    """With and without a scheme and a revision: always pinned to a commit, which is shown."""
    commit = hub.add("org/model", text)
    result = run("inspect", address.format(commit=commit))
    assert f"hf://org/model@{commit}: qwen3_5_text," in unfolded(result.stdout)
    assert "kB read, in " in result.stderr


def test_an_older_commit_is_read_when_it_is_asked_for(hub: HubStub, text: Path, vl: Path) -> None:
    """Not what main is now."""
    commit = hub.add("org/model", text)
    hub.add("org/model", vl)
    assert len(rewrite.open_checkpoint(f"org/model@{commit}").shards) == len(rewrite.open_checkpoint(text).shards)
    assert len(rewrite.open_checkpoint("org/model").shards) == len(rewrite.open_checkpoint(vl).shards)


def test_what_is_opened_stays_at_its_commit(hub: HubStub, text: Path, vl: Path) -> None:
    """Somebody pushes while we read."""
    hub.add("org/model", text)
    checkpoint = rewrite.open_checkpoint("org/model")
    hub.add("org/model", vl)
    assert (
        rewrite.make_plan(checkpoint).manifest.groups
        == rewrite.make_plan(rewrite.open_checkpoint(text)).manifest.groups
    )


def test_only_headers_and_scales_are_read(hub: HubStub, tmp_path: Path, copy: Path) -> None:
    """A shard with a gigabyte of weights (sparse): less than a thousandth of it, by the server's own count."""
    header = json.dumps({"big": {"dtype": "U8", "shape": [1 << 30], "data_offsets": [0, 1 << 30]}}).encode()
    with (copy / "model-big.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (1 << 30))
    _add_to_index(copy, {"big": "model-big.safetensors"})
    hub.add("org/big", copy, large=1 << 20)
    result = run("inspect", "org/big", "--json")
    assert result.exit_code == 1, result.output
    traffic = json.loads(result.stdout)["traffic"]
    assert traffic["read"] == hub.sent < (1 << 30) / 1000
    assert traffic["requests"] == len(hub.requests)


def _add_to_index(directory: Path, names: dict[str, str]) -> None:
    path = directory / "model.safetensors.index.json"
    if not path.exists():
        (shard,) = directory.glob("model.safetensors")
        names = {**dict.fromkeys(rewrite.open_checkpoint(directory).tensors, shard.name), **names}
        path.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": names}))
        return
    value = json.loads(path.read_text())
    value["weight_map"].update(names)
    path.write_text(json.dumps(value))


def test_a_directory_of_the_same_name_wins(
    hub: HubStub, text: Path, vl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in transformers; hf:// still means the hub."""
    hub.add("org/model", vl)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(text, tmp_path / "org" / "model")
    assert rewrite.inspect_checkpoint("org/model").path == "org/model"
    assert hub.requests == []
    assert rewrite.inspect_checkpoint("hf://org/model").path.startswith("hf://org/model@")


def test_a_path_is_never_looked_up_on_the_hub(hub: HubStub, tmp_path: Path) -> None:
    """Neither an absolute one, nor one that begins with a dot, nor a Path."""
    for address in (str(tmp_path / "no" / "such"), "./org/model", "../model", "a/b/c", Path("org/model")):
        with pytest.raises(StorageError, match="no checkpoint directory"):
            rewrite.open_checkpoint(address)
    assert hub.requests == []


def test_the_cache_of_the_library_is_read_first(hub: HubStub, text: Path) -> None:
    """What was downloaded at this commit is not asked for again."""
    hub.add("org/model", text)
    snapshot_download("org/model", endpoint=hub.url)
    hub.requests.clear()
    rewrite.inspect_checkpoint("org/model")
    assert [request.path for request in hub.requests] == ["/api/models/org/model/revision/main"]


def test_offline_means_the_cache_alone(hub: HubStub, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways: what is there is read, what is not is refused; nothing is asked."""
    commit = hub.add("org/model", text)
    snapshot_download("org/model", endpoint=hub.url)
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert rewrite.make_plan(rewrite.open_checkpoint("org/model")).manifest.source == f"org/model@{commit}"
    result = run("inspect", "org/other")
    assert result.exit_code == 4
    assert "not in the cache, and HF_HUB_OFFLINE is set" in result.stderr
    assert "there is no directory of this name here, either" in unfolded(result.stderr)
    assert hub.requests == []


def test_a_gated_model_needs_the_token(hub: HubStub, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the message says which way to go, without the token."""
    hub.add("org/model", text)
    hub.gated.add("org/model")
    result = run("inspect", "org/model")
    assert result.exit_code == 4
    assert "HTTP status 403, no token was sent" in result.stderr
    assert "set HF_TOKEN" in result.stderr
    monkeypatch.setenv("HF_TOKEN", "hf_wr0ng")
    result = run("inspect", "org/model")
    assert "HTTP status 403, a token was sent" in result.stderr
    assert "hf_wr0ng" not in result.output
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert run("inspect", "org/model").exit_code == 1


def test_the_token_stays_with_the_hub(hub: HubStub, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large files are on another host, which has no business with it. Its signed address is asked for once a file."""
    assert hub.cdn is not None
    hub.add("org/model", text)
    hub.signed = True
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    rewrite.inspect_checkpoint("org/model")
    assert hub.cdn.requests
    assert not [request for request in hub.cdn.requests if "authorization" in request.headers]
    assert all("authorization" in request.headers for request in hub.requests)
    resolved = [r.path for r in hub.requests if r.path.endswith(".safetensors")]
    assert sorted(resolved) == sorted(set(resolved))


def test_a_signature_that_expired_is_asked_for_again(hub: HubStub, text: Path) -> None:
    """S3 and its like answer 403 then."""
    assert hub.cdn is not None
    hub.add("org/model", text)
    hub.signed = True
    storage = HubStorage("org/model")
    name = next(name for name in storage.list_files().files if name.endswith(".safetensors"))
    first = storage.fetch(name, 0, 8)
    later = len(hub.cdn.requests)
    hub.cdn.misbehave = lambda request: Fault("status", 403) if request.number == later else None
    assert storage.fetch(name, 0, 8) == first
    assert len(hub.cdn.requests) == later + 2


def test_signatures_are_in_no_message(hub: HubStub, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the other host does."""
    monkeypatch.setattr("rewrite.integrations.remote.HEAD", 1024)
    assert hub.cdn is not None
    hub.add("org/model", text)
    hub.signed = True
    for fault in (Fault("status", 403), Fault("status", 500), Fault("drop"), Fault("whole")):
        hub.cdn.misbehave = _always(fault)
        result = run("inspect", "org/model")
        assert result.exit_code == 4
        assert SIGNATURE not in result.output
        assert "127.0.0.1" not in result.output


def _always(fault: Fault) -> Callable[[Request], Fault]:
    return lambda request: fault


def _be_impatient(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no answer comes. Elsewhere a busy machine may take its time."""
    if name == "hang":
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.4)


FAULTS = {
    "drop": (Fault("drop"), "a broken connection"),
    "short": (Fault("short"), "a broken connection"),
    "clipped": (Fault("clipped"), "of the"),
    "hang": (Fault("hang"), "a time-out"),
    "whole": (Fault("whole"), "where a range was asked for"),
    "shifted": (Fault("shifted"), "another range"),
    "500": (Fault("status", 500), "HTTP status 500"),
    "429": (Fault("status", 429, {"Retry-After": "0"}), "HTTP status 429"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_that_passes_is_survived(hub: HubStub, text: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second request for a range fails once: the same result."""
    _be_impatient(name, monkeypatch)
    hub.add("org/model", text)
    fault, _ = FAULTS[name]
    seen: set[tuple[str, str]] = set()

    def now_and_then(request: Request) -> Fault | None:
        key = (request.path, request.headers.get("range", ""))
        if "/resolve/" not in request.path or key in seen or len(seen) > 2:
            return None
        seen.add(key)
        return fault

    hub.misbehave = now_and_then
    found = rewrite.inspect_checkpoint("org/model")
    assert found.groups == rewrite.inspect_checkpoint(text).groups
    assert seen


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_that_stays_is_an_error(hub: HubStub, text: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 4 and its reason, after a few tries; never a wrong result."""
    monkeypatch.setattr("rewrite.integrations.http.ATTEMPTS", 2)
    monkeypatch.setattr("rewrite.integrations.remote.HEAD", 1024)  # less than a file: "whole" is another answer
    _be_impatient(name, monkeypatch)
    hub.add("org/model", text)
    fault, said = FAULTS[name]
    hub.misbehave = lambda request: fault if request.path.endswith(".safetensors") else None
    result = run("inspect", "org/model")
    assert result.exit_code == 4
    assert said in result.stderr
    assert ", 2 times" in result.stderr


def test_the_server_says_how_long_to_wait(hub: HubStub, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Retry-After in seconds, up to two minutes; what is not a number of seconds is not obeyed."""
    waited: list[float] = []
    monkeypatch.setattr("rewrite.integrations.http.time.sleep", waited.append)
    hub.add("org/model", text)
    asked = iter(["7", "86400", "Wed, 21 Oct 2026 07:28:00 GMT"])

    def busy(request: Request) -> Fault | None:
        wait = next(asked, None)
        return None if wait is None else Fault("status", 429, {"Retry-After": wait})

    hub.misbehave = busy
    rewrite.open_checkpoint("org/model")
    assert waited == [7.0, 120.0, 0.04]


def _other_hash(hub: HubStub) -> None:
    for commit in hub.models["org/model"]:
        name = next(name for name in commit.files if name.endswith(".safetensors"))
        commit.files[name] = make_file(b"\0" * commit.files[name].size, True)


def _other_size(hub: HubStub) -> None:
    for commit in hub.models["org/model"]:
        name = next(name for name in commit.files if name.endswith(".safetensors"))
        file = commit.files[name]
        assert isinstance(file.content, bytes)
        longer = make_file(file.content + b"\0", True)
        commit.files[name] = type(file)(longer.content, True, file.sha)


@pytest.mark.parametrize("change", [_other_hash, _other_size])
def test_a_file_that_is_not_the_listed_one_is_refused(
    hub: HubStub, text: Path, change: Callable[[HubStub], None]
) -> None:
    """The commit is the same, and behind one of its names lies something else."""
    hub.add("org/model", text)
    storage = HubStorage("org/model")
    change(hub)
    with pytest.raises(StorageError, match="not the one of the commit"):
        rewrite.open_checkpoint(storage)


def test_a_model_that_was_renamed(hub: HubStub, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub redirects, within itself: the same is read. To another host no token goes."""
    hub.add("org/new", text)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    real = HubStub.answer

    def renamed(self: HubStub, request: Request) -> Reply:
        if "/old/" not in request.path:
            return real(self, request)
        query = f"?{request.query}" if request.query else ""
        return Reply(307, b"", {"Location": request.path.replace("/old/", "/new/") + query})

    monkeypatch.setattr(HubStub, "answer", renamed)
    assert rewrite.inspect_checkpoint("org/old").groups == rewrite.inspect_checkpoint(text).groups
    assert hub.cdn is not None
    elsewhere = hub.cdn.url
    monkeypatch.setattr(HubStub, "answer", lambda self, request: Reply(307, b"", {"Location": f"{elsewhere}/x"}))
    assert run("inspect", "org/old").exit_code == 4
    assert hub.cdn.requests
    assert not [request for request in hub.cdn.requests if "authorization" in request.headers]


@pytest.mark.parametrize("what", ["/resolve/", "/api/"])
def test_answers_that_are_compressed(hub: HubStub, text: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though we ask for none of it: a list is read all the same, a range is refused."""
    monkeypatch.setattr("rewrite.integrations.http.ATTEMPTS", 1)
    hub.add("org/model", text)
    real = HubStub.answer

    def compressed(self: HubStub, request: Request) -> Reply:
        reply = real(self, request)
        if what in request.path and reply.status in (200, 206):
            reply.body, reply.headers["Content-Encoding"] = gzip.compress(reply.body), "gzip"
        return reply

    monkeypatch.setattr(HubStub, "answer", compressed)
    result = run("inspect", "org/model")
    assert result.exit_code == (4 if what == "/resolve/" else 1)


def test_redirects_without_an_end(hub: HubStub, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Are followed for a while only."""
    monkeypatch.setattr("rewrite.integrations.http.ATTEMPTS", 1)
    hub.add("org/model", text)
    hub.misbehave = lambda request: Fault("status", 302, {"Location": request.path})
    with pytest.raises(StorageError, match="redirects without an end"):
        rewrite.open_checkpoint("org/model")


@pytest.mark.parametrize("name", ["../config.json", "/etc/passwd", "a//b", "a\\b"])
def test_names_that_lead_elsewhere_are_refused(hub: HubStub, text: Path, name: str) -> None:
    """They come from a stranger's server."""
    hub.add("org/model", text)
    hub.models["org/model"][-1].files[name] = make_file(b"{}", False)
    with pytest.raises(CheckpointError, match="leads out"):
        rewrite.open_checkpoint("org/model")


def test_folders_of_tools_are_passed_over(hub: HubStub, text: Path) -> None:
    """As in a directory."""
    hub.add("org/model", text)
    hub.models["org/model"][-1].files["x/.cache/huggingface/lock"] = make_file(b"", False)
    checkpoint = rewrite.open_checkpoint("org/model")
    assert checkpoint.passed_over == ("x/.cache/huggingface",)
    assert not [name for name in checkpoint.files if "huggingface" in name]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{",
        b'{"sha": "main", "siblings": []}',
        b'{"sha": 1, "siblings": []}',
        b'{"sha": "%040d", "siblings": [1]}' % 0,
        b'{"sha": "%040d", "siblings": [{"rfilename": "a"}]}' % 0,
        b'{"sha": "%040d", "siblings": [{"rfilename": "a", "size": -1, "blobId": "b"}]}' % 0,
    ],
)
def test_answers_that_make_no_sense(hub: HubStub, body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy's page, another program's JSON."""
    from tests.servers.http import Reply

    monkeypatch.setattr(HubStub, "answer", lambda self, request: Reply(200, body))
    with pytest.raises(StorageError, match="cannot be understood"):
        rewrite.open_checkpoint("org/model")


@pytest.mark.parametrize(
    "address", ["hf://model", "hf://org/model/file", "hf://", "hf://org/model@", "hf://org/mo del"]
)
def test_what_is_no_name_of_a_model(address: str) -> None:
    """Exit code 2."""
    with pytest.raises(UsageError, match="Not the name of a model"):
        rewrite.open_checkpoint(address)


@pytest.mark.parametrize(
    ("address", "why"),
    [("gs://bucket/model", "Google Cloud"), ("az://container/model", "Azure"), ("ftp://host/model", "Unknown kind")],
)
def test_other_places_are_refused_by_name(address: str, why: str) -> None:
    """Saying why."""
    result = run("inspect", address)
    assert result.exit_code == 2
    assert why in result.stderr


def test_verify_reads_the_hub_on_both_sides(hub: HubStub, text: Path, tmp_path: Path) -> None:
    """And finds what is wrong there as it does here."""
    out = tmp_path / "out"
    rewrite.convert(text, out)
    hub.add("org/in", text)
    commit = hub.add("me/out", out)
    assert run("verify", "org/in", "hf://me/out", "-q").stdout.startswith(f"hf://me/out@{commit} is verified.")
    assert run("verify", str(text), "me/out", "-q").exit_code == 0
    shard = next(out.glob("*.safetensors"))
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(bytes(raw))
    hub.add("me/broken", out)
    assert run("verify", "org/in", "me/broken", "-q").exit_code == 1


def test_one_file_of_the_cache_is_enough(hub: HubStub, text: Path) -> None:
    """Files in the cache and on the hub together are one checkpoint."""
    hub.add("org/model", text)
    hf_hub_download("org/model", "config.json", endpoint=hub.url)
    hub.requests.clear()
    assert rewrite.inspect_checkpoint("org/model").groups == rewrite.inspect_checkpoint(text).groups
    assert not [request for request in hub.requests if request.path.endswith("/config.json")]


def test_a_config_with_another_hash(hub: HubStub, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same size, same name, same ETag, other bytes: something between the hub and here has changed it."""
    hub.add("org/model", text)
    real = HubStub.answer

    def other(self: HubStub, request: Request) -> Reply:
        reply = real(self, request)
        if request.path.endswith("/config.json"):
            reply.body = reply.body.replace(b"float", b"flaot")
        return reply

    monkeypatch.setattr(HubStub, "answer", other)
    with pytest.raises(StorageError, match="not the one of the commit"):
        rewrite.open_checkpoint("hf://org/model")


def _answers(monkeypatch: pytest.MonkeyPatch, change: Callable[[Reply], None]) -> None:
    """Change what the hub answers for shards."""
    real = HubStub.answer

    def other(self: HubStub, request: Request) -> Reply:
        reply = real(self, request)
        if request.path.endswith(".safetensors"):
            change(reply)
        return reply

    monkeypatch.setattr(HubStub, "answer", other)
    monkeypatch.setattr("rewrite.integrations.http.ATTEMPTS", 1)


@pytest.mark.parametrize("total", ["same", "more"])
def test_all_of_a_file_said_to_be_another_range(
    hub: HubStub, text: Path, total: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The length is right, the range is shifted by one."""

    def shifted(reply: Reply) -> None:
        size = len(reply.body)
        reply.headers["Content-Range"] = f"bytes 1-{size}/{size + (total == 'more')}"

    hub.add("org/model", text)
    _answers(monkeypatch, shifted)
    result = run("inspect", "org/model")
    assert result.exit_code == 4
    assert "another range than the one asked for" in result.stderr


def test_the_beginning_of_a_file_said_to_be_all_of_it(
    hub: HubStub, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HTTP status 200 with as many bytes as were asked for, where the file is longer: a cut file."""

    def cut(reply: Reply) -> None:
        reply.status = 200
        reply.headers.pop("Content-Range")

    hub.add("org/model", text)
    monkeypatch.setattr("rewrite.integrations.remote.HEAD", 1024)
    _answers(monkeypatch, cut)
    result = run("inspect", "org/model")
    assert result.exit_code == 4
    assert "not the one of the commit" in result.stderr


def test_a_revision_that_moves_between_the_parts(hub: HubStub, text: Path, vl: Path, tmp_path: Path) -> None:
    """A plan names the commit, not the branch: its parts read that one, or say that it is gone."""
    commit = hub.add("org/model", text)
    plans = [tmp_path / "one.json", tmp_path / "two.json"]
    for plan in plans:
        assert run("plan", "org/model@main", str(tmp_path / plan.stem), "--output", str(plan)).exit_code == 0
    hub.add("org/model", vl)
    assert run("run", str(plans[0]), "--part", "0/1").exit_code == run("finish", str(plans[0])).exit_code == 0
    assert json.loads((tmp_path / "one" / "rewrite_manifest.json").read_text())["source"] == f"org/model@{commit}"
    assert run("verify", str(text), str(tmp_path / "one"), "-q", "--weights-only").exit_code == 0
    del hub.models["org/model"][0]  # a push that rewrote the history
    result = run("run", str(plans[1]), "--part", "0/1")
    assert result.exit_code == 4
    assert "no such model, revision or file" in unfolded(result.stderr)
    assert not (tmp_path / "two").exists()
