"""``verify --card``: a block in README.md of OUT that can be taken out again, byte for byte."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from huggingface_hub import ModelCard
from hypothesis import assume, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

import rewrite
from rewrite.card import BEGIN, END, MAX_BYTES, Keys, find, insert, new, remove
from rewrite.cli.commands import main
from rewrite.errors import StorageError
from rewrite.report.card import card as text_of
from rewrite.verification.result import CARD_REMARK, Check
from tests.integrations.conftest import hub  # noqa: F401 (a fixture)
from tests.report.samples import HOSTILE, verification
from tests.servers.hub import HubStub

KEYS = Keys("org/model", quantized=True)
OUR_LINES = b"base_model: org/model # rewrite\nbase_model_relation: quantized # rewrite\n"
BLOCK = BEGIN + b"\n\ntext\n\n" + END
READMES = {
    "empty": b"",
    "plain": b"# Model\n\nText.\n",
    "no line break at the end": b"# Model\n\nText.",
    "windows": b"---\r\nlicense: mit\r\n---\r\n# Model\r\n",
    "windows, none at the end": b"---\r\nlicense: mit\r\n---\r\n# Model",
    "byte order mark": b"\xef\xbb\xbf---\nlicense: mit\n---\n# Model\n",
    "not utf-8": b"# Mod\xe9l\n\xff\xfe",
    "old mac": b"# Model\rtext\r",
    "front matter": b"---\nlicense: mit\ntags:\n- fp8\n---\n\n# Model\n",
    "front matter only": b"---\nlicense: mit\n---",
    "front matter of comments": b"---\n# none\n\nlicense: mit\n---\n",
    "empty front matter": b"---\n---\n# Model\n",
    "a flow mapping": b"---\n{license: mit}\n---\n# Model\n",
    "unclosed": b"---\nlicense: mit\n",
    "behind a blank line": b"\n---\nlicense: mit\n---\n",
    "known model": b"---\nbase_model: other/model\n---\n# Model\n",
    "half of a marker": b"<!-- rewrite -->\n",
}
WITH_KEYS = {"empty", "plain", "no line break at the end", "windows", "windows, none at the end", "not utf-8"}
WITH_KEYS |= {"old mac", "front matter", "front matter only", "front matter of comments", "half of a marker"}
_PIECES = st.sampled_from(
    [b"---", b"\n", b"\r\n", b"\r", b"license: mit", b"# x", b" ", b"\xef\xbb\xbf", b"\xff", b"a"]
)
_ANY = st.one_of(
    st.binary(max_size=60), st.text(max_size=60).map(str.encode), st.lists(_PIECES, max_size=12).map(b"".join)
)
_ANY_KEYS = st.sampled_from([None, KEYS, Keys("a/b.c-d_e", quantized=False)])


@given(_ANY, st.text("ab \n<>-", max_size=20), _ANY_KEYS, _ANY_KEYS)
def test_what_is_put_in_comes_out_again(readme: bytes, text: str, keys: Keys | None, later: Keys | None) -> None:
    """Whatever the file is; and a second card replaces the first."""
    assume(BEGIN not in readme and END not in readme and b" # rewrite" not in readme)
    assume(BEGIN.decode() not in text and END.decode() not in text)
    once = insert(readme, text, keys)
    assert find(once) is not None
    assert remove(once) == readme
    assert insert(once, text, keys) == once
    again = insert(once, "other", later)
    assert remove(again) == readme
    if later is not None:
        assert again == insert(readme, "other", later)


@pytest.mark.parametrize("name", READMES)
def test_kinds_of_files(name: str) -> None:
    """Keys only where front matter is plain to read; all other bytes stay, line endings too."""
    readme = READMES[name]
    found = insert(readme, "text", KEYS)
    assert remove(found) == readme
    assert (b"base_model: org/model # rewrite" in found) == (name in WITH_KEYS)
    newline = b"\r\n" if name.startswith("windows") else b"\n"
    assert BLOCK.replace(b"\n", newline) in found
    assert found.endswith(END) != (readme.endswith(b"\n") or (not readme and name in WITH_KEYS))
    without = insert(readme, "text")
    assert without.startswith(readme)
    assert b"base_model: org" not in without


def test_the_bytes() -> None:
    """What is written, in full."""
    assert new("text") == BLOCK + b"\n"
    assert new("text", KEYS) == b"---\n" + OUR_LINES + b"---\n" + BLOCK + b"\n"
    assert remove(new("text", KEYS)) == remove(new("text")) == b""
    front = READMES["front matter"]
    assert insert(front, "text", KEYS) == b"---\n" + OUR_LINES + front[4:] + BLOCK + b"\n"
    assert insert(b"a", "text") == b"a\n" + BLOCK
    known = READMES["known model"]
    assert insert(known, "text", KEYS) == known + BLOCK + b"\n"


def test_a_card_is_replaced_where_it_is() -> None:
    """People may move it; it stays there."""
    moved = b"# Model\n" + BLOCK + b"\nText.\n"
    assert insert(moved, "other") == moved.replace(b"\n\ntext\n\n", b"\n\nother\n\n")
    assert remove(moved) == b"# Model\nText.\n"


@pytest.mark.parametrize(
    "readme",
    [
        BEGIN + b"\n",
        END + b"\n",
        END + b"\n" + BEGIN + b"\n",
        BLOCK + b"\n" + BLOCK + b"\n",
        BLOCK + b"\n" + END + b"\n",
        b"x " + BLOCK + b"\n",
        BLOCK + b" x\n",
        BEGIN + b" x\n" + END + b"\n",
        BEGIN + b"\nx " + END + b"\n",
        BEGIN + b"\r\n" + END + b"\n",
        b"a\n" + BEGIN + b"\r\n" + END,
    ],
)
def test_markers_that_are_not_in_order(readme: bytes) -> None:
    """Refused: what lies between them may be anybody's text."""
    for act in (find, remove, lambda raw: insert(raw, "text")):
        with pytest.raises(StorageError, match="not in order") as caught:
            act(readme)
        error = caught.value
        assert error.where and error.expected and error.found and error.hint


