"""A thousand shards behind a network: memory, file descriptors and requests stay small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers.hub import HubStub
from tests.servers.s3 import S3Stub
from tests.support import ROOT, tree
from tests.test_hostile import large

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
SHARDS = 1000
SCRIPT = """
import json, os, resource, sys, threading, time
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
import rewrite
peak = lambda: int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1]) // 1024
before, most, done = peak(), 0, False
def watch():
    global most
    while not done:
        most = max(most, len(os.listdir('/proc/self/fd')))
        time.sleep(0.01)
threading.Thread(target=watch, daemon=True).start()
conversion = rewrite.plan_conversion(sys.argv[1], sys.argv[2])
if sys.argv[3] == 'convert':
    conversion.publish(4)
done = True
print(json.dumps([peak() - before, most]))
"""


def measured(source: str, out: str, what: str, **variables: str) -> tuple[int, int]:
    """MB beyond what the imports take, and the most file descriptors at a time, in a process of its own."""
    environment = {**os.environ, **variables, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, source, out, what], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    memory, descriptors = json.loads(done.stdout)
    print(f"{source}: {memory} MB, {descriptors} file descriptors")
    return memory, descriptors


def test_on_the_hub(hub: HubStub, tmp_path: Path) -> None:
    """Planned with one request a shard and a few more."""
    large(tmp_path / "in", SHARDS, 20)
    hub.add("org/large", tmp_path / "in")
    memory, descriptors = measured(
        "hf://org/large", str(tmp_path / "out"), "plan", HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0",
        HF_HUB_DISABLE_XET="1", HF_HUB_CACHE=str(tmp_path / "cache"), HF_TOKEN_PATH=str(tmp_path / "none"),
    )  # fmt: skip
    assert memory < 200
    assert descriptors < 64
    assert SHARDS < len(hub.requests) < 1.2 * SHARDS


@pytest.mark.parametrize(("what", "shards", "requests"), [("plan", SHARDS, 1.2), ("convert", 100, 15)])
def test_in_a_bucket(s3: S3Stub, tmp_path: Path, what: str, shards: int, requests: float) -> None:
    """Planned with one request a shard and a few more; converted within the store with some for each."""
    large(tmp_path / "in", shards, 6)
    client = s3.behind
    for name, data in tree(tmp_path / "in").items():
        client.put_object(Bucket="models", Key=f"in/{name}", Body=data)
    memory, descriptors = measured("s3://models/in", "s3://models/out", what)
    assert memory < 200
    assert descriptors < 128
    print(f"{len(s3.requests)} requests")
    assert len(s3.requests) < requests * shards
    if what == "convert":
        keys = [entry["Key"] for entry in client.list_objects_v2(Bucket="models", Prefix="out")["Contents"]]
        assert len([key for key in keys if key.endswith(".safetensors")]) == shards
        assert "out.rewrite-complete" in keys
