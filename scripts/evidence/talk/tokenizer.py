"""The tokenizer: one token a byte, whose id is the byte."""

from __future__ import annotations

from producers import inputs
from transformers import PreTrainedTokenizerFast

from talk.model import BYTES


def characters() -> list[str]:
    """What stands for each byte in `ByteLevel`: itself where it can be printed, else the next free character."""
    printed = {*range(33, 127), *range(161, 173), *range(174, 256)}
    free = iter(range(BYTES, 2 * BYTES))
    return [chr(byte if byte in printed else next(free)) for byte in range(BYTES)]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and the special tokens after them."""
    return inputs.byte_tokenizer(characters())
