"""A conversion in parts: whatever is run where, twice, or killed, the same OUT comes out, all at once."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import rewrite
from rewrite import Conversion
from rewrite.cli.commands import main
from rewrite.errors import StorageError, UsageError
from rewrite.planning.manifest import ByteCounts
from rewrite.planning.segments import Copy, Dequantize, Fill, Lookup
from rewrite.writing.publish import DirectoryOutput
from rewrite.writing.tasks import Tasks, part_of
from tests.support import tree, unfolded
from tests.writing.interruptions import before_call, count_calls, fork, kill_self, leftovers


@pytest.fixture
def planned(text: Path, tmp_path: Path) -> Conversion:
    return rewrite.plan_conversion(text, tmp_path / "out")


@pytest.fixture
def whole(text: Path, tmp_path: Path) -> dict[str, bytes]:
    """What one process writes."""
    rewrite.convert(text, tmp_path / "whole")
    return tree(tmp_path / "whole")


def run(*words: object) -> Result:
    """The command line, in this process."""
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.mark.parametrize("parts", [1, 2, 3, 100])
def test_parts_give_what_one_process_gives(planned: Conversion, whole: dict[str, bytes], parts: int) -> None:
    """In any order; more parts than files, too."""
    out = Path(planned.out)
    counts = ByteCounts()
    for number in reversed(range(parts)):
        counts += planned.run_part(number, parts)
        assert not out.exists()
    assert counts.shared + counts.copied + counts.written == sum(job.size for job in planned.plan.jobs)
    manifest = planned.finish()
    assert tree(out) == whole
    assert leftovers(out) == []
    assert manifest.counts is not None
    assert manifest.counts.kept == sum(job.size for job in planned.plan.jobs)


def test_each_file_is_in_one_part_and_parts_are_even(planned: Conversion) -> None:
    """By their bytes, as far as whole files allow."""
    shares = [part_of(planned.plan.jobs, number, 3) for number in range(3)]
    assert sorted(job.name for share in shares for job in share) == sorted(job.name for job in planned.plan.jobs)
    loads = [sum(job.size for job in share) for share in shares]
    assert max(loads) - min(loads) <= max(job.size for job in planned.plan.jobs)


def test_the_file_round_trips(planned: Conversion, tmp_path: Path) -> None:
    """And every address in it is absolute: others run it elsewhere."""
    planned.save(tmp_path / "plan.json")
    assert Conversion.load(tmp_path / "plan.json") == planned
    assert Path(planned.source).is_absolute()
    assert Path(planned.out).is_absolute()
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_relative_paths_are_those_of_the_planner(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts run in any directory."""
    shutil.copytree(text, tmp_path / "in")
    monkeypatch.chdir(tmp_path)
    assert run("plan", "in", "out", "--output", "plan.json").exit_code == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run("run", tmp_path / "plan.json", "--part", "0/1").exit_code == 0
    assert run("finish", tmp_path / "plan.json").exit_code == 0
    assert (tmp_path / "out" / "config.json").exists()


def test_finish_before_all_parts_ran_says_what_is_missing(planned: Conversion) -> None:
    """And publishes nothing; afterwards it does."""
    planned.run_part(0, 2)
    missing = part_of(planned.plan.jobs, 1, 2)
    with pytest.raises(StorageError, match="were not written") as error:
        planned.finish()
    assert str(error.value.found).startswith("missing: ")
    assert missing[0].name in str(error.value.found)
    assert not Path(planned.out).exists()
    planned.run_part(1, 2)
    planned.finish()


def test_parts_and_finish_may_run_again(planned: Conversion, whole: dict[str, bytes]) -> None:
    """A scheduler that is not sure runs a task once more."""
    for number in (0, 1, 1, 0):
        counts = planned.run_part(number, 2)
    assert counts.kept == sum(job.size for job in part_of(planned.plan.jobs, 0, 2))
    planned.finish()
    again = planned.finish()
    assert again.counts is not None
    assert again.counts.kept == planned.plan.size
    assert tree(Path(planned.out)) == whole


def test_a_part_killed_at_any_call_is_run_again(planned: Conversion, whole: dict[str, bytes]) -> None:
    """SIGKILL before every third call that touches the disk."""
    out = Path(planned.out)
    calls = count_calls(lambda: planned.run_part(0, 2, workers=1))
    assert calls > 50
    for number in range(1, calls + 1, 3):
        _clean(out)

        def killed(number: int = number) -> None:
            with before_call(number, kill_self):
                planned.run_part(0, 2, workers=1)

        assert os.WTERMSIG(fork(killed)) == signal.SIGKILL
        assert not out.exists()
        planned.run_part(1, 2)
        planned.run_part(0, 2)
        planned.finish()
        assert tree(out) == whole
        assert leftovers(out) == []


