"""Disks that fill, sources that change, power that fails: OUT is absent or complete, and the next run succeeds."""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import rewrite
from rewrite import make_plan, open_checkpoint
from rewrite.checkpoint.checkpoint import CONFIG_NAME, INDEX_NAME
from rewrite.errors import StorageError
from rewrite.writing import exchange, publish
from tests import crafted_cases as cases
from tests.support import ROOT, tree
from tests.writing.interruptions import before_call, converter, fork, kill_self, leftovers


@pytest.fixture
def source(tmp_path: Path) -> Path:
    cases.write(cases.sound(), tmp_path / "in")
    return tmp_path / "in"


@pytest.fixture
def expected(source: Path, tmp_path: Path) -> dict[str, bytes]:
    rewrite.convert(source, tmp_path / "undisturbed")
    return tree(tmp_path / "undisturbed")


def test_a_source_that_cannot_be_read_is_named(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file, not that of OUT: somebody has to look at the right disk."""

    def broken(fd: int, length: int, start: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    plan = rewrite.plan_conversion(source, tmp_path / "out", copy=True)
    shard = next(name for name in tree(source) if name.endswith(".safetensors"))
    monkeypatch.setattr(os, "copy_file_range", lambda *_: (_ for _ in ()).throw(OSError(errno.EXDEV, "")))
    monkeypatch.setattr(os, "pread", broken)
    with pytest.raises(StorageError) as caught:
        plan.publish(1)
    assert caught.value.where == str(source / shard) and f"errno {errno.EIO}" in str(caught.value)
    assert not (tmp_path / "out").exists()


# --- real disks


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of its own in memory, which :func:`remount` makes small or read-only."""
    path = tmp_path / "disk"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "none", path], capture_output=True, check=False).returncode:
        pytest.skip("mounting a filesystem needs root")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def remount(path: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", path], check=True)


@pytest.mark.filesystems
@pytest.mark.parametrize("option", ["size={}k", "nr_inodes={}"])
def test_a_disk_that_is_full_at_any_stage(
    option: str, source: Path, disk: Path, expected: dict[str, bytes], monkeypatch: Any
) -> None:
    """Filled by somebody else after we had looked: ENOSPC wherever it strikes, then space is made and it goes on."""
    monkeypatch.setattr(publish.DirectoryOutput, "check_room", lambda *_: None)
    before, out, failed, room = tree(source), disk / "out", 0, 1
    while True:
        remount(disk, "size=1m,nr_inodes=100")
        remount(disk, option.format(4 * room if "size" in option else room + 2))
        try:
            rewrite.convert(source, out, workers=1)
        except StorageError as error:
            assert f"errno {errno.ENOSPC}" in str(error)
        else:
            break
        failed += 1
        assert not out.exists()
        remount(disk, "size=1m,nr_inodes=100")
        rewrite.convert(source, out)
        assert tree(out) == expected
        assert leftovers(out) == []
        shutil.rmtree(out)
        room += 1
    assert failed >= len(expected) - 1, "once for each file that no longer fits"
    assert tree(source) == before


@pytest.mark.filesystems
def test_a_disk_that_is_too_small_is_refused_at_once(text: Path, disk: Path) -> None:
    """By the numbers, before the first byte."""
    remount(disk, "size=64k")
    with pytest.raises(StorageError, match="free space"):
        rewrite.convert(text, disk / "out")
    assert not (disk / "out").exists()


@pytest.mark.filesystems
def test_a_read_only_disk(source: Path, disk: Path, expected: dict[str, bytes]) -> None:
    """Said with its errno; once it can be written to, it works."""
    remount(disk, "ro")
    with pytest.raises(StorageError, match=f"errno {errno.EROFS}"):
        rewrite.convert(source, disk / "out")
    remount(disk, "rw")
    rewrite.convert(source, disk / "out")
    assert tree(disk / "out") == expected


def test_a_parent_that_vanishes(source: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    """Renamed away in the middle: an error, nothing under either name; the next run succeeds."""
    parent, away = tmp_path / "parent", tmp_path / "away"
    parent.mkdir()
    with pytest.raises(StorageError, match=f"errno {errno.ENOENT}"):
        rewrite.convert(source, parent / "out", workers=1, progress=lambda *_: parent.exists() and parent.rename(away))
    assert not parent.exists() and not (away / "out").exists()
    away.rename(parent)
    rewrite.convert(source, parent / "out")
    assert tree(parent / "out") == expected
    assert leftovers(parent / "out") == []


def test_short_writes_everywhere(source: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: Any) -> None:
    """One byte at a time makes the same files."""
    pwrite, copy = os.pwrite, os.copy_file_range
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, bytes(data)[:1], at))
    monkeypatch.setattr(os, "copy_file_range", lambda a, b, count, *at: copy(a, b, min(count, 1), *at))
    rewrite.convert(source, tmp_path / "out")
    assert tree(tmp_path / "out") == expected