def test_a_text_with_a_marker_is_refused() -> None:
    """It would end the card too early."""
    with pytest.raises(StorageError, match="not in order"):
        insert(b"", END.decode())


def test_too_large() -> None:
    """The verification reads no more than that."""
    with pytest.raises(StorageError, match="too large"):
        insert(b"a" * MAX_BYTES, "text")


def test_hostile_names_are_text() -> None:
    """No markup, no marker, no second line comes from what was found."""
    names = (*HOSTILE, BEGIN.decode(), END.decode())
    checks = tuple(Check(name, "ok", name, left_out=name) for name in names)
    text = text_of(verification((), checks=checks), " ".join(names))
    insert(b"", text)
    rows = [line for line in text.split("\n") if line.startswith("| ")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) in (4, 5) for row in rows)
    assert not re.search(r"(?<!\\)[<`]", text)
    assert "\x1b" not in text
    assert "\u202e" not in text
    tokens = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(new(text).decode())
    inside = [each for token in tokens for each in [token, *(token.children or ())]]
    assert [each.content.strip() for each in inside if each.type.startswith("html")] == [BEGIN.decode(), END.decode()]
    assert not {each.type for each in inside} & {"link_open", "image", "code_inline", "fence", "em_open", "s_open"}
    assert sum(each.type == "heading_open" for each in inside) == 1


@pytest.mark.parametrize("readme", [b"", READMES["plain"], READMES["front matter"], READMES["windows"]])
def test_the_hub_reads_the_keys(readme: bytes) -> None:
    """By the code of its client; what was there is still read."""
    before, found = (ModelCard(raw.decode() or "# x\n").data for raw in (readme, insert(readme, "text", KEYS)))
    assert (found.get("base_model"), found.get("base_model_relation")) == ("org/model", "quantized")
    assert found.get("license") == before.get("license") == ("mit" if b"license" in readme else None)
    assert found.get("tags") == before.get("tags")


def test_verified_is_said_of_all_checks_only() -> None:
    """With anything left out the word is not there at all."""
    whole = verification(())
    assert "This checkpoint is verified." in text_of(whole, "Done.")
    for check in (
        Check("outputs", "skipped", "not run"),
        Check("structure", "ok", "good", left_out="what config says"),
    ):
        text = text_of(replace(whole, checks=(*whole.checks[:-1], check)), "Done.")
        assert "verified" not in text.lower()
        assert f"Not checked: {check.left_out or check.name}." in text


def test_no_paths_in_it() -> None:
    """And the remark about an earlier card is not repeated in the next: the same run gives the same bytes."""
    whole = verification(())
    checks = (Check("untouched", "ok", f"/somewhere/in and /somewhere/out{CARD_REMARK}"),)
    text = text_of(replace(whole, checks=checks), "Done.")
    assert "| untouched | ok | IN and OUT |" in text
    assert "somewhere" not in text
    assert "| vLLM | 0.17.0 to 0.19.1 | garbled | exact |" in text or "| vLLM | 0.17.0+ | garbled | exact |" in text
    assert f"rewrite {rewrite.__version__}" in text


