"""Checkpoints that strangers broke on purpose: refused by name, in bounded time and memory; nothing of them is run."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

import rewrite
from rewrite import open_checkpoint
from rewrite.checkpoint import checkpoint as checkpoint_module
from rewrite.checkpoint.checkpoint import CONFIG_NAME, INDEX_NAME
from rewrite.checkpoint.local import LocalDirectory
from rewrite.cli.commands import main
from rewrite.errors import CheckpointError, ConfigError, StorageError
from rewrite.quantization.patterns import Patterns
from tests import crafted_cases as cases
from tests.support import ROOT, edit_json, tree

LIMIT = 200  # MB


def run(*arguments: object) -> Result:
    """The command line; whatever escapes it is a failure."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert "Traceback" not in result.output
    return result


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    """A checkpoint of two kilobytes that converts."""
    cases.write(cases.sound(), tmp_path / "sound")
    return tmp_path / "sound"


def test_the_tiny_checkpoint_is_sound(sound: Path, tmp_path: Path) -> None:
    """Or the cases below would be refused for another reason than theirs."""
    assert run("convert", sound, tmp_path / "out").stdout.startswith("Converted: 2 shared scales in 1 fused group")


# --- config.json of every wrong shape


def places(value: Any, prefix: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield (*prefix, key)
        yield from places(child, (*prefix, key))


def with_value(config: Any, place: tuple[str | int, ...], value: Any) -> Any:
    for key in place[:-1]:
        config = config[key]
    config[place[-1]] = value


CONFIG = json.loads(cases.sound()[CONFIG_NAME])
PLACES = [*places(CONFIG), ("text_config",), ("compression_config",), ("text_config_2",)]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: ".".join(map(str, place)))
def test_config_of_every_wrong_shape(place: tuple[str | int, ...], sound: Path, tmp_path: Path) -> None:
    """Each value of each key replaced by everything that does not belong there: 0, or 3 and where it is wrong."""
    path = sound / CONFIG_NAME
    for value in cases.WRONG:
        config = json.loads(cases.sound()[CONFIG_NAME])
        with_value(config, place, value)
        path.write_text(json.dumps(config))
        result = run("convert", sound, tmp_path / "out", "--dry-run")
        assert result.exit_code in (0, 3), value
        if result.exit_code == 3:
            assert result.stderr.startswith("error: ") and "  where:" in result.stderr
            assert not (set(result.stderr) & {"\x1b", "\0"})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=60)
