"""The tokenizer: one token a byte, whose id is the byte."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from talk.model import BYTES

SPECIAL = ("<|endoftext|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")


def characters() -> list[str]:
    """What stands for each byte in `ByteLevel`: itself where it can be printed, else the next free character."""
    printed = {*range(33, 127), *range(161, 173), *range(174, 256)}
    free = iter(range(BYTES, 2 * BYTES))
    return [chr(byte if byte in printed else next(free)) for byte in range(BYTES)]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and the special tokens after them."""
    tokenizer = Tokenizer(models.BPE(vocab={each: byte for byte, each in enumerate(characters())}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[0], pad_token=SPECIAL[0])
