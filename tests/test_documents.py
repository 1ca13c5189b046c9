"""The documents are true: commands print what is shown, Python runs, links lead somewhere, every option is described.

What a code block of a document stands for:

- lines ``$ rewrite …`` and what follows them: the command is run, and must print this. A line ``...`` stands for any
  lines. Times, and how many bytes were shared or copied, depend on the machine and are not compared. ``$ echo $?`` is
  the exit code of the command before it.
- ``sh`` without ``$``: not run, as it names what is not here. Its ``rewrite`` commands must parse.
- ``python``: run.

Each document has a directory of its own, where its commands and its Python run in order and find ``tests/``.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from rewrite.cli.commands import main

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("*.md", "rewrite/**/*.md", "scripts/**/*.md", "tests/**/*.md")
    for path in ROOT.glob(folder)
)
REFERENCE = "rewrite/cli/README.md"
MAX_README = 5000
_FENCE = re.compile(r"^(```+)[ \t]*(\w*)[^\n]*\n(.*?)^\1[ \t]*$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^()\s]+)\)")
_CODE = re.compile(r"`([^`\n]+)`")
_OF_THE_MACHINE = re.compile(r"\s\d+\.\d\s+s;\s[^;]+?\sshared,\s[^;]+?\scopied,\s+([^;,]+?)\s+written")


@dataclass(frozen=True)
class Block:
    """A code block: its language ("" for none) and its text."""

    language: str
    text: str


def blocks(text: str) -> list[Block]:
    return [Block(language, body) for _, language, body in _FENCE.findall(text)]


def prose(text: str) -> str:
    """All but the code blocks."""
    return _FENCE.sub("", text)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory to run commands in. What a GPU would print is not what documents show."""
    import torch

    (tmp_path / "tests").symlink_to(ROOT / "tests")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return tmp_path


# --- what is run


def shown_commands(text: str) -> Iterator[tuple[str, str]]:
    """Every command after a ``$``, with what is shown to follow it."""
    for block in blocks(text):
        for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            yield command, output


def wrong_output(text: str) -> list[str]:
    """Runs the commands of a document, here. What differs from what they print."""
    wrong = []
    code = 0
    for command, shown in shown_commands(text):
        words = shlex.split(command)
        if command == "echo $?":
            printed = f"{code}\n"
        elif words[0] == "rewrite":
            result = CliRunner().invoke(main, words[1:])
            code, printed = result.exit_code, result.output
        else:
            wrong.append(f"$ {command}: not a command that this test can run")
            continue
        if not matches(shown, printed):
            wrong.append(f"$ {command}\n--- shown\n{shown}--- printed\n{printed}")
    return wrong


def matches(shown: str, printed: str) -> bool:
    """Whether ``shown`` is what was ``printed``; a line ``...`` of it stands for any lines."""
    lines = (
        r"(?:.*\n)*" if line.strip() == "..." else re.escape(line.rstrip()) + r"\n"
        for line in _machine_left_out(shown).splitlines()
    )
    return re.fullmatch("".join(lines), _machine_left_out(printed)) is not None


def _machine_left_out(text: str) -> str:
    """Where a line is folded there depends on these numbers, too."""
    return _OF_THE_MACHINE.sub(lambda found: f" # s; # shared, # copied, {' '.join(found[1].split())} written", text)


@pytest.mark.parametrize("name", [n for n in DOCUMENTS if list(shown_commands((ROOT / n).read_text()))])
def test_commands_print_what_is_shown(name: str, workplace: Path) -> None:
    """All of them, in order."""
    assert wrong_output((ROOT / name).read_text()) == []


@pytest.mark.parametrize(
    "name", [n for n in DOCUMENTS if any(b.language == "python" for b in blocks((ROOT / n).read_text()))]
)
def test_python_runs(name: str, workplace: Path) -> None:
    """All blocks of a document, in order, in one module."""
    run_python((ROOT / name).read_text(), name)


def run_python(text: str, name: str) -> None:
    variables: dict[str, Any] = {}
    for block in blocks(text):
        if block.language == "python":
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                exec(compile(block.text, name, "exec"), variables)


