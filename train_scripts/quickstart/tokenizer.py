"""A byte-level tokenizer: 256 tokens, one a byte, no special ones."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 256


def byte_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """The token id of a byte is the byte itself."""
    tokenizer = Tokenizer(models.BPE(vocab=_letters_of_bytes(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=max_length)


def save_tokenizer(folder: Path, max_length: int) -> None:
    byte_tokenizer(max_length).save_pretrained(folder)


def _letters_of_bytes() -> dict[str, int]:
    """Letter to byte, as byte-level BPE (GPT-2) writes bytes: printable ones as themselves, the others from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(VOCAB_SIZE) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    letters.update({chr(VOCAB_SIZE + place): byte for place, byte in enumerate(others)})
    return letters
