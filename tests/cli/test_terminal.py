"""A page on a terminal: paragraphs, tables flat, folded and as lists; what a terminal gets, and what a pipe."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.text import Text

from rewrite.cli.commands import main
from rewrite.cli.terminal import page_lines, table_lines
from rewrite.errors import printable
from rewrite.report.page import Cell, Colored, Page, Section, Table, whole
from tests.support import FIXTURES, README, edit_json, raw_tensors, unfolded, write_shard

NAMES = sorted(path.parent.name for path in FIXTURES.glob("*/config.json"))
VL = FIXTURES / "llmcompressor-qwen3_5-vl"
_CODE = re.compile(r"\x1b\[[0-9;]*m")


def plain(lines: Sequence[Text]) -> str:
    return "\n".join(line.plain for line in lines)


def shown(rows: Sequence[Sequence[Cell]], width: int, head: Sequence[str], **how: int) -> str:
    return plain(table_lines(Table("", tuple(head), tuple(map(tuple, rows)), **how), width))  # type: ignore[arg-type]


def paragraph(text: Cell, width: int) -> list[Text]:
    return page_lines(Page("", "", "", "", "", (Section("", (text,), brief=True),)), width)


HEAD = ["name", "as it is", "why"]
ROWS = [["first", "garbled", "a reason that takes some words more"], ["second", "-", ""]]


def test_a_table_that_fits_is_flat() -> None:
    """Its last column is wrapped."""
    assert shown(ROWS, 46, HEAD) == (
        "name    as it is  why\n"
        "first   garbled   a reason that takes some\n"
        "                  words more\n"
        "second  -"
    )  # fmt: skip


def test_a_table_that_is_too_wide_is_folded() -> None:
    """Numbers stay below each other; a label is said once."""
    rows = [["model.layers.0", "1", "20"], ["model.layers.0", "3", "4"], ["model.layers.1", "300", "4"]]
    assert shown(rows, 20, ["group", "q", "k"], numbers=1) == (
        "group\n    q   k\nmodel.layers.0\n    1  20\n    3   4\nmodel.layers.1\n  300   4"
    )


def test_where_nothing_else_fits_each_cell_is_a_line() -> None:
    assert shown([["first", "garbled", "a reason that takes words"]], 18, HEAD) == (
        "name\n  as it is\n  why\nfirst\n  garbled\n  a reason that\n    takes words"
    )


_WORDS = st.text(st.sampled_from("ab語é\u0301:,-\x1b\n "), max_size=30).map(lambda text: text.strip(" "))


_OPTION = re.compile("(--[a-z]+(?:-[a-z]+)*) (?=[a-z])")


def words(cell: str) -> list[str]:
    """What no line may break: an option and its value are one word. Of these alphabets nothing else is."""
    return [printable(word.replace("\0", " ")) for word in _OPTION.sub(r"\1\0", cell).split(" ")]


@given(st.data(), st.integers(1, 5), st.integers(1, 60))
def test_no_line_is_wider_than_the_width_but_for_one_word(data: st.DataObject, columns: int, width: int) -> None:
    """In every layout, whatever the cells; and no word of a cell is lost."""
    cells = st.lists(_WORDS, min_size=columns + 1, max_size=columns + 1)
    head, rows = data.draw(cells), data.draw(st.lists(cells, min_size=1, max_size=4))
    how = {"labels": data.draw(st.integers(1, columns)), "numbers": data.draw(st.integers(1, columns + 1))}
    check_table(head, rows, how, width)


def test_an_option_and_its_value_are_one_word() -> None:
    """A person copies them."""
    check_table(["", ""], [["", "--a a:"]], {"labels": 1, "numbers": 1}, 1)
    assert [line.plain for line in paragraph("use --profile exact", 8)] == ["use", "  --profile exact"]


def check_table(head: list[str], rows: list[list[str]], how: dict[str, int], width: int) -> None:
    lines = table_lines(Table("", tuple(head), tuple(map(tuple, rows)), **how), width)  # type: ignore[arg-type]
    longest = max(cell_len(word) for row in [head, *rows] for cell in row for word in words(cell))
    assert max((line.cell_len for line in lines), default=0) <= max(width, longest + 4)  # it may be indented twice
    text = unfolded(plain(lines))
    assert all(word in text for row in rows for cell in row for word in words(cell))


@given(_WORDS, st.integers(5, 40))
def test_paragraphs_keep_their_width_and_words(text: str, width: int) -> None:
    lines = paragraph(text, width)
    longest = max(map(cell_len, words(text)))
    assert max((line.cell_len for line in lines), default=0) <= max(width, longest + 2)
    assert all(line.plain.startswith("  ") for line in lines[1:])
    assert unfolded(plain(lines)) == " ".join(printable(text).split())


def test_what_a_person_copies_is_not_broken() -> None:
    """Paths with spaces, and what stands in backticks."""
    lines = paragraph(f"{whole('/a path/with spaces')} is `rewrite convert IN OUT` here", 12)
    assert [line.plain for line in lines] == ["/a path/with spaces", "  is", "  `rewrite convert IN OUT`", "  here"]


def test_wide_characters_take_two_columns() -> None:
    """Tables are aligned by what is seen."""
    assert shown([["語", "x"], ["e\u0301", "y"]], 80, ["a", "b"]) == "a   b\n語  x\ne\u0301   y"


def test_only_the_word_of_a_verdict_is_colored() -> None:
    """And what stands in a name is escaped."""
    (line,) = paragraph(Colored("garbled", ": \x1b[31mbad\n"), 80)
    assert line.plain == "garbled: \\x1b[31mbad\\n"
    assert [(span.start, span.end, span.style) for span in line.spans] == [(0, 7, "red")]


# --- every fixture


@pytest.mark.parametrize("name", NAMES)
def test_results_fit_80_columns(name: str, tmp_path: Path) -> None:
    """What commands print about every test checkpoint. Only what is copied may be longer."""
    source, out = FIXTURES / name, tmp_path / "out"
    for words in (
        ["inspect", str(source), "-v"],
        ["inspect", str(source), "--groups", "all", "--platform", "rocm", "--all-engines", "-v"],
        ["convert", str(source), str(out), "--dry-run", "--groups", "all"],
        ["convert", str(source), str(out), "--profile", "dequantized"],
        ["verify", str(source), str(out), "--tokens", "2", "--device", "cpu", "-v"],
        ["verify", str(source), str(source), "--for", "vllm@0.19.1", "--tokens", "2", "--device", "cpu"],
    ):
        output = CliRunner().invoke(main, words).output
        wide_lines = [line for line in output.splitlines() if cell_len(line) > 80 and not _is_copied(line, source, out)]
        assert wide_lines == []


@pytest.mark.parametrize("name", NAMES)
def test_the_answer_fits_a_screen(name: str) -> None:
    """24 lines, whatever is asked; the rest is for -v."""
    for words in ([], ["--groups", "all"]):
        lines = CliRunner().invoke(main, ["inspect", str(FIXTURES / name), *words]).output.splitlines()
        assert len(lines) <= 24


def _is_copied(line: str, *places: Path) -> bool:
    """A path, a module, a command: one word but for spaces, or what is said right after a path."""
    words = line.split()
    return len(words) == 1 or line.startswith("  rewrite ") or any(line.startswith(str(p)) for p in places)


# --- terminals


def on_a_terminal(
    *words: str | Path, columns: int = 80, environment: Mapping[str, str] | None = None, notes: bool = False
) -> str:
    """What the command writes to a terminal of that width, with ``notes`` on stderr, too."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    clean = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR", "FORCE_COLOR", "TERM")}
    child = subprocess.Popen(
        [sys.executable, "-m", "rewrite", *map(str, words)],
        stdout=theirs, stderr=theirs if notes else subprocess.DEVNULL,
        env={**clean, "TERM": "xterm", "PYTHONPATH": str(README.parent), **(environment or {})},
    )  # fmt: skip
    os.close(theirs)
    read = b""
    while True:
        try:
            read += os.read(ours, 1 << 16)
        except OSError:  # the other end is closed
            break
    os.close(ours)
    child.wait(timeout=30)
    return read.decode().replace("\r\n", "\n")


