"""The header of a safetensors file: bytes to :class:`Header` and back. Strict and pure.

Format (huggingface/safetensors, ``safetensors/src/tensor.rs``, format 0.4 onwards): eight bytes of little-endian header
length, that many bytes of JSON, then the data of all tensors without holes or overlaps.

The JSON is read entry by entry, never handed to a parser whole: 25 MB of brackets would become 500 MB of lists there.
Here memory follows the tensors that a header really describes, and the limits below keep that under 200 MB a file.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import repeat
from math import prod
from operator import attrgetter, sub
from typing import Any, NamedTuple, NoReturn

from rewrite.checkpoint.bounded_json import unique_keys
from rewrite.checkpoint.storage import Reader
from rewrite.errors import HeaderError

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 25_000_000  # where huggingface_hub stops; the stock reader does at 100 MB
MAX_NAMES = 200_000  # tensors of one file, or keys of its metadata
MAX_STRING_BYTES = 1_000_000
ALIGNMENT = 8  # the stock writer pads the header with spaces so that data starts 8-byte aligned

#: Bits of one element, for each dtype that safetensors 0.8 knows.
DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip
_TENSOR_KEYS = {"dtype", "shape", "data_offsets"}
_MAX_SIZE = 2**63 - 1
_SPACE = re.compile(r"[ \t\n\r]*")
_FLAT_OBJECT = re.compile(r"[ \t\n\r]*(\{[^{}]{0,4096}\})")  # a tensor entry; 4096 bytes hold any shape
_NEXT = re.compile(r"[ \t\n\r]*([,}])")
_PLAIN_NAME = re.compile(r"[\w.\-]*", re.ASCII)  # what JSON writes as it is
#: The beginning and the tensors of a header as the stock writer puts them, in plain ASCII.
_USUAL_START = re.compile(r'\{(?:"__metadata__":(\{[ !#-\[\]-~":,]{0,4096}?\}),)?(?=")')
_USUAL_TENSOR = re.compile(
    r'"([ !#-\[\]-~]+)":\{("dtype":"\w+","shape":\[[0-9,]*\]),'
    r'"data_offsets":\[(0|[1-9][0-9]{0,17}),(0|[1-9][0-9]{0,17})\](?:\},(?=")|\}\}[ \t\n\r]*\Z)'
)


class TensorInfo(NamedTuple):
    """One tensor of a shard: its bytes are ``[start, end)`` of the data section.

    A named tuple, not a dataclass: checkpoints have 100,000 of these and a tuple is the smallest object there is.
    """

    name: str
    dtype: str  # as safetensors spells it: BF16, F8_E4M3, ...
    shape: tuple[int, ...]
    start: int
    end: int
    shard: str = ""  # name of the file

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    @property
    def numel(self) -> int:
        return prod(self.shape)


_by_offset = attrgetter("start", "end")
_new = tuple.__new__  # of a TensorInfo: half the time
Entry = tuple[str, str, tuple[int, ...], int, int, str]  # the same, where there is no time for names


@dataclass(frozen=True)
class Header:
    """All tensors of a shard in the order of their data, and the ``__metadata__`` strings as they stood."""

    tensors: tuple[TensorInfo, ...]
    metadata: dict[str, str] | None
    size: int  # bytes before the data, length field included

    @property
    def data_bytes(self) -> int:
        return self.tensors[-1].end if self.tensors else 0

    @property
    def file_bytes(self) -> int:
        return self.size + self.data_bytes


def read_header(file: Reader, where: str) -> Header:
    """Read and check the header of an open file; ``where`` is its name.

    Raises :class:`HeaderError` when the file breaks the format in any way, its total size included.
    """
    file_size = file.file_id.size
    prefix = file.read(0, LENGTH_BYTES)
    if len(prefix) < LENGTH_BYTES:
        _refuse("The file is too short for a safetensors header", where, f"{LENGTH_BYTES} bytes", f"{file_size} bytes")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        _refuse("The header length is beyond the limit", where, f"at most {MAX_HEADER_BYTES}", length)
    if LENGTH_BYTES + length > file_size:
        _refuse(
            "The header runs past the end of the file", where, f"{LENGTH_BYTES + length} bytes", f"{file_size} bytes"
        )
    header = parse_header(file.read(LENGTH_BYTES, length), where)
    if header.file_bytes != file_size:
        _refuse(
            "The file size does not match its header",
            where,
            f"{header.file_bytes} bytes",
            f"{file_size} bytes",
            hint="the file is truncated or has trailing bytes: download or export it again",
        )
    return header


def parse_header(raw: bytes, where: str) -> Header:
    """Parse the JSON bytes of a header (without the length field)."""
    beginning = raw[:32]
    if not raw.startswith(b"{"):
        _refuse("The header does not begin with '{'", where, "a JSON object", beginning)
    text = raw.decode("latin-1")
    del raw  # up to 25 MB that nobody needs any more
    return _parse_usual(text, where) or _parse_any(text, where, beginning)


def _parse_any(text: str, where: str, beginning: bytes) -> Header:
    """Every header that is valid, entry by entry, and an error that names the fault of every other."""
    length, reader = len(text), _Reader(text)
    tensors: dict[str, TensorInfo] = {}
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}  # most tensors share theirs with others
    metadata: dict[str, str] | None = None
    try:
        for name in reader.keys("tensor name"):
            if name == "__metadata__":
                metadata = None if reader.skip("null") else reader.strings("metadata key")
            else:
                tensors[name] = _tensor(name, reader.flat_object(), where, shapes)
        reader.end()
    except (ValueError, RecursionError) as error:
        _refuse(f"The header is not valid: {error}", where, "JSON as the format has it", beginning)
    in_order = sorted(tensors.values(), key=_by_offset)
    _check_contiguous(in_order, where)
    return Header(tuple(in_order), metadata, LENGTH_BYTES + length)


def _parse_usual(text: str, where: str) -> Header | None:
    """A header as the stock writer makes it: a tenth of the time. None for any other, valid or not."""
    start = _USUAL_START.match(text)
    if start is None:
        return None
    try:
        metadata = None if start[1] is None else _DECODER.decode(start[1])
    except ValueError:
        return None
    if metadata is not None and not all(isinstance(value, str) for value in metadata.values()):
        return None
    columns = list(zip(*_USUAL_TENSOR.findall(text, start.end()), strict=True))
    if not columns or len(columns[0]) > MAX_NAMES:
        return None
    names, kinds, firsts, lasts = columns
    length = len(names) * len('"":{,"data_offsets":[,]},') + sum(sum(map(len, column)) for column in columns)
    known = {kind: _usual_size(kind) for kind in set(kinds)}  # most tensors share theirs with others
    dtypes, shapes, sizes = zip(*map(known.__getitem__, kinds), strict=True)
    begins, ends = [int(first) for first in firsts], [int(last) for last in lasts]
    is_whole = text[start.end() + length - 1 :].strip(" \t\n\r") == "}"  # nothing lies between what was found
    distinct = {*names, "__metadata__"}
    if not is_whole or len(distinct) != len(names) + 1 or tuple(map(sub, ends, begins)) != sizes:
        return None
    tensors = [_new(TensorInfo, entry) for entry in zip(names, dtypes, shapes, begins, ends, repeat(where))]
    tensors.sort(key=_by_offset)
    _check_contiguous(tensors, where)
    return Header(tuple(tensors), metadata, LENGTH_BYTES + len(text))


def _usual_size(kind: str) -> tuple[str, tuple[int, ...], int]:
    """Dtype, shape and bytes of a tensor; -1 bytes, as no tensor has, for what is unusual."""
    try:
        entry = json.loads(f"{{{kind}}}")
    except ValueError:
        return "", (), -1
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    if dtype not in DTYPE_BITS or prod(size for size in shape if size) > _MAX_SIZE:
        return "", (), -1
    size, rest = divmod(prod(shape) * DTYPE_BITS[dtype], 8)
    return sys.intern(dtype), shape, -1 if rest else size


def build_header(
    tensors: Iterable[Entry], metadata: Mapping[str, str] | None, residue: int = 0, modulus: int = ALIGNMENT
) -> bytes:
    """The bytes before the data: length field and JSON, padded with spaces.

    Data starts at ``residue`` modulo ``modulus``; as it stands, 8-byte aligned.
    """
    entries = [] if metadata is None else [f'"__metadata__":{_compact(dict(metadata))}']
    shapes: dict[tuple[str, tuple[int, ...]], str] = {}  # most tensors share theirs with others
    tensors = list(tensors)
    is_plain = _PLAIN_NAME.fullmatch("".join([entry[0] for entry in tensors]))
    for name, dtype, shape, start, end, _ in tensors:
        kind = shapes.get((dtype, shape))
        if kind is None:
            kind = shapes[dtype, shape] = f'{{"dtype":"{dtype}","shape":{_compact(shape)},"data_offsets":['
        key = f'"{name}"' if is_plain else _compact(name)
        entries.append(f"{key}:{kind}{start},{end}]}}")
    raw = f"{{{','.join(entries)}}}".encode()
    raw += b" " * ((residue - LENGTH_BYTES - len(raw)) % modulus)
    if len(raw) > MAX_HEADER_BYTES:
        raise HeaderError("The new header is beyond the format's limit", expected=MAX_HEADER_BYTES, found=len(raw))
    return len(raw).to_bytes(LENGTH_BYTES, "little") + raw


def _compact(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


class _Reader:
    """Takes the JSON of a header apart from left to right. Raises :class:`ValueError` at what does not belong there.

    ``text`` is the UTF-8 bytes as Latin-1, one byte a character: as Unicode, one emoji would make all of it four times
    as large.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def keys(self, kind: str) -> Iterator[str]:
        """The keys of the object that begins here. The caller reads each value before it asks for the next key."""
        self._take("{")
        if self.skip("}"):
            return
        seen: set[str] = set()
        while True:
            key = self.string()
            if key in seen:
                raise ValueError(f"duplicate {kind} {key!r}: readers disagree on which one counts")
            seen.add(key)
            if len(seen) > MAX_NAMES:
                raise ValueError(f"more than {MAX_NAMES} times a {kind}")
            self._take(":")
            yield key
            found = _NEXT.match(self._text, self._at)
            if not found:
                raise ValueError(f"',' or '}}' was expected at byte {self._at}")
            self._at = found.end()
            if found[1] == "}":
                return

    def strings(self, kind: str) -> dict[str, str]:
        """An object of strings."""
        return {key: self.string() for key in self.keys(kind)}

    def string(self) -> str:
        if not self._text.startswith('"', self._at):
            self._skip_space()
        start = self._at
        if not self._text.startswith('"', start):
            raise ValueError(f"a string was expected at byte {start}, not {self._text[start : start + 16]!r}")
        value: str
        value, self._at = _DECODER.raw_decode(self._text, start)
        if self._at - start > MAX_STRING_BYTES:
            raise ValueError(f"a string of {self._at - start} bytes, more than {MAX_STRING_BYTES}")
        if not value.isascii():
            value = json.loads(self._text[start : self._at].encode("latin-1").decode("utf-8"))
            value.encode("utf-8")  # an escape can smuggle in half a surrogate pair, which has no UTF-8 form
        return value

    def flat_object(self) -> dict[str, Any]:
        """An object without objects in it, small enough for any parser."""
        found = _FLAT_OBJECT.match(self._text, self._at)
        if not found:
            raise ValueError(f"dtype, shape and data_offsets were expected at byte {self._at}")
        self._at = found.end()
        entry = found[1]
        if "-" in entry:
            raise ValueError(f"a negative number: {entry[:100]}")  # -0 as well, as the stock reader has it
        value: dict[str, Any] = _DECODER.raw_decode(entry)[0]
        return value

    def end(self) -> None:
        self._skip_space()
        if self._at != len(self._text):
            raise ValueError(f"text after the end: {self._text[self._at : self._at + 16]!r}")

    def skip(self, token: str) -> bool:
        """Whether ``token`` comes next, which is then behind us."""
        if not self._text.startswith(token, self._at):
            self._skip_space()
            if not self._text.startswith(token, self._at):
                return False
        self._at += len(token)
        return True

    def _take(self, token: str) -> None:
        if not self.skip(token):
            raise ValueError(f"{token!r} was expected at byte {self._at}, not {self._text[self._at : self._at + 16]!r}")

    def _skip_space(self) -> None:
        found = _SPACE.match(self._text, self._at)
        self._at = found.end() if found else self._at


