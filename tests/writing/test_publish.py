"""OUT is absent or complete whatever happens, and the same command finishes the job."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import rewrite
from rewrite import make_plan, open_checkpoint
from rewrite.errors import StorageError, UsageError
from rewrite.writing import exchange, publish
from tests.support import tree
from tests.writing.interruptions import before_call, converter, count_calls, fork, kill_self, leftovers


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """In memory where that can be had: these tests sync thousands of times."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


@pytest.fixture
def undisturbed(text: Path, tmp_path: Path) -> dict[str, bytes]:
    rewrite.convert(text, tmp_path / "undisturbed")
    return tree(tmp_path / "undisturbed")


def test_killed_at_every_system_call(text: Path, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    """SIGKILL before each call that touches the disk: OUT is absent (or whole, at the very end); then resume."""
    calls = count_calls(converter(text, tmp_path / "count"))
    assert calls > 100
    complete = 0
    for number in range(1, calls + 1):
        out = tmp_path / f"out{number}"

        def killed(number: int = number, out: Path = out) -> None:
            with before_call(number, kill_self):
                converter(text, out)()

        assert os.WTERMSIG(fork(killed)) == signal.SIGKILL
        complete += out.exists()
        assert not out.exists() or tree(out) == undisturbed
        if out.exists() and not any((tmp_path / name / "moving").exists() for name in leftovers(out)):
            break  # killed while it took its last traces away: nothing is left to resume
        converter(text, out)()
        assert tree(out) == undisturbed
        assert leftovers(out) == []
        shutil.rmtree(out)
    assert number >= calls - 10
    assert complete < calls / 4, "only the last few calls come after the final rename"


def test_overwrite_killed_at_every_system_call(
    text: Path, vl: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    """The old OUT stays until the new one is complete: at no point is there anything else under its name."""
    calls = count_calls(
        lambda: (shutil.copytree(vl, tmp_path / "count"), converter(text, tmp_path / "count", overwrite=True)())
    )
    old = tree(vl)
    seen = set()
    for number in range(1, calls + 1, 3):
        out = tmp_path / f"out{number}"
        shutil.copytree(vl, out)

        def killed(number: int = number, out: Path = out) -> None:
            with before_call(number, kill_self):
                converter(text, out, overwrite=True)()

        fork(killed)
        found = tree(out)
        assert found in (old, undisturbed)
        seen.add(found == old)
        converter(text, out, overwrite=True)()
        assert tree(out) == undisturbed
        assert leftovers(out) == []
        shutil.rmtree(out)
    assert seen == {True, False}


def test_overwrite_without_exchange_killed_at_every_system_call(
    text: Path, tmp_path: Path, undisturbed: dict[str, bytes], monkeypatch: Any
) -> None:
    """Filesystems without RENAME_EXCHANGE: OUT may be absent for a moment, and the next run puts the old one back."""
    monkeypatch.setattr(exchange, "exchange", lambda *_: False)
    old = {"keep": b"me"}
    absent = 0
    number = 0
    while True:
        number += 1
        out = tmp_path / f"out{number}"
        out.mkdir()
        (out / "keep").write_bytes(b"me")

        def killed(number: int = number, out: Path = out) -> None:
            with before_call(number, kill_self):
                converter(text, out, overwrite=True)()

        if fork(killed) == 0:
            break
        if not out.exists():
            absent += 1
            # Any run repairs it first, also one that then refuses.
            with pytest.raises(StorageError, match="exists"):
                converter(text, out)()
        assert tree(out) in (old, undisturbed)
        converter(text, out, overwrite=True)()
        assert tree(out) == undisturbed
        assert leftovers(out) == []
        shutil.rmtree(out)
    assert absent >= 1


def test_killed_at_random_moments(vl: Path, tmp_path: Path) -> None:
    """With several workers, as a machine that dies would do it."""
    rewrite.convert(vl, tmp_path / "undisturbed")
    expected = tree(tmp_path / "undisturbed")
    started = time.monotonic()
    fork(lambda: rewrite.convert(vl, tmp_path / "timed", workers=4))
    duration = time.monotonic() - started
    chance = random.Random(0)
    for number in range(40):
        out = tmp_path / f"out{number}"
        child = os.fork()
        if child == 0:
            rewrite.convert(vl, out, workers=4)
            os._exit(0)
        time.sleep(chance.random() * duration)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert not out.exists() or tree(out) == expected
        if not out.exists():
            rewrite.convert(vl, out, workers=4)
        assert tree(out) == expected
        shutil.rmtree(out)


def test_resume_keeps_complete_shards(vl: Path, tmp_path: Path) -> None:
    """What an earlier run completed is not written again."""
    out = tmp_path / "out"

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rewrite.convert(vl, out, workers=1, progress=stop)
    (staging,) = [path for path in tmp_path.iterdir() if path.name.startswith(".out.rewrite-")]
    kept = {path.name: path.stat().st_ino for path in (staging / "out").iterdir()}
    assert kept
    rewrite.convert(vl, out)
    assert all((out / name).stat().st_ino == inode for name, inode in kept.items())
    assert leftovers(out) == []


def test_staging_of_another_plan_is_never_mixed_in(text: Path, vl: Path, tmp_path: Path) -> None:
    """It has another digest, and goes when the conversion is done."""
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        rewrite.convert(vl, out, workers=1, progress=lambda done, total: interrupt(done > total // 2))
    assert leftovers(out)
    rewrite.convert(text, out)
    rewrite.convert(text, tmp_path / "reference")
    assert tree(out) == tree(tmp_path / "reference")
    assert leftovers(out) == []


def interrupt(now: bool) -> None:
    if now:
        raise KeyboardInterrupt


def test_the_second_converter_on_one_output_says_so(text: Path, tmp_path: Path) -> None:
    """And stops, without touching what the first one does."""
    out = tmp_path / "out"
    errors: list[StorageError] = []

    def second(done: int, total: int) -> None:
        if not errors:
            with pytest.raises(StorageError, match="Another conversion") as caught:
                rewrite.convert(text, out)
            errors.append(caught.value)

    assert rewrite.convert(text, out, workers=1, progress=second).changed
    assert errors[0].exit_code == 4
    assert leftovers(out) == []


def test_a_lock_file_that_nobody_holds_is_taken_over(text: Path, tmp_path: Path) -> None:
    """A killed converter leaves it behind."""
    (tmp_path / ".out.rewrite-lock").touch()
    rewrite.convert(text, tmp_path / "out")
    assert leftovers(tmp_path / "out") == []


def test_the_lock_is_a_real_one(text: Path, tmp_path: Path) -> None:
    """Held by another process, by flock."""
    with (tmp_path / ".out.rewrite-lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(StorageError, match="Another conversion"):
            rewrite.convert(text, tmp_path / "out")


@pytest.mark.parametrize("kind", ["directory", "empty directory", "file", "dangling symlink"])
def test_an_existing_output_is_refused_before_anything_is_written(kind: str, text: Path, tmp_path: Path) -> None:
    """Whatever it is."""
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "dangling symlink":
        out.symlink_to("gone")
    else:
        out.mkdir()
        if kind == "directory":
            (out / "mine").touch()
    before = tree(tmp_path)
    with pytest.raises(StorageError, match="exists"):
        rewrite.convert(text, out)
    assert tree(tmp_path) == before
    assert leftovers(out) == []


def test_overwrite_replaces_directories_only(text: Path, tmp_path: Path) -> None:
    """A file in the way is somebody's mistake."""
    (tmp_path / "out").write_text("mine")
    with pytest.raises(StorageError, match="exists"):
        rewrite.convert(text, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").read_text() == "mine"


def test_overwrite_swaps_at_the_end(text: Path, tmp_path: Path) -> None:
    """Until the last byte the old output stands."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    rewrite.convert(text, out, overwrite=True, progress=lambda *_: (out / "old").read_text())
    rewrite.convert(text, tmp_path / "reference")
    assert tree(out) == tree(tmp_path / "reference")
    assert leftovers(out) == []


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("where", ["", "sub", "sub/deep", "..", "link"])
def test_source_and_output_must_lie_apart(where: str, overwrite: bool, copy: Path, tmp_path: Path) -> None:
    """The same, one inside the other, or through a link: an overwrite would remove the source."""
    (tmp_path / "link").symlink_to(copy)
    out = tmp_path / "link" if where == "link" else copy / where
    before = tree(copy)
    with pytest.raises(UsageError, match="overlap"):
        rewrite.convert(copy, out, overwrite=overwrite)
    assert tree(copy) == before


def test_not_enough_space_is_refused_before_the_first_byte(text: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """With the two numbers."""
    real = os.statvfs(tmp_path)

    class Full:
        f_bavail, f_frsize = 10, real.f_frsize

    monkeypatch.setattr(os, "statvfs", lambda _: Full)
    with pytest.raises(StorageError, match="free space") as caught:
        rewrite.convert(text, tmp_path / "out")
    assert caught.value.found == f"{10 * real.f_frsize} bytes free"
    assert not (tmp_path / "out").exists()


def test_shared_blocks_need_no_space(text: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Where too little is free, what a trial shows can be shared is not counted; with copy, everything is."""
    plan = make_plan(open_checkpoint(text))
    jobs = sum(job.size for job in plan.jobs)
    assert 0 < plan.shareable < jobs

    class Full:
        f_bavail, f_frsize = jobs - plan.shareable, 1

    monkeypatch.setattr(os, "statvfs", lambda _: Full)
    with pytest.raises(StorageError, match="free space"):
        rewrite.convert(text, tmp_path / "out")
    monkeypatch.setattr(publish, "can_clone", lambda *_: True)
    with pytest.raises(StorageError, match="free space"):
        rewrite.convert(text, tmp_path / "out", copy=True)
    rewrite.convert(text, tmp_path / "out")
    Full.f_bavail -= 1
    with pytest.raises(StorageError, match="free space"):
        rewrite.convert(text, tmp_path / "out2")


def test_a_real_copy_does_not_resume_what_may_share_blocks(vl: Path, tmp_path: Path) -> None:
    """An interrupted run without --copy left complete files: they are not taken over, and go."""
    out = tmp_path / "out"
    for copy, kept in ((True, 0), (False, 1)):
        with pytest.raises(KeyboardInterrupt):
            rewrite.convert(vl, out, workers=1, progress=lambda done, total: interrupt(done > total // 2))
        counts = rewrite.convert(vl, out, copy=copy).counts
        assert counts is not None and (counts.kept > 0) == kept
        assert sum(len(data) for data in tree(out).values()) == sum(vars(counts).values())
        assert leftovers(out) == []
        shutil.rmtree(out)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_fault_at_any_system_call_is_reported_and_the_next_run_succeeds(
    code: int, text: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    """A full or broken disk at any stage: a StorageError, OUT absent or complete."""

    def fail() -> None:
        raise OSError(code, os.strerror(code))

    calls = count_calls(converter(text, tmp_path / "count"))
    raised = 0
    for number in range(1, calls + 1, 3):
        out = tmp_path / f"out{number}"
        with before_call(number, fail):
            try:
                converter(text, out)()
            except StorageError as error:
                raised += 1
                assert f"errno {code}" in str(error)
        if out.exists():
            assert tree(out) == undisturbed
            for name in leftovers(out):
                path = out.parent / name
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        else:
            converter(text, out)()
        assert tree(out) == undisturbed
        shutil.rmtree(out)
    assert raised > calls / 6


def test_a_missing_parent_is_made(text: Path, tmp_path: Path) -> None:
    """As many folders as it takes; not where something else has the name."""
    rewrite.convert(text, tmp_path / "new" / "folder" / "out")
    assert (tmp_path / "new" / "folder" / "out" / "config.json").is_file()
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=re.escape(str(tmp_path / "file"))):
        rewrite.convert(text, tmp_path / "file" / "out")


def test_folders_of_tools_are_left_out(copy: Path, tmp_path: Path) -> None:
    """As the hub's client leaves them out when it uploads; a note says so."""
    for folder in (".git/objects", ".cache/huggingface/download", "sub/.git"):
        (copy / folder).mkdir(parents=True)
        (copy / folder / "x").touch()
    (copy / ".git" / "link").symlink_to("gone")
    (copy / ".cache" / "other").touch()
    manifest = rewrite.convert(copy, tmp_path / "out")
    left_out = [note.split()[0] for note in manifest.notes if "is left out" in note]
    assert left_out == [".cache/huggingface", ".git", "sub/.git"]
    assert not (tmp_path / "out" / ".git").exists() and (tmp_path / "out" / ".cache" / "other").exists()
    assert rewrite.verify(copy, tmp_path / "out", device="cpu").ok


def test_everything_is_synced_before_it_is_renamed(text: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Files before they get their name, staging directories before OUT gets its, the parent last."""
    log: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def logged_fsync(fd: int) -> None:
        log.append(("sync", str(Path(f"/proc/self/fd/{fd}").readlink())))
        fsync(fd)

    def logged_rename(old: Any, new: Any) -> None:
        log.append(("rename", f"{old} {new}"))
        rename(old, new)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "rename", logged_rename)
    out = tmp_path / "out"
    rewrite.convert(text, out, workers=1)
    files = [i for i, (what, path) in enumerate(log) if what == "rename" and "/part-" in path.split()[0]]
    assert len(files) == len(tree(out))
    for i in files:
        assert log[i - 1] == ("sync", log[i][1].split()[0])
    (last,) = [i for i, (what, path) in enumerate(log) if what == "rename" and path.endswith(f" {out}")]
    staged = log[last][1].split()[0]
    assert ("sync", staged) in log[max(files) : last]
    assert log[last + 1] == ("sync", str(tmp_path))


def test_publishing_a_plan_that_went_through_json(text: Path, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    """Any executor can run it: the plan alone and the source are enough."""
    plan = rewrite.Plan.from_json(make_plan(open_checkpoint(text)).to_json())
    rewrite.publish_plan(plan, text, tmp_path / "out")
    assert tree(tmp_path / "out") == undisturbed
