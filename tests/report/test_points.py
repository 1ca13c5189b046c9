"""Names to layers, values to points: what charts and tables are made from."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from rewrite.report.layers import Position, kinds, position
from rewrite.report.names import Names
from rewrite.report.page import MOST_ROWS, Table, clean, limited, shorten
from rewrite.report.points import Point, Series, gather, merge
from rewrite.report.scales import section
from tests.report.samples import group


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.language_model.layers.12.mlp.experts.7.gate_proj", Position("model.language_model.layers", 12)),
        ("mtp.layers.0.self_attn.qkv_proj", Position("mtp.layers", 0)),
        ("3.weight", Position("", 3)),
        ("lm_head", Position("", None)),
        ("layer12.q", Position("", None)),
        ("layers.99999999999.q", Position("", None)),
    ],
)
def test_the_first_number_of_a_name_is_its_layer(name: str, expected: Position) -> None:
    """Not that of an expert, and not digits within a word."""
    assert position(name) == expected


def test_kinds_are_told_apart_by_their_stack() -> None:
    """The same layer of two stacks is two charts, and their titles differ."""
    names = ["model.layers.0.qkv_proj", "model.layers.1.qkv_proj", "mtp.layers.0.qkv_proj", "model.layers.0.o"]
    found = kinds(names, str, lambda name: name.rpartition(".")[2])
    assert [(k.title, len(k.members)) for k in found] == [
        ("qkv_proj of model.layers", 2), ("qkv_proj of mtp.layers", 1), ("o", 1),
    ]  # fmt: skip


def test_values_of_a_layer_are_one_point() -> None:
    """Smallest, median, largest; what a log axis cannot show is counted, not dropped in silence."""
    values = [(0, 3.0), (0, 1.0), (0, 2.0), (1, 5.0), (None, 1.0), (1, 0.0), (1, -1.0), (1, math.nan), (2, math.inf)]
    found = gather("q", values)
    assert found.series.points == (Point(0, 1.0, 2.0, 3.0, 3), Point(1, 5.0, 5.0, 5.0, 1))
    assert (found.odd, found.unplaced) == (4, 1)
    assert found.series.is_band


def test_zero_counts_where_it_is_a_value() -> None:
    """And so does what rounding leaves of it."""
    found = gather("OUT", [(0, 0.0), (1, 1e-15), (2, 1e-3)], zero=True)
    assert [point.middle for point in found.series.points] == [0.0, 0.0, 1e-3]
    assert found.odd == 0


def test_equal_series_are_one() -> None:
    """q, k and v share a scale: three lines in one place would look like one, of v."""
    point = (Point(0, 1.0, 1.0, 1.0),)
    assert [s.name for s in merge([Series("q", point), Series("k", point), Series("z", ())])] == ["q, k"]
    assert merge([Series("IN, old", point), Series("OUT", point)])[0].name == "IN, old; OUT"


def test_what_is_left_out_is_said() -> None:
    """How many rows, and where all of them are."""
    table = Table("All", ("row",), tuple((str(i),) for i in range(MOST_ROWS + 5)), "Each row.")
    shown = limited(table, "there")
    assert shown.rows == table.rows[:MOST_ROWS]
    assert shown.note == f"Each row. The first {MOST_ROWS} of {MOST_ROWS + 5} rows; 5 are left out: there."
    assert limited(replace(table, note=""), "there").note.startswith("The first ")
    few = replace(table, rows=table.rows[:MOST_ROWS])
    assert limited(few, "there") == few


def test_partitions_that_are_not_drawn_are_counted() -> None:
    """A chart has eight lines at most."""
    scales = {f"p{i}": 1e-4 * (i + 1) for i in range(20)}
    found = section([group("model.layers.0.wide", scales)], "IN", "the JSON lists every group")
    assert "wide: 8 of 20 partitions are drawn." in found.text
    assert len(found.tables[0].rows[0]) == 2 + 20 + 1


def test_scales_that_cannot_be_drawn_are_counted() -> None:
    """Zero, negative, not finite: in the table, and in a sentence."""
    groups = [group(f"model.layers.{i}.odd", {"q": 1e-3, "k": value}) for i, value in enumerate([0.0, -1.0, math.nan])]
    found = section(groups, "IN", "there")
    assert "odd: 3 scales are not finite numbers above 0, and not drawn." in found.text
    assert [row[3] for row in found.tables[0].rows] == ["0", "-1", "nan"]


def test_names_are_cleaned() -> None:
    """Nothing that turns the direction of writing, ends a line or has no end."""
    assert clean("a\u202eb\n") == r"a\u202eb\n"
    assert clean("\udcff") == r"\udcff"
    assert clean("x" * 400).endswith("x… (400 characters)")
    assert shorten("a" * 60 + ".q", 10) == "…aaaaaaa.q"


def test_paths_become_names() -> None:
    """As they were given and absolute; words that only look like them stay."""
    names = Names({"/data/models/out": "out", "../in": "in", "weights": "w"})
    assert names.hide("/data/models/out/model.safetensors: broken") == "out/model.safetensors: broken"
    assert names.hide("/data/models/output: weights of /data/models/out") == "/data/models/output: weights of out"
    assert names.hide("where: ../in") == "where: in"
    assert names.hide("a weights b") == "a weights b"