def flat(result: Result) -> str:
    """Without the folds, which depend on the length of the path."""
    return " ".join(result.stdout.split())


def run(*words: object) -> Result:
    return CliRunner().invoke(main, ["verify", *map(str, words), "--tokens", "2", "--rows", "8"])


@pytest.fixture
def pair(text: Path, tmp_path: Path) -> tuple[Path, Path]:
    """IN with a README.md, and OUT."""
    source, out = tmp_path / "IN", tmp_path / "OUT"
    shutil.copytree(text, source)
    (source / "README.md").write_bytes(READMES["windows, none at the end"])
    rewrite.convert(source, out)
    return source, out


def test_a_card_then_verified_again(pair: tuple[Path, Path]) -> None:
    """Twice is once; the mode stays; IN does not change; nothing else lies in OUT; verify holds, and says what it did
    not look at."""
    source, out = pair
    readme = out / "README.md"
    before, files = readme.read_bytes(), sorted(path.name for path in out.iterdir())
    readme.chmod(0o640)
    for _ in range(2):
        assert flat(run(source, out, "--card", "-q")).startswith(f"{out} is verified.")
        assert readme.stat().st_mode & 0o777 == 0o640
        assert remove(readme.read_bytes()) == before == (source / "README.md").read_bytes()
        first = readme.read_bytes()
    assert readme.read_bytes() == first
    assert sorted(path.name for path in out.iterdir()) == files
    said = flat(run(source, out))
    assert "README.md has a card of rewrite, whose text was not checked" in said
    assert b"(profile exact, groups qkvz)" in first
    assert b"not checked" not in first
    assert not [path for path in (source, out) if str(path).encode() in first]


def test_what_differs_beside_the_card_fails(pair: tuple[Path, Path]) -> None:
    """One byte outside is enough; the text inside is not vouched for, and that is said."""
    source, out = pair
    readme = out / "README.md"
    assert run(source, out, "--card", "-q").exit_code == 0
    carded = readme.read_bytes()
    readme.write_bytes(carded.replace(b"is verified", b"is perfect"))
    result = run(source, out)
    assert result.exit_code == 0
    assert "whose text was not checked" in flat(result)
    for tampered in (
        carded.replace(b"# Model", b"# Moder"),
        carded + b"\r\nmore",
        b"x" + carded,
        carded.replace(b"license: mit", b"license: mit\r\nbase_model: a/b"),
        carded.replace(END, b""),
        carded + b"\r\n" + carded,
    ):
        readme.write_bytes(tampered)
        result = run(source, out, "--card")
        assert result.exit_code in (1, 4)
        assert readme.read_bytes() == tampered
        again = run(source, out)
        assert again.exit_code == 1
        assert "README.md: " in flat(again)
        assert "FAILED: untouched." in flat(again)
        assert "no card was written" in result.stderr or "not in order" in result.stderr


def test_a_readme_of_another_that_only_has_a_card_elsewhere(pair: tuple[Path, Path]) -> None:
    """IN may have a card of an earlier conversion: OUT's takes its place. One that is only gone is a difference."""
    source, out = pair
    old = insert((source / "README.md").read_bytes(), "of an earlier conversion")
    for folder in pair:
        (folder / "README.md").write_bytes(old)
    assert "card" not in run(source, out).stdout
    assert run(source, out, "--card", "-q").exit_code == 0
    assert b"earlier" not in (out / "README.md").read_bytes()
    assert run(source, out, "-q").exit_code == 0
    (out / "README.md").write_bytes(remove(old))
    assert "FAILED: untouched." in flat(run(source, out, "-q"))


def test_without_a_readme_one_is_made(text: Path, tmp_path: Path) -> None:
    """And nothing else may stand in it."""
    out = tmp_path / "OUT"
    rewrite.convert(text, out)
    readme = out / "README.md"
    for _ in range(2):
        assert run(text, out, "--card", "-q").exit_code == 0
        assert readme.read_bytes().startswith(BEGIN + b"\n")
        assert readme.read_bytes().endswith(END + b"\n")
    mask = os.umask(0)
    os.umask(mask)
    assert readme.stat().st_mode & 0o777 == 0o666 & ~mask
    assert run(text, out, "-q").exit_code == 0
    readme.write_bytes(readme.read_bytes() + b"more\n")
    assert "FAILED: untouched." in flat(run(text, out, "-q"))
    readme.write_bytes(b"" + BLOCK + b"a" * MAX_BYTES)
    assert "README.md: not in the source" in flat(run(text, out))