# --- commands that are not run, and options


def commands_in_scripts(text: str) -> Iterator[list[str]]:
    """The words after ``rewrite`` of every command in ``sh`` blocks, up to what the shell does with it."""
    for block in blocks(text):
        for line in block.text.splitlines() if block.language == "sh" else ():
            words = shlex.split(line, comments=True)
            if words[:1] == ["rewrite"]:
                end = next((i for i, word in enumerate(words) if word in ("||", "&&", "|", ">")), len(words))
                yield words[1:end]


def commands_in_sentences(text: str) -> Iterator[list[str]]:
    """The same of ``rewrite …`` within a sentence. It may leave out which checkpoint: ``rewrite convert --copy``."""
    for span in _CODE.findall(prose(text)):
        words = shlex.split(span) if span.startswith("rewrite ") else []
        if len(words) > 1 and words[1] in main.commands:
            named = [word for word in words[2:] if word.isupper()]
            taken = sum(isinstance(each, click.Argument) for each in main.commands[words[1]].params)
            yield [*words[1:], *([] if named else ["IN", "OUT"][:taken])]


def wrong_calls(text: str) -> list[str]:
    """Commands that click does not understand."""
    wrong = []
    for name, *words in [*commands_in_scripts(text), *commands_in_sentences(text)]:
        try:
            if name not in main.commands:
                raise click.UsageError("no such command")
            main.commands[name].make_context(name, words.copy())
        except click.ClickException as error:
            wrong.append(f"rewrite {name} {' '.join(words)}: {error.message}")
    return wrong


def options_of(command: click.Command) -> set[str]:
    options = (parameter for parameter in command.params if isinstance(parameter, click.Option))
    return {name for option in options for name in (*option.opts, *option.secondary_opts)}


def unknown_options(text: str) -> list[str]:
    """``--options`` in sentences that no command of ours has."""
    known = {"--help", "--version"}.union(*map(options_of, main.commands.values()))
    spans = (span for span in _CODE.findall(prose(text)) if span.startswith("--"))
    return [span for span in spans if span.split()[0] not in known]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_that_are_not_run_parse(name: str) -> None:
    """With every option that they show."""
    assert wrong_calls((ROOT / name).read_text()) == []


@pytest.mark.parametrize("name", [n for n in DOCUMENTS if n == "README.md" or n.startswith("rewrite/")])
def test_options_in_sentences_exist(name: str) -> None:
    """Scripts have options of their own."""
    assert unknown_options((ROOT / name).read_text()) == []


