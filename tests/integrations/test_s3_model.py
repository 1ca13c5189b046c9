"""A bucket where anything happens in any order, beside a model of it: never lost, never lied.

Conversions of two plans, their parts and last steps run; the store fails from some request on; somebody else writes
objects, begins uploads, deletes. Whatever came before: what is said to be complete is exactly what a local conversion
gives, no object of a stranger is part of it or gone, and once the place is free of them the same command completes it.
"""

from __future__ import annotations

import shutil
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

import rewrite
from rewrite import Conversion
from rewrite.errors import RewriteError
from rewrite.integrations import s3 as s3_module
from rewrite.integrations import s3_parts
from tests.integrations.test_s3 import _dead_from, download, exists, upload
from tests.servers.http import Fault
from tests.servers.s3 import S3Stub
from tests.support import in_one_shard, tree

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
PROFILES = st.sampled_from(["exact", "portable"])
NUMBERS = st.integers(0, 60)
STRANGE = ("theirs.txt", "model-extra.safetensors", "sub/x y+é.txt")


@pytest.mark.slow
def test_whatever_happens(s3: S3Stub, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every completed output the bytes are compared with those of a local conversion."""
    monkeypatch.setattr(s3_parts, "_COPIED", 1 << 20)  # few parts
    source = in_one_shard(text, tmp_path / "one")
    upload(source, "in")
    (tmp_path / "in").symlink_to(source)
    expected: dict[str, dict[str, bytes]] = {}
    for profile in ("exact", "portable"):
        rewrite.convert(tmp_path / "in", tmp_path / "local", profile=profile)
        expected[profile] = tree(tmp_path / "local")
        shutil.rmtree(tmp_path / "local")
    assert expected["exact"] != expected["portable"]
    numbers, finished = count(), [0]

    class Bucket(RuleBasedStateMachine):
        """``strange`` and ``uploads``: what somebody else has put there."""

        @initialize(versions=st.booleans(), odd=st.booleans())
        def begin(self, versions: bool, odd: bool) -> None:
            self.client = s3_module._client()
            status = "Enabled" if versions else "Suspended"
            self.client.put_bucket_versioning(Bucket="models", VersioningConfiguration={"Status": status})
            self.prefix = f"{'o ut+%é/' if odd else 'out'}{next(numbers)}"
            self.client.put_object(Bucket="models", Key=f"{self.prefix}2/config.json", Body=b"sibling")
            self.strange: dict[str, bytes] = {}
            self.uploads: dict[str, str] = {}  # key by id

        def plan(self, profile: str) -> Conversion:
            return rewrite.plan_conversion("s3://models/in", f"s3://models/{self.prefix}", profile=profile)

        @rule(profile=PROFILES, dies=st.none() | NUMBERS, after=st.booleans())
        def convert(self, profile: str, dies: int | None, after: bool) -> None:
            """All at once; the store may die, before or after it has carried a request out."""
            if dies is not None:
                fault = Fault("drop") if after else Fault("status", 503)
                s3.misbehave = _dead_from(len(s3.requests) + dies, fault)
            try:
                self.plan(profile).publish(1)
            except RewriteError:
                s3.misbehave = lambda request: None
                return
            s3.misbehave = lambda request: None
            self.completed(profile)

        @rule(profile=PROFILES, number=st.integers(0, 1))
        def part(self, profile: str, number: int) -> None:
            try:
                self.plan(profile).run_part(number, 2, 1)
            except RewriteError:
                return

        @rule(profile=PROFILES)
        def finish(self, profile: str) -> None:
            try:
                self.plan(profile).finish()
            except RewriteError:
                return
            self.completed(profile)

        def completed(self, profile: str) -> None:
            finished[0] += 1
            assert download(self.prefix) == expected[profile]
            assert exists(f"{self.prefix}.rewrite-complete")
            assert not exists(f"{self.prefix}.rewrite-started")
            assert not self.strange

        @rule(name=st.sampled_from(STRANGE))
        def strange_object(self, name: str) -> None:
            self.client.put_object(Bucket="models", Key=f"{self.prefix}/{name}", Body=b"theirs")
            self.strange[name] = b"theirs"

        @rule(profile=PROFILES, data=st.data(), before=st.booleans())
        def same_name_and_size(self, profile: str, data: st.DataObject, before: bool) -> None:
            """In the place of one of our files, perhaps after the parts that write it, and before the last step."""
            conversion = self.plan(profile)
            name = data.draw(st.sampled_from(sorted(job.name for job in conversion.plan.jobs)))
            if before:
                self.strangers_leave()
                self.start_anew(True)
                self.part(profile, 0)
                self.part(profile, 1)
            body = b"\xee" * len(expected[profile][name])
            self.client.put_object(Bucket="models", Key=f"{self.prefix}/{name}", Body=body)
            if before:
                self.finish(profile)

        @rule()
        def strange_upload(self) -> None:
            key = f"{self.prefix}/model.safetensors"
            begun = self.client.create_multipart_upload(Bucket="models", Key=key)["UploadId"]
            self.client.upload_part(Bucket="models", Key=key, UploadId=begun, PartNumber=1, Body=b"\xee" * 5000)
            self.uploads[begun] = key

        @rule()
        def strangers_leave(self) -> None:
            for name in self.strange:
                self.client.delete_object(Bucket="models", Key=f"{self.prefix}/{name}")
            for begun, key in self.uploads.items():
                self.client.abort_multipart_upload(Bucket="models", Key=key, UploadId=begun)
            self.strange, self.uploads = {}, {}

        @rule(started=st.booleans())
        def start_anew(self, started: bool) -> None:
            """As the message says: delete the objects, and the one that names the plan."""
            for name in download(self.prefix):
                self.client.delete_object(Bucket="models", Key=f"{self.prefix}/{name}")
            if started:
                self.client.delete_object(Bucket="models", Key=f"{self.prefix}.rewrite-started")
            self.strange.clear()

        @invariant()
        def strangers_are_left_alone(self) -> None:
            if not hasattr(self, "strange"):
                return
            found = download(self.prefix)
            assert {name: found.get(name) for name in self.strange} == self.strange
            sibling = self.client.get_object(Bucket="models", Key=f"{self.prefix}2/config.json")["Body"].read()
            assert sibling == b"sibling"
            pending = self.client.list_multipart_uploads(Bucket="models").get("Uploads", [])
            assert self.uploads.keys() <= {each["UploadId"] for each in pending}

        def teardown(self) -> None:
            """Once nobody disturbs, the same command completes it."""
            if not hasattr(self, "strange"):
                return
            self.strangers_leave()
            self.start_anew(True)
            self.plan("exact").publish(1)
            self.completed("exact")
            assert not [each for each in self.pending() if each["Key"].startswith(f"{self.prefix}/")]

        def pending(self) -> list[dict[str, Any]]:
            return list(self.client.list_multipart_uploads(Bucket="models").get("Uploads", []))

    run_state_machine_as_test(
        Bucket,
        settings=settings(
            max_examples=12,
            stateful_step_count=10,
            deadline=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert finished[0] >= 12
