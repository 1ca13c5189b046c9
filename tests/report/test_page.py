"""The page and the Markdown: what they say, that they load nothing, and that no name is more than text."""

from __future__ import annotations

import re
import time
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from markdown_it import MarkdownIt

from rewrite.report import render
from rewrite.report.page import Page
from rewrite.verification.result import Check, Settings
from tests.report import samples

VOID = {"meta", "link", "br"}
NAMESPACES = ("http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink")


class Parsed(HTMLParser):
    """The tags with their attributes, all text outside styles, and what is not closed as it should be."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.wrong: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        self.wrong += self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open.pop() != tag:
            self.wrong.append(f"/{tag}")

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.text.append(data)

    @property
    def said(self) -> str:
        return " ".join(" ".join(self.text).split())


def verified() -> Page:
    groups = tuple(samples.group(f"model.layers.{i}.a.in_proj_qkvz", {"q": 1e-3, "z": 1e-4}) for i in range(3))
    rows = tuple(samples.numbers(g.name, p, 21.0 if p == "q" else 0.0) for g in groups for p in "qz")
    source = samples.inspection(groups)
    return samples.of_verification(samples.verification(rows), source, source)


REPORTS = {
    "verified": verified(),
    "hostile": samples.of_verification(*samples.hostile()),
    "hostile, inspected": samples.of_inspection(samples.hostile()[1]),
    "nothing fused": samples.of_inspection(samples.inspection(())),
}


@pytest.mark.parametrize("report", REPORTS.values(), ids=REPORTS)
def test_a_page_is_whole_and_loads_nothing(report: Page) -> None:
    """Every element is closed; no script, no handler, no address but within the page; a policy that says so."""
    found = Parsed(render.html(report))
    assert found.wrong == []
    assert not {tag for tag, _ in found.tags} & {"script", "iframe", "object", "embed", "img", "base", "form", "input"}
    for tag, attributes in found.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("href", "src", "xlink:href", "action", "srcset", "poster", "data"):
                assert value is not None
                assert value.startswith(("#", "data:,")), (tag, value)
            if name.startswith("xmlns"):
                assert value in NAMESPACES
            if name == "style":
                assert "url(" not in (value or "")
    policy = next(a["content"] for tag, a in found.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none';")


@pytest.mark.parametrize("report", REPORTS.values(), ids=REPORTS)
def test_a_page_can_be_read_without_seeing_it(report: Page) -> None:
    """Headings in order, charts with words, tables with headers, identifiers that are one of a kind."""
    found = Parsed(render.html(report))
    levels = [int(tag[1]) for tag, _ in found.tags if re.fullmatch("h[1-6]", tag)]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    names = [a["id"] for _, a in found.tags if "id" in a]
    assert len(names) == len(set(names))
    for tag, attributes in found.tags:
        if tag == "svg":
            assert attributes["role"] == "img"
            assert attributes["aria-labelledby"] in names
        if tag == "th":
            assert attributes["scope"] in ("row", "col")
    assert dict(found.tags)["html"]["lang"] == "en"


def test_hostile_names_are_text() -> None:
    """Each of them, letter by letter where it can be shown, escaped where it cannot."""
    for report in (REPORTS["hostile"], REPORTS["hostile, inspected"]):
        said = Parsed(render.html(report)).said
        assert "<script>alert(1)</script>" in said
        assert '"]]><img src=x onerror=alert(2)>' in said
        assert "\\u202egnp.exe" in said
        assert "$x^2$" in said
        assert "_hidden_ 100% *bold*" in said
        assert "{{ 7 * 7 }}{% raw %}" in said
        assert "\u202e" not in said
        assert "\x1b" not in said


@pytest.mark.parametrize("report", REPORTS.values(), ids=REPORTS)
def test_names_are_text_in_markdown(report: Page) -> None:
    """As a renderer reads it: no element but folds, no link, no image but ours; the rows of tables stay rows."""
    text, images = render.markdown(report, "my report")
    markdown = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    shown: list[str] = []
    for token in markdown.parse(text):
        if token.type == "html_block":
            left = re.sub(r"</?details>|</?summary>", "", token.content)
            assert "<" not in left, token.content
        for child in token.children or ():
            assert child.type not in ("html_inline", "link_open", "s_open"), child
            if child.type == "image":
                shown.append(str(child.attrs["src"]))
    assert sorted(shown) == sorted(name.replace(" ", "%20") for name in images)
    assert all(image.startswith(b"<?xml") for image in images.values())
    assert not re.search(r"(?<!\\)[$@]|(?<=\w)://", re.sub(r"`[^`\n]*`|<summary>.*", "", text))


def test_a_page_says_what_was_found() -> None:
    """The verdict as a word, errors before and after, where numbers are from, and how to do it again."""
    said = Parsed(render.html(verified())).said
    assert "VERIFIED out is verified." in said
    assert "IN, vLLM 0.17.0 to 0.19.1: 21; IN, fixed engines: 0.01; OUT, fixed engines: 0." in said
    assert "This run started no engine." in said
    assert "rewrite verify IN OUT --report report.html" in said
    assert "0" * 64 in said
    assert "a remark" in said
    assert "/somewhere" not in said


def test_what_was_not_done_is_said() -> None:
    """A failure, checks that were skipped or asked less, numbers and digests that are not there, an OUT that cannot be
    opened."""
    checks = (
        Check("structure", "FAILED", "1 problem", ("/somewhere/out/model.safetensors: broken",)),
        Check("untouched", "skipped", "OUT cannot be opened"),
        Check("weights", "ok", "a sample", left_out="other rows"),
        Check("outputs", "skipped", "--weights-only: nothing was multiplied"),
        Check("engines", "skipped", "OUT cannot be opened"),
    )
    found = samples.verification((), checks=checks, loaders=(), digests=None)
    report = samples.of_verification(found, None)
    said = Parsed(render.html(report)).said
    assert report.word == "FAILED"
    assert "out FAILED: structure." in said
    assert "out/model.safetensors: broken" in said
    assert "/somewhere" not in said
    assert "Not checked: untouched, other rows, outputs, engines." in said
    assert "Not measured. --weights-only: nothing was multiplied." in said
    assert "Not known: it cannot be opened." in said
    assert "SHA-256 of the files: not noted; OUT cannot be opened." in said
    assert "not known: not read from the hub" in said
    assert "| weights | ok | a sample; not checked: other rows |" in render.markdown(report, "report")[0]


def test_a_verdict_in_part_is_not_a_whole_one() -> None:
    """Green is for what was checked in full."""
    checks = (Check("structure", "ok", ""), Check("untouched", "skipped", "--quick"))
    settings = Settings("cpu", 32, 0, "fixed", quick=True)
    report = samples.of_verification(samples.verification((), checks=checks, settings=settings, digests=None), None)
    assert (report.word, report.tone) == ("VERIFIED IN PART", "part")
    said = Parsed(render.html(report)).said
    assert "not all bytes were read" in said


def test_a_checkpoint_without_fused_groups() -> None:
    """It is not called unaffected: there was nothing to judge."""
    report = REPORTS["nothing fused"]
    assert (report.word, report.tone) == ("NOTHING TO JUDGE", "part")
    said = Parsed(render.html(report)).said
    assert "Nothing is drawn: the checkpoint has no fused groups of the kinds that were looked at." in said


@pytest.mark.slow
def test_a_large_model_stays_legible() -> None:
    """60 layers of 2,000 experts, four times as many as are published: below 3 MB, in bounded time, and whatever is not
    shown is said."""
    found, source = samples.large()
    started = time.process_time()
    report = samples.of_verification(found, source)
    text = render.html(report)
    assert time.process_time() - started < 20
    assert len(text.encode()) < 3_000_000
    said = Parsed(text).said
    assert "240,180 partitions by layer" in said
    assert "120,045 groups by layer" in said
    assert "The first 600 of 1,000 rows; 400 are left out: rewrite verify IN OUT --json lists all of them" in said
    assert "Line: median" in said
    markdown, images = render.markdown(report, "report")
    assert len(markdown.encode()) + sum(map(len, images.values())) < 3_000_000
    assert len(render.html(samples.of_inspection(source)).encode()) < 3_000_000