# --- a source that changes


def touch(path: Path) -> None:
    os.utime(path, ns=(0, 0))


def add_directory(source: Path) -> None:
    (source / "sub").mkdir()
    (source / "sub" / "x").touch()


CHANGES: dict[str, Callable[[Path], object]] = {
    "config edited": lambda source: (source / CONFIG_NAME).write_bytes(cases.sound()[CONFIG_NAME] + b" "),
    "config touched": lambda source: touch(source / CONFIG_NAME),
    "config gone": lambda source: (source / CONFIG_NAME).unlink(),
    "index edited": lambda source: (source / INDEX_NAME).write_bytes(cases.sound()[INDEX_NAME] + b" "),
    "index gone": lambda source: (source / INDEX_NAME).unlink(),
    "shard touched": lambda source: touch(source / cases.SHARDS[0]),
    "shard header replaced": lambda source: (source / cases.SHARDS[1]).write_bytes(cases.shard({})),
    "shard gone": lambda source: (source / cases.SHARDS[1]).unlink(),
    "other file appended": lambda source: (source / "tokenizer.json").write_bytes(b"{} "),
    "other file gone": lambda source: (source / "tokenizer.json").unlink(),
    "file came": lambda source: (source / "chat_template.jinja").write_bytes(b"x"),
    "file came into a new directory": add_directory,
    "device came": lambda source: (source / "x").symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("moment", ["planned", "copied"])
@pytest.mark.parametrize("case", CHANGES)
def test_a_source_that_changes_is_never_published(case: str, moment: str, source: Path, tmp_path: Path) -> None:
    """After it was planned on, or at the very end when everything is copied: refused; the next run succeeds."""
    plan, out = make_plan(open_checkpoint(source)), tmp_path / "out"

    def change(done: int, _total: int) -> None:
        if done == (0 if moment == "planned" else sum(job.size for job in plan.jobs)):
            CHANGES[case](source)

    change(0, 0)
    with pytest.raises(rewrite.RewriteError) as caught:
        rewrite.publish_plan(plan, source, out, workers=1, progress=change)
    assert caught.value.exit_code in (3, 4)
    assert str(source) in str(caught.value.where)
    assert not out.exists()
    shutil.rmtree(source)
    cases.write(cases.sound(), source)
    rewrite.convert(source, out)
    assert leftovers(out) == []


# --- others at work


def test_many_processes_at_once(text: Path, tmp_path: Path) -> None:
    """One of them converts, the others say why they do not; with --overwrite, one after the other may."""
    rewrite.convert(text, tmp_path / "undisturbed")
    out = tmp_path / "out"
    for options, codes in (([], {0, 4}), (["--overwrite"], {0, 4})):
        command = [sys.executable, "-m", "rewrite", "convert", str(text), str(out), "--profile=exact", *options]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        children = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) for _ in range(4)]
        ends = [(child.communicate(timeout=60)[1], child.returncode) for child in children]
        assert {code for _, code in ends} <= codes
        assert 0 in {code for _, code in ends}
        for message, code in ends:
            assert code == 0 or re.search(r"Another conversion|The output exists", message)
        assert tree(out) == tree(tmp_path / "undisturbed")
        assert leftovers(out) == []


