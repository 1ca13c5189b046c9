"""Workers of a Dask cluster write the files of an output; one of them dies while it writes."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import rewrite
from rewrite.cli.commands import main
from rewrite.errors import UsageError
from rewrite.integrations import executors
from rewrite.planning.jobs import Job
from rewrite.planning.manifest import ByteCounts
from rewrite.verification.outputs import GroupTask
from rewrite.writing.tasks import Tasks
from tests.support import tree
from tests.verification.test_verification import _flip

distributed = pytest.importorskip("distributed")


@pytest.fixture(scope="module")
def scheduler() -> Iterator[Any]:
    """A scheduler with two workers, each a process."""
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=50
    ) as cluster:
        yield cluster


def run(*words: object) -> Result:
    """The command line, in this process."""
    return CliRunner().invoke(main, [str(word) for word in words])


def test_a_cluster_writes_what_one_process_writes(scheduler: Any, vl: Path, tmp_path: Path) -> None:
    """Byte for byte."""
    rewrite.convert(vl, tmp_path / "local")
    result = run("convert", vl, tmp_path / "out", "--profile", "exact", "--cluster", scheduler.scheduler_address)
    assert result.exit_code == 0, result.output
    assert tree(tmp_path / "out") == tree(tmp_path / "local")


def _die_once(flag: Path, tasks: Tasks, job: Job) -> ByteCounts:
    """Runs in a worker: the first one to come here is killed after its first bytes are written."""
    try:
        os.close(os.open(flag, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return tasks.write_alone(job)
    return tasks.write(job, lambda _: os.kill(os.getpid(), signal.SIGKILL))


class _Deadly(Executor):
    """Sends :func:`_die_once` in place of the task."""

    def __init__(self, inner: Executor, flag: Path) -> None:
        self._inner, self._flag = inner, flag

    def submit(self, fn: Callable[..., Any], /, *args: Any, **_: Any) -> Future[Any]:
        return self._inner.submit(_die_once, self._flag, getattr(fn, "__self__"), *args)  # noqa: B009


def test_a_worker_that_is_killed_changes_nothing(scheduler: Any, vl: Path, tmp_path: Path) -> None:
    """The other one takes over what it left half written."""
    rewrite.convert(vl, tmp_path / "local")
    flag = tmp_path / "killed"
    with executors.cluster(scheduler.scheduler_address) as executor:
        rewrite.convert(vl, tmp_path / "out", executor=_Deadly(executor, flag))
    assert flag.exists()
    assert tree(tmp_path / "out") == tree(tmp_path / "local")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_an_error_on_a_worker_has_its_exit_code(scheduler: Any, copy: Path, tmp_path: Path) -> None:
    """And its words."""
    plan = rewrite.make_plan(rewrite.open_checkpoint(copy))
    for path in copy.glob("*.safetensors"):
        os.utime(path)
    with (
        executors.cluster(scheduler.scheduler_address) as executor,
        pytest.raises(rewrite.StorageError, match="changed while it was converted"),
    ):
        rewrite.publish_plan(plan, copy, tmp_path / "out", executor=executor)


def test_a_scheduler_that_does_not_answer(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 4."""
    monkeypatch.setattr(executors, "_TIMEOUT", 0.2)
    for address in ("tcp://127.0.0.1:1", "nonsense://x"):
        result = run("convert", text, tmp_path / "out", "--cluster", address)
        assert result.exit_code == 4
        assert "scheduler does not answer" in result.stderr


def test_a_cluster_without_workers(text: Path, tmp_path: Path) -> None:
    """Would wait for ever."""
    with distributed.LocalCluster(n_workers=0, dashboard_address=None, silence_logs=50) as empty:
        result = run("convert", text, tmp_path / "out", "--cluster", empty.scheduler_address)
    assert result.exit_code == 4
    assert "no workers" in result.stderr


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """What to install is said."""

    def absent(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(executors.importlib, "import_module", absent)  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="needs the package `distributed`"), executors.cluster("tcp://127.0.0.1:1"):
        pass


@pytest.mark.parametrize("profile", ["exact", "dequantized"])
def test_a_cluster_verifies_as_one_process_does(profile: str, scheduler: Any, vl: Path, tmp_path: Path) -> None:
    """The same checks, numbers and digests, for an output that holds and for one that does not."""
    out = tmp_path / "out"
    rewrite.convert(vl, out, profile=profile)
    for broken in (False, True):
        if broken:
            _flip(
                out,
                next(name for name in rewrite.open_checkpoint(out).tensors if name.endswith("in_proj_z.weight")),
                9,
                0,
            )
        with executors.cluster(scheduler.scheduler_address) as executor:
            there = rewrite.verify(vl, out, device="cpu", tokens=2, digest=True, executor=executor)
        here = rewrite.verify(vl, out, device="cpu", tokens=2, digest=True)
        assert there.to_json() == here.to_json()
        assert there.ok is not broken
    result = run("verify", vl, vl, "--quiet", "--device", "cpu", "--cluster", scheduler.scheduler_address)
    assert result.exit_code == 1
    assert "FAILED: structure" in result.output


def test_a_pool_of_processes_verifies_too(vl: Path, tmp_path: Path) -> None:
    """Counts of codes come back from where they were made."""
    rewrite.convert(vl, tmp_path / "out")
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as executor:
        there = rewrite.verify(vl, tmp_path / "out", device="cpu", tokens=2, rows=16, executor=executor)
    assert there.to_json() == rewrite.verify(vl, tmp_path / "out", device="cpu", tokens=2, rows=16).to_json()


def test_groups_are_multiplied_by_the_workers(vl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One task for each, no larger than its group."""
    rewrite.convert(vl, tmp_path / "out")
    here = rewrite.verify(vl, tmp_path / "out", device="cpu", tokens=2)
    whole = len(pickle.dumps(rewrite.open_checkpoint(vl)))
    sent: list[int] = []

    class Recording(ThreadPoolExecutor):
        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
            if isinstance(fn.__self__, GroupTask):
                sent.append(len(pickle.dumps(fn)))
                fn = pickle.loads(pickle.dumps(fn))
            return super().submit(fn, *args, **kwargs)

    with Recording(2) as executor:
        there = rewrite.verify(vl, tmp_path / "out", device="cpu", tokens=2, executor=executor)
    assert there.to_json() == here.to_json()
    assert len(sent) == len({row.group for row in here.numbers}) > 1
    assert max(sent) < whole / 2
