"""The genuine client of Xet, which the hub keeps large files with. Its server is a directory here."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants

import rewrite
from tests.servers.hub import Cas, HubStub
from tests.support import edit_json, raw_tensors, tree, write_shard

pytest.importorskip("hf_xet")
FILLER = 12 << 20  # bytes that do not change: enough chunks of 64 KiB to see which are sent


@pytest.fixture
def xet(hub: HubStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubStub:
    """The hub, with Xet."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_XET_CACHE", str(tmp_path / "xet-cache"))
    folder = tmp_path / "cas"
    folder.mkdir()
    hub.cas = Cas(folder)
    return hub


@pytest.fixture
def large(copy: Path) -> Path:
    """A checkpoint with a larger shard that changes: most of it is a tensor that stays."""
    tensors = raw_tensors(copy)
    file = next(file for name, (file, *_) in tensors.items() if name.endswith("in_proj_qkv.weight_scale"))
    in_file = {name: (dtype, shape, data) for name, (at, dtype, shape, data) in tensors.items() if at == file}
    filler = random.Random(0).randbytes(FILLER)
    write_shard(copy / file, {**in_file, "model.filler": ("U8", (FILLER,), filler)})
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    edit_json(copy / "model.safetensors.index.json", weight_map={**index["weight_map"], "model.filler": file})
    return copy


def _know(hub: HubStub, *directories: Path) -> None:
    assert hub.cas is not None
    for directory in directories:
        for path in directory.glob("*.safetensors"):
            hub.cas.know(path)


def test_only_new_chunks_are_sent(xet: HubStub, large: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """To the hub, and from there into a directory again: the same bytes, through the client in both directions."""
    rewrite.convert(large, tmp_path / "local")
    _know(xet, large, tmp_path / "local")
    assert xet.cas is not None
    api = HfApi(endpoint=xet.url)
    api.create_repo("org/model")
    api.upload_folder(repo_id="org/model", folder_path=large)
    before = xet.cas.size
    assert before > FILLER
    capfd.readouterr()
    rewrite.convert(large, "hf://me/fixed")
    assert capfd.readouterr() == ("", "")  # the client's own bars would mix with ours
    grown = xet.cas.size - before
    local = tree(tmp_path / "local")
    assert {n: d for n, d in xet.tree("me/fixed").items() if n != ".gitattributes"} == local
    shards = [name for name in local if name.endswith(".safetensors")]
    changed = sum(len(local[name]) for name in shards if local[name] != (large / name).read_bytes())
    assert changed > FILLER
    assert 0 < grown < changed / 10
    assert not [r for r in xet.requests if r.path.startswith("/blob/")]  # nothing in the older way
    assert rewrite.verify(large, "hf://me/fixed", weights_only=True).ok

    asked = len(xet.requests)
    rewrite.convert("hf://me/fixed", tmp_path / "again")
    assert any("/xet-read-token/" in r.path for r in xet.requests[asked:])
    assert tree(tmp_path / "again") == local