def test_what_other_versions_and_killed_runs_left(source: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    """Staging of another plan goes; part files of this plan, of any length, are begun anew."""
    out = tmp_path / "out"
    other = tmp_path / ".out.rewrite-0123456789abcdef"
    (other / "out").mkdir(parents=True)
    (other / "out" / CONFIG_NAME).write_text("{}")
    own = tmp_path / f".out.rewrite-{make_plan(open_checkpoint(source)).digest[:16]}"
    own.mkdir()
    for number in range(5):
        (own / f"part-{number}").write_bytes(b"stale" * 10_000)
    (tmp_path / ".out.rewrite-notes").mkdir()  # not ours by its name
    rewrite.convert(source, out)
    assert tree(out) == expected
    assert leftovers(out) == [".out.rewrite-notes"]


# --- power loss

#: A name in a directory, both as inode and string.
Entry = tuple[int, str]


@dataclass
class Step:
    """One change: names that it sets (None: removes), or data of an inode; made durable by a sync of ``home``."""

    home: int
    names: dict[Entry, int | None] = field(default_factory=dict)
    sync: bool = False


@dataclass
class Disk:
    """What was asked of the disk, in order, and what was on it before."""

    top: int
    names: dict[Entry, int]
    kinds: dict[int, str]
    steps: list[Step] = field(default_factory=list)

    def crash(self, at: int, chance: random.Random | None) -> tuple[dict[Entry, int], set[int]]:
        """Names and inodes with lost data after a power loss before step ``at``.

        What was synced is there. Of the rest ``chance`` decides for each change by itself; without it nothing is kept
        but the appearance of OUT, the worst case for its completeness.
        """
        names: dict[Entry, int | None] = dict(self.names)
        lost: set[int] = set()
        for number, step in enumerate(self.steps[:at]):
            if step.sync:
                continue
            durable = any(later.sync and later.home == step.home for later in self.steps[number + 1 : at])
            kept = durable or (chance.random() < 0.5 if chance else (self.top, "out") in step.names)
            if step.names and kept:
                names.update(step.names)
            elif not step.names and not durable and not (chance and kept):
                lost.add(step.home)
        return {entry: inode for entry, inode in names.items() if inode is not None}, lost

    def listing(self, names: dict[Entry, int], inode: int) -> dict[str, int]:
        return {name: child for (parent, name), child in names.items() if parent == inode}


@contextmanager
def recorded(top: Path) -> Iterator[Disk]:  # noqa: PLR0915 - a wrapper for each system call
    """Everything that is asked of the disk below ``top`` in the block."""
    names: dict[Entry, int] = {}
    kinds: dict[int, str] = {}
    for path in [top, *top.rglob("*")]:
        status = path.stat()
        kinds[status.st_ino] = "directory" if path.is_dir() else "file"
        if path != top:
            names[path.parent.stat().st_ino, path.name] = status.st_ino
    disk = Disk(top.stat().st_ino, names, kinds)
    real = {
        name: getattr(os, name)
        for name in ("open", "pwrite", "copy_file_range", "fsync", "mkdir", "rename", "unlink", "rmdir")
    }
    real_exchange = exchange.exchange

    def place(path: Any, dir_fd: int | None = None) -> Entry:
        full = Path(f"/proc/self/fd/{dir_fd}").readlink() / path if dir_fd is not None else Path(path)
        return full.parent.stat().st_ino, full.name

    def step(home: int, changed: dict[Entry, int | None] | None = None, *, sync: bool = False) -> None:
        disk.steps.append(Step(home, changed or {}, sync))

    def open_(path: Any, flags: int, *args: Any, **options: Any) -> int:
        fresh = bool(flags & os.O_CREAT) and not os.path.lexists(path)
        fd: int = real["open"](path, flags, *args, **options)
        if fresh:
            disk.kinds[os.fstat(fd).st_ino] = "file"
            step(place(path)[0], {place(path): os.fstat(fd).st_ino})
        return fd

    def write(name: str, position: int) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            step(os.fstat(args[position]).st_ino)
            return real[name](*args)

        return call

    def fsync(fd: int) -> None:
        real["fsync"](fd)
        step(os.fstat(fd).st_ino, sync=True)

    def mkdir(path: Any, *args: Any, **options: Any) -> None:
        real["mkdir"](path, *args, **options)
        disk.kinds[Path(path).stat().st_ino] = "directory"
        step(place(path)[0], {place(path): Path(path).stat().st_ino})

    def rename(old: Any, new: Any) -> None:
        source, inode = place(old), Path(old).stat().st_ino
        real["rename"](old, new)
        step(place(new)[0], {source: None, place(new): inode})

    def exchange_(one: Path, other: Path) -> bool:
        if not real_exchange(one, other):
            return False
        step(place(other)[0], {place(one): one.stat().st_ino, place(other): other.stat().st_ino})
        return True

    def remove(name: str) -> Callable[..., Any]:
        def call(path: Any, *, dir_fd: int | None = None) -> Any:
            entry = place(path, dir_fd)
            result = real[name](path, dir_fd=dir_fd)
            step(entry[0], {entry: None})
            return result

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", open_)
        patch.setattr(os, "pwrite", write("pwrite", 0))
        patch.setattr(os, "copy_file_range", write("copy_file_range", 1))
        patch.setattr(os, "fsync", fsync)
        patch.setattr(os, "mkdir", mkdir)
        patch.setattr(os, "rename", rename)
        patch.setattr(os, "unlink", remove("unlink"))
        patch.setattr(os, "rmdir", remove("rmdir"))
        patch.setattr(exchange, "exchange", exchange_)
        yield disk


def counterexample(disk: Disk, new: set[str], old: tuple[int, set[str]] | None) -> str | None:
    """How a power loss could do harm; None where it cannot.

    ``new`` is what OUT must hold; ``old`` the inode and the files of the output that is replaced.
    """
    chance = random.Random(0)
    for at in range(len(disk.steps) + 1):
        for draw in (None, *[chance] * 12):
            names, lost = disk.crash(at, draw)
            top = disk.listing(names, disk.top)
            out = top.get("out")
            if out is not None:
                files = disk.listing(names, out)
                wanted = old[1] if old and out == old[0] else new
                if set(files) != wanted or lost & set(files.values()):
                    return f"before step {at}: OUT is there and not complete"
            staging = next(
                (inode for name, inode in top.items() if re.fullmatch(r"\.out\.rewrite-[0-9a-f]{16}", name)), None
            )
            if staging is not None:
                staged = disk.listing(names, staging)
                if "out" in staged and lost & set(disk.listing(names, staged["out"]).values()):
                    return f"before step {at}: a staged file with a name and without its data"
                if old and staged.get("out") == old[0]:
                    return f"before step {at}: the next run would take old files for new ones"
                if out is not None and not old and "moving" not in staged and not removing(disk, at):
                    return f"before step {at}: the next run would not know OUT as its own"
    names, _ = disk.crash(len(disk.steps), None)
    worst = {entry: inode for entry, inode in names.items() if durable(disk, entry, inode)}
    return (
        None if disk.listing(worst, disk.top).get("out") not in (None, old and old[0]) else "OUT is gone after success"
    )


def durable(disk: Disk, entry: Entry, inode: int) -> bool:
    last = max((i for i, step in enumerate(disk.steps) if step.names.get(entry) == inode), default=-1)
    return last < 0 or any(s.sync and s.home == disk.steps[last].home for s in disk.steps[last + 1 :])


def removing(disk: Disk, at: int) -> bool:
    """Whether the last traces were being removed: from there on nothing is left to resume."""
    return any(
        name == "moving" and inode is None for step in disk.steps[:at] for (_, name), inode in step.names.items()
    )


def without(disk: Disk, number: int) -> Disk:
    return Disk(disk.top, disk.names, disk.kinds, disk.steps[:number] + disk.steps[number + 1 :])


@pytest.mark.parametrize("way", ["new", "overwrite", "overwrite without exchange"])
def test_power_loss(way: str, source: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: Any) -> None:
    """A visible OUT is complete at every step, whatever is lost; with any one sync left out, it is not."""
    top = tmp_path / "top"
    out = top / "out"
    out.mkdir(parents=True)
    old = None
    if way == "new":
        out.rmdir()
    else:
        for name in ("config.json", "old.bin"):
            (out / name).write_bytes(b"old")
        old = (out.stat().st_ino, {"config.json", "old.bin"})
    if way == "overwrite without exchange":
        monkeypatch.setattr(exchange, "exchange", lambda *_: False)
    with recorded(top) as disk:
        rewrite.convert(source, out, workers=1, overwrite=old is not None)
    assert tree(out) == expected
    assert counterexample(disk, set(expected), old) is None
    syncs = [number for number, step in enumerate(disk.steps) if step.sync]
    assert len(syncs) >= len(expected) + 3
    if way == "overwrite without exchange":  # the first of the parent's is for the exchange
        syncs.remove(next(number for number in syncs if disk.steps[number].home == disk.top))
    for number in syncs:
        assert counterexample(without(disk, number), set(expected), old), f"sync {number} of {len(disk.steps)} is idle"


@pytest.mark.parametrize("overwrite", [False, True])
def test_success_stays_also_when_a_killed_run_is_completed(overwrite: bool, source: Path, tmp_path: Path) -> None:
    """The run that was killed may not have synced the parent after its rename: the one that finds OUT does."""
    for number in range(91, 400, 3):
        top = tmp_path / f"top{number}"
        out = top / "out"
        top.mkdir()
        if overwrite:
            out.mkdir()

        def killed(number: int = number, out: Path = out) -> None:
            with before_call(number, kill_self):
                converter(source, out, overwrite=overwrite)()

        if fork(killed) == 0:
            break
        traces = {file.name for name in leftovers(out) for file in (top / name).glob("*")}
        if (out / CONFIG_NAME).exists() and ("moving" in traces or (overwrite and "out" in traces)):
            with recorded(top) as disk:
                converter(source, out, overwrite=overwrite)()
            removals = [i for i, step in enumerate(disk.steps) if None in step.names.values()]
            syncs = [i for i, step in enumerate(disk.steps) if step.sync and step.home == disk.top]
            assert not removals or syncs[0] < removals[-1]
    assert number > 100