@given(place=st.sampled_from(PLACES), value=json_values)
def test_config_of_any_shape(
    place: tuple[str | int, ...], value: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The same with whatever hypothesis comes up with, through inspect, which prints what it finds."""
    directory = tmp_path_factory.mktemp("any")
    cases.write(cases.sound(), directory)
    config = json.loads(cases.sound()[CONFIG_NAME])
    with_value(config, place, value)
    (directory / CONFIG_NAME).write_text(json.dumps(config))
    assert run("inspect", directory).exit_code in (0, 1, 3)
    assert run("inspect", directory, "--json").exit_code in (0, 1, 3)


def test_crafted_cases(tmp_path: Path) -> None:
    """A few hundred of the ten thousand that ``scripts/fuzz.sh`` runs."""
    outcomes = set()
    for seed in range(100_000, 100_300):
        cases.crafted(seed, tmp_path / "case")
        outcomes.add(cases.judge(tmp_path / "case"))
        shutil.rmtree(tmp_path / "case")
    assert outcomes >= {"accepted", "HeaderError", "CheckpointError", "ConfigError"}


@pytest.mark.parametrize("target", ["header", "checkpoint"])
def test_the_fuzzer_finds_nothing_in_a_few_seconds(target: str, tmp_path: Path) -> None:
    """Where atheris is installed; ``scripts/fuzz.sh`` brings its own."""
    pytest.importorskip("atheris")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "scripts"), str(ROOT)])}
    seeds = [sys.executable, "-m", "fuzz.seeds", str(tmp_path)]
    subprocess.run(seeds, check=True, env=environment)
    fuzz = [sys.executable, "-m", f"fuzz.{target}", "-max_total_time=3", "-timeout=20", str(tmp_path / target)]
    subprocess.run(fuzz, check=True, env=environment, capture_output=True)


# --- patterns that never end


@pytest.mark.parametrize(
    "pattern",
    [r"(a+)+$", r"(a|a)*$", r"(.*)*x", r"([a-z]+)*$", r"(?:a*){9}$", r"(?=(a*)*)b", r"(?x)(a*) *$", r"(a*)(?#)*$",
     "a?" * 40 + "a" * 40, "(a|a)" * 40 + "b", ".*" * 12 + "x", "(" * 99 + "a*" + ")*" * 99, "(a{1,20}){1,20}" * 5,
     "x" * 5000],
)  # fmt: skip
def test_patterns_that_could_take_for_ever_end(pattern: str) -> None:
    """Matched or refused, within the time that all patterns have."""
    started = time.monotonic()
    with suppress(ConfigError):
        Patterns(1.0).matches(f"re:{pattern}", "a" * 200)
    assert time.monotonic() - started < 30, "not the speed: whether it ends"


@pytest.mark.parametrize("pattern", ["(a|a)" * 40 + "b", "(((((a{1,1000}){1,1000}){1,1000}){1,1000}){1,1000})b"])
def test_a_pattern_that_takes_too_long_is_refused(pattern: str) -> None:
    """Named, with what to do."""
    with pytest.raises(ConfigError, match="takes too long") as caught:
        Patterns(0.2).matches(f"re:{pattern}", "a" * 200)
    assert pattern in str(caught.value.where) and "list the modules" in str(caught.value.hint)


@pytest.mark.parametrize("pattern", ["(?:foo){e<=1}", "x{y}", "[[a]", "[[:alpha:]]", "((", "x" * 5000, "(?P<a"])
def test_patterns_that_engines_read_otherwise_are_refused(pattern: str) -> None:
    """The package that stops in time must not read what re reads in another way."""
    with pytest.raises(ConfigError):
        Patterns().matches(f"re:{pattern}", "foo")


@given(st.text("ab.*+?()|[]^$\\d{12,}", max_size=12), st.text("ab1.", max_size=8))
def test_patterns_mean_what_they_mean_to_re(pattern: str, name: str) -> None:
    """Or they are refused."""
    try:
        ours = Patterns(1.0).matches(f"re:{pattern}", name)
    except ConfigError:
        return
    assert ours is (re.match(pattern, name) is not None)


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        (r".*linear_attn\.in_proj_(qkv|z|qkvz)$", "model.layers.0.linear_attn.in_proj_z", True),
        (r"(?!.*linear_attn\.in_proj_(qkv|z|qkvz)$).*mlp.*", "model.layers.0.mlp.gate_proj", True),
        (
            r"^model\.layers\.\d+\.mlp\.experts\.\d+\.(gate|up|down)_proj$",
            "model.layers.3.mlp.experts.17.up_proj",
            True,
        ),
        (r".*layers.*mlp.*experts.*proj", "model.language_model.layers.40.mlp.shared_expert.down_proj", False),
        (r"model\.layers\.([0-9]|[1-3][0-9])\.[^.)*]+?$", "model.layers.12.x", True),
        (r"(?P<a>lm_)?head", "head", True),
    ],
)
def test_real_patterns_are_matched(pattern: str, name: str, expected: bool) -> None:
    """What producers write is nowhere near the bounds."""
    assert Patterns().matches(f"re:{pattern}", name) is expected


def test_the_time_for_all_patterns_is_bounded(monkeypatch: Any, sound: Path, tmp_path: Path) -> None:
    """Many matches that each end are too many at some point."""
    monkeypatch.setattr("rewrite.quantization.patterns.Patterns.__init__.__defaults__", (0.0,))
    result = run("convert", sound, tmp_path / "out")
    assert result.exit_code == 3 and "takes too long" in result.stderr


def test_long_lists_of_names_are_looked_up(sound: Path) -> None:
    """100,000 names against every module, thrice, in a moment."""
    config = json.loads((sound / CONFIG_NAME).read_text())
    config["quantization_config"]["ignore"] = [f"model.layers.{i}.mlp.gate" for i in range(100_000)]
    (sound / CONFIG_NAME).write_text(json.dumps(config))
    started = time.monotonic()
    assert rewrite.make_plan(open_checkpoint(sound)).manifest.changed
    assert time.monotonic() - started < 5


# --- memory


def peak_memory(directory: Path) -> tuple[int, str]:
    """MB that ``convert --dry-run`` takes at most, and its last words."""
    script = (
        "import atexit, sys\n"
        "from rewrite.cli.commands import main\n"
        "status = lambda: [line for line in open('/proc/self/status') if line.startswith('VmHWM')]\n"
        "atexit.register(lambda: print(status()[0].split()[1], file=sys.stderr))\n"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "convert", str(directory), "/nonexistent/out", "--dry-run", "--quiet"],
        capture_output=True, text=True, check=False, timeout=60, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 3 and "Traceback" not in done.stderr, done.stderr
    lines = done.stderr.splitlines()
    return int(lines[-1]) // 1024, "\n".join(lines[:-1])


EMPTY = b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
SMILE = "\U0001f600".encode()
HEADERS: dict[str, Callable[[], bytes]] = {
    "brackets": lambda: b'{"a":' + b"[]," * 8_300_000 + b"[]}",
    "objects": lambda: b'{"a":{"a":' + b'{"a":' * 4_000_000,
    "numbers": lambda: b'{"a":{"shape":[' + b"1," * 12_000_000,
    "a name without end": lambda: b'{"' + b"x" * 24_000_000,
    "escapes": lambda: b'{"' + b'\\"' * 12_000_000,
    "wide names": lambda: (
        b"{" + b",".join(b'"%d%s%s":%s' % (i, b"x" * 900_000, SMILE, EMPTY) for i in range(27)) + b"}"
    ),
    "metadata": lambda: b'{"__metadata__":{' + b",".join(b'"%d":""' % i for i in range(1_800_000)) + b"}}",
    "tensors": lambda: b"{" + b",".join(b'"%d":%s' % (i, EMPTY) for i in range(250_000)) + b"}",
    "100 MB and a byte": lambda: b"{" + b" " * 99_999_999 + b"}",
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_would_fill_the_memory(case: str, sound: Path) -> None:
    """Any header within the limit of 25 MB, and one beyond the stock reader's: refused in less than 200 MB."""
    (sound / cases.SHARDS[0]).write_bytes(cases.file_of(HEADERS[case]()))
    peak, message = peak_memory(sound)
    assert peak < LIMIT
    assert cases.SHARDS[0] in message or case == "wide names"  # that one is sound, but not what the index says


TEXTS: dict[str, Callable[[], bytes]] = {
    "brackets": lambda: b'{"a": [' + b"[]," * 3_000_000 + b"[]]}",
    "deep": lambda: b'{"a":' * 200 + b"1" + b"}" * 200,
    "numbers": lambda: b'{"a": [' + b"1," * 4_000_000 + b"1]}",
    "members": lambda: b"{" + b",".join(b'"%d":1' % i for i in range(300_000)) + b"}",
    "a huge string": lambda: b'{"a": "' + b"x" * 9_000_000 + SMILE + b'", "a": 1}',
    "a huge number": lambda: b'{"a": ' + b"9" * 9_000_000 + b"}",
    "too large": lambda: b"{" + b" " * 120_000_000 + b"}",
}


@pytest.mark.parametrize("name", [CONFIG_NAME, INDEX_NAME])
@pytest.mark.parametrize("case", TEXTS)
def test_json_that_would_fill_the_memory(case: str, name: str, sound: Path) -> None:
    """The same for config and index."""
    (sound / name).write_bytes(TEXTS[case]())
    peak, message = peak_memory(sound)
    assert peak < LIMIT
    assert name in message


def test_the_number_of_tensors_is_bounded(sound: Path, monkeypatch: Any) -> None:
    """However many shards they are spread over."""
    monkeypatch.setattr(checkpoint_module, "MAX_TENSORS", 6)
    with pytest.raises(CheckpointError, match="too many tensors"):
        open_checkpoint(sound)


# --- names and special files


@pytest.mark.parametrize("name", [CONFIG_NAME, INDEX_NAME, cases.SHARDS[0], "tokenizer.json"])
@pytest.mark.parametrize("kind", ["fifo", "socket", "/dev/zero", "/dev/tty", "/proc/self/mem", "itself", "directory"])
def test_what_is_no_file_is_never_waited_for(kind: str, name: str, sound: Path) -> None:
    """In the place of any file, by itself or through a symlink."""
    path = sound / name
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        os.mknod(path, stat.S_IFSOCK | 0o600)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(path.name if kind == "itself" else kind)
    if kind == "directory" and name in (INDEX_NAME, "tokenizer.json"):
        (path / "x").touch()  # just files in a directory; without its index the checkpoint is two unrelated shards
    if name != "tokenizer.json" or kind not in ("directory", "/proc/self/mem"):  # an empty file, as far as stat says
        assert run("inspect", sound).exit_code in (3, 4)


@pytest.mark.parametrize("name", [CONFIG_NAME, cases.SHARDS[0], "tokenizer.json"])
def test_a_fifo_that_takes_the_place_of_a_listed_file(name: str, sound: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Between listing and opening: still no waiting."""
    listed = LocalDirectory.list_files

    def then_replace(directory: LocalDirectory) -> Any:
        files = listed(directory)
        (sound / name).unlink()
        os.mkfifo(sound / name)
        return files

    monkeypatch.setattr(LocalDirectory, "list_files", then_replace)
    with pytest.raises(StorageError, match=r"regular file|special file"):
        rewrite.convert(sound, tmp_path / "out")


@pytest.mark.parametrize(
    "target", ["gone", ".", "..", "sub", INDEX_NAME, "config.json", "/dev/zero", "a\nb", "\ud800", "x\0"]
)
def test_an_index_that_points_elsewhere(target: str, sound: Path) -> None:
    """At nothing, at directories, at devices, at itself."""
    (sound / "sub").mkdir()
    index = json.loads((sound / INDEX_NAME).read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], target)
    (sound / INDEX_NAME).write_text(json.dumps(index))
    result = run("inspect", sound)
    assert result.exit_code == 3
    assert "safetensors" in result.stderr or target in result.stderr


@pytest.mark.parametrize(
    "name", [b"\xff\xfe.safetensors", b"a\nb\x1b[31m", b"a\\b", b"n" * 255, "\u202e\ud7ff".encode()]
)
def test_any_file_name_that_a_disk_can_hold_comes_along(name: bytes, sound: Path, tmp_path: Path) -> None:
    """Also one that is no UTF-8: in the manifest it is escaped, on the terminal it is harmless."""
    (sound / os.fsdecode(name)).write_bytes(b"data")
    result = run("convert", sound, tmp_path / "out")
    assert result.exit_code == 0
    assert "\x1b" not in result.output
    assert (tmp_path / "out" / os.fsdecode(name)).read_bytes() == b"data"
    files = json.loads((tmp_path / "out" / "rewrite_manifest.json").read_text())["files"]
    assert os.fsdecode(name) in {file["name"] for file in files}


@pytest.mark.parametrize("name", [b"\xff", b"a\nb\x1b[31m"])
def test_any_directory_name(name: bytes, sound: Path, tmp_path: Path) -> None:
    """The manifest and every report name it."""
    source = tmp_path / os.fsdecode(name)
    sound.rename(source)
    for command in (["inspect", source], ["inspect", source, "--json"], ["convert", source, tmp_path / "out"]):
        result = run(*command)
        assert result.exit_code in (0, 1)
        assert "\x1b" not in result.output


def test_half_a_surrogate_pair_in_the_config_survives(sound: Path, tmp_path: Path) -> None:
    """As the escape that it was, in a file that is UTF-8 otherwise."""
    config = json.loads((sound / CONFIG_NAME).read_text())
    config["quantization_config"]["note"] = "\ud800 é"
    (sound / CONFIG_NAME).write_text(json.dumps(config).replace("\\u00e9", "é"), encoding="utf-8")
    assert run("convert", sound, tmp_path / "out").exit_code == 0
    assert json.loads((tmp_path / "out" / CONFIG_NAME).read_text())["quantization_config"]["note"] == "\ud800 é"


def test_a_directory_with_the_name_of_the_manifest(sound: Path, tmp_path: Path) -> None:
    """Said before anything is written."""
    (sound / "rewrite_manifest.json").mkdir()
    (sound / "rewrite_manifest.json" / "x").touch()
    result = run("convert", sound, tmp_path / "out")
    assert result.exit_code == 3 and "name of the manifest" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["sound"]


def test_layer_numbers_beyond_any_integer(sound: Path) -> None:
    """Digits that int() refuses, or takes for none."""
    shard = (sound / cases.SHARDS[0]).read_bytes()
    index = (sound / INDEX_NAME).read_bytes()
    for number in (b"9" * 5000, "²".encode(), "٣".encode()):
        layer = b"layers." + number
        for path in sound.glob("*.safetensors"):
            raw = cases.sound()[path.name]
            length = int.from_bytes(raw[:8], "little")
            path.write_bytes(cases.file_of(raw[8 : 8 + length].replace(b"layers.0", layer), raw[8 + length :]))
        (sound / INDEX_NAME).write_bytes(cases.sound()[INDEX_NAME].replace(b"layers.0", layer))
        assert run("inspect", sound).exit_code in (0, 1)
    assert shard and index


def test_directories_that_multiply_through_links(sound: Path) -> None:
    """Thirty directories with two links each to the next are a thousand million paths."""
    for i in range(30):
        (sound / f"d{i}").mkdir()
        for name in "ab":
            (sound / f"d{i}" / name).symlink_to(f"../d{i + 1}")
    (sound / "d30").mkdir()
    with pytest.raises(CheckpointError, match="already listed"):
        open_checkpoint(sound)


def test_directories_without_end(sound: Path) -> None:
    """As deep as a path can be."""
    deep = sound
    for _ in range(500):
        deep /= "d"
        deep.mkdir()
    with pytest.raises(CheckpointError, match="nested too deep"):
        open_checkpoint(sound)


# --- security


def test_nothing_of_a_checkpoint_is_run(sound: Path, tmp_path: Path) -> None:
    """No code that the config asks for, no pickle, by no command."""
    trap = f"open({str(tmp_path / 'owned')!r}, 'w')"
    for name in ("modeling_evil.py", "configuration_evil.py", "__init__.py", "conftest.py", "sitecustomize.py"):
        (sound / name).write_text(trap)
    pickle = f"c__builtin__\nexec\n(S{trap!r}\ntR.".encode()
    for name in ("pytorch_model.bin", "model.pt", "rank0.pth", "x.pkl", "model.ckpt"):
        (sound / name).write_bytes(pickle)
    auto = {"AutoConfig": "configuration_evil.EvilConfig", "AutoModelForCausalLM": "modeling_evil.EvilModel"}
    edit_json(sound / CONFIG_NAME, auto_map=auto, trust_remote_code=True)
    out = tmp_path / "out"
    for command in (
        ["inspect", sound, "--weights"],
        ["convert", sound, out],
        ["inspect", out],
        ["verify", sound, out, "--device", "cpu"],
    ):
        assert run(*command).exit_code in (0, 1)
    assert not (tmp_path / "owned").exists()
    (out / cases.SHARDS[0]).unlink()
    for path in sound.glob("*.safetensors*"):
        path.unlink()
    result = run("convert", sound, tmp_path / "out2")
    assert result.exit_code == 3 and "never opened" in result.stderr
    assert not (tmp_path / "owned").exists()


def test_nothing_talks_to_a_network(sound: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Names in a config look like hub repositories."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a socket was asked for")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    edit_json(sound / CONFIG_NAME, _name_or_path="meta-llama/Llama-3-8B", auto_map={"AutoConfig": "a/b--c.D"})
    assert run("convert", sound, tmp_path / "out").exit_code == 0
    assert run("verify", sound, tmp_path / "out", "--device", "cpu").exit_code in (0, 1)


def test_nothing_is_written_outside_the_output(sound: Path, tmp_path: Path) -> None:
    """Whatever the index says, and wherever symlinks of the source lead."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text("mine")
    (sound / "link").symlink_to(tmp_path / "outside")
    (sound / "file").symlink_to(tmp_path / "outside" / "file")
    before = tree(tmp_path)
    assert run("convert", sound, tmp_path / "out").exit_code == 0
    after = tree(tmp_path)
    assert {name for name in after if name not in before} == {f"out/{name}" for name in tree(tmp_path / "out")}
    assert all(after[name] == content for name, content in before.items())
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644, 0o444])
def test_permissions_are_never_wider_than_the_source(mode: int, sound: Path, tmp_path: Path) -> None:
    """File by file, whatever the umask; while it is written, nobody else can read it."""
    for path in sound.iterdir():
        path.chmod(mode)
    seen: list[int] = []

    def watch(*_: int) -> None:
        seen.extend(path.stat().st_mode & 0o077 for path in tmp_path.glob(".out.rewrite-*/part-*"))

    umask = os.umask(0)
    try:
        rewrite.convert(sound, tmp_path / "out", workers=1, progress=watch)
    finally:
        os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {mode}
    assert seen and not any(seen)


