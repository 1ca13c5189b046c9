"""The header of a safetensors file: bytes to :class:`Header` and back. Strict and pure.

Format (huggingface/safetensors, ``safetensors/src/tensor.rs``, format 0.4 onwards): eight bytes of little-endian header
length, that many bytes of JSON, then the data of all tensors without holes or overlaps.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple, NoReturn

from rewrite.errors import HeaderError

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the limit of the stock reader
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


class TensorInfo(NamedTuple):
    """One tensor of a shard: its bytes are ``[start, end)`` of the data section.

    A named tuple, not a dataclass: checkpoints have 100,000 of these and a tuple is the smallest object there is.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    @property
    def numel(self) -> int:
        return prod(self.shape)


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


def read_header(fd: int, where: str) -> Header:
    """Read and check the header of the open file ``fd``; ``where`` names the file in errors.

    Raises :class:`HeaderError` when the file breaks the format in any way, its total size included.
    """
    file_size = os.fstat(fd).st_size
    prefix = os.pread(fd, LENGTH_BYTES, 0)
    if len(prefix) < LENGTH_BYTES:
        _refuse("The file is too short for a safetensors header", where, f"{LENGTH_BYTES} bytes", f"{file_size} bytes")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        _refuse("The header length is beyond the limit", where, f"at most {MAX_HEADER_BYTES}", length)
    if LENGTH_BYTES + length > file_size:
        _refuse(
            "The header runs past the end of the file", where, f"{LENGTH_BYTES + length} bytes", f"{file_size} bytes"
        )
    header = parse_header(_pread_all(fd, length, LENGTH_BYTES), where)
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
    if not raw.startswith(b"{"):
        _refuse("The header does not begin with '{'", where, "a JSON object", raw[:16])
    try:
        document = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_Pairs, parse_int=_size, parse_float=_size, parse_constant=_size
        )
        if b"\\u" in raw:  # only an escape can smuggle in half a surrogate pair, which has no UTF-8 form
            json.dumps(document, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        _refuse(f"The header is not valid JSON ({error})", where, "UTF-8 JSON without fractions", raw[:32])
    entries = _unique(document, where, "tensor name")
    metadata = entries.pop("__metadata__", None)
    tensors = sorted((_tensor(name, entry, where) for name, entry in entries.items()), key=_by_offset)
    _check_contiguous(tensors, where)
    return Header(tuple(tensors), _metadata(metadata, where), LENGTH_BYTES + len(raw))


def build_header(
    tensors: Iterable[TensorInfo], metadata: Mapping[str, str] | None, residue: int = 0, modulus: int = ALIGNMENT
) -> bytes:
    """The bytes before the data: length field and JSON, padded with spaces.

    Data starts at ``residue`` modulo ``modulus``; as it stands, 8-byte aligned.
    """
    document: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    for t in tensors:
        document[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [t.start, t.end]}
    raw = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    raw += b" " * ((residue - LENGTH_BYTES - len(raw)) % modulus)
    if len(raw) > MAX_HEADER_BYTES:
        raise HeaderError("The new header is beyond the format's limit", expected=MAX_HEADER_BYTES, found=len(raw))
    return len(raw).to_bytes(LENGTH_BYTES, "little") + raw


class _Pairs(tuple[tuple[str, Any], ...]):
    """A JSON object as its key-value pairs, so that duplicate keys can be seen."""

    __slots__ = ()


def _unique(value: object, where: str, kind: str) -> dict[str, Any]:
    if not isinstance(value, _Pairs):
        _refuse(f"A JSON object was expected for each {kind}", where, "an object", value)
    result = dict(value)
    if len(result) != len(value):
        twice = next(name for name, count in Counter(name for name, _ in value).items() if count > 1)
        _refuse(
            f"Duplicate {kind}",
            where,
            "each name once",
            twice,
            hint="readers disagree on which one counts: export again",
        )
    return result


def _tensor(name: str, entry: object, where: str) -> TensorInfo:
    spot = f"{where}: {name}"
    fields = _unique(entry, spot, "tensor field")
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
    return TensorInfo(name, dtype, tuple(shape), start, end)


def _all_sizes(value: object) -> bool:
    # bool is an int to Python, not to the format
    return type(value) is list and all(type(v) is int and 0 <= v <= _MAX_SIZE for v in value)


def _metadata(value: object, where: str) -> dict[str, str] | None:
    if value is None:
        return None
    metadata = _unique(value, where, "metadata key")
    for key, text in metadata.items():
        if not isinstance(text, str):
            _refuse("A metadata value is not a string", f"{where}: __metadata__[{key!r}]", "a string", text)
    return metadata


def _check_contiguous(tensors: list[TensorInfo], where: str) -> None:
    end = 0
    for t in tensors:
        if t.start != end:
            fault = "overlap" if t.start < end else "leave a hole"
            _refuse(f"Tensors {fault} in the data", f"{where}: {t.name}", f"start {end}", f"start {t.start}")
        end = t.end


def _by_offset(t: TensorInfo) -> tuple[int, int]:
    return (t.start, t.end)


def _size(text: str) -> int:
    """The stock reader takes unsigned integers only: no sign (not even -0), no fraction, no exponent."""
    if not text.isdigit():
        raise ValueError(f"{text} is not an unsigned integer")
    return int(text)


def _pread_all(fd: int, length: int, offset: int) -> bytes:
    chunks = []
    while length:
        chunk = os.pread(fd, length, offset)
        if not chunk:
            break  # the caller's JSON parser reports a header that ends early
        chunks.append(chunk)
        length -= len(chunk)
        offset += len(chunk)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _refuse(what: str, where: str, expected: object, found: object, hint: str | None = None) -> NoReturn:
    raise HeaderError(what, where=where, expected=expected, found=found, hint=hint)