@pytest.mark.parametrize("profile", ["exact", "dequantized"])
def test_a_model_of_the_hub_is_named(hub: HubStub, text: Path, tmp_path: Path, profile: str) -> None:  # noqa: F811
    """As base model; as a quantized one where OUT is quantized."""
    commit, out = hub.add("org/model", text), tmp_path / "OUT"
    rewrite.convert(text, out, profile=profile)
    assert run("org/model", out, "--card", "-q").exit_code == 0
    card = (out / "README.md").read_text()
    relation = "base_model_relation: quantized # rewrite\n" if profile == "exact" else ""
    assert card.startswith(f"---\nbase_model: org/model # rewrite\n{relation}---\n{BEGIN.decode()}\n")
    assert f"org/model\\@{commit} on the Hugging Face hub" in card
    assert run("org/model", out, "-q").exit_code == 0
    assert run(text, out, "--card", "-q").exit_code == 0  # what this run does not know stays
    assert "base_model: org/model # rewrite" in (out / "README.md").read_text()


def test_a_card_of_checks_left_out(pair: tuple[Path, Path]) -> None:
    """Not called verified."""
    source, out = pair
    assert run(source, out, "--card", "--quick", "-q").exit_code == 0
    card = (out / "README.md").read_text()
    assert "verified" not in card.lower()
    assert "Not checked: untouched" in card
    assert (out / "README.md").read_bytes().startswith(b"---\r\nlicense: mit\r\n---\r\n# Model\r\n" + BEGIN)


def test_refused_before_any_work(tmp_path: Path) -> None:
    """No place for a card; digests that would not be true of what is then there; markers that are not in order. IN is
    never opened: there is none."""
    for out in ("hf://org/model", "s3://bucket/prefix", tmp_path / "none"):
        result = run(tmp_path / "IN", out, "--card")
        assert result.exit_code == 2
        assert "A card is written into a directory" in result.stderr
    (tmp_path / "OUT").mkdir()
    for words in (("--digest",), ("--attest", tmp_path / "a.json"), ("--report", tmp_path / "a.html")):
        result = run(tmp_path / "IN", tmp_path / "OUT", "--card", *words)
        assert result.exit_code == 2
        assert "--card changes README.md after its digest was taken" in result.stderr
    (tmp_path / "OUT/README.md").write_bytes(END)
    result = run(tmp_path / "IN", tmp_path / "OUT", "--card")
    assert result.exit_code == 4
    assert "not in order" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["OUT"]
    assert (tmp_path / "OUT/README.md").read_bytes() == END


def test_a_readme_that_changes_meanwhile_stays(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The verdict is about another file."""
    source, out = pair
    real = rewrite.verify

    def meddled(*words: object, **options: object) -> rewrite.Verification:
        found = real(*words, **options)  # type: ignore[arg-type]
        (out / "README.md").write_bytes(b"other")
        return found

    monkeypatch.setattr(rewrite, "verify", meddled)
    result = run(source, out, "--card")
    assert result.exit_code == 4
    assert "README.md changed while OUT was verified" in result.stderr
    assert (out / "README.md").read_bytes() == b"other"


def test_in_one_step(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it cannot be completed, the old one is there, and nothing else. Other names of the same file keep theirs:
    links into a cache are replaced, not followed."""
    source, out = pair
    readme, stored = out / "README.md", out.parent / "stored"
    before, files = readme.read_bytes(), sorted(out.iterdir())

    def full(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        result = run(source, out, "--card")
    assert result.exit_code == 4
    assert "No space left" in result.stderr
    assert readme.read_bytes() == before
    assert sorted(out.iterdir()) == files
    readme.rename(stored)
    readme.symlink_to(stored)
    assert run(source, out, "--card", "-q").exit_code == 0
    assert stored.read_bytes() == before
    assert remove(readme.read_bytes()) == before


def test_a_conversion_of_what_has_a_card_says_so(copy: Path, tmp_path: Path) -> None:
    """The card comes along as it is, and is about IN."""
    assert not [note for note in rewrite.make_plan(rewrite.open_checkpoint(copy)).manifest.notes if "card" in note]
    (copy / "README.md").write_bytes(new("old claims"))
    notes = rewrite.convert(copy, tmp_path / "out").notes
    assert any("has a card of rewrite, which is about IN" in note for note in notes)
    assert rewrite.verify(copy, tmp_path / "out", weights_only=True).ok