# --- scale


@pytest.mark.slow
def test_a_thousand_shards_and_half_a_million_tensors(tmp_path: Path) -> None:
    """Planned and converted (sparse files) with 500 MB to plan and 256 file descriptors."""
    large(tmp_path / "in", shards=1000, tensors=500)
    script = (
        "import sys, pathlib, resource, time, json, rewrite\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))\n"
        "peak = lambda: int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1]) // 1024\n"
        "started = time.monotonic()\n"
        "plan = rewrite.make_plan(rewrite.open_checkpoint(sys.argv[1]))\n"
        "planned, memory = time.monotonic() - started, peak()\n"
        "rewrite.publish_plan(plan, pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), workers=4)\n"
        "print(json.dumps([planned, memory, time.monotonic() - started, peak()]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "in"), str(tmp_path / "out")],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    planned, plan_memory, total, memory = json.loads(done.stdout)
    print(f"planned in {planned:.1f} s with {plan_memory} MB, converted in {total:.1f} s with {memory} MB")
    assert plan_memory < 500
    assert memory < 600
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 1000


def large(directory: Path, shards: int, tensors: int) -> None:
    """A checkpoint of many small sparse shards, a fused group in each tenth of them."""
    directory.mkdir()
    config = json.loads(cases.sound()[CONFIG_NAME])
    config["quantization_config"]["ignore"] = [*config["quantization_config"].get("ignore", ()), "re:.*experts.*"]
    (directory / CONFIG_NAME).write_text(json.dumps(config))
    weight_map: dict[str, str] = {}
    for i in range(shards):
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        entries: dict[str, tuple[str, list[int], int]] = {}
        if i % 10 == 0:
            for part, rows in (("qkv", 24), ("z", 8)):
                module = f"model.language_model.layers.{i}.linear_attn.in_proj_{part}"
                entries[f"{module}.weight_scale"] = ("F32", [1], 4)
                entries[f"{module}.input_scale"] = ("F32", [1], 4)
                entries[f"{module}.weight"] = ("F8_E4M3", [rows, 4], rows * 4)
        for j in range(tensors - len(entries)):
            entries[f"model.language_model.layers.{i}.mlp.experts.{j}.gate_proj.weight"] = ("BF16", [64, 32], 4096)
        header: dict[str, dict[str, Any]] = {}
        end = 0
        for tensor, (dtype, shape, size) in entries.items():
            header[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
            weight_map[tensor] = name
            end += size
        raw = json.dumps(header).encode()
        with (directory / name).open("wb") as file:
            file.write(struct.pack("<Q", len(raw)) + raw)
            for tensor in entries:
                if tensor.endswith("_scale"):
                    file.seek(8 + len(raw) + header[tensor]["data_offsets"][0])
                    file.write(struct.pack("<f", 0.5))
            file.truncate(8 + len(raw) + end)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / INDEX_NAME).write_text(json.dumps(index))


def test_no_file_stays_open(sound: Path, tmp_path: Path) -> None:
    """Neither after success nor after a refusal."""
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - a Path would open one itself
    rewrite.convert(sound, tmp_path / "out")
    (sound / cases.SHARDS[0]).write_bytes(b"")
    with pytest.raises(rewrite.HeaderError):
        rewrite.convert(sound, tmp_path / "out2")
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > before
