"""Cutting long documents must not change a token."""

import random

import pytest
from tokenizers import pre_tokenizers

from easyctx.data import pieces
from tests.data_helpers import byte_bpe

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA_3.replace("{1,3}", "")
GPT_OSS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize("pattern", [None, LLAMA_3, QWEN, GPT_OSS], ids=["gpt2", "llama3", "qwen", "gpt-oss"])
def test_cut_documents_tokenise_as_whole_ones(pattern: str | None) -> None:
    tokenizer = byte_bpe(pattern)
    assert pieces.can_cut(tokenizer.to_str())
    rng = random.Random(0)
    words = ["the", "cat", "Mat", "it's", "don't", "12345", "é", "e\u0301", "日本"]
    atoms = [*words, " ", "  ", "\n", "\r\n", ".", ",' ", "_"]
    text = "".join(rng.choice(atoms) + rng.choice([" ", "", " "]) for _ in range(4000))
    parts = list(pieces.cut(text, 20))
    assert len(parts) > 200
    assert "".join(parts) == text
    glued = [i for part in parts for i in tokenizer.encode(part).ids]
    assert glued == tokenizer.encode(text).ids


def test_only_safe_tokenizers_are_cut() -> None:
    def can_cut_with(**changes: object) -> bool:
        tokenizer = byte_bpe(LLAMA_3)
        for name, value in changes.items():
            setattr(tokenizer, name, value)
        return pieces.can_cut(tokenizer.to_str())

    assert can_cut_with()
    assert not can_cut_with(pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first", split=False))
    assert not can_cut_with(pre_tokenizer=None)
    stretching = byte_bpe(LLAMA_3)
    stretching.add_special_tokens(["a b"])
    assert not pieces.can_cut(stretching.to_str())