_DECODER = json.JSONDecoder(object_pairs_hook=unique_keys)


def _tensor(
    name: str, fields: dict[str, Any], where: str, shapes: dict[tuple[int, ...], tuple[int, ...]]
) -> TensorInfo:
    spot = f"{where}: {name}"
    if fields.keys() != _TENSOR_KEYS:
        _refuse("A tensor entry has the wrong fields", spot, sorted(_TENSOR_KEYS), sorted(fields))
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        _refuse("Unknown dtype", spot, "one of " + ", ".join(DTYPE_BITS), dtype)
    if not _all_sizes(shape):
        _refuse("The shape is not a list of sizes", spot, "integers from 0", shape)
    if not _all_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _refuse("The data offsets are not a range", spot, "[start, end] with start ≤ end", offsets)
    start, end = offsets
    numel = prod(shape)
    bits = numel * DTYPE_BITS[dtype]
    # A dimension of 0 hides how large the others are; the stock reader multiplies from the left and refuses overflow.
    if prod(size for size in shape if size) > _MAX_SIZE or bits != 8 * (end - start):
        _refuse(
            "Shape and byte range disagree",
            spot,
            f"{dtype} {list(shape)} = {bits / 8:.16g} bytes",
            f"{end - start} bytes",
        )
    return TensorInfo(name, sys.intern(dtype), shapes.setdefault(tuple(shape), tuple(shape)), start, end, where)


def _all_sizes(value: object) -> bool:
    # bool is an int to Python, not to the format
    return type(value) is list and all(type(v) is int and 0 <= v <= _MAX_SIZE for v in value)


def _check_contiguous(tensors: list[TensorInfo], where: str) -> None:
    end = 0
    for t in tensors:
        if t.start != end:
            fault = "overlap" if t.start < end else "leave a hole"
            _refuse(f"Tensors {fault} in the data", f"{where}: {t.name}", f"start {end}", f"start {t.start}")
        end = t.end


def _refuse(what: str, where: str, expected: object, found: object, hint: str | None = None) -> NoReturn:
    raise HeaderError(what, where=where, expected=expected, found=found, hint=hint)
