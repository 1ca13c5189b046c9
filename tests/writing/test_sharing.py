"""On real filesystems that share blocks, XFS and Btrfs, in images on loop devices: for this one must be root."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import rewrite
from rewrite import make_plan, open_checkpoint
from rewrite.checkpoint.header import read_header
from rewrite.checkpoint.local import open_regular
from rewrite.errors import StorageError
from tests.support import replace_tensor, tree
from tests.writing.interruptions import before_call, converter, count_calls, fork, kill_self, leftovers

pytestmark = [pytest.mark.slow, pytest.mark.filesystems]
WEIGHT = "model.layers.0.mlp.up_proj.weight"
WEIGHT_SIZE = 8 << 20


@pytest.fixture(scope="module", params=["xfs", "btrfs"])
def disk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty filesystem, unmounted and gone afterwards."""
    tool = shutil.which(f"mkfs.{request.param}", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if os.geteuid() != 0 or tool is None:
        pytest.skip(f"mounting {request.param} takes root and mkfs.{request.param}")
    directory = tmp_path_factory.mktemp(request.param)
    image, mount = directory / "image", directory / "mount"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(400 << 20)  # mkfs.xfs makes nothing below 300 MB
    subprocess.run([tool, "-q", image], check=True, capture_output=True)
    mounted = subprocess.run(["mount", "-o", "loop", image, mount], check=False, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no loop devices or no {request.param} here: {mounted.stderr.strip()}")
    try:
        yield mount
    finally:
        subprocess.run(["umount", mount], check=True)  # the loop device goes with it
        image.unlink()


@pytest.fixture
def source(disk: Path, text: Path) -> Iterator[Path]:
    """A checkpoint with one weight of 8 MB, on a disk that has nothing else."""
    path = Path(shutil.copytree(text, disk / "source"))
    replace_tensor(path, WEIGHT, os.urandom(WEIGHT_SIZE).replace(b"\x7f", b"\0").replace(b"\xff", b"\0"), (1024, 8192))
    yield path
    for left in disk.iterdir():
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def used(disk: Path) -> int:
    """Bytes in use once everything is on disk. Deferred work is waited for: a second sync commits it."""
    for _ in range(2):
        subprocess.run(["sync", "-f", disk], check=True)
    status = os.statvfs(disk)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def test_blocks_are_shared_and_the_bytes_are_those_of_a_copy(source: Path, disk: Path, tmp_path: Path) -> None:
    """As many as the plan says, 99 % of the shard with the large weight; a copy, and another disk, give the same."""
    plan = make_plan(open_checkpoint(source))
    before = used(disk)
    counts = rewrite.convert(source, disk / "out").counts
    cloned = used(disk)
    assert counts is not None and counts.shared == plan.shareable
    assert cloned - before < WEIGHT_SIZE / 4
    (shard,) = [shard for shard in plan.shards if shard.size > WEIGHT_SIZE]
    assert shard.shareable >= 0.99 * shard.size

    counts = rewrite.convert(source, disk / "copy", copy=True).counts
    assert counts is not None and counts.shared == 0
    assert used(disk) - cloned >= plan.shareable
    rewrite.convert(source, tmp_path / "elsewhere")
    assert tree(disk / "out") == tree(disk / "copy") == tree(tmp_path / "elsewhere")


def test_a_checkpoint_with_nothing_to_do_is_shared_whole(source: Path, disk: Path) -> None:
    """Every byte of every file."""
    rewrite.convert(source, disk / "once")
    before = used(disk)
    counts = rewrite.convert(disk / "once", disk / "twice").counts
    assert counts is not None and counts.shared == sum(len(data) for data in tree(disk / "twice").values())
    assert used(disk) - before < WEIGHT_SIZE / 4
    assert tree(disk / "once") == tree(disk / "twice")


def test_source_and_output_are_independent(source: Path, disk: Path) -> None:
    """A change of one side, in the middle of shared blocks, does not show on the other."""
    out = disk / "out"
    rewrite.convert(source, out)
    before, after = tree(source), tree(out)
    shard = open_checkpoint(source).tensors[WEIGHT].shard
    _change(out / shard)
    assert tree(source) == before
    out_changed = tree(out)
    assert {name for name in after if out_changed[name] != after[name]} == {shard}
    _change(source / shard)
    assert tree(out) == out_changed
    shutil.rmtree(source)
    subprocess.run(["sync", "-f", disk], check=True)
    assert tree(out) == out_changed


def _change(path: Path) -> None:
    with open_regular(path) as opened:
        header = read_header(opened, path.name)
    with path.open("r+b") as file:
        weight = next(t for t in header.tensors if t.name == WEIGHT)
        os.pwrite(file.fileno(), b"changed", path.stat().st_size - (weight.nbytes // 2))
        os.fsync(file.fileno())


def test_a_disk_without_room_for_a_copy_has_room_to_share(source: Path, disk: Path, monkeypatch: Any) -> None:
    """If 4 MB are said to be free a conversion of 8 MB is done, after a trial on the disk; a real copy is refused."""

    class Full:
        f_bavail, f_frsize = 1024, 4096

    monkeypatch.setattr(os, "statvfs", lambda _: Full)
    with pytest.raises(StorageError, match="free space"):
        rewrite.convert(source, disk / "out", copy=True)
    assert not (disk / "out").exists()
    assert rewrite.convert(source, disk / "out").changed


def test_killed_while_sharing(source: Path, disk: Path) -> None:
    """SIGKILL before every eleventh call that touches the disk, clones among them; then resume."""
    rewrite.convert(source, disk / "undisturbed")
    expected = tree(disk / "undisturbed")
    calls = count_calls(converter(source, disk / "count"))
    for number in range(1, calls, 11):
        out = disk / f"out{number}"

        def killed(number: int = number, out: Path = out) -> None:
            with before_call(number, kill_self):
                converter(source, out)()

        assert os.WTERMSIG(fork(killed)) == signal.SIGKILL
        if not out.exists():
            converter(source, out)()
            assert leftovers(out) == []
        assert tree(out) == expected
        shutil.rmtree(out)
