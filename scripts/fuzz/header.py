"""Coverage-guided fuzzing of the header reader: what we accept, the stock reader accepts and reads the same."""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path

import atheris
from safetensors import deserialize

with atheris.instrument_imports(include=["rewrite", "json"]):
    from rewrite.checkpoint.header import build_header, parse_header, read_header
    from rewrite.checkpoint.local import LocalFile
    from rewrite.errors import HeaderError

FILE = os.memfd_create("header")


def one(data: bytes) -> None:
    """The input as a file, and what follows its first eight bytes as the text of a file of the right length and size:
    mutations rarely keep these right, and would get no further."""
    judge(data)
    text = data[8:].partition(b"\xff")[0]
    try:
        size = parse_header(text, "x").data_bytes
    except HeaderError:
        size = 0
    if size <= 1 << 16:
        judge(struct.pack("<Q", len(text)) + text + bytes(size))


def judge(data: bytes) -> None:
    os.ftruncate(FILE, 0)
    os.pwrite(FILE, data, 0)
    try:
        header = read_header(LocalFile(FILE, Path("x")), "x")
    except HeaderError:
        return
    stock = {name: (info["dtype"], tuple(info["shape"]), len(info["data"])) for name, info in deserialize(data)}
    assert stock == {t.name: (t.dtype, t.shape, t.nbytes) for t in header.tensors}
    again = parse_header(build_header(header.tensors, header.metadata)[8:], "x")
    assert (again.tensors, again.metadata) == (header.tensors, header.metadata)


atheris.Setup(sys.argv, one)
atheris.Fuzz()