def test_a_note_does_not_run_into_the_bar(tmp_path: Path) -> None:
    """The bar begins after what has to be known before anything is written."""
    text = on_a_terminal("convert", VL, tmp_path / "out", notes=True)
    assert _CODE.sub("", text).startswith("note: profile exact")
    assert text.index("--profile dynamic.\n") < text.index("\x1b[?25l"), "the bar hides the cursor"


def test_what_is_one_thing_is_not_broken() -> None:
    """A number and its unit, an option and its value; a command that is shown has its spaces."""
    text = "For all of them use --profile dynamic, or --groups all, which takes 1.95 MB and no more than 2,000 bytes."
    for width in range(24, 60):
        shown_text = plain(paragraph(text, width))
        assert shown_text.split() == text.split()
        assert not re.search(r"(--profile|--groups|1.95|2,000)\n", shown_text)
    command = Page("", "", "", "", "", (Section("", command="rewrite inspect IN --groups all", brief=True),))
    assert plain(page_lines(command, 40)) == "  rewrite inspect IN --groups all"


def piped(*words: str | Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "rewrite", *map(str, words)], capture_output=True, check=False, text=True,
        env={**os.environ, "PYTHONPATH": str(README.parent), **environment},
    )  # fmt: skip
    return done.stdout


def test_a_terminal_gets_colors_and_its_width() -> None:
    """Never color alone: without it the words are the same."""
    words = ("inspect", VL, "-v", "--all-engines")
    at_80 = on_a_terminal(*words)
    assert "\x1b[31mgarbled\x1b[0m: k, v" in at_80 and "\x1b[32mexact\x1b[0m" in at_80
    assert _CODE.sub("", at_80) == piped(*words)
    wide = _CODE.sub("", on_a_terminal(*words, columns=200))
    assert "\nvLLM          0.20.0+ " in wide  # a flat table
    assert _CODE.sub("", on_a_terminal(*words, columns=50, environment={"COLUMNS": "200"})) == wide


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {"NO_COLOR": "1", "FORCE_COLOR": "1"}])
def test_no_colors_where_none_are_wanted(environment: dict[str, str]) -> None:
    assert "\x1b" not in on_a_terminal("inspect", VL, environment=environment)