def test_finish_killed_at_any_call_is_run_again(planned: Conversion, whole: dict[str, bytes]) -> None:
    """OUT is absent or complete after each kill."""
    out = Path(planned.out)
    number, status = 0, signal.SIGKILL.value
    while status:
        number += 1
        _clean(out)
        planned.run_part(0, 1, workers=1)

        def killed(number: int = number) -> None:
            with before_call(number, kill_self):
                planned.finish()

        status = fork(killed)
        assert not out.exists() or tree(out) == whole
        if status:
            planned.finish()
            assert tree(out) == whole
        assert leftovers(out) == []
    assert number > 30


def _clean(out: Path) -> None:
    for path in (out, *(out.parent / name for name in leftovers(out))):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def test_parts_at_the_same_time(planned: Conversion, whole: dict[str, bytes]) -> None:
    """Four processes, two of them with the same part."""
    with ProcessPoolExecutor(4) as pool:
        for future in [pool.submit(planned.run_part, number, 3) for number in (0, 1, 2, 2)]:
            future.result()
    planned.finish()
    assert tree(Path(planned.out)) == whole


def test_a_source_that_changed_since_it_was_planned_is_refused(copy: Path, tmp_path: Path) -> None:
    """By the part that reads the file, and by finish for what no part reads."""
    planned = rewrite.plan_conversion(copy, tmp_path / "out")
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    planned.run_part(0, 1)
    with pytest.raises(StorageError, match="changed while it was converted"):
        planned.finish()
    os.utime(next(copy.glob("*.safetensors")))
    _clean(Path(planned.out))
    with pytest.raises(StorageError, match="changed while it was converted"):
        planned.run_part(0, 1)


