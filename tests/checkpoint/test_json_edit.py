"""Editing JSON text: the value changes, and not one byte around it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewrite.checkpoint.json_edit import remove_member, replace_value

scalars = st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.floats(allow_nan=False)
values = st.recursive(scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=3))
objects = st.dictionaries(st.text(max_size=5), values, max_size=5)


@given(objects, objects, st.sampled_from([None, 1, 2, 4, "\t"]), st.booleans(), values)
def test_only_the_value_changes(before: Any, inner: Any, indent: Any, ascii_only: bool, new: Any) -> None:
    """At any place, in any style, whatever the neighbors hold."""
    document = {"a": before, "q": {"x": inner, "y": 1, "z": before}, "b": inner}
    text = json.dumps(document, indent=indent, ensure_ascii=ascii_only) + "\n"
    edited = replace_value(text, ("q", "y"), new)
    document["q"]["y"] = new
    assert json.loads(edited) == document
    head = text.index('"y": ', text.index('"q"')) + 5
    assert edited[:head] == text[:head] or '"y"' in json.dumps(inner) + json.dumps(before)


def test_number_spelling_order_and_spacing_survive() -> None:
    """json.dumps would write 1e-06, 100000.0 and drop the odd spacing."""
    text = '{\n  "eps": 1E-6,\n  "theta":1.0e5 ,\n  "q": {\n    "n": 1\n  },\n  "é": "\\u00e9"\n}'
    edited = replace_value(text, ("q",), {"n": [2]})
    assert edited == text.replace('{\n    "n": 1\n  }', '{\n    "n": [\n      2\n    ]\n  }')


def test_one_line_documents_stay_on_one_line() -> None:
    """Compact in, compact out."""
    assert replace_value('{"a":{"b":1},"c":2}', ("a", "b"), {"x": [1, 2]}) == '{"a":{"b":{"x":[1,2]}},"c":2}'


@given(objects, objects, st.sampled_from([None, 1, 2, 4, "\t"]), st.sampled_from(["first", "q", "last"]))
def test_a_member_goes_and_nothing_else(before: Any, inner: Any, indent: Any, gone: str) -> None:
    """Wherever it stands: first, between others, last, or alone."""
    document = {"first": before, "q": {"x": inner}, "last": inner}
    text = json.dumps(document, indent=indent)
    left = {key: value for key, value in document.items() if key != gone}
    assert remove_member(text, (gone,)) == json.dumps(left, indent=indent)
    assert json.loads(remove_member(text, ("q", "x"))) == {**document, "q": {}}


def test_a_member_goes_with_its_comma() -> None:
    """The spelling of what stays is kept, odd spacing too."""
    assert remove_member('{ "a" : 1E-6 , "b\\"":2,"c": 3}', ('b"',)) == '{ "a" : 1E-6 , "c": 3}'
    assert remove_member('{ "a" : 1E-6 , "c": 3 }', ("c",)) == '{ "a" : 1E-6  }'


def test_a_missing_key_is_an_error() -> None:
    """The caller knows that the path exists."""
    with pytest.raises(KeyError):
        replace_value('{"a": {}}', ("a", "b"), 1)