def test_a_pipe_gets_no_colors_and_80_columns() -> None:
    """Whatever the environment says of columns; FORCE_COLOR is for those who want colors there."""
    plain_text = piped("inspect", VL)
    assert "\x1b" not in plain_text
    assert piped("inspect", VL, COLUMNS="200") == plain_text
    forced = piped("inspect", VL, FORCE_COLOR="1", TERM="xterm")
    assert "\x1b[33mloses precision\x1b[0m" in forced and _CODE.sub("", forced) == plain_text
    assert "\x1b" not in piped("inspect", VL, "--json", FORCE_COLOR="1")


def test_hostile_names_are_escaped_in_tables(tmp_path: Path) -> None:
    """Of tensors and of model types: nothing clears the screen, forges a line, or colors a verdict."""
    hostile = "model.\x1b[2J\nNo known loader is affected.\x1b[32m.weight_scale"
    for shard in VL.iterdir():
        (tmp_path / shard.name).write_bytes(shard.read_bytes())
    edit_json(tmp_path / "config.json", model_type="qwen3_5\x1b[2J\x9b2J")
    index = tmp_path / "model.safetensors.index.json"
    write_shard(tmp_path / "evil.safetensors", {hostile: ("BF16", (1,), b"\0\0")})
    edit_json(index, weight_map={**_weight_map(index), hostile: "evil.safetensors"})
    assert hostile in raw_tensors(tmp_path)
    for text in (on_a_terminal("inspect", tmp_path, "-v"), piped("inspect", tmp_path, FORCE_COLOR="1")):
        assert not {character for character in _CODE.sub("", text) if not character.isprintable()} - {"\n"}
        assert "\\x1b[2J\\nNo" in text and "\nNo known loader" not in text
        assert all(code in ("\x1b[31m", "\x1b[32m", "\x1b[33m", "\x1b[0m") for code in _CODE.findall(text))


def _weight_map(index: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads(index.read_text())["weight_map"]
    return found
