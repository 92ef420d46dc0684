"""Looking segments up must not change a token."""

import pickle
import random

import pytest
from tokenizers import normalizers

from easyctx.data import segments
from easyctx.data.pieces import can_cut
from easyctx.data.segments import SEGMENT, SegmentEncoder
from tests.data_helpers import byte_bpe
from tests.test_data_pieces import GPT_OSS, LLAMA_3, QWEN

# White space of every kind (also what Python and the tokenizers' regular expressions disagree on), marks that combine,
# signs before line ends, contractions, letters that are no ASCII, added tokens inside of words.
ATOMS = [
    "the",
    "cat",
    "Mat",
    "it's",
    "don't",
    "'S",
    "a",
    "12345",
    "é",
    "e\u0301",
    "\u0301",
    "日本",
    "日",
    "ʰ",
    "ǅ",
    "٣",
]
ATOMS += [" ", "  ", "\n", "\r\n", "\n\n", "\t", "\x0b", "\x1c", "\x85", "\xa0", "\u1680", "\u2000", "\u2028", "\u3000"]
ATOMS += [
    "½",
    ".",
    ",",
    "'",
    "!",
    "?",
    "_",
    "/",
    "-",
    "“",
    "”",
    "\u037e",
    "\u200b",
    "\x00",
    "\ufeff",
    "🙂",
    "<s>",
    "</s>",
]


@pytest.mark.parametrize("nfc", [False, True], ids=["", "nfc"])
@pytest.mark.parametrize("pattern", [None, LLAMA_3, QWEN, GPT_OSS], ids=["gpt2", "llama3", "qwen", "gpt-oss"])
def test_segments_tokenise_as_the_whole(pattern: str | None, nfc: bool) -> None:
    tokenizer = byte_bpe(pattern, ("<s>", "</s>"))
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    assert can_cut(tokenizer.to_str())
    encoder = SegmentEncoder(tokenizer)
    rng = random.Random(0)
    texts = ["".join(rng.choices(ATOMS, k=rng.choice([1, 3, 30]))) for _ in range(400)]
    for text, ids in zip(texts, encoder.encode(texts), strict=True):
        assert "".join(SEGMENT.findall(text)) == text
        assert ids.tolist() == tokenizer.encode(text, add_special_tokens=False).ids, repr(text)


def test_words_are_segments() -> None:
    text = "The cat, it's said,\nsat; on the\nmat-like.\n\nThe end"
    want = ["The", " cat", ",", " it's", " said", ",\nsat;", " on", " the", "\nmat-like", ".\n\nThe", " end"]
    assert SEGMENT.findall(text) == want


def test_memory_is_bounded_and_workers_start_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "REMEMBERED_SEGMENTS", 10)
    tokenizer = byte_bpe()
    encoder = SegmentEncoder(tokenizer)
    texts = [f"the{i} cat{i} sat{i}" for i in range(40)]
    for text in texts:
        assert encoder.encode([text])[0].tolist() == tokenizer.encode(text).ids
        assert len(encoder._known) <= 10 + 3
    again = pickle.loads(pickle.dumps(encoder))
    assert again._known == {}
    assert again.encode(texts[:1])[0].tolist() == tokenizer.encode(texts[0]).ids


def test_what_cannot_be_looked_up() -> None:
    tokenizer = byte_bpe()
    tokenizer.model.dropout = 0.5  # merges at random
    assert not can_cut(tokenizer.to_str())
    dotted = byte_bpe()
    dotted.add_tokens(["<a.b>"])
    assert SegmentEncoder(dotted).encode(["<a.b>"])[0].tolist() != dotted.encode("<a.b>").ids
    assert not can_cut(dotted.to_str())
