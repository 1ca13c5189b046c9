"""The header reader accepts what the stock reader accepts (less duplicates) and says what is wrong with the rest."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.torch import save

from rewrite.checkpoint.header import (
    Header,
    TensorInfo,
    _parse_any,
    _parse_usual,
    build_header,
    parse_header,
    read_header,
)
from rewrite.checkpoint.local import LocalFile, open_regular
from rewrite.errors import HeaderError

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def read(data: bytes, path: Path) -> Header:
    path.write_bytes(data)
    with open_regular(path) as file:
        return read_header(file, path.name)


def file_of(header: Any, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def test_reads_what_the_stock_writer_writes(tmp_path: Path) -> None:
    """Names, dtypes, shapes, offsets and metadata of a stock file."""
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros(5, dtype=torch.bfloat16), "c": torch.zeros(())}
    header = read(save(tensors, {"format": "pt"}), tmp_path / "s")
    assert {t.name: (t.dtype, t.shape) for t in header.tensors} == {
        "a": ("F32", (2, 3)),
        "b": ("BF16", (5,)),
        "c": ("F32", ()),
    }
    assert header.metadata == {"format": "pt"}


def test_header_bytes_are_pinned() -> None:
    """Compact JSON, metadata first, spaces to the next multiple of eight."""
    raw = build_header([TensorInfo("a", "F32", (2,), 0, 8)], {"format": "pt"})
    body = b'{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    assert raw == struct.pack("<Q", 88) + body + b" " * (88 - len(body))


def test_no_metadata_is_not_written_as_an_empty_object() -> None:
    """``{}`` as metadata is legal but no stock file has it."""
    assert b"__metadata__" not in build_header([], None)


names = st.text(min_size=1, max_size=30).filter(lambda s: s != "__metadata__" and _encodes(s))
dtypes = st.sampled_from([("F32", 4), ("BF16", 2), ("F8_E4M3", 1), ("I64", 8), ("BOOL", 1)])


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@given(
    st.dictionaries(names, st.tuples(dtypes, st.lists(st.integers(0, 4), max_size=3)), max_size=8),
    st.none() | st.dictionaries(names, names, min_size=1, max_size=3),
)
def test_round_trip_and_the_stock_reader_agree(
    entries: dict[str, tuple[tuple[str, int], list[int]]], metadata: dict[str, str] | None
) -> None:
    """Whatever we write, we read back, and so does the stock reader."""
    tensors, end = [], 0
    for name, ((dtype, width), shape) in entries.items():
        size = width
        for dim in shape:
            size *= dim
        tensors.append(TensorInfo(name, dtype, tuple(shape), end, end + size))
        end += size
    raw = build_header(tensors, metadata)
    assert len(raw) % 8 == 0
    header = parse_header(raw[8:], "x")
    assert sorted(header.tensors) == sorted(t._replace(shard="x") for t in tensors)
    assert header.metadata == metadata
    stock = {name: (info["dtype"], tuple(info["shape"])) for name, info in deserialize(raw + bytes(end))}
    assert stock == {t.name: (t.dtype, t.shape) for t in tensors}


def _entry(**changes: Any) -> dict[str, Any]:
    return {"a": {**F32, **changes}}


BROKEN = {
    "empty file": b"",
    "seven bytes": b"1234567",
    "length past the end": struct.pack("<Q", 100) + b"{}",
    "length beyond the limit": struct.pack("<Q", 100_000_001) + b"{}",
    "no object": file_of([]),
    "no JSON": file_of(b"{nope"),
    "not UTF-8": file_of(b'{"\xff":1}'),
    "leading space": file_of(b" {}"),
    "trailing text": file_of(b"{} x"),
    "duplicate tensor": file_of(b'{"a":%s,"a":%s}' % ((json.dumps(F32).encode(),) * 2), bytes(8)),
    "duplicate field": file_of(b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
    "duplicate metadata": file_of(b'{"__metadata__":{"a":"1","a":"2"}}'),
    "metadata not strings": file_of({"__metadata__": {"a": 1}}),
    "metadata a list": file_of({"__metadata__": ["a"]}),
    "tensor not an object": file_of({"a": 1}),
    "field missing": file_of({"a": {"dtype": "F32", "shape": [2]}}),
    "field too many": file_of(_entry(extra=1), bytes(8)),
    "unknown dtype": file_of(_entry(dtype="F33"), bytes(8)),
    "dtype not a string": file_of(_entry(dtype=["F32"]), bytes(8)),
    "fraction": file_of(_entry(shape=[2.0]), bytes(8)),
    "exponent": file_of(b'{"a":{"dtype":"F32","shape":[2e0],"data_offsets":[0,8]}}', bytes(8)),
    "negative": file_of(_entry(shape=[-2]), bytes(8)),
    "minus zero": file_of(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[-0,8]}}', bytes(8)),
    "bool": file_of(_entry(shape=[True, 2]), bytes(8)),
    "NaN": file_of(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', bytes(8)),
    "shape and range disagree": file_of(_entry(shape=[3]), bytes(8)),
    "overflowing shape": file_of(_entry(shape=[2**62, 2**62, 0], data_offsets=[0, 0])),
    "end before start": file_of(_entry(data_offsets=[8, 0]), bytes(8)),
    "three offsets": file_of(_entry(data_offsets=[0, 8, 8]), bytes(8)),
    "hole": file_of({**_entry(), "b": {**F32, "data_offsets": [12, 20]}}, bytes(20)),
    "hole at the start": file_of(_entry(data_offsets=[4, 12]), bytes(12)),
    "overlap": file_of({**_entry(), "b": {**F32, "data_offsets": [4, 12]}}, bytes(12)),
    "trailing data": file_of(_entry(), bytes(9)),
    "missing data": file_of(_entry(), bytes(7)),
    "half a surrogate pair": file_of(b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
    "deep nesting": file_of(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "huge number": file_of(b'{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,8]}}' % (b"9" * 5000), bytes(8)),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused_with_their_name(case: str, tmp_path: Path) -> None:
    """Never a traceback of another kind, and the message names the file."""
    with pytest.raises(HeaderError) as caught:
        read(BROKEN[case], tmp_path / "shard")
    assert "shard" in str(caught.value)


#: Where we follow the specification to the letter and the stock reader does not.
STRICTER = {"duplicate tensor", "duplicate field", "duplicate metadata", "leading space", "field too many"}


@pytest.mark.parametrize("case", sorted(BROKEN.keys() - STRICTER))
def test_the_stock_reader_refuses_them_too(case: str) -> None:
    """Nothing that loads elsewhere is refused here, but for what the specification forbids."""
    with pytest.raises((SafetensorError, ValueError)):
        deserialize(BROKEN[case])


@given(st.binary(max_size=200))
def test_accepted_bytes_are_accepted_by_the_stock_reader(data: bytes) -> None:
    """Differential: whatever we accept, the stock reader accepts and reads the same."""
    _differential(data)


@given(st.data())
def test_mutated_headers_are_judged_like_the_stock_reader(data: st.DataObject) -> None:
    """The same for files that are one edit away from a good one."""
    good = bytearray(save({"a": torch.zeros(2, 3), "b": torch.zeros(5, dtype=torch.bfloat16)}, {"format": "pt"}))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(good) - 1))
        good[at] = data.draw(st.integers(0, 255))
    _differential(bytes(good))


@given(st.data())
def test_the_short_way_reads_what_the_long_way_reads(data: st.DataObject) -> None:
    """Usual headers, and those that are one edit away from a usual one: the same header, or the long way is taken."""
    good = bytearray(save({"a.1": torch.zeros(2, 3), "b": torch.zeros(5, dtype=torch.bfloat16)}, {"format": "pt"}))[8:]
    text = bytes(good[: good.rindex(b"}") + 1])
    assert _parse_usual(text.decode(), "x") == parse_header(text, "x")  # the short way is taken at all
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text) - 1))
        new = data.draw(st.sampled_from([bytes([c]) for c in b'{}[]",:0123456789ab \\'] + [b"", b'"a.1"', b'{"c":']))
        text = text[:at] + new + text[at + 1 :]
    try:
        usual = _parse_usual(text.decode("latin-1"), "x")
    except HeaderError:
        usual = None  # the message of both
    if usual is not None:
        assert usual == _parse_any(text.decode("latin-1"), "x", b"")


@pytest.mark.parametrize("metadata", ['{"a":1}', '{"a":{"b":"c"}}', '{"a":"b","a":"c"}', '{"a":null}'])
def test_metadata_of_other_values_goes_the_long_way(metadata: str) -> None:
    """It is refused there."""
    text = f'{{"__metadata__":{metadata},"a":{{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}}}'
    assert _parse_usual(text, "x") is None
    with pytest.raises(HeaderError):
        parse_header(text.encode(), "x")


def test_a_header_that_ends_between_two_tensors_goes_the_long_way() -> None:
    """And is refused there."""
    tensor = '{"dtype":"F32","shape":[2],"data_offsets":[%d,%d]}'
    text = f'{{"a":{tensor % (0, 8)}}}"b":{tensor % (8, 16)}}}'
    assert _parse_usual(text, "x") is None
    assert _parse_usual(text.replace('}"b"', ',"b"', 1), "x") is not None
    with pytest.raises(HeaderError, match="text after the end"):
        parse_header(text.encode(), "x")


def _differential(data: bytes) -> None:
    fd = os.memfd_create("header")
    try:
        os.pwrite(fd, data, 0)
        header = read_header(LocalFile(fd, Path("x")), "x")
    except HeaderError:
        return
    finally:
        os.close(fd)
    stock = {name: (info["dtype"], tuple(info["shape"])) for name, info in deserialize(data)}
    assert stock == {t.name: (t.dtype, t.shape) for t in header.tensors}