def test_an_out_that_exists_is_refused_and_may_be_replaced(text: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    """By parts already; with overwrite at the very end."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("")
    with pytest.raises(StorageError, match="output exists"):
        rewrite.plan_conversion(text, out).run_part(0, 1)
    with pytest.raises(StorageError, match="output exists"):
        rewrite.plan_conversion(text, out).finish()
    planned = rewrite.plan_conversion(text, out, overwrite=True)
    planned.run_part(0, 1)
    assert tree(out) == {"mine": b""}
    planned.finish()
    assert tree(out) == whole


def test_an_out_of_somebody_else_is_not_taken_for_ours(planned: Conversion, text: Path) -> None:
    """Another profile: another manifest."""
    rewrite.convert(text, planned.out, profile="portable")
    with pytest.raises(StorageError, match="output exists"):
        planned.finish()


def test_while_a_conversion_runs_no_part_does(planned: Conversion) -> None:
    """And the other way round: the lock is held alone, or shared by parts."""
    publication = DirectoryOutput(planned.plan, rewrite.open_storage(planned.source), planned.out)
    seen: list[ByteCounts] = []

    def meanwhile(_done: int, _total: int) -> None:
        if not seen:
            with pytest.raises(StorageError, match="Another conversion"):
                rewrite.convert(planned.source, planned.out)
            seen.append(planned.run_part(1, 2))

    publication.run_part(0, 2, workers=1, progress=meanwhile)
    assert seen


@pytest.mark.parametrize(("number", "parts"), [(-1, 2), (2, 2), (0, 0)])
def test_a_part_that_there_is_not(planned: Conversion, number: int, parts: int) -> None:
    """Exit code 2."""
    with pytest.raises(UsageError, match="no such part"):
        planned.run_part(number, parts)


@pytest.mark.parametrize("part", ["", "1", "2/2", "0/0", "-1/2", "a/b", "1/2/3"])
def test_the_command_line_knows_no_such_part(part: str, tmp_path: Path) -> None:
    """Before the file is read."""
    assert run("run", tmp_path / "plan.json", "--part", part).exit_code == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda value: "",
        lambda value: "[]",
        lambda value: "{}",
        lambda value: json.dumps({**value, "version": "0"}),
        lambda value: json.dumps({**value, "kind": "another"}),
        lambda value: json.dumps({**value, "digest": "0"}),
        lambda value: json.dumps({**value, "plan": {}}),
        lambda value: json.dumps({**value, "plan": {**value["plan"], "copies": []}}),
        lambda value: json.dumps({key: value[key] for key in value if key != "out"}),
    ],
)
def test_a_file_that_is_no_plan_is_refused(planned: Conversion, tmp_path: Path, damage: Any) -> None:
    """Also one of another version, or edited."""
    path = tmp_path / "plan.json"
    planned.save(path)
    path.write_text(damage(json.loads(path.read_text())))
    result = run("run", path, "--part", "0/1")
    assert result.exit_code == 4
    assert "not a plan of `rewrite plan`" in result.stderr


EDITS: dict[str, Any] = {
    "out": "/elsewhere", "overwrite": True, "copy": True, "create_pr": True, "created": "yesterday", "in": "/elsewhere",
}  # fmt: skip


@pytest.mark.parametrize("field", EDITS)
def test_every_field_of_a_plan_is_in_its_digest(planned: Conversion, tmp_path: Path, field: str) -> None:
    """An output that was changed, with leave to replace it, would remove another directory."""
    path, precious = tmp_path / "plan.json", tmp_path / "precious"
    precious.mkdir()
    (precious / "data").write_text("x")
    planned.save(path)
    value = json.loads(path.read_text())
    assert value.keys() == {"kind", "version", "digest", "plan", *EDITS}
    value[field] = str(precious) if field == "out" else EDITS[field]
    if field == "out":
        value["overwrite"] = True
    path.write_text(json.dumps(value))
    for words in (("run", path, "--part", "0/1"), ("finish", path)):
        result = run(*words)
        assert result.exit_code == 4
        assert "changed" in result.stderr
    assert tree(precious) == {"data": b"x"}


def test_a_plan_that_replaces_needs_to_be_told_what(text: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    """A file with a digest of its own may say anything: the user says what may be removed."""
    path, precious = tmp_path / "plan.json", tmp_path / "precious"
    precious.mkdir()
    (precious / "data").write_text("x")
    rewrite.plan_conversion(text, precious, overwrite=True).save(path)
    for words in (("run", path, "--part", "0/1"), ("finish", path)):
        assert run(*words).exit_code == 2
        assert "another output" in run(*words, tmp_path / "out").stderr
    assert tree(precious) == {"data": b"x"}
    assert run("run", path, precious, "--part", "0/1").exit_code == 0
    assert run("finish", path, precious).exit_code == 0
    assert tree(precious) == whole


def test_an_out_on_the_command_line_is_that_of_the_plan(planned: Conversion, tmp_path: Path) -> None:
    """Or nothing is written."""
    path = tmp_path / "plan.json"
    planned.save(path)
    for words in (("run", path, tmp_path / "other", "--part", "0/1"), ("finish", path, tmp_path / "other")):
        result = run(*words)
        assert result.exit_code == 2
        assert "The plan has another output" in result.stderr
    assert [found.name for found in tmp_path.iterdir()] == ["plan.json"]
    assert run("run", path, f"{planned.out}/", "--part", "0/1").exit_code == 0


def _names(name: str) -> Any:
    return lambda plan: replace(plan, texts=(*plan.texts, replace(plan.texts[0], name=name)))


def _first(**fields: Any) -> Any:
    return lambda plan: replace(plan, shards=(replace(plan.shards[0], **fields), *plan.shards[1:]))


ODD_PLANS = {
    **{
        f"text {name!r}": _names(name)
        for name in ("/abs", "../up", "a/../../b", "a//b", "", ".", "a/", "x\0y", "..\\up", "config.json/x")
    },
    "copy": lambda plan: replace(plan, copies=(replace(plan.copies[0], name="../secret"), *plan.copies)),
    "shard": _first(name="../../shard"),
    "left out": lambda plan: replace(plan, left_out=(replace(plan.copies[0], name="/etc/passwd"),)),
    "twice": lambda plan: replace(plan, copies=(*plan.copies, plan.copies[0])),
    "the manifest": _names("rewrite_manifest.json"),
    "beyond the source": _first(segments=(Copy(0, 1 << 60),)),
    "before the source": _first(segments=(Copy(-5, 5),)),
    "nothing repeated": _first(segments=(Fill(b"", 1),)),
    "a short table": _first(segments=(Lookup(0, 1, (b"ab",) * 255),)),
    "scales beyond": _first(segments=(Dequantize(0, 2, 2, (1, 1), 1 << 60, "F32", "BF16"),)),
    "no block": _first(segments=(Dequantize(0, 2, 2, (0, 1), 0, "F32", "BF16"),)),
    "a file less": lambda plan: replace(plan, copies=plan.copies[1:]),
}


@pytest.mark.parametrize("kind", ODD_PLANS)
def test_a_plan_writes_one_output_and_nothing_else(planned: Conversion, tmp_path: Path, kind: str) -> None:
    """Whoever edits a plan can compute its digest. Refused before a byte is written, also from Python."""
    path, odd = tmp_path / "plan.json", replace(planned, plan=ODD_PLANS[kind](planned.plan))
    odd.save(path)
    for words in (("run", path, "--part", "0/1"), ("finish", path)):
        result = run(*words)
        assert result.exit_code == 4, result.output
        assert "not made by `rewrite plan`" in result.stderr
    with pytest.raises(StorageError, match="not made by"):
        odd.run_part(0, 1)
    with pytest.raises(StorageError, match="not made by"):
        rewrite.publish_plan(odd.plan, planned.source, Path(planned.out))
    assert [found.name for found in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    ("field", "value"), [("overwrite", "yes"), ("copy", 1), ("created", 5), ("out", "out"), ("out", ""), ("in", 5)]
)
def test_fields_have_their_types(planned: Conversion, tmp_path: Path, field: str, value: Any) -> None:
    """And OUT is an absolute path."""
    path = tmp_path / "plan.json"
    replace(planned, **{"source" if field == "in" else field: value}).save(path)
    assert run("run", path, "--part", "0/1").exit_code == 4


def test_the_commands(text: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    """As a job of a cluster calls them."""
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    result = run("plan", text, out, "--output", plan, "--profile", "exact")
    assert result.exit_code == 0
    assert f"Next: `rewrite run {plan} --part I/N`" in unfolded(result.stdout)
    assert run("finish", plan).exit_code == 4
    assert run("run", plan, "--part", "0/2").stdout.startswith("Part 0/2: ")
    result = run("run", plan, "--part", "1/2", "--json")
    assert json.loads(result.stdout)["part"] == [1, 2]
    assert "made explicit" in run("finish", plan).stdout
    assert json.loads(run("finish", plan, "--json").stdout)["profile"] == "exact"
    assert tree(out) == whole
    assert json.loads(run("plan", text, out, "--output", plan, "--json").stdout).keys() >= {"manifest", "shards"}


def test_a_checkpoint_that_is_refused_makes_no_plan(copy: Path, tmp_path: Path) -> None:
    """Exit code 3, and no file."""
    (copy / "config.json").write_text("{")
    assert run("plan", copy, tmp_path / "out", "--output", tmp_path / "plan.json").exit_code == 3
    assert not (tmp_path / "plan.json").exists()


@pytest.mark.parametrize("kind", [ThreadPoolExecutor, ProcessPoolExecutor])
def test_any_executor_writes_the_same(
    text: Path, tmp_path: Path, whole: dict[str, bytes], kind: type[ThreadPoolExecutor | ProcessPoolExecutor]
) -> None:
    """Of the standard library; others have the same methods."""
    done: list[tuple[int, int]] = []
    with kind(2) as executor:
        manifest = rewrite.convert(
            text, tmp_path / "out", executor=executor, progress=lambda *now: done.append(now), copy=True
        )
    assert tree(tmp_path / "out") == whole
    jobs = [file for file in manifest.files if not file.rewritten or file.name.endswith(".safetensors")]
    assert done[-1][0] == sum(file.size for file in jobs)
    assert leftovers(tmp_path / "out") == []


class _Elsewhere(Executor):
    """Workers that see other directories than we do: they write and nothing arrives."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        from concurrent.futures import Future

        future: Future[ByteCounts] = Future()
        future.set_result(ByteCounts())
        return future


def test_workers_without_the_shared_directory_are_noticed(text: Path, tmp_path: Path) -> None:
    """Nothing is published."""
    with pytest.raises(StorageError, match="were not written") as error:
        rewrite.convert(text, tmp_path / "out", executor=_Elsewhere())
    assert "same directories" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_an_error_of_a_worker_is_the_error(copy: Path, tmp_path: Path) -> None:
    """With all it says, through pickle."""
    plan = rewrite.make_plan(rewrite.open_checkpoint(copy))
    for path in copy.glob("*.safetensors"):
        os.utime(path)
    with (
        ProcessPoolExecutor(1) as executor,
        pytest.raises(StorageError, match="changed while it was converted") as error,
    ):
        rewrite.publish_plan(plan, copy, tmp_path / "out", executor=executor)
    assert "modified at" in str(error.value)


def test_tasks_are_small(planned: Conversion) -> None:
    """What goes to a worker is the plan of one file."""
    tasks = Tasks(rewrite.open_storage(planned.source), Path(planned.out), False)
    assert max(len(pickle.dumps((tasks.write_alone, job))) for job in planned.plan.jobs) < 100_000