def described_options(text: str, command: str) -> set[str]:
    """The options in the first column of the table in the section of ``command``."""
    section = re.search(rf"^## rewrite {command}$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    rows = re.findall(r"^\| (`-.*?) \| ", section.group(1), re.MULTILINE) if section else []
    return {word for row in rows for span in _CODE.findall(row) for word in span.split() if word.startswith("-")}


@pytest.mark.parametrize("command", main.commands.values(), ids=lambda command: command.name)
def test_the_reference_describes_every_option(command: click.Command) -> None:
    """And no others."""
    assert described_options((ROOT / REFERENCE).read_text(), str(command.name)) == options_of(command)


# --- links and names


def anchors(text: str) -> set[str]:
    """What GitHub makes of the headings. Two of the same words get numbers there: we have none."""
    headings = re.findall(r"^#+ +(.*?) *$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(text: str, name: str) -> list[str]:
    """Relative links of the document ``name`` that lead to no file, or to no heading in it."""
    dead = []
    for link in _LINK.findall(_CODE.sub("", prose(text))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        exists = target.exists() and target.resolve().is_relative_to(ROOT)
        if not exists or (anchor and anchor not in anchors(target.read_text() if path else text)):
            dead.append(link)
    return dead


def missing_files(text: str) -> list[str]:
    """Names of our files in sentences that no file has: paths from the root, and ``test_….py``."""
    missing = []
    for span in _CODE.findall(prose(text)):
        if re.fullmatch(r"(?:rewrite|scripts|tests)/[\w./*-]+", span) and not list(ROOT.glob(span.rstrip("/"))):
            missing.append(span)
        if re.fullmatch(r"test_\w+\.py", span) and not list((ROOT / "tests").rglob(span)):
            missing.append(span)
    return missing


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    """To a file of the repository, and to a heading in it."""
    assert dead_links((ROOT / name).read_text(), name) == []


@pytest.mark.parametrize("name", [n for n in DOCUMENTS if n != "CHANGELOG.md"])
def test_files_that_are_named_exist(name: str) -> None:
    """The changelog may name what is gone."""
    assert missing_files((ROOT / name).read_text()) == []


# --- the README


def test_the_readme_is_short() -> None:
    """A newcomer's first five minutes."""
    assert (ROOT / "README.md").stat().st_size <= MAX_README


def test_the_number_of_recorded_loads_is_right() -> None:
    """As the README of the loaders says it."""
    cells = json.loads((ROOT / "tests/loader_matrix.json").read_text())["cells"]
    loads = [cell for cell in cells if cell["outcome"] != "not run"]
    versions = {(cell["engine"], cell["version"]) for cell in loads}
    text = (ROOT / "rewrite/loaders/README.md").read_text()
    assert f"The record has {len(loads)} loads by {len(versions)} engine versions." in text


# --- the tests above can fail


_TEXT = """# A heading
See [it](#a-heading), `--profile`, `rewrite convert IN OUT --copy`, `tests/test_documents.py`.

```
$ rewrite convert tests/fixtures/llmcompressor-qwen3_5-text OUT
...
OUT: 246 kB in 0.0 s; 0 bytes shared, 221 kB copied, 30.9 kB written.
$ echo $?
0
```
"""


def test_a_document_that_is_right_passes(workplace: Path) -> None:
    """What the next tests break."""
    found = [wrong_output(_TEXT), wrong_calls(_TEXT), unknown_options(_TEXT), missing_files(_TEXT)]
    assert [*found, dead_links(_TEXT, "README.md")] == [[]] * 5


@pytest.mark.parametrize(
    ("old", "new"),
    [("246 kB", "247 kB"), ("\n0\n", "\n1\n"), ("...\n", ""), ("written.\n", "written.\nMore.\n"), ("$ echo", "$ ls")],
)
def test_output_that_is_wrong_is_found(old: str, new: str, workplace: Path) -> None:
    """A number, an exit code, a line too few, a line too many, a command that cannot be checked."""
    assert _TEXT.count(old) == 1
    assert len(wrong_output(_TEXT.replace(old, new))) == 1


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("#a-heading", "#no-heading"),
        ("(#a-heading)", "(no/file.md)"),
        ("(#a-heading)", "(rewrite/cli/README.md#no-heading)"),
        ("`--profile`", "`--profil`"),
        ("OUT --copy", "OUT --kopie"),
        ("rewrite convert IN", "rewrite convert --workers 0 IN"),
        ("tests/test_documents.py", "tests/test_nothing.py"),
        ("tests/test_documents.py", "test_nothing.py"),
    ],
)
def test_links_options_and_names_that_are_wrong_are_found(old: str, new: str) -> None:
    """Each by one of the checks."""
    text = _TEXT.replace(old, new)
    found = [wrong_calls(text), unknown_options(text), missing_files(text), dead_links(text, "README.md")]
    assert sum(map(len, found)) == 1


def test_python_that_fails_is_found() -> None:
    """An exception of a block is one of the test."""
    with pytest.raises(ZeroDivisionError):
        run_python("```python\n1 / 0\n```\n", "README.md")


def test_an_option_that_is_not_described_is_found() -> None:
    """A row that goes missing in the reference."""
    text = (ROOT / REFERENCE).read_text()
    row = next(line for line in text.splitlines(keepends=True) if line.startswith("| `--copy`"))
    assert described_options(text, "convert") - described_options(text.replace(row, ""), "convert") == {"--copy"}
